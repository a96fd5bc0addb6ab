"""Marginalised NumPyro models: densities against closed forms, draws of what was integrated out, refusals.

A row of `CASES` is a model with what is integrated out of it, the log density of the rest and the conditional law of
the sites in closed form, written with NumPy and SciPy. Densities are compared in double precision. Draws are compared
by moments within 5 standard errors, which fail by chance with a probability of 6e-7 a number, and by a
Kolmogorov-Smirnov test at a level of 1e-6; there are some 400 numbers. Keys are fixed.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density
from scipy import stats
from scipy.special import gammaln

from smcdiff import targets
from smcdiff.ppl import target_from_numpyro
from smcdiff.ppl.dependence import Dependence, inlined, is_proportional, walk
from smcdiff.ppl.marginal import marginalize

Z, DRAWS, LEVEL = 5.0, 4000, 1e-6
TRACES = []

# Cases ----------------------------------------------------------------------------------------------------------------


class Law(NamedTuple):
    """Of the sites that were integrated out, raveled and joined in the order of the model: marginals and covariance."""

    marginals: object
    covariance: np.ndarray


class Case(NamedTuple):
    model: Callable
    arguments: tuple
    retained: dict
    marginalized: dict
    logdensity: Callable  # of retained and arguments
    law: Callable  # of retained and arguments


CASES = {}
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def gaussian(prior_mean, prior_covariance, matrix, offset, noise, y):
    """Log evidence of y = matrix x + offset + noise, and the law of x."""
    total = matrix @ prior_covariance @ matrix.T + noise
    gain = np.linalg.solve(total, matrix @ prior_covariance).T
    mean = prior_mean + gain @ (y - offset - matrix @ prior_mean)
    covariance = prior_covariance - gain @ matrix @ prior_covariance
    evidence = stats.multivariate_normal(matrix @ prior_mean + offset, total).logpdf(y)
    return evidence, Law(stats.norm(mean, np.sqrt(np.diag(covariance))), covariance)


def gaussian_case(name, model, arguments, retained, marginalized, system, log_prior):
    """``system(retained, *arguments)`` is what `gaussian` takes."""
    kinds = dict.fromkeys(marginalized, "gaussian")
    CASES[name] = Case(
        model,
        arguments,
        retained,
        kinds,
        lambda values, *args: gaussian(*system(values, *args))[0] + log_prior(values),
        lambda values, *args: gaussian(*system(values, *args))[1],
    )


def schools(errors, effects, mean=1.0):
    TRACES.append("schools")
    mu = numpyro.sample("mu", dist.Normal(mean, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", errors.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.deterministic("doubled", 2.0 * theta)
        numpyro.sample("y", dist.Normal(theta, errors), obs=effects)
    numpyro.deterministic("log tau", jnp.log(tau))


noncentered = numpyro.handlers.reparam(schools, config={"theta": LocScaleReparam(0.0)})


def schools_system(values, errors, effects):
    """x = (mu, theta)."""
    num, tau = len(errors), values["tau"]
    root = np.block(
        [[5.0 * np.ones((1, 1)), np.zeros((1, num))], [5.0 * np.ones((num, 1)), tau * np.eye(num)]]
    )
    matrix = np.hstack([np.zeros((num, 1)), np.eye(num)])
    return np.ones(num + 1), root @ root.T, matrix, np.zeros(num), np.diag(errors**2), effects


def noncentered_system(values, errors, effects):
    """x = (mu, (theta - mu) / tau)."""
    num, tau = len(errors), values["tau"]
    prior = np.diag([25.0, *np.ones(num)])
    matrix = np.hstack([np.ones((num, 1)), tau * np.eye(num)])
    return np.array([1.0, *np.zeros(num)]), prior, matrix, np.zeros(num), np.diag(errors**2), effects


def half_cauchy(values):
    return stats.halfcauchy(scale=5.0).logpdf(values["tau"])


TAU = {"tau": np.array(3.0)}
gaussian_case("schools", schools, (ERRORS, EFFECTS), TAU, ["mu", "theta"], schools_system, half_cauchy)
gaussian_case(
    "schools, not centered",
    noncentered,
    (ERRORS, EFFECTS),
    TAU,
    ["mu", "theta_decentered"],
    noncentered_system,
    half_cauchy,
)


def regression(x, y):
    intercept = numpyro.sample("intercept", dist.Normal(0.5, 2.0))
    weights = numpyro.sample("weights", dist.Normal(jnp.array([0.0, 1.0, -1.0]), 0.7).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x @ weights + intercept, sigma).to_event(1), obs=y)


def regression_system(values, x, y):
    prior = np.diag([4.0, *np.full(3, 0.49)])
    matrix = np.hstack([np.ones((len(y), 1)), x])
    noise = values["sigma"] ** 2 * np.eye(len(y))
    return np.array([0.5, 0.0, 1.0, -1.0]), prior, matrix, np.zeros(len(y)), noise, y


X = np.random.default_rng(0).normal(size=(6, 3)) + 0.4
Y = np.array([0.3, 2.1, -0.4, 1.7, 0.9, -1.6])
gaussian_case(
    "regression",
    regression,
    (X, Y),
    {"sigma": np.array(0.6)},
    ["intercept", "weights"],
    regression_system,
    lambda values: stats.halfnorm().logpdf(values["sigma"]),
)


def levels(region, group, exposed, y):
    """Groups in regions, indexed, and a mask; a shift that stays, because it multiplies the slope."""
    shift = numpyro.sample("shift", dist.Gumbel(0.0, 1.0))
    mu = numpyro.sample("mu", dist.Normal(shift, 1.5))
    with numpyro.plate("regions", 2):
        alpha = numpyro.sample("alpha", dist.Normal(mu, 0.8))
    with numpyro.plate("groups", 3):
        beta = numpyro.sample("beta", dist.Normal(2.0 * alpha[region], jnp.exp(-shift)))
    numpyro.sample(
        "y", dist.Normal(jnp.where(exposed, shift * beta[group] - 1.0, mu), 0.5).expand([6]), obs=y
    )


def levels_system(values, region, group, exposed, y):
    """x = (mu, alpha, beta) = shift (1, 1, 1, 2, 2, 2) + root noise."""
    shift, up = values["shift"], np.eye(2)[region]
    mu = np.array([1.5, 0, 0, 0, 0, 0])
    alpha = mu + 0.8 * np.eye(6)[1:3]
    root = np.vstack([mu, alpha, 2.0 * up @ alpha + math.exp(-shift) * np.eye(6)[3:]])
    matrix = np.where(exposed[:, None], shift * np.eye(6)[3 + group], np.eye(6)[0])
    offset = np.where(exposed, -1.0, 0.0)
    return shift * np.array([1, 1, 1, 2, 2, 2]), root @ root.T, matrix, offset, 0.25 * np.eye(6), y


gaussian_case(
    "levels",
    levels,
    (np.array([0, 1, 1]), np.array([0, 0, 1, 2, 2, 1]), np.array([True, True, False, True, True, False]), Y),
    {"shift": np.array(0.7)},
    ["mu", "alpha", "beta"],
    levels_system,
    lambda values: stats.gumbel_r().logpdf(values["shift"]),
)


def process(times, y):
    """A Gaussian process, and an autoregressive one written as a loop: fewer data than noise."""
    length = numpyro.sample("length", dist.LogNormal(0.0, 1.0))
    kernel = jnp.exp(-0.5 * ((times[:, None] - times[None]) / length) ** 2) + 0.1 * jnp.eye(len(times))
    f = numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(len(times)), covariance_matrix=kernel))
    steps = numpyro.sample("steps", dist.Normal(0.0, 0.3).expand([len(times)]).to_event(1))
    path = jax.lax.scan(lambda carry, step: (length * carry + step,) * 2, jnp.zeros(()), steps)[1]
    numpyro.sample("y", dist.MultivariateNormal(f + path, scale_tril=0.4 * jnp.eye(len(times))), obs=y)


def process_system(values, times, y):
    num, length = len(times), values["length"]
    kernel = np.exp(-0.5 * ((times[:, None] - times[None]) / length) ** 2) + 0.1 * np.eye(num)
    prior = np.block([[kernel, np.zeros((num, num))], [np.zeros((num, num)), 0.09 * np.eye(num)]])
    lags = np.arange(num)[:, None] - np.arange(num)[None]
    matrix = np.hstack([np.eye(num), np.tril(length ** np.maximum(lags, 0))])
    return np.zeros(2 * num), prior, matrix, np.zeros(num), 0.16 * np.eye(num), y


gaussian_case(
    "process",
    process,
    (np.array([0.0, 0.7, 1.1, 2.5]), Y[:4]),
    {"length": np.array(0.8)},
    ["f", "steps"],
    process_system,
    lambda values: stats.lognorm(1.0).logpdf(values["length"]),
)


def logistic(x, y):
    """theta stays, because the children of it are no Gaussian ones, and is the child of mu."""
    mu = numpyro.sample("mu", dist.Normal(0.5, 2.0))
    with numpyro.plate("rows", 3):
        theta = numpyro.sample("theta", dist.Normal(mu, 0.7))
        numpyro.sample("y", dist.Bernoulli(logits=x * theta), obs=y)


def logistic_system(values, x, y):
    ones = np.ones((3, 1))
    return np.array([0.5]), np.array([[4.0]]), ones, np.zeros(3), 0.49 * np.eye(3), values["theta"]


LOGISTIC = (np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.0, 1.0]))
gaussian_case(
    "logistic",
    logistic,
    LOGISTIC,
    {"theta": np.array([0.3, -0.9, 1.4])},
    ["mu"],
    logistic_system,
    lambda values: -np.sum(np.logaddexp(0.0, (1 - 2 * LOGISTIC[1]) * LOGISTIC[0] * values["theta"])),
)


def gamma_law(first, second):
    law = stats.gamma(first, scale=1 / second)
    return Law(law, np.diag(law.var()))


def poisson(group, exposure, y):
    shape = numpyro.sample("shape", dist.HalfNormal(3.0))
    with numpyro.plate("groups", 2):
        v = numpyro.sample("v", dist.Gamma(shape, 1.7))
    numpyro.deterministic("rates", exposure * v[group])
    numpyro.sample("y", dist.Poisson(jnp.exp(jnp.log(v[group]) + jnp.log(exposure))).to_event(1), obs=y)


def poisson_logdensity(values, group, exposure, y):
    """Negative binomial for one count; for more, the product of what the counts before leave of the prior."""
    first, second, value = (
        np.full(2, values["shape"]),
        np.full(2, 1.7),
        stats.halfnorm(scale=3.0).logpdf(values["shape"]),
    )
    for g, e, count in zip(group, exposure, y, strict=True):
        value += stats.nbinom(first[g], second[g] / (second[g] + e)).logpmf(count)
        first, second = first + count * np.eye(2)[g], second + e * np.eye(2)[g]
    return value


CASES["poisson"] = Case(
    poisson,
    (np.array([0, 1, 1, 0]), np.array([1.0, 0.5, 2.0, 3.0]), np.array([2.0, 0.0, 3.0, 4.0])),
    {"shape": np.array(1.3)},
    {"v": "gamma"},
    poisson_logdensity,
    lambda values, group, exposure, y: gamma_law(
        values["shape"] + np.bincount(group, y), 1.7 + np.bincount(group, exposure)
    ),
)


def waiting(scales, y, z):
    k = numpyro.sample("k", dist.HalfNormal(3.0))
    v = numpyro.sample("v", dist.Exponential(0.8))
    numpyro.sample("y", dist.Exponential(v / scales), obs=y)
    numpyro.sample("z", dist.Gamma(k, 3.0 * v), obs=z)


def waiting_logdensity(values, scales, y, z):
    """The integral of a power and an exponential function of v."""
    k, rate = values["k"], 0.8 + np.sum(y / scales) + 3.0 * z
    value = math.log(0.8) - np.log(scales).sum() + k * math.log(3.0) - gammaln(k) + (k - 1) * np.log(z)
    return value + gammaln(4 + k) - (4 + k) * np.log(rate) + stats.halfnorm(scale=3.0).logpdf(k)


CASES["waiting"] = Case(
    waiting,
    (np.array([1.0, 2.0, 0.5]), np.array([0.4, 3.0, 1.1]), np.array(0.9)),
    {"k": np.array(2.4)},
    {"v": "gamma"},
    waiting_logdensity,
    lambda values, scales, y, z: gamma_law(
        np.array([4 + values["k"]]), np.array([0.8 + np.sum(y / scales) + 3.0 * z])
    ),
)


def precision(y):
    loc = numpyro.sample("loc", dist.Logistic(0.0, 1.0))
    v = numpyro.sample("v", dist.Gamma(3.0, 2.0))
    numpyro.sample("y", dist.Normal(loc, 1.0 / jnp.sqrt(0.5 * v)).expand([6]), obs=y)


def successes(trials, y, coin, tries):
    a = numpyro.sample("a", dist.HalfNormal(2.0))
    p = numpyro.sample("p", dist.Beta(jnp.full(2, a), jnp.full(2, 1.5)).to_event(1))
    numpyro.sample("y", dist.Binomial(trials, probs=p[jnp.array([0, 1, 1])]), obs=y)
    numpyro.sample("coin", dist.Bernoulli(p[1] * jnp.ones(3)), obs=coin)
    numpyro.sample("tries", dist.Geometric(probs=p[::-1]), obs=tries)


def successes_posterior(values, trials, y, coin, tries):
    first = values["a"] + np.array([y[0] + 1, y[1:].sum() + 1 + coin.sum()])
    missed = np.array([trials[0] - y[0] + tries[1], (trials - y)[1:].sum() + tries[0] + 3 - coin.sum()])
    return first, 1.5 + missed


def successes_logdensity(values, trials, y, coin, tries):
    def log_beta(first, second):
        return gammaln(first) + gammaln(second) - gammaln(first + second)

    first, second = successes_posterior(values, trials, y, coin, tries)
    choices = gammaln(trials + 1) - gammaln(y + 1) - gammaln(trials - y + 1)
    prior = log_beta(values["a"], 1.5)
    return (
        np.sum(log_beta(first, second) - prior)
        + choices.sum()
        + stats.halfnorm(scale=2.0).logpdf(values["a"])
    )


def successes_law(values, *arguments):
    law = stats.beta(*successes_posterior(values, *arguments))
    return Law(law, np.diag(law.var()))


CASES["successes"] = Case(
    successes,
    (np.array([5.0, 7.0, 2.0]), np.array([2.0, 6.0, 0.0]), np.array([1.0, 0.0, 1.0]), np.array([3.0, 1.0])),
    {"a": np.array(1.4)},
    {"p": "beta"},
    successes_logdensity,
    successes_law,
)


def three(y, z):
    """Three groups that are independent given what stays, and one of them without children."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    a = numpyro.sample("a", dist.Normal(0.0, scale))
    v = numpyro.sample("v", dist.Gamma(3.0, 2.0))
    numpyro.sample("alone", dist.Normal(scale, 2.0))
    numpyro.sample("y", dist.Normal(a, 0.5), obs=y)
    numpyro.sample("z", dist.Normal(scale, 1.0 / jnp.sqrt(0.5 * v)).expand([6]), obs=z)


