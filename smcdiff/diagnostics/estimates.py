"""Posterior means, deviations and central intervals of every entry, with the weights where there are weights."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = ["Estimates", "estimate", "pooled_draws"]


class Estimates(NamedTuple):
    """What the weighted particles say of each pixel; all of the event shape.

    Attributes
    ----------
    mean, std
        Posterior mean and standard deviation.
    lower, upper
        Ends of the central interval.
    level
        Its probability.
    """

    mean: Float[np.ndarray, "*event"]
    std: Float[np.ndarray, "*event"]
    lower: Float[np.ndarray, "*event"]
    upper: Float[np.ndarray, "*event"]
    level: float


def estimate(
    result: SMCResult | Trace | Float[np.ndarray, "chains draws *event"], level: float = 0.9
) -> Estimates:
    """Posterior mean, deviation and central intervals of every entry.

    Parameters
    ----------
    result
        Weighted particles, a trace whose samples are one array, or equally weighted draws (chains, draws, *event).
        Where no chain of particles has any weight left, all estimates are NaN.
    level
        Probability of the intervals.
    """
    probabilities = np.array([0.5 - level / 2, 0.5 + level / 2])
    if not isinstance(result, SMCResult):
        draws = _draws(result)
        lower, upper = np.quantile(draws, probabilities, axis=(0, 1))
        return Estimates(draws.mean((0, 1)), draws.std((0, 1)), lower, upper, level)
    if not np.any(np.isfinite(result.log_evidence)):
        nothing = np.full(np.shape(result.particles)[2:], np.nan)
        return Estimates(nothing, nothing, nothing, nothing, level)
    lower, upper = result.quantile(probabilities)
    return Estimates(result.mean(), result.std(), lower, upper, level)


def pooled_draws(
    rng_key: PRNGKeyArray,
    result: SMCResult | Trace | Float[np.ndarray, "chains draws *event"],
    num_draws: int = 8,
) -> Float[np.ndarray, "draws *event"]:
    """Equally weighted draws from all chains together; chains of SMC count by their evidence estimates.

    Parameters
    ----------
    rng_key
        Key.
    result
        As in `estimate`; where no chain of particles has any weight left, all entries are NaN.
    num_draws
        Number of draws.
    """
    if isinstance(result, SMCResult):
        particles = np.asarray(result.particles)
        if not np.any(np.isfinite(result.log_evidence)):
            return np.full((num_draws, *particles.shape[2:]), np.nan)
        return particles[result.resample_pooled_indices(rng_key, num_draws)]
    draws = _draws(result)
    flat = draws.reshape(-1, *draws.shape[2:])
    return flat[
        np.asarray(jax.random.choice(rng_key, len(flat), (num_draws,), replace=num_draws > len(flat)))
    ]


def _draws(result):
    draws = np.asarray(result.samples if isinstance(result, Trace) else result, float)
    if draws.ndim < 2:
        raise ValueError(f"draws must have the axes (chains, draws, *event), got shape {draws.shape}.")
    return draws
