"""Warm-up: a step size, and an estimate of the covariance, from pilot steps that are thrown away.

The step size e is found by dual averaging: with H_t = target - acceptance rate in step t, log e follows the running sum
of H and is averaged with weights t^-0.75. The inverse mass matrix is the covariance of the chains' positions in windows
of doubling length, shrunk a little, as in Stan. Both are BlackJAX's; what is added is that chains are pooled: all share
one step size, which is moved by their mean acceptance rate, and one covariance. After the warm-up the settings are
numbers, and the chain that uses them is a Markov chain. Its acceptance rate is the one that was wanted for MALA; for
HMC, whose rate falls ever faster as the step grows, it is a few percent higher, as is usual with dual averaging.

Everything works for any kernel whose info has an ``acceptance_rate``, in particular for those that accept by scores.
One program does the whole warm-up; targets and other arrays are its arguments.

Sources: Hoffman and Gelman, "The No-U-Turn Sampler", arXiv 1111.4246 (dual averaging); Carpenter et al., "Stan: a
probabilistic programming language", J. Stat. Softw. 76 (2017) (windows).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mass_matrix import (
    MassMatrixAdaptationState,
    WelfordAlgorithmState,
    mass_matrix_adaptation,
)
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation
from blackjax.adaptation.window_adaptation import build_schedule
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from smcdiff.checks import check_count, check_positive, check_start
from smcdiff.density import as_pytree
from smcdiff.moments import Moments, add_rows

__all__ = [
    "Adaptation",
    "WarmUp",
    "adapt",
    "adapt_step_size",
    "adapt_until",
    "begin_adaptation",
    "check_rejects",
    "settings_at",
    "window_adaptation",
    "window_stages",
]


class WarmUp(NamedTuple):
    """What a warm-up found.

    Attributes
    ----------
    settings
        Arguments of the kernel: ``step_size``, a scalar, and for `window_adaptation` ``inverse_mass_matrix``.
    positions
        Where the chains are now, with the leading axis (num_chains,).
    acceptance_rates
        Mean over the chains in every step, shape (num_steps,).
    step_sizes
        Which was used in every step, shape (num_steps,).
    """

    settings: dict[str, Array | None]
    positions: PyTree
    acceptance_rates: Float[Array, " steps"]
    step_sizes: Float[Array, " steps"]


def adapt_step_size(
    rng_key: PRNGKeyArray,
    build: Callable[[Float[Array, ""]], SamplingAlgorithm],
    positions: PyTree,
    num_steps: int,
    *,
    target_acceptance: float = 0.8,
    initial_step_size: float = 0.1,
) -> WarmUp:
    """The step size at which a kernel accepts at a given rate, by dual averaging over a batch of chains.

    Parameters
    ----------
    build
        ``build(step_size)`` returns the kernel, whose state must not depend on the step size. As a
        `jax.tree_util.Partial` of a module-level function it is compiled once for all targets of a shape.
    positions
        Starting positions, a pytree with the leading axis (num_chains,).
    num_steps
        Pilot steps of every chain.
    target_acceptance
        Mean acceptance rate that is wanted, in (0, 1): about 0.57 for MALA, 0.65 to 0.9 for HMC.
    initial_step_size
        Positive. From a value that is too large by far, nothing is learnt in the first steps.

    Returns
    -------
    WarmUp

    Raises
    ------
    TypeError
        If the kernel's info has no ``acceptance_rate``, or if it accepts always.
    ValueError
        If a number is out of range, or a chain starts where its state is not finite.

    Source: Hoffman and Gelman, arXiv 1111.4246, section 3.2.
    """
    start = _checked(num_steps, target_acceptance, initial_step_size)
    stages = jnp.zeros((num_steps, 2), jnp.int32)
    found = _checked_warm_up(
        rng_key, Partial(_ignore_metric, as_pytree(build)), positions, stages, start, None
    )
    return found._replace(settings={"step_size": found.settings["step_size"]})


def window_adaptation(
    rng_key: PRNGKeyArray,
    target: Any,
    algorithm: Callable[..., SamplingAlgorithm],
    positions: PyTree,
    num_steps: int,
    *,
    target_acceptance: float = 0.8,
    initial_step_size: float = 1.0,
    is_mass_matrix_diagonal: bool = True,
    **options: Any,
) -> WarmUp:
    """Step size and inverse mass matrix in Stan's windows, over a batch of chains.

    Parameters
    ----------
    target
        What ``algorithm`` takes for a target; for BlackJAX's kernels a log density function.
    algorithm
        ``algorithm(target, step_size=..., inverse_mass_matrix=..., **options)`` returns the kernel: `smcdiff.mcmc.hmc`,
        `smcdiff.mcmc.mala`, ``blackjax.nuts`` and their like.
    positions
        Starting positions, a pytree with the leading axis (num_chains,).
    num_steps
        Pilot steps of every chain; below 20 only the step size is adapted.
    target_acceptance
        Mean acceptance rate that is wanted, in (0, 1).
    initial_step_size
        Positive.
    is_mass_matrix_diagonal
        Variances (d,) if true, else a covariance (d, d), over the flattened sample.
    **options
        Further arguments of ``algorithm``, for instance ``num_integration_steps``.

    Returns
    -------
    WarmUp, for ``algorithm(target, **settings, **options)``.

    Raises
    ------
    TypeError
        If the kernel's info has no ``acceptance_rate``, or if it accepts always.
    ValueError
        If a number is out of range, or a chain starts where its state is not finite.

    Source: Carpenter et al., "Stan: a probabilistic programming language" (2017).
    """
    start = _checked(num_steps, target_acceptance, initial_step_size)
    arrays, static = eqx.partition(options, eqx.is_array)
    build = _Build(as_pytree(target), as_pytree(algorithm), arrays, tuple(sorted(static.items())))
    return _checked_warm_up(
        rng_key, build, positions, window_stages(num_steps), start, is_mass_matrix_diagonal
    )


def window_stages(num_steps: int) -> Int[Array, "steps 2"]:
    """Stan's windows: whether each step counts for the covariance, and whether it ends a window."""
    with jax.numpy_dtype_promotion("standard"):  # of BlackJAX's pairs of a number and a truth value
        return jnp.asarray(build_schedule(num_steps), jnp.int32)


