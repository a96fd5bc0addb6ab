"""From settings to a report: what the command ``smcdiff posterior`` does, as a function."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smcdiff import guidance
from smcdiff.checkpoints import held_out, load, models
from smcdiff.posterior import METHODS, posterior
from smcdiff.report.folder import new_folder
from smcdiff.report.images import read_image
from smcdiff.report.problems import MASKS, make_problem
from smcdiff.report.source import python_source
from smcdiff.report.timing import stopwatch
from smcdiff.report.write import REPORT_FILES, write_files

__all__ = ["SettingError", "Settings", "posterior_report"]

TWISTS: dict[str, Callable] = {
    "default": lambda rank: None,
    "moments": guidance.moment_matching,
    "pigdm": lambda rank: guidance.pigdm,
    "dps": lambda rank: guidance.dps,
}
TITLES = {"inpaint": "Inpainting", "deblur": "Deblurring", "superres": "Super-resolution"}
OPTIONS = {"inpaint": "mask", "deblur": "blur_width", "superres": "factor"}  # the option of each problem


class SettingError(ValueError):
    """A setting that cannot be used.

    Parameters
    ----------
    name
        Name of the setting.
    message
        What is wrong with it.
    """

    def __init__(self, name: str, message: object):
        super().__init__(str(message))
        self.name = name


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a report.

    Attributes
    ----------
    model
        Name of a model, or a model folder.
    problem
        "inpaint", "deblur" or "superres".
    image
        Number of a held-out image of the model, or a picture file.
    noise
        Deviation of the noise, in units of the pixels.
    mask, blur_width, factor
        Options of the problems; see `smcdiff.report.make_problem`.
    method, particles, chains, steps, ess_threshold, batch_size
        See `smcdiff.posterior`.
    twist, rank
        "default" (see `smcdiff.guidance.default_twist`), "moments" with its rank (None for all directions), "pigdm"
        or "dps".
    seed
        Of the noise and of the sampler.
    """

    model: str
    problem: str
    image: str | int = 0
    noise: float = 0.1
    mask: str | None = None
    blur_width: float | None = None
    factor: int | None = None
    method: str = "tds"
    twist: str = "default"
    rank: int | None = None
    particles: int = 64
    chains: int = 4
    steps: int = 100
    seed: int = 0
    ess_threshold: float = 0.5
    batch_size: int | None = None


def posterior_report(
    settings: Settings, out: str | Path, *, force: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Measure an image, sample its posterior, and write the report.

    Parameters
    ----------
    settings
        What to do.
    out
        Folder to make; nothing is left of it if anything fails.
    force
        Whether to replace an older report in it.
    progress
        Whether to show a bar.

    Returns
    -------
    The summary, as in ``summary.json``.

    Raises
    ------
    SettingError
        If a setting is wrong.
    FolderError
        If the folder may not be replaced or cannot be written.
    """
    _check(settings)
    with _naming("model"):
        model, card = load(settings.model), _card(settings.model)
    low, high = card.get("pixel_range", (0.0, 1.0))
    with _naming("image"):
        truth, tolerance = _truth(settings, model.event_shape, (low, high))
    key_noise, key_run, key_report = jax.random.split(jax.random.key(settings.seed), 3)
    option = OPTIONS[settings.problem]
    chosen = {option: getattr(settings, option)} if getattr(settings, option) is not None else {}
    with _naming(option if chosen else "problem"):
        problem = make_problem(key_noise, settings.problem, truth, settings.noise, **chosen)
    twist = TWISTS[settings.twist](settings.rank)
    told = _told(settings) | {"twist_used": _twist_name(twist or guidance.default_twist(model, problem))}
    with new_folder(out, force=force, replaceable=REPORT_FILES) as partial:
        if progress:
            print("sampling; the first step waits for the program to be compiled", file=sys.stderr)
        with stopwatch() as watch, warnings.catch_warnings():
            # The report says the same, and more of it.
            warnings.filterwarnings("ignore", ".* weights came out NaN or infinite", RuntimeWarning)
            result = posterior(
                key_run,
                model,
                problem,
                method=settings.method,
                num_particles=settings.particles,
                num_chains=settings.chains,
                num_steps=settings.steps,
                twist=twist,
                ess_threshold=settings.ess_threshold,
                batch_size=settings.batch_size,
                progress=progress,
            )
        return write_files(
            partial,
            result,
            problem,
            truth,
            rng_key=key_report,
            title=_title(settings),
            settings=told,
            watch=watch,
            source=python_source(told),
            ess_threshold=settings.ess_threshold,
            pixel_range=(low, high),
            tolerance=tolerance,
        )


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Turn what the library says of a wrong value into an error that names the setting."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SettingError(setting, error) from None


def _check(settings: Settings) -> None:
    """Find what can be told to be wrong before a model is read."""
    for name, known in (("problem", OPTIONS), ("method", METHODS), ("twist", TWISTS), ("mask", MASKS)):
        value = getattr(settings, name)
        if value is not None and value not in known:
            raise SettingError(name, f"must be one of {', '.join(known)}, got {value!r}")
    for problem, name in OPTIONS.items():
        if problem != settings.problem and getattr(settings, name) is not None:
            raise SettingError(name, f"goes with the problem {problem}, not with {settings.problem}")
    if settings.rank is not None and settings.twist != "moments":
        raise SettingError("rank", f"goes with the twist moments, not with {settings.twist}")


def _card(name: str) -> dict[str, Any]:
    """Card of a shipped model or of a model folder."""
    cards = models()
    return cards[name] if name in cards else json.loads((Path(name) / "card.json").read_text())


def _is_number(image: str | int) -> bool:
    return str(image).removeprefix("-").isdecimal()


def _truth(settings, event_shape, pixel_range):
    """The true image, and half a grey level of it."""
    if not _is_number(settings.image):
        return read_image(settings.image, event_shape, pixel_range), (pixel_range[1] - pixel_range[0]) / 510
    images, _ = held_out(settings.model)
    index = int(settings.image)
    if not 0 <= index < len(images):
        raise ValueError(f"must be from 0 to {len(images) - 1} for the model {settings.model}, got {index}")
    steps = np.diff(np.unique(images))
    return images[index], 0.5 * float(steps.min()) if len(steps) else 0.0


def _title(settings: Settings) -> str:
    image = settings.image
    name = f"held-out image {image}" if _is_number(image) else Path(str(image)).name
    return f"{TITLES[settings.problem]} of {name} with the model {Path(settings.model).name}"


def _twist_name(twist) -> str:
    rank = getattr(twist, "rank", None)
    return getattr(twist, "__name__", "moments" if rank is None else f"moments of rank {rank}")


def _told(settings: Settings) -> dict[str, Any]:
    """The settings without those that do not apply."""
    told = dataclasses.asdict(settings)
    for name in OPTIONS.values():
        if told[name] is None:
            del told[name]
    if settings.twist != "moments":
        del told["rank"]
    return told
