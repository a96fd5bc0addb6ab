"""Markov chain Monte Carlo kernels on any density: a marginal of a diffusion, a composition, or a bare function."""

from smcdiff.mcmc.annealed import TunedStepSizes, annealed_mcmc, tune_step_sizes
from smcdiff.mcmc.hamiltonian import HamiltonianInfo, HamiltonianState, ghmc, hmc, uhmc
from smcdiff.mcmc.langevin import UnderdampedInfo, UnderdampedState, mala, ula, underdamped

__all__ = [
    "HamiltonianInfo",
    "HamiltonianState",
    "TunedStepSizes",
    "UnderdampedInfo",
    "UnderdampedState",
    "annealed_mcmc",
    "ghmc",
    "hmc",
    "mala",
    "tune_step_sizes",
    "uhmc",
    "ula",
    "underdamped",
]
