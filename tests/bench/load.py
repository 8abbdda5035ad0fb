"""The load: a target process and client processes, plain and light, because they share the cores with what is measured.

Bytes are sent with `sendfile` from a memory file and received with MSG_TRUNC, which drops them in the kernel: the
load itself copies nothing. The first byte of a connection tells the target what to do:

    E  echo everything, this byte included        U  swallow everything
    D  produce bytes until the connection ends    B  both at once

A process counts in its board; nobody has to talk with it while it works.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import socket
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, NoReturn

from bench.procs import die_with_parent

Address = tuple[str, int]
Handler = Callable[[int], None]

#: Slots of a board. Those from STREAMS on count bytes by stream.
BYTES, UNITS, ERRORS, OPEN, READY, STOP, SENT, STREAMS = range(8)
MAX_STREAMS: Final = 256

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_GONE: Final = select.EPOLLHUP | select.EPOLLERR
#: Bytes of one call, either way: beyond this the generator's own CPU time does not fall any more.
CHUNK: Final = 1 << 20
#: A turn of a connection among others.
TURN: Final = 256 << 10
_LINGER_RESET: Final = struct.pack("ii", 1, 0)
#: A load process that hears nothing for so long gives up.
PATIENCE: Final = 10


class Board:
    """Counters in shared memory: one writer each, any reader."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 8 * (STREAMS + MAX_STREAMS))
        self.slots = memoryview(self._map).cast("Q")

    def __getitem__(self, slot: int) -> int:
        return self.slots[slot]

    def streams(self, count: int) -> list[int]:
        """Bytes by stream."""
        return list(self.slots[STREAMS : STREAMS + count])


@dataclass(frozen=True)
class Way:
    """How a client reaches the target: straight to `address`, or by SOCKS5 at `address`."""

    address: Address
    target: Address
    socks: bool = False

    @property
    def request(self) -> bytes:
        """SOCKS5 CONNECT."""
        host, port = self.target
        return b"\5\1\0\1" + socket.inet_aton(host) + struct.pack(">H", port)

    def connect(self, mode: bytes) -> socket.socket:
        """A blocking connection, the mode sent. Raises OSError."""
        sock = socket.create_connection(self.address, PATIENCE)
        sock.settimeout(None)
        # Not settimeout: with it Python asks poll() before each call.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", PATIENCE, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.socks:
            sock.sendall(b"\5\1\0")
            _exactly(sock, 2)
            sock.sendall(self.request)
            reply = _exactly(sock, 10)
            if reply[1] != 0:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"SOCKS reply {reply[1]}")
        sock.sendall(mode)
        return sock


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size)
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "closed early")
        data += piece
    return data


def _bytes_to_send() -> int:
    """A memory file of CHUNK bytes that do not compress."""
    fd = os.memfd_create("bench")
    os.write(fd, os.urandom(CHUNK))
    return fd


# --- the target ---------------------------------------------------------------------------------------------------


