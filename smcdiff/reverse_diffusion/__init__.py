"""Reverse diffusion Monte Carlo: sampling a bare density by diffusion, with evidence."""

from smcdiff.reverse_diffusion.path import RdmcPath, rdmc_path
from smcdiff.reverse_diffusion.sampler import RdmcParticle, rdmc
from smcdiff.reverse_diffusion.slips import slips

__all__ = ["RdmcParticle", "RdmcPath", "rdmc", "rdmc_path", "slips"]
