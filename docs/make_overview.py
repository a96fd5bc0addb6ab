"""Draw docs/_static/overview.png: a truth, its measurement, and what the posterior says.

python docs/make_overview.py                 # the digits model, half of the image hidden
python docs/make_overview.py --model mnist --image 7
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import smcdiff
from smcdiff import guidance, inverse

DRAWS = 6


def infer(name, image, num_particles):
    """Measure the upper half of a held-out image, and infer the rest by four runs of twisted SMC."""
    model = smcdiff.load(name)
    truth = smcdiff.held_out(name)[0][image]
    rows, columns = model.event_shape
    hidden = inverse.crop_box(
        model.event_shape, top=rows // 2, left=0, height=rows - rows // 2, width=columns
    )
    problem = inverse.simulate_problem(jax.random.key(1), hidden, truth, 0.1)
    result = smcdiff.posterior(
        jax.random.key(2), model, problem, twist=guidance.pigdm, num_particles=num_particles, num_chains=4
    )
    observed = hidden.adjoint(jnp.ones(hidden.output_shape)) > 0
    return truth, np.where(observed, hidden.adjoint(problem.y), np.nan), result


def draw(truth, measured, result, path):
    """One row of pictures."""
    # From all runs together, each counting by its evidence; the runs one by one would show what hardly has any weight.
    weights = np.exp(result.pooled_log_weights()).ravel()
    chosen = np.random.default_rng(0).choice(len(weights), DRAWS, p=weights / weights.sum())
    draws = result.particles.reshape(-1, *truth.shape)[chosen]
    pictures = [
        ("truth", truth, "gray", 1.0),
        ("measurement", measured, "gray", 1.0),
        ("posterior mean", result.mean(), "gray", 1.0),
        ("posterior sd", result.std(), "magma", 0.5),
        *((f"draw {index + 1}", picture, "gray", 1.0) for index, picture in enumerate(draws)),
    ]
    figure, axes = plt.subplots(1, len(pictures), figsize=(1.35 * len(pictures), 1.75), facecolor="white")
    for axis, (title, picture, colours, top) in zip(axes, pictures, strict=True):
        axis.set_facecolor("#c9d6e3")  # what was not measured
        axis.imshow(picture, cmap=colours, vmin=0.0, vmax=top, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--image", type=int, default=16)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "_static" / "overview.png")
    options = parser.parse_args()
    truth, measured, result = infer(options.model, options.image, options.particles)
    print("log evidence of each run:", result.log_evidence)
    draw(truth, measured, result, options.out)


if __name__ == "__main__":
    main()
