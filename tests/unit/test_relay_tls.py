"""TLS under an end: what holds for a joined TCP connection holds for one under TLS, byte by byte and end by end.

A tunnel is two pairs in one relay: plain client - TLS - TLS - plain target, opened by a word and an answer.
"""

from __future__ import annotations

import _ssl
import ctypes
import gc
import hashlib
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.engine import HANDSHAKE_BYTES
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.loop import Loop
from rtunnel.relay.lost import Lost
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.tls import PIECE, TlsEnd, TlsSocket
from rtunnel.relay.transport import Scratch, TlsTransport
from rtunnel.trust import pki
from rtunnel.trust.tls import client_context, dial_client_context, dial_server_context, server_context
from rtunnel.wire.messages import DIAL_ALPN
from support import plumbing
from support.owners import Recorder
from support.plumbing import (
    PATIENCE,
    TestRelay,
    close_kept,
    dial,
    kept,
    listener,
    read_all,
    read_exactly,
    reset,
    running_relay,
)

OTHERWISE = b"TLS only\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a cluster."""
    directory = tmp_path_factory.mktemp("tls") / "pki"
    pki.init(directory)
    return directory


@dataclass
class Opening:
    """The handler of both halves: waits for the other one's word, then does what comes next."""

    end: SocketEnd
    then: Callable[[SocketEnd, bytes], None]
    losses: list[str]

    def received(self, data: bytes) -> None:
        self.end.pause()
        self.then(self.end, data)

    def finished(self) -> None:
        self.losses.append("finished")

    def lost(self, lost: Lost) -> None:
        self.losses.append(str(lost))


@dataclass
class Tunnel:
    """See the module. `accounts` has the pairs that are over, `lost` what handlers heard."""

    relay: TestRelay
    server: ssl.SSLContext
    client: ssl.SSLContext
    target: socket.socket = field(default_factory=listener)
    inner: socket.socket = field(default_factory=listener)
    outer: socket.socket = field(default_factory=listener)
    deadline: float = PATIENCE
    accounts: list[Account] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.relay.do(lambda: self.relay.listen(self.inner, self._accept_inner))
        self.relay.do(lambda: self.relay.listen(self.outer, self._accept_outer))

    def _accept_outer(self, sock: socket.socket, peer: str) -> None:
        client = self.relay.end(sock, peer)
        client.pause()

        def connected(end: SocketEnd | None, *_: object) -> None:
            assert end is not None
            secured = self.relay.secure(end, self.client, alpn=DIAL_ALPN, server_name="broker.rtunnel")
            secured.set_handler(Opening(secured, joined, self.lost), self.deadline)
            secured.write(b"open")

        def joined(end: SocketEnd, data: bytes) -> None:
            assert data.startswith(b"!")
            self.relay.join(client, end, down=data[1:], owner=Recorder(self.accounts))

        host, port = self.inner.getsockname()
        self.relay.connect(host, port, 5.0, connected)

    def _accept_inner(self, sock: socket.socket, peer: str) -> None:
        end = self.relay.secure(self.relay.end(sock, peer), self.server, alpn=DIAL_ALPN, otherwise=OTHERWISE)

        def opened(end: SocketEnd, data: bytes) -> None:
            assert data.startswith(b"open")

            def connected(target: SocketEnd | None, *_: object) -> None:
                assert target is not None
                end.write(b"!")
                self.relay.join(end, target, up=data[4:], owner=Recorder(self.accounts))

            host, port = self.target.getsockname()
            self.relay.connect(host, port, 5.0, connected)

        end.set_handler(Opening(end, opened, self.lost), self.deadline)

    def open(self) -> tuple[socket.socket, socket.socket]:
        """(client, target), connected through it."""
        client = dial(self.outer.getsockname())
        return client, self.take()

    def take(self) -> socket.socket:
        self.target.settimeout(PATIENCE)
        target = kept(self.target.accept()[0])
        target.settimeout(PATIENCE)
        return target

    def over(self, pairs: int = 2) -> list[Account]:
        self.relay.settle(lambda: len(self.accounts) >= pairs)
        return self.accounts


@contextmanager
def tunnel(made: Path, deadline: float = PATIENCE) -> Iterator[Tunnel]:
    server = dial_server_context(made / "broker.pem", made / "broker.key")
    client = dial_client_context((made / "ca.pem").read_text())
    with running_relay() as relay:
        yield Tunnel(relay, server, client, deadline=deadline)


