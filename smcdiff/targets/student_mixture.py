"""A mixture of Student laws: heavy tails and several modes.

    p(x) = (1/K) sum_k prod_i t_nu(x_i - m_ki),      m_k uniform in a cube,

with t_nu the Student density of nu degrees of freedom, independent in every coordinate. The density is normalised. For
nu = 2 the second moment is infinite, and any sampler that relies on Gaussian tails is wrong far out. Components overlap
in their tails, so that no modes are told apart.

Source: Blessing et al., "Beyond ELBOs", arXiv 2406.07423, with 10 components and 2 degrees of freedom; means of our
own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.checks import check_count, check_positive
from smcdiff.targets.mixtures import random_means
from smcdiff.targets.target import Target, exact_moments, parameter

__all__ = ["StudentMixtureTarget", "student_mixture"]


class StudentMixtureTarget(Target):
    """A mixture of products of Student laws; build it with `student_mixture`."""

    means: Float[Array, "K d"]
    freedom: Float[Array, ""]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.means.shape[1:]

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Normalised log density at one sample ``x``."""
        nu, (num_components, d) = self.freedom, self.means.shape
        half = 0.5 * (nu + 1)
        constant = jax.scipy.special.gammaln(half) - jax.scipy.special.gammaln(0.5 * nu)
        constant = constant - 0.5 * jnp.log(math.pi * nu)
        terms = -half * jnp.sum(jnp.log1p((x[None] - self.means) ** 2 / nu), axis=1)
        return jax.nn.logsumexp(terms) + d * constant - math.log(num_components)

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n d"]:
        """Draw ``num_samples`` independent samples."""
        key_component, key_noise = jax.random.split(rng_key)
        chosen = jax.random.randint(key_component, (num_samples,), 0, len(self.means))
        noise = jax.random.t(key_noise, self.freedom, (num_samples, self.means.shape[1]), self.means.dtype)
        return self.means[chosen] + noise


def student_mixture(
    dimension: int = 2, *, num_components: int = 10, freedom: float = 2.0, side: float = 20.0, seed: int = 0
) -> StudentMixtureTarget:
    """Equal components of Student laws, their means uniform in a cube about the origin.

    Parameters
    ----------
    dimension
        d.
    num_components
        K.
    freedom
        nu, degrees of freedom, above 1; the deviations are infinite up to 2.
    side
        Of the cube, positive.
    seed
        Of the means, which come from `smcdiff.targets.random_means`.
    """
    check_count("num_components", num_components)
    if not freedom > 1:
        raise ValueError(f"freedom must be above 1, or there is no mean, got {freedom}.")
    means = random_means(num_components, dimension, side, seed)
    check_positive("freedom", freedom)
    std = np.full(dimension, np.inf)
    if freedom > 2:
        std = np.sqrt(freedom / (freedom - 2) + means.var(axis=0))
    return StudentMixtureTarget(
        0.0, exact_moments(means.mean(axis=0), std), parameter(means), parameter(freedom)
    )
