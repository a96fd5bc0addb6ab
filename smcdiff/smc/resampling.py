"""Resampling: from weights to ancestor indices.

A resampling function is ``f(rng_key, weights, num_samples) -> indices`` with normalised weights of shape (N,) and
indices of shape (num_samples,); BlackJAX's `stratified`, `multinomial` and `residual` have this signature and
are re-exported. `systematic` is our own: it counts the offspring of every particle from the cumulative weights
and writes the indices out by one scatter and one cumulative sum, without a search and without branches.

The cumulative sum of a million float32 weights is not accurate enough to keep |offspring - N w| < 1, so it is
taken block by block, carrying the whole part as an integer.

Source: Kitagawa, "Monte Carlo Filter and Smoother", J. Comput. Graph. Stat. 5 (1996).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import multinomial, residual, stratified
from jaxtyping import Array, Float, Int, PRNGKeyArray

__all__ = ["ResamplingFn", "multinomial", "resample_from_log_weights", "residual", "stratified", "systematic"]

ResamplingFn = Callable[[PRNGKeyArray, Float[Array, " N"], int], Int[Array, " num_samples"]]


def systematic(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Systematic resampling: particle i gets floor or ceil of ``num_samples * weights[i]`` offspring.

    Parameters
    ----------
    rng_key
        Key of the single uniform that is drawn.
    weights
        Normalised weights, shape (N,).
    num_samples
        Number of indices.

    Returns
    -------
    Sorted ancestor indices, shape (num_samples,).

    Source: Kitagawa, "Monte Carlo Filter and Smoother", J. Comput. Graph. Stat. 5 (1996).
    """
    uniform = jax.random.uniform(rng_key, (), weights.dtype)
    whole, part = _cumulative(weights * num_samples)
    # Offspring of particles 0..i: how many of the points u, u+1, ... lie below the cumulative weight.
    ends = jnp.clip(whole + jnp.ceil(part - uniform).astype(jnp.int32), 0, num_samples)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[0]), 0))
    ends = jnp.where(jnp.arange(weights.shape[0]) >= last, num_samples, ends)
    starts = jnp.zeros(num_samples, jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(starts)


def resample_from_log_weights(
    resampling_fn: ResamplingFn, rng_key: PRNGKeyArray, log_weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Ancestor indices from log weights that need not be normalised.

    Parameters
    ----------
    resampling_fn
        A resampling function of normalised weights.
    rng_key
        Key.
    log_weights
        Shape (N,), up to an additive constant; minus infinity is allowed, but not for all.
    num_samples
        Number of indices.
    """
    return resampling_fn(rng_key, jax.nn.softmax(log_weights), num_samples)


def _cumulative(values):
    """Cumulative sum of non-negative values as (int32 whole part, float remainder), accurate for many values."""
    block = max(1, math.isqrt(values.shape[0]))
    padded = jnp.pad(values, (0, -values.shape[0] % block)).reshape(-1, block)
    within = jnp.cumsum(padded, axis=1)

    def carry_whole(carry, total):
        whole, part = carry
        part = part + total
        return (whole + jnp.floor(part).astype(jnp.int32), part - jnp.floor(part)), carry

    start = (jnp.zeros((), jnp.int32), jnp.zeros((), values.dtype))
    _, (whole, part) = jax.lax.scan(carry_whole, start, within[:, -1])
    remainder = (within + part[:, None]).reshape(-1)[: values.shape[0]]
    return jnp.repeat(whole, block)[: values.shape[0]], remainder
