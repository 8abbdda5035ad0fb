"""What a byte costs, at most 20 times as much as an ordinary one, and what a head costs, at most 20 ordinary ones.

The cost is counted in executed bytecode instructions, so that it is the same in every run. What happens in C (regular
expressions, searches) is not in it; each of those reads its bytes once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rtunnel.wire.http import Forward, HttpServer
from rtunnel.wire.http_body import Chunked
from rtunnel.wire.http_response import ResponseReader
from rtunnel.wire.refusal import Refused
from rtunnel.wire.socks5 import Authenticate, Socks5Server
from support.effort import times
from support.work import bytecodes

#: How much dearer than an ordinary byte any byte may be.
MOST: Final = 20
#: Bytes of a hostile input: a piece as the gateway reads it, so that what is spent once does not count.
SIZE: Final = 16 * 1024


def instructions(call: Callable[[], object]) -> int:
    """Return how many bytecodes a call executes; if it refuses, those up to there."""

    def until_refused() -> None:
        with suppress(Refused):
            call()

    return bytecodes(until_refused)


def client_of_http(data: bytes) -> None:
    """As the gateway reads a request, and what of its body came along."""
    server = HttpServer(keep=True)
    event = server.receive(data)
    if isinstance(event, Forward):
        event.body.feed(server.rest())


def target_of_http(data: bytes) -> None:
    """As the gateway reads an answer."""
    ResponseReader(is_head=False, keep=True, upgrade=True, max_head=65536).feed(data)


def body(data: bytes) -> None:
    """A chunked body."""
    Chunked().feed(data)


def client_of_socks(data: bytes) -> None:
    """As the gateway reads a SOCKS5 client that logs in."""
    server = Socks5Server(user_password=True)
    if isinstance(server.receive(data), Authenticate):
        server.authenticated(True)
    server.rest()


REQUEST: Final = (
    b"GET http://10.1.0.7:9100/metrics?collect=cpu HTTP/1.1\r\nHost: 10.1.0.7:9100\r\nUser-Agent: curl/8.5.0\r\n"
    b"Accept: text/html,application/xhtml+xml,*/*;q=0.8\r\nAccept-Encoding: gzip, deflate\r\nAccept-Language: en\r\n"
    b"Proxy-Connection: Keep-Alive\r\nCookie: session=0123456789abcdef0123456789abcdef\r\n"
    b"Connection: keep-alive\r\n\r\n"
)
ANSWER: Final = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.26\r\nDate: Sat, 28 Nov 2026 00:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b'Content-Length: 20\r\nConnection: keep-alive\r\nETag: "0123456789abcdef"\r\n\r\n' + b"x" * 20
)
CHUNKS: Final = b"10\r\n0123456789abcdef\r\n" * 4 + b"0\r\n\r\n"
SOCKS: Final = b"\5\1\2" + b"\1\5alice\6secret" + b"\5\1\0\1\x0a\1\0\7\x23\x8c"

#: What a hostile input is made of: a start, a piece again and again, and an end.
_START = st.sampled_from(
    [b"", REQUEST[:-2], b"GET http://a/ HTTP/1.1\r\nHost: a\r\n", ANSWER[:30], b"HTTP/1.1 200 \r\n", b"\5\1\2",
     REQUEST[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n",
     b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: ", b"0\r\n", b"\5\xff", SOCKS]
)  # fmt: skip
_PIECE = st.sampled_from(
    [b"a:\r\n", b"a: b\r\n", b"\r\n", b"\n", b"\r", b",", b"a,", b" ,", b"1\r\na\r\n", b"0\r\n", b"\r\n\r\n", b"\0",
     b"HTTP/1.1 100 \r\n\r\n", b"Content-Length: 0\r\n", b"5, ", b"Connection: a\r\n", b"Upgrade: a\r\n", b"Via: 1\r\n",
     b"\5"]
)  # fmt: skip
hostile = st.builds(
    lambda start, pieces, end: (start + (unit := b"".join(pieces)) * (SIZE // len(unit)))[: SIZE - len(end)] + end,
    _START,
    st.lists(_PIECE | st.binary(min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from([b"", b"\r\n\r\n", b"0\r\n\r\n"]),
)


@pytest.mark.parametrize(
    ("read", "ordinary"),
    [(client_of_http, REQUEST), (target_of_http, ANSWER), (body, CHUNKS), (client_of_socks, SOCKS)],
    ids=["client_of_http", "target_of_http", "body", "client_of_socks"],
)
def test_no_byte_is_dear(read: Callable[[bytes], None], ordinary: bytes) -> None:
    """Whatever comes, in one piece."""
    limit = MOST * instructions(lambda: read(ordinary)) / len(ordinary)

    @settings(max_examples=times(60), derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(hostile)
    @example(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * (SIZE // 4) + b"\r\n")
    @example(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: " + b"a," * (SIZE // 2) + b"\r\n\r\n")
    @example(b"HTTP/1.1 200 OK\r\n" + b"a:\r\n" * (SIZE // 4) + b"\r\n")
    @example(b"HTTP/1.1 100 C\r\n\r\n" * (SIZE // 18))
    @example(b"1\r\na\r\n" * (SIZE // 6))
    @example(b"0\r\n" + b"a:\r\n" * (SIZE // 4))
    def attack(data: bytes) -> None:
        cost = instructions(lambda: read(data)) / len(data)
        assert cost <= limit, f"{cost:.1f} instructions a byte, and an ordinary one costs {limit / MOST:.1f}"

    attack()


@pytest.mark.parametrize(("read", "ordinary"), [(client_of_http, REQUEST), (target_of_http, ANSWER)])
@pytest.mark.parametrize(
    "field",
    [
        b"a:", b"X: " + b"x" * 60_000, b"Connection: " + b"a," * 30_000,
        b"Upgrade: " + b"a," * 30_000 + b"\r\nConnection: upgrade",
        b"Content-Length: " + b"0," * 30_000 + b"0", b"Transfer-Encoding: " + b"a," * 30_000,
        b"Connection: " + b"a," * 300,
    ],
    ids=["tiny", "long", "connection", "upgrade", "length", "coding", "connections"],
)  # fmt: skip
def test_no_head_is_dear(read: Callable[[bytes], None], ordinary: bytes, field: bytes) -> None:
    """As many fields of a kind as 64 KiB have: a head may stop the thread that serves all streams for so long."""
    first = ordinary.partition(b"\r\n")[0] + (b"\r\nHost: a" if read is client_of_http else b"")
    count = (65536 - len(first) - 4) // (len(field) + 2)
    head = first + (b"\r\n" + field) * count + b"\r\n\r\n"
    assert 60_000 < len(head) <= 65536
    assert instructions(lambda: read(head)) <= MOST * instructions(lambda: read(ordinary))


@pytest.mark.parametrize("read", [HttpServer, Socks5Server, Chunked, "answer"])
def test_a_trickle_costs_what_it_has_bytes(read: Any) -> None:
    """Byte by byte, twice the bytes cost twice as much: nothing is read again and again."""

    def trickle(size: int) -> Callable[[], None]:
        feed: Callable[[bytes], object]
        if read == "answer":
            reader = ResponseReader(is_head=False, keep=True, upgrade=False, max_head=65536)
            data, feed = b"HTTP/1.1 200 OK\r\nX: " + b"x" * size, reader.feed
        elif read is Chunked:
            data, feed = b"0\r\nX: " + b"x" * size, Chunked().feed
        elif read is HttpServer:
            data, feed = b"GET http://a/" + b"x" * size, HttpServer().receive
        else:
            data, feed = b"\5\xff" + bytes(min(size, 250)), Socks5Server().receive

        def run() -> None:
            for at in range(len(data)):
                feed(data[at : at + 1])

        return run

    instructions(trickle(1))  # CPython 3.13 misses some bytecodes of a function that it traces for the first time
    once, twice = instructions(trickle(1000)), instructions(trickle(2000))
    assert twice <= 2.1 * once
