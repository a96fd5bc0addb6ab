"""Feynman-Kac steering against closed forms.

The target is prior chain x exp(scale r), where the prior chain is the DISCRETISED one. For Gaussian data its law
is Gaussian (`chain_law`, double precision, written anew), and so is its tilt by a linear-quadratic reward. Proper
weighting says more than an unbiased evidence: for any number of particles

    E[ Z_hat sum_n W_n h(x_n) ] = Z E_target[h],

which `assert_properly_weighted` checks for h = 1, x and x x^T over 1500 runs of 8 particles. z-tests allow 5 standard
errors, estimated from the runs: a false failure has a probability of about 6e-7 a number, and keys are fixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows import quick

import smcdiff
from smcdiff import schedules
from smcdiff.smc.bootstrap import bootstrap
from smcdiff.smc.steering import fk_steering, jax_reward

Z = 5.0
MEAN = np.array([0.8, -1.1, 0.4])
COVARIANCE = np.array([[1.2, 0.5, -0.2], [0.5, 0.7, 0.1], [-0.2, 0.1, 0.3]])
SLOPE = np.array([0.5, -0.8, 0.3])
CENTRE = np.array([1.5, -0.2, 0.9])
NUM_STEPS = 12


def f32(a):
    return jnp.asarray(a, jnp.float32)


def _velocity(model, x, t):
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    alpha_rate, sigma_rate = model.schedule.alpha_sigma_rates(t)
    x0 = model.denoise(x, t)
    return alpha_rate * x0 + sigma_rate * (x - alpha * x0) / sigma


def as_flow(model):
    """An exact model as the velocity network of a flow."""
    return smcdiff.Diffusion(model, _velocity, model.schedule, "velocity", model.event_shape)


@functools.cache
def gaussian(schedule=schedules.cosine):
    return smcdiff.GaussianDiffusion(MEAN, COVARIANCE, schedule())


@functools.cache
def mixture(schedule=schedules.cosine):
    means = np.array([[2.0, 0.5, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.0]])
    return smcdiff.GaussianMixtureDiffusion.create([0.5, 0.2, 0.3], means, 0.2 * COVARIANCE, schedule())


MODELS = {
    "cosine": (schedules.cosine, lambda model: model),
    "velocity of a flow": (schedules.rectified_flow, as_flow),
}


def chain_law(model, times, order=2):
    """Mean and covariance of x_0 under the discretised reverse chain of Gaussian data."""
    centre = np.asarray(model.mixture.mean(), float).ravel()
    covariance = np.asarray(model.mixture.covariance(), float)
    alpha, sigma = (np.asarray(f(times), float) for f in (model.schedule.alpha, model.schedule.sigma))
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)
    d, eye = len(centre), np.eye(len(centre))
    mean, spread = np.zeros(2 * d), np.zeros((2 * d, 2 * d))
    spread[:d, :d] = sigma[0] ** 2 * eye
    for k in range(len(times) - 1):
        share = 0.0
        if order == 2 and 0 < k < len(times) - 2:
            share = 0.5 * (log_snr[k + 1] - log_snr[k]) / (log_snr[k] - log_snr[k - 1])
        ratio = alpha[k] / alpha[k + 1]
        forward = sigma[k] ** 2 - ratio**2 * sigma[k + 1] ** 2
        keep, gain = ratio * sigma[k + 1] ** 2 / sigma[k] ** 2, alpha[k + 1] * forward / sigma[k] ** 2
        slope = alpha[k] * covariance @ np.linalg.inv(alpha[k] ** 2 * covariance + sigma[k] ** 2 * eye)
        offset = centre - alpha[k] * slope @ centre
        move = np.block(
            [[keep * eye + gain * (1 + share) * slope, -gain * share * eye], [slope, np.zeros((d, d))]]
        )
        mean = move @ mean + np.concatenate([gain * (1 + share) * offset, offset])
        spread = move @ spread @ move.T
        spread[:d, :d] += forward * sigma[k + 1] ** 2 / sigma[k] ** 2 * eye
    return mean[:d], spread[:d, :d]


def tilt(mean, covariance, slope, width, scale):
    """Log of E[exp(scale r)], and mean and covariance of the tilted law, for the reward of `reward`."""
    inverse = np.linalg.inv(covariance)
    precision = inverse + scale * width * np.eye(len(mean))
    linear = inverse @ mean + scale * (slope + width * CENTRE)
    tilted = np.linalg.solve(precision, linear)
    log_evidence = 0.5 * (linear @ tilted - mean @ inverse @ mean - scale * width * CENTRE @ CENTRE)
    log_evidence += 0.5 * (np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(precision)[1])
    return log_evidence, tilted, np.linalg.inv(precision)


def _reward(numbers, x):
    slope, centre, width = numbers
    return slope @ x - 0.5 * width * jnp.sum((x - centre) ** 2)


def reward(slope=SLOPE, width=0.0):
    """slope . x - width |x - CENTRE|^2 / 2."""
    return Partial(_reward, (f32(slope), f32(CENTRE), f32(width)))


def assert_properly_weighted(result, log_evidence, mean, covariance, largest_error=0.03):
    """Unbiased evidence, first and second moments, with standard errors that show a bias of a few percent."""
    evidence = np.exp(np.asarray(result.log_evidence, float) - log_evidence)
    weights = np.exp(np.asarray(result.log_weights, float))
    x = np.asarray(result.particles.x, float)
    x = x.reshape(*x.shape[:2], -1)
    first = np.einsum("c,cn,cni->ci", evidence, weights, x)
    second = np.einsum("c,cn,cni,cnj->cij", evidence, weights, x, x)
    exact = {"evidence": 1.0, "mean": mean, "second moment": covariance + np.outer(mean, mean)}
    for (name, truth), values in zip(exact.items(), (evidence, first, second), strict=True):
        error = values.std(0) / np.sqrt(len(values)) + 1e-6  # rounding: all that is left if no weight varies
        z = (values.mean(0) - truth) / error
        assert np.all(np.abs(z) < Z), (name, z)
        assert np.all(error < largest_error * (1 + np.abs(truth))), (name, error)


def times(schedule=schedules.cosine, num_steps=NUM_STEPS):
    return smcdiff.log_snr_times(schedule(), num_steps)


def run(key, fk, num_particles=8, num_chains=1500, **options):
    options = {"chunk_size": fk.num_steps, "progress": False} | options
    return smcdiff.run_smc(jax.random.key(key), fk, num_particles, num_chains=num_chains, **options)


SETTINGS = [("difference", 1), ("max", 3), ("sum", 5)]


CASES = [  # slope, width, scale, threshold
    (SLOPE, 0.0, 1.0, 0.5),
    *[(0.4 * SLOPE, 0.3, 1.3, threshold) for threshold in (0.0, 0.5, 1.0)],
]


@pytest.mark.parametrize(("slope", "width", "scale", "threshold"), CASES)
@pytest.mark.parametrize(("potential", "interval"), SETTINGS)
def test_every_potential_weighs_properly(potential, interval, slope, width, scale, threshold):
    law = tilt(*chain_law(gaussian(), times()), slope, width, scale)
    options = {"potential": potential, "scale": scale, "interval": interval}
    fk = fk_steering(gaussian(), reward(slope, width), times=times(), **options)
    assert_properly_weighted(run(1, fk, ess_threshold=threshold), *law, largest_error=0.05)


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_potentials_are_those_of_the_definition(potential):
    """Any potentials would weigh properly, since the last one makes up for the rest: here they are written out."""
    negative = reward(-SLOPE, width=1.0)
    fk = fk_steering(gaussian(), negative, times=times(), potential=potential, scale=1.3, interval=5)
    keys = jax.random.split(jax.random.key(8), 64)
    particles, increment = jax.vmap(fk.init)(keys)
    step, increments, rewards = jax.jit(jax.vmap(fk.step, (0, 0, None))), [], []
    assert not np.any(increment)
    for k in range(NUM_STEPS):
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        particles, increment = step(keys, particles, jnp.asarray(k))
        increments.append(increment)
        if k + 1 in (5, 10, NUM_STEPS):
            x = np.asarray(particles.denoised, float)
            rewards.append(-x @ SLOPE - 0.5 * np.sum((x - CENTRE) ** 2, axis=-1))
    r = np.array(rewards)
    assert (
        np.any(r.max(axis=0) < 0) and np.any(r[1] < r[0]) and np.any(r[1] > r[0])
    )  # or much would be the same
    expected = (
        1.3
        * {
            "difference": np.diff(r, axis=0, prepend=0.0),
            "max": np.maximum.accumulate(r, axis=0),
            "sum": np.cumsum(r, axis=0),
        }[potential]
    )
    expected[-1] = 1.3 * r[-1] - expected[:-1].sum(axis=0)
    due = np.isin(np.arange(NUM_STEPS), (4, 9, 11))
    np.testing.assert_allclose(np.array(increments)[due], expected, atol=1e-5)
    assert not np.any(np.array(increments)[~due])


def test_first_order_and_flow():
    exact, grid = gaussian(schedules.rectified_flow), times(schedules.rectified_flow)
    law = tilt(*chain_law(exact, grid, 1), SLOPE, 0.0, 1.0)
    assert_properly_weighted(run(2, fk_steering(as_flow(exact), reward(), times=grid, order=1)), *law)


def tilted_mixture(exact, slope):
    """The mixture times exp(slope . x), normalised, and the log of its normaliser."""
    means = np.asarray(exact.mixture.component_means(), float)
    covariance = np.asarray(exact.mixture.component_covariances(), float)[0]
    log_weights = np.asarray(exact.mixture.log_weights, float) + means @ slope
    log_evidence = np.logaddexp.reduce(log_weights)
    tilted = smcdiff.GaussianMixture.create(
        np.exp(log_weights - log_evidence), means + covariance @ slope, covariance
    )
    return tilted, log_evidence + 0.5 * slope @ covariance @ slope


def assert_is_tilted_mixture(result, exact, slope, largest_error=0.025):
    """Evidence, mean and weights of the modes over independent runs, with .015 for the steps' own error."""
    tilted, log_evidence = tilted_mixture(exact, slope)
    weights = np.exp(np.asarray(result.log_weights, float))
    x = np.asarray(result.particles.x)
    modes = np.asarray(jax.vmap(jax.vmap(tilted.responsibilities))(x), float)
    evidence = np.exp(np.asarray(result.log_evidence, float) - log_evidence)
    found = {
        "evidence": (evidence, 1.0),
        "mean": (np.einsum("cn,cni->ci", weights, x.astype(float)), np.asarray(tilted.mean(), float)),
        "modes": (np.einsum("cn,cnk->ck", weights, modes), np.exp(np.asarray(tilted.log_weights, float))),
    }
    for name, (values, truth) in found.items():
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        # Student's t with 15 degrees of freedom exceeds 8 with probability 1e-6.
        assert np.all(np.abs(values.mean(0) - truth) < 8 * error + 0.015), (
            name,
            values.mean(0),
            truth,
            error,
        )
        assert np.all(error < largest_error), (name, error)


