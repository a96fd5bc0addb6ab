"""Independence Metropolis-Hastings: proposals that do not look where the chain is.

With the importance weight w = pi / q, a proposal x' ~ q is accepted with probability min(1, w(x') / w(x)). Where w is
bounded by M the chain is geometrically ergodic at rate 1 - 1/M, so q should have the wider tails.

Source: Tierney, "Markov chains for exploring posterior distributions", Ann. Stat. 22 (1994).
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from smcdiff.density import SCORE_KERNELS, HasLogDensity, as_target, require

__all__ = ["IndependenceInfo", "IndependenceState", "independence"]


@runtime_checkable
class _Proposal(Protocol):
    def sample(self, key: PRNGKeyArray) -> PyTree: ...

    def log_prob(self, value: PyTree) -> Float[Array, ""]: ...


class IndependenceState(NamedTuple):
    """State of the chain.

    Attributes
    ----------
    position
        The sample.
    log_weight
        Log of target over proposal at it.
    """

    position: PyTree
    log_weight: Float[Array, ""]


class IndependenceInfo(NamedTuple):
    """What happened in one step.

    Attributes
    ----------
    acceptance_rate
        Probability with which the proposal was accepted.
    is_accepted
        Whether it was.
    log_weight
        Log weight of the proposal: over many steps, these are importance weights.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    log_weight: Float[Array, ""]


class _Kernel(eqx.Module):
    target: HasLogDensity
    proposal: _Proposal


def independence(target: Any, proposal: Any) -> SamplingAlgorithm:
    """Metropolis-Hastings with proposals from one law.

    Parameters
    ----------
    target
        A log density function, or an object with a log density.
    proposal
        The law: an object with ``sample(key)`` and ``log_prob(x)``, a NumPyro distribution or a
        `smcdiff.ppl.LearnedProposal` given its data. Its draws must have exactly that density; those of a diffusion's
        reverse process do not.

    Returns
    -------
    SamplingAlgorithm, with `IndependenceState` and `IndependenceInfo`. Started without a position it draws one.

    Raises
    ------
    TypeError
        If the target has no log density, or the proposal lacks a method.

    Source: Tierney, "Markov chains for exploring posterior distributions" (1994).
    """
    target = as_target(target)
    require(target, HasLogDensity, "independence", SCORE_KERNELS)
    if not isinstance(proposal, _Proposal):
        raise TypeError(
            f"proposal must have sample(key) and log_prob(x), as NumPyro's distributions do, got "
            f"{type(proposal).__name__}."
        )
    kernel = _Kernel(target, proposal)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Start from a position, or from the proposal."""
    return _weigh(kernel, kernel.proposal.sample(rng_key) if position is None else position)


def _step(kernel, rng_key, state):
    """Propose, and accept or not."""
    key_propose, key_accept = jax.random.split(rng_key)
    proposed = _weigh(kernel, kernel.proposal.sample(key_propose))
    rate = jnp.exp(jnp.minimum(proposed.log_weight - state.log_weight, 0.0))
    rate = jnp.where(jnp.isnan(rate), 0.0, rate)
    is_accepted = jax.random.uniform(key_accept, (), rate.dtype) < rate
    new = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), proposed, state)
    return new, IndependenceInfo(rate, is_accepted, proposed.log_weight)


def _weigh(kernel, position):
    return IndependenceState(
        position, kernel.target.logdensity(position) - kernel.proposal.log_prob(position)
    )
