"""Distances between a weighted cloud of samples and a reference, each with its standard error and its floor."""

from smcdiff.metrics.classifier import ClassifierTest, classifier_two_sample_test
from smcdiff.metrics.distance import Distance, HypothesisTest
from smcdiff.metrics.importance import ImportanceEstimate, adaptive_importance
from smcdiff.metrics.mmd import mmd, mmd_test
from smcdiff.metrics.mode_weights import mode_weight_tv
from smcdiff.metrics.optimally_weighted import optimal_weights, optimally_weighted_mmd
from smcdiff.metrics.sliced import sliced_ks, sliced_wasserstein
from smcdiff.metrics.stein import ksd, ksd_test
from smcdiff.metrics.transport import SinkhornDivergence, sinkhorn_divergence, wasserstein

__all__ = [
    "ClassifierTest",
    "Distance",
    "HypothesisTest",
    "ImportanceEstimate",
    "SinkhornDivergence",
    "adaptive_importance",
    "classifier_two_sample_test",
    "ksd",
    "ksd_test",
    "mmd",
    "mmd_test",
    "mode_weight_tv",
    "optimal_weights",
    "optimally_weighted_mmd",
    "sinkhorn_divergence",
    "sliced_ks",
    "sliced_wasserstein",
    "wasserstein",
]
