"""Diagnostics of weighted particles: counted by hand, and against the errors that runs really have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import smcdiff
from smcdiff.diagnostics import pareto_khat
from smcdiff.diagnostics.particles import particle_diagnostics, weight_diagnostics
from smcdiff.smc.feynman_kac import FeynmanKac, SMCInfo


def test_weights_counted_by_hand():
    with np.errstate(divide="ignore"):
        log_weights = np.log([[0.5, 0.25, 0.25, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]]) + 7.0
    found = weight_diagnostics(log_weights)
    np.testing.assert_allclose(found.ess, [1 / 0.375, 4.0, 1.0])
    np.testing.assert_allclose(found.entropy, [1.5 * np.log(2), np.log(4), 0.0], atol=1e-12)
    np.testing.assert_allclose(found.perplexity, [2**1.5, 4.0, 1.0])
    np.testing.assert_allclose(found.max_weight, [0.5, 0.25, 1.0])
    assert np.isnan(found.pareto_k).all()  # too few


def test_bad_weights_give_no_number():
    found = weight_diagnostics([[np.nan, 0.0], [-np.inf, -np.inf], [np.inf, 0.0], [0.0, 0.0]])
    for field in found[:4]:
        assert np.isnan(field[:3]).all() and np.isfinite(field[3])
    with pytest.raises(ValueError, match="must have the shape"):
        weight_diagnostics(1.0)


def test_tail_shape_tells_heavy_weights_from_light_ones():
    """Weights u^-k have the tail shape k; the estimate's deviation is about (1 + k) / sqrt(3 sqrt(4000)) = 0.14."""
    u = np.random.default_rng(0).uniform(size=4000)
    k = np.array([0.2, 0.5, 1.5])
    found = weight_diagnostics(-k[:, None] * np.log(u)[None]).pareto_k
    assert np.all(np.abs(found - k) < 4 * 0.073 * (1 + k))
    for value, shape in zip(found, k, strict=True):
        row = jnp.asarray(-shape * np.log(u), jnp.float32)
        assert value == pytest.approx(float(pareto_khat(row, r_eff=1.0, log_weights=True)), rel=1e-3)


def _result(log_evidence, log_weights, ancestors, resampled):
    chains, steps, size = ancestors.shape
    by_step = np.repeat(log_weights[:, None], steps, 1)
    info = SMCInfo(
        ess=1 / np.sum(np.exp(2 * by_step), axis=2),
        resampled=resampled,
        ancestors=ancestors,
        log_evidence_increment=np.repeat(log_evidence[:, None] / steps, steps, 1),
        num_invalid=np.zeros((chains, steps), int),
    )
    return smcdiff.SMCResult(np.zeros((chains, size)), log_weights, log_evidence, info, by_step)


def test_genealogy_and_evidence_counted_by_hand():
    # Chain 0: particles descend from 0, 0, 2, 3 of the first cloud. Chain 1: all from 1, by the last step.
    ancestors = np.array([[[0, 0, 2, 3], [0, 1, 2, 3]], [[1, 1, 0, 1], [0, 1, 1, 0]]])
    weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    resampled = np.array([[True, False], [True, True]])
    found = particle_diagnostics(_result(np.log([1.0, 3.0]), np.log(weights), ancestors, resampled))
    np.testing.assert_array_equal(found.unique_ancestors, [[3, 4, 4], [1, 2, 4]])
    np.testing.assert_array_equal(found.common_ancestor_step, [-1, 0])
    np.testing.assert_array_equal(found.num_resamplings, [1, 2])
    np.testing.assert_allclose(found.effective_families, [1 / (0.3**2 + 0.3**2 + 0.4**2), 1.0])
    np.testing.assert_allclose(found.least_ess, 1 / 0.3)
    np.testing.assert_allclose(found.evidence_share, [0.25, 0.75])
    assert found.effective_chains == pytest.approx(1.6)
    assert found.log_evidence_spread == pytest.approx(np.log(3) / np.sqrt(2))
    assert found.pooled_log_evidence == pytest.approx(np.log(2))
    # Estimates 1 and 3: mean 2, deviation sqrt 2, of the mean 1, relative to it 1/2.
    assert found.pooled_log_evidence_between == pytest.approx(0.5)
    assert np.isfinite(found.log_evidence_std_error[0]) and np.isinf(found.log_evidence_std_error[1])
    assert np.isinf(found.pooled_log_evidence_std_error)


def test_a_single_run_says_nothing_between_runs():
    ancestors = np.tile(np.arange(4), (1, 2, 1))
    found = particle_diagnostics(
        _result(np.array([-3.0]), np.log(np.full((1, 4), 0.25)), ancestors, np.zeros((1, 2), bool))
    )
    assert np.isnan(found.log_evidence_spread) and np.isnan(found.pooled_log_evidence_between)
    assert found.effective_chains == 1.0 and found.effective_families[0] == pytest.approx(4.0)


def _init(scale, rng_key):
    x = jax.random.normal(rng_key, ())
    return x, scale * x


def _step(scale, rng_key, particle, k):
    x = 0.5 * particle + jax.random.normal(rng_key, ())
    return x, scale * x


def test_both_errors_of_the_evidence_agree_where_no_mode_is_missed():
    """Of 64 runs: the spread between them, and the mean square of what each says of itself.

    Over 30 repetitions the ratio of the variances was 0.88 with a deviation of 0.18 of its logarithm, and that of the
    pooled errors 0.98 with a deviation of 0.08: the bounds are 4 deviations away, at least.
    """
    scale = jnp.asarray(0.4)
    fk = FeynmanKac(Partial(_init, scale), Partial(_step, scale), 8)
    result = smcdiff.run_smc(jax.random.key(0), fk, 100, num_chains=64, progress=False)
    found = particle_diagnostics(result)
    between = found.log_evidence_spread**2
    within = np.mean(found.log_evidence_std_error**2)
    assert 0.4 < within / between < 2.0
    assert 0.6 < found.pooled_log_evidence_between / found.pooled_log_evidence_std_error < 1.6
    np.testing.assert_allclose(found.ess, weight_diagnostics(result.log_weights_by_step).ess, rtol=1e-3)
    assert np.all(found.perplexity >= found.ess * (1 - 1e-3))
