"""A target's answer as the client gets it: RFC 9112 section 6.3, odd targets, any split, and h11's client as a peer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtunnel.wire.http_response import MAX_FIELDS, MAX_INTERIM, ResponseReader
from rtunnel.wire.refusal import Refusal, Refused

MAX_HEAD = 4096


@dataclass
class Seen:
    """What became of a target's bytes."""

    out: bytes
    done: bool
    keeps_client: bool
    keeps_target: bool
    upgraded: bool
    error: str = ""


def read(
    pieces: Iterable[bytes], *, is_head: bool = False, keep: bool = True, upgrade: bool = False, eof: bool = False
) -> Seen:
    """Feed the pieces, then maybe the end."""
    reader = ResponseReader(is_head=is_head, keep=keep, upgrade=upgrade, max_head=MAX_HEAD)
    out, error = b"", ""
    try:
        for piece in pieces:
            out += b"".join(map(bytes, reader.feed(memoryview(piece))))
    except Refused as refused:
        error = refused.text
    if eof:
        out += reader.end()
    done = reader.done
    return Seen(out, done, done and reader.keeps_client, done and reader.keeps_target, reader.upgraded, error)


def trickle(data: bytes) -> list[bytes]:
    """One byte at a time."""
    return [data[i : i + 1] for i in range(len(data))]


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """A head."""
    return b"\r\n".join((status, *lines, b"", b""))


def test_the_head_is_rewritten() -> None:
    """Hop-by-hop fields end here, those that Connection names too; our own connection with the client is told."""
    seen = read([head(
        b"Server: x", b"Connection: close, X-Private", b"X-Private: 1", b"Keep-Alive: timeout=5", b"Upgrade: h2c",
        b"Proxy-Connection: close", b"content-length:2", b"Set-Cookie: a=b", b"Set-Cookie: c=d",
    ) + b"ok"])  # fmt: skip
    assert seen.out == (
        b"HTTP/1.1 200 OK\r\nServer: x\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nContent-Length: 2\r\n"
        b"Via: 1.1 rtunnel\r\nConnection: keep-alive\r\n\r\nok"
    )
    assert (seen.done, seen.keeps_client, seen.keeps_target) == (True, True, False)


LENGTH = b"Content-Length: 2"
CODED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("data", "is_head", "keeps_client", "keeps_target"),
    [
        (head(LENGTH) + b"ok", False, True, True),
        (head(LENGTH, LENGTH) + b"ok", False, True, True),
        (head(b"Content-Length: 2, 2") + b"ok", False, True, True),
        (head(b"Content-Length: 0"), False, True, True),
        (head(CODED) + b"2\r\nok\r\n0\r\nX: y\r\n\r\n", False, True, True),
        (head(b"Transfer-Encoding: gzip, Chunked") + b"0\r\n\r\n", False, True, True),
        (head(CODED, LENGTH) + b"2\r\nok\r\n0\r\n\r\n", False, True, False),
        (head(LENGTH, status=b"HTTP/1.0 200 OK") + b"ok", False, True, False),
        (head(LENGTH, b"Connection: Keep-Alive", status=b"HTTP/1.0 200 OK") + b"ok", False, True, True),
        (head(LENGTH), True, True, True),
        (head(CODED), True, True, True),
        (head(status=b"HTTP/1.1 204 No Content"), False, True, True),
        (head(b"Content-Length: 5", status=b"HTTP/1.1 304 Not Modified"), False, True, True),
        (head(LENGTH, status=b"HTTP/1.1 200") + b"ok", False, True, True),
        (head(status=b"HTTP/1.1 103 Early") + head(status=b"HTTP/1.1 100 C") + head(LENGTH) + b"ok", False, True, True),
    ],
)
def test_where_an_answer_ends(data: bytes, is_head: bool, keeps_client: bool, keeps_target: bool) -> None:
    """Every framing, in any split; bytes behind the end are not the client's."""
    whole = read([data], is_head=is_head)
    assert (whole.done, whole.keeps_client, whole.keeps_target) == (True, keeps_client, keeps_target)
    assert read(trickle(data), is_head=is_head) == whole
    for pieces in ([data + b"evil"], trickle(data + b"evil"), [data, b"evil"]):
        seen = read(pieces, is_head=is_head)
        assert (seen.out, seen.done, seen.keeps_client, seen.keeps_target) == (whole.out, True, keeps_client, False)
    assert not read([data], is_head=is_head, keep=False).keeps_client


@pytest.mark.parametrize(
    "data",
    [
        head() + b"until the end",
        head(b"Content-Length: 5", b"Content-Length: 6") + b"until",
        head(b"Content-Length: x") + b"until",
        head(b"Content-Length: " + b"9" * 19) + b"until",
        head(b"Transfer-Encoding: gzip") + b"until",
        head(b"Transfer-Encoding: chunked, chunked") + b"until",
        head(CODED, status=b"HTTP/1.0 200 OK") + b"until",
    ],
)
def test_an_answer_that_ends_with_its_connection(data: bytes) -> None:
    """It is whole at the target's FIN, and not before; both connections end."""
    assert not read([data]).done
    seen = read(trickle(data), eof=True)
    assert (seen.done, seen.keeps_client, seen.keeps_target) == (True, False, False)
    assert b"\r\nConnection: close\r\n\r\nuntil" in seen.out


