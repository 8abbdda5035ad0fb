"""One thread and one epoll: descriptors, timers, a run queue, and calls from other threads.

Theory of operation
===================

**One turn.** `run` polls (up to 256 events), then `turn` does these steps in this order:

1. The events. Each handler is looked up when its event is due, so that a descriptor which changed
   its owner earlier in the same turn reports to the new owner.
2. The timers that are due.
3. The run queue (`soon`). Calls queued in steps 1 and 2 run in this turn; calls queued in steps 3
   and 4 run in the next one, so that a call that queues itself again lets all others run first.
4. The slow queue (`enqueue_slow`): `SLOW_A_TURN` calls of it.
5. Sockets given to `close` are closed.

**Edges.** Descriptors are watched edge-triggered (epoll(7)); only listeners are level-triggered.
An owner can rely on these events:

    The kernel or the peer does     The owner gets one event  What the owner does
    ------------------------------  ------------------------  --------------------------------------
    bytes come                      IN                        reads until EAGAIN or a short read; if
                                                              it stops before, it remembers that it
                                                              may read, and queues itself (`soon`)
    a FIN comes                     IN, RDHUP (in `HUP`)      remembers the `HUP`: a short read has
                                                              not drained the socket then, the FIN
                                                              follows
    urgent data comes               PRI (in `HUP`)            the same: a read stops in front of
                                                              urgent data (tcp(7)), and the bytes
                                                              behind it have no edge of their own
    RST comes, or the kernel gives  IN, HUP, ERR (in `LOST`)  reads what is left, then meets the
    the connection up                                         error by recv, send or SO_ERROR: one
                                                              of them, once
    the second of both FINs is      HUP without ERR (in       does not take it for a reset: SO_ERROR
    sent or received                `LOST`)                   is 0
    room appears after a send that  OUT                       sends what it kept; there is no such
    took less than all                                        edge when no send has failed before

The mask is the state at the time of the poll: an event for new bytes also shows an older FIN. `add`
and `add_out` make an event of whatever is there already. A change of the owner does not: one that
takes over a watched descriptor (`handlers[fd] = ...`) must be told what the former owner knew.
Sockets are watched for room only after a write found none, because a new socket is writable, and
that event alone would cost each connection a turn.

**Ownership.** `handlers` names the one owner of a descriptor, and a dictionary store hands it on.
`close` removes the handler at once, so that no further event arrives, and closes the socket in step
5, so that its number cannot come back within one batch of events and reach a stranger's handler.
Calls that were queued before still run: a queued call must ask whether its owner is closed. A
socket's own `close` may take the descriptor back in step 5 (`TlsSocket`, which has bytes pending).

**Failures.** An exception of one call goes to `on_crash`, and the turn goes on. The owner is not
closed for it.

**Threads.** Only `call` may be used from another thread. It wakes the poll by an eventfd.

Tests: `tests/unit/test_relay.py` (TestLoop, test_what_takes_long_stands_in_line) for the order of
calls; `tests/support/kernel.py` is a model of the table above, which `test_hostile_kernel.py::
test_the_simulated_kernel_is_like_the_real_one` compares with the real kernel.
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
URGENT: Final = select.EPOLLPRI
#: With one of these a short read has not drained the socket: a FIN follows, or urgent data, in
#: front of which reads stop (tcp(7)).
HUP: Final = select.EPOLLRDHUP | select.EPOLLHUP | URGENT
#: The connection is reset or given up, or both sides have sent FIN: SO_ERROR tells these apart.
LOST: Final = select.EPOLLHUP | select.EPOLLERR
_READING: Final = IN | select.EPOLLRDHUP | URGENT | select.EPOLLET
_EVERYTHING: Final = _READING | OUT

#: Calls of the slow queue in one turn. A TLS handshake with a certificate takes a millisecond, and
#: after an outage thousands of agents come at once, beside streams that must not wait for all of
#: them.
SLOW_A_TURN: Final = 2

Handler = Callable[[int], None]


class Poller(Protocol):
    """The methods of `select.epoll` that a loop uses; tests put a simulated kernel behind them."""

    def register(self, fd: int, mask: int, /) -> None:
        """Watch a descriptor for the events in `mask`; what is there already is an event."""

    def modify(self, fd: int, mask: int, /) -> None:
        """Replace the mask of a watched descriptor; what is there already is an event."""

    def poll(self, timeout: float, most: int, /) -> list[tuple[int, int]]:
        """Wait up to `timeout` seconds; return up to `most` events as (descriptor, mask)."""

    def close(self) -> None:
        """Stop watching all descriptors."""


class Timer:
    """One call that is due at a time; made by `Loop.after`."""

    __slots__ = ("_loop", "call")

    def __init__(self, loop: Loop, call: Callable[[], None]) -> None:
        self._loop = loop
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Drop the call. No effect when it was made or cancelled already."""
        if self.call is not None:
            self.call = None
            self._loop._timer_cancelled()


