"""The auxiliary gradient sampler for a diffusion site of a NumPyro model, as a NumPyro kernel.

One step moves the site given all others: noise along the gradient of the model's log likelihood, denoising by the
diffusion, Metropolis acceptance; see `smcdiff.mcmc.auxiliary_gradient`. The noise rho is tuned in the warm-up by dual
averaging.

Source: Titsias and Papaspiliopoulos, "Auxiliary gradient-based sampling algorithms", arXiv 1610.09641.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcdiff.checks import check_count, check_order, check_positive
from smcdiff.mcmc.auxiliary_gradient import auxiliary_gradient
from smcdiff.mcmc.warmup import Adaptation, adapt_until, begin_adaptation, settings_at
from smcdiff.ppl.site_kernel import SiteKernel
from smcdiff.ppl.sites import diffusion_of

__all__ = ["AuxiliaryGradient", "AuxiliaryGradientKernelState"]


class AuxiliaryGradientKernelState(NamedTuple):
    """State of `AuxiliaryGradient`.

    Attributes
    ----------
    z
        The site's sample, under its name.
    adaptation
        The tuning of rho.
    num_steps
        Number of steps made.
    rng_key
        Key of the next step.
    acceptance_rate
        Probability with which the last proposal was accepted.
    rho
        Noise of the last step, in data units.
    """

    z: dict[str, Array]
    adaptation: Adaptation
    num_steps: Int[Array, ""]
    rng_key: PRNGKeyArray
    acceptance_rate: Float[Array, ""]
    rho: Float[Array, ""]

    def statistics(self) -> dict[str, Array]:
        """What is reported of a step."""
        return {key: getattr(self, key) for key in ("acceptance_rate", "rho")}


class AuxiliaryGradient(SiteKernel):
    """NumPyro kernel for one site with a `DiffusionPrior`, given all others: exact, at one short reverse run a step.

    The likelihood of the site must be differentiable. A step costs ``num_steps`` calls of the denoiser and two
    gradients of the likelihood, whatever the size of the model; it leaves the posterior alone up to the error of those
    reverse steps.

    Parameters
    ----------
    model
        The NumPyro model.
    rho
        Deviation of the noise of a step, in data units, positive: the first guess, or the value without warm-up. No
        more than sigma(1)/alpha(1) of the diffusion's schedule is used.
    target_acceptance
        The acceptance rate to which the warm-up tunes ``rho``, in (0, 1).
    num_steps
        Reverse steps from that noise to the sample, uniform in log-SNR.
    order
        Order of the reverse steps, 1 or 2.

    Raises
    ------
    ValueError
        If a number is out of range; by ``init``, if the block is not exactly one site with a `DiffusionPrior`.

    Source: Titsias and Papaspiliopoulos, "Auxiliary gradient-based sampling algorithms", arXiv 1610.09641.
    """

    def __init__(
        self,
        model: Callable,
        *,
        rho: Float[Array, ""] | float = 0.1,
        target_acceptance: float = 0.57,
        num_steps: int = 12,
        order: int = 2,
    ):
        super().__init__(model)
        check_positive("rho", rho)
        check_count("num_steps", num_steps, 2)
        if not 0.0 < target_acceptance < 1.0:
            raise ValueError(f"target_acceptance must lie between 0 and 1, got {target_acceptance}.")
        check_order(order)
        self._rho, self._target_acceptance = rho, target_acceptance
        self._num_steps, self._order = num_steps, order
        self._num_warmup = 0  # set by `init`

    def get_diagnostics_str(self, state: AuxiliaryGradientKernelState) -> str:
        """Text of the progress bar."""
        return f"noise {float(state.rho):.2g} accepted with probability {float(state.acceptance_rate):.0%}"

    def init(
        self, rng_key, num_warmup, init_params, model_args, model_kwargs
    ) -> AuxiliaryGradientKernelState:
        """Start from the prior; ``init_params`` names the site."""
        self._num_warmup = num_warmup
        key_trace, rng_key = jax.random.split(rng_key)
        site, x = self.find_site(key_trace, list(init_params or ()), model_args, model_kwargs)
        rho = jnp.asarray(self._rho, x.dtype)
        zero = jnp.zeros((), jnp.int32)
        return AuxiliaryGradientKernelState(
            {site: x}, begin_adaptation(rho, None), zero, rng_key, jnp.zeros_like(rho), rho
        )

    def sample(
        self, state: AuxiliaryGradientKernelState, model_args, model_kwargs
    ) -> AuxiliaryGradientKernelState:
        """One step given the present values of the other sites, which in the warm-up tunes rho."""
        ((site, x),) = state.z.items()
        rng_key, key_init, key_step = jax.random.split(state.rng_key, 3)
        problem = self.likelihood(site, model_args, model_kwargs)
        diffusion = diffusion_of(problem, x)
        rho = jnp.asarray(self._rho, x.dtype)
        if self._num_warmup:
            rho = settings_at(state.adaptation, state.num_steps, self._num_warmup)["step_size"]
        rho = jnp.minimum(rho, jnp.exp(-diffusion.schedule.log_snr(jnp.ones((), x.dtype))))
        algorithm = auxiliary_gradient(diffusion, problem, rho, num_steps=self._num_steps, order=self._order)
        inner, info = algorithm.step(key_step, algorithm.init(x, key_init))
        adaptation = adapt_until(
            state.adaptation,
            inner.position.ravel(),
            info,
            state.num_steps,
            self._num_warmup,
            self._target_acceptance,
        )
        return AuxiliaryGradientKernelState(
            {site: inner.position}, adaptation, state.num_steps + 1, rng_key, info.acceptance_rate, rho
        )
