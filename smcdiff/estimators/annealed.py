"""Annealed importance sampling from the denoising posterior.

Draws from the proposal, N(c, r^2 I) or the reference's denoising posterior, are carried to q through

    q_k(x_0) ~ proposal(x_0) (pi / reference)(x_0)^(b_k),      0 = b_0 < b_1 < ... < b_K = 1,

by one step or more of MALA at every level, and weighed by prod_k (pi / reference)^(b_k - b_(k-1)) at the points before
the steps. The mean weight is an unbiased estimate of the marginal, whatever the number of levels. It costs more than
importance sampling, and reaches further: more dimensions, more noise.

The step size of each level is tuned from call to call by its acceptance rate, and by a few calls before the first;
within a call it is fixed, so that the estimate stays unbiased.

Source: Neal, "Annealed importance sampling", arXiv physics/9803008.
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.density import HasLogDensity, logdensity_and_score, require
from smcdiff.estimators.estimator import (
    Estimate,
    Proposal,
    Reference,
    ScoreEstimator,
    as_reference,
    check_identity,
    proposal,
    summarise,
)
from smcdiff.mcmc.hamiltonian import HamiltonianState
from smcdiff.mcmc.langevin import mala

__all__ = ["annealed_importance"]

_GAIN = 2.0  # of the logarithm of the step size, by a unit of the acceptance rate, at every call


class _Level(eqx.Module):
    """proposal(x) exp(b l(x)) with l = log pi - log reference."""

    target: Any
    prior: Proposal
    beta: Float[Array, ""]

    def logdensity(self, x):
        return self.logdensity_and_score(x)[0]

    def score(self, x):
        return self.logdensity_and_score(x)[1]

    def logdensity_and_score(self, x):
        value, score = logdensity_and_score(self.target, x)
        reference, reference_score = jax.value_and_grad(self.prior.log_reference)(x)
        log_prior, prior_score = self.prior_terms(x)
        return log_prior + self.beta * (value - reference), prior_score + self.beta * (
            score - reference_score
        )

    def prior_terms(self, x):
        """Log density of the proposal, up to a constant, and its gradient."""
        scaled = (x - self.prior.mean) / self.prior.std
        return -0.5 * jnp.sum(scaled**2), -scaled / self.prior.std


def annealing_levels(num_levels, power) -> Float[Array, " levels+1"]:
    """b_k = (k / K)^power."""
    check_count("num_levels", num_levels)
    check_positive("power", power)
    return jnp.linspace(0.0, 1.0, num_levels + 1) ** power


def check_moves(step_size, target_acceptance, identity) -> None:
    """Raise a `ValueError` unless an estimator that moves its samples can have these settings."""
    check_positive("step_size", step_size)
    check_between("target_acceptance", target_acceptance, 1e-6, 1.0)
    check_identity(identity)


def unit_step(prior: Proposal) -> Float[Array, ""]:
    """The unit of step sizes: the proposal's variance times d^(-1/3)."""
    return jnp.mean(prior.std**2) * prior.mean.size ** (-1 / 3)


def moves(rng_key, target, prior, beta, step_size, samples, values, gradients, num_steps: int):
    """MALA steps of all samples at the level ``beta``, one evaluation of the target each.

    Parameters
    ----------
    rng_key, target
        Key; object with a log density and a score.
    prior
        Proposal of the annealing.
    beta, step_size
        Level, above 0, and step size.
    samples, values, gradients
        Points (n, *event), with the target's log density and its gradient there.
    num_steps
        Steps.

    Returns
    -------
    The same three afterwards, and the mean acceptance rate (n,) of each sample.
    """
    density = _Level(target, prior, beta)
    algorithm = mala(density, step_size)

    def run(key, x, value, gradient):
        log_prior, prior_score = density.prior_terms(x)
        reference, reference_score = jax.value_and_grad(prior.log_reference)(x)
        start = HamiltonianState(
            x,
            log_prior + beta * (value - reference),
            prior_score + beta * (gradient - reference_score),
            None,
        )
        end, infos = jax.lax.scan(
            lambda state, key: algorithm.step(key, state), start, jax.random.split(key, num_steps)
        )
        log_prior, prior_score = density.prior_terms(end.position)
        reference, reference_score = jax.value_and_grad(prior.log_reference)(end.position)
        return (
            end.position,
            (end.logdensity - log_prior) / beta + reference,
            (end.score - prior_score) / beta + reference_score,
            jnp.mean(infos.acceptance_rate),
        )

    return jax.vmap(run)(jax.random.split(rng_key, len(samples)), samples, values, gradients)


