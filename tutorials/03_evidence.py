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
# # Tutorial 3: which camera took this picture?
#
# You have a measurement of a digit, and two cameras that may have made it: a sharp one and a soft one. You do not know
# the digit. Bayes' answer compares the evidences of the two forward models,
#
# $$p(y \mid M) = \int p(y \mid x, M)\, p(x)\, dx,$$
#
# where the prior $p(x)$ is a diffusion model. Every SMC run estimates this integral, and says how well it did. We first
# do it where the answer is known, then with a network as prior, and at last for twenty measurements whose camera we
# know, to see what the stated probabilities are worth.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import smcdiff
from smcdiff import guidance, inverse

model = smcdiff.load("digits")
images, labels = smcdiff.held_out("digits")
NOISE = 0.3
cameras = {
    "sharp": inverse.gaussian_blur(model.event_shape, width=0.6, size=9),
    "soft": inverse.gaussian_blur(model.event_shape, width=1.0, size=9),
}
truth = images[16]
y = inverse.simulate_problem(jax.random.key(1), cameras["sharp"], truth, NOISE).y
problems = {name: smcdiff.InverseProblem(camera, y, NOISE) for name, camera in cameras.items()}


def show(pictures, titles, limits):
    figure, axes = plt.subplots(1, len(pictures), figsize=(1.2 * len(pictures), 1.6))
    for axis, picture, title, (low, high) in zip(axes, pictures, titles, limits, strict=True):
        axis.imshow(picture, cmap="gray", vmin=low, vmax=high)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()


show(
    [truth, *(camera(truth) for camera in cameras.values()), y],
    ["truth", "sharp", "soft", "measured"],
    [(0, 1)] * 4,
)

# %% [markdown]
# The two pictures in the middle are without noise. The last one is what we get, from the sharp camera: from here on the
# analysis does not know that. Noise with a deviation of 0.3 hides most of the difference, so the question is a real
# one.
#
# Both problems have the same $y$ and only differ in the operator. Likelihoods are normalised, so the evidences can be
# compared; a model with another noise level would do as well.
#
# ## Where the answer is known
#
# With a mixture of Gaussians as prior, the evidence of a linear measurement is a sum of Gaussian densities. We take one
# Gaussian for each class of digits, with the mean and the covariance of the class, held-out images excepted.

# %%
data, classes = (load_digits().images / 16).reshape(-1, 64).astype(np.float32), load_digits().target
known = np.abs(data[:, None] - np.asarray(images).reshape(1, -1, 64)).max(-1).min(1) > 1e-6
members = [data[known & (classes == digit)] for digit in range(10)]
mixture = smcdiff.GaussianMixtureDiffusion.create(
    [len(group) for group in members],
    [group.mean(0).reshape(8, 8) for group in members],
    [np.cov(group.T) + 0.05**2 * np.eye(64) for group in members],
    model.schedule,
)


def exact_log_evidence(name, y):
    return mixture.posterior(cameras[name].matrix(), y, NOISE)[1]


exact = {name: exact_log_evidence(name, y) for name in cameras}
for name, value in exact.items():
    print(f"exact log evidence, {name:5}: {value:.2f}")
print(f"exact log Bayes factor, sharp against soft: {exact['sharp'] - exact['soft']:.2f}")

# %% [markdown]
# Now the sampler, which sees nothing but the denoiser. Eight independent runs of each camera give a pooled estimate and
# two standard errors of it:
#
# - *within*: every run estimates its own error from the genealogy of its particles, `pooled_log_evidence_std_error()`
#   puts them together;
# - *between*: the spread of the eight runs, divided by the root of eight.
#
# The second needs several runs, the first does not. The steps are spread between log-SNR −2.5 and 4: at lower ones no
# digit can be seen, at higher ones the measurement has nothing left to say. The twist is `pigdm`, as it will be for the
# network; an exact prior would get a dearer one by default.


# %%
def run(rng_key, prior, problem, num_steps, num_particles, num_chains):
    return smcdiff.posterior(
        rng_key,
        prior,
        problem,
        twist=guidance.pigdm,
        times=smcdiff.log_snr_times(model.schedule, num_steps, log_snr_min=-2.5, log_snr_max=4.0),
        num_particles=num_particles,
        num_chains=num_chains,
        progress=False,
    )


def pooled(result):
    """Pooled log evidence, and its standard error from within the runs and from the spread between them."""
    log_evidence = np.asarray(result.log_evidence, float)
    shares = np.exp(log_evidence - np.logaddexp.reduce(log_evidence))
    between = np.sqrt(len(shares)) * shares.std(ddof=1)
    return result.pooled_log_evidence(), result.pooled_log_evidence_std_error(), between


