"""The SMC loop against Feynman-Kac models with known evidence.

z-tests use a bound of 5 standard errors, estimated from independent runs: a false failure has a probability of
about 6e-7 a check under normality, and keys are fixed.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fk_cases import CASES
from jax.tree_util import Partial
from rows import quick

import smcdiff
from smcdiff.smc import FeynmanKac, effective_sample_size, multinomial, run_smc, smc, stratified, systematic

Z = 5.0


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("resampling_fn", [systematic, stratified, multinomial])
def test_evidence_is_unbiased_with_few_particles(case, threshold, resampling_fn):
    result = run_smc(
        jax.random.key(1),
        case.fk,
        5,
        num_chains=4000,
        ess_threshold=threshold,
        resampling_fn=resampling_fn,
        progress=False,
    )
    ratio = np.exp(np.asarray(result.log_evidence, float) - case.log_evidence)
    assert abs(ratio.mean() - 1) < Z * ratio.std() / np.sqrt(ratio.size)
    assert ratio.std() / np.sqrt(ratio.size) < 0.05  # the test has the power to see a bias of a quarter


def test_a_threshold_for_each_step_is_a_schedule(case):
    schedule = np.zeros(case.fk.num_steps, np.float32)
    schedule[1::2] = 1.0
    result = run_smc(jax.random.key(13), case.fk, 5, num_chains=4000, ess_threshold=schedule, progress=False)
    # In the discrete model the weights of all five may come out equal.
    assert not result.info.resampled[:, ::2].any() and result.info.resampled[:, 1::2].mean() > 0.9
    ratio = np.exp(np.asarray(result.log_evidence, float) - case.log_evidence)
    assert abs(ratio.mean() - 1) < Z * ratio.std() / np.sqrt(ratio.size)
    assert ratio.std() / np.sqrt(ratio.size) < 0.05


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_final_weighted_mean_is_the_filter_mean(case, threshold):
    result = run_smc(jax.random.key(2), case.fk, 2000, num_chains=24, ess_threshold=threshold, progress=False)
    weights = np.exp(np.asarray(result.log_weights, float))
    values = np.asarray(case.observe(result.particles), float)
    means = np.einsum("cn,cn...->c...", weights, values)
    error = np.abs(means.mean(0) - case.mean) / (means.std(0, ddof=1) / np.sqrt(len(means)))
    # 24 runs: Student's t with 23 degrees of freedom exceeds 6.5 with probability 1e-6.
    assert np.all(error < 6.5)
    assert np.all(means.std(0) < 0.1)


@pytest.mark.slow
def test_evidence_error_falls_with_the_root_of_the_number_of_particles(case):
    spread = []
    for num_particles in (50, 800):
        result = run_smc(jax.random.key(3), case.fk, num_particles, num_chains=200, progress=False)
        spread.append(np.std(np.asarray(result.log_evidence, float)))
    # Sixteen times the particles: a quarter of the deviation, known to 1/sqrt(2 * 199) = 5 % each; 5 sigma = 35 %.
    assert 0.25 * 0.65 < spread[1] / spread[0] < 0.25 * 1.35


def test_resampling_resets_weights_and_skipping_carries_them(case):
    num_particles = 64
    call = eqx.filter_jit(lambda function, *args: function(*args))
    state = call(smc(case.fk, num_particles).init, None, jax.random.key(4))
    never = smc(case.fk, num_particles, ess_threshold=0.0)
    always = smc(case.fk, num_particles, ess_threshold=1.0)
    kept, info_kept = call(never.step, jax.random.key(5), state)
    reset, info_reset = call(always.step, jax.random.key(5), state)
    assert not info_kept.resampled and info_reset.resampled
    assert np.array_equal(info_kept.ancestors, np.arange(num_particles))

    # Weigh by hand: the same key moves the particles, so increments can be recomputed one by one.
    _, key_move = jax.random.split(jax.random.key(5))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key_move, jnp.arange(num_particles))
    move = jax.jit(jax.vmap(case.fk.step, (0, 0, None)))
    moved, increments = move(keys, state.particles, jnp.asarray(0))
    carried = np.asarray(state.log_weights + increments, float)
    np.testing.assert_allclose(kept.log_weights, carried - np.logaddexp.reduce(carried), atol=1e-5)
    np.testing.assert_allclose(
        kept.log_evidence - state.log_evidence, np.logaddexp.reduce(carried), atol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, kept.particles, moved)

    parents = jax.tree.map(lambda leaf: leaf[info_reset.ancestors], state.particles)
    _, increments = move(keys, parents, jnp.asarray(0))
    fresh = np.asarray(increments, float)
    np.testing.assert_allclose(reset.log_weights, fresh - np.logaddexp.reduce(fresh), atol=1e-5)
    np.testing.assert_allclose(
        reset.log_evidence - state.log_evidence, np.logaddexp.reduce(fresh) - np.log(num_particles), atol=1e-5
    )


def test_effective_sample_size():
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    with np.errstate(divide="ignore"):
        log_weights = jnp.asarray(np.log(weights) + 3.0, jnp.float32)
    np.testing.assert_allclose(effective_sample_size(log_weights), 1 / np.sum(weights**2), rtol=1e-5)


@pytest.mark.parametrize("batch_size", quick([1, 7, 100], 7))
def test_batch_size_changes_no_number(batch_size):
    case = CASES["gaussian"]()
    whole = run_smc(jax.random.key(6), case.fk, 64, progress=False)
    batched = run_smc(jax.random.key(6), case.fk, 64, batch_size=batch_size, progress=False)
    np.testing.assert_allclose(whole.log_weights, batched.log_weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole.info.ancestors, batched.info.ancestors)


_traces = []


def _counting_step(offset, rng_key, x, k):
    _traces.append(None)
    x = x + jax.random.normal(rng_key, ())
    return x, -0.5 * (x - offset) ** 2


def _normal_init(scale, rng_key):
    return scale * jax.random.normal(rng_key, ()), jnp.zeros(())


def test_a_new_model_of_the_same_shape_does_not_trace_again():
    _traces.clear()
    evidences = []
    for offset in (0.0, 1.0, 2.0):
        fk = FeynmanKac(
            Partial(_normal_init, jnp.asarray(1.0)), Partial(_counting_step, jnp.asarray(offset)), 6
        )
        result = run_smc(jax.random.key(7), fk, 32, ess_threshold=0.5 + 0.1 * offset, progress=False)
        evidences.append(float(result.log_evidence[0]))
    # The loop's body is traced for its shapes and for the program; not once for every model.
    first = len(_traces)
    assert 1 <= first <= 4
    assert len(set(evidences)) == 3
    fk = FeynmanKac(Partial(_normal_init, jnp.asarray(2.0)), Partial(_counting_step, jnp.asarray(-1.0)), 6)
    run_smc(jax.random.key(8), fk, 32, progress=False)
    assert len(_traces) == first


def _poisoned_step(bad, rng_key, x, k):
    """A third of the particles gets an invalid weight at step 2."""
    value = jax.random.normal(rng_key, ())
    return value, jnp.where((k == 2) & (value > 0.43), bad, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_invalid_weights_count_as_zero_and_are_flagged(bad):
    fk = FeynmanKac(Partial(_normal_init, jnp.asarray(1.0)), Partial(_poisoned_step, jnp.asarray(bad)), 4)
    with pytest.warns(
        RuntimeWarning, match="weights came out NaN or infinite and count as zero, first at step 2"
    ):
        result = run_smc(jax.random.key(9), fk, 300, ess_threshold=0.0, progress=False)
    invalid = np.asarray(result.info.num_invalid[0])
    assert invalid[2] > 60 and invalid.sum() == invalid[2]
    assert not result.is_valid
    assert np.isfinite(result.mean())
    np.testing.assert_allclose(result.log_evidence, np.log(1 - invalid[2] / 300), rtol=1e-4)


def test_a_cloud_without_weight_ends_with_no_evidence():
    fk = FeynmanKac(Partial(_normal_init, jnp.asarray(1.0)), Partial(_dead_step), 3)
    with pytest.warns(RuntimeWarning, match="1 of 1 chains have no weight left"):
        result = run_smc(jax.random.key(10), fk, 10, progress=False)
    assert np.isneginf(result.log_evidence).all() and not result.is_valid


def _dead_step(rng_key, x, k):
    return x, jnp.where(k == 1, -jnp.inf, 0.0)


@pytest.mark.parametrize("num_particles", [0, -3, 2.5, True, "ten"])
def test_bad_number_of_particles(case, num_particles):
    with pytest.raises(ValueError, match="num_particles must be a positive integer"):
        smc(case.fk, num_particles)


@pytest.mark.parametrize("threshold", [-0.6, 1.5, np.nan])
def test_bad_threshold(case, threshold):
    with pytest.raises(ValueError, match="ess_threshold is a fraction of the particles"):
        smc(case.fk, 10, ess_threshold=threshold)
    of_each_step = np.full(case.fk.num_steps, 0.5)
    with pytest.raises(ValueError, match="ess_threshold is a fraction of the particles"):
        smc(case.fk, 10, ess_threshold=of_each_step + np.array(threshold))
    with pytest.raises(ValueError, match=rf"one entry for each of the {case.fk.num_steps} steps, got shape"):
        smc(case.fk, 10, ess_threshold=np.append(of_each_step, 0.5))


@pytest.fixture(scope="module")
def weighted():
    """Two chains with unequal evidence and unequal weights."""
    rng = np.random.default_rng(0)
    log_weights = np.log(rng.dirichlet(np.full(50, 0.5), size=2)).astype(np.float32)
    particles = {"x": rng.normal(size=(2, 50, 3)).astype(np.float32)}
    info = smcdiff.smc.SMCInfo(*[np.zeros((2, 4))] * 5)
    return smcdiff.SMCResult(particles, log_weights, np.log(np.array([0.2, 0.6])), info, np.zeros((2, 4, 50)))


def test_pooling_weighs_chains_by_their_evidence(weighted):
    weights = np.exp(weighted.log_weights.astype(float)) * np.array([0.25, 0.75])[:, None]
    np.testing.assert_allclose(np.exp(weighted.pooled_log_weights()), weights, rtol=1e-5)
    mean = np.tensordot(weights, weighted.particles["x"], axes=2)
    np.testing.assert_allclose(weighted.mean()["x"], mean, rtol=1e-5)
    variance = np.tensordot(weights, (weighted.particles["x"] - mean) ** 2, axes=2)
    np.testing.assert_allclose(weighted.std()["x"], np.sqrt(variance), rtol=1e-5)
    np.testing.assert_allclose(weighted.pooled_log_evidence(), np.log(0.4), rtol=1e-6)


def test_weighted_quantiles_are_the_inverse_of_the_weighted_distribution(weighted):
    levels = np.array([0.05, 0.5, 0.9])
    values = weighted.quantile(levels)["x"]
    weights, x = np.exp(weighted.pooled_log_weights()).ravel(), weighted.particles["x"].reshape(100, 3)
    for level, value in zip(levels, values, strict=True):
        for j in range(3):
            assert weights[x[:, j] <= value[j]].sum() >= level - 1e-6
            assert weights[x[:, j] < value[j]].sum() < level + 1e-6
    np.testing.assert_array_equal(weighted.quantile(0.5)["x"], values[1])


def test_resampled_draws_have_the_weighted_mean(weighted):
    draws = weighted.resample(jax.random.key(0), 20_000)["x"]
    assert draws.shape == (2, 20_000, 3)
    weights = np.exp(weighted.log_weights.astype(float))
    mean = np.einsum("cn,cnk->ck", weights, weighted.particles["x"])
    # Systematic resampling: counts are within one of their expectation, so the error is at most 50 max|x| / 20000.
    np.testing.assert_allclose(draws.mean(1), mean, atol=50 * np.abs(weighted.particles["x"]).max() / 20_000)
    # Draws come in random order: successive ones are uncorrelated (standard error 1/sqrt(20000) = .007).
    centred = draws - draws.mean(1, keepdims=True)
    assert np.all(np.abs((centred[:, 1:] * centred[:, :-1]).mean(1) / (centred**2).mean(1)) < Z * 0.007)


def test_dead_particles_may_be_nan(weighted):
    log_weights, x = weighted.log_weights.copy(), weighted.particles["x"].copy()
    log_weights[0, 3], x[0, 3] = -np.inf, np.nan
    result = weighted._replace(particles={"x": x}, log_weights=log_weights)
    assert np.all(np.isfinite(result.mean()["x"])) and np.all(np.isfinite(result.std()["x"]))
    assert np.all(np.isfinite(result.quantile([0.1, 0.9])["x"]))
    assert np.all(np.isfinite(result.resample(jax.random.key(1))["x"]))
