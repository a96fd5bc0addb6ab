"""Langevin kernels: the diffusion that leaves a density alone, in steps, with a correction or without.

    overdamped:    dx = M^-1 s(x) dt + sqrt(2) M^(-1/2) dW
    underdamped:   dx = L u dt,   du = (L^T s(x) - g u) dt + sqrt(2 g) dW,      M^-1 = L L^T

An Euler step of the first, x' = x + h M^-1 s(x) + sqrt(2 h) L xi, is a leapfrog step of size sqrt(2 h) with a new
momentum xi (`smcdiff.mcmc.hamiltonian`), and the Metropolis-Hastings ratio of that proposal is the leapfrog's. `mala`
accepts by it; `ula` does not, and has an error of first order in h. `underdamped` splits the second into half a kick,
half a drift, an exact damping, half a drift and half a kick (BAOAB): its law of x has an error of second order, and
none if the target is Gaussian.

Sources: Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations",
Bernoulli 2 (1996); Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for molecular
sampling", arXiv 1203.5428.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PyTree

from smcdiff.checks import check_positive
from smcdiff.density import HasScore, as_target, require
from smcdiff.mcmc.hamiltonian import hamiltonian
from smcdiff.mcmc.metric import InverseMassMatrix, from_whitened, mass_factor, score_in_whitened

__all__ = ["UnderdampedInfo", "UnderdampedState", "mala", "ula", "underdamped"]


def ula(
    target: Any,
    step_size: Float[Array, ""] | float,
    *,
    inverse_mass_matrix: InverseMassMatrix = None,
) -> SamplingAlgorithm:
    """Unadjusted Langevin algorithm: never rejects, and is biased by an error of first order in the step.

    Parameters
    ----------
    target
        A log density function, or an object with a score, for instance ``model.at(t)``.
    step_size
        Step h, positive, in squared units of the sample: x + h score + sqrt(2 h) noise, as in BlackJAX.
    inverse_mass_matrix
        Estimate of the target's covariance over the flattened sample: None, variances (d,), or a matrix (d, d).

    Returns
    -------
    SamplingAlgorithm, with `HamiltonianState` and `HamiltonianInfo`.

    Raises
    ------
    TypeError
        If the target has no score.
    ValueError
        If ``step_size`` is not positive, or ``inverse_mass_matrix`` is not positive definite.

    Source: Roberts and Tweedie, Bernoulli 2 (1996).
    """
    check_positive("step_size", step_size)
    return hamiltonian(
        "ula", target, jnp.sqrt(2.0 * step_size), 1, None, inverse_mass_matrix, "never rejects"
    )


def mala(
    target: Any,
    step_size: Float[Array, ""] | float,
    *,
    inverse_mass_matrix: InverseMassMatrix = None,
    accept: str = "exact",
    num_nodes: int = 4,
) -> SamplingAlgorithm:
    """Metropolis-adjusted Langevin algorithm, with the acceptance from a log density or from scores.

    Parameters
    ----------
    target, step_size, inverse_mass_matrix
        As in `ula`.
    accept, num_nodes
        As in `smcdiff.mcmc.hmc`: "exact" needs a log density, "line_integral" a score and ``num_nodes`` more
        evaluations, "path_integral" a score, at an error of the chain's law of first order in h.

    Returns
    -------
    SamplingAlgorithm, with `HamiltonianState` and `HamiltonianInfo`.

    Raises
    ------
    TypeError
        If the target lacks what ``accept`` needs.
    ValueError
        If a number is out of range or ``accept`` is unknown.

    Source: Roberts and Tweedie, Bernoulli 2 (1996); arXiv 2307.14012 (acceptance from scores).
    """
    check_positive("step_size", step_size)
    return hamiltonian(
        "mala", target, jnp.sqrt(2.0 * step_size), 1, None, inverse_mass_matrix, accept, num_nodes
    )


class UnderdampedState(NamedTuple):
    """State of underdamped Langevin dynamics.

    Attributes
    ----------
    position
        The sample, an array or a pytree.
    score
        Score there, like ``position``.
    momentum
        Flat momentum in whitened coordinates, shape (d,).
    """

    position: PyTree
    score: PyTree
    momentum: Float[Array, " d"]


class UnderdampedInfo(NamedTuple):
    """What happened in one step of underdamped Langevin dynamics.

    Attributes
    ----------
    acceptance_rate
        1: nothing is rejected.
    is_divergent
        Whether the new sample or its score is not finite.
    kinetic_energy
        |u|^2/2 of the new momentum; on average d/2, in the limit of small steps.
    """

    acceptance_rate: Float[Array, ""]
    is_divergent: Bool[Array, ""]
    kinetic_energy: Float[Array, ""]


class _Underdamped(eqx.Module):
    target: Any
    step_size: Float[Array, ""] | float
    friction: Float[Array, ""] | float
    factor: InverseMassMatrix


def underdamped(
    target: Any,
    step_size: Float[Array, ""] | float,
    *,
    friction: Float[Array, ""] | float = 1.0,
    inverse_mass_matrix: InverseMassMatrix = None,
) -> SamplingAlgorithm:
    """Underdamped Langevin dynamics by the splitting BAOAB: never rejects, biased at second order in the step.

    Parameters
    ----------
    target, inverse_mass_matrix
        As in `ula`.
    step_size
        Step, positive, in units of the sample.
    friction
        Damping g of the momentum, positive, per unit of ``step_size``.

    Returns
    -------
    SamplingAlgorithm, with `UnderdampedState` and `UnderdampedInfo`.

    Raises
    ------
    TypeError
        If the target has no score.
    ValueError
        If ``step_size`` or ``friction`` is not positive, or ``inverse_mass_matrix`` is not positive definite.

    Source: Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for molecular sampling",
    arXiv 1203.5428.
    """
    check_positive("step_size", step_size)
    check_positive("friction", friction)
    target = as_target(target)
    require(target, HasScore, "underdamped")
    kernel = _Underdamped(target, step_size, friction, mass_factor(inverse_mass_matrix))
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Evaluate the score at the start and draw a momentum."""
    x, _ = ravel_pytree(position)
    return UnderdampedState(
        position, kernel.target.score(position), jax.random.normal(rng_key, x.shape, x.dtype)
    )


def _step(kernel, rng_key, state):
    """Half a kick, half a drift, the damping, half a drift, half a kick."""
    x, unravel = ravel_pytree(state.position)
    h, factor = kernel.step_size, kernel.factor
    kept = jnp.exp(-kernel.friction * jnp.asarray(h, x.dtype))
    noise = jax.random.normal(rng_key, x.shape, x.dtype)

    u = state.momentum + 0.5 * h * score_in_whitened(factor, ravel_pytree(state.score)[0])
    x = x + 0.5 * h * from_whitened(factor, u)
    u = kept * u + jnp.sqrt((1.0 - kept) * (1.0 + kept)) * noise
    x = x + 0.5 * h * from_whitened(factor, u)
    score = ravel_pytree(kernel.target.score(unravel(x)))[0]
    u = u + 0.5 * h * score_in_whitened(factor, score)

    is_divergent = ~(jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(score)))
    info = UnderdampedInfo(jnp.ones((), x.dtype), is_divergent, 0.5 * jnp.sum(u**2))
    return UnderdampedState(unravel(x), unravel(score), u), info
