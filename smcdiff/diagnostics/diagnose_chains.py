"""The checks of `smcdiff.diagnostics.diagnose` on Markov chains."""

from collections.abc import Iterator, Mapping

import numpy as np

from smcdiff.diagnostics.chains import bfmi, chain_diagnostics
from smcdiff.diagnostics.findings import Finding

__all__ = ["chain_findings"]

HIGH_RHAT = 1.01
LOW_ESS = 100  # a chain
LOW_BFMI = 0.3
ACCEPTANCE_BAND = (0.1, 0.99)
LONG_STAY = 0.2  # of the draws
FEW_DRAWS = 20  # of fewer, no stay is long
LARGE_RESIDUAL = 0.01
# Last parts of the names of flags, and which value says that a loop was cut off.
_CAPS = {
    "is_bracketed": (False, "the stepping out of a slice", "max_expansions, or a larger initial width"),
    "reached_max_tree_depth": (True, "the trajectory of NUTS", "max_num_doublings, or another mass matrix"),
    "lbfgs_hit_maxiter": (True, "the inner optimisation", "its number of iterations"),
}
_SLICE_SIBLINGS = ("is_bracketed", "num_shrinkages", "num_shrink")  # beside these, not accepted is a cap


def chain_findings(
    samples: Mapping[str, np.ndarray], statistics: Mapping[str, np.ndarray]
) -> Iterator[Finding]:
    """Findings about Markov chains.

    Parameters
    ----------
    samples
        Draws by variable, with the axes (chain, draw, *event).
    statistics
        Statistics of the draws by ArviZ's names, from `smcdiff.arviz_io.statistics.chain_statistics`.
    """
    yield from _not_finite(samples)
    yield from _stuck(samples)
    yield from _mixing(samples)
    yield from _divergences(statistics)
    yield from _acceptance(statistics)
    yield from _energy(statistics)
    yield from _caps(statistics)


def _not_finite(samples):
    for name, value in samples.items():
        if not np.issubdtype(value.dtype, np.inexact):
            continue
        bad = ~np.isfinite(value).reshape(*value.shape[:2], -1).all(axis=2)
        if bad.any():
            chain = int(np.argmax(bad.any(axis=1)))
            yield Finding(
                "finite",
                "invalid",
                f"NOT VALID: {int(bad.sum())} draws of {name} are not finite, first draw {int(np.argmax(bad[chain]))} "
                f"of chain {chain}. Look for overflow in the target there, and try a smaller step_size.",
            )


def _stuck(samples):
    """Chains that stay where they are for long, in all variables."""
    sizes = [value.shape[:2] for value in samples.values()]
    if not sizes or sizes[0][1] < 2:
        return
    flat = [value.reshape(*value.shape[:2], -1) for value in samples.values()]
    moved = np.any([np.any(value[:, 1:] != value[:, :-1], axis=2) for value in flat], axis=0)
    never = np.flatnonzero(~moved.any(axis=1))
    if len(never):
        yield Finding(
            "stuck",
            "invalid",
            f"NOT VALID: {_chains(never)} never moved. Try a smaller step_size, and look at its start.",
        )
        return
    stays = np.array([_longest_stay(row) for row in moved])
    chain, draws = int(np.argmax(stays)), moved.shape[1] + 1
    if draws >= FEW_DRAWS and stays[chain] > LONG_STAY * draws:
        yield Finding(
            "stuck",
            "warning",
            f"Chain {chain} stayed at one place for {int(stays[chain])} of {draws} draws. Try a smaller step_size, a "
            "kernel that steps more evenly (slice), or tempering.",
        )


def _longest_stay(moved):
    """Largest number of equal draws in a row."""
    edges = np.flatnonzero(np.concatenate([[True], moved, [True]]))
    return np.diff(edges).max()


def _mixing(samples):
    worst_rhat, worst_ess = None, None
    num_chains, num_draws = next(iter(samples.values())).shape[:2] if samples else (0, 0)
    num_high = num_low = num_entries = 0
    for name, value in samples.items():
        if value[0, 0].size == 0:
            continue
        found = chain_diagnostics(value.astype(float) if value.dtype == bool else value)
        moves = np.asarray(found.sd) > 0
        rhat = np.where(moves, np.asarray(found.rhat), np.nan)
        ess = np.where(moves, np.minimum(found.ess_bulk, found.ess_tail), np.nan)
        num_entries += int(moves.sum())
        num_high, num_low = (
            num_high + int((rhat > HIGH_RHAT).sum()),
            num_low + int((ess < LOW_ESS * num_chains).sum()),
        )
        if np.any(rhat > HIGH_RHAT):
            where = np.unravel_index(np.nanargmax(rhat), rhat.shape)
            if worst_rhat is None or rhat[where] > worst_rhat[0]:
                worst_rhat = rhat[where], name, where, _farthest(value[(slice(None), slice(None), *where)])
        if np.any(ess < LOW_ESS * num_chains):
            where = np.unravel_index(np.nanargmin(ess), ess.shape)
            if worst_ess is None or ess[where] < worst_ess[0]:
                worst_ess = ess[where], name, where
    if worst_rhat is not None:
        value, name, where, chain = worst_rhat
        yield Finding(
            "rhat",
            "warning",
            f"R-hat reaches {value:.2f} in {_entry(name, where)}, and exceeds {HIGH_RHAT} in {num_high} of "
            f"{num_entries} entries: the chains have not mixed; chain {chain} is farthest from the others there. Run "
            "longer if all of them drift, and try tempering or a jumping kernel if they sit in different modes.",
        )
    if num_chains < 2 or num_draws < 4:
        yield Finding("rhat", "note", "R-hat could not be computed: it takes at least 2 chains and 4 draws.")
    if worst_ess is not None and num_draws >= 4:
        value, name, where = worst_ess
        yield Finding(
            "ess",
            "warning",
            f"The effective sample size is {value:.0f} in {_entry(name, where)}, and below {LOW_ESS} a chain in "
            f"{num_low} of {num_entries} entries. Run longer (thin= keeps memory in bounds), or try a kernel that "
            "moves farther.",
        )


