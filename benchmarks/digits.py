"""Posterior sampling of real images where the posterior is known: 8x8 digits under a kernel density.

Prior: the kernel density of the 1797 digits of scikit-learn, divided by 16, with bandwidth 0.1: a mixture with 1797
components. For a linear measurement with Gaussian noise the posterior, its evidence and the posterior probabilities of
the ten classes are closed forms; no network is trained. Truths are drawn from the prior: an image and kernel noise.

Tasks (noise): the upper half of the image (0.1), 16 random pixels (0.1), 2x2 averages (0.05), 8 random pixels (0.05).
Metrics, a measurement each: sliced Wasserstein-1 distance of the weighted particles to as many exact posterior samples,
and its floor between two exact sample sets; total variation of the class posterior; |log evidence error|; least ESS.
A particle's class probabilities are the responsibilities of the prior's components given the particle, which makes
the weighted average an unbiased estimate of the exact class posterior.
Bars: mean distance at most 1.5 times the mean floor (8 pixels: 2) and mean class variation at most 0.02 (8 pixels:
0.05), for one setting of the sampler.
The sampler is `tds` with the twist `smcdiff.guidance.saddlepoint()`. The covariance of a kernel density is a closed
form, so the same numbers are found here without one vector-Jacobian product a direction (`ClosedFormSaddlepoint`; the
tests compare the two): a tenth of the time, the same samples.
Baselines on the same measurements: the same sampler with the pigdm twist, and DPS as plain guidance, its shift of the
denoised sample multiplied by zeta, for two zeta.

Command: ``python -m benchmarks digits``
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import smcdiff
from benchmarks.common import bar, format_table, sliced_wasserstein, total_variation
from smcdiff import guidance, inverse, schedules
from smcdiff.batching import batched_map
from smcdiff.guidance.saddlepoint_twist import twist_at_saddlepoint

BANDWIDTH = 0.1
TASKS = {
    # name: (noise, bar on distance / floor, bar on class variation)
    "half the image": (0.1, 1.5, 0.02),
    "16 random pixels": (0.1, 1.5, 0.02),
    "2x2 average": (0.05, 1.5, 0.02),
    "8 random pixels": (0.05, 2.0, 0.05),
}
ZETAS = (0.1, 1.0)


def add_arguments(parser):
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--measurements", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ess-threshold", type=float, default=0.8)
    parser.add_argument("--log-snr-min", type=float, default=-3.0)
    parser.add_argument("--log-snr-max", type=float, default=5.0)
    parser.add_argument("--twist-steps", type=int, default=4, help="of the saddlepoint")
    parser.add_argument("--batch-size", type=int, default=250, help="particles moved together")
    parser.add_argument("--no-baselines", action="store_true")


def run(args) -> dict:
    components = 1797
    if args.quick:
        args.tasks, args.measurements, args.particles, args.steps = ["8 random pixels"], 1, 32, 6
        args.no_baselines, components = True, 100
    images, labels = load_digits(components)
    schedule = schedules.cosine(-9.0)
    model = smcdiff.EmpiricalDiffusion(jnp.asarray(images), BANDWIDTH, schedule)
    times = smcdiff.log_snr_times(
        schedule, args.steps, log_snr_min=args.log_snr_min, log_snr_max=args.log_snr_max
    )
    seeds = range(args.first_seed, args.first_seed + args.measurements)
    rows = []
    for task in args.tasks:
        for seed in seeds:
            rows += one_measurement(seed, task, model, labels, times, args)
    summary, bars = [], []
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    for task in args.tasks:
        for sampler in samplers:
            records = [row for row in rows if row["task"] == task and row["sampler"] == sampler]
            summary.append({"task": task, "sampler": sampler} | summarise(records))
            if sampler == "tds":
                _, most_ratio, most_variation = TASKS[task]
                bars.append(bar(f"distance / floor, {task}", summary[-1]["sw1 / floor"], most_ratio))
                bars.append(bar(f"class variation, {task}", summary[-1]["class tv"], most_variation))
    print(format_table(summary))
    return {
        "title": "8x8 digits with exact posterior",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"schedule": "cosine(-9)", "projections": 100, "bandwidth": BANDWIDTH, "components": components},
        "seeds": list(seeds),
        "rows": rows,
        "summary": summary,
        "bars": bars,
    }


def load_digits(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 8, 8) between 0 and 1, and labels."""
    from sklearn.datasets import load_digits  # an optional dependency: only this benchmark needs it

    digits = load_digits()
    return (digits.images[:num_images] / 16.0).astype(np.float32), digits.target[:num_images]


