"""Particle Gibbs: a Markov chain over whole trajectories of a Feynman-Kac model, by conditional SMC.

Conditional SMC runs N particles of which the first is pinned to a given trajectory: it is not moved, it survives
every resampling, and it counts in all weights. A new trajectory drawn from that cloud leaves the path law

    pi(x_{0:n}) = M_0(x_0) G_0(x_0) prod_{k<=n} M_k(x_k | x_{k-1}) G_k(x_{k-1}, x_k) / Z

invariant for every N >= 2; more particles only make the chain forget faster. A model moves and weighs at once, so a
trajectory that is not to be moved carries its weight increments log G_k with it: that is a `Trajectory`.

The last particle is drawn by its weight W_n. The rest is either its ancestors, which after many resamplings are those
of the pinned one, or drawn backward, from k = n - 1 to 0 and among all particles of that time,

    P(x_k = x_k^i) proportional to W_k^i M_{k+1}(x_{k+1} | x_k^i) G_{k+1}(x_k^i, x_{k+1}),

for which the model has to know its densities: `FeynmanKac.log_transition`. W_k are the carried weights of an SMC which
resamples only when the effective sample size has fallen. Both remain exact then: the pinned particle takes part in
the decision, and a backward draw is from the law of x_k given the cloud until k and the new trajectory after k, in
which the rest of the cloud, and hence whether it was resampled, does not appear.

Resampling must be conditional on the survival of the first particle, and only for some schemes is that law known.
`conditional_systematic` takes a uniform point of the first particle's share of the circle of weights, and the N - 1
others at equal distances from it: systematic resampling whose slots are counted from there.

Sources: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010), with the
discussion by Whiteley (backward draws); Chopin and Singh, "On particle Gibbs sampling", arXiv 1304.1887 (systematic).
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
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.resampling import owners
from smcdiff.smc.weights import (
    check_ess_threshold,
    effective_sample_size,
    is_uneven,
    reweigh,
    uniform_log_weights,
)

__all__ = [
    "ParticleGibbsInfo",
    "ParticleGibbsState",
    "Trajectory",
    "conditional_multinomial",
    "conditional_systematic",
    "particle_gibbs",
]

ConditionalResamplingFn = Callable[[PRNGKeyArray, Float[Array, " N"]], Int[Array, " N"]]


class Trajectory(NamedTuple):
    """A path of a Feynman-Kac model, from its initial particle to its last one.

    Attributes
    ----------
    particles
        Pytree with leading axis num_steps + 1.
    log_increments
        What ``init`` and then every ``step`` of the model weighed it with, shape (num_steps + 1,).
    """

    particles: PyTree
    log_increments: Float[Array, " times"]


class ParticleGibbsState(NamedTuple):
    """State of particle Gibbs.

    Attributes
    ----------
    position
        The trajectory.
    """

    position: Trajectory


class ParticleGibbsInfo(NamedTuple):
    """What happened in one step of particle Gibbs.

    Attributes
    ----------
    acceptance_rate
        Share of the trajectory that was renewed, between 0 and 1.
    renewed
        Whether the particle at each time is another one than before, shape (num_steps + 1,).
    ess
        Effective sample size of the cloud's weights at each time, shape (num_steps + 1,).
    resampled
        Whether the cloud was resampled before each move, shape (num_steps,).
    num_invalid
        Number of weights that came out NaN or plus infinity; they count as zero.
    """

    acceptance_rate: Float[Array, ""]
    renewed: Bool[Array, " times"]
    ess: Float[Array, " times"]
    resampled: Bool[Array, " steps"]
    num_invalid: Int[Array, ""]


class _Cloud(NamedTuple):
    """All of a conditional SMC run: n + 1 times, n moves, N particles."""

    particles: PyTree  # (n + 1, N, ...)
    log_weights: Float[Array, "times N"]
    log_increments: Float[Array, "times N"]
    num_invalid: Int[Array, " times"]
    ancestors: Int[Array, "steps N"]
    resampled: Bool[Array, " steps"]


class _Sampler(eqx.Module):
    fk: FeynmanKac
    ess_threshold: float | Float[Array, " steps"]
    num_particles: int = eqx.field(static=True)
    backward: bool = eqx.field(static=True)
    resampling_fn: ConditionalResamplingFn = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)


def conditional_systematic(rng_key: PRNGKeyArray, weights: Float[Array, " N"]) -> Int[Array, " N"]:
    """Systematic resampling, given that slot 0 keeps particle 0.

    Parameters
    ----------
    rng_key
        Key of the single uniform that is drawn.
    weights
        Normalised weights, shape (N,).

    Returns
    -------
    Ancestor indices, shape (N,), the first of them 0.

    Source: Chopin and Singh, "On particle Gibbs sampling", arXiv 1304.1887.
    """
    num_particles, dtype = weights.shape[0], weights.dtype
    first = weights[0] * jax.random.uniform(rng_key, (), dtype)
    points = (first + jnp.arange(num_particles, dtype=dtype) / num_particles) % 1.0
    return owners(weights, points).astype(jnp.int32).at[0].set(0)


def conditional_multinomial(rng_key: PRNGKeyArray, weights: Float[Array, " N"]) -> Int[Array, " N"]:
    """Multinomial resampling, given that slot 0 keeps particle 0: the other slots draw independently.

    Parameters and result as in `conditional_systematic`.

    Source: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010).
    """
    points = jax.random.uniform(rng_key, weights.shape, weights.dtype)
    return owners(weights, points).astype(jnp.int32).at[0].set(0)


def particle_gibbs(
    fk: FeynmanKac,
    num_particles: int,
    *,
    backward: bool = True,
    resampling_fn: ConditionalResamplingFn = conditional_systematic,
    ess_threshold: float | Float[Array, " steps"] = 0.5,
    batch_size: int | None = None,
) -> SamplingAlgorithm:
    """Markov chain over the trajectories of a Feynman-Kac model, exact for any number of particles.

    ``init(position, rng_key)`` takes a `Trajectory`, or None to move one particle through the model; ``step(rng_key,
    state)`` returns ``(ParticleGibbsState, ParticleGibbsInfo)``. Run it with `smcdiff.run`; of a diffusion's trajectory
    the last particle is the sample, so keep that one by a ``transform``.

    Parameters
    ----------
    fk
        The Feynman-Kac model.
    num_particles
        Number of particles N, at least 2, the pinned one among them. A step moves N - 1 particles ``fk.num_steps``
        times, and holds all of them in memory.
    backward
        Whether a new trajectory is drawn backward, which renews all of it; it needs ``fk.log_transition``. Otherwise
        ancestors are traced, and with few particles the early part of the trajectory rarely changes.
    resampling_fn
        `conditional_systematic` or `conditional_multinomial`: ``f(rng_key, weights) -> ancestors`` with
        ``ancestors[0] == 0``.
    ess_threshold
        As in `smcdiff.smc.smc`.
    batch_size
        Particles moved together; bounds memory and changes no result.

    Raises
    ------
    TypeError
        If ``backward`` is asked of a model without ``log_transition``.
    ValueError
        If ``num_particles`` is not an integer of at least 2 or ``ess_threshold`` is refused by
        `smcdiff.smc.smc`.

    Source: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010).
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 2:
        raise ValueError(
            f"num_particles must be an integer of at least 2, one of them pinned, got {num_particles!r}."
        )
    check_ess_threshold(ess_threshold, fk.num_steps)
    if backward and fk.log_transition is None:
        raise TypeError(
            "backward=True needs a FeynmanKac with log_transition, the log density of its moves, and this one has "
            "none; pass backward=False, or add log_transition to the model. smcdiff.tds has one with order=1 only: "
            "at order=2 a particle remembers its ancestor, so that no other one can take its place."
        )
    sampler = _Sampler(fk, ess_threshold, num_particles, backward, resampling_fn, batch_size)
    return SamplingAlgorithm(Partial(_init, sampler), Partial(_step, sampler))


