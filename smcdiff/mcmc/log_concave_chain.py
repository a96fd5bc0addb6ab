"""A chain of log-concave chains: sampling by one noisy measurement after the other.

Of an unknown sample X take measurements y_m = X + sigma N_m, m = 1, 2, .... With their mean ybar_m, whose noise is
sigma_m = sigma/sqrt(m), the law of the next one given those before has the score

    grad log p(y_m | y_1, ..., y_(m-1)) = (E[X | ybar_m] - y_m) / sigma^2,
    ybar_m = ybar_(m-1) + (y_m - ybar_(m-1)) / m,

where E[X | ybar_m] = ybar_m + sigma_m^2 s(ybar_m; sigma_m) is a diffusion model's denoised sample at the time with
sigma(t)/alpha(t) = sigma_m; and, where the model has log densities, the log density

    log p_(sigma_m)(ybar_m) - (m - 1) |y_m - ybar_(m-1)|^2 / (2 m sigma^2) + constant.

If sigma is large enough (sigma^2 > R^2 - tau^2 for points in a ball of radius R blurred by tau), each of these laws is
log-concave, and a short chain samples it, whatever the modes of X are. The sample is E[X | ybar_M]: its law tends to
that of X as sigma_M falls, and ybar_M has the law of X + sigma_M N. Both are right up to what the inner chains leave.

Source: Saremi, Park and Bach, "Chain of Log-Concave Markov Chains", arXiv 2305.19473.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from smcdiff.checks import check_count, check_positive
from smcdiff.density import DiffusionModel, HasLogDensity, require, warn_unless_diffusion
from smcdiff.mcmc.combinators import has_diverged

__all__ = ["LogConcaveChainInfo", "LogConcaveChainState", "log_concave_chain"]


class LogConcaveChainState(NamedTuple):
    """State after m measurements.

    Attributes
    ----------
    position
        E[X | ybar_m], the sample that the chain would return now, of shape ``event_shape``.
    measurement
        The last measurement y_m, in data units.
    mean
        Mean ybar_m of the measurements: of the law of X + sigma/sqrt(m) N.
    num_measurements
        Their number m.
    """

    position: Float[Array, "*event"]
    measurement: Float[Array, "*event"]
    mean: Float[Array, "*event"]
    num_measurements: Int[Array, ""]


class LogConcaveChainInfo(NamedTuple):
    """What happened while one measurement was added.

    Attributes
    ----------
    acceptance_rate
        Mean of the inner chain's; 1 if its kernel reports none.
    noise_std
        sigma/sqrt(m), the noise that is left in the mean.
    is_divergent
        Whether a step of the inner chain diverged; False if its kernel reports none.
    """

    acceptance_rate: Float[Array, ""]
    noise_std: Float[Array, ""]
    is_divergent: Bool[Array, ""]


class _Kernel(eqx.Module):
    model: DiffusionModel
    noise_std: Float[Array, ""]
    kernel: Callable
    num_inner_steps: int = eqx.field(static=True)
    has_logdensity: bool = eqx.field(static=True)


class _Measurement(eqx.Module):
    """The law of measurement number ``count``, given those before by their mean."""

    model: DiffusionModel
    noise_std: Float[Array, ""]
    mean: Float[Array, "*event"]
    count: Int[Array, ""]

    def new_mean(self, y):
        return self.mean + (y - self.mean) / self.count.astype(y.dtype)

    def left_std(self):
        return self.noise_std / jnp.sqrt(self.count.astype(self.noise_std.dtype))

    def time(self):
        return self.model.schedule.time_from_log_snr(-jnp.log(self.left_std()))

    def denoise(self, y):
        """E[X | ybar] with the measurement y."""
        t = self.time()
        return self.model.denoise(self.model.schedule.alpha(t) * self.new_mean(y), t)

    def score(self, y):
        return (self.denoise(y) - y) / self.noise_std**2


class _MeasurementDensity(_Measurement):
    """The same where the model has log densities."""

    def logdensity(self, y):
        t, count = self.time(), self.count.astype(y.dtype)
        mean = self.model.schedule.alpha(t) * self.new_mean(y)
        spread = 0.5 * (count - 1.0) / count * jnp.sum(((y - self.mean) / self.noise_std) ** 2)
        density: Any = self.model.at(t)
        return density.logdensity(mean) - spread


def log_concave_chain(
    model: DiffusionModel,
    noise_std: Float[Array, ""] | float,
    kernel: Callable[[Any], SamplingAlgorithm],
    *,
    num_inner_steps: int,
) -> SamplingAlgorithm:
    """Sample by noisy measurements, one a step: M steps of `smcdiff.run` and as many chains as samples are wanted.

    It is no chain with a stationary law: each run ends in one sample, the last position, whose noise falls with the
    number of steps.

    Parameters
    ----------
    model
        Any diffusion model.
    noise_std
        Deviation sigma of a measurement, in data units; at most sigma(1)/alpha(1) of the schedule. Large enough to run
        the modes together: about the radius of the data.
    kernel
        ``kernel(target) -> SamplingAlgorithm``, the inner chain, with steps in units of ``noise_std``: for instance
        ``Partial(smcdiff.mcmc.underdamped, step_size=0.5 * noise_std)``. Targets have a log density if the model does.
    num_inner_steps
        Steps of the inner chain for each measurement.

    Returns
    -------
    SamplingAlgorithm, with `LogConcaveChainState` and `LogConcaveChainInfo`. The starting position, zero if it is None,
    is the point around which the first measurement is guessed.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser; or as ``kernel`` does.
    ValueError
        If ``noise_std`` is not positive or beyond the schedule, or ``num_inner_steps`` is no positive integer.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.

    Source: Saremi, Park and Bach, "Chain of Log-Concave Markov Chains", arXiv 2305.19473.
    """
    require(model, DiffusionModel, "log_concave_chain")
    warn_unless_diffusion(model, "log_concave_chain")
    check_noise_std("noise_std", noise_std, model)
    check_count("num_inner_steps", num_inner_steps)
    has_logdensity = isinstance(model.at(jnp.asarray(0.5)), HasLogDensity)
    noise_std = jnp.asarray(noise_std, float)
    chain = _Kernel(model, noise_std, kernel, num_inner_steps, has_logdensity)
    target = _measurement(chain, jnp.zeros(model.event_shape), jnp.ones((), int))
    kernel(target)  # what it lacks is said now, not in the first step
    return SamplingAlgorithm(Partial(_init, chain), Partial(_step, chain))


def check_noise_std(name: str, noise_std, model: DiffusionModel) -> None:
    """Raise a `ValueError` unless ``noise_std`` is positive and a noise level of the model's schedule; tracers pass."""
    check_positive(name, noise_std)
    largest = jnp.exp(-model.schedule.log_snr(jnp.asarray(1.0)))
    if isinstance(noise_std, jax.core.Tracer) or isinstance(largest, jax.core.Tracer):
        return
    if not float(jnp.max(jnp.asarray(noise_std))) <= float(largest) * (1 + 1e-5):
        raise ValueError(
            f"{name} must be at most sigma/alpha = {float(largest):.4g} at t = 1 of the schedule, got {noise_std}."
        )


