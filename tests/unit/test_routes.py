"""The gateway's mirror: order of candidates, epochs, grace, forgetting; and following a registry."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from math import inf
from typing import TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import Change, CursorLost, NodeRecord, PortLease, Registration, Snapshot, Tuple
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from rtunnel.registry.routes import Mirror, RouteTable
from support.redis_server import RedisServer

GRACE = 15.0
T = TypeVar("T")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def entry(epoch: int = 1, node: str = "n1", ip: str = "10.1.0.7", state: str = "live", agent_port: int = 0) -> Tuple:
    return Tuple("default", ip, agent_port, "10.0.0.1", 20001, node, epoch, "a", state)


def put(at: Tuple) -> Change:
    return Change(at.namespace, at.agent_ip, at.agent_port, at.node, at.epoch, at)


def gone(at: Tuple) -> Change:
    return Change(at.namespace, at.agent_ip, at.agent_port, at.node, at.epoch, None)


BEATS = count(1)


def node(name: str, state: str = "live", incarnation: int = 0, beat: float | None = None) -> NodeRecord:
    """A node with a new heartbeat, unless it is given."""
    beat = float(next(BEATS)) if beat is None else beat
    return NodeRecord(node=name, host=name, ip="10.0.0.1", incarnation=incarnation, state=state, beat=beat)


def snapshot(*tuples: Tuple, nodes: tuple[str, ...] = ("n1", "n2")) -> Snapshot:
    return Snapshot("id/0", 0.0, [node(name) for name in nodes], list(tuples))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> RouteTable:
    routes = RouteTable(GRACE, clock)
    routes.set_nodes([node("n1"), node("n2"), node("n3")])
    return routes


def found(table: RouteTable) -> list[tuple[str, int]]:
    return [(have.node, have.epoch) for have in table.lookup("default", "10.1.0.7")]


# ---------------------------------------------------------------------- changes and epochs


def test_changes_come_and_go(table: RouteTable) -> None:
    one, two = entry(1, "n1"), entry(2, "n2")
    table.apply([put(one), put(two)])
    assert set(table.lookup("default", "10.1.0.7")) == {one, two}
    assert table.lookup("other", "10.1.0.7") == ()
    table.apply([gone(one)])
    assert table.lookup("default", "10.1.0.7") == (two,)
    table.apply([gone(two)])
    assert table.lookup("default", "10.1.0.7") == ()
    assert (table.counts().targets, table.counts().tuples) == (0, 0)


def test_namespaces_with_an_address_are_those_that_have_a_tuple_for_it(table: RouteTable) -> None:
    """By each way in which tuples come and go."""
    blue = msgspec.structs.replace(entry(1, "n1"), namespace="blue")
    red = msgspec.structs.replace(entry(1, "n2"), namespace="red")
    table.apply([put(entry(1)), put(entry(2, "n2")), put(blue), put(red)])
    assert table.namespaces_with("10.1.0.7") == ["blue", "default", "red"]
    assert table.namespaces_with("10.1.0.8") == []
    table.forget(red)
    assert table.namespaces_with("10.1.0.7") == ["blue", "default"]
    table.apply([gone(blue), gone(red), gone(entry(1)), put(entry(3))])
    assert table.namespaces_with("10.1.0.7") == ["default"]
    table.apply([gone(entry(3)), gone(entry(2, "n2"))])
    assert table.namespaces_with("10.1.0.7") == [] and table._namespaces == {}


def test_older_epochs_neither_overwrite_nor_remove(table: RouteTable) -> None:
    table.apply([put(entry(5)), put(entry(4)), gone(entry(4))])
    assert found(table) == [("n1", 5)]
    table.apply([put(entry(6))])
    assert found(table) == [("n1", 6)]
    table.apply([gone(entry(7))])
    assert found(table) == []


def test_same_epoch_may_change_its_state(table: RouteTable) -> None:
    table.apply([put(entry(5)), put(entry(5, state="draining"))])
    assert [have.state for have in table.lookup("default", "10.1.0.7")] == ["draining"]


def test_tuples_of_several_agent_ports_are_apart(table: RouteTable) -> None:
    table.apply([put(entry(5)), put(entry(5, agent_port=9100)), gone(entry(5))])
    assert [have.agent_port for have in table.lookup("default", "10.1.0.7")] == [9100]


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=12), st.data())
def test_replaying_the_feed_from_any_earlier_point_ends_in_the_same_place(
    feed: list[tuple[int, bool]], data: st.DataObject
) -> None:
    """A mirror that resumes from an older cursor sees changes twice; epochs only grow on a node, as in the registry."""
    ordered = sorted(feed, key=lambda item: item[0])
    changes = [put(entry(epoch)) if there else gone(entry(epoch)) for epoch, there in ordered]
    straight, replayed = RouteTable(GRACE), RouteTable(GRACE)
    straight.apply(changes)
    replayed.apply(changes)
    replayed.apply(changes[data.draw(st.integers(0, len(changes))) :])
    assert found(replayed) == found(straight)


# ---------------------------------------------------------------------- order


def test_live_before_draining_before_dead(table: RouteTable) -> None:
    table.apply([put(entry(9, "lost")), put(entry(8, "n1", state="draining")), put(entry(1, "n2"))])
    assert [name for name, _ in found(table)] == ["n2", "n1", "lost"]
    table.set_nodes([node("n1"), node("n2", "draining"), node("lost")])
    assert [name for name, _ in found(table)] == ["lost", "n1", "n2"]


def test_tuples_of_an_earlier_incarnation_come_last(table: RouteTable) -> None:
    table.set_nodes([node("n1", incarnation=8), node("n2", incarnation=2)])
    table.apply([put(entry(7 << 32 | 9, "n1")), put(entry(2 << 32 | 1, "n2"))])
    assert [name for name, _ in found(table)] == ["n2", "n1"]


# ---------------------------------------------------------------------- reconcile and grace


def test_reconcile_adds_at_once_and_drops_after_the_grace_period(table: RouteTable, clock: Clock) -> None:
    table.apply([put(entry(1, "n1"))])
    table.reconcile(snapshot(entry(2, "n2")))
    assert set(found(table)) == {("n1", 1), ("n2", 2)}
    assert table.counts().absent == 1
    clock.now += GRACE - 1
    table.set_nodes([node("n1"), node("n2")])
    assert table.expire() == 0
    clock.now += 1
    assert table.expire() == 1
    assert found(table) == [("n2", 2)]
    assert table.counts().absent == 0


def test_absent_tuple_that_is_announced_again_stays(table: RouteTable, clock: Clock) -> None:
    """The registry was wiped and the next beat put it back."""
    table.apply([put(entry(1))])
    table.reconcile(snapshot())
    table.apply([put(entry(1))])
    clock.now += 10 * GRACE
    table.expire()
    assert found(table) == [("n1", 1)]


def test_snapshot_with_an_older_epoch_confirms_the_newer_and_does_not_replace_it(table: RouteTable) -> None:
    table.apply([put(entry(5))])
    table.reconcile(snapshot(entry(4)))
    assert (found(table), table.counts().absent) == ([("n1", 5)], 0)


def test_lost_node_is_last_at_once_and_dropped_after_the_grace_period(table: RouteTable, clock: Clock) -> None:
    table.apply([put(entry(9, "n1")), put(entry(1, "n2")), put(entry(9, "n1", ip="10.1.0.8"))])
    table.set_nodes([node("n2")])
    assert [name for name, _ in found(table)] == ["n2", "n1"]
    clock.now += GRACE
    assert table.expire() == 0, "nobody's heartbeat has advanced since"
    table.set_nodes([node("n2")])
    assert table.expire() == 2
    assert found(table) == [("n2", 1)]
    assert table.set_nodes([node("n1"), node("n2")]), "it is back: a reconcile is needed"
    assert not table.set_nodes([node("n1"), node("n2")])


def test_node_that_is_back_within_the_grace_period_keeps_its_tuples(table: RouteTable, clock: Clock) -> None:
    table.apply([put(entry(1, "n1"))])
    table.set_nodes([])
    clock.now += GRACE - 1
    assert not table.set_nodes([node("n1")])
    clock.now += GRACE
    assert table.expire() == 0


def test_grace_starts_again_after_the_registry_was_away(table: RouteTable, clock: Clock) -> None:
    table.apply([put(entry(1, "n1")), put(entry(2, "n2"))])
    table.reconcile(snapshot(entry(2, "n2"), nodes=()))
    clock.now += 100 * GRACE
    table.restart_grace()
    assert table.expire() == 0
    clock.now += GRACE
    table.set_nodes([node("n3")])
    assert table.expire() == 0, "the first that is back says nothing about the others"
    clock.now += GRACE
    table.set_nodes([node("n3")])
    assert table.expire() == 2


# ---------------------------------------------------------------------- forget


def test_forgotten_tuple_is_not_brought_back_by_a_snapshot_for_a_while(table: RouteTable, clock: Clock) -> None:
    stale = entry(5)
    table.apply([put(stale)])
    table.forget(stale)
    assert found(table) == []
    table.reconcile(snapshot(stale))
    table.learn([stale, entry(4)])
    assert found(table) == []
    clock.now += GRACE
    table.expire()
    table.reconcile(snapshot(stale))
    assert found(table) == [("n1", 5)]


def test_newer_epoch_comes_at_once_after_a_forget(table: RouteTable) -> None:
    table.apply([put(entry(5))])
    table.forget(entry(5))
    table.learn([entry(6)])
    assert found(table) == [("n1", 6)]
    table.forget(entry(5))
    assert found(table) == [("n1", 6)]
    assert table.counts().forgotten == 2


def test_removal_is_not_undone_by_an_older_snapshot_but_by_a_new_announcement(table: RouteTable) -> None:
    table.apply([put(entry(5)), gone(entry(5))])
    table.learn([entry(5)])
    assert found(table) == []
    table.apply([put(entry(5))])
    assert found(table) == [("n1", 5)]


def test_forgetting_leaves_the_others_and_the_counts_right(table: RouteTable) -> None:
    table.apply([put(entry(1, "n1")), put(entry(2, "n2"))])
    table.forget(entry(1, "n1"))
    table.forget(entry(3, "n3", ip="10.9.9.9"))
    assert found(table) == [("n2", 2)]
    table.forget(entry(2, "n2"))
    table.reconcile(snapshot())
    assert (table.counts().targets, table.counts().tuples) == (0, 0)


def test_relay_may_look_up_and_forget_while_the_control_plane_works(table: RouteTable) -> None:
    tuples = [entry(n + 1, f"n{n % 3 + 1}", ip=f"10.1.0.{n % 50}") for n in range(600)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def relay() -> None:
        try:
            while not stop.is_set():
                for n in range(50):
                    for have in table.lookup("default", f"10.1.0.{n}"):
                        table.forget(have)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=relay)
    thread.start()
    for _ in range(20):
        table.apply([put(have) for have in tuples])
        table.reconcile(snapshot(*tuples))
        table.apply([gone(have) for have in tuples[::2]])
    stop.set()
    thread.join()
    table.reconcile(snapshot())
    assert not failures
    left = [have for n in range(50) for have in table.lookup("default", f"10.1.0.{n}")]
    assert table.counts().tuples == len(left)


# ---------------------------------------------------------------------- following a registry


class Source(MemoryRegistry):
    """A memory registry that can be out of reach."""

    away = False
    snapshots = 0
    waited = 0.0  # what the last call for changes was ready to wait

    def snapshot(self) -> Snapshot:
        self.snapshots += 1
        return self._reach(super().snapshot)

    def nodes(self) -> list[NodeRecord]:
        return self._reach(super().nodes)

    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        self.waited = wait
        return self._reach(lambda: super(Source, self).changes(cursor, 0.0))

    def _reach(self, call: Callable[[], T]) -> T:
        if self.away:
            raise RegistryUnavailable("away")
        return call()


class World:
    """A registry, a node with sessions, another that only beats, and a mirror, on one clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.registry = Source(GRACE, 60.0, self.clock)
        self.table = RouteTable(GRACE, self.clock)
        self.mirror = Mirror(self.registry, self.table, reconcile=60.0, clock=self.clock)
        self.record = NodeRecord(node="n1", host="h", ip="10.0.0.1", incarnation=0)
        incarnation = self.registry.start_node(self.record)
        self.record = msgspec.structs.replace(self.record, incarnation=incarnation)
        self.other = NodeRecord(node="n2", host="h", ip="10.0.0.2", incarnation=0)
        incarnation = self.registry.start_node(self.other)
        self.other = msgspec.structs.replace(self.other, incarnation=incarnation)
        self.sessions: list[Registration] = []

    def start(self, ip: str = "10.1.0.7") -> Registration:
        epoch = self.record.incarnation << 32 | len(self.sessions) + 1
        port = 20001 + len(self.sessions)
        lease = PortLease("10.0.0.1", port, f"default/{ip}", "n1", epoch)
        session = Registration(epoch, (Tuple("default", ip, 0, "10.0.0.1", port, "n1", epoch, ip),), (lease,))
        self.sessions.append(session)
        self.registry.register(session)
        return session

    def run(self, seconds: float, *, beat: bool = True, others: bool = True) -> None:
        for _ in range(int(seconds)):
            self.clock.now += 1
            if beat and not self.registry.away:
                self.registry.beat(self.record, self.sessions)
            if others and not self.registry.away:
                self.registry.beat(self.other, [])
            try:
                self.mirror.follow_once(0.0)
            except RegistryUnavailable:
                assert self.registry.away

    def known(self) -> int:
        return self.table.counts().tuples


