"""Waiting for a condition with a deadline, in place of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two looks. Most conditions hold soon. A look at a process costs both sides
#: milliseconds, so that a process that takes seconds to start is asked less and less often.
FIRST_PAUSE = 0.005
LAST_PAUSE = 0.05


def until(condition: Callable[[], T], timeout: float = 20.0, *, what: str = "") -> T:
    """What `condition` returns once it is true; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what or condition}"
        time.sleep(pause)
        pause = min(LAST_PAUSE, pause * 1.2)
    return value
