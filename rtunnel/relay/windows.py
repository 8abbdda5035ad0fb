"""How much a link's peer may send ahead: windows grow and shrink with their streams, from one budget (`memory`)."""

from __future__ import annotations

from typing import Final

from rtunnel.compat import override
from rtunnel.relay.loop import Loop
from rtunnel.relay.memory import Memory
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire import yamux

#: A window grows towards twice what its stream moves in a round trip, at most doubling each time that it is looked at.
#: The shortest round trip counts (a later one has waited behind the very bytes that the window let in), and this at
#: least, because even on loopback the other end needs a turn. More would only fill buffers that small frames wait
#: behind: windows of 4 MiB on loopback gave a round trip beside a bulk stream a p99 of 33 ms.
LEAST_RTT: Final = 0.0005
#: A rate over less time than this is that of a burst out of some buffer.
RATE_SECONDS: Final = 0.01
#: A stream is alone on its link when none other has spoken for so long. The window of one that is not shrinks again to
#: where it began, on a path that is nearer than `NEAR_RTT`: more would only queue up in front of its neighbours' bytes.
ALONE_SECONDS: Final = 0.25
NEAR_RTT: Final = 0.001
#: On a farther path windows are given back in eighths: in halves a stream moves half of its window in a round trip.
FAR_GIVE_BACK: Final = 8
#: 1 Gbit/s over 50 ms is 6 MiB under way, and half a window again until it is given back.
MAX_STREAM_WINDOW: Final = 16 * 1024 * 1024


class WindowedSession(yamux.Session):
    """A yamux session of `StreamEnd`s whose windows follow what they move."""

    __slots__ = ("_least_rtt", "held", "loop", "memory", "speaker", "spoke_another", "widens_early")

    def __init__(self, loop: Loop, memory: Memory, *, client: bool) -> None:
        super().__init__(client=client)
        self.loop = loop
        self.speaker = 0  # the stream that spoke last,
        self.spoke_another = loop.now  # and when it was another one
        self._least_rtt = 0.0  # 0: none yet
        self.widens_early = True  # windows that begin small are widened with the stream's first words
        self.memory = memory
        self.held = 0  # bytes of its streams that wait in this process

    def hold(self, size: int) -> None:
        """So many bytes of its streams wait from now on for somebody who does not take them."""
        self.held += size
        self.memory.hold(size)

    def release(self, size: int) -> None:
        """So many of them are gone."""
        self.held -= size
        self.memory.release(size)

    def measured(self, rtt: float) -> None:
        """A round trip on this link took so many seconds."""
        self._least_rtt = min(rtt, self._least_rtt or rtt)
        far = self._least_rtt >= NEAR_RTT
        self.give_back = FAR_GIVE_BACK if far else 2
        # A far sender would wait a round trip for more than START_WINDOW. A near one waits less than a millisecond, and
        # most of its streams never send that much: two frames a stream saved.
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
