"""Images in: a file as one sample of a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

__all__ = ["read_image"]


def read_image(
    path: str | Path, event_shape: Sequence[int], pixel_range: Sequence[float] = (0.0, 1.0)
) -> Float[np.ndarray, "*event"]:
    """Read a PNG (or any picture that Pillow reads) as one sample of a model.

    It is made grey unless the model has three channels. It is not resized: that would change what is measured.

    Parameters
    ----------
    path
        The file.
    event_shape
        Shape of a sample, (rows, columns) or (1 or 3, rows, columns).
    pixel_range
        What black and white are to the model.

    Returns
    -------
    float32 array of shape ``event_shape``.

    Raises
    ------
    ValueError
        If there is no such file, it is no picture, or its size is not the model's.
    """
    shape = tuple(event_shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
        raise ValueError(f"the model's samples have the shape {shape} and are no grey or colour images.")
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}).") from None
    rows, columns = shape[-2:]
    if picture.size != (columns, rows):
        width, height = picture.size
        raise ValueError(
            f"{path} is {width} pixels wide and {height} high, the model needs {columns} wide and {rows} high: "
            "crop or resize it first."
        )
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off and not scale
        values = np.asarray(picture, np.float32) / 65535
    else:
        values = (
            np.asarray(picture.convert("RGB" if shape[0] == 3 and len(shape) == 3 else "L"), np.float32) / 255
        )
    low, high = pixel_range
    values = np.moveaxis(values, -1, 0) if values.ndim == 3 else values
    return (low + (high - low) * values).reshape(shape).astype(np.float32)