@pytest.fixture
def world() -> World:
    return World()


def test_mirror_starts_with_a_snapshot_and_follows(world: World) -> None:
    world.start("10.1.0.7")
    assert not world.mirror.synced
    assert world.mirror.follow_once(0.0) == 0
    assert world.mirror.synced
    assert world.known() == 1
    world.start("10.1.0.8")
    assert world.mirror.follow_once(0.0) == 1
    assert world.known() == 2
    assert set(world.table.nodes) == {"n1", "n2"}
    world.run(30)
    assert world.registry.snapshots == 1
    world.run(60)
    assert world.registry.snapshots == 2


def test_wipe_is_not_seen_by_clients(world: World) -> None:
    """The cursor is lost, the snapshot is empty, and by the next beat everything is back; not one lookup fails."""
    for n in range(5):
        world.start(f"10.1.0.{n}")
    world.run(2)
    world.registry.wipe()
    for _ in range(4):
        world.run(1, beat=False)
        assert world.known() == 5
    world.run(60)
    assert world.known() == 5
    assert world.table.counts().absent == 0


def test_outage_leaves_the_table_and_its_end_gives_brokers_time(world: World) -> None:
    world.start()
    world.run(2)
    world.registry.wipe()
    world.run(3, beat=False)
    world.registry.away = True
    world.run(600)
    assert world.known() == 1
    world.registry.away = False
    world.registry.wipe()
    world.run(5, beat=False)
    assert world.known() == 1
    world.run(60)
    assert world.known() == 1


