"""Scalar functions of samples as the columns of a matrix, with their names.

A function of a sample returns a pytree of arrays. Each of their entries is a scalar function, and has a column:
``gain`` for a number, ``x[3, 4]`` for an entry of an array.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, PyTree

from smcdiff.checkpoints.arrays import flatten_by_name

__all__ = ["as_columns", "column_names", "column_shapes", "evaluate"]


def column_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Shape of every array that a function returned for one sample, by name; a bare array is called ``x``."""
    named = {"x": tree} if jax.tree_util.all_leaves([tree]) else flatten_by_name(tree)
    return {name: tuple(np.shape(leaf)) for name, leaf in named.items()}


def column_names(shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names of the scalar entries, in the order of the columns."""
    return tuple(
        f"{name}[{', '.join(map(str, index))}]" if shape else name
        for name, shape in shapes.items()
        for index in np.ndindex(shape)
    )


def as_columns(tree: PyTree, num_samples: int) -> Float[np.ndarray, "n F"]:
    """A matrix with a row for each sample, from arrays with the leading axis ``num_samples``."""
    leaves = [np.asarray(leaf, float).reshape(num_samples, -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)


@eqx.filter_jit
def evaluate(function: Callable, samples: PyTree, *args: Any) -> PyTree:
    """``function(sample, *args)`` for all samples of a leading axis, as one program."""
    return jax.vmap(lambda sample: function(sample, *args))(samples)
