"""Twists: approximations of the likelihood p(y | x_t) of a noisy sample.

For a linear-Gaussian measurement y ~ N(A x_0, R) a twist is a Gaussian in the residual r = y - A x0_hat(x_t),

    psi_t(x) = N(y; A x0_hat, V_t),        grad log psi_t = (d x0_hat/dx)^T A^T V_t^{-1} r,

V_t being held fixed under the gradient. They differ in V_t:

- `dps`: V = R;
- `pigdm`: V = R + r_t^2 A A^T with r_t^2 = sigma^2/(alpha^2 + sigma^2), exact for standard normal data;
- `moment_matching`: V = R + A C A^T with C = Cov[x_0|x_t] = (sigma^2/alpha) d x0_hat/dx, exact for Gaussian data. A C
  is found by one vector-Jacobian product for each measured direction, exactly for few measurements, and in a
  Krylov subspace plus an isotropic rest for many.

A twist is a callable ``twist(model, problem, x, t) -> TwistValue``; write your own, or wrap a function by
`log_twist`. Work is done in whitened units, A and r divided by the noise's deviation, so that R = I.

Sources: Chung et al., "Diffusion Posterior Sampling", arXiv 2209.14687 (dps); Song et al., "Pseudoinverse-Guided
Diffusion Models", ICLR 2023 (pigdm); Boys et al., "Tweedie Moment Projected Diffusions", arXiv 2310.06721, and Rozet
et al., "Learning Diffusion Priors from Observations by Expectation Maximization", arXiv 2405.13712 (moments).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.density import DiffusionModel
from smcdiff.diffusion import Diffusion
from smcdiff.inverse import InverseProblem

__all__ = ["Twist", "TwistValue", "default_twist", "dps", "log_twist", "moment_matching", "pigdm"]


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


def default_twist(model: DiffusionModel, problem: InverseProblem) -> Twist:
    """The twist that measured best for this kind of model and this number of measurements.

    Exact models get `moment_matching`, in full for up to 32 measurements and with rank 8 beyond. A network gets
    `pigdm`: the covariance (sigma^2/alpha) d x0_hat/dx multiplies the error of the network's Jacobian by the
    noise-to-signal ratio, and at high noise hardly anything else is left of it (pretrained digits, one inpainting
    problem, 64 particles, 100 steps: least ESS 1.0 with moment matching of rank 1, 2 or 4, and 6.8 with pigdm).

    Parameters
    ----------
    model, problem
        Prior and measurement.
    """
    if isinstance(model, Diffusion):
        return pigdm
    return moment_matching(None if problem.y.size <= _FEW_MEASUREMENTS else _RANK)


_FEW_MEASUREMENTS = 32
_RANK = 8


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
    return TwistValue(denoised, _tweedie_scale(model, t) * pull(gradient)[0], log_twist_value)


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
    residual, adjoint = _whitened_residual(problem, denoised)

    def matvec(v):
        return v + spread * _whitened_apply(problem, adjoint(v))

    solution, _ = jax.scipy.sparse.linalg.cg(matvec, residual, maxiter=50)
    shift = _tweedie_scale(model, t) * pull(adjoint(solution))[0]
    return TwistValue(denoised, shift, -0.5 * jnp.sum(residual * solution))


class _MomentMatching(eqx.Module):
    rank: int | None = eqx.field(static=True)

    def __call__(self, model, problem, x, t):
        denoised, pull = jax.vjp(lambda x: model.denoise(x, t), x)
        residual, adjoint = _whitened_residual(problem, denoised)
        scale = _tweedie_scale(model, t)

        def covariance(v):
            """C A^T v for a whitened measurement direction ``v``."""
            return scale * pull(adjoint(v))[0]

        size = residual.size
        if self.rank is None or self.rank >= size:
            basis = jnp.eye(size, dtype=residual.dtype).reshape(size, *residual.shape)
            columns = jax.vmap(covariance)(basis)
            rest = jnp.zeros((), residual.dtype)
        else:
            basis, columns, rest = _krylov(problem, covariance, residual, self.rank)
        return _gaussian_twist(problem, denoised, residual, basis, columns, rest)


def moment_matching(rank: int | None = None) -> Twist:
    """Twist N(y; A x0_hat, R + A C A^T) with the posterior covariance C of the prior, from Tweedie's formula.

    Parameters
    ----------
    rank
        Number of measured directions in which the covariance is exact, at one vector-Jacobian product each: None
        for all of them, which is right for up to some thirty measurements. With fewer, they span the Krylov space of
        the residual, where the shift lives, and all others share one variance, estimated by one more product.

    Raises
    ------
    ValueError
        If ``rank`` is not a positive integer or None.

    Source: Boys et al., "Tweedie Moment Projected Diffusions", arXiv 2310.06721; Rozet et al., arXiv 2405.13712.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank!r}.")
    return _MomentMatching(rank)


