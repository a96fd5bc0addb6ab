"""What samplers return, as draws with a leading axis and their weights."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from smcdiff.run import Trace
from smcdiff.smc import SMCResult

__all__ = ["Draws", "as_draws", "normalised_weights"]


class Draws(NamedTuple):
    """Posterior draws of one data set.

    Attributes
    ----------
    values
        Pytree with the leading axis N; chains lie one after the other.
    log_weights
        Log weights (N,), None for equally weighted draws.
    num_chains
        Markov chains of equal length that the draws are made of; 1 for independent draws as well.
    """

    values: PyTree
    log_weights: Float[np.ndarray, " N"] | None
    num_chains: int


def as_draws(result: Any) -> Draws:
    """Read the result of a sampler.

    Parameters
    ----------
    result
        A pytree of draws with a leading axis; a plain tuple (draws, log_weights); a `smcdiff.Trace`, whose leading
        axes are chains and draws; or a `smcdiff.SMCResult`, whose chains are pooled by their evidence.

    Raises
    ------
    ValueError
        If leading axes differ, or the weights are not one number a draw.
    """
    log_weights, num_chains = None, 1
    if isinstance(result, SMCResult):
        values, log_weights = _join_chains(result.particles), result.pooled_log_weights().ravel()
    elif isinstance(result, Trace):
        values, num_chains = _join_chains(result.samples), len(jax.tree.leaves(result.samples)[0])
    elif type(result) is tuple and len(result) == 2:
        values, log_weights = result
    else:
        values = result
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(values)}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        raise ValueError(
            f"the sampler must return draws with one leading axis, got leading axes {sorted(sizes)}."
        )
    size = sizes.pop()
    if log_weights is not None:
        log_weights = np.asarray(log_weights, float)
        if log_weights.shape != size:
            raise ValueError(
                f"log_weights must have the shape (N,) = {size} of the draws, got {log_weights.shape}; "
                "parameters that come as a pair belong in a list or a dictionary."
            )
    return Draws(values, log_weights, num_chains)


def normalised_weights(log_weights: Float[np.ndarray, "*batch N"]) -> Float[np.ndarray, "*batch N"]:
    """Weights that add up to one along the last axis.

    Raises
    ------
    ValueError
        If a log weight is NaN or plus infinity, or no draw has any weight.
    """
    log_weights = np.asarray(log_weights, float)
    largest = log_weights.max(axis=-1, keepdims=True)
    if not np.all(np.isfinite(largest)):
        raise ValueError("log_weights must be numbers or minus infinity, and some draw must have a weight.")
    weights = np.exp(log_weights - largest)
    return weights / weights.sum(axis=-1, keepdims=True)


def _join_chains(samples):
    """Leading axes (chains, draws) as one, chain by chain."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *np.shape(leaf)[2:]), samples)
