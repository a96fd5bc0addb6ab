"""A NumPyro model and its arguments, as a pytree: the arrays are leaves, everything else is the structure."""

from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["ModelCall", "model_call"]


class ModelCall(eqx.Module):
    """A NumPyro model and its arguments; build it with `model_call`.

    Attributes
    ----------
    arguments
        The arrays among the arguments, which are leaves.
    constants
        Type and value of everything else, the model's function among it; None stands for an array.
    layout
        How they make up (model, args, kwargs).
    """

    arguments: tuple[Array, ...]
    constants: tuple[tuple[type, Any] | None, ...] = eqx.field(static=True)
    layout: Any = eqx.field(static=True)

    def unpack(self) -> tuple[Callable, tuple, dict[str, Any]]:
        """Model, args and kwargs, as NumPyro's functions take them."""
        arrays = iter(self.arguments)
        leaves = [next(arrays) if constant is None else constant[1] for constant in self.constants]
        return jax.tree_util.tree_unflatten(self.layout, leaves)


def model_call(model: Callable, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
    """A model and its arguments.

    Parameters
    ----------
    model
        The model.
    args, kwargs
        Its arguments: pytrees of arrays and of hashable values.

    Raises
    ------
    TypeError
        If an argument is neither array nor hashable.
    """
    leaves, layout = jax.tree_util.tree_flatten((model, args, kwargs))
    arguments = tuple(jnp.asarray(leaf) for leaf in leaves if _is_array(leaf))
    constants = tuple(None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    unhashable = [leaf for leaf in leaves if not _is_array(leaf) and not isinstance(leaf, Hashable)]
    if unhashable:
        raise TypeError(
            "the arguments of a model must be pytrees of arrays and of hashable values such as numbers, strings and "
            f"functions, got a {type(unhashable[0]).__name__}."
        )
    return ModelCall(arguments, constants, layout)


def _is_array(leaf):
    return isinstance(leaf, jax.Array) or (
        isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc"
    )
