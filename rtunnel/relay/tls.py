"""TLS for an end that is a TCP connection: its user sees a socket with the plain text in it.

Theory of operation
===================

`TlsSocket` takes the place of the socket in a `SocketEnd` (`TlsEnd`) and in pairs, which do not
know of TLS. It keeps what they need of a non-blocking socket, edge by edge; only `os.splice` is not
for it (`can_splice`).

**Life.** `TlsEnd` takes the descriptor over from a `SocketEnd` that has no handler yet. The
handshake begins in the next step of the loop and goes on at each event; the deadline of
`set_handler` covers it. Bytes written before it is done wait in the end's `_out`. When it fails,
the socket is closed in order, so that no RST overtakes the alert, and the handler hears `lost`.
When it is done (`up`), the end is one like any other: reading, paused, joined, closing.

**Where bytes are.** From the peer: the kernel, then OpenSSL (the last part of a record), then
`_ahead` (plain text that had to be read before the own close_notify), then the caller's buffer. To
the peer: `_out` of the end (before the join), then `_pending` (encrypted: one piece of `PIECE`
bytes, and answers to key updates), then the kernel. `send` takes nothing while something is
pending, so a pair that counts a byte as sent has at most one piece between itself and the kernel.

    The peer or the kernel does       The user of the TlsSocket sees
    --------------------------------  --------------------------------------------------------------
    close_notify, with or without a   the end of the stream, behind all plain text; the FIN itself
    FIN behind it                     is not waited for
    FIN without close_notify          ConnectionResetError, behind the plain text that came: anybody
                                      on the path can make a FIN (RFC 8446 section 6.1)
    RST                               the kernel's ConnectionResetError
    an alert, or a record that does   ssl.SSLError, which is an OSError like the others: to a pair
    not decrypt                       it is a reset
    a part of a record                BlockingIOError; the part waits in OpenSSL
    a request for a key update        nothing: the answer goes to `_pending` at once; an answer that
                                      is never read ends the connection
    no room in the kernel             `send` returns what it took; the last piece stays in
                                      `_pending`, and `full` asks for an OUT event
    a write fails                     `_fault`: recv, send and SO_ERROR report it from then on,
                                      because the kernel does so only once

**Half-close.** `shutdown` sends close_notify, then FIN, behind what is pending. The other direction
goes on. OpenSSL looks for the peer's close_notify when it sends its own, and drops plain text that
it finds instead: `_ahead` saves that text first. `close` does the same, and when the kernel has no
room for the last piece, the socket takes its descriptor back and waits (LINGER_SECONDS at most); it
then has no owner but the loop. After `reset_on_close`, `close` drops what is pending and sends RST.

**Edges that the kernel does not make.** A user that has had a short read waits for an edge. So
where TLS knows of more, it makes the event itself, by a call of the descriptor's handler from the
run queue (`_repeat_event`): a close_notify that came with the last bytes, and bytes that one call
left because it had read too much for one turn. While a call has nothing to give, it reads until
EAGAIN, because a FIN may stand behind a part of a record. `TlsEnd.hand_over` wraps the pair's
handler: at an OUT event what is pending goes first, and a failure of that is shown to the pair as
IN and LOST.

**What calls back.** `full` is called from within `send`, `flush`, `shutdown` and `recv_into` (an
answer to a key update); it only changes what the loop watches. No other call reaches the owner
before it returns. `recv_into` uses `scratch.cipher`, and `recv` also `scratch.plain`, in which a
link's read has its frames: so `recv` must not be called from within a link's read, and `recv_into`
may.

Tests: `tests/unit/test_relay_tls.py` on real sockets; `tests/support/hostile.py` puts TLS on some
hops of its worlds, forges FINs and asks for key updates (`test_hostile_kernel.py`).
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from rtunnel.compat import override
from rtunnel.relay.ends import SocketEnd, reset_on_close
from rtunnel.relay.engine import RECORD_BYTES, TlsEngine
from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Timer
from rtunnel.relay.lost import Lost, LostKind, lost_by
from rtunnel.relay.transport import UNPROVEN_READ_BYTES, Scratch

#: Bytes that go through OpenSSL's memory at once: its buffers stay as large as the largest piece
#: was.
PIECE: Final = 64 * 1024
#: Seconds that a closed connection may take to send its last piece. The kernel gives its own last
#: bytes about as long.
LINGER_SECONDS: Final = 120.0
#: The first byte of a TLS handshake (RFC 8446 section 5.1).
_HANDSHAKE: Final = 0x16
#: Bytes of a record beside its plain text: header, content type, tag (RFC 8446 section 5.2), and
#: some to spare.
_OVERHEAD: Final = 64


class NotTls(ConnectionError):
    """The client's first byte does not begin a TLS handshake."""


