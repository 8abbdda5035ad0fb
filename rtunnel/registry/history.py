"""Entries about agents that have left or were refused, and sentences made of them.

Brokers write these entries (`Registry.report`); a gateway and `rtunnel resolve` read them when an
address has no tuple. An entry explains an absence, and never says that an agent is there: a live
tuple always wins over it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from rtunnel.clock import DAY, lasting, utc

#: Seconds for which a departure, or the refusal of a proved agent, is remembered: the question
#: "since when?" is often asked after a holiday.
KEPT_SECONDS: Final = 30 * 86400
#: Seconds for which the refusal of an unproved agent is remembered: its words are a stranger's.
CLAIM_SECONDS: Final = 86400
#: Characters of an entry's sentence, and addresses of one entry: an entry stays below 2 KB or so.
MAX_SENTENCE: Final = 256
MAX_NOTED_ADDRESSES: Final = 16
#: Namespaces that one sentence names.
MAX_NAMESPACES: Final = 3


class Note(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One entry about one agent, told by a broker; the registry sets `at`, by its own clock."""

    namespace: str
    agent_id: str
    addresses: tuple[str, ...]
    node: str  # the broker that tells it
    peer: str  # source address of the agent's link; empty when it is not known
    cause: str  # one word
    text: str  # a sentence
    ago: float = 0.0  # seconds between the event and the call that writes the note; not stored
    at: float = 0.0


class Departure(Note, frozen=True, gc=False, kw_only=True):
    """A session that ended.

    `cause`: `left` (the agent said goodbye), `drained` (the broker was stopped), `replaced` (by a
    newer session on the same broker), else a `LostKind`.
    """

    epoch: int
    #: A node on which the agent had another session at that time: it has moved, and is not lost.
    #: The registry finds it when the note is written; empty when there was none.
    other_node: str = ""

    def sentence(self, now: float, living: Collection[str], *, for_operator: bool = False) -> str:
        """Return a sentence about this entry at the time `now` of the registry's clock.

        `living`: the nodes with a heartbeat. `for_operator`: with the address of the link, which a
        gateway's client is not told.
        """
        peer = f" (link from {self.peer})" if for_operator and self.peer else ""
        how = _DEPARTURES.get(self.cause, "left with: {text}").format(text=self.text)
        moved = f"; it had another session then, on {self.other_node}" if self.other_node else ""
        if moved and self.other_node not in living:
            moved += ", which has no heartbeat now"
        return f"{self.agent_id} was here until {_when(self.at, now)} on broker {self.node}{peer}, {how}{moved}"


class RefusedAgent(Note, frozen=True, gc=False, kw_only=True):
    """An agent that a broker refused; `cause` is the refusal code."""

    #: Whether the agent had proved its agent_id. If not, agent_id and addresses are only claimed.
    proved: bool

    def sentence(self, now: float, living: Collection[str], *, for_operator: bool = False) -> str:
        """Return a sentence about this entry; see `Departure.sentence`."""
        peer = f" (link from {self.peer})" if for_operator and self.peer else ""
        who = f"agent {self.agent_id}" if self.proved else f"an agent that calls itself {self.agent_id}"
        return f"{who}{peer} was refused at {_when(self.at, now)} by {self.node}: {self.cause}: {self.text}"


_DEPARTURES: Final = {
    "left": "left by itself: {text}",
    "drained": "which was stopped",
    "replaced": "replaced by a newer session of its own there",
}


class History(msgspec.Struct, frozen=True):
    """All entries about one address or one agent; `now` is the registry's time."""

    now: float
    departures: tuple[Departure, ...] = ()
    refusals: tuple[RefusedAgent, ...] = ()

    def sentences(self, living: Collection[str], *, for_operator: bool = False) -> list[str]:
        """Return one sentence for each entry, the newest first; see `Departure.sentence`."""
        entries: list[Departure | RefusedAgent] = [*self.departures, *self.refusals]
        entries.sort(key=lambda entry: -entry.at)
        return [entry.sentence(self.now, living, for_operator=for_operator) for entry in entries]


def unknown_target(
    ip: str, facts: Iterable[str], *, namespace: str = "", elsewhere: Sequence[str] = (), asker: str = ""
) -> str:
    """Return the text for an address without a tuple, with all that is known about it.

    `elsewhere`: other namespaces that have the address. `asker`: whose `namespace` counts, such as
    "this gateway serves".
    """
    known = [*facts]
    if elsewhere:
        known.insert(0, f"{ip} exists in namespace {_listed(elsewhere)} ({asker} {namespace})")
    return f"no agent answers for {ip}" + (f": {'; '.join(known)}" if known else "")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMESPACES])
    return shown if len(names) <= MAX_NAMESPACES else f"{shown} and {len(names) - MAX_NAMESPACES} more"


def _when(at: float, now: float) -> str:
    """Return a time for people: "20:09:59 UTC (2 min ago)", with the date unless it is today."""
    ago = max(0.0, now - at)
    whole = utc(at)
    return f"{whole if ago >= DAY or utc(now)[:10] != whole[:10] else whole[11:]} ({lasting(ago)} ago)"
