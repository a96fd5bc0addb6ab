"""Walk-jump: a Markov chain walks on noisy samples, and each of them jumps to its denoised sample.

At a noise level t at which p_t is smooth and its modes run together, any kernel mixes. The jump

    x0_hat = E[x_0 | x_t] = (x_t + sigma^2 grad log p_t(x_t)) / alpha

takes no part in the walk, so it is as good at the thousandth step as at the first. The walk is exact for p_t if its
kernel is; the jumps have the mean of p_0 then, but a smaller spread: Cov[x0_hat] = Cov[x_0] - E Cov[x_0 | x_t].

Sources: Saremi and Hyvarinen, "Neural Empirical Bayes", arXiv 1903.02334; Frey et al., "Protein Discovery with Discrete
Walk-Jump Sampling", arXiv 2306.12360.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from smcdiff.density import DiffusionModel, require, warn_unless_diffusion

__all__ = ["WalkJumpInfo", "walk_jump"]


class WalkJumpInfo(NamedTuple):
    """What happened in one step of the walk, and its jump.

    Attributes
    ----------
    denoised
        E[x_0 | x_t] at the new noisy sample, of shape ``event_shape``.
    acceptance_rate
        That of the walk; 1 if its kernel reports none.
    walk
        All that the walk's kernel reports.
    """

    denoised: Float[Array, "*event"]
    acceptance_rate: Float[Array, ""]
    walk: PyTree


class _Kernel(eqx.Module):
    model: DiffusionModel
    t: Float[Array, ""]
    algorithm: SamplingAlgorithm


def walk_jump(
    model: DiffusionModel, t: Float[Array, ""] | float, kernel: Callable[[Any], SamplingAlgorithm]
) -> SamplingAlgorithm:
    """Walk on p_t with any kernel, and report each sample denoised.

    Keep the jumps of a run with ``transform=keep_denoised``, where ``keep_denoised(state, info)`` returns
    ``info.denoised``; they are in ``trace.info.denoised`` as well.

    Parameters
    ----------
    model
        Any diffusion model.
    t
        Noise level of the walk, in (0, 1].
    kernel
        ``kernel(target) -> SamplingAlgorithm`` on the density ``target``, for instance
        ``Partial(smcdiff.mcmc.underdamped, step_size=0.3)``.

    Returns
    -------
    SamplingAlgorithm, with the state of the walk's kernel, whose position is the noisy sample, and `WalkJumpInfo`.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser; or as ``kernel`` does.
    ValueError
        If ``t`` does not lie in (0, 1].

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.

    Source: Saremi and Hyvarinen, "Neural Empirical Bayes", arXiv 1903.02334.
    """
    require(model, DiffusionModel, "walk_jump")
    warn_unless_diffusion(model, "walk_jump")
    if not isinstance(t, jax.core.Tracer) and not 0.0 < t <= 1.0:
        raise ValueError(f"t must lie in (0, 1], got {t}.")
    t = jnp.asarray(t, float)
    algorithm = kernel(model.at(t))
    walker = _Kernel(model, t, algorithm)
    return SamplingAlgorithm(Partial(_init, walker), Partial(_step, walker))


def _init(kernel, position, rng_key):
    return kernel.algorithm.init(position, rng_key)


def _step(kernel, rng_key, state):
    """A step of the walk, and the jump from where it ends."""
    state, walk = kernel.algorithm.step(rng_key, state)
    denoised = kernel.model.denoise(state.position, kernel.t)
    acceptance = getattr(walk, "acceptance_rate", jnp.ones((), denoised.dtype))
    return state, WalkJumpInfo(denoised, acceptance, walk)
