"""The relay on a kernel that does its worst: thousands of schedules, and the faults that they must find.

A schedule is a tape of bytes (tests/support/hostile.py). `make fuzz ARGS=hostile_kernel` lets a fuzzer write the tapes,
and `python -m fuzz.schedules COUNT` plays as many as there is time for.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.link import COALESCE_BYTES, Handshake, Link, Links
from rtunnel.relay.loop import HUP, IN, LOST, OUT
from rtunnel.relay.lost import RESET, Lost
from rtunnel.relay.streampair import StreamPair
from rtunnel.relay.transport import TlsTransport
from support.effort import times
from support.hostile import World, fails_soon, play, tape_of
from support.kernel import Choices, Kernel
from support.plumbing import kept

#: Seeded tapes of a block, and blocks, which two test processes share. Each fault below is found by two of the first
#: 1000 tapes at least. `make fuzz` plays more.
_TAPES: Final = 250
_BLOCKS: Final = times(4)


@pytest.mark.parametrize("first", range(0, _BLOCKS * _TAPES, _TAPES))
def test_no_schedule_loses_a_byte(first: int) -> None:
    """Every kind of pair, plain and TLS, one stream and several: see the oracle in tests/support/hostile.py."""
    for seed in range(first, first + _TAPES):
        play(tape_of(seed))


@settings(max_examples=times(150), derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=20, max_size=600))
def test_no_tape_loses_a_byte(tape: bytes) -> None:
    """The same with tapes of Hypothesis, which makes a failing one short."""
    play(tape)


def test_a_tape_is_one_run() -> None:
    """A failing tape can be played again: the same bytes move in the same steps."""
    for seed in range(20):
        assert trace(tape_of(seed)) == trace(tape_of(seed))


def trace(tape: bytes) -> list[object]:
    """What the kernel was asked for and gave, call by call."""
    calls: list[object] = []

    class Noting(Choices):
        def below(self, bound: int) -> int:
            calls.append((bound, super().below(bound)))
            return int(calls[-1][1])  # type: ignore[index]

    def noting(self: World, tape: bytes) -> None:
        original(self, tape)
        self.choices = self.kernel.choices = Noting(tape)

    original = World.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "__init__", noting)
        play(tape)
    return calls


# --- the hostile kernel has teeth: faults that were there, or could be --------------------------------------


def write_through_an_alias(self: Link, data: bytes | memoryview) -> None:
    """Link.write of version 0.1: a flush replaces `_out`, and the frame goes into the old one."""
    if self.over:
        return
    out = self._out
    if len(data) > COALESCE_BYTES and not self.blocked and self.up:
        if out:
            self._flush()
        if not self.blocked and not self.over:
            self._push(data)
            return
    out += data
    if not self._flushing and not self.blocked:
        self._flushing = True
        self.loop.soon(self._flush)


def lose_at_every_hup(self: SocketEnd, mask: int) -> None:
    """SocketEnd of version 0.1: the peer's FIN behind ours resets the connection, last words or not."""
    if mask & HUP:
        self.hup = True
    if mask & (IN | HUP | LOST):
        self.readable = True
    if mask & OUT and self._out:
        self._flush()
    if self._closing:
        self._close_later()
    elif self._reading:
        self._read()
    if mask & LOST:
        self._lose(RESET)


def forget_what_is_pending(self: TlsTransport, scratch: object, *sizes: int) -> memoryview:
    """A read throws away the answer to a key update that the kernel has not taken."""
    data = receive_tls(self, scratch, *sizes)  # type: ignore[arg-type]
    self.pending = b""
    return data


receive_tls = TlsTransport.receive


def fin_overtakes(self: StreamPair) -> None:
    """The FIN is passed on while bytes are held."""
    self._fin_back()


