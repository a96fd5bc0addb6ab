"""The layers that the small networks are made of: dense, convolution, group norm, attention, noise features.

Every layer is an Equinox module whose leaves are arrays and nothing else (sizes are static fields, the activation is
written where it is used), so a network built of them is itself a valid set of ``params``: it goes through ``jit``,
``grad``, ``vmap`` and into a checkpoint unchanged.  All act on ONE sample; images are (H, W, C) inside a network,
because a channels-last convolution is the fastest form on a CPU and ``vmap`` turns it into one batched convolution.

Initialisation is N(0, 1/fan_in) (variance kept through a linear layer), or zero for the layers that close a residual
branch: a fresh network then computes the identity along its residual path, which is where training starts best
(S. Karras et al., arXiv 2206.00364; P. Dhariwal and A. Nichol, arXiv 2105.05233).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["Attention", "Conv", "Dense", "GroupNorm", "apply_network", "noise_features", "silu"]


def apply_network(net: Callable, x: Array, noise: Array) -> Array:
    """``net(x, noise)``: the ``apply`` of a ``Diffusion`` whose ``params`` are the network itself."""
    return net(x, noise)


def silu(x: Array) -> Array:
    """SiLU activation, ``x * sigmoid(x)``."""
    return x * jax.nn.sigmoid(x)


def noise_features(noise: Float[Array, ""], num_features: int) -> Float[Array, " num_features"]:
    """Sines and cosines of the noise level at geometrically spaced frequencies.

    Parameters
    ----------
    noise
        Scalar conditioning, log(sigma/alpha)/4 for the preconditioned networks, so within about [-1.7, 1.7].
    num_features
        Length of the result, an even number.

    Returns
    -------
    Array (num_features,); frequencies run from 1/8 cycle per unit (monotone over the whole range) to 4 cycles.
    """
    half = num_features // 2
    frequencies = jnp.exp(jnp.linspace(jnp.log(0.125), jnp.log(4.0), half, dtype=noise.dtype))
    angles = 2 * jnp.pi * frequencies * noise
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class Dense(eqx.Module):
    """Affine map on the last axis: ``x @ weight + bias``."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, rng_key: PRNGKeyArray, inputs: int, outputs: int, *, zero: bool = False):
        scale = 0.0 if zero else inputs**-0.5
        self.weight = scale * jax.random.normal(rng_key, (inputs, outputs), jnp.float32)
        self.bias = jnp.zeros((outputs,), jnp.float32)

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        out = x @ self.weight
        return out + jnp.broadcast_to(self.bias, out.shape)


def _conv(x: Float[Array, "H W I"], weight: Float[Array, "3 3 I O"]) -> Float[Array, "H W O"]:
    return jax.lax.conv_general_dilated(
        x[None], weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


def _conv_by_products(x: Float[Array, "H W I"], weight: Float[Array, "3 3 I O"]) -> Float[Array, "H W O"]:
    """The same map as one matrix product: three columns gathered before it, three rows added up after it."""
    height, width, inputs = x.shape
    padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, j : j + width] for j in range(3)], axis=-1)
    rows = columns @ jnp.moveaxis(weight, 0, 2).reshape(3 * inputs, -1)
    rows = rows.reshape(height + 2, width, 3, -1)
    return rows[:height, :, 0] + rows[1 : height + 1, :, 1] + rows[2:, :, 2]


# On a CPU, XLA runs a convolution fast inside a loop only in the form that `_conv` writes, which the transposed
# convolution of its gradient does not have: under lax.scan, where every sampler lives, the gradient of a network was
# six times slower than outside. The tangent map is therefore written as products, whose transpose is products again.
_conv_fast = jax.custom_jvp(_conv)


@_conv_fast.defjvp
def _conv_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, weight), (x_dot, weight_dot) = primals, tangents
    return _conv_fast(x, weight), _conv_by_products(x_dot, weight) + _conv(x, weight_dot)


class Conv(eqx.Module):
    """3x3 convolution of an (H, W, C) image, zeros outside, the size kept."""

    weight: Float[Array, "3 3 inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, rng_key: PRNGKeyArray, inputs: int, outputs: int, *, zero: bool = False):
        scale = 0.0 if zero else (9 * inputs) ** -0.5
        self.weight = scale * jax.random.normal(rng_key, (3, 3, inputs, outputs), jnp.float32)
        self.bias = jnp.zeros((outputs,), jnp.float32)

    def __call__(self, x: Float[Array, "H W inputs"]) -> Float[Array, "H W outputs"]:
        out = _conv_fast(x, self.weight)
        return out + jnp.broadcast_to(self.bias, out.shape)


class GroupNorm(eqx.Module):
    """Normalise groups of channels over space to mean 0 and variance 1, then scale and shift each channel."""

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int):
        if channels % groups:
            raise ValueError(f"channels={channels} cannot be split into groups={groups}: choose a divisor.")
        self.weight = jnp.ones((channels,), jnp.float32)
        self.bias = jnp.zeros((channels,), jnp.float32)
        self.groups = groups

    def __call__(
        self, x: Float[Array, "H W channels"], scale: Array | None = None, shift: Array | None = None
    ) -> Float[Array, "H W channels"]:
        # The statistics are folded into one scale and one shift per channel: a single pass over the image.
        channels = x.shape[-1]
        mean = jnp.mean(x, (0, 1)).reshape(self.groups, -1)
        square = jnp.mean(jnp.square(x), (0, 1)).reshape(self.groups, -1)
        mean = jnp.mean(mean, 1)
        variance = jnp.maximum(jnp.mean(square, 1) - jnp.square(mean), 0.0)
        repeat = channels // self.groups
        gain = jnp.repeat(jax.lax.rsqrt(variance + 1e-5), repeat) * self.weight
        offset = self.bias - jnp.repeat(mean, repeat) * gain
        if scale is not None and shift is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return x * gain[None, None] + offset[None, None]


class Attention(eqx.Module):
    """Residual single-head self-attention over the pixels of an (H, W, C) image."""

    norm: GroupNorm
    qkv: Dense
    out: Dense

    def __init__(self, rng_key: PRNGKeyArray, channels: int, groups: int):
        key_qkv, key_out = jax.random.split(rng_key)
        self.norm = GroupNorm(channels, groups)
        self.qkv = Dense(key_qkv, channels, 3 * channels)
        self.out = Dense(key_out, channels, channels, zero=True)

    def __call__(self, x: Float[Array, "H W channels"]) -> Float[Array, "H W channels"]:
        height, width, channels = x.shape
        tokens = self.norm(x).reshape(height * width, channels)
        query, key, value = jnp.split(self.qkv(tokens), 3, axis=-1)
        attention = jax.nn.softmax((query @ key.T) * channels**-0.5, axis=-1)
        return x + self.out(attention @ value).reshape(x.shape)