def _init(sampler, position, rng_key):
    """Take the given trajectory, or move one particle along, whose increments are then known."""
    fk = sampler.fk
    if position is not None:
        return ParticleGibbsState(_checked(position, fk.num_steps + 1))

    def move(particle, k):
        particle, increment = fk.step(jax.random.fold_in(rng_key, k + 1), particle, k)
        return particle, (particle, increment)

    first = fk.init(jax.random.fold_in(rng_key, 0))
    _, rest = jax.lax.scan(move, first[0], _moves(fk))
    return ParticleGibbsState(Trajectory(*_prepend(first, rest)))


def _step(sampler, rng_key, state):
    """Conditional SMC around the trajectory, then a new one out of its cloud."""
    key_forward, key_backward = jax.random.split(rng_key)
    cloud = _forward(sampler, key_forward, state.position)
    indices, log_increments = _select(sampler, key_backward, cloud)
    times = jnp.arange(sampler.fk.num_steps + 1)
    particles = jax.tree.map(lambda leaf: leaf[times, indices], cloud.particles)
    renewed = indices != 0
    info = ParticleGibbsInfo(
        jnp.mean(renewed, dtype=log_increments.dtype),
        renewed,
        jax.vmap(effective_sample_size)(cloud.log_weights),
        cloud.resampled,
        jnp.sum(cloud.num_invalid, dtype=jnp.int32),
    )
    return ParticleGibbsState(Trajectory(particles, log_increments)), info


