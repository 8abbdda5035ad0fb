"""What every parser of a peer's bytes must hold, whatever the bytes: one function each.

`tests/unit/test_fuzz.py` tries them with the seeds, with changed seeds and with noise; `make fuzz` lets a fuzzer look
for more, led by coverage. A function returns when all is well. An exception that comes out of it is a finding: an
AssertionError for a broken promise, anything else because only the parser's own errors are caught here.

The promises: only named errors; any split of the same bytes is the same; what is held is bounded; after an error
nothing more is taken; a state that refused something is as it was.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar

import h11
import msgspec
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from rtunnel import admin, config
from rtunnel.api import Api, ApiRequest, BadRequest, Operation
from rtunnel.config import ConfigError, canonical_ip
from rtunnel.errors import RegistryUnavailable, TrustError
from rtunnel.registry.base import CursorLost, Tuple
from rtunnel.registry.redis import RedisRegistry
from rtunnel.registry.routes import RouteTable
from rtunnel.relay.transport import Scratch, TlsTransport
from rtunnel.trust import keys, pki, policy, users
from rtunnel.trust.certificates import agent_request, broker_request, load_request, read_request
from rtunnel.trust.identity import (
    LIST_LABEL,
    TrustList,
    TrustStore,
    agent_uri,
    load_private_key,
    read_certificate,
    sign_list,
)
from rtunnel.trust.proof import ACCEPTED, Exchange, is_signed, sign
from rtunnel.trust.tls import certificate_der, client_context, server_context
from rtunnel.wire import http, http_body, http_response, messages, socks5, yamux
from rtunnel.wire.messages import ControlMessage, Dial, DialAnswer, Follow, MessageError
from rtunnel.wire.refusal import Refusal, Refused
from support import hostile
from support.messages import decoder_of

_T = TypeVar("_T")

_DER: Final = serialization.Encoding.DER
#: Longer inputs find little more, and cost more.
MAX_INPUT: Final = 4096


@dataclass(frozen=True)
class Target:
    """A parser with its promises."""

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]  # real inputs, to start from


TARGETS: dict[str, Target] = {}


def target(seeds: Callable[[], Sequence[bytes]]) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Enter a function into the table under its own name."""

    def enter(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[check.__name__] = Target(check.__name__, check, seeds)
        return check

    return enter


def pieces(data: bytes) -> list[bytes]:
    """The data cut at random, always alike for the same data."""
    dice = random.Random(zlib.crc32(data))
    most = dice.choice((1, 3, 14, 100))
    cut, position = [], 0
    while position < len(data):
        size = dice.randrange(most) + 1
        cut.append(data[position : position + size])
        position += size
    return cut


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rtunnel-fuzz-", ignore_cleanup_errors=True)


@cache
def secrets() -> Path:
    """A cluster's keys and certificates, made once in a process."""
    directory = Path(_home().name) / "pki"
    pki.init(directory)
    pki.issue_agent(directory, "a1", agent_id="host 7/ü", namespace="default", addresses=["10.1.0.7", "fd00::7"])
    return directory


@cache
def ca() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Its CA."""
    certificate = x509.load_pem_x509_certificate((secrets() / "ca.pem").read_bytes())
    return certificate, load_private_key(secrets() / "ca.key")


@cache
def _memory_file() -> tuple[int, Path]:
    descriptor = os.memfd_create("fuzz")
    return descriptor, Path(f"/proc/self/fd/{descriptor}")


def in_file(data: bytes) -> Path:
    """A file with this content; the next call has another one in it."""
    descriptor, path = _memory_file()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    return path


# --- wire: yamux ------------------------------------------------------------------------------------------------------


class _Probe(yamux.Stream):
    """Notes what it hears, and by its id answers or hangs up."""

    session: _End

    def on_data(self, data: memoryview) -> None:
        assert not self.fin_received
        last = self.session.heard[-1:]
        if last and last[0][:2] == ("data", self.id):  # pieces of one frame, or of several: the same to a reader
            self.session.heard[-1] = ("data", self.id, last[0][2] + bytes(data))
        else:
            self.session.heard.append(("data", self.id, bytes(data)))
        self.consumed(len(data))

    def on_fin(self) -> None:
        self.session.heard.append(("fin", self.id, b""))
        if self.id % 3 == 0:
            self.finish()
        elif self.id % 3 == 1:
            self.reset()

    def on_reset(self) -> None:
        assert self.gone
        self.session.heard.append(("reset", self.id, b""))

    def on_window(self) -> None:
        assert 0 < self.send_window <= yamux.MAX_WINDOW
        self.session.heard.append(("window", self.id, b"%d" % self.send_window))


class _End(yamux.Session):
    MOST: Final = 8

    def __init__(self, *, client: bool) -> None:
        super().__init__(client=client)
        self.heard: list[tuple[str, int, bytes]] = []
        for _ in range(2):
            self.attach(_Probe(self))

    def emit(self, frame: bytes) -> None:
        self.heard.append(("emit", 0, frame))

    def accepts(self) -> yamux.Stream | None:
        return _Probe(self) if len(self.streams) < self.MOST else None

    def on_pong(self, value: int) -> None:
        self.heard.append(("pong", value, b""))

    def on_go_away(self, code: yamux.GoAwayCode) -> None:
        self.heard.append(("go_away", code, b""))


def _hear(parts: Sequence[bytes], client: bool, frames: int) -> tuple[list[tuple[str, int, bytes]], str]:
    end = _End(client=client)
    fault = ""
    try:
        for part in parts:
            buffer = bytearray(part)
            view, taken = memoryview(buffer), 0
            while taken < len(part):
                taken += end.receive(view[taken:], frames)
            buffer[:] = bytes(len(buffer))  # slices must not be kept
            assert len(end._partial) < yamux.HEADER_BYTES
            assert end._passed_over < 2**yamux.MAX_PASSED_OVER
            assert len(end.streams) <= end.MOST
    except yamux.YamuxError as error:
        assert error.fault in yamux.Fault
        fault = str(error)
    heard = list(end.heard)
    living = set(end.streams)
    end.end()
    assert {stream for what, stream, _ in end.heard[len(heard) :] if what == "reset"} == living
    told = len(end.heard)
    end.receive(memoryview(b"\0" * 24))
    assert len(end.heard) == told, "something was taken after the end"
    return heard, fault


def _yamux_seeds() -> list[bytes]:
    def frame(kind: int, flags: int, stream: int, length: int, payload: bytes = b"") -> bytes:
        return yamux.HEADER.pack(0, kind, flags, stream, length) + payload

    def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
        return frame(yamux.DATA, flags, stream, len(payload), payload)

    syn, fin, rst = yamux.SYN, yamux.FIN, yamux.RST
    return [
        data(1, b"hello", syn) + data(1, b"", fin),
        data(2, b"hello", syn) + frame(yamux.WINDOW_UPDATE, rst, 2, 0) + data(2, b"late"),
        frame(yamux.PING, syn, 0, 7) + frame(yamux.PING, yamux.ACK, 0, 7) + frame(yamux.GO_AWAY, 0, 0, 0),
        data(5, b"", syn) + data(3, b"x", syn) + data(1, b"y", syn | fin) + data(600, b"", syn),
        data(6, b"", syn) + data(4, b"x", syn) + data(2, b"y", syn | fin) + data(601, b"", syn),
        frame(yamux.WINDOW_UPDATE, 0, 1, 2**32 - 1) + frame(yamux.WINDOW_UPDATE, 0, 2, 1000),
        frame(yamux.DATA, 0, 1, yamux.INITIAL_WINDOW) + bytes(100),
        b"".join(data(stream, b"z", syn) for stream in range(1, 40, 2)),
        b"".join(data(stream, b"z", syn) for stream in range(2, 40, 2)),
        b"\x16\x03\x01\x00\x10hello tls world",
    ]


@target(_yamux_seeds)
def yamux_frames(data: bytes) -> None:
    """Both sides; frame by frame, in pieces, or at once."""
    for client in (True, False):
        whole = _hear([data], client, 2**32)
        assert _hear(pieces(data), client, 2**32) == whole
        assert _hear([data], client, 1) == whole


# --- wire: messages ---------------------------------------------------------------------------------------------------

_EXPECTED: Final = (messages.Hello | messages.Enrol, ControlMessage | Follow, Dial, DialAnswer)


def _decode(parts: Sequence[bytes], expected: Any) -> tuple[list[tuple[Any, bytes]], str, bytes]:
    limit = messages.MAX_UNAUTHENTICATED
    decoder = decoder_of(expected, limit)
    found = []
    try:
        for part in parts:
            decoder.feed(part)
            while (frame := decoder.next_frame()) is not None:
                found.append(frame)
            assert len(decoder._buffer) < 4 + limit
    except MessageError as error:
        assert str(error)
        return found, str(error), b""
    return found, "", decoder.rest()


def _message_seeds() -> list[bytes]:
    nonce, mac, certificate = bytes(range(16)), bytes(range(32)), certificate_der(secrets() / "a1.pem")
    hello = messages.Hello(
        version=1, agent_id="host-7", instance=nonce, namespace="default", addresses=["10.1.0.7", "fd00::7"],
        nonce=nonce,
        token_id="ops", exposes=["22", "8000-8100"], publish=[messages.Publish(ip="10.1.0.7", target_port=9100)],
        holds=["b1"], holds_hosts=["h1"], software="x", trust=3,
    )  # fmt: skip
    welcome = messages.Welcome(
        node="b1", host="h1", epoch=2**33, ip="10.0.0.1", port=20001, heartbeat=5.0,
        open_ports=[messages.OpenPort(port=1, ip="10.1.0.7", target_port=2)], notices=["no"],
    )  # fmt: skip
    every: list[messages.Message] = [
        hello, welcome, messages.Challenge(nonce=nonce, mac=mac), messages.Proof(mac=mac),
        messages.Refuse(code="stale_epoch", text="x"), messages.Update(exposes=["22"]), messages.Drain(deadline=1.5),
        messages.Bye(), messages.Dial(body=b"\x80", mac=mac, key="g1"), messages.Dialling(),
        messages.Accepted(certificate=certificate, signature=b"s" * 70),
        messages.Enrol(version=1, request=certificate, token_id="ops", mac=mac),
        messages.Enrolled(certificate=certificate), messages.Follow(version=1, number=7), messages.Trust(signed=b"x"),
    ]  # fmt: skip
    frames = [messages.encode(message) for message in every]
    return [*frames, frames[0] + frames[3], frames[9] + frames[10] + b"raw bytes", b"\0\0\0\x02\x81\xa1", b"\xff" * 8]


@target(_message_seeds)
def message_frames(data: bytes) -> None:
    """As each of the places takes them; what is taken can be said again, and is the same then."""
    for expected in _EXPECTED:
        whole = _decode([data], expected)
        split = _decode(pieces(data), expected)
        assert repr(split) == repr(whole)  # by text, for a float may be NaN
        found, _, rest = whole
        if not whole[1]:
            assert b"".join(frame for _, frame in found) + rest == data
        for message, frame in found:
            again = _decode([messages.encode(message)], expected)
            assert repr([item for item, _ in again[0]]) == repr([message])
            assert len(frame) <= 4 + messages.MAX_UNAUTHENTICATED
            if isinstance(message, messages.Refuse):
                assert Refusal.parse(message.code).reply.text


def _body_seeds() -> list[bytes]:
    body = messages.DialBody(
        version=1, namespace="default", ip="10.1.0.7", port=22, node="b1", epoch=2**33, nonce=bytes(16), time=1, who="a"
    )
    return [messages.encode_body(body), b"\x80", b"\x81\xa1z" + b"\x91" * 1000]


@target(_body_seeds)
def dial_body(data: bytes) -> None:
    """What a Dial asks for."""
    try:
        body = messages.decode_body(data)
    except MessageError as error:
        assert str(error).startswith("bad Dial body")
    else:
        assert messages.decode_body(messages.encode_body(body)) == body


# --- wire: clients of a gateway ---------------------------------------------------------------------------------------

_EARLY: Final = 256


def _talk_socks(parts: Sequence[bytes], no_auth: bool, login: bool) -> tuple[list[Any], bytes, bytes, object]:
    server = socks5.Socks5Server(no_auth=no_auth, user_password=login, max_early=_EARLY)
    events: list[Any] = []
    sent = b""
    try:
        for part in parts:
            event = server.receive(part)
            sent += server.to_send()
            if isinstance(event, socks5.Authenticate):
                assert event.username and event.username.isprintable()
                events.append((event.username, event.password))
                event = server.authenticated(len(event.password) % 2 == 0)
                sent += server.to_send()
            if event is not None:
                events.append(event)
            assert len(server._buffer) <= max(socks5.MAX_REQUEST + _EARLY + 1, 2 + 255 + 1 + 255)
        rest = server.rest()
    except socks5.Socks5Error as error:
        sent += error.reply
        for late in (b"", b"\5\1\0", bytes(1000)):
            assert server.receive(late) is None
        assert (server.rest(), server.to_send(), server._buffer) == (b"", b"", b"")
        return events, sent, b"", (error.code, error.text)
    return events, sent, rest, None


def _check_place(host: str, port: int, is_name: bool) -> None:
    """What goes to look-ups and into logs."""
    assert 0 < port < 65536
    assert host.isascii() and host.isprintable() and 0 < len(host) <= 255
    assert is_name or canonical_ip(host) == host


def _socks_seeds() -> list[bytes]:
    greeting, login = b"\5\1\0", b"\5\2\0\2\1\5alice\6secret"
    return [
        greeting + b"\5\1\0\1\x0a\1\0\7\0\x16" + b"early data",
        login + b"\5\1\0\4" + bytes(15) + b"\1\0\x16",
        login[:-1] + b"\5\1\0\3\x0adb.example\x23\x8c" + b"e" * 300,
        greeting + b"\5\1\0\3\x07[fd00::\0\x16",
        greeting + b"\5\1\0\3\x0910.1.0.7\0\0\x16",
        greeting + b"\5\2\0\1\x0a\1\0\7\0\x16",
        b"\4\1\0\x16\x0a\1\0\7\0",
        b"GET / HTTP/1.1\r\n",
    ]


@target(_socks_seeds)
def socks_client(data: bytes) -> None:
    """With every way to log in that can be configured."""
    for no_auth, login in ((True, False), (False, True), (True, True)):
        whole = _talk_socks([data] if data else [], no_auth, login)
        assert _talk_socks(pieces(data), no_auth, login) == whole
        for event in whole[0]:
            if isinstance(event, socks5.Connect):
                _check_place(event.host, event.port, event.is_name)


def _talk_http(parts: Sequence[bytes]) -> tuple[object, bytes, object, object]:
    server = http.HttpServer(max_early=_EARLY)
    event: http.Tunnel | http.Forward | http.Health | None = None
    try:
        for part in parts:
            found = server.receive(part)
            assert found is None or event is None
            event = event or found
            assert len(server._buffer) <= max(http.MAX_HEAD, _EARLY + len(part) + 1)
        rest = server.rest()
    except http.HttpError as error:
        assert error.text.isascii() and error.text.isprintable()
        assert _is_answer(error.reply)
        for late in (b"", b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n"):
            assert server.receive(late) is None
        assert (server.rest(), bytes(server._buffer)) == (b"", b"")
        return event, b"", None, (error.text, error.reply)
    passed: object = None
    if isinstance(event, http.Forward):
        try:
            passed = sum(event.body.feed(part) for part in pieces(rest)) if len(parts) > 1 else event.body.feed(rest)
        except http_body.FramingError as error:
            passed = error.text
            assert event.body.done
        assert event.body.feed(b"") == 0
    return event, rest, passed, None


def _is_answer(answer: bytes) -> bool:
    """Whether a client reads one whole response."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer)
    client.receive_data(b"")
    kinds: list[type] = []
    while not kinds or kinds[-1] is not h11.EndOfMessage:
        kinds.append(type(client.next_event()))
    return kinds[0] is h11.Response and client.trailing_data[0] == b""


def _http_seeds() -> list[bytes]:
    return [
        b"CONNECT 10.1.0.7:22 HTTP/1.1\r\nHost: 10.1.0.7:22\r\nProxy-Authorization: Basic YWxpY2U6c2VjcmV0\r\n\r\nraw",
        b"GET http://10.1.0.7:80/a?b HTTP/1.1\r\nHost: 10.1.0.7\r\nConnection: x-a, close\r\nX-A: 1\r\n\r\n",
        b"POST http://[fd00::7]/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET http://b/ HTTP/1.1\r\n",
        b"PUT http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\nnext",
        b"OPTIONS http://a HTTP/1.0\r\nHost: a\r\nMax-Forwards: 3\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        b"GET http://a/ HTTP/1.1\nHost: a\n\n",
    ]


@target(_http_seeds)
def http_client(data: bytes) -> None:
    """One request; the head that the target gets is one head, and its body ends where it ends for us."""
    whole = _talk_http([data])
    assert _talk_http(pieces(data)) == whole
    event = whole[0]
    if event is None:
        return
    if isinstance(event, http.Health):
        assert data.lstrip(b"\r\n").startswith((b"GET /healthz HTTP/1.", b"HEAD /healthz HTTP/1."))
        return
    assert isinstance(event, http.Tunnel | http.Forward)
    _check_place(event.host, event.port, event.is_name)
    found = http.basic_credentials(event.authorization)
    assert found is None or (found[0] and found[0].isprintable())
    if isinstance(event, http.Forward):
        reader = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * http.MAX_HEAD)
        reader.receive_data(event.head)
        request = reader.next_event()
        assert isinstance(request, h11.Request)
        assert request.target[:1] in (b"/", b"*")
        assert event.head.count(b"\r\n\r\n") == 1 and event.head.endswith(b"\r\n\r\n")
        names = [name for name, _ in request.headers]
        assert names.count(b"host") == 1
        assert not {b"proxy-authorization", b"proxy-connection"} & set(names)
        assert isinstance(reader.next_event(), h11.EndOfMessage) == event.body.done or whole[2]


