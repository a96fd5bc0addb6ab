"""Exact models against SciPy, quadrature, automatic differentiation and their own samples.

z-tests allow 5 standard errors, estimated from the sample: a false failure has a probability of 6e-7 a check under
normality. Keys are fixed.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from smcdiff.analytic import EmpiricalDiffusion, GaussianDiffusion, GaussianMixtureDiffusion
from smcdiff.density import DiffusionModel, HasLogDensity, HasScore
from smcdiff.mixture import GaussianMixture
from smcdiff.schedules import ve, vp

Z = 5.0


def _covariances(num, dimension, seed):
    factors = np.random.default_rng(seed).normal(size=(num, dimension, dimension))
    return factors @ np.swapaxes(factors, 1, 2) / dimension + 0.2 * np.eye(dimension)


_MEANS = np.array([[1.0, -0.4, 0.2], [-1.3, 0.9, 0.8], [0.1, 1.6, -1.1]])
_WEIGHTS = np.array([0.55, 0.15, 0.3])
# name: weights, means, covariance, schedule
CASES = {
    "isotropic": (_WEIGHTS, _MEANS, 0.3, vp),
    "shared": (_WEIGHTS, _MEANS, _covariances(1, 3, 0)[0], vp),
    "per component": (_WEIGHTS, _MEANS, _covariances(3, 3, 1), vp),
    "exploding": (_WEIGHTS, _MEANS, _covariances(3, 3, 1), ve),
    "one component": (np.ones(1), _MEANS[:1], _covariances(1, 3, 2)[0], vp),
    "event of two axes": (
        np.array([0.7, 0.3]),
        np.random.default_rng(3).normal(size=(2, 2, 3)),
        _covariances(2, 6, 4),
        vp,
    ),
}


class _Case:
    """A model, and its law written out in NumPy."""

    def __init__(self, weights, means, covariance, make_schedule):
        self.weights = weights
        self.event_shape = means.shape[1:]
        self.means = means.reshape(len(weights), -1)
        dimension = self.means.shape[1]
        full = covariance * np.eye(dimension) if np.ndim(covariance) == 0 else covariance
        self.covariances = np.broadcast_to(full, (len(weights), dimension, dimension))
        self.schedule = make_schedule()
        self._arguments = (weights, means, covariance)

    def model(self):
        weights, means, covariance = self._arguments
        if len(weights) == 1:
            return GaussianDiffusion(means[0], covariance, self.schedule)
        return GaussianMixtureDiffusion.create(weights, means, covariance, self.schedule)

    def log_joint(self, flat, alpha=1.0, sigma=0.0):
        """log(w_k N(flat; alpha m_k, alpha^2 C_k + sigma^2 I)), shape (K,)."""
        noise = sigma**2 * np.eye(self.means.shape[1])
        return np.array(
            [
                np.log(w) + multivariate_normal(alpha * m, alpha**2 * c + noise).logpdf(flat)
                for w, m, c in zip(self.weights, self.means, self.covariances, strict=True)
            ]
        )

    def mean(self):
        return self.weights @ self.means

    def covariance(self):
        centred = self.means - self.mean()
        return np.einsum("k,kij->ij", self.weights, self.covariances) + np.einsum(
            "k,ki,kj->ij", self.weights, centred, centred
        )


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return _Case(*CASES[request.param])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def _points(case):
    """Pairs of a time and a sample near the path at that time."""
    rng = np.random.default_rng(7)
    for t in (0.004, 0.25, 0.8):
        t = jnp.asarray(t)
        alpha, sigma = float(case.schedule.alpha(t)), float(case.schedule.sigma(t))
        x0 = case.means[-1] + rng.normal(size=case.means.shape[1])
        x = alpha * x0 + sigma * rng.normal(size=x0.shape)
        yield t, alpha, sigma, jnp.asarray(x.reshape(case.event_shape))


def test_density_score_and_responsibilities(case, x64):
    model = case.model()
    gradient = jax.jit(lambda model, x, t: jax.grad(model.at(t).logdensity)(x))
    for t, alpha, sigma, x in _points(case):
        marginal = model.at(t)
        joint = case.log_joint(np.ravel(x), alpha, sigma)
        np.testing.assert_allclose(marginal.logdensity(x), logsumexp(joint), rtol=1e-10)
        np.testing.assert_allclose(
            marginal.responsibilities(x), np.exp(joint - logsumexp(joint)), rtol=1e-8, atol=1e-12
        )
        score = gradient(model, x, t)
        np.testing.assert_allclose(model.score(x, t), score, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(marginal.score(x), score, rtol=1e-9, atol=1e-9)
        both = marginal.logdensity_and_score(x)
        np.testing.assert_allclose(both[0], logsumexp(joint), rtol=1e-10)
        np.testing.assert_allclose(both[1], score, rtol=1e-9, atol=1e-9)


def test_denoiser_and_posterior_covariance(case, x64):
    """Tweedie's formulas, of first and second order: Cov = (sigma^2 / alpha) d x0 / d x."""
    model = case.model()
    derivatives = jax.jit(
        lambda model, x, t: (jax.grad(model.at(t).logdensity)(x), jax.jacfwd(model.denoise)(x, t))
    )
    for t, alpha, sigma, x in _points(case):
        denoised = model.denoise(x, t)
        assert denoised.shape == case.event_shape
        score, jacobian = derivatives(model, x, t)
        tweedie = (x + sigma**2 * score) / alpha
        np.testing.assert_allclose(denoised, tweedie, rtol=1e-8, atol=1e-10)
        dimension = x.size
        jacobian = jacobian.reshape(dimension, dimension)
        covariance = model.posterior_covariance(x, t)
        np.testing.assert_allclose(covariance, sigma**2 / alpha * jacobian, rtol=1e-8, atol=1e-12)
        posterior = model.mixture.denoising_posterior(x, jnp.asarray(alpha), jnp.asarray(sigma))
        np.testing.assert_allclose(posterior.mean(), denoised, rtol=1e-9, atol=1e-12)
        # The law itself: log p(x0) + log p(x|x0) - log p_t(x) = log p(x0|x).
        x0 = jnp.asarray(case.mean().reshape(case.event_shape)) + 0.1
        noise = multivariate_normal(alpha * np.ravel(x0), sigma**2 * np.eye(dimension)).logpdf(np.ravel(x))
        bayes = model.mixture.logdensity(x0) + noise - model.at(t).logdensity(x)
        np.testing.assert_allclose(posterior.logdensity(x0), bayes, rtol=1e-8)


