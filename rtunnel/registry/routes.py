"""A gateway's own mirror of the registry: `RouteTable`, and `Mirror`, which keeps it true.

The relay thread reads with one dict access and no lock: what it finds is an immutable tuple of `Tuple`s, best first,
replaced whole by the control plane. A mirror may be behind, and that is safe (design, "stale-tuple defence"): a
broker refuses what is no longer so, and the relay then calls `forget`.
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
_Id = tuple[str, str, str, int]  # and node, agent_port: at most one tuple each

_LIVE, _DRAINING, _DEAD = range(3)  # the order of candidates


class RouteCounts(msgspec.Struct, frozen=True):
    """For status and metrics."""

    targets: int
    tuples: int
    nodes: int
    draining: int  # nodes
    absent: int  # tuples that the registry did not show, kept for the grace period
    forgotten: int  # since the start


class RouteTable:
    """(namespace, agent_ip) -> candidate tuples. Safe for any thread; only `lookup` and `forget` are for the relay's.

    `grace`: how long a tuple that the registry no longer shows is kept, because the registry may just have been wiped
    and is being rebuilt. An explicit removal goes at once. Epochs order everything: an older one never replaces or
    removes a newer one.

    Nothing is concluded from what is absent while nobody's heartbeat advances: a registry that refuses writes and
    answers reads loses all nodes within its `ttl`, though they are well. The last known tuples stay then, without a
    limit of time: they are no more than there were, and one that is not so is refused by its broker and forgotten.
    """

    def __init__(self, grace: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace = grace
        self._clock = clock
        # Only the control plane adds and deletes keys, so that it may iterate while `forget` replaces values.
        self._control = threading.RLock()  # one control-plane call at a time; the relay never takes it
        self._routes: dict[_Key, tuple[Tuple, ...]] = {}
        self._tuples = 0
        self._nodes: dict[str, NodeRecord] = {}
        self._written = -inf  # when a node's heartbeat was last seen to be another than before
        self._silent: float | None = None  # since when no node has a heartbeat, where some had one
        self._lost: dict[str, float] = {}  # nodes that the registry no longer lists, since when
        self._given_up: set[str] = set()  # lost for the grace period: their tuples are dropped
        self._absent: dict[_Id, float] = {}  # tuples that the last snapshot did not have, since when
        self._buried: dict[_Id, tuple[int, float]] = {}  # epoch that is over, until when a snapshot is not believed
        self._forgotten = 0
        # Held for one read-modify-write of one key, never over a loop: the relay thread waits for it in `forget`.
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ any thread

    def lookup(self, namespace: str, ip: str) -> tuple[Tuple, ...]:
        """The candidates, live ones before draining ones before those of nodes without a heartbeat. O(1), no lock."""
        return self._routes.get((namespace, ip), ())

    def forget(self, stale: Tuple) -> None:
        """Drop a tuple that a broker or agent called stale. A newer epoch stays or comes at once; this one comes back
        by a new announcement, or with a snapshot after the grace period."""
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
        """A sentence for people when no node has had a heartbeat for the grace period though some had one; else ""."""
        silent = self._silent
        seconds = 0.0 if silent is None else self._clock() - silent
        if silent is None or seconds < self.grace:
            return ""
        return (
            f"no broker has had a heartbeat in the registry for {seconds:.0f} s: either it refuses writes (then each "
            f"broker's /readyz says why) or no broker runs; the {self._tuples} last known tuples are in use"
        )

    @property
    def nodes(self) -> dict[str, NodeRecord]:
        """The nodes with a heartbeat, as last seen. Replaced whole, never changed."""
        return self._nodes

    # ------------------------------------------------------------------ the control plane

    def apply(self, changes: Iterable[Change]) -> None:
        """Changes in the order of the feed."""
        with self._control:
            for change in changes:
                if change.tuple is None:
                    self._remove(change)
                else:
                    self._put(change.tuple, announced=True)

    def learn(self, tuples: Iterable[Tuple]) -> None:
        """What a look into the registry found. Nothing is concluded from what it did not find."""
        with self._control:
            for entry in tuples:
                self._put(entry, announced=False)

    def reconcile(self, snapshot: Snapshot) -> None:
        """Compare everything. Adds and replaces at once; what the snapshot lacks goes after the grace period."""
        with self._control:
            self.set_nodes(snapshot.nodes)
            shown: dict[_Key, list[tuple[str, int]]] = {}
            for entry in snapshot.tuples:
                key = (entry.namespace, entry.agent_ip)
                shown.setdefault(key, []).append((entry.node, entry.agent_port))
                for have in self._routes.get(key, ()):  # nearly always it is known, and costs no lock
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
        """The nodes with a heartbeat. True when one is back that was given up: its tuples need a `reconcile`."""
        with self._control:
            old, self._nodes = self._nodes, {node.node: node for node in nodes}
            now = self._clock()
            if any(name not in old or old[name].beat != node.beat for name, node in self._nodes.items()):
                self._written = now
            if self._nodes and self._silent is not None:
                self._silent = None
                self.restart_grace()  # the first that is back says nothing about the others
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
        """Drop what was absent for the grace period, or belongs to a node lost for as long. Returns how many.

        Only if some node's heartbeat has advanced since then.
        """
        with self._control:
            now = self._clock()
            before = self._tuples
            for at in [at for at, since in self._absent.items() if self._is_over(since, now)]:
                self._drop(at)
            gone = {name for name, since in self._lost.items() if self._is_over(since, now)}
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

    def _is_over(self, since: float, now: float) -> bool:
        return since < self._written and now - since >= self.grace

    def expires_in(self) -> float:
        """Seconds until `expire` has something to drop, 0 or less when it has; infinity when it can't tell as yet."""
        with self._control:
            times = [*self._absent.values(), *self._lost.values()]
            return min((since for since in times if since < self._written), default=inf) + self.grace - self._clock()

    def restart_grace(self) -> None:
        """The registry was out of reach: what it did not show before says nothing about now."""
        with self._control:
            now = self._clock()
            self._absent = dict.fromkeys(self._absent, now)
            self._lost = dict.fromkeys(self._lost, now)

    # ------------------------------------------------------------------ inside

    def _put(self, entry: Tuple, *, announced: bool) -> None:
        """Take a tuple in. `announced`: by the feed, which knows better than a snapshot whether it is over."""
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
        """Drop tuples of a target, and the target with its last one."""
        with self._lock:
            old = self._routes.get(key)
            if old is not None:
                self._replace(key, old, tuple(have for have in old if keep(have)))
                if not self._routes[key]:
                    del self._routes[key]

    def _replace(self, key: _Key, old: tuple[Tuple, ...], new: tuple[Tuple, ...]) -> None:
        self._routes[key] = tuple(sorted(new, key=self._rank)) if len(new) > 1 else new
        self._tuples += len(new) - len(old)

    def _rank(self, entry: Tuple) -> tuple[int, int]:
        """Live before draining before dead; the newest first among equals."""
        node = self._nodes.get(entry.node)
        if node is None or incarnation_of(entry.epoch) < node.incarnation:
            return _DEAD, -entry.epoch
        live = node.state == "live" and entry.state == "live"
        return (_LIVE if live else _DRAINING), -entry.epoch

    def _reorder(self, names: set[str]) -> None:
        """The standing of these nodes changed: sort the targets with a choice again."""
        if names:
            for key, entries in self._routes.items():
                if len(entries) > 1 and any(entry.node in names for entry in entries):
                    with self._lock:
                        old = self._routes[key]
                        self._replace(key, old, old)

    def _bury(self, over: Tuple | Change) -> None:
        at = (over.namespace, over.agent_ip, over.node, over.agent_port)
        epoch, _ = self._buried.get(at, (over.epoch, 0.0))
        self._buried[at] = (max(epoch, over.epoch), self._clock() + self.grace)

    def _is_buried(self, at: _Id, epoch: int) -> bool:
        over, until = self._buried.get(at, (-1, 0.0))
        return epoch <= over and self._clock() < until


