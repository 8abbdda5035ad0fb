"""SOCKS5 for a server, sans-I/O (RFC 1928; user/password RFC 1929). CONNECT is the only command.

    greeting   05 NMETHODS METHODS...          ->  05 METHOD
    login      01 ULEN UNAME PLEN PASSWD       ->  01 STATUS               only after METHOD 02
    request    05 CMD RSV ATYP ADDR PORT:16    ->  05 REP RSV ATYP ADDR PORT:16

`Socks5Server` answers greeting and login itself. The caller answers the request, with `reply_ok` or
`reply_refused`. `host_of` is shared with HTTP; `sniff` distinguishes the two protocols.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NoReturn

from .refusal import Refusal, Refused

VERSION: Final = 0x05
LOGIN_VERSION: Final = 0x01
NO_AUTH, USER_PASSWORD = 0x00, 0x02
CONNECT: Final = 0x01
IPV4, NAME, IPV6 = 0x01, 0x03, 0x04

#: The refusal of SOCKS4 and SOCKS4a: version 0 of the reply, 91 "request rejected or failed", port
#: and address 0.
SOCKS4_REJECTED: Final = b"\x00\x5b" + bytes(6)
#: Bytes of the longest legal request, with a name of 255 bytes.
MAX_REQUEST: Final = 4 + 1 + 255 + 2
#: Bytes that a client may send behind its request before it has the answer. A caller that reads at
#: most this much at a time, and stops when it has the request, never exceeds it.
MAX_EARLY_DATA: Final = 16 * 1024

_GREETING, _LOGIN, _VERDICT, _REQUEST, _EARLY, _OVER = range(6)


@dataclass(frozen=True, slots=True)
class Authenticate:
    """A login: call `authenticated`. The password may be empty, the name never is."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Connect:
    """A request for host:port. Unless `is_name`, host is the canonical text of an address."""

    host: str
    port: int
    is_name: bool


class Socks5Error(Refused):
    """The client broke the protocol or asks for an unsupported feature: send `reply` and close."""

    def __init__(self, code: Refusal, text: str, reply: bytes) -> None:
        super().__init__(code, text)
        self.reply = reply


class Protocol(Enum):
    """The protocol that a client of a gateway uses."""

    SOCKS5 = "socks5"
    HTTP = "http"


def sniff(first_byte: int) -> Protocol:
    """Return the protocol of a connection that begins with this byte.

    Raises Refused for any other byte; the caller only closes the connection.
    """
    if first_byte in (VERSION, 0x04):  # 4: Socks5Server refuses SOCKS4 with a reason
        return Protocol.SOCKS5
    # CR: an empty line before the request line.
    if 0x41 <= first_byte <= 0x5A or first_byte == 0x0D:
        return Protocol.HTTP
    raise Refused(Refusal.BAD_REQUEST, _not_a_proxy_client(first_byte))


