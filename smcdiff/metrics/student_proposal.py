"""A mixture of multivariate Student laws as an adaptive proposal: sampling, density, one step of EM.

    q(x) = sum_k a_k t_nu(x; m_k, L_k L_k^T),      nu = 1, 2, ... degrees of freedom.

The step of EM towards weighted points (w_i, x_i), with r_ik the responsibilities of the components and
g_ik = (nu + d) / (nu + |L_k^-1 (x_i - m_k)|^2) the precisions of the Student law as a mixture of Gaussians, is

    a_k = sum_i w_i r_ik,   m_k = sum_i w_i r_ik g_ik x_i / sum_i w_i r_ik g_ik,
    C_k = sum_i w_i r_ik g_ik (x_i - m_k)(x_i - m_k)^T / sum_i w_i r_ik.

Source: Cappé et al., "Adaptive Importance Sampling in General Mixture Classes", arXiv 0710.4242.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.metrics.distance import dot
from smcdiff.metrics.triangular import cholesky, solve_lower

__all__ = ["StudentMixture", "defend", "draw", "log_density", "update"]


class StudentMixture(NamedTuple):
    """A mixture of K Student laws on R^d.

    Attributes
    ----------
    log_weights
        log a_k, normalised.
    means
        m_k.
    factors
        L_k, lower Cholesky factors of the scale matrices.
    """

    log_weights: Float[Array, " K"]
    means: Float[Array, "K d"]
    factors: Float[Array, "K d d"]


_SHARE = 0.1  # of the first proposal in each round's


def defend(fitted: StudentMixture, first: StudentMixture) -> StudentMixture:
    """The fitted mixture with a share of the first proposal, which bounds the weights where the fit is too narrow."""
    log_weights = (jnp.log1p(-_SHARE) + fitted.log_weights, jnp.log(_SHARE) + first.log_weights)
    return StudentMixture(
        jnp.concatenate(log_weights),
        jnp.concatenate([fitted.means, first.means]),
        jnp.concatenate([fitted.factors, first.factors]),
    )


def draw(rng_key: PRNGKeyArray, proposal: StudentMixture, nu: int, number: int) -> Float[Array, "n d"]:
    """Independent samples."""
    key_component, key_normal, key_square = jax.random.split(rng_key, 3)
    component = jax.random.categorical(key_component, proposal.log_weights, shape=(number,))
    dtype, dimension = proposal.means.dtype, proposal.means.shape[1]
    normal = jax.random.normal(key_normal, (number, dimension), dtype)
    chi_square = jnp.sum(jax.random.normal(key_square, (number, nu), dtype) ** 2, axis=1)
    noise = jnp.einsum("nij,nj->ni", proposal.factors[component], normal, precision="highest")
    return proposal.means[component] + jnp.sqrt(nu / chi_square)[:, None] * noise


def log_density(x: Float[Array, "n d"], proposal: StudentMixture, nu: int) -> Float[Array, " n"]:
    """Log density at each point."""
    return jax.nn.logsumexp(_components(x, proposal, nu)[0], axis=1)


def update(
    weights: Float[Array, " n"],
    ess: Float[Array, ""],
    x: Float[Array, "n d"],
    proposal: StudentMixture,
    nu: int,
) -> StudentMixture:
    """One step of EM towards weighted points, pulled to the last proposal as far as few points carry the weight.

    The pull is that of 1 point at the former mean and of d + 2 points with the former covariance, beside the effective
    number of points of the component.
    """
    number, dimension = proposal.means.shape
    log_components, squares = _components(x, proposal, nu)
    shares = weights[:, None] * jax.nn.softmax(log_components, axis=1)
    precision = shares * (nu + dimension) / (nu + squares)
    counts = ess * jnp.sum(shares, axis=0)
    tiny = jnp.finfo(x.dtype).tiny

    def component(share, precise, count, mean, factor):
        prior = dimension + 2.0
        new_mean = (count * dot(precise, x) / jnp.maximum(jnp.sum(precise), tiny) + mean) / (count + 1)
        centred = x - new_mean[None]
        spread = dot((precise[:, None] * centred).T, centred) / jnp.maximum(jnp.sum(share), tiny)
        covariance = (count * spread + prior * dot(factor, factor.T)) / (count + prior)
        return new_mean, cholesky(covariance)

    means, factors = jax.vmap(component, in_axes=(1, 1, 0, 0, 0))(
        shares, precision, counts, proposal.means, proposal.factors
    )
    return StudentMixture(jnp.log((counts + 1) / (jnp.sum(counts) + number)), means, factors)


def _components(x, proposal, nu):
    """Log densities (n, K) with the weights of the components, and squared standardised distances (n, K)."""
    dimension = x.shape[1]

    def component(mean, factor):
        z = solve_lower(factor, (x - mean[None]).T)
        return jnp.sum(z**2, axis=0), jnp.sum(jnp.log(jnp.diag(factor)))

    squares, log_scales = jax.vmap(component, out_axes=(1, 0))(proposal.means, proposal.factors)
    constant = math.lgamma(0.5 * (nu + dimension)) - math.lgamma(0.5 * nu)
    constant = constant - 0.5 * dimension * math.log(nu * math.pi) - log_scales + proposal.log_weights
    return constant[None] - 0.5 * (nu + dimension) * jnp.log1p(squares / nu), squares
