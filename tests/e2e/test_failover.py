"""What goes on when parts die, drain, restart or fall silent: real roles, real sockets, real clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from rtunnel.config import RegistryConfig
from rtunnel.errors import Superseded
from rtunnel.net import listening_socket
from rtunnel.registry import COUNTER_BITS, Beat, NodeRecord, Registration, Tuple, connect, incarnation_of
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.wire.refusal import Refusal
from rtunnel_agent.race import Outcome
from support.cluster import HEDGE_DELAY, Cluster, Part, SocksRefused, Target, in_thread, read_line, running_cluster
from support.logs import Events, named
from support.plumbing import dial, free_range, kept, read_all, reset, running_relay
from support.redis_server import RedisServer

#: So long a link may be silent until it is given up.
SILENCE = 15.0
#: Of the tests about it: long enough that nobody is late who is only slow.
HEDGE = 1.0


def epochs(part: Part) -> dict[str, tuple[int, int]]:
    """node -> (epoch, PS port) of the agent's sessions that are up."""
    found = {}
    for slot in part.agent.slots:
        if slot.session is not None and slot.session.welcome is not None:
            found[slot.session.node] = (slot.session.welcome.epoch, slot.session.welcome.port)
    return found


def say(sock: socket.socket, line: bytes = b"still there") -> bytes:
    """A line on an open stream, and its answer; empty when the stream is gone."""
    try:
        sock.sendall(line + b"\n")
        return read_line(sock)
    except OSError:
        return b""


@dataclass
class Traffic:
    """Connections one after the other, from another thread: each a SOCKS request, a line, an answer."""

    cluster: Cluster
    target: Target
    seconds: list[float] = field(default_factory=list)  # until the gateway's reply
    refused: list[str] = field(default_factory=list)  # connections that failed
    cut: int = 0  # streams that were up and ended without an answer
    wrong: list[bytes] = field(default_factory=list)
    over: bool = False

    @property
    def tries(self) -> int:
        return len(self.seconds) + len(self.refused)

    def run(self) -> None:
        while not self.over:
            began = time.monotonic()
            try:
                sock = self.cluster.socks_blocking(self.target.ip, self.target.port)
            except (SocksRefused, OSError) as error:
                self.refused.append(f"try {self.tries}: {error!r}")
                continue
            self.seconds.append(time.monotonic() - began)
            with sock:
                answer = say(sock, b"hello")
            if not answer:
                self.cut += 1
            elif answer != f"{self.target.ip}:hello".encode():
                self.wrong.append(answer)


@asynccontextmanager
async def traffic(cluster: Cluster, target: Target) -> AsyncIterator[Traffic]:
    """Traffic during the block; at its end nothing may have gone to a wrong target."""
    runs = Traffic(cluster, target)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, runs.run)
        try:
            yield runs
        finally:
            runs.over = True
    assert not runs.wrong


# --- death --------------------------------------------------------------------------------------------------


async def test_a_killed_broker_fails_no_new_connection(tmp_path: Path, events: Events) -> None:
    """kill -9 amid traffic: every try before and after is connected; its node is passed over from the second try on."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        target = Target("127.1.0.1")
        async with traffic(cluster, target) as runs:
            await cluster.until(lambda: runs.tries >= 30)
            cluster.brokers["b1"].kill()
            killed_at = len(runs.seconds)
            await cluster.until(lambda: runs.tries >= killed_at + 100)
        assert not runs.refused
        assert runs.cut <= 1  # the one that was open through b1
        assert max(runs.seconds) < HEDGE_DELAY
        await cluster.until(lambda: len(named(events, "stream_ended")) == len(runs.seconds))
        ended = named(events, "stream_ended")
        assert {line["node"] for line in ended[:killed_at]} == {"b1", "b2"}
        assert sum(line["attempts"] for line in ended[killed_at + 2 :]) <= len(ended[killed_at + 2 :]) + 1
        assert {line["node"] for line in ended[killed_at + 2 :]} == {"b2"}


async def test_redundancy_returns_with_a_third_broker(tmp_path: Path) -> None:
    """1/2 after the death of one of two brokers, with the reason; 2/2 soon after another one exists."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        agent = cluster.agents["a1"].agent
        cluster.brokers.pop("b1").kill()
        await cluster.until(lambda: agent.redundancy == "1/2")
        assert agent.state == "degraded" and agent.reasons()
        await cluster.start_broker("b3")
        await cluster.whole()
        assert set(epochs(cluster.agents["a1"])) == {"b2", "b3"}
        # The dead node's tuple is gone with its heartbeat, with nobody to clean up.
        await cluster.until(
            lambda: {t.node for t in cluster.gateway.table.lookup("default", "127.1.0.1")} == {"b2", "b3"}
        )
        assert {t.node for t in cluster.registry.lookup("default", "127.1.0.1")} == {"b2", "b3"}


