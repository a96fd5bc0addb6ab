"""Kernels that noise and denoise, against closed forms.

Statistical checks allow 5 standard errors of independent chains: a false failure has a probability of about 6e-7 a
number, and a law is compared in some thirty. Keys are fixed. Tests of one kernel share a compiled program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from denoising_cases import Z, assert_law, ends, exact, gaps, parts, shares
from jax.tree_util import Partial

import smcdiff
from smcdiff import schedules
from smcdiff.denoising_posterior import DenoisingPosterior
from smcdiff.mcmc import PositionState, mala, underdamped
from smcdiff.mcmc.denoising_langevin_gibbs import denoising_langevin_gibbs
from smcdiff.mcmc.diffusive_gibbs import diffusive_gibbs
from smcdiff.mcmc.log_concave_chain import _Measurement, _MeasurementDensity, log_concave_chain
from smcdiff.mcmc.restart import denoise_along, restart
from smcdiff.mcmc.walk_jump import walk_jump

# Many programs are compiled here; tests/test_kernels.py has the kernels in the quick tests.
pytestmark = pytest.mark.slow

SCHEDULE = schedules.cosine(-7.0)
WEIGHTS = np.array([0.5, 0.2, 0.3])
N = 4000


def make_model(d=2, spread=1.0):
    """Three modes of unequal weights, apart by many of their correlated and unequal deviations."""
    rng = np.random.default_rng(d)
    means = np.array([[3.0, 1.0], [-2.0, 2.0], [0.5, -3.0]])
    means = np.concatenate([means, rng.normal(size=(3, d - 2))], axis=1)
    means = spread * means + (1.0 - spread) * means[:1]
    root = rng.normal(size=(d, d)) / np.sqrt(d)
    covariance = 0.15 * np.eye(d) + 0.25 * root @ root.T
    return smcdiff.GaussianMixtureDiffusion.create(WEIGHTS, means, covariance, SCHEDULE)


model = functools.cache(make_model)


@functools.cache
def network():
    """The same law as a model that is known by its denoiser alone."""
    return smcdiff.Diffusion(model(), _denoise, SCHEDULE, "x0", (2,))


def _denoise(params, x, t):
    return params.denoise(x, t)


@functools.cache
def at_log_snr(log_snr):
    return model().at(SCHEDULE.time_from_log_snr(jnp.asarray(log_snr)))


def in_one_mode(law):
    return jnp.broadcast_to(law.component_means()[1], (N, 2))


# ------------------------------------------------------------------------------------------------ diffusive Gibbs


def two_levels(law):
    alpha = np.array([0.25, 0.93])  # jumps between modes, and moves within them
    step_size = np.array([0.1, 0.05])
    return diffusive_gibbs(law, alpha, np.sqrt(1 - alpha**2), step_size=step_size, num_mala_steps=2)


@pytest.mark.parametrize("d", [2, 5])
def test_diffusive_gibbs_leaves_its_target_alone(d):
    law = model(d).mixture
    x, info, state = ends(two_levels(law), 12, exact(law, N))
    assert_law(law, x)
    assert info.jump_acceptance.shape == info.langevin_acceptance.shape == (N, 2)
    assert np.all(info.num_evaluations == 6)
    # Both moves do something, at both levels.
    assert np.all(info.jump_acceptance.mean(axis=0) > 1e-4) and info.jump_acceptance.mean() > 0.02
    langevin = info.langevin_acceptance.mean(axis=0)
    assert np.all((langevin > 0.2) & (langevin < 0.97))
    np.testing.assert_allclose(info.acceptance_rate, info.langevin_acceptance.mean(axis=1), rtol=1e-5)
    # What is carried along is the target's own.
    logdensity, score = jax.jit(jax.vmap(lambda x: (law.logdensity(x), law.score(x))))(state.position)
    np.testing.assert_allclose(state.logdensity, logdensity, atol=2e-4)
    np.testing.assert_allclose(state.score, score, atol=2e-3)


def test_diffusive_gibbs_carries_chains_between_modes():
    law = model().mixture
    x, _, _ = ends(two_levels(law), 160, in_one_mode(law))
    assert_law(law, x)


def _flat(x):
    return 0.0 * jnp.sum(x)


def test_the_parts_of_a_sweep():
    # Langevin steps are on the law given the noisy sample,
    law, noisy = model().mixture, jnp.array([0.4, -1.0])
    given = DenoisingPosterior(law, noisy / 0.8, jnp.asarray(0.5 / 0.8))
    x, other = jnp.array([1.0, 0.5]), jnp.array([0.2, -0.3])
    normal = [-0.5 * np.sum((noisy - 0.8 * z) ** 2) / 0.25 + law.logdensity(z) for z in (x, other)]
    np.testing.assert_allclose(
        given.logdensity(x) - given.logdensity(other), normal[0] - normal[1], rtol=1e-4
    )
    np.testing.assert_allclose(given.score(x), jax.grad(given.logdensity)(x), rtol=1e-4)
    # and on a flat target every jump is accepted and of the variance 2 (sigma/alpha)^2, which they leave alone.
    algorithm = diffusive_gibbs(_flat, 0.8, 0.5, step_size=0.1, num_mala_steps=1)
    x, info, _ = ends(algorithm, 1, jnp.ones((N, 2)))
    assert np.all(info.jump_acceptance == 1)
    assert_law(smcdiff.GaussianMixture.create([1.0], np.ones((1, 2)), 2 * (0.5 / 0.8) ** 2), x)


def _log_density_of_parts(law, parts):
    return law.logdensity(jnp.stack([parts["a"], parts["b"][0]]))


def test_diffusive_gibbs_on_a_bare_function_of_a_pytree():
    law, key = model().mixture, jax.random.key(0)
    whole = diffusive_gibbs(law, 0.4, 1.0, step_size=0.1)
    parts = diffusive_gibbs(Partial(_log_density_of_parts, law), 0.4, 1.0, step_size=0.1)
    first, _ = jax.jit(lambda: whole.step(key, whole.init(jnp.array([2.5, 0.5]), key)))()
    position = {"a": jnp.array(2.5), "b": jnp.array([0.5])}
    second, _ = jax.jit(lambda: parts.step(key, parts.init(position, key)))()
    assert not np.allclose(first.position, [2.5, 0.5])
    np.testing.assert_allclose(
        first.position, [second.position["a"], second.position["b"][0]], rtol=1e-3, atol=1e-4
    )


def test_diffusive_gibbs_refuses_what_it_cannot_use():
    law = model().mixture
    with pytest.raises(TypeError, match=r"HasLogDensity.*restart"):
        diffusive_gibbs(network().at(0.5), 0.5, 1.0, step_size=0.1)
    with pytest.raises(ValueError, match="sigma must be positive"):
        diffusive_gibbs(law, 0.5, 0.0, step_size=0.1)
    with pytest.raises(ValueError, match="one shape"):
        diffusive_gibbs(law, np.ones(2), np.ones(3), step_size=0.1)
    with pytest.raises(ValueError, match="num_mala_steps"):
        diffusive_gibbs(law, 0.5, 1.0, step_size=0.1, num_mala_steps=0)


# -------------------------------------------------------------------------------------------------------- restart


def grid(num_steps, noisy=-2.0, clean=3.0):
    return SCHEDULE.time_from_log_snr(jnp.linspace(noisy, clean, num_steps + 1))


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_denoising_falls_at_the_rate_of_its_order(order):
    # The probability flow of Gaussian data scales deviations from the mean: sqrt(v_s / v_t) along each axis.
    with jax.enable_x64(True):
        variances, mean = np.array([0.2, 2.0]), jnp.array([1.0, -0.5])
        data = smcdiff.GaussianDiffusion(mean, np.diag(variances), SCHEDULE)

        def error(num_steps):
            times = grid(num_steps)
            alpha, sigma = (np.asarray(values(times)) for values in (SCHEDULE.alpha, SCHEDULE.sigma))
            scale = np.sqrt(alpha[:, None] ** 2 * variances + sigma[:, None] ** 2)
            flow = jax.jit(lambda x: denoise_along(jax.random.key(0), data, x, times, eta=0.0, order=order))
            np.testing.assert_allclose(flow(alpha[0] * mean), alpha[-1] * mean, atol=1e-9)
            return np.abs(np.diag(jax.jacfwd(flow)(jnp.zeros(2))) / (scale[-1] / scale[0]) - 1)

        slopes = np.log2(error(40) / error(80))
        assert np.all(np.abs(slopes - order) < 0.2)


@pytest.mark.parametrize(("eta", "noisy"), [(0.0, -2.0), (0.0, 2.0), (1.0, 2.0)])
def test_restart_leaves_the_model_alone(eta, noisy):
    # Known by scores alone; 40 steps leave an error of second order, here within 1 % of a deviation.
    clean = at_log_snr(3.0)
    x, info, _ = ends(restart(network(), grid(40, noisy), eta=eta), 5, exact(clean, N))
    assert_law(clean, x, slack=0.01)
    assert np.all(info.acceptance_rate == 1) and np.all(info.num_evaluations == 40)
    assert not info.is_divergent.any()


def test_restart_of_first_order_has_the_larger_error():
    clean = at_log_snr(3.0)
    start = exact(clean, N)
    errors = {}
    for order in (1, 2):
        x, _, _ = ends(restart(network(), grid(40, noisy=-4.0), eta=1.0, order=order), 1, start)
        inside = shares(clean, x) > 0.5
        means = np.asarray(clean.component_means(), float)
        spread = sum(((x - means[k])[inside[:, k]] ** 2).sum() for k in range(3)) / len(x)
        errors[order] = abs(spread / np.trace(np.asarray(clean.component_covariances())[0]) - 1)
    # Within modes the variance of 8000 numbers is known to 1.6 %, and both runs have the same noise.
    assert errors[1] > 0.05 and errors[2] < 0.5 * errors[1]


def test_restart_finds_the_weights_of_the_modes():
    clean = at_log_snr(3.0)
    x, _, _ = ends(restart(network(), grid(40), eta=0.0), 12, in_one_mode(clean))
    assert_law(clean, x, slack=0.01)


def test_restart_returns_to_clean_samples():
    law = model().mixture
    times = smcdiff.log_snr_times(SCHEDULE, 41, log_snr_min=-2.0)[1:]
    x, _, _ = ends(restart(network(), times), 1, exact(law, N))
    assert_law(law, x, slack=0.01)


def test_restart_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="DiffusionModel"):
        restart(model().mixture, grid(4))
    with pytest.raises(ValueError, match="fall strictly"):
        restart(model(), grid(4)[::-1])
    with pytest.raises(ValueError, match="order"):
        restart(model(), grid(4), order=3)
    with pytest.raises(ValueError, match="eta"):
        restart(model(), grid(4), eta=1.5)
    with pytest.warns(UserWarning, match="not the noised"):
        restart(smcdiff.compose.product(model(), model()), grid(4))


# --------------------------------------------------------------------------------------- denoising Langevin Gibbs

LOG_SNRS = np.array([1.5, 0.7, 0.1, -0.7])
SHARES = np.array([0.4, 0.1, 0.2, 0.3])


@functools.cache
def level_chain():
    times = SCHEDULE.time_from_log_snr(jnp.asarray(LOG_SNRS, jnp.float32))
    widths = SCHEDULE.alpha(times) ** 2 * 0.2 + SCHEDULE.sigma(times) ** 2
    return denoising_langevin_gibbs(
        model(), times, step_size=0.6 * widths, num_langevin_steps=2, log_level_weights=np.log(SHARES)
    )


def test_langevin_gibbs_leaves_the_joint_law_of_samples_and_levels_alone():
    counts = (2 * N * SHARES).astype(int)
    laws = [at_log_snr(log_snr) for log_snr in LOG_SNRS]
    start = jnp.concatenate([exact(law, n) for law, n in zip(laws, counts, strict=True)])
    x, info, state = ends(level_chain(), 5, start)
    level = np.asarray(state.level)
    np.testing.assert_array_equal(level, info.level)
    found = np.bincount(level, minlength=4) / len(level)
    assert np.all(np.abs(found - SHARES) < Z * np.sqrt(SHARES * (1 - SHARES) / len(level)))
    for k, law in enumerate(laws):
        assert_law(law, x[level == k])
    # All samples are of level 0 if weighed.
    assert_law(laws[0], x, info.level_probabilities[:, 0])
    assert 0.5 < np.mean(info.acceptance_rate) < 0.97


def test_langevin_gibbs_carries_chains_between_modes():
    clean = at_log_snr(LOG_SNRS[0])
    x, _, state = ends(level_chain(), 120, jnp.concatenate([in_one_mode(clean)] * 2))
    assert_law(clean, x[np.asarray(state.level) == 0])


def test_langevin_gibbs_refuses_what_it_cannot_use():
    times = jnp.array([0.1, 0.5])
    with pytest.raises(TypeError, match=r"HasLogDensity.*restart or walk_jump"):
        denoising_langevin_gibbs(network(), times, step_size=0.1)
    with pytest.raises(ValueError, match="times must lie"):
        denoising_langevin_gibbs(model(), np.array([0.5, 1.5]), step_size=0.1)
    with pytest.raises(ValueError, match="log_level_weights"):
        denoising_langevin_gibbs(model(), times, step_size=0.1, log_level_weights=np.zeros(3))


# ------------------------------------------------------------------------------------------------------ walk-jump


def test_walks_stay_at_their_level_and_jumps_have_the_mean_of_the_data():
    t = SCHEDULE.time_from_log_snr(jnp.asarray(-0.3))
    noisy = at_log_snr(-0.3)
    x, info, _ = ends(walk_jump(model(), t, Partial(mala, step_size=0.4)), 5, exact(noisy, N))
    assert_law(noisy, x)
    denoised = jax.jit(jax.vmap(model().denoise, (0, None)))(jnp.asarray(x, jnp.float32), t)
    np.testing.assert_allclose(info.denoised, denoised, atol=1e-5)
    error = info.denoised.std(axis=0) / np.sqrt(len(x))
    assert np.all(np.abs(info.denoised.mean(axis=0) - np.asarray(model().mixture.mean())) < Z * error)
    np.testing.assert_array_equal(info.acceptance_rate, info.walk.acceptance_rate)
    assert 0.4 < info.acceptance_rate.mean() < 0.97


def spread_of_jumps(log_snr):
    """Mean and covariance of E[x0 | x_t] in closed form, by Gauss-Hermite quadrature in each component."""
    t, noisy = SCHEDULE.time_from_log_snr(jnp.asarray(log_snr, jnp.float32)), at_log_snr(log_snr)
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    nodes, rule = np.polynomial.hermite_e.hermegauss(60)
    square = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    weights, means, covariance = parts(noisy)
    x = (means[:, None] + square @ np.linalg.cholesky(covariance).T).reshape(-1, 2)
    mass = np.outer(weights, np.outer(rule, rule) / rule.sum() ** 2).ravel()
    _, means, covariance = parts(model().mixture)
    gain = alpha * np.linalg.solve(alpha**2 * covariance + sigma**2 * np.eye(2), covariance)
    each = means[None] + (x[:, None] - alpha * means[None]) @ gain
    jumps = np.einsum("nk,nki->ni", shares(noisy, x), each)
    return mass @ jumps, (jumps.T * mass) @ jumps - np.outer(mass @ jumps, mass @ jumps)


def test_jumps_have_the_spread_of_the_denoised():
    """Cov[x0_hat] = Cov[x0] - E Cov[x0 | x_t], 5 standard errors of three entries."""
    t = SCHEDULE.time_from_log_snr(jnp.asarray(-0.3))
    noisy = at_log_snr(-0.3)
    _, info, _ = ends(walk_jump(model(), t, Partial(mala, step_size=0.4)), 5, exact(noisy, N))
    mean, covariance = spread_of_jumps(-0.3)
    np.testing.assert_allclose(mean, np.asarray(model().mixture.mean()), atol=1e-4)
    centred = np.asarray(info.denoised, float) - mean
    products = (centred[:, :, None] * centred[:, None]).reshape(N, 4)
    error = products.std(axis=0) / np.sqrt(N)
    assert np.all(np.abs(products.mean(axis=0) - covariance.ravel()) < Z * error)
    # The data spread more, and the noisy samples otherwise, by more than is allowed.
    for law in (model().mixture, noisy):
        gap = np.asarray(law.covariance(), float) - covariance
        assert np.any(np.abs(gap.ravel()) > 3 * Z * error)


def _rests(target):
    """A walk that stays where it is."""
    return SamplingAlgorithm(_rest, lambda rng_key, state: (state, ()))


def _rest(position, rng_key):
    return PositionState(position)


def test_what_jumps_lack_falls_with_the_square_of_the_noise():
    """From x_t = alpha x0 + sigma eps: E |x0 - x0_hat|^2 = E tr Cov[x0 | x_t].

    The levels share their draws. 4000 samples of two numbers tell it to 1.6 %; without a denoiser, x0_hat = x_t/alpha,
    it is off by 10 of these at the first level.
    """
    clean = np.asarray(exact(model().mixture, N), float)
    noise = np.random.default_rng(9).normal(size=clean.shape)
    lacks = []
    for log_snr in 1.5 + np.log([1.0, 2.0, 4.0]):
        t = SCHEDULE.time_from_log_snr(jnp.asarray(log_snr, jnp.float32))
        start = jnp.asarray(float(SCHEDULE.alpha(t)) * clean + float(SCHEDULE.sigma(t)) * noise, jnp.float32)
        _, info, _ = ends(walk_jump(model(), t, _rests), 1, start)
        _, covariance = spread_of_jumps(float(log_snr))
        expected = np.trace(np.asarray(model().mixture.covariance(), float) - covariance)
        squares = np.sum((clean - info.denoised) ** 2, axis=1)
        assert abs(squares.mean() - expected) < Z * squares.std() / np.sqrt(N)
        lacks.append(squares.mean())
    slopes = np.log2(np.array(lacks[:-1]) / np.array(lacks[1:]))
    assert np.all(np.abs(slopes - 2) < 0.2), slopes


def test_walks_need_no_more_than_a_score():
    key = jax.random.key(0)
    algorithm = walk_jump(network(), 0.4, Partial(underdamped, step_size=0.3))
    state, info = jax.jit(lambda: algorithm.step(key, algorithm.init(jnp.array([1.0, 2.0]), key)))()
    np.testing.assert_allclose(info.denoised, network().denoise(state.position, 0.4), atol=1e-5)
    with pytest.raises(ValueError, match="t must lie"):
        walk_jump(model(), 0.0, Partial(mala, step_size=0.1))
    with pytest.raises(TypeError, match="line_integral"):
        walk_jump(network(), 0.5, Partial(mala, step_size=0.1))


# ------------------------------------------------------------------------------------- chain of log-concave chains


def test_the_law_of_a_measurement_given_those_before():
    # The joint law of measurements of Gaussian data is Gaussian, with covariance C between any two of them.
    with jax.enable_x64(True):
        mean, covariance, std = np.array([1.0, -0.5]), np.array([[0.5, 0.2], [0.2, 1.5]]), 1.3
        data = smcdiff.GaussianDiffusion(mean, covariance, SCHEDULE)
        ys = 2 * np.random.default_rng(0).normal(size=(3, 2))

        def log_joint(y, m):
            flat = (np.concatenate([ys[:2], [y]]) - mean).ravel()[6 - 2 * m :]
            joint = np.kron(np.ones((m, m)), covariance) + std**2 * np.eye(2 * m)
            return -0.5 * flat @ np.linalg.solve(joint, flat)

        def gradient(y, m, step=1e-5):
            shifts = step * np.eye(2)
            return [(log_joint(y + shift, m) - log_joint(y - shift, m)) / (2 * step) for shift in shifts]

        @jax.jit
        def evaluate(data, past, count, y):
            law = _MeasurementDensity(data, jnp.asarray(std), past, count)
            assert isinstance(law, _Measurement)
            return law.logdensity(y), law.score(y), jax.grad(law.logdensity)(y)

        past, zero = jnp.asarray(ys[:2].mean(axis=0)), jnp.zeros(2)
        for before, m in ((zero, 1), (past, 3)):
            here, score, slope = evaluate(data, before, jnp.asarray(m), jnp.asarray(ys[2]))
            there, *_ = evaluate(data, before, jnp.asarray(m), jnp.asarray(ys[1]))
            np.testing.assert_allclose(score, gradient(ys[2], m), rtol=1e-6)
            np.testing.assert_allclose(slope, score, rtol=1e-6)
            np.testing.assert_allclose(here - there, log_joint(ys[2], m) - log_joint(ys[1], m), rtol=1e-6)
        # And the two formulas agree on data that are not Gaussian.
        _, score, slope = evaluate(make_model(), past, jnp.asarray(3), jnp.asarray(ys[2]))
        np.testing.assert_allclose(slope, score, rtol=1e-6)


def measurements(data, std, step_size):
    return log_concave_chain(data, std, Partial(mala, step_size=jnp.asarray(step_size)), num_inner_steps=15)


def test_chains_of_measurements_of_gaussian_data():
    # Three modes in one place are one, and share the program of three.
    std, count, data = 1.3, 4, model(2, 0.0)
    covariance = np.asarray(data.mixture.component_covariances()[0], float)
    x, info, state = ends(measurements(data, std, 1.0), count, jnp.zeros((N, 2)))
    noisy = covariance + std**2 / count * np.eye(2)
    spread = covariance @ np.linalg.inv(noisy) @ covariance
    for values, expected in ((np.asarray(state.mean, float), noisy), (x, spread)):
        law = smcdiff.GaussianMixture.create([1.0], data.mixture.component_means()[:1], expected)
        assert_law(law, values)
    np.testing.assert_allclose(info.noise_std, std / 2, rtol=1e-6)
    assert np.all(state.num_measurements == count) and 0.4 < info.acceptance_rate.mean() < 0.97


def test_chains_of_measurements_find_the_weights_of_the_modes():
    x, _, _ = ends(measurements(model(), 3.0, 4.0), 30, jnp.zeros((N, 2)))
    # Noise of 3/sqrt(30) is left: the modes, eight times as far apart, are told apart without a doubt.
    found = shares(model().mixture, x)
    assert np.all(np.abs(found.mean(axis=0) - WEIGHTS) < Z * found.std(axis=0) / np.sqrt(len(x)))


@pytest.mark.slow
def test_chains_of_measurements_from_scores():
    kernel = Partial(underdamped, step_size=1.0)
    algorithm = log_concave_chain(network(), 2.0, kernel, num_inner_steps=10)
    x, info, _ = ends(algorithm, 10, num_chains=2000)
    error = x.std(axis=0) / np.sqrt(len(x))
    # The inner kernel has an error of its own, of second order in the step.
    assert np.all(np.abs(x.mean(axis=0) - np.asarray(model().mixture.mean())) < Z * error + 0.1)
    assert np.all(info.acceptance_rate == 1)


def test_chains_of_measurements_refuse_what_they_cannot_use():
    kernel = Partial(mala, step_size=0.1)
    with pytest.raises(TypeError, match="line_integral"):
        log_concave_chain(network(), 1.0, kernel, num_inner_steps=5)
    with pytest.raises(ValueError, match="at most sigma/alpha"):
        log_concave_chain(model(), 1e5, kernel, num_inner_steps=5)


def test_gaps_see_a_wrong_law():
    # A shift of a tenth of a mode's deviation, modes too wide by a tenth, a weight of 0.26 for 0.2.
    law, x = model().mixture, np.asarray(exact(model().mixture, N), float)
    assert gaps(law, x).max() < Z < gaps(law, x + 0.05).max()
    mode = np.asarray(law.component_means(), float)[shares(law, x).argmax(axis=1)]
    assert gaps(law, mode + 1.1 * (x - mode)).max() > Z
    assert gaps(law, x, np.where(shares(law, x)[:, 1] > 0.5, 1.4, 1.0)).max() > Z
