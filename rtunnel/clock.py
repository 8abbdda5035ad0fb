"""Detects clocks that differ, from Dials that are refused as `expired`.

A gateway and a broker whose clocks differ by more than `broker.dial_window` cannot work together,
and neither knows by itself whose clock is wrong. The registry's clock, whose time is in the nodes'
heartbeats, decides. When it is not known, a process whose Dials with another peer succeed assumes
that its own clock is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

#: Seconds for which a peer's clock counts as evidence, when the registry does not tell whose is
#: wrong.
EVIDENCE_SECONDS: Final = 60.0
#: Seconds in which differences share one log line.
TELL_AGAIN: Final = 10.0
DAY: Final = 86400  # seconds
#: Seconds assumed for a peer of an older version, which does not send its time: half of the default
#: `broker.dial_window`.
UNKNOWN_OFFSET: Final = 15.0

Report = Callable[[str, dict[str, object]], None]


#: Added to messages about certificates that are not valid now, because the certificate may be good.
#: The text is constant, because a repeated message is not logged again.
CHECK_CLOCK: Final = "if that is not so, set this machine's clock"


def utc(moment: float) -> str:
    """Return a time in UTC for display; `moment`: seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def lasting(seconds: float) -> str:
    """Return a number of seconds for people, in one unit: "42 s", "2 min", "3 h", "5 days"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds // 60:.0f} min"
    return f"{seconds // 3600:.0f} h" if seconds < 2 * DAY else f"{seconds // DAY:.0f} days"


def registry_offset(beats: Iterable[float], ttl: float, now: float) -> float | None:
    """Return this machine's clock minus the registry's, in seconds; None without a heartbeat.

    `beats`: heartbeat times by the registry's clock; `now`: by this machine's. The newest beat of a
    living node is up to `ttl` seconds old, so that only a time outside of that is a difference.
    """
    newest = max(beats, default=0.0)
    if newest <= 0.0:
        return None
    ahead = now - newest
    return ahead if ahead < 0 else max(0.0, ahead - ttl)


@dataclass(frozen=True, slots=True)
class _Difference:
    """One Dial that was refused as expired."""

    peer: str
    offset: float | None  # own clock minus the peer's
    at: float


class ClockWatch:
    """Counts Dials that are refused as expired, logs them, and decides whether this clock is wrong.

    The relay's thread calls `differs` and `agrees`; any thread may call the other methods.
    """

    def __init__(self, own: str, report: Report, offset: Callable[[], float | None]) -> None:
        """Count for `own` ("this gateway").

        `report(event, fields)` logs an error; `offset`: see `registry_offset`.
        """
        self._own = own
        self._report = report
        self._registry_offset = offset
        self._difference: _Difference | None = None
        self._agreed_at = -EVIDENCE_SECONDS
        self._told_at = -TELL_AGAIN
        self.expired = 0

    @property
    def suspicious(self) -> bool:
        """Whether there was a difference, and no sign since that it has ended."""
        return self._difference is not None

    def differs(self, peer: str, offset: float | None, now: float) -> None:
        """Record a Dial refused as expired.

        `offset`: own clock minus the peer's; `now`: monotonic seconds.
        """
        self.expired += 1
        self._difference = _Difference(peer, offset, now)
        if now < self._told_at + TELL_AGAIN:
            return
        self._told_at = now
        registry = self._registry_offset()
        wrong = "unknown" if registry is None else self._own if self._is_own(self._difference, registry) else peer
        self._report(
            "clock_difference_found",
            {
                "peer": peer, "offset": _rounded(offset), "registry_offset": _rounded(registry), "wrong": wrong,
                "expired": self.expired, "hint": "Dials are refused as expired: set the clock (NTP)",
            },
        )  # fmt: skip

    def agrees(self, peer: str, now: float) -> None:
        """Record a Dial that succeeded. Costs nothing while there was no difference."""
        difference = self._difference
        if difference is None:
            return
        if difference.peer == peer:
            self._difference = None
        else:
            self._agreed_at = now

    def reason(self, now: float) -> str:
        """Return why the own clock makes this process not ready, or "".

        `now`: monotonic seconds.
        """
        difference = self._difference
        if difference is None:
            return ""
        registry = self._registry_offset()
        if registry is not None:
            wrong = self._is_own(difference, registry)
        else:
            wrong = now < difference.at + EVIDENCE_SECONDS and now >= self._agreed_at + EVIDENCE_SECONDS
        if not wrong:
            return ""
        offset = difference.offset
        how = "differs from" if offset is None else f"is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'}"
        return f"clock: {self._own} {how} {difference.peer}, and Dials are refused as expired: set the clock (NTP)"

    def status(self, now: float) -> dict[str, object]:
        """Return the difference for `/statusz`."""
        difference = self._difference
        return {
            "expired": self.expired,
            "peer": difference.peer if difference is not None else "",
            "offset": _rounded(difference.offset) if difference is not None else 0.0,
            "reason": self.reason(now),
        }

    @staticmethod
    def _is_own(difference: _Difference, registry: float) -> bool:
        """Return whether the registry's clock is nearer to the peer's than to ours."""
        offset = UNKNOWN_OFFSET if difference.offset is None else abs(difference.offset)
        return abs(registry) >= offset / 2


def _rounded(offset: float | None) -> float | None:
    return None if offset is None else round(offset, 1)
