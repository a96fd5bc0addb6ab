"""Particle marginal Metropolis-Hastings against posteriors known by quadrature.

A draw theta from the prior, weighted by the evidence estimate that the kernel's ``init`` makes at it, has exactly the
kernel's invariant law, and keeps it after any number of steps. So the weighted average over independent chains of
f(theta) minus its posterior mean is zero in expectation, without any burning in. z-tests allow 5 standard errors
(false failure 6e-7 a check under normality), and keys are fixed; the same check is seen to fail for broken kernels.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import smcdiff
from benchmarks.evidence import chain_log_evidence
from smcdiff import inverse, schedules
from smcdiff.smc import FeynmanKac
from smcdiff.smc.marginal_mh import MarginalMHState, particle_marginal_mh

Z = 5.0

# x_0 ~ N(1, 4), x_k = .8 x_{k-1} + b + N(0, .3), y_k ~ N(x_k, v). Unknown: b ~ N(0, 1) and log v ~ N(-.5, .49).
SLOPE, Q, M0, P0 = 0.8, 0.3, 1.0, 4.0
OBSERVED = np.array([0.3, 1.9, 2.2, -0.6, 4.0])
PRIOR_MEAN, PRIOR_STD = np.array([0.0, -0.5]), np.array([1.0, 0.7])
STEP = {"offset": 0.8, "log_variance": 1.0}


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)


def log_prior(strength, theta):
    """The log prior, forgotten where ``strength`` is zero."""
    values = jnp.stack([theta["offset"], theta["log_variance"]])
    mean, std = jnp.asarray(PRIOR_MEAN, jnp.float32), jnp.asarray(PRIOR_STD, jnp.float32)
    return strength * jnp.sum(log_normal(values, mean, std**2))


def draw_first(held, rng_key):
    theta, observed = held
    x = M0 + jnp.sqrt(P0) * jax.random.normal(rng_key, ())
    return {"x": x}, log_normal(observed[0], x, jnp.exp(theta["log_variance"]))


def move(held, rng_key, particle, k):
    theta, observed = held
    x = SLOPE * particle["x"] + theta["offset"] + jnp.sqrt(Q) * jax.random.normal(rng_key, ())
    return {"x": x}, log_normal(observed[k + 1], x, jnp.exp(theta["log_variance"]))


def state_space(observed, theta):
    held = (theta, observed)
    return FeynmanKac(Partial(draw_first, held), Partial(move, held), len(OBSERVED) - 1)


MAKE = Partial(state_space, jnp.asarray(OBSERVED, jnp.float32))


def given(offset, log_variance):
    """Log evidence, and mean and variance of the last x given the measurements, at one parameter."""
    size = len(OBSERVED)
    inverse_of_move = np.linalg.inv(np.eye(size) - SLOPE * np.eye(size, k=-1))
    mean = inverse_of_move @ np.append(M0, np.full(size - 1, offset))
    covariance = inverse_of_move @ np.diag(np.append(P0, np.full(size - 1, Q))) @ inverse_of_move.T
    spread = covariance + np.exp(log_variance) * np.eye(size)
    residual = OBSERVED - mean
    solved = np.linalg.solve(spread, residual)
    log_evidence = -0.5 * (residual @ solved + np.linalg.slogdet(2 * np.pi * spread)[1])
    last = covariance[-1]
    return log_evidence, mean[-1] + last @ solved, last[-1] - last @ np.linalg.solve(spread, last)


@functools.cache
def exact():
    """Posterior means of b, log v, their squares and product, and of x_n and its square."""
    grids = [np.linspace(m - 5 * s, m + 5 * s, 81) for m, s in zip(PRIOR_MEAN, PRIOR_STD, strict=True)]
    points = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, 2)
    log_evidence, mean, variance = np.array([given(*point) for point in points]).T
    weights = np.exp(log_evidence - 0.5 * (((points - PRIOR_MEAN) / PRIOR_STD) ** 2).sum(1))
    weights /= weights.sum()
    return weights @ np.column_stack([quadratics(points), mean, mean**2 + variance])


def quadratics(theta):
    return np.column_stack([theta, theta**2, theta[:, 0] * theta[:, 1]])


def features(position, particle):
    theta = np.stack([position["offset"], position["log_variance"]], axis=1).astype(float)
    x = np.asarray(particle["x"], float)
    return np.column_stack([quadratics(theta), x, x**2])


def redrawn_first(algorithm, key, state):
    """Broken on purpose: the current estimate is drawn anew before it is compared with the proposal's."""
    return algorithm.step(key, algorithm.init(state.position, jax.random.fold_in(key, 1)))


def as_it_is(algorithm, key, state):
    return algorithm.step(key, state)


