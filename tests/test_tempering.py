"""Parallel tempering: the joint law of all levels, weights of far modes, and the books of who is where.

Statistical checks allow 5 standard errors, estimated between independent chains: a false failure has a probability of
about 6e-7 a check, and keys are fixed.
"""

import functools

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.stats import norm

import smcdiff
from smcdiff import schedules
from smcdiff.mcmc.hamiltonian import hmc
from smcdiff.mcmc.langevin import mala
from smcdiff.mcmc.levels import equal_rejection_levels, tempered, tune_levels
from smcdiff.mcmc.tempering import parallel_tempering

# Many programs are compiled here; tests/test_kernels.py has the kernels in the quick tests.
pytestmark = pytest.mark.slow

Z = 5.0
MEANS, DEVIATIONS, WEIGHTS = np.array([-7.0, 9.0]), np.array([0.5, 1.0]), np.array([0.25, 0.75])
WIDTH = 12.0  # of the reference
BETAS = jnp.asarray([1.0, 0.45, 0.2, 0.08, 0.03, 0.0])
STEPS = jnp.asarray([0.2, 0.5, 2.0, 6.0, 20.0, 40.0])
_traces = []


def _two_modes(means, x):
    _traces.append(None)
    logits = np.log(WEIGHTS / DEVIATIONS) - 0.5 * ((x - means) / DEVIATIONS) ** 2
    return jax.nn.logsumexp(logits)


def _reference(x):
    return jnp.sum(-0.5 * (x / WIDTH) ** 2)


def _draw_reference(rng_key):
    return WIDTH * jax.random.normal(rng_key, (1,))


def two_modes(means=MEANS):
    return Partial(_two_modes, jnp.asarray(means, jnp.float32))


def bimodal(means=MEANS, step_sizes=STEPS, **options):
    path = tempered(two_modes(means), _reference)
    return parallel_tempering(path, BETAS, mala, step_sizes, draw_last=_draw_reference, **options)


def run(algorithm, num_steps, num_chains, *, position=None, state=None):
    return smcdiff.run(
        jax.random.key(0),
        algorithm,
        num_steps,
        position=position,
        state=state,
        num_chains=num_chains,
        chunk_size=num_steps,
        progress=False,
    )


@functools.cache
def from_the_light_mode():
    return run(bimodal(), 600, 300, position=jnp.full((300, 1), -7.0))


def test_the_weights_of_far_modes_are_right_from_a_start_in_one():
    x = np.asarray(from_the_light_mode().samples[:, 200:, 0], float)  # (chains, steps)
    functions = {"right": x > 0, "mean": x, "square": x**2, "left tail": x < -7.3}
    tail = norm.cdf((-7.3 - MEANS) / DEVIATIONS)
    exact = {
        "right": WEIGHTS @ norm.sf(-MEANS / DEVIATIONS),
        "mean": WEIGHTS @ MEANS,
        "square": WEIGHTS @ (MEANS**2 + DEVIATIONS**2),
        "left tail": WEIGHTS @ tail,
    }
    for name, values in functions.items():
        means = values.mean(1)
        error = means.std(ddof=1) / np.sqrt(len(means))
        assert abs(means.mean() - exact[name]) < Z * error, name
    assert (x > 0).mean(1).std(ddof=1) / np.sqrt(len(x)) < 0.01  # the test sees a weight that is off by 0.05


