"""The likelihood of a diffusion site that a NumPyro model implies, and paths under its twist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppl_models import COUNTS, COVARIANCE, LINEAR, A, Y, counts, gaussian, gaussian_1d
from rows import quick
from scipy import stats

import smcdiff
from smcdiff import guidance, inverse
from smcdiff.ppl import SiteLikelihood, local_twist
from smcdiff.ppl.call import model_call
from smcdiff.smc import particle_gibbs

pytestmark = pytest.mark.lenient_promotion  # of NumPyro's NUTS and Gibbs

STEPS = 16


def whitened(name):
    """Square root of the precision of the measurement, and the values of the other sites."""
    given = {"gain": jnp.array(1.2), "noise": jnp.array(0.5)} if name == "linear" else {}
    root = {
        "linear": np.eye(2) / 0.5,
        "correlated": np.linalg.inv(np.linalg.cholesky(COVARIANCE)),
        "weighted": np.eye(2) / 0.25,
    }[name]
    return root, (1.2 if name == "linear" else 1.0) * A, given


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_gaussian_model_is_its_inverse_problem(name):
    root, matrix, given = whitened(name)
    site = SiteLikelihood(model_call(LINEAR[name], (gaussian(), A, Y), {}), given, "x")
    x, other = jnp.array([0.4, -1.0]), jnp.array([-0.7, 0.1])
    assert site.kinds(x) == (["y"], [])
    local = site.linearize(x)
    np.testing.assert_allclose(local.residual(x), root @ (Y - matrix @ np.asarray(x)), rtol=1e-5)
    np.testing.assert_allclose(local.operator.matrix(), root @ matrix, rtol=1e-5)
    np.testing.assert_allclose(local.adjoint(Y), (root @ matrix).T @ Y, rtol=1e-5)
    expected = local.log_likelihood(other) - local.log_likelihood(x)
    np.testing.assert_allclose(site.log_likelihood(other) - site.log_likelihood(x), expected, rtol=1e-4)
    assert site.log_rest(x) == 0.0


def test_what_is_not_linear_is_linearised_and_what_is_not_gaussian_counts_as_it_is():
    given = {"shift": jnp.array(0.2)}
    site = SiteLikelihood(model_call(counts, (gaussian_1d(), *COUNTS), {}), given, "x")
    x = jnp.array([0.9])
    assert site.kinds(x) == (["square"], ["y"])
    np.testing.assert_allclose(site.linearize(x).operator.matrix(), [[2 * 0.9 / 0.8]], rtol=1e-5)
    rate = np.exp(0.7 * 0.9 + 0.2)
    poisson = stats.poisson(rate).logpmf(COUNTS[0]).sum()
    np.testing.assert_allclose(site.log_rest(x), poisson, rtol=1e-5)
    normal = stats.norm(0.9**2 + 0.2, 0.8).logpdf(1.3)
    prior = stats.norm(0, 0.5).logpdf(0.2)
    np.testing.assert_allclose(site.log_likelihood(x), poisson + normal + prior, rtol=1e-5)

    # Its twist is the product of both parts', whose shift is the gradient at the denoised sample.
    t = jnp.array(0.3)
    value = local_twist(guidance.dps)(gaussian_1d(), site, x, t)

    def log_psi(x):
        denoised = gaussian_1d().denoise(x, t)
        return site.log_likelihood(denoised) - prior

    scale = gaussian_1d().schedule.sigma(t) ** 2 / gaussian_1d().schedule.alpha(t)
    np.testing.assert_allclose(value.shift, scale * jax.grad(log_psi)(x), rtol=1e-4)


@pytest.mark.parametrize("order", quick([1, 2], 2))
def test_a_path_is_retraced_as_it_came_about(order):
    """The same particles and increments; under another measurement, those that SMC would have given it."""
    times = smcdiff.log_snr_times(gaussian().schedule, STEPS)
    problems = [inverse.InverseProblem(inverse.dense(A, (2,)), Y + shift, 0.5) for shift in (0.0, 1.0)]
    ours, other = (
        smcdiff.tds(gaussian(), p, times=times, order=order, twist=guidance.moment_matching())
        for p in problems
    )
    path = particle_gibbs(ours, 2, backward=False).init(None, jax.random.key(1)).position
    particles, increments = jax.jit(lambda fk, x: fk.retrace(x))(ours, path.particles.x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), path.particles, particles
    )
    np.testing.assert_allclose(increments, path.log_increments, rtol=1e-3, atol=1e-3)

    # The product of all weights is the likelihood at the end times the ratio of chain and steered chain.
    particles, increments = jax.jit(lambda fk, x: fk.retrace(x))(other, path.particles.x)
    np.testing.assert_allclose(
        particles.value.log_twist[-1], problems[1].log_likelihood(path.particles.x[-1]), rtol=1e-5
    )
    if order == 1:
        again = [
            other.log_transition(
                jax.tree.map(lambda leaf, k=k: leaf[k], particles),
                jax.tree.map(lambda leaf, k=k: leaf[k + 1], particles),
                k,
            )[1]
            for k in range(STEPS - 1)
        ]
        np.testing.assert_allclose(increments[1:-1], again, rtol=1e-3, atol=1e-3)
    assert np.abs(increments - path.log_increments).max() > 0.1
