"""Pictures of image posteriors.

Images are grey and shown pixel by pixel; a pixel that was hidden is light blue. Deviations are shown in cividis, signed
differences from purple to orange.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from smcdiff.diagnostics.estimates import Estimates, estimate, pooled_draws
from smcdiff.inverse import InverseProblem, unobserved
from smcdiff.plots.path import draw_ess
from smcdiff.plots.style import HIDDEN, style
from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = [
    "Panel",
    "as_picture",
    "image_panels",
    "plot_draws",
    "plot_overview",
    "plot_panel",
    "plot_posterior",
]


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
    problem: InverseProblem | None,
    truth: Float[Array, "*event"] | Float[np.ndarray, "*event"] | None,
    estimates: Estimates,
    pixel_range: tuple[float, float] = (0.0, 1.0),
) -> list[Panel]:
    """Truth, measurement, posterior mean and deviation, width of the intervals, and what the mean leaves unexplained.

    Parameters
    ----------
    problem
        The inverse problem; None leaves the measurement and what is unexplained out.
    truth
        The true image; None where it is not known.
    estimates
        From `smcdiff.diagnostics.estimate`.
    pixel_range
        Values of black and white.
    """
    low, high = (float(value) for value in pixel_range)
    grey = ("gray", (low, high), "pixel value")
    percent = f"{100 * estimates.level:.0f} %"
    panels = [
        Panel("posterior_mean", "posterior mean", as_picture(estimates.mean), *grey),
        _map("posterior_std", "posterior sd", estimates.std, "standard deviation"),
        _map(
            "interval_width",
            f"width of the {percent} intervals",
            estimates.upper - estimates.lower,
            "pixel value",
        ),
    ]
    if problem is not None:
        panels.insert(0, Panel("measurement", "measurement", _drawable(problem, problem.y), *grey))
        mean = jnp.asarray(estimates.mean, problem.y.dtype)
        signed = _drawable(problem, problem.residual(mean) / np.sqrt(problem.noise.variance(problem.y.shape)))
        bound = max(3.0, float(np.nan_to_num(np.abs(signed)).max()))
        panels.append(
            Panel(
                "residual", "measurement − A mean", signed, "PuOr", (-bound, bound), "deviations of the noise"
            )
        )
    if truth is not None:
        panels.insert(0, Panel("truth", "truth", as_picture(np.asarray(truth)), *grey))
    return panels


def plot_posterior(
    result: SMCResult | Trace | Float[np.ndarray, "chains draws *event"],
    *,
    problem: InverseProblem | None = None,
    truth: Float[np.ndarray, "*event"] | None = None,
    level: float = 0.9,
    num_draws: int = 8,
    pixel_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """An image posterior at a glance: what was measured, mean, deviation, interval widths, misfit, draws.

    Parameters
    ----------
    result
        Weighted particles (their weights count), a trace, or draws (chains, draws, *event).
    problem
        The inverse problem, for the measurement and what the mean leaves unexplained.
    truth
        The true image, where it is known.
    level
        Probability of the central intervals.
    num_draws
        How many equally weighted draws are shown.
    pixel_range
        Values of black and white.
    """
    panels = image_panels(problem, truth, estimate(result, level), pixel_range)
    draws = pooled_draws(jax.random.key(0), result, num_draws)
    columns = max(len(panels), len(draws))
    low, high = (float(value) for value in pixel_range)
    with style():
        figure = Figure(figsize=(1.75 * columns, 3.7), layout="constrained")
        above, below = np.asarray(figure.subfigures(2, 1, height_ratios=[1.15, 1.0]))
        for axes, panel in zip(above.subplots(1, len(panels), squeeze=False).ravel(), panels, strict=True):
            artist = _show(axes, panel)
            if panel.image.ndim == 2 and panel.cmap != "gray":
                above.colorbar(artist, ax=axes, shrink=0.75, pad=0.03)
        for index, axes in enumerate(below.subplots(1, columns, squeeze=False).ravel()):
            if index < len(draws):
                _show(axes, Panel("", f"draw {index + 1}", as_picture(draws[index]), "gray", (low, high), ""))
            else:
                axes.set_axis_off()
        return figure


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
        draw_ess(line.subplots(), result, ess_threshold)
        return figure


def as_picture(sample: Float[np.ndarray, "*event"]) -> Float[np.ndarray, "rows columns *rgb"]:
    """Bring a sample into the axes that are drawn: (rows, columns), or (rows, columns, 3) for colour.

    Parameters
    ----------
    sample
        Array (rows, columns), (1, rows, columns) or (3, rows, columns).

    Raises
    ------
    ValueError
        If it has other axes.
    """
    sample = np.asarray(sample)
    if sample.ndim == 3 and sample.shape[0] in (1, 3):
        sample = sample[0] if sample.shape[0] == 1 else np.moveaxis(sample, 0, -1)
        return sample
    if sample.ndim != 2:
        raise ValueError(
            f"pictures are of images (rows, columns) or (1 or 3, rows, columns), got shape {sample.shape}."
        )
    return sample


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
