"""Distances beside their floor."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from smcdiff.metrics import Distance
from smcdiff.plots.style import COLOURS, style

__all__ = ["plot_distances"]


def plot_distances(distances: Mapping[str, Distance], *, title: str = "distance / floor") -> Figure:
    """Distances as multiples of their floor, with two standard errors: nothing can lie left of 1 for long.

    Parameters
    ----------
    distances
        Samplers, or whatever is compared, and their distances to one reference.
    title
        Above the picture.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    if not distances:
        raise ValueError("distances must hold at least one distance, got none.")
    names = list(distances)
    value, error, floor = (
        np.array([float(getattr(distances[name], field)) for name in names])
        for field in ("value", "standard_error", "floor")
    )
    at = np.arange(len(names))[::-1]
    with style():
        figure = Figure(figsize=(6.0, 0.9 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1.0, color="0.5", linestyle="-", linewidth=0.8, label="two clouds of exact samples")
        axes.errorbar(value / floor, at, xerr=2 * error / floor, fmt="o", color=COLOURS[0])
        axes.set_yticks(at, names)
        axes.set(xlabel=title, ylim=(-0.6, len(names) - 0.4))
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0))
        return figure
