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
# # Tutorial 6: blind deblurring in a NumPyro model
#
# A digit is blurred by a Gaussian of unknown width, and the noise is unknown too. The model is written in NumPyro, with
# a pretrained diffusion as the prior of the image, and `smcdiff.infer` samples image, width and noise from their joint
# posterior. The steps are those of a Bayesian workflow: prior predictive check, inference, diagnostics, posterior
# predictive check. The digits have 28x28 pixels, and four chains take a minute on a laptop.

# %%
import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Predictive

import smcdiff
from smcdiff import inverse
from smcdiff.ppl import AuxiliaryGradient

diffusion = smcdiff.load("mnist")
images, labels = smcdiff.held_out("mnist")

# %% [markdown]
# ## The model
#
# The blur is a convolution whose kernel depends on the width, so that the data are linear in the image and not in the
# width. Nothing in the model says how it will be sampled.


# %%
def model(diffusion, y=None):
    width = numpyro.sample("width", dist.LogNormal(-0.2, 0.3))  # pixels
    noise = numpyro.sample("noise", dist.LogNormal(-2.0, 0.5))  # the image lies in [0, 1]
    x = numpyro.sample("x", smcdiff.DiffusionPrior(diffusion, num_steps=50))
    blur = inverse.gaussian_blur(diffusion.event_shape, width, size=7)
    numpyro.sample("y", dist.Normal(blur(x), noise).to_event(2), obs=y)


# %% [markdown]
# ## Prior predictive check
#
# Before any data: are blurred digits of the prior what we believe to be possible? Widths reach from half a pixel, which
# hardly shows, to one and a half, where a digit is a smudge.

# %%
prior = Predictive(model, num_samples=12)(jax.random.key(0), diffusion)
order = np.argsort(np.asarray(prior["width"]))

figure, axes = plt.subplots(2, 12, figsize=(12, 2.4))
for column, index in enumerate(order):
    axes[0, column].imshow(prior["x"][index], cmap="gray", vmin=0, vmax=1)
    axes[1, column].imshow(prior["y"][index], cmap="gray", vmin=0, vmax=1)
    axes[1, column].set_xlabel(f"{prior['width'][index]:.1f}")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("x")
axes[1, 0].set_ylabel("y")
figure.suptitle("Draws of the prior, and of the data that it predicts, by width")
plt.show()

# %% [markdown]
# ## Data
#
# A digit that the prior has not seen, a width of 0.9 pixels and noise of deviation 0.1.

# %%
truth, true_width, true_noise = jnp.asarray(images[3]), 0.9, 0.1
blur = inverse.gaussian_blur(diffusion.event_shape, true_width, size=7)
y = blur(truth) + true_noise * jax.random.normal(jax.random.key(1), truth.shape)

# %% [markdown]
# ## Inference
#
# The image is moved by the auxiliary gradient sampler: noise along the gradient of the likelihood, a short reverse run
# of the diffusion, and a Metropolis acceptance in which the prior's unknown density cancels. Width and noise are moved
# by NUTS. Both leave the joint posterior alone. A sweep costs twelve calls of the network.

# %%
trace = smcdiff.infer(
    jax.random.key(2),
    model,
    diffusion,
    y,
    kernels={"x": AuxiliaryGradient},
    num_warmup=400,
    num_samples=800,
    num_chains=4,
    progress=False,
)

# %% [markdown]
# ## Diagnostics
#
# R-hat compares the chains, and there are few pixels on which they disagree. The width mixes slowest, since blur and
# stroke tell each other: more sweeps, if its last digit matters. The warm-up tuned the noise `x.rho` of a step to an
# acceptance rate of some .6.

# %%
data = smcdiff.to_arviz(trace, dims={"x": ["row", "column"]})
print(az.summary(data, var_names=["width", "noise"]))
rhat = smcdiff.diagnostics.rhat(trace.samples["x"])
print(f"R-hat of the pixels: median {np.median(rhat):.3f}, 95 % below {np.quantile(rhat, 0.95):.3f}")
print(
    f"accepted: {trace.info['x.acceptance_rate'].mean():.0%}, noise of a step: {trace.info['x.rho'][:, -1]}"
)
print(f"divergences of NUTS: {int(trace.info['diverging'].sum())}")

# %% [markdown]
# ## The posterior
#
# The mean is sharper than the data; the deviation says where the posterior does not know, along the edges of strokes.

# %%
x = trace.samples["x"].reshape(-1, *diffusion.event_shape)
pictures = {
    "truth": truth,
    "data": y,
    "posterior mean": x.mean(0),
    "deviation": x.std(0),
    **{f"draw {i + 1}": x[i] for i in np.linspace(0, len(x) - 1, 4).astype(int)},
}
figure, axes = plt.subplots(1, len(pictures), figsize=(12, 1.9))
for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
    scale = {"vmin": 0, "cmap": "magma"} if name == "deviation" else {"vmin": 0, "vmax": 1, "cmap": "gray"}
    axis.imshow(np.asarray(picture), **scale)
    axis.set(xticks=[], yticks=[], title=name)
plt.show()

figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
priors = {"width": (-0.2, 0.3, true_width), "noise": (-2.0, 0.5, true_noise)}
for axis, (name, (mean, std, value)) in zip(axes, priors.items(), strict=True):
    draws = np.exp(mean + std * np.random.default_rng(0).normal(size=4000))
    axis.hist(draws, bins=40, density=True, alpha=0.3, label="prior")
    axis.hist(trace.samples[name].ravel(), bins=20, density=True, label="posterior")
    axis.axvline(value, color="black", label="truth")
    axis.set(xlabel=name, yticks=[])
axes[0].legend()
plt.show()

# %% [markdown]
# ## Posterior predictive check
#
# Data are simulated from posterior draws and compared with the data that were seen, by a number that the model did not
# fit directly: the roughness, the mean square of differences between neighbouring pixels. It rises with the noise and
# falls with the width, so a model that confused one with the other would be told here.

# %%
draws = {
    name: trace.samples[name].reshape(-1, *trace.samples[name].shape[2:]) for name in ("width", "noise", "x")
}
replicated = Predictive(model, draws)(jax.random.key(3), diffusion)["y"]


def roughness(y):
    return np.mean(np.diff(np.asarray(y), axis=-1) ** 2, axis=(-2, -1))


probability = np.mean(roughness(replicated) > roughness(y))
print(f"roughness of the data {roughness(y):.4f}, of replicated data {roughness(replicated).mean():.4f}")
print(f"share of replicated data that are rougher: {probability:.2f}")
