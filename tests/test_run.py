"""The runner: the same numbers however the loop is cut, and one compilation for all models of a shape."""

from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array

import smcdiff


class State(NamedTuple):
    position: Array
    count: Array


class Info(NamedTuple):
    noise: Array


_traces = []


def _init(rate, position, rng_key):
    return State(position, jnp.zeros((), jnp.int32))


def _step(rate, rng_key, state):
    _traces.append(None)
    noise = jax.random.normal(rng_key, state.position.shape)
    return State(rate * state.position + noise, state.count + 1), Info(noise)


def walk(rate=0.5):
    return SamplingAlgorithm(Partial(_init, rate), Partial(_step, rate))


START = jnp.asarray([[0.0, 1.0], [2.0, -1.0], [5.0, 5.0]])


def run(num_steps=24, **options):
    options = {"position": START, "num_chains": 3, "progress": False, **options}
    return smcdiff.run(jax.random.key(0), walk(), num_steps, **options)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: jnp.where(x[0] > 3.0, -jnp.inf, -0.5 * jnp.sum(x**2)), "logdensity"),
        (lambda x: -jnp.sum(jnp.abs(x - 5.0) ** 0.5), "score"),
    ],
)
def test_a_start_without_density_or_score_is_refused(function, name):
    """The third chain of START stands at (5, 5): zero density there, or a score that is not a number."""
    with pytest.raises(ValueError, match=rf"chain 2 starts with a {name}.*1 of 3 chains"):
        smcdiff.run(
            jax.random.key(0),
            smcdiff.mcmc.mala(function, 0.1),
            2,
            position=START,
            num_chains=3,
            progress=False,
        )


def test_a_run_is_the_recursion_with_keys_by_chain_and_step():
    trace = run(5)
    for chain in range(3):
        key = jax.random.fold_in(jax.random.key(0), chain)
        x = START[chain]
        for k in range(5):
            x = 0.5 * x + jax.random.normal(jax.random.fold_in(key, k + 1), (2,))
            np.testing.assert_allclose(trace.samples[chain, k], x, rtol=1e-6)
    assert trace.samples.shape == trace.info.noise.shape == (3, 5, 2)
    np.testing.assert_array_equal(trace.state.position, trace.samples[:, -1])
    np.testing.assert_array_equal(trace.state.count, [5, 5, 5])


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": 24}, {"chunk_size": 100}, {"progress": True}],
)
def test_chunks_and_the_bar_change_no_number(options):
    jax.tree.map(np.testing.assert_array_equal, run(), run(**options))


def test_thinning_keeps_every_kth_step():
    full, thinned = run(), run(thin=4, chunk_size=4)
    np.testing.assert_array_equal(thinned.samples, full.samples[:, 3::4])
    np.testing.assert_array_equal(thinned.info.noise, full.info.noise[:, 3::4])
    jax.tree.map(np.testing.assert_array_equal, thinned.state, full.state)


def test_fewer_chains_are_the_first_chains():
    single = run(num_chains=1, position=START[:1])
    np.testing.assert_array_equal(single.samples, run().samples[:1])


def test_a_run_goes_on_from_a_state():
    first = run(6)
    second = run(6, position=None, state=first.state)
    np.testing.assert_allclose(
        second.samples[:, 0], 0.5 * np.asarray(first.state.position) + second.info.noise[:, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(second.state.count, [12, 12, 12])


def _keep_half(state, info):
    return {"half": state.position / 2}


def test_transform_says_what_is_kept():
    np.testing.assert_allclose(run(transform=_keep_half).samples["half"], run().samples / 2, rtol=1e-6)


def test_step_sizes_and_weights_are_arguments_of_the_program():
    run(8)
    before = len(_traces)
    results = [
        smcdiff.run(jax.random.key(0), walk(rate), 8, position=START, num_chains=3, progress=False).samples
        for rate in (0.1, 0.2, jnp.asarray(0.3))
    ]
    # A number and an array differ in their weak type: one more program, whose body is traced once or twice.
    assert len(_traces) - before <= 2
    assert not np.allclose(results[0], results[1])


def _logdensity(x):
    return -0.5 * jnp.sum((x - jnp.asarray([1.0, -2.0])) ** 2 / jnp.asarray([0.5, 2.0]))


@pytest.mark.lenient_promotion
@pytest.mark.parametrize(
    "algorithm",
    [
        blackjax.mala(_logdensity, 0.3),
        blackjax.hmc(_logdensity, 0.4, jnp.ones(2), 4),
        blackjax.additive_step_random_walk(_logdensity, blackjax.mcmc.random_walk.normal(0.8 * jnp.ones(2))),
    ],
    ids=["mala", "hmc", "random walk"],
)
def test_blackjax_algorithms_run_unchanged(algorithm):
    trace = smcdiff.run(
        jax.random.key(3), algorithm, 1500, position=jnp.zeros((8, 2)), num_chains=8, progress=False
    )
    draws = trace.samples[:, 100:]
    means = draws.mean(axis=1)
    error = means.std(axis=0, ddof=1) / np.sqrt(8)
    # Eight chains: t with 7 degrees of freedom exceeds 14 with probability 2e-6, and half of that with 2e-4; fixed key.
    assert np.all(np.abs(means.mean(0) - [1.0, -2.0]) < 7 * error)
    assert np.all(error < 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be a positive integer"),
        ({"thin": 0}, "thin must be a positive integer"),
        ({"thin": 5}, "num_steps must be a multiple of thin"),
        ({"chunk_size": -2}, "chunk_size must be a positive integer"),
        ({"state": State(START, jnp.zeros(3))}, "not both"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
def test_bad_number_of_steps(num_steps):
    with pytest.raises(ValueError, match="num_steps must be a positive integer"):
        run(num_steps)
