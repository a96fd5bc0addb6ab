"""Joint posteriors of a diffusion prior and unknown parameters, in NumPyro models, by `smcdiff.infer`.

Six parts:

* nuts: a mixture prior in two dimensions, unknown gain and noise, three measurements. NumPyro's NUTS samples the same
  model with the prior's exact density; posterior means and deviations are compared, in Monte Carlo standard errors of
  both.
* sbc: simulation-based calibration of that model: parameters and sample are drawn from the prior, data are simulated,
  and the rank of every truth among thinned posterior draws is uniform if the posterior is right. A chi-square test over
  ten bins for each of the four quantities; one of four p-values falls below .0025 with probability .01 for a right
  sampler.
* digits: images drawn from a pretrained prior, blurred by a Gaussian of unknown width and with unknown noise, both
  drawn from their priors: how often the central 90 % intervals cover the true width, noise and pixels.
* mnist: the same of real images of 28x28 pixels that the prior was not trained on, by the auxiliary gradient sampler
  (`smcdiff.ppl.AuxiliaryGradient`), where particle Gibbs does not come to an end. How often pixels are covered judges
  the prior, too.
* split: the same by split Gibbs (`smcdiff.ppl.SplitGibbs`), whose prior is blurred.
* noncentred: two images of 28x28 pixels that are drawn from the prior, by slice sampling of the non-centred model
  (`smcdiff.ppl.noncenter`): exact for the law of the discrete reverse process, and slow.

Bars: errors of means and deviations within 3 standard errors and R-hat <= 1.01; p-values >= .0025; coverage of pixels
within 3 standard errors of .9 (digits and mnist); the largest R-hat of width and noise on mnist, and the largest median
R-hat of the pixels, <= 1.05. Most pixels of mnist are background, which the posterior knows to a quarter of a grey
level: the bar counts the pixels whose deviation is more than one grey level, 1/255, and the table has both.

Command: ``python -m benchmarks joint``; ``--parts digits --keep`` measures one of them anew.
"""

import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from scipy import stats

import smcdiff
from benchmarks.common import bar, format_table
from smcdiff import analytic, inverse, schedules
from smcdiff.mcmc.hit_and_run_slice import hit_and_run_slice
from smcdiff.ppl import (
    AuxiliaryGradient,
    ParticleGibbs,
    SplitGibbs,
    as_numpyro_kernel,
    gibbs_sweep,
    noise_slice,
    noncenter,
)

KEYS = ("part",)
PARTS = ("nuts", "sbc", "digits", "mnist", "split", "noncentred")
MATRIX = jnp.array([[1.0, 0.5], [0.2, 1.0], [0.7, -0.4]])
Y = jnp.array([0.3, -0.6, 0.9])


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="reverse steps of the mixture's chain")
    parser.add_argument("--samples", type=int, default=4000, help="sweeps of a chain beside NUTS")
    parser.add_argument("--data-sets", type=int, default=200, help="of simulation-based calibration")
    parser.add_argument(
        "--sweeps", type=int, default=600, help="of a data set, of which the first sixth is dropped"
    )
    parser.add_argument("--batch-size", type=int, default=10, help="data sets that one core does together")
    parser.add_argument("--digits", type=int, default=12, help="images of 8x8 pixels")
    parser.add_argument(
        "--digit-sweeps", type=int, default=240, help="of a chain, of which the first third is dropped"
    )
    parser.add_argument("--digit-steps", type=int, default=40, help="reverse steps of an image")
    parser.add_argument("--mnist", type=int, default=12, help="real images of 28x28 pixels")
    parser.add_argument(
        "--mnist-sweeps", type=int, default=2400, help="of a chain, of which the first third is dropped"
    )
    parser.add_argument(
        "--rho", type=float, default=0.05, help="noise of the copy of an image in split Gibbs"
    )
    parser.add_argument("--noncentred", type=int, default=2, help="images of 28x28 pixels")
    parser.add_argument("--noncentred-sweeps", type=int, default=300)