def test_silent_death_of_a_node_empties_the_table_without_a_snapshot(world: World) -> None:
    world.start()
    world.run(5)
    world.run(2 * GRACE + 7, beat=False)
    assert world.known() == 0
    assert world.registry.snapshots == 1


def test_waits_for_changes_end_when_a_dead_node_is_due(world: World) -> None:
    """The look at the nodes and the end of the grace period come on time, not one whole wait later."""
    world.start()
    world.run(5)
    world.mirror.follow_once(0.0)
    world.clock.now += 0.4
    world.mirror.follow_once(1.0)
    assert world.registry.waited == pytest.approx(0.6)  # then the nodes are looked at
    while not world.table._lost:
        world.run(1, beat=False)
    world.run(GRACE - 1, beat=False)
    world.clock.now += 0.7
    world.mirror.follow_once(1.0)
    assert world.registry.waited == pytest.approx(0.3)
    world.clock.now += 0.3
    world.mirror.follow_once(1.0)
    assert world.known() == 0


# ---------------------------------------------------------------------- a registry that refuses writes


@pytest.mark.parametrize("last_beat_of_the_other", range(4))
def test_all_nodes_that_vanish_together_keep_their_tuples(world: World, last_beat_of_the_other: int) -> None:
    """Redis answers reads and refuses writes: the nodes are gone, one after the other, and all of them are well."""
    world.start("10.1.0.7")
    world.start("10.1.0.8")
    world.run(5)
    world.run(last_beat_of_the_other, beat=False)
    world.run(1000, beat=False, others=False)
    assert (world.known(), world.table.nodes) == (2, {})
    assert "refuses writes" in world.table.silence()
    assert "2 last known tuples" in world.table.silence()
    assert world.table.expires_in() == inf, "or the mirror would not wait"
    for _ in range(4):  # the other is back first, and then a while nobody
        world.run(1, beat=False)
    assert (world.known(), world.table.silence()) == (2, "")
    world.run(100)
    assert world.known() == 2
    assert world.table.counts().absent == 0


