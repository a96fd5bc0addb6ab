"""Optimal transport in the space itself: the exact Wasserstein distance and the Sinkhorn divergence.

    W_p^p = min over couplings of E |x - y|^p  =  max over potentials, f(x) + g(y) <= |x - y|^p, of E f(x) + E g(y),
    OT_e  = min over couplings of E |x - y|^2 + e KL(coupling | product),
    S_e   = OT_e(x, y) - OT_e(x, x)/2 - OT_e(y, y)/2,

S_0 = W_2^2. The potentials of OT_e are the fixed point of f(x) = -e log E_y exp((g(y) - |x - y|^2)/e) and the same for
g; here they are iterated in logs, a block of rows at a time, so that no matrix is stored.

Standard errors: both statistics are linear in the two clouds to first order, with the potentials as slopes (for S_e, f
minus the potential of OT_e(x, x)), so the variance is sum w_i^2 (f_i - mean)^2 plus the same for y. It covers
the samples but not the bias, which for W_p is of order n^(-1/d): hence the floor.

Sources: del Barrio and Loubes, "Central Limit Theorems for empirical transportation cost in general dimension", arXiv
1705.01299; Genevay et al., "Learning Generative Models with Sinkhorn Divergences", arXiv 1706.00292; Feydy et al.,
"Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", arXiv 1810.08278; Mena and Weed,
"Statistical bounds for entropic optimal transport", arXiv 1905.11882.
"""

import importlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import softmax

from smcdiff.batching import batched_map
from smcdiff.checks import check_count, check_positive
from smcdiff.metrics.distance import (
    Distance,
    as_clouds,
    dot,
    normalised_weights,
    reference_split,
    without_dead,
)

__all__ = ["SinkhornDivergence", "sinkhorn_divergence", "wasserstein"]


def wasserstein(x, y, *, log_weights=None, order: int = 2, exact=None) -> Distance:
    """Exact Wasserstein distance of a weighted cloud to a reference, in the unit of the samples.

    Computed on the host in double precision, not inside compiled code; time grows as the cube of the size, so take a
    few thousand points at most. Clouds of one size without weights are matched by SciPy; others need the package POT.

    Parameters
    ----------
    x, y
        Samples (n, *event) and reference samples (m, *event), the latter in random order.
    log_weights
        Of x, shape (n,), not necessarily normalised; uniform if omitted.
    order
        p, 1 or 2.
    exact
        Further reference samples (n, *event) for the floor. Otherwise ``y`` is split, and the distance of the parts
        is scaled by the rate (1/n + 1/m)^(1/max(d, 2)), which for laws near a surface of fewer dimensions leaves it
        somewhat too high.

    Returns
    -------
    W_p, its standard error over both clouds, and the floor.

    Raises
    ------
    ImportError
        If the clouds have weights or different sizes, and POT is not installed.
    ValueError
        If shapes do not fit.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}.")
    as_clouds(x, y)  # checks the shapes
    x, y = (np.asarray(points, float).reshape(len(points), -1) for points in (x, y))
    first, second, factor = reference_split(len(x), y, exact)
    weights = None
    if log_weights is not None:
        normalised_weights(log_weights, len(x), jnp.result_type(float))  # checks the shape
    if log_weights is not None and np.ptp(log_weights) > 0:
        weights = softmax(np.asarray(log_weights, float))
        x, weights = x[weights > 0], weights[weights > 0]
    value, error = _exact_transport(x, y, weights, order)
    if weights is None and len(x) == len(y):
        first, second = first[: len(second)], second[: len(first)]  # odd sizes: halves that SciPy can match
    floor = factor ** (2 / max(x.shape[1], 2)) * _exact_transport(first, second, None, order)[0]
    return Distance(*(jnp.asarray(number, jnp.result_type(float)) for number in (value, error, floor)))


def _exact_transport(x, y, weights, order):
    """W_p and its standard error; one of x and y may be a cloud of another size only with POT."""
    cost = cdist(x, y) if order == 1 else cdist(x, y, "sqeuclidean")
    if weights is None and len(x) == len(y):
        weights = np.full(len(x), 1.0 / len(x))
        rows, columns = linear_sum_assignment(cost)
        total = cost[rows, columns].mean()
        f = _potential(cost[:, columns])
        g = np.diag(cost[:, columns]) - f
    else:
        weights = np.full(len(x), 1.0 / len(x)) if weights is None else weights
        emd2 = _pot().emd2
        total, log = emd2(weights, np.full(len(y), 1.0 / len(y)), cost, numItermax=10_000_000, log=True)
        f, g = log["u"], log["v"]
    variance = np.sum(weights**2 * (f - weights @ f) ** 2) + np.var(g, ddof=1) / len(g)
    value = max(total, 0.0) ** (1 / order)
    error = np.sqrt(variance)
    return value, error / (order * value ** (order - 1)) if total > error else error ** (1 / order)


def _potential(cost):
    """Optimal potential of the rows where the identity is the optimal matching, by Bellman and Ford's recursion.

    f_i - f_j <= c_ij - c_jj for all pairs, a shortest path problem without negative cycles. The greatest solution and
    the least one differ by what two finite clouds leave open; their mean is taken.
    """
    slack = cost - np.diag(cost)[None, :]
    return 0.5 * (_shortest(slack) - _shortest(slack.T))


def _shortest(slack):
    potential = np.zeros(len(slack))
    for _ in range(len(slack)):
        new = np.minimum(potential, np.min(slack + potential[None, :], axis=1))
        if np.allclose(new, potential, rtol=0.0, atol=1e-12 * np.abs(slack).max()):
            break
        potential = new
    return potential - potential.mean()


def _pot():
    """The package POT, imported when it is needed."""
    try:
        return importlib.import_module("ot")
    except ImportError as error:
        raise ImportError(
            "wasserstein of weighted clouds or of clouds of different sizes needs the package POT: install it (pip "
            "install pot), or resample x to as many equally weighted samples as y has."
        ) from error


class SinkhornDivergence(NamedTuple):
    """A Sinkhorn divergence, how precisely it is known, and what exact samples would give. All are scalars.

    Attributes
    ----------
    value
        S_e, in the squared unit of the samples.
    standard_error
        Of ``value``, over both clouds.
    floor
        The same statistic between exact samples of the same sizes.
    converged
        Whether all potentials converged before the cap on iterations.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    floor: Float[Array, ""]
    converged: Bool[Array, ""]


