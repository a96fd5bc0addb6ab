"""Concentric rings in the plane: modes that are curves.

The radius has the law of density f(r) proportional to sum_k N(r; k, s^2) on r > 0, k = 1..K; the angle is uniform. In
the plane that is the density f(|x|) / (2 pi |x|): the factor 1/|x| belongs to it, or its samples have another radius.

    log density(x) = log sum_k exp(-(|x| - k)^2 / (2 s^2)) - log |x|,
    Z = 2 pi sqrt(2 pi) s sum_k Phi(k/s).

1/|x| is held constant for |x| < 0.01, so that chains may start at the origin; for s = 0.15 that removes a mass of
1e-12.

Source: Grenioux et al., "Stochastic Localization via Iterative Posterior Sampling", arXiv 2402.10758.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy.special import ndtr

from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["RingsTarget", "rings"]

_INNER = 0.01


class RingsTarget(Target):
    """Concentric rings; build them with `rings`."""

    std: Float[Array, ""]
    mode_weights: Float[np.ndarray, " K"]
    num_rings: int = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (2,)

    def logdensity(self, x: Float[Array, " 2"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to the constant ``log_evidence``."""
        square = jnp.sum(x**2)
        radius = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        gaps = (radius - self._radii()) / self.std
        return jax.nn.logsumexp(-0.5 * gaps**2) - jnp.log(jnp.maximum(radius, _INNER))

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n 2"]:
        """Draw ``num_samples`` independent samples."""
        key_ring, key_radius, key_angle = jax.random.split(rng_key, 3)
        log_weights = jax.scipy.special.log_ndtr(self._radii() / self.std)
        centre = self._radii()[jax.random.categorical(key_ring, log_weights, shape=(num_samples,))]
        dtype = self.std.dtype
        gap = jax.random.truncated_normal(key_radius, -centre / self.std, jnp.inf, (num_samples,), dtype)
        radius = centre + self.std * gap
        angle = jax.random.uniform(key_angle, (num_samples,), dtype, 0.0, 2 * math.pi)
        return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)

    def mode_labels(self, x: Float[Array, " 2"]) -> Int[Array, ""]:
        """The ring of nearest radius, from 0 to K - 1 outwards."""
        return jnp.argmin(jnp.abs(jnp.sqrt(jnp.sum(x**2)) - self._radii()))

    def _radii(self):
        return 1.0 + jnp.arange(self.num_rings, dtype=self.std.dtype)


def rings(num_rings: int = 4, std: float = 0.15) -> RingsTarget:
    """Rings of radii 1, 2, ..., equal in weight.

    Parameters
    ----------
    num_rings
        K.
    std
        s, deviation of the radius about each ring, in (0, 0.25): wider rings run into each other and the origin.

    Source: arXiv 2402.10758, with the defaults.
    """
    check_count("num_rings", num_rings)
    check_positive("std", std)
    check_between("std", std, 0.0, 0.25)
    radii = np.arange(1.0, num_rings + 1)
    masses = ndtr(radii / std)
    log_evidence = math.log(2 * math.pi * math.sqrt(2 * math.pi) * std * masses.sum())
    borders = np.concatenate([np.zeros(1), 0.5 * (radii[1:] + radii[:-1]), np.full(1, np.inf)])
    cells = np.diff(ndtr((borders[:, None] - radii) / std), axis=0).sum(axis=1) / masses.sum()
    squares = (
        radii**2 + std**2 + radii * std * np.exp(-0.5 * (radii / std) ** 2) / math.sqrt(2 * math.pi) / masses
    )
    std_x = math.sqrt(0.5 * (masses @ squares) / masses.sum())
    return RingsTarget(log_evidence, exact_moments(np.zeros(2), std_x), parameter(std), cells, num_rings)
