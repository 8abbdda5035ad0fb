"""A gateway, and a broker, whose clock is wrong: real roles, one of which reads another clock."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import rtunnel_broker.ports
import rtunnel_broker.presence
import rtunnel_socks.dial
import rtunnel_socks.resolver
from rtunnel.registry.memory import MemoryRegistry
from rtunnel_broker.serve import status as broker_status
from rtunnel_socks.serve import status as gateway_status
from support.cluster import Cluster, SocksRefused, Target, running_cluster
from support.logs import Events, named

OFF = 45.0


def set_clock(patch: pytest.MonkeyPatch, module: object, off: float) -> None:
    """This module reads a clock that is off by so many seconds."""
    patch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + off, monotonic=time.monotonic))


async def refused(cluster: Cluster, target: Target) -> None:
    with pytest.raises(SocksRefused):
        await cluster.socks(target.ip, target.port)


async def test_a_gateway_whose_clock_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events) -> None:
    """It says so with the difference, counts it, tells clients, and is not ready until the clock is right again."""
    async with running_cluster(tmp_path, MemoryRegistry(3.0, 5.0)) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        node = cluster.brokers["b1"].node
        await cluster.until(lambda: node.presence.clock_offset is not None)
        for module in (rtunnel_socks.dial, rtunnel_socks.resolver):
            set_clock(monkeypatch, module, -OFF)
        await refused(cluster, target)
        gateway = cluster.gateway
        (reason,) = gateway.reasons()
        assert reason.startswith("clock: this gateway is 45.") or reason.startswith("clock: this gateway is 44.")
        assert "s behind broker b1, and Dials are refused as expired" in reason
        assert node.reasons() == [], "its own clock is the registry's"
        assert (gateway.counts.refused, gateway.clock.expired) == ({"expired": 1}, 1)
        by_gateway, by_broker = sorted(named(events, "clock_difference_found"), key=lambda line: line["offset"])
        assert (by_gateway["wrong"], by_broker["wrong"]) == ("this gateway", f"gateway {gateway.key.id}")
        assert by_gateway["log_level"] == by_broker["log_level"] == "error"
        assert gateway_status(gateway)["clock"]["expired"] == 1  # type: ignore[index]
        for module in (rtunnel_socks.dial, rtunnel_socks.resolver):
            set_clock(monkeypatch, module, 0.0)
        assert gateway.reasons() == []
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


async def test_a_broker_whose_clock_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway stays ready, and passes the broker over; that one is not ready, and says why."""
    async with running_cluster(tmp_path, MemoryRegistry(3.0, 5.0)) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        node = cluster.brokers["b1"].node
        for module in (rtunnel_broker.ports, rtunnel_broker.presence):
            set_clock(monkeypatch, module, OFF)
        await refused(cluster, target)
        assert cluster.gateway.reasons() == []
        await cluster.until(lambda: any("ahead of gateway" in reason for reason in node.reasons()))
        assert broker_status(node)["clock"]["expired"] == 1  # type: ignore[index]
        assert cluster.gateway.paths.is_suspect("b1", cluster.gateway.relay.loop.now)
        set_clock(monkeypatch, rtunnel_broker.presence, 0.0)
        await cluster.until(lambda: node.reasons() == [])
