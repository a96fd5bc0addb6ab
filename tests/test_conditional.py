"""Particle Gibbs against trajectory laws in closed form.

Every check starts from the exact law, so that nothing has to burn in and chains are independent: a kernel that leaves
the law alone shows no difference after any number of steps. z-tests allow 5 standard errors (false failure 6e-7 a check
under normality), chi-square tests fail by chance with probability 1e-6, and keys are fixed. The same checks are seen to
fail for kernels broken on purpose.
"""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows import quick
from scipy import stats

import smcdiff
from smcdiff import guidance, inverse, schedules
from smcdiff.smc import FeynmanKac, systematic
from smcdiff.smc.conditional import (
    ParticleGibbsState,
    Trajectory,
    conditional_multinomial,
    conditional_systematic,
    particle_gibbs,
)

Z = 5.0
P = 1e-6

KERNELS = {
    "backward": {},
    "backward, multinomial, always": {"resampling_fn": conditional_multinomial, "ess_threshold": 1.0},
    "backward, never resampled": {"ess_threshold": 0.0},
    "traced": {"backward": False},
    "traced, always": {"backward": False, "ess_threshold": 1.0},
    "traced, multinomial": {"backward": False, "resampling_fn": conditional_multinomial},
}

# A linear-Gaussian state space model: x_0 ~ N(1, 4), x_k = .8 x_{k-1} + .5 + N(0, .3), y_k ~ N(x_k, .7). Particles are
# moved by a wider law drawn towards y_k, so that weights depend on both ends of a move.
SLOPE, OFFSET, Q, R, M0, P0 = 0.8, 0.5, 0.3, 0.7, 1.0, 4.0
OBSERVED = np.array([0.3, 1.9, 2.2, -0.6, 4.0])
STEPS = len(OBSERVED) - 1


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)


def mean_of_move(observed, x, k):
    return 0.6 * (SLOPE * x + OFFSET) + 0.4 * observed[k + 1]


def log_potential(observed, x_from, x_to, k):
    log_ratio = log_normal(x_to, SLOPE * x_from + OFFSET, Q) - log_normal(
        x_to, mean_of_move(observed, x_from, k), 2 * Q
    )
    return log_ratio + log_normal(observed[k + 1], x_to, R)


def draw_first(observed, rng_key):
    x = M0 + jnp.sqrt(P0) * jax.random.normal(rng_key, ())
    return {"x": x}, log_normal(observed[0], x, R)


def move(observed, rng_key, particle, k):
    x = mean_of_move(observed, particle["x"], k) + jnp.sqrt(2 * Q) * jax.random.normal(rng_key, ())
    return {"x": x}, log_potential(observed, particle["x"], x, k)


def log_transition(observed, particle_from, particle_to, k):
    x_from, x_to = particle_from["x"], particle_to["x"]
    log_density = log_normal(x_to, mean_of_move(observed, x_from, k), 2 * Q)
    return log_density, log_potential(observed, x_from, x_to, k)


def state_space(observed, log_transition=log_transition):
    observed = jnp.asarray(observed, jnp.float32)
    return FeynmanKac(
        Partial(draw_first, observed), Partial(move, observed), STEPS, Partial(log_transition, observed)
    )


def trajectory(observed, x):
    """The trajectory ``x`` of shape (STEPS + 1,) with its increments."""
    later = log_potential(observed, x[:-1], x[1:], jnp.arange(STEPS))
    return Trajectory({"x": x}, jnp.append(log_normal(observed[0], x[0], R), later))


def prior():
    """Mean and covariance of (x_0, ..., x_n)."""
    size = STEPS + 1
    move_back = np.eye(size) - SLOPE * np.eye(size, k=-1)
    mean = np.linalg.solve(move_back, np.append(M0, np.full(STEPS, OFFSET)))
    inverse_of_move = np.linalg.inv(move_back)
    return mean, inverse_of_move @ np.diag(np.append(P0, np.full(STEPS, Q))) @ inverse_of_move.T