class _Build(eqx.Module):
    """The kernel of `window_adaptation` at given settings."""

    target: Any
    algorithm: Callable
    arrays: dict[str, Array]
    static: tuple = eqx.field(static=True)

    def __call__(self, step_size, inverse_mass_matrix):
        options = eqx.combine(self.arrays, dict(self.static))
        return self.algorithm(
            self.target, step_size=step_size, inverse_mass_matrix=inverse_mass_matrix, **options
        )


def _ignore_metric(build, step_size, inverse_mass_matrix):
    return build(step_size)


def _checked(num_steps, target_acceptance, initial_step_size):
    """The rate that is wanted and the first step size, as arrays."""
    check_count("num_steps", num_steps)
    check_positive("initial_step_size", initial_step_size)
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {target_acceptance}.")
    return jnp.asarray([target_acceptance, initial_step_size], jnp.result_type(float))


class Adaptation(NamedTuple):
    """A warm-up on its way; begin it with `begin_adaptation`, go on with `adapt`.

    Attributes
    ----------
    averaging
        State of BlackJAX's dual averaging.
    metric
        Inverse mass matrix, or None where only the step size is adapted.
    pool
        Moments of the positions since the window began, or None.
    """

    averaging: DualAveragingAdaptationState
    metric: Float[Array, " d"] | Float[Array, "d d"] | None
    pool: Any

    @property
    def step_size(self) -> Float[Array, ""]:
        """The step size of the next step."""
        return jnp.exp(self.averaging.log_step_size)

    @property
    def settings(self) -> dict[str, Any]:
        """What the kernel gets after the warm-up: the averaged step size and the inverse mass matrix."""
        return {
            "step_size": jnp.exp(self.averaging.log_step_size_avg),
            "inverse_mass_matrix": self.metric,
        }


def begin_adaptation(step_size, metric) -> Adaptation:
    """A warm-up before its first step, from a step size and an inverse mass matrix or None."""
    start, _, _ = _dual_averaging(0.8)  # the rate that is wanted enters with the first update
    return Adaptation(start(step_size), metric, None if metric is None else _empty(metric))


def adapt(adaptation: Adaptation, x, info, stage, target_acceptance) -> Adaptation:
    """A warm-up after one more step of all chains.

    Parameters
    ----------
    adaptation
        It before the step.
    x
        Flat positions of the chains, (num_chains, d).
    info
        What their kernels reported.
    stage
        Whether the step counts for the covariance, and whether it ends a window: a row of BlackJAX's
        ``build_schedule``.
    target_acceptance
        Mean acceptance rate that is wanted.
    """
    averaging, metric, pool = adaptation
    start, update, final = _dual_averaging(target_acceptance)
    averaging = update(averaging, jnp.mean(_acceptance_rate(info).astype(target_acceptance.dtype)))
    if metric is not None:
        is_slow, is_end = stage
        pool = jax.tree.map(lambda a, b: jnp.where(is_slow == 1, a, b), add_rows(pool, x), pool)
        ended = (start(final(averaging)), _covariance(pool, metric), _empty(metric))
        averaging, metric, pool = jax.tree.map(
            lambda a, b: jnp.where(is_end == 1, a, b), ended, (averaging, metric, pool)
        )
    return Adaptation(averaging, metric, pool)


