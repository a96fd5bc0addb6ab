"""Number, mean and squares about the mean of samples, in one pass.

Two sets of n and m samples with means a and b, whose squares about their own means sum to A and B, have together

    mean = a + (b - a) m / (n + m),      squares = A + B + (b - a)^2 n m / (n + m).

Unlike sums of squares this loses no digits where the mean is large. With ``squares`` of one axis more than the mean,
they are sums of outer products.

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", The
American Statistician 37 (1983).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Moments", "add_rows", "merge"]


class Moments(NamedTuple):
    """Moments of the samples so far; all zero for none.

    Attributes
    ----------
    size
        Number of samples, of the dtype of the mean.
    mean
        Their mean.
    squares
        Sum of the squares, or of the outer products, of their distances from the mean.
    """

    size: Float[Array, ""]
    mean: Float[Array, "*event"]
    squares: Float[Array, "*event"] | Float[Array, "d d"]


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of both sets of samples together."""
    size = first.size + second.size
    share = second.size / jnp.maximum(size, 1)
    shift = second.mean - first.mean
    is_full = first.squares.ndim > first.mean.ndim
    between = jnp.outer(shift, shift) if is_full else shift**2
    squares = first.squares + second.squares + (first.size * share) * between
    return Moments(size, first.mean + share * shift, squares)


def add_rows(moments: Moments, x: Float[Array, "n d"]) -> Moments:
    """Moments with the rows of ``x`` added."""
    mean = jnp.mean(x, axis=0)
    centred = x - mean[None]
    is_full = moments.squares.ndim > moments.mean.ndim
    squares = centred.T @ centred if is_full else jnp.sum(centred**2, axis=0)
    return merge(moments, Moments(jnp.asarray(x.shape[0], x.dtype), mean, squares))
