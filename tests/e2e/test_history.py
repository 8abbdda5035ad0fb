"""A refusal of an unknown target says what is known of it: who left, who was refused, which namespace has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import Departure
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from support.cluster import Cluster, running_cluster
from support.redis_server import RedisServer

WHEN = r"\d\d:\d\d:\d\d UTC \(\d+ s ago\)"


async def answer(cluster: Cluster, ip: str) -> str:
    """Return the body of the gateway's refusal, without its code."""
    reply = await cluster.http(f"CONNECT {ip}:80 HTTP/1.1\r\nHost: {ip}:80\r\n\r\n".encode())
    head, _, body = reply.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 502 unknown_target: no agent answers for ") and len(head.splitlines()[0]) <= 220
    return body.strip().removeprefix("rtunnel: unknown_target: ")


async def departure_of(cluster: Cluster, ip: str, node: str = "") -> Departure:
    """Return what is remembered of the address, once this node has told it."""
    await cluster.until(
        lambda: any(node in ("", gone.node) for gone in cluster.registry.history("default", ip).departures)
    )
    return cluster.registry.history("default", ip).departures[0]


async def test_unknown_target_says_what_is_known(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2, agents=2)
        assert await answer(cluster, "127.1.0.9") == "no agent answers for 127.1.0.9"

        await cluster.start_agent("a8", "127.1.0.8", namespace="blue", redundancy=2)
        await cluster.whole()
        told = await answer(cluster, "127.1.0.8")
        assert told.endswith(": 127.1.0.8 exists in namespace blue (this gateway serves default)")

        await cluster.start_agent("a3", "127.1.0.2", "127.1.0.3", redundancy=1)
        await cluster.until(lambda: bool(cluster.registry.history("default", "127.1.0.3").refusals))
        told = await answer(cluster, "127.1.0.3")
        assert re.search(rf": agent a3 was refused at {WHEN} by b[12]: address_taken: 127\.1\.0\.2 is taken: ", told)
        assert cluster.registry.agent_history("default", "a3").refusals[0].proved

        cluster.agents.pop("a1").kill()
        gone = await departure_of(cluster, "127.1.0.1")
        assert gone.peer == "127.0.0.1" and gone.agent_id == "a1"
        told = await answer(cluster, "127.1.0.1")
        assert re.search(rf": a1 was here until {WHEN} on broker b[12], left with: ", told)
        assert "127.0.0.1" not in told


async def test_agent_that_only_moves_is_not_called_lost(tmp_path: Path, redis_server: RedisServer) -> None:
    """It leaves a broker that drains for another one; the tuple there wins, and the entry names it."""
    registry = RedisRegistry(redis_server.url, ttl=3.0, quarantine=5.0)
    async with running_cluster(tmp_path, registry) as cluster:
        await cluster.start(brokers=2)
        first = cluster.brokers.pop("b1")
        await first.shut()
        gone = await departure_of(cluster, "127.1.0.1", "b1")
        assert gone.other_node == "b2" and gone.cause in ("left", "drained")
        assert [entry.node for entry in registry.lookup("default", "127.1.0.1")] == ["b2"]

        await cluster.agents.pop("a1").shut()
        gone = await departure_of(cluster, "127.1.0.1", "b2")
        assert (gone.cause, gone.other_node) == ("left", "")
        told = await answer(cluster, "127.1.0.1")
        assert re.search(rf": a1 was here until {WHEN} on broker b2, left by itself: agent said goodbye", told)
    registry.close()


async def test_gateway_asks_the_history_once_for_many_clients(tmp_path: Path) -> None:
    """A miss costs one more question, and is remembered like the miss itself."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        asked = []
        history = cluster.registry.history
        cluster.registry.history = lambda *at: asked.append(at) or history(*at)  # type: ignore[method-assign,func-returns-value]
        told = {await answer(cluster, "127.1.0.9") for _ in range(5)}
        assert told == {"no agent answers for 127.1.0.9"} and asked == [("default", "127.1.0.9")]


class Forgetful(MemoryRegistry):
    """A registry that takes no reports while `away`."""

    away = False

    def report(self, *args: Any) -> float:
        if self.away:
            raise RegistryUnavailable("away")
        return super().report(*args)


async def test_report_that_fails_makes_no_beat_fail_and_its_notes_come_later(tmp_path: Path) -> None:
    registry = Forgetful(ttl=3.0, quarantine=5.0)
    async with running_cluster(tmp_path, registry) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        registry.away = True
        cluster.agents.pop("a1").kill()
        await cluster.until(lambda: len(node.notes) == 1)
        await node.presence.beat()
        assert (len(node.notes), node.notes.dropped, node.presence.down, node.reasons()) == (1, 0, "", [])
        registry.away = False
        assert (await departure_of(cluster, "127.1.0.1")).agent_id == "a1"
        assert len(node.notes) == 0
