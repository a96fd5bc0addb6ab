"""Resampling functions: one list, the properties that each must have, and those of the single ones.

Unless stated otherwise a z-test allows 5 standard errors: a false failure has a probability of 6e-7 a check under
normality. Keys are fixed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from smcdiff.smc.resampling import (
    killing,
    multinomial,
    resample_from_log_weights,
    residual,
    ssp,
    stratified,
    systematic,
)

Z = 5.0
FUNCTIONS = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
    "ssp": ssp,
    "killing": killing,
}
FLOOR_OR_CEIL = {"systematic": systematic, "ssp": ssp}
# Uneven, unordered, with zeros at both ends and inside.
WEIGHTS = np.array([0.0, 0.31, 0.02, 0.0, 0.17, 0.003, 0.267, 0.15, 0.08, 0.0])


@pytest.fixture(scope="module", params=FUNCTIONS)
def resample(request):
    return FUNCTIONS[request.param]


def _size(resample, wanted, num=10):
    """Number of samples: as wanted where the function has a choice."""
    return num if resample is killing else wanted


def _weights(num, seed=0, spread=1.0):
    """Weights as a filter makes them; normalised in double precision, so that only their own rounding is left."""
    weights = np.exp(spread * np.random.default_rng(seed).normal(size=num))
    return jnp.asarray(weights / weights.sum(), jnp.float32)


# The weights are an argument: a constant of a million entries would be folded by the compiler for a minute.
@partial(jax.jit, static_argnums=(0, 3))
def _many(resample, keys, weights, num_samples):
    return jax.vmap(lambda key: resample(key, weights, num_samples))(keys)


_one = jax.jit(lambda resample, key, weights, num: resample(key, weights, num), static_argnums=(0, 3))
_from_log_weights = jax.jit(resample_from_log_weights, static_argnums=(0, 3))


def _counts(resample, weights, num_samples, num_keys, seed=0):
    """Offspring (num_keys, N) of independent resamplings."""
    indices = _many(resample, jax.random.split(jax.random.key(seed), num_keys), weights, num_samples)
    return np.stack([np.bincount(row, minlength=len(weights)) for row in np.asarray(indices)])


@pytest.mark.parametrize("num_samples", [1, 37])
def test_shape_dtype_and_range(resample, num_samples):
    num_samples = _size(resample, num_samples)
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            weights = jnp.asarray(WEIGHTS, dtype)
            indices = _many(resample, jax.random.split(jax.random.key(0), 1), weights, num_samples)[0]
            assert indices.shape == (num_samples,) and jnp.issubdtype(indices.dtype, jnp.integer)
            assert np.all(WEIGHTS[np.asarray(indices)] > 0)


@pytest.mark.parametrize("num_samples", [10, 37])
def test_counts_are_unbiased(resample, num_samples):
    num_samples = _size(resample, num_samples)
    counts = _counts(resample, jnp.asarray(WEIGHTS, jnp.float32), num_samples, 4000)
    assert np.all(counts.sum(1) == num_samples)
    error = counts.mean(0) - num_samples * WEIGHTS
    # At most the variance of independent draws, by which zero observed variance is no excuse.
    limit = Z * np.sqrt(np.maximum(counts.var(0), 1e-8) / len(counts))
    assert np.all(np.abs(error) <= limit)
    # The power: a tenth of the mean offspring of every particle above 0.1 would be seen.
    assert np.all(limit[WEIGHTS > 0.1] < 0.1 * num_samples * WEIGHTS[WEIGHTS > 0.1])


def test_variance_of_the_counts():
    """On the heaviest particle: each function has its own, known in closed form."""
    num_samples, heavy = 37, WEIGHTS.argmax()
    variances = {
        name: _counts(f, jnp.asarray(WEIGHTS, jnp.float32), _size(f, num_samples), 4000, seed=1).var(0)[heavy]
        for name, f in FUNCTIONS.items()
    }
    expected = num_samples * WEIGHTS[heavy] * (1 - WEIGHTS[heavy])
    # The variance of a near-normal count is known to sqrt(2/4000) = 2.2 %.
    assert abs(variances["multinomial"] / expected - 1) < Z * np.sqrt(2 / 4000)
    part = num_samples * WEIGHTS[heavy] % 1  # floor or ceil
    assert abs(variances["systematic"] - part * (1 - part)) < 0.02
    assert abs(variances["ssp"] - part * (1 - part)) < 0.02
    # Residual: multinomial over what the floors leave.
    rest = num_samples * WEIGHTS - np.floor(num_samples * WEIGHTS + 1e-9)
    share = rest[heavy] / rest.sum()
    expected = rest.sum() * share * (1 - share)
    assert abs(variances["residual"] / expected - 1) < Z * np.sqrt(3 / 4000)
    assert variances["stratified"] < 0.5  # at most two end intervals of a Bernoulli variance each
    # Killing: the heaviest survives, and draws a binomial share of the independent deaths of the others.
    dies, weight = 1 - WEIGHTS / WEIGHTS.max(), WEIGHTS[heavy]
    expected = dies.sum() * weight * (1 - weight) + weight**2 * np.sum(dies * (1 - dies))
    assert abs(variances["killing"] / expected - 1) < Z * np.sqrt(3 / 4000)


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


@pytest.mark.slow
def test_a_point_that_rounds_to_one_has_an_owner():
    """(2^23 - 1 + u)/2^23 is 1 in float32 for one u in four: the owner is the last particle that has weight."""
    num = 2**23
    uniform = jax.jit(lambda key: jax.random.uniform(key, (num,))[-1])
    key = next(key for key in jax.random.split(jax.random.key(0), 50) if uniform(key) > 0.8)
    indices = _many(stratified, key[None], jnp.asarray([0.3, 0.7, 0.0]), num)
    assert indices[0, -1] == 1 and indices.max() == 1


@pytest.mark.slow
def test_a_million_draws_do_not_collapse(resample):
    """A uniform of exactly zero comes once in 2^23 draws, hence in one run of eight here. No run may feel it."""
    num = 1_000_000
    counts = _counts(resample, jnp.full(num, 1 / num), num, 4)
    assert np.all(np.sum(counts > 0, axis=1) > 0.6 * num)  # a share of 1 - 1/e for the multinomial


def test_one_hot_weight(resample):
    keys = jax.random.split(jax.random.key(1), 5)
    for winner in (0, 3, 6):
        num_samples = _size(resample, 50, 7)
        indices = _many(resample, keys, jnp.zeros(7).at[winner].set(1.0), num_samples)
        assert np.array_equal(indices, np.full((5, num_samples), winner))


def test_is_deterministic_in_its_key_and_works_in_batches(resample):
    weights, keys = jnp.asarray(WEIGHTS, jnp.float32), jax.random.split(jax.random.key(7), 3)
    num_samples = _size(resample, 37)
    alone = np.stack([_one(resample, key, weights, num_samples) for key in keys])
    assert np.array_equal(alone, _many(resample, keys, weights, num_samples))
    assert len(np.unique(alone, axis=0)) > 1


def test_log_weights(resample):
    key, log_weights = (
        jax.random.key(3),
        jnp.asarray(np.log(WEIGHTS, where=WEIGHTS > 0, out=np.full(10, -np.inf))),
    )
    log_weights = log_weights.astype(jnp.float32)
    size = _size(resample, 40)
    indices = _from_log_weights(resample, key, log_weights, size)
    assert np.array_equal(indices, _one(resample, key, jax.nn.softmax(log_weights), size))
    # A power of two keeps the shifted values exact where they are of its size, so that the indices are equal.
    shifted = np.round(np.asarray(log_weights) * np.float32(1024)) / np.float32(1024)
    assert np.array_equal(
        _from_log_weights(resample, key, shifted, size),
        _from_log_weights(resample, key, shifted - np.float32(4096), size),
    )
    assert np.all(WEIGHTS[np.asarray(indices)] > 0)  # minus infinity is never drawn
    draw = partial(resample_from_log_weights, resample)
    counts = _counts(draw, log_weights + 7.5, size, 2000)
    limit = Z * np.sqrt(np.maximum(counts.var(0), 1e-8) / len(counts))
    assert np.all(np.abs(counts.mean(0) - size * WEIGHTS) <= limit)


@pytest.mark.parametrize("name", FLOOR_OR_CEIL)
@pytest.mark.parametrize(
    "num, num_samples, num_keys", [(1000, 1000, 200), (1000, 77, 200), (10**6, 10**6, 3)]
)
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_counts_are_floor_or_ceil(name, num, num_samples, num_keys, spread):
    """Against double precision, for weights as float32 leaves them: normalised with an error of their sum."""
    weights = jax.nn.softmax(spread * jnp.asarray(np.random.default_rng(1).normal(size=num), jnp.float32))
    exact = np.asarray(weights, float)
    exact *= num_samples / exact.sum()
    counts = _counts(FLOOR_OR_CEIL[name], weights, num_samples, num_keys)
    assert np.all(counts.sum(1) == num_samples)
    # Rounding num_samples * weight to float32 is all that is left; a plain float32 running sum is off by 0.05.
    assert np.all(np.abs(counts - exact) < 1 + 2.0**-22 * np.maximum(exact, 1))
    assert np.any(counts > exact) and np.any(counts < exact)


def test_running_sum_of_systematic_counts_at_a_million():
    """Also the offspring of particles 0..i together are within one of their expectation, for every i."""
    weights = _weights(10**6, spread=1.5)
    exact = np.cumsum(np.asarray(weights, float))
    exact *= 10**6 / exact[-1]
    gap = np.abs(np.cumsum(_counts(systematic, weights, 10**6, 3), axis=1) - exact)
    # Independent roundings of the expectations, some 2^-25 each: 1e-4 together.
    assert gap.max() < 1 + 1e-3


@pytest.mark.parametrize(
    "num, num_samples",
    [(1, 5), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((10**6, 3), (5000, 10**6)))],
)
def test_numbers_of_different_size(num, num_samples):
    """Expected offspring far below and far above the unit of the weights' rounding."""
    weights = _weights(num, seed=3)
    exact = num_samples * np.asarray(weights, float) / np.asarray(weights, float).sum()
    for resample in FLOOR_OR_CEIL.values():
        counts = _counts(resample, weights, num_samples, 5)
        assert np.all(counts.sum(1) == num_samples)
        assert np.all(np.abs(counts - exact) < 1 + 2.0**-22 * np.maximum(exact, 1))
        # The mean index, over 5 runs of at least 3 draws each, nearly uniform between 0 and num.
        mean = np.sum(exact * np.arange(num)) / num_samples
        found = (counts @ np.arange(num)).mean() / num_samples
        assert abs(found - mean) <= Z * num / np.sqrt(12 * 15)


