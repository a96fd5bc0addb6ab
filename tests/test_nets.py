"""Networks and the training loop: protocol, derivatives, resuming, and learning a posterior mean that is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcdiff import schedules
from smcdiff.analytic import GaussianMixtureDiffusion
from smcdiff.diffusion import Diffusion
from smcdiff.nets import MLP, NoiseLevels, UNet, apply_network, denoising_loss, layers, train, training

NETWORKS = {
    "unet": lambda key: UNet(key, event_shape=(8, 8), channels=(8, 16), blocks=(1, 1)),
    "unet-colour-patch": lambda key: UNet(
        key, event_shape=(3, 16, 8), channels=(8, 8, 16), blocks=(1, 0, 1), patch=2
    ),
    "unet-no-attention": lambda key: UNet(
        key, event_shape=(4, 6), channels=(8,), blocks=(1,), groups=4, attention=False
    ),
    "mlp": lambda key: MLP(key, event_shape=(3,), width=16),
    "mlp-scalar": lambda key: MLP(key, event_shape=(), width=16, blocks=1),
}
TRACES = []


@jax.jit
def call(net, x, noise):
    """The network, compiled, with a record of each compilation."""
    TRACES.append(net.event_shape)
    return apply_network(net, x, noise)


def shaken(net, seed=5):
    """A network of the same shape with no zero among its weights, so that every path through it counts."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        scale = np.sqrt(1 / max(1, np.prod(leaf.shape[:-1])))
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(fill, net)


@pytest.fixture(params=NETWORKS, scope="module")
def net(request):
    # Only the shapes are needed: drawing the initial weights would be one small compilation for each of them.
    return shaken(eqx.filter_eval_shape(NETWORKS[request.param], jax.random.key(0)))


def test_a_network_is_a_tree_of_float32_arrays(net):
    leaves = jax.tree.leaves(net)
    assert leaves and all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    assert not any(leaf.weak_type for leaf in leaves)


def test_a_network_keeps_the_shape_and_the_batch_is_outside(net):
    x = jax.random.normal(jax.random.key(1), (3, *net.event_shape))
    noise = jnp.array([-1.5, 0.0, 1.2])
    batch = jax.jit(jax.vmap(apply_network, (None, 0, 0)))(net, x, noise)
    assert batch.shape == x.shape and batch.dtype == x.dtype
    for i in range(3):
        np.testing.assert_allclose(call(net, x[i], noise[i]), batch[i], rtol=2e-4, atol=2e-5)
    # The conditioning reaches the output.
    assert np.abs(call(net, x[0], noise[0]) - call(net, x[0], noise[1])).max() > 1e-4


def test_new_weights_do_not_compile_again(net):
    x, noise = jnp.ones(net.event_shape), jnp.float32(0.3)
    first, traces = call(net, x, noise), len(TRACES)
    assert np.abs(call(shaken(net, 6), x, noise) - first).max() > 0
    assert len(TRACES) == traces


@pytest.mark.parametrize("name", ["unet-no-attention", "mlp"])
def test_a_new_network_predicts_zero(name):
    net = jax.jit(NETWORKS[name])(jax.random.key(0))
    np.testing.assert_array_equal(
        call(net, jnp.ones(net.event_shape), jnp.float32(0.3)), np.zeros(net.event_shape)
    )


@jax.jit
def derivatives(net, x, u, v):
    """Forward and reverse derivatives, and central differences."""
    function = lambda x: net(x, jnp.float32(0.2))  # noqa: E731
    forward = jax.jvp(function, (x,), (u,))[1]
    step = jnp.float32(1e-2)
    return (
        forward,
        jax.vjp(function, x)[1](v)[0],
        (function(x + step * u) - function(x - step * u)) / (2 * step),
    )


def test_forward_and_reverse_derivatives_agree(net):
    x, u, v = jax.random.normal(jax.random.key(2), (3, *net.event_shape))
    forward, backward, difference = map(np.asarray, derivatives(net, x, u, v))
    np.testing.assert_allclose(np.vdot(v, forward), np.vdot(u, backward), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(forward, difference, atol=2e-2 * np.abs(forward).max())


def test_convolution_against_its_definition():
    key_x, key_w = jax.random.split(jax.random.key(3))
    x, weight = jax.random.normal(key_x, (5, 6, 2)), jax.random.normal(key_w, (3, 3, 2, 4))
    padded = np.pad(np.asarray(x), ((1, 1), (1, 1), (0, 0)))
    expected = np.zeros((5, 6, 4))
    for i in range(5):
        for j in range(6):
            expected[i, j] = np.einsum("abc,abcd->d", padded[i : i + 3, j : j + 3], np.asarray(weight))
    for conv in (layers._conv_fast, layers._conv_by_products):
        np.testing.assert_allclose(jax.jit(conv)(x, weight), expected, rtol=1e-4, atol=1e-5)


def test_derivatives_of_the_convolution():
    key_x, key_w, key_u = jax.random.split(jax.random.key(4), 3)
    x, weight = jax.random.normal(key_x, (5, 6, 2)), jax.random.normal(key_w, (3, 3, 2, 4))
    readout = jax.random.normal(key_u, (5, 6, 4))

    def first_and_second(conv, x, weight):
        gradient = jax.grad(lambda x, w: jnp.sum(readout * jnp.tanh(conv(x, w))), (0, 1))
        second = jax.grad(lambda x, w: jnp.sum(jnp.square(gradient(x, w)[0])), (0, 1))
        return gradient(x, weight), second(x, weight)

    results = [
        jax.jit(first_and_second, static_argnums=0)(conv, x, weight)
        for conv in (layers._conv_fast, layers._conv)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)


def test_group_norm_normalises_its_groups():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(5), (6, 7, 8))
    y = np.asarray(eqx.filter_jit(layers.GroupNorm(8, 2))(x)).reshape(6, 7, 2, 4)
    np.testing.assert_allclose(y.mean((0, 1, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 3)), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_shape": (9, 8)}, "pad the images to a multiple of 2"),
        ({"event_shape": (8,)}, "is no image"),
        ({"event_shape": (8, 8), "blocks": (1, 1, 1)}, "one entry per level"),
        ({"event_shape": (8, 8), "channels": (6, 16)}, "choose a divisor"),
    ],
)
def test_wrong_sizes_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(jax.random.key(0), **{"channels": (8, 16), "blocks": (1, 1), **arguments})


