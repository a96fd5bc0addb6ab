"""The evidence estimate against closed forms: right in the mean, at any number of particles and steps.

Twisted SMC estimates the evidence of the discretised chain, E[p(y | x_0)] under the reverse chain of the prior, not
that of the exact diffusion. For Gaussian data the denoiser is affine, so the chain is linear-Gaussian and its evidence
a closed form: mean and covariance of the state (x, previous denoised sample) are propagated in double precision by
NumPy, apart from the sampler's code.

1. accuracy: log evidence of Gaussian data against the chain's closed form, 25, 100 and 400 steps, first and second
   order, isotropic and full covariance, asymmetric means. Bar: within 3 standard errors. The chain's own distance to
   the continuous limit is shown beside it.
2. unbiasedness: mean of exp(log Z_hat) / Z over 400 runs of only 8 particles, for Gaussian data (Z in closed form) and
   for a mixture (Z from plain Monte Carlo on the prior chain, its standard error included). Bar: within 3 standard
   errors of 1.

The standard errors come from the spread over independent runs. Of 18 checks one fails by chance in 5 % of all seeds.

Command: ``python -m benchmarks evidence``
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

import smcdiff
from benchmarks.common import bar, format_table
from smcdiff import inverse, schedules

__all__ = ["chain_log_evidence", "prior_chain_evidence"]


def add_arguments(parser):
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 100, 400])
    parser.add_argument("--orders", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--particles", type=int, default=256, help="of the accuracy runs")
    parser.add_argument("--chains", type=int, default=64, help="of the accuracy runs")
    parser.add_argument("--few-particles", type=int, default=8, help="of the unbiasedness runs")
    parser.add_argument("--runs", type=int, default=400, help="of the unbiasedness check")
    parser.add_argument("--reference-samples", type=int, default=1_000_000, help="for the mixture's evidence")
    parser.add_argument("--seed", type=int, default=0)


def run(args) -> dict:
    cases = ["isotropic", "full covariance"]
    if args.quick:
        # The same sizes in both checks: they share their compiled programs.
        args.steps, args.particles, args.chains, args.few_particles, args.runs = [20], 8, 20, 8, 20
        args.orders, cases = [2], ["full covariance"]
    schedule = schedules.cosine(-9.0)
    gaussian = {name: gaussian_cases(schedule)[name] for name in cases}
    mixture = {} if args.quick else mixture_cases(schedule)
    accuracy, few = (args.particles, args.chains), (args.few_particles, args.runs)
    checks = [
        ("accuracy", name, case, order, num_steps, *accuracy)
        for name, case in gaussian.items()
        for order in args.orders
        for num_steps in args.steps
    ]
    checks += [
        ("unbiasedness", name, case, order, args.steps[0], *few)
        for name, case in (gaussian | mixture).items()
        for order in args.orders
    ]
    key = jax.random.key(args.seed)
    rows = [
        one_check(jax.random.fold_in(key, index), *check, args.reference_samples)
        for index, check in enumerate(checks)
    ]
    print(format_table(rows))
    return {
        "title": "Evidence estimates against closed forms",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "quick")}
        | {"schedule": "cosine(-9)"},
        "seeds": [args.seed],
        "rows": rows,
        "summary": rows,
        "bars": [
            bar(
                f"{row['check']}: standard errors off, {row['data']}, order {row['order']}, {row['steps']} steps",
                abs(row["z score"]),
                3.0,
            )
            for row in rows
        ],
    }


def one_check(
    rng_key, check, name, case, order, num_steps, num_particles, num_chains, reference_samples
) -> dict:
    """Mean evidence of independent runs over the reference's, and how many standard errors it lies from 1."""
    model, problem = case
    times = smcdiff.log_snr_times(model.schedule, num_steps)
    key_smc, key_reference = jax.random.split(rng_key)
    if name == "mixture":
        reference, reference_error = prior_chain_evidence(
            key_reference, model, problem, times, order, reference_samples
        )
    else:
        reference, reference_error = chain_log_evidence(model, problem, times, order), 0.0
    fk = smcdiff.tds(model, problem, times=times, order=order)
    result = smcdiff.run_smc(key_smc, fk, num_particles, num_chains=num_chains, progress=False)
    ratio = np.exp(np.asarray(result.log_evidence, float) - reference)
    error = math.hypot(ratio.std(ddof=1) / math.sqrt(num_chains), reference_error)
    return {
        "check": check,
        "data": name,
        "order": order,
        "steps": num_steps,
        "particles": num_particles,
        "runs": num_chains,
        "log evidence": reference,
        "mean Z_hat / Z": ratio.mean(),
        "standard error": error,
        "z score": (ratio.mean() - 1) / error,
        "chain - limit": reference - _exact(model, problem),
    }


