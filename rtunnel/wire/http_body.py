"""Finds the end of one HTTP/1.1 message's body, sans-I/O (RFC 9112 sections 6 and 7).

Bytes pass as they are coded: these classes only count how many belong to the message. The chunk
reader is strict and our own: h11 spends 4 us on a chunk and copies it, and every response passes
through here.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from .refusal import Refusal, Refused

#: Bytes of a chunk's size, its extensions and the line ends around them. Extensions are not in use.
MAX_CHUNK_LINE: Final = 4096
#: Bytes and fields of the trailers, behind the last chunk.
MAX_TRAILERS: Final = 16 * 1024
MAX_TRAILER_FIELDS: Final = 100

Data = bytes | bytearray | memoryview


class FramingError(Refused):
    """The coding of a body is broken, so that its end cannot be found."""

    def __init__(self, text: str) -> None:
        super().__init__(Refusal.BAD_REQUEST, f"malformed HTTP: {text}")


class Body(Protocol):
    """The part of one body that is still to come."""

    done: bool  # the end of the body was found

    @property
    def reach(self) -> int | None:
        """The most bytes that can still belong to the body; None when it is unknown."""

    def feed(self, data: Data) -> int:
        """Return how many of these next bytes belong to the body. Data is not kept.

        Raises FramingError when the coding is broken.
        """


class Sized:
    """A body of a known length: that of Content-Length, or 0 without a body."""

    __slots__ = ("_left", "done")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0

    @property
    def reach(self) -> int | None:
        return self._left

    def feed(self, data: Data) -> int:
        taken = min(len(data), self._left)
        self._left -= taken
        self.done = self._left == 0
        return taken


class Endless:
    """A body that ends with its connection, or the raw bytes after an upgrade."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False

    @property
    def reach(self) -> int | None:
        return None

    def feed(self, data: Data) -> int:
        return len(data)


_TEXT = rb"[\t -~\x80-\xff]*"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SIZE = rb"([0-9A-Fa-f]{1,16})(?:;" + _TEXT + rb"|[ \t]*)"


class _Line:
    """Patterns of one line of the coding: of a whole line, and of the beginning of one."""

    __slots__ = ("name", "prefix", "whole")

    def __init__(self, name: str, whole: bytes, prefix: bytes) -> None:
        self.name = name
        self.whole = re.compile(whole)
        self.prefix = re.compile(prefix)


#: Patterns of the first chunk's size, of later sizes (behind the end of the data before), and of a
#: trailer field or the end.
_FIRST: Final = _Line("chunk size", _SIZE + rb"\r\n", _SIZE + rb"\r?")
_NEXT: Final = _Line("chunk end or size", rb"\r\n" + _SIZE + rb"\r\n", rb"\r(?:\n(?:" + _SIZE + rb"\r?)?)?")
_TRAILER: Final = _Line(
    "trailer", rb"(?:" + _TOKEN + rb":" + _TEXT + rb")?\r\n", rb"(?:" + _TOKEN + rb"(?::" + _TEXT + rb")?)?\r?"
)


class Chunked:
    """A chunked body with its trailers.

    `lines` counts chunks and trailer fields, which cost CPU time.
    """

    __slots__ = ("_left", "_line", "_partial", "_trailer_bytes", "_trailers", "done", "lines")

    def __init__(self) -> None:
        self._line = _FIRST  # the pattern of the line behind the present chunk's data
        self._left = 0  # bytes of the data still to come
        self._partial = b""  # the beginning of a line, already passed on
        self._trailers = 0
        self._trailer_bytes = 0
        self.lines = 0
        self.done = False

    @property
    def reach(self) -> int | None:
        return None

    def feed(self, data: Data) -> int:
        if self.done:
            return 0
        if self._left >= len(data):  # only data, the usual case
            self._left -= len(data)
            return len(data)
        passed = len(self._partial)
        if passed:
            data = self._partial + bytes(data)
            self._partial = b""
        at = 0
        while at < len(data) and not self.done:
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
            else:
                end = self._read_line(data, at)
                if not end:
                    self._partial = bytes(data[at:])
                    at = len(data)
                else:
                    at = end
        return at - passed

    def _read_line(self, data: Data, at: int) -> int:
        """Return the end of the line that begins at `at`, or 0 when it is not complete."""
        line = self._line
        limit = MAX_TRAILERS - self._trailer_bytes if line is _TRAILER else MAX_CHUNK_LINE
        found = line.whole.match(data, at)
        if found is None:
            rest = bytes(data[at : at + limit + 1])
            if not line.prefix.fullmatch(rest):
                self._fail(f"illegal {line.name}")
            if len(rest) >= limit:
                self._fail(f"the {line.name} is too long")
            return 0
        end = found.end()
        if end - at > limit:
            self._fail(f"the {line.name} is too long")
        self.lines += 1
        if line is not _TRAILER:
            self._left = int(found[1], 16)
            self._line = _NEXT if self._left else _TRAILER
        elif end - at == 2:
            self.done = True
        else:
            self._count_trailer(end - at)
        return end

    def _count_trailer(self, size: int) -> None:
        self._trailers += 1
        self._trailer_bytes += size
        if self._trailers > MAX_TRAILER_FIELDS:
            self._fail(f"more than {MAX_TRAILER_FIELDS} trailer fields")

    def _fail(self, text: str) -> None:
        self.done = True
        raise FramingError(text)
