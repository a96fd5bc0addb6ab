"""The score of a cloud of weighted samples, without gradients and without new evaluations.

With samples X_j of any law g and weights w_j = pi(X_j) / g(X_j), the denoising posterior is the discrete law

    q(X_j) ~ w_j N(X_j; c, r^2 I),

and mean_j w_j N(X_j; c, r^2 I) is an unbiased estimate of the marginal. One set of evaluations serves all noisy samples
and all noise levels, so that it is cheap, and its error is shared; it sees nothing between the samples, so that
a path of it should end at a width about their distance. Run again with the new samples it becomes an ensemble method.

Sources: Scarvelis et al., "Closed-Form Diffusion Models", arXiv 2310.12395; Huang, Jiao et al., "Schrodinger-Follmer
Sampler", arXiv 2106.10880 (the same without gradients).
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.estimators.estimator import Estimate, ScoreEstimator, summarise

__all__ = ["as_ensemble", "ensemble", "weigh"]


class _Ensemble(ScoreEstimator):
    has_marginal: ClassVar[bool] = True
    samples: Float[Array, "n *event"]
    log_weights: Float[Array, " n"]

    def __call__(self, rng_key, target, centre, width, state):
        """Weigh the samples by their distance to the centre."""
        samples = self.samples.astype(centre.dtype)
        log_weights, log_marginal = weigh(samples, self.log_weights, centre, width)
        denoised, draw, variance, ess, is_valid = summarise(
            rng_key, samples, log_weights, None, centre, width, "denoising"
        )
        return Estimate(denoised, draw, variance, log_marginal, ess, is_valid, 0), state


def weigh(samples, log_weights, centre, width):
    """Log weights w_j N(X_j; c, r^2 I) of the samples, up to a constant, and the log of their mean."""
    count = samples.shape[0]
    scaled = (samples - centre[None]).reshape(count, -1) / width
    log_weights = log_weights.astype(centre.dtype) - 0.5 * jnp.sum(scaled**2, axis=-1)
    log_normaliser = centre.size * (jnp.log(width) + 0.5 * math.log(2.0 * math.pi)) + math.log(count)
    return log_weights, jax.nn.logsumexp(log_weights) - log_normaliser


def as_ensemble(samples, log_weights) -> tuple[Float[Array, "n *event"], Float[Array, " n"]]:
    """Samples and log weights as arrays, zeros by default; a `ValueError` if there is not one for each."""
    samples = jnp.asarray(samples)
    if samples.ndim < 1 or samples.shape[0] < 1:
        raise ValueError(f"samples must have the shape (n, *event) with n > 0, got {samples.shape}.")
    weights = jnp.zeros(samples.shape[0], samples.dtype) if log_weights is None else jnp.asarray(log_weights)
    if weights.shape != samples.shape[:1]:
        raise ValueError(f"log_weights must have the shape {samples.shape[:1]}, got {weights.shape}.")
    return samples, weights


def ensemble(
    samples: Float[Array, "n *event"], log_weights: Float[Array, " n"] | None = None
) -> ScoreEstimator:
    """The score of a weighted cloud of samples, for any noise level, without evaluations of the target.

    Parameters
    ----------
    samples
        Shape (n, *event).
    log_weights
        log pi(X_j) - log g(X_j) for samples of a law g; zeros if omitted, for samples of the target. Their mean counts
        for the estimate of the marginal only.

    Returns
    -------
    ScoreEstimator, with an unbiased estimate of the marginal.

    Raises
    ------
    ValueError
        If there are no samples, or not one weight for each.

    Source: "Closed-Form Diffusion Models", arXiv 2310.12395.
    """
    return _Ensemble(*as_ensemble(samples, log_weights))
