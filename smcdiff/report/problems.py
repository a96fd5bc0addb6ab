"""Inverse problems on images that need no more than a name: inpainting, deblurring, super-resolution.

    inpaint    a box or a half of the image is hidden                      y = the other pixels
    deblur     a Gaussian blur, periodic, one fourteenth of the rows wide  y = an image of the same size
    superres   means of square blocks of 2 or 4 pixels                     y = a smaller image

Each comes with noise of a known deviation.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.inverse import (
    InverseProblem,
    LinearOperator,
    crop_box,
    downsample,
    gaussian_blur,
    simulate_problem,
)

__all__ = ["MASKS", "PROBLEMS", "make_problem"]


def _box(rows: int, columns: int) -> tuple[int, int, int, int]:
    return rows // 4, columns // 4, rows - 2 * (rows // 4), columns - 2 * (columns // 4)


# Name -> (top, left, height, width) of the hidden part of an image.
MASKS: dict[str, Callable[[int, int], tuple[int, int, int, int]]] = {
    "center": _box,
    "left": lambda rows, columns: (0, 0, rows, columns // 2),
    "right": lambda rows, columns: (0, columns - columns // 2, rows, columns // 2),
    "top": lambda rows, columns: (0, 0, rows // 2, columns),
    "bottom": lambda rows, columns: (rows - rows // 2, 0, rows // 2, columns),
}


def _inpaint(event_shape, mask: str = "center") -> LinearOperator:
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}.")
    return crop_box(event_shape, *MASKS[mask](*event_shape[-2:]))


def _deblur(event_shape, blur_width: float | None = None) -> LinearOperator:
    return gaussian_blur(event_shape, max(1.0, event_shape[-2] / 14) if blur_width is None else blur_width)


def _superres(event_shape, factor: int | None = None) -> LinearOperator:
    if factor is None:
        factor = 4 if min(event_shape[-2:]) >= 16 and all(size % 4 == 0 for size in event_shape[-2:]) else 2
    return downsample(event_shape, factor)


# Name -> function of the event shape and of its own options that builds the operator.
PROBLEMS: dict[str, Callable[..., LinearOperator]] = {
    "inpaint": _inpaint,
    "deblur": _deblur,
    "superres": _superres,
}


def make_problem(
    rng_key: PRNGKeyArray,
    name: str,
    truth: Float[Array, "*event"] | Float[np.ndarray, "*event"],
    noise: float = 0.1,
    **options,
) -> InverseProblem:
    """Measure a known image.

    Parameters
    ----------
    rng_key
        Key of the noise.
    name
        "inpaint", "deblur" or "superres".
    truth
        The image, (rows, columns) or (channels, rows, columns).
    noise
        Deviation of the noise, in units of the pixels.
    options
        For "inpaint" ``mask``, the hidden part: "center" (a box of half the height and width; the default), "left",
        "right", "top" or "bottom". For "deblur" ``blur_width``, the deviation of the kernel in pixels. For
        "superres" ``factor``, the side of a block in pixels.

    Returns
    -------
    InverseProblem

    Raises
    ------
    ValueError
        If the name or an option is unknown or does not fit the image, or ``noise`` is not positive.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {name!r}.")
    if np.ndim(truth) not in (2, 3):
        raise ValueError(
            f"truth must be an image (rows, columns) or (channels, rows, columns), got shape {np.shape(truth)}."
        )
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be a finite positive number, got {noise}.")
    return simulate_problem(rng_key, PROBLEMS[name](np.shape(truth), **options), jnp.asarray(truth), noise)
