"""Annealed SMC: a small cloud is annealed to the first denoising posterior, and then follows it down the noise levels.

The cloud is carried from the proposal to q by the levels of `smcdiff.estimators.annealed_importance`, once, with
resampling. From there on it follows q, see `smcdiff.estimators.cloud`, where `annealed_importance` starts anew at every
noise level. The estimate of the marginal stays unbiased.

Source: Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.density import HasLogDensity, logdensity_and_score, require
from smcdiff.estimators.annealed import annealing_levels
from smcdiff.estimators.cloud import Cloud, CloudState, check_cloud
from smcdiff.estimators.estimator import ScoreEstimator, as_reference, proposal

__all__ = ["annealed_smc"]


class _AnnealedSMC(Cloud):
    betas: Float[Array, " levels+1"] = eqx.field(kw_only=True)

    def init(self, rng_key, target, centre, width):
        """Anneal the cloud from the proposal to the first denoising posterior."""
        require(target, HasLogDensity, "annealed_smc")
        key_samples, key_levels = jax.random.split(rng_key)
        prior = proposal(self.reference, centre, width)
        samples = prior.draw(key_samples, self.num_samples + 1)
        values, gradients = jax.vmap(lambda x: logdensity_and_score(target, x))(samples)
        zeros = jnp.zeros(self.num_samples, centre.dtype)
        start = jnp.log(jnp.asarray(self.step_size, centre.dtype))
        width = jnp.asarray(width, centre.dtype)
        cloud = CloudState(
            samples, values, gradients, zeros, jnp.asarray(prior.log_constant), start, centre, width
        )

        def level(cloud, inputs):
            key, before, beta = inputs
            log_ratios = cloud.values - jax.vmap(prior.log_reference)(cloud.samples)
            return self.advance(key, target, prior, cloud, (beta - before) * log_ratios[1:], beta, 1), None

        betas = self.betas.astype(centre.dtype)
        inputs = (jax.random.split(key_levels, len(betas) - 1), betas[:-1], betas[1:])
        return jax.lax.scan(level, cloud, inputs)[0], len(samples) * len(betas)


def annealed_smc(
    num_samples: int,
    num_levels: int = 64,
    *,
    num_moves: int = 4,
    step_size: Float[Array, ""] | float = 0.5,
    target_acceptance: float = 0.65,
    ess_threshold: float = 0.5,
    power: float = 4.0,
    reference: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    identity: str = "denoising",
) -> ScoreEstimator:
    """Annealed SMC to the first denoising posterior, whose cloud then follows it down the noise levels.

    A run of K levels and T noise levels costs (num_samples + 1) (1 + K + T num_moves) evaluations of density and
    gradient.

    Parameters
    ----------
    num_samples
        Number of samples, beside the scout that tunes the step size.
    num_levels
        Levels K between the proposal and the first denoising posterior; b_k = (k / K)^power.
    num_moves
        MALA steps at every noise level.
    step_size
        First step size, in units of the proposal's variance times d^(-1/3), positive.
    target_acceptance
        Acceptance rate to which the step size is tuned, between 0 and 1.
    ess_threshold
        The samples are resampled where their effective number is below this share, in [0, 1).
    power
        Positive; above 1 the levels lie closer near the proposal.
    reference, identity
        As in `smcdiff.estimators.importance`. Where modes may part along one direction, the reference must cover them
        there: sqrt(d) times the scale of a coordinate does.

    Returns
    -------
    ScoreEstimator, with an unbiased estimate of the marginal.

    Raises
    ------
    ValueError
        If a number is out of range, ``reference`` is no pair with a positive deviation, or ``identity`` is unknown.

    Source: "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
    """
    check_cloud(num_samples, num_moves, step_size, target_acceptance, ess_threshold, identity)
    return _AnnealedSMC(
        as_reference(reference),
        step_size,
        target_acceptance,
        ess_threshold,
        num_samples,
        num_moves,
        identity,
        betas=annealing_levels(num_levels, power),
    )
