"""Addresses that leave the agent's host, and come: nobody answers for what another host has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rtunnel.trust.keys import Token
from rtunnel.wire.refusal import Refusal
from rtunnel_agent import addresses
from support.authority import address, authority, token
from support.cluster import SocksRefused, Target, running_cluster
from support.logs import Events, named

ONE, TWO = "127.1.0.1", "127.1.0.2"
LOOK = 0.05


class Host:
    """What the agents' hosts have: all but `lost`."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.default = ONE

    def has(self, ip: str) -> bool:
        return ip not in self.lost


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """The host of every agent that starts in this test."""
    made = Host()
    monkeypatch.setattr(addresses, "host_has", made.has)
    monkeypatch.setattr(addresses, "default_address", lambda: made.default)
    return made


def says(sock: Any) -> bytes:
    sock.sendall(b"still\n")
    return bytes(sock.recv(100))


async def test_a_lost_address_is_given_back_and_taken_up_again(tmp_path: Path, host: Host, events: Events) -> None:
    """Its tuples and streams end; the session, and streams to the other address, stay. Back is back."""
    async with running_cluster(tmp_path, agent__address_check=LOOK) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        agent = (await cluster.start_agent("a1", ONE, TWO, redundancy=1)).agent
        await cluster.whole()
        one, two = Target(ONE), Target(TWO)
        table = cluster.gateway.table
        session = agent.slots[0].session
        with await cluster.socks(ONE, one.port) as stays, await cluster.socks(TWO, two.port) as ends:
            assert says(stays) == b"127.1.0.1:still\n"
            host.lost = {TWO}
            await cluster.until(lambda: not table.lookup("default", TWO))
            assert not cluster.registry.lookup("default", TWO)
            with pytest.raises(ConnectionResetError):
                says(ends)
            assert agent.reasons() == [f"address {TWO}: this host does not have it"]
            assert says(stays) == b"127.1.0.1:still\n"
            await cluster.brokers["b1"].node.presence.beat()
            assert not cluster.registry.lookup("default", TWO), "a beat brought it back"
            [gone] = cluster.registry.history("default", TWO).departures
            assert (gone.cause, gone.agent_id, gone.addresses) == ("given_back", "a1", (TWO,))
            host.lost = set()
            await cluster.until(lambda: bool(table.lookup("default", TWO)))
            assert await cluster.ask(TWO, two.port) == b"127.1.0.2:hello"
            assert says(stays) == b"127.1.0.1:still\n"
        assert agent.slots[0].session is session and agent.reasons() == []
        assert [line["address"] for line in named(events, "address_lost")] == [TWO]
        assert [line["address"] for line in named(events, "address_found")] == [TWO]
        assert [line["addresses"] for line in named(events, "addresses_given_back")] == [[TWO]]


async def test_an_address_that_another_agent_still_has_is_asked_for_again(
    tmp_path: Path, host: Host, events: Events
) -> None:
    """It moves from one host to another, and the new one sees it first: nothing else ends, and then it is had."""
    host.lost = {TWO}
    async with running_cluster(tmp_path, agent__address_check=LOOK) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        agent = (await cluster.start_agent("a1", ONE, TWO, redundancy=1)).agent
        await cluster.until(lambda: agent.state == "ready")
        host.lost = set()
        agent._own._has = lambda ip: ip == ONE
        other = await cluster.start_agent("a2", TWO, redundancy=1)
        await cluster.whole()
        session = agent.slots[0].session
        agent._own._has = host.has
        await cluster.until(lambda: bool(named(events, "address_not_taken_up")))
        await cluster.brokers["b1"].node.presence.beat()
        [noted] = cluster.registry.history("default", TWO).refusals
        assert (noted.cause, noted.agent_id, noted.proved) == ("address_taken", "a1", True)
        await other.shut()
        await cluster.until(lambda: {found.agent_id for found in cluster.registry.lookup("default", TWO)} == {"a1"})
        assert agent.slots[0].session is session


