"""Particle marginal Metropolis-Hastings: parameters of a Feynman-Kac model, by its estimated evidence.

The model depends on a parameter theta (a noise level, an operator's unknown, a temperature), and so does its evidence
Z(theta). A Metropolis step on theta that puts SMC's estimate in the place of the evidence,

    accept theta' with probability min(1, p(theta') Zhat(theta') / (p(theta) Zhat(theta))),

has the posterior p(theta) Z(theta) as its exact invariant law for any number of particles, since the estimate is
unbiased, PROVIDED that the current estimate is kept until a proposal is accepted, and not drawn anew. A particle
drawn from the weighted cloud of the accepted run makes it the joint law of theta and the model's last particle.

Few particles mean noisy estimates and a chain that sticks to lucky ones: a deviation of log Zhat of about 1 is best.

Sources: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010); Andrieu and
Roberts, "The pseudo-marginal approach for efficient Monte Carlo computations", arXiv 0903.5480; Doucet, Pitt,
Deligiannidis and Kohn, "Efficient implementation of Markov chain Monte Carlo when using an unbiased likelihood
estimator", arXiv 1210.1871 (the number of particles).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PyTree

from smcdiff.smc.feynman_kac import FeynmanKac, smc
from smcdiff.smc.resampling import ResamplingFn, systematic

__all__ = ["MarginalMHInfo", "MarginalMHState", "particle_marginal_mh"]


class MarginalMHState(NamedTuple):
    """State of particle marginal Metropolis-Hastings.

    Attributes
    ----------
    position
        The parameter theta, a pytree.
    log_prior
        Log prior density at it.
    log_evidence
        The estimate that it was accepted with.
    particle
        One draw from the weighted particles of that run: with ``position``, a draw of the joint posterior.
    """

    position: PyTree
    log_prior: Float[Array, ""]
    log_evidence: Float[Array, ""]
    particle: PyTree


class MarginalMHInfo(NamedTuple):
    """What happened in one step of particle marginal Metropolis-Hastings.

    Attributes
    ----------
    acceptance_rate
        Probability with which the proposal was accepted.
    is_accepted
        Whether it was.
    proposal
        The proposed state.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    proposal: MarginalMHState


class _Sampler(eqx.Module):
    log_prior: Callable
    make_fk: Callable[[PyTree], FeynmanKac]
    step_size: PyTree
    exponent: float | Float[Array, ""]
    ess_threshold: float | Float[Array, " steps"]
    num_particles: int = eqx.field(static=True)
    resampling_fn: ResamplingFn = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)


def particle_marginal_mh(
    log_prior: Callable[[PyTree], Float[Array, ""]],
    make_fk: Callable[[PyTree], FeynmanKac],
    num_particles: int,
    *,
    step_size: PyTree,
    exponent: float | Float[Array, ""] = 1.0,
    resampling_fn: ResamplingFn = systematic,
    ess_threshold: float | Float[Array, " steps"] = 0.5,
    batch_size: int | None = None,
) -> SamplingAlgorithm:
    """Random-walk Metropolis on the parameters of a Feynman-Kac model, exact for any number of particles.

    ``init(position, rng_key)`` takes a parameter at which prior and evidence are positive; ``step(rng_key, state)``
    returns ``(MarginalMHState, MarginalMHInfo)``. Run it with `smcdiff.run`. A step costs one run of SMC.

    Parameters
    ----------
    log_prior
        ``log_prior(theta)``, the log prior density up to a constant, for one pytree of float arrays. It is minus
        infinity where theta is not allowed; better take unconstrained parameters, such as the log of a noise level,
        with the prior density in them.
    make_fk
        ``make_fk(theta)`` makes the model, and is called inside compiled code. A `jax.tree_util.Partial` of a
        module-level function keeps weights and measurements leaves of the program.
    num_particles
        Particles of the evidence estimate, at least 1.
    step_size
        Deviation of the Gaussian proposal: one number, or a pytree like theta or like an upper part of it.
    exponent
        Power of the evidence's estimate in the target. The chain is exact for the power 1; others serve on the way
        there, see `smcdiff.smc.tempered_marginal`.
    resampling_fn, ess_threshold, batch_size
        See `smcdiff.smc.smc`.

    Raises
    ------
    ValueError
        If ``num_particles`` is not a positive integer, a ``step_size`` is not positive, or as `smcdiff.smc.smc` does.

    Source: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010).
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}.")
    for scale in jax.tree.leaves(step_size):
        if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
            raise ValueError(f"step_size must be positive, got {scale}.")
    sampler = _Sampler(
        log_prior, make_fk, step_size, exponent, ess_threshold, num_particles, resampling_fn, batch_size
    )
    return SamplingAlgorithm(Partial(_init, sampler), Partial(_step, sampler))


def _init(sampler, position, rng_key):
    """Estimate the evidence at the first parameter."""
    return _evaluate(sampler, rng_key, position)


def _step(sampler, rng_key, state):
    """Propose a parameter, estimate its evidence, accept or reject both."""
    key_propose, key_evaluate, key_accept = jax.random.split(rng_key, 3)
    proposal = _evaluate(sampler, key_evaluate, _propose(sampler, key_propose, state.position))
    log_ratio = proposal.log_prior - state.log_prior
    log_ratio += sampler.exponent * (proposal.log_evidence - state.log_evidence)
    probability = jnp.exp(jnp.minimum(log_ratio, 0.0))
    probability = jnp.where(jnp.isnan(probability), 0.0, probability)
    is_accepted = jax.random.uniform(key_accept, (), probability.dtype) < probability
    new = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), proposal, state)
    return new, MarginalMHInfo(probability, is_accepted, proposal)


def _propose(sampler, rng_key, position):
    """A Gaussian step from the position."""
    leaves, structure = jax.tree.flatten(position)
    scales = jax.tree.leaves(jax.tree.broadcast(sampler.step_size, position))
    moved = [
        leaf + scale * jax.random.normal(jax.random.fold_in(rng_key, i), leaf.shape, leaf.dtype)
        for i, (leaf, scale) in enumerate(zip(leaves, scales, strict=True))
    ]
    return jax.tree.unflatten(structure, moved)


def _evaluate(sampler, rng_key, position):
    """Run SMC at a parameter, for its evidence and for one particle."""
    position = jax.tree.map(jnp.asarray, position)
    fk = sampler.make_fk(position)
    algorithm = smc(
        fk,
        sampler.num_particles,
        resampling_fn=sampler.resampling_fn,
        ess_threshold=sampler.ess_threshold,
        batch_size=sampler.batch_size,
    )
    key_init, key_steps, key_choose = jax.random.split(rng_key, 3)

    def step(state, k):
        return algorithm.step(jax.random.fold_in(key_steps, k), state)[0], None

    cloud, _ = jax.lax.scan(step, algorithm.init(None, key_init), jnp.arange(fk.num_steps))
    chosen = jax.random.categorical(key_choose, cloud.log_weights)
    particle = jax.tree.map(lambda leaf: leaf[chosen], cloud.particles)
    return MarginalMHState(position, sampler.log_prior(position), cloud.log_evidence, particle)
