"""Two ends become a pair: bytes, half-closes and resets pass between them, and are counted.

Theory of operation
===================

**Two kinds.** A `SocketPair` is two sockets and two `_Flow`s, one a direction. A flow copies
through `scratch.upload` at first; one that fills a whole piece is bulk, and moves on by `os.splice`
through a pooled pipe. A `StreamPair` is a socket and a stream of a link. Out, the socket is read
straight behind the room for a frame's header, and both leave in one call; back, a frame's payload
goes from the link's read buffer into the socket.

**Life.** `Relay.join` makes a pair of two ends that are neither closed nor broken. The pair takes
the descriptors (`hand_over`: no handler, no deadline any more). To each side it first sends what
the end had not sent yet, then what handlers had read ahead (`up`, `down`), then a stream's backlog,
and then what comes. Each direction ends by itself, by the FIN that follows its last byte. When both
have ended, or something below breaks the pair, it is `done`: its sockets are closed at the end of
the turn, and the owner's `ended(account)` is called, once, last. `account.ending` names the row:

    It happens                  Socket to socket: the pair does    Socket and stream: the pair does
    --------------------------  ---------------------------------  ---------------------------------
    FIN of a socket, read as    `shutdown` of the other socket,    `finish` of the stream (FIN),
    an end                      behind the last byte               behind the last byte
    FIN of the stream           -                                  `shutdown` of the socket, behind
                                                                   what is held for it
    the second FIN              closes both sockets, which sends   closes the socket, the stream is
                                the FIN that is due; ending        gone; ending CLOSED
                                CLOSED
    RST, or another error of a  resets both sockets; ending        resets the stream (RST), closes
    socket, in a read, a write  CLIENT_RESET or TARGET_RESET,      the socket; ending after the
    or SO_ERROR                 after the socket that failed       socket's side
    RST of the stream           -                                  resets the socket; ending after
                                                                   the stream's side
    the link ends               -                                  resets the socket; ending
                                                                   LINK_LOST (for why, see `link`)
    HUP without an error        nothing: both FINs have passed,    the same
                                and the reads go on to their end
    urgent data                 copies from now on: splice(2)      reads as before
                                stops in front of it
    nothing moves for `idle`    resets both sockets; ending IDLE   resets both; ending IDLE
    seconds
    `abort(ending)`             resets both sockets; that ending   resets both; that ending

A reset on one side is a reset on the other, so that no peer takes a part for the whole.

**Where bytes wait.** A reader that does not read stops its own direction and no other; a
blocked link stops the directions towards it:

    A direction is stopped by   Its bytes wait                     It goes on after
    --------------------------  ---------------------------------  ---------------------------------
    a socket takes less than    one piece or one pipe in the       the OUT event, which `await_room`
    all                         flow; `_held` of a stream's pair,  asks for
                                a window at most
    the link is blocked         in the kernel: the socket is not   `link_ready`, in the order of
                                read                               `link.waiting`
    the stream's window is      in the kernel: the socket is not   `stream_window`, which queues
    used up                     read                               `_run_out`
    QUANTUM is used up          in the kernel                      the run queue (`soon`)
    nothing to read             nowhere                            the IN event

Held bytes count against the relay's memory (`memory`). Bytes are counted in the account when the
kernel or the link has taken them.

**Edges.** `readable` (of a flow, of a pair) means that a read may give something. An event sets it;
EAGAIN clears it, and so does a short read, unless a HUP has come: then the read after it gives the
FIN. A direction that stops for another reason leaves it set, and needs no edge to go on. The event
LOST makes a pair that is not reading ask SO_ERROR, because it would meet the error in no read.

**What calls back.** `Relay.join` moves bytes, and `abort` resets: both may call `owner.ended`
before they return. The owner may do anything then; the pair is closed already. So each method that
moves bytes looks at `done` after each step. `stream_data`, `stream_fin`, `stream_lost` and
`stream_window` come from within the link's read: they write to the socket, and may end the pair,
but they don't read the socket. `stream_window` only queues that, because a read of the link has its
own share of a turn. `link_ready` comes from within the link's OUT event, and reads and sends at
once.

Tests: `tests/unit/test_hostile_kernel.py` plays schedules of all this on a simulated kernel, and
checks the account and its ending (`tests/support/hostile.py`); `tests/unit/test_relay.py` has a
test on real sockets for most rows, such as test_half_close_is_kept,
test_a_reset_is_a_reset_on_the_other_side, test_urgent_data_stops_no_bulk_stream,
test_a_slow_reader_stops_only_its_own_stream, test_a_dead_link_resets_its_streams,
test_an_idle_pair_ends_at_its_timeout.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from rtunnel.relay.loop import Loop, Timer
from rtunnel.relay.transport import Scratch

if TYPE_CHECKING:
    from rtunnel.relay.socketpair import Pipes

#: Bytes that one direction moves per loop turn, so that one pair cannot starve the others.
QUANTUM: Final = 256 * 1024
#: Bytes of one read: of a frame's payload, and of the piece of a copying flow.
PIECE: Final = 128 * 1024


class Ending(StrEnum):
    """Why a pair ended; also the word in logs."""

    CLOSED = "closed"  # both directions ended by FIN
    CLIENT_RESET = "client_reset"  # the client's side was reset, or its socket failed
    TARGET_RESET = "target_reset"  # the same of the target's side
    # the same at a gateway, whose other side is a broker and not the target
    PATH_RESET = "path_reset"
    LINK_LOST = "link_lost"  # the link with the pair's stream ended
    IDLE = "idle"  # no byte moved for the idle timeout
    DRAINED = "drained"  # the process stops, or the drain's deadline has passed
    NOT_ALLOWED = "not_allowed"  # rules, users, exposed ports or addresses have changed
    REVOKED = "revoked"  # a certificate or key was revoked, or its CA is not in force any more
    OVERRUN = "overrun"  # the coding of a forwarded request's body is broken


@dataclass(slots=True)
class Account:
    """The bytes that a pair moved (`up`: from client to target), and its times in seconds."""

    started: float
    up: int = 0
    down: int = 0
    ended: float = 0.0
    ending: Ending = Ending.CLOSED
    #: When the first byte of the target was passed on to the client; 0: none was. Two sockets
    #: only: a broker and an agent have a stream on one side, and do not need it.
    first: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds from the join to the end."""
        return self.ended - self.started


