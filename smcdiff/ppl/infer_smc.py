"""SMC over the parameters of a NumPyro model with a diffusion prior, with the evidence of the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers

from smcdiff.guidance import Twist
from smcdiff.ppl.call import model_call
from smcdiff.ppl.dependence import depends_on_input
from smcdiff.ppl.particle_marginal import Evidence, latent_sites, log_jacobian
from smcdiff.ppl.sites import SiteLikelihood
from smcdiff.smc.result import SMCResult, run_smc
from smcdiff.smc.tempered_marginal import tempered_marginal

__all__ = ["infer_smc"]


def infer_smc(
    rng_key: PRNGKeyArray,
    model: Callable,
    *args: Any,
    num_particles: int = 128,
    num_inner: int = 16,
    num_chains: int = 1,
    exponents: Float[Array, " n+1"] | None = None,
    num_moves: int = 2,
    num_steps: int = 50,
    twist: Twist | None = None,
    order: int = 2,
    batch_size: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> SMCResult:
    """Weighted draws of all latent sites of a NumPyro model with one `DiffusionPrior`, and the evidence of the model.

    The parameters go from the prior to the posterior by `smcdiff.smc.tempered_marginal`, each with a cloud of the
    diffusion's samples. Exact as ``num_particles`` grows, for any ``num_inner``. It finds posteriors of several modes,
    which one chain of `infer` does not leave, and costs ``num_particles * num_inner * (num_moves + 1)`` reverse chains
    a level.

    Parameters
    ----------
    rng_key
        Key.
    model
        The NumPyro model; see `infer` on what to pass as an argument.
    *args
        Its arguments.
    num_particles
        Values of the parameters.
    num_inner
        Samples of the diffusion for each of them.
    num_chains
        Independent runs.
    exponents
        Powers of the evidence, rising from 0 to 1; 16 levels that are dense near 0 if omitted.
    num_moves
        Metropolis-Hastings steps after each level.
    num_steps, twist, order
        As in `smcdiff.ppl.ParticleGibbs`.
    batch_size
        Samples of the diffusion handled together, for one value of the parameters.
    progress
        Whether to show a bar.
    **kwargs
        Keyword arguments of the model.

    Returns
    -------
    SMCResult
        With ``particles`` by site name, of shape (num_chains, num_particles, *site), and ``log_evidence``, that of the
        model with all constants.

    Raises
    ------
    TypeError
        If an argument is neither array nor hashable.
    ValueError
        If the model has not one latent site with a `DiffusionPrior` and at least one other, a parameter is discrete, or
        as `smcdiff.smc.tempered_marginal` does.

    Source: Duan and Fulop, "Density-Tempered Marginalized Sequential Monte Carlo Samplers" (2015).
    """
    call = model_call(model, args, kwargs)
    site, transforms, values = latent_sites("infer_smc", model, jax.random.key(0), args, kwargs)
    exponents = jnp.linspace(0.0, 1.0, 17) ** 3 if exponents is None else exponents
    parameters = tuple(transforms)
    _check_independence(call, values, site, parameters)
    fk, move = tempered_marginal(
        Partial(_sample_prior, call, transforms),
        Partial(_log_prior, call, transforms, {site: values[site]}),
        Evidence(call, transforms, values[site], twist, site, num_steps, order, parameters),
        num_inner,
        exponents=exponents,
        scale=1.0,
        batch_size=batch_size,
    )
    result = run_smc(
        rng_key, fk, num_particles, num_chains=num_chains, move=move, num_moves=num_moves, progress=progress
    )
    theta = {
        name: jax.vmap(jax.vmap(transform))(result.particles.position[name])
        for name, transform in transforms.items()
    }
    return result._replace(particles={**theta, site: result.particles.particle.x})


def _sample_prior(call, transforms, rng_key):
    """A draw of the parameters, on the unconstrained scale."""
    model, args, kwargs = call.unpack()
    trace = handlers.trace(handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
    return {name: transform.inv(trace[name]["value"]) for name, transform in transforms.items()}


def _log_prior(call, transforms, sample, theta):
    """Its log density."""
    given = {name: transform(theta[name]) for name, transform in transforms.items()}
    return log_jacobian(transforms, theta) + sum(_densities(call, given, sample).values())


def _densities(call, given, sample):
    """Log densities of the parameters' sites."""
    ((site, x),) = sample.items()
    trace = SiteLikelihood(call, given, site).trace(x)
    return {name: jnp.sum(trace[name]["fn"].log_prob(trace[name]["value"])) for name in given}


def _check_independence(call, values, site, parameters):
    """The prior of the parameters must be theirs alone."""
    given = {name: values[name] for name in parameters}
    depends = depends_on_input(lambda x: _densities(call, given, {site: x}), values[site])
    for name, does in depends.items():
        if does:
            raise ValueError(
                f"infer_smc draws the parameters from their prior before {site!r} is there, but the density of site "
                f"{name!r} depends on {site!r}; use smcdiff.infer."
            )
