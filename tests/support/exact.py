"""Streams whose content both ends know to the byte: a target, and clients that check everything.

One exchange is one connection. The client sends a head (its number, the two sizes) and then the
upload; the target sends the download at once, and a receipt when the upload is complete. Every
other client shuts its sending side after the upload. Both ends compare each byte that arrives with the
byte that this stream has at this place; so a byte that is lost, doubled, changed, or of another
stream is found where it happens. A connection may be cut by a reset, and then the bytes before it
must be right; an orderly end before the last byte is damage.

    support.exact target PORT                       prints a line for each damaged stream
    support.exact client STREAMS LONG WAY ...

A WAY is open=IP:PORT or socks=IP:PORT=TARGET_IP:PORT.

The client prints one JSON object (`Outcome`), and ends with status 0 whatever it found.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, NoReturn

from bench.load import Address, Way

Piece = bytes | memoryview

MAGIC: Final = b"exact.1\n"
#: Magic, number of the stream, bytes of the upload, bytes of the download.
HEAD: Final = struct.Struct("!8sQQQ")
#: Magic, number of the stream, bytes of the upload that came.
RECEIPT: Final = struct.Struct("!8sQQ")

UP, DOWN = 0, 1
#: All content is cut out of one noise. The length is a prime: every stream begins at a place of its
#: own, and no power of two is a whole number of rounds.
PERIOD: Final = (1 << 20) - 3
_STEP: Final = 404_273
#: Bytes of one call, either way.
CHUNK: Final = 64 << 10
_NOISE: Final = memoryview(random.Random("rtunnel").randbytes(PERIOD) * 2)

#: Sizes of short streams. A relay has lost frames of 20 KB that came behind small ones; the others
#: lie around the product's borders: frames that wait for company (4 KiB), one read, one window.
SHORT_SIZES: Final = (0, 1, 100, 4_095, 4_097, 5_000, 20_000, 20_000, 20_000, 16_385, 65_537)
LONG_SIZE: Final = 2 << 20
#: Short streams at once. Long ones run beside them, all at once.
AT_ONCE: Final = 48
#: Seconds without a byte in either direction after which an exchange counts as stuck.
PATIENCE: Final = 30.0
#: After so many faults the load stops: the verdict will not change.
ENOUGH: Final = 50

_GREETING: Final = b"\5\1\0"
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_RESET: Final = struct.pack("ii", 1, 0)


class Damaged(Exception):
    """Bytes arrived that were not sent, or an orderly end came before the last byte. Says where."""


def _start(number: int, direction: int) -> int:
    return (2 * number + direction) * _STEP % PERIOD


def content(number: int, direction: int, size: int) -> Iterator[memoryview]:
    """All of one direction of a stream, in pieces of CHUNK at most."""
    at = _start(number, direction)
    for offset in range(0, size, CHUNK):
        begin = (at + offset) % PERIOD
        yield _NOISE[begin : begin + min(CHUNK, size - offset)]


class Incoming:
    """Compares one direction of a stream, as it arrives, with what it must be."""

    def __init__(self, number: int, direction: int, size: int) -> None:
        self.number = number
        self.direction = direction
        self.size = size
        self.got = 0

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self.size - self.got

    def take(self, data: memoryview) -> None:
        """Compare `data`, at most `left` bytes. Raises Damaged."""
        while data:
            begin = (_start(self.number, self.direction) + self.got) % PERIOD
            size = min(len(data), CHUNK)
            if data[:size] != _NOISE[begin : begin + size]:
                raise Damaged(self._describe(data[:size], _NOISE[begin : begin + size]))
            self.got += size
            data = data[size:]

    def ended(self) -> Damaged:
        """The fault of an orderly end that comes too early."""
        return Damaged(f"{self} ended in order after {self.got} of {self.size} bytes")

    def _describe(self, data: memoryview, due: memoryview) -> str:
        same = next((n for n, (a, b) in enumerate(zip(data, due, strict=True)) if a != b), len(data))
        at = self.got + same
        place = bytes(_NOISE).find(bytes(data[same : same + 24]))
        ahead = (place - _start(self.number, self.direction)) % PERIOD - at % PERIOD
        if place < 0:
            what = "these bytes are of no stream"
        elif 0 < ahead <= self.size - at:
            what = f"{ahead} bytes are missing there"
        else:
            what = "these bytes have another place, or are another stream's"
        return f"{self}: byte {at} of {self.size} is wrong: {what}"

    def __str__(self) -> str:
        return f"the {('upload', 'download')[self.direction]} of stream {self.number}"


class Loop:
    """An epoll loop; each descriptor has one handler, which gets the event mask."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        """Call the handler for these events from now on."""
        if fd not in self._masks:
            self._epoll.register(fd, mask)
        elif self._masks[fd] != mask:
            self._epoll.modify(fd, mask)
        self._masks[fd] = mask
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """No more events of this descriptor, which is about to be closed."""
        self._epoll.unregister(fd)
        del self._handlers[fd], self._masks[fd]

    def turn(self, seconds: float) -> None:
        """Wait so long for events, and handle them."""
        for fd, mask in self._epoll.poll(seconds):
            if (handler := self._handlers.get(fd)) is not None:
                handler(mask)


class Exchange:
    """One end of one connection. A subclass says what it does with the bytes that arrive."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = loop
        self.moved = time.monotonic()
        self.closed = False
        self._out: deque[Iterator[Piece]] = deque()
        self._rest: Piece = b""
        self._shut = False
        self._deaf = False
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def received(self, data: memoryview) -> None:
        """Take bytes that arrived. Raises Damaged."""
        raise NotImplementedError

    def eof(self) -> None:
        """Take the other side's orderly end. Raises Damaged."""
        raise NotImplementedError

    def failed(self, why: str, *, damage: bool) -> None:
        """The connection is over: content was wrong (`damage`), or it was cut."""
        raise NotImplementedError

    def over(self) -> None:
        """Called once, when the socket is closed."""

    def send(self, pieces: Iterable[Piece], *, last: bool = False) -> None:
        """Send these after what waits already; `last`: then shut the sending side."""
        self._out.append(iter(pieces))
        self._shut = self._shut or last

    def finish(self) -> None:
        """Read no more; close when everything is sent."""
        self._deaf = True

    def handle(self, mask: int) -> None:
        """The handler of the socket's events."""
        try:
            if mask & _OUT:
                self._pump()
            if mask & ~_OUT and not self._deaf:
                self._read()
            if self._deaf and not self._waiting:
                self.close()
            if not self.closed:
                mask = (0 if self._deaf else _IN) | (_OUT if self._waiting else 0)
                self.loop.watch(self.sock.fileno(), mask, self.handle)
        except Damaged as error:
            self.close(abort=True)
            self.failed(str(error), damage=True)
        except OSError as error:
            self.close(abort=True)
            self.failed(error.strerror or str(error), damage=False)

    def close(self, *, abort: bool = False) -> None:
        """Close the socket, with a reset if `abort`."""
        if not self.closed:
            self.closed = True
            self.loop.forget(self.sock.fileno())
            self.over()
            if abort:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.sock.close()

    @property
    def _waiting(self) -> bool:
        return bool(self._rest or self._out)

    def _pump(self) -> None:
        """Send until the kernel takes no more, or for a few calls: others wait for their turn."""
        for _ in range(4):
            while not self._rest and self._out:
                self._rest = next(self._out[0], b"")
                if not self._rest:
                    self._out.popleft()
            if not self._rest:
                break
            try:
                sent = self.sock.send(self._rest)
            except BlockingIOError:
                return
            self.moved = time.monotonic()
            self._rest = self._rest[sent:]
        if self._shut and not self._waiting:
            self._shut = False
            self.sock.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        try:
            data = self.sock.recv(CHUNK)
        except BlockingIOError:
            return
        self.moved = time.monotonic()
        if data:
            self.received(memoryview(data))
        else:
            self.eof()


