"""Markov chain Monte Carlo kernels on any density: a marginal of a diffusion, a composition, or a bare function."""

from smcdiff.mcmc.hamiltonian import HamiltonianInfo, HamiltonianState, ghmc, hmc, uhmc
from smcdiff.mcmc.langevin import UnderdampedInfo, UnderdampedState, mala, ula, underdamped

__all__ = [
    "HamiltonianInfo",
    "HamiltonianState",
    "UnderdampedInfo",
    "UnderdampedState",
    "ghmc",
    "hmc",
    "mala",
    "uhmc",
    "ula",
    "underdamped",
]
