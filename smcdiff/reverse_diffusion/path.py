"""The path of densities from a bare density to noise, with estimated scores.

A path is a function of x and t, so its estimates must not depend on who asks when: the random numbers behind the
estimate at (x, t) are a hash of x and t. Errors at different points are independent, and the same point always gives
the same answer, so that every sampler of the library can run on the path. Where the estimator flags its estimate, the
denoised sample and the score are NaN.

Where the estimator has one, ``at(t).logdensity`` is the log of an unbiased estimate of the marginal. A Metropolis
kernel on it is a pseudo-marginal one (Andrieu and Roberts): it leaves p_t alone exactly, however noisy the estimates.

Source: Huang et al., "Reverse Diffusion Monte Carlo", arXiv 2307.02037; Andrieu and Roberts, "The pseudo-marginal
approach for efficient Monte Carlo computations", arXiv 0903.5480.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from smcdiff.compose.operators import Composable
from smcdiff.density import HasLogDensity, as_target, require
from smcdiff.diffusion import Marginal
from smcdiff.estimators import Estimate, ScoreEstimator
from smcdiff.schedules import Schedule

__all__ = ["RdmcPath", "rdmc_path"]


class RdmcPath(Composable, eqx.Module):
    """The path of a bare density; build it with `rdmc_path`."""

    target: Any
    schedule: Schedule
    estimator: ScoreEstimator
    rng_key: PRNGKeyArray
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def estimate(
        self, rng_key: PRNGKeyArray, x: Float[Array, "*event"], t: Float[Array, ""], state: PyTree
    ) -> tuple[Estimate, PyTree]:
        """What the estimator says of x_t = x, with its state carried along; ``log_marginal`` is log Z p_t(x)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        estimate, state = self.estimator(rng_key, self.target, x / alpha, sigma / alpha, state)
        return estimate._replace(log_marginal=estimate.log_marginal - x.size * jnp.log(alpha)), state

    def start(
        self, rng_key: PRNGKeyArray, x: Float[Array, "*event"], t: Float[Array, ""]
    ) -> tuple[PyTree, int | Array]:
        """State of the estimator at x_t = x, and the evaluations that it took."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self.estimator.init(rng_key, self.target, x / alpha, sigma / alpha)

    def fresh_estimate(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Estimate:
        """The estimate at (x, t), whose random numbers are a hash of both."""
        key_init, key = jax.random.split(_hashed(self.rng_key, x, t))
        state, first = self.start(key_init, x, t)
        estimate, _ = self.estimate(key, x, t, state)
        return estimate._replace(num_evaluations=estimate.num_evaluations + first)

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Estimate of E[x_0 | x_t = x], for t > 0; NaN where it is flagged."""
        estimate = self.fresh_estimate(x, t)
        return jnp.where(estimate.is_valid, estimate.denoised, jnp.nan)

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Estimate of the score at time ``t``, NaN where it is flagged; at t = 0 the target's own."""

        def estimated(x):
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            return (alpha * self.denoise(x, t) - x) / sigma**2

        return jax.lax.cond(t > 0, estimated, self.target.score, x)

    def at(self, t: Float[Array, ""]) -> Marginal:
        """The density at time ``t``; with a log density where the estimator has an unbiased marginal."""
        kind = _EstimatedDensity if self.estimator.has_marginal else Marginal
        return kind(self, jnp.asarray(t))


class _EstimatedDensity(Marginal):
    model: RdmcPath

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Log of an unbiased estimate of Z p_t(x); at t = 0 the target's own log density."""
        return jax.lax.cond(
            self.t > 0,
            lambda x: self.model.fresh_estimate(x, self.t).log_marginal,
            lambda x: self.model.target.logdensity(x),
            x,
        )


def rdmc_path(
    target: Any,
    schedule: Schedule,
    estimator: ScoreEstimator,
    *,
    rng_key: PRNGKeyArray,
    event_shape: tuple[int, ...] | int | None = None,
) -> RdmcPath:
    """The path of densities from a bare density to noise, whose scores are estimated.

    Parameters
    ----------
    target
        A log density function of one sample, up to a constant, or an object with a log density.
    schedule
        The forward process, for instance `smcdiff.schedules.ou()`.
    estimator
        One of `smcdiff.estimators`.
    rng_key
        Key of the estimates that the path makes as a function of x and t.
    event_shape
        Shape of a sample, or its dimension; a target that knows its own needs none.

    Returns
    -------
    RdmcPath: a diffusion model for every sampler of the library, and the argument of `smcdiff.rdmc`.

    Raises
    ------
    TypeError
        If ``target`` has no log density, or ``estimator`` is none.
    ValueError
        If the shape of a sample is not known.

    Source: "Reverse Diffusion Monte Carlo", arXiv 2307.02037.
    """
    shape = shape_of(target, event_shape)
    target = as_target(target)
    require(target, HasLogDensity, "rdmc_path")
    if not isinstance(estimator, ScoreEstimator):
        raise TypeError(f"estimator must be one of smcdiff.estimators, got {type(estimator).__name__}.")
    return RdmcPath(target, schedule, estimator, rng_key, shape)


def shape_of(target: Any, event_shape: tuple[int, ...] | int | None) -> tuple[int, ...]:
    """The shape of a sample, from the argument or from the target."""
    shape = getattr(target, "event_shape", None) if event_shape is None else event_shape
    if shape is None:
        raise ValueError(
            f"event_shape is needed, since a {type(target).__name__} does not say how a sample looks; "
            "for vectors give their dimension, for instance event_shape=2."
        )
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _hashed(rng_key, x, t):
    """A key that is a function of x and t."""
    flat = jax.lax.stop_gradient(jnp.concatenate([jnp.ravel(x), jnp.ravel(t).astype(x.dtype)]))
    bits = _bits(flat.astype(jnp.float32))
    places = jnp.arange(1, 2 * math.prod(flat.shape), 2, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    mixed = (bits ^ (bits >> 15)) * places
    words = jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)])
    return jax.random.fold_in(jax.random.fold_in(rng_key, words[0]), words[1])


def _bits(values: Float[Array, " n"]) -> Int[Array, " n"]:
    return jax.lax.bitcast_convert_type(values, jnp.uint32)
