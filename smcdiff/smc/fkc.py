"""Feynman-Kac correctors: SMC along a composed path, which reverse transitions alone do not follow.

Target: pi_t ~ prod_i (p_t^i)^(w_i) exp(R_t) with scores s_i, S = sum w_i s_i and W = sum w_i. In reverse time tau,

    dx     = (-f x + (1 + eta^2) g^2 S / 2 + eta^2 g^2 grad R / 2) dtau + eta g dW,
    dlog w = {g^2 (|S|^2 - sum w_i |s_i|^2 + S.grad R) / 2 + (W - 1) f d + sum (dw_i/dtau) log p^i} dtau
             + dR along x' = -f x.

The weights need no divergence and are the same for every eta >= 0; `smcdiff.smc.corrector` has the step, and what drift
control adds to it. The error is of first order in the step.

Where densities exist, ``weights="density"`` is exact at any step size, up to the number of particles:

    increment = log pi_s(x_s) + log B(x_t|x_s) - log pi_t(x_t) - log F(x_s|x_t),

with the backward kernel B, forward noising with the variance divided by W, and the proposal F, the reverse transition
that belongs to it: both leave N(0, sigma^2/W) alone, and for a power of a Gaussian they are each other's reversal.

Sources: Skreta et al., "Feynman-Kac Correctors in Diffusion", arXiv 2503.02819; Ren et al., "DriftLite",
arXiv 2509.21655 (drift control); Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS-B 68 (2006).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.compose.weighted import Composition, compose
from smcdiff.density import HasLogDensity, ScheduledPath, has_data_density, require
from smcdiff.schedules import check_times
from smcdiff.smc.corrector import Corrector, draw_start, score_init, score_step, stationary_drift
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.reversal import ancestral_step

__all__ = ["fkc"]

# The start, if t = 1 is noisier: not above the first, and not below the second of these levels.
_NOISE_LOG_SNR, _LEAST_LOG_SNR = -6.0, -9.0

# Bounds of the estimated share of a noisy sample's noise that is left in its denoised sample.
_LEAST_SHARE, _GREATEST_SHARE = 0.01, 1.0


def fkc(
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    eta: Float[Array, ""] | float = 1.0,
    weights: str = "score",
    drift_control: bool | Float[Array, "steps parts"] | None = None,
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
        over tens of nats in the noise phase. An array (len(times) - 1, parts) has the coefficients theta_i of other
        drifts along the parts' scores, for instance those of `smcdiff.smc.fit_drift`.

    Raises
    ------
    TypeError
        If ``path`` is no density path, or has no log density where one is needed.
    ValueError
        If ``times`` is no grid from 1 to 0, ``eta`` is negative, ``weights`` is unknown, an option does not go with
        "density", or coefficients have another shape.

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
        corrector = Corrector(path, times, eta, None)
        return FeynmanKac(
            Partial(_density_init, corrector), Partial(_density_step, corrector), len(times) - 1
        )
    if path.has_moving_exponents:
        require(path.at(times[0]), HasLogDensity, "fkc with exponents that are functions of t")
    corrector = Corrector(path, times, eta, _drift(path, times, drift_control))
    return FeynmanKac(Partial(score_init, corrector), Partial(score_step, corrector), len(times) - 1)


def _drift(path, times, drift_control):
    """The coefficients of what was asked for, or None."""
    if drift_control is None:
        totals = jax.vmap(lambda t: jnp.sum(path.exponents_at(t)))(times)
        drift_control = isinstance(totals, jax.core.Tracer) or not np.allclose(totals, 1.0, atol=1e-5)
    if isinstance(drift_control, bool):
        return stationary_drift(path, times) if drift_control else None
    expected = (len(times) - 1, len(path.parts))
    if jnp.shape(drift_control) != expected:
        raise ValueError(
            f"drift_control must be True, False, None, or coefficients of shape (steps, parts) = {expected}, got "
            f"shape {jnp.shape(drift_control)}."
        )
    return jnp.asarray(drift_control, times.dtype)


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
    if not has_data_density(path):
        raise TypeError(
            'fkc with weights="density" needs log densities down to t = 0, where energy models have none; take '
            'weights="score", or smcdiff.annealed_mcmc, which ends with a denoising step.'
        )
    if isinstance(eta, jax.core.Tracer) or eta != 1.0:
        raise ValueError(
            'weights="density" takes the ancestral step, whose reversal is known, so eta must be the number 1; '
            f'got {eta}. Use weights="score" for other noise levels.'
        )
    if drift_control is not None and drift_control is not False:
        raise ValueError(
            'drift_control is an option of weights="score"; weights="density" has no use for it.'
        )


def _density_init(corrector, rng_key):
    """Draw at t = 1 and weigh against the density there."""
    x, std, _ = draw_start(corrector, rng_key)
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

    # What is unknown of the denoised sample, as a share of its noise, on average over directions.
    unknown = jnp.clip(1.0 + std**2 * jnp.mean(probe * curvature), _LEAST_SHARE, _GREATEST_SHARE)
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_s, log_kernels = ancestral_step(schedule, x, score, unknown, t, s, noise, std)
    return x_s, path.at(s).logdensity(x_s) - path.at(t).logdensity(x) + log_kernels
