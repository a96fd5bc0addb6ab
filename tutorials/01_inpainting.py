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
# # Tutorial 1: half of a digit is missing
#
# We take an image that a diffusion model has not seen, measure its upper half with noise, and ask what the whole
# image may have been. The answer is a posterior: a cloud of images with weights, and an estimate of the evidence
# $p(y)$.
#
# The tutorial has two parts. In the first the prior is a trained network, as it will be in your work, and there is
# nothing to compare with: all you have is diagnostics. In the second the prior is replaced by one whose posterior is
# known in closed form, so that we can see what the same diagnostics were worth.
#
# It runs in a few minutes on two CPU cores. The prior is `digits`, a small network for images of 8×8 pixels. For
# images of 28×28 pixels write `NAME = "mnist"` and hide `height=14` rows of `width=28`; a run then takes many times
# longer, and the second part, which uses the 8×8 data, does not apply.

# %%
import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import smcdiff
from smcdiff import guidance, inverse

NAME = "digits"
model = smcdiff.load(NAME)
images, labels = smcdiff.held_out(NAME)
print(f"{NAME}: samples of shape {model.event_shape}, {len(images)} held-out images")

# %% [markdown]
# ## The problem
#
# An operator says what is measured. `crop_box` hides a box; what is left is observed, here the 32 pixels of the upper
# half. `simulate_problem` measures a known image: $y = A x + 0.1\,\varepsilon$, with pixels between 0 and 1. With
# data of your own you write `smcdiff.InverseProblem(operator, y, noise)`.

# %%
truth = images[16]
operator = inverse.crop_box(model.event_shape, top=4, left=0, height=4, width=8)
problem = inverse.simulate_problem(jax.random.key(1), operator, truth, 0.1)
print(f"a {labels[16]}; {problem.y.size} measurements of {truth.size} pixels")

# %% [markdown]
# ## The posterior
#
# `posterior` runs the twisted diffusion sampler (TDS): particles travel from noise to data along the reverse chain of
# the prior; a *twist*, a guess of $p(y \mid x_t)$, steers them and importance weights repair what the guess gets
# wrong. Four independent runs tell us later how far each of them can be trusted. See [Choosing a
# method](../../choosing.md) for why the twist is `pigdm` here.

# %%
result = smcdiff.posterior(
    jax.random.key(2), model, problem, twist=guidance.pigdm, num_particles=32, num_chains=4, progress=False
)
print("log evidence of each run:", np.round(result.log_evidence, 2))
print("pooled:                  ", round(result.pooled_log_evidence(), 2))
print("valid:                   ", result.is_valid)

# %% [markdown]
# The particles are **weighted**. `result.particles.mean()` would be wrong; `result.mean()`, `result.std()` and
# `result.quantile(q)` use the weights, and `result.resample(key)` turns them into equally weighted draws, run by run.


# %%
def show(pictures, titles, limits):
    figure, axes = plt.subplots(1, len(pictures), figsize=(1.15 * len(pictures), 1.5))
    for axis, picture, title, (low, high) in zip(axes, pictures, titles, limits, strict=True):
        axis.imshow(picture, cmap="gray", vmin=low, vmax=high)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()


measured = np.where(
    operator.adjoint(jnp.ones(operator.output_shape)) > 0, operator.adjoint(problem.y), np.nan
)
draws = result.resample(jax.random.key(3), 2).reshape(-1, *model.event_shape)
show(
    [truth, measured, result.mean(), result.std(), *draws],
    ["truth", "measured", "mean", "sd", *(f"run {1 + i // 2}" for i in range(len(draws)))],
    [(0, 1), (0, 1), (0, 1), (0, 0.5)] + [(0, 1)] * len(draws),
)

# %% [markdown]
# The standard deviation is small in the upper half, where there are measurements, and large where the lower strokes
# may run. Most draws complete the upper half to a three, and some to a two; we come back to that.
#
# ## What the sampler says of itself
#
# Three things to look at before ArviZ. The effective sample size (ESS) by step: after a resampling it starts again at
# the number of particles. The spread of the log evidence between runs. And how many of the first particles still have
# descendants at the end: the weights may look even because all particles are copies of a few ancestors.


