"""Warm-up: scales that are recovered, acceptance rates that are reached, and settings that compile nothing anew.

A variance estimated from a window of n pooled, nearly independent positions has a relative error of sqrt(2 / n); what
is allowed is stated at each check. Keys are fixed.
"""

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows import quick

import smcdiff
from smcdiff.mcmc.hamiltonian import hmc
from smcdiff.mcmc.langevin import mala
from smcdiff.mcmc.warmup import _covariance, _empty, adapt_step_size, window_adaptation
from smcdiff.moments import add_rows

CHAINS = 64
VARIANCES = np.array([0.01, 1.0, 25.0, 4.0])
COVARIANCE = np.array([[4.0, 1.8], [1.8, 1.0]])
_traces = []


def _gaussian(variances, x):
    _traces.append(None)
    return -0.5 * jnp.sum(x**2 / variances)


def gaussian(variances=VARIANCES):
    return Partial(_gaussian, jnp.asarray(variances, jnp.float32))


def _correlated(x):
    return -0.5 * (x["a"] @ jnp.asarray(np.linalg.inv(COVARIANCE), jnp.float32) @ x["a"])


class _ScoreOnly(eqx.Module):
    def score(self, x):
        return -x


def acceptance(algorithm, position, num_steps=100):
    num_chains = len(jax.tree.leaves(position)[0])
    trace = smcdiff.run(
        jax.random.key(9),
        algorithm,
        num_steps,
        position=position,
        num_chains=num_chains,
        chunk_size=num_steps,
        progress=False,
    )
    return float(np.mean(trace.info.acceptance_rate))


@pytest.mark.parametrize("name", quick(["hmc", "blackjax nuts"], "hmc"))
def test_windows_recover_scales_and_reach_the_acceptance_rate(name):
    algorithm, options = (hmc, {"num_integration_steps": 3}) if name == "hmc" else (blackjax.nuts, {})
    start = 0.1 * jax.random.normal(jax.random.key(0), (CHAINS, 4))
    found = window_adaptation(
        jax.random.key(1), gaussian(), algorithm, start, 300, target_acceptance=0.9, **options
    )
    # The last window has 125 steps of 64 chains; with 1000 independent ones in it, 5 standard errors are 22 percent.
    np.testing.assert_allclose(found.settings["inverse_mass_matrix"], VARIANCES, rtol=0.22)
    assert found.positions.shape == (
        CHAINS,
        4,
    ) and found.acceptance_rates.shape == found.step_sizes.shape == (300,)
    assert abs(np.asarray(found.acceptance_rates)[-40:].mean() - 0.9) < 0.05
    # The mean of the log steps is accepted more often than the steps are on average.
    assert 0.88 < acceptance(algorithm(gaussian(), **found.settings, **options), found.positions) < 0.98
    if name == "hmc":  # BlackJAX's algorithms are new functions each time, which are compiled anew
        # The settings are arguments of the compiled run, and the target is one of the compiled warm-up.
        before = len(_traces)
        settings = {"step_size": 0.5 * found.settings["step_size"], "inverse_mass_matrix": 2.0 * jnp.ones(4)}
        acceptance(hmc(gaussian(), **settings, **options), found.positions)
        other = gaussian(2.0 * VARIANCES)
        window_adaptation(jax.random.key(2), other, hmc, start, 300, target_acceptance=0.9, **options)
        assert len(_traces) == before


def test_a_dense_matrix_of_a_pytree_and_a_single_chain():
    found = window_adaptation(
        jax.random.key(3),
        _correlated,
        mala,
        {"a": jnp.zeros((1, 2))},
        1500,
        target_acceptance=0.6,
        is_mass_matrix_diagonal=False,
    )
    matrix = np.asarray(found.settings["inverse_mass_matrix"], float)
    # In whitened coordinates the identity; 800 steps of one chain with an autocorrelation time of about 4.
    root = np.linalg.inv(np.linalg.cholesky(COVARIANCE))
    np.testing.assert_allclose(root @ matrix @ root.T, np.eye(2), atol=0.5)
    assert found.positions["a"].shape == (1, 2)
    rate = acceptance(mala(_correlated, **found.settings), {"a": jnp.tile(found.positions["a"], (50, 1))})
    assert abs(rate - 0.6) < 0.1


