"""Calibration of samplers whose posterior is known exactly, and of the same samplers with faults.

The model is x ~ N(m, C) in two dimensions, y ~ N(A x, R), whose posterior is normal. Tests of right samplers have a
false-fail rate of 1e-5, and keys are fixed. The slow studies repeat them 200 times or more at a rate of .05: more
failures than a binomial number exceeds with probability 1e-4 are too many.
"""

import itertools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

import smcdiff
from smcdiff import calibration as cal
from smcdiff.calibration.uniformity import ecdf_p_values

RIGHT = 1e-5
MEAN = np.array([0.5, -1.0])
COVARIANCE = np.array([[1.0, 0.4], [0.4, 0.5]])
MATRIX = np.array([[1.0, 0.5], [0.2, -0.7]])
NOISE = np.array([0.5, 0.8])  # deviations
POSTERIOR = np.linalg.inv(np.linalg.inv(COVARIANCE) + MATRIX.T @ np.diag(NOISE**-2) @ MATRIX)
PRECISE = np.linalg.inv(COVARIANCE) @ MEAN
GAIN = MATRIX.T @ np.diag(NOISE**-2)


def _array(value):
    return jnp.asarray(value, float)


@jax.jit
def prior(rng_key):
    return _array(MEAN) + _array(np.linalg.cholesky(COVARIANCE)) @ jax.random.normal(rng_key, (2,))


@jax.jit
def simulate(rng_key, x):
    return _array(MATRIX) @ x + _array(NOISE) * jax.random.normal(rng_key, (2,))


@jax.jit
def _posterior(width, sign, rng_key, y):
    """100 draws of the posterior, right where width and sign are 1."""
    mean = _array(POSTERIOR) @ (_array(PRECISE) + sign * _array(GAIN) @ y)
    noise = jax.random.normal(rng_key, (100, 2)) @ _array(np.linalg.cholesky(POSTERIOR)).T
    return mean[None] + width * noise


def sampler(width=1.0, sign=1.0):
    return Partial(_posterior, jnp.asarray(width), jnp.asarray(sign))


def _log_likelihood(x, y):
    return -0.5 * jnp.sum(((y - _array(MATRIX) @ x) / _array(NOISE)) ** 2)


def quantities(x, y):
    """The parameter and the log likelihood."""
    return {"x": x, "fit": _log_likelihood(x, y)}


def calibrate(the_sampler, num_data_sets=300, seed=0, **options):
    options = {"functions": quantities, "thin": 1, "progress": False, **options}
    return cal.calibrate(
        jax.random.key(seed), prior, simulate, the_sampler, num_data_sets=num_data_sets, **options
    )


@pytest.fixture(scope="module")
def right():
    return calibrate(sampler(), references=_reference)


@jax.jit
def _reference(rng_key, y):
    """A crude estimate that depends on the data, and noise."""
    return _array(np.linalg.inv(MATRIX)) @ y + jax.random.normal(rng_key, (2,))


def test_a_right_sampler_is_calibrated(right):
    assert right.names == ("fit", "x[0]", "x[1]", "distance to the reference")
    assert right.pit.shape == right.ranks.shape == right.truths.shape == (300, 4)
    assert right.columns("x") == slice(1, 3)
    assert np.all(right.num_draws == 100) and right.ranks.min() >= 0 and right.ranks.max() <= 100
    np.testing.assert_array_equal(np.floor(right.pit.astype(float) * 101).clip(0, 100), right.ranks)
    for method in ("ecdf", "coverage", "chi_square"):
        test = cal.rank_test(right, method=method, false_fail=RIGHT).raise_if_failed()
        assert test.p_values.shape == (4,) and "passed" in str(test)
        assert test.combined == min(1.0, 4 * test.p_values.min())
    # Posterior means and deviations are those of 100 draws: 10 % and 7 %, a deviation each.
    error = (right.stds[:, 1:3] / np.sqrt(np.diag(POSTERIOR)) - 1) / np.sqrt(1 / 200)
    assert abs(error.mean()) < 5 / np.sqrt(300) + 0.1


