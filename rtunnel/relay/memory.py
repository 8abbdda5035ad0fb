"""The memory of one relay's streams: bytes that one side has sent and the other has not taken.

Two things are counted. A *window* is a promise: the bytes that a link's peer may send ahead on a
stream. Each stream begins with `START_WINDOW`; what a window has above that comes from one budget.
*Held* bytes really wait. While they exceed the budget, new streams are refused. A relay thus
holds the budget and one `START_WINDOW` a stream at most.
"""

from __future__ import annotations

import ctypes
from typing import Final

#: Bytes of a stream's smallest window: a TCP connection begins with about as much (RFC 6928).
START_WINDOW: Final = 16 * 1024
#: Bytes of the budget, unless `stream_memory` is configured.
BUDGET: Final = 256 * 1024 * 1024
#: Half of the budget is for streams that move much. A new stream's window gets one part in
#: _START_PART of the rest of the other half at most.
_START_PART: Final = 128
#: While less than one part in _TIGHT_PART of the budget is left, windows that their streams don't
#: use shrink.
_TIGHT_PART: Final = 4
#: Freed bytes after which memory is given back to the kernel: the C library keeps what lies between
#: used blocks.
TRIM_BYTES: Final = 32 * 1024 * 1024


class Memory:
    """The budget of one relay, and what is held, in bytes. In the relay's thread."""

    __slots__ = ("_peak", "budget", "full", "held", "left")

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.left = budget  # of the budget, for windows
        self.held = 0
        self.full = False  # more than the budget is held: new streams are refused
        self._peak = 0

    def hold(self, size: int) -> None:
        """Count bytes that are held from now on."""
        self.held += size
        self.full = self.held > self.budget
        if self.held > self._peak:
            self._peak = self.held

    def release(self, size: int) -> None:
        """Count bytes that are not held any more."""
        self.held -= size
        self.full = self.held > self.budget

    @property
    def tight(self) -> bool:
        """Whether little of the budget is left."""
        return self.left * _TIGHT_PART < self.budget

    def widen(self, most: int) -> int:
        """Take up to `most` bytes of the budget for a new window. Return how many."""
        share = min(most, max(0, self.left - self.budget // 2) // _START_PART)
        self.left -= share
        return share

    def fell(self) -> bool:
        """Return whether TRIM_BYTES were freed since this returned True last: time for `trim`."""
        if self._peak - self.held < TRIM_BYTES:
            return False
        self._peak = self.held
        return True


def trim() -> None:
    """Give freed memory back to the kernel, if the C library can (glibc).

    Takes milliseconds: not in the relay's thread.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
