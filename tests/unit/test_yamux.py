"""yamux against hashicorp's spec.md: headers byte for byte, every fault, windows, ends of streams, any split."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtunnel.wire.yamux import (
    INITIAL_WINDOW,
    MAX_PASSED_OVER,
    MAX_SKIPPED,
    MAX_WINDOW,
    Fault,
    GoAwayCode,
    Session,
    Stream,
    YamuxError,
)
from support.effort import times

# The spec's numbers, written down once more.
DATA, WINDOW_UPDATE, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
HALF = INITIAL_WINDOW // 2


class Frame(NamedTuple):
    """What stands in a header, and a Data frame's payload."""

    kind: int
    flags: int
    stream: int
    length: int
    payload: bytes = b""


def frame(kind: int, flags: int, stream: int, length: int = 0, *, version: int = 0) -> bytes:
    """A header, without the help of the code under test."""
    return bytes((version, kind)) + flags.to_bytes(2, "big") + stream.to_bytes(4, "big") + length.to_bytes(4, "big")


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    """A Data frame."""
    return frame(DATA, flags, stream, len(payload)) + payload


def frames(sent: bytes | bytearray) -> list[Frame]:
    """Take bytes apart; they must be whole, legal frames."""
    found = []
    position = 0
    while position < len(sent):
        header = bytes(sent[position : position + 12])
        assert len(header) == 12
        assert header[0] == 0
        assert header[1] <= GO_AWAY
        kind, flags, stream, length = (int.from_bytes(header[a:b], "big") for a, b in pairwise((1, 2, 4, 8, 12)))
        position += 12
        size = length if kind == DATA else 0
        found.append(Frame(kind, flags, stream, length, bytes(sent[position : position + size])))
        position += size
    assert position == len(sent)
    return found


Event = tuple[str, int, object]


class Probe(Stream):
    """A stream that writes down what happens to it, and knows what must not happen."""

    session: End

    def __init__(self, session: End) -> None:
        super().__init__(session)
        self.got = 0
        self.finished = False
        self.was_reset = False

    def on_data(self, data: memoryview) -> None:
        """See yamux.Stream."""
        assert len(data) > 0
        assert not self.finished
        assert not self.was_reset
        self.got += len(data)
        assert self.got <= INITIAL_WINDOW + self.session.granted.get(self.id, 0)
        self.session.note("data", self.id, bytes(data))
        self.session.react(self, "data", len(data))

    def on_fin(self) -> None:
        """See yamux.Stream."""
        assert not self.finished
        assert not self.was_reset
        self.finished = True
        self.session.note("fin", self.id, None)
        self.session.react(self, "fin", 0)

    def on_reset(self) -> None:
        """See yamux.Stream."""
        assert not self.was_reset
        assert self.gone
        self.was_reset = True
        self.session.note("reset", self.id, None)
        self.session.react(self, "reset", 0)

    def on_window(self) -> None:
        """See yamux.Stream."""
        assert not self.was_reset
        self.session.note("window", self.id, self.send_window)
        self.session.react(self, "window", 0)


Reaction = Callable[[Probe, str, int], None]


def consume(stream: Probe, what: str, size: int) -> None:
    """The usual reader: it takes everything at once."""
    if what == "data":
        stream.consumed(size)


def ignore(stream: Probe, what: str, size: int) -> None:
    """A reader that takes nothing."""


class End(Session):
    """A session that remembers: `events` (data of one stream joined), `sent`, and the window that it `granted`."""

    def __init__(self, *, client: bool = False, react: Reaction = consume) -> None:
        super().__init__(client=client)
        self.events: list[Event] = []
        self.sent = bytearray()
        self.granted: dict[int, int] = {}
        self.react: Reaction = react
        self.refuses = False
        self.every: list[Probe] = []

    def note(self, what: str, stream: int, detail: object) -> None:
        """Write an event down."""
        if what == "data" and self.events and self.events[-1][:2] == ("data", stream):
            before = self.events.pop()[2]
            assert isinstance(before, bytes)
            assert isinstance(detail, bytes)
            detail = before + detail
        self.events.append((what, stream, detail))

    def emit(self, frame: bytes) -> None:
        """See yamux.Session."""
        if self.over:
            return
        for one in frames(frame):
            if one.kind == WINDOW_UPDATE:
                self.granted[one.stream] = self.granted.get(one.stream, 0) + one.length
        self.sent += frame

    def accepts(self) -> Stream | None:
        """See yamux.Session."""
        if self.refuses:
            return None
        self.every.append(Probe(self))
        self.events.append(("open", 0, None))
        return self.every[-1]

    def on_pong(self, value: int) -> None:
        """See yamux.Session."""
        self.events.append(("pong", 0, value))

    def on_go_away(self, code: GoAwayCode) -> None:
        """See yamux.Session."""
        self.events.append(("go_away", 0, code))

    # What tests do with it.

    def open(self, first: bytes | None = b"") -> Probe:
        """A stream of ours; with None nothing is said on it yet."""
        stream = Probe(self)
        self.every.append(stream)
        self.attach(stream)
        if first is not None:
            self.say(stream, first)
        return stream

    def say(self, stream: Stream, payload: bytes, *, fin: bool = False) -> None:
        """Send a Data frame."""
        buffer = bytearray(12 + len(payload))
        stream.header_into(buffer, len(payload), fin=fin)
        buffer[12:] = payload
        self.sent += buffer

    def hear(self, *pieces: bytes) -> None:
        """Receive, each piece in a call of its own."""
        for piece in pieces:
            self.receive(memoryview(piece))

    def take(self) -> list[Frame]:
        """The frames since the last call."""
        sent, self.sent = self.sent, bytearray()
        return frames(sent)

    def happened(self) -> list[Event]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events


def accepted(end: End, stream: int = 1) -> Probe:
    """A stream that the peer has opened, its start already forgotten."""
    end.hear(frame(WINDOW_UPDATE, SYN, stream))
    end.happened()
    return end.every[-1]


# Layout, flags, opening.


def test_a_data_header_is_laid_out_as_in_the_spec() -> None:
    """Version, type, flags, stream id and length are big-endian at 0, 1, 2, 4 and 8."""
    end = End(client=True)
    end.open(b"hello")
    assert bytes(end.sent) == bytes.fromhex("00 00 0001 00000001 00000005") + b"hello"


