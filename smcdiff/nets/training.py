"""Training a network to denoise.

The thing that is trained is ``Diffusion.denoise`` itself, so the rescalings of the prediction are written once, in
``smcdiff.diffusion``.  With s = sigma/alpha and x_t = alpha x_0 + sigma eps the loss is the weighted error

    L = E_s E_{x_0, eps} [ (s^2 + sd^2) / (s sd)^2 * | denoise(x_t, t) - x_0 |^2 / d ],        sd = sigma_data,

whose weight makes the network's own target of unit variance at every noise level (T. Karras et al., "Elucidating the
design space of diffusion-based generative models", arXiv 2206.00364).  Its minimiser is the posterior mean E[x_0|x_t]
at every s, whatever the distribution of s; that only says where the network's capacity goes.  Here it is a mixture:
log-normal about the middle levels, where images are made, and uniform in log s over the whole range, because posterior
samplers divide by s^2 and so use the denoiser at levels that pretty pictures do not need.  Levels are stratified over
the batch.

Step k draws everything from ``fold_in(rng_key, k)``, so a run that was stopped and resumed is the uninterrupted run,
bit for bit.  The weights that are returned are an exponential moving average of those that were trained.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["NoiseLevels", "TrainingState", "denoising_loss", "train"]

HELD_OUT_LOG_SNRS = (5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0)


class NoiseLevels(NamedTuple):
    """Distribution of log s at training: a log-normal with probability ``fraction``, else uniform in log s.

    Attributes
    ----------
    centre, width
        Mean and standard deviation of log(s / sigma_data) in the log-normal part.
    fraction
        Probability of the log-normal part.
    lowest, highest
        Range of s in the uniform part (and the bounds of the whole).
    """

    centre: float = -0.5
    width: float = 1.2
    fraction: float = 0.6
    lowest: float = 0.002
    highest: float = 200.0

    def sample(self, rng_key: PRNGKeyArray, sigma_data: Array, batch_size: int) -> Float[Array, " batch"]:
        """Draw stratified log s, shape (batch_size,)."""
        key_shift, key_part, key_order = jax.random.split(rng_key, 3)
        strata = jnp.arange(batch_size, dtype=jnp.float32)
        # Quantiles are stratified within each part, and parts and quantiles are paired at random.
        quantile = (strata + jax.random.uniform(key_shift, (batch_size,))) / batch_size
        quantile = jax.random.permutation(key_order, jnp.clip(quantile, 1e-6, 1 - 1e-6))
        in_middle = (strata + jax.random.uniform(key_part)) / batch_size < self.fraction
        low, high = np.log(self.lowest).astype(np.float32), np.log(self.highest).astype(np.float32)
        middle = jnp.log(sigma_data) + self.centre + self.width * jax.scipy.special.ndtri(quantile)
        return jnp.clip(jnp.where(in_middle, middle, low + (high - low) * quantile), low, high)


class TrainingState(NamedTuple):
    """What the next training step needs.

    Attributes
    ----------
    params
        The network that is trained.
    average
        Its exponential moving average.
    optimizer
        State of the optimiser.
    step
        Number of steps done, an int32 scalar.
    """

    params: Any
    average: Any
    optimizer: Any
    step: Array


def _with_params(model: Any, params: Any) -> Any:
    return eqx.tree_at(lambda m: m.params, model, params)


def _squared_error(model: Any, x0: Array, log_s: Array, noise: Array) -> tuple[Array, Array]:
    """Mean squared error per pixel of the denoised image, and s, for one image."""
    t = model.schedule.time_from_log_snr(-log_s)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    denoised = model.denoise(alpha * x0 + sigma * noise, t)
    return jnp.mean(jnp.square(denoised - x0)), sigma / alpha


def _loss(params: Any, model: Any, batch: Array, log_s: Array, noise: Array) -> Array:
    model = _with_params(model, params)
    error, s = jax.vmap(lambda x, level, z: _squared_error(model, x, level, z))(batch, log_s, noise)
    variance = jnp.square(model.sigma_data)
    return jnp.mean(error * (jnp.square(s) + variance) / (jnp.square(s) * variance))


def _optimizer(num_steps: int, learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    warm_up = max(1, min(500, num_steps // 20))
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, max(num_steps, warm_up + 1), 0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=weight_decay))


@eqx.filter_jit(donate="all-except-first")
def _step(constants: tuple, state: TrainingState) -> tuple[TrainingState, Array]:
    rng_key, model, data, (num_steps, batch_size, learning_rate, weight_decay, ema_decay, levels) = constants
    key_batch, key_level, key_noise = jax.random.split(jax.random.fold_in(rng_key, state.step), 3)
    batch = data[jax.random.randint(key_batch, (batch_size,), 0, data.shape[0])]
    log_s = levels.sample(key_level, jnp.asarray(model.sigma_data, data.dtype), batch_size)
    noise = jax.random.normal(key_noise, batch.shape, batch.dtype)
    loss, gradient = jax.value_and_grad(_loss)(state.params, model, batch, log_s, noise)
    optimizer = _optimizer(num_steps, learning_rate, weight_decay)
    # Optax mixes its integer counter with floats, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # Early averages forget quickly, or the random initial weights would stay in for 1/(1 - decay) steps.
    count = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    return TrainingState(params, average, opt_state, state.step + 1), loss


@eqx.filter_jit
def _errors(model: Any, data: Array, log_snr: Array, rng_key: PRNGKeyArray, batch_size: int) -> Array:
    def one(pair: tuple[Array, Array]) -> Array:
        index, x0 = pair
        noise = jax.random.normal(jax.random.fold_in(rng_key, index), x0.shape, x0.dtype)
        return _squared_error(model, x0, -log_snr, noise)[0]

    return jax.lax.map(one, (jnp.arange(data.shape[0]), data), batch_size=batch_size)


def denoising_loss(
    model: Any, data: Float[Array, "N ..."], log_snrs: Any, rng_key: PRNGKeyArray, *, batch_size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error per pixel of the denoised data, one figure per noise level.

    Parameters
    ----------
    model
        A ``Diffusion``.
    data
        Clean samples (N, *event_shape), best ones which the model has not seen.
    log_snrs
        Levels log(alpha/sigma), shape (L,).
    rng_key
        Key of the noise; sample i at level j gets its own noise, whatever the batch size.
    batch_size
        Samples denoised at a time.

    Returns
    -------
    mse
        Shape (L,): mean over samples and pixels of (denoised - clean)^2.
    standard_error
        Shape (L,): standard error of that mean over the N samples.
    """
    data = jnp.asarray(data)
    means, errors = [], []
    for index, log_snr in enumerate(np.asarray(log_snrs, np.float32)):
        values = np.asarray(
            _errors(
                model, data, jnp.asarray(log_snr, data.dtype), jax.random.fold_in(rng_key, index), batch_size
            ),
            np.float64,
        )
        means.append(values.mean())
        errors.append(values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.inf)
    return np.array(means), np.array(errors)


