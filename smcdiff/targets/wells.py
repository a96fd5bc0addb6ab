"""Double wells in some coordinates and Gaussians in the others: 2^m modes whose number grows with the dimension.

    log density(x) = sum_{i <= m} [-(x_i^2 - delta)^2 + a x_i + c] - sum_{i > m} x_i^2 / 2.

The coordinates are independent, hence everything is known from one integral on the line, which the trapezoidal rule
gives to machine precision. Wells come first in a sample. Mode k of a sample is the number whose binary digit i is 1
where well i is on the right, x_i > 0.

Sources: Wu, Köhler and Noé, "Stochastic Normalizing Flows", arXiv 2002.06707, and Midgley et al., "Flow Annealed
Importance Sampling Bootstrap", arXiv 2208.01893 (`many_well`); Berner, Richter and Ullrich, "An optimal control
perspective on diffusion-based generative modeling", arXiv 2211.01364 (`double_well`).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcdiff.checks import check_count, check_positive
from smcdiff.targets.inverse_cdf import InverseCdf
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["WellsTarget", "double_well", "many_well"]

_NODES = 8193
_LARGEST = 20  # wells whose modes are counted: a million weights


class WellsTarget(Target):
    """Double wells and Gaussians; build them with `double_well` or `many_well`."""

    separation: Float[Array, ""]
    tilt: Float[Array, ""]
    offset: Float[Array, ""]
    quantiles: InverseCdf
    mode_weights: Float[np.ndarray, " K"]
    num_wells: int = eqx.field(static=True)
    dimension: int = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.dimension,)

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to the constant ``log_evidence``."""
        wells, rest = x[: self.num_wells], x[self.num_wells :]
        terms = -((wells**2 - self.separation) ** 2) + self.tilt * wells + self.offset
        return jnp.sum(terms) - 0.5 * jnp.sum(rest**2)

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n d"]:
        """Draw ``num_samples`` independent samples."""
        key_wells, key_rest = jax.random.split(rng_key)
        wells = self.quantiles.sample(key_wells, (num_samples, self.num_wells))
        rest = jax.random.normal(key_rest, (num_samples, self.dimension - self.num_wells), wells.dtype)
        return jnp.concatenate([wells, rest], axis=1)

    def mode_labels(self, x: Float[Array, " d"]) -> Int[Array, ""]:
        """The mode of one sample ``x``, from 0 to 2^m - 1."""
        right = (x[: self.num_wells] > 0).astype(jnp.int32)
        return jnp.sum(right << jnp.arange(self.num_wells, dtype=jnp.int32), dtype=jnp.int32)


def double_well(dimension: int = 5, num_wells: int = 5, separation: float = 4.0) -> WellsTarget:
    """Symmetric double wells -(x^2 - delta)^2, and standard Gaussians in the other coordinates.

    Parameters
    ----------
    dimension
        d.
    num_wells
        m, at most d, and at most 20.
    separation
        delta, positive: minima lie at -sqrt(delta) and sqrt(delta), with a barrier of delta^2.

    Source: arXiv 2211.01364, with (d, m, delta) = (5, 5, 4) and (50, 5, 2).
    """
    return _wells(dimension, num_wells, separation, 0.0, 0.0)


def many_well(dimension: int = 32) -> WellsTarget:
    """Skewed double wells -x^4 + 6 x^2 + x/2 in one half of the coordinates, standard Gaussians in the other.

    A well has its right side with probability 0.844. Elsewhere wells and Gaussians alternate; here the wells come
    first.

    Parameters
    ----------
    dimension
        d, even, at most 40.

    Source: arXiv 2208.01893, with 32 dimensions.
    """
    check_count("dimension", dimension)
    if dimension % 2:
        raise ValueError(f"dimension of many_well must be even, got {dimension}.")
    return _wells(dimension, dimension // 2, 3.0, 0.5, 9.0)


def _wells(dimension, num_wells, separation, tilt, offset):
    check_count("dimension", dimension)
    check_count("num_wells", num_wells)
    check_positive("separation", separation)
    if num_wells > min(dimension, _LARGEST):
        raise ValueError(
            f"num_wells must be at most the dimension and at most {_LARGEST}, got {num_wells} in dimension {dimension}."
        )
    reach = math.sqrt(separation + 8.0)  # where a well has fallen by 64
    nodes = np.linspace(-reach, reach, _NODES)
    log_values = -((nodes**2 - separation) ** 2) + tilt * nodes + offset
    log_values_max = log_values.max()
    values = np.exp(log_values - log_values_max)
    values *= nodes[1] - nodes[0]
    total = values.sum()
    first, second = nodes @ values / total, nodes**2 @ values / total
    right = (values[nodes > 0].sum() + 0.5 * values[_NODES // 2]) / total
    weights = np.ones(1)
    for _ in range(num_wells):
        weights = np.concatenate([(1 - right) * weights, right * weights])
    num_gaussians = dimension - num_wells
    log_evidence = num_wells * (log_values_max + math.log(total)) + 0.5 * num_gaussians * math.log(
        2 * math.pi
    )
    mean = np.repeat([first, 0.0], [num_wells, num_gaussians])
    std = np.repeat([math.sqrt(second - first**2), 1.0], [num_wells, num_gaussians])
    return WellsTarget(
        float(log_evidence),
        exact_moments(mean, std),
        parameter(separation),
        parameter(tilt),
        parameter(offset),
        InverseCdf.create(nodes, log_values),
        weights,
        num_wells,
        dimension,
    )