def posterior():
    """The same, given the measurements."""
    mean, covariance = prior()
    precision = np.linalg.inv(covariance)
    smoothed = np.linalg.inv(precision + np.eye(len(mean)) / R)
    return smoothed @ (precision @ mean + OBSERVED / R), smoothed


def draw(rng_key, mean, covariance, num_samples):
    noise = jax.random.normal(rng_key, (num_samples, len(mean)))
    return jnp.asarray(mean, jnp.float32)[None] + noise @ jnp.asarray(
        np.linalg.cholesky(covariance).T, jnp.float32
    )


def moment_errors(x, mean, covariance):
    """Errors of all first and second moments of independent draws (n, d), in standard errors."""
    centred = np.asarray(x, float) - mean
    rows, columns = np.triu_indices(len(mean))
    features = np.concatenate([centred, centred[:, rows] * centred[:, columns]], axis=1)
    exact = np.concatenate([np.zeros(len(mean)), covariance[rows, columns]])
    return (features.mean(0) - exact) / (features.std(0) / np.sqrt(len(features)))


@functools.partial(jax.jit, static_argnames=("num_steps", "num_particles", "kernel", "fk"))
def evolve(keys, x, observed, num_steps, num_particles, kernel, fk=state_space):
    """``num_steps`` steps from trajectories ``x`` (n, times) under measurements (n, times); all positions visited."""

    def chain(key, x, observed):
        algorithm = particle_gibbs(fk(observed), num_particles, **dict(kernel))

        def step(state, k):
            state, info = algorithm.step(jax.random.fold_in(key, k), state)
            return state, (state.position.particles["x"], info)

        start = algorithm.init(trajectory(observed, x), key)
        return jax.lax.scan(step, start, jnp.arange(num_steps))[1]

    return jax.vmap(chain)(keys, x, observed)


def options(name):
    return tuple(KERNELS[name].items())


def stationarity_errors(kernel, num_particles, num_steps=3, num_chains=24_000, fk=state_space):
    """Errors of the moments after some steps from the exact posterior law of the trajectory."""
    mean, covariance = posterior()
    start = draw(jax.random.key(1), mean, covariance, num_chains)
    observed = jnp.broadcast_to(jnp.asarray(OBSERVED, jnp.float32), start.shape)
    keys = jax.random.split(jax.random.key(2), num_chains)
    x, info = evolve(keys, start, observed, num_steps, num_particles, kernel, fk)
    return moment_errors(x[:, -1], mean, covariance), info


FEWEST = [("backward, multinomial, always", 2), ("traced, always", 2)]
# With the others the discrete trajectories below suffice, but for one run of the CI.
FAST = ("backward, multinomial, always",)
SETTINGS = [(name, 4) if name in FAST else pytest.param(name, 4, marks=pytest.mark.slow) for name in KERNELS]


@pytest.mark.parametrize(("name", "num_particles"), SETTINGS + FEWEST)
def test_the_law_of_trajectories_is_left_alone(name, num_particles):
    errors, info = stationarity_errors(options(name), num_particles)
    assert np.max(np.abs(errors)) < Z, errors
    # The standard error of a mean is 1/155 of a deviation; and it did move.
    assert np.mean(info.acceptance_rate) > 0.05 * num_particles


def without_weight(observed, particle_from, particle_to, k):
    log_density, increment = log_transition(observed, particle_from, particle_to, k)
    return log_density, 0.0 * increment


def without_density(observed, particle_from, particle_to, k):
    log_density, increment = log_transition(observed, particle_from, particle_to, k)
    return 0.0 * log_density, increment


def with_wrong_increment(observed, particle_from, particle_to, k):
    """The draw is right, what is stored with the new trajectory is not."""
    log_density, increment = log_transition(observed, particle_from, particle_to, k)
    error = 0.3 * particle_to["x"]
    return log_density - error, increment + error


