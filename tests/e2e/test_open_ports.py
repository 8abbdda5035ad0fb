"""Clients of open ports that flood, and agents that want all of them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import trio

from rtunnel.wire.messages import (
    Publish,
)
from support.attackers import FAST, Attacker, all_told, attack_all, noise, says, told
from support.cluster import Target, in_thread, running_cluster
from support.handmade import enrol, session_of
from support.plumbing import free_range, refusing_port, reset
from support.unharmed import unharmed


async def test_an_open_port_withstands_a_flood_of_connects(here: Path) -> None:
    """Early data is no matter, nor who leaves at once: each byte arrives or its connection is reset, and none stays."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start_broker("b1", open_ports__range=free_range(4), open_ports__allow=["127.0.0.0/8"])
        await cluster.start_gateway()
        target = Target("127.1.0.1")
        await cluster.start_agent("a1", redundancy=1, publish=[{"target": f"127.1.0.1:{target.port}"}])
        await cluster.whole()
        (granted,) = session_of(cluster).open_ports
        address = ("127.0.0.1", granted.port)

        def early(number: int) -> bytes:
            attacker = Attacker(address)
            line = b"%d" % number + b"x" * 50
            attacker.say(line + b"\n")
            attacker.sock.shutdown(socket.SHUT_WR)
            attacker.hear_out()
            return b"" if attacker.answer.startswith(b"127.1.0.1:" + line) else attacker.answer or b"nothing"

        def hurried(_: int) -> bytes:
            attacker = Attacker(address)
            attacker.say(noise(20_000))
            reset(attacker.sock)
            return b""

        async with unharmed(cluster, target):
            wrong: list[bytes] = []

            async def one(number: int) -> None:
                call = hurried if number % 2 else early
                wrong.append(await in_thread(lambda: call(number)))

            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(one, number)
            assert not any(wrong), wrong


async def test_an_open_port_s_target_that_is_gone_is_a_reset(here: Path) -> None:
    """Raw bytes leave no way to say why: the client gets a reset, the log the reason."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start_broker("b1", open_ports__range=free_range(4), open_ports__allow=["127.0.0.0/8"])
        await cluster.start_gateway()
        target = Target("127.1.0.1")
        refused = refusing_port("127.1.0.1")
        await cluster.start_agent("a1", redundancy=1, publish=[{"target": f"127.1.0.1:{refused}"}], exposes=["1-65535"])
        await cluster.whole()
        (granted,) = session_of(cluster).open_ports
        async with unharmed(cluster, target) as logs:
            done = await attack_all(("127.0.0.1", granted.port), {"one": says(b"early"), "two": says(b"", fin=True)})
            await all_told(cluster, logs, done)
        for attacker in done.values():
            assert attacker.ending == "reset"
            assert told(logs, attacker).startswith("open_port_refused: target_refused")


async def test_one_agent_does_not_take_all_open_ports(here: Path, secrets: Path) -> None:
    """An agent that comes again and again with other targets has its share, quarantine included. Others get theirs."""
    keys: dict[str, Any] = {"broker__open_ports__range": free_range(8), "broker__open_ports__allow": ["127.0.0.0/8"]}
    async with running_cluster(here, broker__open_ports__per_agent=3, registry__quarantine=60.0, **keys) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node

        async def granted(agent: str, ip: str, first: int) -> tuple[list[int], list[str]]:
            publish = [Publish(ip=ip, target_port=first + n) for n in range(4)]
            wire, welcome = await in_thread(
                lambda: enrol(node.bound, secrets, agent_id=agent, addresses=[ip], publish=publish)
            )
            wire.close()
            await cluster.until(lambda: f"default/{agent}" not in node.sessions)
            return sorted(port.port for port in welcome.open_ports), welcome.notices

        first, notices = await granted("greedy", "127.1.7.7", 1000)
        assert len(first) == 3 and "broker.open_ports.per_agent" in notices[0]
        again, notices = await granted("greedy", "127.1.7.7", 2000)
        assert not again and len(notices) == 4
        assert (await granted("greedy", "127.1.7.7", 1000))[0] == first  # its own come back
        assert len((await granted("modest", "127.1.7.8", 1000))[0]) == 3