def test_limits_of_the_denoiser(case, x64):
    """Without noise the sample itself; with noise alone the mean of the data."""
    mixture, one = case.model().mixture, jnp.asarray(1.0)
    x = jnp.asarray(case.means[0].reshape(case.event_shape)) + 0.3
    np.testing.assert_allclose(mixture.denoise(x, one, 0.0 * one), x, rtol=1e-12)
    np.testing.assert_allclose(mixture.denoise(x, 1e-9 * one, one), mixture.mean(), rtol=1e-6)
    # First order in between: x0 = x + sigma^2 score.
    small = mixture.denoise(x, one, 1e-4 * one) - x
    np.testing.assert_allclose(small, 1e-8 * mixture.score(x), rtol=1e-3)


def test_moments_and_components(case, x64):
    mixture = case.model().mixture
    np.testing.assert_allclose(mixture.mean().ravel(), case.mean(), rtol=1e-10)
    np.testing.assert_allclose(mixture.covariance(), case.covariance(), rtol=1e-9)
    means = mixture.component_means()
    assert means.shape == (len(case.weights), *case.event_shape)
    np.testing.assert_allclose(means.reshape(case.means.shape), case.means, rtol=1e-10)
    covariances = np.broadcast_to(mixture.component_covariances(), case.covariances.shape)
    np.testing.assert_allclose(covariances, case.covariances, rtol=1e-9, atol=1e-12)


def test_samples(case):
    """Mean, second moments and component frequencies of 20 000 samples of a noised marginal."""
    num, t = 20_000, jnp.asarray(0.1)
    marginal = case.model().at(t)
    samples = marginal.sample(jax.random.key(11), num)
    assert samples.shape == (num, *case.event_shape)
    flat = np.asarray(samples, float).reshape(num, -1)
    alpha, sigma = float(case.schedule.alpha(t)), float(case.schedule.sigma(t))
    centred = flat - alpha * case.mean()
    covariance = alpha**2 * case.covariance() + sigma**2 * np.eye(flat.shape[1])
    joint = np.stack([
        np.log(w) + multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * np.eye(len(m))).logpdf(flat)
        for w, m, c in zip(case.weights, case.means, case.covariances, strict=True)
    ], axis=1)  # fmt: skip
    share = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    products = np.einsum("ni,nj->nij", centred, centred).reshape(num, -1)
    checks = [(centred, 0.0), (products, covariance.ravel())]
    if len(case.weights) > 1:
        checks.append((share, case.weights))  # E[responsibility] = weight
    for values, expected in checks:
        error = np.abs(values.mean(0) - expected) / (values.std(0) / np.sqrt(num))
        assert error.max() < Z
    # The power: the variances are known to 8 %, so no factor of two gets through.
    assert np.all(
        Z * products.std(0).reshape(covariance.shape).diagonal() < 0.08 * np.sqrt(num) * covariance.diagonal()
    )


