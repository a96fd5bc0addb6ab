"""Weights in and out: pretrained models with their cards, and trees of arrays in safetensors files.

model = smcdiff.checkpoints.load("mnist")          # a Diffusion
images, labels = smcdiff.checkpoints.held_out("mnist")
"""

from smcdiff.checkpoints.arrays import load_arrays, save_arrays
from smcdiff.checkpoints.cards import build_model, held_out, load, models, save_model

__all__ = ["build_model", "held_out", "load", "load_arrays", "models", "save_arrays", "save_model"]
