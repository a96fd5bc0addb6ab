"""Checks of arguments, whose messages name the argument, what came and what is needed."""

from typing import Any

import jax
import numpy as np

__all__ = ["check_between", "check_count", "check_positive"]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise a `ValueError` unless ``value`` is an integer of at least ``least``, by default a positive one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        need = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {need}, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Raise a `ValueError` unless all entries of ``value`` are positive and finite; tracers pass."""
    if isinstance(value, jax.core.Tracer):
        return
    values = np.asarray(value)
    if not np.issubdtype(values.dtype, np.number) or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise a `ValueError` unless ``value`` lies in [low, high); tracers pass."""
    if not isinstance(value, jax.core.Tracer) and not low <= value < high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}), got {value}.")
