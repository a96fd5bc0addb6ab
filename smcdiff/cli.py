"""The command ``smcdiff``: posterior samples with a report, and a list of the models.

    smcdiff models
    smcdiff posterior --model mnist --problem inpaint --image 7 --out runs/demo

This file reads the command line and calls the library. What takes long to import is imported where it is used, so that
``--help`` answers at once. Exit status: 0, 1 if a result is not valid, 2 if an argument is wrong.
"""

import argparse
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]

STATUS = "exit status: 0; 1 if the result is not valid (the report says why); 2 if an argument is wrong"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        The command line without the program's name; that of the process if omitted.

    Returns
    -------
    Exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    with _tidy_termination():
        try:
            return options.command(options)
        except _BadArgument as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print("smcdiff: interrupted, nothing was written", file=sys.stderr)
            return 130


class _BadArgument(Exception):
    """A wrong argument, told in one line that names it."""


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Version(argparse.Action):
    """Print the version, which is known to the package, when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        import smcdiff

        print(f"smcdiff {smcdiff.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="smcdiff", description="Inference with diffusion models.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    models = commands.add_parser("models", help="list the models that come with smcdiff", allow_abbrev=False)
    models.set_defaults(command=_models)

    posterior = commands.add_parser(
        "posterior",
        help="posterior samples of an image from a simulated measurement, with a report",
        description="Measure an image, draw posterior samples by SMC, and write a report.",
        epilog=STATUS,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # the defaults are those of `smcdiff.report.Settings`
    )
    posterior.set_defaults(command=_posterior)
    add = posterior.add_argument
    add("--model", required=True, metavar="NAME", help="one of `smcdiff models`, or a model folder")
    add("--problem", required=True, metavar="NAME", help="inpaint, deblur or superres")
    add("--image", metavar="IMAGE", help="number of a held-out image, or a PNG file (0)")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder to write the report to")
    add("--force", action="store_true", default=False, help="replace an older report in that folder")
    add("--noise", type=_positive, help="deviation of the noise, in units of the pixels (0.1)")
    add("--mask", metavar="PART", help="inpaint: hidden part; center, left, right, top or bottom (center)")
    add("--blur-width", type=_positive, metavar="PIXELS", help="deblur: deviation of the kernel (rows / 14)")
    add("--factor", type=_at_least(1), metavar="PIXELS", help="superres: side of a block (4; small images 2)")
    add("--method", metavar="NAME", help="the sampler (tds)")
    add("--twist", metavar="NAME", help="moments, pigdm, dps, or what suits the model (default)")
    add("--rank", type=_at_least(1), help="directions of moments (all)")
    add("--particles", type=_at_least(1), help="particles of a chain (64)")
    add("--chains", type=_at_least(1), help="independent runs (4)")
    add("--steps", type=_at_least(2), help="steps from noise to image (100)")
    add("--seed", type=_seed, help="of the noise and of the sampler (0)")
    add("--ess-threshold", type=_fraction, help="share of the ESS to resample below (0.5)")
    add("--batch-size", type=_at_least(1), help="particles moved together, to save memory (all)")
    add("--no-progress", action="store_true", default=False, help="no progress bar")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return value

    return convert


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite positive number, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    value = _at_least(0)(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer below 2**32, got {text!r}")
    return value


@contextmanager
def _tidy_termination() -> Iterator[None]:
    """Let a request to terminate unwind the program, so that nothing half-written is left."""

    def stop(number, frame):
        sys.exit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _models(options: argparse.Namespace) -> int:
    from smcdiff.checkpoints import models
    from smcdiff.report import describe_card

    cards = models()
    described = [describe_card(name, card) for name, card in cards.items()]
    print("\n\n".join(described) or "no model comes with this smcdiff")
    return 0


def _posterior(options: argparse.Namespace) -> int:
    from smcdiff import report

    names = {field.name for field in dataclasses.fields(report.Settings)}
    settings = report.Settings(**{key: value for key, value in vars(options).items() if key in names})
    try:
        summary = report.posterior_report(
            settings, options.out, force=options.force, progress=not options.no_progress
        )
    except report.FolderError as error:
        raise _BadArgument(f"argument --out: {error}") from None
    except report.SettingError as error:
        raise _BadArgument(f"argument --{error.name.replace('_', '-')}: {error}") from None
    print(report.as_text(summary))
    print(f"report: {options.out / 'report.html'}")
    return 0 if summary["valid"] else 1


if __name__ == "__main__":
    sys.exit(main())
