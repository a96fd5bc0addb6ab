"""The group ``smc``: what an SMC run did step by step, with its weights, and the way back to an `SMCResult`."""

from typing import Any

import numpy as np
import xarray
from jaxtyping import PyTree

from smcdiff.arviz_io.datasets import dataset, named_arrays, structure
from smcdiff.smc import SMCResult
from smcdiff.smc.feynman_kac import SMCInfo

__all__ = ["read_smc", "write_smc"]

_PARTICLES, _MOVES = "particles", "move_info"


def write_smc(result: SMCResult, keep_particles: bool) -> xarray.Dataset:
    """History of the runs, with the dimensions chain and step; the weighted particles if they are to be kept."""
    info = result.info
    # NaN for a chain that lost its weight: what it began with cannot be told from what it ended with.
    with np.errstate(invalid="ignore"):
        start = result.log_evidence - info.log_evidence_increment.sum(axis=1)
        shares = np.exp(np.asarray(result.log_evidence, float) - np.logaddexp.reduce(result.log_evidence))
    history = {
        "ess": info.ess,
        "resampled": info.resampled,
        "log_evidence_increment": info.log_evidence_increment,
        "log_evidence": np.cumsum(info.log_evidence_increment, axis=1) + start[:, None],
        "num_invalid": info.num_invalid,
        "log_weights": result.log_weights_by_step,
        "ancestors": info.ancestors,
        # Of the cloud that entered the step, which `ancestors` points to.
        "unique_ancestors": result.unique_ancestors()[:, :-1],
    }
    if info.move_info is not None:
        history |= {f"{_MOVES}.{key}": value for key, value in named_arrays(info.move_info, "value").items()}
    axes = {"log_weights": ["particle"], "ancestors": ["particle"]}
    group = dataset(history, ("chain", "step"), axes, {}).assign(
        log_evidence_std_error=("chain", result.log_evidence_std_error()),
        evidence_share=("chain", shares),
        final_log_evidence=("chain", np.asarray(result.log_evidence)),
        final_log_weights=(("chain", "particle"), np.asarray(result.log_weights)),
    )
    if keep_particles:
        named = named_arrays(result.particles, "")
        named = {f"{_PARTICLES}.{key}" if key else _PARTICLES: value for key, value in named.items()}
        group = group.merge(dataset(named, ("chain", "particle"), {}, {}))
        group.attrs["particle_structure"] = structure(result.particles)
    return group


def read_smc(group: xarray.Dataset) -> SMCResult:
    """The result whose history `write_smc` wrote; particles are None where they were not kept."""
    values: dict[str, Any] = {str(name): variable.values for name, variable in group.data_vars.items()}

    def below(prefix):
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in values.items()
            if name.startswith(f"{prefix}.")
        }

    particles: PyTree = below(_PARTICLES) or None
    if group.attrs.get("particle_structure") == "array":
        particles = values[_PARTICLES]
    info = SMCInfo(
        **{field: values[field] for field in SMCInfo._fields if field != _MOVES},
        move_info=below(_MOVES) or None,
    )
    return SMCResult(
        particles, values["final_log_weights"], values["final_log_evidence"], info, values["log_weights"]
    )
