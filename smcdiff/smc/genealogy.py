"""Genealogy: which particles of earlier clouds the later ones descend from.

Everything is read off ``SMCInfo.ancestors`` of ONE run, the array A of shape (steps, N): A[k, i] is the index, in the
cloud that entered step k, of the parent of particle i of the cloud that left it, and A[k, i] = i where step k did not
resample. Cloud 0 is the initial one and cloud ``steps`` the last. Following the last cloud backwards,

    B[steps, i] = i,        B[k, i] = A[k, B[k + 1, i]],

and all its particles that share B[k, .] share their past up to cloud k: an average of something that is settled early
in the run, as the coarse features of a sample are, has no more to go on than the distinct entries of B[k, .].

Source: Jacob, Murray and Rubenthaler, "Path storage in the particle filter", arXiv 1307.3180.
"""

import numpy as np
from jaxtyping import Int

__all__ = ["ancestor_lines", "common_ancestor_step", "families", "unique_ancestors"]


def ancestor_lines(ancestors: Int[np.ndarray, "steps N"]) -> Int[np.ndarray, "clouds N"]:
    """Ancestor of every particle of the last cloud, in every cloud.

    Parameters
    ----------
    ancestors
        Parents by step, shape (steps, N).

    Returns
    -------
    Indices of shape (steps + 1, N): column i is the line of descent of the last cloud's particle i, row k its index
    in cloud k.
    """
    num_particles = np.shape(ancestors)[1]
    lines = [np.arange(num_particles)]
    for parents in np.asarray(ancestors)[::-1]:
        lines.append(parents[lines[-1]])
    return np.stack(lines[::-1])


def unique_ancestors(ancestors: Int[np.ndarray, "steps N"]) -> Int[np.ndarray, " clouds"]:
    """How many particles of every cloud have descendants in the last one; shape (steps + 1,), rising to N.

    Parameters as in `ancestor_lines`.
    """
    lines = ancestor_lines(ancestors)
    survives = np.zeros(lines.shape, bool)
    np.put_along_axis(survives, lines, True, axis=1)
    return survives.sum(axis=1)


def common_ancestor_step(ancestors: Int[np.ndarray, "steps N"]) -> int:
    """Number of the cloud that holds the most recent common ancestor of the whole last cloud; -1 if none does.

    Parameters as in `ancestor_lines`.
    """
    return int(np.sum(unique_ancestors(ancestors) == 1)) - 1


def families(ancestors: Int[np.ndarray, "steps N"], lag: int | None = None) -> Int[np.ndarray, "steps N"]:
    """Ancestor of every particle of every cloud but the initial one, ``lag`` steps before or in cloud 0.

    Parameters
    ----------
    ancestors
        Parents by step, shape (steps, N).
    lag
        How many steps to go back, at least 1; to the initial cloud ("Eve indices") if omitted.

    Returns
    -------
    Indices of shape (steps, N): row k is about the cloud that left step k; particles of equal index are a family.

    Raises
    ------
    ValueError
        If ``lag`` is not a positive integer.
    """
    if lag is not None and (isinstance(lag, bool) or not isinstance(lag, int | np.integer) or lag < 1):
        raise ValueError(f"lag is a number of steps, at least 1, or None for all of them; got {lag!r}.")
    ancestors = np.asarray(ancestors)
    identity = np.arange(ancestors.shape[1])
    window, rows = [identity], []  # ancestors of the present cloud, the oldest first
    for parents in ancestors:
        window = [line[parents] for line in window]
        if lag is not None:
            window = [*window, identity][-(lag + 1) :]
        rows.append(window[0])
    return np.stack(rows)