MALFORMED = [
    *(b"", b"+3", b"-3", b" ", b"3 3", b"3,4", b"3, ", b",3", b"0x3", b"3;a", b"\xb23", b"03,3", b"9" * 19, b"3\t3"),
]


@pytest.mark.parametrize("value", MALFORMED)
@pytest.mark.parametrize(
    ("start", "is_head"),
    [
        (b"HTTP/1.1 200 OK", False), (b"HTTP/1.1 200 OK", True), (b"HTTP/1.1 204 No Content", False),
        (b"HTTP/1.1 304 Not Modified", False), (b"HTTP/1.1 103 Early", False),
    ],
)  # fmt: skip
def test_a_malformed_length_does_not_reach_the_client(value: bytes, start: bytes, is_head: bool) -> None:
    """RFC 9110 section 8.6: nobody behind us reads an end from it that is not there, also where no body follows."""
    field = b"Content-Length: " + value
    seen = read(trickle(head(field, b"Connection: content-length, x", status=start) + b"abc"), is_head=is_head)
    assert seen.out.startswith(start + b"\r\n")
    assert b"content-length" not in seen.out.lower()
    assert not seen.keeps_target
    two = read([head(b"Content-Length: 3", field, status=start) + b"abc"], is_head=is_head)
    assert b"content-length" not in two.out.lower()


@pytest.mark.parametrize("lines", [(b"CONTENT-LENGTH:\t3 ",), (b"Content-Length: 3, 3",), (b"Content-Length: 3",) * 2])
@pytest.mark.parametrize("is_head", [False, True])
def test_a_length_is_passed_on_once(lines: tuple[bytes, ...], is_head: bool) -> None:
    """RFC 9110 section 8.6: one value that was repeated becomes one field."""
    seen = read([head(*lines) + (b"" if is_head else b"abc")], is_head=is_head)
    assert seen.done and seen.keeps_client and seen.keeps_target
    assert seen.out.lower().count(b"content-length") == seen.out.count(b"\r\nContent-Length: 3\r\n") == 1


@pytest.mark.parametrize("status", [b"HTTP/1.1 204 No Content", b"HTTP/1.1 103 Early"])
def test_an_answer_that_can_not_have_a_body_has_no_framing(status: bytes) -> None:
    """RFC 9110 section 8.6 and RFC 9112 section 6.1: no server may send either field in it."""
    for field in (LENGTH, CODED):
        assert read([head(field, b"X: y", status=status)]).out.startswith(status + b"\r\nX: y\r\n")


def test_an_empty_coding_does_not_reach_the_client() -> None:
    """It names nothing, and the length is the length; some readers take it for a coding that they do not know."""
    seen = read([head(LENGTH, b"Transfer-Encoding: , ") + b"ok"])
    assert seen.keeps_client and b"Transfer-Encoding" not in seen.out


@pytest.mark.parametrize("coding", [CODED, b"Transfer-Encoding: gzip"])
@pytest.mark.parametrize("is_head", [False, True])
def test_a_coding_takes_the_length_away(coding: bytes, is_head: bool) -> None:
    """RFC 9112 section 6.3: a proxy that passes the answer on removes Content-Length first."""
    seen = read([head(LENGTH, coding) + (b"" if is_head else b"0\r\n\r\n")], is_head=is_head)
    assert coding in seen.out
    assert b"Content-Length" not in seen.out
    assert not seen.keeps_target


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTT",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"<html>HTTP/0.9</html>",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 000 OK\r\n\r\n",
        head(b"no colon"),
        head(b"a : b"),
        head(b"X: a", b" folded"),
        head(b"X: a\x00b"),
        head(b"X: a\rb"),
        head(b"X: " + b"x" * MAX_HEAD) + b"body",
        head(*[b"a:"] * (MAX_FIELDS + 1)),
        head(b"Upgrade: x", b"Connection: Upgrade", status=b"HTTP/1.1 101 Switching Protocols") + b"raw",
        b"HTTP/1.1 200 OK\r\nX: no end",
    ],
)
def test_what_is_no_http_passes_raw(data: bytes) -> None:
    """An odd target's answer is not lost, and nothing else is asked on these connections."""
    for pieces in ([data], trickle(data)):
        seen = read(pieces, eof=True)
        assert seen == Seen(data, done=True, keeps_client=False, keeps_target=False, upgraded=False)