def sending(sock: socket.socket, data: bytes, *, end: bool = True) -> threading.Thread:
    """In a thread of its own, in pieces of odd sizes."""

    def send() -> None:
        sizes, at = random.Random(len(data)), 0
        while at < len(data):
            size = sizes.choice((1, 100, 16384, 70_000, MIB))
            sock.sendall(data[at : at + size])
            at += size
        if end:
            sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_bytes_pass_unchanged_both_ways(made: Path) -> None:
    """Megabytes in both directions at once, in pieces of odd sizes; counted, FINs behind the last bytes."""
    up, down = random.Random(1).randbytes(9 * MIB + 7), random.Random(2).randbytes(11 * MIB + 5)
    with tunnel(made) as here:
        client, target = here.open()
        threads = [sending(client, up), sending(target, down)]
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_all(target)), daemon=True)
        reader.start()
        assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(down).digest()
        for thread in (*threads, reader):
            thread.join(PATIENCE)
        assert hashlib.sha256(got[0]).digest() == hashlib.sha256(up).digest()
        assert [(a.up, a.down, a.ending) for a in here.over()] == [(len(up), len(down), Ending.CLOSED)] * 2
        assert not here.lost


def test_one_direction_ends_by_itself(made: Path) -> None:
    """After the client's FIN the target goes on for megabytes, and after the target's the client."""
    data = random.Random(3).randbytes(3 * MIB)
    with tunnel(made) as here:
        for first in (0, 1):
            ends = here.open()
            early, late = ends[first], ends[1 - first]
            early.sendall(b"that was all")
            early.shutdown(socket.SHUT_WR)
            assert read_all(late) == b"that was all"
            sending(late, data[:1000], end=False).join()
            assert read_exactly(early, 1000) == data[:1000]
            thread = sending(late, data)
            assert read_all(early) == data
            thread.join()
        assert {account.ending for account in here.over(4)} == {Ending.CLOSED}


@pytest.mark.parametrize("who", [0, 1], ids=["client", "target"])
@pytest.mark.parametrize("after_fin", [False, True])
def test_a_reset_is_a_reset(made: Path, who: int, after_fin: bool) -> None:
    """Whoever resets, the other gets a reset and no end; also when the other's FIN has come already."""
    with tunnel(made) as here:
        ends = here.open()
        ends[who].sendall(b"x")
        assert ends[1 - who].recv(1) == b"x"
        if after_fin:
            ends[1 - who].shutdown(socket.SHUT_WR)
            assert ends[who].recv(1) == b""
        reset(ends[who])
        with pytest.raises(ConnectionResetError):
            read_all(ends[1 - who])
        assert {a.ending for a in here.over()} == {(Ending.CLIENT_RESET, Ending.TARGET_RESET)[who]}


def fill(sock: socket.socket, most: int = 200 * MIB) -> int:
    """Send zeros until nobody takes any more; how many."""
    sock.settimeout(0.5)
    sent = 0
    try:
        while sent < most:
            sent += sock.send(bytes(MIB))
    except TimeoutError:
        pass
    sock.settimeout(PATIENCE)
    return sent


def test_a_stalled_reader_stalls_its_own_connection(made: Path) -> None:
    """Nobody reads: the sender stops after what buffers hold, others do not notice, and later all comes, with the FIN.

    The sender closes while it is stalled, so the last pieces outlive their pairs.
    """
    with tunnel(made) as here:
        client, target = here.open()
        sent = fill(target)
        assert sent < 64 * MIB
        other = here.open()
        for _ in range(100):
            other[0].sendall(b"ping")
            assert read_exactly(other[1], 4) == b"ping"
            other[1].sendall(b"pong")
            assert read_exactly(other[0], 4) == b"pong"
        target.close()
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(client)) == sent
        assert {account.ending for account in here.over()} == {Ending.CLOSED}


def test_a_stopped_relay_keeps_no_descriptor(made: Path) -> None:
    """Talking, joined, stalled, closed with something to say: at the end all are gone."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with tunnel(made) as here:
        for _ in range(20):
            for sock in here.open():
                sock.close()
        here.over(40)
        client, target = here.open()
        fill(target)
        target.close()
        client.shutdown(socket.SHUT_WR)
        dial(here.inner.getsockname())  # says nothing
        here.open()
    close_kept()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --- the handshake, and peers that are not ours -------------------------------------------------------------


def outsider(here: Tunnel, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A TLS client that is not of our making, connected to the inner port."""
    return context.wrap_socket(dial(here.inner.getsockname()), server_hostname="broker.rtunnel")


