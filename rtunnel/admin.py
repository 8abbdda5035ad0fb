"""Health over HTTP: a small HTTP/1.1 server for probes, with one request for each connection.

It answers GET and HEAD of fixed paths, and passes requests for `/v1/` on to the API (`api`). Its
costs are bounded: a request's head has a maximum size, and a request and its answer have deadlines.
When all places are taken, the server closes the oldest connection: a good probe takes milliseconds,
so the oldest connection is the least likely to be one.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import h11
import msgspec
import trio

from rtunnel import api, logs, metrics, pulse
from rtunnel.api import Api, error_answer
from rtunnel.config import format_endpoint, parse_endpoint
from rtunnel.errors import ListenError
from rtunnel.net import listening_socket

#: Bytes of a request's line and headers; a probe sends 100 to 500.
MAX_HEAD = 8 * 1024
#: Seconds from accept to a whole request, and as many from there to the close.
DEADLINE = 5.0
MAX_CONNECTIONS = 32
#: Seconds to wait for the relay's thread. Its turns take milliseconds, and more on a busy machine;
#: the probes of deploy/kubernetes wait 5 s.
LIVE_PATIENCE = 2.0
#: "fd:7" is a listening socket that a worker inherits from its supervisor. A configuration cannot
#: name one, because the host of an address to listen on must be an IP.
INHERITED = "fd"
#: Seconds that the server waits for the client's FIN after the answer, because a close with unread
#: bytes sends a reset, which could overtake the answer.
LINGER = 1.0

#: The answer of a path: status, content type, body.
Answer = tuple[int, str, bytes]
Route = Callable[[], Answer | Awaitable[Answer]]

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

log = logs.get_logger("admin")


def json_answer(value: object, status: int = 200) -> Answer:
    """Return an answer with one JSON value."""
    return status, JSON, msgspec.json.encode(value, enc_hook=str) + b"\n"


def metrics_answer(status: Mapping[str, Any]) -> Answer:
    """Return an answer with a status in the text format of Prometheus."""
    return 200, metrics.CONTENT_TYPE, metrics.text(status)


def health_routes(
    reasons: Callable[[], Sequence[str]],
    status: Callable[[], Mapping[str, Any]],
    answered: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
    warnings: Callable[[], Sequence[str]] = tuple,
) -> dict[str, Route]:
    """Return the routes `/livez`, `/readyz`, `/statusz` and `/metrics` of a role.

    `reasons` returns why the role is not ready, and `status` its state. `warnings` returns faults
    with which the role is still ready, because a role with them serves its clients better than no
    role. `answered` returns when the role's thread has answered; while it hangs, `/livez` is 503.
    """

    async def live() -> Answer:
        with trio.move_on_after(LIVE_PATIENCE):
            await answered()
            return json_answer({"live": True})
        return json_answer({"live": False, "reason": f"the relay did not answer for {LIVE_PATIENCE:g} s"}, 503)

    def ready() -> Answer:
        missing = list(reasons())
        answer = {"ready": not missing, "reasons": missing}
        if told := list(warnings()):
            answer["warnings"] = told
        return json_answer(answer, 503 if missing else 200)

    return {
        "/livez": live,
        "/readyz": ready,
        "/statusz": lambda: json_answer(status()),
        "/metrics": lambda: metrics_answer(status()),
    }


class Part(pulse.Part, Protocol):
    """A role's main object, which `run` runs."""

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        """Run the role until it has drained after `stop`."""


async def run_beside(
    part: Part,
    address: str,
    *,
    key: str,
    status: Callable[[], Mapping[str, Any]],
    stop: trio.Event,
    task_status: trio.TaskStatus[Any],
    warnings: Callable[[], Sequence[str]] = tuple,
    calls: Api | None = None,
) -> None:
    """Run a role, with its health endpoint unless `address` is empty.

    Raises ListenError, which names `key`, and the errors of the role.
    """
    async with trio.open_nursery() as nursery:
        if address:
            routes = health_routes(part.reasons, status, part.answered, warnings)
            if calls is not None:
                description = calls.description(f"rtunnel: {key.partition('.')[0]}")
                routes["/openapi.json"] = lambda: json_answer(description)
            await nursery.start(partial(serve, address, routes, key=key, calls=calls))
        await part.run(stop, task_status)
        nursery.cancel_scope.cancel()


