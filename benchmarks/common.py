"""What all benchmarks share: a distance between weighted clouds, a clock, results in JSON, tables.

A benchmark is a module with ``add_arguments(parser)`` and ``run(args) -> dict``. The dictionary holds

    settings   everything that was chosen,               seeds     every seed that was used,
    rows       one flat record a seed and setting,       summary   one flat record a setting (what the tables show),
    bars       records made by `bar`: value, limit, passed.

`finish` adds versions, machine, date and wall time, and writes the file. A benchmark of several parts that take long
names in ``KEYS`` the columns that tell them apart; its option ``--keep`` measures some, and leaves the others as they
are.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

__all__ = [
    "RESULTS",
    "Clock",
    "bar",
    "finish",
    "format_table",
    "joined",
    "sliced_wasserstein",
    "total_variation",
]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "blackjax", "numpyro", "arviz", "numpy", "scipy")
_BLOCK = 2**20  # numbers sorted at a time


def sliced_wasserstein(
    x: np.ndarray,
    y: np.ndarray,
    *,
    x_weights: np.ndarray | None = None,
    y_weights: np.ndarray | None = None,
    p: int = 1,
    num_projections: int = 100,
    seed: int = 0,
) -> float:
    """Sliced Wasserstein distance of order ``p`` between two weighted clouds.

    Each projection is coupled exactly, by quantiles: W_p^p = integral over u in (0, 1) of |F^-1(u) - G^-1(u)|^p, an
    integrand that is constant between neighbouring levels of the two cumulative weights. No resampling is involved.

    Parameters
    ----------
    x, y
        Points (n, *event) and (m, *event).
    x_weights, y_weights
        Non-negative, of shapes (n,) and (m,), normalised here; uniform if omitted.
    p
        Order, 1 or 2.
    num_projections
        Number of directions, uniform on the sphere.
    seed
        Of the directions: the same seed means the same directions.

    Returns
    -------
    (mean over directions of W_p^p)^(1/p).
    """
    x = np.asarray(x, float).reshape(len(x), -1)
    y = np.asarray(y, float).reshape(len(y), -1)
    directions = np.random.default_rng(seed).normal(size=(num_projections, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    x_weights, y_weights = _normalised(x_weights, len(x)), _normalised(y_weights, len(y))
    x, y = x[x_weights > 0], y[y_weights > 0]  # a point without weight may be NaN
    weights = [x_weights[x_weights > 0], y_weights[y_weights > 0]]
    block = max(1, _BLOCK // (len(x) + len(y)))
    costs = [
        _wasserstein_1d(directions[i : i + block] @ x.T, directions[i : i + block] @ y.T, *weights, p)
        for i in range(0, num_projections, block)
    ]
    return float(np.mean(np.concatenate(costs)) ** (1 / p))


def _wasserstein_1d(x, y, x_weights, y_weights, p):
    """W_p^p along the last axis of x (P, n) and y (P, m)."""
    x_order, y_order = np.argsort(x, axis=1), np.argsort(y, axis=1)
    x, y = np.take_along_axis(x, x_order, 1), np.take_along_axis(y, y_order, 1)
    x_levels, y_levels = np.cumsum(x_weights[x_order], axis=1), np.cumsum(y_weights[y_order], axis=1)
    levels = np.concatenate([x_levels, y_levels], axis=1)
    order = np.argsort(levels, axis=1, kind="stable")
    levels = np.take_along_axis(levels, order, 1)
    is_x = order < x.shape[1]
    # On the interval that ends at a level, each quantile function sits at the number of its own levels before it.
    x_index = np.minimum(np.cumsum(is_x, axis=1) - is_x, x.shape[1] - 1)
    y_index = np.minimum(np.cumsum(~is_x, axis=1) - ~is_x, y.shape[1] - 1)
    gaps = np.abs(np.take_along_axis(x, x_index, 1) - np.take_along_axis(y, y_index, 1))
    return np.sum(np.diff(levels, axis=1, prepend=0.0) * gaps**p, axis=1)


def _normalised(weights, size):
    if weights is None:
        return np.full(size, 1.0 / size)
    weights = np.asarray(weights, float)
    if weights.shape != (size,) or not (np.all(weights >= 0) and weights.sum() > 0):
        raise ValueError(
            f"weights must be non-negative, not all zero and of shape ({size},), got {weights.shape}."
        )
    return weights / weights.sum()


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the L1 distance of two probability vectors."""
    return float(0.5 * np.abs(np.asarray(p, float) - np.asarray(q, float)).sum())


