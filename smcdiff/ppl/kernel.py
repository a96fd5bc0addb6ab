"""Any `SamplingAlgorithm` on any NumPyro model, as a NumPyro kernel."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jaxtyping import Array, Int, PRNGKeyArray, PyTree
from numpyro.infer.mcmc import MCMCKernel

from smcdiff.mcmc.warmup import Adaptation, adapt_until, begin_adaptation, settings_at
from smcdiff.ppl.target import NumPyroTarget, target_from_numpyro

__all__ = ["AlgorithmKernel", "AlgorithmKernelState", "as_numpyro_kernel"]


class AlgorithmKernelState(NamedTuple):
    """State of a kernel made by `as_numpyro_kernel`.

    Attributes
    ----------
    z
        Unconstrained values of the latent sites, by name.
    inner
        The algorithm's own state.
    info
        What the algorithm said of its last step; zeros before the first one.
    adaptation
        The warm-up, of which the settings are used; None without one.
    num_steps
        Number of steps made.
    rng_key
        Key of the next step.
    """

    z: dict[str, Array]
    inner: PyTree
    info: PyTree
    adaptation: Adaptation | None
    num_steps: Int[Array, ""]
    rng_key: PRNGKeyArray


class AlgorithmKernel(MCMCKernel):
    """NumPyro kernel of an algorithm; make it by `as_numpyro_kernel`."""

    sample_field = "z"

    def __init__(
        self,
        model: Callable,
        builder: Callable[..., SamplingAlgorithm],
        target_acceptance: float | None = None,
    ):
        self._model, self._builder, self._target_acceptance = model, builder, target_acceptance
        # Set by `init`.
        self._num_warmup = 0
        self._transforms: dict[str, Any] = {}

    @property
    def model(self) -> Callable:
        """The NumPyro model."""
        return self._model

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> AlgorithmKernelState:
        """Start where ``init_params`` says, unconstrained values by name, or else as NumPyro's kernels do."""
        target = self._target(model_args, model_kwargs)
        self._num_warmup, self._transforms = num_warmup, target.transforms()
        if jnp.ndim(rng_key) > _ndim_of_one(rng_key):  # vectorised chains come with a batch of keys
            return jax.vmap(lambda key, z: self._start(target, key, z))(rng_key, init_params)
        return self._start(target, rng_key, init_params)

    def sample(self, state: AlgorithmKernelState, model_args, model_kwargs) -> AlgorithmKernelState:
        """One step of the algorithm, which in the warm-up adapts its settings."""
        target = self._target(model_args, model_kwargs)
        is_batch = jnp.ndim(state.rng_key) > _ndim_of_one(state.rng_key)
        step = functools.partial(self._step, target)
        return (jax.vmap(step) if is_batch else step)(state)

    def refresh(self, state: AlgorithmKernelState, model_args, model_kwargs) -> AlgorithmKernelState:
        """Start anew from the same position: what the state knows of its density is no longer true."""
        target = self._target(model_args, model_kwargs)
        rng_key, key_init = jax.random.split(state.rng_key)
        inner = self._algorithm(target, state).init(target.join(state.z), key_init)
        return state._replace(inner=inner, rng_key=rng_key)

    def wrap_model(self, wrapper: Callable) -> "AlgorithmKernel":
        """The same algorithm for the model ``wrapper(model)``."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        return kernel

    def postprocess_fn(self, model_args, model_kwargs) -> Callable:
        """Values of the latent and of the deterministic sites."""
        target = self._target(model_args, model_kwargs)
        return lambda z: target.constrain(target.join(z))

    def get_constrain_fn(self, model_args, model_kwargs) -> Callable:
        """Values of the latent sites, by their transforms alone."""
        return lambda z: {name: self._transforms[name](value) for name, value in z.items()}

    def _target(self, args, kwargs) -> NumPyroTarget:
        return target_from_numpyro(self._model, *args, **(kwargs or {}))

    def _algorithm(self, target, state):
        """The algorithm with the settings of a state."""
        if state.adaptation is None:
            return self._builder(target)
        return self._builder(target, **settings_at(state.adaptation, state.num_steps, self._num_warmup))

    def _start(self, target, rng_key, z):
        """State of one chain."""
        key_start, key_init, key_step, rng_key = jax.random.split(rng_key, 4)
        position = target.initial_position(key_start) if z is None else target.join(z)
        adaptation = None
        if self._target_acceptance is not None:
            adaptation = begin_adaptation(jnp.ones((), position.dtype), jnp.ones_like(position))
        state = AlgorithmKernelState(
            target.split(position), None, None, adaptation, jnp.zeros((), jnp.int32), rng_key
        )
        algorithm = self._algorithm(target, state)
        inner = algorithm.init(position, key_init)
        shapes = jax.eval_shape(algorithm.step, key_step, inner)[1]
        info = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return state._replace(inner=inner, info=info)

    def _step(self, target, state):
        """One step of one chain."""
        rng_key, key_step = jax.random.split(state.rng_key)
        inner, info = self._algorithm(target, state).step(key_step, state.inner)
        adaptation = state.adaptation
        if adaptation is not None and self._target_acceptance is not None:
            adaptation = adapt_until(
                adaptation, inner.position, info, state.num_steps, self._num_warmup, self._target_acceptance
            )
        return AlgorithmKernelState(
            target.split(inner.position), inner, info, adaptation, state.num_steps + 1, rng_key
        )


def as_numpyro_kernel(
    model: Callable,
    builder: Callable[..., SamplingAlgorithm],
    *,
    target_acceptance: float | None = None,
) -> AlgorithmKernel:
    """A kernel for `numpyro.infer.MCMC`, and for the blocks of NumPyro's `Gibbs`, of any algorithm.

    Parameters
    ----------
    model
        The NumPyro model.
    builder
        ``builder(target)`` makes the algorithm for a `NumPyroTarget`, for instance ``smcdiff.mcmc.polar_slice``, or
        ``lambda target: blackjax.elliptical_slice(...)``. With ``target_acceptance``, ``builder(target, step_size=...,
        inverse_mass_matrix=...)``, for instance ``functools.partial(smcdiff.mcmc.hmc, num_integration_steps=10)``.
    target_acceptance
        The acceptance rate to which the warm-up tunes the step size, beside the variances, in Stan's windows; in (0,
        1). None: the algorithm has no settings to tune, and the warm-up's steps are only dropped.

    Returns
    -------
    AlgorithmKernel
        ``extra_fields=("info.acceptance_rate",)`` of `numpyro.infer.MCMC.run` collects what the algorithm reports.
        Every ``chain_method`` works. ``init_params`` are unconstrained values by site.

    Raises
    ------
    TypeError
        When it starts, as `target_from_numpyro` does, or if the algorithm's info lacks the acceptance rate to tune.
    ValueError
        If ``target_acceptance`` is not in (0, 1); when it starts, as `target_from_numpyro` does.

    Source: "Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro", arXiv 1912.11554.
    """
    if target_acceptance is not None and not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must lie between 0 and 1, got {target_acceptance}.")
    return AlgorithmKernel(model, builder, target_acceptance)


def _ndim_of_one(rng_key: Any) -> int:
    """Number of axes of one key: 0 for a typed one, 1 for a raw one."""
    return 0 if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else 1
