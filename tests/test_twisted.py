"""The twisted sampler and its twists against closed forms.

The target of the sampler is the posterior under the DISCRETISED prior chain; for Gaussian data that chain is linear,
and `chain_log_evidence` gives its evidence exactly. z-tests allow 5 standard errors, estimated from independent runs: a
false failure has a probability of about 6e-7 a check, and keys are fixed.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import quick

import smcdiff
from benchmarks.evidence import chain_log_evidence
from smcdiff import guidance, inverse, schedules

Z = 5.0
MEAN = np.array([0.8, -1.1, 0.4])
COVARIANCE = np.array([[1.2, 0.5, -0.2], [0.5, 0.7, 0.1], [-0.2, 0.1, 0.3]])
MATRIX = np.array([[1.0, -0.4, 0.3], [0.2, 0.9, -0.7]])
STD = np.array([0.4, 0.7])
Y = np.array([1.9, -0.3])


def f32(a):
    return jnp.asarray(a, jnp.float32)


@functools.cache
def gaussian(scheduled=schedules.cosine):
    return smcdiff.GaussianDiffusion(MEAN, COVARIANCE, scheduled())


@functools.cache
def mixture():
    means = np.array([[2.0, 0.5, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.0]])
    return smcdiff.GaussianMixtureDiffusion.create(
        [0.5, 0.2, 0.3], means, 0.2 * COVARIANCE, schedules.cosine()
    )


@functools.cache
def problem(y=tuple(Y), scale=1.0):
    return inverse.InverseProblem(inverse.dense(f32(MATRIX), (3,)), f32(y), f32(scale * STD))


def times(num_steps, **ends):
    return smcdiff.log_snr_times(schedules.cosine(), num_steps, **ends)


@eqx.filter_jit
def twisted(twist, model, problem, x, t):
    """One program a twist and a shape; points, models and measurements are its arguments."""
    return twist(model, problem, x, t)


@functools.cache
def plain_runs(order, log_snr_max=None):
    """The default twist, which several tests look at; one program an order, whatever the grid's end."""
    grid = times(16) if log_snr_max is None else times(16, log_snr_max=log_snr_max)
    fk = smcdiff.tds(gaussian(), problem(), times=grid, order=order)
    return smcdiff.run_smc(jax.random.key(1), fk, 16, num_chains=800, progress=False)


def tds_runs(key, model, problem, num_steps, num_particles, num_chains, **options):
    fk = smcdiff.tds(model, problem, times=times(num_steps), **options)
    return smcdiff.run_smc(
        jax.random.key(key), fk, num_particles, num_chains=num_chains, chunk_size=num_steps, progress=False
    )


@pytest.mark.parametrize("order", quick([1, 2], 1))
def test_evidence_is_that_of_the_discretised_chain(order):
    result = plain_runs(order)
    exact = chain_log_evidence(gaussian(), problem(), times(16), order)
    ratio = np.exp(np.asarray(result.log_evidence, float) - exact)
    error = ratio.std() / np.sqrt(ratio.size)
    assert abs(ratio.mean() - 1) < Z * error
    assert error < 0.03


TWISTS = {
    "dps": guidance.dps,
    "pigdm": guidance.pigdm,
    "moments": guidance.moment_matching(),
    "moments of rank 1": guidance.moment_matching(rank=1),
    "saddlepoint": guidance.saddlepoint(2),
    "a user's": guidance.log_twist(lambda problem, denoised, t: 0.3 * problem.log_likelihood(denoised)),
}


@pytest.mark.parametrize("name", quick(TWISTS, "pigdm", "moments", "a user's"))
def test_every_twist_has_the_same_evidence(name):
    # Large noise, so that even a poor twist has weights of finite, small variance.
    easy = problem(scale=4.0)
    result = tds_runs(2, gaussian(), easy, 16, 16, 800, twist=TWISTS[name])
    exact = chain_log_evidence(gaussian(), easy, times(16), 2)
    ratio = np.exp(np.asarray(result.log_evidence, float) - exact)
    error = ratio.std() / np.sqrt(ratio.size)
    assert abs(ratio.mean() - 1) < Z * error
    assert error < 0.03


@pytest.mark.parametrize(("order", "slope"), [(1, 1.0), (2, 2.0)])
def test_the_chain_converges_at_its_order(order, slope):
    """The discretised evidence approaches the continuous one at the order of the chain."""
    model = smcdiff.GaussianDiffusion(MEAN, COVARIANCE, schedules.cosine(-14.0))
    exact = model.posterior(MATRIX, Y, STD)[1]
    errors = []
    for num_steps in (40, 80, 160):
        grid = smcdiff.log_snr_times(model.schedule, num_steps, log_snr_min=-7.0, log_snr_max=9.0)
        errors.append(abs(chain_log_evidence(model, problem(), grid, order) - exact))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(slopes - slope) < 0.35), (errors, slopes)


