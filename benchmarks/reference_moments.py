"""Reference moments and evidence of the posteriors in `smcdiff.targets`, from long chains in double precision.

regression   Bayesian logistic regression on the breast cancer data, d = 31. Moments are means over chains of BlackJAX's
             NUTS after its window adaptation; their standard errors come from the spread of batch means. The evidence
             is an importance estimate with a multivariate Student law of the chains' mean and covariance. The same
             weights give the moments once more, without chains. ``--write`` stores moments and evidence in the package.
schools      Eight schools, not centred, d = 10: the same chains against the exact moments of a quadrature.

Bars: the largest difference between the two ways in standard errors, 4.5 (over 31 or 10 coordinates, means and
deviations: exceeded by chance once in 2000 runs); effective sample size of the importance weights at least 1 % of
the draws; standard error of the log evidence at most 0.01.

Command: ``python -m benchmarks reference_moments --write``.
"""

import json
import math

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

from benchmarks.common import bar, format_table
from smcdiff import targets
from smcdiff.targets.logistic_regression import REFERENCE

PARTS = ("regression", "schools")
BATCHES = 20  # of a chain, whose means are taken as independent
FREEDOM = 8.0  # of the Student law
STD_ERRORS = 4.5


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10_000, help="of a chain, kept")
    parser.add_argument("--warmup", type=int, default=2000)
    parser.add_argument("--importance-draws", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="store the result in the package")


