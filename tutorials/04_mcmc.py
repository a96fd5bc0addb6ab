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
# # Tutorial 4: Markov chains, with and without a density
#
# Two problems for MCMC, and a kernel for each. The first is a target with heavy tails, on which gradients say nothing:
# polar slice sampling. The second is the composition of two diffusion models, of which one may know scores only: a walk
# down the noise levels, corrected by Metropolis steps that accept by integrals of the score. Both have exact answers
# to compare with.

# %%
import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.tree_util import Partial

import smcdiff
from smcdiff import compose, mcmc, schedules
from smcdiff.boxes import BoxMixtureDiffusion

# %% [markdown]
# ## A target with heavy tails
#
# The Cauchy law in 50 dimensions. Its radius ranges over orders of magnitude, the score is nearly zero far out, and a
# chain that moves by gradients has to walk back a long way with small steps. `mcmc.polar_slice` takes radius and
# direction apart: for the direction it shrinks a random great circle around the current one until it hits the slice,
# for the radius an interval. There is no gradient, and no step size but a width that hardly matters.

# %%
d = 50


def cauchy(x):
    return -0.5 * (x.size + 1) * jnp.log1p(jnp.sum(x**2))


def exact(key, num):
    key_normal, key_scale = jax.random.split(key)
    scale = jnp.abs(jax.random.normal(key_scale, (num, 1)))
    return jax.random.normal(key_normal, (num, d)) / scale


target = Partial(cauchy)
start = exact(jax.random.key(0), 4)
kernels = {
    "polar slice": mcmc.polar_slice(target, width=float(d)),
    "NUTS": blackjax.nuts(target, 1.0, jnp.ones(d)),
}
traces = {
    name: smcdiff.run(jax.random.key(1), kernel, 2000, position=start, num_chains=4, progress=False)
    for name, kernel in kernels.items()
}

# %% [markdown]
# What matters is how fast the radius mixes. ArviZ measures it on any function of the samples: here the logarithm of the
# radius, whose median is known from exact draws.

# %%
log_radius = {name: np.log(np.linalg.norm(trace.samples, axis=-1)) for name, trace in traces.items()}
truth = float(np.median(np.log(np.linalg.norm(exact(jax.random.key(2), 100_000), axis=1))))
for name, values in log_radius.items():
    effective = float(az.ess(az.convert_to_dataset({"log r": values}))["log r"])
    median = np.median(values)
    print(
        f"{name:12} ESS of log r: {effective:6.0f} of {values.size};  median {median:.2f} (exact {truth:.2f})"
    )
slices = traces["polar slice"].info
print(
    f"evaluations a step: {slices.num_evaluations.mean():.1f};  caps hit: {int((~slices.is_accepted).sum())}"
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), sharey=True)
for axis, (name, values) in zip(axes, log_radius.items(), strict=True):
    axis.plot(values[0], linewidth=0.7)
    axis.axhline(truth, color="black", linewidth=0.8, linestyle="--")
    axis.set(title=name, xlabel="step")
axes[0].set_ylabel("log radius")
figure.tight_layout()

# %% [markdown]
# The dashed line is the exact median. The first chain crosses it all the time, the second stays for hundreds of steps
# where it is: a trace that looks calm and says little.
#
# ## Two models, scores only
#
# A ring of eight Gaussians, and a bar: uniform on an upright rectangle, with one percent on the square around it. Their
# product keeps the two Gaussians of the ring that lie in the bar, in equal shares. Both noised densities are known in
# closed form, so that every sampler can use densities, scores, or both.

# %%
schedule = schedules.ve(0.01, 1.5)
angles = 2 * np.pi * np.arange(8) / 8
ring = smcdiff.GaussianMixtureDiffusion.create(
    np.ones(8), 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.05**2, schedule
)
corners = np.array([[0.2, 1.0], [1.1, 1.1]])
bar = BoxMixtureDiffusion.create([0.99, 0.01], -corners, corners, schedule)
both = compose.product(ring, bar)
times = smcdiff.log_snr_times(schedule, 60, log_snr_min=-0.5, log_snr_max=4.5)

