"""Denoising Langevin Gibbs: a chain on samples and noise levels, on which it wanders like a tempered chain.

State: a noisy sample x and the number k of its time in a grid t_0, ..., t_(K-1). Joint law:

    pi(x, k) ~ c_k p_(t_k)(x).

A step makes n Metropolis-adjusted Langevin steps of x on p_(t_k), and draws k given x from pi(k | x), a softmax over
the grid. Both leave pi alone, so the samples with level k have the law p_(t_k) exactly; where the p_t are normalised
(diffusions are, compositions need not be), level k has the share c_k of the time. No sample need be thrown away: over
all states, weights pi(k | x) / c_k make x a sample of p_(t_k).

The published kernel replaces the draw of k by a trained classifier of noise levels, for networks without a log density.

Source: Zhang et al., "Denoising MCMC for Accelerating Diffusion-Based Generative Models", arXiv 2209.14593.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from smcdiff.checks import check_count, check_positive
from smcdiff.density import DensityPath, HasLogDensity, HasScore, require
from smcdiff.mcmc.langevin import mala

__all__ = ["DenoisingLangevinGibbsInfo", "DenoisingLangevinGibbsState", "denoising_langevin_gibbs"]


class DenoisingLangevinGibbsState(NamedTuple):
    """State of denoising Langevin Gibbs.

    Attributes
    ----------
    position
        Noisy sample, of the law p_t at the time of its level.
    level
        Number of its time in the grid.
    is_start_valid
        Whether the densities of all levels are finite where the chain started, and the score of its first one.
    """

    position: Float[Array, "*event"]
    level: Int[Array, ""]
    is_start_valid: Bool[Array, ""]


class DenoisingLangevinGibbsInfo(NamedTuple):
    """What happened in one step of denoising Langevin Gibbs.

    Attributes
    ----------
    acceptance_rate
        Mean probability of acceptance of the Langevin steps.
    level
        Level after the step.
    level_probabilities
        pi(k | x) of all levels at the new sample, shape (K,).
    is_divergent
        Whether a Langevin step failed by more than 1000 nats, or gave no number.
    num_evaluations
        Evaluations of the score, n + 1; with each goes a log density, and K more for the levels.
    """

    acceptance_rate: Float[Array, ""]
    level: Int[Array, ""]
    level_probabilities: Float[Array, " K"]
    is_divergent: Bool[Array, ""]
    num_evaluations: int


class _Kernel(eqx.Module):
    path: Any
    times: Float[Array, " K"]
    step_size: Float[Array, " K"]
    log_level_weights: Float[Array, " K"]
    num_langevin_steps: int = eqx.field(static=True)

    def level_logits(self, x):
        """log pi(k | x) up to a constant."""
        logdensities = jax.vmap(lambda t: self.path.at(t).logdensity(x))(self.times)
        return self.log_level_weights.astype(logdensities.dtype) + logdensities


def denoising_langevin_gibbs(
    path: DensityPath,
    times: Float[Array, " K"],
    *,
    step_size: Float[Array, "*K"] | float,
    num_langevin_steps: int = 1,
    log_level_weights: Float[Array, " K"] | None = None,
) -> SamplingAlgorithm:
    """Langevin steps at a noise level that is drawn anew given the sample: exact for paths with log densities.

    Of the run keep the samples whose ``level`` is that of the time you want, which are exact, or weigh all of them by
    ``info.level_probabilities``. Put the time you want into the grid, for instance a small first one.

    Parameters
    ----------
    path
        Density path whose ``path.at(t)`` has a log density: an exact model, or an energy-based one. What the levels'
        normalising constants differ by shifts their shares.
    times
        Noise levels in (0, 1], shape (K,), close enough for neighbours to overlap.
    step_size
        Langevin step, positive, one number or one a level; it should follow the width of p_t.
    num_langevin_steps
        Langevin steps n between draws of the level.
    log_level_weights
        log c_k, shape (K,): the shares of the levels; equal if omitted.

    Returns
    -------
    SamplingAlgorithm, with `DenoisingLangevinGibbsState` and `DenoisingLangevinGibbsInfo`.

    Raises
    ------
    TypeError
        If the path has no log density.
    ValueError
        If a number is out of range or a shape does not fit.

    Source: Zhang et al., "Denoising MCMC for Accelerating Diffusion-Based Generative Models", arXiv 2209.14593.
    """
    check_positive("times", times)
    check_positive("step_size", step_size)
    check_count("num_langevin_steps", num_langevin_steps)
    times = jnp.asarray(times, float)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must have shape (K,) with K at least 2, got {times.shape}.")
    if not isinstance(times, jax.core.Tracer) and float(jnp.max(times)) > 1.0:
        raise ValueError(f"times must lie in (0, 1], got {float(jnp.max(times)):g}.")
    weights = jnp.zeros_like(times) if log_level_weights is None else jnp.asarray(log_level_weights, float)
    for name, value, shapes in (
        ("step_size", step_size, ((), times.shape)),
        ("log_level_weights", weights, (times.shape,)),
    ):
        if jnp.shape(value) not in shapes:
            raise ValueError(f"{name} must have a shape of {shapes}, as times have, got {jnp.shape(value)}.")
    require(path, DensityPath, "denoising_langevin_gibbs")
    target = path.at(times[0])
    require(target, HasScore, "denoising_langevin_gibbs")
    require(
        target,
        HasLogDensity,
        "denoising_langevin_gibbs",
        "scores cannot tell how likely a noise level is; take restart or walk_jump, which need no log density",
    )
    step_size = jnp.broadcast_to(jnp.asarray(step_size, float), times.shape)
    kernel = _Kernel(path, times, step_size, weights, num_langevin_steps)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Draw the level that fits the sample."""
    logits = kernel.level_logits(position)
    level = jax.random.categorical(rng_key, logits)
    score = kernel.path.at(kernel.times[level]).score(position)
    is_valid = jnp.all(jnp.isfinite(logits)) & jnp.all(jnp.isfinite(score))
    return DenoisingLangevinGibbsState(position, level, is_valid)


def _step(kernel, rng_key, state):
    """Langevin steps at the level, then a level for the sample."""
    key_langevin, key_level = jax.random.split(rng_key)
    step_size = kernel.step_size[state.level].astype(state.position.dtype)
    algorithm = mala(kernel.path.at(kernel.times[state.level]), step_size)
    walker, infos = jax.lax.scan(
        lambda walker, key: algorithm.step(key, walker),
        algorithm.init(state.position, rng_key),
        jax.random.split(key_langevin, kernel.num_langevin_steps),
    )
    logits = kernel.level_logits(walker.position)
    level = jax.random.categorical(key_level, logits)
    info = DenoisingLangevinGibbsInfo(
        jnp.mean(infos.acceptance_rate),
        level,
        jax.nn.softmax(logits),
        jnp.any(infos.is_divergent),
        kernel.num_langevin_steps + 1,
    )
    return state._replace(position=walker.position, level=level), info
