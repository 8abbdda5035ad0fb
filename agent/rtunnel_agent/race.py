"""Links that are dialled beside each other: a silent address must not keep the agent from the next. trio's side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio

from rtunnel.relay.lost import Lost, LostKind
from rtunnel.wire.messages import Enrolled, Refuse
from rtunnel.wire.refusal import Refusal

if TYPE_CHECKING:
    from rtunnel_agent.handshake import AgentSession, Enrolment
    from rtunnel_agent.identity import AgentIdentity

#: A live broker takes a connection and does its part of TLS in some round trips. While an address is silent for so many
#: seconds the next one is dialled beside it.
SILENCE: Final = 1.0
#: Links under way at once for one slot: more silent addresses than that wait for their deadlines.
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
    """One link of a race, as trio sees it."""

    race: Race[Any] | None = None
    settled: trio.Event = field(default_factory=trio.Event)  # it is over, or has what it was dialled for

    def tell(self) -> None:
        """Its link is up, or it has settled."""
        if self.race is not None:
            self.race.tell(self)

    def settle(self) -> None:
        self.settled.set()
        self.tell()


@dataclass(eq=False)
class Watch(Entrant):
    """A link for a session: settled by Welcome, by a refusal, or by a failure."""

    outcome: Outcome = field(default_factory=Outcome)
    session: AgentSession | None = None
    presented: AgentIdentity | None = None  # of the link's certificate
    retire: trio.Event = field(default_factory=trio.Event)  # down, or its node is draining
    down: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False)
class Asked(Entrant):
    """A link for one request to the authority: settled by the answer, or by why there is none."""

    broker: str = ""
    enrolment: Enrolment | None = None
    answer: Enrolled | Refuse | Lost = Lost(LostKind.NO_ADDRESS, "")  # noqa: RUF009 - frozen


class Race(Generic[E]):
    """The links that are under way for one purpose."""

    def __init__(self) -> None:
        self._under_way: dict[E, Callable[[], None]] = {}
        self._told: list[E] = []
        self._news = trio.Event()

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        """Whether no other one may be dialled beside these."""
        return len(self) >= MAX_BESIDE

    def add(self, entrant: E, end: Callable[[], None]) -> None:
        """Let another one take part; `end` ends it when it is not needed."""
        entrant.race = self
        self._under_way[entrant] = end

    def tell(self, entrant: E) -> None:
        """There is news of this one."""
        if entrant in self._under_way and entrant not in self._told:
            self._told.append(entrant)
            self._news.set()

    async def next(self) -> E | None:
        """Wait for one whose link is up, or that has settled, and take it out of the race.

        Returns None after SILENCE seconds without any: then it is time for another one, unless the race is `full`.
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
        """End those that are left over."""
        under_way, self._under_way = self._under_way, {}
        for end in under_way.values():
            end()
