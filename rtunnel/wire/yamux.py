"""yamux without I/O: many streams with their own flow control inside one byte stream.

The spec is hashicorp's (github.com/hashicorp/yamux, spec.md, version 0). A frame is a 12-byte
big-endian header

    version:8 = 0 | type:8 | flags:16 | stream id:32 | length:32

followed, for Data alone, by `length` bytes of payload. Odd stream ids belong to the client (here
the agent, which dialled), even ones to the server (the broker), 0 to the session.

Theory of operation
===================

A subclass of `Session` sends frames (`emit`) and makes streams for the peer's SYNs (`accepts`). A
subclass of `Stream` takes what the peer does (`on_data`, `on_fin`, `on_reset`, `on_window`). The
owner feeds `Session.receive` with bytes in any split.

**Life of a stream.** It is open until each side has sent FIN, which ends one direction only, or
until one side resets it, or the session ends. Then it is `gone`: out of `streams`; `on_fin` or
`on_reset` is its last hook, if the peer's frame made it so; `finish`, `reset` and `consumed` have
no effect. Events of a stream:

    The peer sends          Open                      After the peer's FIN      Gone or refused
    ----------------------  ------------------------  ------------------------  ------------------
    Data                    `on_data`, once a piece   fault `data_after_fin`    payload skipped
    Window Update           `send_window` grows,      the same                  ignored
                            `on_window`
    FIN (any frame)         `on_fin`, once, behind    ignored                   ignored
                            the payload; gone if
                            this end has sent FIN
    RST (any frame)         gone, `on_reset`; its     the same                  ignored
                            payload is skipped
    SYN                     fault `stream_reused`     fault `stream_reused`     fault
                                                                                `stream_reused`

    This end calls          Effect
    ----------------------  ----------------------------------------------------------------------
    `attach`                the stream gets its id; the first frame carries SYN (the first one
                            back carries ACK)
    `header_into`, `frame`  Data; `send_window` shrinks. The caller must not send more than the
                            window: nothing checks it here, and the peer ends the link for it
    `finish`                FIN, once; gone if the peer's FIN has come
    `reset`                 gone, RST; nothing on the wire when the SYN was never sent
    `consumed`              gives window back once a part of it is owed; not after the peer's FIN

A frame for an id that was never opened is the fault `unknown_stream`. Frames for one that is gone
are no fault: they have crossed this end's RST. `Session.end` makes each stream gone and calls its
`on_reset`, with `Session.over` set, which tells a lost link from a reset of the peer.

**Where bytes are.** Payload is handed on as slices of the caller's buffer, piece by piece as it
comes: nothing is copied, nothing waits for the end of a frame, and a slice is valid only until
`on_data` returns. Only a part of a header is kept (`_partial`). Each stream keeps this balance:

    receive_window == _allowance + payload that was announced and is not `consumed` yet + owed

where `_allowance` is what the peer may still send, and `owed` what it gets back with the next
Window Update. A subclass holds bytes that it can't pass on, and calls `consumed` when they have
left: so a slow reader stops its own stream, after one window, and no other.

**What calls back.** `receive` calls the hooks; `end` calls `gave_up` and `on_reset` of each stream.
`finish`, `reset` and `consumed` call no hook of a stream, only `emit`, `gave_up` and `grows`. A
hook may call everything but `receive`, on any stream: after each hook `receive` looks at `gone` and
`over`. A stream that another one's hook has reset at the end of the session is not told.

**Decided here, where the spec is silent.** SYN travels on a stream's first frame, ACK on the first
one back. SYNs may overtake each other by up to MAX_PASSED_OVER ids. A fault is an exception
(`YamuxError`), and the session must end then.

Tests: `tests/unit/test_yamux.py`, with a model of both ends (BackToBack), any split
(test_any_split_of_a_conversation_gives_the_same_hook_calls), each fault
(test_every_illegal_frame_is_a_named_fault), and hooks that end streams and sessions
(test_a_stream_that_is_reset_in_a_hook_hears_no_fin,
test_a_session_that_ends_in_a_hook_takes_nothing_more).
"""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum
from typing import Final

HEADER: Final = struct.Struct(">BBHII")
HEADER_BYTES: Final = 12
#: Bytes of a stream's window at its start (the spec), unless both ends agree on another one.
INITIAL_WINDOW: Final = 256 * 1024
#: The most bytes that a window may have, also by a peer's updates: 32 bits.
MAX_WINDOW: Final = 2**32 - 1

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
_KNOWN_FLAGS = SYN | ACK | FIN | RST

