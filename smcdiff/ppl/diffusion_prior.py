"""A diffusion model as a NumPyro distribution: the prior of a sample site."""

import math
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import constraints

from smcdiff.batching import batched_map
from smcdiff.checks import check_count
from smcdiff.density import DiffusionModel, HasLogDensity, require, warn_unless_diffusion
from smcdiff.ode_density import ode_logdensity
from smcdiff.reverse import reverse_sample
from smcdiff.schedules import log_snr_times

__all__ = ["DiffusionPrior"]


class DiffusionPrior(dist.Distribution):
    """A diffusion model as a NumPyro distribution.

    In a model, ``x = numpyro.sample("x", DiffusionPrior(model))`` has ``event_shape`` of the diffusion and the support
    of all real arrays. Prior draws, `numpyro.infer.Predictive` and handlers need its denoiser only; so does
    `smcdiff.infer`, which samples such a site from its posterior without a density. NumPyro's own kernels call
    ``log_prob``.

    It is a pytree, of which the model's weights are leaves: pass the diffusion to the NumPyro model as an argument, and
    other weights compile nothing anew.

    Parameters
    ----------
    model
        The diffusion model.
    num_steps
        Reverse steps of a draw, on the grid uniform in log-SNR.
    log_density
        How ``log_prob`` is found: None takes that of the model at ``time``, which exact models have, and energy-based
        ones up to a constant; "pf_ode" solves the probability-flow equation, see `smcdiff.ode_logdensity`.
    time
        Time of the density; energy-based models need one above 0.
    num_probes
        For "pf_ode": probes of the trace, None for the exact one.
    batch_size
        Samples handled together; bounds memory and changes no result.

    Raises
    ------
    TypeError
        If ``model`` has no denoiser; by ``log_prob``, if it has no density and none was asked for.
    ValueError
        If ``log_density`` is neither None nor "pf_ode", or a count is not a positive integer; by ``log_prob``, if a
        value does not end with the event shape.

    Warns
    -----
    UserWarning
        If ``model`` is a composition, which is not the noised version of its law at t = 0.
    """

    arg_constraints: dict = {}
    reparametrized_params: list = []
    pytree_data_fields = ("model", "time")
    pytree_aux_fields = ("num_steps", "log_density", "num_probes", "batch_size")

    def __init__(
        self,
        model: DiffusionModel,
        *,
        num_steps: int = 100,
        log_density: str | None = None,
        time: Float[Array, ""] | float = 0.0,
        num_probes: int | None = None,
        batch_size: int | None = None,
        validate_args: bool | None = None,
    ):
        require(model, DiffusionModel, "DiffusionPrior")
        warn_unless_diffusion(model, "DiffusionPrior")
        check_count("num_steps", num_steps)
        if log_density not in (None, "pf_ode"):
            raise ValueError(f'log_density must be None or "pf_ode", got {log_density!r}.')
        self.model = model
        self.num_steps = num_steps
        self.log_density = log_density
        self.time = jnp.asarray(time, float)
        self.num_probes = num_probes
        self.batch_size = batch_size
        super().__init__((), tuple(model.event_shape), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self):
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape"]:
        """Draws of shape ``sample_shape + event_shape`` by the reverse process, to second order."""
        times = log_snr_times(self.model.schedule, self.num_steps)
        num_samples = math.prod(sample_shape)
        draws = reverse_sample(key, self.model, times, num_samples, order=2, batch_size=self.batch_size)
        return draws.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Float[Array, "*shape"], intermediates: Any = None) -> Float[Array, "*batch"]:
        """Log density of values of shape ``(*batch, *event_shape)``."""
        value = jnp.asarray(value)
        split = value.ndim - len(self.event_shape)
        batch, event = value.shape[: max(split, 0)], value.shape[max(split, 0) :]
        if event != self.event_shape:
            raise ValueError(
                f"a value of this DiffusionPrior must end with the axes {self.event_shape} of its model's samples, got "
                f"shape {value.shape}."
            )
        values = batched_map(self._log_density_function(), self.batch_size)(
            value.reshape(-1, *self.event_shape)
        )
        return values.reshape(batch)

    def _log_density_function(self):
        if self.log_density == "pf_ode":
            return lambda x: ode_logdensity(self.model, x, num_probes=self.num_probes)
        marginal = self.model.at(self.time)
        if not isinstance(marginal, HasLogDensity):
            raise TypeError(
                f"this DiffusionPrior knows the scores of a {type(self.model).__name__} and no density, and log_prob "
                "needs one. Sample the model by smcdiff.infer, which needs none; or ask for DiffusionPrior(model, "
                'log_density="pf_ode"), some hundred evaluations of the network; or use an exact or energy-based model.'
            )
        return marginal.logdensity
