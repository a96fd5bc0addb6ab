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
# # Tutorial 2: two models at once
#
# Two diffusion models each know something. One draws from $p^1$, the other from $p^2$; we want what both of them find
# likely, the product $\pi \propto p^1 p^2$. The scores add up, so it is tempting to add them and sample as ever. This
# tutorial shows what goes wrong, why, and what repairs it: weights, or weights and moves.
#
# Both models are mixtures of Gaussians, so that the product is known: a mixture again, one component for each pair.
# With networks in their place the code is the same.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import smcdiff
from smcdiff import compose, schedules

schedule = schedules.cosine(-9.0)
first = smcdiff.GaussianMixtureDiffusion.create(
    [0.5, 0.3, 0.2], [[-4.0, 0.0], [0.0, 2.0], [4.0, -1.0]], 0.4, schedule
)
second = smcdiff.GaussianMixtureDiffusion.create(
    [0.2, 0.3, 0.5], [[-4.0, 1.2], [0.3, 1.0], [3.6, -2.2]], 0.6, schedule
)

# %% [markdown]
# ## The exact answer
#
# The product of $\mathcal N(m, a I)$ and $\mathcal N(m', b I)$ is $\mathcal N(m; m', (a + b) I)$ times a Gaussian with
# variance $ab/(a+b)$. Summed over pairs this gives the weights of the product's components, and its integral
# $Z = \int p^1 p^2$.

# %%
a, b = 0.4, 0.6
m1, m2 = (np.asarray(model.mixture.component_means()) for model in (first, second))
w1, w2 = (np.exp(np.asarray(model.mixture.log_weights)) for model in (first, second))
gaps = ((m1[:, None] - m2[None]) ** 2).sum(-1)
joint = w1[:, None] * w2[None] * np.exp(-gaps / (2 * (a + b))) / (2 * np.pi * (a + b))
centres = (b * m1[:, None] + a * m2[None]) / (a + b)
log_integral = np.log(joint.sum())
modes = np.diag(joint) / joint.sum()  # the other pairs hardly overlap
print(f"log Z = {log_integral:.3f}; weights of the three modes: {np.round(modes, 3)}")

# %% [markdown]
# ## The composition
#
# `compose.product` makes a new density path: at every time $t$ the product of the two noised densities. It is a path
# like any other, with a score and (as both parts have one) a log density. But it is **not** the noised version of the
# product: to noise a product is not to multiply what was noised. A reverse sampler that follows its score is biased,
# and the path says so.

# %%
path = compose.product(first, second)
print("is the noised version of its law at t = 0:", path.is_diffusion)

# %% [markdown]
# ## Four ways
#
# 1. **Add the scores and ignore the rest.** The particles of `fkc` without their weights.
# 2. **Feynman-Kac weights from scores.** What the sum of scores lacks is a known rate, $g^2 \langle s_1, s_2 \rangle$;
#    carried along as a weight it makes the particles end in the product, up to an error that falls with the step.
# 3. **Weights from densities.** Where log densities exist, the weights are exact at any step size.
# 4. **Density weights and moves.** Metropolis-adjusted Langevin steps at fixed $t$ renew what resampling has copied.

# %%
times = smcdiff.log_snr_times(schedule, 60, log_snr_max=6.0)
key = jax.random.key(0)
settings = {"num_chains": 4, "progress": False}


def run(fk, **moves):
    return smcdiff.run_smc(key, fk, 1000, **moves, **settings)


moves = {"move": smcdiff.smc.mala_moves(path, times=times, width=0.5), "num_moves": 2}
unweighted = smcdiff.run_smc(key, smcdiff.fkc(path, times=times), 1000, ess_threshold=0.0, **settings)
results = {
    "sum of scores": unweighted,
    "score weights": run(smcdiff.fkc(path, times=times)),
    "density weights": run(smcdiff.fkc(path, times=times, weights="density")),
    "density weights, moves": run(smcdiff.fkc(path, times=times, weights="density"), **moves),
}


# %%
def mode_weights(name, result):
    x = np.asarray(result.particles)
    weights = np.exp(result.pooled_log_weights())
    if name == "sum of scores":
        weights = np.full_like(weights, 1 / weights.size)
    nearest = ((x[:, :, None] - np.stack([centres[i, i] for i in range(3)])) ** 2).sum(-1).argmin(-1)
    return np.array([weights[nearest == mode].sum() for mode in range(3)])


print(f"{'':24}weights of the modes     error   log Z")
print(f"{'exact':24}{np.round(modes, 3)!s:22}{'':10}{log_integral:.3f}")
for name, result in results.items():
    found = mode_weights(name, result)
    evidence = "" if name == "sum of scores" else f"{result.pooled_log_evidence():.3f}"
    print(f"{name:24}{np.round(found, 3)!s:22}{0.5 * np.abs(found - modes).sum():8.3f}  {evidence}")

# %% [markdown]
# The sum of scores finds the right places and the wrong proportions, and every mode is too wide. Nothing in its samples
# shows it: every single one lies where both models are content. The weights do show it, and put it right.

# %%
figure, axes = plt.subplots(1, 5, figsize=(14, 3), sharex=True, sharey=True)
grid = np.stack(np.meshgrid(np.linspace(-6, 6, 120), np.linspace(-4, 4, 80)), -1)
density = jax.vmap(jax.vmap(path.at(jnp.asarray(0.0)).logdensity))(jnp.asarray(grid, jnp.float32))
axes[0].contourf(grid[..., 0], grid[..., 1], np.exp(density), levels=12, cmap="Blues")
axes[0].set_title("exact")
for axis, (name, result) in zip(axes[1:], results.items(), strict=True):
    x = np.asarray(result.particles if name == "sum of scores" else result.resample(jax.random.key(1)))
    axis.plot(*x.reshape(-1, 2)[::4].T, ".", markersize=2, alpha=0.5)
    axis.set_title(name)
figure.tight_layout()

# %% [markdown]
# ## What to take home
#
# - A composition is a target, not yet a sampler. `smcdiff.fkc` turns it into one; the weights are the correction.
# - Where log densities exist (exact models, energy models), prefer `weights="density"`, and add moves.
# - With networks, which give scores only, use score weights with enough steps, and compare log evidences of two
#   numbers of steps: they agree when the steps are fine enough.
# - The same holds for `compose.temper`, `compose.geometric_average`, `compose.guide` (classifier-free guidance),
#   `compose.contrast` and `compose.condition` (a reward), and for any nesting of them.
