"""Markov moves between the steps of SMC, and what they leave alone.

Statistical checks allow 5 standard errors, estimated from independent particles or runs: a false failure has a
probability of about 6e-7 a check (3e-5 for 30 runs), and keys are fixed.
"""

import functools

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fk_cases import CASES
from jax.tree_util import Partial
from rows import quick

import smcdiff
from smcdiff import compose, schedules
from smcdiff.run import run
from smcdiff.smc import smc
from smcdiff.smc.fkc import fkc
from smcdiff.smc.moves import mala_moves, mcmc_moves

Z = 5.0
SCHEDULE = schedules.cosine()
NARROW = np.array([[0.3, 0.1], [0.1, 0.2]])
WIDE = np.array([[0.8, -0.2], [-0.2, 0.6]])


@functools.cache
def models():
    create = smcdiff.GaussianMixtureDiffusion.create
    return (
        create([0.5, 0.2, 0.3], [[2.0, 0.5], [-1.5, 1.0], [0.0, -2.0]], NARROW, SCHEDULE),
        create([0.25, 0.75], [[1.4, -0.4], [-1.0, 1.8]], WIDE, SCHEDULE),
    )


def product_of(a, b):
    """The product of two mixtures of shared covariance: a mixture, and the log of its integral."""
    means = [np.asarray(m.component_means(), float) for m in (a, b)]
    first, second = (np.asarray(m.component_covariances(), float)[0] for m in (a, b))
    covariance = np.linalg.inv(np.linalg.inv(first) + np.linalg.inv(second))
    gap = (means[0][:, None] - means[1][None]).reshape(-1, means[0].shape[1])
    total = first + second
    log_weights = (np.asarray(a.log_weights, float)[:, None] + np.asarray(b.log_weights, float)[None]).ravel()
    log_weights = log_weights - 0.5 * np.sum(gap * np.linalg.solve(total, gap.T).T, axis=-1)
    log_weights -= 0.5 * np.linalg.slogdet(2 * np.pi * total)[1]
    centres = means[0] @ np.linalg.inv(first) @ covariance
    others = means[1] @ np.linalg.inv(second) @ covariance
    new_means = (centres[:, None] + others[None]).reshape(gap.shape)
    log_integral = np.logaddexp.reduce(log_weights)
    return smcdiff.GaussianMixture.create(
        np.exp(log_weights - log_integral), new_means, covariance
    ), log_integral


def times(num_steps):
    return smcdiff.log_snr_times(SCHEDULE, num_steps)


def moments(x):
    x = np.asarray(x, float)
    return np.stack([x[..., 0], x[..., 1], x[..., 0] ** 2, x[..., 0] * x[..., 1], x[..., 1] ** 2], axis=-1)


def exact_moments(law):
    mean = np.asarray(law.mean(), float)
    second = np.asarray(law.covariance(), float) + np.outer(mean, mean)
    return np.array([mean[0], mean[1], second[0, 0], second[0, 1], second[1, 1]])


def _walk(step, density, t):
    return blackjax.additive_step_random_walk(density.logdensity, Partial(_gaussian_step, step))


def _gaussian_step(step, rng_key, position):
    return step * jax.random.normal(rng_key, position.shape)


@pytest.mark.parametrize("k", quick([2, 7, 11], 7))
@pytest.mark.parametrize("kind", ["mala", "random walk"])
def test_moves_keep_the_density_at_the_end_of_the_step(kind, k):
    path, grid = compose.product(*models()), times(12)
    law, _ = product_of(*[model.at(grid[k + 1]) for model in models()])
    move = {
        "mala": lambda: mala_moves(path, times=grid, width=0.4, step_size=0.8),
        "random walk": lambda: mcmc_moves(path, Partial(_walk, jnp.asarray(0.5)), times=grid),
    }[kind]()
    start = law.sample(jax.random.key(0), 40_000)

    @jax.jit
    def moved(move, x, k):
        def step(x, index):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index), len(x))
            return jax.vmap(move, (0, 0, None))(keys, x, k)

        return jax.lax.scan(step, x, jnp.arange(10))

    x, acceptance = moved(move, start, jnp.asarray(k))
    assert 0.4 < np.mean(acceptance) < 0.97
    values = moments(x)
    error = values.std(0) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - exact_moments(law)) < Z * error)
    # They do move, by more than a deviation within a mode.
    assert np.mean(np.sum((x - start) ** 2, axis=-1)) > np.trace(np.asarray(law.component_covariances())[0])


