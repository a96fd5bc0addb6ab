"""Polar slice sampling on three targets of known law, beside hit-and-run, NUTS and exact draws; and what it costs.

Chains start from exact draws, so there is no burn-in, and run side by side; every seed is a chain.

cauchy   The standard Cauchy law in d = 100, log p = -(d + 1)/2 log(1 + |x|^2), width 100. Autocorrelation time of
         log |x|; P(|x| > b, x_1 > 0) for b the median of |x|, exactly 1/4, in 100 000 iterations. Bars: median time
         12, root mean square error of the probability 0.01. Beside it: radial polar slice sampling, hit-and-run slice
         sampling of the same width, and BlackJAX's NUTS after its window adaptation (its evaluations are gradients).
disk     log p = -(sum x)^2 - |x|^2 in d = 200, width 20, 10 000 iterations: a Gaussian. Bars: median autocorrelation
         time of |x| 1.3, E |x|^2 within 0.5 of 99.5025 in every chain. Hit-and-run has the width 1.
funnel   x_1 ~ N(0, 9), x_i | x_1 ~ N(0, e^{x_1}) in d = 10, width 5. Bars: the quantiles of x_1 at 0.001 and 0.999,
         over all chains, within 10 % of -+9.2707.
cost     A chain against a compiled loop of as many evaluations of the density, each at a point that depends on the one
         before, in turns. Beyond its evaluations a step costs the same for every density, tens of microseconds on a
         CPU: random numbers and loops. Bars: 1.3 times, for a logistic regression of 5000 observations in d = 55, which
         is small beside its source's, and for the mixture of the benchmark `chains` with 1, 100 and 10 000 chains.
         These three cannot be met by any sampler that draws a direction: its 100 random numbers cost a microsecond, and
         the dozen evaluations of a step two, so that the ratio is 1.4 at least. Mapped chains also wait in every loop
         for the one that takes longest, so that 10 000 are measured in batches too, chains and bare density alike (the
         argument ``batch_size`` of `smcdiff.run`). Beside them a smaller regression, and the Cauchy law, whose density
         costs next to nothing, so that the ratio is large.

The autocorrelation time of a chain is 1 + 2 sum of the first correlations, cut at the first pair of neighbours whose
sum is negative (Geyer's initial positive sequence, as in Gelman et al., Bayesian Data Analysis, section 11.5), at half
the chain at most. Where chains are short beside it, the correlations are pooled over chains, about the mean of all.
Source of the targets and settings: Schär, Habeck and Rudolf, "Gibbsian Polar Slice Sampling", arXiv 2302.03945.

Command: ``python -m benchmarks polar_slice``.
"""

import functools
import time

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy import stats

from benchmarks import chains
from benchmarks.common import bar, format_table
from benchmarks.timing import in_turns, spread
from smcdiff import targets
from smcdiff.batching import batched_map
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.mcmc.polar_slice import polar_slice, radial_polar_slice
from smcdiff.run import run as run_chains

KEYS = ("part",)
PARTS = ("cauchy", "disk", "funnel", "cost")
CAUCHY_D, DISK_D, FUNNEL_D = 100, 200, 10
MEDIAN = float(np.sqrt(CAUCHY_D * stats.f.median(CAUCHY_D, 1)))
DISK_SQUARE = 0.5 * (DISK_D - 1) + 0.5 / (1 + DISK_D)
TAIL = 0.001
EXPANSIONS = 1000  # tails as heavy as Cauchy's
BATCH = 200  # chains that are advanced together, beside all of them


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--chains", type=int, default=10, help="of the first two targets")
    parser.add_argument("--cauchy-steps", type=int, default=100_000)
    parser.add_argument("--nuts-steps", type=int, default=10_000)
    parser.add_argument("--disk-steps", type=int, default=10_000)
    parser.add_argument("--funnel-chains", type=int, default=200)
    parser.add_argument("--funnel-steps", type=int, default=50_000)
    parser.add_argument("--cost-steps", type=int, default=1000, help="of all chains together, and 5 at least")
    parser.add_argument("--cost-chains", type=int, nargs="+", default=[1, 100, 10_000], help="on the mixture")
    parser.add_argument("--repeats", type=int, default=15, help="of the timing")


def run(args) -> dict:
    if args.quick:
        args.chains, args.cauchy_steps, args.nuts_steps, args.disk_steps = 2, 200, 50, 100
        args.funnel_chains, args.funnel_steps, args.cost_steps, args.repeats = 4, 200, 20, 2
        args.cost_chains = [1, 3]
        args.parts = ["disk", "cost"]  # the others take their time to compile
    parts = {"cauchy": cauchy, "disk": disk, "funnel": funnel, "cost": cost}
    rows, summary, bars = [], [], []
    for part in args.parts:
        new_rows, new_summary, new_bars = parts[part](args)
        rows += [{"part": part, **row} for row in new_rows]
        summary += [{"part": part, **row} for row in new_summary]
        bars += new_bars
        print(f"\n{part}\n{format_table(new_summary)}", flush=True)
    return {
        "title": "Polar slice sampling",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"max_expansions": EXPANSIONS},
        "seeds": list(range(args.chains)),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


