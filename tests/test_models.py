"""The models that ship with smcdiff, all of them through the same checks, and reading and writing model folders."""

import hashlib
import json
import shutil
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcdiff import checkpoints, schedules
from smcdiff.checkpoints import cards
from smcdiff.checkpoints.arrays import load_arrays, save_arrays
from smcdiff.diffusion import Diffusion
from smcdiff.nets import denoising_loss

CARDS = checkpoints.models()


@pytest.fixture(params=sorted(CARDS), scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return checkpoints.load(name)


def test_models_are_there():
    assert {"digits", "mnist"} <= set(CARDS)


def test_folder_and_card_are_complete(name, model):
    card, folder = CARDS[name], cards._folder(name)
    for file in ("weights.safetensors", "heldout.npz", "samples.png", "README.md"):
        assert (folder / file).is_file()
    weights = (folder / "weights.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == card["sha256"] and len(weights) < 10e6
    leaves = jax.tree.leaves(model.params)
    assert sum(leaf.size for leaf in leaves) == card["num_parameters"]
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    assert card["name"] == name and card["data"]["source"] and card["data"]["licence"]
    assert card["training"]["command"].startswith("python models/train.py")
    page = (folder / "README.md").read_text()
    assert card["sha256"] in page and card["training"]["command"] in page


def test_held_out_images_are_images_of_every_class(name):
    images, labels = checkpoints.held_out(name)
    card = CARDS[name]
    assert images.dtype == np.float32 and images.shape == (
        card["held_out"]["num_shipped"],
        *card["event_shape"],
    )
    assert images.min() == 0 and images.max() == 1
    assert np.bincount(labels, minlength=10).min() >= 3
    # The preconditioning is scaled by the data's rms: the held-out images have the same, within sampling error.
    squares = np.mean(np.square(images), axis=(1, 2))
    assert abs(squares.mean() - card["sigma_data"] ** 2) < 4 * squares.std() / np.sqrt(len(squares))


def test_denoising_loss_is_that_of_the_card(name, model):
    card = CARDS[name]["denoising_loss"]
    images, _ = checkpoints.held_out(name)
    mse, error = denoising_loss(model, images, card["log_snr"], jax.random.key(card["seed"]))
    # The same images and the same noise give the same figure, up to the rounding of another machine...
    np.testing.assert_allclose(mse, card["mse_shipped"], rtol=5e-3)
    # ... and they are a sample of all held-out images: 4 standard errors at 11 correlated levels fail by chance in
    # less than 0.1% of all choices of the shipped images.
    assert np.all(np.abs(mse - card["mse"]) < 4 * np.hypot(error, card["standard_error"]))


def test_denoiser_beats_what_needs_no_network(name, model):
    card = CARDS[name]
    images, _ = checkpoints.held_out(name)
    flat = images.reshape(len(images), -1).astype(np.float64)
    levels = card["denoising_loss"]["log_snr"]
    mse, _ = denoising_loss(model, images, levels, jax.random.key(7))
    variances = flat.var(0)
    for log_snr, value in zip(levels, mse, strict=True):
        s2 = np.exp(-2 * log_snr)
        # Pixel by pixel, the best linear denoiser under the held-out images' own means and variances, and no denoiser.
        wiener = np.mean(variances * s2 / (variances + s2))
        assert value < s2
        # Much noise leaves nothing to see: as good as linear, within 5%. Measured: 0.7 and below, 0.84, 1.02 times it.
        assert value < wiener * (0.75 if s2 < 0.5 else 0.95 if s2 < 2 else 1.05)


def test_the_denoised_image_does_not_depend_on_the_schedule(name, model):
    images, _ = checkpoints.held_out(name)
    noise = np.asarray(jax.random.normal(jax.random.key(1), images[:4].shape))
    others = [schedules.ve(), schedules.cosine()]
    denoise = eqx.filter_jit(lambda model, x, t: jax.vmap(model.denoise, (0, None))(x, t))
    for log_snr in (4.0, 1.0, -2.0):
        results = []
        for schedule in (model.schedule, *others):
            moved = eqx.tree_at(lambda m: m.schedule, model, schedule)
            t = schedule.time_from_log_snr(jnp.float32(log_snr))
            x = schedule.alpha(t) * images[:4] + schedule.sigma(t) * noise
            results.append(denoise(moved, x, t))
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], atol=2e-4)


