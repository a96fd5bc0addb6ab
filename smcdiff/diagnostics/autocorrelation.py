"""Split chains, their potential scale reduction, and their effective sample size, many dimensions side by side.

With M half chains of n draws, W the mean of their variances, B / n the variance of their means and V = W (n-1)/n + B/n:

    R-hat = sqrt(V / W),      rho_t = 1 - (W - mean over chains of the autocovariance at lag t) / V,
    ESS = M n / tau,          tau = -1 + 2 (P_0 + ... + P_{k-1}) + rho_{2k},     P_j = rho_{2j} + rho_{2j+1},

where k is the first j with P_j <= 0 (Geyer's initial positive sequence), where every P_j is lowered to the least
before it (his initial monotone sequence), where rho_2k counts if it is positive or P_k = 0, and where tau is at least
1 / log10(M n). Details are ArviZ's, so that the numbers are.

Sources: Vehtari et al., arXiv 1903.08008; Geyer, "Practical Markov chain Monte Carlo", Statistical Science 7 (1992).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.fft import next_fast_len

__all__ = ["effective_sample_size", "scale_reduction", "split"]


def split(x: Float[Array, "b C N"]) -> Float[Array, "b 2*C half"]:
    """Each chain as its two halves, next to each other; the middle draw of an odd number is left out."""
    size, chains, draws = x.shape
    half = draws // 2
    if draws % 2:
        numbers = np if isinstance(x, np.ndarray) else jnp
        x = numbers.concatenate([x[..., :half], x[..., -half:]], axis=-1)
    return x.reshape(size, 2 * chains, half)


def scale_reduction(chains: Float[Array, "b M n"]) -> Float[Array, " b"]:
    """R-hat of chains that are split already; NaN where no chain moves and all are at one place."""
    draws = chains.shape[-1]
    between = draws * jnp.var(jnp.mean(chains, axis=-1), axis=-1, ddof=1)
    within = jnp.mean(jnp.var(chains, axis=-1, ddof=1), axis=-1)
    return jnp.sqrt((between / within + draws - 1) / draws)


def effective_sample_size(
    chains: Float[Array, "b M n"], is_constant: Bool[Array, " b"]
) -> Float[Array, " b"]:
    """Effective sample size of chains that are split already; M n where all draws are said to be equal."""
    num_chains, draws = chains.shape[1:]
    size = num_chains * draws
    means = jnp.mean(chains, axis=-1)
    covariance = _autocovariance(chains - means[..., None])
    within = covariance[:, :1] * (draws / (draws - 1.0))
    total = covariance[:, :1] + jnp.var(means, axis=-1, ddof=1)[:, None]
    num_pairs = max(1, (draws - 1) // 2)  # ArviZ's loop ends there
    rho = 1 - (within - covariance[:, : 2 * num_pairs]) / total
    rho = rho.at[:, 0].set(1.0)
    even, odd = rho[:, ::2], rho[:, 1::2]
    pairs = even + odd
    is_positive = pairs > 0
    stop = jnp.where(jnp.all(is_positive, axis=-1), num_pairs - 1, jnp.argmin(is_positive, axis=-1))
    is_before = jax.lax.broadcasted_iota(stop.dtype, pairs.shape, 1) < stop[:, None]
    counted = jnp.sum(jnp.where(is_before, jax.lax.cummin(pairs, axis=1), 0), axis=-1)
    last_even, last_pair = (
        jnp.take_along_axis(array, stop[:, None], axis=-1)[:, 0] for array in (even, pairs)
    )
    last = jnp.where((last_even > 0) | (last_pair >= 0), last_even, 0)
    tau = jnp.maximum(-1 + 2 * counted + last, 1 / math.log10(size))
    ess = jnp.where(jnp.isnan(pairs[:, 0]), jnp.nan, size / tau)
    return jnp.where(is_constant, jnp.asarray(size, ess.dtype), ess)


def _autocovariance(centred):
    """Mean over chains of the autocovariances at all lags, (b, n), divided by n at every lag."""
    draws = centred.shape[-1]
    length = next_fast_len(2 * draws)
    waves = jnp.fft.rfft(centred, n=length, axis=-1)
    # The mean is taken of the spectra: one inverse transform serves all chains.
    power = jnp.mean((waves * jnp.conj(waves)).real, axis=1)
    return jnp.fft.irfft(power, n=length, axis=-1)[:, :draws] / draws
