"""Health over HTTP: a very small HTTP/1.1 server for probes, one request a connection.

It answers GET and HEAD of fixed paths and nothing else. Whoever is slow, large or many costs it a bounded amount: a
request head has a size, a connection has a deadline, and when there are too many connections the oldest is closed: a
probe that works is done in milliseconds, so the oldest is the one that does not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import h11
import msgspec
import trio

from rtunnel import logs, metrics
from rtunnel.config import format_endpoint, parse_endpoint
from rtunnel.roles import ListenError

#: A request's line and headers: a probe sends 100 to 500 bytes.
MAX_HEAD = 8 * 1024
#: A connection from accept to close.
DEADLINE = 5.0
MAX_CONNECTIONS = 32
#: "fd:7" is a listening socket that the supervisor has handed down. No key can say that: a host is an address there.
INHERITED = "fd"
#: After the answer the client may close first so long; a reset could otherwise overtake the answer.
LINGER = 1.0

#: What a path answers: status, content type, body.
Answer = tuple[int, str, bytes]
Route = Callable[[], Answer | Awaitable[Answer]]

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

log = logs.get_logger("admin")


def json_answer(value: object, status: int = 200) -> Answer:
    """An answer of one JSON value."""
    return status, JSON, msgspec.json.encode(value, enc_hook=str) + b"\n"


def metrics_answer(status: Mapping[str, Any]) -> Answer:
    """A status as Prometheus reads it."""
    return 200, metrics.CONTENT_TYPE, metrics.text(status)


def health_routes(reasons: Callable[[], Sequence[str]], status: Callable[[], Mapping[str, Any]]) -> dict[str, Route]:
    """The paths of a role: `reasons` says what is missing to be ready, `status` tells its state."""

    def ready() -> Answer:
        missing = list(reasons())
        return json_answer({"ready": not missing, "reasons": missing}, 503 if missing else 200)

    return {
        "/livez": lambda: json_answer({"live": True}),
        "/readyz": ready,
        "/statusz": lambda: json_answer(status()),
        "/metrics": lambda: metrics_answer(status()),
    }


class Part(Protocol):
    """A role's main object."""

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        """Its life."""

    def reasons(self) -> list[str]:
        """Why it is not ready."""


async def run_beside(
    part: Part,
    address: str,
    *,
    key: str,
    status: Callable[[], Mapping[str, Any]],
    stop: trio.Event,
    task_status: trio.TaskStatus[Any],
) -> None:
    """Run a role with its health endpoint beside it, unless `address` is empty."""
    async with trio.open_nursery() as nursery:
        if address:
            await nursery.start(partial(serve, address, health_routes(part.reasons, status), key=key))
        await part.run(stop, task_status)
        nursery.cancel_scope.cancel()


async def serve(
    address: str,
    routes: Mapping[str, Route],
    *,
    key: str = "admin",
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `routes` on "host:port" (or a listening socket, "fd:number") until cancelled; `started` gives the bound
    (host, port).

    Routes run in the trio thread and must not block. Raises ListenError, which names `key`, when it can't listen.
    """
    host, port = parse_endpoint(address)
    try:
        if host == INHERITED:
            listener = trio.SocketListener(trio.socket.socket(fileno=port))
        else:
            (listener,) = await trio.open_tcp_listeners(port, host=host)
    except OSError as fault:
        raise ListenError(key, address, fault) from fault
    bound: tuple[str, int] = listener.socket.getsockname()[:2]
    scopes: dict[trio.CancelScope, None] = {}  # in the order of their arrival

    async def connection(stream: trio.SocketStream) -> None:
        if len(scopes) >= MAX_CONNECTIONS:
            oldest = next(iter(scopes))
            del scopes[oldest]
            oldest.cancel()
        with trio.move_on_after(DEADLINE) as scope:
            scopes[scope] = None
            try:
                await _converse(stream, routes)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            except Exception:
                log.exception("admin_connection_failed")
            finally:
                scopes.pop(scope, None)

    async with listener:
        log.info("admin_listening", address=format_endpoint(*bound), paths=list(routes))
        task_status.started(bound)
        await trio.serve_listeners(connection, [listener])


async def _converse(stream: trio.SocketStream, routes: Mapping[str, Route]) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    try:
        request = await _request(http, stream)
    except h11.RemoteProtocolError as fault:
        status = fault.error_status_hint
        answer, head, allow = (status, TEXT, f"{fault}\n".encode()), False, False
    else:
        if request is None:
            return
        head = request.method == b"HEAD"
        answer, allow = await _answer(request, routes)
    await _send(http, stream, answer, head, allow)
    await stream.send_eof()
    with trio.move_on_after(LINGER):
        for _ in range(16):
            if not await stream.receive_some(MAX_HEAD):
                break


async def _request(http: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """The request's head; None when the client went away before it was whole."""
    while True:
        event = http.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        data = await stream.receive_some(MAX_HEAD)
        if not data:
            return None
        http.receive_data(data)


async def _answer(request: h11.Request, routes: Mapping[str, Route]) -> tuple[Answer, bool]:
    """The answer, and whether it must name the allowed methods."""
    path = request.target.partition(b"?")[0].decode("ascii", "replace")
    route = routes.get(path)
    if route is None:
        return (404, TEXT, "".join(f"{known}\n" for known in routes).encode()), False
    if request.method not in (b"GET", b"HEAD"):
        return (405, TEXT, b"GET and HEAD only\n"), True
    try:
        answer = route()
        return (answer if isinstance(answer, tuple) else await answer), False
    except Exception:
        log.exception("admin_route_failed", path=path)
        return json_answer({"error": "internal error, see the log"}, 500), False


async def _send(http: h11.Connection, stream: trio.SocketStream, answer: Answer, head: bool, allow: bool) -> None:
    status, kind, body = answer
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
    ]
    if allow:
        headers.append(("Allow", "GET, HEAD"))
    # To HEAD the length is told and the body kept: h11 knows the first, and wants the second from us.
    sent = b"" if head else body
    events = [h11.Response(status_code=status, headers=headers), h11.Data(data=sent), h11.EndOfMessage()]
    await stream.send_all(b"".join(http.send(event) or b"" for event in events))
