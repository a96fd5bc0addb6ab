"""Bare densities at equal numbers of evaluations: which sampler finds the modes, the moments and the evidence.

Targets (`smcdiff.targets`): 40 modes in 2 and in 50 dimensions, rings, Neal's funnel in 10 dimensions, two modes of
weights 2/3 and 1/3 in 8 dimensions, a skewed mixture in 5. All samplers know the same of a target: a Gaussian
N(0, scale^2 I) that covers it, and the width of its narrowest feature. An evaluation is one of the log density, with
its gradient where that is used; they are counted by the samplers, and every sampler gets 4096 for each of 1024 samples
(a warm-up or a pilot counts).

Samplers: `rdmc` (the mean of the denoising posterior; importance sampling in few dimensions, annealed importance
sampling in many), `rdmc, draws`, `rdsmc` (the same with weights), `slips` (persistent chains), `diffusive Gibbs`,
`parallel tempering` (64 chains each, the first quarter thrown away), BlackJAX's adaptive tempered SMC and persistent
SMC with HMC, whose step size follows the temperature, BlackJAX's NUTS and NumPyro's, after window adaptation.
Metrics: total variation of the modes' frequencies, error of the log evidence, greatest error of a mean in deviations,
sliced Kolmogorov-Smirnov distance, unbiased squared maximum mean discrepancy; each beside its floor, the same for as
many exact samples.
Bars: at its best, one of ours is not worse than the better of parallel tempering and tempered SMC by more than a floor,
in mode frequencies where there are modes, else in the sliced distance; 1.15 floors of W2 on eight modes, N = 2000; mode
weights within .05 and log evidence within .05 for the skewed and the two modes by `rdsmc`.

Command: ``python -m benchmarks unnormalised``

Sources: definitions as in `smcdiff.targets`; equal evaluations after Grenioux et al., arXiv 2402.10758, and others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from blackjax.smc import adaptive_persistent_sampling, adaptive_tempered, tempered
from jax.tree_util import Partial
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks.common import Clock, bar, format_table, total_variation
from smcdiff import estimators, rdmc, rdmc_path, run_smc, schedules, slips, targets
from smcdiff import run as run_algorithm
from smcdiff.mcmc import diffusive_gibbs, mala, parallel_tempering, tune_levels, window_adaptation
from smcdiff.mcmc import tempered as powers
from smcdiff.schedules import log_snr_times
from smcdiff.targets import HasModes

CHAINS = 64
METRICS = ("mode tv", "log evidence", "mean", "sliced ks", "mmd")


class Problem(NamedTuple):
    """A target, what is known of it, and the estimator that suits its dimension."""

    target: targets.Target
    scale: float
    width: float
    is_annealed: bool = False


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "40 modes, d = 2": lambda: Problem(targets.forty_modes(2), 15.0, 1.0),
    "40 modes, d = 50": lambda: Problem(targets.forty_modes(50), 15.0, 1.0, True),
    "rings": lambda: Problem(targets.rings(), 3.0, 0.15),
    "funnel": lambda: Problem(targets.funnel(10), 5.0, 1.0, True),
    "two modes, d = 8": lambda: Problem(targets.two_modes(8), 1.2, 0.22, True),
    "skewed modes, d = 5": lambda: Problem(targets.skewed_modes(5), 5.0, 0.8),
}


class Result(NamedTuple):
    """Samples (n, d), their weights or None, log evidence or None, and evaluations of the whole run."""

    samples: np.ndarray
    weights: np.ndarray | None
    log_evidence: float | None
    evaluations: int


def add_arguments(parser):
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--evaluations", type=int, default=4096, help="for each sample")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))


def run(args) -> dict:
    if args.quick:
        args.samples, args.evaluations, args.seeds = 128, 512, 1
        args.problems, args.samplers = ["rings"], ["rdsmc", "diffusive Gibbs"]
    rows, summary, bars = [], [], []
    for name in args.problems:
        problem, found = PROBLEMS[name](), {}
        floors = [floor(problem.target, args.samples, seed) for seed in range(args.seeds)]
        rows += [{"problem": name, "sampler": "exact", "seed": i} | row for i, row in enumerate(floors)]
        for sampler in args.samplers:
            with Clock() as clock:
                records = [one(problem, sampler, args, seed) for seed in range(args.seeds)]
            rows += [{"problem": name, "sampler": sampler, "seed": i} | row for i, row in enumerate(records)]
            found[sampler] = average(records)
            summary.append({"problem": name, "sampler": sampler} | found[sampler] | {"run_s": clock.run})
            print(format_table(summary[-1:]), flush=True)
        base = average(floors)
        summary.append({"problem": name, "sampler": "floor"} | base)
        bars += compare(name, found, base)
    if not args.quick:
        bars.append(bar("W2 / floor, eight modes", eight_modes_distance(args.seeds), 1.15))
    print(format_table(summary))
    return {
        "title": "Bare densities at equal numbers of evaluations",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")},
        "seeds": list(range(args.seeds)),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def compare(name, found, base) -> list[dict]:
    """Our best against the better of parallel tempering and tempered SMC, and the errors of rdsmc."""
    key = "mode tv" if base["mode tv"] is not None else "sliced ks"
    ours = [found[s][key] for s in OURS if s in found and np.isfinite(found[s][key])]
    rivals = [found[s][key] for s in ("parallel tempering", "tempered SMC") if s in found]
    bars = []
    if ours and rivals:
        bars.append(bar(f"{name}: {key}, best of ours", min(ours), min(rivals) + base[key]))
    if name.startswith(("two", "skewed")) and "rdsmc" in found:
        bars.append(bar(f"{name}: mode tv, rdsmc", found["rdsmc"]["mode tv"], 0.05))
        bars.append(bar(f"{name}: log evidence, rdsmc", found["rdsmc"]["log evidence"], 0.05))
    return bars


def one(problem, sampler, args, seed) -> dict:
    """Metrics of one run."""
    result = SAMPLERS[sampler](problem, args.samples, args.evaluations, jax.random.key(seed))
    exact = np.asarray(problem.target.sample(jax.random.key(1000 + seed), args.samples), float)
    error = None
    if result.log_evidence is not None and problem.target.log_evidence is not None:
        error = abs(result.log_evidence - float(problem.target.log_evidence))
    return {
        **measure(problem.target, result.samples, result.weights, exact),
        "log evidence": error,
        "evaluations a sample": result.evaluations / args.samples,
    }


def floor(target, size, seed) -> dict:
    """The metrics of exact samples."""
    x, y = (np.asarray(target.sample(jax.random.key(offset + seed), size), float) for offset in (2000, 1000))
    return measure(target, x, None, y) | {"log evidence": None}


def average(records) -> dict:
    """Means over seeds; None where there is nothing."""
    keys = (*METRICS, "evaluations a sample")
    values = {key: [r[key] for r in records if r.get(key) is not None] for key in keys}
    return {key: float(np.mean(value)) if value else None for key, value in values.items()}


def measure(target, x, weights, exact) -> dict:
    """Metrics of weighted samples beside exact ones; samples that are not finite fail them all."""
    if not np.all(np.isfinite(x)):
        return {key: math.nan for key in METRICS if key != "log evidence"}
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    distance = None
    if isinstance(target, HasModes):
        labels = np.asarray(jax.vmap(target.mode_labels)(jnp.asarray(x, jnp.float32)))
        count = len(target.mode_weights)
        distance = total_variation(
            np.bincount(labels, weights=weights, minlength=count), np.asarray(target.mode_weights)
        )
    moments = target.moments
    mean = np.max(np.abs(weights @ x - np.asarray(moments.mean)) / np.asarray(moments.std))
    return {
        "mode tv": distance,
        "mean": float(mean),
        "sliced ks": sliced_ks(x, weights, exact),
        "mmd": discrepancy(x, weights, exact),
    }


def sliced_ks(x, weights, y, num_projections=128) -> float:
    """Mean over directions of the greatest difference of the distribution functions."""
    directions = np.random.default_rng(0).normal(size=(num_projections, x.shape[1]))
    values = []
    for direction in directions:
        a, b = x @ direction, np.sort(y @ direction)
        order = np.argsort(a)
        points = np.concatenate([a, b])
        levels = np.concatenate([[0.0], np.cumsum(weights[order])])
        values.append(
            np.max(
                np.abs(
                    levels[np.searchsorted(a[order], points, side="right")]
                    - np.searchsorted(b, points, side="right") / len(b)
                )
            )
        )
    return float(np.mean(values))


def discrepancy(x, weights, y) -> float:
    """Unbiased squared maximum mean discrepancy, Gaussian kernel at the median distance of exact samples."""
    within = cdist(y, y, "sqeuclidean")
    bandwidth = np.median(within)

    def kernel(squares):
        return np.exp(-squares / bandwidth)

    n = len(y)
    own = kernel(cdist(x, x, "sqeuclidean"))
    pairs = weights @ own @ weights - np.sum(weights**2)  # the kernel of a point with itself is 1
    exact = (kernel(within).sum() - n) / (n * (n - 1))
    return float(
        pairs / (1 - np.sum(weights**2)) + exact - 2 * weights @ kernel(cdist(x, y, "sqeuclidean")).mean(1)
    )


def eight_modes_distance(num_seeds) -> float:
    """Exact W2 of rdmc on the ring of eight modes, N = 2000, over that of two sets of exact samples."""
    target, ratios = targets.eight_modes(), []
    path = _path(Problem(target, 8.0, 0.84), estimators.importance(64, reference=(0.0, 8.0)))
    fk = rdmc(path, times=_times(path, 100, 0.84), start=(0.0, 8.0), transition="draw")
    for seed in range(num_seeds):
        x = np.asarray(run_smc(jax.random.key(seed), fk, 2000, progress=False).particles.position[0], float)
        exact = [np.asarray(target.sample(jax.random.key(seed + k), 2000), float) for k in (100, 200, 300)]
        ratios.append((w2(x, exact[0]), w2(exact[1], exact[2])))
    return float(np.mean(ratios, axis=0)[0] / np.mean(ratios, axis=0)[1])


def w2(x, y) -> float:
    """Exact Wasserstein distance of order 2 of two clouds of one size."""
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def _path(problem, estimator):
    # Noise up to about the target's scale: beyond it, the start knows as much.
    schedule = schedules.ve(0.01 * problem.width, 3.0 * problem.scale)
    return rdmc_path(problem.target, schedule, estimator, rng_key=jax.random.key(0))


def _times(path, num_steps, width):
    return log_snr_times(path.schedule, num_steps, log_snr_max=-math.log(0.2 * width))


def _reverse(problem, num_samples, evaluations, rng_key, **options):
    """rdmc with 64 steps, or 32 where every estimate is annealed."""
    reference = (0.0, problem.scale)
    if problem.is_annealed:
        num_steps, num_pilots = 28, 4
        levels = max(1, evaluations // (num_steps + num_pilots) // 4 - 1)
        estimator = estimators.annealed_importance(
            4, levels, power=4.0, identity="combined", num_pilots=num_pilots
        )
    else:
        num_steps = 64
        estimator = estimators.importance(
            evaluations // num_steps // 2 * 2, reference=reference, identity="combined"
        )
    path = _path(problem, estimator)
    fk = rdmc(path, times=_times(path, num_steps, problem.width), start=reference, **options)
    result = run_smc(rng_key, fk, num_samples, progress=False)
    is_weighted = options.get("weights") == "marginal"
    return Result(
        np.asarray(result.particles.position[0], float),
        np.exp(np.asarray(result.log_weights[0], float)) if is_weighted else None,
        float(result.log_evidence[0]) if is_weighted else None,
        int(np.sum(result.particles.num_evaluations)),
    )


def _slips(problem, num_samples, evaluations, rng_key):
    """Persistent chains, from where the modes begin to part."""
    num_steps, starts = 32, 64
    per_estimate = evaluations // (num_steps + 12) // 4 - 1
    fk = slips(
        problem.target,
        estimators.chains(4, max(2, per_estimate), num_starts=starts, num_first_steps=max(2, per_estimate)),
        num_steps=num_steps,
        log_snr_min=-math.log(0.5 * problem.scale),
        log_snr_max=-math.log(0.2 * problem.width),
        num_langevin_steps=10,
    )
    result = run_smc(rng_key, fk, num_samples, progress=False)
    evaluations = int(np.sum(result.particles.num_evaluations))
    return Result(np.asarray(result.particles.position[0], float), None, None, evaluations)


def _starts(problem, rng_key):
    return problem.scale * jax.random.normal(rng_key, (CHAINS, *problem.target.event_shape))


def _thinned(algorithm, problem, num_samples, budget, per_step, rng_key, spent=0):
    """Run 64 chains on what is left of the budget, drop a quarter, keep as many samples as asked."""
    kept = num_samples // CHAINS
    num_steps = max(kept * 4 // 3 + 1, (budget - spent) // CHAINS // per_step)
    thin = max(1, int(0.75 * num_steps) // kept)
    blocks = max(kept, num_steps // thin)
    trace = run_algorithm(
        rng_key,
        algorithm,
        blocks * thin,
        position=_starts(problem, jax.random.fold_in(rng_key, 1)),
        num_chains=CHAINS,
        thin=thin,
        progress=False,
    )
    samples = np.asarray(trace.samples, float)[:, -kept:].reshape(CHAINS * kept, -1)
    return samples, trace, spent + CHAINS * blocks * thin * per_step


def _diffusive_gibbs(problem, num_samples, evaluations, rng_key):
    """Three noise levels from the scale to twice the width, three Langevin steps each."""
    widths = np.geomspace(problem.scale, 2.0 * problem.width, 3)
    dimension = math.prod(problem.target.event_shape)
    step = 0.5 * dimension ** (-1 / 3) / (1 / problem.width**2 + 1 / widths**2)
    algorithm = diffusive_gibbs(problem.target, 1.0, widths, step_size=step, num_mala_steps=3)
    samples, _, spent = _thinned(algorithm, problem, num_samples, num_samples * evaluations, 12, rng_key)
    return Result(samples, None, None, spent)


def _gaussian(scale, x):
    return -0.5 * jnp.sum((x / scale) ** 2) - x.size * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))


def _draw_gaussian(scale, shape, rng_key):
    return scale * jax.random.normal(rng_key, shape)


def _parallel_tempering(problem, num_samples, evaluations, rng_key):
    """Twelve powers, tuned in a pilot, down to the Gaussian, which is drawn exactly; four MALA steps a swap."""
    scale, shape = jnp.asarray(problem.scale), problem.target.event_shape
    path = powers(problem.target, Partial(_gaussian, scale))
    draw = partial(_draw_gaussian, scale, shape)
    ladder = jnp.concatenate([jnp.geomspace(1.0, (problem.width / problem.scale) ** 2, 11), jnp.zeros(1)])
    num_levels, num_explore, pilot = len(ladder), 4, 10
    settings = _tempered_step(problem, ladder)
    build = {"num_explore": num_explore, "draw_last": draw}
    key_tune, key_run = jax.random.split(rng_key)
    starts = _starts(problem, key_tune)
    tuned = tune_levels(
        key_tune, path, ladder, mala, settings, starts, num_rounds=3, num_steps=pilot, **build
    )
    levels = jnp.asarray(tuned.levels)
    algorithm = parallel_tempering(path, levels, mala, _tempered_step(problem, levels), **build)
    per_step = num_levels * (num_explore + 1)
    spent = 7 * pilot * per_step * CHAINS
    samples, _, spent = _thinned(
        algorithm, problem, num_samples, num_samples * evaluations, per_step, key_run, spent
    )
    return Result(samples, None, None, spent)


def _tempered_step(problem, beta):
    dimension = math.prod(problem.target.event_shape)
    return 0.5 * dimension ** (-1 / 3) / (beta / problem.width**2 + (1.0 - beta) / problem.scale**2)


def _smc_parts(problem):
    scale = jnp.asarray(problem.scale)
    prior = partial(_gaussian, scale)
    return prior, lambda x: problem.target.logdensity(x) - prior(x)


_LEAPFROGS = 5


def _smc_settings(problem, beta, dimension):
    step = 0.7 * jnp.sqrt(2.0 * _tempered_step(problem, beta))
    return {"step_size": step[None], "inverse_mass_matrix": jnp.ones((1, dimension))}


_hmc_kernel = partial(blackjax.hmc.build_kernel(), num_integration_steps=_LEAPFROGS)


def _tempered_smc(problem, num_samples, evaluations, rng_key):
    """BlackJAX's adaptive tempered SMC; the number of moves at a temperature spends the budget."""
    num_moves = 1
    for attempt in range(2):  # a pilot with one move counts the temperatures; it is not charged
        result, temperatures = _run_tempered(problem, num_samples, num_moves, rng_key, attempt)
        num_moves = max(1, evaluations // (temperatures * (_LEAPFROGS + 1)))
    return result


def _run_tempered(problem, num_samples, num_moves, rng_key, attempt):
    prior, likelihood = _smc_parts(problem)
    dimension = math.prod(problem.target.event_shape)
    kernel = adaptive_tempered.build_kernel(
        prior, likelihood, _hmc_kernel, blackjax.hmc.init, blackjax.smc.resampling.systematic, 0.5
    )
    step = jax.jit(lambda key, state, settings: kernel(key, state, num_moves, settings))
    x = problem.scale * jax.random.normal(jax.random.fold_in(rng_key, 0), (num_samples, dimension))
    state, log_evidence, count = tempered.init(x), 0.0, 0
    while state.tempering_param < 1 and count < 500:
        settings = _smc_settings(problem, state.tempering_param, dimension)
        state, info = step(jax.random.fold_in(rng_key, 1 + count), state, settings)
        log_evidence, count = log_evidence + float(info.log_likelihood_increment), count + 1
    spent = num_samples * count * (1 + num_moves * (_LEAPFROGS + 1))
    samples, weights = np.asarray(state.particles, float), np.asarray(state.weights, float)
    return Result(samples, weights, log_evidence, spent), count


def _persistent_smc(problem, num_samples, evaluations, rng_key):
    """BlackJAX's adaptive persistent SMC with a tenth of the particles in a cloud, all of which count."""
    size, num_moves, most = max(16, num_samples // 8), 1, 400
    prior, likelihood = _smc_parts(problem)
    dimension = math.prod(problem.target.event_shape)
    kernel = adaptive_persistent_sampling.build_kernel(
        prior, likelihood, _hmc_kernel, blackjax.hmc.init, blackjax.smc.resampling.systematic, 2.0
    )
    for _ in range(2):
        step = jax.jit(lambda key, state, settings, moves=num_moves: kernel(key, state, moves, settings))
        x = problem.scale * jax.random.normal(jax.random.fold_in(rng_key, 0), (size, dimension))
        state, count = adaptive_persistent_sampling.init(x, likelihood, most), 0
        while state.tempering_param < 1 and count < most:
            settings = _smc_settings(problem, state.tempering_param, dimension)
            state, _ = step(jax.random.fold_in(rng_key, 1 + count), state, settings)
            count += 1
        moves, num_moves = num_moves, max(1, num_samples * evaluations // (size * count * (_LEAPFROGS + 1)))
    samples = np.asarray(state.persistent_particles, float)[: count + 1].reshape(-1, dimension)
    weights = np.asarray(state.persistent_weights, float)[: count + 1].ravel()
    chosen = np.random.default_rng(0).choice(len(samples), num_samples, p=weights / weights.sum())
    spent = size * count * (1 + moves * (_LEAPFROGS + 1))
    return Result(samples[chosen], None, float(state.log_Z), spent)


def _nuts(problem, num_samples, evaluations, rng_key):
    """BlackJAX's NUTS: a fifth of the budget warms up, the rest is spent by the mean length of trajectories."""
    key_warm, key_pilot, key_run = jax.random.split(rng_key, 3)
    budget, warm_steps = num_samples * evaluations // CHAINS, 100
    starts = _starts(problem, key_warm)
    warm = window_adaptation(
        key_warm, problem.target.logdensity, partial(blackjax.nuts, max_num_doublings=6), starts, warm_steps
    )
    algorithm = blackjax.nuts(problem.target.logdensity, **warm.settings, max_num_doublings=6)
    pilot = run_algorithm(
        key_pilot, algorithm, 20, position=warm.positions, num_chains=CHAINS, progress=False
    )
    length = float(np.mean(pilot.info.num_integration_steps))
    kept = num_samples // CHAINS
    num_steps = max(kept, int((budget - (warm_steps + 20) * length) / length))
    thin = max(1, num_steps // kept)
    trace = run_algorithm(
        key_run, algorithm, kept * thin, state=pilot.state, num_chains=CHAINS, thin=thin, progress=False
    )
    samples = np.asarray(trace.samples, float).reshape(CHAINS * kept, -1)
    spent = int(CHAINS * (warm_steps + 20 + kept * thin) * length)
    return Result(samples, None, None, spent)


def _numpyro_nuts(problem, num_samples, evaluations, rng_key):
    """NumPyro's NUTS on the potential, vectorised chains, a fifth of the steps for the warm-up."""
    kept = num_samples // CHAINS
    budget = num_samples * evaluations // CHAINS

    def potential(x):
        return -problem.target.logdensity(x)

    def sample(num_warm, num_steps, thin):
        kernel = numpyro.infer.NUTS(potential_fn=potential, max_tree_depth=6)
        mcmc = numpyro.infer.MCMC(
            kernel,
            num_warmup=num_warm,
            num_samples=num_steps,
            num_chains=CHAINS,
            chain_method="vectorized",
            thinning=thin,
            progress_bar=False,
        )
        mcmc.run(rng_key, init_params=_starts(problem, rng_key), extra_fields=("num_steps",))
        return mcmc

    length = float(np.mean(sample(100, 20, 1).get_extra_fields()["num_steps"]))
    num_steps = max(kept, int(budget / length - 220))
    thin = max(1, num_steps // kept)
    mcmc = sample(100, kept * thin, thin)
    spent = int(CHAINS * (220 + kept * thin) * length)
    return Result(np.asarray(mcmc.get_samples(), float)[-num_samples:], None, None, spent)


OURS = ("rdmc", "rdmc, draws", "rdsmc", "slips", "diffusive Gibbs")
SAMPLERS: dict[str, Callable] = {
    "rdmc": _reverse,
    "rdmc, draws": partial(_reverse, transition="draw"),
    "rdsmc": partial(_reverse, weights="marginal"),
    "slips": _slips,
    "diffusive Gibbs": _diffusive_gibbs,
    "parallel tempering": _parallel_tempering,
    "tempered SMC": _tempered_smc,
    "persistent SMC": _persistent_smc,
    "NUTS, BlackJAX": _nuts,
    "NUTS, NumPyro": _numpyro_nuts,
}
