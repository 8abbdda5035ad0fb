"""An attacker at the admin ports of all roles."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from rtunnel import admin
from support.attackers import (
    DEADLINE,
    FAST,
    Address,
    Attack,
    Attacker,
    admin_ports,
    attack_all,
    noise,
    probe,
    says,
    trickles,
)
from support.cluster import Target, in_thread, running_cluster
from support.unharmed import unharmed


async def test_the_admin_ports_withstand_everything(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad requests get their status, slow ones the deadline, and probes are answered all the while."""
    monkeypatch.setattr(admin, "DEADLINE", DEADLINE)
    monkeypatch.setattr(admin, "LINGER", 0.1)
    attacks: dict[str, tuple[Attack, bytes]] = {
        "garbage": (says(noise(1 << 16)), b""),
        "a TLS ClientHello": (says(b"\x16\3\1\2\0\1" + bytes(600)), b"HTTP/1.1 400 "),
        "an oversized head": (says(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 15)), b"HTTP/1.1 431 "),
        "no such path": (says(b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"), b"HTTP/1.1 404 "),
        "another method": (says(b"POST /readyz HTTP/1.1\r\nHost: x\r\n\r\n"), b"HTTP/1.1 405 "),
        "half a request": (says(b"GET /readyz HT"), b""),
        "half a request and the end": (says(b"GET /readyz HT", fin=True), b""),
        "a slow request": (trickles(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"), b""),
        **{f"silence {n}": (says(b""), b"") for n in range(40)},
    }

    async with running_cluster(here, **FAST) as cluster:
        with capture_logs() as begun:
            await cluster.start_broker("b1", admin="127.0.0.1:0")
            await cluster.start_gateway(admin="127.0.0.1:0")
            await cluster.start_agent("a1", redundancy=1, admin="127.0.0.1:0")
            await cluster.whole()
        ports = admin_ports(begun)
        assert len(ports) == 3
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            for port in ports:
                async with trio.open_nursery() as nursery:
                    done: dict[str, Attacker] = {}

                    async def attack(port: Address = port, done: dict[str, Attacker] = done) -> None:
                        done |= await attack_all(port, {name: a for name, (a, _) in attacks.items()})

                    nursery.start_soon(attack)
                    for _ in range(10):
                        answer = await in_thread(lambda port=port: probe(port))  # type: ignore[misc]
                        assert b'{"ready":true' in answer, answer
                wrong = {
                    name: (done[name].answer, done[name].ending)
                    for name, (_, answer) in attacks.items()
                    if not done[name].answer.startswith(answer) or done[name].ending == "never"
                }
                assert not wrong
        assert not [entry for entry in logs if entry["event"].endswith("_failed")]
