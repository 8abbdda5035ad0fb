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
from typing import Final, Protocol

from rtunnel.relay.ends import LINGER_SECONDS, SocketEnd, Talker, reset_on_close
from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Timer
from rtunnel.relay.transport import Scratch, TlsTransport, Transport
from rtunnel.wire import yamux

#: Frames up to this size wait for the end of the turn, to share a system call (and a TLS record).
COALESCE_BYTES: Final = 4 * 1024
#: Frames kept for a link that takes nothing: beyond this it is dead. Control frames alone can get here.
MAX_BACKLOG: Final = 8 * 1024 * 1024
#: Reads of one link before others get their turn.
READS_A_TURN: Final = 1
#: Frames of one link before others get their turn.
FRAMES_A_TURN: Final = 512

#: A link opens so many streams in its life (yamux: 31 bits, two apart), but for a reserve until the next look. At 5000
#: streams a second that is five days; then it is closed, and the agent dials a new one.
LAST_STREAM_ID: Final = 2**32 - 2**20

DEAD_AFTER: Final = 15.0
#: So often each end looks whether the other was silent; the broker asks only when the agent seems not to.
PING_AFTER_CLIENT: Final = 5.0
PING_AFTER_SERVER: Final = 8.0
#: A window grows towards twice what its stream moves in a round trip, at most doubling each time that it is looked at.
#: The shortest round trip counts (a later one has waited behind the very bytes that the window let in), and this at
#: least, because even on loopback the other end needs a turn. More would only fill buffers that small frames wait
#: behind: windows of 4 MiB on loopback gave a round trip beside a bulk stream a p99 of 33 ms.
LEAST_RTT: Final = 0.0005
#: A rate over less time than this is that of a burst out of some buffer.
RATE_SECONDS: Final = 0.01
#: A stream is alone on its link when none other has spoken for so long. The window of one that is not shrinks again to
#: where it began, on a path that is nearer than `NEAR_RTT`: more would only queue up in front of its neighbours' bytes.
ALONE_SECONDS: Final = 0.25
NEAR_RTT: Final = 0.001
#: On a farther path windows are given back in eighths: in halves a stream moves half of its window in a round trip.
FAR_GIVE_BACK: Final = 8
#: 1 Gbit/s over 50 ms is 6 MiB under way, and half a window again until it is given back.
MAX_STREAM_WINDOW: Final = 16 * 1024 * 1024
WINDOW_BUDGET: Final = 256 * 1024 * 1024
#: Unsent bytes that the kernel may queue: what a small frame waits behind.
NOTSENT_LOWAT: Final = 128 * 1024


class LinkOwner(Protocol):
    """The role's side of a link. All calls come in the relay's thread."""

    def link_up(self, link: Link) -> None:
        """Handshake done."""

    def link_stream(self, stream: StreamEnd) -> Talker | None:
        """The peer opened a stream: its talker, or None to refuse it."""

    def link_down(self, link: Link, why: str) -> None:
        """The link is gone, and with it every stream. Called once, also when it never came up."""


class BytesSender(Protocol):
    """Who waits for a blocked link."""

    def link_ready(self) -> None:
        """The link takes bytes again."""


class StreamJoin(Protocol):
    """What a joined stream tells its pair."""

    def stream_data(self, data: memoryview) -> None:
        """Payload from the peer."""

    def stream_fin(self) -> None:
        """The peer sends no more."""

    def stream_lost(self, why: str) -> None:
        """Reset, or the link is gone."""

    def stream_window(self) -> None:
        """There is send window again."""


class Windows:
    """What the windows of all streams of a process may grow by, together. Used up, they stay as they are."""

    __slots__ = ("left",)

    def __init__(self, budget: int = WINDOW_BUDGET) -> None:
        self.left = budget


