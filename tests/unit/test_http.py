"""The HTTP proxy parser: RFC 9110, 9112 and 9209, request smuggling, its limits, and h11's client as a peer."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import requires
from itertools import pairwise

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtunnel.wire.http import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_REASON,
    MAX_TEXT,
    Forward,
    Health,
    HttpError,
    HttpServer,
    Tunnel,
    basic_credentials,
    health_probe,
    response_connected,
    response_health,
    response_refused,
)
from rtunnel.wire.http_body import MAX_CHUNK_LINE, MAX_TRAILER_FIELDS, MAX_TRAILERS, Chunked, FramingError, Sized
from rtunnel.wire.refusal import Refusal
from rtunnel.wire.socks5 import MAX_EARLY_DATA

CONNECT = b"CONNECT 10.1.0.7:9100 HTTP/1.1\r\nHost: 10.1.0.7:9100\r\n\r\n"
CHUNKED = b"4\r\nwiki\r\n5;ext=1\r\npedia\r\n0\r\nTrailer-Field: x\r\n\r\n"
NEXT = b"GET http://10.9.9.9/ HTTP/1.1\r\nHost: 10.9.9.9\r\n\r\n"

Split = Callable[[bytes], list[bytes]]


def get(
    target: bytes = b"http://10.1.0.7:9100/", *fields: bytes, method: bytes = b"GET", version: bytes = b"1.1"
) -> bytes:
    """A request's head, with a Host field that says something else than the URL."""
    return b"\r\n".join((method + b" " + target + b" HTTP/" + version, b"Host: other", *fields, b"", b""))


def trickle(data: bytes) -> list[bytes]:
    """One byte at a time."""
    return [data[i : i + 1] for i in range(len(data))]


def trickle_end(data: bytes) -> list[bytes]:
    """One byte at a time for the last 500 bytes: a gate reads a line's start again with each piece of the line."""
    at = max(0, len(data) - 500)
    return [data[:at], *trickle(data[at:])] if at else trickle(data)


def coalesced(data: bytes) -> list[bytes]:
    """All in one piece."""
    return [data]


@dataclass
class Play:
    """What a client's bytes came to."""

    events: list[Tunnel | Forward | Health] = field(default_factory=list)
    rest: bytes = b""
    error: tuple[Refusal, str, bytes] | None = None
    most: int = 0  # bytes that were held at any time


def play(pieces: Iterable[bytes], *, max_early: int = 64) -> Play:
    """Feed the pieces."""
    server = HttpServer(max_early=max_early)
    seen = Play()
    try:
        for piece in pieces:
            event = server.receive(piece)
            if event is not None:
                seen.events.append(event)
            seen.most = max(seen.most, len(server._buffer))
        seen.rest = server.rest()
    except HttpError as error:
        seen.error = error.code, error.text, error.reply
        assert len(server._buffer) <= max_early + 1
    return seen


def forward(data: bytes) -> Forward:
    """The Forward of these bytes, which is the same one in one piece and byte by byte."""
    event = HttpServer().receive(data)
    assert isinstance(event, Forward)
    bytewise = play(trickle(data)).events
    assert bytewise == [event]
    return event


def fields(head: bytes) -> list[bytes]:
    """The field lines of a head."""
    return head.split(b"\r\n")[1:-2]


def refused(data: bytes) -> tuple[int, str]:
    """The status and text of the error of these bytes, which is the same one in one piece and byte by byte."""
    whole, bytewise = play([data]), play(trickle(data))
    assert whole.error is not None
    assert (whole.events, whole.error) == (bytewise.events, bytewise.error)
    code, text, reply = whole.error
    assert code is Refusal.BAD_REQUEST
    status, _, body = parse_response(reply)
    assert body == f"rtunnel: bad_request: {text}\n"
    return status, text


