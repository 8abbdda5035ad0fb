"""Which brokers an agent finds, whatever stands between: resolvers that rotate, addresses that say nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from rtunnel.bridge import Bridge
from rtunnel_agent import handshake, race
from rtunnel_agent.brokers import Address, Brokers
from support.authority import address, authority, token
from support.cluster import PATIENCE, Vip, in_thread, running_cluster
from support.logs import Events, named
from support.plumbing import kept, read_all


async def test_a_resolver_that_rotates_hides_no_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One name, two brokers, another order at every lookup: the agent finds both."""
    real, turn = socket.getaddrinfo, count()

    def rotating(host: Any, port: Any, *args: Any, **keys: Any) -> Any:
        if host != "brokers.test":
            return real(host, port, *args, **keys)
        ips = ["127.0.0.1", "127.0.0.2"][:: 1 if next(turn) % 2 else -1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]

    monkeypatch.setattr(socket, "getaddrinfo", rotating)
    async with running_cluster(tmp_path) as cluster:
        port = (await cluster.start_broker("b1")).node.bound[1]
        await cluster.start_broker("b2", listen=f"127.0.0.2:{port}")
        await cluster.start_gateway()
        await cluster.start_agent("a1", brokers=[f"brokers.test:{port}"])
        await cluster.whole()


class Silent:
    """An address that takes connections and says nothing; the kernel does so for a process that hangs."""

    def __init__(self) -> None:
        self.sock = kept(socket.create_server(("127.0.0.1", 0)))
        self.address: Address = self.sock.getsockname()


class Full(Silent):
    """An address that drops SYNs: its backlog is full."""

    def __init__(self) -> None:
        self.sock = kept(socket.socket())
        self.sock.bind(("127.0.0.1", 0))
        self.sock.listen(0)
        self.address = self.sock.getsockname()
        for _ in range(4):
            filler = kept(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(self.address)


class Held(Vip):
    """A broker that answers late: connections to it wait for `let_go`."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def _accept(self, sock: socket.socket, peer: str) -> None:
        self.waiting.append(lambda: Vip._accept(self, sock, peer))

    async def let_go(self) -> None:
        await Bridge(self.relay).run(lambda: [go() for go in self.waiting])


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed at once; the deadlines of silent links are far away."""
    monkeypatch.setattr(race, "SILENCE", 0.05)
    monkeypatch.setattr(handshake, "CHALLENGE_SECONDS", 0.1)


def dialled(monkeypatch: pytest.MonkeyPatch, *addresses: Address) -> None:
    """The agent dials these in this order, the last one for ever."""
    left = list(addresses)

    async def take(self: Brokers) -> Address:
        await trio.lowlevel.checkpoint()
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(Brokers, "next", take)


PATIENT: dict[str, Any] = {"connect_timeout": 600, "handshake_timeout": 600}


@pytest.mark.parametrize("kind", [Silent, Full])
async def test_a_silent_address_keeps_no_agent_from_the_next(
    kind: type[Silent], tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a session the next address is dialled beside it, and the silent one is left when that is up."""
    silent = kind()
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        dialled(monkeypatch, silent.address, cluster.vip.address)
        agent = (await cluster.start_agent("a1", redundancy=1, **PATIENT)).agent
        await cluster.whole()
        await cluster.until(lambda: len(agent._watches) == 1)
        if kind is Silent:
            left = kept(silent.sock.accept()[0])
            left.settimeout(PATIENCE)
            await in_thread(lambda: read_all(left))


async def test_silent_addresses_keep_no_slot_from_the_others(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots, three silent addresses, two brokers behind the VIP: both sessions come up."""
    addresses = [Silent().address for _ in range(3)]
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_broker("b2")
        await cluster.start_gateway()
        dialled(monkeypatch, *addresses, cluster.vip.address)
        await cluster.start_agent("a1", **PATIENT)
        await cluster.whole()


async def test_a_silent_plain_address_is_left_for_the_next(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TLS the missing Challenge tells: nobody else's Hello waits for it for long."""
    silent = Silent()
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1", security="plain")
        await cluster.start_gateway()
        dialled(monkeypatch, silent.address, cluster.vip.address)
        await cluster.start_agent("a1", redundancy=1, security="plain", **PATIENT)
        await cluster.whole()


async def test_a_late_link_says_what_is_true_by_then(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    """A slot's link to b1 was slow, another slot got b1 meanwhile: the late Hello names b1, and replaces nothing."""
    held = Held()
    await held.start()
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        held.pinned = cluster.brokers["b1"].node.bound
        dialled(monkeypatch, held.address, cluster.vip.address, Silent().address)
        agent = (await cluster.start_agent("a1", **PATIENT)).agent
        await cluster.until(lambda: agent.state == "degraded")
        (session,) = [slot.session for slot in agent.slots if slot.session is not None]
        await held.let_go()
        await cluster.until(lambda: any(line["code"] == "duplicate_node" for line in named(events, "session_refused")))
        assert session in [slot.session for slot in agent.slots]
        assert not named(events, "session_replaced")
    await trio.to_thread.run_sync(held.relay.stop)


async def test_a_silent_address_keeps_nobody_from_enrolling(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request goes to the first broker that takes a link."""
    silent = Silent()
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        file = tmp_path / "agent.token"
        file.write_text(token(cluster.secrets, networks=("127.1.0.0/24",)).line())
        dialled(monkeypatch, silent.address, cluster.vip.address)
        keys: dict[str, Any] = {
            "identity": str(tmp_path / "identity"),
            "join_token": str(file),
            "certificate": "",
            "key": "",
        }
        await cluster.start_agent("a1", redundancy=1, **keys, **PATIENT)
        await cluster.whole()
