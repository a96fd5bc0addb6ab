"""How fast and in how much memory: a run against the network calls it cannot do without, and one compiled loop.

Everything is compared within one process, in turns (A, B, then B, A, ...), and reported as a ratio or difference of
paired times: the median, with quartiles. Compilation is never counted. Five parts:

overhead   A whole run of `tds` on a pretrained prior (half the image measured, one chain, warm, no bar) against a bare
           compiled scan of the network calls that its algorithm needs, on the same batch: one `jax.vjp` of the
           denoiser at the first time and one for each step but the last, with one pull each (dps, pigdm) or rank + 1
           (moment matching in a Krylov space and its probe). The pulls of one evaluation depend on each other and
           the step on them, so that none can be merged or dropped. All else counts as overhead: random numbers,
           weights, resampling, linear algebra of the twist, chunks, copies to the host, calls beyond those needed.
           Bar: 1.15 times the bare scan.
memory     Temporary memory of the compiled chunk of a run (the compiler's own account; nothing is executed) at 4096
           particles and at 256, moved 32 at a time. Bar: 1.1 as the ratio of what is left after one cloud, the bytes
           of the particles in the sampler's state, is subtracted from each. Copies of the cloud beyond the first
           count against it; "clouds a particle adds" says how many there are.
bookkeeping  What a step costs outside the model at 10^4 particles: the same run with a denoiser that costs nothing
           (its input, shrunk), over the bare network calls of as many particles (timed on 100, in proportion).
           Random numbers, twist, weights, resampling, history and copies to the host are in it. Bar: 5 %.
progress   A run with the progress bar against one without. Bar: 1.1.
warm       A second `run_smc` of a small problem (25-mode mixture) minus the same loop as one jitted program. Bar: 5 ms.

Command: ``python -m benchmarks speed``.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import smcdiff
from benchmarks.common import RESULTS, bar, format_table
from benchmarks.timing import in_turns, spread
from smcdiff import guidance, inverse, schedules
from smcdiff.run import _chunk, _split, _start_program
from smcdiff.smc.result import _keep_log_weights

PARTS = ("overhead", "memory", "bookkeeping", "progress", "warm")
RANK = 4
TWISTS = {
    # name: (twist, vector-Jacobian products of one evaluation)
    "dps": (guidance.dps, 1),
    "pigdm": (guidance.pigdm, 1),
    f"moment_matching({RANK})": (guidance.moment_matching(RANK), RANK + 1),
}


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--twists", nargs="+", choices=TWISTS, default=list(TWISTS))
    parser.add_argument("--model", default="mnist", help="pretrained prior of the first three parts")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50, help="steps on the pretrained prior")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory-particles", type=int, nargs=2, default=[256, 4096])
    parser.add_argument("--batch-size", type=int, default=32, help="of the memory part")
    parser.add_argument("--many-particles", type=int, default=10_000, help="of the bookkeeping part")
    parser.add_argument("--mixture-steps", type=int, default=100, help="steps on the 25-mode mixture")


def run(args) -> dict:
    if args.quick:
        args.model, args.particles, args.steps, args.repeats = "mixture", 8, 4, 2
        args.memory_particles, args.batch_size, args.mixture_steps = [16, 32], 8, 6
        args.many_particles = 100
        args.twists = ["dps"]
    twists = {name: TWISTS[name] for name in args.twists}
    parts = {
        "overhead": lambda args: overhead(args, twists),
        "memory": lambda args: memory(args, twists),
        "bookkeeping": bookkeeping,
        "progress": progress,
        "warm": warm,
    }
    rows, bars = _others(args)
    for part in args.parts:
        load = os.getloadavg()[0]
        new_rows, new_bars = parts[part](args)
        rows += [{"part": part, **row, "repeats": args.repeats, "load": load} for row in new_rows]
        bars += [{**entry, "part": part} for entry in new_bars]
        print(f"\n{part} (load {load:.1f})\n{format_table(new_rows)}", flush=True)
    rows.sort(key=lambda row: PARTS.index(row["part"]))
    bars.sort(key=lambda entry: PARTS.index(entry["part"]))
    return {
        "title": "Speed and memory",
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("out", "quick", "parts", "repeats")
        },
        "seeds": [0],
        "rows": rows,
        "summary": [summarise(row) for row in rows],
        "bars": bars,
    }


def _others(args) -> tuple[list, list]:
    """Rows and bars of the parts that are not run, from the result that is there."""
    path = args.out or RESULTS / "speed.json"
    if args.quick or not path.exists():
        return [], []
    old = json.loads(path.read_text())
    return tuple([entry for entry in old[key] if entry["part"] not in args.parts] for key in ("rows", "bars"))


def summarise(row) -> dict:
    """One line of the table: the figure of merit of a row, with its quartiles."""
    name = {
        "overhead": "ratio",
        "memory": "ratio beyond the cloud",
        "bookkeeping": "share",
        "progress": "ratio",
        "warm": "extra_ms",
    }[row["part"]]
    cases = [str(row[key]) for key in ("twist", "batch_size") if key in row]
    return {
        "part": row["part"],
        "case": ", ".join(cases),
        "figure": name,
        "median": row.get(name),
        "quartile 1": row.get(f"{name}, quartile 1"),
        "quartile 3": row.get(f"{name}, quartile 3"),
        "load": row["load"],
    }


# The pretrained prior ------------------------------------------------------------------------------------------------


def prior_and_problem(args):
    """The prior, and the upper half of one sample of it measured with noise."""
    if args.model == "mixture":
        return mixture_and_problem(8)
    model = smcdiff.load(args.model)
    rows = model.event_shape[0]
    observed = np.broadcast_to((np.arange(rows) < rows // 2)[:, None], model.event_shape)
    truth = jnp.asarray(smcdiff.held_out(args.model)[0][0]).reshape(model.event_shape)
    return model, inverse.simulate_problem(jax.random.key(1), inverse.mask(observed), truth, 0.1)


def mixture_and_problem(dimension: int):
    """The mixture of 25 unit Gaussians at (-8i, -8j), repeated to ``dimension``, and half of one sample measured."""
    rng = np.random.default_rng(0)
    means = [np.tile([-8.0 * i, -8.0 * j], dimension // 2) for i in range(-2, 3) for j in range(-2, 3)]
    model = smcdiff.GaussianMixtureDiffusion.create(
        rng.normal(size=25) ** 2, means, 1.0, schedules.cosine(-9.0)
    )
    operator = inverse.mask(np.arange(dimension) < dimension // 2)
    truth = model.mixture.sample(jax.random.key(1), 1)[0]
    return model, inverse.simulate_problem(jax.random.key(2), operator, truth, 0.5)


def overhead(args, twists):
    model, problem = prior_and_problem(args)
    times = smcdiff.log_snr_times(model.schedule, args.steps)
    start = jax.random.normal(jax.random.key(3), (args.particles, *model.event_shape))
    start = model.schedule.sigma(times[0]) * start
    rows, bars = [], []
    for name, (twist, pulls) in twists.items():
        fk = smcdiff.tds(model, problem, times=times, twist=twist)
        seconds = in_turns(
            {
                "run": lambda fk=fk: smcdiff.run_smc(jax.random.key(0), fk, args.particles, progress=False),
                "bare": lambda pulls=pulls: bare(model, times, start, pulls).block_until_ready(),
            },
            args.repeats,
        )
        row = {
            "twist": name,
            "evaluations needed": args.steps,
            "evaluations made": evaluations_made(twist, args.steps),
            "pulls an evaluation": pulls,
            "run_s": np.median(seconds["run"]),
            "bare_s": np.median(seconds["bare"]),
            **spread("ratio", seconds["run"] / seconds["bare"]),
        }
        rows.append(row)
        bars.append(bar(f"overhead, {name}", row["ratio"], 1.15))
    return rows, bars


def bookkeeping(args):
    model, problem = prior_and_problem(args)
    times = smcdiff.log_snr_times(model.schedule, 10)
    start = model.schedule.sigma(times[0]) * jax.random.normal(jax.random.key(3), (100, *model.event_shape))
    free = smcdiff.Diffusion(
        jnp.asarray(0.5), _shrink, schedule=model.schedule, prediction="x0", event_shape=model.event_shape
    )
    fk = smcdiff.tds(free, problem, times=times, twist=guidance.pigdm)
    seconds = in_turns(
        {
            "run": lambda: smcdiff.run_smc(jax.random.key(0), fk, args.many_particles, progress=False),
            "bare": lambda: bare(model, times, start, 1).block_until_ready(),
        },
        args.repeats,
    )
    network = seconds["bare"] * args.many_particles / len(start)
    row = {
        "particles": args.many_particles,
        "step_ms": 100 * np.median(seconds["run"]),
        "network_ms": 100 * np.median(network),
        **spread("share", seconds["run"] / network),
    }
    return [row], [bar("bookkeeping over network calls", row["share"], 0.05)]


def _shrink(scale, x, t):
    return scale * x


@functools.partial(jax.jit, static_argnames="pulls")
def bare(model, times, x, pulls: int):
    """Nothing but network calls: at every time but the last, one evaluation of ``x`` and ``pulls`` pulls in a row."""

    def evaluate(x, t):
        denoised, pull = jax.vjp(lambda x: model.denoise(x, t), x)
        vector = denoised
        for _ in range(pulls):
            vector = pull(vector / jnp.maximum(jnp.linalg.norm(vector), 1e-6))[0]
        return denoised, vector

    def step(x, pair):
        t, s = pair
        denoised, vector = jax.vmap(evaluate, (0, None))(x, t)
        # A noiseless step, so that the network sees what it is made for; a little of the last pull, so that it counts.
        x, _ = smcdiff.reverse_transition(model.schedule, x, denoised + 1e-3 * vector, t, s, 0.0)
        return x, None

    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


class _Counted(smcdiff.GaussianMixtureDiffusion):
    """The mixture, reporting each execution of its denoiser to the host."""

    tick: Callable = eqx.field(static=True)

    def denoise(self, x, t):
        jax.debug.callback(self.tick)
        return super().denoise(x, t)


def evaluations_made(twist, steps: int) -> int:
    """Evaluations of the denoiser for each particle in a run of ``steps`` steps, counted on a small problem."""
    model, problem = mixture_and_problem(16)
    calls = []
    counted = _Counted(model.mixture, model.schedule, lambda: calls.append(1))
    fk = smcdiff.tds(counted, problem, times=smcdiff.log_snr_times(model.schedule, steps), twist=twist)
    smcdiff.run_smc(jax.random.key(0), fk, 2, progress=False)
    jax.effects_barrier()
    return len(calls)  # once for the whole batch: the report depends on no particle


def memory(args, twists):
    model, problem = prior_and_problem(args)
    times = smcdiff.log_snr_times(model.schedule, args.steps)
    few, many = args.memory_particles
    rows, bars = [], []
    for name, (twist, _) in twists.items():
        fk = smcdiff.tds(model, problem, times=times, twist=twist)
        for batch_size in (
            (args.batch_size, None) if name == "dps" else (args.batch_size,)
        ):  # None for contrast
            temporary, cloud = zip(*[temporary_memory(fk, n, batch_size) for n in (few, many)], strict=True)
            row = {
                "twist": name,
                "batch_size": batch_size,
                f"MB at {few}": temporary[0] / 1e6,
                f"MB at {many}": temporary[1] / 1e6,
                f"cloud MB at {few}": cloud[0] / 1e6,
                f"cloud MB at {many}": cloud[1] / 1e6,
                "clouds a particle adds": (temporary[1] - temporary[0]) / (cloud[1] - cloud[0]),
                "raw ratio": temporary[1] / temporary[0],
                "ratio beyond the cloud": (temporary[1] - cloud[1]) / (temporary[0] - cloud[0]),
            }
            rows.append(row)
            if batch_size is not None:
                bars.append(bar(f"memory beyond the cloud, {name}", row["ratio beyond the cloud"], 1.1))
    return rows, bars


def temporary_memory(fk, num_particles: int, batch_size: int | None) -> tuple[int, int]:
    """Bytes: temporaries of the compiled chunk of a run of one chain, and the particles of its state."""
    algorithm = smcdiff.smc.smc(fk, num_particles, batch_size=batch_size)
    arrays, frozen = _split(algorithm)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(
        lambda arrays, key: _start_program(arrays, key, None, frozen, 1, None), arrays, key
    )
    lowered = _chunk.lower(arrays, key, state, 0, frozen, _keep_log_weights, 1, 1, 1, None)
    cloud = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.particles))
    # Memory is assigned before machine code is made, so the code need not be good.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes, cloud


def progress(args):
    model, problem = prior_and_problem(args)
    fk = smcdiff.tds(model, problem, times=smcdiff.log_snr_times(model.schedule, args.steps))

    def once(show):
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            smcdiff.run_smc(jax.random.key(0), fk, args.particles, progress=show)

    seconds = in_turns({"with": lambda: once(True), "without": lambda: once(False)}, args.repeats)
    row = {
        "with_s": np.median(seconds["with"]),
        "without_s": np.median(seconds["without"]),
        **spread("ratio", seconds["with"] / seconds["without"]),
    }
    return [row], [bar("progress bar", row["ratio"], 1.1)]


# The mixture ---------------------------------------------------------------------------------------------------------


def warm(args):
    model, problem = mixture_and_problem(8)
    times = smcdiff.log_snr_times(model.schedule, args.mixture_steps)
    fk = smcdiff.tds(model, problem, times=times)
    rng_key = jax.random.key(0)
    seconds = in_turns(
        {
            "run": lambda: smcdiff.run_smc(rng_key, fk, args.particles, progress=False),
            "one chunk": lambda: smcdiff.run_smc(
                rng_key, fk, args.particles, progress=False, chunk_size=args.mixture_steps
            ),
            "jitted": lambda: jax.block_until_ready(one_program(rng_key, fk, args.particles)),
        },
        5 * args.repeats,
    )
    row = {
        "run_ms": 1e3 * np.median(seconds["run"]),
        "jitted_ms": 1e3 * np.median(seconds["jitted"]),
        **spread("extra_ms", 1e3 * (seconds["run"] - seconds["jitted"])),
        **spread("extra_ms in one chunk", 1e3 * (seconds["one chunk"] - seconds["jitted"])),
    }
    return [row], [bar("warm second run, extra ms", row["extra_ms"], 5.0)]


@functools.partial(jax.jit, static_argnames="num_particles")
def one_program(rng_key, fk, num_particles: int):
    """What `run_smc` computes for one chain, as one program."""
    algorithm = smcdiff.smc.smc(fk, num_particles)
    rng_key = jax.random.fold_in(rng_key, 0)

    def step(state, k):
        state, info = algorithm.step(jax.random.fold_in(rng_key, k + 1), state)
        return state, (state.log_weights, info)

    return jax.lax.scan(step, algorithm.init(None, rng_key), jnp.arange(fk.num_steps))
