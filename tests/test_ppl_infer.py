"""Joint posteriors of NumPyro models with a diffusion prior.

The reverse chain of Gaussian data is Gaussian whatever its number of steps, so that posteriors under the discretised
prior, for which particle Gibbs is exact, are integrals over two numbers at most. Chains are independent, and means over
them are allowed 5 of their standard errors: under normality a false failure in 10^6 checks, of which there are some 40.
Keys are fixed.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Gibbs
from ppl_models import (
    COUNTS,
    A,
    Y,
    copies,
    counts,
    gaussian,
    gaussian_1d,
    linear,
)
from rows import quick
from scipy import stats
from test_steering import chain_law

import smcdiff
from smcdiff import guidance, schedules
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.ppl import (
    DiffusionPrior,
    ParticleGibbs,
    ParticleMarginal,
    as_numpyro_kernel,
    gibbs_sweep,
    infer,
    infer_smc,
    noise_slice,
    noncenter,
)

pytestmark = pytest.mark.lenient_promotion  # of NumPyro's NUTS and Gibbs

Z, STEPS = 5.0, 16


class Case(NamedTuple):
    model: Any
    args: tuple
    kernels: dict
    features: Any  # of the samples
    exact: Any  # their posterior means


def _linear_features(s):
    return np.stack([s["gain"], s["gain"] ** 2, np.log(s["noise"]), s["x"][..., 0], s["x"][..., 1] ** 2], -1)


def _linear_exact(order=2):
    return _linear_integrals(order)[0]


def _linear_integrals(order=2):
    """Means of the features and the log evidence, by quadrature over gain and log noise; x is Gaussian given both."""
    mean, covariance = chain_law(
        gaussian(), np.asarray(smcdiff.log_snr_times(gaussian().schedule, STEPS)), order
    )
    gain, noise = (
        grid.ravel() for grid in np.meshgrid(np.linspace(-0.8, 2.8, 121), np.linspace(-2.7, 1.7, 121))
    )
    matrices = gain[:, None, None] * A.astype(float)
    spread = matrices @ covariance @ matrices.mT + np.exp(2 * noise)[:, None, None] * np.eye(2)
    k = np.linalg.solve(spread, matrices @ covariance).mT
    residual = Y - matrices @ mean
    x = mean + np.einsum("nij,nj->ni", k, residual)
    variance = (covariance - k @ matrices @ covariance)[:, 1, 1]
    rows = np.stack([gain, gain**2, noise, x[:, 0], x[:, 1] ** 2 + variance], -1)
    solved = np.linalg.solve(spread, residual[..., None])[..., 0]
    log_weights = -0.5 * np.sum(residual * solved, 1) - 0.5 * np.linalg.slogdet(2 * np.pi * spread)[1]
    log_weights += stats.norm(1, 0.3).logpdf(gain) + stats.norm(-0.5, 0.4).logpdf(noise)
    weights = np.exp(log_weights - log_weights.max())
    cell = 3.6 / 120 * 4.4 / 120
    return weights @ rows / weights.sum(), log_weights.max() + np.log(weights.sum() * cell)


def _counts_features(s):
    x = s["x"][..., 0]
    return np.stack([s["shift"], s["shift"] ** 2, x, x**2, x > 0], -1).astype(float)


def _counts_exact(order=2):
    """By quadrature over x and the shift."""
    mean, covariance = chain_law(
        gaussian_1d(), np.asarray(smcdiff.log_snr_times(schedules.cosine(), STEPS)), order
    )
    x, b = (g.ravel() for g in np.meshgrid(np.linspace(-3.5, 4.5, 801), np.linspace(-3, 3, 401)))
    log_weights = stats.norm(mean[0], np.sqrt(covariance[0, 0])).logpdf(x) + stats.norm(0, 0.5).logpdf(b)
    log_weights += stats.norm(x**2 + b, 0.8).logpdf(COUNTS[1])
    log_weights += sum(stats.poisson(np.exp(0.7 * x + b)).logpmf(y) for y in COUNTS[0])
    weights = np.exp(log_weights - log_weights.max())
    return weights @ _counts_features({"shift": b, "x": x[:, None]}) / weights.sum()


def moved(diffusion, y):
    """A diffusion that depends on a parameter, as on a class label."""
    label = numpyro.sample("label", dist.Normal(0.5, 1.0))
    x = numpyro.sample("x", DiffusionPrior(_shift(diffusion, label)))
    numpyro.sample("y", dist.Normal(x, 0.6).to_event(1), obs=y)


def _shift(diffusion, label):
    """The same diffusion of data that are moved by ``label`` in all coordinates."""
    mixture = diffusion.mixture
    moved = mixture.rotated_means + label * jnp.sum(mixture.eigenvectors[0], axis=0)[None]
    return eqx.tree_at(lambda m: m.mixture.rotated_means, diffusion, moved)


def _moved_features(s):
    return np.stack([s["label"], s["label"] ** 2, s["x"][..., 0], s["x"][..., 1] ** 2], -1)


def _moved_exact(order=2):
    """The chain's mean is affine in the label, so that all is Gaussian."""
    times = np.asarray(smcdiff.log_snr_times(schedules.cosine(), STEPS))
    start, covariance = chain_law(gaussian(), times, order)
    slope = chain_law(_shift(gaussian(), 1.0), times, order)[0] - start
    # Of (label, x), and then given y = x + noise.
    lift = np.concatenate([[1.0], slope])
    mean = np.concatenate([[0.0], start]) + 0.5 * lift
    joint = np.outer(lift, lift)
    joint[1:, 1:] += covariance
    gain = joint[:, 1:] @ np.linalg.inv(joint[1:, 1:] + 0.36 * np.eye(2))
    mean, joint = mean + gain @ (Y - mean[1:]), joint - gain @ joint[1:]
    return np.array([mean[0], mean[0] ** 2 + joint[0, 0], mean[1], mean[2] ** 2 + joint[2, 2]])


