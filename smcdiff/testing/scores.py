"""Does a score belong to its density, and a path to itself?

Of a density object that has the capabilities in question, at each point x, with random directions u, v of length 1
and a neighbour y of x:

    gradient      <s(x), v>  =  d/dh log p(x + h v)                                by a Jacobian-vector product
    difference    log p(y) - log p(x)  =  integral of <s, dx> from x to y          by Gauss-Legendre quadrature
    log ratio     log_ratio(x, y)  =  the same integral,   log_ratio(x, y) + log_ratio(y, x) = 0
    symmetry      <u, J v>  =  <v, J u>,   J the Jacobian of the score: only then is it the gradient of anything

and of a path at each time t, with x noised by the path's schedule where it has one,

    at            at(t).score(x)  =  score(x, t),   at(t).logdensity(x)  =  logdensity(x, t)
    denoiser      denoise(x, t)  =  (x + sigma^2 s) / alpha                        Tweedie's formula

Errors are relative and scaled to that of the whole vector: a row of sqrt(d) <v, s - grad log p> / |s| is about
|s - grad log p| / |s|. Nothing here is random but the directions: a right density passes, up to rounding.

The score of a network is no gradient in general and fails the symmetry by what it is not; ask for no symmetry then.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from smcdiff.checks import check_positive
from smcdiff.density import DensityPath, DiffusionModel, HasLogDensity, HasLogRatio, HasScore, ScheduledPath
from smcdiff.line_integral import line_integral

__all__ = ["ScoreReport", "check_score"]

_STEP = 0.1  # of the way to the next point: short enough for eight nodes
_NODES = 8


class ScoreReport(NamedTuple):
    """What `check_score` found.

    Attributes
    ----------
    names
        What was compared, at which time.
    errors
        Relative errors, shape (names, points).
    tolerance
        Largest error that passes.
    """

    names: tuple[str, ...]
    errors: Float[np.ndarray, "names points"]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether all errors are within the tolerance."""
        return bool(np.all(self.errors <= self.tolerance))

    def raise_if_failed(self) -> "ScoreReport":
        """Return the report, or raise an `AssertionError` that says what differs, where, and by how much."""
        if not self.passed:
            raise AssertionError(str(self))
        return self

    def __str__(self) -> str:
        """The verdict in words."""
        lines = [f"score: {'passed' if self.passed else 'failed'}, tolerance {self.tolerance:.2g}."]
        for name, errors in zip(self.names, self.errors, strict=True):
            if self.passed or not np.all(errors <= self.tolerance):
                worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
                lines.append(f"  {name}: relative error {errors[worst]:.3g} at point {worst}")
        return "\n".join(lines)


def check_score(
    rng_key: PRNGKeyArray,
    density: Any,
    points: PyTree,
    *,
    times: Float[Array, " times"] | None = None,
    symmetry: bool = True,
    tolerance: float | None = None,
) -> ScoreReport:
    """Test that a score is the gradient of the log density, and that a path says the same by all its methods.

    Parameters
    ----------
    rng_key
        Key, of the directions and of the noise.
    density
        An object with ``score(x)``, and what it has of ``logdensity(x)`` and ``log_ratio(x, y)``; with ``times`` a
        path, that is an object with ``at(t)``.
    points
        Samples, a pytree with a leading axis of at least 2. Of a path with a schedule they are samples at t = 0.
    times
        Times at which the path is checked.
    symmetry
        Whether the Jacobian of the score must be symmetric.
    tolerance
        Largest relative error; 0.003 in single precision and 1.5e-7 in double if omitted.

    Returns
    -------
    ScoreReport

    Raises
    ------
    TypeError
        If the object lacks a score, or ``at`` where times are given.
    ValueError
        If there are fewer than two points, or ``tolerance`` is not positive.
    """
    points = jax.tree.map(jnp.asarray, points)
    num_points = len(jax.tree.leaves(points)[0])
    if num_points < 2:
        raise ValueError(f"points must hold at least two samples, got {num_points}.")
    dtype = jax.tree.leaves(points)[0].dtype
    tolerance = 10 * float(np.sqrt(jnp.finfo(dtype).eps)) if tolerance is None else tolerance
    check_positive("tolerance", tolerance)
    if times is None:
        if isinstance(density, DensityPath) or not isinstance(density, HasScore):
            raise TypeError(
                f"density must have score(x), got {type(density).__name__}; a path needs times, a function "
                "smcdiff.density.as_target."
            )
        return _report([("", _of_density(rng_key, density, points, symmetry))], tolerance)
    if not isinstance(density, DensityPath):
        raise TypeError(f"with times, density must be a path with at(t), got {type(density).__name__}.")
    found = [
        (f" at t = {float(t):.3g}", _of_path(jax.random.fold_in(rng_key, k), density, points, t, symmetry))
        for k, t in enumerate(jnp.asarray(times, dtype))
    ]
    return _report(found, tolerance)


