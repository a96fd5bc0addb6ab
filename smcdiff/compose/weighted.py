"""The weighted product of density paths, which all compositions but mixtures are.

    pi_t(x)  is proportional to  prod_i p_t^i(x)^(w_i) exp(R(x, t)),       grad log pi_t = sum_i w_i s_i + grad R,

where the parts p^i share one forward process, an exponent w_i may depend on t, and R is a reward. pi_t is in general
NOT the noised version of pi_0, although every p_t^i is that of p_0^i: reverse transitions with the score of pi_t end
in another law. `smcdiff.fkc` weighs them so that they end in pi_0.

Source: Du et al., "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC",
arXiv 2302.11552.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from smcdiff.compose.operators import Composable
from smcdiff.compose.tails import least_tail
from smcdiff.density import HasLogDensity, HasScore, ScheduledPath, as_pytree, has_data_density, require
from smcdiff.line_integral import line_integral

__all__ = ["Composition", "Exponent", "Reward", "affine", "check_parts", "compose"]

Exponent = float | Float[Array, ""] | Callable[[Float[Array, ""]], Float[Array, ""]]
Reward = Callable[[Float[Array, "*event"], Float[Array, ""]], Float[Array, ""]]

_LOOKED_AT = np.linspace(0.0, 1.0, 11)  # times at which exponents that are functions are checked


class Composition(Composable, eqx.Module):
    """A weighted product of density paths, times the exponential of a reward.

    Build it with `product`, `temper`, `geometric_average`, `guide`, `contrast` or `condition`, which check it.

    Parameters
    ----------
    parts
        Paths with one schedule and event shape, none of them a composition itself.
    exponents
        One for each part: a number, or a function of t (a pytree, for instance a `jax.tree_util.Partial`).
    rewards
        Functions R(x, t) (pytrees), whose sum is the reward.
    """

    parts: tuple[Any, ...]
    exponents: tuple[Exponent, ...]
    rewards: tuple[Reward, ...] = ()

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
        """False: the path is not the noised version of its law at t = 0."""
        return False

    @property
    def has_logdensity(self) -> bool:
        """Whether every part has a log density."""
        half = jnp.asarray(0.5)
        return all(isinstance(part.at(half), HasLogDensity) for part in self.parts)

    @property
    def has_data_density(self) -> bool:
        """Whether every part has a log density at t = 0."""
        return all(has_data_density(part) for part in self.parts)

    @property
    def has_moving_exponents(self) -> bool:
        """Whether an exponent is a function of t."""
        return any(callable(exponent) for exponent in self.exponents)

    def at(self, t: Float[Array, ""]) -> HasScore:
        """The density at time ``t``, up to a constant; it has a log density if every part has one."""
        density = ComposedDensity if self.has_logdensity else ComposedScore
        return density(self, jnp.asarray(t))

    def exponents_at(self, t: Float[Array, ""]) -> Float[Array, " parts"]:
        """Exponents at time ``t``."""
        values = [exponent(t) if callable(exponent) else exponent for exponent in self.exponents]
        return jnp.stack([jnp.asarray(value, jnp.result_type(float)) for value in values])

    def scores(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "parts *event"]:
        """Score of every part at one sample ``x``."""
        return jnp.stack([part.score(x, t) for part in self.parts])

    def logdensities(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, " parts"]:
        """Log density of every part at one sample ``x``."""
        return jnp.stack([part.at(t).logdensity(x) for part in self.parts])

    def reward(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, ""]:
        """Sum of the rewards at one sample ``x``."""
        return sum((reward(x, t) for reward in self.rewards), jnp.zeros((), x.dtype))

    def reward_gradient(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """Gradient of the reward at one sample ``x``."""
        return jax.grad(self.reward)(x, t) if self.rewards else jnp.zeros_like(x)

    def score(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """grad log pi_t at one sample ``x``."""
        exponents = self.exponents_at(t).astype(x.dtype)
        return jnp.tensordot(exponents, self.scores(x, t), axes=1) + self.reward_gradient(x, t)

    def denoise(self, x: Float[Array, "*event"], t: Float[Array, ""]) -> Float[Array, "*event"]:
        """(x + sigma^2 score) / alpha: what plain guidance takes for the denoised sample, though it is not."""
        return (x + self.schedule.sigma(t) ** 2 * self.score(x, t)) / self.schedule.alpha(t)


class ComposedScore(eqx.Module):
    """A composition at one time, known by its score.

    Parameters
    ----------
    path
        The composition.
    t
        Time; a leaf.
    """

    path: Composition
    t: Float[Array, ""]

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Score at one sample ``x``."""
        return self.path.score(x, self.t)

    def log_ratio(self, x_from: Float[Array, "*event"], x_to: Float[Array, "*event"]) -> Float[Array, ""]:
        """log pi_t(x_to) - log pi_t(x_from) by a line integral of the score; see `smcdiff.line_integral`."""
        return line_integral(self.score, x_from, x_to)