class Loop:
    """The loop of one relay. All methods but `call` must run in the thread of `run`."""

    def __init__(self, on_crash: Callable[[BaseException], None], poller: Poller | None = None) -> None:
        """Make a loop that reports exceptions of its calls to `on_crash`.

        `poller`: a simulated kernel in tests; None makes a real epoll.
        """
        self.now = time.monotonic()  # monotonic seconds at the start of this turn
        self.handlers: dict[int, Handler] = {}
        self._on_crash = on_crash
        self._epoll: Poller = select.epoll() if poller is None else poller
        self._ready: deque[Callable[[], None]] = deque()
        self._slow: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = count()
        self._cancelled = 0
        self._closing: list[socket.socket] = []  # closed at the end of the turn
        self.stopped = False  # this turn is the last
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._mailbox: deque[Callable[[], None]] = deque()
        self._thread: int | None = None
        # Held to write to the eventfd and to close it: a late `call` must not write to another file
        # of the same number.
        self._waking = threading.Lock()
        self._epoll.register(self._wake_fd, IN | select.EPOLLET)
        self.handlers[self._wake_fd] = self._woken

    # Calls for owners of descriptors.

    def add(self, fd: int, handler: Handler, *, out: bool = True) -> None:
        """Watch a non-blocking descriptor, edge-triggered; `handler(mask)` gets its events.

        `out`: also watch for room to write. Without it `add_out` does so later, when a write found
        none.
        """
        self.handlers[fd] = handler
        self._epoll.register(fd, _EVERYTHING if out else _READING)

    def add_listener(self, fd: int, handler: Handler) -> None:
        """Watch a listening socket, level-triggered: an event a turn while connections wait."""
        self.handlers[fd] = handler
        self._epoll.register(fd, IN)

    def hold_listener(self, fd: int, *, hold: bool) -> None:
        """Stop (`hold`) or resume the events of a listening socket; the kernel's queue stays."""
        self._epoll.modify(fd, 0 if hold else IN)

    def add_out(self, fd: int) -> None:
        """Watch a descriptor for room to write as well; room that is there already is an event."""
        self._epoll.modify(fd, _EVERYTHING)

    def close(self, sock: socket.socket) -> bool:
        """Stop watching the socket now and close it at the end of the turn.

        Return False, without any effect, when the socket is not watched.
        """
        if self.handlers.pop(sock.fileno(), None) is None:
            return False
        self._closing.append(sock)
        return True

    def soon(self, call: Callable[[], None]) -> None:
        """Queue a call: it runs in this turn, or in the next one if the queue runs already."""
        self._ready.append(call)

    def enqueue_slow(self, call: Callable[[], None]) -> None:
        """Queue a call that takes long (a millisecond): `SLOW_A_TURN` of them run in each turn."""
        self._slow.append(call)

    @property
    def slow_queued(self) -> int:
        """The number of calls in the slow queue."""
        return len(self._slow)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Run a call in the first turn that begins `seconds` or more after this one began."""
        timer = Timer(self, call)
        heapq.heappush(self._timers, (self.now + seconds, next(self._timer_ids), timer))
        return timer

    # Calls from other threads.

    def call(self, call: Callable[[], None]) -> None:
        """Run a call in the loop's thread, soon. From any thread.

        The call is dropped when the loop has ended.
        """
        self._mailbox.append(call)
        if threading.get_ident() != self._thread:
            with self._waking:
                if self._wake_fd >= 0:
                    os.eventfd_write(self._wake_fd, 1)
        elif len(self._mailbox) == 1:
            self._ready.append(self._read_mailbox)

    # The loop.

    def run(self) -> None:
        """Make turns until `stop`, then close the epoll. The calling thread is the loop's."""
        self._thread = threading.get_ident()
        poll, turn, ready = self._epoll.poll, self.turn, self._ready
        while not self.stopped:
            events = poll(0 if ready else self._poll_timeout(), 256)
            turn(events, time.monotonic())
        self._shut()

    def turn(self, events: list[tuple[int, int]], now: float) -> None:
        """Make one turn, in the order that the module describes.

        `events`: (descriptor, mask) from the poll; `now`: monotonic seconds.
        """
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
        if self._slow:
            for _ in range(min(SLOW_A_TURN, len(self._slow))):
                self._guarded(self._slow.popleft())
        if self._closing:
            self._close_sockets()

    def stop(self) -> None:
        """Let `run` return after this turn. All owners must have closed their sockets by then."""
        self.stopped = True

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._on_crash(error)

    def _poll_timeout(self) -> float:
        if self._ready or self._mailbox or self._slow:
            return 0
        if not self._timers:
            return 60.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        now = self.now
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]  # the attribute: a call may replace the list
            call, timer.call = timer.call, None
            if call is None:
                self._cancelled -= 1
            else:
                self._guarded(call)

    def _timer_cancelled(self) -> None:
        """Rebuild the heap when most of it is cancelled: to remove one timer is linear work."""
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

    def _close_sockets(self) -> None:
        for sock in self._closing:
            sock.close()
        self._closing.clear()

    def _shut(self) -> None:
        self._close_sockets()
        self._epoll.close()
        with self._waking:
            os.close(self._wake_fd)
            self._wake_fd = -1