class Clock:
    """Wall time of a block, split into compilation and the rest, and its processor time.

    ``with Clock() as clock: ...`` sets ``clock.total``, ``clock.compile`` (what JAX reports for tracing, lowering and
    compiling, overlaps counted once), ``clock.run``, and ``clock.cpu`` (of all threads), all in seconds.
    """

    def __enter__(self):
        self._spans = []
        jax.monitoring.register_event_time_span_listener(self._listen)
        self._start, self._start_cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error):
        self.total = time.perf_counter() - self._start
        self.cpu = time.process_time() - self._start_cpu
        jax.monitoring.unregister_event_time_span_listener(self._listen)
        self.compile, end = 0.0, -np.inf
        for begin, finish in sorted(self._spans):
            self.compile += max(0.0, finish - max(begin, end))
            end = max(end, finish)
        self.run = self.total - self.compile

    def _listen(self, event, begin, end, **_):
        if event.startswith("/jax/core/compile/"):
            self._spans.append((begin, end))


def bar(name: str, value: float, limit: float, *, at_least: bool = False) -> dict:
    """One requirement: ``value`` at most (or at least) ``limit``; a NaN fails."""
    passed = value >= limit if at_least else value <= limit
    return {
        "bar": name,
        "value": float(value),
        "limit": float(limit),
        "at_least": at_least,
        "passed": bool(passed),
    }


def finish(name: str, result: dict, clock: Clock, out: Path | None) -> dict:
    """Complete a benchmark's ``result`` with its circumstances, and write it to ``out`` unless that is None."""
    device = jax.devices()[0]
    complete = {
        "benchmark": name,
        **result,
        "passed": all(entry["passed"] for entry in result["bars"]),
        "wall_s": {"total": clock.total, "compile": clock.compile, "run": clock.run, "cpu": clock.cpu},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cpu_count": os.cpu_count(), "platform": device.platform, "device": device.device_kind},
        "versions": {"python": platform.python_version(), **_versions()},
    }
    complete = _plain(complete)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(dump(complete))
    return complete


def joined(old: dict, new: dict, keys: Sequence[str]) -> dict:
    """The result ``new`` with the records of ``old`` that it lacks, which have other values in the columns ``keys``.

    Lists among the settings name what is in either; all else is of the new run.
    """

    def group(row):
        return tuple(row[key] for key in keys)

    both = {}
    for name in ("rows", "summary"):
        measured = {group(row) for row in new[name]}
        both[name] = [row for row in old[name] if group(row) not in measured] + new[name]
        order = list(dict.fromkeys(row[keys[0]] for row in both[name]))
        both[name].sort(key=lambda row, order=order: order.index(row[keys[0]]))
    settings = {key: value for key, value in new["settings"].items() if key != "keep"}
    for key, value in settings.items():
        if isinstance(value, list) and isinstance(old["settings"].get(key), list):
            settings[key] = list(dict.fromkeys(old["settings"][key] + value))
    both["settings"] = settings
    measured = {entry["bar"] for entry in new["bars"]}
    return {
        **new,
        **both,
        "bars": [entry for entry in old["bars"] if entry["bar"] not in measured] + new["bars"],
    }


def dump(result: dict) -> str:
    """JSON with one line for each record of ``rows``, ``summary`` and ``bars``, so that a change is a readable diff."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = ",\n".join("    " + json.dumps(record) for record in value)
            parts.append(f"  {json.dumps(key)}: [\n{body}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def format_table(records: Sequence[dict], columns: Iterable[str] | None = None) -> str:
    """A Markdown table of flat records; the columns are the keys in order of appearance unless given."""
    columns = list(columns or dict.fromkeys(key for record in records for key in record))
    cells = [columns, *[[_cell(record.get(column)) for column in columns] for record in records]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _cell(value):
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        text = f"{value:.3g}"
        return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text
    return str(value).replace("|", "\\|")


def _versions():
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _plain(value):
    """Only what JSON knows: NumPy becomes numbers and lists, floats keep six digits, infinities and NaN become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
