"""Cholesky factors and triangular solves of small matrices, in plain JAX.

XLA's calls to LAPACK on the CPU spread a batch over the thread pool they run in and wait for it. Two independent calls
in one program, as vectorised code has them, can occupy all threads and wait for ever (seen with jaxlib 0.10.1 on two
cores). These loops over columns cannot; they are for matrices of some tens of rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.metrics.distance import dot

__all__ = ["cholesky", "solve_lower", "solve_positive"]


def cholesky(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The lower factor L with L L^T = ``matrix``; NaN if that is not positive definite."""
    size = len(matrix)

    def column(j, factor):
        rest = matrix[:, j] - dot(factor, factor[j])
        entries = jnp.where(jnp.arange(size) >= j, rest / jnp.sqrt(rest[j]), 0.0)
        return factor.at[:, j].set(entries)

    return jax.lax.fori_loop(0, size, column, jnp.zeros_like(matrix))


def solve_lower(factor: Float[Array, "d d"], right: Float[Array, "d m"]) -> Float[Array, "d m"]:
    """L^-1 B for a lower triangular L."""

    def row(i, solution):
        known = dot(factor[i], solution)  # rows from i on are still zero
        return solution.at[i].set((right[i] - known) / factor[i, i])

    return jax.lax.fori_loop(0, len(right), row, jnp.zeros_like(right))


def solve_positive(matrix: Float[Array, "d d"], right: Float[Array, "d m"]) -> Float[Array, "d m"]:
    """A^-1 B for a positive definite A."""
    factor = cholesky(matrix)
    half = solve_lower(factor, right)
    # L^T read backwards is lower triangular.
    return solve_lower(factor[::-1, ::-1].T, half[::-1])[::-1]