TWO = np.array([[1.7, -0.2], [-0.5, 0.4]], np.float32)


def _copies_features(s):
    x = s["x"].reshape(*s["x"].shape[:-2], 4)
    return np.concatenate([x, x**2], -1)


def _copies_exact(order=2):
    mean, covariance = chain_law(
        gaussian(), np.asarray(smcdiff.log_snr_times(schedules.cosine(), STEPS)), order
    )
    gain = covariance @ np.linalg.inv(covariance + 0.36 * np.eye(2))
    means = mean + (TWO - mean) @ gain.T
    variances = np.diag(covariance - gain @ covariance)
    return np.concatenate([means.ravel(), (means**2 + variances).ravel()])


few = functools.partial(ParticleGibbs, num_particles=3, num_steps=STEPS, twist=guidance.moment_matching())
marginal = functools.partial(
    ParticleMarginal, num_particles=4, num_steps=STEPS, twist=guidance.moment_matching()
)
short = functools.partial(NUTS, max_tree_depth=4)
slices = functools.partial(as_numpyro_kernel, builder=functools.partial(hit_and_run_slice, width=2.0))
noncentered = functools.partial(noncenter, num_steps=STEPS, twist=guidance.moment_matching())
CASES = {
    "linear": Case(linear, (gaussian(), A, Y), {"x": few}, _linear_features, _linear_exact),
    "linear, backward": Case(
        linear,
        (gaussian(), A, Y),
        {"x": functools.partial(few, order=1, backward=True)},
        _linear_features,
        functools.partial(_linear_exact, 1),
    ),
    "linear, marginal": Case(
        linear, (gaussian(), A, Y), {("gain", "noise", "x"): marginal}, _linear_features, _linear_exact
    ),
    "moved, marginal": Case(
        moved, (gaussian(), Y), {("label", "x"): marginal}, _moved_features, _moved_exact
    ),
    "moved, noncentred": Case(
        noncentered(moved),
        (gaussian(), Y),
        {("label", "x_noise"): short},
        _moved_features,
        functools.partial(_moved_exact, 1),
    ),
    "moved, noncentred, slices": Case(
        noncentered(moved),
        (gaussian(), Y),
        {"label": slices, "x_noise": noise_slice},
        _moved_features,
        functools.partial(_moved_exact, 1),
    ),
    "copies, noncentred": Case(
        noncentered(copies),
        (gaussian(), TWO),
        {"x_noise": short},
        _copies_features,
        functools.partial(_copies_exact, 1),
    ),
    "counts, noncentred": Case(
        noncentered(counts),
        (gaussian_1d(), *COUNTS),
        {("shift", "x_noise"): short},
        _counts_features,
        functools.partial(_counts_exact, 1),
    ),
    "copies": Case(copies, (gaussian(), TWO), {"x": few}, _copies_features, _copies_exact),
    "counts": Case(counts, (gaussian_1d(), *COUNTS), {"x": few}, _counts_features, _counts_exact),
}

