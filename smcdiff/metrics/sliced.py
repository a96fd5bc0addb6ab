"""Distances averaged over one-dimensional projections: Wasserstein and Kolmogorov-Smirnov.

With theta uniform on the sphere of R^d and F, G the distribution functions of theta.x and theta.y,

    SW_p^p = E_theta W_p^p(theta),   W_p^p(theta) = int_0^1 |F^-1(u) - G^-1(u)|^p du,
    SKS    = E_theta sup_s |F(s) - G(s)|.

Weighted clouds are coupled exactly: the integrand is constant between neighbouring levels of the two cumulative
weights. The mean over L directions has a variance that control variates with known means reduce. With D the difference
of the means of the clouds and C_x, C_y their covariances, those of the moment-matched Gaussians are

    (theta.D)^2,  theta.C_x theta,  theta.C_y theta      with means  |D|^2/d,  tr C_x/d,  tr C_y/d.

Their sum and the first alone are the upper and the lower control variate of the source; here the three get the
coefficients of least squares, which are optimal, at a bias of order 1/L.

Sources: Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures" (2015); Nguyen and Ho, "Sliced
Wasserstein Estimation with Control Variates", arXiv 2305.00402.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_count
from smcdiff.metrics.distance import (
    Distance,
    as_clouds,
    dot,
    normalised_weights,
    reference_split,
    without_dead,
)

__all__ = ["sliced_costs", "sliced_ks", "sliced_ks_gaps", "sliced_wasserstein"]


def sliced_wasserstein(
    rng_key: PRNGKeyArray,
    x,
    y,
    *,
    log_weights=None,
    num_projections: int = 128,
    order: int = 2,
    control_variate: bool = True,
    exact=None,
    batch_size: int | None = None,
) -> Distance:
    """Sliced Wasserstein distance of a weighted cloud to a reference, in the unit of the samples.

    Parameters
    ----------
    rng_key
        Key of the directions; the floor uses the same ones.
    x, y
        Samples (n, *event) and reference samples (m, *event), the latter in random order.
    log_weights
        Of x, shape (n,), not necessarily normalised; uniform if omitted.
    num_projections
        Number of directions.
    order
        p, 1 or 2.
    control_variate
        Whether to use the control variates of the module, which needs at least 8 directions.
    exact
        Further reference samples (n, *event) for the floor; otherwise ``y`` is split.
    batch_size
        Directions sorted together, or None for all.

    Returns
    -------
    (SW_p^p)^(1/p), its standard error over the directions, for these clouds, and the floor.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit.
    """
    check_count("num_projections", num_projections, 8 if control_variate else 2)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}.")
    x, y = as_clouds(x, y)
    weights = None if log_weights is None else normalised_weights(log_weights, len(x), x.dtype)
    first, second, factor = reference_split(len(x), y, exact)
    directions = _directions(rng_key, num_projections, x.shape[1], x.dtype)
    settings = (order, control_variate, batch_size)
    value, error = _sliced_wasserstein(directions, x, y, weights, *settings)
    floor, _ = _sliced_wasserstein(directions, first, second, None, *settings)
    return Distance(value, error, factor * floor)


def sliced_ks(
    rng_key: PRNGKeyArray,
    x,
    y,
    *,
    log_weights=None,
    num_projections: int = 128,
    exact=None,
    batch_size: int | None = None,
) -> Distance:
    """Sliced Kolmogorov-Smirnov distance of a weighted cloud to a reference, between 0 and 1.

    Parameters
    ----------
    rng_key, x, y, log_weights, num_projections, exact, batch_size
        As in `sliced_wasserstein`.

    Returns
    -------
    Mean over directions of the greatest difference of the distribution functions, its standard error over the
    directions, and the floor.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit.
    """
    check_count("num_projections", num_projections, 2)
    x, y = as_clouds(x, y)
    weights = normalised_weights(log_weights, len(x), x.dtype)
    first, second, factor = reference_split(len(x), y, exact)
    directions = _directions(rng_key, num_projections, x.shape[1], x.dtype)
    gaps = sliced_ks_gaps(directions, x, y, weights, batch_size)
    even = normalised_weights(None, len(first), x.dtype)
    floor = jnp.mean(sliced_ks_gaps(directions, first, second, even, batch_size))
    error = jnp.std(gaps, ddof=1) / len(directions) ** 0.5
    return Distance(jnp.mean(gaps), error, factor * floor)


@partial(jax.jit, static_argnames=("order", "batch_size"))
def sliced_costs(
    directions: Float[Array, "L d"],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    x_weights: Float[Array, " n"] | None = None,
    y_weights: Float[Array, " m"] | None = None,
    order: int = 2,
    batch_size: int | None = None,
) -> Float[Array, " L"]:
    """W_p^p along each of the given directions.

    Parameters
    ----------
    directions
        Unit vectors.
    x, y
        The clouds.
    x_weights, y_weights
        Non-negative with sum 1; uniform if omitted.
    order
        p.
    batch_size
        Directions sorted together, or None for all.
    """
    if x_weights is None and y_weights is None and len(x) == len(y):
        # Pairs of equal rank: no levels, no rounding of cumulative weights.
        def cost(direction):
            gaps = jnp.sort(_project(x, direction)) - jnp.sort(_project(y, direction))
            return jnp.mean(jnp.abs(gaps) ** order)
    else:
        x_weights = normalised_weights(None, len(x), x.dtype) if x_weights is None else x_weights
        y_weights = normalised_weights(None, len(y), y.dtype) if y_weights is None else y_weights
        x, y = without_dead(x, x_weights), without_dead(y, y_weights)

        def cost(direction):
            return _cost(_project(x, direction), _project(y, direction), x_weights, y_weights, order)

    return batched_map(cost, batch_size)(directions)


@partial(jax.jit, static_argnames="batch_size")
def sliced_ks_gaps(
    directions: Float[Array, "L d"],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    x_weights: Float[Array, " n"],
    batch_size: int | None = None,
) -> Float[Array, " L"]:
    """The greatest difference of the distribution functions along each direction, of any length; y is uniform.

    Parameters
    ----------
    directions
        Vectors that are not zero.
    x, y
        The clouds.
    x_weights
        Non-negative with sum 1.
    batch_size
        Directions sorted together, or None for all.
    """
    points = jnp.concatenate([without_dead(x, x_weights), y])
    signed = jnp.concatenate([x_weights, jnp.full(len(y), -1.0 / len(y), y.dtype)])

    def gap(direction):
        values, steps = jax.lax.sort((_project(points, direction), signed), num_keys=1)
        # Both functions have jumped by all their steps at a value only at its last occurrence.
        is_last = jnp.concatenate([values[1:] != values[:-1], jnp.ones(1, bool)])
        largest = jnp.max(jnp.where(is_last, jnp.abs(jnp.cumsum(steps)), 0.0))
        return jnp.where(jnp.isnan(values[-1]), jnp.nan, largest)  # NaN sorts last

    return batched_map(gap, batch_size)(directions)


@partial(jax.jit, static_argnames=("order", "control_variate", "batch_size"))
def _sliced_wasserstein(directions, x, y, weights, order, control_variate, batch_size):
    costs = sliced_costs(directions, x, y, weights, None, order, batch_size)
    if control_variate:
        mean, variance = _regress(costs, *_controls(directions, x, y, weights))
    else:
        mean, variance = jnp.mean(costs), jnp.var(costs, ddof=1) / len(costs)
    value = jnp.maximum(mean, 0.0) ** (1 / order)
    error = jnp.sqrt(variance)
    # The delta method, or the error itself where the value is within it and the root has no slope.
    slope = error / (order * jnp.maximum(value, jnp.finfo(x.dtype).tiny) ** (order - 1))
    return value, jnp.where(mean > error, slope, error ** (1 / order))


def _controls(directions, x, y, weights):
    """Control variates (L, 3) and their means (3,)."""
    weights = normalised_weights(None, len(x), x.dtype) if weights is None else weights
    means, covariances = [], []
    for points, w in ((without_dead(x, weights), weights), (y, normalised_weights(None, len(y), y.dtype))):
        mean = dot(w, points)
        centred = points - mean[None]
        means.append(mean)
        covariances.append(dot((w[:, None] * centred).T, centred))
    shift, dimension = means[0] - means[1], x.shape[1]
    columns = [_project(directions, shift) ** 2]
    columns += [jnp.sum(directions * (dot(directions, covariance)), axis=1) for covariance in covariances]
    known = [jnp.sum(shift**2), *(jnp.trace(covariance) for covariance in covariances)]
    return jnp.stack(columns, axis=1), jnp.stack(known) / dimension


def _regress(costs, controls, known):
    """Mean of ``costs`` by least squares on control variates of known mean, and the variance of that mean."""
    mean, residuals = jnp.mean(costs), costs - jnp.mean(costs)
    columns: list = []  # centred and made orthogonal, each with how far its mean is from the known one
    for control, expected in zip(controls.T, known, strict=True):
        excess, column = jnp.mean(control) - expected, control - jnp.mean(control)
        size = jnp.sum(column**2)
        for other, shift, norm in columns:
            factor = column @ other / norm
            column, excess = column - factor * other, excess - factor * shift
        # What is left of a column that depends on the others is rounding.
        norm = jnp.sum(column**2)
        column = jnp.where(norm > 1e-6 * size, column, 0.0)
        norm = jnp.where(norm > 1e-6 * size, norm, 1.0)
        columns.append((column, excess, norm))
        factor = residuals @ column / norm
        mean, residuals = mean - factor * excess, residuals - factor * column
    return mean, jnp.sum(residuals**2) / (len(costs) - 1 - len(columns)) / len(costs)


def _cost(x, y, x_weights, y_weights, order):
    """W_p^p of two weighted clouds on the line, by their quantile functions."""
    x, x_weights = jax.lax.sort((x, x_weights), num_keys=1)
    y, y_weights = jax.lax.sort((y, y_weights), num_keys=1)
    x_levels, y_levels = jnp.cumsum(x_weights), jnp.cumsum(y_weights)
    # Both end at 1 whatever the rounding.
    levels = jnp.concatenate([x_levels / x_levels[-1], y_levels / y_levels[-1]])
    is_x = jnp.arange(len(levels)) < len(x)
    levels, is_x = jax.lax.sort((levels, is_x.astype(jnp.int32)), num_keys=1)
    # On the interval that ends at a level, each quantile function sits at the number of its own levels before it.
    x_index = jnp.minimum(jnp.cumsum(is_x) - is_x, len(x) - 1)
    y_index = jnp.minimum(jnp.cumsum(1 - is_x) - (1 - is_x), len(y) - 1)
    gaps = jnp.diff(levels, prepend=jnp.zeros(1, levels.dtype))
    return jnp.sum(gaps * jnp.abs(x[x_index] - y[y_index]) ** order)


def _project(points, direction):
    return dot(points, direction)


def _directions(rng_key, number, dimension, dtype):
    directions = jax.random.normal(rng_key, (number, dimension), dtype)
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
