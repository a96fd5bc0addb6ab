"""The Monte Carlo error of one SMC run, estimated from that run alone.

Particles of one family, that is with the same ancestor in the initial cloud, are dependent; those of different
families are as good as independent. With W_e the total weight of family e, S = sum_e W_e^2 and D = 1 - S, the
probability that two particles drawn by weight are of different families.

**Evidence.** Let Z be the estimate and w_i = Z W_i. Over pairs of different families, Q = sum w_i w_j = Z^2 D. A step
that moves and weighs particles independently keeps the expectation of Q in proportion to the square of the true
evidence so far. Multinomial resampling multiplies it by (N - 1)/N, as the initial draw of N particles does, so that

    E[Z^2 (1 - V)] = (true evidence)^2,      1 - V = (N/(N - 1))^(R + 1) D_last,      hence  E[Z^2 V] = var Z,

where R counts the resamplings only. That is Lee and Whiteley's estimator; whether to resample may depend on the past,
since the argument is conditional on it, and weights are carried through the steps without. Here the factor N/(N - 1)
is replaced by its realised value, D before a resampling over D after it, whose expectation given the past is the
same but for O(1/N^2) if the resampling is multinomial, and which is near 1 if it is systematic, stratified or SSP,
where the constant factor would be far too large. What remains is what the weighings did:

    1 - V = prod_k D_k / D_k^-,        log Z has variance about -log(1 - V) = sum_k (log D_k^- - log D_k),

with D_k^- taken after the resampling and before the weighing of step k, and the first D^- equal to 1 - 1/N.

**Means.** The variance of a weighted mean is estimated by sum_e (sum_{i in e} W_i (f_i - mean))^2 (Chan and Lai).

**Lag.** Families grow in number of members and fall in number, to one in the end, when nothing can be said any more.
Taking families by the ancestor a fixed number of steps ago costs a bias, which is small once the model has forgotten
what was so long ago, and keeps the error bounded however long the run (Olsson and Douc).

Sources: Lee and Whiteley, "Variance estimation in the particle filter", arXiv 1509.00394; Chan and Lai, "A general
theory of particle filters in hidden Markov models and some applications", arXiv 1312.5114; Olsson and Douc,
"Numerically stable online estimation of variance in particle filters", arXiv 1701.01001.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from smcdiff.smc.genealogy import families

__all__ = ["log_evidence_variance", "mean_variance"]


def log_evidence_variance(
    ancestors: Int[np.ndarray, "steps N"],
    resampled: Bool[np.ndarray, " steps"],
    log_weights: Float[np.ndarray, "steps N"],
    *,
    lag: int | None = None,
) -> float:
    """Variance of the log evidence of one run, from that run.

    Parameters
    ----------
    ancestors
        Parents by step, shape (steps, N).
    resampled
        Whether each step resampled before it moved the particles, shape (steps,).
    log_weights
        Log weights after every step, shape (steps, N).
    lag
        Steps after which two particles count as independent; never if omitted.

    Returns
    -------
    The estimate, which noise can make slightly negative; infinity if all weight has come to be in one family, when a
    shorter ``lag`` or more particles are needed. Where the first step resampled it is too large by up to 1/N: the
    initial weights are no longer known then, and offspring counts stand for them.

    Raises
    ------
    ValueError
        If ``lag`` is not a positive integer.

    Source: "Variance estimation in the particle filter", arXiv 1509.00394; see the module for adaptive resampling.
    """
    members = families(ancestors, lag)
    num_steps, num_particles = members.shape
    weights = np.exp(np.asarray(log_weights, float))
    weights /= weights.sum(axis=1, keepdims=True)
    uniform = np.full(num_particles, 1 / num_particles)
    after = [_different(weights[k], members[k]) for k in range(num_steps)]
    before = [
        _different(uniform if resampled[k] else weights[k - 1], members[k]) for k in range(1, num_steps)
    ]
    # The initial weighing and, unless resampled in between, that of the first step are one.
    before.insert(0, 1 - 1 / num_particles)
    if min(after) < _ALL_ONE:
        return np.inf
    return float(np.sum(np.log(before)) - np.sum(np.log(after)))


def mean_variance(
    values: Float[np.ndarray, "N *event"], weights: Float[np.ndarray, " N"], members: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "*event"]:
    """Variance of the weighted mean of ``values``, for every entry.

    Parameters
    ----------
    values
        Values of the particles, shape (N, *event); where the weight is zero they may be NaN.
    weights
        Normalised weights, shape (N,).
    members
        Which family each particle belongs to, shape (N,): the last row of `smcdiff.smc.genealogy.families`.

    Returns
    -------
    Shape ``event``; infinity if all weight is in one family.

    Source: Chan and Lai, arXiv 1312.5114; with a lag, Olsson and Douc, arXiv 1701.01001.
    """
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    if _different(weights, members) < _ALL_ONE:
        return np.full(values.shape[1:], np.inf)
    alive = np.flatnonzero(weights > 0)
    order = alive[np.argsort(members[alive], kind="stable")]
    values, weights, members = values[order], weights[order], members[order]
    centred = values - np.tensordot(weights, values, axes=1)[None]
    shares = weights.reshape(-1, *[1] * (values.ndim - 1)) * centred
    starts = np.flatnonzero(np.diff(members, prepend=-1))
    return np.sum(np.add.reduceat(shares, starts, axis=0) ** 2, axis=0)


_ALL_ONE = 1e-9  # a probability of different families that is rounding


def _different(weights, members):
    """Probability that two particles drawn by weight are of different families."""
    return 1 - np.sum(np.bincount(members, weights) ** 2)
