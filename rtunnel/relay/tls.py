"""TLS for an end that is a TCP connection: whoever talks or joins sees a socket with the plain text in it.

`TlsSocket` behaves as the joins need it of a non-blocking socket, edge by edge: `recv_into` gives less than was asked
for only when there is no more, `send` takes all or nothing, FIN and close_notify are one thing (a FIN without it is a
reset, because anybody on the way can make a FIN), and a reset is a reset. So pairs need not know; only `os.splice`
is not for these sockets. What is held beside the kernel is a piece of `PIECE` bytes each way.
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

#: What goes through OpenSSL's memory at once: its buffers stay as large as the largest piece was.
PIECE: Final = 64 * 1024
#: A closed connection may take so long to get its last piece through, as the kernel gives its own last bytes.
LINGER_SECONDS: Final = 120.0
#: The first byte of a TLS handshake (RFC 8446 section 5.1).
_HANDSHAKE: Final = 0x16
#: Header, tag and content type of a record; and the most that can be left of one.
_OVERHEAD: Final = 64


class NotTls(ConnectionError):
    """The client's first byte is that of something else."""


class TlsSocket(socket.socket):
    """A connected TCP socket under TLS 1.3. `full` is called when the kernel has no room for what is pending."""

    __slots__ = (
        "_ahead",
        "_alpn",
        "_bye",
        "_engine",
        "_fault",
        "_fin",
        "_first",
        "_loop",
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
        """Takes over the descriptor. `server_name` None: the server's side. A peer must agree to `alpn` (RFC 7301)."""
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.setblocking(False)
        self.full: Callable[[], None]
        self.up = False  # the handshake is done
        self._loop = loop
        self._scratch = scratch
        self._engine = TlsEngine(context, server_name)
        self._alpn = alpn
        self._first = server_name is None  # the client's first byte is to come
        self._pending: bytes | memoryview = b""  # encrypted, and not in the kernel yet
        self._ahead = b""  # plain text that had to be read before our close_notify
        self._bye = False  # that was said
        self._fin = False  # follows what is pending
        self._reset = False
        self._fault: OSError | None = None
        self._timer: Timer | None = None

    @property
    def certificate(self) -> bytes | None:
        """The peer's, DER, when the handshake is done and it showed one."""
        return self._engine.certificate

    @property
    def shaken(self) -> int:
        """Bytes that the peer has sent in the handshake."""
        return self._engine.shaken

    # The handshake.

    def handshake(self) -> bool:
        """Go on with it; True when it is done, and what it has to say goes out with `send` or `flush`.

        Raises NotTls, or another OSError (ssl.SSLError is one).
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
                self._engine.shaken = size
                raise NotTls("the peer does not speak TLS")
        return cipher[:size]

    def say_plainly(self, data: bytes) -> None:
        """For a peer that does not speak TLS: as much as goes out at once."""
        with suppress(OSError):
            super().send(data)

    # As the joins use it.

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
                break  # with nothing filled, a FIN may stand behind a part of a record: it has no edge of its own
            if spent > wanted + PIECE:  # nothing but key updates, or tiny records: others want their turn
                self._loop.soon(self._tell_again)
                break
            cipher = self._scratch.cipher[: min(PIECE, max(wanted - filled, RECORD_BYTES) + _OVERHEAD)]
            try:
                size = super().recv_into(cipher)
            except BlockingIOError:
                break
            if not size:
                if filled:
                    break  # what there was; the FIN is there for the next call
                raise ConnectionResetError(errno.ECONNRESET, "the peer ended the connection without close_notify")
            drained = size < len(cipher)
            spent += size
            data = cipher[:size]
        if engine.eof and not self._ahead:
            if filled:
                self._loop.soon(self._tell_again)  # a close_notify has no edge of its own
        elif not filled:
            raise BlockingIOError
        return filled

    def _decrypt(self, view: memoryview, data: memoryview | bytes = b"") -> int:
        engine = self._engine
        filled = engine.decrypt(view, data)
        if engine.answers:
            self.flush()
        return filled

    def _tell_again(self) -> None:
        handler = self._loop.handlers.get(self.fileno())
        if handler is not None:
            handler(IN)

    @override
    def send(self, data: Any, flags: int = 0) -> int:
        """Nothing is taken while some of the last piece is pending."""
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
        """What is pending, then the FIN if it is due. Raises OSError; `recv_into` and `send` do so from then on."""
        try:
            if self._engine.outgoing:
                more = self._engine.take()
                if len(self._pending) > 2 * PIECE:  # `send` leaves less: these are answers to key updates
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
        """Close_notify, then FIN, behind what is pending. Only for SHUT_WR."""
        if self.up:
            self._fin = True
            self._say_bye()
        else:
            super().shutdown(how)

    def _say_bye(self) -> None:
        # OpenSSL looks for the peer's close_notify at once, and drops data that it finds in its place: so read that
        # before, also the rest of a record that was read in part. There is not more than a piece of it.
        engine = self._engine
        while engine.holds and not engine.eof:
            room = bytearray(PIECE + RECORD_BYTES)
            size = self._decrypt(memoryview(room))
            if not size:
                break
            self._ahead += room[:size]
        self._bye = True
        engine.close()
        self.flush()

    def reset_on_close(self) -> None:
        """Let `close` send a reset: nothing is said any more, and what is pending is dropped."""
        self._reset = True
        reset_on_close(self)

    @override
    def getsockopt(self, level: int, option: int, *size: Any) -> Any:
        """An error that a write has met is the socket's still."""
        if self._fault is not None and (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            return self._fault.errno or errno.ECONNRESET
        return super().getsockopt(level, option, *size)

    @override
    def close(self) -> None:
        """In order, unless it is to be reset: what is pending goes out first."""
        if self.up and not self._reset and self._fault is None and not self._loop.stopped and self.fileno() >= 0:
            self.full = self._linger
            with suppress(OSError):
                if self._bye:
                    self.flush()
                else:
                    self._say_bye()
            if self._pending:
                return
        self._close()

    def _linger(self) -> None:
        """The kernel has no room; our owner has forgotten us."""
        if self._timer is None:
            self._timer = self._loop.after(LINGER_SECONDS, self.abandon)
            self._loop.handlers[self.fileno()] = self._go_on
            self._loop.add_out(self.fileno())

    def _go_on(self, mask: int) -> None:
        with suppress(OSError):
            self.flush()
        if mask & LOST or not self._pending:
            self._end()

    def abandon(self) -> None:
        """Give up what is pending: the peer gets a reset."""
        self.reset_on_close()
        self._end()

    def _end(self) -> None:
        self._reset = True  # close() does it now
        self._loop.close(self)

    def _close(self) -> None:
        if self.fileno() < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        super().close()
        # We and our owner name each other: OpenSSL's buffers must not wait for a garbage collection.
        self._engine.free()
        del self.full


class TlsEnd(SocketEnd):
    """A TCP connection under TLS, on which the Dials of `relay/ends.py` can be talked and that can be joined.

    What is said before the handshake is done goes out behind it. When it fails the talker hears `lost` with the reason.
    """

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
        """Takes over an end that nobody talks to. `server_name` None: the server's side; then a client that speaks no
        TLS is told `otherwise` in plain, and turned away."""
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
        """The handshake is done."""
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
                self._flush()  # the client's first words go with the handshake's last
            self.tls.flush()
        except NotTls as error:
            self.tls.say_plainly(self._otherwise)
            self._turn_away(Lost(LostKind.NOT_TLS, str(error)))
        except OSError as error:
            self._turn_away(lost_by(error))
        else:
            self._go_on()

    def _turn_away(self, lost: Lost) -> None:
        """In order: a reset could overtake the alert."""
        handler, self._handler = self._handler, None
        self._close_socket()
        if handler is not None:
            handler.lost(lost)

    def _go_on(self) -> None:
        self.readable = True  # bytes may have come with the handshake's last
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
        """What else the owner is to be told: a failure, which it meets when it reads or asks."""
        try:
            self.tls.flush()
        except OSError:
            return IN | LOST
        return 0
