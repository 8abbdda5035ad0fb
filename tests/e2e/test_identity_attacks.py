"""What attacks on identity have found: each test was red once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from rtunnel.trust import pki
from rtunnel_socks.client import Joined
from support.authority import address, authority, change
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.plumbing import close_kept

Events = list[Any]  # captured log lines
IP = "127.1.0.1"
TLS: dict[str, object] = {"broker__dial_security": "tls", "gateway__dial_security": "tls"}


@pytest.fixture(autouse=True)
def _no_socket_left() -> Iterator[None]:
    yield
    close_kept()


@pytest.fixture
def events() -> Iterator[Events]:
    """What all parts of the test log."""
    structlog.reset_defaults()
    with capture_logs() as captured:
        yield captured


def named(events: Events, event: str) -> list[Any]:
    return [line for line in events if line["event"] == event]


# --- a revoked broker ---------------------------------------------------------------------------------------


async def start_own_broker(cluster: Cluster, node: str, **keys: object) -> None:
    """A broker with a certificate under its own name."""
    pki.issue_broker(cluster.secrets, node)
    pair = {"certificate": str(cluster.secrets / f"{node}.pem"), "key": str(cluster.secrets / f"{node}.key")}
    await cluster.start_broker(node, **pair, **keys)


async def test_agents_leave_a_revoked_broker(tmp_path: Path) -> None:
    """They hear of it from the others, and it can't have them back; a broker that has another name can."""
    async with running_cluster(tmp_path) as cluster, authority(cluster.secrets) as one:
        for node in ("b1", "b2"):
            await start_own_broker(cluster, node, authority=address(one))
        await cluster.start_gateway()
        agent = (await cluster.start_agent()).agent
        await cluster.whole()
        before = agent.identity
        await in_thread(lambda: change(cluster.secrets, lambda opened: opened.revoke("broker/b2")))

        def left() -> bool:
            return {slot.session.node for slot in agent.slots if slot.session is not None} == {"b1"}

        await cluster.until(left, 5.0)
        await cluster.until(lambda: any("the broker's certificate is revoked" in reason for reason in agent.reasons()))
        assert left()
        await start_own_broker(cluster, "b3", authority=address(one))
        await cluster.until(lambda: agent.state == "ready")
        assert agent.identity is before
        assert await cluster.ask(IP, Target(IP).port) == b"127.1.0.1:hello"


async def test_gateways_leave_a_revoked_broker(tmp_path: Path, events: Events) -> None:
    """Where they see its certificate; also when its agents know nothing of certificates."""
    links: dict[str, object] = {"broker__security": "plain", "agent__security": "plain"}
    async with running_cluster(tmp_path, None, **TLS, **links) as cluster, authority(cluster.secrets) as one:
        for node in ("b1", "b2"):
            await start_own_broker(cluster, node)
        await cluster.start_gateway(authority=address(one))
        await cluster.start_agent()
        await cluster.whole()
        target = Target(IP)
        streams: dict[str, socket.socket] = {}
        while len(streams) < 2:
            sock = await cluster.socks(IP, target.port)
            pairs = [pair.on_end.used.node for pair in cluster.gateway.relay.pairs if isinstance(pair.on_end, Joined)]
            (node,) = set(pairs) - set(streams)
            streams[node] = sock
        await in_thread(lambda: change(cluster.secrets, lambda opened: opened.revoke("broker/b2")))
        with pytest.raises(ConnectionResetError):
            await in_thread(lambda: streams["b2"].recv(1))
        streams["b1"].sendall(b"still there\n")
        assert await in_thread(lambda: read_line(streams["b1"])) == b"127.1.0.1:still there"
        await cluster.brokers["b1"].shut()
        with pytest.raises(SocksRefused):
            await cluster.ask(IP, target.port)
        assert "revoked: the broker's certificate is revoked" in named(events, "refused")[-1]["reason"]
