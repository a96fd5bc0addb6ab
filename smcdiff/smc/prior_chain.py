"""The prior's reverse chain, which all samplers share that steer or weigh it.

The chain starts at x_1 ~ N(0, sigma_1^2 I) and makes reverse transitions

    p(x_s | x_t) = N(m(x0_hat), c^2 I),        x_0 = x0_hat at the last step,

with x0_hat = E[x_0 | x_t] extrapolated linearly in log-SNR from the step before (``order=2``), or as it is
(``order=1``, ancestral steps). The second-order step costs no network call, and at 100 steps removes an error in the
weights of modes that first-order chains make for any number of particles. Whatever a sampler does on the way, its
evidence is the mean of exp(log likelihood) at the end of this chain.

Sources: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502 (the ancestral step); Lu et al.,
"DPM-Solver++", arXiv 2211.01095 (the second-order step).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.density import DiffusionModel, require, warn_unless_diffusion
from smcdiff.reverse import reverse_transition
from smcdiff.schedules import check_times

__all__ = ["ChainParticle", "PriorChain", "prior_chain"]


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
            denoised = denoised + self.share(k) * (denoised - particle.previous)
        return reverse_transition(self.model.schedule, particle.x, denoised, self.times[k], self.times[k + 1])

    def denoise(self, x: Float[Array, "*event"], k: Any) -> Float[Array, "*event"]:
        """E[x_0 | x_t = x] at times[k]; ``x`` itself at the end, without a call of the network."""
        return jax.lax.cond(
            k == self.num_steps, lambda x: x, lambda x: self.model.denoise(x, self.times[k]), x
        )

    def share(self, k: Any) -> Float[Array, ""]:
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
    warn_unless_diffusion(model, who)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (ancestral) or 2, got {order!r}.")
    return PriorChain(model, check_times(times), order)
