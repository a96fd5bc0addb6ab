"""Kernel Stein discrepancy: the distance of a sample from a density known by its score alone.

With s = grad log p and a base kernel k,

    u(x, y) = s(x).s(y) k + s(x).grad_y k + s(y).grad_x k + tr grad_x grad_y k,       E_p u(x, .) = 0,
    KSD^2   = E u(x, x')  over independent x, x' of the sample's law.

k is the inverse multiquadric (1 + |x - y|^2/l^2)^b with -1 < b < 0, with which the discrepancy vanishes only if the
sample converges to p; a Gaussian kernel lacks that in three dimensions and more. The U-statistic leaves out the
pairs i = i and is unbiased; the V-statistic includes them. The variance is as in `smcdiff.metrics.mmd`. No reference
sample and no constant of the density are needed.

**Blind to the weights of separated modes**: between them the score does not tell how much mass each has, and a sample
that lost a mode has a discrepancy near zero. Look at `mode_weight_tv` as well.

Sources: Liu, Lee and Jordan, "A Kernelized Stein Discrepancy for Goodness-of-fit Tests", arXiv 1602.03253;
Chwialkowski, Strathmann and Gretton, "A Kernel Test of Goodness of Fit", arXiv 1602.02964; Gorham and Mackey,
"Measuring Sample Quality with Kernels", arXiv 1703.01717.
"""

from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_count, check_positive
from smcdiff.density import as_target
from smcdiff.metrics.bootstrap import multipliers, p_value, quadratic_forms
from smcdiff.metrics.distance import (
    Distance,
    HypothesisTest,
    as_points,
    dot,
    normalised_weights,
    without_dead,
)
from smcdiff.metrics.mmd import median_bandwidth

__all__ = ["ksd", "ksd_test"]


def ksd(
    x,
    target: Any,
    *,
    log_weights=None,
    statistic: Literal["u", "v"] = "u",
    length: float | None = None,
    exponent: float = -0.5,
    exact=None,
    batch_size: int | None = 256,
) -> Distance:
    """Squared kernel Stein discrepancy of a weighted cloud to a density; blind to the weights of separated modes.

    Parameters
    ----------
    x
        Samples (n, *event).
    target
        An object with a score, a function that is a log density, or an array: the scores at ``x``, of its shape.
    log_weights
        Of x, shape (n,), not necessarily normalised; uniform if omitted.
    statistic
        "u", unbiased, or "v", which is never negative.
    length
        l of the kernel, in the unit of the samples. By default 2 l^2 is the median squared distance within ``x``; to
        compare several clouds, give one number.
    exponent
        b of the kernel, between -1 and 0.
    exact
        Exact samples (k, *event) for the floor; they need a ``target`` that is no array. By default the floor
        is estimated at ``x`` itself, which is too high where these are far off.
    batch_size
        Rows of the kernel matrix, and scores, in memory together, or None for all.

    Returns
    -------
    KSD^2, its standard error, and what n exact samples would give: the mean for "v", and for "u", whose mean is 0, the
    root mean square.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit.
    TypeError
        If ``target`` is no target.
    """
    if statistic not in ("u", "v"):
        raise ValueError(f'statistic must be "u" or "v", got {statistic!r}.')
    points, scores, weights, length = _prepare(x, target, log_weights, length, exponent, batch_size)
    settings = (jnp.asarray(length, points.dtype), jnp.asarray(exponent, points.dtype), batch_size)
    value, error, floors = _ksd(points, scores, weights, *settings)
    if exact is not None:
        if isinstance(target, jax.Array | np.ndarray):
            raise ValueError("exact needs a target whose score can be evaluated, got an array of scores.")
        exact, at_exact, even, _ = _prepare(exact, target, None, length, exponent, batch_size)
        _, _, floors = _ksd(exact, at_exact, even, *settings)
    diagonal, rms = floors[0] / len(points), floors[1] / len(points)
    if statistic == "u":
        return Distance(value[0], error, rms)
    return Distance(value[1], error, diagonal)


def ksd_test(
    rng_key: PRNGKeyArray,
    x,
    target: Any,
    *,
    log_weights=None,
    length: float | None = None,
    exponent: float = -0.5,
    num_resamples: int = 500,
    correlation_length: float = 0.0,
    batch_size: int | None = 256,
) -> HypothesisTest:
    """Goodness-of-fit test by the kernel Stein discrepancy and the wild bootstrap; blind to mode weights.

    Parameters
    ----------
    rng_key
        Key of the random signs.
    x, target, log_weights, length, exponent, batch_size
        As in `ksd`.
    num_resamples
        Number of sets of signs.
    correlation_length
        If positive, ``x`` is a chain in its order whose correlation falls as exp(-lag / correlation_length). Take it
        too large rather than too small, and thin chains whose length is not a large multiple of it.

    Returns
    -------
    n times the V-statistic, and the p-value.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit.
    TypeError
        If ``target`` is no target.
    """
    check_count("num_resamples", num_resamples)
    points, scores, weights, length = _prepare(x, target, log_weights, length, exponent, batch_size)
    settings = tuple(jnp.asarray(value, points.dtype) for value in (length, exponent, correlation_length))
    return _ksd_test(rng_key, points, scores, weights, *settings, num_resamples, batch_size)