@pytest.mark.parametrize(
    "wrong", quick([without_weight, without_density, with_wrong_increment], with_wrong_increment)
)
def test_a_wrong_transition_is_seen(wrong):
    """The power of the test above: dropped weights, dropped densities, wrong increments."""
    errors, _ = stationarity_errors((), 4, fk=functools.partial(state_space, log_transition=wrong))
    assert np.max(np.abs(errors)) > 1.5 * Z, errors


@pytest.mark.parametrize("name", quick(["backward", "traced"], "traced"))
def test_joint_law_of_trajectory_and_measurements(name):
    """Geweke: alternate a step on x | y with a draw of y | x; the joint prior of (x, y) stays."""
    num_chains, sweeps = 10_000, 6
    mean, covariance = prior()
    x = draw(jax.random.key(3), mean, covariance, num_chains)
    joint_mean = np.concatenate([mean, mean])
    joint_covariance = np.block([[covariance, covariance], [covariance, covariance + R * np.eye(len(mean))]])

    def measure(key, x):
        return x + jnp.sqrt(R) * jax.random.normal(key, x.shape)

    for sweep in range(sweeps):
        y = measure(jax.random.key(10 + sweep), x)
        keys = jax.random.split(jax.random.key(20 + sweep), num_chains)
        x = evolve(keys, x, y, 1, 4, options(name))[0][:, -1]
    y = measure(jax.random.key(4), x)
    errors = moment_errors(np.concatenate([x, y], axis=1), joint_mean, joint_covariance)
    assert np.max(np.abs(errors)) < Z, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backward, multinomial, always", "traced"])
def test_ranks_of_the_truth_are_uniform(name):
    """Calibration: the truth has a uniform rank in a chain that was started from it at a random place.

    The chain runs from the truth in both directions of time, which is exact where the kernel is reversible, as these
    two are (Gandy and Scott, "Unit testing for MCMC and other Monte Carlo methods", arXiv 2001.06465).
    """
    num_chains, length = 6000, 5
    mean, covariance = prior()
    truth = draw(jax.random.key(5), mean, covariance, num_chains)
    y = truth + jnp.sqrt(R) * jax.random.normal(jax.random.key(6), truth.shape)
    legs = [
        evolve(jax.random.split(jax.random.key(seed), num_chains), truth, y, length, 4, options(name))[0]
        for seed in (7, 8)
    ]
    forward = np.random.default_rng(0).integers(0, length + 1, num_chains)
    is_kept = np.arange(length)[None] < forward[:, None]
    others = np.where(is_kept[..., None], legs[0], np.asarray(legs[1])[:, ::-1])

    def rank(statistic):
        """Rank of the truth among ``length`` others; ties, where nothing was renewed, are broken at random."""
        own, rest = statistic(np.asarray(truth)[:, None]), statistic(others)
        ties = np.random.default_rng(1).integers(0, (rest == own).sum(1) + 1)
        return (rest < own).sum(1) + ties

    fit = [lambda x: -((x - np.asarray(y)[:, None]) ** 2).sum(-1)]
    for statistic in fit + [lambda x, k=k: x[..., k] for k in (0, 2, STEPS)]:
        counts = np.bincount(rank(statistic), minlength=length + 1)
        assert stats.chisquare(counts).pvalue > P, counts


# A hidden Markov chain on three states whose 243 trajectories can be listed: integer particles.
START = np.array([0.6, 0.3, 0.1])
MOVE = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.25, 0.05, 0.7]])
EMIT = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
SYMBOLS = np.array([0, 1, 1, 0, 1])


def chain_init(tables, rng_key):
    start, _, emit, symbols = tables
    state = jax.random.categorical(rng_key, jnp.log(start)).astype(jnp.int32)
    return state, jnp.log(emit[state, symbols[0]])


def chain_step(tables, rng_key, state, k):
    _, move, emit, symbols = tables
    state = jax.random.categorical(rng_key, jnp.log(move[state])).astype(jnp.int32)
    return state, jnp.log(emit[state, symbols[k + 1]])


