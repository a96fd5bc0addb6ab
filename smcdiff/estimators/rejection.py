"""Rejection sampling from the denoising posterior.

A proposal x_0 from N(c, r^2 I), or from the reference's denoising posterior, is accepted with probability
exp(l(x_0) - B), where l = log pi or log pi - log reference and B bounds it. What is accepted is an exact draw, as long
as B is a bound; else B is the greatest l seen so far, of which the state keeps track, and the first draws are off. No
gradients; the share accepted falls exponentially in the dimension.

Where nothing is accepted the estimate says so (``is_valid`` is False), and is that of importance sampling with the same
proposals. It is flagged as well where l exceeds a B that was given, by more than rounding does.

Source: He, Rojas and Tao, "Zeroth-Order Sampling Methods for Non-Log-Concave Distributions", arXiv 2402.17886.
"""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_count
from smcdiff.density import HasLogDensity, require
from smcdiff.estimators.estimator import (
    Estimate,
    Reference,
    ScoreEstimator,
    as_reference,
    check_identity,
    proposal,
    summarise,
)
from smcdiff.estimators.importance import evaluate

__all__ = ["rejection"]

_ROUNDING = 1e-3  # of the log density, by which a bound may be exceeded


class _Rejection(ScoreEstimator):
    has_marginal: ClassVar[bool] = True
    reference: Reference | None
    log_bound: Float[Array, ""] | float | None
    num_proposals: int = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def init(self, rng_key, target, centre, width):
        """The bound, or minus infinity before anything was seen."""
        return jnp.asarray(-jnp.inf if self.log_bound is None else self.log_bound, centre.dtype), 0

    def __call__(self, rng_key, target, centre, width, state):
        """Propose, accept, average."""
        require(target, HasLogDensity, "rejection")
        key_samples, key_accept, key_draw = jax.random.split(rng_key, 3)
        prior = proposal(self.reference, centre, width)
        samples = prior.draw(key_samples, self.num_proposals)
        values, gradients = evaluate(target, samples, self.identity)
        log_ratios = values - jax.vmap(prior.log_reference)(samples)
        log_ratios = jnp.where(jnp.isnan(log_ratios), -jnp.inf, log_ratios)
        greatest = jnp.max(log_ratios)
        bound = jnp.maximum(state, greatest) if self.log_bound is None else state
        height = jnp.log1p(-jax.random.uniform(key_accept, log_ratios.shape, log_ratios.dtype))
        accepted = height < log_ratios - bound
        any_accepted = jnp.any(accepted)
        log_weights = jnp.where(any_accepted, jnp.where(accepted, 0.0, -jnp.inf), log_ratios)
        denoised, draw, variance, ess, is_valid = summarise(
            key_draw, samples, log_weights, gradients, centre, width, self.identity
        )
        log_marginal = prior.log_constant + jax.nn.logsumexp(log_ratios) - math.log(self.num_proposals)
        estimate = Estimate(
            denoised,
            draw,
            variance,
            log_marginal,
            jnp.where(any_accepted, ess, 0.0),
            is_valid & any_accepted & (greatest <= bound + _ROUNDING),
            self.num_proposals,
        )
        return estimate, bound


def rejection(
    num_proposals: int,
    *,
    log_bound: Float[Array, ""] | float | None = None,
    reference: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    identity: str = "denoising",
) -> ScoreEstimator:
    """Rejection sampling from the denoising posterior.

    Parameters
    ----------
    num_proposals
        Number of proposals, each of which costs one evaluation.
    log_bound
        Upper bound of the target's log density (of its difference to the reference's, if there is one). Without it the
        greatest value seen so far takes its place. Estimates that find a greater one are flagged.
    reference, identity
        As in `smcdiff.estimators.importance`.

    Returns
    -------
    ScoreEstimator, with an unbiased estimate of the marginal; its ``ess`` is the number accepted.

    Raises
    ------
    ValueError
        If ``num_proposals`` is no positive integer, ``reference`` is no pair with a positive deviation, or ``identity``
        is unknown.

    Source: "Zeroth-Order Sampling Methods for Non-Log-Concave Distributions", arXiv 2402.17886.
    """
    check_count("num_proposals", num_proposals)
    check_identity(identity)
    return _Rejection(as_reference(reference), log_bound, num_proposals, identity)
