"""Trees of arrays in a safetensors file.

A file holds one array per leaf, named by its path in the tree (``down.0.1.conv_in.weight``), and a JSON text of
whatever goes with them.  Reading needs a tree of the same structure, whose leaves give the shapes and dtypes expected:
nothing is unpickled, and a file that does not fit is refused with the names that differ.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

__all__ = ["flatten_by_name", "load_arrays", "save_arrays"]


def _part(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return str(key.idx)
    if isinstance(key, (DictKey, FlattenedIndexKey)):
        return str(key.key)
    return str(key).strip(".[]'\"")


def flatten_by_name(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by the dotted name of their path, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {".".join(_part(key) for key in path) or "value": leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same dotted name: rename a key that holds a dot.")
    return named


def save_arrays(path: str | Path, tree: Any, extra: Any = None) -> None:
    """Write the arrays of a tree, and a JSON-able object, to a safetensors file.

    Parameters
    ----------
    path
        File to write; it is replaced in one move, so an interrupted write leaves the old one whole.
    tree
        Any pytree of arrays.
    extra
        Anything that ``json`` can write, kept in the file's header.
    """
    from safetensors.numpy import save

    path = Path(path)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_by_name(tree).items()}
    # ascontiguousarray turns scalars into (1,), so shapes are put back.
    leaves = jax.tree.leaves(tree)
    arrays = {name: arrays[name].reshape(np.shape(leaf)) for name, leaf in zip(arrays, leaves, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(arrays, metadata={"extra": json.dumps(extra)}))
    os.replace(partial, path)


def load_arrays(path: str | Path, like: Any) -> tuple[Any, Any]:
    """Read a tree of arrays that ``save_arrays`` wrote.

    Parameters
    ----------
    path
        The file.
    like
        A tree of the same structure whose leaves have the shapes and dtypes expected; ``jax.ShapeDtypeStruct``
        will do.

    Returns
    -------
    tree
        The arrays in the structure of ``like``.
    extra
        The object that was stored with them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If names, shapes or dtypes differ from those of ``like``.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    expected = flatten_by_name(like)
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        missing, surplus = sorted(set(expected) - names), sorted(names - set(expected))
        if missing or surplus:
            raise ValueError(
                f"{path.name} holds other arrays than the tree: missing {missing[:5]}, not expected {surplus[:5]}. "
                "Was it written for a network with other hyper-parameters?"
            )
        arrays = {name: file.get_tensor(name) for name in expected}
        extra = json.loads((file.metadata() or {}).get("extra", "null"))
    for name, leaf in expected.items():
        if arrays[name].shape != tuple(leaf.shape) or arrays[name].dtype != leaf.dtype:
            raise ValueError(
                f"{path.name}: array {name} is {arrays[name].dtype}{list(arrays[name].shape)}, "
                f"the tree needs {leaf.dtype}{list(leaf.shape)}."
            )
    return jax.tree.unflatten(
        jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in expected]
    ), extra