#: Ids below the highest one that a late SYN may still name. hashicorp's OpenStream gives a stream
#: its id before it queues the SYN, so SYNs come a little out of order.
MAX_PASSED_OVER: Final = 256
_ALL_PASSED_OVER: Final = (1 << MAX_PASSED_OVER) - 1


class GoAwayCode(IntEnum):
    """The reason in a GoAway frame."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Fault(StrEnum):
    """The kinds of illegal frames; also their names in logs."""

    BAD_VERSION = "bad_version"
    BAD_TYPE = "bad_type"
    BAD_FLAGS = "bad_flags"
    STREAM_ZERO = "stream_zero"  # Data or a window update for the session
    SESSION_STREAM = "session_stream"  # Ping or GoAway for a stream
    WRONG_PARITY = "wrong_parity"  # SYN for an id that belongs to this end
    STREAM_REUSED = "stream_reused"  # SYN for an id that was used or passed over
    UNKNOWN_STREAM = "unknown_stream"  # a frame for an id that was never opened
    WINDOW_EXCEEDED = "window_exceeded"
    WINDOW_OVERFLOW = "window_overflow"
    DATA_AFTER_FIN = "data_after_fin"
    BAD_PING = "bad_ping"
    BAD_GO_AWAY = "bad_go_away"


class YamuxError(Exception):
    """The peer broke the protocol. The session must end, by GoAway PROTOCOL_ERROR."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(f"{fault}: {text}")
        self.fault = fault


