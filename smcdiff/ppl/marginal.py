"""Marginalised NumPyro models: conjugate sites are integrated out before sampling and drawn anew after it.

For a model p(v, z, y) with sites v that are conjugate to the rest (`smcdiff.ppl.conjugacy` finds them), `marginalize`
makes the model of z alone, p(z, y) = int p(v, z, y) dv, with all constants. A chain for z mixes better than one for
(v, z), and v given z and y is drawn exactly (`smcdiff.ppl.conditionals`). A Gaussian group costs O(n^2 m + n^3) an
evaluation, where n and m are the smaller and the larger of the number of its elements and that of its children. In
single precision, priors must not be wider than some thousand standard deviations of what the data leave open.

Source: Lai, Burroni, Guan and Sheldon, "Automatically Marginalized MCMC in Probabilistic Programming", arXiv
2302.00564.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, PRNGKeyArray
from numpyro.primitives import Messenger

from smcdiff.ppl.call import model_call
from smcdiff.ppl.conditionals import conditional
from smcdiff.ppl.conjugacy import Structure, find_structure
from smcdiff.ppl.families import QuietRun, placeholder

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
        for name, ndim in self.structure.retained:
            if name in rest.sites and jnp.ndim(rest.sites[name]["value"]) != ndim:
                shape = jnp.shape(rest.sites[name]["value"])
                raise ValueError(
                    f"the value of site {name!r} must have {ndim} axes, got the shape {shape}; a marginal model can "
                    "be neither enumerated nor batched in this way, only by vmap."
                )
        for group in self.structure.groups:
            log_marginal, _ = conditional(group, rest.sites, self._runs(rest.sites, args, kwargs))
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
            drawn |= conditional(group, sites, run)[1](jax.random.fold_in(rng_key, number))
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
        self.children = {child for group in structure.groups for child in group.children}
        self.sites: dict[str, Any] = {}
        self.original: dict[str, Any] = {}

    def __enter__(self):
        super().__enter__()
        return self

    def process_message(self, msg):
        name = msg.get("name")
        if name in self.hidden:
            if msg["value"] is None:
                msg["value"] = placeholder(msg["fn"])
            msg["stop"] = True
        elif name in self.children:
            self.original[name] = msg["fn"]
            msg["fn"] = msg["fn"].mask(False)

    def postprocess_message(self, msg):
        if msg.get("name") is not None:
            self.sites[msg["name"]] = msg | {"fn": self.original.get(msg["name"], msg.get("fn"))}