def run(args) -> dict:
    if args.quick:
        args.chains, args.draws, args.warmup, args.importance_draws = 2, 200, 200, 2000
        args.parts, args.write = ["schools"], False
    rows, summary, bars = [], [], []
    with jax.enable_x64(True):
        for part in args.parts:
            new_rows, new_summary, new_bars = {"regression": regression, "schools": schools}[part](args)
            rows += [{"target": part, **row} for row in new_rows]
            summary.append({"target": part, **new_summary})
            bars += new_bars
            print(format_table(summary[-1:]), flush=True)
    return {
        "title": "Reference moments of posteriors",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick", "write")}
        | {"batches": BATCHES, "freedom": FREEDOM},
        "seeds": [args.seed],
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def regression(args):
    target = targets.logistic_regression()
    draws, accepted, divergent = chains(args, target)
    moments = batch_moments(draws)
    log_evidence, error, ess, weighted = importance(args, target, draws.reshape(-1, draws.shape[-1]))
    scores = differences(moments, weighted)
    rows = coordinate_rows(moments, weighted)
    summary = {
        "coordinates": draws.shape[-1],
        "largest difference": float(np.abs(scores).max()),
        "log evidence": log_evidence,
        "its error": error,
        "ess, share": ess / args.importance_draws,
        "acceptance": accepted,
        "divergent": divergent,
    }
    if args.write:
        stored = {
            "command": "python -m benchmarks reference_moments --write",
            "source": f"NUTS, {args.chains} chains of {args.draws}; {args.importance_draws} importance samples",
            "log_evidence": log_evidence,
            "log_evidence_std_error": error,
        }
        stored |= {name: np.asarray(values).tolist() for name, values in moments._asdict().items()}
        REFERENCE.write_text(json.dumps(stored, indent=1) + "\n")
    bars = [
        bar("regression: NUTS and importance, standard errors", np.abs(scores).max(), STD_ERRORS),
        bar("regression: effective sample size, share", ess / args.importance_draws, 0.01, at_least=True),
        bar("regression: standard error of the log evidence", error, 0.01),
    ]
    return rows, summary, bars


def schools(args):
    target = targets.eight_schools()
    draws, accepted, divergent = chains(args, target)
    moments = batch_moments(draws)
    scores = differences(moments, target.moments)
    summary = {
        "coordinates": draws.shape[-1],
        "largest difference": float(np.abs(scores).max()),
        "log evidence": target.log_evidence,
        "its error": 0.0,
        "acceptance": accepted,
        "divergent": divergent,
    }
    bars = [bar("schools: NUTS and quadrature, standard errors", np.abs(scores).max(), STD_ERRORS)]
    return coordinate_rows(moments, target.moments), summary, bars


def chains(args, target):
    """Draws (chains, n, d) of NUTS, each chain with its own adaptation; mean acceptance and divergences."""

    @jax.jit
    def chain(target, key):
        key_start, key_warmup, key_chain = jax.random.split(key, 3)
        start = 0.1 * jax.random.normal(key_start, target.event_shape)
        adaptation = blackjax.window_adaptation(blackjax.nuts, target.logdensity, target_acceptance_rate=0.9)
        (state, parameters), _ = adaptation.run(key_warmup, start, args.warmup)
        algorithm = blackjax.nuts(target.logdensity, **parameters)

        def step(state, k):
            state, info = algorithm.step(jax.random.fold_in(key_chain, k), state)
            return state, (state.position, info.acceptance_rate, info.is_divergent)

        return jax.lax.scan(step, state, jnp.arange(args.draws))[1]

    keys = jax.random.split(jax.random.key(args.seed), args.chains)
    results = [jax.tree.map(np.asarray, chain(target, key)) for key in keys]
    draws, acceptance, divergent = (np.stack(values) for values in zip(*results, strict=True))
    return draws, float(acceptance.mean()), int(divergent.sum())


def batch_moments(draws) -> targets.Moments:
    """Moments and their standard errors from the spread of batch means."""
    num_chains, n, d = draws.shape
    size = n // BATCHES
    batches = draws[:, : size * BATCHES].reshape(num_chains * BATCHES, size, d)
    mean = batches.mean(axis=(0, 1))
    squares = ((batches - mean) ** 2).mean(axis=1)
    std = np.sqrt(squares.mean(axis=0))
    spread = math.sqrt(len(batches))
    return targets.Moments(
        mean,
        std,
        batches.mean(axis=1).std(axis=0, ddof=1) / spread,
        squares.std(axis=0, ddof=1) / spread / (2 * std),
    )


def importance(args, target, draws):
    """Log evidence, its standard error, effective sample size, and moments by weights, from a fitted Student law."""
    mean, factor = draws.mean(axis=0), np.linalg.cholesky(np.cov(draws, rowvar=False))
    d, block = len(mean), 10_000
    constant = gammaln(0.5 * (FREEDOM + d)) - gammaln(0.5 * FREEDOM) - 0.5 * d * math.log(FREEDOM * math.pi)
    constant -= np.log(np.diag(factor)).sum()

    @jax.jit
    def some(target, key):
        key_normal, key_scale = jax.random.split(key)
        normal = jax.random.normal(key_normal, (block, d))
        scale = jnp.sqrt(FREEDOM / jax.random.chisquare(key_scale, FREEDOM, (block,)))
        whitened = scale[:, None] * normal
        x = mean + whitened @ factor.T
        log_q = constant - 0.5 * (FREEDOM + d) * jnp.log1p(jnp.sum(whitened**2, axis=1) / FREEDOM)
        return x, jax.vmap(target.logdensity)(x) - log_q

    key = jax.random.key(args.seed + 1)
    totals, shift = [], None
    for k in range(math.ceil(args.importance_draws / block)):
        x, log_weights = map(np.asarray, some(target, jax.random.fold_in(key, k)))
        shift = log_weights.max() if shift is None else shift
        weights = np.exp(log_weights - shift)
        gap = x - mean
        # Sums over the block of w, w gap, w gap^2: blocks are the independent repetitions of the standard errors.
        totals.append(np.concatenate([[weights.sum(), (weights**2).sum()], weights @ gap, weights @ gap**2]))
    totals = np.array(totals) / block
    average, num_blocks = totals.mean(axis=0), len(totals)
    ess = num_blocks * block * average[0] ** 2 / average[1]
    log_evidence = float(shift + math.log(average[0]))
    error = math.sqrt((average[1] / average[0] ** 2 - 1) / (num_blocks * block))
    first, second = average[2 : 2 + d] / average[0], average[2 + d :] / average[0]
    std = np.sqrt(second - first**2)
    residual = totals[:, 2 : 2 + d] - totals[:, :1] * first
    first_error = residual.std(axis=0, ddof=1) / average[0] / math.sqrt(num_blocks)
    residual = totals[:, 2 + d :] - 2 * first * totals[:, 2 : 2 + d] + totals[:, :1] * (2 * first**2 - second)
    second_error = residual.std(axis=0, ddof=1) / average[0] / math.sqrt(num_blocks)
    return (
        log_evidence,
        error,
        float(ess),
        targets.Moments(mean + first, std, first_error, second_error / (2 * std)),
    )


def differences(a: targets.Moments, b: targets.Moments) -> np.ndarray:
    """Differences (2, d) of means and of deviations in standard errors."""
    means = (a.mean - b.mean) / np.hypot(a.mean_std_error, b.mean_std_error)
    return np.stack([means, (a.std - b.std) / np.hypot(a.std_std_error, b.std_std_error)])


def coordinate_rows(a: targets.Moments, b: targets.Moments) -> list[dict]:
    """A record for each coordinate."""
    names = ("mean", "std", "mean error", "std error")
    table = [dict(zip(names, values, strict=True)) for values in zip(*a, strict=True)]
    other = [
        dict(zip([f"other {name}" for name in names], values, strict=True)) for values in zip(*b, strict=True)
    ]
    return [{"coordinate": i, **x, **y} for i, (x, y) in enumerate(zip(table, other, strict=True))]
