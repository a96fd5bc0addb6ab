"""Monte Carlo guided diffusion and the bootstrap against closed forms.

See test_steering for the oracle of Gaussian data under the DISCRETISED chain and for the tests' statistics: z-tests of
5 standard errors over many runs of few particles, a false failure having a probability of about 6e-7 a number.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steering import (
    MODELS,
    SLOPE,
    Z,
    assert_properly_weighted,
    chain_law,
    f32,
    gaussian,
    mixture,
    reward,
    run,
    tilt,
    times,
)

import smcdiff
from benchmarks import gmm25
from benchmarks.evidence import chain_log_evidence
from smcdiff import inverse, schedules
from smcdiff.smc.bootstrap import bootstrap
from smcdiff.smc.mcgdiff import _draw, _Forecast, _log_integral, _residual, mcgdiff

MATRIX = np.array([[1.0, -0.4, 0.3], [0.2, 0.9, -0.7]])
STD = np.array([0.4, 0.7])
Y = np.array([1.9, -0.3])


def problem(matrix=MATRIX, y=Y, std=STD, event_shape=(3,)):
    return inverse.InverseProblem(inverse.dense(f32(matrix), event_shape), f32(y), f32(std))


def log_normal(residual, covariance):
    return -0.5 * (
        residual @ np.linalg.solve(covariance, residual) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )


def posterior(mean, covariance, problem):
    """Log evidence, mean and covariance of a Gaussian law given the measurement."""
    matrix = np.asarray(problem.operator.matrix(), float)
    noise = np.diag(np.asarray(problem.noise.variance(problem.y.shape), float).ravel())
    total = matrix @ covariance @ matrix.T + noise
    residual = np.asarray(problem.y, float).ravel() - matrix @ mean
    gain = np.linalg.solve(total, matrix @ covariance).T
    return log_normal(residual, total), mean + gain @ residual, covariance - gain @ matrix @ covariance


@pytest.mark.parametrize(
    ("name", "order"), [("cosine", 2), pytest.param("velocity of a flow", 1, marks=pytest.mark.slow)]
)
def test_evidence_and_posterior_of_the_discretised_chain(name, order):
    schedule, wrap = MODELS[name]
    exact, grid = gaussian(schedule), times(schedule)
    law = posterior(*chain_law(exact, grid, order), problem())
    np.testing.assert_allclose(law[0], chain_log_evidence(exact, problem(), grid, order), atol=1e-5)
    fk = mcgdiff(wrap(exact), problem(), times=grid, order=order)
    for threshold in (0.0, 0.5):
        assert_properly_weighted(run(1, fk, ess_threshold=threshold), *law)


def test_proposal_and_normaliser_are_those_of_the_product():
    """Prior transition times forecast, written out with dense matrices; a wide transition shows every factor."""
    fk = mcgdiff(gaussian(), problem(), times=times(), sigma_data=0.8)
    (guided,) = fk.init.args
    t, mean, std, denoised = f32(0.6), np.array([0.3, -1.2, 0.8]), 0.9, np.array([-0.6, 0.5, 1.1])
    alpha, sigma = float(gaussian().schedule.alpha(t)), float(gaussian().schedule.sigma(t))
    shrink = alpha**2 + (sigma / 0.8) ** 2
    matrix, w = MATRIX / STD[:, None], Y / STD
    guess, spread = alpha / shrink * matrix, np.eye(2) + sigma**2 / shrink * matrix @ matrix.T
    total = std**2 * guess @ guess.T + spread
    gain = std**2 * np.linalg.solve(total, guess).T
    residual = w - matrix @ denoised
    forecast = _Forecast(f32(mean), f32(std), _residual(guided, f32(denoised)))
    log_integral = log_normal(residual, total)
    np.testing.assert_allclose(_log_integral(guided, forecast, t), log_integral, rtol=1e-4)

    keys = jax.random.split(jax.random.key(4), 100_000)
    x, log_guess = (np.asarray(a, float) for a in jax.vmap(lambda key: _draw(guided, key, forecast, t))(keys))
    expected = [log_normal(residual - guess @ (one - mean), spread) for one in x[:20]]
    np.testing.assert_allclose(log_guess[:20], expected, rtol=1e-4)
    covariance = std**2 * (np.eye(3) - gain @ guess)
    variances = np.diag(covariance)
    assert np.all(np.abs(x.mean(0) - mean - gain @ residual) < Z * np.sqrt(variances / len(x)))
    # The standard error of a covariance entry is sqrt((C_ii C_jj + C_ij^2) / n).
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / len(x))
    assert np.all(np.abs(np.cov(x.T) - covariance) < Z * error)


@pytest.mark.slow
def test_potentials_are_optimal_for_data_of_that_scale():
    """The forecast is exact for N(0, sigma_data^2 I), and then only the steps' own error makes the weights vary."""
    model = smcdiff.GaussianDiffusion(np.zeros(3), 1.44 * np.eye(3), schedules.cosine())
    spread = {}
    for sigma_data in (1.2, np.inf):
        fk = mcgdiff(model, problem(), times=times(num_steps=60), sigma_data=sigma_data)
        spread[sigma_data] = np.asarray(run(12, fk, num_chains=500).log_evidence, float).std()
    assert spread[1.2] < 0.2 * spread[np.inf], spread