def test_control_headers_are_laid_out_as_in_the_spec() -> None:
    """Ping, go-away, reset and window update are 12 bytes each, with the value in the length field."""
    end = End()
    stream = accepted(end)
    end.ping(0xDEADBEEF)
    end.go_away(GoAwayCode.INTERNAL_ERROR)
    stream.consumed(HALF)
    stream.reset()
    assert bytes(end.sent) == bytes.fromhex(
        "00 02 0001 00000000 DEADBEEF"
        "00 03 0000 00000000 00000002"
        "00 01 0002 00000001 00020000"
        "00 01 0008 00000001 00000000"
    )


def test_ids_are_odd_for_the_client_and_even_for_the_server() -> None:
    """Each end counts up by two from its own first id."""
    client, server = End(client=True), End(client=False)
    assert [client.open().id for _ in range(3)] == [1, 3, 5]
    assert [server.open().id for _ in range(3)] == [2, 4, 6]


def test_syn_rides_on_the_first_frame_only() -> None:
    """The second frame of a stream of ours has no flags."""
    end = End(client=True)
    stream = end.open(b"a")
    end.say(stream, b"b")
    assert end.take() == [Frame(DATA, SYN, 1, 1, b"a"), Frame(DATA, 0, 1, 1, b"b")]


def test_a_small_frame_carries_the_flags_too() -> None:
    """`frame` spends the window and the pending SYN as `header_into` does."""
    end = End(client=True)
    stream = end.open(None)
    assert frames(stream.frame(b"hi") + stream.frame(b"")) == [
        Frame(DATA, SYN, 1, 2, b"hi"),
        Frame(DATA, 0, 1, 0),
    ]
    assert stream.send_window == INITIAL_WINDOW - 2


def test_syn_rides_on_a_fin_when_that_comes_first() -> None:
    """A stream that is finished before it said anything is opened and half-closed by one frame."""
    end = End(client=True)
    end.open(None).finish()
    assert end.take() == [Frame(DATA, SYN | FIN, 1, 0)]


