"""A thin line: a relay in user space with a rate, a delay and a small receive buffer.

It stands in for `tc netem`, which not every kernel has. Each connection has its own line; both
directions are alike. A sender meets what a slow path shows it: the kernel takes some bytes, then
none for a while. The line holds no more than what is on its way, so the pressure reaches the sender.

    support.line LISTEN_IP:PORT ONWARD_IP:PORT RATE DELAY BUFFER

RATE is bytes per second, DELAY seconds one way, BUFFER bytes of SO_RCVBUF.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, NoReturn

from bench.load import Address

#: Seconds between two looks at all connections. Only the listener is polled: there are few lines,
#: and a tick of 2 ms at 3 MB/s is 6 KB.
TICK: Final = 0.002
#: The largest piece that is read at once.
PIECE: Final = 64 << 10
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Shape:
    """What a line is like: bytes per second, seconds one way, bytes of SO_RCVBUF."""

    rate: float
    delay: float
    buffer: int

    @property
    def on_the_way(self) -> float:
        """Bytes that fit into the line."""
        return self.rate * self.delay + PIECE


class _Direction:
    """Carries the bytes of one socket to another one."""

    def __init__(self, shape: Shape, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.over = False
        self._shape = shape
        self._sink = sink
        self._credit = 0.0
        self._eof = False
        self._queued = 0
        self._queue: deque[tuple[float, memoryview]] = deque()

    def move(self, now: float, passed: float) -> None:
        """Read what the rate allows, write what is due. Raises OSError when either socket is dead."""
        self._credit = min(self._credit + passed * self._shape.rate, PIECE)
        with contextlib.suppress(BlockingIOError):
            self._read(now)
        with contextlib.suppress(BlockingIOError):
            self._write(now)

    def _read(self, now: float) -> None:
        if self._eof or self._credit < 1 or self._queued >= self._shape.on_the_way:
            return
        data = self.source.recv(int(self._credit))
        self._eof = not data
        self._credit -= len(data)
        self._queued += len(data)
        self._queue.append((now + self._shape.delay, memoryview(data)))

    def _write(self, now: float) -> None:
        while self._queue and self._queue[0][0] <= now:
            due, data = self._queue[0]
            if not data:
                self._queue.popleft()
                self.over = True
                self._sink.shutdown(socket.SHUT_WR)
                return
            sent = self._sink.send(data)
            self._queued -= sent
            if sent < len(data):
                self._queue[0] = (due, data[sent:])
                return
            self._queue.popleft()


class Line:
    """Listens, and leads each connection onward by a line of its own."""

    def __init__(self, listener: socket.socket, onward: Address, shape: Shape) -> None:
        self._listener = listener
        self._onward = onward
        self._shape = shape
        self._pairs: list[tuple[_Direction, _Direction]] = []
        listener.setblocking(False)
        # Accepted sockets inherit it. Set later, it would not limit the window that SYN-ACK announces.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, shape.buffer)
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._moved = time.monotonic()

    def run(self) -> NoReturn:
        """Serve for ever."""
        while True:
            self.turn(TICK if self._pairs else 1.0)

    def turn(self, seconds: float) -> None:
        """Wait so long for a connection, then move what may move."""
        if self._poll.poll(seconds * 1000):
            self._accept()
        now = time.monotonic()
        passed, self._moved = now - self._moved, now
        for pair in list(self._pairs):
            self._move(pair, now, passed)

    def close(self) -> None:
        """Reset every connection."""
        for pair in self._pairs:
            for direction in pair:
                _reset(direction.source)
        self._pairs.clear()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._shape.buffer)
        try:
            far.connect(self._onward)
        except OSError:
            far.close()
            _reset(near)
            return
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append((_Direction(self._shape, near, far), _Direction(self._shape, far, near)))

    def _move(self, pair: tuple[_Direction, _Direction], now: float, passed: float) -> None:
        try:
            for direction in pair:
                direction.move(now, passed)
        except OSError:
            self._pairs.remove(pair)
            for direction in pair:
                _reset(direction.source)
            return
        if all(direction.over for direction in pair):
            self._pairs.remove(pair)
            for direction in pair:
                direction.source.close()


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def main() -> None:
    """See the module."""
    listen, onward, rate, delay, buffer = sys.argv[1:]
    (ip, _, port), (to, _, to_port) = listen.rpartition(":"), onward.rpartition(":")
    listener = socket.create_server((ip, int(port)))
    Line(listener, (to, int(to_port)), Shape(float(rate), float(delay), int(buffer))).run()


if __name__ == "__main__":
    main()
