"""Checks of arguments, whose messages name the argument, what came and what is needed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_between", "check_count", "check_order", "check_positive", "check_start"]


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


def check_order(order: Any) -> None:
    """Raise a `ValueError` unless ``order`` is 1 or 2."""
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")


def check_start(state: Any, name: str) -> None:
    """Raise a `ValueError` if a chain starts at a place of no density, which it could never leave, or without a score.

    Parameters
    ----------
    state
        State of the chains after ``init``, with the leading axis (num_chains,): its numbers must be finite, and its
        ``is_start_valid``, which kernels have that carry no density, true. Tracers pass.
    name
        Name of the argument with the starting positions.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(leaf, jax.core.Tracer) or not leaf.is_fully_addressable:
            continue
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            is_fine, what = np.isfinite(leaf), f"a {where} that is infinite or not a number"
        elif where.endswith("is_start_valid"):
            is_fine, what = (
                np.asarray(leaf),
                "a density or a score of one of the kernel's parts that is not finite",
            )
        else:
            continue
        is_fine = is_fine.reshape(len(leaf), -1).all(axis=1)
        if not is_fine.all():
            raise ValueError(
                f"{name} must be where the target is finite: chain {int(np.argmin(is_fine))} starts with {what} "
                f"({int((~is_fine).sum())} of {len(leaf)} chains do). Start from draws of the prior or of a wider "
                "density."
            )
