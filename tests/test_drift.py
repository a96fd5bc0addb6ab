"""The extra drift of Feynman-Kac correctors, fixed and fitted, against the exact laws of test_fkc.

Statistics as there: z-tests over 20 runs, Student's t with 19 degrees of freedom, bound 5.5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fkc import CASES, SIZES, check, parts, runs, times

import smcdiff
from smcdiff import compose
from smcdiff.smc.corrector import stationary_drift
from smcdiff.smc.drift import _least_squares, fit_drift
from smcdiff.smc.fkc import fkc

STEPS, PARTICLES = SIZES["score"]


@functools.cache
def drift_of(name):
    return fit_drift(
        jax.random.key(100), CASES[name][0](*parts()), times=times(STEPS), num_particles=200, batch_size=None
    )


def unevenness(name, control):
    """N / ESS - 1 of the final weights without resampling, on average over 20 runs."""
    fk = fkc(CASES[name][0](*parts()), times=times(STEPS), drift_control=control)
    _, weights, _ = runs(3, fk, PARTICLES, 20, ess_threshold=0.0)
    return np.mean(PARTICLES * np.sum(weights**2, axis=1)) - 1.0


# Bounds on what is left of the unevenness under drift control; 0.08, 0.3, 0.5 and 1.0 with other keys.
GAINS = {"contrast": 0.3, "guidance": 0.6, "product": 0.8, "tempered tilt": 1.3}


@pytest.mark.slow
@pytest.mark.parametrize("name", GAINS)
def test_a_fitted_drift_keeps_law_and_evidence_and_evens_the_weights(name):
    check(1, name, drift_control=drift_of(name))
    fitted, fixed = unevenness(name, drift_of(name)), unevenness(name, True)
    assert fitted < GAINS[name] * fixed, (fitted, fixed)


def test_fixed_control_is_a_choice_of_coefficients():
    path, grid = CASES["contrast"][0](*parts()), times(10)
    drift = stationary_drift(path, grid)
    np.testing.assert_allclose(drift, np.broadcast_to([2 / 3, -0.4 * 2 / 3], (10, 2)), rtol=1e-5)
    models = [
        fkc(path, times=grid, drift_control=control) for control in (True, None, drift, np.asarray(drift))
    ]
    step = jax.jit(lambda fk, key, x: fk.step(key, x, 5))
    ends = [step(fk, jax.random.key(0), jnp.asarray([0.3, -0.8])) for fk in models]
    for end in ends[1:]:
        np.testing.assert_array_equal(end[0], ends[0][0])
        np.testing.assert_array_equal(end[1], ends[0][1])


def test_any_coefficients_give_the_same_law_and_evidence():
    """Random ones, that differ from step to step."""
    fixed = stationary_drift(CASES["product"][0](*parts()), times(STEPS))
    rough = 0.3 * np.random.default_rng(0).normal(size=fixed.shape)
    check(2, "product", drift_control=fixed + jnp.asarray(rough, fixed.dtype))


def test_fit_is_weighted_least_squares():
    rng = np.random.default_rng(1)
    columns, values = rng.normal(size=(50, 2)) @ np.array([[1.0, 0.8], [0.0, 0.3]]) + 2.0, rng.normal(size=50)
    weights = rng.dirichlet(np.ones(50))
    centred, residual = columns - weights @ columns, values - weights @ values
    gram = centred.T @ (weights[:, None] * centred)
    expected = np.linalg.solve(gram + 0.1 * np.trace(gram) / 2 * np.eye(2), -centred.T @ (weights * residual))
    arrays = [jnp.asarray(array, jnp.float32) for array in (weights, values, columns)]
    np.testing.assert_allclose(_least_squares(*arrays, 0.1), expected, rtol=1e-4)
    # A particle that went astray does not count; none that counts, no change.
    arrays[1] = arrays[1].at[3].set(jnp.nan)
    assert np.all(np.isfinite(_least_squares(*arrays, 0.1)))
    np.testing.assert_array_equal(_least_squares(arrays[0], jnp.full(50, jnp.nan), arrays[2], 0.1), 0.0)


def test_a_diffusion_needs_no_drift():
    """Its increments are constant, so that the fit keeps what it started from: nothing."""
    a, _ = parts()
    drift = fit_drift(jax.random.key(3), a, times=times(20), num_particles=64, batch_size=16)
    assert drift.shape == (20, 1)
    np.testing.assert_allclose(drift, 0.0, atol=1e-3)


@pytest.mark.slow
def test_networks_will_do_and_batches_change_no_number():
    a, b = parts()
    network = smcdiff.Diffusion(b, lambda model, x, t: model.score(x, t), b.schedule, "score", (2,))
    exact = fit_drift(jax.random.key(4), compose.product(a, b), times=times(10), num_particles=64)
    learned = fit_drift(
        jax.random.key(4), compose.product(a, network), times=times(10), num_particles=64, batch_size=10
    )
    np.testing.assert_allclose(learned, exact, rtol=0.02, atol=0.02)


def test_what_is_refused():
    path, grid = compose.product(*parts()), times(10)
    for control in (np.zeros((10, 3)), np.zeros((11, 2)), 0.5):
        with pytest.raises(
            ValueError, match=r"drift_control must be True, .* \(steps, parts\) = \(10, 2\), got shape"
        ):
            fkc(path, times=grid, drift_control=control)
    with pytest.raises(ValueError, match="drift_control is an option of"):
        fkc(path, times=grid, weights="density", drift_control=np.zeros((10, 2)))
    for name in ("num_particles", "num_probes"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            fit_drift(jax.random.key(0), path, times=grid, **{"num_particles": 10, name: 0})
    with pytest.raises(ValueError, match="ridge must be positive and finite, got -1"):
        fit_drift(jax.random.key(0), path, times=grid, num_particles=10, ridge=-1)
