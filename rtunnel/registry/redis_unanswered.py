"""Records writes to Redis that had no answer, so that the next beat can undo them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import msgspec

from rtunnel.registry.base import PortLease, Registration, Tuple

# Sessions whose last write had no answer. When there are more, the oldest are dropped from this
# record, and their tuples expire in Redis.
MAX_UNANSWERED = 10_000

Place = tuple[str, str, int, int]


def place_of(entry: Tuple) -> Place:
    """Return what identifies a tuple among those of one node, whatever its other fields are."""
    return entry.namespace, entry.agent_ip, entry.agent_port, entry.epoch


class UnansweredWrite(msgspec.Struct, frozen=True):
    """The tuples and leases of a session whose last write had no answer, and may have been made.

    `over`: the call was to remove them. A beat that was prepared earlier may still contain them.
    """

    epoch: int
    tuples: dict[Place, Tuple]
    leases: frozenset[PortLease]
    over: bool

    def without(self, there: set[object]) -> Registration:
        """Return a registration of the tuples and leases that are not in `there`."""
        tuples = tuple(entry for place, entry in self.tuples.items() if place not in there)
        return Registration(self.epoch, tuples, tuple(lease for lease in self.leases if lease not in there))


class Unanswered:
    """The unanswered writes of one client, by node and epoch. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writes: dict[tuple[str, int], UnansweredWrite] = {}

    def add(self, node: str, registration: Registration, *, over: bool) -> None:
        """Record a write, together with earlier ones of the same session.

        May drop the oldest session.
        """
        epoch = registration.epoch
        with self._lock:
            known = self._writes.pop((node, epoch), None) or UnansweredWrite(epoch, {}, frozenset(), False)
            if len(self._writes) >= MAX_UNANSWERED:
                del self._writes[next(iter(self._writes))]
            tuples = known.tuples | {place_of(entry): entry for entry in registration.tuples}
            leases = known.leases | set(registration.leases)
            self._writes[node, epoch] = UnansweredWrite(epoch, tuples, leases, over or known.over)

    def of(self, node: str) -> list[UnansweredWrite]:
        """Return the unanswered writes of a node."""
        with self._lock:
            return [write for (name, _), write in self._writes.items() if name == node]

    def settle(self, node: str, writes: Iterable[UnansweredWrite], there: set[object]) -> None:
        """Drop these writes, which were undone.

        Keeps a write that was extended meanwhile, and a removal whose tuples are still in `there`.
        """
        with self._lock:
            for write in writes:
                key = (node, write.epoch)
                stays = write.over and not there.isdisjoint([*write.tuples, *write.leases])
                if self._writes.get(key) is write and not stays:
                    del self._writes[key]