def _measurement(case):
    rng = np.random.default_rng(9)
    matrix = rng.normal(size=(2, case.means.shape[1]))
    noise_std = np.array([0.3, 0.8])
    return matrix, matrix @ case.means[1 % len(case.means)] + 0.5, noise_std


def test_posterior_obeys_bayes(case, x64):
    """log p(x) + log p(y|x) - log p(y) = log p(x|y) everywhere, in double precision, at t = 0 and noised."""
    model, (matrix, y, noise_std) = case.model(), _measurement(case)
    posterior, log_evidence = model.posterior(matrix, y, noise_std)
    assert isinstance(posterior, GaussianMixtureDiffusion) and isinstance(log_evidence, float)
    assert posterior.event_shape == case.event_shape
    evidence = logsumexp([
        np.log(w) + multivariate_normal(matrix @ m, matrix @ c @ matrix.T + np.diag(noise_std**2)).logpdf(y)
        for w, m, c in zip(case.weights, case.means, case.covariances, strict=True)
    ])  # fmt: skip
    np.testing.assert_allclose(log_evidence, evidence, rtol=1e-10)
    for x in np.random.default_rng(1).normal(size=(4, case.means.shape[1])):
        likelihood = multivariate_normal(matrix @ x, np.diag(noise_std**2)).logpdf(y)
        expected = logsumexp(case.log_joint(x)) + likelihood - log_evidence
        value = posterior.mixture.logdensity(jnp.asarray(x.reshape(case.event_shape)))
        np.testing.assert_allclose(value, expected, rtol=1e-8)


