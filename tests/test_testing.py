"""The checks of smcdiff.testing pass what is right at the rate they state, and find what is planted.

Right programs are checked with a false-fail rate of 1e-5 a check, and keys are fixed. The slow studies repeat each
check 200 times at a rate of .05: more failures than a binomial number exceeds with probability 1e-4 are too many.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fk_cases import CASES
from jax.tree_util import Partial
from scipy import stats

import smcdiff
from smcdiff import mcmc, schedules, testing
from smcdiff.density import LogDensity

RIGHT = 1e-5
RATE, REPETITIONS = 0.05, 200
TOO_MANY = stats.binom.isf(1e-4, REPETITIONS, RATE)

MEANS = np.array([[-1.3, 0.8], [0.7, -0.3]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.4]], [[0.5, -0.2], [-0.2, 0.3]]])


@functools.cache
def target():
    return smcdiff.GaussianMixture.create([0.1, 0.9], MEANS, COVARIANCES)


@functools.partial(jax.jit, static_argnums=2)
def _sample(target, rng_key, num_samples):
    return target.sample(rng_key, num_samples)


def exact(rng_key, num_samples):
    return _sample(target(), rng_key, num_samples)


class State(NamedTuple):
    position: jax.Array


class Info(NamedTuple):
    acceptance_rate: jax.Array


class Mala(eqx.Module):
    """MALA with faults to choose, all leaves: a right one has factor 1, sign 1 and refuses nothing."""

    target: smcdiff.GaussianMixture
    h: jax.Array
    factor: jax.Array
    sign: jax.Array
    refuses: jax.Array

    def init(self, position, rng_key):
        return State(position)

    def step(self, rng_key, state):
        key_noise, key_accept = jax.random.split(rng_key)
        x = state.position
        y = x + self.h * self.target.score(x) + jnp.sqrt(2 * self.h) * jax.random.normal(key_noise, x.shape)

        def log_proposal(a, b):
            return -self.factor * jnp.sum((b - a - self.h * self.target.score(a)) ** 2) / (4 * self.h)

        log_ratio = self.target.logdensity(y) - self.target.logdensity(x)
        log_ratio = log_ratio + self.sign * (log_proposal(y, x) - log_proposal(x, y))
        enters = (self.target.responsibilities(y)[0] > 0.5) & (self.target.responsibilities(x)[0] < 0.5)
        probability = jnp.where(self.refuses & enters, 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
        accepted = jax.random.uniform(key_accept) < probability
        return State(jnp.where(accepted, y, x)), Info(probability)


def mala(factor=1.0, sign=1.0, refuses=False, h=0.15):
    return Mala(target(), *(jnp.asarray(value) for value in (h, factor, sign, refuses)))


FAULTS = {
    "factor 2 in the proposal": {"factor": 2.0},
    "sign of the proposal": {"sign": -1.0},
    "a mode of weight .1 that nothing enters": {"refuses": True},
}


def invariance(rng_key, kernel, **options):
    return testing.check_invariance(rng_key, kernel, exact, modes=jnp.asarray(MEANS, float), **options)


def test_a_right_kernel_leaves_its_target_alone():
    report = invariance(jax.random.key(0), mala(), false_fail=RIGHT).raise_if_failed()
    assert report.passed and report.details["moved"] > 0.9 and 0.5 < report.details["acceptance_rate"] < 0.99
    assert len(report.names) == len(report.z) and "weight of mode[0]" in report.names
    # The bound of Bonferroni's inequality, for 2000 chains.
    assert report.bound == pytest.approx(stats.norm.isf(RIGHT / (2 * len(report.z))), rel=0.01)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_found_and_the_message_says_what_moved(fault):
    report = invariance(jax.random.key(1), mala(**FAULTS[fault]))
    assert np.abs(report.z).max() > 1.5 * report.bound
    with pytest.raises(AssertionError, match=r"invariance .*: failed") as error:
        report.raise_if_failed()
    worst = int(np.argmax(np.abs(report.z)))
    direction = "rose" if report.change[worst] > 0 else "fell"
    assert f"{report.names[worst]} {direction} by" in str(error.value)
    if "mode" in fault:
        weight = report.names.index("weight of mode[0]")
        assert report.z[weight] < -report.bound


def _moments(x):
    return {"mean": x, "second": (x - jnp.asarray(MEANS[1], x.dtype)) ** 2}


def test_own_functions_and_the_kernels_of_the_library():
    """Of Langevin steps without a correction the variance is too large, by first order in the step."""
    report = testing.check_invariance(jax.random.key(2), mcmc.ula(target(), 0.2), exact, functions=_moments)
    assert report.names == ("mean[0]", "mean[1]", "second[0]", "second[1]")
    assert report.z[3] > 1.5 * report.bound


class Still(eqx.Module):
    """A kernel that stays where it is, or writes NaN."""

    value: jax.Array

    def init(self, position, rng_key):
        return State(position)

    def step(self, rng_key, state):
        return State(state.position + self.value), None


def test_a_check_that_sees_nothing_does_not_pass():
    report = invariance(jax.random.key(3), Still(jnp.zeros(())), num_steps=1)
    assert np.all(report.z == 0) and not report.passed and "Only 0.0% of the chains moved" in str(report)
    assert np.isnan(report.details["acceptance_rate"])
    report = invariance(jax.random.key(3), Still(jnp.asarray(np.nan)), num_steps=1)
    assert not report.passed and "NaN or infinite: log(1 + |z|^2)" in str(report)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_chains must be an integer of at least 2"):
        invariance(jax.random.key(0), mala(), num_chains=1)
    with pytest.raises(ValueError, match="modes belongs to the default functions"):
        invariance(jax.random.key(0), mala(), functions=_moments)
    with pytest.raises(ValueError, match="false_fail must be positive"):
        invariance(jax.random.key(3), Still(jnp.zeros(())), num_steps=1, false_fail=0.0)


class Rotation(eqx.Module):
    """Turns by a right angle: leaves an isotropic law alone, and is in balance with nothing."""

    angle: jax.Array

    def init(self, position, rng_key):
        return State(position)

    def step(self, rng_key, state):
        cos, sin = jnp.cos(self.angle), jnp.sin(self.angle)
        x, y = state.position
        return State(jnp.stack([cos * x - sin * y, sin * x + cos * y])), Info(jnp.ones(()))


def _normal(rng_key, num_samples):
    return jax.random.normal(rng_key, (num_samples, 2))


def balance(rng_key, kernel, **options):
    return testing.check_detailed_balance(rng_key, kernel, exact, **{"num_chains": 2000, **options})


def test_detailed_balance():
    balance(jax.random.key(4), mala(), false_fail=RIGHT).raise_if_failed()
    wrong = balance(jax.random.key(5), mala(sign=-1.0))
    assert not wrong.passed and any("flux from" in name for name in wrong.names)
    turn = Rotation(jnp.asarray(np.pi / 2))
    assert testing.check_invariance(jax.random.key(6), turn, _normal, num_steps=1, false_fail=RIGHT).passed
    report = testing.check_detailed_balance(jax.random.key(6), turn, _normal, num_chains=2000)
    assert np.abs(report.z).max() > 2 * report.bound


@functools.cache
def kalman():
    return CASES["gaussian"]()


def _smc(rng_key, fk, keeps_weights, num_particles):
    """Bootstrap SMC that resamples before every step, and, where ``keeps_weights``, forgets to reset the weights."""
    keys = jax.random.split(jax.random.fold_in(rng_key, 0), num_particles)
    particles, log_weights = jax.vmap(fk.init)(keys)
    log_evidence = jax.nn.logsumexp(log_weights) - np.log(num_particles)

    def step(carry, k):
        particles, log_weights, log_evidence = carry
        key_resample, key_move = jax.random.split(jax.random.fold_in(rng_key, k + 1))
        ancestors = jax.random.categorical(key_resample, log_weights, shape=(num_particles,))
        keys = jax.random.split(key_move, num_particles)
        parents = jax.tree.map(lambda leaf: leaf[ancestors], particles)
        particles, increments = jax.vmap(fk.step, (0, 0, None))(keys, parents, k)
        old = jnp.where(keeps_weights, jax.nn.log_softmax(log_weights[ancestors]), -np.log(num_particles))
        log_weights = old + increments
        return (particles, log_weights, log_evidence + jax.nn.logsumexp(log_weights)), None

    return jax.lax.scan(step, (particles, log_weights, log_evidence), jnp.arange(fk.num_steps))[0]


@eqx.filter_jit
def _runs(rng_key, fk, keeps_weights, num_runs):
    return jax.vmap(lambda key: _smc(key, fk, keeps_weights, 16))(jax.random.split(rng_key, num_runs))


def _position(particle):
    return {"x": particle["x"]}


def weighting(rng_key, keeps_weights, **options):
    case = kalman()
    return testing.check_properly_weighted(
        rng_key,
        lambda key, num_runs: _runs(key, case.fk, jnp.asarray(keeps_weights), num_runs),
        case.log_evidence,
        _position,
        {"x": case.mean},
        **options,
    )


def test_proper_weighting():
    weighting(jax.random.key(7), False, false_fail=RIGHT).raise_if_failed()
    wrong = weighting(jax.random.key(8), True)
    assert not wrong.passed and abs(wrong.z[0]) > 2 * wrong.bound
    assert wrong.names == ("evidence", "evidence x x")
    with pytest.raises(AssertionError, match=r"evidence (rose|fell) by"):
        wrong.raise_if_failed()


def test_smc_results_are_read_and_a_wrong_constant_is_found():
    case = kalman()

    runs = _runs(jax.random.key(9), case.fk, jnp.asarray(False), 4000)
    result = smcdiff.SMCResult(*runs, None, None)

    def sampler(rng_key, num_runs):
        return result

    def check(shift_evidence, shift_mean):
        return testing.check_properly_weighted(
            jax.random.key(9),
            sampler,
            case.log_evidence + shift_evidence,
            _position,
            {"x": case.mean + shift_mean},
        )

    assert check(0.0, 0.0).passed
    report = check(0.1, 0.0)
    assert report.z[0] < -report.bound and "evidence fell" in str(report)
    report = check(0.0, 0.1)
    assert abs(report.z[0]) < report.bound and report.z[1] < -report.bound


def test_an_estimate_without_power_does_not_pass():
    report = weighting(jax.random.key(10), False, largest_error=1e-4)
    assert not report.passed and "is the most that tests anything" in str(report)
    with pytest.raises(ValueError, match="belong together"):
        testing.check_properly_weighted(jax.random.key(0), None, 0.0, _position)
    with pytest.raises(ValueError, match="expectations must be like what functions returns"):
        case = kalman()
        testing.check_properly_weighted(
            jax.random.key(0),
            lambda key, num_runs: _runs(key, case.fk, jnp.asarray(False), num_runs),
            0.0,
            _position,
            {"x": np.zeros(2)},
        )


class Faulty(eqx.Module):
    """A density and a score that may disagree by a factor, a rotation, a shift of the log density, a wrong ratio."""

    target: smcdiff.GaussianMixture
    factor: jax.Array
    turn: jax.Array
    tilt: jax.Array
    ratio: jax.Array

    def score(self, x):
        return self.factor * self.target.score(x) + self.turn * jnp.stack([-x[1], x[0]])

    def logdensity(self, x):
        # The tilt is hidden from automatic differentiation.
        return self.target.logdensity(x) + self.tilt * jax.lax.stop_gradient(x[0])

    def log_ratio(self, x_from, x_to):
        return self.ratio * (self.target.logdensity(x_to) - self.target.logdensity(x_from)) + self.tilt * (
            x_to[0] - x_from[0]
        )


def score_of(**changes):
    values = {"factor": 1.0, "turn": 0.0, "tilt": 0.0, "ratio": 1.0} | changes
    density = Faulty(target(), **{name: jnp.asarray(value) for name, value in values.items()})
    return testing.check_score(jax.random.key(12), density, exact(jax.random.key(11), 20))


def test_a_score_that_belongs_to_its_density():
    report = score_of().raise_if_failed()
    assert report.errors.shape == (5, 20) and report.errors.max() < 0.1 * report.tolerance
    assert "score: passed" in str(report)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"factor": -1.0}, "score = gradient of logdensity"),
        ({"factor": 1.01}, "score = gradient of logdensity"),
        ({"turn": 0.05}, "Jacobian of the score is symmetric"),
        ({"tilt": 0.1}, "difference of logdensity = integral of the score"),
        ({"ratio": 1.05}, "log_ratio = integral of the score"),
    ],
)
def test_a_score_that_does_not(change, found):
    report = score_of(**change)
    assert report.errors[report.names.index(found)].max() > 2 * report.tolerance
    with pytest.raises(AssertionError, match="relative error"):
        report.raise_if_failed()


class WrongTime(eqx.Module):
    """A path whose ``at`` rounds the time."""

    path: smcdiff.GaussianMixtureDiffusion
    shift: jax.Array

    @property
    def schedule(self):
        return self.path.schedule

    @property
    def event_shape(self):
        return self.path.event_shape

    def at(self, t):
        return self.path.at(t + self.shift)

    def score(self, x, t):
        return self.path.score(x, t)

    def denoise(self, x, t):
        return self.path.denoise(x, t)


def test_paths():
    path = smcdiff.GaussianMixtureDiffusion.create([0.1, 0.9], MEANS, 0.2, schedules.cosine())
    points = path.at(jnp.asarray(0.0)).sample(jax.random.key(13), 10)
    times = np.array([0.1, 0.5, 0.95])
    check = Partial(testing.check_score, jax.random.key(14), symmetry=False)
    report = check(WrongTime(path, jnp.asarray(0.0)), points, times=times).raise_if_failed()
    assert len(report.names) == 12 and "at(t).score = score(., t) at t = 0.5" in report.names
    wrong = check(WrongTime(path, jnp.asarray(0.03)), points, times=times)
    bad = {
        name.split(" at t")[0]
        for name, row in zip(wrong.names, wrong.errors, strict=True)
        if row.max() > 0.01
    }
    assert bad == {"at(t).score = score(., t)", "denoiser = Tweedie's formula"}
    with pytest.raises(TypeError, match="a path needs times"):
        check(path, points)
    with pytest.raises(TypeError, match="must be a path with at"):
        check(target(), points, times=times)


@pytest.mark.slow
def test_samples_may_be_pytrees():
    points = {"a": jnp.linspace(-1.0, 1.0, 4), "b": jnp.linspace(0.5, 2.0, 8).reshape(4, 2)}
    testing.check_score(jax.random.key(15), LogDensity(Partial(_on_dictionary)), points).raise_if_failed()
    functions = testing.bounded_functions(points)
    one = jax.tree.map(lambda leaf: leaf[0], points)
    assert functions(one)["tanh"].shape == (3,)


def _on_dictionary(x):
    return -jnp.sum(x["b"] ** 2 * jnp.exp(-x["a"])) - x["a"] ** 2


def _study(check):
    """Reports of many repetitions."""
    return [check(jax.random.fold_in(jax.random.key(20), k), false_fail=RATE) for k in range(REPETITIONS)]


def _passes_at_the_stated_rate(reports):
    assert sum(not report.passed for report in reports) <= TOO_MANY
    z = np.array([report.z for report in reports])
    # z has deviation 1, estimated to 1/sqrt(2 * 199) = 5 %, and mean 0, to 7 %: five standard errors of either.
    assert np.all(np.abs(z.std(axis=0) - 1) < 5 * 0.05) and np.all(np.abs(z.mean(axis=0)) < 5 * 0.07)


@pytest.mark.slow
def test_a_right_kernel_passes_at_the_stated_rate_and_wrong_ones_never():
    options = {"num_chains": 2000, "num_steps": 20}
    _passes_at_the_stated_rate(_study(lambda key, **rate: invariance(key, mala(), **rate, **options)))
    for fault in FAULTS.values():
        kernel = mala(**fault)
        found = [not report.passed for report in _study(Partial(_invariance_of, kernel, options))]
        assert np.mean(found) > 0.99, fault


def _invariance_of(kernel, options, rng_key, **rate):
    return invariance(rng_key, kernel, **rate, **options)


@pytest.mark.slow
def test_a_kernel_in_balance_passes_at_the_stated_rate():
    options = {"num_chains": 2000}
    reports = _study(lambda key, **rate: balance(key, mala(h=0.4), **rate, **options))
    assert sum(not report.passed for report in reports) <= TOO_MANY
    found = [
        not r.passed
        for r in _study(lambda key, **rate: balance(key, mala(h=0.4, sign=-1.0), **rate, **options))
    ]
    assert np.mean(found) > 0.99


@pytest.mark.slow
def test_right_weights_pass_at_the_stated_rate_and_kept_weights_never():
    options = {"num_runs": 1000, "largest_error": 0.2}
    _passes_at_the_stated_rate(_study(lambda key, **rate: weighting(key, False, **rate, **options)))
    found = [not r.passed for r in _study(lambda key, **rate: weighting(key, True, **rate, **options))]
    assert np.mean(found) > 0.99
