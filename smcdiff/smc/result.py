"""Running SMC, and its weighted result.

Independent runs of SMC are kept apart as chains: their spread says how far the result can be trusted. Pooled, they
are weighed by their evidence estimates, which keeps the pooled average consistent and its numerator unbiased.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from smcdiff.run import run, to_host
from smcdiff.smc.feynman_kac import FeynmanKac, SMCInfo, SMCState, smc
from smcdiff.smc.genealogy import ancestor_lines, common_ancestor_step, families, unique_ancestors
from smcdiff.smc.resampling import ResamplingFn, resample_from_log_weights, systematic
from smcdiff.smc.variance import log_evidence_variance, mean_variance

__all__ = ["SMCResult", "run_smc"]


class SMCResult(NamedTuple):
    """Weighted particles of several independent SMC runs, and how they came about.

    Particles are weighted: use the methods, or `resample`, before plotting or averaging.

    Attributes
    ----------
    particles
        Pytree with leading axes (num_chains, num_particles).
    log_weights
        Normalised within each chain, shape (num_chains, num_particles).
    log_evidence
        One estimate a chain, shape (num_chains,).
    info
        `SMCInfo` with leading axes (num_chains, num_steps).
    log_weights_by_step
        Log weights after every step, shape (num_chains, num_steps, num_particles).
    """

    particles: PyTree
    log_weights: Float[Array, "chains N"]
    log_evidence: Float[Array, " chains"]
    info: SMCInfo
    log_weights_by_step: Float[Array, "chains steps N"]

    @property
    def ess(self) -> Float[np.ndarray, "chains steps"]:
        """Effective sample size after every step."""
        return np.asarray(self.info.ess)

    @property
    def is_valid(self) -> bool:
        """Whether every chain ended with some weight and no weight was ever NaN or infinite."""
        return bool(np.all(np.isfinite(self.log_evidence)) and not np.any(self.info.num_invalid))

    def pooled_log_weights(self) -> Float[np.ndarray, "chains N"]:
        """Log weights over all chains together, each chain counting by its evidence estimate."""
        joint = np.asarray(self.log_weights, float) + np.asarray(self.log_evidence, float)[:, None]
        return joint - np.logaddexp.reduce(joint, axis=None)

    def pooled_log_evidence(self) -> float:
        """Log of the mean of the chains' evidence estimates, which is unbiased as they are."""
        values = np.asarray(self.log_evidence, float)
        return float(np.logaddexp.reduce(values) - np.log(len(values)))

    def mean(self) -> PyTree:
        """Weighted mean over all particles of all chains."""
        weights = np.exp(self.pooled_log_weights())
        return jax.tree.map(lambda leaf: _weighted_mean(leaf, weights), self.particles)

    def std(self) -> PyTree:
        """Weighted standard deviation over all particles of all chains."""
        weights = np.exp(self.pooled_log_weights())

        def deviation(leaf):
            centred = np.asarray(leaf, float) - _weighted_mean(leaf, weights)[None, None]
            return np.sqrt(_weighted_mean(centred**2, weights))

        return jax.tree.map(deviation, self.particles)

    def quantile(self, q: float | Float[np.ndarray, " Q"]) -> PyTree:
        """Weighted quantiles of every entry; the axis of ``q``, if it has one, comes first.

        Parameters
        ----------
        q
            Probability or probabilities between 0 and 1.
        """
        weights = np.exp(self.pooled_log_weights()).ravel()
        return jax.tree.map(
            lambda leaf: _weighted_quantile(np.asarray(leaf), weights, np.asarray(q)), self.particles
        )

    def ancestor_lines(self) -> Int[np.ndarray, "chains clouds N"]:
        """Ancestors of the final particles in every cloud; see `smcdiff.smc.genealogy.ancestor_lines`."""
        return np.stack([ancestor_lines(ancestors) for ancestors in self.info.ancestors])

    def unique_ancestors(self) -> Int[np.ndarray, "chains clouds"]:
        """How many particles of every cloud, the initial one first, have descendants in the last one."""
        return np.stack([unique_ancestors(ancestors) for ancestors in self.info.ancestors])

    def common_ancestor_step(self) -> Int[np.ndarray, " chains"]:
        """Number of the cloud that holds the last cloud's most recent common ancestor; -1 if none does."""
        return np.array([common_ancestor_step(ancestors) for ancestors in self.info.ancestors])

    def log_evidence_std_error(self, lag: int | None = None) -> Float[np.ndarray, " chains"]:
        """Standard error of each chain's log evidence, from that chain alone.

        Infinite where a chain says nothing about its error: it lost its weight, or all of it is in one family.

        Parameters
        ----------
        lag
            Steps after which particles count as independent; see `smcdiff.smc.variance.log_evidence_variance`.
        """
        runs = zip(self.info.ancestors, self.info.resampled, self.log_weights_by_step, strict=True)
        variances = np.array([log_evidence_variance(*run, lag=lag) for run in runs])
        return np.where(np.isfinite(self.log_evidence), np.sqrt(np.maximum(variances, 0.0)), np.inf)

    def pooled_log_evidence_std_error(self, lag: int | None = None) -> float:
        """Standard error of `pooled_log_evidence`, from the chains' own errors; infinite where one that counts is.

        Parameters
        ----------
        lag
            As in `log_evidence_std_error`.
        """
        values = np.asarray(self.log_evidence, float)
        if np.all(values == -np.inf):
            return np.inf
        shares = np.exp(values - np.logaddexp.reduce(values))
        counts = shares > 0
        return float(np.sqrt(np.sum((shares[counts] * self.log_evidence_std_error(lag)[counts]) ** 2)))

    def mean_std_error(self, lag: int | None = None) -> PyTree:
        """Standard error of `mean`, for every entry; see `smcdiff.smc.variance.mean_variance`.

        Parameters
        ----------
        lag
            Steps after which particles count as independent; never if omitted.
        """
        weights = np.exp(self.pooled_log_weights())
        members = np.stack([families(ancestors, lag)[-1] for ancestors in self.info.ancestors])
        members = members + np.arange(len(members))[:, None] * members.shape[1]

        def deviation(leaf):
            values = np.asarray(leaf).reshape(weights.size, *np.shape(leaf)[2:])
            return np.sqrt(mean_variance(values, weights.ravel(), members.ravel()))

        return jax.tree.map(deviation, self.particles)

    def resample(self, rng_key: PRNGKeyArray, num_samples: int | None = None) -> PyTree:
        """Equally weighted draws from each chain, with leading axes (num_chains, num_samples).

        Parameters
        ----------
        rng_key
            Key.
        num_samples
            Draws a chain; as many as there are particles if omitted.
        """
        chosen = self.resample_indices(rng_key, num_samples)
        chains = np.arange(len(chosen))[:, None]
        return jax.tree.map(lambda leaf: np.asarray(leaf)[chains, chosen], self.particles)

    def resample_indices(self, rng_key: PRNGKeyArray, num_samples: int | None = None) -> np.ndarray:
        """Indices, within each chain, of the particles that `resample` draws; shape (num_chains, num_samples)."""
        num_chains, num_particles = self.log_weights.shape
        keys = jax.random.split(rng_key, num_chains)
        return np.asarray(_draw_indices(keys, jnp.asarray(self.log_weights), num_samples or num_particles))

    def resample_pooled_indices(
        self, rng_key: PRNGKeyArray, num_samples: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chains and indices of equally weighted draws from all chains together, which count by their evidence.

        Parameters
        ----------
        rng_key
            Key.
        num_samples
            Number of draws; as many as there are particles in all chains if omitted.

        Returns
        -------
        Chain and index within it of each draw, each of shape (num_samples,).

        Raises
        ------
        ValueError
            If no chain has any weight left.
        """
        if not np.any(np.isfinite(self.log_evidence)):
            raise ValueError("chains cannot be pooled by their evidence: no chain has any weight left.")
        joint = jnp.asarray(self.pooled_log_weights().reshape(1, -1))
        chosen = np.asarray(_draw_indices(rng_key[None], joint, num_samples or joint.size))[0]
        return np.divmod(chosen, self.log_weights.shape[1])


@partial(jax.jit, static_argnames="count")
def _draw_indices(keys, log_weights, count):
    """Indices (chains, count) of equally weighted draws, in random order: sorted they would look autocorrelated."""

    def draw(key, log_weights):
        indices = resample_from_log_weights(systematic, key, log_weights, count)
        return jax.random.permutation(jax.random.fold_in(key, 1), indices)

    return jax.vmap(draw)(keys, log_weights)


def run_smc(
    rng_key: PRNGKeyArray,
    fk: FeynmanKac,
    num_particles: int,
    *,
    num_chains: int = 1,
    resampling_fn: ResamplingFn = systematic,
    ess_threshold: float | Float[Array, " steps"] = 0.5,
    batch_size: int | None = None,
    move: Callable | None = None,
    num_moves: int = 1,
    chunk_size: int | None = None,
    checkpoint: str | Path | None = None,
    sharding: NamedSharding | None = None,
    progress: bool = True,
) -> SMCResult:
    """Run SMC on a Feynman-Kac model to its end.

    Parameters
    ----------
    rng_key
        Key.
    fk
        The Feynman-Kac model, for instance `smcdiff.tds(...)`.
    num_particles
        Particles of one run.
    num_chains
        Independent runs, side by side.
    resampling_fn, ess_threshold, batch_size, move, num_moves
        See `smcdiff.smc.smc`.
    chunk_size, checkpoint, sharding, progress
        See `smcdiff.run`.

    Returns
    -------
    SMCResult

    Raises
    ------
    ValueError
        As `smcdiff.smc.smc` and `smcdiff.run` do.

    Warns
    -----
    RuntimeWarning
        If weights came out NaN or infinite, or a chain lost all its weight; see `SMCResult.is_valid`.
    """
    algorithm = smc(
        fk,
        num_particles,
        resampling_fn=resampling_fn,
        ess_threshold=ess_threshold,
        batch_size=batch_size,
        move=move,
        num_moves=num_moves,
    )
    trace = run(
        rng_key,
        algorithm,
        fk.num_steps,
        num_chains=num_chains,
        transform=_keep_log_weights,
        chunk_size=chunk_size,
        checkpoint=checkpoint,
        sharding=sharding,
        progress=progress,
    )
    final: SMCState = jax.tree.map(to_host, trace.state)
    result = SMCResult(final.particles, final.log_weights, final.log_evidence, trace.info, trace.samples)
    if not result.is_valid:
        warnings.warn(_what_is_wrong(result), RuntimeWarning, stacklevel=2)
    return result


def _what_is_wrong(result):
    invalid = np.asarray(result.info.num_invalid)
    lost = int(np.sum(~np.isfinite(result.log_evidence)))
    first = f", first at step {int(np.argmax(invalid.sum(axis=0) > 0))}" if invalid.any() else ""
    return (
        f"{int(invalid.sum())} weights came out NaN or infinite and count as zero{first}; {lost} of {len(invalid)} "
        "chains have no weight left. Look for a model that is not finite on its own noisy samples, a grid whose "
        "last steps are too fine for float32, or noise far too small for the model."
    )


def _keep_log_weights(state: SMCState, info: Any):
    return state.log_weights


def _weighted_mean(leaf, weights):
    """Average over the two leading axes; particles of weight zero may be NaN."""
    leaf = np.asarray(leaf, float)
    alive = (weights > 0).reshape(*weights.shape, *[1] * (leaf.ndim - 2))
    return np.tensordot(weights, np.where(alive, leaf, 0.0), axes=2)


def _weighted_quantile(leaf, weights, q):
    flat = leaf.reshape(weights.size, -1)
    alive = weights > 0
    flat, weights = flat[alive], weights[alive]
    order = np.argsort(flat, axis=0)
    cumulative = np.cumsum(weights[order], axis=0)
    levels = np.atleast_1d(q)
    # The smallest value whose cumulative weight reaches the level.
    rank = np.array([(cumulative < level * cumulative[-1]).sum(axis=0) for level in levels]).clip(
        max=len(flat) - 1
    )
    values = np.take_along_axis(np.take_along_axis(flat, order, axis=0), rank, axis=0)
    return values.reshape(*np.shape(q), *leaf.shape[2:])