@pytest.mark.parametrize(
    ("fault", "seen"), [({"width": 0.5}, "narrow"), ({"width": 2.0}, "wide"), ({"sign": -1.0}, "truths lie")]
)
def test_a_wrong_sampler_is_found(fault, seen):
    test = cal.rank_test(calibrate(sampler(**fault), 100))
    assert test.combined < 1e-6
    with pytest.raises(AssertionError, match=r"rank test .*: failed") as error:
        test.raise_if_failed()
    assert seen in str(error.value)


@jax.jit
def _from_prior(rng_key, y):
    return jax.vmap(prior)(jax.random.split(rng_key, 100))


def test_the_prior_passes_for_the_parameter_and_fails_for_functions_of_the_data():
    """The weakness of ranks of parameters (arXiv 2211.02383), and of references that ignore the data."""
    found = calibrate(_from_prior, 200, references=_reference)
    p_values = dict(zip(found.names, cal.rank_test(found).p_values, strict=True))
    assert p_values["x[0]"] > RIGHT and p_values["x[1]"] > RIGHT
    assert p_values["fit"] < 1e-8 and p_values["distance to the reference"] < 1e-4


@jax.jit
def _importance(rng_key, y):
    draws = jax.vmap(prior)(jax.random.split(rng_key, 2000))
    return draws, jax.vmap(_log_likelihood, (0, None))(draws, y)


def test_weights_are_respected():
    found = calibrate(_importance, 200)
    assert cal.rank_test(found, false_fail=RIGHT).passed
    assert np.all(found.num_draws < 1900) and np.median(found.num_draws) > 300
    without = calibrate(Partial(_first_of_two, _importance), 200)
    assert not cal.rank_test(without).passed
    np.testing.assert_array_equal(without.num_draws, 2000)


def _first_of_two(the_sampler, rng_key, y):
    return the_sampler(rng_key, y)[0]


@jax.jit
def _slow_chain(rng_key, y):
    """An autoregressive chain of correlation .9 in the posterior, from an exact draw."""
    mean = _array(POSTERIOR) @ (_array(PRECISE) + _array(GAIN) @ y)
    noise = jax.random.normal(rng_key, (1001, 2)) @ _array(np.linalg.cholesky(POSTERIOR)).T

    def step(x, noise):
        x = 0.9 * x + np.sqrt(1 - 0.81) * noise
        return x, x

    return mean[None] + jax.lax.scan(step, noise[0], noise[1:])[1]


def test_chains_are_thinned_to_near_independence():
    """Effective draws: 1000 * .1 / 1.9 = 53, and half of that is kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = calibrate(_slow_chain, 60, thin=None)
    assert 15 < np.median(found.num_draws) < 45
    assert cal.rank_test(found, false_fail=RIGHT).passed
    np.testing.assert_array_equal(calibrate(_slow_chain, 2, thin=50).num_draws, 20)


def test_ties_are_in_random_order():
    """A function with three values: ranks of 20 draws are uniform all the same."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, size=(5000, 21)).astype(float)
    places = cal.pit(values[:, 0], values[:, 1:], rng.uniform(size=5000))
    assert cal.rank_test(places, false_fail=RIGHT).passed
    counts = np.bincount(np.floor(places * 21).astype(int), minlength=21)
    assert stats.chisquare(counts).pvalue > RIGHT
    assert not cal.rank_test(cal.pit(values[:, 0], values[:, 1:], np.zeros(5000))).passed


