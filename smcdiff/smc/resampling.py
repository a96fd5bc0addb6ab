"""Resampling: from weights to ancestor indices.

A resampling function is ``f(rng_key, weights, num_samples) -> indices`` with normalised weights of shape (N,) and
indices of shape (num_samples,), as in BlackJAX, whose functions fit too. Ours never draw a particle of weight
zero, however the cumulative weights round, and have no outcome of small probability in which all indices are one.
`systematic` counts the offspring of every particle from the cumulative weights and writes the indices out by one
scatter and one cumulative sum, without a search and without branches.

The cumulative sum of a million float32 weights is not accurate enough to keep |offspring - N w| < 1, so it is
taken block by block, carrying the whole part as an integer.

Sources: Kitagawa, "Monte Carlo Filter and Smoother", J. Comput. Graph. Stat. 5 (1996); Douc, Cappé and Moulines,
"Comparison of Resampling Schemes for Particle Filtering", arXiv cs/0507025.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
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
    index = jnp.arange(weights.shape[0], dtype=jnp.int32)
    ends = jnp.where(index >= _last_positive(weights), num_samples, ends)
    starts = jnp.zeros(num_samples, jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(starts)


def stratified(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Stratified resampling: one uniform point in each of ``num_samples`` equal intervals; sorted indices.

    Parameters as in `systematic`. Source: Kitagawa (1996).
    """
    uniforms = jax.random.uniform(rng_key, (num_samples,), weights.dtype)
    return _owners(weights, (jnp.arange(num_samples, dtype=weights.dtype) + uniforms) / num_samples)


def multinomial(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Multinomial resampling: independent draws, in sorted order. The noisiest choice.

    Parameters as in `systematic`. Source: Douc et al., "Comparison of Resampling Schemes", arXiv cs/0507025.
    """
    # Order statistics of uniforms from their spacings; `exponential` is finite, unlike -log of a uniform in [0, 1).
    total = jnp.cumsum(jax.random.exponential(rng_key, (num_samples + 1,), weights.dtype))
    return _owners(weights, total[:-1] / total[-1])


def residual(
    rng_key: PRNGKeyArray, weights: Float[Array, " N"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Residual resampling: floor(num_samples * weights[i]) copies of particle i, the rest by independent draws.

    Parameters as in `systematic`. Source: Douc et al., "Comparison of Resampling Schemes", arXiv cs/0507025.
    """
    expected = weights * num_samples
    copies = jnp.floor(expected).astype(jnp.int32)
    kept = jnp.repeat(jnp.arange(weights.shape[0], dtype=jnp.int32), copies, total_repeat_length=num_samples)
    drawn = _owners(
        expected - jnp.floor(expected), jax.random.uniform(rng_key, (num_samples,), weights.dtype)
    )
    return jnp.where(jnp.arange(num_samples) < jnp.sum(copies), kept, drawn)


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


def _owners(weights, points):
    """Index of the particle whose share of [0, 1), proportional to its weight, holds each of ``points``."""
    cumulative = jnp.cumsum(weights)
    owners = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    return jnp.minimum(owners, _last_positive(weights))  # a point may round to 1


def _last_positive(weights):
    return jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[0], dtype=jnp.int32), 0))


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