def test_a_batch_passed_as_one_sample_is_refused(net):
    with pytest.raises(ValueError, match=r"use jax\.vmap"):
        net(jnp.ones((2, *net.event_shape)), jnp.float32(0.0))


def test_noise_levels_cover_their_range():
    levels = NoiseLevels()
    log_s = np.asarray(levels.sample(jax.random.key(0), jnp.float32(0.5), 4000))
    assert log_s.min() >= np.log(levels.lowest) - 1e-5 and log_s.max() <= np.log(levels.highest) + 1e-5
    middle = np.abs(log_s - np.log(0.5) - levels.centre) < levels.width
    # Within one deviation: 68% of the log-normal part, and the uniform part's share of the range. The tolerance is four
    # standard errors of a binomial share, 0.008; stratified levels do better.
    share = 2 * levels.width / np.log(levels.highest / levels.lowest)
    assert abs(middle.mean() - (0.6 * 0.6827 + 0.4 * share)) < 0.032


# Two points of unequal weight: the posterior mean is known, and no symmetry hides a sign.
POINTS, WEIGHTS = np.array([[-1.0, 0.3], [0.6, -0.2]], np.float32), np.array([0.25, 0.75], np.float32)


def two_point_problem(num=400):
    data = np.repeat(POINTS, (WEIGHTS * num).astype(int), axis=0)
    net = MLP(jax.random.key(0), event_shape=(2,), width=32, blocks=1)
    rms = float(np.sqrt(np.mean(np.square(data))))
    return data, Diffusion(net, apply_network, schedules.vp(), "edm", (2,), sigma_data=rms)


def test_training_finds_the_posterior_mean():
    data, model = two_point_problem()
    trained, history = train(
        jax.random.key(1), model, data, num_steps=1500, batch_size=128, learning_rate=5e-3, ema_decay=0.99,
        progress=False,
    )  # fmt: skip
    exact = GaussianMixtureDiffusion.create(WEIGHTS, POINTS, 1e-6, schedules.vp())

    @eqx.filter_jit
    def excess(model, level):
        """Mean squared distance to the posterior mean at one log-SNR, over the variance of the data."""
        t = model.schedule.time_from_log_snr(level)
        noise = jax.random.normal(jax.random.key(2), data.shape)
        x = model.schedule.alpha(t) * data + model.schedule.sigma(t) * noise
        right = jax.vmap(exact.denoise, (0, None))(x, t)
        return jnp.mean(jnp.square(jax.vmap(model.denoise, (0, None))(x, t) - right)) / jnp.mean(data.var(0))

    for level in jnp.array([2.0, 1.0, 0.0, -1.0]):
        # Nothing random is left to chance here: the key is fixed. Measured: at most 0.0033.
        assert excess(trained, level) < 0.02
        assert excess(trained, level) < 0.1 * excess(model, level)
    assert history["step"] == [1000, 1500] and history["loss"][-1] < history["loss"][0]


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    data, model = two_point_problem(40)
    arguments = {
        "num_steps": 30,
        "batch_size": 8,
        "evaluate_every": 10,
        "held_out": data[:6],
        "progress": False,
    }
    whole, history = train(jax.random.key(3), model, data, **arguments)

    class Stop(Exception):
        pass

    calls, original = 0, training._step

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls > 25:
            raise Stop
        return original(*args)

    path = tmp_path / "run.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        with pytest.raises(Stop):
            train(jax.random.key(3), model, data, checkpoint=path, **arguments)
    resumed, history_resumed = train(jax.random.key(3), model, data, checkpoint=path, **arguments)
    assert eqx.tree_equal(whole, resumed)
    assert history["held_out"] == history_resumed["held_out"] and history["loss"] == history_resumed["loss"]


def test_training_does_not_touch_the_model_it_was_given():
    data, model = two_point_problem(40)
    before = jax.tree.map(np.asarray, model.params)
    train(jax.random.key(3), model, data, num_steps=2, batch_size=4, progress=False)
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


def test_training_refuses_data_of_another_shape():
    data, model = two_point_problem(40)
    with pytest.raises(ValueError, match=r"pass an array \(N, \*event_shape\)"):
        train(jax.random.key(0), model, data[:, :1], num_steps=1, progress=False)


def test_denoising_loss_does_not_depend_on_the_batch_size():
    data, model = two_point_problem(40)
    model = eqx.tree_at(lambda m: m.params, model, shaken(model.params))
    whole = denoising_loss(model, data, [1.0, -1.0], jax.random.key(0), batch_size=40)
    parts = denoising_loss(model, data, [1.0, -1.0], jax.random.key(0), batch_size=7)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
