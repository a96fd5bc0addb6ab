"""The saddlepoint twist: the likelihood of a noisy sample from the denoiser at tilted noisy samples.

A shift of the noisy sample tilts what it says of x_0: with c = sigma^2/alpha, exactly

    p(x_0 | x_t = x + c lambda)  is proportional to  p(x_0 | x_t = x) exp(lambda . x_0).

So the denoiser at shifted points is the gradient of the cumulant function F(lambda) = log E[exp(lambda . x_0) | x_t],
and all of p(A x_0 | x_t) is within its reach. In whitened units (R = I), with lambda = A^T eta,

    G(eta) = F(A^T eta) - eta . y + |eta|^2/2,        grad G = A x0_hat(x + c A^T eta) + eta - y,
    log p(y | x_t) ~ min G - log det(2 pi grad^2 G)/2, at the minimum of G, which is convex.

The minimum is sought from eta = 0 by Newton steps towards measurements between A x0_hat and y. At every point of that
path the moments under the tilt give a Gaussian, and it an approximation of p(y | x_t): `moment_matching` at eta = 0,
the saddlepoint approximation at the minimum, exact at all of them for Gaussian data. The largest one is taken: where
x_0 | x_t has several modes, a tilt into another mode than that of y puts y far into the tail of a narrow Gaussian.
The shift is that Gaussian's too, and needs one Jacobian-vector product.

Source: the saddlepoint approximation of Daniels, "Saddlepoint approximations in statistics", Ann. Math. Statist. 25
(1954), applied to Tweedie's formula, whose tilting property is in Efron, "Tweedie's formula and selection bias",
JASA 106 (2011).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from smcdiff.guidance.moments import positive_part
from smcdiff.guidance.twist import Twist, TwistValue, tweedie_scale, whitened_apply, whitened_residual
from smcdiff.inverse import InverseProblem

__all__ = ["saddlepoint", "twist_at_saddlepoint"]


_RELIABLE = 0.3  # nats of the fourth-order term up to which it is trusted


class _Saddlepoint(eqx.Module):
    num_steps: int = eqx.field(static=True)

    def __call__(self, model, problem, x, t):
        scale = tweedie_scale(model, t)
        basis = jnp.eye(problem.y.size, dtype=x.dtype).reshape(-1, *problem.y.shape)

        def evaluate(eta):
            _, adjoint = whitened_residual(problem, x)
            shifted = x + scale * adjoint(eta.reshape(problem.y.shape))
            denoised, pull = jax.vjp(lambda x: model.denoise(x, t), shifted)
            residual, _ = whitened_residual(problem, denoised)
            columns = jax.vmap(lambda row: scale * pull(adjoint(row))[0])(basis)
            covariance = jax.vmap(lambda column: whitened_apply(problem, column).reshape(-1))(columns)
            hessian = jnp.eye(len(basis), dtype=x.dtype) + positive_part(covariance)
            return denoised, eta - residual.reshape(-1), hessian

        return twist_at_saddlepoint(evaluate, problem, self.num_steps)


def twist_at_saddlepoint(evaluate: Callable, problem: InverseProblem, num_steps: int) -> TwistValue:
    """Follow G to its minimum, and return the twist there.

    Parameters
    ----------
    evaluate
        ``evaluate(eta) -> (denoised, gradient, hessian)``: the denoised sample under the tilt ``eta`` of shape (m,),
        gradient (m,) and Hessian (m, m) of G.
    problem
        Measurement of m entries, and noise.
    num_steps
        See `saddlepoint`.
    """
    size, dtype = problem.y.size, problem.y.dtype
    zero = jnp.zeros(size, dtype)
    untilted, first_gradient, first_hessian = evaluate(zero)

    def under_tilt(eta, value, gradient, hessian):
        """Log psi, up to a constant, of the Gaussian with the moments under the tilt."""
        factor = jnp.linalg.cholesky(hessian)
        to_minimum = -jax.scipy.linalg.cho_solve((factor, True), gradient)
        log_psi = value + 0.5 * gradient @ to_minimum - jnp.sum(jnp.log(jnp.diag(factor)))
        return log_psi, eta, to_minimum

    def follow(carry, remaining):
        """One Newton step towards the point where the gradient is the share ``remaining`` of the first one."""
        (eta, value, gradient, hessian), best = carry
        target = gradient - remaining * first_gradient
        step = -jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian), True), target)
        _, new_gradient, new_hessian = evaluate(eta + step)
        # The integral of the gradient along the step, to fourth order; after a jump from mode to mode, where that is
        # a guess, the tangent, below which a convex function never is.
        correction = step @ (hessian - new_hessian) @ step / 12.0
        integral = 0.5 * step @ (gradient + new_gradient) + correction
        value += jnp.where(jnp.abs(correction) < _RELIABLE, integral, step @ gradient)
        new = (eta + step, value, new_gradient, new_hessian)
        candidate = under_tilt(*new)
        better = candidate[0] > best[0]
        return (new, jax.tree.map(lambda a, b: jnp.where(better, a, b), candidate, best)), None

    # From y = A x0_hat to the measured y in equal steps, then once more to settle.
    remaining = jnp.append(1.0 - jnp.arange(1, num_steps + 1, dtype=dtype) / num_steps, 0.0)
    start = (zero, jnp.zeros((), dtype), first_gradient, first_hessian)
    (_, (log_psi, eta, to_minimum)), _ = jax.lax.scan(follow, (start, under_tilt(*start)), remaining)

    tilted, correction = jax.jvp(lambda eta: evaluate(eta)[0], (eta,), (to_minimum,))
    log_psi -= 0.5 * jnp.sum(jnp.log(2 * jnp.pi * problem.noise.variance(problem.y.shape)))
    return TwistValue(untilted, tilted + correction - untilted, log_psi)


def saddlepoint(num_steps: int = 4) -> Twist:
    """Twist by the saddlepoint approximation of p(y | x_t), for exact models and few measurements.

    Costs num_steps + 2 evaluations of the denoiser with one vector-Jacobian product for each measurement, and one more
    evaluation with a Jacobian-vector product.

    Parameters
    ----------
    num_steps
        Steps along the path from the denoised sample's own measurement to ``y``, after which one more Newton step
        follows.

    Raises
    ------
    ValueError
        If ``num_steps`` is not a positive integer.

    Source: Daniels, "Saddlepoint approximations in statistics" (1954); Efron, "Tweedie's formula and selection bias"
    (2011).
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}.")
    return _Saddlepoint(num_steps)
