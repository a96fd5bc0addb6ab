"""Self-normalised importance sampling from the denoising posterior.

Draw x_0^j from the proposal, N(c, r^2 I) or the reference's denoising posterior, and weigh by w_j = pi(x_0^j) or
pi(x_0^j) / reference(x_0^j). The mean weight is an unbiased estimate of the marginal; the weighted mean of the samples
has a bias of order one over their number. Without gradients, and good as long as the proposal covers q: few dimensions,
low noise, or a reference close to the target.

Source: Huang et al., "Reverse Diffusion Monte Carlo", arXiv 2307.02037.
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.checks import check_count
from smcdiff.density import HasLogDensity, logdensity_and_score, require
from smcdiff.estimators.estimator import (
    Estimate,
    Reference,
    ScoreEstimator,
    as_reference,
    check_identity,
    proposal,
    summarise,
)

__all__ = ["importance"]


class _Importance(ScoreEstimator):
    has_marginal: ClassVar[bool] = True
    reference: Reference | None
    num_samples: int = eqx.field(static=True)
    antithetic: bool = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def __call__(self, rng_key, target, centre, width, state):
        """Draw, weigh, average."""
        require(target, HasLogDensity, "importance")
        key_samples, key_draw = jax.random.split(rng_key)
        prior = proposal(self.reference, centre, width)
        samples = prior.draw(key_samples, self.num_samples, self.antithetic)
        values, gradients = evaluate(target, samples, self.identity)
        log_weights = values - jax.vmap(prior.log_reference)(samples)
        log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
        denoised, draw, variance, ess, is_valid = summarise(
            key_draw, samples, log_weights, gradients, centre, width, self.identity
        )
        log_marginal = prior.log_constant + jax.nn.logsumexp(log_weights) - math.log(self.num_samples)
        return Estimate(denoised, draw, variance, log_marginal, ess, is_valid, self.num_samples), state


def importance(
    num_samples: int,
    *,
    reference: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    antithetic: bool = True,
    identity: str = "denoising",
) -> ScoreEstimator:
    """Importance sampling from the denoising posterior.

    Parameters
    ----------
    num_samples
        Number of proposals, each of which costs one evaluation; even, if antithetic.
    reference
        (mean, std) of a Gaussian that covers the target, in its units: proposals are drawn from its denoising
        posterior. Without it they are N(c, r^2 I), which at high noise lie far from any target.
    antithetic
        Draw the proposals in mirrored pairs.
    identity
        "denoising", "target" (which has less variance at low noise, by gradients) or "combined", by gradients as well.
        The last two need a density without hard edges.

    Returns
    -------
    ScoreEstimator, with an unbiased estimate of the marginal.

    Raises
    ------
    ValueError
        If ``num_samples`` is no positive integer, or odd beside ``antithetic``; if ``reference`` is no pair with a
        positive deviation; if ``identity`` is unknown.

    Source: "Reverse Diffusion Monte Carlo", arXiv 2307.02037.
    """
    check_count("num_samples", num_samples)
    check_identity(identity)
    if antithetic and num_samples % 2:
        raise ValueError(
            f"num_samples must be even for antithetic pairs, got {num_samples}; or antithetic=False."
        )
    return _Importance(as_reference(reference), num_samples, antithetic, identity)


def evaluate(target: Any, samples: Float[Array, "n *event"], identity: str):
    """Log densities (n,) and, where the identity needs them, gradients (n, *event) or else None."""
    if identity == "denoising":
        return jax.vmap(target.logdensity)(samples), None
    return jax.vmap(lambda x: logdensity_and_score(target, x))(samples)