NUM_CHAINS = 64


def posterior(name, *args):
    return infer(
        jax.random.key(2),
        CASES[name].model,
        *args,
        kernels=CASES[name].kernels,
        num_warmup=60,
        num_samples=100,
        num_chains=NUM_CHAINS,
        progress=False,
    )


@functools.cache
def joint(name):
    return posterior(name, *CASES[name].args)


@pytest.mark.parametrize("name", quick(CASES, "copies"))
def test_the_joint_posterior_is_exact_for_few_particles_and_none(name):
    means = CASES[name].features(joint(name).samples).mean(1)
    errors = (means.mean(0) - CASES[name].exact()) / (means.std(0, ddof=1) / np.sqrt(NUM_CHAINS))
    assert np.all(np.abs(errors) < Z), errors
    assert np.all(means.std(0, ddof=1) / np.sqrt(NUM_CHAINS) < 0.09)


@pytest.mark.slow
def test_smc_over_the_parameters_has_the_right_law_and_an_unbiased_evidence():
    result = infer_smc(
        jax.random.key(4),
        linear,
        gaussian(),
        A,
        Y,
        num_particles=32,
        num_inner=3,
        num_chains=NUM_CHAINS,
        exponents=jnp.linspace(0, 1, 7) ** 2,
        num_steps=STEPS,
        twist=guidance.moment_matching(),
        progress=False,
    )
    expected, log_evidence = _linear_integrals()
    ratios = np.exp(result.log_evidence.astype(float) - log_evidence)
    assert abs(ratios.mean() - 1) < Z * ratios.std(ddof=1) / np.sqrt(NUM_CHAINS)
    assert ratios.std(ddof=1) < 1.0
    gaps = _linear_features(result.particles) - expected
    masses = ratios[:, None] * np.exp(result.log_weights.astype(float))
    sums = np.einsum("cn,cnf->cf", masses, gaps)
    errors = sums.mean(0) / (sums.std(0, ddof=1) / np.sqrt(NUM_CHAINS))
    assert np.all(np.abs(errors) < Z), errors
    assert np.all(sums.std(0, ddof=1) / np.sqrt(NUM_CHAINS) < 0.06)


@pytest.mark.slow
def test_a_marginal_run_says_how_often_it_moved():
    rate = joint("moved, marginal").info["acceptance_rate"]
    assert rate.shape == (NUM_CHAINS, 100) and 0.05 < rate.mean() < 0.6
    assert np.isfinite(joint("moved, marginal").info["lp"]).all()


@pytest.mark.slow
def test_a_run_says_what_its_blocks_did_and_keeps_deterministic_sites():
    trace = joint("linear")
    np.testing.assert_allclose(
        trace.samples["signal"],
        trace.samples["gain"][..., None] * trace.samples["x"] @ A.T,
        rtol=1e-4,
        atol=1e-5,
    )
    assert set(trace.info) >= {"acceptance_rate", "diverging", "n_steps", "lp", "x.acceptance_rate", "x.ess"}
    assert trace.info["diverging"].mean() < 0.01 and not trace.info["x.num_invalid"].any()
    assert 0.2 < trace.info["x.acceptance_rate"].mean() <= 1.0
    assert trace.info["x.ess"].min() >= 1.0 and trace.info["x.ess"].max() <= 3.0
    # The step size is frozen after the warm-up.
    assert np.ptp(trace.info["step_size"], axis=1).max() == 0.0
    data = smcdiff.to_arviz(trace)
    assert data.posterior["x"].shape == (NUM_CHAINS, 100, 2)
    assert "x.ess" in data.sample_stats and "diverging" in data.sample_stats


@pytest.mark.parametrize(
    "name", quick(["copies", "linear"], "copies")
)  # "linear" has NUTS beside particle Gibbs
def test_new_data_compile_nothing(name):
    joint(name)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    *given, y = CASES[name].args
    posterior(name, *given, y + 1.0)
    assert not [event for event in compiled if "backend_compile" in event]
    jax.jit(lambda x: x + 1.0)(jnp.ones(7))  # the listener would have heard of a program
    assert [event for event in compiled if "backend_compile" in event]


# Bad models -----------------------------------------------------------------------------------------------------------


def discrete(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    x = numpyro.sample("x", DiffusionPrior(gaussian()))
    numpyro.sample("y", dist.Normal(x * k, 1.0).to_event(1), obs=y)


def twice(y):
    numpyro.sample("x", DiffusionPrior(gaussian()))
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(0.0, 1.0).expand([2]), obs=y)