class StreamEnd(yamux.Stream):
    """One yamux stream as an end that talks and can be joined."""

    __slots__ = ("_deadline", "_reading", "_talker", "backlog", "closed", "eof", "given", "granted", "link", "pair")
    session: Link
    broken = False  # see End: a stream's failure is its link's, and comes as a reset

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.link = link
        self.eof = False
        self.closed = False
        self.granted = link.loop.now  # when the rate was looked at last,
        self.given = 0  # and the window given back since
        self.pair: StreamJoin | None = None
        self.backlog = bytearray()  # came while nobody was reading; at most the window
        self._talker: Talker | None = None
        self._reading = False
        self._deadline: Timer | None = None

    def talk(self, talker: Talker, deadline: float | None = None) -> None:
        """See End."""
        self._talker = talker
        self._stop_deadline()
        if deadline is not None:
            self._deadline = self.link.loop.after(deadline, self._late)
        self.resume()

    def say(self, data: bytes) -> None:
        """See End."""
        if not self.gone:
            self.link.write(self.frame(data))

    def pause(self) -> None:
        """See End."""
        self._reading = False
        self._stop_deadline()

    def resume(self) -> None:
        """See End."""
        self._reading = True
        if self.backlog or self.eof:
            self.link.loop.soon(self._replay)

    def close(self) -> None:
        """See End. What the peer still sends is dropped; a reset now would overtake our last words further on."""
        if not self.closed:
            self._let_go()
            self.finish()
            if not self.gone:
                self.pair = _Discard(self)

    def abort(self) -> None:
        """See End."""
        if not self.closed:
            self._let_go()
            self.reset()

    def hand_over(self, pair: StreamJoin) -> bytes:
        """The join takes the stream; returns what came before and was not read (not yet `consumed`)."""
        self._stop_deadline()
        self._talker = None
        self.pair = pair
        backlog, self.backlog = self.backlog, bytearray()
        return bytes(backlog)

    # Hooks of yamux.Stream.

    def on_data(self, data: memoryview) -> None:
        """See yamux.Stream."""
        link = self.link
        if link.speaker != self.id:
            link.speaker = self.id
            link.spoke_another = link.loop.now
        if self.pair is not None:
            self.pair.stream_data(data)
        elif self._reading and self._talker is not None and not self.backlog:
            self.consumed(len(data))
            self._talker.received(bytes(data))
        else:
            self.backlog += data

    def on_fin(self) -> None:
        """See yamux.Stream."""
        self.eof = True
        if self.pair is not None:
            self.pair.stream_fin()
        elif self._reading and self._talker is not None and not self.backlog:
            self._talker.finished()

    def on_reset(self) -> None:
        """See yamux.Stream."""
        self._lose("link_lost" if self.session.over else "reset")

    def on_window(self) -> None:
        """See yamux.Stream."""
        if self.pair is not None:
            self.pair.stream_window()

    def _replay(self) -> None:
        """Bytes that came while nobody was reading, then the FIN."""
        if self._talker is None or not self._reading or self.closed:
            return
        if self.backlog:
            data, self.backlog = bytes(self.backlog), bytearray()
            self.consumed(len(data))
            self._talker.received(data)
        if self.eof and self._reading and self._talker is not None and not self.backlog:
            self._talker.finished()

    def _late(self) -> None:
        self.reset()
        self._lose("deadline")

    def _lose(self, why: str) -> None:
        talker, pair = self._talker, self.pair
        self._let_go()
        if pair is not None:
            pair.stream_lost(why)
        elif talker is not None:
            talker.lost(why)

    def _let_go(self) -> None:
        self.closed = True
        self._talker = None
        self.pair = None
        self.backlog = bytearray()
        self._stop_deadline()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Discard:
    """Drops what a closed stream still gets, for a while."""

    __slots__ = ("_stream", "_timer")

    def __init__(self, stream: StreamEnd) -> None:
        self._stream = stream
        self._timer = stream.link.loop.after(LINGER_SECONDS, stream.reset)

    def stream_data(self, data: memoryview) -> None:
        self._stream.consumed(len(data))

    def stream_fin(self) -> None:
        self._timer.cancel()

    def stream_lost(self, why: str) -> None:
        self._timer.cancel()

    def stream_window(self) -> None:
        pass


