"""A simulated kernel for the relay: TCP connections, pipes and edge-triggered epoll, all of it decided by a tape.

The relay runs unchanged on it: `SimSocket` replaces `socket.socket`, `SimEpoll` the poller of a `Loop`, and
`Kernel.installed` the few calls of `os` that splice. Nothing happens between two calls unless the test asks for it:
bytes move by `deliver`, the loop moves by `Loop.turn`. How much one call takes or gives is the tape's choice, within
what Linux does:

- `send` takes some bytes, or none (EAGAIN). After less than all an edge for room to write follows.
- `recv` gives all that was delivered, up to its size: a short read has drained the socket (epoll(7)). Smaller pieces
  come from smaller deliveries. The exception is urgent data in line: a read stops in front of it (tcp(7)).
- An edge says "something happened"; the mask is the state at the time of the poll (ep_send_events).
- RST throws away what the sender had not delivered. The receiver still reads what it has, then ECONNRESET once, then
  the end (tcp_reset): a reset that is noticed once and forgotten looks like an orderly end.
- `close` with unread bytes sends RST instead of FIN, and bytes that reach a closed socket are answered with RST.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from rtunnel.relay import socketpair, tls
from rtunnel.relay.tls import TlsSocket

#: Descriptors of simulated pipes: no real one is as large.
_FIRST_PIPE: Final = 1 << 24


class Choices:
    """Decisions read from a tape; when it is used up (`over`), the first choice each time."""

    def __init__(self, tape: bytes) -> None:
        self._tape = tape
        self._position = 0

    @property
    def over(self) -> bool:
        """The tape is used up."""
        return self._position >= len(self._tape)

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1; one byte of the tape, two for large bounds."""
        if bound <= 1 or self.over:
            return 0
        size = 1 if bound <= 256 else 2
        value = int.from_bytes(self._tape[self._position : self._position + size], "big")
        self._position += size
        return value % bound

    def amount(self, most: int) -> int:
        """From 1 to `most`: often all, often one, sometimes anything; all when the tape is over."""
        kind = self.below(4)
        if most <= 1 or kind <= 1:
            return most
        return 1 if kind == 2 else 1 + self.below(most)