class TlsSocket(socket.socket):
    """A connected TCP socket under TLS 1.3. In the relay's thread.

    The owner sets `full`, which is called when the kernel has no room for what is pending: an OUT
    event must then lead to `flush`.
    """

    __slots__ = (
        "_ahead",
        "_alpn",
        "_engine",
        "_fault",
        "_fin",
        "_first",
        "_loop",
        "_notified",
        "_pending",
        "_reset",
        "_scratch",
        "_timer",
        "full",
        "up",
    )

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        loop: Loop,
        scratch: Scratch,
        *,
        server_name: str | None,
        alpn: str,
    ) -> None:
        """Take the descriptor of `sock` over. `server_name` None: the server's side.

        `alpn`: the protocol that the peer must agree to (RFC 7301).
        """
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.setblocking(False)
        self.full: Callable[[], None]
        self.up = False  # the handshake is done
        self._loop = loop
        self._scratch = scratch
        self._engine = TlsEngine(context, server_name)
        self._alpn = alpn
        self._first = server_name is None  # a client whose first byte has not come yet
        self._pending: bytes | memoryview = b""  # encrypted, and not in the kernel yet
        self._ahead = b""  # plain text that had to be read before our close_notify
        self._notified = False  # close_notify is sent, or pending
        self._fin = False  # FIN is due behind what is pending
        self._reset = False  # `close` must not wait for what is pending
        self._fault: OSError | None = None
        self._timer: Timer | None = None

    @property
    def certificate(self) -> bytes | None:
        """The peer's certificate (DER); None before `up`, or when the peer showed none."""
        return self._engine.certificate

    @property
    def handshake_bytes(self) -> int:
        """The number of bytes that the peer has sent in the handshake."""
        return self._engine.handshake_bytes

    # The handshake.

    def handshake(self) -> bool:
        """Go on with the handshake as far as there are bytes; return whether it is done.

        Its last flight goes out with the next `send` or `flush`. Raises NotTls, or another OSError
        (ssl.SSLError is one; the alert for it is sent).
        """
        try:
            if not self._engine.handshake(self._pull, self.flush):
                return False
        except ssl.SSLError:
            with suppress(OSError):
                self.flush()  # the alert tells the peer why
            raise
        if self._engine.alpn != self._alpn:
            raise ConnectionError(f"the peer speaks TLS, but not {self._alpn}")
        self.up = True
        return True

    def _pull(self) -> memoryview:
        cipher = self._scratch.cipher[:UNPROVEN_READ_BYTES]
        size = super().recv_into(cipher)
        if size and self._first:
            self._first = False
            if cipher[0] != _HANDSHAKE:
                self._engine.handshake_bytes = size
                raise NotTls("the peer does not speak TLS")
        return cipher[:size]

    def send_plain(self, data: bytes) -> None:
        """Send bytes without TLS, as many as the kernel takes now; the rest is dropped."""
        with suppress(OSError):
            super().send(data)

    # The socket as its user sees it.

    @override
    def recv(self, size: int, flags: int = 0) -> bytes:
        view = self._scratch.plain[:size]
        return bytes(view[: self.recv_into(view)])

    @override
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        if self._fault is not None:
            raise self._fault
        if not self.up:
            raise BlockingIOError
        engine, view, filled, spent, drained = self._engine, memoryview(buffer), 0, 0, False
        wanted = len(view)
        if self._ahead:
            filled = min(wanted, len(self._ahead))
            view[:filled] = self._ahead[:filled]
            self._ahead = self._ahead[filled:]
        data: memoryview | bytes = b""
        while filled < wanted and not engine.eof:
            filled += self._decrypt(view[filled:], data)
            if filled == wanted or engine.eof or (drained and filled):
                break  # else read on: a FIN behind a part of a record has no edge of its own
            if spent > wanted + PIECE:  # key updates or tiny records alone: the loop must turn
                self._loop.soon(self._repeat_event)
                break
            cipher = self._scratch.cipher[: min(PIECE, max(wanted - filled, RECORD_BYTES) + _OVERHEAD)]
            try:
                size = super().recv_into(cipher)
            except BlockingIOError:
                break
            if not size:
                if filled:
                    break  # the next call meets the FIN
                raise ConnectionResetError(errno.ECONNRESET, "the peer ended the connection without close_notify")
            drained = size < len(cipher)
            spent += size
            data = cipher[:size]
        if engine.eof and not self._ahead:
            if filled:
                self._loop.soon(self._repeat_event)  # a close_notify has no edge of its own
        elif not filled:
            raise BlockingIOError
        return filled

    def _decrypt(self, view: memoryview, data: memoryview | bytes = b"") -> int:
        engine = self._engine
        filled = engine.decrypt(view, data)
        if engine.answers:
            self.flush()
        return filled

    def _repeat_event(self) -> None:
        """Tell the descriptor's owner of bytes or an end that make no edge."""
        handler = self._loop.handlers.get(self.fileno())
        if handler is not None:
            handler(IN)

    @override
    def send(self, data: Any, flags: int = 0) -> int:
        """Encrypt and send; return the number of bytes taken, what is pending among them.

        Raises BlockingIOError while a part of the last piece is pending, or the fault of a write.
        """
        if self._fault is not None:
            raise self._fault
        if self._pending:
            self.flush()
        if self._pending or not self.up:
            raise BlockingIOError
        view, sent = memoryview(data), 0
        while sent < len(view) and not self._pending:
            piece = view[sent : sent + PIECE]
            self._pending = self._engine.encrypt(piece)
            sent += len(piece)
            self.flush()
        return sent

    def flush(self) -> None:
        """Send what is pending, then the FIN if it is due; call `full` when the kernel has no room.

        Raises OSError, which `recv_into` and `send` raise from then on.
        """
        try:
            if self._engine.outgoing:
                more = self._engine.take()
                if len(self._pending) > 2 * PIECE:  # `send` leaves less: key updates
                    raise ConnectionResetError(errno.ECONNRESET, "the peer asks for keys, and takes no answer")
                self._pending = bytes(self._pending) + more if self._pending else more
            while self._pending:
                size = super().send(self._pending)
                if size == len(self._pending):
                    self._pending = b""
                else:
                    self._pending = memoryview(self._pending)[size:]
            if self._fin:
                self._fin = False
                super().shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self.full()
        except OSError as error:
            self._fault = error
            self._pending = b""
            raise

    @override
    def shutdown(self, how: int) -> None:
        """Send close_notify and FIN behind what is pending. `how` must be SHUT_WR."""
        if self.up:
            self._fin = True
            self._send_close_notify()
        else:
            super().shutdown(how)

    def _send_close_notify(self) -> None:
        # OpenSSL looks for the peer's close_notify at once, and drops data that it finds in its
        # place. So that data is read first, also the rest of a record: it is one piece at most.
        engine = self._engine
        while engine.holds and not engine.eof:
            room = bytearray(PIECE + RECORD_BYTES)
            size = self._decrypt(memoryview(room))
            if not size:
                break
            self._ahead += room[:size]
        self._notified = True
        engine.close()
        self.flush()

    def reset_on_close(self) -> None:
        """Make `close` send RST and drop what is pending."""
        self._reset = True
        reset_on_close(self)

    @override
    def getsockopt(self, level: int, option: int, *size: Any) -> Any:
        """Return the option; SO_ERROR is also the error that a write has met before."""
        if self._fault is not None and (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            return self._fault.errno or errno.ECONNRESET
        return super().getsockopt(level, option, *size)

    @override
    def close(self) -> None:
        """Close behind close_notify and what is pending, at once if the connection has failed or is
        to be reset.

        When the kernel has no room now, the descriptor stays open for LINGER_SECONDS at most.
        """
        if self.up and not self._reset and self._fault is None and not self._loop.stopped and self.fileno() >= 0:
            self.full = self._linger
            with suppress(OSError):
                if self._notified:
                    self.flush()
                else:
                    self._send_close_notify()
            if self._pending:
                return
        self._close()

    def _linger(self) -> None:
        """Watch the descriptor again: the kernel has no room, and the owner has let go."""
        if self._timer is None:
            self._timer = self._loop.after(LINGER_SECONDS, self.abandon)
            self._loop.handlers[self.fileno()] = self._flush_lingering
            self._loop.add_out(self.fileno())

    def _flush_lingering(self, mask: int) -> None:
        with suppress(OSError):
            self.flush()
        if mask & LOST or not self._pending:
            self._close_soon()

    def abandon(self) -> None:
        """Drop what is pending, and send RST."""
        self.reset_on_close()
        self._close_soon()

    def _close_soon(self) -> None:
        self._reset = True  # `close` must not linger again
        self._loop.close(self)

    def _close(self) -> None:
        if self.fileno() < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        super().close()
        # The socket and its owner refer to each other: OpenSSL's buffers must not wait for a
        # garbage collection.
        self._engine.free()
        del self.full


class TlsEnd(SocketEnd):
    """A TCP connection under TLS as an end. Bytes written early go out behind the handshake."""

    __slots__ = ("_otherwise", "tls")
    can_splice = False

    def __init__(
        self,
        end: SocketEnd,
        context: ssl.SSLContext,
        scratch: Scratch,
        *,
        server_name: str | None,
        alpn: str,
        otherwise: bytes,
    ) -> None:
        """Take the connection of `end` over, which has no handler yet. `server_name` None: the
        server's side.

        `otherwise`: the server sends these bytes without TLS to a client that does not speak it,
        and closes; the handler hears `lost` with NOT_TLS.
        """
        self.tls = TlsSocket(end.sock, context, end.loop, scratch, server_name=server_name, alpn=alpn)
        super().__init__(end.loop, self.tls, end.peer, watched=True)
        self.tls.full = self.await_room
        self._awaits_room = end._awaits_room
        self.readable = end.readable
        self.hup = end.hup
        self._otherwise = otherwise
        self.loop.soon(self._shake)

    @property
    def up(self) -> bool:
        """Whether the handshake is done."""
        return self.tls.up

    @override
    def write(self, data: bytes) -> None:
        if self.up:
            super().write(data)
        else:
            self._out += data

    @override
    def reset_on_close(self) -> None:
        self.tls.reset_on_close()

    @override
    def hand_over(self, handler: Callable[[int], None]) -> bytes:
        def event(mask: int) -> None:
            if mask & OUT:
                mask |= self._make_room()
            handler(mask)

        return super().hand_over(event)

    def _shake(self) -> None:
        if self.up or self.closed:
            return
        try:
            if not self.tls.handshake():
                return
            if self._out:
                self._flush()  # the first bytes go out with the handshake's last flight
            self.tls.flush()
        except NotTls as error:
            self.tls.send_plain(self._otherwise)
            self._turn_away(Lost(LostKind.NOT_TLS, str(error)))
        except OSError as error:
            self._turn_away(lost_by(error))
        else:
            self._go_on()

    def _turn_away(self, lost: Lost) -> None:
        """Close in order, because a RST could overtake the alert, and tell the handler."""
        handler, self._handler = self._handler, None
        self._close_socket()
        if handler is not None:
            handler.lost(lost)

    def _go_on(self) -> None:
        self.readable = True  # the handshake's last read may have used their edge up
        if self._closing:
            self._close_later()
        elif self._reading and not self.closed:
            self._read()

    def _event(self, mask: int) -> None:
        if mask & HUP:
            self.hup = True
        if not self.up:
            self._shake()
            return
        if mask & OUT:
            mask |= self._make_room()
        super()._event(mask)

    def _make_room(self) -> int:
        """Send what is pending. Return what a failure adds to the mask: the owner then meets it."""
        try:
            self.tls.flush()
        except OSError:
            return IN | LOST
        return 0