# --- the target ---------------------------------------------------------------------------------------------------


class _Served(Exchange):
    """The target's end of an exchange."""

    def __init__(self, target: Target, sock: socket.socket) -> None:
        super().__init__(target.loop, sock)
        self._target = target
        self._head = b""
        self._upload: Incoming | None = None
        target.serving.add(self)

    def over(self) -> None:
        self._target.serving.discard(self)

    def received(self, data: memoryview) -> None:
        if self._upload is None:
            data = self._begin(data)
        upload = self._upload
        if upload is None:
            return
        if len(data) > upload.left:
            raise Damaged(f"{upload}: {len(data) - upload.left} bytes more than {upload.size}")
        before = upload.left
        upload.take(data)
        if before and not upload.left:
            self._confirm(upload)

    def _begin(self, data: memoryview) -> memoryview:
        """Read the head, and start the download; the bytes after the head."""
        missing = HEAD.size - len(self._head)
        self._head += bytes(data[:missing])
        if len(self._head) == HEAD.size:
            magic, number, up, down = HEAD.unpack(self._head)
            if magic != MAGIC:
                raise Damaged(f"a stream began with {self._head!r}")
            self._upload = Incoming(number, UP, up)
            self.send(content(number, DOWN, down))
            if not up:
                self._confirm(self._upload)
        return data[missing:]

    def _confirm(self, upload: Incoming) -> None:
        self.send([RECEIPT.pack(MAGIC, upload.number, upload.got)], last=True)

    def eof(self) -> None:
        if self._upload is None and self._head:
            raise Damaged(f"a stream ended in order after {self._head!r}")
        if self._upload is not None and self._upload.left:
            if self._target.may_be_killed:
                raise ConnectionResetError(errno.ECONNRESET, "ended early")
            raise self._upload.ended()
        self.finish()  # the client has everything, waits for the rest, or never spoke (a hedged dial)

    def failed(self, why: str, *, damage: bool) -> None:
        if damage:
            self._target.report(why)


