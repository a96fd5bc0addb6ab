"""Parallel tempering: replicas on a ladder of densities, from the target to one that is easy, which change places.

The densities are those of a path at L levels, pi_j = path.at(levels[j]), the target first: the powers of a target, or
the noise levels of a diffusion whose log density is known. One step moves every replica by a kernel of its own level
and then proposes to swap neighbours j and k = j + 1, accepted with probability min(1, exp(gap_j + gap_k)),

    gap_j = log pi_j(T_kj x_k) - log pi_j(x_j),      gap_k = log pi_k(T_jk x_j) - log pi_k(x_k),

in which constants of each level cancel. T_jk x = (a_k / a_j) x, given ``scales`` a, keeps replicas in place where the
levels are scaled copies (alpha(t) of a diffusion); its Jacobians cancel, too. The pairs take turns: even j in one step,
odd j in the next. That order is not reversible and leaves the joint law alone: a replica that is accepted goes on in
its direction, and the time of a round trip grows with L and not with its square.

Where the rejection rates r_j of the pairs are small, their sum estimates the communication barrier, which is the same
for any ladder; the best rate of round trips is 1 / (2 + 2 barrier), and is reached when all rejection rates are equal
(`smcdiff.mcmc.tune_levels`).

Source: Syed, Bouchard-Cote, Deligiannidis and Doucet, "Non-Reversible Parallel Tempering: a Scalable Highly Parallel
MCMC Scheme", arXiv 1905.02939.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from smcdiff.checks import check_count, check_positive
from smcdiff.density import SCORE_KERNELS, DensityPath, HasLogDensity, as_pytree, require
from smcdiff.mcmc.combinators import can_start, has_diverged

__all__ = ["ParallelTemperingInfo", "ParallelTemperingState", "check_levels", "parallel_tempering"]


class ParallelTemperingState(NamedTuple):
    """State of parallel tempering. Level 0 is the target's.

    Attributes
    ----------
    position
        The sample at level 0, an array or a pytree.
    replicas
        The samples at all levels, like ``position`` with a leading axis (L,).
    replica
        Which replica is at each level, shape (L,); at the start they are in order.
    last_end
        Which end of the ladder the replica at each level saw last, shape (L,): 1 the target's, 2 the other one, having
        been at the target's before, 0 has never been at the target's.
    round_trips
        Number of times that a replica has been back at the target after the other end.
    step
        Number of steps; its parity tells which pairs are next.
    is_start_valid
        Whether density and score are finite at every level where the chain started.
    """

    position: PyTree
    replicas: PyTree
    replica: Int[Array, " L"]
    last_end: Int[Array, " L"]
    round_trips: Int[Array, ""]
    step: Int[Array, ""]
    is_start_valid: Bool[Array, ""]


class ParallelTemperingInfo(NamedTuple):
    """What happened in one step of parallel tempering.

    Attributes
    ----------
    acceptance_rate
        Of the kernel at level 0.
    level_acceptance_rate
        Of the kernel at each level, shape (L,).
    swap_probability
        Probability with which pair (j, j + 1) was swapped, shape (L - 1,); 0 where it was not its turn.
    is_tried
        Whose turn it was, shape (L - 1,). The acceptance rate of a pair is the sum of ``swap_probability`` over that
        of ``is_tried``.
    is_swapped
        Which pairs changed places, shape (L - 1,).
    replica
        Which replica is now at each level, shape (L,).
    round_trips
        Their number so far.
    num_swap_evaluations
        Log densities evaluated for the swaps, 2 L; the kernels' evaluations are on top of it.
    is_divergent
        Whether the kernel of a level diverged.
    """

    acceptance_rate: Float[Array, ""]
    level_acceptance_rate: Float[Array, " L"]
    swap_probability: Float[Array, " pairs"]
    is_tried: Bool[Array, " pairs"]
    is_swapped: Bool[Array, " pairs"]
    replica: Int[Array, " L"]
    round_trips: Int[Array, ""]
    num_swap_evaluations: int
    is_divergent: Bool[Array, ""]


class _Tempering(eqx.Module):
    path: DensityPath
    levels: Float[Array, " L"]
    kernel: Callable
    settings: PyTree
    scales: Float[Array, " L"] | None
    draw_last: Callable | None
    num_explore: int = eqx.field(static=True)

    def algorithm(self, level, setting):
        return self.kernel(self.path.at(level), setting)


def parallel_tempering(
    path: DensityPath,
    levels: Float[Array, " L"],
    kernel: Callable[[Any, Any], SamplingAlgorithm],
    settings: PyTree,
    *,
    num_explore: int = 1,
    scales: Float[Array, " L"] | None = None,
    draw_last: Callable[[PRNGKeyArray], PyTree] | None = None,
) -> SamplingAlgorithm:
    """Non-reversible parallel tempering: swaps of even and of odd pairs in turn.

    Parameters
    ----------
    path
        ``path.at(level)`` is a density with a log density: `smcdiff.mcmc.tempered` for powers, or an exact diffusion
        model or composition for noise levels.
    levels
        The target's level first, strictly monotone, shape (L,), L >= 2: for powers from 1 down, for noise from 0 up.
    kernel
        ``kernel(density, setting)`` returns the algorithm that explores one level, for instance `smcdiff.mcmc.mala`
        itself. It starts anew at its replica in each step, so that its state must be a matter of the position.
    settings
        What each level's kernel gets, for instance step sizes (L,): a pytree with leading axes (L,).
    num_explore
        Steps of the kernels between swaps.
    scales
        Positive, shape (L,): a sample that moves from level j to k is multiplied by scales[k] / scales[j]. For noise
        levels ``schedule.alpha(levels)``, as long as it is not close to zero; for powers nothing.
    draw_last
        ``draw_last(rng_key)`` draws exactly from the density of the last level; it replaces what the kernel did there.

    Returns
    -------
    SamplingAlgorithm, with `ParallelTemperingState` and `ParallelTemperingInfo`. All replicas start at the position.

    Raises
    ------
    TypeError
        If the path's densities have no log density.
    ValueError
        If a number is out of range, or a leading axis is not that of ``levels``.

    Source: Syed et al., "Non-Reversible Parallel Tempering", arXiv 1905.02939.
    """
    check_count("num_explore", num_explore)
    levels = check_levels(levels)
    if scales is not None:
        check_positive("scales", scales)
        scales = jnp.asarray(scales)
    for name, value in (("settings", settings), ("scales", scales)):
        for leaf in jax.tree.leaves(value):
            if jnp.shape(leaf)[:1] != levels.shape:
                raise ValueError(
                    f"{name} must have the leading axis of levels, {levels.size}, got shape {jnp.shape(leaf)}."
                )
    require(path.at(levels[0]), HasLogDensity, "parallel_tempering", SCORE_KERNELS)
    for j in range(levels.size):  # where they are numbers still, so that the kernels look at their settings
        kernel(path.at(levels[j]), jax.tree.map(lambda leaf, j=j: leaf[j], settings))
    ladder = _Tempering(path, levels, as_pytree(kernel), settings, scales, as_pytree(draw_last), num_explore)
    return SamplingAlgorithm(Partial(_init, ladder), Partial(_step, ladder))


def check_levels(levels: Any) -> Float[Array, " L"]:
    """The levels as an array; raise a `ValueError` unless they are two or more and strictly monotone."""
    levels = jnp.asarray(levels)
    if levels.ndim != 1 or levels.size < 2:
        raise ValueError(f"levels must have the shape (L,), L >= 2, got {levels.shape}.")
    if not isinstance(levels, jax.core.Tracer):
        gaps = np.diff(np.asarray(levels))
        if not (np.all(gaps > 0) or np.all(gaps < 0)):
            raise ValueError(f"levels must rise or fall strictly, from the target's, got {levels}.")
    return levels


def _init(ladder, position, rng_key):
    """All replicas at the start."""
    num = ladder.levels.size
    replicas = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *jnp.shape(leaf))), position)
    last_end = jnp.zeros(num, jnp.int32).at[0].set(1)
    zero = jnp.zeros((), jnp.int32)
    valid = jax.vmap(lambda *each: can_start(ladder.algorithm(*each), rng_key, position))(
        ladder.levels, ladder.settings
    )
    replica = jnp.arange(num, dtype=jnp.int32)
    return ParallelTemperingState(position, replicas, replica, last_end, zero, zero, jnp.all(valid))


def _step(ladder, rng_key, state):
    """Explore every level, then swap the even or the odd pairs, then keep the books."""
    num = ladder.levels.size
    key_explore, key_swap, key_last = jax.random.split(rng_key, 3)
    keys = jax.random.split(key_explore, num)
    explore = jax.vmap(lambda *arguments: _explore(ladder, *arguments))
    replicas, level_acceptance, is_divergent = explore(ladder.levels, ladder.settings, state.replicas, keys)
    if ladder.draw_last is not None:
        last = ladder.draw_last(key_last)
        replicas = jax.tree.map(lambda leaf, new: leaf.at[-1].set(new), replicas, last)

    partner, is_tried = _partners(num, state.step)
    moved, gaps = _moved_and_gaps(ladder, replicas, partner)
    log_ratio = gaps[:-1] + gaps[1:]
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    probability = jnp.where(is_tried, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    is_swapped = jax.random.uniform(key_swap, (num - 1,), probability.dtype) < probability
    changes = jnp.pad(is_swapped, (0, 1)) | jnp.pad(is_swapped, (1, 0))
    source = jnp.where(changes, partner, jnp.arange(num, dtype=jnp.int32))

    replicas = jax.tree.map(
        lambda new, old: jnp.where(changes.reshape(-1, *[1] * (old.ndim - 1)), new, old), moved, replicas
    )
    replica = state.replica[source]
    last_end, trips = _count(state.last_end[source])
    round_trips = state.round_trips + trips
    info = ParallelTemperingInfo(
        level_acceptance[0],
        level_acceptance,
        probability,
        is_tried,
        is_swapped,
        replica,
        round_trips,
        2 * num,
        jnp.any(is_divergent),
    )
    position = jax.tree.map(lambda leaf: leaf[0], replicas)
    return state._replace(
        position=position,
        replicas=replicas,
        replica=replica,
        last_end=last_end,
        round_trips=round_trips,
        step=state.step + 1,
    ), info


def _explore(ladder, level, setting, x, rng_key):
    """``num_explore`` steps of one level's kernel, its mean acceptance rate, and whether it diverged."""
    algorithm = ladder.algorithm(level, setting)
    key_init, key_steps = jax.random.split(rng_key)

    def one_step(carry, k):
        state, info = algorithm.step(jax.random.fold_in(key_steps, k), carry)
        return state, (info.acceptance_rate, has_diverged(info))

    state = algorithm.init(x, key_init)
    if ladder.num_explore == 1:
        state, (rate, is_divergent) = one_step(state, 0)
        return state.position, rate, is_divergent
    state, (rates, is_divergent) = jax.lax.scan(one_step, state, jnp.arange(ladder.num_explore))
    return state.position, jnp.mean(rates), jnp.any(is_divergent)