def chain_transition(tables, state_from, state_to, k):
    _, move, emit, symbols = tables
    return jnp.log(move[state_from, state_to]), jnp.log(emit[state_to, symbols[k + 1]])


@pytest.mark.parametrize(
    "name", quick(KERNELS, "backward", "traced", "backward, never resampled", "traced, always")
)
def test_the_whole_law_of_a_discrete_trajectory(name):
    tables = tuple(jnp.asarray(a, jnp.float32) for a in (START, MOVE, EMIT)) + (jnp.asarray(SYMBOLS),)
    fk = FeynmanKac(
        Partial(chain_init, tables), Partial(chain_step, tables), STEPS, Partial(chain_transition, tables)
    )
    paths = np.array(list(itertools.product(range(3), repeat=STEPS + 1)), np.int32)
    emitted = np.log(EMIT[paths, SYMBOLS])
    moves = np.log(MOVE[paths[:, :-1], paths[:, 1:]]).sum(1)
    law = np.exp(np.log(START[paths[:, 0]]) + moves + emitted.sum(1))
    law /= law.sum()

    num_chains = 15_000
    start = np.random.default_rng(2).choice(len(paths), num_chains, p=law)
    position = Trajectory(paths[start], emitted[start].astype(np.float32))
    trace = smcdiff.run(
        jax.random.key(9),
        particle_gibbs(fk, 4, **KERNELS[name]),
        3,
        position=position,
        num_chains=num_chains,
        thin=3,
        progress=False,
    )
    final = trace.samples.particles[:, -1]
    counts = np.bincount(final @ 3 ** np.arange(STEPS, -1, -1), minlength=len(paths))
    common = law * num_chains >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(law[common], law[~common].sum()) * num_chains
    assert common.sum() > 100
    assert stats.chisquare(observed, expected).pvalue > P
    np.testing.assert_allclose(trace.samples.log_increments[:, -1], np.log(EMIT[final, SYMBOLS]), rtol=1e-5)


def test_increments_are_those_of_the_new_trajectory():
    """What is stored is what the model would say of the chosen pairs, whoever their ancestors were."""
    observed = jnp.asarray(OBSERVED, jnp.float32)
    algorithm = particle_gibbs(state_space(OBSERVED), 8)
    trace = smcdiff.run(jax.random.key(10), algorithm, 20, num_chains=20, progress=False)
    paths, increments = trace.samples.particles["x"].reshape(400, -1), trace.samples.log_increments
    expected = jax.vmap(trajectory, (None, 0))(observed, paths).log_increments
    np.testing.assert_allclose(increments.reshape(400, -1), expected, rtol=1e-4, atol=1e-4)
    # A particle is reported as renewed exactly where it is another one (continuous, so never equal by chance).
    x = trace.samples.particles["x"]
    np.testing.assert_array_equal(trace.info.renewed[:, 1:], x[:, 1:] != x[:, :-1])
    np.testing.assert_allclose(trace.info.acceptance_rate, trace.info.renewed.mean(-1), rtol=1e-6)


def walk_init(rng_key):
    return jax.random.normal(rng_key, ()), jnp.zeros(())


def walk_step(rng_key, x, k):
    x = 0.9 * x + 0.4 * jax.random.normal(rng_key, ())
    return x, -2.0 * (x - 0.5) ** 2


def walk_transition(x_from, x_to, k):
    return log_normal(x_to, 0.9 * x_from, 0.16), -2.0 * (x_to - 0.5) ** 2


def test_backward_draws_renew_what_traced_ancestors_cannot():
    fk = FeynmanKac(walk_init, walk_step, 50, walk_transition)
    renewed = {}
    for backward in (False, True):
        algorithm = particle_gibbs(fk, 5, backward=backward)
        trace = smcdiff.run(jax.random.key(11), algorithm, 20, num_chains=30, progress=False)
        renewed[backward] = trace.info.renewed.mean((0, 1))
    assert renewed[False][0] < 0.1 and renewed[True][0] > 0.5, renewed
    assert np.all(renewed[True] > 0.5)


