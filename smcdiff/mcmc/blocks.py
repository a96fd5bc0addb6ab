"""Gibbs sampling over named blocks: each moves by a kernel of its own on its conditional density.

A sample is a dictionary, x = {"theta": ..., "z": ...}, with a joint log density. A sweep visits the blocks in order. A
block b, one name or several, is moved by any kernel that leaves

    pi(x_b | x_rest), proportional to pi(x_b, x_rest) as a function of x_b,

alone: Metropolis-within-Gibbs, or an exact draw of it (`exact_draw`). The rest is data of the conditional density and
so an argument of the compiled program. Kernels start anew in each sweep, since what they know of their density (its
value, its score) is no longer true once another block has moved; see `smcdiff.mcmc.combinators`.

Sources: Geman and Geman, "Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images", IEEE
PAMI 6 (1984); Tierney, "Markov chains for exploring posterior distributions", Annals of Statistics 22 (1994).
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from smcdiff.density import HasLogDensity, LogDensity, as_pytree, as_target
from smcdiff.mcmc.combinators import PositionState, can_start, step_from

__all__ = ["Conditional", "ConditionalDensity", "GibbsInfo", "exact_draw", "gibbs"]

Names = str | tuple[str, ...]


class Conditional(eqx.Module):
    """The conditional law of a block given the rest, known by its score.

    Parameters
    ----------
    joint
        The joint target, with samples that are dictionaries.
    rest
        The other entries of the sample.
    names
        The block: a name, whose entry is the sample of this law, or several, with a dictionary of entries as sample.
    """

    joint: Any
    rest: dict[str, PyTree]
    names: Names = eqx.field(static=True)

    def with_rest(self, block: PyTree) -> dict[str, PyTree]:
        """The whole sample."""
        return {**self.rest, **({self.names: block} if isinstance(self.names, str) else block)}

    def score(self, block: PyTree) -> PyTree:
        """Gradient of the joint log density in the block."""
        return select(self.joint.score(self.with_rest(block)), self.names)


class ConditionalDensity(eqx.Module):
    """The conditional law of a block given the rest, known by its log density; parameters as of `Conditional`."""

    joint: Any
    rest: dict[str, PyTree]
    names: Names = eqx.field(static=True)

    def with_rest(self, block: PyTree) -> dict[str, PyTree]:
        """The whole sample."""
        return Conditional(self.joint, self.rest, self.names).with_rest(block)

    def logdensity(self, block: PyTree) -> Float[Array, ""]:
        """The joint log density, which is the conditional one up to a constant."""
        return self.joint.logdensity(self.with_rest(block))

    def score(self, block: PyTree) -> PyTree:
        """Gradient in the block."""
        if isinstance(self.joint, LogDensity):  # not in the rest, which may be integers
            return jax.grad(self.logdensity)(block)
        return Conditional(self.joint, self.rest, self.names).score(block)


class GibbsInfo(NamedTuple):
    """What happened in one sweep.

    Attributes
    ----------
    acceptance_rate
        Mean over the blocks; 1 counts for one whose kernel reports none.
    block_acceptance_rates
        Of each block, in order, shape (number of blocks,).
    parts
        The info of each block's kernel, a tuple.
    """

    acceptance_rate: Float[Array, ""]
    block_acceptance_rates: Float[Array, " blocks"]
    parts: tuple


class _Gibbs(eqx.Module):
    joint: Any
    builders: tuple[Callable, ...]
    names: tuple[Names, ...] = eqx.field(static=True)


def gibbs(target: Any, blocks: Mapping[Names, Callable[[Any], SamplingAlgorithm]]) -> SamplingAlgorithm:
    """Gibbs sampling, or Metropolis within Gibbs, over the entries of a sample that is a dictionary.

    Parameters
    ----------
    target
        Log density of a dictionary, as a function or an object; one with a score only will do for kernels which need
        no more.
    blocks
        For each block, a name or a tuple of names, in the order of the sweep: a function which builds the kernel from
        the conditional density, for instance ``lambda density: mcmc.mala(density, 0.1)``, for BlackJAX's kernels
        ``lambda density: blackjax.nuts(density.logdensity, 0.1, jnp.ones(3))``, or an `exact_draw`. The kernel's
        samples are the entry of the name, or a dictionary of the entries of the names. A builder which holds arrays
        should be a `jax.tree_util.Partial` of a module-level function. Blocks may overlap; together they must name
        every entry.

    Returns
    -------
    SamplingAlgorithm, with `smcdiff.mcmc.combinators.PositionState` and `GibbsInfo`.

    Raises
    ------
    TypeError
        If the target is none, or a builder is not callable; when the chain starts, if the sample is no dictionary.
    ValueError
        If there is no block; when the chain starts, if the blocks do not name the entries of the sample, all and only.

    Source: Geman and Geman (1984); Tierney (1994).
    """
    if not blocks:
        raise ValueError("blocks must name at least one block, got none.")
    for names, builder in blocks.items():
        if not callable(builder):
            raise TypeError(
                f"blocks[{names!r}] must be a function density -> SamplingAlgorithm, got {type(builder).__name__}."
            )
    builders = tuple(as_pytree(builder) for builder in blocks.values())
    kernel = _Gibbs(as_target(target), builders, tuple(blocks))
    for index in range(len(builders)):  # where their settings are numbers still, so that they are looked at
        with contextlib.suppress(
            KeyError
        ):  # a builder may look at the other entries, of which there are none yet
            _algorithm(kernel, index, {})
    return SamplingAlgorithm(Partial(_init, kernel), Partial(_step, kernel))


def exact_draw(
    draw: Callable[[PRNGKeyArray, dict[str, PyTree]], PyTree],
) -> Callable[[Any], SamplingAlgorithm]:
    """A block that is drawn from its conditional law.

    Parameters
    ----------
    draw
        ``draw(rng_key, rest)`` returns a sample of the block given the other entries; make it a
        `jax.tree_util.Partial` of a module-level function if it holds arrays.

    Returns
    -------
    What `gibbs` takes for a block.
    """
    return Partial(_exact_builder, as_pytree(draw))


def select(sample: dict[str, PyTree], names: Names) -> PyTree:
    """The block's part of a sample."""
    return sample[names] if isinstance(names, str) else {name: sample[name] for name in names}


