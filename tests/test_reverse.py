"""Reverse transitions against their formulas, the closed-form linear chain, and an integrated flow.

z-tests allow 5 standard errors: a false failure has a probability of 6e-7 a check under normality. Keys are fixed.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import quick

from smcdiff import schedules
from smcdiff.analytic import GaussianDiffusion, GaussianMixtureDiffusion
from smcdiff.diffusion import Diffusion
from smcdiff.reverse import reverse_sample, reverse_transition
from smcdiff.schedules import log_snr_times

Z = 5.0
SCHEDULES = {
    "vp": schedules.vp,
    "cosine": schedules.cosine,
    "ve": schedules.ve,
    "edm": schedules.edm,
    "rectified_flow": schedules.rectified_flow,
    "ou": schedules.ou,
}


def _transition(schedule, t, s, eta):
    """Coefficients of x0, of eps and of the noise, in double precision, as in DDIM Eq. 12 and 16."""
    with jax.enable_x64(True):
        alpha_t, sigma_t, alpha_s, sigma_s = (
            float(f(jnp.asarray(float(u)))) for u in (t, s) for f in (schedule.alpha, schedule.sigma)
        )
    variance_ts = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    variance = eta**2 * variance_ts * sigma_s**2 / sigma_t**2
    return alpha_s, np.sqrt(max(sigma_s**2 - variance, 0.0)), np.sqrt(variance), alpha_t, sigma_t


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_transition_formula(name, eta):
    schedule = SCHEDULES[name]()
    x, x0 = np.array([[0.7, -1.9], [0.2, 0.4]]), np.array([[0.3, -0.8], [1.2, -0.5]])
    for t, s in [(0.9, 0.7), (0.31, 0.04), (0.02, 0.0), (0.8, 0.0)]:
        alpha_s, noise, std, alpha_t, sigma_t = _transition(schedule, t, s, eta)
        with jax.enable_x64(True):
            mean, deviation = reverse_transition(
                schedule, jnp.asarray(x), jnp.asarray(x0), jnp.asarray(t), jnp.asarray(s), eta
            )
        assert mean.shape == x.shape and deviation.shape == ()
        expected = alpha_s * x0 + noise * (x - alpha_t * x0) / sigma_t
        np.testing.assert_allclose(mean, expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(deviation, std, rtol=1e-8, atol=1e-12)
        if s == 0.0:
            assert np.array_equal(mean, x0) and deviation == 0.0


def test_eta_one_is_the_bayes_posterior():
    """p(x_s | x_t, x_0) of the forward chain, by conditioning a Gaussian: mean and variance."""
    schedule, x, x0 = schedules.vp(), 0.7, -0.4
    with jax.enable_x64(True):
        t, s = jnp.asarray(0.6), jnp.asarray(0.45)
        alpha_t, sigma_t, alpha_s, sigma_s = (
            float(f(u)) for u in (t, s) for f in (schedule.alpha, schedule.sigma)
        )
        mean, std = reverse_transition(schedule, jnp.asarray([x]), jnp.asarray([x0]), t, s, 1.0)
    kept = alpha_t / alpha_s
    gain = kept * sigma_s**2 / sigma_t**2
    np.testing.assert_allclose(mean[0], alpha_s * x0 + gain * (x - alpha_t * x0), rtol=1e-10)
    np.testing.assert_allclose(std**2, sigma_s**2 - gain * kept * sigma_s**2, rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_transition_is_finite_in_single_precision(name):
    """From pure noise sigma_s^2 - std^2 nearly vanishes at eta = 1: computed as a difference it was NaN here."""
    schedule = SCHEDULES[name]()
    transition = jax.jit(
        jax.vmap(lambda t, s: reverse_transition(schedule, jnp.ones(2), jnp.zeros(2), t, s, 1.0))
    )
    key_t, key_s = jax.random.split(jax.random.key(0))
    t = jax.random.uniform(key_t, (20_000,), minval=1e-4)
    s = t * jax.random.uniform(key_s, (20_000,))
    for late, early in [(jnp.ones_like(t), 0.999 * s), (t, s), (t, 0.99999 * t)]:
        mean, std = transition(late, early)
        assert np.all(np.isfinite(mean)) and np.all(np.isfinite(std))
    # And it is accurate: the coefficient of eps is alpha_t sigma_s^2 / (alpha_s sigma_t).
    alpha_t, sigma_t, alpha_s, sigma_s = (f(u) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
    expected = alpha_t * sigma_s**2 / (alpha_s * sigma_t) / sigma_t
    np.testing.assert_allclose(transition(t, s)[0][:, 0], expected, rtol=2e-4)


def _recursion(schedule, mean, variance, times, eta):
    """Mean and variance, entry by entry, of the chain on Gaussian data N(mean, variance): it is linear."""
    with jax.enable_x64(True):
        chain_mean, chain_variance = 0.0 * mean, float(schedule.sigma(jnp.asarray(1.0))) ** 2
    for t, s in pairwise(times):
        alpha_s, noise, std, alpha_t, sigma_t = _transition(schedule, t, s, eta)
        gain = alpha_t * variance / (alpha_t**2 * variance + sigma_t**2)
        # x0 = mean + gain (x - alpha_t mean), and x_s = alpha_s x0 + noise (x - alpha_t x0)/sigma_t + std xi.
        slope = (alpha_s - noise * alpha_t / sigma_t) * gain + noise / sigma_t
        shift = (alpha_s - noise * alpha_t / sigma_t) * (1 - gain * alpha_t) * mean
        chain_mean, chain_variance = slope * chain_mean + shift, slope**2 * chain_variance + std**2
    return chain_mean, chain_variance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["vp", "ve", "rectified_flow"])
def test_gaussian_chain(name, eta):
    """Few steps, so that the discrete chain is far from the data's law and only its own recursion fits."""
    schedule, num, variance = SCHEDULES[name](), 20_000, 1.7
    mean = np.array([0.8, -1.5, 0.3])
    times = log_snr_times(schedule, 6, log_snr_max=1.5)
    samples = reverse_sample(
        jax.random.key(1), GaussianDiffusion(mean, variance, schedule), times, num, eta=eta
    )
    assert samples.shape == (num, 3) and samples.dtype == jnp.float32
    chain_mean, chain_variance = _recursion(schedule, mean, variance, np.asarray(times, float), eta)
    assert abs(chain_variance / variance - 1) > 0.1
    samples = np.asarray(samples, float)
    assert np.all(np.abs(samples.mean(0) - chain_mean) < Z * np.sqrt(chain_variance / num))
    # Gaussian samples: a variance is known to sqrt(2/num) = 1 %, a correlation to 1/sqrt(num).
    assert np.all(np.abs(samples.var(0) / chain_variance - 1) < Z * np.sqrt(2 / num))
    correlation = np.corrcoef(samples.T)[np.triu_indices(3, 1)]
    assert np.all(np.abs(correlation) < Z / np.sqrt(num))
    # Samples are independent of their neighbours too.
    neighbours = np.mean((samples[1:] - chain_mean) * (samples[:-1] - chain_mean), axis=0) / chain_variance
    assert np.all(np.abs(neighbours) < Z / np.sqrt(num))


