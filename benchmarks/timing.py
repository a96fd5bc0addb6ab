"""Timing by turns within one process, for ratios that a change of the machine's mood does not move."""

import time

import numpy as np

__all__ = ["in_turns", "spread"]


def in_turns(functions: dict, repeats: int) -> dict[str, np.ndarray]:
    """Wall times of each function, called in turns, after one call each that is not counted."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def spread(name: str, values) -> dict:
    """Median and quartiles as three entries of a record."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: median, f"{name}, quartile 1": low, f"{name}, quartile 3": high}
