"""A trained network as a diffusion model.

A network is trained to make one of several predictions at x_t = alpha x_0 + sigma eps. All are the same
information, and `Diffusion` converts them exactly through the pair (E[x_0|x_t], E[eps|x_t]):

    x0        x_0-prediction                         eps = (x - alpha x0) / sigma
    eps       noise prediction                       x0  = (x - sigma eps) / alpha
    v         alpha eps - sigma x0                   x0  = (alpha x - sigma v) / (alpha^2 + sigma^2)
    velocity  alpha' x0 + sigma' eps                 x0  = (sigma' x - sigma u) / (alpha sigma' - alpha' sigma)
    score     grad log p_t                           eps = -sigma score
    edm       network F with scaled input and output, in terms of s = sigma/alpha and the data's deviation

Sources: Salimans and Ho, "Progressive Distillation", arXiv 2202.00512 (v); Lipman et al., "Flow Matching",
arXiv 2210.02747 (velocity); Karras et al., arXiv 2206.00364 (edm).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from smcdiff.compose.operators import Composable
from smcdiff.density import DiffusionModel
from smcdiff.schedules import Schedule

__all__ = ["Diffusion", "Marginal"]

PREDICTIONS = ("eps", "x0", "v", "velocity", "score", "edm")


class Diffusion(Composable, eqx.Module):
    """A pretrained diffusion model: a path of densities known through its denoiser.

    All methods act on ONE sample; batches are made outside with `jax.vmap`. The weights are pytree leaves, so a
    compiled program serves every model of the same shape.

    Parameters
    ----------
    params
        Weights: any pytree of arrays.
    apply
        Function ``apply(params, x, t)``, or ``apply(params, x, t, condition)`` once `given` was called, that
        returns an array like ``x``. Make it a module-level function: it is part of the compiled program's key.
        With ``prediction="edm"`` it is called with the scaled input x / sqrt(sigma^2 + alpha^2 sigma_data^2)
        and with log(sigma/alpha)/4 in the place of t.
    schedule
        The forward process the network was trained on.
    prediction
        What the network predicts: "eps", "x0", "v", "velocity", "score" or "edm".
    event_shape
        Shape of one sample.
    sigma_data
        Root mean square of the data, used by "edm" only.
    condition
        Class label, embedding or any other pytree passed on to ``apply``; see `given`.

    Raises
    ------
    ValueError
        If ``prediction`` is unknown; in the methods, if ``x`` does not have the shape ``event_shape``.
    """

    params: PyTree
    apply: Callable = eqx.field(static=True)
    schedule: Schedule
    prediction: str = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    sigma_data: float = eqx.field(default=0.5, kw_only=True)
    condition: Any = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {self.prediction!r}.")

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Posterior mean E[x_0 | x_t = x]."""
        return self._predict(x, t)[0]

    def eps(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Posterior mean of the noise, E[eps | x_t = x]."""
        return self._predict(x, t)[1]

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Score of the marginal, grad log p_t(x), for t > 0."""
        return -self.eps(x, t) / self.schedule.sigma(t)

    def velocity(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Velocity of the path, alpha'(t) E[x_0|x] + sigma'(t) E[eps|x]."""
        x0, eps = self._predict(x, t)
        alpha_rate, sigma_rate = self.schedule.alpha_sigma_rates(t)
        return alpha_rate * x0 + sigma_rate * eps

    def at(self, t: Float[Array, ""]) -> "Marginal":
        """The marginal density at time ``t``, known by its score; ``t`` is a leaf."""
        return Marginal(self, jnp.asarray(t))

    def given(self, condition: PyTree) -> "Diffusion":
        """The same model under a condition that ``apply`` takes as its fourth argument."""
        return eqx.tree_at(lambda m: m.condition, self, condition, is_leaf=lambda leaf: leaf is None)

    def _call(self, x, t):
        if self.condition is None:
            return self.apply(self.params, x, t)
        return self.apply(self.params, x, t, self.condition)

    def _predict(self, x, t):
        """Return (E[x_0|x_t], E[eps|x_t]), each from the formula that is accurate for this prediction."""
        if jnp.shape(x) != self.event_shape:
            raise ValueError(
                f"x must be one sample of shape {self.event_shape}, got {jnp.shape(x)}; use jax.vmap for batches."
            )
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        match self.prediction:
            case "x0":
                x0 = self._call(x, t)
                return x0, (x - alpha * x0) / sigma
            case "eps":
                eps = self._call(x, t)
            case "score":
                eps = -sigma * self._call(x, t)
            case "v":
                v, norm = self._call(x, t), alpha**2 + sigma**2
                return (alpha * x - sigma * v) / norm, (sigma * x + alpha * v) / norm
            case "velocity":
                u = self._call(x, t)
                alpha_rate, sigma_rate = self.schedule.alpha_sigma_rates(t)
                norm = alpha * sigma_rate - alpha_rate * sigma
                return (sigma_rate * x - sigma * u) / norm, (alpha * u - alpha_rate * x) / norm
            case "edm":
                return self._precondition(x, alpha, sigma)
        return (x - sigma * eps) / alpha, eps

    def _precondition(self, x, alpha, sigma):
        ratio = sigma / alpha
        total = jnp.sqrt(ratio**2 + self.sigma_data**2)
        scaled = x / alpha
        output = self._call(scaled / total, 0.25 * jnp.log(ratio))
        x0 = (self.sigma_data / total) ** 2 * scaled + (ratio * self.sigma_data / total) * output
        eps = ratio / total**2 * scaled - self.sigma_data / total * output
        return x0, eps


class Marginal(eqx.Module):
    """The density p_t of a diffusion model at one time, known by its score.

    Parameters
    ----------
    model
        The diffusion model.
    t
        Time in (0, 1]; a leaf, so that annealing does not compile anew.
    """

    model: DiffusionModel
    t: Float[Array, ""]

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Score at one sample ``x``."""
        return self.model.score(x, self.t)

    def denoise(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Posterior mean E[x_0 | x_t = x]."""
        return self.model.denoise(x, self.t)
