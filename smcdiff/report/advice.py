"""What to be told of a result before its pictures are believed; the sentences are those of `smcdiff.diagnostics`."""

from typing import Any

from smcdiff.diagnostics.diagnose import smc_findings
from smcdiff.smc import SMCResult

__all__ = ["advise"]


def advise(result: SMCResult, summary: dict[str, Any]) -> list[str]:
    """Sentences that say what is wrong with a result, and what to try; none if nothing is.

    Parameters
    ----------
    result
        The result.
    summary
        Its figures, from `smcdiff.report.summarise`.
    """
    findings = smc_findings(result, max_rhat=summary["max_rhat"], residual_rms=summary["residual_rms"])
    return [finding.sentence for finding in findings if finding.severity != "note"]
