"""Two ends become a pair: bytes, half-closes and resets flow between them, and are counted.

Socket to socket is two `_Flow`s, one a direction: copying at first, `os.splice` through a pooled pipe once a flow
proves to be bulk. Socket to stream is a `StreamPair`: upwards the socket is read straight behind the frame's
header and both leave in one call; downwards a frame's payload goes from the link's read buffer into the socket.
What a slow reader does not take stays in the kernel (sockets) or within its window (streams): nothing else waits
for it.

FIN follows the last byte and closes one direction only. A reset on one side is a reset on the other.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from rtunnel.compat import override
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.loop import HUP, IN, LOST, OUT, URGENT, Loop, Timer
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.transport import Scratch
from rtunnel.wire.yamux import HEADER_BYTES

#: What one direction may move before others get their turn.
QUANTUM: Final = 256 * 1024
#: One frame upwards, and the piece of a copying flow.
PIECE: Final = 128 * 1024
#: The same when the budget of memory is used up.
SMALL_PIECE: Final = 16 * 1024
#: A pipe of a splicing flow. Pipes are few: an unprivileged user has 64 MiB of them (fs.pipe-user-pages-soft).
PIPE_BYTES: Final = 1024 * 1024
MAX_PIPES: Final = 48
_F_SETPIPE_SZ: Final = 1031
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Ending(StrEnum):
    """Why a pair ended; also the log word."""

    CLOSED = "closed"  # both directions, in order
    CLIENT_RESET = "client_reset"
    TARGET_RESET = "target_reset"
    LINK_LOST = "link_lost"
    IDLE = "idle"
    DRAINED = "drained"
    REVOKED = "revoked"  # no longer allowed
    OVERRUN = "overrun"  # the coding of a forwarded request's body is broken


@dataclass(slots=True)
class Account:
    """What a pair did. `up` is client to target. Seconds are the loop's (monotonic)."""

    started: float
    up: int = 0
    down: int = 0
    ended: float = 0.0
    ending: Ending = Ending.CLOSED

    @property
    def seconds(self) -> float:
        """How long it lived."""
        return self.ended - self.started


class PairOwner(Protocol):
    """The role's side of a pair: what it is for, and what is counted. In the relay's thread."""

    def allowed(self) -> bool:
        """Return whether the pair may go on; asked when rules, trust or exposed ports have changed."""

    def ended(self, account: Account) -> None:
        """Take the account of the pair, which is over. Called once."""


class _NoOwner:
    """For pairs that nobody counts and that are always allowed."""

    def allowed(self) -> bool:
        return True

    def ended(self, account: Account) -> None:
        pass


NO_OWNER: Final[PairOwner] = _NoOwner()