def draw_problem(rng_key, task: str, images) -> smcdiff.InverseProblem:
    """A new operator where it is random, a truth from the prior, and its measurement."""
    key_operator, key_image, key_kernel, key_noise = jax.random.split(rng_key, 4)
    shape = images.shape[1:]
    if task == "half the image":
        operator = inverse.mask(np.arange(8)[:, None] < np.full(8, 4)[None])
    elif task == "2x2 average":
        operator = inverse.downsample(shape, 2)
    else:
        operator = inverse.random_mask(key_operator, shape, int(task.split()[0]))
    truth = images[jax.random.randint(key_image, (), 0, len(images))]
    truth = truth + BANDWIDTH * jax.random.normal(key_kernel, shape)
    return inverse.simulate_problem(key_noise, operator, truth, TASKS[task][0])


def one_measurement(seed: int, task: str, model, labels, times, args) -> list[dict]:
    """All samplers on one measurement, and the exact posterior against itself."""
    key_problem, key_smc, key_reference, key_floor = jax.random.split(jax.random.key(seed), 4)
    problem = draw_problem(key_problem, task, model.data)
    prior = model.exact()
    noise_std = np.asarray(problem.noise.std, float)
    exact, log_evidence = prior.posterior(problem.operator.matrix(), np.asarray(problem.y), noise_std)
    classes = np.bincount(labels, np.exp(np.asarray(exact.mixture.log_weights, float)), minlength=10)
    reference = exact.mixture.sample(key_reference, args.particles)

    def measure(sampler, samples, log_weights=None, **more):
        weights = (
            np.full(len(samples), 1 / len(samples))
            if log_weights is None
            else np.exp(log_weights.astype(float))
        )
        average = _mean_responsibilities(prior.mixture, samples, weights / weights.sum())
        found = np.bincount(labels, np.asarray(average, float), minlength=10)
        return {
            "task": task,
            "sampler": sampler,
            "seed": seed,
            "sw1": sliced_wasserstein(samples, reference, x_weights=weights),
            "class_tv": total_variation(found, classes),
            **more,
        }

    records = [measure("exact", exact.mixture.sample(key_floor, args.particles))]
    twists = {"tds": ClosedFormSaddlepoint(args.twist_steps)}
    if not args.no_baselines:
        twists["tds, pigdm twist"] = guidance.pigdm
    for name, twist in twists.items():
        fk = smcdiff.tds(model, problem, times=times, twist=twist)
        result = smcdiff.run_smc(
            key_smc,
            fk,
            args.particles,
            ess_threshold=args.ess_threshold,
            batch_size=args.batch_size,
            progress=False,
        )
        extra = {
            "log_evidence_exact": log_evidence,
            "log_evidence_error": float(result.log_evidence[0]) - log_evidence,
            "ess": float(result.ess[0, -1]),
            "ess_min": float(result.ess.min()),
            "num_resampled": int(np.sum(result.info.resampled)),
        }
        records.append(measure(name, result.particles.x[0], result.log_weights[0], **extra))
    if not args.no_baselines:
        for zeta in ZETAS:
            samples = _dps(key_smc, model, problem, times, zeta, args.particles, args.batch_size)
            records.append(measure(f"DPS, zeta {zeta:g}", samples))
    floor = records[0]["sw1"]
    return [record | {"floor": floor, "ratio": record["sw1"] / floor} for record in records]


