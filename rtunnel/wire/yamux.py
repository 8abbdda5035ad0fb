"""yamux, sans-I/O: many streams with their own flow control inside one byte stream.

The spec is hashicorp's (github.com/hashicorp/yamux, spec.md, version 0). A frame is a 12-byte big-endian header

    version:8 = 0 | type:8 | flags:16 | stream id:32 | length:32

followed, for Data alone, by `length` bytes of payload. Odd stream ids belong to the client (here: the agent, which
dialled), even ones to the server (the broker), 0 to the session.

A subclass of `Session` gives the bytes a way out (`emit`) and makes streams for the peer's SYNs (`accepts`); a
subclass of `Stream` takes what happens to it (`on_data`, `on_fin`, `on_reset`, `on_window`). Payload is handed on as
slices of the caller's buffer, piece by piece as it arrives: nothing is copied, nothing waits for the end of a frame,
and a slice is valid only until its hook returns.

What the spec leaves open is decided here: SYN rides on the first Data frame, ACK on the first frame back; frames for a
stream that is already gone are skipped (they crossed our reset on the wire), frames for one that never was are an
error; SYNs may overtake each other by a little.
"""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum
from typing import Final

HEADER: Final = struct.Struct(">BBHII")
HEADER_BYTES: Final = 12
INITIAL_WINDOW: Final = 256 * 1024
#: A stream's window may grow so far; also what a peer may claim with updates (the spec: 32 bits).
MAX_WINDOW: Final = 2**32 - 1

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
_KNOWN_FLAGS = SYN | ACK | FIN | RST

#: SYNs may come a little out of order, because hashicorp's own OpenStream hands out the id before it queues the SYN:
#: so many ids that the peer has passed over stay open to it.
MAX_PASSED_OVER: Final = 256
_ALL_PASSED_OVER: Final = (1 << MAX_PASSED_OVER) - 1


class GoAwayCode(IntEnum):
    """Why an end goes away."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Fault(StrEnum):
    """Every illegal frame has a name, which is also its log word."""

    BAD_VERSION = "bad_version"
    BAD_TYPE = "bad_type"
    BAD_FLAGS = "bad_flags"
    STREAM_ZERO = "stream_zero"  # Data or a window update for the session
    SESSION_STREAM = "session_stream"  # Ping or GoAway for a stream
    WRONG_PARITY = "wrong_parity"  # SYN for an id that is ours to open
    STREAM_REUSED = "stream_reused"  # SYN for an id that is or was open, or was passed over long ago
    UNKNOWN_STREAM = "unknown_stream"
    WINDOW_EXCEEDED = "window_exceeded"
    WINDOW_OVERFLOW = "window_overflow"
    DATA_AFTER_FIN = "data_after_fin"
    BAD_PING = "bad_ping"
    BAD_GO_AWAY = "bad_go_away"


class YamuxError(Exception):
    """The peer broke the protocol; the session is over (tell it with GoAway PROTOCOL_ERROR)."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(f"{fault}: {text}")
        self.fault = fault