async def test_streams_on_the_surviving_node_live_on(tmp_path: Path) -> None:
    """Streams are spread over both nodes; a death cuts those of the dead one, and no other."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        target = Target("127.1.0.1")
        socks = [await cluster.socks(target.ip, target.port) for _ in range(10)]
        b1, b2 = (cluster.brokers[node].node for node in ("b1", "b2"))
        await cluster.until(lambda: b1.counts.streams + b2.counts.streams == 10)
        assert (b1.counts.streams, b2.counts.streams) == (5, 5)
        cluster.brokers["b1"].kill()
        answers = [await in_thread(lambda sock=sock: say(sock)) for sock in socks]  # type: ignore[misc]
        assert sorted(answers) == [b""] * 5 + [b"127.1.0.1:still there"] * 5


async def test_a_restarted_agent_takes_over_at_once(tmp_path: Path, events: Events) -> None:
    """Its old links are still believed in (no FIN, no RST): same ports, new epochs, and no waiting for a timeout."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        target = Target("127.1.0.1")
        old = cluster.agents["a1"]
        before = epochs(old)
        frozen, thaw = threading.Event(), threading.Event()

        def freeze() -> None:
            frozen.set()
            thaw.wait()

        old.agent.relay.call(freeze)
        try:
            await in_thread(frozen.wait)
            began = time.monotonic()
            new = await cluster.start_agent("a1")
            await cluster.whole()
            assert time.monotonic() - began < SILENCE
            after = epochs(new)
            assert {node: port for node, (_, port) in after.items()} == {n: p for n, (_, p) in before.items()}
            assert all(after[node][0] > before[node][0] for node in before)
            for node in ("b1", "b2"):
                assert len(cluster.brokers[node].node.sessions) == 1
            for _ in range(4):
                assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"

            def ended() -> set[str]:
                lines = [line for line in named(events, "session_ended") if "node" in line]
                return {line["epoch"] for line in lines if "replaced" in line["reason"]}

            await cluster.until(lambda: ended() == {str(epoch) for epoch, _ in before.values()})
        finally:
            old.scope.cancel()
            thaw.set()
        await old.ended.wait()
        assert {t.epoch for t in cluster.registry.lookup("default", "127.1.0.1")} == {e for e, _ in after.values()}
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


def test_a_port_is_free_as_soon_as_its_listener_is_closed() -> None:
    """Else a session that replaces another one would sometimes not get its port back."""
    with running_relay() as relay:

        def close_and_listen() -> None:
            listener = relay.listen(listening_socket("127.0.0.1", 0), lambda sock, peer: sock.close())
            host, port = listener.sock.getsockname()
            relay.unlisten(listener)
            relay.unlisten(relay.listen(listening_socket(host, port), lambda sock, peer: sock.close()))

        relay.do(close_and_listen)