def _hear_target(parts: Sequence[bytes], is_head: bool, upgrade: bool) -> tuple[bytes, bool, bool, bool, str]:
    reader = http_response.ResponseReader(is_head=is_head, keep=True, upgrade=upgrade, max_head=1024)
    out = b""
    try:
        for part in parts:
            out += b"".join(map(bytes, reader.feed(part)))
            assert len(reader._held) <= 1024 + len(part)
        out += reader.end()
    except Refused as error:
        assert error.text
        return b"", False, False, False, error.text
    return out, reader.done, reader.keeps_client and reader.done, reader.upgraded, ""


def _target_seeds() -> list[bytes]:
    return [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: x-a\r\nX-A: 1\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 100 Go\r\n\r\nHTTP/1.0 404 \r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\nContent-Length: 3\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\0",
        b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ]


@target(_target_seeds)
def http_target(data: bytes) -> None:
    """A target's answer: the same in any split, and a client that may send another request finds the same end of it."""
    for is_head, upgrade in ((False, False), (True, False), (False, True)):
        whole = _hear_target([data], is_head, upgrade)
        assert _hear_target(pieces(data), is_head, upgrade) == whole
        out, _, keeps_client, _, _ = whole
        if keeps_client:
            client = h11.Connection(h11.CLIENT, max_incomplete_event_size=4096)
            client.send(h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("Host", "a")]))
            client.send(h11.EndOfMessage())
            client.receive_data(out)
            try:
                while not isinstance(client.next_event(), h11.EndOfMessage):
                    pass
            except h11.RemoteProtocolError as error:
                assert error.error_status_hint == 501, error  # it knows no coding but chunked
            else:
                assert client.trailing_data[0] == b""