def _report(found, tolerance):
    """Relative errors of (where, {name: (error, scale)}); a scale that vanishes at a point is that of the others."""
    names, rows = [], []
    for where, comparisons in found:
        for name, (error, scale) in comparisons.items():
            error, scale = np.abs(np.asarray(error, float)), np.asarray(scale, float)
            usual = np.median(scale)
            # Both sides zero at every point agree.
            rows.append(error / np.maximum(np.maximum(scale, 0.1 * usual), np.finfo(float).tiny))
            names.append(name + where)
    return ScoreReport(tuple(names), np.stack(rows), float(tolerance))


@eqx.filter_jit
def _of_path(rng_key, path, points, t, symmetry):
    """Comparisons at one time."""
    key_noise, key_rest = jax.random.split(rng_key)
    if isinstance(path, ScheduledPath):
        alpha, sigma = path.schedule.alpha(t), path.schedule.sigma(t)
        points = alpha * points + sigma * jax.random.normal(key_noise, points.shape, points.dtype)
    marginal = path.at(t)
    found = _of_density(key_rest, marginal, points, symmetry)
    score = jax.vmap(marginal.score)(points)
    if isinstance(path, ScheduledPath):
        found["at(t).score = score(., t)"] = _gap(score, jax.vmap(path.score, (0, None))(points, t))
    if isinstance(path, HasLogDensity) and isinstance(marginal, HasLogDensity):
        inside = jax.vmap(marginal.logdensity)(points)
        outside = jax.vmap(_logdensity_of_path, (None, 0, None))(path, points, t)
        found["at(t).logdensity = logdensity(., t)"] = inside - outside, jnp.abs(inside) + jnp.abs(outside)
    if isinstance(path, DiffusionModel):
        tweedie = (points + sigma**2 * score) / alpha
        error, scale = _gap(tweedie, jax.vmap(path.denoise, (0, None))(points, t))
        found["denoiser = Tweedie's formula"] = error, scale + jax.vmap(_norm)(points) / alpha
    return found


@eqx.filter_jit
def _of_density(rng_key, density, points, symmetry):
    """Comparisons of a density object: {name: (errors, scales)}."""
    found = {}
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])(points)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], points))[1]
    directions = jax.random.normal(rng_key, (2, *flat.shape), flat.dtype)
    u, v = directions / jnp.linalg.norm(directions, axis=2, keepdims=True)
    root = np.sqrt(flat.shape[1])

    score_of = density.score

    def score(x):
        return ravel_pytree(score_of(unravel(x)))[0]

    scores = jax.vmap(score)(flat)
    norms = jnp.linalg.norm(scores, axis=1)
    if symmetry:
        along_u, along_v = (jax.vmap(lambda x, w: jax.jvp(score, (x,), (w,))[1])(flat, w) for w in (u, v))
        error = root * (jnp.sum(u * along_v, axis=1) - jnp.sum(v * along_u, axis=1))
        scale = jnp.linalg.norm(along_u, axis=1) + jnp.linalg.norm(along_v, axis=1)
        found["Jacobian of the score is symmetric"] = error, scale
    if not isinstance(density, HasLogDensity | HasLogRatio):
        return found

    neighbours = flat + jnp.asarray(_STEP, flat.dtype) * (jnp.roll(flat, -1, axis=0) - flat)
    lines = jax.vmap(lambda x, y: line_integral(score, x, y, _NODES))(flat, neighbours)
    lengths = jnp.linalg.norm(neighbours - flat, axis=1)
    scale = lengths * (norms + jnp.linalg.norm(jax.vmap(score)(neighbours), axis=1)) / root
    rounding = jnp.zeros_like(norms)
    if isinstance(density, HasLogDensity):

        def logdensity(x):
            return density.logdensity(unravel(x))

        values, slopes = jax.vmap(lambda x, v: jax.jvp(logdensity, (x,), (v,)))(flat, v)
        found["score = gradient of logdensity"] = root * (jnp.sum(scores * v, axis=1) - slopes), norms
        # A difference of large numbers is known no better than their last digits.
        rounding = 8 * jnp.finfo(flat.dtype).eps * jnp.abs(values)
        error = jax.vmap(logdensity)(neighbours) - values - lines
        found["difference of logdensity = integral of the score"] = _beyond(error, rounding), scale
    if isinstance(density, HasLogRatio):
        there, back = (
            jax.vmap(lambda x, y: density.log_ratio(unravel(x), unravel(y)))(x, y)
            for x, y in ((flat, neighbours), (neighbours, flat))
        )
        found["log_ratio = integral of the score"] = _beyond(there - lines, rounding), scale
        found["log_ratio(x, y) = -log_ratio(y, x)"] = _beyond(there + back, rounding), scale
    return found


def _beyond(error, rounding):
    """The part of an error that rounding does not explain; NaN stays."""
    return jnp.maximum(jnp.abs(error) - rounding, 0.0)


def _logdensity_of_path(path, x, t):
    return path.logdensity(x, t)


def _norm(x):
    return jnp.linalg.norm(x.reshape(-1))


def _gap(a, b):
    """Norms of the difference and of the two, per point."""
    return jax.vmap(_norm)(a - b), jax.vmap(_norm)(a) + jax.vmap(_norm)(b)
