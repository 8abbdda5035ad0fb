"""Rows in a real Redis that nobody of ours has written: readers leave them out, say so, and keep all the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry.base import COUNTER_BITS, NodeRecord, PortLease, Registration, Tuple
from rtunnel.registry.redis import RedisRegistry
from rtunnel.registry.routes import Mirror, RouteTable
from support.redis_server import RedisServer

KEY = "rtunnel:target:default:10.1.0.7"


@pytest.fixture
def registry(redis_server: RedisServer) -> Iterator[RedisRegistry]:
    registry = RedisRegistry(redis_server.url)
    yield registry
    registry.close()


def two_tuples(registry: RedisRegistry) -> list[Tuple]:
    """The same target on two nodes."""
    found = []
    for node in ("b1", "b2"):
        record = NodeRecord(node=node, host="h", ip="10.0.0.1", incarnation=0)
        epoch = registry.start_node(record) << COUNTER_BITS | 1
        entry = Tuple("default", "10.1.0.7", 0, "10.0.0.1", 20001, node, epoch, "a1")
        registry.register(Registration(epoch, (entry,), ()))
        found.append(entry)
    return found


WRONG: dict[str, dict[str, Any]] = {
    "a port that there is not": {"ps_port": 70000},
    "no port": {"ps_port": None},
    "a name to be resolved": {"ps_ip": "broker.example"},
    "a newline for an address": {"ps_ip": "10.0.0.1\n"},
    "a list for a node": {"node": []},
    "a node without end": {"node": "x" * 1000},
    "a negative port of the agent": {"agent_port": -1},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_a_wrong_row_is_left_out_and_told(
    registry: RedisRegistry, redis_server: RedisServer, change: dict[str, Any]
) -> None:
    """By each way of reading. The other node's tuple is there as if nothing was wrong."""
    wrong, right = two_tuples(registry)
    with redis_server.client() as client:
        row = json.loads(client.hget(KEY, f"{wrong.node}/0"))
        text = json.dumps({"epoch": row.pop("epoch"), **row} | change, separators=(",", ":"))
        client.hset(KEY, f"{wrong.node}/0", text)
        feed = client.hgetall("rtunnel:feed")
    reads: list[Callable[[], list[Tuple]]] = [
        lambda: registry.lookup("default", "10.1.0.7"),
        lambda: registry.snapshot().tuples,
    ]
    for read in reads:
        with capture_logs() as lines:
            found = read()
        assert [entry.node for entry in found] == [right.node]
        assert [(line["event"], line["rows"]) for line in lines] == [("registry_rows_ignored", 1)]
    cursor = f"{feed['id']}/{feed['seq']}"
    with redis_server.client() as client:
        seq = client.hincrby("rtunnel:feed", "seq", 1)
        client.xadd("rtunnel:changes", {"put": text}, id=f"{seq}-0")
    registry.register(Registration(right.epoch, (right,), ()))
    after, changes = registry.changes(cursor, 0.0)
    assert after != cursor
    assert all(change.node == right.node for change in changes)


BROKEN = ('{"epoch":"EPOCH","namespace":1}', '{"epoch":"EPOCH",}', "", "null", "[]", '{"epoch": 1}', "\n", "\udc80")


@pytest.mark.parametrize("row", BROKEN)
def test_a_mirror_outlives_a_row(registry: RedisRegistry, redis_server: RedisServer, row: str) -> None:
    """What a gateway follows with: it raised what nothing there catches, and the process ended."""
    wrong, right = two_tuples(registry)
    with redis_server.client() as client:
        text = row.replace("EPOCH", str(wrong.epoch)).encode("utf-8", "surrogateescape")
        client.hset(KEY, f"{wrong.node}/0", text)
        client.hset(KEY, "odd", "odd")
        client.sadd(f"rtunnel:tuples:{right.node}", "odd")
    table = RouteTable()
    Mirror(registry, table).follow_once(0.0)
    assert [entry.node for entry in table.lookup("default", "10.1.0.7")] == [right.node]


def test_another_program_in_the_place_of_the_feed_is_an_outage(
    registry: RedisRegistry, redis_server: RedisServer
) -> None:
    """Values of other types under our keys: named as the registry's, and over when they are gone."""
    two_tuples(registry)
    cursor = registry.snapshot().cursor
    with redis_server.client() as client:
        seq = client.hget("rtunnel:feed", "seq")
        client.hset("rtunnel:feed", "seq", "seven")
        with pytest.raises(RegistryUnavailable, match="makes no sense"):
            registry.changes(cursor, 0.0)
        client.hset("rtunnel:feed", "seq", seq)
    assert registry.changes(cursor, 0.0)[1] == []


# ---------------------------------------------------------------------- keys of another type, and nonsense in them

RECORD = NodeRecord(node="b1", host="h", ip="10.0.0.1", incarnation=0)


@pytest.mark.parametrize("value", ["99999999999", "4294967295", "4294967296", "-1", "1.5", "seven", ""])
def test_start_refuses_what_is_no_incarnation(registry: RedisRegistry, redis_server: RedisServer, value: str) -> None:
    """An epoch of more than 64 bits ended the broker with a traceback. The sentence names the key and the fix."""
    key = "rtunnel:incarnation:b1"
    with redis_server.client() as client:
        client.set(key, value)
        with pytest.raises(RegistryUnavailable, match=f"the key {key} holds no incarnation.*redis-cli DEL"):
            registry.start_node(RECORD)
        client.delete(key)
        client.rpush(key, "1")
        with pytest.raises(RegistryUnavailable, match=f"the key {key} holds no incarnation.*redis-cli DEL"):
            registry.start_node(RECORD)
        client.delete(key)
    assert registry.start_node(RECORD) >> 32 == 0