# --- health -----------------------------------------------------------------------------------------------------------

_ROUTES: Final = admin.health_routes(list, lambda: {"node": "b1"})


async def _ask_admin(parts: Sequence[bytes], calls: Api | None = None) -> bytes:
    ours, theirs = trio.testing.memory_stream_pair()
    address = ("127.0.0.1", 1)
    theirs.socket = SimpleNamespace(getsockname=lambda: address, getpeername=lambda: address)  # type: ignore[attr-defined]

    async def ask() -> None:
        try:
            for part in parts:
                await ours.send_all(part)
            await ours.send_eof()
        except trio.BrokenResourceError:
            pass  # the answer was no, before all was said

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await admin._converse(theirs, _ROUTES, calls)  # type: ignore[arg-type] # a stream of a test
        await theirs.aclose()
        return b"".join([part async for part in ours])


def _admin_seeds() -> list[bytes]:
    return [
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"HEAD /statusz?pretty HTTP/1.0\r\n\r\n",
        b"POST /readyz HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /%00\xff HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\n\r\n",
        b"G" * 3000,
    ]


@target(_admin_seeds)
def admin_request(data: bytes) -> None:
    """One whole answer, or none."""
    answer = trio.run(_ask_admin, pieces(data))
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert b"\r\nHTTP/1.1 " not in answer  # the text of an answer may quote the request's line


