"""The ancestral step with its density, and that of the noising step back.

Of the noise deviation sigma of x_t, the noising step from s to t adds the share sqrt(l), l = 1 - k^2, where
k = alpha_t sigma_s / (alpha_s sigma_t) is kept. The step from t to s, with the score at t, is

    F(x_s | x_t) = N(rho (x_t + l sigma^2 score), rho^2 l w^2 sigma^2 I),      rho = alpha_s / alpha_t,
    w^2 = k^2 + l u,                                                        u sigma^2 / alpha_t^2 = Var[x_0 | x_t],

averaged over coordinates: what is unknown of the denoised sample widens F, so that it has the right mean and variance
at any step. The step back is B(x_t | x_s) = N(x_s / rho, l sigma^2 I).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.schedules import Schedule

__all__ = ["ancestral_step"]


def ancestral_step(
    schedule: Schedule,
    x: Float[Array, "*event"],
    score: Float[Array, "*event"],
    unknown: Float[Array, ""],
    t: Float[Array, ""],
    s: Float[Array, ""],
    noise: Float[Array, "*event"],
    std: Float[Array, ""],
) -> tuple[Float[Array, "*event"], Float[Array, ""]]:
    """The sample x_s, and log B(x_t | x_s) - log F(x_s | x_t).

    Parameters
    ----------
    schedule
        The forward process.
    x, score
        x_t, and the score there.
    unknown
        u: variance of the denoised sample over that of the noise, both in units of x_0.
    t, s
        Times with s < t.
    noise
        Standard normal.
    std
        Deviation of the noise at t: sigma_t, or what takes its place along a composed path.
    """
    ratio = schedule.alpha(s) / schedule.alpha(t)
    kept = schedule.sigma(s) / (ratio * schedule.sigma(t))
    lost = (1.0 - kept) * (1.0 + kept)
    width = jnp.sqrt(kept**2 + lost * unknown)
    x_s = ratio * (x + std * (lost * std * score + jnp.sqrt(lost) * width * noise))
    # x_t - x_s / ratio in deviations of B, without cancellation.
    residual = jnp.sqrt(lost) * std * score + width * noise
    return x_s, 0.5 * jnp.sum(noise**2 - residual**2) + x.size * jnp.log(ratio * width)
