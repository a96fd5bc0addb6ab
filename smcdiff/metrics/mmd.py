"""Maximum mean discrepancy: the distance of two laws in the space of a kernel.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),      k(x, y) = mean over b of exp(-|x - y|^2 / (2 h_b^2)).

With weights the first mean is over the pairs i != j: sum w_i w_j k / (1 - sum w_i^2), unbiased where the weights are
equal. It may be negative. Its variance is, from the two parts of Hoeffding's decomposition,

    4 sum w_i^2 (g_i - mean)^2 + 4/m Var(g_j) - 2 z (sum w_i^2 + 1/m)^2,

where g is the slope, the mean kernel to the other points of the own cloud minus that to the other cloud, and z = E
kc(y, y')^2 of the centred kernel kc: the first two terms count the degenerate part twice. If the laws are the same only
that part is left, with the root mean square sqrt(2 z) (1/n + 1/m): the floor.

Sources: Gretton et al., "A Kernel Two-Sample Test" (JMLR 2012); Chwialkowski, Sejdinovic and Gretton, "A Wild
Bootstrap for Degenerate Kernel Tests", arXiv 1408.5404.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_count, check_positive
from smcdiff.metrics.bootstrap import multipliers, p_value, quadratic_forms
from smcdiff.metrics.distance import (
    Distance,
    HypothesisTest,
    as_clouds,
    dot,
    normalised_weights,
    without_dead,
)

__all__ = ["gaussian_kernel", "median_bandwidth", "mmd", "mmd_test", "reference_terms"]


def mmd(x, y, *, log_weights=None, bandwidths=None, batch_size: int | None = 256) -> Distance:
    """Unbiased squared maximum mean discrepancy of a weighted cloud to a reference.

    Parameters
    ----------
    x, y
        Samples (n, *event) and reference samples (m, *event).
    log_weights
        Of x, shape (n,), not necessarily normalised; uniform if omitted.
    bandwidths
        h, one positive number or several (B,), whose kernels are averaged, in the unit of the samples. By default
        2 h^2 is the median squared distance within ``y``, so that all clouds compared with one reference get the same.
    batch_size
        Rows of the kernel matrix in memory together, or None for all.

    Returns
    -------
    MMD^2, its standard error over both clouds, and its root mean square for n and m exact samples.

    Raises
    ------
    ValueError
        If shapes do not fit or a bandwidth is not positive.
    """
    x, y = as_clouds(x, y)
    weights = normalised_weights(log_weights, len(x), x.dtype)
    return _mmd(x, y, weights, _as_bandwidths(bandwidths, y), batch_size)


def mmd_test(
    rng_key: PRNGKeyArray,
    x,
    y,
    *,
    log_weights=None,
    bandwidths=None,
    num_resamples: int = 500,
    correlation_length: float = 0.0,
    batch_size: int | None = 256,
) -> HypothesisTest:
    """Test by the maximum mean discrepancy that weighted samples have the law of the reference.

    Without weights and correlations labels are permuted, which is exact at any size. Otherwise the wild bootstrap
    multiplies each sample's deviation by a random sign, which needs an effective size of some hundreds.

    Parameters
    ----------
    rng_key
        Key of the permutations or signs.
    x, y, log_weights, batch_size
        As in `mmd`.
    bandwidths
        As in `mmd`, but the default is the median over both clouds, which a permutation does not change.
    num_resamples
        Number of permutations or sets of signs.
    correlation_length
        If positive, ``x`` is a chain in its order whose correlation falls as exp(-lag / correlation_length); take it
        too large rather than too small. ``y`` is always independent.

    Returns
    -------
    n m / (n + m) times the squared discrepancy, pairs of a point with itself included, and the p-value.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit.
    """
    check_count("num_resamples", num_resamples)
    x, y = as_clouds(x, y)
    weights = normalised_weights(log_weights, len(x), x.dtype)
    points = jnp.concatenate([without_dead(x, weights), y])
    bandwidths = _as_bandwidths(bandwidths, points[jnp.asarray(_spread(len(points)))])
    resample = _permuted
    if log_weights is not None or isinstance(correlation_length, jax.core.Tracer) or correlation_length:
        resample = _multiplied
    length = jnp.asarray(correlation_length, x.dtype)
    return _mmd_test(rng_key, points, weights, bandwidths, length, num_resamples, resample, batch_size)


def gaussian_kernel(squares: Array, bandwidths: Float[Array, " B"]) -> Array:
    """Mean over bandwidths of exp(-squares / (2 h^2))."""
    rates = 0.5 / bandwidths**2
    return jnp.mean(jnp.stack([jnp.exp(-rate * squares) for rate in rates]), axis=0)


def median_bandwidth(points: Float[Array, "m d"]) -> Float[Array, ""]:
    """h with 2 h^2 the median squared distance between the first 1000 points."""
    points = points[:1000]
    squares = jax.lax.map(lambda p: jnp.sum((points - p[None]) ** 2, axis=1), points, batch_size=64)
    first, second = np.triu_indices(len(points), 1)
    return jnp.sqrt(0.5 * jnp.median(squares[first, second]))


def reference_terms(y: Float[Array, "m d"], bandwidths: Float[Array, " B"], batch_size: int | None):
    """Mean kernel of each y to the others, shape (m,), and E kc(y, y')^2 of the centred kernel."""
    m = len(y)

    def row(point):
        kernel = gaussian_kernel(_squares(y, point), bandwidths)
        return jnp.sum(kernel) - 1, jnp.sum(kernel**2) - 1

    sums, squares = batched_map(row, batch_size)(y)
    means = sums / (m - 1)
    mean_square = jnp.mean(squares) / (m - 1)
    # Pairs of pairs that share one point, without those that share both.
    shared = jnp.mean(sums**2 - squares) / ((m - 1) * max(m - 2, 1))
    return means, jnp.maximum(mean_square - 2 * shared + jnp.mean(means) ** 2, 0.0)


@partial(jax.jit, static_argnames="batch_size")
def _mmd(x, y, weights, bandwidths, batch_size):
    x, n, m = without_dead(x, weights), len(x), len(y)

    def row(point):
        own = dot(gaussian_kernel(_squares(x, point), bandwidths), weights)
        return own, jnp.mean(gaussian_kernel(_squares(y, point), bandwidths))

    own, cross = batched_map(row, batch_size)(x)
    within, degenerate = reference_terms(y, bandwidths, batch_size)
    to_x = batched_map(
        lambda point: dot(gaussian_kernel(_squares(x, point), bandwidths), weights), batch_size
    )(y)
    concentration = jnp.sum(weights**2)
    value = (dot(own, weights) - concentration) / (1 - concentration)
    value = value - dot(cross, weights) + jnp.mean(within - to_x)
    slope_x, slope_y = (own - weights) / (1 - weights) - cross, within - to_x
    first_order = 4 * jnp.sum(weights**2 * (slope_x - dot(slope_x, weights)) ** 2)
    first_order = first_order + 4 * jnp.var(slope_y, ddof=1) / m
    variance = jnp.maximum(first_order - 2 * degenerate * (concentration + 1 / m) ** 2, 0.5 * first_order)
    return Distance(value, jnp.sqrt(variance), jnp.sqrt(2 * degenerate) * (1 / n + 1 / m))


@partial(jax.jit, static_argnames=("num_resamples", "resample", "batch_size"))
def _mmd_test(rng_key, points, weights, bandwidths, length, num_resamples, resample, batch_size):
    n, m = len(weights), len(points) - len(weights)
    signed = jnp.concatenate([weights, jnp.full(m, -1.0 / m, weights.dtype)])
    columns = resample(rng_key, signed, n, num_resamples, length)
    forms = quadratic_forms(
        points,
        jnp.concatenate([signed[:, None], columns], axis=1),
        lambda point: gaussian_kernel(_squares(points, point), bandwidths),
        batch_size,
    )
    forms = forms * (n * m / (n + m))
    return HypothesisTest(forms[0], p_value(forms[0], forms[1:]))


def _permuted(rng_key, signed, n, num_resamples, length):
    """Signed weights (n + m, R) of permuted labels."""
    keys = jax.random.split(rng_key, num_resamples)
    return jax.vmap(lambda key: jax.random.permutation(key, signed), out_axes=1)(keys)


def _multiplied(rng_key, signed, n, num_resamples, length):
    """Signed weights (n + m, R) times random signs, centred within each cloud."""
    key_x, key_y = jax.random.split(rng_key)
    shape = (len(signed) - n, num_resamples)
    signs = [
        multipliers(key_x, (n, num_resamples), length, signed.dtype),
        multipliers(key_y, shape, jnp.zeros_like(length), signed.dtype),
    ]
    parts = []
    for weights, sign in zip((signed[:n], signed[n:]), signs, strict=True):
        mean = jnp.sum(jnp.abs(weights)[:, None] * sign, axis=0)
        parts.append(weights[:, None] * (sign - mean[None]))
    return jnp.concatenate(parts)


def _as_bandwidths(bandwidths, points):
    if bandwidths is None:
        return median_bandwidth(points)[None]
    check_positive("bandwidths", bandwidths)
    return jnp.atleast_1d(jnp.asarray(bandwidths, points.dtype))


def _spread(size):
    """At most 1000 indices, even over a cloud."""
    return np.unique(np.linspace(0, size - 1, min(size, 1000)).astype(int))


def _squares(points, point):
    return jnp.sum((points - point[None]) ** 2, axis=1)
