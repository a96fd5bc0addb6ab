"""Networks with known answers: every prediction on every schedule gives back the exact model.

The "network" computes the exact prediction of an asymmetric Gaussian mixture, by formulas that do not pass through
the conversions under test, in double precision.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcdiff import schedules
from smcdiff.analytic import GaussianMixtureDiffusion
from smcdiff.density import DensityPath, DiffusionModel, HasLogDensity, HasLogRatio, HasScore, require
from smcdiff.diffusion import PREDICTIONS, Diffusion, Marginal

SIGMA_DATA = 0.7
WEIGHTS = np.array([0.55, 0.15, 0.3])
MEANS = np.array([[1.0, -0.4, 0.2], [-1.3, 0.9, 0.8], [0.1, 1.6, -1.1]])
COVARIANCE = np.array([[0.5, 0.2, -0.1], [0.2, 0.3, 0.05], [-0.1, 0.05, 0.2]])
SCHEDULES = {
    "vp": schedules.vp,
    "cosine": schedules.cosine,
    "ve": schedules.ve,
    "edm": schedules.edm,
    "rectified_flow": schedules.rectified_flow,
    "ou": schedules.ou,
}
TIMES = (1e-3, 0.02, 0.4, 0.95)


def _exact(schedule):
    return GaussianMixtureDiffusion.create(WEIGHTS, MEANS, COVARIANCE, schedule)


# --- what the networks of the six kinds compute; `params` is the exact model itself ---


def _predict_eps(params, x, t):
    return -params.schedule.sigma(t) * params.score(x, t)


def _predict_x0(params, x, t):
    return params.denoise(x, t)


def _predict_score(params, x, t):
    return params.score(x, t)


def _predict_v(params, x, t):
    eps = -params.schedule.sigma(t) * params.score(x, t)
    return params.schedule.alpha(t) * eps - params.schedule.sigma(t) * params.denoise(x, t)


def _predict_velocity(params, x, t):
    """The probability-flow velocity, from the coefficients of the stochastic differential equation."""
    schedule = params.schedule
    return schedule.drift(t) * x - 0.5 * schedule.diffusion_squared(t) * params.score(x, t)


def _predict_edm(params, scaled, noise_level):
    """F of Karras et al., Eq. 7: D(y; s) = c_skip y + c_out F(c_in y, log(s)/4), solved for F."""
    s = jnp.exp(4 * noise_level)
    c_in = 1 / jnp.sqrt(s**2 + SIGMA_DATA**2)
    c_skip, c_out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / jnp.sqrt(s**2 + SIGMA_DATA**2)
    y = scaled / c_in
    return (params.mixture.denoise(y, jnp.ones_like(s), s) - c_skip * y) / c_out


NETWORKS = {
    "eps": _predict_eps,
    "x0": _predict_x0,
    "v": _predict_v,
    "velocity": _predict_velocity,
    "score": _predict_score,
    "edm": _predict_edm,
}


def _network(prediction, schedule):
    return Diffusion(
        _exact(schedule), NETWORKS[prediction], schedule, prediction, (3,), sigma_data=SIGMA_DATA
    )


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def _points(schedule):
    """Times, and samples (of the path, so that no component is out of reach) at each."""
    t = jnp.asarray(TIMES)
    key_data, key_noise = jax.random.split(jax.random.key(0))
    x0 = _exact(schedule).mixture.sample(key_data, len(TIMES))
    noise = jax.random.normal(key_noise, x0.shape)
    return schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * noise, t


def test_every_prediction_is_in_the_list():
    assert set(NETWORKS) == set(PREDICTIONS)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", NETWORKS)
def test_conversions_give_back_the_exact_model(prediction, name, x64):
    schedule = SCHEDULES[name]()
    model, exact, (x, t) = _network(prediction, schedule), _exact(schedule), _points(schedule)
    sigma = schedule.sigma(t)[:, None]
    alpha_rate, sigma_rate = (rate[:, None] for rate in schedule.alpha_sigma_rates(t))
    score, x0 = jax.vmap(exact.score)(x, t), jax.vmap(exact.denoise)(x, t)
    expected = {
        "denoise": x0,
        "eps": -sigma * score,
        "score": score,
        "velocity": alpha_rate * x0 - sigma_rate * sigma * score,
    }
    for method, wanted in expected.items():
        got = jax.vmap(getattr(model, method))(x, t)
        # Rounding, 1e-16, is amplified by at most sigma/alpha or alpha/sigma, here up to 1e4.
        scale = np.max(np.abs(wanted), axis=1, keepdims=True)
        np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-9, err_msg=method)


@pytest.mark.parametrize("prediction", NETWORKS)
def test_rescaled_input_under_another_schedule(prediction, x64):
    """At equal log-SNR the denoised sample depends on x/alpha only; the edm network itself is the same one too."""
    kept, exploding = schedules.vp(), schedules.ve()
    under_kept, under_exploding = _network(prediction, kept), _network(prediction, exploding)
    if prediction == "edm":
        under_exploding = eqx.tree_at(lambda m: m.params, under_exploding, under_kept.params)
    for t in (0.05, 0.3, 0.8):
        t = jnp.asarray(t)
        other = exploding.time_from_log_snr(kept.log_snr(t))
        x = kept.alpha(t) * jnp.asarray([0.3, -1.0, 0.9])
        denoised = under_kept.denoise(x, t)
        np.testing.assert_allclose(
            under_exploding.denoise(x / kept.alpha(t), other), denoised, rtol=1e-8, atol=1e-9
        )
        assert (
            np.max(np.abs(under_exploding.denoise(x, other) - denoised)) > 1e-3
        )  # x was rescaled for a reason


def _affine(params, x, t, condition=None):
    shift = 0.0 if condition is None else condition
    return params["matrix"] @ x + params["slope"] * t + shift


def _affine_model(size=3, seed=0, prediction="x0", schedule=None):
    key_matrix, key_slope = jax.random.split(jax.random.key(seed))
    params = {
        "matrix": jax.random.normal(key_matrix, (size, size)),
        "slope": jax.random.normal(key_slope, (size,)),
    }
    return Diffusion(params, _affine, schedule or schedules.vp(), prediction, (size,))


def test_edm_default_data_scale_and_arguments():
    """The network sees x / sqrt(sigma^2 + alpha^2 sigma_data^2) and log(sigma/alpha)/4."""
    model, x, t = _affine_model(prediction="edm"), jnp.asarray([0.4, -2.0, 1.1]), jnp.asarray(0.3)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    output = _affine(model.params, x / jnp.sqrt(sigma**2 + alpha**2 * 0.5**2), 0.25 * jnp.log(sigma / alpha))
    ratio = sigma / alpha
    total = ratio**2 + 0.5**2
    expected = 0.5**2 / total * x / alpha + ratio * 0.5 / jnp.sqrt(total) * output
    np.testing.assert_allclose(model.denoise(x, t), expected, rtol=1e-5)


def test_condition_is_passed_on():
    model, x, t = _affine_model(), jnp.asarray([0.4, -2.0, 1.1]), jnp.asarray(0.3)
    label = jnp.asarray([1.0, 2.0, -5.0])
    conditional = model.given(label)
    np.testing.assert_allclose(conditional.denoise(x, t), model.denoise(x, t) + label, rtol=1e-6)
    assert model.condition is None  # unchanged
    again = conditional.given(2 * label)
    np.testing.assert_allclose(again.denoise(x, t), model.denoise(x, t) + 2 * label, rtol=1e-6)
    assert len(jax.tree.leaves(conditional)) == len(jax.tree.leaves(model)) + 1


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (5, 3)])
@pytest.mark.parametrize("method", ["denoise", "eps", "score", "velocity"])
def test_wrong_shape_raises(shape, method):
    with pytest.raises(ValueError, match=r"^x must be one sample of shape \(3,\), got .*vmap"):
        getattr(_affine_model(), method)(jnp.ones(shape), jnp.asarray(0.5))


def test_unknown_prediction_raises():
    with pytest.raises(ValueError, match=r"^prediction must be one of .*'epsilon'"):
        _affine_model(prediction="epsilon")


def test_marginal_has_a_score_and_no_density():
    model, x, t = _affine_model(), jnp.asarray([0.4, -2.0, 1.1]), jnp.asarray(0.3)
    marginal = model.at(0.3)
    assert isinstance(marginal, Marginal) and isinstance(marginal, HasScore)
    assert not isinstance(marginal, HasLogDensity) and not isinstance(marginal, HasLogRatio)
    assert isinstance(model, DiffusionModel) and isinstance(model, DensityPath)
    np.testing.assert_allclose(marginal.score(x), model.score(x, t), rtol=1e-6)
    np.testing.assert_allclose(marginal.denoise(x), model.denoise(x, t), rtol=1e-6)
    assert any(leaf is marginal.t for leaf in jax.tree.leaves(marginal))


def test_exact_marginal_has_both():
    marginal = _exact(schedules.vp()).at(jnp.asarray(0.3))
    assert isinstance(marginal, HasScore) and isinstance(marginal, HasLogDensity)


@pytest.mark.parametrize("capability", [HasScore, HasLogDensity, HasLogRatio, DiffusionModel])
def test_require(capability):
    with pytest.raises(TypeError, match=rf"^mala needs .*{capability.__name__}, got int; pass"):
        require(3, capability, "mala")


def test_require_lets_a_capable_target_pass():
    require(_affine_model().at(0.5), HasScore, "mala")
    require(_affine_model(), DiffusionModel, "reverse_sample")
    with pytest.raises(TypeError, match=r"Marginal.*score only"):
        require(_affine_model().at(0.5), HasLogDensity, "mala")


def test_new_weights_times_and_conditions_do_not_compile_anew():
    traces = []

    @jax.jit
    def score(model, x, t):
        traces.append(None)
        return model.score(x, t)

    @jax.jit
    def marginal_score(marginal, x):
        traces.append(None)
        return marginal.score(x)

    x, first, second = (
        jnp.ones(3),
        _affine_model(seed=0),
        _affine_model(seed=1, schedule=schedules.vp(0.2, 9.0)),
    )
    values = [score(model, x, jnp.asarray(t)) for model in (first, second) for t in (0.2, 0.6)]
    assert len(traces) == 1
    assert len({float(value[0]) for value in values}) == 4
    np.testing.assert_allclose(values[3], second.score(x, jnp.asarray(0.6)), rtol=1e-5)
    for model, t in ((first, 0.2), (second, 0.7)):
        marginal_score(model.at(t), x)
    assert len(traces) == 2
    for label in (1.0, 3.0):
        score(first.given(jnp.full(3, label)), x, jnp.asarray(0.2))
    assert len(traces) == 3


def test_weights_are_leaves_and_no_constants_of_the_program():
    size = 300
    model = _affine_model(size)
    leaves = jax.tree.leaves(model)
    assert any(leaf is model.params["matrix"] for leaf in leaves)
    lowered = jax.jit(lambda model, x, t: model.score(x, t)).lower(model, jnp.ones(size), jnp.asarray(0.3))
    # The matrix as text has 90 000 numbers of several characters; closed over, it is there: the test can fail.
    assert len(lowered.as_text()) < 20_000
    closed_over = jax.jit(lambda x, t: model.score(x, t)).lower(jnp.ones(size), jnp.asarray(0.3))
    assert len(closed_over.as_text()) > 500_000
