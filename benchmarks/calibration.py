"""Calibration on images: do posterior intervals cover the truth as often as they say?

Truths are drawn from the prior (the reverse chain of a pretrained network, on the sampler's own grid), measurements
are simulated, and the central 50 % and 90 % intervals of every hidden pixel are taken from the weighted particles.
Averaged over truths from the prior, the exact posterior covers 50 % and 90 %. Pixels of one image are dependent, so a
problem is one observation: the coverage is a mean over problems, with its standard error. The same is done with real
images that the prior never saw, where the prior itself is on trial as well.

Bars: the coverage of prior draws within 3 standard errors, plus what N particles lose (1/N_ess is allowed), of nominal.

Command: ``python -m benchmarks calibration``
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import smcdiff
from benchmarks.common import bar, format_table
from smcdiff import inverse

LEVELS = (0.5, 0.9)


def add_arguments(parser):
    parser.add_argument("--model", default="digits")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--ess-threshold", type=float, default=0.8)


def run(args) -> dict:
    """Coverage for truths from the prior and for held-out images."""
    if args.quick:
        args.problems, args.particles, args.chains, args.steps = 2, 8, 1, 6
    model = smcdiff.load(args.model)
    images, _ = smcdiff.held_out(args.model)
    truths = {"prior draws": prior_draws(model, args), "held-out images": np.asarray(images)[: args.problems]}
    records = [
        one_problem(seed, source, truth, model, args)
        for source, collection in truths.items()
        for seed, truth in enumerate(collection)
    ]
    summary, bars = [], []
    for source in truths:
        group = [record for record in records if record["truths"] == source]
        entry = {
            "truths": source,
            "problems": len(group),
            "median ess": float(np.median([r["ess"] for r in group])),
        }
        for level in LEVELS:
            coverage = np.array([record[f"coverage {level:.0%}"] for record in group])
            error = coverage.std(ddof=1) / np.sqrt(len(coverage))
            entry |= {f"coverage {level:.0%}": coverage.mean(), f"se {level:.0%}": error}
            if source == "prior draws":
                allowed = 3 * error + 1 / entry["median ess"]
                bars.append(bar(f"|coverage - {level:.0%}|, {source}", abs(coverage.mean() - level), allowed))
        summary.append(entry)
    print(format_table(summary))
    settings = {key: getattr(args, key) for key in vars(args) if key != "out"}
    return {
        "title": "Coverage on images",
        "settings": settings,
        "seeds": list(range(args.problems)),
        "rows": records,
        "summary": summary,
        "bars": bars,
    }


def prior_draws(model, args) -> np.ndarray:
    """Ends of the reverse chain, which the posterior's evidence and weights refer to: particles that nothing weighs."""
    times = smcdiff.log_snr_times(model.schedule, args.steps)
    chain = smcdiff.bootstrap(model, Partial(_nothing), times=times)
    return np.asarray(smcdiff.run_smc(jax.random.key(1), chain, args.problems, progress=False).particles.x)[0]


def one_problem(seed, source, truth, model, args) -> dict:
    """Hide the lower half of one image, sample the posterior, and count covered pixels."""
    rows = model.event_shape[0]
    hidden = np.zeros(model.event_shape, bool)
    hidden[rows // 2 :] = True
    key_noise, key_smc = jax.random.split(jax.random.fold_in(jax.random.key(2), seed))
    problem = inverse.simulate_problem(key_noise, inverse.mask(~hidden), truth, args.noise)
    result = smcdiff.posterior(
        key_smc,
        model,
        problem,
        num_particles=args.particles,
        num_chains=args.chains,
        num_steps=args.steps,
        ess_threshold=args.ess_threshold,
        progress=False,
    )
    record = {
        "truths": source,
        "seed": seed,
        "ess": float(1 / np.sum(np.exp(2 * result.pooled_log_weights()))),
    }
    for level in LEVELS:
        low, high = result.quantile(np.array([0.5 - level / 2, 0.5 + level / 2]))
        inside = (truth >= low) & (truth <= high)
        record[f"coverage {level:.0%}"] = float(inside[hidden].mean())
    return record | {"log_evidence": result.pooled_log_evidence()}


def _nothing(x):
    return jnp.zeros((), x.dtype)