def test_any_guess_at_the_scale_of_the_data_weighs_properly():
    """Infinity, which is none, among them: on a flow the forecast then has no slope at t = 1, where alpha = 0."""
    exact, grid = gaussian(schedules.rectified_flow), times(schedules.rectified_flow)
    easy = problem(std=2 * STD)
    law = posterior(*chain_law(exact, grid, 1), easy)
    for sigma_data in (0.5, np.inf):
        fk = mcgdiff(MODELS["velocity of a flow"][1](exact), easy, times=grid, sigma_data=sigma_data, order=1)
        assert_properly_weighted(run(2, fk), *law, largest_error=0.05)


@pytest.mark.slow
def test_rank_deficient_matrix_with_more_measurements_than_unknowns():
    rows = np.array([[1.0, -0.4, 0.3], [2.0, -0.8, 0.6], [0.2, 0.9, -0.7], [1.2, 0.5, -0.4]])
    measured = problem(rows, [1.2, 0.9, -0.3, 0.4], [0.4, 0.9, 0.7, 0.5])
    law = posterior(*chain_law(gaussian(), times()), measured)
    assert_properly_weighted(run(3, mcgdiff(gaussian(), measured, times=times())), *law)


@pytest.mark.slow
def test_almost_no_noise():
    """Deviations of a thousandth, on a grid that ends below them."""
    grid = smcdiff.log_snr_times(schedules.cosine(), 40, log_snr_max=8.0)
    sharp = problem(std=np.array([1e-3, 2e-3]))
    log_evidence, mean, _ = posterior(*chain_law(gaussian(), grid), sharp)
    result = run(3, mcgdiff(gaussian(), sharp, times=grid), 32, 600)
    ratio = np.exp(np.asarray(result.log_evidence, float) - log_evidence)
    error = ratio.std() / np.sqrt(ratio.size)
    assert abs(ratio.mean() - 1) < Z * error and error < 0.03
    weights, x = np.exp(np.asarray(result.log_weights, float)), np.asarray(result.particles.x, float)
    residual = x @ MATRIX.T - Y[None, None]
    assert np.all(np.sqrt(np.einsum("cn,cnk->k", weights, residual**2) / 600) < [1.3e-3, 2.6e-3])
    means = np.einsum("c,cn,cni->ci", ratio, weights, x)
    assert np.all(np.abs(means.mean(0) - mean) < Z * means.std(0) / np.sqrt(600))


