"""Links, Hellos, Dials and sessions that are made by hand, for peers that keep no rule."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from rtunnel.trust.keys import gateway_key, load_gateway_key, load_token, token_mac
from rtunnel.trust.tls import server_context
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    Challenge,
    Dial,
    DialAnswer,
    DialBody,
    Hello,
    MessageError,
    Proof,
    Refuse,
    Welcome,
    encode,
)
from support.attackers import PATIENCE, Address, Attacker, trusting
from support.cluster import Cluster, Part, in_thread
from support.messages import decoder_of
from support.plumbing import kept


class Gone(Exception):
    """The other end closed the link, or reset it."""


#: yamux as its spec has it, written again: a hostile peer shares no code with the end that it attacks.
_HEADER = struct.Struct(">BBHII")
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
#: Bytes of a stream after which its window is given back.
_GIVE_BACK = 128 * 1024


class Stream:
    """One stream of a Wire. It keeps what it gets in `data`."""

    def __init__(self, wire: Wire) -> None:
        self.id = 0
        self.data = bytearray()
        self.fin_received = False
        self.was_reset = False
        self.first_flags = 0  # go out with the next frame
        self.owed = 0
        self._wire = wire

    def frame(self, payload: bytes) -> bytes:
        """Return a Data frame. The window is not asked: an attacker does not keep it."""
        return self._header(_DATA, 0, len(payload)) + payload

    def finish(self) -> None:
        """Send FIN."""
        self._wire.sock.sendall(self._header(_DATA, _FIN, 0))

    def reset(self) -> None:
        """Send RST."""
        self._wire.sock.sendall(self._header(_WINDOW_UPDATE, _RST, 0))

    def take(self, flags: int, payload: bytes) -> None:
        """Keep what a frame brings, and give its window back now and then."""
        self.data += payload
        self.owed += len(payload)
        self.fin_received = self.fin_received or bool(flags & _FIN)
        self.was_reset = self.was_reset or bool(flags & _RST)
        if self.owed >= _GIVE_BACK and not (self.fin_received or self.was_reset):
            self._wire.sock.sendall(self._header(_WINDOW_UPDATE, 0, self.owed))
            self.owed = 0

    def _header(self, kind: int, flags: int, length: int) -> bytes:
        flags, self.first_flags = flags | self.first_flags, 0
        return _HEADER.pack(0, kind, flags, self.id, length)


class Wire:
    """One end of a link over a blocking socket, without manners: `control` is its first stream.

    `incoming` are the streams that the other end has opened; at the end of a broker the first of them is `control`.
    """

    def __init__(self, sock: socket.socket, *, client: bool) -> None:
        self.sock = sock
        self.incoming: list[Stream] = []
        self.control = Stream(self)
        self._client = client
        self._next_id = 1 if client else 2
        self._streams: dict[int, Stream] = {}
        self._unread = bytearray()
        if client:
            self.attach(self.control)

    def attach(self, stream: Stream) -> None:
        """Give a stream its id; its first frame opens it."""
        stream.id, stream.first_flags = self._next_id, _SYN
        self._streams[stream.id] = stream
        self._next_id += 2

    def pump(self, condition: Callable[[], bool]) -> None:
        """Take frames until the condition holds. Raises Gone."""
        while not condition():
            try:
                data = self.sock.recv(1 << 16)
            except OSError as error:
                raise Gone(str(error)) from None
            if not data:
                raise Gone("FIN")
            self._unread += data
            self._take_frames()

    def _take_frames(self) -> None:
        while len(self._unread) >= _HEADER.size:
            version, kind, flags, stream_id, length = _HEADER.unpack_from(self._unread)
            assert version == 0 and kind <= _GO_AWAY, "the end under test speaks yamux"
            size = _HEADER.size + (length if kind == _DATA else 0)
            if len(self._unread) < size:
                return
            payload = bytes(self._unread[_HEADER.size : size])
            del self._unread[:size]
            if kind == _PING:
                self._pong(flags, length)
            elif kind != _GO_AWAY:
                self._to_stream(stream_id, flags, payload)

    def _pong(self, flags: int, value: int) -> None:
        if flags & _SYN:
            self.sock.sendall(_HEADER.pack(0, _PING, _ACK, 0, value))

    def _to_stream(self, stream_id: int, flags: int, payload: bytes) -> None:
        if flags & _SYN:
            self._accept(stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:  # else it is over at this end
            stream.take(flags, payload)

    def _accept(self, stream_id: int) -> None:
        is_control = not self._client and not self.incoming
        stream = self.control if is_control else Stream(self)
        stream.id, stream.first_flags = stream_id, _ACK
        self._streams[stream_id] = stream
        self.incoming.append(stream)

    def write(self, data: bytes, stream: Stream | None = None) -> None:
        """Bytes on a stream."""
        self.sock.sendall((stream or self.control).frame(data))

    def go_away(self, code: int = 0) -> None:
        """Send GoAway; 0 is an orderly one."""
        self.sock.sendall(_HEADER.pack(0, _GO_AWAY, 0, 0, code))

    def hear(self, wanted: Any, stream: Stream | None = None) -> Any:
        """The next message on a stream. Raises Gone, MessageError."""
        return self.hear_frame(wanted, stream)[0]

    def hear_frame(self, wanted: Any, stream: Stream | None = None) -> tuple[Any, bytes]:
        """The same, with its bytes."""
        source = stream or self.control
        decoder = decoder_of(wanted, messages.MAX_MESSAGE)
        while True:
            decoder.feed(source.data)
            source.data.clear()
            found = decoder.next_frame()
            if found is not None:
                source.data += decoder.rest()
                return found
            self.pump(lambda: bool(source.data) or source.fin_received or source.was_reset)
            if not source.data:
                raise Gone("reset" if source.was_reset else "end of stream")

    def close(self) -> None:
        self.sock.close()


def hello(secrets: Path, **changes: Any) -> Hello:
    """A good Hello, but for the changes."""
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "agent_id": "raw",
        "instance": os.urandom(16),
        "namespace": "default",
        "addresses": ["127.1.7.7"],
        "nonce": os.urandom(16),
        "token_id": load_token(secrets / "join.token").id,
        "exposes": ["1-65535"],
    }
    return Hello(**fields | changes)


def link_to(address: Address, secrets: Path | None) -> Wire:
    """A link, with TLS when `secrets` is given."""
    attacker = Attacker(address)
    if secrets is not None:
        attacker.wrap(trusting(secrets, messages.ALPN))
    return Wire(attacker.sock, client=True)


def join(address: Address, secrets: Path, greeting: Hello, *, tls: bool = True, secret: bytes | None = None) -> Wire:
    """Up to the Proof."""
    wire = link_to(address, secrets if tls else None)
    frame = encode(greeting)
    wire.write(frame)
    challenge: Challenge = wire.hear(Challenge | Refuse)
    if isinstance(challenge, Refuse):
        wire.close()
        raise Refusal(challenge)
    binding = b""
    if tls:
        assert isinstance(wire.sock, ssl.SSLSocket)
        certificate = wire.sock.getpeercert(binary_form=True)
        assert certificate
        binding = hashlib.sha256(certificate).digest()
    own = load_token(secrets / "join.token").secret if secret is None else secret
    if secret is None:
        assert challenge.mac == token_mac(own, b"rtunnel broker 1", frame, challenge.nonce, binding)
    wire.write(encode(Proof(mac=token_mac(own, b"rtunnel agent 1", frame, challenge.nonce, binding))))
    return wire


class Refusal(Exception):
    """The broker said no."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__(f"{refuse.code}: {refuse.text}")
        self.code = refuse.code


