"""Mean, variance, split R-hat and Monte Carlo errors in one pass, of chains that are too long or too large to keep.

Each chain keeps the moments of its first half, of its second half, of the draw between them if their number N is odd,
and of the means of its batches of b = sqrt(N) draws. Its memory is that of ten draws, however long it is. N is told
beforehand: R-hat needs all N draws, the rest is right at any time. With C chains of n draws so far and a whole batches
in each:

    split R-hat    of `smcdiff.diagnostics.autocorrelation`: plain, not of ranks, hence of little use for heavy tails
    MCSE           of the mean of all draws, sqrt(Sigma / (C n)), where Sigma = b / (C a - 1) times the sum over chains
                   and batches of (batch mean - mean of all batch means)^2: it grows where chains disagree
    ESS            C n variance / Sigma

Batches begin anew in the second half; what is left over at the end of a half is in no batch.

Source: Gupta and Vats, "Estimating Monte Carlo variance from multiple Markov chains", arXiv 2007.04229 (replicated
batch means).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from smcdiff.checks import check_count
from smcdiff.diagnostics.blocks import floating
from smcdiff.moments import Moments, merge

__all__ = ["Streaming", "StreamingSummary", "streaming_init", "streaming_summary", "streaming_update"]


class Record(NamedTuple):
    """Moments of one array, each with the leading axis (num_chains,).

    Attributes
    ----------
    current
        Of the batch under way.
    parts
        Of the batches that have ended: of the first half, the middle draw and the second half, on an axis before.
    batches
        Of the means of the whole batches.
    """

    current: Moments
    parts: Moments
    batches: Moments


class Streaming(NamedTuple):
    """A pass on its way.

    Attributes
    ----------
    num_seen
        Draws of each chain so far.
    num_draws
        How many there will be.
    batch_size
        Draws in a whole batch.
    records
        A `Record` for each array of the draws' pytree.
    """

    num_seen: Int[Array, ""]
    num_draws: Int[Array, ""]
    batch_size: Int[Array, ""]
    records: PyTree


class StreamingSummary(NamedTuple):
    """What the draws so far say, each like one draw of one chain.

    Attributes
    ----------
    mean, variance
        Of all draws of all chains; ``variance`` with their number - 1.
    rhat
        Split R-hat; NaN unless ``num_draws`` draws have come.
    ess
        Effective sample size for the mean; NaN before two batches.
    mcse_mean
        Monte Carlo standard error of the mean; NaN before two batches.
    """

    mean: PyTree
    variance: PyTree
    rhat: PyTree
    ess: PyTree
    mcse_mean: PyTree


def streaming_init(example: PyTree, num_chains: int, num_draws: int) -> Streaming:
    """A pass before its first draw.

    Parameters
    ----------
    example
        One draw of one chain, a pytree of arrays; only shapes and dtypes matter.
    num_chains
        Number of chains.
    num_draws
        Draws of each chain in the whole pass, at least 4.

    Returns
    -------
    Streaming

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    check_count("num_chains", num_chains)
    check_count("num_draws", num_draws, least=4)

    def record(leaf):
        leaf = floating(leaf)
        zero = jnp.zeros((num_chains, *leaf.shape), leaf.dtype)
        size = jnp.zeros((), leaf.dtype)
        none, thrice = Moments(size, zero, zero), jnp.zeros((3, *zero.shape), leaf.dtype)
        return Record(none, Moments(jnp.zeros(3, leaf.dtype), thrice, thrice), none)

    none, all_draws, batch = (
        jnp.asarray(number, jnp.int32) for number in (0, num_draws, math.isqrt(num_draws))
    )
    return Streaming(none, all_draws, batch, jax.tree.map(record, example))