class Side:
    """One end of a simulated connection. `other` is the far end."""

    def __init__(self, kernel: Kernel, capacity: int) -> None:
        self.kernel = kernel
        self.capacity = capacity  # bytes, of `sent` and of `unread` each
        self.other: Side
        self.fd = -1  # -1: a scripted peer, which nobody polls
        self.unread = bytearray()
        self.sent = bytearray()  # taken from the application, not delivered yet
        self.urgent = -1  # where in `unread` a read stops; -1: nowhere
        self.urgent_sent = -1  # the same in `sent`
        self.fin = False  # this end sends no more
        self.fin_delivered = False
        self.saw_fin = False  # the other end sends no more
        self.rst = False  # this end has sent RST; it is not delivered yet
        self.dead = False  # reset
        self.error = 0  # told once
        self.closed = False
        self.linger_zero = False
        self.wants_room = False

    # What a process calls.

    def recv(self, size: int) -> bytes:
        """As recv(2). Raises BlockingIOError, or the pending error."""
        if self.unread:
            if self.urgent > 0:
                size = min(size, self.urgent)
            data = bytes(self.unread[:size])
            del self.unread[:size]
            self.urgent = self.urgent - len(data) if self.urgent >= len(data) > 0 else -1
            return data
        if self.saw_fin:
            return b""  # SOCK_DONE comes before an error
        self._tell_error()
        if self.dead:
            return b""
        raise BlockingIOError(errno.EAGAIN, "would block")

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """As send(2). Raises BlockingIOError, or the pending error."""
        self._tell_error()
        if self.dead or self.fin:
            raise BrokenPipeError(errno.EPIPE, "broken pipe")
        room = self.capacity - len(self.sent)
        if room <= 0 or self.kernel.choices.below(8) == 7:
            self.wants_room = True
            raise BlockingIOError(errno.EAGAIN, "would block")
        size = min(room, len(data))
        size = self.kernel.choices.amount(size)
        if size < len(data):
            self.wants_room = True
        self.sent += memoryview(data)[:size]
        return size

    def send_urgent(self, byte: bytes) -> None:
        """One byte as urgent data, in line at the other end."""
        if not self.dead and not self.fin:
            self.urgent_sent = len(self.sent)
            self.sent += byte

    def shut(self) -> None:
        """As shutdown(2) with SHUT_WR."""
        if self.dead:
            raise OSError(errno.ENOTCONN, "not connected")
        if not self.fin:
            self.fin = True
            self.wake()

    def close(self) -> None:
        """As close(2)."""
        if self.closed:
            return
        self.closed = True
        self.fd = -1
        if self.dead:
            return
        if self.linger_zero or self.unread:
            self.reset()
        self.fin = True

    def reset(self) -> None:
        """Send RST; what was not delivered is lost."""
        if not self.dead:
            self.dead = self.rst = True
            self.sent.clear()

    def _tell_error(self) -> None:
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))

    # What the network does.

    @property
    def deliverable(self) -> bool:
        """There is something on its way from here to the other end."""
        other = self.other
        if self.rst:
            return True
        if self.dead or (other.dead and not self.sent):
            return False
        if self.sent:
            return other.dead or other.closed or len(other.unread) < other.capacity
        return self.fin and not self.fin_delivered

    def deliver(self, most: int = 1 << 30) -> None:
        """Bring up to `most` bytes (or the FIN, or the RST) to the other end."""
        other = self.other
        if self.rst:
            self.rst = False
            other.was_reset()
        elif self.sent and not self.dead:
            if other.dead or other.closed:
                other.dead = True
                other.sent.clear()
                self.was_reset()
                return
            size = min(most, len(self.sent), other.capacity - len(other.unread))
            if 0 <= self.urgent_sent < size:
                other.urgent = len(other.unread) + self.urgent_sent
            self.urgent_sent = max(-1, self.urgent_sent - size)
            other.unread += self.sent[:size]
            del self.sent[:size]
            other.wake()
        fin_is_next = not self.sent and self.fin and not self.fin_delivered and not self.dead and not other.dead
        if fin_is_next and self.kernel.choices.below(2) == 0:  # with the last bytes, or later
            self.fin_delivered = True
            other.saw_fin = True
            other.wake()
        self.make_room()

    def make_room(self) -> None:
        """Tell the application that it may write again, if it waits for that and there is room."""
        if self.wants_room and self.writable:
            self.wants_room = False
            self.wake()

    @property
    def writable(self) -> bool:
        """A third is free (sk_stream_is_writeable)."""
        return (self.capacity - len(self.sent)) * 3 >= self.capacity

    def forge_fin(self) -> None:
        """Somebody on the way sends FIN to the other end in this one's name, and ends this one."""
        other = self.other
        if not (self.dead or other.dead or other.saw_fin):
            other.saw_fin = True
            other.wake()
            self.was_reset()

    def was_reset(self) -> None:
        """RST has come."""
        if self.dead:
            return
        self.dead = True
        self.error = errno.EPIPE if self.saw_fin else errno.ECONNRESET
        self.sent.clear()
        self.wake()

    def wake(self) -> None:
        """An edge for whoever polls this end."""
        if self.fd >= 0:
            self.kernel.edge(self.fd)

    @property
    def mask(self) -> int:
        """What poll says of it (tcp_poll)."""
        mask = 0
        if self.dead or (self.fin and self.saw_fin):
            mask |= select.EPOLLHUP
        if self.dead or self.saw_fin:
            mask |= select.EPOLLIN | select.EPOLLRDHUP
        if self.unread:
            mask |= select.EPOLLIN
        if self.dead or self.fin or self.writable:
            mask |= select.EPOLLOUT
        else:
            self.wants_room = True
        if self.urgent >= 0:
            mask |= select.EPOLLPRI
        if self.error:
            mask |= select.EPOLLERR
        return mask


