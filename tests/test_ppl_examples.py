"""NumPyro's standard examples through `target_from_numpyro`: every algorithm agrees with NumPyro's NUTS.

A list of models x a list of algorithms. Means and variances of all unconstrained values are compared with those of a
long run of NUTS; their standard errors come from the effective sample sizes of both, and 5 of them are allowed. Under
normality a false failure happens in 6e-7 of the comparisons, of which there are some 100. Keys are fixed.
"""

import functools

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam
from scipy import stats
from sklearn.datasets import load_breast_cancer

import smcdiff
from smcdiff.mcmc import hmc, window_adaptation
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.ppl import as_numpyro_kernel, target_from_numpyro

pytestmark = [pytest.mark.slow, pytest.mark.lenient_promotion]

Z, CHAINS = 5.0, 16


def schools(errors, effects):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", errors.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, errors), obs=effects)


def logistic(features, labels):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 3.0))
    with numpyro.plate("feature", features.shape[1]):
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0))
    numpyro.sample("label", dist.Bernoulli(logits=intercept + features @ weights), obs=labels)


def gaussian_process(x, y):
    variance = numpyro.sample("variance", dist.LogNormal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    length = numpyro.sample("length", dist.LogNormal(-1.0, 1.0))
    distances = (x[:, None] - x[None]) / length
    kernel = variance * jnp.exp(-0.5 * distances**2) + (noise + 1e-5) * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=y)


def _schools_data():
    return np.array([15, 10, 16, 11, 9, 11, 10, 18.0]), np.array([28, 8, -3, 7, -1, 1, 18, 12.0])


def _cancer_data():
    data = load_breast_cancer()
    features = data.data[:, [0, 1, 4, 8]]
    return (features - features.mean(0)) / features.std(0), data.target


def _curve_data():
    x = np.linspace(-1, 1, 25)
    signal = x + 0.2 * x**3 + 0.5 * (0.5 + x) ** 2 * np.sin(4 * x)
    return x, signal - signal.mean() + 0.15 * np.random.default_rng(0).normal(size=25)


MODELS = {
    "eight schools": (
        numpyro.handlers.reparam(schools, config={"theta": LocScaleReparam(0.0)}),
        _schools_data,
    ),
    "logistic regression": (logistic, _cancer_data),
    "gaussian process": (gaussian_process, _curve_data),
}


def _arguments(name):
    return tuple(jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32) for a in MODELS[name][1]())


@functools.cache
def reference(name):
    """Means, variances and their standard errors, of NumPyro's NUTS on the unconstrained scale."""
    model, _ = MODELS[name]
    mcmc = MCMC(
        NUTS(model),
        num_warmup=500,
        num_samples=2000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *_arguments(name))
    return moments(unconstrained(target_from_numpyro(model, *_arguments(name)), mcmc))


def unconstrained(target, mcmc):
    """The samples of a NumPyro run, (chain, draw, d)."""
    sites = {name: mcmc.get_samples(group_by_chain=True)[name] for name in target.site_names}
    return np.asarray(jax.jit(jax.vmap(jax.vmap(target.unconstrain)))(sites))


def moments(x):
    """Mean and variance of each coordinate of (chain, draw, d), and their standard errors by effective sample size."""
    features = np.concatenate([x, (x - x.mean((0, 1))) ** 2], -1).astype(float)
    ess = np.array([float(az.ess(features[..., i], method="mean")) for i in range(features.shape[-1])])
    assert ess.min() > 100, ess
    return features.mean((0, 1)), features.std((0, 1)) / np.sqrt(ess)


def start_of(target):
    return jax.vmap(target.initial_position)(jax.random.split(jax.random.key(1), CHAINS))