async def test_an_agent_that_starts_without_an_address_logs_it_once(tmp_path: Path, host: Host, events: Events) -> None:
    """One warning at the start, however often it looks; the address is taken up when it comes."""
    host.lost = {TWO}
    looks: list[str] = []
    async with running_cluster(tmp_path, agent__address_check=LOOK) as cluster:
        await cluster.start_broker("b1")
        agent = (await cluster.start_agent("a1", ONE, TWO, redundancy=1)).agent
        has = agent._own._has
        agent._own._has = lambda ip: looks.append(ip) or has(ip)  # type: ignore[func-returns-value]
        await cluster.until(lambda: len(looks) >= 6)
        (line,) = named(events, "address_not_found")
        assert line["address"] == TWO
        assert "add it to an interface, or change agent.addresses" in line["reason"]
        host.lost = set()
        await cluster.until(lambda: bool(cluster.registry.lookup("default", TWO)))
        assert len(named(events, "address_not_found")) == 1 and not named(events, "address_lost")


async def test_an_agent_that_has_lost_all_addresses_leaves(tmp_path: Path, host: Host) -> None:
    """No session stays, and why is said; with the address it comes back."""
    async with running_cluster(tmp_path, agent__address_check=LOOK) as cluster:
        await cluster.start(brokers=2)
        agent = cluster.agents["a1"].agent
        host.lost = {ONE}
        await cluster.until(lambda: agent.state == "down" and not cluster.registry.lookup("default", ONE))
        await cluster.until(lambda: all("none of the agent's addresses" in slot.reason for slot in agent.slots))
        host.lost = set()
        await cluster.whole()


async def test_a_dial_to_an_address_that_is_lost_is_stale(tmp_path: Path, host: Host) -> None:
    """Before the agent has looked: the target is dialled from its own address, so nobody else answers."""
    elsewhere = "192.0.2.7"
    async with running_cluster(tmp_path, agent__address_check=600) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        agent = (await cluster.start_agent("a1", elsewhere, redundancy=1)).agent
        await cluster.whole()
        with pytest.raises(SocksRefused):
            await cluster.socks(elsewhere, 9100)
        assert agent.targets.counts.refused == {Refusal.STALE_TARGET.value: 1}


async def test_a_target_is_dialled_from_its_own_address(tmp_path: Path) -> None:
    """That the source is the target's address is what makes an agent notice that it has lost it."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        target = Target(ONE)
        with await cluster.socks(ONE, target.port) as sock:
            assert says(sock) == b"127.1.0.1:still\n"
            (pair,) = cluster.agents["a1"].agent.relay.pairs
            assert ONE in {member.getsockname()[0] for member in pair.sockets}


async def test_a_new_default_address_is_taken_up(tmp_path: Path, host: Host) -> None:
    """DHCP gave another address: the agent enrols for it, and answers for it alone."""
    async with (
        running_cluster(tmp_path, broker__join_token="", agent__address_check=LOOK) as cluster,
        authority(cluster.secrets) as server,
    ):
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        by = token(cluster.secrets, networks=("127.1.0.0/24",), uses=2)
        keys = enrols(tmp_path, by)
        agent = (await cluster.start_agent("a1", **keys, addresses=[], redundancy=1)).agent
        await cluster.whole()
        assert agent.addresses == (ONE,)
        host.lost, host.default = {ONE}, TWO
        await cluster.until(lambda: bool(cluster.gateway.table.lookup("default", TWO)))
        assert agent.addresses == (TWO,)
        assert not cluster.registry.lookup("default", ONE)
        target = Target(TWO)
        assert await cluster.ask(TWO, target.port) == b"127.1.0.2:hello"
        assert agent.identity is not None and agent.identity.who.addresses == {TWO}


def enrols(directory: Path, by: Token) -> dict[str, Any]:
    """Keys of an agent that enrols with this token."""
    file = directory / "agent.token"
    file.write_text(by.line())
    return {"identity": str(directory / "identity"), "join_token": str(file), "certificate": "", "key": ""}