@pytest.mark.parametrize("value", ["99999999999", "seven", None])
def test_a_node_at_work_writes_its_incarnation_over_nonsense(
    registry: RedisRegistry, redis_server: RedisServer, value: str | None
) -> None:
    """As after a wipe: it knows its own."""
    node, sessions = small_node(registry)
    with redis_server.client() as client:
        client.delete("rtunnel:incarnation:b1")
        if value is None:
            client.rpush("rtunnel:incarnation:b1", "1")
        else:
            client.set("rtunnel:incarnation:b1", value)
        registry.beat(node, sessions)
        assert client.get("rtunnel:incarnation:b1") == str(node.incarnation)


def small_node(registry: RedisRegistry, agents: int = 3) -> tuple[NodeRecord, list[Registration]]:
    """A node with a session of each agent, at 10.1.0.1 and on."""
    incarnation = registry.start_node(RECORD)
    sessions = []
    for n in range(1, agents + 1):
        epoch = incarnation << COUNTER_BITS | n
        lease = PortLease("10.0.0.1", 20000 + n, f"default/a{n}", "b1", epoch)
        entry = Tuple("default", f"10.1.0.{n}", 0, "10.0.0.1", 20000 + n, "b1", epoch, f"a{n}")
        assert registry.lease_port(lease)
        sessions.append(Registration(epoch, (entry,), (lease,), exposes="22"))
        registry.register(sessions[-1])
    return msgspec.structs.replace(RECORD, incarnation=incarnation), sessions


#: All that a node with one agent more than a0 has in Redis.
KEYS = (
    "changes", "feed", "incarnation:b1", "last:b1:default/a1", "node:b1", "nodes", "port:10.0.0.1:20001", "ports:b1",
    "target:default:10.1.0.1", "tuples:b1",
)  # fmt: skip


def test_every_key_is_tried(registry: RedisRegistry, redis_server: RedisServer) -> None:
    """The list below is whole."""
    small_node(registry, agents=1)
    with redis_server.client() as client:
        assert tuple(sorted(key.removeprefix("rtunnel:") for key in client.scan_iter())) == KEYS


@pytest.mark.parametrize("kind", ["string", "list", "hash", "hash of nonsense", "set", "zset", "stream"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_type_costs_its_own_row(
    registry: RedisRegistry, redis_server: RedisServer, key: str, kind: str
) -> None:
    """Whatever stands there: every write works, the other agents are found, and the log says which key it is."""
    node, [spoilt, *others] = small_node(registry)
    with redis_server.client() as client, capture_logs() as lines:
        right = client.type(f"rtunnel:{key}")
        replace(client, f"rtunnel:{key}", kind)
        for _ in range(2):
            assert registry.beat(node, [spoilt, *others]).lost == {}
        registry.register(others[0])
        registry.unregister(others[0])
        assert registry.lease_port(others[0].leases[0])
        registry.register(others[0])
        registry.last_port("b1", "default/a1")
        registry.nodes()
        for session in others:
            [entry] = session.tuples
            [found] = registry.lookup("default", entry.agent_ip)
            assert found.epoch == session.epoch
        unregistered = others.pop()
        registry.unregister(unregistered)
        registry.stop_node("b1", node.incarnation)
        healed = client.type(f"rtunnel:{key}") in (right, "none")
    told = {line["key"] for line in lines if line["event"] == "registry_key_ignored"}
    assert told <= {f"rtunnel:{key}"}
    assert told or healed


def replace(client: Any, key: str, kind: str) -> None:
    client.delete(key)
    match kind:
        case "string":
            client.set(key, "odd")
        case "list":
            client.rpush(key, "odd")
        case "hash":
            client.hset(key, "odd", "odd")
        case "hash of nonsense":
            client.hset(key, mapping={"id": "x", "seq": "y", "owner": "z", "odd@1": "1", "b1/0": "{", "b1/0@1": "9e99"})
        case "set":
            client.sadd(key, "odd")
        case "zset":
            client.zadd(key, {"odd": 1e300})
        case "stream":
            client.xadd(key, {"odd": "odd"})


def test_a_row_that_can_t_be_read_takes_no_address(registry: RedisRegistry, redis_server: RedisServer) -> None:
    """Its heartbeat is fine, and it says of no agent that it has the address."""
    node, [session] = small_node(registry, agents=1)
    for row in BROKEN:
        with redis_server.client() as client:
            text = row.replace("EPOCH", "5").encode("utf-8", "surrogateescape")
            client.hset("rtunnel:target:default:10.1.0.1", mapping={"b2/0": text, "b2/0@5": "9999999999", "odd@5": "1"})
            client.hset("rtunnel:target:default:10.1.0.1", "b2/0@5", client.time()[0])
        registry.register(session)
        assert registry.beat(node, [session]).lost == {}
        assert [entry.node for entry in registry.lookup("default", "10.1.0.1")] == ["b1"]
