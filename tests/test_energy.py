"""Energy models: the log density's gradient is the score, and training finds the law of the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smcdiff
from smcdiff import mcmc, nets, schedules
from smcdiff.density import HasLogDensity
from smcdiff.energy import EnergyDiffusion

SCHEDULE = schedules.cosine()
FORMS = ["inner", "norm", "residual"]


def network(params, z, noise):
    """Not conservative, not symmetric; noise matters."""
    return jnp.tanh(params @ z + noise) - 0.3 * z[::-1]


def model(form, schedule=SCHEDULE):
    params = jnp.asarray([[0.5, -1.1], [0.7, 0.2]])
    return EnergyDiffusion(params, network, schedule, (2,), form=form, sigma_data=0.8)


@pytest.mark.parametrize("form", FORMS)
def test_logdensity_is_the_formula(form):
    t, x = 0.4, np.array([0.6, -1.3])
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    z = x / np.sqrt((0.8 * alpha) ** 2 + sigma**2)
    f = np.asarray(network(np.asarray(model(form).params), z, 0.25 * np.log(sigma / alpha)), float)
    squares = {
        "inner": z @ f,
        "norm": ((z + f) @ (z + f) - z @ z) / 2,
        "residual": (z @ z - (z - f) @ (z - f)) / 2,
    }
    expected = -z @ z / 2 + 0.8 * alpha / sigma * squares[form]
    np.testing.assert_allclose(model(form).logdensity(jnp.asarray(x, jnp.float32), t), expected, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_score_eps_and_denoised_sample_agree(form):
    x, t = jnp.asarray([0.6, -1.3]), jnp.asarray(0.4)
    each, marginal = model(form), model(form).at(t)
    assert isinstance(marginal, HasLogDensity)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    np.testing.assert_allclose(marginal.score(x), jax.grad(marginal.logdensity)(x), rtol=1e-6)
    np.testing.assert_allclose(each.eps(x, t), -sigma * each.score(x, t), rtol=1e-5)
    np.testing.assert_allclose(alpha * each.denoise(x, t) + sigma * each.eps(x, t), x, rtol=1e-5)


def test_the_energy_stands_for_the_network_of_an_edm_prediction():
    """The gradient of U as the network of a `Diffusion` gives the same denoised sample."""
    each = model("norm")

    def gradient(params, z, noise):
        return jax.grad(
            lambda z: jnp.sum(z * network(params, z, noise)) + 0.5 * jnp.sum(network(params, z, noise) ** 2)
        )(z)

    twin = smcdiff.Diffusion(each.params, gradient, SCHEDULE, "edm", (2,), sigma_data=0.8)
    x = jnp.asarray([0.6, -1.3])
    for t in (0.05, 0.5, 0.99):
        np.testing.assert_allclose(each.denoise(x, t), twin.denoise(x, t), rtol=1e-4, atol=1e-4)


def test_far_noise_is_the_gaussian():
    x, t = jnp.asarray([200.0, -130.0]), SCHEDULE.time_from_log_snr(-9.0)
    expected = -np.sum(np.asarray(x) ** 2) / (2 * float(SCHEDULE.sigma(t)) ** 2)
    np.testing.assert_allclose(model("norm").logdensity(x, t), expected, rtol=1e-3)


def test_a_condition_reaches_the_network():
    def conditional(params, z, noise, label):
        return params[label] * z

    each = EnergyDiffusion(jnp.asarray([0.2, 0.5]), conditional, SCHEDULE, (2,), form="inner")
    x, t = jnp.asarray([0.6, -1.3]), jnp.asarray(0.4)
    values = [float(each.given(jnp.asarray(label)).logdensity(x, t)) for label in (0, 1)]
    plain = float(each.given(jnp.asarray(0)).logdensity(0 * x, t))
    assert values[1] > values[0] > -1e3 and plain == 0.0


def gaussian_energy(mean, variance):
    """The energy model whose marginals are those of N(mean, diag(variance)): log densities up to constants."""
    return EnergyDiffusion(
        (jnp.asarray(mean), jnp.asarray(variance)), _gaussian, SCHEDULE, (2,), form="inner", sigma_data=0.8
    )


def _gaussian(params, z, noise):
    """From -z^2/2 + (alpha s/sigma) <z, f> = -(x - alpha mean)^2 / (2 (alpha^2 variance + sigma^2)) + constant."""
    (mean, variance), ratio = params, jnp.exp(4.0 * noise)  # sigma / alpha
    width = jnp.sqrt(0.8**2 + ratio**2)
    return ratio / (0.8 * (variance + ratio**2)) * (0.5 * (variance - 0.8**2) * z + width * mean)


MEANS, VARIANCES = np.array([[0.7, -0.4], [-0.3, 0.5]]), np.array([[0.5, 0.9], [0.8, 0.3]])


@functools.cache
def walk(weights, num_chains, num_particles):
    """Tuned step sizes, and MALA with exact acceptance down the product of two energies."""
    path = smcdiff.compose.product(*map(gaussian_energy, MEANS, VARIANCES))
    times = smcdiff.log_snr_times(SCHEDULE, 24, log_snr_max=4.0)
    tuned = smcdiff.smc.tune_step_sizes(jax.random.key(0), path, times=times)
    fk = smcdiff.annealed_mcmc(path, times=times, step_sizes=tuned.step_sizes, weights=weights)
    return tuned, smcdiff.run_smc(
        jax.random.key(1), fk, num_particles, num_chains=num_chains, chunk_size=24, progress=False
    )


def test_the_energy_of_a_gaussian_is_its_log_density():
    exact = smcdiff.GaussianDiffusion(MEANS[0], np.diag(VARIANCES[0]), SCHEDULE)
    x, y = jnp.asarray([0.6, -1.3]), jnp.asarray([-0.2, 0.4])
    for t in (0.02, 0.4, 0.95):
        found, expected = gaussian_energy(MEANS[0], VARIANCES[0]).at(t), exact.at(t)
        np.testing.assert_allclose(
            found.logdensity(x) - found.logdensity(y),
            expected.logdensity(x) - expected.logdensity(y),
            rtol=2e-4,
        )
        np.testing.assert_allclose(found.denoise(x), exact.denoise(x, t), rtol=1e-4, atol=1e-5)


def test_annealing_accepts_by_energies_and_ends_in_their_product():
    """3000 independent chains, four moments, 5 standard errors: fails once in 400 000. No energy is asked at t = 0."""
    tuned, result = walk("none", 1, 3000)
    assert np.all(np.abs(np.asarray(tuned.acceptance_rates) - 0.6) < 0.05), tuned.acceptance_rates
    x = np.asarray(result.particles[0], float)
    precision = np.sum(1 / VARIANCES, 0)
    mean, variance = np.sum(MEANS / VARIANCES, 0) / precision, 1 / precision
    # The last step denoises at sigma / alpha = .018: it narrows a variance of .2 by less than .001 of it.
    assert np.all(np.abs(x.mean(0) - mean) < 5 * np.sqrt(variance / 3000))
    assert np.all(np.abs(x.var(0) / variance - 1) < 5 * np.sqrt(2 / 3000))


def test_evidence_of_energies_is_that_of_the_last_level():
    """200 runs of 20 particles, 4.5 standard errors: fails once in 100 000."""
    _, result = walk("density", 200, 20)
    t = float(smcdiff.log_snr_times(SCHEDULE, 24, log_snr_max=4.0)[-2])
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    spread = alpha**2 * VARIANCES + sigma**2
    # exp(-x^2 / (2 v) + alpha m x / v) for each part: a Gaussian integral in each coordinate.
    precision, slope = np.sum(1 / spread, 0), np.sum(alpha * MEANS / spread, 0)
    exact = np.sum(0.5 * np.log(2 * np.pi / precision) + slope**2 / (2 * precision))
    ratio = np.exp(np.asarray(result.log_evidence, float) - exact)
    error = ratio.std(ddof=1) / np.sqrt(200)
    assert error < 0.05 and abs(ratio.mean() - 1) < 4.5 * error, (ratio.mean(), error)


def test_density_weights_of_fkc_need_a_density_of_data():
    path = smcdiff.compose.product(*map(gaussian_energy, MEANS, VARIANCES))
    with pytest.raises(TypeError, match="down to t = 0, where energy models have none"):
        smcdiff.fkc(path, times=smcdiff.log_snr_times(SCHEDULE, 10), eta=1.0, weights="density")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="form must be one of"):
        model("square")
    with pytest.raises(ValueError, match="one sample of shape"):
        model("norm").score(jnp.ones((3, 2)), 0.4)


def _call(net, z, noise):
    return net(z, noise)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_trained_energy_is_the_log_density_of_the_data(form):
    """Differences of the log density against those of the exact marginal; chains by MALA keep its mode weights."""
    exact = smcdiff.GaussianMixtureDiffusion.create(
        [0.3, 0.7], [[-0.9, 0.3], [0.6, -0.2]], [[0.05, 0.02], [0.02, 0.04]], SCHEDULE
    )
    data = exact.mixture.sample(jax.random.key(0), 20_000)
    net = nets.MLP(jax.random.key(1), event_shape=(2,), width=64, blocks=2)
    start = EnergyDiffusion(net, _call, SCHEDULE, (2,), form=form, sigma_data=float(jnp.std(data)))
    trained, _ = nets.train(
        jax.random.key(2), start, data, num_steps=3000, batch_size=256, ema_decay=0.99, progress=False
    )
    for log_snr in (-1.0, 0.5, 1.5):
        t = SCHEDULE.time_from_log_snr(log_snr)
        x = exact.at(t).sample(jax.random.key(3), 500)
        gap = jax.vmap(trained.at(t).logdensity)(x) - jax.vmap(exact.at(t).logdensity)(x)
        assert float(jnp.std(gap)) < 0.15, (log_snr, float(jnp.std(gap)))
    t = SCHEDULE.time_from_log_snr(0.5)
    start = exact.at(t).sample(jax.random.key(4), 2000)
    trace = smcdiff.run(
        jax.random.key(5),
        mcmc.mala(trained.at(t), 0.2),
        50,
        position=start,
        num_chains=2000,
        progress=False,
        thin=50,
    )
    nearer = np.asarray(jax.vmap(exact.at(t).responsibilities)(trace.state.position))
    assert abs(nearer[:, 0].mean() - 0.3) < 0.05
