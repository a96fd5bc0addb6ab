"""Bare densities at equal numbers of evaluations: which sampler finds the modes, the moments and the evidence.

Targets (`smcdiff.targets`): 40 modes in 2 and in 50 dimensions, rings, Neal's funnel in 10 dimensions, two modes of
weights 2/3 and 1/3 in 8 and 64 dimensions, a skewed mixture in 5. All samplers know the same of a target: a Gaussian
N(0, scale^2 I) that covers it, and the width of its narrowest feature. Where the dimension d is more than two, all but
rdmc are run with the scale of a coordinate and with sqrt(d) times it, that of the norm, and the better counts; rdmc
uses both. An evaluation is one of the log density, with its gradient where that is used; they are counted, but for the
warm-up of NUTS, whose trajectories are taken to be as long as those after it, and every sampler gets 4096 for each of
1024 samples, warm-up and pilots included.

Samplers: `rdmc` (the mean of the denoising posterior; importance sampling in few dimensions, annealed SMC in many),
`rdmc, draws`, `rdsmc` (with weights; in many dimensions by resample-move from the samples of a first run without, and
the particles are not resampled), `slips` (persistent chains), `diffusive Gibbs`, `parallel tempering` (64 chains each,
the first quarter thrown away), BlackJAX's adaptive tempered SMC and persistent SMC with HMC, whose step size follows
the temperature, BlackJAX's NUTS and NumPyro's, after window adaptation.
Metrics: total variation of the modes' frequencies, error of the log evidence and the evidence over the exact one,
greatest error of a mean in deviations, greatest relative error of a deviation, sliced Kolmogorov-Smirnov distance,
unbiased squared maximum mean discrepancy; each beside its floor, the same for as many exact samples.
Bars: at its best, one of ours is not worse than the better of parallel tempering and tempered SMC by more than a floor,
in mode frequencies where there are modes, else in the sliced distance; 1.15 floors of W2 on eight modes, N = 2000; mode
frequencies within .05 for the skewed and the two modes by the best of `rdmc`, `rdmc, draws` and `rdsmc`.

Command: ``python -m benchmarks unnormalised``; ``--problems rings --keep`` measures one of them anew.

Sources: definitions as in `smcdiff.targets`; equal evaluations after Grenioux et al., arXiv 2402.10758, and others.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bare_samplers import OURS, REVERSE, SAMPLERS, Problem, path_of, radius, times_of
from benchmarks.common import Clock, bar, format_table, total_variation
from benchmarks.distances import discrepancy, sliced_ks, w2
from smcdiff import estimators, rdmc, run_smc, targets
from smcdiff.targets import HasModes

KEYS = ("problem",)  # the bars compare the samplers of a problem
METRICS = ("mode tv", "log evidence", "mean", "std", "sliced ks", "mmd")


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "40 modes, d = 2": lambda: Problem(targets.forty_modes(2), 15.0, 1.0),
    "40 modes, d = 50": lambda: Problem(targets.forty_modes(50), 15.0, 1.0, True),
    "rings": lambda: Problem(targets.rings(), 3.0, 0.15),
    "funnel": lambda: Problem(targets.funnel(10), 5.0, 1.0, True),
    "two modes, d = 8": lambda: Problem(targets.two_modes(8), 1.2, 0.22, True),
    "two modes, d = 64": lambda: Problem(targets.two_modes(64), 1.2, 0.22, True),
    "skewed modes, d = 5": lambda: Problem(targets.skewed_modes(5), 7.0, 0.8, True),
}


RING = "eight modes"


def add_arguments(parser):
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--evaluations", type=int, default=4096, help="for each sample")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=100, help="settings were chosen on seeds below it")
    problems = [*PROBLEMS, RING]
    parser.add_argument("--problems", nargs="+", choices=problems, default=problems)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))


def run(args) -> dict:
    if args.quick:
        args.samples, args.evaluations, args.seeds = 128, 512, 1
        args.problems, args.samplers = ["rings"], ["rdsmc", "parallel tempering"]
    rows, summary, bars = [], [], []
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for name in args.problems:
        if name == RING:
            ring = ring_distances(seeds)
            rows += ring
            found, base = (float(np.mean([row[key] for row in ring])) for key in ("w2", "w2, exact"))
            summary.append({"problem": RING, "sampler": "rdmc, draws", "w2": found, "w2, exact": base})
            bars.append(bar("W2 / floor, eight modes", found / base, 1.15))
            continue
        problem, found = PROBLEMS[name](), {}
        floors = [floor(problem.target, args.samples, seed) for seed in seeds]
        rows += [
            {"problem": name, "sampler": "exact", "seed": seed} | row
            for seed, row in zip(seeds, floors, strict=True)
        ]
        base = average(floors)
        key = "mode tv" if base["mode tv"] is not None else "sliced ks"
        for sampler in args.samplers:
            for told in coverings(problem, sampler):
                setting = {"problem": name, "sampler": sampler, "scale": told.scale}
                with Clock() as clock:
                    records = [one(told, sampler, args, seed) for seed in seeds]
                rows += [setting | {"seed": seed} | row for seed, row in zip(seeds, records, strict=True)]
                summary.append(setting | average(records) | {"run_s": clock.run})
                print(format_table(summary[-1:]), flush=True)
                found[sampler] = min(found.get(sampler, math.inf), summary[-1][key])
                jax.clear_caches()  # hundreds of programs would reach the number of memory maps that Linux allows
        summary.append({"problem": name, "sampler": "floor"} | base)
        bars += compare(name, key, found, base[key])
    print(format_table(summary))
    return {
        "title": "Bare densities at equal numbers of evaluations",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")},
        "seeds": list(range(args.first_seed, args.first_seed + args.seeds)),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def coverings(problem, sampler) -> list[Problem]:
    """The problem with each width of the covering Gaussian that ``sampler`` is told.

    In many dimensions modes may part in one direction alone, by as much as the norm of a sample: a Gaussian that covers
    every coordinate does not cover them. There all are run with either width; `rdmc` makes use of both at once.
    """
    if problem.is_annealed and sampler not in REVERSE:
        return [problem, problem._replace(scale=radius(problem))]
    return [problem]


def compare(name, key, found, floor) -> list[dict]:
    """Our best against the better of parallel tempering and tempered SMC, and rdmc where modes differ."""
    ours = [found[s] for s in OURS if s in found and np.isfinite(found[s])]
    rivals = [found[s] for s in ("parallel tempering", "tempered SMC") if np.isfinite(found.get(s, math.inf))]
    bars = []
    if ours and rivals:
        bars.append(bar(f"{name}: {key}, best of ours", min(ours), min(rivals) + floor))
    reverse = [found[s] for s in REVERSE if s in found]
    if reverse and name.startswith(("two", "skewed")):
        bars.append(bar(f"{name}: {key}, best of rdmc", min(reverse), 0.05))
    return bars


def one(problem, sampler, args, seed) -> dict:
    """Metrics of one run."""
    result = SAMPLERS[sampler](problem, args.samples, args.evaluations, jax.random.key(seed))
    exact = np.asarray(problem.target.sample(jax.random.key(1000 + seed), args.samples), float)
    error = None
    if result.log_evidence is not None and problem.target.log_evidence is not None:
        error = result.log_evidence - float(problem.target.log_evidence)
    return {
        **measure(problem.target, result.samples, result.weights, exact),
        "log evidence": None if error is None else abs(error),
        "evidence / exact": None if error is None else math.exp(error),
        "evaluations a sample": result.evaluations / args.samples,
    }


def floor(target, size, seed) -> dict:
    """The metrics of exact samples."""
    x, y = (np.asarray(target.sample(jax.random.key(offset + seed), size), float) for offset in (2000, 1000))
    return measure(target, x, None, y) | {"log evidence": None, "evidence / exact": None}


def average(records) -> dict:
    """Means over seeds; None where there is nothing."""
    keys = (*METRICS, "evidence / exact", "evaluations a sample")
    values = {key: [r[key] for r in records if r.get(key) is not None] for key in keys}
    return {key: float(np.mean(value)) if value else None for key, value in values.items()}


def measure(target, x, weights, exact) -> dict:
    """Metrics of weighted samples beside exact ones; samples that are not finite fail them all."""
    if not np.all(np.isfinite(x)):
        return {key: math.nan for key in METRICS if key != "log evidence"}
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    distance = None
    if isinstance(target, HasModes):
        labels = np.asarray(jax.vmap(target.mode_labels)(jnp.asarray(x, jnp.float32)))
        count = len(target.mode_weights)
        distance = total_variation(
            np.bincount(labels, weights=weights, minlength=count), np.asarray(target.mode_weights)
        )
    moments = target.moments
    mean = weights @ x
    std = np.sqrt(weights @ (x - mean) ** 2)
    return {
        "mode tv": distance,
        "mean": float(np.max(np.abs(mean - np.asarray(moments.mean)) / np.asarray(moments.std))),
        "std": float(np.max(np.abs(std / np.asarray(moments.std) - 1))),
        "sliced ks": sliced_ks(x, weights, exact),
        "mmd": discrepancy(x, weights, exact),
    }


def ring_distances(seeds) -> list[dict]:
    """Exact W2 of rdmc to exact samples on the ring of eight modes, N = 2000, and of two sets of exact samples."""
    target = targets.eight_modes()
    path = path_of(Problem(target, 8.0, 0.84), estimators.importance(64, reference=(0.0, 8.0)))
    fk = rdmc(path, times=times_of(path, 100, 0.84), start=(0.0, 8.0), transition="draw")
    rows = []
    for seed in seeds:
        x = np.asarray(run_smc(jax.random.key(seed), fk, 2000, progress=False).particles.position[0], float)
        exact = [np.asarray(target.sample(jax.random.key(seed + k), 2000), float) for k in (1000, 2000, 3000)]
        setting = {"problem": RING, "sampler": "rdmc, draws", "seed": seed}
        rows.append(setting | {"w2": w2(x, exact[0]), "w2, exact": w2(exact[1], exact[2])})
    return rows