def test_what_went_while_nobody_could_tell_goes_after_the_grace_period(world: World) -> None:
    world.start("10.1.0.7")
    world.run(5)
    world.run(100, beat=False, others=False)
    world.run(GRACE + 3, beat=False)
    assert world.known() == 0


def test_registry_without_nodes_from_the_start_is_not_silent(table: RouteTable, clock: Clock) -> None:
    """A new deployment has no broker yet; a restart of all of them is over within the grace period."""
    fresh = RouteTable(GRACE, clock)
    fresh.set_nodes([])
    clock.now += 100 * GRACE
    assert fresh.silence() == ""
    table.set_nodes([])
    clock.now += GRACE - 1
    assert table.silence() == ""
    clock.now += 1
    assert f"for {GRACE:.0f} s" in table.silence()
    table.set_nodes([node("n1")])
    assert table.silence() == ""


def test_node_that_was_only_paused_is_taken_back(world: World) -> None:
    world.start()
    world.run(5)
    world.run(2 * GRACE + 7, beat=False)
    assert world.known() == 0
    world.run(7)
    assert world.known() == 1


def test_removal_is_explicit_also_when_a_snapshot_came_between(world: World) -> None:
    session = world.start()
    world.run(1)
    world.registry.unregister(session)
    world.sessions.clear()
    world.clock.now += 100  # the reconcile is due and comes before the changes
    world.mirror.follow_once(0.0)
    assert world.registry.snapshots == 2
    assert world.known() == 0


def test_lost_cursor_costs_a_snapshot(world: World) -> None:
    world.start()
    world.run(1)
    world.registry._feed.clear()
    world.registry._seq += 5
    with pytest.raises(CursorLost):
        world.registry.changes(world.mirror._cursor or "", 0.0)
    world.run(2)
    assert world.registry.snapshots == 2
    assert world.known() == 1


def test_mirror_of_a_real_redis(redis_server: RedisServer) -> None:
    registry = RedisRegistry(redis_server.url)
    world = World()
    epoch = registry.start_node(world.record) << 32 | 1
    table = RouteTable(GRACE)
    mirror = Mirror(registry, table)
    one = Registration(epoch, (entry(epoch),), ())
    registry.register(one)
    mirror.follow_once(0.0)
    assert found(table) == [("n1", epoch)]
    registry.unregister(one)
    assert mirror.follow_once(1.0) == 1
    assert found(table) == []
    registry.register(one)
    mirror.follow_once(1.0)
    with redis_server.client() as client:
        client.flushall()
    mirror.follow_once(0.0)
    mirror.follow_once(0.0)
    assert found(table) == [("n1", epoch)]
    assert table.counts().absent == 1
    registry.close()
