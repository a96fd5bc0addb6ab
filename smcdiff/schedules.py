"""Gaussian forward processes x_t = alpha(t) x_0 + sigma(t) eps, and grids of times.

Time runs from 0 (data) to 1 (noise). A schedule states only ``alpha``, ``sigma`` and the inverse of the
log signal-to-noise ratio

    lambda(t) = log(alpha(t) / sigma(t));

the coefficients of the stochastic differential equation dx = f x dt + g dW that has these marginals,

    f = d log(alpha) / dt,        g^2 = d(sigma^2)/dt - 2 f sigma^2 = -2 sigma^2 d(lambda)/dt,

come from automatic differentiation, so that no derivative is written down twice.

To add a schedule, subclass `Schedule` and define the three functions. Sources: Song et al., "Score-Based
Generative Modeling through Stochastic Differential Equations", arXiv 2011.13456; Kingma et al.,
"Variational Diffusion Models", arXiv 2107.00630; Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models", arXiv 2206.00364.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
    "Schedule",
    "check_times",
    "cosine",
    "edm",
    "foellmer",
    "karras_times",
    "log_snr_times",
    "ou",
    "rectified_flow",
    "uniform_times",
    "ve",
    "vp",
]

Scalar = Float[Array, ""] | float


class Schedule(eqx.Module):
    """The Gaussian forward process x_t = alpha(t) x_0 + sigma(t) eps, for t in [0, 1].

    ``alpha(0) = 1``, ``sigma(0) = 0`` and ``log_snr`` falls strictly. All methods act elementwise on ``t``.
    """

    @abc.abstractmethod
    def alpha(self, t: Scalar) -> Array:
        """Scale of the data at time ``t``."""

    @abc.abstractmethod
    def sigma(self, t: Scalar) -> Array:
        """Standard deviation of the noise at time ``t``."""

    @abc.abstractmethod
    def time_from_log_snr(self, log_snr: Scalar) -> Array:
        """Time at which log(alpha/sigma) equals ``log_snr``."""

    def log_snr(self, t: Scalar) -> Array:
        """log(alpha(t) / sigma(t)); plus infinity at t = 0."""
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

    def alpha_sigma_rates(self, t: Scalar) -> tuple[Array, Array]:
        """Time derivatives (d alpha/dt, d sigma/dt)."""
        t = jnp.asarray(t)
        _, rates = jax.jvp(lambda s: (self.alpha(s), self.sigma(s)), (t,), (jnp.ones_like(t),))
        return rates

    def drift(self, t: Scalar) -> Array:
        """f(t) = d log(alpha)/dt of dx = f x dt + g dW."""
        alpha_rate, _ = self.alpha_sigma_rates(t)
        return alpha_rate / self.alpha(t)

    def diffusion_squared(self, t: Scalar) -> Array:
        """g(t)^2 of dx = f x dt + g dW, for t in (0, 1]."""
        alpha_rate, sigma_rate = self.alpha_sigma_rates(t)
        sigma = self.sigma(t)
        return 2.0 * sigma * (sigma_rate - sigma * alpha_rate / self.alpha(t))


class _VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1, stated through log(alpha)."""

    @abc.abstractmethod
    def log_alpha(self, t: Scalar) -> Array: ...

    @abc.abstractmethod
    def time_from_log_alpha(self, log_alpha: Scalar) -> Array: ...

    def alpha(self, t):
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t):
        return jnp.sqrt(-jnp.expm1(2.0 * self.log_alpha(t)))

    def time_from_log_snr(self, log_snr):
        return self.time_from_log_alpha(0.5 * jax.nn.log_sigmoid(2.0 * jnp.asarray(log_snr)))


class _LinearVP(_VariancePreserving):
    beta_min: Scalar
    beta_max: Scalar

    def log_alpha(self, t):
        return -0.5 * t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def time_from_log_alpha(self, log_alpha):
        integral = -2.0 * log_alpha  # of beta, from 0 to t: solve the quadratic in its stable form
        slope = self.beta_max - self.beta_min
        return 2.0 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral))


class _OU(_VariancePreserving):
    horizon: Scalar

    def log_alpha(self, t):
        return -self.horizon * jnp.asarray(t)

    def time_from_log_alpha(self, log_alpha):
        return -log_alpha / self.horizon


class _Cosine(Schedule):
    max_angle: Scalar

    def alpha(self, t):
        return jnp.cos(self.max_angle * t)

    def sigma(self, t):
        return jnp.sin(self.max_angle * t)

    def time_from_log_snr(self, log_snr):
        return jnp.arctan(jnp.exp(-jnp.asarray(log_snr))) / self.max_angle


class _GeometricVE(Schedule):
    sigma_min: Scalar
    sigma_max: Scalar

    def _log_ratio(self):
        return jnp.log(jnp.asarray(self.sigma_max / self.sigma_min))

    def alpha(self, t):
        return jnp.ones_like(jnp.asarray(t))

    def sigma(self, t):
        return self.sigma_min * jnp.sqrt(jnp.expm1(2.0 * self._log_ratio() * t))

    def time_from_log_snr(self, log_snr):
        sigma = jnp.exp(-jnp.asarray(log_snr))
        return 0.5 * jnp.log1p((sigma / self.sigma_min) ** 2) / self._log_ratio()


