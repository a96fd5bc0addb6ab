"""Every schedule against its closed form, written here in NumPy and independently of the library's derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcdiff.schedules import (
    check_times,
    cosine,
    edm,
    foellmer,
    karras_times,
    log_snr_times,
    ou,
    rectified_flow,
    uniform_times,
    ve,
    vp,
)


def _vp_forms(low, high):
    def alpha(t):
        return np.exp(-0.5 * (low * t + 0.5 * (high - low) * t**2))

    def beta(t):
        return low + (high - low) * t

    return alpha, lambda t: np.sqrt(1 - alpha(t) ** 2), lambda t: -0.5 * beta(t), beta


_ANGLE = np.arctan(np.exp(9.0))
_BRIDGE_END = 1 / (1 + 1.7**2 * np.exp(-5.0))
_VE_LOG_RATIO = np.log(50.0 / 0.01)

# name: schedule, preserves variance, and the closed forms of alpha, sigma, f and g^2.
SCHEDULES = {
    "vp": (lambda: vp(), True, *_vp_forms(0.1, 20.0)),
    "vp(0.5, 8)": (lambda: vp(0.5, 8.0), True, *_vp_forms(0.5, 8.0)),
    "vp(3, 3)": (lambda: vp(3.0, 3.0), True, *_vp_forms(3.0, 3.0)),
    "cosine": (
        lambda: cosine(),
        True,
        lambda t: np.cos(_ANGLE * t),
        lambda t: np.sin(_ANGLE * t),
        lambda t: -_ANGLE * np.tan(_ANGLE * t),
        lambda t: 2 * _ANGLE * np.tan(_ANGLE * t),
    ),
    "ve": (
        lambda: ve(),
        False,
        np.ones_like,
        lambda t: np.sqrt(0.01**2 * ((50.0 / 0.01) ** (2 * t) - 1)),
        np.zeros_like,
        lambda t: 0.01**2 * 2 * _VE_LOG_RATIO * (50.0 / 0.01) ** (2 * t),
    ),
    "foellmer": (
        lambda: foellmer(1.7, -2.5),
        False,
        lambda t: 1 - _BRIDGE_END * t,
        lambda t: 1.7 * np.sqrt(_BRIDGE_END * t * (1 - _BRIDGE_END * t)),
        lambda t: -_BRIDGE_END / (1 - _BRIDGE_END * t),
        lambda t: np.full_like(t, 1.7**2 * _BRIDGE_END),
    ),
    "edm": (
        lambda: edm(),
        False,
        np.ones_like,
        lambda t: 80.0 * t,
        np.zeros_like,
        lambda t: 2 * 80.0**2 * t,
    ),
    "rectified_flow": (
        lambda: rectified_flow(),
        False,
        lambda t: 1 - t,
        lambda t: t,
        lambda t: -1 / (1 - t),
        lambda t: 2 * t / (1 - t),
    ),
    "ou": (
        lambda: ou(3.0),
        True,
        lambda t: np.exp(-3.0 * t),
        lambda t: np.sqrt(1 - np.exp(-6.0 * t)),
        lambda t: np.full_like(t, -3.0),
        lambda t: np.full_like(t, 6.0),
    ),
}

# Inside (0, 1): rectified flow has alpha(1) = 0, so that f is infinite there.
TIMES = np.array([1e-4, 0.003, 0.1, 0.37, 0.71, 0.98])


@pytest.fixture(scope="module", params=SCHEDULES)
def case(request):
    return SCHEDULES[request.param]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_starts_at_the_data_exactly(case):
    schedule = case[0]()
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            zero = jnp.zeros((), dtype)
            assert schedule.alpha(zero) == 1.0 and schedule.alpha(zero).dtype == dtype
            assert schedule.sigma(zero) == 0.0 and schedule.sigma(zero).dtype == dtype
            assert schedule.log_snr(zero) == np.inf


def test_closed_forms(case, x64):
    make, _, *forms = case
    schedule, t = make(), jnp.asarray(TIMES)
    for method, form in zip(
        (schedule.alpha, schedule.sigma, schedule.drift, schedule.diffusion_squared), forms, strict=True
    ):
        np.testing.assert_allclose(method(t), form(TIMES), rtol=1e-10)


def test_single_precision_keeps_the_small_noise_levels(case):
    make, _, _, sigma, *_ = case
    # 1 - alpha^2 computed naively is off by a percent and more at t = 1e-4.
    np.testing.assert_allclose(
        make().sigma(jnp.asarray(TIMES, jnp.float32)),
        sigma(TIMES.astype(np.float32).astype(float)),
        rtol=2e-5,
    )


def test_variance_is_preserved_where_it_should_be(case, x64):
    make, preserves, *_ = case
    schedule, t = make(), jnp.linspace(0.01, 1.0, 50)
    gap = np.abs(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 - 1)
    assert np.all(gap < 1e-14) == preserves


def test_log_snr_falls_strictly_and_is_inverted(case, x64):
    schedule = case[0]()
    t = jnp.linspace(1e-6, 1.0 - 1e-6, 400)
    log_snr = schedule.log_snr(t)
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(log_snr, np.log(case[2](np.asarray(t)) / case[3](np.asarray(t))), rtol=1e-7)
    np.testing.assert_allclose(schedule.time_from_log_snr(log_snr), t, rtol=1e-9)


def test_inverse_in_single_precision(case):
    schedule = case[0]()
    levels = jnp.linspace(max(float(schedule.log_snr(jnp.asarray(1.0))), -4.0) + 0.05, 6.0, 60)
    # Of 2^-24 of alpha or 1 - alpha^2, the worst of the schedules makes some 50 times as much in log(alpha/sigma).
    np.testing.assert_allclose(schedule.log_snr(schedule.time_from_log_snr(levels)), levels, atol=5e-6)


def test_variance_obeys_its_differential_equation(case, x64):
    schedule, step = case[0](), 1e-5
    t = jnp.asarray([0.05, 0.3, 0.6, 0.9])
    for rate, values in zip(schedule.alpha_sigma_rates(t), (schedule.alpha, schedule.sigma), strict=True):
        np.testing.assert_allclose(
            rate, (values(t + step) - values(t - step)) / (2 * step), rtol=1e-5, atol=1e-9
        )
    slope = (schedule.sigma(t + step) ** 2 - schedule.sigma(t - step) ** 2) / (2 * step)
    expected = 2 * schedule.drift(t) * schedule.sigma(t) ** 2 + schedule.diffusion_squared(t)
    # Central differences err by step^2/6 times the third derivative, at most (2 log 5000)^2 / 6 relative: 5e-9.
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    # And g^2 = -2 sigma^2 d(lambda)/dt.
    falling = (schedule.log_snr(t + step) - schedule.log_snr(t - step)) / (2 * step)
    np.testing.assert_allclose(
        schedule.diffusion_squared(t), -2 * schedule.sigma(t) ** 2 * falling, rtol=1e-6
    )


def test_traced_and_mapped_times(case):
    schedule, t = case[0](), jnp.asarray(TIMES, jnp.float32)

    def all_of(t):
        return schedule.alpha(t), schedule.sigma(t), schedule.drift(t), schedule.diffusion_squared(t)

    mapped = jax.jit(jax.vmap(all_of))(t)
    for values, expected in zip(mapped, all_of(t), strict=True):
        assert values.shape == t.shape
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "old, new",
    [
        (vp(0.1, 20.0), vp(0.5, 8.0)),
        (cosine(-9.0), cosine(-4.0)),
        (ve(0.01, 50.0), ve(0.1, 3.0)),
        (edm(80.0), edm(7.0)),
        (ou(5.0), ou(2.0)),
    ],
)
def test_new_parameters_do_not_compile_anew(old, new):
    traces = []

    @jax.jit
    def alpha_sigma(schedule, t):
        traces.append(None)
        return schedule.alpha(t), schedule.sigma(t)

    before = alpha_sigma(old, jnp.asarray(0.4))
    after = alpha_sigma(new, jnp.asarray(0.7))
    assert len(traces) == 1
    assert after[1] != before[1]
    np.testing.assert_allclose(after, (new.alpha(jnp.asarray(0.7)), new.sigma(jnp.asarray(0.7))), rtol=1e-6)


def test_parameters_can_be_traced():
    slope = jax.grad(lambda beta_max: vp(0.1, beta_max).log_snr(jnp.asarray(0.5)))(20.0)
    # log(alpha/sigma) = -log(exp(B) - 1)/2 with B = beta_min t + (beta_max - beta_min) t^2 / 2.
    integral = 0.1 * 0.5 + 19.9 * 0.125
    np.testing.assert_allclose(slope, -0.5 * 0.125 / -np.expm1(-integral), rtol=1e-5)


def _start(case, floor):
    """Log-SNR at t = 1, from the closed forms, or ``floor`` if that is higher."""
    with np.errstate(divide="ignore"):
        return max(float(np.log(case[2](np.ones(1)) / case[3](np.ones(1)))[0]), floor)


def test_log_snr_times(case, x64):
    for limits in ({}, {"log_snr_min": -1.5, "log_snr_max": 3.0}):
        times = log_snr_times(case[0](), 12, **limits)
        assert times.shape == (13,) and times[0] == 1.0 and times[-1] == 0.0
        assert np.all(np.diff(times) < 0)
        inner = np.asarray(times[1:-1])
        expected = np.linspace(
            _start(case, limits.get("log_snr_min", -6.0)), limits.get("log_snr_max", 5.0), 12
        )
        np.testing.assert_allclose(np.log(case[2](inner) / case[3](inner)), expected[1:], atol=1e-8)


def test_karras_times(case, x64):
    times = karras_times(case[0](), 9, sigma_min=0.01, sigma_max=20.0, rho=5.0)
    assert times.shape == (10,) and times[0] == 1.0 and times[-1] == 0.0
    assert np.all(np.diff(times) < 0)
    largest = min(20.0, np.exp(-_start(case, -np.inf)))
    steps = np.arange(9) / 8
    expected = (
        largest ** (1 / 5) + steps * (0.01 ** (1 / 5) - largest ** (1 / 5))
    ) ** 5  # Eq. 5 of the paper
    inner = np.asarray(times[1:-1])
    np.testing.assert_allclose(case[3](inner) / case[2](inner), expected[1:], rtol=1e-7)


def test_long_grids_are_valid_in_single_precision(case):
    for times in (log_snr_times(case[0](), 500), karras_times(case[0](), 200), uniform_times(1000)):
        assert times.dtype == jnp.float32
        check_times(times)


def test_uniform_times():
    np.testing.assert_allclose(uniform_times(4), [1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-6)


def test_check_times_returns_a_good_grid():
    grid = [1.0, 0.5, 0.0]
    assert np.array_equal(check_times(grid), grid)
    assert jax.jit(check_times)(jnp.asarray(grid)).shape == (3,)


@pytest.mark.parametrize(
    "times",
    [
        [[1.0, 0.0]],
        [1.0],
        1.0,
        [],
        [0.9, 0.5, 0.0],
        [1.0, 0.5, 0.1],
        [1.0, 0.5, 0.5, 0.0],
        [1.0, 0.4, 0.5, 0.0],
        [0.0, 0.5, 1.0],
        [1.0, np.nan, 0.0],
        [1.0, -0.1, 0.0],
    ],
)
def test_bad_grids_raise(times):
    with pytest.raises(ValueError, match=r"^times must"):
        check_times(times)


def test_the_shape_is_checked_inside_compiled_code():
    with pytest.raises(ValueError, match=r"^times must be one-dimensional"):
        jax.jit(check_times)(jnp.ones((2, 2)))


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: vp(0.0, 20.0), "beta_min"),
        (lambda: vp(2.0, 1.0), "beta_max"),
        (lambda: vp(0.1, np.inf), "beta_max"),
        (lambda: vp(np.nan, 1.0), "beta_min"),
        (lambda: cosine(0.0), "log_snr_min"),
        (lambda: cosine(-np.inf), "log_snr_min"),
        (lambda: ve(0.0, 1.0), "sigma_min"),
        (lambda: ve(2.0, 2.0), "sigma_max"),
        (lambda: edm(0.0), "sigma_max"),
        (lambda: edm(-1.0), "sigma_max"),
        (lambda: ou(0.0), "horizon"),
        (lambda: ou(np.inf), "horizon"),
        (lambda: log_snr_times(vp(), 1), "num_steps"),
        (lambda: log_snr_times(vp(), 10.0), "num_steps"),
        (lambda: log_snr_times(vp(), 10, log_snr_max=-7.0), "log_snr_max"),
        (lambda: karras_times(vp(), True), "num_steps"),
        (lambda: karras_times(edm(), 10, sigma_min=0.0), "sigma_min"),
        (lambda: karras_times(edm(), 10, sigma_min=2.0, sigma_max=1.0), "sigma_min"),
        (lambda: karras_times(edm(sigma_max=0.5), 10, sigma_min=0.6), "sigma_max"),
        (lambda: karras_times(edm(), 10, rho=0.0), "rho"),
        (lambda: uniform_times(0), "num_steps"),
    ],
)
def test_errors_name_the_argument(call, argument):
    with pytest.raises(ValueError, match=argument) as error:
        call()
    assert "zero" not in str(error.value)  # no name of the implementation's own