def sinkhorn_divergence(
    x,
    y,
    *,
    log_weights=None,
    epsilon: float | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    exact=None,
    batch_size: int | None = 1024,
) -> SinkhornDivergence:
    """Debiased entropic transport cost of a weighted cloud to a reference, for |x - y|^2.

    Parameters
    ----------
    x, y
        Samples (n, *event) and reference samples (m, *event), the latter in random order.
    log_weights
        Of x, shape (n,), not necessarily normalised; uniform if omitted.
    epsilon
        Positive, in the squared unit of the samples: smaller is nearer to W_2^2 and slower. By default 0.05 times the
        mean squared distance within ``y``, so that all clouds compared with one reference get the same.
    tolerance
        Potentials have converged when they change by less than ``tolerance * epsilon``.
    max_iterations
        Cap on the iterations.
    exact
        Further reference samples (n, *event) for the floor; otherwise ``y`` is split, and the floor of the parts is
        scaled by the rate 1/n + 1/m.
    batch_size
        Rows of the cost matrix in memory together, or None for all.

    Raises
    ------
    ValueError
        If shapes do not fit, or ``epsilon`` or ``tolerance`` is not positive.
    """
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    x, y = as_clouds(x, y)
    regularisation = 0.1 * jnp.sum(jnp.var(y, axis=0)) if epsilon is None else jnp.asarray(epsilon, x.dtype)
    check_positive("epsilon", regularisation)
    first, second, factor = reference_split(len(x), y, exact)
    weights = normalised_weights(log_weights, len(x), x.dtype)
    settings = (regularisation, jnp.asarray(tolerance, x.dtype), max_iterations, batch_size)
    value, error, converged = _divergence(x, y, weights, *settings)
    even = normalised_weights(None, len(first), x.dtype)
    floor, _, floor_converged = _divergence(first, second, even, *settings)
    return SinkhornDivergence(value, error, factor**2 * floor, converged & floor_converged)


@partial(jax.jit, static_argnames=("max_iterations", "batch_size"))
def _divergence(x, y, weights, epsilon, tolerance, max_iterations, batch_size):
    x = without_dead(x, weights)
    log_x = jnp.log(weights)
    log_y = jnp.full(len(y), -jnp.log(jnp.asarray(len(y), y.dtype)), y.dtype)

    def soft_min(points, others, log_others, potential):
        """-e log sum_j b_j exp((potential_j - |points_i - others_j|^2)/e) for each i."""

        def row(point):
            squares = jnp.sum((others - point[None]) ** 2, axis=1)
            return -epsilon * jax.nn.logsumexp(log_others + (potential - squares) / epsilon)

        return batched_map(row, batch_size)(points)

    def iterate(update, start):
        def step(carry):
            potentials, _, count = carry
            new = update(potentials)
            change = jnp.stack([jnp.max(jnp.abs(a - b)) for a, b in zip(new, potentials, strict=True)])
            return new, jnp.max(change), count + 1

        def unfinished(carry):
            return (carry[1] > tolerance * epsilon) & (carry[2] < max_iterations)

        start = (start, jnp.asarray(jnp.inf, x.dtype), 0)
        potentials, change, _ = jax.lax.while_loop(unfinished, step, start)
        return potentials, change <= tolerance * epsilon

    def crossed(potentials):
        f = soft_min(x, y, log_y, potentials[1])
        return f, soft_min(y, x, log_x, f)

    zeros = (jnp.zeros_like(weights), jnp.zeros_like(log_y))
    (f, g), done = iterate(crossed, zeros)
    # The mean of two updates converges in a few steps where both clouds are one.
    (f_x,), done_x = iterate(lambda p: (0.5 * (p[0] + soft_min(x, x, log_x, p[0])),), zeros[:1])
    (g_y,), done_y = iterate(lambda p: (0.5 * (p[0] + soft_min(y, y, log_y, p[0])),), zeros[1:])
    f, g = f - f_x, g - g_y
    mean = dot(weights, f)
    variance = jnp.sum(weights**2 * (f - mean) ** 2) + jnp.var(g, ddof=1) / len(g)
    return mean + jnp.mean(g), jnp.sqrt(variance), done & done_x & done_y
