"""The last words of an ending link always arrive, on a kernel that does its worst (tests/support/kernel.py).

One end of a link ends it: with a Refused on a stream and GoAway 0, or with GoAway 1 for a fault. The other end goes on
sending, as a peer does that has not read yet. The tape decides when the link ends, who moves, and how much.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtunnel.relay import ends
from rtunnel.relay import link as link_module
from rtunnel.relay.ends import EndHandler, SocketEnd
from rtunnel.relay.link import LAST_WORDS_BYTES, Handshake, Link
from rtunnel.relay.lost import Lost, closed
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire.yamux import GoAwayCode
from support.hostile import SimRelay, contexts, fails_soon, take_turns, tape_of
from support.kernel import Choices, Kernel

_CAPACITIES = (300, 4096, 70_000)
_REFUSED = b"Refused: " + bytes(500)
_MORE = bytes(700)


class Listens(EndHandler):
    """Collects what comes on a stream."""

    def __init__(self) -> None:
        self.heard = b""

    def received(self, data: bytes) -> None:
        self.heard += data

    def finished(self) -> None: ...

    def lost(self, lost: Lost) -> None: ...


class Owner:
    """The owner of one end; it takes streams and keeps the last one."""

    def __init__(self) -> None:
        self.talker = Listens()
        self.stream: StreamEnd | None = None
        self.why = ""

    def link_up(self, link: Link) -> None: ...

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        self.stream = stream
        return self.talker

    def link_down(self, link: Link, lost: Lost) -> None:
        assert not self.why
        self.why = str(lost)


class World:
    """A broker's and an agent's relay, and the link between them."""

    def __init__(self, tape: bytes) -> None:
        self.choices = Choices(tape)
        self.kernel = Kernel(self.choices)
        self.relays = [SimRelay(self.kernel), SimRelay(self.kernel)]
        self.owners = Owner(), Owner()

    def build(self) -> None:
        """Let the link come up, with a stream of the agent."""
        below = self.choices.below
        self.breaks, is_tls = below(2) == 1, below(2) == 1
        sides = self.kernel.connection(_CAPACITIES[below(len(_CAPACITIES))])
        tls = contexts() if is_tls else (None, None)
        self.near, self.far = [
            relay.link(self.kernel.socket(side), owner, Handshake(is_client, 1000.0, context, "x"), peer="peer")
            for relay, side, owner, is_client, context in zip(
                self.relays, sides, self.owners, (False, True), tls, strict=True
            )
        ]  # fmt: skip
        while not (self.near.up and self.far.up):
            self._round()
        self.stream = self.far.open(self.owners[1].talker, b"Hello")
        while self.owners[0].stream is None:
            self._round()

    def leave(self) -> None:
        """End the link."""
        if self.breaks:
            self.near.break_off("a fault")
            return
        stream = self.owners[0].stream
        assert stream is not None
        stream.write(_REFUSED)
        self.near.close(closed("refused"))

    def send(self) -> None:
        """The agent sends more, as long as its link lives."""
        if not self.far.over and not self.far.blocked:
            self.stream.write(_MORE)

    def step(self) -> None:
        """One thing happens, of the tape's choice."""
        kind = self.choices.below(8)
        if kind < 3:
            self.relays[self.choices.below(2)].turn(0.0)
        elif kind < 6:
            sides = [side for side in self.kernel.sides if side.deliverable]
            if sides:
                side = sides[self.choices.below(len(sides))]
                side.deliver(self.choices.amount(max(1, len(side.sent))))
        elif kind < 7:
            self.send()
        elif self.choices.below(3) == 0:
            self.leave()

    def rest(self) -> None:
        """Until nothing moves any more; the agent sends as long as its link lives."""
        still = rounds = 0
        while still < 4:
            self.send()
            still = 0 if self._round() else still + 1
            rounds += 1
            assert rounds < 10_000, "it never comes to rest"

    def _round(self) -> bool:
        moved = take_turns(self.relays, 0.0)
        return self.kernel.deliver_all() or moved

    def check(self) -> None:
        """The agent has heard why, and nothing is left."""
        near, far = self.owners
        code = GoAwayCode.PROTOCOL_ERROR if self.breaks else GoAwayCode.NORMAL
        assert near.why == ("protocol error: a fault" if self.breaks else "refused")
        assert self.far.going_away is code, f"the GoAway is lost: {far.why}"
        assert self.breaks or far.talker.heard == _REFUSED, "the Refused is lost"
        assert far.why == "closed by peer"
        assert not self.kernel.by_fd, "sockets are left"


