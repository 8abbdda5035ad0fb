"""The stale-tuple defence: whatever a route table says, no byte reaches an agent that the client did not ask for.

All agents of a test run on one machine, where dialling an IP leads to the right target from each of them. So each is
put on a `Host` of its own first: whatever it dials, it reaches the service of its own host, as in an isolated VPC. A
Dial that a wrong agent takes is then answered by a wrong target, which says its name.
"""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio

from rtunnel.registry import COUNTER_BITS, NodeRecord, Registration, Registry, Tuple
from rtunnel.registry import ports as allocation
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.ports import PortAllocator
from rtunnel.relay.relay import Attempt, Connected, Relay
from rtunnel.wire.messages import DialBody
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_agent.handshake import AgentSession
from rtunnel_agent.targets import Served, Targets
from rtunnel_broker.ports import DialChecker
from rtunnel_broker.session import Session
from rtunnel_socks.gateway import Gateway
from support.cluster import Cluster, Part, SocksRefused, Target, in_thread, read_line, running_cluster
from support.logs import Events, named
from support.plumbing import free_port, free_ports

STALE = ("stale_node", "stale_target", "stale_epoch")


class Host:
    """The network as an agent's host sees it: every address leads to the host's own service."""

    def __init__(self, part: Part, ip: str) -> None:
        self._relay = part.agent.relay
        self._ip = ip
        self.loop = self._relay.loop
        self.memory = self._relay.memory
        self.join = self._relay.join

    def connect(self, _ip: str, port: int, timeout: float, done: Connected, *, source: str) -> Attempt:
        return self._relay.connect(self._ip, port, timeout, done, source=source and self._ip)


class Witness(Target):
    """A target that counts its connections."""

    def __init__(self, ip: str, port: int = 0) -> None:
        self.seen = 0
        super().__init__(ip, port)

    def _talk(self, served: socket.socket) -> None:
        self.seen += 1
        super()._talk(served)


async def start_agent(cluster: Cluster, agent_id: str, ip: str, **keys: Any) -> Part:
    """An agent on a host of its own."""
    part = await cluster.start_agent(agent_id, ip, **keys)
    part.agent.targets.relay = cast("Relay", Host(part, ip))
    return part


@contextmanager
def checks_off(*, broker: bool = False, agent: bool = False) -> Iterator[None]:
    """Take away a line of defence: what it would call stale passes. The MAC and the link are checked all the same."""

    def no_broker_check(self: DialChecker, body: DialBody, session: Session, key: str) -> None:
        if not session.serves or session.link is None or session.link.over:
            raise Refused(Refusal.LINK_LOST)

    def no_agent_check(self: Targets, body: DialBody, session: AgentSession) -> str:
        return body.ip

    with pytest.MonkeyPatch.context() as patch:
        if broker:
            patch.setattr(DialChecker, "check", no_broker_check)
        if agent:
            patch.setattr(Targets, "check", no_agent_check)
            patch.setattr(Served, "review", lambda _: None)
        yield


# --- one forced tuple ---------------------------------------------------------------------------------------

ASKED, OTHER = "127.1.0.1", "127.1.0.2"


@dataclass
class Scene:
    """a1 answers for ASKED on b2 (and b1 where `spread`), a2 for OTHER on b1; one wrong tuple for ASKED comes first."""

    cluster: Cluster
    asked: Witness
    other: Witness
    busy: list[socket.socket] = field(default_factory=list)

    def session(self, agent_id: str, node: str) -> Tuple:
        """The true tuple of an agent's session."""
        ip = {"a1": ASKED, "a2": OTHER}[agent_id]
        (found,) = [t for t in self.cluster.registry.lookup("default", ip) if t.node == node]
        return found

    async def force(self, stale: Tuple) -> None:
        """Into the registry, and so into the gateway; it comes first, for the true ways to ASKED get a stream each."""
        for _ in self.cluster.registry.lookup("default", ASKED):
            self.busy.append(await self.cluster.socks(ASKED, self.asked.port))
        self.cluster.registry.register(Registration(stale.epoch, (stale,), ()))
        table = self.cluster.gateway.table
        await self.cluster.until(lambda: stale in [plain(t) for t in table.lookup("default", ASKED)])
        await self.cluster.until(lambda: stale.node in table.nodes)

    async def ask(self) -> bytes:
        return await self.cluster.ask(ASKED, self.asked.port)

    def refused(self, code: str) -> int:
        """By the brokers."""
        return sum(part.node.counts.refused.get(code, 0) for part in self.cluster.brokers.values())