def mismatched(y):
    x = numpyro.sample("x", DiffusionPrior(gaussian()), obs=jnp.zeros(3))
    numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x[:2], 1.0).to_event(1), obs=y)


def unconditioned(y):
    x = numpyro.sample("x", DiffusionPrior(gaussian()))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1))


def observed(y):
    numpyro.sample("y", dist.Normal(0.0, 1.0).expand([2]), obs=y)


def learnt(y):
    x = numpyro.sample("x", DiffusionPrior(gaussian()))
    numpyro.sample("y", dist.Normal(x, numpyro.param("width", 1.0)).to_event(1), obs=y)


def conditional(y):
    label = numpyro.sample("label", dist.Normal(0.0, 1.0))
    moved = jax.tree.map(lambda leaf: leaf + label, gaussian())
    x = numpyro.sample("x", DiffusionPrior(moved))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


BAD = [
    (discrete, TypeError, r"site 'k' of the model is latent and discrete \(Bernoulli.*kernels="),
    (twice, ValueError, r"a site's name must be used once.*`x`"),
    (mismatched, ValueError, r"site 'x' of the model has the shape \(2,\), and its value \(3,\)"),
    (unconditioned, ValueError, r"no observed site.*obs argument"),
    (observed, ValueError, r"no latent site"),
    (learnt, TypeError, r"site 'width' of the model is a param"),
    (conditional, ValueError, r"the diffusion prior of site 'x' depends on site 'label'"),
]


@pytest.mark.parametrize(("model", "error", "message"), BAD, ids=[row[0].__name__ for row in BAD])
def test_a_bad_model_is_told_in_its_own_names(model, error, message):
    with pytest.raises(error, match=message):
        gibbs_sweep(model, Y)


def test_bad_kernels_are_told():
    for kernels, message in [
        ({"z": NUTS}, r"kernels names \['z'\].*it has \['gain', 'noise', 'x'\]"),
        ({"x": few, ("x", "gain"): NUTS}, r"kernels names the sites \['x'\] more than once"),
    ]:
        with pytest.raises(ValueError, match=message):
            gibbs_sweep(linear, gaussian(), A, Y, kernels=kernels)
    # Its evidence is that of all latent sites: a block beside it would make it inexact.
    with pytest.raises(ValueError, match="ParticleMarginal moves all latent sites together"):
        gibbs_sweep(linear, gaussian(), A, Y, kernels={("gain", "x"): ParticleMarginal})
    with pytest.raises(ValueError, match="cannot be one block of several"):
        ParticleMarginal(linear).refresh(None, (), {})
    with pytest.raises(ValueError, match="num_particles must be an integer of at least 2"):
        ParticleGibbs(linear, num_particles=1)
    with pytest.raises(
        ValueError, match=r"ParticleGibbs moves one site with a DiffusionPrior.*\['gain', 'noise'\]"
    ):
        kernels = {("gain", "noise"): few}
        smcdiff.run(jax.random.key(0), gibbs_sweep(linear, gaussian(), A, Y, kernels=kernels), 1)


# NumPyro's own runner -------------------------------------------------------------------------------------------------


def alone(diffusion, y):
    x = numpyro.sample("x", DiffusionPrior(diffusion))
    numpyro.deterministic("double", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def test_particle_gibbs_runs_in_numpyros_mcmc():
    """As the only kernel, and beside NUTS in NumPyro's Gibbs, where the density of the prior is left out."""
    mcmc = MCMC(few(alone), num_warmup=5, num_samples=400, progress_bar=False)
    mcmc.run(jax.random.key(3), gaussian(), Y)
    samples = mcmc.get_samples()
    np.testing.assert_allclose(samples["double"], 2 * samples["x"], rtol=1e-6)
    mean, covariance = chain_law(gaussian(), np.asarray(smcdiff.log_snr_times(schedules.cosine(), STEPS)))
    gain = covariance @ np.linalg.inv(covariance + 0.25 * np.eye(2))
    std = np.sqrt(np.diag(covariance - gain @ covariance))
    # Four steps forget the last one by far: 400 steps are worth 60 draws at least.
    errors = (np.asarray(samples["x"]).mean(0) - mean - gain @ (Y - mean)) / (std / np.sqrt(60))
    assert np.all(np.abs(errors) < Z), errors
    assert isinstance(Gibbs([(few(linear), ["x"]), (NUTS(linear), None)]), Gibbs)
