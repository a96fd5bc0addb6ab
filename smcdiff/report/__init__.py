"""Reports: what a posterior says, how far it can be trusted, and its pictures, in one folder.

    problem = report.make_problem(key_noise, "inpaint", truth, noise=0.1)
    with report.stopwatch() as watch:
        result = smcdiff.posterior(key_run, model, problem)
    report.write_report("runs/demo", result, problem, truth, rng_key=key_report, watch=watch)

The command ``smcdiff posterior`` does this.
"""

from smcdiff.report.advice import advise
from smcdiff.report.cards import describe_card
from smcdiff.report.experiment import SettingError, Settings, posterior_report
from smcdiff.report.folder import FolderError, new_folder
from smcdiff.report.images import as_picture, read_image
from smcdiff.report.plots import image_panels, plot_draws, plot_ess, plot_overview, plot_panel
from smcdiff.report.problems import make_problem, unobserved
from smcdiff.report.source import python_source
from smcdiff.report.summary import Estimates, coverage, estimate, psnr, summarise
from smcdiff.report.text import as_text
from smcdiff.report.timing import Stopwatch, stopwatch
from smcdiff.report.write import REPORT_FILES, pooled_draws, write_files, write_report

__all__ = [
    "REPORT_FILES",
    "Estimates",
    "FolderError",
    "SettingError",
    "Settings",
    "Stopwatch",
    "advise",
    "as_picture",
    "as_text",
    "coverage",
    "describe_card",
    "estimate",
    "image_panels",
    "make_problem",
    "new_folder",
    "plot_draws",
    "plot_ess",
    "plot_overview",
    "plot_panel",
    "pooled_draws",
    "posterior_report",
    "psnr",
    "python_source",
    "read_image",
    "stopwatch",
    "summarise",
    "unobserved",
    "write_files",
    "write_report",
]
