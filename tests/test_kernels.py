"""Properties that every kernel of tests/kernel_cases.py has.

Stationarity is that of `smcdiff.testing.check_invariance`: chains start from exact draws and take steps, and the
mean of no function may change. A right kernel fails with a probability of 1e-5 a target, 1e-3 for all checks of this
module together. What a wrong kernel looks like is planted in the last tests.
"""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from kernel_cases import KERNELS
from mcmc_targets import logdensity, targets

from smcdiff import mcmc
from smcdiff.density import LogDensity
from smcdiff.testing import check_invariance

FALSE_FAIL = 1e-5
EXACT = [name for name, kernel in KERNELS.items() if kernel.is_exact]
SCORES_ONLY = [name for name, kernel in KERNELS.items() if kernel.scores_only]


class ScoreOnly:
    """Hides the log density of a target; a pytree."""

    def __init__(self, target):
        self.target = target

    def score(self, x):
        return self.target.score(x)


jax.tree_util.register_pytree_node(
    ScoreOnly, lambda self: ((self.target,), None), lambda _, children: ScoreOnly(*children)
)


def check_stationarity(algorithm, target, num_chains=2000, num_steps=20, seed=0):
    """The report of chains that start from exact draws; the acceptance rate must leave something to test."""

    def exact(rng_key, num_samples):
        return jnp.asarray(target.sample(seed, num_samples), jnp.float32)

    report = check_invariance(
        jax.random.key(seed),
        algorithm,
        exact,
        num_chains=num_chains,
        num_steps=num_steps,
        modes=jnp.asarray(target.means, jnp.float32),
        false_fail=FALSE_FAIL,
    )
    assert report.details["acceptance_rate"] > 0.2
    return report


@pytest.mark.parametrize("target_name", targets(2))
@pytest.mark.parametrize("name", EXACT)
def test_exact_kernels_leave_targets_alone(name, target_name):
    target = targets(2)[target_name]
    check_stationarity(KERNELS[name].build(target.density(), 2), target).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("target_name", targets(20))
@pytest.mark.parametrize("name", EXACT)
def test_exact_kernels_leave_targets_alone_in_20_dimensions(name, target_name):
    target = targets(20)[target_name]
    check_stationarity(KERNELS[name].build(target.density(), 20), target, 8000, 20).raise_if_failed()


@jax.jit
def start_and_step(algorithm, position):
    start = algorithm.init(position, jax.random.key(0))
    return start, *algorithm.step(jax.random.key(1), start)


@pytest.mark.parametrize("name", KERNELS)
def test_states_keep_their_form_and_another_target_of_the_same_shape_compiles_nothing(name):
    position = jnp.asarray([0.3, -0.2])
    counts = []
    for target_name in ("mixture", "skewed"):
        target = LogDensity(Partial(_counted, *targets(2)[target_name].leaves()))
        before = len(_traced)
        start, state, info = start_and_step(KERNELS[name].build(target, 2), position)
        counts.append(len(_traced) - before)
    assert counts[0] > 0 and counts[1] == 0
    np.testing.assert_array_equal(start.position, position)
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), s) for s in (start, state)]
    assert forms[0] == forms[1]
    assert info.acceptance_rate.shape == () and 0.0 <= info.acceptance_rate <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_positions_may_be_pytrees(name):
    """A dictionary is the flat vector in another guise."""
    leaves = targets(3)["mixture"].leaves()
    flat = LogDensity(Partial(logdensity, *leaves))
    named = LogDensity(Partial(_on_dictionary, *leaves))
    key = jax.random.key(2)
    vector = jnp.asarray([0.1, -0.4, 0.8])
    tree = {"a": vector[:1].reshape(()), "b": vector[1:].reshape(2, 1)}
    results = []
    for target, position in ((flat, vector), (named, tree)):
        algorithm = KERNELS[name].build(target, 3)
        state, _ = algorithm.step(key, algorithm.init(position, key))
        results.append(state.position)
    assert jax.tree.structure(results[1]) == jax.tree.structure(tree)
    joined = np.concatenate([results[1]["a"].ravel(), results[1]["b"].ravel()])
    np.testing.assert_allclose(joined, results[0], rtol=1e-4, atol=1e-5)


