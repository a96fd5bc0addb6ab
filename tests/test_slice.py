"""Slice samplers: exact laws, exact counts, caps.

Statistical checks allow 5 standard errors, estimated from independent chains: a false failure has a probability of
6e-7 a check, below 3e-4 for all of this module together. Keys are fixed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from jax.tree_util import Partial
from mcmc_targets import features, targets

import smcdiff
from smcdiff.mcmc.affine_pool import affine_map
from smcdiff.mcmc.geodesic_slice import geodesic_slice, great_circle
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.mcmc.polar_slice import polar_slice, radial_polar_slice, to_polar
from smcdiff.mcmc.slice_1d import SliceState, draw_numbers, shrink, step_out

# Many programs are compiled here; tests/test_kernels.py has the kernels in the quick tests.
pytestmark = pytest.mark.slow

Z = 5.0
SIZE = 3000


@functools.partial(jax.jit, static_argnames="num_steps")
def evolve(rng_key, algorithm, position, num_steps):
    """Last states of many chains, and the positions and infos of all steps, (chains, steps)."""

    def chain(key, position):
        def step(state, k):
            state, info = algorithm.step(jax.random.fold_in(key, k), state)
            return state, (state.position, info)

        return jax.lax.scan(step, algorithm.init(position, key), jnp.arange(num_steps))

    state, (path, info) = jax.vmap(chain)(jax.random.split(rng_key, len(position)), position)
    return state, path, info


def z_scores(values, expected=0.0):
    """Mean in standard errors, column by column."""
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    return (values.mean(0) - expected) / (error + 1e-12)


# Exact laws ----------------------------------------------------------------------------------------------------------


def _polar(target, d, **caps):
    return polar_slice(target, 4.0, **caps)


def _centred(target, d, **caps):
    covariance = 0.5 * np.eye(d) + 0.4 * np.outer(np.arange(d) / d, np.ones(d)) @ np.ones((d, d)) / d
    return polar_slice(
        target, 3.0, center=np.full(d, 0.3), covariance=0.5 * (covariance + covariance.T), **caps
    )


def _hit_and_run(target, d, **caps):
    return hit_and_run_slice(target, 2.0, covariance=0.5 + np.arange(d) / d, **caps)


BUILDERS = {"polar": _polar, "polar, affine": _centred, "hit and run": _hit_and_run}
TIGHT = {"max_expansions": 1, "max_shrinkage": 2}


def _log_student_mixture(constants, means, inverses, freedoms, x):
    """The density of tests/mcmc_targets.py, with constants that need no compiling."""
    squares = jnp.sum(jnp.einsum("kij,kj->ki", inverses, x[None] - means) ** 2, axis=-1)
    return jax.nn.logsumexp(constants - 0.5 * (freedoms + x.size) * jnp.log1p(squares / freedoms))


def heavy_tailed(d):
    """A mixture of Student laws of 3 to 9 degrees of freedom: the sampler, and the log density."""
    target = targets(d)["heavy tailed"]
    logits, means, inverses, freedoms = target.leaves()
    freedom = np.asarray(freedoms, float)
    constants = scipy.special.gammaln(0.5 * (freedom + d)) - scipy.special.gammaln(0.5 * freedom)
    constants = np.asarray(logits, float) + constants - 0.5 * d * np.log(freedom)
    density = Partial(_log_student_mixture, jnp.asarray(constants, jnp.float32), means, inverses, freedoms)
    x = target.sample(0, 5)
    expected = jax.vmap(target.density().logdensity)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(jax.vmap(density)(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4)
    return target, density


@pytest.mark.parametrize(
    ("name", "d", "caps"),
    [
        ("polar", 5, {}),
        ("polar, affine", 2, {}),
        ("polar, affine", 5, TIGHT),
        ("hit and run", 2, TIGHT),
    ],
)
def test_heavy_tails_are_left_alone(name, d, caps):
    target, density = heavy_tailed(d)
    start = target.sample(1, SIZE)
    algorithm = BUILDERS[name](density, d, **caps)
    x = jnp.asarray(start, jnp.float32)
    state, path, info = evolve(jax.random.key(0), algorithm, x, 5)
    change = features(target, np.asarray(state.position)) - features(target, start)
    z = z_scores(change)
    assert np.all(np.abs(z) < Z), z
    assert np.mean(change.std(0)) > 0.3  # it does move
    np.testing.assert_allclose(state.logdensity, jax.vmap(density)(state.position), rtol=1e-4, atol=1e-4)

    # Caps are reported, and a step that found nothing changes not a bit.
    assert (np.mean(~info.is_accepted) > 0.04) == bool(caps)
    assert (np.mean(~info.is_bracketed) > 0.04) == bool(caps)
    np.testing.assert_array_equal(info.acceptance_rate, info.is_accepted)
    stays = np.all(np.diff(np.concatenate([x[:, None], path], axis=1), axis=1) == 0, axis=-1)
    assert stays.any() == bool(caps) and not np.any(stays & info.is_accepted)
    if name == "hit and run":
        np.testing.assert_array_equal(stays, ~info.is_accepted)

    # Anywhere from the mean to the far tail, and without a number: every loop ends, and the others go on.
    norms = np.resize([0.0, 1e-30, 1e-10, 1.0, 1e3, 1e8, 1e15, np.nan], (SIZE, 1))
    center = 0.3 if name == "polar, affine" else 0.0
    far = jnp.asarray(center + norms * np.random.default_rng(2).normal(size=(SIZE, d)), jnp.float32)
    state, _, info = evolve(jax.random.key(3), algorithm, far, 5)
    is_number = np.isfinite(norms[:, 0])
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(np.isfinite(leaf).reshape(SIZE, -1).all(axis=1), is_number)
    assert np.all(info.num_evaluations <= 302) and not np.any(info.is_accepted[~is_number])
    at_centre = np.asarray(state.position)[norms[:, 0] == 0]
    assert np.mean(np.linalg.norm(at_centre - center, axis=1) > 0.1) > (0.5 if caps else 0.95)


def numpy_polar_slice(rng, logdensity, x, width):
    """One step as the paper writes it, without caps; the new point, and the evaluations but that at ``x``."""
    calls = []

    def height(radius, direction):
        calls.append(1)
        with np.errstate(divide="ignore"):
            return (len(x) - 1) * np.log(radius) + logdensity(radius * direction)

    radius = np.linalg.norm(x)
    direction = x / radius
    level = height(radius, direction) + np.log(rng.uniform())
    calls.clear()
    tangent = rng.normal(size=len(x))
    tangent -= tangent @ direction * direction
    tangent /= np.linalg.norm(tangent)
    angle = rng.uniform(0, 2 * np.pi)
    low, high = angle - 2 * np.pi, angle
    while True:
        new = direction * np.cos(angle) + tangent * np.sin(angle)
        new /= np.linalg.norm(new)
        if height(radius, new) > level:
            break
        low, high = (angle, high) if angle < 0 else (low, angle)
        angle = rng.uniform(low, high)
    low = radius - rng.uniform() * width
    high = low + width
    low = max(low, 0.0)
    while low > 0 and height(low, new) > level:
        low = max(low - width, 0.0)
    while height(high, new) > level:
        high += width
    while True:
        proposal = rng.uniform(low, high)
        if height(proposal, new) > level:
            return proposal * new, len(calls)
        low, high = (proposal, high) if proposal < radius else (low, proposal)


def test_one_step_has_the_law_of_the_papers():
    """From one point: positions and numbers of evaluations against a plain loop in double precision."""
    x = np.array([1.5, -0.4, 0.8])

    def logdensity(x):
        return -2.5 * np.log1p(np.sum((x - np.array([0.5, 0.3, -0.2])) ** 2))

    def in_jax(x):
        return -2.5 * jnp.log1p(jnp.sum((x - jnp.array([0.5, 0.3, -0.2])) ** 2))

    rng = np.random.default_rng(0)
    plain = [numpy_polar_slice(rng, logdensity, x, 3.0) for _ in range(4000)]
    size = 60_000
    start = jnp.tile(jnp.asarray(x, jnp.float32), (size, 1))
    state, _, info = evolve(jax.random.key(1), polar_slice(in_jax, 3.0), start, 1)

    def statistics(x, count):
        radius = np.linalg.norm(x, axis=1, keepdims=True)
        shape = [np.tanh(x), np.tanh(x) ** 2, np.log(radius), radius < 1.0, radius > 4.0, x / radius]
        return np.concatenate([*shape, np.minimum(count[:, None], 20), count[:, None] == 3], axis=1).astype(
            float
        )

    ours = statistics(np.asarray(state.position, float), np.asarray(info.num_evaluations)[:, 0])
    theirs = statistics(np.stack([x for x, _ in plain]), np.array([count for _, count in plain]))
    error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
    z = (ours.mean(0) - theirs.mean(0)) / error
    assert np.all(np.abs(z) < Z), z


def _log_student(freedom, d, r):
    return -0.5 * (freedom + d) * jnp.log1p(r**2 / freedom)


def _log_gaussian(_, d, r):
    return -0.5 * r**2


RADIAL = {"gaussian": _log_gaussian, "student": _log_student}


@pytest.mark.parametrize(("name", "d"), [("gaussian", 7), ("student", 2)])
def test_radial_steps_draw_from_their_slice(name, d):
    """One step from one point: P(r' <= q) is an average over levels of lengths of intervals."""
    freedom, center = 4.0, np.linspace(-1.0, 2.0, d)
    covariance = np.diag(np.linspace(0.5, 2.0, d)) + 0.3
    algorithm = radial_polar_slice(
        Partial(RADIAL[name], jnp.float32(freedom), float(d)), center=center, covariance=covariance
    )
    y = np.full(d, 1.3 / np.sqrt(d))
    x = center + np.linalg.cholesky(covariance) @ y
    size = 20_000
    state, _, info = evolve(jax.random.key(2), algorithm, jnp.tile(jnp.asarray(x, jnp.float32), (size, 1)), 1)
    new = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(state.position, float) - center).T).T
    radius = np.linalg.norm(new, axis=1)

    def height(r):
        return (d - 1) * np.log(r) + float(RADIAL[name](freedom, float(d), r))

    mode = np.sqrt(d - 1) if name == "gaussian" else np.sqrt((d - 1) * freedom / (freedom + 1))
    levels = height(1.3) + np.log((np.arange(200) + 0.5) / 200)

    def ends(level):
        return [
            scipy.optimize.brentq(lambda u: height(np.exp(u)) - level, *bracket)
            for bracket in ((-60.0, np.log(mode)), (np.log(mode), 60.0))
        ]

    low, high = np.exp([ends(level) for level in levels]).T
    for q in (0.5, 1.0, 1.5, 2.5, 4.0):
        expected = np.mean(np.clip((q - low) / (high - low), 0, 1))
        found = np.mean(radius <= q)
        assert abs(found - expected) < Z * np.sqrt(expected * (1 - expected) / size) + 2e-4, q
    directions = new / radius[:, None]
    assert np.all(np.abs(z_scores(directions)) < Z) and np.all(np.abs(z_scores(directions**2, 1 / d)) < Z)
    # Nothing of the old direction is left, nor does the radius know the new one.
    assert np.all(np.abs(z_scores(directions * (radius[:, None] > 1.5))) < Z)
    assert np.all(info.is_bracketed) and np.all(info.is_accepted)
    assert np.isfinite(state.logdensity).all()


