"""The Python code of a run of the command ``smcdiff posterior``."""

from collections.abc import Mapping
from typing import Any

__all__ = ["python_source"]


def python_source(settings: Mapping[str, Any]) -> str:
    """A script that gives the same numbers.

    Parameters
    ----------
    settings
        Settings as the command writes them into ``summary.json``: model, problem and its own option, image, noise,
        method, twist, rank, particles, chains, steps, seed, ess_threshold, batch_size.
    """
    own = "".join(f", {key}={settings[key]!r}" for key in ("mask", "blur_width", "factor") if key in settings)
    image = settings["image"]
    if str(image).isdigit():
        truth = f"smcdiff.held_out({settings['model']!r})[0][{int(image)}]"
    else:
        truth = f"report.read_image({image!r}, model.event_shape)"
    if settings["twist"] == "default":
        twist = "None"
    elif settings["twist"] == "moments":
        twist = f"smcdiff.guidance.moment_matching({'' if settings['rank'] is None else settings['rank']})"
    else:
        twist = f"smcdiff.guidance.{settings['twist']}"
    return f"""import jax
import smcdiff
from smcdiff import report

model = smcdiff.load({settings["model"]!r})
truth = {truth}
key_noise, key_run, key_report = jax.random.split(jax.random.key({settings["seed"]}), 3)
problem = report.make_problem(key_noise, {settings["problem"]!r}, truth, {settings["noise"]!r}{own})
with report.stopwatch() as watch:
    result = smcdiff.posterior(
        key_run,
        model,
        problem,
        method={settings["method"]!r},
        num_particles={settings["particles"]},
        num_chains={settings["chains"]},
        num_steps={settings["steps"]},
        twist={twist},
        ess_threshold={settings["ess_threshold"]!r},
        batch_size={settings["batch_size"]!r},
    )
summary = report.write_report("my_report", result, problem, truth, rng_key=key_report, watch=watch)
print(report.as_text(summary))
"""
