"""Remembers for traces which clients were refused lately for their own sake: a login, a limit.

A trace dials as a client would, but without the client's password, and at another time. So these
refusals are facts that it can't find out by itself.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from rtunnel.wire.refusal import Refusal, Refused

#: Refusals that are remembered: some for each of a few clients, as a trace looks for one of them.
MAX_REMEMBERED: Final = 256
#: Seconds for which they are told: as long as somebody may ask why a request just failed.
RECENT_SECONDS: Final = 600.0
#: Refusals of which a trace tells.
MAX_TOLD: Final = 4
#: Codes that a trace may not meet, because they depend on the client's password and its traffic.
_OF_CLIENTS: Final = frozenset({
    Refusal.AUTHENTICATION_REQUIRED, Refusal.BAD_CREDENTIALS, Refusal.RATE_LIMITED, Refusal.TOO_MANY_STREAMS,
    Refusal.TOO_MANY_HANDSHAKES,
})  # fmt: skip


class RecentRefusal(msgspec.Struct, frozen=True):
    """One request that was refused."""

    at: float  # seconds of the loop's clock; in a report: seconds before the trace
    source: str
    user: str  # a known user's name, as the client gave it; empty without one
    code: str
    text: str


class Recent:
    """The refusals of clients, the newest last. In the relay's thread."""

    def __init__(self) -> None:
        self._refusals: deque[RecentRefusal] = deque(maxlen=MAX_REMEMBERED)

    def add(self, source: str, user: str, refused: Refused, now: float) -> None:
        """Remember a refusal, if it is one of a client; `now`: seconds of the loop's clock."""
        if refused.code in _OF_CLIENTS:
            self._refusals.append(RecentRefusal(now, source, user, refused.code.value, refused.text))

    def of(self, source: str, user: str, now: float) -> list[RecentRefusal]:
        """Return the refusals of a user at a source, the newest first, with their ages."""
        found = [
            msgspec.structs.replace(refusal, at=round(now - refusal.at, 1))
            for refusal in reversed(self._refusals)
            if refusal.source == source and refusal.user == user and now - refusal.at < RECENT_SECONDS
        ]
        return found[:MAX_TOLD]
