"""A conditional normalising flow with a density in closed form.

Standard Student noise u (d,) goes through affine coupling layers that see the context c: half of the coordinates
passes, and shifts and scales the other,

    u_b <- u_b exp(s(u_a, c)) + m(u_a, c),        |s| < 3,

the halves in turn. The density of the result is that of u times the inverse Jacobian, exp of minus the sum of all s.
The noise has tails of the power 5, which an affine map keeps: wider than those of most posteriors, so that importance
weights stay bounded.

Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", arXiv 1605.08803.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.checks import check_count
from smcdiff.nets.layers import Dense, silu

__all__ = ["ConditionalFlow"]

_DEGREES = 5.0
_MOST = 3.0  # of the logarithm of a scale


class ConditionalFlow(eqx.Module):
    """A density q(x | context) with draws, for ONE vector x (d,) and ONE context (m,).

    Parameters
    ----------
    rng_key
        Key of the initial weights.
    size
        Number of coordinates d, at least 1. With one coordinate the layers can only scale and shift.
    context_size
        Length m of the context.
    layers
        Coupling layers.
    width
        Hidden units of the networks in them.

    Raises
    ------
    ValueError
        If a count is not a positive integer.

    Source: "Density estimation using Real NVP", arXiv 1605.08803.
    """

    networks: list[tuple[Dense, Dense, Dense]]
    size: int = eqx.field(static=True)

    def __init__(
        self, rng_key: PRNGKeyArray, size: int, context_size: int, *, layers: int = 6, width: int = 64
    ):
        for name, count in (
            ("size", size),
            ("context_size", context_size),
            ("layers", layers),
            ("width", width),
        ):
            check_count(name, count)
        self.size = size
        keys = jax.random.split(rng_key, layers)
        self.networks = []
        for index, key in enumerate(keys):
            passing = len(self._passing(index))
            first, second, last = jax.random.split(key, 3)
            network = (
                Dense(first, passing + context_size, width),
                Dense(second, width, width),
                Dense(last, width, 2 * (size - passing), zero=True),  # each layer begins as the identity
            )
            self.networks.append(network)

    def sample(self, rng_key: PRNGKeyArray, context: Float[Array, " m"]) -> Float[Array, " d"]:
        """One draw."""
        x = jax.random.t(rng_key, _DEGREES, (self.size,), context.dtype)
        for index in range(len(self.networks)):
            moving, shift, log_scale = self._couple(index, x, context)
            x = x.at[moving].set(x[moving] * jnp.exp(log_scale) + shift)
        return x

    def log_prob(self, x: Float[Array, " d"], context: Float[Array, " m"]) -> Float[Array, ""]:
        """Log density at ``x``."""
        total = jnp.zeros((), x.dtype)
        for index in reversed(range(len(self.networks))):
            moving, shift, log_scale = self._couple(index, x, context)
            x = x.at[moving].set((x[moving] - shift) * jnp.exp(-log_scale))
            total = total - jnp.sum(log_scale)
        constant = (
            math.lgamma((_DEGREES + 1) / 2) - math.lgamma(_DEGREES / 2) - 0.5 * math.log(_DEGREES * math.pi)
        )
        return total + jnp.sum(constant - (_DEGREES + 1) / 2 * jnp.log1p(x**2 / _DEGREES))

    def _passing(self, index):
        """Which coordinates a layer leaves alone."""
        half = self.size // 2
        return np.arange(half) if index % 2 == 0 else np.arange(half, self.size if self.size > 1 else 0)

    def _couple(self, index, x, context):
        """The coordinates that a layer moves, their shift and their log scale."""
        passing = self._passing(index)
        moving = np.setdiff1d(np.arange(self.size), passing)
        first, second, last = self.networks[index]
        hidden = silu(second(silu(first(jnp.concatenate([x[passing], context])))))
        shift, raw = jnp.split(last(hidden), 2)
        return moving, shift, _MOST * jnp.tanh(raw / _MOST)
