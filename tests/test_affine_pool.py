"""The affine pool: centre and covariance of coordinates from chains side by side, window by window.

Statistical checks allow 5 standard errors: a false failure has a probability of 6e-7 a check. Keys are fixed.
"""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import smcdiff
from smcdiff.mcmc.affine_pool import _covariance, affine_pool
from smcdiff.mcmc.polar_slice import polar_slice
from smcdiff.moments import Moments, add_rows

pytestmark = pytest.mark.slow  # programs of several windows are compiled here

Z = 5.0
MEAN = np.array([20.0, -8.0, 3.0, 0.5])
FACTOR = np.array([[3.0, 0, 0, 0], [0.2, 0.1, 0, 0], [-1.0, 0.05, 0.5, 0], [5.0, 0.1, -2.0, 8.0]])
COVARIANCE = FACTOR @ FACTOR.T


def _log_shifted(mean, inverse_factor, x):
    return -0.5 * jnp.sum((inverse_factor @ (x - mean)) ** 2)


TARGET = Partial(_log_shifted, np.float32(MEAN), np.float32(np.linalg.inv(FACTOR)))


def _tuned(center, covariance):
    return polar_slice(TARGET, 2.0, center=center, covariance=covariance)


def effective_share(x):
    """Effective sample size of a draw, of each coordinate; x of shape (chains, draws, d)."""
    sizes = [float(blackjax.diagnostics.effective_sample_size(x[..., i])) for i in range(x.shape[-1])]
    return np.array(sizes) / (x.shape[0] * x.shape[1])


@pytest.mark.lenient_promotion  # BlackJAX's effective sample size
def test_a_pool_finds_centre_and_covariance_and_mixes_better():
    start = jnp.asarray(np.random.default_rng(14).normal(size=(40, 4)), jnp.float32)
    pool = affine_pool(jax.random.key(14), _tuned, start, 630, covariance="full", first_window=10)
    shares = {}
    for name, center, covariance in (
        ("tuned", pool.center, pool.covariance),
        ("untuned", jnp.zeros(4), jnp.eye(4)),
    ):
        trace = smcdiff.run(
            jax.random.key(15),
            _tuned(center, covariance),
            400,
            position=pool.position,
            num_chains=40,
            chunk_size=400,
            progress=False,
        )
        shares[name] = effective_share(trace.samples)
    # Mean and covariance of the last window, 320 steps, in standard errors of as many effective samples as chains tell.
    size = 40 * 320 * shares["tuned"].min()
    whitened = np.linalg.solve(FACTOR, np.asarray(pool.center, float) - MEAN)
    assert np.all(np.abs(whitened) < Z / np.sqrt(size)), whitened
    whitened = np.linalg.solve(FACTOR, np.linalg.solve(FACTOR, np.asarray(pool.covariance, float)).T)
    assert np.all(np.abs(whitened - np.eye(4)) < Z * np.sqrt((1 + np.eye(4)) / size)), whitened
    assert shares["tuned"].min() > 0.1 and shares["tuned"].min() > 10 * shares["untuned"].min(), shares


def test_a_pool_is_its_chains_window_by_window():
    """Windows of 1, 2, 4, ... steps, against a plain loop with NumPy's moments."""
    start = np.random.default_rng(16).normal(size=(40, 4)) + MEAN
    pool = affine_pool(
        jax.random.key(16), _tuned, jnp.asarray(start, jnp.float32), 63, covariance="full", first_window=1
    )
    assert pool.acceptance_rate.shape == (6,)
    keys = [jax.random.fold_in(jax.random.key(16), c) for c in range(40)]
    step = jax.jit(lambda algorithm, keys, k, state: _vector_step(algorithm, keys, k, state)[0])
    center, covariance, k = np.zeros(4), np.eye(4), 0
    state = jax.vmap(_tuned(center, covariance).init, (0, None))(jnp.asarray(start, jnp.float32), keys[0])
    for length in (1, 2, 4, 8, 16, 32):
        algorithm = _tuned(jnp.asarray(center, jnp.float32), jnp.asarray(covariance, jnp.float32))
        samples = []
        for _ in range(length):
            k += 1
            state = step(algorithm, jnp.stack(keys), jnp.asarray(k), state)
            samples.append(np.asarray(state.position, float))
        samples = np.concatenate(samples)
        center, covariance, size = samples.mean(0), np.cov(samples.T), len(samples)
        covariance = (size * covariance + 4 * np.diag(np.diag(covariance))) / (size + 4)
    # Rounding may turn a decision once in a while.
    agree = np.all(np.abs(pool.position - state.position) < 1e-2, axis=1)
    assert np.mean(agree) > 0.9
    scale = np.sqrt(np.diag(COVARIANCE))
    np.testing.assert_allclose(pool.center / scale, center / scale, atol=0.02)
    np.testing.assert_allclose(
        pool.covariance / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.05
    )


def _vector_step(algorithm, keys, k, state):
    return jax.vmap(lambda key, state: algorithm.step(jax.random.fold_in(key, k), state))(keys, state)


@pytest.mark.lenient_promotion  # BlackJAX's kernel
def test_a_pool_tunes_other_kernels_and_pytrees():
    """BlackJAX's HMC in a dictionary, from exact draws: the variances of the target."""
    rng = np.random.default_rng(17)
    start = {"x": jnp.asarray(MEAN + rng.normal(size=(200, 4)) @ FACTOR.T, jnp.float32)}

    def build(center, covariance):
        assert center["x"].shape == (4,) and covariance.shape == (4,)
        return blackjax.hmc(lambda tree: TARGET(tree["x"]), 0.05, covariance, 4)

    pool = affine_pool(jax.random.key(17), build, start, 100)
    assert pool.position["x"].shape == (200, 4) and pool.acceptance_rate.shape == (2,)
    # As 200 independent draws at least.
    assert np.all(np.abs(pool.center["x"] - MEAN) < Z * np.sqrt(np.diag(COVARIANCE) / 200))
    assert np.all(np.abs(pool.covariance / np.diag(COVARIANCE) - 1) < Z * np.sqrt(2 / 200))


def test_moments_are_numpys_and_what_does_not_move_keeps_its_variance():
    x = np.random.default_rng(18).normal(size=(30, 3)) * [1.0, 2.0, 0.0] + [4.0, -1.0, 5.0]
    for before in (jnp.asarray([9.0, 8.0, 7.0]), 9.0 * jnp.eye(3) + 1.0):
        moments = Moments(jnp.zeros(()), jnp.zeros(3), jnp.zeros(before.shape))
        for rows in (slice(0, 3), slice(3, 30)):
            moments = add_rows(moments, jnp.asarray(x[rows], jnp.float32))
        found = _covariance(moments, before)
        expected = np.cov(x.T)
        if before.ndim == 1:
            expected = np.diag(expected).copy()
        else:
            expected = (30 * expected + 3 * np.diag(np.diag(expected))) / 33
        expected[-1, ...] = 0
        unmoved = [0, 0, 7.0] if before.ndim == 1 else np.diag([0, 0, 10.0])
        np.testing.assert_allclose(found, expected + unmoved, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"covariance must be one of .*, got .dense."):
        affine_pool(key, _tuned, jnp.ones((4, 3)), 10, covariance="dense")
    with pytest.raises(ValueError, match="num_steps must be a positive integer, got 0"):
        affine_pool(key, _tuned, jnp.ones((4, 3)), 0)
