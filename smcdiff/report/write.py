"""Writing a report: data, figures, pictures and a page, in a folder that is complete or not there."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.diagnostics.estimates import estimate, pooled_draws
from smcdiff.inverse import InverseProblem, unobserved
from smcdiff.plots import as_picture, image_panels, plot_draws, plot_ess, plot_overview, plot_panel
from smcdiff.report.advice import advise
from smcdiff.report.data import DATA_FILES, image_dims, save_data
from smcdiff.report.folder import new_folder
from smcdiff.report.page import render
from smcdiff.report.summary import summarise
from smcdiff.report.timing import Stopwatch
from smcdiff.smc import SMCResult
from smcdiff.to_arviz import to_arviz

__all__ = ["REPORT_FILES", "write_files", "write_report"]

PICTURES = (
    "overview",
    "truth",
    "measurement",
    "posterior_mean",
    "posterior_std",
    "interval_width",
    "residual",
    "draws",
    "ess",
)
REPORT_FILES = (*DATA_FILES, "report.html", "summary.json", *(f"{name}.png" for name in PICTURES))


def write_report(folder: str | Path, *args, force: bool = False, **kwargs) -> dict[str, Any]:
    """Write the report of a result into a new folder; see `write_files` for the other arguments.

    Parameters
    ----------
    folder
        The folder to make. If anything fails it is not made.
    force
        Whether to replace an older report in it.

    Returns
    -------
    The summary, as in ``summary.json``.

    Raises
    ------
    FolderError
        If the folder may not be replaced or cannot be written.
    ValueError
        If the samples are no images.
    """
    with new_folder(folder, force=force, replaceable=REPORT_FILES) as partial:
        return write_files(partial, *args, **kwargs)


def write_files(
    folder: Path,
    result: SMCResult,
    problem: InverseProblem,
    truth: Float[Array, "*event"] | Float[np.ndarray, "*event"],
    *,
    rng_key: PRNGKeyArray,
    title: str = "Posterior of an image",
    settings: Mapping[str, Any] | None = None,
    watch: Stopwatch | None = None,
    source: str | None = None,
    ess_threshold: float | None = None,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """Write the files of a report into a folder that exists.

    Parameters
    ----------
    folder
        The folder.
    result
        What `smcdiff.posterior` returned, for images (rows, columns) or (1 or 3, rows, columns).
    problem
        The inverse problem.
    truth
        The true image.
    rng_key
        Key of the resampling of weighted particles.
    title
        Heading of the page.
    settings
        What to know of the run: strings, numbers and lists.
    watch
        How long the run took; see `smcdiff.report.stopwatch`.
    source
        Python code that gives the same numbers.
    ess_threshold
        Fraction of the particles below which particles were resampled, for the picture.
    pixel_range
        Values of black and white.
    tolerance
        Half a grey level of the truth; see `smcdiff.report.coverage`.

    Returns
    -------
    The summary, as in ``summary.json``.
    """
    truth = np.asarray(truth)
    as_picture(truth)  # says what is wrong before anything is computed
    key_data, key_draws = jax.random.split(rng_key)
    summary: dict[str, Any] = {"title": title, "settings": dict(settings or {}), "versions": _versions()}
    dims = {name: image_dims(truth.ndim) for name in ("x", "truth", "unobserved")}
    data = to_arviz(
        result,
        rng_key=key_data,
        dims=dims,
        pool=False,
        problem=problem,
        constant_data={"truth": truth, "unobserved": unobserved(problem)},
        attrs={"title": title, **{key: json.dumps(summary[key]) for key in ("settings", "versions")}},
    )
    data_file = save_data(data, folder)

    summary |= summarise(
        result,
        problem,
        truth,
        data["posterior"]["x"].values,
        tolerance=tolerance,
        peak=float(pixel_range[1] - pixel_range[0]),
    )
    summary["warnings"] = advise(result, summary)
    if watch is not None:
        summary["time"] = {"total": watch.total, "compile": watch.compile, "run": watch.run}
    summary["data_file"] = data_file
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")

    draws = pooled_draws(key_draws, result)
    panels = image_panels(problem, truth, estimate(result), pixel_range)
    figures = {"overview": plot_overview(panels, draws, result, ess_threshold, pixel_range)}
    figures |= {panel.name: plot_panel(panel) for panel in panels}
    figures |= {"draws": plot_draws(draws, pixel_range), "ess": plot_ess(result, ess_threshold)}
    pictures = {name: folder / f"{name}.png" for name in PICTURES}
    for name, path in pictures.items():
        figures[name].savefig(path, dpi=150)
    (folder / "report.html").write_text(render(title, summary, pictures, data_file, source), encoding="utf-8")
    return summary


def _versions():
    packages = ("smcdiff", "jax", "blackjax", "arviz", "numpy")
    device = jax.devices()[0]
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{device.platform} ({device.device_kind})",
    }


def _version(name):
    from smcdiff import __version__

    return __version__ if name == "smcdiff" else version(name)
