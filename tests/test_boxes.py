"""Diffusion of uniform boxes, against SciPy's normal distribution in double precision and exact draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import quick
from scipy.stats import norm

from smcdiff import schedules
from smcdiff.boxes import BoxMixtureDiffusion

WEIGHTS, LOW, HIGH = (
    np.array([0.7, 0.3]),
    np.array([[-0.2, -1.0], [0.1, 0.4]]),
    np.array([[0.3, 0.6], [1.5, 0.9]]),
)
SCHEDULE = schedules.rectified_flow()


def model():
    return BoxMixtureDiffusion.create(WEIGHTS, LOW, HIGH, SCHEDULE)


@pytest.mark.parametrize("t", quick([0.02, 0.3, 0.8], 0.3))
def test_density_and_score_are_those_of_the_noised_boxes(t):
    points = np.array([[0.1, 0.2], [1.2, 0.7], [-0.5, 1.4], [0.3, -0.9]])
    alpha, sigma = 1 - t, t
    low, high = (alpha * LOW - points[:, None]) / sigma, (alpha * HIGH - points[:, None]) / sigma
    density = (norm.cdf(high) - norm.cdf(low)) / (alpha * (HIGH - LOW))
    joint = WEIGHTS * density.prod(axis=-1)
    slopes = (norm.pdf(low) - norm.pdf(high)) / sigma / (alpha * (HIGH - LOW)) / np.maximum(density, 1e-200)
    marginal = model().at(jnp.asarray(t, jnp.float32))
    inside = joint.sum(axis=1) > 1e-12
    score = np.sum(joint[..., None] * slopes, axis=1)[inside] / joint.sum(axis=1)[inside, None]
    x = jnp.asarray(points[inside], jnp.float32)
    np.testing.assert_allclose(
        jax.vmap(marginal.logdensity)(x), np.log(joint.sum(axis=1)[inside]), rtol=2e-4, atol=2e-4
    )
    np.testing.assert_allclose(jax.vmap(marginal.score)(x), score, rtol=2e-3, atol=2e-3)


def test_tails_have_a_density_where_the_difference_of_probabilities_rounds_to_zero():
    marginal = model().at(jnp.asarray(0.02))
    far = jnp.asarray([4.0, -3.0])
    # |x - corner|^2 / (2 sigma^2) of the nearest corner of all boxes, up to the logarithms of distances.
    corner = 0.98 * np.array([0.3, -1.0])
    expected = -np.sum((np.array([4.0, -3.0]) - corner) ** 2) / (2 * 0.02**2)
    np.testing.assert_allclose(marginal.logdensity(far), expected, rtol=1e-3)
    np.testing.assert_allclose(marginal.score(far), (corner - np.asarray(far)) / 0.02**2, rtol=1e-2)


def test_data_are_uniform_on_the_boxes():
    at_zero = model().at(jnp.zeros(()))
    inside, outside = jnp.asarray([0.0, 0.2]), jnp.asarray([0.0, 0.7])
    np.testing.assert_allclose(at_zero.logdensity(inside), np.log(0.7 / (0.5 * 1.6)), rtol=1e-6)
    assert at_zero.logdensity(outside) == -np.inf
    np.testing.assert_array_equal(at_zero.score(inside), 0.0)


@pytest.mark.parametrize("t", [0.0, 0.4])
def test_draws_have_the_moments_of_the_law(t):
    """5 standard errors: fails once in 2 million."""
    x = np.asarray(model().at(jnp.asarray(t)).sample(jax.random.key(0), 40_000))
    alpha, sigma = 1 - t, t
    middle, second = (LOW + HIGH) / 2, (LOW**2 + LOW * HIGH + HIGH**2) / 3
    mean, square = alpha * WEIGHTS @ middle, alpha**2 * WEIGHTS @ second + sigma**2
    assert np.all(np.abs(x.mean(0) - mean) < 5 * x.std(0) / 200)
    assert np.all(np.abs((x**2).mean(0) - square) < 5 * (x**2).std(0) / 200)


def test_the_denoised_sample_is_the_posterior_mean():
    x = jnp.asarray([0.4, 0.5])
    t = jnp.asarray(0.3)
    draws = np.asarray(model().at(jnp.zeros(())).sample(jax.random.key(1), 400_000), float)
    weight = np.exp(-np.sum((np.asarray(x) - 0.7 * draws) ** 2, axis=1) / (2 * 0.3**2))
    mean = weight @ draws / weight.sum()
    error = np.sqrt(weight**2 @ (draws - mean) ** 2) / weight.sum()
    assert np.all(np.abs(np.asarray(model().denoise(x, t)) - mean) < 5 * error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], LOW, HIGH), "of shape"),
        (([1.0, 0.0], LOW, HIGH), "weights must be positive"),
        ((WEIGHTS, HIGH, LOW), "high above low"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoxMixtureDiffusion.create(*arguments, SCHEDULE)
