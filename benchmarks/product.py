"""The product of two mixtures, whose law is known: what composing scores gets wrong, and what weights make right.

Two mixtures of 5 Gaussians of unit covariance in d dimensions, means N(0, 4 I), weights Dirichlet(3). Their product is
a mixture of 25 Gaussians of covariance I/2 with closed-form weights and integral. Everything is drawn anew for each
seed. Noise: variance exploding, sigma from 40 to 0.01, grid uniform in log-SNR.

Metrics: sliced Wasserstein-1 distance of the weighted particles to as many exact samples; its floor, the same distance
between two exact sample sets; total variation between the exact component weights and the average responsibilities of
the particles, and its floor; |log evidence error|.
Bars, for density weights with moves in every dimension: median distance at most 1.3 times the median floor, median
variation of the mode weights at most 0.02, median |log evidence error| at most 0.05.

Command: ``python -m benchmarks product``

Source: the task of Du et al., "Reduce, Reuse, Recycle", arXiv 2302.11552, with mixtures in the place of networks.
"""

import jax
import jax.numpy as jnp
import numpy as np

import smcdiff
from benchmarks.common import bar, format_table, sliced_wasserstein, total_variation
from smcdiff import compose, schedules
from smcdiff.run import run as run_algorithm
from smcdiff.smc import fkc, mala_moves, smc
from smcdiff.smc.drift import fit_drift

FITTED = {"drift_control": "fitted"}  # by `fit_drift` on a fifth of the particles
VARIANTS = {
    # name: (options of fkc, MALA moves a step, whether weights are used); moves between weights from scores accept by
    # scores where the drift is fitted, so that no density is used
    "sum of scores": ({"drift_control": False}, 0, False),
    "score weights": ({"drift_control": False}, 0, True),
    "score weights, drift control": ({}, 0, True),
    "score weights, drift control, MALA": ({}, 3, True),
    "score weights, fitted drift": (FITTED, 0, True),
    "score weights, fitted drift, MALA by scores": (FITTED, 3, True),
    "density weights": ({"weights": "density"}, 0, True),
    "density weights, MALA": ({"weights": "density"}, 3, True),
}
MAIN = "density weights, MALA"
METRICS = ("sw1", "floor", "tv", "tv_floor")


def add_arguments(parser):
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 10, 50, 200])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sigma-max", type=float, default=40.0)
    parser.add_argument("--sigma-min", type=float, default=0.01)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))


def run(args) -> dict:
    if args.quick:
        args.dimensions, args.seeds, args.particles, args.steps, args.variants = [2], 2, 64, 10, [MAIN]
    schedule = schedules.ve(args.sigma_min, args.sigma_max)
    times = smcdiff.log_snr_times(schedule, args.steps, log_snr_max=-float(np.log(args.sigma_min)))
    rows, summary, bars = [], [], []
    for d in args.dimensions:
        for name in args.variants:
            records = [one_seed(seed, d, schedule, times, name, args.particles) for seed in range(args.seeds)]
            rows += records
            summary.append({"d": d, "sampler": name} | summarise(records) | {"comparison": name != MAIN})
            if name == MAIN:
                bars.append(bar(f"distance / floor, d={d}", summary[-1]["sw1 / floor"], 1.3))
                bars.append(bar(f"mode-weight variation, d={d}", summary[-1]["mode weight tv"], 0.02))
                bars.append(bar(f"log evidence error, d={d}", summary[-1]["abs log evidence error"], 0.05))
    print(format_table(summary))
    return {
        "title": "Product of two mixtures",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"schedule": "ve", "projections": 100},
        "seeds": list(range(args.seeds)),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def draw_problem(seed: int, d: int, schedule):
    """Two mixtures, their product, and the log of its integral."""
    rng = np.random.default_rng([seed, d])
    means = 2.0 * rng.normal(size=(2, 5, d))
    weights = rng.dirichlet(np.full(5, 3.0), size=2)
    models = [smcdiff.GaussianMixtureDiffusion.create(weights[i], means[i], 1.0, schedule) for i in range(2)]
    gaps = means[0][:, None] - means[1][None]
    log_weights = np.log(weights[0])[:, None] + np.log(weights[1])[None]
    log_weights = log_weights - 0.25 * np.sum(gaps**2, axis=-1) - 0.5 * d * np.log(4 * np.pi)
    log_integral = float(np.logaddexp.reduce(log_weights, axis=None))
    centres = (means[0][:, None] + means[1][None]) / 2
    exact = smcdiff.GaussianMixture.create(
        np.exp(log_weights - log_integral).ravel(), centres.reshape(25, d), 0.5
    )
    return models, exact, log_integral


def one_seed(seed, d, schedule, times, name, num_particles) -> dict:
    """Run one sampler on the product of one seed, and measure it against the exact law."""
    models, exact, log_integral = draw_problem(seed, d, schedule)
    key_smc, key_reference, key_floor = jax.random.split(jax.random.key(seed), 3)
    reference, again = exact.sample(key_reference, num_particles), exact.sample(key_floor, num_particles)

    options, num_moves, weighted = VARIANTS[name]
    path, accept = compose.product(*models), "exact"
    if options == FITTED:
        key_fit, few = jax.random.fold_in(key_smc, len(times)), max(num_particles // 5, 1)
        options = {"drift_control": fit_drift(key_fit, path, times=times, num_particles=few)}
        accept = "line_integral"
    move = mala_moves(path, times=times, width=np.sqrt(0.5), accept=accept) if num_moves else None
    algorithm = smc(
        fkc(path, times=times, **options),
        num_particles,
        ess_threshold=0.5 if weighted else 0.0,
        move=move,
        num_moves=num_moves or 1,
    )
    trace = run_algorithm(key_smc, algorithm, len(times) - 1, transform=_nothing, progress=False)
    state, info = jax.tree.map(lambda leaf: np.asarray(leaf)[0], (trace.state, trace.info))
    weights = (
        np.exp(state.log_weights.astype(float)) if weighted else np.full(num_particles, 1 / num_particles)
    )
    component_weights = np.exp(np.asarray(exact.log_weights, float))
    return {
        "d": d,
        "sampler": name,
        "seed": seed,
        "sw1": sliced_wasserstein(state.particles, reference, x_weights=weights),
        "floor": sliced_wasserstein(again, reference),
        "tv": total_variation(weights @ _responsibilities(exact, state.particles), component_weights),
        "tv_floor": total_variation(_responsibilities(exact, again).mean(axis=0), component_weights),
        "log_evidence_error": float(state.log_evidence) - log_integral if weighted else None,
        "ess": float(info.ess[-1]) if weighted else None,
        "num_resampled": int(info.resampled.sum()),
        "acceptance": float(info.move_info.mean()) if num_moves else None,
    }


def _responsibilities(exact, x):
    return np.asarray(jax.vmap(exact.responsibilities)(jnp.asarray(x)), float)


def _nothing(state, info):
    return state.step


def summarise(records) -> dict:
    """Medians over the seeds of one setting."""
    value = {name: np.median([record[name] for record in records]) for name in METRICS}
    errors = [record["log_evidence_error"] for record in records]
    rates = [record["acceptance"] for record in records]
    return {
        "sw1": value["sw1"],
        "floor": value["floor"],
        "sw1 / floor": value["sw1"] / value["floor"],
        "mode weight tv": value["tv"],
        "tv floor": value["tv_floor"],
        "abs log evidence error": None if None in errors else float(np.median(np.abs(errors))),
        "resamplings": float(np.median([record["num_resampled"] for record in records])),
        "acceptance": None if None in rates else float(np.mean(rates)),
    }
