"""`DiffusionPrior` as a NumPyro distribution: its draws, its density where there is one, its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from ppl_models import gaussian, mixture, network

import smcdiff
from smcdiff.ppl import DiffusionPrior

pytestmark = pytest.mark.lenient_promotion  # of NumPyro's NUTS and Gibbs

Z = 5.0  # standard errors that are allowed


def test_it_draws_the_samples_of_the_reverse_process_under_plates_and_in_predictive():
    def model(diffusion):
        with numpyro.plate("copies", 3):
            numpyro.sample("x", DiffusionPrior(diffusion))

    draws = Predictive(model, num_samples=1000)(jax.random.key(0), mixture())["x"]
    assert draws.shape == (1000, 3, 2)
    mean = np.asarray(mixture().mixture.mean())
    std = np.sqrt(np.diag(np.asarray(mixture().mixture.covariance())))
    # 3000 draws; the chain of 100 steps is off by less than .01 in the mean and .02 in the deviation.
    np.testing.assert_allclose(
        np.asarray(draws).mean((0, 1)), mean, atol=0.01 + Z * std.max() / np.sqrt(3000)
    )
    np.testing.assert_allclose(np.asarray(draws).std((0, 1)), std, rtol=0.02 + Z / np.sqrt(2 * 3000))


def test_its_density_is_the_models_own():
    prior, x = DiffusionPrior(mixture()), jnp.array([[0.3, -0.2], [-1.0, 1.0]])
    expected = jax.vmap(mixture().at(jnp.zeros(())).logdensity)(x)
    np.testing.assert_allclose(prior.log_prob(x), expected, rtol=1e-5)
    np.testing.assert_allclose(prior.expand([2]).to_event(1).log_prob(x), expected.sum(), rtol=1e-5)
    assert prior.log_prob(x[0]).shape == () and prior.event_shape == (2,) and prior.support(x).all()


@pytest.mark.slow
def test_the_flows_density_is_that_of_the_exact_model_with_its_noise():
    x, noise = jnp.array([0.3, -0.2]), np.exp(-4.0)
    smeared = mixture().mixture.diffuse(jnp.ones(()), jnp.asarray(noise))

    @jax.jit
    def value_and_grad(model, x):
        density = functools.partial(smcdiff.ode_logdensity, model, log_snr_max=4.0, rtol=1e-5, atol=1e-5)
        return jax.value_and_grad(density)(x)

    value, gradient = value_and_grad(mixture(), x)
    # The flow ends in N(0, sigma^2 I), without what is left of the mean: .003 here.
    np.testing.assert_allclose(value, smeared.logdensity(x), atol=1e-2)
    np.testing.assert_allclose(gradient, smeared.score(x), atol=2e-2)
    estimates = [
        float(smcdiff.ode_logdensity(gaussian(), x, num_probes=n, log_snr_max=4.0)) for n in (None, 400)
    ]
    # Signs estimate a trace of a symmetric matrix with the variance 2 sum of squares off the diagonal, .4^2 at most.
    assert abs(estimates[0] - estimates[1]) < 0.2
    assert np.isnan(smcdiff.ode_logdensity(gaussian(), x, max_steps=2))


def test_weights_are_leaves():
    count = []

    @jax.jit
    def draw(key, prior):
        count.append(1)
        return prior.sample(key, (4,))

    scaled = jax.tree.map(lambda leaf: 2.0 * leaf, network())
    first, second = (draw(jax.random.key(0), DiffusionPrior(m, num_steps=4)) for m in (network(), scaled))
    assert len(count) == 1 and not np.allclose(first, second)


def test_a_density_that_is_not_known_is_not_made_up():
    with pytest.raises(TypeError, match=r"scores of a Diffusion and no density.*smcdiff\.infer.*pf_ode"):
        DiffusionPrior(network()).log_prob(jnp.zeros(2))
    assert np.isfinite(DiffusionPrior(network(), log_density="pf_ode").log_prob(jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"must end with the axes \(2,\).*got shape \(3,\)"):
        DiffusionPrior(mixture()).log_prob(jnp.zeros(3))
    with pytest.raises(ValueError, match="log_density must be None or"):
        DiffusionPrior(mixture(), log_density="ode")
    with pytest.raises(TypeError, match="DiffusionPrior needs a target with the capability DiffusionModel"):
        DiffusionPrior(dist.Normal(0.0, 1.0))
