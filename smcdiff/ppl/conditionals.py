"""The conditional law of sites that are integrated out, and the log density of what depends on them.

With the sites v of a group and their children c, for any v*,

    log p(c) = log p(c | v*) + log p(v*) - log p(v* | c),

and v* is the mean of the conditional law. Gaussian sites are functions of standard normal noise e, the parents first,
and the whitened residuals of the children are r + J e. The law of e is Gaussian with the mean -K r, where
K = (I + J' J)^-1 J' = J' (I + J J')^-1, of which the smaller inverse is taken, and its draws are
e - K (r + J e + w) for standard normal e and w. Gamma and beta sites: see `smcdiff.ppl.families`; sums over children
are pullbacks of v -> h(v) at v = 1.

Source: the identity is that of Chib, "Marginal Likelihood from the Gibbs Output" (1995); the draws are Matheron's, in
Wilson et al., "Efficiently Sampling Functions from Gaussian Process Posteriors", arXiv 2002.09309.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from smcdiff.ppl.conjugacy import Group
from smcdiff.ppl.families import EDGES, base, gamma_or_beta, parameter, value_of, whitened

__all__ = ["conditional"]


def conditional(
    group: Group, sites: Mapping[str, Any], run: Callable
) -> tuple[Array, Callable[[PRNGKeyArray], dict[str, Array]]]:
    """The log density of the children of a group with its sites integrated out, and a function that draws the sites.

    Parameters
    ----------
    group
        The group.
    sites
        The sites of a run of the model, of which the shapes and what does not depend on the group are used.
    run
        Runs the model with ``values``, or with ``noise``, of the sites of the group, and returns its sites.
    """
    return _gaussian(group, sites, run) if group.kind == "gaussian" else _gamma_or_beta(group, sites, run)


def _log_prob(sites, names):
    return sum((jnp.sum(sites[name]["fn"].log_prob(sites[name]["value"])) for name in names), 0.0)


def _gaussian(group, sites, run):
    zero, unravel = ravel_pytree({name: jnp.zeros_like(sites[name]["value"]) for name in group.sites})

    def residuals(noise):
        found = run(noise=unravel(noise))
        parts = [
            jnp.ravel(whitened(found[name]["fn"], value_of(found[name], zero.dtype)))
            for name in group.children
        ]
        return jnp.concatenate([jnp.zeros(0, zero.dtype), *parts])

    num_residuals = sum(value_of(sites[name], zero.dtype).size for name in group.children)
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
    values = {child: value_of(sites[child], value.dtype) for child in group.children}

    def links(value):
        found = run(values={name: value})
        return {
            child: jnp.broadcast_to(parameter(base(found[child]["fn"]), edge.link), values[child].shape)
            for child, edge in edges.items()
        }

    at_one, pull = jax.vjp(links, jnp.ones_like(value))
    first, second = {}, {}
    for child, edge in edges.items():
        link = at_one[child]
        parts = edge.statistics(base(sites[child]["fn"]), values[child])
        s, second[child] = (jnp.broadcast_to(jnp.asarray(part, link.dtype), link.shape) for part in parts)
        first[child] = jnp.where(link == 0, 0, s) / jnp.where(link == 0, 1, link)
    family, prior = gamma_or_beta(fn, value.shape)
    law = family(*(p + pull(parts)[0] for p, parts in zip(prior, (first, second), strict=True)))
    log_ratio = family(*prior).log_prob(law.mean) - law.log_prob(law.mean)
    log_marginal = _log_prob(run(values={name: law.mean}), group.children) + jnp.sum(log_ratio)
    return log_marginal, lambda rng_key: {name: law.sample(rng_key)}
