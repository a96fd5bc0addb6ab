"""Reverse diffusion Monte Carlo: laws, evidence and counts, with exact and with estimated denoising posteriors.

z-tests allow 5 standard errors: a false failure has a probability of 6e-7 a check under normality. Keys are fixed.
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import quick

import smcdiff
from smcdiff import GaussianMixture, estimators, rdmc, rdmc_path, reverse_sample, run_smc, schedules, slips
from smcdiff.estimators import Estimate, ScoreEstimator
from smcdiff.schedules import log_snr_times

Z = 5.0
WEIGHTS, MEANS, VARIANCE = np.array([0.7, 0.3]), np.array([[1.0, -0.5], [-2.0, 1.5]]), 0.2
MIXTURE = GaussianMixture.create(WEIGHTS, MEANS, VARIANCE)
LOG_EVIDENCE = -0.8
SCHEDULE = schedules.ou(4.0)
REFERENCE = (0.0, 2.0)


def _narrow(x):
    """Unnormalised N(3, .25)."""
    return -2.0 * jnp.sum((x - 3.0) ** 2)


def _log_parts(x, variance):
    """Log of the weighted densities at ``x`` of the mixture's parts, each with this variance."""
    squares = jnp.sum((x[None] - jnp.asarray(MEANS, x.dtype)) ** 2, axis=1)
    return jnp.asarray(np.log(WEIGHTS), x.dtype) - 0.5 * squares / variance - jnp.log(2 * jnp.pi * variance)


def _log_density(x):
    return jax.nn.logsumexp(_log_parts(x, VARIANCE)) + LOG_EVIDENCE


class _Exact(ScoreEstimator):
    """The denoising posterior of the mixture in closed form."""

    has_marginal: ClassVar[bool] = True

    def __call__(self, rng_key, target, centre, width, state):
        log_parts = _log_parts(centre, VARIANCE + width**2)
        means = (VARIANCE * centre[None] + width**2 * jnp.asarray(MEANS, centre.dtype)) / (
            VARIANCE + width**2
        )
        variance = VARIANCE * width**2 / (VARIANCE + width**2)
        shares = jax.nn.softmax(log_parts)
        mean = shares @ means
        key_part, key_noise = jax.random.split(rng_key)
        part = (jax.random.uniform(key_part, (), centre.dtype) > shares[0]).astype(int)
        draw = means[part] + jnp.sqrt(variance) * jax.random.normal(key_noise, centre.shape, centre.dtype)
        variance += shares @ jnp.sum((means - mean[None]) ** 2, axis=1) / centre.size
        marginal = jax.nn.logsumexp(log_parts) + LOG_EVIDENCE
        one = jnp.ones((), centre.dtype)
        return Estimate(mean, draw, variance, marginal, one, jnp.asarray(True), 1), state


def _share(x, means=MEANS, variance=VARIANCE):
    """Probability of the first part given ``x`` of shape (..., 2): its expectation is the part's weight."""
    squares = np.sum((np.asarray(x, float)[..., None, :] - means) ** 2, axis=-1)
    odds = (
        WEIGHTS[1]
        / WEIGHTS[0]
        * np.exp(np.clip(0.5 * (squares[..., 0] - squares[..., 1]) / variance, -99, 99))
    )
    return 1 / (1 + odds)


def _path(estimator, target=_log_density, event_shape=2):
    return rdmc_path(target, SCHEDULE, estimator, rng_key=jax.random.key(100), event_shape=event_shape)


def _positions(result):
    return np.asarray(result.particles.position, float).reshape(-1, *result.particles.position.shape[2:])


@pytest.mark.parametrize("num", quick([600, 40_000], 600))
@pytest.mark.parametrize("transition", quick(["mean", "draw"], "mean"))
def test_variance_of_a_narrow_gaussian(transition, num):
    """N(3, .25) by 128 proposals a step: the implementation that others copied gives .96."""
    estimator = estimators.importance(128, reference=(1.0, 3.0), identity="combined")
    fk = rdmc(_path(estimator, _narrow, 1), times=log_snr_times(SCHEDULE, 40), transition=transition)
    x = _positions(run_smc(jax.random.key(0), fk, num, progress=False))
    # The variance is known to .25 sqrt(2 / num) = .015, and .0018 for the larger number; .005 is left to the steps.
    assert abs(x.mean() - 3.0) < 0.005 + Z * 0.5 / math.sqrt(num)
    assert abs(x.var() - 0.25) < 0.005 + (Z if num < 10_000 else 2.0) * 0.25 * math.sqrt(2 / num)


