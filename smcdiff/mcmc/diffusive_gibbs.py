"""Diffusive Gibbs sampling: noise carries a chain between modes, and any log density will do.

The joint law of x ~ pi and xt = alpha x + sigma z is sampled in turns. A sweep draws xt | x, and then moves x in a way
that leaves pi(x | xt) ~ pi(x) N(xt; alpha x, sigma^2 I) alone:

    propose x' ~ N(xt/alpha, (sigma/alpha)^2 I),   accept with probability min(1, pi(x') / pi(x)),
    then make n Metropolis-adjusted Langevin steps.

The likelihood of xt cancels against the density of the proposal, whence the short ratio. Every sweep leaves pi alone,
whatever alpha and sigma are. Over both draws x' - x has the deviation sqrt(2) sigma/alpha, which should be that of the
distance between modes; several noise levels are swept one after the other, and each is right by itself.

Source: Chen et al., "Diffusive Gibbs Sampling", arXiv 2402.03008.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PyTree

from smcdiff.checks import check_count, check_positive
from smcdiff.denoising_posterior import DenoisingPosterior
from smcdiff.density import HasLogDensity, HasScore, as_target, logdensity_and_score, require
from smcdiff.mcmc.hamiltonian import HamiltonianState
from smcdiff.mcmc.langevin import mala

__all__ = ["DiffusiveGibbsInfo", "DiffusiveGibbsState", "diffusive_gibbs"]


class DiffusiveGibbsState(NamedTuple):
    """State of diffusive Gibbs sampling.

    Attributes
    ----------
    position
        The sample, an array or a pytree.
    logdensity
        Log density there.
    score
        Score there, like ``position``.
    """

    position: PyTree
    logdensity: Float[Array, ""]
    score: PyTree


class DiffusiveGibbsInfo(NamedTuple):
    """What happened in one step: a sweep at every noise level.

    Attributes
    ----------
    acceptance_rate
        Mean probability of acceptance of the Langevin steps, over all levels; tune ``step_size`` by it.
    jump_acceptance
        Probability of acceptance of the proposals from the noise, shape (T,); tune the noise by it.
    langevin_acceptance
        Mean probability of acceptance of the Langevin steps of each level, shape (T,).
    is_divergent
        Whether a Langevin step failed by more than 1000 nats, or gave no number.
    num_evaluations
        Evaluations of log density and score together, T (n + 1).
    """

    acceptance_rate: Float[Array, ""]
    jump_acceptance: Float[Array, " T"]
    langevin_acceptance: Float[Array, " T"]
    is_divergent: Bool[Array, ""]
    num_evaluations: int


class _Kernel(eqx.Module):
    target: Any
    alpha: Float[Array, " T"]
    sigma: Float[Array, " T"]
    step_size: Float[Array, " T"]
    num_mala_steps: int = eqx.field(static=True)


def diffusive_gibbs(
    target: Any,
    alpha: Float[Array, "*T"] | float,
    sigma: Float[Array, "*T"] | float,
    *,
    step_size: Float[Array, "*T"] | float,
    num_mala_steps: int = 5,
) -> SamplingAlgorithm:
    """Diffusive Gibbs sampling: exact for any log density, and made for separated modes.

    Parameters
    ----------
    target
        A log density function, or an object with a log density.
    alpha, sigma
        Scale and deviation of the noising, positive: numbers, or arrays (T,) of levels that are swept in turn in every
        step. Only sigma/alpha matters; it should be about the distance between modes over sqrt(2).
    step_size
        Langevin step h, positive, in squared units of the sample, as in `smcdiff.mcmc.mala`; one number or one a level.
    num_mala_steps
        Langevin steps n of a sweep.

    Returns
    -------
    SamplingAlgorithm, with `DiffusiveGibbsState` and `DiffusiveGibbsInfo`. A sweep costs n + 1 evaluations of the log
    density with its score.

    Raises
    ------
    TypeError
        If the target has no log density.
    ValueError
        If a number is not positive, or the arrays do not have one shape () or (T,).

    Source: Chen et al., "Diffusive Gibbs Sampling", arXiv 2402.03008.
    """
    check_positive("alpha", alpha)
    check_positive("sigma", sigma)
    check_positive("step_size", step_size)
    check_count("num_mala_steps", num_mala_steps)
    target = as_target(target)
    require(target, HasScore, "diffusive_gibbs")
    require(
        target,
        HasLogDensity,
        "diffusive_gibbs",
        "or, for a diffusion model that is known by its score, take restart, which also noises and denoises",
    )
    shapes = [jnp.shape(value) for value in (alpha, sigma, step_size)]
    if any(len(shape) > 1 for shape in shapes) or len({shape for shape in shapes if shape}) > 1:
        raise ValueError(
            f"alpha, sigma and step_size must be numbers or arrays of one shape (T,), got shapes {shapes}."
        )
    size = max([1, *(shape[0] for shape in shapes if shape)])
    alpha, sigma, step_size = (
        jnp.broadcast_to(jnp.asarray(value, float), (size,)) for value in (alpha, sigma, step_size)
    )
    kernel = _Kernel(target, alpha, sigma, step_size, num_mala_steps)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Evaluate the target at the start."""
    return DiffusiveGibbsState(position, *logdensity_and_score(kernel.target, position))


