"""The twist with the posterior covariance of the prior, by Tweedie's formula."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from smcdiff.guidance.twist import Twist, TwistValue, tweedie_scale, whitened_apply, whitened_residual

__all__ = ["moment_matching", "positive_part"]


class _MomentMatching(eqx.Module):
    rank: int | None = eqx.field(static=True)

    def __call__(self, model, problem, x, t):
        denoised, pull = jax.vjp(lambda x: model.denoise(x, t), x)
        residual, adjoint = whitened_residual(problem, denoised)
        scale = tweedie_scale(model, t)

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


def _gaussian_twist(problem, denoised, residual, basis, columns, rest):
    """Twist from the rows ``basis`` (r, *y) of measured directions and their ``columns`` C A^T basis (r, *event).

    Directions outside the basis have the variance 1 + ``rest``.
    """
    rank = len(basis)
    rows = basis.reshape(rank, -1)
    inside = jax.vmap(lambda column: rows @ whitened_apply(problem, column).reshape(-1))(columns)
    factor = jnp.linalg.cholesky(jnp.eye(rank, dtype=rows.dtype) + positive_part(inside))
    flat = residual.reshape(-1)
    projected = rows @ flat
    solved = jax.scipy.linalg.cho_solve((factor, True), projected)
    outside = jnp.sum(flat**2) - jnp.sum(projected**2)
    quadratic = projected @ solved + outside / (1.0 + rest)
    log_det = 2.0 * jnp.sum(jnp.log(jnp.diag(factor))) + (flat.size - rank) * jnp.log1p(rest)
    log_scale = jnp.sum(jnp.log(problem.noise.variance(residual.shape)))
    log_psi = -0.5 * (quadratic + log_det + log_scale + flat.size * jnp.log(2 * jnp.pi))
    return TwistValue(denoised, jnp.tensordot(solved, columns, axes=1), log_psi)


@jax.custom_jvp
def positive_part(matrix):
    """Nearest positive semi-definite symmetric matrix: a network's Jacobian is neither.

    Its derivative is that of the whole (Daleckii and Krein), which exists where eigenvalues are equal, and their own do
    not.
    """
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * jnp.maximum(values, 0.0)[None]) @ vectors.T


@positive_part.defjvp
def _positive_part_jvp(primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    kept, size = jnp.maximum(values, 0.0), jnp.abs(values)
    # (f(a) - f(b)) / (a - b) of f(a) = max(a, 0), written without the difference.
    total = size[:, None] + size[None]
    slopes = jnp.where(total > 0, (kept[:, None] + kept[None]) / jnp.where(total > 0, total, 1.0), 0.5)
    inner = vectors.T @ (0.5 * (tangent + tangent.T)) @ vectors
    return (vectors * kept[None]) @ vectors.T, vectors @ (slopes * inner) @ vectors.T


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
        direction = whitened_apply(problem, columns[-1]).reshape(-1)
    basis = jnp.stack(rows)
    # One fixed probe of signs, orthogonal to the basis, estimates the mean variance of the other directions.
    probe = jax.random.rademacher(jax.random.key(0), (size,), residual.dtype)
    probe = probe - (basis @ probe) @ basis
    spread = probe @ whitened_apply(problem, covariance(probe.reshape(shape))).reshape(-1)
    rest = jnp.maximum(spread / jnp.maximum(probe @ probe, 1.0), 0.0)
    return basis.reshape(rank, *shape), jnp.stack(columns), rest