@jax.jit
def streaming_update(state: Streaming, draws: PyTree) -> Streaming:
    """The pass after further draws.

    Parameters
    ----------
    state
        The pass before them.
    draws
        The draws that follow, a pytree of arrays (num_chains, number, *event). One by one, in a loop, or in blocks of
        whatever size, they lead to the same.

    Returns
    -------
    Streaming
    """
    draws = jax.tree.map(floating, draws)
    number = jax.tree.leaves(draws)[0].shape[1]
    if number == 0:
        return state

    def batch(carry):
        state, first = carry
        part, end = _segment(state)
        stop = jnp.minimum(number, first + end - state.num_seen)

        def add(k, records):
            def add_one(record, leaf):
                draw = jax.lax.dynamic_index_in_dim(leaf, k, axis=1, keepdims=False)
                one = Moments(jnp.ones((), draw.dtype), draw, jnp.zeros_like(draw))
                return record._replace(current=merge(record.current, one))

            return _map(add_one, records, draws)

        num_seen = state.num_seen + stop - first
        records = jax.lax.fori_loop(first, stop, add, state.records)
        records = jax.lax.cond(
            num_seen == end,
            lambda records: _map(_close(state, part), records),
            lambda records: records,
            records,
        )
        return state._replace(num_seen=num_seen, records=records), stop

    return jax.lax.while_loop(lambda carry: carry[1] < number, batch, (state, jnp.zeros((), jnp.int32)))[0]


@jax.jit
def streaming_summary(state: Streaming) -> StreamingSummary:
    """What the draws so far say.

    Returns
    -------
    StreamingSummary
    """
    half = state.num_draws // 2

    def summary(record):
        whole = record.current
        for part in range(3):
            whole = merge(whole, jax.tree.map(lambda leaf, part=part: leaf[part], record.parts))
        num_chains, dtype = whole.mean.shape[0], whole.mean.dtype
        mean, squares = _pooled(whole)
        variance = squares / (num_chains * whole.size - 1)
        num_batches = num_chains * record.batches.size
        _, between = _pooled(record.batches)
        sigma = state.batch_size.astype(dtype) * between / (num_batches - 1)
        sigma = jnp.where(num_batches > 1, sigma, jnp.nan)
        total = num_chains * whole.size

        draws = half.astype(dtype)
        means = record.parts.mean[jnp.array([0, 2])].reshape(2 * num_chains, *mean.shape)
        within = jnp.sum(record.parts.squares, axis=(0, 1)) / (2 * num_chains * (draws - 1))
        rhat = jnp.sqrt((draws * jnp.var(means, axis=0, ddof=1) / within + draws - 1) / draws)
        rhat = jnp.where(state.num_seen == state.num_draws, rhat, jnp.nan)
        return StreamingSummary(mean, variance, rhat, total * variance / sigma, jnp.sqrt(sigma / total))

    found = _map(summary, state.records)
    return StreamingSummary(
        *(
            jax.tree.map(
                lambda one, k=k: one[k], found, is_leaf=lambda node: isinstance(node, StreamingSummary)
            )
            for k in range(len(StreamingSummary._fields))
        )
    )


def _segment(state):
    """The part that the next draw belongs to, and the number of draws after which its batch ends."""
    half = state.num_draws // 2
    second = state.num_draws - half  # where the second half begins
    part = (state.num_seen >= half).astype(jnp.int32) + (state.num_seen >= second).astype(jnp.int32)
    begin, end = jnp.stack([0 * half, half, second])[part], jnp.stack([half, second, state.num_draws])[part]
    batch_end = begin + ((state.num_seen - begin) // state.batch_size + 1) * state.batch_size
    # Draws beyond the last that was told are one batch more after another.
    return part, jnp.where(state.num_seen < end, jnp.minimum(batch_end, end), batch_end)


def _close(state, part):
    """Add the moments of a batch that has ended to those of its part, and its mean to the batches' if it is whole."""

    def close(record):
        current, parts, batches = record
        before = jax.tree.map(lambda leaf: leaf[part], parts)
        parts = jax.tree.map(lambda leaf, new: leaf.at[part].set(new), parts, merge(before, current))
        is_whole = current.size == state.batch_size.astype(current.size.dtype)
        more = merge(
            batches, Moments(jnp.ones_like(current.size), current.mean, jnp.zeros_like(current.mean))
        )
        batches = jax.tree.map(lambda new, old: jnp.where(is_whole, new, old), more, batches)
        return Record(jax.tree.map(jnp.zeros_like, current), parts, batches)

    return close


def _pooled(moments):
    """Mean and sum of squares of all chains together."""
    mean = jnp.mean(moments.mean, axis=0)
    between = jnp.sum((moments.mean - mean[None]) ** 2, axis=0)
    return mean, jnp.sum(moments.squares, axis=0) + moments.size * between


def _is_record(node):
    return isinstance(node, Record)


def _map(function, records, *rest):
    return jax.tree.map(function, records, *rest, is_leaf=_is_record)
