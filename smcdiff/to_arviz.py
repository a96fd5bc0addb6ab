"""Results as ArviZ data: an `xarray.DataTree` with ArviZ 1, an `InferenceData` before.

Groups: ``posterior`` (equally weighted draws, chain x draw x event: weights are resampled away, because ArviZ knows
none), ``sample_stats``, ``observed_data``, ``constant_data``, ``prior`` where given, and for SMC a group ``smc`` that
keeps the weighted history by step. Independent SMC runs are the chains, so that R-hat compares them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import arviz
import jax
import numpy as np
import xarray
from jaxtyping import PRNGKeyArray, PyTree

from smcdiff.inverse import InverseProblem
from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = ["to_arviz"]


def to_arviz(
    result: SMCResult | Trace,
    *,
    rng_key: PRNGKeyArray | None = None,
    name: str = "x",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    problem: InverseProblem | None = None,
    constant_data: Mapping[str, Any] | None = None,
    prior: PyTree = None,
    attrs: Mapping[str, Any] | None = None,
):
    """Convert a result to ArviZ's container.

    Parameters
    ----------
    result
        An `SMCResult`, or the `Trace` of a Markov chain whose samples have the axes (chain, draw, *event).
    rng_key
        Key of the resampling of weighted particles; the fixed key 0 if omitted.
    name
        Name of the variable where the samples are a bare array; pytrees name theirs by path.
    dims
        Names of the event axes of a variable, as in ``{"x": ["row", "col"]}``.
    coords
        Coordinate values of dimensions.
    problem
        The inverse problem: its measurement and noise become ``observed_data`` and ``constant_data``.
    constant_data
        Further arrays to keep, for instance the true image.
    prior
        Draws from the prior, with the axes (draw, *event).
    attrs
        Attributes of the whole, for instance the seed and the versions.

    Returns
    -------
    `xarray.DataTree` with ArviZ 1 or newer, `arviz.InferenceData` with older ones.

    Raises
    ------
    TypeError
        If ``result`` is neither an `SMCResult` nor a `Trace`.
    """
    dims, coords = dict(dims or {}), dict(coords or {})
    if isinstance(result, SMCResult):
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        groups = {"posterior": _sampled(result.resample(rng_key), name, dims, coords)}
        groups.update(_smc_groups(result, result.resample_indices(rng_key)))
    elif isinstance(result, Trace):
        groups = {"posterior": _sampled(result.samples, name, dims, coords)}
        groups["sample_stats"] = _sampled(_chain_statistics(result.info), name, {}, {})
    else:
        raise TypeError(f"to_arviz takes an SMCResult or a Trace, got {type(result).__name__}.")
    constants = {key: np.asarray(value) for key, value in (constant_data or {}).items()}
    if problem is not None:
        groups["observed_data"] = _dataset({"y": np.asarray(problem.y)}, (), dims, coords)
        constants.setdefault("noise_std", np.sqrt(np.asarray(problem.noise.variance(problem.y.shape))))
    if constants:
        groups["constant_data"] = _dataset(constants, (), dims, coords)
    if prior is not None:
        groups["prior"] = _sampled(
            jax.tree.map(lambda leaf: np.asarray(leaf)[None], prior), name, dims, coords
        )
    return _container(groups, dict(attrs or {}))


def _smc_groups(result, chosen):
    """``sample_stats`` of the draws (which particle, of what weight), and the history by step in ``smc``."""
    # NaN for a chain that lost its weight: what it began with cannot be told from what it ended with.
    with np.errstate(invalid="ignore"):
        start = result.log_evidence - result.info.log_evidence_increment.sum(axis=1)
    history = {
        "ess": result.info.ess,
        "resampled": result.info.resampled,
        "log_evidence_increment": result.info.log_evidence_increment,
        "log_evidence": np.cumsum(result.info.log_evidence_increment, axis=1) + start[:, None],
        "num_invalid": result.info.num_invalid,
        "log_weights": result.log_weights_by_step,
        "ancestors": result.info.ancestors,
        # Of the cloud that entered the step, which `ancestors` points to.
        "unique_ancestors": result.unique_ancestors()[:, :-1],
    }
    axes = {"log_weights": ["particle"], "ancestors": ["particle"]}
    whole_run = {"log_evidence_std_error": ("chain", result.log_evidence_std_error())}
    return {
        "sample_stats": _dataset(
            {"particle": chosen, "log_weight": np.take_along_axis(result.log_weights, chosen, axis=1)},
            ("chain", "draw"),
            {},
            {},
        ),
        "smc": _dataset(history, ("chain", "step"), axes, {}).assign(whole_run),
    }


# BlackJAX's names of what ArviZ calls otherwise.
_RENAMED = {
    "acceptance_rate": "acceptance_rate",
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
    "energy": "energy",
}


def _chain_statistics(info):
    """Scalar entries of a chain's info, under ArviZ's names."""
    leaves = jax.tree_util.tree_leaves_with_path(info)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves
    }
    return {_RENAMED.get(key, key): value for key, value in named.items() if value.ndim == 2}


def _sampled(tree, name, dims, coords):
    """Dataset of a pytree whose leaves have the axes (chain, draw, *event)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator=".") or name: np.asarray(leaf)
        for path, leaf in leaves
    }
    return _dataset(named, ("chain", "draw"), dims, coords)


def _dataset(arrays, leading, dims, coords):
    variables = {}
    for key, value in arrays.items():
        value = np.asarray(value)
        event = list(dims.get(key, [f"{key}_dim_{i}" for i in range(value.ndim - len(leading))]))
        if len(event) + len(leading) != value.ndim:
            raise ValueError(f"dims[{key!r}] must name {value.ndim - len(leading)} axes, got {event}.")
        variables[key] = ([*leading, *event], value)
    dataset = xarray.Dataset(variables)
    known = {axis: values for axis, values in coords.items() if axis in dataset.dims}
    known.update({axis: np.arange(size) for axis, size in dataset.sizes.items() if axis not in known})
    return dataset.assign_coords(known)


def _container(groups, attrs):
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(attrs=attrs, **groups)
    tree = xarray.DataTree.from_dict(groups)
    tree.attrs.update(attrs)
    return tree