def test_the_books_agree_with_the_swaps():
    trace = from_the_light_mode()
    info, num = trace.info, len(BETAS)
    for chain in range(3):
        at_level, ends, trips = np.arange(num), [[] for _ in range(num)], 0
        ends[0].append(0)
        for step in range(600):
            tried, swapped = info.is_tried[chain, step], info.is_swapped[chain, step]
            np.testing.assert_array_equal(np.flatnonzero(tried), np.arange(step % 2, num - 1, 2))
            assert not np.any(swapped & ~tried) and np.all(info.swap_probability[chain, step][~tried] == 0)
            for pair in np.flatnonzero(swapped):
                at_level[[pair, pair + 1]] = at_level[[pair + 1, pair]]
            for level, end in ((0, 0), (num - 1, 1)):
                visits = ends[at_level[level]]
                if not visits or visits[-1] != end:
                    visits.append(end)
            # A trip is an end of the ladder and then the target's end, after the target's end.
            trips = sum(len(visits[visits.index(0) :]) // 2 for visits in map(_odd, ends) if 0 in visits)
            np.testing.assert_array_equal(info.replica[chain, step], at_level)
            assert info.round_trips[chain, step] == trips
    assert trace.state.round_trips.min() > 10
    np.testing.assert_array_equal(trace.state.step, 600)
    assert info.num_swap_evaluations[0, 0] == 2 * num


def _odd(visits):
    """The visits up to the last one of the target's end."""
    return visits[: len(visits) - visits[::-1].index(0)] if 0 in visits else visits


# Joint stationarity on noise levels, whose laws are known ------------------------------------------------------------


@functools.cache
def noisy():
    schedule = schedules.cosine()
    model = smcdiff.GaussianMixtureDiffusion.create(
        [0.6, 0.3, 0.1], [[2.0, 0.5], [-1.5, 1.0], [0.0, -2.0]], np.array([[0.3, 0.1], [0.1, 0.2]]), schedule
    )
    return model, jnp.asarray([0.05, 0.25, 0.45, 0.65])


@pytest.mark.parametrize("how", ["scaled", "hmc, several steps"])
def test_every_level_keeps_its_law(how):
    model, times = noisy()
    steps = 0.05 * (1.0 + 4.0 * times)
    kernel, options = mala, {"scales": model.schedule.alpha(times)}
    if how == "hmc, several steps":
        kernel, options = _hmc, {"num_explore": 3}
    algorithm = parallel_tempering(model, times, kernel, steps, **options)
    num_chains = 10_000
    start = jnp.stack(
        [
            model.at(t).sample(jax.random.fold_in(jax.random.key(2), i), num_chains)
            for i, t in enumerate(times)
        ],
        axis=1,
    )
    state = jax.vmap(algorithm.init)(start[:, 0], jax.random.split(jax.random.key(0), num_chains))
    state = state._replace(replicas=start)
    trace = run(algorithm, 6, num_chains, state=state)
    np.testing.assert_array_equal(trace.state.position, trace.state.replicas[:, 0])
    for level, t in enumerate(times):
        law = model.at(t)
        mean = np.asarray(law.mean(), float)
        second = np.asarray(law.covariance(), float) + np.outer(mean, mean)
        x = np.asarray(trace.state.replicas[:, level], float)
        values = np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], axis=1)
        exact = np.array([mean[0], mean[1], second[0, 0], second[0, 1], second[1, 1]])
        error = values.std(0) / np.sqrt(num_chains)
        assert np.all(np.abs(values.mean(0) - exact) < Z * error), (how, level)
    rates = trace.info.swap_probability.sum((0, 1)) / trace.info.is_tried.sum((0, 1))
    assert np.all(rates > 0.2) and np.all(rates < 0.98)
    assert np.all(trace.info.level_acceptance_rate.mean((0, 1)) > 0.5)


def _hmc(density, step_size):
    return hmc(density, 3.0 * step_size, 2)


def test_scales_keep_replicas_in_place():
    # Levels that are scaled copies of each other: all swaps are accepted, and what is moved is scaled.
    schedule = schedules.cosine()
    times = jnp.asarray([0.1, 0.4, 0.7])
    alpha = schedule.alpha(times)
    path = _Copies()
    algorithm = parallel_tempering(path, alpha, mala, 0.1 * alpha**2, scales=alpha)
    state = algorithm.init(jnp.ones(2), jax.random.key(0))
    step = jax.jit(algorithm.step)
    for k in range(6):
        state, info = step(jax.random.fold_in(jax.random.key(1), k), state)
        np.testing.assert_allclose(info.swap_probability[info.is_tried], 1.0, atol=1e-5)


class _Copies:
    def at(self, scale):
        return smcdiff.GaussianMixture.create([0.7, 0.3], [[1.0, 0.0], [-1.0, 2.0]], 0.3).diffuse(scale, 0.0)


# Ladders -------------------------------------------------------------------------------------------------------------


def test_levels_of_equal_rejection_follow_the_barrier():
    old = np.linspace(1.0, 0.0, 30)
    cumulative = np.log1p(9.0 * (1.0 - old))  # a barrier that is steep at the target
    for num_levels in (None, 9):
        new = np.asarray(equal_rejection_levels(old, np.diff(cumulative), num_levels), float)
        assert len(new) == (num_levels or 30) and new[0] == 1.0 and new[-1] == 0.0
        np.testing.assert_allclose(
            np.diff(np.log1p(9.0 * (1.0 - new))), np.log(10.0) / (len(new) - 1), rtol=0.05
        )
    rising = np.asarray(equal_rejection_levels([0.0, 0.5, 1.0], [0.0, 0.0]))
    np.testing.assert_allclose(rising, [0.0, 0.5, 1.0], atol=1e-6)


