"""Score estimators against the exact denoising posterior of a mixture, and of a Gaussian.

z-tests allow 5 standard errors, estimated from independent keys: a false failure has a probability of 6e-7 a check
under normality. Keys are fixed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from rows import quick
from scipy import stats

from smcdiff import GaussianMixture, estimators
from smcdiff.density import as_target
from smcdiff.estimators import ChainsState, ScoreEstimator
from smcdiff.mcmc import hmc, ula

Z = 5.0
REFERENCE = (np.array([0.2, -0.3], np.float32), 2.5)
SHARES, MEANS = np.array([0.65, 0.35]), np.array([[1.0, -0.8], [-1.2, 0.9]])
COVARIANCES = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]])
MIXTURE = GaussianMixture.create(SHARES, MEANS, COVARIANCES)
LOG_EVIDENCE = 1.3  # of the unnormalised density
CENTRES = np.array([[0.6, 0.1], [-1.5, 2.0]], np.float32)
WIDTHS = np.array([0.5, 1.5], np.float32)


ROOTS = np.linalg.cholesky(np.linalg.inv(COVARIANCES))
CONSTANTS = np.log(SHARES) + np.log(np.linalg.det(ROOTS)) - np.log(2 * np.pi) + LOG_EVIDENCE


def _log_density(x):
    """Written out, since it is compiled some fifty times."""
    logits = [
        constant - 0.5 * jnp.sum(((x - mean.astype(x.dtype)) @ root.astype(x.dtype)) ** 2)
        for constant, mean, root in zip(CONSTANTS.tolist(), MEANS, ROOTS, strict=True)
    ]
    return jnp.logaddexp(*logits)


def _hmc(density, step_size):
    return hmc(density, jnp.sqrt(2.0 * step_size), 2)


class _WalkState(NamedTuple):
    position: jax.Array
    logdensity: jax.Array


def _walk(density, step_size):
    """Random-walk Metropolis whose info says nothing, and whose state is not that of a leapfrog kernel."""

    def step(key, state):
        key_move, key_accept = jax.random.split(key)
        x = state.position
        new = x + jnp.sqrt(2.0 * step_size) * jax.random.normal(key_move, x.shape, x.dtype)
        new = _WalkState(new, density.logdensity(new))
        is_accepted = jnp.log(jax.random.uniform(key_accept)) < new.logdensity - state.logdensity
        return jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), new, state), None

    return SamplingAlgorithm(lambda x, key: _WalkState(x, density.logdensity(x)), step)


# Those with many samples, whose bias (of order one over their number) is below the standard error of 64 keys; the last
# entry is what is left to the bias of an unadjusted inner chain, in deviations of the posterior.
ROWS = {
    "importance": (estimators.importance(2000), 0.0),
    "importance from a reference": (estimators.importance(2000, reference=REFERENCE), 0.0),
    "importance, target identity": (
        estimators.importance(2000, identity="target", reference=REFERENCE, antithetic=False),
        0.0,
    ),
    "importance, combined": (estimators.importance(2000, identity="combined"), 0.0),
    "rejection": (estimators.rejection(2000), 0.0),
    "rejection from a reference": (
        estimators.rejection(2000, reference=REFERENCE, identity="combined"),
        0.0,
    ),
    "chains": (estimators.chains(8, 80, num_first_steps=100, num_starts=200), 0.0),
    "chains of hmc, target identity": (
        estimators.chains(
            8, 60, kernel=_hmc, identity="target", num_first_steps=60, num_starts=200, evaluations_per_step=2
        ),
        0.0,
    ),
    "chains of a walk, combined": (
        estimators.chains(
            8,
            120,
            kernel=_walk,
            identity="combined",
            num_first_steps=60,
            num_starts=200,
            evaluations_per_step=1,
        ),
        0.0,
    ),
    "annealed": (estimators.annealed_importance(200, 6), 0.0),
    "annealed from a reference": (
        estimators.annealed_importance(200, 6, reference=REFERENCE, identity="combined"),
        0.0,
    ),
    "annealed smc": (estimators.annealed_smc(200, 6, num_moves=2), 0.0),
    "annealed smc from a reference": (
        estimators.annealed_smc(200, 6, reference=REFERENCE, identity="combined", ess_threshold=0.99),
        0.0,
    ),
    # What is left of the pool's own error, of an effective sample size of some thousands.
    "resample-move": (
        estimators.resample_move(MIXTURE.sample(jax.random.key(8), 40_000), 200, num_moves=2),
        0.05,
    ),
    "recursive": (
        estimators.recursive(estimators.importance(60), num_chains=6, num_steps=40, step_size=0.1),
        0.1,
    ),
    "recursive in two segments": (
        estimators.recursive(
            estimators.importance(16), depth=2, segment=0.15, num_chains=3, num_steps=18, step_size=0.2
        ),
        0.12,
    ),
    "ensemble": (estimators.ensemble(MIXTURE.sample(jax.random.key(9), 40_000)), None),
}


# That of resample-move is unbiased over pools, not for one: it has tests of its own.
WITH_MARGINAL = [name for name, (row, _) in ROWS.items() if row.has_marginal and name != "resample-move"]


def _estimate(estimator, keys, centre, width):
    target = as_target(_log_density)

    def one(key):
        key_init, key = jax.random.split(key)
        state, first = estimator.init(key_init, target, centre, width)
        estimate, _ = estimator(key, target, centre, width, state)
        return estimate._replace(num_evaluations=jnp.asarray(estimate.num_evaluations + first))

    return jax.vmap(one)(keys)


_estimates = jax.jit(_estimate)


@jax.jit
def _single(estimator, rng_key, target, centre, width, state):
    return estimator(rng_key, target, centre, width, state)


@jax.jit
def _start(estimator, rng_key, target, centre, width):
    return estimator.init(rng_key, target, centre, width)


@functools.cache
def _exact(index):
    """Mean, variance and log marginal of the denoising posterior at a centre, in double precision."""
    centre, width = CENTRES[index].astype(float), float(WIDTHS[index])
    log_weights, means, covariances = [], [], []
    for share, mean, covariance in zip(SHARES, MEANS, COVARIANCES, strict=True):
        total = covariance + width**2 * np.eye(2)
        log_weights.append(np.log(share) + stats.multivariate_normal.logpdf(centre, mean, total))
        means.append(mean + covariance @ np.linalg.solve(total, centre - mean))
        covariances.append(width**2 * np.linalg.solve(total, covariance))
    log_marginal = np.logaddexp(*log_weights)
    weights, means = np.exp(np.array(log_weights) - log_marginal), np.array(means)
    mean = weights @ means
    variance = weights @ (
        np.trace(np.array(covariances), axis1=1, axis2=2) + np.sum((means - mean) ** 2, axis=1)
    )
    return mean, variance / 2, log_marginal + LOG_EVIDENCE


@pytest.mark.parametrize(
    "name",
    quick(
        ROWS,
        "importance, target identity",
        "importance, combined",
        "rejection from a reference",
        "chains",
        "annealed",
        "annealed smc from a reference",
        "resample-move",
        "recursive in two segments",
        "ensemble",
    ),
)
def test_denoised_sample_variance_and_draw_are_those_of_the_posterior(name):
    estimator, bias = ROWS[name]
    for index, (centre, width) in enumerate(zip(CENTRES, WIDTHS, strict=True)):
        mean, variance, _ = _exact(index)
        found = _estimates(estimator, jax.random.split(jax.random.key(0), 64), centre, width)
        assert np.all(found.is_valid) and np.all(np.asarray(found.ess) > 1)
        if bias is None:  # the same samples for all keys: compare with their own number
            tolerance = Z * np.sqrt(variance / float(found.ess[0]))
            assert np.all(np.abs(found.denoised[0] - mean) < tolerance)
            assert abs(float(found.variance[0]) / variance - 1) < Z * np.sqrt(2 / float(found.ess[0]))
            continue
        for values, expected in (
            (found.denoised, mean),
            (found.draw, mean),
            (found.variance[:, None], variance),
        ):
            values = np.asarray(values, float)
            error = values.std(0, ddof=1) / 8
            slack = bias * (np.sqrt(variance) if np.ndim(expected) else 2 * variance)
            assert np.all(np.abs(values.mean(0) - expected) < Z * error + slack), (values.mean(0), expected)
            # The check can see something: the error is small beside what a wrong posterior would give.
            assert np.all(error < 0.25 * np.sqrt(variance))


@pytest.mark.parametrize(
    "name",
    quick(
        WITH_MARGINAL,
        "importance",
        "importance, target identity",
        "rejection from a reference",
        "annealed",
        "annealed smc",
        "ensemble",
    ),
)
def test_marginal_is_unbiased(name):
    """With few samples, where the log of the estimate would be off."""
    few = {
        "importance": estimators.importance(4),
        "importance, target identity": estimators.importance(4, identity="target", reference=REFERENCE),
        "importance, combined": estimators.importance(4, identity="combined"),
        "importance from a reference": estimators.importance(4, reference=REFERENCE, antithetic=False),
        "annealed": estimators.annealed_importance(2, 3, steps_per_level=2),
        "annealed from a reference": estimators.annealed_importance(2, 3, reference=REFERENCE),
        "annealed smc": estimators.annealed_smc(4, 4, num_moves=2, ess_threshold=0.9),
        "annealed smc from a reference": estimators.annealed_smc(4, 3, reference=REFERENCE),
        "rejection": estimators.rejection(4),
        "rejection from a reference": estimators.rejection(4, reference=REFERENCE),
    }
    for index, (centre, width) in enumerate(zip(CENTRES, WIDTHS, strict=True)):
        _, _, log_marginal = _exact(index)
        if name == "ensemble":
            found = _estimates(ROWS[name][0], jax.random.split(jax.random.key(1), 1), centre, width)
            # The samples are those of the normalised law; a kernel density estimate with 40 000 of them.
            ratio = np.exp(float(found.log_marginal[0]) + LOG_EVIDENCE - log_marginal)
            assert abs(ratio - 1) < Z / np.sqrt(float(found.ess[0]))
            continue
        estimator = few.get(name, ROWS[name][0])
        found = _estimates(estimator, jax.random.split(jax.random.key(1), 4000), centre, width)
        ratios = np.exp(np.asarray(found.log_marginal, float) - log_marginal)
        assert abs(ratios.mean() - 1) < Z * ratios.std() / np.sqrt(len(ratios))
        assert ratios.std() / np.sqrt(len(ratios)) < 0.05


def _annealed(key):
    return estimators.annealed_smc(16, 12, num_moves=2, ess_threshold=0.7)


def _pooled(key):
    """From draws of the reference, which weigh as much as the density says."""
    mean, std = REFERENCE
    noise = jax.random.normal(key, (200, 2))
    pool = mean[None] + std * noise
    log_reference = -0.5 * jnp.sum(noise**2, axis=1) - np.log(2 * np.pi * std**2)
    log_weights = jax.vmap(_log_density)(pool) - log_reference
    return estimators.resample_move(
        pool, 16, log_weights=log_weights, num_moves=2, ess_threshold=0.7, identity="denoising"
    )


@pytest.mark.parametrize("build", [_annealed, _pooled], ids=["annealed smc", "resample-move"])
def test_a_cloud_that_is_carried_on_is_that_of_the_new_posterior_and_marginal(build):
    """From one centre and width to the others, weighed and moved; the marginal is unbiased at both."""
    target = as_target(_log_density)

    @jax.jit
    def carried(keys, order):
        def one(key):
            key_build, *keys = jax.random.split(key, 4)
            estimator = build(key_build)
            centres, widths = jnp.asarray(CENTRES)[order], jnp.asarray(WIDTHS)[order]
            state, _ = estimator.init(keys[0], target, centres[0], widths[0])
            first, state = estimator(keys[1], target, centres[0], widths[0], state)
            second, state = estimator(keys[2], target, centres[1], widths[1], state)
            return first, second, state.log_step_size

        return jax.vmap(one)(keys)

    order = np.array([1, 0])  # as noise falls; the other way round the weights have no variance
    *estimates, log_step_size = carried(jax.random.split(jax.random.key(3), 4000), order)
    for index, found in zip(order, estimates, strict=True):
        mean, variance, log_marginal = _exact(index)
        ratios = np.exp(np.asarray(found.log_marginal, float) - log_marginal)
        error = ratios.std() / np.sqrt(len(ratios))
        assert abs(ratios.mean() - 1) < Z * error and error < 0.03
        # Weighed by its marginal, a cloud is properly weighted: the mean of the posterior, without bias.
        weighed = ratios[:, None] * (np.asarray(found.denoised, float) - mean)
        error = weighed.std(0) / np.sqrt(len(ratios))
        assert np.all(np.abs(weighed.mean(0)) < Z * error) and np.all(error < 0.05 * np.sqrt(variance))
    assert np.all(np.isfinite(log_step_size)) and np.std(log_step_size) > 0


def test_a_cloud_from_samples_of_another_law_is_moved_to_the_posterior():
    """The pool is twice too wide, about the wrong point, and has no weights: the moves mend that."""
    pool = 0.8 + 2.0 * MIXTURE.sample(jax.random.key(8), 2000)
    centre, width = CENTRES[0], WIDTHS[0]
    mean, variance, _ = _exact(0)
    keys = jax.random.split(jax.random.key(0), 100)
    off = _estimates(
        estimators.resample_move(pool, 50, step_size=1e-9, identity="denoising"), keys, centre, width
    )
    found = _estimates(
        estimators.resample_move(pool, 50, num_moves=40, identity="denoising"), keys, centre, width
    )
    for values, expected in ((found.denoised, mean), (found.variance[:, None], variance)):
        values = np.asarray(values, float)
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(0) - expected) < Z * error)
        assert np.all(error < 0.03 * np.sqrt(variance))
    assert np.any(np.abs(np.mean(off.denoised, axis=0) - mean) > 0.2 * np.sqrt(variance))


def test_copies_of_a_sample_count_as_one():
    """Steps that are all rejected leave the copies together that resampling made."""
    target, estimator = as_target(_log_density), estimators.annealed_smc(16, 2, num_moves=1, step_size=1e8)
    centre, width = CENTRES[0], np.float32(3.0)
    state, _ = _start(estimator, jax.random.key(0), target, centre, width)
    found, state = _single(estimator, jax.random.key(1), target, centre, width, state)
    distinct = len(np.unique(np.asarray(state.samples[1:]), axis=0))
    assert 1 < found.ess <= distinct * (1 + 1e-5) and distinct < 12
    by_weights = 1.0 / np.sum(np.asarray(jax.nn.softmax(state.log_weights)) ** 2)
    assert found.ess < by_weights - 1.0


def test_combined_identity_is_exact_for_a_diagonal_gaussian():
    mean, variance = jnp.asarray([0.7, -1.1]), jnp.asarray([0.3, 2.0])
    target = as_target(lambda x: -0.5 * jnp.sum((x - mean) ** 2 / variance))
    centre, width = jnp.asarray([1.5, 0.4]), jnp.asarray(0.9)
    exact = (variance * centre + width**2 * mean) / (variance + width**2)
    for estimator in (
        estimators.importance(50, identity="combined"),
        estimators.rejection(50, identity="combined"),
        estimators.chains(2, 8, identity="combined"),
        estimators.annealed_importance(8, 2, identity="combined"),
        estimators.annealed_smc(8, 2, identity="combined"),
    ):
        state, _ = _start(estimator, jax.random.key(0), target, centre, width)
        found, _ = _single(estimator, jax.random.key(1), target, centre, width, state)
        np.testing.assert_allclose(found.denoised, exact, atol=2e-5)


def test_identities_trade_places_between_low_and_high_noise():
    """The denoising identity has the variance of q; the target's has r^4 times that of the gradient."""
    target, keys = as_target(_log_density), jax.random.split(jax.random.key(2), 400)
    reference, origin = (np.zeros(2, np.float32), 2.0), np.zeros(2, np.float32)

    @jax.jit
    def denoised(estimator, centre, width):
        return jax.vmap(lambda key: estimator(key, target, centre, width, None)[0].denoised)(keys)

    def spread(identity, width, centre=origin):
        estimator = estimators.importance(40, reference=reference, identity=identity)
        return np.var(denoised(estimator, centre, width), axis=0).mean()

    low, high = np.float32(0.1), np.float32(30.0)
    # Modes of deviation .55 or so: the ratios of variances are about (r / tau)^2 = .03, and 3000 and more.
    assert 0.003 < spread("target", low) / spread("denoising", low) < 0.1
    assert spread("target", high) / spread("denoising", high) > 1000
    for width in (low, high):
        least = min(spread("denoising", width), spread("target", width))
        assert spread("combined", width) < 1.5 * least
    # Between, near the mode where both are as good, the mix is better than either: .14 of the variance, known to 10 %.
    least = min(spread(identity, np.float32(0.5), CENTRES[0]) for identity in ("denoising", "target"))
    assert spread("combined", np.float32(0.5), CENTRES[0]) < 0.25 * least


