"""A mixture of 40 separated modes, known by its density alone: which Markov chains find them all.

Target: 40 equal Gaussians in the plane, means uniform on [-40, 40]^2 (drawn once), deviation softplus(1) = 1.3133.
Ten chains from the origin of 10^6 evaluations of density and gradient each. One run of a sampler makes all chains;
groups of ten are independent repetitions.

Samplers: `diffusive_gibbs` with a setting of our own (alpha = 0.06, sweeps of one Langevin step of 1), a sample every
250 evaluations; the same with a sample every 1000, and with a tenth of the evaluations; the published setting
(alpha = 0.1, 200 sweeps of 5 Langevin steps of 0.1 a sample, whose jumps cost another 200 evaluations); `mala` and
`hmc` with their published settings, a sample every 1000; parallel tempering of ten powers down to a Gaussian of the
scale of the means, which is drawn exactly, four steps of `mala` a swap, a sample every 250. Always
sigma^2 = 1 - alpha^2.
Metrics: relative error of E f for a published quadratic f, against its closed form 1777.89 (the published reference,
1821.107, is the mean over 10^4 exact samples, with a standard error of 17); squared maximum mean discrepancy to 10^4
exact samples, a V-statistic with five Gaussian kernels exp(-d^2 / b_i), b_i = 2^i/4 times the mean squared distance in
the joined samples; total variation between the frequencies of the cells of nearest means and their weights. Each
stands beside its floor, the same for as many exact samples.
Bars, for our setting: median error of E f at most 0.01 and median discrepancy at most 4.3e-4, the published figures of
one run of 10^4 samples, whose floors they are: two sets of 10^4 exact samples are as far apart, or farther. What is
gained on them comes from the more samples of the same number of evaluations.

Command: ``python -m benchmarks diffusive_gibbs``

Source: Chen et al., "Diffusive Gibbs Sampling", arXiv 2402.03008, Section 5 and the authors' published settings.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.annealing import mode_means, nearest_mean
from benchmarks.common import Clock, bar, format_table, total_variation
from smcdiff import targets
from smcdiff.mcmc import hmc, mala, parallel_tempering, tempered
from smcdiff.mcmc.diffusive_gibbs import diffusive_gibbs
from smcdiff.run import run as run_algorithm

WIDTH = math.log1p(math.e)
CHAINS, REFERENCE = 10, 10_000  # of one repetition
# f(x) = z^T A z + b.z with z = x + shift.
SHIFT = np.array([3.0819921, -0.5868578])
MATRIX = np.array([[0.61484563, 1.2681574], [0.9801868, 1.7928895]])
SLOPE = np.array([0.45562798, 0.6323063])
METRICS = ("relative error", "mmd", "mode tv")


class Variant(NamedTuple):
    """A sampler: target -> algorithm, steps a sample, evaluations of density and gradient a step, samples a chain."""

    build: Callable
    num_steps: int
    evaluations: int
    num_samples: int = 1000


def _gibbs(alpha, step_size, num_mala_steps):
    sigma = math.sqrt(1.0 - alpha**2)
    return lambda target: diffusive_gibbs(
        target, alpha, sigma, step_size=step_size, num_mala_steps=num_mala_steps
    )


SCALE = 25.0  # of the Gaussian at the end of the powers


def _tempering(target):
    levels = jnp.append(jnp.geomspace(1.0, (WIDTH / SCALE) ** 2, 9), 0.0)
    steps = 0.4 / (levels / WIDTH**2 + (1.0 - levels) / SCALE**2)
    return parallel_tempering(
        tempered(target, Gaussian()), levels, mala, steps, num_explore=4, draw_last=draw_gaussian
    )


class Gaussian(NamedTuple):
    """N(0, SCALE^2 I), without its constant."""

    def logdensity(self, x):
        return -0.5 * jnp.sum((x / SCALE) ** 2)


def draw_gaussian(rng_key):
    return SCALE * jax.random.normal(rng_key, (2,))


VARIANTS = {
    "diffusive Gibbs": Variant(_gibbs(0.06, 1.0, 1), 125, 2, 4000),
    "diffusive Gibbs, fewer samples": Variant(_gibbs(0.06, 1.0, 1), 500, 2),
    "diffusive Gibbs, a tenth": Variant(_gibbs(0.06, 1.0, 1), 50, 2),
    "diffusive Gibbs, published": Variant(_gibbs(0.1, 0.1, 5), 200, 6),
    "parallel tempering": Variant(_tempering, 5, 50, 4000),
    "mala": Variant(lambda target: mala(target, 2.0), 1000, 1),
    "hmc": Variant(lambda target: hmc(target, 0.06, 20), 50, 20),
}
MAIN = "diffusive Gibbs"
BARS = {"relative error": 0.01, "mmd": 4.3e-4}


def add_arguments(parser):
    parser.add_argument("--repetitions", type=int, default=10, help="groups of ten chains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))


def run(args) -> dict:
    variants = {name: VARIANTS[name] for name in args.variants}
    if args.quick:
        args.repetitions, args.variants = 2, [MAIN, "mala"]
        variants = {name: VARIANTS[name]._replace(num_steps=5, num_samples=20) for name in args.variants}
    target = targets.forty_modes(side=80.0, std=WIDTH)
    key_chains, key_cells, *keys = jax.random.split(jax.random.key(args.seed), 2 + args.repetitions)
    cells = np.bincount(nearest_mean(np.asarray(target.sample(key_cells, 10**6))), minlength=40) / 10**6
    references = [np.asarray(target.sample(key, REFERENCE), float) for key in keys]
    rows, floors = [], {}
    for size in sorted({variant.num_samples for variant in variants.values()}):
        exact = [target.sample(jax.random.fold_in(key, 1), CHAINS * size) for key in keys]
        records = measure_all("exact", [np.asarray(x, float) for x in exact], references, cells)
        rows += records
        floors[size] = medians(records)
    summary, bars = [], []
    for name, variant in variants.items():
        with Clock() as clock:
            samples, acceptance, jumps = draw(key_chains, variant, target, args)
        records = measure_all(name, samples, references, cells)
        rows += records
        found, evaluations = medians(records), variant.num_steps * variant.evaluations
        summary.append({"sampler": name, "evaluations a sample": evaluations})
        summary[-1]["samples"] = CHAINS * variant.num_samples
        for key in METRICS:
            summary[-1] |= {key: found[key], f"{key} floor": floors[variant.num_samples][key]}
        summary[-1] |= {
            "bias": float(np.mean([record["bias"] for record in records])),
            "acceptance": acceptance,
            "jumps": jumps,
            "run_s": clock.run,
            "comparison": name != MAIN,
        }
        print(format_table(summary[-1:]), flush=True)
        if name == MAIN:
            bars += [bar(f"{key}, {name}", found[key], limit) for key, limit in BARS.items()]
    print(format_table(summary))
    return {
        "title": "Markov chains on 40 separated modes",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"chains": CHAINS, "deviation": WIDTH, "exact_expectation": exact_expectation()},
        "seeds": [args.seed],
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def draw(rng_key, variant, target, args):
    """Samples (repetitions, those of ten chains, 2), and acceptance rates of steps and jumps."""
    num_chains = args.repetitions * CHAINS
    trace = run_algorithm(
        rng_key,
        variant.build(target),
        variant.num_samples * variant.num_steps,
        position=jnp.zeros((num_chains, 2)),
        num_chains=num_chains,
        thin=variant.num_steps,
        progress=False,
    )
    jumps = getattr(trace.info, "jump_acceptance", None)
    acceptance = float(np.mean(trace.info.acceptance_rate))
    samples = np.asarray(trace.samples, float).reshape(args.repetitions, -1, 2)
    return samples, acceptance, None if jumps is None else float(np.mean(jumps))


def measure_all(name, samples, references, cells) -> list[dict]:
    """A record for each repetition."""
    return [
        {"sampler": name, "samples": len(x), "repetition": i} | measure(x, reference, cells)
        for i, (x, reference) in enumerate(zip(samples, references, strict=True))
    ]


def medians(records) -> dict:
    """Medians of the metrics over repetitions."""
    return {key: float(np.median([record[key] for record in records])) for key in METRICS}


def measure(x, reference, cells) -> dict:
    """The metrics of one repetition."""
    bias = float(np.mean(quadratic(x)) / exact_expectation() - 1.0)
    frequencies = np.bincount(nearest_mean(x), minlength=40) / len(x)
    return {
        "bias": bias,
        "relative error": abs(bias),
        "mmd": mean_discrepancy(x, reference),
        "mode tv": total_variation(frequencies, cells),
        "modes visited": int(np.count_nonzero(frequencies)),
    }


def quadratic(x: np.ndarray) -> np.ndarray:
    """f at points (n, 2)."""
    z = x + SHIFT
    return np.einsum("ni,ij,nj->n", z, MATRIX, z) + z @ SLOPE


def exact_expectation() -> float:
    """E f under the mixture, in closed form."""
    means = mode_means() + SHIFT
    second = means.T @ means / len(means) + WIDTH**2 * np.eye(2)
    return float(np.sum(MATRIX * second) + means.mean(axis=0) @ SLOPE)


def mean_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy of two clouds, pairs of a point with itself included."""
    joined = np.concatenate([x, y])
    # The mean of all squared distances but the zeros, from moments.
    mean_square = 2.0 * joined.var(axis=0).sum() * len(joined) / (len(joined) - 1)
    mean = partial(_mean_kernel, narrowest=mean_square / 4.0)
    return mean(x, x) + mean(y, y) - 2.0 * mean(x, y)


def _mean_kernel(x, y, narrowest, block=500):
    blocks = (x[start : start + block] for start in range(0, len(x), block))
    return sum(float(_block_sum(part, y, narrowest)) for part in blocks) / (len(x) * len(y))


@jax.jit
def _block_sum(x, y, narrowest):
    """Sum of exp(-d^2/b) over pairs and b = narrowest 2^i, i = 0..4, each kernel the square of the next."""
    squares = (x[:, None, 0] - y[None, :, 0]) ** 2 + (x[:, None, 1] - y[None, :, 1]) ** 2
    kernel = jnp.exp(-squares / (16.0 * narrowest))
    total = kernel
    for _ in range(4):
        kernel = kernel**2
        total = total + kernel
    # Rows first: a float32 sum over all pairs at once would lose the digits that matter.
    return jnp.sum(jnp.sum(total, axis=1), axis=0)
