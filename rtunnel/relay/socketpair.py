"""A pair of two sockets: two flows, which copy or splice. `join` has the theory of operation."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Final

from rtunnel.compat import override
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import PIECE, QUANTUM, Ending, Pair, PairOwner, Shared
from rtunnel.relay.loop import HUP, IN, LOST, OUT, URGENT

#: Bytes of a copying flow's piece while the budget of memory is used up.
SMALL_PIECE: Final = 16 * 1024
#: Bytes of a pipe, and the number of pipes. An unprivileged user has 64 MiB of them
#: (fs.pipe-user-pages-soft).
PIPE_BYTES: Final = 1024 * 1024
MAX_PIPES: Final = 48
_F_SETPIPE_SZ: Final = 1031
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


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
            account = self._pair.account
            account.down += size
            if not account.first and account.down > 0:
                account.first = self._pair.moved

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
        shared: Shared,
        client: SocketEnd,
        target: SocketEnd,
        *,
        up: bytes = b"",
        down: bytes = b"",
        idle: float = 0.0,
        owner: PairOwner,
    ) -> None:
        super().__init__(shared.loop, shared.live, idle, owner)
        self.scratch = shared.scratch
        self.pipes = shared.pipes
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
