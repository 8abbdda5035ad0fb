"""How much one source and one user may have at once, so that a neighbour does not suffer. In the relay's thread.

A source is an IPv4 address, or the /64 of an IPv6 address: who has one address of it has them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rtunnel.config import LimitsConfig
from rtunnel.net import source_of
from rtunnel.wire.refusal import Refusal, Refused

#: A bucket holds so many seconds of its rate: clients open connections in bursts.
BURST_SECONDS: Final = 2.0
#: Sources that are remembered only because their bucket is not full yet.
MAX_IDLE: Final = 65536


@dataclass(slots=True)
class _Holding:
    """What one source or user has."""

    tokens: float
    filled: float  # when `tokens` was right
    handshakes: int = 0
    streams: int = 0


class _Meter:
    """Sources, or users: their connections in this second, and what they hold. 0 is no limit."""

    def __init__(self, what: str, *, rate: float, streams: int, handshakes: int = 0) -> None:
        self._what = what
        self._rate = rate
        self._burst = max(1.0, rate * BURST_SECONDS)
        self._streams = streams
        self._handshakes = handshakes
        self._known: dict[str, _Holding] = {}
        self._sweep_at = 1024

    def __len__(self) -> int:
        return len(self._known)

    def handshake(self, key: str, now: float) -> bool:
        """One more connection that is not a stream yet; False when there are too many."""
        holding = self._holding(key, now)
        if self._handshakes and holding.handshakes >= self._handshakes:
            return False
        holding.handshakes += 1
        return True

    def handshaken(self, key: str, now: float) -> None:
        """It is a stream, or over."""
        holding = self._known[key]
        holding.handshakes -= 1
        self._forget(key, holding, now)

    def refused(self, key: str, now: float) -> Refused | None:
        """Take a new connection into account, or say why not."""
        if not self._rate:
            return None
        holding = self._holding(key, now)
        self._fill(holding, now)
        if holding.tokens < 1.0:
            text = f"{self._what} {key} opens more than {self._rate:g} connections per second"
            return Refused(Refusal.RATE_LIMITED, text)
        holding.tokens -= 1.0
        return None

    def full(self, key: str) -> Refused | None:
        """Why there may be no further stream, if so."""
        holding = self._known.get(key)
        if self._streams and holding is not None and holding.streams >= self._streams:
            return Refused(Refusal.TOO_MANY_STREAMS, f"{self._what} {key} has {self._streams} streams already")
        return None

    def stream(self, key: str, now: float) -> None:
        """One more stream."""
        self._holding(key, now).streams += 1

    def ended(self, key: str, now: float) -> None:
        """One less."""
        holding = self._known[key]
        holding.streams -= 1
        self._forget(key, holding, now)

    def _holding(self, key: str, now: float) -> _Holding:
        holding = self._known.get(key)
        if holding is None:
            if len(self._known) >= self._sweep_at:
                self._sweep(now)
            holding = self._known[key] = _Holding(self._burst, now)
        return holding

    def _fill(self, holding: _Holding, now: float) -> None:
        holding.tokens = min(self._burst, holding.tokens + (now - holding.filled) * self._rate)
        holding.filled = now

    def _forget(self, key: str, holding: _Holding, now: float) -> None:
        """Who holds nothing, and whose bucket is full, is as good as unknown."""
        if not (holding.handshakes or holding.streams):
            self._fill(holding, now)
            if holding.tokens >= self._burst:
                del self._known[key]

    def _sweep(self, now: float) -> None:
        """Now and then, and in all as often as there are newcomers: the cost of each is constant."""
        for key, holding in list(self._known.items()):
            self._forget(key, holding, now)
        idle = [key for key, holding in self._known.items() if not (holding.handshakes or holding.streams)]
        for key in idle[: max(0, len(idle) - MAX_IDLE)]:
            del self._known[key]
        self._sweep_at = max(1024, 2 * len(self._known))


class Limits:
    """[gateway.limits] at work."""

    def __init__(self, config: LimitsConfig) -> None:
        self._sources = _Meter(
            "source",
            rate=config.source_rate,
            streams=config.source_streams,
            handshakes=config.source_handshakes,
        )
        self._users = _Meter("user", rate=config.user_rate, streams=config.user_streams)

    def arrived(self, peer: str, now: float) -> bool:
        """A connection was accepted; False: this source has too many that are not streams yet. Else `left` follows."""
        return self._sources.handshake(source_of(peer), now)

    def left(self, peer: str, now: float) -> None:
        """It is a stream now, or over."""
        self._sources.handshaken(source_of(peer), now)

    def asks(self, peer: str, now: float) -> Refused | None:
        """It said what it wants: why not, by the rate of its source."""
        return self._sources.refused(source_of(peer), now)

    def logged_in(self, user: str, now: float) -> Refused | None:
        """It is known whose it is: why not, by the rate of the user."""
        return self._users.refused(user, now)

    def open(self, peer: str, user: str | None, now: float) -> Refused | None:
        """A stream is wanted: why not; or it counts from here on, until `close`."""
        source = source_of(peer)
        refused = self._sources.full(source) or (self._users.full(user) if user is not None else None)
        if refused is None:
            self._sources.stream(source, now)
            if user is not None:
                self._users.stream(user, now)
        return refused

    def close(self, peer: str, user: str | None, now: float) -> None:
        """The stream is over, or came to nothing."""
        self._sources.ended(source_of(peer), now)
        if user is not None:
            self._users.ended(user, now)

    @property
    def known(self) -> int:
        """Sources and users in memory."""
        return len(self._sources) + len(self._users)
