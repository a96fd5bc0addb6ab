"""Annealed MCMC: down a density path from noise to data, with a few steps of a kernel at every level.

At each time s of a grid the particles, which have about the law of the level above, take n steps of a kernel that
leaves p_s alone. So compositions can be sampled, whose reverse process is not known: only the densities of the levels
matter, not how they follow from each other. With many steps a level the end is right whatever came before; with few,
modes keep the weights they had when they parted, so that `smcdiff.fkc`, whose weights move mass between modes, is the
better choice where its weights hold out.

`weights="density"` makes annealed importance sampling of it (sequential Monte Carlo, if resampled): the increment
log pi_s(x) - log pi_t(x) before the moves, which is exact at any number of levels.

Sources: Du et al., "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC",
arXiv 2302.11552; Neal, "Annealed importance sampling", arXiv physics/9803008.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from smcdiff.checks import check_between, check_count, check_positive
from smcdiff.compose import Composition
from smcdiff.density import HasLogDensity, ScheduledPath, as_pytree, denoised, has_data_density, require
from smcdiff.mcmc.langevin import mala
from smcdiff.mcmc.warmup import check_rejects
from smcdiff.reverse import reverse_transition
from smcdiff.schedules import check_times
from smcdiff.smc.feynman_kac import FeynmanKac, repeat

__all__ = ["TunedStepSizes", "annealed_mcmc", "tune_step_sizes"]

_BAND = 0.2  # of acceptance rates about the one that is wanted, outside of which there is a warning
_GAIN = 2.0  # of the logarithm of the step size, by a unit of the acceptance rate


class _Annealed(eqx.Module):
    path: ScheduledPath
    times: Float[Array, " steps"]
    step_sizes: Float[Array, " levels"]
    kernel: Callable
    eta: Float[Array, ""] | float | None
    steps_per_level: int = eqx.field(static=True)
    is_weighted: bool = eqx.field(static=True)
    ends_on_data: bool = eqx.field(static=True)


def annealed_mcmc(
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    step_sizes: Float[Array, " levels"] | float,
    kernel: Callable | None = None,
    steps_per_level: int = 5,
    predictor: Float[Array, ""] | float | None = None,
    weights: str = "none",
) -> FeynmanKac:
    """Feynman-Kac model that walks a path from noise to data by MCMC at every level.

    Particles are samples x. Run it with `smcdiff.run_smc`; without weights the particles never interact.

    Parameters
    ----------
    path
        A composition, or any other density path.
    times
        Grid that falls from 1 to 0; its points after the first are the levels. Where the path has no log density at
        t = 0, as networks and energy models, the last step is a denoising one, since there is no score either.
    step_sizes
        Of the kernel at every level, shape (num_steps,), or one for all relative to sigma^2; see `tune_step_sizes`.
    kernel
        ``kernel(target, step_size) -> SamplingAlgorithm``, where target is ``path.at(t)``: for instance
        `smcdiff.mcmc.mala`, or ``functools.partial(mcmc.hmc, num_integration_steps=3)`` made once. By default MALA,
        which accepts by densities where there are any, and by line integrals of the score else.
    steps_per_level
        Steps of the kernel at each level.
    predictor
        None, or the noise eta of a reverse transition before the steps of each level: 0 for the deterministic one, 1
        for the ancestral one.
    weights
        "none", or "density" for annealed importance weights, which need log densities and no predictor. Where the last
        step denoises it has no weight, and the evidence is that of the last level.

    Raises
    ------
    TypeError
        If ``path`` is no density path, or has no log density where one is needed.
    ValueError
        If ``times`` is no grid from 1 to 0, or another argument is out of range.

    Source: "Reduce, Reuse, Recycle", arXiv 2302.11552.
    """
    require(path, ScheduledPath, "annealed_mcmc")
    times = check_times(times)
    check_count("steps_per_level", steps_per_level)
    check_positive("step_sizes", step_sizes)
    if weights not in ("none", "density"):
        raise ValueError(f'weights must be "none" or "density", got {weights!r}.')
    if weights == "density":
        require(path.at(times[0]), HasLogDensity, 'annealed_mcmc with weights="density"')
        if predictor is not None:
            raise ValueError(
                'weights="density" does not go with a predictor, whose law is not that of the level; '
                "smcdiff.fkc weighs reverse transitions."
            )
    if predictor is not None:
        check_between("predictor", predictor, 0.0, np.inf)
    sizes = _step_sizes(path, times, step_sizes)
    kernel = as_pytree(kernel or _default_kernel(path))
    kernel(path.at(times[1]), sizes[0])  # raises now if the density lacks something
    annealed = _Annealed(
        path,
        times,
        sizes,
        kernel,
        predictor,
        steps_per_level,
        weights == "density",
        has_data_density(path),
    )
    return FeynmanKac(Partial(_init, annealed), Partial(_step, annealed), len(times) - 1)


class TunedStepSizes(NamedTuple):
    """Result of `tune_step_sizes`.

    Attributes
    ----------
    step_sizes
        One for every level, shape (num_steps,).
    acceptance_rates
        Mean acceptance rate of the pilot's last steps at every level, shape (num_steps,).
    """

    step_sizes: Float[Array, " levels"]
    acceptance_rates: Float[Array, " levels"]


def tune_step_sizes(
    rng_key: PRNGKeyArray,
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    kernel: Callable | None = None,
    initial: Float[Array, " levels"] | float = 0.5,
    target_acceptance: float = 0.6,
    num_particles: int = 200,
    num_rounds: int = 20,
) -> TunedStepSizes:
    """Step sizes for `annealed_mcmc`, from a pilot cloud that walks the path, to be frozen then.

    At every level the cloud takes ``num_rounds`` steps, after each of which the step size moves towards the acceptance
    rate that is wanted; the average of its logarithm over the second half is kept.

    Parameters
    ----------
    rng_key
        Key.
    path, times, kernel
        As in `annealed_mcmc`.
    initial
        First step sizes, as ``step_sizes`` there.
    target_acceptance
        Acceptance rate that is wanted, between 0 and 1.
    num_particles
        Size of the pilot cloud.
    num_rounds
        Steps, and corrections, at every level.

    Raises
    ------
    TypeError
        As `annealed_mcmc`; if the kernel accepts always, so that no rate tells its step size.
    ValueError
        As `annealed_mcmc`.

    Warns
    -----
    UserWarning
        If the acceptance rate of a level is off by more than 0.2.
    """
    fk = annealed_mcmc(path, times=times, step_sizes=initial, kernel=kernel)
    check_between("target_acceptance", target_acceptance, 0.0, 1.0)
    check_count("num_particles", num_particles)
    check_count("num_rounds", num_rounds)
    (annealed,) = fk.step.args  # type: ignore[attr-defined]  # a Partial
    tuned = TunedStepSizes(*_tune(rng_key, annealed, target_acceptance, num_particles, num_rounds))
    _check_rates(tuned.acceptance_rates, target_acceptance)
    return tuned


def _check_rates(rates, target):
    """Raise where a kernel never rejects, warn where a level's rate is far from what was wanted."""
    if isinstance(rates, jax.core.Tracer):
        return
    check_rejects(rates)
    rates = np.asarray(rates)
    far = np.flatnonzero(~(np.abs(rates - target) < _BAND))  # or no number
    if far.size:
        warnings.warn(
            f"tune_step_sizes was to find an acceptance rate of {target:g}, and {far.size} of {len(rates)} levels are "
            f"off by more than {_BAND}; level {far[-1] + 1} has {rates[far[-1]]:.2g}. Take more rounds, a better "
            "initial step size, or more levels where the densities change fast.",
            UserWarning,
            stacklevel=3,
        )


