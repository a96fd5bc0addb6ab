"""Kernels for a diffusion site of a NumPyro model: split Gibbs, whose prior is blurred by rho, and auxiliary gradient.

The diffusions are Gaussian, hence the blurred priors too, and all laws are integrals over at most two numbers. The 64
chains are independent; the mean of each feature may be off by 5 standard errors over chains: under normality a false
failure in 10^6 checks. With 40 reverse steps from rho the denoised samples are off by less than .002 in mean and
deviation, a tenth of a standard error. Keys are fixed.
"""

import functools

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from rows import quick
from scipy import stats

import smcdiff
from smcdiff import ppl, schedules
from smcdiff.ppl import AuxiliaryGradient, DiffusionPrior, SplitGibbs

pytestmark = pytest.mark.lenient_promotion  # of NumPyro's NUTS and Gibbs

Z, NUM_CHAINS, RHO = 5.0, 64, 0.6
A = np.array([[1.0, -0.6], [0.3, 0.8]], np.float32)
Y = np.array([1.7, -0.2], np.float32)
MEAN, COVARIANCE = np.array([0.6, -0.8]), np.array([[1.1, 0.4], [0.4, 0.6]])
COUNTS = np.array([2, 0, 3, 1])


def gaussian():
    return smcdiff.GaussianDiffusion(MEAN, COVARIANCE, schedules.cosine())


def gaussian_1d():
    return smcdiff.GaussianDiffusion(np.array([0.6]), np.array([[0.7]]), schedules.cosine())


def linear(diffusion, matrix, y):
    x = numpyro.sample("x", DiffusionPrior(diffusion))
    numpyro.deterministic("signal", matrix @ x)
    numpyro.sample("y", dist.Normal(matrix @ x, 0.5).to_event(1), obs=y)


def counts(diffusion, y, square):
    """One site that is not linear, and others that are not Gaussian."""
    x = numpyro.sample("x", DiffusionPrior(diffusion))[0]
    with numpyro.plate("counts", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(0.7 * x)), obs=y)
    if square is not None:
        numpyro.sample("square", dist.Normal(x**2, 0.8), obs=square)


def with_gain(diffusion, matrix, y):
    gain = numpyro.sample("gain", dist.Normal(1.0, 0.3))
    x = numpyro.sample("x", DiffusionPrior(diffusion))
    numpyro.sample("y", dist.Normal(gain * (matrix @ x), 0.5).to_event(1), obs=y)


def _square_features(s):
    return np.concatenate([s["x"], s["x"] ** 2], -1)


def _linear_posterior(gain, rho):
    """Mean, covariance and log evidence given the gain."""
    prior, matrix = COVARIANCE + rho**2 * np.eye(2), gain * A
    spread = matrix @ prior @ matrix.T + 0.25 * np.eye(2)
    k = prior @ matrix.T @ np.linalg.inv(spread)
    evidence = stats.multivariate_normal(matrix @ MEAN, spread).logpdf(Y)
    return MEAN + k @ (Y - matrix @ MEAN), prior - k @ matrix @ prior, evidence


def _linear_exact(rho):
    mean, covariance, _ = _linear_posterior(1.0, rho)
    return np.concatenate([mean, mean**2 + np.diag(covariance)])


def _counts_exact(square, rho):
    x = np.linspace(-5, 6, 4001)
    log_weights = stats.norm(0.6, np.sqrt(0.7 + rho**2)).logpdf(x)
    log_weights += sum(stats.poisson(np.exp(0.7 * x)).logpmf(y) for y in COUNTS)
    if square is not None:
        log_weights += stats.norm(x**2, 0.8).logpdf(square)
    weights = np.exp(log_weights - log_weights.max())
    return np.array([weights @ x, weights @ x**2]) / weights.sum()


def _gain_features(s):
    return np.concatenate([s["gain"][..., None], s["gain"][..., None] ** 2, s["x"], s["x"] ** 2], -1)


