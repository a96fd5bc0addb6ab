"""Non-centred models: the density, its gradient, and what handlers see. Their posteriors are rows of test_ppl_infer."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from ppl_models import A, Y, copies, counts, gaussian, gaussian_1d, linear
from scipy import stats

import smcdiff
from smcdiff import guidance, inverse, schedules
from smcdiff.guidance.moments import positive_part
from smcdiff.ppl import DiffusionPrior, noncenter

pytestmark = pytest.mark.lenient_promotion  # of NumPyro's densities

NUM_STEPS = 12
TIMES = smcdiff.log_snr_times(schedules.cosine(), NUM_STEPS)
NOISE = jax.random.normal(jax.random.key(0), (NUM_STEPS, 2))


def twisted(gain=1.0, noise=0.5, order=1):
    problem = inverse.InverseProblem(inverse.dense(gain * A, (2,)), jnp.asarray(Y), noise)
    return smcdiff.tds(gaussian(), problem, times=TIMES, twist=guidance.moment_matching(), order=order)


@pytest.mark.parametrize("order", [1, 2])
def test_a_driven_path_is_that_of_the_steps(order):
    fk, keys = twisted(order=order), jax.random.split(jax.random.key(3), NUM_STEPS + 1)

    @jax.jit
    def by_steps(fk):
        particle, log_weight = fk.init(keys[0])
        for k in range(NUM_STEPS):
            particle, increment = fk.step(keys[k + 1], particle, k)
            log_weight += increment
        return particle.x, log_weight

    noise = jnp.stack([jax.random.normal(key, (2,)) for key in keys[:-1]])
    assert noise.shape == fk.innovations.shape
    particle, log_weight = jax.jit(fk.innovations.drive)(noise)
    x, expected = by_steps(fk)
    np.testing.assert_allclose(particle.x, x, atol=1e-5)
    np.testing.assert_allclose(log_weight, expected, atol=1e-4)


@pytest.mark.parametrize(("gain", "noise"), [(1.0, 0.5), (1.3, 0.8)])
def test_the_density_is_prior_times_noise_times_weight(gain, noise):
    model = noncenter(linear, num_steps=NUM_STEPS, twist=guidance.moment_matching())
    values = {"gain": jnp.asarray(gain), "noise": jnp.asarray(noise), "x_noise": NOISE}
    found, trace = log_density(model, (gaussian(), A, Y), {}, values)
    particle, log_weight = twisted(gain, noise).innovations.drive(NOISE)
    prior = stats.norm(1, 0.3).logpdf(gain) + stats.lognorm(0.4, scale=np.exp(-0.5)).logpdf(noise)
    prior += stats.norm().logpdf(np.asarray(NOISE)).sum()
    np.testing.assert_allclose(found, prior + float(log_weight), atol=1e-3)
    np.testing.assert_allclose(trace["x"]["value"], particle.x, atol=1e-5)
    np.testing.assert_allclose(trace["signal"]["value"], gain * A @ np.asarray(particle.x), atol=1e-4)
    latent = [n for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]
    assert set(latent) == set(values) and "y" not in trace


def test_sites_of_handlers_outside_are_left_to_them():
    """NumPyro adds the log determinant of a transform as a site, while the model runs."""
    model = noncenter(linear, num_steps=3)

    def transformed(site):
        if site["name"] == "noise" and site["type"] == "sample":
            numpyro.factor("_noise_log_det", jnp.asarray(0.7))
            return jnp.asarray(0.5)
        return None

    with handlers.trace() as trace, handlers.seed(rng_seed=0):
        handlers.substitute(model, substitute_fn=transformed)(gaussian(), A, Y)
    seen = [name for name, site in trace.items() if site["type"] == "sample"]
    assert "_noise_log_det" in seen and trace["noise"]["value"] == 0.5


PROBLEMS = {
    "linear": (linear, (gaussian(), A, Y), {"gain": 1.1, "noise": 0.6}, (2,)),
    "equal eigenvalues": (copies, (gaussian(), np.stack([Y, Y])), {}, (2, 2)),
    "counts": (counts, (gaussian_1d(), np.array([2.0, 0.0]), np.array([0.4])), {"shift": 0.3}, (1,)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_the_density(name):
    """Along one direction through all latent values, by central differences in single precision."""
    model, args, parameters, shape = PROBLEMS[name]
    model = noncenter(model, num_steps=4, twist=guidance.moment_matching())
    keys = jax.random.split(jax.random.key(1))
    point = {k: jnp.asarray(v) for k, v in parameters.items()} | {
        "x_noise": jax.random.normal(keys[0], (4, *shape))
    }
    along = jax.tree.map(lambda leaf: jax.random.normal(keys[1], leaf.shape), point)

    @jax.jit
    def value(h):
        moved = jax.tree.map(lambda a, b: a + h * b, point, along)
        return log_density(model, args, {}, moved)[0]

    slope = float(jax.jit(jax.grad(value))(0.0))
    h = 1e-2
    numeric = float(value(h) - value(-h)) / (2 * h)
    assert abs(slope) > 0.5
    np.testing.assert_allclose(slope, numeric, rtol=0.02)


def test_the_derivative_of_the_positive_part():
    """Against differences, in double precision: at eigenvalues of both signs, and at equal ones."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    for values in ([2.0, 0.5, -0.3, -1.0], [1.5, 1.5, 1.5, -0.5], [0.7, 0.7, -0.2, -0.2]):
        matrix = (rotation * values) @ rotation.T + np.triu(np.ones((4, 4)), 1) - np.tril(np.ones((4, 4)), -1)
        tangent, h = rng.normal(size=(4, 4)), 1e-5
        with jax.enable_x64(True):
            above, below = (np.asarray(positive_part(jnp.asarray(matrix + e * tangent))) for e in (h, -h))
            _, found = jax.jvp(positive_part, (jnp.asarray(matrix),), (jnp.asarray(tangent),))
        np.testing.assert_allclose(found, (above - below) / (2 * h), atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="num_steps must be a positive integer"):
        noncenter(linear, num_steps=0)
    with pytest.raises(ValueError, match="order must be 1"):
        noncenter(linear, order=3)

    def two(diffusion):
        first = numpyro.sample("first", DiffusionPrior(diffusion))
        second = numpyro.sample("second", DiffusionPrior(diffusion))
        numpyro.sample("y", dist.Normal(first + second, 1.0).to_event(1), obs=jnp.zeros(2))

    def none():
        numpyro.sample("mu", dist.Normal(0.0, 1.0))

    for model, args, names in ((two, (gaussian(),), r"\['first', 'second'\]"), (none, (), r"\[\]")):
        with (
            handlers.seed(rng_seed=0),
            pytest.raises(ValueError, match=rf"one latent site with a DiffusionPrior, got {names}"),
        ):
            noncenter(model)(*args)
