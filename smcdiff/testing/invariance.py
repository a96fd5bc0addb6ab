"""Does a Markov kernel leave a law alone?

Chains start from exact draws x_0 of the law and take k steps. If the kernel leaves the law alone, x_k has it too,
and for every function f

    E[f(x_k) - f(x_0)] = 0.

The two values belong to one chain, so what the draw x_0 happens to be cancels where the chain moves little; the
standard error comes from the chains, which are independent. A wrong factor in a ratio shifts a scale, a wrong sign a
location, and a kernel that enters one mode more easily than it leaves it shifts the modes' weights: give their
centres.

The check is one-sided: passing means that no function that was tried shows a change larger than its error. It says
nothing about how fast a kernel mixes. Choose a step size at which a good part is rejected: faults sit in the ratio.

Source: Geweke, "Getting it right: joint distribution tests of posterior simulators", JASA 99 (2004), whose idea it
is to test a simulator against the law it should leave alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from smcdiff.calibration.columns import as_columns, evaluate
from smcdiff.checks import check_between, check_count
from smcdiff.testing.evolve import evolve
from smcdiff.testing.functions import bounded_functions, names_of
from smcdiff.testing.report import CheckReport, z_test

__all__ = ["check_invariance"]


def check_invariance(
    rng_key: PRNGKeyArray,
    algorithm: Any,
    exact_sampler: Callable[[PRNGKeyArray, int], PyTree],
    *,
    num_chains: int = 2000,
    num_steps: int = 20,
    functions: Callable[[PyTree], PyTree] | None = None,
    modes: PyTree = None,
    false_fail: float = 1e-3,
    least_moved: float = 0.2,
) -> CheckReport:
    """Test that a kernel leaves a law alone, by chains that start from exact draws of it.

    Parameters
    ----------
    rng_key
        Key.
    algorithm
        The kernel on its target: a pair of ``init(position, rng_key)`` and ``step(rng_key, state)``, any kernel of
        `smcdiff.mcmc` or of BlackJAX; states have a ``position``.
    exact_sampler
        ``exact_sampler(rng_key, num_samples)``: exact draws of the target, independent, a pytree with a leading axis;
        for instance the method ``sample`` of `smcdiff.GaussianMixture`.
    num_chains
        Chains. Errors fall with its root: 2000 see a change of a tenth of a standard deviation.
    num_steps
        Steps of each chain. Faults add up over steps until the wrong law is reached.
    functions
        ``functions(sample)`` returns a pytree of arrays, each entry of which is tested; bounded ones, or with four
        moments. By default `bounded_functions`.
    modes
        Centres of modes, with the leading axis (K,), whose weights the default functions include.
    false_fail
        Probability, at most, that a right kernel fails.
    least_moved
        Share of the chains that must end elsewhere than they started; with fewer the check says nothing and fails.

    Returns
    -------
    CheckReport
        With the details ``acceptance_rate`` (NaN if the kernel reports none) and ``moved``.

    Raises
    ------
    ValueError
        If a count or a probability is out of range, or ``modes`` comes with ``functions``.

    Source: Geweke, "Getting it right", JASA 99 (2004).
    """
    check_count("num_chains", num_chains, 2)
    check_count("num_steps", num_steps)
    check_between("least_moved", least_moved, 0.0, 1.0)
    if functions is not None and modes is not None:
        raise ValueError(
            "modes belongs to the default functions: leave functions out, or count modes in them."
        )
    key_start, key_run = jax.random.split(rng_key)
    start = exact_sampler(key_start, num_chains)
    functions = bounded_functions(start, modes) if functions is None else functions
    end = evolve(key_run, algorithm, start, num_steps)
    before = as_columns(evaluate(functions, start), num_chains)
    after = as_columns(evaluate(functions, end.position), num_chains)
    moved = float(np.mean(end.moved))
    objections: tuple[str, ...] = ()
    if moved < least_moved:
        objections = (
            f"Only {moved:.1%} of the chains moved, {least_moved:.0%} are needed to test anything: take a smaller step "
            "size or more steps.",
        )
    # Functions are computed in the sample's precision, and a kernel that moves little leaves little else.
    rounding = np.finfo(np.float32).eps * np.abs(before).mean(axis=0) / np.sqrt(num_chains)
    return z_test(
        f"invariance ({num_chains} chains from exact draws, {num_steps} steps)",
        names_of(functions, start),
        after - before,
        false_fail,
        rounding=rounding,
        objections=objections,
        details={"acceptance_rate": float(np.mean(end.acceptance_rate)), "moved": moved},
    )
