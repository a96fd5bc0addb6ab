"""The result of a statistical check, and the test behind it.

Independent rows d_1, ..., d_n of F differences have mean zero if what is checked is right. Each column is tested by

    z = mean(d) / (std(d) / sqrt(n)),        |z| <= q,

where Student's t with n - 1 degrees of freedom exceeds q with probability false_fail / (2 F): by Bonferroni's
inequality a right program fails with probability of at most ``false_fail``, however the columns depend on each
other, as far as the mean of n rows is normal.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from smcdiff.checks import check_between

__all__ = ["CheckReport", "z_test"]

_WORST = 8  # functions that a message names


class CheckReport(NamedTuple):
    """What a check found.

    Attributes
    ----------
    check
        Name of the check.
    names
        What was tested, F names.
    change
        Estimates of what should be zero, shape (F,): how much a mean rose.
    std_error
        Their standard errors, shape (F,).
    z
        Their ratio, shape (F,); infinite for a change that is the same in every row.
    bound
        Largest |z| that passes.
    false_fail
        Probability, at most, that a right program fails.
    objections
        Why the check says nothing, or what made it needless; empty if there is nothing to object to.
    details
        Further numbers by name.
    """

    check: str
    names: tuple[str, ...]
    change: Float[np.ndarray, " F"]
    std_error: Float[np.ndarray, " F"]
    z: Float[np.ndarray, " F"]
    bound: float
    false_fail: float
    objections: tuple[str, ...]
    details: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether all z lie within the bound, and nothing is to be objected to."""
        return not self.objections and bool(np.all(np.abs(self.z) <= self.bound))

    def raise_if_failed(self) -> "CheckReport":
        """Return the report, or raise an `AssertionError` that says which functions moved which way."""
        if not self.passed:
            raise AssertionError(str(self))
        return self

    def __str__(self) -> str:
        """The verdict in words, with the worst functions first."""
        lines = [f"{self.check}: {'passed' if self.passed else 'failed'}."]
        lines += [f"  {objection}" for objection in self.objections]
        order = np.argsort(-np.nan_to_num(np.abs(self.z), nan=-1.0), kind="stable")
        off = [i for i in order if np.abs(self.z[i]) > self.bound]
        shown = off[:_WORST] if off else [i for i in order[:1] if np.isfinite(self.z[i])]
        for i in shown:
            direction = "rose" if self.change[i] > 0 else "fell"
            lines.append(
                f"  {self.names[i]} {direction} by {abs(self.change[i]):.3g} +- {self.std_error[i]:.2g}: "
                f"{self.z[i]:+.1f} standard errors, {self.bound:.1f} are allowed"
            )
        if len(off) > _WORST:
            lines.append(f"  and {len(off) - _WORST} more of {len(self.names)}")
        lines += [f"  {name}: {value:.4g}" for name, value in self.details.items()]
        lines.append(f"  A right program fails with a probability of at most {self.false_fail:g}.")
        return "\n".join(lines)


def z_test(
    check: str,
    names: tuple[str, ...],
    differences: Float[np.ndarray, "n F"],
    false_fail: float,
    *,
    rounding: float | Float[np.ndarray, " F"] = 0.0,
    objections: tuple[str, ...] = (),
    details: dict[str, float] | None = None,
) -> CheckReport:
    """Test that all columns of independent rows have mean zero.

    Parameters
    ----------
    check
        Name of the check, for messages.
    names
        One name a column.
    differences
        Independent rows, n of at least 2.
    false_fail
        Probability of failing where all means are zero, between 0 and 1.
    rounding
        What rounding may add to a mean; counts as a standard error.
    objections, details
        See `CheckReport`.

    Raises
    ------
    ValueError
        If ``false_fail`` is no probability, or there are fewer than two rows.
    """
    if not false_fail > 0:
        raise ValueError(f"false_fail must be positive, got {false_fail}.")
    check_between("false_fail", false_fail, 0.0, 1.0)
    n, num_columns = differences.shape
    if n < 2:
        raise ValueError(f"{check} needs at least two independent rows, got {n}.")
    finite = np.isfinite(differences).all(axis=0)
    if not finite.all():
        bad = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        objections = (*objections, f"NaN or infinite: {', '.join(bad[:_WORST])}.")
    clean = np.where(finite[None], differences, 0.0)
    mean = clean.mean(axis=0)
    std_error = np.hypot(clean.std(axis=0, ddof=1) / np.sqrt(n), rounding)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(mean == 0, 0.0, mean / std_error)
    bound = float(stats.t.isf(false_fail / (2 * num_columns), n - 1))
    mean, std_error, z = (np.where(finite, values, np.nan) for values in (mean, std_error, z))
    return CheckReport(
        check, tuple(names), mean, std_error, z, bound, false_fail, tuple(objections), details or {}
    )
