"""Algorithms as NumPyro kernels: chain methods, warm-up, what NumPyro and ArviZ read, and blocks of NumPyro's Gibbs.

A regression with two weights, whose posterior is Gaussian and correlated. Standard errors come from effective sample
sizes; 5 of them are allowed, under normality a false failure in 10^6 checks, of which there are some 20. Keys are
fixed.
"""

import functools

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Gibbs

from smcdiff.mcmc import hmc, mala
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.ppl import as_numpyro_kernel

pytestmark = pytest.mark.lenient_promotion  # of NumPyro's kernels

Z = 5.0
SLOPES, Y = np.array([-1.0, 0.3, 2.0], np.float32), np.array([2.0, 1.0, -1.0], np.float32)


def model(slopes, y):
    a = numpyro.sample("a", dist.Normal(1.0, 2.0))
    b = numpyro.sample("b", dist.LogNormal(0.0, 1.0))
    numpyro.deterministic("log_b", jnp.log(b))
    numpyro.sample("y", dist.Normal(a + jnp.log(b) * slopes, 0.5).to_event(1), obs=y)


def exact():
    """Mean and covariance of (a, log b)."""
    design = np.stack([np.ones(3), SLOPES], 1)
    covariance = np.linalg.inv(np.diag([1 / 4.0, 1.0]) + design.T @ design / 0.25)
    return covariance @ (np.array([1 / 4.0, 0.0]) + design.T @ Y / 0.25), covariance


def check(mcmc):
    samples = mcmc.get_samples(group_by_chain=True)
    x = np.stack([samples["a"], samples["log_b"]], -1).astype(float)
    np.testing.assert_allclose(samples["log_b"], np.log(samples["b"]), rtol=1e-5, atol=1e-5)
    mean, covariance = exact()
    gaps = x - mean
    features = np.concatenate([gaps, gaps**2, gaps.prod(-1, keepdims=True)], -1)
    expected = np.concatenate([np.zeros(2), np.diag(covariance), covariance[:1, 1]])
    for i, value in enumerate(expected):
        ess = float(az.ess(features[..., i], method="mean"))
        assert ess > 100
        error = (features[..., i].mean() - value) / (features[..., i].std() / np.sqrt(ess))
        assert abs(error) < Z, (i, error)


KERNELS = {
    "hmc": (functools.partial(hmc, num_integration_steps=4), 0.8),
    "slices": (functools.partial(hit_and_run_slice, width=1.0), None),
}


@pytest.mark.parametrize(
    ("name", "chain_method"),
    [
        ("hmc", "vectorized"),
        ("slices", "vectorized"),
        *(pytest.param("hmc", how, marks=pytest.mark.slow) for how in ("sequential", "parallel")),
    ],
)
def test_numpyros_runner_takes_them(name, chain_method):
    builder, target_acceptance = KERNELS[name]
    kernel = as_numpyro_kernel(model, builder, target_acceptance=target_acceptance)
    mcmc = MCMC(
        kernel,
        num_warmup=150,
        num_samples=600,
        num_chains=2,
        chain_method=chain_method,
        progress_bar=False,
    )
    field = "info.acceptance_rate" if name == "hmc" else "info.is_accepted"
    mcmc.run(jax.random.key(0), SLOPES, Y, extra_fields=(field,))
    check(mcmc)
    rate = np.mean(mcmc.get_extra_fields()[field])
    # Dual averaging ends a few percent above its aim.
    assert (0.7 < rate < 0.97) if name == "hmc" else rate > 0.99
    data = az.from_numpyro(mcmc)
    assert {"a", "b", "log_b"} <= set(data.posterior) and data.posterior["a"].shape == (2, 600)


def test_settings_are_frozen_after_the_warm_up():
    kernel = as_numpyro_kernel(model, KERNELS["hmc"][0], target_acceptance=0.8)
    state = kernel.init(jax.random.key(1), 30, None, (SLOPES, Y), {})
    step = jax.jit(lambda state: kernel.sample(state, (SLOPES, Y), {}))
    sizes = []
    for _ in range(35):
        state = step(state)
        sizes.append(float(state.adaptation.settings["step_size"]))
    assert len(set(sizes[:30])) > 20 and len(set(sizes[29:])) == 1


def test_they_are_blocks_of_numpyros_gibbs():
    """The density that a block knows changes with the other one's site, and is computed anew."""
    gibbs = Gibbs([(as_numpyro_kernel(model, mala, target_acceptance=0.6), ["a"]), (NUTS(model), None)])
    mcmc = MCMC(gibbs, num_warmup=150, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(2), SLOPES, Y)
    check(mcmc)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"target_acceptance must lie between 0 and 1, got 1\.5"):
        as_numpyro_kernel(model, hmc, target_acceptance=1.5)