def _api_seeds() -> list[bytes]:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + _TOKEN + b"\r\n"
    return [
        head + b"Content-Length: 2\r\n\r\n{}",
        head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        head.replace(_TOKEN, b"no") + b"Content-Length: 2\r\n\r\n{}",
        head.replace(b"POST /v1/echo", b"GET /v1/echo?a=1&a=2&%ff=%00") + b"\r\n",
        head.replace(b"/v1/echo", b"/v1/" + b"x" * 3000) + b"\r\n",
    ]


_TOKEN: Final = b"a-token-of-the-fuzzer-0123456789"


async def _echo(request: ApiRequest) -> dict[str, object]:
    if request.body[:1] not in (b"", b"{"):
        raise BadRequest("no object")
    return {"query": dict(request.query), "size": len(request.body)}


@target(_api_seeds)
def api_request(data: bytes) -> None:
    """One whole answer, or none, and no answer but a refusal without the token."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(_TOKEN)
        file.flush()
        echo = Operation(_echo, "Echo", dict, query={"a": ""})
        api = Api({("POST", "/v1/echo"): echo, ("GET", "/v1/echo"): echo}, file.name, "gateway.admin_token")
        answer = trio.run(_ask_admin, pieces(data), api)
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert b"\r\nHTTP/1.1 " not in answer
    if _TOKEN not in data and b"/v1/" in data[:100]:
        assert b'"size"' not in answer
    assert api._running == 0


# --- trust ------------------------------------------------------------------------------------------------------------


def _odd_certificates() -> Iterator[bytes]:
    """What no authority of ours would sign, from its key all the same."""
    certificate, key = ca()
    p384, of_rsa = ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)
    alternatives: list[list[x509.GeneralName]] = [
        [x509.UniformResourceIdentifier("rtunnel:agent/%0A%00/%E2%80%A8"), x509.DNSName("broker.rtunnel")],
        [x509.UniformResourceIdentifier("rtunnel:agent//")],
        [x509.UniformResourceIdentifier(agent_uri("default", "a")), x509.RFC822Name("a@b"), x509.RegisteredID(_OID)],
        [x509.DirectoryName(x509.Name([])), x509.OtherName(_OID, b"\x05\x00")],
        [x509.DNSName("authority.rtunnel")],
    ]
    for public in (key.public_key(), p384.public_key(), of_rsa.public_key()):
        for names in alternatives:
            builder = x509.CertificateBuilder(certificate.subject, x509.Name([]), public, 7, _BEGIN, _END)
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            der = builder.sign(key, hashes.SHA256()).public_bytes(_DER)
            yield der
    twice = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    der = builder.add_extension(twice, critical=False).sign(key, hashes.SHA256()).public_bytes(_DER)
    key_identifier, alternative_names, sha256 = b"\x06\x03\x55\x1d\x0e", b"\x06\x03\x55\x1d\x11", b"\x04\x03\x02"
    yield der.replace(key_identifier, alternative_names)  # an extension twice
    yield der.replace(sha256, b"\x04\x03\x7f")  # a signature of an unknown kind
    yield der.replace(b"\x02\x01\x02", b"\x02\x01\x07", 1)  # X.509 version 8


_OID: Final = x509.ObjectIdentifier("1.2.3.4")
_BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
_END: Final = datetime(9999, 12, 31, tzinfo=UTC)


@cache
def _certificate_seeds() -> list[bytes]:
    return [*(certificate_der(secrets() / f"{name}.pem") for name in ("a1", "broker", "ca")), *_odd_certificates()]


@target(_certificate_seeds)
def certificate(data: bytes) -> None:
    """A peer's certificate: what it says, and whether it is true."""
    trust_store = TrustStore((secrets() / "ca.pem").read_bytes())
    for read in (read_certificate, trust_store.verify):
        try:
            who = read(data)
        except TrustError as error:
            assert str(error)
            continue
        assert who.kind in ("agent", "broker", "authority")
        assert who.subject.startswith(f"{who.kind}/")
        assert not is_signed(who.public_key, ACCEPTED, bytes(32), b"body", b"signature")


