"""Saying in words what is wrong with a result, and what to try.

Every check has one threshold, named below, and at most one finding for a result. A finding is "invalid" where numbers
are no estimate of anything, a "warning" where they are likely to be off, and a "note" where something cannot be checked
or is worth knowing.

Thresholds of chains are those of Vehtari et al., arXiv 1903.08008 (R-hat 1.01, 100 effective draws a chain), and
Betancourt, arXiv 1604.00695 (E-BFMI 0.3); k-hat's is of arXiv 1507.02646. Of tens of particles one cannot ask an R-hat
of 1.01, so that for runs of SMC it is 1.1.
"""

from collections.abc import Iterator

import jax
import numpy as np

from smcdiff.arviz_io.datasets import named_arrays, split_sample
from smcdiff.arviz_io.statistics import chain_statistics
from smcdiff.diagnostics.chains import rhat
from smcdiff.diagnostics.diagnose_chains import chain_findings
from smcdiff.diagnostics.findings import Finding
from smcdiff.diagnostics.particles import weight_diagnostics
from smcdiff.inverse import InverseProblem
from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = ["Finding", "diagnose", "smc_findings"]

LOW_ESS = 0.05  # of the particles
HIGH_RHAT = 1.1
HIGH_EVIDENCE_SD = 1.0  # nats: beyond it the chain with the highest estimate outweighs the others
HIGH_PARETO_K = 0.7
HIGH_RESIDUAL = 1.5
LOW_MOVE_ACCEPTANCE = 0.1
FEW_ANCESTORS = 3
MANY_ENTRIES, MANY_RHATS = 20, 0.05  # of more entries, chance alone puts a few above


def diagnose(
    result: SMCResult | Trace, *, problem: InverseProblem | None = None, show: bool = True
) -> tuple[Finding, ...]:
    """Say in words what is wrong with a result, and what to try.

    Parameters
    ----------
    result
        An `SMCResult`, or the `Trace` of Markov chains, also as `smcdiff.from_arviz` reads it.
    problem
        For an `SMCResult` whose particles are the samples: the inverse problem, whose measurement the posterior mean
        should fit.
    show
        Whether to print the findings, or that there are none.

    Returns
    -------
    The findings, the worst first; none if nothing is out of bounds, which is no proof that all is well: no check sees a
    mode that every run missed.

    Raises
    ------
    TypeError
        If ``result`` is neither.
    """
    if isinstance(result, SMCResult):
        findings = smc_findings(
            result, max_rhat=_rhat_of_runs(result), residual_rms=_residual(result, problem)
        )
    elif isinstance(result, Trace):
        sample, statistics = split_sample(result.samples)
        findings = chain_findings(
            named_arrays(sample), chain_statistics(result.info) | chain_statistics(statistics)
        )
    else:
        raise TypeError(f"diagnose takes an SMCResult or a Trace, got {type(result).__name__}.")
    order = ("invalid", "warning", "note")
    found = tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))
    if show:
        print("\n".join(f"{f.severity}: {f.sentence}" for f in found) or "Nothing is out of bounds.")
    return found


def smc_findings(
    result: SMCResult, *, max_rhat: float | None, residual_rms: float | None = None
) -> Iterator[Finding]:
    """Findings about an SMC result.

    Parameters
    ----------
    result
        The result.
    max_rhat
        Largest R-hat between its runs; None if there is none.
    residual_rms
        Misfit of the posterior mean in deviations of the noise, root mean square; None if there is no measurement.
    """
    yield from _invalid(result)
    yield from _evidence(result)
    yield from _weights(result)
    yield from _genealogy(result)
    yield from _inside(result)
    if max_rhat is None:
        yield Finding(
            "rhat",
            "warning",
            "R-hat could not be computed: it takes at least 2 chains and 4 particles that differ.",
        )
    elif max_rhat > HIGH_RHAT:
        yield Finding(
            "rhat",
            "warning",
            f"R-hat reaches {max_rhat:.2f}: the chains have not found the same posterior. "
            "Try more particles; more chains show the differences and do not mend them.",
        )
    if residual_rms is not None and residual_rms > HIGH_RESIDUAL:
        yield Finding(
            "residual",
            "warning",
            f"The posterior mean misses the measurement by {residual_rms:.1f} deviations of the noise "
            "(root mean square; about 1 is right). Try more particles or steps, and ask whether the model can make "
            "such images.",
        )


def _invalid(result):
    for chain in np.flatnonzero(~np.isfinite(result.log_evidence)):
        bad = ~np.isfinite(result.info.log_evidence_increment[chain])
        when = f"at step {int(np.argmax(bad)) + 1}" if bad.any() else "at the start"
        yield Finding(
            "evidence",
            "invalid",
            f"NOT VALID: in chain {chain} every particle lost its weight {when}, and its log evidence is not finite. "
            "Try more particles, more steps, or a larger noise.",
        )
    invalid = np.asarray(result.info.num_invalid)
    if invalid.any():
        step = int(np.argmax(invalid.sum(axis=0) > 0)) + 1
        yield Finding(
            "weights",
            "invalid",
            f"NOT VALID: {int(invalid.sum())} of {invalid.size * result.log_weights.shape[1]} weights came out NaN "
            f"or infinite, first at step {step}; these particles were dropped. Look for overflow in the model at that "
            "noise level, and try a twist of lower rank, or pigdm, which is the most robust.",
        )


