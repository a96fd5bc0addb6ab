"""Effective samples a gradient of hierarchical models, as they are written and with conjugate sites integrated out.

schools   Eight schools: effects theta_j ~ N(mu, tau^2) with known errors; mu ~ N(0, 25), tau ~ HalfCauchy(5).
groups    Twenty groups of five: y_ij ~ N(theta_j, sigma^2), theta_j ~ N(mu, tau^2); mu ~ N(0, 25), tau ~ HalfNormal(2),
          sigma ~ HalfNormal(2). The data are drawn with mu = 1, tau = 0.4, sigma = 1.

NumPyro's NUTS samples each model *centred*, as it is written; *not centred*, with LocScaleReparam; and *marginalised*,
what `smcdiff.ppl.marginalize` leaves: tau, or tau and sigma. mu and theta are then recovered, for each draw. All runs
have the same warm-up and the same acceptance target.

The figure is the minimum over mu, log tau and log sigma of the bulk effective sample size, for a thousand leapfrog
steps after the warm-up: one gradient each, of which those of the marginal model also factorise a matrix. Beside it the
same of theta, the time of a gradient in a compiled loop, and the divergences. A seed is a set of chains.

Bars, by the median over seeds: a gradient of the marginal model is worth at least as much as one of the better of the
others for the parameters, and twice as much for theta; and the posterior mean of log tau agrees with that of the model
that is not centred to 4 standard errors, from the effective sample sizes.

Source of the comparison: "Automatically Marginalized MCMC in Probabilistic Programming", arXiv 2302.00564.

Command: ``python -m benchmarks marginal``
"""

import functools
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam
from scipy.stats import norm, rankdata

from benchmarks.common import bar, format_table
from smcdiff import targets
from smcdiff.ppl import target_from_numpyro
from smcdiff.ppl.marginal import marginalize

FORMS = ("centred", "not centred", "marginalised")


def add_arguments(parser):
    parser.add_argument("--chains", type=int, default=4, help="of each seed")
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=2000, help="of each chain")
    parser.add_argument(
        "--accept", type=float, default=0.8, help="acceptance probability that NUTS is tuned to"
    )
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--evaluations", type=int, default=2000, help="of the timing")