print("steps particles  camera  estimate   exact   error  within  between")
for num_steps, num_particles in ((40, 64), (40, 256), (80, 256)):
    for index, name in enumerate(cameras):
        key = jax.random.fold_in(jax.random.key(2), index)
        result = run(key, mixture, problems[name], num_steps, num_particles, num_chains=8)
        estimate, within, between = pooled(result)
        print(
            f"{num_steps:5d} {num_particles:9d}  {name:6}  {estimate:8.2f}  {exact[name]:6.2f}  "
            f"{estimate - exact[name]:6.2f}  {within:6.2f}  {between:7.2f}"
        )

# %% [markdown]
# The errors are of the size that the standard errors say, and both kinds of standard error are of the same size: a
# single run knows well enough how wrong it may be. What else the table shows:
#
# - **Four times the particles halve the error, as a rule.** The exception is the row with the large error and the
#   large standard errors: of its eight runs one came out far too high. It is announced by both standard errors, and
#   that is what they are for.
# - **Finer steps change the number, and can tame the weights.** What a run estimates is the evidence of the prior's
#   reverse chain in so many steps, not of the prior. No standard error contains that difference; only a run with more
#   steps shows it. Here it is no larger than the error. Coarse steps also make uneven weights, and so outliers, more
#   likely: when doubling the particles does not help, double the steps.
# - **A better twist** lowers the error at the same number of particles. [Choosing a method](../../choosing.md) lists
#   them with their costs.
#
# ## With a network as prior
#
# There is no closed form any more. What remains is the estimate and its two errors. Four runs of 64 particles for each
# camera, with different keys, so that the errors of the two are independent and their squares add up. We make the runs
# one by one and put them together; `num_chains=4` would do as well, but single runs need no other program later on.


# %%
def network_runs(rng_key, name, y, num_runs):
    problem, keys = problems[name].with_measurement(y), jax.random.split(rng_key, num_runs)
    runs = [run(key, model, problem, 40, num_particles=64, num_chains=1) for key in keys]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *runs)


key = jax.random.key(3)
results = {
    name: network_runs(jax.random.fold_in(key, index), name, y, 4) for index, name in enumerate(cameras)
}
for name, result in results.items():
    estimate, within, between = pooled(result)
    print(
        f"{name:5}: runs {np.round(result.log_evidence, 2)}, pooled {estimate:.2f}, "
        f"within {within:.2f}, between {between:.2f}, smallest ESS {result.ess.min():.0f}"
    )


def probability(log_bayes_factor):
    """Posterior probability of the sharp camera, both being equally probable before."""
    return 1 / (1 + np.exp(-log_bayes_factor))


(sharp, *sharp_errors), (soft, *soft_errors) = (pooled(result) for result in results.values())
log_bayes_factor = sharp - soft
error = np.hypot(max(sharp_errors), max(soft_errors))  # the larger of the two, for each camera
low, middle, high = probability(log_bayes_factor + error * np.array([-1, 0, 1]))
print(f"log Bayes factor, network: {log_bayes_factor:.2f} ± {error:.2f}")
print(f"P(sharp | y), network:     {middle:.2f}, one standard error either way: {low:.2f} to {high:.2f}")
print(f"P(sharp | y), mixture:     {probability(exact['sharp'] - exact['soft']):.2f}, exact")

# %% [markdown]
# There are two uncertainties here, and they must not be mixed up. The probability itself is not near 0 or 1 because
# the data say no more; no computer can change that. Its range is our own error, and more particles make it as small as
# you like. If the log Bayes factor is within two standard errors of zero, the sampler has not even found out which
# camera is ahead. At odds of 100 to one (a log Bayes factor of 4.6) an error of half a nat does no harm.
#
# And the evidence is that of a *prior with* a camera. The mixture and the network are two priors, and give two answers
# to the same question; a prior that does not fit your images can favour the wrong camera with a tiny standard error.
#
# The same runs hold the posterior of the digit under each camera. If the camera does not matter to you,
# average over it.

# %%
means = {name: result.mean() for name, result in results.items()}
deviations = {name: result.std() for name, result in results.items()}
draws = {name: result.resample(jax.random.key(4), 1)[0, 0] for name, result in results.items()}
averaged = middle * means["sharp"] + (1 - middle) * means["soft"]
show(
    [truth, y]
    + [picture for name in cameras for picture in (means[name], deviations[name], draws[name])]
    + [averaged],
    [
        "truth",
        "measured",
        *(f"{what}, {name}" for name in cameras for what in ("mean", "sd", "draw")),
        "averaged",
    ],
    [(0, 1)] * 2 + [(0, 1), (0, 0.4), (0, 1)] * 2 + [(0, 1)],
)

