"""Health over HTTP: right answers to probes, bounded cost for everybody else."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from rtunnel import admin
from rtunnel.admin import Route, health_routes, json_answer, serve
from rtunnel.errors import ListenError

ROUTES = health_routes(list, lambda: {"node": "b1", "sessions": 3})


@asynccontextmanager
async def server(routes: Mapping[str, Route] = ROUTES) -> AsyncIterator[tuple[str, int]]:
    async with trio.open_nursery() as nursery:
        bound: tuple[str, int] = await nursery.start(serve, "127.0.0.1:0", routes)
        yield bound
        nursery.cancel_scope.cancel()


async def ask(at: tuple[str, int], request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Send bytes, read to the end; status, headers, body."""
    async with await trio.open_tcp_stream(*at) as stream:
        await stream.send_all(request)
        return parse(await read(stream))


async def read(stream: trio.SocketStream) -> bytes:
    return b"".join([chunk async for chunk in stream])


def parse(answer: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    pairs = (line.partition(b": ") for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}, body


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_probes() -> None:
    """livez, readyz and statusz answer JSON, with a query too."""
    async with server() as at:
        assert (await ask(at, get("/livez")))[0] == 200
        status, headers, body = await ask(at, get("/statusz?pretty"))
        assert (status, json.loads(body)) == (200, {"node": "b1", "sessions": 3})
        assert headers[b"content-type"] == b"application/json"
        assert headers[b"connection"] == b"close"
        status, _, body = await ask(at, get("/readyz"))
        assert (status, json.loads(body)) == (200, {"ready": True, "reasons": []})


async def test_not_ready_says_what_is_missing() -> None:
    """readyz is 503 with the reasons while something is missing."""
    async with server(health_routes(lambda: ["redundancy 1/2"], dict)) as at:
        status, _, body = await ask(at, get("/readyz"))
    assert (status, json.loads(body)) == (503, {"ready": False, "reasons": ["redundancy 1/2"]})


async def test_head_has_no_body() -> None:
    """HEAD answers like GET, without the body."""
    async with server() as at:
        status, headers, body = await ask(at, get("/readyz", "HEAD"))
    assert (status, body) == (200, b"")
    assert int(headers[b"content-length"]) > 0


async def test_unknown_paths_list_the_known() -> None:
    """404 lists the paths."""
    async with server() as at:
        status, _, body = await ask(at, get("/metricz"))
    assert (status, body) == (404, b"/livez\n/readyz\n/statusz\n/metrics\n")


async def test_other_methods_are_refused() -> None:
    """POST is 405 and says what is allowed, even with a body that is larger than anything."""
    async with server() as at:
        post = b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 4096
        status, headers, _ = await ask(at, post)
    assert (status, headers[b"allow"]) == (405, b"GET, HEAD")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / GOPHER\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_400(request_bytes: bytes) -> None:
    """A TLS hello, a missing Host, half a request line: 400."""
    async with server() as at:
        status, _, _ = await ask(at, request_bytes)
    assert status == 400


async def test_a_head_has_a_limit() -> None:
    """A head over 8 KiB is refused, whether it comes at once or has no end."""
    async with server() as at:
        status, _, _ = await ask(at, b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (2 * admin.MAX_HEAD))
    assert status == 431


async def test_requests_byte_by_byte() -> None:
    """A request that trickles in is answered like a whole one."""
    async with server() as at, await trio.open_tcp_stream(*at) as stream:
        for byte in get("/livez"):
            await stream.send_all(bytes([byte]))
        status, _, _ = parse(await read(stream))
    assert status == 200


async def test_a_failing_route_is_500() -> None:
    """A bug in a route does not end the server."""

    def broken() -> admin.Answer:
        raise RuntimeError("bug")

    async with server({"/broken": broken, "/fine": lambda: json_answer(1)}) as at:
        assert (await ask(at, get("/broken")))[0] == 500
        assert (await ask(at, get("/fine")))[0] == 200


@pytest.mark.parametrize("said", [b"G", get("/livez")[:-1]])
async def test_slow_requests_are_told(autojump_clock: trio.testing.MockClock, said: bytes) -> None:
    """Half a request is 408 after five seconds."""
    async with server() as at:
        began = trio.current_time()
        status, headers, body = await ask(at, said)
        assert (status, body) == (408, b"the request was not complete within 5 s\n")
        assert headers[b"connection"] == b"close"
        assert trio.current_time() - began == pytest.approx(admin.DEADLINE, abs=0.5)


async def test_silent_connections_have_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """Who says nothing is disconnected after five seconds, without a word."""
    async with server() as at, await trio.open_tcp_stream(*at) as stream:
        began = trio.current_time()
        assert await _ended(stream)
        assert trio.current_time() - began == pytest.approx(admin.DEADLINE, abs=0.5)


async def test_answers_have_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """A route that never answers costs no more than another five seconds."""

    async def stuck() -> admin.Answer:
        await trio.sleep_forever()
        raise AssertionError

    async with server({"/stuck": stuck}) as at, await trio.open_tcp_stream(*at) as stream:
        began = trio.current_time()
        await stream.send_all(get("/stuck"))
        assert await _ended(stream)
        assert trio.current_time() - began == pytest.approx(admin.DEADLINE, abs=0.5)


async def test_idle_connections_cant_keep_a_probe_out() -> None:
    """With 32 silent connections the oldest gives way to a probe, and there are never more than 32."""
    async with server() as at:
        idle = [await trio.open_tcp_stream(*at) for _ in range(admin.MAX_CONNECTIONS)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await ask(at, get("/livez")))[0] == 200
        assert await _ended(idle[0])
        with trio.move_on_after(0.05) as scope:
            await idle[1].receive_some(1)
        assert scope.cancelled_caught
        for stream in idle:
            await stream.aclose()


async def _ended(stream: trio.SocketStream) -> bool:
    try:
        return await stream.receive_some(1) == b""
    except trio.BrokenResourceError:
        return True


async def test_an_address_in_use_names_the_key() -> None:
    """A taken port is told with the key that gave it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            await serve(f"127.0.0.1:{port}", ROUTES, key="broker.admin")
    assert str(caught.value).startswith(f"broker.admin: can't listen on 127.0.0.1:{port}: the address is in use")


async def test_a_foreign_address_names_the_key() -> None:
    """An address that this machine does not have is told as that."""
    with pytest.raises(ListenError, match="does not have that address"):
        await serve("203.0.113.9:0", ROUTES)


async def test_ipv6() -> None:
    """[::1]:0 listens on IPv6."""
    async with trio.open_nursery() as nursery:
        try:
            bound: tuple[str, int] = await nursery.start(serve, "[::1]:0", ROUTES)
        except ListenError:
            pytest.skip("no IPv6 here")
        assert (await ask(bound, get("/livez")))[0] == 200
        nursery.cancel_scope.cancel()


async def test_all_addresses_of_both_families() -> None:
    """[::]:0 takes IPv4, too, as all other listeners do."""
    async with trio.open_nursery() as nursery:
        try:
            _, port = await nursery.start(serve, "[::]:0", ROUTES)
        except ListenError:
            pytest.skip("no IPv6 here")
        for host in ("127.0.0.1", "::1"):
            assert (await ask((host, port), get("/livez")))[0] == 200
        nursery.cancel_scope.cancel()


async def test_a_machine_without_ipv6_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such sockets at all: the key is told, too."""

    def none(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr("rtunnel.net.socket.socket", none)
    with pytest.raises(ListenError, match=r"^broker\.admin: can't listen on \[::\]:7070: address family not supported"):
        await serve("[::]:7070", ROUTES, key="broker.admin")
