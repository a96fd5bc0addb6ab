"""The two loops of slice sampling along a curve, stepping out and shrinkage, with caps.

Slice sampling draws a level under the graph of the density at the current point, log T = log p(x) - E with E ~ Exp(1),
and then a point of the slice {log p >= log T}. Along a curve, on which the current point has the offset t = 0:

    stepping out   an interval of width w is laid about 0 at random, and each end moves on by w as long as it lies in
                   the slice; at most m moves, j of them on the left and m - j on the right, j uniform on {0, ..., m}
    shrinkage      t uniform on the bracket; outside the slice, the bracket's end on that side of 0 moves to t

Both leave the uniform law on the slice alone, also when a cap stops them. An interval that stopped at its cap is as
likely from any of its points, because the moves are shared out at random: the chain goes on, by smaller steps.
Shrinkage that has used up its proposals leaves the chain where it is: whatever it rejected on the way to a point it
could have rejected on the way back. Neither shows in the samples, so `SliceInfo` reports both.

The test whether a point lies in the slice is made in the body of a loop and carried to its condition. Made in the
condition it runs twice under `vmap`, and where single precision rounds the two differently the loop never ends.
The test is >=, so that the current point passes where the level and its log density round to the same number.
All random numbers of a step are drawn ahead, by one call of the generator, which costs more than many numbers.

Source: Neal, "Slice sampling", Annals of Statistics 31 (2003), sections 4.1 and 4.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from smcdiff.density import SCORE_KERNELS, HasLogDensity, as_target, require

__all__ = [
    "Bracket",
    "Found",
    "SliceInfo",
    "SliceState",
    "draw_level",
    "draw_numbers",
    "init_slice",
    "shrink",
    "slice_target",
    "step_out",
]

# The height of the curve at an offset, which is compared with the level, and the log density there, which is kept.
Curve = Callable[[Float[Array, ""]], tuple[Float[Array, ""], Float[Array, ""]]]


class SliceState(NamedTuple):
    """State of a slice sampler.

    Attributes
    ----------
    position
        The sample, an array or a pytree.
    logdensity
        Log density of the target there.
    """

    position: PyTree
    logdensity: Float[Array, ""]


class SliceInfo(NamedTuple):
    """What happened in one step of a slice sampler.

    Attributes
    ----------
    acceptance_rate
        1 if ``is_accepted``, else 0.
    is_accepted
        Whether every shrinkage found a point. Where one had used up ``max_shrinkage`` proposals, the coordinate it is
        about stayed as it was.
    is_bracketed
        Whether stepping out ended outside the slice on both sides, rather than by ``max_expansions``.
    num_evaluations
        Evaluations of the target in this step.
    num_expansions
        Moves of the ends in stepping out.
    num_shrinkages
        Proposals of shrinkage, those that were accepted included.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_bracketed: Bool[Array, ""]
    num_evaluations: Int[Array, ""]
    num_expansions: Int[Array, ""]
    num_shrinkages: Int[Array, ""]


class Bracket(NamedTuple):
    """An interval of offsets about 0, and how it was found; see `SliceInfo`."""

    left: Float[Array, ""]
    right: Float[Array, ""]
    is_bracketed: Bool[Array, ""]
    num_evaluations: Int[Array, ""]
    num_expansions: Int[Array, ""]


class Found(NamedTuple):
    """An offset in the slice, 0 if none was found, with the log density there."""

    offset: Float[Array, ""]
    logdensity: Float[Array, ""]
    is_found: Bool[Array, ""]
    num_evaluations: Int[Array, ""]


def slice_target(target: Any, who: str) -> Any:
    """The target of the slice sampler ``who``, which needs a log density."""
    target = as_target(target)
    require(target, HasLogDensity, who, SCORE_KERNELS)
    return target


def init_slice(kernel, position, rng_key):
    """Evaluate the target at the start."""
    return SliceState(position, kernel.target.logdensity(position))


def draw_numbers(
    rng_key: PRNGKeyArray, num_uniforms: int, x: Float[Array, " d"]
) -> tuple[Float[Array, " num_uniforms"], Float[Array, " d"]]:
    """Numbers uniform in [0, 1), and standard normal ones like ``x``, by one call of the generator."""
    u = jax.random.uniform(rng_key, (num_uniforms + x.size,), x.dtype)
    symmetric = jnp.maximum(2 * u[num_uniforms:] - 1, jnp.finfo(x.dtype).epsneg - 1)  # -1 would be infinite
    return u[:num_uniforms], np.sqrt(2).astype(x.dtype) * jax.lax.erf_inv(symmetric)


