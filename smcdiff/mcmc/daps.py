"""Decoupled annealing of inverse problems: denoise, fit the measurement, and noise again, to less and less.

At noise levels t_0 > t_1 > ... the noisy sample is drawn anew from a clean one, and nothing binds it to the one before:

    x_t = alpha x + sigma xi,      x0_hat = the end of the probability-flow equation from x_t,
    x ~ N(x; x0_hat, r_t^2 I) L(y | x),      r_t = width sigma/alpha.

It is split Gibbs sampling (`smcdiff.mcmc.split_gibbs`) with a falling rho in which a new noising and a deterministic
way back stand for the draw of the prior given the copy. That, and the Gaussian for p(x_0 | x_t), are approximations:
the law of the end is not exactly the posterior. In return no step is short, however small the noise.

Source: Zhang et al., "Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing", arXiv 2407.01521.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from smcdiff.checks import check_count, check_positive
from smcdiff.density import DiffusionModel
from smcdiff.mcmc.restart import check_falling, denoise_along
from smcdiff.mcmc.split_gibbs import LikelihoodStep, check_floor, likelihood_step, times_from

__all__ = ["DapsInfo", "DapsState", "daps"]


class DapsState(NamedTuple):
    """State of decoupled annealing.

    Attributes
    ----------
    position
        The sample x, which agrees with the measurement, of shape ``event_shape``.
    step
        Number of levels that are done.
    """

    position: Float[Array, "*event"]
    step: Int[Array, ""]


class DapsInfo(NamedTuple):
    """What happened at one level.

    Attributes
    ----------
    acceptance_rate
        Mean probability of acceptance of the Langevin steps on the likelihood; 1 where it was drawn exactly.
    solve_residual
        Residual of the linear system, relative to its right-hand side; 0 where none was solved.
    denoised
        x0_hat, before the measurement.
    is_divergent
        Whether one of the Langevin steps diverged.
    """

    acceptance_rate: Float[Array, ""]
    solve_residual: Float[Array, ""]
    denoised: Float[Array, "*event"]
    is_divergent: Bool[Array, ""]


class _Kernel(eqx.Module):
    model: DiffusionModel
    likelihood: LikelihoodStep
    levels: Float[Array, " K"]
    width: Float[Array, ""] | float
    log_snr_max: Float[Array, ""] | float
    num_steps: int = eqx.field(static=True)


def daps(
    model: DiffusionModel,
    problem: Any,
    times: Float[Array, " steps"],
    *,
    num_steps: int = 5,
    width: Float[Array, ""] | float = 1.0,
    log_snr_max: Float[Array, ""] | float = 7.0,
    step_size: Float[Array, ""] | float = 0.3,
    curvature: Float[Array, ""] | float = 0.0,
    num_mala_steps: int = 20,
    max_iterations: int = 50,
) -> SamplingAlgorithm:
    """Decoupled annealing posterior sampling: one noise level a step, as many steps as levels for a sample.

    Parameters
    ----------
    model
        The prior, any diffusion model.
    problem
        As in `split_gibbs`.
    times
        Times of the noise levels, a grid that falls strictly within [0, 1], where alpha is not 0; a last point t = 0 is
        left out. Further steps stay at the last level.
    num_steps
        Steps of the probability-flow equation from each level, each a call of the denoiser; at least 2.
    width
        The deviation r_t in units of sigma/alpha, positive.
    log_snr_max
        Last log-SNR of the probability-flow equation before its final step; its noise exp(-log_snr_max) must lie below
        that of the last level.
    step_size, curvature, num_mala_steps, max_iterations
        As in `split_gibbs`, with r_t in the place of rho.

    Returns
    -------
    SamplingAlgorithm, with `DapsState` and `DapsInfo`. Run it without a position, one step a level, as many chains as
    samples are wanted, and keep the last positions.

    Raises
    ------
    TypeError, ValueError
        As `split_gibbs`, and if ``times`` is no such grid.

    Source: Zhang et al., "Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing",
    arXiv 2407.01521.
    """
    likelihood = likelihood_step("daps", model, problem, step_size, curvature, num_mala_steps, max_iterations)
    check_count("num_steps", num_steps)
    check_positive("width", width)
    levels = check_falling(times)
    if not isinstance(levels, jax.core.Tracer):
        levels = levels[:-1] if levels[-1] == 0 else levels
        if not model.schedule.alpha(levels[0]) > 0:
            raise ValueError("times must start where alpha > 0; leave out the first point, t = 1.")
    check_floor("the last noise level of times", jnp.exp(-model.schedule.log_snr(levels)), log_snr_max)
    kernel = _Kernel(model, likelihood, levels, width, log_snr_max, num_steps)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """Start from nothing but noise, or from a guess that the first level noises."""
    position = jnp.zeros(kernel.model.event_shape, kernel.levels.dtype) if position is None else position
    return DapsState(position, jnp.zeros((), int))


def _step(kernel, rng_key, state):
    """Noise to the level, go back along the probability flow, draw given the measurement."""
    key_noise, key_likelihood = jax.random.split(rng_key)
    x, model = state.position, kernel.model
    t = kernel.levels[jnp.minimum(state.step, len(kernel.levels) - 1)].astype(x.dtype)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    noisy = alpha * x + sigma * jax.random.normal(key_noise, x.shape, x.dtype)
    times = times_from(model.schedule, sigma / alpha, kernel.log_snr_max, kernel.num_steps)
    denoised = denoise_along(key_noise, model, noisy, times, eta=0.0)
    x, acceptance, residual, is_divergent = kernel.likelihood(
        key_likelihood, denoised, denoised, kernel.width * sigma / alpha
    )
    return DapsState(x, state.step + 1), DapsInfo(acceptance, residual, denoised, is_divergent)
