"""A link: one TCP connection between agent and broker, plain or TLS, that carries yamux.

Theory of operation
===================

**Life.** The handshake (also of a plain link, which has nothing to do in it) waits in the loop's
slow queue for its turns. Then the link is `up`: the owner hears `link_up`, a ping measures the
round trip, and frames flow. While `allowance` is set, the peer has not proved who it is: few frames
are taken in a turn, and few bytes in all. `over` is the end, and `_down` the only way there. Then
every stream is lost with LINK_LOST, whatever ended the link: a pair on it resets its socket, and a
handler hears `lost`. "A stream was reset" with the ending `link_lost` therefore has its cause in
this table:

    The kernel or the peer does         The link does                 The peer and the owner learn
    ----------------------------------  ----------------------------  ------------------------------
    FIN; under TLS also close_notify    ends (`_down`)                owner: CLOSED, "closed by
                                                                      peer"
    RST, or a connection that the       ends when a read or a write   owner: RESET
    kernel gives up (TCP_USER_TIMEOUT,  fails
    DEAD_AFTER)
    GoAway                              notes it in `going_away`,     the broker's open ports dial
                                        and goes on                   no new streams on it
    an illegal frame, or more than      `break_off`: ends behind a    peer: GoAway 1; owner:
    `allowance` before the proof        GoAway                        PROTOCOL_ERROR
    no byte for DEAD_AFTER, pings       `abort`                       peer: RST; owner: SILENT
    included
    takes nothing, with MAX_BACKLOG of  `abort`                       peer: RST; owner: SILENT
    frames kept
    TLS fails                           `abort`; behind the alert if  peer: the alert, or RST;
                                        this side rejects the         owner: the kind of `lost_by`
                                        certificate
    the handshake takes too long        `abort`                       peer: RST; owner: DEADLINE
    the owner calls `close`             ends behind what was written  peer: GoAway 0; owner: its own
                                        and a GoAway                  reason

**Who owns the socket.** The link, until `_down`. Then the loop, which closes it at the end of the
turn; or, when the peer shall hear why, a `SocketEnd` without a handler, which sends the last words,
then FIN, and drops what comes until the peer's FIN (`_linger`, `ends`). A link that does not linger
is closed at once: when its socket has unread bytes, the kernel sends RST.

**Bytes on their way out.** A pair reads its socket into `scratch.upload`, behind room for the
header. Frames up to COALESCE_BYTES are collected in `_out` until the end of the turn, to share a
system call and a TLS record; a larger one is sent from that buffer at once, behind what `_out` has.
Bytes that the kernel does not take are in `transport.pending` (encrypted), and the link is
`blocked`:
`_out` collects control frames, pairs leave their bytes in their sockets and wait in `waiting`. The
OUT event sends what is pending, then `_out`, then lets the pairs send in the order in which they
came, until the link is blocked again. TCP_NOTSENT_LOWAT keeps the kernel's queue short, because a
small frame waits behind all of it.

**Bytes on their way in.** One read fills `scratch.plain` (under TLS by way of `scratch.cipher`),
and the payload of each frame is handed on as a slice of it, without a copy. Frames beyond
FRAMES_A_TURN are kept in `_unread` and come first in the next turn. A link that has not drained its
socket queues itself (`_read_more`); one that has relies on the next edge.

**What calls back.** `write`, `emit` and `open` never do. A failed write only sets `blocked`, and
the link ends in a later step of the loop. `close`, `break_off` and `abort` call, before they
return: each stream's pair (which calls its owner's `ended`) or handler (`lost`), each probe's
`done(False)`, and last the owner's `link_down`. A read calls `link_stream`, and the pairs and
handlers of streams; they may write, open, finish and reset streams, join them, lift `allowance`,
and end the link: `receive` looks at `over` before each frame. They must not read the link
(`receive` is not reentrant), and must not use `scratch.plain`, in which the frames are. `_unblock`
calls `link_ready` of the waiting pairs, which may block the link again or end it.

Tests: `tests/unit/test_hostile_kernel.py` (all of the above with a simulated kernel;
test_a_large_frame_behind_a_flush_that_blocks_is_sent), `test_last_words.py` (GoAways and refusals
arrive), `test_relay.py` (test_a_dead_link_resets_its_streams,
test_a_slow_reader_stops_only_its_own_stream, TestUnproven).
"""

