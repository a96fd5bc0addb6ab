"""Ladders for parallel tempering: the powers of a density, and levels between which swaps are equally hard.

With r_j the rejection rates of the swaps between neighbouring levels, the sums r_0 + ... + r_{j-1} estimate a function
of the level that does not depend on the ladder, the cumulative communication barrier. Levels at equal distances of it
have equal rejection rates, which is the best ladder of their number; a number of about 2 barrier + 1 is the best use of
a given number of processors.

Source: Syed, Bouchard-Cote, Deligiannidis and Doucet, "Non-Reversible Parallel Tempering: a Scalable Highly Parallel
MCMC Scheme", arXiv 1905.02939, sections 4 and 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from scipy.interpolate import PchipInterpolator

from smcdiff.checks import check_count, check_start
from smcdiff.density import SCORE_KERNELS, DensityPath, HasLogDensity, HasScore, as_target, require
from smcdiff.mcmc.tempering import ParallelTemperingState, check_levels, parallel_tempering

__all__ = ["TemperedPath", "TunedLevels", "equal_rejection_levels", "tempered", "tune_levels"]

_LEAST_REJECTION = 1e-3  # so that levels between which all is swapped stay apart


class _Power(eqx.Module):
    """reference^(1 - beta) target^beta, at one beta."""

    target: Any
    reference: Any
    beta: Float[Array, ""]

    def logdensity(self, x: PyTree) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to a constant."""
        value = self.beta * self.target.logdensity(x)
        return value if self.reference is None else value + (1.0 - self.beta) * self.reference.logdensity(x)

    def score(self, x: PyTree) -> PyTree:
        """Gradient of the log density at one sample ``x``."""
        score = jax.tree.map(lambda s: self.beta * s, self.target.score(x))
        if self.reference is None:
            return score
        return jax.tree.map(lambda s, r: s + (1.0 - self.beta) * r, score, self.reference.score(x))


class TemperedPath(eqx.Module):
    """The path of a density's powers, reference^(1 - beta) target^beta; build it with `tempered`."""

    target: Any
    reference: Any

    def at(self, t: Float[Array, ""]) -> HasScore:
        """The density of inverse temperature ``t``: the target at 1, the reference at 0."""
        return _Power(self.target, self.reference, t)


def tempered(target: Any, reference: Any = None) -> TemperedPath:
    """The powers of a target as a path over the inverse temperature.

    Parameters
    ----------
    target
        A log density function, or an object with a log density.
    reference
        The same, for beta = 0: a broad density which covers the target's modes. Without it the powers are target^beta,
        which have a finite integral for positive beta only, and not even then for heavy tails.

    Returns
    -------
    TemperedPath, for `parallel_tempering`.

    Raises
    ------
    TypeError
        If one of them has no log density.
    """
    parts = [as_target(part) for part in ([target] if reference is None else [target, reference])]
    for part in parts:
        require(part, HasLogDensity, "tempered", SCORE_KERNELS)
    return TemperedPath(parts[0], parts[1] if len(parts) == 2 else None)


class TunedLevels(NamedTuple):
    """A ladder with equal rejection rates, as `tune_levels` returns it.

    Attributes
    ----------
    levels
        New levels, shape (L,), with the ends that were given.
    settings
        The settings at these levels, interpolated.
    scales
        The scales at these levels, interpolated, or None.
    rejection_rates
        Of the pairs in the last round, shape (L - 1,): on the ladder before its last change.
    barrier
        Their sum, the estimate of the communication barrier.
    states
        States at the end, with the leading axis (num_chains,).
    """

    levels: Float[Array, " L"]
    settings: PyTree
    scales: Float[Array, " L"] | None
    rejection_rates: Float[np.ndarray, " pairs"]
    barrier: float
    states: ParallelTemperingState


def equal_rejection_levels(
    levels: Float[Array, " L"], rejection_rates: Float[Array, " pairs"], num_levels: int | None = None
) -> Float[Array, " new"]:
    """Levels between which swaps are rejected equally often, from the rates on another ladder.

    Computed on the host: monotone cubic interpolation of the level over the cumulative barrier.

    Parameters
    ----------
    levels
        Strictly monotone, shape (L,).
    rejection_rates
        Of the swaps between neighbours, in [0, 1], shape (L - 1,).
    num_levels
        How many, as many as before if omitted; about 2 sum(rejection_rates) + 1 is a good number.

    Raises
    ------
    ValueError
        If a shape or number is out of range.

    Source: arXiv 1905.02939, algorithm 3.
    """
    levels = check_levels(levels)
    rates = np.asarray(rejection_rates, float)
    if rates.shape != (levels.size - 1,) or not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(
            f"rejection_rates must lie in [0, 1] and have the shape ({levels.size - 1},), got {rejection_rates}."
        )
    num_levels = levels.size if num_levels is None else num_levels
    check_count("num_levels", num_levels - 1)
    barrier = np.concatenate([[0.0], np.cumsum(np.maximum(rates, _LEAST_REJECTION))])
    wanted = np.linspace(0.0, barrier[-1], num_levels)
    new = PchipInterpolator(barrier, np.asarray(levels, float))(wanted)
    new[0], new[-1] = levels[0], levels[-1]
    return jnp.asarray(new, levels.dtype)


