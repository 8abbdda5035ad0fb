"""The windows of a link's streams: how much the peer may send ahead.

A window grows with the rate of its stream, out of the budget of the relay (`memory`), and shrinks
when its stream needs it no more.
"""

from __future__ import annotations

from typing import Final

from rtunnel.compat import override
from rtunnel.relay.loop import Loop
from rtunnel.relay.memory import Memory
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire import yamux

#: Seconds that a round trip counts at least, because even on loopback the other end needs a turn. A
#: window grows to twice what its stream moves in the link's shortest round trip (a later one has
#: waited behind the very bytes that the window let in), and at most doubles each time. More would
#: only fill buffers in which small frames wait: windows of 4 MiB on loopback gave round trips
#: beside a bulk stream a p99 of 33 ms.
LEAST_RTT: Final = 0.0005
#: Seconds over which a rate is measured at least: a shorter one is that of a burst out of a buffer.
RATE_SECONDS: Final = 0.01
#: Seconds. A stream is alone on its link when no other has sent for ALONE_SECONDS. On a path whose
#: round trip is shorter than NEAR_RTT, the window of a stream that is not alone shrinks to its
#: first size: more would only queue up in front of its neighbours' bytes.
ALONE_SECONDS: Final = 0.25
NEAR_RTT: Final = 0.001
#: On a longer path windows are given back in eighths: in halves, a stream would move half of its
#: window in a round trip.
FAR_GIVE_BACK: Final = 8
#: Bytes. 1 Gbit/s over 50 ms has 6 MiB on its way, and half a window again until it is given back.
MAX_STREAM_WINDOW: Final = 16 * 1024 * 1024


class WindowedSession(yamux.Session):
    """A yamux session of `StreamEnd`s whose windows follow their rates. In the relay's thread."""

    __slots__ = ("_least_rtt", "held", "loop", "memory", "speaker", "spoke_another", "widens_early")

    def __init__(self, loop: Loop, memory: Memory, *, client: bool) -> None:
        super().__init__(client=client)
        self.loop = loop
        self.speaker = 0  # the id of the stream from which Data came last
        self.spoke_another = loop.now  # when that was another stream than before
        self._least_rtt = 0.0  # seconds; 0: not measured yet
        self.widens_early = True  # small first windows are widened with the stream's first frame
        self.memory = memory
        self.held = 0  # bytes of its streams that this process holds

    def hold(self, size: int) -> None:
        """Count bytes of a stream that this process holds for a slow reader."""
        self.held += size
        self.memory.hold(size)

    def release(self, size: int) -> None:
        """Count bytes that are not held any more."""
        self.held -= size
        self.memory.release(size)

    def measured(self, rtt: float) -> None:
        """Take the seconds of a round trip on this link."""
        self._least_rtt = min(rtt, self._least_rtt or rtt)
        far = self._least_rtt >= NEAR_RTT
        self.give_back = FAR_GIVE_BACK if far else 2
        # A far sender that needs more than START_WINDOW would wait for a round trip. A near one
        # waits less than a millisecond, and most of its streams never send that much: without early
        # widening they save two frames each.
        self.widens_early = far

    @override
    def grows(self, stream: yamux.Stream) -> int:
        assert isinstance(stream, StreamEnd)
        stream.given += stream.owed
        if not stream.wide:
            return stream.widen()
        now = self.loop.now
        seconds = now - stream.granted
        if seconds < RATE_SECONDS:
            return 0
        given, stream.granted, stream.given = stream.given, now, 0
        window, memory = stream.receive_window, self.memory
        wanted = int(2 * given / seconds * max(self._least_rtt, LEAST_RTT))
        shares = self._least_rtt < NEAR_RTT and now - self.spoke_another < ALONE_SECONDS
        if shares:
            wanted = min(wanted, yamux.INITIAL_WINDOW)
        if wanted > window:
            more = max(0, min(wanted - window, window, MAX_STREAM_WINDOW - window, memory.left))
        else:
            floor = stream.start if memory.tight else yamux.INITIAL_WINDOW if shares else window
            more = -min(stream.owed, max(0, window - max(wanted, floor)))
        memory.left -= more
        return more

    @override
    def gave_up(self, stream: yamux.Stream) -> None:
        assert isinstance(stream, StreamEnd)
        self.memory.left += stream.receive_window - stream.start
