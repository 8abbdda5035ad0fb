"""The embedded registry: plain dicts behind one lock, shared by the roles of one process.

It behaves as the Redis registry does; one conformance suite checks both. In both, expiry is *not* a
change: a reader compares the heartbeat with the clock at the moment of the call.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import msgspec

from rtunnel.errors import AddressTaken, Superseded
from rtunnel.registry.base import (
    COUNTER_BITS,
    EVENTS_LENGTH,
    SHOWN_SECONDS,
    Beat,
    Change,
    CursorLost,
    DuplicateAgent,
    GatewayRecord,
    NodeFacts,
    NodeRecord,
    PortLease,
    Registration,
    Snapshot,
    Tuple,
    incarnation_of,
)
from rtunnel.registry.history import CLAIM_SECONDS, KEPT_SECONDS, Departure, History, RefusedAgent

FEED_LENGTH = 100_000  # changes kept, as in the Redis feed
LAST_PORTS = 200_000  # remembered (node, owner) pairs; the oldest is dropped first
CHANGES_AT_ONCE = 1000  # changes that one call of `changes` returns at most
# Departures and refusals remembered, and as many of agents by name; the oldest is dropped first.
MAX_NOTES = 20_000

_Target = tuple[str, str]  # (namespace, agent_ip)
_Field = tuple[str, int]  # (node, agent_port)


class _Live:
    """A stored tuple (whose own `beat` is 0), and its heartbeat time."""

    __slots__ = ("beat", "tuple")

    def __init__(self, entry: Tuple, beat: float) -> None:
        self.tuple = entry
        self.beat = beat


class _Port(msgspec.Struct, frozen=True):
    """A port that is leased, or released and in quarantine, until the time `until`."""

    lease: PortLease
    quarantined: bool
    until: float
    exposes: str = ""
    revision: int = -1  # of `exposes`; -1 when no registration has set it


class MemoryRegistry:
    """A `Registry` in memory. `clock` returns seconds since 1970."""

    url = "memory://"

    def __init__(
        self,
        ttl: float = 15.0,
        quarantine: float = 60.0,
        clock: Callable[[], float] = time.time,
        *,
        feed_length: int = FEED_LENGTH,
    ) -> None:
        self.ttl = ttl
        self.quarantine = quarantine
        self._clock = clock
        self._feed_length = feed_length
        self._changed = threading.Condition()
        self.wipe()

    def wipe(self) -> None:
        """Lose everything, as a Redis server that restarts empty does (for tests)."""
        with self._changed:
            self._id = uuid.uuid4().hex
            self._seq = 0
            self._feed: deque[Change] = deque(maxlen=self._feed_length)
            self._nodes: dict[str, NodeRecord] = {}
            self._incarnations: dict[str, int] = {}
            self._targets: dict[_Target, dict[_Field, _Live]] = {}
            self._ports: dict[tuple[str, int], _Port] = {}
            self._last: dict[tuple[str, str], int] = {}
            # The keys are kind, namespace and address (or agent_id).
            self._events: deque[tuple[str, bytes]] = deque(maxlen=EVENTS_LENGTH)
            self._notes: dict[tuple[str, str, str], Departure | RefusedAgent] = {}
            self._facts: dict[str, NodeFacts] = {}
            self._gateways: dict[str, GatewayRecord] = {}
            self._changed.notify_all()

    def ping(self) -> None:
        """Return at once: a registry in memory is always reachable."""

    def close(self) -> None:
        """Do nothing: there are no connections or threads to release."""

    # ------------------------------------------------------------------ nodes

    def start_node(self, record: NodeRecord) -> int:
        with self._changed:
            now = self._clock()
            incarnation = max(self._incarnations.get(record.node, 0) + 1, int(now))
            self._incarnations[record.node] = incarnation
            self._purge(record.node, incarnation << COUNTER_BITS, now)
            self._nodes[record.node] = msgspec.structs.replace(record, incarnation=incarnation, beat=now)
            return incarnation

    def stop_node(self, node: str, incarnation: int) -> None:
        with self._changed:
            if self._incarnations.get(node, 0) > incarnation:
                return
            self._purge(node, (incarnation + 1) << COUNTER_BITS, self._clock())
            self._nodes.pop(node, None)
            self._facts.pop(node, None)

    def nodes(self) -> list[NodeRecord]:
        with self._changed:
            now = self._clock()
            return [record for record in self._nodes.values() if self._alive(record.beat, now)]

    def _fence(self, node: str, incarnation: int) -> None:
        taken = self._incarnations.get(node, 0)
        if taken > incarnation:
            raise Superseded(f"node {node!r} was started again elsewhere (incarnation {taken}, ours {incarnation})")
        self._incarnations[node] = incarnation

    def _purge(self, node: str, floor: int, now: float) -> None:
        """Drop the node's tuples, and quarantine its leases, of epochs below `floor`."""
        for fields in list(self._targets.values()):
            for field, live in list(fields.items()):
                if field[0] == node and live.tuple.epoch < floor:
                    self._drop(live.tuple)
        for at, port in self._ports.items():
            held = port.until > now and not port.quarantined
            if held and port.lease.node == node and port.lease.epoch < floor:
                self._ports[at] = _Port(port.lease, True, now + self.quarantine)

    def _alive(self, beat: float, now: float) -> bool:
        # A heartbeat from the future is no sign of life: the clock has stepped back.
        return -self.ttl <= now - beat < self.ttl

    # ------------------------------------------------------------------ ports

    def last_port(self, node: str, owner: str) -> int | None:
        with self._changed:
            return self._last.get((node, owner))

    def lease_port(self, lease: PortLease) -> bool:
        with self._changed:
            self._fence(lease.node, incarnation_of(lease.epoch))
            now = self._clock()
            held = self._port(lease, now)
            if held is not None and held.lease.owner != lease.owner:
                return False
            self._hold(lease, now)
            return True

    def release_port(self, lease: PortLease) -> None:
        with self._changed:
            self._release(lease, self._clock())

    def _port(self, at: PortLease, now: float) -> _Port | None:
        port = self._ports.get((at.ip, at.port))
        return port if port is not None and port.until > now else None

    def _hold(self, lease: PortLease, now: float, exposes: str = "", revision: int = -1) -> None:
        until = now + self.ttl + self.quarantine
        self._ports[lease.ip, lease.port] = _Port(lease, False, until, exposes, revision)
        self._last.pop((lease.node, lease.owner), None)
        self._last[lease.node, lease.owner] = lease.port
        if len(self._last) > LAST_PORTS:
            del self._last[next(iter(self._last))]

    def _release(self, lease: PortLease, now: float) -> None:
        held = self._port(lease, now)
        same = held is None or held.lease == lease
        if same and not (held is not None and held.quarantined):
            self._ports[lease.ip, lease.port] = _Port(lease, True, now + self.quarantine)

    def _keep(self, of: Registration, now: float, *, back: bool) -> None:
        """Refresh the leases of a registration. `back`: for a beat, which may arrive late."""
        for lease in of.leases:
            first = lease is of.leases[0]
            self._keep_one(lease, now, back, of.exposes if first else "", of.revision if first else 0)

    def _keep_one(self, lease: PortLease, now: float, back: bool, exposes: str, revision: int) -> None:
        """Refresh or write one lease, unless another session has the better right to the port."""
        held = self._port(lease, now)
        if held is not None:
            mine = held.lease.owner == lease.owner and held.lease.epoch <= lease.epoch
            # An older lease of this same node is outdated: the registry was restored from an old
            # dump.
            history = held.lease.node == lease.node and held.lease.epoch < lease.epoch
            ended = back and held.quarantined and held.lease.epoch == lease.epoch
            if ended or not (mine or history):
                return
            if held.lease == lease and held.revision > revision:
                exposes, revision = held.exposes, held.revision
        self._hold(lease, now, exposes, revision)

    # ------------------------------------------------------------------ tuples

    def register(self, registration: Registration) -> None:
        with self._changed:
            now = self._clock()
            for node, epoch in {(part.node, part.epoch) for part in _parts(registration)}:
                self._fence(node, incarnation_of(epoch))
            for entry in registration.tuples:
                if taken := self._taken(entry, now):
                    raise taken
            self._keep(registration, now, back=False)
            for entry in registration.tuples:
                self._put(entry, now, back=False)

    def unregister(self, registration: Registration) -> None:
        with self._changed:
            now = self._clock()
            for entry in registration.tuples:
                live = self._live(entry)
                if live is None or live.tuple.epoch == entry.epoch:
                    self._drop(entry)
            for lease in registration.leases:
                self._release(lease, now)

    def beat(self, record: NodeRecord, registrations: list[Registration]) -> Beat:
        with self._changed:
            self._fence(record.node, record.incarnation)
            now = self._clock()
            self._nodes[record.node] = msgspec.structs.replace(record, beat=now)
            back = 0
            lost: dict[int, AddressTaken] = {}
            for registration in registrations:
                self._keep(registration, now, back=True)
                for entry in registration.tuples:
                    if taken := self._taken(entry, now):
                        lost[registration.epoch] = taken
                    else:
                        back += self._put(entry, now, back=True)
            return Beat(back, lost)

    def _live(self, entry: Tuple) -> _Live | None:
        fields = self._targets.get((entry.namespace, entry.agent_ip))
        return None if fields is None else fields.get((entry.node, entry.agent_port))

    def _put(self, entry: Tuple, now: float, *, back: bool) -> bool:
        """Write or refresh one tuple, and return whether it was written.

        `back`: for a beat, which may arrive after the session has ended.
        """
        if entry.beat or entry.exposes:
            entry = msgspec.structs.replace(entry, beat=0.0, exposes="")
        live = self._live(entry)
        if live is not None:
            if live.tuple.epoch > entry.epoch:
                return False
            if live.tuple == entry:
                live.beat = now
                return False
        elif back and not self._may_return(entry, now):
            return False
        self._targets.setdefault((entry.namespace, entry.agent_ip), {})[entry.node, entry.agent_port] = _Live(
            entry, now
        )
        self._emit(entry, msgspec.structs.replace(entry, beat=now))
        return True

    def _taken(self, entry: Tuple, now: float) -> AddressTaken | None:
        """Drop the dead tuples of this target.

        Return an error when another agent or host has it.
        """
        for live in list(self._targets.get((entry.namespace, entry.agent_ip), {}).values()):
            if not self._alive(live.beat, now):
                self._drop(live.tuple)
            elif live.tuple.agent_id != entry.agent_id:
                return AddressTaken(entry.namespace, entry.agent_ip, live.tuple.agent_id, live.tuple.node)
            elif live.tuple.node != entry.node and _are_two_hosts(live.tuple, entry):
                there = live.tuple
                return DuplicateAgent(there.namespace, there.agent_ip, there.agent_id, there.node, there.agent_host)
        return None

    def _may_return(self, entry: Tuple, now: float) -> bool:
        port = self._ports.get((entry.ps_ip, entry.ps_port))
        return port is None or port.until <= now or (port.lease.epoch == entry.epoch and not port.quarantined)

    def _drop(self, entry: Tuple) -> None:
        target = (entry.namespace, entry.agent_ip)
        fields = self._targets.get(target, {})
        fields.pop((entry.node, entry.agent_port), None)
        if not fields:
            self._targets.pop(target, None)
        self._emit(entry, None)

    # ------------------------------------------------------------------ reports

    def now(self) -> float:
        return self._clock()

    def report(self, facts: NodeFacts, notes: Sequence[Departure | RefusedAgent]) -> float:
        with self._changed:
            now = self._clock()
            self._facts[facts.node] = msgspec.structs.replace(facts, at=now)
            for note in notes:
                self._remember(facts.node, msgspec.structs.replace(note, at=now - note.ago, ago=0.0), now)
            return now

    def _remember(self, node: str, note: Departure | RefusedAgent, now: float) -> None:
        if isinstance(note, Departure):
            note = msgspec.structs.replace(note, other_node=self._session_beside(node, note, now))
        for key in _note_keys(note):
            stored = self._notes.get(key)
            # A time from the future (the clock has stepped back) must not keep newer notes away.
            if stored is None or stored.at <= note.at or stored.at > now + self.ttl:
                self._notes.pop(key, None)
                self._notes[key] = note
                if len(self._notes) > MAX_NOTES:
                    del self._notes[next(iter(self._notes))]

    def _session_beside(self, node: str, note: Departure, now: float) -> str:
        """Return a node on which the agent of a departure has another session, or ""."""
        for live in self._targets.get((note.namespace, note.addresses[0]), {}).values() if note.addresses else ():
            there = live.tuple
            same = (there.node, there.epoch) == (node, note.epoch)
            if not same and there.agent_id == note.agent_id and self._alive(live.beat, now):
                return there.node
        return ""

    def history(self, namespace: str, ip: str) -> History:
        return self._history(namespace, ip, "gone", "refused-at", "claimed-at")

    def agent_history(self, namespace: str, agent_id: str) -> History:
        return self._history(namespace, agent_id, "refused", "claimed")

    def _history(self, namespace: str, name: str, *kinds: str) -> History:
        with self._changed:
            now = self._clock()
            notes = [self._notes.get((kind, namespace, name)) for kind in kinds]
            kept = [note for note in notes if note is not None and now - note.at < _life(note)]
            departures = tuple(note for note in kept if isinstance(note, Departure))
            return History(now, departures, tuple(note for note in kept if isinstance(note, RefusedAgent)))

    def node_facts(self) -> list[NodeFacts]:
        with self._changed:
            oldest = self._clock() - SHOWN_SECONDS
            self._facts = {node: facts for node, facts in self._facts.items() if facts.at > oldest}
            return list(self._facts.values())

    def report_gateway(self, record: GatewayRecord) -> None:
        with self._changed:
            self._gateways[record.name] = msgspec.structs.replace(record, at=self._clock())

    def gateways(self) -> list[GatewayRecord]:
        with self._changed:
            now = self._clock()
            self._gateways = {name: record for name, record in self._gateways.items() if self._alive(record.at, now)}
            return list(self._gateways.values())

    # ------------------------------------------------------------------ readers

    def publish(self, events: Sequence[bytes]) -> None:
        with self._changed:
            now = int(self._clock() * 1000)
            last = _place(self._events[-1][0]) if self._events else (0, 0)
            for event in events:
                last = (now, 0) if now > last[0] else (last[0], last[1] + 1)
                self._events.append((f"{last[0]}-{last[1]}", event))

    def events(self, cursor: str, most: int) -> tuple[str, list[bytes]]:
        with self._changed:
            after = _place(cursor)
            found = [entry for entry in self._events if _place(entry[0]) > after][:most]
            return found[-1][0] if found else cursor, [event for _, event in found]

    def lookup(self, namespace: str, ip: str) -> list[Tuple]:
        with self._changed:
            return list(self._seen(self._targets.get((namespace, ip), {}).values(), self._clock()))

    def with_exposes(self, tuples: Sequence[Tuple]) -> list[Tuple]:
        with self._changed:
            now = self._clock()
            return [msgspec.structs.replace(entry, exposes=self._exposes(entry, now)) for entry in tuples]

    def _exposes(self, entry: Tuple, now: float) -> str:
        port = self._ports.get((entry.ps_ip, entry.ps_port))
        return port.exposes if port is not None and port.until > now and port.lease.epoch == entry.epoch else ""

    def snapshot(self) -> Snapshot:
        with self._changed:
            now = self._clock()
            found = [entry for fields in self._targets.values() for entry in self._seen(fields.values(), now)]
            return Snapshot(cursor=f"{self._id}/{self._seq}", now=now, nodes=self.nodes(), tuples=found)

    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        feed, _, position = cursor.partition("/")
        with self._changed:
            self._changed.wait_for(lambda: feed != self._id or int(position) != self._seq, min(wait, 1.0))
            missed = self._seq - int(position)
            if feed != self._id or not 0 <= missed <= len(self._feed):
                raise CursorLost(f"the feed no longer holds {cursor}")
            first = len(self._feed) - missed
            found = list(islice(self._feed, first, first + CHANGES_AT_ONCE))
            return f"{feed}/{int(position) + len(found)}", found

    def _seen(self, lives: Iterable[_Live], now: float) -> Iterator[Tuple]:
        for live in lives:
            if self._alive(live.beat, now):
                yield msgspec.structs.replace(live.tuple, beat=live.beat)

    def _emit(self, at: Tuple, entry: Tuple | None) -> None:
        self._seq += 1
        self._feed.append(Change(at.namespace, at.agent_ip, at.agent_port, at.node, at.epoch, entry))
        self._changed.notify_all()


def _are_two_hosts(one: Tuple, other: Tuple) -> bool:
    """Return whether both agents have sent a host id, and the ids differ."""
    return bool(one.host_id and other.host_id) and one.host_id != other.host_id


def _parts(registration: Registration) -> Iterator[Tuple | PortLease]:
    yield from registration.tuples
    yield from registration.leases


def _note_keys(note: Departure | RefusedAgent) -> Iterator[tuple[str, str, str]]:
    """Yield the keys of a note, as docs/registry.md names them."""
    kind = "refused" if isinstance(note, RefusedAgent) and note.proved else "claimed"
    if isinstance(note, RefusedAgent):
        yield kind, note.namespace, note.agent_id
    for ip in note.addresses:
        yield "gone" if isinstance(note, Departure) else f"{kind}-at", note.namespace, ip


def _life(note: Departure | RefusedAgent) -> float:
    return CLAIM_SECONDS if isinstance(note, RefusedAgent) and not note.proved else KEPT_SECONDS


def _place(cursor: str) -> tuple[int, int]:
    """Return a cursor of the events in a form that can be compared."""
    moment, _, number = cursor.partition("-")
    return int(moment), int(number or 0)