def _request_seeds() -> list[bytes]:
    key, p384 = load_private_key(secrets() / "a1.key"), ec.generate_private_key(ec.SECP384R1())
    good = agent_request(key, "host-7", "default", ["10.1.0.7", "fd00::7"]).public_bytes(_DER)
    names = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier("rtunnel:agent/%0A/%E2%80%A8"), x509.DNSName("a")]
    )
    builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=False)
    network = [x509.UniformResourceIdentifier(agent_uri("a", "b")), x509.IPAddress(ip_network("0.0.0.0/0"))]
    wide = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(
        x509.SubjectAlternativeName(network), False
    )
    twice = builder.add_extension(x509.SubjectKeyIdentifier(b"x"), critical=False).sign(key, hashes.SHA256())
    der = twice.public_bytes(_DER)
    return [
        good,
        *(made.sign(signer, hashes.SHA256()).public_bytes(_DER) for made in (builder, wide) for signer in (key, p384)),
        der.replace(b"\x06\x03\x55\x1d\x0e", b"\x06\x03\x55\x1d\x11"),  # an extension twice
        good.replace(b"\x02\x01\x00", b"\x02\x01\x07", 1),  # version 8
        good.replace(b"\x04\x03\x02", b"\x04\x03\x7f"),  # a signature of an unknown kind
        broker_request(key, "b1").public_bytes(_DER),
    ]


