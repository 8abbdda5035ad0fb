"""Reads a target's answer to one forwarded request, sans-I/O (RFC 9112).

The head is rewritten; the body passes as it is coded. An answer that cannot be read as HTTP/1.1 (no
status line, a broken field, too large a head) passes raw until the target ends it, as through a
tunnel, because a proxy should not lose the answer of an unusual target. The connection then serves
no other request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from .http_body import Body, Chunked, Data, Endless, Sized
from .refusal import Refusal, Refused

#: Interim 1xx answers before the final one: 100, some 102 or 103. Each has a head to read.
MAX_INTERIM: Final = 16
#: Fields of one head; a head with more passes raw.
MAX_FIELDS: Final = 200
#: Bytes of all list fields that are read here, together; a head with more passes raw.
MAX_LISTS: Final = 2048

#: Fields that a proxy removes (RFC 9110 section 7.6.1), beside those that Connection names. The
#: coding of the body stays.
_HOP_BY_HOP: Final = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"te", b"upgrade"))
_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding"))
_LISTS: Final = frozenset((b"connection", b"content-length", b"transfer-encoding"))
_START: Final = b"HTTP/1."
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})((?: [\t -~\x80-\xff]*)?)")
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")

_SWITCHING: Final = 101
_UPGRADE_REQUIRED: Final = 426
_NO_CONTENT: Final = 204
_BODILESS: Final = (_NO_CONTENT, 304)


@dataclass(frozen=True, slots=True)
class _Head:
    """The head of a target's answer, after parsing."""

    status: int
    minor: int  # minor version of HTTP/1
    reason: bytes  # including the space before it
    fields: list[tuple[bytes, bytes, bytes]]  # name in lower case, value, the whole line

    def tokens(self, name: bytes) -> list[bytes]:
        """Return the elements of a list field, in lower case."""
        values = (value.lower().split(b",") for known, value, _ in self.fields if known == name)
        return [stripped for value in values for token in value if (stripped := token.strip())]

    def lengths(self) -> set[bytes]:
        """Return the different values of Content-Length (RFC 9110 section 8.6).

        An empty element counts as one.
        """
        values = (value.split(b",") for known, value, _ in self.fields if known == b"content-length")
        return {element.strip(b" \t") for value in values for element in value}


class ResponseReader:
    """Reads a target's answer to one request. `feed` and `end` return bytes for the client.

    When `done`, `keeps_client` and `keeps_target` say whether each connection may serve another
    request.
    """

    __slots__ = (
        "_held",
        "_interim",
        "_is_head",
        "_keep",
        "_max_head",
        "_scanned",
        "_upgrade",
        "begun",
        "body",
        "done",
        "in_head",
        "keeps_client",
        "keeps_target",
        "upgraded",
    )

    def __init__(self, *, is_head: bool, keep: bool, upgrade: bool, max_head: int) -> None:
        """Start to read an answer.

        `is_head`: it answers a HEAD request. `keep`: the client may send another request.
        `upgrade`: the request offered another protocol. `max_head`: bytes of a head that is read.
        """
        self._is_head = is_head
        self._keep = keep
        self._upgrade = upgrade
        self._max_head = max_head
        self.in_head = True  # True while reading a head, of an interim or the final answer
        self._held = bytearray()  # bytes of an incomplete head
        self._scanned = 0
        self._interim = 0
        self.body: Body = Sized(0)  # the rest of the final answer's body
        self.begun = False  # the target has sent bytes
        self.done = False
        self.keeps_client = False
        self.keeps_target = False
        self.upgraded = False  # the connection is a tunnel now, in both directions

    def feed(self, data: Data) -> list[Data]:
        """Return the bytes for the client, without bytes behind the end of the answer.

        Raises Refused when the coding of the body is broken, or interim answers do not end.
        """
        self.begun = True
        out: list[Data] = []
        while self.in_head:
            self._held += data
            data = self._read_head(out)
            if not data:
                break
        if not self.in_head and data:
            size = self.body.feed(data)
            if size:
                out.append(data[:size])
            self.done = self.body.done
            if size < len(data):
                self.keeps_target = False  # the target sends bytes that belong to no request
        return out

    def end(self) -> bytes:
        """Return the bytes that were held back, after the target has ended its side.

        An answer that is not `done` then is incomplete.
        """
        held = bytes(self._held)
        self.done = self.done or self.in_head or isinstance(self.body, Endless)
        self.keeps_target = False
        return held

    def _read_head(self, out: list[Data]) -> bytes:
        """Read the next head if it is complete, and return the bytes behind it."""
        held = self._held
        if not (held.startswith(_START) or _START.startswith(held[: len(_START)])):
            return self._pass_raw()
        found = _HEAD_END.search(held, max(0, self._scanned - 3), self._max_head)
        if found is None:
            self._scanned = len(held)
            return self._pass_raw() if len(held) >= self._max_head else b""
        head = _read(bytes(held[: found.start()]))
        if head is None or (head.status == _SWITCHING and not self._upgrade):
            return self._pass_raw()
        rest = bytes(held[found.end() :])
        held.clear()
        self._scanned = 0
        out.append(self._take(head))
        return rest

    def _pass_raw(self) -> bytes:
        """Stop parsing: all further bytes belong to the answer until the target ends it."""
        held = bytes(self._held)
        self._held.clear()
        self.in_head = False
        self.body = Endless()
        return held

    def _take(self, head: _Head) -> bytes:
        if head.status == _SWITCHING:
            self.in_head = False
            self.body = Endless()
            self.upgraded = True
            return _written(head, [b"Upgrade"])
        if head.status < 200:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise Refused(Refusal.PROTOCOL_ERROR, f"the target sent more than {MAX_INTERIM} 1xx answers")
            return _written(head, [])
        self.in_head = False
        return self._final(head)

    def _final(self, head: _Head) -> bytes:
        self.body = body = self._framing(head)
        self.done = body.done
        is_delimited = not isinstance(body, Endless)
        tokens = head.tokens(b"connection")
        persists = b"close" not in tokens and (head.minor > 0 or b"keep-alive" in tokens)
        self.keeps_client = self._keep and is_delimited
        self.keeps_target = persists and is_delimited and not _is_length_false(head)
        options = [b"Upgrade"] if head.status == _UPGRADE_REQUIRED else []
        options.append(b"keep-alive" if self.keeps_client else b"close")
        return _written(head, options)

    def _framing(self, head: _Head) -> Body:
        """Set the framing of the body (RFC 9112 section 6.3, for responses)."""
        if self._is_head or head.status in _BODILESS:
            return Sized(0)
        codings = head.tokens(b"transfer-encoding")
        if codings:
            is_chunked = codings[-1] == b"chunked" and codings.count(b"chunked") == 1 and head.minor > 0
            return Chunked() if is_chunked else Endless()
        length = _length(head)
        return Endless() if length is None else Sized(int(length))