@pytest.mark.slow
def test_gradients_through_the_model_are_finite_at_every_level(name, model):
    images, _ = checkpoints.held_out(name)
    gradient = eqx.filter_jit(
        lambda model, x, t: jax.grad(lambda x: jnp.sum(jnp.square(model.denoise(x, t))))(x)
    )
    for log_snr in (6.0, 0.0, -5.0):
        t = model.schedule.time_from_log_snr(jnp.float32(log_snr))
        x = model.schedule.alpha(t) * jnp.asarray(images[0]) + model.schedule.sigma(t)
        assert np.isfinite(gradient(model, x, t)).all()


def small_card(event_shape=(3,), **network):
    return {
        "name": "small",
        "event_shape": list(event_shape),
        "schedule": {"name": "cosine", "arguments": {"log_snr_min": -7.0}},
        "prediction": "edm",
        "sigma_data": 0.7,
        "network": {"class": "MLP", "arguments": {"width": 8, "blocks": 1, **network}},
    }


@pytest.fixture
def folder(tmp_path):
    model = checkpoints.build_model(small_card(), jax.random.key(3))
    checkpoints.save_model(tmp_path / "small", model, small_card())
    return tmp_path / "small"


def test_save_and_load_give_the_model_back(folder):
    model = checkpoints.build_model(small_card(), jax.random.key(3))
    loaded = checkpoints.load(folder)
    assert isinstance(loaded, Diffusion) and eqx.tree_equal(model, loaded)
    assert eqx.tree_equal(checkpoints.load(str(folder)), loaded)


def test_other_weights_of_the_same_shape_do_not_compile_again(folder, tmp_path):
    other = checkpoints.build_model(small_card(), jax.random.key(4))
    checkpoints.save_model(tmp_path / "other", other, small_card())
    traces = 0

    @jax.jit
    def denoise(model, x, t):
        nonlocal traces
        traces += 1
        return model.denoise(x, t)

    for path in (folder, tmp_path / "other"):
        denoise(checkpoints.load(path), jnp.ones(3), jnp.float32(0.5))
    assert traces == 1


def test_unknown_name_lists_the_models(tmp_path):
    with pytest.raises(ValueError, match=r"'mnistt'.*digits, mnist"):
        checkpoints.load("mnistt")
    with pytest.raises(FileNotFoundError, match="holds no card"):
        checkpoints.load(tmp_path)


def test_damaged_weights_are_refused(folder):
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256.*Copy the model folder again"):
        checkpoints.load(folder)


@pytest.mark.parametrize("file", ["weights.safetensors", "heldout.npz"])
def test_missing_file_is_named(name, tmp_path, file):
    copy = tmp_path / "copy"
    shutil.copytree(cards._folder(name), copy)
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {file}"):
        (checkpoints.load if file.startswith("weights") else checkpoints.held_out)(copy)


def test_a_card_that_does_not_fit_is_refused(folder):
    model = checkpoints.load(folder)
    with pytest.raises(ValueError, match="not the model's"):
        checkpoints.save_model(folder.with_name("new"), model, small_card(width=9))
    card = json.loads((folder / "card.json").read_text())
    for change, message in (
        ({"network": small_card(width=9)["network"]}, "the tree needs"),
        ({"network": small_card(blocks=2)["network"]}, "other hyper-parameters"),
        ({"network": {"class": "Transformer", "arguments": {}}}, "knows MLP, UNet"),
        ({"schedule": {"name": "linear", "arguments": {}}}, "this version knows cosine"),
    ):
        (folder / "card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(ValueError, match=message):
            checkpoints.load(folder)


class Pair(NamedTuple):
    """A tree with named fields."""

    left: jax.Array
    right: dict


def test_any_tree_of_arrays_can_be_saved(tmp_path):
    tree = Pair(
        jnp.arange(6).reshape(2, 3),
        {"a": [jnp.float32(2.5), jnp.zeros((0, 2))], "b": jnp.array([True, False])},
    )
    save_arrays(tmp_path / "sub" / "tree.safetensors", tree, {"note": [1, 2]})
    back, extra = load_arrays(tmp_path / "sub" / "tree.safetensors", tree)
    assert eqx.tree_equal(tree, back) and extra == {"note": [1, 2]}
    shapes = jax.eval_shape(lambda: tree)
    assert eqx.tree_equal(tree, load_arrays(tmp_path / "sub" / "tree.safetensors", shapes)[0])
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["tree.safetensors"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_arrays(tmp_path / "none", tree)
    with pytest.raises(ValueError, match="same dotted name"):
        save_arrays(tmp_path / "x", {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
