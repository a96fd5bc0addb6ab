"""Pytrees of arrays as xarray datasets, and datasets as the container of the ArviZ that is installed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import arviz
import jax
import numpy as np
import xarray
from jaxtyping import PyTree

from smcdiff.batching import batched_map
from smcdiff.smc.conditional import Trajectory

__all__ = [
    "Parts",
    "container",
    "dataset",
    "evaluate",
    "groups_of",
    "named_arrays",
    "read_group",
    "split_sample",
    "structure",
]

# Fields of the library's own (and BlackJAX's) records that are the sample itself; what else a record holds is
# about it. Records of the user are samples as a whole.
_SAMPLE_FIELDS = ("position", "x")
_KEPT_WITH_SAMPLE = ("particle",)
_PACKAGES = ("smcdiff.", "blackjax.")


class Parts(NamedTuple):
    """A sample, and the numbers that came with it.

    Attributes
    ----------
    sample
        Pytree with the leading axes of the whole.
    statistics
        Arrays by name, of the leading axes and at most one more.
    """

    sample: PyTree
    statistics: dict[str, np.ndarray]


def split_sample(tree: PyTree) -> Parts:
    """Take the sample out of a kernel's state or a sampler's particle, whose leaves have two leading axes.

    Of a `smcdiff.smc.Trajectory` the last particle is the sample. Whatever is no record of smcdiff or BlackJAX is a
    sample as it is.
    """
    if isinstance(tree, Trajectory):
        return split_sample(jax.tree.map(lambda leaf: leaf[:, :, -1], tree.particles))
    fields = getattr(tree, "_fields", ())
    chosen = next((field for field in _SAMPLE_FIELDS if field in fields), None)
    if chosen is None or not type(tree).__module__.startswith(_PACKAGES):
        return Parts(tree, {})
    rest = {field: getattr(tree, field) for field in fields if field != chosen}
    kept = {field: rest.pop(field) for field in _KEPT_WITH_SAMPLE if field in rest}
    inner = split_sample(getattr(tree, chosen))
    sample = {"position": inner.sample, **kept} if kept else inner.sample
    scalars = {key: value for key, value in named_arrays(rest).items() if value.ndim == 2}
    return Parts(sample, {**scalars, **inner.statistics})


def named_arrays(tree: PyTree, name: str = "x") -> dict[str, np.ndarray]:
    """Leaves by path, "a.b"; ``name`` for a bare array. Random keys are left out."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or name: np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not (isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key))
    }


def structure(tree: PyTree) -> str:
    """ "array" for a bare array, "named" for a pytree, whose leaves go by their paths."""
    return "array" if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) else "named"


def evaluate(function: Callable, draws: PyTree, *more: PyTree, batch_size: int | None = 64) -> PyTree:
    """``function`` of every draw, leaves (chain, draw, ...) to leaves (chain, draw, ...), some at a time."""
    leading = np.shape(jax.tree.leaves(draws)[0])[:2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (draws, *more))
    values = jax.jit(batched_map(function, batch_size))(*flat)
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(*leading, *leaf.shape[1:]), values)


def dataset(
    arrays: Mapping[str, Any],
    leading: Sequence[str],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
) -> xarray.Dataset:
    """Dataset of arrays whose first axes are ``leading`` and whose others ``dims`` may name.

    Raises
    ------
    ValueError
        If ``dims`` names another number of axes than a variable has, or an array lacks the leading ones.
    """
    variables = {}
    for key, value in arrays.items():
        value = np.asarray(value)
        if value.ndim < len(leading):
            raise ValueError(
                f"{key} must have the leading axes {tuple(leading)}, got the shape {value.shape}."
            )
        event = list(dims.get(key, [f"{key}_dim_{i}" for i in range(value.ndim - len(leading))]))
        if len(event) + len(leading) != value.ndim:
            raise ValueError(f"dims[{key!r}] must name {value.ndim - len(leading)} axes, got {event}.")
        variables[key] = ([*leading, *event], value)
    made = xarray.Dataset(variables)
    known = {axis: values for axis, values in coords.items() if axis in made.dims}
    known.update({str(axis): np.arange(size) for axis, size in made.sizes.items() if axis not in known})
    return made.assign_coords(known)


def container(groups: Mapping[str, xarray.Dataset], attrs: Mapping[str, Any]):
    """`xarray.DataTree` with ArviZ 1 or newer, `arviz.InferenceData` with older ones."""
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(attrs=dict(attrs), **groups)  # type: ignore[arg-type]
    tree = xarray.DataTree.from_dict(dict(groups))
    tree.attrs.update(attrs)
    return tree


def groups_of(data: Any) -> dict[str, xarray.Dataset]:
    """The groups of a container of either line."""
    names = data.groups() if callable(data.groups) else [path.strip("/") for path in data.groups]
    found = {str(name): read_group(data, name) for name in names if name}
    return {name: group for name, group in found.items() if group is not None}


def read_group(data: Any, name: str) -> xarray.Dataset | None:
    """A group of a container of either line, None where it has none of that name."""
    if name not in (data.children if isinstance(data, xarray.DataTree) else data.groups()):
        return None
    group = data[name]
    return group.to_dataset() if isinstance(group, xarray.DataTree) else group