def _counted():
    """A standard normal log density that counts its evaluations, alone or in batches, of value, gradient or both."""
    calls = []

    def count(x):
        calls.append(int(np.prod(x.shape[:-1])))
        return np.asarray(-0.5 * np.sum(x**2, axis=-1), np.float32), np.asarray(-x, np.float32)

    def both(x):
        shapes = (jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct(x.shape, jnp.float32))
        return jax.pure_callback(count, shapes, x, vmap_method="expand_dims")

    @jax.custom_jvp
    def function(x):
        return both(x)[0]

    @function.defjvp
    def _(primals, tangents):
        value, gradient = both(*primals)
        return value, jnp.sum(gradient * tangents[0])

    return function, calls


@pytest.mark.parametrize("name", quick(ROWS, "importance", "annealed smc", "resample-move"))
def test_double_precision(name):
    """Centres in double precision give estimates in it, whatever the precision of an estimator's own arrays."""
    with jax.enable_x64(True):
        centre, width = jnp.asarray(CENTRES[0], float), jnp.asarray(WIDTHS[0], float)
        found = _estimates(ROWS[name][0], jax.random.split(jax.random.key(4), 4), centre, width)
        assert found.is_valid.all()
        for leaf in (found.denoised, found.draw, found.variance, found.log_marginal, found.ess):
            assert leaf.dtype == np.float64
        mean, variance, _ = _exact(0)
        assert np.all(np.abs(found.denoised.mean(0) - mean) < 0.5 * np.sqrt(variance))