def test_a_fin_without_close_notify_is_a_reset(made: Path) -> None:
    """Anybody on the way can make a FIN: the target must not take what came for all."""
    with tunnel(made) as here, outsider(here, here.client) as client:
        client.sendall(b"openall of it?")
        target = here.take()
        assert client.recv(1) == b"!" and read_exactly(target, 10) == b"all of it?"
        client.shutdown(socket.SHUT_WR)  # Python's sends no close_notify
        with pytest.raises(ConnectionResetError):
            target.recv(1)
        assert [account.ending for account in here.over(1)] == [Ending.CLIENT_RESET]


def test_close_notify_alone_is_an_end(made: Path) -> None:
    """A peer that says close_notify and keeps its connection open has ended its direction."""
    with tunnel(made) as here, outsider(here, here.client) as client:
        client.sendall(b"open")
        target = here.take()
        assert client.recv(1) == b"!"
        client.sendall(b"last")
        rest: list[socket.socket] = []
        thread = threading.Thread(target=lambda: rest.append(client.unwrap()), daemon=True)  # waits for ours
        thread.start()
        assert read_all(target) == b"last"
        target.close()
        thread.join(PATIENCE)
        assert rest and [account.ending for account in here.over(1)] == [Ending.CLOSED]
        rest[0].close()


def test_plain_clients_are_told(made: Path) -> None:
    """Who speaks no TLS gets the word for him, in plain, and then the end."""
    with tunnel(made) as here:
        sock = dial(here.inner.getsockname())
        sock.sendall(b"\0\0\1\x57" + b"x" * 100)
        assert read_all(sock) == OTHERWISE
        assert here.lost == ["the peer does not speak TLS"]


