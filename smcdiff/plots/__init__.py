"""Pictures: matplotlib figures in one look, which does not rely on telling red from green.

    smcdiff.plots.plot_posterior(result, problem=problem, truth=truth)
    smcdiff.plots.plot_chains(result, "rank")
    smcdiff.plots.plot_ranks(calibration)

Every function returns a `matplotlib.figure.Figure` and touches no global state; ``figure.savefig("x.png")`` keeps it.
"""

from smcdiff.plots.calibration import plot_coverage, plot_local_coverage, plot_ranks
from smcdiff.plots.chains import plot_chains
from smcdiff.plots.distances import plot_distances
from smcdiff.plots.images import (
    Panel,
    as_picture,
    image_panels,
    plot_draws,
    plot_overview,
    plot_panel,
    plot_posterior,
)
from smcdiff.plots.path import plot_ess, plot_genealogy, plot_log_evidence
from smcdiff.plots.style import style

__all__ = [
    "Panel",
    "as_picture",
    "image_panels",
    "plot_chains",
    "plot_coverage",
    "plot_distances",
    "plot_draws",
    "plot_ess",
    "plot_genealogy",
    "plot_local_coverage",
    "plot_log_evidence",
    "plot_overview",
    "plot_panel",
    "plot_posterior",
    "plot_ranks",
    "style",
]
