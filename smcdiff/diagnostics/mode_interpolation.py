"""Samples between modes: those on whose way the model's prediction would not settle.

A network smooths the score where it should jump from one mode to the other, so that it makes samples of neither. It
gives itself away: on the way to such a sample, its prediction x0_hat of the clean sample keeps moving, while for others
it has settled. With x0_hat_i the predictions at the steps in a window of the reverse trajectory,

    v = mean over the window and the entries of (x0_hat_i - mean over the window of x0_hat)^2.

How large is too large, v of samples that are known to be good tells: the p-value of a sample is the share of
(reference, itself) whose v is at least its own, so that one in twenty good samples has a p-value of 0.05 or less.

Source: Aithal et al., "Understanding Hallucinations in Diffusion Models through Mode Interpolation", arXiv 2406.09358,
section 5.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_count
from smcdiff.density import DiffusionModel, require
from smcdiff.diagnostics.memorisation import share_at_least
from smcdiff.reverse import reverse_transition
from smcdiff.schedules import check_times

__all__ = ["TrajectoryVariance", "sample_with_trajectory_variance", "trajectory_variance"]


class TrajectoryVariance(NamedTuple):
    """How much the prediction of the clean sample moved on the way to it.

    Attributes
    ----------
    variance
        v of each sample, in squared units of an entry, shape (n,); infinite where a prediction is not finite.
    p_value
        Share of the reference whose variance is at least as large, the sample counted with it, shape (n,); None
        without reference.
    """

    variance: Float[Array, " n"]
    p_value: Float[np.ndarray, " n"] | None


def trajectory_variance(
    rng_key: PRNGKeyArray,
    model: DiffusionModel,
    samples: Float[Array, "n *event"],
    times: Float[Array, " steps"],
    *,
    eta: float = 0.0,
    num_trajectories: int = 1,
    reference: Float[Array, "m *event"] | None = None,
    batch_size: int | None = None,
) -> TrajectoryVariance:
    """How much the model hesitates about given samples: noise them, denoise them, and see its prediction move.

    Parameters
    ----------
    rng_key
        Key.
    model
        The diffusion model.
    samples
        Samples (n, *event), whoever made them.
    times
        Grid that falls from the time to which samples are noised, at most 1, to 0. The noise there, sigma / alpha,
        should be larger than the width of a mode and smaller than the distance between modes: with less nothing moves,
        with more everything does (`Schedule.time_from_log_snr` gives the time of -log(sigma / alpha)).
    eta
        Noise of the reverse steps, 0 for DDIM, 1 for ancestral steps.
    num_trajectories
        Trajectories of each sample, whose variances are averaged.
    reference
        Good samples, for instance held-out data, that say which variances are usual.
    batch_size
        Samples denoised together; bounds memory and changes no result.

    Returns
    -------
    TrajectoryVariance

    Raises
    ------
    TypeError
        If ``model`` has no denoiser.
    ValueError
        If shapes do not fit, or ``times`` does not fall to 0 within [0, 1].

    Source: arXiv 2406.09358, section 5, for generated trajectories, which `sample_with_trajectory_variance` records.
    """
    require(model, DiffusionModel, "trajectory_variance")
    times = jnp.asarray(times)
    values = np.asarray(times)
    if (
        values.ndim != 1
        or len(values) < 3
        or values[-1] != 0
        or values[0] > 1
        or not np.all(np.diff(values) < 0)
    ):
        raise ValueError(f"times must fall strictly from at most 1 to 0 in at least two steps, got {values}.")
    check_count("num_trajectories", num_trajectories)
    samples = _as_samples("samples", samples, model)

    def variance(key, x):
        total = jnp.zeros(len(x), x.dtype)
        for k in range(num_trajectories):
            total += _noised_and_back(jax.random.fold_in(key, k), model, x, times, eta, batch_size)
        return total / num_trajectories

    key_samples, key_reference = jax.random.split(rng_key)
    found = variance(key_samples, samples)
    if reference is None:
        return TrajectoryVariance(found, None)
    usual = variance(key_reference, _as_samples("reference", reference, model))
    return TrajectoryVariance(found, share_at_least(np.asarray(usual), np.asarray(found)))


def sample_with_trajectory_variance(
    rng_key: PRNGKeyArray,
    model: DiffusionModel,
    times: Float[Array, " steps"],
    num_samples: int,
    *,
    window: tuple[float, float] | None = None,
    eta: float = 1.0,
    batch_size: int | None = None,
) -> tuple[Float[Array, "n *event"], Float[Array, " n"]]:
    """`smcdiff.reverse_sample` of first order, with the variance of the predictions on each sample's way.

    Parameters
    ----------
    rng_key, model, times, num_samples, eta, batch_size
        As in `smcdiff.reverse_sample`.
    window
        The (least, greatest) time of the predictions that count; by default those of the second half of the steps.

    Returns
    -------
    Samples of shape (num_samples, *event_shape), and v of each, shape (num_samples,). Keep those of small v: a
    quantile of it says how many are given up.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser.
    ValueError
        If ``times`` is not a grid from 1 to 0, or fewer than two of its steps are in the window.

    Source: arXiv 2406.09358, section 5.
    """
    require(model, DiffusionModel, "sample_with_trajectory_variance")
    check_count("num_samples", num_samples)
    times = check_times(times)
    starts = np.asarray(times)[:-1]
    counts = np.arange(len(starts)) >= len(starts) // 2
    if window is not None:
        counts = (window[0] <= starts) & (starts <= window[1])
    if counts.sum() < 2:
        raise ValueError(
            f"two steps at least must be in the window, got window={window} and {len(starts)} steps."
        )
    return _generate(rng_key, model, times, jnp.asarray(counts), eta, num_samples, batch_size)


def _as_samples(name, samples, model):
    samples = jnp.asarray(samples)
    if samples.shape[1:] != tuple(model.event_shape):
        raise ValueError(
            f"{name} must have the shape (n, *event) with event {tuple(model.event_shape)}, got {samples.shape}."
        )
    return samples


@partial(jax.jit, static_argnames="batch_size")
def _noised_and_back(rng_key, model, samples, times, eta, batch_size):
    key_noise, key_steps = jax.random.split(rng_key)
    alpha, sigma = model.schedule.alpha(times[0]), model.schedule.sigma(times[0])
    noise = jax.random.normal(key_noise, samples.shape, samples.dtype)
    counts = jnp.ones(len(times) - 1, bool)
    return _walk(key_steps, model, alpha * samples + sigma * noise, times, counts, eta, batch_size)[1]


@partial(jax.jit, static_argnames=("num_samples", "batch_size"))
def _generate(rng_key, model, times, counts, eta, num_samples, batch_size):
    key_start, key_steps = jax.random.split(rng_key)
    shape = (num_samples, *model.event_shape)
    start = model.schedule.sigma(times[0]) * jax.random.normal(key_start, shape, times.dtype)
    return _walk(key_steps, model, start, times, counts, eta, batch_size)


def _walk(rng_key, model, start, times, counts, eta, batch_size):
    """Reverse steps from ``start``; the samples, and the variance of the predictions of the steps that count."""
    dimension = math.prod(model.event_shape)

    def step(carry, inputs):
        x, mean, squares, seen = carry
        index, t, s, is_counted = inputs
        x0 = batched_map(lambda x: model.denoise(x, t), batch_size)(x)
        moved, std = jax.vmap(
            lambda x, x0: reverse_transition(model.schedule, x, x0, t, s, eta), out_axes=(0, None)
        )(x, x0)
        noise = jax.random.normal(jax.random.fold_in(rng_key, index), x.shape, x.dtype)
        # Welford's update, of all entries of a sample together.
        now = seen + 1
        change = x0 - mean
        new = mean + change / now
        added = jnp.sum((change * (x0 - new)).reshape(len(x), -1), axis=1)
        mean = jnp.where(is_counted, new, mean)
        squares = jnp.where(is_counted, squares + added, squares)
        return (moved + std * noise, mean, squares, jnp.where(is_counted, now, seen)), None

    nothing = jnp.zeros(len(start), start.dtype)
    inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:], counts)
    carry = (start, jnp.zeros_like(start), nothing, jnp.zeros((), start.dtype))
    (x, _, squares, seen), _ = jax.lax.scan(step, carry, inputs)
    variance = squares / (seen * dimension)
    return x, jnp.where(jnp.isfinite(variance), variance, jnp.inf)