async def test_a_restarted_broker_purges_what_it_left(tmp_path: Path) -> None:
    """The same node_id again: a higher incarnation, no tuple of the earlier one, the agents back on the same port."""
    ranges = {"b1": free_range(50), "b2": free_range(50)}
    async with running_cluster(tmp_path) as cluster:
        for name, ports in ranges.items():
            ip = f"127.0.0.{name[1]}"  # ports are remembered by PS IP
            await cluster.start_broker(name, port_range=ports, listen=f"{ip}:0", advertise_ip=ip)
        await cluster.start_gateway()
        part = await cluster.start_agent("a1")
        await cluster.whole()
        target = Target("127.1.0.1")
        before, first = epochs(part), cluster.brokers["b1"].node.presence.incarnation
        cluster.brokers["b1"].kill()
        assert {t.node for t in cluster.registry.lookup("default", target.ip)} == {"b1", "b2"}
        cluster.vip.pinned = cluster.vip.backends[1]  # nobody finds the new b1 yet
        node = (await cluster.start_broker("b1", port_range=ranges["b1"])).node
        assert node.presence.incarnation > first
        assert {t.node for t in cluster.registry.lookup("default", target.ip)} == {"b2"}
        await cluster.until(lambda: {t.node for t in cluster.gateway.table.lookup("default", target.ip)} == {"b2"})
        cluster.vip.pinned = None
        await cluster.until(lambda: incarnation_of(epochs(part).get("b1", (0, 0))[0]) == node.presence.incarnation)
        await cluster.whole()
        epoch, port = epochs(part)["b1"]
        assert incarnation_of(epoch) == node.presence.incarnation and port == before["b1"][1]
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