def enrol(address: Address, secrets: Path, *, tls: bool = True, **changes: Any) -> tuple[Wire, Welcome]:
    """A session of an agent made by hand."""
    wire = join(address, secrets, hello(secrets, **changes), tls=tls)
    answer = wire.hear(Welcome | Refuse)
    if isinstance(answer, Refuse):
        wire.close()
        raise Refusal(answer)
    return wire, answer


def frame_of(body: bytes, length: int | None = None) -> bytes:
    """A message's frame, of any body."""
    return struct.pack(">I", len(body) if length is None else length) + body


def dial_body(part: Part, welcome: Welcome, target: tuple[str, int], **changes: Any) -> DialBody:
    """A good Dial's body, but for the changes."""
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "namespace": "default",
        "ip": target[0],
        "port": target[1],
        "node": part.node.node,
        "epoch": welcome.epoch,
        "nonce": os.urandom(messages.NONCE_BYTES),
        "time": int(time.time() * 1000),
        "who": "attacker",
    }
    return DialBody(**fields | changes)


def signed(secrets: Path, body: bytes, *, key: bytes | None = None) -> bytes:
    """A Dial's frame."""
    made = load_gateway_key(secrets / "gateway.key")
    signer = made if key is None else gateway_key(key, made.id)
    return encode(Dial(body=body, mac=signer.sign(body), key=signer.id))