from __future__ import annotations

import random
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from rtunnel.compat import override
from rtunnel.histogram import Histogram
from rtunnel.relay.ends import EndHandler, SocketEnd, reset_on_close
from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Timer
from rtunnel.relay.lost import Lost, LostKind, closed, lost_by
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.transport import READ_BYTES, UNPROVEN_READ_BYTES, Scratch, TlsTransport, Transport
from rtunnel.relay.windows import LEAST_RTT, WindowedSession
from rtunnel.wire import yamux

#: Bytes of a frame that waits for the end of the turn, to share a system call (and a TLS record).
COALESCE_BYTES: Final = 4 * 1024
#: Bytes of frames that are kept for a peer that takes nothing; with more the link is reset. Only
#: control frames come this far, because pairs stop when the link is blocked.
MAX_BACKLOG: Final = 8 * 1024 * 1024
#: Reads of one link per loop turn, so that one link cannot starve the others.
READS_A_TURN: Final = 1
#: Frames of one link per loop turn. Tiny frames cost the most: 1 MiB of them would stop the loop
#: for a second.
FRAMES_A_TURN: Final = 512
#: The same for a peer that has not proved who it is: Hello and Proof, with a ping beside each, are
#: some ten frames.
UNPROVEN_FRAMES_A_TURN: Final = 32

#: A link that has used stream ids up to this one is closed, and the agent dials a new one. yamux
#: has 32 bits, two ids apart: five days at 5000 streams a second. The rest is a reserve until the
#: next look.
LAST_STREAM_ID: Final = 2**32 - 2**20

#: Unsent bytes with which an ending link still lingers. A peer that has left more than these unread
#: reads nothing, and would not learn the reason.
LAST_WORDS_BYTES: Final = 1024 * 1024
#: Ended links of one relay that still send their last words. They count neither as strangers nor as
#: sessions any more, so this bound keeps a flood of broken handshakes from taking all descriptors.
MAX_LEAVING: Final = 256

#: Seconds without a byte after which a peer is given up.
DEAD_AFTER: Final = 15.0
#: Seconds between two looks for silence, less up to 10 %, and the silence after which a look pings.
#: The broker's are longer, so that it pings only when the agent seems not to.
LOOK_CLIENT: Final = 5.0
LOOK_SERVER: Final = 8.0
PING_AFTER_CLIENT: Final = 3.5
PING_AFTER_SERVER: Final = 5.6
#: Pings of a link's first seconds: up to so many, one behind the other, until a round trip is
#: shorter than LEAST_RTT. The first one or two meet processes that slept, and take 0.5 to 2 ms on
#: loopback: windows would treat the near link as a far one for all its life.
FIRST_PINGS: Final = 5
#: Seconds. A round trip that takes longer found a busy process (a storm of handshakes) or a far
#: one: the next ping waits for the next look.
BUSY_RTT: Final = 0.02
#: Seconds. A ping that had no answer for so long, when the next one is sent or the link ends,
#: counts as lost. TCP loses no bytes: its answer may come later.
PING_PATIENCE: Final = 2.0
#: Unsent bytes that the kernel may queue (TCP_NOTSENT_LOWAT): a small frame waits behind them.
NOTSENT_LOWAT: Final = 128 * 1024

_LATE: Final = Lost(LostKind.DEADLINE, "handshake deadline")
_TAKES_NOTHING: Final = Lost(LostKind.SILENT, "the peer takes no bytes")


