"""A yamux stream as an end: with a handler at first, then joined.

The states are those of `ends`, with these differences. While no handler reads, bytes wait in
`backlog`, one window at most, and count against the relay's memory. There is no descriptor: the
link's read calls the hooks of `yamux.Stream`, which call the handler or the pair. A handler's calls
from `set_handler` and `resume` come in a later step of the loop (`_replay`). `close` sends FIN and
drops what still comes (`_Discard`); after LINGER_SECONDS the stream is reset. A lost link is
`on_reset` with `session.over`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rtunnel.compat import override
from rtunnel.relay.ends import LINGER_SECONDS, EndHandler
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import DEADLINE, LINK_LOST, RESET, Lost
from rtunnel.wire import yamux

if TYPE_CHECKING:
    from rtunnel.relay.link import Link


class StreamJoin(Protocol):
    """A pair, as its stream uses it. All calls come from within the link's read."""

    def stream_data(self, data: memoryview) -> None:
        """Take payload, valid until this returns; call the stream's `consumed` when it has left."""

    def stream_fin(self) -> None:
        """Hear that the peer sends no more (FIN)."""

    def stream_lost(self, lost: Lost) -> None:
        """Hear that the peer reset the stream, or that its link has ended."""

    def stream_window(self) -> None:
        """Hear that `send_window` grew."""


class StreamEnd(yamux.Stream):
    """One stream of a link as an end. In the relay's thread."""

    __slots__ = (
        "_deadline",
        "_handler",
        "_reading",
        "backlog",
        "closed",
        "eof",
        "given",
        "granted",
        "link",
        "pair",
        "start",
        "wide",
    )
    session: Link
    broken = False  # of `End`: a stream's write never fails; when its link does, `lost` comes

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.link = link
        self.start = link.start_window  # bytes of its first window, which the budget does not pay
        self.eof = False
        self.closed = False
        self.granted = link.loop.now  # when `grows` measured the rate last
        self.given = 0  # bytes of window given back since then
        self.pair: StreamJoin | None = None
        self.backlog = bytearray()  # bytes that no handler has read; one window at most
        self._handler: EndHandler | None = None
        self._reading = False
        self.wide = self.start >= yamux.INITIAL_WINDOW  # its first window is not widened any more
        self._deadline: Timer | None = None

    @property
    def joined(self) -> bool:
        """Whether the stream is one end of a pair that is not done."""
        return self.pair is not None and not self.closed

    def set_handler(self, handler: EndHandler, deadline: float | None = None) -> None:
        self._handler = handler
        if self._deadline is not None:
            self._stop_deadline()
        if deadline is not None:
            self._deadline = self.link.loop.after(deadline, self._late)
        self.resume()

    def write(self, data: bytes) -> None:
        if not self.gone:
            frame = self.frame(data)
            if not self.wide and self.link.widens_early and (more := self.widen()):
                frame += self.widened(more)
            self.link.write(frame)

    def widen(self) -> int:
        """Take the rest of a first window from the budget, once. Return the number of bytes."""
        self.wide = True
        return self.link.memory.widen(yamux.INITIAL_WINDOW - self.receive_window)

    def pause(self) -> None:
        self._reading = False
        if self._deadline is not None:
            self._stop_deadline()

    def resume(self) -> None:
        self._reading = True
        if self.backlog or self.eof:
            self.link.loop.soon(self._replay)

    def close(self) -> None:
        """Send FIN and drop what comes: a RST would overtake the last bytes beyond the link."""
        if not self.closed:
            self._let_go()
            self.finish()
            if not self.gone:
                self.pair = _Discard(self)

    def abort(self) -> None:
        if not self.closed:
            self._let_go()
            self.reset()

    def hand_over(self, pair: StreamJoin) -> bytes:
        """Give the stream to a pair. Return the backlog, which is not `consumed` yet."""
        if self._deadline is not None:
            self._stop_deadline()
        self._handler = None
        self.pair = pair
        return self._take_backlog() if self.backlog else b""

    # Hooks of yamux.Stream.

    @override
    def on_data(self, data: memoryview) -> None:
        link = self.link
        if link.speaker != self.id:
            link.speaker = self.id
            link.spoke_another = link.loop.now
        if self.pair is not None:
            self.pair.stream_data(data)
        elif self._reading and self._handler is not None and not self.backlog:
            self.consumed(len(data))
            self._handler.received(bytes(data))
        else:
            self.backlog += data
            self.link.hold(len(data))

    @override
    def on_fin(self) -> None:
        self.eof = True
        if self.pair is not None:
            self.pair.stream_fin()
        elif self._reading and self._handler is not None and not self.backlog:
            self._handler.finished()

    @override
    def on_reset(self) -> None:
        self._lose(LINK_LOST if self.session.over else RESET)

    @override
    def on_window(self) -> None:
        if self.pair is not None:
            self.pair.stream_window()

    def _replay(self) -> None:
        """Give the handler the backlog, then the FIN."""
        if self._handler is None or not self._reading or self.closed:
            return
        if self.backlog:
            data = self._take_backlog()
            self.consumed(len(data))
            self._handler.received(data)
        if self.eof and self._reading and self._handler is not None and not self.backlog:
            self._handler.finished()

    def _late(self) -> None:
        self.reset()
        self._lose(DEADLINE)

    def _lose(self, lost: Lost) -> None:
        handler, pair = self._handler, self.pair
        self._let_go()
        if pair is not None:
            pair.stream_lost(lost)
        elif handler is not None:
            handler.lost(lost)

    def _let_go(self) -> None:
        self.closed = True
        self._handler = None
        self.pair = None
        if self.backlog:
            self._take_backlog()
        if self._deadline is not None:
            self._stop_deadline()

    def _take_backlog(self) -> bytes:
        backlog, self.backlog = self.backlog, bytearray()
        self.link.release(len(backlog))
        return bytes(backlog)

    def _stop_deadline(self) -> None:
        assert self._deadline is not None
        self._deadline.cancel()
        self._deadline = None


class _Discard:
    """Drops what comes on a closed stream until FIN, or for LINGER_SECONDS; then resets it."""

    __slots__ = ("_stream", "_timer")

    def __init__(self, stream: StreamEnd) -> None:
        self._stream = stream
        self._timer = stream.link.loop.after(LINGER_SECONDS, stream.reset)

    def stream_data(self, data: memoryview) -> None:
        self._stream.consumed(len(data))

    def stream_fin(self) -> None:
        self._timer.cancel()

    def stream_lost(self, lost: Lost) -> None:
        self._timer.cancel()

    def stream_window(self) -> None:
        pass