def test_moves_change_particles_and_no_weight():
    path, grid = compose.product(*models()), times(12)
    fk = fkc(path, times=grid, weights="density")
    move = mala_moves(path, times=grid, width=0.4)
    with_moves = smc(fk, 50, move=move, num_moves=2)
    call = eqx.filter_jit(lambda function, *args: function(*args))
    state = call(with_moves.init, None, jax.random.key(3))
    still, info_still = call(smc(fk, 50).step, jax.random.key(4), state)
    moved, info_moved = call(with_moves.step, jax.random.key(4), state)
    np.testing.assert_allclose(still.log_weights, moved.log_weights, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(still.log_evidence, moved.log_evidence, rtol=1e-6, atol=1e-6)
    assert np.mean(np.asarray(still.particles) != np.asarray(moved.particles)) > 0.5
    assert info_still.move_info is None and 0 < info_moved.move_info < 1


def _hmc(step_size, density, t):
    return smcdiff.mcmc.hmc(density, step_size, 3, accept="line_integral")


def _table_score(model, x, t):
    return model.score(x, t)


def test_scores_suffice_but_for_the_end():
    a, b = models()
    network = smcdiff.Diffusion(b, _table_score, SCHEDULE, "score", (2,))
    known, learned, grid = compose.product(a, b), compose.product(a, network), times(12)
    x = jnp.asarray([[1.2, 0.3], [-1.0, 0.9], [0.4, -1.4], [2.0, 2.0]])
    keys = jax.random.split(jax.random.key(9), len(x))
    several = jax.jit(
        jax.vmap(lambda move, key, x, k: move.apply(move.tuning, key, x, k, 4), (None, 0, 0, None))
    )
    for make in (
        lambda path: mala_moves(path, times=grid, width=0.4, accept="line_integral"),
        lambda path: mcmc_moves(path, Partial(_hmc, jnp.asarray(0.2)), times=grid),
    ):
        for k in (5, 11):  # the last step ends at t = 0, where a network has no score
            expected, found = (several(make(path), keys, x, k) for path in (known, learned))
            assert not np.any(np.all(expected[0] == x, axis=-1)) and np.all(expected[1] > 0)
            if k == 5:
                np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-3)
                np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)
            else:
                np.testing.assert_array_equal(found[0], x)
                np.testing.assert_array_equal(found[1], 0.0)


def _labelled(rng_key, particle, k):
    return jax.tree.map(lambda leaf: leaf + 1, particle), {"step": k, "draw": jax.random.uniform(rng_key)}


def test_any_particle_can_be_moved_and_info_is_averaged():
    fk = CASES["gaussian"]().fk
    trace = run(
        jax.random.key(5), smc(fk, 400, move=_labelled, num_moves=3), fk.num_steps, transform=_nothing
    )
    np.testing.assert_allclose(trace.info.move_info["step"][0], np.arange(fk.num_steps))
    # Means of 1200 uniforms: every particle and every move has a key of its own.
    draws = np.asarray(trace.info.move_info["draw"][0])
    assert np.all(np.abs(draws - 0.5) < Z * np.sqrt(1 / 12 / 1200)) and np.ptp(draws) > 1e-3


def _nothing(state, info):
    return state.step