class LinkOwner(Protocol):
    """The role's side of a link. In the relay's thread."""

    def link_up(self, link: Link) -> None:
        """Hear that the handshake is done, and frames can flow."""

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """Return the handler for a stream that the peer opens, or None to refuse it (RST).

        The stream has no id yet: it must not be written to before this returns.
        """

    def link_down(self, link: Link, lost: Lost) -> None:
        """Hear that the link has ended, after each of its streams was lost.

        Called once, also before `link_up`.
        """


class BytesSender(Protocol):
    """A pair that waits for a blocked link."""

    def link_ready(self) -> None:
        """Send what there is: the link takes bytes again."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """The side that this end of a link has, its TLS, and the time until the link is up."""

    client: bool  # this end is the agent
    timeout: float  # seconds
    tls: ssl.SSLContext | None = None  # None: plain
    server_name: str = ""  # in the broker's certificate; for the client

    def transport(self, sock: socket.socket) -> Transport | TlsTransport:
        """Return the transport of a link over this socket."""
        if self.tls is None:
            return Transport(sock)
        return TlsTransport(sock, self.tls, self.server_name if self.client else None)


class Link(WindowedSession):
    """One link, made by `Relay.link`. In the relay's thread.

    `peer` is the other end's IP, `rtt` the seconds of the last ping (0: none yet), `cut` the number
    of pairs that the link's end has reset.
    """

    __slots__ = (
        "_flushing", "_handshake_queued", "_heard", "_live", "_out", "_owner", "_ping_sent", "_pings", "_probes",
        "_queued", "_spoken", "_timer", "_transport", "_unread", "allowance", "blocked", "cut", "is_client", "peer",
        "rtt", "scratch", "sock", "up", "waiting",
    )  # fmt: skip

    def __init__(self, live: Links, sock: socket.socket, owner: LinkOwner, handshake: Handshake, peer: str) -> None:
        """Make a link of a connected socket; `begin` starts it."""
        loop, client = live.loop, handshake.client
        super().__init__(loop, live.scratch.memory, client=client)
        self.scratch = live.scratch
        self.sock = sock
        self.peer = peer
        self.is_client = client
        self._owner = owner
        self._transport = handshake.transport(sock)
        self._live = live
        # The handshake.
        self.up = False
        self._handshake_queued = False
        self._spoken = False  # the peer has sent a byte before its proof
        self._timer: Timer | None = loop.after(handshake.timeout, lambda: self.abort(_LATE))
        # Out.
        self.blocked = False
        self.waiting: deque[BytesSender] = deque()
        self._out = bytearray()
        self._flushing = False
        # In.
        self._unread = b""  # frames beyond FRAMES_A_TURN
        self._queued = False  # `_read_more` is in the run queue
        # Bytes that are still taken from a peer that has not proved who it is; None: any. The owner
        # sets and lifts it.
        self.allowance: int | None = None
        # Signs of life.
        self._heard = loop.now
        self._pings = 0
        self._ping_sent = 0.0
        self._probes: dict[int, Callable[[bool], None]] = {}  # `done` by the ping's value
        self.rtt = 0.0
        self.cut = 0

    def begin(self, *, watched: bool = False) -> None:
        """Begin the handshake. `watched`: the loop watches the socket already."""
        self._live.add(self)
        _tune(self.sock)
        fd = self.sock.fileno()
        if watched:
            self.loop.handlers[fd] = self._event
            self.loop.add_out(fd)
            self._transport.hup = True  # the owner before may have got the FIN's edge
        else:
            self.loop.add(fd, self._event)
        self._queue_handshake()

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate (DER); None when it showed none, and after the link's end."""
        return self._transport.peer_certificate()

    @property
    def has_spoken(self) -> bool:
        """Whether the peer has sent a byte before its proof; also True while its handshake waits
        for its turn.

        Valid after the link's end, too.
        """
        return self._spoken or self._handshake_queued or self._transport.handshake_bytes > 0

    @property
    def silence(self) -> float:
        """Seconds since the peer's last byte."""
        return self.loop.now - self._heard

    # Streams.

    def open(self, handler: EndHandler, first: bytes, deadline: float | None = None) -> StreamEnd:
        """Open a stream that begins with the bytes `first` (they must fit its window), and return
        it.

        `deadline`: as of `End.set_handler`. Raises OverflowError when all ids are used up.
        """
        stream = StreamEnd(self)
        self.attach(stream)
        stream.set_handler(handler, deadline)
        stream.write(first)
        return stream

    @override
    def accepts(self) -> yamux.Stream | None:
        stream = StreamEnd(self)
        handler = self._owner.link_stream(stream)
        if handler is None:
            return None
        if stream._handler is None:
            stream.set_handler(handler)
        return stream

    # Out.

    @override
    def emit(self, frame: bytes) -> None:
        self.write(frame)

    def write(self, data: bytes | memoryview) -> None:
        """Send whole frames, in order; drop them when the link is over. Never fails or calls back.

        Data of pairs is written only while the link is not `blocked`; what is written meanwhile is
        kept.
        """
        if self.over:
            return
        if len(data) > COALESCE_BYTES and not self.blocked and self.up:
            if self._out:
                # It replaces `_out` and may block the link: keep no alias of either across it.
                self._flush()
            if not self.blocked:
                self._push(data)
                return
        self._out += data
        if not self._flushing and not self.blocked:
            self._flushing = True
            self.loop.soon(self._flush)
        elif len(self._out) > MAX_BACKLOG:
            self.loop.soon(lambda: self.abort(_TAKES_NOTHING))

    def _flush(self) -> None:
        self._flushing = False
        if self.over or self.blocked or not self.up or not self._out:
            return
        out, self._out = self._out, bytearray()
        self._push(out)

    def _push(self, data: bytes | bytearray | memoryview) -> None:
        transport = self._transport
        try:
            transport.send(data)
        except OSError as error:
            self._fail_soon(error)
            return
        if transport.pending:
            self.blocked = True

    def _unblock(self) -> None:
        """Send what is pending, then what was collected, then let the waiting pairs send, in their
        order.
        """
        try:
            if not self._transport.drain():
                return
        except OSError as error:
            self._fail_soon(error)
            return
        self.blocked = False
        if not self.up:
            return
        self._flush()
        waiting = self.waiting
        for _ in range(len(waiting)):
            if self.blocked or self.over:
                return
            waiting.popleft().link_ready()

    # In.

    def _event(self, mask: int) -> None:
        if mask & HUP:
            self._transport.hup = True
        if mask & OUT and self.blocked:
            self._unblock()
        if self.over:
            return
        if not self.up:
            self._queue_handshake()
        elif mask & (IN | HUP | LOST):
            self._read()

    def _queue_handshake(self) -> None:
        if not self._handshake_queued:
            self._handshake_queued = True
            self.loop.enqueue_slow(self._handshake)

    def _handshake(self) -> None:
        self._handshake_queued = False
        if self.up or self.over:
            return
        try:
            done = self._transport.handshake()
        except ssl.SSLCertVerificationError as error:
            # The peer may take the link for up (TLS 1.3): a RST could overtake the alert that tells
            # it why not.
            self._down(lost_by(error).during("handshake"), linger=True)
            return
        except OSError as error:
            self.abort(lost_by(error).during("handshake"))
            return
        self.blocked = bool(self._transport.pending)
        if done:
            self.up = True
            self._heard = self.loop.now
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.after(random.uniform(0.5, 1.0), self._heartbeat)  # noqa: S311
            self._owner.link_up(self)
            self._measure()
            self._flush()
            self._read()  # the handshake's last read may have used their edge up

    def _read(self) -> None:
        transport = self._transport
        try:
            if self._unread:
                rest, self._unread = self._unread, b""
                self._take(memoryview(rest))
            for _ in range(READS_A_TURN):
                if self._unread:
                    break
                data = transport.receive(self.scratch, READ_BYTES if self.allowance is None else UNPROVEN_READ_BYTES)
                if transport.pending:
                    self.blocked = True  # with an answer to a key update: later frames go behind it
                if data:
                    self._heard = self.loop.now
                    if self.allowance is not None:
                        self._take_little(data, self.allowance)
                    elif (used := self.receive(data, FRAMES_A_TURN)) < len(data) and not self.over:
                        self._unread = bytes(data[used:])
                if self._unread:
                    break
                if self.over:
                    return
                if transport.eof:
                    self._down(closed("closed by peer"))
                    return
                if transport.drained:
                    return
        except yamux.YamuxError as error:
            self.break_off(str(error))
            return
        except OSError as error:
            self._down(lost_by(error))
            return
        if not self._queued:
            self._queued = True
            self.loop.soon(self._read_more)

    def _take(self, data: memoryview) -> None:
        """Take the frames of this turn, and keep the rest in `_unread`."""
        if self.allowance is not None:
            self._take_little(data, self.allowance)
            return
        used = self.receive(data, FRAMES_A_TURN)
        if used < len(data) and not self.over:
            self._unread = bytes(data[used:])

    def _take_little(self, data: memoryview, allowance: int) -> None:
        """Take bytes of a peer that has not proved who it is: `allowance` in all, and few frames in
        each turn.
        """
        self._spoken = True
        used = self.receive(data[:allowance], UNPROVEN_FRAMES_A_TURN)
        if self.over:
            return
        if self.allowance is None:  # one of these frames was the proof
            self._take(data[used:])
        elif used == allowance < len(data):
            self.break_off("too many bytes before the peer proved itself")
        else:
            self.allowance = allowance - used
            self._unread = bytes(data[used:])

    def _read_more(self) -> None:
        self._queued = False
        if not self.over:
            self._read()

    # Signs of life, and the end.

    def _heartbeat(self) -> None:
        """Ping a silent peer, give up one that was silent for DEAD_AFTER, and look again in some
        seconds.
        """
        silent = self.silence
        if self._next_id > LAST_STREAM_ID:
            self.close(closed("its stream ids are used up"))
            return
        if silent >= DEAD_AFTER:
            self.abort(Lost(LostKind.SILENT, f"no sign of life for {silent:.0f} s"))
            return
        look = LOOK_CLIENT if self.is_client else LOOK_SERVER
        ping_after = PING_AFTER_CLIENT if self.is_client else PING_AFTER_SERVER
        if self._measures_on() or silent >= ping_after:
            self._measure()
        pause = min(look * random.uniform(0.9, 1.0), DEAD_AFTER - silent + 0.05)  # noqa: S311
        self._timer = self.loop.after(pause, self._heartbeat)

    def _measures_on(self) -> bool:
        """Return whether the shortest round trip may still be that of a cold or busy process."""
        return self._pings < FIRST_PINGS and not 0 < self._least_rtt < LEAST_RTT

    def _measure(self) -> None:
        self._count_lost_ping()
        self._pings += 1
        self._live.pings += 1
        self._ping_sent = self.loop.now
        self.ping(self._pings & 0xFFFFFFFF)

    def _count_lost_ping(self) -> None:
        """Count the last ping as lost if it waits for its answer for too long."""
        if self._ping_sent and self.loop.now - self._ping_sent >= PING_PATIENCE:
            self._live.pings_lost += 1

    def probe(self, patience: float, done: Callable[[bool], None]) -> None:
        """Ping the peer now, and call `done(lives)` once.

        True as soon as it answers. After `patience` seconds: whether any byte has come since,
        because the answer waits behind what a slow link carries. False as soon as the link ends,
        from within this call if it has ended.
        """
        if self.over or not self.up:
            done(False)
            return
        asked = self.loop.now
        self._measure()
        value = self._pings & 0xFFFFFFFF
        self._probes[value] = done
        self.loop.after(patience, lambda: self._probed(value, self._heard > asked))

    def _probed(self, value: int, lives: bool) -> None:
        done = self._probes.pop(value, None)
        if done is not None:
            done(lives)

    @override
    def on_pong(self, value: int) -> None:
        self._probed(value, True)
        if value == self._pings & 0xFFFFFFFF and self._ping_sent:
            self.rtt = self.loop.now - self._ping_sent
            self._ping_sent = 0.0
            self._live.round_trips.observe(self.rtt)
            self.measured(self.rtt)
            if self.rtt < BUSY_RTT and self._measures_on():
                self._measure()

    def close(self, lost: Lost) -> None:
        """End in order, with a GoAway behind all that was written.

        The owner hears `link_down(lost)` in this call.
        """
        self._leave(yamux.GoAwayCode.NORMAL, lost)

    def break_off(self, fault: str) -> None:
        """End like `close`, with a GoAway that says that the peer broke the protocol; `fault` is
        for the log.
        """
        self._leave(yamux.GoAwayCode.PROTOCOL_ERROR, Lost(LostKind.PROTOCOL_ERROR, f"protocol error: {fault}"))

    def _leave(self, code: yamux.GoAwayCode, lost: Lost) -> None:
        if self.over:
            return
        if self.up:
            self.go_away(code)
            self._flush()
        self._down(lost, linger=self.up)

    def abort(self, lost: Lost) -> None:
        """End with a RST. The owner hears `link_down(lost)` in this call."""
        if not self.over:
            reset_on_close(self.sock)
            self._down(lost)

    def _fail_soon(self, error: OSError) -> None:
        """End the link in a later step of the loop: the failed write is deep in a pair's or a
        handler's call.
        """
        self.blocked = True
        lost = lost_by(error)
        self.loop.soon(lambda: self._down(lost))

    def _down(self, lost: Lost, *, linger: bool = False) -> None:
        if self.over:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._count_lost_ping()
        self._live.discard(self)
        if linger:
            self._linger()
        else:
            self.loop.close(self.sock)
        self._out.clear()
        self._unread = b""
        self.waiting.clear()
        self.cut = sum(isinstance(stream, StreamEnd) and stream.joined for stream in self.streams.values())
        self.end()
        # Links and their owners refer to each other: TLS buffers (250 KB) must not wait for a
        # garbage collection.
        self._spoken = self.has_spoken
        self._transport = Transport(self.sock)
        for value in list(self._probes):
            self._probed(value, False)
        self._owner.link_down(self, lost)

    def _linger(self) -> None:
        """Hand the socket to a closing end, which sends the last words: no RST overtakes them."""
        words = self._transport.last(self._out if self.up else b"")
        if len(words) > LAST_WORDS_BYTES:
            self.loop.close(self.sock)
            return
        end = SocketEnd(self.loop, self.sock, self.peer, watched=True)
        end.write(bytes(words))
        end.close()
        self._live.leave(end)


class Links(set[Link]):
    """The links of one relay, the closing ends of those that have ended (`leave`), and the counts
    of their pings.

    The counts have no label for the peer: a broker has up to 50,000.
    """

    def __init__(self, loop: Loop, scratch: Scratch) -> None:
        super().__init__()
        self.loop = loop
        self.scratch = scratch
        self._leaving: deque[SocketEnd] = deque()
        self.pings = 0
        self.pings_lost = 0  # without an answer within PING_PATIENCE
        self.round_trips = Histogram()

    def leave(self, end: SocketEnd) -> None:
        """Keep a closing end; with MAX_LEAVING of them the oldest is closed at once."""
        leaving = self._leaving
        while leaving and (leaving[0].closed or len(leaving) >= MAX_LEAVING):
            leaving.popleft().cut_short()
        if not end.closed:
            leaving.append(end)


def _tune(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_AFTER * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT_OPTION, NOTSENT_LOWAT)
    except OSError:
        pass  # the connection is lost already, and the first read says so


#: Missing from Python's socket module before 3.12 (linux/tcp.h).
TCP_NOTSENT_LOWAT_OPTION: Final = 25
