"""What can be joined, and how an end talks before it is."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Timer
from rtunnel.relay.lost import DEADLINE, RESET, Lost, lost_by

#: A talking end reads pieces of this size: negotiations are short.
TALK_BYTES: Final = 16 * 1024
#: So many before others get their turn: a peer may send faster than its words are looked at.
READS_A_TURN: Final = 4
#: Reads that a closing end throws away before others get their turn.
DROPS_A_TURN: Final = 16
#: How long a closing end may take to get its last words through.
LINGER_SECONDS: Final = 5.0
#: Bytes that a closing end throws away. The buffers of both kernels hold some 10 MiB, so a peer that sends more has had
#: the last words for long.
LINGER_BYTES: Final = 16 * 1024 * 1024

_RST_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class EndHandler(Protocol):
    """A role's protocol object for one end, until the end is joined or closed."""

    def received(self, data: bytes) -> None:
        """The peer said something."""

    def finished(self) -> None:
        """The peer shut down its sending side."""

    def lost(self, lost: Lost) -> None:
        """Hear that the end is gone (reset, deadline, link lost); it is closed already."""


class End(Protocol):
    """A socket or a stream, before it is joined."""

    eof: bool  # the peer has finished
    closed: bool
    broken: bool  # `write` failed: the talker hears `lost` in the next turn, and no pair may be made of it

    def talk(self, handler: EndHandler, deadline: float | None = None) -> None:
        """Give what the peer says to this talker. `deadline` seconds without `pause` or a join: lost(DEADLINE)."""

    def write(self, data: bytes) -> None:
        """Send; small, and only while talking."""

    def pause(self) -> None:
        """Take no more bytes until the join (losing the peer is still told); ends the deadline."""

    def resume(self) -> None:
        """Take bytes again."""

    def close(self) -> None:
        """Close when all that was said is out. The talker hears nothing more."""

    def abort(self) -> None:
        """Reset at once. The talker hears nothing more."""


class SocketEnd:
    """A connected, non-blocking TCP socket."""

    can_splice = True  # what goes through the descriptor is what is said

    __slots__ = (
        "_awaits_room",
        "_deadline",
        "_dropped",
        "_dying",
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
        self.loop = loop
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer  # the other side's IP
        self.eof = False
        self.closed = False
        self.broken = False
        self.readable = False  # until an event says so: watching begins with one
        self.hup = False  # a FIN is under way: read until it comes
        self._handler: EndHandler | None = None
        self._reading = False
        self._out = b""
        self._dying = False
        self._dropped = 0  # bytes that came while it was closing
        self._fin_sent = False
        self._queued = False
        self._deadline: Timer | None = None
        self._awaits_room = watched  # whoever watched it before watched for everything
        if watched:
            loop.handlers[self.fd] = self._event
        else:
            loop.add(self.fd, self._event, out=False)

    def talk(self, handler: EndHandler, deadline: float | None = None) -> None:
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
            # The talker is in the middle of something: it hears of it in the next turn.
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
        """Read and drop what the peer still sends, so that no reset overtakes our last words."""
        if self.closed:
            return
        self._handler = None
        if self._deadline is not None:
            self._stop_deadline()
        if self._out or not self.eof:
            self._dying = True
            self._deadline = self.loop.after(LINGER_SECONDS, self.abort)
            self._die_later()
        else:
            self._bury()

    def abort(self) -> None:
        if not self.closed:
            self.reset_on_close()
            self._handler = None
            self._bury()

    def cut_short(self) -> None:
        """Close at once: in order if it is closing and the kernel has its last words, else with a reset."""
        if self._dying and not self._out and not self.closed:
            self._bury()
        else:
            self.abort()

    def reset_on_close(self) -> None:
        """Let the socket's close send a reset."""
        reset_on_close(self.sock)

    def await_room(self) -> None:
        """A write found no room: be told when there is some."""
        if not self._awaits_room:
            self._awaits_room = True
            self.loop.add_out(self.fd)

    def hand_over(self, handler: Callable[[int], None]) -> bytes:
        """The join takes the descriptor; returns bytes that still have to go out first."""
        if self._deadline is not None:
            self._stop_deadline()
        self._handler = None
        self.loop.handlers[self.fd] = handler
        out, self._out = self._out, b""
        return out

    def take_back(self, *, hup: bool) -> None:
        """The inverse of `hand_over`: talk or close again. Everything that the join had to send is sent.

        `hup`: a FIN may be under way, or read already.
        """
        self.loop.handlers[self.fd] = self._event
        self.readable = True  # whatever edge there was, the join may have had it
        self.hup = hup

    def _event(self, mask: int) -> None:
        if mask & (HUP | LOST):
            self.hup = True
        if mask & (IN | HUP | LOST):
            self.readable = True
        if mask & OUT and self._out:
            self._flush()
        if self._dying:
            # HUP is no loss here: it comes when the peer's FIN meets ours, with our last words still on their way.
            self._die_later()
            return
        if self._reading:
            self._read()  # first: a peer's last words may stand before its reset
        if mask & LOST and not self._dying and self.loop.handlers.get(self.fd) == self._event:
            self._lose(RESET)  # still ours: the talker may have closed or joined it in that read

    def _read(self) -> None:
        for _ in range(READS_A_TURN):
            if not (self._reading and self.readable and not self.closed and self._handler is not None and not self.eof):
                return
            try:
                data = self.sock.recv(TALK_BYTES)
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
            if len(data) < TALK_BYTES and not self.hup:
                self.readable = False
            self._handler.received(data)
        self.loop.soon(self._read)  # it talks and talks: others get their turn

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(lost_by(error))
            return
        self._out = self._out[sent:]

    def _die_later(self) -> None:
        if not self._queued:
            self._queued = True
            self.loop.soon(self._die)

    def _die(self) -> None:
        """Last words out, then FIN, then the peer's FIN."""
        self._queued = False
        if self.closed or self._out:
            return
        try:
            if not self._fin_sent:
                self._fin_sent = True
                self.sock.shutdown(socket.SHUT_WR)
            for _ in range(DROPS_A_TURN):
                dropped = len(self.sock.recv(TALK_BYTES))
                self._dropped += dropped
                if not dropped:
                    break
                if self._dropped >= LINGER_BYTES:
                    self.abort()
                    return
            else:
                self._die_later()  # it talks and talks: others get their turn
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._bury()

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

    def _bury(self) -> None:
        self.closed = True
        if self._deadline is not None:
            self._stop_deadline()
        self.loop.close(self.sock)


def reset_on_close(sock: socket.socket) -> None:
    """Make the coming close send RST: the peer must not take an abort for an end."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
    except OSError:
        pass