def chain_log_evidence(model, problem, times, order: int = 2) -> float:
    """Log evidence of Gaussian data under the discretised reverse chain that `smcdiff.tds` weighs, in closed form.

    The chain: x ~ N(0, sigma_1^2 I) at t = 1; each step from t to s is Gaussian with the mean a x + (alpha_s - a
    alpha_t) x0 and the deviation c, where a = sqrt(sigma_s^2 - c^2) / sigma_t and x0 is the denoised sample,
    extrapolated from the previous step at second order; the last step returns the denoised sample, with no
    extrapolation and no noise. All of it is affine in (x, previous denoised sample).

    Parameters
    ----------
    model
        `smcdiff.GaussianDiffusion`.
    problem
        Linear-Gaussian measurement.
    times
        Grid from 1 to 0.
    order
        1 or 2.
    """
    if len(model.mixture.log_weights) != 1:
        raise ValueError("a closed form needs Gaussian data, a mixture of one component.")
    centre = np.asarray(model.mixture.component_means(), float).ravel()
    covariance = np.asarray(model.mixture.component_covariances(), float)[0]
    alphas, sigmas = (np.asarray(f(times), float) for f in (model.schedule.alpha, model.schedule.sigma))
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas) - np.log(sigmas)
    d, eye = len(centre), np.eye(len(centre))

    mean, spread = np.zeros(2 * d), np.zeros((2 * d, 2 * d))
    spread[:d, :d] = sigmas[0] ** 2 * eye
    last = len(times) - 2
    for k in range(last + 1):
        alpha_t, sigma_t, alpha_s, sigma_s = alphas[k], sigmas[k], alphas[k + 1], sigmas[k + 1]
        slope = np.linalg.solve(alpha_t**2 * covariance + sigma_t**2 * eye, alpha_t * covariance).T
        offset = centre - alpha_t * slope @ centre
        share = 0.0
        if order == 2 and 0 < k < last:
            share = 0.5 * (log_snr[k + 1] - log_snr[k]) / (log_snr[k] - log_snr[k - 1])
        noise = sigma_s**2 * (
            1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
        )  # variance of an ancestral step
        keep = math.sqrt(sigma_s**2 - noise) / sigma_t
        gain = alpha_s - keep * alpha_t
        top = [keep * eye + gain * (1 + share) * slope, -gain * share * eye]
        transition = np.block([top, [slope, np.zeros((d, d))]])
        mean = transition @ mean + np.concatenate([gain * (1 + share) * offset, offset])
        spread = transition @ spread @ transition.T
        spread[:d, :d] += noise * eye

    matrix = np.asarray(problem.operator.matrix(), float)
    residual = np.asarray(problem.y, float).ravel() - matrix @ mean[:d]
    variance = np.asarray(problem.noise.variance(problem.y.shape), float).ravel()
    total = matrix @ spread[:d, :d] @ matrix.T + np.diag(variance)
    return float(
        -0.5 * (residual @ np.linalg.solve(total, residual) + np.linalg.slogdet(2 * np.pi * total)[1])
    )