def test_posterior_against_quadrature():
    """Evidence, mean and covariance in the plane, by the rectangle rule (exponentially accurate for smooth decay)."""
    weights, means = np.array([0.65, 0.35]), np.array([[1.0, -0.5], [-1.2, 0.7]])
    covariances = _covariances(2, 2, 5)
    matrix, y, noise_std = np.array([[0.9, -0.4]]), np.array([0.2]), 0.5
    axis = np.linspace(-8, 8, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    prior = sum(
        w * multivariate_normal(m, c).pdf(grid) for w, m, c in zip(weights, means, covariances, strict=True)
    )
    joint = prior * multivariate_normal(y, noise_std**2).pdf(grid @ matrix[0])
    cell = (axis[1] - axis[0]) ** 2
    mass = joint.sum() * cell
    mean = joint @ grid * cell / mass
    covariance = np.einsum("n,ni,nj->ij", joint, grid - mean, grid - mean) * cell / mass
    with jax.enable_x64(True):
        model = GaussianMixtureDiffusion.create(weights, means, covariances, vp())
        posterior, log_evidence = model.posterior(matrix, y, noise_std)
        np.testing.assert_allclose(log_evidence, np.log(mass), rtol=1e-9)
        np.testing.assert_allclose(posterior.mixture.mean(), mean, rtol=1e-8)
        np.testing.assert_allclose(posterior.mixture.covariance(), covariance, rtol=1e-8)


def test_posterior_limits(x64):
    """A useless measurement leaves the prior, an exact one of everything leaves the measured point."""
    case = _Case(*CASES["per component"])
    mixture, x = case.model().mixture, np.array([0.4, -0.2, 0.9])
    prior, _ = mixture.posterior(np.eye(3), x, 1e6)
    np.testing.assert_allclose(prior.component_means(), case.means, atol=1e-10)
    np.testing.assert_allclose(jnp.exp(prior.log_weights), case.weights, rtol=1e-10)
    point, log_evidence = mixture.posterior(np.eye(3), x, 1e-4)
    np.testing.assert_allclose(point.mean(), x, atol=1e-6)
    np.testing.assert_allclose(point.covariance(), 1e-8 * np.eye(3), atol=1e-11)
    np.testing.assert_allclose(log_evidence, logsumexp(case.log_joint(x)), atol=1e-5)


def test_single_precision_agrees_with_double(case):
    with jax.enable_x64(True):
        points = [(t, x) for t, _, _, x in _points(case)]
        wanted = [np.asarray(case.model().denoise(x, t)) for t, x in points]
    for (t, x), expected in zip(points, wanted, strict=True):
        got = case.model().denoise(
            jnp.asarray(np.asarray(x), jnp.float32), jnp.asarray(float(t), jnp.float32)
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


def test_zero_weight_component_is_absent(x64):
    with_zero = GaussianMixture.create([2.0, 0.0, 1.0], _MEANS, 0.3)
    without = GaussianMixture.create([2 / 3, 1 / 3], _MEANS[[0, 2]], 0.3)
    x = jnp.asarray([0.2, 0.5, -0.3])
    np.testing.assert_allclose(with_zero.logdensity(x), without.logdensity(x), rtol=1e-12)
    np.testing.assert_allclose(with_zero.score(x), without.score(x), rtol=1e-12)
    np.testing.assert_allclose(
        with_zero.posterior(np.eye(3), x, 0.4)[1], without.posterior(np.eye(3), x, 0.4)[1]
    )


@pytest.mark.parametrize(
    "weights, means, covariance, message",
    [
        ([0.5, 0.5], np.zeros((3, 2)), 1.0, "weights"),
        ([0.5, -0.5], np.zeros((2, 2)), 1.0, "weights"),
        ([0.0, 0.0], np.zeros((2, 2)), 1.0, "weights"),
        ([[1.0]], np.zeros((1, 2)), 1.0, "weights"),
        ([1.0], np.zeros((1, 2)), 0.0, "covariance must be positive definite"),
        ([1.0], np.zeros((1, 2)), -1.0, "covariance must be positive definite"),
        ([1.0], np.zeros((1, 2)), np.diag([1.0, -0.1]), "covariance must be positive definite"),
        ([1.0], np.zeros((1, 2)), np.array([[1.0, 0.5], [0.0, 1.0]]), "covariance must be symmetric"),
        ([1.0], np.zeros((1, 2)), np.ones(2), "covariance must be a positive scalar or"),
        ([1.0], np.zeros((1, 2)), np.eye(3), "covariance must be a positive scalar or"),
    ],
)
def test_bad_mixtures_raise(weights, means, covariance, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        GaussianMixture.create(weights, means, covariance)


def test_bad_measurement_raises():
    with pytest.raises(ValueError, match=r"^matrix must have the shape \(d_y, d\) = \(2, 3\), got"):
        GaussianMixture.create([1.0], np.zeros((1, 3)), 1.0).posterior(np.ones((3, 2)), np.ones(2), 0.1)


# --- kernel densities of a data set ---

DATA = np.random.default_rng(12).normal(size=(23, 2, 2)) * np.array([1.0, 0.4]) + 0.3


def _empirical(**options):
    return EmpiricalDiffusion(jnp.asarray(DATA), 0.25, vp(), **options)


def _loss(model, x, t):
    return jnp.sum(jnp.cos(model.denoise(x, t)) * jnp.arange(1.0, 5.0).reshape(2, 2))


_X = np.array([[0.6, -0.2], [0.1, 1.1]])


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 5}, {"batch_size": 23}, {"batch_size": 64}, {"num_neighbours": 23}]
)
def test_empirical_equals_the_exact_mixture(options, x64):
    """Values and gradients; blocks that do and do not divide the data, and blocks larger than it."""
    model = _empirical(**options)
    exact, x = model.exact(), jnp.asarray(_X)
    assert len(exact.mixture.log_weights) == 23

    @jax.jit
    def evaluate(model, x, t):
        return model.denoise(x, t), model.score(x, t), jax.grad(_loss, (1, 2))(model, x, t)

    for t in (0.03, 0.3, 0.9):
        t = jnp.asarray(t)
        denoised, score, gradients = evaluate(model, x, t)
        wanted, wanted_score, wanted_gradients = evaluate(exact, x, t)
        np.testing.assert_allclose(denoised, wanted, rtol=1e-9)
        np.testing.assert_allclose(score, wanted_score, rtol=1e-9)
        for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(model.at(t).score(x), score, rtol=1e-9)


def test_truncation_converges(x64):
    x, t = jnp.asarray(_X), jnp.asarray(0.1)
    exact = _empirical().denoise(x, t)
    errors = [
        float(jnp.max(jnp.abs(_empirical(num_neighbours=k).denoise(x, t) - exact))) for k in (1, 5, 15, 22)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3 and errors[-1] < 1e-2 * errors[0]
    # By hand: the nearest point alone.
    alpha, sigma = float(vp().alpha(t)), float(vp().sigma(t))
    variance = (alpha * 0.25) ** 2 + sigma**2
    nearest = DATA[np.argmin(np.sum((_X - alpha * DATA) ** 2, axis=(1, 2)))]
    expected = (alpha * 0.25**2 * _X + sigma**2 * nearest) / variance
    np.testing.assert_allclose(_empirical(num_neighbours=1).denoise(x, t), expected, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"batch_size": 5}])