def train(
    rng_key: PRNGKeyArray,
    model: Any,
    data: Float[Array, "N ..."],
    *,
    num_steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-4,
    ema_decay: float = 0.999,
    noise_levels: NoiseLevels | None = None,
    held_out: Float[Array, "M ..."] | None = None,
    evaluate_every: int = 1000,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[Any, dict[str, list]]:
    """Train the network of a ``Diffusion`` to denoise, and return the model with averaged weights.

    Parameters
    ----------
    rng_key
        Key of batches, levels and noise; step k uses ``fold_in(rng_key, k)``.
    model
        A ``Diffusion`` whose ``params`` is the network at its start; its ``sigma_data`` should be the rms of the data.
    data
        Training samples (N, *event_shape).
    num_steps, batch_size, learning_rate, weight_decay
        Of AdamW with a warm-up, a cosine decay to zero, and gradients clipped to norm 1.
    ema_decay
        Decay of the moving average of the weights per step (its horizon is 1 / (1 - ema_decay) steps).
    noise_levels
        Distribution of sigma/alpha; ``NoiseLevels()`` if not given.
    held_out
        Samples for the held-out loss, reported every ``evaluate_every`` steps; none are used for training.
    evaluate_every
        Steps between reports and checkpoints.
    checkpoint
        File to write the state to (safetensors) and to resume from if it exists.
    progress
        Show a progress bar.

    Returns
    -------
    model
        The same ``Diffusion`` with averaged weights.
    history
        Lists ``step``, ``loss`` (weighted, mean since the last report), ``held_out`` (mse per level) and ``seconds``.

    Raises
    ------
    ValueError
        If the data have another shape than the model.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.
    """
    data = jnp.asarray(data)
    if data.shape[1:] != tuple(model.event_shape):
        raise ValueError(
            f"data has shape {data.shape}, the model takes samples of shape {tuple(model.event_shape)}: "
            "pass an array (N, *event_shape)."
        )
    from tqdm.auto import tqdm

    from smcdiff.checkpoints.arrays import load_arrays, save_arrays

    params = model.params
    state = TrainingState(
        jax.tree.map(jnp.array, params),
        jax.tree.map(jnp.array, params),
        _optimizer(num_steps, learning_rate, weight_decay).init(params),
        jnp.zeros((), jnp.int32),
    )
    history: dict[str, list] = {"step": [], "loss": [], "held_out": [], "seconds": []}
    if checkpoint is not None and Path(checkpoint).exists():
        state, history = load_arrays(checkpoint, state)
    levels = NoiseLevels() if noise_levels is None else noise_levels
    constants = (
        rng_key,
        model,
        data,
        (num_steps, batch_size, learning_rate, weight_decay, ema_decay, levels),
    )

    losses: list[Array] = []
    done = int(state.step)
    started = time.monotonic() - (history["seconds"][-1] if history["seconds"] else 0.0)
    bar = tqdm(total=num_steps, initial=done, disable=not progress, mininterval=10.0)
    while done < num_steps:
        # One compiled step at a time: inside lax.scan a CPU runs the gradients of convolutions many times slower.
        state, loss = _step(constants, state)
        losses.append(loss)
        done += 1
        bar.update()
        if done % evaluate_every == 0 or done == num_steps:
            history["step"].append(done)
            history["loss"].append(float(np.mean(np.asarray(losses, np.float64))))
            history["seconds"].append(time.monotonic() - started)
            losses = []
            if held_out is not None:
                averaged = _with_params(model, state.average)
                mse, _ = denoising_loss(averaged, held_out, HELD_OUT_LOG_SNRS, jax.random.key(0))
                history["held_out"].append(mse.tolist())
                if progress:
                    bar.write(
                        f"{done} loss {history['loss'][-1]:.4f} held-out " + " ".join(f"{m:.3g}" for m in mse)
                    )
            if checkpoint is not None:
                save_arrays(checkpoint, state, history)
    bar.close()
    return _with_params(model, state.average), history
