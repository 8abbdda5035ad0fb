"""One thread, one epoll: descriptors, timers, a run queue, and calls from other threads.

Descriptors are watched edge-triggered, for room to write only once that was missing; after an event the owner
drains until EAGAIN or puts itself on the run queue. Handlers are plain callables by descriptor, so that an owner
hands a socket on by one dictionary store. Sockets given to `close` are closed at the end of the turn: a number
can't come back in the same batch.
"""

from __future__ import annotations

import heapq
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Final, Protocol

IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT
#: A short read has not drained the socket: a FIN is behind it, or urgent data, in front of which reads stop (tcp(7)).
URGENT: Final = select.EPOLLPRI
HUP: Final = select.EPOLLRDHUP | select.EPOLLHUP | URGENT
LOST: Final = select.EPOLLHUP | select.EPOLLERR
_READING: Final = IN | select.EPOLLRDHUP | URGENT | select.EPOLLET
_EVERYTHING: Final = _READING | OUT

#: What takes long is done in so few pieces a turn: a TLS handshake with a certificate takes a millisecond, and after
#: an outage thousands of agents come at once, beside streams that must not wait for all of them.
LONG_A_TURN: Final = 2

Handler = Callable[[int], None]


class Poller(Protocol):
    """What a loop needs of `select.epoll`."""

    def register(self, fd: int, mask: int, /) -> None:
        """Watch a descriptor."""

    def modify(self, fd: int, mask: int, /) -> None:
        """Watch it for something else; what is there already is an event."""

    def poll(self, timeout: float, most: int, /) -> list[tuple[int, int]]:
        """Wait up to `timeout` seconds; up to `most` events (descriptor, mask)."""

    def close(self) -> None:
        """Watch no more."""


class Timer:
    """A call at a time; `cancel` is idempotent."""

    __slots__ = ("_loop", "call")

    def __init__(self, loop: Loop, call: Callable[[], None]) -> None:
        self._loop = loop
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call."""
        if self.call is not None:
            self.call = None
            self._loop._timer_cancelled()


class Loop:
    """See the module. Only `call` may be used from another thread."""

    def __init__(self, on_crash: Callable[[BaseException], None], poller: Poller | None = None) -> None:
        """`on_crash` gets what a handler raises. `poller`: None is an epoll of the kernel's."""
        self.now = time.monotonic()  # of this turn
        self.handlers: dict[int, Handler] = {}
        self._on_crash = on_crash
        self._epoll: Poller = select.epoll() if poller is None else poller
        self._ready: deque[Callable[[], None]] = deque()
        self._long: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = count()
        self._cancelled = 0
        self._graves: list[socket.socket] = []
        self.stopped = False  # this turn is the last
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._mailbox: deque[Callable[[], None]] = deque()
        self._thread: int | None = None
        self._waking = threading.Lock()  # a late call must not write to a descriptor that is another's by now
        self._epoll.register(self._wake_fd, IN | select.EPOLLET)
        self.handlers[self._wake_fd] = self._woken

    # For owners of descriptors.

    def add(self, fd: int, handler: Handler, *, out: bool = True) -> None:
        """Watch a non-blocking descriptor, edge-triggered, for everything; or, at first, not for room to write.

        A new socket is writable, which nobody needs to hear: that event alone would be a turn for each connection.
        """
        self.handlers[fd] = handler
        self._epoll.register(fd, _EVERYTHING if out else _READING)

    def add_listener(self, fd: int, handler: Handler) -> None:
        """Watch a listening socket. Level-triggered: each turn in which connections wait is an event."""
        self.handlers[fd] = handler
        self._epoll.register(fd, IN)

    def hold_listener(self, fd: int, *, hold: bool) -> None:
        """Make no event of waiting connections, or make events again."""
        self._epoll.modify(fd, 0 if hold else IN)

    def add_out(self, fd: int) -> None:
        """Watch it for room to write as well; if there is room by now, that is an event too."""
        self._epoll.modify(fd, _EVERYTHING)

    def close(self, sock: socket.socket) -> bool:
        """Stop watching now, close at the end of the turn. False: it is not watched, and stays as it is."""
        if self.handlers.pop(sock.fileno(), None) is None:
            return False
        self._graves.append(sock)
        return True

    def soon(self, call: Callable[[], None]) -> None:
        """Run in this turn's queue (or the next's, when the queue is running)."""
        self._ready.append(call)

    def enqueue_slow(self, call: Callable[[], None]) -> None:
        """Run when it is its turn: something that takes long, a few of which are done in each turn."""
        self._long.append(call)

    @property
    def line(self) -> int:
        """How many stand in line."""
        return len(self._long)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Run in about so many seconds."""
        timer = Timer(self, call)
        heapq.heappush(self._timers, (self.now + seconds, next(self._timer_ids), timer))
        return timer

    # For other threads.

    def call(self, call: Callable[[], None]) -> None:
        """Run `call` in the loop's thread, soon; dropped when the loop is over. From any thread."""
        self._mailbox.append(call)
        if threading.get_ident() != self._thread:
            with self._waking:
                if self._wake_fd >= 0:
                    os.eventfd_write(self._wake_fd, 1)
        elif len(self._mailbox) == 1:
            self._ready.append(self._read_mailbox)

    # The loop.

    def run(self) -> None:
        """Turn until `stop`."""
        self._thread = threading.get_ident()
        poll, turn, ready = self._epoll.poll, self.turn, self._ready
        while not self.stopped:
            events = poll(0 if ready else self._patience(), 256)
            turn(events, time.monotonic())
        self._shut()

    def turn(self, events: list[tuple[int, int]], now: float) -> None:
        """One turn: these events (descriptor, mask), then the timers that are due, the run queue and the line."""
        self.now = now
        handlers, ready = self.handlers, self._ready
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(mask)
                except Exception as error:
                    self._on_crash(error)
        if self._timers and self._timers[0][0] <= now:
            self._run_timers()
        for _ in range(len(ready)):
            try:
                ready.popleft()()
            except Exception as error:
                self._on_crash(error)
        if self._long:
            for _ in range(min(LONG_A_TURN, len(self._long))):
                self._guarded(self._long.popleft())
        if self._graves:
            self._bury()

    def stop(self) -> None:
        """Leave `run` after this turn; every watched descriptor's owner must have let go by then."""
        self.stopped = True

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._on_crash(error)

    def _patience(self) -> float:
        if self._ready or self._mailbox or self._long:
            return 0
        if not self._timers:
            return 60.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        now = self.now
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]  # which a call may have replaced, see below
            call, timer.call = timer.call, None
            if call is None:
                self._cancelled -= 1
            else:
                self._guarded(call)

    def _timer_cancelled(self) -> None:
        """Cancelled timers stay in the heap until they are most of it."""
        self._cancelled += 1
        if self._cancelled > 512 and self._cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].call is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _woken(self, _mask: int) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        self._read_mailbox()

    def _read_mailbox(self) -> None:
        while self._mailbox:
            self._guarded(self._mailbox.popleft())

    def _bury(self) -> None:
        for sock in self._graves:
            sock.close()
        self._graves.clear()

    def _shut(self) -> None:
        self._bury()
        self._epoll.close()
        with self._waking:
            os.close(self._wake_fd)
            self._wake_fd = -1
