"""Classifier two-sample test: can a classifier tell samples from reference samples?

Each point is classified by its k nearest neighbours among all others, with the two clouds counted as equally large. If
the laws are the same the balanced accuracy is near 1/2, and its law is known exactly from permuting the
labels, which changes no neighbour: the graph is found once. The classifier is deterministic, and no point is held
out, since no point is its own neighbour.

Sources: Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", arXiv 1610.06545; Schilling, "Multivariate
Two-Sample Tests Based on Nearest Neighbors" (1986).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_count
from smcdiff.metrics.distance import as_clouds, normalised_weights

__all__ = ["ClassifierTest", "classifier_two_sample_test"]


class ClassifierTest(NamedTuple):
    """Accuracy of a classifier between samples and reference, and what it means. All are scalars.

    Attributes
    ----------
    value
        Balanced accuracy, about 1/2 if the laws are the same and 1 if they are disjoint.
    standard_error
        Of ``value``, the binomial one or, where larger, the deviation over permutations.
    floor
        Mean accuracy over permuted labels, a little below 1/2 in small clouds.
    p_value
        Share of permutations with an accuracy at least as large; exact at any size.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    floor: Float[Array, ""]
    p_value: Float[Array, ""]


def classifier_two_sample_test(
    rng_key: PRNGKeyArray,
    x,
    y,
    *,
    log_weights=None,
    num_neighbours: int | None = None,
    num_permutations: int = 500,
    batch_size: int | None = 256,
) -> ClassifierTest:
    """Test by a nearest-neighbour classifier that samples have the law of the reference.

    Not for use inside compiled code where there are weights, since the number of points then depends on them.

    Parameters
    ----------
    rng_key
        Key of the permutations, and of the choice of points where there are weights.
    x, y
        Independent samples (n, *event) and (m, *event). A cloud with copies (after resampling) is told apart by its
        copies: pass its weights from before resampling.
    log_weights
        Of x, shape (n,), not necessarily normalised. A point is kept with probability weight / greatest weight, which
        leaves equally weighted points of the weighted law; with few of them the test has little power.
    num_neighbours
        k; by default the root of the number of points.
    num_permutations
        Of the labels.
    batch_size
        Rows of the distance matrix, and permutations, in memory together, or None for all.

    Raises
    ------
    ValueError
        If shapes or numbers do not fit, or the weights leave fewer than 10 points.
    """
    check_count("num_permutations", num_permutations)
    x, y = as_clouds(x, y)
    key_keep, key_permute = jax.random.split(rng_key)
    if log_weights is not None:
        weights = normalised_weights(log_weights, len(x), x.dtype)
        keep = jax.random.uniform(key_keep, weights.shape, x.dtype) * jnp.max(weights) < weights
        x = x[np.flatnonzero(keep)]
        if len(x) < 10:
            raise ValueError(
                f"the weights are so uneven that {len(x)} points are left of the weighted law, at least 10 are "
                "needed: use mmd_test, which takes weights as they are, or more samples."
            )
    total = len(x) + len(y)
    num_neighbours = round(total**0.5) if num_neighbours is None else num_neighbours
    check_count("num_neighbours", num_neighbours)
    if num_neighbours >= total:
        raise ValueError(f"num_neighbours must be below the number of points, {total}, got {num_neighbours}.")
    points = jnp.concatenate([x, y])
    return _test(key_permute, points, len(x), num_neighbours, num_permutations, batch_size)


@partial(jax.jit, static_argnames=("n", "num_neighbours", "num_permutations", "batch_size"))
def _test(rng_key, points, n, num_neighbours, num_permutations, batch_size):
    total = len(points)
    m = total - n
    scale = jnp.std(points, axis=0)
    points = points / jnp.where(scale > 0, scale, 1.0)[None]

    def nearest(point, index):
        squares = jnp.sum((points - point[None]) ** 2, axis=1)
        return jax.lax.top_k(-squares.at[index].set(jnp.inf), num_neighbours)[1]

    neighbours = batched_map(nearest, batch_size)(points, jnp.arange(total))

    def accuracies(is_x):
        """Shares of x and of y that are classified rightly, half for a tie."""
        votes = jnp.sum(is_x[neighbours], axis=1)
        margin = jnp.sign(votes * m - (num_neighbours - votes) * n).astype(points.dtype)
        says_x = 0.5 + 0.5 * margin
        right_x = jnp.sum(jnp.where(is_x == 1, says_x, 0.0)) / n
        return right_x, jnp.sum(jnp.where(is_x == 0, 1 - says_x, 0.0)) / m

    labels = (jnp.arange(total) < n).astype(jnp.int32)
    right_x, right_y = accuracies(labels)
    keys = jax.random.split(rng_key, num_permutations)
    permuted = batched_map(lambda key: sum(accuracies(jax.random.permutation(key, labels))) / 2, batch_size)(
        keys
    )
    value = (right_x + right_y) / 2
    binomial = 0.5 * jnp.sqrt(right_x * (1 - right_x) / n + right_y * (1 - right_y) / m)
    # Sums in other orders differ in the last digit: what is equal must count as equal.
    tolerance = 8 * jnp.finfo(points.dtype).eps
    p_value = (1 + jnp.sum(permuted >= value - tolerance)) / (1 + num_permutations)
    return ClassifierTest(value, jnp.maximum(binomial, jnp.std(permuted)), jnp.mean(permuted), p_value)