FAULTS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "a frame behind an alias": (Link, "write", write_through_an_alias),
    "last words reset": (SocketEnd, "_event", lose_at_every_hup),
    "pending bytes forgotten": (TlsTransport, "receive", forget_what_is_pending),
    "FIN before the last bytes": (StreamPair, "stream_fin", fin_overtakes),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_known_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fault put back, one of the first tapes fails."""
    where, method, faulty = FAULTS[name]
    monkeypatch.setattr(where, method, faulty)
    assert fails_soon(play, 1500)


# --- the simulated kernel is like the real one ---------------------------------------------------------------


def real_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = kept(socket.create_connection(server.getsockname()))
        b = kept(server.accept()[0])
    for sock in (a, b):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return a, b


class RealSide:
    """A real socket with the words of `kernel.Side`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)

    def send(self, data: bytes) -> int:
        return self.sock.send(data)

    def send_urgent(self, byte: bytes) -> None:
        self.sock.send(byte, socket.MSG_OOB)

    def shut(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


#: Scripts of two ends: (end, call, argument). What `b` and `a` get back must be alike on both kernels.
SCRIPTS: dict[str, list[tuple[str, str, object]]] = {
    "bytes, then FIN": [
        ("a", "send", b"xyz"), ("a", "shut", None), ("b", "recv", 2), ("b", "recv", 9), ("b", "recv", 9),
        ("b", "send", b"still"), ("a", "recv", 9), ("a", "send", b"no"),
    ],
    "bytes, then RST": [
        ("a", "send", b"xyz"), ("a", "reset", None), ("b", "recv", 2), ("b", "recv", 9), ("b", "recv", 9),
        ("b", "recv", 9), ("b", "send", b"x"),
    ],
    "FIN, then RST": [
        ("a", "send", b"xyz"), ("a", "shut", None), ("b", "recv", 3), ("b", "recv", 3), ("a", "reset", None),
        ("b", "send", b"x"), ("b", "recv", 3),
    ],
    "a write hears of the RST": [("a", "reset", None), ("b", "send", b"x"), ("b", "recv", 9), ("b", "send", b"x")],
    "close with unread bytes is RST": [
        ("b", "send", b"unread"), ("a", "close", None), ("b", "recv", 9), ("b", "recv", 9),
    ],
    "bytes to a closed socket bring RST": [
        ("a", "close", None), ("b", "recv", 9), ("b", "send", b"x"), ("b", "recv", 9), ("b", "send", b"x"),
    ],
    "nothing yet": [("b", "recv", 9), ("a", "send", b"x"), ("b", "recv", 9), ("b", "recv", 9)],
    "a read stops in front of urgent data": [
        ("a", "send", b"AB"), ("a", "send_urgent", b"U"), ("a", "send", b"CD"), ("b", "recv", 9), ("b", "recv", 9),
    ],
    "shut after RST": [("a", "reset", None), ("b", "shut", None), ("b", "recv", 9)],
}  # fmt: skip


def perform(script: list[tuple[str, str, object]], ends: dict[str, object], settle: Callable[[], None]) -> list[object]:
    """What each call gave: bytes, a count, or an errno's name."""
    heard: list[object] = []
    for end, call, argument in script:
        method = getattr(ends[end], call)
        try:
            heard.append(method() if argument is None else method(argument))
        except OSError as error:
            heard.append(errno.errorcode[error.errno or 0])
        settle()
    return heard


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_simulated_kernel_is_like_the_real_one(name: str) -> None:
    """The oracle is worth as much as the model: call by call, both give the same."""
    kernel = Kernel(Choices(b""))
    a, b = kernel.connection(1 << 16)

    def deliver() -> None:
        while any(side.deliverable for side in kernel.sides):
            for side in kernel.sides:
                side.deliver()

    real_a, real_b = real_pair()
    real = perform(SCRIPTS[name], {"a": RealSide(real_a), "b": RealSide(real_b)}, lambda: None)
    assert perform(SCRIPTS[name], {"a": a, "b": b}, deliver) == real


# --- the minimal input of the fault that began this ----------------------------------------------------------


def test_a_large_frame_behind_a_flush_that_blocks_is_sent() -> None:
    """50, 5000 and 50 bytes on a link whose socket is full: all of them come out, in order."""
    from rtunnel.relay.loop import Loop
    from rtunnel.relay.transport import Scratch

    class Owner:
        def link_up(self, link: Link) -> None: ...
        def link_stream(self, stream: object) -> None: ...
        def link_down(self, link: Link, lost: Lost) -> None: ...

    ours, theirs = map(kept, socket.socketpair())
    ours.setblocking(False)
    loop = Loop(lambda crash: None)
    made = Link(Links(loop, Scratch()), ours, Owner(), Handshake(True, 10.0), "x")
    made.begin()

    def turn() -> None:
        loop.turn(loop._epoll.poll(0, 16), loop.now)

    while not made.up:
        turn()
    turn()  # its first ping
    filled = 0
    while True:
        try:
            filled += ours.send(bytes(4096))
        except BlockingIOError:
            break
    frames = [bytes([n]) * size for n, size in ((1, 50), (2, 5000), (3, 50))]
    for frame in frames:
        made.write(frame)
    expected = b"".join(frames)
    received = bytearray()
    theirs.setblocking(False)
    for _ in range(1000):
        try:
            received += theirs.recv(1 << 16)
        except BlockingIOError:
            pass
        turn()
    assert bytes(received[-len(expected) :]) == expected
    loop._shut()
