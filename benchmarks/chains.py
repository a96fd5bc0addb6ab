"""How fast chains run and compile, against BlackJAX and NumPyro.

MALA, and HMC with 10 leapfrog steps, on a mixture of 5 Gaussians in 100 dimensions with one diagonal covariance, in
float32, for 1, 100 and 10 000 chains. The target is given as

function    its log density as a plain function, the same for every library, whose gradient all take by autodiff and
            whose parameters are constants of the program;
mixture     `smcdiff.GaussianMixture`, which gives log density and score together. BlackJAX and NumPyro, which take
            functions only, get its log density. The parameters are arguments of the program.

All kernels have the same step and run in the same compiled loop, the one of `smcdiff.run`: the keys of a chain are
folded by the step, chains are mapped, and the first coordinate and the acceptance rate of every step are kept.
NumPyro's is HMC with a fixed number of steps and without adaptation, with chains vectorised where there are several; in
this loop it is faster than through its own `MCMC`. Everything happens in one process, in turns (A, B, then B, A, ...);
the ratios are of paired processor times, which on one core are wall times without what other processes take: the
median, with quartiles. A compilation is tracing, lowering and compiling that loop with all of JAX's caches empty. That
each kernel does the same is checked by the mean of its acceptance rate.

Bars: as many steps a second as either, and a compilation of at most 1.2 times BlackJAX's. Lines without a bar show
smcdiff's kernel where everything that it reports is kept, as `smcdiff.run` does (log ratios, energies and the gap
between two line integrals, which cost sums over the sample), the same kernel with the chains in batches (the argument
``batch_size`` of `smcdiff.run`), which a core's caches hold, and BlackJAX's NUTS, whose mapped chains wait for the
longest tree.

Command: ``taskset -c 0 python -m benchmarks chains``. With a core of its own, XLA does not share work among threads.
"""

import functools
import itertools
import os
import time

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import HMC

import smcdiff
from benchmarks.common import bar, format_table
from benchmarks.timing import spread
from smcdiff import mcmc
from smcdiff.batching import batched_map

DIMENSION, COMPONENTS, LEAPFROG = 100, 5, 10
STEP = {"mala": 0.05, "hmc": 0.25, "nuts": 0.25}  # accepted at rates of .96 and .97, as the table shows
BATCH = 500  # chains that are advanced together, where that is asked for
TARGETS = ("function", "mixture")
KEYS = ("kernel", "target", "chains", "library")
CHAINS = {1: 10_000, 100: 1000, 10_000: 20}  # number of chains: steps of MALA in one timing


def add_arguments(parser):
    parser.add_argument("--kernels", nargs="+", choices=("mala", "hmc"), default=["mala", "hmc"])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--chains", type=int, nargs="+", default=list(CHAINS))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--compilations", type=int, default=4)


def run(args) -> dict:
    if args.quick:
        args.kernels, args.targets, args.chains, args.repeats, args.compilations = (
            ["hmc"],
            ["mixture"],
            [2],
            2,
            1,
        )
    rows, bars = [], []
    for kernel, target, num_chains in itertools.product(args.kernels, args.targets, args.chains):
        num_steps = CHAINS.get(num_chains, 10) // (1 if kernel == "mala" else LEAPFROG // 2)
        load = os.getloadavg()[0]
        new_rows, new_bars = compare(args, kernel, target, num_chains, max(num_steps, 2))
        rows += [{**row, "load": load} for row in new_rows]
        bars += new_bars
        print(f"\n{format_table(new_rows)}", flush=True)
    return {
        "title": "Chains beside BlackJAX and NumPyro",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")},
        "seeds": [0],
        "rows": rows,
        "summary": rows,
        "bars": bars,
    }


def compare(args, kernel, target, num_chains, num_steps):
    """Rows and bars of one kernel, target and number of chains."""
    mixture = law()
    positions = mixture.sample(jax.random.key(1), num_chains)
    samplers = dict(SAMPLERS)
    if kernel == "mala":  # NumPyro has none
        del samplers["numpyro"]
    if kernel == "mala" or target == "mixture":
        del samplers["blackjax nuts"]
    if num_chains <= BATCH:
        del samplers[IN_BATCHES]
    programs = {name: make(kernel, target, mixture, positions, num_steps) for name, make in samplers.items()}
    compile_seconds = in_turns(
        {name: programs[name][0] for name in LIBRARIES if name in programs},
        args.compilations,
        jax.clear_caches,
    )
    compiled = {name: (lower(), arguments) for name, (lower, arguments) in programs.items()}
    seconds = in_turns(
        {name: functools.partial(_finish, *entry) for name, entry in compiled.items()}, args.repeats
    )
    rows, bars = [], []
    for name, (program, arguments) in compiled.items():
        first, acceptance = program(*arguments)[:2]
        row = {
            "kernel": kernel,
            "target": target,
            "chains": num_chains,
            "library": name,
            "steps/s": num_chains * num_steps / np.median(seconds[name]),
            **spread("speed of smcdiff", seconds[name] / seconds["smcdiff"]),
        }
        if name in compile_seconds:
            ratio = compile_seconds["smcdiff"] / compile_seconds[name]
            row |= {"compile s": np.median(compile_seconds[name]), **spread("compile of smcdiff", ratio)}
        row |= {"acceptance": float(np.mean(acceptance)), "finite": bool(np.all(np.isfinite(first)))}
        rows.append(row)
        case = f"{kernel} on {target}, {num_chains} chain{'s' * (num_chains > 1)}"
        if name in ("blackjax", "numpyro"):
            bars.append(bar(f"speed of {case} / {name}", row["speed of smcdiff"], 1.0, at_least=True))
        if name == "blackjax":
            bars.append(bar(f"compilation of {case} / {name}", row["compile of smcdiff"], 1.2))
    return rows, bars


