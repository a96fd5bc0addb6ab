"""Split Gibbs sampling and decoupled annealing, against closed forms.

Statistical checks allow 5 standard errors of independent chains: a false failure has a probability of about 6e-7 a
number. Keys are fixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoising_cases import Z, assert_law, ends, exact, gaps, shares
from jax.tree_util import Partial

import smcdiff
from smcdiff import inverse, schedules
from smcdiff.mcmc.daps import daps
from smcdiff.mcmc.split_gibbs import condition_draw, split_gibbs

# Many programs are compiled here; tests/test_kernels.py has the kernels in the quick tests.
pytestmark = pytest.mark.slow

SCHEDULE = schedules.cosine(-7.0)
MATRIX = np.array([[1.0, -0.5, 0.3], [0.2, 0.8, -1.1]])
NOISE = np.array([0.3, 0.5])
Y = np.array([0.8, -0.4])
N, K = 4000, 20  # chains; entries of the schedules of rho


@functools.cache
def problem():
    return smcdiff.InverseProblem(inverse.dense(MATRIX, (3,)), Y, jnp.asarray(NOISE))


@functools.cache
def model(kind="mixture"):
    """Two modes; or both in one place, which shares the programs."""
    covariance = np.array([[0.36, 0.08, 0.0], [0.08, 0.2, -0.04], [0.0, -0.04, 0.28]])
    means = np.array([[1.5, 0.5, -1.0], [-1.5, -1.0, 1.0]])
    means = means if kind == "mixture" else means[[0, 0]]
    return smcdiff.GaussianMixtureDiffusion.create([0.7, 0.3], means, covariance, SCHEDULE)


@functools.cache
def posterior(kind, rho):
    """The posterior under the noise R + rho^2 A A^T, by whitening."""
    noise = np.diag(NOISE**2) + rho**2 * MATRIX @ MATRIX.T
    root = np.linalg.inv(np.linalg.cholesky(noise))
    return model(kind).posterior(root @ MATRIX, root @ Y, 1.0)[0].mixture


def gaussian(mean, covariance):
    return smcdiff.GaussianMixture.create([1.0], np.asarray(mean)[None], covariance)


def _condition_on(problem, x, rho, key):
    return condition_draw(key, problem, x, rho, 20)


def test_the_draw_given_the_measurement_is_gaussian_conditioning():
    x, rho = jnp.array([0.3, -0.2, 1.0]), jnp.asarray(0.7)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(Partial(_condition_on, problem(), x, rho)))
    draws, residuals = draw(keys)
    precision = np.eye(3) / 0.7**2 + MATRIX.T @ np.diag(NOISE**-2) @ MATRIX
    mean = np.linalg.solve(precision, np.asarray(x) / 0.7**2 + MATRIX.T @ (Y / NOISE**2))
    assert_law(gaussian(mean, np.linalg.inv(precision)), np.asarray(draws, float))
    assert np.max(residuals) < 1e-4


def test_a_solver_cut_short_says_so():
    image = smcdiff.InverseProblem(inverse.gaussian_blur((16, 16), 2.0), jnp.ones((16, 16)), 0.01)
    solve = jax.jit(
        lambda n: condition_draw(jax.random.key(0), image, jnp.zeros((16, 16)), jnp.asarray(1.0), n)[1]
    )
    assert solve(2) > 0.01 and solve(300) < 1e-3


def _log_likelihood(problem, x):
    return problem.log_likelihood(x)


def chain(kind, likelihood, rho):
    rho = np.broadcast_to(rho, (K,))
    return split_gibbs(model(kind), likelihood, rho, num_steps=50, num_mala_steps=15)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("exact_draws", [True, False])
def test_the_law_of_the_sample_is_the_posterior_with_wider_noise(kind, exact_draws):
    law = posterior(kind, 0.6)
    likelihood = problem() if exact_draws else Partial(_log_likelihood, problem())
    x, info, _ = ends(chain(kind, likelihood, 0.6), 4, exact(law, N))
    # 50 reverse steps of second order leave an error, here within 1 % of a deviation.
    assert_law(law, x, slack=0.01)
    assert np.all(info.acceptance_rate == 1) if exact_draws else 0.4 < info.acceptance_rate.mean() < 0.97
    np.testing.assert_allclose(info.rho, 0.6, rtol=1e-6)
    # It is told apart from the posterior itself.
    assert gaps(posterior(kind, 0.0), x, slack=0.01).max() > 2 * Z


@pytest.mark.slow
def test_the_law_of_the_sample_is_reached_from_the_prior():
    x, _, _ = ends(chain("mixture", problem(), 0.6), 60, exact(model().mixture, N))
    assert_law(posterior("mixture", 0.6), x, slack=0.01)


def test_a_falling_rho_ends_near_the_posterior():
    """The bias is of second order: rho falls by 4 and the gaps by more than 5, where a first order leaves a quarter.

    Both laws are those of the wider noise, and standard errors of 8000 chains are .004 for means, .002 for covariances.
    """
    truth = posterior("gaussian", 0.0)
    start = exact(model("gaussian").mixture, 2 * N)

    def distance(rho, num_steps):
        x, info, _ = ends(chain("gaussian", problem(), rho), num_steps, start)
        last = np.broadcast_to(rho, (K,))[-1]
        np.testing.assert_allclose(info.rho, last, rtol=1e-6)
        assert_law(posterior("gaussian", float(last)), x, slack=0.01)
        return np.abs(x.mean(axis=0) - truth.mean()).max(), np.abs(np.cov(x.T) - truth.covariance()).max()

    far, near = distance(0.5, 15), distance(np.geomspace(3.0, 0.125, K), 60)
    assert far[0] > 0.25 and near[0] < 0.16 * far[0]
    assert far[1] > 0.08 and near[1] < 0.18 * far[1]


def test_without_a_position_it_starts_from_the_prior():
    algorithm = split_gibbs(model(), problem(), np.array([30.0, 0.5]), num_steps=50)
    keys = jax.random.split(jax.random.key(0), N)
    x = jax.jit(jax.vmap(lambda key: algorithm.init(None, key).position))(keys)
    found = shares(model().mixture, np.asarray(x, float))
    assert np.all(np.abs(found.mean(axis=0) - [0.7, 0.3]) < Z * found.std(axis=0) / np.sqrt(N))


@pytest.mark.parametrize("exact_draws", [True, False])
def test_decoupled_annealing_of_isotropic_gaussian_data(exact_draws):
    # Every step is affine and Gaussian, and the probability flow keeps directions from the mean.
    centre, variance, width = np.array([0.5, -1.0, 0.2]), 0.8, 0.7
    prior = smcdiff.GaussianDiffusion(centre, variance, SCHEDULE)
    times = SCHEDULE.time_from_log_snr(jnp.linspace(-0.5, 1.5, 5))
    mean, covariance = np.zeros(3), np.zeros((3, 3))
    for t in times:
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        shrink = np.sqrt(variance / (alpha**2 * variance + sigma**2))
        mean = centre + shrink * alpha * (mean - centre)
        covariance = shrink**2 * (alpha**2 * covariance + sigma**2 * np.eye(3))
        spread = (width * sigma / alpha) ** 2
        gain = spread * MATRIX.T @ np.linalg.inv(spread * MATRIX @ MATRIX.T + np.diag(NOISE**2))
        keep = np.eye(3) - gain @ MATRIX
        mean = keep @ mean + gain @ Y
        covariance = keep @ covariance @ keep.T + spread * keep
    if exact_draws:
        algorithm = daps(prior, problem(), times, num_steps=50, width=width)
    else:  # and the last point of a grid to 0 is no noise level
        likelihood, to_zero = Partial(_log_likelihood, problem()), jnp.append(times, 0.0)
        algorithm = daps(
            prior, likelihood, to_zero, num_steps=50, width=width, curvature=10.0, num_mala_steps=100
        )
    x, info, _ = ends(algorithm, len(times), num_chains=N)
    assert_law(gaussian(mean, covariance), x)
    assert info.denoised.shape == x.shape and np.max(info.solve_residual) < 1e-3


def _narrow(x):
    return -50.0 * jnp.sum(x**4)


def test_langevin_steps_that_diverge_are_told():
    start = jnp.asarray([3.0, -2.0, 4.0])
    for kernel, noise in ((split_gibbs, 0.5), (daps, jnp.asarray([1.0, 0.4, 0.0]))):
        said = []
        for step_size in (1e5, 1e-12):
            algorithm = kernel(model(), _narrow, noise, num_steps=4, num_mala_steps=2, step_size=step_size)
            state = algorithm.init(start, jax.random.key(0))
            said.append(bool(algorithm.step(jax.random.key(1), state)[1].is_divergent))
        assert said == [True, False], (kernel, said)


def test_what_cannot_be_used_is_refused():
    network = smcdiff.Diffusion(model(), _denoise, SCHEDULE, "x0", (3,))
    split_gibbs(network, problem(), 0.5)  # a denoiser is enough
    with pytest.raises(TypeError, match="DiffusionModel"):
        split_gibbs(model().mixture, problem(), 0.5)
    with pytest.raises(TypeError, match="problem must be"):
        split_gibbs(model(), 3.0, 0.5)
    with pytest.raises(ValueError, match="event_shape"):
        split_gibbs(model(), smcdiff.InverseProblem(inverse.identity((2,)), jnp.zeros(2), 1.0), 0.5)
    with pytest.raises(ValueError, match="raise log_snr_max"):
        split_gibbs(model(), problem(), 0.001)
    with pytest.raises(ValueError, match="at most sigma/alpha"):
        split_gibbs(model(), problem(), 1e5)
    with pytest.raises(ValueError, match="shape \\(K,\\)"):
        split_gibbs(model(), problem(), np.ones((2, 2)))
    with pytest.raises(ValueError, match="curvature"):
        split_gibbs(model(), problem(), 0.5, curvature=-1.0)
    with pytest.raises(ValueError, match="fall strictly"):
        daps(model(), problem(), jnp.array([0.1, 0.5]))
    flow = smcdiff.GaussianDiffusion(np.zeros(3), 1.0, schedules.rectified_flow())
    with pytest.raises(ValueError, match="alpha > 0"):
        daps(flow, problem(), jnp.array([1.0, 0.5, 0.0]))


def _denoise(params, x, t):
    return params.denoise(x, t)