def _measurement(chain, mean, count):
    cls = _MeasurementDensity if chain.has_logdensity else _Measurement
    return cls(chain.model, chain.noise_std, mean, count)


def _init(chain, position, rng_key):
    """No measurement yet."""
    dtype = chain.noise_std.dtype
    position = jnp.zeros(chain.model.event_shape, dtype) if position is None else position
    return LogConcaveChainState(position, position, jnp.zeros_like(position), jnp.zeros((), int))


def _step(chain, rng_key, state):
    """Guess the next measurement, run the inner chain on its law, and denoise the new mean."""
    key_guess, key_init, key_inner = jax.random.split(rng_key, 3)
    x = state.position
    law = _measurement(chain, state.mean, state.num_measurements + 1)
    guess = x + chain.noise_std.astype(x.dtype) * jax.random.normal(key_guess, x.shape, x.dtype)
    algorithm = chain.kernel(law)
    walker, infos = jax.lax.scan(
        lambda walker, key: algorithm.step(key, walker),
        algorithm.init(guess, key_init),
        jax.random.split(key_inner, chain.num_inner_steps),
    )
    y = walker.position
    acceptance = jnp.mean(getattr(infos, "acceptance_rate", jnp.ones((), y.dtype)))
    state = LogConcaveChainState(law.denoise(y), y, law.new_mean(y), law.count)
    return state, LogConcaveChainInfo(acceptance, law.left_std(), has_diverged(infos))