def test_posterior_of_a_mixture():
    result = tds_runs(3, mixture(), problem(), 60, 500, 16, twist=guidance.moment_matching())
    posterior, log_evidence = mixture().posterior(MATRIX, Y, STD)
    weights = np.exp(np.asarray(result.log_weights, float))
    x = np.asarray(result.particles.x, float)
    moments = {
        "mean": np.einsum("cn,cni->ci", weights, x),
        "second moment": np.einsum("cn,cni,cnj->cij", weights, x, x),
    }
    exact_mean = np.asarray(posterior.mixture.mean(), float)
    exact = {
        "mean": exact_mean,
        "second moment": np.asarray(posterior.mixture.covariance(), float) + np.outer(exact_mean, exact_mean),
    }
    for name, values in moments.items():
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        # t with 15 degrees of freedom exceeds 8 with probability 1e-6; the discretisation error allowed is .01.
        assert np.all(np.abs(values.mean(0) - exact[name]) < 8 * error + 0.01), name
        assert np.all(error < 0.03), name
    evidence = np.exp(np.asarray(result.log_evidence, float) - log_evidence)
    assert abs(evidence.mean() - 1) < 8 * evidence.std() / 4 + 0.01


def exact_twist(model, x, t):
    """log p(y | x_t) and E[x_0 | x_t, y] - E[x_0 | x_t] by Gaussian conditioning, in double precision."""
    alpha, sigma = float(model.schedule.alpha(t)), float(model.schedule.sigma(t))
    mean, covariance = np.asarray(model.mixture.mean(), float), np.asarray(model.mixture.covariance(), float)
    gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(3))
    denoised = mean + gain @ (np.asarray(x, float) - alpha * mean)
    spread = covariance - alpha * gain @ covariance
    total = MATRIX @ spread @ MATRIX.T + np.diag(STD**2)
    residual = Y - MATRIX @ denoised
    log_twist = -0.5 * (residual @ np.linalg.solve(total, residual) + np.linalg.slogdet(2 * np.pi * total)[1])
    return log_twist, spread @ MATRIX.T @ np.linalg.solve(total, residual)


POINTS = [(0.15, [1.0, -0.7, 0.2]), (0.5, [-0.4, 1.3, 0.8]), (0.9, [0.3, -1.0, 2.0])]


EXACT_FOR_GAUSSIANS = {
    "moments": guidance.moment_matching(),
    "moments of rank 2": guidance.moment_matching(2),
    "moments of rank 5": guidance.moment_matching(5),
    "saddlepoint": guidance.saddlepoint(),
    "saddlepoint in one step": guidance.saddlepoint(1),
}


