"""The denoising posterior of a bare density: the law of x_0 ~ pi / Z given x = alpha x_0 + sigma eps,

q(x_0) ~ pi(x_0) N(x_0; c, r^2 I),      c = x / alpha the centre,  r = sigma / alpha the width.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from smcdiff.density import logdensity_and_score

__all__ = ["DenoisingPosterior"]


class DenoisingPosterior(eqx.Module):
    """The density pi(x_0) N(x_0; c, r^2 I), up to a constant; samples may be pytrees.

    Parameters
    ----------
    target
        Object with a log density and a score.
    centre
        c, flat.
    width
        r.
    """

    target: Any
    centre: Float[Array, " d"]
    width: Float[Array, ""]

    def logdensity(self, x: PyTree) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to a constant."""
        return self.target.logdensity(x) + self.log_noise(x)

    def score(self, x: PyTree) -> PyTree:
        """Gradient of the log density at one sample ``x``."""
        return jax.tree.map(jnp.add, self.target.score(x), self.noise_score(x))

    def logdensity_and_score(self, x: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """Both, from one evaluation of the target."""
        value, score = logdensity_and_score(self.target, x)
        return value + self.log_noise(x), jax.tree.map(jnp.add, score, self.noise_score(x))

    def log_noise(self, x: PyTree) -> Float[Array, ""]:
        """-|x - c|^2 / (2 r^2)."""
        flat, _ = ravel_pytree(x)
        return -0.5 * jnp.sum(((flat - self.centre) / self.width) ** 2)

    def noise_score(self, x: PyTree) -> PyTree:
        """Gradient of `log_noise`."""
        flat, unravel = ravel_pytree(x)
        return unravel((self.centre - flat) / self.width**2)
