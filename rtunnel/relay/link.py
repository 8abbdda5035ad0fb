"""A link: one TCP connection between agent and broker, plain or TLS, carrying yamux.

Out: small frames of one turn leave together at its end; large ones go straight from the buffer that they were
read into. When the kernel takes no more the link is `blocked`: pairs that have something to send stop reading
their sockets, wait in line, and get their turns in order.

In: one large read, and every frame's payload is handed on as a slice of it.
"""

from __future__ import annotations

import random
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from rtunnel.compat import override
from rtunnel.relay.ends import EndHandler, SocketEnd, reset_on_close
from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Timer
from rtunnel.relay.lost import Lost, LostKind, closed, lost_by
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.transport import READ_BYTES, UNPROVEN_READ_BYTES, Scratch, TlsTransport, Transport
from rtunnel.relay.windows import WindowedSession
from rtunnel.wire import yamux

#: Frames up to this size wait for the end of the turn, to share a system call (and a TLS record).
COALESCE_BYTES: Final = 4 * 1024
#: Frames kept for a link that takes nothing: beyond this it is dead. Control frames alone can get here.
MAX_BACKLOG: Final = 8 * 1024 * 1024
#: Reads of one link before others get their turn.
READS_A_TURN: Final = 1
#: Frames of one link before others get their turn.
FRAMES_A_TURN: Final = 512
#: The same for a peer that has not proved itself: its Hello and Proof, with a ping beside each, are some ten frames.
UNPROVEN_FRAMES_A_TURN: Final = 32

#: A link opens so many streams in its life (yamux: 31 bits, two apart), but for a reserve until the next look. At 5000
#: streams a second that is five days; then it is closed, and the agent dials a new one.
LAST_STREAM_ID: Final = 2**32 - 2**20

#: Unsent bytes of a link that ends; with more than these its peer reads nothing, and would not hear why.
LAST_WORDS_BYTES: Final = 1024 * 1024
#: Ended links whose last words are on their way. They have no place among strangers or sessions any more, so a flood of
#: broken handshakes must not take all descriptors.
MAX_LEAVING: Final = 256

DEAD_AFTER: Final = 15.0
#: So often each end looks whether the other was silent; the broker asks only when the agent seems not to.
PING_AFTER_CLIENT: Final = 5.0
PING_AFTER_SERVER: Final = 8.0
#: Unsent bytes that the kernel may queue: what a small frame waits behind.
NOTSENT_LOWAT: Final = 128 * 1024

_LATE: Final = Lost(LostKind.DEADLINE, "handshake deadline")
_TAKES_NOTHING: Final = Lost(LostKind.SILENT, "the peer takes no bytes")


class LinkOwner(Protocol):
    """The role's side of a link. All calls come in the relay's thread."""

    def link_up(self, link: Link) -> None:
        """Handshake done."""

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """The peer opened a stream: its talker, or None to refuse it."""

    def link_down(self, link: Link, lost: Lost) -> None:
        """The link is gone, and with it every stream. Called once, also when it never came up."""


class BytesSender(Protocol):
    """Who waits for a blocked link."""

    def link_ready(self) -> None:
        """The link takes bytes again."""