def plain(entry: Tuple) -> Tuple:
    """As a gateway has it, without its heartbeat."""
    return msgspec.structs.replace(entry, beat=0.0, host_id="", agent_host="")


async def start_scene(cluster: Cluster, *, spread: bool = False) -> Scene:
    await cluster.start_broker("b1")
    await cluster.start_broker("b2")
    await cluster.start_gateway()
    asked = Witness(ASKED, free_port())
    cluster.vip.pinned = cluster.vip.backends[1]
    await start_agent(cluster, "a1", ASKED, redundancy=1 + spread)
    await cluster.until(lambda: cluster.agents["a1"].agent.state != "down")
    cluster.vip.pinned = cluster.vip.backends[0]
    await start_agent(cluster, "a2", OTHER, redundancy=1)
    await cluster.whole()
    return Scene(cluster, asked, Witness(OTHER, asked.port))


def wrong_port(scene: Scene) -> Tuple:
    """(a) The port belongs to another agent by now, and the tuple even has its node and epoch."""
    return msgspec.structs.replace(plain(scene.session("a2", "b1")), agent_ip=ASKED, agent_id="a1")


def wrong_epoch(scene: Scene) -> Tuple:
    """(b) The right port of the right agent, of another session."""
    true = plain(scene.session("a1", "b1"))
    return msgspec.structs.replace(true, epoch=true.epoch + 1000)


def wrong_node(scene: Scene) -> Tuple:
    """(c) Another node is said to have the port."""
    incarnation = scene.cluster.registry.start_node(NodeRecord(node="b0", host="b0", ip="127.0.0.1", incarnation=0))
    true = plain(scene.session("a1", "b2"))
    return msgspec.structs.replace(true, node="b0", epoch=incarnation << COUNTER_BITS | 7)


@pytest.mark.parametrize(
    ("make", "code"), [(wrong_port, "stale_target"), (wrong_epoch, "stale_epoch"), (wrong_node, "stale_node")]
)
async def test_a_stale_tuple_is_refused_forgotten_and_passed_over(
    tmp_path: Path, events: Events, make: Any, code: str
) -> None:
    """By the broker, with its own code; the connection succeeds over the next tuple, later ones go there at once."""
    async with running_cluster(tmp_path) as cluster:
        scene = await start_scene(cluster, spread=make is wrong_epoch)
        stale = make(scene)
        await scene.force(stale)
        assert await scene.ask() == f"{ASKED}:hello".encode()
        assert scene.refused(code) == 1
        (told,) = named(events, "dial_refused")
        assert (told["code"], told["port"]) == (code, stale.ps_port)
        assert told["who"].endswith(":127.0.0.1")
        (failed,) = named(events, "tuple_failed")
        assert (failed["code"], failed["node"], failed["epoch"]) == (code, stale.node, str(stale.epoch))
        table = cluster.gateway.table
        assert stale not in [plain(t) for t in table.lookup("default", ASKED)]
        assert table.counts().forgotten == 1
        for _ in range(5):
            assert await scene.ask() == f"{ASKED}:hello".encode()
        assert scene.refused(code) == 1
        assert scene.other.seen == 0
        await cluster.until(lambda: len(named(events, "stream_ended")) == 6)
        attempts = [line["attempts"] for line in named(events, "stream_ended")]
        assert sum(attempts) == len(attempts) + 1


