"""A pair of a socket and a stream of a link. `join` has the theory of operation."""

from __future__ import annotations

import socket

from rtunnel.compat import override
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import PIECE, QUANTUM, Ending, Pair, PairOwner, Shared
from rtunnel.relay.loop import HUP, IN, LOST, OUT
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire.yamux import HEADER_BYTES


class StreamPair(Pair):
    """A pair of a socket and a stream. `out` is towards the stream, `back` towards the socket."""

    __slots__ = (
        "_back_ended",
        "_held",
        "_hup",
        "_is_client",
        "_out_ended",
        "_queued",
        "_readable",
        "_scratch",
        "_socket",
        "_stream",
        "_waits",
    )

    def __init__(
        self,
        shared: Shared,
        end: SocketEnd,
        stream: StreamEnd,
        *,
        socket_is_client: bool,
        out: bytes = b"",
        back: bytes = b"",
        idle: float = 0.0,
        owner: PairOwner,
    ) -> None:
        super().__init__(shared.loop, shared.live, idle, owner)
        self._scratch = shared.scratch
        self._socket = end
        self._stream = stream
        self._is_client = socket_is_client
        self._readable = end.readable
        self._hup = end.hup
        self._out_ended = False  # the socket's FIN is passed on to the stream
        self._back_ended = False  # the stream's FIN is passed on to the socket
        self._waits = False  # in `link.waiting`
        self._queued = False  # `_run_out` is in the run queue
        unread = stream.hand_over(self)
        words = end.hand_over(self._event)
        # As in SocketPair: bytes that handlers wrote are not the stream's.
        if socket_is_client:
            self.account.down -= len(words)
        else:
            self.account.up -= len(words)
        self._held = bytearray(words + back)  # for the socket
        self._send_held_first(unread)
        if out and not self.done:
            stream.link.write(stream.frame(out))
            self._count_out(len(out))
        if not self.done:
            self._run_out()

    @override
    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self._socket.sock,)

    def _send_held_first(self, unread: bytes) -> None:
        """Send what handlers wrote, then the backlog, then the stream's FIN, all by one queue."""
        if self._held:
            self._stream.consumed(-len(self._held))  # they used no window up
        self._held += unread
        if self._held:
            self._stream.link.hold(len(self._held))
            self.flush()
        elif self._stream.eof:
            self.stream_fin()

    # Out: socket -> stream.

    def _run_out(self) -> None:
        """Read the socket behind room for a frame's header, and send both."""
        self._queued = False
        stream, link, budget = self._stream, self._stream.link, QUANTUM
        buffer = self._scratch.upload
        while self._readable and not self._out_ended and not self.done:
            if link.blocked:
                if not self._waits:
                    self._waits = True
                    link.waiting.append(self)
                return
            window = stream.send_window
            if window <= 0:
                return  # `stream_window` goes on
            if budget <= 0:
                self._queue()
                return
            wanted = min(PIECE, window)
            try:
                size = self._socket.sock.recv_into(buffer[HEADER_BYTES : HEADER_BYTES + wanted])
            except BlockingIOError:
                self._readable = False
                return
            except OSError:
                self._socket_lost()
                return
            if not size:
                self._out_ended = True
                stream.finish()
                self._end_if_both_ended()
                return
            if size < wanted and not self._hup:
                self._readable = False
            stream.header_into(buffer, size)
            link.write(buffer[: HEADER_BYTES + size])
            self._count_out(size)
            budget -= size

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self.loop.soon(self._run_out)

    def link_ready(self) -> None:
        self._waits = False
        if not self.done:
            self._run_out()

    def stream_window(self) -> None:
        if self._readable:
            self._queue()  # the link's read calls this, and has its own share of a turn

    # Back: stream -> socket.

    def stream_data(self, data: memoryview) -> None:
        if self._held:
            self._held += data
            self._stream.link.hold(len(data))
            return
        try:
            sent = self._socket.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._socket_lost()
            return
        if sent:
            self._count_back(sent)
        if sent < len(data):
            self._held += data[sent:]
            self._stream.link.hold(len(data) - sent)
            self._socket.await_room()

    def flush(self) -> None:
        """Give the socket what is held, then the stream's FIN if it is due."""
        try:
            sent = self._socket.sock.send(self._held)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._socket_lost()
            return
        del self._held[:sent]
        self._stream.link.release(sent)
        self._count_back(sent)
        if self._held:
            self._socket.await_room()
        if not self._held and self._stream.eof:
            self._fin_back()

    def stream_fin(self) -> None:
        if not self._held:
            self._fin_back()

    def _fin_back(self) -> None:
        if self._back_ended or self.done:
            return
        self._back_ended = True
        self._end_if_both_ended()
        if not self.done:  # else the pair has closed the socket, which sends the FIN
            try:
                self._socket.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._socket_lost()

    # Both directions.

    def _event(self, mask: int) -> None:
        if mask & (IN | HUP | LOST):
            self._readable = True
            if mask & HUP:
                self._hup = True
            self._run_out()
        if mask & OUT and self._held and not self.done:
            self.flush()
        if mask & LOST and not self.done and not (self._out_ended and self._back_ended):
            self._check_socket()

    def _check_socket(self) -> None:
        """End the pair if the socket has an error; HUP without one comes with the second FIN."""
        if self._socket.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._socket_lost()

    def _count_out(self, size: int) -> None:
        self.moved = self.loop.now
        if self._is_client:
            self.account.up += size
        else:
            self.account.down += size

    def _count_back(self, size: int) -> None:
        self.moved = self.loop.now
        if self._is_client:
            self.account.down += size
        else:
            self.account.up += size
        self._stream.consumed(size)

    def _end_if_both_ended(self) -> None:
        if self._out_ended and self._back_ended:
            self._close(Ending.CLOSED)

    def _socket_lost(self) -> None:
        if not self.done:
            # A FIN without close_notify is such a loss: the socket could still say an orderly end
            # to its peer.
            self._socket.reset_on_close()
            self._stream.reset()
            self._close(Ending.CLIENT_RESET if self._is_client else Ending.TARGET_RESET)

    def stream_lost(self, lost: Lost) -> None:
        if self.done:
            return
        self._socket.reset_on_close()
        if lost.kind is LostKind.LINK_LOST:
            self._close(Ending.LINK_LOST)
        else:
            self._close(Ending.TARGET_RESET if self._is_client else Ending.CLIENT_RESET)

    @override
    def abort(self, ending: Ending) -> None:
        if not self.done:
            self._socket.reset_on_close()
            self._stream.reset()
            self._close(ending)

    def _close(self, ending: Ending) -> None:
        if self._held:
            self._stream.link.release(len(self._held))
            self._held.clear()
        self._socket.closed = True
        self._stream.pair = None
        self._stream.closed = True
        self.loop.close(self._socket.sock)
        self._finish(ending)