# Targets -------------------------------------------------------------------------------------------------------------


def log_cauchy(x):
    return -0.5 * (CAUCHY_D + 1) * jnp.log1p(jnp.sum(x**2))


def log_radial_cauchy(radius):
    return -0.5 * (CAUCHY_D + 1) * jnp.log1p(radius**2)


def log_disk(x):
    return -(jnp.sum(x) ** 2) - jnp.sum(x**2)


def log_regression(features, labels, x):
    """Bayesian logistic regression with a standard normal prior."""
    return jnp.sum(jax.nn.log_sigmoid(labels * (features @ x))) - 0.5 * jnp.sum(x**2)


def draw_cauchy(rng, size):
    return rng.normal(size=(size, CAUCHY_D)) / np.abs(rng.normal(size=(size, 1)))


def draw_disk(rng, size):
    """Covariance (2 (I + 1 1^T))^-1: a half but along the ones, where it is 1 / (2 (1 + d))."""
    z = rng.normal(size=(size, DISK_D)) * np.sqrt(0.5)
    return z - z.mean(1, keepdims=True) * (1 - 1 / np.sqrt(1 + DISK_D))


def draw_funnel(rng, size):
    first = 3 * rng.normal(size=(size, 1))
    return np.concatenate([first, np.exp(first / 2) * rng.normal(size=(size, FUNNEL_D - 1))], axis=1)


# Chains --------------------------------------------------------------------------------------------------------------