class ComposedDensity(eqx.Module):
    """A composition at one time, known up to a constant.

    Parameters
    ----------
    path
        The composition.
    t
        Time; a leaf.
    """

    path: Composition
    t: Float[Array, ""]

    def score(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """Score at one sample ``x``."""
        return self.path.score(x, self.t)

    def logdensity(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        """sum_i w_i log p_t^i(x) + R(x, t) at one sample ``x``, without a normalising constant."""
        exponents = self.path.exponents_at(self.t).astype(x.dtype)
        return exponents @ self.path.logdensities(x, self.t) + self.path.reward(x, self.t)

    def log_ratio(self, x_from: Float[Array, "*event"], x_to: Float[Array, "*event"]) -> Float[Array, ""]:
        """log pi_t(x_to) - log pi_t(x_from)."""
        return self.logdensity(x_to) - self.logdensity(x_from)


def compose(
    who: str, paths: Sequence[Any], exponents: Sequence[Exponent], rewards: Sequence[Reward] = ()
) -> Composition:
    """The checked weighted product of paths; compositions among them are taken apart.

    Parameters
    ----------
    who
        Name of the function that asks, for messages.
    paths, exponents
        Paths, and an exponent for each.
    rewards
        Functions R(x, t).

    Raises
    ------
    TypeError
        If a path has no schedule, event shape, score or ``at``.
    ValueError
        If schedules or event shapes differ, or the product is known to have no finite integral.
    """
    check_parts(who, paths)
    parts: list[Any] = []
    flat: list[Exponent] = []
    all_rewards: list[Reward] = []
    for path, outer in zip(paths, map(as_pytree, exponents), strict=True):
        inner = path if isinstance(path, Composition) else Composition((path,), (1.0,))
        parts += inner.parts
        flat += [_times(exponent, outer) for exponent in inner.exponents]
        all_rewards += [
            reward if _is_one(outer) else Partial(_scaled, reward, outer) for reward in inner.rewards
        ]
    all_rewards += [as_pytree(reward) for reward in rewards]
    composition = Composition(tuple(parts), tuple(flat), tuple(all_rewards))
    _check_integrable(who, composition)
    return composition


def check_parts(who: str, paths: Sequence[Any]) -> None:
    """Raise unless ``paths`` are density paths with one event shape and one schedule."""
    if not paths:
        raise ValueError(f"{who} needs at least one path.")
    for path in paths:
        require(path, ScheduledPath, who)
    shapes = {tuple(path.event_shape) for path in paths}
    if len(shapes) > 1:
        raise ValueError(f"the parts of {who} must have one event shape, got {sorted(shapes)}.")
    for path in paths[1:]:
        if not _same(path.schedule, paths[0].schedule):
            raise ValueError(
                f"the parts of {who} must share one schedule, got {paths[0].schedule} and {path.schedule}; "
                "a score can be carried over to another schedule by rescaling x and time."
            )


def affine(exponent: Exponent, offset: float, slope: float) -> Exponent:
    """The exponent offset + slope exponent, also of a function of t."""
    if callable(exponent):
        return Partial(_affine_at, as_pytree(exponent), offset, slope)
    return offset + slope * exponent


def _check_integrable(who, composition):
    """Refuse what is known to have no finite integral, at t = 1 or in the Gaussian tails of the data."""
    for t in _LOOKED_AT if composition.has_moving_exponents else _LOOKED_AT[:1]:
        exponents = composition.exponents_at(jnp.asarray(t, jnp.result_type(float)))
        if isinstance(exponents, jax.core.Tracer):
            return
        values = np.asarray(exponents, float)
        if not (np.all(np.isfinite(values)) and values.sum() > 0):
            raise ValueError(
                f"{who}: the exponents must be finite with a positive sum, got {values.tolist()} at t = {t:g}; "
                "at t = 1 all parts are one Gaussian, and to the power of a sum that is not positive it has no "
                "finite integral."
            )
    start = jnp.zeros(())
    values = np.asarray(composition.exponents_at(start), float)
    least = least_tail([part.at(start) for part in composition.parts], values) if np.any(values < 0) else 1.0
    if not least > 0:
        raise ValueError(
            f"{who}: the composition has no finite integral. In some direction the sum of exponent / variance over "
            f"the Gaussian tails of its parts is {least:.3g} at t = 0, and must be positive: a part with a negative "
            f"exponent is too narrow. The exponents are {values.tolist()}; make them smaller."
        )


def _same(schedule, other):
    leaves, structure = jax.tree.flatten(schedule)
    others, other_structure = jax.tree.flatten(other)
    if structure != other_structure:  # type: ignore[operator]  # jaxlib leaves the type unfinished
        return False
    pairs = list(zip(leaves, others, strict=True))
    if any(isinstance(leaf, jax.core.Tracer) for pair in pairs for leaf in pair):
        return True
    return all(np.allclose(a, b, rtol=1e-6, atol=0.0) for a, b in pairs)


def _is_one(exponent):
    return isinstance(exponent, float | int) and exponent == 1


def _times(exponent, other):
    if _is_one(exponent):
        return other
    if _is_one(other):
        return exponent
    if callable(exponent) or callable(other):
        return Partial(_times_at, exponent, other)
    return exponent * other


def _value(exponent, t):
    return exponent(t) if callable(exponent) else exponent


def _times_at(exponent, other, t):
    return _value(exponent, t) * _value(other, t)


def _affine_at(exponent, offset, slope, t):
    return offset + slope * exponent(t)


def _scaled(reward, exponent, x, t):
    return _value(exponent, t) * reward(x, t)