@pytest.mark.parametrize(
    "name",
    quick(
        ROWS,
        "importance",
        "rejection",
        "chains",
        "chains of a walk, combined",
        "annealed",
        "annealed smc",
        "resample-move",
        "ensemble",
    ),
)
def test_evaluations_are_counted(name):
    function, calls = _counted()
    target, estimator = as_target(function), ROWS[name][0]
    centre, width = jnp.asarray([0.3, 0.1]), jnp.asarray(0.8)
    state, first = _start(estimator, jax.random.key(0), target, centre, width)
    estimate, _ = _single(estimator, jax.random.key(1), target, centre, width, state)
    jax.block_until_ready(estimate.denoised)
    assert sum(calls) == first + int(estimate.num_evaluations)


def test_nothing_accepted_is_flagged():
    estimator = estimators.rejection(20, log_bound=1e3)
    target = as_target(_log_density)
    state, _ = estimator.init(jax.random.key(0), target, jnp.zeros(2), jnp.ones(()))
    found, bound = _single(estimator, jax.random.key(1), target, jnp.zeros(2), jnp.ones(()), state)
    assert not found.is_valid and found.ess == 0 and bound == 1e3
    assert np.all(np.isfinite(found.denoised))  # what importance sampling would say


def test_a_bound_that_is_exceeded_is_flagged():
    """Not where rounding does it."""
    target, is_valid = as_target(lambda x: -0.5 * jnp.sum(x**2)), []
    for bound in (0.0, -1e-7, -0.5):
        estimator = estimators.rejection(200, log_bound=bound)
        state, _ = estimator.init(jax.random.key(0), target, jnp.zeros(2), jnp.ones(()))
        found, state = _single(estimator, jax.random.key(1), target, jnp.zeros(2), jnp.ones(()), state)
        is_valid.append(bool(found.is_valid))
        assert state == np.float32(bound) and found.ess > 1
    assert is_valid == [True, True, False]