class Link(yamux.Session):
    """See the module. Made by `Relay`; `peer` is the other end's IP, `rtt` the last ping's seconds (0: none yet)."""

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
        live: set[Link],
        windows: Windows,
    ) -> None:
        super().__init__(client=client)
        self._live = live
        self._windows = windows
        self.speaker = 0  # the stream that spoke last,
        self.spoke_another = loop.now  # and when it was another one
        live.add(self)
        self.loop = loop
        self.scratch = scratch
        self.sock = sock
        self.peer = peer
        self.rtt = 0.0
        self._least_rtt = 0.0
        self.is_client = client
        self.up = False
        #: So many bytes more are taken from a peer that has not proved itself; None: any. The owner sets and lifts it.
        self.allowance: int | None = None
        self.blocked = False
        self.waiting: deque[BytesSender] = deque()
        self._owner = owner
        self._out = bytearray()
        self._flushing = False
        self._unread = b""  # frames that came beyond this turn's share
        self._queued = False
        self._heard = loop.now  # the last sign of life
        self._ping_after = PING_AFTER_CLIENT if client else PING_AFTER_SERVER
        self._ping_sent = 0.0
        self._pings = 0
        self._death: str = ""
        self._transport = Transport(sock) if tls is None else TlsTransport(sock, tls, server_name if client else None)
        self._timer: Timer | None = loop.after(handshake_timeout, lambda: self.kill("handshake deadline"))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_AFTER * 1000))
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT_OPTION, NOTSENT_LOWAT)
        except OSError:
            pass  # the peer is gone already: the first read tells
        if watched:
            loop.handlers[sock.fileno()] = self._event
            loop.add_out(sock.fileno())
        else:
            loop.add(sock.fileno(), self._event)
        self._transport.hup = watched  # whoever watched it before may have seen the FIN's edge
        self._shaking = False
        self._shake_in_line()

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate in DER, if it showed one."""
        return self._transport.peer_certificate()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return self.loop.now - self._heard

    # Streams.

    def open(self, talker: Talker, first: bytes, deadline: float | None = None) -> StreamEnd:
        """A new stream that begins with `first`."""
        stream = StreamEnd(self)
        self.attach(stream)
        stream.talk(talker, deadline)
        stream.say(first)
        return stream

    def accepts(self) -> yamux.Stream | None:
        """See yamux.Session."""
        stream = StreamEnd(self)
        talker = self._owner.link_stream(stream)
        if talker is None:
            return None
        if stream._talker is None:
            stream.talk(talker)
        return stream

    def grows(self, stream: yamux.Stream) -> int:
        """See yamux.Session."""
        assert isinstance(stream, StreamEnd)
        stream.given += stream.owed
        now = self.loop.now
        seconds = now - stream.granted
        if seconds < RATE_SECONDS:
            return 0
        given, stream.granted, stream.given = stream.given, now, 0
        window = stream.receive_window
        if self._least_rtt < NEAR_RTT and now - self.spoke_another < ALONE_SECONDS:
            more = -min(stream.owed, window - yamux.INITIAL_WINDOW)
        else:
            wanted = int(2 * given / seconds * max(self._least_rtt, LEAST_RTT))
            more = max(0, min(wanted - window, window, MAX_STREAM_WINDOW - window, self._windows.left))
        self._windows.left -= more
        return more

    def gave_up(self, stream: yamux.Stream) -> None:
        """See yamux.Session."""
        self._windows.left += stream.receive_window - yamux.INITIAL_WINDOW

    # Out.

    def emit(self, frame: bytes) -> None:
        """See yamux.Session."""
        self.write(frame)

    def write(self, data: bytes | memoryview) -> None:
        """Send a frame, in order. Large ones only while not `blocked`."""
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
        elif len(out) > MAX_BACKLOG:
            self.loop.soon(lambda: self.kill("the peer takes no bytes"))

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
            self.loop.in_line(self._shake)

    def _shake(self) -> None:
        self._shaking = False
        if self.up or self.over:
            return
        try:
            done = self._transport.handshake()
        except ssl.SSLCertVerificationError as error:
            # The peer may believe that it is up (TLS 1.3): a reset could overtake the alert that tells it why not.
            self._down(f"handshake: {reason_of(error)}", linger=True)
            return
        except OSError as error:
            self.kill(f"handshake: {reason_of(error)}")
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
                data = transport.receive(self.scratch)
                if data:
                    self._heard = self.loop.now
                    self._take(data)
                if self._unread:
                    break
                if self.over:
                    return
                if transport.eof:
                    self._down("closed by peer")
                    return
                if transport.drained:
                    return
        except yamux.YamuxError as error:
            self.go_away(yamux.GoAwayCode.PROTOCOL_ERROR)
            self._flush()
            self._down(f"protocol error: {error}")
            return
        except OSError as error:
            self._down(reason_of(error))
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
        """From a peer that has not proved itself."""
        self.allowance = allowance - len(data)
        self.receive(data[:allowance])
        if self.allowance is None:
            self._take(data[allowance:])
        elif self.allowance < 0 and not self.over:
            self.go_away(yamux.GoAwayCode.PROTOCOL_ERROR)
            self._flush()
            self._down("protocol error: too many bytes before the peer proved itself")

    def _read_more(self) -> None:
        self._queued = False
        if not self.over:
            self._read()

    # Life and death.

    def _beat(self) -> None:
        """Every few seconds: ping a silent peer, give up a dead one."""
        silent = self.silence
        if self._next_id > LAST_STREAM_ID:
            self.close("its stream ids are used up")
            return
        if silent >= DEAD_AFTER:
            self.kill(f"no sign of life for {silent:.0f} s")
            return
        if self._pings == 1 or silent >= self._ping_after * 0.7:  # the first was slow: a handshake was under way
            self._measure()
        pause = min(self._ping_after * random.uniform(0.9, 1.0), DEAD_AFTER - silent + 0.05)  # noqa: S311
        self._timer = self.loop.after(pause, self._beat)

    def _measure(self) -> None:
        self._pings += 1
        self._ping_sent = self.loop.now
        self.ping(self._pings & 0xFFFFFFFF)

    def on_pong(self, value: int) -> None:
        """See yamux.Session."""
        if value == self._pings & 0xFFFFFFFF:
            self.rtt = self.loop.now - self._ping_sent
            self._least_rtt = min(self.rtt, self._least_rtt or self.rtt)
            self.give_back = 2 if self._least_rtt < NEAR_RTT else FAR_GIVE_BACK

    def close(self, why: str) -> None:
        """End in order: what was written goes out first, as far as the kernel takes it."""
        if self.over:
            return
        if self.up:
            self.go_away(yamux.GoAwayCode.NORMAL)
            self._flush()
            if not self.blocked and not self.over:
                self._transport.finish()
        self._down(why)

    def kill(self, why: str) -> None:
        """End now; the peer gets a reset."""
        if not self.over:
            reset_on_close(self.sock)
            self._down(why)

    def _die_soon(self, error: OSError) -> None:
        """A write failed, deep in somebody's call: the link goes down in the next turn and takes nothing until then."""
        self.blocked = True
        self._death = reason_of(error)
        self.loop.soon(lambda: self._down(self._death))

    def _down(self, why: str, *, linger: bool = False) -> None:
        if self.over:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._live.discard(self)
        if linger:
            SocketEnd(self.loop, self.sock, self.peer, watched=True).close()
        else:
            self.loop.close(self.sock)
        self._out.clear()
        self._unread = b""
        self.waiting.clear()
        self.end()
        # Links and their owners name each other: TLS buffers (250 KB) must not wait for a garbage collection.
        self._transport = Transport(self.sock)
        self._owner.link_down(self, why)


def reason_of(error: OSError) -> str:
    """In words, without the library's own."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        guess = "; the peer does not seem to speak TLS" if error.reason == "WRONG_VERSION_NUMBER" else ""
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}{guess}"
    return error.strerror or str(error)


#: Not in Python's socket module before 3.12 (linux/tcp.h).
TCP_NOTSENT_LOWAT_OPTION: Final = 25
