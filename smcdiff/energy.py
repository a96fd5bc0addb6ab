"""A diffusion model whose network is an energy, so that it has a log density and Metropolis accepts exactly.

A network f(x, noise) of vectors makes a scalar U of its input, and the log density is that of the Gaussian which the
noisy data look like from afar, corrected by U:

    log p_t(x) = -|z|^2/2 + (alpha s/sigma) U(z, t) + const(t),    z = x / sqrt(alpha^2 s^2 + sigma^2),    s =
    sigma_data,

    U = <z, f>                         "inner"
    U = |z + f|^2/2 - |z|^2/2          "norm", the squared norm of a network with a skip connection
    U = |z|^2/2 - |z - f|^2/2          "residual", the squared error of an autoencoder

The gradient of U stands where the network of an "edm" prediction stands (`smcdiff.Diffusion`), so that it has a target
of unit variance at every noise level, and `smcdiff.nets.train` trains it as it trains any model: by the error of the
denoised sample. A score costs one forward and one backward pass. The constant const(t) is not known.

Sources: Du et al., "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC",
arXiv 2302.11552 (squared norms as energies); Salimans and Ho, "Should EBMs model the energy or the score?", ICLR 2021
workshop; Karras et al., arXiv 2206.00364 (scales).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from smcdiff.compose.operators import Composable
from smcdiff.schedules import Schedule

__all__ = ["EnergyDiffusion", "EnergyMarginal"]

FORMS = ("inner", "norm", "residual")


class EnergyDiffusion(Composable, eqx.Module):
    """A diffusion model that is known by its log density, up to a constant that depends on the time.

    All methods act on ONE sample. The weights are pytree leaves.

    Parameters
    ----------
    params
        Weights: any pytree of arrays.
    apply
        Function ``apply(params, z, noise)``, or ``apply(params, z, noise, condition)`` once `given` was called, of the
        scaled sample z and of log(sigma/alpha)/4, that returns an array like z; a module-level function.
    schedule
        The forward process.
    event_shape
        Shape of one sample.
    form
        How the network makes an energy: "inner", "norm" or "residual".
    sigma_data
        Root mean square of the data.
    condition
        Class label, embedding or any other pytree passed on to ``apply``; see `given`.

    Raises
    ------
    ValueError
        If ``form`` is unknown; in the methods, if ``x`` does not have the shape ``event_shape``.

    Source: "Reduce, Reuse, Recycle", arXiv 2302.11552.
    """

    params: PyTree
    apply: Callable = eqx.field(static=True)
    schedule: Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    form: str = eqx.field(default="norm", static=True, kw_only=True)
    sigma_data: float = eqx.field(default=0.5, kw_only=True)
    condition: Any = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}.")

    @property
    def has_data_density(self) -> bool:
        """False: the energy's scale and the network's noise level are infinite at t = 0."""
        return False

    def logdensity(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, ""]:
        """log p_t(x), up to a constant that depends on ``t``, for t > 0."""
        if jnp.shape(x) != self.event_shape:
            raise ValueError(
                f"x must be one sample of shape {self.event_shape}, got {jnp.shape(x)}; use jax.vmap for batches."
            )
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        scale = alpha * self.sigma_data
        z = x / jnp.sqrt(scale**2 + sigma**2)
        return -0.5 * jnp.sum(z**2) + scale / sigma * self._energy(z, 0.25 * jnp.log(sigma / alpha))

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """grad log p_t(x), for t > 0."""
        return jax.grad(self.logdensity)(x, t)

    def eps(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Posterior mean of the noise, E[eps | x_t = x]."""
        return -self.schedule.sigma(t) * self.score(x, t)

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Posterior mean E[x_0 | x_t = x]."""
        return (x + self.schedule.sigma(t) ** 2 * self.score(x, t)) / self.schedule.alpha(t)

    def at(self, t: Float[Array, ""]) -> "EnergyMarginal":
        """The marginal density at time ``t``, with log density and score; ``t`` is a leaf."""
        return EnergyMarginal(self, jnp.asarray(t))

    def given(self, condition: PyTree) -> "EnergyDiffusion":
        """The same model under a condition that ``apply`` takes as its fourth argument."""
        return eqx.tree_at(lambda m: m.condition, self, condition, is_leaf=lambda leaf: leaf is None)

    def _energy(self, z, noise):
        arguments = () if self.condition is None else (self.condition,)
        f = self.apply(self.params, z, noise, *arguments)
        inner = jnp.sum(z * f)
        match self.form:
            case "norm":
                return inner + 0.5 * jnp.sum(f**2)
            case "residual":
                return inner - 0.5 * jnp.sum(f**2)
        return inner


class EnergyMarginal(eqx.Module):
    """The density p_t of an energy model at one time.

    Parameters
    ----------
    model
        The energy model.
    t
        Time in (0, 1]; a leaf, so that annealing does not compile anew.
    """

    model: EnergyDiffusion
    t: Float[Array, ""]

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to a constant."""
        return self.model.logdensity(x, self.t)

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Score at one sample ``x``."""
        return self.model.score(x, self.t)

    def denoise(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Posterior mean E[x_0 | x_t = x]."""
        return self.model.denoise(x, self.t)