def _length(head: _Head) -> bytes | None:
    """Return the Content-Length for the client; None when there is none that it can use."""
    lengths = head.lengths()
    if len(lengths) != 1 or head.tokens(b"transfer-encoding"):
        return None
    length = lengths.pop()
    return length if _LENGTH.fullmatch(length) else None


def _is_length_false(head: _Head) -> bool:
    """Return whether Content-Length is malformed, or stands beside a Transfer-Encoding.

    Either may be an attempt at smuggling (RFC 9112 section 6.3), so that no other request uses the
    connection with the target.
    """
    return bool(head.lengths()) and _length(head) is None


def _read(head: bytes) -> _Head | None:
    """Parse a head, without its empty line; None when it cannot be read."""
    first, *lines = head.split(b"\r\n", MAX_FIELDS + 1)
    status = _STATUS_LINE.fullmatch(first)
    if status is None or len(lines) > MAX_FIELDS:
        return None
    fields, lists = [], 0
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            return None
        name, value = field[1].lower(), field[2].strip(b" \t")
        fields.append((name, value, line))
        if name in _LISTS:
            lists += len(value)
    if lists > MAX_LISTS:
        return None
    return _Head(int(status[2]), int(status[1]), status[3], fields)


def _written(head: _Head, options: list[bytes]) -> bytes:
    """Return the head for the client; `options` are those of our connection with it."""
    dropped = (_HOP_BY_HOP | set(head.tokens(b"connection"))) - _FRAMING | {b"content-length"}
    if not head.tokens(b"transfer-encoding"):
        dropped |= {b"transfer-encoding"}  # an empty field, which some readers take for a coding
    if b"Upgrade" in options:
        dropped -= {b"upgrade"}
    length = _length(head)
    if head.status < 200 or head.status == _NO_CONTENT:
        # A server must send neither (RFC 9110 section 8.6, RFC 9112 section 6.1).
        dropped |= _FRAMING
        length = None
    lines = [b"HTTP/1.1 %d%s" % (head.status, head.reason or b" ")]
    lines += (line for name, _, line in head.fields if name not in dropped)
    if length is not None:
        # One field, also when the target has repeated it.
        lines.append(b"Content-Length: " + length)
    if options:
        lines += (b"Via: 1.%d rtunnel" % min(head.minor, 1), b"Connection: " + b", ".join(options))
    lines += (b"", b"")
    return b"\r\n".join(lines)