@eqx.filter_jit
def evolve(keys, positions, algorithm, step, num_steps):
    """First state of one chain a position, and all states and infos of its steps."""

    def chain(key, position):
        def body(state, k):
            state, info = step(algorithm, jax.random.fold_in(key, k + 1), state)
            return state, (state, info)

        start = algorithm.init(position, jax.random.fold_in(key, 0))
        return start, *jax.lax.scan(body, start, jnp.arange(num_steps))[1]

    return jax.vmap(chain)(keys, positions)


def weighted_errors(values, log_weights, exact):
    """Errors of weighted averages, in standard errors, and those errors relative to the values' deviation."""
    weights = np.exp(np.asarray(log_weights, float))
    weights /= weights.mean()
    terms = weights[:, None] * (values - exact)
    standard_errors = terms.std(0) / np.sqrt(len(terms))
    deviations = np.sqrt((weights[:, None] * (values - exact) ** 2).mean(0))
    return terms.mean(0) / standard_errors, standard_errors / deviations


@functools.cache
def chains(strength=1.0, step=as_it_is, num_chains=30_000):
    """Eight steps of 3 particles from the prior; see `evolve`."""
    prior = Partial(log_prior, jnp.asarray(strength, jnp.float32))
    algorithm = particle_marginal_mh(prior, MAKE, 3, step_size=STEP)
    theta = PRIOR_MEAN + PRIOR_STD * np.random.default_rng(0).normal(size=(num_chains, 2))
    positions = {"offset": theta[:, 0].astype(np.float32), "log_variance": theta[:, 1].astype(np.float32)}
    return evolve(jax.random.split(jax.random.key(1), num_chains), positions, algorithm, step, 8)


def errors_after(start, states, infos):
    end = jax.tree.map(lambda leaf: leaf[:, -1], states)
    return weighted_errors(features(end.position, end.particle), start.log_evidence, exact())


def test_posterior_of_two_parameters_and_the_last_particle():
    errors, sizes = errors_after(*chains())
    assert np.max(np.abs(errors)) < Z, errors
    assert np.all(sizes < 0.03)  # the test sees errors of a few hundredths of a deviation
    assert 0.1 < np.mean(chains()[2].acceptance_rate) < 0.9


@pytest.mark.slow
def test_a_redrawn_estimate_is_seen():
    """The power of the test above: the most common mistake with noisy evidences."""
    errors, _ = errors_after(*chains(step=redrawn_first))
    assert np.max(np.abs(errors)) > 2 * Z, errors


@pytest.mark.slow
def test_a_forgotten_prior_is_seen():
    errors, _ = errors_after(*chains(strength=0.0))
    assert np.max(np.abs(errors)) > 2 * Z, errors


# The noise level of an inverse problem, under the second-order twisted sampler. The discretised chain of Gaussian data
# is Gaussian, so that its evidence at every noise level is known.
MATRIX, Y = np.array([[1.0, -0.6]]), np.array([1.7])
NOISE_PRIOR = (0.0, 0.5)  # mean and deviation of the log of the noise's deviation


def gaussian():
    covariance = np.array([[1.1, 0.4], [0.4, 0.6]])
    return smcdiff.GaussianDiffusion(np.array([0.6, -0.8]), covariance, schedules.cosine())


def noise_problem(operator, y, log_std):
    return inverse.InverseProblem(operator, y, jnp.exp(log_std))


def sampler_of_noise(model, operator, y, times, log_std):
    return smcdiff.tds(
        model, noise_problem(operator, y, log_std), times=times, twist=smcdiff.guidance.moment_matching()
    )


def noise_log_prior(log_std):
    return log_normal(log_std, NOISE_PRIOR[0], NOISE_PRIOR[1] ** 2)


@pytest.mark.slow
def test_noise_level_of_an_inverse_problem():
    num_chains, num_steps = 4000, 5
    model, times = gaussian(), smcdiff.log_snr_times(schedules.cosine(), 12)
    operator = inverse.dense(jnp.asarray(MATRIX, jnp.float32), (2,))
    y = jnp.asarray(Y, jnp.float32)
    make_fk = Partial(sampler_of_noise, model, operator, y, times)
    algorithm = particle_marginal_mh(noise_log_prior, make_fk, 4, step_size=1.0)

    mean, std = NOISE_PRIOR
    positions = (mean + std * np.random.default_rng(1).normal(size=num_chains)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), num_chains)
    start, states, _ = evolve(keys, positions, algorithm, as_it_is, num_steps)

    grid = np.linspace(mean - 5 * std, mean + 5 * std, 201)
    log_evidence = [
        chain_log_evidence(model, noise_problem(operator, y, jnp.asarray(level, jnp.float32)), times)
        for level in grid
    ]
    law = np.exp(np.array(log_evidence) - 0.5 * ((grid - mean) / std) ** 2)
    law /= law.sum()
    values = np.asarray(states.position[:, -1], float)[:, None] ** np.array([1, 2])
    errors, sizes = weighted_errors(values, start.log_evidence, law @ grid[:, None] ** np.array([1, 2]))
    assert np.max(np.abs(errors)) < Z, errors
    assert np.all(sizes < 0.05)
    prior_errors, _ = weighted_errors(values, start.log_evidence, np.array([mean, mean**2 + std**2]))
    assert np.max(np.abs(prior_errors)) > 2 * Z  # the measurement says something


