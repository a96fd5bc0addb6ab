"""NumPyro models as targets: one density on R^d.

A model with latent sites z, observed sites y and arguments a has the joint density p(z, y | a). Every z_k is the image
T_k(x_k) of an unconstrained x_k, where T_k is NumPyro's transform onto the support of the site; the target is

    log pi~(x) = log p(T(x), y | a) + sum_k log |det dT_k / dx_k|,

with all constants, so that its integral over R^d is the evidence p(y | a). It is the negative of the potential energy
that NumPyro's HMC uses. The x_k are raveled and joined in the order of the sites in the model. Where a support depends
on earlier sites, so does its transform.

Source: Phan, Pradhan and Jankowiak, "Composable Effects for Flexible and Accelerated Probabilistic Programming in
NumPyro", arXiv 1912.11554.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.infer.util
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import biject_to

from smcdiff.ppl.call import ModelCall, model_call

__all__ = ["NumPyroTarget", "target_from_numpyro"]


class NumPyroTarget(eqx.Module):
    """The density of a NumPyro model; build it with `target_from_numpyro`.

    It is a `HasScore`, a `HasLogDensity` and a `HasLogRatio`. A sample is one vector (d,); batching is vmap.

    Attributes
    ----------
    call
        The model and its arguments, whose arrays are leaves.
    sites
        Names of the latent sites and the shapes of their unconstrained values, in the order of the model.
    """

    call: ModelCall
    sites: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the latent sites, in the order of their slices."""
        return tuple(name for name, _ in self.sites)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape (d,) of one sample."""
        return (sum(math.prod(shape) for _, shape in self.sites),)

    @property
    def slices(self) -> dict[str, slice]:
        """Where in a sample the unconstrained value of a site is."""
        found, start = {}, 0
        for name, shape in self.sites:
            found[name] = slice(start, start + math.prod(shape))
            start = found[name].stop
        return found

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log joint density with the log Jacobian at one sample ``x``; its integral is the evidence."""
        energy = numpyro.infer.util.potential_energy(*self.call.unpack(), self.split(x))
        return -jnp.asarray(energy, x.dtype)

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """Gradient of the log density at one sample ``x``."""
        return jax.grad(self.logdensity)(x)

    def logdensity_and_score(self, x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
        """Both, from one evaluation."""
        return jax.value_and_grad(self.logdensity)(x)

    def log_ratio(self, x_from: Float[Array, " d"], x_to: Float[Array, " d"]) -> Float[Array, ""]:
        """log pi(x_to) - log pi(x_from) for two samples."""
        return self.logdensity(x_to) - self.logdensity(x_from)

    def log_likelihood(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log density of the observed sites given the latent ones at one sample ``x``."""
        model, args, kwargs = self.call.unpack()
        log_probs, trace = numpyro.infer.util.compute_log_probs(model, args, kwargs, self.constrain(x))
        observed = [
            jnp.asarray(value, x.dtype) for name, value in log_probs.items() if trace[name]["is_observed"]
        ]
        return sum(observed, jnp.zeros((), x.dtype))

    def log_prior(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log density of the latent sites with the log Jacobian: with `log_likelihood`, the two ends of a tempering."""
        return self.logdensity(x) - self.log_likelihood(x)

    def sample_prior(self, rng_key: PRNGKeyArray) -> Float[Array, " d"]:
        """One draw of the latent sites from their prior, unconstrained."""
        model, args, kwargs = self.call.unpack()
        trace = numpyro.handlers.trace(numpyro.handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
        return self.join(
            {name: biject_to(trace[name]["fn"].support).inv(trace[name]["value"]) for name in self.site_names}
        )

    def constrain(self, x: Float[Array, " d"]) -> dict[str, Array]:
        """Values of the latent and of the deterministic sites at one sample ``x``."""
        return numpyro.infer.util.constrain_fn(*self.call.unpack(), self.split(x), return_deterministic=True)

    def unconstrain(self, values: Mapping[str, Any]) -> Float[Array, " d"]:
        """The sample at which the latent sites have these values.

        Parameters
        ----------
        values
            By the names of the sites; deterministic sites may be among them.

        Raises
        ------
        ValueError
            If a latent site is missing, or its value has another shape than in the model.
        """
        missing = [name for name in self.site_names if name not in values]
        if missing:
            raise ValueError(f"values lacks the latent sites {missing}, got {sorted(values)}.")
        latent = {name: jnp.asarray(values[name]) for name in self.site_names}
        shapes = jax.eval_shape(self.constrain, jnp.zeros(self.event_shape))
        for name, value in latent.items():
            if value.shape != shapes[name].shape:
                raise ValueError(f"site {name!r} has shape {shapes[name].shape}, got {value.shape}.")
        found = numpyro.infer.util.unconstrain_fn(*self.call.unpack(), latent)
        return self.join(found)

    def transforms(self) -> dict[str, Any]:
        """NumPyro's transforms of the latent sites, from their unconstrained values; where none depends on a site."""
        model, args, kwargs = self.call.unpack()
        trace = _prototype(model, args, kwargs)
        return {name: biject_to(trace[name]["fn"].support) for name in self.site_names}

    def to_sites(self, samples: Float[Array, "*batch d"]) -> dict[str, Array]:
        """`constrain` for the samples of a trace, whose axes go in front of those of the sites."""
        samples = jnp.asarray(samples)
        if samples.shape[-1:] != self.event_shape:
            raise ValueError(f"samples must end with the axis {self.event_shape}, got {samples.shape}.")
        found = _constrain_all(self, samples.reshape(-1, *self.event_shape))
        return {name: v.reshape(*samples.shape[:-1], *v.shape[1:]) for name, v in found.items()}

    def initial_position(self, rng_key: PRNGKeyArray) -> Float[Array, " d"]:
        """A start as NumPyro's: uniform in (-2, 2)^d, drawn again where the density or its score is not finite.

        Raises
        ------
        ValueError
            If a hundred draws fail; in compiled or batched code the position is NaN instead.
        """
        x, is_valid = _start(self, rng_key)
        if not isinstance(is_valid, jax.core.Tracer) and not is_valid:
            raise ValueError(
                "the model has no finite log density and score at any of 100 points that are uniform in (-2, 2) on "
                "the unconstrained scale; start elsewhere, for instance from target.unconstrain(values)."
            )
        return jnp.where(is_valid, x, jnp.nan)

    def split(self, x: Float[Array, " d"]) -> dict[str, Array]:
        """Unconstrained values of the latent sites at one sample ``x``; `join` is its inverse."""
        if jnp.shape(x) != self.event_shape:
            raise ValueError(
                f"a sample of this model is one vector of shape {self.event_shape}, got {jnp.shape(x)}; "
                "batches go through jax.vmap or to_sites."
            )
        slices = self.slices
        return {name: x[slices[name]].reshape(shape) for name, shape in self.sites}

    def join(self, values: Mapping[str, Array]) -> Float[Array, " d"]:
        """The sample with these unconstrained values of the latent sites."""
        return jnp.concatenate([jnp.ravel(values[name]) for name in self.site_names])


def target_from_numpyro(model: Callable, *args: Any, **kwargs: Any) -> NumPyroTarget:
    """A NumPyro model as a target, for every sampler that takes a log density or a score.

    Parameters
    ----------
    model
        The model, a module-level function or one wrapped in NumPyro's handlers (``reparam``, ``condition``, ...). What
        it closes over is part of the compiled program: pass data as arguments.
    *args, **kwargs
        Its arguments. Arrays are leaves, so that other arrays of the same shapes compile nothing anew; numbers,
        strings and functions are fixed, and may say how the model looks.

    Returns
    -------
    NumPyroTarget

    Raises
    ------
    TypeError
        If a latent site is discrete or a point mass, if the model has a ``param`` site, which has no prior, or if an
        argument is neither array nor hashable.
    ValueError
        If the model has no latent site; from NumPyro if a plate subsamples.

    Source: "Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro", arXiv 1912.11554.
    """
    call = model_call(model, args, kwargs)
    names: list[str] = []

    def unconstrained():
        values = _latent_values(model, args, kwargs)
        names.extend(values)
        return list(values.values())

    shapes = [value.shape for value in jax.eval_shape(unconstrained)]
    if not names:
        raise ValueError("the model has no latent site: every sample site is observed.")
    target = NumPyroTarget(call, tuple(zip(names, shapes, strict=True)))
    jax.eval_shape(target.logdensity, jnp.zeros(target.event_shape))  # what the model cannot do, it says here
    return target


def _prototype(model, args, kwargs):
    """A trace at some point of the supports."""
    seeded = numpyro.handlers.substitute(
        numpyro.handlers.seed(model, jax.random.key(0)), substitute_fn=numpyro.infer.init_to_uniform()
    )
    return numpyro.handlers.trace(seeded).get_trace(*args, **kwargs)


def _latent_values(model, args, kwargs):
    """Unconstrained values of the latent sites, in their order; refuses sites that are no part of a density on R^d."""
    values = {}
    for name, site in _prototype(model, args, kwargs).items():
        if site["type"] == "param":
            raise TypeError(
                f"site {name!r} of the model is a param, which has no prior; make it a sample site or an argument."
            )
        if site["type"] != "sample" or site["is_observed"]:
            continue
        kind = type(site["fn"]).__name__
        if site["fn"].support.is_discrete:
            raise TypeError(
                f"site {name!r} of the model is latent and discrete ({kind}), and a target is a density on R^d; sum "
                "it out of the model, for instance with a mixture distribution, or observe it."
            )
        if isinstance(site["fn"], numpyro.distributions.Delta):
            raise TypeError(
                f"site {name!r} of the model is latent and a point mass (Delta); make it a deterministic site."
            )
        values[name] = biject_to(site["fn"].support).inv(site["value"])
    return values


@jax.jit
def _constrain_all(target, samples):
    return jax.vmap(target.constrain)(samples)


@jax.jit
def _start(target, rng_key):
    """A valid start, and whether it is one."""
    model, args, kwargs = target.call.unpack()
    (values, _, _), is_valid = numpyro.infer.util.find_valid_initial_params(
        rng_key,
        model,
        model_args=args,
        model_kwargs=kwargs,
        prototype_params={name: jnp.zeros(shape) for name, shape in target.sites},
    )
    return target.join(values), is_valid