def test_transforms_of_weighted_draws():
    rng = np.random.default_rng(1)
    truth, draws, uniform = rng.normal(size=7), rng.normal(size=(7, 30)), rng.uniform(size=7)
    equal = cal.pit(truth, draws, uniform)
    np.testing.assert_allclose(cal.pit(truth, draws, uniform, np.full((7, 30), -3.0)), equal, rtol=1e-12)
    # Draws of no weight do not count, whatever they are.
    log_weights = np.where(np.arange(30) < 25, 2.0, -np.inf)
    dead = np.where(np.arange(30) < 25, draws, np.nan)
    np.testing.assert_allclose(
        cal.pit(truth, dead, uniform, log_weights[None]), cal.pit(truth, draws[:, :25], uniform), rtol=1e-12
    )
    # By hand: weights .5, .3, .2 and a truth above the first two.
    weights = np.array([0.5, 0.3, 0.2])
    ess = 1 / np.sum(weights**2)
    found = cal.pit(np.array(0.5), np.array([0.0, 0.4, 0.9]), np.array(0.25), np.log(weights))
    assert found == pytest.approx((ess * 0.8 + 0.25) / (ess + 1))
    with pytest.raises(ValueError, match="some draw must have a weight"):
        cal.pit(truth, draws, uniform, np.full((7, 30), -np.inf))


class Killed(Exception):
    pass


@pytest.mark.parametrize("dies_at", [5, 6])
def test_an_interrupted_calibration_goes_on_to_the_same_numbers(tmp_path, monkeypatch, capsys, dies_at):
    """Killed before a data set is written, and between it and the state; then longer than at first."""
    options = {"references": _reference, "checkpoint": tmp_path / "run"}
    whole = calibrate(sampler(), 6, references=_reference, progress=True)
    replace, written = os.replace, []

    def dying(source, target):
        written.append(target)
        if len(written) == dies_at:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        calibrate(sampler(), 4, **options)
    monkeypatch.undo()
    for num_data_sets in (6, 6, 3):
        found = calibrate(sampler(), num_data_sets, **options)
        for ours, theirs in zip(found[2:], whole[2:], strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs[:num_data_sets])
    with pytest.raises(ValueError, match="belongs to another run"):
        calibrate(sampler(width=0.9), 6, **options)


def test_what_samplers_may_return():
    x = np.arange(24.0).reshape(2, 4, 3)
    trace = smcdiff.Trace({"x": x}, None, None)
    assert cal.as_draws(trace).num_chains == 2
    np.testing.assert_array_equal(cal.as_draws(trace).values["x"], x.reshape(8, 3))
    result = smcdiff.SMCResult(x, np.log(np.full((2, 4), 0.25)), np.log([0.25, 0.75]), None, None)
    draws = cal.as_draws(result)
    np.testing.assert_allclose(np.exp(draws.log_weights), np.repeat([0.0625, 0.1875], 4))
    pair = cal.as_draws([x[0], x[1]])
    assert pair.log_weights is None and len(pair.values) == 2
    with pytest.raises(ValueError, match="belong in a list or a dictionary"):
        cal.as_draws((x[0], x[1]))
    with pytest.raises(ValueError, match="one leading axis"):
        cal.as_draws({"a": x, "b": x[:, 0, 0, None] * np.ones((1, 4)).T[:3].T[:, :1], "c": np.zeros(5)})


def _broken(rng_key, y):
    return jnp.full((10, 2), jnp.nan)


def test_mistakes_are_refused(right):
    with pytest.raises(ValueError, match="data set 0: the function 'fit' is NaN at the draws"):
        calibrate(_broken, 3)
    with pytest.raises(ValueError, match="num_data_sets must be a positive integer"):
        calibrate(sampler(), 0)
    with pytest.raises(ValueError, match="thin must be a positive integer"):
        calibrate(sampler(), 2, thin=0)
    with pytest.raises(ValueError, match="method must be ecdf, coverage or chi_square"):
        cal.rank_test(right, method="ks")
    with pytest.raises(ValueError, match="between 0 and 1"):
        cal.rank_test(np.array([0.2, 1.4]))
    with pytest.raises(ValueError, match="name must be one of"):
        cal.local_coverage(right)
    with pytest.raises(ValueError, match="name must be one of"):
        cal.local_coverage(right, "z")


