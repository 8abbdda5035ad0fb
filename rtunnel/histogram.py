"""Counts durations in the buckets of a classic Prometheus histogram.

One thread writes a histogram and takes no lock; other threads read whole numbers. A duration costs
one bisection (docs/metrics.md has the measured figure), so that a role may record one for each
connection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

#: Upper bounds of the buckets, in seconds; one more bucket takes what is longer. The same for all:
#: a round trip on loopback takes 0.1 ms, and `gateway.dial_timeout` is 10 s by default.
BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

K = TypeVar("K", bound=Hashable)


class Histogram:
    """The durations of one kind of event: how many in each bucket, and their sum in seconds."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration, in its bucket."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def status(self) -> dict[str, object]:
        """Return the histogram for `/statusz`: `counts` has one number for each bucket."""
        return {"seconds": round(self.seconds, 6), "counts": list(self.counts)}


class Histograms(Generic[K]):
    """Histograms by a key, which has few values: a word, or a tuple of words."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[K, Histogram] = {}

    def observe(self, key: K, seconds: float) -> None:
        """Count one duration of this key."""
        found = self._by_key.get(key)
        if found is None:
            found = self._by_key[key] = Histogram()
        found.observe(seconds)

    def items(self) -> list[tuple[K, Histogram]]:
        """Return keys and histograms; a copy, because the writer's thread may add a key."""
        return list(self._by_key.items())
