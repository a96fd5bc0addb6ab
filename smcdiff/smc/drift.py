"""Fitting the extra drift of Feynman-Kac correctors: the one whose weights vary least.

A drift g^2 sum theta_i s_i / 2 along the parts' scores changes the increment of the log weight at times[k] from a to

    a + sum theta_i h_i,        h_i = Delta (s_i.(S + grad R) + div s_i),

see `smcdiff.smc.corrector`. On a weighted cloud of a pilot run theta is fitted by least squares, step by step,

    minimise   Var(a + sum theta_i h_i) + ridge tr(Cov h) / n |theta - theta_0|^2,        theta_0 = (1/W - 1) w,

and the cloud goes on with it. The ridge decides where the cloud does not: in the noise phase all s_i are one. The pilot
averages several probes of each divergence, though the run takes one: what one probe adds to the increments is
independent between steps, and counts less in their sum than what the fit would trade for it.

Given the coefficients, the run's evidence is as good as with any other numbers. The fit is greedy: it evens the single
increments. For mixtures in two dimensions and 200 steps the deviation of the log evidence falls from 0.30 to 0.07
(guidance by 2.5) and from 0.083 to 0.015 (a contrast), but not at all for a cube, where drift control is near its
optimum.

Source: Ren et al., "DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models",
arXiv 2509.21655, which fits on the run's own particles.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcdiff.batching import batched_map
from smcdiff.checks import check_count, check_positive
from smcdiff.density import ScheduledPath
from smcdiff.run import run
from smcdiff.smc.corrector import Corrector, look, move, price, score_init
from smcdiff.smc.fkc import fkc
from smcdiff.smc.resampling import resample_from_log_weights, systematic
from smcdiff.smc.weights import is_uneven, reweigh, uniform_log_weights

__all__ = ["fit_drift"]


class _Pilot(eqx.Module):
    corrector: Corrector
    ridge: Float[Array, ""] | float
    num_particles: int = eqx.field(static=True)
    num_probes: int = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)


class _Cloud(NamedTuple):
    x: Float[Array, "N *event"]
    log_weights: Float[Array, " N"]
    drift: Float[Array, " parts"]
    step: Int[Array, ""]


def fit_drift(
    rng_key: PRNGKeyArray,
    path: ScheduledPath,
    *,
    times: Float[Array, " steps"],
    num_particles: int,
    eta: Float[Array, ""] | float = 1.0,
    ridge: Float[Array, ""] | float = 1e-2,
    num_probes: int = 8,
    batch_size: int | None = None,
) -> Float[Array, "steps parts"]:
    """Coefficients of the drift that makes the weights of `smcdiff.fkc` as even as drifts along the scores can.

    Pass them as ``drift_control``, with the same path, grid and ``eta``. The pilot run that finds them costs, a
    particle and step, the scores and ``num_probes`` Jacobian-vector products of them.

    Parameters
    ----------
    rng_key
        Key; another one than that of the run.
    path
        A composition from `smcdiff.compose`.
    times
        Grid that falls from 1 to 0, as in `smcdiff.fkc`.
    num_particles
        Particles of the pilot run, a few hundred at least.
    eta
        Noise of the reverse process.
    ridge
        Positive: how much, relative to the variance that a unit of a coefficient makes, the fit is held to the
        coefficients of drift control.
    num_probes
        Probes of each divergence, positive.
    batch_size
        Particles moved together; bounds memory.

    Returns
    -------
    Coefficients theta of shape (len(times) - 1, parts).

    Raises
    ------
    TypeError, ValueError
        As `smcdiff.fkc` does; if a count is no positive integer or ``ridge`` is not positive.

    Source: "DriftLite", arXiv 2509.21655.
    """
    check_count("num_particles", num_particles)
    check_count("num_probes", num_probes)
    check_positive("ridge", ridge)
    fk = fkc(path, times=times, eta=eta, drift_control=True)
    (corrector,) = fk.init.args  # type: ignore[attr-defined]  # a Partial
    pilot = _Pilot(corrector, ridge, num_particles, num_probes, batch_size)
    algorithm = SamplingAlgorithm(Partial(_init, pilot), Partial(_step, pilot))
    trace = run(rng_key, algorithm, fk.num_steps, transform=_keep_drift, progress=False)
    return jnp.asarray(trace.samples[0])


def _keep_drift(state: _Cloud, info: Any):
    return state.drift


def _init(pilot, position, rng_key):
    del position
    x, increments = batched_map(Partial(score_init, pilot.corrector), pilot.batch_size)(_keys(pilot, rng_key))
    log_weights, _, _ = reweigh(uniform_log_weights(pilot.num_particles, x.dtype), increments)
    return _Cloud(x, log_weights, pilot.corrector.drift[0], jnp.zeros((), jnp.int32))


def _step(pilot, rng_key, cloud):
    """Resample if the weights are uneven, look, fit the drift, then weigh and move with it."""
    corrector, k = pilot.corrector, cloud.step
    key_resample, key_move = jax.random.split(rng_key)
    keys = _keys(pilot, key_move)

    def resample(x, log_weights):
        ancestors = resample_from_log_weights(systematic, key_resample, log_weights, pilot.num_particles)
        return x[ancestors], uniform_log_weights(pilot.num_particles, log_weights.dtype)

    x, log_weights = jax.lax.cond(
        is_uneven(cloud.log_weights, 0.5, k), resample, lambda *same: same, cloud.x, cloud.log_weights
    )
    local = batched_map(lambda key, x: look(corrector, key, x, k, pilot.num_probes), pilot.batch_size)(
        keys, x
    )

    def prices(drift, drift_before):
        return jax.vmap(lambda local: price(corrector, k, local, drift, drift_before))(local)

    given = corrector.drift[k]
    columns = jax.vmap(lambda unit: prices(unit, unit), out_axes=1)(jnp.eye(len(given), dtype=x.dtype))
    increments = local.increment + columns @ given
    drift = given + _least_squares(jnp.exp(log_weights), increments, columns, pilot.ridge)
    log_weights, _, _ = reweigh(log_weights, local.increment + prices(drift, cloud.drift))

    def onward(key, x, local):
        return move(corrector, key, x, k, local, drift)

    x = batched_map(onward, pilot.batch_size)(keys, x, local)
    return _Cloud(x, log_weights, drift, k + 1), None


def _least_squares(weights, values, columns, ridge):
    """The c that minimises the weighted variance of values + columns @ c, and the ridge; zero if nothing is finite."""
    usable = jnp.isfinite(values) & jnp.all(jnp.isfinite(columns), axis=1) & (weights > 0)
    weights = jnp.where(usable, weights, 0.0)
    weights /= jnp.sum(weights)
    values, columns = jnp.where(usable, values, 0.0), jnp.where(usable[:, None], columns, 0.0)
    values, columns = values - weights @ values, columns - (weights @ columns)[None]
    gram = (columns * weights[:, None]).T @ columns
    scale = jnp.trace(gram) / len(gram)
    held = gram + (ridge * scale).astype(gram.dtype) * jnp.eye(len(gram), dtype=gram.dtype)
    solution = jnp.linalg.solve(held, -(columns.T @ (weights * values)))
    return jnp.where(jnp.all(jnp.isfinite(solution)), solution, 0.0)


def _keys(pilot, rng_key):
    return jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(pilot.num_particles))