async def test_of_two_brokers_with_one_node_id_the_older_ends(tmp_path: Path, events: Events) -> None:
    """It ends with Superseded at its next heartbeat, and takes nothing of the newer one's along."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b2")
        await cluster.start_gateway()
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                other = Cluster(tmp_path, nursery, cluster.registry)
                kept(other.vip.sock)
                older = await other.start_broker("b1", port_range=free_range(50))
                cluster.vip.backends.append((older.node.bound[0], older.node.bound[1]))
                part = await cluster.start_agent("a1")
                await cluster.whole()
                await cluster.start_broker("b1", port_range=free_range(50))
                await older.ended.wait()
                await trio.sleep_forever()  # until its failure ends this nursery
        assert caught.value.split(Superseded)[1] is None
        assert named(events, "node_superseded")[0]["node"] == "b1"
        newer = cluster.brokers["b1"].node
        await cluster.until(lambda: incarnation_of(epochs(part).get("b1", (0, 0))[0]) == newer.presence.incarnation)
        await cluster.whole()
        for _ in range(3):  # heartbeats
            await newer.presence.beat()
        target = Target("127.1.0.1")
        assert {t.node for t in cluster.registry.lookup("default", target.ip)} == {"b1", "b2"}
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


# --- silence ------------------------------------------------------------------------------------------------


def silent_socket(*, accepts: bool) -> socket.socket:
    """A listening socket that never answers: the kernel accepts connections, or drops every SYN."""
    sock = kept(socket.create_server(("127.0.0.1", 0), backlog=64 if accepts else 0))
    for _ in range(0 if accepts else 3):
        filler = kept(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(sock.getsockname())
    return sock


def add_ghost(cluster: Cluster, ip: str, ps_port: int) -> Tuple:
    """A live node in the registry, with a tuple for this IP that leads to a port of ours."""
    record = NodeRecord(node="ghost", host="ghost", ip="127.0.0.1", incarnation=0)
    epoch = cluster.registry.start_node(record) << COUNTER_BITS | 1
    ghost = Tuple(
        namespace="default", agent_ip=ip, agent_port=0, ps_ip="127.0.0.1", ps_port=ps_port, node="ghost", epoch=epoch,
        agent_id="a1", exposes="1-65535",
    )  # fmt: skip
    cluster.registry.register(Registration(epoch, (ghost,), ()))
    return ghost


@pytest.mark.parametrize("accepts", [True, False], ids=["swallows Dials", "swallows SYNs"])
async def test_a_silent_broker_costs_one_hedge_delay_once(tmp_path: Path, events: Events, accepts: bool) -> None:
    """The first connection is late by the hedge delay; for those after it the node is suspect, and they are not."""
    silent = silent_socket(accepts=accepts)
    async with running_cluster(tmp_path, MemoryRegistry(60.0, 60.0), gateway__hedge_delay=HEDGE) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        busy = await cluster.socks(target.ip, target.port)  # so that the ghost, which has no stream, comes first
        add_ghost(cluster, target.ip, silent.getsockname()[1])
        await cluster.until(lambda: len(cluster.gateway.table.lookup("default", target.ip)) == 2)
        await cluster.until(lambda: "ghost" in cluster.gateway.table.nodes)
        began = time.monotonic()
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        assert time.monotonic() - began >= HEDGE
        for _ in range(3):
            assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        busy.close()
        await cluster.until(lambda: len(named(events, "stream_ended")) == 5)
        attempts = [line["attempts"] for line in named(events, "stream_ended")]
        assert sorted(attempts) == [1, 1, 1, 1, 2]


async def test_a_slow_target_is_dialled_once(tmp_path: Path, events: Events) -> None:
    """Its SYN queue is full for a second, far over the hedge delay: one connection to it, over one broker."""
    server = kept(socket.create_server(("127.1.0.1", 0), backlog=0))
    port = server.getsockname()[1]
    fillers = [kept(socket.socket()) for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(("127.1.0.1", port))
    hedge = 0.6
    async with running_cluster(tmp_path, gateway__hedge_delay=hedge) as cluster:
        await cluster.start(brokers=2)
        agent = cluster.agents["a1"].agent
        nodes = [part.node for part in cluster.brokers.values()]
        server.settimeout(0.0)
        peers: list[int] = []
        mine = {filler.getsockname()[1] for filler in fillers}

        def accept() -> bool:
            try:
                sock, address = server.accept()
            except BlockingIOError:
                return False
            kept(sock)
            if address[1] not in mine:
                peers.append(address[1])
            return True

        clients: list[socket.socket] = []

        async def client() -> None:
            clients.append(await cluster.socks("127.1.0.1", port))

        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(client)
            await cluster.until(lambda: trio.current_time() > began + 1.5 * hedge)
            assert agent.targets.counts.accepted == 0
            await cluster.until(lambda: accept() and bool(peers))
        while accept():
            pass
        await cluster.until(lambda: agent.targets.counts.accepted == 1)
        assert len(peers) == 1
        assert sorted(node.counts.accepted for node in nodes) == [0, 1]
        assert agent.targets.counts.refused == {}
        reset(clients[0])
        await cluster.until(lambda: bool(named(events, "stream_ended")))
        assert named(events, "stream_ended")[0]["attempts"] == 1


# --- drain --------------------------------------------------------------------------------------------------


async def test_a_draining_node_is_a_step_of_the_search(tmp_path: Path) -> None:
    """An agent with a session elsewhere goes on to the next node at once; one without backs off."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        agent = cluster.agents["a1"].agent
        first, second = agent.slots
        draining = Outcome(code=Refusal.DRAINING, lost=Lost(LostKind.REFUSED, "draining"))
        backoff = first.backoff
        await agent._wait(first, draining)
        assert (first.searches, first.backoff) == (1, backoff)
        held, first.session, second.session = (first.session, second.session), None, None
        await agent._wait(first, draining)
        assert (first.searches, first.backoff) == (1, 2 * backoff)
        first.session, second.session = held


