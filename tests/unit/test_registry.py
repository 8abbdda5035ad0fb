"""One conformance suite for both registries, then what only a Redis can do: be away, be slow, lose everything."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from redis import exceptions as errors

from rtunnel.config import RegistryConfig
from rtunnel.errors import AddressTaken, RegistryUnavailable, Superseded
from rtunnel.registry import (
    COUNTER_BITS,
    Change,
    CursorLost,
    DuplicateAgent,
    NodeRecord,
    PortLease,
    Registration,
    Registry,
    Tuple,
    connect,
    incarnation_of,
)
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from rtunnel.registry.redis_client import reason_of
from support.polling import until
from support.redis_server import RedisServer, redis_binary
from support.registries import Node, Store

MakeRedis = Callable[..., RedisServer]


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None
    opened = Store(server)
    yield opened
    opened.close()


def plain(tuples: list[Tuple]) -> list[Tuple]:
    """Without heartbeats, in a fixed order."""
    bare = [msgspec.structs.replace(entry, beat=0.0) for entry in tuples]
    return sorted(bare, key=lambda entry: (entry.namespace, entry.agent_ip, entry.node, entry.agent_port))


def everything(registry: Registry) -> list[Tuple]:
    return plain(registry.snapshot().tuples)


def drain(registry: Registry, cursor: str) -> tuple[str, list[Change]]:
    """All changes that are there already."""
    found: list[Change] = []
    while True:
        cursor, changes = registry.changes(cursor, 0.0)
        if not changes:
            return cursor, found
        found += changes


def outcome(changes: list[Change]) -> list[tuple[str, str, int, bool]]:
    return [(change.agent_ip, change.node, change.epoch, change.tuple is not None) for change in changes]


# ---------------------------------------------------------------------- nodes


def test_node_is_listed_with_its_incarnation_and_heartbeat(store: Store) -> None:
    registry = store.open()
    before = time.time()
    node = Node(registry)
    [record] = registry.nodes()
    assert (record.node, record.ip, record.incarnation) == ("broker-1", "10.0.0.1", node.record.incarnation)
    assert abs(record.beat - before) < 5
    node.record = msgspec.structs.replace(node.record, state="draining", sessions=3)
    node.beat()
    [record] = registry.nodes()
    assert (record.state, record.sessions) == ("draining", 3)


def test_incarnation_grows_with_every_start_and_over_a_wipe(store: Store) -> None:
    """Also when two starts fall into one second; the wiped registry goes on from its clock."""
    registry = store.open()
    before = [Node(registry).record.incarnation for _ in range(2)]
    assert before == sorted(set(before))
    assert before[-1] >> 32 == 0
    store.wipe()
    until(lambda: time.time() >= before[-1] + 1, what="the clock to pass the starts of one second")
    assert Node(registry).record.incarnation > before[-1]


def test_stopped_node_leaves_nothing_but_quarantine(store: Store) -> None:
    registry = store.open()
    node, other = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    session, stays = node.start(), other.start(port=21000)
    registry.stop_node(node.name, node.record.incarnation)
    assert [record.node for record in registry.nodes()] == ["broker-2"]
    assert plain(registry.lookup("default", "10.1.0.7")) == list(stays.tuples)
    thief = msgspec.structs.replace(session.leases[0], owner="default/thief", epoch=other.epoch(), node=other.name)
    assert not registry.lease_port(thief)


def test_stopping_an_older_incarnation_leaves_the_later_ones_things(store: Store) -> None:
    registry = store.open()
    old, new = Node(registry), Node(registry)
    session = new.start()
    registry.stop_node(old.name, old.record.incarnation)
    assert [record.incarnation for record in registry.nodes()] == [new.record.incarnation]
    assert everything(registry) == list(session.tuples)


def test_restarted_node_removes_what_its_earlier_incarnation_left(store: Store) -> None:
    """Tuples go at once, for watchers too; ports are quarantined for their owners."""
    registry = store.open()
    first, other = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    left = [first.start(f"10.1.0.{n}", 20000 + n, agent=f"a{n}") for n in range(30)]
    stays = other.start("10.1.0.1", 21000, agent="a1")
    cursor = registry.snapshot().cursor
    second = Node(registry)
    assert everything(registry) == list(stays.tuples)
    gone = drain(registry, cursor)[1]
    assert {change.epoch for change in gone if change.tuple is None} == {session.epoch for session in left}
    lease = left[3].leases[0]
    epoch = second.epoch()
    assert not registry.lease_port(msgspec.structs.replace(lease, owner="default/other", epoch=epoch))
    assert registry.lease_port(msgspec.structs.replace(lease, epoch=epoch))


def test_two_processes_with_one_node_id_the_later_one_wins(store: Store) -> None:
    registry = store.open()
    first = Node(registry)
    session = first.start()
    second = Node(registry)
    with pytest.raises(Superseded, match=str(second.record.incarnation)):
        first.beat(session)
    with pytest.raises(Superseded):
        registry.register(session)
    with pytest.raises(Superseded):
        registry.lease_port(session.leases[0])
    assert everything(registry) == []
    assert second.beat() == 0


def test_after_a_wipe_the_later_of_two_processes_still_wins(store: Store) -> None:
    """The registry forgot who was later; the incarnations know."""
    registry = store.open()
    first, second = Node(registry), Node(registry)
    store.wipe()
    first.beat()
    second.beat()
    with pytest.raises(Superseded):
        first.beat()


# ---------------------------------------------------------------------- tuples


def test_registered_session_is_found_with_a_heartbeat(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.start()
    [found] = store.open().lookup("default", "10.1.0.7")
    assert plain([found]) == list(session.tuples)
    assert found.epoch >> COUNTER_BITS == incarnation_of(session.epoch) == node.record.incarnation
    assert abs(found.beat - time.time()) < 5
    assert registry.lookup("default", "10.1.0.8") == registry.lookup("other", "10.1.0.7") == []


def test_epochs_keep_all_their_64_bits(store: Store) -> None:
    """Two epochs that a double can't tell apart are two epochs, compared as numbers and not as text."""
    registry = store.open()
    big = (1 << 63) - 2

    def registration(epoch: int) -> Registration:
        return Registration(epoch, (Tuple("default", "10.9.9.9", 0, "10.0.0.1", 1, "n", epoch, "a"),), ())

    registry.register(registration(big))
    registry.register(registration(big - 1))
    assert [entry.epoch for entry in registry.lookup("default", "10.9.9.9")] == [big]
    registry.unregister(registration(big - 1))
    assert [entry.epoch for entry in registry.lookup("default", "10.9.9.9")] == [big]
    registry.register(registration(big + 1))
    assert [entry.epoch for entry in registry.snapshot().tuples] == [big + 1]