@pytest.mark.parametrize("name", EXACT_FOR_GAUSSIANS)
@pytest.mark.parametrize(("t", "x"), POINTS)
def test_twist_is_exact_for_gaussian_data(t, x, name):
    value = twisted(EXACT_FOR_GAUSSIANS[name], gaussian(), problem(), f32(x), f32(t))
    log_twist, shift = exact_twist(gaussian(), x, t)
    np.testing.assert_allclose(value.log_twist, log_twist, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(value.shift, shift, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(value.denoised, gaussian().denoise(f32(x), f32(t)), rtol=1e-6)


@pytest.mark.parametrize(("t", "x"), POINTS)
def test_pigdm_is_exact_for_standard_normal_data(t, x):
    model = smcdiff.GaussianDiffusion(np.zeros(3), 1.0, schedules.cosine())
    value = twisted(guidance.pigdm, model, problem(), f32(x), f32(t))
    other = twisted(guidance.pigdm, model, problem(), f32(x) + 1.0, f32(t))
    log_twist, shift = exact_twist(model, x, t)
    np.testing.assert_allclose(value.shift, shift, rtol=1e-4, atol=1e-5)
    # Only differences of its log twist mean anything: the determinant is left out.
    expected = exact_twist(model, np.array(x) + 1.0, t)[0] - log_twist
    np.testing.assert_allclose(other.log_twist - value.log_twist, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("log_snr", [-3.0, -1.0, 0.0])
def test_the_saddlepoint_finds_the_mode_that_the_measurement_speaks_for(log_snr):
    """Two modes, and a noisy sample near the one that y does not speak for: one Gaussian for both is nats off."""
    model = smcdiff.GaussianMixtureDiffusion.create(
        [0.8, 0.2], [[-2.0, 0.0, 1.0], [2.0, 1.0, -1.0]], 0.1, schedules.cosine()
    )
    t, x = model.schedule.time_from_log_snr(f32(log_snr)), f32([-0.3, 0.2, 0.4])
    in_second = problem(tuple(MATRIX @ np.array([2.1, 0.8, -1.2])))
    posterior, log_evidence = model.posterior(MATRIX, np.asarray(in_second.y), STD)
    exact = log_evidence + posterior.at(t).logdensity(x) - model.at(t).logdensity(x)
    shift = posterior.denoise(x, t) - model.denoise(x, t)
    saddle = twisted(guidance.saddlepoint(), model, in_second, x, t)
    moments = twisted(guidance.moment_matching(), model, in_second, x, t)
    # No approximation is exact here: 0.6 nats and 6 % are what the saddlepoint leaves.
    assert abs(saddle.log_twist - exact) < 0.6 < 1.2 < abs(moments.log_twist - exact)
    error, other = (
        jnp.linalg.norm(value.shift - shift) / jnp.linalg.norm(shift) for value in (saddle, moments)
    )
    assert error < 0.06 < other


def test_the_default_twist_knows_what_it_is_given():
    """Exact models and few measurements: the saddlepoint; many: moments of low rank; networks: pigdm."""
    few = inverse.InverseProblem(inverse.mask(np.arange(33) < 32), jnp.zeros(32), 0.1)
    many = inverse.InverseProblem(inverse.identity((33,)), jnp.zeros(33), 0.1)
    exact = smcdiff.GaussianDiffusion(np.zeros(33), 1.0, schedules.cosine())
    network = smcdiff.Diffusion(_counted_denoiser, {}, schedules.cosine(), event_shape=(33,), prediction="x0")
    assert guidance.default_twist(exact, few) == guidance.saddlepoint()
    assert guidance.default_twist(exact, many) == guidance.moment_matching(8)
    assert guidance.default_twist(network, few) is guidance.default_twist(network, many) is guidance.pigdm


LIKELIHOOD = guidance.log_twist(lambda problem, denoised, t: problem.log_likelihood(denoised))
slope_of_log_twist = eqx.filter_jit(
    eqx.filter_grad(lambda x, model, problem, t: guidance.dps(model, problem, x, t).log_twist)
)


@pytest.mark.parametrize(("t", "x"), POINTS)
def test_dps_shift_is_the_gradient_of_its_log_twist(t, x):
    value = twisted(guidance.dps, mixture(), problem(), f32(x), f32(t))
    user = twisted(LIKELIHOOD, mixture(), problem(), f32(x), f32(t))
    alpha, sigma = mixture().schedule.alpha(f32(t)), mixture().schedule.sigma(f32(t))
    gradient = slope_of_log_twist(f32(x), mixture(), problem(), f32(t))
    np.testing.assert_allclose(value.shift, sigma**2 / alpha * gradient, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), value, user)


def test_a_krylov_twist_of_low_rank_is_exact_where_the_rest_is_isotropic():
    """Isotropic data seen through orthonormal rows: one direction and one variance say everything."""
    model = smcdiff.GaussianDiffusion(np.linspace(-1, 1, 36).reshape(6, 6), 0.5, schedules.cosine())
    observed = np.arange(36).reshape(6, 6) % 3 != 0
    y = f32(np.random.default_rng(0).normal(size=observed.sum()))
    masked = inverse.InverseProblem(inverse.mask(observed), y, 0.3)
    x, t = f32(np.random.default_rng(1).normal(size=(6, 6))), f32(0.4)
    dense = twisted(guidance.moment_matching(), model, masked, x, t)
    low = twisted(guidance.moment_matching(rank=1), model, masked, x, t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), dense, low)


def test_the_krylov_shift_approaches_the_dense_one():
    model = smcdiff.EmpiricalDiffusion(
        f32(np.random.default_rng(0).uniform(size=(40, 6, 6))), 0.1, schedules.cosine()
    )
    blurred = inverse.InverseProblem(
        inverse.gaussian_blur((6, 6), 0.8), f32(np.random.default_rng(1).uniform(size=(6, 6))), 0.05
    )
    x, t = f32(np.random.default_rng(2).normal(size=(6, 6))), f32(0.3)
    dense = twisted(guidance.moment_matching(), model, blurred, x, t)
    error = [
        np.linalg.norm(twisted(guidance.moment_matching(rank), model, blurred, x, t).shift - dense.shift)
        / np.linalg.norm(dense.shift)
        for rank in (1, 4, 12)
    ]
    assert error[0] > error[1] > error[2] and error[2] < 0.05, error


@pytest.mark.parametrize("order", quick([1, 2], 1))
def test_the_last_step_is_not_steered(order):
    """It has no noise, so no weight could take it back. The grid ends far from the data, where the shift is large."""
    result, grid = plain_runs(order, 1.0), times(16, log_snr_max=1.0)
    exact = chain_log_evidence(gaussian(), problem(), grid, order)
    ratio = np.exp(np.asarray(result.log_evidence, float) - exact)
    error = ratio.std() / np.sqrt(ratio.size)
    assert abs(ratio.mean() - 1) < Z * error
    assert error < 0.03
    if order == 2:  # what the twist said before the step, which the particles remember
        before = result.particles.previous
        np.testing.assert_allclose(result.particles.x, before.denoised, rtol=1e-4, atol=1e-4)
        assert np.abs(before.shift).mean() > 0.05


def test_the_weights_are_even_to_the_end():
    """On a fine grid the likelihood brings nothing that the last twist did not know."""
    ess = np.asarray(plain_runs(2).ess).mean(0)
    assert ess[-1] > 0.6 * ess[-2]


class _Broken(eqx.Module):
    """A model whose denoiser fails below a time."""

    inner: smcdiff.GaussianMixtureDiffusion
    below: jax.Array

    schedule = property(lambda self: self.inner.schedule)
    event_shape = property(lambda self: self.inner.event_shape)

    def denoise(self, x, t):
        return jnp.where(t < self.below, jnp.nan, self.inner.denoise(x, t))

    def score(self, x, t):
        return self.inner.score(x, t)

    def at(self, t):
        return self.inner.at(t)


def test_a_model_that_fails_in_the_middle_is_flagged():
    with pytest.warns(RuntimeWarning, match="2 of 2 chains have no weight left"):
        result = tds_runs(5, _Broken(gaussian(), f32(0.3)), problem(), 12, 8, 2)
    assert not result.is_valid
    assert np.isneginf(result.log_evidence).all()
    assert np.asarray(result.info.num_invalid).max() == 8
    healthy = tds_runs(5, _Broken(gaussian(), f32(0.0)), problem(), 12, 8, 2)
    assert healthy.is_valid


_calls = []


def _counted_denoiser(params, x, t):
    _calls.append(None)
    return params * x


def test_new_weights_and_a_new_measurement_do_not_trace_again():
    for scale, offset in ((0.5, 0.0), (0.6, 0.2), (0.7, -0.4)):
        model = smcdiff.Diffusion(f32(scale), _counted_denoiser, schedules.cosine(), "x0", (3,))
        smcdiff.posterior(
            jax.random.key(0),
            model,
            problem(tuple(Y + offset)),
            num_particles=4,
            num_chains=2,
            num_steps=4,
            progress=False,
        )
        if scale == 0.5:
            first = len(_calls)
    assert first > 0 and len(_calls) == first


def test_posterior_is_the_long_form():
    short = smcdiff.posterior(
        jax.random.key(1),
        gaussian(),
        problem(),
        num_particles=16,
        num_chains=800,
        num_steps=16,
        progress=False,
    )
    long = plain_runs(2)
    np.testing.assert_array_equal(short.particles, long.particles.x)
    np.testing.assert_array_equal(short.log_evidence, long.log_evidence)


def test_bad_input():
    with pytest.raises(TypeError, match="tds needs a target with the capability DiffusionModel"):
        smcdiff.tds(mixture().mixture, problem(), times=times(8))
    with pytest.raises(ValueError, match="order"):
        smcdiff.tds(gaussian(), problem(), times=times(8), order=3)
    with pytest.raises(ValueError, match="times must fall strictly from 1"):
        smcdiff.tds(gaussian(), problem(), times=times(8)[::-1])
    with pytest.raises(ValueError, match="shape"):
        wrong = inverse.InverseProblem(inverse.identity((2, 2)), jnp.zeros((2, 2)), 1.0)
        smcdiff.tds(gaussian(), wrong, times=times(8))
    with pytest.raises(ValueError, match="method must be one of"):
        smcdiff.posterior(jax.random.key(0), gaussian(), problem(), method="magic")
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="rank must be a positive integer"):
            guidance.moment_matching(count)
        with pytest.raises(ValueError, match="num_steps must be a positive integer"):
            guidance.saddlepoint(count)