class Target:
    """One epoll loop; handlers are closures, one per connection."""

    def __init__(self, listener: socket.socket, board: Board) -> None:
        self._listener = listener
        self._slots = board.slots
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._source = _bytes_to_send()
        self._waste = memoryview(bytearray(CHUNK))

    def run(self) -> NoReturn:
        """For ever."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), _IN)
        self._handlers[self._listener.fileno()] = self._accept
        poll, handlers = self._epoll.poll, self._handlers
        while True:
            for fd, mask in poll():
                handlers[fd](mask)

    def _accept(self, _mask: int) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._slots[OPEN] += 1
            self._watch(sock, _IN, self._first(sock))

    def _watch(self, sock: socket.socket, mask: int, handler: Handler) -> None:
        fd = sock.fileno()
        if fd in self._handlers:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def _drop(self, sock: socket.socket) -> None:
        del self._handlers[sock.fileno()]
        sock.close()
        self._slots[OPEN] -= 1

    def _first(self, sock: socket.socket) -> Handler:
        def handler(_mask: int) -> None:
            try:
                data = sock.recv(65536)
                if data[:1] == b"E":
                    sock.send(data)
            except OSError:
                data = b""
            if not data:
                self._drop(sock)
            elif data[:1] == b"E":
                self._watch(sock, _IN, self._echo(sock))
            elif data[:1] == b"U":
                self._watch(sock, _IN, self._sink(sock))
            else:
                self._watch(sock, _IN | _OUT, self._both(sock))

        return handler

    def _echo(self, sock: socket.socket) -> Handler:
        receive, send = sock.recv, sock.send

        def handler(_mask: int) -> None:
            try:
                data = receive(65536)
                if data:
                    send(data)
                    return
            except OSError:
                pass
            self._drop(sock)

        return handler

    def _sink(self, sock: socket.socket) -> Handler:
        receive, waste, slots = sock.recv_into, self._waste, self._slots

        def handler(_mask: int) -> None:
            try:
                size = receive(waste, CHUNK, socket.MSG_TRUNC)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size:
                slots[BYTES] += size
            else:
                self._drop(sock)

        return handler

    def _both(self, sock: socket.socket) -> Handler:
        sink, source, fd, slots = self._sink(sock), self._source, sock.fileno(), self._slots

        def handler(mask: int) -> None:
            if mask & (_IN | _GONE):
                sink(mask)
            elif mask & _OUT:
                try:
                    slots[SENT] += os.sendfile(fd, source, 0, TURN)
                except BlockingIOError:
                    pass
                except OSError:
                    self._drop(sock)

        return handler


def run_target(listener: socket.socket, board: Board) -> NoReturn:
    """The target's process."""
    become_a_load_process()
    Target(listener, board).run()


# --- clients: one stream ------------------------------------------------------------------------------------------


def upload(way: Way, board: Board) -> None:
    """Send as fast as it goes. What arrives counts, at the target."""
    sock, source = way.connect(b"U"), _bytes_to_send()
    fd, slots = sock.fileno(), board.slots
    slots[READY] = 1
    while not slots[STOP]:
        slots[SENT] += os.sendfile(fd, source, 0, CHUNK)
    _reset(sock)


def download(way: Way, board: Board) -> None:
    """Receive as fast as it goes."""
    sock, waste, slots = way.connect(b"D"), memoryview(bytearray(CHUNK)), board.slots
    slots[READY] = 1
    while not slots[STOP]:
        size = sock.recv_into(waste, CHUNK, socket.MSG_TRUNC)
        if not size:
            raise ConnectionResetError(errno.ECONNRESET, "the stream ended")
        slots[BYTES] += size
    _reset(sock)


def both_ways(way: Way, board: Board) -> None:
    """Send and receive on one connection."""
    sock, source, slots = way.connect(b"B"), _bytes_to_send(), board.slots
    waste, fd = memoryview(bytearray(CHUNK)), sock.fileno()
    sock.setblocking(False)
    epoll = select.epoll()
    epoll.register(fd, _IN | _OUT)
    slots[READY] = 1
    while not slots[STOP]:
        for _, mask in epoll.poll(0.2):
            if mask & (_IN | _GONE):
                with contextlib.suppress(BlockingIOError):
                    size = sock.recv_into(waste, CHUNK, socket.MSG_TRUNC)
                    if not size:
                        raise ConnectionResetError(errno.ECONNRESET, "the stream ended")
                    slots[BYTES] += size
            if mask & _OUT:
                with contextlib.suppress(BlockingIOError):
                    slots[SENT] += os.sendfile(fd, source, 0, TURN)
    _reset(sock)


def round_trips(way: Way, board: Board, size: int, samples: array[float]) -> None:
    """Ping-pong of `size` bytes; (end, duration) of each into `samples`."""
    sock, slots = way.connect(b"E"), board.slots
    _exactly(sock, 1)
    message, clock = b"x" * size, time.monotonic
    send, receive = sock.send, sock.recv
    slots[READY] = 1
    while not slots[STOP]:
        begin = clock()
        send(message)
        answer = len(receive(size))
        while answer < size:
            piece = len(receive(size - answer))
            if not piece:
                raise ConnectionResetError(errno.ECONNRESET, "the stream ended")
            answer += piece
        end = clock()
        samples.append(end)
        samples.append(end - begin)
        slots[UNITS] += 1
    sock.close()


