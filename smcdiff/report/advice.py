"""What to be told of a result before its pictures are believed: what is wrong, and what to try."""

from typing import Any

import numpy as np

from smcdiff.smc import SMCResult

__all__ = ["advise"]

# Where a figure turns into a warning. Of long chains one asks an R-hat of 1.01; tens of particles cannot show it.
LOW_ESS = 0.05  # of the particles
HIGH_RHAT = 1.1
HIGH_EVIDENCE_SD = 1.0  # nats: beyond it the chain with the highest estimate outweighs the others
HIGH_RESIDUAL = 1.5


def advise(result: SMCResult, summary: dict[str, Any]) -> list[str]:
    """Sentences that say what is wrong with a result, and what to try; none if nothing is.

    Parameters
    ----------
    result
        The result.
    summary
        Its figures, from `smcdiff.report.summarise`.
    """
    return [*_invalid(result), *_unreliable(summary)]


def _invalid(result):
    for chain in np.flatnonzero(~np.isfinite(result.log_evidence)):
        bad = ~np.isfinite(result.info.log_evidence_increment[chain])
        when = f"at step {int(np.argmax(bad)) + 1}" if bad.any() else "at the start"
        yield (
            f"NOT VALID: in chain {chain} every particle lost its weight {when}, and its log evidence is not finite. "
            "Try more particles, more steps, or a larger noise."
        )
    invalid = np.asarray(result.info.num_invalid)
    if invalid.any():
        step = int(np.argmax(invalid.sum(axis=0) > 0)) + 1
        yield (
            f"NOT VALID: {int(invalid.sum())} of {invalid.size * result.log_weights.shape[1]} weights came out NaN "
            f"or infinite, first at step {step}; these particles were dropped. Look for overflow in the model at that "
            "noise level, and try a twist of lower rank, or pigdm, which is the most robust."
        )


def _unreliable(summary):
    evidence, ess, chains = summary["log_evidence"], summary["ess"], len(summary["log_evidence"]["chains"])
    if evidence["sd"] is not None and evidence["sd"] > HIGH_EVIDENCE_SD:
        yield (
            f"The log evidence differs between chains by {evidence['sd']:.1f} nats (standard deviation), so that "
            f"averages rest on {evidence['effective_chains']:.1f} of {chains} chains. Try more particles or more steps."
        )
    if ess["minimum"] < LOW_ESS * ess["num_particles"]:
        yield (
            f"The effective sample size fell to {ess['minimum']:.1f} of {ess['num_particles']} particles (step "
            f"{ess['minimum_at_step']}, chain {ess['minimum_in_chain']}). Try more particles, more steps, or another "
            "twist."
        )
    if summary["max_rhat"] is not None and summary["max_rhat"] > HIGH_RHAT:
        yield (
            f"R-hat reaches {summary['max_rhat']:.2f}: the chains have not found the same posterior. "
            "Try more particles; more chains show the differences and do not mend them."
        )
    if summary["max_rhat"] is None:
        yield "R-hat could not be computed: it takes at least 2 chains and 4 particles that differ."
    if summary["residual_rms"] is not None and summary["residual_rms"] > HIGH_RESIDUAL:
        yield (
            f"The posterior mean misses the measurement by {summary['residual_rms']:.1f} deviations of the noise "
            "(root mean square; about 1 is right). Try more particles or steps, and ask whether the model can make "
            "such images."
        )