def _partners(num, step):
    """With whom each level may swap in a step, itself if with none, and which pairs try."""
    pair = jnp.arange(num - 1, dtype=jnp.int32)
    is_tried = (pair + step) % 2 == 0
    up, down = jnp.pad(is_tried, (0, 1)), jnp.pad(is_tried, (1, 0))
    return jnp.arange(num, dtype=jnp.int32) + up.astype(jnp.int32) - down.astype(jnp.int32), is_tried


def _moved_and_gaps(ladder, replicas, partner):
    """What each level would get of its partner, and how much likelier that is there than what it has."""
    moved = jax.tree.map(lambda leaf: leaf[partner], replicas)
    if ladder.scales is not None:
        ratio = ladder.scales / ladder.scales[partner]
        moved = jax.vmap(lambda r, x: jax.tree.map(lambda leaf: r.astype(leaf.dtype) * leaf, x))(ratio, moved)

    def gap(level, new, old):
        density = ladder.path.at(level)
        return density.logdensity(new) - density.logdensity(old)

    return moved, jax.vmap(gap)(ladder.levels, moved, replicas)


def _count(last_end):
    """Renew the ends last seen; also the round trips that are completed now."""
    trips = (last_end[0] == 2).astype(jnp.int32)
    first = jnp.ones((), jnp.int32)
    last = jnp.where(last_end[-1] == 1, 2, last_end[-1]).astype(jnp.int32)
    return last_end.at[0].set(first).at[-1].set(last), trips
