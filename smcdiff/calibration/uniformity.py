"""Are probability integral transforms uniform? Exact simultaneous bands and tests for their distribution function.

For J independent uniform numbers, the count N(z) of those at most z is binomial, at every z of a grid z_k = k / K.
With the two-sided pointwise probability

    p_k(n) = 2 min(P(N(z_k) <= n), P(N(z_k) >= n)),

the statistic is gamma = min over k of p_k(N(z_k)), and the bands of level ``prob`` are the counts with p_k(n) >
gamma*, where gamma* is as large as it may be with

    P(p_k(N(z_k)) > gamma* for all k) >= prob.

The probability that N stays between limits at all z_k is exact, not simulated: N is a Poisson process of rate J
which is known to arrive at J, and its law is carried from one z_k to the next by a convolution. Bands and p-values
are thus one test: the distribution function leaves the bands of level 1 - a exactly if its p-value is at most a.

Over F functions, which may depend on each other in any way, the combined p-value is min(1, F min p): the test fails
a right sampler with a probability of at most ``false_fail``.

Source: Sailynoja, Buerkner and Vehtari, "Graphical test for discrete uniformity and its applications in
goodness-of-fit evaluation and multiple sample comparison", arXiv 2103.10522 (the statistic; the recursion here is
that of the Poisson process instead of theirs).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from smcdiff.calibration.calibrate import Calibration
from smcdiff.checks import check_between, check_count

__all__ = ["EcdfBands", "RankTest", "ecdf_bands", "ecdf_p_values", "rank_test"]

_POINTS = 100  # of the grid on which a distribution function is compared, at most


class EcdfBands(NamedTuple):
    """Simultaneous bands of the distribution function of uniform numbers.

    Attributes
    ----------
    points
        Points z_k from 0 to 1, shape (K + 1,).
    lower, upper
        Smallest and largest values of the empirical distribution function inside, shape (K + 1,). Subtract ``points``
        for a plot of differences.
    prob
        Probability that uniform numbers stay inside everywhere: at least what was asked for.
    """

    points: Float[np.ndarray, " K+1"]
    lower: Float[np.ndarray, " K+1"]
    upper: Float[np.ndarray, " K+1"]
    prob: float


class RankTest(NamedTuple):
    """A test of uniformity of every function.

    Attributes
    ----------
    names
        Names of the functions.
    p_values
        One for each function.
    combined
        The p-value of all functions together, by Bonferroni's inequality.
    false_fail
        Probability, at most, that a right sampler fails.
    method
        The test.
    deviation
        Mean of the transforms less 1/2, for each function: negative if the truth lies below most draws.
    spread
        Variance of the transforms over 1/12, for each function: above 1 if the posterior is too narrow.
    """

    names: tuple[str, ...]
    p_values: Float[np.ndarray, " F"]
    combined: float
    false_fail: float
    method: str
    deviation: Float[np.ndarray, " F"]
    spread: Float[np.ndarray, " F"]

    @property
    def passed(self) -> bool:
        """Whether the combined p-value exceeds ``false_fail``."""
        return self.combined > self.false_fail

    def raise_if_failed(self) -> "RankTest":
        """Return the test, or raise an `AssertionError` that says which functions are off and how."""
        if not self.passed:
            raise AssertionError(str(self))
        return self

    def __str__(self) -> str:
        """The verdict in words, with the worst functions first."""
        verdict = "passed" if self.passed else "failed"
        lines = [f"rank test ({self.method}): {verdict}, combined p-value {self.combined:.3g}."]
        for i in np.argsort(self.p_values, kind="stable")[:8]:
            line = f"  {self.names[i]}: p = {self.p_values[i]:.3g}"
            if self.passed:
                lines.append(line)
            elif self.p_values[i] * len(self.p_values) <= self.false_fail:
                side = "below" if self.deviation[i] < 0 else "above"
                looks = "narrow" if self.spread[i] > 1.1 else "wide" if self.spread[i] < 0.9 else "right"
                lines.append(
                    f"{line}, truths lie {side} the middle of draws by {abs(self.deviation[i]):.3f} in probability, "
                    f"and spread {self.spread[i]:.2f} times as much as they should: the posterior's width looks {looks}"
                )
        lines.append(f"  A right sampler fails with a probability of at most {self.false_fail:g}.")
        return "\n".join(lines)


def ecdf_bands(num_ranks: int, num_data_sets: int, prob: float = 0.95) -> EcdfBands:
    """Simultaneous bands for the distribution function of ranks or transforms.

    Parameters
    ----------
    num_ranks
        Number of possible ranks, L + 1 for L draws, or of intervals of a grid for transforms: the points are
        k / num_ranks.
    num_data_sets
        Number of data sets J.
    prob
        Probability of staying inside everywhere, for one function.

    Raises
    ------
    ValueError
        If a count is not positive or ``prob`` is no probability.

    Source: arXiv 2103.10522.
    """
    check_count("num_ranks", num_ranks, 2)
    check_count("num_data_sets", num_data_sets)
    check_between("prob", prob, 0.0, 1.0)
    table = _pointwise(num_ranks, num_data_sets)
    levels = np.unique(table)
    low, high = -1, len(levels) - 1  # the bands of levels[low] hold enough; none at all is -1
    while high - low > 1:
        middle = (low + high) // 2
        if _inside(table, levels[middle]) >= prob:
            low = middle
        else:
            high = middle
    level = levels[low] if low >= 0 else -1.0
    first, last = _limits(table, level)
    ends = (np.array([0]), np.array([num_data_sets]))
    lower, upper = (np.concatenate([ends[0], limits, ends[1]]) / num_data_sets for limits in (first, last))
    return EcdfBands(np.arange(num_ranks + 1) / num_ranks, lower, upper, _inside(table, level))


def ecdf_p_values(values: Float[np.ndarray, "J F"], num_points: int) -> Float[np.ndarray, " F"]:
    """Exact p-values of the hypothesis that columns are independent uniform numbers.

    Parameters
    ----------
    values
        Numbers between 0 and 1.
    num_points
        Intervals K of the grid on which the distribution function is compared.
    """
    values = np.asarray(values, float)
    table = _pointwise(num_points, len(values))
    inner = np.arange(1, num_points) / num_points
    counts = np.stack([np.searchsorted(np.sort(column), inner, side="right") for column in values.T])
    statistics = table[np.arange(num_points - 1)[None], counts].min(axis=1)
    levels, which = np.unique(statistics, return_inverse=True)
    return np.array([1.0 - _inside(table, level) for level in levels]).clip(0.0, 1.0)[which]


def rank_test(
    calibration: Calibration | Float[np.ndarray, "J F"],
    *,
    method: str = "ecdf",
    false_fail: float = 1e-3,
    num_points: int | None = None,
) -> RankTest:
    """Test that truths lie among posterior draws as they should, for every function and all together.

    Parameters
    ----------
    calibration
        From `calibrate`, or transforms of shape (J, F).
    method
        "ecdf": the exact simultaneous test of the distribution function of U; "coverage": the same of |2 U - 1|, which
        sees a posterior that is too narrow or too wide sooner and a shifted one later; "chi_square": Pearson's test of
        equal bins, whose p-values are approximate.
    false_fail
        Probability, at most, that a right sampler fails.
    num_points
        Intervals of the grid, or bins; min(100, J), or min(20, J / 10), if omitted.

    Raises
    ------
    ValueError
        If ``method`` is unknown or a number is out of range.

    Source: arXiv 2103.10522; arXiv 1804.06788 (chi-square).
    """
    check_between("false_fail", false_fail, 0.0, 1.0)
    values, names = read_transforms(calibration)
    num_data_sets = len(values)
    if method == "chi_square":
        bins = max(2, min(20, num_data_sets // 10)) if num_points is None else num_points
        check_count("num_points", bins, 2)
        index = np.minimum((values * bins).astype(int), bins - 1)
        counts = np.stack([np.bincount(column, minlength=bins) for column in index.T])
        p_values = stats.chisquare(counts, axis=1).pvalue
    elif method in ("ecdf", "coverage"):
        points = max(2, min(_POINTS, num_data_sets)) if num_points is None else num_points
        check_count("num_points", points, 2)
        p_values = ecdf_p_values(values if method == "ecdf" else np.abs(2 * values - 1), points)
    else:
        raise ValueError(f"method must be ecdf, coverage or chi_square, got {method!r}.")
    combined = float(min(1.0, len(names) * p_values.min()))
    spread = 12 * np.mean((values - 0.5) ** 2, axis=0)
    return RankTest(names, p_values, combined, false_fail, method, values.mean(axis=0) - 0.5, spread)


def read_transforms(calibration) -> tuple[np.ndarray, tuple[str, ...]]:
    """Transforms (J, F) in double precision, and names."""
    if isinstance(calibration, Calibration):
        return np.asarray(calibration.pit, float), calibration.names
    values = np.asarray(calibration, float)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(
            f"transforms must be numbers between 0 and 1 of shape (J, F), got shape {values.shape}."
        )
    return values, tuple(f"function {i}" for i in range(values.shape[1]))


@lru_cache(maxsize=16)
def _pointwise(num_points: int, num_data_sets: int) -> Float[np.ndarray, "K-1 J+1"]:
    """p_k(n) at the inner points and all counts."""
    count = np.arange(num_data_sets + 1)[None]
    z = (np.arange(1, num_points) / num_points)[:, None]
    below = stats.binom.cdf(count, num_data_sets, z)
    above = stats.binom.sf(count - 1, num_data_sets, z)
    table = 2 * np.minimum(below, above)
    table.setflags(write=False)
    return table


def _limits(table, level) -> tuple[Int[np.ndarray, " K-1"], Int[np.ndarray, " K-1"]]:
    """Smallest and largest count with p_k(n) > level; the last is less than the first where there is none."""
    inside = table > level
    first = np.argmax(inside, axis=1)
    last = table.shape[1] - 1 - np.argmax(inside[:, ::-1], axis=1)
    return first, np.where(inside.any(axis=1), last, first - 1)


def _inside(table, level) -> float:
    """Probability that p_k(N(z_k)) > level at all inner points."""
    num_points, num_data_sets = len(table) + 1, table.shape[1] - 1
    first, last = _limits(table, level)
    if np.any(last < first):
        return 0.0
    step = stats.poisson.pmf(np.arange(num_data_sets + 1), num_data_sets / num_points)
    law, start = np.ones(1), 0
    for low, high in zip(
        np.append(first, num_data_sets).tolist(), np.append(last, num_data_sets).tolist(), strict=True
    ):
        # Counts only grow, so that a lower limit never falls in earnest.
        spread = np.convolve(law, step[: high - start + 1])[: high - start + 1]
        law, start = spread[max(low - start, 0) :], max(low, start)
        if not law.any():
            return 0.0
    return float(law[0] / stats.poisson.pmf(num_data_sets, num_data_sets))