# --- clients: many ------------------------------------------------------------------------------------------------


def parallel_downloads(way: Way, board: Board, count: int) -> None:
    """`count` streams in one process, counted each by itself."""
    slots, waste = board.slots, memoryview(bytearray(CHUNK))
    socks = [way.connect(b"D") for _ in range(count)]
    epoll = select.epoll()
    by_fd = {}
    for number, sock in enumerate(socks):
        sock.setblocking(False)
        epoll.register(sock.fileno(), _IN)
        by_fd[sock.fileno()] = (sock.recv_into, STREAMS + number)
    slots[READY] = 1
    while not slots[STOP]:
        for fd, _ in epoll.poll(0.2):
            receive, slot = by_fd[fd]
            with contextlib.suppress(BlockingIOError):
                size = receive(waste, CHUNK, socket.MSG_TRUNC)
                if not size:
                    raise ConnectionResetError(errno.ECONNRESET, "a stream ended")
                slots[slot] += size
                slots[BYTES] += size
    for sock in socks:
        _reset(sock)


def stalled_readers(way: Way, board: Board, count: int) -> None:
    """`count` streams of which nobody reads more than the first byte."""
    _hold(way, board, count, b"D")


def idle_streams(way: Way, board: Board, count: int) -> None:
    """`count` streams on which one byte went there and back, and nothing since."""
    _hold(way, board, count, b"E", b"x")


def _hold(way: Way, board: Board, count: int, work: bytes, first: bytes = b"") -> None:
    socks = []
    for _ in range(count):
        sock = way.connect(work)
        sock.sendall(first)
        sock.recv(1)
        socks.append(sock)
    board.slots[READY] = 1
    while not board.slots[STOP]:
        time.sleep(0.02)
    for sock in socks:
        _reset(sock)