async def test_a_draining_broker_loses_nothing(tmp_path: Path, events: Events) -> None:
    """Replacements come up before anything ends, open streams finish, no connection fails, and it ends early."""
    drain = 30.0
    async with running_cluster(tmp_path, broker__drain=drain) as cluster:
        await cluster.start(brokers=3, agents=3)
        target = Target("127.1.0.1")
        first, second = (cluster.brokers[node] for node in sorted(epochs(cluster.agents["a1"])))
        streams = [await cluster.socks(target.ip, target.port) for _ in range(4)]
        await cluster.until(lambda: first.node.counts.streams + second.node.counts.streams == 4)
        lowest: list[int] = []
        agents = [part.agent for part in cluster.agents.values()]

        def observe() -> None:
            """Sessions that could carry a stream: those in slots, and those of draining nodes."""
            up = [sum(slot.session is not None for slot in a.slots) + len(a.draining) for a in agents]
            lowest.append(min(up))

        async with traffic(cluster, target) as runs:
            await cluster.until(lambda: runs.tries >= 20)
            began = time.monotonic()
            first.stop.set()

            def moved() -> bool:
                observe()
                away = all(first.node.node not in epochs(part) for part in cluster.agents.values())
                return away and all(agent.state == "ready" for agent in agents)

            await cluster.until(moved)
            assert not first.ended.is_set() and first.node.counts.streams >= 2
            for sock in streams:
                assert await in_thread(lambda sock=sock: say(sock)) == b"127.1.0.1:still there"  # type: ignore[misc]
            done = runs.tries
            await cluster.until(lambda: runs.tries >= done + 50)
            for sock in streams:
                sock.shutdown(socket.SHUT_WR)
                assert (await in_thread(lambda sock=sock: read_all(sock))).startswith(b"127.1.0.1 ")  # type: ignore[misc]
            await first.ended.wait()
            took = time.monotonic() - began
            done = runs.tries
            await cluster.until(lambda: runs.tries >= done + 50)
        assert not runs.refused and not runs.cut
        assert min(lowest) >= 2
        assert took < drain
        assert max(runs.seconds) < HEDGE_DELAY
        gone = first.node.node
        assert gone not in {node.node for node in cluster.registry.nodes()}
        assert gone not in {t.node for ip in ("127.1.0.1", "127.1.0.2") for t in cluster.registry.lookup("default", ip)}
        assert [line["streams_cut"] for line in named(events, "broker_stopped")] == [0]


async def test_a_drain_deadline_cuts_what_is_left(tmp_path: Path, events: Events) -> None:
    """An open stream does not hold the broker up: at the deadline it is cut, counted, and the node ends."""
    async with running_cluster(tmp_path, broker__drain=0.6) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        sock = await cluster.socks(target.ip, target.port)
        assert say(sock) == b"127.1.0.1:still there"
        began = time.monotonic()
        await cluster.brokers["b1"].shut()
        took = time.monotonic() - began
        assert 0.6 <= took < 5.0
        assert await in_thread(lambda: say(sock)) == b""
        assert cluster.registry.lookup("default", target.ip) == []
        assert cluster.registry.nodes() == []
        assert [line["streams_cut"] for line in named(events, "broker_stopped")] == [1]


async def test_a_draining_gateway_serves_what_it_has(tmp_path: Path, events: Events) -> None:
    """No new clients; an open stream goes on; it ends with the last one, before its deadline."""
    async with running_cluster(tmp_path, gateway__drain=10.0) as cluster:
        await cluster.start(brokers=1, agents=1)
        target = Target("127.1.0.1")
        sock = await cluster.socks(target.ip, target.port)
        part = next(p for p in cluster.parts if p.role is cluster.gateway)
        address = cluster.gateway.bound
        part.stop.set()
        await cluster.until(lambda: not listens(address))
        assert cluster.gateway.reasons() == ["draining"]
        assert await in_thread(lambda: say(sock)) == b"127.1.0.1:still there"
        assert not part.ended.is_set()
        began = time.monotonic()
        sock.close()
        await part.ended.wait()
        assert time.monotonic() - began < 5.0
        assert [line["streams_cut"] for line in named(events, "gateway_stopped")] == [0]


