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
from smcdiff.report.images import read_image
from smcdiff.report.problems import make_problem
from smcdiff.report.source import python_source
from smcdiff.report.summary import coverage, psnr, summarise
from smcdiff.report.text import as_text
from smcdiff.report.timing import Stopwatch, stopwatch
from smcdiff.report.write import REPORT_FILES, write_files, write_report

__all__ = [
    "REPORT_FILES",
    "FolderError",
    "SettingError",
    "Settings",
    "Stopwatch",
    "advise",
    "as_text",
    "coverage",
    "describe_card",
    "make_problem",
    "new_folder",
    "posterior_report",
    "psnr",
    "python_source",
    "read_image",
    "stopwatch",
    "summarise",
    "write_files",
    "write_report",
]
