"""The baseline: importance sampling from the prior.

`bootstrap` moves by the prior's reverse chain itself and weighs x_0 alone, by the likelihood. Unbiased, and of use only
where the likelihood is nearly flat on the prior's scale; whatever steers must beat it.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.density import DiffusionModel
from smcdiff.inverse import InverseProblem
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.prior_chain import ChainParticle, PriorChain, prior_chain

__all__ = ["bootstrap"]


class _Bootstrap(eqx.Module):
    chain: PriorChain
    log_likelihood: Callable


def bootstrap(
    model: DiffusionModel,
    problem: InverseProblem | Callable[[Float[Array, "*event"]], Float[Array, ""]],
    *,
    times: Float[Array, " steps"],
    order: int = 2,
) -> FeynmanKac:
    """Feynman-Kac model of importance sampling from the prior: plain reverse chains, weighed at their end.

    Run it with `smcdiff.run_smc`, or hand it to `smcdiff.smc`. Particles are `ChainParticle`s.

    Parameters
    ----------
    model
        The prior: anything with ``schedule``, ``event_shape`` and ``denoise``.
    problem
        Measurement, operator and noise; or ``log_likelihood(x) -> scalar`` of one sample, any function of the
        library's or a `jax.tree_util.Partial` whose arrays are leaves.
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(model.schedule, 100)`.
    order
        1 for ancestral steps, 2 for the second-order chain.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser, or ``problem`` is neither a problem nor a function.
    ValueError
        If ``times`` is no grid from 1 to 0, if the operator does not take the model's samples, or if ``order`` is
        neither 1 nor 2.

    Source: Gordon, Salmond and Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation",
    IEE Proceedings F 140 (1993).
    """
    chain = prior_chain(model, times, order, "bootstrap")
    if isinstance(problem, InverseProblem):
        problem.operator.check(model.event_shape)
        log_likelihood: Callable = problem.log_likelihood
    elif callable(problem):
        log_likelihood = problem
    else:
        raise TypeError(
            f"problem must be an InverseProblem or a function log_likelihood(x), got {type(problem).__name__}."
        )
    weighed = _Bootstrap(chain, log_likelihood)
    return FeynmanKac(Partial(_init, weighed), Partial(_step, weighed), chain.num_steps)


def _init(weighed, rng_key):
    """Draw x_1, unweighed."""
    x = weighed.chain.start(rng_key)
    denoised = weighed.chain.denoise(x, 0)
    return ChainParticle(x, denoised, denoised), jnp.zeros((), x.dtype)


def _step(weighed, rng_key, particle, k):
    """Move from times[k] to times[k + 1]; weigh at the end."""
    chain = weighed.chain
    mean, std = chain.transition(particle, k)
    x = mean + std * jax.random.normal(rng_key, mean.shape, mean.dtype)
    increment = jax.lax.cond(
        k == chain.num_steps - 1,
        lambda x: weighed.log_likelihood(x),
        lambda x: jnp.zeros((), x.dtype),
        x,
    )
    return ChainParticle(x, chain.denoise(x, k + 1), particle.denoised), increment