# %% [markdown]
# The draws differ more than the cameras: much of the digit is hidden in noise. At this noise the posterior takes the
# three for something like a seven. The comparison does not need to know the digit: the evidence averages over
# everything that it may be.
#
# ## Twenty measurements whose camera we know
#
# A probability is worth something if it is right as often as it says. Twenty other held-out digits, each taken by a
# camera that a coin has chosen; one run of 64 particles for each camera. The mixture answers too, in closed form.

# %%
key_coin, key_noise, key_run = jax.random.split(jax.random.key(5), 3)
is_sharp = np.asarray(jax.random.bernoulli(key_coin, shape=(20,)))
log_bayes_factors, errors, exact_log_bayes_factors = np.empty((3, 20))
for i, sharp_one in enumerate(is_sharp):
    camera = cameras["sharp" if sharp_one else "soft"]
    y_i = inverse.simulate_problem(jax.random.fold_in(key_noise, i), camera, images[20 + i], NOISE).y
    runs = [
        network_runs(jax.random.fold_in(key_run, 2 * i + index), name, y_i, 1)
        for index, name in enumerate(cameras)
    ]
    log_bayes_factors[i] = runs[0].log_evidence[0] - runs[1].log_evidence[0]
    errors[i] = np.hypot(*(run.log_evidence_std_error()[0] for run in runs))
    exact_log_bayes_factors[i] = exact_log_evidence("sharp", y_i) - exact_log_evidence("soft", y_i)


def scorecard(name, log_bayes_factors):
    p = probability(log_bayes_factors)
    chosen = np.maximum(p, 1 - p)  # probability of the chosen camera
    right = (p > 0.5) == is_sharp
    spread = np.sqrt(np.sum(chosen * (1 - chosen)))
    score = -np.mean(np.log(np.where(is_sharp, p, 1 - p)))
    print(
        f"{name}: {right.sum()} of 20 right, expected {chosen.sum():.1f} ± {spread:.1f}; "
        f"log loss {score:.2f} (a coin: {np.log(2):.2f})"
    )
    for low, high in ((0.5, 0.8), (0.8, 0.95), (0.95, 1.0)):
        inside = (chosen >= low) & (chosen < high)
        print(
            f"    stated {low:.2f} to {high:.2f}: {inside.sum():2d} measurements, {right[inside].sum():2d} right"
        )


scorecard("network, SMC ", log_bayes_factors)
scorecard("mixture, exact", exact_log_bayes_factors)
print(
    f"standard errors of the log Bayes factor: {errors.min():.2f} to {errors.max():.2f}, median {np.median(errors):.2f}"
)
print(f"closer to 0 than two standard errors: {(np.abs(log_bayes_factors) < 2 * errors).sum()} of 20")

# %%
figure, axis = plt.subplots(figsize=(6.5, 2.8))
order = np.argsort(log_bayes_factors)
for is_one, name, color in ((True, "sharp", "C0"), (False, "soft", "C1")):
    places = np.flatnonzero(is_sharp[order] == is_one)
    chosen = order[places]
    axis.errorbar(
        places,
        log_bayes_factors[chosen],
        2 * errors[chosen],
        fmt="o",
        color=color,
        markersize=4,
        label=f"taken by {name}",
    )
    axis.plot(places, exact_log_bayes_factors[chosen], "x", color=color, markersize=5, label="mixture, exact")
axis.axhline(0, color="black", linewidth=0.8)
axis.set(xlabel="measurement, sorted", ylabel="log Bayes factor", xticks=[])
axis.legend(fontsize=8, ncols=2)
figure.tight_layout()

# %% [markdown]
# Points are the network's estimates with bars of two standard errors, crosses are the exact values under the mixture.
#
# The cameras chosen are right about as often as their probabilities said, for either prior, and the log loss is far
# below that of a coin. How much does that prove? Twenty measurements can show that something is badly wrong: with
# evidences off by several nats, some choices would have been called certain and been wrong. They cannot show that a
# stated 0.9 is not a 0.8; for that take hundreds. Held-out digits test the sampler and the prior at once. To test the
# sampler alone, draw the truths from the prior ([Reading the diagnostics](../../diagnostics.md)).
#
# Where points and crosses differ by far more than the bars, it is the priors that differ. The network is the more
# decided of the two, as the larger number that it expects to get right shows.
#
# ## What to take home
#
# - Report a log Bayes factor with its standard error, from several runs; and pool by evidence, not by averaging logs.
# - The error must be small beside the log Bayes factor, or beside 1 where you need the probability itself. If it is
#   not: a better twist, more particles, finer steps where the ESS falls to a few.
# - Double the number of steps once. The difference is not in any standard error.
# - All models must use the same prior, the same grid and the same $y$, and normalised likelihoods.
# - Where there are not two models but a continuum, as any width of the blur, do not make a table of evidences:
#   [particle marginal Metropolis-Hastings](../../particle_gibbs.md) samples the width.