def _ssp_by_pairs(expected, uniforms):
    """The sequential algorithm of arXiv 1707.01845, in double precision."""
    counts = np.floor(expected).astype(int)
    parts = expected - counts
    i = 0
    for j in range(1, len(parts)):
        up_i, up_j = min(parts[j], 1 - parts[i]), min(parts[i], 1 - parts[j])
        overflow = parts[i] + parts[j] >= 1 - 1e-9
        # One goes up and the other down by as much, with probabilities that keep both expectations. Which of the two
        # outcomes a small uniform stands for is ours to say: the one after which j is undecided.
        swap = uniforms[j] * (up_i + up_j) < (up_j if overflow else up_i)
        i_goes_up = swap == overflow
        step = up_i if i_goes_up else up_j
        parts[i] += step if i_goes_up else -step
        parts[j] -= step if i_goes_up else -step
        if overflow:
            counts[i if i_goes_up else j] += 1
        i = j if swap else i
    counts[i] += round(parts[i])  # rounding may leave the last one a little short of an offspring
    return counts


def test_ssp_equals_the_sequential_algorithm():
    for num, num_samples in [(2, 3), (97, 150), (500, 300)]:
        with jax.enable_x64(True):
            weights = np.asarray(_weights(num, seed=num), float)
            weights[num // 2 : num // 2 + num // 10] = 0
            weights /= weights.sum()
            key = jax.random.key(num)
            indices = _many(ssp, key[None], jnp.asarray(weights), num_samples)[0]
            uniforms = np.asarray(jax.random.uniform(key, (num,), jnp.float64))
        counts = _ssp_by_pairs(num_samples * weights, uniforms)
        assert np.array_equal(np.bincount(indices, minlength=num), counts)


def test_ssp_counts_are_negatively_correlated():
    """Every pair, where systematic resampling has pairs that are positively correlated."""
    weights = jnp.asarray(WEIGHTS, jnp.float32)

    def correlation(resample):
        counts = _counts(resample, weights, 10, 4000, seed=4)[:, WEIGHTS > 0]
        return np.corrcoef(counts.T)[np.triu_indices(counts.shape[1], 1)]

    assert correlation(ssp).max() < Z / np.sqrt(4000)
    assert correlation(systematic).max() > 0.3


def test_systematic_equals_the_definition():
    """Points (u + k)/num against the cumulative weights in double precision."""
    for num, num_samples in [(1, 3), (97, 40), (40, 97)]:
        with jax.enable_x64(True):
            weights = np.asarray(_weights(num, seed=num), float)
            weights /= weights.sum()
            key = jax.random.key(num)
            indices = _many(systematic, key[None], jnp.asarray(weights), num_samples)[0]
            uniform = 1 - float(jax.random.bits(key, (), jnp.uint32)) / 2**32
        points = (uniform + np.arange(num_samples)) / num_samples
        assert np.array_equal(indices, np.searchsorted(np.cumsum(weights), points, side="left"))


def test_systematic_is_sorted_and_keeps_equal_weights():
    for num in (7, 1000, 4096):
        indices = _many(systematic, jax.random.split(jax.random.key(0), 5), jnp.full(num, 1 / num), num)
        assert np.array_equal(indices, np.broadcast_to(np.arange(num), (5, num)))
    assert np.all(
        np.diff(_many(systematic, jax.random.split(jax.random.key(0), 5), _weights(1000), 1500)) >= 0
    )


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


def test_killing_keeps_whoever_survives_in_its_place():
    """Particle i is its own parent with probability p = w_i/max w, or by a draw: p + (1 - p) w_i."""
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    indices = np.asarray(_many(killing, jax.random.split(jax.random.key(6), 4000), weights, 10))
    keep = WEIGHTS / WEIGHTS.max()
    expected = keep + (1 - keep) * WEIGHTS
    own = (indices == np.arange(10)).mean(0)
    assert np.all(np.abs(own - expected) <= Z * np.sqrt(expected * (1 - expected) / 4000) + 1e-12)
    assert np.array_equal(killing(jax.random.key(0), jnp.full(16, 1 / 16), 16), np.arange(16))
    with pytest.raises(ValueError, match="num_samples must be 10, got 7"):
        killing(jax.random.key(0), weights, 7)


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_the_outermost_points_have_owners(monkeypatch, bits):
    """Expected offspring sum to N to the last unit of 2^-32; random points would hardly notice if they did not."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(bits, dtype))
    draw = jax.jit(lambda weights: systematic(jax.random.key(0), weights, 5000))
    for seed in range(4):
        weights = _weights(5000, seed=seed)
        counts = np.bincount(draw(weights), minlength=5000)
        expected = 5000 * np.asarray(weights, float) / np.asarray(weights, float).sum()
        assert counts.size == 5000 and counts.sum() == 5000
        assert np.all(np.abs(counts - expected) < 1 + 1e-6 * expected)
