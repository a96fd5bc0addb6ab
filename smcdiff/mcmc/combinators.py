"""Kernels made of kernels on the same target: one of several at random, or all of them in turn.

If K_1, ..., K_m leave a density alone, so do the mixture sum_i w_i K_i and the cycle K_1 K_2 ... K_m. What the parts
carry beside the sample (log densities, momenta) differs between them and is not carried over: each starts anew at the
current sample by its own ``init``. That is right if what ``init`` makes of a sample is a function of it, or a draw from
its conditional law, like a momentum; it is wrong for kernels which tune themselves by what they carry.

Source: Tierney, "Markov chains for exploring posterior distributions", Annals of Statistics 22 (1994).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

__all__ = ["CycleInfo", "MixtureInfo", "PositionState", "cycle", "mixture"]


class PositionState(NamedTuple):
    """State of a kernel that carries nothing but the sample.

    Attributes
    ----------
    position
        The sample, an array or a pytree.
    is_start_valid
        Whether density and score of all parts are finite where the chain started.
    """

    position: PyTree
    is_start_valid: Bool[Array, ""] | bool = True


class MixtureInfo(NamedTuple):
    """What happened in one step of a mixture of kernels.

    Attributes
    ----------
    acceptance_rate
        Of the kernel that was chosen; 1 if it reports none.
    chosen
        Its index.
    is_divergent
        Whether it diverged; False if it reports none.
    """

    acceptance_rate: Float[Array, ""]
    chosen: Int[Array, ""]
    is_divergent: Bool[Array, ""]


class CycleInfo(NamedTuple):
    """What happened in one step of a cycle of kernels.

    Attributes
    ----------
    acceptance_rate
        Mean over the kernels; 1 counts for one that reports none.
    parts
        The info of each kernel, a tuple.
    """

    acceptance_rate: Float[Array, ""]
    parts: tuple


class _Mixture(eqx.Module):
    algorithms: tuple
    log_weights: Float[Array, " m"]


def mixture(algorithms: Sequence[SamplingAlgorithm], weights: Float[Array, " m"]) -> SamplingAlgorithm:
    """In each step, one of several kernels, drawn with fixed probabilities.

    Chains that are mapped together pay for all the kernels in every step, as `jax.vmap` evaluates all branches: use
    `cycle` there unless randomness matters.

    Parameters
    ----------
    algorithms
        Kernels on one target and one form of sample.
    weights
        Non-negative, not all zero, shape (m,); normalised here.

    Returns
    -------
    SamplingAlgorithm, with `PositionState` and `MixtureInfo`.

    Raises
    ------
    TypeError
        If a part is no `SamplingAlgorithm`.
    ValueError
        If there is none, or ``weights`` are not as described.

    Source: Tierney (1994).
    """
    parts = _checked("mixture", algorithms)
    if np.shape(weights) != (len(parts),):
        raise ValueError(f"weights must have the shape ({len(parts)},), got {np.shape(weights)}.")
    if not isinstance(weights, jax.core.Tracer):
        values = np.asarray(weights, float)
        if not (np.all(np.isfinite(values) & (values >= 0)) and values.sum() > 0):
            raise ValueError(f"weights must be non-negative and finite, and not all zero, got {weights}.")
    log_weights = jnp.log(jnp.asarray(weights, jnp.result_type(float)))
    kernel = _Mixture(parts, log_weights)
    return SamplingAlgorithm(Partial(_init, parts), Partial(_mixture_step, kernel))


def cycle(algorithms: Sequence[SamplingAlgorithm]) -> SamplingAlgorithm:
    """In each step, several kernels one after the other.

    Parameters
    ----------
    algorithms
        Kernels on one target and one form of sample, in order. The same one several times is repeated.

    Returns
    -------
    SamplingAlgorithm, with `PositionState` and `CycleInfo`.

    Raises
    ------
    TypeError
        If a part is no `SamplingAlgorithm`.
    ValueError
        If there is none.

    Source: Tierney (1994).
    """
    parts = _checked("cycle", algorithms)
    return SamplingAlgorithm(Partial(_init, parts), Partial(_cycle_step, parts))


def step_from(
    algorithm: SamplingAlgorithm, rng_key: PRNGKeyArray, position: PyTree
) -> tuple[PyTree, Any, Float[Array, ""]]:
    """One step of an algorithm from a position: the new position, its info and its acceptance rate (1 if unknown)."""
    key_init, key_step = jax.random.split(rng_key)
    state, info = algorithm.step(key_step, algorithm.init(position, key_init))
    rate = getattr(info, "acceptance_rate", 1.0)  # BlackJAX's slice and elliptical slice samplers have none
    return state.position, info, jnp.asarray(rate, jnp.result_type(float))


def can_start(algorithm: SamplingAlgorithm, rng_key: PRNGKeyArray, position: PyTree) -> Bool[Array, ""]:
    """Whether an algorithm knows a finite density and score at a position."""
    state = algorithm.init(position, rng_key)
    numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    is_finite = [jnp.all(jnp.isfinite(leaf)) for leaf in numbers]
    return functools.reduce(jnp.logical_and, is_finite, jnp.asarray(getattr(state, "is_start_valid", True)))


def has_diverged(info: Any) -> Bool[Array, ""]:
    """Whether a kernel, or a part of one, says so."""
    found = [jnp.any(info.is_divergent)] if hasattr(info, "is_divergent") else []
    found += [has_diverged(part) for part in getattr(info, "parts", ())]
    return functools.reduce(jnp.logical_or, found, jnp.zeros((), bool))


def _checked(who, algorithms):
    algorithms = tuple(algorithms)
    if not algorithms:
        raise ValueError(f"{who} needs at least one algorithm, got none.")
    for part in algorithms:
        if not isinstance(part, SamplingAlgorithm):
            raise TypeError(f"{who} needs SamplingAlgorithms, got {type(part).__name__}.")
    return algorithms


def _init(algorithms, position, rng_key):
    valid = [can_start(algorithm, rng_key, position) for algorithm in algorithms]
    return PositionState(position, functools.reduce(jnp.logical_and, valid))


def _mixture_step(kernel, rng_key, state):
    key_choice, key_step = jax.random.split(rng_key)
    chosen = jax.random.categorical(key_choice, kernel.log_weights)

    def branch(algorithm):
        def move(key, position):
            position, info, rate = step_from(algorithm, key, position)
            return position, rate, has_diverged(info)

        return move

    branches = [branch(algorithm) for algorithm in kernel.algorithms]
    position, rate, is_divergent = jax.lax.switch(chosen, branches, key_step, state.position)
    return state._replace(position=position), MixtureInfo(rate, chosen, is_divergent)


def _cycle_step(algorithms, rng_key, state):
    position, parts, rates = state.position, [], []
    for index, algorithm in enumerate(algorithms):
        position, info, rate = step_from(algorithm, jax.random.fold_in(rng_key, index), position)
        parts.append(info)
        rates.append(rate)
    return state._replace(position=position), CycleInfo(jnp.mean(jnp.stack(rates)), tuple(parts))
