"""Polar slice sampling: slices of the density in polar coordinates, which heavy tails and high dimension leave thin.

In coordinates y = L^-1 (x - c), y = r theta with r > 0 and |theta| = 1, the law of (r, theta) has the density
proportional to e^l,

    l(r, theta) = (d - 1) log r + log p(c + L r theta),

with respect to dr and the uniform law on the sphere. A level log T = l(r, theta) - E, E ~ Exp(1), makes a slice of it,
and on the slice (r, theta) is uniform.

`polar_slice` (Gibbsian polar slice sampling) renews first theta and then r, both with the same level:

    theta   y ~ uniform on the unit sphere orthogonal to theta, w ~ U(0, 2 pi), bracket [w - 2 pi, w];
            theta' = theta cos w + y sin w, shrinking the bracket towards w = 0 until l(r, theta') >= log T
    r       stepping out from r by intervals of a width, clipped at 0, and shrinkage towards r, at the new theta

`radial_polar_slice` is for targets whose density depends on r alone, log p = log f(r), and whose l has one mode in r.
Its slice is an interval times the sphere: the ends are found by bisection, and both coordinates drawn exactly.

Where a shrinkage has used up its proposals its coordinate stays, and the other one is renewed all the same. That is
valid, since each half leaves the uniform law on the slice alone; to take back both would not be. The centre c has no
direction: a chain that starts there leaves it along the first axis, which matters for that step only.

Sources: Schär, Habeck and Rudolf, "Gibbsian Polar Slice Sampling", arXiv 2302.03945; Roberts and Rosenthal, "The polar
slice sampler", Stochastic Models 18 (2002); Neal, "Slice sampling", Annals of Statistics 31 (2003).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from smcdiff.checks import check_count, check_positive
from smcdiff.density import as_pytree
from smcdiff.mcmc.affine_pool import AffineMap, affine_map
from smcdiff.mcmc.geodesic_slice import great_circle, shrink_turn
from smcdiff.mcmc.metric import InverseMassMatrix
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

__all__ = ["polar_slice", "radial_polar_slice"]


class _Kernel(eqx.Module):
    target: Any
    width: Float[Array, ""] | float
    map: AffineMap
    max_expansions: int = eqx.field(static=True)
    max_shrinkage: int = eqx.field(static=True)


def polar_slice(
    target: Any,
    width: Float[Array, ""] | float,
    *,
    center: PyTree = None,
    covariance: InverseMassMatrix = None,
    max_expansions: int = 100,
    max_shrinkage: int = 100,
) -> SamplingAlgorithm:
    """Gibbsian polar slice sampling: no gradient, no rejection, at home in heavy tails and funnels.

    Parameters
    ----------
    target
        A log density function of samples with at least two numbers, or an object with a log density.
    width
        Width of the first interval of radii, positive, in units of the sample (of y, with ``covariance``): as wide as
        the radius varies, which is wider than for other slice samplers.
    center
        The origin of polar coordinates, a point like a sample: the middle of the target. The origin, if omitted.
    covariance
        Of the target, over the flattened sample: None for the identity, variances (d,), or a matrix (d, d).
        `smcdiff.mcmc.affine_pool` estimates both.
    max_expansions
        Moves of the ends of the interval, in all. Exact whatever it is, and reported in `SliceInfo.is_bracketed`. Far
        out in a heavy tail too few make small steps; many make chains that run side by side wait for each other.
    max_shrinkage
        Proposals of each shrinkage, after which the coordinate stays as it is: `SliceInfo.is_accepted`.

    Returns
    -------
    SamplingAlgorithm, with `SliceState` and `SliceInfo`. It raises a ValueError when it meets a sample of one number.

    Raises
    ------
    TypeError
        If the target has no log density.
    ValueError
        If a number is out of range.

    Source: "Gibbsian Polar Slice Sampling", arXiv 2302.03945.
    """
    check_positive("width", width)
    check_count("max_expansions", max_expansions)
    check_count("max_shrinkage", max_shrinkage)
    target = slice_target(target, "polar_slice")
    kernel = _Kernel(target, width, affine_map(center, covariance), max_expansions, max_shrinkage)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    _dimension(ravel_pytree(position)[0], "polar_slice")
    return init_slice(kernel, position, rng_key)


def _step(kernel, rng_key, state):
    """One level; then the direction, then the radius."""
    x, unravel = ravel_pytree(state.position)
    d = _dimension(x, "polar_slice")
    radius, direction = to_polar(kernel.map.to_standard(x))

    def position(radius, direction):
        return unravel(kernel.map.from_standard(radius * direction))

    def height(radius, direction):
        logdensity = kernel.target.logdensity(position(radius, direction))
        return (d - 1) * jnp.log(radius) + logdensity, logdensity

    for_turn = 2 + kernel.max_shrinkage
    u, noise = draw_numbers(rng_key, for_turn + 3 + kernel.max_shrinkage, x)
    level = draw_level(u[0], (d - 1) * jnp.log(radius) + state.logdensity)

    circle = great_circle(direction, noise)
    turn = shrink_turn(u[1:for_turn], lambda angle: height(radius, circle(angle)), level, state.logdensity)
    turned = circle(turn.offset)
    direction = jnp.where(turn.is_found, turned / jnp.linalg.norm(turned), direction)

    def ray(offset):
        return height(radius + offset, direction)

    place, share, first = u[for_turn : for_turn + 3]
    bracket = step_out(
        place, share, ray, level, kernel.width, lower=-radius, max_expansions=kernel.max_expansions
    )
    left, right = bracket.left, bracket.right
    first = left + first * (right - left)
    move = shrink(u[for_turn + 3 :], ray, level, turn.logdensity, left, right, first)

    has_moved = turn.is_found | move.is_found  # else not even by rounding
    new = position(radius + move.offset, direction)
    new = jax.tree.map(lambda new, old: jnp.where(has_moved, new, old), new, state.position)
    is_accepted = turn.is_found & move.is_found
    proposals = turn.num_evaluations + move.num_evaluations
    info = SliceInfo(
        is_accepted.astype(x.dtype),
        is_accepted,
        bracket.is_bracketed,
        proposals + bracket.num_evaluations,
        bracket.num_expansions,
        proposals,
    )
    return SliceState(new, move.logdensity), info


def to_polar(y: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
    """Norm and direction of ``y``, without overflow of the squares; the first axis is the direction of 0."""
    largest = jnp.max(jnp.abs(y))
    scaled = y / jnp.where(largest > 0, largest, 1.0)
    scaled = jnp.where(largest > 0, scaled, jnp.zeros_like(y).at[0].set(1.0))
    norm = jnp.linalg.norm(scaled)
    return largest * norm, scaled / norm


def _dimension(x, who):
    if x.size < 2:
        raise ValueError(
            f"{who} needs samples of at least 2 numbers, for there to be a circle of directions, got {x.size}; take "
            "hit_and_run_slice, which is the plain slice sampler there."
        )
    return x.size


# Densities of the radius alone ---------------------------------------------------------------------------------------


class _Radial(eqx.Module):
    log_radial_density: Callable
    map: AffineMap


def radial_polar_slice(
    log_radial_density: Callable[[Float[Array, ""]], Float[Array, ""]],
    *,
    center: PyTree = None,
    covariance: InverseMassMatrix = None,
) -> SamplingAlgorithm:
    """Exact polar slice sampling of a density of the radius alone, by independent draws from each slice.

    For p(x) proportional to f(|L^-1 (x - c)|), L L^T = covariance, where (d - 1) log r + log f(r) has one mode over
    r > 0 (Gaussian, Student, and all with f decreasing and log-concave): where it has several, a slice of more than one
    interval is cut, and the law is another. Nothing checks that. The direction is new in every step; what is left of
    the past is the level.

    Parameters
    ----------
    log_radial_density
        ``log f(r)`` of a radius, up to a constant, -inf where there is no density. Make it a `jax.tree_util.Partial` of
        a module-level function, so that what it holds are leaves.
    center, covariance
        c and L L^T, as in `polar_slice`.

    Returns
    -------
    SamplingAlgorithm, with `SliceState` and `SliceInfo`; the evaluations counted are those of ``log_radial_density``.
    ``is_bracketed`` is False where the slice reached to the largest number that there is.

    Source: Roberts and Rosenthal, "The polar slice sampler", Stochastic Models 18 (2002).
    """
    kernel = _Radial(as_pytree(log_radial_density), affine_map(center, covariance))
    return SamplingAlgorithm(Partial(_init_radial, kernel), Partial(_step_radial, kernel))


def _init_radial(kernel, position, rng_key):
    x, _ = ravel_pytree(position)
    _dimension(x, "radial_polar_slice")
    radius, _ = to_polar(kernel.map.to_standard(x))
    return SliceState(position, kernel.log_radial_density(radius))


_BISECTIONS = 48  # of a range of logarithms of at most 1500: to the last bits of the logarithm


def _step_radial(kernel, rng_key, state):
    """One level; the ends of its interval; a radius and a direction."""
    key_uniforms, key_direction = jax.random.split(rng_key)
    x, unravel = ravel_pytree(state.position)
    d = _dimension(x, "radial_polar_slice")
    radius, _ = to_polar(kernel.map.to_standard(x))
    radius = jnp.where(radius > 0, radius, 1.0)  # a start at the centre

    def height(radius):
        return (d - 1) * jnp.log(radius) + kernel.log_radial_density(radius)

    for_level, for_radius = jax.random.uniform(key_uniforms, (2,), x.dtype)
    level = draw_level(for_level, height(radius))
    limits = jnp.finfo(x.dtype)
    # Offsets of log r: at 0 the slice, at the end of the range no longer.
    ranges = jnp.log(jnp.asarray([limits.tiny, 0.5 * limits.max], x.dtype)) - jnp.log(radius)

    def is_inside(offsets):
        heights = jax.vmap(height)(radius * jnp.exp(offsets))
        return (heights >= level) & (heights > -jnp.inf)

    def halve(_, ends):
        inside, outside = ends
        middle = 0.5 * (inside + outside)
        moves = is_inside(middle)
        return jnp.where(moves, middle, inside), jnp.where(moves, outside, middle)

    ends, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(ranges), ranges))
    low, high = radius * jnp.exp(ends)
    new_radius = low + for_radius * (high - low)
    _, direction = to_polar(jax.random.normal(key_direction, x.shape, x.dtype))
    new = kernel.map.from_standard(new_radius * direction)
    count = jnp.asarray(2 * _BISECTIONS + 4, jnp.int32)  # the slice, both ends, the new radius
    is_bracketed = ~is_inside(ranges)[1]
    yes = jnp.ones((), bool)
    info = SliceInfo(
        jnp.ones((), x.dtype), yes, is_bracketed, count, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    )
    return SliceState(unravel(new), kernel.log_radial_density(new_radius)), info
