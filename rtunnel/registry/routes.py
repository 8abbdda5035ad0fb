"""A gateway's own copy of the registry: `RouteTable`, and `Mirror`, which keeps it up to date.

The relay thread reads the table with one dict access and no lock. Each value is an immutable tuple
of `Tuple`s, best first; the control plane replaces it as a whole. A table that is behind the
registry is safe: a broker refuses a tuple that is stale, and the relay then calls `forget`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from math import inf
from sys import intern

import msgspec

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry.base import Change, CursorLost, NodeRecord, Registry, Snapshot, Tuple, incarnation_of

_Key = tuple[str, str]  # (namespace, agent_ip)
_Id = tuple[str, str, str, int]  # and node, agent_port: one tuple at most

_LIVE, _DRAINING, _DEAD = range(3)  # the order of candidates


class RouteCounts(msgspec.Struct, frozen=True):
    """Figures for status and metrics."""

    targets: int
    tuples: int
    nodes: int
    draining: int  # nodes
    absent: int  # tuples that the last snapshot lacked, kept for the grace period
    forgotten: int  # since the start


class RouteTable:
    """Maps (namespace, agent_ip) to its candidate tuples. Any thread may call any method.

    The relay's thread calls `lookup` and `forget` only; the other methods may wait for a lock.
    `grace` is the number of seconds for which a tuple stays that the registry no longer shows,
    because the registry may have been wiped and its nodes are writing it again. An explicit removal
    takes effect at once. An older epoch never replaces or removes a newer one.

    An absence means nothing while no node's heartbeat advances: a registry that refuses writes and
    answers reads loses all nodes within its `ttl`, although the nodes are well. The last known
    tuples then stay without a time limit. There are no more of them than before, and a broker
    refuses each stale one, which is then forgotten.
    """

    def __init__(self, grace: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace = grace
        self._clock = clock
        # Only the control plane adds and deletes keys, so that it may iterate while `forget`
        # replaces values. One control-plane call runs at a time; the relay never takes this lock.
        self._control = threading.RLock()
        self._routes: dict[_Key, tuple[Tuple, ...]] = {}
        self._namespaces: dict[str, int] = {}  # the number of keys of each
        self._tuples = 0
        self._nodes: dict[str, NodeRecord] = {}
        self._written = -inf  # when a node's heartbeat was last seen to change
        self._silent: float | None = None  # since when no node has a heartbeat, after some had one
        self._lost: dict[str, float] = {}  # nodes that the registry no longer lists, and since when
        # Nodes lost for the grace period, whose tuples were dropped.
        self._given_up: set[str] = set()
        self._absent: dict[_Id, float] = {}  # tuples that the last snapshot lacked, and since when
        # Epochs that ended, and the time until which a snapshot that shows them is not believed.
        self._buried: dict[_Id, tuple[int, float]] = {}
        self._forgotten = 0
        # Held for the change of one key, never during a loop: the relay thread waits for it in
        # `forget`.
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ any thread

    def lookup(self, namespace: str, ip: str) -> tuple[Tuple, ...]:
        """Return the candidates: live ones, then draining ones, then those of dead nodes.

        O(1), without a lock; for any thread.
        """
        return self._routes.get((namespace, ip), ())

    def namespaces_with(self, ip: str) -> list[str]:
        """Return the namespaces in which the table has a tuple for this address; for any thread."""
        return sorted(name for name in list(self._namespaces) if self._routes.get((name, ip)))

    def forget(self, stale: Tuple) -> None:
        """Drop a tuple that a broker or agent called stale; for any thread.

        A newer epoch stays. This epoch can come back by a change, or by a snapshot after the grace
        period.
        """
        key = (stale.namespace, stale.agent_ip)
        with self._lock:
            self._bury(stale)
            self._forgotten += 1
            old = self._routes.get(key)
            if old is not None:
                self._replace(key, old, tuple(have for have in old if not _ends(stale, have)))

    def counts(self) -> RouteCounts:
        nodes = list(self._nodes.values())
        draining = sum(node.state != "live" for node in nodes)
        return RouteCounts(len(self._routes), self._tuples, len(nodes), draining, len(self._absent), self._forgotten)

    def silence(self) -> str:
        """Return a sentence that warns that no node has a heartbeat, or "" when that is not so.

        Waits for the grace period, and needs a node that had a heartbeat before.
        """
        silent = self._silent
        seconds = 0.0 if silent is None else self._clock() - silent
        if silent is None or seconds < self.grace:
            return ""
        return (
            f"no broker has had a heartbeat in the registry for {seconds:.0f} s: either the registry refuses writes "
            f"(each broker's /readyz says why) or no broker runs; the {self._tuples} last known tuples are in use"
        )

    @property
    def nodes(self) -> dict[str, NodeRecord]:
        """The nodes with a heartbeat, as last read.

        The dict is replaced as a whole, never changed.
        """
        return self._nodes

    # ------------------------------------------------------------------ the control plane

    def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes in the order of the feed."""
        with self._control:
            for change in changes:
                if change.tuple is None:
                    self._remove(change)
                else:
                    self._put(change.tuple, announced=True)

    def learn(self, tuples: Iterable[Tuple]) -> None:
        """Add the tuples that a lookup in the registry returned. Tuples that it lacks stay."""
        with self._control:
            for entry in tuples:
                self._put(entry, announced=False)

    def reconcile(self, snapshot: Snapshot) -> None:
        """Compare the table with a snapshot.

        New and changed tuples are stored at once. Tuples that the snapshot lacks are dropped by
        `expire`, after the grace period.
        """
        with self._control:
            self.set_nodes(snapshot.nodes)
            shown: dict[_Key, list[tuple[str, int]]] = {}
            for entry in snapshot.tuples:
                key = (entry.namespace, entry.agent_ip)
                shown.setdefault(key, []).append((entry.node, entry.agent_port))
                # A known tuple, the usual case, takes no lock.
                for have in self._routes.get(key, ()):
                    if _same(have, entry):
                        break
                else:
                    self._put(entry, announced=False)
            now = self._clock()
            empty: list[_Key] = []
            absent: dict[_Id, float] = {}
            for key, entries in self._routes.items():
                if not entries:
                    empty.append(key)
                fields = shown.get(key, ())
                for have in entries:
                    if (have.node, have.agent_port) not in fields:
                        at = _id(have)
                        absent[at] = self._absent.get(at, now)
            self._absent = absent
            for key in empty:
                self._filter(key, lambda _: True)

    def set_nodes(self, nodes: Iterable[NodeRecord]) -> bool:
        """Store the nodes with a heartbeat.

        Returns True when a node has come back whose tuples were dropped: they need a `reconcile`.
        """
        with self._control:
            old, self._nodes = self._nodes, {node.node: node for node in nodes}
            now = self._clock()
            if any(name not in old or old[name].beat != node.beat for name, node in self._nodes.items()):
                self._written = now
            if self._nodes and self._silent is not None:
                self._silent = None
                self.restart_grace()  # the return of one node says nothing about the others
            elif old and not self._nodes:
                self._silent = now
            for name in old.keys() - self._nodes.keys():
                self._lost[name] = now
            for name in self._lost.keys() & self._nodes.keys():
                del self._lost[name]
            back = self._given_up & self._nodes.keys()
            self._given_up -= back
            names = old.keys() | self._nodes.keys()
            self._reorder({name for name in names if _liveness(old.get(name)) != _liveness(self._nodes.get(name))})
            return bool(back)

    def expire(self) -> int:
        """Drop tuples that were absent, or whose node was lost, for the grace period.

        Drops nothing before a node's heartbeat has advanced since then. Returns the number dropped.
        """
        with self._control:
            now = self._clock()
            before = self._tuples
            for at in [at for at, since in self._absent.items() if self._has_expired(since, now)]:
                self._drop(at)
            gone = {name for name, since in self._lost.items() if self._has_expired(since, now)}
            if gone:
                for name in gone:
                    del self._lost[name]
                self._given_up |= gone
                for key in [key for key, entries in self._routes.items() if any(e.node in gone for e in entries)]:
                    self._filter(key, lambda have: have.node not in gone)
            with self._lock:
                for at in [at for at, (_, until) in self._buried.items() if until <= now]:
                    del self._buried[at]
            return before - self._tuples

    def _has_expired(self, since: float, now: float) -> bool:
        return since < self._written and now - since >= self.grace

    def expires_in(self) -> float:
        """Return the seconds until `expire` can drop something; at most 0 when it can now.

        Returns infinity while no heartbeat has advanced.
        """
        with self._control:
            times = [*self._absent.values(), *self._lost.values()]
            return min((since for since in times if since < self._written), default=inf) + self.grace - self._clock()

    def restart_grace(self) -> None:
        """Start all grace periods again, after the registry was out of reach."""
        with self._control:
            now = self._clock()
            self._absent = dict.fromkeys(self._absent, now)
            self._lost = dict.fromkeys(self._lost, now)

    # ------------------------------------------------------------------ inside

    def _put(self, entry: Tuple, *, announced: bool) -> None:
        """Store a tuple. `announced`: it comes from the feed, which is newer than any snapshot."""
        key, at = (entry.namespace, entry.agent_ip), _id(entry)
        with self._lock:
            if announced:
                self._buried.pop(at, None)
            elif self._is_buried(at, entry.epoch):
                return
            old = self._routes.get(key, ())
            for have in old:
                if _same(have, entry) or (_id(have) == at and have.epoch > entry.epoch):
                    break
            else:
                kept = [have for have in old if _id(have) != at]
                self._replace(key, old, (*kept, _interned(entry)))
        self._absent.pop(at, None)

    def _remove(self, change: Change) -> None:
        with self._lock:
            self._bury(change)
        self._filter((change.namespace, change.agent_ip), lambda have: not _ends(change, have))

    def _drop(self, at: _Id) -> None:
        self._absent.pop(at, None)
        self._filter(at[:2], lambda have: _id(have) != at)

    def _filter(self, key: _Key, keep: Callable[[Tuple], bool]) -> None:
        """Drop the tuples of a target that `keep` rejects, and the target when none is left."""
        with self._lock:
            old = self._routes.get(key)
            if old is not None:
                self._replace(key, old, tuple(have for have in old if keep(have)))
                if not self._routes[key]:
                    del self._routes[key]
                    self._count(key, -1)

    def _count(self, key: _Key, change: int) -> None:
        keys = self._namespaces.get(key[0], 0) + change
        if keys:
            self._namespaces[key[0]] = keys
        else:
            del self._namespaces[key[0]]

    def _replace(self, key: _Key, old: tuple[Tuple, ...], new: tuple[Tuple, ...]) -> None:
        if key not in self._routes:
            self._count(key, 1)
        self._routes[key] = tuple(sorted(new, key=self._rank)) if len(new) > 1 else new
        self._tuples += len(new) - len(old)

    def _rank(self, entry: Tuple) -> tuple[int, int]:
        """Return the sort key: live before draining before dead, then the newest epoch first."""
        node = self._nodes.get(entry.node)
        if node is None or incarnation_of(entry.epoch) < node.incarnation:
            return _DEAD, -entry.epoch
        live = node.state == "live" and entry.state == "live"
        return (_LIVE if live else _DRAINING), -entry.epoch

    def _reorder(self, names: set[str]) -> None:
        """Sort the candidates of these nodes again, after the nodes' state changed."""
        if names:
            for key, entries in self._routes.items():
                if len(entries) > 1 and any(entry.node in names for entry in entries):
                    with self._lock:
                        old = self._routes[key]
                        self._replace(key, old, old)

    def _bury(self, ended: Tuple | Change) -> None:
        at = (ended.namespace, ended.agent_ip, ended.node, ended.agent_port)
        epoch, _ = self._buried.get(at, (ended.epoch, 0.0))
        self._buried[at] = (max(epoch, ended.epoch), self._clock() + self.grace)

    def _is_buried(self, at: _Id, epoch: int) -> bool:
        ended, until = self._buried.get(at, (-1, 0.0))
        return epoch <= ended and self._clock() < until