@pytest.mark.parametrize("name", quick(MODELS, "velocity of a flow"))
def test_mode_weights_of_a_tilted_mixture(name):
    schedule, wrap = MODELS[name]
    slope = np.array([-0.6, 0.5, 0.8])
    fk = fk_steering(wrap(mixture(schedule)), reward(slope), times=times(schedule, 60), interval=5)
    assert_is_tilted_mixture(run(3, fk, 500, 16), mixture(schedule), slope)


def test_steering_keeps_more_particles_than_importance_sampling():
    """Effective sample sizes of 6.2 against 2.7 of 8 particles, when this was written."""
    strong = reward(4.0 * SLOPE)
    steered = run(4, fk_steering(gaussian(), strong, times=times()))
    plain = run(4, bootstrap(gaussian(), strong, times=times()))
    assert steered.ess[:, -1].mean() > 2 * plain.ess[:, -1].mean()


def test_no_potential_before_the_end_is_importance_sampling():
    """One potential, at the end: the same keys make the same particles as the bootstrap, whose weights these are."""
    late = run(5, fk_steering(gaussian(), reward(), times=times(), interval=NUM_STEPS + 3, potential="sum"))
    plain = run(5, bootstrap(gaussian(), reward(), times=times()))
    np.testing.assert_allclose(late.particles.x, plain.particles.x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(late.log_evidence, plain.log_evidence, rtol=1e-5, atol=1e-5)


_seen = []


def _python_reward(samples):
    assert isinstance(samples, np.ndarray) and samples.shape[1:] == (3,)
    _seen.append(len(samples))
    return samples.astype(float) @ SLOPE


def test_python_rewards_give_the_same_and_are_called_only_when_due():
    fk = {
        name: fk_steering(gaussian(), r, times=times(), interval=5, potential="max")
        for name, r in {"traced": reward(), "python": jax_reward(_python_reward)}.items()
    }
    traced = run(6, fk["traced"], 16, 4)
    for batch_size in (None, 8):
        _seen.clear()
        python = run(6, fk["python"], 16, 4, batch_size=batch_size)
        np.testing.assert_allclose(python.log_evidence, traced.log_evidence, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(python.particles.x, traced.particles.x, rtol=1e-4, atol=1e-4)
        # Due after 5, 10 and 12 steps: 3 times the 16 particles of 4 chains, at once or in two halves.
        assert _seen == ([64] * 3 if batch_size is None else [32] * 6)


def _batch_mean(samples):
    return samples.mean()


def test_bad_input():
    options = {"times": times()}
    with pytest.raises(TypeError, match="fk_steering needs a target with the capability DiffusionModel"):
        fk_steering(mixture().mixture, reward(), **options)
    with pytest.raises(TypeError, match="reward must be a function of one sample, got float"):
        fk_steering(gaussian(), 1.0, **options)
    with pytest.raises(ValueError, match=r"reward must return a real scalar for one sample of shape \(3,\)"):
        fk_steering(gaussian(), jnp.sin, **options)
    with pytest.raises(ValueError, match="potential must be one of"):
        fk_steering(gaussian(), reward(), potential="add", **options)
    for interval in (0, 2.0, True):
        with pytest.raises(ValueError, match="interval must be a positive integer"):
            fk_steering(gaussian(), reward(), interval=interval, **options)
    with pytest.raises(ValueError, match="order"):
        fk_steering(gaussian(), reward(), order=3, **options)
    with pytest.raises(ValueError, match="times must fall strictly from 1"):
        fk_steering(gaussian(), reward(), times=times()[::-1])
    with pytest.raises(Exception, match="must return one number for each of 4 samples"):
        jax.vmap(jax_reward(_batch_mean))(jnp.zeros((4, 3))).block_until_ready()
