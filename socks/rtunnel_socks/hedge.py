"""When a dial is hedged: how long a path may be silent, and how many dials may try a second path beside it.

Pure state: no clock and no I/O, times are arguments in seconds. O(1) for each dial, in the relay's thread.
"""

from __future__ import annotations

from typing import Final

#: Answers of one window. The second slowest of 20 is their 95th percentile (nearest rank).
WINDOW: Final = 20
#: A path is silent for too long after this many times its 95th percentile.
FACTOR: Final = 2.0
#: ... and never sooner. An agent with a slow target says Dialling after 0.1 s, which then has 50 ms for its way:
#: a shorter delay would dial slow targets twice.
LEAST_DELAY = 0.15
#: ... nor later, so that a path whose answers became rare is given up in time (unless hedge_delay itself is longer).
MOST_DELAY: Final = 2.0
#: An answer within the same turn of the loop took some time, too.
LEAST_TIME: Final = 1e-6
#: Paths whose times are known: twice as many at most, at about 250 bytes each.
MAX_PATHS: Final = 8192
#: One hedge for so many dials.
DIALS_A_HEDGE: Final = 10
#: Hedges in a row after a quiet time: what is under way to a broker at the moment when it freezes must not wait.
BURST: Final = 10

#: A session of an agent: its node and its epoch.
Path = tuple[str, int]


class AnswerTime:
    """How long one path takes for its first word, from the connect on."""

    __slots__ = ("_count", "_p95", "_second", "_slowest")

    def __init__(self) -> None:
        self._count = 0  # answers of this window, of which
        self._slowest = 0.0
        self._second = 0.0
        self._p95 = 0.0  # of the window before; 0: there was none

    def record(self, seconds: float) -> None:
        """Count one answer."""
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
        # One slow answer may be an accident, two are more than one in twenty before this window is whole.
        return max(self._p95, self._second)

    @property
    def measured(self) -> bool:
        """There was a whole window."""
        return self._p95 > 0.0


class Hedging:
    """The hedge delays of all paths of one gateway, and the budget of its hedges."""

    def __init__(self, first_delay: float) -> None:
        """`first_delay`: seconds, for a path that is not measured yet (`gateway.hedge_delay`)."""
        self._first_delay = first_delay
        self._most = max(MOST_DELAY, first_delay)
        # Two generations: when the young one is full the old one goes, with the paths that nobody used since.
        self._young: dict[Path, AnswerTime] = {}
        self._old: dict[Path, AnswerTime] = {}
        self._credit = BURST * DIALS_A_HEDGE  # a dial adds 1, a hedge takes DIALS_A_HEDGE
        self.sent = 0  # hedges since the start
        self.held = 0  # dials whose hedge the budget held back, at least for a while

    def delay(self, path: Path) -> float:
        """Seconds of silence after which a dial on this path may be hedged."""
        times = self._young.get(path) or self._old.get(path)
        if times is None:
            return self._first_delay
        least = LEAST_DELAY if times.measured else self._first_delay
        return max(least, min(FACTOR * times.slow, self._most))

    def answered(self, path: Path, seconds: float) -> None:
        """The first word on this path took so long."""
        self._times(path).record(seconds)

    def given_up(self, path: Path, seconds: float) -> None:
        """Nobody waits any longer for this path, which was silent for so long.

        That is as good as an answer that took this long, when it is longer than was known: otherwise the answers that
        a hedge overtakes would be missing, and the path would look faster the slower it is.
        """
        times = self._times(path)
        if seconds > times.slow:
            times.record(seconds)

    def dialled(self) -> None:
        """Count one dial: the budget grows with them."""
        if self._credit < BURST * DIALS_A_HEDGE:
            self._credit += 1

    def spend(self) -> bool:
        """Take one hedge out of the budget; False: it is used up."""
        if self._credit < DIALS_A_HEDGE:
            return False
        self._credit -= DIALS_A_HEDGE
        return True

    @property
    def known(self) -> int:
        """How many paths have a time."""
        return len(self._young) + len(self._old)

    def _times(self, path: Path) -> AnswerTime:
        times = self._young.get(path)
        if times is None:
            times = self._old.pop(path, None) or AnswerTime()
            if len(self._young) >= MAX_PATHS:
                self._old, self._young = self._young, {}
            self._young[path] = times
        return times
