"""Posterior sampling with a diffusion prior, exact: noise along the likelihood's gradient, denoising, acceptance.

For pi(x) ~ p(x) L(x) with a diffusion prior p and a likelihood L whose gradient g = grad log L is known, a step draws

    z = x + rho^2 g(x) + rho xi,        x' | z ~ p(x') N(z; x', rho^2 I),

the second by the reverse process of the diffusion from the noise rho, and accepts x' with probability
min(1, exp(h(x', z) - h(x, z))),

    h(x, z) = log L(x) + g(x) . (z - x) - rho^2 |g(x)|^2 / 2.

The prior's density cancels, so that a denoiser is enough. The chain leaves pi alone for any rho, up to the error of the
reverse steps, which falls with their number; rho is tuned like the step of MALA, to an acceptance rate of about .57. It
follows the width of the likelihood, not that of the prior: where the data say little, rho is large and a step forgets
much. `smcdiff.mcmc.split_gibbs` draws z from the likelihood itself and accepts always, for the posterior under more
noise.

For a Gaussian prior this is the auxiliary gradient sampler, whose x' is drawn exactly; it is kin to the preconditioned
Crank-Nicolson Langevin sampler.

Sources: Titsias and Papaspiliopoulos, "Auxiliary gradient-based sampling algorithms", JRSS-B 80 (2018),
arXiv 1610.09641; Cotter, Roberts, Stuart and White, "MCMC methods for functions", Statistical Science 28 (2013),
arXiv 1202.0709.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from smcdiff.checks import check_count, check_order
from smcdiff.density import DiffusionModel, require, warn_unless_diffusion
from smcdiff.mcmc.log_concave_chain import check_noise_std
from smcdiff.mcmc.restart import denoise_along
from smcdiff.mcmc.split_gibbs import as_measurement, log_likelihood, times_from

__all__ = ["AuxiliaryGradientInfo", "AuxiliaryGradientState", "auxiliary_gradient"]

_LAST_SHARE = 3.0  # log of the noise that is left to the last step to t = 0, as a share of rho, at most


class AuxiliaryGradientState(NamedTuple):
    """State of the auxiliary gradient sampler.

    Attributes
    ----------
    position
        The sample, of shape ``event_shape``.
    log_likelihood
        log L there.
    gradient
        Its gradient there, like ``position``.
    """

    position: Float[Array, "*event"]
    log_likelihood: Float[Array, ""]
    gradient: Float[Array, "*event"]


class AuxiliaryGradientInfo(NamedTuple):
    """What happened in one step.

    Attributes
    ----------
    acceptance_rate
        Probability of acceptance.
    is_accepted
        Whether the chain moved.
    num_evaluations
        Calls of the denoiser.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    num_evaluations: int


class _Kernel(eqx.Module):
    model: DiffusionModel
    problem: Any
    rho: Float[Array, ""] | float
    log_snr_max: Float[Array, ""] | float
    num_steps: int = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def state_at(self, x):
        value_and_gradient = jax.value_and_grad(log_likelihood, argnums=1)
        return AuxiliaryGradientState(x, *value_and_gradient(self.problem, x))


def auxiliary_gradient(
    model: DiffusionModel,
    problem: Any,
    rho: Float[Array, ""] | float,
    *,
    num_steps: int = 12,
    log_snr_max: Float[Array, ""] | float = 5.0,
    order: int = 2,
) -> SamplingAlgorithm:
    """Exact posterior samples of an inverse problem with a diffusion prior, from a denoiser and a likelihood.

    Parameters
    ----------
    model
        The prior, any diffusion model.
    problem
        An `InverseProblem`, an object with ``log_likelihood(x)``, or that function, which must be differentiable.
    rho
        Deviation of the noise of a step, in data units, positive: tune it to an acceptance rate of .57, for instance by
        `smcdiff.mcmc.adapt_step_size`. At most sigma(1)/alpha(1) of the model's schedule.
    num_steps
        Reverse steps from that noise, each a call of the denoiser.
    log_snr_max
        Last log-SNR before the final step to t = 0; its noise is exp(-log_snr_max), or exp(-3) rho where that is less.
    order
        Order of the reverse steps, 1 or 2, see `smcdiff.mcmc.restart.denoise_along`.

    Returns
    -------
    SamplingAlgorithm, with `AuxiliaryGradientState` and `AuxiliaryGradientInfo`.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser, or ``problem`` no likelihood.
    ValueError
        If a number is out of range.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.

    Source: Titsias and Papaspiliopoulos, "Auxiliary gradient-based sampling algorithms", arXiv 1610.09641.
    """
    require(model, DiffusionModel, "auxiliary_gradient")
    warn_unless_diffusion(model, "auxiliary_gradient")
    problem = as_measurement(problem)
    check_noise_std("rho", rho, model)
    check_count("num_steps", num_steps, 2)
    check_order(order)
    kernel = _Kernel(model, problem, rho, log_snr_max, num_steps, order)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def _init(kernel, position, rng_key):
    """The likelihood at the start."""
    return kernel.state_at(position)


def _step(kernel, rng_key, state):
    """Noise along the gradient, denoise, accept or not."""
    key_noise, key_reverse, key_accept = jax.random.split(rng_key, 3)
    x = state.position
    rho = jnp.asarray(kernel.rho, x.dtype)
    z = x + rho**2 * state.gradient + rho * jax.random.normal(key_noise, x.shape, x.dtype)

    schedule = kernel.model.schedule
    log_snr_max = jnp.maximum(jnp.asarray(kernel.log_snr_max, x.dtype), _LAST_SHARE - jnp.log(rho))
    times = times_from(schedule, rho, log_snr_max, kernel.num_steps)
    noisy = schedule.alpha(times[0]) * z
    new = kernel.state_at(denoise_along(key_reverse, kernel.model, noisy, times, eta=1.0, order=kernel.order))

    log_accept = _height(new, z, rho) - _height(state, z, rho)
    probability = jnp.where(jnp.isnan(log_accept), 0.0, jnp.exp(jnp.minimum(log_accept, 0.0)))
    is_accepted = jax.random.uniform(key_accept, dtype=x.dtype) < probability
    state = jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), new, state)
    return state, AuxiliaryGradientInfo(probability, is_accepted, kernel.num_steps)


def _height(state, z, rho):
    """h(x, z): log L, and how much likelier its gradient made z."""
    x, log_likelihood, gradient = state
    return log_likelihood + jnp.sum(gradient * (z - x)) - 0.5 * rho**2 * jnp.sum(gradient**2)