async def test_an_ip_that_moved_is_not_found_at_its_old_agent(tmp_path: Path, events: Events) -> None:
    """(d) The agent restarts with another IP on the same port, and another one takes over the IP."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_broker("b2")
        await cluster.start_gateway()
        there = Witness("127.1.0.4")
        here = Witness("127.1.0.3", free_port())
        moved = Witness(ASKED, here.port)
        cluster.vip.pinned = cluster.vip.backends[0]
        first = await start_agent(cluster, "a1", ASKED, redundancy=1)
        await cluster.whole()
        (old,) = cluster.registry.lookup("default", ASKED)
        await first.shut()
        await start_agent(cluster, "a1", "127.1.0.3", redundancy=1)  # the same agent_id: the same port again
        await cluster.whole()
        (now,) = cluster.registry.lookup("default", "127.1.0.3")
        assert now.ps_port == old.ps_port
        cluster.vip.pinned = cluster.vip.backends[1]
        await start_agent(cluster, "a2", ASKED, redundancy=1)
        await cluster.whole()
        scene = Scene(cluster, moved, there)
        # As if the gateway had missed everything since, and even with the port's present epoch. Under a2's name: a
        # registry takes no tuple of another agent for an address that a2 has.
        for number, epoch in enumerate((old.epoch, now.epoch), 1):
            await scene.force(msgspec.structs.replace(plain(old), epoch=epoch, agent_id="a2"))
            assert await scene.ask() == f"{ASKED}:hello".encode()
            assert scene.refused("stale_target") == number
        assert here.seen == there.seen == 0
        assert cluster.agents["a2"].agent.targets.counts.accepted == moved.seen


@pytest.mark.parametrize(
    ("make", "code"), [(wrong_port, "stale_target"), (wrong_epoch, "stale_epoch"), (wrong_node, "stale_epoch")]
)
async def test_the_agent_refuses_what_a_broker_lets_pass(tmp_path: Path, events: Events, make: Any, code: str) -> None:
    """The second line: with the broker's checks off the agent says no, and the gateway forgets the tuple as well."""
    with checks_off(broker=True):
        async with running_cluster(tmp_path) as cluster:
            scene = await start_scene(cluster, spread=make is wrong_epoch)
            stale = make(scene)
            await scene.force(stale)
            assert await scene.ask() == f"{ASKED}:hello".encode()
            assert sum(p.agent.targets.counts.refused.get(code, 0) for p in cluster.agents.values()) == 1
            assert [line["code"] for line in events if line["event"] == "tuple_failed"] == [code]
            assert stale not in [plain(t) for t in cluster.gateway.table.lookup("default", ASKED)]
            assert scene.other.seen == 0


async def test_a_stale_tuple_alone_is_a_refusal(tmp_path: Path) -> None:
    """No other tuple: the client is told 0x04, and nobody else is tried instead."""
    async with running_cluster(tmp_path) as cluster:
        scene = await start_scene(cluster)
        stale = wrong_port(scene)
        await cluster.agents.pop("a1").shut()
        await cluster.until(lambda: not cluster.registry.lookup("default", ASKED))
        await cluster.until(lambda: not cluster.gateway.table.lookup("default", ASKED))
        scene.cluster.registry.register(Registration(stale.epoch, (stale,), ()))
        await cluster.until(lambda: bool(cluster.gateway.table.lookup("default", ASKED)))
        with pytest.raises(SocksRefused) as caught:
            await cluster.socks(ASKED, scene.asked.port)
        assert caught.value.code == 0x04
        assert scene.refused("stale_target") == 1
        assert scene.other.seen == 0


# --- a storm ------------------------------------------------------------------------------------------------


