"""The algebra of density paths: scores and log densities of what it makes, and what it refuses."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import smcdiff
from smcdiff import compose, schedules
from smcdiff.compose.tails import least_tail
from smcdiff.compose.weighted import ComposedScore
from smcdiff.density import DiffusionModel, HasLogDensity, warn_unless_diffusion

SCHEDULE = schedules.cosine()
X, T = np.array([0.7, -1.2], np.float32), np.float32(0.3)
NARROW = np.array([[0.3, 0.1], [0.1, 0.2]])
WIDE = np.array([[0.8, -0.2], [-0.2, 0.6]])


@functools.cache
def models(schedule=SCHEDULE):
    """Three mixtures of two dimensions."""
    create = smcdiff.GaussianMixtureDiffusion.create
    return (
        create([0.5, 0.2, 0.3], [[2.0, 0.5], [-1.5, 1.0], [0.0, -2.0]], NARROW, schedule),
        create([0.25, 0.75], [[1.4, -0.4], [-1.0, 1.8]], WIDE, schedule),
        create([1.0], [[0.3, 0.4]], 1.7, schedule),
    )


def reward(slope, x, t):
    return (1.0 - t) * slope @ x


TILT = Partial(reward, jnp.asarray([0.6, -0.9]))


def moving(t):
    """An exponent that is a plain function."""
    return 0.2 + 0.5 * t


# name: (path, exponents of the three models at time T, how often the reward counts)
CASES = {
    "product": (lambda a, b, c: compose.product(a, b, c), (1, 1, 1), 0),
    "temper": (lambda a, b, c: compose.temper(a, 0.4), (0.4, 0, 0), 0),
    "operators": (lambda a, b, c: (a * b**1.5) ** 2.0 * c**moving, (2.0, 3.0, 0.35), 0),
    "geometric average": (lambda a, b, c: compose.geometric_average(a, b, 0.3), (0.7, 0.3, 0), 0),
    "guide": (lambda a, b, c: compose.guide(a, b, 1.5), (1.5, -0.5, 0), 0),
    "contrast": (lambda a, b, c: compose.contrast(a, c, 0.6), (1, 0, -0.6), 0),
    "condition": (lambda a, b, c: compose.condition(a, TILT), (1, 0, 0), 1),
    "moving": (lambda a, b, c: compose.geometric_average(a, b, moving), (0.65, 0.35, 0), 0),
    "nested": (
        lambda a, b, c: compose.product(
            compose.temper(compose.condition(compose.guide(a, b, 1.5), TILT), 2.0), compose.temper(c, moving)
        ),
        (3, -1, 0.35),
        2,
    ),
    "moving twice": (
        lambda a, b, c: compose.temper(compose.contrast(a, b, moving), moving),
        (0.35, -0.1225, 0),
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_score_and_log_density_are_weighted_sums(name):
    path, exponents, tilts = CASES[name][0](*models()), *CASES[name][1:]
    densities = [model.at(T) for model in models()]
    expected = sum(w * float(each.logdensity(X)) for w, each in zip(exponents, densities, strict=True))
    slope = np.array([0.6, -0.9]) * tilts * (1 - T)
    np.testing.assert_allclose(path.at(T).logdensity(X), expected + slope @ X, rtol=1e-5)
    score = sum(w * np.asarray(each.score(X)) for w, each in zip(exponents, densities, strict=True)) + slope
    np.testing.assert_allclose(path.score(X, T), score, rtol=1e-4)
    np.testing.assert_allclose(path.at(T).score(X), score, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(path.at(T).logdensity)(jnp.asarray(X)), score, rtol=1e-4)
    assert all(not isinstance(part, compose.Composition) for part in path.parts)
    assert path.event_shape == (2,) and path.schedule is SCHEDULE


@pytest.mark.parametrize("name", ["nested", "condition", "moving"])
def test_compositions_are_arguments_of_compiled_code(name):
    path = CASES[name][0](*models())
    assert all(eqx.is_array_like(leaf) for leaf in jax.tree.leaves(path))
    compiled = jax.jit(lambda path, x, t: path.score(x, t))(path, X, T)
    np.testing.assert_allclose(compiled, path.score(X, T), rtol=1e-5)


def test_a_composition_without_densities_has_none():
    a, b, _ = models()
    network = smcdiff.Diffusion(None, lambda params, x, t: -x, SCHEDULE, "score", (2,))
    path = compose.product(a, network)
    assert not isinstance(path.at(T), HasLogDensity)
    assert isinstance(compose.product(a, b).at(T), HasLogDensity)
    np.testing.assert_allclose(path.score(X, T), np.asarray(a.score(X, T)) - X, rtol=1e-4)


def test_compositions_say_that_they_are_no_diffusions():
    a, b, _ = models()
    path = compose.product(a, b)
    assert path.is_diffusion is False and isinstance(path, DiffusionModel)
    x0 = (X + np.asarray(SCHEDULE.sigma(T)) ** 2 * path.score(X, T)) / np.asarray(SCHEDULE.alpha(T))
    np.testing.assert_allclose(path.denoise(X, T), x0, rtol=1e-5)
    with pytest.warns(
        UserWarning, match="reverse_sample follows the reverse process of a diffusion, but this Comp"
    ):
        warn_unless_diffusion(path, "reverse_sample")
    warn_unless_diffusion(a, "reverse_sample")
    warn_unless_diffusion(compose.mixture(a, b), "reverse_sample")


def test_a_mixture_is_the_mixture_of_the_parts():
    a, b, _ = models()
    path = compose.mixture(a, b, weights=[3.0, 1.0])
    # The same law as one mixture of five components.
    one = smcdiff.GaussianMixtureDiffusion.create(
        np.concatenate([0.75 * np.array([0.5, 0.2, 0.3]), 0.25 * np.array([0.25, 0.75])]),
        np.concatenate([model.mixture.component_means() for model in (a, b)]),
        np.stack([NARROW] * 3 + [WIDE] * 2),
        SCHEDULE,
    )
    np.testing.assert_allclose(path.at(T).logdensity(X), one.at(T).logdensity(X), rtol=1e-5)
    np.testing.assert_allclose(path.score(X, T), one.score(X, T), rtol=1e-4)
    np.testing.assert_allclose(path.at(T).score(X), one.score(X, T), rtol=1e-4)
    np.testing.assert_allclose(path.denoise(X, T), one.denoise(X, T), rtol=1e-4)
    assert path.is_diffusion and path.event_shape == (2,)


def test_mixtures_refuse_what_has_no_normalised_density():
    a, b, _ = models()
    network = smcdiff.Diffusion(None, lambda params, x, t: -x, SCHEDULE, "score", (2,))
    with pytest.raises(TypeError, match="mixture needs a target with the capability HasLogDensity"):
        compose.mixture(a, network)
    with pytest.raises(ValueError, match="a composition has unknown constants"):
        compose.mixture(a, compose.product(a, b))
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(
            ValueError, match=r"weights must be non-negative, not all zero and of shape \(2,\)"
        ):
            compose.mixture(a, b, weights=weights)


def test_every_kind_of_path_has_the_operators():
    a, b, c = models()
    data = smcdiff.EmpiricalDiffusion(jnp.asarray(NARROW, jnp.float32), 0.3, SCHEDULE)
    network = smcdiff.Diffusion(None, lambda params, x, t: -x, SCHEDULE, "score", (2,))
    for path in (
        b,
        data,
        network,
        compose.mixture(a, c, weights=np.array([0.4, 0.6])),
        compose.temper(b, 0.4),
    ):
        expected = np.asarray(a.score(X, T)) + 0.7 * np.asarray(path.score(X, T))
        np.testing.assert_allclose((a * path**0.7).score(X, T), expected, rtol=1e-4)
        np.testing.assert_allclose((path**0.7 * a).score(X, T), expected, rtol=1e-4)
    with pytest.raises(TypeError, match="unsupported operand"):
        a * 2.0
    with pytest.raises(ValueError, match="temper: the exponents must be finite with a positive sum"):
        a**-1.0


def test_parts_must_fit_together():
    a, *_ = models()
    flat = smcdiff.GaussianDiffusion(np.zeros(3), 1.0, SCHEDULE)
    with pytest.raises(
        ValueError, match=r"the parts of product must have one event shape, got \[\(2,\), \(3,\)\]"
    ):
        compose.product(a, flat)
    for other in (schedules.cosine(-7.0), schedules.vp()):
        with pytest.raises(ValueError, match="the parts of guide must share one schedule"):
            compose.guide(a, models(other)[1], 1.5)
    assert compose.product(a, models(schedules.cosine())[1]).event_shape == (2,)
    with pytest.raises(TypeError, match="product needs a target with the capability ScheduledPath, got str"):
        compose.product(a, "b")
    with pytest.raises(ValueError, match="product needs at least one path"):
        compose.product()
    with pytest.raises(TypeError, match=r"reward must be a function of \(x, t\), got float"):
        compose.condition(a, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b, c: compose.temper(a, 0.0),
        lambda a, b, c: compose.temper(a, -1.0),
        lambda a, b, c: compose.temper(a, float("nan")),
        lambda a, b, c: compose.contrast(a, c, 1.0),
        lambda a, b, c: compose.temper(a, lambda t: 0.95 - t),
    ],
)
def test_exponents_without_a_positive_sum_are_refused(make):
    with pytest.raises(ValueError, match="the exponents must be finite with a positive sum"):
        make(*models())


def test_guidance_by_a_narrower_model_is_refused():
    a, b, c = models()
    # q(u) = (w u.P_b.u - (w - 1) u.P_a.u), smallest eigenvalue by hand.
    for scale in (1.1, 1.2, 2.5):
        least = np.linalg.eigvalsh(scale * np.linalg.inv(WIDE) - (scale - 1) * np.linalg.inv(NARROW)).min()
        assert (least > 0) == (scale == 1.1)
        if least > 0:
            compose.guide(b, a, scale)
        else:
            with pytest.raises(ValueError, match=r"no finite integral.* too narrow"):
                compose.guide(b, a, scale)
    compose.guide(a, b, 2.5)
    # Isotropic: strength / 1.7 against 1 / 0.8; and a moving exponent counts with its value at t = 0.
    compose.contrast(c, smcdiff.GaussianDiffusion(np.zeros(2), 0.8, SCHEDULE), 0.45)
    with pytest.raises(ValueError, match="no finite integral"):
        compose.contrast(c, smcdiff.GaussianDiffusion(np.zeros(2), 0.8, SCHEDULE), 0.5)
    with pytest.raises(ValueError, match="no finite integral"):
        compose.contrast(c, smcdiff.GaussianDiffusion(np.zeros(2), 0.8, SCHEDULE), lambda t: 0.5 - 0.4 * t)


def test_tails_of_mixtures_with_several_widths():
    """Axis-parallel covariances: along each axis the widest component of each mixture sets the tail."""
    create = smcdiff.GaussianMixture.create
    a = create([0.5, 0.5], np.zeros((2, 2)), np.stack([np.diag([1.0, 4.0]), np.diag([2.0, 0.5])]))
    b = create([0.3, 0.7], np.ones((2, 2)), np.stack([np.diag([3.0, 1.0]), np.diag([0.5, 2.0])]))
    expected = min(1.4 / 2.0 - 0.4 / 3.0, 1.4 / 4.0 - 0.4 / 2.0)
    np.testing.assert_allclose(least_tail([a, b], np.array([1.4, -0.4])), expected, rtol=1e-5)
    assert least_tail([a, object()], np.array([1.0, -9.0])) == np.inf


def test_log_ratios_from_densities_and_from_scores_agree():
    """Four Gauss-Legendre nodes along a short line: an error of some 1e-5."""
    first = smcdiff.GaussianMixtureDiffusion.create(
        [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.2]], 0.5, schedules.cosine()
    )
    density = compose.guide(first, first**0.5, 1.5).at(jnp.asarray(0.4))
    x, y = jnp.asarray([0.2, -0.1]), jnp.asarray([-0.3, 0.3])
    from_scores = ComposedScore(density.path, density.t).log_ratio(x, y)
    np.testing.assert_allclose(
        density.log_ratio(x, y), density.logdensity(y) - density.logdensity(x), rtol=1e-5
    )
    np.testing.assert_allclose(from_scores, density.log_ratio(x, y), atol=1e-3)
    assert abs(float(density.log_ratio(x, y))) > 0.05