def test_smc_with_moves_ends_in_the_exact_law():
    path, grid = compose.product(*models()), times(20)
    law, log_integral = product_of(*[model.mixture for model in models()])
    move = mala_moves(path, times=grid, width=0.4)
    algorithm = smc(fkc(path, times=grid, weights="density"), 500, move=move, num_moves=2)
    trace = run(
        jax.random.key(6), algorithm, len(grid) - 1, num_chains=30, transform=_nothing, progress=False
    )
    weights = np.exp(np.asarray(trace.state.log_weights, float))
    values = np.einsum("cn,cnf->cf", weights, moments(trace.state.particles))
    error = values.std(0, ddof=1) / np.sqrt(30)
    assert np.all(np.abs(values.mean(0) - exact_moments(law)) < Z * error) and np.all(error < 0.02)
    ratio = np.exp(np.asarray(trace.state.log_evidence, float) - log_integral)
    assert abs(ratio.mean() - 1) < Z * ratio.std(ddof=1) / np.sqrt(30) < Z * 0.02
    # The step follows the noise level: no level at which nothing, or everything, is accepted.
    acceptance = trace.info.move_info.mean(0)
    assert np.all(acceptance > 0.4) and np.all(acceptance < 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [0.01, 50.0])
def test_a_bad_step_size_is_tuned_from_the_cloud(step_size):
    path, grid = compose.product(*models()), times(40)
    _, log_integral = product_of(*[model.mixture for model in models()])
    rates = {}
    for target in (None, 0.7):
        move = mala_moves(path, times=grid, width=0.4, step_size=step_size, target_acceptance=target)
        fk = fkc(path, times=grid, weights="density")
        trace = run(
            jax.random.key(8), smc(fk, 500, move=move), len(grid) - 1, num_chains=8, transform=_nothing
        )
        rates[target] = np.asarray(trace.info.move_info)
    # Left alone, next to nothing or all is accepted; tuned, the rate is soon near its target, in every chain.
    assert np.all(np.abs(rates[None] - 0.7) > 0.25)
    assert np.all(np.abs(rates[0.7][:, 15:] - 0.7) < 0.15) and abs(rates[0.7][:, 15:].mean() - 0.7) < 0.03
    assert trace.state.tuning.shape == (8,) and np.all(np.isfinite(trace.state.tuning))
    ratio = np.exp(np.asarray(trace.state.log_evidence, float) - log_integral)
    assert abs(ratio.mean() - 1) < 7.1 * ratio.std(ddof=1) / np.sqrt(8) < 0.3  # t with 7 degrees: 2e-4


@pytest.mark.slow
def test_batch_size_changes_no_number():
    fk, ends = CASES["gaussian"]().fk, []
    for batch_size in (None, 7):
        algorithm = smc(fk, 20, move=_jitter, num_moves=2, batch_size=batch_size)
        ends.append(run(jax.random.key(7), algorithm, fk.num_steps, transform=_nothing, progress=False).state)
    np.testing.assert_allclose(ends[0].particles["x"], ends[1].particles["x"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ends[0].log_weights, ends[1].log_weights, rtol=1e-4, atol=1e-4)


def _jitter(rng_key, particle, k):
    return {"x": particle["x"] + 0.1 * jax.random.normal(rng_key)}, None


def test_what_is_refused():
    path, grid = compose.product(*models()), times(4)
    with pytest.raises(ValueError, match="num_moves must be a positive integer, got 0"):
        smc(fkc(path, times=grid), 10, move=_labelled, num_moves=0)
    for name in ("width", "step_size"):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got -1"):
            mala_moves(path, times=grid, **{"width": 1.0, name: -1.0})
    with pytest.raises(ValueError, match="times must fall strictly"):
        mala_moves(path, times=grid[::-1], width=1.0)
    for target in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="target_acceptance must lie between 0 and 1, or be None, got"):
            mala_moves(path, times=grid, width=1.0, target_acceptance=target)
    network = smcdiff.Diffusion(None, lambda params, x, t: -x, SCHEDULE, "score", (2,))
    with pytest.raises(TypeError, match="mala needs a target with the capability HasLogDensity"):
        mala_moves(compose.product(models()[0], network), times=grid, width=1.0)
