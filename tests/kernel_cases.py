"""The catalogue of MCMC kernels; a new row brings its tests (tests/test_kernels.py)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from smcdiff import mcmc


class Kernel(NamedTuple):
    """A row: ``build(target, d)`` makes the algorithm for targets of the scale of tests/mcmc_targets.py."""

    build: Callable[[Any, int], Any]
    is_exact: bool = True  # leaves the target alone, whatever its step
    scores_only: bool = False  # runs on a target that has a score and nothing else


def _mass(d):
    """An inverse mass matrix with correlations."""
    return np.diag(0.6 + np.arange(d) / d) + 0.15


KERNELS = {
    "ula": Kernel(lambda target, d: mcmc.ula(target, 0.05), is_exact=False, scores_only=True),
    "mala": Kernel(lambda target, d: mcmc.mala(target, 0.15 / d ** (1 / 3))),
    "mala, preconditioned": Kernel(
        lambda target, d: mcmc.mala(target, 0.1 / d ** (1 / 3), inverse_mass_matrix=_mass(d))
    ),
    "mala, line integral": Kernel(
        lambda target, d: mcmc.mala(target, 0.1 / d ** (1 / 3), accept="line_integral", num_nodes=8),
        scores_only=True,
    ),
    "hmc": Kernel(lambda target, d: mcmc.hmc(target, 0.35 / d**0.25, 3)),
    "hmc, preconditioned": Kernel(
        lambda target, d: mcmc.hmc(target, 0.3 / d**0.25, 3, inverse_mass_matrix=jnp.linspace(0.5, 1.4, d))
    ),
    "hmc, line integral": Kernel(
        lambda target, d: mcmc.hmc(target, 0.3 / d**0.25, 3, accept="line_integral", num_nodes=8),
        scores_only=True,
    ),
    "hmc, path integral": Kernel(
        lambda target, d: mcmc.hmc(target, 0.1, 3, accept="path_integral"), is_exact=False, scores_only=True
    ),
    "ghmc": Kernel(lambda target, d: mcmc.ghmc(target, 0.5 / d**0.25, persistence=0.7)),
    "uhmc": Kernel(
        lambda target, d: mcmc.uhmc(target, 0.1, 3, persistence=0.5), is_exact=False, scores_only=True
    ),
    "underdamped": Kernel(
        lambda target, d: mcmc.underdamped(target, 0.1, friction=1.5), is_exact=False, scores_only=True
    ),
    "polar slice": Kernel(lambda target, d: mcmc.polar_slice(target, 3.0)),
    "polar slice, affine": Kernel(
        lambda target, d: mcmc.polar_slice(
            target, 2.0, center=jnp.linspace(-0.3, 0.4, d), covariance=_mass(d)
        )
    ),
    "hit and run slice": Kernel(lambda target, d: mcmc.hit_and_run_slice(target, 2.0)),
    "diffusive gibbs": Kernel(
        lambda target, d: mcmc.diffusive_gibbs(
            target,
            jnp.asarray([0.5, 0.9]),
            jnp.asarray([0.6, 0.4]),
            step_size=0.1 / d ** (1 / 3),
            num_mala_steps=2,
        )
    ),
    "cycle": Kernel(
        lambda target, d: mcmc.cycle(
            [mcmc.mala(target, 0.15 / d ** (1 / 3)), mcmc.hit_and_run_slice(target, 2.0)]
        )
    ),
    "mixture": Kernel(
        lambda target, d: mcmc.mixture(
            [mcmc.hmc(target, 0.3 / d**0.25, 2), mcmc.ghmc(target, 0.4 / d**0.25)], jnp.asarray([0.7, 0.3])
        )
    ),
}