class Link(WindowedSession):
    """See the module. Made by `Relay`; `peer` is the other end's IP, `rtt` the last ping's seconds (0: none yet)."""

    __slots__ = (
        "_flushing", "_heard", "_live", "_out", "_owner", "_ping_sent", "_pings", "_probes", "_queued", "_shaking",
        "_spoken", "_timer", "_transport", "_unread", "allowance", "blocked", "is_client", "peer", "rtt", "scratch",
        "sock", "up", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        loop: Loop,
        scratch: Scratch,
        sock: socket.socket,
        owner: LinkOwner,
        *,
        peer: str,
        client: bool,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        handshake_timeout: float = 10.0,
        watched: bool = False,
        live: Links,
    ) -> None:
        super().__init__(loop, scratch.memory, client=client)
        self.scratch = scratch
        self.sock = sock
        self.peer = peer
        self.is_client = client
        self._owner = owner
        self._transport = Transport(sock) if tls is None else TlsTransport(sock, tls, server_name if client else None)
        self._live = live
        live.add(self)
        # The handshake.
        self.up = False
        self._shaking = False  # it stands in line
        self._spoken = False  # something came before the proof
        self._timer: Timer | None = loop.after(handshake_timeout, lambda: self.kill(_LATE))
        # Out.
        self.blocked = False
        self.waiting: deque[BytesSender] = deque()
        self._out = bytearray()
        self._flushing = False
        # In.
        self._unread = b""  # frames that came beyond this turn's share
        self._queued = False
        #: So many bytes more are taken from a peer that has not proved itself; None: any. The owner sets and lifts it.
        self.allowance: int | None = None
        # Signs of life.
        self._heard = loop.now
        self._pings = 0
        self._ping_sent = 0.0
        self._probes: dict[int, Callable[[bool], None]] = {}  # by the ping that they wait for
        self.rtt = 0.0
        _tune(sock)
        self._watch(watched)
        self._shake_in_line()

    def _watch(self, watched: bool) -> None:
        fd = self.sock.fileno()
        if watched:
            self.loop.handlers[fd] = self._event
            self.loop.add_out(fd)
            self._transport.hup = True  # whoever watched it before may have seen the FIN's edge
        else:
            self.loop.add(fd, self._event)

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate in DER, if it showed one."""
        return self._transport.peer_certificate()

    @property
    def has_spoken(self) -> bool:
        """Whether a peer that has not proved itself has sent a byte; True while its handshake stands in line.

        Right also when the link is down.
        """
        return self._spoken or self._shaking or self._transport.shaken > 0

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return self.loop.now - self._heard

    # Streams.

    def open(self, handler: EndHandler, first: bytes, deadline: float | None = None) -> StreamEnd:
        """A new stream that begins with `first`."""
        stream = StreamEnd(self)
        self.attach(stream)
        stream.talk(handler, deadline)
        stream.write(first)
        return stream

    @override
    def accepts(self) -> yamux.Stream | None:
        stream = StreamEnd(self)
        handler = self._owner.link_stream(stream)
        if handler is None:
            return None
        if stream._handler is None:
            stream.talk(handler)
        return stream

    # Out.

    @override
    def emit(self, frame: bytes) -> None:
        self.write(frame)

    def write(self, data: bytes | memoryview) -> None:
        """Send a frame, in order. Large ones only while not `blocked`."""
        if self.over:
            return
        if len(data) > COALESCE_BYTES and not self.blocked and self.up:
            if self._out:
                self._flush()  # replaces `_out`, and may block the link: no alias of either lives across it
            if not self.blocked:
                self._push(data)
                return
        self._out += data
        if not self._flushing and not self.blocked:
            self._flushing = True
            self.loop.soon(self._flush)
        elif len(self._out) > MAX_BACKLOG:
            self.loop.soon(lambda: self.kill(_TAKES_NOTHING))

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
            self._die_soon(error)
            return
        if transport.pending:
            self.blocked = True

    def _unblock(self) -> None:
        """The kernel takes bytes again: what is pending, then everybody who waits, in line."""
        try:
            if not self._transport.drain():
                return
        except OSError as error:
            self._die_soon(error)
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
            self._shake_in_line()
        elif mask & (IN | HUP | LOST):
            self._read()

    def _shake_in_line(self) -> None:
        if not self._shaking:
            self._shaking = True
            self.loop.enqueue_slow(self._shake)

    def _shake(self) -> None:
        self._shaking = False
        if self.up or self.over:
            return
        try:
            done = self._transport.handshake()
        except ssl.SSLCertVerificationError as error:
            # The peer may believe that it is up (TLS 1.3): a reset could overtake the alert that tells it why not.
            self._down(lost_by(error).during("handshake"), linger=True)
            return
        except OSError as error:
            self.kill(lost_by(error).during("handshake"))
            return
        self.blocked = bool(self._transport.pending)
        if done:
            self.up = True
            self._heard = self.loop.now
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.after(random.uniform(0.5, 1.0), self._beat)  # noqa: S311
            self._owner.link_up(self)
            self._measure()
            self._flush()
            self._read()  # bytes may have come with the handshake's last

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
                    self.blocked = True  # an answer to a key update: later frames go behind it
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
        """Tiny frames cost the most: 1 MiB of them would stop the loop for a second, so a turn takes only so many."""
        if self.allowance is not None:
            self._take_little(data, self.allowance)
            return
        used = self.receive(data, FRAMES_A_TURN)
        if used < len(data) and not self.over:
            self._unread = bytes(data[used:])

    def _take_little(self, data: memoryview, allowance: int) -> None:
        """Take bytes of a peer that has not proved itself: so many in all, and few frames in each turn."""
        self._spoken = True
        used = self.receive(data[:allowance], UNPROVEN_FRAMES_A_TURN)
        if self.over:
            return
        if self.allowance is None:  # the peer has proved itself by one of these frames
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

    # Life and death.

    def _beat(self) -> None:
        """Every few seconds: ping a silent peer, give up a dead one."""
        silent = self.silence
        if self._next_id > LAST_STREAM_ID:
            self.close(closed("its stream ids are used up"))
            return
        if silent >= DEAD_AFTER:
            self.kill(Lost(LostKind.SILENT, f"no sign of life for {silent:.0f} s"))
            return
        ping_after = PING_AFTER_CLIENT if self.is_client else PING_AFTER_SERVER
        if self._pings == 1 or silent >= ping_after * 0.7:  # the first was slow: a handshake was under way
            self._measure()
        pause = min(ping_after * random.uniform(0.9, 1.0), DEAD_AFTER - silent + 0.05)  # noqa: S311
        self._timer = self.loop.after(pause, self._beat)

    def _measure(self) -> None:
        self._pings += 1
        self._ping_sent = self.loop.now
        self.ping(self._pings & 0xFFFFFFFF)

    def probe(self, patience: float, done: Callable[[bool], None]) -> None:
        """Ping the peer now, and tell `done` once whether it lives.

        True as soon as it answers; after `patience` seconds, whether it has said anything since (an answer stands in
        line behind what a slow link has to carry). False as soon as the link ends.
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
        if value == self._pings & 0xFFFFFFFF:
            self.rtt = self.loop.now - self._ping_sent
            self.measured(self.rtt)

    def close(self, lost: Lost) -> None:
        """End in order, with a GoAway behind all that was written."""
        self._leave(yamux.GoAwayCode.NORMAL, lost)

    def break_off(self, fault: str) -> None:
        """End, and tell the peer by GoAway that it broke the protocol."""
        self._leave(yamux.GoAwayCode.PROTOCOL_ERROR, Lost(LostKind.PROTOCOL_ERROR, f"protocol error: {fault}"))

    def _leave(self, code: yamux.GoAwayCode, lost: Lost) -> None:
        if self.over:
            return
        if self.up:
            self.go_away(code)
            self._flush()
        self._down(lost, linger=self.up)

    def kill(self, lost: Lost) -> None:
        """End now; the peer gets a reset."""
        if not self.over:
            reset_on_close(self.sock)
            self._down(lost)

    def _die_soon(self, error: OSError) -> None:
        """A write failed, deep in somebody's call: the link goes down in the next turn and takes nothing until then."""
        self.blocked = True
        lost = lost_by(error)
        self.loop.soon(lambda: self._down(lost))

    def _down(self, lost: Lost, *, linger: bool = False) -> None:
        if self.over:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._live.discard(self)
        if linger:
            self._linger()
        else:
            self.loop.close(self.sock)
        self._out.clear()
        self._unread = b""
        self.waiting.clear()
        self.end()
        # Links and their owners name each other: TLS buffers (250 KB) must not wait for a garbage collection.
        self._spoken = self.has_spoken
        self._transport = Transport(self.sock)
        for value in list(self._probes):
            self._probed(value, False)
        self._owner.link_down(self, lost)

    def _linger(self) -> None:
        """Close the socket behind the last words. What the peer still sends is dropped: no reset overtakes them."""
        words = self._transport.last(self._out if self.up else b"")
        if len(words) > LAST_WORDS_BYTES:
            self.loop.close(self.sock)
            return
        end = SocketEnd(self.loop, self.sock, self.peer, watched=True)
        end.write(bytes(words))
        end.close()
        self._live.leave(end)


class Links(set[Link]):
    """The links of one relay. Links that have ended may still have last words on their way: `leave`."""

    def __init__(self) -> None:
        super().__init__()
        self._leaving: deque[SocketEnd] = deque()

    def leave(self, end: SocketEnd) -> None:
        """Take an end that is closing; with too many of them the oldest is cut short."""
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
        pass  # the peer is gone already: the first read tells


#: Not in Python's socket module before 3.12 (linux/tcp.h).
TCP_NOTSENT_LOWAT_OPTION: Final = 25