SAMPLERS = {
    "mean steps": lambda e: rdmc(_path(e), times=log_snr_times(SCHEDULE, 100)),
    "ten steps from draws": lambda e: rdmc(_path(e), times=log_snr_times(SCHEDULE, 10), transition="draw"),
    "a known start": lambda e: rdmc(
        _path(e), times=log_snr_times(SCHEDULE, 12, log_snr_min=-3.0), transition="draw", start=(0.1, 1.6)
    ),
    "Foellmer's process": lambda e: rdmc(
        rdmc_path(_log_density, schedules.foellmer(1.6), e, rng_key=jax.random.key(100), event_shape=2),
        times=log_snr_times(schedules.foellmer(1.6), 10),
        transition="draw",
    ),
    "slips, ten steps from draws": lambda e: slips(
        _log_density, e, num_steps=10, log_snr_min=-3.0, transition="draw", event_shape=2
    ),
    "slips, geometric": lambda e: slips(
        _log_density,
        e,
        num_steps=12,
        log_snr_min=-3.0,
        schedule=("geometric", 2.0, 1.0),
        sigma=1.7,
        transition="draw",
        num_langevin_steps=20,
        event_shape=2,
    ),
    "slips, mean steps": lambda e: slips(
        _log_density, e, num_steps=80, log_snr_min=-3.0, schedule=("geometric", 1.0, 1.0), event_shape=2
    ),
}


@pytest.mark.parametrize(
    "name",
    quick(SAMPLERS, "ten steps from draws", "slips, mean steps"),
)
def test_the_law_of_a_mixture_with_exact_posteriors(name):
    """Draws of the posterior make no error at any number of steps; means one of first order in the step."""
    num = 3000
    result = run_smc(jax.random.key(1), SAMPLERS[name](_Exact()), num, progress=False)
    _check_mixture(_positions(result), num, slack=1.0 if "mean" in name else 0.0)


def _check_mixture(x, num, slack=0.0):
    """Weights, means and variances of the mixture's parts, to 5 standard errors and what is left to a bias."""
    share = _share(x)
    assert abs(share.mean() - WEIGHTS[0]) < (Z + slack) * share.std() / math.sqrt(num)
    mean = WEIGHTS @ MEANS
    assert np.all(np.abs(x.mean(0) - mean) < (Z + slack) * x.std(0) / math.sqrt(num))
    for component in (0, 1):
        near = x[share > 0.5] if component == 0 else x[share <= 0.5]
        error = VARIANCE * math.sqrt(2 / len(near))
        assert np.all(np.abs(near.var(0) - VARIANCE) < (Z + slack) * error), near.var(0) / VARIANCE


WEIGHING = {
    "importance": estimators.importance(24, reference=REFERENCE, antithetic=False),
    "rejection": estimators.rejection(48, reference=REFERENCE),  # with a running bound that is none
    "annealed": estimators.annealed_importance(4, 4, reference=REFERENCE, identity="combined"),
    "annealed smc": estimators.annealed_smc(16, 8, num_moves=2, reference=REFERENCE, identity="combined"),
    "exact": _Exact(),
}


@pytest.mark.parametrize("name", quick(WEIGHING, "importance", "exact"))
def test_evidence_is_unbiased(name):
    """Means over 200 runs of 64 particles and 10 steps, with estimates that are far from exact."""
    fk = rdmc(
        _path(WEIGHING[name]),
        times=log_snr_times(SCHEDULE, 10, log_snr_max=2.5),
        weights="marginal",
        start=REFERENCE,
    )
    result = run_smc(jax.random.key(2), fk, 64, num_chains=200, progress=False)
    ratios = np.exp(np.asarray(result.log_evidence, float) - LOG_EVIDENCE)
    assert abs(ratios.mean() - 1) < Z * ratios.std() / math.sqrt(200)
    # Of a run: so small that five standard errors are below the error of a factor 1/2, and not by chance exact.
    assert 0.02 < ratios.std() < 1.3
    # The weighted share of the first mode, by the same argument.
    share = _share(result.particles.position)
    masses = ratios * np.sum(np.exp(result.log_weights) * share, axis=1)
    assert abs(masses.mean() - WEIGHTS[0]) < Z * masses.std() / math.sqrt(200)


