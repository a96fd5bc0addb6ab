"""Restarts: a diffusion model as a Markov kernel, known by its denoiser alone.

A sample of p_s is noised to a time t > s, exactly,

    x_t = (alpha_t/alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s/alpha_s)^2) xi,

and brought back by reverse transitions on a grid from t to s. Both halves carry p_s to p_t and back, so the model's p_s
is left alone up to the error of the reverse grid, which falls with the number of steps; nothing is rejected. The higher
t, the more is forgotten. Deterministic transitions are enough, as the noising is random.

`denoise_along` makes the reverse transitions of `smcdiff.reverse` of second order: on a grid of log-SNRs l_k with
steps h_k = l_(k+1) - l_k the denoised sample is extrapolated to the middle of the step,

    x0 + h_k / (2 h_(k-1)) (x0 - previous x0),

without another evaluation (for eta = 0 DPM-Solver++(2M), for eta = 1 its stochastic kin).

Sources: Xu et al., "Restart Sampling for Improving Generative Processes", arXiv 2306.14878; Lu et al.,
"DPM-Solver++", arXiv 2211.01095.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from smcdiff.checks import check_order
from smcdiff.density import DiffusionModel, require, warn_unless_diffusion
from smcdiff.reverse import reverse_transition

__all__ = ["RestartInfo", "RestartState", "denoise_along", "restart"]


class RestartState(NamedTuple):
    """State of the restart kernel.

    Attributes
    ----------
    position
        A sample at the last time of the grid, of shape ``event_shape``.
    """

    position: Float[Array, "*event"]


class RestartInfo(NamedTuple):
    """What happened in one restart.

    Attributes
    ----------
    acceptance_rate
        1: nothing is rejected.
    is_divergent
        Whether the new sample is not finite.
    num_evaluations
        Calls of the denoiser.
    """

    acceptance_rate: Float[Array, ""]
    is_divergent: Bool[Array, ""]
    num_evaluations: int


class _Kernel(eqx.Module):
    model: DiffusionModel
    times: Float[Array, " steps"]
    eta: Float[Array, ""] | float
    order: int = eqx.field(static=True)


def restart(
    model: DiffusionModel,
    times: Float[Array, " steps"],
    *,
    eta: Float[Array, ""] | float = 0.0,
    order: int = 2,
) -> SamplingAlgorithm:
    """Noise a sample and denoise it again: leaves a diffusion model's law alone up to the error of the grid.

    Parameters
    ----------
    model
        Any diffusion model; a denoiser is enough.
    times
        Grid that falls from the time of the noise to the time of the samples, which may be 0: for instance the tail
        ``log_snr_times(model.schedule, 50)[20:]``.
    eta
        Noise of the way back: 0 for none, 1 for the time reversal of the noising.
    order
        1, or 2 to extrapolate the denoised sample: the error then falls as 1/steps^2 for ``eta=0``.

    Returns
    -------
    SamplingAlgorithm, with `RestartState` and `RestartInfo`. A step costs ``len(times) - 1`` calls of the denoiser.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser.
    ValueError
        If ``times`` does not fall strictly within [0, 1], ``eta`` is not in [0, 1], or ``order`` is neither 1 nor 2.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.

    Source: Xu et al., "Restart Sampling for Improving Generative Processes", arXiv 2306.14878.
    """
    require(model, DiffusionModel, "restart")
    warn_unless_diffusion(model, "restart")
    times = check_falling(times)
    if not isinstance(eta, jax.core.Tracer) and not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    check_order(order)
    kernel = _Kernel(model, times, eta, order)
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def check_falling(times: Float[Array, " steps"]) -> Float[Array, " steps"]:
    """Return ``times`` as an array, or raise a `ValueError` unless they fall strictly within [0, 1]; tracers pass."""
    times = jnp.asarray(times)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be one-dimensional with at least two points, got shape {times.shape}.")
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if not (np.all(np.diff(values) < 0) and values[0] <= 1 and values[-1] >= 0):
            raise ValueError(
                f"times must fall strictly within [0, 1], got {values[0]:g} to {values[-1]:g}; take for instance "
                "log_snr_times(model.schedule, 50)[20:]."
            )
    return times


def _init(kernel, position, rng_key):
    return RestartState(position)


def _step(kernel, rng_key, state):
    """Noise exactly, denoise along the grid."""
    key_noise, key_reverse = jax.random.split(rng_key)
    schedule, times, x = kernel.model.schedule, kernel.times, state.position
    t, s = times[0], times[-1]
    alpha = schedule.alpha(t) / schedule.alpha(s)
    kept = alpha * schedule.sigma(s) / schedule.sigma(t)
    std = schedule.sigma(t) * jnp.sqrt((1.0 - kept) * (1.0 + kept))
    x = alpha * x + std * jax.random.normal(key_noise, x.shape, x.dtype)
    x = denoise_along(key_reverse, kernel.model, x, times, eta=kernel.eta, order=kernel.order)
    return RestartState(x), RestartInfo(jnp.ones((), x.dtype), ~jnp.all(jnp.isfinite(x)), len(times) - 1)


def denoise_along(
    rng_key: PRNGKeyArray,
    model: DiffusionModel,
    x: Float[Array, "*event"],
    times: Float[Array, " steps"],
    *,
    eta: Float[Array, ""] | float = 1.0,
    order: int = 2,
) -> Float[Array, "*event"]:
    """One sample of p_t at t = ``times[0]`` by reverse transitions along a grid, to its last time.

    With ``eta=1`` it is a draw of the clean sample given the noisy one, up to the error of the grid.

    Parameters
    ----------
    rng_key
        Key; unused in effect for ``eta=0``.
    model
        The diffusion model.
    x
        One noisy sample.
    times
        Falling grid; unchecked.
    eta
        Noise of the transitions, as in `smcdiff.reverse_transition`.
    order
        1, or 2 to extrapolate the denoised sample.

    Source: Lu et al., "DPM-Solver++", arXiv 2211.01095.
    """
    gaps = jnp.diff(model.schedule.log_snr(times))
    gains = jnp.concatenate([jnp.zeros_like(gaps[:1]), 0.5 * gaps[1:] / gaps[:-1]])
    # The step to t = 0 is infinite in log-SNR: there the denoised sample is the answer.
    gains = jnp.where(jnp.isfinite(gains), gains, 0.0) if order == 2 else jnp.zeros_like(gains)

    def step(carry, inputs):
        x, previous = carry
        index, t, s, gain = inputs
        denoised = model.denoise(x, t)
        ahead = denoised + gain * (denoised - previous)
        mean, std = reverse_transition(model.schedule, x, ahead, t, s, eta)
        noise = jax.random.normal(jax.random.fold_in(rng_key, index), x.shape, x.dtype)
        return (mean + std * noise, denoised), None

    inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:], gains)
    return jax.lax.scan(step, (x, jnp.zeros_like(x)), inputs)[0][0]