async def test_a_gateway_cuts_at_its_deadline(tmp_path: Path, events: Events) -> None:
    """Neither an open stream nor a client that says nothing holds it up for longer."""
    async with running_cluster(tmp_path, gateway__drain=0.5) as cluster:
        await cluster.start(brokers=1, agents=1)
        target = Target("127.1.0.1")
        sock = await cluster.socks(target.ip, target.port)
        mute = kept(socket.create_connection(cluster.gateway.bound))
        await cluster.until(lambda: cluster.gateway.counts.clients == 1)
        began = time.monotonic()
        await next(p for p in cluster.parts if p.role is cluster.gateway).shut()
        assert 0.5 <= time.monotonic() - began < 5.0
        assert await in_thread(lambda: say(sock)) == b""
        mute.settimeout(5)
        assert not say(mute)
        assert [line["streams_cut"] for line in named(events, "gateway_stopped")] == [1]


async def test_an_agent_that_leaves_is_gone_at_once(tmp_path: Path, events: Events) -> None:
    """SIGTERM: streams finish, then Bye; its tuples leave registry and gateway at once, its ports rest."""
    ttl = 20.0
    async with running_cluster(tmp_path, MemoryRegistry(ttl=ttl, quarantine=ttl)) as cluster:
        await cluster.start(brokers=2, agents=2)
        target = Target("127.1.0.1")
        part = cluster.agents.pop("a1")
        ports = epochs(part)
        sock = await cluster.socks(target.ip, target.port)
        part.stop.set()
        assert await in_thread(lambda: say(sock)) == b"127.1.0.1:still there"
        assert not part.ended.is_set()
        sock.shutdown(socket.SHUT_WR)
        assert (await in_thread(lambda: read_all(sock))).startswith(b"127.1.0.1 ")
        began = time.monotonic()
        await part.ended.wait()
        await cluster.until(lambda: not cluster.registry.lookup("default", target.ip))
        await cluster.until(lambda: not cluster.gateway.table.lookup("default", target.ip))
        assert time.monotonic() - began < ttl
        with pytest.raises(SocksRefused) as caught:
            await cluster.socks(target.ip, target.port)
        assert caught.value.code == 0x04
        for node in ("b1", "b2"):
            assert not listens(("127.0.0.1", ports[node][1]))
            counts = cluster.brokers[node].node._registrar._guarded.counts()
            assert (counts.in_use, counts.quarantined) == (1, 1)

        def down() -> list[str]:
            return [line["reason"] for line in named(events, "session_ended") if line.get("node")]

        await cluster.until(lambda: len(down()) == 2)
        assert down() == ["agent said goodbye: the agent leaves"] * 2
        assert [line["streams_cut"] for line in named(events, "agent_stopped")] == [0]
        assert await cluster.ask("127.1.0.2", Target("127.1.0.2").port) == b"127.1.0.2:hello"


def epochs_of(lines: Events, event: str, key: str) -> list[str]:
    """The epochs of one event's lines, of the brokers (`key` "node") or of the agents ("broker")."""
    return sorted(line["epoch"] for line in named(lines, event) if key in line)


async def test_every_session_that_was_up_goes_down_once_at_each_end(tmp_path: Path, events: Events) -> None:
    """A drain that cuts a stream, a killed agent and an agent's stop: one line each, with the streams that it cut."""
    async with running_cluster(tmp_path, broker__drain=0.6, agent__drain=0.2) as cluster:
        await cluster.start(brokers=2)
        target = Target("127.1.0.1")
        streams = [await cluster.socks(target.ip, target.port) for _ in range(4)]
        for sock in streams:
            assert await in_thread(lambda sock=sock: say(sock)) == b"127.1.0.1:still there"  # type: ignore[misc]
        await cluster.brokers["b1"].shut()
        await cluster.until(lambda: len(epochs_of(events, "session_ended", "broker")) == 1)
        await cluster.agents["a1"].shut()
        await cluster.until(lambda: len(epochs_of(events, "session_ended", "node")) == 2)
    for key in ("node", "broker"):
        assert len(epochs_of(events, "session_opened", key)) == 2
        assert epochs_of(events, "session_ended", key) == epochs_of(events, "session_opened", key)
    down = [line for line in named(events, "session_ended") if "node" in line]
    assert [line["cause"] for line in down] == ["closed", "closed"]
    assert sum(line["streams_cut"] for line in down) == 4
    drained = [line["broker"] for line in named(events, "session_drain_started")]
    assert drained == ["b1"]


