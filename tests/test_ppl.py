"""NumPyro models as targets: densities with their constants, sites, and laws of samplers that run on them.

Oracles are evidences in closed form and the exact moments of eight schools. Means over 64 independent chains or runs
are allowed 5 of their standard errors: under normality a false failure has a probability of 5e-6 a check (Student's
law with 63 degrees of freedom), and there are some 200 of them. Keys are fixed.
"""

import math
from typing import NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam
from scipy import stats
from scipy.special import gammaln

import smcdiff
from smcdiff import estimators, schedules, targets
from smcdiff.density import HasLogDensity, HasLogRatio, HasScore, as_target, require
from smcdiff.mcmc.hamiltonian import hmc
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.mcmc.langevin import mala
from smcdiff.mcmc.warmup import window_adaptation
from smcdiff.ppl import NumPyroTarget, target_from_numpyro

Z, CHAINS = 5.0, 64
TRACES = []


def schools(errors, effects):
    TRACES.append("schools")
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", errors.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, errors), obs=effects)


# What `reparam` makes of it: theta is a deterministic site and theta_decentered = (theta - mu) / tau a latent one.
noncentered = numpyro.handlers.reparam(schools, config={"theta": LocScaleReparam(0.0)})
FORMS = {"centered": (schools, True), "not centered": (noncentered, False)}


def eight(form):
    """The target of a form, and the same posterior with its facts."""
    model, is_centered = FORMS[form]
    exact = targets.eight_schools(centered=is_centered)
    return target_from_numpyro(model, np.asarray(exact.errors), effects=np.asarray(exact.effects)), exact


# Densities ------------------------------------------------------------------------------------------------------------


@jax.jit
def evaluate(target, x):
    return jax.vmap(target.logdensity)(x), jax.vmap(target.score)(x)


def near(exact, num):
    """Points (num, 10) about the mean, with log tau where float32 holds (theta - mu) / tau."""
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, (num, 10))
    return jnp.asarray(exact.moments.mean + exact.moments.std * noise, jnp.result_type(float))


@pytest.mark.parametrize("form", FORMS)
def test_eight_schools_are_the_exact_ones(form):
    """The transform of a positive site is the exponential, so that the coordinates are those of the exact target."""
    target, exact = eight(form)
    x = near(exact, 40)
    (values, scores), (expected, exact_scores) = evaluate(target, x), evaluate(exact, x)
    np.testing.assert_allclose(values, expected, atol=1e-3)
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-3, atol=1e-3)
    assert values.dtype == scores.dtype == jnp.float32
    if form == "centered":
        value, score = target.logdensity_and_score(x[0])
        np.testing.assert_allclose(value, values[0], rtol=1e-5)
        np.testing.assert_allclose(score, scores[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(target.log_ratio(x[0], x[1]), values[1] - values[0], atol=1e-4)


def test_double_precision():
    with jax.enable_x64(True):
        target, exact = eight("centered")
        x = near(exact, 5)
        (values, scores), (expected, exact_scores) = evaluate(target, x), evaluate(exact, x)
        assert values.dtype == scores.dtype == x.dtype == np.float64
        np.testing.assert_allclose(values, expected, rtol=1e-9)
        np.testing.assert_allclose(scores, exact_scores, rtol=1e-7, atol=1e-7)
        assert jax.eval_shape(target.initial_position, jax.random.key(2)).dtype == np.float64


def test_every_capability():
    target, _ = eight("centered")
    assert isinstance(target, NumPyroTarget) and as_target(target) is target
    for capability in (HasLogDensity, HasScore, HasLogRatio):
        require(target, capability, "a test")


def normal(y, scale):
    mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
    numpyro.sample("y", dist.Normal(mu, scale).expand([y.shape[0]]), obs=y)


def normal_inverse_gamma(y):
    variance = numpyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    mu = numpyro.sample("mu", dist.Normal(0.5, jnp.sqrt(variance / 0.7)))
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)).expand([y.shape[0]]), obs=y)


def dirichlet(counts):
    p = numpyro.sample("p", dist.Dirichlet(jnp.asarray([1.5, 2.0, 3.0])))
    numpyro.sample("counts", dist.Multinomial(total_count=10, probs=p), obs=counts)