class Connections:
    """`count` clients: connect, (SOCKS5,) one byte there and back, close, and again. One epoll loop."""

    def __init__(self, way: Way, board: Board, count: int, samples: array[float]) -> None:
        self._way = way
        self._slots = board.slots
        self._samples = samples
        self._epoll = select.epoll()
        #: By descriptor: the socket, when it began, what to send next, and how many bytes must come first.
        self._clients: dict[int, tuple[socket.socket, float, deque[tuple[int, bytes]]]] = {}
        for _ in range(count):
            self._begin()

    def run(self) -> None:
        """Until the board says stop."""
        poll, slots, step = self._epoll.poll, self._slots, self._step
        slots[READY] = 1
        while not slots[STOP]:
            for fd, _mask in poll(0.2):
                step(fd)
        for sock, _, _ in self._clients.values():
            _reset(sock)

    def _begin(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.monotonic()
        code = sock.connect_ex(self._way.address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        # (bytes that must come before, what is said then); the last one has nothing to say.
        script: deque[tuple[int, bytes]] = deque()
        if self._way.socks:
            script += ((0, b"\5\1\0"), (2, self._way.request), (10, b"E"), (1, b""))
        else:
            script += ((0, b"E"), (1, b""))
        self._clients[sock.fileno()] = (sock, began, script)
        self._epoll.register(sock.fileno(), _OUT)

    def _step(self, fd: int) -> None:
        sock, began, script = self._clients[fd]
        expected, words = script.popleft()
        try:
            if expected:
                got = sock.recv(expected)
                if len(got) != expected or (expected == 10 and got[1] != 0):
                    raise ConnectionResetError(errno.ECONNRESET, "refused")
            if words:
                sock.send(words)
                if not expected:
                    self._epoll.modify(fd, _IN)
                return
        except OSError:
            self._slots[ERRORS] += 1
        else:
            end = time.monotonic()
            self._samples.append(end)
            self._samples.append(end - began)
            self._slots[UNITS] += 1
        del self._clients[fd]
        sock.close()
        self._begin()


def connections(way: Way, board: Board, count: int, samples: array[float]) -> None:
    """See Connections; one client needs no epoll."""
    if count > 1:
        Connections(way, board, count, samples).run()
        return
    slots, clock = board.slots, time.monotonic
    slots[READY] = 1
    while not slots[STOP]:
        begin = clock()
        try:
            sock = way.connect(b"E")
            _exactly(sock, 1)
        except OSError:
            slots[ERRORS] += 1
            continue
        sock.close()
        end = clock()
        samples.append(end)
        samples.append(end - begin)
        slots[UNITS] += 1


def _reset(sock: socket.socket) -> None:
    """Close with a reset: what is still under way must not disturb the next measurement."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


# --- a long way ---------------------------------------------------------------------------------------------------


class Late:
    """One direction of a connection: what `source` says reaches `sink` some time later."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.over = False
        self._queue: deque[tuple[float, memoryview]] = deque()

    def read(self, due: float) -> bool:
        """Take what there is; False at its end."""
        buffer = bytearray(CHUNK)
        try:
            size = self.source.recv_into(buffer)
        except BlockingIOError:
            return True
        except OSError:
            size = 0
        self._queue.append((due, memoryview(buffer)[:size]))
        return size > 0

    def write(self, now: float) -> None:
        """Pass on what is due. The empty piece is the end."""
        queue = self._queue
        while queue and queue[0][0] <= now:
            due, data = queue[0]
            try:
                if data:
                    sent = self.sink.send(data)
                else:
                    self.over = True
                    self.sink.shutdown(socket.SHUT_WR)
                    sent = 0
            except BlockingIOError:
                return
            except OSError:
                queue.clear()
                self.over = True
                return
            if sent < len(data):
                queue[0] = (due, data[sent:])
                return
            queue.popleft()


class DelayRelay:
    """Passes connections on, every byte `delay` seconds late, either way: a long line without netem."""

    def __init__(self, listener: socket.socket, onward: Address, delay: float) -> None:
        self._listener = listener
        self._onward = onward
        self._delay = delay
        self._epoll = select.epoll()
        self._pairs: list[tuple[Late, Late]] = []
        self._readers: dict[int, Late] = {}

    def run(self) -> NoReturn:
        """For ever."""
        self._epoll.register(self._listener.fileno(), _IN)
        while True:
            for fd, _ in self._epoll.poll(0.001 if self._pairs else 1.0):
                if fd == self._listener.fileno():
                    self._accept()
                elif not self._readers[fd].read(time.monotonic() + self._delay):
                    self._epoll.unregister(fd)
            now = time.monotonic()
            for pair in list(self._pairs):
                for late in pair:
                    late.write(now)
                if pair[0].over and pair[1].over:
                    self._close(pair)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._onward)
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._epoll.register(sock.fileno(), _IN)
        pair = (Late(near, far), Late(far, near))
        self._readers |= {near.fileno(): pair[0], far.fileno(): pair[1]}
        self._pairs.append(pair)

    def _close(self, pair: tuple[Late, Late]) -> None:
        self._pairs.remove(pair)
        for late in pair:
            late.source.close()


def run_delay(listener: socket.socket, onward: Address, delay: float) -> NoReturn:
    """The delay relay's process."""
    become_a_load_process()
    DelayRelay(listener, onward, delay).run()


# --- processes ----------------------------------------------------------------------------------------------------


def become_a_load_process() -> None:
    """The terminal's Ctrl-C is the bench's affair, and so is our end."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_client(work: Callable[..., None], way: Way, board: Board, pipe: Connection, args: tuple[int, ...]) -> None:
    """A client's process: it sends what went wrong ("" for nothing), and its samples."""
    become_a_load_process()
    samples: array[float] = array("d")
    fault = ""
    try:
        work(way, board, *args, *((samples,) if work in SAMPLED else ()))
    except OSError as error:
        fault = error.strerror or str(error)
    pipe.send_bytes(fault.encode())
    pipe.send_bytes(samples.tobytes())
    os._exit(0)


#: Work that takes samples.
SAMPLED: Final[tuple[Callable[..., None], ...]] = (round_trips, connections)
