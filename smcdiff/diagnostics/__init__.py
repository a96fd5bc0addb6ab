"""Diagnostics: can a result be trusted, and if not, what is wrong and what to try.

Of Markov chains (arrays with the axes chain, draw, *event, on the accelerator), of weighted particles, and of samples
of a network's prior. `diagnose` says in words what they found.
"""

from smcdiff.diagnostics.chains import (
    ChainDiagnostics,
    bfmi,
    chain_diagnostics,
    ess_bulk,
    ess_mean,
    ess_quantile,
    ess_tail,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
    rhat_nested,
)
from smcdiff.diagnostics.diagnose import diagnose
from smcdiff.diagnostics.estimates import Estimates, estimate, pooled_draws
from smcdiff.diagnostics.findings import Finding
from smcdiff.diagnostics.memorisation import NearestTrainingImage, nearest_training_image
from smcdiff.diagnostics.mode_interpolation import (
    TrajectoryVariance,
    sample_with_trajectory_variance,
    trajectory_variance,
)
from smcdiff.diagnostics.pareto import pareto_khat
from smcdiff.diagnostics.particles import (
    ParticleDiagnostics,
    WeightDiagnostics,
    particle_diagnostics,
    weight_diagnostics,
)
from smcdiff.diagnostics.streaming import (
    Streaming,
    StreamingSummary,
    streaming_init,
    streaming_summary,
    streaming_update,
)

__all__ = [
    "ChainDiagnostics",
    "Estimates",
    "Finding",
    "NearestTrainingImage",
    "ParticleDiagnostics",
    "Streaming",
    "StreamingSummary",
    "TrajectoryVariance",
    "WeightDiagnostics",
    "bfmi",
    "chain_diagnostics",
    "diagnose",
    "ess_bulk",
    "ess_mean",
    "ess_quantile",
    "ess_tail",
    "estimate",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "nearest_training_image",
    "pareto_khat",
    "particle_diagnostics",
    "pooled_draws",
    "rhat",
    "rhat_nested",
    "sample_with_trajectory_variance",
    "streaming_init",
    "streaming_summary",
    "streaming_update",
    "trajectory_variance",
    "weight_diagnostics",
]