def by_hmc(name, target):
    """Three steps of .5 to .8 are near a quarter of a period; near half of one, squares would hardly mix."""
    found = window_adaptation(jax.random.key(2), target, hmc, start_of(target), 300, num_integration_steps=3)
    algorithm = hmc(target, **found.settings, num_integration_steps=3)
    return smcdiff.run(
        jax.random.key(3), algorithm, 500, position=found.positions, num_chains=CHAINS, progress=False
    ).samples


def by_blackjax(name, target):
    found = window_adaptation(jax.random.key(2), target.logdensity, blackjax.nuts, start_of(target), 300)
    algorithm = blackjax.nuts(target.logdensity, **found.settings)
    return smcdiff.run(
        jax.random.key(3), algorithm, 200, position=found.positions, num_chains=CHAINS, progress=False
    ).samples


def by_slices(name, target):
    """No gradients, no settings but a width, as a NumPyro kernel under NumPyro's runner."""
    model, _ = MODELS[name]
    kernel = as_numpyro_kernel(model, functools.partial(hit_and_run_slice, width=2.0))
    mcmc = MCMC(
        kernel,
        num_warmup=500,
        num_samples=4000,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
        thinning=4,
    )
    mcmc.run(jax.random.key(4), *_arguments(name))
    return unconstrained(target, mcmc)


ALGORITHMS = {"hmc": by_hmc, "blackjax nuts": by_blackjax, "slices as a NumPyro kernel": by_slices}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_with_numpyros_nuts(name, algorithm):
    target = target_from_numpyro(MODELS[name][0], *_arguments(name))
    mean, error = moments(ALGORITHMS[algorithm](name, target))
    expected, expected_error = reference(name)
    errors = (mean - expected) / np.hypot(error, expected_error)
    assert np.all(np.abs(errors) < Z), errors.round(1)


def test_tempered_smc_goes_from_the_prior_to_the_posterior():
    """BlackJAX's, between the two parts of the density; its evidence is that of importance sampling about the mode."""
    name, num = "logistic regression", 1000
    target = target_from_numpyro(MODELS[name][0], *_arguments(name))
    particles = jax.vmap(target.sample_prior)(jax.random.split(jax.random.key(5), num))
    settings = {
        "step_size": 0.2,
        "inverse_mass_matrix": jnp.ones(target.event_shape),
        "num_integration_steps": 5,
    }
    algorithm = blackjax.adaptive_tempered_smc(
        target.log_prior,
        target.log_likelihood,
        blackjax.hmc.build_kernel(),
        blackjax.hmc.init,
        blackjax.smc.extend_params(settings),
        blackjax.smc.resampling.systematic,
        0.7,
        num_mcmc_steps=4,
    )
    state, log_evidence, step = algorithm.init(particles), 0.0, jax.jit(algorithm.step)
    while state.tempering_param < 1:
        state, info = step(jax.random.fold_in(jax.random.key(6), int(1e6 * state.tempering_param)), state)
        log_evidence += float(info.log_likelihood_increment)

    mean, _ = reference(name)
    centre, spread = mean[: target.event_shape[0]], np.sqrt(mean[target.event_shape[0] :])
    draws = centre + 1.3 * spread * np.random.default_rng(7).standard_t(8, (5000, len(centre)))
    log_proposal = stats.t(8, centre, 1.3 * spread).logpdf(draws).sum(1)
    log_weights = (
        np.asarray(jax.vmap(target.logdensity)(jnp.asarray(draws, jnp.float32)), float) - log_proposal
    )
    ratios = np.exp(log_weights - log_weights.max())
    expected = np.log(ratios.mean()) + log_weights.max()
    error = ratios.std() / ratios.mean() / np.sqrt(len(ratios))
    assert error < 0.03
    # Of tempered SMC: some ten levels at 70 % of the particles, each with a variance of the weights below .5 / num.
    assert abs(log_evidence - expected) < Z * np.hypot(error, np.sqrt(10 * 0.5 / num))
    shift = (np.asarray(state.particles).mean(0) - centre) / (spread / np.sqrt(0.1 * num))
    assert np.all(np.abs(shift) < Z), shift