# %% [markdown]
# Three walks from noise to data, of 2000 samples each:
#
# 1. the reverse sampler with the sum of the scores, which takes the product for a diffusion (it warns);
# 2. `annealed_mcmc` with the unadjusted Langevin algorithm;
# 3. `annealed_mcmc` with MALA. `accept="line_integral"` takes the log ratio of the densities from the scores alone, by
#    an integral along the straight line of the proposal.
#
# The step sizes come from a pilot cloud, level by level, and are frozen then.

# %%
line_integral = Partial(mcmc.mala, accept="line_integral")
tuned = smcdiff.smc.tune_step_sizes(jax.random.key(3), both, times=times, kernel=line_integral)


def walk(kernel):
    fk = smcdiff.annealed_mcmc(
        both, times=times, step_sizes=tuned.step_sizes, kernel=kernel, steps_per_level=20
    )
    return smcdiff.run_smc(jax.random.key(4), fk, 2000, progress=False).particles[0]


samples = {
    "sum of scores": np.asarray(smcdiff.reverse_sample(jax.random.key(5), both, times, 2000)),
    "ULA": walk(mcmc.ula),
    "MALA, scores only": walk(line_integral),
}

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.7), sharex=True, sharey=True)
for axis, (name, x) in zip(axes, samples.items(), strict=True):
    axis.plot(*x.T, ".", markersize=1.5, alpha=0.5)
    axis.add_patch(plt.Rectangle((-0.2, -1.0), 0.4, 2.0, fill=False, color="black", linewidth=0.8))
    axis.set(title=name, xlim=(-0.8, 0.8), ylim=(-1.1, 1.1), aspect="equal")
figure.tight_layout()
for name, x in samples.items():
    on_modes = np.min(np.linalg.norm(x[:, None] - np.array([[0.0, 0.5], [0.0, -0.5]]), axis=-1), axis=1)
    print(f"{name:18} within 3 deviations of the modes: {np.mean(on_modes < 0.15):.3f} (exact 0.989)")

# %% [markdown]
# The sum of scores is not the score of anything that was noised: its samples end between the two models. The Langevin
# steps draw them to the product, and the correction takes away what the finite step adds. A few samples stay in
# Gaussians of the ring outside of the bar: they were there when the modes parted, and no local move brings them back.
# The acceptance rates by level are the pilot's own check of the step sizes.

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.6))
levels = np.asarray(jax.vmap(schedule.sigma)(times[1:-1]))
axis.semilogx(levels, tuned.acceptance_rates[:-1], label="acceptance rate")
axis.semilogx(levels, tuned.step_sizes[:-1] / tuned.step_sizes.max(), label="step size, relative")
axis.set(xlabel="noise level", ylim=(0, 1.05))
axis.invert_xaxis()
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## One level, judged by ArviZ
#
# At a single level the kernel is an ordinary Markov chain, and everything that ArviZ knows about chains applies. Four
# chains of MALA at noise level 0.1, started from the walk's samples:

# %%
t = schedule.time_from_log_snr(-jnp.log(0.1))
kernel = mcmc.mala(both.at(t), 0.006, accept="line_integral")
trace = smcdiff.run(
    jax.random.key(6), kernel, 4000, position=samples["MALA, scores only"][:4], num_chains=4, progress=False
)
data = smcdiff.to_arviz(trace, dims={"x": ["coordinate"]})
print(az.summary(data, var_names=["x"]))
print(f"acceptance {float(trace.info.acceptance_rate.mean()):.2f}")

# %% [markdown]
# The first coordinate, in which the two modes agree, mixes well. The second has an effective sample size of a few dozen
# in sixteen thousand draws, and an R-hat that shows it: at this noise level the modes have nearly parted, and chains
# cross from one to the other rarely. That is not a fault of the kernel but what MCMC at one level can do; the walk,
# which comes from the noise, puts half of its samples into each. Where the shares of the modes are not known by
# symmetry, they have to come from weights: `smcdiff.fkc`, in [](02_composition.ipynb).
#
# ## What to take home
#
# - For heavy tails and funnels around one centre, try `mcmc.polar_slice`: no gradient, no step size.
# - For compositions, walk the levels; correct by densities where there are any, by line integrals where not.
# - Exact kernels keep a law, they need not reach it: look at R-hat of chains that start in different places.