def test_smoothing_is_the_average_over_its_perturbations(options, x64):
    model, x, t = _empirical(**options), jnp.asarray(_X), jnp.asarray(0.2)
    smooth = model.smoothed(jax.random.key(3), 0.4, 6)
    assert smooth.smoothing.shape == (6, 2, 2)
    np.testing.assert_allclose(jnp.sum(smooth.smoothing, axis=0), 0.0, atol=1e-15)
    denoised = np.mean([model.denoise(x + shift, t) for shift in smooth.smoothing], axis=0)
    np.testing.assert_allclose(smooth.denoise(x, t), denoised, rtol=1e-10)
    scores = np.mean([model.score(x + shift, t) for shift in smooth.smoothing], axis=0)
    np.testing.assert_allclose(smooth.score(x, t), scores, rtol=1e-9)
    assert np.max(np.abs(scores - model.score(x, t))) > 1e-2
    none = model.smoothed(jax.random.key(3), 0.0, 2)
    np.testing.assert_allclose(none.score(x, t), model.score(x, t), rtol=1e-12)
    assert smooth.batch_size == model.batch_size and smooth.num_neighbours == model.num_neighbours


def test_perturbations_have_the_given_scale():
    """Of 4000 draws, 8000 independent entries: their variance is known to sqrt(2/8000) = 1.6 %."""
    shifts = np.asarray(_empirical().smoothed(jax.random.key(5), 0.4, 4000).smoothing, float)[:2000]
    assert abs(np.mean(shifts**2) / 0.4**2 - 1) < Z * np.sqrt(2 / shifts.size)


def test_empirical_has_no_log_density():
    for model in (_empirical(), _empirical().smoothed(jax.random.key(0), 0.1, 2)):
        assert isinstance(model, DiffusionModel)
        assert isinstance(model.at(0.3), HasScore) and not isinstance(model.at(0.3), HasLogDensity)
    assert isinstance(_empirical().exact().at(jnp.asarray(0.3)), HasLogDensity)


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: EmpiricalDiffusion(jnp.asarray(DATA), 0.0, vp()), "bandwidth"),
        (lambda: EmpiricalDiffusion(jnp.asarray(DATA), -0.1, vp()), "bandwidth"),
        (lambda: _empirical(num_neighbours=3, batch_size=3), "num_neighbours or batch_size"),
        (lambda: _empirical(num_neighbours=0), "num_neighbours"),
        (lambda: _empirical(num_neighbours=24), "num_neighbours"),
        (lambda: _empirical(batch_size=0), "batch_size"),
        (lambda: _empirical().smoothed(jax.random.key(0), 0.1, 3), "num_draws"),
        (lambda: _empirical().smoothed(jax.random.key(0), 0.1, 0), "num_draws"),
    ],
)
def test_bad_empirical_models_raise(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


def test_ten_thousand_images_in_blocks():
    data = np.random.default_rng(0).random((10_000, 28, 28), np.float32)
    model = EmpiricalDiffusion(jnp.asarray(data), 0.1, vp(), batch_size=1024)
    x, t = 0.9 * jnp.asarray(data[:8]) + 0.01, jnp.asarray(0.35)
    denoise = jax.jit(jax.vmap(EmpiricalDiffusion.denoise, (None, 0, None)))
    denoised = jax.block_until_ready(denoise(model, x, t))
    durations = []
    for _ in range(3):  # of one call, the quickest: other programs share the machine
        start = time.perf_counter()
        jax.block_until_ready(denoise(model, x, t))
        durations.append(time.perf_counter() - start)
    assert min(durations) < 3.0
    alpha, sigma = float(vp().alpha(t)), float(vp().sigma(t))
    variance = (alpha * 0.1) ** 2 + sigma**2
    flat, point = data.reshape(10_000, -1).astype(float), np.asarray(x[0], float).ravel()
    logits = (flat @ point * alpha - 0.5 * alpha**2 * np.sum(flat**2, axis=1)) / variance
    average = np.exp(logits - logsumexp(logits)) @ flat
    expected = (alpha * 0.1**2 * point + sigma**2 * average) / variance
    # float32 logits of size 300 are off by some 1e-4, and so, relatively, are the weights.
    np.testing.assert_allclose(denoised[0].ravel(), expected, atol=1e-3)
