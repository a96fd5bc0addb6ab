"""Non-centred NumPyro models: the noise of a guided path in the place of a diffusion's site.

The site x ~ DiffusionPrior of a model p(theta) p(x | theta) L(x, theta) is the end of a reverse chain. Twisted SMC with
ONE particle steers that chain to the data: its path is a smooth function of standard normal noise z and of theta, ends
in x(z, theta), and has a weight w(z, theta), so that under the law

    p(theta) N(z; 0, I) w(z, theta)

theta and x(z, theta) have their joint posterior, exactly, however good the guidance. Where theta moves while z stays,
the sample changes WITH the parameters, as the data ask. Gibbs sampling of theta and x stands still where a sample tells
the parameters better than the data do, as an image of many pixels tells its blur and its noise.

All of it has a gradient, for NUTS; or blocks take turns, the parameters with any kernel and the noise with
`noise_slice`, at a handful of paths each.

Sources: Papaspiliopoulos, Roberts and Skold, "A general framework for the parametrization of hierarchical models",
Statistical Science 22 (2007), arXiv 0708.3797; Golightly and Wilkinson, "Bayesian inference for nonlinear multivariate
diffusion models observed with error", CSDA 52 (2008), and van der Meulen and Schauer, "Bayesian estimation of
discretely observed multi-dimensional diffusion processes using guided proposals", arXiv 1406.4706 (the noise of guided
paths of diffusions).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from smcdiff.checks import check_count
from smcdiff.guidance import Twist
from smcdiff.ppl.call import model_call
from smcdiff.ppl.kernel import AlgorithmKernel, as_numpyro_kernel
from smcdiff.ppl.sites import SiteLikelihood, diffusion_chain, prior_of

__all__ = ["NoncenteredModel", "noise_slice", "noncenter"]


@dataclasses.dataclass(frozen=True)
class NoncenteredModel:
    """A NumPyro model whose diffusion site follows from noise; build it with `noncenter`.

    It takes the arguments of the model. Its latent sites are those of the model, but for the diffusion's site "x",
    which becomes deterministic, and the noise "x_noise" (num_steps, *shape of x) in its place. As a density it has the
    posterior of the model; draws of it without data are not draws from the prior.

    Attributes
    ----------
    model
        The model.
    num_steps, twist, order
        See `noncenter`.
    """

    model: Callable
    num_steps: int
    twist: Twist | None
    order: int

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The model, for NumPyro's handlers and kernels, `smcdiff.infer` and `target_from_numpyro`."""
        with handlers.block():
            trace = handlers.trace(handlers.seed(_Placed(self.model), jax.random.key(0))).get_trace(
                *args, **kwargs
            )
        parameters, diffusions, others = _kinds(trace)
        if len(diffusions) != 1:
            raise ValueError(f"noncenter replaces one latent site with a DiffusionPrior, got {diffusions}.")
        (site,) = diffusions
        with _Hidden({site, *others}) as run:
            _Placed(self.model)(*args, **kwargs)
        given = {name: run.values[name] for name in parameters}
        x = trace[site]["value"]
        likelihood = SiteLikelihood(model_call(self.model, args, kwargs), given, site, tuple(given))
        path = diffusion_chain(likelihood, x, self.num_steps, self.twist, self.order).innovations
        assert path is not None  # a twisted sampler has them
        standard = dist.Normal(jnp.zeros((), x.dtype), 1.0)
        noise = numpyro.sample(f"{site}_noise", standard.expand(path.shape).to_event(len(path.shape)))
        particle, log_weight = path.drive(noise)
        numpyro.factor(f"{site}_weight", log_weight)
        numpyro.deterministic(site, particle.x)
        for name, described in likelihood.trace(particle.x).items():
            if described["type"] == "deterministic":
                numpyro.deterministic(name, described["value"])


def noncenter(
    model: Callable, *, num_steps: int = 50, twist: Twist | None = None, order: int = 1
) -> NoncenteredModel:
    """A NumPyro model with the noise of a guided path in the place of its diffusion site, for NUTS.

    Sample it by NumPyro's ``NUTS``, by `smcdiff.infer`, or by anything else through `target_from_numpyro`. An
    evaluation costs one guided path, and its gradient some four.

    Parameters
    ----------
    model
        The NumPyro model, with one latent site of a `DiffusionPrior`, which may depend on the other sites.
    num_steps
        Reverse steps, on the grid uniform in log-SNR; the sample's prior is the law of that discrete chain.
    twist
        Twist of the locally linear-Gaussian problem, see `smcdiff.guidance`; chosen as in `smcdiff.tds` if omitted.
    order
        1 for ancestral steps, whose paths are smoother functions of the noise: NUTS may take steps twice as long. 2 for
        the second-order chain, which is nearer to the diffusion at few steps.

    Raises
    ------
    ValueError
        If ``num_steps`` is not a positive integer, or ``order`` is neither 1 nor 2; by the model, if it has not exactly
        one latent site with a `DiffusionPrior`.

    Source: "A general framework for the parametrization of hierarchical models", arXiv 0708.3797.
    """
    check_count("num_steps", num_steps)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (ancestral) or 2, got {order!r}.")
    return NoncenteredModel(model, num_steps, twist, order)


def noise_slice(model: Callable) -> AlgorithmKernel:
    """NumPyro kernel for the noise of a non-centred model: BlackJAX's elliptical slice sampler.

    A block of `smcdiff.infer`, as in ``kernels={"x_noise": noise_slice}``. It has no setting and needs no gradient; a
    step takes some six paths.

    Parameters
    ----------
    model
        A model whose latent sites, in this block, have standard normal priors.

    Raises
    ------
    TypeError, ValueError
        When it starts, as `target_from_numpyro` does.

    Source: Murray, Adams and MacKay, "Elliptical slice sampling", arXiv 1001.0175.
    """
    return as_numpyro_kernel(model, _elliptical_slice)


def _elliptical_slice(target):
    def log_weight(z):
        value = target.logdensity(z) + 0.5 * jnp.sum(z**2)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)  # which the sampler would accept

    zero = jnp.zeros(target.event_shape)
    return blackjax.elliptical_slice(log_weight, mean=zero, cov=jnp.ones_like(zero))


def _kinds(trace):
    """Names of the parameters, of the diffusions, and of all sites that are seen or follow from others."""
    sample = {name: site for name, site in trace.items() if site["type"] == "sample"}
    latent = [name for name, site in sample.items() if not site["is_observed"]]
    diffusions = [name for name in latent if prior_of(trace[name]) is not None]
    parameters = [name for name in latent if name not in diffusions]
    others = [name for name, site in trace.items() if site["type"] == "deterministic" or name in sample]
    return parameters, diffusions, [name for name in others if name not in latent]


class _Placed(Messenger):
    """Zeros for a diffusion, which is not drawn."""

    def process_message(self, msg):
        """Put them in."""
        if msg["type"] == "sample" and not msg["is_observed"] and prior_of(msg) is not None:
            msg["value"] = jnp.zeros(msg["fn"].shape())


class _Hidden(Messenger):
    """Keeps sites from the handlers outside, and remembers the values of the others."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.values: dict[str, Array] = {}

    def __enter__(self):
        super().__enter__()
        return self

    def process_message(self, msg):
        """By name: the handlers outside have sites of their own, such as NumPyro's log determinants."""
        if msg.get("name") in self.names:
            msg["stop"] = True

    def postprocess_message(self, msg):
        """Remember the value."""
        if msg.get("name") is not None:
            self.values[msg["name"]] = msg["value"]
