"""A run that can be interrupted: its state and what it has kept so far, in a folder.

Every finished chunk has a file of its own, and ``state.safetensors`` says how many of them count. Each file is written
beside its place and moved there, the chunk before the state, so that a process killed at any moment leaves a folder
from which the run goes on.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from smcdiff.checkpoints.arrays import load_arrays, save_arrays

__all__ = ["RunFolder", "fingerprint"]


def fingerprint(*parts: Any) -> str:
    """Digest of ``parts``: structure, names of functions, and shapes, dtypes and contents of arrays and numbers."""
    leaves, structure = jax.tree.flatten(parts)
    digest = hashlib.sha256(_ADDRESS.sub("", str(structure)).encode())
    for leaf in leaves:
        if eqx.is_array_like(leaf):
            array = np.asarray(_without_keys(leaf))
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        else:
            digest.update(_ADDRESS.sub("", repr(leaf)).encode())
    return digest.hexdigest()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # where a function lies in memory differs from process to process


class RunFolder:
    """The checkpoint of one run.

    Parameters
    ----------
    path
        The folder; made when the first chunk is saved.
    identity
        `fingerprint` of everything that decides the run's numbers.
    """

    def __init__(self, path: str | Path, identity: str):
        self.path = Path(path)
        self.identity = identity

    def save(self, chunk: int, state: PyTree, outputs: PyTree) -> None:
        """Add the outputs of chunk number ``chunk``, after which the run is in ``state``."""
        save_arrays(self._chunk_file(chunk), outputs)
        finished = {"chunks": chunk + 1, "identity": self.identity}
        save_arrays(self._state_file, _without_keys(state), finished)

    def load(self, state_like: PyTree, outputs_like: list[PyTree]) -> tuple[PyTree, list[PyTree]] | None:
        """State and outputs so far, or None if the run has not begun.

        Parameters
        ----------
        state_like
            The state at the start of the run.
        outputs_like
            Shapes and dtypes of the outputs of every chunk of the whole run.

        Raises
        ------
        ValueError
            If the folder is that of another run.
        """
        if not self._state_file.exists():
            return None
        plain = jax.eval_shape(_without_keys, state_like)
        state, finished = load_arrays(self._state_file, plain)
        if finished["identity"] != self.identity:
            raise ValueError(
                f"checkpoint: {self.path} belongs to another run (another key, model, measurement, number of steps or "
                "chunk size). Name another folder, or delete this one."
            )
        outputs = [load_arrays(self._chunk_file(k), outputs_like[k])[0] for k in range(finished["chunks"])]
        return _with_keys(state, state_like), outputs

    @property
    def _state_file(self):
        return self.path / "state.safetensors"

    def _chunk_file(self, chunk):
        return self.path / f"chunk-{chunk:05d}.safetensors"


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree):
    """The tree with the data of random keys in place of them."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if hasattr(leaf, "dtype") and _is_key(leaf) else leaf, tree
    )


def _with_keys(tree, like):
    return jax.tree.map(
        lambda leaf, key: (
            jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(key)) if _is_key(key) else leaf
        ),
        tree,
        like,
    )