def test_names_never_collide(store: Store) -> None:
    """Separators, spaces, control characters and wildcards in names are just names."""
    registry = store.open()
    names = ["a", "a:b", "a%3Ab", "a b", "a\nb", "a@1", "a/0", "*", "", "ü", "\x00", '"}', "a\\"]
    nodes = [Node(registry, name or "none", f"10.0.0.{n}") for n, name in enumerate(names)]
    sessions = [
        node.start("fd00::7" if n % 2 else "10.1.0.7", 20000 + n, agent=name, namespace=name)
        for n, (node, name) in enumerate(zip(nodes, names, strict=True))
    ]
    for n, (name, session) in enumerate(zip(names, sessions, strict=True)):
        assert plain(registry.lookup(name, "fd00::7" if n % 2 else "10.1.0.7")) == list(session.tuples)
    expected = plain([entry for session in sessions for entry in session.tuples])
    assert everything(registry) == expected
    assert sorted(record.node for record in registry.nodes()) == sorted(name or "none" for name in names)
    store.wipe()
    assert [node.beat(session) for node, session in zip(nodes, sessions, strict=True)] == [1] * len(names)
    assert everything(registry) == expected
    for node, session in zip(nodes, sessions, strict=True):
        assert registry.last_port(node.name, session.leases[0].owner) == session.leases[0].port
        registry.unregister(session)
    assert everything(registry) == []


def test_two_sessions_of_one_agent_are_two_tuples(store: Store) -> None:
    registry = store.open()
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    first, second = one.start(), two.start()
    assert plain(registry.lookup("default", "10.1.0.7")) == [*first.tuples, *second.tuples]
    registry.unregister(first)
    assert plain(registry.lookup("default", "10.1.0.7")) == list(second.tuples)