def _step(kernel, rng_key, state):
    """A sweep at every noise level."""
    keys = jax.random.split(rng_key, len(kernel.alpha))
    levels = (keys, kernel.alpha, kernel.sigma, kernel.step_size)
    state, (jumps, langevin, is_divergent) = jax.lax.scan(Partial(_sweep, kernel), state, levels)
    info = DiffusiveGibbsInfo(
        jnp.mean(langevin),
        jumps,
        langevin,
        jnp.any(is_divergent),
        len(kernel.alpha) * (kernel.num_mala_steps + 1),
    )
    return state, info


def _sweep(kernel, state, level):
    """Noise the sample, propose one from the noise, and move by Langevin steps given the noisy sample."""
    key, alpha, sigma, step_size = level
    key_noise, key_jump, key_accept, key_langevin = jax.random.split(key, 4)
    x, unravel = ravel_pytree(state.position)
    alpha, sigma = alpha.astype(x.dtype), sigma.astype(x.dtype)
    noisy = alpha * x + sigma * jax.random.normal(key_noise, x.shape, x.dtype)
    proposal = unravel((noisy + sigma * jax.random.normal(key_jump, x.shape, x.dtype)) / alpha)
    proposed = DiffusiveGibbsState(proposal, *logdensity_and_score(kernel.target, proposal))
    gain = proposed.logdensity - state.logdensity
    jump_probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(gain), -jnp.inf, gain), 0.0))
    is_accepted = jax.random.uniform(key_accept, (), x.dtype) < jump_probability
    state = _choose(is_accepted, proposed, state)

    denoising = DenoisingPosterior(kernel.target, noisy / alpha, sigma / alpha)
    algorithm = mala(denoising, step_size.astype(x.dtype))
    end, infos = jax.lax.scan(
        lambda state, key: algorithm.step(key, state),
        HamiltonianState(
            state.position,
            state.logdensity + denoising.log_noise(state.position),
            jax.tree.map(jnp.add, state.score, denoising.noise_score(state.position)),
            None,
        ),
        jax.random.split(key_langevin, kernel.num_mala_steps),
    )
    # The target's own values come back by a subtraction; where nothing is accepted they stay, so that none can drift.
    moved = DiffusiveGibbsState(
        end.position,
        jnp.asarray(end.logdensity) - denoising.log_noise(end.position),
        jax.tree.map(jnp.subtract, end.score, denoising.noise_score(end.position)),
    )
    state = _choose(jnp.any(infos.is_accepted), moved, state)
    return state, (jump_probability, jnp.mean(infos.acceptance_rate), jnp.any(infos.is_divergent))


def _choose(condition, new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