def tune_levels(
    rng_key: PRNGKeyArray,
    path: DensityPath,
    levels: Float[Array, " L"],
    kernel: Callable[[Any, Any], SamplingAlgorithm],
    settings: PyTree,
    positions: PyTree,
    *,
    num_rounds: int = 5,
    num_steps: int = 50,
    num_explore: int = 1,
    scales: Float[Array, " L"] | None = None,
    draw_last: Callable[[PRNGKeyArray], PyTree] | None = None,
) -> TunedLevels:
    """Pilot runs of parallel tempering, each on levels spaced by the rejection rates of the one before.

    Round k has 2^k ``num_steps`` steps. The program is compiled once.

    Parameters
    ----------
    path, levels, kernel, settings, num_explore, scales, draw_last
        As in `smcdiff.mcmc.parallel_tempering`; ``settings`` and ``scales`` are interpolated in the level.
    positions
        Starting positions, a pytree with the leading axis (num_chains,); the chains share the ladder.
    num_rounds
        Rounds.
    num_steps
        Steps of the first round.

    Returns
    -------
    TunedLevels

    Raises
    ------
    TypeError, ValueError
        As `smcdiff.mcmc.parallel_tempering`; if a chain starts where its state is not finite.

    Source: arXiv 1905.02939, algorithm 4.
    """
    check_count("num_rounds", num_rounds)
    check_count("num_steps", num_steps)
    levels = check_levels(levels)
    build = partial(parallel_tempering, path, kernel=kernel, num_explore=num_explore, draw_last=draw_last)
    algorithm = build(levels=levels, settings=settings, scales=scales)
    states = _start(algorithm, rng_key, positions)
    check_start(states, "positions")
    for round_index in range(num_rounds):
        key_round = jax.random.fold_in(rng_key, round_index)
        sums = np.zeros((2, levels.size - 1))
        for part in range(2**round_index):
            states, new_sums = _pilot(algorithm, jax.random.fold_in(key_round, part), states, num_steps)
            sums += np.asarray(new_sums)
        rejection_rates = np.clip(1.0 - sums[0] / np.maximum(sums[1], 1.0), 0.0, 1.0)
        new = equal_rejection_levels(levels, rejection_rates)
        settings, scales = _interpolate(levels, new, (settings, scales))
        levels = new
        algorithm = build(levels=levels, settings=settings, scales=scales)
    return TunedLevels(levels, settings, scales, rejection_rates, float(rejection_rates.sum()), states)


@eqx.filter_jit
def _start(algorithm, rng_key, positions):
    keys = jax.random.split(rng_key, len(jax.tree.leaves(positions)[0]))
    return jax.vmap(algorithm.init)(positions, keys)


@eqx.filter_jit
def _pilot(algorithm, rng_key, states, num_steps):
    """``num_steps`` steps, and the sums of swap probabilities and of tries over steps and chains, shape (2, L - 1)."""

    def one_step(carry, k):
        states, sums = carry
        keys = jax.random.split(jax.random.fold_in(rng_key, k), states.step.size)
        states, info = jax.vmap(algorithm.step)(keys, states)
        new = jnp.stack([info.swap_probability, info.is_tried.astype(info.swap_probability.dtype)], axis=1)
        return (states, sums + jnp.sum(new, axis=0)), None

    pairs = states.replica.shape[1] - 1
    sums = jnp.zeros((2, pairs))
    return jax.lax.scan(one_step, (states, sums), jnp.arange(num_steps))[0]


def _interpolate(levels, new, tree):
    """Every leaf (L, ...) at new levels, linearly."""
    old, new = np.asarray(levels, float), np.asarray(new, float)
    order = np.argsort(old)

    def one(leaf):
        columns = np.asarray(leaf, float)[order].reshape(len(old), -1).T
        values = np.stack([np.interp(new, old[order], column) for column in columns], axis=1)
        return jnp.asarray(values.reshape(jnp.shape(leaf)), jnp.asarray(leaf).dtype)

    return jax.tree.map(one, tree)
