"""What a NumPyro model says of one of its sites: the likelihood, and its locally linear-Gaussian form.

With all other sites at given values, a site x ~ DiffusionPrior has the conditional density

    p(x | rest)  proportional to  p(x) L(x),        L(x) = product over the other sites of their densities,

whose L is read off the model's trace with x put in; factors without x only scale it. A site of L whose distribution is
Gaussian (Normal, or MultivariateNormal), given x, contributes the whitened residual

    r(x) = R(x)^(-1/2) (value - loc(x)),

and around a point it is linear: r(x + d) ~ r + J d by autodiff. That is the inverse problem with the operator -J, unit
noise and the residual r, which any twist of `smcdiff.guidance` can take; the other sites of L count with their value
and gradient at the denoised sample.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers

from smcdiff.density import DiffusionModel
from smcdiff.diffusion import Marginal
from smcdiff.guidance import Twist, TwistValue, default_twist, log_twist
from smcdiff.inverse import InverseProblem, LinearOperator
from smcdiff.ppl.call import ModelCall
from smcdiff.ppl.dependence import depends_on_input
from smcdiff.ppl.diffusion_prior import DiffusionPrior
from smcdiff.ppl.families import GAUSSIAN, base, whitened
from smcdiff.schedules import log_snr_times
from smcdiff.smc import FeynmanKac, tds

__all__ = [
    "SiteLikelihood",
    "diffusion_chain",
    "diffusion_of",
    "local_twist",
    "prior_of",
    "without_prior_density",
]


class SiteLikelihood(eqx.Module):
    """The likelihood of one latent site of a NumPyro model, given all the others.

    Attributes
    ----------
    call
        The model and its arguments.
    given
        Values of all other latent sites, by name.
    site
        Name of the site x.
    left_out
        Names of sites whose densities do not count: priors of given sites, where those are counted elsewhere.
    """

    call: ModelCall
    given: dict[str, Array]
    site: str = eqx.field(static=True)
    left_out: tuple[str, ...] = eqx.field(default=(), static=True)

    def trace(self, x: Float[Array, "*event"]) -> dict[str, Any]:
        """NumPyro's trace of the model at ``x``, of which handlers outside learn nothing."""
        model, args, kwargs = self.call.unpack()
        filled = handlers.substitute(handlers.condition(model, data=self.given), data={self.site: x})
        with handlers.block():
            return handlers.trace(handlers.seed(filled, jax.random.key(0))).get_trace(*args, **kwargs)

    def log_likelihood(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """log L(x), with the factors that do not depend on x and all constants."""
        return sum((_log_prob(site) for site in self._others(x).values()), jnp.zeros((), x.dtype))

    def log_rest(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """What depends on x in log L(x) and is not Gaussian."""
        _, rest = self.kinds(x)
        sites = self._others(x)
        return sum((_log_prob(sites[name]) for name in rest), jnp.zeros((), x.dtype))

    def residual(self, x: Float[Array, "*event"]) -> Float[Array, " m"]:
        """The whitened residuals r(x) of all Gaussian sites that depend on x."""
        gaussian, _ = self.kinds(x)
        sites = self._others(x)
        parts = [jnp.ravel(_whitened(sites[name])) for name in gaussian]
        return jnp.concatenate(parts or [jnp.zeros((0,), x.dtype)])

    def linearize(self, x: Float[Array, "*event"]) -> InverseProblem:
        """The inverse problem that the Gaussian sites are near ``x``: residual r(x), operator -J, unit noise."""
        residual, push = jax.linearize(self.residual, x)
        operator = _Jacobian(x.shape, residual.shape, push)
        return InverseProblem(operator, residual + operator(x), jnp.ones((), x.dtype))

    def kinds(self, x: Float[Array, "*event"]) -> tuple[list[str], list[str]]:
        """Names of the Gaussian and of the other sites among those that depend on x."""
        gaussian: list[str] = []

        def densities(x):
            sites = self._others(x)
            gaussian[:] = [name for name, site in sites.items() if _whitened(site) is not None]
            return {name: _log_prob(site) for name, site in sites.items()}

        depends = [name for name, does in depends_on_input(densities, x).items() if does]
        return [name for name in depends if name in gaussian], [
            name for name in depends if name not in gaussian
        ]

    def _others(self, x):
        """The sites of the trace whose densities make up L."""
        return {
            name: site
            for name, site in self.trace(x).items()
            if site["type"] == "sample" and name not in (self.site, *self.left_out) and prior_of(site) is None
        }


class _Jacobian(LinearOperator):
    push: Callable  # of the residual, whose sign is the other one

    def _apply(self, x):
        return -self.push(x)


class _LocalTwist(eqx.Module):
    twist: Twist | None

    def __call__(self, model, problem, x, t):
        denoised = model.denoise(x, t)
        terms = [TwistValue(denoised, jnp.zeros_like(x), jnp.zeros((), x.dtype))]
        gaussian, rest = problem.kinds(denoised)
        if rest:
            terms.append(log_twist(_log_rest)(model, problem, x, t))
        if gaussian:
            linear = problem.linearize(denoised)
            twist = default_twist(_one(model), linear) if self.twist is None else self.twist
            terms.append(twist(model, linear, x, t))
        first, *more = terms
        shift = sum((term.shift for term in more), first.shift)
        return TwistValue(denoised, shift, sum((term.log_twist for term in more), first.log_twist))


def _log_rest(problem, denoised, t):
    return problem.log_rest(denoised)


def local_twist(twist: Twist | None = None) -> Twist:
    """Twist for a `SiteLikelihood`: that of the linear problem at the denoised sample, times what is not Gaussian.

    Parameters
    ----------
    twist
        The twist of the linear problem; `smcdiff.guidance.default_twist` chooses one if omitted.
    """
    return _LocalTwist(twist)


def diffusion_chain(
    problem: SiteLikelihood, x: Float[Array, "*shape"], num_steps: int, twist: Twist | None, order: int
) -> FeynmanKac:
    """The twisted sampler of the site of a `SiteLikelihood`, whose shape is that of ``x``; see `smcdiff.tds`."""
    diffusion = diffusion_of(problem, x)
    times = log_snr_times(diffusion.schedule, num_steps)
    return tds(diffusion, problem, times=times, twist=local_twist(twist), order=order)


def diffusion_of(problem: SiteLikelihood, x: Float[Array, "*shape"]) -> DiffusionModel:
    """The diffusion of the site of a `SiteLikelihood`; under plates, of all its copies together."""
    described = problem.trace(x)[problem.site]
    prior = prior_of(described)
    assert prior is not None  # the kernels' `init` has seen to that
    diffusion = prior.model
    for size in reversed(described["fn"].batch_shape):
        diffusion = _Stack(diffusion, size)
    return diffusion


class _Stack(eqx.Module):
    """Independent copies of a diffusion side by side, as a plate has them: one diffusion of their joint law."""

    model: DiffusionModel
    size: int = eqx.field(static=True)

    @property
    def schedule(self):
        return self.model.schedule

    @property
    def event_shape(self):
        return (self.size, *self.model.event_shape)

    def denoise(self, x, t):
        return jax.vmap(lambda x: self.model.denoise(x, t))(x)

    def score(self, x, t):
        return jax.vmap(lambda x: self.model.score(x, t))(x)

    def at(self, t):
        return Marginal(self, t)


def _one(model):
    """The diffusion of which a stack is made."""
    while isinstance(model, _Stack):
        model = model.model
    return model


def prior_of(site: dict[str, Any]) -> DiffusionPrior | None:
    """The `DiffusionPrior` that a site of a trace has, also under plates; None for other sites."""
    fn = site["fn"]
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent | _Flat):
        fn = fn.base_dist
    return fn if isinstance(fn, DiffusionPrior) else None


class without_prior_density(numpyro.primitives.Messenger):
    """Handler under which the density of every `DiffusionPrior` site counts as 1: given x, it is a constant.

    A block of other sites may be sampled by kernels that call ``log_prob`` of all sites, when only scores of x are
    known.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the distribution of a site."""
        if msg["type"] == "sample" and prior_of(msg) is not None:
            msg["fn"] = _Flat(msg["fn"])


class _Flat(dist.Distribution):
    """The support and the draws of a distribution, and no density."""

    pytree_data_fields = ("base_dist",)

    def __init__(self, base_dist):
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape)

    @property
    def support(self):
        return self.base_dist.support

    def sample(self, key, sample_shape=()):
        return self.base_dist.sample(key, sample_shape)

    def log_prob(self, value, intermediates=None):
        return jnp.zeros(value.shape[: value.ndim - len(self.event_shape)], value.dtype)


def _log_prob(site):
    """Log density of a site of a trace, as NumPyro counts it."""
    scale = site["scale"]
    return jnp.sum(site["fn"].log_prob(site["value"])) * (1.0 if scale is None else scale)


def _whitened(site):
    """(value - loc) in deviations, if the site is Gaussian, else None."""
    if type(base(site["fn"])) not in GAUSSIAN:
        return None
    residual, scale = whitened(site["fn"], site["value"]), site["scale"]
    return residual if scale is None else residual * jnp.sqrt(scale)
