"""Leapfrog and Langevin kernels against quadrature and closed forms.

In one dimension a step is an integral over the sample and the momentum: E g(x', u') - E g(x, u), in equilibrium and
with the acceptance integrated out, is computed on a grid in double precision, without any Monte Carlo error. It
vanishes for an exact kernel up to the grid's error, 3e-5 (the acceptance has a kink), and has the known rate in the
step for the others.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows import quick

import smcdiff
from smcdiff import mcmc
from smcdiff.density import LogDensity
from smcdiff.line_integral import line_integral
from smcdiff.mcmc.hamiltonian import _leapfrog, _log_ratio, _step, hamiltonian


def logdensity(x):
    """Bimodal, asymmetric, with light tails."""
    return jnp.sum(0.3 * x + 1.1 * x**2 - 0.35 * x**4)


class ScoreField:
    """A score and nothing else."""

    def __init__(self, score):
        self.score = score


TARGET = LogDensity(Partial(logdensity))
SCORE_ONLY = ScoreField(TARGET.score)
GRID = np.linspace(-4.0, 4.0, 401)


def expected_change(algorithm, observe, turn=-1.0):
    """E observe(x', u') - E observe(x, u) of one step in equilibrium; ``turn`` is the sign of a rejected momentum."""
    kernel = algorithm.step.args[0]
    x, u = (axis.ravel() for axis in np.meshgrid(GRID, 1.5 * GRID, indexing="ij"))
    weight = np.exp(np.asarray(jax.vmap(logdensity)(jnp.asarray(x))) - u**2 / 2)
    weight /= weight.sum()

    def propose(x, u):
        x, u = x[None], u[None]
        start = (x, u, *kernel.evaluate(x, lambda flat: flat))
        end, kinetic_rise, path = _leapfrog(kernel, lambda flat: flat, start)
        log_ratio = _log_ratio(kernel, lambda flat: flat, start, end, path)
        gain = log_ratio - kinetic_rise
        return end[0][0], end[1][0], jnp.exp(jnp.minimum(gain, 0.0)), log_ratio

    new_x, new_u, rate, _ = (np.asarray(value) for value in jax.jit(jax.vmap(propose))(x, u))
    rate = np.ones_like(rate) if kernel.accept == "never rejects" else rate
    moved = rate * observe(new_x, new_u) + (1 - rate) * observe(x, turn * u)
    return np.sum(weight * (moved - observe(x, u)))


def second_moment(x, u):
    return x**2 + 0.2 * x


def joint(x, u):
    """Sees the direction of the momentum, hence a flip that is missing."""
    return (np.tanh(x) + 0.3 * u) * u + np.tanh(u + x)


def first_moment(x, u):
    return np.tanh(2 * x)


@pytest.mark.parametrize("observe", [first_moment, second_moment, joint])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("accept", ["exact", "line_integral"])
def test_a_step_is_exactly_invariant(accept, num_steps, observe):
    with jax.enable_x64(True):
        algorithm = mcmc.ghmc(TARGET, 0.6, num_steps, accept=accept)
        assert abs(expected_change(algorithm, observe)) < 1e-4


def test_the_integral_finds_planted_faults():
    with jax.enable_x64(True):
        assert abs(expected_change(mcmc.ghmc(TARGET, 0.6, 3), joint, turn=1.0)) > 1e-3
        for accept in ("path_integral", "never rejects"):
            wrong = hamiltonian("test", TARGET, 0.6, 3, 0.9, None, accept)
            assert abs(expected_change(wrong, second_moment)) > 1e-3


@pytest.mark.parametrize(
    ("build", "order"),
    [
        (lambda h: mcmc.ula(TARGET, h), 2),  # of one step: one order more than of its law
        (lambda h: mcmc.mala(TARGET, h, accept="path_integral"), 2),
        (lambda h: mcmc.uhmc(TARGET, jnp.sqrt(2 * h), 1), 2),
    ],
)
def test_biased_kernels_err_at_the_known_order(build, order):
    with jax.enable_x64(True):
        errors = [expected_change(build(h), second_moment) for h in (0.02, 0.01, 0.005)]
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(slopes - order) < 0.15), slopes


def underdamped_change(monkeypatch, step_size, observe):
    """E observe(x', u') - E observe(x, u) of one step of BAOAB in equilibrium: Gauss-Hermite in momentum and noise."""
    algorithm = mcmc.underdamped(TARGET, step_size, friction=1.5)
    nodes, rule = np.polynomial.hermite_e.hermegauss(24)
    x, u, noise = (axis.ravel() for axis in np.meshgrid(GRID[::2], nodes, nodes, indexing="ij"))
    density = np.exp(np.asarray(jax.vmap(logdensity)(jnp.asarray(GRID[::2]))))
    weight = np.einsum("i,j,k->ijk", density / density.sum(), rule / rule.sum(), rule / rule.sum()).ravel()

    def step(x, u, noise):
        state = mcmc.UnderdampedState(x[None], TARGET.score(x[None]), u[None])
        state, _ = algorithm.step(noise, state)
        return state.position[0], state.momentum[0]

    with monkeypatch.context() as patch:  # the noise is given in place of the key
        patch.setattr(jax.random, "normal", lambda noise, shape, dtype: jnp.full(shape, noise, dtype))
        new_x, new_u = map(np.asarray, jax.jit(jax.vmap(step))(*map(jnp.asarray, (x, u, noise))))
    return np.sum(weight * (observe(new_x, new_u) - observe(x, u)))


@pytest.mark.parametrize(("observe", "order"), [(joint, 3), (second_moment, 4)])
def test_underdamped_errs_at_one_order_more_than_its_law(observe, order, monkeypatch):
    """In one step: third for the joint law of x and u, fourth for that of x. On a Gaussian the latter has no error."""
    with jax.enable_x64(True):
        errors = [underdamped_change(monkeypatch, h, observe) for h in (0.08, 0.04, 0.02)]
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(slopes - order) < 0.15), slopes


def stationary_variance(algorithm, num_steps, num_chains=40_000, start=1.0):
    """Variance of many chains after many steps, and its standard error."""

    def chain(key, x):
        state = algorithm.init(x, key)
        step = lambda state, k: (algorithm.step(jax.random.fold_in(key, k), state)[0], None)  # noqa: E731
        return jax.lax.scan(step, state, jnp.arange(num_steps))[0].position

    keys = jax.random.split(jax.random.key(5), num_chains)
    x = np.asarray(
        jax.jit(jax.vmap(chain))(keys, start * jax.random.normal(jax.random.key(6), (num_chains, 1)))
    )
    return x.var(), x.var() * np.sqrt(2 / num_chains)


GAUSSIAN = LogDensity(Partial(lambda x: -0.5 * jnp.sum(x**2)))
BIASED = {
    # name: (algorithm, its stationary variance on the standard normal, by the linear recursion that it is)
    "ula": (mcmc.ula, 0.4, lambda h: 1 / (1 - h / 2)),
    "uhmc": (lambda target, e: mcmc.uhmc(target, e, 2), 0.9, lambda e: 1 / (1 - e**2 / 4)),
    "uhmc, persistent": (
        lambda target, e: mcmc.uhmc(target, e, 1, persistence=0.6),
        0.9,
        lambda e: 1 / (1 - e**2 / 4),
    ),
    "underdamped": (mcmc.underdamped, 0.9, lambda h: 1.0),
}


@pytest.mark.parametrize("name", BIASED)
def test_stationary_variance_of_unadjusted_kernels(name):
    """4.5 standard errors of 0.7 %: fails once in 150 000."""
    build, step, exact = BIASED[name]
    variance, error = stationary_variance(build(GAUSSIAN, step), 40)
    assert abs(variance - exact(step)) < 4.5 * error
    assert abs(1 - exact(step)) > 10 * error or exact(step) == 1.0


def test_preconditioning_is_a_change_of_coordinates():
    """A kernel with an inverse mass matrix is the plain kernel on the whitened target."""
    factor = np.array([[1.3, 0.0], [0.4, 0.6]])
    covariance = factor @ factor.T
    target = smcdiff.GaussianMixture.create([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.2]], covariance)
    whitened = LogDensity(
        Partial(lambda factor, y: target.logdensity(factor @ y), jnp.asarray(factor, jnp.float32))
    )
    x = jnp.asarray([0.2, -0.7])
    y = jnp.asarray(np.linalg.solve(factor, np.asarray(x)), jnp.float32)
    key = jax.random.key(3)
    step = jax.jit(lambda algorithm, x: algorithm.step(key, algorithm.init(x, key))[0].position)
    for build in (
        lambda target, **options: mcmc.hmc(target, 0.4, 3, **options),
        lambda target, **options: mcmc.mala(target, 0.2, **options),
        lambda target, **options: mcmc.underdamped(target, 0.3, **options),
    ):
        first = step(build(target, inverse_mass_matrix=jnp.asarray(covariance, jnp.float32)), x)
        second = step(build(whitened), y)
        np.testing.assert_allclose(first, factor @ np.asarray(second), rtol=1e-4, atol=1e-5)


MASS = np.array([[0.8, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 1.1]])  # inverse
BALANCED = {
    # name: (algorithm, step of the leapfrog, inverse mass)
    "mala": (lambda target: mcmc.mala(target, 0.3), np.sqrt(0.6), np.eye(3)),
    "mala, preconditioned": (
        lambda target: mcmc.mala(target, 0.3, inverse_mass_matrix=MASS),
        np.sqrt(0.6),
        MASS,
    ),
    "mala, line integral": (
        lambda target: mcmc.mala(target, 0.2, accept="line_integral", num_nodes=32),
        np.sqrt(0.4),
        np.eye(3),
    ),
    "mala, path integral": (
        lambda target: mcmc.mala(target, 0.3, accept="path_integral", inverse_mass_matrix=MASS),
        np.sqrt(0.6),
        MASS,
    ),
    "hmc": (lambda target: mcmc.hmc(target, 0.6, 5), 0.6, np.eye(3)),
    "hmc, preconditioned": (
        lambda target: mcmc.hmc(target, 0.8, 4, inverse_mass_matrix=np.diag(MASS)),
        0.8,
        np.diag(np.diag(MASS)),
    ),
    "hmc, line integral": (
        lambda target: mcmc.hmc(
            target, 0.6, 3, accept="line_integral", num_nodes=64, inverse_mass_matrix=MASS
        ),
        0.6,
        MASS,
    ),
    "hmc, path integral": (
        lambda target: mcmc.hmc(target, 0.7, 3, accept="path_integral", inverse_mass_matrix=MASS),
        0.7,
        MASS,
    ),
    "ghmc": (lambda target: mcmc.ghmc(target, 0.7, 2, persistence=0.8, inverse_mass_matrix=MASS), 0.7, MASS),
}


@pytest.mark.parametrize("name", quick(BALANCED, "mala, preconditioned", "hmc, line integral", "ghmc"))
def test_detailed_balance_to_rounding(name):
    """a(z) pi(z) = a(z') pi(z') for the step from z = (x, u) to z' and that from (x', -u') to (x, -u).

    With the momentum kept whole a step knows no chance but that of the decision, so that one goes there and one home.
    """
    with jax.enable_x64(True):
        model = smcdiff.GaussianMixture.create([0.3, 0.7], [[-1.0, 0.5, 0.0], [1.0, -0.2, 0.3]], 0.3)
        build, step, inverse_mass = BALANCED[name]
        kernel = dataclasses.replace(build(model).step.args[0], persistence=1.0)
        x, u = jax.random.normal(jax.random.key(0), (2, 400, 3))
        logdensity, score = jax.vmap(model.logdensity), jax.vmap(model.score)

        @jax.jit
        def move(key, x, u):
            state = mcmc.HamiltonianState(x, logdensity(x) if kernel.accept == "exact" else None, score(x), u)
            state, info = jax.vmap(lambda key, state: _step(kernel, key, state))(
                jax.random.split(key, len(x)), state
            )
            return state.position, state.momentum, info.acceptance_rate, info.is_accepted

        x_there, u_there, there, arrives = move(jax.random.key(1), x, u)
        x_home, u_home, home, returns = move(jax.random.key(2), x_there, -u_there)
        np.testing.assert_array_equal(x_there[~arrives], x[~arrives])
        np.testing.assert_array_equal(u_there[~arrives], -u[~arrives])
        both = np.asarray(arrives & returns)
        np.testing.assert_allclose(x_home[both], x[both], atol=1e-9)
        np.testing.assert_allclose(u_home[both], -u[both], atol=1e-9)

        # Of two opposite ratios one is accepted for sure, and the other one tells the ratio.
        ratio = np.log(there / home)[arrives]
        np.testing.assert_allclose(np.maximum(there, home)[arrives], 1.0, rtol=1e-9)
        kinetic = 0.5 * jnp.sum(u_there**2 - u**2, axis=1)
        if kernel.accept == "path_integral":
            squares = [jnp.einsum("ni,ij,nj->n", s, inverse_mass, s) for s in (score(x_there), score(x))]
            expected = -(step**2) / 8 * (squares[0] - squares[1])
        else:
            expected = logdensity(x_there) - logdensity(x) - kinetic
        assert both.sum() > 100 and ratio.min() < -0.5 and ratio.max() > 0.5
        np.testing.assert_allclose(ratio, expected[arrives], atol=1e-9)


def test_line_integral_is_the_log_ratio_of_a_gradient():
    with jax.enable_x64(True):
        model = smcdiff.GaussianMixture.create([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.2]], 0.4)
        a, b = jnp.asarray([-0.9, 0.6]), jnp.asarray([0.7, -0.1])
        exact = model.logdensity(b) - model.logdensity(a)
        integral = jax.jit(lambda n: line_integral(model.score, a, b, n), static_argnums=0)
        errors = [abs(float(integral(n) - exact)) for n in (2, 4, 8, 16)]
    assert errors[0] > 10 * errors[2] and errors[2] > 10 * errors[3] and errors[3] < 1e-8


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("inverse_mass_matrix", [None, [0.5, 2.0], [[1.0, 0.4], [0.4, 0.5]]])
def test_path_is_the_leapfrog_path_and_its_integral_the_trapezoidal_sum(num_steps, inverse_mass_matrix):
    """Step by step, with half kicks, for a score that is no gradient, so that no potential can stand in for the sum."""

    def score(x):
        return -(x**3) + jnp.stack([-0.8 * x[1], 0.3 * x[0]]) + 0.5

    with jax.enable_x64(True):
        matrix = None if inverse_mass_matrix is None else jnp.asarray(inverse_mass_matrix)
        algorithm = mcmc.hmc(
            ScoreField(score), 0.3, num_steps, inverse_mass_matrix=matrix, accept="path_integral"
        )
        kernel = algorithm.step.args[0]
        x, u = jnp.asarray([0.5, -0.9]), jnp.asarray([1.1, 0.4])
        end, rise, integral = _leapfrog(kernel, lambda flat: flat, (x, u, None, score(x)))

        covariance = (
            np.eye(2) if matrix is None else np.diag(matrix) if matrix.ndim == 1 else np.asarray(matrix)
        )
        factor, momentum, total = np.linalg.cholesky(covariance), np.asarray(u), 0.0
        for _ in range(num_steps):
            middle = momentum + 0.15 * factor.T @ score(x)
            new = x + 0.3 * factor @ middle
            momentum = middle + 0.15 * factor.T @ score(new)
            total += 0.5 * (score(x) + score(new)) @ (new - x)
            x = new
        np.testing.assert_allclose(end[0], x, rtol=1e-12)
        np.testing.assert_allclose(end[1], momentum, rtol=1e-12)
        np.testing.assert_allclose(rise, 0.5 * (momentum @ momentum - u @ u), rtol=1e-11)
        np.testing.assert_allclose(integral, total, rtol=1e-11)


def test_path_gap_tells_scores_that_are_no_gradients():
    """For a gradient the gap falls with the square of the step; for a rotating score it does not."""

    def rotating(x):
        return -x + 0.8 * jnp.stack([-x[1], x[0]])

    gaps = {}
    for name, target in {"gradient": TARGET, "rotating": ScoreField(rotating)}.items():
        gaps[name] = []
        for num_steps in (4, 8):
            algorithm = mcmc.hmc(target, 2.0 / num_steps, num_steps, accept="line_integral", num_nodes=12)
            state = algorithm.init(jnp.asarray([0.5, 0.3]), jax.random.key(0))
            keys = jax.random.split(jax.random.key(1), 16)
            _, infos = jax.jit(jax.vmap(lambda key: algorithm.step(key, state)))(keys)  # noqa: B023
            gaps[name].append(float(jnp.mean(jnp.abs(infos.path_gap))))
    assert gaps["gradient"][0] > 2.5 * gaps["gradient"][1]
    assert gaps["rotating"][1] > 0.7 * gaps["rotating"][0] > 0.1


def test_a_diverging_path_is_rejected_and_flagged():
    algorithm = mcmc.hmc(TARGET, 30.0, 5)
    state = algorithm.init(jnp.asarray([1.0]), jax.random.key(0))
    new, info = jax.jit(algorithm.step)(jax.random.key(1), state)
    assert bool(info.is_divergent) and not bool(info.is_accepted) and float(info.acceptance_rate) == 0.0
    np.testing.assert_array_equal(new.position, state.position)
    _, info = jax.jit(mcmc.underdamped(TARGET, 30.0).step)(
        jax.random.key(1), mcmc.underdamped(TARGET, 30.0).init(jnp.asarray([1e6]), jax.random.key(0))
    )
    assert bool(info.is_divergent)


@pytest.mark.parametrize(
    "build", [lambda target: mcmc.mala(target, 0.1), lambda target: mcmc.hmc(target, 0.1, 2)]
)
def test_a_score_alone_is_refused_where_a_density_is_needed(build):
    with pytest.raises(TypeError, match=r"HasLogDensity.*line_integral.*ula"):
        build(SCORE_ONLY)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mcmc.mala(TARGET, 0.0), "step_size must be positive"),
        (lambda: mcmc.hmc(TARGET, float("nan"), 3), "step_size must be positive"),
        (lambda: mcmc.hmc(TARGET, 0.1, 2.5), "num_integration_steps must be a positive integer"),
        (lambda: mcmc.hmc(TARGET, 0.1, 3, accept="maybe"), "accept must be one of"),
        (lambda: mcmc.ghmc(TARGET, 0.1, persistence=1.0), r"persistence must lie in \[0, 1\)"),
        (lambda: mcmc.underdamped(TARGET, 0.1, friction=-1.0), "friction must be positive"),
        (lambda: mcmc.hmc(TARGET, 0.1, 3, inverse_mass_matrix=jnp.asarray([1.0, -1.0])), "positive definite"),
        (lambda: mcmc.hmc(TARGET, 0.1, 3, inverse_mass_matrix=jnp.ones((2, 3))), "of shape"),
        (
            lambda: (
                mcmc.mala(TARGET, 0.1, inverse_mass_matrix=jnp.ones(3)).init(jnp.ones(2), None)
                and mcmc.mala(TARGET, 0.1, inverse_mass_matrix=jnp.ones(3)).step(
                    jax.random.key(0), mcmc.mala(TARGET, 0.1).init(jnp.ones(2), None)
                )
            ),
            "must fit the flattened sample",
        ),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_no_target_is_refused():
    with pytest.raises(TypeError, match="target must be a function"):
        mcmc.mala(3.0, 0.1)