@target(_request_seeds)
def certificate_request(data: bytes) -> None:
    """What an agent asks for; its words go into certificates, logs and keys of the registry."""
    try:
        asked = read_request(load_request(data))
    except TrustError as error:
        assert str(error)
        return
    assert asked.agent_id.isprintable() and asked.namespace.isprintable()
    assert asked.addresses and all(canonical_ip(address) == address for address in asked.addresses)


def _proof_seeds() -> list[bytes]:
    return [
        sign(load_private_key(secrets() / "a1.key"), ACCEPTED, bytes(32), b"body"),
        b"",
        b"\x30\x06\x02\x01\x01\x02\x01\x01",
    ]


@target(_proof_seeds)
def proof(data: bytes) -> None:
    """A signature of an agent over a Dial."""
    key = load_private_key(secrets() / "a1.key").public_key()
    assert not is_signed(key, ACCEPTED, bytes(32), b"another body", data)
    is_signed(key, ACCEPTED, bytes(32), b"body", data)


@target(lambda: [Exchange().public, bytes(32), b"\x01" + bytes(31), b""])
def exchange(data: bytes) -> None:
    """The other end's part of the key of a pair."""
    own = Exchange()
    try:
        pair = own.with_agent(data, b"certificate")
    except TrustError as error:
        assert str(error)
        return
    assert not pair.is_proof(ACCEPTED, b"body", data)


def _list_seeds() -> list[bytes]:
    signer = ca()
    cas = [signer[0].public_bytes(_DER)]
    odd = list(_odd_certificates())
    contents = [
        TrustList(1, 1, cas),
        TrustList(2, 1, cas, {"agent/default/a": 1_800_000_000, "gateway/g1": 2**62}),
        TrustList(3, 2, [odd[-4], *cas]),
        TrustList(4, 2, [odd[5]]),
    ]
    bodies = [msgspec.msgpack.encode(content) for content in contents]
    return [*(sign_list(content, [signer]) for content in contents), *bodies]


@target(_list_seeds)
def trust_list(data: bytes) -> None:
    """As it comes, and as the body of one that a CA has signed; who refuses one is as before, and takes the next."""
    signer = ca()
    pem = (secrets() / "ca.pem").read_bytes()
    signature = signer[1].sign(LIST_LABEL + data, ec.ECDSA(hashes.SHA256()))
    signatures = [{"signer": signer[0].fingerprint(hashes.SHA256()), "value": signature}]
    for signed in (data, msgspec.msgpack.encode({"body": data, "signatures": signatures})):
        trust_store = TrustStore(pem)
        before = (trust_store.number, trust_store.generation, trust_store.signed, trust_store.revoked, trust_store.pem)
        try:
            taken = trust_store.take(signed)
        except TrustError as error:
            assert str(error)
            taken = False
        if not taken:
            assert (
                trust_store.number,
                trust_store.generation,
                trust_store.signed,
                trust_store.revoked,
                trust_store.pem,
            ) == before
        elif trust_store.number < 2**63:
            # Whatever is in force now, a list of the first CA is taken when that is still in force, or refused by name.
            try:
                trust_store.take(sign_list(TrustList(trust_store.number + 1, 1, [pem_der(pem)]), [signer]))
            except TrustError:
                assert pem.strip() not in trust_store.pem.encode()
        try:
            trust_store.verify(certificate_der(secrets() / "a1.pem"))
        except TrustError:
            pass