def _forward(sampler, rng_key, pinned):
    """Conditional SMC: slot 0 holds the pinned trajectory, the others are moved."""
    fk, num_particles = sampler.fk, sampler.num_particles

    def join(k, moved):
        """Put the pinned particle of time ``k``, and its increment, in front of the moved ones."""
        return jax.tree.map(lambda kept, free: jnp.concatenate([kept[k][None], free]), tuple(pinned), moved)

    def keys(k):
        """One key a slot, by index, so that results do not depend on how particles are batched."""
        key = jax.random.fold_in(rng_key, k)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_particles))

    def move(carry, k):
        particles, log_weights = carry
        own_keys = keys(k + 1)
        resampled = is_uneven(log_weights, sampler.ess_threshold, k)
        drawn = sampler.resampling_fn(own_keys[0], jax.nn.softmax(log_weights))
        ancestors = jnp.where(resampled, drawn, jnp.arange(num_particles, dtype=jnp.int32))
        log_weights = jnp.where(resampled, uniform_log_weights(num_particles, log_weights.dtype), log_weights)

        parents = jax.tree.map(lambda leaf: leaf[ancestors[1:]], particles)
        moved = batched_map(lambda key, particle: fk.step(key, particle, k), sampler.batch_size)
        particles, increments = join(k + 1, moved(own_keys[1:], parents))
        log_weights, _, num_invalid = reweigh(log_weights, increments)
        at_time = (particles, log_weights, increments, num_invalid)
        return (particles, log_weights), (at_time, (ancestors, resampled))

    particles, increments = join(0, batched_map(fk.init, sampler.batch_size)(keys(0)[1:]))
    log_weights, _, num_invalid = reweigh(uniform_log_weights(num_particles, increments.dtype), increments)
    _, (later, by_move) = jax.lax.scan(move, (particles, log_weights), _moves(fk))
    return _Cloud(*_prepend((particles, log_weights, increments, num_invalid), later), *by_move)


def _select(sampler, rng_key, cloud):
    """Index of a new trajectory at every time, and its weight increments, from the last time to the first."""
    fk = sampler.fk

    def select(index, k):
        parent, increment = cloud.ancestors[k, index], cloud.log_increments[k + 1, index]
        if sampler.backward:
            parents = jax.tree.map(lambda leaf: leaf[k], cloud.particles)
            child = jax.tree.map(lambda leaf: leaf[k + 1, index], cloud.particles)
            log_density, increments = jax.vmap(fk.log_transition, (0, None, None))(parents, child, k)
            log_weights = cloud.log_weights[k] + log_density + increments
            log_weights = jnp.where(log_weights < jnp.inf, log_weights, -jnp.inf)  # NaN as well
            drawn = jax.random.categorical(jax.random.fold_in(rng_key, k), log_weights).astype(jnp.int32)
            # A move without a density, such as a noiseless one, leaves no choice.
            new = jnp.where(jnp.isneginf(jnp.max(log_weights)), parent, drawn)
            increment = jnp.where(new == parent, increment, increments[new])
            parent = new
        return parent, (parent, increment)

    key_last = jax.random.fold_in(rng_key, fk.num_steps)
    last = jax.random.categorical(key_last, cloud.log_weights[-1]).astype(jnp.int32)
    first, (indices, increments) = jax.lax.scan(select, last, _moves(fk), reverse=True)
    return jnp.append(indices, last), jnp.append(cloud.log_increments[0, first], increments)


def _checked(position, num_times):
    """The position if it is a trajectory of the right length."""
    if not isinstance(position, Trajectory):
        raise TypeError(
            "particle_gibbs starts from a Trajectory(particles, log_increments), or from None to draw one; got "
            f"{type(position).__name__}."
        )
    for leaf in jax.tree.leaves(position):
        if jnp.shape(leaf)[:1] != (num_times,):
            raise ValueError(
                f"a trajectory's arrays must have the leading axis num_steps + 1 = {num_times}, got shape "
                f"{jnp.shape(leaf)}."
            )
    return position


def _moves(fk):
    return jnp.arange(fk.num_steps, dtype=jnp.int32)


def _prepend(first, rest):
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