def dependent(y):
    """A support that depends on an earlier site."""
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    high = numpyro.sample("high", dist.Uniform(low, low + 2.0))
    numpyro.sample("y", dist.Normal(high, 0.5), obs=y)


Y = np.array([0.3, 2.1, -0.4, 1.7, 0.9])


def _normal_evidence():
    return stats.multivariate_normal(np.ones(5), 4.0 * np.ones((5, 5)) + 0.64 * np.eye(5)).logpdf(Y)


def _student_evidence():
    """y is Student's with 6 degrees of freedom about .5, with the scale matrix (2 / 3) (1 + 1 1' / .7)."""
    return stats.multivariate_t(np.full(5, 0.5), (2 / 3) * (np.eye(5) + 1 / 0.7), df=6).logpdf(Y)


def _dirichlet_evidence():
    prior, counts = np.array([1.5, 2.0, 3.0]), np.array([2, 3, 5])
    value = gammaln(11) - gammaln(counts + 1).sum() + gammaln(6.5) - gammaln(prior).sum()
    return value + gammaln(prior + counts).sum() - gammaln(16.5)


def _dependent_evidence():
    """high is a standard normal and a uniform variable, and y one more normal: an integral over the uniform one."""
    u = (np.arange(2000) + 0.5) / 1000
    return math.log(stats.norm(u, math.sqrt(1.25)).pdf(0.8).mean())


@pytest.mark.parametrize(
    ("model", "arguments", "evidence", "limit"),
    [
        (normal, (Y, 0.8), _normal_evidence, 12.0),
        (normal_inverse_gamma, (Y,), _student_evidence, 9.0),
        (dirichlet, (np.array([2, 3, 5]),), _dirichlet_evidence, 9.0),
        (dependent, (np.array(0.8),), _dependent_evidence, 14.0),
    ],
    ids=["normal", "normal-inverse-gamma", "dirichlet", "dependent support"],
)
def test_the_integral_is_the_evidence(model, arguments, evidence, limit):
    """Trapezoidal rule on the unconstrained scale: a lost constant or Jacobian changes the value by far more."""
    target = target_from_numpyro(model, *arguments)
    (d,) = target.event_shape
    grid = np.linspace(-limit, limit, 401)
    points = np.stack(np.meshgrid(*[grid] * d, indexing="ij"), axis=-1).reshape(-1, d)
    values = jax.jit(jax.vmap(target.logdensity))(jnp.asarray(points, jnp.float32))
    found = np.logaddexp.reduce(np.asarray(values, float)) + d * math.log(grid[1] - grid[0])
    assert found == pytest.approx(evidence(), abs=2e-4)


# Sites ----------------------------------------------------------------------------------------------------------------


