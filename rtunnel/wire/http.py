"""HTTP/1.1 for a proxy, sans-I/O (RFC 9110, 9112): reads requests with CONNECT or in absolute form.

h11 reads the grammar. This module adds a proxy's part: one limit on the head, strict checks so that
no later reader can read a message differently, the target, and the head that the target gets.
Answers other than our own refusals come from the target (`http_response.py`).

A connection may serve several requests, each to its own target. `Upgrade` is passed on (a WebSocket
in absolute form), but not h2c: its other field, HTTP2-Settings, is hop-by-hop, and the target may
answer without an upgrade (RFC 9110 section 7.8).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

import h11

from .http_body import Body, Chunked, Sized
from .refusal import Refusal, Refused
from .socks5 import MAX_EARLY_DATA, host_of

#: Bytes of request line, fields and the empty line. Kerberos tickets and cookies of large sites
#: need more than the 16 KiB that h11 and IIS take.
MAX_HEAD: Final = 64 * 1024
#: Fields of one head, as in Apache and HAProxy. h11 spends 2.5 us on each, whatever its length.
MAX_FIELDS: Final = 100
#: Bytes of all list fields that are read here, together: each element costs as much as a copy of 1
#: KiB.
MAX_LISTS: Final = 2048
#: Bytes of the text in the body of a refusal.
MAX_TEXT: Final = 512
#: Bytes of the reason phrase. Many clients show nothing else, and some cut the line at 256 bytes.
MAX_REASON: Final = 200

#: Fields that a proxy removes (RFC 9110 section 7.6.1), beside those that Connection names.
#: Transfer-Encoding is one of them in the RFC, but the body is passed on as it is coded. Trailer
#: stays for the same reason.
_HOP_BY_HOP = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"te", b"upgrade"))
_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
#: Fields that this proxy reads, or writes again.
_OURS = frozenset((b"host", b"proxy-authorization"))
#: Fields that a Connection field cannot remove: otherwise the target would find another end of the
#: body.
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))

_HEAD_END = re.compile(rb"\r\n\r\n|(?<!\r)\n")
_FOLD = re.compile(rb"\r\n[ \t]")
#: RFC 9112 section 2.2: clients may send empty lines before a request line (after the body of a
#: POST).
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_LISTS = re.compile(rb"\r\n(?:connection|upgrade|content-length|transfer-encoding)[ \t]*:([^\r]*)", re.IGNORECASE)
_LATER_VERSION = re.compile(rb"[^\r\n]* HTTP/1\.(?=[2-9]\r\n)")
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)(/[^?]*)?(\?.*)?")
# RFC 3986 section 3.2.2, without percent-encoding: a second spelling of a host helps only
# attackers.
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[A-Za-z0-9._~!$&'()*+,;=-]*)(?::([0-9]{0,5}))?")
_HEALTH = re.compile(rb"(GET|HEAD) /healthz HTTP/1\.[0-9]\r\n")
_TOKEN = re.compile(r"[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*")


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A CONNECT request for a raw stream to host:port. `rest` is the beginning of the stream."""

    host: str
    port: int
    is_name: bool
    authorization: str = field(repr=False)  # the Proxy-Authorization, "" when absent


@dataclass(frozen=True, slots=True)
class Forward:
    """A request in absolute form.

    The target gets `head`, then the client's bytes that belong to `body`.
    """

    host: str
    port: int
    is_name: bool
    authorization: str = field(repr=False)
    method: bytes
    keep: bool  # another request may follow on this connection
    upgrade: bool  # the client offers another protocol
    #: Whether the request may be sent again when a reused connection ends without an answer (RFC
    #: 9110 section 9.2.2): the method is idempotent, and no part of the body has been sent.
    replayable: bool
    head: bytes
    body: Body = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Health:
    """A `GET /healthz` or HEAD request, with which a load balancer checks this gateway."""

    of_head: bool


