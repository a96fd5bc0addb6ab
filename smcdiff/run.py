"""The runner: one loop for every `SamplingAlgorithm`.

The loop is compiled in chunks of fixed length, and the host strings the chunks together: that is where the progress
bar lives and where kept samples move off the device. Arrays and numbers inside the algorithm (weights, step
sizes, measurements) are arguments of the compiled program, everything else is part of its key; hence a new model of
the same shape does not compile anew. Step number k uses the key fold_in(rng_key, k), so a result depends neither on
the chunk size nor on the progress bar.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from smcdiff.batching import batched_map
from smcdiff.checkpoints.progress import RunFolder, fingerprint
from smcdiff.checks import check_count, check_start

__all__ = ["Trace", "keep_position", "run", "to_host"]

_CHUNKS = 10  # of a run, unless the caller says how long they are: enough for a bar


class Trace(NamedTuple):
    """What a run returns.

    Attributes
    ----------
    samples
        What ``transform`` returned at every kept step, stacked; NumPy arrays with the leading axes
        (num_chains, num_kept).
    info
        The algorithm's own record of the same steps, stacked likewise.
    state
        The last state, with the leading axis (num_chains,); pass it to `run` to go on.
    """

    samples: PyTree
    info: PyTree
    state: PyTree


def keep_position(state: Any, info: Any) -> PyTree:
    """Keep ``state.position``: the transform for Markov chains."""
    return state.position


def run(
    rng_key: PRNGKeyArray,
    algorithm: SamplingAlgorithm,
    num_steps: int,
    *,
    position: PyTree = None,
    state: PyTree = None,
    num_chains: int = 1,
    transform: Callable[[Any, Any], PyTree] = keep_position,
    thin: int = 1,
    batch_size: int | None = None,
    chunk_size: int | None = None,
    checkpoint: str | Path | None = None,
    sharding: NamedSharding | None = None,
    progress: bool = True,
) -> Trace:
    """Run an algorithm, several independent chains side by side.

    Parameters
    ----------
    rng_key
        Key. Chain c uses fold_in(rng_key, c).
    algorithm
        Any BlackJAX-style pair of ``init(position, rng_key)`` and ``step(rng_key, state)``.
    num_steps
        Number of steps; a positive multiple of ``thin``.
    position
        Starting positions, a pytree with the leading axis (num_chains,); None for algorithms that draw their own.
    state
        State of an earlier run to go on from, instead of ``position``.
    num_chains
        Number of independent chains.
    transform
        ``transform(state, info)`` gives what to keep of a step; a module-level function.
    thin
        Keep every ``thin``-th step.
    batch_size
        How many chains are advanced together, or None for all. It bounds memory and changes no number but by rounding.
        On a CPU thousands of chains are up to twice as fast in batches of a few hundred, which its caches hold.
    chunk_size
        Kept steps per compiled chunk, after which they move off the device; about a tenth of the run if omitted. A
        last chunk that is shorter is a second program to compile.
    checkpoint
        Folder in which the run is saved after every chunk, and from which it goes on, with the same numbers to the
        last bit, if it was interrupted.
    sharding
        How the leading axes of the state lie over a mesh of devices: `NamedSharding(mesh, P("x"))` spreads the
        chains, `P(None, "x")` the particles of SMC. Arrays with fewer axes use the beginning of it.
    progress
        Whether to show a bar. It changes no number.

    Returns
    -------
    Trace

    Raises
    ------
    ValueError
        If a count is not a positive integer, if ``num_steps`` is no multiple of ``thin``, if both ``position`` and
        ``state`` are given, if a chain starts where its state is not finite (no density, no score), or if
        ``checkpoint`` holds another run.
    """
    check_count("num_steps", num_steps)
    check_count("num_chains", num_chains)
    check_count("thin", thin)
    check_count("chunk_size", chunk_size or 1)
    if num_steps % thin:
        raise ValueError(f"num_steps must be a multiple of thin, got {num_steps} and {thin}.")
    if position is not None and state is not None:
        raise ValueError("give position to start or state to go on, not both.")

    arrays, frozen = _split(algorithm)
    if state is None:
        state = _start(arrays, rng_key, position, frozen, num_chains, batch_size, sharding)
        if position is not None:
            check_start(state, "position")
    num_kept = num_steps // thin
    chunk_size = chunk_size or _default_chunk_size(num_kept)
    firsts = range(0, num_kept, chunk_size)
    counts = [min(chunk_size, num_kept - first) for first in firsts]

    def advance(program, chunk, state):
        first, count = firsts[chunk], counts[chunk]
        return program(
            arrays, rng_key, state, first, frozen, transform, thin, count, num_chains, batch_size, sharding
        )

    chunks: list[PyTree] = []
    if checkpoint is not None:
        counted = (num_steps, thin, chunk_size, num_chains)
        folder = RunFolder(checkpoint, fingerprint(algorithm, transform, rng_key, state, counted))
        kept = [advance(_chunk.eval_shape, chunk, state)[1] for chunk in range(len(counts))]
        state, chunks = folder.load(state, kept) or (state, [])
    with tqdm(
        total=num_steps, initial=sum(counts[: len(chunks)]) * thin, disable=not progress, leave=False
    ) as bar:

        def collect(chunk, state):
            chunks[chunk] = jax.tree.map(to_host, chunks[chunk])
            if checkpoint is not None:
                folder.save(chunk, jax.tree.map(to_host, state), chunks[chunk])
            bar.update(counts[chunk] * thin)

        waiting = None
        for chunk in range(len(chunks), len(counts)):
            state, outputs = advance(_chunk, chunk, state)
            chunks.append(outputs)
            if waiting is not None:  # only now, so that the device always has its next
                collect(*waiting)
            waiting = chunk, state
        if waiting is not None:
            collect(*waiting)
    samples, info = jax.tree.map(lambda *leaves: np.moveaxis(np.concatenate(leaves), 1, 0), *chunks)
    return Trace(samples, info, state)


def _default_chunk_size(num_kept):
    """About a tenth of the run, and such that all chunks are of one length, where a number of chunks allows it."""
    for num_chunks in (*range(_CHUNKS, 3 * _CHUNKS), *range(_CHUNKS - 1, 1, -1)):
        if num_kept % num_chunks == 0:
            return num_kept // num_chunks
    return math.ceil(num_kept / _CHUNKS)


class _Frozen(NamedTuple):
    """The part of an algorithm that is no array: hashable, a key of the compiled program."""

    leaves: tuple
    treedef: Any


def _split(algorithm):
    arrays, rest = eqx.partition(algorithm, lambda leaf: eqx.is_array_like(leaf))
    leaves, treedef = jax.tree.flatten(rest)
    return arrays, _Frozen(tuple(leaves), treedef)


def _join(arrays, frozen):
    return eqx.combine(arrays, jax.tree.unflatten(frozen.treedef, frozen.leaves))


def to_host(leaf: Any) -> Any:
    """The whole array, as NumPy's, also where parts of it lie on other hosts; random keys stay as they are."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf if _is_random_key(leaf) else np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def _is_random_key(leaf):
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _place(state, sharding):
    """Constrain each array of the state to as much of the sharding as it has axes for."""
    if sharding is None:
        return state

    # Whatever kind of axes the caller's mesh has, the compiler may move data as the algorithm needs.
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)

    def place(leaf):
        spec = PartitionSpec(*sharding.spec[: leaf.ndim])
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def _start_program(arrays, rng_key, position, frozen, num_chains, batch_size, sharding):
    algorithm = _join(arrays, frozen)
    keys = jax.vmap(lambda chain: jax.random.fold_in(rng_key, chain))(jnp.arange(num_chains))
    start = batched_map(lambda key, position: algorithm.init(position, key), batch_size)
    return _place(start(keys, position), sharding)


