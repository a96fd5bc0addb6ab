"""Total variation of the masses of modes: whether a sampler found all modes, and in their proportions.

    TV = 1/2 sum_k |f_k - p_k|,      f_k = sum_i w_i [x_i in mode k],

the sum running over one more mode, of weight 0, for points in none. By the delta method the variance is that of the
mean of the signs of f_k - p_k: 1/4 sum_i w_i^2 (s_i - mean)^2, too large where a difference is within its error.
For n exact samples each n f_k is binomial, whose mean deviation De Moivre gave:

    E |f - p| = 2 (v/n) (1 - p) P(n f = v),      v = floor(n p) + 1,

and half the sum of these is the floor.

Source: Diaconis and Zabell, "Closed Form Summation for Classical Distributions: Variations on a Theme of De Moivre"
(1991).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom

from smcdiff.checks import check_count
from smcdiff.metrics.distance import Distance, dot, normalised_weights
from smcdiff.targets.target import HasModes

__all__ = ["mode_weight_tv"]


def mode_weight_tv(samples, reference: Any, *, log_weights=None, num_exact: int | None = None) -> Distance:
    """Total variation distance of the mode frequencies of a weighted cloud to given mode weights.

    Parameters
    ----------
    samples
        If ``reference`` is a target: points (n, *event). Otherwise their modes: integers (n,), any other than 0 to K-1
        for no mode, or probabilities of the modes (n, K).
    reference
        A target with modes (`smcdiff.targets.HasModes`), or the weights of the modes (K,), known numbers.
    log_weights
        Of the samples, shape (n,), not necessarily normalised; uniform if omitted.
    num_exact
        How many exact samples the floor is for; by default n. For a chain, pass its effective size.

    Returns
    -------
    The distance, its standard error for independent samples, and the mean distance of exact samples.

    Raises
    ------
    ValueError
        If shapes do not fit or the weights of the modes are not probabilities.
    """
    samples = jnp.asarray(samples)
    if isinstance(reference, HasModes):
        samples, reference = jax.vmap(reference.mode_labels)(samples), reference.mode_weights
    probabilities = np.asarray(reference, float)
    if probabilities.ndim != 1 or probabilities.min() < 0 or abs(probabilities.sum() - 1) > 1e-4:
        raise ValueError(f"reference must be mode weights (K,), non-negative with sum 1, got {reference}.")
    probabilities = probabilities / probabilities.sum()
    if samples.ndim == 1 and jnp.issubdtype(samples.dtype, jnp.integer):
        shares = jax.nn.one_hot(samples, len(probabilities), dtype=jnp.result_type(float))
    elif samples.ndim == 2 and samples.shape[1] == len(probabilities):
        shares = samples.astype(jnp.result_type(float))
    else:
        raise ValueError(
            f"samples must be integers (n,) or probabilities (n, K) with K = {len(probabilities)}, got "
            f"{samples.dtype} {samples.shape}."
        )
    num_exact = len(shares) if num_exact is None else num_exact
    check_count("num_exact", num_exact)
    weights = normalised_weights(log_weights, len(shares), shares.dtype)
    value, error = _compare(shares, weights, jnp.asarray(probabilities, shares.dtype))
    return Distance(value, error, jnp.asarray(_mean_distance(probabilities, num_exact), shares.dtype))


@jax.jit
def _compare(shares, weights, probabilities):
    """The distance with one more mode for points in none, and its standard error."""
    shares = jnp.concatenate([shares, 1 - jnp.sum(shares, axis=1, keepdims=True)], axis=1)
    excess = dot(weights, shares) - jnp.concatenate([probabilities, jnp.zeros_like(probabilities[:1])])
    signs = dot(shares, jnp.sign(excess))
    error = 0.5 * jnp.sqrt(jnp.sum(weights**2 * (signs - dot(weights, signs)) ** 2))
    return 0.5 * jnp.sum(jnp.abs(excess)), error


def _mean_distance(probabilities, n):
    """E TV of the frequencies of n draws."""
    p = probabilities[(probabilities > 0) & (probabilities < 1)]
    v = np.floor(n * p) + 1
    return float(np.sum(v / n * (1 - p) * binom.pmf(v, n, p)))
