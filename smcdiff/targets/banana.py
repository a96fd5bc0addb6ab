"""The banana: a Gaussian in the plane, bent along a parabola.

    x_0 ~ N(0, s^2),     x_1 given x_0 ~ N(b (x_0^2 - s^2), 1),
    log density(x) = -(x_0 / s)^2 / 2 - (x_1 - b (x_0^2 - s^2))^2 / 2,      Z = 2 pi s.

Source: Haario, Saksman and Tamminen, "Adaptive proposal distribution for random walk Metropolis algorithm",
Computational Statistics 14 (1999), with b = 0.03 and s = 10.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.checks import check_positive
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["BananaTarget", "banana"]


class BananaTarget(Target):
    """The banana; build it with `banana`."""

    curvature: Float[Array, ""]
    std: Float[Array, ""]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (2,)

    def logdensity(self, x: Float[Array, " 2"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to the constant ``log_evidence``."""
        return -0.5 * (x[0] / self.std) ** 2 - 0.5 * (x[1] - self._bend(x[0])) ** 2

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n 2"]:
        """Draw ``num_samples`` independent samples."""
        normal = jax.random.normal(rng_key, (2, num_samples), self.std.dtype)
        first = self.std * normal[0]
        return jnp.stack([first, self._bend(first) + normal[1]], axis=1)

    def _bend(self, first):
        return self.curvature * (first**2 - self.std**2)


def banana(curvature: float = 0.03, std: float = 10.0) -> BananaTarget:
    """The banana.

    Parameters
    ----------
    curvature
        b, of either sign.
    std
        s, deviation of the first coordinate, positive.
    """
    check_positive("std", std)
    stds = np.array([std, math.sqrt(1 + 2 * curvature**2 * std**4)])
    log_evidence = math.log(2 * math.pi * std)
    return BananaTarget(log_evidence, exact_moments(np.zeros(2), stds), parameter(curvature), parameter(std))
