"""One address, one agent: of two that claim an IP the second waits until the first has gone, and says for whom."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from rtunnel.registry import Registry
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from support.cluster import Cluster, Part, Target, running_cluster
from support.logs import Events
from support.plumbing import free_range
from support.redis_server import RedisServer

IP = "127.1.0.1"


def told(events: Events, agent: str) -> list[str]:
    """The reasons why this agent has no session, as its log has them."""
    return [line["reason"] for line in events if line["event"] == "session_not_opened" and line["agent"] == agent]


def owners(cluster: Cluster) -> set[str]:
    """The agents that have tuples for the address."""
    return {entry.agent_id for entry in cluster.registry.lookup("default", IP)}


def reason(part: Part) -> str:
    """What `/statusz` says of its first session."""
    return str(part.agent.reasons()[0])


async def second_comes(cluster: Cluster) -> Part:
    """Another agent with the address that a1 has: refused, and it says by whom."""
    part = await cluster.start_agent("a2", IP)
    await cluster.until(lambda: "address_taken" in reason(part))
    [node] = {entry.node for entry in cluster.registry.lookup("default", IP)} & set(reason(part).split("'"))
    assert f"{IP} is taken: the agent 'a1' has it, with a session on the node '{node}'" in reason(part)
    assert owners(cluster) == {"a1"}
    return part


@pytest.mark.parametrize("end", ["SIGTERM", "kill -9"])
async def test_second_agent_of_an_address_comes_up_when_the_first_has_gone(
    tmp_path: Path, events: Events, end: str
) -> None:
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        target = Target(IP)
        first, second = cluster.agents.pop("a1"), await second_comes(cluster)
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"
        assert first.agent.state == "ready"
        assert "'a1' has it" in told(events, "a2")[0]
        if end == "SIGTERM":
            await first.shut()
        else:
            first.kill()
        await cluster.until(lambda: second.agent.state == "ready")
        await cluster.whole()
        assert owners(cluster) == {"a2"}
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"


async def test_address_of_an_agent_that_died_with_its_broker_is_free_after_the_ttl(tmp_path: Path) -> None:
    """Nobody is left to unregister it. The registry's clock is the test's."""
    ahead = [0.0]
    registry = MemoryRegistry(60.0, 60.0, clock=lambda: time.time() + ahead[0])
    async with running_cluster(tmp_path, registry) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        first = await cluster.start_agent("a1", IP, redundancy=1)
        await cluster.whole()
        broker = cluster.brokers.pop("b1")
        await cluster.start_broker("b2", port_range=free_range(50))
        broker.kill()
        first.kill()
        del cluster.agents["a1"]
        second = await second_comes(cluster)
        ahead[0] = 60.0
        await cluster.until(lambda: second.agent.redundancy == "1/2")
        await cluster.until(lambda: owners(cluster) == {"a2"})


async def test_draining_session_holds_its_address(tmp_path: Path) -> None:
    """Its streams still run: the address is free when the last of them has ended."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        target = Target(IP)
        stream = await cluster.socks(IP, target.port)
        first = cluster.agents.pop("a1")
        first.stop.set()
        second = await second_comes(cluster)
        stream.close()
        await cluster.until(lambda: second.agent.state == "ready")
        assert owners(cluster) == {"a2"}


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_of_many_agents_that_come_at_once_one_has_the_address(
    tmp_path: Path, redis_server: RedisServer, kind: str
) -> None:
    """On two nodes, each time: also when the one that had it is killed."""
    count = 8
    shared: Registry = MemoryRegistry(3.0, 5.0) if kind == "memory" else RedisRegistry(redis_server.url, ttl=3.0)
    async with running_cluster(tmp_path, shared) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_broker("b2")
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(cluster.start_agent, f"a{number}", IP)
        for left in range(count, count - 3, -1):

            def settled(left: int = left) -> bool:
                others = [reason(part) for part in cluster.agents.values() if part.agent.state != "ready"]
                return len(others) == left - 1 and all("address_taken" in why for why in others)

            await cluster.until(settled)
            [winner] = owners(cluster)
            cluster.agents.pop(winner).kill()
            await cluster.until(lambda winner=winner: winner not in owners(cluster))  # type: ignore[misc]
    shared.close()


async def test_after_a_wipe_the_agent_that_came_meanwhile_stays_and_the_other_waits(
    tmp_path: Path, events: Events
) -> None:
    """The heartbeats are the test's own: the second agent comes between the wipe and the first of them."""
    shared = MemoryRegistry(60.0, 60.0)
    slow = {"registry__heartbeat": 20.0, "registry__ttl": 60.0, "registry__quarantine": 60.0}
    async with running_cluster(tmp_path, shared, **slow) as cluster:
        await cluster.start(brokers=2)
        shared.wipe()
        second = await cluster.start_agent("a2", IP)
        await cluster.until(lambda: second.agent.state == "ready")
        first = cluster.agents["a1"]
        assert first.agent.state == "ready"
        for part in cluster.brokers.values():
            await part.node.presence.beat()
        await cluster.until(lambda: first.agent.state == "down" and "'a2' has it" in reason(first))
        await cluster.until(lambda: "'a2' has it" in "".join(told(events, "a1")))
        for part in cluster.brokers.values():
            await part.node.presence.beat()
        assert second.agent.state == "ready"
        assert owners(cluster) == {"a2"}
        assert not any(line["event"] == "session_ended" and line.get("agent") == "a2" for line in events)