def test_newer_session_replaces_the_older_on_the_same_node_and_survives_its_end(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    old = node.start(port=20001)
    new = node.start(port=20002)
    assert plain(registry.lookup("default", "10.1.0.7")) == list(new.tuples)
    registry.unregister(old)
    registry.register(old)
    assert node.beat(old, new) == 0
    assert plain(registry.lookup("default", "10.1.0.7")) == list(new.tuples)
    registry.unregister(new)
    assert registry.lookup("default", "10.1.0.7") == []


def test_registering_again_changes_the_state(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.start()
    cursor = registry.snapshot().cursor
    draining = msgspec.structs.replace(session.tuples[0], state="draining")
    for _ in range(2):
        registry.register(msgspec.structs.replace(session, tuples=(draining,)))
    assert plain(registry.lookup("default", "10.1.0.7")) == [draining]
    [change] = drain(registry, cursor)[1]
    assert change.tuple is not None
    assert change.tuple.state == "draining"


def test_agent_with_several_addresses_and_open_ports_is_one_session(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.session()
    more = [
        msgspec.structs.replace(session.tuples[0], agent_ip="10.1.0.8"),
        msgspec.structs.replace(session.tuples[0], agent_port=9100, ps_port=30000),
    ]
    lease = msgspec.structs.replace(session.leases[0], port=30000)
    session = msgspec.structs.replace(session, tuples=(*session.tuples, *more), leases=(*session.leases, lease))
    registry.register(session)
    assert [entry.agent_port for entry in plain(registry.lookup("default", "10.1.0.7"))] == [0, 9100]
    store.wipe()
    assert node.beat(session) == 3
    registry.unregister(session)
    assert everything(registry) == []


# ---------------------------------------------------------------------- one address, one agent


def refused(node: Node, session: Registration) -> AddressTaken:
    """What stood in the way of this registration; nothing of it is left."""
    before, cursor = everything(node.registry), node.registry.snapshot().cursor
    last = [node.registry.last_port(node.name, lease.owner) for lease in session.leases]
    with pytest.raises(AddressTaken) as caught:
        node.registry.register(session)
    assert everything(node.registry) == before
    assert drain(node.registry, cursor)[1] == []
    assert [node.registry.last_port(node.name, lease.owner) for lease in session.leases] == last
    for lease in session.leases:
        assert node.registry.lease_port(msgspec.structs.replace(lease, owner="default/somebody"))
    return caught.value


@pytest.mark.parametrize("where", ["another node", "the same node"])
@pytest.mark.parametrize("state", ["live", "draining"])
def test_address_of_a_live_agent_is_refused_to_others(store: Store, where: str, state: str) -> None:
    """By name, and as a whole: also the address that nobody has."""
    registry = store.open()
    first, second = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    holder = first.start()
    entry = msgspec.structs.replace(holder.tuples[0], state=state)
    registry.register(msgspec.structs.replace(holder, tuples=(entry,)))
    node = second if where == "another node" else first
    late = node.session("10.1.0.8", 20002, agent="b")
    late = msgspec.structs.replace(
        late, tuples=(*late.tuples, msgspec.structs.replace(late.tuples[0], agent_ip="10.1.0.7"))
    )
    taken = refused(node, late)
    assert (taken.namespace, taken.ip, taken.agent_id, taken.node) == ("default", "10.1.0.7", "a", "broker-1")
    assert str(taken) == "10.1.0.7 is taken: the agent 'a' has it, with a session on the node 'broker-1'"
    again, elsewhere = second.start(agent="a"), node.start(port=20003, agent="b", namespace="other")
    assert plain(registry.lookup("default", "10.1.0.7")) == [entry, *again.tuples]
    assert plain(registry.lookup("other", "10.1.0.7")) == list(elsewhere.tuples)


def on_host(session: Registration, host_id: str) -> Registration:
    """The same session, from this host."""
    return msgspec.structs.replace(
        session,
        tuples=tuple(msgspec.structs.replace(t, host_id=host_id, agent_host=f"h {host_id}") for t in session.tuples),
    )


def test_one_agent_id_of_two_hosts_is_refused_on_another_node(store: Store) -> None:
    """The text names host and node. The same host, one that says nothing, and the same node are no second host."""
    registry = store.open()
    first, second = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    registry.register(on_host(first.session(), "aa11"))
    caught = refused(second, on_host(second.session(), "bb22"))
    assert isinstance(caught, DuplicateAgent)
    assert (caught.holder, caught.node) == ("h aa11, on the node 'broker-1'", "broker-1")
    assert str(caught) == "default/a has a session from h aa11, on the node 'broker-1'"
    for node, host in ((second, "aa11"), (second, ""), (first, "cc33")):
        registry.register(on_host(node.session(port=20002), host))


def test_after_a_wipe_the_first_host_that_comes_has_the_agent_id(store: Store) -> None:
    registry = store.open()
    first, second = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    loser, winner = on_host(first.session(), "aa11"), on_host(second.session(), "bb22")
    registry.register(loser)
    store.wipe()
    registry.register(winner)
    [lost] = first.lost(loser).values()
    assert isinstance(lost, DuplicateAgent) and lost.holder == "h bb22, on the node 'broker-2'"
    assert everything(registry) == list(winner.tuples)


def test_address_of_an_open_port_is_refused_to_others(store: Store) -> None:
    registry = store.open()
    first, second = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    holder = first.session()
    registry.register(
        msgspec.structs.replace(holder, tuples=(msgspec.structs.replace(holder.tuples[0], agent_port=9100),))
    )
    assert refused(second, second.session(agent="b")).agent_id == "a"


def test_address_is_free_when_its_agent_has_left_everywhere(store: Store) -> None:
    registry = store.open()
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    first, second = one.start(), two.start()
    registry.unregister(first)
    later = one.session(port=20002, agent="b")
    assert refused(one, later).node == "broker-2"
    registry.unregister(second)
    registry.register(later)
    assert everything(registry) == list(later.tuples)
    assert refused(two, two.session(port=20005)).agent_id == "b"


def test_address_is_free_when_its_nodes_were_silent_for_the_ttl(store: Store) -> None:
    """And the one that was silent can't take it back."""
    registry = store.open(ttl=0.4, quarantine=0.5)
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    silent, later = one.start(), two.session(agent="b")
    refused(two, later)

    def free() -> bool:
        try:
            registry.register(later)
        except AddressTaken:
            return False
        return True

    until(free, what="the silent node's tuple to expire")
    assert everything(registry) == list(later.tuples)
    [taken] = one.lost(silent).values()
    assert (taken.agent_id, taken.node) == ("b", "broker-2")
    assert everything(registry) == list(later.tuples)


@pytest.mark.parametrize("where", ["another node", "the same node"])
def test_after_a_wipe_the_first_that_comes_has_the_address_and_the_other_is_told(store: Store, where: str) -> None:
    registry = store.open()
    first, second = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    loser, bystander = first.start(), first.start("10.1.0.9", 20009, agent="c")
    store.wipe()
    winner = (second if where == "another node" else first).start(port=20002, agent="b")
    lost = first.lost(loser, bystander)
    assert {epoch: taken.agent_id for epoch, taken in lost.items()} == {loser.epoch: "b"}
    assert everything(registry) == [*winner.tuples, *bystander.tuples]
    with pytest.raises(AddressTaken):
        registry.register(loser)
    registry.unregister(loser)
    assert everything(registry) == [*winner.tuples, *bystander.tuples]
    assert first.lost(bystander) == {}
    registry.unregister(winner)
    assert first.start(port=20001).epoch > loser.epoch


def test_of_many_that_want_one_address_at_the_same_moment_one_gets_it(store: Store) -> None:
    """Each on a node of its own, with a client of its own; again and again."""
    nodes = [Node(store.open(), f"n{n}", f"10.0.0.{n}") for n in range(8)]
    for turn in range(20):
        sessions = [node.session(f"10.2.0.{turn}", agent=node.name) for node in nodes]
        ready = threading.Barrier(len(nodes))
        refusals: list[AddressTaken] = []

        def claim(node: Node, session: Registration) -> None:
            ready.wait()  # noqa: B023 - all threads of this turn end in it
            try:
                node.registry.register(session)
            except AddressTaken as error:
                refusals.append(error)  # noqa: B023

        threads = [threading.Thread(target=claim, args=pair) for pair in zip(nodes, sessions, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [winner] = nodes[0].registry.lookup("default", f"10.2.0.{turn}")
        assert {taken.agent_id for taken in refusals} == {winner.agent_id}
        assert len(refusals) == len(nodes) - 1


def test_ids_that_look_like_stored_ones_are_told_apart(store: Store) -> None:
    """An id may contain what surrounds an id in Redis."""
    registry = store.open()
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    ids = ["a", "a,", 'a"', 'a","agent_id":"b",', "b", "", "\\", '\\"', "ä", "\x7f"]
    for n, agent in enumerate(ids):
        ip = f"10.3.0.{n}"
        one.start(ip, 20000 + n, agent=agent)
        for m, other in enumerate(ids):
            session = two.session(ip, 20100 + m, agent=other)
            if other == agent:
                registry.register(session)
                registry.unregister(session)
            else:
                with pytest.raises(AddressTaken) as caught:
                    registry.register(session)
                assert caught.value.agent_id == agent


def test_exposed_ports_are_told_once_and_an_older_revision_changes_nothing(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.session()
    more = msgspec.structs.replace(session.tuples[0], agent_ip="10.1.0.8")
    session = msgspec.structs.replace(session, tuples=(*session.tuples, more))
    registry.register(session)
    cursor = registry.snapshot().cursor

    def said() -> set[str]:
        return {entry.exposes for entry in registry.with_exposes(registry.snapshot().tuples)}

    assert said() == {"22,9100"}
    newer = msgspec.structs.replace(session, exposes="80", revision=1)
    assert node.beat(newer) == 0
    assert said() == {"80"}
    registry.register(session)  # a call that comes late
    assert said() == {"80"}
    assert drain(registry, cursor)[1] == []
    store.wipe()
    assert node.beat(newer) == 2
    assert said() == {"80"}
    again = node.start()
    assert again.exposes == "22,9100"
    assert {entry.exposes for entry in registry.with_exposes(again.tuples)} == {"22,9100"}


# ---------------------------------------------------------------------- beats and silence


def test_heartbeat_from_the_future_is_no_sign_of_life(redis_server: RedisServer) -> None:
    """The clock of Redis stepped back; by less than the ttl nobody is silenced for it."""
    registry = RedisRegistry(redis_server.url, ttl=15)
    node = Node(registry)
    session = node.start()
    key, field = "rtunnel:target:default:10.1.0.7", f"broker-1/0@{session.epoch}"
    with redis_server.client() as client:
        record = client.get("rtunnel:node:broker-1")
        for ahead, alive in ((10, True), (20, False), (3600, False)):
            then = time.time() + ahead
            client.hset(key, field, f"{then:.3f}")
            beat = record.partition(",")[0]
            client.set("rtunnel:node:broker-1", record.replace(beat, f'{{"beat":{then:.3f}'))
            client.zadd("rtunnel:nodes", {"broker-1": then})
            assert bool(registry.lookup("default", "10.1.0.7")) == alive, ahead
            assert bool(everything(registry)) == alive, ahead
            assert bool(registry.nodes()) == alive, ahead
    other = Node(registry, "broker-2", "10.0.0.2")
    registry.register(other.session(agent="b"))
    with pytest.raises(AddressTaken):
        registry.register(session)
    registry.close()


def test_memory_registry_knows_heartbeats_from_the_future_too() -> None:
    now = [1000.0]
    registry = MemoryRegistry(15, 60, lambda: now[0])
    Node(registry).start()
    now[0] -= 10
    assert registry.nodes()
    assert everything(registry)
    now[0] -= 10
    assert not registry.nodes()
    assert not everything(registry)


def test_silent_node_disappears_and_the_other_stays(store: Store) -> None:
    """No cleaner: one node dies without a word, the other goes on beating."""
    registry = store.open(ttl=0.4, quarantine=0.5)
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    one.start()
    alive = two.start()

    def only_one() -> bool:
        two.beat(alive)
        return plain(registry.lookup("default", "10.1.0.7")) == list(alive.tuples)

    def alone() -> bool:
        two.beat(alive)
        return [record.node for record in registry.nodes()] == ["broker-2"]

    until(only_one, what="the silent node's tuple to expire")
    assert everything(registry) == list(alive.tuples)
    until(alone, what="the silent node's record to expire")


def test_when_all_nodes_die_silently_nothing_is_left(store: Store) -> None:
    registry = store.open(ttl=0.2, quarantine=0.2)
    Node(registry).start()
    Node(registry, "broker-2", "10.0.0.2").start()
    until(lambda: not registry.lookup("default", "10.1.0.7"), what="tuples to expire")
    assert everything(registry) == []
    until(lambda: not registry.nodes(), what="node records to expire")
    if store.server is not None:
        with store.server.client() as client:
            until(lambda: not client.keys("*:target:*") + client.keys("*:port:*"), what="keys to expire by themselves")


def test_fields_of_a_dead_node_are_pruned_by_the_living_and_announced(store: Store) -> None:
    """The agent's other session keeps the key alive, so that no expiry takes the dead one's field."""
    registry = store.open(ttl=0.3, quarantine=0.3)
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    dead, alive = one.start(), two.start()
    cursor = registry.snapshot().cursor

    def pruned() -> list[Change]:
        two.beat(alive)
        registry.register(alive)
        return drain(registry, cursor)[1]

    assert outcome(until(pruned, what="the dead field to go")) == [("10.1.0.7", "broker-1", dead.epoch, False)]
    if store.server is not None:
        with store.server.client() as client:
            assert len(client.hgetall("rtunnel:target:default:10.1.0.7")) == 2


def test_wiped_registry_is_whole_after_one_beat(store: Store) -> None:
    registry = store.open()
    node, other = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    sessions = [node.start(f"10.1.{n // 250}.{n % 250}", 20000 + n, agent=f"a{n}") for n in range(1500)]
    elsewhere = other.start("10.1.0.3", 21000, agent="a3")
    before = everything(registry)
    assert node.beat(*sessions) == 0
    store.wipe()
    assert node.beat(*sessions) == len(sessions)
    assert other.beat(elsewhere) == 1
    assert everything(registry) == before
    assert {record.node for record in registry.nodes()} == {"broker-1", "broker-2"}
    assert registry.last_port("broker-1", "default/a7") == 20007
    lease = msgspec.structs.replace(sessions[5].leases[0], owner="default/thief", epoch=node.epoch())
    assert not registry.lease_port(lease)
    assert node.beat(*sessions) == 0


def test_late_beat_does_not_bring_back_an_ended_session(store: Store) -> None:
    """A beat was put together, then the session ended, then the beat arrived."""
    registry = store.open()
    node = Node(registry)
    ended, lives = node.start(), node.start("10.1.0.8", 20002, agent="b")
    registry.unregister(ended)
    assert node.beat(ended, lives) == 0
    assert everything(registry) == list(lives.tuples)
    again = node.start(agent="a")  # the same agent has its port back
    assert node.beat(ended, lives) == 0
    assert everything(registry) == plain([*again.tuples, *lives.tuples])


def test_beats_keep_leases_and_tuples_alive(store: Store) -> None:
    registry = store.open(ttl=0.4, quarantine=0.4)
    node = Node(registry)
    session = node.start()
    thief = msgspec.structs.replace(session.leases[0], owner="default/thief")
    end = time.monotonic() + 1.2

    def kept() -> bool:
        assert node.beat(session) == 0
        assert not registry.lease_port(thief)
        assert plain(registry.lookup("default", "10.1.0.7")) == list(session.tuples)
        return time.monotonic() > end

    until(kept)


# ---------------------------------------------------------------------- ports


def test_leased_port_is_refused_to_others(store: Store) -> None:
    registry = store.open()
    one, two = Node(registry), Node(registry, "broker-2")
    lease = PortLease("10.0.0.1", 20001, "default/a", one.name, one.epoch())
    assert registry.last_port(one.name, "default/a") is None
    assert registry.lease_port(lease)
    assert not registry.lease_port(PortLease("10.0.0.1", 20001, "default/b", two.name, two.epoch()))
    assert registry.lease_port(PortLease("10.0.0.2", 20001, "default/b", two.name, two.epoch()))
    assert registry.lease_port(msgspec.structs.replace(lease, epoch=one.epoch()))
    assert registry.last_port(one.name, "default/a") == 20001


def test_released_port_rests_and_only_its_owner_may_have_it_back(store: Store) -> None:
    registry = store.open(ttl=0.3, quarantine=0.6)
    node = Node(registry)
    lease = PortLease("10.0.0.1", 20001, "default/a", node.name, node.epoch())
    other = PortLease("10.0.0.1", 20001, "default/b", node.name, node.epoch())
    assert registry.lease_port(lease)
    registry.release_port(lease)
    assert not registry.lease_port(other)
    again = msgspec.structs.replace(lease, epoch=node.epoch())
    assert registry.lease_port(again)
    registry.release_port(lease)  # an old epoch: the port is held anew
    assert not registry.lease_port(other)
    released = time.monotonic()
    registry.release_port(again)
    until(lambda: registry.lease_port(other), what="the quarantine to end")
    assert time.monotonic() - released > 0.55


def test_unregister_quarantines_the_leases(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.start()
    registry.unregister(session)
    other = msgspec.structs.replace(session.leases[0], owner="default/b", epoch=node.epoch())
    assert not registry.lease_port(other)
    assert registry.lease_port(msgspec.structs.replace(session.leases[0], epoch=node.epoch()))


def test_release_of_a_port_that_the_registry_forgot_quarantines_it(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.start()
    store.wipe()
    registry.release_port(session.leases[0])
    other = msgspec.structs.replace(session.leases[0], owner="default/b", epoch=node.epoch())
    assert not registry.lease_port(other)


# ---------------------------------------------------------------------- the change feed


def test_changes_follow_a_snapshot(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    snapshot = registry.snapshot()
    first = node.start()
    second = node.start("10.1.0.8", 20002, agent="b")
    registry.unregister(first)
    cursor, changes = drain(registry, snapshot.cursor)
    assert outcome(changes) == [
        ("10.1.0.7", "broker-1", first.epoch, True),
        ("10.1.0.8", "broker-1", second.epoch, True),
        ("10.1.0.7", "broker-1", first.epoch, False),
    ]
    assert changes[1].tuple is not None
    assert plain([changes[1].tuple]) == list(second.tuples)
    assert node.beat(second) == 0
    assert registry.changes(cursor, 0.0) == (cursor, [])


def test_waiting_for_changes_ends_with_the_first(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    cursor = registry.snapshot().cursor
    began = time.monotonic()
    assert registry.changes(cursor, 0.2)[1] == []
    assert 0.15 < time.monotonic() - began < 1.0
    found: list[Change] = []
    waiter = threading.Thread(target=lambda: found.extend(until(lambda: store.open().changes(cursor, 1.0)[1])))
    waiter.start()
    node.start()
    waiter.join(5)
    assert len(found) == 1


def test_concurrent_writers_leave_no_gap_for_a_resuming_reader(store: Store) -> None:
    """Four nodes come and go; a reader that reopens for every call sees every change, in order."""
    reader = store.open()
    cursor = reader.snapshot().cursor
    nodes = [Node(store.open(), f"n{n}", f"10.0.0.{n}") for n in range(4)]
    written: dict[str, list[tuple[int, bool]]] = {node.name: [] for node in nodes}

    def write(node: Node) -> None:
        for n in range(100):
            session = node.start(f"10.1.0.{n}", 20000 + n, agent=f"a{n}")
            written[node.name].append((session.epoch, True))
            if n % 2:
                node.registry.unregister(session)
                written[node.name].append((session.epoch, False))

    threads = [threading.Thread(target=write, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    seen: dict[str, list[tuple[int, bool]]] = {node.name: [] for node in nodes}
    deadline = time.monotonic() + 30
    while any(thread.is_alive() for thread in threads) or sum(map(len, seen.values())) < 600:
        assert time.monotonic() < deadline, "changes are missing"
        cursor, changes = store.open().changes(cursor, 0.5)
        for change in changes:
            seen[change.node].append((change.epoch, change.tuple is not None))
    assert seen == written
    assert len(everything(reader)) == 200


def test_trimmed_feed_loses_the_cursor(store: Store) -> None:
    registry = store.open(feed_length=10)
    node = Node(registry)
    cursor = registry.snapshot().cursor
    session = node.start()
    assert len(drain(registry, cursor)[1]) == 1
    for n in range(300):
        state = "live" if n % 2 else "draining"
        entry = msgspec.structs.replace(session.tuples[0], state=state)
        registry.register(msgspec.structs.replace(session, tuples=(entry,)))
    with pytest.raises(CursorLost):
        registry.changes(cursor, 0.0)
    fresh = registry.snapshot().cursor
    assert drain(registry, fresh) == (fresh, [])


def test_feed_is_bounded_by_bytes_too(redis_server: RedisServer) -> None:
    """Names of the longest kind make long changes. What is kept is read on without a gap."""
    limit = 400_000
    registry = RedisRegistry(redis_server.url, feed_bytes=limit)
    session = Node(registry).session(agent="a" * 128)
    [entry] = session.tuples
    entries = [msgspec.structs.replace(entry, agent_ip=f"10.1.0.{n}") for n in range(64)]
    with redis_server.client() as client:
        for n in range(96):
            state = "live" if n % 2 else "draining"
            tuples = tuple(msgspec.structs.replace(entry, state=state) for entry in entries)
            registry.register(msgspec.structs.replace(session, tuples=tuples))
            assert client.memory_usage("rtunnel:changes", samples=0) < 3 * limit
            if n == 90:
                cursor = registry.snapshot().cursor
        assert client.hget("rtunnel:feed", "seq") == str(96 * 64)
        assert client.xlen("rtunnel:changes") <= 2 * 1024
        assert len(client.hgetall("rtunnel:feed")) < 10
    assert len(drain(registry, cursor)[1]) == 5 * 64
    registry.close()


def test_wiped_registry_loses_the_cursor_also_once_it_has_as_many_changes(store: Store) -> None:
    registry = store.open()
    node = Node(registry)
    session = node.start()
    cursor = registry.snapshot().cursor
    store.wipe()
    with pytest.raises(CursorLost):
        registry.changes(cursor, 0.0)
    node.beat(session)
    node.start("10.1.0.8", 20002, agent="b")
    with pytest.raises(CursorLost):
        registry.changes(cursor, 0.0)


# ---------------------------------------------------------------------- Redis: cost


def sessions_of(node: Node, count: int) -> list[Registration]:
    return [node.session(f"10.{1 + n // 65536}.{n // 256 % 256}.{n % 256}", n + 1, agent=f"a{n}") for n in range(count)]


def test_beat_of_5000_sessions_costs_a_dozen_commands(redis_server: RedisServer) -> None:
    registry = RedisRegistry(redis_server.url, timeout=5.0)
    node = Node(registry)
    sessions = sessions_of(node, 5_000)
    assert node.beat(*sessions) == len(sessions)
    redis_server.reset_calls()
    assert node.beat(*sessions) == 0
    assert redis_server.calls("evalsha", "eval") <= 12
    assert len(registry.snapshot().tuples) == len(sessions)
    registry.close()


def test_lookup_with_the_documented_commands_only(redis_server: RedisServer) -> None:
    """What docs/registry.md tells a stranger with redis-cli: one HGETALL, and TIME to tell a dead field."""
    registry = RedisRegistry(redis_server.url, ttl=15)
    session = Node(registry).start()
    with redis_server.client() as client:
        fields = client.hgetall("rtunnel:target:default:10.1.0.7")
        stored = msgspec.json.decode(fields["broker-1/0"])
        assert (stored["ps_ip"], stored["ps_port"], stored["epoch"]) == ("10.0.0.1", 20001, str(session.epoch))
        beat = float(fields[f"broker-1/0@{stored['epoch']}"])
        seconds, _ = client.time()
        assert seconds - beat < 15
        assert client.hgetall("rtunnel:port:10.0.0.1:20001") == {
            "owner": "default/a",
            "node": "broker-1",
            "epoch": str(session.epoch),
            "state": "leased",
            "exposes": "22,9100",
            "revision": "0",
        }
        assert 0 < client.pttl("rtunnel:target:default:10.1.0.7") <= 15_000
        assert 60_000 < client.pttl("rtunnel:port:10.0.0.1:20001") <= 75_000
    registry.close()


def test_registry_from_an_old_dump_is_put_right_by_a_beat(redis_server: RedisServer) -> None:
    """A failover to a lagging replica brings back an older session's tuple; its heartbeat must not be refreshed."""
    registry = RedisRegistry(redis_server.url)
    node = Node(registry)
    node.start(port=20001)
    with redis_server.client() as client:
        dump = {key: client.hgetall(key) for key in client.keys("*:target:*")}
        new = node.start(port=20002)
        for key, fields in dump.items():
            client.delete(key)
            client.hset(key, mapping=fields)
    assert node.beat(new) == 1
    assert plain(registry.lookup("default", "10.1.0.7")) == list(new.tuples)
    registry.close()


# ---------------------------------------------------------------------- Redis: trouble


def every_call(registry: Registry) -> dict[str, Callable[[], object]]:
    record = NodeRecord(node="n", host="h", ip="10.0.0.1", incarnation=1)
    entry = Tuple("default", "10.1.0.7", 0, "10.0.0.1", 1, "n", 1 << 32, "a")
    lease = PortLease("10.0.0.1", 1, "default/a", "n", 1 << 32)
    registration = Registration(1 << 32, (entry,), (lease,))
    return {
        "ping": registry.ping,
        "start_node": lambda: registry.start_node(record),
        "stop_node": lambda: registry.stop_node("n", 1),
        "nodes": registry.nodes,
        "last_port": lambda: registry.last_port("n", "default/a"),
        "lease_port": lambda: registry.lease_port(lease),
        "release_port": lambda: registry.release_port(lease),
        "register": lambda: registry.register(registration),
        "unregister": lambda: registry.unregister(registration),
        "beat": lambda: registry.beat(record, [registration]),
        "lookup": lambda: registry.lookup("default", "10.1.0.7"),
        "snapshot": registry.snapshot,
        "changes": lambda: registry.changes("id/0", 1.0),
    }


def test_redis_down_at_start_is_told_soon_and_by_name(make_redis: MakeRedis) -> None:
    server = make_redis(tcp=True, password="s3cret-of-redis")
    registry = RedisRegistry(server.url, timeout=0.5)
    began = time.monotonic()
    for name, call in every_call(registry).items():
        with pytest.raises(RegistryUnavailable, match=f"127.0.0.1:{server.port}") as caught:
            call()
        assert "url is right" in str(caught.value), name
        assert "s3cret-of-redis" not in str(caught.value)
    assert time.monotonic() - began < 2
    server.start()
    registry.ping()
    registry.close()


def test_redis_dies_and_comes_back_empty(make_redis: MakeRedis) -> None:
    """The first call after the restart works: a connection that broke while idle is not the caller's trouble."""
    server = make_redis().start()
    registry = RedisRegistry(server.url, timeout=0.5)
    node = Node(registry)
    session = node.start()
    cursor = registry.snapshot().cursor
    server.kill()
    with pytest.raises(RegistryUnavailable):
        node.beat(session)
    server.start()
    assert node.beat(session) == 1
    assert everything(registry) == list(session.tuples)
    with pytest.raises(CursorLost):
        registry.changes(cursor, 0.0)
    server.restart_empty()
    assert registry.lookup("default", "10.1.0.7") == []
    registry.close()


def test_connection_that_breaks_under_a_command_is_tried_again(redis_server: RedisServer) -> None:
    """CLIENT KILL between the pool's check and the reply: here the reply of a blocked read never comes."""
    registry = RedisRegistry(redis_server.url)
    cursor = registry.snapshot().cursor
    results: list[object] = []
    waiter = threading.Thread(target=lambda: results.append(registry.changes(cursor, 1.0)))
    waiter.start()
    with redis_server.client() as client:
        until(lambda: client.info("clients")["blocked_clients"] == 1, what="the blocked read")
        client.client_kill_filter(_type="normal", skipme=True)
    waiter.join(5)
    assert results == [(cursor, [])]
    registry.close()


@pytest.mark.parametrize("connected", [True, False])
def test_frozen_redis_costs_one_timeout(make_redis: MakeRedis, connected: bool) -> None:
    server = make_redis().start()
    registry = RedisRegistry(server.url, timeout=0.3)
    if connected:
        registry.ping()
    calls = every_call(registry)
    server.freeze()
    try:

        def costs(call: Callable[[], object]) -> float:
            began = time.monotonic()
            with pytest.raises(RegistryUnavailable, match=r"no answer within 0\.3 s"):
                call()
            return time.monotonic() - began

        with ThreadPoolExecutor(len(calls)) as threads:
            seconds = dict(zip(calls, threads.map(costs, calls.values()), strict=True))
        assert max(seconds.values()) < 0.8, seconds
    finally:
        server.thaw()
    registry.ping()
    registry.close()


def test_blocked_read_of_a_redis_that_freezes_gives_up(make_redis: MakeRedis) -> None:
    server = make_redis().start()
    registry = RedisRegistry(server.url, timeout=0.3)
    cursor = registry.snapshot().cursor
    failures: list[float] = []

    def wait() -> None:
        began = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            registry.changes(cursor, 1.0)
        failures.append(time.monotonic() - began)

    waiter = threading.Thread(target=wait)
    waiter.start()
    with server.client() as client:
        until(lambda: client.info("clients")["blocked_clients"] == 1, what="the blocked read")
        server.freeze()
    waiter.join(5)
    server.thaw()
    assert failures
    assert failures[0] < 1.0 + 0.3 + 0.5
    registry.close()


def test_beat_that_waits_in_a_frozen_redis_hides_nobody(make_redis: MakeRedis) -> None:
    """The tuples expire before the thaw; the beat that its caller has given up must not look like life to the next."""
    server = make_redis().start()
    registry = RedisRegistry(server.url, ttl=0.3, quarantine=5.0, timeout=0.1)
    node = Node(registry)
    sessions = [node.start(f"10.1.0.{n}", 20000 + n, agent=f"a{n}") for n in range(5)]
    assert node.beat(*sessions) == 0
    server.freeze()
    with pytest.raises(RegistryUnavailable):
        node.beat(*sessions)
    expired = time.monotonic() + registry.ttl
    until(lambda: time.monotonic() > expired, what="the tuples to expire")
    server.thaw()
    until(lambda: _answers(registry), what="Redis to go on")
    node.beat(*sessions)
    assert everything(registry) == plain([entry for session in sessions for entry in session.tuples])
    registry.close()


def _answers(registry: Registry) -> bool:
    try:
        registry.ping()
    except RegistryUnavailable:
        return False
    return True


def test_call_that_comes_after_its_deadline_is_sent_anew_by_the_servers_clock(redis_server: RedisServer) -> None:
    """Here our clock stands still; there the server's stepped forward, or another server took over."""
    registry = RedisRegistry(redis_server.url, timeout=0.05, clock=lambda: 1000.0)
    node = Node(registry)
    redis_server.reset_calls()
    learnt = time.monotonic()
    until(lambda: time.monotonic() > learnt + 0.2, what="the deadline to pass")
    session = node.start()
    assert redis_server.calls("time") >= 1
    assert everything(registry) == list(session.tuples)
    registry.close()


def test_what_a_failed_call_may_have_left_goes_with_the_next_beat(make_redis: MakeRedis) -> None:
    """A session that its broker has refused, and one that it could not remove."""
    server = make_redis().start()
    registry = RedisRegistry(server.url, timeout=0.3)
    node = Node(registry)
    ended, lives = node.start(), node.start("10.1.0.8", 20002, agent="b")
    server.freeze()
    with pytest.raises(RegistryUnavailable):
        registry.unregister(ended)
    server.thaw()
    registry.register(ended)  # as if the removal had never arrived
    node.beat(lives)
    assert everything(registry) == list(lives.tuples)
    other = msgspec.structs.replace(ended.leases[0], owner="default/b", epoch=node.epoch())
    assert not registry.lease_port(other), "its port rests"
    registry.close()


def test_removal_of_one_address_does_not_end_the_session(make_redis: MakeRedis) -> None:
    """The agent has lost it, and takes it up again after the call that failed."""
    server = make_redis().start()
    registry = RedisRegistry(server.url, timeout=0.3)
    node = Node(registry)
    session = node.start()
    more = msgspec.structs.replace(session.tuples[0], agent_ip="10.1.0.8")
    both = msgspec.structs.replace(session, tuples=(*session.tuples, more))
    registry.register(both)
    server.freeze()
    with pytest.raises(RegistryUnavailable):
        registry.unregister(Registration(session.epoch, (more,), ()))
    server.thaw()
    node.beat(session)
    assert everything(registry) == list(session.tuples)
    registry.register(both)
    node.beat(both)
    assert everything(registry) == plain(list(both.tuples))
    registry.close()


def test_wrong_password_is_told_with_the_fix_and_without_the_password(make_redis: MakeRedis) -> None:
    server = make_redis(tcp=True, password="s3cret-of-redis").start()
    for login in (":wr0ng-password@", "", "user:wr0ng-password@"):
        registry = RedisRegistry(f"redis://{login}127.0.0.1:{server.port}")
        with pytest.raises(RegistryUnavailable, match="password in") as caught:
            registry.ping()
        assert "wr0ng-password" not in str(caught.value) + registry.url
        registry.close()
    right = RedisRegistry(server.url)
    right.ping()
    assert "s3cret-of-redis" not in right.url
    right.close()


def test_full_redis_and_replica_are_told_apart(make_redis: MakeRedis) -> None:
    server = make_redis().start()
    registry = RedisRegistry(server.url)
    node = Node(registry)
    with server.client() as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(RegistryUnavailable, match="maxmemory"):
            node.start()
        client.config_set("maxmemory", "0")
        client.replicaof("127.0.0.1", "1")
        with pytest.raises(RegistryUnavailable, match="must name the master"):
            node.start()
        client.replicaof("NO", "ONE")
    node.start()
    registry.close()


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("NOREPLICAS Not enough good replicas to write.", "min-replicas-to-write"),
        ("ERR Error running script: MISCONF Redis is configured to save RDB snapshots", "its disk"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "maxmemory"),
        ("READONLY You can't write against a read only replica.", "must name the master"),
    ],
)
def test_refused_write_is_told_with_the_words_of_redis_and_the_fix(words: str, fix: str) -> None:
    text = reason_of(errors.ResponseError(words), 1.0)
    assert words.partition(" ")[0] in text
    assert fix in text.partition("; ")[2]


def test_snapshot_of_a_redis_that_refuses_writes(make_redis: MakeRedis) -> None:
    """A gateway that starts meanwhile can still read."""
    server = make_redis().start()
    registry = RedisRegistry(server.url)
    session = Node(registry).start()
    with server.client() as client:
        client.config_set("maxmemory", "1")
        assert everything(registry) == list(session.tuples)
        assert plain(registry.lookup("default", "10.1.0.7")) == list(session.tuples)
        client.config_set("maxmemory", "0")
    registry.close()


def test_closed_registry_says_so(redis_server: RedisServer) -> None:
    registry = RedisRegistry(redis_server.url)
    registry.ping()
    registry.close()
    with pytest.raises(RegistryUnavailable, match="closed"):
        registry.ping()


def test_sentinel_finds_the_master(make_redis: MakeRedis, tmp_path: Path) -> None:
    server = make_redis(tcp=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor mymaster 127.0.0.1 {server.port} 1\n"
    )
    registry = RedisRegistry(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/mymaster/0", timeout=1.0)
    with pytest.raises(RegistryUnavailable, match="mymaster"):
        registry.ping()
    process = subprocess.Popen([redis_binary(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            try:
                registry.ping()
            except RegistryUnavailable:
                return False
            return True

        until(answers, what="the sentinel")
        session = Node(registry).start()
        assert everything(registry) == list(session.tuples)
    finally:
        process.kill()
        process.wait()
        registry.close()


# ---------------------------------------------------------------------- URLs


def test_connect_chooses_by_the_url(redis_server: RedisServer) -> None:
    memory = connect(RegistryConfig())
    assert isinstance(memory, MemoryRegistry)
    config = RegistryConfig(url=redis_server.url, prefix="other", ttl=5, quarantine=7, timeout=2)
    registry = connect(config)
    assert isinstance(registry, RedisRegistry)
    assert (registry.ttl, registry.quarantine, registry.url) == (5, 7, redis_server.url)
    registry.start_node(NodeRecord(node="n", host="h", ip="10.0.0.1", incarnation=0))
    with redis_server.client() as client:
        assert {key.partition(":")[0] for key in client.scan_iter()} == {"other"}
    registry.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host", "redis://host"),
        ("redis://user:p%40ss@host:1234/2", "redis://user@host:1234/2"),
        ("redis://:pass@[fd00::1]:1234", "redis://[fd00::1]:1234"),
        ("rediss://:pass@host?ssl_ca_certs=/ca.pem&ssl_check_hostname=false", "rediss://host"),
        ("unix:///run/redis.sock?db=3&password=pass", "unix:///run/redis.sock"),
        ("redis+sentinel://:pass@a:1,b/mymaster/1?sentinel_password=pass", "redis+sentinel://a:1,b/mymaster/1"),
    ],
)
def test_url_is_shown_without_its_password(url: str, shown: str) -> None:
    registry = RedisRegistry(url)
    assert registry.url == shown
    registry.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "scheme"),
        ("postgres://pass@host", "scheme 'postgres'"),
        ("localhost:6379", "scheme"),
        ("redis://", "host is missing"),
        ("redis://:pass@host:port", ":password@host"),
        ("redis://:pass@host:99999", ":password@host"),
        ("redis://host/name", "'name' is not a number"),
        ("redis://host?sokcet_timeout=1", "sokcet_timeout is not a known option"),
        ("unix://", "path of a socket"),
        ("redis+sentinel://host", "needs the service"),
        ("redis+sentinel:///mymaster", "host is missing"),
    ],
)
def test_bad_url_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        connect(RegistryConfig(url=url))
    assert "pass@" not in str(caught.value).replace(":password@", "")


def test_impossible_lifetimes_are_refused() -> None:
    with pytest.raises(ValueError, match="quarantine"):
        connect(RegistryConfig(ttl=15, quarantine=10))