class _LogTwist(eqx.Module):
    function: Callable

    def __call__(self, model, problem, x, t):
        def value(x):
            denoised = model.denoise(x, t)
            return self.function(problem, denoised, t), denoised

        (log_psi, denoised), gradient = jax.value_and_grad(value, has_aux=True)(x)
        return TwistValue(denoised, _tweedie_scale(model, t) * gradient, log_psi)


def log_twist(function: Callable) -> Twist:
    """Make a twist of a function of the denoised sample.

    Parameters
    ----------
    function
        ``function(problem, denoised, t) -> log psi``, a scalar; differentiable in ``denoised``.
    """
    return _LogTwist(function)


def _gaussian_twist(problem, denoised, residual, basis, columns, rest):
    """Twist from the rows ``basis`` (r, *y) of measured directions and their ``columns`` C A^T basis (r, *event).

    Directions outside the basis have the variance 1 + ``rest``.
    """
    rank = len(basis)
    rows = basis.reshape(rank, -1)
    inside = jax.vmap(lambda column: rows @ _whitened_apply(problem, column).reshape(-1))(columns)
    factor = jnp.linalg.cholesky(jnp.eye(rank, dtype=rows.dtype) + _positive_part(inside))
    flat = residual.reshape(-1)
    projected = rows @ flat
    solved = jax.scipy.linalg.cho_solve((factor, True), projected)
    outside = jnp.sum(flat**2) - jnp.sum(projected**2)
    quadratic = projected @ solved + outside / (1.0 + rest)
    log_det = 2.0 * jnp.sum(jnp.log(jnp.diag(factor))) + (flat.size - rank) * jnp.log1p(rest)
    log_scale = jnp.sum(jnp.log(problem.noise.variance(residual.shape)))
    log_psi = -0.5 * (quadratic + log_det + log_scale + flat.size * jnp.log(2 * jnp.pi))
    return TwistValue(denoised, jnp.tensordot(solved, columns, axes=1), log_psi)


def _positive_part(matrix):
    """Nearest positive semi-definite symmetric matrix: a network's Jacobian is neither."""
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * jnp.maximum(values, 0.0)[None]) @ vectors.T


def _krylov(problem, covariance, residual, rank):
    """Orthonormal basis of the Krylov space of A C A^T at the residual, its columns, and the variance outside."""
    shape, size = residual.shape, residual.size
    direction = residual.reshape(-1)
    rows: list[Array] = []
    columns: list[Array] = []
    for _ in range(rank):
        for row in rows * 2:  # twice: Gram-Schmidt is not accurate at once
            direction = direction - (row @ direction) * row
        direction = direction / jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(direction.dtype).tiny)
        rows.append(direction)
        columns.append(covariance(direction.reshape(shape)))
        direction = _whitened_apply(problem, columns[-1]).reshape(-1)
    basis = jnp.stack(rows)
    # One fixed probe of signs, orthogonal to the basis, estimates the mean variance of the other directions.
    probe = jax.random.rademacher(jax.random.key(0), (size,), residual.dtype)
    probe = probe - (basis @ probe) @ basis
    spread = probe @ _whitened_apply(problem, covariance(probe.reshape(shape))).reshape(-1)
    rest = jnp.maximum(spread / jnp.maximum(probe @ probe, 1.0), 0.0)
    return basis.reshape(rank, *shape), jnp.stack(columns), rest


def _whitened_apply(problem, x):
    return problem.operator(x) / jnp.sqrt(problem.noise.variance(problem.y.shape))


def _whitened_residual(problem, x):
    """Residual (y - A x) / std, and the adjoint v -> A^T (v / std)."""
    std = jnp.sqrt(problem.noise.variance(problem.y.shape))
    return problem.residual(x) / std, lambda v: problem.operator.adjoint(v / std)


def _tweedie_scale(model, t):
    """sigma^2/alpha, which turns the Jacobian of the denoiser into a covariance."""
    return model.schedule.sigma(t) ** 2 / model.schedule.alpha(t)
