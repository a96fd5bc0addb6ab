"""Calibration: does a posterior sampler's uncertainty mean what it says?

    calibration = smcdiff.calibration.calibrate(
        rng_key, prior, simulate, sampler, num_data_sets=200, functions=functions, checkpoint="runs/sbc"
    )
    smcdiff.calibration.rank_test(calibration).raise_if_failed()
    smcdiff.calibration.expected_coverage(calibration)

Truths are drawn from the prior and data simulated, so that nothing but the prior, the simulator and the sampler is
needed: no exact posterior. `posterior_predictive_check` asks another question, of one data set: does the model fit?
"""

from smcdiff.calibration.calibrate import Calibration, calibrate
from smcdiff.calibration.coverage import (
    Coverage,
    LocalCoverage,
    coverage_of_balls,
    expected_coverage,
    local_coverage,
    tarp,
)
from smcdiff.calibration.draws import Draws, as_draws
from smcdiff.calibration.pit import pit
from smcdiff.calibration.predictive import PredictiveCheck, posterior_predictive_check
from smcdiff.calibration.uniformity import EcdfBands, RankTest, ecdf_bands, rank_test

__all__ = [
    "Calibration",
    "Coverage",
    "Draws",
    "EcdfBands",
    "LocalCoverage",
    "PredictiveCheck",
    "RankTest",
    "as_draws",
    "calibrate",
    "coverage_of_balls",
    "ecdf_bands",
    "expected_coverage",
    "local_coverage",
    "pit",
    "posterior_predictive_check",
    "rank_test",
    "tarp",
]
