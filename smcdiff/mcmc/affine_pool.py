"""Affine tuning from a pool of chains: centre and covariance of all of them, updated on a schedule and then frozen.

A sampler that works in coordinates y = L^-1 (x - c) is at its best where the target looks centred and round in y. The
pool runs its chains side by side in windows that double in length; at the end of each, c becomes the mean and L L^T the
covariance of all chains at all steps of that window. A window starts from nothing, so that a bad start is forgotten.
After the last one c and L are fixed, and whatever runs with them is a Markov chain again.

The covariance of n samples is drawn towards its diagonal by the weight d / (d + n), which makes it positive definite
where samples are few. A coordinate that nothing moved keeps its variance of before. A target without a variance has
no limit to tune to: a heavy tail then sets the scale.

The source updates at equal distances and keeps all samples since the start; windows forget the transient instead.

Source: Schär, Habeck and Rudolf, "Parallel Affine Transformation Tuning of Markov Chain Monte Carlo", arXiv 2401.16567.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from smcdiff.checks import check_count, check_start
from smcdiff.density import as_pytree
from smcdiff.mcmc.metric import InverseMassMatrix, from_whitened, mass_factor
from smcdiff.moments import Moments, add_rows

__all__ = ["AffineMap", "AffinePool", "affine_map", "affine_pool"]

COVARIANCES = ("diagonal", "full")


class AffineMap(eqx.Module):
    """x = c + L y over flattened samples; see `affine_map`."""

    center: Float[Array, " d"] | None
    factor: InverseMassMatrix

    def from_standard(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        """c + L y."""
        x = from_whitened(_cast(self.factor, y), y)
        return x if self.center is None else self.center.astype(y.dtype) + x

    def to_standard(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """L^-1 (x - c)."""
        if self.center is not None:
            if self.center.size != x.size:
                raise ValueError(
                    f"center must fit the sample, whose size is {x.size}, got size {self.center.size}."
                )
            x = x - self.center.astype(x.dtype)
        factor = _cast(self.factor, x)
        if factor is None:
            return x
        return x / factor if factor.ndim == 1 else jax.scipy.linalg.solve_triangular(factor, x, lower=True)


def affine_map(center: PyTree, covariance: InverseMassMatrix) -> AffineMap:
    """The map x = c + L y with L L^T = covariance.

    Parameters
    ----------
    center
        A point like a sample, or None for the origin.
    covariance
        None for the identity, variances (d,), or a matrix (d, d), over the flattened sample.

    Raises
    ------
    ValueError
        If ``covariance`` is of another shape, or not positive definite.
    """
    return AffineMap(
        None if center is None else ravel_pytree(center)[0], mass_factor(covariance, "covariance")
    )


def _cast(factor, like):
    return None if factor is None else factor.astype(like.dtype)


class AffinePool(NamedTuple):
    """What tuning found.

    Attributes
    ----------
    position
        Where the chains are, like the starting positions.
    center
        Mean of the last window, like one position.
    covariance
        Variances (d,) or covariance (d, d) of the last window, over the flattened position.
    acceptance_rate
        Mean acceptance rate of each window, shape (windows,).
    """

    position: PyTree
    center: PyTree
    covariance: Float[Array, " d"] | Float[Array, "d d"]
    acceptance_rate: Float[Array, " windows"]


def affine_pool(
    rng_key: PRNGKeyArray,
    build: Callable[[PyTree, Array], SamplingAlgorithm],
    position: PyTree,
    num_steps: int,
    *,
    covariance: str = "diagonal",
    first_window: int = 25,
) -> AffinePool:
    """Run a pool of chains, and tune the centre and the covariance of their sampler on the way.

    Parameters
    ----------
    rng_key
        Key. Chain c uses fold_in(rng_key, c).
    build
        ``build(center, covariance)`` returns the algorithm: for instance
        ``lambda center, covariance: polar_slice(target, 2.0, center=center, covariance=covariance)``, or Hamiltonian
        Monte Carlo, whose ``inverse_mass_matrix`` is that covariance. Its info must have an ``acceptance_rate``, and
        its state must not depend on what is tuned. Make it a `jax.tree_util.Partial` of a module-level function, so
        that what it holds are leaves.
    position
        Starting positions, a pytree with the leading axis (chains,).
    num_steps
        Steps of each chain, in windows of ``first_window`` times 1, 2, 4, ...; the last one takes the remainder.
    covariance
        "diagonal" or "full". Full needs some d samples, chains times steps, in a window.
    first_window
        Steps of the first window, in which the sampler has the centre 0 and the covariance 1.

    Returns
    -------
    AffinePool: build the algorithm with its centre and covariance, and go on from its position.

    Raises
    ------
    ValueError
        If a count is not a positive integer, ``covariance`` is unknown, or a chain starts where its state is not
        finite.

    Source: "Parallel Affine Transformation Tuning of Markov Chain Monte Carlo", arXiv 2401.16567.
    """
    check_count("num_steps", num_steps)
    check_count("first_window", first_window)
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance must be one of {COVARIANCES}, got {covariance!r}.")
    lengths = jnp.asarray(_windows(num_steps, first_window), jnp.int32)
    pool, states = _tune(rng_key, as_pytree(build), position, lengths, covariance)
    check_start(states, "position")
    return pool


def _windows(num_steps, first):
    """Lengths that double, the last one extended so that all add up."""
    lengths, left = [], num_steps
    while left >= 3 * first:
        lengths.append(first)
        left, first = left - first, 2 * first
    return [*lengths, left]


def _pool_program(rng_key, build, position, lengths: Int[Array, " windows"], covariance):
    flat = jax.vmap(lambda one: ravel_pytree(one)[0])(position)
    num_chains, d = flat.shape
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], position))[1]
    keys = jax.vmap(lambda chain: jax.random.fold_in(rng_key, chain))(jnp.arange(num_chains))
    shape = (d,) if covariance == "diagonal" else (d, d)

    def window(carry, length):
        state, center, spread, first = carry
        algorithm = build(unravel(center), spread)

        def step(k, carry):
            state, moments, acceptance = carry
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, first + k + 1))(keys)
            state, info = jax.vmap(algorithm.step)(step_keys, state)
            x = jax.vmap(lambda one: ravel_pytree(one)[0])(state.position)
            rate = jnp.mean(jnp.asarray(info.acceptance_rate, flat.dtype))
            return state, add_rows(moments, x), acceptance + rate

        nothing = Moments(jnp.zeros((), flat.dtype), jnp.zeros(d, flat.dtype), jnp.zeros(shape, flat.dtype))
        state, moments, acceptance = jax.lax.fori_loop(
            0, length, step, (state, nothing, jnp.zeros((), flat.dtype))
        )
        spread = _covariance(moments, spread)
        return (state, moments.mean, spread, first + length), acceptance / length.astype(flat.dtype)

    identity = jnp.ones(d, flat.dtype) if covariance == "diagonal" else jnp.eye(d, dtype=flat.dtype)
    algorithm = build(unravel(jnp.zeros(d, flat.dtype)), identity)
    start = jax.vmap(algorithm.init)(position, keys)
    carry = (start, jnp.zeros(d, flat.dtype), identity, jnp.zeros((), jnp.int32))
    (state, center, spread, _), acceptance = jax.lax.scan(window, carry, lengths)
    return AffinePool(state.position, unravel(center), spread, acceptance), start


_tune = jax.jit(_pool_program, static_argnames="covariance")


def _covariance(moments, before):
    """Covariance of the moments, drawn towards its diagonal; ``before`` where nothing moved."""
    size, d = moments.size, moments.mean.shape[0]
    found = moments.squares / jnp.maximum(size - 1.0, 1.0)
    if found.ndim == 1:
        return jnp.where(found > 0, found, before)
    share = d / (d + size)
    variances, old = jnp.diag(found), jnp.diag(before)
    found = (1.0 - share) * found + share * jnp.diag(variances)
    # Rows and columns of what did not move are zero.
    return found + jnp.diag(jnp.where(variances > 0, 0.0, old))