@pytest.mark.parametrize("metric", [jnp.ones(3), jnp.eye(3)], ids=["diagonal", "dense"])
def test_batches_add_up_to_the_covariance_of_all(metric):
    x = np.random.default_rng(0).normal(3.0, 2.0, (5, 2, 3)).cumsum(0).astype(np.float32)
    pool = _empty(metric)
    for batch in x:
        pool = add_rows(pool, jnp.asarray(batch))
    covariance = np.cov(x.reshape(10, 3), rowvar=False)
    covariance = np.diag(covariance) if metric.ndim == 1 else covariance
    # Stan's shrinkage towards 0.001.
    expected = (10 * covariance + 5e-3 * np.asarray(metric)) / 15
    np.testing.assert_allclose(_covariance(pool, metric), expected, rtol=1e-4, atol=1e-4)


def test_few_steps_adapt_the_step_size_only():
    found = window_adaptation(
        jax.random.key(4), gaussian(), hmc, jnp.ones((3, 4)), 10, num_integration_steps=1
    )
    np.testing.assert_array_equal(found.settings["inverse_mass_matrix"], np.ones(4))


def _score_mala(target, step_size):
    return mala(target, step_size, accept="line_integral", num_nodes=2)


def _build_mala(target, step_size):
    return mala(target, step_size)


def _build_blackjax(target, step_size):
    return blackjax.mala(target, step_size)


@pytest.mark.parametrize(
    ("build", "target", "initial"),
    [(_build_mala, gaussian(), 1e-5), (_score_mala, _ScoreOnly(), 5.0), (_build_blackjax, gaussian(), 0.3)],
    ids=["mala", "mala from scores", "blackjax"],
)
def test_step_sizes_reach_any_acceptance_rate(build, target, initial):
    scale = 1.0 if isinstance(target, _ScoreOnly) else jnp.sqrt(jnp.asarray(VARIANCES, jnp.float32))[None]
    start = scale * jax.random.normal(jax.random.key(5), (CHAINS, 4))
    for wanted in (0.57, 0.9):
        found = adapt_step_size(
            jax.random.key(6),
            Partial(build, target),
            start,
            200,
            target_acceptance=wanted,
            initial_step_size=initial,
        )
        assert set(found.settings) == {"step_size"} and found.settings["step_size"].dtype == jnp.float32
        rate = acceptance(build(target, **found.settings), found.positions)
        assert abs(rate - wanted) < 0.04
        assert abs(np.asarray(found.acceptance_rates)[100:].mean() - wanted) < 0.04


def test_the_program_is_compiled_once_for_thousands_of_chains():
    start = jnp.ones((4000, 4))
    adapt_step_size(jax.random.key(7), Partial(_build_mala, gaussian()), start, 20)
    before = len(_traces)
    build = Partial(_build_mala, gaussian(2.0 * VARIANCES))
    found = adapt_step_size(jax.random.key(8), build, start, 20, initial_step_size=0.2)
    assert len(_traces) == before and found.positions.shape == (4000, 4)


def test_what_is_refused():
    with pytest.raises(TypeError, match="a warm-up needs a kernel whose info has an acceptance_rate, got"):
        adapt_step_size(jax.random.key(0), _elliptical, jnp.zeros((2, 2)), 5)
    for name, value in (("num_steps", 0), ("initial_step_size", -1.0), ("target_acceptance", 1.0)):
        options = {"num_steps": 5, name: value}
        with pytest.raises(ValueError, match=name):
            adapt_step_size(jax.random.key(0), Partial(_build_mala, gaussian()), jnp.zeros((2, 4)), **options)
        with pytest.raises(ValueError, match=name):
            window_adaptation(jax.random.key(0), gaussian(), mala, jnp.zeros((2, 4)), **options)


@pytest.mark.parametrize("kernel", [smcdiff.mcmc.ula, smcdiff.mcmc.underdamped])
def test_kernels_that_never_reject_have_no_rate_to_tune_by(kernel):
    with pytest.raises(TypeError, match="this kernel accepts always; tune mala or hmc"):
        adapt_step_size(jax.random.key(0), lambda h: kernel(gaussian(), h), jnp.zeros((2, 4)), 5)


def _elliptical(step_size):
    return blackjax.elliptical_slice(jnp.sum, mean=jnp.zeros(2), cov=jnp.eye(2))
