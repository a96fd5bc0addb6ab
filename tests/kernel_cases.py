"""The catalogue of MCMC kernels; a new row brings its tests (tests/test_kernels.py).

A row's name begins with that of its builder. Steps are in units of the target's own leapfrog step, of which a half to
four fifths are accepted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from smcdiff import mcmc


class Kernel(NamedTuple):
    """A row: ``build(target, d, step)`` makes the algorithm for targets of the scale of tests/mcmc_targets.py."""

    build: Callable[[Any, int, float], Any]
    is_exact: bool = True  # leaves the target alone, whatever its step
    scores_only: bool = False  # runs on a target that has a score and nothing else
    rejects: bool = False  # has a Metropolis ratio, which the test is to reach
    is_flat: bool = False  # samples must be vectors
    up_to: int = 20  # dimensions in which a step still moves


def _mass(d):
    """An inverse mass matrix with correlations."""
    return np.diag(0.6 + np.arange(d) / d) + 0.15


class _Wide(eqx.Module):
    """A Gaussian law that covers the targets of two dimensions."""

    d: int = eqx.field(static=True)

    def sample(self, key):
        return 1.3 * jax.random.normal(key, (self.d,))

    def log_prob(self, x):
        return -0.5 * jnp.sum((x / 1.3) ** 2)


class _Joined(NamedTuple):
    position: Any
    blocks: Any


def _gibbs(target, d, step):
    """Gibbs over the first coordinate and the rest, which its dictionary holds; samples are vectors."""
    blocks = {"first": Partial(_mala, 0.8 * step**2), "rest": Partial(_hmc, 1.1 * step)}
    algorithm = mcmc.gibbs(Partial(_log_joint, target), blocks)
    return SamplingAlgorithm(Partial(_init, algorithm), Partial(_step, algorithm))


def _mala(h, density):
    return mcmc.mala(density, h)


def _hmc(step, density):
    return mcmc.hmc(density, step, 2)


def _log_joint(target, x):
    return target.logdensity(_join(x))


def _join(x):
    return jnp.concatenate([x["first"], x["rest"]])


def _init(algorithm, position, rng_key):
    return _Joined(position, algorithm.init({"first": position[:1], "rest": position[1:]}, rng_key))


def _step(algorithm, rng_key, state):
    blocks, info = algorithm.step(rng_key, state.blocks)
    return _Joined(_join(blocks.position), blocks), info


KERNELS = {
    "ula": Kernel(lambda target, d, step: mcmc.ula(target, 0.2 * step**2), is_exact=False, scores_only=True),
    "mala": Kernel(lambda target, d, step: mcmc.mala(target, 0.5 * step**2), rejects=True),
    "mala, preconditioned": Kernel(
        lambda target, d, step: mcmc.mala(target, 0.4 * step**2, inverse_mass_matrix=_mass(d)), rejects=True
    ),
    "mala, line integral": Kernel(
        lambda target, d, step: mcmc.mala(target, 0.5 * step**2, accept="line_integral", num_nodes=8),
        scores_only=True,
        rejects=True,
    ),
    "hmc": Kernel(lambda target, d, step: mcmc.hmc(target, step, 3), rejects=True),
    "hmc, preconditioned": Kernel(
        lambda target, d, step: mcmc.hmc(target, step, 3, inverse_mass_matrix=jnp.linspace(0.5, 1.4, d)),
        rejects=True,
    ),
    "hmc, line integral": Kernel(
        lambda target, d, step: mcmc.hmc(target, step, 3, accept="line_integral", num_nodes=8),
        scores_only=True,
        rejects=True,
    ),
    "hmc, path integral": Kernel(
        lambda target, d, step: mcmc.hmc(target, 0.3 * step, 3, accept="path_integral"),
        is_exact=False,
        scores_only=True,
    ),
    "ghmc": Kernel(lambda target, d, step: mcmc.ghmc(target, step, persistence=0.7), rejects=True),
    "uhmc": Kernel(
        lambda target, d, step: mcmc.uhmc(target, 0.3 * step, 3, persistence=0.5),
        is_exact=False,
        scores_only=True,
    ),
    "underdamped": Kernel(
        lambda target, d, step: mcmc.underdamped(target, 0.3 * step, friction=1.5),
        is_exact=False,
        scores_only=True,
    ),
    "independence": Kernel(
        lambda target, d, step: mcmc.independence(target, _Wide(d)), rejects=True, is_flat=True, up_to=2
    ),
    "polar slice": Kernel(lambda target, d, step: mcmc.polar_slice(target, 3.0)),
    "polar slice, affine": Kernel(
        lambda target, d, step: mcmc.polar_slice(
            target, 2.0, center=jnp.linspace(-0.3, 0.4, d), covariance=_mass(d)
        )
    ),
    "hit and run slice": Kernel(lambda target, d, step: mcmc.hit_and_run_slice(target, 2.0)),
    "diffusive gibbs": Kernel(
        lambda target, d, step: mcmc.diffusive_gibbs(
            target,
            jnp.asarray([0.5, 0.9]),
            jnp.asarray([0.6, 0.4]),
            step_size=0.25 * step**2,
            num_mala_steps=2,
        ),
        rejects=True,
    ),
    "gibbs": Kernel(_gibbs, rejects=True, is_flat=True),
    "cycle": Kernel(
        lambda target, d, step: mcmc.cycle(
            [mcmc.mala(target, 0.7 * step**2), mcmc.hit_and_run_slice(target, 2.0)]
        ),
        rejects=True,
    ),
    "mixture": Kernel(
        lambda target, d, step: mcmc.mixture(
            [mcmc.hmc(target, step, 2), mcmc.ghmc(target, step)], jnp.asarray([0.7, 0.3])
        ),
        rejects=True,
    ),
}

# The leapfrog rows as they would be if they accepted everything: what the test must find.
NEVER_REJECT = {
    "hmc": lambda target, step: mcmc.uhmc(target, step, 3),
    "mala": lambda target, step: mcmc.ula(target, 0.5 * step**2),
    "ghmc": lambda target, step: mcmc.uhmc(target, step, 1, persistence=0.7),
}

# Builders that do not fit the catalogue, why, and the tests that have their laws instead.
EXEMPT = {
    "auxiliary_gradient": ("takes a diffusion model and a likelihood", "test_auxiliary_gradient.py"),
    "daps": ("the law moves with the noise level", "test_split_gibbs.py"),
    "denoising_langevin_gibbs": ("a law of samples and levels", "test_denoising_kernels.py"),
    "geodesic_slice": ("targets on the sphere", "test_slice.py"),
    "log_concave_chain": ("a law of measurements", "test_denoising_kernels.py"),
    "parallel_tempering": ("all replicas would start in the law of one level", "test_tempering.py"),
    "radial_polar_slice": ("targets of the radius alone", "test_slice.py"),
    "restart": ("takes a diffusion model, is biased by its grid", "test_denoising_kernels.py"),
    "split_gibbs": ("takes a diffusion model, is biased by its noise", "test_split_gibbs.py"),
    "walk_jump": ("takes a diffusion model, is the kernel that it is given", "test_denoising_kernels.py"),
}
