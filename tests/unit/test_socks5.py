"""The SOCKS5 server parser: RFC 1928, RFC 1929, its limits, and socksio's client as an independent peer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise

import pytest
import socksio.socks5 as peer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtunnel.wire.refusal import Refusal, Refused
from rtunnel.wire.socks5 import (
    MAX_EARLY_DATA,
    MAX_REQUEST,
    Authenticate,
    Connect,
    Protocol,
    Socks5Error,
    Socks5Server,
    host_of,
    reply_ok,
    reply_refused,
    sniff,
)

GREETING = b"\x05\x01\x00"
LOGIN_GREETING = b"\x05\x02\x00\x02"
LOGIN = b"\x01\x05alice\x06secret"
REQUEST = bytes((5, 1, 0, 1, 10, 1, 0, 7)) + (9100).to_bytes(2, "big")
TARGET = Connect("10.1.0.7", 9100, is_name=False)
MAX_LOGIN = 2 + 255 + 1 + 255


Split = Callable[[bytes], list[bytes]]


def named(name: bytes, port: int = 9100, *, command: int = 1) -> bytes:
    """A request with a domain name."""
    return bytes((5, command, 0, 3, len(name))) + name + port.to_bytes(2, "big")


@dataclass
class Play:
    """What a client's bytes came to."""

    events: list[Authenticate | Connect] = field(default_factory=list)
    sent: bytes = b""
    rest: bytes = b""
    error: tuple[Refusal, str] | None = None
    most: int = 0  # bytes that were held at any time


def play(pieces: Iterable[bytes], *, no_auth: bool = True, user_password: bool = False, max_early: int = 64) -> Play:
    """Feed the pieces; the password of everybody is "secret"."""
    server = Socks5Server(no_auth=no_auth, user_password=user_password, max_early=max_early)
    seen = Play()
    try:
        for piece in pieces:
            event = server.receive(piece)
            while event is not None:
                seen.events.append(event)
                event = server.authenticated(event.password == "secret") if isinstance(event, Authenticate) else None
            seen.sent += server.to_send()
            seen.most = max(seen.most, len(server._buffer))
        seen.rest = server.rest()
    except Socks5Error as error:
        seen.sent += error.reply
        seen.error = error.code, error.text
        assert server.receive(b"more") is None
        assert server.rest() == server.to_send() == b""
    return seen


def trickle(data: bytes) -> list[bytes]:
    """One byte at a time."""
    return [data[i : i + 1] for i in range(len(data))]


def coalesced(data: bytes) -> list[bytes]:
    """All in one piece."""
    return [data]


def refused(data: bytes, *, no_auth: bool = True, user_password: bool = False) -> tuple[Refusal, str, bytes]:
    """The error of these bytes, which is the same one in one piece and byte by byte, and all that was sent."""
    whole = play([data], no_auth=no_auth, user_password=user_password)
    bytewise = play(trickle(data), no_auth=no_auth, user_password=user_password)
    assert whole.error is not None
    assert (whole.error, whole.sent) == (bytewise.error, bytewise.sent)
    return *whole.error, whole.sent


