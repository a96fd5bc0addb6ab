"""Samplers of a bare density under a budget of evaluations, ours and others', all told the same of the target."""

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

from smcdiff import estimators, rdmc, rdmc_path, run_smc, schedules, slips, targets
from smcdiff import run as run_algorithm
from smcdiff.mcmc import diffusive_gibbs, mala, parallel_tempering, tune_levels, window_adaptation
from smcdiff.mcmc import tempered as powers
from smcdiff.schedules import log_snr_times

__all__ = ["OURS", "REVERSE", "SAMPLERS", "Problem", "Result", "path_of", "radius", "times_of"]

CHAINS = 64


class Problem(NamedTuple):
    """A target, what is known of it, and the estimator that suits its dimension."""

    target: targets.Target
    scale: float
    width: float
    is_annealed: bool = False


class Result(NamedTuple):
    """Samples (n, d), their weights or None, log evidence or None, and evaluations of the whole run."""

    samples: np.ndarray
    weights: np.ndarray | None
    log_evidence: float | None
    evaluations: int


def path_of(problem, estimator, share=0.6):
    """Noise up to about the target's scale, in many dimensions ``share`` of the radius."""
    largest = share * radius(problem) if problem.is_annealed else 3.0 * problem.scale
    schedule = schedules.ve(0.01 * problem.width, largest)
    return rdmc_path(problem.target, schedule, estimator, rng_key=jax.random.key(0))


def times_of(path, num_steps, width):
    return log_snr_times(path.schedule, num_steps, log_snr_max=-math.log(0.2 * width))


def radius(problem) -> float:
    """Root mean square norm of a sample of the covering Gaussian: modes may lie so far away, in a single direction."""
    return problem.scale * math.sqrt(math.prod(problem.target.event_shape))


