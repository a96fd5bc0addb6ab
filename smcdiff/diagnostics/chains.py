"""Diagnostics of Markov chains: R-hat, effective sample sizes, Monte Carlo standard errors, of many dimensions at once.

Draws have the axes (chain, draw, *event), and every number is of one entry of the event. Names, conventions and values
are ArviZ's, NaN included: NaN where a draw is NaN, where a chain has fewer than 4 draws, and for an R-hat of one chain.
Two conventions differ. Only draws that are all equal count as constant (their effective sample size is their number),
whatever their scale, where ArviZ takes any range below 1e-15. And a quantile between two equal draws is that draw.

The entries are taken in blocks, so that beyond the draws and the results memory is that of few blocks. In a block each
entry is sorted once: bulk and folded ranks and the quantiles come from that sort, autocovariances from real Fourier
transforms of all entries together, and Geyer's truncation is a running minimum. Accelerators do everything
themselves. On a processor NumPy sorts, except inside a program that the caller compiles: there XLA does, and the whole
is some six times as slow.

    R-hat        larger of the R-hats of the rank-normalised draws and of the rank-normalised |x - median|
    bulk ESS     of the rank-normalised draws
    tail ESS     smaller of the ESS of the indicators x <= 5 % quantile and x <= 95 % quantile
    MCSE         mean: sd / sqrt(ESS of the draws); sd: by the delta method, with the ESS of (x - mean)^2; quantile:
                 half the distance between the order statistics at the 16 % and 84 % points of
                 Beta(ESS prob + 1, ESS (1 - prob) + 1)

Sources: Vehtari et al., "Rank-normalization, folding, and localization", arXiv 1903.08008; Margossian et al., "Nested
R-hat", arXiv 2110.13017; Betancourt, "Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo",
arXiv 1604.00695.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from smcdiff.checks import check_between
from smcdiff.diagnostics.blocks import (
    by_blocks,
    diagnostics,
    floating,
    nested_rhat,
    quantile_ess,
    quantile_mcse,
)
from smcdiff.diagnostics.ranks import RANKS, SORT

__all__ = [
    "ChainDiagnostics",
    "bfmi",
    "chain_diagnostics",
    "ess_bulk",
    "ess_mean",
    "ess_quantile",
    "ess_tail",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "rhat",
    "rhat_nested",
]


class ChainDiagnostics(NamedTuple):
    """Everything of `chain_diagnostics`, each of the event shape.

    Attributes
    ----------
    rhat
        Rank-normalised split R-hat; converged below 1.01.
    ess_bulk, ess_tail, ess_mean
        Effective sample sizes: of the ranks, of the 5 % and 95 % quantiles, of the draws themselves.
    mcse_mean, mcse_sd
        Monte Carlo standard errors of ``mean`` and ``sd``.
    mean, sd
        Of all draws of all chains; ``sd`` with S - 1.
    q5, median, q95
        Quantiles of all draws of all chains.
    """

    rhat: Float[Array, "*event"]
    ess_bulk: Float[Array, "*event"]
    ess_tail: Float[Array, "*event"]
    ess_mean: Float[Array, "*event"]
    mcse_mean: Float[Array, "*event"]
    mcse_sd: Float[Array, "*event"]
    mean: Float[Array, "*event"]
    sd: Float[Array, "*event"]
    q5: Float[Array, "*event"]
    median: Float[Array, "*event"]
    q95: Float[Array, "*event"]


def chain_diagnostics(x: ArrayLike, *, block_size: int | None = None) -> ChainDiagnostics:
    """All diagnostics of chains together, which costs little more than the dearest of them.

    Parameters
    ----------
    x
        Draws, (chain, draw, *event).
    block_size
        Entries of the event that are worked on together: by default what fits a processor's cache, and more on an
        accelerator. It bounds memory and changes no number.

    Returns
    -------
    ChainDiagnostics

    Raises
    ------
    ValueError
        If ``x`` has fewer than two axes, or ``block_size`` is no positive integer.

    Source: arXiv 1903.08008.
    """
    return ChainDiagnostics(**by_blocks(diagnostics, ChainDiagnostics._fields, RANKS, x, block_size))


def rhat(x: ArrayLike, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Rank-normalised split R-hat, the larger of bulk and folded; see `chain_diagnostics`."""
    return _one("rhat", x, block_size)


def ess_bulk(x: ArrayLike, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Effective sample size of the ranks; see `chain_diagnostics`."""
    return _one("ess_bulk", x, block_size)


def ess_tail(x: ArrayLike, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """The smaller effective sample size of the 5 % and the 95 % quantile; see `chain_diagnostics`."""
    return _one("ess_tail", x, block_size)


def ess_mean(x: ArrayLike, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Effective sample size of the draws as they are, for their mean; see `chain_diagnostics`."""
    return _one("ess_mean", x, block_size)


def mcse_mean(x: ArrayLike, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Monte Carlo standard error of the mean; see `chain_diagnostics`."""
    return _one("mcse_mean", x, block_size)


def mcse_sd(x: ArrayLike, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Monte Carlo standard error of the standard deviation; see `chain_diagnostics`."""
    return _one("mcse_sd", x, block_size)


def ess_quantile(x: ArrayLike, prob: float, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Effective sample size of the quantile at ``prob``, a number in [0, 1); see `chain_diagnostics`."""
    check_between("prob", prob, 0.0, 1.0)
    return by_blocks(quantile_ess, float(prob), SORT, x, block_size)


def mcse_quantile(x: ArrayLike, prob: float, *, block_size: int | None = None) -> Float[Array, "*event"]:
    """Monte Carlo standard error of the quantile at ``prob``, a number in [0, 1); see `chain_diagnostics`."""
    check_between("prob", prob, 0.0, 1.0)
    return by_blocks(quantile_mcse, float(prob), SORT, x, block_size)


def rhat_nested(
    x: ArrayLike, superchain_ids: Sequence[int], *, block_size: int | None = None
) -> Float[Array, "*event"]:
    """Nested R-hat of many short chains: chains that start together form a superchain.

    Parameters
    ----------
    x
        Draws, (chain, draw, *event).
    superchain_ids
        To which superchain each chain belongs; every superchain has as many chains.
    block_size
        As in `chain_diagnostics`.

    Returns
    -------
    Larger of bulk and folded, of rank-normalised split chains; NaN for a single superchain.

    Raises
    ------
    ValueError
        If there is not one number for each chain, or superchains differ in size.

    Source: arXiv 2110.13017, equations 4 to 8.
    """
    ids = np.asarray(superchain_ids)
    if ids.shape != np.shape(x)[:1]:
        raise ValueError(f"superchain_ids must be one number a chain, {np.shape(x)[:1]}, got {ids.shape}.")
    counts = np.unique(ids, return_counts=True)[1]
    if np.any(counts != counts[0]):
        raise ValueError(f"superchain_ids must name every superchain as often, got the counts {counts}.")
    options = (tuple(np.argsort(ids, kind="stable").tolist()), len(counts))
    return by_blocks(nested_rhat, options, RANKS, x, block_size)


def bfmi(energy: ArrayLike) -> Float[Array, " chain"]:
    """Bayesian fraction of missing information of each chain; below 0.3 momenta change the energy too slowly.

    Parameters
    ----------
    energy
        Hamiltonian along the chains, (chain, draw).

    Source: arXiv 1604.00695.
    """
    energy = floating(energy)
    return jnp.mean(jnp.diff(energy, axis=1) ** 2, axis=1) / jnp.var(energy, axis=1, ddof=1)


def _one(name, x, block_size):
    return by_blocks(diagnostics, (name,), RANKS, x, block_size)[name]
