"""Reverse transitions of a diffusion model, and plain sampling with them.

One step from t to a cleaner time s, with the noise level eta between 0 (deterministic, DDIM) and 1 (ancestral):

    alpha_ts = alpha_t / alpha_s,   sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2,
    c^2      = eta^2 sigma_ts^2 sigma_s^2 / sigma_t^2,
    x_s      = alpha_s x0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c xi,

where x0_hat = E[x_0 | x_t] and eps_hat = (x_t - alpha_t x0_hat) / sigma_t. At s = 0 the step returns x0_hat.

That is the exact solution for a denoised sample that stays as it is over the step, and of first order. With the one of
the step before, x0_hat is extrapolated linearly in log-SNR; with a = 1 + eta^2, h the step in log-SNR and h' the one
before, the second-order step adds

    alpha_s (h - (1 - exp(-a h)) / a) (x0_hat - x0_hat') / h'.

Sources: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502; Lu et al., "DPM-Solver++", arXiv
2211.01095 (multistep).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.density import DiffusionModel, require, warn_unless_diffusion
from smcdiff.schedules import Schedule, check_times

__all__ = ["reverse_sample", "reverse_transition"]


def reverse_transition(
    schedule: Schedule,
    x: Float[Array, "*event"],
    x0: Float[Array, "*event"],
    t: Float[Array, ""],
    s: Float[Array, ""],
    eta: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, "*event"], Float[Array, ""]]:
    """Mean and standard deviation of the Gaussian step from x_t to x_s, s < t.

    Parameters
    ----------
    schedule
        The forward process.
    x
        The noisy sample x_t.
    x0
        The denoised sample E[x_0 | x_t], or a guided version of it.
    t, s
        Times with s < t.
    eta
        0 for DDIM, 1 for the ancestral step.

    Returns
    -------
    The mean, shaped like ``x``, and the scalar deviation.

    Source: "Denoising Diffusion Implicit Models", arXiv 2010.02502, Eq. 12 and 16.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (
        schedule.alpha(t),
        schedule.sigma(t),
        schedule.alpha(s),
        schedule.sigma(s),
    )
    kept = alpha_t * sigma_s / (alpha_s * sigma_t)  # share of x_t's noise that is x_s's own, in deviations
    std = eta * sigma_s * jnp.sqrt((1.0 - kept) * (1.0 + kept))
    # sigma_s^2 - std^2 as a sum of non-negative terms: the difference rounds below zero where kept is small.
    coefficient = sigma_s * jnp.sqrt((1.0 - eta) * (1.0 + eta) + (eta * kept) ** 2)
    eps = (x - alpha_t * x0) / sigma_t
    return alpha_s * x0 + coefficient * eps, std


def reverse_sample(
    rng_key: PRNGKeyArray,
    model: DiffusionModel,
    times: Float[Array, " steps"],
    num_samples: int,
    *,
    eta: float = 1.0,
    order: int = 1,
    batch_size: int | None = None,
) -> Float[Array, "n *event"]:
    """Draw samples from a diffusion model by reverse transitions.

    Parameters
    ----------
    rng_key
        Key.
    model
        The diffusion model.
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(model.schedule, 100)`.
    num_samples
        Number of independent samples.
    eta
        0 for the deterministic DDIM step, 1 for the ancestral step.
    order
        1, or 2 for the multistep rule, which needs no more evaluations: the error of the deterministic path then falls
        with the square of the step. With noise it is of first order in any case, but smaller.
    batch_size
        Samples denoised together; bounds memory and changes no result.

    Returns
    -------
    Samples of shape (num_samples, *event_shape).

    Raises
    ------
    TypeError
        If ``model`` has no denoiser.
    ValueError
        If ``times`` is not a grid from 1 to 0, or ``order`` is neither 1 nor 2; or 2 with ``eta`` between 0 and 1.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0; see `smcdiff.fkc`.

    Source: "Denoising Diffusion Implicit Models", arXiv 2010.02502; "DPM-Solver++", arXiv 2211.01095.
    """
    require(model, DiffusionModel, "reverse_sample")
    warn_unless_diffusion(model, "reverse_sample")
    times = check_times(times)
    if order not in (1, 2) or (order == 2 and eta not in (0, 1)):
        raise ValueError(f"order must be 1, or 2 with eta 0 or 1, got order={order!r} with eta={eta!r}.")
    return _sample(rng_key, model, times, eta, num_samples, batch_size, order)


def _sample_loop(rng_key, model, times, eta, num_samples, batch_size, order):
    schedule, dimension = model.schedule, math.prod(model.event_shape)
    shape = (num_samples, *model.event_shape)

    def step(carry, inputs):
        x, before = carry
        index, t, s = inputs
        # Drawn flat: on the CPU a narrow trailing axis makes the same numbers several times slower.
        noise = jax.random.normal(jax.random.fold_in(rng_key, index), (num_samples * dimension,), x.dtype)
        # The time stays out of the batch: what depends on it alone is computed once.
        x0 = batched_map(lambda x: model.denoise(x, t), batch_size)(x)
        mean, std = jax.vmap(
            lambda x, x0: reverse_transition(schedule, x, x0, t, s, eta), out_axes=(0, None)
        )(x, x0)
        if order == 2:
            earlier = times[jnp.maximum(index - 1, 0)]
            mean = mean + _slope_weight(schedule, earlier, t, s, eta) * (x0 - before)
        return (mean + std * noise.reshape(shape), x0), None

    start = schedule.sigma(times[0]) * jax.random.normal(rng_key, (num_samples * dimension,), times.dtype)
    start = start.reshape(shape)
    inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    (x, _), _ = jax.lax.scan(step, (start, start), inputs)
    return x


_sample = jax.jit(_sample_loop, static_argnames=("num_samples", "batch_size", "order"))


def _slope_weight(schedule, earlier, t, s, eta):
    """Weight of the last change of the denoised sample in the step from t to s; 0 at the first step and the last."""
    inside = (earlier > t) & (s > 0)
    width = schedule.log_snr(jnp.where(inside, s, 0.5 * t)) - schedule.log_snr(t)
    last_width = schedule.log_snr(t) - schedule.log_snr(jnp.where(inside, earlier, 0.5 * t))
    rate = 1.0 + eta**2
    weight = schedule.alpha(s) * (width + jnp.expm1(-rate * width) / rate) / last_width
    return jnp.where(inside, weight, 0.0)
