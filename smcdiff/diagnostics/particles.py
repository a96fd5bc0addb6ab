"""Diagnostics of weighted particles: how even the weights are, what they descend from, and how far the evidence holds.

Of normalised weights w_1..w_N,

    ESS = 1 / sum_i w_i^2,      entropy H = -sum_i w_i log w_i,      perplexity = exp(H),

both between 1 and N, and ESS <= perplexity; and Pareto k-hat of the largest weights: above 0.7 their variance is far
from what so few of them show, and the ESS flatters.

The log evidence has two errors. That of a single run is read off its genealogy (`smcdiff.smc.variance`), and knows
nothing of what the whole run missed. That between runs does: with estimates Z_c of C runs and r_c = Z_c / mean Z, the
log of their mean has about the standard error sd(r) / sqrt(C). Where the second is much larger, runs have missed modes.

Families are the descendants of one initial particle; with total weights W_e there are effectively 1 / sum_e W_e^2.

Sources: Cappé et al., "Adaptive importance sampling in general mixture classes", arXiv 0710.4242 (perplexity); Vehtari
et al., "Pareto smoothed importance sampling", arXiv 1507.02646; Lee and Whiteley, "Variance estimation in the particle
filter", arXiv 1509.00394; Olsson and Douc, arXiv 1701.01001.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from smcdiff.diagnostics.pareto import LEAST, pareto_khat
from smcdiff.smc import SMCResult
from smcdiff.smc.genealogy import families

__all__ = [
    "ParticleDiagnostics",
    "WeightDiagnostics",
    "particle_diagnostics",
    "weight_diagnostics",
]


class WeightDiagnostics(NamedTuple):
    """How even weights are; each field has the batch's shape.

    Attributes
    ----------
    ess
        Effective sample size, between 1 and N.
    entropy
        In nats, between 0 and log N.
    perplexity
        Its exponential, between 1 and N.
    max_weight
        The largest weight.
    pareto_k
        Tail shape of the weights; NaN where they are even, or fewer than 11.
    """

    ess: Float[np.ndarray, "*batch"]
    entropy: Float[np.ndarray, "*batch"]
    perplexity: Float[np.ndarray, "*batch"]
    max_weight: Float[np.ndarray, "*batch"]
    pareto_k: Float[np.ndarray, "*batch"]


class ParticleDiagnostics(NamedTuple):
    """What an SMC result says of itself.

    Attributes
    ----------
    ess, perplexity, max_weight, pareto_k
        Of the weights after each step, see `WeightDiagnostics`; shape (chains, steps).
    least_ess, least_ess_step
        The smallest effective sample size, and after which step it was, the first one being 0; shape (chains,).
    num_resamplings
        Number of steps that resampled, shape (chains,).
    unique_ancestors
        Particles of every cloud, the initial one first, with descendants in the last one, shape (chains, clouds).
    common_ancestor_step
        Number of the cloud with the last one's most recent common ancestor, -1 if none has it; shape (chains,).
    effective_families
        Effective number of initial particles that the final weight descends from, shape (chains,).
    log_evidence, log_evidence_std_error
        Estimate of each chain, and its error from that chain alone, infinite where it says nothing; shape (chains,).
    evidence_share
        What each chain counts for in pooled averages, shape (chains,); NaN if no chain has any weight left.
    effective_chains
        Effective number of chains by their shares.
    log_evidence_spread
        Standard deviation of the chains' log evidences; NaN for a single chain.
    pooled_log_evidence, pooled_log_evidence_std_error
        Of all chains, with the error from the chains' own errors.
    pooled_log_evidence_between
        Its error from how the chains differ; NaN for a single chain.
    """

    ess: Float[np.ndarray, "chains steps"]
    perplexity: Float[np.ndarray, "chains steps"]
    max_weight: Float[np.ndarray, "chains steps"]
    pareto_k: Float[np.ndarray, "chains steps"]
    least_ess: Float[np.ndarray, " chains"]
    least_ess_step: Int[np.ndarray, " chains"]
    num_resamplings: Int[np.ndarray, " chains"]
    unique_ancestors: Int[np.ndarray, "chains clouds"]
    common_ancestor_step: Int[np.ndarray, " chains"]
    effective_families: Float[np.ndarray, " chains"]
    log_evidence: Float[np.ndarray, " chains"]
    log_evidence_std_error: Float[np.ndarray, " chains"]
    evidence_share: Float[np.ndarray, " chains"]
    effective_chains: float
    log_evidence_spread: float
    pooled_log_evidence: float
    pooled_log_evidence_std_error: float
    pooled_log_evidence_between: float


def weight_diagnostics(log_weights: ArrayLike) -> WeightDiagnostics:
    """How even weights are.

    Parameters
    ----------
    log_weights
        Shape (*batch, N); they need not be normalised.

    Returns
    -------
    WeightDiagnostics; NaN where a log weight is NaN or plus infinity, or all are minus infinity.

    Raises
    ------
    ValueError
        If there is no axis of particles.

    Source: arXiv 0710.4242, section 3; arXiv 1507.02646.
    """
    log_weights = np.asarray(log_weights, float)
    if log_weights.ndim < 1 or not log_weights.shape[-1]:
        raise ValueError(f"log_weights must have the shape (*batch, N), got {log_weights.shape}.")
    with np.errstate(invalid="ignore"):
        log_weights = log_weights - np.logaddexp.reduce(log_weights, axis=-1, keepdims=True)
    weights = np.exp(log_weights)
    is_bad = ~np.isfinite(weights).all(axis=-1)
    entropy = -np.sum(weights * np.where(weights > 0, log_weights, 0.0), axis=-1)
    entropy = np.where(is_bad, np.nan, np.maximum(entropy, 0.0))
    return WeightDiagnostics(
        1.0 / np.sum(weights**2, axis=-1),
        entropy,
        np.exp(entropy),
        np.where(is_bad, np.nan, weights.max(axis=-1)),
        np.where(is_bad, np.nan, _pareto_k(log_weights)),
    )


def particle_diagnostics(result: SMCResult, *, lag: int | None = None) -> ParticleDiagnostics:
    """Everything that an SMC result says of itself, run by run.

    Parameters
    ----------
    result
        What `smcdiff.run_smc` or `smcdiff.posterior` returned.
    lag
        Steps after which particles count as independent, for the errors of single runs; see
        `smcdiff.smc.variance.log_evidence_variance`.

    Returns
    -------
    ParticleDiagnostics

    Source: arXiv 1509.00394; arXiv 1701.01001; see the module.
    """
    by_step = weight_diagnostics(result.log_weights_by_step)
    ess, evidence = result.ess, np.asarray(result.log_evidence, float)
    weights = np.exp(np.asarray(result.log_weights, float))
    members = np.stack([families(ancestors)[-1] for ancestors in result.info.ancestors])
    families_weight = [np.bincount(m, w) for m, w in zip(members, weights, strict=True)]
    with np.errstate(invalid="ignore"):  # no chain has any weight left: NaN
        shares = np.exp(evidence - np.logaddexp.reduce(evidence))
        spread = np.std(evidence, ddof=1) if len(evidence) > 1 else np.nan
    between = np.std(shares * len(shares), ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan
    return ParticleDiagnostics(
        ess,
        by_step.perplexity,
        by_step.max_weight,
        by_step.pareto_k,
        ess.min(axis=1),
        ess.argmin(axis=1),
        np.asarray(result.info.resampled).sum(axis=1),
        result.unique_ancestors(),
        result.common_ancestor_step(),
        np.array([1.0 / np.sum((w / w.sum()) ** 2) for w in families_weight]),
        evidence,
        result.log_evidence_std_error(lag),
        shares,
        float(1.0 / np.sum(shares**2)),
        float(spread),
        result.pooled_log_evidence(),
        result.pooled_log_evidence_std_error(lag),
        float(between),
    )


def _pareto_k(log_weights):
    batch, size = log_weights.shape[:-1], log_weights.shape[-1]
    if size < 2 * LEAST + 1:
        return np.full(batch, np.nan)
    rows = jnp.asarray(log_weights.reshape(-1, size).T)
    return np.asarray(pareto_khat(rows[None], r_eff=1.0, log_weights=True), float).reshape(batch)