RESAMPLED = np.array([0.35, 0.05, 0.42, 0.18], np.float32)


def test_conditional_systematic_is_systematic_given_the_survivor():
    """Systematic resampling, slots counted from a random one, kept where slot 0 holds particle 0."""
    num_draws = 30_000
    keys = jax.random.split(jax.random.key(12), num_draws)
    drawn = np.asarray(jax.jit(jax.vmap(conditional_systematic, (0, None)))(keys, RESAMPLED))
    sorted_draws = np.asarray(
        jax.jit(jax.vmap(lambda key, w: systematic(key, w, 4), (0, None)))(keys, RESAMPLED)
    )
    shifts = np.random.default_rng(3).integers(0, 4, num_draws)
    shifted = np.take_along_axis(sorted_draws, (shifts[:, None] + np.arange(4)) % 4, axis=1)
    kept = shifted[shifted[:, 0] == 0]
    assert abs(len(kept) / num_draws - 0.35) < 0.01  # the survivor's own weight
    assert np.all(drawn[:, 0] == 0)
    codes = [np.bincount(a @ 4 ** np.arange(4), minlength=256) for a in (drawn, kept)]
    table = np.array(codes)[:, np.add(*codes) > 0]
    assert table.shape[1] >= 4
    assert stats.chi2_contingency(table).pvalue > P, table


def test_conditional_multinomial_draws_the_others_independently():
    keys = jax.random.split(jax.random.key(13), 60_000)
    drawn = np.asarray(jax.jit(jax.vmap(conditional_multinomial, (0, None)))(keys, RESAMPLED))
    assert np.all(drawn[:, 0] == 0)
    counts = np.bincount(drawn[:, 1:] @ 4 ** np.arange(3), minlength=64)
    exact = np.einsum("i,j,k->kji", RESAMPLED, RESAMPLED, RESAMPLED).ravel().astype(float)
    assert stats.chisquare(counts, exact / exact.sum() * counts.sum()).pvalue > P


@pytest.mark.parametrize("resampling_fn", [conditional_multinomial, conditional_systematic])
def test_dead_particles_are_drawn_by_none_but_the_pinned_one(resampling_fn):
    weights = jnp.array([0.0, 0.5, 0.0, 0.5])
    keys = jax.random.split(jax.random.key(14), 1000)
    drawn = np.asarray(jax.jit(jax.vmap(resampling_fn, (0, None)))(keys, weights))
    assert np.all(drawn[:, 0] == 0) and np.all(np.isin(drawn[:, 1:], [1, 3]))


# The twisted sampler on a mixture in one dimension, whose discretised posterior can be integrated on a grid.
TIMES = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], np.float32)


@functools.cache
def mixture():
    return smcdiff.GaussianMixtureDiffusion.create([0.7, 0.3], [[-1.0], [1.6]], 0.2, schedules.cosine())


@functools.cache
def problem():
    return inverse.InverseProblem(inverse.identity((1,)), jnp.array([0.4]), 0.9)


def log_psi(problem, denoised, t):
    """Some twist, made of cheap operations only."""
    spread = problem.noise.std**2 + jnp.sin(0.5 * jnp.pi * t) ** 2
    return jnp.sum(log_normal(problem.y, denoised, spread))


def twisted(order):
    return smcdiff.tds(
        mixture(), problem(), times=jnp.asarray(TIMES), twist=guidance.log_twist(log_psi), order=order
    )