def pem_der(pem: bytes) -> bytes:
    """The one certificate of a PEM file."""
    return x509.load_pem_x509_certificate(pem).public_bytes(_DER)


# --- files ------------------------------------------------------------------------------------------------------------


def _key_seeds() -> list[bytes]:
    names = ("cluster.key", "join.token", "a1.key", "a1.pem")
    found = [(secrets() / name).read_bytes() for name in names]
    found.append(found[2].replace(b"SM49AwEH", b"SM49AwEz"))  # on a curve that nobody knows
    found.append(found[2].replace(b"END PRIVATE KEY", b"END " + found[2][28:92]))  # a paste that went wrong
    return [*found, b"# of staging\n\n" + found[1] + b"rtunnel-token-1.b." + found[1][-44:], b"rtunnel-token-2.x"]


@target(_key_seeds)
def key_files(data: bytes) -> None:
    """Secrets: what is refused is not repeated."""
    path = in_file(data)
    loaders: list[Callable[[Path], Any]] = [keys.load_cluster_keys, keys.load_tokens, keys.load_token, load_private_key]
    for load in loaders:
        try:
            load(path)
        except TrustError as error:
            assert str(path) in str(error)
            long = [word for line in data.splitlines() for word in line.replace(b".", b" ").split() if len(word) > 30]
            assert not any(word.decode("latin-1") in str(error) for word in long)


def loaded(load: Callable[[Path], _T], data: bytes) -> _T | None:
    """What a file with these bytes holds; None when it is refused, by its name."""
    path = in_file(data)
    try:
        return load(path)
    except TrustError as error:
        assert str(path) in str(error)
        return None


def _user_seeds() -> list[bytes]:
    line = b"alice:$scrypt$ln=14,r=8,p=5$c2FsdHNhbHRzYWx0c2FsdA$aGFzaGhhc2hoYXNoaGFzaGhhc2hoYXNoaGFzaGhhc2g"
    return [line, b"# people\n\n" + line + b"\nbob" + line[5:] + b"\n", line.replace(b"14", b"31")]


@target(_user_seeds)
def user_file(data: bytes) -> None:
    """Names and hashes; no check of a password takes more than the bounds say."""
    found = loaded(users.load_users, data)
    for name, entry in found.hashes.items() if found is not None else ():
        log_n, r, p = entry.cost
        assert name.isprintable() and ":" not in name
        assert 128 * r * ((1 << log_n) + p + 2) <= users._MAX_MEMORY and p <= users._MAX_P
        assert users._parse(entry.text(), "") == entry


def _policy_seeds() -> list[bytes]:
    return [
        b'[[rule]]\naction = "allow"\nname = "ops"\nusers = ["alice", "*"]\nfrom = ["10.9.0.0/16"]\n'
        b'namespaces = ["default"]\nto = ["10.1.0.0/16", "fd00::/8"]\nports = ["22", "9000-9999", 80]\n',
        b'[[rule]]\naction = "deny"\n[[rule]]\naction = "allow"\nto = ["127.0.0.1", "::/0"]\n',
        b'rule = [{action = "allow", ports = ["0-70000"]}]',
    ]


@target(_policy_seeds)
def policy_file(data: bytes) -> None:
    """Rules: they load or are refused, and answer every question."""
    rules = loaded(policy.load_policy, data)
    if rules is None:
        return
    for question in (
        policy.Question(None, "127.0.0.1", "default", "10.1.0.7", 22),
        policy.Question("alice", "10.9.0.4", "default", "fd00::7", 65535),
    ):
        verdict = rules.verdict(question)
        assert 0 <= verdict.number <= len(rules.rules)
        rules.nearly(question)


def _config_seeds() -> list[bytes]:
    return [
        b'[registry]\nurl = "redis://:secret@10.0.0.5:6379/0"\n'
        b'[gateway]\nlisten = "0.0.0.0:1080"\nno_auth = ["10.0.0.0/8"]\n',
        b'[broker]\nlisten = "[::]:7000"\nport_range = "20000-29999"\n[broker.open_ports]\nrange = "30000-30099"\n',
        b'[agent]\nbrokers = ["vip:7000"]\naddresses = ["10.1.0.7"]\nexposes = ["22", 80]\n'
        b'publish = [{target = "10.1.0.7:80", port = 0, allow = ["10.0.0.0/8"]}]\n',
        b"[log]\nlevel = 3\nformat = []\n",
        b"[agent]\nredundancy = 1" + b"0" * 400,
    ]