def run(args) -> dict:
    if args.quick:
        args.chains, args.warmup, args.samples, args.seeds, args.evaluations = 2, 20, 20, 1, 10
    models = (
        {"schools": schools_case()} if args.quick else {"schools": schools_case(), "groups": groups_case()}
    )
    rows = []
    for name, (model, data) in models.items():
        for form in FORMS:
            rows += [{"model": name, "form": form, **row} for row in one_form(model, data, form, args)]
    summary = [summarise(rows, name, form) for name in models for form in FORMS]
    print(f"\n{format_table(summary)}", flush=True)
    bars = []
    for name in models:
        *others, marginal = (row for row in summary if row["model"] == name)
        noncentred = others[-1]
        for key, limit in (("ESS / 1000 gradients", 1.0), ("ESS of theta / 1000 gradients", 2.0)):
            gain = marginal[key] / max(row[key] for row in others)
            bars.append(bar(f"{name}: gain in {key} over the better", gain, limit, at_least=True))
        error = np.hypot(marginal["its error"], noncentred["its error"])
        gap = abs(marginal["mean log tau"] - noncentred["mean log tau"]) / error
        bars.append(bar(f"{name}: standard errors between the means of log tau", gap, 4.0))
    return {
        "title": "Effective samples a gradient with conjugate sites integrated out",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")},
        "seeds": list(range(args.seeds)),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def schools(errors, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("groups", errors.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, errors), obs=y)


def groups(index, num_groups, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("groups", num_groups):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    with numpyro.plate("rows", index.shape[0]):
        numpyro.sample("y", dist.Normal(theta[index], sigma), obs=y)


def schools_case():
    exact = targets.eight_schools(centered=True)
    return schools, (np.asarray(exact.errors), np.asarray(exact.effects))


def groups_case():
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(20), 5)
    theta = 1.0 + 0.4 * rng.normal(size=20)
    return groups, (index, 20, (theta[index] + rng.normal(size=100)).astype(np.float32))


def one_form(model, data, form, args):
    """A record for each seed."""
    if form == "not centred":
        model = numpyro.handlers.reparam(model, config={"theta": LocScaleReparam(0.0)})
    sampled = marginalize(model, *data) if form == "marginalised" else model
    sampler = MCMC(
        NUTS(sampled, target_accept_prob=args.accept),
        num_warmup=args.warmup,
        num_samples=args.samples,
        num_chains=args.seeds * args.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(jax.random.key(0), *data, extra_fields=("num_steps", "diverging"))
    draws = dict(sampler.get_samples(group_by_chain=True))
    if form == "marginalised":
        draws |= sampled.recover(jax.random.key(1), draws, *data)
    fields = {name: np.asarray(v) for name, v in sampler.get_extra_fields(group_by_chain=True).items()}
    values = {name: np.asarray(draws[name], float) for name in ("mu", "theta")}
    values |= {f"log {k}": np.log(np.asarray(draws[k], float)) for k in ("tau", "sigma") if k in draws}
    microseconds = gradient_time(target_from_numpyro(sampled, *data), args.evaluations)
    rows = []
    for seed in range(args.seeds):
        chains = slice(seed * args.chains, (seed + 1) * args.chains)
        sizes = {name: bulk_ess(value[chains]) for name, value in values.items()}
        gradients = float(np.sum(fields["num_steps"][chains]))
        smallest = min(size for name, size in sizes.items() if name != "theta")
        log_tau = values["log tau"][chains]
        rows.append(
            {
                "seed": seed,
                "gradients": gradients,
                "ESS": smallest,
                "ESS / 1000 gradients": 1000 * smallest / gradients,
                "ESS of theta / 1000 gradients": 1000 * sizes["theta"] / gradients,
                "us / gradient": microseconds,
                "divergences": int(np.sum(fields["diverging"][chains])),
                "mean log tau": log_tau.mean(),
                "its error": log_tau.std() / np.sqrt(sizes["log tau"]),
            }
        )
    return rows


@functools.partial(jax.jit, static_argnums=2)
def _climb(target, x, num_steps):
    """Gradients at points of which each depends on the one before."""
    return jax.lax.fori_loop(0, num_steps, lambda _, x: x + 1e-6 * target.logdensity_and_score(x)[1], x)


def gradient_time(target, num_steps):
    """Microseconds of a gradient, the best of five loops."""
    x, seconds = target.initial_position(jax.random.key(2)), []
    for _ in range(6):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(_climb(target, x, num_steps))
        seconds.append(time.perf_counter() - begin)
    return 1e6 * min(seconds[1:]) / num_steps


def bulk_ess(draws):
    """Smallest bulk effective sample size of draws (chains, steps, ...): of rank-normalised halves of the chains."""
    draws = draws.reshape(*draws.shape[:2], -1)
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, half : 2 * half]])
    flat = halves.reshape(-1, halves.shape[-1])
    ranks = np.apply_along_axis(rankdata, 0, flat)
    scores = norm.ppf((ranks - 0.375) / (len(flat) + 0.25)).reshape(halves.shape)
    return float(np.min(effective_sample_size(scores)))


def summarise(rows, name, form):
    """Medians over the seeds; the mean of log tau with its error."""
    chosen = [row for row in rows if (row["model"], row["form"]) == (name, form)]
    found = {"model": name, "form": form}
    for key in ("gradients", "ESS", "ESS / 1000 gradients", "ESS of theta / 1000 gradients", "us / gradient"):
        found[key] = float(np.median([row[key] for row in chosen]))
    weights = np.array([row["its error"] for row in chosen]) ** -2.0
    means = np.array([row["mean log tau"] for row in chosen])
    return found | {
        "divergences": sum(row["divergences"] for row in chosen),
        "mean log tau": float(np.sum(weights * means) / np.sum(weights)),
        "its error": float(np.sum(weights) ** -0.5),
    }
