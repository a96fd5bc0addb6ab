"""Estimators of the score of a noised density, from the bare density alone."""

from smcdiff.estimators.annealed import annealed_importance
from smcdiff.estimators.annealed_smc import annealed_smc
from smcdiff.estimators.chains import ChainsState, chains
from smcdiff.estimators.cloud import CloudState
from smcdiff.estimators.ensemble import ensemble
from smcdiff.estimators.estimator import Estimate, ScoreEstimator
from smcdiff.estimators.importance import importance
from smcdiff.estimators.recursive import recursive
from smcdiff.estimators.rejection import rejection
from smcdiff.estimators.resample_move import resample_move

__all__ = [
    "ChainsState",
    "CloudState",
    "Estimate",
    "ScoreEstimator",
    "annealed_importance",
    "annealed_smc",
    "chains",
    "ensemble",
    "importance",
    "recursive",
    "rejection",
    "resample_move",
]
