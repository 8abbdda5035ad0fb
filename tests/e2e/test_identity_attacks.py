"""What attacks on identity have found: each test was red once."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rtunnel.trust import pki
from rtunnel.trust.certificates import key_pem, new_key
from rtunnel_authority.server import Server
from rtunnel_socks.audit import Joined
from support.authority import address, authority, change, renewal, token
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.files import put
from support.logs import Events, named

IP = "127.1.0.1"
TLS: dict[str, object] = {"broker__dial_security": "tls", "gateway__dial_security": "tls"}


# --- a revoked broker ---------------------------------------------------------------------------------------


async def start_own_broker(cluster: Cluster, node: str, **keys: object) -> None:
    """A broker with a certificate under its own name."""
    pki.issue_broker(cluster.secrets, node)
    pair = {"certificate": str(cluster.secrets / f"{node}.pem"), "key": str(cluster.secrets / f"{node}.key")}
    await cluster.start_broker(node, **pair, **keys)


def nodes_in_use(cluster: Cluster) -> set[str]:
    """Where the gateway's streams go."""
    return {pair.owner.used.node for pair in list(cluster.gateway.relay.pairs) if isinstance(pair.owner, Joined)}


async def test_gateways_leave_a_revoked_broker(tmp_path: Path, events: Events) -> None:
    """Where they see its certificate; also when its agents know nothing of certificates."""
    links: dict[str, object] = {"broker__security": "plain", "agent__security": "plain"}
    async with running_cluster(tmp_path, None, **TLS, **links) as cluster, authority(cluster.secrets) as one:
        for node in ("b1", "b2"):
            await start_own_broker(cluster, node, drain=0.2)
        await cluster.start_gateway(authority=address(one))
        await cluster.start_agent()
        await cluster.whole()
        target = Target(IP)
        streams: dict[str, socket.socket] = {}
        while len(streams) < 2:
            sock = await cluster.socks(IP, target.port)
            await cluster.until(lambda: len(nodes_in_use(cluster) - set(streams)) == 1)
            streams[(nodes_in_use(cluster) - set(streams)).pop()] = sock
        await in_thread(lambda: change(cluster.secrets, lambda opened: opened.revoke("broker/b2")))
        with pytest.raises(ConnectionResetError):
            await in_thread(lambda: streams["b2"].recv(1))
        streams["b1"].sendall(b"still there\n")
        assert await in_thread(lambda: read_line(streams["b1"])) == b"127.1.0.1:still there"
        await cluster.brokers["b1"].shut()
        with pytest.raises(SocksRefused):
            await cluster.ask(IP, target.port)
        assert "revoked: the certificate of broker/b2 is revoked" in named(events, "request_refused")[-1]["reason"]


async def test_a_flood_of_trust_lists_fills_nothing(tmp_path: Path, events: Events) -> None:
    """Of a thousand the agent looks at a few, and the last one is among them."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        credentials = cluster.agents["a1"].agent.credentials
        await in_thread(lambda: change(cluster.secrets, lambda opened: opened.revoke("broker/none", force=True)))
        with pki.open_directory(cluster.secrets) as opened:
            number, signed = opened.number, opened.signed
        (session,) = cluster.brokers["b1"].node.sessions.values()

        def flood() -> None:
            for turn in range(1000):
                session.tell_trust(b"noise %d" % turn)
            session.tell_trust(signed)

        await cluster.brokers["b1"].in_relay(flood)
        await cluster.until(lambda: credentials.generation == number)
        assert 1 <= len(named(events, "trust_rejected")) < 100
        assert cluster.agents["a1"].agent.state == "ready"


# --- an agent that was revoked ------------------------------------------------------------------------------


@asynccontextmanager
async def enrolled(tmp_path: Path, **changes: Any) -> AsyncIterator[tuple[Cluster, Server, dict[str, Any]]]:
    """An agent that has enrolled through a broker, with a token that has uses left; and its keys."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        given = token(cluster.secrets, networks=("127.1.0.0/24",), uses=9, **changes)
        file = tmp_path / "token"
        file.write_text(given.line())
        keys: dict[str, Any] = {
            "certificate": "",
            "key": "",
            "identity": str(tmp_path / "identity"),
            "join_token": str(file),
        }
        await cluster.start_agent(**keys, redundancy=1)
        await cluster.whole()
        yield cluster, server, keys


async def another_token(cluster: Cluster, keys: dict[str, Any]) -> None:
    """In the agent's file."""
    given = await in_thread(lambda: token(cluster.secrets, networks=("127.1.0.0/24",)))
    await in_thread(lambda: put(Path(keys["join_token"]), given.line()))


async def revoked(cluster: Cluster) -> None:
    await in_thread(lambda: change(cluster.secrets, lambda opened: opened.revoke("agent/default/a1")))


def is_told_so(cluster: Cluster) -> bool:
    return any("another token" in reason for reason in cluster.agents["a1"].agent.reasons())


async def test_a_revoked_agent_comes_back_with_a_token_that_came_while_it_was_away(tmp_path: Path) -> None:
    """Revoked, given a token and started again, in any order; but never with the token that it had."""
    async with enrolled(tmp_path) as (cluster, _, keys):
        await cluster.agents["a1"].shut()
        await revoked(cluster)
        for _ in range(2):  # a start alone changes nothing, how often it may be
            await cluster.start_agent(**keys, redundancy=1)
            await cluster.until(lambda: is_told_so(cluster))
            await cluster.agents["a1"].shut()
        await another_token(cluster, keys)
        await cluster.start_agent(**keys, redundancy=1)
        await cluster.whole()


async def test_a_token_that_was_there_before_the_revocation_brings_nobody_back(tmp_path: Path) -> None:
    """It was in the file already, while the agent was in good standing."""
    async with enrolled(tmp_path) as (cluster, _, keys):
        await another_token(cluster, keys)
        await cluster.agents["a1"].shut()
        await cluster.start_agent(**keys, redundancy=1)
        await cluster.whole()
        await revoked(cluster)
        await cluster.until(lambda: is_told_so(cluster))
        await cluster.agents["a1"].shut()
        await cluster.start_agent(**keys, redundancy=1)
        await cluster.until(lambda: is_told_so(cluster))


async def test_the_end_of_its_certificate_brings_no_revoked_agent_back(tmp_path: Path) -> None:
    """Its token has uses left: it waits for another one all the same."""
    async with enrolled(tmp_path, lifetime=4) as (cluster, _, keys):
        agent = cluster.agents["a1"].agent
        await revoked(cluster)
        await cluster.until(lambda: "needs another token" in str(agent.credentials.missing))
        await another_token(cluster, keys)
        await cluster.whole()


async def test_a_key_whose_lost_certificate_was_revoked_is_thrown_away(tmp_path: Path) -> None:
    """The answer to its renewal was lost, then it was revoked: with another token it takes another key."""
    async with enrolled(tmp_path) as (cluster, server, keys):
        identity, lost = cluster.agents["a1"].agent.identity, new_key()
        assert identity is not None
        (tmp_path / "identity" / "next.key").write_bytes(key_pem(lost))
        asked = renewal(identity.certificate, identity.key, lost, addresses=[IP])
        await server._there(lambda: server.authority.enrol(asked))
        await revoked(cluster)
        await cluster.until(lambda: is_told_so(cluster))
        await another_token(cluster, keys)
        await cluster.whole()
