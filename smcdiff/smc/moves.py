"""Rejuvenation: Markov moves between the steps of SMC, which leave the target alone and the weights unchanged.

A `Move` leaves invariant what the particles target after step k of a Feynman-Kac model; `smcdiff.smc` applies it after
every step. For particles that are samples x, as those of `smcdiff.fkc` are, any MCMC kernel on the density of the path
at times[k + 1] will do. A kernel's state is made once a step, and kept over the moves.

Scores suffice for kernels whose acceptance is an integral of them. But no score is known at t = 0, so that paths
without log densities there get no moves after the last step.

Sources: Gilks and Berzuini, "Following a moving target: Monte Carlo inference for dynamic Bayesian models", JRSS-B 63
(2001); Buchholz, Chopin and Jacob, "Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo",
arXiv 1808.07730 (tuning from the cloud).
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.checks import check_positive
from smcdiff.compose.weighted import Composition
from smcdiff.density import ScheduledPath, has_data_density, require
from smcdiff.mcmc.langevin import mala
from smcdiff.schedules import check_times
from smcdiff.smc.feynman_kac import Move, repeat

__all__ = ["mala_moves", "mcmc_moves"]


class _Moves(eqx.Module):
    path: ScheduledPath
    times: Float[Array, " steps"]
    kernel: Callable
    moves_at_zero: bool = eqx.field(static=True)


class _Mala(eqx.Module):
    path: ScheduledPath
    width: Float[Array, ""] | float
    accept: str = eqx.field(static=True)


_GAIN = 2.0  # of the logarithm of the step size, by a unit of the acceptance rate


def mcmc_moves(path: ScheduledPath, kernel: Callable, *, times: Float[Array, " steps"]) -> Move:
    """Moves of any MCMC kernel on the densities of a path.

    Parameters
    ----------
    path
        Density path.
    kernel
        ``kernel(density, t)`` returns a `SamplingAlgorithm` for ``density = path.at(t)``, such as
        ``lambda density, t: smcdiff.mcmc.hmc(density, 0.1, 5)``, or a kernel of BlackJAX on ``density.logdensity``. Its
        info must have an ``acceptance_rate``. Make it a `jax.tree_util.Partial` of a module-level function, so that
        what it holds are leaves.
    times
        The grid of the Feynman-Kac model.

    Returns
    -------
    Move, whose info is the acceptance rate; nothing is tuned.

    Raises
    ------
    TypeError
        If ``path`` is no density path, or lacks what the kernel needs.
    ValueError
        If ``times`` is no grid from 1 to 0.
    """
    return Move(Partial(_move, _moves("mcmc_moves", path, Partial(_fixed, kernel), times, None)))


def mala_moves(
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    width: Float[Array, ""] | float,
    step_size: Float[Array, ""] | float = 0.5,
    target_acceptance: float | None = 0.574,
    accept: str = "exact",
) -> Move:
    """Moves of the Metropolis-adjusted Langevin algorithm, whose step follows the noise level.

    At time t the step h (x + h grad log pi + sqrt(2h) noise) is

        h = step_size d^(-1/3) (alpha^2 width^2 + sigma^2 / W),

    W the sum of the composition's exponents (1 for a diffusion): a share of the variance of a mode of that width. The
    share is tuned: where the cloud's acceptance rate is off its target, the next step has another.

    Parameters
    ----------
    path
        Density path; with log densities, as exact models and their compositions have them, unless ``accept`` does
        without.
    times
        The grid of the Feynman-Kac model.
    width
        Deviation of the narrowest mode of the law at t = 0, positive, in data units.
    step_size
        Positive: the share at the first step. The acceptance rates are in `SMCInfo.move_info`.
    target_acceptance
        Acceptance rate towards which ``step_size`` is tuned, between 0 and 1, or None to keep it.
    accept
        As in `smcdiff.mcmc.mala`: "exact" for acceptance by log densities, "line_integral" by scores.

    Returns
    -------
    Move, whose info is the acceptance rate.

    Raises
    ------
    TypeError
        If ``path`` is no density path, or has no log density where ``accept`` needs one.
    ValueError
        If ``width`` or ``step_size`` is not positive, ``target_acceptance`` does not lie between 0 and 1, ``accept``
        is unknown, or ``times`` is no grid from 1 to 0.

    Source: Roberts and Rosenthal, "Optimal scaling of discrete approximations to Langevin diffusions", JRSS-B 60
    (1998).
    """
    check_positive("width", width)
    check_positive("step_size", step_size)
    if target_acceptance is not None and not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must lie between 0 and 1, or be None, got {target_acceptance}.")
    first = jnp.log(step_size)
    moves = _moves("mala_moves", path, Partial(_mala, _Mala(path, width, accept)), times, first)
    retune = None if target_acceptance is None else Partial(_retune, target_acceptance)
    return Move(Partial(_move, moves), first, retune)


def _moves(who, path, kernel, times, tuning):
    require(path, ScheduledPath, who)
    times = check_times(times)
    density = path.at(times[-2])
    kernel(tuning, density, times[-2])  # raises now if the density lacks something
    return _Moves(path, times, kernel, has_data_density(path))


def _move(moves, tuning, rng_key, x, k, num_moves):
    t = moves.times[k + 1]
    stays = (t == 0) & (not moves.moves_at_zero)
    t = jnp.where(stays, moves.times[k], t)  # any at which the score is finite
    algorithm = moves.kernel(tuning, moves.path.at(t), t)
    key_init, key_moves = jax.random.split(rng_key)

    def step(key, state):
        state, info = algorithm.step(key, state)
        return state, info.acceptance_rate

    state, acceptance = repeat(step, key_moves, algorithm.init(x, key_init), num_moves)
    position = jax.tree.map(lambda old, new: jnp.where(stays, old, new), x, state.position)
    return position, jnp.where(stays, 0.0, acceptance)


def _fixed(kernel, tuning: Any, density, t):
    return kernel(density, t)


def _retune(target, log_step_size, acceptance):
    """Longer steps where more is accepted than wanted; a rate that is not a number says nothing."""
    change = _GAIN * (acceptance - target)
    return log_step_size + jnp.where(jnp.isnan(change), 0.0, change).astype(log_step_size.dtype)


def _mala(settings, log_step_size, density, t):
    path, schedule = settings.path, settings.path.schedule
    total = jnp.sum(path.exponents_at(t)).astype(t.dtype) if isinstance(path, Composition) else 1.0
    variance = (schedule.alpha(t) * settings.width) ** 2 + schedule.sigma(t) ** 2 / total
    share = jnp.exp(log_step_size) * math.prod(path.event_shape) ** (-1 / 3)
    return mala(density, share * variance, accept=settings.accept)