def parse_response(reply: bytes, method: str = "GET") -> tuple[int, dict[str, str], str]:
    """What h11's client makes of a whole reply: status, fields, body."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="http://10.1.0.7/", headers=[("Host", "10.1.0.7")]))
    client.send(h11.EndOfMessage())
    client.receive_data(reply)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data == (b"", False)
    return response.status_code, {k.decode(): v.decode() for k, v in response.headers}, body.decode()


# CONNECT


@pytest.mark.parametrize("split", [trickle, coalesced])
def test_tunnel(split: Split) -> None:
    """CONNECT gives the target; what follows the head is the start of the stream, whatever it looks like."""
    seen = play(split(CONNECT + b"\x16\x03\x01\n"))
    assert seen.events == [Tunnel("10.1.0.7", 9100, is_name=False, authorization="")]
    assert (seen.rest, seen.error) == (b"\x16\x03\x01\n", None)


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview])
def test_takes_any_buffer(convert: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    """A relay may hand in a view of its own buffer and overwrite it afterwards."""
    server = HttpServer()
    own = bytearray(CONNECT[:20])
    server.receive(convert(own))
    own[:] = bytes(len(own))
    assert isinstance(server.receive(convert(CONNECT[20:])), Tunnel)


@pytest.mark.parametrize(
    ("authority", "host", "is_name"),
    [
        (b"10.1.0.7:443", "10.1.0.7", False),
        (b"[2001:DB8::7]:443", "2001:db8::7", False),
        (b"[::ffff:10.1.0.7]:443", "10.1.0.7", False),
        (b"db.example:443", "db.example", True),
        (b"x" * 255 + b":443", "x" * 255, True),
    ],
)
def test_tunnel_hosts(authority: bytes, host: str, is_name: bool) -> None:
    """Authority-form with an address of either family, or a name."""
    assert play([get(authority, method=b"CONNECT")]).events == [Tunnel(host, 443, is_name, "")]


@pytest.mark.parametrize(
    ("authority", "hint"),
    [
        (b"10.1.0.7", "needs a port"),
        (b"10.1.0.7:", "needs a port"),
        (b"[::1]", "needs a port"),
        (b"10.1.0.7:0", "no port 0"),
        (b"10.1.0.7:65536", "no port 65536"),
        (b"10.1.0.7:000443", "no proper host"),
        (b"10.1.0.7:+443", "no proper host"),
        (b"::1:443", "no proper host"),
        (b":443", "no proper host"),
        (b"user@10.1.0.7:443", "no proper host"),
        (b"10.1.0.7:443/", "no proper host"),
        (b"http://10.1.0.7:443", "no proper host"),
        (b"%31%30.1.0.7:443", "no proper host"),
        (b"[fe80::1%25eth0]:443", "no proper host"),
        (b"[]:443", "neither a name nor an address"),
        (b"[10.1.0.7]:443", "neither a name nor an address"),
        (b"x" * 256 + b":443", "1 to 255"),
    ],
)
def test_bad_authority(authority: bytes, hint: str) -> None:
    """CONNECT takes host:port and nothing that only resembles it."""
    status, text = refused(get(authority, method=b"CONNECT"))
    assert status == 400
    assert hint in text


@pytest.mark.parametrize("line", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_tunnel_with_a_body(line: bytes) -> None:
    """CONNECT has no body: what is it, then, that follows?"""
    assert refused(get(b"10.1.0.7:443", line, method=b"CONNECT")) == (400, "CONNECT has no body")


def test_tunnel_without_content() -> None:
    """Some clients say that the body of their CONNECT is empty, and some speak HTTP/1.0 without Host."""
    assert play([get(b"10.1.0.7:443", b"Content-Length: 0", method=b"CONNECT")]).events
    assert play([b"CONNECT 10.1.0.7:443 HTTP/1.0\r\n\r\n"]).events


# Absolute form


def test_forward() -> None:
    """The target gets origin-form, the URL's host, no hop-by-hop field, and who passed it on; the rest in order."""
    event = forward(
        get(
            b"http://10.1.0.7:9100/metrics?a=1",
            b"User-Agent: curl/8",
            b"Connection: keep-alive, X-Private ,, Te",
            b"X-Private: 1",
            b"Proxy-Connection: Keep-Alive",
            b"Proxy-Authorization: Basic YWxpY2U6c2VjcmV0",
            b"Keep-Alive: timeout=5",
            b"TE: trailers",
            b"Via: 1.1 first",
            b"Cookie: a=b",
        )
    )
    assert (event.host, event.port, event.is_name) == ("10.1.0.7", 9100, False)
    assert event.authorization == "Basic YWxpY2U6c2VjcmV0"
    assert event.body.done
    assert event.head == (
        b"GET /metrics?a=1 HTTP/1.1\r\nHost: 10.1.0.7:9100\r\nUser-Agent: curl/8\r\nVia: 1.1 first\r\n"
        b"Cookie: a=b\r\nVia: 1.1 rtunnel\r\nConnection: close\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "url", "line", "host", "port"),
    [
        (b"GET", b"http://10.1.0.7", b"GET / HTTP/1.1", b"Host: 10.1.0.7", 80),
        (b"GET", b"HTTP://10.1.0.7:/a", b"GET /a HTTP/1.1", b"Host: 10.1.0.7:", 80),
        (b"GET", b"http://10.1.0.7?q=/", b"GET /?q=/ HTTP/1.1", b"Host: 10.1.0.7", 80),
        (b"GET", b"http://10.1.0.7//a?b?c", b"GET //a?b?c HTTP/1.1", b"Host: 10.1.0.7", 80),
        (b"GET", b"http://10.1.0.7:8080/http://x/", b"GET /http://x/ HTTP/1.1", b"Host: 10.1.0.7:8080", 8080),
        (b"OPTIONS", b"http://10.1.0.7", b"OPTIONS * HTTP/1.1", b"Host: 10.1.0.7", 80),
        (b"OPTIONS", b"http://10.1.0.7/", b"OPTIONS / HTTP/1.1", b"Host: 10.1.0.7", 80),
        (b"OPTIONS", b"http://10.1.0.7?q", b"OPTIONS /?q HTTP/1.1", b"Host: 10.1.0.7", 80),
    ],
)
def test_targets(method: bytes, url: bytes, line: bytes, host: bytes, port: int) -> None:
    """Every shape of an http URL gives its origin form (RFC 9112 section 3.2)."""
    event = forward(get(url, method=method))
    assert event.head.split(b"\r\n")[0] == line
    assert fields(event.head)[0] == host
    assert (event.host, event.port) == ("10.1.0.7", port)


