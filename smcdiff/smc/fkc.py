"""Feynman-Kac correctors: SMC along a composed path, which reverse transitions alone do not follow.

Target: pi_t ~ prod_i (p_t^i)^(w_i) exp(R_t) with scores s_i, S = sum w_i s_i and W = sum w_i. In reverse time tau,

    dx     = (-f x + (1 + eta^2) g^2 S / 2 + eta^2 g^2 grad R / 2) dtau + eta g dW,
    dlog w = {g^2 (|S|^2 - sum w_i |s_i|^2 + S.grad R) / 2 + (W - 1) f d + sum (dw_i/dtau) log p^i} dtau
             + dR along x' = -f x.

The weights need no divergence and are the same for every eta >= 0. A step solves the linear drift exactly, with the
composed denoised sample frozen; the weights are a trapezoidal rule in log-SNR, whose terms are grouped by points
instead of intervals, so that a step needs the scores once. The error is of first order in the step.

With W != 1 the noise phase alone makes these weights uneven, since N(0, sigma^2/W) is not stationary under that drift.
Drift control divides the drift along S and the noise variance by W, under which it is; the extra drift
(1/W - 1) g^2 S / 2 costs (1/W - 1) g^2 (|S|^2 + S.grad R + div S) / 2 in dlog w. One probe estimates the divergence,
and tells as well how wide the reverse transition is beyond its leading order.

Where densities exist, ``weights="density"`` is exact at any step size, up to the number of particles:

    increment = log pi_s(x_s) + log B(x_t|x_s) - log pi_t(x_t) - log F(x_s|x_t),

with the backward kernel B, forward noising with the variance divided by W, and the proposal F, the reverse transition
that belongs to it: both leave N(0, sigma^2/W) alone, and for a power of a Gaussian they are each other's reversal.

Sources: Skreta et al., "Feynman-Kac Correctors in Diffusion", arXiv 2503.02819; Ren et al., "DriftLite",
arXiv 2509.21655 (drift control); Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.compose.weighted import Composition, compose
from smcdiff.density import HasLogDensity, ScheduledPath, require
from smcdiff.schedules import check_times
from smcdiff.smc.feynman_kac import FeynmanKac

__all__ = ["fkc"]

# The start, if t = 1 is noisier: not above the first, and not below the second of these levels.
_NOISE_LOG_SNR, _LEAST_LOG_SNR = -6.0, -9.0

# Bounds of the estimated share of a noisy sample's noise that is left in its denoised sample.
_LEAST_SHARE, _GREATEST_SHARE = 0.01, 1.0


class _Corrector(eqx.Module):
    path: Composition
    times: Float[Array, " steps"]
    eta: Float[Array, ""] | float
    drift_control: bool = eqx.field(static=True)


def fkc(
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    eta: Float[Array, ""] | float = 1.0,
    weights: str = "score",
    drift_control: bool | None = None,
) -> FeynmanKac:
    """Feynman-Kac model whose weighted particles end in the law of a composed path at t = 0.

    Particles are samples x, of shape ``event_shape``. The evidence is the integral of prod_i p_i^(w_i) exp(R) at
    t = 0. Run it with `smcdiff.run_smc`, or hand it to `smcdiff.smc` with moves of `smcdiff.smc.moves`.

    Parameters
    ----------
    path
        A composition from `smcdiff.compose`, or any diffusion model (whose weights are then all equal).
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(path.schedule, 100)`.
    eta
        Noise of the reverse process: 0 for an ordinary differential equation, 1 for the time reversal.
    weights
        "score" for weights from scores, right in the limit of small steps; "density" for weights from log densities,
        right at any step size. Take the latter with moves of `smcdiff.smc.moves`: between weights from scores they
        add an error of first order in the step to the log evidence.
    drift_control
        For "score" weights: keep the noise phase stationary, at the cost of a Jacobian-vector product of the scores.
        By default where the exponents do not sum to 1, as in products and powers: there, weights without it spread
        over tens of nats in the noise phase.

    Raises
    ------
    TypeError
        If ``path`` is no density path, or has no log density where one is needed.
    ValueError
        If ``times`` is no grid from 1 to 0, ``eta`` is negative, ``weights`` is unknown, or an option does not go
        with "density".

    Source: "Feynman-Kac Correctors in Diffusion", arXiv 2503.02819.
    """
    require(path, ScheduledPath, "fkc")
    times = _start_on_grid(path.schedule, check_times(times))
    path = path if isinstance(path, Composition) else compose("fkc", [path], [1.0])
    if not isinstance(eta, jax.core.Tracer) and not 0.0 <= eta < math.inf:
        raise ValueError(f"eta must be finite and not negative, got {eta}.")
    if weights not in ("score", "density"):
        raise ValueError(f'weights must be "score" or "density", got {weights!r}.')
    if weights == "density":
        _check_density(path, eta, drift_control)
        corrector = _Corrector(path, times, eta, False)
        return FeynmanKac(
            Partial(_density_init, corrector), Partial(_density_step, corrector), len(times) - 1
        )
    if path.has_moving_exponents:
        require(path.at(times[0]), HasLogDensity, "fkc with exponents that are functions of t")
    if drift_control is None:
        totals = jax.vmap(lambda t: jnp.sum(path.exponents_at(t)))(times)
        drift_control = isinstance(totals, jax.core.Tracer) or not np.allclose(totals, 1.0, atol=1e-5)
    corrector = _Corrector(path, times, eta, drift_control)
    return FeynmanKac(Partial(_score_init, corrector), Partial(_score_step, corrector), len(times) - 1)


def _start_on_grid(schedule, times):
    """Let the first step be as wide in log-SNR as the second, where that is noise still.

    Grids that are uniform up to log-SNR -6 have a first point far below, where scores say nothing of the data and a
    step of that width makes an error that no number of steps removes.
    """
    if times.shape[0] < 3:
        return times
    first, second = schedule.log_snr(times[1]), schedule.log_snr(jnp.maximum(times[2], 0.5 * times[1]))
    level = jnp.clip(2.0 * first - second, _LEAST_LOG_SNR, _NOISE_LOG_SNR)
    start = schedule.time_from_log_snr(level)
    return times.at[0].min(jnp.maximum(start, 0.5 * (times[0] + times[1])))


def _check_density(path, eta, drift_control):
    require(path.at(jnp.asarray(0.5)), HasLogDensity, 'fkc with weights="density"')
    if isinstance(eta, jax.core.Tracer) or eta != 1.0:
        raise ValueError(
            'weights="density" takes the ancestral step, whose reversal is known, so eta must be the number 1; '
            f'got {eta}. Use weights="score" for other noise levels.'
        )
    if drift_control:
        raise ValueError(
            'drift_control is an option of weights="score"; weights="density" has no use for it.'
        )


def _draw_start(corrector, rng_key):
    """x ~ N(0, sigma_1^2 / W), and the deviation."""
    path, start = corrector.path, corrector.times[0]
    total = jnp.sum(path.exponents_at(start)).astype(start.dtype)
    std = path.schedule.sigma(start) / jnp.sqrt(total)
    return std * jax.random.normal(rng_key, path.event_shape, start.dtype), std, total


def _score_init(corrector, rng_key):
    """Draw at t = 1, where every part is N(0, sigma_1^2); weigh by the integral of its W-th power."""
    path, start = corrector.path, corrector.times[0]
    x, _, total = _draw_start(corrector, rng_key)
    log_variance = 2.0 * jnp.log(path.schedule.sigma(start)) + math.log(2.0 * math.pi)
    log_integral = 0.5 * x.size * ((1.0 - total) * log_variance - jnp.log(total))
    return x, log_integral + path.reward(x, start)


def _score_step(corrector, rng_key, x, k):
    """Weigh at times[k] by the halves of the intervals on its two sides, and move to times[k + 1]."""
    path, schedule, times = corrector.path, corrector.path.schedule, corrector.times
    is_last = k == times.shape[0] - 2
    before, t, s = times[jnp.maximum(k - 1, 0)], times[k], times[k + 1]
    exponents = path.exponents_at(t).astype(x.dtype)
    total, variance = jnp.sum(exponents), schedule.sigma(t) ** 2
    tempered = 1.0 / total if corrector.drift_control else jnp.ones_like(total)
    scores, score, divergence = _score_and_divergence(corrector, rng_key, x, t, exponents)
    reward_gradient = path.reward_gradient(x, t)

    # Nothing is evaluated at t = 0: there, the last interval belongs to its noisy end alone.
    def change(function):
        at_t = function(t)
        return jnp.where(is_last, 1.0, 0.5) * (function(s) - at_t) + 0.5 * (at_t - function(before))

    def log_snr(u):
        # The integral of sigma^2 over log-SNR from t on is sigma_t^2 / 2: as if the grid ended half a unit later.
        return jnp.where(u > 0, schedule.log_snr(jnp.where(u > 0, u, t)), schedule.log_snr(t) + 0.5)

    power = jnp.sum(score**2) - jnp.sum(exponents * jnp.sum(scores**2, axis=tuple(range(1, scores.ndim))))
    power += jnp.sum(score * reward_gradient)
    power += (tempered - 1.0) * (jnp.sum(score * (score + reward_gradient)) + divergence)
    increment = variance * power * change(log_snr)
    # The constant, interval by interval.
    after = jnp.sum(path.exponents_at(s)).astype(x.dtype)
    log_ratio = jnp.log(schedule.alpha(s)) - jnp.log(schedule.alpha(t))
    increment -= x.size * (0.5 * (total + after) - 1.0) * log_ratio
    if path.rewards:
        increment += change(lambda u: path.reward(schedule.alpha(u) / schedule.alpha(t) * x, u))
    if path.has_moving_exponents:
        increment += change(path.exponents_at).astype(x.dtype) @ path.logdensities(x, t)

    # z = x - alpha x0_bar, of reference variance sigma^2 / W, decays relative to alpha like exp(-rate log-SNR).
    eta = jnp.asarray(corrector.eta, x.dtype)
    z = -variance / total * (score + eta**2 / (1.0 + eta**2) * reward_gradient)
    ratio = schedule.alpha(s) / schedule.alpha(t)
    kept = schedule.sigma(s) / (ratio * schedule.sigma(t))
    rate = (1.0 + eta**2) * tempered * total
    lost = 1.0 - kept**rate
    width = tempered * (eta * schedule.sigma(s)) ** 2 * _shrinking_sum(rate - 1.0, kept)
    if corrector.drift_control:
        # What is unknown of the denoised sample: its share of the noise, on average over directions.
        unknown = jnp.clip(1.0 + variance / total * divergence / x.size, 0.0, 1.0)
        width += 2.0 * eta**2 / (1.0 + eta**2) * (ratio * lost) ** 2 * variance / total * unknown
    noise = jax.random.normal(rng_key, x.shape, x.dtype)
    return ratio * (x - lost * z) + jnp.sqrt(width) * noise, increment


def _score_and_divergence(corrector, rng_key, x, t, exponents):
    """Scores of the parts, their weighted sum, and one probe's estimate of its divergence (0 if it has no use)."""

    def composed(x):
        scores = corrector.path.scores(x, t)
        return jnp.tensordot(exponents, scores, axes=1), scores

    if not corrector.drift_control:
        score, scores = composed(x)
        return scores, score, jnp.zeros((), x.dtype)
    # Folded: the key itself draws the noise of the move.
    probe = jax.random.rademacher(jax.random.fold_in(rng_key, 1), x.shape, x.dtype)
    score, curvature, scores = jax.jvp(composed, (x,), (probe,), has_aux=True)
    return scores, score, jnp.sum(probe * curvature)


def _shrinking_sum(rate, kept):
    """(1 - kept^(2 rate)) / rate, also at rate = 0; finite at kept = 0."""
    width = -2.0 * jnp.log(jnp.where(kept > 0, kept, 1.0))
    exponent = rate * width
    small = jnp.abs(exponent) < 1e-4
    safe = jnp.where(small, 1.0, exponent)
    return width * jnp.where(small, 1.0 - 0.5 * exponent, -jnp.expm1(-safe) / safe)


def _density_init(corrector, rng_key):
    """Draw at t = 1 and weigh against the density there."""
    x, std, _ = _draw_start(corrector, rng_key)
    log_proposal = -0.5 * jnp.sum((x / std) ** 2) - x.size * (jnp.log(std) + 0.5 * math.log(2.0 * math.pi))
    return x, corrector.path.at(corrector.times[0]).logdensity(x) - log_proposal


def _density_step(corrector, rng_key, x, k):
    """Move from times[k] to times[k + 1] by F, and weigh with densities and B."""
    path, schedule = corrector.path, corrector.path.schedule
    t, s = corrector.times[k], corrector.times[k + 1]
    key_noise, key_probe = jax.random.split(rng_key)
    total = jnp.sum(path.exponents_at(t)).astype(x.dtype)
    std = schedule.sigma(t) / jnp.sqrt(total)
    probe = jax.random.rademacher(key_probe, x.shape, x.dtype)
    score, curvature = jax.jvp(lambda x: path.score(x, t), (x,), (probe,))

    # Of the noise variance std^2 of x_t, F's mean removes the share ``lost`` of the reference; what is unknown of the
    # denoised sample, the share ``unknown`` of it on average over directions, widens F.
    unknown = 1.0 + std**2 * jnp.mean(probe * curvature)
    unknown = jnp.clip(unknown, _LEAST_SHARE, _GREATEST_SHARE)
    ratio = schedule.alpha(s) / schedule.alpha(t)
    kept = schedule.sigma(s) / (ratio * schedule.sigma(t))
    lost = (1.0 - kept) * (1.0 + kept)
    width = jnp.sqrt(kept**2 + lost * unknown)
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_s = ratio * (x + std * (lost * std * score + jnp.sqrt(lost) * width * noise))

    # x_t - x_s / ratio in deviations of B, without cancellation.
    residual = jnp.sqrt(lost) * std * score + width * noise
    log_kernels = 0.5 * jnp.sum(noise**2 - residual**2) + x.size * jnp.log(ratio * width)
    increment = path.at(s).logdensity(x_s) - path.at(t).logdensity(x) + log_kernels
    return x_s, increment