class Stream:
    """One stream's state. `send_window` is what may be sent now; hooks say what the peer did."""

    __slots__ = (
        "_allowance",
        "_pending_flags",
        "fin_received",
        "fin_sent",
        "gone",
        "id",
        "owed",
        "receive_window",
        "send_window",
        "session",
    )

    def __init__(self, session: Session) -> None:
        self.session = session
        self.id = 0
        self.send_window = session.start_window
        self.receive_window = session.start_window
        self._allowance = session.start_window  # what the peer may still send
        self.owed = 0  # consumed here, not yet given back to the peer
        self._pending_flags = 0  # SYN or ACK, on the next frame
        self.fin_sent = False
        self.fin_received = False
        self.gone = False  # reset by an end, closed by both, or the session is over

    # What the peer did.

    def on_data(self, data: memoryview) -> None:
        """Payload; call `consumed` for it, at once or later: the window allows the peer no more than that."""

    def on_fin(self) -> None:
        """The peer sends no more."""

    def on_reset(self) -> None:
        """The peer reset the stream, or the session ended (`session.over`)."""

    def on_window(self) -> None:
        """`send_window` grew."""

    # What this end does.

    def header_into(self, buffer: bytearray | memoryview, size: int, *, fin: bool = False) -> None:
        """Put the header of a Data frame with `size` bytes of payload at the buffer's front; spends the window."""
        self.send_window -= size
        flags = self._pending_flags
        if flags:
            self._pending_flags = 0
        if fin:
            flags |= FIN
            self._fin_sent()
        HEADER.pack_into(buffer, 0, 0, DATA, flags, self.id, size)

    def frame(self, payload: bytes) -> bytes:
        """A small Data frame as bytes of its own."""
        header = bytearray(HEADER_BYTES)
        self.header_into(header, len(payload))
        return bytes(header) + payload

    def finish(self) -> None:
        """Send FIN: this end sends no more. Once; nothing after a reset."""
        if self.fin_sent or self.gone:
            return
        flags = self._pending_flags | FIN
        self._pending_flags = 0
        self.session.emit(HEADER.pack(0, DATA, flags, self.id, 0))
        self._fin_sent()

    def reset(self) -> None:
        """Abort both directions and tell the peer. No hook is called. No effect when the stream is gone."""
        if self.gone:
            return
        self._gone()
        if self.id and not self._pending_flags & SYN:  # else the peer never heard of it
            self.session.emit(HEADER.pack(0, WINDOW_UPDATE, RST | self._pending_flags, self.id, 0))

    def consumed(self, size: int) -> None:
        """`size` bytes of on_data's payload have left this process: gives window back when enough of it is owed."""
        self.owed += size
        if self.owed * self.session.give_back >= self.receive_window and not (self.fin_received or self.gone):
            more = self.session.grows(self)
            self.receive_window += more
            delta, self.owed = self.owed + more, 0
            self._allowance += delta
            flags, self._pending_flags = self._pending_flags, 0
            self.session.emit(HEADER.pack(0, WINDOW_UPDATE, flags, self.id, delta))

    def widened(self, more: int) -> bytes:
        """Allow the peer `more` bytes; returns the frame that tells it, to be sent behind the stream's first frame."""
        self.receive_window += more
        self._allowance += more
        return HEADER.pack(0, WINDOW_UPDATE, 0, self.id, more)

    # Called by the session.

    def _fin_sent(self) -> None:
        self.fin_sent = True
        if self.fin_received:
            self._gone()

    def _take_fin(self) -> None:
        self.fin_received = True
        if self.fin_sent:
            self._gone()
        self.on_fin()

    def _gone(self) -> None:
        self.gone = True
        self.session.streams.pop(self.id, None)
        self.session.gave_up(self)


