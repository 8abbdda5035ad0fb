"""What must hold while a cluster is attacked, and afterwards: a good client is served, and nothing is left over."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from structlog.testing import capture_logs

from support.attackers import PATIENCE
from support.cluster import Cluster, Target
from support.logs import Events


def holdings(cluster: Cluster) -> dict[str, int]:
    """Whatever could leak."""
    held = {"descriptors": len(os.listdir("/proc/self/fd"))}  # noqa: PTH208
    for name, part in cluster.brokers.items():
        node = part.node
        held |= {
            f"{name} pairs": len(node.relay.pairs),
            f"{name} links": len(node.relay.links),
            f"{name} listeners": len(node.relay.listeners),
            f"{name} handshakes": node.links.handshakes,
            f"{name} sessions": len(node.sessions),
            f"{name} waiting": node.counts.waiting,
            f"{name} streams": node.counts.streams,
        }
    for name, part in cluster.agents.items():
        held |= {
            f"{name} pairs": len(part.agent.relay.pairs),
            f"{name} links": len(part.agent.relay.links),
            f"{name} streams": part.agent.targets.counts.streams,
        }
    gateway = cluster.gateway
    held |= {
        "gateway pairs": len(gateway.relay.pairs),
        "gateway clients": gateway.counts.clients,
        "gateway streams": gateway.counts.streams,
    }
    return held


@asynccontextmanager
async def unharmed(cluster: Cluster, target: Target, *, slowest: float = 10.0, spare: int = 0) -> AsyncIterator[Events]:
    """A good client is served the whole time, nothing crashes, and at the end is held what was held before and no more.

    Gives the log. `spare`: descriptors that a pool of connections to Redis may have come to.
    """
    await cluster.ask(target.ip, target.port)
    await settled(cluster)
    before = holdings(cluster)
    before["descriptors"] += spare
    served: list[float] = []
    over = trio.Event()

    async def good_client() -> None:
        while not over.is_set():
            began = trio.current_time()
            assert await cluster.ask(target.ip, target.port) == f"{target.ip}:hello".encode()
            served.append(trio.current_time() - began)
            with trio.move_on_after(0.02):
                await over.wait()

    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(good_client)
            try:
                yield logs
            finally:
                over.set()
    crashes = [entry for entry in logs if entry["event"] == "relay_crashed"]
    assert not crashes, crashes
    assert served and max(served) < slowest, max(served)
    try:
        await cluster.until(lambda: all(now <= before[key] for key, now in holdings(cluster).items()), PATIENCE)
    except trio.TooSlowError:
        after = holdings(cluster)
        pytest.fail(f"leaked: { {key: (before[key], now) for key, now in after.items() if now > before[key]} }")


async def settled(cluster: Cluster) -> None:
    """Nothing of earlier requests is on its way any more."""
    last: list[dict[str, int]] = [{}]
    same = [0]

    def quiet() -> bool:
        now = holdings(cluster)
        same[0] = same[0] + 1 if now == last[0] else 0
        last[0] = now
        return same[0] >= 10

    await cluster.until(quiet)