def _chunk_program(
    arrays, rng_key, state, first, frozen, transform, thin, count, num_chains, batch_size, sharding
):
    """``count`` kept steps, from kept step number ``first``."""
    algorithm = _join(arrays, frozen)
    keys = jax.vmap(lambda chain: jax.random.fold_in(rng_key, chain))(jnp.arange(num_chains))

    def one_step(state, k):
        step = batched_map(
            lambda key, state: algorithm.step(jax.random.fold_in(key, k + 1), state), batch_size
        )
        state, info = step(keys, state)
        return _place(state, sharding), info

    def kept_step(state, index):
        start = (first + index) * thin
        if thin == 1:
            state, info = one_step(state, start)
        else:  # the step stands in the program once, whose infos but the last are dropped
            info = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_step, state, start)[1])
            state, info = jax.lax.fori_loop(
                0, thin, lambda j, carry: one_step(carry[0], start + j), (state, info)
            )
        return state, (batched_map(transform, batch_size)(state, info), info)

    return jax.lax.scan(kept_step, _place(state, sharding), jnp.arange(count))


_start = jax.jit(_start_program, static_argnames=("frozen", "num_chains", "batch_size", "sharding"))
_chunk = jax.jit(
    _chunk_program,
    static_argnames=("frozen", "transform", "thin", "count", "num_chains", "batch_size", "sharding"),
)
