"""What a target can do: the capabilities that samplers ask for.

A density path gives, at each time t, an object with a score, and only where it is honest a log density:

- `HasScore`: ``score(x)``, the gradient of a log density that itself may be unknown (a network);
- `HasLogDensity`: ``logdensity(x)``, a scalar whose gradient is the score;
- `HasLogRatio`: ``log_ratio(x_from, x_to)`` = log p(x_to) - log p(x_from).

A sampler names the capability it needs and `require` turns a missing one into a `TypeError` at construction.
A score passed off as the gradient of a constant would make Metropolis kernels accept wrongly without an error.

Samples may be pytrees. A bare function of one sample is taken for a log density: `as_target` makes it a `LogDensity`.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

__all__ = [
    "DensityPath",
    "DiffusionModel",
    "HasLogDensity",
    "HasLogRatio",
    "HasScore",
    "LogDensity",
    "ScheduledPath",
    "as_pytree",
    "as_target",
    "denoised",
    "has_data_density",
    "logdensity_and_score",
    "require",
    "warn_unless_diffusion",
]


@runtime_checkable
class HasScore(Protocol):
    """A target whose score is known."""

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Gradient of the log density at one sample ``x``."""
        ...


@runtime_checkable
class HasLogDensity(Protocol):
    """A target whose log density is known, up to a constant that does not depend on ``x``."""

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """Log density at one sample ``x``."""
        ...


@runtime_checkable
class HasLogRatio(Protocol):
    """A target whose log density differences are known."""

    def log_ratio(self, x_from: Float[Array, "*event"], x_to: Float[Array, "*event"]) -> Float[Array, ""]:
        """log p(x_to) - log p(x_from) for two samples."""
        ...


@runtime_checkable
class _HasBoth(Protocol):
    """A target whose log density and score are cheaper together."""

    def logdensity_and_score(self, x: PyTree) -> tuple[Float[Array, ""], PyTree]: ...


@runtime_checkable
class DensityPath(Protocol):
    """A path of densities p_t, t from 0 (data) to 1 (noise)."""

    def at(self, t: Float[Array, ""]) -> HasScore:
        """The density at time ``t``."""
        ...


@runtime_checkable
class ScheduledPath(Protocol):
    """A density path that turns into noise along a Gaussian forward process, known through its scores.

    It need not be the noised version of its law at t = 0: `smcdiff.compose` makes paths that are not, and whose
    ``is_diffusion`` is False. One with log densities that has none at t = 0 has a ``has_data_density`` that is False.
    """

    @property
    def schedule(self) -> Any:
        """The forward process, a `smcdiff.schedules.Schedule`."""
        ...

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Score of the density at time ``t``, at one sample ``x``."""
        ...

    def at(self, t: Float[Array, ""]) -> HasScore:
        """The density at time ``t``."""
        ...


@runtime_checkable
class DiffusionModel(Protocol):
    """A density path that is the noised version of its law at t = 0, known through its denoiser."""

    @property
    def schedule(self) -> Any:
        """The forward process, a `smcdiff.schedules.Schedule`."""
        ...

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """E[x_0 | x_t = x] for one sample ``x``."""
        ...

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Score of the marginal at time ``t``, at one sample ``x``."""
        ...

    def at(self, t: Float[Array, ""]) -> HasScore:
        """The marginal density at time ``t``."""
        ...