def test_forward_to_ipv6_and_names() -> None:
    """The Host field keeps the URL's spelling, the event has the canonical one."""
    event = forward(get(b"http://[2001:DB8::7]:81/"))
    assert (event.host, event.port, event.is_name) == ("2001:db8::7", 81, False)
    assert b"Host: [2001:DB8::7]:81\r\n" in event.head
    assert forward(get(b"http://db.example/")).is_name


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        (b"/", "this is a proxy"),
        (b"/index.html", "this is a proxy"),
        (b"*", "this is a proxy"),
        (b"10.1.0.7:80", "absolute http:// URL"),
        (b"http:/10.1.0.7/", "absolute http:// URL"),
        (b"https://10.1.0.7/", "https:// can't be forwarded: use CONNECT"),
        (b"ftp://10.1.0.7/", "ftp:// can't be forwarded"),
        (b"http:///", "no proper host"),
        (b"http://:80/", "no proper host"),
        (b"http://user:secret@10.1.0.7/", "no proper host"),
        (b"http://10.1.0.7\\@10.9.9.9/", "no proper host"),
        (b"http://10.1.0.7:x/", "no proper host"),
        (b"http://10.1.0.7:0/", "no port 0"),
        (b"http://10.1.0.7/#top", "fragment"),
        (b"http://10.1.0.7#@10.9.9.9/", "fragment"),
    ],
)
def test_bad_targets(target: bytes, hint: str) -> None:
    """Everything but an http URL with a plain authority is refused, with what to do instead."""
    status, text = refused(get(target))
    assert status == 400
    assert hint in text