def test_an_upgrade() -> None:
    """After 101 everything passes, when the request has offered it."""
    data = head(b"Upgrade: websocket", b"Connection: Upgrade", b"X: y", status=b"HTTP/1.1 101 Switching Protocols")
    seen = read(trickle(data + b"\x81\x00HTTP/1.1"), upgrade=True, eof=True)
    assert seen.out == (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nX: y\r\n"
        b"Via: 1.1 rtunnel\r\nConnection: Upgrade\r\n\r\n\x81\x00HTTP/1.1"
    )
    assert (seen.upgraded, seen.done, seen.keeps_client) == (True, True, False)
    assert not read([head(LENGTH) + b"ok"], upgrade=True).upgraded


def test_what_an_upgrade_needs_is_told() -> None:
    """426 names the protocol (RFC 9110 section 15.5.22)."""
    data = head(b"Upgrade: TLS/1.3", b"Connection: Upgrade", b"Content-Length: 0", status=b"HTTP/1.1 426 Upgrade")
    assert b"Upgrade: TLS/1.3\r\n" in (out := read([data]).out)
    assert b"Connection: Upgrade, keep-alive\r\n" in out


def test_interim_answers_are_bounded() -> None:
    """Each is a head to read: a target can not send them without end."""
    interim = head(status=b"HTTP/1.1 102 Processing")
    assert not read([interim * MAX_INTERIM]).error
    assert "1xx answers" in read([interim * (MAX_INTERIM + 1)]).error


def test_broken_chunks_are_an_error() -> None:
    """The client must not take a part for the whole."""
    reader = ResponseReader(is_head=False, keep=True, upgrade=False, max_head=MAX_HEAD)
    with pytest.raises(Refused) as caught:
        reader.feed(head(CODED) + b"2\r\nokX")
    assert caught.value.code is Refusal.BAD_REQUEST
    assert not reader.done


@pytest.mark.parametrize("data", [head(LENGTH) + b"o", head(CODED) + b"2\r\nok\r\n"])
def test_an_answer_that_is_cut_is_not_done(data: bytes) -> None:
    """FIN before the end of the body."""
    assert not read([data], eof=True).done


pieces_of_answers = st.sampled_from(
    [
        *(
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.0 404 \r\n",
            b"HTTP/1.1 100 \r\n",
            b"HTTP/1.1 101 \r\n",
            b"HTTP/1.1 204\r\n",
        ),
        *(b"\r\n", b"\n", b"\r", b"a: b\r\n", b"Connection: close\r\n", b"Content-Length: 3\r\n", CODED + b"\r\n"),
        *(b"abc", b"3\r\nabc\r\n", b"0\r\n\r\n", b"Upgrade: x\r\n", b"\x00", b":", b"HTTP"),
    ]
)


@settings(deadline=None)
@given(
    st.lists(pieces_of_answers, max_size=12).map(b"".join) | st.binary(max_size=60),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 101 \r\n\r\nabc", [17], False, True, False)
def test_any_split_is_the_same(data: bytes, marks: list[int], is_head: bool, upgrade: bool, eof: bool) -> None:
    """Any bytes in any split: the same answer, or the same error."""
    at = sorted({0, len(data), *(mark % (len(data) + 1) for mark in marks)})
    pieces = [data[a:b] for a, b in itertools.pairwise(at)]
    whole = read([data] if data else [], is_head=is_head, upgrade=upgrade, eof=eof)
    for split in (pieces, trickle(data)):
        seen = read(split, is_head=is_head, upgrade=upgrade, eof=eof)
        if whole.error:
            assert seen.error == whole.error
        else:
            assert seen == whole


names = st.sampled_from(["Date", "ETag", "X-A", "Content-Type"])


@given(
    st.sampled_from([200, 201, 204, 304, 404, 500]),
    st.lists(st.tuples(names, st.from_regex(r"[!-~]([ -~]{0,20}[!-~])?", fullmatch=True)), max_size=6),
    st.lists(st.binary(min_size=1, max_size=100), max_size=4),
    st.booleans(),
)
def test_h11_reads_the_same(status: int, fields: list[tuple[str, str]], parts: list[bytes], coded: bool) -> None:
    """An independent server's answer comes out of an independent client as it was."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    while server.next_event() is not h11.EndOfMessage() and server.their_state is not h11.DONE:
        pass
    bodiless = status in (204, 304)
    framing = [("Transfer-Encoding", "chunked")] if coded else [("Content-Length", str(sum(map(len, parts))))]
    sent = server.send(h11.Response(status_code=status, headers=[*fields, *([] if bodiless else framing)])) or b""
    for part in parts if not bodiless else []:
        sent += server.send(h11.Data(data=part)) or b""
    sent += server.send(h11.EndOfMessage()) or b""
    seen = read(trickle(sent))
    assert seen.done and seen.keeps_client and seen.keeps_target
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(seen.out)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    assert response.status_code == status
    got = [(name.decode(), value.decode()) for name, value in response.headers]
    assert got[: len(fields)] == [(name.lower(), value) for name, value in fields]
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert body == (b"" if bodiless else b"".join(parts))
    assert client.trailing_data == (b"", False)