class LogDensity(eqx.Module):
    """The density of a bare function, whose score is the function's gradient.

    Parameters
    ----------
    function
        ``function(x) -> scalar``: log density of one sample, up to a constant. Make it a `jax.tree_util.Partial` of a
        module-level function, so that what it holds are leaves and a compiled program serves other values.
    """

    function: Callable

    def logdensity(self, x: PyTree) -> Float[Array, ""]:
        """Log density at one sample ``x``."""
        return self.function(x)

    def score(self, x: PyTree) -> PyTree:
        """Gradient of the log density at one sample ``x``."""
        return jax.grad(self.function)(x)

    def logdensity_and_score(self, x: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """Both, from one evaluation."""
        return jax.value_and_grad(self.function)(x)

    def log_ratio(self, x_from: PyTree, x_to: PyTree) -> Float[Array, ""]:
        """log p(x_to) - log p(x_from)."""
        return self.function(x_to) - self.function(x_from)


def as_target(target: Any) -> Any:
    """A density object from what users pass as a target.

    Parameters
    ----------
    target
        An object with a score, which is returned as it is; an object with a log density, or a function that is one:
        their score is the gradient.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(target, HasScore):
        return target
    if isinstance(target, HasLogDensity):
        return LogDensity(as_pytree(target.logdensity))
    if callable(target):
        return LogDensity(as_pytree(target))
    raise TypeError(
        f"target must be a function x -> log density, or an object with score(x) or logdensity(x), got "
        f"{type(target).__name__}; of a diffusion model take one time: model.at(t)."
    )


def as_pytree(value: Any) -> Any:
    """A plain function becomes a pytree without leaves, so that what holds it can be an argument of compiled code."""
    return Partial(value) if callable(value) and jax.tree_util.all_leaves([value]) else value


def has_data_density(path: DensityPath) -> bool:
    """Whether a path has log densities down to t = 0; energy models, which have them for t > 0 only, say so."""
    return isinstance(path.at(jnp.asarray(0.5)), HasLogDensity) and getattr(path, "has_data_density", True)


def denoised(path: ScheduledPath, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
    """(x + sigma^2 score) / alpha at one sample ``x``, which a model that denoises is asked for."""
    if isinstance(path, DiffusionModel):
        return path.denoise(x, t)
    return (x + path.schedule.sigma(t) ** 2 * path.score(x, t)) / path.schedule.alpha(t)


def logdensity_and_score(target: Any, x: PyTree) -> tuple[Float[Array, ""], PyTree]:
    """Log density and score at one sample, for a target that has both; together, where the target knows how."""
    if isinstance(target, _HasBoth):
        return target.logdensity_and_score(x)
    return target.logdensity(x), target.score(x)


_ADVICE = {
    HasScore: "pass a marginal `model.at(t)` or any object with a method score(x)",
    HasLogDensity: "pass an analytic or energy-based density; a network that predicts noise has a score only",
    HasLogRatio: "pass an object with log_ratio(x_from, x_to), or one with a log density",
    ScheduledPath: "pass a smcdiff.Diffusion, an exact model from smcdiff.analytic, or a composition of such",
    DiffusionModel: "pass a smcdiff.Diffusion, or an exact model from smcdiff.analytic",
}


SCORE_KERNELS = (
    'or take a kernel that makes do with a score: mala or hmc with accept="line_integral"; ula, uhmc or underdamped, '
    "which never reject"
)


def require(target, capability, who: str, advice: str = "") -> None:
    """Raise a `TypeError` that says what ``who`` needs unless ``target`` has ``capability``.

    Parameters
    ----------
    target
        The object that was passed.
    capability
        One of the protocols of this module.
    who
        Name of the sampler that asks, for the message.
    advice
        What else would do, for instance other kernels.
    """
    if not isinstance(target, capability):
        message = "; ".join(part for part in (_ADVICE[capability], advice) if part)
        raise TypeError(
            f"{who} needs a target with the capability {capability.__name__}, got {type(target).__name__}; {message}."
        )


def warn_unless_diffusion(path, who: str) -> None:
    """Warn if ``path`` says that it is not the noised version of its law at t = 0, as compositions do.

    Parameters
    ----------
    path
        The density path that was passed; one that says nothing is taken for a diffusion.
    who
        Name of the sampler that relies on it, for the message.
    """
    if not getattr(path, "is_diffusion", True):
        warnings.warn(
            f"{who} follows the reverse process of a diffusion, but this {type(path).__name__} is not the noised "
            "version of its law at t = 0, so the samples will not have that law; smcdiff.fkc corrects them by weights.",
            UserWarning,
            stacklevel=3,
        )
