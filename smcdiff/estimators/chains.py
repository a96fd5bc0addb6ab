"""Markov chains on the denoising posterior.

Several short chains run on q(x_0) ~ pi(x_0) N(x_0; c, r^2 I), from where the chains of the last noise level ended;
the first half of their steps tunes the step size to an acceptance rate and is thrown away, the second half is averaged.
At the first level they begin at points resampled from importance proposals, and run longer. Good in many dimensions,
once q has one mode: r below the distance of the target's modes.

The effective sample size compares the spread of the chains' means with that of all samples.

Sources: Huang et al., "Reverse Diffusion Monte Carlo", arXiv 2307.02037; Grenioux et al., "Stochastic Localization via
Iterative Posterior Sampling", arXiv 2402.10758 (persistent chains).
"""

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.denoising_posterior import DenoisingPosterior
from smcdiff.density import HasLogDensity, as_pytree, require
from smcdiff.estimators.estimator import (
    Estimate,
    Reference,
    ScoreEstimator,
    as_reference,
    check_identity,
    proposal,
    summarise,
)
from smcdiff.mcmc.hamiltonian import HamiltonianState
from smcdiff.mcmc.langevin import mala

__all__ = ["ChainsState", "chains"]

_GAIN = 0.5  # of the logarithm of the step size, by a unit of the acceptance rate, at every step of the tuning half


class ChainsState(NamedTuple):
    """State of the chains between noise levels.

    Attributes
    ----------
    positions
        Shape (num_chains, *event).
    log_step_size
        Log of the step size relative to the proposal's variance times d^(-1/3).
    """

    positions: Float[Array, "chains *event"]
    log_step_size: Float[Array, ""]


class _Chains(ScoreEstimator):
    has_marginal: ClassVar[bool] = False
    reference: Reference | None
    kernel: Callable
    step_size: Float[Array, ""] | float
    target_acceptance: Float[Array, ""] | float
    num_chains: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_first_steps: int = eqx.field(static=True)
    num_starts: int = eqx.field(static=True)
    evaluations_per_step: int = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def init(self, rng_key, target, centre, width):
        """Resample importance proposals, and run the chains from them."""
        require(target, HasLogDensity, "chains")
        key_starts, key_choice, key_run = jax.random.split(rng_key, 3)
        prior = proposal(self.reference, centre, width)
        starts = prior.draw(key_starts, self.num_starts)
        values = jax.vmap(lambda x: target.logdensity(x) - prior.log_reference(x))(starts)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        chosen = jax.random.categorical(key_choice, values, shape=(self.num_chains,))
        state = ChainsState(starts[chosen], jnp.log(jnp.asarray(self.step_size, centre.dtype)))
        states, log_step_size = self._tune(key_run, target, centre, width, state, self.num_first_steps)
        return ChainsState(states.position, log_step_size), self._count(
            self.num_first_steps
        ) + self.num_starts

    def __call__(self, rng_key, target, centre, width, state):
        """Tune, then sample, then average."""
        key_tune, key_run, key_draw = jax.random.split(rng_key, 3)
        tuning = self.num_steps // 2
        states, log_step_size = self._tune(key_tune, target, centre, width, state, tuning)
        algorithm = self._algorithm(target, centre, width, log_step_size)

        def step(states, key):
            keys = jax.random.split(key, self.num_chains)
            states, _ = jax.vmap(algorithm.step)(keys, states)
            return states, (states.position, self._gradient(target, centre, width, states))

        states, (samples, gradients) = jax.lax.scan(
            step, states, jax.random.split(key_run, self.num_steps - tuning)
        )
        merge = functools.partial(jax.tree.map, lambda leaf: leaf.reshape(-1, *centre.shape))
        flat = merge(samples)
        denoised, draw, variance, _, is_valid = summarise(
            key_draw,
            flat,
            jnp.zeros(flat.shape[:1], flat.dtype),
            merge(gradients),
            centre,
            width,
            self.identity,
        )
        nothing = jnp.asarray(jnp.nan, flat.dtype)
        count = self._count(self.num_steps)
        estimate = Estimate(denoised, draw, variance, nothing, _chains_ess(samples), is_valid, count)
        return estimate, ChainsState(states.position, log_step_size)

    def _algorithm(self, target, centre, width, log_step_size):
        variance = jnp.mean(proposal(self.reference, centre, width).std ** 2)
        step_size = jnp.exp(log_step_size) * variance * centre.size ** (-1 / 3)
        return self.kernel(DenoisingPosterior(target, centre.reshape(-1), width), step_size)

    def _tune(self, rng_key, target, centre, width, state, num_steps):
        """Run from the state's positions; returns the kernel's states and the tuned step size."""
        key_init, key_run = jax.random.split(rng_key)
        algorithm = self._algorithm(target, centre, width, state.log_step_size)
        states = jax.vmap(algorithm.init)(state.positions, jax.random.split(key_init, self.num_chains))

        def step(carry, key):
            states, log_step_size = carry
            algorithm = self._algorithm(target, centre, width, log_step_size)
            states, infos = jax.vmap(algorithm.step)(jax.random.split(key, self.num_chains), states)
            change = _GAIN * (jnp.mean(infos.acceptance_rate) - self.target_acceptance)
            return (states, log_step_size + jnp.where(jnp.isnan(change), -_GAIN, change)), None

        (states, log_step_size), _ = jax.lax.scan(
            step, (states, state.log_step_size), jax.random.split(key_run, num_steps)
        )
        return states, log_step_size

    def _gradient(self, target, centre, width, states):
        """grad log pi at the chains, from what the kernel's state knows where it does."""
        if self.identity == "denoising":
            return None
        if isinstance(states, HamiltonianState):
            return states.score + (states.position - centre[None]) / width**2
        return jax.vmap(target.score)(states.position)

    def _count(self, num_steps):
        return self.num_chains * (1 + self.evaluations_per_step * num_steps)


