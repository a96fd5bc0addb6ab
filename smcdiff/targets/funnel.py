"""Neal's funnel: a scale that changes by orders of magnitude from the mouth to the neck.

    x_0 ~ N(0, v),      x_i given x_0 ~ N(0, e^{x_0}),   i = 1, ..., d - 1,
    log density(x) = -(x_0^2 / v + sum_i x_i^2 e^{-x_0} + (d - 1) x_0) / 2,     Z = (2 pi)^{d/2} v^{1/2}.

The deviation of x_i is e^{v/4}, 9.5 for v = 9, but samples do not show it: its square has a coefficient of variation of
sqrt(3 e^v - 1), 156. Compare x_0, or quantiles.

Source: Neal, "Slice sampling", Annals of Statistics 31 (2003), Section 8. Variance 9 in ten dimensions is Neal's; 3 is
in use as well (arXiv 2402.10758).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.checks import check_count, check_positive
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["FunnelTarget", "funnel"]


class FunnelTarget(Target):
    """Neal's funnel; build it with `funnel`."""

    variance: Float[Array, ""]
    dimension: int = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.dimension,)

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to the constant ``log_evidence``."""
        squares = x[0] ** 2 / self.variance + jnp.sum(x[1:] ** 2) * jnp.exp(-x[0])
        return -0.5 * (squares + (self.dimension - 1) * x[0])

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n d"]:
        """Draw ``num_samples`` independent samples."""
        normal = jax.random.normal(rng_key, (num_samples, self.dimension), self.variance.dtype)
        first = jnp.sqrt(self.variance) * normal[:, :1]
        return jnp.concatenate([first, jnp.exp(0.5 * first) * normal[:, 1:]], axis=1)


def funnel(dimension: int = 10, variance: float = 9.0) -> FunnelTarget:
    """Neal's funnel.

    Parameters
    ----------
    dimension
        d, at least 2.
    variance
        v, of the first coordinate, positive.
    """
    check_count("dimension", dimension)
    check_positive("variance", variance)
    if dimension < 2:
        raise ValueError(f"dimension of a funnel must be at least 2, got {dimension}.")
    std = np.full(dimension, math.exp(variance / 4))
    std[0] = math.sqrt(variance)
    log_evidence = 0.5 * dimension * math.log(2 * math.pi) + 0.5 * math.log(variance)
    return FunnelTarget(log_evidence, exact_moments(np.zeros(dimension), std), parameter(variance), dimension)
