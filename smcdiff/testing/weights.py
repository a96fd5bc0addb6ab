"""Are weighted particles properly weighted?

A sampler returns particles x_i, weights w_i that add up to one, and an estimate Z_hat of a constant Z. It is proper
for the law pi if for every function f, whatever the number of particles,

    E[Z_hat] = Z,        E[Z_hat sum_i w_i f(x_i)] = Z E_pi f.

The second is tested as E[Z_hat (sum_i w_i f(x_i) - E_pi f)] = 0, which has the smaller variance and, beside the
first, says the same. Both hold for SMC with few particles: independent runs of a small cloud test it better than one
large cloud, whose bias has vanished for many wrong samplers too. A resampling that keeps the old weights, or an
increment left out, shows in the mean of Z_hat at once.

The estimates are positive and skewed. A check passes only if the standard error of Z_hat / Z is small enough to see
a fault; take more particles where it is not.

Sources: Liu, "Monte Carlo Strategies in Scientific Computing", Springer (2001), section 2.5 (proper weighting); Del
Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from smcdiff.calibration.columns import as_columns
from smcdiff.checks import check_count, check_positive
from smcdiff.smc import SMCResult
from smcdiff.testing.functions import names_of
from smcdiff.testing.report import CheckReport, z_test

__all__ = ["check_properly_weighted"]


def check_properly_weighted(
    rng_key: PRNGKeyArray,
    sampler: Callable[[PRNGKeyArray, int], Any],
    log_evidence: float,
    functions: Callable[[PyTree], PyTree] | None = None,
    expectations: PyTree = None,
    *,
    num_runs: int = 4000,
    false_fail: float = 1e-3,
    largest_error: float = 0.05,
) -> CheckReport:
    """Test that a sampler's weights and evidence are unbiased, over independent runs of it.

    Parameters
    ----------
    rng_key
        Key.
    sampler
        ``sampler(rng_key, num_runs)``: independent runs, as an `SMCResult` whose chains they are (`smcdiff.run_smc`
        with ``num_chains=num_runs``), or as a tuple (particles, log_weights, log_evidence) with the leading axes
        (num_runs, N), (num_runs, N) and (num_runs,). Weights are normalised here.
    log_evidence
        The exact log Z, in nats.
    functions
        ``functions(particle)`` returns a pytree of arrays.
    expectations
        Its exact mean, a pytree of the same structure and shapes.
    num_runs
        Independent runs.
    false_fail
        Probability, at most, that a right sampler fails, as far as means over the runs are normal.
    largest_error
        Standard error of the mean of Z_hat / Z above which the check has no power and fails.

    Returns
    -------
    CheckReport
        Its first row is the evidence, in units of Z.

    Raises
    ------
    ValueError
        If only one of ``functions`` and ``expectations`` is given, their structures or shapes differ, or a number is
        out of range.

    Source: Del Moral, Doucet and Jasra, JRSS-B 68 (2006).
    """
    check_count("num_runs", num_runs, 2)
    check_positive("largest_error", largest_error)
    if (functions is None) != (expectations is None):
        raise ValueError("functions and expectations belong together: give both or neither.")
    result = sampler(rng_key, num_runs)
    particles, log_weights, estimates = _read(result, num_runs)
    ratio = np.exp(np.asarray(estimates, float) - float(log_evidence))
    names: tuple[str, ...] = ("evidence",)
    columns = [ratio[:, None] - 1.0]
    if functions is not None:
        one = jax.tree.map(lambda leaf: leaf[0], particles)
        names += tuple(f"evidence x {name}" for name in names_of(functions, one))
        exact = _exact(functions, expectations, one)
        averages = as_columns(_averages(functions, particles, log_weights), num_runs)
        columns.append(np.where(ratio[:, None] > 0, ratio[:, None] * (averages - exact[None]), 0.0))
    error = float(ratio.std(ddof=1) / np.sqrt(num_runs))
    objections: tuple[str, ...] = ()
    if not error <= largest_error:
        objections = (
            f"The standard error of the evidence is {error:.2g} of it, {largest_error:g} is the most that tests "
            "anything: take more particles or more runs.",
        )
    return z_test(
        f"proper weighting ({num_runs} runs)",
        names,
        np.concatenate(columns, axis=1),
        false_fail,
        # What rounding of the log evidence to single precision may do.
        rounding=4 * float(np.finfo(np.float32).eps) * max(1.0, abs(float(log_evidence))),
        objections=objections,
        details={"std of evidence / exact": float(ratio.std(ddof=1))},
    )


def _read(result, num_runs):
    """Particles, log weights and log evidences of the runs."""
    if isinstance(result, SMCResult):
        parts = (result.particles, result.log_weights, result.log_evidence)
    else:
        parts = tuple(result)
    if len(parts) != 3 or np.shape(parts[2]) != (num_runs,) or np.shape(parts[1])[:1] != (num_runs,):
        raise ValueError(
            f"sampler must return {num_runs} runs, as an SMCResult or as (particles, log_weights, log_evidence) "
            f"with that leading axis; got log evidences of shape {np.shape(parts[-1])}."
        )
    return parts


def _exact(functions, expectations, one):
    """The exact means as a row, after a check of their shapes."""
    expected = jax.eval_shape(functions, jax.tree.map(lambda leaf: leaf[0], one))
    shapes, given = (jax.tree.map(np.shape, tree) for tree in (expected, expectations))
    if str(jax.tree.structure(expected)) != str(jax.tree.structure(expectations)) or shapes != given:
        raise ValueError(f"expectations must be like what functions returns, {shapes}, got {given}.")
    return as_columns(expectations, 1)[0]


@eqx.filter_jit
def _averages(functions, particles, log_weights):
    """Weighted means of the functions in each run; particles of weight zero may be NaN."""

    def of_run(particles, log_weights):
        weights = jax.nn.softmax(log_weights)

        def mean(values):
            values = values.astype(weights.dtype).reshape(len(weights), -1)
            return weights @ jnp.where((weights > 0)[:, None], values, jnp.zeros((), weights.dtype))

        return jax.tree.map(mean, jax.vmap(functions)(particles))

    return jax.vmap(of_run)(particles, jnp.asarray(log_weights))
