"""Ends: what can be joined, and how a role's handler uses one before that.

A `SocketEnd` is a TCP connection (`tls.TlsEnd`: one under TLS), a `stream.StreamEnd` a yamux
stream. Until an end is joined or closed, its bytes go to an `EndHandler`, a small protocol object
of a role.

The states of a `SocketEnd`:

    State         Owner of the descriptor      What ends it
    ------------  ---------------------------  -----------------------------------------------------
    reading       the end; the peer's bytes    `pause`, a join, `close`, `abort`; a lost peer; the
                  go to the handler            deadline of `set_handler`
    paused        the end; bytes stay in the   `resume` or `set_handler`, a join, `close`, `abort`;
                  kernel                       a lost peer
    joined        the pair (`hand_over`)       the pair's end, which closes the socket, or
                                               `take_back`
    closing       the end, without a handler   see below; at the latest LINGER_SECONDS or
                                               LINGER_BYTES
    closed        none: the loop closes the
                  socket at the end of the
                  turn

Events of its socket, before it is joined:

    The kernel or the peer does     The end does
    ------------------------------  ----------------------------------------------------------------
    bytes come                      while reading, calls `received`; while paused, leaves them in
                                    the kernel and remembers `readable`; while closing, drops them
    a FIN comes                     while reading, sets `eof` and calls `finished`, behind the last
                                    `received`; while closing, closes the socket once its own bytes
                                    are sent
    RST comes (ERR, HUP)            while reading, calls `received` with what came before it
                                    (READS_A_TURN pieces at most); then closes the socket and calls
                                    `lost`, also while paused; while closing, only closes the socket
    HUP without an error            while closing this is the second FIN, and no loss: its own bytes
                                    may still be on their way
    a send takes less than all      keeps the rest in `_out`, asks for room (`await_room`), and
                                    sends the rest at the OUT event
    a send fails                    closes the socket and calls `lost`; when the send is that of a
                                    `write`, sets `broken` and does so in a later step of the loop

**Closing in order.** `close` sends what is left, then FIN, then reads and drops until the peer's
FIN. A close(2) with unread bytes would send RST instead of FIN, and a RST throws away what the peer
has not read yet: a refusal, for instance. After LINGER_SECONDS or LINGER_BYTES the end is reset.

**What calls back.** `set_handler`, `write`, `pause`, `resume`, `close`, `abort` and a join call no
method of the handler before they return; what is due comes in a later step of the loop. In
`received` and `finished` the handler may call any of them: the end looks at its state anew after
each call. `lost` is the last call, and the end is closed by then. After `close`, `abort` or a join
there is none.

Everything here must run in the relay's thread. Tests: `tests/unit/test_last_words.py` and
`tests/unit/test_hostile_kernel.py` ("last words reset" puts a fault into `_event`).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Timer
from rtunnel.relay.lost import DEADLINE, RESET, Lost, lost_by

#: Bytes of one read for a handler: negotiations are short.
HANDLER_READ_BYTES: Final = 16 * 1024
#: Reads per loop turn for a handler, so that one end cannot starve the others.
READS_A_TURN: Final = 4
#: Reads per loop turn of a closing end, whose bytes are dropped.
DROPS_A_TURN: Final = 16
#: Seconds that a closing end may take to send what is left and to get the peer's FIN; then it is
#: reset.
LINGER_SECONDS: Final = 5.0
#: Bytes that a closing end drops; then it is reset. The buffers of both kernels hold some 10 MiB,
#: so a peer that sends more than this has received the last words already.
LINGER_BYTES: Final = 16 * 1024 * 1024

#: struct linger {on, 0 seconds}: close(2) sends RST (socket(7)).
_RST_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class EndHandler(Protocol):
    """A role's protocol object for one end, until the end is joined or closed."""

    def received(self, data: bytes) -> None:
        """Take bytes of the peer."""

    def finished(self) -> None:
        """Hear that the peer sends no more (FIN). Comes once, after the last bytes."""

    def lost(self, lost: Lost) -> None:
        """Hear that the end is lost (reset, deadline, link lost) and closed. The last call."""