@pytest.mark.parametrize(
    ("fields", "version", "passed"),
    [
        ((b"Connection: Upgrade", b"Upgrade: websocket"), b"1.1", b"websocket"),
        ((b"Connection: keep-alive, upgrade", b"Upgrade: h2c, websocket", b"Upgrade: x/2"), b"1.1", b"websocket, x/2"),
        ((b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"), b"1.1", b""),
        ((b"Upgrade: websocket",), b"1.1", b""),
        ((b"Connection: Upgrade", b"Upgrade: websocket"), b"1.0", b""),
    ],
)
def test_upgrade(fields: tuple[bytes, ...], version: bytes, passed: bytes) -> None:
    """An offer passes when Connection names it; h2c does not, nor an offer of HTTP/1.0."""
    event = forward(get(b"http://10.1.0.7/", *fields, b"Sec-WebSocket-Key: x", version=version))
    assert event.upgrade is bool(passed)
    lines = event.head.split(b"\r\n")
    assert (b"Upgrade: " + passed in lines) == (b"Connection: Upgrade, close" in lines) == bool(passed)
    assert b"Sec-WebSocket-Key: x" in lines and b"HTTP2" not in event.head


@pytest.mark.parametrize(
    ("data", "keep"),
    [
        (get(), True),
        (get(b"http://a/", b"Connection: keep-alive"), True),
        (get(b"http://a/", b"Connection: x, CLOSE"), False),
        (get(version=b"1.0"), False),
        (get(b"http://a/", b"Connection: keep-alive", version=b"1.0"), False),
    ],
)
def test_whether_another_request_may_follow(data: bytes, keep: bool) -> None:
    """RFC 9112 section 9.3: not behind close, nor from an HTTP/1.0 client; and the caller may want none."""
    event = HttpServer(keep=True).receive(data)
    assert isinstance(event, Forward)
    assert event.keep is keep
    assert (b"Connection: close" not in event.head) is keep
    assert not forward(data).keep


@pytest.mark.parametrize(
    ("method", "line", "replayable"),
    [(b"GET", b"", True), (b"HEAD", b"", True), (b"POST", b"", False), (b"GET", b"Content-Length: 1", False)],
)
def test_what_may_be_sent_twice(method: bytes, line: bytes, replayable: bool) -> None:
    """RFC 9110 section 9.2.2, and no body."""
    assert forward(get(b"http://a/", *([line] if line else []), method=method)).replayable is replayable


def test_http_1_0_stays_1_0() -> None:
    """An HTTP/1.0 client must not get a chunked answer, so the target is told the version."""
    event = forward(b"GET http://10.1.0.7/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert event.head == b"GET / HTTP/1.0\r\nHost: 10.1.0.7\r\nVia: 1.0 rtunnel\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE"])
def test_max_forwards(method: bytes) -> None:
    """Max-Forwards counts down, and ends here at 0 (RFC 9110 section 7.6.2); other methods ignore it."""
    url = b"http://10.1.0.7/"
    assert b"Max-Forwards: 9\r\n" in forward(get(url, b"Max-Forwards: 10", method=method)).head
    assert b"Max-Forwards: 0\r\n" in forward(get(url, b"Max-Forwards: 0")).head
    for value in (b"0", b"x", b"", b"-1", b"9" * 5000):
        assert refused(get(url, b"Max-Forwards: " + value, method=method)) == (400, "Max-Forwards is used up")


def test_authorization_stays_out_of_logs() -> None:
    """Neither an event's text nor an error's has the credential."""
    event = forward(get(b"http://10.1.0.7/", b"Proxy-Authorization: Basic c2VjcmV0"))
    assert "c2VjcmV0" not in repr(event)
    assert b"c2VjcmV0" not in event.head
    _, text = refused(get(b"http://10.1.0.7/", b"Proxy-Authorization: Basic c2VjcmV0\x00"))
    assert text == "malformed HTTP: illegal header line"
    twice = (b"Proxy-Authorization: Basic c2VjcmV0",) * 2
    assert refused(get(b"http://10.1.0.7/", *twice)) == (400, "more than one Proxy-Authorization")


# Health


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("split", [trickle, coalesced])
def test_health(method: bytes, version: bytes, split: Split) -> None:
    """The one request in origin form that the proxy answers itself; its first bytes tell it, too."""
    data = get(b"/healthz", method=method, version=version)
    assert play(split(data)).events == [Health(of_head=method == b"HEAD")]
    assert health_probe(data) == Health(of_head=method == b"HEAD")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /health",
        get(b"/healthz", method=b"POST"),
        get(b"/healthz?x"),
        get(b"/healthz/"),
        get(b"http://10.1.0.7/healthz"),
        get(b"/healthz", version=b"2.0"),
    ],
)
def test_what_is_no_health(data: bytes) -> None:
    """Anything else is a request as ever."""
    assert not any(isinstance(event, Health) for event in play([data]).events)
    assert health_probe(data) is None


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
def test_health_responses(ready: bool, status: int) -> None:
    """Whole responses, to a HEAD without the body; nothing of the reasons, which are not for strangers."""
    assert parse_response(response_health(ready))[0] == status
    assert parse_response(response_health(ready, of_head=True), "HEAD")[::2] == (status, "")


# Bodies


@pytest.mark.parametrize("split", [trickle, coalesced])
@pytest.mark.parametrize(
    ("line", "body"),
    [
        (b"Content-Length: 5", b"hello"),
        (b"Content-Length: 5, 5", b"hello"),
        (b"Content-Length: 0", b""),
        (b"Accept: */*", b""),
        (b"Transfer-Encoding: chunked", CHUNKED),
        (b"Transfer-Encoding: CHUNKED", b"0\r\n\r\n"),
    ],
)
def test_gate(line: bytes, body: bytes, split: Split) -> None:
    """The gate lets exactly this request's body pass, raw, and nothing of a second request behind it."""
    gate = forward(get(b"http://10.1.0.7/", line, method=b"POST")).body
    passed = b""
    for piece in split(body + NEXT):
        passed += piece[: gate.feed(piece)]
    assert passed == body
    assert gate.done
    assert gate.feed(NEXT) == 0


def test_gate_waits() -> None:
    """Before the end the gate is not done, and nothing does not end it."""
    for gate in (Sized(5), forward(get(b"http://10.1.0.7/", b"Transfer-Encoding: chunked")).body):
        assert gate.feed(b"") == 0
        assert gate.feed(b"4\r\n") == 3
        assert not gate.done


def test_gate_of_a_body_behind_the_head() -> None:
    """What came with the head goes through the gate too."""
    server = HttpServer()
    event = server.receive(get(b"http://10.1.0.7/", b"Content-Length: 5", method=b"POST") + b"hello" + NEXT)
    assert isinstance(event, Forward)
    assert server.rest()[: event.body.feed(b"hello" + NEXT)] == b"hello"


def test_transfer_encoding_and_trailer_are_kept() -> None:
    """The body is passed on as it is coded, so its framing stays, even when Connection names it."""
    lines = (b"Transfer-Encoding: chunked", b"Trailer: X", b"Connection: Transfer-Encoding, Content-Length")
    assert set(fields(forward(get(b"http://10.1.0.7/", *lines)).head)) >= set(lines[:2])
    length = (b"Content-Length: 5", b"Connection: content-length")
    assert b"Content-Length: 5\r\n" in forward(get(b"http://10.1.0.7/", *length)).head


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"0x5\r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b" 5\r\nhello\r\n",
        b"f" * 21 + b"\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"5\r\nhello\r\r\n0\r\n\r\n",
        b"5;a\rb\r\nhello\r\n",
        b"5;a\nb\r\nhello\r\n",
        b"0\r\n: x\r\n\r\n",
        b"0\r\nX: a\r\n b\r\n\r\n",
        b"5;" + b"e" * MAX_CHUNK_LINE,
        b"0\r\nX: " + b"e" * MAX_TRAILERS,
        b"0\r\n" + b"X: a\r\n" * (MAX_TRAILER_FIELDS + 1),
    ],
)
@pytest.mark.parametrize("split", [trickle_end, coalesced])
def test_broken_chunks(body: bytes, split: Split) -> None:
    """A broken chunk coding, or one without an end, is an error; nothing passes after it."""
    gate = forward(get(b"http://10.1.0.7/", b"Transfer-Encoding: chunked", method=b"POST")).body
    with pytest.raises(FramingError, match="malformed HTTP"):
        for piece in split(body):
            gate.feed(piece)
    assert gate.feed(NEXT) == 0


