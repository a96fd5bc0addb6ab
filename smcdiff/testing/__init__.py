"""Correctness as a call: do a kernel, a weighted sampler and a score do what they say?

    report = smcdiff.testing.check_invariance(rng_key, algorithm, target.sample)
    report.raise_if_failed()

Each check compares with something exact, states the probability with which it fails a right program, and says which
function of the sample is off, which way and by how many standard errors. A check that could see nothing (a chain that
never moved, an estimate too noisy) does not pass.
"""

from smcdiff.testing.functions import bounded_functions
from smcdiff.testing.invariance import check_invariance
from smcdiff.testing.report import CheckReport
from smcdiff.testing.reversibility import check_detailed_balance
from smcdiff.testing.scores import ScoreReport, check_score
from smcdiff.testing.weights import check_properly_weighted

__all__ = [
    "CheckReport",
    "ScoreReport",
    "bounded_functions",
    "check_detailed_balance",
    "check_invariance",
    "check_properly_weighted",
    "check_score",
]
