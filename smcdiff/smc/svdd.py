"""Soft value-based decoding: at every step the best of a few children, chosen softly, and weighed so that it is exact.

Each particle draws M children of its own from the prior chain p(x_s | x_t), values each by v(x) = scale * r(x0_hat(x)),
with r a reward of the denoised sample, and goes on with one of them, chosen with probability proportional to exp(v).
With the weight

    increment = log [ (1/M) sum_m exp(v(x_s^m)) ] - v(x_t)

this is a properly weighted draw: for every function h, and with I the chosen child,

    E[ exp(increment) h(x_s^I) | x_t ] = E[ (1/M) sum_m exp(v(x_s^m) - v(x_t)) h(x_s^m) ]
                                       = integral of p(x_s | x_t) exp(v(x_s) - v(x_t)) h(x_s),

so that after each step the particles target prior chain x exp(v), at the end prior chain x exp(scale * r(x_0)), and
the evidence E[exp(scale * r(x_0))] is estimated without bias, for any M and any number of particles. M = 1 is
`fk_steering` with the potential "difference". The published method drops the increment and never resamples, which
biases it towards the prior; ``ess_threshold=0`` gives its samples, with the weights that put them right.

No gradient of the reward is needed. A step costs M calls of the network and of the reward.

Sources: Li et al., "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
Decoding", arXiv 2408.08252; Naesseth, Lindsten and Schon, "Nested Sequential Monte Carlo Methods", arXiv 1502.02536
(proper weighting).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.density import DiffusionModel
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.prior_chain import PriorChain, prior_chain
from smcdiff.smc.steering import check_reward

__all__ = ["DecodedParticle", "svdd"]


class DecodedParticle(NamedTuple):
    """One particle of soft value-based decoding.

    Attributes
    ----------
    x
        The noisy sample x_t; the sample itself after the last step.
    denoised
        E[x_0 | x_t = x].
    previous
        The same one step before, from which the second-order step extrapolates.
    value
        scale * reward of ``denoised``; 0 before the first step, so that all values are counted once.
    """

    x: Float[Array, "*event"]
    denoised: Float[Array, "*event"]
    previous: Float[Array, "*event"]
    value: Float[Array, ""]


class _Decoding(eqx.Module):
    chain: PriorChain
    reward: Callable
    scale: Float[Array, ""]
    num_children: int = eqx.field(static=True)


def svdd(
    model: DiffusionModel,
    reward: Callable[[Float[Array, "*event"]], Float[Array, ""]],
    *,
    times: Float[Array, " steps"],
    num_children: int = 4,
    scale: float | Float[Array, ""] = 1.0,
    order: int = 2,
) -> FeynmanKac:
    """Feynman-Kac model of soft value-based decoding for the target prior(x_0) exp(scale * reward(x_0)).

    Run it with `smcdiff.run_smc`, or hand it to `smcdiff.smc`. Particles are `DecodedParticle`s.

    Parameters
    ----------
    model
        The prior: anything with ``schedule``, ``event_shape`` and ``denoise``.
    reward
        ``reward(x) -> scalar`` of one (denoised) sample, finite, differentiable or not; as for `fk_steering`.
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(model.schedule, 100)`.
    num_children
        Children M of each particle at each step, at least 1.
    scale
        Strength of the reward; the paper's temperature alpha is 1/scale.
    order
        1 for ancestral steps, 2 for the second-order chain.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser or ``reward`` is not callable.
    ValueError
        If ``times`` is no grid from 1 to 0, ``reward`` does not return a scalar, ``num_children`` is not a positive
        integer, or ``order`` is neither 1 nor 2.

    Source: "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding",
    arXiv 2408.08252.
    """
    chain = prior_chain(model, times, order, "svdd")
    check_reward(reward, model.event_shape, chain.times.dtype)
    if isinstance(num_children, bool) or not isinstance(num_children, int) or num_children < 1:
        raise ValueError(f"num_children must be a positive integer, got {num_children!r}.")
    decoding = _Decoding(chain, reward, jnp.asarray(scale, chain.times.dtype), num_children)
    return FeynmanKac(Partial(_init, decoding), Partial(_step, decoding), chain.num_steps)


def _init(decoding, rng_key):
    """Draw x_1 ~ N(0, sigma_1^2 I), unweighed: the denoised sample of pure noise says nothing."""
    chain = decoding.chain
    x = chain.start(rng_key)
    denoised, zero = chain.denoise(x, 0), jnp.zeros((), x.dtype)
    return DecodedParticle(x, denoised, denoised, zero), zero


def _step(decoding, rng_key, particle, k):
    """Draw the children of one particle, choose one, and weigh it by the mean over all."""
    chain, num_children = decoding.chain, decoding.num_children
    key_children, key_choice = jax.random.split(rng_key)
    mean, std = chain.transition(particle, k)
    noise = jax.random.normal(key_children, (num_children, *mean.shape), mean.dtype)
    children = mean[None] + std * noise
    denoised = jax.vmap(lambda x: chain.denoise(x, k + 1))(children)
    values = decoding.scale * jax.vmap(decoding.reward)(denoised)
    chosen = jax.random.categorical(key_choice, values)
    increment = jax.nn.logsumexp(values) - jnp.log(jnp.asarray(num_children, values.dtype)) - particle.value
    moved = DecodedParticle(children[chosen], denoised[chosen], particle.denoised, values[chosen])
    return moved, increment
