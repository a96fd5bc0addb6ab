"""Train a model on a data set and write its folder: weights, card, held-out images, pictures.

    python models/train.py data/digits.npz --out models/digits --channels 32 64 --blocks 1 1 --steps 4000

The commands of the shipped models are on their cards.  The data set is an .npz as `models/prepare_data.py` writes it:
``images`` (N, H, W) or (N, C, H, W), ``held_out_images``, ``held_out_labels``, ``scale``, and ``about`` with
description, source and licence as JSON.  Run with ``--checkpoint`` to be able to stop and resume; a finished
checkpoint goes straight to the writing of the folder.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import smcdiff.checkpoints as checkpoints
from smcdiff import schedules
from smcdiff.nets import NoiseLevels, denoising_loss, train
from smcdiff.reverse import reverse_sample

NUM_SHIPPED = 48
CARD_LOG_SNRS = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help=".npz file of models/prepare_data.py")
    parser.add_argument(
        "--out", type=Path, required=True, help="model folder to write; its name is the model's"
    )
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[32, 64], help="feature maps a level, finest first"
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 2], help="residual blocks a level")
    parser.add_argument("--patch", type=int, default=1, help="side of the patches that become channels")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="file to resume from and to write to")
    parser.add_argument("--note", default="", help="anything a reader of the card should know about this run")
    parser.add_argument("--evaluate-every", type=int, default=500)
    return parser.parse_args()


def choose_shipped(labels: np.ndarray, num: int = NUM_SHIPPED) -> np.ndarray:
    """Indices of a few images of every class, in the order of the classes."""
    by_class = np.argsort(labels, kind="stable")
    return by_class[(np.arange(min(num, len(labels))) * len(labels)) // min(num, len(labels))]


def save_pictures(path: Path, images: np.ndarray, columns: int = 16, enlarge: int = 2) -> None:
    """Write images (N, H, W) or (N, C, H, W) in [0, 1] as one picture."""
    if images.ndim == 4:
        images = images.transpose(0, 2, 3, 1)
        images = images[..., 0] if images.shape[-1] == 1 else images
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    canvas = np.full((rows * (height + 1), columns * (width + 1), *images.shape[3:]), 0.5)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image
    pixels = np.rint(255 * np.clip(canvas, 0, 1)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.resize((enlarge * picture.width, enlarge * picture.height), Image.Resampling.NEAREST).save(path)


def measure(model: Any, images: np.ndarray, shipped: np.ndarray, seed: int) -> dict[str, list | int]:
    """Held-out denoising loss for the card."""
    key = jax.random.key(seed)
    mse, standard_error = denoising_loss(model, images, CARD_LOG_SNRS, key)
    shipped_mse, _ = denoising_loss(model, images[shipped], CARD_LOG_SNRS, key)
    return {
        "log_snr": list(CARD_LOG_SNRS),
        "sigma_over_alpha": [float(f"{np.exp(-level):.6g}") for level in CARD_LOG_SNRS],
        "mse": [float(f"{value:.6g}") for value in mse],
        "standard_error": [float(f"{value:.3g}") for value in standard_error],
        "num_images": len(images),
        "mse_shipped": [float(f"{value:.6g}") for value in shipped_mse],
        "seed": seed,
    }


def hardware() -> str:
    """The device, in words."""
    device = jax.devices()[0]
    return f"{os.cpu_count()} shared CPU cores, float32" if device.platform == "cpu" else device.device_kind


def readme(card: dict[str, Any]) -> str:
    """The card as a page for people."""
    loss, training, data, name = card["denoising_loss"], card["training"], card["data"], card["name"]
    schedule, network, num_shipped = card["schedule"], card["network"], card["held_out"]["num_shipped"]
    split = f"{data['num_train']} images to train on, {data['num_held_out']} held out, {num_shipped} in `heldout.npz`"
    made_of = f"`{network['class']}`, {network['arguments']}, {card['num_parameters']:,} parameters"
    lowest, highest = training["noise_levels"]
    schedule_arguments = ", ".join(f"{key}={value}" for key, value in schedule["arguments"].items())
    rows = "\n".join(
        f"| {s:.4g} | {mse:.3g} ± {error:.1g} | {np.sqrt(mse):.3g} |"
        for s, mse, error in zip(loss["sigma_over_alpha"], loss["mse"], loss["standard_error"], strict=True)
    )
    return f"""# {name}

{card["description"]}

```python
from smcdiff import checkpoints

# A Diffusion over arrays of shape {tuple(card["event_shape"])}, and {num_shipped} images which it was not trained on.
model = checkpoints.load("{name}")
images, labels = checkpoints.held_out("{name}")
```

