"""What a twist is, and what all twists of linear-Gaussian measurements need."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.density import DiffusionModel
from smcdiff.inverse import InverseProblem

__all__ = ["Twist", "TwistValue", "log_twist", "tweedie_scale", "whitened_apply", "whitened_residual"]


class TwistValue(NamedTuple):
    """A twist at one noisy sample.

    Attributes
    ----------
    denoised
        E[x_0 | x_t], shape ``event_shape``.
    shift
        What the measurement adds to it, (sigma^2/alpha) grad log psi_t, shape ``event_shape``.
    log_twist
        log psi_t(x_t).
    """

    denoised: Float[Array, "*event"]
    shift: Float[Array, "*event"]
    log_twist: Float[Array, ""]


Twist = Callable[[DiffusionModel, InverseProblem, Float[Array, "*event"], Float[Array, ""]], TwistValue]


class _LogTwist(eqx.Module):
    function: Callable

    def __call__(self, model, problem, x, t):
        def value(x):
            denoised = model.denoise(x, t)
            return self.function(problem, denoised, t), denoised

        (log_psi, denoised), gradient = jax.value_and_grad(value, has_aux=True)(x)
        return TwistValue(denoised, tweedie_scale(model, t) * gradient, log_psi)


def log_twist(function: Callable) -> Twist:
    """Make a twist of a function of the denoised sample.

    Parameters
    ----------
    function
        ``function(problem, denoised, t) -> log psi``, a scalar; differentiable in ``denoised``.
    """
    return _LogTwist(function)


def whitened_apply(problem, x):
    """A x in deviations of the noise."""
    return problem.operator(x) / jnp.sqrt(problem.noise.variance(problem.y.shape))


def whitened_residual(problem, x):
    """Residual (y - A x) / std, and the adjoint v -> A^T (v / std)."""
    std = jnp.sqrt(problem.noise.variance(problem.y.shape))
    return problem.residual(x) / std, lambda v: problem.operator.adjoint(v / std)


def tweedie_scale(model, t):
    """sigma^2/alpha, which turns the Jacobian of the denoiser into a covariance."""
    return model.schedule.sigma(t) ** 2 / model.schedule.alpha(t)
