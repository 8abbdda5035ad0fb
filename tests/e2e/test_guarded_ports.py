"""An attacker at guarded ports: broken, forged and missing Dials, floods, and port ranges without a port."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from structlog.testing import capture_logs

from rtunnel.registry.memory import MemoryRegistry
from rtunnel.trust.keys import load_gateway_key
from rtunnel.wire.messages import (
    Dial,
    Proof,
    encode,
    encode_body,
)
from rtunnel_broker import node as node_module
from rtunnel_broker import registrar
from support.attackers import (
    FAST,
    PATIENCE,
    Address,
    Attack,
    Attacker,
    a_source,
    all_told,
    attack_all,
    noise,
    says,
    told,
    trickles,
)
from support.cluster import Target, in_thread, running_cluster
from support.handmade import dial_body, first_answer, frame_of, session_of, signed
from support.plumbing import free_range, kept
from support.unharmed import unharmed


async def test_the_guarded_port_withstands_every_input(here: Path, secrets: Path) -> None:
    """Garbage, oversized, truncated and slow Dials: an answer where one is possible, the deadline else."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        part, welcome = cluster.brokers["b1"], session_of(cluster)
        good = signed(secrets, encode_body(dial_body(part, welcome, (target.ip, target.port))))
        attacks: dict[str, tuple[Attack, str, str]] = {
            "garbage": (says(b"\xff" + noise(1 << 16)), "protocol_error", "over the limit of 4096"),
            "zeros": (says(bytes(1 << 16)), "protocol_error", "truncated"),
            "an HTTP request": (says(b"GET / HTTP/1.1\r\n\r\n"), "protocol_error", "over the limit"),
            "an oversized length": (says(b"\xff\xff\xff\xff"), "protocol_error", "over the limit"),
            "another message": (says(encode(Proof(mac=bytes(32)))), "protocol_error", "'proof'"),
            "a wrong type": (says(frame_of(b"\x82\xa1t\xa4dial\xa4body\x01")), "protocol_error", "Expected `bytes`"),
            "a huge body": (says(encode(Dial(body=bytes(2000), mac=bytes(32)))), "protocol_error", "length <= 1024"),
            "a huge MAC": (says(encode(Dial(body=b"", mac=bytes(33)))), "protocol_error", "length <= 32"),
            "deep MessagePack": (
                says(frame_of(b"\x82\xa1t\xa4dial\xa3foo" + b"\x91" * 4000)),
                "protocol_error",
                "recur",
            ),
            "half a Dial and the end": (says(good[:50], fin=True), "protocol_error", "before a whole Dial"),
            "nothing and the end": (says(b"", fin=True), "protocol_error", "before a whole Dial"),
            "half a Dial": (says(good[:50]), "nothing", "deadline"),
            "silence": (says(b""), "nothing", "deadline"),
            "a Dial too slow": (trickles(good), "nothing", "deadline"),
        }
        async with unharmed(cluster, target) as logs:
            done = await attack_all(("127.0.0.1", welcome.port), {name: a for name, (a, _, _) in attacks.items()})
            await all_told(cluster, logs, done)
        wrong = {
            name: (told(logs, done[name]), first_answer(done[name].answer), done[name].ending)
            for name, (_, code, reason) in attacks.items()
            if reason not in told(logs, done[name])
            or first_answer(done[name].answer)[0] != code
            or done[name].ending == "never"
        }
        assert not wrong
        assert part.node.counts.refused["protocol_error"] == sum(c == "protocol_error" for _, c, _ in attacks.values())


