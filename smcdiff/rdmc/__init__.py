"""Reverse diffusion Monte Carlo: sampling a bare density by diffusion, with evidence."""

from smcdiff.rdmc.path import RdmcPath, rdmc_path
from smcdiff.rdmc.sampler import RdmcParticle, rdmc
from smcdiff.rdmc.slips import slips

__all__ = ["RdmcParticle", "RdmcPath", "rdmc", "rdmc_path", "slips"]
