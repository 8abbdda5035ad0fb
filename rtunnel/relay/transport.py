"""How a link's bytes pass its socket: plain, or under TLS."""

from __future__ import annotations

import socket
import ssl
from typing import Final

from rtunnel.compat import override
from rtunnel.relay.engine import TlsEngine
from rtunnel.relay.memory import Memory

#: Bytes of one read from a link's socket. Larger reads are not faster.
READ_BYTES: Final = 256 * 1024
#: The same for a peer that has not proved who it is. OpenSSL's buffers stay as large as the largest
#: piece was, and each record costs 2 us: 256 KiB of records with one byte each would stop the loop
#: for 22 ms.
UNPROVEN_READ_BYTES: Final = 4 * 1024


class Scratch:
    """Buffers that all links and pairs of one relay share.

    `cipher` is used within one read; `plain` until the frames of a link's read are handed on;
    `upload` from a read of a socket to the send that follows.
    """

    __slots__ = ("cipher", "memory", "plain", "upload")

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory or Memory()  # shared like the buffers
        self.plain = memoryview(bytearray(READ_BYTES))
        self.cipher = memoryview(bytearray(READ_BYTES))
        self.upload = memoryview(bytearray(READ_BYTES))


class Transport:
    """Plain TCP. Bytes of a `send` that the kernel does not take are `pending` until `drain`."""

    __slots__ = ("drained", "eof", "hup", "pending", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pending: bytes | memoryview = b""
        self.drained = False  # the last read left nothing in the kernel
        self.eof = False
        self.hup = False  # a FIN may have come: a short read has not drained the socket

    @property
    def handshake_bytes(self) -> int:
        """The number of bytes that the peer has sent in a TLS handshake."""
        return 0

    def handshake(self) -> bool:
        """Go on with the handshake; return whether it is done. Raises OSError or ssl.SSLError."""
        return True

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Take all bytes, and send what the kernel takes. Only while none are pending."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.pending = bytes(memoryview(data)[sent:])

    def drain(self) -> bool:
        """Send what is pending; return whether nothing is left. Raises OSError."""
        while self.pending:
            try:
                sent = self.sock.send(self.pending)
            except BlockingIOError:
                return False
            self.pending = memoryview(self.pending)[sent:]
        return True

    def receive(self, scratch: Scratch, most: int = READ_BYTES) -> memoryview:
        """Return up to `most` bytes in `scratch.plain`; none when there are none, or at the end
        (`eof`).

        Raises OSError.
        """
        return scratch.plain[: self._read_kernel(scratch.plain[:most])]

    def _read_kernel(self, buffer: memoryview) -> int:
        self.drained = False
        try:
            size = self.sock.recv_into(buffer)
        except BlockingIOError:
            self.drained = True
            self.hup = False  # a FIN that had come would have been read
            return 0
        if not size:
            self.eof = True
        elif size < len(buffer) and not self.hup:
            self.drained = True
        return size

    def peer_certificate(self) -> bytes | None:
        """Return the peer's certificate (DER); None without TLS, or when the peer showed none."""
        return None

    def last(self, data: bytes | bytearray) -> bytes | memoryview:
        """Return the bytes that must still be sent for `data` and an orderly end. The last call."""
        return bytes(self.pending) + data if data else self.pending


class TlsTransport(Transport):
    """TLS 1.3 (`engine`) over a socket. `pending` is encrypted."""

    __slots__ = ("_engine",)

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None) -> None:
        """Make one side of a connection. `server_name` None: the server's."""
        super().__init__(sock)
        self._engine = TlsEngine(context, server_name)

    @property
    def handshake_bytes(self) -> int:
        """The number of bytes that the peer has sent in the handshake."""
        return self._engine.handshake_bytes

    @override
    def handshake(self) -> bool:
        try:
            done = self._engine.handshake(lambda: self.sock.recv(UNPROVEN_READ_BYTES), self._push)
        except ssl.SSLError:
            self._push()  # the alert tells the peer why
            raise
        self._push()
        return done

    def _push(self) -> None:
        data = self._engine.take()
        if self.pending:
            self.pending = bytes(self.pending) + data
        elif data:
            super().send(memoryview(data))

    @override
    def send(self, data: bytes | bytearray | memoryview) -> None:
        Transport.send(self, memoryview(self._engine.encrypt(data)))

    @override
    def receive(self, scratch: Scratch, most: int = READ_BYTES) -> memoryview:
        """Return the plain text of whole records; a part of one stays in OpenSSL."""
        size = self._read_kernel(scratch.cipher[:most])
        engine, plain = self._engine, scratch.plain
        filled = engine.decrypt(plain, scratch.cipher[:size])
        if filled == READ_BYTES:
            self.drained = False  # there may be more
        if engine.eof:
            self.eof = True
        if engine.answers:
            if not self.pending:
                self._push()
            elif engine.outgoing > READ_BYTES:
                raise ConnectionResetError("the peer asks for keys, and takes no answer")
        return plain[:filled]

    @override
    def peer_certificate(self) -> bytes | None:
        return self._engine.certificate

    @override
    def last(self, data: bytes | bytearray) -> bytes | memoryview:
        """Return the bytes with a close_notify behind them."""
        engine = self._engine
        try:
            words = engine.encrypt(data) if data else b""
        except ssl.SSLError:
            words = b""  # TLS has failed: only what is pending can arrive
        engine.close()
        return bytes(self.pending) + words + engine.take()
