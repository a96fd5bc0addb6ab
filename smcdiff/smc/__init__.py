"""Sequential Monte Carlo on Feynman-Kac models."""

from smcdiff.smc.annealed import TunedStepSizes, annealed_mcmc, tune_step_sizes
from smcdiff.smc.bootstrap import bootstrap
from smcdiff.smc.conditional import (
    ParticleGibbsInfo,
    ParticleGibbsState,
    Trajectory,
    conditional_multinomial,
    conditional_systematic,
    particle_gibbs,
)
from smcdiff.smc.drift import fit_drift
from smcdiff.smc.feynman_kac import FeynmanKac, Innovations, Move, SMCInfo, SMCState, smc
from smcdiff.smc.fkc import fkc
from smcdiff.smc.marginal_mh import MarginalMHInfo, MarginalMHState, particle_marginal_mh
from smcdiff.smc.mcgdiff import mcgdiff
from smcdiff.smc.moves import mala_moves, mcmc_moves
from smcdiff.smc.prior_chain import ChainParticle
from smcdiff.smc.resampling import (
    killing,
    multinomial,
    resample_from_log_weights,
    residual,
    ssp,
    stratified,
    systematic,
)
from smcdiff.smc.result import SMCResult, run_smc
from smcdiff.smc.steering import SteeredParticle, fk_steering, jax_reward
from smcdiff.smc.svdd import DecodedParticle, svdd
from smcdiff.smc.tempered_marginal import tempered_marginal
from smcdiff.smc.twisted import TwistedParticle, tds
from smcdiff.smc.weights import effective_sample_size

__all__ = [
    "ChainParticle",
    "DecodedParticle",
    "FeynmanKac",
    "Innovations",
    "MarginalMHInfo",
    "MarginalMHState",
    "Move",
    "ParticleGibbsInfo",
    "ParticleGibbsState",
    "SMCInfo",
    "SMCResult",
    "SMCState",
    "SteeredParticle",
    "Trajectory",
    "TunedStepSizes",
    "TwistedParticle",
    "annealed_mcmc",
    "bootstrap",
    "conditional_multinomial",
    "conditional_systematic",
    "effective_sample_size",
    "fit_drift",
    "fk_steering",
    "fkc",
    "jax_reward",
    "killing",
    "mala_moves",
    "mcgdiff",
    "mcmc_moves",
    "multinomial",
    "particle_gibbs",
    "particle_marginal_mh",
    "resample_from_log_weights",
    "residual",
    "run_smc",
    "smc",
    "ssp",
    "stratified",
    "svdd",
    "systematic",
    "tds",
    "tempered_marginal",
    "tune_step_sizes",
]
