"""Feynman-Kac steering: samples of the prior, resampled on the way by any reward of the denoised sample.

Particles move by the prior's reverse chain and are weighed at some of its steps j = 1, ..., J, the last of which is
the end, by potentials of r_j = r(x0_hat(x)) with r(x_0) itself at the end:

    difference    G_j = exp(scale (r_j - r_{j-1})),        r_0 = 0
    max           G_j = exp(scale max(r_1, ..., r_j))
    sum           G_j = exp(scale (r_1 + ... + r_j))

and the last one is whatever is missing, G_J = exp(scale r(x_0)) / (G_1 ... G_{J-1}), so that their product is
exp(scale r(x_0)) for each of them. Hence the weighted particles target prior chain x exp(scale r(x_0)) and
exp(log_evidence) is an unbiased estimate of E[exp(scale r(x_0))], whatever the potential; it decides the variance.
Weights that no resampling has used are carried, here as in all of `smcdiff.smc`.

The reward is not differentiated: it may be a classifier's verdict, a compiler, or any function of Python's (see
`jax_reward`). Max and sum favour particles with a promising past; their last potentials undo what went before, so that
few particles keep weight if they were strong: use them with a small scale or few, late potentials.

Source: Singhal et al., "A General Framework for Inference-time Scaling and Steering of Diffusion Models",
arXiv 2501.06848.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.density import DiffusionModel
from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.prior_chain import PriorChain, prior_chain

__all__ = ["Reward", "SteeredParticle", "check_reward", "fk_steering", "jax_reward"]

Reward = Callable[[Float[Array, "*event"]], Float[Array, ""]]
POTENTIALS = ("difference", "max", "sum")


class SteeredParticle(NamedTuple):
    """One particle of Feynman-Kac steering.

    Attributes
    ----------
    x
        The noisy sample x_t; the sample itself after the last step.
    denoised
        E[x_0 | x_t = x].
    previous
        The same one step before, from which the second-order step extrapolates.
    statistic
        Of the rewards so far: the last one, their maximum or their sum.
    log_product
        Log of the product of all potentials so far.
    """

    x: Float[Array, "*event"]
    denoised: Float[Array, "*event"]
    previous: Float[Array, "*event"]
    statistic: Float[Array, ""]
    log_product: Float[Array, ""]


class _Steering(eqx.Module):
    chain: PriorChain
    reward: Callable
    scale: Float[Array, ""]
    interval: int = eqx.field(static=True)
    potential: str = eqx.field(static=True)


def fk_steering(
    model: DiffusionModel,
    reward: Reward,
    *,
    times: Float[Array, " steps"],
    potential: str = "difference",
    scale: float | Float[Array, ""] = 1.0,
    interval: int = 1,
    order: int = 2,
) -> FeynmanKac:
    """Feynman-Kac model of steering by a reward: its target is prior(x_0) exp(scale * reward(x_0)).

    Run it with `smcdiff.run_smc`, or hand it to `smcdiff.smc`. Particles are `SteeredParticle`s.

    Parameters
    ----------
    model
        The prior: anything with ``schedule``, ``event_shape`` and ``denoise``.
    reward
        ``reward(x) -> scalar`` of one (denoised) sample, finite; differentiable or not. A `jax.tree_util.Partial` or
        an equinox module keeps its weights leaves; `jax_reward` makes one of a function that JAX cannot trace.
    times
        Grid that falls from 1 to 0, for instance `log_snr_times(model.schedule, 100)`.
    potential
        "difference", "max" or "sum"; see the module.
    scale
        Strength of the reward. A negative one seeks small rewards, but then "max" is the maximum of them still.
    interval
        Steps from one potential to the next; the end has one in any case. In between the reward is not computed.
    order
        1 for ancestral steps, 2 for the second-order chain.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser or ``reward`` is not callable.
    ValueError
        If ``times`` is no grid from 1 to 0, ``reward`` does not return a scalar, ``potential`` is unknown, ``interval``
        is not a positive integer, or ``order`` is neither 1 nor 2.

    Source: "A General Framework for Inference-time Scaling and Steering of Diffusion Models", arXiv 2501.06848.
    """
    chain = prior_chain(model, times, order, "fk_steering")
    check_reward(reward, model.event_shape, chain.times.dtype)
    if potential not in POTENTIALS:
        raise ValueError(f"potential must be one of {POTENTIALS}, got {potential!r}.")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be a positive integer, got {interval!r}.")
    steering = _Steering(chain, reward, jnp.asarray(scale, chain.times.dtype), interval, potential)
    return FeynmanKac(Partial(_init, steering), Partial(_step, steering), chain.num_steps)


def check_reward(reward: Reward, event_shape: Sequence[int], dtype: Any) -> None:
    """Raise a `TypeError` or a `ValueError` unless ``reward`` is a function of one sample that returns a scalar."""
    if not callable(reward):
        raise TypeError(f"reward must be a function of one sample, got {type(reward).__name__}.")
    found = jax.eval_shape(reward, jax.ShapeDtypeStruct(tuple(event_shape), dtype))
    if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"reward must return a real scalar for one sample of shape {tuple(event_shape)}, got {found}; "
            "it is vectorised over particles by jax.vmap."
        )


def _init(steering, rng_key):
    """Draw x_1, unweighed: the denoised sample of pure noise says nothing."""
    x = steering.chain.start(rng_key)
    denoised, zero = steering.chain.denoise(x, 0), jnp.zeros((), x.dtype)
    statistic = jnp.full_like(zero, -jnp.inf) if steering.potential == "max" else zero
    return SteeredParticle(x, denoised, denoised, statistic, zero), zero


def _step(steering, rng_key, particle, k):
    """Move from times[k] to times[k + 1] by the prior chain, and weigh where a potential is due."""
    chain, scale = steering.chain, steering.scale
    mean, std = chain.transition(particle, k)
    x = mean + std * jax.random.normal(rng_key, mean.shape, mean.dtype)
    denoised = chain.denoise(x, k + 1)

    is_last = k == chain.num_steps - 1
    is_due = is_last | ((k + 1) % steering.interval == 0)
    reward = _compute_when(is_due, steering.reward, denoised)
    match steering.potential:
        case "difference":
            statistic = reward
            log_potential = scale * reward - particle.log_product
        case "max":
            statistic = jnp.maximum(particle.statistic, reward)
            log_potential = scale * statistic
        case _:
            statistic = particle.statistic + reward
            log_potential = scale * statistic
    log_potential = jnp.where(is_last, scale * reward - particle.log_product, log_potential)
    log_potential = jnp.where(is_due, log_potential, 0.0)
    statistic = jnp.where(is_due, statistic, particle.statistic)
    log_product = particle.log_product + log_potential
    return SteeredParticle(x, denoised, particle.denoised, statistic, log_product), log_potential


def _compute_when(predicate, reward, x):
    """reward(x) where ``predicate`` holds, else anything.

    Under vmap a condition becomes a choice between two results, both computed. Here all particles and chains are at
    the same step, so that the predicate of the batch is that of any of its members, and remains a condition.
    """
    arrays, rest = eqx.partition(reward, eqx.is_array)

    def compute(arrays, x):
        return eqx.combine(arrays, rest)(x)

    return _call_when(predicate, compute, arrays, x)


def _call_when(predicate, function, *args):
    @jax.custom_batching.custom_vmap
    def call(predicate, *args):
        out = jax.eval_shape(function, *args)
        return jax.lax.cond(predicate, function, lambda *_: jnp.zeros(out.shape, out.dtype), *args)

    @call.def_vmap
    def _(axis_size, in_batched, predicate, *args):
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        batched = jax.vmap(function, axes[1:], axis_size=axis_size)
        shared = jnp.any(predicate) if in_batched[0] else predicate
        return _call_when(shared, batched, *args), True

    return call(predicate, *args)


class _PythonReward(eqx.Module):
    function: Callable = eqx.field(static=True)

    def __call__(self, x):
        def call(batch):
            batch = np.asarray(batch)
            lead = batch.shape[: batch.ndim - x.ndim]
            values = np.asarray(self.function(batch.reshape(-1, *x.shape)), x.dtype)
            if values.size != np.prod(lead, dtype=int):
                raise ValueError(
                    f"a reward for jax_reward must return one number for each of {np.prod(lead, dtype=int)} "
                    f"samples, got shape {values.shape}."
                )
            return values.reshape(lead)

        return jax.pure_callback(call, jax.ShapeDtypeStruct((), x.dtype), x, vmap_method="expand_dims")


def jax_reward(function: Callable[[np.ndarray], np.ndarray]) -> Reward:
    """Make a reward of a Python function that JAX cannot trace: another framework's model, a simulator, a library.

    Parameters
    ----------
    function
        ``function(samples) -> rewards`` of a NumPy array of samples (n, *event_shape), one number each; called on the
        host with all particles that are due at once. It must depend on its argument alone, and must not call JAX.

    Returns
    -------
    Reward of one sample, to be vectorised as any other. It has no gradient.
    """
    return _PythonReward(function)
