"""Targets: density, sampler and facts belong to one law.

A row in `ROWS` brings the suite. Statistical checks allow 5 standard errors, estimated from independent samples: a
false failure has a probability of about 6e-7 a check, a few hundred checks in all. Keys are fixed.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcdiff import targets
from smcdiff.density import HasLogDensity, HasLogRatio, HasScore, as_target
from smcdiff.targets.phi4_chain import transfer_facts

Z = 5.0


class Row(NamedTuple):
    """A target with an exact sampler.

    build: without arguments.
    evidence: how it is checked; "plane", a quadrature in two dimensions, "fit", importance sampling from Student laws
        fitted to each mode, or None, where another row has the same formula.
    heavy: whether fourth moments are too large for the standard error of a deviation.
    slow: for rows that share their code with a faster one.
    """

    build: Callable
    evidence: str | None
    heavy: bool = False
    slow: bool = False
    num_samples: int = 20_000


ROWS = {
    "eight modes": Row(lambda: targets.eight_modes(3.0), "plane", slow=True),
    "grid modes": Row(lambda: targets.grid_modes(), "plane", slow=True),
    "forty modes": Row(lambda: targets.forty_modes(), "plane"),
    "forty wide modes": Row(lambda: targets.forty_modes(side=80.0, std=math.log1p(math.e)), None),
    "forty modes, 20-d": Row(lambda: targets.forty_modes(20), None, slow=True),
    "two modes": Row(lambda: targets.two_modes(8), "fit"),
    "two modes, 128-d": Row(lambda: targets.two_modes(128), None, slow=True),
    "two modes, 0.1": Row(lambda: targets.two_modes(2, 0.1), "plane", slow=True),
    "skewed modes": Row(lambda: targets.skewed_modes(), "plane", slow=True),
    "skewed modes, 5-d": Row(lambda: targets.skewed_modes(5), "fit", slow=True),
    "overlapping modes": Row(
        lambda: targets.gaussian_modes(
            [0.5, 0.2, 0.3],
            [[0.0, 0.0], [2.0, 0.5], [-1.0, 2.0]],
            [[[1.0, 0.3], [0.3, 0.4]]] * 2 + [np.eye(2)],
        ),
        "plane",
    ),
    "rings": Row(lambda: targets.rings(), "plane"),
    "wide rings": Row(lambda: targets.rings(2, 0.24), "plane", slow=True),
    "funnel": Row(lambda: targets.funnel(), None, heavy=True),
    "short funnel": Row(lambda: targets.funnel(2, 0.5), "plane"),
    "banana": Row(lambda: targets.banana(), "plane"),
    "double well": Row(lambda: targets.double_well(4, 3, 2.0), "fit"),
    "many well": Row(lambda: targets.many_well(4), "fit", slow=True),
    "many well, 32-d": Row(lambda: targets.many_well(), None, slow=True),
    "student mixture": Row(lambda: targets.student_mixture(), "plane", heavy=True),
    "student mixture, 9": Row(lambda: targets.student_mixture(freedom=9.0, side=2.0), None),
    "phi4 chain": Row(lambda: targets.phi4_chain(field=0.025), None, slow=True, num_samples=2000),
    "phi4 chain, 2": Row(
        lambda: targets.phi4_chain(2, field=-0.1, coupling=0.5, inverse_temperature=3.0),
        "plane",
        num_samples=3000,
    ),
    "phi4 chain, 6": Row(
        lambda: targets.phi4_chain(6, field=0.3, inverse_temperature=3.0), "fit", slow=True, num_samples=5000
    ),
    "eight schools": Row(lambda: targets.eight_schools(), "fit"),
    "centered eight schools": Row(lambda: targets.eight_schools(centered=True), None, slow=True),
}
WITHOUT_MODES = {
    name for name in ROWS if any(word in name for word in ("funnel", "banana", "student", "schools"))
}


class Drawn(NamedTuple):
    """Samples (n, d) of a target, and what it says of them."""

    x: np.ndarray
    logdensity: np.ndarray
    score: np.ndarray
    gradient: np.ndarray | None
    labels: np.ndarray | None


@functools.cache
def build(name):
    return ROWS[name].build()


@functools.cache
def drawn(name) -> Drawn:
    sample = draw(build(name), jax.random.key(sum(name.encode())), ROWS[name].num_samples)
    return jax.tree.map(np.asarray, sample)


@functools.partial(jax.jit, static_argnames="num_samples")
def draw(target, key, num_samples):
    x = target.sample(key, num_samples)
    labels = jax.vmap(target.mode_labels)(x) if isinstance(target, targets.HasModes) else None
    closed_form = type(target).score is not targets.Target.score
    gradient = jax.vmap(jax.grad(target.logdensity))(x) if closed_form else None
    return Drawn(x, jax.vmap(target.logdensity)(x), jax.vmap(target.score)(x), gradient, labels)


@jax.jit
def logdensities(target, x):
    return jax.vmap(target.logdensity)(x)


def assert_mean(values, expected, slack=0.0):
    """Means over samples (n, ...) are within 5 standard errors."""
    values = np.asarray(values, float)
    error = values.std(axis=0) / math.sqrt(len(values))
    gap = np.abs(values.mean(axis=0) - expected)
    assert np.all(gap <= Z * error + slack), np.max(gap / np.maximum(error, 1e-300))


def rows(chosen=lambda name: True):
    """Parameters of a test: names of rows."""
    marks = {True: [pytest.mark.slow], False: []}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[row.slow]) for name, row in ROWS.items() if chosen(name)]
    )


every = rows()


@every
def test_capabilities_shapes_and_dtypes(name):
    target, sample = build(name), drawn(name)
    assert isinstance(target, targets.Target) and as_target(target) is target
    assert all(isinstance(target, protocol) for protocol in (HasScore, HasLogDensity, HasLogRatio))
    assert isinstance(target, targets.HasExactSampler)
    assert isinstance(target, targets.HasModes) == (name not in WITHOUT_MODES)
    assert sample.x.shape == (ROWS[name].num_samples, *target.event_shape) == sample.score.shape
    assert sample.x.dtype == sample.logdensity.dtype == sample.score.dtype == np.float32
    assert all(np.all(np.isfinite(values)) for values in sample[:3])
    assert all(moment.shape == target.event_shape for moment in target.moments)
    assert isinstance(target.log_evidence, float)
    assert not target.moments.mean_std_error.any() and not target.moments.std_std_error.any()


@every
def test_double_precision(name):
    x = drawn(name).x[:3].astype(float)  # in single precision, as all that is kept between tests
    with jax.enable_x64(True):
        target, x = ROWS[name].build(), jnp.asarray(x)
        shapes = jax.eval_shape(
            lambda target, key, x: (target.sample(key, 3), target.logdensity(x[0]), target.score(x[0])),
            *(target, jax.random.key(0), x),
        )
        assert all(shape.dtype == jnp.float64 for shape in shapes)
        assert [shape.shape for shape in shapes] == [x.shape, (), x.shape[1:]]


@rows(lambda name: "modes" in name)
def test_closed_form_of_the_score_is_the_gradient(name):
    sample = drawn(name)
    size = np.abs(sample.gradient).max(axis=1, keepdims=True)
    assert np.all(np.abs(sample.score - sample.gradient) <= 2e-3 * size + 2e-3)


@every
def test_samples_and_density_are_of_one_law(name):
    # Stein's identities: E score = 0 and E x.score = -d, coordinate by coordinate, about the mean.
    target, sample = build(name), drawn(name)
    score = sample.score.astype(float)
    centred = sample.x - target.moments.mean
    assert_mean(score, 0.0)
    assert_mean(np.sum(centred * score, axis=1), -float(sample.x.shape[1]))
    assert_mean(centred * score, -1.0)
    # E [f' + f score] = 0 for a bounded f that is not linear.
    assert_mean(np.cos(centred) + np.sin(centred) * score, 0.0)


@every
def test_moments(name):
    moments, x = build(name).moments, drawn(name).x.astype(float)
    finite = np.isfinite(moments.std)
    if not ROWS[name].heavy:
        assert finite.all()
        assert_mean((x - moments.mean) ** 2 - moments.std**2, 0.0)
    if finite.all():
        assert_mean(x, moments.mean)
    if name == "funnel":
        assert_mean(x[:, 0] ** 2, moments.std[0] ** 2)


@rows(lambda name: name not in WITHOUT_MODES)
def test_modes(name):
    weights, labels = build(name).mode_weights, drawn(name).labels
    assert weights.dtype == np.float64 and weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(drawn(name).x),)
    assert labels.min() >= 0 and labels.max() < len(weights)
    counts = np.bincount(labels, minlength=len(weights))
    # Of many modes the rare ones have no normal law: a bound for Poisson counts.
    assert np.all(
        np.abs(counts - len(labels) * weights) < Z * np.sqrt(len(labels) * weights * (1 - weights)) + 5
    )


@rows(lambda name: ROWS[name].evidence == "plane")
def test_evidence_in_the_plane(name):
    # The trapezoidal rule in u, x = mean + sinh(u): fine about the mean, and far into the tails.
    heavy = name == "student mixture"
    with jax.enable_x64(True):
        target = ROWS[name].build()
        reach = 14.0 if heavy else math.asinh(np.abs(target.moments.std).max() * 12.0)
        u = np.linspace(-reach, reach, 600)

        @jax.jit
        def log_integral(target, points, log_measure):
            def row(first, log_first):
                pairs = jnp.stack([jnp.full_like(points[1], first), points[1]], axis=1)
                values = jax.vmap(target.logdensity)(pairs)
                return jax.nn.logsumexp(values + log_measure) + log_first

            return jax.lax.map(lambda pair: row(*pair), (points[0], log_measure))

        points = jnp.asarray(target.moments.mean[:, None] + np.sinh(u))
        log_measure = jnp.asarray(np.log(np.cosh(u) * (u[1] - u[0])))
        found = float(jax.nn.logsumexp(log_integral(target, points, log_measure)))
    assert found == pytest.approx(target.log_evidence, abs=1e-4 if heavy else 2e-6)


@rows(lambda name: ROWS[name].evidence == "fit")
def test_evidence_by_importance_sampling(name):
    # E_q[density / q] = Z for q a mixture of Student laws with the moments of the samples of each mode.
    target, sample, freedom = build(name), drawn(name), 6.0
    labels = np.zeros(len(sample.x), int) if sample.labels is None else sample.labels
    x, log_q = student_fit(sample.x.astype(float), labels, freedom)
    log_density = np.asarray(logdensities(target, jnp.asarray(x, jnp.float32)), float)
    weights = np.exp(log_density - log_q - target.log_evidence)
    error = weights.std() / math.sqrt(len(weights))
    assert error < 0.02
    assert abs(weights.mean() - 1) < Z * error


def student_fit(x, labels, freedom):
    """As many draws from a fitted mixture of Student laws, and their log densities."""
    rng, (n, d) = np.random.default_rng(0), x.shape
    modes, counts = np.unique(labels, return_counts=True)
    means = np.array([x[labels == k].mean(axis=0) for k in modes])
    factors = np.linalg.cholesky(
        [np.cov(x[labels == k], rowvar=False) * (freedom - 2) / freedom for k in modes]
    )
    chosen = rng.choice(len(modes), size=n, p=counts / n)
    noise = rng.normal(size=(n, d)) * np.sqrt(freedom / rng.chisquare(freedom, size=(n, 1)))
    draws = means[chosen] + np.einsum("nij,nj->ni", factors[chosen], noise)
    constant = math.lgamma(0.5 * (freedom + d)) - math.lgamma(0.5 * freedom)
    constant -= 0.5 * d * math.log(math.pi * freedom)
    terms = []
    for mean, factor, count in zip(means, factors, counts, strict=True):
        squares = np.sum(np.linalg.solve(factor, (draws - mean).T) ** 2, axis=0)
        log_det = np.log(np.diag(factor)).sum()
        terms.append(
            math.log(count / n) + constant - log_det - 0.5 * (freedom + d) * np.log1p(squares / freedom)
        )
    return draws, np.logaddexp.reduce(terms, axis=0)


# Each by its own ------------------------------------------------------------------------------------------------------


def test_one_program_serves_all_parameters():
    traces = []

    @jax.jit
    def logdensity(target, x):
        traces.append(type(target).__name__)
        return target.logdensity(x)

    x = jnp.full((6,), 0.3)
    values = [float(logdensity(targets.phi4_chain(6, field=field), x)) for field in (0.0, 0.1)]
    assert values[1] - values[0] == pytest.approx(-20 / 0.6 * 0.1 * 6 * 0.3, rel=1e-4)
    for seed in (0, 1):
        logdensity(targets.forty_modes(6, seed=seed), x)
    assert traces == ["Phi4Target", "MixtureTarget"]


def test_forty_wide_modes_are_the_published_ones():
    target = targets.forty_modes(side=80.0, std=math.log1p(math.e))
    np.testing.assert_allclose(target.mixture.component_means()[0], [-0.2995, 21.4577], atol=5e-5)
    np.testing.assert_allclose(target.mixture.eigenvalues, 1.3132617**2, rtol=1e-6)


def test_two_modes_are_centred():
    target = targets.two_modes(3)
    np.testing.assert_allclose(target.moments.mean, 0.0, atol=1e-12)
    np.testing.assert_array_equal(target.mode_weights, [2 / 3, 1 - 2 / 3])
    sample = drawn("two modes")
    np.testing.assert_array_equal(sample.labels, sample.x.mean(axis=1) > 1 / 3)


@pytest.mark.slow
def test_components_of_the_five_dimensional_mixture_do_not_overlap():
    sample, target = drawn("skewed modes, 5-d"), build("skewed modes, 5-d")
    probabilities = jax.vmap(target.mixture.responsibilities)(jnp.asarray(sample.x))
    assert np.mean(1 - np.max(probabilities, axis=1)) < 1e-4


def test_rings_are_finite_at_the_origin():
    target = targets.rings()
    x = jnp.array([[0.0, 0.0], [1e-30, 0.0], [0.0, 1e-3]])
    values = jax.jit(lambda target, x: jax.vmap(jax.value_and_grad(target.logdensity))(x))(target, x)
    assert all(np.all(np.isfinite(value)) for value in values)


def test_many_well_has_the_published_constants():
    target, well = targets.many_well(), targets.many_well(2)
    assert target.log_evidence == pytest.approx(164.695675313, abs=1e-8)
    assert well.mode_weights[1] == pytest.approx(0.844307, abs=1e-6)
    assert well.moments.mean[0] == pytest.approx(1.187961, abs=1e-6)
    assert well.moments.std[0] ** 2 + well.moments.mean[0] ** 2 == pytest.approx(2.959806, abs=1e-6)


@pytest.mark.parametrize("setting", [(100, 200.0, 2.0, 0.05), (2, 1.6, 20.0, -0.4), (1, 1.0, 3.0, 0.2)])
def test_transfer_matrices_have_converged(setting):
    coarse, fine = (transfer_facts(*setting, refinement) for refinement in (1, 2))
    assert coarse.log_evidence == pytest.approx(fine.log_evidence, abs=1e-9)
    for values, others in zip(coarse[1:3], fine[1:3], strict=True):
        np.testing.assert_allclose(values, others, atol=1e-9)
    np.testing.assert_allclose(coarse.middle_weights, fine.middle_weights, rtol=1e-9)


def test_evidence_of_the_chain_changes_with_the_field_as_its_means_say():
    # d log Z / db = -beta / (a d) sum_i E x_i
    low, middle, high = (transfer_facts(20, 8.0, 3.0, field) for field in (0.0999, 0.1, 0.1001))
    slope = (high.log_evidence - low.log_evidence) / 2e-4
    assert slope == pytest.approx(-3.0 * middle.mean.sum(), rel=1e-5)


def test_centered_and_not_centered_schools_are_one_posterior():
    plain, centered = (targets.eight_schools(centered=value) for value in (False, True))
    assert plain.log_evidence == centered.log_evidence
    x = drawn("eight schools").x.astype(float)
    moved = np.concatenate([x[:, :2], x[:, :1] + np.exp(x[:, 1:2]) * x[:, 2:]], axis=1)
    expected = drawn("eight schools").logdensity - 8 * x[:, 1]
    found = np.asarray(logdensities(centered, jnp.asarray(moved, jnp.float32)))
    keep = x[:, 1] > -4  # float32 loses (theta - mu) / tau below
    np.testing.assert_allclose(found[keep], expected[keep], atol=2e-2)
    # posteriordb, eight_schools_noncentered: E theta_1^2 = 69.363 +- 1.169.
    moments = centered.moments
    assert abs(moments.mean[2] ** 2 + moments.std[2] ** 2 - 69.363) < 4 * 1.169


def test_logistic_regression_has_trusted_moments():
    pytest.importorskip("sklearn")
    target = targets.logistic_regression()
    assert target.event_shape == (31,) and not isinstance(target, targets.HasExactSampler)
    assert target.features.shape == (455, 31) and target.held_out_features.shape == (114, 31)
    assert 0 < target.log_evidence_std_error < 0.01
    moments = target.moments
    assert all(moment.shape == (31,) and np.all(np.isfinite(moment)) for moment in moments)
    assert np.all(moments.mean_std_error < 0.02 * moments.std)
    assert np.all(moments.std_std_error < 0.02 * moments.std)
    assert np.isfinite(target.held_out_log_likelihood(jnp.asarray(moments.mean, jnp.float32)))

    # Importance sampling again, from a Student law about the maximum: another way to the stored numbers.
    x, log_q = laplace(target, 40_000)
    log_weights = np.asarray(logdensities(target, jnp.asarray(x, jnp.float32)), float) - log_q
    weights = np.exp(log_weights - target.log_evidence)
    error = weights.std() / math.sqrt(len(weights))
    assert error < 0.1
    assert abs(weights.mean() - 1) < Z * math.hypot(error, target.log_evidence_std_error)
    weights /= weights.sum()
    for values, expected, known in (
        (x, moments.mean, moments.mean_std_error),
        ((x - moments.mean) ** 2, moments.std**2, 2 * moments.std * moments.std_std_error),
    ):
        found = weights @ values
        spread = np.sqrt(weights**2 @ (values - found) ** 2)
        assert np.all(np.abs(found - expected) < Z * np.hypot(spread, known))


def laplace(target, num_draws, freedom=8.0):
    """Draws of a Student law with the maximum and the inverse Hessian of the density there, and log densities."""
    gradient = jax.jit(lambda target, x: target.score(x))
    hessian, x = jax.jit(lambda target, x: jax.jacobian(target.score)(x)), np.zeros(31)
    for _ in range(15):
        point = jnp.asarray(x, jnp.float32)
        x = x - np.linalg.solve(
            np.asarray(hessian(target, point), float), np.asarray(gradient(target, point), float)
        )
    covariance = 1.3 * np.linalg.inv(-np.asarray(hessian(target, jnp.asarray(x, jnp.float32)), float))
    factor, rng = np.linalg.cholesky(covariance), np.random.default_rng(1)
    noise = rng.normal(size=(num_draws, 31)) * np.sqrt(freedom / rng.chisquare(freedom, size=(num_draws, 1)))
    constant = math.lgamma(0.5 * (freedom + 31)) - math.lgamma(0.5 * freedom)
    constant -= 0.5 * 31 * math.log(math.pi * freedom) + np.log(np.diag(factor)).sum()
    log_q = constant - 0.5 * (freedom + 31) * np.log1p(np.sum(noise**2, axis=1) / freedom)
    return x + noise @ factor.T, log_q


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: targets.forty_modes(0), "dimension"),
        (lambda: targets.forty_modes(side=-1.0), "side"),
        (lambda: targets.two_modes(2, 1.0), "weight"),
        (lambda: targets.skewed_modes(3), "2 or 5"),
        (lambda: targets.rings(std=0.3), "std"),
        (lambda: targets.funnel(1), "at least 2"),
        (lambda: targets.banana(std=0.0), "std"),
        (lambda: targets.double_well(3, 4), "num_wells"),
        (lambda: targets.many_well(3), "even"),
        (lambda: targets.student_mixture(freedom=1.0), "freedom"),
        (lambda: targets.phi4_chain(coupling=0.0), "coupling"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
