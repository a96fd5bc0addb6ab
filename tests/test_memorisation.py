"""Planted copies of training images, and planted samples between the modes of an exact mixture."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import smcdiff
from smcdiff import schedules
from smcdiff.diagnostics.memorisation import nearest_training_image, share_at_least
from smcdiff.diagnostics.mode_interpolation import sample_with_trajectory_variance, trajectory_variance

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-1.0, 0.0], [1.0, 0.4], [0.3, -1.6]])
WIDTH = 0.05


def _auc(bad, good):
    return np.mean(np.asarray(bad)[:, None] > np.asarray(good)[None, :])


@pytest.fixture(scope="module")
def model():
    return smcdiff.GaussianMixtureDiffusion.create(WEIGHTS, MEANS, WIDTH**2, schedules.vp())


@pytest.fixture(scope="module")
def times(model):
    """Down from noise of three times the width of a mode, far below the distance of modes."""
    return jnp.linspace(model.schedule.time_from_log_snr(-jnp.log(3 * WIDTH)), 0.0, 25)


def test_samples_between_modes_stand_out(model, times):
    good = model.mixture.sample(jax.random.key(0), 400)
    middle = 0.5 * (MEANS[0] + MEANS[1]) + WIDTH * np.random.default_rng(0).normal(size=(400, 2))
    found = trajectory_variance(
        jax.random.key(1), model, jnp.asarray(middle, jnp.float32), times, num_trajectories=2, reference=good
    )
    same = trajectory_variance(
        jax.random.key(2),
        model,
        model.mixture.sample(jax.random.key(3), 400),
        times,
        num_trajectories=2,
        reference=good,
    )
    assert _auc(found.variance, same.variance) > 0.97
    assert np.mean(found.p_value <= 0.05) > 0.9
    # Of good samples one in twenty is at the 5 % level; the binomial's 1 - 1e-5 quantile allows for the reference too.
    assert np.sum(same.p_value <= 0.05) < stats.binom.isf(1e-5, 400, 0.05) * 1.5
    assert stats.kstest(same.p_value, "uniform").pvalue > 1e-4


def test_variance_is_that_of_the_predictions(model):
    """Three steps by hand, without noise in the steps."""
    times = jnp.asarray([0.2, 0.1, 0.05, 0.0])
    x0 = jnp.asarray([[-1.0, 0.1]])
    found = trajectory_variance(jax.random.key(5), model, x0, times)
    key_noise = jax.random.split(jax.random.fold_in(jax.random.split(jax.random.key(5))[0], 0))[0]
    schedule = model.schedule
    x = schedule.alpha(times[0]) * x0 + schedule.sigma(times[0]) * jax.random.normal(key_noise, x0.shape)
    x, predictions = x[0], []
    for t, s in itertools.pairwise(times):
        predictions.append(model.denoise(x, t))
        x, _ = smcdiff.reverse_transition(schedule, x, predictions[-1], t, s, 0.0)
    expected = np.var(np.stack(predictions).astype(float), axis=0).mean()
    assert float(found.variance[0]) == pytest.approx(expected, rel=2e-3)
    assert found.p_value is None


class _Smoothed(eqx.Module):
    """The mixture's denoiser whose responsibilities are never sharper than at noise ``floor``: it interpolates."""

    schedule: schedules.Schedule
    floor: float
    event_shape: tuple[int, ...] = eqx.field(static=True, default=(2,))

    def denoise(self, x, t):
        means = jnp.asarray(MEANS, x.dtype)
        z, r = x / self.schedule.alpha(t), self.schedule.sigma(t) / self.schedule.alpha(t)
        squares = jnp.sum((z[None] - means) ** 2, axis=1)
        logits = jnp.log(jnp.asarray(WEIGHTS, x.dtype)) - 0.5 * squares / jnp.maximum(r, self.floor) ** 2
        kept = WIDTH**2 / (WIDTH**2 + r**2)
        return jax.nn.softmax(logits) @ ((1 - kept) * means + kept * z[None])

    def score(self, x, t):
        return (self.schedule.alpha(t) * self.denoise(x, t) - x) / self.schedule.sigma(t) ** 2

    def at(self, t):
        raise NotImplementedError


def test_a_smoothed_score_gives_its_interpolations_away():
    smoothed = _Smoothed(schedules.vp(), 0.6)
    times = smcdiff.log_snr_times(smoothed.schedule, 60)
    samples, variance = sample_with_trajectory_variance(jax.random.key(3), smoothed, times, 2000, eta=0.0)
    distance = np.linalg.norm(np.asarray(samples)[:, None] - MEANS[None], axis=2).min(axis=1)
    is_between = distance > 5 * WIDTH
    assert 0.01 < is_between.mean() < 0.2
    assert _auc(variance[is_between], variance[~is_between]) > 0.85
    # Giving up a tenth of the samples removes most of the bad ones.
    kept = np.asarray(variance) < np.quantile(variance, 0.9)
    assert is_between[kept].mean() < 0.5 * is_between.mean()


