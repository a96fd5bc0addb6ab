"""The exact diffusion model of data that are uniform on boxes.

If x_0 is uniform on the box prod_j [a_j, b_j], the marginals of the forward process are products over coordinates,

    p_t(x) = prod_j [Phi((alpha b_j - x_j)/sigma) - Phi((alpha a_j - x_j)/sigma)] / (alpha (b_j - a_j)),

and those of a mixture of boxes the mixture of these. At t = 0 the density is constant on the boxes and zero outside.

Source: closed form; as a factor of compositions in Du et al., "Reduce, Reuse, Recycle", arXiv 2302.11552.
"""

from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.compose.operators import Composable
from smcdiff.schedules import Schedule

__all__ = ["BoxMixture", "BoxMixtureDiffusion"]


class BoxMixture(eqx.Module):
    """The law of alpha x_0 + sigma eps for x_0 uniform on boxes; build it by `BoxMixtureDiffusion.at`.

    ``log_weights`` has shape (K,), ``low`` and ``high`` have shape (K, d).
    """

    log_weights: Float[Array, " K"]
    low: Float[Array, "K d"]
    high: Float[Array, "K d"]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Normalised log density at one sample ``x``; minus infinity outside of the boxes if sigma is 0."""
        low, high = self.alpha * self.low - x[None], self.alpha * self.high - x[None]
        sigma = jnp.where(self.sigma > 0, self.sigma, 1.0)
        noisy = _log_normal_mass(low / sigma, high / sigma)
        exact = jnp.where((low <= 0) & (high >= 0), 0.0, -jnp.inf)
        log_mass = jnp.where(self.sigma > 0, noisy, exact) - jnp.log(self.alpha * (self.high - self.low))
        return jax.nn.logsumexp(self.log_weights + jnp.sum(log_mass, axis=-1))

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """Gradient of the log density at one sample ``x``; zero, where it has no meaning, at sigma = 0."""
        return jnp.nan_to_num(jax.grad(self.logdensity)(x))

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n d"]:
        """Draw ``num_samples`` independent samples."""
        key_box, key_place, key_noise = jax.random.split(rng_key, 3)
        chosen = jax.random.categorical(key_box, self.log_weights, shape=(num_samples,))
        low, high = self.low[chosen], self.high[chosen]
        place = low + (high - low) * jax.random.uniform(key_place, low.shape, low.dtype)
        return self.alpha * place + self.sigma * jax.random.normal(key_noise, low.shape, low.dtype)


class BoxMixtureDiffusion(Composable, eqx.Module):
    """The exact diffusion model of data that are uniform on boxes.

    Parameters
    ----------
    log_weights
        Shape (K,).
    low, high
        Corners of the boxes, shape (K, d).
    schedule
        The forward process.
    """

    log_weights: Float[Array, " K"]
    low: Float[Array, "K d"]
    high: Float[Array, "K d"]
    schedule: Schedule

    @classmethod
    def create(cls, weights, low, high, schedule: Schedule, *, dtype=None) -> Self:
        """Build the model from weights (K,), normalised here, and corners (K, d).

        Raises
        ------
        ValueError
            If shapes do not fit, a weight is not positive, or a box has no volume.
        """
        weights, low, high = (np.asarray(value, float) for value in (weights, low, high))
        if weights.ndim != 1 or low.shape != high.shape or low.ndim != 2 or len(low) != len(weights):
            raise ValueError(
                "weights must have shape (K,), beside low and high of shape (K, d); got "
                f"{weights.shape}, {low.shape} and {high.shape}."
            )
        if not (np.all(weights > 0) and np.all(high > low)):
            raise ValueError("weights must be positive, and high above low in every coordinate.")
        dtype = dtype or jnp.result_type(float)
        log_weights = jnp.asarray(np.log(weights / weights.sum()), dtype)
        return cls(log_weights, jnp.asarray(low, dtype), jnp.asarray(high, dtype), schedule)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.low.shape[1:]

    def at(self, t: Float[Array, ""]) -> BoxMixture:
        """The marginal p_t, with score, log density and exact sampler."""
        return BoxMixture(
            self.log_weights, self.low, self.high, self.schedule.alpha(t), self.schedule.sigma(t)
        )

    def score(self, x: Float[Array, " d"], t: Float[Array, ""]) -> Float[Array, " d"]:
        """grad log p_t(x) at one sample ``x``."""
        return self.at(t).score(x)

    def denoise(self, x: Float[Array, " d"], t: Float[Array, ""]) -> Float[Array, " d"]:
        """E[x_0 | x_t = x] at one sample ``x``."""
        return (x + self.schedule.sigma(t) ** 2 * self.score(x, t)) / self.schedule.alpha(t)


def _log_normal_mass(low, high):
    """log(Phi(high) - Phi(low)) for low < high, accurate in both tails."""
    # By symmetry both ends into the left tail, where Phi is small and not near one.
    is_right = low > 0
    low, high = jnp.where(is_right, -high, low), jnp.where(is_right, -low, high)
    upper, lower = jax.scipy.special.log_ndtr(high), jax.scipy.special.log_ndtr(low)
    return upper + jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-30)))