async def test_a_dial_in_single_bytes_is_served(here: Path, secrets: Path) -> None:
    """Slow is not wrong: a whole Dial within the deadline gets its stream, with the bytes behind it."""
    async with running_cluster(here) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        part, welcome = cluster.brokers["b1"], session_of(cluster)
        good = signed(secrets, encode_body(dial_body(part, welcome, (target.ip, target.port))))

        def client() -> bytes:
            attacker = Attacker(("127.0.0.1", welcome.port))
            attacker.trickle(good + b"slow\n", 0.001)
            attacker.sock.shutdown(socket.SHUT_WR)
            attacker.hear_out()
            return attacker.answer

        async with unharmed(cluster, target):
            answer = await in_thread(client)
        assert first_answer(answer)[0] == "accepted" and b"127.1.0.1:slow\n" in answer


async def test_a_flood_behind_a_refusal_starves_nobody(here: Path) -> None:
    """Whoever sends on after the refusal, as fast as the kernel takes it, costs a bounded share of the loop."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        ports = [("127.0.0.1", session_of(cluster).port), cluster.gateway.bound]
        flooding = [threading.Event() for _ in ports * 2]
        over = threading.Event()

        def flood(address: Address, begun: threading.Event) -> None:
            attacker = Attacker(address)
            while not over.is_set():
                attacker.say(b"\xff" * (1 << 20))
                begun.set()
            attacker.sock.close()

        target = Target("127.1.0.1")
        async with unharmed(cluster, target), trio.open_nursery() as nursery:
            for address, begun in zip(ports * 2, flooding, strict=True):
                nursery.start_soon(in_thread, lambda address=address, begun=begun: flood(address, begun))
            try:
                await cluster.until(lambda: all(begun.is_set() for begun in flooding))
                with trio.fail_after(PATIENCE):
                    for _ in range(20):
                        await cluster.ask(target.ip, target.port)
            finally:
                over.set()


async def test_every_bad_dial_has_its_own_code(here: Path, secrets: Path) -> None:
    """Forged, old, of the future, replayed, stale in every field: one word on the wire, in the log, in the counts."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1, agents=2, exposes=["1024-65535"])
        target, other = Target("127.1.0.1"), Target("127.1.0.2")
        part, welcome = cluster.brokers["b1"], session_of(cluster)
        now = int(time.time() * 1000)

        def body(**changes: Any) -> bytes:
            return encode_body(dial_body(part, welcome, (target.ip, target.port), **changes))

        def dial(**changes: Any) -> bytes:
            return signed(secrets, body(**changes))

        honest = body()
        forged = msgspec.msgpack.encode(msgspec.msgpack.decode(honest) | {"port": other.port})
        signer = load_gateway_key(secrets / "gateway.key")

        def dial_frame(content: bytes, mac: bytes) -> bytes:
            return encode(Dial(body=content, mac=mac, key=signer.id))

        twice = dial()
        attacks: dict[str, tuple[bytes, str, str]] = {
            "another cluster's key": (signed(secrets, body(), key=bytes(32)), "bad_mac", "gateway's key"),
            "no MAC": (encode(Dial(body=honest)), "bad_mac", "gateway's key"),
            "half a MAC": (dial_frame(honest, signer.sign(honest)[:16]), "bad_mac", "gateway's key"),
            "the MAC of another body": (dial_frame(forged, signer.sign(honest)), "bad_mac", "gateway's key"),
            "old": (dial(time=now - 60_000), "expired", "s old by this"),
            "of the future": (dial(time=now + 60_000), "expired", "s ahead by this"),
            "of 1970": (dial(time=0), "expired", "clock"),
            "of the end of time": (dial(time=2**63), "expired", "clock"),
            "another node": (dial(node="b9"), "stale_node", "this is b1, the Dial is for b9"),
            "another namespace": (dial(namespace="other"), "stale_target", "other/127.1.0.1"),
            "another agent's address": (dial(ip="127.1.0.2"), "stale_target", "127.1.0.2"),
            "nobody's address": (dial(ip="203.0.113.9"), "stale_target", "203.0.113.9"),
            "another spelling of the address": (dial(ip="127.1.0.01"), "stale_target", "127.1.0.01"),
            "an older epoch": (dial(epoch=welcome.epoch - 1), "stale_epoch", str(welcome.epoch)),
            "a later epoch": (dial(epoch=welcome.epoch + 1), "stale_epoch", str(welcome.epoch)),
            "epoch 0": (dial(epoch=0), "stale_epoch", str(welcome.epoch)),
            "another version": (dial(version=2), "version", "version 2, this end speaks 1"),
            "no MessagePack": (signed(secrets, b"\xc1\xff"), "protocol_error", "bad Dial body"),
            "an empty body": (signed(secrets, b""), "protocol_error", "bad Dial body"),
            "a body of a wrong type": (signed(secrets, msgspec.msgpack.encode([1, 2])), "protocol_error", "bad Dial"),
            "port 0": (
                signed(secrets, msgspec.msgpack.encode(msgspec.msgpack.decode(honest) | {"port": 0})),
                "protocol_error",
                "$.port",
            ),
            "port 65536": (
                signed(secrets, msgspec.msgpack.encode(msgspec.msgpack.decode(honest) | {"port": 65536})),
                "protocol_error",
                "$.port",
            ),
            "a short nonce": (
                signed(secrets, msgspec.msgpack.encode(msgspec.msgpack.decode(honest) | {"nonce": b"x"})),
                "protocol_error",
                "$.nonce",
            ),
        }  # fmt: skip
        async with unharmed(cluster, target) as logs:
            done = await attack_all(("127.0.0.1", welcome.port), {name: says(d) for name, (d, _, _) in attacks.items()})
            first = await attack_all(("127.0.0.1", welcome.port), {"first": says(twice, fin=True)})
            again = await attack_all(("127.0.0.1", welcome.port), {"replayed": says(twice)})
            moved = await attack_all(("127.0.0.1", session_of(cluster, "a2").port), {"on another port": says(dial())})
            agents = {"not exposed": says(dial(port=80))}
            hidden = await attack_all(("127.0.0.1", welcome.port), agents)
        assert first_answer(first["first"].answer)[0] == "accepted"
        done |= again | moved
        attacks["replayed"] = (twice, "replayed", "used before")
        attacks["on another port"] = (b"", "stale_target", "127.1.0.1")
        wrong = {
            name: (first_answer(done[name].answer), told(logs, done[name]))
            for name, (_, code, text) in attacks.items()
            if first_answer(done[name].answer)[0] != code
            or text not in first_answer(done[name].answer)[1]
            or not told(logs, done[name]).startswith(f"dial_refused: {code}: ")
        }
        assert not wrong
        counted: dict[str, int] = {}
        for _, code, _ in attacks.values():
            counted[code] = counted.get(code, 0) + 1
        assert part.node.counts.refused == counted
        # The agent's own refusal passes through the broker as it is.
        assert first_answer(hidden["not exposed"].answer) == ("not_exposed", "the agent does not expose port 80")
        assert cluster.agents["a1"].agent.targets.counts.refused == {"not_exposed": 1}