def test_radial_slices_that_have_no_end_are_reported():
    """A density that falls like 1/r^d has no integral, and slices that reach to the largest number."""
    algorithm = radial_polar_slice(lambda r: -2.0 * jnp.log(r + 1.0))
    state, info = jax.jit(algorithm.step)(jax.random.key(3), SliceState(jnp.ones(3), jnp.zeros(())))
    assert not info.is_bracketed and np.all(np.isfinite(state.position))


CENTRES = np.array([[0.6, -0.48, 0.64], [-0.8, 0.0, 0.6], [0.0, 1.0, 0.0]])
CONCENTRATIONS = np.array([12.0, 3.0, 5.0])
MIXTURE = np.array([0.5, 0.2, 0.3])


def _von_mises_fisher(weights, centres, concentrations, x):
    logits = jnp.log(weights * concentrations / (1 - jnp.exp(-2 * concentrations)))
    return jax.nn.logsumexp(logits + concentrations * (centres @ x - 1.0))


def draw_von_mises_fisher(rng, size):
    """Exact draws in three dimensions: the cosine to the centre has a closed inverse distribution function."""
    which = rng.choice(3, size=size, p=MIXTURE)
    kappa = CONCENTRATIONS[which]
    u = rng.uniform(size=size)
    cosine = 1 + np.log(u + (1 - u) * np.exp(-2 * kappa)) / kappa
    centre = CENTRES[which]
    tangent = rng.normal(size=(size, 3))
    tangent -= np.sum(tangent * centre, axis=1, keepdims=True) * centre
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return cosine[:, None] * centre + np.sqrt(1 - cosine**2)[:, None] * tangent


