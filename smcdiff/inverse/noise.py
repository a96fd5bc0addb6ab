"""Noise of a measurement: y = A x + std * eps, eps standard normal and independent for each entry.

    log p(y | x) = - sum_i [ (y_i - (A x)_i)^2 / (2 std_i^2) + log(std_i) + log(2 pi) / 2 ]

The constant is kept, so that evidences of problems with different noise can be compared.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["GaussianNoise"]


def _as_float(std):
    """Convert to a definite (not weak) float dtype: 0.1 and an array of 0.1 then share a compiled program."""
    std = jnp.asarray(std)
    if jnp.iscomplexobj(std):
        raise ValueError(f"std must be real, got dtype {std.dtype}.")
    return jnp.asarray(std, std.dtype if jnp.issubdtype(std.dtype, jnp.floating) else float)


class GaussianNoise(eqx.Module):
    """Independent Gaussian noise of known standard deviation.

    Parameters
    ----------
    std
        Standard deviation in the units of the measurement: a scalar, or an array of the measurement's shape.
        It is converted to the dtype of the measurement where the two meet.

    Raises
    ------
    ValueError
        If ``std`` is not finite and positive everywhere (not checked for traced values).
    """

    std: Float[Array, "*measurement"] = eqx.field(converter=_as_float)

    def __check_init__(self):
        if isinstance(self.std, jax.core.Tracer):
            return
        std = np.asarray(self.std)
        if not np.all(np.isfinite(std) & (std > 0)):
            worst = std[~(np.isfinite(std) & (std > 0))][0]
            raise ValueError(
                f"std must be finite and positive everywhere, got {worst}; for a measurement without noise "
                "use a small positive std, since a likelihood of zero width has no density."
            )

    def log_likelihood(
        self, y: Float[Array, "*measurement"], mean: Float[Array, "*measurement"]
    ) -> Float[Array, ""]:
        """log N(y; mean, std^2), normalised, for one measurement.

        Parameters
        ----------
        y
            The measurement.
        mean
            What would be measured without noise; of the shape of ``y``.

        Returns
        -------
        Scalar, in nats.

        Raises
        ------
        ValueError
            If the shapes of ``y``, ``mean`` and ``std`` do not agree.
        """
        y, mean = jnp.asarray(y), jnp.asarray(mean)
        if y.shape != mean.shape:
            raise ValueError(f"mean must have shape {y.shape} as y has, got {mean.shape}; batch by jax.vmap.")
        std = self._spread(y.shape, y.dtype)
        return -jnp.sum(0.5 * ((y - mean) / std) ** 2 + jnp.log(std) + 0.5 * math.log(2.0 * math.pi))

    def sample(
        self, rng_key: PRNGKeyArray, mean: Float[Array, "*measurement"]
    ) -> Float[Array, "*measurement"]:
        """Draw one measurement, mean + std * eps.

        Parameters
        ----------
        rng_key
            Random key.
        mean
            What would be measured without noise.

        Returns
        -------
        Array of the shape and dtype of ``mean``.
        """
        mean = jnp.asarray(mean)
        std = self._spread(mean.shape, mean.dtype)
        return mean + std * jax.random.normal(rng_key, mean.shape, mean.dtype)

    def variance(self, shape: Sequence[int]) -> Float[Array, "*measurement"]:
        """std^2 of each entry of a measurement of shape ``shape``; `ValueError` if ``std`` does not fit."""
        return self._spread(tuple(shape), self.std.dtype) ** 2

    def _spread(self, shape, dtype):
        if self.std.shape not in ((), shape):
            raise ValueError(
                f"std must be a scalar or have the measurement's shape {shape}, got shape {self.std.shape}."
            )
        return jnp.broadcast_to(self.std.astype(dtype), shape)