def test_a_broken_chunk_end_does_not_pass() -> None:
    """Two bytes behind a chunk's data that are not CRLF hid a second request from h11 before 0.16 (CVE-2025-43859)."""
    gate = forward(get(b"http://10.1.0.7/", b"Transfer-Encoding: chunked", method=b"POST")).body
    passed = gate.feed(b"5\r\nhello")
    with pytest.raises(FramingError, match="illegal chunk end"):
        gate.feed(b"XX0\r\n\r\n" + NEXT)
    assert passed == 8


def test_h11_is_new_enough() -> None:
    """Installers must not choose an h11 with that fault: the admin endpoint reads chunks with it."""
    (wanted,) = (line for line in requires("rtunnel") or () if line.startswith("h11"))
    assert wanted == "h11>=0.16"


@given(st.lists(st.integers(0, 300), max_size=6), st.sampled_from([b"", b";a=b", b';a="b c" ', b"  "]), st.booleans())
def test_chunks_end_where_h11_ends_them(lengths: list[int], extension: bytes, has_trailer: bool) -> None:
    """An independent reader finds the same end of every well-formed body."""
    body = b"".join(b"%x%s\r\n%s\r\n" % (size, extension, b"\n" * size) for size in lengths if size)
    body += b"000\r\n" + b"X-Sum: 1\r\n" * has_trailer + b"\r\n"
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + body + NEXT)
    while not isinstance(reader.next_event(), h11.EndOfMessage):
        pass
    assert Chunked().feed(body + NEXT) == len(body)
    assert reader.trailing_data[0] == NEXT


sizes = st.lists(st.integers(1, 200), max_size=8)


def chunked(lengths: list[int]) -> bytes:
    """A body in chunks of these lengths."""
    return b"".join(b"%x\r\n%s\r\n" % (length, b"\r" * length) for length in lengths) + b"0\r\n\r\n"


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    """The data, cut at these marks."""
    at = sorted({0, len(data), *(mark % (len(data) + 1) for mark in marks)})
    return [data[a:b] for a, b in pairwise(at)]


@given(sizes, st.lists(st.integers(0, 3000), max_size=20), st.booleans())
def test_gate_in_any_split(lengths: list[int], marks: list[int], is_chunked: bool) -> None:
    """Whatever the split, the gate ends at the end of the body."""
    body = chunked(lengths) if is_chunked else b"x" * sum(lengths)
    line = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    event = HttpServer().receive(get(b"http://10.1.0.7/", line, method=b"PUT"))
    assert isinstance(event, Forward)
    assert sum(event.body.feed(piece) for piece in cut(body + NEXT, marks)) == len(body)
    assert event.body.done


@settings(deadline=None)
@given(st.binary(max_size=500) | st.just(CHUNKED), st.lists(st.integers(0, 500), max_size=20))
def test_gate_takes_anything(data: bytes, marks: list[int]) -> None:
    """Any bytes in any split: as many pass, or it is the named error."""

    def passed(pieces: list[bytes]) -> int | str:
        event = HttpServer().receive(get(b"http://10.1.0.7/", b"Transfer-Encoding: chunked"))
        assert isinstance(event, Forward)
        try:
            return sum(event.body.feed(piece) for piece in pieces)
        except FramingError as error:
            assert error.text
            return "error"

    assert passed([data]) == passed(cut(data, marks)) == passed(trickle(data))


# Smuggling, limits, errors


