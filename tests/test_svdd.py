"""Soft value-based decoding against closed forms; see test_steering for the oracle and the tests' statistics."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_steering import (
    CASES,
    SLOPE,
    as_flow,
    assert_is_tilted_mixture,
    assert_properly_weighted,
    chain_law,
    gaussian,
    mixture,
    reward,
    run,
    tilt,
    times,
)

from smcdiff import schedules
from smcdiff.smc.steering import jax_reward
from smcdiff.smc.svdd import svdd


@pytest.mark.parametrize(("slope", "width", "scale", "threshold"), CASES)
@pytest.mark.parametrize("num_children", [1, 3])
def test_children_are_weighed_properly(num_children, slope, width, scale, threshold):
    law = tilt(*chain_law(gaussian(), times()), slope, width, scale)
    fk = svdd(gaussian(), reward(slope, width), times=times(), num_children=num_children, scale=scale)
    assert_properly_weighted(run(1, fk, ess_threshold=threshold), *law, largest_error=0.05)


def test_one_particle_is_weighed_properly():
    """No resampling can help a single particle: its weight alone must put the choice among its children right.

    Three steps only, so that children differ and a wrong choice cannot hide.
    """
    grid = times(num_steps=3)
    law = tilt(*chain_law(gaussian(), grid), 2 * SLOPE, 0.0, 1.0)
    result = run(2, svdd(gaussian(), reward(2 * SLOPE), times=grid, num_children=3), 1, 40_000)
    assert_properly_weighted(result, *law, largest_error=0.05)
    # Without the weight the method is not exact: the plain mean of the chosen ones misses by many standard errors.
    x = np.asarray(result.particles.x, float)[:, 0]
    assert np.max(np.abs(x.mean(0) - law[1]) / (x.std(0) / np.sqrt(len(x)))) > 10


@pytest.mark.slow
def test_first_order_and_flow():
    exact, grid = gaussian(schedules.rectified_flow), times(schedules.rectified_flow)
    law = tilt(*chain_law(exact, grid, 1), SLOPE, 0.0, 1.0)
    fk = svdd(as_flow(exact), reward(), times=grid, num_children=3, order=1)
    assert_properly_weighted(run(3, fk), *law)


@pytest.mark.slow
def test_mode_weights_of_a_tilted_mixture_with_a_flow():
    exact, slope = mixture(schedules.rectified_flow), np.array([-0.6, 0.5, 0.8])
    grid = times(schedules.rectified_flow, 60)
    fk = svdd(as_flow(exact), reward(slope), times=grid, num_children=3)
    assert_is_tilted_mixture(run(4, fk, 400, 16), exact, slope)


def test_more_children_mean_less_noise():
    """Without resampling a choice among children is all the steering that there is."""
    spread = {}
    for num_children in (1, 3):
        fk = svdd(gaussian(), reward(4 * SLOPE), times=times(), num_children=num_children)
        spread[num_children] = np.asarray(run(5, fk, ess_threshold=0.0).log_evidence, float).std()
    assert spread[3] < 0.8 * spread[1], spread  # each is known to 2 %


def _python_reward(samples):
    return samples.astype(float) @ SLOPE


@pytest.mark.slow
def test_python_rewards_give_the_same():
    python, traced = (
        run(6, svdd(gaussian(), r, times=times(), num_children=3))
        for r in (jax_reward(_python_reward), reward())
    )
    # A rounding error may change a choice among equals, in a few runs.
    close = np.isclose(python.log_evidence, traced.log_evidence, atol=1e-4)
    assert close.mean() > 0.98


def test_no_reward_is_the_prior_chain():
    free = run(7, svdd(gaussian(), reward(0 * SLOPE), times=times(), num_children=3))
    np.testing.assert_allclose(free.log_evidence, 0.0, atol=1e-5)
    assert_properly_weighted(free, 0.0, *chain_law(gaussian(), times()))


def test_bad_input():
    options = {"times": times()}
    with pytest.raises(TypeError, match="svdd needs a target with the capability DiffusionModel"):
        svdd(mixture().mixture, reward(), **options)
    with pytest.raises(ValueError, match="reward must return a real scalar"):
        svdd(gaussian(), jnp.sin, **options)
    for num_children in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_children must be a positive integer"):
            svdd(gaussian(), reward(), num_children=num_children, **options)
    with pytest.raises(ValueError, match="order"):
        svdd(gaussian(), reward(), order=0, **options)
