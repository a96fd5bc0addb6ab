"""Resample-move: samples of the target, from whatever sampler, become a cloud that follows the denoising posterior.

The first cloud is drawn from the samples X_j, of weights w_j, in proportion to w_j N(X_j; c, r^2 I), so that it has the
law of q as far as they have that of the target. From there on it follows q, see `smcdiff.estimators.cloud`: samples
that are off in a mode's width are mended by the moves, and copies part. Nothing is annealed, so all evaluations are
spent on moves, and a cloud can be larger than that of `smcdiff.estimators.annealed_smc` for the same cost.

With `smcdiff.rdmc(..., weights="marginal")` this turns the samples of any sampler, right or nearly so, into weighted
ones that are consistent, with an unbiased evidence: tempering's, which has none, or those of a first run without
weights.

Sources: Gilks and Berzuini, "Following a moving target: Monte Carlo inference for dynamic Bayesian models", JRSS-B 63
(2001).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.density import HasLogDensity, logdensity_and_score, require
from smcdiff.estimators.cloud import Cloud, CloudState, check_cloud
from smcdiff.estimators.ensemble import as_ensemble, weigh
from smcdiff.estimators.estimator import Reference, ScoreEstimator
from smcdiff.smc.resampling import systematic

__all__ = ["resample_move"]


class _ResampleMove(Cloud):
    pool: Float[Array, "m *event"] = eqx.field(kw_only=True)
    pool_log_weights: Float[Array, " m"] = eqx.field(kw_only=True)

    def init(self, rng_key, target, centre, width):
        """Draw the cloud, and the scout, from the samples."""
        require(target, HasLogDensity, "resample_move")
        key_scout, key_cloud = jax.random.split(rng_key)
        width = jnp.asarray(width, centre.dtype)
        pool = self.pool.astype(centre.dtype)
        log_weights, log_marginal = weigh(pool, self.pool_log_weights, centre, width)
        scout = jax.random.categorical(key_scout, log_weights)
        chosen = systematic(key_cloud, jax.nn.softmax(log_weights), self.num_samples)
        samples = jnp.concatenate([pool[scout][None], pool[chosen]])
        values, gradients = jax.vmap(lambda x: logdensity_and_score(target, x))(samples)
        zeros = jnp.zeros(self.num_samples, centre.dtype)
        log_step_size = jnp.log(jnp.asarray(self.step_size, centre.dtype))
        cloud = CloudState(samples, values, gradients, zeros, log_marginal, log_step_size, centre, width)
        return cloud, len(samples)


def resample_move(
    samples: Float[Array, "m *event"],
    num_samples: int = 32,
    *,
    log_weights: Float[Array, " m"] | None = None,
    num_moves: int = 1,
    step_size: Float[Array, ""] | float = 0.1,
    target_acceptance: float = 0.65,
    ess_threshold: float = 0.5,
    identity: str = "combined",
) -> ScoreEstimator:
    """A cloud drawn from samples of the target, which follows the denoising posterior down the noise levels.

    A run of T noise levels costs (num_samples + 1) (1 + T num_moves) evaluations of density and gradient.

    Parameters
    ----------
    samples
        Of the target, from any sampler, shape (m, *event). Only ``weights="marginal"`` mends what is wrong with them; a
        mode that they do not have at all is lost.
    num_samples
        Number of samples of the cloud, beside the scout that tunes the step size.
    log_weights
        As in `smcdiff.estimators.ensemble`.
    num_moves
        MALA steps at every noise level.
    step_size
        First step size, in units of the variance that q would have if the samples were of a Gaussian, times d^(-1/3);
        positive.
    target_acceptance
        Acceptance rate to which the step size is tuned, between 0 and 1.
    ess_threshold
        The cloud is resampled where its effective number is below this share, in [0, 1).
    identity
        "denoising", "target" or "combined", as in `smcdiff.estimators.importance`.

    Returns
    -------
    ScoreEstimator, with an estimate of the marginal that is unbiased if the weighted samples are.

    Raises
    ------
    ValueError
        If a number is out of range, ``identity`` is unknown, there are no samples, all are the same, or there is not
        one weight for each.

    Source: "Following a moving target: Monte Carlo inference for dynamic Bayesian models", JRSS-B 63 (2001).
    """
    check_cloud(num_samples, num_moves, step_size, target_acceptance, ess_threshold, identity)
    samples, log_weights = as_ensemble(samples, log_weights)
    weights = jax.nn.softmax(log_weights)
    mean = jnp.tensordot(weights, samples, axes=1)
    variance = jnp.mean(jnp.tensordot(weights, (samples - mean[None]) ** 2, axes=1))
    if not isinstance(variance, jax.core.Tracer) and not variance > 0:
        raise ValueError(
            f"samples must not all be the same: their variance is {variance}; pass more of them."
        )
    return _ResampleMove(
        Reference(mean, jnp.sqrt(variance)),
        step_size,
        target_acceptance,
        ess_threshold,
        num_samples,
        num_moves,
        identity,
        pool=samples,
        pool_log_weights=log_weights,
    )