@target(_config_seeds)
def config_file(data: bytes) -> None:
    """A configuration: each problem is one line."""
    try:
        config.load(in_file(data), {}, {})
    except ConfigError as error:
        assert error.problems
        assert not any("\n" in str(problem) for problem in error.problems)


# --- the registry -----------------------------------------------------------------------------------------------------


class _Canned(RedisRegistry):
    """A registry whose Redis answers what it is told to."""

    def __init__(self, replies: Any) -> None:
        super().__init__("redis://127.0.0.1:1/0")
        self.replies = list(replies)

    def _exchange(self, *commands: tuple[Any, ...], wait: float = 0.0) -> list[Any]:
        if not self.replies:
            raise RegistryUnavailable("no more replies")
        return [self.replies.pop(0) if self.replies else None for _ in commands]


_TUPLE: Final = (
    b'{"epoch":"4294967297","namespace":"default","agent_ip":"10.1.0.7","agent_port":0,"ps_ip":"10.0.0.1",'
    b'"ps_port":20001,"node":"b1","agent_id":"host-7","state":"live","exposes":"22"}'
)
_NODE: Final = b'{"node":"b1","host":"h1","ip":"10.0.0.1","incarnation":1,"state":"live","beat":1800000000.5}'


def _row_seeds() -> list[bytes]:
    beat = _TUPLE.replace(b'{"epoch', b'{"beat":1800000000.5,"epoch')
    time = [b"1800000000", b"123456"]
    feed: list[Any] = [b"f", b"7"]
    change = [[b"changes", [[b"8-0", [b"put", _TUPLE]], [b"9-0", [b"gone", _TUPLE]]]]]
    replies: list[Any] = [
        [time, [b"b1/0", _TUPLE, b"b1/0@4294967297", b"1800000000.5"]],
        [[b"f", b"7", b"1800000000.5", [b"b1"]], _NODE, [b"0", beat + b"\n" + beat], feed, change],
        [_NODE + b"\n" + _NODE],
        [[b"f", b"9"], change],
        [b"20001"],
        [time, [b"b1/0", _TUPLE.replace(b"20001", b"70000"), b"b1/0@4294967297", b"nan"]],
        [time, [b"b1/0", _TUPLE.replace(b"10.0.0.1", b"host"), b"odd"]],
        [[b"f", b"x"], None],
    ]
    return [msgspec.msgpack.encode(reply) for reply in replies]


@target(_row_seeds)
def registry_rows(data: bytes) -> None:
    """What comes out of Redis, whoever wrote it: replies of any shape give tuples that can be dialled, or an outage."""
    try:
        replies = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return
    if not isinstance(replies, list):
        return
    table = RouteTable()

    def follow(registry: _Canned) -> None:
        table.reconcile(registry.snapshot())
        table.apply(registry.changes("f/7", 0.0)[1])

    calls: list[Callable[[_Canned], Any]] = [
        follow,
        lambda registry: registry.lookup("default", "10.1.0.7"),
        lambda registry: table.set_nodes(registry.nodes()),
        lambda registry: registry.changes("f/7", 0.0),
        lambda registry: registry.last_port("b1", "default/host-7"),
    ]
    for call in calls:
        try:
            found = call(_Canned(replies))
        except (RegistryUnavailable, CursorLost):
            continue
        for entry in found if isinstance(found, list) else ():
            if isinstance(entry, Tuple):
                _check_tuple(entry)
    for entry in table.lookup("default", "10.1.0.7"):
        _check_tuple(entry)


def _check_tuple(entry: Tuple) -> None:
    """It can be dialled, and a Dial for it can be said."""
    assert 0 < entry.ps_port < 65536 and canonical_ip(entry.ps_ip)
    assert messages.encode_body(
        messages.DialBody(1, entry.namespace, "10.1.0.7", 22, entry.node, entry.epoch, bytes(16), 1)
    )


# --- TLS --------------------------------------------------------------------------------------------------------------


@cache
def _server_context() -> ssl.SSLContext:
    return server_context(secrets() / "broker.pem", secrets() / "broker.key")


def _hello_seeds() -> list[bytes]:
    outgoing = ssl.MemoryBIO()
    client = client_context(secrets() / "ca.pem").wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="broker.rtunnel")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outgoing.read()
    return [hello, hello[:100], hello + hello, b"GET / HTTP/1.1\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"]


@target(_hello_seeds)
def tls_handshake(data: bytes) -> None:
    """The first bytes to a broker: the handshake waits for more or ends with an OSError."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        transport = TlsTransport(near, _server_context(), None)
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        try:
            assert not transport.handshake(), "a handshake without a peer"
        except OSError:
            return
        transport.receive(Scratch())


# --- the relay on a hostile kernel ------------------------------------------------------------------------------------


@target(lambda: [hostile.tape_of(seed)[:600] for seed in range(64)])
def hostile_kernel(data: bytes) -> None:
    """A schedule: no byte is lost, whatever the kernel, the peers and the network do (tests/support/hostile.py)."""
    hostile.play(data)
