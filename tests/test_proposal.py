"""Learned proposals: the flow's density, what training finds, and the chain that corrects it.

The model is conjugate, so that the posterior of every data set is known. Chains are independent; means over them are
allowed 5 of their standard errors, which under normality fail falsely in 10^6 checks. Keys are fixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import smcdiff
from smcdiff.mcmc import independence
from smcdiff.nets import ConditionalFlow
from smcdiff.ppl import learn_proposal, target_from_numpyro

Z, CHAINS = 5.0, 256


def model(slopes, y=None):
    """Two weights of a regression with noise .5: theta | y is Gaussian."""
    a = numpyro.sample("a", dist.Normal(1.0, 2.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(a + b * slopes, 0.5).to_event(1), obs=y)


SLOPES = np.array([-1.0, 0.3, 2.0], np.float32)


def posterior(y):
    design = np.stack([np.ones(3), SLOPES], 1)
    precision = np.diag([1 / 4.0, 1.0]) + design.T @ design / 0.25
    covariance = np.linalg.inv(precision)
    return covariance @ (np.array([1 / 4.0, 0.0]) + design.T @ y / 0.25), covariance


@functools.cache
def learned():
    return learn_proposal(
        jax.random.key(0), model, SLOPES, data="y", num_simulations=4000, num_steps=600, layers=4, width=32
    )


@pytest.mark.parametrize("size", [1, 3])
def test_the_flows_density_is_that_of_its_draws(size):
    """It integrates to one against a Student law, and its draws have its mean log density."""
    flow = ConditionalFlow(jax.random.key(1), size, 2, layers=3, width=8)
    rng = np.random.default_rng(0)
    flow = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), flow)
    context = jnp.array([0.4, -1.0])
    draws = jax.jit(jax.vmap(lambda key, c: flow.sample(key, c), (0, None)))(
        jax.random.split(jax.random.key(2), 20_000), context
    )
    log_prob = jax.jit(jax.vmap(lambda x, c: flow.log_prob(x, c), (0, None)))
    # Importance sampling from a wide Student law around the draws: the mean weight is one.
    centre, scale = np.median(draws, 0), 2.0 * np.asarray(draws).std(0)
    wide = stats.t(3, centre, scale)
    x = wide.rvs((40_000, size), random_state=np.random.default_rng(3))
    weights = np.exp(np.asarray(log_prob(jnp.asarray(x, jnp.float32), context)) - wide.logpdf(x).sum(1))
    assert abs(weights.mean() - 1) < Z * weights.std() / np.sqrt(len(x))
    assert weights.std() / np.sqrt(len(x)) < 0.02
    # E_q[f] from draws and from weights.
    for f in (lambda v: np.tanh(v[:, 0]), lambda v: np.tanh(v).prod(1)):
        a, b = f(np.asarray(draws)), f(x) * weights
        error = np.hypot(a.std() / np.sqrt(len(a)), b.std() / np.sqrt(len(b)))
        assert abs(a.mean() - b.mean()) < Z * error


def test_training_comes_near_the_posterior_of_any_data():
    """Means and deviations within a fifth of a deviation, for data that training never saw."""
    for y in (np.array([2.0, 1.0, -1.0]), np.array([0.0, 0.5, 1.5])):
        law = learned().given({"y": y})
        draws = np.asarray(
            jax.jit(jax.vmap(lambda law, key: law.sample(key), (None, 0)))(
                law, jax.random.split(jax.random.key(4), 4000)
            )
        )
        mean, covariance = posterior(y)
        std = np.sqrt(np.diag(covariance))
        assert np.all(np.abs(np.median(draws, 0) - mean) < 0.25 * std)
        spread = (np.quantile(draws, 0.84, axis=0) - np.quantile(draws, 0.16, axis=0)) / 2
        assert np.all(np.abs(spread / std - 1) < 0.25)
    assert learned().losses[-50:].mean() < learned().losses[:50].mean() - 0.5


def test_metropolis_corrects_what_the_flow_misses():
    """Exact means and variances from a proposal that is made wrong on purpose; new data compile nothing."""
    wrong = learned()
    wrong = wrong.__class__(
        wrong.flow,
        wrong.theta_mean + 0.1,
        1.2 * wrong.theta_std,
        *jax.tree.leaves((wrong.data_mean, wrong.data_std)),
        wrong.losses,
        wrong.sites,
        wrong.data_names,
    )
    for y in (np.array([2.0, 1.0, -1.0], np.float32), np.array([0.0, 0.5, 1.5], np.float32)):
        target = target_from_numpyro(model, SLOPES, y=y)
        kernel = independence(target, wrong.given({"y": y}))
        trace = smcdiff.run(jax.random.key(5), kernel, 150, num_chains=CHAINS, progress=False)
        kept = np.asarray(trace.samples, float)[:, 50:]
        mean, covariance = posterior(y)
        features = np.concatenate([kept - mean, (kept - mean) ** 2 - np.diag(covariance)], -1).mean(1)
        errors = features.mean(0) / (features.std(0, ddof=1) / np.sqrt(CHAINS))
        assert np.all(np.abs(errors) < Z), errors
        assert 0.2 < trace.info.acceptance_rate.mean() < 0.95
        # Log weights are importance weights of the evidence.
        log_weights = np.asarray(trace.info.log_weight, float).ravel()
        design = np.stack([np.ones(3), SLOPES], 1)
        spread = 0.25 * np.eye(3) + design @ np.diag([4.0, 1.0]) @ design.T
        evidence = stats.multivariate_normal(design @ [1.0, 0.0], spread).logpdf(y)
        ratios = np.exp(log_weights - evidence)
        assert abs(ratios.mean() - 1) < Z * ratios.std() / np.sqrt(ratios.size)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"data lacks the observed sites \['y'\]"):
        learned().given({"z": np.zeros(3)})
    with pytest.raises(ValueError, match="data must have 3 numbers"):
        learned().given({"y": np.zeros(4)})
    with pytest.raises(ValueError, match=r"data must name sites that the model draws.*\['z'\]"):
        learn_proposal(jax.random.key(0), model, SLOPES, data="z")
    with pytest.raises(TypeError, match=r"proposal must have sample\(key\) and log_prob"):
        independence(lambda x: -jnp.sum(x**2), lambda key: key)
    with pytest.raises(ValueError, match="layers must be"):
        ConditionalFlow(jax.random.key(0), 2, 1, layers=0)
