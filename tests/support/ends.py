"""Ends, a loop and a relay without sockets, for the logic of roles. Nothing happens by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rtunnel.relay.join import Account, Ending, PairOwner
from rtunnel.relay.lost import DEADLINE, LINK_LOST, RESET, Lost
from rtunnel.wire.refusal import Refusal

__all__ = ["DEADLINE", "LINK_LOST", "RESET", "FakeEnd", "FakeLoop", "FakeRelay"]


@dataclass(eq=False)
class FakeTimer:
    """One call that `FakeLoop.run` makes."""

    at: float
    call: Callable[[], None] | None

    def cancel(self) -> None:
        """See Timer."""
        self.call = None


@dataclass(eq=False)
class FakeLoop:
    """A clock that stands still until `run`."""

    now: float = 0.0
    timers: list[FakeTimer] = field(default_factory=list)

    def after(self, seconds: float, call: Callable[[], None]) -> FakeTimer:
        """See Loop."""
        timer = FakeTimer(self.now + seconds, call)
        self.timers.append(timer)
        return timer

    @property
    def waiting(self) -> int:
        """Timers that are neither due nor cancelled."""
        return sum(timer.call is not None for timer in self.timers)

    def run(self, seconds: float) -> None:
        """Let the time pass."""
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.at <= self.now]:
            self.timers.remove(timer)
            call, timer.call = timer.call, None
            if call is not None:
                call()


@dataclass(eq=False)
class FakeEnd:
    """A socket or a stream: keeps what is written, and gives its handler what the test says."""

    loop: FakeLoop = field(default_factory=FakeLoop)
    peer: str = "10.9.9.9"
    written: bytes = b""
    closed: bool = False
    broken: bool = False
    reset: bool = False
    reading: bool = False
    handler: Any = None

    def set_handler(self, handler: Any, deadline: float | None = None) -> None:
        """See End."""
        self.handler, self.reading = handler, True

    def pause(self) -> None:
        """See End."""
        self.reading = False

    def write(self, data: bytes) -> None:
        """See End."""
        assert not self.closed
        self.written += data

    def close(self) -> None:
        """See End."""
        self.closed, self.handler = True, None

    def abort(self) -> None:
        """See End."""
        if not self.closed:
            self.closed = self.reset = True
            self.handler = None

    # What the peer does. Nothing, when nobody listens.

    def receive(self, data: bytes) -> None:
        """The peer has sent bytes."""
        if self.handler is not None and self.reading:
            self.handler.received(data)

    def finish(self) -> None:
        """The peer has sent FIN."""
        if self.handler is not None and self.reading:
            self.handler.finished()

    def lose(self, lost: Lost = RESET) -> None:
        """The end is gone."""
        handler = self.handler
        self.abort()
        if handler is not None:
            handler.lost(lost)


@dataclass
class FakePair:
    """What a role has joined."""

    client: FakeEnd
    target: FakeEnd
    owner: PairOwner
    up: bytes
    down: bytes
    done: bool = False

    def abort(self, ending: Ending) -> None:
        """See Pair."""
        self.end(ending)

    def end(self, ending: Ending = Ending.CLOSED) -> None:
        """The pair is over. Once."""
        if not self.done:
            self.done = True
            self.owner.ended(Account(0.0, up=1, down=2, ending=ending))


@dataclass(eq=False)
class FakeConnect:
    """A connect under way, until the test says how it ends."""

    where: tuple[str, int]
    source: str
    done: Callable[[Any, Refusal, str], None] | None
    errno: int = 0
    pending: bool = True

    def cancel(self) -> None:
        """See Attempt."""
        self.done = None

    def succeed(self, end: FakeEnd) -> None:
        """It is connected."""
        done, self.done = self.done, None
        if done is not None:
            done(end, Refusal.INTERNAL, "")

    def fail(self, code: Refusal, why: str, errno: int = 0) -> None:
        """It is not."""
        self.errno = errno
        done, self.done = self.done, None
        if done is not None:
            done(None, code, why)


class FakeRelay:
    """The verbs of a relay that roles use for a Dial."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.memory = SimpleNamespace(full=False, held=0)
        self.connects: list[FakeConnect] = []
        self.joined: list[FakePair] = []

    @property
    def pairs(self) -> list[FakePair]:
        """Those that are not over."""
        return [pair for pair in self.joined if not pair.done]

    def end(self, sock: Any, peer: str, *, spoken: bool = False) -> FakeEnd:
        """See Relay; the socket is the end."""
        assert isinstance(sock, FakeEnd)
        sock.loop, sock.peer = self.loop, peer
        return sock

    def connect(self, host: str, port: int, timeout: float, done: Any, *, source: str = "") -> FakeConnect:
        """See Relay."""
        self.connects.append(FakeConnect((host, port), source, done))
        return self.connects[-1]

    def join(self, client: Any, target: Any, *, up: bytes = b"", down: bytes = b"", owner: PairOwner) -> None:
        """See Relay."""
        client.handler = target.handler = None
        pair = FakePair(client, target, owner, up, down)
        self.joined.append(pair)
        if client.closed or target.closed:
            pair.end(Ending.CLIENT_RESET)