def autocorrelation_time(x) -> float:
    """Of one chain (n,), or of chains (m, n) by pooled correlations."""
    x = np.atleast_2d(np.asarray(x, float))
    n = x.shape[1]
    x = x - x.mean()
    spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    correlation = np.fft.irfft(spectrum.mean(0))[: n // 2]
    correlation /= correlation[0]
    pairs = (
        correlation[2 : 2 * (len(correlation) // 2) : 2] + correlation[3 : 2 * (len(correlation) // 2) : 2]
    )
    stop = int(np.argmax(pairs < 0)) if np.any(pairs < 0) else len(pairs)
    return float(1 + max(2 * correlation[1 : 2 * stop + 2].sum(), 0))


def norm_and_first(state, info):
    """What is kept of a step."""
    return jnp.linalg.norm(state.position), state.position[0]


def first_only(state, info):
    """What is kept of a step of the funnel."""
    return state.position[0]


def timed_run(seed, algorithm, start, num_steps, transform=norm_and_first):
    """Samples, infos, and seconds with compilation."""
    begin = time.perf_counter()
    trace = run_chains(
        jax.random.key(seed),
        algorithm,
        num_steps,
        position=jnp.asarray(start, jnp.float32),
        num_chains=len(start),
        transform=transform,
        progress=False,
    )
    return trace.samples, trace.info, time.perf_counter() - begin


def cauchy(args):
    start = draw_cauchy(np.random.default_rng(0), args.chains)
    samplers = {
        "polar slice": polar_slice(log_cauchy, 100.0, max_expansions=EXPANSIONS),
        "polar slice, 100 expansions": polar_slice(log_cauchy, 100.0),
        "radial polar slice": radial_polar_slice(log_radial_cauchy),
        "hit-and-run slice": hit_and_run_slice(log_cauchy, 100.0),
    }
    rows = []

    def record(name, samples, evaluations, seconds):
        for seed, (radius, first) in enumerate(zip(*samples, strict=True)):
            row = {
                "sampler": name,
                "seed": seed,
                "iterations": len(radius),
                "IAT of log r": autocorrelation_time(np.log(radius)),
                "P(r > b, x1 > 0)": float(np.mean((radius > MEDIAN) & (first > 0))),
                "evaluations an iteration": float(np.mean(evaluations[seed])),
                "s, all chains": seconds,
            }
            rows.append(row)

    for name, algorithm in samplers.items():
        samples, info, seconds = timed_run(1, algorithm, start, args.cauchy_steps)
        record(name, samples, info.num_evaluations, seconds)
    record("NUTS (blackjax)", *nuts(args, start))
    draws = draw_cauchy(np.random.default_rng(1), args.cauchy_steps)
    record("exact draws", (np.linalg.norm(draws, axis=1)[None], draws[None, :, 0]), np.zeros(1), None)

    summary = []
    for name in dict.fromkeys(row["sampler"] for row in rows):
        mine = [row for row in rows if row["sampler"] == name]
        times = np.array([row["IAT of log r"] for row in mine])
        errors = np.array([row["P(r > b, x1 > 0)"] for row in mine]) - 0.25
        entry = {
            "target": f"Cauchy, d={CAUCHY_D}",
            "sampler": name,
            "iterations": mine[0]["iterations"],
            "evaluations an iteration": np.mean([row["evaluations an iteration"] for row in mine]),
            "quantity": "log r",
            "IAT": np.median(times),
            "IAT, largest": times.max(),
            "checked": "P(r > b, x1 > 0) = 0.25",
            "found": 0.25 + errors.mean(),
            "rms error of a chain": np.sqrt(np.mean(errors**2)),
        }
        summary.append(entry)
    bars = [
        bar("Cauchy: median IAT of log r", summary[0]["IAT"], 12),
        bar("Cauchy: rms error of the probability", summary[0]["rms error of a chain"], 0.01),
    ]
    return rows, summary, bars


def nuts(args, start):
    """BlackJAX's NUTS, each chain with its own window adaptation of 1000 steps from its exact draw."""

    def chain(key, position):
        key_warmup, key_chain = jax.random.split(key)
        (state, parameters), _ = blackjax.window_adaptation(blackjax.nuts, log_cauchy).run(
            key_warmup, position, 1000
        )
        algorithm = blackjax.nuts(log_cauchy, **parameters)

        def step(state, k):
            state, info = algorithm.step(jax.random.fold_in(key_chain, k), state)
            return state, ((jnp.linalg.norm(state.position), state.position[0]), info.num_integration_steps)

        return jax.lax.scan(step, state, jnp.arange(args.nuts_steps))[1]

    begin = time.perf_counter()
    chains = jax.vmap(chain)(jax.random.split(jax.random.key(2), len(start)), jnp.asarray(start, jnp.float32))
    samples, steps = jax.tree.map(np.asarray, chains)
    return samples, steps, time.perf_counter() - begin


def disk(args):
    start = draw_disk(np.random.default_rng(0), args.chains)
    samplers = {
        "polar slice": polar_slice(log_disk, 20.0),
        "hit-and-run slice": hit_and_run_slice(log_disk, 1.0),
    }
    rows = []
    for name, algorithm in samplers.items():
        (radius, _), info, seconds = timed_run(3, algorithm, start, args.disk_steps)
        for seed in range(args.chains):
            row = {
                "sampler": name,
                "seed": seed,
                "iterations": args.disk_steps,
                "IAT of r": autocorrelation_time(radius[seed]),
                "E |x|^2": float(np.mean(np.asarray(radius[seed], float) ** 2)),
                "evaluations an iteration": float(np.mean(info.num_evaluations[seed])),
                "s, all chains": seconds,
            }
            rows.append(row)
    summary = []
    for name in samplers:
        mine = [row for row in rows if row["sampler"] == name]
        times = np.array([row["IAT of r"] for row in mine])
        squares = np.array([row["E |x|^2"] for row in mine])
        entry = {
            "target": f"disk, d={DISK_D}",
            "sampler": name,
            "iterations": args.disk_steps,
            "evaluations an iteration": np.mean([row["evaluations an iteration"] for row in mine]),
            "quantity": "r",
            "IAT": np.median(times),
            "IAT, largest": times.max(),
            "checked": f"E |x|^2 = {DISK_SQUARE:.2f}",
            "found": squares.mean(),
            "rms error of a chain": np.sqrt(np.mean((squares - DISK_SQUARE) ** 2)),
        }
        summary.append(entry)
    worst = max(abs(row["E |x|^2"] - DISK_SQUARE) for row in rows if row["sampler"] == "polar slice")
    bars = [
        bar("disk: median IAT of r", summary[0]["IAT"], 1.3),
        bar("disk: largest error of E |x|^2", worst, 0.5),
    ]
    return rows, summary, bars


def funnel(args):
    start = draw_funnel(np.random.default_rng(0), args.funnel_chains)
    exact = 3 * stats.norm.ppf(1 - TAIL)
    target = targets.funnel(FUNNEL_D, 9.0)
    samplers = {
        "polar slice": polar_slice(target, 5.0),
        "hit-and-run slice": hit_and_run_slice(target, 5.0),
    }
    rows, summary = [], []
    for name, algorithm in samplers.items():
        first, info, seconds = timed_run(4, algorithm, start, args.funnel_steps, first_only)
        low, high = np.quantile(first, [TAIL, 1 - TAIL])
        row = {
            "sampler": name,
            "seed": 0,
            "iterations": args.funnel_steps,
            "chains": args.funnel_chains,
            "IAT of x1": autocorrelation_time(first),
            "quantile 0.001": low,
            "quantile 0.999": high,
            "evaluations an iteration": float(np.mean(info.num_evaluations)),
            "s, all chains": seconds,
        }
        rows.append(row)
        for quantile, value, truth in (("0.001", low, -exact), ("0.999", high, exact)):
            entry = {
                "target": f"funnel, d={FUNNEL_D}",
                "sampler": name,
                "iterations": args.funnel_steps * args.funnel_chains,
                "evaluations an iteration": row["evaluations an iteration"],
                "quantity": "x1",
                "IAT": row["IAT of x1"],
                "checked": f"quantile {quantile} of x1 = {truth:.3f}",
                "found": value,
            }
            summary.append(entry)
    bars = [
        bar(f"funnel: relative error, {entry['checked']}", abs(entry["found"] / truth - 1), 0.1)
        for entry, truth in zip(summary[:2], (-exact, exact), strict=True)
    ]
    return rows, summary, bars


# Cost ----------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("num_steps", "batch_size"))
def chains_alone(algorithm, positions, num_steps, batch_size):
    """Chains that keep nothing: their last states, and the evaluations that each made."""

    def chain(position):
        def step(carry, k):
            state, count = carry
            state, info = algorithm.step(jax.random.fold_in(jax.random.key(5), k), state)
            return (state, count + info.num_evaluations), None

        start = (algorithm.init(position, jax.random.key(5)), jnp.zeros((), jnp.int32))
        return jax.lax.scan(step, start, jnp.arange(num_steps))[0]

    return side_by_side(chain, positions, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def bare(target, positions, num_evaluations, batch_size):
    """Nothing but evaluations, each at a point that depends on the one before."""

    def evaluate(_, x):
        return x * (1 + 1e-9 * jnp.tanh(target(x)))

    return side_by_side(lambda x: jax.lax.fori_loop(0, num_evaluations, evaluate, x), positions, batch_size)


def side_by_side(chain, positions, batch_size):
    """The chains mapped, in batches if asked; one alone is not, which spares it the lockstep of loops."""
    if len(positions) > 1:
        return batched_map(chain, batch_size)(positions)
    return jax.tree.map(lambda leaf: leaf[None], chain(positions[0]))


def regression(rng, size):
    features = rng.normal(size=(size, 55))
    labels = np.sign(features @ rng.normal(size=55) + rng.logistic(size=size))
    return Partial(log_regression, jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.float32))


def cost(args):
    rng = np.random.default_rng(6)
    cases = {
        f"logistic regression, {size} x 55": (regression(rng, size), 1.0, np.full((1, 55), 0.1), None)
        for size in (5000, 1000)
    }
    cases[f"Cauchy, d={CAUCHY_D}"] = (Partial(log_cauchy), 100.0, draw_cauchy(rng, 1), None)
    mixture = chains.law()
    draws = mixture.sample(jax.random.key(6), max(args.cost_chains))
    for count in args.cost_chains:
        name = f"mixture, d={chains.DIMENSION}, {count} chain{'s' * (count > 1)}"
        case = Partial(log_mixture, mixture), 10.0, draws[:count]
        cases[name] = (*case, None)
        if count > BATCH:
            cases[f"{name} in batches of {BATCH}"] = (*case, BATCH)
    rows, bars = [], []
    for name, (target, width, start, batch_size) in cases.items():
        position = jnp.asarray(start, jnp.float32)
        num_steps = max(5, args.cost_steps // len(position))
        algorithm = polar_slice(target, width)
        state, _ = chains_alone(algorithm, position, num_steps, batch_size)
        position = state.position  # past the transient
        _, counts = chains_alone(algorithm, position, num_steps, batch_size)
        count = int(jnp.sum(counts)) // len(position)
        chain = functools.partial(chains_alone, algorithm, position, num_steps, batch_size)
        evaluate = functools.partial(bare, target, position, count, batch_size)
        seconds = in_turns(
            {
                "chain": lambda chain=chain: jax.block_until_ready(chain()),
                "bare": lambda evaluate=evaluate: jax.block_until_ready(evaluate()),
            },
            args.repeats,
        )
        evaluations = count * len(position)
        row = {
            "target": name,
            "sampler": "polar slice",
            "iterations": num_steps,
            "evaluations an iteration": count / num_steps,
            "us an evaluation": 1e6 * np.median(seconds["chain"]) / evaluations,
            "us, bare": 1e6 * np.median(seconds["bare"]) / evaluations,
            **spread("ratio", seconds["chain"] / seconds["bare"]),
        }
        rows.append(row)
    bars += [
        bar(f"cost of an evaluation beside the bare one, {row['target']}", row["ratio"], 1.3)
        for row in rows
        if row["target"].startswith("mixture") or row is rows[0]
    ]
    return rows, rows, bars


def log_mixture(mixture, x):
    return chains.log_density(mixture)(x)