def session_of(cluster: Cluster, agent: str = "a1", slot: int = 0) -> Welcome:
    """What an agent of the cluster was welcomed with."""
    session = cluster.agents[agent].agent.slots[slot].session
    assert session is not None and session.welcome is not None
    return session.welcome


def first_answer(data: bytes) -> tuple[str, str]:
    """The first message in what a guarded port said: (code, text) of a refusal, ("accepted", "")."""
    decoder = decoder_of(DialAnswer, messages.MAX_MESSAGE)
    decoder.feed(data)
    answer = decoder.next()
    if answer is None:
        return "nothing", ""
    return (answer.code, answer.text) if isinstance(answer, Refuse) else (type(answer).__name__.lower(), "")


class Rogue:
    """A broker of nobody's: accepts links, and does what `script` says with each."""

    def __init__(self, secrets: Path, script: Callable[[Wire], None], *, tls: bool = True) -> None:
        self.sock = kept(socket.create_server(("127.0.0.1", 0)))
        self.at = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self._context = server_context(secrets / "broker.pem", secrets / "broker.key") if tls else None
        self._script = script
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock = self.sock.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        with sock:
            try:
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_side=True)
                with sock:
                    wire = Wire(sock, client=False)
                    self._script(wire)
                    wire.pump(lambda: False)
            except (Gone, OSError, MessageError):
                pass


@asynccontextmanager
async def handmade(
    cluster: Cluster, secrets: Path, script: Callable[[Wire], None], **changes: Any
) -> AsyncIterator[Wire]:
    """A session of an agent made by hand, known to the gateway; `script` gets its link, in a thread."""
    node = cluster.brokers["b1"].node
    wire, welcome = await in_thread(lambda: enrol(node.bound, secrets, **changes))
    ip = hello(secrets, **changes).addresses[0]
    await cluster.until(lambda: any(t.epoch == welcome.epoch for t in cluster.gateway.table.lookup("default", ip)))
    failed: list[BaseException] = []

    def run() -> None:
        try:
            script(wire)
            wire.pump(lambda: False)
        except (Gone, OSError):
            pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield wire
    finally:
        shut(wire.sock)
        await in_thread(lambda: thread.join(PATIENCE))
        wire.close()
    assert not failed, failed
    await cluster.until(lambda: f"default/{changes.get('agent_id', 'raw')}" not in node.sessions)
    await cluster.until(lambda: not cluster.gateway.table.lookup("default", ip))


def shut(sock: socket.socket) -> None:
    """End it, whoever reads from it just now."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's own takes TLS off before the reader is done
    except OSError:
        pass


def next_dial(wire: Wire, number: int = 0) -> Stream:
    """The broker's next stream, its Dial taken."""
    wire.pump(lambda: len(wire.incoming) > number)
    stream = wire.incoming[number]
    wire.hear(Dial, stream)
    return stream


def answers(*data: bytes, fin: bool = False, rst: bool = False) -> Callable[[Wire], None]:
    """Answer each Dial with these bytes, in one frame each."""

    def script(wire: Wire) -> None:
        for number in count():
            stream = next_dial(wire, number)
            for piece in data:
                wire.write(piece, stream)
            if fin:
                stream.finish()
            if rst:
                stream.reset()

    return script
