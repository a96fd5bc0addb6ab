# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tutorial 5: a posterior with two modes, and its evidence
#
# Three sensors in a nearly straight row measure their distances to a source. Distances alone cannot tell one side of
# the row from the other, so that the posterior has two modes, of unequal weight since the row is not quite straight.
# There is no network in this tutorial: reverse diffusion Monte Carlo samples the posterior from its density, with the
# right weights of the modes and with the evidence. In the plane everything can be checked by quadrature.

# %%
import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.tree_util import Partial

import smcdiff
from smcdiff import estimators, mcmc, schedules
from smcdiff.schedules import log_snr_times

# %% [markdown]
# ## The model
#
# The prior of the source is $\mathcal N(0, 3^2 I)$, the noise of a distance Gaussian of deviation 0.25. As an
# alternative the noise may have heavy tails, a Student law of three degrees of freedom. One of the three distances is
# off, which only the second model expects.

# %%
sensors = jnp.asarray([[-2.0, 0.0], [0.0, 0.15], [2.0, 0.0]])
distances = jnp.asarray([3.10, 3.00, 2.40])
noise = 0.25


def residuals(x):
    return (distances - jnp.linalg.norm(x[None] - sensors, axis=1)) / noise


def log_prior(x):
    return -0.5 * jnp.sum((x / 3.0) ** 2) - jnp.log(2.0 * jnp.pi * 9.0)


def gaussian_noise(x):
    terms = -0.5 * residuals(x) ** 2 - 0.5 * jnp.log(2.0 * jnp.pi * noise**2)
    return log_prior(x) + jnp.sum(terms)


def student_noise(x):
    # The constant of a Student law of 3 degrees of freedom and scale s is 2 / (pi sqrt(3) s).
    terms = -2.0 * jnp.log1p(residuals(x) ** 2 / 3.0) + jnp.log(2.0 / (jnp.pi * jnp.sqrt(3.0) * noise))
    return log_prior(x) + jnp.sum(terms)


models = {"Gaussian noise": Partial(gaussian_noise), "Student noise": Partial(student_noise)}

# %% [markdown]
# ## Samples and evidence
#
# The prior covers the posterior, so it is the reference: the importance proposals of each noise level are drawn from
# what the denoising posterior would be if the target were the prior. The path ends in noise about as wide as the prior.
# With `weights="marginal"` the particles are weighted, and the evidence is unbiased.

# %%
reference = (0.0, 3.0)
estimator = estimators.importance(256, reference=reference, identity="combined")
schedule = schedules.ve(0.01, 10.0)
times = log_snr_times(schedule, 40, log_snr_max=3.0)

grid = jnp.linspace(-12.0, 12.0, 1201)
cell = float(grid[1] - grid[0]) ** 2
points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)

results, truths = {}, {}
for name, model in models.items():
    path = smcdiff.rdmc_path(model, schedule, estimator, rng_key=jax.random.key(0), event_shape=2)
    fk = smcdiff.rdmc(path, times=times, weights="marginal", start=reference)
    results[name] = smcdiff.run_smc(jax.random.key(1), fk, 2000, num_chains=4, progress=False)
    density = np.exp(np.asarray(jax.vmap(model)(points), float))
    evidence = density.sum() * cell
    truths[name] = np.log(evidence), density[np.asarray(points)[:, 1] > 0].sum() * cell / evidence

    result = results[name]
    above = np.exp(result.pooled_log_weights())[result.particles.position[..., 1] > 0].sum()
    print(
        f"{name}: log evidence {result.pooled_log_evidence():.3f} +- {result.log_evidence.std() / 2:.3f} "
        f"(exact {truths[name][0]:.3f}), above the row {above:.3f} (exact {truths[name][1]:.3f})"
    )

factor = results["Student noise"].pooled_log_evidence() - results["Gaussian noise"].pooled_log_evidence()
exact_factor = truths["Student noise"][0] - truths["Gaussian noise"][0]
print(f"log Bayes factor for heavy tails: {factor:.3f} (exact {exact_factor:.3f})")

# %% [markdown]
# How good were the estimates on the way? A particle carries the least effective sample size that any of its estimates
# had, how many were flagged, and how often the target was evaluated.

# %%
particles = results["Student noise"].particles
print("evaluations of a particle:", int(particles.num_evaluations.max()))
print("flagged estimates:", int(particles.num_invalid.sum()))
print("least effective sample size, median:", float(np.median(particles.least_ess)))
print("effective sample size of the particles:", results["Student noise"].ess[:, -1].round())

# %% [markdown]
# ## The same by NUTS
#
# A chain of NUTS stays in the mode in which it starts, or changes rarely: four chains from draws of the prior say of
# the weights what the starts say.

# %%
model = models["Gaussian noise"]
starts = 3.0 * jax.random.normal(jax.random.key(2), (4, 2))
warm = mcmc.window_adaptation(jax.random.key(3), model, blackjax.nuts, starts, 200)
nuts = blackjax.nuts(model, **warm.settings)
trace = smcdiff.run(jax.random.key(4), nuts, 1000, position=warm.positions, num_chains=4, progress=False)
print("share above the row, by chain:", np.mean(trace.samples[..., 1] > 0, axis=1))
az.summary(smcdiff.to_arviz(trace, dims={"x": ["coordinate"]}), round_to=2)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharex=True, sharey=True, layout="constrained")
view = np.linspace(-4.0, 4.0, 300)
mesh = np.stack(np.meshgrid(view, view), axis=-1).reshape(-1, 2)
clouds = {
    "Gaussian noise, rdmc": results["Gaussian noise"].resample(jax.random.key(5), 300).position[0],
    "Student noise, rdmc": results["Student noise"].resample(jax.random.key(5), 300).position[0],
    "Gaussian noise, NUTS": trace.samples[:, ::10].reshape(-1, 2),
}
for axis, (title, cloud) in zip(axes, clouds.items(), strict=True):
    model = models[title.split(",")[0]]
    log_density = np.asarray(jax.vmap(model)(jnp.asarray(mesh))).reshape(300, 300)
    relative = np.exp(log_density - log_density.max())
    axis.contour(view, view, relative, levels=[0.05, 0.2, 0.5, 0.8], colors="k", linewidths=0.8)

    axis.scatter(*cloud.T, s=4, alpha=0.5)
    axis.plot(*np.asarray(sensors).T, "k^", ms=6)
    axis.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
figure.suptitle("Posterior of the source; triangles are sensors")
plt.show()

# %% [markdown]
# Each mode has its own share, and the Bayes factor says that the data prefer noise with heavy tails. In two dimensions
# importance sampling is all that an estimator needs; the page on [bare densities](../../bare_density.md) says what to
# take beyond, and when parallel tempering is the better choice.
