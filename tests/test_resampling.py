"""Resampling functions: one list, the properties that each must have, and those of the systematic one.

Unless stated otherwise a z-test allows 5 standard errors: a false failure has a probability of 6e-7 a check under
normality. Keys are fixed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from smcdiff.smc.resampling import multinomial, resample_from_log_weights, residual, stratified, systematic

Z = 5.0
FUNCTIONS = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}
# Uneven, unordered, with zeros at both ends and inside.
WEIGHTS = np.array([0.0, 0.31, 0.02, 0.0, 0.17, 0.003, 0.267, 0.15, 0.08, 0.0])


@pytest.fixture(scope="module", params=FUNCTIONS)
def resample(request):
    return FUNCTIONS[request.param]


def _weights(num, seed=0, spread=1.0):
    """Weights as a filter makes them; normalised in double precision, so that only their own rounding is left."""
    weights = np.exp(spread * np.random.default_rng(seed).normal(size=num))
    return jnp.asarray(weights / weights.sum(), jnp.float32)


# The weights are an argument: a constant of a million entries would be folded by the compiler for a minute.
@partial(jax.jit, static_argnums=(0, 3))
def _many(resample, keys, weights, num_samples):
    return jax.vmap(lambda key: resample(key, weights, num_samples))(keys)


def _counts(resample, weights, num_samples, num_keys, seed=0):
    """Offspring (num_keys, N) of independent resamplings."""
    indices = _many(resample, jax.random.split(jax.random.key(seed), num_keys), weights, num_samples)
    return np.stack([np.bincount(row, minlength=len(weights)) for row in np.asarray(indices)])


@pytest.mark.parametrize("num_samples", [1, 37])
def test_shape_dtype_and_range(resample, num_samples):
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            weights = jnp.asarray(WEIGHTS, dtype)
            indices = _many(resample, jax.random.split(jax.random.key(0), 1), weights, num_samples)[0]
            assert indices.shape == (num_samples,) and jnp.issubdtype(indices.dtype, jnp.integer)
            assert np.all(WEIGHTS[np.asarray(indices)] > 0)


@pytest.mark.parametrize("num_samples", [10, 37])
def test_counts_are_unbiased(resample, num_samples):
    counts = _counts(resample, jnp.asarray(WEIGHTS, jnp.float32), num_samples, 4000)
    assert np.all(counts.sum(1) == num_samples)
    error = counts.mean(0) - num_samples * WEIGHTS
    # At most the variance of independent draws, by which zero observed variance is no excuse.
    limit = Z * np.sqrt(np.maximum(counts.var(0), 1e-8) / len(counts))
    assert np.all(np.abs(error) <= limit)
    # The power: a tenth of the mean offspring of every particle above 0.1 would be seen.
    assert np.all(limit[WEIGHTS > 0.1] < 0.1 * num_samples * WEIGHTS[WEIGHTS > 0.1])


def test_variance_of_the_counts():
    """Multinomial has its own variance, and each other function less, on the heaviest particle."""
    num_samples, heavy = 37, WEIGHTS.argmax()
    variances = {
        name: _counts(f, jnp.asarray(WEIGHTS, jnp.float32), num_samples, 4000, seed=1).var(0)[heavy]
        for name, f in FUNCTIONS.items()
    }
    expected = num_samples * WEIGHTS[heavy] * (1 - WEIGHTS[heavy])
    # The variance of a near-normal count is known to sqrt(2/4000) = 2.2 %.
    assert abs(variances["multinomial"] / expected - 1) < Z * np.sqrt(2 / 4000)
    part = num_samples * WEIGHTS[heavy] % 1  # systematic: floor or ceil
    assert abs(variances["systematic"] - part * (1 - part)) < 0.02
    # Residual: multinomial over what the floors leave.
    rest = num_samples * WEIGHTS - np.floor(num_samples * WEIGHTS + 1e-9)
    share = rest[heavy] / rest.sum()
    expected = rest.sum() * share * (1 - share)
    assert abs(variances["residual"] / expected - 1) < Z * np.sqrt(3 / 4000)
    assert variances["stratified"] < 0.5  # at most two end intervals of a Bernoulli variance each


def test_multinomial_draws_are_independent():
    """Pearson's statistic of all draws, and the pairs of counts, agree with the multinomial law."""
    weights, num_samples = WEIGHTS[WEIGHTS > 0], 20
    counts = _counts(multinomial, jnp.asarray(weights, jnp.float32), num_samples, 4000, seed=2)
    total = counts.sum(0)
    pearson = np.sum((total - total.sum() * weights) ** 2 / (total.sum() * weights))
    assert chi2.sf(pearson, len(weights) - 1) > 1e-6
    first, second = 0, 4  # the two heaviest
    products = (counts[:, first] - num_samples * weights[first]) * (
        counts[:, second] - num_samples * weights[second]
    )
    expected = -num_samples * weights[first] * weights[second]
    assert abs(products.mean() - expected) < Z * products.std() / np.sqrt(len(products))
    assert Z * products.std() / np.sqrt(len(products)) < abs(expected)


def test_particles_without_weight_are_never_drawn(resample):
    """Also where the cumulative weights end below one: then a point beyond them has no particle of its own."""
    num = 2000
    weights = np.exp(np.random.default_rng(5).normal(size=num))
    weights[:100] = weights[1000:1300] = weights[-400:] = 0
    # Half a percent short, as if rounding were that bad: with 1e-7 the event has probability 1e-4 a run.
    weights = jnp.asarray(0.995 * weights / weights.sum(), jnp.float32)
    counts = _counts(resample, weights, num, 50)
    assert np.all(counts.sum(1) == num)
    assert not np.any(counts[:, np.asarray(weights) == 0])


