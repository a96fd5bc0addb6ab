"""One look for every picture, which does not rely on telling red from green: colours of Okabe and Ito, and dashes."""

import matplotlib
from cycler import cycler

__all__ = ["COLOURS", "DASHES", "HIDDEN", "style"]

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
