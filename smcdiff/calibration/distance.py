"""Distances of samples to a reference point, for coverage tests of whole samples."""

import jax
import numpy as np
from jaxtyping import Float, PyTree

__all__ = ["euclidean_distance"]


def euclidean_distance(samples: PyTree, reference: PyTree, num_samples: int) -> Float[np.ndarray, " n"]:
    """Euclidean distance of samples to one point, over all entries of a pytree.

    Parameters
    ----------
    samples
        Pytree with a leading axis ``num_samples``, or, for one sample, without.
    reference
        A point, a pytree like one sample.
    num_samples
        Number of samples.

    Raises
    ------
    ValueError
        If the shapes of samples and reference differ.
    """
    structure, given = str(jax.tree.structure(samples)), str(jax.tree.structure(reference))
    if structure != given:
        raise ValueError(f"references must be like a truth, {structure}, got {given}.")
    total = np.zeros(num_samples)
    for leaf, point in zip(jax.tree.leaves(samples), jax.tree.leaves(reference), strict=True):
        flat, centre = (
            np.asarray(leaf, float).reshape(num_samples, -1),
            np.asarray(point, float).reshape(1, -1),
        )
        if flat.shape[1] != centre.shape[1]:
            raise ValueError(
                f"references must be like a truth with {flat.shape[1]} entries, got {centre.shape[1]}."
            )
        total += np.sum((flat - centre) ** 2, axis=1)
    return np.sqrt(total)