def chains(
    num_chains: int = 4,
    num_steps: int = 32,
    *,
    kernel: Callable | None = None,
    step_size: Float[Array, ""] | float = 0.5,
    target_acceptance: float = 0.65,
    num_first_steps: int | None = None,
    num_starts: int = 64,
    evaluations_per_step: int = 1,
    reference: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    identity: str = "denoising",
) -> ScoreEstimator:
    """Markov chains on the denoising posterior, warm-started along the path.

    Parameters
    ----------
    num_chains, num_steps
        Chains for every noisy sample, and their steps at every noise level, of which the second half is averaged.
    kernel
        ``kernel(density, step_size) -> SamplingAlgorithm`` whose info has an ``acceptance_rate``;
        `smcdiff.mcmc.mala` by default.
    step_size
        First step size, in units of the proposal's variance times d^(-1/3), positive.
    target_acceptance
        Acceptance rate to which it is tuned, between 0 and 1.
    num_first_steps
        Steps before the first estimate; 4 ``num_steps`` by default.
    num_starts
        Importance proposals from which the first positions are resampled.
    evaluations_per_step
        What one step of ``kernel`` costs, for the count; 1 for MALA.
    reference, identity
        As in `smcdiff.estimators.importance`.

    Returns
    -------
    ScoreEstimator, without an estimate of the marginal.

    Raises
    ------
    ValueError
        If a number is out of range, ``reference`` is no pair with a positive deviation, or ``identity`` is unknown.

    Source: "Reverse Diffusion Monte Carlo", arXiv 2307.02037.
    """
    first = 4 * num_steps if num_first_steps is None else num_first_steps
    for name, value in (
        ("num_chains", num_chains),
        ("num_steps", num_steps),
        ("num_first_steps", first),
        ("num_starts", num_starts),
        ("evaluations_per_step", evaluations_per_step),
    ):
        check_count(name, value)
    check_positive("step_size", step_size)
    check_between("target_acceptance", target_acceptance, 1e-6, 1.0)
    check_identity(identity)
    return _Chains(
        as_reference(reference),
        as_pytree(kernel or mala),
        step_size,
        target_acceptance,
        num_chains,
        num_steps,
        first,
        num_starts,
        evaluations_per_step,
        identity,
    )


def _chains_ess(samples):
    """From samples (steps, chains, *event): how many independent ones would spread as the chains' means do."""
    steps, num_chains = samples.shape[:2]
    flat = samples.reshape(steps, num_chains, -1)
    if num_chains < 2:
        return jnp.asarray(jnp.nan, flat.dtype)
    within = jnp.mean(jnp.var(flat, axis=(0, 1)))
    between = jnp.mean(jnp.var(jnp.mean(flat, axis=0), axis=0, ddof=1))
    ratio = within / jnp.where(between > 0, between, 1.0)
    return jnp.where(between > 0, jnp.clip(num_chains * ratio, 1.0, 1.0 * steps * num_chains), 1.0)
