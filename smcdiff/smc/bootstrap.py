"""The prior's reverse chain as a Feynman-Kac model, and the baseline that only weighs its end.

The chain starts at x_1 ~ N(0, sigma_1^2 I) and makes reverse transitions

    p(x_s | x_t) = N(m(x0_hat), c^2 I),        x_0 = x0_hat at the last step,

with x0_hat = E[x_0 | x_t] extrapolated linearly in log-SNR from the step before (``order=2``, no extra network call),
or as it is (``order=1``, ancestral steps). `PriorChain` is what all samplers here share that steer or weigh this
chain; their evidence is the mean of exp(log likelihood) at its end, whatever they do on the way.

`bootstrap` moves by the chain itself and weighs x_0 alone: importance sampling from the prior. Unbiased, and of use
only where the likelihood is nearly flat on the prior's scale; whatever steers must beat it.

Sources: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502 (the ancestral step); Lu et al.,
"DPM-Solver++", arXiv 2211.01095 (the second-order step).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.density import DiffusionModel, require
from smcdiff.inverse import InverseProblem
from smcdiff.reverse import reverse_transition
from smcdiff.schedules import check_times
from smcdiff.smc.feynman_kac import FeynmanKac

__all__ = ["ChainParticle", "PriorChain", "bootstrap", "prior_chain"]


class ChainParticle(NamedTuple):
    """One particle of the reverse chain.

    Attributes
    ----------
    x
        The noisy sample x_t; the sample itself after the last step.
    denoised
        E[x_0 | x_t = x]; ``x`` itself after the last step.
    previous
        The same one step before, from which the second-order step extrapolates.
    """

    x: Float[Array, "*event"]
    denoised: Float[Array, "*event"]
    previous: Float[Array, "*event"]


class PriorChain(eqx.Module):
    """The reverse chain of a diffusion model on a grid of times; build it by `prior_chain`.

    Where a method takes a ``particle``, it may be any object with the attributes of `ChainParticle`.
    """

    model: DiffusionModel
    times: Float[Array, " steps"]
    order: int = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """Number of transitions, one less than there are times."""
        return self.times.shape[0] - 1

    def start(self, rng_key: PRNGKeyArray) -> Float[Array, "*event"]:
        """Draw x_1 ~ N(0, sigma_1^2 I)."""
        sigma = self.model.schedule.sigma(self.times[0])
        return sigma * jax.random.normal(rng_key, self.model.event_shape, self.times.dtype)

    def transition(self, particle: Any, k: Any) -> tuple[Float[Array, "*event"], Float[Array, ""]]:
        """Mean and deviation of step number ``k``, which goes from times[k] to times[k + 1]."""
        denoised = particle.denoised
        if self.order == 2:
            denoised = denoised + self._share(k) * (denoised - particle.previous)
        return reverse_transition(self.model.schedule, particle.x, denoised, self.times[k], self.times[k + 1])

    def denoise(self, x: Float[Array, "*event"], k: Any) -> Float[Array, "*event"]:
        """E[x_0 | x_t = x] at times[k]; ``x`` itself at the end, without a call of the network."""
        return jax.lax.cond(
            k == self.num_steps, lambda x: x, lambda x: self.model.denoise(x, self.times[k]), x
        )

    def _share(self, k):
        """Part of the last change of the denoised sample that step ``k`` adds: half of its own width over the last."""
        times, schedule = self.times, self.model.schedule
        first, last = k == 0, k == self.num_steps - 1
        now = schedule.log_snr(times[k])
        width = schedule.log_snr(times[k + 1]) - now
        previous_width = now - schedule.log_snr(times[k - 1])
        return jnp.where(first | last, 0.0, 0.5 * width / jnp.where(first, 1.0, previous_width))


def prior_chain(model: DiffusionModel, times: Float[Array, " steps"], order: int, who: str) -> PriorChain:
    """Check what a sampler got and make the chain of it.

    Parameters
    ----------
    model
        The prior: anything with ``schedule``, ``event_shape`` and ``denoise``.
    times
        Grid that falls from 1 to 0.
    order
        1 for ancestral steps, 2 for the second-order chain.
    who
        Name of the sampler that asks, for the message.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser.
    ValueError
        If ``times`` is no grid from 1 to 0, or ``order`` is neither 1 nor 2.
    """
    require(model, DiffusionModel, who)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (ancestral) or 2, got {order!r}.")
    return PriorChain(model, check_times(times), order)


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