def test_connect_in_two_pieces() -> None:
    """The ordinary client: greeting, answer, request, and nothing left over."""
    server = Socks5Server()
    assert server.receive(GREETING) is None
    assert server.to_send() == b"\x05\x00"
    assert server.to_send() == b""
    assert server.receive(REQUEST) == TARGET
    assert server.to_send() == server.rest() == b""


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview])
def test_takes_any_buffer(convert: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    """A relay may hand in a view of its own buffer and overwrite it afterwards."""
    server = Socks5Server()
    own = bytearray(GREETING + REQUEST[:6])
    server.receive(convert(own))
    own[:] = bytes(len(own))
    assert server.receive(convert(REQUEST[6:])) == TARGET


@pytest.mark.parametrize("split", [trickle, coalesced])
def test_eager_client(split: Split) -> None:
    """Whatever follows the request is the start of the stream, however it was cut."""
    seen = play(split(GREETING + REQUEST + b"hello"))
    assert (seen.events, seen.sent, seen.rest, seen.error) == ([TARGET], b"\x05\x00", b"hello", None)


@pytest.mark.parametrize("split", [trickle, coalesced])
def test_login(split: Split) -> None:
    """User and password come to the caller, whose yes lets the request through, even one that was sent ahead."""
    seen = play(split(LOGIN_GREETING + LOGIN + REQUEST + b"hello"), user_password=True)
    assert seen.events == [Authenticate("alice", "secret"), TARGET]
    assert (seen.sent, seen.rest) == (b"\x05\x02\x01\x00", b"hello")


def test_login_refused() -> None:
    """The caller's no is told with a status, and the request behind it is dropped."""
    server = Socks5Server(user_password=True)
    assert server.receive(LOGIN_GREETING + LOGIN + REQUEST) == Authenticate("alice", "secret")
    assert server.authenticated(False) is None
    assert server.to_send() == b"\x05\x02\x01\x01"
    assert server.receive(REQUEST) is None
    assert server.rest() == b""


def test_no_verdict_without_question() -> None:
    """Answering an Authenticate that never was is the caller's mistake."""
    with pytest.raises(RuntimeError, match="no Authenticate"):
        Socks5Server(user_password=True).authenticated(True)


def test_offers_something() -> None:
    """A server without any method is a mistake of configuration."""
    with pytest.raises(ValueError, match="no authentication method"):
        Socks5Server(no_auth=False)


def test_password_stays_out_of_logs() -> None:
    """The event's text has no password."""
    assert "secret" not in repr(Authenticate("alice", "secret"))


@pytest.mark.parametrize(
    ("methods", "no_auth", "user_password", "answer"),
    [
        (b"\x00", True, True, 0x00),
        (b"\x02", True, True, 0x02),
        (b"\x00\x01\x02", True, True, 0x02),
        (b"\x00\x02", True, False, 0x00),
        (b"\x00\x02", False, True, 0x02),
        (bytes(range(255)), True, False, 0x00),
        (b"\x00", False, True, 0xFF),
        (b"\x02", True, False, 0xFF),
        (b"\x01\x03\x80", True, True, 0xFF),
    ],
)
def test_method_selection(methods: bytes, no_auth: bool, user_password: bool, answer: int) -> None:
    """A client that can name itself is asked to, if that is offered; without a common method it is told 0xFF."""
    seen = play([bytes((5, len(methods))) + methods], no_auth=no_auth, user_password=user_password)
    assert seen.sent == bytes((5, answer))
    code = Refusal.AUTHENTICATION_REQUIRED if user_password else Refusal.NOT_AUTHORISED
    assert (seen.error is not None and seen.error[0] is code) == (answer == 0xFF)


def test_no_methods() -> None:
    """A greeting must offer a method."""
    code, text, sent = refused(b"\x05\x00")
    assert (code, sent) == (Refusal.BAD_REQUEST, b"\x05\xff")
    assert "no method" in text


@pytest.mark.parametrize(
    ("first", "hint"),
    [
        (b"\x16\x03\x01", "TLS to the proxy is not supported"),
        (b"GET / HTTP/1.1\r\n", "looks like HTTP"),
        (b"\x00", "0x00"),
    ],
)
def test_other_protocols(first: bytes, hint: str) -> None:
    """Another protocol is named and gets no reply, which it could not read."""
    code, text, sent = refused(first)
    assert (code, sent) == (Refusal.BAD_REQUEST, b"")
    assert hint in text


@pytest.mark.parametrize("first", [b"\x04", b"\x04\x01\x23\x8c\x0a\x01\x00\x07\x00", b"\x04\x02\0\x16\0\0\0\1me\0x\0"])
def test_socks4_is_told_no(first: bytes) -> None:
    """A client of SOCKS4 or 4a gets the reply that it understands: 91, request rejected."""
    code, text, sent = refused(first)
    assert (code, text) == (Refusal.BAD_REQUEST, "SOCKS4 is not supported: use SOCKS5")
    assert sent == b"\x00\x5b" + bytes(6)


@pytest.mark.parametrize(
    ("login", "hint"),
    [
        (b"\x05\x05alice\x06secret", "version 5"),
        (b"\x01\x00\x06secret", "empty"),
        (b"\x01\x02\xff\xfe\x01x", "UTF-8"),
        (b"\x01\x01a\x01\xff", "UTF-8"),
        (b"\x01\x03a\nb\x01x", "unprintable"),
    ],
)
def test_bad_login(login: bytes, hint: str) -> None:
    """A malformed login gets a failure status, after the method that was still unsent."""
    code, text, sent = refused(LOGIN_GREETING + login, user_password=True)
    assert (code, sent) == (Refusal.BAD_REQUEST, b"\x05\x02\x01\x01")
    assert hint in text


def test_empty_password() -> None:
    """Clients that have only a user name send an empty password: the caller decides."""
    assert play([LOGIN_GREETING + b"\x01\x05alice\x00"], user_password=True).events == [Authenticate("alice", "")]


def test_longest_login() -> None:
    """255 bytes each."""
    login = b"\x01\xff" + b"u" * 255 + b"\xff" + b"p" * 255
    assert len(login) == MAX_LOGIN
    seen = play(trickle(LOGIN_GREETING + login), user_password=True)
    assert seen.events == [Authenticate("u" * 255, "p" * 255)]


@pytest.mark.parametrize(
    ("request_", "code", "status", "hint"),
    [
        (bytes((5, 2, 0, 1)) + bytes(6), Refusal.COMMAND_NOT_SUPPORTED, 0x07, "BIND"),
        (bytes((5, 3, 0, 1)) + bytes(6), Refusal.COMMAND_NOT_SUPPORTED, 0x07, "UDP ASSOCIATE"),
        (bytes((5, 9, 0, 1)) + bytes(6), Refusal.COMMAND_NOT_SUPPORTED, 0x07, "unknown command"),
        (bytes((5, 1, 0, 2)) + bytes(6), Refusal.ADDRESS_TYPE_NOT_SUPPORTED, 0x08, "0x02"),
        (bytes((4, 1, 0, 1)) + bytes(6), Refusal.BAD_REQUEST, 0x01, "version 4"),
        (bytes((5, 1, 0, 1, 10, 1, 0, 7, 0, 0)), Refusal.BAD_REQUEST, 0x01, "port 0"),
        (named(b""), Refusal.BAD_REQUEST, 0x01, "empty"),
        (named(b"a\nb"), Refusal.BAD_REQUEST, 0x01, "printable"),
        (named(b"a b"), Refusal.BAD_REQUEST, 0x01, "printable"),
        (named(b"a\x00"), Refusal.BAD_REQUEST, 0x01, "printable"),
        (named(b"\xc3\xa4.example"), Refusal.BAD_REQUEST, 0x01, "printable"),
        (named(b"a:b"), Refusal.BAD_REQUEST, 0x01, "neither"),
        (named(b"[10.1.0.7]"), Refusal.BAD_REQUEST, 0x01, "neither"),
        (named(b"[::1"), Refusal.BAD_REQUEST, 0x01, "neither"),
        (named(b"fe80::1%eth0"), Refusal.BAD_REQUEST, 0x01, "zone"),
    ],
)
def test_bad_request(request_: bytes, code: Refusal, status: int, hint: str) -> None:
    """Each fault has its code, its reply after the unsent method, and a text that names it."""
    got, text, sent = refused(GREETING + request_)
    assert (got, sent) == (code, b"\x05\x00" + bytes((5, status, 0, 1, 0, 0, 0, 0, 0, 0)))
    assert hint in text


@pytest.mark.parametrize(
    ("request_", "host", "is_name"),
    [
        (bytes((5, 1, 0, 1, 255, 0, 10, 1)) + b"\x23\x8c", "255.0.10.1", False),
        (bytes((5, 1, 7, 1, 10, 1, 0, 7)) + b"\x23\x8c", "10.1.0.7", False),  # the reserved byte does not matter
        (bytes((5, 1, 0, 4)) + IPv6Address("2001:db8::7").packed + b"\x23\x8c", "2001:db8::7", False),
        (bytes((5, 1, 0, 4)) + IPv6Address("::ffff:10.1.0.7").packed + b"\x23\x8c", "10.1.0.7", False),
        (named(b"10.1.0.7"), "10.1.0.7", False),
        (named(b"2001:DB8:0::7"), "2001:db8::7", False),
        (named(b"[2001:db8::7]"), "2001:db8::7", False),
        (named(b"::ffff:10.1.0.7"), "10.1.0.7", False),
        (named(b"[::ffff:0a01:0007]"), "10.1.0.7", False),
        (named(b"db.example"), "db.example", True),
        (named(b"10.1.0"), "10.1.0", True),
        (named(b"10.1.0.07"), "10.1.0.07", True),
        (named(b"10.1.0.256"), "10.1.0.256", True),
        (named(b"x" * 255), "x" * 255, True),
    ],
)
def test_hosts(request_: bytes, host: str, is_name: bool) -> None:
    """Every address type gives canonical text; a literal in a name is the address, anything else stays a name."""
    for pieces in ([GREETING, request_], trickle(GREETING + request_)):
        seen = play(pieces)
        assert seen.events == [Connect(host, 9100, is_name)]
        assert seen.most <= MAX_REQUEST


@given(st.ip_addresses())
def test_host_of_literals(address: IPv4Address | IPv6Address) -> None:
    """Any spelling of an address is the address that ipaddress says."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    canonical = str(address if mapped is None else mapped)
    for text in (str(address), address.exploded):
        assert host_of(text) == (canonical, False)
        assert address.version == 4 or host_of(f"[{text}]") == (canonical, False)


@given(st.text(max_size=300))
@example("1.2.3.4\n")
@example("[]")
@example("::1%")
def test_host_of_anything(text: str) -> None:
    """Any text is an address in canonical form, a clean name, or a ValueError."""
    try:
        host, is_name = host_of(text)
    except ValueError:
        return
    assert host.isascii() and host.isprintable() and 0 < len(host) <= 255 and " " not in host
    assert is_name or str(ip_address(host)) == host


@pytest.mark.parametrize("login", [b"", LOGIN], ids=["no-auth", "login"])
def test_early_data_limit(login: bytes) -> None:
    """Early data up to the limit is handed on; a byte more is an error, after the same events in any split."""
    start = (LOGIN_GREETING if login else GREETING) + login
    for request_ in (REQUEST, named(b"x" * 255)):
        full = start + request_ + b"e" * 64
        for pieces in ([full], trickle(full), [start, full[len(start) :]]):
            seen = play(pieces, user_password=bool(login))
            assert (seen.rest, seen.error) == (b"e" * 64, None)
        for over in ([full + b"e"], trickle(full + b"e"), [full, b"e" * 100_000], [full + b"e" * 100_000]):
            seen = play(over, user_password=bool(login))
            assert seen.events[-1:] == play([full], user_password=bool(login)).events[-1:]
            assert seen.error == (Refusal.BAD_REQUEST, "more than 64 bytes before the answer")
            assert seen.sent.endswith(reply_refused(Refusal.BAD_REQUEST))


def test_default_early_data_limit() -> None:
    """16 KiB, unless said otherwise."""
    server = Socks5Server()
    assert server.receive(GREETING + REQUEST + bytes(MAX_EARLY_DATA)) == TARGET
    assert len(server.rest()) == MAX_EARLY_DATA == 16384
    with pytest.raises(Socks5Error):
        server.receive(bytes(MAX_EARLY_DATA + 1))


def test_flood_during_login() -> None:
    """While a password is checked a client can't make us hold more than a request and its early data."""
    server = Socks5Server(user_password=True, max_early=64)
    assert server.receive(LOGIN_GREETING + LOGIN + REQUEST + bytes(100_000)) is not None
    assert len(server._buffer) <= MAX_REQUEST + 64 + 1
    for _ in range(10):
        assert server.receive(bytes(100_000)) is None
        assert len(server._buffer) <= MAX_REQUEST + 64 + 1
    assert server.authenticated(True) == TARGET
    with pytest.raises(Socks5Error, match="more than 64 bytes"):
        server.rest()


def test_rest_before_the_request() -> None:
    """Before the request there is no stream to start."""
    server = Socks5Server()
    server.receive(GREETING + REQUEST[:5])
    assert server.rest() == b""
    assert server.receive(REQUEST[5:]) == TARGET


noise = st.binary(max_size=700)
conversations = st.builds(
    b"".join,
    st.tuples(
        st.sampled_from((GREETING, LOGIN_GREETING, b"", b"\x05\x03\x00\x01\x02", b"\x05\xff" + bytes(255))),
        st.sampled_from((LOGIN, b"", b"\x01\x01a\x06secret", b"\x01\xff" + b"u" * 255 + b"\x01x")),
        st.sampled_from((REQUEST, b"", named(b"db.example"), named(b"x" * 255), named(b"a", 0), bytes((5, 1, 0, 4)))),
        noise,
    ),
)


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    """The data, cut at these marks."""
    at = sorted({0, len(data), *(mark % (len(data) + 1) for mark in marks)})
    return [data[a:b] for a, b in pairwise(at)]


@settings(deadline=None)
@given(noise | conversations, st.lists(st.integers(0, 2000), max_size=20), st.booleans(), st.booleans())
def test_any_split_is_the_same(data: bytes, marks: list[int], no_auth: bool, user_password: bool) -> None:
    """Any bytes in any split: the same events, bytes sent, rest and error, no other error, nothing held over a cap."""
    user_password = user_password or not no_auth
    whole = play([data] if data else [], no_auth=no_auth, user_password=user_password)
    for pieces in (cut(data, marks), trickle(data)):
        seen = play(pieces, no_auth=no_auth, user_password=user_password)
        assert (seen.events, seen.sent, seen.rest, seen.error) == (whole.events, whole.sent, whole.rest, whole.error)
        assert seen.most <= max(MAX_LOGIN, MAX_REQUEST, 64 + 1)


@given(
    st.ip_addresses() | st.from_regex(r"[a-z][a-z0-9-]{0,30}(\.[a-z]{2,8}){1,3}", fullmatch=True), st.integers(1, 65535)
)
def test_socksio_client(host: IPv4Address | IPv6Address | str, port: int) -> None:
    """An independent client gets what it asked for, and understands our answers, with login and without."""
    expected = Connect(host_of(str(host))[0], port, is_name=isinstance(host, str))
    for login in (False, True):
        server, client = Socks5Server(no_auth=not login, user_password=login), peer.SOCKS5Connection()
        method = peer.SOCKS5AuthMethod.USERNAME_PASSWORD if login else peer.SOCKS5AuthMethod.NO_AUTH_REQUIRED
        client.send(peer.SOCKS5AuthMethodsRequest([method]))
        assert server.receive(client.data_to_send()) is None
        assert client.receive_data(server.to_send()) == peer.SOCKS5AuthReply(method)
        if login:
            client.send(peer.SOCKS5UsernamePasswordRequest(b"alice", b"secret"))
            assert server.receive(client.data_to_send()) == Authenticate("alice", "secret")
            server.authenticated(True)
            assert client.receive_data(server.to_send()) == peer.SOCKS5UsernamePasswordReply(True)
        command = peer.SOCKS5Command.CONNECT
        client.send(peer.SOCKS5CommandRequest.from_address(command, (str(host), port)))
        assert server.receive(client.data_to_send()) == expected
        ok = peer.SOCKS5Reply(peer.SOCKS5ReplyCode.SUCCEEDED, peer.SOCKS5AType.IPV4_ADDRESS, "0.0.0.0", 0)
        assert client.receive_data(reply_ok()) == ok


def test_socksio_client_with_a_wrong_password() -> None:
    """An independent client understands the no to its login."""
    server, client = Socks5Server(user_password=True), peer.SOCKS5Connection()
    client.send(peer.SOCKS5AuthMethodsRequest([peer.SOCKS5AuthMethod.USERNAME_PASSWORD]))
    server.receive(client.data_to_send())
    client.receive_data(server.to_send())
    client.send(peer.SOCKS5UsernamePasswordRequest(b"alice", b"guess"))
    server.receive(client.data_to_send())
    server.authenticated(False)
    assert client.receive_data(server.to_send()) == peer.SOCKS5UsernamePasswordReply(False)


@pytest.mark.parametrize("code", Refusal)
def test_every_refusal_has_a_reply(code: Refusal) -> None:
    """An independent client reads every refusal as the reply code that the table gives it."""
    reply = reply_refused(code)
    assert len(reply) == 10
    parsed = peer.SOCKS5Reply.loads(reply)
    assert parsed.reply_code == peer.SOCKS5ReplyCode(bytes((code.reply.socks,)))
    assert parsed.reply_code != peer.SOCKS5ReplyCode.SUCCEEDED


@pytest.mark.parametrize("host", ["10.1.0.7", "2001:db8::7"])
def test_reply_with_an_address(host: str) -> None:
    """The bound address may be told, of either family."""
    parsed = peer.SOCKS5Reply.loads(reply_ok(host, 31007))
    assert (parsed.addr, parsed.port) == (host, 31007)


def test_sniff() -> None:
    """The first byte tells the protocol; anything else is an error that says what it looks like."""
    assert sniff(0x05) is sniff(0x04) is Protocol.SOCKS5
    assert {sniff(byte) for byte in b"ACGPZ\r"} == {Protocol.HTTP}
    for byte, hint in ((0x16, "TLS to the proxy is not supported"), (0x00, "0x00"), (ord("g"), "0x67"), (0x0A, "0x0a")):
        with pytest.raises(Refused, match=hint) as caught:
            sniff(byte)
        assert caught.value.code is Refusal.BAD_REQUEST


def test_sniff_any_byte() -> None:
    """No byte gives anything but a protocol or the named error."""
    for byte in range(256):
        try:
            assert sniff(byte) in Protocol
        except Refused as error:
            assert error.text
