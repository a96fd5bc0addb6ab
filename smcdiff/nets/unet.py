"""A small residual U-Net for images.

The network sees a rescaled noisy image and one number, the noise level, and returns an image of the same shape.  It
halves the resolution between levels on the way down and doubles it on the way up, adding at each level the features
that it had on the way down (U-Net, O. Ronneberger et al., arXiv 1505.04597).  A block is

    h = conv(silu(norm(x)));   h = conv(silu(norm(h) * (1 + a) + b));   out = x + h,   (a, b) = dense(e),

with e an embedding of the noise level, so the noise level scales and shifts every feature map.  Self-attention over
pixels acts once, at the lowest resolution.  Last convolutions of blocks and of the network start at zero.

Sizes are chosen for a CPU: the cost of a level is (pixels * channels^2), so doubling the channels where the number
of pixels falls four times keeps the levels equally dear, and most parameters sit where they are cheapest.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.nets.layers import Attention, Conv, Dense, GroupNorm, noise_features, silu

__all__ = ["ResidualBlock", "UNet"]


class ResidualBlock(eqx.Module):
    """Two normalised convolutions around a shortcut, modulated by the noise embedding."""

    norm_in: GroupNorm
    conv_in: Conv
    modulation: Dense
    norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, rng_key: PRNGKeyArray, channels: int, embedding: int, groups: int):
        key_in, key_modulation, key_out = jax.random.split(rng_key, 3)
        self.norm_in = GroupNorm(channels, groups)
        self.conv_in = Conv(key_in, channels, channels)
        self.modulation = Dense(key_modulation, embedding, 2 * channels, zero=True)
        self.norm_out = GroupNorm(channels, groups)
        self.conv_out = Conv(key_out, channels, channels, zero=True)

    def __call__(self, x: Float[Array, "H W C"], embedding: Float[Array, " E"]) -> Float[Array, "H W C"]:
        scale, shift = jnp.split(self.modulation(embedding), 2)
        h = self.conv_in(silu(self.norm_in(x)))
        return x + self.conv_out(silu(self.norm_out(h, scale, shift)))


def _upsample(x: Float[Array, "h w C"]) -> Float[Array, "2h 2w C"]:
    height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, None, :, None, :], (height, 2, width, 2, channels))
    return x.reshape(2 * height, 2 * width, channels)


def _fold(x: Float[Array, "H W C"], patch: int) -> Float[Array, "h w D"]:
    if patch == 1:
        return x
    height, width, channels = x.shape
    x = x.reshape(height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 2, 1, 3, 4).reshape(height // patch, width // patch, patch * patch * channels)


def _unfold(x: Float[Array, "h w D"], patch: int) -> Float[Array, "H W C"]:
    if patch == 1:
        return x
    height, width, _ = x.shape
    x = x.reshape(height, width, patch, patch, -1)
    return x.transpose(0, 2, 1, 3, 4).reshape(height * patch, width * patch, -1)


class UNet(eqx.Module):
    """U-Net with one number of conditioning, ``net(x, noise) -> array like x``, for ONE image.

    Parameters
    ----------
    rng_key
        Key of the initial weights.
    event_shape
        (H, W) for one channel or (C, H, W).  H and W must be divisible by 2^(levels - 1).
    channels
        Feature maps at each resolution, finest first; its length is the number of levels.
    blocks
        Residual blocks on the way down at each level (one on the way up at all but the lowest level).
    embedding
        Length of the noise embedding.
    groups
        Groups of the group normalisation; must divide all ``channels``.
    patch
        Pixels per side of a patch that is folded into channels first and unfolded last (1: none).  On a CPU the finest
        level costs mostly memory traffic, and a patch of 2 removes it without losing a pixel.
    attention
        Whether pixels attend to each other at the lowest resolution.

    Returns
    -------
    An Equinox module; ``net(x, noise)`` takes x of shape ``event_shape`` and a scalar ``noise``.

    Raises
    ------
    ValueError
        If the image cannot be halved often enough, or the channels cannot be grouped.

    Sources: Ronneberger et al., "U-Net", arXiv 1505.04597; Dhariwal and Nichol, "Diffusion Models Beat GANs on Image
    Synthesis", arXiv 2105.05233.
    """

    embed_in: Dense
    embed_out: Dense
    stem: Conv
    down: list[list[ResidualBlock]]
    halve: list[Dense]
    attention: Attention | None
    middle: ResidualBlock
    widen: list[Dense]
    up: list[ResidualBlock]
    norm: GroupNorm
    head: Conv
    event_shape: tuple[int, ...] = eqx.field(static=True)
    features: int = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        rng_key: PRNGKeyArray,
        *,
        event_shape: tuple[int, ...],
        channels: tuple[int, ...] = (16, 32, 64),
        blocks: tuple[int, ...] = (1, 1, 1),
        embedding: int = 64,
        groups: int = 8,
        patch: int = 1,
        attention: bool = True,
    ):
        levels = len(channels)
        factor = patch * 2 ** (levels - 1)
        if len(event_shape) not in (2, 3):
            raise ValueError(f"event_shape={tuple(event_shape)} is no image: give (H, W) or (C, H, W).")
        if any(side % factor for side in event_shape[-2:]):
            raise ValueError(
                f"event_shape={tuple(event_shape)} cannot be cut into patches of {patch} and halved {levels - 1} "
                f"times: give fewer channels than {tuple(channels)} or pad the images to a multiple of {factor}."
            )
        if len(blocks) != levels:
            raise ValueError(
                f"blocks={tuple(blocks)} must have one entry per level; channels={tuple(channels)} has {levels} levels."
            )
        depth = (event_shape[0] if len(event_shape) == 3 else 1) * patch * patch
        self.event_shape = tuple(event_shape)
        self.features = 32
        self.patch = patch
        keys = iter(jax.random.split(rng_key, 8 + 4 * levels + sum(blocks)))

        self.embed_in = Dense(next(keys), self.features, embedding)
        self.embed_out = Dense(next(keys), embedding, embedding)
        self.stem = Conv(next(keys), depth, channels[0])
        self.down, self.halve = [], []
        for level, width in enumerate(channels):
            self.down.append(
                [ResidualBlock(next(keys), width, embedding, groups) for _ in range(blocks[level])]
            )
            if level < levels - 1:
                self.halve.append(Dense(next(keys), 4 * width, channels[level + 1]))
        self.attention = Attention(next(keys), channels[-1], groups) if attention else None
        self.middle = ResidualBlock(next(keys), channels[-1], embedding, groups)
        self.widen, self.up = [], []
        for level in reversed(range(levels - 1)):
            self.widen.append(Dense(next(keys), channels[level + 1], channels[level]))
            self.up.append(ResidualBlock(next(keys), channels[level], embedding, groups))
        self.norm = GroupNorm(channels[0], groups)
        self.head = Conv(next(keys), channels[0], depth, zero=True)

    def __call__(self, x: Float[Array, "..."], noise: Float[Array, ""]) -> Float[Array, "..."]:
        if x.shape != self.event_shape:
            raise ValueError(
                f"x has shape {x.shape}, this network takes ONE image of shape {self.event_shape}: "
                "use jax.vmap over a batch."
            )
        dtype = self.stem.weight.dtype
        h = x.astype(dtype)
        h = h[:, :, None] if h.ndim == 2 else jnp.moveaxis(h, 0, -1)
        h = _fold(h, self.patch)
        embedding = silu(self.embed_in(noise_features(jnp.asarray(noise).astype(dtype), self.features)))
        embedding = silu(self.embed_out(embedding))

        h = self.stem(h)
        skips = []
        for level, level_blocks in enumerate(self.down):
            for block in level_blocks:
                h = block(h, embedding)
            if level < len(self.halve):
                skips.append(h)
                h = self.halve[level](_fold(h, 2))
        if self.attention is not None:
            h = self.attention(h)
        h = self.middle(h, embedding)
        for widen, block in zip(self.widen, self.up, strict=True):
            # Narrow first, enlarge after: the dense map then runs on a quarter of the pixels.
            h = block(_upsample(widen(h)) + skips.pop(), embedding)
        h = _unfold(self.head(silu(self.norm(h))), self.patch)
        h = h[:, :, 0] if len(self.event_shape) == 2 else jnp.moveaxis(h, -1, 0)
        return h.astype(x.dtype)