def draw_level(u: Float[Array, ""], height: Float[Array, ""]) -> Float[Array, ""]:
    """log T for T uniform under e^height, from ``u`` uniform in [0, 1): log(1 - u), for log u may be infinite."""
    return height + jnp.log1p(-u)


def step_out(
    place: Float[Array, ""],
    share: Float[Array, ""],
    curve: Curve,
    level: Float[Array, ""],
    width: Float[Array, ""] | float,
    *,
    lower: Float[Array, ""] | float = -jnp.inf,
    max_expansions: int,
) -> Bracket:
    """Bracket the slice about the offset 0.

    Parameters
    ----------
    place, share
        Uniform in [0, 1): where 0 lies in the first interval, and how many of the moves are for the left end.
    curve
        ``curve(t) -> (height, log density)``.
    level
        Level of the slice.
    width
        Width of the first interval, and of a move.
    lower
        Offset below which the curve does not exist: the left end is clipped there, without an evaluation.
    max_expansions
        Number of moves m in all.

    Source: Neal, "Slice sampling", figure 3.
    """
    width = jnp.asarray(width, level.dtype)
    on_left = jnp.minimum(jnp.floor((max_expansions + 1) * share).astype(jnp.int32), max_expansions)

    def body(carry):
        left, right, spare_left, spare_right, on_right, is_bracketed, count, _ = carry
        is_inside = _lies_above(curve(jnp.where(on_right, right, left))[0], level)
        moves_on = is_inside & (jnp.where(on_right, spare_right, spare_left) > 0)
        is_bracketed = is_bracketed & (moves_on | ~is_inside)
        left_moves, right_moves = moves_on & ~on_right, moves_on & on_right
        left = jnp.where(left_moves, jnp.maximum(left - width, lower), left)
        right = jnp.where(right_moves, right + width, right)
        spare_left = jnp.where(left_moves, spare_left - 1, spare_left)
        spare_right = jnp.where(right_moves, spare_right - 1, spare_right)
        end_is_found = ~moves_on | (left_moves & (left <= lower))
        is_done = on_right & end_is_found
        return (
            left,
            right,
            spare_left,
            spare_right,
            on_right | end_is_found,
            is_bracketed,
            count + 1,
            ~is_done,
        )

    yes, zero = jnp.ones((), bool), jnp.zeros((), jnp.int32)
    left = jnp.maximum(-place * width, lower)
    start = (left, (1.0 - place) * width, on_left, max_expansions - on_left, left <= lower, yes, zero, yes)
    left, right, spare_left, spare_right, _, is_bracketed, count, _ = jax.lax.while_loop(
        lambda carry: carry[-1], body, start
    )
    return Bracket(left, right, is_bracketed, count, max_expansions - spare_left - spare_right)


def shrink(
    places: Float[Array, " max_shrinkage"],
    curve: Curve,
    level: Float[Array, ""],
    logdensity: Float[Array, ""],
    left: Float[Array, ""],
    right: Float[Array, ""],
    first: Float[Array, ""],
) -> Found:
    """Draw an offset from the slice within a bracket about the offset 0.

    Parameters
    ----------
    places
        Uniform in [0, 1): where in the bracket the proposals after the first are. After as many proposals as there are
        places nothing counts as found.
    curve
        ``curve(t) -> (height, log density)``.
    level
        Level of the slice.
    logdensity
        Log density at the offset 0, which is returned if nothing is found.
    left, right
        The bracket.
    first
        First proposal.

    Source: Neal, "Slice sampling", figure 5.
    """

    is_left = jnp.array([True, False])

    def body(carry):
        offset, bracket, _, _, count = carry
        height, new = curve(offset)
        is_found = _lies_above(height, level)
        bracket = jnp.where(is_left == (offset < 0), offset, bracket)
        another = bracket[0] + places[count] * (bracket[1] - bracket[0])
        return jnp.where(is_found, offset, another), bracket, new, is_found, count + 1

    start = (first, jnp.stack([left, right]), logdensity, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    offset, _, new, is_found, count = jax.lax.while_loop(
        lambda carry: ~carry[-2] & (carry[-1] < places.shape[0]), body, start
    )
    return Found(jnp.where(is_found, offset, 0.0), jnp.where(is_found, new, logdensity), is_found, count)


def _lies_above(height, level):
    """Whether a height lies in the slice; what has no density, or a density that is no number, does not."""
    return (height >= level) & (height > -jnp.inf)