def three_logdensity(values, y, z):
    """The precision of z is Gamma(3, 4): Student's law with 6 degrees of freedom and the scale matrix 4 / 3."""
    scale = values["scale"]
    value = stats.halfnorm().logpdf(scale) + stats.norm(0, np.sqrt(scale**2 + 0.25)).logpdf(y)
    return value + stats.multivariate_t(np.full(6, scale), 4 / 3 * np.eye(6), df=6).logpdf(z)


def three_law(values, y, z):
    """(a, v, alone)."""
    scale = values["scale"]
    share = scale**2 / (scale**2 + 0.25)
    laws = [
        stats.norm(share * y, math.sqrt(0.25 * share)),
        stats.gamma(6, scale=1 / (2.0 + 0.25 * np.sum((z - scale) ** 2))),
        stats.norm(scale, 2.0),
    ]

    class Joined:
        def mean(self):
            return np.array([law.mean() for law in laws])

        def cdf(self, draws):
            return np.stack([law.cdf(draws[:, i]) for i, law in enumerate(laws)], axis=1)

    return Law(Joined(), np.diag([law.var() for law in laws]))


CASES["three groups"] = Case(
    three,
    (np.array(0.9), Y),
    {"scale": np.array(0.8)},
    {"a": "gaussian", "v": "gamma", "alone": "gaussian"},
    three_logdensity,
    three_law,
)

