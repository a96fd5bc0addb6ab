"""From ArviZ data back to what the library works with; see `smcdiff.to_arviz`."""

from typing import Any

import xarray

from smcdiff.arviz_io.datasets import read_group
from smcdiff.arviz_io.smc_group import read_smc
from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = ["from_arviz"]


def from_arviz(data: Any, *, warmup: bool = False) -> SMCResult | Trace:
    """Read a result back from ArviZ's container.

    Parameters
    ----------
    data
        `xarray.DataTree` or `arviz.InferenceData`, of `smcdiff.to_arviz`, of a file, or of another library.
    warmup
        Whether to read the warm-up of a chain instead of what came after it.

    Returns
    -------
    An `SMCResult` where there is a group ``smc``: weights, evidence, history and genealogy to the last bit; its
    ``particles`` too if `smcdiff.to_arviz` was told to keep them, else None, so that its averages are None.

    Otherwise a `Trace` of NumPy arrays (chain, draw, *event): ``samples`` is an array if it was one, else a dictionary
    by variable, ``info`` a dictionary of ``sample_stats`` by ArviZ's names, and ``state`` is None.

    Raises
    ------
    ValueError
        If the data have no such group.
    """
    smc = read_group(data, "smc")
    if smc is not None and not warmup:
        return read_smc(smc)
    name = "warmup_posterior" if warmup else "posterior"
    posterior = read_group(data, name)
    if posterior is None:
        raise ValueError(f"from_arviz needs data with a group {name!r}, and there is none.")
    stats = read_group(data, "warmup_sample_stats" if warmup else "sample_stats")
    samples: Any = _arrays(posterior)
    if posterior.attrs.get("sample_structure") == "array":
        (samples,) = samples.values()
    return Trace(samples, {} if stats is None else _arrays(stats), None)


def _arrays(group: xarray.Dataset):
    return {
        str(name): variable.transpose("chain", "draw", ...).values
        for name, variable in group.data_vars.items()
    }
