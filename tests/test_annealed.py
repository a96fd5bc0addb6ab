"""Annealed MCMC against exact laws of compositions.

Truth as in tests/test_fkc.py: in the plane the product of two mixtures is integrated on a grid in double precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows import quick

import smcdiff
from smcdiff import compose, mcmc, schedules
from smcdiff.density import denoised

SCHEDULE = schedules.ve(0.01, 30.0)
TIMES = smcdiff.log_snr_times(SCHEDULE, 40, log_snr_max=4.0)


class ScoresAlone:
    """Hides all of a path but its scores; a pytree."""

    def __init__(self, path):
        self.path = path

    schedule = property(lambda self: self.path.schedule)
    event_shape = property(lambda self: self.path.event_shape)

    def score(self, x, t):
        return self.path.score(x, t)

    def at(self, t):
        return smcdiff.Marginal(self, jnp.asarray(t))


class ScorePath(ScoresAlone):
    """Hides the densities of a path, and denoises."""

    def denoise(self, x, t):
        return self.path.denoise(x, t)


for cls in (ScoresAlone, ScorePath):
    jax.tree_util.register_pytree_node(
        cls, lambda self: ((self.path,), None), lambda _, children, cls=cls: cls(*children)
    )


def parts():
    """Two overlapping mixtures: the modes of their product do not part before the steps have mixed them."""
    create = smcdiff.GaussianMixtureDiffusion.create
    return (
        create([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.6]], [[0.5, 0.1], [0.1, 0.4]], SCHEDULE),
        create([0.6, 0.4], [[-0.8, 0.7], [1.2, 0.0]], 0.6, SCHEDULE),
    )


@functools.cache
def truth():
    """Mean features and log integral of the product."""
    axis = np.linspace(-8.0, 8.0, 641)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    log_density = sum(
        np.asarray(jax.vmap(jax.vmap(part.mixture.logdensity))(jnp.asarray(x, jnp.float32)), float)
        for part in parts()
    )
    density = np.exp(log_density)
    return np.tensordot(density / density.sum(), features(x), axes=2), np.log(
        density.sum() * (axis[1] - axis[0]) ** 2
    )


def features(x):
    """First and second moments, and the side of the plane."""
    x = np.asarray(x, float)
    first, second = x[..., 0], x[..., 1]
    return np.stack([first, second, first**2, first * second, second**2, first > 0], axis=-1).astype(float)


@functools.cache
def tuned():
    return smcdiff.smc.tune_step_sizes(
        jax.random.key(0), compose.product(*parts()), times=TIMES, num_rounds=10
    )


def test_step_sizes_reach_the_acceptance_rate_at_every_level():
    rates = np.asarray(tuned().acceptance_rates)
    assert rates.shape == (40,) and np.all(np.abs(rates - 0.6) < 0.04), rates
    sizes = np.asarray(tuned().step_sizes)
    assert sizes[0] > 50 * sizes[-1] > 0.0


KERNELS = {
    "mala": (mcmc.mala, False),
    "mala, line integral": (functools.partial(mcmc.mala, accept="line_integral"), True),
    "hmc": (Partial(lambda target, h: mcmc.hmc(target, jnp.sqrt(2 * h), 2)), False),
}


@pytest.mark.parametrize("name", quick(KERNELS, "mala, line integral"))
def test_the_walk_ends_in_the_product(name):
    """Chains are independent: 2000 of them, 5 standard errors, six features; fails once in 300 000."""
    kernel, scores_only = KERNELS[name]
    path = compose.product(*(map(ScorePath, parts()) if scores_only else parts()))
    fk = smcdiff.annealed_mcmc(
        path, times=TIMES, step_sizes=tuned().step_sizes, kernel=kernel, steps_per_level=6
    )
    result = smcdiff.run_smc(jax.random.key(1), fk, 2000, chunk_size=40, progress=False)
    found = features(result.particles[0])
    z = (found.mean(0) - truth()[0]) / (found.std(0) / np.sqrt(2000))
    # With scores only the last step denoises at sigma = 0.018, an error below a tenth of a standard error.
    assert np.all(np.abs(z) < 5), z


def test_few_steps_are_not_enough_which_the_check_sees():
    fk = smcdiff.annealed_mcmc(
        compose.product(*parts()), times=TIMES[::8], step_sizes=tuned().step_sizes[7::8], steps_per_level=1
    )
    found = features(smcdiff.run_smc(jax.random.key(1), fk, 2000, chunk_size=5, progress=False).particles[0])
    assert np.abs((found.mean(0) - truth()[0]) / (found.std(0) / np.sqrt(2000))).max() > 8


def test_importance_weights_are_exact_and_their_evidence_unbiased():
    """400 runs of 10 particles; 4.5 standard errors: fails once in 100 000."""
    path = compose.product(*parts())
    fk = smcdiff.annealed_mcmc(
        path, times=TIMES, step_sizes=tuned().step_sizes, steps_per_level=1, weights="density"
    )
    result = smcdiff.run_smc(jax.random.key(2), fk, 10, num_chains=400, chunk_size=40, progress=False)
    ratio = np.exp(np.asarray(result.log_evidence, float) - truth()[1])
    error = ratio.std(ddof=1) / np.sqrt(400)
    assert error < 0.05 and abs(ratio.mean() - 1) < 4.5 * error
    # Weighted by the evidence, runs make an unbiased estimate of any integral of the product.
    moments = np.einsum("cn,cnf->cf", np.exp(result.log_weights), features(result.particles)) * ratio[:, None]
    z = (moments.mean(0) - truth()[0]) / (moments.std(0, ddof=1) / np.sqrt(400))
    assert np.all(np.abs(z) < 4.5), z


def reverse_law(mean, covariance, eta):
    """Mean and covariance at the end of the reverse transitions of Gaussian data, which are affine."""
    alphas, sigmas = (np.asarray(values(TIMES), float) for values in (SCHEDULE.alpha, SCHEDULE.sigma))
    one = np.eye(len(mean))
    found, spread = np.zeros(len(mean)), sigmas[0] ** 2 * one
    for alpha_t, sigma_t, alpha_s, sigma_s in zip(alphas, sigmas, alphas[1:], sigmas[1:], strict=False):
        gain = alpha_t * covariance @ np.linalg.inv(alpha_t**2 * covariance + sigma_t**2 * one)
        variance = eta**2 * (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2) * sigma_s**2 / sigma_t**2
        weight = np.sqrt(sigma_s**2 - variance) / sigma_t  # of x_t - alpha_t x0_hat
        slope = (alpha_s - weight * alpha_t) * gain + weight * one
        found = slope @ found + (alpha_s - weight * alpha_t) * (mean - alpha_t * gain @ mean)
        spread = slope @ spread @ slope.T + variance * one
    return found, spread


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_predictor_is_the_reverse_transition(eta):
    """Hardly any move is made: the law is that of 40 transitions, mean and covariance; 5 standard errors of 4000."""
    mean, covariance = np.array([0.7, -1.2]), np.array([[0.5, 0.3], [0.3, 0.9]])
    model = smcdiff.GaussianDiffusion(mean, covariance, SCHEDULE)
    fk = smcdiff.annealed_mcmc(model, times=TIMES, step_sizes=1e-8, steps_per_level=1, predictor=eta)
    x = smcdiff.run_smc(jax.random.key(3), fk, 4000, chunk_size=40, progress=False).particles[0]
    found, spread = reverse_law(mean, covariance, eta)
    off = np.asarray(x, float) - found
    products = off[:, :, None] * off[:, None] - spread
    values = np.concatenate([off, products.reshape(-1, 4)[:, [0, 1, 3]]], axis=1)
    z = values.mean(0) / (values.std(0) / np.sqrt(len(x)))
    assert np.all(np.abs(z) < 5), z


def test_without_a_predictor_hardly_any_move_is_made():
    fk = smcdiff.annealed_mcmc(parts()[0], times=TIMES, step_sizes=1e-8, steps_per_level=1)
    x = smcdiff.run_smc(jax.random.key(3), fk, 400, chunk_size=40, progress=False).particles[0]
    assert x.std() > 10


def test_a_path_of_scores_alone_is_denoised_by_them():
    """Tweedie's formula stands in for a method that the protocol of paths does not ask for."""
    path, x, t = ScoresAlone(parts()[0]), jnp.asarray([0.7, -1.2]), TIMES[20]
    np.testing.assert_allclose(denoised(path, x, t), parts()[0].denoise(x, t), rtol=1e-4)
    fk = smcdiff.annealed_mcmc(path, times=TIMES[::20], step_sizes=0.1, steps_per_level=1)
    assert np.all(np.isfinite(smcdiff.run_smc(jax.random.key(6), fk, 4, progress=False).particles))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_sizes": 0.0}, ValueError, "step_sizes must be positive"),
        ({"step_sizes": jnp.ones(3)}, ValueError, "one entry for each of the 40 levels"),
        ({"steps_per_level": 0}, ValueError, "steps_per_level must be a positive integer"),
        ({"weights": "score"}, ValueError, "weights must be"),
        ({"weights": "density", "predictor": 1.0}, ValueError, "does not go with a predictor"),
        ({"predictor": -1.0}, ValueError, "predictor must lie"),
        ({"times": TIMES[1:]}, ValueError, "times must fall strictly from 1"),
        ({"path": 3}, TypeError, "annealed_mcmc needs a target with the capability ScheduledPath"),
        ({"path": ScorePath(parts()[0]), "weights": "density"}, TypeError, "HasLogDensity"),
        (
            {"path": ScorePath(parts()[0]), "kernel": mcmc.mala},
            TypeError,
            "mala needs a target with the capability",
        ),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    arguments = {"path": parts()[0], "times": TIMES, "step_sizes": 0.5, **options}
    path = arguments.pop("path")
    with pytest.raises(error, match=message):
        smcdiff.annealed_mcmc(path, **arguments)
