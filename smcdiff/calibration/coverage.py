"""Do regions of probability l cover the truth with probability l?

Central intervals. With the transform U of a function (`smcdiff.calibration.pit`) the truth lies in the central
interval of level l exactly if |2 U - 1| <= l. For an exact posterior |2 U - 1| is uniform, so the expected coverage
as a function of l is the distribution function of a uniform number, whose exact simultaneous bands and test are
those of `smcdiff.calibration.uniformity`.

TARP. With a reference point r, which may depend on the data but not on the truth, the region of level l is the ball
about r that holds a share l of the draws. It covers the truth exactly if U <= l, where U is the transform of the
distance to r. Coverage for all references that depend on the data is sufficient for an exact posterior; with
references that ignore the data the prior passes as a posterior, too.

Locally. The coverage of every entry of an image apart, and of entries whose posterior deviation is of like size: a
sampler may be too sure where it is sure and too unsure elsewhere, and right on average.

Sources: Talts et al., arXiv 1804.06788; Lemos et al., "Sampling-based accuracy testing of posterior estimators for
general inference", arXiv 2302.03026 (TARP).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from smcdiff.calibration.calibrate import Calibration
from smcdiff.calibration.columns import as_columns, evaluate
from smcdiff.calibration.distance import euclidean_distance
from smcdiff.calibration.pit import pit
from smcdiff.calibration.uniformity import ecdf_bands, ecdf_p_values, read_transforms
from smcdiff.checks import check_between, check_count

__all__ = ["Coverage", "LocalCoverage", "coverage_of_balls", "expected_coverage", "local_coverage", "tarp"]


class Coverage(NamedTuple):
    """Coverage at Q levels, for F functions.

    Attributes
    ----------
    names
        Names of the functions.
    levels
        Probabilities of the regions, from 0 to 1, shape (Q,).
    coverage
        Share of data sets whose truth is covered, shape (Q, F).
    std_error
        Standard error of each share if the posterior is right, sqrt(l (1 - l) / J), shape (Q,).
    lower, upper
        Simultaneous bands of a function's coverage, shape (Q,).
    p_values
        Exact test of coverage at all levels, shape (F,).
    mean, mean_std_error
        Coverage averaged over the functions, shape (Q,), and its standard error from the spread over data sets, since
        functions of one data set depend on each other.
    """

    names: tuple[str, ...]
    levels: Float[np.ndarray, " Q"]
    coverage: Float[np.ndarray, "Q F"]
    std_error: Float[np.ndarray, " Q"]
    lower: Float[np.ndarray, " Q"]
    upper: Float[np.ndarray, " Q"]
    p_values: Float[np.ndarray, " F"]
    mean: Float[np.ndarray, " Q"]
    mean_std_error: Float[np.ndarray, " Q"]


def expected_coverage(
    calibration: Calibration | Float[np.ndarray, "J F"], *, num_levels: int = 20, prob: float = 0.95
) -> Coverage:
    """Coverage of the central intervals of every function.

    Parameters
    ----------
    calibration
        From `calibrate`, or transforms of shape (J, F).
    num_levels
        The levels are k / num_levels; 20 include 50 %, 90 % and 95 %.
    prob
        Probability of the bands, for one function.

    Raises
    ------
    ValueError
        If ``num_levels`` is less than 2 or ``prob`` is no probability.

    Source: arXiv 1804.06788.
    """
    values, names = read_transforms(calibration)
    return _coverage(np.abs(2 * values - 1), names, num_levels, prob)


def tarp(
    rng_key: PRNGKeyArray,
    truths: PyTree,
    draws: PyTree,
    references: PyTree,
    *,
    log_weights: Float[np.ndarray, "J N"] | None = None,
    distance: Callable[[PyTree, PyTree], Float[np.ndarray, ""]] | None = None,
    num_levels: int = 20,
    prob: float = 0.95,
) -> Coverage:
    """Coverage of balls about reference points: one test of the whole posterior, in any dimension.

    `calibrate` does the same without keeping draws: give it ``references``, and pass the column of its transforms to
    `coverage_of_balls`.

    Parameters
    ----------
    rng_key
        Key, for the order of ties.
    truths
        Pytree with the leading axis J.
    draws
        Posterior draws, independent for each data set, with the leading axes (J, N).
    references
        Points, a pytree like ``truths``: let them depend on the data, for instance a crude estimate plus noise.
    log_weights
        Log weights of the draws; equal if omitted.
    distance
        ``distance(sample, reference)``: a number, for one sample. Euclidean over all entries if omitted; scale
        entries of different units first.
    num_levels, prob
        As in `expected_coverage`.

    Returns
    -------
    Coverage, of one function.

    Raises
    ------
    ValueError
        If shapes do not fit, or a distance is NaN.

    Source: arXiv 2302.03026.
    """
    num_data_sets = len(jax.tree.leaves(truths)[0])
    uniform = np.asarray(jax.random.uniform(rng_key, (num_data_sets,), jnp.float32), float)
    values = np.empty(num_data_sets)
    for j in range(num_data_sets):
        truth, cloud, point = (
            jax.tree.map(lambda leaf, j=j: leaf[j], tree) for tree in (truths, draws, references)
        )
        size = len(jax.tree.leaves(cloud)[0])
        if distance is None:
            of_truth = euclidean_distance(truth, point, 1)
            of_draws = euclidean_distance(cloud, point, size)
        else:
            alone = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], truth)
            of_truth = as_columns(evaluate(distance, alone, point), 1)[:, 0]
            of_draws = as_columns(evaluate(distance, cloud, point), size)[:, 0]
        counts = None if log_weights is None else np.asarray(log_weights[j], float)
        if np.isnan(of_truth).any() or np.isnan(of_draws[... if counts is None else counts > -np.inf]).any():
            raise ValueError(f"data set {j}: a distance is NaN.")
        values[j] = pit(of_truth[0], of_draws, uniform[j], counts)
    return coverage_of_balls(values, num_levels=num_levels, prob=prob)


def coverage_of_balls(
    values: Float[np.ndarray, " J"], *, num_levels: int = 20, prob: float = 0.95
) -> Coverage:
    """Coverage of balls about reference points, from the transforms of the distances to them.

    Parameters
    ----------
    values
        Transforms: ``calibration.pit[:, calibration.columns("distance to the reference")]``.
    num_levels, prob
        As in `expected_coverage`.

    Source: arXiv 2302.03026.
    """
    return _coverage(read_transforms(values)[0], ("distance to the reference",), num_levels, prob)


def _coverage(values, names, num_levels, prob):
    """Coverage where the truth is covered at level l if its value is at most l."""
    check_count("num_levels", num_levels, 2)
    bands = ecdf_bands(num_levels, len(values), prob)
    # Rounding of single precision must not put a value on the wrong side of its own level.
    inside = values[None] <= bands.points[:, None, None] + 1e-12
    by_data_set = inside.mean(axis=2)
    levels = bands.points
    return Coverage(
        names,
        levels,
        inside.mean(axis=1),
        np.sqrt(levels * (1 - levels) / len(values)),
        bands.lower,
        bands.upper,
        ecdf_p_values(values, num_levels),
        by_data_set.mean(axis=1),
        by_data_set.std(axis=1, ddof=1) / np.sqrt(len(values))
        if len(values) > 1
        else np.full(len(levels), np.nan),
    )


class LocalCoverage(NamedTuple):
    """Coverage of central intervals of one level, entry by entry and by the size of the posterior deviation.

    Attributes
    ----------
    level
        Probability of the intervals.
    coverage
        Share of data sets whose truth is covered, in the shape of the function: a map of an image.
    std_error
        Standard error of each of these shares if the posterior is right.
    z
        (coverage - level) / std_error, in the same shape.
    bin_edges
        Edges of the posterior deviation, shape (B + 1,), with equally many entries between them.
    bin_coverage, bin_std_error
        Coverage of the entries of a bin, shape (B,), and its standard error, in which entries of one data set may
        depend on each other; NaN for an empty bin.
    bin_counts
        Entries of each bin, over all data sets, shape (B,).
    """

    level: float
    coverage: Float[np.ndarray, "*event"]
    std_error: float
    z: Float[np.ndarray, "*event"]
    bin_edges: Float[np.ndarray, " B+1"]
    bin_coverage: Float[np.ndarray, " B"]
    bin_std_error: Float[np.ndarray, " B"]
    bin_counts: Int[np.ndarray, " B"]


def local_coverage(
    calibration: Calibration, name: str | None = None, *, level: float = 0.9, num_bins: int = 5
) -> LocalCoverage:
    """Where, and at which posterior deviations, intervals cover the truth too seldom or too often.

    Parameters
    ----------
    calibration
        From `calibrate`.
    name
        The function, for instance the image; may be omitted where there is one.
    level
        Probability of the central intervals.
    num_bins
        Bins of the posterior deviation.

    Raises
    ------
    ValueError
        If ``name`` is unknown, or missing among several, or a number is out of range.
    """
    check_between("level", level, 0.0, 1.0)
    check_count("num_bins", num_bins)
    if name is None:
        if len(calibration.shapes) != 1:
            raise ValueError(f"name must be one of {list(calibration.shapes)}.")
        name = next(iter(calibration.shapes))
    columns, shape = calibration.columns(name), calibration.shapes[name]
    values, stds = (np.asarray(part[:, columns], float) for part in (calibration.pit, calibration.stds))
    inside = np.abs(2 * values - 1) <= level
    std_error = float(np.sqrt(level * (1 - level) / len(values)))
    coverage = inside.mean(axis=0).reshape(shape)
    edges = np.quantile(stds, np.linspace(0, 1, num_bins + 1))
    which = np.searchsorted(edges[1:-1], stds, side="right")
    counts, total, error = (np.zeros(num_bins) for _ in range(3))
    for b in range(num_bins):
        here = which == b
        counts[b] = here.sum()
        surplus = np.where(here, inside - level, 0.0).sum(axis=1)
        total[b], error[b] = surplus.sum(), np.sqrt(np.sum(surplus**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return LocalCoverage(
            level,
            coverage,
            std_error,
            (coverage - level) / std_error,
            edges,
            level + total / counts,
            np.where(counts > 0, error / counts, np.nan),
            counts.astype(int),
        )
