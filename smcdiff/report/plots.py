"""The pictures of a report, in one look that does not rely on telling red from green.

Images are grey and shown pixel by pixel; a pixel that was hidden is light blue. Deviations are shown in cividis,
signed differences from purple to orange, and lines in the colours of Okabe and Ito with different dashes. Every
function returns a matplotlib `Figure`, and touches no global state.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np
from cycler import cycler
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from smcdiff.inverse import InverseProblem
from smcdiff.report.images import as_picture
from smcdiff.report.problems import unobserved
from smcdiff.report.summary import Estimates
from smcdiff.smc import SMCResult

__all__ = ["Panel", "image_panels", "plot_draws", "plot_ess", "plot_overview", "plot_panel", "style"]

HIDDEN = "#9fd0f0"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def style():
    """Context manager of the look: ``with style(): ...``."""
    return matplotlib.rc_context(
        {
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "figure.facecolor": "white",
            "font.family": "sans-serif",
            "font.size": 9,
            "image.interpolation": "nearest",
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "savefig.dpi": 150,
            "savefig.facecolor": "white",
        }
    )


class Panel(NamedTuple):
    """One image to draw.

    Attributes
    ----------
    name
        Of its file.
    title
        Above it.
    image
        Array (rows, columns) or (rows, columns, 3).
    cmap
        Colours of its values.
    limits
        Values at the ends of the colours.
    label
        At the colour bar.
    """

    name: str
    title: str
    image: Float[np.ndarray, "rows columns *rgb"]
    cmap: str
    limits: tuple[float, float]
    label: str


def image_panels(
    problem: InverseProblem,
    truth: Float[Array, "*event"] | Float[np.ndarray, "*event"],
    estimates: Estimates,
    pixel_range: tuple[float, float] = (0.0, 1.0),
) -> list[Panel]:
    """Truth, measurement, posterior mean and deviation, width of the intervals, and what the mean leaves unexplained.

    Parameters
    ----------
    problem
        The inverse problem.
    truth
        The true image.
    estimates
        From `smcdiff.report.estimate`.
    pixel_range
        Values of black and white.
    """
    low, high = (float(value) for value in pixel_range)
    mean = jnp.asarray(estimates.mean, problem.y.dtype)
    misfit = problem.residual(mean) / np.sqrt(problem.noise.variance(problem.y.shape))
    width = estimates.upper - estimates.lower
    percent = f"{100 * estimates.level:.0f} %"
    signed = _drawable(problem, misfit)
    bound = max(3.0, float(np.nan_to_num(np.abs(signed)).max()))
    grey = ("gray", (low, high), "pixel value")
    return [
        Panel("truth", "truth", as_picture(np.asarray(truth)), *grey),
        Panel("measurement", "measurement", _drawable(problem, problem.y), *grey),
        Panel("posterior_mean", "posterior mean", as_picture(estimates.mean), *grey),
        _map("posterior_std", "posterior sd", estimates.std, "standard deviation"),
        _map("interval_width", f"width of the {percent} intervals", width, "pixel value"),
        Panel("residual", "measurement − A mean", signed, "PuOr", (-bound, bound), "deviations of the noise"),
    ]


def plot_panel(panel: Panel) -> Figure:
    """One image with its title and colour bar."""
    with style():
        figure = Figure(figsize=(3.4, 3.0), layout="constrained")
        drawn = _show(figure.subplots(), panel)
        if panel.image.ndim == 2:
            figure.colorbar(drawn, ax=figure.axes[0], label=panel.label, shrink=0.9)
        return figure


def plot_draws(
    draws: Float[np.ndarray, "draws *event"], pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Figure:
    """Posterior draws side by side, four in a row.

    Parameters
    ----------
    draws
        Equally weighted.
    pixel_range
        Values of black and white.
    """
    low, high = (float(value) for value in pixel_range)
    with style():
        columns = min(4, len(draws))
        rows = -(-len(draws) // columns)
        figure = Figure(figsize=(1.5 * columns, 1.65 * rows), layout="constrained")
        for axes in figure.subplots(rows, columns, squeeze=False).ravel():
            axes.set_axis_off()
        for index, (axes, draw) in enumerate(zip(figure.axes, draws, strict=False)):
            _show(axes, Panel("", f"draw {index + 1}", as_picture(draw), "gray", (low, high), ""))
        return figure


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
        _draw_ess(figure.subplots(), result, ess_threshold)
        return figure


def plot_overview(
    panels: Sequence[Panel],
    draws: Float[np.ndarray, "draws *event"],
    result: SMCResult,
    ess_threshold: float | None = None,
    pixel_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """All in a row: truth, measurement, mean and deviation, draws, effective sample size.

    Parameters
    ----------
    panels
        From `image_panels`; the first four are shown.
    draws
        Equally weighted; the first eight are shown.
    result, ess_threshold
        See `plot_ess`.
    pixel_range
        Values of black and white.
    """
    low, high = (float(value) for value in pixel_range)
    with style():
        figure = Figure(figsize=(14.0, 2.3), layout="constrained")
        images, drawn, line = np.asarray(figure.subfigures(1, 3, width_ratios=[4.6, 2.9, 2.9]))
        for axes, panel in zip(images.subplots(1, 4), panels[:4], strict=True):
            artist = _show(axes, panel)
            if panel.name == "posterior_std":
                images.colorbar(artist, ax=images.axes[:4], shrink=0.8, pad=0.01)
        drawn.suptitle("posterior draws", fontsize=10)
        for axes, draw in zip(drawn.subplots(2, 4).ravel(), draws[:8], strict=False):
            _show(axes, Panel("", "", as_picture(draw), "gray", (low, high), ""))
        for axes in drawn.axes[len(draws) :]:
            axes.set_axis_off()
        _draw_ess(line.subplots(), result, ess_threshold)
        return figure


def _draw_ess(axes, result, ess_threshold):
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


def _show(axes, panel):
    """Draw one image without ticks."""
    low, high = panel.limits
    if panel.image.ndim == 3:
        hidden = np.isnan(panel.image)
        scaled = np.clip((panel.image - low) / (high - low), 0.0, 1.0)
        panel = panel._replace(image=np.where(hidden, matplotlib.colors.to_rgb(HIDDEN), scaled))
    cmap = matplotlib.colormaps[panel.cmap].with_extremes(bad=HIDDEN)
    artist = axes.imshow(panel.image, cmap=cmap, vmin=low, vmax=high)
    axes.set_title(panel.title)
    axes.set(xticks=[], yticks=[])
    axes.set_axis_on()
    for spine in axes.spines.values():
        spine.set(visible=True, color="0.6", linewidth=0.6)
    return artist


def _map(name, title, values, label):
    """Panel of a positive quantity; over colours the root mean square."""
    values = as_picture(values)
    values = np.sqrt(np.mean(values**2, axis=-1)) if values.ndim == 3 else values
    top = float(np.nan_to_num(values).max())
    return Panel(name, title, values, "cividis", (0.0, top if top > 0 else 1.0), label)


def _drawable(problem, y):
    """A measurement as an image: hidden pixels are NaN; A* y if it is no image of its own."""
    where = unobserved(problem)
    if not where.all():
        return as_picture(np.where(where, np.nan, problem.adjoint(y)))
    shape = np.shape(y)
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))
    return as_picture(y if is_image else problem.adjoint(y))
