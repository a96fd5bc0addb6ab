"""Particle marginal Metropolis-Hastings for all latent sites of a NumPyro model at once, as a NumPyro kernel.

The sites theta without a diffusion move by a random walk on the unconstrained scale, and the site x ~ DiffusionPrior is
integrated out: twisted SMC estimates the evidence

    p(y, theta) = integral of p(x | theta) L(x, theta) dx

without bias, which makes the chain exact for any number of particles, and one of its particles is the x that goes with
theta. Unlike Gibbs sampling it does not slow down where x and theta depend on each other, and the diffusion itself may
depend on theta, as through a class label; the price is a run of SMC a step, and a proposal that suits few parameters
only.

Source: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010).
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.mcmc import MCMCKernel

from smcdiff.checks import check_between, check_count
from smcdiff.guidance import Twist
from smcdiff.mcmc.warmup import Adaptation, adapt_until, begin_adaptation, settings_at
from smcdiff.ppl.call import ModelCall, model_call
from smcdiff.ppl.sites import SiteLikelihood, diffusion_chain, prior_of
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.marginal_mh import MarginalMHState, particle_marginal_mh

__all__ = ["ParticleMarginal", "ParticleMarginalKernelState"]


class ParticleMarginalKernelState(NamedTuple):
    """State of `ParticleMarginal`.

    Attributes
    ----------
    z
        Unconstrained values of the parameters, and the sample of the diffusion, by name.
    chain
        State of the Metropolis-Hastings chain, with its estimate of the log evidence.
    acceptance_rate
        Probability with which the last proposal was accepted.
    adaptation
        The warm-up of the random walk.
    num_steps
        Number of steps made.
    rng_key
        Key of the next step.
    """

    z: dict[str, Array]
    chain: MarginalMHState
    acceptance_rate: Float[Array, ""]
    adaptation: Adaptation
    num_steps: Int[Array, ""]
    rng_key: PRNGKeyArray


class ParticleMarginal(MCMCKernel):
    """NumPyro kernel that moves all latent sites of a model together, of which one has a `DiffusionPrior`.

    Parameters
    ----------
    model
        The NumPyro model.
    num_particles
        Particles of one estimate of the evidence; its log should have a deviation of about 1.
    num_steps
        Reverse steps, on the grid uniform in log-SNR; the sample's prior is the law of that discrete chain.
    twist, order
        As in `smcdiff.ppl.ParticleGibbs`.
    target_acceptance
        Acceptance rate to which the warm-up tunes the random walk, in (0, 1).
    batch_size
        See `smcdiff.particle_marginal_mh`.

    Raises
    ------
    ValueError
        If a number is out of range; by ``init``, if the block has not exactly one site with a `DiffusionPrior` and at
        least one other, or a site is discrete.

    Source: "Particle Markov chain Monte Carlo methods", JRSS-B 72 (2010).
    """

    sample_field = "z"

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int = 64,
        num_steps: int = 50,
        twist: Twist | None = None,
        order: int = 2,
        target_acceptance: float = 0.2,
        batch_size: int | None = None,
    ):
        check_count("num_particles", num_particles)
        check_count("num_steps", num_steps)
        check_between("target_acceptance", target_acceptance, 1e-3, 1.0)
        self._model = model
        self._num_particles, self._batch_size = num_particles, batch_size
        self._num_steps, self._twist, self._order = num_steps, twist, order
        self._target_acceptance = target_acceptance
        # Set by `init`.
        self._num_warmup = 0
        self._site = ""
        self._transforms: dict[str, Any] = {}

    @property
    def model(self):
        """The NumPyro model."""
        return self._model

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> ParticleMarginalKernelState:
        """Start from a draw of the prior, or from the constrained values in ``init_params``."""
        key_trace, key_chain, rng_key = jax.random.split(rng_key, 3)
        found = latent_sites("ParticleMarginal", self._model, key_trace, model_args, model_kwargs or {})
        self._num_warmup = num_warmup
        self._site, self._transforms, values = found
        values = values | dict(init_params or {})
        theta = {name: transform.inv(values[name]) for name, transform in self._transforms.items()}
        flat = jnp.concatenate([jnp.ravel(theta[name]) for name in sorted(theta)])
        step_size = jnp.asarray(2.4 / flat.size**0.5, flat.dtype)
        adaptation = begin_adaptation(step_size, jnp.ones_like(flat))
        algorithm = self._algorithm(adaptation, theta, values[self._site], 0, model_args, model_kwargs or {})
        chain = algorithm.init(theta, key_chain)
        zero = jnp.zeros((), flat.dtype)
        return self._state(chain, zero, adaptation, jnp.zeros((), jnp.int32), rng_key)

    def sample(self, state, model_args, model_kwargs) -> ParticleMarginalKernelState:
        """Propose new parameters, and accept or reject them with their particle."""
        rng_key, key_step = jax.random.split(state.rng_key)
        theta, adaptation = state.chain.position, state.adaptation
        algorithm = self._algorithm(
            adaptation, theta, state.z[self._site], state.num_steps, model_args, model_kwargs or {}
        )
        chain, info = algorithm.step(key_step, state.chain)
        x = jnp.concatenate([jnp.ravel(chain.position[name]) for name in sorted(theta)])
        adaptation = adapt_until(
            adaptation, x, info, state.num_steps, self._num_warmup, self._target_acceptance
        )
        return self._state(chain, info.acceptance_rate, adaptation, state.num_steps + 1, rng_key)

    def refresh(self, state, model_args, model_kwargs) -> ParticleMarginalKernelState:
        """Refused: an estimate of another target's evidence would have to be kept, and a new one is not exact."""
        raise ValueError(
            "ParticleMarginal moves all latent sites together and cannot be one block of several; give it every latent "
            "site, or use ParticleGibbs for the diffusion's site."
        )

    def wrap_model(self, wrapper: Callable) -> "ParticleMarginal":
        """The same kernel for the model ``wrapper(model)``."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        return kernel

    def get_constrain_fn(self, model_args, model_kwargs) -> Callable:
        """Values of the sites, by their transforms alone."""
        return lambda z: {
            name: self._transforms[name](value) if name in self._transforms else value
            for name, value in z.items()
        }

    def postprocess_fn(self, model_args, model_kwargs) -> Callable:
        """Values of the latent and of the deterministic sites."""
        constrain = self.get_constrain_fn(model_args, model_kwargs)
        call = model_call(self._model, model_args, model_kwargs or {})

        def fn(z):
            values = constrain(z)
            given = {name: value for name, value in values.items() if name != self._site}
            sites = SiteLikelihood(call, given, self._site).trace(values[self._site]).items()
            return values | {name: site["value"] for name, site in sites if site["type"] == "deterministic"}

        return fn

    def _state(self, chain, acceptance_rate, adaptation, num_steps, rng_key):
        z = {**chain.position, self._site: chain.particle.x}
        return ParticleMarginalKernelState(z, chain, acceptance_rate, adaptation, num_steps, rng_key)

    def _algorithm(self, adaptation, theta, x, num_steps, args, kwargs):
        """The chain, with a random walk in the proportions of the parameters' deviations."""
        settings = settings_at(adaptation, num_steps, self._num_warmup)
        scales = settings["step_size"] * jnp.sqrt(settings["inverse_mass_matrix"])
        step_size, start = {}, 0
        for name in sorted(theta):
            stop = start + theta[name].size
            step_size[name] = scales[start:stop].reshape(theta[name].shape)
            start = stop
        evidence = Evidence(
            model_call(self._model, args, kwargs),
            self._transforms,
            x,
            self._twist,
            self._site,
            self._num_steps,
            self._order,
        )
        return particle_marginal_mh(
            Partial(log_jacobian, self._transforms),
            evidence,
            self._num_particles,
            step_size=step_size,
            batch_size=self._batch_size,
        )