def _evidence(result):
    values = np.asarray(result.log_evidence, float)
    if len(values) > 1 and np.all(np.isfinite(values)) and (spread := values.std(ddof=1)) > HIGH_EVIDENCE_SD:
        shares = np.exp(values - np.logaddexp.reduce(values))
        yield Finding(
            "evidence",
            "warning",
            f"The log evidence differs between chains by {spread:.1f} nats (standard deviation), so that "
            f"averages rest on {1.0 / np.sum(shares**2):.1f} of {len(values)} chains. Try more particles or more "
            "steps.",
        )
    if not np.any(result.info.log_evidence_increment) and not np.any(result.log_evidence):
        yield Finding(
            "weights",
            "note",
            "This sampler gives no weights, so that none of its numbers says how far it is off. Compare with twice as "
            "many steps, or with a method that weighs.",
        )


def _weights(result):
    ess, num_particles = result.ess, result.log_weights.shape[1]
    if ess.min() < LOW_ESS * num_particles:
        chain, step = np.unravel_index(int(np.argmin(ess)), ess.shape)
        yield Finding(
            "ess",
            "warning",
            f"The effective sample size fell to {ess.min():.1f} of {num_particles} particles (step "
            f"{int(step) + 1}, chain {int(chain)}). Try more particles, more steps, or another twist.",
        )
    alive = np.isfinite(result.log_evidence)
    khat = np.where(alive, weight_diagnostics(result.log_weights).pareto_k, np.nan)
    if np.any(khat > HIGH_PARETO_K):
        yield Finding(
            "pareto_k",
            "warning",
            f"Pareto k of the final weights reaches {np.nanmax(khat):.2f} (chain {int(np.nanargmax(khat))}): a few "
            "particles carry the averages, and weights that were not drawn could carry more. Try more particles, "
            "smaller steps, or another twist.",
        )


def _genealogy(result):
    common, ancestors = result.common_ancestor_step(), result.unique_ancestors()
    num_steps, chain = ancestors.shape[1] - 1, int(np.argmax(common))
    if common[chain] > num_steps // 2:
        yield Finding(
            "ancestors",
            "warning",
            f"All final particles of chain {chain} descend from a single one of step {int(common[chain])} of "
            f"{num_steps}: whatever was settled by then was decided once. Try more particles, Markov moves after the "
            "steps (move=), or a lower ess_threshold.",
        )
    elif ancestors[:, 0].min() <= min(FEW_ANCESTORS, result.log_weights.shape[1] - 1):
        chain = int(np.argmin(ancestors[:, 0]))
        yield Finding(
            "ancestors",
            "note",
            f"The final particles of chain {chain} descend from {int(ancestors[chain, 0])} of the first ones: what "
            "the first steps settle, such as the mode, was decided that often. Compare chains, or use more particles.",
        )


def _inside(result):
    """What moves and estimators inside the steps report."""
    moves = named_arrays(result.info.move_info) if result.info.move_info is not None else {}
    rate = moves.get("acceptance_rate")
    if rate is not None and rate.ndim == 2 and (typical := np.nanmedian(rate)) < LOW_MOVE_ACCEPTANCE:
        yield Finding(
            "moves",
            "warning",
            f"The Markov moves after the steps accept {typical:.0%} of their proposals (median over the steps), and "
            "hardly renew particles. Try a smaller step_size, or let it adapt.",
        )
    flagged = getattr(result.particles, "num_invalid", None)
    if flagged is not None and np.any(flagged):
        yield Finding(
            "estimates",
            "warning",
            f"Estimates of the score were flagged on the way of {np.mean(np.asarray(flagged) > 0):.0%} of the "
            f"particles (least effective sample size of an estimate: {np.min(result.particles.least_ess):.1f}). Give "
            "the estimator more samples or steps, or begin at less noise.",
        )
    sample = split_sample(result.particles).sample
    weighted = np.isfinite(result.log_weights) & np.isfinite(result.log_evidence)[:, None]
    bad = {
        name: int((~np.isfinite(value).reshape(*value.shape[:2], -1).all(axis=2) & weighted).sum())
        for name, value in named_arrays(sample).items()
        if np.issubdtype(value.dtype, np.inexact)
    }
    if any(bad.values()):
        name = max(bad, key=lambda key: bad[key])
        yield Finding(
            "particles",
            "invalid",
            f"NOT VALID: {bad[name]} particles with a weight are not finite in {name}. Look for overflow in the model "
            "or the last steps of the grid.",
        )


def _rhat_of_runs(result):
    """Largest R-hat over the entries between valid runs; of many entries, that which 5 % exceed. None without."""
    alive = np.flatnonzero(np.isfinite(result.log_evidence))
    if len(alive) < 2 or result.log_weights.shape[1] < 4 or result.particles is None:
        return None
    chosen = result.resample_indices(jax.random.key(0))
    sample = named_arrays(split_sample(result.particles).sample)
    found = []
    for value in sample.values():
        if np.issubdtype(value.dtype, np.inexact):
            found.append(np.ravel(rhat(np.stack([value[c][chosen[c]] for c in alive]))))
    values = np.concatenate(found) if found else np.zeros(0)
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    return float(np.max(values) if values.size <= MANY_ENTRIES else np.quantile(values, 1.0 - MANY_RHATS))


def _residual(result, problem):
    """Misfit of the posterior mean, root mean square, in deviations of the noise."""
    if problem is None or result.particles is None or not np.any(np.isfinite(result.log_evidence)):
        return None
    mean = jax.numpy.asarray(split_sample(result.mean()).sample, problem.y.dtype)
    misfit = np.asarray(problem.residual(mean), float) / np.sqrt(problem.noise.variance(problem.y.shape))
    return float(np.sqrt(np.mean(misfit**2)))
