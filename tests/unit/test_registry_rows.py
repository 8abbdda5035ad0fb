"""Rows in a real Redis that nobody of ours has written: readers leave them out, say so, and keep all the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from rtunnel.registry.base import COUNTER_BITS, NodeRecord, Registration, RegistryUnavailable, Tuple
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
