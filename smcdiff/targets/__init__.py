"""Bare densities with known truth, to compare samplers on: multimodal, curved, heavy-tailed, and posteriors."""

from smcdiff.targets.banana import BananaTarget, banana
from smcdiff.targets.eight_schools import EightSchoolsTarget, eight_schools
from smcdiff.targets.funnel import FunnelTarget, funnel
from smcdiff.targets.logistic_regression import LogisticRegressionTarget, logistic_regression
from smcdiff.targets.mixtures import (
    MixtureTarget,
    eight_modes,
    forty_modes,
    gaussian_modes,
    grid_modes,
    random_means,
    skewed_modes,
    two_modes,
)
from smcdiff.targets.phi4_chain import Phi4Target, phi4_chain
from smcdiff.targets.rings import RingsTarget, rings
from smcdiff.targets.student_mixture import StudentMixtureTarget, student_mixture
from smcdiff.targets.target import HasExactSampler, HasModes, Moments, Target, exact_moments
from smcdiff.targets.wells import WellsTarget, double_well, many_well

__all__ = [
    "BananaTarget",
    "EightSchoolsTarget",
    "FunnelTarget",
    "HasExactSampler",
    "HasModes",
    "LogisticRegressionTarget",
    "MixtureTarget",
    "Moments",
    "Phi4Target",
    "RingsTarget",
    "StudentMixtureTarget",
    "Target",
    "WellsTarget",
    "banana",
    "double_well",
    "eight_modes",
    "eight_schools",
    "exact_moments",
    "forty_modes",
    "funnel",
    "gaussian_modes",
    "grid_modes",
    "logistic_regression",
    "many_well",
    "phi4_chain",
    "random_means",
    "rings",
    "skewed_modes",
    "student_mixture",
    "two_modes",
]
