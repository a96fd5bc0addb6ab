"""A small residual multilayer perceptron for vectors.

    h = dense(x) + dense(e);   h <- h + dense(silu(dense(silu(h)) * (1 + a) + b)),   (a, b) = dense(e),  for each block;
    out = dense(silu(h)),

with e an embedding of the noise level.  Second layers of blocks and the last layer start at zero.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.nets.layers import Dense, noise_features, silu

__all__ = ["MLP"]


class MLP(eqx.Module):
    """Residual perceptron with one number of conditioning, ``net(x, noise) -> array like x``, for ONE sample.

    Parameters
    ----------
    rng_key
        Key of the initial weights.
    event_shape
        Shape of a sample; it is flattened inside, so any shape will do (a scalar is ``()``).
    width
        Hidden units.
    blocks
        Residual blocks.
    embedding
        Length of the noise embedding.

    Returns
    -------
    An Equinox module; ``net(x, noise)`` takes x of shape ``event_shape`` and a scalar ``noise``.

    Sources: He et al., "Deep Residual Learning", arXiv 1512.03385; Perez et al., "FiLM", arXiv 1709.07871.
    """

    embed: Dense
    lift: Dense
    condition: Dense
    inner: list[Dense]
    modulation: list[Dense]
    outer: list[Dense]
    head: Dense
    event_shape: tuple[int, ...] = eqx.field(static=True)
    features: int = eqx.field(static=True)

    def __init__(
        self,
        rng_key: PRNGKeyArray,
        *,
        event_shape: tuple[int, ...],
        width: int = 64,
        blocks: int = 2,
        embedding: int = 32,
    ):
        size = 1
        for side in event_shape:
            size *= side
        self.event_shape = tuple(event_shape)
        self.features = 32
        keys = iter(jax.random.split(rng_key, 4 + 3 * blocks))
        self.embed = Dense(next(keys), self.features, embedding)
        self.lift = Dense(next(keys), size, width)
        self.condition = Dense(next(keys), embedding, width)
        self.inner = [Dense(next(keys), width, width) for _ in range(blocks)]
        self.modulation = [Dense(next(keys), embedding, 2 * width, zero=True) for _ in range(blocks)]
        self.outer = [Dense(next(keys), width, width, zero=True) for _ in range(blocks)]
        self.head = Dense(next(keys), width, size, zero=True)

    def __call__(self, x: Float[Array, "..."], noise: Float[Array, ""]) -> Float[Array, "..."]:
        if x.shape != self.event_shape:
            raise ValueError(
                f"x has shape {x.shape}, this network takes ONE sample of shape {self.event_shape}: "
                "use jax.vmap over a batch."
            )
        dtype = self.lift.weight.dtype
        embedding = silu(self.embed(noise_features(jnp.asarray(noise).astype(dtype), self.features)))
        h = self.lift(x.astype(dtype).reshape(-1)) + self.condition(embedding)
        for inner, modulation, outer in zip(self.inner, self.modulation, self.outer, strict=True):
            scale, shift = jnp.split(modulation(embedding), 2)
            h = h + outer(silu(inner(silu(h)) * (1 + scale) + shift))
        return self.head(silu(h)).reshape(x.shape).astype(x.dtype)
