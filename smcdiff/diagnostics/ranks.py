"""Ranks of draws and of folded draws, from one sort of each entry.

Of x_1 … x_S, sorted into s, a draw's rank is its place in s, and equal draws share the mean of their places. Folding
about the median m takes |x - m|: along s it falls and then rises, so that the folded order is a merge of two runs that
are sorted already. The sort also gives the quantiles. Ranks are halves of integers; their doubles are kept.

Everything is there twice, for XLA and for NumPy, which on a processor sorts some ten times as fast.

Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding, and localization: an improved
R-hat for assessing convergence of MCMC", arXiv 1903.08008.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import ndtri

from smcdiff.diagnostics.autocorrelation import split

__all__ = ["RANKS", "SORT", "Order", "Ranks", "normal_scores", "quantile"]

CACHED = 2**15  # draws that NumPy ranks at a time


class Ranks(NamedTuple):
    """Sorted draws, and ranks of the draws of split chains among each other.

    Attributes
    ----------
    ordered
        All draws, ascending, NaN last.
    doubled
        Twice the rank of each draw: 2 for the smallest.
    folded
        Twice the rank of each |draw - median|; 0 where the median is infinite.
    """

    ordered: Float[Array, "b S"]
    doubled: Int[Array, "b M half"]
    folded: Int[Array, "b M half"]


class Order(NamedTuple):
    """What is known of the order of draws (b, C, N): a function in XLA's operations, and the same one in NumPy's."""

    by_xla: Callable[[Any], Any]
    by_numpy: Callable[[Any], Any]


def normal_scores(doubled: Int[Array, "b M half"], dtype) -> Float[Array, "b M half"]:
    """Normal quantiles at (rank - 3/8) / (S + 1/4), Blom's positions, of doubled ranks; NaN for 0."""
    size = doubled.shape[1] * doubled.shape[2]
    table = ndtri((np.arange(2 * size + 1) / 2 - 0.375) / (size + 0.25))
    return jnp.asarray(table, dtype).at[doubled].get(mode="promise_in_bounds")


def quantile(ordered: Float[Array, "b S"], prob: float) -> Float[Array, " b"]:
    """Quantile of sorted draws, linear between neighbours (type 7)."""
    position = prob * (ordered.shape[-1] - 1)
    below = int(position)
    share = position - below
    low = ordered[..., below]
    if share == 0:
        return low
    high = ordered[..., below + 1]
    # Not by the weights where the neighbours are equal: rounding would take the quantile off them, and x <= quantile
    # would be false for all draws of that value.
    return jnp.where(low == high, low, (1 - share) * low + share * high)


def _median(ordered):
    size = ordered.shape[-1]
    return (ordered[..., (size - 1) // 2] + ordered[..., size // 2]) * 0.5


def _sort_by_xla(x):
    return jnp.sort(x.reshape(x.shape[0], -1), axis=-1)


def _sort_by_numpy(x):
    return np.sort(x.reshape(x.shape[0], -1), axis=-1)


def _ranks_by_xla(x):
    halves = split(x)
    rows = halves.reshape(x.shape[0], -1)
    places = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    ordered, draw = jax.lax.sort((rows, places), dimension=1, num_keys=1, is_stable=False)
    median = _median(ordered)[:, None]
    distances, place = jax.lax.sort(
        (jnp.abs(ordered - median), places), dimension=1, num_keys=1, is_stable=False
    )
    by_distance = jnp.take_along_axis(draw, place, axis=-1)
    doubled = jnp.put_along_axis(places, draw, _shared_places(ordered), axis=-1, inplace=False)
    folded = jnp.put_along_axis(places, by_distance, _shared_places(distances), axis=-1, inplace=False)
    folded = jnp.where(jnp.isfinite(median), folded, 0)
    whole = ordered if x.shape[-1] % 2 == 0 else _sort_by_xla(x)
    return Ranks(whole, doubled.reshape(halves.shape), folded.reshape(halves.shape))


def _shared_places(ordered):
    """First plus last place, counted from 1, of the draws that are equal to each: twice their rank."""
    size = ordered.shape[1]
    place = jax.lax.broadcasted_iota(jnp.int32, ordered.shape, 1) + 1
    edge = jnp.ones((ordered.shape[0], 1), bool)
    changes = ordered[:, 1:] != ordered[:, :-1]
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), place, 1), axis=1)
    last = jnp.where(jnp.concatenate([changes, edge], axis=1), place, size)
    return first + jax.lax.cummin(last, axis=1, reverse=True)


def _ranks_by_numpy(x):
    halves = split(x)
    rows: Any = halves.reshape(len(x), -1)
    ordered: Any = np.empty_like(rows)
    doubled: Any = np.empty(rows.shape, np.int32)
    folded: Any = np.empty(rows.shape, np.int32)
    # Few rows at a time, whose temporaries stay in the cache: that halves the time.
    step = max(1, CACHED // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        _rank_rows(rows[part], ordered[part], doubled[part], folded[part])
    whole = ordered if x.shape[-1] % 2 == 0 else _sort_by_numpy(x)
    return Ranks(whole, doubled.reshape(halves.shape), folded.reshape(halves.shape))


def _rank_rows(rows, ordered, doubled, folded):
    """Fill in `Ranks` of few rows."""
    draw = np.argsort(rows, axis=-1)
    _take(rows, draw, ordered)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        median = _median(ordered)[:, None]
        distances = np.abs(ordered - median)
    place = np.argsort(distances, axis=-1, kind="stable")  # the kind that merges sorted runs
    _put(draw, _doubled_ranks(ordered), doubled)
    _put(_take(draw, place), _doubled_ranks(_take(distances, place)), folded)
    folded[~np.isfinite(median[:, 0])] = 0


def _doubled_ranks(ordered):
    """Twice the ranks of sorted rows, at a cost beyond counting that grows with the number of ties."""
    doubled = np.empty(ordered.shape, np.int32)
    doubled[:] = 2 * np.arange(1, ordered.shape[1] + 1, dtype=np.int32)
    is_tied = np.zeros(ordered.shape, bool)  # with the one before
    np.equal(ordered[:, 1:], ordered[:, :-1], out=is_tied[:, 1:])
    tied = np.flatnonzero(is_tied)
    if tied.size:
        ends = np.flatnonzero(np.diff(tied, append=tied[-1] + 2) != 1)
        lengths = np.diff(ends, prepend=-1) + 1
        firsts = tied[ends] - lengths + 1
        members = np.repeat(firsts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        flat = doubled.reshape(-1)
        flat[members] = np.repeat(flat[firsts] + lengths - 1, lengths)
    return doubled


# Row by row, which NumPy does several times as fast as `take_along_axis` and `put_along_axis`.
def _take(rows, places, out=None):
    out = np.empty_like(rows) if out is None else out
    for to, row, place in zip(out, rows, places, strict=True):
        to[:] = row[place]
    return out


def _put(places, values, out):
    for to, place, value in zip(out, places, values, strict=True):
        to[place] = value


RANKS = Order(_ranks_by_xla, _ranks_by_numpy)
SORT = Order(_sort_by_xla, _sort_by_numpy)