@pytest.mark.parametrize(
    ("data", "status", "hint"),
    [
        (get(b"http://a/", b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400, "both"),
        (get(b"http://a/", b"Transfer-Encoding: chunked", version=b"1.0"), 400, "HTTP/1.0"),
        (get(b"http://a/", b"Transfer-Encoding: gzip, chunked"), 501, "chunked"),
        (get(b"http://a/", b"Transfer-Encoding: identity"), 501, "chunked"),
        (get(b"http://a/", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 501, "multiple"),
        (get(b"http://a/", b"Transfer-Encoding: \x0bchunked"), 400, "illegal header"),
        (get(b"http://a/", b"Content-Length: 5", b"Content-Length: 6"), 400, "Content-Length"),
        (get(b"http://a/", b"Content-Length: 5, 6"), 400, "Content-Length"),
        (get(b"http://a/", b"Content-Length: -5"), 400, "Content-Length"),
        (get(b"http://a/", b"Content-Length: +5"), 400, "Content-Length"),
        (get(b"http://a/", b"Content-Length: 0x5"), 400, "Content-Length"),
        (get(b"http://a/", b"Content-Length:"), 400, "Content-Length"),
        (get(b"http://a/", b"Content-Length: " + b"9" * 21), 400, "Content-Length"),
        (get(b"http://a/", b"X: a", b" folded"), 400, "folded"),
        (get(b"http://a/", b"X: a", b"\tTransfer-Encoding: chunked"), 400, "folded"),
        (b"GET http://a/ HTTP/1.1\r\n Host: a\r\n\r\n", 400, "folded"),
        (get(b"http://a/", b"X: a\nTransfer-Encoding: chunked"), 400, "LF alone"),
        (b"GET http://a/ HTTP/1.1\nHost: a\n\n", 400, "LF alone"),
        (b"\n", 400, "LF alone"),
        (get(b"http://a/", b"X: a\rTransfer-Encoding: chunked"), 400, "illegal header"),
        (get(b"http://a/", b"X: a\r"), 400, "illegal header"),
        (get(b"http://a/", b"X: a\x00"), 400, "illegal header"),
        (get(b"http://a/", b"Content-Length : 5"), 400, "illegal header"),
        (get(b"http://a/", b": 5"), 400, "illegal header"),
        (get(b"http://a/", b"no colon"), 400, "illegal header"),
        (get(b"http://a/", b"Host: b"), 400, "multiple Host"),
        (b"GET http://a/ HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET  http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "illegal request line"),
        (b"GET http://a/ b HTTP/1.1\r\nHost: a\r\n\r\n", 400, "illegal request line"),
        (b"GET http://a/\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "illegal request line"),
        (b"GET http://a/\r\n\r\n", 400, "illegal request line"),
        (b"\r\n\nGET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "LF alone"),
        (b"\r\rGET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "illegal request line"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2.0 is not supported"),
        (get(b"http://a/", version=b"0.9"), 505, "HTTP/0.9 is not supported"),
        (get(b"http://a/", version=b"3.1"), 505, "HTTP/3.1 is not supported"),
        (b"GET http://a/ HTTP/1.2\r\n\r\n", 400, "Host"),
    ],
)
def test_faults(data: bytes, status: int, hint: str) -> None:
    """Whatever a next reader could read otherwise is refused, and so is every other fault, by name."""
    got, text = refused(data)
    assert got == status
    assert hint in text


@pytest.mark.parametrize("lines", [b"\r\n", b"\r\n" * 1000])
@pytest.mark.parametrize("split", [trickle, coalesced])
def test_empty_lines_before_the_request(split: Split, lines: bytes) -> None:
    """RFC 9112 section 2.2: a client may send CRLF behind the body of the request before."""
    seen = play(split(lines + CONNECT + b"raw"))
    assert seen.events == [Tunnel("10.1.0.7", 9100, is_name=False, authorization="")]
    assert (seen.rest, seen.error) == (b"raw", None)
    assert play(split(lines)).error is None


def test_a_later_minor_version_is_read_as_ours() -> None:
    """RFC 9110 section 2.5: HTTP/1.2 is processed as HTTP/1.1, and goes on as that."""
    event = forward(get(b"http://10.1.0.7/", version=b"1.2"))
    assert event.head.startswith(b"GET / HTTP/1.1\r\n")
    assert play([get(b"10.1.0.7:443", method=b"CONNECT", version=b"1.9")]).events


def test_field_limit() -> None:
    """A head has at most 100 fields: h11 spends on each of them, however short."""
    head = get(b"http://10.1.0.7/", *[b"a:"] * (MAX_FIELDS - 1))
    assert len(fields(head)) == MAX_FIELDS == 100
    forward(head)
    assert refused(get(b"http://10.1.0.7/", *[b"a:"] * MAX_FIELDS)) == (431, "more than 100 header fields")


def padded(size: int) -> bytes:
    """A request whose head has this size."""
    return get(b"http://10.1.0.7/", b"X: " + b"x" * (size - len(get(b"http://10.1.0.7/", b"X: "))))


def test_head_limit() -> None:
    """A head may have 64 KiB and no byte more, and without an end it is over at the same place."""
    assert len(padded(MAX_HEAD)) == MAX_HEAD == 65536
    forward(padded(MAX_HEAD))
    for data in (padded(MAX_HEAD + 1), padded(200_000), b"G" * MAX_HEAD, b"G" * 200_000):
        assert refused(data) == (431, "the head is over 65536 bytes")
    assert play(trickle(b"G" * (MAX_HEAD - 1))).error is None


def test_head_limit_is_the_callers() -> None:
    """The configuration may set another one."""
    assert HttpServer(max_head=100).receive(padded(100)) is not None
    with pytest.raises(HttpError, match="over 99 bytes"):
        HttpServer(max_head=99).receive(padded(100))


def test_early_data_limit() -> None:
    """Early data up to the limit is handed on; a byte more is an error, after the same event in any split."""
    full = CONNECT + b"e" * 64
    for pieces in ([full], trickle(full)):
        assert (seen := play(pieces)).error is None
        assert seen.rest == b"e" * 64
    for pieces in ([full + b"e"], trickle(full + b"e"), [full, b"e" * 100_000], [full + b"e" * 100_000]):
        seen = play(pieces)
        assert len(seen.events) == 1
        assert seen.error is not None
        assert seen.error[1] == "more than 64 bytes before the answer"
        assert parse_response(seen.error[2])[0] == 413
        assert seen.most <= 65


def test_default_early_data_limit() -> None:
    """16 KiB, unless said otherwise."""
    server = HttpServer()
    assert server.receive(CONNECT + bytes(MAX_EARLY_DATA)) is not None
    assert len(server.rest()) == MAX_EARLY_DATA
    with pytest.raises(HttpError):
        server.receive(bytes(MAX_EARLY_DATA + 1))


def test_nothing_after_an_error() -> None:
    """After an error bytes are dropped."""
    server = HttpServer()
    with pytest.raises(HttpError):
        server.receive(b"\n")
    assert server.receive(CONNECT) is None
    assert server.rest() == b""


def test_rest_before_the_request() -> None:
    """Before the end of the head there is nothing behind it."""
    server = HttpServer()
    server.receive(CONNECT[:-1])
    assert server.rest() == b""
    assert isinstance(server.receive(CONNECT[-1:]), Tunnel)


pieces_of_http = st.sampled_from(
    (
        *(b"GET ", b"CONNECT ", b"http://10.1.0.7", b":80", b"/", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"\r", b"\n"),
        *(b"Host: a\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"a: b", b" ", b"\x00"),
    )
)
requests = st.one_of(
    st.binary(max_size=300),
    st.lists(pieces_of_http, max_size=15).map(b"".join),
    st.builds(lambda head, tail: head + tail, st.sampled_from((CONNECT, NEXT, get())), st.binary(max_size=100)),
)


@settings(deadline=None)
@given(requests, st.lists(st.integers(0, 500), max_size=20))
@example(b"\r\n\r\n", [])
def test_any_split_is_the_same(data: bytes, marks: list[int]) -> None:
    """Any bytes in any split: the same event, rest and error, no other error, nothing held over a cap."""
    whole = play([data])
    for pieces in (cut(data, marks), trickle(data)):
        seen = play(pieces)
        assert (seen.events, seen.rest, seen.error) == (whole.events, whole.rest, whole.error)
        assert seen.most < MAX_HEAD


# h11's client as a peer, and the answers


@given(
    st.ip_addresses(),
    st.integers(1, 65535),
    st.from_regex(rb"[A-Za-z0-9/._~-]{0,40}(\?[a-z=&%]{0,20})?", fullmatch=True),
    st.lists(st.binary(min_size=1, max_size=300), max_size=4),
    st.booleans(),
)
def test_h11_client(host: object, port: int, path: bytes, parts: list[bytes], is_chunked: bool) -> None:
    """An independent client's request comes out for an independent server as the same request in origin form."""
    authority = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    framing = ("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(sum(map(len, parts))))
    client = h11.Connection(h11.CLIENT)
    target = f"http://{authority}/".encode() + path
    sent = client.send(h11.Request(method="POST", target=target, headers=[("Host", authority), framing, ("X-A", "1")]))
    for part in parts:
        sent += client.send(h11.Data(data=part))
    sent += client.send(h11.EndOfMessage())

    proxy = HttpServer()
    event = proxy.receive(sent + NEXT)
    assert isinstance(event, Forward)
    assert event.port == port
    rest = proxy.rest()
    server = h11.Connection(h11.SERVER)
    server.receive_data(event.head + rest[: event.body.feed(rest)])
    request = server.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (b"POST", b"/" + path)
    assert request.headers == [
        (b"host", authority.encode()),
        (framing[0].lower().encode(), framing[1].encode()),
        (b"x-a", b"1"),
        (b"via", b"1.1 rtunnel"),
        (b"connection", b"close"),
    ]
    body = b""
    while isinstance(got := server.next_event(), h11.Data):
        body += got.data
    assert isinstance(got, h11.EndOfMessage)
    assert body == b"".join(parts)
    assert server.trailing_data == (b"", False)


def test_h11_client_connects() -> None:
    """An independent client switches protocols at our answer to its CONNECT."""
    client = h11.Connection(h11.CLIENT)
    sent = client.send(h11.Request(method="CONNECT", target="10.1.0.7:9100", headers=[("Host", "10.1.0.7:9100")]))
    sent += client.send(h11.EndOfMessage())
    assert HttpServer().receive(sent) == Tunnel("10.1.0.7", 9100, is_name=False, authorization="")
    client.receive_data(response_connected() + b"raw")
    response = client.next_event()
    assert isinstance(response, h11.Response)
    assert (response.status_code, response.reason) == (200, b"Connection established")
    assert client.their_state is h11.SWITCHED_PROTOCOL
    assert client.trailing_data == (b"raw", False)


def reason_of(reply: bytes) -> str:
    """The reason phrase of a response, as h11's client reads it."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.receive_data(reply)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    return response.reason.decode("ascii")


def test_the_reason_phrase_says_it_all() -> None:
    """Many clients show the status line and nothing else."""
    reply = response_refused(Refusal.UNKNOWN_TARGET, "no agent answers for 10.1.0.7")
    assert reply.startswith(b"HTTP/1.1 502 unknown_target: no agent answers for 10.1.0.7\r\n")


@pytest.mark.parametrize(
    "head",
    [
        b"HEAD http://10.1.0.7/#x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HEAD " + b"x" * MAX_HEAD,
        b"\r\nHEAD / HTTP/1.1\r\n\r\n",
    ],
)
@pytest.mark.parametrize("split", [trickle, coalesced])
def test_the_refusal_of_a_head_has_no_body(head: bytes, split: Split) -> None:
    """RFC 9110 section 9.3.2: a body would be the start of the next answer."""
    error = play(split(head)).error
    assert error is not None
    assert parse_response(error[2], "HEAD")[2] == ""
    assert response_refused(Refusal.INTERNAL, of_head=True).endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["GET", "CONNECT"])
@pytest.mark.parametrize("code", Refusal)
def test_every_refusal_has_a_response(code: Refusal, method: str) -> None:
    """Every refusal is a whole response with the table's status, error token and text, to any method."""
    status, got, body = parse_response(response_refused(code), method)
    assert status == code.reply.http
    assert got["proxy-status"] == f'rtunnel; error={code.reply.proxy_status}; details="{code.reply.text}"'
    assert body == f"rtunnel: {code}: {code.reply.text}\n"
    assert reason_of(response_refused(code)) == f"{code}: {code.reply.text}"
    assert got["content-type"] == "text/plain"
    assert got["connection"] == "close"
    challenge = 'Basic realm="rtunnel", charset="UTF-8"' if status == 407 else None
    assert got.get("proxy-authenticate") == challenge


@given(
    st.text(min_size=1, max_size=40).filter(lambda name: name.isprintable() and ":" not in name),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
def test_basic_credentials(name: str, password: str) -> None:
    """RFC 7617 in UTF-8: the name ends at the first colon, the password may have more."""
    encoded = base64.b64encode(f"{name}:{password}".encode()).decode()
    for scheme in ("Basic", "basic", "BASIC "):
        assert basic_credentials(f"{scheme} {encoded}") == (name, password)


@pytest.mark.parametrize(
    "field", ["", "Basic", "Basic ?", "Basic YWxpY2U", "Basic YWxpY2U=", "Bearer YTpi", "Basic //86eA==", "Basic Onh4",
              "Basic YQo6Yg==", "Basic YTpi \xe9"],
)  # fmt: skip
def test_what_is_no_basic(field: str) -> None:
    """Another scheme, no base64, no colon, no UTF-8, an empty or unprintable name."""
    assert basic_credentials(field) is None


@given(st.text(max_size=600), st.text(min_size=1, max_size=50))
@example("a\r\nSet-Cookie: b=c\r\n\r\n", "rtunnel\r\nX: y")
@example('say "\\"', "gw-1.example")
@example("x" * 5000, '"')
def test_text_can_not_inject(text: str, proxy: str) -> None:
    """A text from anywhere stays one quoted string in one field, and one line of the body."""
    status, got, body = parse_response(response_refused(Refusal.TARGET_REFUSED, text, proxy=proxy))
    assert status == 502
    assert set(got) == {"proxy-status", "content-type", "content-length", "connection"}
    quoted = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
    token = r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*"
    assert re.fullmatch(f"(?:{token}|{quoted}); error=connection_refused; details={quoted}", got["proxy-status"])
    reason = reason_of(response_refused(Refusal.TARGET_REFUSED, text, proxy=proxy))
    assert reason.startswith("target_refused:") and reason.isprintable() and len(reason) <= MAX_REASON
    assert body.count("\n") == 1
    assert len(body) <= len("rtunnel: target_refused: \n") + MAX_TEXT
