"""How long something took, and how much of that was compilation.

JAX announces the duration of each trace, lowering and compilation when it ends. These stretches of time can lie within
one another (a function traced while another one is), so it is the length of their union that counts.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax.monitoring

__all__ = ["Stopwatch", "stopwatch"]

_EVENTS = "/jax/core/compile/"


@dataclass
class Stopwatch:
    """Seconds that a block took; filled in when the block ends.

    Attributes
    ----------
    total
        Wall time.
    stretches
        (start, end) of each trace, lowering and compilation, by `time.monotonic`.
    """

    total: float = 0.0
    stretches: list[tuple[float, float]] = field(default_factory=list)

    @property
    def compile(self) -> float:
        """Seconds in which something was traced, lowered or compiled."""
        covered, reached = 0.0, float("-inf")
        for start, end in sorted(self.stretches):
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return covered

    @property
    def run(self) -> float:
        """The other seconds."""
        return self.total - self.compile


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Time the block ``with stopwatch() as watch: ...``; read ``watch.compile`` and ``watch.run`` after it."""
    watch = Stopwatch()
    started = time.monotonic()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_EVENTS):
            now = time.monotonic()
            watch.stretches.append((max(started, now - duration_secs), now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        watch.total = time.monotonic() - started