def _gain_exact(rho, copy=True):
    """Moments of the gain and of the copies, or of the samples without noise."""
    gains = np.linspace(-0.8, 2.8, 721)
    rows, log_weights = [], []
    for gain in gains:
        mean, covariance, evidence = _linear_posterior(gain, rho)
        if not copy:  # x given its copy z, whose posterior is N(mean, covariance)
            shrink = COVARIANCE @ np.linalg.inv(COVARIANCE + rho**2 * np.eye(2))
            mean = MEAN + shrink @ (mean - MEAN)
            covariance = COVARIANCE - shrink @ COVARIANCE + shrink @ covariance @ shrink.T
        rows.append(np.concatenate([[gain, gain**2], mean, mean**2 + np.diag(covariance)]))
        log_weights.append(evidence + stats.norm(1, 0.3).logpdf(gain))
    weights = np.exp(log_weights - np.max(log_weights))
    return weights @ np.array(rows) / weights.sum()


CASES = {
    "linear": (linear, (gaussian(), A, Y), _square_features, _linear_exact),
    "counts and a square": (
        counts,
        (gaussian_1d(), COUNTS, np.float32(1.3)),
        _square_features,
        functools.partial(_counts_exact, 1.3),
    ),
    "counts": (
        counts,
        (gaussian_1d(), COUNTS, None),
        _square_features,
        functools.partial(_counts_exact, None),
    ),
    "unknown gain": (with_gain, (gaussian(), A, Y), _gain_features, _gain_exact),
}


KERNELS = {  # and by what the prior is blurred
    "split Gibbs": (functools.partial(SplitGibbs, rho=RHO, num_steps=40), RHO),
    "auxiliary gradient": (functools.partial(AuxiliaryGradient, num_steps=40), 0.0),
}
ROWS = {f"{kernel}, {case}": (kernel, case) for case in CASES for kernel in KERNELS}


def posterior(name, kernel="split Gibbs"):
    return inferred(name, kernel, 0.0)


@functools.cache
def inferred(name, kernel, added):
    """The joint posterior, with ``added`` to the last of the data."""
    model, (*given, y), *_ = CASES[name]
    return ppl.infer(
        jax.random.key(2),
        model,
        *given,
        y if y is None else y + np.float32(added),
        kernels={"x": KERNELS[kernel][0]},
        num_warmup=60,
        num_samples=200,
        num_chains=NUM_CHAINS,
        progress=False,
    )


@pytest.mark.parametrize(
    "row",
    quick(
        ROWS,
        "split Gibbs, linear",
        "split Gibbs, counts",
        "split Gibbs, counts and a square",
        "auxiliary gradient, linear",
        "auxiliary gradient, counts and a square",
    ),
)
def test_the_posterior_is_exact_under_the_kernels_prior(row):
    kernel, case = ROWS[row]
    _, _, features, exact = CASES[case]
    means = features(posterior(case, kernel).samples).mean(1)
    standard_errors = means.std(0, ddof=1) / np.sqrt(NUM_CHAINS)
    errors = (means.mean(0) - exact(KERNELS[kernel][1])) / standard_errors
    assert np.all(np.abs(errors) < Z), errors
    assert np.all(standard_errors < 0.05)


def test_denoised_samples_have_the_prior_itself_beside_every_parameter():
    """Given the gain they have the measurement with the noise of the copy, so that the gain's law is the same."""
    samples = posterior("unknown gain").samples
    means = _gain_features({"gain": samples["gain"], "x": samples["x_denoised"]}).mean(1)
    errors = (means.mean(0) - _gain_exact(RHO, copy=False)) / (means.std(0, ddof=1) / np.sqrt(NUM_CHAINS))
    assert np.all(np.abs(errors) < Z), errors
    copies = (means.mean(0) - _gain_exact(RHO)) / (means.std(0, ddof=1) / np.sqrt(NUM_CHAINS))
    assert np.abs(copies).max() > Z  # that the copies are something else would be seen


def test_the_blur_would_be_seen():
    """The test above can tell the blurred prior from the prior itself."""
    means = _square_features(posterior("linear").samples).mean(1)
    errors = (means.mean(0) - _linear_exact(0.0)) / (means.std(0, ddof=1) / np.sqrt(NUM_CHAINS))
    assert np.abs(errors).max() > Z


