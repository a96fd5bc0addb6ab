"""What NumPyro kernels for one diffusion site have in common."""

import copy
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.mcmc import MCMCKernel

from smcdiff.ppl.call import model_call
from smcdiff.ppl.sites import SiteLikelihood, prior_of

__all__: list[str] = []


@runtime_checkable
class SiteState(Protocol):
    """State of a `SiteKernel`: the site's value by its name, and what is reported of a step."""

    z: dict[str, Array]

    def statistics(self) -> dict[str, Array]:
        """What is reported of a step."""
        ...


@runtime_checkable
class HasDerived(Protocol):
    """State of a kernel with more to return than its sites."""

    def derived(self) -> dict[str, Array]:
        """What is returned beside the sites, by name."""
        ...


class SiteKernel(MCMCKernel):
    """A kernel for one site with a `DiffusionPrior`, given all others; its state has the site's value in ``z``."""

    sample_field = "z"

    def __init__(self, model: Callable):
        self._model = model

    @property
    def model(self):
        """The NumPyro model."""
        return self._model

    @property
    def default_fields(self):
        """What `numpyro.infer.MCMC` collects."""
        return (self.sample_field,)

    def refresh(self, state, model_args, model_kwargs):
        """Nothing that the state holds depends on the other sites."""
        return state

    def wrap_model(self, wrapper: Callable):
        """The same kernel for the model ``wrapper(model)``."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        return kernel

    def get_constrain_fn(self, model_args, model_kwargs) -> Callable:
        """A diffusion's samples have no constraint."""
        return lambda z: z

    def postprocess_fn(self, model_args, model_kwargs) -> Callable:
        """Adds the deterministic sites."""

        def fn(z):
            filled = handlers.substitute(handlers.seed(self._model, jax.random.key(0)), data=z)
            sites = handlers.trace(filled).get_trace(*model_args, **(model_kwargs or {})).items()
            return {**z, **{name: site["value"] for name, site in sites if site["type"] == "deterministic"}}

        return fn

    def find_site(self, rng_key, names, args, kwargs):
        """Name of the block's site, and a draw of its prior."""
        trace = handlers.trace(handlers.seed(self._model, rng_key)).get_trace(*args, **(kwargs or {}))
        latent = [n for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]
        names = names or latent
        if len(names) != 1 or prior_of(trace[names[0]]) is None:
            raise ValueError(
                f"{type(self).__name__} moves one site with a DiffusionPrior, given all others, got the sites "
                f"{names}; give each such site a block of its own, and the others another kernel."
            )
        return names[0], trace[names[0]]["value"]

    def likelihood(self, site: str, args, kwargs) -> SiteLikelihood:
        """What the model says of the site, where the others are as ``kwargs`` has them."""
        return SiteLikelihood(model_call(self._model, args, kwargs or {}), {}, site)
