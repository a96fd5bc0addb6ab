"""Particle Gibbs for a diffusion site of a NumPyro model, as a NumPyro kernel.

The site x ~ DiffusionPrior(model) is the end of the diffusion's reverse chain x_1, ..., x_0. Given all other sites, the
chain has the law

    pi(x_{0:n} | rest)  proportional to  (law of the chain) L(x_0),

with L from the model's trace (`smcdiff.ppl.sites`), which conditional SMC with the twisted proposal leaves invariant
for any number of particles (`smcdiff.smc.particle_gibbs`). The rest depends on the chain through x_0 alone, so that
between two updates the chain's noisy samples stay, and what the twist says of them is computed anew
(`FeynmanKac.retrace`).

Sources: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010); Wu et al.,
"Practical and Asymptotically Exact Conditional Sampling in Diffusion Models", arXiv 2306.17775.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcdiff.checks import check_count
from smcdiff.guidance import Twist
from smcdiff.ppl.site_kernel import SiteKernel
from smcdiff.ppl.sites import diffusion_chain
from smcdiff.smc import FeynmanKac, particle_gibbs
from smcdiff.smc.conditional import Trajectory

__all__ = ["ParticleGibbs", "ParticleGibbsKernelState"]


class ParticleGibbsKernelState(NamedTuple):
    """State of `ParticleGibbs`.

    Attributes
    ----------
    z
        The sample, under the name of its site.
    path
        The reverse chain that ends in it, of shape (num_steps + 1, *shape of the site).
    rng_key
        Key of the next step.
    acceptance_rate
        Share of the chain that the last step renewed; the sample itself is new where it is above 0.
    ess
        Least effective sample size of the last step.
    num_invalid
        Number of weights of the last step that were no numbers.
    """

    z: dict[str, Array]
    path: Float[Array, "times *event"]
    rng_key: PRNGKeyArray
    acceptance_rate: Float[Array, ""]
    ess: Float[Array, ""]
    num_invalid: Int[Array, ""]

    def statistics(self) -> dict[str, Array]:
        """What is reported of a step."""
        return {key: getattr(self, key) for key in ("acceptance_rate", "ess", "num_invalid")}


class ParticleGibbs(SiteKernel):
    """NumPyro kernel for one site with a `DiffusionPrior`, given all others; exact for any number of particles.

    A block of NumPyro's `Gibbs`, or a kernel of its own where the site is the only latent one. `smcdiff.infer` puts it
    together with a kernel for the other sites.

    Parameters
    ----------
    model
        The NumPyro model.
    num_particles
        Particles, at least 2, of which one is the present chain.
    num_steps
        Reverse steps, on the grid uniform in log-SNR; the sample's prior is the law of that discrete chain.
    twist
        Twist of the locally linear-Gaussian problem, see `smcdiff.guidance`; chosen as in `smcdiff.tds` if omitted.
    order
        2 for the second-order chain, 1 for ancestral steps.
    backward
        Whether chains are drawn backward, which needs ``order=1``. Otherwise ancestors are traced.
    ess_threshold, batch_size
        See `smcdiff.particle_gibbs`.

    Raises
    ------
    ValueError
        If a count is out of range; by ``init``, if the block is not exactly one site with a `DiffusionPrior`.

    Source: "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010).
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int = 16,
        num_steps: int = 50,
        twist: Twist | None = None,
        order: int = 2,
        backward: bool = False,
        ess_threshold: float = 0.5,
        batch_size: int | None = None,
    ):
        check_count("num_particles", num_particles, 2)
        check_count("num_steps", num_steps)
        super().__init__(model)
        self._num_steps, self._twist, self._order = num_steps, twist, order
        self._sampler = functools.partial(
            particle_gibbs,
            num_particles=num_particles,
            backward=backward,
            ess_threshold=ess_threshold,
            batch_size=batch_size,
        )

    def get_diagnostics_str(self, state: ParticleGibbsKernelState) -> str:
        """Text of the progress bar."""
        return f"{float(state.acceptance_rate):.0%} of the path renewed, ess {float(state.ess):.1f}"

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> ParticleGibbsKernelState:
        """Start with one particle of the twisted proposal; ``init_params`` names the site."""
        key_trace, key_path, rng_key = jax.random.split(rng_key, 3)
        site, x = self.find_site(key_trace, list(init_params or ()), model_args, model_kwargs)
        algorithm = self._sampler(self._chain(site, x, model_args, model_kwargs))
        path = algorithm.init(None, key_path).position.particles.x
        zero = jnp.zeros((), path.dtype)
        return ParticleGibbsKernelState({site: path[-1]}, path, rng_key, zero, zero, jnp.zeros((), jnp.int32))

    def sample(self, state: ParticleGibbsKernelState, model_args, model_kwargs) -> ParticleGibbsKernelState:
        """One step of conditional SMC under the present values of the other sites."""
        ((site, x),) = state.z.items()
        rng_key, key_step = jax.random.split(state.rng_key)
        fk = self._chain(site, x, model_args, model_kwargs)
        algorithm = self._sampler(fk)
        here = algorithm.init(Trajectory(*fk.retrace(state.path)), key_step)  # type: ignore[misc]
        there, info = algorithm.step(key_step, here)
        path = there.position.particles.x
        return ParticleGibbsKernelState(
            {site: path[-1]}, path, rng_key, info.acceptance_rate, jnp.min(info.ess), info.num_invalid
        )

    def _chain(self, site, x, args, kwargs) -> FeynmanKac:
        """The twisted sampler of the site, where the others are as ``kwargs`` has them."""
        return diffusion_chain(
            self.likelihood(site, args, kwargs), x, self._num_steps, self._twist, self._order
        )