#: Seconds between two reads of the nodes: there are few of them, and a dead one matters.
NODES_EVERY = 1.0


class Mirror:
    """Keeps a RouteTable up to date with a registry, one blocking step at a time.

    In one worker thread. `reconcile`: seconds between two full comparisons (jittered), which are
    needed because changes can be lost and expiry is not a change.
    """

    def __init__(
        self,
        registry: Registry,
        table: RouteTable,
        *,
        reconcile: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry
        self.table = table
        self.synced = False  # True after the first snapshot: from then on the table is complete
        self._reconcile = reconcile
        self._clock = clock
        self._cursor: str | None = None
        self._snapshot_due = 0.0
        self._nodes_due = 0.0
        self._was_out = False

    def follow_once(self, wait: float = 1.0) -> int:
        """Apply new changes, waiting up to `wait` seconds for the first, and return their number.

        Raises RegistryUnavailable and leaves the table as it is. The caller pauses and calls again;
        the next call continues from the same point.
        """
        try:
            return self._step(wait)
        except RegistryUnavailable:
            self._was_out = True
            raise

    def _step(self, wait: float) -> int:
        now = self._clock()
        if self._cursor is None or now >= self._snapshot_due:
            self._take_snapshot(now)
        elif now >= self._nodes_due:
            self._nodes_due = now + NODES_EVERY
            if self.table.set_nodes(self.registry.nodes()):
                self._take_snapshot(now)
        assert self._cursor is not None
        # Wait at most until the next read of the nodes or the end of a grace period: after the
        # death of a node these times add up.
        wait = max(0.0, min(wait, self._nodes_due - now, self.table.expires_in()))
        try:
            self._cursor, changes = self.registry.changes(self._cursor, wait)
        except CursorLost:
            self._cursor = None
            changes = []
        self.table.apply(changes)
        if any(change.tuple is not None and change.node not in self.table.nodes for change in changes):
            self._nodes_due = 0.0  # until this unknown node is read, its tuples come last
        if self._was_out:
            self._was_out = False
            self.table.restart_grace()
        self.table.expire()
        return len(changes)

    def _take_snapshot(self, now: float) -> None:
        snapshot = self.registry.snapshot()
        self.table.reconcile(snapshot)
        # The old cursor stays while it is valid: removals between it and the snapshot are explicit,
        # which an absence from the snapshot is not.
        self._cursor = self._cursor or snapshot.cursor
        self._nodes_due = now + NODES_EVERY
        self._snapshot_due = now + self._reconcile * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, no secret
        self.synced = True


def _id(entry: Tuple) -> _Id:
    return entry.namespace, entry.agent_ip, entry.node, entry.agent_port


def _ends(ended: Tuple | Change, have: Tuple) -> bool:
    """Return whether the end of `ended` also ends `have`, a tuple of the same target."""
    return (have.node, have.agent_port) == (ended.node, ended.agent_port) and have.epoch <= ended.epoch


def _same(one: Tuple, other: Tuple) -> bool:
    """Return whether two tuples of one target are equal, except for their heartbeats."""
    return (
        one.epoch == other.epoch
        and one.node == other.node
        and one.agent_port == other.agent_port
        and one.state == other.state
        and one.ps_port == other.ps_port
        and one.ps_ip == other.ps_ip
        and one.agent_id == other.agent_id
    )


def _interned(entry: Tuple) -> Tuple:
    """Return the tuple with repeated strings shared, and without `exposes`, which no dial needs.

    This saves a third of the memory of a million tuples.
    """
    return Tuple(
        namespace=intern(entry.namespace),
        agent_ip=entry.agent_ip,
        agent_port=entry.agent_port,
        ps_ip=intern(entry.ps_ip),
        ps_port=entry.ps_port,
        node=intern(entry.node),
        epoch=entry.epoch,
        agent_id=entry.agent_id,
        state=intern(entry.state),
        beat=entry.beat,
    )


def _liveness(node: NodeRecord | None) -> tuple[str, int] | None:
    return None if node is None else (node.state, node.incarnation)