def prior_chain_evidence(rng_key, model, problem, times, order: int, num_samples: int) -> tuple[float, float]:
    """Log evidence under the discretised chain by plain Monte Carlo, and its relative standard error."""
    block = min(num_samples, 50_000)
    num_blocks = max(1, num_samples // block)
    keys = jax.random.split(rng_key, num_blocks)
    log_likelihood = np.concatenate(
        [_prior_chain(key, model, problem, times, order, block) for key in keys]
    ).astype(float)
    largest = log_likelihood.max()
    likelihood = np.exp(log_likelihood - largest)
    error = likelihood.std() / likelihood.mean() / math.sqrt(len(likelihood))
    return float(largest + np.log(likelihood.mean())), float(error)


def _prior_chain(rng_key, model, problem, times, order, num_samples):
    """Log likelihoods at the ends of ``num_samples`` unsteered chains, written out anew from the definition."""
    alphas, sigmas = (
        np.asarray(model.schedule.alpha(times), float),
        np.asarray(model.schedule.sigma(times), float),
    )
    key_start, key_steps = jax.random.split(rng_key)
    x = sigmas[0] * jax.random.normal(key_start, (num_samples, *model.event_shape))
    previous, last = x, len(times) - 2
    for k in range(last + 1):
        share = 0.0
        if order == 2 and 0 < k < last:
            log_snr = np.log(alphas[k - 1 : k + 2] / sigmas[k - 1 : k + 2])
            share = 0.5 * (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0])
        # x_s given x_t and x_0: the average of what both say, weighted by precision.
        ratio = alphas[k] / alphas[k + 1]
        forward = sigmas[k] ** 2 - ratio**2 * sigmas[k + 1] ** 2
        from_x, from_x0 = (
            ratio * sigmas[k + 1] ** 2 / sigmas[k] ** 2,
            alphas[k + 1] * forward / sigmas[k] ** 2,
        )
        std = np.sqrt(forward) * sigmas[k + 1] / sigmas[k]
        numbers = jnp.asarray([share, from_x, from_x0, std])
        x, previous = _prior_step(jax.random.fold_in(key_steps, k), model, x, previous, times[k], numbers)
    return jax.vmap(problem.log_likelihood)(x)


@jax.jit
def _prior_step(rng_key, model, x, previous, t, numbers):
    share, from_x, from_x0, std = numbers
    x0 = jax.vmap(model.denoise, (0, None))(x, t)
    mean = from_x * x + from_x0 * (x0 + share * (x0 - previous))
    return mean + std * jax.random.normal(rng_key, x.shape), x0


def gaussian_cases(schedule) -> dict:
    """Gaussian data with asymmetric means, isotropic and correlated, each with a measurement."""
    rng = np.random.default_rng(3)
    isotropic = smcdiff.GaussianDiffusion(np.array([1.5, -0.7, 0.4, 2.0]), 0.6, schedule)
    root = rng.normal(size=(4, 4))
    full = smcdiff.GaussianDiffusion(
        np.array([-1.0, 2.5, 0.3, 0.9]), root @ root.T / 4 + 0.05 * np.eye(4), schedule
    )
    operator = inverse.dense(rng.normal(size=(2, 4)), (4,))
    noise = np.array([0.3, 0.8])
    y = {"isotropic": np.array([1.0, -2.0]), "full covariance": np.array([2.0, 1.5])}
    return {
        name: (model, smcdiff.InverseProblem(operator, jnp.asarray(y[name]), noise))
        for name, model in (("isotropic", isotropic), ("full covariance", full))
    }


def mixture_cases(schedule) -> dict:
    """A mixture of three components of different widths, with one measurement that does not tell them apart."""
    means = np.array([[-3.0, 1.0], [2.0, 2.5], [1.0, -3.0]])
    covariances = np.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 1.0]], [[1.0, -0.5], [-0.5, 0.8]]])
    model = smcdiff.GaussianMixtureDiffusion.create(np.array([0.5, 0.2, 0.3]), means, covariances, schedule)
    problem = smcdiff.InverseProblem(inverse.dense(np.array([[0.6, 0.9]]), (2,)), jnp.asarray([1.2]), 0.5)
    return {"mixture": (model, problem)}


def _exact(model, problem):
    """Log evidence under the exact diffusion."""
    matrix = np.asarray(problem.operator.matrix(), float)
    return model.posterior(matrix, np.asarray(problem.y), np.asarray(problem.noise.std))[1]
