"""Preconditioning: a fixed metric on the space of samples, as BlackJAX's adaptation returns it.

An inverse mass matrix M^-1 = L L^T, an estimate of the target's covariance, turns x into y = L^-1 x, in which the
target is closer to round. Kernels move in y without ever forming it: a step u in y is L u in x, and the score in y is
L^T s.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["InverseMassMatrix", "from_whitened", "mass_factor", "score_in_whitened"]

InverseMassMatrix = Float[Array, " d"] | Float[Array, "d d"] | None


def mass_factor(
    inverse_mass_matrix: InverseMassMatrix, name: str = "inverse_mass_matrix"
) -> InverseMassMatrix:
    """L with M^-1 = L L^T: None for the identity, deviations (d,), or a lower triangle (d, d).

    Parameters
    ----------
    inverse_mass_matrix
        None, variances (d,), or a covariance (d, d), over the flattened sample.
    name
        What the caller's argument is called, for messages.

    Raises
    ------
    ValueError
        If it has another shape, or is not positive definite.
    """
    if inverse_mass_matrix is None:
        return None
    matrix = jnp.asarray(inverse_mass_matrix)
    if matrix.ndim == 1:
        factor = jnp.sqrt(matrix)
    elif matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
        factor = jnp.linalg.cholesky(matrix)
    else:
        raise ValueError(f"{name} must be None, of shape (d,) or of shape (d, d), got shape {matrix.shape}.")
    diagonal = factor if factor.ndim == 1 else jnp.diag(factor)
    if not isinstance(diagonal, jax.core.Tracer) and not np.all(
        np.isfinite(diagonal) & (np.asarray(diagonal) > 0)
    ):
        raise ValueError(f"{name} must be positive definite.")
    return factor


def from_whitened(factor: InverseMassMatrix, u: Float[Array, " d"]) -> Float[Array, " d"]:
    """L u: a step in y as one in x."""
    if factor is None:
        return u
    _check_size(factor, u)
    return factor * u if factor.ndim == 1 else factor @ u


def score_in_whitened(factor: InverseMassMatrix, score: Float[Array, " d"]) -> Float[Array, " d"]:
    """L^T s: the score in x as one in y."""
    if factor is None:
        return score
    _check_size(factor, score)
    return factor * score if factor.ndim == 1 else score @ factor


def _check_size(factor, vector):
    if factor.shape[-1] != vector.size:
        raise ValueError(
            f"the inverse mass matrix or covariance must fit the flattened sample of size {vector.size}, got shape "
            f"{factor.shape}."
        )