@partial(jax.jit, static_argnames="batch_size")
def _ksd(points, scores, weights, length, exponent, batch_size):
    def row(point, score):
        kernel = _stein_kernel(point, score, points, scores, length, exponent)
        return dot(kernel, weights), dot(kernel**2, weights)

    means, squares = batched_map(row, batch_size)(points, scores)
    diagonal = _diagonal(points, scores, length, exponent)
    concentration = jnp.sum(weights**2)
    biased = dot(means, weights)
    unbiased = (biased - jnp.sum(weights**2 * diagonal)) / (1 - concentration)
    others = (means - weights * diagonal) / (1 - weights)
    first_order = 4 * jnp.sum(weights**2 * (others - unbiased) ** 2)
    mean_square = dot(squares - weights * diagonal**2, weights) / (1 - concentration)
    # E u(x, x') u(x, x'') over three different points.
    shared = dot((others * (1 - weights)) ** 2 - weights * (squares - weights * diagonal**2), weights)
    shared = shared / (1 - concentration) ** 2
    degenerate = jnp.clip(mean_square - 2 * shared + unbiased**2, 0.0, mean_square)
    variance = jnp.maximum(first_order - 2 * degenerate * concentration**2, 0.5 * first_order)
    floors = (dot(diagonal, weights), jnp.sqrt(2 * degenerate))
    return (unbiased, biased), jnp.sqrt(variance), floors


@partial(jax.jit, static_argnames=("num_resamples", "batch_size"))
def _ksd_test(
    rng_key, points, scores, weights, length, exponent, correlation_length, num_resamples, batch_size
):
    signs = multipliers(rng_key, (len(points), num_resamples), correlation_length, points.dtype)
    forms = quadratic_forms(
        (points, scores),
        weights[:, None] * jnp.concatenate([jnp.ones_like(signs[:, :1]), signs], axis=1),
        lambda pair: _stein_kernel(pair[0], pair[1], points, scores, length, exponent),
        batch_size,
    )
    forms = len(points) * forms
    return HypothesisTest(forms[0], p_value(forms[0], forms[1:]))


def _stein_kernel(point, score, points, scores, length, exponent) -> Float[Array, " n"]:
    """u(point, .) at all points."""
    dimension, rate = points.shape[1], 1 / length**2
    shifts = point[None] - points
    squares = rate * jnp.sum(shifts**2, axis=1)
    base = 1 + squares
    kernel = base**exponent
    slope = 2 * exponent * rate * kernel / base  # grad_x k = slope (x - y) = -grad_y k
    trace = -slope * (dimension + 2 * (exponent - 1) * squares / base)
    return kernel * dot(scores, score) + slope * jnp.sum((scores - score[None]) * shifts, axis=1) + trace


def _diagonal(points, scores, length, exponent):
    """u(x, x)."""
    return jnp.sum(scores**2, axis=1) - 2 * exponent * points.shape[1] / length**2


def _prepare(x, target, log_weights, length, exponent, batch_size):
    """Points and scores (n, d), weights (n,), and the length of the kernel."""
    points = as_points("x", x)
    weights = normalised_weights(log_weights, len(points), points.dtype)
    if isinstance(target, jax.Array | np.ndarray):
        if np.shape(target) != np.shape(x):
            raise ValueError(f"the scores must have the shape of x, {np.shape(x)}, got {np.shape(target)}.")
        scores = jnp.asarray(target, points.dtype).reshape(points.shape)
    else:
        scores = _scores(as_target(target), jnp.asarray(x, points.dtype), batch_size).reshape(points.shape)
    points, scores = without_dead(points, weights), without_dead(scores, weights)
    if not isinstance(exponent, jax.core.Tracer) and not -1 < exponent < 0:
        raise ValueError(f"exponent must lie between -1 and 0, got {exponent}.")
    if length is None:
        length = median_bandwidth(points)
    check_positive("length", length)
    return points, scores, weights, length


@eqx.filter_jit
def _scores(target, x, batch_size):
    return batched_map(target.score, batch_size)(x)