@pytest.mark.parametrize(
    ("name", "order"), [("cosine", 2), pytest.param("velocity of a flow", 1, marks=pytest.mark.slow)]
)
def test_without_noise_the_chain_is_conditioned_exactly(name, order):
    """The last transition's deviation is part of the oracle, as it is of the target."""
    schedule, wrap = MODELS[name]
    exact, grid = gaussian(schedule), times(schedule, num_steps=40)
    fk = mcgdiff(wrap(exact), problem(), times=grid, order=order, sigma_data=1.3, noiseless=True)
    alpha, sigma = (float(f(grid[-2])) for f in (exact.schedule.alpha, exact.schedule.sigma))
    mean, covariance = chain_law(exact, grid, order)
    covariance = covariance + sigma**2 / (alpha**2 + (sigma / 1.3) ** 2) * np.eye(3)
    total = MATRIX @ covariance @ MATRIX.T
    residual, gain = Y - MATRIX @ mean, np.linalg.solve(total, MATRIX @ covariance).T
    law = log_normal(residual, total), mean + gain @ residual, covariance - gain @ MATRIX @ covariance
    result = run(14, fk, 32, 1000)
    measured = np.asarray(result.particles.x, float) @ MATRIX.T
    np.testing.assert_allclose(measured, np.broadcast_to(Y, measured.shape), atol=2e-5)
    assert_properly_weighted(result, *law)


def test_without_noise_rows_must_be_independent():
    for rows in ([[1.0, 2.0, 0.5], [2.0, 4.0, 1.0]], np.eye(4, 3)):
        redundant = problem(np.array(rows), np.zeros(len(rows)), 1.0)
        with pytest.raises(ValueError, match="noiseless=True needs an operator whose rows are independent"):
            mcgdiff(gaussian(), redundant, times=times(), noiseless=True)


@pytest.mark.slow
def test_image_shaped_samples():
    rng = np.random.default_rng(4)
    root = rng.normal(size=(6, 6))
    model = smcdiff.GaussianDiffusion(
        rng.normal(size=(2, 3)), root @ root.T / 6 + 0.1 * np.eye(6), schedules.cosine()
    )
    observed = np.array([[True, False, True], [False, True, False]])
    masked = inverse.InverseProblem(inverse.mask(observed), f32([0.7, -0.4, 0.2]), 0.5)
    law = posterior(*chain_law(model, times()), masked)
    result = run(5, mcgdiff(model, masked, times=times()))
    assert result.particles.x.shape == (1500, 8, 2, 3)
    assert_properly_weighted(result, *law)


def test_posterior_of_a_mixture():
    fk = mcgdiff(mixture(), problem(std=2 * STD), times=times(num_steps=60), sigma_data=2.0)
    result = run(6, fk, 1500, 16)
    exact, log_evidence = mixture().posterior(MATRIX, Y, 2 * STD)
    weights, x = np.exp(np.asarray(result.log_weights, float)), np.asarray(result.particles.x)
    modes = np.asarray(jax.vmap(jax.vmap(exact.mixture.responsibilities))(x), float)
    mean = np.asarray(exact.mixture.mean(), float)
    second = np.asarray(exact.mixture.covariance(), float) + np.outer(mean, mean)
    found = {
        "evidence": (np.exp(np.asarray(result.log_evidence, float) - log_evidence), 1.0),
        "mean": (np.einsum("cn,cni->ci", weights, x), mean),
        "second moment": (np.einsum("cn,cni,cnj->cij", weights, x, x), second),
        "modes": (np.einsum("cn,cnk->ck", weights, modes), np.exp(np.asarray(exact.mixture.log_weights))),
    }
    for name, (values, truth) in found.items():
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        # t with 15 degrees of freedom exceeds 8 with probability 1e-6; the discretisation error allowed is .01.
        assert np.all(np.abs(values.mean(0) - truth) < 8 * error + 0.01), (name, values.mean(0), truth, error)
        assert np.all(error < 0.04), (name, error)


