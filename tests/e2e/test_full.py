"""Roles that have no places, descriptors or memory left: they refuse, lose nobody, and recover."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from rtunnel.relay.memory import START_WINDOW
from rtunnel_broker.session import HELD_PART
from support.attackers import FAST, Attacker, attack_all, says
from support.cluster import SocksRefused, Target, in_thread, read_line, running_cluster
from support.handmade import session_of
from support.logs import Events, named
from support.unharmed import holdings, settled


async def test_a_full_gateway_shuts_the_door_and_opens_it_again(here: Path) -> None:
    """Clients that begin and fall silent hold every place until their deadline: others are closed at once, counted,
    and served later. (Who says nothing at all is not even accepted.)"""
    async with running_cluster(here, gateway__max_clients=8, **FAST | {"gateway__handshake_timeout": 3.0}) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        stream = await cluster.socks(target.ip, target.port)
        counts = cluster.gateway.counts
        with capture_logs() as logs:
            idle = [Attacker(cluster.gateway.bound) for _ in range(7)]
            for attacker in idle:
                attacker.sock.sendall(b"\5")
            await cluster.until(lambda: counts.clients == 7)
            turned = await attack_all(cluster.gateway.bound, {str(n): says(b"\5") for n in range(5)})
            assert all(attacker.seconds < 3.0 for attacker in turned.values())
            assert counts.refused == {"overloaded": 5}
            stream.sendall(b"mine\n")
            assert await in_thread(lambda: read_line(stream)) == b"127.1.0.1:mine"
            await cluster.until(lambda: counts.clients == 0)
        assert [entry["code"] for entry in logs if entry["event"] == "client_shut_out"] == ["overloaded"]
        stream.close()
        for attacker in idle:
            attacker.sock.close()
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        await cluster.until(lambda: not (counts.clients or counts.streams or cluster.gateway.relay.pairs))


SWARM = """
import socket, sys
held = []
sys.stdin.readline()
for port in map(int, sys.argv[1:]):
    for _ in range(30):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        held.append(sock)
sys.stdin.readline()
"""


async def test_out_of_descriptors_nobody_is_lost_and_all_comes_back(here: Path) -> None:
    """A swarm takes the last descriptors: streams and sessions live, the log says so, and afterwards all is served."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        stream = await cluster.socks(target.ip, target.port)
        await settled(cluster)
        ports = [cluster.gateway.bound[1], cluster.brokers["b1"].node.bound[1], session_of(cluster).port]
        swarm = subprocess.Popen(
            [sys.executable, "-c", SWARM, *map(str, ports)], stdin=subprocess.PIPE, bufsize=0, text=False
        )
        assert swarm.stdin is not None
        before = holdings(cluster)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        plugs: list[int] = []
        try:
            with capture_logs() as logs:
                resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
                with pytest.raises(OSError, match="Too many open files"):
                    while True:
                        plugs.append(os.dup(0))
                for _ in range(3):
                    os.close(plugs.pop())
                swarm.stdin.write(b"go\n")
                await cluster.until(lambda: {"broker", "gateway"} <= paused(logs))
                stream.sendall(b"still here\n")
                assert await in_thread(lambda: read_line(stream)) == b"127.1.0.1:still here"
                assert cluster.agents["a1"].agent.state == "ready"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for plug in plugs:
                os.close(plug)
            swarm.stdin.close()
            await in_thread(swarm.wait)
        assert not [entry for entry in logs if entry["event"] == "relay_crashed"]
        await cluster.until(lambda: all(now <= before[key] for key, now in holdings(cluster).items()))
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


def paused(logs: Events) -> set[str]:
    """Which components stopped accepting for a while."""
    return {entry["component"] for entry in logs if entry["event"] == "accept_paused"}


@pytest.mark.parametrize("who", ["agent", "broker", "one agent at the broker"])
async def test_who_holds_too_much_takes_no_new_streams(here: Path, who: str) -> None:
    """Above its memory for streams a process refuses new ones as overloaded, and says so; below it serves again."""
    async with running_cluster(here) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        broker, agent = cluster.brokers["b1"], cluster.agents["a1"]
        link, own = broker.node.sessions["default/a1"].link, next(iter(agent.agent.relay.links))
        assert link is not None
        assert link.start_window == own.start_window == START_WINDOW
        part = agent if who == "agent" else broker
        memory = part.role.relay.memory
        hold, release, size = memory.hold, memory.release, memory.budget + 1
        if who == "one agent at the broker":
            hold, release, size = link.hold, link.release, memory.budget // HELD_PART + 1
        with capture_logs() as logs:
            await part.in_relay(lambda: hold(size))
            with pytest.raises(SocksRefused):
                await cluster.socks(target.ip, target.port)
            await part.in_relay(lambda: release(size))
            assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        (failed,) = named(logs, "tuple_failed")
        assert failed["code"] == "overloaded" and "that stall" in failed["reason"]
        assert "stream_memory" in failed["reason"]
