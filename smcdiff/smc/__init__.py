"""Sequential Monte Carlo on Feynman-Kac models."""

from smcdiff.smc.feynman_kac import FeynmanKac, SMCInfo, SMCState, effective_sample_size, smc
from smcdiff.smc.resampling import multinomial, resample_from_log_weights, residual, stratified, systematic
from smcdiff.smc.result import SMCResult, run_smc
from smcdiff.smc.twisted import TwistedParticle, tds

__all__ = [
    "FeynmanKac",
    "SMCInfo",
    "SMCResult",
    "SMCState",
    "TwistedParticle",
    "effective_sample_size",
    "multinomial",
    "resample_from_log_weights",
    "residual",
    "run_smc",
    "smc",
    "stratified",
    "systematic",
    "tds",
]
