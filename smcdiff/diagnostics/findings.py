"""One sentence about a result."""

from typing import NamedTuple

__all__ = ["Finding"]


class Finding(NamedTuple):
    """Something that is wrong with a result, or worth knowing.

    Attributes
    ----------
    check
        What was looked at, such as "rhat", "ess" or "divergences".
    severity
        "invalid", "warning" or "note".
    sentence
        What is wrong, and what to try.
    """

    check: str
    severity: str
    sentence: str