class Socks5Server:
    """Reads one client, in any split of its bytes. Each call returns one event at most.

    Call `receive`, and send what `to_send` returns, until there is a Connect. An Authenticate
    before it waits for `authenticated`. `rest` is then the beginning of the client's stream. Bytes
    after an error are dropped.
    """

    __slots__ = ("_buffer", "_max_early", "_no_auth", "_out", "_state", "_user_password")

    def __init__(self, *, no_auth: bool = True, user_password: bool = False, max_early: int = MAX_EARLY_DATA) -> None:
        if not (no_auth or user_password):
            raise ValueError("no authentication method is offered")
        self._no_auth = no_auth
        self._user_password = user_password
        self._max_early = max_early
        self._state = _GREETING
        self._buffer = b""
        self._out = b""

    def receive(self, data: bytes | bytearray | memoryview) -> Authenticate | Connect | None:
        """Process bytes, which are not kept.

        Return an event when one is complete. Raises Socks5Error.
        """
        self._buffer += data
        if self._state == _GREETING:
            self._read_greeting()
        if self._state == _REQUEST:
            return self._read_request()
        if self._state == _LOGIN:
            return self._read_login()
        self._bound()
        return None

    def authenticated(self, ok: bool) -> Connect | None:
        """Answer an Authenticate. Returns the request if the client has already sent it.

        Raises Socks5Error. When not `ok`, send `to_send()` and close (RFC 1929 section 2).
        """
        if self._state != _VERDICT:
            raise RuntimeError("no Authenticate is waiting for an answer")
        self._out += b"\x01\x00" if ok else b"\x01\x01"
        if ok:
            self._state = _REQUEST
            return self._read_request()
        self._state = _OVER
        self._buffer = b""
        return None

    def to_send(self) -> bytes:
        """Return and remove the bytes that must be sent to the client now."""
        out = self._out
        self._out = b""
        return out

    def rest(self) -> bytes:
        """Return and remove the bytes behind the request.

        Raises Socks5Error when they are over the limit.
        """
        self._bound()
        if self._state != _EARLY:
            return b""
        rest = self._buffer
        self._buffer = b""
        return rest

    def _read_greeting(self) -> None:
        buffer = self._buffer
        if buffer and buffer[0] != VERSION:
            # SOCKS4 is the only other protocol whose clients understand an answer.
            self._fail(Refusal.BAD_REQUEST, _not_a_proxy_client(buffer[0]), SOCKS4_REJECTED if buffer[0] == 4 else b"")
        if len(buffer) < 2:
            return
        end = 2 + buffer[1]
        if end == 2:
            self._fail(Refusal.BAD_REQUEST, "the greeting offers no method", b"\x05\xff")
        if len(buffer) < end:
            return
        offered = buffer[2:end]
        # A client that offers user/password has a name, which the rules and the log need.
        if self._user_password and USER_PASSWORD in offered:
            self._out = b"\x05\x02"
            self._state = _LOGIN
        elif self._no_auth and NO_AUTH in offered:
            self._out = b"\x05\x00"
            self._state = _REQUEST
        else:
            code = Refusal.AUTHENTICATION_REQUIRED if self._user_password else Refusal.NOT_AUTHORISED
            wanted = "user/password" if self._user_password else "no authentication"
            self._fail(code, f"the client does not offer {wanted}", b"\x05\xff")
        self._buffer = buffer[end:]

    def _read_login(self) -> Authenticate | None:
        buffer = self._buffer
        if buffer and buffer[0] != LOGIN_VERSION:
            self._fail_login(f"login of version {buffer[0]}, not {LOGIN_VERSION}")
        if len(buffer) < 2:
            return None
        name_end = 2 + buffer[1]
        # RFC 1929 requires 1 to 255 bytes for both. An empty name identifies no user, so it is
        # refused. Clients send an empty password for a name alone (`curl -U token:`), and the
        # caller decides whether to accept it.
        if name_end == 2:
            self._fail_login("the user name is empty")
        if len(buffer) <= name_end:
            return None
        end = name_end + 1 + buffer[name_end]
        if len(buffer) < end:
            return None
        event = self._credentials(buffer[2:name_end], buffer[name_end + 1 : end])
        self._state = _VERDICT
        self._buffer = buffer[end:]
        self._bound()
        return event

    def _credentials(self, username: bytes, password: bytes) -> Authenticate:
        try:
            event = Authenticate(username.decode(), password.decode())
        except UnicodeDecodeError:
            self._fail_login("user name and password must be UTF-8")
        if not event.username.isprintable():  # it goes into log lines
            self._fail_login("the user name has unprintable characters")
        return event

    def _read_request(self) -> Connect | None:
        buffer = self._buffer
        if buffer and buffer[0] != VERSION:
            self._refuse(Refusal.BAD_REQUEST, f"request of version {buffer[0]}, not {VERSION}")
        if len(buffer) < 5:
            return None
        if buffer[1] != CONNECT:
            self._refuse(Refusal.COMMAND_NOT_SUPPORTED, _COMMANDS.get(buffer[1], "unknown command"))
        # buffer[2] is reserved and must be 0, but no meaning depends on it.
        end = self._request_length(buffer[3], buffer[4])
        if len(buffer) < end:
            return None
        host, is_name = self._address(buffer[3], buffer[4 : end - 2])
        port = buffer[end - 2] << 8 | buffer[end - 1]
        if not port:
            self._refuse(Refusal.BAD_REQUEST, "port 0 can't be dialled")
        self._state = _EARLY
        # One byte over the limit is kept as a sign of more, so that the event comes first in any
        # split.
        self._buffer = buffer[end : end + self._max_early + 1]
        return Connect(host, port, is_name)

    def _request_length(self, kind: int, first: int) -> int:
        """Return the size of a whole request, from address type and first byte of the address."""
        if kind == IPV4:
            return 10
        if kind == IPV6:
            return 22
        if kind != NAME:
            self._refuse(Refusal.ADDRESS_TYPE_NOT_SUPPORTED, f"unknown address type {kind:#04x}")
        if not first:
            self._refuse(Refusal.BAD_REQUEST, "the name is empty")
        return 7 + first

    def _address(self, kind: int, raw: bytes) -> tuple[str, bool]:
        if kind == IPV4:
            return f"{raw[0]}.{raw[1]}.{raw[2]}.{raw[3]}", False
        if kind == IPV6:
            return _ipv6_text(IPv6Address(raw)), False
        try:
            return host_of(raw[1:].decode("latin-1"))
        except ValueError as error:
            self._refuse(Refusal.BAD_REQUEST, str(error))

    def _bound(self) -> None:
        """Drop bytes beyond those that may follow in the present state."""
        held = len(self._buffer)
        if self._state == _OVER:
            self._buffer = b""
        elif self._state == _VERDICT:
            # These bytes are over the limit of early data, whatever the length of the request
            # before them.
            if held > MAX_REQUEST + self._max_early:
                self._buffer = self._buffer[: MAX_REQUEST + self._max_early + 1]
        elif self._state == _EARLY and held > self._max_early:
            self._refuse(Refusal.BAD_REQUEST, f"more than {self._max_early} bytes before the answer")

    def _fail_login(self, text: str) -> NoReturn:
        self._fail(Refusal.BAD_REQUEST, text, b"\x01\x01")

    def _refuse(self, code: Refusal, text: str) -> NoReturn:
        self._fail(code, text, reply_refused(code))

    def _fail(self, code: Refusal, text: str, reply: bytes) -> NoReturn:
        self._state = _OVER
        self._buffer = b""
        # The answer to a coalesced greeting was not sent yet, and belongs before this one.
        raise Socks5Error(code, text, self.to_send() + reply)