class Pipes:
    """A pool of pipes for splicing."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        self._made = 0

    def take(self) -> tuple[int, int] | None:
        """A pipe (read end, write end), or None: then copy."""
        if self._free:
            return self._free.pop()
        if self._made >= MAX_PIPES:
            return None
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        self._made += 1
        try:
            fcntl.fcntl(pipe[1], _F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the user's quota of pipe pages is used up: a 64 KiB pipe works as well, only slower
        return pipe

    def give(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Back into the pool; one that holds bytes is closed."""
        if empty:
            self._free.append(pipe)
        else:
            self._made -= 1
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close those in the pool."""
        while self._free:
            self.give(self._free.pop(), empty=False)


class Pair:
    """Two joined ends. `abort` is for drain deadlines and for whoever must end it."""

    __slots__ = ("_idle", "_live", "_timer", "account", "done", "loop", "moved", "owner", "watched")

    def __init__(self, loop: Loop, live: set[Pair], idle: float, owner: PairOwner) -> None:
        self.loop = loop
        self.account = Account(loop.now)
        self.done = False
        self.moved = loop.now  # the last time that a byte moved
        self.watched = False  # by TCP keep-alive
        self._live = live
        self.owner = owner
        self._idle = idle
        live.add(self)
        self._timer: Timer | None = loop.after(idle, self._idle_check) if idle else None

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """Its sockets; a stream has none of its own."""
        raise NotImplementedError

    def abort(self, ending: Ending) -> None:
        """Reset both sides."""
        raise NotImplementedError

    def _finish(self, ending: Ending) -> None:
        self.done = True
        self._live.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        account = self.account
        account.ended = self.loop.now
        account.ending = ending
        if account.up < 0:
            account.up = 0
        if account.down < 0:
            account.down = 0
        self.owner.ended(account)

    def _idle_check(self) -> None:
        left = self.moved + self._idle - self.loop.now
        if left <= 0:
            self.abort(Ending.IDLE)
        else:
            self._timer = self.loop.after(left, self._idle_check)


class _Flow:
    """One direction of a socket pair."""

    __slots__ = (
        "_held",
        "_in_pipe",
        "_may_splice",
        "_memory",
        "_pair",
        "_pipe",
        "_queued",
        "end",
        "hup",
        "readable",
        "sink",
        "source",
    )

    def __init__(self, pair: SocketPair, source: SocketEnd, sink: SocketEnd, first: bytes) -> None:
        self._pair = pair
        self.source = source
        self.sink = sink
        self.readable = source.readable
        self.hup = source.hup
        self.end = False  # the FIN is passed on
        self._may_splice = source.can_splice and sink.can_splice
        self._held: bytes | memoryview = first  # read, not yet written
        self._memory = pair.scratch.memory
        if first:
            self._memory.hold(len(first))
        self._pipe: tuple[int, int] | None = None
        self._in_pipe = 0
        self._queued = False

    @property
    def holds(self) -> bool:
        """There are bytes that the sink did not take yet."""
        return bool(self._held or self._in_pipe)

    def run(self) -> None:
        """Move until one side has enough, or the quantum is used up."""
        self._queued = False
        pair, budget = self._pair, QUANTUM
        while not self.end and not pair.done:
            try:
                if (self._held or self._in_pipe) and not self._write():
                    self.sink.await_room()
                    return
            except BlockingIOError:
                self.sink.await_room()
                return
            except OSError:
                pair.lost(self.sink)
                return
            if not self.readable or budget <= 0:
                break
            try:
                size = self._read()
            except BlockingIOError:
                self.readable = False
                self._release_pipe()
                return
            except OSError:
                pair.lost(self.source)
                return
            if size < 0:
                return
            if self._held:  # the sink took a part; its next event goes on
                if not pair.done:
                    self.sink.await_room()
                return
            budget -= size
        if self.readable and not self.end and not self._queued and not pair.done:
            self._queued = True
            pair.loop.soon(self.run)

    def _read(self) -> int:
        """Take from the source; the number of bytes; -1 when the flow or the pair has ended."""
        if self._pipe is not None and not self._may_splice:
            self._release_pipe()
        if self._pipe is not None:
            size = os.splice(self.source.fd, self._pipe[1], PIPE_BYTES, flags=_SPLICE)
            self._in_pipe = size
            wanted = PIPE_BYTES
        else:
            wanted = SMALL_PIECE if self._memory.full else PIECE
            view = self._pair.scratch.upload[:wanted]
            size = self.source.sock.recv_into(view)
            if size:
                self._take(view[:size])
        if not size:
            return self._pass_fin()
        if self._pipe is None and size < wanted and not self.hup:
            self.readable = False  # epoll(7): a short read has drained the socket
        elif self._pipe is None and size == wanted and self._may_splice and not self._pair.done:
            self._pipe = self._pair.pipes.take()
        return size

    def _take(self, data: memoryview) -> None:
        """Copy on: straight to the sink, the rest is held."""
        try:
            sent = self.sink.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._held = b""
            self._pair.lost(self.sink)
            return
        self._count_out(sent)
        if sent == len(data):
            self._held = b""
            return
        self._held = bytes(data[sent:])
        self._memory.hold(len(self._held))

    def _write(self) -> bool:
        """Give the sink what is held; False when it takes no more."""
        if self._held:
            sent = self.sink.sock.send(self._held)
            self._held = memoryview(self._held)[sent:]
            self._memory.release(sent)
            self._count_out(sent)
            return not self._held
        if self._pipe is not None:
            sent = os.splice(self._pipe[0], self.sink.fd, self._in_pipe, flags=_SPLICE)
            self._in_pipe -= sent
            self._count_out(sent)
        return not self._in_pipe

    def _count_out(self, size: int) -> None:
        self._pair.moved = self._pair.loop.now
        if self is self._pair.upward:
            self._pair.account.up += size
        else:
            self._pair.account.down += size

    def _pass_fin(self) -> int:
        self.end = True
        self.readable = False
        self._release_pipe()
        if not self._pair.ends():  # else the sockets are closed now, which sends the FIN
            try:
                self.sink.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._pair.lost(self.sink)
        return -1

    def copy_only(self) -> None:
        """Urgent data is there: splice(2) stops in front of it, and never gets past (tcp_splice_read)."""
        self._may_splice = False

    def _release_pipe(self) -> None:
        """A quiet flow gives its pipe back: pipes are for those who move much."""
        if self._pipe is not None and not self._in_pipe:
            self._pair.pipes.give(self._pipe, empty=True)
            self._pipe = None

    def drop(self) -> None:
        """The pair is over."""
        if self._pipe is not None:
            self._pair.pipes.give(self._pipe, empty=not self._in_pipe)
            self._pipe = None
        if self._held:
            self._memory.release(len(self._held))
            self._held = b""


class SocketPair(Pair):
    """Two sockets."""

    __slots__ = ("client", "downward", "pipes", "scratch", "target", "upward")

    def __init__(
        self,
        loop: Loop,
        live: set[Pair],
        scratch: Scratch,
        pipes: Pipes,
        client: SocketEnd,
        target: SocketEnd,
        *,
        up: bytes = b"",
        down: bytes = b"",
        idle: float = 0.0,
        owner: PairOwner,
    ) -> None:
        super().__init__(loop, live, idle, owner)
        self.scratch = scratch
        self.pipes = pipes
        self.client = client
        self.target = target
        for_target = target.hand_over(self._target_event)
        for_client = client.hand_over(self._client_event)
        # Words of our own that are still to go out are counted like the others: they begin below zero.
        self.account.up -= len(for_target)
        self.account.down -= len(for_client)
        self.upward = _Flow(self, client, target, for_target + up)
        self.downward = _Flow(self, target, client, for_client + down)
        self.upward.run()
        if not self.done:
            self.downward.run()

    @override
    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return self.client.sock, self.target.sock

    def _client_event(self, mask: int) -> None:
        self._event(mask, self.upward, self.downward)

    def _target_event(self, mask: int) -> None:
        self._event(mask, self.downward, self.upward)

    def _event(self, mask: int, reads: _Flow, writes: _Flow) -> None:
        if mask & (IN | HUP | LOST):
            reads.readable = True
            if mask & HUP:
                reads.hup = True
                if mask & URGENT:
                    reads.copy_only()
            reads.run()
        if mask & OUT and writes.holds and not self.done:
            writes.run()
        # HUP alone comes when both sides have sent FIN: the flows then run to their ends by themselves.
        if mask & LOST and not self.done and reads.source.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.lost(reads.source)

    def ends(self) -> bool:
        """A direction has ended; after both the pair is over, and this True."""
        if self.upward.end and self.downward.end:
            self._over(Ending.CLOSED)
        return self.done

    def lost(self, end: SocketEnd) -> None:
        """A socket failed: reset the other."""
        self.abort(Ending.CLIENT_RESET if end is self.client else Ending.TARGET_RESET)

    @override
    def abort(self, ending: Ending) -> None:
        if not self.done:
            self.client.reset_on_close()
            self.target.reset_on_close()
            self._over(ending)

    def _over(self, ending: Ending) -> None:
        self.upward.drop()
        self.downward.drop()
        for end in (self.client, self.target):
            end.closed = True
            self.loop.close(end.sock)
        self._finish(ending)


class StreamPair(Pair):
    """A socket and a stream of a link. Towards the stream is `out`, towards the socket is `back`."""

    __slots__ = (
        "_back_ended",
        "_held",
        "_hup",
        "_is_client",
        "_out_ended",
        "_queued",
        "_readable",
        "_scratch",
        "_socket",
        "_stream",
        "_waits",
    )

    def __init__(
        self,
        loop: Loop,
        live: set[Pair],
        scratch: Scratch,
        end: SocketEnd,
        stream: StreamEnd,
        *,
        socket_is_client: bool,
        out: bytes = b"",
        back: bytes = b"",
        idle: float = 0.0,
        owner: PairOwner,
    ) -> None:
        super().__init__(loop, live, idle, owner)
        self._scratch = scratch
        self._socket = end
        self._stream = stream
        self._is_client = socket_is_client
        self._readable = end.readable
        self._hup = end.hup
        self._out_ended = False
        self._back_ended = False  # FIN passed on to the socket
        self._waits = False  # in the link's line
        self._queued = False
        unread = stream.hand_over(self)
        words = end.hand_over(self._event)  # of our own: they are counted like the others, so they begin below zero
        if socket_is_client:
            self.account.down -= len(words)
        else:
            self.account.up -= len(words)
        self._held = bytearray(words + back)  # not the window's: consumed already
        self._stream_bytes_first(unread)
        if out and not self.done:
            stream.link.write(stream.frame(out))
            self._count_out(len(out))
        if not self.done:
            self._run_out()

    @override
    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self._socket.sock,)

    def _stream_bytes_first(self, unread: bytes) -> None:
        """Our own words, then what came before the join, then the FIN if it is there: one queue, so one order."""
        if self._held:
            self._stream.consumed(-len(self._held))  # our own words, not the stream's: they are no window
        self._held += unread
        if self._held:
            self._stream.link.hold(len(self._held))
            self.flush()
        elif self._stream.eof:
            self.stream_fin()

    # Out: socket -> stream.

    def _run_out(self) -> None:
        """Read the socket straight behind a frame's header, and send both, until somebody has enough."""
        self._queued = False
        stream, link, budget = self._stream, self._stream.link, QUANTUM
        buffer = self._scratch.upload
        while self._readable and not self._out_ended and not self.done:
            if link.blocked:
                if not self._waits:
                    self._waits = True
                    link.waiting.append(self)
                return
            window = stream.send_window
            if window <= 0:
                return  # stream_window goes on
            if budget <= 0:
                self._queue()
                return
            wanted = min(PIECE, window)
            try:
                size = self._socket.sock.recv_into(buffer[HEADER_BYTES : HEADER_BYTES + wanted])
            except BlockingIOError:
                self._readable = False
                return
            except OSError:
                self._socket_lost()
                return
            if not size:
                self._out_ended = True
                stream.finish()
                self._ended_one()
                return
            if size < wanted and not self._hup:
                self._readable = False
            stream.header_into(buffer, size)
            link.write(buffer[: HEADER_BYTES + size])
            self._count_out(size)
            budget -= size

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self.loop.soon(self._run_out)

    def link_ready(self) -> None:
        self._waits = False
        if not self.done:
            self._run_out()

    def stream_window(self) -> None:
        if self._readable:
            self._queue()  # not at once: this call comes from within the link's read

    # Back: stream -> socket.

    def stream_data(self, data: memoryview) -> None:
        if self._held:
            self._held += data
            self._stream.link.hold(len(data))
            return
        try:
            sent = self._socket.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._socket_lost()
            return
        if sent:
            self._count_back(sent)
        if sent < len(data):
            self._held += data[sent:]
            self._stream.link.hold(len(data) - sent)
            self._socket.await_room()

    def flush(self) -> None:
        """The socket takes bytes again."""
        try:
            sent = self._socket.sock.send(self._held)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._socket_lost()
            return
        del self._held[:sent]
        self._stream.link.release(sent)
        self._count_back(sent)
        if self._held:
            self._socket.await_room()
        if not self._held and self._stream.eof:
            self._fin_back()

    def stream_fin(self) -> None:
        if not self._held:
            self._fin_back()

    def _fin_back(self) -> None:
        if self._back_ended or self.done:
            return
        self._back_ended = True
        self._ended_one()
        if not self.done:  # else the socket is closed now, which sends the FIN
            try:
                self._socket.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._socket_lost()

    # Both.

    def _event(self, mask: int) -> None:
        if mask & (IN | HUP | LOST):
            self._readable = True
            if mask & HUP:
                self._hup = True
            self._run_out()
        if mask & OUT and self._held and not self.done:
            self.flush()
        if mask & LOST and not self.done and not (self._out_ended and self._back_ended):
            self._check_socket()

    def _check_socket(self) -> None:
        """HUP without an error comes when both sides have sent FIN; the reads then go on to their end."""
        if self._socket.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._socket_lost()

    def _count_out(self, size: int) -> None:
        self.moved = self.loop.now
        if self._is_client:
            self.account.up += size
        else:
            self.account.down += size

    def _count_back(self, size: int) -> None:
        self.moved = self.loop.now
        if self._is_client:
            self.account.down += size
        else:
            self.account.up += size
        self._stream.consumed(size)

    def _ended_one(self) -> None:
        if self._out_ended and self._back_ended:
            self._over(Ending.CLOSED)

    def _socket_lost(self) -> None:
        if not self.done:
            self._stream.reset()
            self._over(Ending.CLIENT_RESET if self._is_client else Ending.TARGET_RESET)

    def stream_lost(self, lost: Lost) -> None:
        if self.done:
            return
        self._socket.reset_on_close()
        if lost.kind is LostKind.LINK_LOST:
            self._over(Ending.LINK_LOST)
        else:
            self._over(Ending.TARGET_RESET if self._is_client else Ending.CLIENT_RESET)

    @override
    def abort(self, ending: Ending) -> None:
        if not self.done:
            self._socket.reset_on_close()
            self._stream.reset()
            self._over(ending)

    def _over(self, ending: Ending) -> None:
        if self._held:
            self._stream.link.release(len(self._held))
            self._held.clear()
        self._socket.closed = True
        self._stream.pair = None
        self._stream.closed = True
        self.loop.close(self._socket.sock)
        self._finish(ending)
