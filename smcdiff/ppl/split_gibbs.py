"""Split Gibbs sampling for a diffusion site of a NumPyro model, as a NumPyro kernel.

The site holds a noisy copy z of a sample x of the diffusion, bound to it by noise of deviation rho. With all other
sites theta,

    pi(x, z, theta)  proportional to  p(x) N(z; x, rho^2 I) L(z, theta),

so that the model, which sees z alone, has the prior of data with noise of deviation rho instead of that of data, and
everything else as it is written: other kernels move theta given z. One step draws

    x | z            by the reverse process from the noise rho, with its noise, a call of the denoiser a reverse step;
    z | x, theta     from the model that is linear at x: its Gaussian sites with residual r and Jacobian J (see
                     `smcdiff.ppl.sites`) and the gradient g of the others make

                         q(z)  proportional to  N(z; x, rho^2 I) exp(-|r + J (z - x)|^2 / 2 + g . (z - x)),

                     drawn by conjugate gradients and accepted with the ratio of L/L_linear at the new z to that at the
                     old one: a Metropolis step that needs no tuning, and accepts always where the model is linear.

Sources: Vono, Dobigeon and Chainais, "Split-and-augmented Gibbs sampler", arXiv 1804.05809; Wu et al., "Principled
Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors", arXiv 2405.18782.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.checks import check_count, check_order, check_positive
from smcdiff.guidance.twist import whitened_residual
from smcdiff.mcmc.log_concave_chain import check_noise_std
from smcdiff.mcmc.restart import denoise_along
from smcdiff.mcmc.split_gibbs import check_floor, condition_draw, times_from
from smcdiff.ppl.site_kernel import SiteKernel
from smcdiff.ppl.sites import diffusion_of

__all__ = ["SplitGibbs", "SplitGibbsKernelState"]


class SplitGibbsKernelState(NamedTuple):
    """State of `SplitGibbs`.

    Attributes
    ----------
    z
        The noisy copy, under the name of the site.
    denoised
        The sample without noise from which the last step drew the copy, of the same shape.
    rng_key
        Key of the next step.
    acceptance_rate
        Probability with which the last copy was accepted.
    solve_residual
        Residual of the last linear system, relative to its right-hand side. Not small: more iterations are needed.
    """

    z: dict[str, Array]
    denoised: Float[Array, "*event"]
    rng_key: PRNGKeyArray
    acceptance_rate: Float[Array, ""]
    solve_residual: Float[Array, ""]

    def statistics(self) -> dict[str, Array]:
        """What is reported of a step."""
        return {key: getattr(self, key) for key in ("acceptance_rate", "solve_residual")}

    def derived(self) -> dict[str, Array]:
        """What is returned beside the site, by name."""
        (site,) = self.z
        return {f"{site}_denoised": self.denoised}


class SplitGibbs(SiteKernel):
    """NumPyro kernel for one site with a `DiffusionPrior`, given all others, whose prior is blurred by noise rho.

    The site's value is the copy. The sample without noise is ``denoised`` in the state, for NumPyro's ``extra_fields``,
    and "x_denoised" beside the site "x" in `smcdiff.infer`: it has the prior itself, and for a linear model A the
    measurement with the noise R + rho^2 A A^T.
    A step costs ``num_steps`` calls of the denoiser, whatever the size of the model, where `ParticleGibbs` needs that
    times its number of particles. It mixes the faster the larger ``rho`` is.

    Parameters
    ----------
    model
        The NumPyro model.
    rho
        Deviation of the noise between sample and copy, in data units: what the posterior may be blurred by. At most
        sigma(1)/alpha(1) of the diffusion's schedule.
    num_steps
        Reverse steps from that noise to the sample, uniform in log-SNR.
    log_snr_max
        Last log-SNR before the final step to t = 0; its noise exp(-log_snr_max) must lie well below ``rho``.
    order
        Order of the reverse steps, 1 or 2.
    max_iterations
        Cap of the conjugate gradients; see ``solve_residual``.

    Raises
    ------
    ValueError
        If a number is out of range; by ``init``, if the block is not exactly one site with a `DiffusionPrior`.

    Source: Wu et al., "Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors",
    arXiv 2405.18782.
    """

    def __init__(
        self,
        model: Callable,
        *,
        rho: Float[Array, ""] | float,
        num_steps: int = 25,
        log_snr_max: Float[Array, ""] | float = 5.0,
        order: int = 2,
        max_iterations: int = 50,
    ):
        super().__init__(model)
        check_positive("rho", rho)
        check_floor("rho", rho, log_snr_max)
        check_count("num_steps", num_steps)
        check_count("max_iterations", max_iterations)
        check_order(order)
        self._rho, self._log_snr_max = rho, log_snr_max
        self._num_steps, self._order, self._max_iterations = num_steps, order, max_iterations

    def get_diagnostics_str(self, state: SplitGibbsKernelState) -> str:
        """Text of the progress bar."""
        return f"copy accepted with probability {float(state.acceptance_rate):.0%}"

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> SplitGibbsKernelState:
        """Start from the prior; ``init_params`` names the site."""
        key_trace, rng_key = jax.random.split(rng_key)
        site, x = self.find_site(key_trace, list(init_params or ()), model_args, model_kwargs)
        check_noise_std("rho", self._rho, diffusion_of(self.likelihood(site, model_args, model_kwargs), x))
        one = jnp.ones((), x.dtype)
        return SplitGibbsKernelState({site: x}, x, rng_key, one, 0.0 * one)

    def sample(self, state: SplitGibbsKernelState, model_args, model_kwargs) -> SplitGibbsKernelState:
        """The sample given its copy, then the copy given the sample and the present values of the other sites."""
        ((site, z),) = state.z.items()
        rng_key, key_sample, key_copy, key_accept = jax.random.split(state.rng_key, 4)
        problem = self.likelihood(site, model_args, model_kwargs)
        diffusion, rho = diffusion_of(problem, z), jnp.asarray(self._rho, z.dtype)
        times = times_from(diffusion.schedule, rho, self._log_snr_max, self._num_steps)
        noisy = diffusion.schedule.alpha(times[0]) * z
        x = denoise_along(key_sample, diffusion, noisy, times, order=self._order)

        linear, slope = problem.linearize(x), jax.grad(problem.log_rest)(x)

        def log_ratio(z):
            """log L(z) / L_linear(z)."""
            residual, _ = whitened_residual(linear, z)
            return problem.log_likelihood(z) + 0.5 * jnp.sum(residual**2) - jnp.sum(slope * (z - x))

        new, solved = condition_draw(key_copy, linear, x + rho**2 * slope, rho, self._max_iterations)
        log_accept = log_ratio(new) - log_ratio(z)
        probability = jnp.where(jnp.isnan(log_accept), 0.0, jnp.exp(jnp.minimum(log_accept, 0.0)))
        z = jnp.where(jax.random.uniform(key_accept, dtype=z.dtype) < probability, new, z)
        return SplitGibbsKernelState({site: z}, x, rng_key, probability, solved)