def reply_ok(bind_host: str = "0.0.0.0", bind_port: int = 0) -> bytes:  # noqa: S104 - told, not bound
    """Return the reply that the target is connected, from this address.

    RFC 1928 allows zeros, and clients do not use it.
    """
    if bind_host == "0.0.0.0" and not bind_port:  # noqa: S104
        return _OK
    address = ip_address(bind_host)
    kind = IPV4 if isinstance(address, IPv4Address) else IPV6
    return bytes((VERSION, 0, 0, kind)) + address.packed + bind_port.to_bytes(2, "big")


def reply_refused(code: Refusal) -> bytes:
    """Return the reply for this refusal."""
    return _REFUSED[code]


def host_of(text: str) -> tuple[str, bool]:
    """Return (the host's canonical text, whether it is a name). Raises ValueError.

    Clients that leave names to the proxy send addresses as names too (curl --socks5-hostname,
    PySocks with rdns), so an address is recognised by its form. IPv6 may stand in brackets. Other
    notations of IPv4 (octal, fewer parts) are names.
    """
    if _IPV4_TEXT.fullmatch(text):
        return text, False
    if ":" in text or "[" in text or "]" in text:
        bare = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
        try:
            address = IPv6Address(bare)
        except ValueError:
            raise ValueError("the host is neither a name nor an address") from None
        if address.scope_id is not None:
            raise ValueError("an address with a zone has a meaning on its own host only")
        return _ipv6_text(address), False
    if not _NAME_TEXT.fullmatch(text):
        raise ValueError("a name must be 1 to 255 printable ASCII characters")
    return text, True


def _ipv6_text(address: IPv6Address) -> str:
    """Return an IPv4-mapped address as IPv4, the form in which tuples have it."""
    mapped = address.ipv4_mapped
    return str(address if mapped is None else mapped)


def _not_a_proxy_client(first_byte: int) -> str:
    if first_byte == 0x04:
        return "SOCKS4 is not supported: use SOCKS5"
    if first_byte == 0x16:
        return "TLS to the proxy is not supported: use a socks5:// or http:// proxy URL"
    if 0x41 <= first_byte <= 0x5A:
        return "this looks like HTTP, not SOCKS5"
    return f"neither SOCKS5 nor HTTP: the first byte is {first_byte:#04x}"


_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4_TEXT = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_NAME_TEXT = re.compile(r"[!-~]{1,255}")
_COMMANDS = {0x02: "BIND is not supported", 0x03: "UDP ASSOCIATE is not supported"}


def _reply(status: int) -> bytes:
    return bytes((VERSION, status, 0, IPV4, 0, 0, 0, 0, 0, 0))


_OK = _reply(0)
_REFUSED = {code: _reply(code.reply.socks) for code in Refusal.__members__.values()}