def run(args) -> dict:
    """Every part, with its rows and bars."""
    if args.quick:
        args.samples, args.data_sets, args.sweeps, args.digits = 20, 10, 24, 1
        args.digit_sweeps, args.digit_steps, args.steps, args.particles = 9, 3, 6, 2
        args.mnist, args.mnist_sweeps, args.noncentred, args.noncentred_sweeps = 1, 9, 1, 9
    rows, summary, bars = [], [], []
    for part in args.parts:
        start = time.perf_counter()
        measure = {"nuts": against_nuts, "sbc": calibration}.get(part, functools.partial(images, part=part))
        found = measure(args)
        rows += [{"part": part} | row for row in found[0]]
        summary += [{"part": part} | row | {"seconds": time.perf_counter() - start} for row in found[1]]
        bars += found[2]
    print(format_table(summary))
    settings = {key: getattr(args, key) for key in vars(args) if key != "out"}
    return {
        "title": "A diffusion prior inside a NumPyro model",
        "settings": settings,
        "seeds": [0],
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def mixture():
    """The prior: two modes of unequal weight."""
    means, covariance = jnp.array([[-1.5, 0.5], [1.0, -1.0]]), jnp.array([[0.3, 0.1], [0.1, 0.2]])
    return analytic.GaussianMixtureDiffusion.create(jnp.array([0.7, 0.3]), means, covariance, schedules.vp())


def linear(prior, matrix, y=None):
    """Unknown gain and noise of a linear measurement."""
    gain = numpyro.sample("gain", dist.Normal(1.0, 0.3))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    x = numpyro.sample("x", smcdiff.DiffusionPrior(prior))
    numpyro.sample("y", dist.Normal(gain * (matrix @ x), noise).to_event(1), obs=y)


def features(samples):
    """Gain, log noise and both coordinates."""
    x = np.asarray(samples["x"])
    return np.stack([np.asarray(samples["gain"]), np.log(samples["noise"]), x[..., 0], x[..., 1]], -1)


QUANTITIES = ("gain", "log noise", "x[0]", "x[1]")


def against_nuts(args):
    """Four chains of both."""
    kernels = {"x": functools.partial(ParticleGibbs, num_particles=args.particles, num_steps=args.steps)}
    warm = args.samples // 4
    ours = smcdiff.infer(
        jax.random.key(0),
        linear,
        mixture(),
        MATRIX,
        Y,
        kernels=kernels,
        num_warmup=warm,
        num_samples=args.samples,
    )
    # NUTS alone does not move between the modes of x often enough for this comparison: hence many of its draws.
    nuts = MCMC(
        NUTS(linear), num_warmup=1000, num_samples=20 * args.samples, num_chains=4, chain_method="vectorized"
    )
    nuts.run(jax.random.key(1), mixture(), MATRIX, Y)
    found, exact = features(ours.samples), features(nuts.get_samples(group_by_chain=True))
    rows, bars = [], []
    for i, name in enumerate(QUANTITIES):
        a, b = found[..., i].astype(float), exact[..., i].astype(float)
        mean_error = np.hypot(*(_standard_error(v) for v in (a, b)))
        std_error = np.hypot(*(_standard_error((v - v.mean()) ** 2) / (2 * v.std()) for v in (a, b)))
        rows.append(
            {
                "quantity": name,
                "mean": a.mean(),
                "NUTS": b.mean(),
                "error / se": (a.mean() - b.mean()) / mean_error,
                "deviation": a.std(),
                "NUTS's": b.std(),
                "its error / se": (a.std() - b.std()) / std_error,
                "R-hat": float(az.rhat(a)),
                "R-hat of NUTS": float(az.rhat(b)),
                "ess": float(az.ess(a)),
            }
        )
    worst = max(max(abs(row["error / se"]), abs(row["its error / se"])) for row in rows)
    bars.append(bar("largest error of a mean or a deviation against NUTS, in standard errors", worst, 3.0))
    bars.append(bar("largest R-hat of four chains", max(row["R-hat"] for row in rows), 1.01))
    return rows, rows, bars


def _standard_error(x):
    """Of the mean of chains."""
    return x.std() / np.sqrt(float(az.ess(x, method="mean")))


def calibration(args):
    """Ranks of the truths of simulated data sets."""
    prior, count = mixture(), args.data_sets
    rng_key = jax.random.key(2)
    keys = jax.random.split(rng_key, 4)
    x = prior.mixture.sample(keys[0], count)
    gain = 1.0 + 0.3 * jax.random.normal(keys[1], (count,))
    noise = jnp.exp(-1.0 + 0.5 * jax.random.normal(keys[2], (count,)))
    y = gain[:, None] * x @ MATRIX.T + noise[:, None] * jax.random.normal(keys[3], (count, 3))
    keys = jax.random.split(jax.random.key(3), count)

    # Vectorised chains all wait for the longest trajectory of NUTS, so that a few at a time on each core are faster.
    def posteriors(start):
        some = slice(start, start + args.batch_size)
        draws = _posteriors(keys[some], prior, y[some], args.particles, args.steps, args.sweeps)
        return features(jax.tree.map(lambda leaf: leaf[:, args.sweeps // 6 :], draws))

    first = posteriors(0)  # alone, since the others need the program that it compiles
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        others = list(pool.map(posteriors, range(args.batch_size, count, args.batch_size)))
    values = np.concatenate([first, *others])
    truths = features({"x": x, "gain": gain, "noise": noise})
    rows, summary = [], []
    for i, name in enumerate(QUANTITIES):
        # Thinned to draws that are nearly independent, so that ranks are those of independent draws.
        ess = np.median([float(az.ess(chain[None, :, i])) for chain in values[:20]])
        thin = max(1, int(np.ceil(2.0 * values.shape[1] / ess)))
        kept = values[:, ::thin, i]
        ranks = (kept < truths[:, i, None]).sum(1)
        bins = np.bincount(np.minimum(ranks * 10 // (kept.shape[1] + 1), 9), minlength=10)
        expected = np.bincount(np.arange(kept.shape[1] + 1) * 10 // (kept.shape[1] + 1), minlength=10)
        chance = stats.chisquare(bins, count * expected / expected.sum()).pvalue
        rows.append({"quantity": name, "ranks": ranks.tolist(), "draws": kept.shape[1]})
        summary.append(
            {"quantity": name, "data sets": count, "draws": kept.shape[1], "p-value": float(chance)}
        )
    return (
        rows,
        summary,
        [
            bar(
                "smallest p-value of rank uniformity",
                min(r["p-value"] for r in summary),
                0.0025,
                at_least=True,
            )
        ],
    )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _posteriors(keys, prior, y, particles, steps, sweeps):
    """One chain for each data set."""

    def chain(key, y):
        kernels = {"x": functools.partial(ParticleGibbs, num_particles=particles, num_steps=steps)}
        sweep = gibbs_sweep(linear, prior, MATRIX, y, kernels=kernels, num_warmup=sweeps // 6)

        def step(state, k):
            state, _ = sweep.step(jax.random.fold_in(key, k), state)
            return state, state.position

        return jax.lax.scan(step, sweep.init(None, key), jnp.arange(sweeps))[1]

    return jax.vmap(chain)(keys, y)


WIDTH, NOISE = (-0.2, 0.3), (-2.0, 0.5)  # mean and deviation of the logarithm


def blurred(prior, y=None):
    """A blurred image: unknown width, in pixels, and unknown noise."""
    width = numpyro.sample("width", dist.LogNormal(*WIDTH))
    noise = numpyro.sample("noise", dist.LogNormal(*NOISE))
    x = numpyro.sample("x", smcdiff.DiffusionPrior(prior))
    blur = inverse.gaussian_blur(prior.event_shape, width, size=7)
    numpyro.sample("y", dist.Normal(blur(x), noise).to_event(len(prior.event_shape)), obs=y)


def images(args, part):
    """Coverage of 90 % intervals, with image, width and noise drawn from their priors, and whether two chains agree."""
    count = {"digits": args.digits, "noncentred": args.noncentred}.get(part, args.mnist)
    # Processes, as NumPyro's handlers are not made for threads.
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(functools.partial(one_image, args, part), range(count)))
    covered = "pixels covered" if part == "digits" else "uncertain pixels covered"
    pixels = np.array([row[covered] for row in rows])
    se = pixels.std(ddof=1) / np.sqrt(len(pixels)) if len(pixels) > 1 else float("nan")
    summary = {
        "images": len(rows),
        "pixels": np.mean([row["pixels covered"] for row in rows]),
        "uncertain pixels": np.mean([row["uncertain pixels covered"] for row in rows]),
        "se": se,
        **{name: np.mean([row[f"{name} covered"] for row in rows]) for name in ("width", "noise")},
        "rms error": np.mean([row["rms error"] for row in rows]),
        "rms error of y": np.mean([row["rms error of y"] for row in rows]),
        "largest R-hat": max(row[f"{name} R-hat"] for row in rows for name in ("width", "noise")),
        "largest median R-hat of pixels": max(row["median R-hat of pixels"] for row in rows),
    }
    bars = []
    if part in ("digits", "mnist"):
        bars.append(bar(f"|coverage of pixels - .9|, {part}", abs(pixels.mean() - 0.9), 3 * se))
    if part == "mnist":
        for of in ("R-hat", "median R-hat of pixels"):
            bars.append(bar(f"largest {of}, {part}", summary[f"largest {of}"], 1.05))
    return rows, [summary], bars


def one_image(args, part, seed) -> dict:
    """Two chains on one measurement."""
    model, steps = smcdiff.load("digits" if part == "digits" else "mnist"), args.digit_steps
    order, sweeps, sampled, drawn = 2, args.mnist_sweeps, blurred, "x"
    if part == "digits":
        sweeps = args.digit_sweeps
        kernels = {"x": functools.partial(ParticleGibbs, num_particles=args.particles, num_steps=steps)}
    elif part == "noncentred":
        order, sweeps, sampled = 1, args.noncentred_sweeps, noncenter(blurred, num_steps=steps, order=1)
        slices = functools.partial(hit_and_run_slice, width=0.1)  # of logarithms known to some hundredths
        kernels = {
            ("width", "noise"): functools.partial(as_numpyro_kernel, builder=slices),
            "x_noise": noise_slice,
        }
    elif part == "split":
        drawn, kernels = "x_denoised", {"x": functools.partial(SplitGibbs, rho=args.rho)}
    else:
        kernels = {"x": AuxiliaryGradient}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(4), seed), 5)
    if part in ("mnist", "split"):
        image = smcdiff.held_out("mnist")[0][seed]
    else:  # the law of the same chain that is conditioned, so that the intervals should cover at their rate
        times = smcdiff.log_snr_times(model.schedule, steps)
        image = np.asarray(smcdiff.reverse_sample(keys[4], model, times, 1, order=order)[0])
    width, noise = (
        float(jnp.exp(mean + std * jax.random.normal(key)))
        for key, (mean, std) in zip(keys, (WIDTH, NOISE), strict=False)
    )
    blur = inverse.gaussian_blur(model.event_shape, width, size=7)
    y = blur(jnp.asarray(image)) + noise * jax.random.normal(keys[2], model.event_shape)
    warm = sweeps // 3
    trace = smcdiff.infer(
        keys[3],
        sampled,
        model,
        y,
        kernels=kernels,
        num_warmup=warm,
        num_samples=sweeps - warm,
        num_chains=2,
        progress=False,
    )
    x = trace.samples[drawn]
    low, high = (np.quantile(x, q, axis=(0, 1)) for q in (0.05, 0.95))
    row = {"seed": seed, "width": width, "noise": noise}
    for name, truth in (("width", width), ("noise", noise)):
        values = trace.samples[name]
        row |= {
            f"{name} found": float(values.mean()),
            f"{name} covered": bool(np.quantile(values, 0.05) <= truth <= np.quantile(values, 0.95)),
            f"{name} R-hat": float(az.rhat(values.astype(float))),
        }
    is_covered, is_uncertain = (image >= low) & (image <= high), x.std((0, 1)) > 1 / 255
    row |= {
        "pixels covered": float(is_covered.mean()),
        "uncertain pixels": int(is_uncertain.sum()),
        "uncertain pixels covered": float(is_covered[is_uncertain].mean()),
        "median R-hat of pixels": float(np.median(smcdiff.diagnostics.rhat(x))),
        "rms error": float(np.sqrt(np.mean((x.mean((0, 1)) - image) ** 2))),
        "rms error of y": float(np.sqrt(np.mean((np.asarray(y) - image) ** 2))),
    }
    print(format_table([row]), flush=True)
    return row