async def serve(
    address: str,
    routes: Mapping[str, Route],
    *,
    key: str = "admin",
    calls: Api | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `routes` on "host:port" until cancelled; `started` gives the bound (host, port).

    The address may also be a listening socket, "fd:number". Routes run in trio's thread and must
    not block. Raises ListenError, which names `key`.
    """
    async with trio.SocketListener(trio.socket.from_stdlib_socket(_listening(address, key))) as listener:
        bound: tuple[str, int] = listener.socket.getsockname()[:2]
        log.info("admin_endpoint_opened", address=format_endpoint(*bound), paths=list(routes))
        task_status.started(bound)
        await trio.serve_listeners(_Server(routes, calls).connection, [listener])


def _listening(address: str, key: str) -> socket.socket:
    host, port = parse_endpoint(address)
    if host != INHERITED:
        return listening_socket(host, port, key=key)
    try:
        return socket.socket(fileno=port)
    except OSError as error:
        raise ListenError(key, address, error) from error


class _Server:
    def __init__(self, routes: Mapping[str, Route], calls: Api | None) -> None:
        self._routes = routes
        self._calls = calls
        self._scopes: dict[trio.CancelScope, None] = {}  # of connections, the oldest first

    async def connection(self, stream: trio.SocketStream) -> None:
        if len(self._scopes) >= MAX_CONNECTIONS:
            oldest = next(iter(self._scopes))
            del self._scopes[oldest]
            oldest.cancel()
        with trio.CancelScope() as scope:
            self._scopes[scope] = None
            try:
                await _converse(stream, self._routes, self._calls)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            except Exception:
                log.exception("admin_connection_failed")
            finally:
                self._scopes.pop(scope, None)


async def _converse(stream: trio.SocketStream, routes: Mapping[str, Route], calls: Api | None) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    request = await _request(http, stream)
    if calls is not None and isinstance(request, h11.Request) and request.target.startswith(api.PREFIX.encode()):
        await _converse_api(http, stream, request, calls)
        return
    with trio.move_on_after(DEADLINE):
        if isinstance(request, h11.Request):
            answer, allow = await _answer(request, routes)
            await _send(http, stream, answer, request.method == b"HEAD", allow)
        elif request is not None:
            await _send(http, stream, request, False, False)
        else:
            return
        await _linger(stream)


async def _linger(stream: trio.SocketStream) -> None:
    """Let the client close first."""
    await stream.send_eof()
    with trio.move_on_after(LINGER):
        for _ in range(16):
            if not await stream.receive_some(MAX_HEAD):
                break


async def _converse_api(http: h11.Connection, stream: trio.SocketStream, request: h11.Request, calls: Api) -> None:
    try:
        local, peer = (str(address[0]) for address in (stream.socket.getsockname(), stream.socket.getpeername()))
    except OSError:
        return  # the client has gone
    with trio.move_on_after(api.DEADLINE):
        body = await _body(http, stream)
        answer = await calls.answer(request, body, local, peer) if isinstance(body, bytes) else body
        await _send(http, stream, answer, request.method == b"HEAD", False)
        await _linger(stream)


async def _body(http: h11.Connection, stream: trio.SocketStream) -> bytes | Answer:
    """Return the request's body, or the answer to one that is too long, broken or late."""
    body = b""
    with trio.move_on_after(DEADLINE):
        try:
            while not isinstance(event := http.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
                if isinstance(event, h11.Data):
                    body += bytes(event.data)
                    if len(body) > api.MAX_BODY:
                        return error_answer(413, f"the body is over {api.MAX_BODY} bytes")
                else:
                    http.receive_data(await stream.receive_some(MAX_HEAD))
        except h11.RemoteProtocolError as error:
            return error_answer(error.error_status_hint, str(error))
        return body
    return error_answer(408, f"no whole request in {DEADLINE:g} s")


async def _request(http: h11.Connection, stream: trio.SocketStream) -> h11.Request | Answer | None:
    """Return the request's head, or the answer to a malformed one, or None for a silent client."""
    with trio.move_on_after(DEADLINE):
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                data = await stream.receive_some(MAX_HEAD)
                if not data:
                    return None
                http.receive_data(data)
        except h11.RemoteProtocolError as error:
            return error.error_status_hint, TEXT, f"{error}\n".encode()
        return event if isinstance(event, h11.Request) else None
    # A silent client gets no 408: a client that connects before it has a request would take the 408
    # for the answer to that request.
    return (
        (408, TEXT, f"the request was not complete within {DEADLINE:g} s\n".encode()) if http.trailing_data[0] else None
    )


async def _answer(request: h11.Request, routes: Mapping[str, Route]) -> tuple[Answer, bool]:
    """Return the answer, and whether it must name the allowed methods."""
    path = request.target.partition(b"?")[0].decode("ascii", "replace")
    route = routes.get(path)
    if route is None:
        return (404, TEXT, "".join(f"{known}\n" for known in routes).encode()), False
    if request.method not in (b"GET", b"HEAD"):
        return (405, TEXT, b"this server answers GET and HEAD only\n"), True
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
    # The answer to HEAD has the length of the body, but not the body: h11 expects its caller to
    # leave the body out.
    sent = b"" if head else body
    events = [h11.Response(status_code=status, headers=headers), h11.Data(data=sent), h11.EndOfMessage()]
    await stream.send_all(b"".join(http.send(event) or b"" for event in events))
