"""Geodesic slice sampling: a density on the unit sphere, by slices along random great circles.

From a unit vector x with the level log T = log p(x) - E, E ~ Exp(1), the great circle through x in a uniform direction,

    x(w) = x cos w + y sin w,    y uniform on the unit sphere orthogonal to x,

is cut at an angle w ~ U(0, 2 pi), which is also the first proposal; outside the slice {log p >= log T} the bracket
[w - 2 pi, w] shrinks towards w = 0 and a new angle is drawn from it, until one lies in the slice. The new sample is
normalised, so that rounding does not add up.

Sources: Habeck, Hasenpflug, Kodgirwar and Rudolf, "Geodesic slice sampling on the sphere", arXiv 2301.08056; Schär,
Habeck and Rudolf, "Gibbsian Polar Slice Sampling", arXiv 2302.03945 (the same move within polar coordinates).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from smcdiff.checks import check_count
from smcdiff.mcmc.slice_1d import (
    SliceInfo,
    SliceState,
    draw_level,
    draw_numbers,
    init_slice,
    shrink,
    slice_target,
)

__all__ = ["geodesic_slice", "great_circle", "shrink_turn"]

_NORM_TOLERANCE = 1e-3


class _Kernel(eqx.Module):
    target: Any
    max_shrinkage: int = eqx.field(static=True)


def geodesic_slice(target: Any, *, max_shrinkage: int = 100) -> SamplingAlgorithm:
    """Slice sampling on the unit sphere, without a gradient and with nothing to tune.

    Parameters
    ----------
    target
        Log density with respect to the uniform law on the sphere: a function of unit vectors of at least two numbers
        (over the flattened sample), or an object with a log density.
    max_shrinkage
        Proposals after which the chain stays where it is: `SliceInfo.is_accepted`.

    Returns
    -------
    SamplingAlgorithm, with `SliceState`, whose position is a unit vector, and `SliceInfo`. ``init`` normalises the
    start; outside compiled code it raises a ValueError if the norm is off 1 by more than 0.001.

    Raises
    ------
    TypeError
        If the target has no log density.
    ValueError
        If ``max_shrinkage`` is not a positive integer.

    Source: "Geodesic slice sampling on the sphere", arXiv 2301.08056.
    """
    check_count("max_shrinkage", max_shrinkage)
    kernel = _Kernel(slice_target(target, "geodesic_slice"), max_shrinkage)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Normalise the start and evaluate the target there."""
    x, unravel = ravel_pytree(position)
    if x.size < 2:
        raise ValueError(f"geodesic_slice needs positions of at least 2 numbers, got {x.size}.")
    norm = jnp.linalg.norm(x)
    if not isinstance(norm, jax.core.Tracer) and not abs(np.asarray(norm) - 1.0) < _NORM_TOLERANCE:
        raise ValueError(f"position must be a unit vector, got the norm {norm}; divide it by that.")
    return init_slice(kernel, unravel(x / norm), rng_key)


def _step(kernel, rng_key, state):
    x, unravel = ravel_pytree(state.position)
    u, noise = draw_numbers(rng_key, 2 + kernel.max_shrinkage, x)
    circle = great_circle(x, noise)

    def curve(angle):
        logdensity = kernel.target.logdensity(unravel(circle(angle)))
        return logdensity, logdensity

    level = draw_level(u[0], state.logdensity)
    turn = shrink_turn(u[1:], curve, level, state.logdensity)
    new = circle(turn.offset)
    x = jnp.where(turn.is_found, new / jnp.linalg.norm(new), x)
    info = SliceInfo(
        turn.is_found.astype(x.dtype),
        turn.is_found,
        jnp.ones((), bool),
        turn.num_evaluations,
        jnp.zeros((), jnp.int32),
        turn.num_evaluations,
    )
    return SliceState(unravel(x), turn.logdensity), info


def great_circle(x, noise):
    """The great circle through the unit vector ``x`` towards ``noise``, as a function of the angle from ``x``.

    Its points have the norm 1 but for rounding: what is drawn is made orthogonal to ``x`` twice, because once leaves a
    rest where the two are almost parallel.
    """
    tangent = noise
    for _ in range(2):
        tangent = tangent - jnp.sum(tangent * x) * x
        tangent = tangent / jnp.linalg.norm(tangent)
    return lambda angle: x * jnp.cos(angle) + tangent * jnp.sin(angle)


def shrink_turn(u, curve, level, logdensity):
    """Draw an angle from the slice along a great circle, with one number of ``u`` for the first proposal.

    See `smcdiff.mcmc.slice_1d.shrink`, also for ``curve(angle)``.
    """
    angle = 2 * np.pi * u[0]
    return shrink(u[1:], curve, level, logdensity, angle - 2 * np.pi, angle, angle)
