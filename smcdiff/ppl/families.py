"""Families of distributions that are conjugate to each other, and runs of a model with values of its sites.

* Gaussian: a site is x = loc + scale e with standard normal e (`colour`), and e = (x - loc) / scale (`whitened`); a
  multivariate one has the Cholesky factor of its covariance for a scale.
* Gamma: v ~ Gamma(a, b), and a child with the log density s log h(v) - f h(v) + constant, where h(v) = c v: the
  posterior is Gamma(a + s, b + f c).
* Beta: v ~ Beta(a, b), and a child with the log density s log v + f log(1 - v) + constant: Beta(a + s, b + f).

`EDGES` holds h and (s, f) for each child. Source: Gelman et al., "Bayesian Data Analysis", chapters 2 and 3.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.primitives import Messenger

__all__ = [
    "EDGES",
    "GAUSSIAN",
    "KINDS",
    "PARAMETERS",
    "Edge",
    "QuietRun",
    "base",
    "colour",
    "gamma_or_beta",
    "label",
    "parameter",
    "placeholder",
    "value_of",
    "whitened",
]


class Edge(NamedTuple):
    """A child of a gamma or beta site v, whose log density is s log h(v) - f h(v), or s log h(v) + f log(1 - h(v)).

    Attributes
    ----------
    link
        Name of the parameter h.
    statistics
        (s, f) from the distribution and the value.
    """

    link: str
    statistics: Callable[[Any, Array], tuple[Any, Any]]


GAUSSIAN = {dist.Normal: "scale", dist.MultivariateNormal: "scale_tril"}
KINDS = dict.fromkeys(GAUSSIAN, "gaussian") | {
    dist.Gamma: "gamma",
    dist.Exponential: "gamma",
    dist.Beta: "beta",
}
PARAMETERS = {
    dist.Normal: ("loc", "scale", "precision"),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.Gamma: ("concentration", "rate"),
    dist.Exponential: ("rate",),
    dist.Poisson: ("rate",),
    dist.Beta: ("concentration1", "concentration0"),
    dist.BernoulliProbs: ("probs",),  # type: ignore[attr-defined]
    dist.BinomialProbs: ("probs", "total_count"),  # type: ignore[attr-defined]
    dist.GeometricProbs: ("probs",),  # type: ignore[attr-defined]
}
EDGES: Mapping[str, Mapping[type, Edge]] = {
    "gamma": {
        dist.Poisson: Edge("rate", lambda d, y: (y, 1.0)),
        dist.Exponential: Edge("rate", lambda d, y: (1.0, y)),
        dist.Gamma: Edge("rate", lambda d, y: (d.concentration, y)),
        dist.Normal: Edge("precision", lambda d, y: (0.5, 0.5 * (y - _like(d.loc, y)) ** 2)),
    },
    "beta": {
        dist.BernoulliProbs: Edge("probs", lambda d, y: (y, 1.0 - y)),  # type: ignore[attr-defined]
        dist.BinomialProbs: Edge("probs", lambda d, y: (y, _like(d.total_count, y) - y)),  # type: ignore[attr-defined]
        dist.GeometricProbs: Edge("probs", lambda d, y: (1.0, y)),  # type: ignore[attr-defined]
    },
}


def _like(parameter, value):
    return jnp.broadcast_to(jnp.asarray(parameter, value.dtype), value.shape)


# Distributions --------------------------------------------------------------------------------------------------------


def base(fn: Any) -> Any:
    """The distribution without the wrappers that repeat it."""
    while type(fn) in (dist.Independent, dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def label(family: type) -> str:
    """The name of a family, with its parametrisation in brackets."""
    return re.sub(r"(Probs|Logits)$", lambda match: f"({match[1].lower()})", family.__name__)


def parameter(fn: Any, name: str) -> Array:
    """A parameter of a distribution without wrappers."""
    return fn.scale**-2 if name == "precision" else getattr(fn, name)


def placeholder(fn: Any) -> Array:
    """A value for a site that is integrated out, which nothing that stays depends on."""
    return jnp.broadcast_to(fn.mean, fn.shape())


def colour(fn: Any, noise: Array) -> Array:
    """The value of a Gaussian site that standard normal ``noise`` of its shape makes."""
    normal = base(fn)
    loc = jnp.broadcast_to(normal.loc, noise.shape)
    if type(normal) is dist.Normal:
        return loc + jnp.broadcast_to(normal.scale, noise.shape) * noise
    return loc + (_triangle(normal, noise) @ noise[..., None])[..., 0]


def whitened(fn: Any, value: Array) -> Array:
    """The inverse of `colour`, for a value of the shape of the site."""
    normal = base(fn)
    gap = value - jnp.broadcast_to(normal.loc, value.shape)
    if type(normal) is dist.Normal:
        return gap / jnp.broadcast_to(normal.scale, value.shape)
    return jax.scipy.linalg.solve_triangular(_triangle(normal, gap), gap[..., None], lower=True)[..., 0]


def value_of(site: Mapping[str, Any], dtype: Any) -> Array:
    """The value of a site, which data may have given with fewer or with more axes than its distribution has."""
    value = jnp.asarray(site["value"], dtype)
    return jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, site["fn"].shape()))


def gamma_or_beta(fn: Any, shape: tuple[int, ...]) -> tuple[type, list[Array]]:
    """The family of a Gamma, Exponential or Beta site, and its two parameters for values of this shape."""
    law = base(fn)
    if type(law) is dist.Beta:
        return dist.Beta, [jnp.broadcast_to(p, shape) for p in (law.concentration1, law.concentration0)]
    first = jnp.ones_like(law.rate) if type(law) is dist.Exponential else law.concentration
    return dist.Gamma, [jnp.broadcast_to(p, shape) for p in (first, law.rate)]


def _triangle(normal, value):
    return jnp.broadcast_to(normal.scale_tril, (*value.shape, value.shape[-1]))


# Runs -----------------------------------------------------------------------------------------------------------------


class QuietRun(Messenger):
    """Runs a model out of sight of the handlers around it, and keeps its sites.

    Parameters
    ----------
    values
        Of sites, by name.
    noise
        Standard normal noise, by the names of Gaussian sites.
    absent
        Names of sites that get a `placeholder`. Other latent sites are drawn from the prior.
    """

    def __init__(
        self, values: Mapping[str, Any], noise: Mapping[str, Any] | None = None, absent: Sequence[str] = ()
    ):
        super().__init__()
        self.values, self.noise, self.absent, self.sites = values, noise or {}, absent, dict[str, Any]()

    def process_message(self, msg):
        kind, name = msg["type"], msg.get("name")
        if kind not in ("sample", "param", "deterministic", "plate", "subsample", "inspect"):
            raise TypeError(f"the model has a {kind} statement, in which sites cannot be integrated out.")
        if kind == "plate" and msg["value"] is None:
            raise ValueError(
                f"plate {name!r} subsamples, and the data of a subsample are not those of the model."
            )
        if kind == "sample" and msg["value"] is None:
            if name in self.noise:
                msg["value"] = colour(msg["fn"], self.noise[name])
            elif name not in self.values and name in self.absent:
                msg["value"] = placeholder(msg["fn"])
            elif name not in self.values:
                msg["kwargs"]["rng_key"] = jax.random.fold_in(jax.random.key(0), len(self.sites))
        if name in self.values and kind in ("sample", "param") and msg["value"] is None:
            msg["value"] = self.values[name]
        msg["stop"] = True

    def postprocess_message(self, msg):
        if msg.get("name") is not None:
            self.sites[msg["name"]] = msg

    def __call__(self, model, args, kwargs):
        with self:
            model(*args, **kwargs)
        return self.sites