def spherical_moments(x):
    """First and second moments."""
    pairs = [x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)]
    return np.concatenate([x, np.stack(pairs, axis=1)], axis=1)


def exact_spherical_moments():
    mean, second = np.zeros(3), np.zeros((3, 3))
    for weight, centre, kappa in zip(MIXTURE, CENTRES, CONCENTRATIONS, strict=True):
        ratio = 1 / np.tanh(kappa) - 1 / kappa
        mean += weight * ratio * centre
        second += weight * (ratio / kappa * np.eye(3) + (1 - 3 * ratio / kappa) * np.outer(centre, centre))
    return np.array([*mean, *[second[i, j] for i in range(3) for j in range(i, 3)]])


def _spherical_target():
    parameters = (MIXTURE, CENTRES, CONCENTRATIONS)
    return Partial(_von_mises_fisher, *[jnp.asarray(value, jnp.float32) for value in parameters])


def test_a_law_on_the_sphere_is_left_alone_by_capped_steps():
    start = draw_von_mises_fisher(np.random.default_rng(3), 20_000)
    assert np.all(np.abs(z_scores(spherical_moments(start), exact_spherical_moments())) < Z)
    algorithm = geodesic_slice(_spherical_target(), max_shrinkage=2)
    x = jnp.asarray(start, jnp.float32)
    state, path, info = evolve(jax.random.key(4), algorithm, x, 5)
    end = spherical_moments(np.asarray(state.position, float))
    assert np.all(np.abs(z_scores(end, exact_spherical_moments())) < Z)
    assert np.all(np.abs(z_scores(end - spherical_moments(start))) < Z)
    assert 0.1 < np.mean(~info.is_accepted) < 0.9
    stays = np.all(np.diff(path, axis=1) == 0, axis=-1)
    np.testing.assert_array_equal(stays, ~info.is_accepted[:, 1:])


