"""Metropolis-corrected composition: the product of a ring and a bar, whose noised factors are known in closed form.

Ring: 8 Gaussians of deviation 0.03 on a circle of radius 0.5. Bar: uniform on [-0.2, 0.2] x [-1, 1] for 99 % of its
mass, and on the rest of [-1.1, 1.1]^2 for 1 %. Of their product practically only the two Gaussians at (0, +-0.5)
survive, with equal weights; it is sampled exactly by rejection from the ring. No edge of the bar is within 5 deviations
of a Gaussian's centre, so that its integral, 0.3112, and the mean of its normalised log density, 3.4390, are sums over
the Gaussians; quadrature agrees to 1e-4. The 0.6 % that the other six keep make 0.036 of that mean, and exact samples
scatter about it by 0.025 if they are 2000.

Samplers, all on the same noise (variance exploding, log-SNR grid):

- annealed MCMC with `mala`, `hmc` and `ula`, without weights: the walk alone. Step sizes are tuned by a pilot and
  frozen (ULA takes MALA's). The six other Gaussians of the ring still hold percents of the noised product at
  sigma = 0.05, when a local move from one to the next has to climb 5 nats and more: what is there stays there.
- the same walk with importance weights from densities, and resampling below half the particles.
- scores only: `fkc` with weights from scores, and moves of MALA and HMC that accept by line integrals.
- for comparison the reverse sampler with the sum of scores, and `fkc` with density weights and moves.

Metrics: mean log likelihood under the product, weight of the upper mode, Wasserstein-2 distance to exact samples (exact
transport; weighted samples are resampled) and its floor, the same between two exact sample sets.
Bars, for MALA and HMC with either acceptance and with weights: |mean log likelihood - exact| at most 0.05; weight of
the upper mode 0.5 up to 0.03; distance at most 1.5 times the floor (means over seeds, and over 20 pairs for the floor).

Command: ``python -m benchmarks ring_bar``

Source: the task of Du et al., "Reduce, Reuse, Recycle", arXiv 2302.11552, and of Sjoberg et al., arXiv 2307.14012, with
exact factors in the place of networks.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import smcdiff
from benchmarks.annealing import wasserstein2
from benchmarks.common import bar, format_table
from smcdiff import compose, mcmc, schedules
from smcdiff.boxes import BoxMixtureDiffusion

RADIUS, STD, MODES, INSIDE = 0.5, 0.03, 8, 2
ON_BAR, OFF_BAR = 0.99 / 0.8, 0.01 / (4.84 - 0.8)  # densities of the bar
MASS = (INSIDE * ON_BAR + (MODES - INSIDE) * OFF_BAR) / MODES
# Of the product: a Gaussian's own, less the choice of one, and the bar's at the Gaussians, by their shares of the mass.
LOG_LIKELIHOOD = float(
    -1.0
    - np.log(2.0 * np.pi * STD**2 * MODES)
    + INSIDE * ON_BAR / (MODES * MASS) * np.log(ON_BAR)
    + (MODES - INSIDE) * OFF_BAR / (MODES * MASS) * np.log(OFF_BAR)
    - np.log(MASS)
)
_HMC = functools.partial(mcmc.hmc, num_integration_steps=3)
_HMC_LINE = functools.partial(mcmc.hmc, num_integration_steps=3, accept="line_integral", num_nodes=12)
_MALA_LINE = functools.partial(mcmc.mala, accept="line_integral")


class Variant(NamedTuple):
    """A kernel, whose step sizes it takes, steps a level, weights, and scores and densities of one step."""

    kernel: Callable
    tuned_by: Callable
    num_steps: int
    weights: str
    scores: int
    densities: int


VARIANTS = {
    "mala, density weights": Variant(mcmc.mala, mcmc.mala, 9, "density", 1, 1),
    "hmc, density weights": Variant(_HMC, _HMC, 3, "density", 3, 3),
    "mala, line integral, score weights": Variant(_MALA_LINE, mcmc.mala, 9, "score", 5, 0),
    "hmc, line integral, score weights": Variant(_HMC_LINE, _HMC, 3, "score", 15, 0),
    "mala": Variant(mcmc.mala, mcmc.mala, 9, "none", 1, 1),
    "hmc": Variant(_HMC, _HMC, 3, "none", 3, 3),
    "mala, line integral": Variant(_MALA_LINE, mcmc.mala, 9, "none", 5, 0),
    "ula": Variant(mcmc.ula, mcmc.mala, 9, "none", 1, 0),
    "fkc, density weights, mala": Variant(mcmc.mala, mcmc.mala, 3, "fkc", 1, 1),
    "reverse sampler, sum of scores": None,
}
MAIN = tuple(VARIANTS)[:4]
METRICS = ("ll", "upper", "w2")


def add_arguments(parser):
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--levels", type=int, default=200)
    parser.add_argument("--floor-pairs", type=int, default=20)
    parser.add_argument("--sigma-max", type=float, default=3.0)
    parser.add_argument("--sigma-min", type=float, default=0.005)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))


def run(args) -> dict:
    if args.quick:
        args.seeds, args.samples, args.levels, args.floor_pairs = 1, 50, 8, 2
        args.variants = ["mala", MAIN[0]]
    path, ring, box = factors(schedules.ve(args.sigma_min, args.sigma_max))
    times = smcdiff.log_snr_times(path.schedule, args.levels, log_snr_max=-float(np.log(args.sigma_min)))
    tuned = {}
    rows, summary, bars = [], [], []
    truths = [draw_truth(seed, ring, box, args.samples) for seed in range(args.seeds)]
    # Which mode has how many samples varies so much that five pairs do not give its mean.
    pairs = [draw_truth(seed, ring, box, args.samples) for seed in range(1000, 1000 + args.floor_pairs)]
    floor = float(np.mean([wasserstein2(truth["again"], truth["reference"]) for truth in pairs]))
    for name in args.variants:
        records = [one_seed(seed, truths[seed], path, times, name, tuned, args) for seed in range(args.seeds)]
        rows += records
        mean = {key: float(np.mean([record[key] for record in records])) for key in METRICS}
        row = {
            "sampler": name,
            "log likelihood": mean["ll"],
            "upper mode": mean["upper"],
            "largest |upper - .5|": max(abs(record["upper"] - 0.5) for record in records),
            "w2": mean["w2"],
            "w2 floor": floor,
            "w2 / floor": mean["w2"] / floor,
            "acceptance": records[0]["acceptance"],
            "scores a sample": records[0]["scores"],
            "densities a sample": records[0]["densities"],
        }
        summary.append(row | {"comparison": name not in MAIN})
        if name in MAIN:
            bars.append(bar(f"log likelihood off, {name}", abs(row["log likelihood"] - LOG_LIKELIHOOD), 0.05))
            bars.append(bar(f"upper mode off .5, {name}", abs(row["upper mode"] - 0.5), 0.03))
            bars.append(bar(f"distance / floor, {name}", row["w2 / floor"], 1.5))
    print(format_table(summary))
    return {
        "title": "Ring x bar: Metropolis-corrected composition",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"schedule": "ve", "exact log likelihood": LOG_LIKELIHOOD},
        "seeds": list(range(args.seeds)),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def factors(schedule):
    """The product path, and its two factors at t = 0."""
    angles = 2 * np.pi * np.arange(MODES) / MODES
    means = RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ring = smcdiff.GaussianMixtureDiffusion.create(np.ones(MODES), means, STD**2, schedule)
    # The square holds 1 % outside the bar, at the same density everywhere: a mixture of square and bar.
    square = 4.84 * OFF_BAR
    corners = np.array([[0.2, 1.0], [1.1, 1.1]])
    box = BoxMixtureDiffusion.create([1 - square, square], -corners, corners, schedule)
    return compose.product(ring, box), ring.mixture, box.at(jnp.zeros(()))


def draw_truth(seed, ring, box, num_samples):
    """Exact samples of the product, by rejection, twice; its normalised log density."""
    drawn = []
    for key in jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 2):
        key_ring, key_accept = jax.random.split(key)
        x = ring.sample(key_ring, 8 * num_samples)
        log_rate = jax.vmap(box.logdensity)(x) - box.logdensity(jnp.zeros(2))
        accepted = jnp.log(jax.random.uniform(key_accept, (len(x),))) < log_rate
        drawn.append(np.asarray(x[accepted][:num_samples], float))
    return {"reference": drawn[0], "again": drawn[1], "logdensity": (ring, box)}


def log_likelihood(truth, x):
    """Mean of the normalised log density of the product."""
    ring, box = truth["logdensity"]
    x = jnp.asarray(x, jnp.float32)
    values = jax.vmap(ring.logdensity)(x) + jax.vmap(box.logdensity)(x)
    return float(np.mean(np.asarray(values, float)) - np.log(MASS))


def one_seed(seed, truth, path, times, name, tuned, args) -> dict:
    """Run one sampler, and measure its samples."""
    key = jax.random.key(seed)
    x, acceptance, scores, densities = sample(key, path, times, name, tuned, args)
    return {
        "sampler": name,
        "seed": seed,
        "ll": log_likelihood(truth, x),
        "upper": float(np.mean(x[:, 1] > 0)),
        "w2": wasserstein2(x, truth["reference"]),
        "acceptance": acceptance,
        "scores": scores,
        "densities": densities,
    }


def sample(key, path, times, name, tuned, args):
    """Samples, mean acceptance rate of the pilot, and evaluations of scores and densities for one sample."""
    num_levels, variant = len(times) - 1, VARIANTS[name]
    if variant is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a composition is no diffusion is the point
            return np.asarray(smcdiff.reverse_sample(key, path, times, args.samples)), None, num_levels, 0
    if variant.tuned_by not in tuned:
        pilot = jax.random.key(1000)
        tuned[variant.tuned_by] = smcdiff.smc.tune_step_sizes(
            pilot, path, times=times, kernel=variant.tuned_by
        )
    step_sizes, rates = tuned[variant.tuned_by]
    calls = num_levels * variant.num_steps
    cost = {"scores": calls * variant.scores, "densities": calls * variant.densities}
    if variant.weights in ("score", "fkc"):
        weights = "score" if variant.weights == "score" else "density"
        fk = smcdiff.fkc(path, times=times, weights=weights)
        kernel = Partial(_at_level, Partial(variant.kernel), -times[1:], step_sizes)
        move = smcdiff.smc.mcmc_moves(path, kernel, times=times)
        result = smcdiff.run_smc(
            key, fk, args.samples, move=move, num_moves=variant.num_steps, progress=False
        )
        # A score and its Jacobian-vector product, and densities where they weigh.
        cost["scores"] += 2 * num_levels
        cost["densities"] += 2 * num_levels * (weights == "density")
    else:
        fk = smcdiff.annealed_mcmc(
            path,
            times=times,
            step_sizes=step_sizes,
            kernel=variant.kernel,
            steps_per_level=variant.num_steps,
            weights=variant.weights,
        )
        result = smcdiff.run_smc(key, fk, args.samples, progress=False)
        cost["densities"] += 2 * num_levels * (variant.weights == "density")
    x = np.asarray(result.resample(jax.random.fold_in(key, 1))[0], float)
    rate = None if name == "ula" else float(np.mean(rates))
    return x, rate, cost["scores"], cost["densities"]


def _at_level(kernel, negative_times, step_sizes, density, t):
    return kernel(density, jnp.interp(-t, negative_times, step_sizes))
