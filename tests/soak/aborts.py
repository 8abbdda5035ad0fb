"""Streams that are aborted with RST, by the client and by the target, at every stage of their life.

One thread is both: it dials through the tunnel, accepts what comes out of it, and resets one of the two. The other one
must learn of it, and where bytes were under way it must see a reset and no end.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.load import Address, Way
from support.plumbing import PATIENCE, reset

GREETING: Final = b"\5\1\0"
#: What is under way when a bulk stream is reset.
BULK: Final = 1 << 20


@dataclass
class Ground:
    """Where it happens: two ways to `yard`, which we listen on, and to `walls`, which somebody else serves."""

    yard: socket.socket
    ways: tuple[Way, Way]  # SOCKS5, open port; to the yard
    walls: tuple[Way, Way]  # the same, to a target process
    refuses: Address  # nobody listens there

    def through(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """A client that is connected, and the target's end of it."""
        client = way.connect(b"!")
        served = self.accept()
        assert served.recv(1) == b"!"
        return client, served

    def accept(self) -> socket.socket:
        """What comes out of the tunnel."""
        self.yard.settimeout(PATIENCE)
        served = self.yard.accept()[0]
        served.settimeout(PATIENCE)
        return served


def ending(sock: socket.socket) -> str:
    """How this side's stream ends: "eof" or "reset". AssertionError when it does not."""
    with sock:
        sock.settimeout(PATIENCE)
        try:
            while sock.recv(1 << 16):
                pass
        except TimeoutError:
            raise AssertionError("a stream whose other side was reset goes on") from None
        except OSError:
            return "reset"
        return "eof"


# --- by the client ------------------------------------------------------------------------------------------------


def after_connect(ground: Ground, number: int) -> None:
    """Nothing was said. On an open port: somewhere in the agent's connect."""
    reset(socket.create_connection(ground.walls[number].address, PATIENCE))


def after_greeting(ground: Ground, number: int) -> None:
    """SOCKS5 only: the method is agreed on; every second time half a request follows."""
    way = ground.walls[0]
    client = socket.create_connection(way.address, PATIENCE)
    client.sendall(GREETING)
    assert client.recv(2) == b"\5\0"
    if number:
        client.sendall(way.request[:5])
    reset(client)


def after_request(ground: Ground, number: int) -> None:
    """Everything is said (an open port gets early bytes), no answer was awaited."""
    way = ground.walls[number]
    client = socket.create_connection(way.address, PATIENCE)
    client.sendall(GREETING + way.request + b"E" if way.socks else b"E")
    reset(client)


def client_just_connected(ground: Ground, number: int) -> None:
    """The first byte has arrived."""
    client, served = ground.through(ground.ways[number])
    reset(client)
    assert ending(served) == "reset"


def client_amid_download(ground: Ground, number: int) -> None:
    """Bytes from the target are under way; the target's next write or read fails."""
    client, served = ground.through(ground.ways[number])
    _push(served)
    assert client.recv(1 << 16)
    reset(client)
    assert ending(served) == "reset"


def client_amid_upload(ground: Ground, number: int) -> None:
    """Bytes to the target are under way."""
    client, served = ground.through(ground.ways[number])
    _push(client)
    assert served.recv(1 << 16)
    reset(client)
    assert ending(served) == "reset"


# --- by the target ------------------------------------------------------------------------------------------------


def target_refuses(ground: Ground, number: int) -> None:
    """A reset is the answer to the agent's SYN."""
    way = Way(ground.ways[0].address, ground.refuses, socks=True)
    with socket.create_connection(way.address, PATIENCE) as client:
        client.sendall(GREETING + way.request)
        said = b""
        while piece := client.recv(64):
            said += piece
        assert said[:4] == b"\5\0\5\5", said


def target_at_once(ground: Ground, number: int) -> None:
    """It accepts and resets: the client hears of a refusal, or of a connection that is reset."""
    way = ground.ways[number]
    client = socket.create_connection(way.address, PATIENCE)
    if way.socks:
        client.sendall(GREETING + way.request)
    reset(ground.accept())
    ending(client)


def target_just_connected(ground: Ground, number: int) -> None:
    """The first byte has arrived."""
    client, served = ground.through(ground.ways[number])
    reset(served)
    assert ending(client) == "reset"


def target_amid_download(ground: Ground, number: int) -> None:
    """Its own bytes are under way."""
    client, served = ground.through(ground.ways[number])
    _push(served)
    assert client.recv(1 << 16)
    reset(served)
    assert ending(client) == "reset"


def target_amid_upload(ground: Ground, number: int) -> None:
    """The client's bytes are under way."""
    client, served = ground.through(ground.ways[number])
    _push(client)
    assert served.recv(1 << 16)
    reset(served)
    assert ending(client) == "reset"


def _push(sock: socket.socket) -> None:
    """Send as much as is taken without waiting, BULK at most."""
    sock.setblocking(False)
    piece = memoryview(bytes(BULK))
    try:
        while piece:
            piece = piece[sock.send(piece) :]
    except BlockingIOError:
        pass


STAGES: Final[tuple[Callable[[Ground, int], None], ...]] = (
    after_connect, after_greeting, after_request, client_just_connected, client_amid_download, client_amid_upload,
    target_refuses, target_at_once, target_just_connected, target_amid_download, target_amid_upload,
)  # fmt: skip


def abort(ground: Ground, count: int) -> None:
    """So many, over all stages and both ways in turn."""
    turns = itertools.cycle(itertools.product((0, 1), STAGES))
    for _, (number, stage) in zip(range(count), turns, strict=False):
        try:
            stage(ground, number)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{stage.__name__} by {('SOCKS5', 'open port')[number]}: {error!r}") from error


# --- while the agent is dialling ----------------------------------------------------------------------------------


class Slow:
    """A target whose queue is full: a SYN is not answered, so that a dial to it lasts."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.address: Address = self._sock.getsockname()
        self._queued: list[socket.socket] = []
        for _ in range(2):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.address)
            self._queued.append(filler)

    def close(self) -> None:
        """Whoever dials gets a reset at the next SYN."""
        for sock in (*self._queued, self._sock):
            sock.close()


def begin_dial(way: Way) -> socket.socket:
    """A client whose request is whole, and unanswered."""
    client = socket.create_connection(way.address, PATIENCE)
    if way.socks:
        client.sendall(GREETING + way.request)
    return client