class PairOwner(Protocol):
    """The role's side of a pair: what it is for, and what is counted. In the relay's thread."""

    def review(self) -> Ending | None:
        """Return the ending of a pair that may not go on, else None.

        Asked when rules, trust or exposed ports change.
        """

    def ended(self, account: Account) -> None:
        """Take the account of the pair, which is done. Called once, maybe from within the join."""


class _NoOwner:
    """Allows everything and counts nothing."""

    def review(self) -> Ending | None:
        return None

    def ended(self, account: Account) -> None:
        pass


NO_OWNER: Final[PairOwner] = _NoOwner()


@dataclass(slots=True)
class Shared:
    """The things that all pairs of one relay use."""

    loop: Loop
    live: set[Pair]
    scratch: Scratch
    pipes: Pipes


class Pair:
    """Two joined ends. In the relay's thread."""

    __slots__ = ("_idle", "_live", "_timer", "account", "done", "loop", "moved", "owner", "watched")

    def __init__(self, loop: Loop, live: set[Pair], idle: float, owner: PairOwner) -> None:
        self.loop = loop
        self.account = Account(loop.now)
        self.done = False
        self.moved = loop.now  # when a byte moved last
        self.watched = False  # its sockets have TCP keep-alive
        self._live = live
        self.owner = owner
        self._idle = idle
        live.add(self)
        self._timer: Timer | None = loop.after(idle, self._idle_check) if idle else None

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The pair's sockets; a stream has none of its own."""
        raise NotImplementedError

    def abort(self, ending: Ending) -> None:
        """Reset both sides, and call the owner's `ended`. No effect on a pair that is done."""
        raise NotImplementedError

    def _finish(self, ending: Ending) -> None:
        self.done = True
        self._live.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        account = self.account
        account.ended = self.loop.now
        account.ending = ending
        if account.up < 0:
            account.up = 0
        if account.down < 0:
            account.down = 0
        self.owner.ended(account)

    def _idle_check(self) -> None:
        left = self.moved + self._idle - self.loop.now
        if left <= 0:
            self.abort(Ending.IDLE)
        else:
            self._timer = self.loop.after(left, self._idle_check)