WEIGHTS, MEANS, VARIANCE = np.array([0.7, 0.3]), np.array([[1.0, -0.5], [-1.4, 0.8]]), 0.15


def _mixture(schedule):
    return GaussianMixtureDiffusion.create(WEIGHTS, MEANS, VARIANCE, schedule)


def _denoise(z, ratio):
    """E[x_0 | x_0 + ratio eps = z] of the mixture, for z of shape (n, 2)."""
    total = VARIANCE + ratio**2
    logits = np.log(WEIGHTS) - 0.5 * np.sum((z[:, None] - MEANS) ** 2, axis=-1) / total
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return (VARIANCE * z + ratio**2 * share @ MEANS) / total


def _flow(z, start, end, num_steps):
    """Probability flow dz/dl = -(z - E[x_0|z]) for z = x/alpha, l = log-SNR, by Runge-Kutta of order four."""
    step = (end - start) / num_steps

    def slope(level, z):
        return -(z - _denoise(z, np.exp(-level)))

    for level in start + step * np.arange(num_steps):
        k1 = slope(level, z)
        k2 = slope(level + step / 2, z + step / 2 * k1)
        k3 = slope(level + step / 2, z + step / 2 * k2)
        k4 = slope(level + step, z + step * k3)
        z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


@pytest.mark.parametrize("order", quick([1, 2], 2))
def test_the_deterministic_path_converges_to_the_flow_at_its_order(order):
    schedule, num, key = schedules.vp(), 64, jax.random.key(2)
    with jax.enable_x64(True):
        start = float(schedule.log_snr(jnp.asarray(1.0)))
        model, ends = _mixture(schedule), []
        for num_steps in (20, 40, 80, 160):
            times = log_snr_times(schedule, num_steps)
            ends.append(reverse_sample(key, model, times, num, eta=0.0, order=order))
        # The key's first numbers are the start; DDIM with the one step t = 1 -> 0 shows them through E[x_0|x_1].
        noise = jax.random.normal(key, (num * 2,), jnp.float64).reshape(num, 2)
        once = reverse_sample(key, model, jnp.asarray([1.0, 0.0]), num, eta=0.0)
        alpha, sigma = (float(f(jnp.asarray(1.0))) for f in (schedule.alpha, schedule.sigma))
    z = sigma * np.asarray(noise) / alpha
    np.testing.assert_allclose(once, _denoise(z, sigma / alpha), rtol=1e-7)
    # All grids end with the same step from log-SNR 5 to the data.
    exact = _denoise(_flow(z, start, 5.0, 1500), np.exp(-5.0))
    errors = [np.sqrt(np.mean((np.asarray(end) - exact) ** 2)) for end in ends]
    slopes = -np.diff(np.log2(errors))
    assert np.all(np.abs(slopes[1:] - order) < 0.2), slopes
    assert errors[-1] < 0.05


