"""Whether a weighted product of Gaussian mixtures has a finite integral.

Far out in the direction u a mixture falls off as exp(-r^2 min_k (u . C_k^-1 u) / 2), so that the product with
exponents w_i does as exp(-r^2 q(u) / 2),

    q(u) = sum_i w_i min_k u . C_ik^-1 u,

and its integral is finite if and only if q is positive in all directions. For mixtures of shared covariance q is one
quadratic form, and its smallest eigenvalue settles the question.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from smcdiff.mixture import GaussianMixture

__all__ = ["least_tail"]

_MAX_COMBINATIONS = 64


def least_tail(densities: Sequence[Any], exponents: np.ndarray) -> float:
    """Smallest q(u) over the directions looked at; infinity if a density is no Gaussian mixture.

    Exact if every mixture has a shared covariance. Otherwise directions are the eigenvectors of sum_i w_i C_ik^-1
    for up to 64 combinations of components, and a value that is not positive is proof of divergence, while a positive
    one proves nothing.

    Parameters
    ----------
    densities
        Densities at t = 0.
    exponents
        Shape (len(densities),).
    """
    if not all(isinstance(density, GaussianMixture) for density in densities):
        return np.inf
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(densities)):
        return np.inf
    if all(density.eigenvectors is None for density in densities):
        widest = [np.asarray(density.eigenvalues, float).max(axis=0) for density in densities]
        return float(sum(w / variance for w, variance in zip(exponents, widest, strict=True)).min())
    precisions = [np.linalg.inv(np.asarray(density.component_covariances(), float)) for density in densities]
    least = np.inf
    for chosen in itertools.islice(itertools.product(*precisions), _MAX_COMBINATIONS):
        form = sum(w * precision for w, precision in zip(exponents, chosen, strict=True))
        _, directions = np.linalg.eigh(form)
        tails = [np.einsum("ij,kil,lj->kj", directions, each, directions).min(axis=0) for each in precisions]
        least = min(least, float((exponents @ np.stack(tails)).min()))
    return least