class SimPipe:
    """A pipe for splicing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()


class Kernel:
    """All connections, pipes and pollers of one world."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.sides: list[Side] = []
        self.by_fd: dict[int, Side] = {}
        self.pipes: dict[int, SimPipe] = {}
        self.pollers: list[SimEpoll] = []
        self.sockets: list[SimSocket] = []
        self.fail_pipes = False
        self._next_pipe = _FIRST_PIPE

    def deliver_all(self) -> bool:
        """Deliver all that is under way, and make room; False when nothing was."""
        moved = False
        for side in self.sides:
            if side.deliverable:
                side.deliver()
                moved = True
            side.make_room()
        return moved

    def connection(self, capacity: int) -> tuple[Side, Side]:
        """Two ends of a new one."""
        a, b = Side(self, capacity), Side(self, capacity)
        a.other, b.other = b, a
        self.sides += [a, b]
        return a, b

    def socket(self, side: Side) -> SimSocket:
        """A socket of this end, for the relay."""
        sock = SimSocket(self)
        side.fd = sock.fileno()
        self.by_fd[side.fd] = side
        return sock

    def edge(self, fd: int) -> None:
        """Something happened on a descriptor."""
        for poller in self.pollers:
            if fd in poller.interest:
                poller.edges[fd] = True

    # What `os` does for pipes.

    def pipe2(self, flags: int) -> tuple[int, int]:
        """As pipe2(2)."""
        if self.fail_pipes:
            raise OSError(errno.EMFILE, "too many open files")
        ends = self._next_pipe, self._next_pipe + 1
        self._next_pipe += 2
        self.pipes[ends[0]] = self.pipes[ends[1]] = SimPipe((4096, 65536, 1 << 20)[self.choices.below(3)])
        return ends

    def splice(self, source: int, sink: int, count: int, *, flags: int) -> int:
        """As splice(2), from a socket into a pipe or out of one."""
        if sink in self.pipes:
            pipe = self.pipes[sink]
            room = pipe.capacity - len(pipe.data)
            side = self.by_fd[source]
            if side.urgent == 0:  # tcp_splice_read stops in front of urgent data, and gives nothing
                raise BlockingIOError(errno.EAGAIN, "would block")
            if not side.unread and (side.dead or side.saw_fin or side.error):
                return len(side.recv(1))
            if room <= 0:
                raise BlockingIOError(errno.EAGAIN, "would block")
            data = side.recv(self.choices.amount(min(count, room)))
            pipe.data += data
            return len(data)
        pipe = self.pipes[source]
        if not pipe.data:
            raise BlockingIOError(errno.EAGAIN, "would block")
        size = self.by_fd[sink].send(bytes(pipe.data[:count]))
        del pipe.data[:size]
        return size

    def close_pipe(self, fd: int) -> None:
        """As close(2) on one end of a pipe."""
        del self.pipes[fd]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The relay uses these pipes and sockets."""
        fake_os = SimpleNamespace(
            pipe2=self.pipe2,
            splice=self.splice,
            close=self.close_pipe,
            O_NONBLOCK=os.O_NONBLOCK,
            O_CLOEXEC=os.O_CLOEXEC,
        )
        fake_fcntl = SimpleNamespace(fcntl=lambda *_: 0)
        with (
            mock.patch.object(socketpair, "os", fake_os),
            mock.patch.object(socketpair, "fcntl", fake_fcntl),
            mock.patch.object(tls, "TlsSocket", SimTlsSocket),
            mock.patch.object(SimSocket, "kernel", self, create=True),
        ):
            yield


class SimSocket(socket.socket):
    """A socket of a simulated connection; its descriptor is a real one that does nothing."""

    __slots__ = ()
    kernel: Kernel

    def __init__(self, *arguments: Any) -> None:
        if isinstance(arguments[0], Kernel):
            super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        else:
            super().__init__(*arguments)  # TlsSocket takes a descriptor over
        self.kernel.sockets.append(self)

    @property
    def side(self) -> Side:
        """Its end of the connection."""
        return self.kernel.by_fd[self.fileno()]

    def setblocking(self, flag: bool) -> None:
        """Simulated sockets never block."""

    def send(self, data: Any, flags: int = 0) -> int:
        return self.side.send(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        return self.side.recv(size)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        data = self.side.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        self.side.shut()

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.side.linger_zero = True

    def getsockopt(self, level: int, option: int, *size: Any) -> Any:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR)
        side = self.side
        code, side.error = side.error, 0
        return code

    def close(self) -> None:
        fd = self.fileno()
        if fd >= 0:
            self.kernel.by_fd.pop(fd).close()
            for poller in self.kernel.pollers:
                poller.interest.pop(fd, None)
                poller.edges.pop(fd, None)
        super().close()


class SimTlsSocket(TlsSocket, SimSocket):
    """TLS over a simulated connection: `super()` in TlsSocket finds SimSocket."""

    __slots__ = ()


class SimEpoll:
    """The poller of one loop."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.interest: dict[int, int] = {}
        self.edges: dict[int, bool] = {}
        kernel.pollers.append(self)

    def register(self, fd: int, mask: int) -> None:
        """As epoll_ctl(2): what is there already is an event."""
        if fd in self._kernel.by_fd:
            self.interest[fd] = mask
            self.edges[fd] = True

    def modify(self, fd: int, mask: int) -> None:
        """See `register`."""
        self.register(fd, mask)

    def poll(self, timeout: float | None = None, most: int = -1) -> list[tuple[int, int]]:
        """Some of what happened, in an order of the tape's."""
        edges = list(self.edges)
        choices = self._kernel.choices
        if len(edges) > 1:
            turn = choices.below(len(edges))
            edges = edges[turn:] + edges[:turn]
            if choices.below(4) == 3:
                edges = edges[: 1 + choices.below(len(edges))]
        events = []
        for fd in edges:
            del self.edges[fd]
            watched = self.interest[fd] | select.EPOLLHUP | select.EPOLLERR
            mask = self._kernel.by_fd[fd].mask & watched
            if mask:
                events.append((fd, mask))
        return events

    def close(self) -> None:
        """Nothing to close."""
