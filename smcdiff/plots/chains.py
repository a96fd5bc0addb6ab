"""ArviZ's own pictures of chains, under one name with either line of ArviZ, as matplotlib figures."""

from typing import Any

import arviz
from matplotlib.figure import Figure

from smcdiff.plots.style import style
from smcdiff.run import Trace
from smcdiff.smc import SMCResult
from smcdiff.to_arviz import to_arviz

__all__ = ["CHAIN_PLOTS", "plot_chains"]

# Kind: ArviZ's function, from version 1 on and before.
CHAIN_PLOTS = {
    "trace": ("plot_trace_dist", "plot_trace"),
    "rank": ("plot_rank", "plot_rank"),
    "ess": ("plot_ess", "plot_ess"),
    "pair": ("plot_pair", "plot_pair"),
    "energy": ("plot_energy", "plot_energy"),
    "autocorrelation": ("plot_autocorr", "plot_autocorr"),
    "posterior": ("plot_dist", "plot_posterior"),
    "posterior predictive": ("plot_ppc_dist", "plot_ppc"),
}


def plot_chains(data: Any, kind: str = "trace", **options: Any) -> Figure:
    """One of ArviZ's pictures.

    Parameters
    ----------
    data
        What `smcdiff.to_arviz` returns, or what it takes.
    kind
        "trace", "rank", "ess", "pair", "energy", "autocorrelation", "posterior" or "posterior predictive".
    options
        Passed to ArviZ's function, for instance ``var_names``.

    Raises
    ------
    ValueError
        If ``kind`` is unknown.
    """
    if kind not in CHAIN_PLOTS:
        raise ValueError(f"kind must be one of {', '.join(CHAIN_PLOTS)}, got {kind!r}.")
    if isinstance(data, SMCResult | Trace):
        data = to_arviz(data)
    new, old = CHAIN_PLOTS[kind]
    with style():
        if int(arviz.__version__.split(".")[0]) >= 1:
            return getattr(arviz, new)(data, backend="matplotlib", **options).viz["figure"].item()
        axes = getattr(arviz, old)(data, backend="matplotlib", show=False, **options)
        while not hasattr(axes, "figure"):
            axes = axes[0]
        return axes.figure
