"""Chains that start from exact draws: what `check_invariance` and `check_detailed_balance` compare."""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

__all__ = ["Evolved", "evolve"]


class Evolved(NamedTuple):
    """Where chains ended, and how they moved.

    Attributes
    ----------
    position
        Last positions, with the leading axis (num_chains,).
    acceptance_rate
        Mean acceptance rate of each chain, (num_chains,); NaN where the kernel reports none.
    moved
        Whether the last position differs from the first, (num_chains,).
    """

    position: PyTree
    acceptance_rate: Float[Array, " chains"]
    moved: Float[Array, " chains"]


@runtime_checkable
class _HasRate(Protocol):
    """An info that reports an acceptance rate."""

    acceptance_rate: Any


def evolve(rng_key: PRNGKeyArray, algorithm: Any, positions: PyTree, num_steps: int) -> Evolved:
    """Run one chain from each position.

    Parameters
    ----------
    rng_key
        Key. Chain c uses fold_in(rng_key, c).
    algorithm
        A pair of ``init(position, rng_key)`` and ``step(rng_key, state)``. Its arrays and numbers are arguments of the
        compiled program.
    positions
        Starting positions, a pytree with the leading axis (num_chains,).
    num_steps
        Steps of each chain.
    """
    leaves, treedef = jax.tree.flatten(algorithm)
    is_array = tuple(eqx.is_array_like(leaf) for leaf in leaves)
    arrays = [leaf for leaf, is_one in zip(leaves, is_array, strict=True) if is_one]
    others = tuple(leaf for leaf, is_one in zip(leaves, is_array, strict=True) if not is_one)
    return _evolve(rng_key, arrays, positions, others, is_array, treedef, num_steps)


@functools.partial(jax.jit, static_argnames=("others", "is_array", "treedef"))
def _evolve(rng_key, arrays, positions, others, is_array, treedef, num_steps):
    remaining, fixed = iter(arrays), iter(others)
    leaves = [next(remaining) if is_one else next(fixed) for is_one in is_array]
    algorithm = jax.tree.unflatten(treedef, leaves)

    def chain(index, position):
        key = jax.random.fold_in(rng_key, index)
        state = algorithm.init(position, jax.random.fold_in(key, num_steps))

        def step(k, carry):
            state, total = carry
            state, info = algorithm.step(jax.random.fold_in(key, k), state)
            rate = info.acceptance_rate if isinstance(info, _HasRate) else jnp.nan
            return state, total + jnp.asarray(rate, total.dtype)

        # A loop of any length is one program.
        state, total = jax.lax.fori_loop(0, num_steps, step, (state, jnp.zeros(())))
        differs = jax.tree.map(lambda a, b: jnp.any(a != b), state.position, position)
        return Evolved(state.position, total / num_steps, jnp.any(jnp.stack(jax.tree.leaves(differs))))

    num_chains = len(jax.tree.leaves(positions)[0])
    return jax.vmap(chain)(jnp.arange(num_chains), positions)