async def test_an_agent_cuts_at_its_deadline(tmp_path: Path, events: Events) -> None:
    """A stream that does not end is cut and counted."""
    async with running_cluster(tmp_path, agent__drain=0.5) as cluster:
        await cluster.start(brokers=2)
        target = Target("127.1.0.1")
        sock = await cluster.socks(target.ip, target.port)
        assert say(sock) == b"127.1.0.1:still there"
        began = time.monotonic()
        await cluster.agents["a1"].shut()
        assert 0.5 <= time.monotonic() - began < 5.0
        assert await in_thread(lambda: say(sock)) == b""
        assert [line["streams_cut"] for line in named(events, "agent_stopped")] == [1]


# --- the registry -------------------------------------------------------------------------------------------


MakeRedis = Callable[..., RedisServer]


@asynccontextmanager
async def redis_cluster(directory: Path, server: RedisServer, timeout: float = 1.0) -> AsyncIterator[Cluster]:
    """Two brokers and three agents on a Redis."""
    registry = connect(RegistryConfig(url=server.url, ttl=3.0, quarantine=5.0, timeout=timeout))
    try:
        async with running_cluster(directory, registry) as cluster:
            await cluster.start(brokers=2, agents=3)
            yield cluster
    finally:
        registry.close()


def tuples_in(cluster: Cluster) -> set[tuple[str, str, int, int]]:
    return {(t.agent_ip, t.node, t.ps_port, t.epoch) for t in cluster.registry.snapshot().tuples}


async def test_a_wiped_registry_is_whole_within_a_heartbeat(tmp_path: Path, make_redis: MakeRedis) -> None:
    """FLUSHALL amid traffic: no connection notices, and the brokers put everything back."""
    server = make_redis().start()
    async with redis_cluster(tmp_path, server) as cluster:
        target = Target("127.1.0.1")
        before = tuples_in(cluster)
        assert len(before) == 6
        beats: set[str] = set()  # nodes with a whole heartbeat after the wipe
        wiped = threading.Event()
        beat = cluster.registry.beat

        def noting(record: NodeRecord, registrations: list[Registration]) -> Beat:
            after = wiped.is_set()
            done = beat(record, registrations)
            if after:
                beats.add(record.node)
            return done

        cluster.registry.beat = noting  # type: ignore[method-assign]
        async with traffic(cluster, target) as runs:
            await cluster.until(lambda: runs.tries >= 20)
            with server.client() as client:
                client.flushall()
            wiped.set()
            await cluster.until(lambda: beats == {"b1", "b2"})
            assert tuples_in(cluster) == before
            done = runs.tries
            await cluster.until(lambda: runs.tries >= done + 50)
        assert not runs.refused and not runs.cut
        assert {node.node for node in cluster.registry.nodes()} == {"b1", "b2"}
        # Gateways go on following: a newcomer is known soon, an agent that leaves is gone.
        await cluster.start_agent("a4", "127.1.0.4")
        await cluster.whole()
        await cluster.agents.pop("a4").shut()
        await cluster.until(lambda: not cluster.gateway.table.lookup("default", "127.1.0.4"))