class _Annealed(ScoreEstimator):
    has_marginal: ClassVar[bool] = True
    reference: Reference | None
    betas: Float[Array, " levels+1"]
    step_size: Float[Array, ""] | float
    target_acceptance: Float[Array, ""] | float
    num_samples: int = eqx.field(static=True)
    steps_per_level: int = eqx.field(static=True)
    num_pilots: int = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def init(self, rng_key, target, centre, width):
        """The step size of every level, relative to the proposal's variance times d^(-1/3), after the pilot calls."""
        state = jnp.full(len(self.betas) - 1, jnp.log(jnp.asarray(self.step_size)), centre.dtype)
        if self.num_pilots == 0:
            return state, 0

        def pilot(state, key):
            estimate, state = self(key, target, centre, width, state)
            return state, jnp.asarray(estimate.num_evaluations, jnp.int32)

        state, counts = jax.lax.scan(pilot, state, jax.random.split(rng_key, self.num_pilots))
        return state, jnp.sum(counts)

    def __call__(self, rng_key, target, centre, width, state):
        """Carry draws of the proposal through the levels; weigh, average, retune."""
        require(target, HasLogDensity, "annealed_importance")
        key_samples, key_levels, key_draw = jax.random.split(rng_key, 3)
        prior = proposal(self.reference, centre, width)
        samples = prior.draw(key_samples, self.num_samples)
        scale = unit_step(prior)

        def level(carry, inputs):
            key, before, beta, log_step_size = inputs
            samples, values, gradients, log_weights = carry
            log_ratios = values - jax.vmap(prior.log_reference)(samples)
            log_weights = log_weights + (beta - before) * jnp.where(
                jnp.isnan(log_ratios), -jnp.inf, log_ratios
            )
            samples, values, gradients, acceptance = moves(
                key,
                target,
                prior,
                beta,
                jnp.exp(log_step_size) * scale,
                samples,
                values,
                gradients,
                self.steps_per_level,
            )
            return (samples, values, gradients, log_weights), jnp.mean(acceptance)

        values, gradients = jax.vmap(lambda x: logdensity_and_score(target, x))(samples)
        betas = self.betas.astype(centre.dtype)
        inputs = (jax.random.split(key_levels, len(betas) - 1), betas[:-1], betas[1:], state)
        start = (samples, values, gradients, jnp.zeros_like(values))
        (samples, _, gradients, log_weights), acceptance = jax.lax.scan(level, start, inputs)

        used = None if self.identity == "denoising" else gradients
        denoised, draw, variance, ess, is_valid = summarise(
            key_draw, samples, log_weights, used, centre, width, self.identity
        )
        log_marginal = prior.log_constant + jax.nn.logsumexp(log_weights) - math.log(self.num_samples)
        count = self.num_samples * (1 + self.steps_per_level * (len(betas) - 1))
        change = _GAIN * (acceptance - self.target_acceptance)
        state = state + jnp.where(jnp.isnan(change), -_GAIN, change)
        return Estimate(denoised, draw, variance, log_marginal, ess, is_valid, count), state


def annealed_importance(
    num_samples: int,
    num_levels: int = 8,
    *,
    steps_per_level: int = 1,
    step_size: Float[Array, ""] | float = 0.5,
    target_acceptance: float = 0.65,
    num_pilots: int = 4,
    power: float = 3.0,
    reference: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    identity: str = "denoising",
) -> ScoreEstimator:
    """Annealed importance sampling from the denoising posterior, with gradients.

    Parameters
    ----------
    num_samples
        Number of annealed samples.
    num_levels
        Levels K between the proposal and the denoising posterior; b_k = (k / K)^power.
    steps_per_level
        MALA steps at every level.
    step_size
        First step size, in units of the proposal's variance times d^(-1/3), positive.
    target_acceptance
        Acceptance rate to which each level's step size is tuned, between 0 and 1.
    num_pilots
        Calls before the first estimate, whose only use is to tune the step sizes.
    power
        Positive; above 1 the levels lie closer near the proposal.
    reference, identity
        As in `smcdiff.estimators.importance`.

    Returns
    -------
    ScoreEstimator, with an unbiased estimate of the marginal.

    Raises
    ------
    ValueError
        If a number is out of range, ``reference`` is no pair with a positive deviation, or ``identity`` is unknown.

    Source: "Annealed importance sampling", arXiv physics/9803008.
    """
    check_count("num_samples", num_samples)
    check_count("steps_per_level", steps_per_level)
    check_count("num_pilots", num_pilots, least=0)
    check_moves(step_size, target_acceptance, identity)
    return _Annealed(
        as_reference(reference),
        annealing_levels(num_levels, power),
        step_size,
        target_acceptance,
        num_samples,
        steps_per_level,
        num_pilots,
        identity,
    )