def _reverse(problem, num_samples, evaluations, rng_key, **options):
    """rdmc with 64 steps, or with 48 and an annealed cloud: three sevenths of the evaluations anneal it."""
    if problem.is_annealed:
        num_steps, cloud = 48, 9
        levels = max(1, 3 * evaluations // (7 * cloud) - 1)
        num_moves = max(1, 4 * evaluations // (7 * cloud * num_steps))
        estimator = estimators.annealed_smc(
            cloud - 1, levels, num_moves=num_moves, reference=(0.0, radius(problem)), identity="combined"
        )
    else:
        num_steps = 64
        estimator = estimators.importance(
            evaluations // num_steps // 2 * 2, reference=(0.0, problem.scale), identity="combined"
        )
    path = path_of(problem, estimator)
    return _follow(problem, num_samples, rng_key, path, num_steps, (0.0, problem.scale), **options)


def _follow(problem, num_samples, rng_key, path, num_steps, start, **options):
    """Down a path."""
    is_weighted = options.get("weights") == "marginal"
    times = times_of(path, num_steps, problem.width)
    fk = rdmc(path, times=times, start=start, **options)
    # Resampling by rough estimates picks the lucky ones: there the last weight alone decides.
    threshold = 0.0 if problem.is_annealed else 0.5
    result = run_smc(rng_key, fk, num_samples, ess_threshold=threshold, progress=False)
    return Result(
        np.asarray(result.particles.position[0], float),
        np.exp(np.asarray(result.log_weights[0], float)) if is_weighted else None,
        float(result.log_evidence[0]) if is_weighted else None,
        int(np.sum(result.particles.num_evaluations)),
    )


def _weighted(problem, num_samples, evaluations, rng_key):
    """rdmc with weights; in many dimensions from the samples of a first run without, on half of the evaluations."""
    if not problem.is_annealed:
        return _reverse(problem, num_samples, evaluations, rng_key, weights="marginal")
    key_first, key_second = jax.random.split(rng_key)
    first = _reverse(problem, num_samples, evaluations // 2, key_first)
    pool, num_steps, num_moves = jnp.asarray(first.samples, jnp.float32), 64, 2
    left = evaluations - first.evaluations // num_samples
    cloud = max(2, left // (num_steps * num_moves + 1) - 1)
    # Where nothing has to be annealed, more noise costs little, and the start has to know less.
    path = path_of(problem, estimators.resample_move(pool, cloud, num_moves=num_moves), share=1.0)
    start = (jnp.mean(pool, axis=0), jnp.std(pool, axis=0))
    result = _follow(problem, num_samples, key_second, path, num_steps, start, weights="marginal")
    return result._replace(evaluations=result.evaluations + first.evaluations)


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
    return samples, spent + CHAINS * blocks * thin * per_step


def _diffusive_gibbs(problem, num_samples, evaluations, rng_key):
    """Three noise levels from the scale to twice the width, three Langevin steps each."""
    widths = np.geomspace(problem.scale, 2.0 * problem.width, 3)
    dimension = math.prod(problem.target.event_shape)
    step = 0.5 * dimension ** (-1 / 3) / (1 / problem.width**2 + 1 / widths**2)
    algorithm = diffusive_gibbs(problem.target, 1.0, widths, step_size=step, num_mala_steps=3)
    samples, spent = _thinned(algorithm, problem, num_samples, num_samples * evaluations, 12, rng_key)
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
    per_step = num_levels * (num_explore + 3)  # the kernel's start, and both densities of a swap
    spent = 7 * pilot * per_step * CHAINS
    samples, spent = _thinned(
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
_AT_A_TEMPERATURE = 3  # evaluations for its choice, the weights, and the start of the moves


def _smc_settings(problem, beta, dimension):
    step = 0.7 * jnp.sqrt(2.0 * _tempered_step(problem, beta))
    return {"step_size": step[None], "inverse_mass_matrix": jnp.ones((1, dimension))}


_hmc_kernel = partial(blackjax.hmc.build_kernel(), num_integration_steps=_LEAPFROGS)


def _tempered_smc(problem, num_samples, evaluations, rng_key):
    """BlackJAX's adaptive tempered SMC; a pilot counts the temperatures, the number of moves spends what is left."""
    pilot, temperatures = _run_tempered(problem, num_samples, 1, rng_key)
    left = evaluations - pilot.evaluations // num_samples
    num_moves = max(1, (left // temperatures - _AT_A_TEMPERATURE) // _LEAPFROGS)
    result, _ = _run_tempered(problem, num_samples, num_moves, rng_key)
    return result._replace(evaluations=result.evaluations + pilot.evaluations)


def _run_tempered(problem, num_samples, num_moves, rng_key):
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
    spent = num_samples * count * (_AT_A_TEMPERATURE + num_moves * _LEAPFROGS)
    samples, weights = np.asarray(state.particles, float), np.asarray(state.weights, float)
    return Result(samples, weights, log_evidence, spent), count


def _persistent_smc(problem, num_samples, evaluations, rng_key):
    """BlackJAX's adaptive persistent SMC with an eighth of the particles in a cloud; a pilot as in tempered SMC."""
    size, num_moves, most, spent = max(16, num_samples // 8), 1, 400, 0
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
        spent += size * count * (_AT_A_TEMPERATURE + num_moves * _LEAPFROGS)
        left = num_samples * evaluations - spent
        num_moves = max(1, (left // (size * count) - _AT_A_TEMPERATURE) // _LEAPFROGS)
    samples = np.asarray(state.persistent_particles, float)[: count + 1].reshape(-1, dimension)
    weights = np.asarray(state.persistent_weights, float)[: count + 1].ravel()
    chosen = np.random.default_rng(0).choice(len(samples), num_samples, p=weights / weights.sum())
    return Result(samples[chosen], None, float(state.log_Z), spent)


def _nuts(problem, num_samples, evaluations, rng_key):
    """BlackJAX's NUTS. Its trajectories are counted; those of the 100 warm-up steps, which are not seen, are not.

    They are taken to be as long as the ones of the pilot after them.
    """
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
        key_run, algorithm, kept * thin, state=pilot.state, num_chains=CHAINS, progress=False
    )
    samples = np.asarray(trace.samples[:, thin - 1 :: thin], float).reshape(CHAINS * kept, -1)
    counted = np.sum(pilot.info.num_integration_steps) + np.sum(trace.info.num_integration_steps)
    spent = int(counted + CHAINS * warm_steps * length)
    return Result(samples, None, None, spent)


def _numpyro_nuts(problem, num_samples, evaluations, rng_key):
    """NumPyro's NUTS on the potential, vectorised chains; counted as BlackJAX's, with a pilot of its own."""
    kept = num_samples // CHAINS
    budget = num_samples * evaluations // CHAINS

    def potential(x):
        return -problem.target.logdensity(x)

    def sample(num_warm, num_steps):
        kernel = numpyro.infer.NUTS(potential_fn=potential, max_tree_depth=6)
        mcmc = numpyro.infer.MCMC(
            kernel,
            num_warmup=num_warm,
            num_samples=num_steps,
            num_chains=CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(rng_key, init_params=_starts(problem, rng_key), extra_fields=("num_steps",))
        return mcmc

    pilot = np.asarray(sample(100, 20).get_extra_fields()["num_steps"])
    length = float(np.mean(pilot))
    num_steps = max(kept, int(budget / length - 220))
    thin = max(1, num_steps // kept)
    mcmc = sample(100, kept * thin)
    samples = np.asarray(mcmc.get_samples(group_by_chain=True), float)[:, thin - 1 :: thin]
    counted = np.sum(pilot) + np.sum(mcmc.get_extra_fields()["num_steps"])
    spent = int(counted + CHAINS * 200 * length)
    return Result(samples.reshape(CHAINS * kept, -1), None, None, spent)


REVERSE = ("rdmc", "rdmc, draws", "rdsmc")
OURS = (*REVERSE, "slips", "diffusive Gibbs")
SAMPLERS: dict[str, Callable] = {
    "rdmc": _reverse,
    "rdmc, draws": partial(_reverse, transition="draw"),
    "rdsmc": _weighted,
    "slips": _slips,
    "diffusive Gibbs": _diffusive_gibbs,
    "parallel tempering": _parallel_tempering,
    "tempered SMC": _tempered_smc,
    "persistent SMC": _persistent_smc,
    "NUTS, BlackJAX": _nuts,
    "NUTS, NumPyro": _numpyro_nuts,
}