def test_a_linear_model_is_drawn_without_rejection_and_others_with_some():
    info = posterior("linear").info
    np.testing.assert_allclose(info["x.acceptance_rate"], 1.0, atol=1e-3)
    assert info["x.solve_residual"].max() < 1e-4
    rate = posterior("counts and a square").info["x.acceptance_rate"].mean()
    assert 0.2 < rate < 0.95
    np.testing.assert_array_equal(posterior("counts").info["x.solve_residual"], 0.0)
    signal = posterior("linear").samples["signal"]
    np.testing.assert_allclose(signal, posterior("linear").samples["x"] @ A.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_new_data_compile_nothing(kernel):
    inferred("linear", kernel, 0.0)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    inferred("linear", kernel, 1.0)
    assert not [event for event in compiled if "backend_compile" in event]
    jax.jit(lambda x: x + 1.0)(jnp.ones(7))  # the listener would have heard of a program
    assert [event for event in compiled if "backend_compile" in event]


def test_the_warm_up_tunes_the_noise_and_freezes_it():
    info = posterior("linear", "auxiliary gradient").info
    assert np.all(info["x.rho"] == info["x.rho"][:, :1]) and np.ptp(info["x.rho"][:, 0]) > 0
    assert abs(info["x.acceptance_rate"].mean() - 0.57) < 0.1, info["x.acceptance_rate"].mean()
    fixed = smcdiff.infer(
        jax.random.key(2),
        linear,
        gaussian(),
        A,
        Y,
        kernels={"x": functools.partial(AuxiliaryGradient, rho=0.3, num_steps=4)},
        num_warmup=0,
        num_samples=2,
        progress=False,
    )
    np.testing.assert_allclose(fixed.info["x.rho"], 0.3, rtol=1e-6)


def test_it_is_a_numpyro_kernel_of_its_own_and_moves_plates():
    def copies(diffusion, y):
        with numpyro.plate("copy", 2):
            x = numpyro.sample("x", DiffusionPrior(diffusion))
            numpyro.sample("y", dist.Normal(x, 0.6).to_event(1), obs=y)

    y = np.array([[1.7, -0.2], [-0.5, 0.4]], np.float32)
    mcmc = MCMC(
        SplitGibbs(copies, rho=RHO, num_steps=40), num_warmup=20, num_samples=1500, progress_bar=False
    )
    mcmc.run(jax.random.key(3), gaussian(), y, extra_fields=("denoised",))
    draws = np.asarray(mcmc.get_samples()["x"], float)
    prior = COVARIANCE + RHO**2 * np.eye(2)
    gain = prior @ np.linalg.inv(prior + 0.36 * np.eye(2))
    exact, variance = MEAN + (y - MEAN) @ gain.T, np.diag(prior - gain @ prior)
    # Autocorrelation is below .7 for these rho and noise: an effective draw in six.
    assert np.all(np.abs(draws.mean(0) - exact) < Z * np.sqrt(6 * variance / 1500))
    # The denoised samples have the prior itself, and the measurement with the noise of the copy.
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + (0.36 + RHO**2) * np.eye(2))
    exact, variance = MEAN + (y - MEAN) @ gain.T, np.diag(COVARIANCE - gain @ COVARIANCE)
    denoised = np.asarray(mcmc.get_extra_fields()["denoised"], float)
    assert np.all(np.abs(denoised.mean(0) - exact) < Z * np.sqrt(6 * variance / 1500))
    # The auxiliary gradient sampler has the prior and the measurement as they are written.
    mcmc = MCMC(AuxiliaryGradient(copies, num_steps=40), num_warmup=200, num_samples=3000, progress_bar=False)
    mcmc.run(jax.random.key(3), gaussian(), y, extra_fields=("rho",))
    draws, gain = (
        np.asarray(mcmc.get_samples()["x"], float),
        COVARIANCE @ np.linalg.inv(COVARIANCE + 0.36 * np.eye(2)),
    )
    exact, variance = MEAN + (y - MEAN) @ gain.T, np.diag(COVARIANCE - gain @ COVARIANCE)
    ess = az.ess(draws[None].reshape(1, 3000, 4).transpose(2, 0, 1)[0])
    assert ess > 300 and np.all(np.abs(draws.mean(0) - exact) < Z * np.sqrt(variance / 300))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rho": -0.1}, "rho must be positive"),
        ({"rho": 1e-3}, "rho must exceed the noise exp"),
        ({"rho": 0.5, "num_steps": 0}, "num_steps"),
        ({"rho": 0.5, "order": 3}, "order must be 1 or 2"),
        ({"rho": 1e9}, "rho must be at most sigma/alpha"),
    ],
)
def test_bad_input(options, told):
    with pytest.raises(ValueError, match=told):
        SplitGibbs(linear, **options).init(jax.random.key(0), 0, None, (gaussian(), A, Y), {})