def summarise(records) -> dict:
    """Means over measurements, with medians beside them."""

    def value(name):
        return np.array([record.get(name, np.nan) for record in records], float)

    summary = {
        "sw1": value("sw1").mean(),
        "floor": value("floor").mean(),
        "sw1 / floor": value("sw1").mean() / value("floor").mean(),
        "median sw1 / floor": np.median(value("ratio")),
        "class tv": value("class_tv").mean(),
        "median class tv": np.median(value("class_tv")),
    }
    if "log_evidence_error" in records[0]:
        error = np.abs(value("log_evidence_error"))
        summary |= {
            "abs log evidence error": error.mean(),
            "median abs log evidence error": np.median(error),
            "least ess": value("ess_min").min(),
        }
    return summary


class ClosedFormSaddlepoint(eqx.Module):
    """The twist of `smcdiff.guidance.saddlepoint`, for a kernel density.

    Given x_t and a tilt lambda, x_0 is a mixture over the data, with the variance h b^2, the means
    g x_t + h data_k + h b^2 lambda, and weights w_k that are multiplied by exp(h data_k . lambda); b is the bandwidth
    and h = sigma^2 / (alpha^2 b^2 + sigma^2). Hence its covariance is h b^2 I + h^2 Cov_w[data].
    """

    num_steps: int = eqx.field(static=True)

    def __call__(self, model, problem, x, t):
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        variance = (alpha * model.bandwidth) ** 2 + sigma**2
        keep = sigma**2 / variance
        within = keep * model.bandwidth**2
        data, flat = model.data.reshape(len(model.data), -1), x.reshape(-1)
        logits = data @ (alpha / variance * flat) - 0.5 * alpha**2 / variance * jnp.sum(data**2, axis=1)
        centre = alpha * model.bandwidth**2 / variance * flat

        # In deviations of the noise, and around the measurement: few digits are lost in the second moments.
        std = jnp.sqrt(problem.noise.variance(problem.y.shape)).reshape(-1)
        matrix = problem.operator.matrix() / std[:, None]
        offsets = jax.vmap(lambda image: -problem.residual(image).reshape(-1) / std)(model.data)
        fixed = matrix @ centre + (keep - 1.0) * problem.y.reshape(-1) / std
        rows, columns = np.triu_indices(len(std))
        products = offsets[:, rows] * offsets[:, columns]
        own = jnp.eye(len(std)) + within * matrix @ matrix.T

        def evaluate(eta):
            weights = jax.nn.softmax(logits + keep * offsets @ eta)
            mean, second = weights @ offsets, weights @ products
            upper = jnp.zeros_like(own).at[rows, columns].set(second - mean[rows] * mean[columns])
            between = upper + upper.T - jnp.diag(jnp.diag(upper))
            denoised = centre + keep * weights @ data + within * matrix.T @ eta
            gradient = fixed + keep * mean + own @ eta
            return denoised.reshape(x.shape), gradient, own + keep**2 * between

        return twist_at_saddlepoint(evaluate, problem, self.num_steps)


@jax.jit
def _mean_responsibilities(mixture, samples, weights):
    return weights.astype(samples.dtype) @ jax.vmap(mixture.responsibilities)(samples)


def _dps_program(rng_key, model, problem, times, zeta, num_samples, batch_size):
    """Ancestral steps towards the denoised sample plus ``zeta`` times the shift of `smcdiff.guidance.dps`; no weights.

    Source: Chung et al., "Diffusion Posterior Sampling", arXiv 2209.14687, with the likelihood's own scale.
    """

    def move(key, x, t, s):
        value = guidance.dps(model, problem, x, t)
        guided = value.denoised + jnp.where(s > 0, zeta, 0.0) * value.shift
        mean, std = smcdiff.reverse_transition(model.schedule, x, guided, t, s)
        return mean + std * jax.random.normal(key, x.shape)

    def step(x, inputs):
        k, t, s = inputs
        keys = jax.random.split(jax.random.fold_in(rng_key, k), num_samples)
        return batched_map(lambda key, x: move(key, x, t, s), batch_size)(keys, x), None

    start = model.schedule.sigma(times[0]) * jax.random.normal(rng_key, (num_samples, *model.event_shape))
    return jax.lax.scan(step, start, (jnp.arange(len(times) - 1), times[:-1], times[1:]))[0]


_dps = jax.jit(_dps_program, static_argnames=("num_samples", "batch_size"))
