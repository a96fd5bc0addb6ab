"""Distances between clouds of points, beside the sliced Wasserstein distance of `benchmarks.common`."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

__all__ = ["discrepancy", "sliced_ks", "w2"]


def sliced_ks(x, weights, y, num_projections=128) -> float:
    """Mean over directions of the greatest difference of the distribution functions."""
    directions = np.random.default_rng(0).normal(size=(num_projections, x.shape[1]))
    values = []
    for direction in directions:
        a, b = x @ direction, np.sort(y @ direction)
        order = np.argsort(a)
        points = np.concatenate([a, b])
        levels = np.concatenate([[0.0], np.cumsum(weights[order])])
        values.append(
            np.max(
                np.abs(
                    levels[np.searchsorted(a[order], points, side="right")]
                    - np.searchsorted(b, points, side="right") / len(b)
                )
            )
        )
    return float(np.mean(values))


def discrepancy(x, weights, y) -> float:
    """Unbiased squared maximum mean discrepancy, Gaussian kernel at the median distance of exact samples."""
    within = cdist(y, y, "sqeuclidean")
    bandwidth = np.median(within)

    def kernel(squares):
        return np.exp(-squares / bandwidth)

    n = len(y)
    own = kernel(cdist(x, x, "sqeuclidean"))
    pairs = weights @ own @ weights - np.sum(weights**2)  # the kernel of a point with itself is 1
    exact = (kernel(within).sum() - n) / (n * (n - 1))
    return float(
        pairs / (1 - np.sum(weights**2)) + exact - 2 * weights @ kernel(cdist(x, y, "sqeuclidean")).mean(1)
    )


def w2(x, y) -> float:
    """Exact Wasserstein distance of order 2 of two clouds of one size."""
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
