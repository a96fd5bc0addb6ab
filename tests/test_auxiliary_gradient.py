"""The auxiliary gradient sampler against exact posteriors.

Posteriors of Gaussian mixtures under linear measurements are mixtures; that of counts is integrated on a grid. Chains
start exact, are independent, and must keep every mean feature to 5 standard errors over the chains: under normality one
false failure in 10^6 checks. With 40 reverse steps the error of the reverse process is well below one. Half or twice
the drift rho^2 g, a factor of 2 in the acceptance, or no rejection, are off by 11 to 72.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import smcdiff
from smcdiff import inverse, mcmc, schedules
from smcdiff.mcmc.auxiliary_gradient import _height, auxiliary_gradient

NUM_CHAINS, NUM_STEPS, Z = 16_000, 12, 5.0
SCHEDULE = schedules.cosine()
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[-1.2, 0.4], [0.8, -0.5]])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])
MATRIX, NOISE, Y = np.array([[0.9, -0.6]]), 0.4, np.array([0.3])
COUNTS = np.array([2, 0, 3, 1])


def mixture():
    return smcdiff.GaussianMixtureDiffusion.create(WEIGHTS, MEANS, COVARIANCE, SCHEDULE)


def linear_problem():
    operator = inverse.dense(jnp.asarray(MATRIX, jnp.float32), (2,))
    return smcdiff.InverseProblem(operator, jnp.asarray(Y, jnp.float32), jnp.asarray(NOISE))


def linear_posterior(rng, size):
    """Exact draws, and moments, of a mixture of two posteriors."""
    spread = MATRIX @ COVARIANCE @ MATRIX.T + NOISE**2 * np.eye(1)
    gain = COVARIANCE @ MATRIX.T @ np.linalg.inv(spread)
    means = MEANS + (Y - MEANS @ MATRIX.T) @ gain.T
    covariance = COVARIANCE - gain @ MATRIX @ COVARIANCE
    log_weights = np.log(WEIGHTS) + [stats.multivariate_normal(MATRIX @ m, spread).logpdf(Y) for m in MEANS]
    weights = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    labels = rng.choice(2, size, p=weights)
    x = means[labels] + rng.multivariate_normal(np.zeros(2), covariance, size)
    first = weights @ means
    second = covariance + np.einsum("k,ki,kj->ij", weights, means, means)
    return x, np.array([*first, second[0, 0], second[0, 1], second[1, 1]])


def counts_log_likelihood(x):
    return jnp.sum(COUNTS * 0.7 * x[0] - jnp.exp(0.7 * x[0]))


def counts_posterior(rng, size):
    x = np.linspace(-6, 6, 20_001)
    log_weights = stats.norm(0.6, np.sqrt(0.7)).logpdf(x)
    log_weights += sum(stats.poisson(np.exp(0.7 * x)).logpmf(y) for y in COUNTS)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    return rng.choice(x, size, p=weights)[:, None], np.array([weights @ x, weights @ x**2, weights @ x**3])


def linear_features(x):
    return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)


def counts_features(x):
    return np.concatenate([x, x**2, x**3], 1)


def gaussian():
    return smcdiff.GaussianDiffusion(np.array([0.6]), np.array([[0.7]]), SCHEDULE)


CASES = {
    "linear": (mixture, linear_problem, 0.5, linear_posterior, linear_features),
    "counts": (gaussian, lambda: counts_log_likelihood, 0.8, counts_posterior, counts_features),
}


def run(name):
    make, problem, rho, posterior, features = CASES[name]
    start, exact = posterior(np.random.default_rng(0), NUM_CHAINS)
    trace = smcdiff.run(
        jax.random.key(1),
        auxiliary_gradient(make(), problem(), rho, num_steps=40),
        NUM_STEPS,
        position=jnp.asarray(start, jnp.float32),
        num_chains=NUM_CHAINS,
        thin=NUM_STEPS,
        progress=False,
    )
    found = features(np.asarray(trace.samples[:, -1], float))
    return start, trace, (found.mean(0) - exact) / (found.std(0, ddof=1) / np.sqrt(NUM_CHAINS))


@pytest.mark.parametrize("name", CASES)
def test_the_posterior_is_left_alone(name):
    start, trace, errors = run(name)
    rate = float(trace.info.acceptance_rate.mean())
    assert 0.3 < rate < 0.95, rate  # with neither of which the law would say much
    assert np.mean((trace.samples[:, -1] - start) ** 2) > 0.05
    assert np.all(np.abs(errors) < Z), errors


def test_without_a_likelihood_everything_is_accepted_and_the_prior_kept():
    algorithm = auxiliary_gradient(mixture(), lambda x: 0.0 * jnp.sum(x), 0.7, num_steps=40)
    exact = mixture().mixture
    start = exact.sample(jax.random.key(2), NUM_CHAINS)
    trace = smcdiff.run(
        jax.random.key(3), algorithm, 2, position=start, num_chains=NUM_CHAINS, thin=2, progress=False
    )
    assert np.all(trace.info.is_accepted) and np.all(trace.info.acceptance_rate == 1.0)
    x = np.asarray(trace.samples[:, -1], float)
    errors = (x.mean(0) - np.asarray(exact.mean())) / (x.std(0) / np.sqrt(NUM_CHAINS))
    assert np.all(np.abs(errors) < Z) and np.all(trace.info.num_evaluations == 40)
    assert np.all(np.abs(np.cov(x.T) / np.asarray(exact.covariance()) - 1) < 0.1)


def test_the_acceptance_is_the_ratio_of_joint_densities():
    """A step from x by z to x' and back: log p(x) L(x) q(z | x) p(x' | z), written down for a Gaussian prior."""
    prior, variance, rho = gaussian(), 0.7, 0.5
    kernel = auxiliary_gradient(prior, counts_log_likelihood, rho).step.args[0]
    z = 1.3

    def log_joint(x, new):
        gradient = float(jax.grad(counts_log_likelihood)(jnp.asarray([x]))[0])
        shrink = variance / (variance + rho**2)
        return (
            stats.norm(0.6, np.sqrt(variance)).logpdf(x)
            + float(counts_log_likelihood(jnp.asarray([x])))
            + stats.norm(x + rho**2 * gradient, rho).logpdf(z)
            + stats.norm(0.6 + shrink * (z - 0.6), rho * np.sqrt(shrink)).logpdf(new)
        )

    heights = [
        float(_height(kernel.state_at(jnp.asarray([x])), jnp.asarray([z]), jnp.asarray(rho)))
        for x in (0.4, 0.9)
    ]
    np.testing.assert_allclose(heights[1] - heights[0], log_joint(0.9, 0.4) - log_joint(0.4, 0.9), atol=2e-5)


def test_the_noise_is_tuned_like_a_step_size():
    start = jnp.asarray(linear_posterior(np.random.default_rng(0), 200)[0], jnp.float32)
    found = mcmc.adapt_step_size(
        jax.random.key(4),
        lambda rho: auxiliary_gradient(mixture(), linear_problem(), rho),
        start,
        60,
        target_acceptance=0.57,
    )
    assert abs(found.acceptance_rates[30:].mean() - 0.57) < 0.05
    assert 0.2 < found.settings["step_size"] < 3.0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "told"),
    [
        ((gaussian(), counts_log_likelihood, 0.0), {}, ValueError, "rho must be positive"),
        ((gaussian(), counts_log_likelihood, 1e9), {}, ValueError, "rho must be at most sigma/alpha"),
        ((gaussian(), 3, 0.1), {}, TypeError, "problem must be an InverseProblem"),
        (
            (3, counts_log_likelihood, 0.1),
            {},
            TypeError,
            "auxiliary_gradient needs a target with the capability",
        ),
        (
            (gaussian(), counts_log_likelihood, 0.1),
            {"num_steps": 1},
            ValueError,
            "num_steps must be an integer of",
        ),
        ((gaussian(), counts_log_likelihood, 0.1), {"order": 3}, ValueError, "order must be 1 or 2"),
    ],
)
def test_bad_input(arguments, options, error, told):
    with pytest.raises(error, match=told):
        auxiliary_gradient(*arguments, **options)
