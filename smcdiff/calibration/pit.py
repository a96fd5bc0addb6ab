"""Where a truth lies among posterior draws: its rank, and its probability integral transform.

If a truth was drawn from the prior and its data simulated, truth and exact posterior draws x_1, ..., x_L are
exchangeable given the data, so for every function f, which may depend on the data,

    r = #{i : f(x_i) < f(truth)} + (ties in random order)        is uniform on {0, ..., L},
    U = (r + V) / (L + 1),   V uniform on [0, 1],                is uniform on [0, 1].

Draws with weights w_i that add up to one have the distribution function F. With n = 1 / sum_i w_i^2 the truth is
given the weight 1 / (n + 1),

    U = n / (n + 1) [F(f(truth)-) + V w(ties)] + V / (n + 1),

which is the formula above for equal weights. It is exact for them only: for uneven weights it holds up to the error
of n draws, because the particles of importance sampling are not draws of the posterior. Take n well above the square
root of the number of data sets over which the tests run.

Sources: Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", arXiv 1804.06788;
Modrak et al., "Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes
sensitivity", arXiv 2211.02383 (functions of the data as well; ties).
"""

import numpy as np
from jaxtyping import Float

from smcdiff.calibration.draws import normalised_weights

__all__ = ["pit"]


def pit(
    truth: Float[np.ndarray, "*batch"],
    draws: Float[np.ndarray, "*batch N"],
    uniform: Float[np.ndarray, "*batch"],
    log_weights: Float[np.ndarray, "*batch N"] | None = None,
) -> Float[np.ndarray, "*batch"]:
    """Probability integral transform of truths, randomised so that it is uniform for an exact posterior.

    The rank of the truth among L equally weighted draws is ``floor(pit * (L + 1))``.

    Parameters
    ----------
    truth
        Values of a function at the truth.
    draws
        Its values at the draws, along the last axis; where the weight is zero they may be NaN.
    uniform
        Uniform numbers, one for each truth, which order ties.
    log_weights
        Log weights of the draws, broadcast against ``draws``; equal if omitted.

    Source: arXiv 1804.06788, arXiv 2211.02383.
    """
    truth, draws = np.asarray(truth, float)[..., None], np.asarray(draws, float)
    if log_weights is None:
        num_draws = draws.shape[-1]
        below, tied = (np.sum(draws < truth, axis=-1), np.sum(draws == truth, axis=-1))
        return (below + uniform * (tied + 1)) / (num_draws + 1)
    weights = normalised_weights(log_weights)
    ess = 1.0 / np.sum(weights**2, axis=-1)
    below, tied = (np.sum(np.where(mask, weights, 0.0), axis=-1) for mask in (draws < truth, draws == truth))
    return (ess * (below + uniform * tied) + uniform) / (ess + 1.0)
