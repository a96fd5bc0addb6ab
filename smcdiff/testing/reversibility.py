"""Is a Markov kernel in detailed balance with a law?

pi(dx) K(x, dy) = pi(dy) K(y, dx) says that a pair (x_0, x_1) of an exact draw and one step from it has the same law
when swapped. Hence for any two functions

    E[f(x_0) g(x_1) - g(x_0) f(x_1)] = 0,

and with g = 1 the invariance E f(x_1) = E f(x_0). More is asked than invariance: a cycle of kernels, or a chain that
keeps its momentum, leaves its law alone without being in balance. Each chain starts afresh, so a kernel with
momentum is judged by its first step, whose momentum is new.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from smcdiff.calibration.columns import as_columns, evaluate
from smcdiff.checks import check_count
from smcdiff.testing.evolve import evolve
from smcdiff.testing.functions import bounded_functions, names_of
from smcdiff.testing.report import CheckReport, z_test

__all__ = ["check_detailed_balance"]


def check_detailed_balance(
    rng_key: PRNGKeyArray,
    algorithm: Any,
    exact_sampler: Callable[[PRNGKeyArray, int], PyTree],
    *,
    num_chains: int = 10_000,
    num_steps: int = 1,
    functions: Callable[[PyTree], PyTree] | None = None,
    modes: PyTree = None,
    false_fail: float = 1e-3,
) -> CheckReport:
    """Test that a kernel is in detailed balance with a law: exact draws and a step from them may be swapped.

    Parameters
    ----------
    rng_key, algorithm, exact_sampler, functions, modes, false_fail
        As in `check_invariance`.
    num_chains
        Independent pairs.
    num_steps
        Steps between the two ends of a pair; powers of a kernel in balance are in balance.

    Returns
    -------
    CheckReport
        With a row for every function (invariance) and for every pair of functions.

    Raises
    ------
    ValueError
        If a count or a probability is out of range.
    """
    check_count("num_chains", num_chains, 2)
    check_count("num_steps", num_steps)
    key_start, key_run = jax.random.split(rng_key)
    start = exact_sampler(key_start, num_chains)
    functions = bounded_functions(start, modes) if functions is None else functions
    end = evolve(key_run, algorithm, start, num_steps)
    first, second = (as_columns(evaluate(functions, x), num_chains) for x in (start, end.position))
    names = names_of(functions, start)
    centre, spread = first.mean(axis=0), first.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    # A constant is one of the functions: its pairs are the plain changes.
    first, second = (
        np.column_stack([np.ones(num_chains), (values - centre[None]) / spread[None]])
        for values in (first, second)
    )
    labels = ("1", *names)
    rows, columns = np.triu_indices(len(labels), 1)
    flux = first[:, rows] * second[:, columns] - first[:, columns] * second[:, rows]
    pairs = tuple(
        labels[j] if i == 0 else f"flux from ({labels[i]}) to ({labels[j]})"
        for i, j in zip(rows, columns, strict=True)
    )
    moved = float(np.mean(end.moved))
    return z_test(
        f"detailed balance ({num_chains} pairs, {num_steps} steps apart)",
        pairs,
        flux,
        false_fail,
        rounding=np.finfo(np.float32).eps / np.sqrt(num_chains),
        objections=() if moved > 0 else ("No chain moved: nothing was tested.",),
        details={"acceptance_rate": float(np.mean(end.acceptance_rate)), "moved": moved},
    )
