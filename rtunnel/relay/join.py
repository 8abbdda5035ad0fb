"""Two ends become a pair: bytes, half-closes and resets pass between them, and are counted.

Theory of operation
===================

**Two kinds.** A `SocketPair` is two sockets and two `_Flow`s, one a direction. A flow copies
through `scratch.upload` at first; one that fills a whole piece is bulk, and moves on by `os.splice`
through a pooled pipe. A `StreamPair` is a socket and a stream of a link. Out, the socket is read
straight behind the room for a frame's header, and both leave in one call; back, a frame's payload
goes from the link's read buffer into the socket.

**Life.** `Relay.join` makes a pair of two ends that are neither closed nor broken. The pair takes
the descriptors (`hand_over`: no handler, no deadline any more). To each side it first sends what
the end had not sent yet, then what handlers had read ahead (`up`, `down`), then a stream's backlog,
and then what comes. Each direction ends by itself, by the FIN that follows its last byte. When both
have ended, or something below breaks the pair, it is `done`: its sockets are closed at the end of
the turn, and the owner's `ended(account)` is called, once, last. `account.ending` names the row:

    It happens                  Socket to socket: the pair does    Socket and stream: the pair does
    --------------------------  ---------------------------------  ---------------------------------
    FIN of a socket, read as    `shutdown` of the other socket,    `finish` of the stream (FIN),
    an end                      behind the last byte               behind the last byte
    FIN of the stream           -                                  `shutdown` of the socket, behind
                                                                   what is held for it
    the second FIN              closes both sockets, which sends   closes the socket, the stream is
                                the FIN that is due; ending        gone; ending CLOSED
                                CLOSED
    RST, or another error of a  resets both sockets; ending        resets the stream (RST), closes
    socket, in a read, a write  CLIENT_RESET or TARGET_RESET,      the socket; ending after the
    or SO_ERROR                 after the socket that failed       socket's side
    RST of the stream           -                                  resets the socket; ending after
                                                                   the stream's side
    the link ends               -                                  resets the socket; ending
                                                                   LINK_LOST (for why, see `link`)
    HUP without an error        nothing: both FINs have passed,    the same
                                and the reads go on to their end
    urgent data                 copies from now on: splice(2)      reads as before
                                stops in front of it
    nothing moves for `idle`    resets both sockets; ending IDLE   resets both; ending IDLE
    seconds
    `abort(ending)`             resets both sockets; that ending   resets both; that ending

A reset on one side is a reset on the other, so that no peer takes a part for the whole.

**Where bytes wait.** A reader that does not read stops its own direction and no other; a
blocked link stops the directions towards it:

    What stops a direction      Where its bytes wait               What lets it go on
    --------------------------  ---------------------------------  ---------------------------------
    a socket takes less than    one piece or one pipe in the       the OUT event, which `await_room`
    all                         flow; `_held` of a stream's pair,  asks for
                                a window at most
    the link is blocked         in the kernel: the socket is not   `link_ready`, in the order of
                                read                               `link.waiting`
    the stream's window is      in the kernel: the socket is not   `stream_window`, which queues
    used up                     read                               `_run_out`
    QUANTUM is used up          in the kernel                      the run queue (`soon`)
    nothing to read             nowhere                            the IN event

Held bytes count against the relay's memory (`memory`). Bytes are counted in the account when the
kernel or the link has taken them.

**Edges.** `readable` (of a flow, of a pair) means that a read may give something. An event sets it;
EAGAIN clears it, and so does a short read, unless a HUP has come: then the read after it gives the
FIN. A direction that stops for another reason leaves it set, and needs no edge to go on. The event
LOST makes a pair that is not reading ask SO_ERROR, because it would meet the error in no read.

**What calls back.** `Relay.join` moves bytes, and `abort` resets: both may call `owner.ended`
before they return. The owner may do anything then; the pair is closed already. So each method that
moves bytes looks at `done` after each step. `stream_data`, `stream_fin`, `stream_lost` and
`stream_window` come from within the link's read: they write to the socket, and may end the pair,
but they don't read the socket. `stream_window` only queues that, because a read of the link has its
own share of a turn. `link_ready` comes from within the link's OUT event, and reads and sends at
once.

Tests: `tests/unit/test_hostile_kernel.py` plays schedules of all this on a simulated kernel, and
checks the account and its ending (`tests/support/hostile.py`); `tests/unit/test_relay.py` has a
test on real sockets for most rows, such as test_half_close_is_kept,
test_a_reset_is_a_reset_on_the_other_side, test_urgent_data_stops_no_bulk_stream,
test_a_slow_reader_stops_only_its_own_stream, test_a_dead_link_resets_its_streams,
test_an_idle_pair_ends_at_its_timeout.
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

#: Bytes that one direction moves per loop turn, so that one pair cannot starve the others.
QUANTUM: Final = 256 * 1024
#: Bytes of one read: of a frame's payload, and of the piece of a copying flow.
PIECE: Final = 128 * 1024
#: The same for a flow while the budget of memory is used up.
SMALL_PIECE: Final = 16 * 1024
#: Bytes of a pipe, and the number of pipes. An unprivileged user has 64 MiB of them
#: (fs.pipe-user-pages-soft).
PIPE_BYTES: Final = 1024 * 1024
MAX_PIPES: Final = 48
_F_SETPIPE_SZ: Final = 1031
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Ending(StrEnum):
    """Why a pair ended; also the word in logs."""

    CLOSED = "closed"  # both directions ended by FIN
    CLIENT_RESET = "client_reset"  # the client's side was reset, or its socket failed
    TARGET_RESET = "target_reset"  # the same of the target's side
    # the same at a gateway, whose other side is a broker and not the target
    PATH_RESET = "path_reset"
    LINK_LOST = "link_lost"  # the link with the pair's stream ended
    IDLE = "idle"  # no byte moved for the idle timeout
    DRAINED = "drained"  # the process stops, or the drain's deadline has passed
    NOT_ALLOWED = "not_allowed"  # rules, users, exposed ports or addresses have changed
    REVOKED = "revoked"  # a certificate or key was revoked, or its CA is not in force any more
    OVERRUN = "overrun"  # the coding of a forwarded request's body is broken


@dataclass(slots=True)
class Account:
    """The bytes that a pair moved (`up`: from client to target), and its times in seconds."""

    started: float
    up: int = 0
    down: int = 0
    ended: float = 0.0
    ending: Ending = Ending.CLOSED

    @property
    def seconds(self) -> float:
        """Seconds from the join to the end."""
        return self.ended - self.started


class PairOwner(Protocol):
    """The role's side of a pair: what it is for, and what is counted. In the relay's thread."""

    def review(self) -> Ending | None:
        """Return the ending of a pair that may not go on, else None.

        Asked when rules, trust or exposed ports change.
        """

    def ended(self, account: Account) -> None:
        """Take the account of the pair, which is done. Called once, maybe from within the join."""


class _NoOwner:
    """Allows everything and counts nothing."""

    def review(self) -> Ending | None:
        return None

    def ended(self, account: Account) -> None:
        pass


NO_OWNER: Final[PairOwner] = _NoOwner()


class Pipes:
    """A pool of pipes for `os.splice`. In the relay's thread."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        self._made = 0

    def take(self) -> tuple[int, int] | None:
        """Return a pipe (read end, write end), or None when there is none: the flow then copies."""
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
            pass  # the quota of pipe pages is used up: a pipe of 64 KiB works too, but slower
        return pipe

    def give(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Take a pipe back into the pool; close one that holds bytes (not `empty`)."""
        if empty:
            self._free.append(pipe)
        else:
            self._made -= 1
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close the pipes of the pool."""
        while self._free:
            self.give(self._free.pop(), empty=False)


class Pair:
    """Two joined ends. In the relay's thread."""

    __slots__ = ("_idle", "_live", "_timer", "account", "done", "loop", "moved", "owner", "watched")

    def __init__(self, loop: Loop, live: set[Pair], idle: float, owner: PairOwner) -> None:
        self.loop = loop
        self.account = Account(loop.now)
        self.done = False
        self.moved = loop.now  # when a byte moved last
        self.watched = False  # its sockets have TCP keep-alive
        self._live = live
        self.owner = owner
        self._idle = idle
        live.add(self)
        self._timer: Timer | None = loop.after(idle, self._idle_check) if idle else None

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The pair's sockets; a stream has none of its own."""
        raise NotImplementedError

    def abort(self, ending: Ending) -> None:
        """Reset both sides, and call the owner's `ended`. No effect on a pair that is done."""
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
        self.end = False  # the FIN is passed on; nothing moves any more
        self._may_splice = source.can_splice and sink.can_splice
        self._held: bytes | memoryview = first  # read, and not taken by the sink
        self._memory = pair.scratch.memory
        if first:
            self._memory.hold(len(first))
        self._pipe: tuple[int, int] | None = None
        self._in_pipe = 0
        self._queued = False

    @property
    def holds(self) -> bool:
        """Whether there are bytes that the sink has not taken."""
        return bool(self._held or self._in_pipe)

    def run(self) -> None:
        """Move bytes until the source has none, the sink takes none, or QUANTUM is used up."""
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
            if self._held:  # the sink took a part: its OUT event goes on
                if not pair.done:
                    self.sink.await_room()
                return
            budget -= size
        if self.readable and not self.end and not self._queued and not pair.done:
            self._queued = True
            pair.loop.soon(self.run)

    def _read(self) -> int:
        """Read from the source, and copy on or into the pipe.

        Return the number of bytes; -1 when the flow or the pair has ended. Raises OSError of the
        source.
        """
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
        """Give bytes to the sink, and hold what it does not take."""
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
        """Give the sink what is held. Return whether it took all. Raises OSError of the sink."""
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
        if not self._pair.ends():  # else the pair has closed the sockets, which sends the FIN
            try:
                self.sink.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._pair.lost(self.sink)
        return -1

    def copy_only(self) -> None:
        """Splice no more: splice(2) never gets past urgent data (tcp_splice_read)."""
        self._may_splice = False

    def _release_pipe(self) -> None:
        """Give an empty pipe back. Pipes are few, and for flows that move much."""
        if self._pipe is not None and not self._in_pipe:
            self._pair.pipes.give(self._pipe, empty=True)
            self._pipe = None

    def drop(self) -> None:
        """Release what the flow holds: the pair is done."""
        if self._pipe is not None:
            self._pair.pipes.give(self._pipe, empty=not self._in_pipe)
            self._pipe = None
        if self._held:
            self._memory.release(len(self._held))
            self._held = b""


class SocketPair(Pair):
    """A pair of two sockets."""

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
        # Bytes that handlers wrote are sent and counted by the flows, but are none of the peers':
        # so the account begins below zero.
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
        # HUP without an error comes with the second FIN: the flows then run to their ends by
        # themselves.
        if mask & LOST and not self.done and reads.source.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.lost(reads.source)

    def ends(self) -> bool:
        """End the pair if both directions have ended; return whether it is done."""
        if self.upward.end and self.downward.end:
            self._close(Ending.CLOSED)
        return self.done

    def lost(self, end: SocketEnd) -> None:
        """Reset both sockets, because the one of `end` failed."""
        self.abort(Ending.CLIENT_RESET if end is self.client else Ending.TARGET_RESET)

    @override
    def abort(self, ending: Ending) -> None:
        if not self.done:
            self.client.reset_on_close()
            self.target.reset_on_close()
            self._close(ending)

    def _close(self, ending: Ending) -> None:
        self.upward.drop()
        self.downward.drop()
        for end in (self.client, self.target):
            end.closed = True
            self.loop.close(end.sock)
        self._finish(ending)


class StreamPair(Pair):
    """A pair of a socket and a stream. `out` is towards the stream, `back` towards the socket."""

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
        self._out_ended = False  # the socket's FIN is passed on to the stream
        self._back_ended = False  # the stream's FIN is passed on to the socket
        self._waits = False  # in `link.waiting`
        self._queued = False  # `_run_out` is in the run queue
        unread = stream.hand_over(self)
        words = end.hand_over(self._event)
        # As in SocketPair: bytes that handlers wrote are not the stream's.
        if socket_is_client:
            self.account.down -= len(words)
        else:
            self.account.up -= len(words)
        self._held = bytearray(words + back)  # for the socket
        self._send_held_first(unread)
        if out and not self.done:
            stream.link.write(stream.frame(out))
            self._count_out(len(out))
        if not self.done:
            self._run_out()

    @override
    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self._socket.sock,)

    def _send_held_first(self, unread: bytes) -> None:
        """Send what handlers wrote, then the backlog, then the stream's FIN, all by one queue."""
        if self._held:
            self._stream.consumed(-len(self._held))  # they used no window up
        self._held += unread
        if self._held:
            self._stream.link.hold(len(self._held))
            self.flush()
        elif self._stream.eof:
            self.stream_fin()

    # Out: socket -> stream.

    def _run_out(self) -> None:
        """Read the socket behind room for a frame's header, and send both."""
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
                return  # `stream_window` goes on
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
                self._end_if_both_ended()
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
            self._queue()  # the link's read calls this, and has its own share of a turn

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
        """Give the socket what is held, then the stream's FIN if it is due."""
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
        self._end_if_both_ended()
        if not self.done:  # else the pair has closed the socket, which sends the FIN
            try:
                self._socket.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._socket_lost()

    # Both directions.

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
        """End the pair if the socket has an error; HUP without one comes with the second FIN."""
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

    def _end_if_both_ended(self) -> None:
        if self._out_ended and self._back_ended:
            self._close(Ending.CLOSED)

    def _socket_lost(self) -> None:
        if not self.done:
            # A FIN without close_notify is such a loss: the socket could still say an orderly end
            # to its peer.
            self._socket.reset_on_close()
            self._stream.reset()
            self._close(Ending.CLIENT_RESET if self._is_client else Ending.TARGET_RESET)

    def stream_lost(self, lost: Lost) -> None:
        if self.done:
            return
        self._socket.reset_on_close()
        if lost.kind is LostKind.LINK_LOST:
            self._close(Ending.LINK_LOST)
        else:
            self._close(Ending.TARGET_RESET if self._is_client else Ending.CLIENT_RESET)

    @override
    def abort(self, ending: Ending) -> None:
        if not self.done:
            self._socket.reset_on_close()
            self._stream.reset()
            self._close(ending)

    def _close(self, ending: Ending) -> None:
        if self._held:
            self._stream.link.release(len(self._held))
            self._held.clear()
        self._socket.closed = True
        self._stream.pair = None
        self._stream.closed = True
        self.loop.close(self._socket.sock)
        self._finish(ending)