@dataclass
class Storm:
    """Agents come and go on few ports, a gateway believes in old tuples, clients ask for every IP all the time."""

    rng: random.Random
    ips: list[str]
    history: list[Tuple] = field(default_factory=list)  # every tuple that ever was
    owners: dict[tuple[str, int], str] = field(default_factory=dict)  # (node, PS port) -> its last IP and agent
    reused: int = 0
    answered: Counter[str] = field(default_factory=Counter)  # by the IP that was asked
    wrong: list[tuple[str, bytes]] = field(default_factory=list)
    refused: int = 0
    poisoned: int = 0  # wrong tuples that the gateway was given
    changes: int = 0  # agents that came
    over: bool = False

    def note(self, registration: Registration) -> None:
        for entry in registration.tuples:
            at = (entry.node, entry.ps_port)
            before = self.owners.get(at)
            if before is not None and before != entry.agent_ip:
                self.reused += 1
            self.owners[at] = entry.agent_ip
            self.history.append(entry)

    def poison(self, gateway: Gateway) -> None:
        """Look-ups find old tuples beside the true ones, as they were or as somebody else's at the same port.

        The table itself would not take them back where a newer epoch is known: this is worse than any lag.
        """
        true = gateway.table.lookup

        def lookup(namespace: str, ip: str) -> tuple[Tuple, ...]:
            now, history, rng = true(namespace, ip), self.history[-400:], self.rng
            old = [t for t in history if t.agent_ip == ip and t.epoch not in {n.epoch for n in now}]
            bad = rng.sample(old, min(2, len(old)))
            if history:
                other = rng.choice(history[-40:])  # the very tuple of another agent, with our IP on it
                if other.agent_ip != ip:
                    bad.append(msgspec.structs.replace(other, agent_ip=ip))
            self.poisoned += len(bad)
            return (*bad, *now)

        setattr(gateway.table, "lookup", lookup)  # noqa: B010 - mypy has no word for it

    def clients(self, cluster: Cluster, port: int, seed: int) -> None:
        """One client after the other, until the storm is over."""
        rng = random.Random(seed)
        while not self.over:
            ip = rng.choice(self.ips)
            try:
                with cluster.socks_blocking(ip, port) as sock:
                    sock.sendall(b"x\n")
                    answer = read_line(sock)
            except SocksRefused:
                self.refused += 1
            except OSError:
                pass  # its agent was killed meanwhile
            else:
                if answer == f"{ip}:x".encode():
                    self.answered[ip] += 1
                elif answer:
                    self.wrong.append((ip, answer))


class NotingRegistry(MemoryRegistry):
    """Tells a storm of all registrations. A freed port does not rest."""

    def __init__(self, storm: Storm) -> None:
        super().__init__(ttl=3.0, quarantine=0.0)
        self._storm = storm

    def register(self, registration: Registration) -> None:
        super().register(registration)
        self._storm.note(registration)


AGENTS_AT_ONCE = 4
PORTS = AGENTS_AT_ONCE + 2  # a node's whole range


#: A storm that is not one by then never will be.
STORM_PATIENCE = 40.0


async def run_storm(
    directory: Path, seed: int, *, enough: Callable[[Storm, Cluster], bool], proof: str = "off"
) -> tuple[Storm, Cluster]:
    """A storm until there was enough of it; nothing of it runs any more afterwards. A slow machine takes longer.

    Proofs would hide it when another line of defence has a hole.
    """
    storm = Storm(random.Random(seed), [f"127.1.1.{n}" for n in range(1, 9)])
    first = Witness(storm.ips[0], free_port())
    for ip in storm.ips[1:]:
        Witness(ip, first.port)
    keys = {"broker__security": "plain", "agent__security": "plain", "agent__backoff_cap": 0.05, "agent__drain": 0.2}
    async with running_cluster(directory, NotingRegistry(storm), **keys) as cluster:
        for node in ("b1", "b2"):
            ports = free_ports(PORTS)
            part = await cluster.start_broker(node, port_range=f"{ports[0]}-{ports[-1]}")
            part.node._registrar._guarded = restless(cluster.registry, ports)
        await cluster.start_gateway(proof=proof)
        storm.poison(cluster.gateway)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(in_thread, lambda n=number: storm.clients(cluster, first.port, seed + n))
            began = time.monotonic()
            while time.monotonic() < began + STORM_PATIENCE and not enough(storm, cluster):
                await change(cluster, storm)
            storm.over = True
    return storm, cluster


def restless(registry: Registry, ports: range) -> PortAllocator:
    """An allocator that gives a freed port to the next one who asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "AVOID", 0.01)
        return PortAllocator(registry, "127.0.0.1", ports[0], ports[-1], quarantine=0.0)


def certificate(cluster: Cluster, agent_id: str, ip: str) -> dict[str, str]:
    """Return the certificate and key of a storm's agent, the same each time: issuing one takes 40 ms."""
    made = cluster.secrets.resolve()
    name = _certificates.get((made, agent_id, ip))
    if name is None:
        name = _certificates[made, agent_id, ip] = cluster.certify(agent_id, ip)
    return {"certificate": str(made / f"{name}.pem"), "key": str(made / f"{name}.key")}


