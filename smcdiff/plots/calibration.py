"""Pictures of calibration: ranks with exact bands, coverage with exact bands, coverage by pixel."""

import itertools
import math

import numpy as np
from matplotlib.figure import Figure

from smcdiff.calibration import Calibration, Coverage, LocalCoverage, ecdf_bands
from smcdiff.plots.images import as_picture
from smcdiff.plots.style import COLOURS, style

__all__ = ["plot_coverage", "plot_local_coverage", "plot_ranks"]

_MOST = 12  # functions of one figure


def plot_ranks(calibration: Calibration, *, prob: float = 0.95, num_points: int = 100) -> Figure:
    """Distribution function of the transforms of every function, less that of a uniform, with simultaneous bands.

    Inside the bands the function is calibrated as far as these data sets can tell. A line above on the left and
    below on the right is a posterior that is too narrow, the reverse one too wide; a line on one side is a shift.

    Parameters
    ----------
    calibration
        From `smcdiff.calibration.calibrate`; of more than 12 functions those farthest from uniform are drawn.
    prob
        Probability of a uniform's line staying inside the bands everywhere.
    num_points
        Points at which lines and bands are computed, at most the number of data sets.

    Source: Sailynoja, Buerkner and Vehtari, arXiv 2103.10522.
    """
    values = np.asarray(calibration.pit, float)
    count = len(values)
    bands = ecdf_bands(max(2, min(num_points, count)), count, prob)
    sorted_values = np.sort(values, axis=0)
    lines = np.stack(
        [np.searchsorted(column, bands.points, side="right") / count for column in sorted_values.T]
    )
    lines[:, 0], lines[:, -1] = 0.0, 1.0
    worst = np.argsort(-np.max(np.abs(lines - bands.points), axis=1), kind="stable")[:_MOST]
    rows, columns = _grid(len(worst))
    with style():
        figure = Figure(figsize=(2.6 * columns, 2.2 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, index in zip(panels.ravel(), np.sort(worst), strict=False):
            axes.fill_between(
                bands.points,
                bands.lower - bands.points,
                bands.upper - bands.points,
                color="0.88",
                label=f"{100 * prob:.0f} % of uniforms",
            )
            line = lines[index]
            inside = np.all((line >= bands.lower) & (line <= bands.upper))
            axes.plot(bands.points, line - bands.points, color=COLOURS[0 if inside else 1], linestyle="-")
            axes.axhline(0.0, color="0.5", linestyle="-", linewidth=0.8)
            axes.set_title(calibration.names[index] + ("" if inside else ": outside"))
        for axes in panels.ravel()[len(worst) :]:
            axes.set_axis_off()
        figure.supxlabel("probability integral transform", fontsize=9)
        figure.supylabel("its distribution function − uniform", fontsize=9)
        return figure


def plot_coverage(coverage: Coverage) -> Figure:
    """Expected against nominal coverage, with simultaneous bands.

    Below the diagonal the posterior is too sure of itself.

    Parameters
    ----------
    coverage
        From `smcdiff.calibration.expected_coverage` or `tarp`.
    """
    values = np.asarray(coverage.coverage)
    with style():
        figure = Figure(figsize=(3.8, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(coverage.levels, coverage.lower, coverage.upper, color="0.88", label="bands")
        axes.plot([0, 1], [0, 1], color="0.5", linestyle="-", linewidth=0.8)
        if values.shape[1] <= len(COLOURS):
            for name, line in zip(coverage.names, values.T, strict=True):
                axes.plot(coverage.levels, line, label=name)
        else:
            axes.plot(coverage.levels, values, color=COLOURS[0], linestyle="-", linewidth=0.5, alpha=0.3)
            axes.plot(
                coverage.levels,
                coverage.mean,
                color=COLOURS[1],
                linestyle="-",
                label=f"mean of {values.shape[1]}",
            )
        axes.set(xlabel="nominal", ylabel="covered", xlim=(0, 1), ylim=(0, 1), title="expected coverage")
        axes.legend(fontsize=8)
        return figure


def plot_local_coverage(coverage: LocalCoverage) -> Figure:
    """Where in the image, and at which posterior deviation, intervals cover the truth too seldom or too often.

    Parameters
    ----------
    coverage
        From `smcdiff.calibration.local_coverage`, of a function that is an image.
    """
    z = as_picture(np.asarray(coverage.z, float))
    bound = max(4.0, float(np.nanmax(np.abs(z), initial=0.0)))
    centres = np.arange(len(coverage.bin_coverage))
    edges = np.asarray(coverage.bin_edges)
    with style():
        figure = Figure(figsize=(7.0, 2.9), layout="constrained")
        image, bins = figure.subplots(1, 2, width_ratios=[1.0, 1.4])
        artist = image.imshow(z, cmap="PuOr", vmin=-bound, vmax=bound)
        image.set(xticks=[], yticks=[], title="(covered − level) / standard error")
        figure.colorbar(artist, ax=image, shrink=0.85)
        bins.errorbar(
            centres,
            coverage.bin_coverage,
            yerr=2 * np.asarray(coverage.bin_std_error),
            fmt="o",
            color=COLOURS[0],
        )
        bins.axhline(coverage.level, color="0.5", linestyle="-", linewidth=0.8)
        bins.set_xticks(centres, [f"{a:.2g} to\n{b:.2g}" for a, b in itertools.pairwise(edges)], fontsize=7)
        bins.set(
            xlabel="posterior deviation",
            ylabel=f"covered, of {100 * coverage.level:.0f} %",
            ylim=(None, 1.02),
        )
        return figure


def _grid(count):
    columns = min(4, count)
    return math.ceil(count / columns), columns