![samples](samples.png)

64 unselected samples: {card["samples"]}.

| | |
| --- | --- |
| data | {data["source"]} |
| licence of the data | {data["licence"]} |
| split | {split} |
| event shape, pixels | {tuple(card["event_shape"])}, {card["pixel_range"][0]} to {card["pixel_range"][1]} |
| schedule | `{schedule["name"]}({schedule_arguments})` |
| prediction | `{card["prediction"]}`, sigma_data = {card["sigma_data"]:.5f} |
| network | {made_of} |
| trained by | `{training["command"]}` |
| steps, batch, seed | {training["steps"]}, {training["batch_size"]}, {training["seed"]} |
| time, hardware | {training["minutes"]} min on {training["hardware"]} |
| note | {training["note"] or "none"} |
| versions | {", ".join(f"{k} {v}" for k, v in card["versions"].items())} |
| sha256 of the weights | `{card["sha256"]}` |

Held-out denoising error: mean squared error per pixel over the {loss["num_images"]} held-out images with its
standard error, and its root.

| sigma / alpha | mse | rmse |
| --- | --- | --- |
{rows}

Limitations: an unconditional prior over one small data set, trained for {training["minutes"]:.0f} minutes; some samples
are malformed. Training covered sigma/alpha from {lowest:g} to {highest:g}. Pixels are continuous, not
quantised, and samples may leave [0, 1] slightly.

This page is written from `card.json` by `models/train.py`.
"""


def main() -> None:
    """Train, measure and write the folder."""
    arguments = parse_arguments()
    with np.load(arguments.data) as file:
        data = {name: file[name] for name in file.files}
    scale, about = np.float32(data["scale"]), json.loads(str(data["about"]))
    images = data["images"].astype(np.float32) / scale
    held_out = data["held_out_images"].astype(np.float32) / scale

    network = {"channels": arguments.channels, "blocks": arguments.blocks, "patch": arguments.patch}
    card: dict[str, Any] = {
        "name": arguments.out.name,
        "description": about["description"],
        "data": {
            "source": about["source"],
            "licence": about["licence"],
            "num_train": len(images),
            "num_held_out": len(held_out),
        },
        "held_out": {"file": "heldout.npz", "num_shipped": min(NUM_SHIPPED, len(held_out))},
        "event_shape": list(images.shape[1:]),
        "pixel_range": [0, 1],
        "schedule": {"name": "vp", "arguments": {"beta_min": 0.1, "beta_max": 20.0}},
        "prediction": "edm",
        "sigma_data": float(np.sqrt(np.mean(np.square(images, dtype=np.float64)))),
        "network": {"class": "UNet", "arguments": network},
    }
    key_init, key_train = jax.random.split(jax.random.key(arguments.seed))
    model, history = train(
        key_train,
        checkpoints.build_model(card, key_init),
        jnp.asarray(images),
        num_steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        ema_decay=arguments.ema_decay,
        held_out=held_out,
        evaluate_every=arguments.evaluate_every,
        checkpoint=arguments.checkpoint,
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    shipped = choose_shipped(data["held_out_labels"])
    np.savez_compressed(
        arguments.out / "heldout.npz",
        images=data["held_out_images"][shipped],
        labels=data["held_out_labels"][shipped],
        scale=scale,
    )
    times = schedules.log_snr_times(model.schedule, 100)
    samples = reverse_sample(jax.random.key(1), model, times, 64, eta=1.0)
    save_pictures(
        arguments.out / "samples.png", np.asarray(samples), enlarge=2 if images.shape[-1] > 16 else 6
    )
    card |= {
        "samples": "100 ancestral steps, log_snr_times(schedule, 100), key 1",
        "training": {
            "command": "python " + " ".join(sys.argv),
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "ema_decay": arguments.ema_decay,
            "seed": arguments.seed,
            "noise_levels": [NoiseLevels().lowest, NoiseLevels().highest],
            "final_loss": float(f"{history['loss'][-1]:.5g}"),
            "minutes": round(history["seconds"][-1] / 60, 1),
            "note": arguments.note,
            "hardware": hardware(),
        },
        "denoising_loss": measure(model, held_out, shipped, arguments.seed),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "equinox": equinox.__version__,
            "numpy": np.__version__,
        },
    }
    card = checkpoints.save_model(arguments.out, model, card)
    (arguments.out / "README.md").write_text(readme(card))
    print(json.dumps(card["denoising_loss"], indent=1))


if __name__ == "__main__":
    main()