def test_long_chains_stay_on_the_sphere():
    """10 000 steps: rounding does not add up."""
    start = draw_von_mises_fisher(np.random.default_rng(5), 4)
    algorithm = geodesic_slice(_spherical_target())
    _, path, info = evolve(jax.random.key(5), algorithm, jnp.asarray(start, jnp.float32), 10_000)
    assert np.abs(np.linalg.norm(np.asarray(path, float), axis=-1) - 1.0).max() < 3e-7
    assert np.all(info.is_accepted)


def test_one_dimension_is_for_hit_and_run():
    start = np.random.default_rng(6).gamma(2.0, size=(8000, 1))
    algorithm = hit_and_run_slice(_log_gamma, 1.5)
    state, _, _ = evolve(jax.random.key(6), algorithm, jnp.asarray(start, jnp.float32), 5)
    end = np.asarray(state.position, float)
    assert np.all(end > 0)
    assert np.all(np.abs(z_scores(np.concatenate([end - 2.0, (end - 2.0) ** 2 - 2.0], axis=1))) < Z)
    # From outside the support every point inside is in the slice, and no point outside.
    state, _, _ = evolve(jax.random.key(7), algorithm, jnp.full((8000, 1), -0.5), 5)
    assert np.mean(np.asarray(state.position) > 0) > 0.9


def _log_gamma(x):
    return jnp.where(x[0] > 0, jnp.log(jnp.where(x[0] > 0, x[0], 1.0)) - x[0], -jnp.inf)


# Loops ---------------------------------------------------------------------------------------------------------------


def _flat(_):
    return jnp.zeros(()), jnp.zeros(())


def test_numbers_of_one_call_are_uniform_and_normal(monkeypatch):
    x = jnp.zeros(200_000)
    uniform, normal = draw_numbers(jax.random.key(20), 300_000, x)
    assert (uniform.shape, normal.shape) == ((300_000,), x.shape)
    # A false failure has the probability 1e-6 each.
    assert scipy.stats.kstest(np.asarray(uniform, float), "uniform").pvalue > 1e-6
    assert scipy.stats.kstest(np.asarray(normal, float), "norm").pvalue > 1e-6
    assert abs(np.corrcoef(uniform[:200_000], normal)[0, 1]) < Z / math.sqrt(200_000)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.zeros(shape, dtype))
    assert np.all(np.isfinite(draw_numbers(jax.random.key(0), 3, x)[1]))  # 0, one number in 8 million


