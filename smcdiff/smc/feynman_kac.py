"""Feynman-Kac models, and the one SMC loop that runs them all.

A `FeynmanKac` model is an initial law and a sequence of steps, each of which moves a particle AND weighs it (the
two share the expensive network call, so they are one function). It defines unnormalised path laws

    Gamma_k(x_{0:k}) = M_0(x_0) G_0(x_0) prod_{j<=k} M_j(x_j | x_{j-1}) G_j(x_{j-1}, x_j),

and its evidence, the integral of the last one. `smc` turns it into a `SamplingAlgorithm` whose step resamples if
the effective sample size has fallen below a threshold, then moves and weighs every particle. The weights belong to
the state: they are carried until a resampling resets them, and the final ones are there to be used. The estimate
of the evidence, exp(log_evidence), is unbiased for any number of particles. Markov moves that leave the target alone
may follow every step; they renew the particles and change neither weights nor evidence.

Sources: Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006); Chopin and
Papaspiliopoulos, "An Introduction to Sequential Monte Carlo", Springer (2020).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from smcdiff.batching import batched_map
from smcdiff.smc.resampling import ResamplingFn, resample_from_log_weights, systematic
from smcdiff.smc.weights import (
    check_ess_threshold,
    effective_sample_size,
    is_uneven,
    reweigh,
    uniform_log_weights,
)

__all__ = ["FeynmanKac", "Innovations", "Move", "SMCInfo", "SMCState", "repeat", "smc"]


class Innovations(eqx.Module):
    """A whole path of a Feynman-Kac model as a function of standard normal noise.

    Parameters
    ----------
    drive
        ``drive(noise) -> (particle, log_weight)``: the last particle of the path that ``noise`` drives, with all its
        increments in one weight; under N(0, I) it has the law of ``init`` and all moves of ``step``.
    shape
        Shape of the noise.
    """

    drive: Callable
    shape: tuple[int, ...] = eqx.field(static=True)


class FeynmanKac(eqx.Module):
    """A sequence of weighted moves of one particle.

    Parameters
    ----------
    init
        ``init(rng_key) -> (particle, log_weight)``: draws one particle (any pytree).
    step
        ``step(rng_key, particle, k) -> (particle, log_weight_increment)``: move number k = 0, 1, ..., num_steps - 1.
    num_steps
        Number of moves.
    log_transition
        ``log_transition(particle_from, particle_to, k) -> (log_density, log_weight_increment)`` of move k, or None.
        `smcdiff.smc.particle_gibbs` draws backward with it. A move that has no density, such as a noiseless one, says
        minus infinity.
    retrace
        ``retrace(x) -> (particles, log_weight_increments)`` of a whole path of bare samples, or None: the particles as
        this model carries them, and its weights, each with the leading axis num_steps + 1. A trajectory of one model
        becomes that of another with the same moves, as Gibbs sampling needs whose likelihood has changed.
    innovations
        The path as a function of its noise, or None; `smcdiff.ppl.noncenter` samples the noise.

    Make ``init`` and ``step`` `jax.tree_util.Partial`s of module-level functions, so that what they hold (weights,
    measurements, times) are leaves of the model and a compiled program can be used again.
    """

    init: Callable
    step: Callable
    num_steps: int = eqx.field(static=True)
    log_transition: Callable | None = None
    retrace: Callable | None = None
    innovations: Innovations | None = None


class SMCState(NamedTuple):
    """A weighted cloud of particles.

    Attributes
    ----------
    particles
        Pytree with leading axis N.
    log_weights
        Normalised log weights, shape (N,).
    log_evidence
        Log of the unbiased estimate of the evidence so far.
    step
        Number of steps made.
    tuning
        Settings of the Markov moves of the next step, see `Move`; None without moves.
    """

    particles: PyTree
    log_weights: Float[Array, " N"]
    log_evidence: Float[Array, ""]
    step: Int[Array, ""]
    tuning: PyTree = None


class SMCInfo(NamedTuple):
    """What happened in one step of SMC.

    Attributes
    ----------
    ess
        Effective sample size of the weights after the step, between 1 and N.
    resampled
        Whether the particles were resampled before they moved.
    ancestors
        Index of each particle's parent, shape (N,); 0, 1, ..., N - 1 where there was no resampling.
    log_evidence_increment
        What the step added to the log evidence.
    num_invalid
        Number of particles whose weight came out NaN or plus infinity; they were given weight zero.
    move_info
        What the moves after the step reported, averaged over particles and moves; None without moves.
    """

    ess: Float[Array, ""]
    resampled: Bool[Array, ""]
    ancestors: Int[Array, " N"]
    log_evidence_increment: Float[Array, ""]
    num_invalid: Int[Array, ""]
    move_info: PyTree = None


class Move(eqx.Module):
    """Markov moves of one particle between the steps of SMC, with settings that are tuned from the cloud.

    Parameters
    ----------
    apply
        ``apply(tuning, rng_key, particle, k, num_moves) -> (particle, info)``: makes ``num_moves`` moves that leave
        invariant what the particles target after step k, whatever ``tuning``; info is a pytree of numbers, averaged
        over the moves.
    tuning
        The first settings, any pytree.
    retune
        ``retune(tuning, info) -> tuning`` for the next step, from the info averaged over particles; None
        keeps the settings. Settings that depend on the cloud make the evidence estimate consistent instead of
        unbiased.
    """

    apply: Callable
    tuning: PyTree = None
    retune: Callable | None = None

    def __call__(self, rng_key, particle, k):
        """One move with the first settings."""
        return self.apply(self.tuning, rng_key, particle, k, 1)


class _Sampler(eqx.Module):
    fk: FeynmanKac
    ess_threshold: float | Float[Array, " steps"]
    move: Move | None
    num_particles: int = eqx.field(static=True)
    resampling_fn: ResamplingFn = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)
    num_moves: int = eqx.field(static=True)


def smc(
    fk: FeynmanKac,
    num_particles: int,
    *,
    resampling_fn: ResamplingFn = systematic,
    ess_threshold: float | Float[Array, " steps"] = 0.5,
    batch_size: int | None = None,
    move: Move | Callable | None = None,
    num_moves: int = 1,
) -> SamplingAlgorithm:
    """Sequential Monte Carlo on a Feynman-Kac model, as a BlackJAX `SamplingAlgorithm`.

    ``init(position, rng_key)`` ignores its position (particles are drawn by the model); ``step(rng_key, state)``
    returns ``(SMCState, SMCInfo)`` and is to be called ``fk.num_steps`` times, which `smcdiff.run_smc` does.

    Parameters
    ----------
    fk
        The Feynman-Kac model.
    num_particles
        Number of particles N, at least 1.
    resampling_fn
        Resampling scheme on normalised weights; see `smcdiff.smc.resampling`.
    ess_threshold
        Resample when the effective sample size falls below this fraction of N: 0 never, 1 (almost) always. An array
        (num_steps,) has one for each step, so that zeros and ones are a fixed schedule, and zeros outside some steps
        confine resampling to them.
    batch_size
        Particles moved together; bounds memory and changes no result.
    move
        A `Move`, for instance from `smcdiff.smc.moves`, or a function ``move(rng_key, particle, k) -> (particle,
        info)``: a Markov move that leaves invariant what the particles target after step k; info is a pytree of
        numbers. Nothing can check the invariance: a move that lacks it biases the result.
    num_moves
        Moves after every step.

    Raises
    ------
    ValueError
        If ``num_particles`` or ``num_moves`` is not a positive integer, or ``ess_threshold`` lies outside [0, 1] or has
        another shape than () or (num_steps,).

    Source: Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
    """
    for name, value in (("num_particles", num_particles), ("num_moves", num_moves)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    check_ess_threshold(ess_threshold, fk.num_steps)
    if not (move is None or isinstance(move, Move)):
        move = Move(Partial(_untuned, move))
    sampler = _Sampler(fk, ess_threshold, move, num_particles, resampling_fn, batch_size, num_moves)
    return SamplingAlgorithm(Partial(_init, sampler), Partial(_step, sampler))


def _init(sampler, position, rng_key):
    """Draw the initial cloud; ``position`` is unused."""
    del position
    particles, increments = batched_map(sampler.fk.init, sampler.batch_size)(_keys(rng_key, sampler))
    uniform = uniform_log_weights(sampler.num_particles, increments.dtype)
    log_weights, increment, _ = reweigh(uniform, increments)
    # Numbers become arrays of a definite type, as those are that the steps return.
    settings = None if sampler.move is None else sampler.move.tuning
    tuning = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), settings)
    return SMCState(particles, log_weights, increment, jnp.zeros((), jnp.int32), tuning)


def _step(sampler, rng_key, state):
    """Resample if the weights are uneven, then move and weigh every particle, then rejuvenate."""
    key_resample, key_move = jax.random.split(rng_key)
    num_particles = sampler.num_particles
    identity, uniform = (
        jnp.arange(num_particles, dtype=jnp.int32),
        uniform_log_weights(num_particles, state.log_weights.dtype),
    )

    def resample(particles):
        ancestors = resample_from_log_weights(
            sampler.resampling_fn, key_resample, state.log_weights, num_particles
        )
        ancestors = ancestors.astype(jnp.int32)
        return jax.tree.map(lambda leaf: leaf[ancestors], particles), uniform, ancestors

    def keep(particles):
        return particles, state.log_weights, identity

    resampled = is_uneven(state.log_weights, sampler.ess_threshold, state.step)
    particles, log_weights, ancestors = jax.lax.cond(resampled, resample, keep, state.particles)

    def move(key, particle):
        return sampler.fk.step(key, particle, state.step)

    particles, increments = batched_map(move, sampler.batch_size)(_keys(key_move, sampler), particles)
    log_weights, increment, num_invalid = reweigh(log_weights, increments)
    particles, move_info, tuning = _rejuvenate(sampler, key_move, particles, state)
    ess = effective_sample_size(log_weights)
    info = SMCInfo(ess, resampled, ancestors, increment, num_invalid, move_info)
    return SMCState(particles, log_weights, state.log_evidence + increment, state.step + 1, tuning), info


def _rejuvenate(sampler, key_move, particles, state):
    """Apply the Markov moves to every particle; returns them, the average of what the moves reported, and settings."""
    if sampler.move is None:
        return particles, None, None

    def moves(key, particle):
        return sampler.move.apply(state.tuning, key, particle, state.step, sampler.num_moves)

    # Keys 0, ..., N - 1 of key_move made the step itself.
    keys = _keys(jax.random.fold_in(key_move, sampler.num_particles), sampler)
    particles, infos = batched_map(moves, sampler.batch_size)(keys, particles)
    info = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), infos)
    retune = sampler.move.retune
    return particles, info, state.tuning if retune is None else retune(state.tuning, info)


def repeat(step: Callable, rng_key: PRNGKeyArray, state: PyTree, num_steps: int) -> tuple[PyTree, PyTree]:
    """Make steps ``step(rng_key, state) -> (state, info)``, each with a key of its own; infos are averaged."""

    def one_step(state, index):
        return step(jax.random.fold_in(rng_key, index), state)

    state, infos = jax.lax.scan(one_step, state, jnp.arange(num_steps))
    return state, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), infos)


def _untuned(move, tuning, rng_key, particle, k, num_moves):
    return repeat(lambda key, particle: move(key, particle, k), rng_key, particle, num_moves)


def _keys(rng_key, sampler):
    """One key a particle, by index, so that results do not depend on how particles are batched."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(sampler.num_particles))
