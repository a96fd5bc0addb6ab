"""Models in folders: weights, a card that says how to rebuild and judge them, and held-out images.

A model folder holds

    card.json             everything needed to rebuild the model, and its measured quality
    weights.safetensors   the arrays of the network, float32
    heldout.npz           samples that the model was not trained on (images, labels, scale)

The card names the schedule and the network with their arguments, the rms of the data that the preconditioning uses
(T. Karras et al., arXiv 2206.00364), and the sha256 of the weights, which is checked before they are read.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from smcdiff import schedules
from smcdiff.checkpoints.arrays import flatten_by_name, load_arrays, save_arrays
from smcdiff.diffusion import Diffusion
from smcdiff.nets.layers import apply_network
from smcdiff.nets.mlp import MLP
from smcdiff.nets.unet import UNet

__all__ = ["build_model", "held_out", "load", "models", "save_model"]

NETWORKS: dict[str, Callable] = {"UNet": UNet, "MLP": MLP}
SCHEDULES: dict[str, Callable] = {
    name: getattr(schedules, name) for name in ("cosine", "edm", "ou", "rectified_flow", "ve", "vp")
}


def _roots() -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    return [root for root in (package / "_models", package.parent / "models") if root.is_dir()]


def models() -> dict[str, dict]:
    """Cards of the models that come with smcdiff.

    Returns
    -------
    Dictionary from a model's name to its card, the content of ``card.json``.
    """
    cards: dict[str, dict] = {}
    for root in _roots():
        for path in sorted(root.glob("*/card.json")):
            cards.setdefault(path.parent.name, json.loads(path.read_text()))
    return cards


def _folder(name_or_folder: str | Path) -> Path:
    # A bare name is a shipped model even if a folder of that name lies in the working directory.
    if isinstance(name_or_folder, str) and "/" not in name_or_folder:
        for root in _roots():
            if (root / name_or_folder / "card.json").is_file():
                return root / name_or_folder
    folder = Path(name_or_folder)
    if (folder / "card.json").is_file():
        return folder
    if folder.is_dir():
        raise FileNotFoundError(
            f"folder {folder} holds no card.json: write one with smcdiff.checkpoints.save_model."
        )
    known = ", ".join(sorted(models())) or "none"
    raise ValueError(
        f"no model named {str(name_or_folder)!r}: the models that come with smcdiff are {known}; "
        "for a model of your own pass its folder, which must hold card.json and weights.safetensors."
    )


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        present = ", ".join(sorted(item.name for item in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"model folder {folder} lacks {name} (it holds {present}): copy the whole folder again or rebuild it "
            "with the training command on its card."
        )
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _choose(table: dict[str, Callable], kind: str, name: str) -> Callable:
    if name not in table:
        raise ValueError(
            f"the card names the {kind} {name!r}; this version knows {', '.join(sorted(table))}."
        )
    return table[name]


def build_model(card: dict, rng_key: jax.Array) -> Diffusion:
    """A model as its card describes it, with random weights.

    Parameters
    ----------
    card
        Needs ``event_shape``, ``schedule`` {name, arguments}, ``network`` {class, arguments}, ``prediction``
        and ``sigma_data``.
    rng_key
        Key of the weights.

    Returns
    -------
    A `Diffusion` whose ``params`` is the network.

    Raises
    ------
    ValueError
        If the card names a schedule or a network that this version does not know.
    """
    event_shape = tuple(card["event_shape"])
    network, schedule = card["network"], card["schedule"]
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in network["arguments"].items()
    }
    net = _choose(NETWORKS, "network", network["class"])(rng_key, event_shape=event_shape, **arguments)
    path = _choose(SCHEDULES, "schedule", schedule["name"])(**schedule["arguments"])
    return Diffusion(net, apply_network, path, card["prediction"], event_shape, sigma_data=card["sigma_data"])


def load(name_or_folder: str | Path) -> Diffusion:
    """A pretrained model, by name or from a folder.

    Parameters
    ----------
    name_or_folder
        Name of a model that comes with smcdiff (see `models`), or a folder that `save_model` wrote.

    Returns
    -------
    A `Diffusion` ready to sample from and to condition.

    Raises
    ------
    ValueError
        If there is no such model, or the weights are not those of the card.
    FileNotFoundError
        If the folder lacks a file.
    """
    folder = _folder(name_or_folder)
    card = json.loads((folder / "card.json").read_text())
    path = _file(folder, "weights.safetensors")
    found = _sha256(path)
    if found != card["sha256"]:
        raise ValueError(
            f"{path.name} of model {folder.name!r} has sha256 {found[:16]}..., its card says {card['sha256'][:16]}...: "
            "the file is damaged or belongs to another card. Copy the model folder again."
        )
    # The structure is made without computing any weight: the random ones would be thrown away.
    like = eqx.filter_eval_shape(build_model, card, jax.random.key(0))
    params, _ = load_arrays(path, like.params)
    return eqx.tree_at(lambda model: model.params, like, params)


def save_model(folder: str | Path, model: Diffusion, card: dict[str, Any]) -> dict[str, Any]:
    """Write a model folder: weights and card.

    Parameters
    ----------
    folder
        Where to write; made if needed.
    model
        The model; the card must describe it, so that `build_model` gives a network of the same shape.
    card
        The card; the number of parameters and the sha256 of the weights are filled in.

    Returns
    -------
    The card as written.

    Raises
    ------
    ValueError
        If the card does not describe the model.
    """
    folder = Path(folder)
    like = eqx.filter_eval_shape(build_model, card, jax.random.key(0))
    described = {name: leaf.shape for name, leaf in flatten_by_name(like.params).items()}
    if described != {name: leaf.shape for name, leaf in flatten_by_name(model.params).items()}:
        raise ValueError(
            "the card's network is not the model's: `network` must hold its class and its arguments."
        )
    save_arrays(folder / "weights.safetensors", model.params)
    count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(model.params))
    card = {**card, "num_parameters": count, "sha256": _sha256(folder / "weights.safetensors")}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def held_out(name_or_folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Samples that a model has not been trained on.

    Parameters
    ----------
    name_or_folder
        As for `load`.

    Returns
    -------
    images
        float32 (N, *event_shape), in the pixel range of the card.
    labels
        Integers (N,).
    """
    with np.load(_file(_folder(name_or_folder), "heldout.npz")) as arrays:
        images = arrays["images"].astype(np.float32) / np.float32(arrays["scale"])
        return images, arrays["labels"].astype(np.int64)