def log_jacobian(transforms: dict[str, Any], theta: dict[str, Array]) -> Float[Array, ""]:
    """Log determinant of the transforms; the parameters' own density is a part of the likelihood of the site."""
    terms = [jnp.sum(t.log_abs_det_jacobian(theta[name], t(theta[name]))) for name, t in transforms.items()]
    return sum(terms[1:], terms[0])


class Evidence(eqx.Module):
    """The twisted sampler at given parameters, on the unconstrained scale, whose evidence is p(y, parameters).

    Attributes
    ----------
    call
        The model.
    transforms
        From unconstrained parameters, by site.
    x
        Any value of the diffusion's site, for its shape.
    twist, num_steps, order
        See `smcdiff.ppl.ParticleGibbs`.
    site
        Name of the diffusion's site.
    left_out
        Sites whose densities the evidence leaves out, see `SiteLikelihood`.
    """

    call: ModelCall
    transforms: dict[str, Any]
    x: Float[Array, "*event"]
    twist: Twist | None
    site: str = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    order: int = eqx.field(static=True)
    left_out: tuple[str, ...] = eqx.field(default=(), static=True)

    def __call__(self, theta: dict[str, Array]) -> FeynmanKac:
        """The Feynman-Kac model at ``theta``."""
        given = {name: transform(theta[name]) for name, transform in self.transforms.items()}
        likelihood = SiteLikelihood(self.call, given, self.site, self.left_out)
        return diffusion_chain(likelihood, self.x, self.num_steps, self.twist, self.order)


def latent_sites(
    who: str, model: Callable, rng_key: PRNGKeyArray, args: tuple, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Array]]:
    """The diffusion's site, the transforms of the parameters, and a draw of all latent sites from the prior.

    Raises
    ------
    ValueError
        If there is not exactly one latent site with a `DiffusionPrior` and at least one other, or one is discrete.
    """
    trace = handlers.trace(handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    diffusions = [name for name, site in latent.items() if prior_of(site) is not None]
    discrete = [n for n, s in latent.items() if n not in diffusions and s["fn"].support.is_discrete]
    if len(diffusions) != 1 or len(latent) == 1 or discrete:
        raise ValueError(
            f"{who} moves one site with a DiffusionPrior and at least one continuous parameter, all latent sites "
            f"together; got the sites {list(latent)}, with a DiffusionPrior {diffusions}, discrete {discrete}."
        )
    (site,) = diffusions
    transforms = {n: biject_to(s["fn"].support) for n, s in latent.items() if n != site}
    return site, transforms, {name: s["value"] for name, s in latent.items()}
