"""smcdiff: MCMC and SMC inference with diffusion models, in JAX.

A diffusion model is a path of densities p_t from data (t = 0) to noise (t = 1); samplers travel along paths.
"""

from smcdiff import (
    analytic,
    calibration,
    compose,
    diagnostics,
    estimators,
    guidance,
    inverse,
    mcmc,
    metrics,
    nets,
    plots,
    ppl,
    schedules,
    smc,
    targets,
    testing,
)
from smcdiff.analytic import EmpiricalDiffusion, GaussianDiffusion, GaussianMixtureDiffusion
from smcdiff.checkpoints import held_out, load, models
from smcdiff.diagnostics import diagnose
from smcdiff.diffusion import Diffusion, Marginal
from smcdiff.from_arviz import from_arviz
from smcdiff.inverse import InverseProblem
from smcdiff.mixture import GaussianMixture
from smcdiff.ode_density import ode_logdensity
from smcdiff.posterior import posterior
from smcdiff.ppl import DiffusionPrior, infer, target_from_numpyro
from smcdiff.reverse import reverse_sample, reverse_transition
from smcdiff.reverse_diffusion import rdmc, rdmc_path, slips
from smcdiff.run import Trace, run
from smcdiff.schedules import log_snr_times
from smcdiff.smc import (
    FeynmanKac,
    SMCResult,
    annealed_mcmc,
    bootstrap,
    fk_steering,
    fkc,
    mcgdiff,
    particle_gibbs,
    particle_marginal_mh,
    run_smc,
    svdd,
    tds,
)
from smcdiff.testing import check_invariance, check_properly_weighted, check_score
from smcdiff.to_arviz import to_arviz

__all__ = [
    "Diffusion",
    "DiffusionPrior",
    "EmpiricalDiffusion",
    "FeynmanKac",
    "GaussianDiffusion",
    "GaussianMixture",
    "GaussianMixtureDiffusion",
    "InverseProblem",
    "Marginal",
    "SMCResult",
    "Trace",
    "analytic",
    "annealed_mcmc",
    "bootstrap",
    "calibration",
    "check_invariance",
    "check_properly_weighted",
    "check_score",
    "compose",
    "diagnose",
    "diagnostics",
    "estimators",
    "fk_steering",
    "fkc",
    "from_arviz",
    "guidance",
    "held_out",
    "infer",
    "inverse",
    "load",
    "log_snr_times",
    "mcgdiff",
    "mcmc",
    "metrics",
    "models",
    "nets",
    "ode_logdensity",
    "particle_gibbs",
    "particle_marginal_mh",
    "plots",
    "posterior",
    "ppl",
    "rdmc",
    "rdmc_path",
    "reverse_sample",
    "reverse_transition",
    "run",
    "run_smc",
    "schedules",
    "slips",
    "smc",
    "svdd",
    "target_from_numpyro",
    "targets",
    "tds",
    "testing",
    "to_arviz",
]

__version__ = "0.1.0"
