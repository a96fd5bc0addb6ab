"""Inverse problems y = A x + noise: measurement operators, noise models, and the two together with data."""

from smcdiff.inverse.filters import blur, downsample, gaussian_blur
from smcdiff.inverse.masks import crop_box, mask, random_mask
from smcdiff.inverse.noise import GaussianNoise
from smcdiff.inverse.operators import LinearOperator, dense, identity, linear
from smcdiff.inverse.problem import InverseProblem, simulate_problem, unobserved

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
    "unobserved",
]
