"""Operators that average pixels: blurs and block means, over the last two axes.

blur        A x = k * x, periodic: F(A x) = F(k) F(x), and F(A* y) = conj(F(k)) F(y)
downsample  A x = means of the factor x factor blocks
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcdiff.inverse.operators import LinearOperator, as_real, checked_shape

__all__ = ["blur", "downsample", "gaussian_blur"]


class _Blur(LinearOperator):
    # The kernel is kept and not its transform: it takes any dtype of x, and can be differentiated or learned;
    # under vmap over samples it is transformed once.
    kernel: Float[Array, "kh kw"]

    def _transfer(self, dtype):
        rows, cols = (
            (np.arange(size) - size // 2) % length
            for size, length in zip(self.kernel.shape, self.input_shape[-2:], strict=True)
        )
        image = jnp.zeros(self.input_shape[-2:], dtype)
        transfer = jnp.fft.rfft2(image.at[np.ix_(rows, cols)].add(self.kernel.astype(dtype)))
        return transfer.reshape((1,) * (len(self.input_shape) - 2) + transfer.shape)

    def _filter(self, x, transfer):
        return jnp.fft.irfft2(jnp.fft.rfft2(x) * transfer, s=self.input_shape[-2:])

    def _apply(self, x):
        return self._filter(x, self._transfer(x.dtype))

    def _adjoint(self, y):
        return self._filter(y, self._transfer(y.dtype).conj())


class _Downsample(LinearOperator):
    factor: int = eqx.field(static=True)

    def _apply(self, x):
        *lead, height, width = self.output_shape
        return x.reshape(*lead, height, self.factor, width, self.factor).mean(axis=(-3, -1))


def blur(kernel: Float[Array, "kh kw"], event_shape: Sequence[int]) -> LinearOperator:
    """Convolve the last two axes with ``kernel``, periodically; the measurement has the event shape.

    Parameters
    ----------
    kernel
        Weights of odd size (kh, kw), centred:
        (A x)[i, j] = sum_ab kernel[a, b] x[i - a + kh//2, j - b + kw//2], indices modulo the image size.
    event_shape
        Shape of one sample, (..., rows, columns).

    Raises
    ------
    ValueError
        If ``kernel`` is not a finite matrix of odd sizes, or ``event_shape`` has fewer than two axes.
    """
    kernel = as_real("kernel", kernel)
    if kernel.ndim != 2 or any(size % 2 == 0 for size in kernel.shape):
        raise ValueError(f"kernel must be a matrix of odd sizes, got shape {kernel.shape}; pad by zeros.")
    shape = checked_shape(event_shape, 2)
    return _Blur(shape, shape, kernel)


def gaussian_blur(event_shape: Sequence[int], width: float, size: int | None = None) -> LinearOperator:
    """Blur with a Gaussian kernel whose weights sum to 1: a `blur`.

    Parameters
    ----------
    event_shape
        Shape of one sample, (..., rows, columns).
    width
        Standard deviation of the kernel in pixels, positive.
    size
        Side of the square kernel in pixels, odd; by default it reaches out to 4 widths.

    Raises
    ------
    ValueError
        If ``width`` is not finite and positive, or ``size`` is not odd and positive, or is left out while
        ``width`` is traced.
    """
    traced = isinstance(width, jax.core.Tracer)
    if not traced and not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be finite and positive, in pixels, got {width}; no blur is `identity`.")
    if size is None:
        if traced:
            raise ValueError("size must be given when width is traced: it is a shape.")
        size = 2 * math.ceil(4.0 * width) + 1
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size must be an odd positive number of pixels, got {size}; use {abs(size) | 1}.")
    offsets = jnp.arange(-(size // 2), size // 2 + 1, dtype=float)
    profile = jax.nn.softmax(-0.5 * (offsets / jnp.asarray(width, float)) ** 2)
    return blur(jnp.outer(profile, profile), event_shape)


def downsample(event_shape: Sequence[int], factor: int) -> LinearOperator:
    """Average over square blocks of the last two axes: super-resolution.

    Parameters
    ----------
    event_shape
        Shape of one sample, (..., rows, columns).
    factor
        Side of a block in pixels; it must divide both axes.

    Raises
    ------
    ValueError
        If ``factor`` is not a positive integer that divides rows and columns.
    """
    *lead, height, width = shape = checked_shape(event_shape, 2)
    if not isinstance(factor, int | np.integer) or factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must be an integer that divides {height} and {width}, got {factor!r}.")
    return _Downsample(shape, (*lead, height // factor, width // factor), int(factor))