class _EDM(Schedule):
    sigma_max: Scalar

    def alpha(self, t):
        return jnp.ones_like(jnp.asarray(t))

    def sigma(self, t):
        return self.sigma_max * jnp.asarray(t)

    def time_from_log_snr(self, log_snr):
        return jnp.exp(-jnp.asarray(log_snr)) / self.sigma_max


class _Foellmer(Schedule):
    scale: Scalar
    end: Scalar

    def alpha(self, t):
        return 1.0 - self.end * jnp.asarray(t)

    def sigma(self, t):
        return self.scale * jnp.sqrt(self.end * t * self.alpha(t))

    def time_from_log_snr(self, log_snr):
        return jax.nn.sigmoid(-2.0 * (jnp.asarray(log_snr) + jnp.log(self.scale))) / self.end


class _RectifiedFlow(Schedule):
    def alpha(self, t):
        return 1.0 - jnp.asarray(t)

    def sigma(self, t):
        return jnp.asarray(t)

    def time_from_log_snr(self, log_snr):
        return jax.nn.sigmoid(-jnp.asarray(log_snr))


def vp(beta_min: Scalar = 0.1, beta_max: Scalar = 20.0) -> Schedule:
    """Variance-preserving schedule with a rate beta that grows linearly in time.

    Parameters
    ----------
    beta_min, beta_max
        Rate at t = 0 and t = 1, with 0 < beta_min <= beta_max.

    Raises
    ------
    ValueError
        If the rates are not positive and ordered.

    Source: Song et al., "Score-Based Generative Modeling through SDEs", arXiv 2011.13456.
    """
    _require_ordered("beta_min", beta_min, "beta_max", beta_max)
    return _LinearVP(beta_min, beta_max)


def cosine(log_snr_min: float = -9.0) -> Schedule:
    """Variance-preserving schedule whose (alpha, sigma) move along a circle at constant speed.

    Parameters
    ----------
    log_snr_min
        log(alpha/sigma) at t = 1; finite, so that alpha stays positive.

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672.
    """
    if not np.isfinite(log_snr_min) or log_snr_min >= 0:
        raise ValueError(f"log_snr_min must be finite and negative, got {log_snr_min}; use for instance -9.")
    return _Cosine(float(np.arctan(np.exp(-log_snr_min))))


def ve(sigma_min: Scalar = 0.01, sigma_max: Scalar = 50.0) -> Schedule:
    """Variance-exploding schedule with geometric growth, alpha = 1.

    sigma(t)^2 = sigma_min^2 ((sigma_max/sigma_min)^(2t) - 1), which is exactly 0 at t = 0.

    Parameters
    ----------
    sigma_min, sigma_max
        Scale at which the growth sets in, and (up to sigma_min^2) the deviation at t = 1, in data units.

    Source: Song et al., "Score-Based Generative Modeling through SDEs", arXiv 2011.13456.
    """
    _require_ordered("sigma_min", sigma_min, "sigma_max", sigma_max, strict=True)
    return _GeometricVE(sigma_min, sigma_max)


def edm(sigma_max: Scalar = 80.0) -> Schedule:
    """Variance-exploding schedule with sigma = sigma_max t, alpha = 1.

    Parameters
    ----------
    sigma_max
        Deviation at t = 1, in data units, positive.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.
    """
    _require_ordered("zero", 0.0, "sigma_max", sigma_max, strict=True)
    return _EDM(sigma_max)


def foellmer(scale: Scalar = 1.0, log_snr_min: float = -6.0) -> Schedule:
    """Brownian bridge from the data to the origin: its reversal is the Foellmer process, a Brownian motion with drift.

    alpha = 1 - u and sigma = scale sqrt(u (1 - u)), for u = c t with c just below 1.

    Parameters
    ----------
    scale
        Deviation of the Brownian motion after unit time, in data units, positive; about that of the data.
    log_snr_min
        log(alpha/sigma) at t = 1; finite, since nothing is left of the data at u = 1.

    Source: Huang, Jiao et al., "Schrodinger-Follmer Sampler", arXiv 2106.10880.
    """
    _require_ordered("zero", 0.0, "scale", scale, strict=True)
    if not np.isfinite(log_snr_min):
        raise ValueError(f"log_snr_min must be finite, got {log_snr_min}; use for instance -6.")
    return _Foellmer(scale, 1.0 / (1.0 + scale**2 * np.exp(2.0 * log_snr_min)))


def rectified_flow() -> Schedule:
    """Straight-line schedule alpha = 1 - t, sigma = t of flow matching.

    Source: Liu et al., "Flow Straight and Fast", arXiv 2209.03003.
    """
    return _RectifiedFlow()


