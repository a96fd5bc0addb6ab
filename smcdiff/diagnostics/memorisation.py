"""Samples that are copies of training images.

With d_1 <= d_2 <= ... the distances of a sample to its nearest training images,

    ratio = d_1 / mean(d_2, ..., d_{k+1}),

is about 1 for a sample that is no closer to one image than to others, and near 0 for a copy. Yoon et al. take k = 1 and
call below 1/3 memorised; Carlini et al. take k = 50 and a threshold of 1/2. In few dimensions a small ratio is nothing
special (k = 1: below r with probability about r^d in d dimensions); held-out data, which are no copies, give the
p-value.

Sources: Carlini et al., "Extracting Training Data from Diffusion Models", arXiv 2301.13188, section 4; Yoon et al.,
"Diffusion Probabilistic Models Generalize when They Fail to Memorize", ICML workshop SPIGM (2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from smcdiff.checks import check_count

__all__ = ["NearestTrainingImage", "nearest_training_image", "share_at_least"]


class NearestTrainingImage(NamedTuple):
    """How near samples are to training images.

    Attributes
    ----------
    distance
        Euclidean distance to the nearest one, shape (n,); NaN for samples of weight zero.
    nearest
        Which one that is, shape (n,).
    ratio
        Distance over the mean distance to the next ones, shape (n,), between 0 and 1.
    share
        Weight of the samples whose ratio is below the threshold.
    p_value
        Share of the held-out data whose ratio is at most the sample's, the sample counted with it, shape (n,); None
        without held-out data.
    """

    distance: Float[np.ndarray, " n"]
    nearest: Int[np.ndarray, " n"]
    ratio: Float[np.ndarray, " n"]
    share: float
    p_value: Float[np.ndarray, " n"] | None


def nearest_training_image(
    samples: Float[np.ndarray, "n *event"],
    data: Float[np.ndarray, "m *event"],
    *,
    num_neighbours: int = 50,
    threshold: float = 0.5,
    held_out: Float[np.ndarray, "h *event"] | None = None,
    log_weights: Float[np.ndarray, " n"] | None = None,
    batch_size: int = 4096,
) -> NearestTrainingImage:
    """The training image that each sample is nearest to, and whether it is suspiciously near.

    Parameters
    ----------
    samples
        Samples (n, *event); those of weight zero are left out.
    data
        Training images (m, *event), of which blocks are read one after the other: a memory map will do.
    num_neighbours
        Next images k whose mean distance is the measure, fewer than ``data`` has.
    threshold
        Ratio below which a sample counts as a copy: 1/2 with 50 neighbours, 1/3 with one.
    held_out
        Data (h, *event) that the model was not trained on, for p-values.
    log_weights
        Log weights (n,), for `NearestTrainingImage.share`.
    batch_size
        Training images compared together; bounds memory and changes no result.

    Returns
    -------
    NearestTrainingImage

    Raises
    ------
    ValueError
        If shapes do not fit, a number is out of range, or there are too few training images.

    Source: arXiv 2301.13188, section 4.2; Yoon et al. (2023).
    """
    check_count("num_neighbours", num_neighbours)
    check_count("batch_size", batch_size)
    if len(data) <= num_neighbours:
        raise ValueError(f"data must hold more than num_neighbours={num_neighbours} images, got {len(data)}.")
    samples = np.asarray(samples)
    for name, value in (("samples", samples), ("held_out", held_out)):
        if value is not None and np.shape(value)[1:] != np.shape(data)[1:]:
            raise ValueError(
                f"{name} must be shaped like data, (n, *event), got {np.shape(value)} and {np.shape(data)}."
            )
    log_weights = np.zeros(len(samples)) if log_weights is None else np.asarray(log_weights, float)
    if log_weights.shape != (len(samples),):
        raise ValueError(
            f"log_weights must be one number a sample, ({len(samples)},), got {log_weights.shape}."
        )
    weights = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    is_alive = weights > 0
    distance, index = np.full(len(samples), np.nan), np.zeros(len(samples), int)
    ratio = np.full(len(samples), np.nan)
    distance[is_alive], index[is_alive], ratio[is_alive] = _nearest(
        samples[is_alive], data, num_neighbours, batch_size
    )
    share = float(np.sum(weights[is_alive & (ratio < threshold)]))
    if held_out is None:
        return NearestTrainingImage(distance, index, ratio, share, None)
    usual = _nearest(np.asarray(held_out), data, num_neighbours, batch_size)[2]
    return NearestTrainingImage(distance, index, ratio, share, share_at_least(-usual, -ratio))


def share_at_least(usual, found):
    """P-values: (1 + how many of ``usual`` are at least ``found``) / (1 + their number); NaN for NaN."""
    ordered = np.sort(usual)
    above = len(ordered) - np.searchsorted(ordered, found, side="left")
    return np.where(np.isnan(found), np.nan, (1.0 + above) / (1.0 + len(ordered)))


def _nearest(samples, data, num_neighbours, batch_size):
    """Distance and index of the nearest of ``data``, and the ratio to the mean of the next ones."""
    flat = samples.reshape(len(samples), -1)
    dtype = jnp.result_type(float)
    x = jnp.asarray(flat, dtype)
    size = num_neighbours + 1
    best = (jnp.full((len(x), size), jnp.inf, dtype), jnp.zeros((len(x), size), jnp.int32))
    batch_size = min(batch_size, len(data))
    for first in range(0, len(data), batch_size):
        block = np.asarray(data[first : first + batch_size], dtype).reshape(-1, x.shape[1])
        count = len(block)
        block = np.pad(block, ((0, batch_size - count), (0, 0)))  # one program for all blocks
        best = _closer(best, x, jnp.asarray(block), jnp.asarray(first), jnp.asarray(count))
    indices = np.asarray(best[1])
    # Anew from the differences: |x|^2 - 2 x.y + |y|^2 loses all digits for a copy.
    distances = np.stack(
        [
            np.linalg.norm(np.asarray(data[row], float).reshape(size, -1) - x_i.astype(float)[None], axis=1)
            for row, x_i in zip(indices, flat, strict=True)
        ]
    )
    order = np.argsort(distances, axis=1, kind="stable")
    distances = np.take_along_axis(distances, order, axis=1)
    indices = np.take_along_axis(indices, order, axis=1)
    with np.errstate(invalid="ignore"):  # all are its copies, an image that the data repeat
        ratio = distances[:, 0] / distances[:, 1:].mean(axis=1)
    return distances[:, 0], indices[:, 0], np.where(np.isnan(ratio), 0.0, ratio)


@jax.jit
def _closer(best, x, block, first, count):
    """The nearest so far, with a block of images more."""
    centre = jnp.mean(x, axis=0)
    x, block = x - centre[None], block - centre[None]
    squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(block**2, axis=1)[None] - 2.0 * x @ block.T
    place = jnp.arange(len(block), dtype=jnp.int32)
    squares = jnp.where((place < count)[None], squares, jnp.inf)
    values = jnp.concatenate([best[0], squares], axis=1)
    indices = jnp.concatenate(
        [best[1], jnp.broadcast_to((first + place).astype(jnp.int32)[None], squares.shape)], axis=1
    )
    kept, where = jax.lax.top_k(-values, best[0].shape[1])
    return -kept, jnp.take_along_axis(indices, where, axis=1)
