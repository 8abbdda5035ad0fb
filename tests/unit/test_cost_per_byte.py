"""What a peer's bytes cost: the dearest input that Hypothesis finds costs little more for a byte than an ordinary one.

Work is counted in bytecodes, not in seconds. Everything here is parsed before the peer has proved who it is.
"""

from __future__ import annotations

import ipaddress
from functools import cache
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings, target
from hypothesis import strategies as st

from rtunnel.wire import messages, yamux
from rtunnel.wire.messages import Dial, DialAnswer, DialBody, Dialling, Enrol, Hello, MessageError, Publish, encode
from rtunnel_broker.greeting import hello_fault
from support.effort import times
from support.messages import decoder_of
from support.work import bytecodes

#: A byte of the dearest input may cost so much more than a byte of an ordinary one.
MOST: Final = 20

#: Counting makes everything slow, which is no fault.
TRACED = settings(max_examples=times(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def cost(call: Any, size: int) -> float:
    """Bytecodes for each byte; `call` may find the input wrong."""

    def run() -> None:
        try:
            call()
        except (yamux.YamuxError, MessageError):
            pass

    return bytecodes(run) / size


# yamux.


class End(yamux.Session):
    """Takes every stream and answers nothing."""

    def emit(self, frame: bytes) -> None:
        """See yamux.Session."""

    def accepts(self) -> yamux.Stream:
        """See yamux.Session."""
        return yamux.Stream(self)


def header(kind: int, flags: int, stream: int, length: int) -> bytes:
    """A frame's header."""
    return yamux.HEADER.pack(0, kind, flags, stream, length)


@cache
def fed(data: bytes, piece: int) -> float:
    """What it costs a fresh session to take these bytes in pieces of this size."""
    end, view = End(client=False), memoryview(data)

    def feed() -> None:
        for at in range(0, len(view), piece):
            end.receive(view[at : at + piece])

    return cost(feed, len(data))


#: A session at a terminal: a stream is opened with its Dial, keys go up, windows and a ping come by.
_KEY: Final = header(yamux.DATA, 0, 1, 36) + bytes(36)
ORDINARY: Final = (
    header(yamux.DATA, yamux.SYN, 1, 200) + bytes(200) + 20 * _KEY
    + header(yamux.WINDOW_UPDATE, 0, 1, 1000) + header(yamux.PING, yamux.ACK, 0, 1)
    + header(yamux.DATA, yamux.FIN, 1, 0)
)  # fmt: skip


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Some hundred frames, mostly legal ones: a few patterns, each repeated, with ids that jump."""
    data = bytearray()
    stream = draw(st.sampled_from((1, 3, 1001)))
    while len(data) < 2400:
        kind = draw(st.sampled_from((yamux.DATA, yamux.WINDOW_UPDATE, yamux.PING)))
        flags = draw(st.sampled_from((yamux.SYN, 0, yamux.ACK, yamux.FIN, yamux.RST, yamux.SYN | yamux.RST)))
        step = draw(st.sampled_from((0, 2, 4, 6, 100, 512, 514, 100_000)))
        length = draw(st.sampled_from((0, 1, 2, 50)))
        for _ in range(draw(st.sampled_from((1, 10, 100)))):
            named = 0 if kind == yamux.PING else stream
            data += header(kind, flags, named, length) + bytes(length if kind == yamux.DATA else 0)
            stream += step
    return bytes(data)


@TRACED
@given(frames(), st.sampled_from((1, 2, 7, 12, 13, 1 << 16)))
@example(b"".join(header(yamux.DATA, yamux.SYN, n, 0) for n in range(1, 2000, 6)), 1 << 16)  # each SYN skips two ids
@example(b"".join(header(yamux.DATA, yamux.SYN, n, 0) for n in range(1, 2**31, 2**23 + 2)), 1 << 16)
@example(b"".join(header(yamux.DATA, yamux.SYN, n, 0) for n in (*range(1, 1000, 4), *range(3, 1000, 4))), 12)
def test_no_frames_cost_much_more_than_ordinary_ones(data: bytes, piece: int) -> None:
    """Any frames, in any split: SYNs that skip ids, resets, pings, empty frames."""
    found = fed(data, piece) / fed(ORDINARY, piece)
    target(found)
    assert found <= MOST


@pytest.mark.parametrize("step", [2, 6, 2 * yamux.MAX_PASSED_OVER, 100_000])
def test_a_frame_costs_the_same_however_many_came_before(step: int) -> None:
    """Also with as many ids passed over as are remembered."""
    end = End(client=False)

    def take(number: int) -> int:
        return bytecodes(lambda: end.receive(memoryview(header(yamux.DATA, yamux.SYN, 1 + number * step, 0))))

    early = [take(number) for number in range(1, 4)]
    for number in range(4, 600):
        end.receive(memoryview(header(yamux.DATA, yamux.SYN, 1 + number * step, 0)))
    assert max(take(number) for number in range(600, 603)) <= max(early)


# Messages.


def told(message: Hello | Enrol) -> float:
    """What a broker pays for each byte of a first message."""
    frame = encode(message)
    decoder = messages.Decoder[Hello | Enrol](Hello, Enrol, limit=messages.MAX_HELLO)

    def take() -> None:
        decoder.feed(frame)
        taken = decoder.next()
        if isinstance(taken, Hello):
            hello_fault(taken)

    return cost(take, len(frame))


def hello(**changes: Any) -> Hello:
    """An ordinary one, but for the changes."""
    fields: dict[str, Any] = {
        "version": 1, "agent_id": "host-7", "instance": bytes(16), "namespace": "default", "addresses": ["10.1.0.7"],
        "nonce": bytes(16), "token_id": "example", "exposes": ["22", "9100", "8000-8100"], "software": "rtunnel 1.0",
    }  # fmt: skip
    return Hello(**fields | changes)


addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: str(ipaddress.IPv4Address(n))),
    st.integers(0, 2**128 - 1).map(lambda n: str(ipaddress.IPv6Address(n))),
    st.text("0123456789abcdef:.", min_size=2, max_size=45),
)
exposed = st.one_of(
    st.integers(1, 65535).map(str),
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: f"{min(pair)}-{max(pair)}"),
    st.text("0123456789-:", min_size=1, max_size=128),
)


@TRACED
@given(
    st.builds(
        hello,
        addresses=st.lists(addresses, min_size=1, max_size=64),
        exposes=st.lists(exposed, max_size=256),
        agent_id=st.text(min_size=1, max_size=128),
        publish=st.lists(
            st.builds(Publish, ip=addresses, target_port=st.integers(1, 65535)),
            max_size=64,
        ),
    )
)
@example(hello(exposes=[str(n) for n in range(1, 512, 2)]))
@example(hello(exposes=["1-65535"] * 256))
@example(hello(addresses=[str(ipaddress.IPv6Address(n)) for n in range(64)]))
def test_no_hello_costs_much_more_than_an_ordinary_one(greeting: Hello) -> None:
    """Any words, addresses and ports in it, good or bad."""
    found = told(greeting) / told(hello())
    target(found)
    assert found <= MOST


DIAL: Final = encode(
    Dial(
        body=messages.encode_body(
            DialBody(
                version=1, namespace="default", ip="10.1.0.7", port=9100, node="b1", epoch=1, nonce=bytes(16), time=1
            )
        ),
        mac=bytes(32),
        key="gateway-1",
    )
)


def decoded(data: bytes, expected: Any, piece: int) -> float:
    """What a decoder pays for each byte, in pieces of this size."""
    decoder = decoder_of(expected)

    def take() -> None:
        for at in range(0, len(data), piece):
            decoder.feed(data[at : at + piece])
            while decoder.next() is not None:
                pass

    return cost(take, len(data))


@TRACED
@given(
    st.one_of(st.binary(min_size=64, max_size=4096), st.just(DIAL), st.just(encode(Dialling()) * 300)),
    st.sampled_from((1, 3, 100, 1 << 16)),
)
@example(b"\0\0\0\1\xc0" * 500, 1 << 16)
@example(encode(Dialling()) * 300, 1 << 16)
def test_no_dial_and_no_answer_costs_much_more_than_an_ordinary_one(data: bytes, piece: int) -> None:
    """Any bytes, in any split, at a guarded port and at an open one."""
    ordinary = decoded(DIAL, Dial, piece)
    found = max(decoded(data, expected, piece) for expected in (Dial, DialAnswer)) / ordinary
    target(found)
    assert found <= MOST