LENIENT = {"logistic"}  # NumPyro's Bernoulli(logits)
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.lenient_promotion] * (name in LENIENT)) for name in CASES]
)


@functools.cache
def single(name):
    """Marginal model and arguments of a case in single precision."""
    case = CASES[name]
    arguments = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in case.arguments]
    return marginalize(case.model, *arguments), arguments


# Densities and draws --------------------------------------------------------------------------------------------------


@every_case
def test_the_density_is_the_integral(name):
    """With its constants, and its gradient."""
    case = CASES[name]
    marginal, _ = single(name)
    assert marginal.marginalized == case.marginalized and set(marginal.reasons) == set(case.retained)
    with jax.enable_x64(True):
        evaluate = jax.jit(
            jax.value_and_grad(lambda values, *arguments: log_density(marginal, arguments, {}, values)[0])
        )
        found, gradient = evaluate(case.retained, *case.arguments)
        assert found.dtype == np.float64
    assert float(found) == pytest.approx(case.logdensity(case.retained, *case.arguments), rel=1e-9)
    for site, value in case.retained.items():
        for index in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[index] = 1e-4
            up, down = (
                case.logdensity({**case.retained, site: value + sign * step}, *case.arguments)
                for sign in (1, -1)
            )
            assert float(gradient[site][index]) == pytest.approx((up - down) / 2e-4, rel=1e-5, abs=1e-6)


