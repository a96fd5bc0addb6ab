"""Resampling for kernel tests: quadratic forms of many weight vectors, and random signs along a chain.

A degenerate statistic T = sum_ij v_i v_j k(x_i, x_j) has, under the hypothesis, the law of the same form with v_i
multiplied by independent signs e_i (wild bootstrap). For a chain the signs are a Markov chain themselves, which flips
with probability a = (1 - exp(-1/l))/2, so that E e_s e_t = exp(-|s - t|/l).

Source: Chwialkowski, Strathmann and Gretton, "A Kernel Test of Goodness of Fit", arXiv 1602.02964.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from smcdiff.batching import batched_map
from smcdiff.metrics.distance import dot

__all__ = ["multipliers", "p_value", "quadratic_forms"]


def multipliers(rng_key: PRNGKeyArray, shape: tuple[int, int], length: Float[Array, ""], dtype):
    """Random signs of the given shape, correlated along the first axis over ``length``, independent if it is 0."""
    flip = jnp.where(length > 0, -0.5 * jnp.expm1(-1 / jnp.where(length > 0, length, 1.0)), 0.5)
    flips = jax.random.bernoulli(rng_key, flip, shape)
    start = jax.random.bernoulli(jax.random.fold_in(rng_key, 1), 0.5, (1, shape[1]))
    parity = (jnp.cumsum(flips, axis=0, dtype=jnp.int32) + start.astype(jnp.int32)) % 2
    return (1 - 2 * parity).astype(dtype)


def quadratic_forms(
    points: PyTree, columns: Float[Array, "N R"], row: Callable, batch_size: int | None
) -> Float[Array, " R"]:
    """v^T K v for each column v, with K_i = row(points_i) of shape (N,).

    Parameters
    ----------
    points
        Arguments of ``row`` with the leading axis N.
    columns
        The vectors.
    row
        A row of the matrix.
    batch_size
        Rows in memory together, or None for all.
    """

    def part(point, entries):
        return entries * dot(row(point), columns)

    return jnp.sum(batched_map(part, batch_size)(points, columns), axis=0)


def p_value(statistic: Float[Array, ""], resampled: Float[Array, " R"]) -> Float[Array, ""]:
    """Share of resampled statistics at least as large, the statistic itself among them."""
    return (1 + jnp.sum(resampled >= statistic)) / (1 + len(resampled))
