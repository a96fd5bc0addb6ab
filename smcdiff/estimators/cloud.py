"""A cloud that follows the denoising posterior down the noise levels.

A call changes the Gaussian factor of q, from N(x_0; c, r^2 I) to N(x_0; c', r'^2 I): the samples are weighed by the
ratio of the two, which takes no evaluation of the target, resampled where the weights have become uneven, and moved by
MALA at the new q. So all evaluations since the first noise level stand behind every estimate.

The mean weights multiply to an estimate of the marginal. It is unbiased for every sequence of (c, r) that does not
depend on the cloud, because the step sizes do not either: one more sample, the scout, makes the same moves, counts in
no estimate, and tunes the step by its acceptance.

Estimators differ in where the cloud comes from: see `smcdiff.estimators.annealed_smc` and
`smcdiff.estimators.resample_move`.

Sources: Chopin, "A sequential particle filter method for static models", Biometrika 89 (2002); Del Moral, Doucet and
Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
"""

import math
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_between, check_count
from smcdiff.estimators.annealed import check_moves, moves, unit_step
from smcdiff.estimators.estimator import (
    Estimate,
    Reference,
    ScoreEstimator,
    proposal,
    summarise,
)
from smcdiff.smc.resampling import systematic

__all__ = ["Cloud", "CloudState", "check_cloud"]

_GAIN = 0.5  # of the logarithm of the step size, by a unit of the scout's acceptance rate


class CloudState(NamedTuple):
    """What a cloud carries from one noise level to the next.

    Attributes
    ----------
    samples, values, gradients
        The scout and n samples (n + 1, *event), with the target's log density and its gradient there.
    log_weights
        Of the n samples (n,), since they were last resampled.
    log_marginal
        Log of the product of the mean weights before.
    log_step_size
        Log of the step size, in units of the proposal's variance times d^(-1/3).
    centre, width
        Where the last call was.
    """

    samples: Float[Array, "n+1 *event"]
    values: Float[Array, " n+1"]
    gradients: Float[Array, "n+1 *event"]
    log_weights: Float[Array, " n"]
    log_marginal: Float[Array, ""]
    log_step_size: Float[Array, ""]
    centre: Float[Array, "*event"]
    width: Float[Array, ""]


class Cloud(ScoreEstimator):
    """What every cloud has; a subclass makes it, in `init`."""

    has_marginal: ClassVar[bool] = True
    reference: Reference | None
    step_size: Float[Array, ""] | float
    target_acceptance: Float[Array, ""] | float
    ess_threshold: Float[Array, ""] | float
    num_samples: int = eqx.field(static=True)
    num_moves: int = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def __call__(self, rng_key, target, centre, width, state):
        """Follow the denoising posterior to the new centre and width."""
        key_advance, key_draw = jax.random.split(rng_key)
        width = jnp.asarray(width, centre.dtype)

        def log_ratio(x):
            old, new = (x - state.centre) / state.width, (x - centre) / width
            return 0.5 * (jnp.sum(old**2) - jnp.sum(new**2)) + x.size * jnp.log(state.width / width)

        cloud = self.advance(
            key_advance,
            target,
            proposal(self.reference, centre, width),
            state._replace(centre=centre, width=width),
            jax.vmap(log_ratio)(state.samples[1:]),
            jnp.ones((), centre.dtype),
            self.num_moves,
        )
        gradients = None if self.identity == "denoising" else cloud.gradients[1:]
        denoised, draw, variance, _, is_valid = summarise(
            key_draw, cloud.samples[1:], cloud.log_weights, gradients, centre, width, self.identity
        )
        ess = _ess_of_copies(cloud.samples[1:], cloud.log_weights)
        log_marginal = cloud.log_marginal + _log_mean(cloud.log_weights)
        count = len(cloud.samples) * self.num_moves
        return Estimate(denoised, draw, variance, log_marginal, ess, is_valid, count), cloud

    def advance(self, rng_key, target, prior, cloud, log_increments, beta, num_moves):
        """Weigh, resample where the weights have become uneven, move at ``beta``, and tune the step by the scout."""
        key_resample, *keys = jax.random.split(rng_key, num_moves + 1)
        log_weights = cloud.log_weights + jnp.where(jnp.isnan(log_increments), -jnp.inf, log_increments)
        log_mean = _log_mean(log_weights)
        weights = jax.nn.softmax(jnp.where(jnp.isfinite(log_mean), log_weights, 0.0))
        is_uneven = 1.0 / jnp.sum(weights**2) < self.ess_threshold * self.num_samples
        is_uneven &= jnp.isfinite(log_mean)
        chosen = 1 + systematic(key_resample, weights, self.num_samples)
        ancestors = jnp.where(is_uneven, chosen, jnp.arange(1, self.num_samples + 1, dtype=chosen.dtype))
        ancestors = jnp.pad(ancestors, (1, 0))  # the scout stays
        log_weights = jnp.where(is_uneven, 0.0, log_weights)
        log_marginal = cloud.log_marginal + jnp.where(is_uneven, log_mean, 0.0)

        def move(carry, key):
            log_step_size, samples, values, gradients = carry
            step_size = jnp.exp(log_step_size) * unit_step(prior)
            samples, values, gradients, acceptance = moves(
                key, target, prior, beta, step_size, samples, values, gradients, num_steps=1
            )
            change = _GAIN * (acceptance[0] - self.target_acceptance)
            log_step_size += jnp.where(jnp.isnan(change), -_GAIN, change)
            return (log_step_size, samples, values, gradients), None

        points = [leaf[ancestors] for leaf in (cloud.samples, cloud.values, cloud.gradients)]
        carry = (cloud.log_step_size, *points)
        log_step_size, samples, values, gradients = jax.lax.scan(move, carry, jnp.stack(keys))[0]
        return CloudState(
            samples, values, gradients, log_weights, log_marginal, log_step_size, cloud.centre, cloud.width
        )


def _ess_of_copies(samples, log_weights):
    """Effective sample size in which copies that no move has parted count as one sample."""
    flat, weights = samples.reshape(len(samples), -1), jax.nn.softmax(log_weights)
    is_copy = jnp.all(flat[:, None] == flat[None], axis=-1)
    return 1.0 / jnp.sum(weights * (is_copy.astype(weights.dtype) @ weights))


def _log_mean(log_weights):
    return jax.nn.logsumexp(log_weights) - math.log(len(log_weights))


def check_cloud(num_samples, num_moves, step_size, target_acceptance, ess_threshold, identity) -> None:
    """Raise a `ValueError` unless a cloud can have these settings."""
    check_count("num_samples", num_samples)
    check_count("num_moves", num_moves)
    check_between("ess_threshold", ess_threshold, 0.0, 1.0)
    check_moves(step_size, target_acceptance, identity)
