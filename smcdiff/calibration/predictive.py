"""Posterior predictive checks: could the data have come from the model and the posterior?

For draws x_i of weight w_i, data y and a statistic T that may depend on the draw,

    y_i ~ p(. | x_i),        p = sum_i w_i (1{T(y_i, x_i) > T(y, x_i)} + 1{T(y_i, x_i) = T(y, x_i)} / 2).

A p near 0 or 1 says that replicated data do not look like y in the respect of T. The data are used twice, so p is not
uniform if the model is right but gathers about 1/2: it is a sign of misfit, not the size of a test. It tells of the
model; whether the sampler draws from the model's posterior is for `smcdiff.calibration.calibrate` to say.

Source: Gelman, Meng and Stern, "Posterior predictive assessment of model fitness via realized discrepancies",
Statistica Sinica 6 (1996).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from smcdiff.calibration.columns import as_columns, column_names, column_shapes
from smcdiff.calibration.draws import as_draws, normalised_weights

__all__ = ["PredictiveCheck", "posterior_predictive_check"]


class PredictiveCheck(NamedTuple):
    """Statistics of replicated data beside those of the data, F of them, for N draws.

    Attributes
    ----------
    names
        Names of the statistics.
    p_values
        Posterior predictive p-values, shape (F,).
    std_error
        Their Monte Carlo standard errors, for independent draws or particles, shape (F,).
    replicated
        Statistics of the replicated data, shape (N, F).
    observed
        Statistics of the data, shape (N, F): the same in every row unless they depend on the draw.
    weights
        Weights of the draws, which add up to one, shape (N,). Use them in plots.
    """

    names: tuple[str, ...]
    p_values: Float[np.ndarray, " F"]
    std_error: Float[np.ndarray, " F"]
    replicated: Float[np.ndarray, "N F"]
    observed: Float[np.ndarray, "N F"]
    weights: Float[np.ndarray, " N"]


def posterior_predictive_check(
    rng_key: PRNGKeyArray,
    draws: Any,
    simulate: Callable[[PRNGKeyArray, PyTree], PyTree],
    data: PyTree,
    statistics: Callable[[PyTree, PyTree], PyTree],
    *,
    log_weights: Float[np.ndarray, " N"] | None = None,
) -> PredictiveCheck:
    """Replicate the data from posterior draws, and compare statistics.

    Parameters
    ----------
    rng_key
        Key. Draw i uses fold_in(rng_key, i).
    draws
        Posterior draws in any form that a sampler of `calibrate` may return.
    simulate
        ``simulate(rng_key, sample)``: data like ``data``. It must run under `jax.vmap`.
    data
        The observed data, a pytree.
    statistics
        ``statistics(sample, data)`` returns a pytree of numbers or arrays, for replicated and for observed data; the
        order of the arguments is that of the functions of `calibrate`.
    log_weights
        Log weights of the draws, where ``draws`` is a pytree without them.

    Returns
    -------
    PredictiveCheck

    Raises
    ------
    ValueError
        If draws and weights do not fit, or a statistic is NaN where the weight is positive.

    Source: Gelman, Meng and Stern, Statistica Sinica 6 (1996).
    """
    cloud = as_draws(draws if log_weights is None else (draws, log_weights))
    size = len(jax.tree.leaves(cloud.values)[0])
    weights = np.full(size, 1 / size) if cloud.log_weights is None else normalised_weights(cloud.log_weights)
    one = jax.tree.map(lambda leaf: leaf[0], cloud.values)
    names = column_names(column_shapes(eqx.filter_eval_shape(statistics, one, data)))
    found = _replicate(rng_key, simulate, statistics, jax.tree.map(jnp.asarray, cloud.values), data)
    replicated, observed = (as_columns(tree, size) for tree in found)
    bad = np.isnan(replicated[weights > 0]) | np.isnan(observed[weights > 0])
    if bad.any():
        raise ValueError(f"the statistic {names[int(np.argmax(bad.any(axis=0)))]!r} is NaN.")
    exceeds = (replicated > observed) + 0.5 * (replicated == observed)
    p_values = weights @ exceeds
    std_error = np.sqrt((weights**2) @ (exceeds - p_values[None]) ** 2)
    return PredictiveCheck(names, p_values, std_error, replicated, observed, weights)


@eqx.filter_jit
def _replicate(rng_key, simulate, statistics, values, data):
    """Statistics of replicated and of observed data, for each draw."""

    def of_draw(index, sample):
        replica = simulate(jax.random.fold_in(rng_key, index), sample)
        return statistics(sample, replica), statistics(sample, data)

    return jax.vmap(of_draw)(jnp.arange(len(jax.tree.leaves(values)[0])), values)
