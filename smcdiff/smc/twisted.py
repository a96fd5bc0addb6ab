"""Twisted diffusion sampler: SMC for the posterior of a diffusion prior under a likelihood.

The reverse chain p(x_s | x_t) of the prior is steered by a twist psi_t(x) ~ p(y | x_t = x). With x0_hat the
denoised sample and shift = (sigma^2/alpha) grad log psi_t, what y adds to the denoised sample,

    p:  N(m(x0_hat), c^2 I),        q:  N(m(x0_hat + shift), c^2 I),
    log weight increment = log p(x_s|x_t) - log q(x_s|x_t) + log psi_s(x_s) - log psi_t(x_t),

and at the last step psi_0 is the likelihood itself and nothing is steered, since that step is (nearly) noiseless.
So the weighted particles target the posterior under the prior chain exactly, whatever the twist, and the evidence
estimate is unbiased; the twist decides the variance.

The chain is that of `smcdiff.smc.prior_chain`, to second order by default: x0_hat and the shift are both extrapolated
(``order=1`` gives the ancestral steps of the paper).

Sources: Wu, Trippe, Naesseth, Blei and Cunningham, "Practical and Asymptotically Exact Conditional Sampling in
Diffusion Models", arXiv 2306.17775; Lu et al., "DPM-Solver++", arXiv 2211.01095 (the second-order step).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.density import DiffusionModel
from smcdiff.guidance import Twist, TwistValue, default_twist
from smcdiff.inverse import InverseProblem
from smcdiff.reverse import reverse_transition
from smcdiff.smc.feynman_kac import FeynmanKac, Innovations
from smcdiff.smc.prior_chain import PriorChain, prior_chain

__all__ = ["TwistedParticle", "tds"]


class TwistedParticle(NamedTuple):
    """One particle of the twisted sampler.

    Attributes
    ----------
    x
        The noisy sample x_t; the sample itself after the last step.
    value
        What the twist said at ``x``.
    previous
        What it said one step before, from which the second-order step extrapolates; None at first order.
    """

    x: Float[Array, "*event"]
    value: TwistValue
    previous: TwistValue | None


class _TwistedModel(eqx.Module):
    chain: PriorChain
    problem: Any
    twist: Twist

    def look_ahead(self, x, t):
        return self.twist(self.chain.model, self.problem, x, t)


def tds(
    model: DiffusionModel,
    problem: Any,
    *,
    times: Float[Array, " steps"],
    twist: Twist | None = None,
    order: int = 2,
) -> FeynmanKac:
    """Feynman-Kac model of the twisted diffusion sampler for an inverse problem.

    Run it with `smcdiff.run_smc`, or hand it to `smcdiff.smc`.

    Parameters
    ----------
    model
        The prior: anything with ``schedule``, ``event_shape`` and ``denoise``.
    problem
        An `InverseProblem`: measurement, operator and noise; or any object with ``log_likelihood(x)``, for which a
        ``twist`` must be given.
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(model.schedule, 100)`.
    twist
        Approximation of p(y | x_t); `smcdiff.guidance.default_twist` chooses one if omitted.
    order
        1 for ancestral steps, 2 for the second-order chain.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser, or ``problem`` is no `InverseProblem` and has no twist.
    ValueError
        If ``times`` is no grid from 1 to 0, if the operator does not take the model's samples, or if ``order`` is
        neither 1 nor 2.

    Source: "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models", arXiv 2306.17775.
    """
    chain = prior_chain(model, times, order, "tds")
    if isinstance(problem, InverseProblem):
        problem.operator.check(model.event_shape)
        twist = default_twist(model, problem) if twist is None else twist
    if twist is None:
        raise TypeError(
            f"tds chooses a twist for an InverseProblem only, got {type(problem).__name__}; give twist, for instance "
            "smcdiff.guidance.log_twist(lambda problem, denoised, t: problem.log_likelihood(denoised))."
        )
    twisted = _TwistedModel(chain, problem, twist)
    # A second-order particle remembers its ancestor: the density of a move to it from any other one is zero.
    log_transition = Partial(_log_transition, twisted) if order == 1 else None
    return FeynmanKac(
        Partial(_init, twisted),
        Partial(_step, twisted),
        chain.num_steps,
        log_transition,
        Partial(_retrace, twisted),
        Innovations(Partial(_drive, twisted), (chain.num_steps, *model.event_shape)),
    )


def _init(twisted, rng_key):
    """Draw x_1 ~ N(0, sigma_1^2 I), weighed by the twist."""
    return _begin(twisted, twisted.chain.start(rng_key))


def _begin(twisted, x):
    value = twisted.look_ahead(x, twisted.chain.times[0])
    return TwistedParticle(x, value, _remember(twisted, value)), value.log_twist


def _step(twisted, rng_key, particle, k):
    """Move from times[k] to times[k + 1] under the steered chain, and weigh."""
    return _push(twisted, jax.random.normal(rng_key, particle.x.shape, particle.x.dtype), particle, k)


def _push(twisted, noise, particle, k):
    mean, guided, std = _moves(twisted, particle, k)
    return _arrive(twisted, particle, guided + std * noise, noise, mean, guided, std, k)


def _drive(twisted, noise):
    """Last particle and weight of the chain that is driven by ``noise`` (num_steps, *event): its last step has none."""

    def follow(carry, inputs):
        particle, log_weight = carry
        particle, increment = _push(twisted, inputs[0], particle, inputs[1])
        return (particle, log_weight + increment), None

    chain = twisted.chain
    first = _begin(twisted, chain.model.schedule.sigma(chain.times[0]) * noise[0])
    rest = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])
    # A gradient keeps the particles of the path, and not what the network computes at each.
    return jax.lax.scan(jax.checkpoint(follow), first, (rest, jnp.arange(chain.num_steps)))[0]


def _retrace(twisted, path):
    """Particles and increments of the chain that passed through the samples ``path`` (num_steps + 1, *event)."""

    def follow(particle, inputs):
        x, k = inputs
        mean, guided, std = _moves(twisted, particle, k)
        noise = (x - guided) / jnp.where(std > 0, std, 1.0)
        particle, increment = _arrive(twisted, particle, x, noise, mean, guided, std, k)
        return particle, (particle, increment)

    first = _begin(twisted, path[0])
    _, rest = jax.lax.scan(follow, first[0], (path[1:], jnp.arange(twisted.chain.num_steps)))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def _moves(twisted, particle, k):
    """Mean of the chain's own step ``k``, mean of the steered one, and the deviation of both."""
    chain, is_last = twisted.chain, k == twisted.chain.num_steps - 1
    schedule, t, s = chain.model.schedule, chain.times[k], chain.times[k + 1]
    denoised, shift = _extrapolate(chain, particle, k)
    mean, std = reverse_transition(schedule, particle.x, denoised, t, s)
    guided, _ = reverse_transition(schedule, particle.x, denoised + jnp.where(is_last, 0.0, shift), t, s)
    return mean, guided, std


def _arrive(twisted, particle, x, noise, mean, guided, std, k):
    """The particle at the end of step ``k``, at x = guided + std * noise, and what the step weighs it with."""
    chain, is_last = twisted.chain, k == twisted.chain.num_steps - 1
    # log p - log q of two Gaussians of equal deviation; no noise and no steering at the last step.
    offset = jnp.where(is_last, 0.0, (guided - mean) / jnp.where(std > 0, std, 1.0))
    log_ratio = -jnp.sum(offset * noise) - 0.5 * jnp.sum(offset**2)

    def look_at_data(x):
        log_likelihood = twisted.problem.log_likelihood(x)
        return TwistValue(x, jnp.zeros_like(x), log_likelihood)

    value = jax.lax.cond(is_last, look_at_data, lambda x: twisted.look_ahead(x, chain.times[k + 1]), x)
    increment = log_ratio + value.log_twist - particle.value.log_twist
    return TwistedParticle(x, value, _remember(twisted, particle.value)), increment


def _remember(twisted, value):
    return value if twisted.chain.order == 2 else None


def _log_transition(twisted, particle_from, particle_to, k):
    """Log density of a first-order move and its weight, from the twists that both particles hold."""
    chain, value = twisted.chain, particle_from.value
    schedule, is_last = chain.model.schedule, k == chain.num_steps - 1
    t, s = chain.times[k], chain.times[k + 1]
    shift = jnp.where(is_last, 0.0, value.shift)
    mean, std = reverse_transition(schedule, particle_from.x, value.denoised, t, s)
    guided, _ = reverse_transition(schedule, particle_from.x, value.denoised + shift, t, s)
    safe_std = jnp.where(std > 0, std, 1.0)

    def log_normal(mean):
        scaled = (particle_to.x - mean) / safe_std
        return -0.5 * jnp.sum(scaled**2) - mean.size * (jnp.log(safe_std) + 0.5 * jnp.log(2 * jnp.pi))

    log_density = log_normal(guided)
    increment = log_normal(mean) - log_density + particle_to.value.log_twist - value.log_twist
    return jnp.where(std > 0, log_density, -jnp.inf), increment


def _extrapolate(chain, particle, k):
    """Denoised sample and shift for step ``k``, extrapolated over half of it at second order."""
    value, previous = particle.value, particle.previous
    if chain.order == 1:
        return value.denoised, value.shift
    share = chain.share(k)
    return (
        value.denoised + share * (value.denoised - previous.denoised),
        value.shift + share * (value.shift - previous.shift),
    )
