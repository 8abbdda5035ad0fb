"""Races of links, so that a silent broker address does not delay the agent. trio's side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio

from rtunnel.relay.lost import Lost, LostKind
from rtunnel.wire.messages import Enrolled, Refuse
from rtunnel.wire.refusal import Refusal

if TYPE_CHECKING:
    from rtunnel_agent.enrolment import AgentIdentity
    from rtunnel_agent.handshake import AgentSession, Enrolment

#: Seconds of silence of an address after which the next one is dialled beside it. A broker that
#: works takes a connection and does its part of TLS in some round trips.
SILENCE: Final = 1.0
#: Links of one race at a time. With more silent addresses the agent waits for their deadlines.
MAX_BESIDE: Final = 4

E = TypeVar("E", bound="Entrant")


@dataclass
class Outcome:
    """How one attempt to get a session ended."""

    session: AgentSession | None = None
    code: Refusal | None = None
    lost: Lost = Lost(LostKind.NO_ADDRESS, "")  # noqa: RUF009 - frozen


@dataclass(eq=False)
class Entrant:
    """One link of a race. In trio's thread."""

    race: Race[Any] | None = None
    # it has ended, or got what it was dialled for
    settled: trio.Event = field(default_factory=trio.Event)

    def tell(self) -> None:
        """Tell the race that the link is up, or that it has settled."""
        if self.race is not None:
            self.race.tell(self)

    def settle(self) -> None:
        """Set `settled`, and tell the race."""
        self.settled.set()
        self.tell()


@dataclass(eq=False)
class Watch(Entrant):
    """A link for a session; Welcome, a refusal or a failure settles it."""

    outcome: Outcome = field(default_factory=Outcome)
    session: AgentSession | None = None
    presented: AgentIdentity | None = None  # of the link's certificate
    retire: trio.Event = field(default_factory=trio.Event)  # down, or its node is draining
    down: trio.Event = field(default_factory=trio.Event)
    draining_since: float | None = None  # by trio's clock, when its node said so
    retired: bool = False  # the slot has left it while its node drains


@dataclass(eq=False)
class Asked(Entrant):
    """A link for one request to the authority; the answer or a failure settles it."""

    broker: str = ""
    enrolment: Enrolment | None = None
    answer: Enrolled | Refuse | Lost = Lost(LostKind.NO_ADDRESS, "")  # noqa: RUF009 - frozen


class Race(Generic[E]):
    """The links that are being dialled for one purpose."""

    def __init__(self) -> None:
        self._under_way: dict[E, Callable[[], None]] = {}
        self._told: list[E] = []
        self._news = trio.Event()

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        """Whether no other link may be dialled beside these."""
        return len(self) >= MAX_BESIDE

    def add(self, entrant: E, end: Callable[[], None]) -> None:
        """Add a link; `end()` is called when the race ends without it."""
        entrant.race = self
        self._under_way[entrant] = end

    def tell(self, entrant: E) -> None:
        """Hear that a link is up or has settled; `next` returns it."""
        if entrant in self._under_way and entrant not in self._told:
            self._told.append(entrant)
            self._news.set()

    async def next(self) -> E | None:
        """Wait for an entrant whose link is up, or that has settled; take it out and return it.

        Return None after SILENCE seconds: then another one may be added, unless the race is `full`.
        """
        with trio.move_on_after(SILENCE):
            await self._news.wait()
        if not self._told:
            return None
        entrant = self._told.pop(0)
        del self._under_way[entrant]
        if not self._told:
            self._news = trio.Event()
        return entrant

    def end(self) -> None:
        """End all links that are left in the race."""
        under_way, self._under_way = self._under_way, {}
        for end in under_way.values():
            end()
