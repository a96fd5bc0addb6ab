"""Log weights: normalising them, how even they are, and when they are uneven enough to resample."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

__all__ = ["check_ess_threshold", "effective_sample_size", "is_uneven", "reweigh", "uniform_log_weights"]


def effective_sample_size(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """(sum w)^2 / sum w^2 of log weights of shape (N,), which need not be normalised."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))


def uniform_log_weights(num_particles: int, dtype) -> Float[Array, " N"]:
    """log(1/N) for each of N particles."""
    return jnp.full(num_particles, -jnp.log(jnp.asarray(num_particles, dtype)), dtype)


def reweigh(
    log_weights: Float[Array, " N"], increments: Float[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, ""], Int[Array, ""]]:
    """Add the increments; return normalised log weights, log of the mean increment, and how many were invalid.

    A NaN or infinite weight counts as zero. If no particle is left the weights are uniform and the increment is
    minus infinity, which stays in the log evidence.
    """
    invalid = jnp.isnan(increments) | jnp.isposinf(increments)
    unnormalised = log_weights + jnp.where(invalid, -jnp.inf, increments)
    increment = jax.nn.logsumexp(unnormalised)
    uniform = uniform_log_weights(len(log_weights), log_weights.dtype)
    normalised = jnp.where(jnp.isneginf(increment), uniform, unnormalised - increment)
    return normalised, increment, jnp.sum(invalid, dtype=jnp.int32)


def check_ess_threshold(ess_threshold: float | Float[Array, " steps"], num_steps: int) -> None:
    """Raise unless ``ess_threshold`` is a fraction, or one for each step."""
    if np.shape(ess_threshold) not in ((), (num_steps,)):
        raise ValueError(
            f"ess_threshold must be a number or have one entry for each of the {num_steps} steps, got shape "
            f"{np.shape(ess_threshold)}."
        )
    if isinstance(ess_threshold, jax.core.Tracer):
        return
    values = np.asarray(ess_threshold)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(
            f"ess_threshold is a fraction of the particles, between 0 and 1; got {ess_threshold}."
        )


def is_uneven(
    log_weights: Float[Array, " N"], ess_threshold: float | Float[Array, " steps"], step: Int[Array, ""]
) -> Bool[Array, ""]:
    """Whether the effective sample size is below the threshold of a step, so that it begins by resampling."""
    threshold = jnp.asarray(ess_threshold, log_weights.dtype)
    threshold = threshold[step] if threshold.ndim else threshold
    return effective_sample_size(log_weights) < threshold * len(log_weights)
