"""Reverse diffusion Monte Carlo: down the path of a bare density, with or without weights.

A particle x_t carries what the estimator says of it. From it the ancestral step to s draws x_s, either from a Gaussian
whose mean and variance, averaged over coordinates, are those of x_s given the estimated law of x_0, or exactly from a
draw of x_0. The Gaussian is exact for isotropic Gaussian targets at any size of the step. On a mixture in one
dimension, with exact estimates, the total variation falls 3.3- to 3.5-fold for half the step: nearly second order.

`weights="marginal"` is reverse diffusion SMC. With the noising step B, the reverse step F and the estimated marginals,

    increment = log Z p_s(x_s) + log B(x_t | x_s) - log Z p_t(x_t) - log F(x_s | x_t),

and at the last step Z p_0 is the target itself. All estimates but the last cancel in the product of the increments, so
that the weighted particles are consistent and the evidence is unbiased, whatever the estimator and the grid; how good
the estimates are decides how even the weights are. For the same reason an estimate of 0, as few samples give where the
density has a hard edge, need not end a particle: a number takes its place that leaves the weight as it was.

Sources: Huang et al., "Reverse Diffusion Monte Carlo", arXiv 2307.02037; Wu et al., "Reverse Diffusion Sequential Monte
Carlo Samplers", arXiv 2508.05926; Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for
molecular sampling", arXiv 1203.5428 (the Langevin steps).
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree

from smcdiff.checks import check_count
from smcdiff.estimators import Estimate
from smcdiff.estimators.estimator import Reference, as_reference
from smcdiff.reverse import reverse_transition
from smcdiff.reverse_diffusion.path import RdmcPath
from smcdiff.schedules import check_times
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.reversal import ancestral_step

__all__ = ["RdmcParticle", "langevin", "next_particle", "rdmc"]

# Bounds of the estimated variance of x_0 over that of the noise.
_LEAST_SHARE, _GREATEST_SHARE = 1e-3, 1e4

# With weights: as many samples say that x_0 is as uncertain as the noise makes it.
_PRIOR_SAMPLES = 2.0

# With weights: as many draws from the start, the same for all particles, give the first estimates that are 0 a scale.
_PILOTS = 256

_LANGEVIN_STEP = 0.25  # in units of the noise's variance


class RdmcParticle(NamedTuple):
    """A particle of reverse diffusion Monte Carlo.

    Attributes
    ----------
    position
        The sample x_t; at the end x_0.
    estimate
        What the estimator says of it, see `smcdiff.estimators.Estimate`; at the end that of the last noise level.
    estimator_state
        What the estimator carries along.
    num_evaluations
        Evaluations of the target on the particle's way, with the estimator's own. With weights, 256 more at the start
        are shared by all particles, and counted in none.
    num_invalid
        How many of the estimates on its way were flagged, those of Langevin steps at the start among them.
    least_ess
        Least effective sample size of the same estimates.
    """

    position: Float[Array, "*event"]
    estimate: Estimate
    estimator_state: PyTree
    num_evaluations: Int[Array, ""]
    num_invalid: Int[Array, ""]
    least_ess: Float[Array, ""]


class _Sampler(eqx.Module):
    path: RdmcPath
    times: Float[Array, " steps"]
    start: Reference | None
    transition: str = eqx.field(static=True)
    last: str = eqx.field(static=True)
    num_langevin_steps: int = eqx.field(static=True)
    is_weighted: bool = eqx.field(static=True)


def rdmc(
    path: RdmcPath,
    *,
    times: Float[Array, " steps"],
    weights: str = "none",
    transition: str = "mean",
    start: tuple[Float[Array, "*event"] | float, Float[Array, "*event"] | float] | None = None,
    num_langevin_steps: int = 0,
    last: str = "sample",
) -> FeynmanKac:
    """Feynman-Kac model that samples a bare density along its path, by estimated scores.

    Particles are `RdmcParticle`s. Run it with `smcdiff.run_smc`; without weights they never interact, with them the
    evidence is the integral of the unnormalised density.

    Parameters
    ----------
    path
        From `smcdiff.rdmc_path`.
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(path.schedule, 100)`.
    weights
        "none", or "marginal" for reverse diffusion SMC, which needs an estimator with an unbiased marginal.
    transition
        "mean" for Gaussian steps about the denoised sample, or "draw" for steps from a draw of the denoising
        posterior, which have no error of discretisation, only that of the estimate; "draw" has no weights.
    start
        (mean, std) of the Gaussian that takes the target's place at t = 1, where x_1 is drawn; in units of x_0. Point
        mass at 0 by default, which is right where t = 1 is noise alone.
    num_langevin_steps
        Langevin steps on the estimated score at t = 1 before the path is followed; without weights only. They are
        unadjusted; where p_1 is a Gaussian their law is exact.
    last
        What the step to t = 0 does: "sample" draws x_0, "denoise" takes its mean. Without weights only.

    Raises
    ------
    TypeError
        If ``path`` is not from `smcdiff.rdmc_path`.
    ValueError
        If ``times`` is no grid from 1 to 0, a choice is unknown, or does not go with weights.

    Source: "Reverse Diffusion Monte Carlo", arXiv 2307.02037; "Reverse Diffusion Sequential Monte Carlo Samplers",
    arXiv 2508.05926.
    """
    if not isinstance(path, RdmcPath):
        raise TypeError(f"rdmc needs a path from smcdiff.rdmc_path, got {type(path).__name__}.")
    times = check_times(times)
    for name, value, choices in (
        ("weights", weights, ("none", "marginal")),
        ("transition", transition, ("mean", "draw")),
        ("last", last, ("sample", "denoise")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    check_count("num_langevin_steps", num_langevin_steps, least=0)
    if weights == "marginal":
        if not path.estimator.has_marginal:
            raise ValueError(
                'weights="marginal" needs an estimator with an unbiased marginal, such as importance or '
                f"annealed_smc, got {type(path.estimator).__name__.strip('_')}."
            )
        if (transition, last, num_langevin_steps) != ("mean", "sample", 0):
            raise ValueError(
                'weights="marginal" goes with transition="mean", last="sample" and no Langevin steps, since their '
                f"densities are known; got {transition!r}, {last!r} and {num_langevin_steps}."
            )
    sampler = _Sampler(
        path, times, as_reference(start), transition, last, num_langevin_steps, weights == "marginal"
    )
    return FeynmanKac(Partial(_init, sampler), Partial(_step, sampler), len(times) - 1)


def _init(sampler, rng_key):
    """Draw at t = 1, walk there if asked, and estimate."""
    key_start, key_first, key_langevin, key_estimate = jax.random.split(rng_key, 4)
    path, t = sampler.path, sampler.times[0]
    alpha, sigma = path.schedule.alpha(t), path.schedule.sigma(t)
    shape, dtype = path.event_shape, sampler.times.dtype
    mean, std = (0.0, 0.0) if sampler.start is None else sampler.start
    mean = jnp.broadcast_to(alpha * jnp.asarray(mean, dtype), shape)
    std = jnp.broadcast_to(jnp.hypot(alpha * jnp.asarray(std, dtype), sigma), shape)
    noise = jax.random.normal(key_start, shape, dtype)
    x = mean + std * noise
    state, first = path.start(key_first, x, t)
    centre, state, (count, num_invalid, least_ess) = langevin(
        key_langevin, path.estimator, path.target, x / alpha, sigma / alpha, state, sampler.num_langevin_steps
    )
    x = alpha * centre if sampler.num_langevin_steps else x
    estimate, state = path.estimate(key_estimate, x, t, state)
    increment = jnp.zeros((), dtype)
    if sampler.is_weighted:
        log_start, log_scale = _log_normal(noise, std), _log_scale(path, mean, std, alpha)
        estimate = _with_finite_marginal(estimate, log_start + log_scale)
        increment = estimate.log_marginal - log_start
    return next_particle(x, estimate, state, first + count, num_invalid, least_ess), increment


def _log_normal(noise, std):
    """Log density of mean + std noise."""
    return -0.5 * jnp.sum(noise**2) - jnp.sum(jnp.log(std)) - 0.5 * noise.size * math.log(2.0 * math.pi)


def _log_scale(path, mean, std, alpha):
    """A rough log evidence, by importance sampling from the start; 0 if the density is 0 at all its draws."""
    noise = jax.random.normal(path.rng_key, (_PILOTS, *mean.shape), mean.dtype)
    values = jax.vmap(path.target.logdensity)((mean[None] + std[None] * noise) / alpha)
    values = values - jax.vmap(_log_normal, (0, None))(noise, std) - mean.size * jnp.log(alpha)
    found = jax.nn.logsumexp(jnp.where(jnp.isnan(values), -jnp.inf, values)) - math.log(_PILOTS)
    return jnp.where(jnp.isfinite(found), found, 0.0)


def _with_finite_marginal(estimate, otherwise):
    """The estimate, with this log marginal if its own is not finite: it cancels, but a weight of 0 would last."""
    log_marginal = estimate.log_marginal
    return estimate._replace(log_marginal=jnp.where(jnp.isfinite(log_marginal), log_marginal, otherwise))


def _step(sampler, rng_key, particle, k):
    """Move from times[k] to times[k + 1], estimate there, and weigh."""
    key_noise, key_estimate = jax.random.split(rng_key)
    path, schedule = sampler.path, sampler.path.schedule
    t, s = sampler.times[k], sampler.times[k + 1]
    x, estimate = particle.position, particle.estimate
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_s, log_kernels = _transition(sampler, schedule, x, estimate, t, s, noise)

    def inside(x_s):
        new, state = path.estimate(key_estimate, x_s, s, particle.estimator_state)
        if sampler.is_weighted:
            new = _with_finite_marginal(new, estimate.log_marginal - log_kernels)
        moved = next_particle(
            x_s, new, state, particle.num_evaluations, particle.num_invalid, particle.least_ess
        )
        return moved, new.log_marginal

    def at_the_end(x_s):
        moved = particle._replace(position=x_s)
        if not sampler.is_weighted:
            return moved, jnp.zeros((), x.dtype)
        moved = moved._replace(num_evaluations=particle.num_evaluations + 1)
        return moved, path.target.logdensity(x_s).astype(x.dtype)

    moved, log_marginal = jax.lax.cond(s > 0, inside, at_the_end, x_s)
    if not sampler.is_weighted:
        return moved, jnp.zeros((), x.dtype)
    return moved, log_marginal - estimate.log_marginal + log_kernels


def _transition(sampler, schedule, x, estimate, t, s, noise):
    """x_s, and log B - log F for Gaussian steps."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if sampler.transition == "draw":
        mean, std = reverse_transition(schedule, x, estimate.draw, t, s)
        x_s, log_kernels = mean + std * noise, jnp.zeros((), x.dtype)
    else:
        score = (alpha * estimate.denoised - x) / sigma**2
        unknown = jnp.clip(estimate.variance * (alpha / sigma) ** 2, _LEAST_SHARE, _GREATEST_SHARE)
        if sampler.is_weighted:
            # A step that is too narrow makes weights of infinite variance, and few samples know no variance.
            unknown = (estimate.ess * unknown + _PRIOR_SAMPLES) / (estimate.ess + _PRIOR_SAMPLES)
        x_s, log_kernels = ancestral_step(schedule, x, score, unknown, t, s, noise, sigma)
    if sampler.last == "denoise":
        x_s = jnp.where(s > 0, x_s, estimate.denoised)
    return x_s, log_kernels


def langevin(rng_key, estimator, target, centre, width, state, num_steps):
    """Langevin steps of a quarter of the noise's variance, on the estimated score of the centre c = x / alpha.

    They are those of Leimkuhler and Matthews, unadjusted: the mean of this noise and the last makes the stationary law
    exact for Gaussians, and wrong by the square of the step for others, where plain steps are wrong by the step.

    Returns the new centre, the estimator's state, and of its estimates the evaluations, how many were flagged, and the
    least effective sample size.
    """
    key_first, key_steps = jax.random.split(rng_key)

    def step(carry, key):
        centre, last_noise, state, (count, num_invalid, least_ess) = carry
        key_estimate, key_noise = jax.random.split(key)
        estimate, state = estimator(key_estimate, target, centre, width, state)
        noise = jax.random.normal(key_noise, centre.shape, centre.dtype)
        centre = centre + _LANGEVIN_STEP * (estimate.denoised - centre)
        centre = centre + jnp.sqrt(0.5 * _LANGEVIN_STEP) * width * (last_noise + noise)
        tally = (
            count + estimate.num_evaluations,
            num_invalid + (~estimate.is_valid).astype(jnp.int32),
            jnp.minimum(least_ess, estimate.ess),
        )
        return (centre, noise, state, tally), None

    nothing = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, centre.dtype))
    start = (centre, jax.random.normal(key_first, centre.shape, centre.dtype), state, nothing)
    centre, _, state, tally = jax.lax.scan(step, start, jax.random.split(key_steps, num_steps))[0]
    return centre, state, tally


def next_particle(x, estimate, state, num_evaluations, num_invalid, least_ess):
    """A particle with a new estimate, its counts carried on."""
    count = jnp.asarray(estimate.num_evaluations, jnp.int32)
    return RdmcParticle(
        x,
        estimate._replace(num_evaluations=count),
        state,
        num_evaluations + count,
        num_invalid + (~estimate.is_valid).astype(jnp.int32),
        jnp.minimum(least_ess, estimate.ess),
    )