@pytest.mark.parametrize("words", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
def test_the_handshake_has_a_deadline(made: Path, words: bytes) -> None:
    """Silence, and half a ClientHello: the deadline of the handler counts."""
    with tunnel(made, deadline=0.2) as here:
        sock = dial(here.inner.getsockname())
        sock.sendall(words)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert here.lost == ["deadline"]


def huge_hello(size: int = 120_000) -> bytes:
    """The beginning of a ClientHello of so many bytes, in whole records: OpenSSL waits for the end of it."""
    body = b"\x01" + size.to_bytes(3, "big") + b"\x03\x03" + bytes(32)
    body += bytes(60_000 - len(body))
    pieces = [body[at : at + 16_000] for at in range(0, len(body), 16_000)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("kind", ["link", "end"])
def test_a_handshake_holds_little_memory(made: Path, kind: str) -> None:
    """A peer that begins a huge ClientHello is cut off at 32 KiB, at a link port and at a guarded port."""
    ours, theirs = (kept(sock) for sock in socket.socketpair())
    ours.setblocking(False)
    theirs.setblocking(False)
    shake: Callable[[], bool]
    if kind == "link":
        shake = TlsTransport(ours, server_context(made / "broker.pem", made / "broker.key"), None).handshake
    else:
        context = dial_server_context(made / "broker.pem", made / "broker.key")
        end = TlsSocket(ours, context, Loop(lambda _: None), Scratch(), server_name=None, alpn=DIAL_ALPN)
        end.full = lambda: None
        kept(end)
        shake = end.handshake
    hello, sent, taken = huge_hello(), 0, False
    with pytest.raises(ConnectionResetError, match="the peer's TLS handshake is over 32768 bytes"):
        while sent < len(hello):
            sent += theirs.send(hello[sent : sent + 1024])
            taken = shake()
    assert not taken
    assert HANDSHAKE_BYTES <= sent <= HANDSHAKE_BYTES + 2 * 1024


def test_an_end_during_the_handshake(made: Path) -> None:
    """A client that goes away is told to the handler."""
    with tunnel(made) as here:
        for leave in (socket.socket.close, reset):
            sock = dial(here.inner.getsockname())
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            leave(sock)
        here.relay.settle(lambda: len(here.lost) == 2)
        assert sorted(here.lost)[1].startswith("the peer closed") or "reset" in sorted(here.lost)[1].lower()


def test_brokers_are_known_by_the_ca(made: Path, tmp_path: Path) -> None:
    """Another CA's broker: the client says why, and the server hears it by an alert."""
    pki.init(tmp_path / "other")
    with tunnel(made) as here:
        here.client = dial_client_context((tmp_path / "other" / "ca.pem").read_text())
        sock = dial(here.outer.getsockname())
        here.relay.settle(lambda: len(here.lost) == 2)
        assert any(why.startswith("certificate not accepted") for why in here.lost), here.lost
        assert any("unknown ca" in why for why in here.lost), here.lost
        sock.close()


def test_links_are_not_dials(made: Path) -> None:
    """Who speaks TLS for another protocol (another ALPN, or none) gets nowhere with the same certificate."""
    with tunnel(made) as here:
        none = ssl.create_default_context(cafile=made / "ca.pem")
        for number, context in enumerate((client_context(made / "ca.pem"), none), 1):
            with outsider(here, context) as client:
                client.sendall(b"open")
                assert not_answered(client)
            here.relay.settle(lambda n=number: len(here.lost) == n)  # type: ignore[misc]
        assert set(here.lost) == {"the peer speaks TLS, but not rtunnel-dial/1"}


def not_answered(client: ssl.SSLSocket) -> bool:
    """It gets nothing, whichever way the connection ends."""
    try:
        return client.recv(1) == b""
    except OSError:
        return True


def test_pieces_are_bounded(made: Path) -> None:
    """What one call takes in is what `PIECE` says, however much there is to read or to send."""
    with tunnel(made) as here:
        client, target = here.open()
        fill(target)
        ends = here.relay.do(lambda: list(here.relay.pairs))
        socks = [sock for pair in ends for sock in pair.sockets if isinstance(sock, TlsSocket)]
        assert len(socks) == 2
        for sock in socks:
            assert len(sock._pending) <= PIECE + 1024 and sock._engine._incoming.pending <= PIECE + 1024
        client.close()


def test_memory_does_not_wait_for_the_collector(made: Path) -> None:
    """What is over is gone, OpenSSL's buffers first, with the garbage collector switched off."""
    gc.collect()
    gc.disable()
    try:
        with tunnel(made) as here:
            for _ in range(5):
                client, target = here.open()
                client.close()
                assert target.recv(1) == b""
                target.close()
            here.over(10)
            here.relay.do(lambda: None)  # the turn in which the last ones are buried is over
            assert not [found for found in gc.get_objects() if isinstance(found, ssl.SSLObject)]
    finally:
        gc.enable()


def test_tls_ends_are_not_spliced(made: Path) -> None:
    """Descriptors have only the encrypted bytes."""
    assert SocketEnd.can_splice and not TlsEnd.can_splice


class SecuredEntry(plumbing.Tunnel):
    """A tunnel through a link whose clients speak TLS, and begin with "open"."""

    def __init__(self, near: TestRelay, far: TestRelay, server: ssl.SSLContext) -> None:
        self._server = server
        super().__init__(near, far)

    def _accept(self, sock: socket.socket, peer: str) -> None:
        secured = self.near.secure(self.near.end(sock, peer), self._server, alpn=DIAL_ALPN)

        def opened(end: SocketEnd, _: bytes) -> None:
            stream = StreamEnd(self.near_link)
            self.near_link.attach(stream)
            stream.write(b"")
            self.near.join(end, stream, owner=Recorder(self.accounts))

        secured.set_handler(Opening(secured, opened, []), PATIENCE)


def test_a_fin_that_anybody_can_make_ends_nothing_in_order(made: Path) -> None:
    """A client under TLS whose FIN has no close_notify before it hears a reset: it has a part, and not the whole."""
    context = dial_client_context((made / "ca.pem").read_text())
    with running_relay() as near, running_relay() as far:
        here = SecuredEntry(near, far, dial_server_context(made / "broker.pem", made / "broker.key"))
        raw = dial(here.address)
        client = kept(context.wrap_socket(raw, server_hostname="broker.rtunnel", suppress_ragged_eofs=False))
        client.settimeout(PATIENCE)
        client.sendall(b"open")
        served = kept(here.target.accept()[0])
        served.settimeout(PATIENCE)
        served.sendall(b"half of it")
        assert client.recv(64) == b"half of it"
        with socket.socket(fileno=os.dup(client.fileno())) as below:
            below.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            served.recv(64)
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):  # Python's word depends on its version
            client.recv(64)


# --- key updates: bytes without an end, in which there is nothing -------------------------------------------


_OPENSSL = ctypes.CDLL(_ssl.__file__)
_SSL_AT = 24  # in CPython's PySSLSocket: behind its head, and a reference to the socket


@dataclass
class Updates:
    """A client whose handshake with `server` is done; what it says comes out of `said`."""

    tls: ssl.SSLObject
    heard: ssl.MemoryBIO
    said: ssl.MemoryBIO

    @classmethod
    def shaken(cls, made: Path, server: Any, sock: socket.socket) -> Updates:
        context = dial_client_context((made / "ca.pem").read_text())
        heard, said = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = cls(context.wrap_bio(heard, said, server_hostname="broker.rtunnel"), heard, said)
        for _ in range(4):
            with suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
            if said.pending:
                sock.sendall(said.read())
            if server.handshake():
                server.flush()
            with suppress(BlockingIOError):
                heard.write(sock.recv(1 << 16, socket.MSG_DONTWAIT))
        return client

    def update(self, count: int, *, asked: bool) -> bytes:
        """So many key updates; Python has no word for them. `asked`: the other side is to update its own, too."""
        inner = self.tls._sslobj  # type: ignore[attr-defined]
        session = ctypes.c_void_p(ctypes.c_void_p.from_address(id(inner) + _SSL_AT).value)
        for _ in range(count):
            assert _OPENSSL.SSL_key_update(session, int(asked)) == 1
            self.tls.do_handshake()
        return self.said.read()


def guarded_socket(made: Path, ours: socket.socket, loop: Any) -> TlsSocket:
    """The broker's side of a connection to a guarded port, before its handshake."""
    context = dial_server_context(made / "broker.pem", made / "broker.key")
    server = TlsSocket(ours, context, loop, Scratch(), server_name=None, alpn=DIAL_ALPN)
    server.full = lambda: None
    return server


def test_key_updates_without_end_take_nobody_elses_turn(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody who reaches a guarded port may send them before the Dial: a read ends, and goes on in a later turn."""
    ours, theirs = map(kept, socket.socketpair())
    turns: list[Any] = []
    loop: Any = SimpleNamespace(soon=turns.append, handlers={}, stopped=False)
    server = guarded_socket(made, ours, loop)
    client = Updates.shaken(made, server, theirs)
    reads = 0

    def flood(self: socket.socket, buffer: memoryview) -> int:
        nonlocal reads
        reads += 1
        assert reads < 50, "it reads for as long as there is something"
        size = len(buffer)
        while len(rest) < size:
            rest.extend(client.update(1000, asked=False))
        buffer[:] = rest[:size]
        del rest[:size]
        return size

    rest = bytearray()
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "recv_into", flood, raising=False)
        for turn in (1, 2):
            with pytest.raises(BlockingIOError):
                server.recv_into(bytearray(1000))
            assert len(turns) == turn
    client.tls.write(b"at last")
    theirs.sendall(bytes(rest) + client.said.read())
    assert server.recv(100) == b"at last"
    server._close()


def test_answers_to_key_updates_that_nobody_reads_end_the_connection(made: Path) -> None:
    """Each costs the peer 27 bytes, and us 27 bytes of memory."""
    ours, theirs = map(kept, socket.socketpair())
    loop: Any = SimpleNamespace(soon=lambda call: None, handlers={}, stopped=False)
    server = guarded_socket(made, ours, loop)
    client = Updates.shaken(made, server, theirs)
    with pytest.raises(ConnectionResetError, match="takes no answer"):
        for _ in range(60):
            theirs.sendall(client.update(1000, asked=True))
            with suppress(BlockingIOError):
                server.recv_into(bytearray(1000))
    server._close()


def test_links_do_not_hoard_answers_to_key_updates(made: Path) -> None:
    """The same on an agent's link, before it has said who it is."""
    ours, theirs = map(kept, socket.socketpair())
    ours.setblocking(False)
    context = dial_server_context(made / "broker.pem", made / "broker.key")
    server, scratch = TlsTransport(ours, context, None), Scratch()
    client = Updates.shaken(made, SimpleNamespace(handshake=server.handshake, flush=lambda: None), theirs)
    with pytest.raises(ConnectionResetError, match="takes no answer"):
        for _ in range(60):
            theirs.sendall(client.update(1000, asked=True))
            server.receive(scratch)
