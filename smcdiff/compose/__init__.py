"""Composition: new density paths out of old ones."""

from smcdiff.compose.algebra import condition, contrast, geometric_average, guide, product, temper
from smcdiff.compose.mixed import MixturePath, mixture
from smcdiff.compose.weighted import Composition

__all__ = [
    "Composition",
    "MixturePath",
    "condition",
    "contrast",
    "geometric_average",
    "guide",
    "mixture",
    "product",
    "temper",
]