def _default_kernel(path):
    half = path.at(jnp.asarray(0.5))
    return mala if isinstance(half, HasLogDensity) else _score_mala


_score_mala = functools.partial(mala, accept="line_integral")


def _step_sizes(path, times, step_sizes):
    """One number stands for a share of sigma^2, not less than that of the last noisy level."""
    step_sizes = jnp.asarray(step_sizes, times.dtype)
    if step_sizes.ndim == 0:
        variances = jax.vmap(path.schedule.sigma)(times[1:]) ** 2
        return step_sizes * jnp.maximum(variances, variances[-2] if len(times) > 2 else 1.0)
    if step_sizes.shape != (len(times) - 1,):
        raise ValueError(
            f"step_sizes must be a number or have one entry for each of the {len(times) - 1} levels, got shape "
            f"{step_sizes.shape}."
        )
    return step_sizes


def _init(annealed, rng_key):
    """Draw at t = 1 from N(0, sigma_1^2 / W), W the sum of the exponents; weigh against the density there."""
    path, start = annealed.path, annealed.times[0]
    total = jnp.sum(path.exponents_at(start)).astype(start.dtype) if isinstance(path, Composition) else 1.0
    std = path.schedule.sigma(start) / jnp.sqrt(total)
    x = std * jax.random.normal(rng_key, path.event_shape, start.dtype)
    if not annealed.is_weighted:
        return x, jnp.zeros((), x.dtype)
    return x, path.at(start).logdensity(x) - jnp.sum(jax.scipy.stats.norm.logpdf(x, scale=std))