def _farthest(draws):
    """The chain whose mean is farthest from the others'."""
    means = np.asarray(draws, float).mean(axis=1)
    return int(np.argmax(np.abs(means - np.median(means))))


def _divergences(statistics):
    diverging = statistics.get("diverging")
    if diverging is None or not np.any(diverging):
        return
    by_chain = np.asarray(diverging, bool).sum(axis=1)
    yield Finding(
        "divergences",
        "warning",
        f"{int(by_chain.sum())} of {diverging.size} steps diverged (chain {int(np.argmax(by_chain))}: "
        f"{int(by_chain.max())}), so that places of high curvature are left out. Try a smaller step_size or a higher "
        "target acceptance, another parametrisation, or a target with less noise cut off at t = 0.",
    )


def _acceptance(statistics):
    rate = statistics.get("acceptance_rate")
    if rate is None or not np.all(np.isfinite(rate)):
        return
    means, (low, high) = np.asarray(rate, float).mean(axis=1), ACCEPTANCE_BAND
    if means.min() < low:
        yield Finding(
            "acceptance",
            "warning",
            f"Chain {int(np.argmin(means))} accepts {means.min():.0%} of its proposals. Try a smaller step_size (for "
            "particle Gibbs, where it is the share of the path that was renewed, more particles or backward "
            "sampling).",
        )
    elif high < means.max() and np.any(rate != 1.0):
        yield Finding(
            "acceptance",
            "note",
            f"Chain {int(np.argmax(means))} accepts {means.max():.1%} of its proposals: steps could be larger, and "
            "the chain would move farther.",
        )


def _energy(statistics):
    energy = statistics.get("energy")
    if energy is None or energy.shape[1] < 4 or not np.all(np.isfinite(energy)):
        return
    values = np.asarray(bfmi(energy))
    low = np.flatnonzero(values < LOW_BFMI)
    if len(low):
        yield Finding(
            "bfmi",
            "warning",
            f"E-BFMI is {np.nanmin(values):.2f} in chain {int(np.nanargmin(values))}, below {LOW_BFMI} in "
            f"{_chains(low)}: momenta change the energy too slowly to reach the tails. Try another parametrisation, "
            "or a mass matrix that fits.",
        )


def _caps(statistics):
    for name, value in statistics.items():
        prefix, _, last = name.rpartition(".")
        siblings = {f"{prefix}.{sibling}" if prefix else sibling for sibling in _SLICE_SIBLINGS}
        cut_off, what, remedy = _CAPS.get(last, (None, "", ""))
        if last == "is_accepted" and siblings & set(statistics):
            cut_off, what, remedy = False, "the shrinkage of a slice", "max_shrinkage"
        elif last == "num_invalid" and np.any(value):
            yield Finding(
                "weights",
                "invalid",
                f"NOT VALID: {int(value.sum())} weights inside the steps came out NaN or infinite ({name}). Look for "
                "overflow in the model.",
            )
        elif last == "solve_residual" and np.nanmax(value) > LARGE_RESIDUAL:
            yield Finding(
                "solver",
                "warning",
                f"A linear system was left with a relative residual of {np.nanmax(value):.1g} ({name}). Allow more "
                "iterations.",
            )
        share = 0.0 if cut_off is None else np.mean(np.asarray(value, bool) == cut_off)
        if share > 0 and not (prefix and last == "reached_max_tree_depth" and last in statistics):
            yield Finding(
                "caps",
                "warning",
                f"In {share:.1%} of the steps {what} was cut off by its cap ({name}). Raise {remedy}.",
            )


def _entry(name, where):
    return f"{name}[{', '.join(str(int(i)) for i in where)}]" if where else name


def _chains(which):
    return f"chain {which[0]}" if len(which) == 1 else f"chains {', '.join(str(int(c)) for c in which)}"