@pytest.mark.parametrize(("num_points", "num_data_sets"), [(2, 3), (3, 5), (4, 6)])
def test_the_ecdf_test_is_exact_by_enumeration(num_points, num_data_sets):
    """All counts of a few numbers in a few bins, each with its multinomial probability."""
    law = stats.multinomial(num_data_sets, np.full(num_points, 1 / num_points))
    p_values, probabilities = [], []
    for cuts in itertools.combinations_with_replacement(range(num_points), num_data_sets):
        counts = np.bincount(cuts, minlength=num_points)
        values = np.repeat((np.arange(num_points) + 0.5) / num_points, counts)
        p_values.append(ecdf_p_values(values[:, None], num_points)[0])
        probabilities.append(law.pmf(counts))
    p_values, probabilities = np.array(p_values), np.array(probabilities)
    for p in p_values:  # P(p-value <= p) = p at every p that occurs
        assert probabilities[p_values <= p + 1e-12].sum() == pytest.approx(p, abs=1e-10)
    for prob in (0.5, 0.8):
        bands = cal.ecdf_bands(num_points, num_data_sets, prob)
        assert bands.prob >= prob - 1e-12
        assert probabilities[p_values > 1 - prob + 1e-12].sum() == pytest.approx(bands.prob, abs=1e-10)


def test_ecdf_bands_and_p_values_are_one_test():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.uniform(size=(150, 300)), rng.beta(1.3, 1.0, size=(150, 300))], axis=1)
    bands = cal.ecdf_bands(40, 150, 0.9)
    assert 0.9 <= bands.prob < 0.91
    ecdf = (values[None] <= bands.points[:, None, None]).mean(axis=1)
    outside = ((ecdf < bands.lower[:, None] - 1e-12) | (ecdf > bands.upper[:, None] + 1e-12)).any(axis=0)
    p_values = ecdf_p_values(values, 40)
    np.testing.assert_array_equal(outside, p_values <= 0.1)
    # Of 300 uniform columns 10 % are outside: standard error 1.7 %.
    assert abs(outside[:300].mean() - 0.1) < 5 * 0.017 and outside[300:].mean() > 0.5
    wide = cal.ecdf_bands(10, 150, 0.999)
    assert np.all(wide.lower[[0, -1]] == [0, 1]) and np.all(wide.upper[[0, -1]] == [0, 1])


def test_expected_coverage(right):
    coverage = cal.expected_coverage(right, num_levels=10)
    assert coverage.coverage.shape == (11, 4) and coverage.levels[9] == 0.9
    assert np.all(coverage.p_values > RIGHT / 4)
    inside = np.abs(2 * right.pit - 1) <= 0.9
    np.testing.assert_allclose(coverage.coverage[9], inside.mean(axis=0))
    assert coverage.std_error[9] == pytest.approx(np.sqrt(0.09 / 300))
    assert coverage.mean[9] == pytest.approx(inside.mean())
    # Functions of a data set depend on each other: more than for 1200 independent ones, at most as for 300.
    assert np.sqrt(0.09 / 1200) < coverage.mean_std_error[9] < np.sqrt(0.09 / 300)


def _normal_study(rng, num_data_sets, width=1.0, shift=0.0, num_draws=100, num_repetitions=1):
    """Transforms (J, repetitions) of truths N(0, 1) among draws N(shift, width^2)."""
    truth = rng.normal(size=(num_data_sets, num_repetitions))
    draws = shift + width * rng.normal(size=(*truth.shape, num_draws)).astype(np.float32)
    return cal.pit(truth, draws, rng.uniform(size=truth.shape))


def test_a_posterior_that_is_too_narrow_by_a_tenth_is_found_by_its_coverage():
    values = _normal_study(np.random.default_rng(3), 3000, width=0.9)
    test = cal.rank_test(values, method="coverage")
    assert not test.passed and test.spread[0] > 1
    coverage = cal.expected_coverage(values)
    # The central 90 % interval of N(0, .81) holds 86 % of N(0, 1).
    exact = 2 * stats.norm.cdf(0.9 * stats.norm.ppf(0.95)) - 1
    assert abs(coverage.coverage[18, 0] - exact) < 5 * np.sqrt(exact * (1 - exact) / 3000) + 0.005
    assert coverage.coverage[18, 0] < coverage.lower[18] and coverage.p_values[0] < 1e-3
    assert cal.rank_test(
        _normal_study(np.random.default_rng(4), 3000), method="coverage", false_fail=RIGHT
    ).passed


