"""A relay under test, and plain blocking sockets around it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from rtunnel.relay.ends import EndHandler, SocketEnd
from rtunnel.relay.join import Account
from rtunnel.relay.link import Handshake, Link
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from support.owners import Recorder
from support.ports import as_text, loose_ports

_T = TypeVar("_T")
PATIENCE = 10.0


class TestRelay(Relay):
    """A running relay that remembers what it reported, and runs calls from the test."""

    __test__ = False

    def __init__(self) -> None:
        self.reports: list[tuple[str, dict[str, object]]] = []
        super().__init__(lambda event, fields: self.reports.append((event, fields)))

    def do(self, call: Callable[[], _T]) -> _T:
        """Run in the relay's thread; its result."""
        box: list[_T | BaseException] = []
        done = threading.Event()

        def there() -> None:
            try:
                box.append(call())
            except BaseException as error:
                box.append(error)
            done.set()

        self.call(there)
        assert done.wait(PATIENCE), "the relay does not answer"
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    def settle(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds, looking between the relay's turns."""
        ticks = 0
        pause = threading.Event()
        while not self.do(condition):
            pause.wait(0.005)
            ticks += 1
            assert ticks < PATIENCE / 0.005, "it never came"


@contextmanager
def running_relay() -> Iterator[TestRelay]:
    """Started, and stopped at the end; a crash inside it fails the test."""
    relay = TestRelay()
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()
        assert not relay.running
        crashes = [fields for event, fields in relay.reports if event == "relay_crashed"]
        assert not crashes, crashes


class Closable(Protocol):
    """A socket, or anything else that is closed."""

    def close(self) -> object: ...


_C = TypeVar("_C", bound=Closable)
_made: list[Closable] = []


def kept(opened: _C) -> _C:
    """Return it; it is closed at the end of the test by `close_kept`."""
    _made.append(opened)
    return opened


def close_kept() -> None:
    """Close what the test's helpers made."""
    while _made:
        _made.pop().close()


_next_loose = 0


def free_ports(count: int = 1) -> range:
    """Return so many ports in a row that nothing is bound to, for a test that must know them beforehand.

    The next call returns others, until all of the process's own have had their turn.
    """
    global _next_loose
    loose = loose_ports()
    for _ in range(len(loose)):
        if _next_loose + count > len(loose):
            _next_loose = 0
        ports = loose[_next_loose : _next_loose + count]
        if len(ports) == count and all(map(_is_free, ports)):
            _next_loose += count
            return ports
        _next_loose += 1
    raise AssertionError(f"no {count} ports in a row are free in {as_text(loose)}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """One of them."""
    return free_ports()[0]


def free_range(count: int) -> str:
    """Return `free_ports` as configurations have them."""
    return as_text(free_ports(count))


def refusing_port(ip: str) -> int:
    """A port where nobody listens, and nobody will while the test runs: it is bound."""
    sock = kept(socket.socket())
    sock.bind((ip, 0))
    return int(sock.getsockname()[1])


def listener() -> socket.socket:
    """A listening socket on a port that the kernel chose."""
    return kept(socket.create_server(("127.0.0.1", 0), backlog=512))


def dial(address: tuple[str, int]) -> socket.socket:
    """A blocking client."""
    sock = kept(socket.create_connection(address, timeout=PATIENCE))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Until EOF."""
    pieces = []
    while piece := sock.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or less at EOF."""
    data = bytearray()
    while len(data) < size and (piece := sock.recv(min(size - len(data), 1 << 18))):
        data += piece
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@dataclass
class Quiet:
    """A handler that notes what happens."""

    data: bytes = b""
    eof: bool = False
    why: str | None = None
    changed: threading.Event = field(default_factory=threading.Event)

    def received(self, data: bytes) -> None:
        self.data += data

    def finished(self) -> None:
        self.eof = True

    def lost(self, lost: Lost) -> None:
        self.why = str(lost)


class Tunnel:
    """Two relays, a link between them, and a way through: client -> (near) -> link -> (far) -> a target's socket."""

    def __init__(self, near: TestRelay, far: TestRelay, *, tls: tuple[object, object] | None = None) -> None:
        import ssl

        self.near, self.far = near, far
        self.accounts: list[Account] = []
        self.far_accounts: list[Account] = []
        self.downs: list[str] = []
        self._links: dict[bool, Link] = {}
        self._up = {True: threading.Event(), False: threading.Event()}
        self.target = listener()
        server, client = (None, None) if tls is None else tls
        assert server is None or isinstance(server, ssl.SSLContext)
        assert client is None or isinstance(client, ssl.SSLContext)
        with listener() as meeting:
            a = dial(meeting.getsockname())
            b = meeting.accept()[0]
        for sock, relay, is_client, context in ((a, far, True, client), (b, near, False, server)):
            sock.setblocking(False)
            relay.do(
                lambda sock=sock, relay=relay, is_client=is_client, context=context: relay.link(  # type: ignore[misc]
                    sock, self, Handshake(is_client, PATIENCE, context, "broker.rtunnel"), peer="127.0.0.1"
                )
            )
        for event in self._up.values():
            assert event.wait(PATIENCE), self.downs
        self.entry = listener()
        self.address: tuple[str, int] = self.entry.getsockname()
        near.do(lambda: near.listen(self.entry, self._accept))

    @property
    def near_link(self) -> Link:
        return self._links[False]

    @property
    def far_link(self) -> Link:
        return self._links[True]

    # LinkOwner of both ends.

    def link_up(self, link: Link) -> None:
        self._links[link.is_client] = link
        self._up[link.is_client].set()

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        handler = Quiet()
        stream.set_handler(handler)
        stream.pause()
        host, port = self.target.getsockname()[:2]

        def connected(end: SocketEnd | None, *_: object) -> None:
            if end is None:
                stream.abort()
            else:
                self.far.join(stream, end, owner=Recorder(self.far_accounts))

        self.far.connect(host, port, PATIENCE, connected)
        return handler

    def link_down(self, link: Link, lost: Lost) -> None:
        self.downs.append(str(lost))

    def _accept(self, sock: socket.socket, peer: str) -> None:
        end = self.near.end(sock, peer)
        stream = StreamEnd(self.near_link)
        self.near_link.attach(stream)
        stream.write(b"")
        self.near.join(end, stream, owner=Recorder(self.accounts))

    def through(self) -> tuple[socket.socket, socket.socket]:
        """A client and the target's end of its connection."""
        client = dial(self.address)
        self.target.settimeout(PATIENCE)
        served = kept(self.target.accept()[0])
        served.settimeout(PATIENCE)
        return client, served