class Target:
    """Serves exchanges for ever; `report` gets one sentence for each damaged upload.

    `may_be_killed`: the process that dials may get SIGKILL. The kernel then ends its connections in
    order, so an early end says nothing.
    """

    def __init__(self, listener: socket.socket, report: Callable[[str], None], *, may_be_killed: bool = False) -> None:
        self.loop = Loop()
        self.report = report
        self.may_be_killed = may_be_killed
        self.serving: set[Exchange] = set()
        self._listener = listener
        listener.setblocking(False)
        self.loop.watch(listener.fileno(), _IN, self._accept)

    def run(self) -> NoReturn:
        """Serve for ever."""
        while True:
            self.loop.turn(-1)

    def close(self) -> None:
        """Reset what is still served."""
        for served in list(self.serving):
            served.close(abort=True)
        self.loop.close()

    def _accept(self, _mask: int) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            served = _Served(self, sock)
            self.loop.watch(sock.fileno(), _IN, served.handle)


# --- the clients --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One exchange that a client will do."""

    number: int
    up: int
    down: int
    half_close: bool
    way: Way


@dataclass
class Outcome:
    """What a load has found. `faults`: damaged or stuck streams; `cut`: connections refused or reset."""

    whole: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Asked(Exchange):
    """The client's end of an exchange."""

    def __init__(self, load: Load, job: Job) -> None:
        sock = socket.socket()
        super().__init__(load.loop, sock)
        self.job = job
        self._load = load
        self._download = Incoming(job.number, DOWN, job.down)
        self._receipt = b""
        #: Bytes of each SOCKS5 reply that must come before the exchange begins.
        self._replies = deque([2, 10] if job.way.socks else [])
        self._reply = b""

    def begin(self) -> None:
        """Dial."""
        code = self.sock.connect_ex(self.job.way.address)
        self.loop.watch(self.sock.fileno(), _OUT, self.handle)
        if self.job.way.socks:
            self.send([_GREETING])
        else:
            self._speak()
        if code not in (0, errno.EINPROGRESS):
            self.close()
            self.failed(os.strerror(code), damage=False)

    def _speak(self) -> None:
        job = self.job
        self.send([HEAD.pack(MAGIC, job.number, job.up, job.down)])
        self.send(content(job.number, UP, job.up), last=job.half_close)

    def received(self, data: memoryview) -> None:
        if self._replies:
            data = self._negotiate(data)
        mine = data[: self._download.left]
        self._download.take(mine)
        self._receipt += bytes(data[len(mine) :])
        if len(self._receipt) > RECEIPT.size:
            raise Damaged(f"{self._download}: {len(self._receipt) - RECEIPT.size} bytes after the receipt")

    def _negotiate(self, data: memoryview) -> memoryview:
        """Take SOCKS5 replies; the bytes after the last one."""
        while data and self._replies:
            missing = self._replies[0] - len(self._reply)
            self._reply += bytes(data[:missing])
            data = data[missing:]
            if len(self._reply) < self._replies[0]:
                break
            if self._reply[1]:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"SOCKS reply {self._reply[1]}")
            self._replies.popleft()
            self._reply = b""
            if self._replies:
                self.send([self.job.way.request])
            else:
                self._speak()
        return data

    def eof(self) -> None:
        if self._replies:
            raise ConnectionResetError(errno.ECONNRESET, "closed during the SOCKS5 negotiation")
        if self._download.left or len(self._receipt) < RECEIPT.size:
            raise self._download.ended()
        if self._receipt != RECEIPT.pack(MAGIC, self.job.number, self.job.up):
            raise Damaged(f"stream {self.job.number}: this is not its receipt: {self._receipt!r}")
        self.finish()
        self._load.whole(self)

    def failed(self, why: str, *, damage: bool) -> None:
        kind = "SOCKS5" if self.job.way.socks else "open port"
        self._load.broken(self, f"{kind}, {self.job.up} up, {self.job.down} down: {why}", damage=damage)

    def give_up(self) -> None:
        """Count this exchange as stuck."""
        received = f"{self._download.got} of {self.job.down} bytes and {len(self._receipt)} of the receipt came"
        self.close(abort=True)
        self.failed(f"stream {self.job.number} is stuck: {received}", damage=True)


