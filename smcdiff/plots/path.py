"""Pictures of a run of SMC along its path: effective sample size, log evidence, genealogy."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smcdiff.plots.style import COLOURS, style
from smcdiff.smc import SMCResult

__all__ = ["draw_ess", "plot_ess", "plot_genealogy", "plot_log_evidence"]


def plot_ess(result: SMCResult, ess_threshold: float | None = None) -> Figure:
    """Effective sample size of every chain by step.

    Parameters
    ----------
    result
        The result.
    ess_threshold
        Fraction of the particles below which particles were resampled.
    """
    with style():
        figure = Figure(figsize=(6.0, 2.8), layout="constrained")
        draw_ess(figure.subplots(), result, ess_threshold)
        return figure


def plot_log_evidence(result: SMCResult) -> Figure:
    """Log evidence of every chain as it builds up, and the spread of the chains around their mean.

    A step at which the chains part is where the estimate is made or lost: place steps, particles or moves there.

    Parameters
    ----------
    result
        The result, of at least one chain.
    """
    increments = np.asarray(result.info.log_evidence_increment, float)
    with np.errstate(invalid="ignore"):
        start = np.asarray(result.log_evidence, float) - increments.sum(axis=1)
        values = np.cumsum(increments, axis=1) + start[:, None]
    steps = np.arange(1, values.shape[1] + 1)
    with style():
        figure = Figure(figsize=(7.0, 2.8), layout="constrained")
        whole, spread = figure.subplots(1, 2)
        for chain, line in enumerate(values):
            label = f"chain {chain}" if len(values) <= len(COLOURS) else None
            whole.plot(steps, line, label=label, alpha=0.9)
            spread.plot(steps, line - values.mean(axis=0), alpha=0.9)
        whole.set(xlabel="step", ylabel="nats", title="log evidence so far")
        spread.set(xlabel="step", ylabel="nats", title="less the mean of the chains")
        spread.axhline(0.0, color="0.5", linestyle="-", linewidth=0.8)
        if len(values) <= len(COLOURS):
            whole.legend(fontsize=8)
        return figure


def plot_genealogy(result: SMCResult, chain: int = 0, max_particles: int = 64) -> Figure:
    """Lines of descent of one chain: which particles of every cloud the final ones come from.

    Parameters
    ----------
    result
        The result.
    chain
        Which chain.
    max_particles
        How many final particles are followed, those of evenly spaced indices.

    Raises
    ------
    ValueError
        If there is no such chain.
    """
    num_chains = len(result.log_weights)
    if not 0 <= chain < num_chains:
        raise ValueError(f"chain must be between 0 and {num_chains - 1}, got {chain}.")
    lines = np.asarray(result.ancestor_lines()[chain])
    followed = np.unique(np.linspace(0, lines.shape[1] - 1, max_particles).astype(int))
    with style():
        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        tree, count = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1.0])
        clouds = np.arange(len(lines))
        for i in followed:
            tree.plot(clouds, lines[:, i], color=COLOURS[0], linestyle="-", linewidth=0.6, alpha=0.5)
        tree.set(ylabel="particle", title=f"lines of descent, chain {chain}", ylim=(-1, lines.shape[1]))
        count.plot(clouds, result.unique_ancestors()[chain], color=COLOURS[1], linestyle="-")
        count.set(xlabel="step", ylabel="with\ndescendants", ylim=(0, None))
        return figure


def draw_ess(axes: Axes, result: SMCResult, ess_threshold: float | None = None) -> None:
    """The same into axes of yours."""
    ess, num_particles = result.ess, np.shape(result.log_weights)[1]
    steps = np.arange(1, ess.shape[1] + 1)
    for chain, values in enumerate(ess):
        label = f"chain {chain}" if len(ess) <= len(COLOURS) else None
        axes.plot(steps, values, label=label, alpha=0.9)
    if ess_threshold:
        line = ess_threshold * num_particles
        axes.axhline(line, color="0.5", linestyle="-", linewidth=0.8, label="resampled\nbelow")
    axes.set(xlabel="step", ylabel="particles", title="effective sample size", ylim=(0, 1.05 * num_particles))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
