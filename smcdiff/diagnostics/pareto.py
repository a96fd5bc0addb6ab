"""Pareto k-hat: how heavy a tail is, and so whether averages over it can be trusted.

A generalised Pareto law is fitted to the M largest of S values, less the next one, where M = 3 sqrt(S / r_eff), or
S / 5 if there are few. With x the excesses and theta_i a grid of m = 30 + sqrt(M) values,

    k(theta) = mean log(1 - theta x),     weight of theta ~ exp(M (log(-theta / k(theta)) - k(theta) - 1)),

theta is the weighted mean, and k-hat = (M k(theta) + 5) / (M + 10), drawn a little to 1/2. Moments above 1/k do not
exist: about 10^(1 / (1 - max(k, 0))) draws are needed, and with k above 0.7 importance weights are of little use.

`blackjax.diagnostics.pareto_khat` takes a tenth of the draws for the tail instead of M.

Sources: Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", arXiv 1507.02646; Zhang and
Stephens, "A new and efficient estimation method for the generalized Pareto distribution", Technometrics 51 (2009).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from smcdiff.checks import check_positive
from smcdiff.diagnostics.blocks import by_blocks, floating, quantile_ess
from smcdiff.diagnostics.ranks import SORT

__all__ = ["pareto_khat"]

TAILS = ("both", "left", "right")
LEAST = 5  # draws that a tail needs


def pareto_khat(
    x: ArrayLike,
    *,
    r_eff: float | None = None,
    tail: str = "both",
    log_weights: bool = False,
    block_size: int | None = None,
) -> Float[Array, "*event"]:
    """Shape of the generalised Pareto law that fits the tail of draws or of importance weights.

    Parameters
    ----------
    x
        Draws, (chain, draw, *event), or one row of them, (draw,); log weights if ``log_weights``.
    r_eff
        Effective sample size of the tail, divided by the number of draws: 1 for independent draws. By default the
        tail ESS of ``x`` gives it.
    tail
        "right", "left", or "both" for the larger of the two.
    log_weights
        Whether ``x`` are logarithms of importance weights: then the right tail of the weights is fitted.
    block_size
        As in `chain_diagnostics`.

    Returns
    -------
    k-hat; infinite where the fit fails, NaN where the tail's values or a quarter of them are equal.

    Raises
    ------
    ValueError
        If ``tail`` is unknown, ``r_eff`` is not positive, or there are too few draws.

    Source: arXiv 1507.02646, section 3.
    """
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}.")
    if r_eff is not None:
        check_positive("r_eff", r_eff)
        r_eff = float(r_eff)
    x = floating(x)
    x = x[None] if x.ndim == 1 else x
    if x.shape[0] * x.shape[1] < 2 * LEAST + 1:
        raise ValueError(f"a tail needs {LEAST} draws, and the fit {2 * LEAST + 1}, got the shape {x.shape}.")
    return by_blocks(_khat, (r_eff, "right" if log_weights else tail, log_weights), SORT, x, block_size)


def _khat(x, ordered, options):
    r_eff, tail, log_weights = options
    size = x[0].size
    if r_eff is None:
        every = size - x.shape[1] * (x.shape[2] % 2)  # those that the split has
        low, high = (quantile_ess(x, ordered, prob) for prob in (0.05, 0.95))
        ratio = jnp.minimum(low, high) / every
    else:
        ratio = jnp.full(x.shape[0], r_eff, x.dtype)
    wanted = jnp.where(size * ratio > 225, jnp.floor(3 * jnp.sqrt(size / ratio)), size // 5)
    most = max(LEAST, size // 5)  # whatever the ratio: 3 sqrt(S / r) < S / 5 where S r > 225
    count = jnp.clip(wanted, LEAST, most)
    fit = jax.vmap(_tail_shape, in_axes=(0, 0, None, None))
    if tail != "both":
        ordered = -ordered[:, ::-1] if tail == "left" else ordered
        return fit(ordered[:, -most - 1 :], count, most, log_weights)
    left, right = (fit(part[:, -most - 1 :], count, most, False) for part in (-ordered[:, ::-1], ordered))
    return jnp.where(right > left, right, left)


def _tail_shape(largest, count, most, log_weights):
    """k-hat of the last ``count`` of ``largest``, the ``most`` + 1 largest values in ascending order."""
    if log_weights:
        largest = jnp.exp(largest - largest[-1])
    first = most - count.astype(jnp.int32)  # of the tail, in `largest[1:]`; the cutoff is before it
    excess, is_tail = largest[1:] - largest[first], jnp.arange(most, dtype=first.dtype) >= first
    quarter = excess[first + jnp.floor(count / 4 - 0.5).astype(jnp.int32)]
    # Where the fit is none anyway: any numbers, so that none is divided by zero.
    is_flat = quarter <= excess[first]
    excess = jnp.where(is_tail & ~is_flat, excess, 0)
    greatest, quarter = (jnp.where(is_flat, 1, value) for value in (excess[-1], quarter))

    def shape(theta):
        return jnp.sum(jnp.log1p(-theta * excess)) / count

    num_theta = 30 + jnp.floor(jnp.sqrt(count))
    place = jnp.arange(1, 31 + math.isqrt(most), dtype=excess.dtype)
    theta = (1 - jnp.sqrt(num_theta / (place - 0.5))) / (3 * quarter) + 1 / greatest
    shapes = jax.vmap(shape)(theta)
    log_weight = count * (jnp.log(-theta / shapes) - shapes - 1)
    weight = jax.nn.softmax(jnp.where(place <= num_theta, log_weight, -jnp.inf))
    weight = jnp.where(weight >= 10 * np.finfo(excess.dtype).eps, weight, 0)
    khat = (count * shape(jnp.sum(weight * theta) / jnp.sum(weight)) + 5) / (count + 10)
    return jnp.where(is_flat, jnp.nan, jnp.where(jnp.isnan(khat), jnp.inf, khat))