@pytest.mark.slow
def test_weights_mend_what_bad_estimates_break():
    """Four proposals a step: without weights the first mode gets too much, with them what is its own."""
    path = _path(estimators.importance(4, reference=REFERENCE))
    times, shares = log_snr_times(SCHEDULE, 25, log_snr_max=3.0), []
    for weights in ("none", "marginal"):
        fk = rdmc(path, times=times, weights=weights, start=REFERENCE)
        result = run_smc(jax.random.key(3), fk, 500, num_chains=8, progress=False)
        share = _share(result.particles.position)
        shares.append(np.sum(np.exp(np.asarray(result.log_weights, float)) * share, axis=1))
    error = shares[1].std(ddof=1) / math.sqrt(8)
    assert abs(shares[1].mean() - WEIGHTS[0]) < max(Z * error, 0.02)
    assert abs(shares[0].mean() - WEIGHTS[0]) > 0.03


def test_the_path_is_a_function_and_a_model():
    path = _path(estimators.importance(64, reference=REFERENCE))
    t, later = np.float32(0.4), np.float32(0.4 + 1e-6)
    score = jax.jit(lambda x, t: path.score(x, t))
    both = jax.jit(lambda xs, t: jax.vmap(lambda x: (path.score(x, t), path.denoise(x, t)))(xs))
    x, near = np.array([0.3, -0.2], np.float32), np.array([0.3, -0.2 + 1e-6], np.float32)
    again = score(x, t)
    np.testing.assert_array_equal(score(x, t), again)
    assert np.abs(score(near, t) - again).max() > 1e-4  # other random numbers at once
    assert np.abs(score(x, later) - again).max() > 1e-4
    # Means over the errors of many points are those of independent ones.
    xs = x + np.float32(1e-4) * np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    xs[0] = x
    scores, found = (np.asarray(values, float) for values in both(xs, t))
    np.testing.assert_allclose(scores[0], again, rtol=1e-5)  # in a batch as alone
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    exact = np.asarray(jax.jit(lambda x: MIXTURE.denoise(x, alpha, sigma))(x))
    assert np.all(np.abs(found.mean(0) - exact) < Z * found.std(0) / math.sqrt(2000) + 0.03)
    assert np.all(np.abs(np.corrcoef(found[1:, 0], found[:-1, 0])[0, 1]) < Z / math.sqrt(2000))


@pytest.mark.slow
def test_reverse_sampler_runs_on_the_path():
    path = _path(estimators.importance(128, reference=REFERENCE, identity="combined"))
    times, num = log_snr_times(SCHEDULE, 40), 1000
    samples = np.asarray(reverse_sample(jax.random.key(4), path, times, num, batch_size=500), float)
    share = _share(samples)
    assert abs(share.mean() - WEIGHTS[0]) < Z * share.std() / math.sqrt(num) + 0.01


def test_a_kernel_on_the_path_is_pseudo_marginal():
    """Random-walk Metropolis on estimates from two proposals keeps exact draws of p_t exact."""
    import blackjax

    path = _path(estimators.importance(2, reference=REFERENCE))
    t = jnp.asarray(0.15)
    density = path.at(t)
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    means, variance = alpha * MEANS, alpha**2 * VARIANCE + sigma**2

    def chain(key, x):
        # A start from p_t alone is not stationary: the estimate there must be drawn with its own weight.
        key_tries, key_choice, key_steps = jax.random.split(key, 3)
        tries = x[None] + 1e-5 * jax.random.normal(key_tries, (64, 2))
        values = jax.vmap(density.logdensity)(tries)
        x = tries[jax.random.categorical(key_choice, values)]
        algorithm = blackjax.rmh(
            density.logdensity, lambda key, x: x + 0.7 * jax.random.normal(key, x.shape, x.dtype)
        )
        state = algorithm.init(x)
        end, infos = jax.lax.scan(
            lambda state, key: algorithm.step(key, state), state, jax.random.split(key_steps, 10)
        )
        return end.position, jnp.mean(infos.is_accepted)

    num = 4000
    rng = np.random.default_rng(5)
    starts = means[rng.choice(2, num, p=WEIGHTS)] + math.sqrt(variance) * rng.normal(size=(num, 2))
    starts = jnp.asarray(starts, jnp.float32)
    ends, accepted = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(6), num), starts)
    ends = np.asarray(ends, float)
    assert 0.2 < np.mean(accepted) < 0.9
    share = _share(ends, means, variance)
    assert abs(share.mean() - WEIGHTS[0]) < Z * share.std() / math.sqrt(num)
    mean = WEIGHTS @ means
    assert np.all(np.abs(ends.mean(0) - mean) < Z * ends.std(0) / math.sqrt(num))
    # Fourth moments of a mixture: its variance is known to less than sqrt(3 / num).
    expected = variance + WEIGHTS @ (means - mean) ** 2
    assert np.all(np.abs(ends.var(0) / expected - 1) < Z * math.sqrt(3 / num))


