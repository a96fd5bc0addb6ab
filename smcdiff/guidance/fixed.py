"""Twists whose covariance depends on the time alone: diffusion posterior sampling and its pseudoinverse version."""

import jax
import jax.numpy as jnp

from smcdiff.guidance.twist import TwistValue, tweedie_scale, whitened_apply, whitened_residual

__all__ = ["dps", "pigdm"]


def dps(model, problem, x, t) -> TwistValue:
    """Twist N(y; A x0_hat, R), which takes the denoised sample for certain.

    Parameters
    ----------
    model, problem
        Prior and measurement.
    x
        One noisy sample x_t.
    t
        Its time.

    Source: Chung et al., "Diffusion Posterior Sampling", arXiv 2209.14687.
    """
    denoised, pull = jax.vjp(lambda x: model.denoise(x, t), x)
    log_twist_value, gradient = jax.value_and_grad(problem.log_likelihood)(denoised)
    return TwistValue(denoised, tweedie_scale(model, t) * pull(gradient)[0], log_twist_value)


def pigdm(model, problem, x, t) -> TwistValue:
    """Twist N(y; A x0_hat, R + r_t^2 A A^T), r_t^2 = sigma^2/(alpha^2 + sigma^2).

    The linear system is solved by conjugate gradients. The determinant, which no sample changes, is left out: it
    cancels from every weight and from the evidence.

    Parameters
    ----------
    model, problem
        Prior and measurement.
    x
        One noisy sample x_t.
    t
        Its time.

    Source: Song et al., "Pseudoinverse-Guided Diffusion Models for Inverse Problems", ICLR 2023.
    """
    denoised, pull = jax.vjp(lambda x: model.denoise(x, t), x)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    spread = sigma**2 / (alpha**2 + sigma**2)
    residual, adjoint = whitened_residual(problem, denoised)

    def matvec(v):
        return v + spread * whitened_apply(problem, adjoint(v))

    solution, _ = jax.scipy.sparse.linalg.cg(matvec, residual, maxiter=50)
    shift = tweedie_scale(model, t) * pull(adjoint(solution))[0]
    return TwistValue(denoised, shift, -0.5 * jnp.sum(residual * solution))
