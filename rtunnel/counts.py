"""What a role's streams did since its start, and the permits by which live ones are counted.

The relay's thread keeps it; other threads that read it see whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from rtunnel.relay.join import Account
from rtunnel.wire.refusal import Refusal


@dataclass
class StreamCounts:
    """Live streams, and totals."""

    streams: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by code word
    endings: dict[str, int] = field(default_factory=dict)  # of streams, by word
    bytes_up: int = 0
    bytes_down: int = 0

    def refuse(self, code: Refusal) -> None:
        """One refusal."""
        self.refused[code.value] = self.refused.get(code.value, 0) + 1

    def status(self) -> dict[str, object]:
        """For `/statusz`."""
        return {
            "streams": self.streams,
            "accepted": self.accepted,
            "refused": dict(self.refused),  # the relay's thread goes on counting
            "endings": dict(self.endings),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


class Carrier(Protocol):
    """What carries streams: a session."""

    streams: int  # live ones, and those that wait for their target


class StreamPermit:
    """One stream, counted at its carrier until it is over, and in the role's counts from `join` on.

    Each count is taken and given back once, in whatever order the calls come.
    """

    __slots__ = ("_carrier", "_counts", "_is_joined")

    def __init__(self, counts: StreamCounts, carrier: Carrier | None = None, *, joined: bool = True) -> None:
        """Count a stream; with `joined` it is a pair from now on. A gateway's has no carrier."""
        self._counts = counts
        self._carrier = carrier
        self._is_joined = joined
        if carrier is not None:
            carrier.streams += 1
        if joined:
            counts.accepted += 1
            counts.streams += 1

    def join(self) -> None:
        """Count it as a pair. No effect if it is one, or is over."""
        if self._carrier is not None and not self._is_joined:
            self._is_joined = True
            self._counts.accepted += 1
            self._counts.streams += 1

    def release(self, account: Account | None = None) -> None:
        """Give back what is counted, and count what the pair did. Later calls have no effect.

        `account`: of the pair that has ended; None if there is no account, or never was a pair.
        """
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.streams -= 1
        if self._is_joined:
            self._is_joined = False
            counts = self._counts
            counts.streams -= 1
            if account is not None:
                ending = str(account.ending)
                counts.endings[ending] = counts.endings.get(ending, 0) + 1
                counts.bytes_up += account.up
                counts.bytes_down += account.down