def play(tape: bytes) -> None:
    """Build a world, let the tape rule, end the link, and look."""
    world = World(tape)
    with world.kernel.installed(), mock.patch.object(link_module, "random", random.Random(0)):
        try:
            world.build()
            while not world.choices.over:
                world.step()
            world.leave()
            world.rest()
            world.check()
        finally:
            for relay in world.relays:
                relay.loop._shut()
            for sock in world.kernel.sockets:
                sock.close()


@pytest.mark.parametrize("first", [0, 200])
def test_last_words_arrive(first: int) -> None:
    """Seeded tapes: plain and TLS, a Refused and a fault, rooms from 300 bytes."""
    for seed in range(first, first + 200):
        play(tape_of(seed))


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=20, max_size=600))
def test_last_words_arrive_on_any_tape(tape: bytes) -> None:
    """The same with tapes of Hypothesis, which makes a failing one short."""
    play(tape)


def close_at_once(self: Link) -> None:
    """The socket is closed while the peer goes on sending."""
    self.loop.close(self.sock)


def forget_the_rest(self: Link) -> None:
    """What the kernel has not taken yet is dropped."""
    end = SocketEnd(self.loop, self.sock, self.peer, watched=True)
    end.close()


@pytest.mark.parametrize("faulty", [close_at_once, forget_the_rest])
def test_a_fault_is_found(faulty: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fault put in, one of the first tapes fails."""
    monkeypatch.setattr(Link, "_linger", faulty)
    assert fails_soon(play, 100)


# --- what bounds them ---------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    """A plain link on a tame kernel, with room."""
    made = World(b"\1\0\2")
    with made.kernel.installed():
        made.build()
        yield made
        for relay in made.relays:
            relay.loop._shut()
        for sock in made.kernel.sockets:
            sock.close()


def test_a_process_that_stops_cuts_no_last_words(world: World) -> None:
    """Ending links that wait for the peer's FIN are closed in order."""
    while world._round():  # the first pings: close(2) over unread bytes would be a RST
        pass
    world.leave()
    world.relays[0]._end_all()
    while world._round():
        pass
    assert world.far.going_away is GoAwayCode.PROTOCOL_ERROR
    assert world.owners[1].why == "closed by peer"


def test_a_peer_that_reads_nothing_is_not_waited_for(world: World) -> None:
    """So many unsent bytes keep neither memory nor a descriptor."""
    world.near.write(bytes(70_000 + LAST_WORDS_BYTES))
    fd = world.near.sock.fileno()
    world.leave()
    world.relays[0].turn(0.0)
    assert fd not in world.kernel.by_fd


def test_a_peer_that_goes_on_for_ever_is_reset(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing end throws away so many bytes and no more."""
    monkeypatch.setattr(ends, "LINGER_BYTES", 10 * 70_000)
    fd, side = world.near.sock.fileno(), world.kernel.by_fd[world.far.sock.fileno()]
    world.leave()
    sent = 0
    while fd in world.kernel.by_fd:
        side.sent += bytes(1 << 14)
        side.deliver()
        sent += 1 << 14
        world.relays[0].turn(0.0)
    assert 0 <= sent - ends.LINGER_BYTES <= ends.HANDLER_READ_BYTES


def test_of_many_ending_links_the_oldest_gives_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of broken handshakes does not take all descriptors."""
    monkeypatch.setattr(link_module, "MAX_LEAVING", 2)
    loop, leaving = world.relays[0].loop, []
    for _ in range(4):
        ours, _ = world.kernel.connection(300)
        leaving.append(SocketEnd(loop, world.kernel.socket(ours), "peer"))
        leaving[-1].close()
        world.relays[0].links.leave(leaving[-1])
        world.relays[0].turn(0.0)
    assert [end.closed for end in leaving] == [True, True, False, False]