def _modes(rng, size, weight):
    """Two normal modes of deviation .5 at -2 and 2, the second with this weight."""
    return np.where(rng.uniform(size=size) < weight, 2.0, -2.0) + 0.5 * rng.normal(size=size)


def test_a_lost_mode_of_weight_a_tenth_is_found():
    rng = np.random.default_rng(5)
    truth, uniform = _modes(rng, 500, 0.1), rng.uniform(size=500)
    lost, whole = (cal.pit(truth, _modes(rng, (500, 100), weight), uniform) for weight in (0.0, 0.1))
    assert cal.rank_test(whole, false_fail=RIGHT).passed
    test = cal.rank_test(lost)
    assert test.combined < 1e-6 and test.deviation[0] > 0


def _squared_distance(x, reference):
    return jnp.sum((x["x"] - reference["x"]) ** 2)


def test_tarp():
    rng = np.random.default_rng(6)
    data = rng.normal(size=(400, 3))
    truths, references = ({"x": data + scale * rng.normal(size=data.shape)} for scale in (1.0, 1.5))
    cloud = data[:, None] + rng.normal(size=(400, 200, 3))

    def curve(draws, **options):
        return cal.tarp(jax.random.key(0), truths, {"x": draws}, references, **options)

    right = curve(cloud)
    assert right.p_values[0] > RIGHT and right.coverage.shape == (21, 1)
    np.testing.assert_array_equal(curve(cloud, distance=_squared_distance).coverage, right.coverage)
    assert curve(data[:, None] + 0.6 * (cloud - data[:, None])).p_values[0] < 1e-6
    # Draws of the prior, N(0, 2): the references depend on the data.
    assert curve(np.sqrt(2) * rng.normal(size=cloud.shape)).p_values[0] < 1e-6
    # Draws of N(data, 4), weighed to be of N(data, 1).
    wide = data[:, None] + 2.0 * (cloud - data[:, None])
    log_weights = -0.5 * 0.75 * np.sum((wide - data[:, None]) ** 2, axis=-1)
    assert curve(wide, log_weights=log_weights).p_values[0] > RIGHT
    assert curve(wide).p_values[0] < 1e-6
    with pytest.raises(ValueError, match="references must be like a truth"):
        cal.tarp(jax.random.key(0), truths, {"x": cloud}, {"x": np.zeros((400, 2))})


def test_local_coverage_shows_where_intervals_are_too_narrow():
    """An image of 3 x 4 pixels: the ones of largest deviation come out half as wide as they are."""
    rng = np.random.default_rng(7)
    scale = 0.1 + rng.permutation(12).reshape(3, 4) / 4
    width = np.where(scale > 2.0, 0.5, 1.0)
    truth = scale * rng.normal(size=(400, 3, 4))
    draws = (width * scale)[None, None] * rng.normal(size=(400, 99, 3, 4))
    places = cal.pit(truth, np.moveaxis(draws, 1, -1), rng.uniform(size=truth.shape))
    stds = draws.std(axis=1)
    flat = [part.reshape(400, 12) for part in (places, np.zeros_like(places), truth, truth, stds)]
    found = cal.Calibration(
        tuple("abcdefghijkl"), {"x": (3, 4)}, flat[0], flat[1], np.full(400, 99), *flat[2:]
    )
    local = cal.local_coverage(found, level=0.9, num_bins=4)
    assert local.coverage.shape == local.z.shape == (3, 4)
    assert np.all((local.z < -6) == (width < 1)) and np.abs(local.z[width == 1]).max() < 5
    # Pixels here are independent of each other, so the standard error of a bin is the binomial one, within a tenth.
    assert local.bin_counts.sum() == 4800
    binomial = np.sqrt(0.09 / local.bin_counts)
    np.testing.assert_allclose(local.bin_std_error[0], binomial[0], rtol=0.2)
    halved = stds.reshape(-1) > local.bin_edges[0]
    assert halved.any() and np.any(local.bin_coverage < 0.9 - 6 * local.bin_std_error)


