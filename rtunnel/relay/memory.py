"""What a process may hold for its streams: bytes that one side has sent and the other has not taken.

Two things are counted. *Windows* are a promise: so much a link's peer may send ahead on a stream. Each begins with
`START_WINDOW`, which every stream has; what is above comes out of one budget. *Held* is what really waits. New streams
are refused while it is above the budget. So a process holds at most the budget and a `START_WINDOW` for each stream.
"""

from __future__ import annotations

import ctypes
from typing import Final

#: A stream's window, at least: a TCP connection begins with as much (RFC 6928).
START_WINDOW: Final = 16 * 1024
#: The budget of a relay that is not told another one.
BUDGET: Final = 256 * 1024 * 1024
#: Half of the budget is for streams that move much: the windows of new ones share what is left of the other half, and
#: each gets so small a part of it at most.
_START_PART: Final = 128
#: When less than this part of the budget is left, windows that their streams don't use shrink.
_TIGHT_PART: Final = 4
#: When so much was freed it goes back to the kernel: the C library itself keeps what lies between live blocks.
TRIM_BYTES: Final = 32 * 1024 * 1024


class Memory:
    """The budget of one relay, in bytes. In the relay's thread."""

    __slots__ = ("_peak", "budget", "full", "held", "left")

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.left = budget  # for windows
        self.held = 0
        self.full = False  # more is held than the budget: no new streams
        self._peak = 0

    def hold(self, size: int) -> None:
        """So many bytes wait from now on for a peer that does not take them."""
        self.held += size
        self.full = self.held > self.budget
        if self.held > self._peak:
            self._peak = self.held

    def release(self, size: int) -> None:
        """So many of them are gone."""
        self.held -= size
        self.full = self.held > self.budget

    @property
    def tight(self) -> bool:
        """Little is left to grow by."""
        return self.left * _TIGHT_PART < self.budget

    def widen(self, most: int) -> int:
        """Take at most so many bytes for a new window."""
        share = min(most, max(0, self.left - self.budget // 2) // _START_PART)
        self.left -= share
        return share

    def fell(self) -> bool:
        """Return whether so much was freed since this was last True that a `trim` pays."""
        if self._peak - self.held < TRIM_BYTES:
            return False
        self._peak = self.held
        return True


def trim() -> None:
    """Give freed memory back to the kernel, where the C library can. Takes milliseconds: not in the relay's thread."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