def test_the_second_order_step_with_noise_is_closer_to_the_law():
    """Twenty ancestral steps: the covariance of the mixture comes out nearer with the extrapolated denoised sample."""
    schedule, num = schedules.vp(), 20_000
    spread = MEANS - WEIGHTS @ MEANS
    trace = 2 * VARIANCE + WEIGHTS @ np.sum(spread**2, axis=-1)
    errors = []
    for order in (1, 2):
        times = log_snr_times(schedule, 20)
        samples = np.asarray(
            reverse_sample(jax.random.key(8), _mixture(schedule), times, num, order=order), float
        )
        errors.append(np.sum(samples.var(0)) - trace)
    # The trace is known to about .01.
    assert abs(errors[1]) < 0.7 * abs(errors[0]) and abs(errors[0]) > 0.05, errors


def test_ancestral_samples_have_the_moments_of_the_mixture():
    """200 steps: the bias, which falls with their number, is below the standard error of 4000 samples."""
    schedule, num = schedules.vp(), 4000
    samples = reverse_sample(
        jax.random.key(3), _mixture(schedule), log_snr_times(schedule, 200), num, eta=1.0
    )
    samples = np.asarray(samples, float)
    centred = samples - WEIGHTS @ MEANS
    spread = MEANS - WEIGHTS @ MEANS
    covariance = VARIANCE * np.eye(2) + np.einsum("k,ki,kj->ij", WEIGHTS, spread, spread)
    products = np.einsum("ni,nj->nij", centred, centred).reshape(num, -1)
    logits = np.log(WEIGHTS) - 0.5 * np.sum((samples[:, None] - MEANS) ** 2, axis=-1) / VARIANCE
    share = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    for values, expected in ((centred, 0.0), (products, covariance.ravel()), (share, WEIGHTS[0])):
        error = np.abs(values.mean(0) - expected) / (values.std(0) / np.sqrt(num))
        assert np.all(error < Z + 1)  # one standard error is left to the bias


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_batches_and_compilation_change_nothing(eta):
    schedule, key = schedules.vp(), jax.random.key(4)
    model, times = _mixture(schedule), log_snr_times(schedule, 10)
    whole = reverse_sample(key, model, times, 10, eta=eta)
    assert len(np.unique(np.asarray(whole)[:, 0])) == 10
    for batch_size in (4, 32):
        part = reverse_sample(key, model, times, 10, eta=eta, batch_size=batch_size)
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-5)
    compiled = jax.jit(lambda key, model, times: reverse_sample(key, model, times, 10, eta=eta))(
        key, model, times
    )
    np.testing.assert_allclose(compiled, whole, rtol=1e-4, atol=1e-5)


def test_event_of_two_axes():
    mean = np.arange(6.0).reshape(2, 3)
    model = GaussianDiffusion(mean, 1e-6, schedules.vp())
    samples = reverse_sample(jax.random.key(5), model, log_snr_times(model.schedule, 20), 4)
    # The deviation of the data is 1e-3.
    np.testing.assert_allclose(samples, np.broadcast_to(mean, (4, 2, 3)), atol=0.02)


_TRACES = []


def _counted(params, x, t):
    _TRACES.append(None)
    return params @ x * t


def test_new_models_times_and_noise_levels_do_not_compile_anew():
    times, results = log_snr_times(schedules.vp(), 5), []
    for scale, beta_max, eta in ((0.1, 20.0, 1.0), (0.3, 12.0, 0.0), (0.5, 20.0, 0.5)):
        model = Diffusion(scale * jnp.eye(2), _counted, schedules.vp(0.1, beta_max), "eps", (2,))
        results.append(reverse_sample(jax.random.key(6), model, times, 3, eta=eta))
        before = len(_TRACES) if len(results) == 1 else before
    assert len(_TRACES) == before > 0
    assert not np.allclose(results[0], results[1]) and not np.allclose(results[1], results[2])


def test_bad_input_raises():
    model, times = _mixture(schedules.vp()), log_snr_times(schedules.vp(), 5)
    with pytest.raises(TypeError, match=r"^reverse_sample needs .*DiffusionModel, got GaussianMixture"):
        reverse_sample(jax.random.key(0), model.mixture, times, 3)
    with pytest.raises(ValueError, match=r"^times must fall strictly"):
        reverse_sample(jax.random.key(0), model, times[::-1], 3)
    with pytest.raises(ValueError, match=r"^batch_size must be"):
        reverse_sample(jax.random.key(0), model, times, 3, batch_size=0)
    with pytest.raises(ValueError, match=r"^order must be 1, or 2 with eta 0 or 1, got order=2 with eta=0.5"):
        reverse_sample(jax.random.key(0), model, times, 3, order=2, eta=0.5)