def test_great_circles_keep_their_norm_where_their_direction_is_almost_parallel():
    x, across = jnp.asarray([0.6, 0.8, 0.0]), jnp.asarray([0.8, -0.6, 0.0])
    circle = great_circle(x, 3.0 * x + 1e-3 * across)
    points = jax.vmap(circle)(jnp.linspace(-3.0, 3.0, 50))
    np.testing.assert_allclose(jnp.linalg.norm(points, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(circle(jnp.asarray(np.pi / 2)), across, atol=2e-3)


def test_stepping_out_is_capped_and_says_so():
    """On a curve without an end: all moves are made, and shared out evenly."""
    max_expansions = 3
    u = jax.random.uniform(jax.random.key(7), (2, 4000))
    bracket = jax.vmap(
        lambda place, share: step_out(
            place, share, _flat, jnp.asarray(-1.0), 2.0, max_expansions=max_expansions
        )
    )(*u)
    np.testing.assert_allclose(bracket.right - bracket.left, 2.0 * (max_expansions + 1), rtol=1e-6)
    assert not np.any(bracket.is_bracketed) and np.all(bracket.num_expansions == max_expansions)
    assert np.all(bracket.num_evaluations == max_expansions + 2)
    # The current point is uniform in the bracket: what makes a capped interval exact.
    place = np.asarray(-bracket.left / (bracket.right - bracket.left))
    assert abs(place.mean() - 0.5) < Z * np.sqrt(1 / 12 / 4000)
    assert abs(np.mean(place**2) - 1 / 3) < Z * np.sqrt(4 / 45 / 4000)


def test_the_lower_end_is_clipped_without_an_evaluation():
    bracket = step_out(
        jnp.asarray(0.5), jnp.asarray(0.9), _flat, jnp.asarray(-1.0), 2.0, lower=-2.5, max_expansions=10
    )
    assert bracket.left == -2.5 and bracket.right == 3.0 and bracket.num_evaluations == 1 + 2
    assert bracket.num_expansions == 1 + 1 and not bracket.is_bracketed


def test_shrinkage_is_capped_and_says_so():
    def needle(t):
        return jnp.where(jnp.abs(t) < 1e-4, 0.0, -jnp.inf), t

    bracket = [jnp.asarray(value) for value in (-1.0, 1.0)]
    places = jnp.asarray([0.9, 0.1, 0.2])
    found = shrink(places, needle, jnp.asarray(-1.0), jnp.asarray(7.0), *bracket, jnp.asarray(0.5))
    assert (
        not found.is_found and found.offset == 0.0 and found.logdensity == 7.0 and found.num_evaluations == 3
    )


@pytest.mark.parametrize("name", ["polar, affine", "hit and run", "geodesic", "radial"])
def test_evaluations_are_counted(name):
    calls = []

    def counting(x):
        jax.debug.callback(lambda _: calls.append(1), x)  # of x, so that mapped calls count each
        return -2.0 * jnp.log1p(jnp.sum((x - 0.3) ** 2))

    caps = {"max_expansions": 2, "max_shrinkage": 3}
    match name:
        case "geodesic":
            algorithm = geodesic_slice(counting, max_shrinkage=3)
        case "radial":  # its density is one of the radius
            algorithm = radial_polar_slice(counting)
        case _:
            algorithm = BUILDERS[name](counting, 3, **caps)
    state = algorithm.init(jnp.asarray([0.6, 0.0, 0.8]), jax.random.key(9))
    jax.effects_barrier()
    calls.clear()

    @jax.jit
    def chain(state):
        return jax.lax.scan(
            lambda state, k: algorithm.step(jax.random.fold_in(jax.random.key(9), k), state),
            state,
            jnp.arange(100),
        )

    _, info = jax.block_until_ready(chain(state))
    jax.effects_barrier()
    assert len(calls) == info.num_evaluations.sum() > 100
    assert np.all(info.num_shrinkages <= info.num_evaluations) and np.all(info.num_expansions <= 2)


def _cauchy(x):
    return -0.5 * (x.size + 1) * jnp.log1p(jnp.sum(x**2))


def test_polar_coordinates():
    y = jnp.asarray([3e25, -4e25])
    radius, direction = to_polar(y)
    np.testing.assert_allclose(radius, 5e25, rtol=1e-6)
    np.testing.assert_allclose(direction, [0.6, -0.8], rtol=1e-6)
    radius, direction = to_polar(jnp.zeros(2))
    assert radius == 0 and np.array_equal(direction, [1, 0])
    full, center, x = np.array([[2.0, -0.5], [-0.5, 1.0]]), np.array([1.0, -3.0]), jnp.asarray([0.4, 2.0])
    for spread, matrix in ((None, np.eye(2)), (np.array([2.0, 0.5]), np.diag([2.0, 0.5])), (full, full)):
        y = np.asarray(affine_map(center, spread).to_standard(x), float)
        np.testing.assert_allclose(y, np.linalg.solve(np.linalg.cholesky(matrix), x - center), rtol=1e-5)
        np.testing.assert_allclose(
            affine_map(center, spread).from_standard(jnp.asarray(y, jnp.float32)), x, rtol=1e-5
        )


# The house's conventions ---------------------------------------------------------------------------------------------


def _tree_cauchy(tree):
    return _cauchy(jnp.concatenate([tree["a"].reshape(1), tree["b"].ravel()]))


def test_centres_may_be_pytrees_like_positions():
    center = jnp.asarray([0.2, 0.1, -0.1])
    np.testing.assert_array_equal(affine_map(_as_tree(center), None).center, center)
    algorithm = polar_slice(_tree_cauchy, 2.0, center=_as_tree(center), covariance=jnp.ones(3))
    start = _as_tree(jnp.ones(3))
    state, _ = jax.eval_shape(
        lambda x: algorithm.step(jax.random.key(1), algorithm.init(x, jax.random.key(0))), start
    )
    assert jax.tree.map(jnp.shape, state.position) == jax.tree.map(jnp.shape, start)


def _as_tree(x):
    return {"a": x[0], "b": x[1:].reshape(2, 1)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_single_precision_stays_single_where_double_is_on(dtype):
    with jax.enable_x64(True):
        for algorithm in (
            polar_slice(_cauchy, 2.0, center=np.ones(3), covariance=np.eye(3) + 0.1),
            radial_polar_slice(lambda r: -2.0 * jnp.log1p(r**2), covariance=np.ones(3)),
            geodesic_slice(_cauchy),
            hit_and_run_slice(_cauchy, 2.0, covariance=np.ones(3)),
        ):
            state, info = jax.eval_shape(
                lambda x, algorithm=algorithm: algorithm.step(
                    jax.random.key(1), algorithm.init(x, jax.random.key(0))
                ),
                jax.ShapeDtypeStruct((3,), dtype),
            )
            assert state.position.dtype == state.logdensity.dtype == info.acceptance_rate.dtype == dtype


def test_what_is_refused():
    for build, name in ((polar_slice, "polar_slice"), (hit_and_run_slice, "hit_and_run_slice")):
        with pytest.raises(ValueError, match="width must be positive and finite, got 0"):
            build(_cauchy, 0.0)
        for cap in ("max_expansions", "max_shrinkage"):
            with pytest.raises(ValueError, match=f"{cap} must be a positive integer, got 0"):
                build(_cauchy, 1.0, **{cap: 0})
        network = smcdiff.Diffusion(None, lambda params, x, t: -x, smcdiff.schedules.cosine(), "score", (2,))
        with pytest.raises(
            TypeError, match=f'{name} needs a target with the .* HasLogDensity.*"line_integral"'
        ):
            build(network.at(jnp.asarray(0.5)), 1.0)
    key = jax.random.key(0)
    for algorithm in (polar_slice(_cauchy, 1.0), radial_polar_slice(_cauchy)):
        with pytest.raises(ValueError, match=r"needs samples of at least 2 numbers.*hit_and_run_slice"):
            jax.jit(algorithm.init)(jnp.ones(1), key)
    with pytest.raises(ValueError, match="center must fit the sample, whose size is 3, got size 2"):
        polar_slice(_cauchy, 1.0, center=np.ones(2)).step(key, SliceState(jnp.ones(3), jnp.ones(())))
    with pytest.raises(ValueError, match=r"position must be a unit vector, got the norm 1\.7"):
        geodesic_slice(_cauchy).init(jnp.ones(3), key)
    with pytest.raises(ValueError, match="at least 2 numbers, got 1"):
        geodesic_slice(_cauchy).init(jnp.ones(1), key)
