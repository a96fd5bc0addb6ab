"""Marginalised NumPyro models: conjugate sites are integrated out before sampling and drawn anew after it.

For a model p(v, z, y) with sites v that are conjugate to the rest (`smcdiff.ppl.conjugacy` finds them), `marginalize`
makes the model of z alone, p(z, y) = int p(v, z, y) dv, with all constants; the chain for z mixes better than that for
(v, z), and v given z and y is drawn exactly. The children c of v, observed or not, are where v enters. For any v*,

    log p(c | z) = log p(c | v*, z) + log p(v* | z) - log p(v* | c, z),

and v* is the mean of the conditional law. For Gaussian sites v is a function of standard normal noise e, the parents
first, and the whitened residuals of the children are r + J e. The law of e is Gaussian with mean -K r, where
K = (I + J' J)^-1 J' = J' (I + J J')^-1, of which the smaller inverse is taken; its draws are e - K (r + J e + w) for
standard normal e and w. A step costs O(n^2 m + n^3) for m numbers in one group and its children, and n of the smaller
of the two. In single precision priors must not be wider than some thousand standard deviations of what the data say.

Sources: Lai, Burroni, Guan and Sheldon, "Automatically Marginalized MCMC in Probabilistic Programming", arXiv
2302.00564; the identity is that of Chib, "Marginal Likelihood from the Gibbs Output" (1995).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray
from numpyro.primitives import Messenger

from smcdiff.ppl.call import model_call
from smcdiff.ppl.conjugacy import Structure, find_structure
from smcdiff.ppl.families import EDGES, QuietRun, base, parameter, placeholder, whitened

__all__ = ["MarginalModel", "marginalize"]


@dataclasses.dataclass(frozen=True)
class MarginalModel:
    """A NumPyro model without its conjugate sites; build it with `marginalize`.

    It takes the arguments of the model and returns nothing. As a density it is the model with these sites integrated
    out; latent sites that are children of those keep their place and their prior moves to the factor, so that draws of
    this model without data are not draws from the prior.

    Attributes
    ----------
    model
        The model.
    structure
        What is integrated out.
    """

    model: Callable
    structure: Structure

    @property
    def marginalized(self) -> dict[str, str]:
        """Names of the sites that are integrated out, and their kinds: "gaussian", "gamma" or "beta"."""
        kinds = {name: group.kind for group in self.structure.groups for name in group.sites}
        return {name: kinds[name] for name, _ in self.structure.signature if name in kinds}

    @property
    def reasons(self) -> dict[str, str]:
        """Names of the latent sites that stay, and why."""
        return dict(self.structure.reasons)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The model of the sites that stay, for NumPyro's handlers and kernels and for `target_from_numpyro`."""
        with _Rest(self.structure) as rest:
            self.model(*args, **kwargs)
        for group in self.structure.groups:
            log_marginal, _ = _conditional(group, rest.sites, self._runs(rest.sites, args, kwargs))
            numpyro.factor("_".join(["marginal", *group.sites]), log_marginal)

    def recover(
        self, rng_key: PRNGKeyArray, samples: Mapping[str, Any], /, *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """Draw the sites that were integrated out, given draws of the others.

        Parameters
        ----------
        rng_key
            Key.
        samples
            Values of the latent sites that stay, by name, with the same leading axes, any number of them: what
            ``mcmc.get_samples()`` returns. Other sites are ignored.
        *args, **kwargs
            The arguments of the model.

        Returns
        -------
        The sites that were integrated out, independently drawn for each draw, and the deterministic sites, with the
        leading axes of the samples.

        Raises
        ------
        ValueError
            If a site is missing, or the leading axes differ.
        """
        missing = [name for name, _ in self.structure.retained if name not in samples]
        if missing:
            raise ValueError(f"samples lacks the latent sites {missing}, got {sorted(samples)}.")
        values = {name: jnp.asarray(samples[name]) for name, _ in self.structure.retained}
        leading = {
            name: values[name].shape[: values[name].ndim - ndim] for name, ndim in self.structure.retained
        }
        if len(set(leading.values())) > 1:
            raise ValueError(f"all samples need the same leading axes, got {leading}.")
        batch = next(iter(leading.values()), ())
        flat = {name: value.reshape(-1, *value.shape[len(batch) :]) for name, value in values.items()}
        keys = jax.random.split(rng_key, next((len(value) for value in flat.values()), 1))
        found = _recover_all(model_call(self, args, kwargs), keys, flat)
        return {name: value.reshape(*batch, *value.shape[1:]) for name, value in found.items()}

    def _recover(self, rng_key, values, args, kwargs):
        """One draw of all sites that are integrated out, and the deterministic ones."""
        sites = QuietRun(values, absent=tuple(self.marginalized))(self.model, args, kwargs)
        run = self._runs(sites, args, kwargs)
        drawn: dict[str, Array] = {}
        for number, group in enumerate(self.structure.groups):
            drawn |= _conditional(group, sites, run)[1](jax.random.fold_in(rng_key, number))
        found = run(values=drawn)
        keep = {name for name, site in found.items() if site["type"] == "deterministic"} | set(drawn)
        return {name: jnp.asarray(site["value"]) for name, site in found.items() if name in keep}

    def _runs(self, sites, args, kwargs):
        """The sites of the model as a function of values, or noise, of the sites that are integrated out."""
        latent = [name for name, is_observed in self.structure.signature if not is_observed]
        latent += [name for name, site in sites.items() if site["type"] == "param"]
        known = {name: sites[name]["value"] for name in latent if name in sites}

        def run(values=None, noise=None):
            found = QuietRun(known | (values or {}), noise)(self.model, args, kwargs)
            signature = tuple(
                (n, site["is_observed"]) for n, site in found.items() if site["type"] == "sample"
            )
            if signature != self.structure.signature:
                raise ValueError(
                    "with these arguments the model has other sites than when it was marginalised, "
                    f"{dict(signature)} instead of {dict(self.structure.signature)} (True if observed); marginalise "
                    "it anew."
                )
            return found

        run()
        return run


def marginalize(
    model: Callable, /, *args: Any, sites: Sequence[str] | None = None, **kwargs: Any
) -> MarginalModel:
    """A NumPyro model with its conjugate sites integrated out, as a NumPyro model.

    Parameters
    ----------
    model
        The model, as in `smcdiff.target_from_numpyro`.
    *args, **kwargs
        Its arguments. Which sites are conjugate may depend on their shapes and on those that are no arrays, never on
        the numbers in the arrays: the result serves other data of the same shapes.
    sites
        Names of the sites to integrate out; by default all that can be.

    Returns
    -------
    MarginalModel
        ``marginalized`` and ``reasons`` say what was integrated out and why the rest was not; ``recover`` draws it.

    Raises
    ------
    TypeError
        If the model has statements in which sites cannot be integrated out, such as NumPyro's ``scan``, or an argument
        that is neither array nor hashable.
    ValueError
        If one of ``sites`` cannot be integrated out, or if no site can be; the message says why. If a plate subsamples.

    Source: "Automatically Marginalized MCMC in Probabilistic Programming", arXiv 2302.00564.
    """
    names = (sites,) if isinstance(sites, str) else sites
    return MarginalModel(model, find_structure(model_call(model, args, kwargs), names))


@jax.jit
def _recover_all(call, keys, values):
    marginal, args, kwargs = call.unpack()
    return jax.vmap(lambda key, value: marginal._recover(key, value, args, kwargs))(keys, values)


class _Rest(Messenger):
    """Takes out of a model what is integrated out, and keeps its sites."""

    def __init__(self, structure):
        super().__init__()
        self.hidden = structure.hidden
        self.marginalized = {name for group in structure.groups for name in group.sites}
        self.children = {child for group in structure.groups for child in group.children}
        self.sites: dict[str, Any] = {}
        self.original: dict[str, Any] = {}

    def __enter__(self):
        super().__enter__()
        return self

    def process_message(self, msg):
        name = msg.get("name")
        if name in self.hidden:
            if name in self.marginalized and msg["value"] is None:
                msg["value"] = placeholder(msg["fn"])
            msg["stop"] = True
        elif name in self.children:
            self.original[name] = msg["fn"]
            msg["fn"] = msg["fn"].mask(False)

    def postprocess_message(self, msg):
        if msg.get("name") is not None:
            self.sites[msg["name"]] = msg | {"fn": self.original.get(msg["name"], msg.get("fn"))}


# Conditional laws -----------------------------------------------------------------------------------------------------


def _conditional(group, sites, run):
    """Log marginal likelihood of the children of a group, and a function that draws its sites.

    ``sites`` are those of a run of the model, of which shapes and what does not depend on the group are used.
    """
    return _gaussian(group, sites, run) if group.kind == "gaussian" else _gamma_or_beta(group, sites, run)


def _log_prob(sites, names):
    return sum((jnp.sum(sites[name]["fn"].log_prob(sites[name]["value"])) for name in names), jnp.zeros(()))


def _gaussian(group, sites, run):
    zero, unravel = ravel_pytree({name: jnp.zeros_like(sites[name]["value"]) for name in group.sites})

    def residuals(noise):
        found = run(noise=unravel(noise))
        parts = [jnp.ravel(whitened(found[name]["fn"], found[name]["value"])) for name in group.children]
        return jnp.concatenate([jnp.zeros(0, zero.dtype), *parts])

    num_residuals = sum(jnp.size(sites[name]["value"]) for name in group.children)
    if num_residuals < zero.size:
        at_zero, pull = jax.vjp(residuals, zero)
        jacobian = jax.vmap(pull)(jnp.eye(num_residuals, dtype=zero.dtype))[0]
        small = jacobian @ jacobian.T
    else:
        at_zero, push = jax.linearize(residuals, zero)
        jacobian = jax.vmap(push, out_axes=1)(jnp.eye(zero.size, dtype=zero.dtype))
        small = jacobian.T @ jacobian
    factor = jnp.linalg.cholesky(small + jnp.eye(len(small), dtype=zero.dtype))

    def gain(residual):
        if num_residuals < zero.size:
            return jacobian.T @ jax.scipy.linalg.cho_solve((factor, True), residual)
        return jax.scipy.linalg.cho_solve((factor, True), jacobian.T @ residual)

    mean = -gain(at_zero)
    found = run(noise=unravel(mean))
    log_determinant = jnp.sum(jnp.log(jnp.diagonal(factor)))
    log_marginal = _log_prob(found, group.children) - 0.5 * jnp.sum(mean**2) - log_determinant

    def draw(rng_key):
        key_noise, key_residual = jax.random.split(rng_key)
        noise = jax.random.normal(key_noise, zero.shape, zero.dtype)
        other = jax.random.normal(key_residual, at_zero.shape, zero.dtype)
        drawn = run(noise=unravel(noise - gain(at_zero + jacobian @ noise + other)))
        return {name: drawn[name]["value"] for name in group.sites}

    return log_marginal, draw


def _gamma_or_beta(group, sites, run):
    (name,) = group.sites
    fn, value = sites[name]["fn"], sites[name]["value"]
    edges = {child: EDGES[group.kind][type(base(sites[child]["fn"]))] for child in group.children}

    def links(value):
        found = run(values={name: value})
        return {
            child: jnp.broadcast_to(
                parameter(base(found[child]["fn"]), edge.link), jnp.shape(found[child]["value"])
            )
            for child, edge in edges.items()
        }

    at_one, pull = jax.vjp(links, jnp.ones_like(value))
    first, second = {}, {}
    for child, edge in edges.items():
        link = at_one[child]
        parts = edge.statistics(base(sites[child]["fn"]), jnp.asarray(sites[child]["value"], link.dtype))
        s, f = (jnp.broadcast_to(jnp.asarray(part, link.dtype), link.shape) for part in parts)
        first[child] = jnp.where(link == 0, 0, s) / jnp.where(link == 0, 1, link)
        second[child] = f
    family = dist.Gamma if group.kind == "gamma" else dist.Beta
    prior = [jnp.broadcast_to(p, value.shape) for p in _parameters(base(fn), group.kind)]
    law = family(*(p + pull(parts)[0] for p, parts in zip(prior, (first, second), strict=True)))
    log_ratio = family(*prior).log_prob(law.mean) - law.log_prob(law.mean)
    log_marginal = _log_prob(run(values={name: law.mean}), group.children) + jnp.sum(log_ratio)
    return log_marginal, lambda rng_key: {name: law.sample(rng_key)}


def _parameters(fn, kind):
    if kind == "beta":
        return fn.concentration1, fn.concentration0
    return (fn.concentration if type(fn) is dist.Gamma else jnp.ones_like(fn.rate)), fn.rate
