"""Diffusion models in closed form: Gaussians, Gaussian mixtures and kernel densities of a data set.

If x_0 ~ sum_k w_k N(m_k, C_k), every marginal of the forward process is again a mixture,

    p_t = sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I),

so that score, log density, denoiser and posterior covariance are exact, and so are the posterior and the
evidence under a linear-Gaussian measurement. Samplers are tested against these models, and users can test
their own against them.

Sources: Cardoso et al., "Monte Carlo guided Denoising Diffusion models", arXiv 2308.07983 (mixture posteriors);
Scarvelis et al., "Closed-Form Diffusion Models", arXiv 2310.12395 (kernel densities, smoothing, truncation).
"""

import math
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.compose.operators import Composable
from smcdiff.density import HasScore
from smcdiff.diffusion import Marginal
from smcdiff.mixture import GaussianMixture
from smcdiff.schedules import Schedule

__all__ = ["EmpiricalDiffusion", "GaussianDiffusion", "GaussianMixtureDiffusion"]


class GaussianMixtureDiffusion(Composable, eqx.Module):
    """The exact diffusion model of data from a Gaussian mixture.

    Parameters
    ----------
    mixture
        Law of the data.
    schedule
        The forward process.
    """

    mixture: GaussianMixture
    schedule: Schedule

    @classmethod
    def create(cls, weights, means, covariance, schedule: Schedule, *, dtype=None) -> Self:
        """Build the model from weights (K,), means (K, *event_shape) and covariance.

        ``covariance`` is a scalar, (d, d) shared, or (K, d, d); errors as in `GaussianMixture.create`.
        """
        return cls(GaussianMixture.create(weights, means, covariance, dtype=dtype), schedule)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.mixture.event_shape

    def at(self, t: Float[Array, ""]) -> GaussianMixture:
        """The marginal p_t: a mixture with score, log density and exact sampler."""
        return self.mixture.diffuse(self.schedule.alpha(t), self.schedule.sigma(t))

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """grad log p_t(x) at one sample ``x``."""
        return self.at(t).score(x)

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """E[x_0 | x_t = x] at one sample ``x``."""
        return self.mixture.denoise(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def posterior_covariance(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "d d"]:
        """Cov[x_0 | x_t = x] over the flattened sample."""
        return self.mixture.denoising_posterior(
            x, self.schedule.alpha(t), self.schedule.sigma(t)
        ).covariance()

    def posterior(self, matrix, y, noise_std) -> tuple[Self, float]:
        """Exact model of the posterior under y ~ N(A x_0, diag(noise_std^2)), and log p(y).

        See `GaussianMixture.posterior`. The result is a diffusion model again: its marginals are the exact
        posteriors' noised versions.
        """
        mixture, log_evidence = self.mixture.posterior(matrix, y, noise_std)
        return type(self)(mixture, self.schedule), log_evidence


def GaussianDiffusion(mean, covariance, schedule: Schedule, *, dtype=None) -> GaussianMixtureDiffusion:
    """The exact diffusion model of Gaussian data: a mixture of one component.

    Parameters
    ----------
    mean
        Shape ``event_shape``.
    covariance
        Positive scalar, or (d, d) over the flattened sample.
    schedule
        The forward process.
    dtype
        Of the stored arrays; JAX's default float if omitted.
    """
    return GaussianMixtureDiffusion.create(
        np.ones(1), np.asarray(mean)[None], covariance, schedule, dtype=dtype
    )


class EmpiricalDiffusion(Composable, eqx.Module):
    """The exact diffusion model of a kernel density of a data set, with optional smoothing and truncation.

    The law of the data is (1/K) sum_k N(data_k, bandwidth^2 I).

    Parameters
    ----------
    data
        Shape (K, *event_shape).
    bandwidth
        Deviation of the kernel, positive, in data units.
    schedule
        The forward process.
    smoothing
        Perturbations (M, *event_shape) over which the score is averaged, or None. See `smoothed`.
    num_neighbours
        If given, only that many components of largest responsibility enter the denoiser.
    batch_size
        If given, components are visited in blocks of that size, which bounds memory and changes no number.

    Raises
    ------
    ValueError
        If ``bandwidth`` is not positive, ``num_neighbours`` or ``batch_size`` is out of range, or both are given.
    """

    data: Float[Array, "K *event"]
    bandwidth: float
    schedule: Schedule
    smoothing: Float[Array, "M *event"] | None = None
    num_neighbours: int | None = eqx.field(default=None, static=True)
    batch_size: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if not isinstance(self.bandwidth, jax.core.Tracer) and not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {self.bandwidth}.")
        if self.num_neighbours is not None and self.batch_size is not None:
            raise ValueError(
                "give num_neighbours or batch_size, not both: truncation needs all responsibilities."
            )
        if self.num_neighbours is not None and not 1 <= self.num_neighbours <= len(self.data):
            raise ValueError(
                f"num_neighbours must be from 1 to the number of data, {len(self.data)}, got {self.num_neighbours}."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer or None, got {self.batch_size}.")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.data.shape[1:]

    def smoothed(self, rng_key: PRNGKeyArray, scale: float, num_draws: int) -> "EmpiricalDiffusion":
        """The model whose score is averaged over ``num_draws`` antithetic Gaussian perturbations.

        Samples then leave the data points for averages of neighbouring ones. The result has no log density.

        Parameters
        ----------
        rng_key
            Key of the perturbations, which are drawn once.
        scale
            Deviation of the perturbations, in units of x_t.
        num_draws
            Even number of perturbations.
        """
        if num_draws < 2 or num_draws % 2:
            raise ValueError(f"num_draws must be a positive even number, got {num_draws}.")
        half = scale * jax.random.normal(rng_key, (num_draws // 2, *self.event_shape), self.data.dtype)
        return EmpiricalDiffusion(
            self.data,
            self.bandwidth,
            self.schedule,
            jnp.concatenate([half, -half]),
            self.num_neighbours,
            self.batch_size,
        )

    def exact(self) -> GaussianMixtureDiffusion:
        """The kernel density as a mixture: no smoothing, no truncation, no batching."""
        weights = np.ones(len(self.data))
        return GaussianMixtureDiffusion.create(
            weights, self.data, self.bandwidth**2, self.schedule, dtype=self.data.dtype
        )

    def at(self, t: Float[Array, ""]) -> HasScore:
        """The marginal at time ``t``, known by its score; `exact` has densities."""
        return Marginal(self, jnp.asarray(t))

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Score at one sample ``x``, for t > 0."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (alpha * self.denoise(x, t) - x) / sigma**2

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """E[x_0 | x_t = x] at one sample ``x``, averaged over the perturbations if there are any."""
        if self.smoothing is None:
            return self._denoise(x, t)
        return jnp.mean(jax.vmap(lambda shift: self._denoise(x + shift, t))(self.smoothing), axis=0)

    def _denoise(self, x, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variance = (alpha * self.bandwidth) ** 2 + sigma**2
        flat = x.reshape(-1)
        average = self._average_of_data(alpha * flat / variance, alpha**2 / variance)
        return ((alpha * self.bandwidth**2 * flat + sigma**2 * average) / variance).reshape(self.event_shape)

    def _average_of_data(self, direction, precision):
        """Average of the data under weights softmax(direction . data_k - precision |data_k|^2 / 2)."""
        data = self.data.reshape(len(self.data), -1)
        if self.batch_size is None:
            logits = _logits(data, direction, precision)
            if self.num_neighbours is None:
                return jax.nn.softmax(logits) @ data
            logits, nearest = jax.lax.top_k(logits, self.num_neighbours)
            return jax.nn.softmax(logits) @ data[nearest]
        return _average_in_blocks(data, direction, precision, self.batch_size)


def _average_in_blocks(data, direction, precision, batch_size):
    """The same average, one block of data at a time, with a running maximum of the logits."""
    num_blocks = math.ceil(len(data) / batch_size)
    padding = num_blocks * batch_size - len(data)
    blocks = jnp.pad(data, ((0, padding), (0, 0))).reshape(num_blocks, batch_size, -1)
    inside = (jnp.arange(num_blocks * batch_size) < len(data)).reshape(num_blocks, -1)

    def visit(carry, block):
        largest, total, weighted = carry
        points, is_inside = block
        logits = jnp.where(is_inside, _logits(points, direction, precision), -jnp.inf)
        new_largest = jnp.maximum(largest, jax.lax.stop_gradient(jnp.max(logits)))
        shrink, weights = jnp.exp(largest - new_largest), jnp.exp(logits - new_largest)
        return (new_largest, shrink * total + jnp.sum(weights), shrink * weighted + weights @ points), None

    dtype = data.dtype
    start = (jnp.asarray(-jnp.inf, dtype), jnp.zeros((), dtype), jnp.zeros(data.shape[1:], dtype))
    (_, total, weighted), _ = jax.lax.scan(visit, start, (blocks, inside))
    return weighted / total


def _logits(points, direction, precision):
    return points @ direction - 0.5 * precision * jnp.sum(points**2, axis=-1)
