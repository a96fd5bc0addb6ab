"""What a kernel reports of its steps, under the names that ArviZ has for it.

    lp                       log density of the draw
    acceptance_rate          probability of acceptance
    diverging                whether the integrator failed
    n_steps, step_size       of the integrator
    energy, energy_error     of the Hamiltonian, and its change
    tree_depth               doublings of NUTS; reached_max_tree_depth: whether they were used up

Infos may be nested (Gibbs blocks, cycles, walk-jump, coupled chains): each entry keeps its path, "parts.0.diverging",
and where the top has no such entry the whole is said there: ``diverging`` if any part diverges, ``n_steps`` as the sum,
others only if a single part has them. What is not ArviZ's keeps the name that the info's docstring explains.

Source: ArviZ, "InferenceData schema specification", sample_stats.
"""

import functools

import numpy as np
from jaxtyping import PyTree

from smcdiff.arviz_io.datasets import named_arrays

__all__ = ["chain_statistics"]

_RENAMED = {
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
    "num_trajectory_expansions": "tree_depth",
    "energy_change": "energy_error",
    "logdensity": "lp",
}
_PROMOTED = (
    "lp",
    "acceptance_rate",
    "diverging",
    "n_steps",
    "step_size",
    "energy",
    "energy_error",
    "tree_depth",
    "reached_max_tree_depth",
)
# Records of places that the chain did not take: what is in them is not about the draw.
_ELSEWHERE = ("proposal", "trajectory_leftmost_state", "trajectory_rightmost_state", "momentum")


def chain_statistics(info: PyTree) -> dict[str, np.ndarray]:
    """Entries of a chain's info with the axes (chain, draw), or one more, by name.

    Parameters
    ----------
    info
        Pytree with the leading axes (chain, draw), such as `Trace.info`.
    """
    found: dict[str, np.ndarray] = {}
    for path, value in named_arrays(info).items():
        prefix, _, last = path.rpartition(".")
        is_elsewhere = any(part in _ELSEWHERE for part in path.split("."))
        if value.ndim not in ((2,) if is_elsewhere else (2, 3)):
            continue
        if is_elsewhere:
            found[path] = value
            continue
        found[_join(prefix, _RENAMED.get(last, last))] = value
        if last == "nonans":  # of BlackJAX's MCLMC
            found[_join(prefix, "diverging")] = ~value.astype(bool)
    for path in [path for path in found if path.rpartition(".")[2] == "is_turning"]:
        prefix = path.rpartition(".")[0]
        diverging = found.get(_join(prefix, "diverging"))
        if (
            diverging is not None
        ):  # a trajectory that neither turned nor diverged ended because it may not grow
            found[_join(prefix, "reached_max_tree_depth")] = ~(found[path] | diverging)
    return found | _of_the_whole(found)


def _of_the_whole(found):
    """Statistics of the parts, where the top has none."""
    whole = {}
    for name in _PROMOTED:
        if name in found:
            continue
        parts = [
            value
            for path, value in found.items()
            if path.endswith(f".{name}") and value.ndim == 2 and not set(path.split(".")) & set(_ELSEWHERE)
        ]
        if parts and name == "diverging":
            whole[name] = functools.reduce(np.logical_or, parts)
        elif parts and name == "n_steps":
            whole[name] = functools.reduce(np.add, parts)
        elif len(parts) == 1:
            whole[name] = parts[0]
    return whole


def _join(prefix, name):
    return f"{prefix}.{name}" if prefix else name
