"""Rejuvenation: Markov moves between the steps of SMC, which leave the target alone and the weights unchanged.

A `Move` leaves invariant what the particles target after step k of a Feynman-Kac model; `smcdiff.smc` applies it after
every step. For particles that are samples x, as those of `smcdiff.fkc` are, any MCMC kernel on the density of the path
at times[k + 1] will do.

Sources: Gilks and Berzuini, "Following a moving target: Monte Carlo inference for dynamic Bayesian models", JRSS-B 63
(2001); Buchholz, Chopin and Jacob, "Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo",
arXiv 1808.07730 (tuning from the cloud).
"""

import math
from collections.abc import Callable

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.compose.weighted import Composition
from smcdiff.density import HasLogDensity, ScheduledPath, require
from smcdiff.schedules import check_times
from smcdiff.smc.feynman_kac import Move

__all__ = ["mala_moves", "mcmc_moves"]


class _Moves(eqx.Module):
    path: ScheduledPath
    times: Float[Array, " steps"]
    kernel: Callable


class _MalaScale(eqx.Module):
    path: ScheduledPath
    width: Float[Array, ""] | float


_GAIN = 2.0  # of the logarithm of the step size, by a unit of the acceptance rate


def mcmc_moves(path: ScheduledPath, kernel: Callable, *, times: Float[Array, " steps"]) -> Move:
    """Moves of a BlackJAX kernel on the densities of a path.

    Parameters
    ----------
    path
        Density path with log densities: an exact model, or a composition of such.
    kernel
        ``kernel(logdensity_fn, t)`` returns a BlackJAX algorithm for the density at time ``t``, for instance
        ``lambda logdensity_fn, t: blackjax.mala(logdensity_fn, 0.1)``. Its info must have an ``acceptance_rate``.
        Make it a `jax.tree_util.Partial` of a module-level function, so that what it holds are leaves.
    times
        The grid of the Feynman-Kac model.

    Returns
    -------
    Move, whose info is the acceptance rate; nothing is tuned.

    Raises
    ------
    TypeError
        If the path has no log density.
    ValueError
        If ``times`` is no grid from 1 to 0.
    """
    return Move(Partial(_move, _moves("mcmc_moves", path, Partial(_fixed, kernel), times)))


def mala_moves(
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    width: Float[Array, ""] | float,
    step_size: Float[Array, ""] | float = 0.5,
    target_acceptance: float | None = 0.574,
) -> Move:
    """Moves of the Metropolis-adjusted Langevin algorithm, whose step follows the noise level.

    At time t the step (in BlackJAX's sense: x + h grad log pi + sqrt(2h) noise) is

        h = step_size d^(-1/3) (alpha^2 width^2 + sigma^2 / W),

    W the sum of the composition's exponents (1 for a diffusion): a share of the variance of a mode of that width. The
    share is tuned: where the cloud's acceptance rate is off its target, the next step has another.

    Parameters
    ----------
    path
        Density path with log densities: an exact model, or a composition of such.
    times
        The grid of the Feynman-Kac model.
    width
        Deviation of the narrowest mode of the law at t = 0, positive, in data units.
    step_size
        Positive: the share at the first step. The acceptance rates are in `SMCInfo.move_info`.
    target_acceptance
        Acceptance rate towards which ``step_size`` is tuned, between 0 and 1, or None to keep it.

    Returns
    -------
    Move, whose info is the acceptance rate.

    Raises
    ------
    TypeError
        If the path has no log density.
    ValueError
        If ``width`` or ``step_size`` is not positive, ``target_acceptance`` does not lie between 0 and 1, or
        ``times`` is no grid from 1 to 0.

    Source: Roberts and Rosenthal, "Optimal scaling of discrete approximations to Langevin diffusions", JRSS-B 60
    (1998).
    """
    for name, value in (("width", width), ("step_size", step_size)):
        if not isinstance(value, jax.core.Tracer) and not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}.")
    if target_acceptance is not None and not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must lie between 0 and 1, or be None, got {target_acceptance}.")
    moves = _moves("mala_moves", path, Partial(_mala, _MalaScale(path, width)), times)
    retune = None if target_acceptance is None else Partial(_retune, target_acceptance)
    return Move(Partial(_move, moves), jnp.log(step_size), retune)


def _moves(who, path, kernel, times):
    require(path, ScheduledPath, who)
    require(path.at(jnp.asarray(0.5)), HasLogDensity, who)
    return _Moves(path, check_times(times), kernel)


def _move(moves, tuning, rng_key, x, k):
    t = moves.times[k + 1]
    algorithm = moves.kernel(tuning, moves.path.at(t).logdensity, t)
    key_init, key_step = jax.random.split(rng_key)
    state, info = algorithm.step(key_step, algorithm.init(x, key_init))
    return state.position, info.acceptance_rate


def _fixed(kernel, tuning, logdensity_fn, t):
    return kernel(logdensity_fn, t)


def _retune(target, log_step_size, acceptance):
    """Longer steps where more is accepted than wanted; a rate that is not a number says nothing."""
    change = _GAIN * (acceptance - target)
    return log_step_size + jnp.where(jnp.isnan(change), 0.0, change).astype(log_step_size.dtype)


def _mala(scale, log_step_size, logdensity_fn, t):
    path, schedule = scale.path, scale.path.schedule
    total = jnp.sum(path.exponents_at(t)).astype(t.dtype) if isinstance(path, Composition) else 1.0
    variance = (schedule.alpha(t) * scale.width) ** 2 + schedule.sigma(t) ** 2 / total
    share = jnp.exp(log_step_size) * math.prod(path.event_shape) ** (-1 / 3)
    return blackjax.mala(logdensity_fn, share * variance)