def test_a_point_that_rounds_to_one_has_an_owner():
    """(2^23 - 1 + u)/2^23 is 1 in float32 for one u in four: the owner is the last particle that has weight."""
    num = 2**23
    uniform = jax.jit(lambda key: jax.random.uniform(key, (num,))[-1])
    key = next(key for key in jax.random.split(jax.random.key(0), 50) if uniform(key) > 0.8)
    indices = _many(stratified, key[None], jnp.asarray([0.3, 0.7, 0.0]), num)
    assert indices[0, -1] == 1 and indices.max() == 1


def test_a_million_draws_do_not_collapse(resample):
    """A uniform of exactly zero comes once in 2^23 draws, hence in one run of eight here. No run may feel it."""
    num = 1_000_000
    counts = _counts(resample, jnp.full(num, 1 / num), num, 4)
    assert np.all(np.sum(counts > 0, axis=1) > 0.6 * num)  # a share of 1 - 1/e for the multinomial


def test_one_hot_weight(resample):
    keys = jax.random.split(jax.random.key(1), 5)
    for winner in (0, 3, 6):
        indices = _many(resample, keys, jnp.zeros(7).at[winner].set(1.0), 50)
        assert np.array_equal(indices, np.full((5, 50), winner))


def test_is_deterministic_in_its_key_and_works_compiled(resample):
    weights, keys = jnp.asarray(WEIGHTS, jnp.float32), jax.random.split(jax.random.key(7), 3)
    eager = np.stack([resample(key, weights, 37) for key in keys])
    compiled = _many(resample, keys, weights, 37)
    assert np.array_equal(eager, compiled)
    assert len(np.unique(eager, axis=0)) > 1


def test_log_weights(resample):
    key, log_weights = (
        jax.random.key(3),
        jnp.asarray(np.log(WEIGHTS, where=WEIGHTS > 0, out=np.full(10, -np.inf))),
    )
    log_weights = log_weights.astype(jnp.float32)
    indices = resample_from_log_weights(resample, key, log_weights, 40)
    assert np.array_equal(indices, resample(key, jax.nn.softmax(log_weights), 40))
    # A power of two keeps the shifted values exact where they are of its size, so that the indices are equal.
    shifted = jnp.round(log_weights * 1024) / 1024
    assert np.array_equal(
        resample_from_log_weights(resample, key, shifted, 40),
        resample_from_log_weights(resample, key, shifted - 4096.0, 40),
    )
    assert np.all(WEIGHTS[np.asarray(indices)] > 0)  # minus infinity is never drawn
    draw = partial(resample_from_log_weights, resample)
    counts = _counts(draw, log_weights + 7.5, 30, 2000)
    limit = Z * np.sqrt(np.maximum(counts.var(0), 1e-8) / len(counts))
    assert np.all(np.abs(counts.mean(0) - 30 * WEIGHTS) <= limit)


# float32: within a block of sqrt(N) weights a cumulative sum of size sqrt(N) is off by sqrt(N) 2^-24 at each of the
# few roundings that lead to it; at N = 1e6 that is some 6e-5 each, and 1e-3 bounds what adds up.
@pytest.mark.parametrize("num, num_keys", [(1000, 200), (1_000_000, 3)])
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_systematic_counts_are_floor_or_ceil(num, num_keys, spread):
    weights = _weights(num, spread=spread)
    counts = _counts(systematic, weights, num, num_keys)
    assert np.all(counts.sum(1) == num)
    gap = np.abs(counts - num * np.asarray(weights, float))
    assert gap.max() < 1 + 1e-3


def test_systematic_equals_the_definition():
    """Points (u + k)/num against the cumulative weights in double precision."""
    for num, num_samples in [(1, 3), (97, 40), (40, 97)]:
        with jax.enable_x64(True):
            weights = np.asarray(_weights(num, seed=num), float)
            weights /= weights.sum()
            key = jax.random.key(num)
            indices = systematic(key, jnp.asarray(weights), num_samples)
            points = (float(jax.random.uniform(key, (), jnp.float64)) + np.arange(num_samples)) / num_samples
        assert np.array_equal(indices, np.searchsorted(np.cumsum(weights), points, side="right"))


def test_systematic_is_sorted_and_keeps_equal_weights():
    for num in (7, 1000, 4096):
        indices = _many(systematic, jax.random.split(jax.random.key(0), 5), jnp.full(num, 1 / num), num)
        assert np.array_equal(indices, np.broadcast_to(np.arange(num), (5, num)))
    assert np.all(np.diff(systematic(jax.random.key(0), _weights(1000), 1500)) >= 0)


def test_residual_keeps_the_whole_part():
    counts = _counts(residual, jnp.asarray(WEIGHTS, jnp.float32), 37, 4000)
    assert np.all(counts >= np.floor(37 * WEIGHTS))
    equal = residual(jax.random.key(0), jnp.full(16, 1 / 16), 16)
    assert np.array_equal(np.sort(equal), np.arange(16))


def test_stratified_has_one_point_in_each_interval():
    weights = _weights(50)
    ends = 50 * np.cumsum(np.asarray(weights, float))
    cumulative = np.cumsum(_counts(stratified, weights, 50, 20), axis=1)
    assert np.all(np.abs(cumulative - ends) < 1 + 1e-4)