def ou(horizon: Scalar = 5.0) -> Schedule:
    """Ornstein-Uhlenbeck process dx = -x ds + sqrt(2) dW run for ``horizon`` units of its own time s.

    Parameters
    ----------
    horizon
        Length of the process, positive: alpha = exp(-horizon t).
    """
    _require_ordered("zero", 0.0, "horizon", horizon, strict=True)
    return _OU(horizon)


def log_snr_times(
    schedule: Schedule, num_steps: int, *, log_snr_min: float = -6.0, log_snr_max: float = 5.0
) -> Float[Array, " num_steps+1"]:
    """Times from 1 to 0, uniform in log-SNR: the default grid of every sampler.

    Parameters
    ----------
    schedule
        The forward process.
    num_steps
        Number of steps, at least 2; the grid has one point more.
    log_snr_min
        Where the uniform part starts if the schedule reaches lower; the first point is t = 1 in any case.
    log_snr_max
        Last log-SNR before the final step to t = 0; exp(-log_snr_max) is the noise level, in data units,
        that this final step removes.

    Returns
    -------
    Array of shape (num_steps + 1,), strictly falling from 1 to 0.

    Raises
    ------
    ValueError
        If ``num_steps`` is not an integer of at least 2, or the range of log-SNR is empty (not checked when the
        schedule is traced).
    """
    _require_steps(num_steps)
    start = jnp.maximum(schedule.log_snr(jnp.asarray(1.0)), log_snr_min)
    if not isinstance(start, jax.core.Tracer) and not start < log_snr_max:
        raise ValueError(f"log_snr_max must exceed the log-SNR at the start, {start:.3g}, got {log_snr_max}.")
    levels = jnp.linspace(start, log_snr_max, num_steps)
    return _with_ends(schedule.time_from_log_snr(levels))


def karras_times(
    schedule: Schedule, num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Array, " num_steps+1"]:
    """Times from 1 to 0 on which (sigma/alpha)^(1/rho) is uniform.

    Parameters
    ----------
    schedule
        The forward process.
    num_steps
        Number of steps, at least 2; the grid has one point more.
    sigma_min, sigma_max
        Range of sigma/alpha in data units; the upper end is capped by the schedule's own.
    rho
        Exponent, positive; 7 puts most steps at low noise.

    Raises
    ------
    ValueError
        If ``num_steps`` is not an integer of at least 2, or ``sigma_min``, ``sigma_max`` or ``rho`` is out of range.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.
    """
    _require_steps(num_steps)
    sigma_max = min(sigma_max, float(jnp.exp(-schedule.log_snr(jnp.asarray(1.0)))))
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise ValueError(
            "karras_times needs rho > 0 and 0 < sigma_min < sigma_max, which the schedule caps at its own end, "
            f"got rho={rho}, sigma_min={sigma_min}, sigma_max={sigma_max:.3g}."
        )
    levels = jnp.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    return _with_ends(schedule.time_from_log_snr(-jnp.log(levels)))


def uniform_times(num_steps: int) -> Float[Array, " num_steps+1"]:
    """Times from 1 to 0, uniform in t (``num_steps`` + 1 points); for comparisons with published runs."""
    _require_steps(num_steps)
    return jnp.linspace(1.0, 0.0, num_steps + 1)


def check_times(times: Float[Array, " steps"]) -> Float[Array, " steps"]:
    """Return ``times`` as an array, or say why it is no grid that falls from 1 to 0.

    Raises
    ------
    ValueError
        If ``times`` is not one-dimensional with at least two points, does not start at 1 and end at 0, or
        does not fall strictly. Inside compiled code only the shape can be checked.
    """
    times = jnp.asarray(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must be one-dimensional with at least two points, got shape {times.shape}.")
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if values[0] != 1.0 or values[-1] != 0.0 or not np.all(np.diff(values) < 0):
            raise ValueError(
                "times must fall strictly from 1 (noise) to 0 (data), got "
                f"times[0]={values[0]:g}, times[-1]={values[-1]:g}; use log_snr_times(schedule, num_steps)."
            )
    return times


def _with_ends(times):
    """Replace the first point by exactly 1 and append 0."""
    return jnp.concatenate([jnp.ones_like(times[:1]), times[1:], jnp.zeros_like(times[:1])])


def _require_steps(num_steps):
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 2:
        raise ValueError(f"num_steps must be an integer of at least 2, got {num_steps!r}.")


def _require_ordered(low_name, low, high_name, high, strict=False):
    if isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer):
        return
    ordered = low < high if strict else low <= high
    positive = low >= 0 if low_name == "zero" else low > 0
    if not (positive and ordered and np.isfinite(high)):
        if low_name == "zero":
            raise ValueError(f"a schedule needs finite {high_name} > 0, got {high_name}={high}.")
        need = f"0 < {low_name} {'<' if strict else '<='} {high_name}"
        raise ValueError(f"a schedule needs finite {need}, got {low_name}={low}, {high_name}={high}.")