def _on_dictionary(logits, means, inverses, freedoms, x):
    return logdensity(logits, means, inverses, freedoms, jnp.concatenate([x["a"].reshape(1), x["b"].ravel()]))


_traced = []


def _counted(logits, means, inverses, freedoms, x):
    _traced.append(None)
    return logdensity(logits, means, inverses, freedoms, x)


@pytest.mark.parametrize("name", SCORES_ONLY)
def test_kernels_for_scores_take_targets_without_a_density(name):
    target, position = (
        LogDensity(Partial(_counted, *targets(2)["mixture"].leaves())),
        jnp.asarray([0.3, -0.2]),
    )
    results = [
        start_and_step(KERNELS[name].build(each, 2), position)[1].position
        for each in (target, ScoreOnly(target))
    ]
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_double_precision_stays_double(name):
    with jax.enable_x64(True):
        algorithm = KERNELS[name].build(targets(2)["mixture"].density(), 2)
        position = jnp.asarray([0.3, -0.2])
        state, info = algorithm.step(jax.random.key(1), algorithm.init(position, jax.random.key(0)))
        assert state.position.dtype == info.acceptance_rate.dtype == jnp.float64


class _WrongMala:
    """MALA whose ratio takes |.|^2/(2h) where |.|^2/(4h) is right: the fault of a public implementation."""

    def __init__(self, target, h):
        self.target, self.h = target, h

    def init(self, position, rng_key):
        return mcmc.HamiltonianState(position, self.target.logdensity(position), None, None)

    def step(self, rng_key, state):
        key_noise, key_accept = jax.random.split(rng_key)
        x, h = state.position, self.h
        y = x + h * self.target.score(x) + jnp.sqrt(2 * h) * jax.random.normal(key_noise, x.shape)

        def log_proposal(a, b):
            return -jnp.sum((b - a - h * self.target.score(a)) ** 2) / (2 * h)

        log_ratio = self.target.logdensity(y) - state.logdensity + log_proposal(y, x) - log_proposal(x, y)
        probability = jnp.exp(jnp.minimum(log_ratio, 0.0))
        accepted = jax.random.uniform(key_accept) < probability
        x = jnp.where(accepted, y, x)
        info = mcmc.UnderdampedInfo(probability, jnp.zeros((), bool), probability)
        return mcmc.HamiltonianState(x, self.target.logdensity(x), None, None), info


jax.tree_util.register_pytree_node(
    _WrongMala, lambda self: ((self.target, self.h), None), lambda _, children: _WrongMala(*children)
)


@pytest.mark.parametrize("target_name", targets(2))
def test_the_check_finds_a_wrong_factor_two(target_name):
    target = targets(2)[target_name]
    report = check_stationarity(_WrongMala(target.density(), 0.1), target)
    assert np.abs(report.z).max() > 2 * report.bound


def test_the_check_finds_a_momentum_that_is_not_turned_round():
    """Generalised HMC without the flip: what two public implementations do."""
    target = targets(2)["mixture"]
    algorithm = mcmc.ghmc(target.density(), 0.75, persistence=0.8)
    step = algorithm.step

    def without_flip(kernel, rng_key, state):
        new, info = step.func(kernel, rng_key, state)
        momentum = jnp.where(info.is_accepted, new.momentum, -new.momentum)
        return new._replace(momentum=momentum), info

    wrong = algorithm._replace(step=Partial(without_flip, *step.args))
    check_stationarity(algorithm, target, 20_000, 25).raise_if_failed()
    report = check_stationarity(wrong, target, 20_000, 25)
    assert np.abs(report.z).max() > 2 * report.bound


def test_blackjax_kernels_pass_the_same_check():
    target = targets(2)["mixture"]
    algorithm = blackjax.nuts(target.density().logdensity, 0.4, jnp.ones(2))
    check_stationarity(algorithm, target, 1000, 5).raise_if_failed()