class End(Protocol):
    """A socket or a stream, before it is joined. In the relay's thread."""

    eof: bool  # the peer has sent FIN, and all before it was read
    closed: bool
    broken: bool  # `write` failed: `lost` follows in the next turn, and it must not be joined

    def set_handler(self, handler: EndHandler, deadline: float | None = None) -> None:
        """Give the peer's bytes to this handler from now on, in place of any other.

        After `deadline` seconds without `pause`, a join or another `set_handler`, the handler hears
        `lost(DEADLINE)`; None: no deadline.
        """

    def write(self, data: bytes) -> None:
        """Send a few bytes, before the join.

        The end keeps bytes that the kernel does not take, without a bound; on a stream, bytes
        beyond its window.
        """

    def pause(self) -> None:
        """Take no more bytes until `resume` or a join; end the deadline. `lost` may still come."""

    def resume(self) -> None:
        """Take bytes again, after `pause`."""

    def close(self) -> None:
        """Close in order, behind all that was written. The handler hears nothing more."""

    def abort(self) -> None:
        """Reset at once. The handler hears nothing more."""


class SocketEnd:
    """A connected, non-blocking TCP socket as an end. `peer` is the other side's IP."""

    can_splice = True  # the descriptor has the plain bytes; not so under TLS

    __slots__ = (
        "_awaits_room",
        "_closing",
        "_deadline",
        "_dropped",
        "_fin_sent",
        "_handler",
        "_out",
        "_queued",
        "_reading",
        "broken",
        "closed",
        "eof",
        "fd",
        "hup",
        "loop",
        "peer",
        "readable",
        "sock",
    )

    def __init__(self, loop: Loop, sock: socket.socket, peer: str, *, watched: bool = False) -> None:
        """Take the socket over and watch it, unless the loop does so already (`watched`)."""
        self.loop = loop
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.eof = False
        self.closed = False
        self.broken = False
        self.readable = False  # there may be bytes; the first event says so
        self.hup = False  # a FIN or urgent data is there: a short read has not drained the socket
        self._handler: EndHandler | None = None
        self._reading = False
        self._out = b""  # written, and not taken by the kernel yet
        self._closing = False
        self._dropped = 0  # bytes that came while it was closing
        self._fin_sent = False
        self._queued = False  # `_go_on_closing` is in the run queue
        self._deadline: Timer | None = None
        self._awaits_room = watched  # the loop watches it for room to write
        if watched:
            loop.handlers[self.fd] = self._event
        else:
            loop.add(self.fd, self._event, out=False)

    def set_handler(self, handler: EndHandler, deadline: float | None = None) -> None:
        self._handler = handler
        self._reading = True
        if self._deadline is not None:
            self._stop_deadline()
        if deadline is not None:
            self._deadline = self.loop.after(deadline, self._late)
        if self.readable:
            self.loop.soon(self._read)

    def write(self, data: bytes) -> None:
        if self.closed:
            return
        if self._out:
            self._out += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # This is left to a later step: the handler is in the middle of something, and calls
            # `write`.
            lost = lost_by(error)
            self.broken = True
            self.loop.soon(lambda: self._lose(lost))
            return
        if sent < len(data):
            self._out = data[sent:]
            self.await_room()

    def pause(self) -> None:
        self._reading = False
        if self._deadline is not None:
            self._stop_deadline()

    def resume(self) -> None:
        self._reading = True
        if self.readable:
            self.loop.soon(self._read)

    def close(self) -> None:
        """Close in order, as the module describes. No effect on a closed end."""
        if self.closed:
            return
        self._handler = None
        if self._deadline is not None:
            self._stop_deadline()
        if self._out or not self.eof:
            self._closing = True
            self._deadline = self.loop.after(LINGER_SECONDS, self.abort)
            self._close_later()
        else:
            self._close_socket()

    def abort(self) -> None:
        if not self.closed:
            self.reset_on_close()
            self._handler = None
            self._close_socket()

    def cut_short(self) -> None:
        """Close now: in order if it is closing and the kernel has all its bytes, else by RST."""
        if self._closing and not self._out and not self.closed:
            self._close_socket()
        else:
            self.abort()

    def reset_on_close(self) -> None:
        """Make the coming close of the socket send RST."""
        reset_on_close(self.sock)

    def await_room(self) -> None:
        """Ask for an OUT event, after a send that took less than all."""
        if not self._awaits_room:
            self._awaits_room = True
            self.loop.add_out(self.fd)

    def hand_over(self, handler: Callable[[int], None]) -> bytes:
        """Give the descriptor's events to a pair's `handler(mask)`.

        Return the bytes that were written and not sent yet: the pair must send them first.
        """
        if self._deadline is not None:
            self._stop_deadline()
        self._handler = None
        self.loop.handlers[self.fd] = handler
        out, self._out = self._out, b""
        return out

    def take_back(self, *, hup: bool) -> None:
        """Undo `hand_over`, so that `set_handler` or `close` can follow. The pair must have sent
        all that it held.

        `hup`: a FIN may have come, or was read already.
        """
        self.loop.handlers[self.fd] = self._event
        self.readable = True  # the pair may have got the edge
        self.hup = hup

    def _event(self, mask: int) -> None:
        if mask & (HUP | LOST):
            self.hup = True
        if mask & (IN | HUP | LOST):
            self.readable = True
        if mask & OUT and self._out:
            self._flush()
        if self._closing:
            # HUP is no loss here: it comes with the second FIN, and our last bytes may be on their
            # way.
            self._close_later()
            return
        if self._reading:
            self._read()  # first: bytes of the peer may stand before its reset
        if mask & LOST and not self._closing and self.loop.handlers.get(self.fd) == self._event:
            self._lose(RESET)  # the handler has neither closed nor joined it in that read

    def _read(self) -> None:
        for _ in range(READS_A_TURN):
            if not (self._reading and self.readable and not self.closed and self._handler is not None and not self.eof):
                return
            try:
                data = self.sock.recv(HANDLER_READ_BYTES)
            except BlockingIOError:
                self.readable = False
                return
            except OSError as error:
                self._lose(lost_by(error))
                return
            if not data:
                self.eof = True
                self._handler.finished()
                return
            if len(data) < HANDLER_READ_BYTES and not self.hup:
                self.readable = False
            self._handler.received(data)
        self.loop.soon(self._read)  # READS_A_TURN is used up

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(lost_by(error))
            return
        self._out = self._out[sent:]

    def _close_later(self) -> None:
        if not self._queued:
            self._queued = True
            self.loop.soon(self._go_on_closing)

    def _go_on_closing(self) -> None:
        """Send FIN behind the last bytes, then drop what comes until the peer's FIN."""
        self._queued = False
        if self.closed or self._out:
            return
        try:
            if not self._fin_sent:
                self._fin_sent = True
                self.sock.shutdown(socket.SHUT_WR)
            for _ in range(DROPS_A_TURN):
                dropped = len(self.sock.recv(HANDLER_READ_BYTES))
                self._dropped += dropped
                if not dropped:
                    break
                if self._dropped >= LINGER_BYTES:
                    self.abort()
                    return
            else:
                self._close_later()  # DROPS_A_TURN is used up
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close_socket()

    def _late(self) -> None:
        self._lose(DEADLINE)

    def _lose(self, lost: Lost) -> None:
        if self.closed:
            return
        handler = self._handler
        self.abort()
        if handler is not None:
            handler.lost(lost)

    def _stop_deadline(self) -> None:
        assert self._deadline is not None
        self._deadline.cancel()
        self._deadline = None

    def _close_socket(self) -> None:
        self.closed = True
        if self._deadline is not None:
            self._stop_deadline()
        self.loop.close(self.sock)


def reset_on_close(sock: socket.socket) -> None:
    """Make the coming close(2) send RST: a peer must not take an abort for an orderly end."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
    except OSError:
        pass
