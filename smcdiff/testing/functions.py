"""Functions of a sample by which laws are compared, where the user has none of his own.

With z the sample in units of its spread (centre: the median, scale: half the distance from quantile 16 % to 84 %):

    tanh z_i, tanh^2 z_i, tanh z_i tanh z_j, 1{z_i > .3}      location, scale, correlation and skewness of coordinates
    tanh(sum_i z_i / sqrt(d)), log(1 + |z|^2)                 the whole sample
    1{the k-th centre is the nearest}                         weights of modes

They are bounded, or nearly so, hence their means are normal also where the sample has heavy tails.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from smcdiff.calibration.columns import column_names, column_shapes

__all__ = ["BoundedFunctions", "bounded_functions"]

_COORDINATES = 6  # of long samples, evenly spread


class BoundedFunctions(eqx.Module):
    """Bounded functions of one sample: ``functions(x)`` is a dictionary of arrays. See `bounded_functions`."""

    centre: Float[Array, " d"]
    scale: Float[Array, " d"]
    chosen: Int[Array, " m"]
    modes: Float[Array, "K d"] | None

    def __call__(self, x: PyTree) -> dict[str, Array]:
        """Values at one sample."""
        flat = ravel_pytree(x)[0].astype(self.centre.dtype)
        z = (flat - self.centre) / self.scale
        bounded = jnp.tanh(z[self.chosen])
        values = {
            "tanh": bounded,
            "tanh^2": bounded**2,
            "tanh tanh of neighbours": bounded[1:] * bounded[:-1],
            "above": (z[self.chosen] > 0.3).astype(z.dtype),
            "tanh of the sum": jnp.tanh(jnp.sum(z) / np.sqrt(z.size)),
            "log(1 + |z|^2)": jnp.log1p(jnp.sum(z**2)),
        }
        if self.modes is not None:
            nearest = jnp.argmin(jnp.sum((self.modes - flat[None]) ** 2, axis=1))
            values["weight of mode"] = (nearest == jnp.arange(len(self.modes))).astype(z.dtype)
        return values


def bounded_functions(draws: PyTree, modes: PyTree = None) -> BoundedFunctions:
    """Functions whose means tell laws apart, in the units of some draws.

    Parameters
    ----------
    draws
        Draws that set centre and scale, a pytree with a leading axis.
    modes
        Centres of modes, a pytree like one draw with the leading axis (K,): adds the share of samples nearest to each.

    Returns
    -------
    A function of one sample, for `smcdiff.testing.check_invariance` and others.
    """
    flat = np.asarray(jax.vmap(lambda x: ravel_pytree(x)[0])(draws), float)
    low, centre, high = np.quantile(flat, [0.16, 0.5, 0.84], axis=0)
    scale = np.where(high > low, 0.5 * (high - low), 1.0)
    d = flat.shape[1]
    chosen = np.unique(np.linspace(0, d - 1, min(d, _COORDINATES)).round().astype(np.int32))
    dtype = jnp.result_type(float)
    centres = None if modes is None else jax.vmap(lambda x: ravel_pytree(x)[0])(modes).astype(dtype)
    return BoundedFunctions(
        jnp.asarray(centre, dtype), jnp.asarray(scale, dtype), jnp.asarray(chosen), centres
    )


def names_of(functions: Any, draws: PyTree) -> tuple[str, ...]:
    """Names of the scalars that ``functions`` returns for one of the draws."""
    one = jax.eval_shape(functions, jax.tree.map(lambda leaf: leaf[0], draws))
    return column_names(column_shapes(one))