class Load:
    """Does jobs, `at_once` of them at a time, in one thread. A failed one is not tried again."""

    def __init__(self, jobs: Iterable[Job], at_once: int) -> None:
        self.loop = Loop()
        self.outcome = Outcome()
        self._jobs = iter(jobs)
        self._more = True
        self._at_once = at_once
        self._running: set[_Asked] = set()
        self._looked = time.monotonic()

    def run(self) -> Outcome:
        """All jobs to their end, or until ENOUGH of them have failed."""
        began = time.monotonic()
        while self.turn() and len(self.outcome.faults) + len(self.outcome.cut) < ENOUGH:
            pass
        self.stop()
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def turn(self) -> bool:
        """Start what may start, and wait up to 0.2 s for events. False when everything is done."""
        while self._more and len(self._running) < self._at_once:
            self._begin()
        self.loop.turn(0.2)
        now = time.monotonic()
        if now - self._looked > 1:
            self._looked = now
            for asked in [a for a in self._running if now - a.moved > PATIENCE]:
                asked.give_up()
        return self._more or bool(self._running)

    def _begin(self) -> None:
        job = next(self._jobs, None)
        self._more = job is not None
        if job is not None:
            asked = _Asked(self, job)
            self._running.add(asked)
            asked.begin()

    def stop(self) -> None:
        """Reset what is still under way: an orderly end would look like lost bytes."""
        for asked in self._running:
            asked.close(abort=True)
        self._running.clear()
        self.loop.close()

    def whole(self, asked: _Asked) -> None:
        """An exchange has ended as it must."""
        self._running.discard(asked)
        self.outcome.whole += 1
        self.outcome.bytes += asked.job.up + asked.job.down

    def broken(self, asked: _Asked, why: str, *, damage: bool) -> None:
        """An exchange has failed."""
        self._running.discard(asked)
        (self.outcome.faults if damage else self.outcome.cut).append(why)


def short_jobs(ways: Sequence[Way], first: int = 0) -> Iterator[Job]:
    """Yield short exchanges for ever, over all ways in turn; always the same ones for one `first`."""
    chance = random.Random(first)
    number = first
    while True:
        up, down = chance.choice(SHORT_SIZES), chance.choice(SHORT_SIZES)
        yield Job(number, up, down, bool(chance.getrandbits(1)), ways[number % len(ways)])
        number += 1


def long_jobs(ways: Sequence[Way], first: int, count: int, size: int = LONG_SIZE) -> Iterator[Job]:
    """Long exchanges: `size` bytes and a bit in both directions at once."""
    for number in range(first, first + count):
        yield Job(number, size + number % 1000, size - number % 777, number % 2 == 0, ways[number % len(ways)])


#: Long streams have numbers of their own.
FIRST_LONG: Final = 500_000


def run_load(ways: Sequence[Way], streams: int, long: int) -> Outcome:
    """Do so many short exchanges, AT_ONCE at a time, beside so many long ones, all at once."""
    short = short_jobs(ways)
    jobs = (*long_jobs(ways, FIRST_LONG, long), *(next(short) for _ in range(streams)))
    return Load(jobs, long + AT_ONCE).run()


def _address(text: str) -> Address:
    ip, _, port = text.rpartition(":")
    return ip, int(port)


def _way(word: str) -> Way:
    kind, _, rest = word.partition("=")
    address, _, target = rest.partition("=")
    return Way(_address(address), _address(target or address), socks=kind == "socks")


def main() -> None:
    """See the module."""
    verb, *words = sys.argv[1:]
    if verb == "target":
        listener = socket.create_server(("", int(words[0])), backlog=1024)
        Target(listener, lambda why: print(why, flush=True)).run()
    outcome = run_load([_way(word) for word in words[2:]], int(words[0]), int(words[1]))
    print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
