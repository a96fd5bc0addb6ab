"""Markov chain Monte Carlo kernels on any density: a marginal of a diffusion, a composition, or a bare function."""

from smcdiff.mcmc.affine_pool import AffinePool, affine_pool
from smcdiff.mcmc.auxiliary_gradient import AuxiliaryGradientInfo, AuxiliaryGradientState, auxiliary_gradient
from smcdiff.mcmc.blocks import GibbsInfo, exact_draw, gibbs
from smcdiff.mcmc.combinators import CycleInfo, MixtureInfo, PositionState, cycle, mixture
from smcdiff.mcmc.daps import DapsInfo, DapsState, daps
from smcdiff.mcmc.denoising_langevin_gibbs import (
    DenoisingLangevinGibbsInfo,
    DenoisingLangevinGibbsState,
    denoising_langevin_gibbs,
)
from smcdiff.mcmc.diffusive_gibbs import DiffusiveGibbsInfo, DiffusiveGibbsState, diffusive_gibbs
from smcdiff.mcmc.geodesic_slice import geodesic_slice
from smcdiff.mcmc.hamiltonian import HamiltonianInfo, HamiltonianState, ghmc, hmc, uhmc
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.mcmc.independence import IndependenceInfo, IndependenceState, independence
from smcdiff.mcmc.langevin import UnderdampedInfo, UnderdampedState, mala, ula, underdamped
from smcdiff.mcmc.levels import TemperedPath, TunedLevels, equal_rejection_levels, tempered, tune_levels
from smcdiff.mcmc.log_concave_chain import LogConcaveChainInfo, LogConcaveChainState, log_concave_chain
from smcdiff.mcmc.polar_slice import polar_slice, radial_polar_slice
from smcdiff.mcmc.restart import RestartInfo, RestartState, restart
from smcdiff.mcmc.slice_1d import SliceInfo, SliceState
from smcdiff.mcmc.split_gibbs import SplitGibbsInfo, SplitGibbsState, split_gibbs
from smcdiff.mcmc.tempering import ParallelTemperingInfo, ParallelTemperingState, parallel_tempering
from smcdiff.mcmc.walk_jump import WalkJumpInfo, walk_jump
from smcdiff.mcmc.warmup import WarmUp, adapt_step_size, window_adaptation

__all__ = [
    "AffinePool",
    "AuxiliaryGradientInfo",
    "AuxiliaryGradientState",
    "CycleInfo",
    "DapsInfo",
    "DapsState",
    "DenoisingLangevinGibbsInfo",
    "DenoisingLangevinGibbsState",
    "DiffusiveGibbsInfo",
    "DiffusiveGibbsState",
    "GibbsInfo",
    "HamiltonianInfo",
    "HamiltonianState",
    "IndependenceInfo",
    "IndependenceState",
    "LogConcaveChainInfo",
    "LogConcaveChainState",
    "MixtureInfo",
    "ParallelTemperingInfo",
    "ParallelTemperingState",
    "PositionState",
    "RestartInfo",
    "RestartState",
    "SliceInfo",
    "SliceState",
    "SplitGibbsInfo",
    "SplitGibbsState",
    "TemperedPath",
    "TunedLevels",
    "UnderdampedInfo",
    "UnderdampedState",
    "WalkJumpInfo",
    "WarmUp",
    "adapt_step_size",
    "affine_pool",
    "auxiliary_gradient",
    "cycle",
    "daps",
    "denoising_langevin_gibbs",
    "diffusive_gibbs",
    "equal_rejection_levels",
    "exact_draw",
    "geodesic_slice",
    "ghmc",
    "gibbs",
    "hit_and_run_slice",
    "hmc",
    "independence",
    "log_concave_chain",
    "mala",
    "mixture",
    "parallel_tempering",
    "polar_slice",
    "radial_polar_slice",
    "restart",
    "split_gibbs",
    "tempered",
    "tune_levels",
    "uhmc",
    "ula",
    "underdamped",
    "walk_jump",
    "window_adaptation",
]