class Session:
    """One end of a link: feed it with `receive`; it calls hooks and `emit`s frames."""

    __slots__ = (
        "_client", "_fin_after", "_into", "_left", "_next_id", "_partial", "_passed_over", "_peer_last_id",
        "give_back", "going_away", "over", "start_window", "streams",
    )  # fmt: skip

    def __init__(self, *, client: bool) -> None:
        self.streams: dict[int, Stream] = {}
        self.over = False
        self.start_window = INITIAL_WINDOW  # of new streams, both ways: other than this when both ends agree on it
        self.give_back = 2  # a window is given back when this part of it (a half, a third, ...) is owed
        self.going_away: GoAwayCode | None = None  # what the peer said
        self._client = client
        self._next_id = 1 if client else 2
        self._peer_last_id = 0 if client else -1  # the highest that a SYN named
        # Bit n: no SYN has named the id 2 * (n + 1) below that one yet. One integer, so that a gap costs constant work.
        self._passed_over = 0
        self._partial = b""  # of a header
        self._left = 0  # payload bytes to come of the frame at hand
        self._into: Stream | None = None  # whose they are; None: to be skipped
        self._fin_after = False

    # Hooks.

    def emit(self, frame: bytes) -> None:
        """Send a control frame, soon and in order with data. Drop it when `over`."""
        raise NotImplementedError

    def accepts(self) -> Stream | None:
        """A SYN came: the stream to use for it, or None to refuse it (it is reset).

        The stream has no id before this returns: say nothing on it yet. Resetting it here refuses it too.
        """
        raise NotImplementedError

    def grows(self, stream: Stream) -> int:
        """The peer is about to get window back, `stream.owed`: how many bytes more than that, or (negative) less."""
        return 0

    def gave_up(self, stream: Stream) -> None:
        """The stream is gone, and what it grew by is free."""

    def on_pong(self, value: int) -> None:
        """The answer to `ping(value)`."""

    def on_go_away(self, code: GoAwayCode) -> None:
        """The peer opens no more streams and takes none."""

    # What this end does.

    def attach(self, stream: Stream) -> None:
        """Give a new stream of ours its id; SYN goes with its first frame. Raises OverflowError when `exhausted`."""
        if self.exhausted:
            raise OverflowError("all stream ids of this link are used up")
        stream.id = self._next_id
        self._next_id += 2
        stream._pending_flags = SYN
        self.streams[stream.id] = stream

    @property
    def exhausted(self) -> bool:
        """No ids left (after 2**31 streams): time for a new link."""
        return self._next_id > 2**32 - 1

    def ping(self, value: int) -> None:
        """Ask for a sign of life; the answer comes to `on_pong`."""
        self.emit(HEADER.pack(0, PING, SYN, 0, value))

    def go_away(self, code: GoAwayCode) -> None:
        """Tell the peer that this end takes no more streams."""
        self.emit(HEADER.pack(0, GO_AWAY, 0, 0, code))

    def end(self) -> None:
        """The link is gone: every stream learns it by `on_reset`."""
        if self.over:
            return
        self.over = True
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            if not stream.gone:  # else another one's hook has reset it
                stream.gone = True
                self.gave_up(stream)
                stream.on_reset()

    # What the peer sent.

    def receive(self, data: memoryview, frames: int = 2**32) -> int:
        """Take bytes in any split; how many were taken: all, or what `frames` headers (and their payload) were in.

        Raises YamuxError for an illegal frame; the session must then end.
        """
        position, end = 0, len(data)
        while position < end and not self.over:
            if self._left:
                size = min(self._left, end - position)
                self._payload(data[position : position + size])
                position += size
            elif frames <= 0:
                return position
            elif self._partial or end - position < HEADER_BYTES:
                piece = data[position : position + HEADER_BYTES - len(self._partial)]
                self._partial += piece
                position += len(piece)
                if len(self._partial) == HEADER_BYTES:
                    header, self._partial = self._partial, b""
                    frames -= 1
                    self._frame(*HEADER.unpack(header))
            else:
                frames -= 1
                self._frame(*HEADER.unpack_from(data, position))
                position += HEADER_BYTES
        return end

    def _payload(self, data: memoryview) -> None:
        self._left -= len(data)
        stream = self._into
        if stream is not None and not stream.gone:
            stream.on_data(data)
            if not self._left and self._fin_after and not stream.gone:
                stream._take_fin()

    def _frame(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version:
            tls = "; this looks like TLS" if version in (0x15, 0x16) else ""  # an alert, a handshake
            raise YamuxError(Fault.BAD_VERSION, f"frame of yamux version {version}, expected 0{tls}")
        if flags & ~_KNOWN_FLAGS:
            raise YamuxError(Fault.BAD_FLAGS, f"flags {flags:#06x}")
        if kind <= WINDOW_UPDATE:
            stream = self._find(stream_id, flags)
            if kind == DATA:
                self._data(stream, flags, length)
            else:
                self._window_update(stream, flags, length)
        elif kind > GO_AWAY:
            raise YamuxError(Fault.BAD_TYPE, f"frame of unknown type {kind}")
        elif stream_id:
            raise YamuxError(Fault.SESSION_STREAM, f"session frame of type {kind} names stream {stream_id}")
        elif kind == PING:
            self._ping(flags, length)
        else:
            self._go_away(length)

    def _find(self, stream_id: int, flags: int) -> Stream | None:
        """The frame's stream; None when it is gone already or was refused just now."""
        if flags & SYN:
            return self._syn(stream_id)
        stream = self.streams.get(stream_id)
        if stream is None:
            if not stream_id:
                raise YamuxError(Fault.STREAM_ZERO, "stream frame for the session")
            ours = bool(stream_id & 1) == self._client
            opened = stream_id < self._next_id if ours else not self._is_free(stream_id)
            if not opened:
                raise YamuxError(Fault.UNKNOWN_STREAM, f"stream {stream_id} was never opened")
        return stream

    def _syn(self, stream_id: int) -> Stream | None:
        if not stream_id:
            raise YamuxError(Fault.STREAM_ZERO, "SYN for the session")
        if bool(stream_id & 1) == self._client:
            raise YamuxError(Fault.WRONG_PARITY, f"SYN for stream {stream_id}, an id of this end")
        if stream_id == self._peer_last_id + 2 and not self._passed_over:
            self._peer_last_id = stream_id  # the ordinary case
        elif self._is_free(stream_id):
            self._take_id(stream_id)
        else:
            raise YamuxError(Fault.STREAM_REUSED, f"SYN for stream {stream_id} after {self._peer_last_id}")
        stream = self.accepts()
        if self.over:  # accepts() has ended it
            if stream is not None and not stream.gone:
                stream.gone = True
                stream.on_reset()
            return None
        if stream is None or stream.gone:
            self.emit(HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0))
            return None
        stream.id = stream_id
        stream._pending_flags = ACK
        self.streams[stream_id] = stream
        return stream

    def _is_free(self, stream_id: int) -> bool:
        """Return whether the peer may still open this id of its own."""
        below = (self._peer_last_id - stream_id) >> 1  # ids from here to the highest; negative: above it
        return below < 0 or bool(below and self._passed_over >> (below - 1) & 1)

    def _take_id(self, stream_id: int) -> None:
        """Mark a free id as opened. The ids between the highest one before and this one stay free, up to the limit."""
        gap = (stream_id - self._peer_last_id) >> 1
        if gap < 0:
            self._passed_over &= ~(1 << (-gap - 1))
        elif gap > MAX_PASSED_OVER:
            self._passed_over = _ALL_PASSED_OVER
        else:
            skipped = (1 << (gap - 1)) - 1
            self._passed_over = (self._passed_over << gap | skipped) & _ALL_PASSED_OVER
        self._peer_last_id = max(self._peer_last_id, stream_id)

    def _data(self, stream: Stream | None, flags: int, length: int) -> None:
        self._left = length
        self._into = stream
        self._fin_after = bool(flags & FIN)
        if stream is None:
            if length > MAX_SKIPPED:
                raise YamuxError(Fault.WINDOW_EXCEEDED, f"{length} bytes for a stream that is gone")
            return
        if length:
            if stream.fin_received:
                raise YamuxError(Fault.DATA_AFTER_FIN, f"stream {stream.id} had sent FIN")
            stream._allowance -= length
            if stream._allowance < 0:
                raise YamuxError(
                    Fault.WINDOW_EXCEEDED,
                    f"stream {stream.id} sent {-stream._allowance} bytes over its window",
                )
        if flags & RST:
            self._reset(stream)
        elif flags & FIN and not length and not stream.fin_received:
            stream._take_fin()

    def _window_update(self, stream: Stream | None, flags: int, delta: int) -> None:
        if stream is None:
            return
        if stream.send_window + delta > MAX_WINDOW:
            raise YamuxError(Fault.WINDOW_OVERFLOW, f"stream {stream.id}'s window would pass {MAX_WINDOW}")
        stream.send_window += delta
        if flags & RST:
            self._reset(stream)
            return
        if delta:
            stream.on_window()
        if flags & FIN and not stream.fin_received and not stream.gone:
            stream._take_fin()

    def _reset(self, stream: Stream) -> None:
        stream._gone()
        stream.on_reset()

    def _ping(self, flags: int, value: int) -> None:
        if flags == SYN:
            self.emit(HEADER.pack(0, PING, ACK, 0, value))
        elif flags == ACK:
            self.on_pong(value)
        else:
            raise YamuxError(Fault.BAD_PING, f"ping with flags {flags:#06x}")

    def _go_away(self, code: int) -> None:
        try:
            self.going_away = GoAwayCode(code)
        except ValueError:
            raise YamuxError(Fault.BAD_GO_AWAY, f"go-away with code {code}") from None
        self.on_go_away(self.going_away)


#: The most that can be under way for a stream that this end has reset: one grown window.
MAX_SKIPPED: Final = 64 * 1024 * 1024