def _step(annealed, rng_key, x, k):
    """Weigh, predict if asked, and take the steps of level times[k + 1]."""
    path, t, s = annealed.path, annealed.times[k], annealed.times[k + 1]
    key_predict, key_moves = jax.random.split(rng_key)
    is_last = k == annealed.times.shape[0] - 2
    increment = jnp.zeros((), x.dtype)
    if annealed.is_weighted:
        level = s if annealed.ends_on_data else jnp.where(is_last, t, s)
        increment = path.at(level).logdensity(x) - path.at(t).logdensity(x)
    if annealed.eta is not None:
        mean, std = reverse_transition(path.schedule, x, denoised(path, x, t), t, s, annealed.eta)
        x = mean + std * jax.random.normal(key_predict, x.shape, x.dtype)

    def moves(x):
        return _moves(annealed, key_moves, x, k, annealed.step_sizes[k], annealed.steps_per_level)[0]

    if annealed.ends_on_data:
        return moves(x), increment
    last = (lambda x: x) if annealed.eta is not None else (lambda x: denoised(path, x, t))
    return jax.lax.cond(is_last, last, moves, x), increment


def _moves(annealed, rng_key, x, k, step_size, num_moves):
    """The sample after ``num_moves`` steps of the kernel at times[k + 1], and their mean acceptance rate."""
    algorithm = annealed.kernel(annealed.path.at(annealed.times[k + 1]), step_size)
    key_init, key_moves = jax.random.split(rng_key)

    def one_move(key, state):
        state, info = algorithm.step(key, state)
        return state, info.acceptance_rate

    state, rate = repeat(one_move, key_moves, algorithm.init(x, key_init), num_moves)
    return state.position, rate


@eqx.filter_jit  # a kernel may hold strings
def _tune(rng_key, annealed, target, num_particles, num_rounds):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(num_particles))
    cloud = jax.vmap(lambda key: _init(annealed, key)[0])(keys)
    start = jnp.log(annealed.step_sizes)
    num_levels = annealed.times.shape[0] - (1 if annealed.ends_on_data else 2)

    def level(carry, k):
        cloud, off = carry

        def correct(carry, index):
            cloud, log_step = carry
            key = jax.random.fold_in(jax.random.fold_in(rng_key, k), index)
            each = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_particles))
            cloud, rates = jax.vmap(lambda key, x: _moves(annealed, key, x, k, jnp.exp(log_step), 1))(
                each, cloud
            )
            rate = jnp.mean(rates)
            return (cloud, log_step + _GAIN * jnp.nan_to_num(rate - target)), (log_step, rate)

        # The last level's correction of the first guess is carried over to this one.
        (cloud, _), (log_steps, rates) = jax.lax.scan(
            correct, (cloud, start[k] + off), jnp.arange(num_rounds)
        )
        kept = jnp.mean(log_steps[num_rounds // 2 :])
        return (cloud, kept - start[k]), (jnp.exp(kept), jnp.mean(rates[num_rounds // 2 :]))

    carry = (cloud, jnp.zeros((), start.dtype))
    _, (step_sizes, rates) = jax.lax.scan(level, carry, jnp.arange(num_levels))
    # A last step that only denoises has no step size of its own.
    missing = annealed.times.shape[0] - 1 - num_levels
    return jnp.pad(step_sizes, (0, missing), mode="edge"), jnp.pad(rates, (0, missing), mode="edge")