#: Nodes are few and their deaths matter: they are looked at this often (seconds).
NODES_EVERY = 1.0


class Mirror:
    """Keeps a RouteTable true to a registry, one blocking step at a time; for one worker thread.

    `reconcile`: everything is compared this often (jittered), because changes can be lost and expiry is not a change.
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
        self.synced = False  # a snapshot was taken: the table may be trusted to know what there is
        self._reconcile = reconcile
        self._clock = clock
        self._cursor: str | None = None
        self._snapshot_due = 0.0
        self._nodes_due = 0.0
        self._was_out = False

    def follow_once(self, wait: float = 1.0) -> int:
        """Take in what is new, waiting up to `wait` for it; returns the number of changes.

        Raises RegistryUnavailable and leaves the table as it is; call again, after a pause, and it goes on from there.
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
        # Not beyond the next look at the nodes nor the end of a grace period: these times add up after a node's death.
        wait = max(0.0, min(wait, self._nodes_due - now, self.table.expires_in()))
        try:
            self._cursor, changes = self.registry.changes(self._cursor, wait)
        except CursorLost:
            self._cursor = None
            changes = []
        self.table.apply(changes)
        if any(change.tuple is not None and change.node not in self.table.nodes for change in changes):
            self._nodes_due = 0.0  # a node that was not there at the last look: until then its tuples come last
        if self._was_out:
            self._was_out = False
            self.table.restart_grace()
        self.table.expire()
        return len(changes)

    def _take_snapshot(self, now: float) -> None:
        snapshot = self.registry.snapshot()
        self.table.reconcile(snapshot)
        # The old cursor goes on while it can: the removals between it and the snapshot are explicit, an absence is not.
        self._cursor = self._cursor or snapshot.cursor
        self._nodes_due = now + NODES_EVERY
        self._snapshot_due = now + self._reconcile * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, no secret
        self.synced = True


def _id(entry: Tuple) -> _Id:
    return entry.namespace, entry.agent_ip, entry.node, entry.agent_port


def _ends(over: Tuple | Change, have: Tuple) -> bool:
    """Whether the end of `over` is the end of `have`, a tuple of the same target."""
    return (have.node, have.agent_port) == (over.node, over.agent_port) and have.epoch <= over.epoch


def _same(one: Tuple, other: Tuple) -> bool:
    """Equal, whatever their heartbeats; for two tuples of one target."""
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
    """With the strings shared that repeat: a third of the memory of a million tuples. Dials need no `exposes`."""
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
