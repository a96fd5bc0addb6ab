"""Hit-and-run slice sampling: a slice along a random line through the current point.

A direction v uniform on the unit sphere of whitened coordinates, a level log T = log p(x) - E, E ~ Exp(1), an interval
of offsets t by stepping out, and shrinkage on it: x' = x + t L v. In one dimension it is the plain slice sampler.

`blackjax.slice_sampling` is the same walk, with a choice of intervals and lines. Its level is the logarithm of a
uniform number, which single precision draws as 0 once in 8 million steps. Everything then counts as in the slice,
points without density too, and a chain that has left a bounded support so does not come back. Here the level is finite.

Sources: Neal, "Slice sampling", Annals of Statistics 31 (2003); Bélisle, Romeijn and Smith, "Hit-and-run algorithms for
generating multivariate distributions", Mathematics of Operations Research 18 (1993).
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.checks import check_count, check_positive
from smcdiff.mcmc.metric import InverseMassMatrix, from_whitened, mass_factor
from smcdiff.mcmc.slice_1d import (
    SliceInfo,
    SliceState,
    draw_level,
    draw_numbers,
    init_slice,
    shrink,
    slice_target,
    step_out,
)

__all__ = ["hit_and_run_slice"]


class _Kernel(eqx.Module):
    target: Any
    width: Float[Array, ""] | float
    factor: InverseMassMatrix
    max_expansions: int = eqx.field(static=True)
    max_shrinkage: int = eqx.field(static=True)


def hit_and_run_slice(
    target: Any,
    width: Float[Array, ""] | float,
    *,
    covariance: InverseMassMatrix = None,
    max_expansions: int = 100,
    max_shrinkage: int = 100,
) -> SamplingAlgorithm:
    """Slice sampling along random lines: no gradient, no rejection, one number to tune.

    Parameters
    ----------
    target
        A log density function, or an object with a log density.
    width
        Width of the first interval, positive, in units of the sample (of whitened coordinates, with ``covariance``):
        as wide as the target is along a line.
    covariance
        Of the target, over the flattened sample: None for the identity, variances (d,), or a matrix (d, d).
    max_expansions
        Moves of the ends of the interval, in all. Exact whatever it is.
    max_shrinkage
        Proposals after which the chain stays where it is: `SliceInfo.is_accepted`.

    Returns
    -------
    SamplingAlgorithm, with `SliceState` and `SliceInfo`.

    Raises
    ------
    TypeError
        If the target has no log density.
    ValueError
        If a number is out of range.

    Source: Neal, "Slice sampling", Annals of Statistics 31 (2003).
    """
    check_positive("width", width)
    check_count("max_expansions", max_expansions)
    check_count("max_shrinkage", max_shrinkage)
    target = slice_target(target, "hit_and_run_slice")
    kernel = _Kernel(target, width, mass_factor(covariance, "covariance"), max_expansions, max_shrinkage)
    return SamplingAlgorithm(Partial(init_slice, kernel), Partial(_step, kernel))


def _step(kernel, rng_key, state):
    x, unravel = ravel_pytree(state.position)
    u, noise = draw_numbers(rng_key, 4 + kernel.max_shrinkage, x)
    factor = None if kernel.factor is None else kernel.factor.astype(x.dtype)
    direction = from_whitened(factor, noise / jnp.linalg.norm(noise))

    def line(offset):
        logdensity = kernel.target.logdensity(unravel(x + offset * direction))
        return logdensity, logdensity

    level = draw_level(u[0], state.logdensity)
    bracket = step_out(u[1], u[2], line, level, kernel.width, max_expansions=kernel.max_expansions)
    left, right = bracket.left, bracket.right
    move = shrink(u[4:], line, level, state.logdensity, left, right, left + u[3] * (right - left))
    info = SliceInfo(
        move.is_found.astype(x.dtype),
        move.is_found,
        bracket.is_bracketed,
        bracket.num_evaluations + move.num_evaluations,
        bracket.num_expansions,
        move.num_evaluations,
    )
    return SliceState(unravel(x + move.offset * direction), move.logdensity), info