def test_tuning_makes_rejection_rates_equal():
    path = tempered(two_modes(), _reference)
    bad = jnp.asarray([1.0, 0.9, 0.8, 0.7, 0.6, 0.0])
    # Steps that fit the width at each level.
    found = tune_levels(
        jax.random.key(3),
        path,
        bad,
        mala,
        jnp.asarray([0.2, 0.2, 0.2, 0.2, 0.4, 40.0]),
        jnp.linspace(-9.0, 9.0, 50)[:, None],
        num_rounds=5,
        draw_last=_draw_reference,
    )
    assert found.levels[0] == 1.0 and found.levels[-1] == 0.0 and np.all(np.diff(found.levels) < 0)
    assert np.ptp(found.rejection_rates) < 0.08 and found.rejection_rates.mean() > 0.1
    assert abs(found.barrier - found.rejection_rates.sum()) < 1e-6 and found.scales is None
    assert found.settings.shape == (6,) and found.states.position.shape == (50, 1)
    assert np.all(np.asarray(found.states.round_trips) > 20)


# Protocol ------------------------------------------------------------------------------------------------------------


def test_new_values_need_no_new_trace():
    first, before = from_the_light_mode(), len(_traces)
    changed = bimodal(means=[-3.0, 2.0], step_sizes=2.0 * STEPS)
    trace = run(changed, 600, 300, position=jnp.full((300, 1), -7.0))
    assert len(_traces) == before and np.mean(trace.samples != first.samples) > 0.9


def test_samples_may_be_pytrees_and_kernels_blackjax_s():
    path = tempered(_pytree_density)
    algorithm = parallel_tempering(path, [1.0, 0.5, 0.25], _blackjax_mala, jnp.asarray([0.1, 0.2, 0.4]))
    state = algorithm.init({"a": jnp.ones(2), "b": jnp.asarray(0.5)}, jax.random.key(0))
    assert state.replicas["a"].shape == (3, 2) and state.replicas["b"].shape == (3,)
    new, info = jax.jit(algorithm.step)(jax.random.key(1), state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert 0 < info.acceptance_rate <= 1 and np.all(new.replicas["a"][0] == new.position["a"])


def _pytree_density(x):
    return -0.5 * jnp.sum((x["a"] - 1.0) ** 2) - 2.0 * x["b"] ** 2


def _blackjax_mala(density, step_size):
    return blackjax.mala(density.logdensity, step_size)


def test_what_is_refused():
    path = tempered(two_modes(), _reference)
    with pytest.raises(ValueError, match=r"levels must rise or fall strictly, .* got \[1"):
        parallel_tempering(path, [1.0, 0.5, 0.5], mala, jnp.ones(3))
    with pytest.raises(ValueError, match=r"levels must have the shape \(L,\), L >= 2, got \(1,\)"):
        parallel_tempering(path, [1.0], mala, jnp.ones(1))
    with pytest.raises(
        ValueError, match=r"settings must have the leading axis of levels, 2, got shape \(3,\)"
    ):
        parallel_tempering(path, [1.0, 0.5], mala, jnp.ones(3))
    with pytest.raises(ValueError, match="num_explore must be a positive integer, got 0"):
        parallel_tempering(path, [1.0, 0.5], mala, jnp.ones(2), num_explore=0)
    with pytest.raises(ValueError, match="scales must be positive"):
        parallel_tempering(path, [1.0, 0.5], mala, jnp.ones(2), scales=jnp.asarray([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"step_size must be positive and finite, got -0\.2"):
        parallel_tempering(path, [1.0, 0.5], mala, jnp.asarray([0.1, -0.2]))
    network = smcdiff.Diffusion(None, lambda params, x, t: -x, schedules.cosine(), "score", (2,))
    with pytest.raises(
        TypeError,
        match=r'parallel_tempering needs a target with the capability HasLogDensity.*"line_integral"',
    ):
        parallel_tempering(network, [0.1, 0.5], mala, jnp.ones(2))
    with pytest.raises(TypeError, match="tempered needs a target with the capability HasLogDensity"):
        tempered(network.at(jnp.asarray(0.5)))
    with pytest.raises(ValueError, match=r"rejection_rates must lie in \[0, 1\] and have the shape \(2,\)"):
        equal_rejection_levels([1.0, 0.5, 0.0], [0.5, 1.5])