def test_chains_that_do_not_move_are_flagged():
    target, centre, width = as_target(_log_density), jnp.asarray([0.6, 0.1]), jnp.asarray(0.5)
    for step_size, is_valid in ((0.5, True), (1e12, False)):
        estimator = estimators.chains(3, 6, step_size=step_size, num_first_steps=6)
        state, _ = _start(estimator, jax.random.key(0), target, centre, width)
        found, _ = _single(estimator, jax.random.key(1), target, centre, width, state)
        assert bool(found.is_valid) is is_valid and 1 <= found.ess <= 9


def test_chains_beyond_the_density_are_flagged_until_they_are_back():
    """Kernels that never reject walk where the density vanishes, and tell nothing; others stay there, or come in."""
    target = as_target(lambda x: jnp.where(x[0] > 1.0, -0.5 * jnp.sum(x**2), -jnp.inf))
    width = jnp.asarray(0.5)
    never = estimators.chains(3, 6, kernel=ula, evaluations_per_step=1)
    state = ChainsState(jnp.full((3, 2), -9.0), jnp.log(0.01))
    found, _ = _single(never, jax.random.key(1), target, jnp.asarray([-9.0, -9.0]), width, state)
    assert not found.is_valid
    state = ChainsState(jnp.full((3, 2), 0.5), jnp.zeros(()))
    found, _ = _single(estimators.chains(3, 60), jax.random.key(1), target, jnp.ones(2), width, state)
    assert found.is_valid and found.denoised[0] > 1.0


