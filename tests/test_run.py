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
from rows import quick

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


def _half_plane(x):
    return jnp.where(x[0] > 3.0, -jnp.inf, -0.5 * jnp.sum(x**2))


def _half_planes(x):
    return _half_plane(x["x"])


def _mala(density):
    return smcdiff.mcmc.mala(density, 0.1)


PARTS = {
    "cycle": lambda: smcdiff.mcmc.cycle(
        [_mala(_half_plane), smcdiff.mcmc.hit_and_run_slice(_half_plane, 1.0)]
    ),
    "mixture": lambda: smcdiff.mcmc.mixture(
        [smcdiff.mcmc.uhmc(lambda x: -jnp.sum(x**2), 0.1, 2), _mala(_half_plane)], jnp.asarray([0.9, 0.1])
    ),
    "cycle of a mixture": lambda: smcdiff.mcmc.cycle([PARTS["mixture"]()]),
    "gibbs": lambda: smcdiff.mcmc.gibbs(_half_planes, {"x": _mala}),
    "denoising Langevin Gibbs": lambda: smcdiff.mcmc.denoising_langevin_gibbs(
        smcdiff.mcmc.tempered(_half_plane), jnp.asarray([0.5, 1.0]), step_size=0.1
    ),
    "parallel tempering": lambda: smcdiff.mcmc.parallel_tempering(
        smcdiff.mcmc.tempered(_half_plane),
        jnp.asarray([1.0, 0.5]),
        smcdiff.mcmc.mala,
        jnp.asarray([0.1, 0.2]),
    ),
}


@pytest.mark.parametrize(
    "name", quick(PARTS, "mixture", "gibbs", "parallel tempering", "denoising Langevin Gibbs")
)
def test_kernels_that_carry_no_density_refuse_such_a_start_too(name):
    position = {"x": START} if name == "gibbs" else START
    with pytest.raises(ValueError, match=r"chain 2 starts with a density.*parts.*1 of 3 chains"):
        smcdiff.run(jax.random.key(0), PARTS[name](), 2, position=position, num_chains=3, progress=False)
    inside = jax.tree.map(lambda leaf: leaf[:2], position)
    trace = smcdiff.run(jax.random.key(0), PARTS[name](), 3, position=inside, num_chains=2, progress=False)
    assert np.all(jax.tree.leaves(trace.state.is_start_valid))


WARM_UPS = {
    "adapt_step_size": lambda start: smcdiff.mcmc.adapt_step_size(
        jax.random.key(0), lambda h: smcdiff.mcmc.mala(_half_plane, h), start, 5
    ),
    "window_adaptation": lambda start: smcdiff.mcmc.window_adaptation(
        jax.random.key(0), _half_plane, smcdiff.mcmc.hmc, start, 5, num_integration_steps=2
    ),
    "affine_pool": lambda start: smcdiff.mcmc.affine_pool(
        jax.random.key(0),
        lambda c, v: smcdiff.mcmc.polar_slice(_half_plane, 1.0, center=c, covariance=v),
        start,
        5,
    ),
    "tune_levels": lambda start: smcdiff.mcmc.tune_levels(
        jax.random.key(0),
        smcdiff.mcmc.tempered(_half_plane),
        jnp.asarray([1.0, 0.5]),
        smcdiff.mcmc.mala,
        jnp.asarray([0.1, 0.2]),
        start,
        num_rounds=1,
        num_steps=2,
    ),
}


@pytest.mark.parametrize("name", quick(WARM_UPS, "adapt_step_size", "tune_levels"))
def test_warm_ups_refuse_such_a_start_too(name):
    with pytest.raises(ValueError, match=r"chain 2 starts with a .*1 of 3 chains"):
        WARM_UPS[name](START)
    WARM_UPS[name](START[:2])


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
    [
        {"chunk_size": 1},
        {"chunk_size": 7},
        {"chunk_size": 24},
        {"chunk_size": 100},
        {"progress": True},
        {"batch_size": 1},
        {"batch_size": 2},
        {"batch_size": 5},
    ],
)
def test_chunks_batches_and_the_bar_change_no_number(options):
    jax.tree.map(np.testing.assert_array_equal, run(), run(**options))


_sizes = []


@jax.custom_batching.custom_vmap
def _probed(x):
    return x


@_probed.def_vmap
def _note_size(axis_size, in_batched, x):
    _sizes.append(axis_size)
    return x, in_batched[0]


def _probed_position(state, info):
    return _probed(state.position)


@pytest.mark.parametrize(("batch_size", "sizes"), [(None, {3}), (2, {2, 1}), (1, {1})])
@pytest.mark.parametrize("part", ["init", "step", "transform"])
def test_batches_are_what_is_advanced_together(part, batch_size, sizes):
    def init(position, rng_key):
        return State(_probed(position) if part == "init" else position, jnp.zeros(()))

    def step(rng_key, state):
        return state._replace(position=_probed(state.position) if part == "step" else state.position), ()

    _sizes.clear()
    options = {"transform": _probed_position} if part == "transform" else {}
    smcdiff.run(
        jax.random.key(0),
        SamplingAlgorithm(init, step),
        2,
        position=START,
        num_chains=3,
        batch_size=batch_size,
        progress=False,
        **options,
    )
    assert set(_sizes) == sizes


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
        ({"batch_size": 0}, "batch_size must be a positive integer or None"),
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
