"""TLS 1.3 without a socket: one engine for links (`transport`) and for single connections (`tls`).

TLS goes through memory BIOs and not through `ssl.SSLSocket`. OpenSSL then takes any amount at once
(a write of SSLSocket must be repeated with the same length), records of 16 KiB share one system
call each way, and no read has to wait for a write. Measured on pieces of 64 KiB: 0.40 against 0.55
CPU s/GB on the sending side.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable
from typing import Final

#: Bytes that a peer may send in a TLS handshake. A flight with a certificate has 2 KiB, one with a
#: long chain 12 KiB. OpenSSL itself would keep a ClientHello of 128 KiB.
HANDSHAKE_BYTES: Final = 32 * 1024
#: The most bytes that one TLS record carries (RFC 8446 section 5.1).
RECORD_BYTES: Final = 16 * 1024

Data = bytes | bytearray | memoryview


class TlsEngine:
    """One TLS connection between two buffers. In the relay's thread.

    `decrypt` takes what came from the network and gives the plain text; `encrypt` takes plain text
    and gives what goes to the network, `take` what TLS itself has to send. `eof`: the peer's
    close_notify came.
    """

    __slots__ = ("_incoming", "_left", "_outgoing", "_tls", "answers", "eof", "handshake_bytes")

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        """Make one side of a connection. `server_name` None: the server's."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self.eof = False
        self.answers = False  # `take` has answers to the peer
        self._left = False  # a part of a record may be decrypted, and not read yet
        self.handshake_bytes = 0  # bytes that the peer has sent in the handshake

    @property
    def certificate(self) -> bytes | None:
        """The peer's certificate (DER); None in the handshake, or when the peer showed none."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def alpn(self) -> str | None:
        """The protocol that both ends agreed on (RFC 7301)."""
        return self._tls.selected_alpn_protocol()

    def handshake(self, receive: Callable[[], Data], push: Callable[[], None]) -> bool:
        """Go on with the handshake as far as there are bytes; return whether it is done.

        `receive` returns bytes of the peer, none at its end, or raises BlockingIOError. `push`
        sends what `take` gives; the last flight, or an alert, is left for the caller to `take`.
        Raises OSError (ssl.SSLError is one).
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                push()
            else:
                return True
            try:
                data = receive()
            except BlockingIOError:
                return False
            if not data:
                text = "the peer closed the connection during the TLS handshake"
                raise ConnectionResetError(errno.ECONNRESET, text)
            self.handshake_bytes += len(data)
            if self.handshake_bytes > HANDSHAKE_BYTES:
                raise ConnectionResetError(f"the peer's TLS handshake is over {HANDSHAKE_BYTES} bytes")
            self._incoming.write(data)

    def decrypt(self, view: memoryview, data: Data = b"") -> int:
        """Take bytes from the network; put as much plain text into `view` as there is and fits.
        Return its size.

        Less than `view` holds: there is no more, but perhaps a part of a record. Sets `eof`, and
        `answers` when the peer has asked for something (a key update): then `take` has the answer.
        Raises ssl.SSLError.
        """
        tls, incoming, filled, wanted = self._tls, self._incoming, 0, len(view)
        if data:
            incoming.write(data)
        # A read that gives less than it was asked for has emptied its record, so only a full view
        # can leave a part of one behind. And reads stop at an empty buffer: SSLWantReadError costs
        # as much as a record.
        left, self._left = self._left and tls.pending(), False
        try:
            while incoming.pending or left:
                left = 0
                size = int(tls.read(wanted - filled, view[filled:]))
                if not size:  # close_notify; after our own it is the exception
                    self.eof = True
                    break
                filled += size
                if filled == wanted:
                    self._left = True
                    break
        except ssl.SSLWantReadError:
            pass  # a part of a record
        except ssl.SSLZeroReturnError:
            self.eof = True
        self.answers = bool(self._outgoing.pending)
        return filled

    @property
    def holds(self) -> bool:
        """Whether `decrypt` has something to look at."""
        return bool(self._incoming.pending or self._tls.pending())

    def encrypt(self, data: Data) -> bytes:
        """Return the bytes for the network: what `take` would give, then this plain text."""
        self._tls.write(data)
        return self._outgoing.read()

    @property
    def outgoing(self) -> int:
        """How many bytes `take` has."""
        return self._outgoing.pending

    def take(self) -> bytes:
        """Return the bytes for the network."""
        return self._outgoing.read()

    def close(self) -> None:
        """Put a close_notify behind the bytes that `take` gives.

        OpenSSL looks for the peer's close_notify at once, and drops plain text that was not
        decrypted before.
        """
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError, OSError):
            pass  # the peer's close_notify has not come, and is not waited for

    def free(self) -> None:
        """Free OpenSSL's buffers without a garbage collection. Only the flags stay valid."""
        del self._tls, self._incoming, self._outgoing