async def test_a_port_range_that_is_used_up_is_told_and_recovers(here: Path) -> None:
    """Two ports, three agents: the third names the range, and gets in when another's port has rested."""
    ports = free_range(2)
    quick = {"registry__ttl": 2.0, "registry__quarantine": 2.0}
    registry = MemoryRegistry(ttl=2.0, quarantine=2.0)
    async with running_cluster(here, registry, **FAST, **quick) as cluster:
        await cluster.start_broker("b1", port_range=ports)
        await cluster.start_gateway()
        for number in (1, 2):
            await cluster.start_agent(f"a{number}", f"127.1.0.{number}", redundancy=1)
        await cluster.whole()
        target = Target("127.1.0.1")
        async with unharmed(cluster, target):
            third = await cluster.start_agent("a3", "127.1.0.3", redundancy=1)
            await cluster.until(lambda: "ports_exhausted" in third.agent.reasons()[0])
            (reason,) = third.agent.reasons()
            assert ports in reason and "2 in use" in reason, reason
            await cluster.agents["a2"].shut()
            del cluster.agents["a2"]
            await cluster.until(lambda: third.agent.state == "ready")
            await cluster.whole()
            late = Target("127.1.0.3")
            assert await cluster.ask(late.ip, late.port) == b"127.1.0.3:hello"
            cluster.agents["a2"] = cluster.agents.pop("a3")  # the book-keeping of `unharmed` goes on under its name
            late.sock.close()


