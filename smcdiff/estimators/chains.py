"""Markov chains on the denoising posterior.

Several short chains run on q(x_0) ~ pi(x_0) N(x_0; c, r^2 I), from where the chains of the last noise level ended;
the first half of their steps tunes the step size to an acceptance rate and is thrown away, the second half is averaged.
At the first level they begin at points resampled from importance proposals, and run longer. Good in many dimensions,
once q has one mode: r below the distance of the target's modes.

The effective sample size compares the spread of the chains' means with that of all samples. An estimate is flagged
where no chain has moved, or one ends where the density vanishes.

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
    ess_of_chains,
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
        start = states.position

        def step(states, key):
            keys = jax.random.split(key, self.num_chains)
            states, _ = jax.vmap(algorithm.step)(keys, states)
            return states, (states.position, self._gradient(target, centre, width, states))

        num_kept = self.num_steps - tuning
        states, (samples, gradients) = jax.lax.scan(step, states, jax.random.split(key_run, num_kept))
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
        values = states.logdensity if _knows_density(states) else jax.vmap(target.logdensity)(states.position)
        is_valid &= jnp.any(samples != start[None]) & jnp.all(jnp.isfinite(values))
        count = self._count(self.num_steps)
        count += 0 if _knows_density(states) else self.num_chains
        if self.identity != "denoising" and not isinstance(states, HamiltonianState):
            count += self.num_chains * num_kept
        nothing = jnp.asarray(jnp.nan, flat.dtype)
        ess = ess_of_chains(jnp.mean(samples, axis=0), variance, len(flat))
        estimate = Estimate(denoised, draw, variance, nothing, ess, is_valid, count)
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
            rate = getattr(
                infos, "acceptance_rate", self.target_acceptance
            )  # slices have none to be tuned by
            change = _GAIN * (jnp.mean(rate) - self.target_acceptance)
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
    evaluations_per_step: int | None = None,
    reference: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    identity: str = "denoising",
) -> ScoreEstimator:
    """Markov chains on the denoising posterior, warm-started along the path.

    Parameters
    ----------
    num_chains, num_steps
        Chains for every noisy sample, and their steps at every noise level, of which the second half is averaged.
    kernel
        ``kernel(density, step_size) -> SamplingAlgorithm``, `smcdiff.mcmc.mala` by default. The step size stays what
        it is if the kernel's info has no ``acceptance_rate``.
    step_size
        First step size, in units of the proposal's variance times d^(-1/3), positive.
    target_acceptance
        Acceptance rate to which it is tuned, between 0 and 1.
    num_first_steps
        Steps before the first estimate; 4 ``num_steps`` by default.
    num_starts
        Importance proposals from which the first positions are resampled.
    evaluations_per_step
        What one step of ``kernel`` costs, for the count; needed if ``kernel`` is given. Where its state knows neither
        log density nor score, as those of `smcdiff.mcmc.hmc` and its kin do, what the estimate needs of them is
        evaluated, and counted on top.
    reference, identity
        As in `smcdiff.estimators.importance`.

    Returns
    -------
    ScoreEstimator, without an estimate of the marginal.

    Raises
    ------
    ValueError
        If a number is out of range, ``reference`` is no pair with a positive deviation, ``identity`` is unknown, or
        ``kernel`` comes without ``evaluations_per_step``.

    Source: "Reverse Diffusion Monte Carlo", arXiv 2307.02037.
    """
    if kernel is not None and evaluations_per_step is None:
        raise ValueError(
            "evaluations_per_step is needed beside kernel: how often one of its steps evaluates the density, for "
            "instance the number of leapfrog steps."
        )
    per_step = 1 if evaluations_per_step is None else evaluations_per_step
    first = 4 * num_steps if num_first_steps is None else num_first_steps
    for name, value in (
        ("num_chains", num_chains),
        ("num_steps", num_steps),
        ("num_first_steps", first),
        ("num_starts", num_starts),
        ("evaluations_per_step", per_step),
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
        per_step,
        identity,
    )


def _knows_density(states):
    return isinstance(states, HamiltonianState) and states.logdensity is not None
