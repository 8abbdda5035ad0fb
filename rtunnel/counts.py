"""Counts a role's streams since its start, with permits that count the live ones.

The relay's thread writes the counts; other threads read whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from rtunnel.relay.join import Account, Pair
from rtunnel.wire.refusal import Refusal


@dataclass
class StreamCounts:
    """The live streams of a role, and totals since its start."""

    streams: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by code word
    endings: dict[str, int] = field(default_factory=dict)  # of streams, by word
    bytes_up: int = 0  # of streams that are over
    bytes_down: int = 0
    _shown: tuple[int, int] = (0, 0)  # by the last status

    def refuse(self, code: Refusal) -> None:
        """Count one refusal of this code."""
        self.refused[code.value] = self.refused.get(code.value, 0) + 1

    def moved(self, pairs: set[Pair]) -> tuple[int, int]:
        """Return the bytes of all streams so far, up and down; `pairs`: those that are live.

        Never less than before: a stream that ends during the call may be missing once, and
        Prometheus takes a counter that falls for a restart. Takes 0.3 us for each live stream.
        """
        up, down = self.bytes_up, self.bytes_down
        for pair in list(pairs):  # one step, beside the relay's thread, which changes the set
            account = pair.account
            # handlers' words make an account begin below zero
            if account.up > 0:
                up += account.up
            if account.down > 0:
                down += account.down
        self._shown = max(up, self._shown[0]), max(down, self._shown[1])
        return self._shown

    def status(self, pairs: set[Pair]) -> dict[str, object]:
        """Return the counts for `/statusz`; `pairs`: the live ones."""
        up, down = self.moved(pairs)
        return {
            "streams": self.streams,
            "accepted": self.accepted,
            "refused": dict(self.refused),  # a copy, because the relay's thread goes on counting
            "endings": dict(self.endings),
            "bytes_up": up,
            "bytes_down": down,
        }


class Carrier(Protocol):
    """The carrier of streams: a session."""

    streams: int  # live ones, and those that wait for their target


class StreamPermit:
    """The permit of one stream, counted at its carrier and in the role's counts.

    It counts at the carrier until the stream ends, and in the role's counts from `join` on. Each
    count is taken and released once, in whatever order the calls come.
    """

    __slots__ = ("_carrier", "_counts", "_is_joined")

    def __init__(self, counts: StreamCounts, carrier: Carrier | None = None, *, joined: bool = True) -> None:
        """Count a stream; with `joined` it is a pair already. A gateway's stream has no carrier."""
        self._counts = counts
        self._carrier = carrier
        self._is_joined = joined
        if carrier is not None:
            carrier.streams += 1
        if joined:
            counts.accepted += 1
            counts.streams += 1

    def join(self) -> None:
        """Count the stream as a pair. Has no effect if it is one, or has ended."""
        if self._carrier is not None and not self._is_joined:
            self._is_joined = True
            self._counts.accepted += 1
            self._counts.streams += 1

    def release(self, account: Account | None = None) -> None:
        """Release the counts, and add what the pair did. Later calls have no effect.

        `account`: that of the pair which has ended, or None if there never was one.
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
