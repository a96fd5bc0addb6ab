"""Probabilistic programming: NumPyro models as targets, and diffusion models inside of NumPyro models."""

from smcdiff.ppl.auxiliary_gradient import AuxiliaryGradient
from smcdiff.ppl.diffusion_prior import DiffusionPrior
from smcdiff.ppl.infer import gibbs_sweep, infer
from smcdiff.ppl.infer_smc import infer_smc
from smcdiff.ppl.kernel import as_numpyro_kernel
from smcdiff.ppl.marginal import MarginalModel, marginalize
from smcdiff.ppl.noncentered import NoncenteredModel, noise_slice, noncenter
from smcdiff.ppl.particle_gibbs import ParticleGibbs
from smcdiff.ppl.particle_marginal import ParticleMarginal
from smcdiff.ppl.proposal import LearnedProposal, learn_proposal
from smcdiff.ppl.sites import SiteLikelihood, local_twist
from smcdiff.ppl.split_gibbs import SplitGibbs
from smcdiff.ppl.target import NumPyroTarget, target_from_numpyro

__all__ = [
    "AuxiliaryGradient",
    "DiffusionPrior",
    "LearnedProposal",
    "MarginalModel",
    "NoncenteredModel",
    "NumPyroTarget",
    "ParticleGibbs",
    "ParticleMarginal",
    "SiteLikelihood",
    "SplitGibbs",
    "as_numpyro_kernel",
    "gibbs_sweep",
    "infer",
    "infer_smc",
    "learn_proposal",
    "local_twist",
    "marginalize",
    "noise_slice",
    "noncenter",
    "target_from_numpyro",
]