def many_sites(y, count, kind, prior):
    """Numbers and strings that say how the model looks, and a pytree of arrays."""
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(count)))
    z = numpyro.sample("a scale", dist.HalfNormal(prior["scale"])) if kind == "scaled" else 1.0
    matrix = numpyro.sample("m", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    top = numpyro.sample("top", dist.Uniform(0.0, z))
    numpyro.deterministic("total", jnp.sum(matrix) + z)
    numpyro.deterministic("constant", jnp.asarray([1.0, 2.0]))
    numpyro.sample("y", dist.Normal(p[0] + top, prior["noise"]), obs=y)


def sites_target(kind="scaled"):
    prior = {"scale": np.array(2.0), "noise": np.array(0.3)}
    return target_from_numpyro(many_sites, np.array(0.4), count=4, kind=kind, prior=prior)


def test_sites_go_there_and_back():
    target = sites_target()
    assert target.site_names == ("p", "a scale", "m", "top") and target.event_shape == (11,)
    assert target.slices == {
        "p": slice(0, 3),
        "a scale": slice(3, 4),
        "m": slice(4, 10),
        "top": slice(10, 11),
    }
    assert sites_target("plain").site_names == ("p", "m", "top")
    x = 0.7 * jax.random.normal(jax.random.key(2), (11,))
    values = eqx.filter_jit(target.constrain)(x)
    assert set(values) == {*target.site_names, "total", "constant"}
    assert values["p"].shape == (4,) and values["m"].shape == (2, 3) and values["top"].shape == ()
    assert float(values["p"].sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(values["a scale"]) == pytest.approx(math.exp(float(x[3])), rel=1e-5)
    assert 0 < values["top"] < values["a scale"]
    np.testing.assert_array_equal(values["m"], x[4:10].reshape(2, 3))
    assert float(values["total"]) == pytest.approx(float(values["m"].sum() + values["a scale"]), rel=1e-5)
    for unconstrain in (target.unconstrain, eqx.filter_jit(target.unconstrain)):
        np.testing.assert_allclose(unconstrain(values), x, atol=2e-5)
    only_latent = {name: np.asarray(values[name]) for name in target.site_names}
    np.testing.assert_allclose(target.unconstrain(only_latent), x, atol=2e-5)


def test_samples_become_sites():
    target = sites_target()
    samples = np.random.default_rng(0).normal(size=(3, 5, 11)).astype(np.float32)
    found = target.to_sites(samples)
    assert {name: value.shape for name, value in found.items()} == {
        "p": (3, 5, 4),
        "a scale": (3, 5),
        "m": (3, 5, 2, 3),
        "top": (3, 5),
        "total": (3, 5),
        "constant": (3, 5, 2),
    }
    one = target.constrain(jnp.asarray(samples[2, 1]))
    for name, value in target.to_sites(samples[2, 1]).items():
        np.testing.assert_allclose(value, one[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name][2, 1], one[name], rtol=1e-5, atol=1e-6)


def test_other_data_compile_nothing_anew():
    _, exact = eight("centered")
    errors, effects = np.asarray(exact.errors), np.asarray(exact.effects)

    @jax.jit
    def both(target, x):
        return target.logdensity_and_score(x)

    x, values = exact.moments.mean.astype(np.float32), []
    for shift in (0.0, 1.0):
        target = target_from_numpyro(schools, errors, effects=effects + shift)
        before = len(TRACES)
        values.append(float(both(target, x)[0]))
        target.to_sites(x), target.initial_position(jax.random.key(0))
        traced = len(TRACES) - before
        assert (traced > 0) == (shift == 0.0)
    gap = 0.5 * np.sum(((effects - x[2:]) / errors) ** 2 - ((effects + 1.0 - x[2:]) / errors) ** 2)
    assert values[1] - values[0] == pytest.approx(gap, rel=1e-3)
    # A number is no leaf: another one is another program, and the other value.
    numbers = [target_from_numpyro(normal, Y, scale) for scale in (1.0, 2.0)]
    assert jax.tree.structure(numbers[0]) != jax.tree.structure(numbers[1])
    assert both(numbers[0], jnp.zeros(1))[0] != both(numbers[1], jnp.zeros(1))[0]


def test_initial_positions():
    target, _ = eight("centered")
    keys = jax.random.split(jax.random.key(3), 50)
    found = jax.vmap(target.initial_position)(keys)
    assert found.shape == (50, 10) and np.all(np.abs(found) < 2) and np.ptp(np.asarray(found)) > 3.5
    np.testing.assert_array_equal(target.initial_position(keys[7]), found[7])


def nowhere(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("f", jnp.where(x > 5.0, 0.0, -jnp.inf) + y)


def test_no_initial_position_is_no_secret():
    target = target_from_numpyro(nowhere, np.zeros(()))
    with pytest.raises(
        ValueError, match=r"^the model has no finite log density and score at any of 100 points"
    ):
        target.initial_position(jax.random.key(0))
    assert np.all(np.isnan(eqx.filter_jit(target.initial_position)(jax.random.key(0))))


# Samplers -------------------------------------------------------------------------------------------------------------


def check_means(values, exact):
    """Means of independent ``values`` (n, ...) are the exact ones, to 5 standard errors."""
    values = np.asarray(values, float)
    allowed = Z * values.std(axis=0, ddof=1) / math.sqrt(len(values))
    gap = np.abs(values.mean(axis=0) - exact)
    assert np.all(gap < allowed), np.round(Z * gap / allowed, 2)


def check_moments(samples, exact):
    """First and second central moments of chains (n, steps, d)."""
    samples = np.asarray(samples, float)
    check_means(samples.mean(axis=1), exact.moments.mean)
    check_means(((samples - exact.moments.mean) ** 2).mean(axis=1), exact.moments.std**2)


def run(algorithm, num_steps, position, key):
    return smcdiff.run(
        jax.random.key(key),
        algorithm,
        num_steps,
        position=position,
        num_chains=len(position),
        chunk_size=num_steps,
        progress=False,
    )


@pytest.mark.parametrize(
    ("form", "algorithm", "options"),
    [
        ("not centered", hmc, {"num_integration_steps": 8}),
        pytest.param("centered", mala, {}, marks=pytest.mark.slow),
    ],
    ids=["hmc, not centered", "mala, centered"],
)
def test_kernels_sample_eight_schools(form, algorithm, options):
    """Warm-up from NumPyro's starts, then chains: from there, and centred, where no chain mixes, from the exact law."""
    target, exact = eight(form)
    start = jax.vmap(target.initial_position)(jax.random.split(jax.random.key(4), CHAINS))
    found = window_adaptation(jax.random.key(5), target, algorithm, start, 200, **options)
    start = found.positions
    if form == "centered":
        start = exact.sample(jax.random.key(6), CHAINS)
    trace = run(algorithm(target, **found.settings, **options), 300, start, 7)
    assert 0.5 < np.mean(trace.info.acceptance_rate) < 0.99
    check_moments(trace.samples, exact)
    theta = np.asarray(target.to_sites(trace.samples)["theta"], float).mean(axis=1)
    check_means(theta, targets.eight_schools(centered=True).moments.mean[2:])


@pytest.mark.slow
def test_slices_mix_in_the_centred_form():
    """From starts spread by 1.5 deviations: neck and mouth of the funnel are visited as often as they ought."""
    target, exact = eight("centered")
    noise = np.random.default_rng(2).normal(size=(CHAINS, 10))
    start = jnp.asarray(exact.moments.mean + 1.5 * exact.moments.std * noise, jnp.float32)
    trace = run(hit_and_run_slice(target, 5.0), 80_000, start, 7)
    samples = trace.samples[:, 8000:]
    check_moments(samples, exact)
    # The bars see a fortieth of a deviation: a chain that misses the neck, log tau < -1, is off by a fifth.
    assert np.all(samples.mean(axis=1).std(axis=0, ddof=1) / 8 < 0.04 * exact.moments.std)


@pytest.mark.lenient_promotion  # BlackJAX's kernel
def test_blackjax_takes_the_log_density_and_arviz_the_sites():
    target = sites_target()
    start = 0.1 * jax.random.normal(jax.random.key(8), (2, 11))
    trace = run(blackjax.hmc(target.logdensity, 0.1, jnp.ones(11), 3), 10, start, 9)
    data = smcdiff.to_arviz(trace._replace(samples=target.to_sites(trace.samples)))
    assert data["posterior"]["m"].shape == (2, 10, 2, 3) and "total" in data["posterior"]


def reverse_diffusion(target, exact, pilot, num_steps, num_particles, num_samples):
    """Evidence over the exact one, and the unbiased estimates of both moments' errors, in each of 64 runs."""
    reference = (jnp.asarray(pilot.mean(axis=0)), 1.5 * jnp.asarray(pilot.std(axis=0)))
    schedule = schedules.ou(4.0)
    estimator = estimators.importance(num_samples, reference=reference)
    path = smcdiff.rdmc_path(target, schedule, estimator, rng_key=jax.random.key(11))
    times = smcdiff.log_snr_times(schedule, num_steps, log_snr_max=3.0)
    fk = smcdiff.rdmc(path, times=times, weights="marginal", start=reference)
    result = smcdiff.run_smc(jax.random.key(12), fk, num_particles, num_chains=CHAINS, progress=False)
    ratios = np.exp(np.asarray(result.log_evidence, float) - exact.log_evidence)
    gaps = np.asarray(result.particles.position, float) - exact.moments.mean
    masses = ratios[:, None] * np.exp(np.asarray(result.log_weights, float))
    first, second = (
        np.einsum("cn,cnd->cd", masses, values) for values in (gaps, gaps**2 - exact.moments.std**2)
    )
    return ratios, first, second


class Exact(NamedTuple):
    log_evidence: float
    moments: targets.target.Moments


@pytest.mark.slow
def test_reverse_diffusion_samples_a_model():
    target = target_from_numpyro(normal, Y, 0.8)
    precision = 0.25 + 5 / 0.64
    mean, std = (0.25 + Y.sum() / 0.64) / precision, 1 / math.sqrt(precision)
    exact = Exact(_normal_evidence(), targets.target.exact_moments([mean], [std]))
    pilot = mean + std * np.random.default_rng(1).normal(size=(100, 1)).astype(np.float32)
    ratios, first, second = reverse_diffusion(target, exact, pilot, 8, 64, 16)
    check_means(ratios, 1.0)
    check_means(first, 0.0)
    check_means(second, 0.0)
    assert ratios.std(ddof=1) / 8 < 0.05


def nuts():
    """Draws of NumPyro's own sampler from eight schools, sites (chains, steps, ...)."""
    _, exact = eight("not centered")
    sampler = MCMC(
        NUTS(noncentered, target_accept_prob=0.9),
        num_warmup=300,
        num_samples=100,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(jax.random.key(10), exact.errors, effects=exact.effects)
    return sampler.get_samples(group_by_chain=True)


@pytest.mark.slow
@pytest.mark.lenient_promotion  # NumPyro's kernel
def test_nuts_and_reverse_diffusion_find_the_same_posterior():
    """NumPyro's NUTS has the exact moments in both coordinates, and so has rdMC about a Gaussian from few of its draws.

    That is for theta_decentered: centred, weights against any Gaussian have infinite variance, from the funnel's neck.
    """
    draws = nuts()
    for form in FORMS:
        target, exact = eight(form)
        x = np.asarray(jax.jit(lambda target, v: jax.vmap(jax.vmap(target.unconstrain))(v))(target, draws))
        check_moments(x, exact)
    pilot = x[:, :4].reshape(-1, 10)
    ratios, first, second = reverse_diffusion(target, exact, pilot, 16, 512, 16)
    check_means(ratios, 1.0)
    check_means(first, 0.0)
    check_means(second, 0.0)
    # Five standard errors are below the error of a factor 3/2, in the evidence as in the variances.
    assert ratios.std(ddof=1) / 8 < 0.08
    assert np.all(first.std(axis=0, ddof=1) / 8 < 0.08 * exact.moments.std)
    assert np.all(second.std(axis=0, ddof=1) / 8 < 0.08 * exact.moments.std**2)


# What is refused ------------------------------------------------------------------------------------------------------


def discrete():
    numpyro.sample("weight", dist.Beta(1.0, 1.0))
    numpyro.sample("coin", dist.Bernoulli(0.5))


def point_mass():
    numpyro.sample("known", dist.Delta(1.0))


def learnt():
    numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1.0))


def observed_only():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.3)


def subsampled():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 10, subsample_size=3):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=jnp.zeros(3))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        pytest.param(
            discrete,
            TypeError,
            r"^site 'coin' of the model is latent and discrete \(Bernoulli",
            marks=pytest.mark.lenient_promotion,
        ),
        (point_mass, TypeError, r"^site 'known' of the model is latent and a point mass"),
        (learnt, TypeError, r"^site 'loc' of the model is a param"),
        (observed_only, ValueError, r"^the model has no latent site"),
        (subsampled, ValueError, r"subsampl"),
    ],
)
def test_models_that_are_no_densities_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        target_from_numpyro(model)


def test_bad_input_raises():
    with pytest.raises(TypeError, match=r"^the arguments of a model must be pytrees of arrays.*got a set"):
        target_from_numpyro(normal, Y, {1.0})
    target, _ = eight("centered")
    with pytest.raises(
        ValueError, match=r"^a sample of this model is one vector of shape \(10,\), got \(4, 10\)"
    ):
        target.logdensity(jnp.zeros((4, 10)))
    with pytest.raises(ValueError, match=r"^samples must end with the axis \(10,\), got \(10, 4\)"):
        target.to_sites(np.zeros((10, 4)))
    with pytest.raises(ValueError, match=r"^values lacks the latent sites \['tau'\], got"):
        target.unconstrain({"mu": 1.0, "theta": np.zeros(8)})
    with pytest.raises(ValueError, match=r"^site 'theta' has shape \(8,\), got \(\)"):
        target.unconstrain({"mu": 1.0, "tau": 2.0, "theta": 0.0})