# %%
def surviving(ancestors):
    """Number of initial particles with a descendant at the end, from ancestor indices (steps, particles)."""
    lineage = np.arange(ancestors.shape[1])
    for parents in ancestors[::-1]:
        lineage = parents[lineage]
    return len(np.unique(lineage))


figure, axis = plt.subplots(figsize=(6, 2.4))
axis.plot(result.ess.T)
axis.set(xlabel="step", ylabel="ESS of 32", ylim=(0, 33))
print("smallest ESS of each run:   ", result.ess.min(axis=1).round(1))
print("resamplings of each run:    ", result.info.resampled.sum(axis=1))
print("surviving first particles:  ", [surviving(run) for run in result.info.ancestors])
print("sd of the log evidence:     ", result.log_evidence.std(ddof=1).round(2))

# %% [markdown]
# Nothing happens for the first 40 steps: pure noise says nothing about the measurement, and `pigdm` knows it. Between
# steps 50 and 80 the particles become digits, the weights spread, and each run resamples a few times. In the last
# steps only details are settled. Of the 32 first particles of a run about a quarter have descendants at the end: the
# choice between a two and a three was made by few of them.
#
# ## ArviZ
#
# `to_arviz` makes an `InferenceData` (ArviZ 0.x) or a `DataTree` (ArviZ 1): equally weighted draws in `posterior`,
# with the four runs as chains; the weighted history by step in `smc`; the measurement in `observed_data`.

# %%
data = smcdiff.to_arviz(
    result,
    rng_key=jax.random.key(4),
    problem=problem,
    dims={"x": ["row", "col"]},
    constant_data={"truth": truth},
)
hidden_pixels = {"row": [5, 6], "col": [2, 3, 4, 5]}
summary = az.summary(data, var_names=["x"], coords=hidden_pixels, round_to="none")
summary[["mean", "sd", "ess_bulk", "r_hat"]].round(2)

# %%
az.plot_forest(data, var_names=["x"], coords={"row": [5], "col": [2, 3, 4, 5]}, combined=False)
plt.show()

# %%
everything = az.summary(data, var_names=["x"], round_to="none")
rhat = everything["r_hat"].to_numpy().reshape(model.event_shape)
row, column = np.unravel_index(rhat.argmax(), rhat.shape)
print(f"R-hat: largest {rhat.max():.2f}, in row {row}, column {column}")
print(f"pixels with R-hat above 1.05: {(rhat > 1.05).sum()} of {rhat.size}")

# %% [markdown]
# ### How to read this
#
# - **R-hat compares the runs.** Draws within a run come from one cloud and were shuffled, so there is no chain that
#   mixes; what R-hat can show is that clouds differ. A pixel whose interval differs from run to run in the forest
#   plot has an R-hat above 1, and no weight inside a run shows it.
# - **ArviZ's ESS is an upper bound here.** It looks for autocorrelation and finds none in shuffled draws. It cannot
#   see that the draws are copies of fewer particles. The ESS of the weights and the surviving first particles are the
#   honest numbers.
# - **The log evidence is the most sensitive one.** Its standard deviation between runs should be below 1 or so; a run
#   that lies far above the others has found a mode which they have missed. More particles is then the first thing to
#   try.
#
# Here 32 particles a run is a small number, on purpose. The log evidences agree to a fraction of a nat, so no run has
# missed the bulk of the posterior. But R-hat is far above 1.01 in many pixels, and in the forest plot one run has its
# own opinion about the pixel in column 5: its share of twos is higher. So the pooled mean image is usable, and the
# share of twos is not yet. The remedy is more particles. How many are enough? And would the share then be right? With
# a network as prior there is nothing to compare with. So we ask a question whose answer is known.
#
# ## The same problem with an exact answer
#
# `EmpiricalDiffusion` is the exact diffusion model of a kernel density: equal weights on the images of a data set,
# each with a Gaussian of deviation 0.1. Under a linear measurement with Gaussian noise its posterior is a mixture
# again, with one weight for each image, and the evidence is a sum. The true image is taken out of the data, or there
# would be nothing to infer.

# %%
from sklearn.datasets import load_digits

bunch = load_digits()
data_images, data_labels = (bunch.images / 16).astype(np.float32), bunch.target
others = np.abs(data_images - truth).max(axis=(1, 2)) > 1e-6
prior = smcdiff.EmpiricalDiffusion(jnp.asarray(data_images[others]), 0.1, model.schedule)
class_of = jax.nn.one_hot(data_labels[others], 10)
print(f"{others.sum()} of {len(others)} images in the prior")

