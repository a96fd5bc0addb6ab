"""Learned proposals: a flow q(theta | y), trained on draws of a NumPyro model's prior predictive.

The pairs (theta, y) of the joint density are as many as one cares to simulate, and the maximum of E log q(theta | y)
over them is the posterior, for all y at once. What the flow misses, Metropolis corrects: its draws are proposals of
`smcdiff.mcmc.independence`, whose chain has the exact posterior. Theta are the latent sites on the unconstrained scale.

Source: Papamakarios and Murray, "Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density
Estimation", arXiv 1605.06376.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import biject_to

from smcdiff.checks import check_count, check_positive
from smcdiff.nets.flow import ConditionalFlow

__all__ = ["LearnedProposal", "ProposalGivenData", "learn_proposal"]


class LearnedProposal(eqx.Module):
    """A proposal for the latent sites of a model, for any data of a shape; make it by `learn_proposal`.

    Attributes
    ----------
    flow
        q(theta | y), of standardised vectors.
    theta_mean, theta_std, data_mean, data_std
        Their means and deviations under the prior.
    sites
        Names of the latent sites, in the order in which theta joins them: that of `smcdiff.target_from_numpyro`.
    data_names
        Names of the observed sites, in the order in which y joins them.
    losses
        Mean negative log density of every training step, in nats.
    """

    flow: ConditionalFlow
    theta_mean: Float[Array, " d"]
    theta_std: Float[Array, " d"]
    data_mean: Float[Array, " m"]
    data_std: Float[Array, " m"]
    losses: Float[Array, " steps"]
    sites: tuple[str, ...] = eqx.field(static=True)
    data_names: tuple[str, ...] = eqx.field(static=True)

    def given(self, data: Mapping[str, Array]) -> "ProposalGivenData":
        """The proposal for these values of the observed sites.

        Raises
        ------
        ValueError
            If a site is missing, or all of them together have another size than in training.
        """
        missing = [name for name in self.data_names if name not in data]
        if missing:
            raise ValueError(f"data lacks the observed sites {missing}, got {sorted(data)}.")
        y = jnp.concatenate(
            [jnp.ravel(jnp.asarray(data[name], self.data_mean.dtype)) for name in self.data_names]
        )
        if y.shape != self.data_mean.shape:
            raise ValueError(
                f"data must have {self.data_mean.size} numbers in all, as in training, got {y.size}."
            )
        return ProposalGivenData(self, (y - self.data_mean) / self.data_std)


class ProposalGivenData(eqx.Module):
    """The law of a `LearnedProposal` for one data set: a proposal of `smcdiff.mcmc.independence`.

    Attributes
    ----------
    learned
        The proposal.
    context
        The standardised data.
    """

    learned: LearnedProposal
    context: Float[Array, " m"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, " d"]:
        """One draw of theta."""
        return self.learned.theta_mean + self.learned.theta_std * self.learned.flow.sample(key, self.context)

    def log_prob(self, value: Float[Array, " d"]) -> Float[Array, ""]:
        """Its log density."""
        standard = (value - self.learned.theta_mean) / self.learned.theta_std
        return self.learned.flow.log_prob(standard, self.context) - jnp.sum(jnp.log(self.learned.theta_std))


def learn_proposal(
    rng_key: PRNGKeyArray,
    model: Callable,
    *args: Any,
    data: str | Sequence[str],
    num_simulations: int = 20_000,
    num_steps: int = 3000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    layers: int = 6,
    width: int = 64,
    **kwargs: Any,
) -> LearnedProposal:
    """Train a proposal for the latent sites of a model, for all data that it may predict.

    Parameters
    ----------
    rng_key
        Key.
    model
        The NumPyro model, called without data: its sites ``data`` are drawn.
    *args, **kwargs
        Its arguments.
    data
        Names of the sites that will be observed.
    num_simulations
        Draws of the prior predictive.
    num_steps, batch_size, learning_rate
        Of Adam, whose rate falls to 0 along a cosine.
    layers, width
        Of the flow, see `smcdiff.nets.ConditionalFlow`.

    Returns
    -------
    LearnedProposal

    Raises
    ------
    TypeError
        If another latent site is discrete.
    ValueError
        If ``data`` names no site that the call draws, or nothing else is latent; if a count or a rate is not positive.

    Source: "Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation",
    arXiv 1605.06376.
    """
    for name, count in (
        ("num_simulations", num_simulations),
        ("num_steps", num_steps),
        ("batch_size", batch_size),
    ):
        check_count(name, count)
    check_positive("learning_rate", learning_rate)
    names = (data,) if isinstance(data, str) else tuple(data)
    key_simulate, key_flow, key_train = jax.random.split(rng_key, 3)
    sites = _latent(model, args, kwargs, names)

    def simulate(key):
        trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
        theta = [biject_to(trace[name]["fn"].support).inv(trace[name]["value"]) for name in sites]
        y = [jnp.asarray(trace[name]["value"], theta[0].dtype) for name in names]
        return tuple(jnp.concatenate([jnp.ravel(part) for part in parts]) for parts in (theta, y))

    theta, y = jax.jit(jax.vmap(simulate))(jax.random.split(key_simulate, num_simulations))
    moments = [(jnp.mean(v, 0), jnp.maximum(jnp.std(v, 0), 1e-6)) for v in (theta, y)]
    pairs = tuple((v - mean[None]) / std[None] for v, (mean, std) in zip((theta, y), moments, strict=True))
    flow = ConditionalFlow(key_flow, theta.shape[1], y.shape[1], layers=layers, width=width)
    flow, losses = _train(key_train, flow, pairs, num_steps, batch_size, learning_rate)
    return LearnedProposal(flow, *moments[0], *moments[1], losses, sites, names)


def _latent(model, args, kwargs, names):
    """Names of the latent sites, without those that will be data."""
    trace = handlers.trace(handlers.seed(model, jax.random.key(0))).get_trace(*args, **kwargs)
    drawn = [n for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]
    unknown = [name for name in names if name not in drawn]
    sites = tuple(name for name in drawn if name not in names)
    if unknown or not sites:
        raise ValueError(
            f"data must name sites that the model draws, and leave others; got {list(names)} of {drawn}. Call "
            "the model without data."
        )
    for name in sites:
        if trace[name]["fn"].support.is_discrete:
            raise TypeError(
                f"site {name!r} of the model is latent and discrete, and a flow has a density on R^d."
            )
    return sites


@eqx.filter_jit
def _train(rng_key, flow, pairs, num_steps, batch_size, learning_rate):
    """Adam on the mean negative log density."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    count = pairs[0].shape[0]

    def loss(params, batch):
        return -jnp.mean(jax.vmap(eqx.combine(params, static).log_prob)(*batch))

    def step(carry, k):
        params, state = carry
        chosen = jax.random.randint(jax.random.fold_in(rng_key, k), (batch_size,), 0, count)
        value, gradient = jax.value_and_grad(loss)(params, tuple(v[chosen] for v in pairs))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(
        step, (params, optimizer.init(params)), jnp.arange(np.int32(num_steps))
    )
    return eqx.combine(params, static), losses