ANSWERS: dict[str, tuple[Callable[[End, Probe], None], Frame]] = {
    "data": (lambda end, stream: end.say(stream, b"x"), Frame(DATA, ACK, 1, 1, b"x")),
    "last data": (lambda end, stream: end.say(stream, b"x", fin=True), Frame(DATA, ACK | FIN, 1, 1, b"x")),
    "window": (lambda end, stream: stream.consumed(HALF), Frame(WINDOW_UPDATE, ACK, 1, HALF)),
    "fin": (lambda end, stream: stream.finish(), Frame(DATA, ACK | FIN, 1, 0)),
    "reset": (lambda end, stream: stream.reset(), Frame(WINDOW_UPDATE, ACK | RST, 1, 0)),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_ack_rides_on_the_first_frame_back(answer: str) -> None:
    """Whatever is said first on an accepted stream acknowledges it, and nothing does so twice."""
    end = End()
    stream = accepted(end)
    assert end.take() == []
    act, expected = ANSWERS[answer]
    act(end, stream)
    if not stream.gone:
        end.ping(0)
        stream.reset()
        assert end.take() == [expected, Frame(PING, SYN, 0, 0), Frame(WINDOW_UPDATE, RST, 1, 0)]
    else:
        assert end.take() == [expected]


@pytest.mark.parametrize("flags", [ACK, 0], ids=["ack", "none"])
def test_the_peers_ack_changes_nothing(flags: int) -> None:
    """Data may flow before, with and without an ACK: the spec lets a sender not wait for it."""
    end = End(client=True)
    end.open(b"a")
    end.hear(data(1, b"b", flags), data(1, b"c", flags), frame(WINDOW_UPDATE, flags, 1, 5))
    assert end.happened() == [("data", 1, b"bc"), ("window", 1, INITIAL_WINDOW - 1 + 5)]


def test_a_syn_may_carry_payload_a_window_or_a_fin() -> None:
    """The first frame of a stream is a whole frame: Data with payload, a larger window, or a half-close at once."""
    end = End(react=ignore)
    end.hear(
        data(1, b"hi", SYN), frame(WINDOW_UPDATE, SYN, 3, 1000), frame(DATA, SYN | FIN, 5), data(7, b"x", SYN | FIN)
    )
    assert end.happened() == [
        ("open", 0, None), ("data", 1, b"hi"),
        ("open", 0, None), ("window", 3, INITIAL_WINDOW + 1000),
        ("open", 0, None), ("fin", 5, None),
        ("open", 0, None), ("data", 7, b"x"), ("fin", 7, None),
    ]  # fmt: skip
    assert [stream.id for stream in end.every] == [1, 3, 5, 7]


def test_a_refused_syn_is_reset_and_its_payload_skipped() -> None:
    """accepts() -> None answers RST; what the peer had sent meanwhile is dropped without a hook."""
    end = End()
    end.refuses = True
    end.hear(data(1, b"x" * 100, SYN), data(1, b"y" * 100), frame(WINDOW_UPDATE, FIN, 1), frame(PING, SYN, 0, 7))
    assert end.take() == [Frame(WINDOW_UPDATE, RST, 1, 0), Frame(PING, ACK, 0, 7)]
    assert end.happened() == []
    assert end.streams == {}


def test_a_stream_that_is_reset_while_it_is_accepted_is_refused() -> None:
    """Resetting the new stream inside accepts() is a refusal; no frame names stream 0, nothing stays behind."""

    class Hasty(End):
        def accepts(self) -> Stream | None:
            stream = super().accepts()
            assert stream is not None
            stream.reset()
            return stream

    end = Hasty()
    end.hear(data(1, b"x", SYN))
    assert end.take() == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert end.happened() == [("open", 0, None)]
    assert end.streams == {}


def test_a_session_that_ends_while_it_accepts_leaves_no_stream() -> None:
    """A stream that accepts() returns after ending the session learns it at once; nothing is sent or kept."""

    class Dying(End):
        def accepts(self) -> Stream | None:
            self.end()
            return super().accepts()

    end = Dying()
    end.hear(data(1, b"x", SYN) + frame(PING, SYN, 0))
    assert end.happened() == [("open", 0, None), ("reset", 0, None)]
    assert end.streams == {}
    assert end.take() == []


def test_syns_may_overtake_each_other() -> None:
    """hashicorp's client gives out ids and sends SYNs from different goroutines: a lower id may come later, once."""
    end = End(react=ignore)
    for stream in (9, 3, 7, 1, 5, 11):
        end.hear(data(stream, b"x", SYN))
    assert sorted(end.streams) == [1, 3, 5, 7, 9, 11]
    with pytest.raises(YamuxError, match="stream_reused"):
        end.hear(data(3, b"x", SYN))


def test_passed_over_ids_are_remembered_up_to_a_limit() -> None:
    """However the peer jumps, so many ids below the highest stay open to it, and no more."""
    end = End()
    for jump in range(1, 50):
        end.hear(frame(WINDOW_UPDATE, SYN, jump * 10_001 | 1))
        assert end._passed_over < 2**MAX_PASSED_OVER
    last = end.every[-1].id
    end.hear(frame(WINDOW_UPDATE, SYN, last - 2 * MAX_PASSED_OVER))
    assert end.every[-1].id == last - 2 * MAX_PASSED_OVER
    with pytest.raises(YamuxError, match="stream_reused"):
        end.hear(frame(WINDOW_UPDATE, SYN, last - 2 * MAX_PASSED_OVER - 2))


def test_a_stream_that_was_reset_before_its_syn_was_never_there() -> None:
    """Nothing is sent for it, and the next stream's SYN passes its id over."""
    end, peer = End(client=True), End()
    end.open(None).reset()
    assert end.take() == []
    end.open(b"x")
    peer.hear(bytes(end.sent))
    assert sorted(peer.streams) == [3]
    end.hear(frame(WINDOW_UPDATE, RST, 1))
    assert end.happened() == []


def test_a_stream_without_an_id_says_nothing() -> None:
    """Resetting a stream that was never attached names no stream on the wire."""
    end = End(client=True)
    stream = Probe(end)
    stream.reset()
    assert stream.gone
    assert end.take() == []


@pytest.mark.parametrize("client", [True, False])
def test_ids_run_out_with_a_named_error(client: bool) -> None:
    """The last id is used, then `exhausted` is set and attach refuses; streams that live are not touched."""
    end = End(client=client)
    end._next_id = last = 2**32 - 1 if client else 2**32 - 2
    assert not end.exhausted
    stream = end.open(b"x")
    assert end.take() == [Frame(DATA, SYN, last, 1, b"x")]
    assert end.exhausted
    with pytest.raises(OverflowError, match="used up"):
        end.open()
    assert end.streams == {last: stream}


# Windows.


def test_both_windows_begin_at_256_kib() -> None:
    """Exactly 262144 bytes pass without an update in either direction."""
    end = End(react=ignore)
    end.hear(data(1, bytes(INITIAL_WINDOW), SYN))
    stream = end.every[0]
    assert stream.got == INITIAL_WINDOW == 262144
    assert stream.send_window == INITIAL_WINDOW
    end.say(stream, bytes(INITIAL_WINDOW))
    assert stream.send_window == 0


def test_headers_do_not_count_against_the_window() -> None:
    """Only payload is tracked, as the spec says."""
    end = End(react=ignore)
    stream = accepted(end)
    for _ in range(100):
        end.hear(data(1, b""), data(1, b"x"))
        end.say(stream, b"y")
    assert stream.send_window == INITIAL_WINDOW - 100
    end.hear(data(1, bytes(INITIAL_WINDOW - 100)))


def test_window_is_given_back_when_half_of_it_is_owed() -> None:
    """No update one byte before half of the window, one over everything owed at half, then it begins anew."""
    end = End(react=ignore)
    stream = accepted(end)
    end.hear(data(1, bytes(INITIAL_WINDOW)))
    stream.consumed(HALF - 1)
    assert end.take() == []
    stream.consumed(1)
    assert end.take() == [Frame(WINDOW_UPDATE, ACK, 1, HALF)]
    stream.consumed(HALF - 1)
    assert end.take() == []
    end.hear(data(1, bytes(HALF)))
    stream.consumed(HALF + 1)
    assert end.take() == [Frame(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW)]


def test_a_negative_consumption_is_worked_off_first() -> None:
    """A join counts its own words in advance: they give no window, the stream's bytes after them all do."""
    end = End(react=ignore)
    stream = accepted(end)
    end.hear(data(1, bytes(HALF)))
    stream.consumed(-500)
    stream.consumed(HALF)
    assert end.take() == []
    stream.consumed(500)
    assert end.take() == [Frame(WINDOW_UPDATE, ACK, 1, HALF)]


def test_no_window_is_given_for_a_stream_that_gets_no_more() -> None:
    """After the peer's FIN, and after a reset, an update would only be noise."""
    end = End(react=ignore)
    stream = accepted(end, 1)
    end.hear(data(1, bytes(INITIAL_WINDOW), FIN))
    stream.consumed(INITIAL_WINDOW)
    other = accepted(end, 3)
    end.hear(data(3, bytes(INITIAL_WINDOW)), frame(DATA, RST, 3))
    other.consumed(INITIAL_WINDOW)
    assert end.take() == []


def test_window_may_be_consumed_from_within_the_hook() -> None:
    """A reader that takes everything at once keeps a stream going for ever."""
    end = End(react=consume)
    accepted(end)
    for _ in range(20):
        end.hear(data(1, bytes(HALF)))
    assert sum(f.length for f in end.take() if f.kind == WINDOW_UPDATE) == 20 * HALF


def test_a_window_may_grow_to_32_bits() -> None:
    """Updates add up to 2**32 - 1 exactly."""
    end = End()
    stream = accepted(end)
    end.hear(frame(WINDOW_UPDATE, 0, 1, MAX_WINDOW - INITIAL_WINDOW))
    assert stream.send_window == MAX_WINDOW
    with pytest.raises(YamuxError, match="window_overflow"):
        end.hear(frame(WINDOW_UPDATE, 0, 1, 1))


def test_an_update_of_nothing_is_no_event() -> None:
    """A bare ACK comes as an update of 0: no hook."""
    end = End(client=True)
    end.open()
    end.hear(frame(WINDOW_UPDATE, ACK, 1, 0))
    assert end.happened() == []


# Ends of streams.


def test_half_close_leaves_the_other_direction_open() -> None:
    """After the peer's FIN this end still sends, and the stream is gone only with its own FIN."""
    end = End()
    stream = accepted(end)
    end.hear(data(1, b"bye", FIN))
    assert end.happened() == [("data", 1, b"bye"), ("fin", 1, None)]
    end.say(stream, b"still here")
    assert end.streams == {1: stream}
    stream.finish()
    assert stream.gone
    assert end.streams == {}
    assert end.take() == [Frame(DATA, ACK, 1, 10, b"still here"), Frame(DATA, FIN, 1, 0)]


def test_half_close_by_this_end_still_hears_the_peer() -> None:
    """After our FIN data and window updates go on coming, and the peer's FIN ends the stream."""
    end = End(client=True)
    stream = end.open(b"q")
    stream.finish()
    stream.finish()
    end.hear(data(1, b"answer"), frame(WINDOW_UPDATE, 0, 1, 1))
    assert end.streams == {1: stream}
    end.hear(frame(WINDOW_UPDATE, FIN, 1))
    assert end.happened() == [("data", 1, b"answer"), ("window", 1, INITIAL_WINDOW), ("fin", 1, None)]
    assert end.streams == {}
    assert end.take() == [Frame(DATA, SYN, 1, 1, b"q"), Frame(DATA, FIN, 1, 0)]


@pytest.mark.parametrize("size", [0, 5])
def test_fin_comes_after_the_last_byte(size: int) -> None:
    """A FIN on a Data frame is told when its payload is complete, however that trickles in."""
    end = End()
    accepted(end)
    whole = data(1, b"x" * size, FIN)
    for i in range(len(whole) - 1):
        end.hear(whole[i : i + 1])
        assert ("fin", 1, None) not in end.events
    end.hear(whole[-1:])
    assert end.happened()[-1] == ("fin", 1, None)


def test_a_second_fin_is_ignored() -> None:
    """FIN again, on either type of frame, changes nothing."""
    end = End()
    stream = accepted(end)
    end.hear(frame(DATA, FIN, 1), frame(DATA, FIN, 1), frame(WINDOW_UPDATE, FIN, 1, 3))
    assert end.happened() == [("fin", 1, None), ("window", 1, INITIAL_WINDOW + 3)]
    assert not stream.gone


def test_fin_and_window_on_one_frame() -> None:
    """An update with FIN is both, the window first."""
    end = End()
    accepted(end)
    end.hear(frame(WINDOW_UPDATE, FIN, 1, 9))
    assert end.happened() == [("window", 1, INITIAL_WINDOW + 9), ("fin", 1, None)]


def on(event: str, act: Callable[[Probe], None]) -> Reaction:
    """A reaction to one kind of event."""
    return lambda stream, what, size: act(stream) if what == event else None


@pytest.mark.parametrize(
    ("event", "frames"),
    [("data", [data(1, b"x", FIN)]), ("window", [frame(WINDOW_UPDATE, FIN, 1, 9)])],
)
def test_a_stream_that_is_reset_in_a_hook_hears_no_fin(event: str, frames: list[bytes]) -> None:
    """The FIN of the very frame that made us reset the stream is not told any more."""
    end = End(react=on(event, lambda stream: stream.reset()))
    accepted(end)
    end.hear(*frames)
    assert [what for what, _, _ in end.happened()] == [event]
    assert end.take() == [Frame(WINDOW_UPDATE, RST | ACK, 1, 0)]


def test_a_stream_that_is_finished_in_on_fin_is_gone_quietly() -> None:
    """Answering FIN with FIN inside the hook ends the stream once."""
    end = End(react=on("fin", lambda stream: stream.finish()))
    stream = accepted(end)
    end.hear(data(1, b"x", FIN), frame(WINDOW_UPDATE, 0, 1, 9))
    assert end.happened() == [("data", 1, b"x"), ("fin", 1, None)]
    assert stream.gone
    assert end.streams == {}
    assert end.take() == [Frame(DATA, ACK | FIN, 1, 0)]


STAGES: dict[str, Callable[[End], Probe]] = {
    "ours, quiet": lambda end: end.open(),
    "ours, finished": lambda end: _finished(end.open()),
    "the peer's, not acknowledged": lambda end: accepted(end, 2),
    "the peer's, half-closed": lambda end: _half_closed(end),
}


def _finished(stream: Probe) -> Probe:
    stream.finish()
    return stream


def _half_closed(end: End) -> Probe:
    stream = accepted(end, 2)
    end.hear(data(2, b"x", FIN))
    return stream


@pytest.mark.parametrize("kind", [DATA, WINDOW_UPDATE])
@pytest.mark.parametrize("stage", STAGES)
def test_the_peers_reset_ends_a_stream_at_every_stage(stage: str, kind: int) -> None:
    """RST on either type: one on_reset, no frame back, and nothing afterwards."""
    end = End(client=True)
    stream = STAGES[stage](end)
    end.take()
    end.happened()
    end.hear(frame(kind, RST, stream.id), frame(WINDOW_UPDATE, RST, stream.id), data(stream.id, b"late"))
    assert end.happened() == [("reset", stream.id, None)]
    stream.finish()
    stream.reset()
    stream.consumed(INITIAL_WINDOW)
    end.end()
    assert end.take() == []
    assert end.happened() == []
    assert end.streams == {}


@pytest.mark.parametrize("stage", STAGES)
def test_our_reset_ends_a_stream_at_every_stage(stage: str) -> None:
    """One RST goes out, no hook is called, and what the peer still sends is skipped."""
    end = End(client=True)
    stream = STAGES[stage](end)
    end.take()
    end.happened()
    stream.reset()
    stream.reset()
    end.hear(data(stream.id, b"late"), frame(WINDOW_UPDATE, FIN, stream.id, 1), data(stream.id, b"x", RST))
    sent = end.take()
    assert [(f.kind, f.flags & ~ACK, f.stream) for f in sent] == [(WINDOW_UPDATE, RST, stream.id)]
    assert end.happened() == []
    assert end.streams == {}


def test_a_reset_with_payload_drops_the_payload() -> None:
    """RST wins over the payload and the FIN of its own frame; the next frame is found behind them."""
    end = End()
    accepted(end)
    end.hear(data(1, b"gone", RST | FIN), frame(PING, ACK, 0, 5))
    assert end.happened() == [("reset", 1, None), ("pong", 0, 5)]


def test_a_reset_with_a_window_is_no_window() -> None:
    """RST wins over the update that it rides on."""
    end = End()
    accepted(end)
    end.hear(frame(WINDOW_UPDATE, RST | FIN, 1, 100))
    assert end.happened() == [("reset", 1, None)]


def test_a_syn_with_rst_opens_and_resets() -> None:
    """Odd, but legal: the stream is made and lost at once."""
    end = End()
    end.hear(frame(WINDOW_UPDATE, SYN | RST, 1))
    assert end.happened() == [("open", 0, None), ("reset", 1, None)]
    assert end.streams == {}


def test_a_stream_that_goes_while_its_payload_comes_is_skipped() -> None:
    """The rest of the frame, its FIN and the frames behind it are dropped; other streams are not touched."""
    end = End()
    stream = accepted(end, 1)
    accepted(end, 3)
    whole = data(1, b"abcdef", FIN)
    end.hear(whole[:15])
    stream.reset()
    end.hear(whole[15:] + data(1, b"more") + data(3, b"other"))
    assert end.happened() == [("data", 1, b"abc"), ("data", 3, b"other")]


def test_frames_of_streams_that_ended_in_order_are_skipped() -> None:
    """Both FINs have passed: a crossing window update or reset is no fault."""
    end = End(client=True)
    stream = end.open(b"x")
    stream.finish()
    end.hear(frame(DATA, FIN, 1))
    assert stream.gone
    end.happened()
    end.hear(frame(WINDOW_UPDATE, 0, 1, 100), frame(DATA, RST, 1), data(1, b"junk", FIN))
    assert end.happened() == []


def test_what_is_skipped_has_a_limit() -> None:
    """One frame for a stream that is gone may be as long as a grown window, and no longer."""
    end = End()
    accepted(end).reset()
    end.hear(frame(DATA, 0, 1, MAX_SKIPPED))
    end.hear(*(bytes(1024 * 1024) for _ in range(64)))
    end.hear(frame(PING, ACK, 0, 5))
    assert end.happened() == [("pong", 0, 5)]
    with pytest.raises(YamuxError, match="window_exceeded"):
        end.hear(frame(DATA, 0, 1, MAX_SKIPPED + 1))


# The session.


def test_a_ping_is_answered_with_its_value() -> None:
    """SYN asks, ACK answers, the opaque value comes back; answers are given in order."""
    end = End()
    end.hear(frame(PING, SYN, 0, 0xFFFFFFFF) + frame(PING, SYN, 0, 0))
    assert end.take() == [Frame(PING, ACK, 0, 0xFFFFFFFF), Frame(PING, ACK, 0, 0)]
    assert end.happened() == []


def test_a_pong_comes_back_to_who_asked() -> None:
    """`ping` sends SYN with the value, and `on_pong` gets it."""
    end = End()
    end.ping(77)
    assert end.take() == [Frame(PING, SYN, 0, 77)]
    end.hear(frame(PING, ACK, 0, 77))
    assert end.happened() == [("pong", 0, 77)]


def test_pings_pass_between_the_payload_of_streams() -> None:
    """A ping between two Data frames is answered although nobody reads the stream."""
    end = End(react=ignore)
    accepted(end)
    end.hear(data(1, bytes(INITIAL_WINDOW)) + frame(PING, SYN, 0, 1))
    assert end.take() == [Frame(PING, ACK, 0, 1)]


@pytest.mark.parametrize("code", GoAwayCode)
def test_go_away_is_told_and_streams_live_on(code: GoAwayCode) -> None:
    """Each code reaches the hook; what is open may finish."""
    end = End()
    accepted(end)
    end.hear(frame(GO_AWAY, 0, 0, code), data(1, b"x"))
    assert end.happened() == [("go_away", 0, code), ("data", 1, b"x")]
    assert end.going_away is code


def test_the_end_of_the_session_resets_every_stream_once() -> None:
    """on_reset for each stream that lives, none for one that is gone; `end` again does nothing, nothing is sent."""
    end = End(client=True)
    live, gone = end.open(), end.open()
    gone.reset()
    end.take()
    end.happened()
    end.end()
    end.end()
    live.reset()
    live.finish()
    assert end.happened() == [("reset", 1, None)]
    assert end.take() == []


def test_a_stream_that_another_resets_at_the_end_is_not_told() -> None:
    """`reset` calls no hook, also from within the on_reset of a neighbour while the session ends."""
    end = End(client=True)
    first, second = end.open(), end.open()
    end.react = on("reset", lambda stream: second.reset())
    end.end()
    assert end.happened() == [("reset", 1, None)]
    assert first.gone
    assert second.gone


@pytest.mark.parametrize("event", ["data", "fin", "window", "reset"])
def test_a_session_that_ends_in_a_hook_takes_nothing_more(event: str) -> None:
    """The rest of the same read, in the same frame or behind it, is dropped."""
    end = End(react=on(event, lambda stream: stream.session.end()))
    accepted(end, 1)
    accepted(end, 3)
    trigger = {
        "data": data(1, b"x", FIN), "fin": data(1, b"", FIN), "window": frame(WINDOW_UPDATE, FIN, 1, 1),
        "reset": frame(WINDOW_UPDATE, RST, 1),
    }[event]  # fmt: skip
    end.hear(trigger + data(3, b"y") + frame(PING, SYN, 0) + b"\xff" * 12, data(3, b"z"))
    events = end.happened()
    assert events[0][:2] == (event, 1)
    assert {what for what, _, _ in events[1:]} == {"reset"}
    assert end.take() == []


# Faults.

_SYN1 = frame(WINDOW_UPDATE, SYN, 1)
#: To a server that has opened stream 2: legal frames, and then the one at fault.
FAULTS: dict[str, tuple[Fault, bytes, bytes]] = {
    "version 1": (Fault.BAD_VERSION, b"", frame(DATA, 0, 2, version=1)),
    "type 4": (Fault.BAD_TYPE, b"", frame(4, 0, 0)),
    "type 255 of a stream": (Fault.BAD_TYPE, b"", frame(255, 0, 2)),
    "flag 0x10": (Fault.BAD_FLAGS, b"", frame(WINDOW_UPDATE, 0x10, 2)),
    "flag 0x8000": (Fault.BAD_FLAGS, b"", frame(PING, 0x8000 | SYN, 0)),
    "data for the session": (Fault.STREAM_ZERO, b"", frame(DATA, 0, 0)),
    "window for the session": (Fault.STREAM_ZERO, b"", frame(WINDOW_UPDATE, 0, 0, 1)),
    "SYN for the session": (Fault.STREAM_ZERO, b"", frame(DATA, SYN, 0)),
    "ping for a stream": (Fault.SESSION_STREAM, b"", frame(PING, SYN, 2)),
    "go-away for a stream": (Fault.SESSION_STREAM, _SYN1, frame(GO_AWAY, 0, 1)),
    "SYN for our id": (Fault.WRONG_PARITY, b"", frame(DATA, SYN, 4)),
    "SYN for our open stream": (Fault.WRONG_PARITY, b"", frame(DATA, SYN, 2)),
    "SYN twice": (Fault.STREAM_REUSED, _SYN1, _SYN1),
    "SYN after reset": (Fault.STREAM_REUSED, _SYN1 + frame(DATA, RST, 1), _SYN1),
    "SYN after a later one, too late": (Fault.STREAM_REUSED, frame(DATA, SYN, 2 * MAX_PASSED_OVER + 3), _SYN1),
    "data before SYN": (Fault.UNKNOWN_STREAM, _SYN1, frame(DATA, 0, 3)),
    "window before SYN": (Fault.UNKNOWN_STREAM, b"", frame(WINDOW_UPDATE, ACK, 1)),
    "RST before SYN": (Fault.UNKNOWN_STREAM, b"", frame(WINDOW_UPDATE, RST, 1)),
    "data for a stream that was passed over": (Fault.UNKNOWN_STREAM, frame(DATA, SYN, 3), frame(DATA, 0, 1)),
    "data for a stream that we never opened": (Fault.UNKNOWN_STREAM, b"", frame(DATA, 0, 4)),
    "too much with SYN": (Fault.WINDOW_EXCEEDED, b"", frame(DATA, SYN, 1, INITIAL_WINDOW + 1)),
    "a byte too much": (Fault.WINDOW_EXCEEDED, data(2, bytes(INITIAL_WINDOW)), frame(DATA, 0, 2, 1)),
    "4 GiB": (Fault.WINDOW_EXCEEDED, b"", frame(DATA, 0, 2, 2**32 - 1)),
    "too much with RST": (Fault.WINDOW_EXCEEDED, b"", frame(DATA, RST, 2, INITIAL_WINDOW + 1)),
    "too much for one that is gone": (Fault.WINDOW_EXCEEDED, frame(DATA, RST, 2), frame(DATA, 0, 2, MAX_SKIPPED + 1)),
    "window over 32 bits": (Fault.WINDOW_OVERFLOW, b"", frame(WINDOW_UPDATE, 0, 2, 2**32 - 1)),
    "data after FIN": (Fault.DATA_AFTER_FIN, frame(DATA, FIN, 2), frame(DATA, 0, 2, 1)),
    "data with FIN after FIN": (Fault.DATA_AFTER_FIN, data(2, b"x", FIN), frame(DATA, FIN, 2, 1)),
    "ping without a flag": (Fault.BAD_PING, b"", frame(PING, 0, 0)),
    "ping and pong": (Fault.BAD_PING, b"", frame(PING, SYN | ACK, 0)),
    "ping with FIN": (Fault.BAD_PING, b"", frame(PING, FIN, 0)),
    "go-away 3": (Fault.BAD_GO_AWAY, b"", frame(GO_AWAY, 0, 0, 3)),
}


@pytest.mark.parametrize("split", [1, 5, 1 << 20])
@pytest.mark.parametrize("name", FAULTS)
def test_every_illegal_frame_is_a_named_fault(name: str, split: int) -> None:
    """The fault comes with the last byte of the header, before any payload, and calls no hook of its own."""
    fault, before, wrong = FAULTS[name]
    end = End(react=ignore)
    end.open()
    end.hear(*(before[i : i + 65536] for i in range(0, len(before), 65536)))
    events = end.happened()
    streams = len(end.streams)
    with pytest.raises(YamuxError) as caught:
        end.hear(*(wrong[i : i + split] for i in range(0, len(wrong), split)))
    assert caught.value.fault is fault
    assert str(caught.value).startswith(f"{fault}: ")
    told = [what for what, _, _ in end.happened()]
    assert told in ([], ["open"]), (events, told)
    assert len(end.streams) == streams + len(told)


def test_no_fault_is_without_a_test() -> None:
    """The table above provokes each one."""
    assert {fault for fault, _, _ in FAULTS.values()} == set(Fault)


# Any split.


def conversation(seed: int) -> bytes:
    """A client's side of a long, legal conversation with a server that has opened streams 2, 4 and 6."""
    dice = random.Random(seed)
    said = bytearray()
    opened: list[int] = []  # may send
    next_id = 1
    ours = [2, 4, 6]
    for step in range(400):
        act = dice.random()
        if act < 0.15 or not opened:
            said += data(next_id, dice.randbytes(dice.choice((0, 1, 700))), SYN)
            opened.append(next_id)
            next_id += dice.choice((2, 2, 2, 6))
            continue
        stream = dice.choice(opened + ours)
        payload = dice.randbytes(dice.choice((0, 1, 11, 12, 13, 300, 5000)))
        if act < 0.75:
            said += data(stream, payload, ACK if step % 7 == 0 else 0)
        elif act < 0.80:
            said += frame(WINDOW_UPDATE, 0, stream, dice.randrange(1, 1 << 16))
        elif act < 0.84:
            said += frame(PING, dice.choice((SYN, ACK)), 0, dice.randrange(1 << 32))
        elif act < 0.85:
            said += frame(GO_AWAY, 0, 0, dice.randrange(3))
        else:
            flags = dice.choice((FIN, FIN, RST, FIN | RST))
            said += dice.choice((data(stream, payload, flags), frame(WINDOW_UPDATE, flags, stream, 1)))
            if flags & RST and dice.random() < 0.5:
                said += data(stream, b"late")  # it is gone: to be skipped
            (opened if stream in opened else ours).remove(stream)
    return bytes(said)


def heard(said: bytes, sizes: Iterator[int]) -> list[Event]:
    """The hook calls of a server that gets these bytes in pieces of these sizes."""
    end = End(react=consume)
    for _ in range(3):
        end.open()
    position = 0
    while position < len(said):
        size = next(sizes)
        # A fresh object each time: slices must not be used after the call.
        piece = bytearray(said[position : position + size])
        end.receive(memoryview(piece))
        piece[:] = b"\xee" * len(piece)
        position += size
    return end.events


def always(size: int) -> Iterator[int]:
    """Pieces of one size."""
    while True:
        yield size


@pytest.mark.parametrize("seed", range(4))
def test_any_split_of_a_conversation_gives_the_same_hook_calls(seed: int) -> None:
    """Byte by byte, in odd pieces, at random, or all at once: the hooks cannot tell."""
    said = conversation(seed)
    whole = heard(said, always(len(said)))
    assert len(whole) > 250
    assert {what for what, _, _ in whole} == {"open", "data", "fin", "reset", "window", "pong", "go_away"}
    dice = random.Random(seed)
    for sizes in (always(1), always(11), always(12), always(13), always(4096), iter(lambda: dice.randrange(1, 40), 0)):
        assert heard(said, sizes) == whole


# Anything at all.


def react_with(name: str) -> Reaction:
    """Readers of every temper."""

    def finish(stream: Probe, what: str, size: int) -> None:
        consume(stream, what, size)
        stream.finish()

    def reset(stream: Probe, what: str, size: int) -> None:
        stream.reset()

    def end(stream: Probe, what: str, size: int) -> None:
        stream.session.end()

    return {"ignore": ignore, "consume": consume, "finish": finish, "reset": reset, "end": end}[name]


def any_frame() -> st.SearchStrategy[bytes]:
    """Mostly legal headers for a few streams, with as much payload as they say, or not."""
    lengths = st.one_of(
        st.integers(0, 40), st.sampled_from((HALF, INITIAL_WINDOW, INITIAL_WINDOW + 1)), st.integers(0, 2**32 - 1)
    )
    header = st.builds(
        frame,
        st.sampled_from((DATA, DATA, DATA, WINDOW_UPDATE, WINDOW_UPDATE, PING, GO_AWAY, 4)),
        st.sampled_from((0, 0, 0, SYN, SYN, SYN, FIN, RST, ACK, SYN | FIN, FIN | RST, SYN | RST, SYN | ACK, 0x10)),
        st.sampled_from((0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 2**32 - 1, 2**32 - 2)),
        lengths,
        version=st.sampled_from((0,) * 30 + (1,)),
    )
    small = st.builds(
        data,
        st.sampled_from((1, 1, 2, 3, 5)),
        st.binary(max_size=40),
        st.sampled_from((0, 0, SYN, SYN, FIN, RST, SYN | FIN)),
    )
    full = st.builds(
        lambda stream, size: data(stream, bytes(size)), st.sampled_from((1, 2)), st.sampled_from((HALF, 70_000))
    )
    return st.one_of(small, small, small, full, header, st.binary(max_size=30))


@settings(max_examples=times(120), deadline=None)
@given(
    st.lists(any_frame(), max_size=25),
    st.lists(st.integers(1, 60_000), max_size=20),
    st.sampled_from(("ignore", "consume", "consume", "finish", "reset", "end")),
    st.booleans(),
    st.booleans(),
)
@example([data(1, b"x" * 5, SYN | FIN), frame(DATA, RST, 1)], [13], "finish", False, False)
def test_arbitrary_bytes_raise_only_a_fault(
    pieces: list[bytes], cuts: list[int], temper: str, client: bool, refuses: bool
) -> None:
    """The probes hold every rule of the hooks; what is sent back is always legal; the end reaches every stream once."""
    end = End(client=client, react=react_with(temper))
    end.refuses = refuses
    end.open()
    said = b"".join(pieces)
    edges = sorted({0, len(said), *(cut % (len(said) + 1) for cut in cuts)})
    try:
        for a, b in pairwise(edges):
            end.hear(said[a:b])
    except YamuxError as error:
        assert error.fault in Fault
    frames(end.sent)
    assert set(end.streams) == {stream.id for stream in end.every if not stream.gone}
    living = [stream for stream in end.every if not stream.gone]
    end.react = ignore
    end.end()
    assert all(stream.was_reset for stream in living)
    assert end.streams == {}


@settings(max_examples=times(80), deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_noise_raises_only_a_fault(noise: bytes, client: bool) -> None:
    """Bytes without any plan."""
    end = End(client=client)
    try:
        end.hear(noise)
    except YamuxError as error:
        assert error.fault in Fault


# Two sessions back to back.

BLOB = random.Random(0).randbytes(1 << 18)
_DOUBLE = BLOB * 3


def passage(stream: int, sender: bool, at: int, size: int) -> bytes:
    """The bytes that this side of this stream sends at a position."""
    start = (stream * 7919 + sender * 104_729 + at) % len(BLOB)
    return _DOUBLE[start : start + size]


class Talk(Stream):
    """One side of a stream of the state machine: checks what comes, byte for byte."""

    session: Side

    def __init__(self, session: Side) -> None:
        super().__init__(session)
        self.said = 0
        self.heard = 0
        self.unconsumed = 0
        self.finished = False
        self.was_reset = False
        self.reset_here = False

    def on_data(self, data: memoryview) -> None:
        """See yamux.Stream."""
        assert not (self.finished or self.was_reset or self.reset_here)
        assert data == passage(self.id, not self.session._client, self.heard, len(data))
        self.heard += len(data)
        self.unconsumed += len(data)
        assert self.unconsumed <= INITIAL_WINDOW

    def on_fin(self) -> None:
        """See yamux.Stream."""
        assert not (self.finished or self.was_reset or self.reset_here)
        self.finished = True

    def on_reset(self) -> None:
        """See yamux.Stream."""
        assert not (self.was_reset or self.reset_here)
        self.was_reset = True


class Side(Session):
    """One of the two sessions, and its pipe to the other."""

    def __init__(self, *, client: bool) -> None:
        super().__init__(client=client)
        self.pipe = bytearray()
        self.every: dict[int, Talk] = {}
        self.young: list[Talk] = []  # accepted, without an id yet
        self.refuses = False
        self.pings = 0
        self.pongs = 0

    def emit(self, frame: bytes) -> None:
        """See yamux.Session."""
        self.pipe += frame

    def accepts(self) -> Stream | None:
        """See yamux.Session."""
        if self.refuses:
            return None
        self.young.append(Talk(self))
        return self.young[-1]

    def on_pong(self, value: int) -> None:
        """See yamux.Session."""
        self.pongs += 1
        assert value == self.pongs

    def settle(self) -> None:
        """Give the accepted streams their places."""
        self.every.update((stream.id, stream) for stream in self.young)
        self.young.clear()

    def alive(self) -> list[Talk]:
        """The streams that are not gone."""
        return [stream for stream in self.every.values() if not stream.gone]


class BackToBack(RuleBasedStateMachine):
    """Two ends, lossless pipes with random splits, and everything that an end may do, in any order."""

    @initialize()
    def connect(self) -> None:
        """Two fresh sessions."""
        self.sides = (Side(client=True), Side(client=False))

    def pick(self, side: int, which: int, *, unfinished: bool = False) -> Iterator[Talk]:
        """A living stream of a side, if there is one."""
        alive = [stream for stream in self.sides[side].alive() if not (unfinished and stream.fin_sent)]
        if alive:
            yield alive[which % len(alive)]

    @rule(side=st.integers(0, 1))
    def open(self, side: int) -> None:
        """A stream that has not said anything yet: its SYN may be overtaken by later ones."""
        stream = Talk(self.sides[side])
        self.sides[side].attach(stream)
        self.sides[side].every[stream.id] = stream

    @rule(
        side=st.integers(0, 1), which=st.integers(0, 99), size=st.sampled_from((0, 1, 12, 1000, 70_000, INITIAL_WINDOW))
    )
    def say(self, side: int, which: int, size: int) -> None:
        """As much as the window allows."""
        for stream in self.pick(side, which, unfinished=True):
            self._say(stream, size)

    def _say(self, stream: Talk, size: int, *, fin: bool = False) -> None:
        size = min(size, stream.send_window)
        buffer = bytearray(12)
        stream.header_into(buffer, size, fin=fin)
        side = stream.session
        side.pipe += buffer + passage(stream.id, side._client, stream.said, size)
        stream.said += size

    @rule(side=st.integers(0, 1), which=st.integers(0, 99), size=st.sampled_from((0, 1, 3000)))
    def finish_with_data(self, side: int, which: int, size: int) -> None:
        """FIN on a Data frame."""
        for stream in self.pick(side, which, unfinished=True):
            self._say(stream, size, fin=True)

    @rule(side=st.integers(0, 1), which=st.integers(0, 99))
    def finish(self, side: int, which: int) -> None:
        """A half-close; twice does no harm."""
        for stream in self.pick(side, which):
            stream.finish()

    @rule(side=st.integers(0, 1), which=st.integers(0, 99))
    def reset(self, side: int, which: int) -> None:
        """An abort."""
        for stream in self.pick(side, which):
            stream.reset_here = True
            stream.reset()

    @rule(side=st.integers(0, 1), which=st.integers(0, 99), size=st.sampled_from((1, 5000, HALF, INITIAL_WINDOW)))
    def consume(self, side: int, which: int, size: int) -> None:
        """The reader takes some, also of a stream that is gone already."""
        streams = [stream for stream in self.sides[side].every.values() if stream.unconsumed]
        if streams:
            self._consume(streams[which % len(streams)], size)

    def _consume(self, stream: Talk, size: int) -> None:
        size = min(size, stream.unconsumed)
        stream.unconsumed -= size
        stream.consumed(size)

    @rule(side=st.integers(0, 1))
    def ping(self, side: int) -> None:
        """A sign of life is asked for."""
        self.sides[side].pings += 1
        self.sides[side].ping(self.sides[side].pings)

    @rule(side=st.integers(0, 1), refuses=st.booleans())
    def change_mind(self, side: int, refuses: bool) -> None:
        """New streams are refused, or taken again."""
        self.sides[side].refuses = refuses

    @precondition(lambda self: any(side.pipe for side in self.sides))
    @rule(side=st.integers(0, 1), size=st.one_of(st.integers(1, 30), st.sampled_from((1000, 100_000, 10_000_000))))
    def deliver(self, side: int, size: int) -> None:
        """Some of the bytes on their way arrive."""
        sender, receiver = self.sides[side], self.sides[1 - side]
        piece, sender.pipe = sender.pipe[:size], sender.pipe[size:]
        receiver.receive(memoryview(bytes(piece)))
        receiver.settle()

    @invariant()
    def windows_hold(self) -> None:
        """No window is negative, and no sender believes that it may send more than the receiver allows."""
        for here, there in (self.sides, self.sides[::-1]):
            assert set(here.streams) == {stream.id for stream in here.alive()}
            for stream in here.alive():
                assert 0 <= stream.send_window <= INITIAL_WINDOW
                assert 0 <= stream._allowance <= INITIAL_WINDOW
                other = there.every.get(stream.id)
                if other is not None and not other.gone:
                    assert stream.send_window <= other._allowance
                    assert other.heard <= stream.said

    def teardown(self) -> None:
        """Everybody reads on and finishes: then every stream is gone on both sides, and nothing was lost."""
        if not hasattr(self, "sides"):
            return
        for _ in range(3):
            for side in self.sides:
                for stream in list(side.every.values()):
                    self._consume(stream, INITIAL_WINDOW)
                    stream.finish()
            for _ in range(3):
                for index, side in enumerate(self.sides):
                    if side.pipe:
                        self.deliver(index, len(side.pipe))
        for here, there in (self.sides, self.sides[::-1]):
            assert here.streams == {}
            assert not here.pipe
            assert here.pings == here.pongs
            for stream in here.every.values():
                other = there.every.get(stream.id)
                # Who has both FINs is not told that the other aborts what is still on its way.
                torn = any(end.was_reset or end.reset_here for end in (stream, other) if end is not None)
                assert torn or (other is not None and other.heard == stream.said and other.finished)


BackToBack.TestCase.settings = settings(max_examples=times(25), stateful_step_count=60, deadline=None)
TestBackToBack = BackToBack.TestCase
