"""Limits connections whose peers have not proved an identity, in all and for each source.

A source is an IPv4 address, or the /64 of an IPv6 address (`rtunnel.net.source_of`). When no place
is left, a connection of the largest source is ended for the next one: a source cannot keep others
out, however often it connects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import StrEnum
from itertools import islice
from typing import Final, Generic, TypeVar

from rtunnel.relay.lost import Lost, LostKind

T = TypeVar("T")


class Loss(StrEnum):
    """The end of a connection that has proved nothing; also the metric's label."""

    PROBE = "probe"  # the peer closed it before its first byte, as health checks do
    DEADLINE = "deadline"
    MADE_ROOM = "made_room"
    BROKEN = "broken"  # no TLS, not our protocol, a reset

    @classmethod
    def of(cls, kind: LostKind, *, silent: bool) -> Loss:
        """Return the word for an end of this kind; `silent`: the peer has sent nothing."""
        if kind is LostKind.MADE_ROOM:
            return cls.MADE_ROOM
        if kind is LostKind.DEADLINE:
            return cls.DEADLINE
        return cls.PROBE if silent else cls.BROKEN


def made_room(reason: str) -> Lost:
    """Return the end of a connection that `Strangers.weakest` has chosen."""
    return Lost(LostKind.MADE_ROOM, f"made room for another connection: {reason}")


#: Seconds that a connection may be silent before it can be ended for another one: a long round
#: trip.
SILENT_GRACE: Final = 0.25
#: Seconds for a connection that has sent bytes and proved nothing: three round trips, and a wait
#: while many agents connect.
STALLED_GRACE: Final = 2.0
#: Oldest connections of a source that are checked for a silent one: this bounds the cost of one
#: decision.
LOOK_AT: Final = 32


class Place(Generic[T]):
    """The permit of one connection, until `release`. `since`: seconds of the caller's clock."""

    __slots__ = ("_strangers", "entry", "since", "source")

    def __init__(self, strangers: Strangers[T], source: str, entry: T, since: float) -> None:
        self._strangers: Strangers[T] | None = strangers
        self.source = source
        self.entry = entry
        self.since = since

    def release(self) -> None:
        """Release the place. Later calls have no effect."""
        strangers, self._strangers = self._strangers, None
        if strangers is None:
            return
        places = strangers._sources[self.source]
        del places[self]
        if not places:
            del strangers._sources[self.source]
        strangers._count -= 1


class Strangers(Generic[T]):
    """The places for connections without proof, and their holders. Not thread-safe."""

    def __init__(
        self, most: int, share: int, is_silent: Callable[[T], bool], silent_grace: float = SILENT_GRACE
    ) -> None:
        """Allow `most` connections in all and `share` of one source (0: no limit for a source).

        `is_silent` says whether a connection's peer has sent nothing yet.
        """
        self.most = most
        self.share = share or most
        self._is_silent = is_silent
        self._silent_grace = silent_grace
        self._sources: dict[str, OrderedDict[Place[T], None]] = {}  # by source, the oldest first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Place[T]]:
        for places in self._sources.values():
            yield from places

    @property
    def full(self) -> bool:
        """Whether no place is left, whatever the next source is."""
        return self._count >= self.most

    def has_room(self, source: str) -> bool:
        """Return whether one more connection of this source has a place."""
        return self._count < self.most and len(self._sources.get(source, ())) < self.share

    def enter(self, source: str, entry: T, now: float) -> Place[T]:
        """Take a place, without a check: call `has_room` before. Release the place once."""
        place = Place(self, source, entry, now)
        places = self._sources.get(source)
        if places is None:
            places = self._sources[source] = OrderedDict()
        places[place] = None
        self._count += 1
        return place

    def weakest(self, source: str, now: float) -> T | None:
        """Return the connection to end so that one more of `source` has a place.

        It is one of `source` when that has used up its share, else of the largest source: the
        oldest silent one, or the oldest stalled one. Returns None while every one is younger than
        its grace period.
        """
        own = self._sources.get(source, OrderedDict())
        places = own if len(own) >= self.share else max(self._sources.values(), key=len, default=own)
        oldest = list(islice(places, LOOK_AT))
        for place in oldest:
            if now - place.since > self._silent_grace and self._is_silent(place.entry):
                return place.entry
        if oldest and now - oldest[0].since > STALLED_GRACE:
            return oldest[0].entry
        return None

    def silent(self, before: float) -> list[T]:
        """Return the connections that came before this time and have sent nothing."""
        found: list[T] = []
        for places in self._sources.values():
            for place in places:
                if place.since >= before:
                    break
                if self._is_silent(place.entry):
                    found.append(place.entry)
        return found
