"""One step of Feynman-Kac correctors with weights from scores, and its extra drift along the parts' scores.

For pi_t ~ prod_i (p_t^i)^(w_i) exp(R_t), with scores s_i, S = sum w_i s_i and W = sum w_i, in reverse time tau:

    dx     = {-f x + g^2 (sum c_i s_i + eta^2 v grad R) / 2} dtau + eta g sqrt(v) dW,
    c_i    = (1 + eta^2 v) w_i + theta_i,
    dlog w = {g^2 (|S|^2 - sum w_i |s_i|^2 + S.grad R) / 2 + (W - 1) f d + sum (dw_i/dtau) log p^i} dtau
             + dR along x' = -f x + {g^2 sum theta_i (s_i.(S + grad R) + div s_i) / 2} dtau.

Any coefficients theta will do: the mean of their price under pi_t is zero. Without drift control theta = 0 and v = 1.
Then, if W != 1, the noise phase alone makes the weights uneven, since N(0, sigma^2/W) is not stationary under that
drift. With v = 1/W and theta_i = (1/W - 1) w_i it is, and the drift along S is divided by W; `smcdiff.smc.fit_drift`
fits others. One probe estimates the divergences, and tells as well how wide the reverse transition is beyond its
leading order.

A step solves the linear drift exactly, with the combination of denoised samples that goes with it frozen; the weights
are a trapezoidal rule in log-SNR, whose terms are grouped by points instead of intervals, so that a step needs the
scores once. The price has the coefficients of the interval on each side.

Sources: Skreta et al., "Feynman-Kac Correctors in Diffusion", arXiv 2503.02819; Ren et al., "DriftLite",
arXiv 2509.21655 (the extra drift).
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcdiff.compose.weighted import Composition

__all__ = [
    "Corrector",
    "Local",
    "draw_start",
    "look",
    "move",
    "price",
    "score_init",
    "score_step",
    "stationary_drift",
]

# The drift's linear part is solved with at least this rate, so that no coefficients make a step explode.
_LEAST_RATE = 0.1


class Corrector(eqx.Module):
    """A path, its grid, the noise level, and the coefficients theta of the extra drift, (steps, parts), or None."""

    path: Composition
    times: Float[Array, " steps"]
    eta: Float[Array, ""] | float
    drift: Float[Array, "steps parts"] | None


class Local(NamedTuple):
    """What a step knows of a particle at its beginning.

    Attributes
    ----------
    scores
        Of every part, shape (parts, *event).
    reward_gradient
        grad R.
    divergence
        Estimate of div S; 0 without drift control.
    increment
        Of the log weight, without the price of the extra drift.
    prices
        s_i.(S + grad R) + div s_i, shape (parts,); None without drift control.
    """

    scores: Float[Array, "parts *event"]
    reward_gradient: Float[Array, "*event"]
    divergence: Float[Array, ""]
    increment: Float[Array, ""]
    prices: Float[Array, " parts"] | None


def stationary_drift(path: Composition, times: Float[Array, " steps"]) -> Float[Array, "steps parts"]:
    """The coefficients (1/W - 1) w_i of the steps that begin at times[:-1]."""

    def at(t):
        exponents = path.exponents_at(t).astype(times.dtype)
        return (1.0 / jnp.sum(exponents) - 1.0) * exponents

    return jax.vmap(at)(times[:-1])


def draw_start(corrector, rng_key):
    """x ~ N(0, sigma_1^2 / W), and the deviation."""
    path, start = corrector.path, corrector.times[0]
    total = jnp.sum(path.exponents_at(start)).astype(start.dtype)
    std = path.schedule.sigma(start) / jnp.sqrt(total)
    return std * jax.random.normal(rng_key, path.event_shape, start.dtype), std, total


def score_init(corrector, rng_key):
    """Draw at t = 1, where every part is N(0, sigma_1^2); weigh by the integral of its W-th power."""
    path, start = corrector.path, corrector.times[0]
    x, _, total = draw_start(corrector, rng_key)
    log_variance = 2.0 * jnp.log(path.schedule.sigma(start)) + math.log(2.0 * math.pi)
    log_integral = 0.5 * x.size * ((1.0 - total) * log_variance - jnp.log(total))
    return x, log_integral + path.reward(x, start)


def score_step(corrector, rng_key, x, k):
    """Weigh at times[k] by the halves of the intervals on its two sides, and move to times[k + 1]."""
    local, drift = look(corrector, rng_key, x, k), corrector.drift
    if drift is None:
        still = jnp.zeros(len(corrector.path.parts), x.dtype)
        return move(corrector, rng_key, x, k, local, still), local.increment
    increment = local.increment + price(corrector, k, local, drift[k], drift[jnp.maximum(k - 1, 0)])
    return move(corrector, rng_key, x, k, local, drift[k]), increment


def _changes(corrector, k, function):
    """Change of a function of t over the halves of the intervals before and after times[k]."""
    times = corrector.times
    is_last = k == times.shape[0] - 2
    before, now, after = function(times[jnp.maximum(k - 1, 0)]), function(times[k]), function(times[k + 1])
    # Nothing is evaluated at t = 0: there, the last interval belongs to its noisy end alone.
    return 0.5 * (now - before), jnp.where(is_last, 1.0, 0.5) * (after - now)


def _log_snr_changes(corrector, k):
    schedule, t = corrector.path.schedule, corrector.times[k]

    def log_snr(u):
        # The integral of sigma^2 over log-SNR from t on is sigma_t^2 / 2: as if the grid ended half a unit later.
        return jnp.where(u > 0, schedule.log_snr(jnp.where(u > 0, u, t)), schedule.log_snr(t) + 0.5)

    return _changes(corrector, k, log_snr)


def look(corrector: Corrector, rng_key, x, k, num_probes: int = 1) -> Local:
    """Evaluate the scores at times[k], and weigh."""
    path, schedule = corrector.path, corrector.path.schedule
    t, s = corrector.times[k], corrector.times[k + 1]
    exponents = path.exponents_at(t).astype(x.dtype)
    axes = tuple(range(1, x.ndim + 1))
    scores, divergences = _scores_and_divergences(corrector, rng_key, x, t, num_probes)
    score, reward_gradient = jnp.tensordot(exponents, scores, axes=1), path.reward_gradient(x, t)

    def change(function):
        return sum(_changes(corrector, k, function))

    power = jnp.sum(score**2) - exponents @ jnp.sum(scores**2, axis=axes) + jnp.sum(score * reward_gradient)
    increment = schedule.sigma(t) ** 2 * power * sum(_log_snr_changes(corrector, k))
    # The constant, interval by interval.
    total, after = jnp.sum(exponents), jnp.sum(path.exponents_at(s)).astype(x.dtype)
    log_ratio = jnp.log(schedule.alpha(s)) - jnp.log(schedule.alpha(t))
    increment -= x.size * (0.5 * (total + after) - 1.0) * log_ratio
    if path.rewards:
        increment += change(lambda u: path.reward(schedule.alpha(u) / schedule.alpha(t) * x, u))
    if path.has_moving_exponents:
        increment += change(path.exponents_at).astype(x.dtype) @ path.logdensities(x, t)
    if divergences is None:
        return Local(scores, reward_gradient, jnp.zeros((), x.dtype), increment, None)
    prices = jnp.sum(scores * (score + reward_gradient)[None], axis=axes) + divergences
    return Local(scores, reward_gradient, exponents @ divergences, increment, prices)


def price(corrector: Corrector, k, local: Local, drift, drift_before):
    """What the extra drifts of the two intervals at times[k] cost in the log weight."""
    before, after = _log_snr_changes(corrector, k)
    coefficients = before * drift_before + after * drift
    return corrector.path.schedule.sigma(corrector.times[k]) ** 2 * (local.prices @ coefficients)


def move(corrector: Corrector, rng_key, x, k, local: Local, drift):
    """Move from times[k] to times[k + 1], with the coefficients ``drift`` of the extra drift."""
    path, schedule = corrector.path, corrector.path.schedule
    t, s = corrector.times[k], corrector.times[k + 1]
    exponents, variance = path.exponents_at(t).astype(x.dtype), schedule.sigma(t) ** 2
    total = jnp.sum(exponents)
    tempered = jnp.ones_like(total) if corrector.drift is None else 1.0 / total
    eta = jnp.asarray(corrector.eta, x.dtype)

    # The drift is g^2 (sum c_i s_i + ...) / 2. With sum c_i s_i = -rate (x - alpha x0_bar) / sigma^2, and x0_bar
    # frozen, x - alpha x0_bar decays relative to alpha like exp(-rate log-SNR).
    coefficients = (1.0 + eta**2 * tempered) * exponents + drift
    force = jnp.tensordot(coefficients, local.scores, axes=1) + eta**2 * tempered * local.reward_gradient
    rate = jnp.maximum(jnp.sum(coefficients), _LEAST_RATE)
    ratio = schedule.alpha(s) / schedule.alpha(t)
    kept = schedule.sigma(s) / (ratio * schedule.sigma(t))
    lost = 1.0 - kept**rate
    width = tempered * (eta * schedule.sigma(s)) ** 2 * _shrinking_sum(rate - 1.0, kept)
    if corrector.drift is not None:
        # What is unknown of the denoised sample: its share of the noise, on average over directions.
        unknown = jnp.clip(1.0 + variance / total * local.divergence / x.size, 0.0, 1.0)
        width += 2.0 * eta**2 / (1.0 + eta**2) * (ratio * lost) ** 2 * variance / total * unknown
    noise = jax.random.normal(rng_key, x.shape, x.dtype)
    return ratio * (x + variance * lost / rate * force) + jnp.sqrt(width) * noise


def _scores_and_divergences(corrector, rng_key, x, t, num_probes):
    """Scores of the parts, and estimates of their divergences by random probes (None without drift control)."""

    def scores(x):
        return corrector.path.scores(x, t)

    if corrector.drift is None:
        return scores(x), None
    # Folded: the key itself draws the noise of the move.
    probes = jax.random.rademacher(jax.random.fold_in(rng_key, 1), (num_probes, *x.shape), x.dtype)
    along = jax.vmap(lambda probe: jax.jvp(scores, (x,), (probe,)), out_axes=(None, 1))
    values, curvatures = along(probes)
    return values, jnp.tensordot(curvatures, probes, axes=x.ndim + 1) / num_probes


def _shrinking_sum(rate, kept):
    """(1 - kept^(2 rate)) / rate, also at rate = 0; finite at kept = 0."""
    width = -2.0 * jnp.log(jnp.where(kept > 0, kept, 1.0))
    exponent = rate * width
    small = jnp.abs(exponent) < 1e-4
    safe = jnp.where(small, 1.0, exponent)
    return width * jnp.where(small, 1.0 - 0.5 * exponent, -jnp.expm1(-safe) / safe)