def test_counts_and_flags_travel_with_the_particle():
    estimator = estimators.chains(2, 6, num_starts=20, num_first_steps=8)
    times, target = log_snr_times(SCHEDULE, 5), lambda x: -jnp.sum(x**2)
    fk = rdmc(_path(estimator, target), times=times, num_langevin_steps=3)
    result = run_smc(jax.random.key(7), fk, 10, progress=False)
    # A start of 20 proposals and 2 chains of 9 evaluations, then 3 + 1 + 4 estimates of 2 chains of 7.
    assert np.all(result.particles.num_evaluations == 20 + 2 * 9 + 8 * 2 * 7)
    assert np.all(result.particles.num_invalid == 0)
    fk = rdmc(_path(estimators.rejection(4, log_bound=1e3), target), times=times)
    result = run_smc(jax.random.key(7), fk, 10, progress=False)
    assert np.all(result.particles.num_invalid == 5) and np.all(result.particles.least_ess == 0)


def test_the_last_step_denoises_or_draws():
    times = jnp.asarray([1.0, 0.5, 0.0])
    ends = {}
    for last in ("sample", "denoise"):
        fk = rdmc(_path(_Exact()), times=times, last=last)
        ends[last] = run_smc(jax.random.key(8), fk, 50, progress=False).particles
    np.testing.assert_allclose(ends["denoise"].position, ends["denoise"].estimate.denoised, rtol=1e-6)
    assert np.abs(ends["sample"].position - ends["sample"].estimate.denoised).max() > 0.1


_TRACES = []


def _counted(scale, x):
    _TRACES.append(None)
    return -scale * jnp.sum(x**2)


def test_new_targets_and_keys_do_not_compile_anew():
    times, results = log_snr_times(SCHEDULE, 4), []
    for scale in (1.0, 2.0):
        target = jax.tree_util.Partial(_counted, jnp.asarray(scale))
        path = rdmc_path(target, SCHEDULE, estimators.importance(4), rng_key=jax.random.key(0), event_shape=2)
        fk = rdmc(path, times=times, weights="marginal")
        results.append(run_smc(jax.random.key(9), fk, 5, progress=False).log_evidence[0])
        before = len(_TRACES) if len(results) == 1 else before
    assert len(_TRACES) == before > 0 and results[0] != results[1]


@pytest.mark.slow
def test_double_precision():
    with jax.enable_x64(True):
        estimator = estimators.importance(16, reference=(0.0, 2.0), identity="combined")
        path = rdmc_path(
            lambda x: -0.5 * jnp.sum(x**2), SCHEDULE, estimator, rng_key=jax.random.key(0), event_shape=3
        )
        fk = rdmc(path, times=log_snr_times(SCHEDULE, 8), weights="marginal")
        result = run_smc(jax.random.key(1), fk, 500, progress=False)
        assert result.particles.position.dtype == np.float64
        # Exact denoised samples and variances: what is left is the estimates' own noise.
        assert abs(float(result.log_evidence[0]) - 1.5 * math.log(2 * math.pi)) < 0.5


def test_bad_input_raises():
    times, path = log_snr_times(SCHEDULE, 5), _path(_Exact())
    with pytest.raises(ValueError, match=r"^event_shape is needed, since a function"):
        rdmc_path(_log_density, SCHEDULE, _Exact(), rng_key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"^estimator must be one of smcdiff.estimators, got int"):
        rdmc_path(_log_density, SCHEDULE, 3, rng_key=jax.random.key(0), event_shape=2)
    with pytest.raises(TypeError, match=r"^rdmc needs a path from smcdiff.rdmc_path, got function"):
        rdmc(_log_density, times=times)
    with pytest.raises(ValueError, match=r"^weights must be one of"):
        rdmc(path, times=times, weights="score")
    with pytest.raises(ValueError, match=r"needs an estimator with an unbiased marginal.*got Chains"):
        rdmc(_path(estimators.chains()), times=times, weights="marginal")
    with pytest.raises(ValueError, match=r'^weights="marginal" goes with transition="mean"'):
        rdmc(path, times=times, weights="marginal", transition="draw")
    with pytest.raises(ValueError, match=r"^num_langevin_steps must be"):
        rdmc(path, times=times, num_langevin_steps=-1)
    with pytest.raises(ValueError, match=r"^slips needs num_steps of at least 2"):
        slips(_log_density, _Exact(), num_steps=1, log_snr_min=0.0, event_shape=2)
    with pytest.raises(ValueError, match=r'^schedule must be "standard" or'):
        slips(_log_density, _Exact(), num_steps=5, log_snr_min=0.0, schedule="fast", event_shape=2)
    assert smcdiff.rdmc is rdmc
