"""Differences of log densities from scores alone.

    log p(x') - log p(x) = integral over u from 0 to 1 of <s(x + u (x' - x)), x' - x>,

by Gauss-Legendre quadrature, whose error falls exponentially with the number of nodes along a smooth line. It is the
difference of the log density only if the score is a gradient, which that of a network need not be: then the integral
depends on the way, and differs between ways by as much as the score fails to be one.

Source: Sjoberg, Lindqvist and Schon, "MCMC-Correction of Score-Based Diffusion Models for Model Composition",
arXiv 2307.14012.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

__all__ = ["line_integral"]


def line_integral(
    score: Callable[[PyTree], PyTree], x_from: PyTree, x_to: PyTree, num_nodes: int = 4
) -> Float[Array, ""]:
    """log p(x_to) - log p(x_from) by integrating the score along the straight line.

    Parameters
    ----------
    score
        Score of one sample.
    x_from, x_to
        Two samples, arrays or pytrees.
    num_nodes
        Gauss-Legendre nodes, evaluations of the score; exact for scores that are polynomials of degree
        2 num_nodes - 1 along the line.

    Source: "MCMC-Correction of Score-Based Diffusion Models for Model Composition", arXiv 2307.14012.
    """
    start, unravel = ravel_pytree(x_from)
    change = ravel_pytree(x_to)[0] - start
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)

    def slope(u):
        return ravel_pytree(score(unravel(start + u * change)))[0] @ change

    slopes = jax.vmap(slope)(jnp.asarray(0.5 + 0.5 * nodes, start.dtype))
    return jnp.asarray(0.5 * weights, start.dtype) @ slopes
