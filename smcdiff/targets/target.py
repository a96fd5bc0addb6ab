"""What a target is: a density without its constant, and what is known about it.

A target is a law pi on R^d, known through exp(logdensity(x)) = Z pi(x). Beside the density it holds facts to compare a
sampler with: log Z, means and deviations of the coordinates, weights of the modes; some can be sampled exactly.

Facts come from closed forms or quadrature on the host in double precision. They are leaves, as the parameters are, so
that one compiled program serves all targets of one structure: read them outside of compiled code, where they keep
their precision.
"""

import abc
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

__all__ = ["HasExactSampler", "HasModes", "Moments", "Target", "exact_moments", "parameter"]


class Moments(NamedTuple):
    """Means and deviations of the coordinates, and how far they are known. Each has the shape ``event_shape``.

    Attributes
    ----------
    mean
        Expectation.
    std
        Standard deviation; infinite where the second moment is.
    mean_std_error
        Standard error of ``mean``; zero if it is exact.
    std_std_error
        Standard error of ``std``; zero if it is exact.
    """

    mean: Float[np.ndarray, "*event"]
    std: Float[np.ndarray, "*event"]
    mean_std_error: Float[np.ndarray, "*event"]
    std_std_error: Float[np.ndarray, "*event"]


def exact_moments(mean, std) -> Moments:
    """Moments without error.

    Parameters
    ----------
    mean
        Shape ``event_shape``.
    std
        The same shape, or a scalar.
    """
    mean = np.asarray(mean, float)
    std = np.array(np.broadcast_to(np.asarray(std, float), mean.shape))
    return Moments(mean, std, np.zeros_like(mean), np.zeros_like(mean))


def parameter(value) -> Array:
    """``value`` as an array in JAX's default float, which is what the parameters of a target are."""
    return jax.numpy.asarray(value, jax.numpy.result_type(float))


class Target(eqx.Module):
    """A density known up to a constant. It is a `HasScore`, a `HasLogDensity` and a `HasLogRatio`.

    A new target gives ``logdensity`` and ``event_shape``. Its first two fields are the facts below. The score is the
    gradient unless it has a closed form.

    Attributes
    ----------
    log_evidence
        log Z, the log of the integral of exp(logdensity); None where it is not known.
    moments
        Means and deviations of the coordinates.
    """

    log_evidence: float | None
    moments: Moments

    @property
    @abc.abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @abc.abstractmethod
    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Log density at one sample ``x``, up to the constant ``log_evidence``."""

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Gradient of the log density at one sample ``x``."""
        return jax.grad(self.logdensity)(x)

    def log_ratio(self, x_from: Float[Array, "*event"], x_to: Float[Array, "*event"]) -> Float[Array, ""]:
        """log pi(x_to) - log pi(x_from) for two samples."""
        return self.logdensity(x_to) - self.logdensity(x_from)


@runtime_checkable
class HasExactSampler(Protocol):
    """A target with independent samples of its law."""

    def sample(self, rng_key: PRNGKeyArray, num_samples: int) -> Float[Array, "n *event"]:
        """Draw ``num_samples`` independent samples."""
        ...


@runtime_checkable
class HasModes(Protocol):
    """A target whose space is divided into modes of known weights."""

    mode_weights: Float[np.ndarray, " K"]

    def mode_labels(self, x: Float[Array, "*event"]) -> Int[Array, ""]:
        """The mode, from 0 to K - 1, to which one sample ``x`` belongs."""
        ...