class HttpError(Refused):
    """The client broke the protocol or asks for an unsupported feature: send `reply` and close."""

    def __init__(self, text: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(Refusal.BAD_REQUEST, _printable(text))
        self.status = status
        self.of_head = False  # a HEAD request, whose answer has no body

    @property
    def reply(self) -> bytes:
        """The complete response, as bytes."""
        return _response(self.status, self.code, self.text, of_head=self.of_head)


class HttpServer:
    """Reads one request of a client, in any split of its bytes.

    Call `receive` until it returns a Tunnel, a Forward or a Health. `rest` is then what the client
    sent behind the head: for a Tunnel the beginning of the stream, for a Forward bytes of its body.
    Bytes after an error are dropped.
    """

    __slots__ = ("_buffer", "_keep", "_max_early", "_max_head", "_over", "_read", "_scanned")

    def __init__(self, *, keep: bool = False, max_head: int = MAX_HEAD, max_early: int = MAX_EARLY_DATA) -> None:
        """Start to read a request.

        `keep`: another request may follow on the connection. `max_head`: bytes of the head.
        `max_early`: bytes behind the head before the answer.
        """
        self._keep = keep
        self._max_head = max_head
        self._max_early = max_early
        self._buffer = bytearray()
        self._scanned = 0
        self._read = False
        self._over = False

    def receive(self, data: bytes | bytearray | memoryview) -> Tunnel | Forward | Health | None:
        """Process bytes, which are not kept.

        Return the request when it is complete. Raises HttpError.
        """
        if self._over:
            return None
        self._buffer += data
        try:
            if not self._read:
                return self._read_head()
            self._bound()
        except HttpError as error:
            error.of_head = self._buffer.startswith(b"HEAD ")
            self._end()
            raise
        return None

    @property
    def begun(self) -> bool:
        """Whether bytes of a request have arrived; empty lines do not count."""
        return self._read or self._over or len(self._buffer) > 0

    def rest(self) -> bytes:
        """Return and remove the bytes behind the head.

        Raises HttpError when they are over the limit.
        """
        if self._over or not self._read:
            return b""
        try:
            self._bound()
        except HttpError:
            self._end()
            raise
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _end(self) -> None:
        self._over = True
        self._buffer.clear()

    def _bound(self) -> None:
        if len(self._buffer) > self._max_early:
            raise HttpError(f"more than {self._max_early} bytes before the answer", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    def _read_head(self) -> Tunnel | Forward | Health | None:
        buffer = self._buffer
        if buffer.startswith(b"\r\n"):
            empty = _EMPTY_LINES.match(buffer)
            assert empty is not None
            del buffer[: empty.end()]
            self._scanned = 0
        found = _HEAD_END.search(buffer, max(0, self._scanned - 3), self._max_head)
        if found is None:
            self._scanned = len(buffer)
            if len(buffer) >= self._max_head:
                raise HttpError(f"the head is over {self._max_head} bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return None
        if len(found[0]) == 1:
            raise HttpError("a line ends with LF alone")
        event = _read_request(bytes(buffer[: found.end()]), self._keep)
        self._read = True
        # One byte over the limit is kept as a sign of more, so that the event comes first in any
        # split.
        self._buffer = buffer[found.end() : found.end() + self._max_early + 1]
        return event


def response_connected() -> bytes:
    """Return the answer to CONNECT after the target is connected; the raw stream follows it."""
    return b"HTTP/1.1 200 Connection established\r\n\r\n"


def response_refused(code: Refusal, text: str = "", *, proxy: str = "rtunnel", of_head: bool = False) -> bytes:
    """Return the response for a refusal.

    `text` replaces the code's sentence; `proxy` names the node. `of_head`: it answers a HEAD
    request, and ends with the head (RFC 9110 section 9.3.2).
    """
    return _response(code.reply.http, code, _printable(text or code.reply.text), proxy, of_head=of_head)


def response_health(ready: bool, *, of_head: bool = False) -> bytes:
    """Return the answer to a Health.

    It has no reasons, since anybody may ask: see the admin endpoint.
    """
    status = "200 ready" if ready else "503 not ready"
    body = "ready\n" if ready else "not ready: /readyz on the admin endpoint says why\n"
    return (
        f"HTTP/1.1 {status}\r\n"
        "Content-Type: text/plain\r\n"
        "Cache-Control: no-store\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n"
        f"\r\n{'' if of_head else body}"
    ).encode("ascii")


def health_probe(data: bytes) -> Health | None:
    """Return the probe that these bytes begin, or None. Serves connections over the limit."""
    found = _HEALTH.match(data)
    return Health(of_head=found[1] == b"HEAD") if found else None


def basic_credentials(authorization: str) -> tuple[str, str] | None:
    """Return (user, password) of a Proxy-Authorization field (RFC 7617, UTF-8), or None."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    # User names go into log lines, so that they must be printable.
    return (user, password) if colon and user and user.isprintable() else None


def _response(status: int, code: Refusal, text: str, proxy: str = "rtunnel", *, of_head: bool = False) -> bytes:
    """Return the header fields of a refusal. Proxy-Status is RFC 9209.

    The reason phrase says the same, because most clients show only that.
    """
    # A 407 must name the schemes (RFC 9110 section 15.5.8).
    challenge = 'Proxy-Authenticate: Basic realm="rtunnel", charset="UTF-8"\r\n' if status == 407 else ""
    body = f"rtunnel: {code}: {text}\n"
    name = proxy if _TOKEN.fullmatch(proxy) else _quoted(_printable(proxy))
    return (
        f"HTTP/1.1 {status} {f'{code}: {text}'[:MAX_REASON].rstrip()}\r\n"
        f"Proxy-Status: {name}; error={code.reply.proxy_status}; details={_quoted(text)}\r\n"
        f"{challenge}"
        "Content-Type: text/plain\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n"
        f"\r\n{'' if of_head else body}"
    ).encode("ascii")


def _printable(text: str) -> str:
    """Return the text as one line of printable ASCII, because a peer may have written it."""
    return re.sub(r"[^ -~]", "?", text[:MAX_TEXT])


def _quoted(text: str) -> str:
    """Return the text as an sf-string (RFC 8941 section 3.3.3)."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _read_request(head: bytes, keep: bool) -> Tunnel | Forward | Health:
    # A folded line is refused (RFC 9112 section 5.2); h11 would unfold it.
    if _FOLD.search(head):
        raise HttpError("a folded field line")
    # RFC 9110 section 2.5: a later minor version is read as the latest one that we implement.
    if later := _LATER_VERSION.match(head):
        head = head[: later.end()] + b"1" + head[later.end() + 1 :]
    if head.count(b"\r\n") - 2 > MAX_FIELDS:  # without the request line and the empty line
        raise HttpError(f"more than {MAX_FIELDS} header fields", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    if sum(map(len, _LISTS.findall(head))) > MAX_LISTS:
        text = f"Connection, Upgrade and the body's framing have more than {MAX_LISTS} bytes"
        raise HttpError(text, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head) + 1)
    connection.receive_data(head)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise _malformed(error) from None
    assert isinstance(request, h11.Request)
    if request.http_version not in (b"1.1", b"1.0"):
        version = request.http_version.decode()
        raise HttpError(f"HTTP/{version} is not supported: use HTTP/1.1", HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    length = _body_length(request)
    if request.method == b"CONNECT":
        return _tunnel(request, length)
    if request.target == b"/healthz" and request.method in (b"GET", b"HEAD"):
        return Health(of_head=request.method == b"HEAD")
    return _forward(request, Chunked() if length is None else Sized(length), keep)


def _body_length(request: h11.Request) -> int | None:
    """Return the length of the body, or None for chunked.

    Checks both fields together (RFC 9112 section 6.1); h11 has checked each by itself.
    """
    length = _values(request, b"content-length")
    if not _values(request, b"transfer-encoding"):
        return int(length[0]) if length else 0
    if length:
        raise HttpError("both Content-Length and Transfer-Encoding")
    if request.http_version == b"1.0":
        raise HttpError("Transfer-Encoding in HTTP/1.0")
    return None


def _tunnel(request: h11.Request, length: int | None) -> Tunnel:
    if length != 0:
        raise HttpError("CONNECT has no body")
    host, port, is_name = _host_and_port(request.target, None)
    return Tunnel(host, port, is_name, _authorization(request))


def _forward(request: h11.Request, body: Body, keep: bool) -> Forward:
    if request.target[:1] in (b"/", b"*"):
        raise HttpError("this is a proxy, not a web server: set it as the proxy of a client (HTTP or SOCKS5)")
    parts = _ABSOLUTE.fullmatch(request.target)
    if parts is None:
        raise HttpError("the request target must be an absolute http:// URL")
    scheme, authority, path, query = parts[1].lower(), parts[2], parts[3] or b"", parts[4] or b""
    if scheme != b"http":
        raise HttpError(f"{scheme.decode()}:// can't be forwarded: use CONNECT, or SOCKS5")
    if b"#" in request.target:
        raise HttpError("the request target has a fragment")
    host, port, is_name = _host_and_port(authority, 80)
    # RFC 9112 section 3.2.4: the last proxy turns OPTIONS without a path into the asterisk form.
    target = path + query if path else b"*" if request.method == b"OPTIONS" and not query else b"/" + query
    options = {name.strip() for value in _values(request, b"connection") for name in value.lower().split(b",")}
    # RFC 9112 section 9.3: a proxy keeps no connection with an HTTP/1.0 client.
    keep = keep and request.http_version == b"1.1" and b"close" not in options
    upgrade = _offered(request) if b"upgrade" in options and request.http_version == b"1.1" else b""
    head = _rewritten(request, target, authority, options, _connection_lines(keep, upgrade))
    replayable = request.method in _IDEMPOTENT and body.done
    return Forward(
        host, port, is_name, _authorization(request), request.method, keep, bool(upgrade), replayable, head, body
    )


def _offered(request: h11.Request) -> bytes:
    """Return the protocols that the client offers for an upgrade, without h2c."""
    offers = [offer.strip() for value in _values(request, b"upgrade") for offer in value.split(b",")]
    return b", ".join(offer for offer in offers if offer and offer.lower() != b"h2c")


def _connection_lines(keep: bool, upgrade: bytes) -> list[bytes]:
    """Return the fields that describe our own connection with the target."""
    options = ([b"Upgrade"] if upgrade else []) + ([] if keep else [b"close"])
    lines = [b"Upgrade: " + upgrade] if upgrade else []
    return [*lines, b"Connection: " + b", ".join(options)] if options else lines


def _rewritten(
    request: h11.Request, target: bytes, authority: bytes, options: set[bytes], connection: list[bytes]
) -> bytes:
    """Return the head for the target, without the fields of the client's connection (`options`).

    It keeps the client's version, which Via repeats: bodies are passed on as they are coded, and an
    HTTP/1.0 client must not get a chunked one.
    """
    dropped = (options | _HOP_BY_HOP | _OURS) - _FRAMING
    lines = [b"%s %s HTTP/%s" % (request.method, target, request.http_version), b"Host: " + authority]
    for raw_name, value in request.headers.raw_items():
        name = raw_name.lower()
        if name == b"max-forwards" and request.method in (b"OPTIONS", b"TRACE"):
            value = _one_hop_less(value)
        if name not in dropped:
            lines.append(b"%s: %s" % (raw_name, value))
    lines += (b"Via: %s rtunnel" % request.http_version, *connection, b"", b"")
    return b"\r\n".join(lines)


def _one_hop_less(value: bytes) -> bytes:
    """Return whether Max-Forwards lets the request pass (RFC 9110 section 7.6.2)."""
    if not re.fullmatch(rb"[0-9]{1,9}", value) or not int(value):
        raise HttpError("Max-Forwards is used up")
    return b"%d" % (int(value) - 1)


def _host_and_port(authority: bytes, default_port: int | None) -> tuple[str, int, bool]:
    """Return (host, port, whether the host is a name). Raises for user information in a URL.

    User information can make a URL look like another one.
    """
    parts = _AUTHORITY.fullmatch(authority.decode("ascii"))
    if parts is None or not parts[1]:
        raise HttpError("the request target has no proper host")
    port = int(parts[2]) if parts[2] else default_port
    if port is None:
        raise HttpError("CONNECT needs a port: host:port")
    if not 0 < port < 65536:
        raise HttpError(f"there is no port {port}")
    try:
        host, is_name = host_of(parts[1])
    except ValueError as error:
        raise HttpError(str(error)) from None
    return host, port, is_name


def _authorization(request: h11.Request) -> str:
    values = _values(request, b"proxy-authorization")
    if len(values) > 1:
        raise HttpError("more than one Proxy-Authorization")
    return values[0].decode("latin-1") if values else ""


def _values(request: h11.Request, wanted: bytes) -> list[bytes]:
    return [value for name, value in request.headers if name == wanted]


def _malformed(fault: h11.RemoteProtocolError) -> HttpError:
    """Return h11's error without the line at fault, which may hold a credential."""
    text = str(fault).partition("bytearray(")[0].rstrip(" :")
    return HttpError(f"malformed HTTP: {text}", fault.error_status_hint)