#: By the cluster's directory, the agent_id and the address: the names of their files.
_certificates: dict[tuple[Path, str, str], str] = {}


async def change(cluster: Cluster, storm: Storm) -> None:
    """One agent goes, by kill -9 or in order; another one comes, with any free name and any free IP."""
    rng, alive = storm.rng, cluster.agents
    if len(alive) >= AGENTS_AT_ONCE:
        gone = alive.pop(rng.choice(sorted(alive)))
        if rng.random() < 0.5:
            gone.kill()
        else:
            gone.stop.set()
        await gone.ended.wait()
    names = [name for name in (f"a{n}" for n in range(6)) if name not in alive]
    taken = {part.agent.addresses[0] for part in alive.values()}
    ip = rng.choice([ip for ip in storm.ips if ip not in taken])
    name = rng.choice(names)
    part = await start_agent(cluster, name, ip, **certificate(cluster, name, ip))
    await cluster.until(lambda: part.agent.state != "down")
    storm.changes += 1


def refusals(cluster: Cluster) -> Counter[str]:
    """What brokers refused."""
    counts: Counter[str] = Counter()
    for part in cluster.brokers.values():
        counts.update(part.node.counts.refused)
    return counts


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_storm_of_port_reuse_delivers_nothing_wrong(here: Path, events: Events, seed: int) -> None:
    """Ports go from agent to agent without a rest, routes are stale all the time: no answer is another agent's."""

    def enough(storm: Storm, cluster: Cluster) -> bool:
        """Return whether there was enough of everything: a hole in the defence shows in the first ten answers."""
        refused = refusals(cluster)
        return (
            storm.reused >= 50
            and storm.poisoned >= 500
            and sum(storm.answered.values()) >= 150
            and len(storm.answered) == len(storm.ips)
            and refused["stale_target"] >= 100
            and refused["stale_epoch"] >= 20
        )

    storm, cluster = await run_storm(here, seed, enough=enough)
    told = f"{storm.changes} changes, {storm.reused} reuses, {storm.answered}, {refusals(cluster)}, {storm.poisoned}"
    assert not storm.wrong, f"seed {seed}: {told}; {storm.wrong[:5]}"
    assert enough(storm, cluster), told


@pytest.mark.parametrize("off", ["broker", "agent"])
async def test_either_line_of_defence_is_enough(here: Path, events: Events, off: str) -> None:
    """The same storm, with the checks of all brokers, or of all agents, switched off."""

    def enough(storm: Storm, _: Cluster) -> bool:
        return storm.reused >= 50 and sum(storm.answered.values()) >= 150

    with checks_off(broker=off == "broker", agent=off == "agent"):
        storm, cluster = await run_storm(here, 3, enough=enough)
    assert not storm.wrong, storm.wrong[:5]
    assert enough(storm, cluster)


async def test_the_proof_alone_is_enough(here: Path, events: Events) -> None:
    """With the checks of brokers and agents switched off, wrong agents do answer, and no client gets to hear them."""

    def enough(storm: Storm, _: Cluster) -> bool:
        failed = sum(line["event"] == "proof_failed" for line in events)
        return storm.reused >= 50 and failed >= 10 and sum(storm.answered.values()) >= 150

    with checks_off(broker=True, agent=True):
        storm, cluster = await run_storm(here, 5, enough=enough, proof="required")
    assert not storm.wrong, storm.wrong[:5]
    assert enough(storm, cluster)


async def test_the_storm_finds_a_missing_defence(here: Path, events: Events) -> None:
    """With both switched off it does deliver to wrong agents: the tests above could fail."""
    with checks_off(broker=True, agent=True):
        storm, _ = await run_storm(here, 4, enough=lambda storm, _: bool(storm.wrong))
    assert storm.wrong
    ip, answer = storm.wrong[0]
    assert not answer.startswith(f"{ip}:".encode()) and answer.endswith(b":x")
