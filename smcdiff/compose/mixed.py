"""Mixtures of density paths.

    p_t(x) = sum_i w_i p_t^i(x),        s = sum_i r_i s_i,        r_i = w_i p_t^i(x) / p_t(x).

Adding noise is linear in the density, so a mixture of diffusions is a diffusion: it needs no correction, and its
denoiser is the average of the parts' under the responsibilities r_i. These are ratios of densities, so every part
needs a normalised log density; scores do not suffice.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcdiff.compose.operators import Composable
from smcdiff.compose.weighted import check_parts
from smcdiff.density import DiffusionModel, HasLogDensity, has_data_density, require

__all__ = ["MixturePath", "mixture"]


class MixturePath(Composable, eqx.Module):
    """A mixture of diffusion models; build it with `mixture`.

    Parameters
    ----------
    parts
        Diffusion models with log densities, one schedule and one event shape.
    log_weights
        Normalised, shape (parts,).
    """

    parts: tuple[Any, ...]
    log_weights: Float[Array, " parts"]

    @property
    def schedule(self) -> Any:
        """The forward process of the parts."""
        return self.parts[0].schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.parts[0].event_shape

    @property
    def is_diffusion(self) -> bool:
        """True: a mixture of noised laws is the noised mixture."""
        return True

    @property
    def has_data_density(self) -> bool:
        """Whether every part has a log density at t = 0."""
        return all(has_data_density(part) for part in self.parts)

    def at(self, t: Float[Array, ""]) -> "MixedDensity":
        """The density at time ``t``."""
        return MixedDensity(self, jnp.asarray(t))

    def responsibilities(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, " parts"]:
        """Posterior probabilities of the parts given x_t = x."""
        return jax.nn.softmax(self._log_joint(x, t))

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """grad log p_t(x) at one sample ``x``."""
        return self._average(x, t, [part.score(x, t) for part in self.parts])

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """E[x_0 | x_t = x] at one sample ``x``."""
        return self._average(x, t, [part.denoise(x, t) for part in self.parts])

    def _log_joint(self, x, t):
        return self.log_weights.astype(x.dtype) + jnp.stack([part.at(t).logdensity(x) for part in self.parts])

    def _average(self, x, t, values):
        return jnp.tensordot(self.responsibilities(x, t), jnp.stack(values), axes=1)


class MixedDensity(eqx.Module):
    """A mixture of paths at one time.

    Parameters
    ----------
    path
        The mixture.
    t
        Time; a leaf.
    """

    path: MixturePath
    t: Float[Array, ""]

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Score at one sample ``x``."""
        return self.path.score(x, self.t)

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Log density at one sample ``x``."""
        return jax.nn.logsumexp(self.path._log_joint(x, self.t))


def mixture(*paths: DiffusionModel, weights: Float[np.ndarray, " parts"] | None = None) -> MixturePath:
    """The mixture sum_i w_i p^i of diffusion models: what is likely under any one of them.

    Parameters
    ----------
    *paths
        Diffusion models with normalised log densities, one schedule and one event shape.
    weights
        Non-negative, shape (len(paths),), normalised here; equal if omitted.

    Raises
    ------
    TypeError
        If a path has no denoiser or no log density.
    ValueError
        If a path is a composition, whose normalising constants are unknown, if schedules or event shapes differ, or
        if weights do not fit.
    """
    check_parts("mixture", paths)
    for path in paths:
        if not getattr(path, "is_diffusion", True):
            raise ValueError(
                "mixture needs normalised densities at every t, and a composition has unknown constants; compose "
                "mixtures instead of mixing compositions."
            )
        require(path, DiffusionModel, "mixture")
        require(path.at(jnp.asarray(0.5)), HasLogDensity, "mixture")
    values = np.ones(len(paths)) if weights is None else np.asarray(weights, float)
    if values.shape != (len(paths),) or not (np.all(values >= 0) and values.sum() > 0):
        raise ValueError(
            f"weights must be non-negative, not all zero and of shape ({len(paths)},), got {values.tolist()}."
        )
    with np.errstate(divide="ignore"):
        log_weights = np.log(values / values.sum())
    return MixturePath(tuple(paths), jnp.asarray(log_weights, jnp.result_type(float)))
