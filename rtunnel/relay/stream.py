"""A yamux stream as an end that talks and can be joined."""

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
    """What a joined stream tells its pair."""

    def stream_data(self, data: memoryview) -> None:
        """Payload from the peer."""

    def stream_fin(self) -> None:
        """The peer sends no more."""

    def stream_lost(self, lost: Lost) -> None:
        """Reset, or the link is gone."""

    def stream_window(self) -> None:
        """There is send window again."""


class StreamEnd(yamux.Stream):
    """See the module, and End."""

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
    broken = False  # see End: a stream's failure is its link's, and comes as a reset

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.link = link
        self.start = link.start_window  # the window with which it began, beside the budget
        self.eof = False
        self.closed = False
        self.granted = link.loop.now  # when the rate was looked at last,
        self.given = 0  # and the window given back since
        self.pair: StreamJoin | None = None
        self.backlog = bytearray()  # came while nobody was reading; at most the window
        self._handler: EndHandler | None = None
        self._reading = False
        self.wide = self.start >= yamux.INITIAL_WINDOW  # or it has been widened as far as the budget let it
        self._deadline: Timer | None = None

    def talk(self, handler: EndHandler, deadline: float | None = None) -> None:
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
        """Take the rest of an ordinary first window out of the budget, once. Return how many bytes there were."""
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
        """What the peer still sends is dropped; a reset now would overtake our last words further on."""
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
        """The join takes the stream; returns what came before and was not read (not yet `consumed`)."""
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
        """Bytes that came while nobody was reading, then the FIN."""
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
    """Drops what a closed stream still gets, for a while."""

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
