"""The samples of a report as ArviZ data in a file."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import xarray

__all__ = ["DATA_FILES", "image_dims", "save_data"]

# What `save_data` may write, best first.
DATA_FILES = ("posterior.nc", "posterior.zarr", "posterior.npz")


def image_dims(ndim: int) -> list[str]:
    """Names of the axes of an image."""
    return ["channel", "row", "col"][3 - ndim :]


def save_data(data: Any, folder: Path) -> str:
    """Write what `smcdiff.to_arviz` returned: netCDF where h5netcdf and h5py are installed, else zarr, else ``.npz``.

    Parameters
    ----------
    data
        `xarray.DataTree` or `arviz.InferenceData`.
    folder
        Where to.

    Returns
    -------
    Name of the file. An ``.npz`` names its arrays group/variable, and its dimensions and coordinates are lost.
    """
    tree = data if isinstance(data, xarray.DataTree) else _tree(data)
    netcdf, zarr, npz = (folder / name for name in DATA_FILES)
    if _installed("h5netcdf") and _installed("h5py"):  # h5netcdf does not bring it along
        tree.to_netcdf(netcdf, engine="h5netcdf")
        return netcdf.name
    if _installed("zarr"):
        tree.to_zarr(zarr, zarr_format=2)  # format 3 has no consolidated metadata, and readers warn without
        return zarr.name
    arrays = {
        f"{name}/{key}": np.asarray(values)
        for name, group in tree.children.items()
        for key, values in group.data_vars.items()
    }
    np.savez_compressed(npz, **arrays)  # type: ignore[arg-type]
    return npz.name


def _tree(data):
    """`InferenceData` of ArviZ 0.x as a tree."""
    tree = xarray.DataTree.from_dict({name: data[name] for name in data.groups()})
    tree.attrs.update(data.attrs)
    return tree


def _installed(package):
    return importlib.util.find_spec(package) is not None
