"""Two hosts with one identity: the living one stays, on every node, and a restart of it comes back at once."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rtunnel import cli, metrics
from rtunnel_broker.serve import status
from support.authority import address, authority, token
from support.cluster import Cluster, Target, running_cluster
from support.logs import Events, named

IP = "127.1.0.1"


@asynccontextmanager
async def cloned(tmp_path: Path, brokers: int) -> AsyncIterator[tuple[Cluster, dict[str, Any]]]:
    """An agent that has enrolled and holds two sessions, and the keys of a clone: its identity directory was copied."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as ca:
        for number in range(1, brokers + 1):
            await cluster.start_broker(f"b{number}", authority=address(ca))
        await cluster.start_gateway()
        given = token(cluster.secrets, networks=("127.1.0.0/24",))
        file = tmp_path / "token"
        file.write_text(given.line())
        keys: dict[str, Any] = {"certificate": "", "key": "", "join_token": str(file), "redundancy": 2}
        await cluster.start_agent(**keys, identity=str(tmp_path / "identity"))
        await cluster.whole()
        shutil.copytree(tmp_path / "identity", tmp_path / "copy")
        yield cluster, keys | {"identity": str(tmp_path / "copy")}


def held(cluster: Cluster) -> set[tuple[str, int]]:
    """The sessions in the registry."""
    return {(entry.node, entry.epoch) for entry in cluster.registry.lookup("default", IP)}


async def test_of_two_clones_the_living_one_stays(tmp_path: Path, events: Events) -> None:
    """The other waits; both logs, the metric and `rtunnel status` name the two. Later it comes up."""
    async with cloned(tmp_path, brokers=2) as (cluster, keys):
        first, before = cluster.agents.pop("a1"), held(cluster)
        second = await cluster.start_agent(**keys)
        await cluster.until(lambda: all("duplicate_agent" in reason for reason in second.agent.reasons()))
        # Each slot has come a few times, to either node.
        await cluster.until(lambda: len(named(events, "session_refused")) >= 8)
        assert held(cluster) == before and not named(events, "session_replaced")
        target = Target(IP)
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"
        assert "default/a1 has a living session from" in named(events, "session_not_opened")[-1]["reason"]
        (line, *_) = named(events, "agent_duplicated")
        assert line["holder"].endswith("(127.0.0.1)") and line["refused"].endswith("(127.0.0.1)")
        nodes = [part.node for part in cluster.brokers.values() if part.node.duplicates.current()]
        shown = metrics.text(status(nodes[0])).decode()
        assert f'claim="default/a1: {line["holder"]} stays, {line["refused"]} is refused"' in shown
        await nodes[0].presence.beat()
        (record,) = [record for record in cluster.registry.nodes() if record.node == nodes[0].node]
        said = cli._duplicate_line(record, record.duplicates[0])
        assert f"{line['holder']} has the sessions, {line['refused']} was refused by {record.node}" in said
        await first.shut()
        await cluster.whole()
        assert held(cluster).isdisjoint(before)


async def test_a_clone_gets_no_session_on_a_third_node(tmp_path: Path, events: Events) -> None:
    """The node where it comes knows nothing of the first: the registry does, and no client is led to two hosts."""
    async with cloned(tmp_path, brokers=3) as (cluster, keys):
        first, before = cluster.agents.pop("a1"), held(cluster)
        (free,) = set(cluster.brokers) - {node for node, _ in before}
        cluster.vip.pinned = cluster.brokers[free].node.bound
        second = await cluster.start_agent(**keys)
        await cluster.until(lambda: all("duplicate_agent" in reason for reason in second.agent.reasons()))
        assert held(cluster) == before
        holder = cluster.brokers[free].node.duplicates.current()[0].holder
        assert any(f"on the node '{node}'" in holder for node, _ in before)
        await first.shut()
        await cluster.until(lambda: second.agent.state == "degraded")
