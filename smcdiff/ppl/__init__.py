"""Probabilistic programming: NumPyro models as targets, and diffusion models inside of NumPyro models."""

from smcdiff.ppl.diffusion_prior import DiffusionPrior
from smcdiff.ppl.infer import gibbs_sweep, infer
from smcdiff.ppl.particle_gibbs import ParticleGibbs
from smcdiff.ppl.sites import SiteLikelihood, local_twist
from smcdiff.ppl.target import NumPyroTarget, target_from_numpyro

__all__ = [
    "DiffusionPrior",
    "NumPyroTarget",
    "ParticleGibbs",
    "SiteLikelihood",
    "gibbs_sweep",
    "infer",
    "local_twist",
    "target_from_numpyro",
]
