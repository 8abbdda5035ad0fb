"""Limits the clients, streams and requests of each source and user. In the relay's thread.

A source is an IPv4 address, or the /64 of an IPv6 address: a host that has one address of a /64 can
use them all.
"""

from __future__ import annotations

from typing import Final

from rtunnel.config import LimitsConfig
from rtunnel.net import source_of
from rtunnel.wire.refusal import Refusal, Refused

#: Seconds of its rate that a bucket holds: clients open connections in bursts.
BURST_SECONDS: Final = 2.0
#: Sources and users without clients and streams that are remembered because their bucket is not
#: full.
MAX_IDLE: Final = 65536


#: Indexes of `_Holding.held`.
_CLIENTS: Final = 0
_STREAMS: Final = 1


class _Holding:
    """The clients, the streams and the bucket of one source or user."""

    __slots__ = ("filled", "held", "tokens")

    def __init__(self, tokens: float, filled: float) -> None:
        self.tokens = tokens
        self.filled = filled  # when `tokens` was computed
        self.held = [0, 0]


class Permit:
    """One client or stream of a source or user, until `release`."""

    __slots__ = ("_also", "_holding", "_key", "_kind", "_meter")

    def __init__(self, meter: _Meter, key: str, holding: _Holding, kind: int) -> None:
        self._meter: _Meter | None = meter
        self._key = key
        self._holding = holding
        self._kind = kind
        self._also: Permit | None = None  # of the user, beside that of the source
        holding.held[kind] += 1

    def release(self, now: float) -> None:
        """Give the permit back; only the first call has an effect.

        `now`: seconds of the loop's clock.
        """
        meter, self._meter = self._meter, None
        if meter is not None:
            self._holding.held[self._kind] -= 1
            meter.forget(self._key, self._holding, now)
            if self._also is not None:
                self._also.release(now)


class _Meter:
    """The holdings of all sources, or of all users. A limit of 0 is no limit."""

    def __init__(self, what: str, *, rate: float, streams: int, clients: int = 0) -> None:
        self._what = what
        self._rate = rate
        self._burst = max(1.0, rate * BURST_SECONDS)
        self._most = [clients, streams]
        self._known: dict[str, _Holding] = {}
        self._sweep_at = 1024

    def __len__(self) -> int:
        return len(self._known)

    def acquire(self, key: str, kind: int, now: float) -> Permit:
        """Return a permit for one more client or stream (`kind`). Raises Refused."""
        holding = self._holding(key, now)
        most = self._most[kind]
        if most and holding.held[kind] >= most:
            if kind == _STREAMS:
                raise Refused(Refusal.TOO_MANY_STREAMS, f"{self._what} {key} has {most} streams already")
            text = f"{self._what} {key} has {most} connections already that are not streams yet"
            raise Refused(Refusal.TOO_MANY_HANDSHAKES, text)
        return Permit(self, key, holding, kind)

    def charge(self, key: str, now: float) -> None:
        """Count a new connection against the rate. Raises Refused."""
        if not self._rate:
            return
        holding = self._holding(key, now)
        self._fill(holding, now)
        if holding.tokens < 1.0:
            text = f"{self._what} {key} opens more than {self._rate:g} connections per second"
            raise Refused(Refusal.RATE_LIMITED, text)
        holding.tokens -= 1.0

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

    def forget(self, key: str, holding: _Holding, now: float) -> None:
        """Forget a source or user that holds nothing and whose bucket is full: a new one is the
        same.
        """
        held = holding.held
        if not (held[_CLIENTS] or held[_STREAMS]):
            self._fill(holding, now)
            if holding.tokens >= self._burst:
                del self._known[key]

    def _sweep(self, now: float) -> None:
        """Forget entries that hold nothing. The cost for each new entry is constant on average."""
        for key, holding in list(self._known.items()):
            self.forget(key, holding, now)
        idle = [key for key, holding in self._known.items() if not any(holding.held)]
        for key in idle[: max(0, len(idle) - MAX_IDLE)]:
            del self._known[key]
        self._sweep_at = max(1024, 2 * len(self._known))


class Limits:
    """The limits of `[gateway.limits]`. `now` is in seconds of the loop's clock."""

    def __init__(self, config: LimitsConfig) -> None:
        self._sources = _Meter(
            "source",
            rate=config.source_rate,
            streams=config.source_streams,
            clients=config.source_handshakes,
        )
        self._users = _Meter("user", rate=config.user_rate, streams=config.user_streams)

    def acquire_client(self, peer: str, now: float) -> Permit:
        """Return the permit of a connection that is not a stream yet.

        Raises Refused (too_many_handshakes).
        """
        return self._sources.acquire(source_of(peer), _CLIENTS, now)

    def charge_request(self, peer: str, now: float) -> None:
        """Count a request against the rate of its source. Raises Refused (rate_limited)."""
        self._sources.charge(source_of(peer), now)

    def charge_user(self, user: str, now: float) -> None:
        """Count a request against the rate of its user. Raises Refused (rate_limited)."""
        self._users.charge(user, now)

    def acquire_stream(self, peer: str, user: str | None, now: float) -> Permit:
        """Return the permit of a stream of this source and user. Raises Refused
        (too_many_streams).
        """
        permit = self._sources.acquire(source_of(peer), _STREAMS, now)
        if user is not None:
            try:
                permit._also = self._users.acquire(user, _STREAMS, now)
            except Refused:
                permit.release(now)
                raise
        return permit

    @property
    def known(self) -> int:
        """The number of sources and users in memory."""
        return len(self._sources) + len(self._users)
