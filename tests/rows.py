"""Rows of parametrised tests."""

import pytest

__all__ = ["quick"]


def quick(rows, *chosen):
    """All rows, of which `make test` runs only the chosen ones, and the slow tests the others.

    For rows that say the same of many cases, each with a program of its own to compile.
    """
    rows = list(rows)
    unknown = [row for row in chosen if row not in rows]
    assert not unknown, f"{unknown} are not among {rows}"
    return [row if row in chosen else pytest.param(row, marks=pytest.mark.slow) for row in rows]