async def test_a_registry_outage_is_not_noticed_by_traffic(tmp_path: Path, make_redis: MakeRedis) -> None:
    """Redis dead, then back empty: nobody disconnects, gateways serve what they know and say what they don't."""
    server = make_redis().start()
    async with redis_cluster(tmp_path, server) as cluster:
        target = Target("127.1.0.1")
        before = tuples_in(cluster)
        nodes = [part.node for part in cluster.brokers.values()]
        stream = await cluster.socks(target.ip, target.port)
        async with traffic(cluster, target) as runs:
            server.kill()
            await cluster.until(lambda: all(node.presence.down for node in nodes))
            await cluster.until(lambda: bool(cluster.gateway.resolver.down))
            assert all("registry" in node.reasons()[0] for node in nodes)
            assert cluster.gateway.reasons() == []  # it serves
            began = time.monotonic()
            await cluster.until(lambda: time.monotonic() > began + 4.0)  # longer than ttl, and than any grace
            with pytest.raises(SocksRefused) as caught:
                await cluster.socks("127.9.9.9", 80)
            assert caught.value.code == 0x01
            done = runs.tries
            await cluster.until(lambda: runs.tries >= done + 20)
            server.start()
            await cluster.until(lambda: tuples_in(cluster) == before)
            await cluster.until(lambda: not any(node.presence.down for node in nodes))
            await cluster.until(lambda: not cluster.gateway.resolver.down)
            done = runs.tries
            await cluster.until(lambda: runs.tries >= done + 20)
        assert not runs.refused and not runs.cut
        assert max(runs.seconds) < HEDGE_DELAY
        assert all(part.agent.redundancy == "2/2" for part in cluster.agents.values())
        assert await in_thread(lambda: say(stream)) == b"127.1.0.1:still there"


async def test_a_registry_that_hangs_delays_no_connection(tmp_path: Path, make_redis: MakeRedis) -> None:
    """Redis is stopped (it accepts, and answers nothing): the data plane does not wait for it."""
    server = make_redis().start()
    timeout = 2.0
    async with redis_cluster(tmp_path, server, timeout) as cluster:
        target = Target("127.1.0.1")
        nodes = [part.node for part in cluster.brokers.values()]
        server.freeze()
        try:
            async with traffic(cluster, target) as runs:
                await cluster.until(lambda: all(node.presence.down for node in nodes))
                await cluster.until(lambda: runs.tries >= 100)
        finally:
            server.thaw()
        assert not runs.refused and not runs.cut
        assert max(runs.seconds) < timeout
        await cluster.until(lambda: not any(node.presence.down for node in nodes))


# --- helpers ------------------------------------------------------------------------------------------------


def listens(address: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0


# --- a gateway that is told to stop -------------------------------------------------------------------------


async def test_a_stopping_gateway_serves_new_clients_while_the_vip_learns_it(tmp_path: Path) -> None:
    """Not ready at once, but nobody is refused in the lame-duck phase, and streams of that time live on."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        part = await cluster.start_gateway(lame_duck=600.0)
        await cluster.whole()
        target = Target("127.1.0.1")
        async with traffic(cluster, target) as runs:
            await cluster.until(lambda: runs.tries >= 5)
            part.stop.set()
            await cluster.until(lambda: part.gateway.reasons() == ["draining"])
            begun = runs.tries
            await cluster.until(lambda: runs.tries >= begun + 50)
        assert not runs.refused and not runs.cut


async def test_a_gateway_serves_what_waits_when_it_closes_its_port(tmp_path: Path) -> None:
    """Clients in the kernel's queue at that moment have connected: they get their streams, and the drain waits."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        part = await cluster.start_gateway()
        await cluster.whole()
        target = Target("127.1.0.1")
        gateway = part.gateway
        (listener,) = gateway.relay.listeners
        await gateway.bridge.run(listener.hold)
        request = f"CONNECT {target.ip}:{target.port} HTTP/1.1\r\nHost: x\r\n\r\nhello\n".encode()
        clients = [await in_thread(lambda: dial(gateway.bound)) for _ in range(20)]
        for client in clients:
            client.sendall(request)
        part.stop.set()
        for client in clients:
            head, _, answer = (await in_thread(lambda client=client: _until_hello(client))).partition(b"\r\n\r\n")  # type: ignore[misc]
            assert head.startswith(b"HTTP/1.1 200 ") and answer == b"127.1.0.1:hello\n"
            client.close()
        await part.ended.wait()


def _until_hello(client: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"hello\n") and (piece := client.recv(4096)):
        data += piece
    return data