def test_a_single_chain_has_an_effective_sample():
    """Its spread is not known: it counts as one sample, and does not make a particle's least number NaN."""
    target, centre, width = as_target(_log_density), jnp.asarray([0.6, 0.1]), jnp.asarray(0.5)
    for estimator in (
        estimators.chains(1, 20),
        estimators.recursive(estimators.importance(8), num_chains=1, num_steps=4),
    ):
        state, _ = _start(estimator, jax.random.key(0), target, centre, width)
        found, _ = _single(estimator, jax.random.key(1), target, centre, width, state)
        assert found.is_valid and found.ess == 1


@pytest.mark.parametrize("num_steps", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_the_recursive_effective_sample_size_is_that_of_its_mean(num_steps):
    """What the spread over keys says of it, whatever the inner estimates say of theirs."""
    estimator = estimators.recursive(estimators.importance(200), num_chains=8, num_steps=num_steps)
    found = _estimates(estimator, jax.random.split(jax.random.key(0), 64), CENTRES[1], WIDTHS[1])
    spread = np.mean(np.var(np.asarray(found.denoised, float), axis=0))
    exact = np.mean(found.variance) / spread
    assert 0.5 < np.median(found.ess) / exact < 2.0


@pytest.mark.parametrize(
    "name", quick([*WITH_MARGINAL[:-1], "chains"], "importance", "rejection", "annealed smc", "chains")
)
def test_a_density_that_vanishes_at_every_proposal_is_flagged(name):
    target = as_target(lambda x: jnp.where(x[0] > 1e3, 0.0, -jnp.inf) - 0.5 * jnp.sum(x**2))
    estimator = ROWS[name][0]
    state, _ = _start(estimator, jax.random.key(0), target, jnp.zeros(2), jnp.ones(()))
    found, _ = _single(estimator, jax.random.key(1), target, jnp.zeros(2), jnp.ones(()), state)
    assert not found.is_valid
    assert not estimator.has_marginal or found.log_marginal == -jnp.inf


def test_running_bound_grows_and_accepts_exactly():
    """The bound is the greatest value seen; a draw of a bounded target is exact once it has been reached."""
    target, estimator = as_target(_log_density), estimators.rejection(500)
    state, _ = estimator.init(jax.random.key(0), target, jnp.zeros(2), jnp.ones(()))
    assert state == -jnp.inf
    bounds = []
    for index in range(4):
        _, state = _single(estimator, jax.random.key(index), target, jnp.zeros(2), jnp.ones(()), state)
        bounds.append(float(state))
    assert bounds == sorted(bounds) and np.isfinite(bounds[0])


def test_chains_keep_their_place_and_their_step_size():
    """From a far start and a step size that is 50 times too long, the acceptance rate comes to its target."""
    target, centre, width = as_target(_log_density), jnp.asarray([0.6, 0.1]), jnp.asarray(0.5)
    estimator = estimators.chains(8, 80, step_size=25.0)
    state, _ = _start(estimator, jax.random.key(0), target, centre, width)
    _, new = _single(estimator, jax.random.key(1), target, centre, width, state)
    assert float(state.log_step_size) < np.log(5.0) and new.positions.shape == (8, 2)
    assert not np.array_equal(state.positions, new.positions)


class _Nothing(ScoreEstimator):
    has_marginal = False

    def __call__(self, rng_key, target, centre, width, state):
        raise NotImplementedError


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"^num_samples must be even"):
        estimators.importance(3)
    with pytest.raises(ValueError, match=r"^num_samples must be a positive integer"):
        estimators.importance(0)
    with pytest.raises(ValueError, match=r"^identity must be one of"):
        estimators.importance(4, identity="score")
    with pytest.raises(ValueError, match=r"^reference must be None or a pair"):
        estimators.importance(4, reference=3.0)
    with pytest.raises(ValueError, match=r"^the reference's std must be positive"):
        estimators.rejection(4, reference=(0.0, -1.0))
    with pytest.raises(ValueError, match=r"^step_size must be positive"):
        estimators.chains(step_size=0.0)
    with pytest.raises(ValueError, match=r"^evaluations_per_step is needed beside kernel"):
        estimators.chains(kernel=_hmc)
    with pytest.raises(ValueError, match=r"^target_acceptance must lie in"):
        estimators.annealed_importance(4, target_acceptance=1.5)
    with pytest.raises(ValueError, match=r"^num_moves must be a positive integer"):
        estimators.annealed_smc(4, num_moves=0)
    with pytest.raises(ValueError, match=r"^ess_threshold must lie in \[0, 1\)"):
        estimators.annealed_smc(4, ess_threshold=1.0)
    with pytest.raises(ValueError, match=r"^num_moves must be a positive integer"):
        estimators.resample_move(np.eye(3), num_moves=0)
    with pytest.raises(ValueError, match=r"^samples must have the shape"):
        estimators.resample_move(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"^samples must not all be the same"):
        estimators.resample_move(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"^log_weights must have the shape \(3,\)"):
        estimators.resample_move(np.eye(3), log_weights=np.zeros(2))
    with pytest.raises(TypeError, match=r"^base must be an estimator"):
        estimators.recursive(_log_density)
    with pytest.raises(ValueError, match=r"^depth must be a positive integer"):
        estimators.recursive(_Nothing(), depth=0)
    with pytest.raises(ValueError, match=r"^log_weights must have the shape \(3,\)"):
        estimators.ensemble(np.zeros((3, 2)), np.zeros(2))