def test_guidance_beats_importance_sampling():
    """Deviations of log evidence of .83 against 5.7, effective sample sizes of 6.3 against 1.3, when written."""
    sharp = problem(std=0.3 * STD)
    guided, plain = (run(7, sampler(gaussian(), sharp, times=times())) for sampler in (mcgdiff, bootstrap))
    assert np.std(guided.log_evidence) < 0.2 * np.std(plain.log_evidence)
    assert guided.ess[:, -1].mean() > 4 * plain.ess[:, -1].mean()


@pytest.mark.slow
def test_forecast_knows_the_modes():
    """Modes far apart, which a multiple of x_t does not tell from the middle between them: the median error was .36
    with it in the place of the network's answer, and is .06, over 20 problems of the benchmark."""
    schedule = schedules.cosine(-9.0)
    grid = smcdiff.log_snr_times(schedule, 100, log_snr_min=-6.0, log_snr_max=5.0)
    errors = []
    for seed in range(10):
        model, measured, matrix, std = gmm25.draw_problem(seed, 8, 4, schedule)
        _, log_evidence = model.posterior(matrix, np.asarray(measured.y), std)
        result = run(16, mcgdiff(model, measured, times=grid, sigma_data=11.4), 1000, 1, ess_threshold=0.5)
        errors.append(abs(float(result.log_evidence[0]) - log_evidence))
    assert np.median(errors) < 0.15, errors


def test_bootstrap_is_importance_sampling_from_the_prior_chain():
    easy = problem(std=3 * STD)
    law = posterior(*chain_law(gaussian(), times()), easy)
    result = run(8, bootstrap(gaussian(), easy, times=times()))
    assert_properly_weighted(result, *law)
    assert not result.info.resampled.any()  # there are no weights before the end


def test_bootstrap_takes_any_likelihood():
    as_function = bootstrap(gaussian(), problem().log_likelihood, times=times())
    results = [run(9, fk) for fk in (as_function, bootstrap(gaussian(), problem(), times=times()))]
    np.testing.assert_array_equal(results[0].log_evidence, results[1].log_evidence)
    law = tilt(*chain_law(gaussian(), times()), SLOPE, 0.0, 1.0)
    assert_properly_weighted(run(9, bootstrap(gaussian(), reward(), times=times())), *law)


_calls = []


def _counted_denoiser(params, x, t):
    _calls.append(None)
    return params * x


def test_new_weights_and_a_new_measurement_do_not_trace_again():
    for sampler in (mcgdiff, bootstrap):
        for scale in (0.5, 0.6, 0.7):
            model = smcdiff.Diffusion(f32(scale), _counted_denoiser, schedules.cosine(), "x0", (3,))
            run(10, sampler(model, problem(y=scale * Y), times=times()), 4, 2)
            if scale == 0.5:
                first = len(_calls)
        assert first > 0 and len(_calls) == first


def test_bad_input():
    for sampler, name in ((mcgdiff, "mcgdiff"), (bootstrap, "bootstrap")):
        with pytest.raises(TypeError, match=f"{name} needs a target with the capability DiffusionModel"):
            sampler(mixture().mixture, problem(), times=times())
        with pytest.raises(ValueError, match="order"):
            sampler(gaussian(), problem(), times=times(), order=3)
        with pytest.raises(ValueError, match="times must fall strictly from 1"):
            sampler(gaussian(), problem(), times=times()[::-1])
        with pytest.raises(ValueError, match="shape"):
            wrong = inverse.InverseProblem(inverse.identity((2, 2)), jnp.zeros((2, 2)), 1.0)
            sampler(gaussian(), wrong, times=times())
    for sigma_data in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="sigma_data must be positive"):
            mcgdiff(gaussian(), problem(), times=times(), sigma_data=sigma_data)
    with pytest.raises(TypeError, match="problem must be an InverseProblem or a function"):
        bootstrap(gaussian(), 3.0, times=times())
    with pytest.raises(TypeError, match="problem must be an InverseProblem, got"):
        mcgdiff(gaussian(), reward(), times=times())