class Stream:
    """One stream. `send_window` is the number of bytes that may be sent now."""

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

    # Hooks: they report the peer's frames.

    def on_data(self, data: memoryview) -> None:
        """Take payload, valid until this returns; call `consumed` for it now or later."""

    def on_fin(self) -> None:
        """Hear that the peer has sent FIN, behind its last payload. Called once."""

    def on_reset(self) -> None:
        """Hear that the peer reset the stream, or that the session ended (`session.over`)."""

    def on_window(self) -> None:
        """Hear that `send_window` grew."""

    # Calls of this end.

    def header_into(self, buffer: bytearray | memoryview, size: int, *, fin: bool = False) -> None:
        """Write the header of a Data frame with `size` bytes of payload into `buffer`, and spend
        the window.

        The frame must be sent. `size` must be `send_window` at most. `fin`: this end sends no more.
        """
        self.send_window -= size
        flags = self._pending_flags
        if flags:
            self._pending_flags = 0
        if fin:
            flags |= FIN
            self._fin_sent()
        HEADER.pack_into(buffer, 0, 0, DATA, flags, self.id, size)

    def frame(self, payload: bytes) -> bytes:
        """Return a Data frame as bytes. As `header_into`; for small payloads, which are copied."""
        header = bytearray(HEADER_BYTES)
        self.header_into(header, len(payload))
        return bytes(header) + payload

    def finish(self) -> None:
        """Send FIN: this end sends no more. Has an effect once, and none after a reset."""
        if self.fin_sent or self.gone:
            return
        flags = self._pending_flags | FIN
        self._pending_flags = 0
        self.session.emit(HEADER.pack(0, DATA, flags, self.id, 0))
        self._fin_sent()

    def reset(self) -> None:
        """Abort both directions and tell the peer. Calls no hook. Does nothing when `gone`."""
        if self.gone:
            return
        self._gone()
        if self.id and not self._pending_flags & SYN:  # else the peer does not know of it
            self.session.emit(HEADER.pack(0, WINDOW_UPDATE, RST | self._pending_flags, self.id, 0))

    def consumed(self, size: int) -> None:
        """Count `size` bytes of payload that have left this process, and give window back when
        enough is owed.

        A negative size stands for bytes that are in the same queue and came from elsewhere.
        """
        self.owed += size
        if self.owed * self.session.give_back >= self.receive_window and not (self.fin_received or self.gone):
            more = self.session.grows(self)
            self.receive_window += more
            delta, self.owed = self.owed + more, 0
            self._allowance += delta
            flags, self._pending_flags = self._pending_flags, 0
            self.session.emit(HEADER.pack(0, WINDOW_UPDATE, flags, self.id, delta))

    def widened(self, more: int) -> bytes:
        """Allow the peer `more` bytes. Return the frame for it, to be sent behind the first one."""
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
    """One end of a link, without its I/O."""

    __slots__ = (
        "_client", "_fin_after", "_into", "_left", "_next_id", "_partial", "_passed_over", "_peer_last_id",
        "give_back", "going_away", "over", "start_window", "streams",
    )  # fmt: skip

    def __init__(self, *, client: bool) -> None:
        self.streams: dict[int, Stream] = {}
        self.over = False
        self.start_window = INITIAL_WINDOW  # bytes, of new streams, both ways
        self.give_back = 2  # 2: a window is given back when a half of it is owed; 3: a third; ...
        self.going_away: GoAwayCode | None = None  # the code of the peer's GoAway
        self._client = client
        self._next_id = 1 if client else 2
        self._peer_last_id = 0 if client else -1  # the highest id of a SYN
        # Bit n is set when no SYN has named the id 2 * (n + 1) below that one. An integer, so that
        # a gap costs constant work (tests/unit/test_cost_per_byte.py).
        self._passed_over = 0
        self._partial = b""  # the first bytes of a header
        # State of the Data frame whose payload is being received:
        self._left = 0  # bytes still to come
        self._into: Stream | None = None  # its stream; None: skip them
        self._fin_after = False  # FIN is due behind them

    # Hooks.

    def emit(self, frame: bytes) -> None:
        """Send a control frame, in order with Data; drop it when `over`. Must not call back."""
        raise NotImplementedError

    def accepts(self) -> Stream | None:
        """Return a new stream for the peer's SYN, or None to refuse it (RST).

        The stream has no id before this returns, so nothing may be sent on it yet. A stream that is
        reset in this call is refused, too.
        """
        raise NotImplementedError

    def grows(self, stream: Stream) -> int:
        """Return by how many bytes the window grows; negative, down to `-stream.owed`: shrinks."""
        return 0

    def gave_up(self, stream: Stream) -> None:
        """Hear that the stream is gone, and its window is free."""

    def on_pong(self, value: int) -> None:
        """Hear the answer to `ping(value)`."""

    def on_go_away(self, code: GoAwayCode) -> None:
        """Hear that the peer opens no more streams and accepts none."""

    # Calls of this end.

    def attach(self, stream: Stream) -> None:
        """Give a new stream of this end its id. Raises OverflowError when `exhausted`."""
        if self.exhausted:
            raise OverflowError("all stream ids of this link are used up")
        stream.id = self._next_id
        self._next_id += 2
        stream._pending_flags = SYN
        self.streams[stream.id] = stream

    @property
    def exhausted(self) -> bool:
        """Whether all ids of this end are used up, after 2**31 streams."""
        return self._next_id > 2**32 - 1

    def ping(self, value: int) -> None:
        """Send a ping with a value of 32 bits; `on_pong` gets the answer."""
        self.emit(HEADER.pack(0, PING, SYN, 0, value))

    def go_away(self, code: GoAwayCode) -> None:
        """Tell the peer that this end accepts no more streams, and why."""
        self.emit(HEADER.pack(0, GO_AWAY, 0, 0, code))

    def end(self) -> None:
        """End the session: `on_reset` of every stream. No effect the second time."""
        if self.over:
            return
        self.over = True
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            if not stream.gone:  # else the hook of another stream has reset it
                stream.gone = True
                self.gave_up(stream)
                stream.on_reset()

    # Frames of the peer.

    def receive(self, data: memoryview, frames: int = 2**32) -> int:
        """Take bytes in any split, up to `frames` headers and their payload; return how many were
        taken.

        The caller keeps the others for the next call. Raises YamuxError for an illegal frame.
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
            tls = "; this looks like TLS" if version in (0x15, 0x16) else ""  # alert, handshake
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
        """Return the frame's stream; None when it is gone or was refused now. Raises YamuxError."""
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
        if self.over:  # `accepts` has ended the session
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
        below = (self._peer_last_id - stream_id) >> 1  # negative: above the highest
        return below < 0 or bool(below and self._passed_over >> (below - 1) & 1)

    def _take_id(self, stream_id: int) -> None:
        """Mark a free id as opened. The ids between the highest one before and this one stay free,
        up to the limit.
        """
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


#: Bytes of one frame for a stream that is gone. At most one grown window can be on its way for it.
MAX_SKIPPED: Final = 64 * 1024 * 1024
