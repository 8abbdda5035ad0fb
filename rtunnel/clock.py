"""Clocks that differ: what Dials that are refused as `expired` say of one's own clock, and what messages say of it.

A gateway and a broker whose clocks differ by more than `broker.dial_window` can't work together, and neither knows by
itself whose clock is wrong. The registry's clock is the third opinion: nodes' heartbeats carry its time. Without it, a
peer whose Dials go through is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

#: What was seen of a peer counts for this long, where the registry does not tell whose clock is wrong (seconds).
EVIDENCE_SECONDS: Final = 60.0
#: Differences are told in one line for this long (seconds).
TELL_AGAIN: Final = 10.0
#: A peer of an older version does not say by how much: more than half of the default `broker.dial_window` (seconds).
UNKNOWN_OFFSET: Final = 15.0

Report = Callable[[str, dict[str, object]], None]


#: Behind every message about a certificate that is not valid now: the certificate may be good. The text does not change
#: with the time, because what is said again is not logged again.
CHECK_CLOCK: Final = "if that is not so, set this machine's clock"


def utc(moment: float) -> str:
    """A time of a certificate for people; `moment`: seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def registry_offset(beats: Iterable[float], ttl: float, now: float) -> float | None:
    """This machine's clock minus the registry's, in seconds; None when no node has a heartbeat.

    `beats`: the nodes' heartbeat times, by the registry's clock; `now`: by this machine's. The newest beat of a living
    node is up to `ttl` old, so only what lies outside of that is a difference.
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
    """Counts Dials that are refused as expired, says so, and judges whether the own clock is the wrong one.

    `differs` and `agrees` are for the relay's thread, the rest for any.
    """

    def __init__(self, own: str, report: Report, offset: Callable[[], float | None]) -> None:
        """`own`: "this gateway"; `report(event, fields)` logs an error; `offset`: see `registry_offset`."""
        self._own = own
        self._report = report
        self._registry_offset = offset
        self._difference: _Difference | None = None
        self._agreed_at = -EVIDENCE_SECONDS
        self._told_at = -TELL_AGAIN
        self.expired = 0

    @property
    def suspicious(self) -> bool:
        """There was a difference, and no sign since that it is over."""
        return self._difference is not None

    def differs(self, peer: str, offset: float | None, now: float) -> None:
        """A Dial was refused as expired. `offset`: own clock minus the peer's; `now`: monotonic."""
        self.expired += 1
        self._difference = _Difference(peer, offset, now)
        if now < self._told_at + TELL_AGAIN:
            return
        self._told_at = now
        registry = self._registry_offset()
        wrong = "unknown" if registry is None else self._own if self._is_own(self._difference, registry) else peer
        self._report(
            "clock_differs",
            {
                "peer": peer, "offset": _rounded(offset), "registry_offset": _rounded(registry), "wrong": wrong,
                "expired": self.expired, "hint": "Dials are refused as expired: set the clock (NTP)",
            },
        )  # fmt: skip

    def agrees(self, peer: str, now: float) -> None:
        """A Dial went through. Costs nothing while there was no difference."""
        difference = self._difference
        if difference is None:
            return
        if difference.peer == peer:
            self._difference = None
        else:
            self._agreed_at = now

    def reason(self, now: float) -> str:
        """Why the own clock makes this process not ready; empty when it does not, or may not. `now`: monotonic."""
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
        """For `/statusz`."""
        difference = self._difference
        return {
            "expired": self.expired,
            "peer": difference.peer if difference is not None else "",
            "offset": _rounded(difference.offset) if difference is not None else 0.0,
            "reason": self.reason(now),
        }

    @staticmethod
    def _is_own(difference: _Difference, registry: float) -> bool:
        """Whether the registry is nearer to the peer than to us."""
        offset = UNKNOWN_OFFSET if difference.offset is None else abs(difference.offset)
        return abs(registry) >= offset / 2


def _rounded(offset: float | None) -> float | None:
    return None if offset is None else round(offset, 1)