def chain_posterior(order):
    """Mean, second moment and upper mode's weight of x_0 under the discretised chain, by quadrature."""
    schedule, grid = schedules.cosine(), np.linspace(-5.5, 5.5, 221)
    spacing = grid[1] - grid[0]
    points = jnp.asarray(grid, jnp.float32)

    def denoised(t):
        return np.asarray(jax.vmap(lambda x: mixture().denoise(x[None], t)[0])(points), float)

    def normal(x, mean, std):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / np.sqrt(2 * np.pi) / std

    # joint[i, j]: density of x at this time, and of x one time before.
    joint = normal(grid, 0.0, float(schedule.sigma(TIMES[0])))[:, None] * np.full((1, len(grid)), 1 / 11.0)
    previous = np.zeros_like(grid)
    for k in range(len(TIMES) - 2):
        now = denoised(TIMES[k])
        share = 0.0
        if order == 2 and k > 0:
            snr = [float(schedule.log_snr(time)) for time in TIMES[k - 1 : k + 2]]
            share = 0.5 * (snr[2] - snr[1]) / (snr[1] - snr[0])
        x0 = now[:, None] + share * (now[:, None] - previous[None])
        (alpha_t, alpha_s), (sigma_t, sigma_s) = (
            np.asarray(f(TIMES[k : k + 2]), float) for f in (schedule.alpha, schedule.sigma)
        )
        variance = (sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        mean = alpha_s * x0 + np.sqrt(sigma_s**2 - variance) * (grid[:, None] - alpha_t * x0) / sigma_t
        joint = np.stack([(normal(x, mean, np.sqrt(variance)) * joint).sum(1) for x in grid]) * spacing
        previous = now
    samples = denoised(TIMES[-2])
    weights = joint.sum(1) * normal(float(problem().y[0]), samples, float(problem().noise.std))
    weights /= weights.sum()
    return np.array([weights @ samples, weights @ samples**2, weights @ (samples > 0.3)])


@pytest.mark.parametrize(("order", "backward"), [(2, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_posterior_of_a_mixture_under_the_twisted_sampler(order, backward):
    """One particle moved along is a bad start; 20 steps of 4 particles forget it."""
    trace = smcdiff.run(
        jax.random.key(15),
        particle_gibbs(twisted(order), 4, backward=backward),
        20,
        num_chains=3000,
        transform=last_sample,
        thin=20,
        progress=False,
    )
    x = trace.samples[:, -1, 0].astype(float)
    features = np.stack([x, x**2, x > 0.3], axis=1)
    standard_error = features.std(0) / np.sqrt(len(x))
    assert np.all(standard_error < [0.03, 0.05, 0.01])
    errors = (features.mean(0) - chain_posterior(order)) / standard_error
    assert np.max(np.abs(errors)) < Z, errors


def last_sample(state, info):
    return state.position.particles.x[-1]


def test_transition_of_the_twisted_sampler():
    """Its increment is the one that the step reported; its density is that of the guided Gaussian."""
    fk, schedule = twisted(1), schedules.cosine()

    def follow(key):
        def step(particle, k):
            moved, increment = fk.step(jax.random.fold_in(key, k), particle, k)
            return moved, (particle, moved, increment, *fk.log_transition(particle, moved, k))

        return jax.lax.scan(step, fk.init(key)[0], jnp.arange(fk.num_steps))[1]

    before, after, increment, log_density, log_potential = jax.tree.map(
        np.asarray, jax.jit(jax.vmap(follow))(jax.random.split(jax.random.key(16), 50))
    )
    np.testing.assert_allclose(log_potential, increment, rtol=1e-4, atol=1e-4)
    assert np.all(np.isneginf(log_density[:, -1]))  # the last move has no noise
    for k in range(fk.num_steps - 1):
        t, s = TIMES[k], TIMES[k + 1]
        x, value = before.x[:, k, 0], jax.tree.map(lambda leaf, k=k: leaf[:, k], before.value)
        mean, std = smcdiff.reverse_transition(schedule, x, (value.denoised + value.shift)[:, 0], t, s)
        expected = stats.norm.logpdf(after.x[:, k, 0], mean, std)
        np.testing.assert_allclose(log_density[:, k], expected, rtol=1e-4, atol=1e-4)
        # M G is the prior's move times a ratio of twists.
        mean, _ = smcdiff.reverse_transition(schedule, x, value.denoised[:, 0], t, s)
        expected = stats.norm.logpdf(after.x[:, k, 0], mean, std)
        expected += after.value.log_twist[:, k] - value.log_twist
        np.testing.assert_allclose(log_density[:, k] + increment[:, k], expected, rtol=1e-4, atol=2e-4)


def poisoned_step(rng_key, x, k):
    """A third of the particles gets an invalid weight at move 1."""
    value = jax.random.normal(rng_key, ())
    return value, jnp.where((k == 1) & (value > 0.43), jnp.nan, 0.0)


def test_invalid_weights_count_as_zero():
    algorithm = particle_gibbs(FeynmanKac(walk_init, poisoned_step, 3), 6, backward=False)
    trace = smcdiff.run(jax.random.key(17), algorithm, 20, num_chains=20, progress=False)
    assert trace.info.num_invalid.sum() > 400
    assert np.all(trace.samples.particles[:, :, 2] < 0.43)
    assert np.all(np.isfinite(trace.samples.log_increments))


@pytest.mark.slow
def test_batch_size_changes_no_number():
    results = [
        smcdiff.run(
            jax.random.key(18), particle_gibbs(state_space(OBSERVED), 8, batch_size=size), 5, progress=False
        )
        for size in (None, 3)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


_traces = []


def counting_transition(observed, particle_from, particle_to, k):
    _traces.append(None)
    return log_transition(observed, particle_from, particle_to, k)


def test_a_new_model_of_the_same_shape_does_not_trace_again():
    _traces.clear()
    for shift in (0.0, 0.5, 1.0):
        algorithm = particle_gibbs(state_space(OBSERVED + shift, counting_transition), 4, ess_threshold=shift)
        smcdiff.run(jax.random.key(19), algorithm, 2, progress=False, chunk_size=2)
        if not shift:
            first = len(_traces)
    assert 1 <= first == len(_traces)


def test_a_threshold_for_each_step_is_a_schedule():
    schedule = np.array([0.0, 1.0, 1.0, 0.0], np.float32)
    algorithm = particle_gibbs(state_space(OBSERVED), 4, ess_threshold=schedule)
    start = jax.jit(lambda algorithm: algorithm.init(None, jax.random.key(22)))(algorithm)
    _, info = jax.jit(lambda algorithm, state: algorithm.step(jax.random.key(23), state))(algorithm, start)
    np.testing.assert_array_equal(info.resampled, schedule == 1.0)


def test_a_trajectory_goes_in_and_comes_out():
    algorithm = particle_gibbs(state_space(OBSERVED), 4)
    drawn = algorithm.init(None, jax.random.key(20))
    expected = trajectory(jnp.asarray(OBSERVED, jnp.float32), drawn.position.particles["x"])
    np.testing.assert_allclose(drawn.position.log_increments, expected.log_increments, rtol=1e-4)
    again = algorithm.init(drawn.position, jax.random.key(21))
    assert isinstance(again, ParticleGibbsState) and eqx.tree_equal(again, drawn)


def test_bad_input():
    fk = state_space(OBSERVED)
    for count in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="num_particles must be an integer of at least 2"):
            particle_gibbs(fk, count)
    with pytest.raises(ValueError, match="ess_threshold"):
        particle_gibbs(fk, 4, ess_threshold=1.5)
    with pytest.raises(TypeError, match="backward=True needs a FeynmanKac with log_transition"):
        particle_gibbs(twisted(2), 4)
    algorithm = particle_gibbs(fk, 4)
    with pytest.raises(TypeError, match="starts from a Trajectory"):
        algorithm.init(jnp.zeros(STEPS + 1), jax.random.key(0))
    with pytest.raises(ValueError, match="leading axis num_steps \\+ 1 = 5"):
        algorithm.init(Trajectory({"x": jnp.zeros(STEPS)}, jnp.zeros(STEPS)), jax.random.key(0))