async def test_a_port_that_another_program_has_is_skipped(here: Path) -> None:
    """Random ports: the next one is taken. A fixed open port: the agent is told, and goes without."""
    ports, opened = free_range(2), free_range(2)
    first, last = (int(port) for port in ports.split("-"))
    fixed = int(opened.partition("-")[0])
    for taken in (first, fixed):
        kept(socket.create_server(("127.0.0.1", taken)))
    async with running_cluster(here, **FAST) as cluster:
        keys = {"open_ports__range": opened, "open_ports__allow": ["127.0.0.0/8"]}
        part = await cluster.start_broker("b1", port_range=ports, **keys)
        await cluster.start_gateway()
        target = Target("127.1.0.1")
        publish = [{"target": f"127.1.0.1:{target.port}", "port": fixed}]
        with capture_logs() as logs:
            await cluster.start_agent("a1", "127.1.0.1", redundancy=1, publish=publish)
            await cluster.whole()
        welcome = session_of(cluster)
        assert welcome.port == last and not welcome.open_ports
        (notice,) = welcome.notices
        assert str(fixed) in notice and "taken by another program" in notice
        assert [e["notice"] for e in logs if e["event"] == "broker_notice_received"] == [notice]
        assert len(part.node.relay.listeners) == 2
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        third = await cluster.start_agent("a3", "127.1.0.3", redundancy=1)
        await cluster.until(lambda: "1 taken by other programs" in third.agent.reasons()[0])


async def test_no_descriptor_left_refuses_agents_and_kills_nobody(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors when a session wants its port: it is refused, the broker lives, and later it gets in."""

    def full(host: str, port: int, **_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")):
            with monkeypatch.context() as patched:
                patched.setattr(registrar, "listening_socket", full)
                part = await cluster.start_agent("odd", "127.1.0.9", redundancy=1)
                await cluster.until(lambda: "overloaded" in part.agent.reasons()[0])
            await cluster.until(lambda: part.agent.state == "ready")
            await part.shut()
            del cluster.agents["odd"]


@pytest.mark.parametrize("source", ["", "127.66.255.1"])
async def test_connections_without_a_dial_make_room(here: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Silent connections to guarded ports, of one source or of many, keep no gateway out, and end soon."""
    async with running_cluster(here, broker__max_handshakes=6, broker__handshake_timeout=60.0) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        node, port = cluster.brokers["b1"].node, session_of(cluster).port
        await cluster.ask(target.ip, target.port)
        monkeypatch.setattr(node_module, "FIRST_BYTES", 60.0)
        idle = [Attacker(("127.0.0.1", port), source or a_source()) for _ in range(6)]
        most = 3 if source else 6  # a source may have half of the places

        def turned_away() -> int:
            """Those that came in one turn with others are refused, a later one ends an earlier one."""
            return node.counts.refused.get("overloaded", 0) + node.counts.lost["made_room"]

        # The kernel delivers each silent connection by a timer of its own.
        await cluster.until(lambda: node.counts.waiting == most and turned_away() == 6 - most)
        refused = dict(node.counts.refused)
        for _ in range(3):
            assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        assert node.counts.refused == refused
        assert node.counts.waiting >= most - 1
        monkeypatch.setattr(node_module, "FIRST_BYTES", 0.0)
        await cluster.until(lambda: not node.counts.waiting)
        for attacker in idle:
            attacker.sock.close()