def test_the_samples_are_those_of_the_reverse_process(model):
    """Mode weights, to 4 deviations and the grid's error."""
    grid = smcdiff.log_snr_times(model.schedule, 60)
    samples, _ = sample_with_trajectory_variance(jax.random.key(0), model, grid, 1000)
    mode = np.linalg.norm(np.asarray(samples)[:, None] - MEANS[None], axis=2).argmin(axis=1)
    share = np.bincount(mode, minlength=3) / 1000
    assert np.all(np.abs(share - WEIGHTS) < 4 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / 1000) + 0.02)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda m, t: trajectory_variance(jax.random.key(0), m, jnp.zeros((3, 3)), t),
            "samples must have the shape",
        ),
        (
            lambda m, t: trajectory_variance(jax.random.key(0), m, jnp.zeros((3, 2)), t[:-1]),
            "times must fall",
        ),
        (
            lambda m, t: sample_with_trajectory_variance(
                jax.random.key(0), m, jnp.asarray([1.0, 0.5, 0.1, 0.0]), 5, window=(0.6, 0.9)
            ),
            "two steps at least",
        ),
    ],
)
def test_bad_input_of_trajectories(model, times, call, told):
    with pytest.raises(ValueError, match=told):
        call(model, times)


# Copies


@pytest.fixture(scope="module")
def images():
    """Centred, so that zeros which fill up a block would be nearer than any image."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(500, 5, 10)), rng.normal(size=(60, 5, 10)), rng.normal(size=(80, 5, 10))


@pytest.mark.parametrize("batch_size", [64, 4096])
def test_nearest_is_the_nearest(images, batch_size):
    data, samples, _ = images
    found = nearest_training_image(samples, data, num_neighbours=7, batch_size=batch_size)
    distances = np.linalg.norm((samples[:, None] - data[None]).reshape(60, 500, -1), axis=2)
    ordered = np.sort(distances, axis=1)
    np.testing.assert_array_equal(found.nearest, distances.argmin(axis=1))
    np.testing.assert_allclose(found.distance, ordered[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found.ratio, ordered[:, 0] / ordered[:, 1:8].mean(axis=1), rtol=1e-6)
    assert found.share == 0.0 and found.p_value is None


def test_copies_are_found_and_weighed(images):
    data, samples, held_out = images
    rng = np.random.default_rng(1)
    samples, copied = samples.copy(), rng.choice(500, 6, replace=False)
    samples[:6] = data[copied] + 1e-4 * rng.normal(size=(6, 5, 10))
    samples[0] = data[copied[0]]
    samples[59] = np.nan  # a particle without weight
    log_weights = np.where(np.arange(60) < 6, 2.0, 0.0)
    log_weights[59] = -np.inf
    found = nearest_training_image(samples, data, held_out=held_out, log_weights=log_weights)
    np.testing.assert_array_equal(found.nearest[:6], copied)
    assert np.all(found.ratio[:6] < 1e-3) and np.all(found.ratio[6:59] > 0.7)
    # Of single precision, to which |x|^2 - 2 x.y + |y|^2 would not be.
    np.testing.assert_allclose(found.distance[1:6], 1e-4 * np.sqrt(50), rtol=0.5)
    assert found.distance[0] == 0.0
    weights = np.exp(log_weights)
    assert found.share == pytest.approx(weights[:6].sum() / weights.sum())
    assert np.isnan([found.distance[59], found.ratio[59], found.p_value[59]]).all()
    np.testing.assert_allclose(found.p_value[:6], 1 / 81)
    assert stats.kstest(found.p_value[6:59], "uniform").pvalue > 1e-4


def test_p_values_count_ties_against_the_sample():
    usual, found = np.array([1.0, 2.0, 2.0, 3.0]), np.array([2.0, 4.0, 0.0, np.nan])
    np.testing.assert_allclose(share_at_least(usual, found), [4 / 5, 1 / 5, 1.0, np.nan])


def test_an_image_that_the_data_repeat_is_a_copy(images):
    data = images[0].copy()
    data[:4] = data[0]
    found = nearest_training_image(data[:1], data, num_neighbours=3)
    assert found.ratio[0] == 0.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_neighbours": 500}, "more than num_neighbours=500"),
        ({"held_out": np.zeros((3, 50))}, "held_out must be shaped like data"),
        ({"log_weights": np.zeros(3)}, "log_weights must be one number a sample"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_bad_input_of_neighbours(images, options, told):
    with pytest.raises(ValueError, match=told):
        nearest_training_image(images[1], images[0], **options)
