"""Maximum mean discrepancy of a simulator whose noise is known, with the weights of Bayesian quadrature.

Samples are x_i = G(u_i), with u ~ U known and of few dimensions. Where x -> E_y k(x, y) is smooth in u, its mean over
the noise is integrated better with the weights

    w = (C + j I)^(-1) z,    C_ij = c(u_i, u_j),    z_i = E_U c(u_i, U),    c(u, v) = exp(-|u - v|^2 / (2 l^2)),

than with 1/n: MMD^2 = w^T K_xx w - 2 w^T mean K_xy + mean over i != j of K_yy. (The source takes all pairs of y;
without those of a point with itself the mean is that of the laws, as in `mmd`.) The weights need not be positive nor
sum to 1. With s noise entries,

    z_i = prod_j sqrt(2 pi) l (Phi((1 - u_ij)/l) - Phi(-u_ij/l))              U uniform on [0, 1]^s,
    z_i = (l^2/(l^2 + 1))^(s/2) exp(-|u_i|^2 / (2 (l^2 + 1)))                 U standard normal.

Source: Bharti et al., "Optimally-weighted Estimators of the Maximum Mean Discrepancy for Likelihood-Free Inference",
arXiv 2301.11674.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import pdist, squareform
from scipy.stats import norm

from smcdiff.batching import batched_map
from smcdiff.checks import check_positive
from smcdiff.metrics.distance import Distance, as_clouds, dot
from smcdiff.metrics.mmd import gaussian_kernel, median_bandwidth, reference_terms

__all__ = ["optimal_weights", "optimally_weighted_mmd"]


def optimally_weighted_mmd(
    x,
    y,
    noise,
    *,
    law: Literal["uniform", "normal"] = "normal",
    bandwidths=None,
    noise_length: float | None = None,
    jitter: float = 1e-8,
    batch_size: int | None = 256,
) -> Distance:
    """Squared discrepancy of a simulator to a reference, integrated over the simulator's noise by quadrature.

    The weights are found on the host in double precision, so this is not for use inside compiled code. Good for noise
    of few entries (up to about 4, with hundreds of samples): beyond, the weights are no better than 1/n. Not for noise
    that passes a resampling or an acceptance step, after which x is no smooth function of it.

    Parameters
    ----------
    x, y
        Samples (n, *event), one for each noise, and independent reference samples (m, *event).
    noise
        What the simulator drew, (n, *noise_shape).
    law
        Of the noise: "normal" is N(0, I), "uniform" is on [0, 1] in each entry.
    bandwidths
        As in `mmd`.
    noise_length
        l of the kernel on the noise. By default l^2 is half the median squared distance of the noises.
    jitter
        Added to the diagonal of C.
    batch_size
        Rows of the kernel matrix in memory together, or None for all.

    Returns
    -------
    MMD^2; its standard error over ``y`` alone, without the error of the quadrature; and its root mean square for a
    simulator that has the law of y, were the quadrature exact.

    Raises
    ------
    ValueError
        If shapes do not fit, or a number is not positive.
    """
    x, y = as_clouds(x, y)
    weights = jnp.asarray(optimal_weights(noise, law=law, length=noise_length, jitter=jitter), x.dtype)
    if len(weights) != len(x):
        raise ValueError(f"noise must have one entry a sample, {len(x)}, got {len(weights)}.")
    if bandwidths is None:
        bandwidths = median_bandwidth(y)
    check_positive("bandwidths", bandwidths)
    return _weighted(x, y, weights, jnp.atleast_1d(jnp.asarray(bandwidths, x.dtype)), batch_size)


def optimal_weights(
    noise, *, law: Literal["uniform", "normal"] = "normal", length: float | None = None, jitter: float = 1e-8
) -> Float[np.ndarray, " n"]:
    """Quadrature weights for functions of the noise: sum_i w_i f(u_i) estimates E f(U).

    Parameters
    ----------
    noise, law, length, jitter
        As in `optimally_weighted_mmd`, with ``length`` for ``noise_length``.
    """
    if law not in ("uniform", "normal"):
        raise ValueError(f'law must be "uniform" or "normal", got {law!r}.')
    u = np.asarray(noise, float)
    u = u.reshape(len(u), -1)
    squares = pdist(u, "sqeuclidean")
    length = np.sqrt(0.5 * np.median(squares)) if length is None else length
    check_positive("noise_length", length)
    check_positive("jitter", jitter)
    if law == "uniform":
        if u.min() < 0 or u.max() > 1:
            raise ValueError(f"uniform noise must lie in [0, 1], got [{u.min():.3g}, {u.max():.3g}].")
        masses = norm.cdf((1 - u) / length) - norm.cdf(-u / length)
        embedding = np.prod(np.sqrt(2 * np.pi) * length * masses, axis=1)
    else:
        shrink = length**2 / (length**2 + 1)
        embedding = shrink ** (u.shape[1] / 2) * np.exp(-np.sum(u**2, axis=1) / (2 * (length**2 + 1)))
    gram = squareform(np.exp(-squares / (2 * length**2))) + (1 + jitter) * np.eye(len(u))
    return cho_solve(cho_factor(gram), embedding)


@partial(jax.jit, static_argnames="batch_size")
def _weighted(x, y, weights, bandwidths, batch_size):
    def row(point):
        squares = jnp.sum((x - point[None]) ** 2, axis=1)
        return dot(gaussian_kernel(squares, bandwidths), weights)

    own, to_x = batched_map(row, batch_size)(x), batched_map(row, batch_size)(y)
    within, degenerate = reference_terms(y, bandwidths, batch_size)
    value = dot(own, weights) - jnp.mean(to_x) + jnp.mean(within - to_x)
    first_order = 4 * jnp.var(within - to_x, ddof=1) / len(y)
    variance = jnp.maximum(first_order - 2 * degenerate / len(y) ** 2, 0.5 * first_order)
    return Distance(value, jnp.sqrt(variance), jnp.sqrt(2 * degenerate) / len(y))