def test_a_rejected_step_keeps_everything_and_an_accepted_one_takes_the_proposal():
    _, states, infos = jax.tree.map(np.asarray, chains())
    assert isinstance(states, MarginalMHState)
    accepted = infos.is_accepted[:, 1:]

    def check(after, proposal):
        np.testing.assert_array_equal(after[:, 1:], np.where(accepted, proposal[:, 1:], after[:, :-1]))

    jax.tree.map(check, states, infos.proposal)
    target, proposed = (state.log_prior + state.log_evidence for state in (states, infos.proposal))
    probability = np.exp(np.minimum(proposed[:, 1:] - target[:, :-1], 0))
    np.testing.assert_allclose(infos.acceptance_rate[:, 1:], probability, rtol=1e-4, atol=1e-6)
    assert abs(accepted.mean() - probability.mean()) < Z / np.sqrt(accepted.size)


def bounded_log_prior(theta):
    return jnp.where(theta["a"] > 0, -theta["a"], -jnp.inf) - 0.5 * theta["b"] ** 2


def fragile_init(theta, rng_key):
    return jax.random.normal(rng_key, ()), jnp.log(theta["a"])


def fragile_step(rng_key, x, k):
    return x, jnp.zeros(())


def fragile_model(theta):
    """Its evidence is a; its weights are NaN for a < 0."""
    return FeynmanKac(Partial(fragile_init, theta), fragile_step, 1)


def test_proposals_outside_the_support_are_rejected():
    """p(a) Z(a) = a exp(-a) for a > 0: a gamma law of mean 2 and variance 2, from which the chains start."""
    rng, num_chains, scales = np.random.default_rng(2), 20_000, {"a": 2.0, "b": 0.1}
    algorithm = particle_marginal_mh(bounded_log_prior, fragile_model, 2, step_size=scales)
    start = {"a": rng.gamma(2.0, size=num_chains), "b": rng.normal(size=num_chains)}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    trace = smcdiff.run(
        jax.random.key(5), algorithm, 10, position=start, num_chains=num_chains, progress=False
    )
    assert np.all(trace.samples["a"] > 0)
    a = trace.samples["a"][:, -1].astype(float)
    assert abs(a.mean() - 2) < Z * np.sqrt(2 / num_chains)
    # A squared deviation has the variance 20: the kurtosis of this law is 6.
    assert abs(((a - 2) ** 2).mean() - 2) < Z * np.sqrt(20 / num_chains)
    # Every part of a proposal has the deviation asked for: 180 000 of them, known to 0.2 %; 5 sigma = 1 %.
    for name, scale in scales.items():
        moved = trace.info.proposal.position[name][:, 1:] - trace.samples[name][:, :-1]
        np.testing.assert_allclose(moved.std(), scale, rtol=0.01)


@pytest.mark.slow
def test_step_size_may_be_one_number():
    """Proposals of two parts are independent; 2000 deviations are known to 1.6 %; 5 sigma = 8 %."""
    start = {"a": jnp.ones(2000), "b": jnp.full(2000, -0.5)}
    algorithm = particle_marginal_mh(bounded_log_prior, fragile_model, 2, step_size=0.3)
    trace = smcdiff.run(jax.random.key(4), algorithm, 1, position=start, num_chains=2000, progress=False)
    moved = [trace.info.proposal.position[name][:, 0] - np.asarray(start[name]) for name in "ab"]
    np.testing.assert_allclose(np.std(moved, axis=1), 0.3, rtol=0.08)
    assert abs(np.corrcoef(*moved)[0, 1]) < Z / np.sqrt(2000)


_traces = []


def counting_log_prior(strength, theta):
    _traces.append(None)
    return strength * bounded_log_prior(theta)


def test_new_numbers_do_not_trace_again():
    _traces.clear()
    start = {"a": jnp.ones(1), "b": jnp.zeros(1)}
    for shift in (0.0, 0.2, 0.4):
        algorithm = particle_marginal_mh(
            Partial(counting_log_prior, jnp.asarray(1.0 + shift)),
            fragile_model,
            2,
            step_size=0.1 + shift,
        )
        smcdiff.run(jax.random.key(6), algorithm, 2, position=start, progress=False, chunk_size=2)
        if not shift:
            first = len(_traces)
    assert 1 <= first == len(_traces)


def test_bad_input():
    for step_size in (0.0, -1.0, {"a": 1.0, "b": 0.0}, np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="step_size must be positive"):
            particle_marginal_mh(bounded_log_prior, fragile_model, 4, step_size=step_size)
    for count in (0, 2.5, True):
        with pytest.raises(ValueError, match="num_particles must be a positive integer"):
            particle_marginal_mh(bounded_log_prior, fragile_model, count, step_size=1.0)