def _replicate(rng_key, x):
    return x + jax.random.normal(rng_key, (20,))


def _statistics(x, y):
    return {"mean": jnp.mean(y), "largest": jnp.max(y), "misfit": jnp.sum((y - x) ** 2)}


def test_posterior_predictive_check():
    """y_i ~ N(x, 1), a flat prior: x ~ N(mean y, 1/20) and the replicated mean is N(mean y, 2/20), so p = 1/2."""
    rng = np.random.default_rng(8)
    y = rng.normal(size=20).astype(np.float32)
    y[0] = 6.0
    draws = (y.mean() + rng.normal(size=4000) / np.sqrt(20)).astype(np.float32)
    check = cal.posterior_predictive_check(jax.random.key(0), draws, _replicate, y, _statistics)
    assert check.names == ("largest", "mean", "misfit") and check.replicated.shape == (4000, 3)
    assert abs(check.p_values[1] - 0.5) < 5 * check.std_error[1] < 0.05
    assert check.p_values[0] < 0.01 and check.p_values[2] < 0.05  # the outlier
    # Draws of a wider normal elsewhere, with weights, agree with those of the posterior.
    wide = (y.mean() + 0.3 + rng.normal(size=4000) * 2 / np.sqrt(20)).astype(np.float32)
    log_weights = -0.5 * 20 * ((wide - y.mean()) ** 2 - (wide - y.mean() - 0.3) ** 2 / 4)
    weighted = cal.posterior_predictive_check(
        jax.random.key(1), wide, _replicate, y, _statistics, log_weights=log_weights
    )
    error = np.hypot(weighted.std_error, check.std_error)
    assert np.all(np.abs(weighted.p_values - check.p_values) < 5 * error + 1e-9)
    exact = stats.norm.sf(0.3, scale=np.sqrt(2 / 20))  # of a mean that is larger by .3
    shifted = cal.posterior_predictive_check(
        jax.random.key(2), draws, _replicate, y + np.float32(0.3), _statistics
    )
    assert abs(shifted.p_values[1] - exact) < 5 * shifted.std_error[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ecdf", "coverage", "chi_square"])
def test_right_posteriors_pass_at_the_stated_rate(method):
    """2000 calibrations of 200 data sets each."""
    values = _normal_study(np.random.default_rng(10), 200, num_draws=60, num_repetitions=2000)
    p_values = cal.rank_test(values, method=method).p_values
    # Three functions that are one: Bonferroni's bound holds, whatever the dependence.
    combined = np.minimum(1, 3 * p_values)
    for rate in (0.01, 0.05, 0.2):
        few, many = (stats.binom.isf(p, 2000, share * rate) for p, share in ((1 - 1e-4, 0.7), (1e-4, 1.0)))
        assert few < (p_values <= rate).sum() < many
        assert (combined <= rate).sum() < many


@pytest.mark.slow
def test_planted_faults_are_found_nearly_always():
    """200 calibrations each: 10 % too narrow with 4000 data sets, a lost mode and a wrong sign with 300."""
    rng = np.random.default_rng(11)
    narrow = np.column_stack(
        [_normal_study(rng, 4000, width=0.9, num_draws=50, num_repetitions=10) for _ in range(20)]
    )
    assert np.mean(cal.rank_test(narrow, method="coverage").p_values < 1e-3) > 0.95
    truth, uniform = _modes(rng, (300, 200), 0.1), rng.uniform(size=(300, 200))
    lost = cal.pit(truth, _modes(rng, (300, 200, 60), 0.0), uniform)
    assert np.mean(cal.rank_test(lost).p_values < 1e-3) > 0.99
    data = rng.normal(size=(300, 200))
    signed = cal.pit(
        0.5 * data + 0.5 * rng.normal(size=data.shape),
        -0.5 * data[..., None] + 0.5 * rng.normal(size=(*data.shape, 60)),
        uniform,
    )
    assert np.mean(cal.rank_test(signed).p_values < 1e-3) > 0.99