def adapt_until(
    adaptation: Adaptation, x, info, step, num_warmup: int, target_acceptance: float
) -> Adaptation:
    """The warm-up of ONE chain after step number ``step``, at ``x`` (d,); unchanged from step ``num_warmup`` on."""
    if num_warmup == 0:
        return adaptation
    stage = window_stages(num_warmup)[jnp.minimum(step, num_warmup - 1)]
    adapted = adapt(adaptation, x[None], info, (stage[0], stage[1]), jnp.asarray(target_acceptance, x.dtype))
    return jax.tree.map(lambda old, new: jnp.where(step >= num_warmup, old, new), adaptation, adapted)


def settings_at(adaptation: Adaptation, step, num_warmup: int) -> dict[str, Any]:
    """Settings of step number ``step``: those on trial in a warm-up of ``num_warmup`` steps, then the averaged ones."""
    settings: dict[str, Any] = adaptation.settings
    step_size = jnp.where(step >= num_warmup, settings["step_size"], adaptation.step_size)
    return settings | {"step_size": step_size}


def _checked_warm_up(rng_key, build, positions, stages, wanted, is_diagonal):
    """The warm-up, if it could start and had something to tune."""
    found, states = _warm_up(rng_key, build, positions, stages, wanted, is_diagonal)
    check_start(states, "positions")
    check_rejects(found.acceptance_rates)
    return found


def check_rejects(acceptance_rates: Float[Array, " steps"]) -> None:
    """Raise a `TypeError` if a kernel accepted always: its step size would rise without end; tracers pass."""
    if not isinstance(acceptance_rates, jax.core.Tracer) and np.all(np.asarray(acceptance_rates) == 1.0):
        raise TypeError(
            "a warm-up tunes the step size by the acceptance rate, and this kernel accepts always; tune mala or hmc, "
            "whose step is about as long, and give that to ula, underdamped or uhmc."
        )


@eqx.filter_jit
def _warm_up(rng_key, build, positions, stages, wanted, is_diagonal):
    """The warm-up; a row of ``stages`` tells whether a step counts for the covariance, and whether it ends a window."""
    target_acceptance, step_size = wanted
    x = jax.vmap(lambda position: ravel_pytree(position)[0])(positions)
    num_chains, size = x.shape
    metric = None
    if is_diagonal is not None:
        metric = jnp.ones(size, x.dtype) if is_diagonal else jnp.eye(size, dtype=x.dtype)
    key_init, key_steps = jax.random.split(rng_key)
    states = jax.vmap(build(step_size, metric).init)(positions, jax.random.split(key_init, num_chains))

    def one_step(carry, inputs):
        states, adaptation = carry
        k, stage = inputs
        step_size = adaptation.step_size
        keys = jax.random.split(jax.random.fold_in(key_steps, k), num_chains)
        states, info = jax.vmap(build(step_size, adaptation.metric).step)(keys, states)
        x = jax.vmap(lambda position: ravel_pytree(position)[0])(states.position)
        adaptation = adapt(adaptation, x, info, stage, target_acceptance)
        return (states, adaptation), (jnp.mean(_acceptance_rate(info).astype(step_size.dtype)), step_size)

    carry = (states, begin_adaptation(step_size, metric))
    inputs = (jnp.arange(len(stages)), (stages[:, 0], stages[:, 1]))
    (last, adaptation), (rates, step_sizes) = jax.lax.scan(one_step, carry, inputs)
    return WarmUp(adaptation.settings, last.position, rates, step_sizes), states


def _acceptance_rate(info):
    """The acceptance rates of the chains, 0 where they are no number."""
    rate = getattr(info, "acceptance_rate", None)
    if rate is None:
        raise TypeError(
            f"a warm-up needs a kernel whose info has an acceptance_rate, got {type(info).__name__}."
        )
    return jnp.where(jnp.isfinite(rate), rate, 0.0)


def _dual_averaging(target_acceptance):
    """BlackJAX's dual averaging, with a state whose dtypes do not change on the way."""
    start, update, final = dual_averaging_adaptation(target_acceptance)

    def strict(function):
        def call(*arguments):
            with jax.numpy_dtype_promotion("standard"):
                state = function(*arguments)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, arguments[-1].dtype), state)

        return call

    return strict(start), strict(update), final


def _empty(metric):
    return Moments(
        jnp.zeros((), metric.dtype), jnp.zeros(metric.shape[0], metric.dtype), jnp.zeros_like(metric)
    )


def _covariance(pool, metric):
    """BlackJAX's (Stan's) estimate of the covariance from a window."""
    _, _, final = mass_matrix_adaptation(metric.ndim == 1)
    welford = WelfordAlgorithmState(pool.mean, pool.squares, pool.size)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return final(MassMatrixAdaptationState(metric, welford)).inverse_mass_matrix.astype(metric.dtype)
