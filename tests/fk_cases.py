"""Feynman-Kac models whose evidence and final law are known exactly; a new row brings its tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from smcdiff.smc import FeynmanKac


class Case(NamedTuple):
    fk: FeynmanKac
    log_evidence: float
    mean: np.ndarray  # of the final filtering law, of ``observe(particles)``
    observe: object


# A linear-Gaussian state space model: x_0 ~ N(1, 4), x_k = .8 x_{k-1} + .5 + N(0, .3), y_k ~ N(x_k, .7).
_SLOPE, _OFFSET, _Q, _R, _M0, _P0 = 0.8, 0.5, 0.3, 0.7, 1.0, 4.0
_OBSERVED = np.array([0.3, 1.9, 2.2, -0.6, 4.0, 3.1])


def _log_normal(y, mean, variance):
    return -0.5 * (y - mean) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)


def _gaussian_init(observed, rng_key):
    x = _M0 + jnp.sqrt(_P0) * jax.random.normal(rng_key, ())
    return {"x": x}, _log_normal(observed[0], x, _R)


def _gaussian_step(observed, rng_key, particle, k):
    x = _SLOPE * particle["x"] + _OFFSET + jnp.sqrt(_Q) * jax.random.normal(rng_key, ())
    return {"x": x}, _log_normal(observed[k + 1], x, _R)


def _kalman():
    mean, variance, total = _M0, _P0, 0.0
    for k, y in enumerate(_OBSERVED):
        if k:
            mean, variance = _SLOPE * mean + _OFFSET, _SLOPE**2 * variance + _Q
        spread = variance + _R
        total += -0.5 * (y - mean) ** 2 / spread - 0.5 * np.log(2 * np.pi * spread)
        gain = variance / spread
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
    return total, mean


def gaussian() -> Case:
    """A Kalman filter's problem."""
    observed = jnp.asarray(_OBSERVED, jnp.float32)
    log_evidence, mean = _kalman()
    fk = FeynmanKac(Partial(_gaussian_init, observed), Partial(_gaussian_step, observed), len(_OBSERVED) - 1)
    return Case(fk, log_evidence, np.array(mean), lambda particles: particles["x"])


# A hidden Markov chain on three states, asymmetric: integer particles, exact by the forward algorithm.
_START = np.array([0.6, 0.3, 0.1])
_MOVE = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.25, 0.05, 0.7]])
_EMIT = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
_SYMBOLS = np.array([0, 1, 1, 0, 1, 1, 1])


def _chain_init(tables, rng_key):
    start, _, emit, symbols = tables
    state = jax.random.categorical(rng_key, jnp.log(start)).astype(jnp.int32)
    return state, jnp.log(emit[state, symbols[0]])


def _chain_step(tables, rng_key, state, k):
    _, move, emit, symbols = tables
    state = jax.random.categorical(rng_key, jnp.log(move[state])).astype(jnp.int32)
    return state, jnp.log(emit[state, symbols[k + 1]])


def hidden_markov() -> Case:
    """A discrete hidden Markov model."""
    tables = tuple(jnp.asarray(a, jnp.float32) for a in (_START, _MOVE, _EMIT)) + (jnp.asarray(_SYMBOLS),)
    law = _START * _EMIT[:, _SYMBOLS[0]]
    for symbol in _SYMBOLS[1:]:
        law = (law @ _MOVE) * _EMIT[:, symbol]
    filtered = law / law.sum()
    fk = FeynmanKac(Partial(_chain_init, tables), Partial(_chain_step, tables), len(_SYMBOLS) - 1)
    return Case(fk, float(np.log(law.sum())), filtered, lambda states: np.eye(3)[np.asarray(states)])


CASES = {"gaussian": gaussian, "hidden_markov": hidden_markov}
