"""Decides when a dial is hedged: how long a path may be silent, and how many dials may try a second
path.

Pure state without a clock and without I/O: times are arguments, in seconds. Each dial costs O(1).
In the relay's thread.
"""

from __future__ import annotations

from typing import Final

#: Answers of one measuring window. The second slowest of 20 is their 95th percentile (nearest
#: rank).
WINDOW: Final = 20
#: The hedge delay of a path is this many times its 95th percentile.
FACTOR: Final = 2.0
#: Seconds of the shortest hedge delay. An agent with a slow target says Dialling after 0.1 s, which
#: leaves 50 ms for the way: a shorter delay would dial slow targets twice.
LEAST_DELAY = 0.15
#: Seconds of the longest hedge delay, unless `gateway.hedge_delay` is longer.
MOST_DELAY: Final = 2.0
#: Seconds that an answer within one turn of the loop counts.
LEAST_TIME: Final = 1e-6
#: Paths of one generation whose times are known. There are two generations, at about 250 bytes a
#: path.
MAX_PATHS: Final = 8192
#: Dials that pay for one hedge.
DIALS_A_HEDGE: Final = 10
#: Hedges in a row after a quiet time, for the dials that are on their way to a broker when it
#: stops.
BURST: Final = 10

#: A session of an agent: its node and its epoch.
Path = tuple[str, int]


class AnswerTime:
    """The seconds that one path takes for its first answer, from the connect on."""

    __slots__ = ("_count", "_p95", "_second", "_slowest")

    def __init__(self) -> None:
        self._count = 0  # answers of this window
        self._slowest = 0.0  # seconds of the slowest of them
        self._second = 0.0  # and of the second slowest
        self._p95 = 0.0  # seconds, of the window before; 0: there was none

    def record(self, seconds: float) -> None:
        """Count one answer that took so many seconds."""
        if seconds > self._slowest:
            self._slowest, self._second = seconds, self._slowest
        elif seconds > self._second:
            self._second = seconds
        self._count += 1
        if self._count == WINDOW:
            self._p95 = max(self._second, LEAST_TIME)
            self._count, self._slowest, self._second = 0, 0.0, 0.0

    @property
    def slow(self) -> float:
        """The 95th percentile; before the first whole window the slowest answer."""
        if not self._p95:
            return self._slowest
        # One slow answer may be an accident; two in an unfinished window are more than one in
        # twenty.
        return max(self._p95, self._second)

    @property
    def measured(self) -> bool:
        """Whether one window is complete."""
        return self._p95 > 0.0


class Hedging:
    """The hedge delays of all paths of one gateway, and the budget of its hedges."""

    def __init__(self, first_delay: float) -> None:
        """`first_delay`: seconds, for a path that is not measured yet (`gateway.hedge_delay`)."""
        self._first_delay = first_delay
        self._most = max(MOST_DELAY, first_delay)
        # Two generations: when the young one is full, the old one is dropped with the paths not
        # used since then.
        self._young: dict[Path, AnswerTime] = {}
        self._old: dict[Path, AnswerTime] = {}
        self._credit = BURST * DIALS_A_HEDGE  # a dial adds 1, a hedge takes DIALS_A_HEDGE
        self.sent = 0  # hedges since the start
        self.held = 0  # dials whose hedge had to wait for the budget

    def delay(self, path: Path) -> float:
        """Seconds of silence after which a dial on this path may be hedged."""
        times = self._young.get(path) or self._old.get(path)
        if times is None:
            return self._first_delay
        least = LEAST_DELAY if times.measured else self._first_delay
        return max(least, min(FACTOR * times.slow, self._most))

    def answered(self, path: Path, seconds: float) -> None:
        """Count the seconds to the first answer on a path."""
        self._times(path).record(seconds)

    def given_up(self, path: Path, seconds: float) -> None:
        """Count a path that was given up after so many seconds of silence.

        It counts as an answer when that is longer than `slow`. Otherwise the answers that a hedge
        overtakes would be missing, and a path would look faster the slower it is.
        """
        times = self._times(path)
        if seconds > times.slow:
            times.record(seconds)

    def dialled(self) -> None:
        """Count one dial, which adds to the budget of hedges."""
        if self._credit < BURST * DIALS_A_HEDGE:
            self._credit += 1

    def spend(self) -> bool:
        """Take one hedge from the budget. Return False when the budget is used up."""
        if self._credit < DIALS_A_HEDGE:
            return False
        self._credit -= DIALS_A_HEDGE
        return True

    @property
    def known(self) -> int:
        """The number of paths whose times are known."""
        return len(self._young) + len(self._old)

    def _times(self, path: Path) -> AnswerTime:
        times = self._young.get(path)
        if times is None:
            times = self._old.pop(path, None) or AnswerTime()
            if len(self._young) >= MAX_PATHS:
                self._old, self._young = self._young, {}
            self._young[path] = times
        return times
