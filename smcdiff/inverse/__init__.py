"""Inverse problems y = A x + noise: measurement operators, noise models, and the two together with data."""

from smcdiff.inverse.noise import GaussianNoise
from smcdiff.inverse.operators import (
    LinearOperator,
    blur,
    crop_box,
    dense,
    downsample,
    gaussian_blur,
    identity,
    linear,
    mask,
    random_mask,
)
from smcdiff.inverse.problem import InverseProblem, simulate_problem

__all__ = [
    "GaussianNoise",
    "InverseProblem",
    "LinearOperator",
    "blur",
    "crop_box",
    "dense",
    "downsample",
    "gaussian_blur",
    "identity",
    "linear",
    "mask",
    "random_mask",
    "simulate_problem",
]
