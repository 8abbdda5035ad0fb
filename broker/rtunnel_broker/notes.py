"""Departures and refusals of agents that the registry has not been told yet.

The relay's thread and trio's thread add notes; `Presence` writes them with the node's heartbeats. A
note never waits for Redis and never fails: while Redis is away, the newest MAX_PENDING are kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Final

import msgspec

from rtunnel.registry import Departure, RefusedAgent
from rtunnel.registry.history import MAX_NOTED_ADDRESSES, MAX_SENTENCE
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal

#: Seconds between two writes about one agent: an agent that comes and goes costs no more than that.
WRITE_EVERY: Final = 10.0
#: Notes that wait for the registry, about 1 KB each; the oldest is dropped first.
MAX_PENDING: Final = 10_000
#: Notes that one heartbeat writes, 20 to 40 ms of Redis in calls of 3 ms: a node of 50,000 agents
#: that all leave at once has told it after two minutes.
MAX_AT_ONCE: Final = 2000
#: Refusals of unproved agents that are noted in a minute: anybody can cause them, under new names
#: each time. At most 23,040 a day stand in the registry for each node, some 20 MB.
CLAIMS_PER_MINUTE: Final = 16
#: Refusals that say nothing about the agent: it tries another node, or the same one a little later.
_PASSING: Final = frozenset({
    Refusal.DRAINING,
    Refusal.DUPLICATE_NODE,
    Refusal.RATE_LIMITED,
    Refusal.REGISTRY_UNAVAILABLE,
})  # fmt: skip

_Owner = tuple[str, str]  # namespace and agent_id
_Kind = tuple[str, str, str]  # and "gone", "refused" or "claimed"


class Notes:
    """The notes of one node. Any thread may call any method; `clock` gives monotonic seconds."""

    def __init__(self, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.dropped = 0  # notes that were not written, because there were too many
        self._node = node
        self._clock = clock
        self._lock = threading.Lock()
        # With the time of the event; the oldest first.
        self._pending: dict[_Kind, tuple[float, Departure | RefusedAgent]] = {}
        self._written: dict[_Owner, float] = {}  # agents of the last WRITE_EVERY seconds
        self._taken_at = 0.0
        self._claims = float(CLAIMS_PER_MINUTE)  # that may still be noted, at `_claims_at`
        self._claims_at = clock()

    def __len__(self) -> int:
        return len(self._pending)

    def departed(
        self, hello: Hello, addresses: Collection[str], *, peer: str, epoch: int, cause: str, text: str
    ) -> None:
        """Note that a session has ended, or that its agent has given these addresses back."""
        note = Departure(
            namespace=hello.namespace, agent_id=hello.agent_id, addresses=_bounded(addresses), node=self._node,
            peer=peer, cause=cause, text=_sentence(text), epoch=epoch,
        )  # fmt: skip
        with self._lock:
            self._add("gone", note)

    def refused(
        self, code: Refusal, text: str, *, namespace: str, agent_id: str, addresses: Collection[str], peer: str,
        proved: bool,
    ) -> None:  # fmt: skip
        """Note that an agent was refused. `proved`: it has proved its agent_id."""
        if code in _PASSING or not agent_id:
            return
        note = RefusedAgent(
            namespace=namespace, agent_id=agent_id, addresses=_bounded(addresses), node=self._node, peer=peer,
            cause=code.value, text=_sentence(text), proved=proved,
        )  # fmt: skip
        with self._lock:
            if proved or ("claimed", namespace, agent_id) in self._pending or self._may_claim():
                self._add("refused" if proved else "claimed", note)
            else:
                self.dropped += 1

    def take(self) -> list[Departure | RefusedAgent]:
        """Remove and return the notes to write now, with their ages, the oldest first."""
        now = self._clock()
        with self._lock:
            self._taken_at = now
            self._written = {owner: at for owner, at in self._written.items() if now - at < WRITE_EVERY}
            due = [kind for kind in self._pending if kind[1:] not in self._written][:MAX_AT_ONCE]
            taken = [self._pending.pop(kind) for kind in due]
            self._written.update((kind[1:], now) for kind in due)
        return [msgspec.structs.replace(note, ago=now - at) for at, note in taken]

    def put_back(self, notes: Collection[Departure | RefusedAgent]) -> None:
        """Take notes of the last `take` back, which could not be written."""
        with self._lock:
            newer, self._pending = self._pending, {}
            for note in notes:
                owner = note.namespace, note.agent_id
                self._written.pop(owner, None)
                self._pending[_kind_of(note), *owner] = self._taken_at - note.ago, note
            for kind, entry in newer.items():
                self._pending.pop(kind, None)
                self._pending[kind] = entry
            while len(self._pending) > MAX_PENDING:
                self._drop_oldest()

    def _add(self, kind: str, note: Departure | RefusedAgent) -> None:
        at = kind, note.namespace, note.agent_id
        self._pending.pop(at, None)
        self._pending[at] = self._clock(), note
        if len(self._pending) > MAX_PENDING:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        del self._pending[next(iter(self._pending))]
        self.dropped += 1

    def _may_claim(self) -> bool:
        now = self._clock()
        grown = self._claims + (now - self._claims_at) * CLAIMS_PER_MINUTE / 60
        self._claims, self._claims_at = min(float(CLAIMS_PER_MINUTE), grown), now
        if self._claims < 1:
            return False
        self._claims -= 1
        return True


def _kind_of(note: Departure | RefusedAgent) -> str:
    if isinstance(note, Departure):
        return "gone"
    return "refused" if note.proved else "claimed"


def _bounded(addresses: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(addresses)[:MAX_NOTED_ADDRESSES])


def _sentence(text: str) -> str:
    """Return the text cut to MAX_SENTENCE, and without code points that JSON cannot hold."""
    return text[:MAX_SENTENCE].encode(errors="replace").decode()
