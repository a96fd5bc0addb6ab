"""The formulas of `smcdiff.diagnostics.chains` for a block of entries (b, C, N), and the loop over blocks."""

import collections
import functools
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from smcdiff.checks import check_count
from smcdiff.diagnostics.autocorrelation import effective_sample_size, scale_reduction, split
from smcdiff.diagnostics.ranks import Order, Ranks, normal_scores, quantile

__all__ = [
    "by_blocks",
    "diagnostics",
    "floating",
    "nested_rhat",
    "quantile_ess",
    "quantile_mcse",
]

BLOCK = 2**17  # draws of all entries in a block, unless the caller says: what a processor's cache holds
BLOCK_BY_XLA = 2**22  # the same for the loop of XLA
AHEAD = 2  # blocks that NumPy puts in order while XLA works
MIN_DRAWS = 4
SERIES = {  # whose effective sample sizes a field needs
    "ess_bulk": ("bulk",),
    "ess_tail": ("low", "high"),
    "ess_mean": ("mean",),
    "mcse_mean": ("mean",),
    "mcse_sd": ("squares",),
}
ONE_SIGMA = (0.1586553, 0.8413447)  # as ArviZ rounds them


def by_blocks(
    function: Callable[[Float[Array, "b C N"], Any, Any], PyTree],
    options: Hashable,
    order: Order,
    x: ArrayLike,
    block_size: int | None,
) -> Any:
    """``function(draws, ordered, options)`` of all entries of draws (C, N, *event), block by block.

    On a processor, and outside of other compiled programs, NumPy puts the draws in order while XLA works on the block
    before. In other places the loop is XLA's.

    Parameters
    ----------
    function
        Module-level; from draws (b, C, N) and their order to a pytree of arrays (b,).
    options
        Part of the compiled program's key.
    order
        What the function is to know of the order of the draws.
    x
        Draws, (C, N, *event).
    block_size
        Entries in a block, or None for what fits a cache, and for more on an accelerator.

    Returns
    -------
    That pytree, with arrays of the event shape.
    """
    x = floating(x)
    if x.ndim < 2:
        raise ValueError(f"draws must have the axes (chain, draw, *event), got the shape {x.shape}.")
    loop, draws = (_loop_by_numpy, BLOCK) if _is_on_processor(x) else (_loop_by_xla, BLOCK_BY_XLA)
    if block_size is None:
        block_size = max(1, draws // max(1, x.shape[0] * x.shape[1]))
    check_count("block_size", block_size)
    entries = x.reshape(*x.shape[:2], -1)
    found = loop(entries, min(block_size, entries.shape[2]), function, options, order)
    return jax.tree.map(lambda leaf: leaf.reshape(x.shape[2:]), found)


def _is_on_processor(x):
    return (
        not isinstance(x, jax.core.Tracer)
        and x.is_fully_addressable
        and all(device.platform == "cpu" for device in x.devices())
    )


def _loop_by_numpy(entries, width, function, options, order):
    size = entries.shape[2]
    starts = [min(start, size - width) for start in range(0, size, width)]
    found = []
    with ThreadPoolExecutor(AHEAD) as pool:

        def prepare(start):
            draws = np.asarray(_block(entries, start, width))
            return draws, pool.submit(order.by_numpy, draws)

        waiting = collections.deque(prepare(start) for start in starts[:AHEAD])
        for k in range(len(starts)):
            draws, ordered = waiting.popleft()
            if k + AHEAD < len(starts):
                waiting.append(prepare(starts[k + AHEAD]))
            found.append(_one_block(draws, ordered.result(), function, options))
    overlap = len(starts) * width - size  # the last block goes over some entries once more
    found[-1] = jax.tree.map(lambda leaf: leaf[overlap:], found[-1])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


@functools.partial(jax.jit, static_argnames=("width", "function", "options", "order"))
def _loop_by_xla(entries, width, function, options, order):
    size = entries.shape[2]

    def block(k):
        start = jnp.minimum(k * width, size - width)
        return start, _block(entries, start, width)

    # The block is carried, so that it is laid out once: the compiler would gather it anew for every use.
    def step(k, carry):
        found, (start, draws) = carry
        found = jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
            found,
            function(draws, order.by_xla(draws), options),
        )
        return found, block(k + 1)

    first = block(0)
    shapes = jax.eval_shape(lambda draws: function(draws, order.by_xla(draws), options), first[1])
    nothing = jax.tree.map(lambda leaf: jnp.zeros(size, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, -(-size // width), step, (nothing, first))[0]


@functools.partial(jax.jit, static_argnames="width")
def _block(entries, start, width):
    """Draws (b, C, N) of ``width`` entries."""
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(entries, start, width, axis=2), 2, 0)


@functools.partial(jax.jit, static_argnames=("function", "options"))
def _one_block(draws, ordered, function, options):
    return function(draws, ordered, options)


def floating(x: ArrayLike) -> Array:
    """The array in single or double precision."""
    x = jnp.asarray(x)
    is_kept = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if is_kept else x.astype(jnp.result_type(float))


def diagnostics(
    x: Float[Array, "b C N"], ranked: Ranks, names: tuple[str, ...]
) -> dict[str, Float[Array, " b"]]:
    """Those fields of `ChainDiagnostics` that are asked for; the compiler drops what only others need."""
    size, _, num_draws = x.shape
    if num_draws < MIN_DRAWS:
        return {name: jnp.full(size, jnp.nan, x.dtype) for name in names}
    halves, every, ordered = split(x), x.reshape(size, -1), ranked.ordered
    is_constant = ordered[:, 0] == ordered[:, -1]
    q5, median, q95 = (quantile(ordered, prob) for prob in (0.05, 0.5, 0.95))

    mean = jnp.where(is_constant, ordered[:, 0], jnp.mean(every, axis=-1))
    sd = jnp.where(is_constant, 0, jnp.std(every, axis=-1, ddof=1))
    # In units of the deviation: fourth powers of the draws themselves could overflow.
    scale = jnp.where(is_constant, 1, sd)
    squares = ((halves - mean[:, None, None]) / scale[:, None, None]) ** 2
    spread = jnp.max(squares, axis=(1, 2)) - jnp.min(squares, axis=(1, 2))
    is_even = spread < np.finfo(x.dtype).resolution  # two values about the mean, or one
    unit = (every - mean[:, None]) / scale[:, None]
    variance, fourth = jnp.mean(unit**2, axis=-1), jnp.mean(unit**4, axis=-1)
    excess = jnp.where(is_even, 0, jnp.maximum(fourth - variance**2, 0))

    series = {
        "bulk": (normal_scores(ranked.doubled, x.dtype), _is_constant(ranked.doubled)),
        "low": _indicators(halves, q5),
        "high": _indicators(halves, q95),
        "mean": (halves, is_constant),
        "squares": (squares, is_even),
    }
    used = sorted({name for field in names for name in SERIES.get(field, ())})
    ess = dict.fromkeys(series, mean)
    if used:  # one after another, by one program
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(series[name] for name in used))
        ess |= zip(used, jax.lax.map(lambda one: effective_sample_size(*one), stacked), strict=True)
    found = {
        "rhat": _rank_rhat(scale_reduction, ranked, x),
        "ess_bulk": ess["bulk"],
        "ess_tail": _smaller(ess["low"], ess["high"]),
        "ess_mean": ess["mean"],
        "mcse_mean": sd / jnp.sqrt(ess["mean"]),
        "mcse_sd": sd * jnp.sqrt(excess / ess["squares"] / variance / 4),
        "mean": mean,
        "sd": sd,
        "q5": q5,
        "median": median,
        "q95": q95,
    }
    return {name: _unless_nan(x, found[name]) for name in names}


def nested_rhat(
    x: Float[Array, "b C N"], ranked: Ranks, options: tuple[tuple[int, ...], int]
) -> Float[Array, " b"]:
    """Nested R-hat; ``options`` are the chains in the order of their superchains, and the number of superchains."""
    order, num_superchains = options
    size, num_chains, num_draws = x.shape
    if num_draws < MIN_DRAWS:
        return jnp.full(size, jnp.nan, x.dtype)

    def reduction(halves):
        by_superchain = halves.reshape(size, num_chains, 2, -1)[:, np.array(order)]
        chains = by_superchain.reshape(size, num_superchains, -1, halves.shape[-1])
        means = jnp.mean(chains, axis=-1)
        between = jnp.var(jnp.mean(means, axis=-1), axis=-1, ddof=1)
        within = jnp.mean(jnp.var(chains, axis=-1, ddof=1), axis=-1) + jnp.var(means, axis=-1, ddof=1)
        return jnp.sqrt(1 + between / jnp.mean(within, axis=-1))

    return _unless_nan(x, _rank_rhat(reduction, ranked, x))


def quantile_ess(x: Float[Array, "b C N"], ordered: Float[Array, "b S"], prob: float) -> Float[Array, " b"]:
    """Effective sample size of a quantile."""
    if x.shape[-1] < MIN_DRAWS:
        return jnp.full(x.shape[0], jnp.nan, x.dtype)
    return _unless_nan(x, effective_sample_size(*_indicators(split(x), quantile(ordered, prob))))


def quantile_mcse(x: Float[Array, "b C N"], ordered: Float[Array, "b S"], prob: float) -> Float[Array, " b"]:
    """Monte Carlo standard error of a quantile."""
    ess = quantile_ess(x, ordered, prob)
    last = ordered.shape[-1] - 1
    low, high = (_beta_quantile(p, ess * prob + 1, ess * (1 - prob) + 1) * (last + 1) - 1 for p in ONE_SIGMA)
    low = jnp.floor(jnp.maximum(low, 0)).astype(jnp.int32)
    high = jnp.ceil(jnp.minimum(high, last)).astype(jnp.int32)
    low, high = (jnp.take_along_axis(ordered, place[:, None], axis=-1)[:, 0] for place in (low, high))
    return jnp.where(jnp.isnan(ess), jnp.nan, (high - low) / 2)


def _rank_rhat(reduction, ranked, x):
    """The larger of bulk and folded; as with Python's max, which ArviZ takes, a folded NaN counts for nothing."""
    if x.shape[1] < 2:
        return jnp.full(x.shape[0], jnp.nan, x.dtype)
    bulk, folded = (reduction(normal_scores(part, x.dtype)) for part in (ranked.doubled, ranked.folded))
    return jnp.where(folded > bulk, folded, bulk)


def _indicators(halves, level):
    """The series x <= level, and where it is constant."""
    is_below = halves <= level[:, None, None]
    return is_below.astype(halves.dtype), _is_constant(is_below)


def _is_constant(array):
    return jnp.all(array == array[:, :1, :1], axis=(1, 2))


def _unless_nan(x, value):
    return jnp.where(jnp.any(jnp.isnan(x), axis=(1, 2)), jnp.nan, value)


def _smaller(a, b):
    return jnp.where(b < a, b, a)


def _beta_quantile(prob, a, b):
    """Quantile of Beta(a, b), by bisection to the last digit that counts."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        is_above = jax.scipy.special.betainc(a, b, middle) > prob
        return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high)

    ends = (jnp.zeros_like(a), jnp.ones_like(a))
    low, high = jax.lax.fori_loop(0, np.finfo(a.dtype).nmant + 4, halve, ends)
    return (low + high) / 2
