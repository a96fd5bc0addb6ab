"""Map a per-sample function over many samples in bounded memory."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree

__all__ = ["batched_map"]


def batched_map(function: Callable, batch_size: int | None) -> Callable:
    """Vectorise ``function`` over the leading axis of its arguments, ``batch_size`` entries at a time.

    Parameters
    ----------
    function
        Function of one sample (pytree arguments).
    batch_size
        How many samples are processed together, or None for all. It bounds memory and changes no result.

    Raises
    ------
    ValueError
        If ``batch_size`` is not a positive integer or None.
    """
    if batch_size is None:
        return jax.vmap(function)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}.")

    def mapped(*args: PyTree) -> PyTree:
        return jax.lax.map(lambda sample: function(*sample), args, batch_size=batch_size)

    return mapped