def in_turns(functions: dict, repeats: int, before=lambda: None) -> dict[str, np.ndarray]:
    """Processor times of each function, called in turns after ``before``; the first call of each is not counted."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            before()
            start = time.process_time()
            functions[name]()
            times[name].append(time.process_time() - start)
    return {name: np.array(values[1:]) for name, values in times.items()}


# The target ----------------------------------------------------------------------------------------------------------


def law() -> smcdiff.GaussianMixture:
    """Five Gaussians a few deviations apart, of unequal weights and scales."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(COMPONENTS, DIMENSION))
    covariance = np.diag(rng.uniform(0.5, 1.5, DIMENSION))
    mixture = smcdiff.GaussianMixture.create(rng.dirichlet(np.full(COMPONENTS, 3.0)), means, covariance)
    if mixture.eigenvectors is not None:  # a diagonal matrix needs no rotation
        means, variances = mixture.component_means(), jnp.diag(mixture.component_covariances()[0])[None]
        mixture = eqx.tree_at(
            lambda m: (m.rotated_means, m.eigenvalues, m.eigenvectors),
            mixture,
            (means, variances, None),
            is_leaf=lambda x: x is None,
        )
    return mixture


def log_density(mixture):
    """The log density of ``mixture``, up to a constant, written down as one would."""
    log_weights, means, variances = mixture.log_weights, mixture.rotated_means, mixture.eigenvalues

    def function(x):
        return jax.nn.logsumexp(log_weights - 0.5 * jnp.sum((x[None] - means) ** 2 / variances, axis=-1))

    return function


# The samplers: each gives a function that compiles its loop, and the loop's arguments ---------------------------------


def _smcdiff(
    kernel, target, mixture, positions, num_steps, keep=lambda info: info.acceptance_rate, batch_size=None
):
    def build(mixture, step_size):
        density = log_density(mixture) if target == "function" else mixture
        return mcmc.mala(density, step_size) if kernel == "mala" else mcmc.hmc(density, step_size, LEAPFROG)

    return _loop(build, kernel, target, mixture, positions, num_steps, keep, batch_size)


def _in_batches(kernel, target, mixture, positions, num_steps):
    return _smcdiff(kernel, target, mixture, positions, num_steps, batch_size=BATCH)


def _all_info(kernel, target, mixture, positions, num_steps):
    return _smcdiff(kernel, target, mixture, positions, num_steps, keep=lambda info: info)


def _blackjax(kernel, target, mixture, positions, num_steps):
    def build(mixture, step_size):
        density = log_density(mixture) if target == "function" else mixture.logdensity
        if kernel == "mala":
            return blackjax.mala(density, step_size)
        if kernel == "nuts":
            return blackjax.nuts(density, step_size, jnp.ones(DIMENSION))
        return blackjax.hmc(density, step_size, jnp.ones(DIMENSION), LEAPFROG)

    return _loop(build, kernel, target, mixture, positions, num_steps, lambda info: info.acceptance_rate)


def _nuts(kernel, *case):
    return _blackjax("nuts", *case)


def _loop(build, kernel, target, mixture, positions, num_steps, keep, batch_size=None):
    """The loop of `smcdiff.run`; the mixture is an argument where it is the target."""
    step_size = jnp.asarray(STEP[kernel])
    states = jax.jit(jax.vmap(lambda x: build(mixture, step_size).init(x, jax.random.key(0))))(positions)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(len(positions)))

    def loop(argument, step_size, keys, states):
        algorithm = build(argument if target == "mixture" else mixture, step_size)

        def step(states, k):
            advance = batched_map(
                lambda key, state: algorithm.step(jax.random.fold_in(key, k), state), batch_size
            )
            states, info = advance(keys, states)
            return states, (states.position[:, 0], info.acceptance_rate, keep(info))

        return jax.lax.scan(step, states, jnp.arange(num_steps))[1]

    arguments = (mixture, step_size, keys, states)
    return lambda: jax.jit(loop).lower(*arguments).compile(), arguments


def _numpyro(kernel, target, mixture, positions, num_steps):
    """HMC with its keys in its state, by its own means of running several chains."""

    def build(mixture):
        density = log_density(mixture) if target == "function" else mixture.logdensity
        hmc = HMC(
            potential_fn=lambda x: -density(x),
            step_size=STEP[kernel],
            num_steps=LEAPFROG,
            trajectory_length=None,
            adapt_step_size=False,
            adapt_mass_matrix=False,
        )
        many = len(positions) > 1
        keys = jax.random.split(jax.random.PRNGKey(2), len(positions)) if many else jax.random.PRNGKey(2)
        return hmc, hmc.init(keys, 0, positions if many else positions[0], (), {})

    states = build(mixture)[1]

    def loop(argument, states):
        hmc, _ = build(argument if target == "mixture" else mixture)  # what it makes of the start is not used

        def step(states, _):
            states = hmc.sample(states, (), {})
            return states, (states.z[..., 0], states.accept_prob)

        return jax.lax.scan(step, states, length=num_steps)[1]

    arguments = (mixture, states)
    return lambda: jax.jit(loop).lower(*arguments).compile(), arguments


def _finish(program, arguments):
    jax.block_until_ready(program(*arguments))


IN_BATCHES = f"smcdiff, batches of {BATCH}"
LIBRARIES = ("smcdiff", "blackjax", "numpyro")
SAMPLERS = {
    "smcdiff": _smcdiff,
    "blackjax": _blackjax,
    "numpyro": _numpyro,
    "smcdiff, all it reports": _all_info,
    IN_BATCHES: _in_batches,
    "blackjax nuts": _nuts,
}