def _flat(names):
    return (names,) if isinstance(names, str) else names


def _init(kernel, position, rng_key):
    if not isinstance(position, dict):
        raise TypeError(f"gibbs needs a position that is a dictionary, got {type(position).__name__}.")
    named = {name for names in kernel.names for name in _flat(names)}
    if named != set(position):
        raise ValueError(
            f"blocks must name the entries {sorted(position)}, and only these; got {sorted(named)}."
        )
    valid = [
        can_start(_algorithm(kernel, index, position), rng_key, select(position, names))
        for index, names in enumerate(kernel.names)
    ]
    return PositionState(position, functools.reduce(jnp.logical_and, valid))


def _algorithm(kernel, index, position):
    """The kernel of a block, given the other entries."""
    names = kernel.names[index]
    rest = {name: entry for name, entry in position.items() if name not in _flat(names)}
    kind = ConditionalDensity if isinstance(kernel.joint, HasLogDensity) else Conditional
    return kernel.builders[index](kind(kernel.joint, rest, names))


def _step(kernel, rng_key, state):
    """One sweep."""
    position, parts, rates = state.position, [], []
    for index, names in enumerate(kernel.names):
        algorithm = _algorithm(kernel, index, position)
        block, info, rate = step_from(algorithm, jax.random.fold_in(rng_key, index), select(position, names))
        position = {**position, **({names: block} if isinstance(names, str) else block)}
        parts.append(info)
        rates.append(rate)
    block_rates = jnp.stack(rates)
    return state._replace(position=position), GibbsInfo(jnp.mean(block_rates), block_rates, tuple(parts))


class _ExactInfo(NamedTuple):
    acceptance_rate: Float[Array, ""]


def _exact_builder(draw, density):
    held = (draw, density.rest)
    return SamplingAlgorithm(_exact_init, Partial(_exact_step, held))


def _exact_init(position, rng_key=None):
    return PositionState(position)


def _exact_step(held, rng_key, state):
    draw, rest = held
    return state._replace(position=draw(rng_key, rest)), _ExactInfo(jnp.ones(()))
