"""Sampling in one dimension by inverting a distribution function on a grid.

The density is interpolated between nodes: with cumulative sums of the trapezoidal rule and linear interpolation of the
distribution function the law has an error of second order in the spacing, which a fine grid makes invisible.
"""

from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.targets.target import parameter

__all__ = ["InverseCdf"]


class InverseCdf(eqx.Module):
    """A law on an interval, known by its distribution function at the nodes of a grid. Build it with `create`."""

    nodes: Float[Array, " n"]
    cdf: Float[Array, " n"]

    @classmethod
    def create(cls, nodes: Float[np.ndarray, " n"], log_values: Float[np.ndarray, " n"]) -> Self:
        """Build the law from log densities, up to a constant, at increasing nodes.

        Parameters
        ----------
        nodes
            Increasing, shape (n,).
        log_values
            Log density at the nodes, shape (n,).
        """
        values = np.exp(log_values - log_values.max())
        cdf = np.concatenate([np.zeros(1), np.cumsum(0.5 * (values[1:] + values[:-1]) * np.diff(nodes))])
        return cls(parameter(nodes), parameter(cdf / cdf[-1]))

    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Draw independent samples of the given shape."""
        dtype = self.nodes.dtype
        # Multiples of the precision, moved by half of it: zero, which would be the end of the grid, does not occur.
        u = jax.random.uniform(rng_key, shape, dtype) + jnp.asarray(0.5 * jnp.finfo(dtype).eps, dtype)
        return jnp.interp(u, self.cdf, self.nodes)