def check_law(draws, law):
    """Draws (n, d) have these marginals and this covariance."""
    draws = np.asarray(draws, float)
    gaps = draws - law.marginals.mean()
    products = np.einsum("ni,nj->nij", gaps, gaps)
    for values, exact in ((gaps, 0.0), (products, law.covariance)):
        allowed = Z * values.std(axis=0, ddof=1) / math.sqrt(len(values))
        assert np.all(np.abs(values.mean(axis=0) - exact) < allowed)
    levels = law.marginals.cdf(draws)
    assert min(stats.kstest(levels[:, i], "uniform").pvalue for i in range(levels.shape[1])) > LEVEL


@every_case
def test_recovered_draws_have_the_conditional_law(name):
    case = CASES[name]
    marginal, arguments = single(name)
    samples = {
        site: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (2, DRAWS // 2, *value.shape))
        for site, value in case.retained.items()
    }
    found = marginal.recover(jax.random.key(1), samples, *arguments)
    sites = [np.asarray(found[site]) for site in case.marginalized]
    assert all(site.shape[:2] == (2, DRAWS // 2) and site.dtype == np.float32 for site in sites)
    check_law(
        np.concatenate([s.reshape(DRAWS, -1) for s in sites], axis=1),
        case.law(case.retained, *case.arguments),
    )


# A model like others --------------------------------------------------------------------------------------------------


def names_of(model, *arguments):
    """Names of the sites of a model, and the plates of each."""
    found = {}

    def trace():
        sites = numpyro.handlers.trace(numpyro.handlers.seed(model, jax.random.key(0))).get_trace(*arguments)
        found.update(
            {k: [frame.name for frame in site.get("cond_indep_stack", [])] for k, site in sites.items()}
        )

    jax.eval_shape(trace)
    return found


def test_the_rest_of_a_model_keeps_its_names():
    """What depends on sites that are integrated out is not in the trace; what does not keeps its name and plates."""
    marginal, arguments = single("schools")
    assert list(names_of(marginal, *arguments)) == ["tau", "school", "log tau", "marginal_mu_theta"]
    with jax.numpy_dtype_promotion("standard"):
        marginal, arguments = single("logistic")
        found = names_of(marginal, *arguments)
    assert found == {"rows": [], "theta": ["rows"], "y": ["rows"], "marginal_mu": []}
    assert marginal.structure.groups == (("gaussian", ("mu",), ("theta",)),)


def test_the_evidence_is_that_of_the_model():
    """Trapezoidal rules on the unconstrained scale, in one dimension and in two."""
    y = Y.astype(np.float32)
    found = []
    for model in (precision, marginalize(precision, y)):
        target = target_from_numpyro(model, y)
        (d,) = target.event_shape
        grid = np.linspace(-12.0, 8.0, 301)
        points = np.stack(np.meshgrid(*[grid] * d, indexing="ij"), axis=-1).reshape(-1, d)
        values = jax.jit(jax.vmap(target.logdensity))(jnp.asarray(points, jnp.float32))
        found.append(np.logaddexp.reduce(np.asarray(values, float)) + d * math.log(grid[1] - grid[0]))
    assert found[0] == pytest.approx(found[1], abs=2e-4)


def test_other_data_compile_nothing_anew():
    case = CASES["schools"]
    evaluate = jax.jit(lambda target, x: target.logdensity_and_score(x))
    for shift in (0.0, 1.0):
        arguments = (ERRORS.astype(np.float32), (EFFECTS + shift).astype(np.float32))
        marginal = marginalize(schools, *arguments)  # another object, and the same program
        target = target_from_numpyro(marginal, *arguments)
        before = len(TRACES)
        found = float(evaluate(target, jnp.log(jnp.full(1, 3.0)))[0])
        marginal.recover(jax.random.key(0), {"tau": jnp.ones(DRAWS)}, *arguments)
        assert (len(TRACES) > before) == (shift == 0.0)
        exact = case.logdensity(TAU, ERRORS, EFFECTS + shift) + math.log(3.0)
        assert found == pytest.approx(exact, rel=1e-5)


def test_every_draw_has_its_own_conditional_law():
    """Draws of what stays differ, and come with any leading axes; deterministic sites are those of the draw."""
    case = CASES["schools"]
    marginal, arguments = single("schools")
    taus = np.array([0.1, 20.0], np.float32)
    samples = {"tau": np.tile(taus, (DRAWS // 2, 1)), "ignored": 1.0}
    found = marginal.recover(jax.random.key(2), samples, *arguments)
    lead = (DRAWS // 2, 2)
    assert {name: value.shape for name, value in found.items()} == {
        "mu": lead,
        "theta": (*lead, 8),
        "doubled": (*lead, 8),
        "log tau": lead,
    }
    np.testing.assert_array_equal(found["doubled"], 2.0 * found["theta"])
    np.testing.assert_allclose(found["log tau"], np.log(samples["tau"]), rtol=1e-6)
    draws = np.concatenate([found["mu"][..., None], found["theta"]], axis=-1)
    for i, tau in enumerate(taus):
        check_law(draws[:, i], case.law({"tau": float(tau)}, *case.arguments))


def conjugate(y, x):
    """Data with more axes than their distribution has, and with fewer."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(mu, 0.5), obs=y)
    numpyro.sample("x", dist.Normal(mu * jnp.ones(2), 0.5), obs=x)
    v = numpyro.sample("v", dist.Gamma(2.0, 1.0))
    numpyro.sample("n", dist.Poisson(v * jnp.ones(2)), obs=jnp.asarray(3.0))
    numpyro.sample("m", dist.Poisson(v), obs=jnp.asarray([1.0, 0.0]))


def test_a_model_of_which_nothing_stays():
    data = np.array([0.3, 2.1], np.float32), np.array(-0.4, np.float32)
    marginal = marginalize(conjugate, *data)
    assert marginal.reasons == {}
    exact = stats.multivariate_normal(np.zeros(4), 4.0 + 0.25 * np.eye(4)).logpdf(
        [*data[0], data[1], data[1]]
    )
    # Of the counts: Gamma(2) becomes Gamma(9, 5).
    exact += gammaln(9) - gammaln(2) - 9 * math.log(5) - 2 * gammaln(4)
    found = jax.jit(lambda *data: log_density(marginal, data, {}, {})[0])(*data)
    assert float(found) == pytest.approx(exact, rel=1e-5)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draws = jax.vmap(lambda key: marginal.recover(key, {}, *data))(keys)
    mean, variance = (data[0].sum() + 2 * data[1]) * 4 / 16.25, 1 / 16.25
    check_law(draws["mu"][:, None], Law(stats.norm(mean, math.sqrt(variance)), np.full((1, 1), variance)))
    check_law(draws["v"][:, None], gamma_law(np.array([9.0]), np.array([5.0])))


def test_handlers_and_choices():
    """A choice of sites; NumPyro's handlers around the marginal model."""
    errors, effects = ERRORS.astype(np.float32), EFFECTS.astype(np.float32)
    for sites, stays in (("mu", {"tau", "theta"}), (["theta"], {"tau", "mu"})):
        marginal = marginalize(schools, errors, effects=effects, sites=sites)
        assert (
            set(marginal.reasons) == stays
            and marginal.reasons["tau"] == "it is not among the sites asked for"
        )
    values = {"tau": jnp.asarray(3.0), "mu": jnp.asarray(2.0)}
    total = stats.norm(2.0, np.sqrt(9.0 + ERRORS**2)).logpdf(EFFECTS).sum()
    exact = total + stats.norm(1.0, 5.0).logpdf(2.0) + half_cauchy({"tau": 3.0})

    @jax.jit
    def densities(values):
        conditioned = numpyro.handlers.condition(marginal, {"tau": values["tau"]})
        scaled = numpyro.handlers.scale(marginal, scale=2.0)
        return [
            log_density(marginal, (errors,), {"effects": effects}, values)[0],
            log_density(conditioned, (errors,), {"effects": effects}, {"mu": values["mu"]})[0],
            log_density(scaled, (errors,), {"effects": effects}, values)[0],
        ]

    np.testing.assert_allclose(densities(values), [exact, exact, 2 * exact], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.lenient_promotion  # NumPyro's kernel
def test_nuts_and_recovery_sample_eight_schools():
    """Means over 64 chains against the exact moments, to 5 of their standard errors."""
    exact = targets.eight_schools(centered=True)
    arguments = {"errors": exact.errors, "effects": exact.effects, "mean": 0.0}
    marginal = marginalize(schools, **arguments)
    sampler = MCMC(
        NUTS(marginal),
        num_warmup=300,
        num_samples=100,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(jax.random.key(5), **arguments)
    samples = sampler.get_samples(group_by_chain=True)
    assert set(samples) == {"tau", "log tau"}
    found = marginal.recover(jax.random.key(6), samples, **arguments)
    x = np.concatenate([found["mu"][..., None], found["log tau"][..., None], found["theta"]], axis=-1)
    for values, moments in (
        (x, exact.moments.mean),
        ((x - exact.moments.mean) ** 2, exact.moments.std**2),
    ):
        means = values.mean(axis=1)
        allowed = Z * means.std(axis=0, ddof=1) / 8
        assert np.all(np.abs(means.mean(axis=0) - moments) < allowed)


# What is refused ------------------------------------------------------------------------------------------------------


def model_of(statements):
    """A model that draws a, b ~ Normal, v ~ Gamma, p ~ Beta in this order, and what else ``statements`` say."""

    def model(y):
        a = numpyro.sample("a", dist.Normal(0.3, 1.0))
        b = numpyro.sample("b", dist.Normal(0.0, 2.0))
        v = numpyro.sample("v", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        p = numpyro.sample("p", dist.Beta(2.0, 1.0))
        statements(a, b, v, p, y)

    return model


def observe(make):
    return model_of(lambda a, b, v, p, y: numpyro.sample("y", make(a, b, v, p), obs=y))


def masked(a, b, v, p, y):
    with numpyro.handlers.mask(mask=jnp.array(True)):
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def scaled(a, b, v, p, y):
    with numpyro.handlers.scale(scale=2.0):
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def chain(a, b, v, p, y):
    w = numpyro.sample("w", dist.Gamma(2.0, v[0]))
    numpyro.sample("y", dist.Exponential(w), obs=jnp.abs(y))


REFUSED = {
    "masked": (model_of(masked), "a", "its child 'y' is masked"),
    "scaled": (model_of(scaled), "a", "its child 'y' is scaled"),
    "factor": (model_of(lambda a, b, v, p, y: numpyro.factor("f", a)), "a", "the factor 'f' depends on it"),
    "observed value": (
        model_of(lambda a, b, v, p, y: numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y - a)),
        "a",
        "the observed value of 'y' depends on it",
    ),
    "logits": (
        observe(lambda a, b, v, p: dist.Binomial(3, logits=a)),
        "a",
        "its child 'y' is Binomial(logits)",
    ),
    "scale": (observe(lambda a, b, v, p: dist.Normal(a, jnp.exp(a))), "a", "the scale of 'y' depends on it"),
    "square": (
        observe(lambda a, b, v, p: dist.Normal(a * a, 1.0)),
        "a",
        "the loc of 'y' is not affine in it",
    ),
    "where": (
        observe(lambda a, b, v, p: dist.Normal(jnp.where(a > 0, 2.0 * a, a), 1.0)),
        "a",
        "the loc of 'y' is not affine in it",
    ),
    "step": (
        observe(lambda a, b, v, p: dist.Normal(jnp.sign(a), 1.0)),
        "a",
        "the loc of 'y' is not affine in it",
    ),
    "product": (
        observe(lambda a, b, v, p: dist.Normal(a * b, 1.0)),
        "a",
        "the loc of 'y' is not affine in it and ['b'] jointly",
    ),
    "student": (observe(lambda a, b, v, p: dist.StudentT(3.0, a, 1.0)), "a", "its child 'y' is StudentT"),
    "offset": (
        observe(lambda a, b, v, p: dist.Poisson(v[0] + 1e-6)),
        "v",
        "the rate of 'y' is not, element by element, a multiple of an element of it",
    ),
    "sum": (
        observe(lambda a, b, v, p: dist.Poisson(jnp.sum(v))),
        "v",
        "the rate of 'y' is not, element by element, a multiple of an element of it",
    ),
    "mean": (
        observe(lambda a, b, v, p: dist.Poisson(jnp.sqrt(v[0] * v[1]))),
        "v",
        "the rate of 'y' is not, element by element, a multiple of an element of it",
    ),
    "clipped": (
        observe(lambda a, b, v, p: dist.Normal(0.0, 1.0 / jnp.sqrt(jnp.maximum(v[0], 1e-6)))),
        "v",
        "the precision of 'y' is not, element by element, a multiple of an element of it",
    ),
    "deviation": (
        observe(lambda a, b, v, p: dist.Normal(0.0, v[1])),
        "v",
        "the precision of 'y' is not, element by element, a multiple of an element of it",
    ),
    "concentration": (
        observe(lambda a, b, v, p: dist.Gamma(v[0], v[1])),
        "v",
        "the concentration of 'y' depends on it",
    ),
    "loc": (
        observe(lambda a, b, v, p: dist.Normal(v[0], 1.0 / jnp.sqrt(v[0]))),
        "v",
        "the loc of 'y' depends on it",
    ),
    "shared": (
        observe(lambda a, b, v, p: dist.Normal(a, 1.0 / jnp.sqrt(v[0]))),
        "v",
        "its child 'y' is one of 'a' too, which is integrated out",
    ),
    "integrated": (model_of(chain), "v", "its child 'w' is integrated out"),
    "failures": (
        observe(lambda a, b, v, p: dist.Bernoulli(1.0 - p)),
        "p",
        "the probs of 'y' are not, element by element, elements of it",
    ),
    "half": (
        observe(lambda a, b, v, p: dist.Bernoulli(0.5 * p)),
        "p",
        "the probs of 'y' are not, element by element, elements of it",
    ),
    "prior": (
        model_of(lambda a, b, v, p, y: numpyro.sample("s", dist.HalfNormal(1.0))),
        "s",
        "it is HalfNormal, and only Normal, MultivariateNormal, Gamma, Exponential and Beta sites are integrated out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.lenient_promotion  # NumPyro's Binomial(logits)
def test_reasons(name):
    """Every other site of these models is integrated out, and the one that is not says why."""
    model, site, reason = REFUSED[name]
    marginal = marginalize(model, np.ones((), np.float32))
    assert marginal.reasons == {site: reason}


def test_of_a_product_either_factor_will_do():
    model, *_ = REFUSED["product"]
    y = np.ones((), np.float32)
    assert marginalize(model, y).marginalized == {"b": "gaussian", "v": "gamma", "p": "beta"}
    assert marginalize(model, y, sites=["a"]).marginalized == {"a": "gaussian"}
    with pytest.raises(
        ValueError, match=r"^site 'a' cannot be integrated out: the loc of 'y' is not affine in it and"
    ):
        marginalize(model, y, sites=["a", "b"])


def nothing(y):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(0.0, s), obs=y)


def subsampled(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 6, subsample_size=3) as rows:
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def looped(y):
    from numpyro.contrib.control_flow import scan

    scan(lambda carry, y: (numpyro.sample("x", dist.Normal(carry, 1.0)), None), jnp.zeros(()), y)


@pytest.mark.lenient_promotion  # NumPyro's scan
def test_bad_input_raises():
    y = Y.astype(np.float32)
    with pytest.raises(
        ValueError, match=r"^the model has no latent site 'nu'; its latent sites are \['mu', 'tau', 'th"
    ):
        marginalize(schools, ERRORS, EFFECTS, sites=["nu"])
    with pytest.raises(ValueError, match=r"^the model has no latent site 'y'"):
        marginalize(schools, ERRORS, EFFECTS, sites=["y"])
    with pytest.raises(
        ValueError, match=r"^site 'tau' cannot be integrated out: it is HalfCauchy, and only Normal,"
    ):
        marginalize(schools, ERRORS, EFFECTS, sites=["mu", "tau"])
    with pytest.raises(
        ValueError, match=r"^no site of the model can be integrated out: 's': it is HalfNormal"
    ):
        marginalize(nothing, y)
    with pytest.raises(ValueError, match=r"^plate 'rows' subsamples"):
        marginalize(subsampled, y)
    with pytest.raises(TypeError, match=r"^the model has a control_flow statement"):
        marginalize(looped, y)
    marginal, arguments = single("schools")
    with pytest.raises(ValueError, match=r"^samples lacks the latent sites \['tau'\], got \['mu'\]"):
        marginal.recover(jax.random.key(0), {"mu": 1.0}, *arguments)
    with pytest.raises(ValueError, match=r"^with these arguments the model has other sites.*'y': False"):
        log_density(numpyro.handlers.seed(marginal, jax.random.key(0)), (ERRORS, None), {}, {})
    marginal = marginalize(schools, ERRORS, EFFECTS, sites="mu")
    with pytest.raises(
        ValueError, match=r"^all samples need the same leading axes, got \{'tau': \(3,\), 'theta': \(4,\)"
    ):
        marginal.recover(jax.random.key(0), {"tau": np.ones(3), "theta": np.ones((4, 8))}, *arguments)


# Dependence -----------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def straight_through(v):
    return jnp.round(v)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))

PROGRAMS = {
    "scaled": (lambda v, c: v / c, "AFFINE", True, False),
    "picked": (lambda v, c: v[jnp.argsort(c)], "AFFINE", True, True),
    "picked twice": (lambda v, c: v[jnp.argsort(c)] + v[jnp.argsort(-c)], "AFFINE", False, False),
    "shifted": (lambda v, c: v + c, "AFFINE", False, False),
    "masked": (lambda v, c: jnp.where(c > 0, v, 1.0), "AFFINE", False, False),
    "summed": (lambda v, c: jnp.cumsum(v), "AFFINE", False, False),
    "solved": (lambda v, c: jnp.linalg.solve(jnp.diag(c), v), "AFFINE", False, False),
    "checkpointed": (lambda v, c: jax.checkpoint(lambda v: v * c)(v), "AFFINE", True, False),
    "loop": (lambda v, c: jax.lax.fori_loop(0, 3, lambda i, x: x * c, v), "AFFINE", True, False),
    "loop with a kink": (lambda v, c: jax.lax.fori_loop(0, 3, lambda i, x: jnp.maximum(x, c), v), "OTHER"),
    "written in logarithms": (lambda v, c: jnp.exp(jnp.log(v) + c), "SMOOTH", True, False),
    "written in roots": (lambda v, c: (1.0 / jnp.sqrt(v)) ** -2, "SMOOTH", True, True),
    "almost": (lambda v, c: (1.0 / jnp.sqrt(v) + 1e-6) ** -2, "SMOOTH", False, False),
    "squared": (lambda v, c: v * v, "SMOOTH", False, False),
    "geometric mean": (lambda v, c: jnp.sqrt(v[0] * v[1]), "SMOOTH", False, False),
    "absolute": (lambda v, c: jnp.abs(v), "OTHER"),
    "softplus": (lambda v, c: jax.nn.softplus(v), "OTHER"),
    "sorted": (lambda v, c: jnp.sort(v), "OTHER"),
    "compared": (lambda v, c: jnp.where(v > 0, 1.0, 2.0), "OTHER"),
    "rounded": (lambda v, c: v + jnp.round(v), "OTHER"),
    "stopped": (lambda v, c: jax.lax.stop_gradient(v) * c, "OTHER"),
    "straight through": (lambda v, c: straight_through(v), "OTHER"),
    "not at all": (lambda v, c: c + jnp.zeros_like(v), "NONE"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_dependence(name):
    """Affine, smooth or other; a multiple of one element each; an element each."""
    function, expected, *multiples = PROGRAMS[name]
    closed = inlined(function, jnp.ones(3), jnp.ones(3))
    assert walk(closed, [Dependence.AFFINE, Dependence.NONE]) == [Dependence[expected]]
    if multiples:
        found = [is_proportional(closed, 0, 0, factor_one=factor_one) for factor_one in (False, True)]
        assert found == multiples
