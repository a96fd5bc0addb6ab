"""Operators that observe some entries of a sample and not others.

(A x)_k = x[i_k], i_1 < i_2 < ... the observed entries in row-major order; A* y fills in zeros
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from smcdiff.inverse.operators import LinearOperator, checked_shape

__all__ = ["crop_box", "mask", "random_mask"]


class _Mask(LinearOperator):
    indices: Int[Array, " observed"]  # into the flattened sample, increasing

    def _apply(self, x):
        return x.reshape(-1)[self.indices]

    def _adjoint(self, y):
        filled = jnp.zeros(math.prod(self.input_shape), y.dtype).at[self.indices].set(y)
        return filled.reshape(self.input_shape)


def mask(observed: Bool[Array, "*event"] | Bool[np.ndarray, "*event"]) -> LinearOperator:
    """Observe some entries of the sample: inpainting.

    Parameters
    ----------
    observed
        Boolean array of the event shape, True where the entry is measured.

    Returns
    -------
    Operator whose measurement is the vector (num_observed,) of the observed entries, in row-major order.

    Raises
    ------
    ValueError
        If ``observed`` is not boolean, has no True, or is traced (the number of observed entries is a shape).
    """
    if isinstance(observed, jax.core.Tracer):
        raise ValueError(
            "observed is traced, but its number of True must be known; build the mask outside jit."
        )
    where = np.asarray(observed)
    if where.dtype != bool:
        raise ValueError(f"observed must be boolean, got dtype {where.dtype}; compare, e.g. `values > 0`.")
    if not where.any():
        raise ValueError(f"observed, of shape {where.shape}, has no True entry and needs at least one.")
    indices = np.flatnonzero(where).astype(np.int32)
    return _Mask(where.shape, indices.shape, jnp.asarray(indices))


def crop_box(event_shape: Sequence[int], top: int, left: int, height: int, width: int) -> LinearOperator:
    """Hide a box of the last two axes, in every channel, and observe everything outside: a `mask`.

    Parameters
    ----------
    event_shape
        Shape of one sample, (..., rows, columns).
    top, left
        Row and column, in pixels, of the first hidden pixel.
    height, width
        Size of the box in pixels.

    Raises
    ------
    ValueError
        If the box is empty, leaves the image, or hides all of it.
    """
    shape = checked_shape(event_shape, 2)
    for start_name, start, size_name, size, length in (
        ("top", top, "height", height, shape[-2]),
        ("left", left, "width", width, shape[-1]),
    ):
        if start < 0 or size < 1 or start + size > length:
            raise ValueError(
                f"{start_name}={start} and {size_name}={size} must give a box inside the image: "
                f"{start_name} >= 0, {size_name} >= 1, and their sum at most {length}, the size of this axis."
            )
    if (height, width) == shape[-2:]:
        raise ValueError(f"height={height} and width={width} hide the whole image; make the box smaller.")
    observed = np.ones(shape, bool)
    observed[..., top : top + height, left : left + width] = False
    return mask(observed)


def random_mask(rng_key: PRNGKeyArray, event_shape: Sequence[int], num_observed: int) -> LinearOperator:
    """Observe ``num_observed`` entries drawn uniformly without replacement: a `mask`.

    Parameters
    ----------
    rng_key
        Random key; it may be traced, so masks can be drawn inside compiled code.
    event_shape
        Shape of one sample; each entry of it (a channel of a pixel, too) is drawn by itself.
    num_observed
        Number of observed entries.

    Raises
    ------
    ValueError
        If ``num_observed`` is not between 1 and the number of entries.
    """
    shape = checked_shape(event_shape, 0)
    if not 1 <= num_observed <= math.prod(shape):
        raise ValueError(f"num_observed must lie between 1 and {math.prod(shape)}, got {num_observed}.")
    indices = jax.random.permutation(rng_key, jnp.arange(math.prod(shape), dtype=jnp.int32))[:num_observed]
    return _Mask(shape, indices.shape, jnp.sort(indices))