exact, exact_log_evidence = prior.exact().posterior(operator.matrix(), problem.y, 0.1)
exact_classes = jnp.exp(exact.mixture.log_weights) @ class_of
print(f"exact log evidence: {exact_log_evidence:.2f}")
print("exact class posterior:", {k: round(float(p), 3) for k, p in enumerate(exact_classes) if p > 0.005})

# %% [markdown]
# The upper half of this 3 is also the upper half of some twos. Now the sampler, which sees nothing but the denoiser
# of this prior, as it saw the network's.
#
# The class of a particle is that of the images near it: the `responsibilities` of the mixture.


# %%
@jax.jit
def class_probabilities(particles):
    return jax.vmap(prior.exact().mixture.responsibilities)(particles) @ class_of


def class_posterior(result):
    flat = jnp.asarray(result.particles).reshape(-1, *model.event_shape)
    return np.exp(result.pooled_log_weights()).ravel() @ np.asarray(class_probabilities(flat))


runs = {}
for num_particles in (64, 256, 1024):
    runs[num_particles] = smcdiff.posterior(
        jax.random.key(5),
        prior,
        problem,
        twist=guidance.pigdm,
        num_particles=num_particles,
        num_chains=4,
        progress=False,
    )
    estimate = runs[num_particles]
    classes = class_posterior(estimate)
    print(
        f"{num_particles:5d} particles: log evidence {np.round(estimate.log_evidence, 2)}, "
        f"pooled {estimate.pooled_log_evidence():.2f} (exact {exact_log_evidence:.2f}); "
        f"P(2) {classes[2]:.2f}, P(3) {classes[3]:.2f}; "
        f"total variation {0.5 * np.abs(classes - exact_classes).sum():.3f}"
    )

# %%
figure, axis = plt.subplots(figsize=(6, 2.6))
width = 0.2
axis.bar(np.arange(10) - 1.5 * width, exact_classes, width, label="exact", color="black")
for place, (num_particles, estimate) in enumerate(runs.items()):
    axis.bar(
        np.arange(10) + (place - 0.5) * width,
        class_posterior(estimate),
        width,
        label=f"{num_particles} particles",
    )
axis.set(xlabel="digit", ylabel="posterior probability", xticks=range(10))
axis.legend(fontsize=8)
plt.show()

# %%
reference = np.asarray(exact.mixture.mean())
estimate = runs[1024]
show(
    [truth, measured, reference, estimate.mean(), np.abs(estimate.mean() - reference), estimate.std()],
    ["truth", "measured", "exact mean", "TDS mean", "|difference|", "TDS sd"],
    [(0, 1)] * 4 + [(0, 0.2), (0, 0.5)],
)
print(f"root mean square difference of the means: {np.sqrt(np.mean((estimate.mean() - reference) ** 2)):.4f}")

# %% [markdown]
# ### What the diagnostics were worth
#
# - **The class posterior** is found to a few hundredths by 64 particles a run. One key shows no rate: repeat it with
#   several before you conclude how many particles are enough.
# - **The log evidence** is off by about half a nat, downwards. Its estimates are unbiased before the logarithm, hence
#   too small more often than too large: rare runs with large values carry much of their mean. Four runs that agree
#   are therefore good but not complete evidence: with 1024 particles they lie closer to each other than to the truth.
#   The reverse process in 100 steps may have a share in the difference; to find out, double `num_steps` and use
#   several keys.
# - **The mean image** is right to about a hundredth of the range of pixels.
#
# The diagnostics pointed the right way: what the spread between runs called settled was settled, and the spread was
# of the order of the error. No diagnostic said how far the network is from the data's own law. The log evidence of
# the first part is several nats *higher* than the exact one of this part: the network has learned what digits have in
# common, so it finds this unseen three more probable than a kernel density does that knows 1796 single images. For
# comparing priors on held-out data that is just what the evidence is for.
#
# Where to go from here: [Reading the diagnostics](../../diagnostics.md) for tables of what to try, [Inverse
# problems](../../inverse_problems.md) for other measurements, and [Your own model](../../own_model.md).
