"""Agents with a session that answer Dials badly, open streams, break windows, or flood their broker with updates."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rtunnel.config import parse_exposes
from rtunnel.registry import Registration
from rtunnel.wire import yamux
from rtunnel.wire.messages import (
    Accepted,
    Dialling,
    Proof,
    Refuse,
    Update,
    encode,
)
from rtunnel_broker import session
from support.attackers import DEADLINE, FAST, PATIENCE
from support.cluster import Cluster, SocksRefused, Target, in_thread, running_cluster
from support.handmade import Stream, Wire, answers, handmade, next_dial, shut
from support.logs import named
from support.unharmed import unharmed


def hangs_up(wire: Wire) -> None:
    """The link ends behind the first Dial."""
    next_dial(wire)
    shut(wire.sock)


def goes_away(wire: Wire) -> None:
    """GoAway, and the Dial stays without an answer."""
    next_dial(wire)
    wire.go_away(yamux.GoAwayCode.NORMAL)


MISBEHAVIOUR: dict[str, tuple[Callable[[Wire], None], int, int, str]] = {
    "garbage": (answers(os.urandom(4096)), 4, 503, "protocol_error"),
    "an oversized answer": (answers(b"\xff\xff\xff\xff"), 4, 503, "over the limit"),
    "another message": (answers(encode(Proof(mac=bytes(32)))), 4, 503, "protocol_error"),
    "no answer": (answers(), 6, 504, "no answer within"),
    "half an answer": (answers(encode(Accepted())[:4]), 6, 504, "no answer within"),
    "dialling for ever": (answers(encode(Dialling())), 6, 504, "still connecting"),
    "dialling often": (answers(encode(Dialling()) * 50 + encode(Refuse(code="target_refused"))), 5, 502, "refused"),
    "the end": (answers(fin=True), 4, 503, "without an answer"),
    "a reset": (answers(rst=True), 4, 503, "without an answer"),
    "the end of the link": (hangs_up, 4, 503, "without an answer"),
    "going away": (goes_away, 6, 504, "no answer within"),
    "an unknown code": (answers(encode(Refuse(code="because", text="so"))), 4, 503, "internal: so"),
    "a text too long": (answers(encode(Refuse(code="not_exposed", text="x" * 600))), 4, 503, "protocol_error"),
    "a text that drives terminals": (
        answers(encode(Refuse(code="not_exposed", text="\x1b[2J\r\nX: y\r\n\r\n\u202e"))), 2, 403, "?[2J??X: y?????",
    ),
    "a code of a broker's": (answers(encode(Refuse(code="bad_token"))), 1, 500, "join token"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISBEHAVIOUR)
async def test_an_agent_that_answers_badly_is_told_truly(here: Path, secrets: Path, name: str) -> None:
    """Whatever an agent answers to a Dial, or doesn't: each client hears the reason, in its own protocol's words."""
    script, code, status, text = MISBEHAVIOUR[name]
    async with running_cluster(here, gateway__dial_timeout=DEADLINE, gateway__proof="off", **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")):
            async with handmade(cluster, secrets, script):
                with pytest.raises(SocksRefused) as refused:
                    await cluster.socks("127.1.7.7", 80)
                assert refused.value.code == code
            async with handmade(cluster, secrets, script):
                answer = await cluster.http(b"CONNECT 127.1.7.7:80 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer
            assert text.encode() in answer, answer
            assert answer.isascii() and b"\x1b" not in answer


async def test_an_agent_that_goes_away_gets_no_more_dials(here: Path, secrets: Path) -> None:
    """Behind its GoAway the broker refuses at once: another tuple may work, this one can't."""
    async with running_cluster(here, gateway__dial_timeout=DEADLINE, **FAST) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node

        def script(wire: Wire) -> None:
            wire.go_away(yamux.GoAwayCode.NORMAL)

        async with unharmed(cluster, Target("127.1.0.1")), handmade(cluster, secrets, script):
            link = node.sessions["default/raw"].link
            assert link is not None
            await cluster.until(lambda: link.going_away is not None)
            answer = await cluster.http(b"CONNECT 127.1.7.7:80 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ") and b"link_lost" in answer, answer


async def test_of_many_updates_at_once_only_the_newest_is_looked_at(
    here: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many fit into one frame: to look at each of them would hold everybody else up."""
    looked: list[list[str]] = []

    def parse(exposes: list[str]) -> object:
        looked.append(exposes)
        return parse_exposes(exposes)

    monkeypatch.setattr(session, "parse_exposes", parse)
    updates = b"".join(encode(Update(exposes=[str(port)])) for port in range(1, 51))
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        sessions = cluster.brokers["b1"].node.sessions
        async with handmade(cluster, secrets, lambda wire: wire.write(updates)):
            await cluster.until(lambda: sessions["default/raw"].exposes == ("50",))
    assert 1 <= len(looked) < 10


async def test_an_agent_over_its_window_loses_its_link(here: Path, secrets: Path) -> None:
    """More than the window in an accepted stream: the link ends with that reason, the client gets a reset."""

    def script(wire: Wire) -> None:
        stream = next_dial(wire)
        wire.write(encode(Accepted()), stream)
        wire.sock.sendall(yamux.HEADER.pack(0, yamux.DATA, 0, stream.id, 1 << 20) + bytes(1 << 16))

    async with running_cluster(here, **FAST, gateway__proof="off") as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs, handmade(cluster, secrets, script):
            sock = await cluster.socks("127.1.7.7", 80)
            with pytest.raises(ConnectionResetError):
                await in_thread(lambda: [sock.recv(1 << 16) for _ in range(1000)])
            sock.close()
            await cluster.until(lambda: any(line.get("agent") == "raw" for line in named(logs, "session_ended")))
        down = [line["reason"] for line in named(logs, "session_ended") if line.get("agent") == "raw"]
        assert len(down) == 1 and "window_exceeded" in down[0]


async def test_an_agent_s_other_streams_are_reset_and_its_session_lives(here: Path, secrets: Path) -> None:
    """Only the control stream is the agent's to open; further ones are refused one by one, in any number."""
    opened: list[bool] = []

    def script(wire: Wire) -> None:
        for _ in range(500):
            stream = Stream(wire)
            wire.attach(stream)
            wire.write(b"hello", stream)
            wire.pump(lambda stream=stream: stream.was_reset)  # type: ignore[misc]
            opened.append(True)
        answers(encode(Refuse(code="target_refused")))(wire)

    async with running_cluster(here, gateway__proof="off", **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")), handmade(cluster, secrets, script):
            await cluster.until(lambda: len(opened) == 500)
            with pytest.raises(SocksRefused) as refused:
                await cluster.socks("127.1.7.7", 80)
            assert refused.value.code == 5


async def test_updates_are_checked(here: Path, secrets: Path) -> None:
    """Good ones reach the registry in the end; a bad one ends the session, by name."""
    verdict: list[Refuse] = []

    def script(wire: Wire) -> None:
        for n in range(1, 10):
            wire.write(encode(Update(exposes=[str(n)])))
        wire.write(encode(Update(exposes=["4242"])))
        checked.wait(PATIENCE)
        wire.write(encode(Update(exposes=["\x1b[2J"])))
        verdict.append(wire.hear(Refuse))

    checked = threading.Event()
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")), handmade(cluster, secrets, script):
            await cluster.until(lambda: exposed(cluster, "127.1.7.7") == ["4242"])
            checked.set()
            await cluster.until(lambda: bool(verdict))
    assert verdict[0].code == "bad_request" and "x1b" in verdict[0].text


def exposed(cluster: Cluster, ip: str) -> list[str]:
    """What `rtunnel resolve` says that the agent exposes, by tuple."""
    return [entry.exposes for entry in cluster.registry.with_exposes(cluster.registry.lookup("default", ip))]


async def test_a_flood_of_updates_ends_the_agents_own_link(here: Path, secrets: Path) -> None:
    """The registry hears of one with each heartbeat, and of no change of the tuples; the agent is told why it goes."""
    verdict: list[Refuse] = []

    def script(wire: Wire) -> None:
        flood = b"".join(wire.control.frame(encode(Update(exposes=[str(n)]))) for n in range(1, 201))
        assert len(flood) <= 1 << 14, "one TLS record: the end of the link does not break off the sending of it"
        wire.sock.sendall(flood)
        verdict.append(wire.hear(Refuse))

    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        told: list[Registration] = []
        register = cluster.registry.register

        def counted(registration: Registration) -> None:
            told.append(registration)
            register(registration)

        cluster.registry.register = counted  # type: ignore[method-assign]
        async with unharmed(cluster, Target("127.1.0.1"), slowest=5.0):
            cursor = cluster.registry.snapshot().cursor
            async with handmade(cluster, secrets, script):
                await cluster.until(lambda: bool(verdict))
            await cluster.until(lambda: "default/raw" not in cluster.brokers["b1"].node.sessions)
            changes = cluster.registry.changes(cursor, 0.0)[1]
    assert verdict[0].code == "protocol_error" and "updates" in verdict[0].text
    assert [change.tuple is not None for change in changes if change.agent_ip == "127.1.7.7"] == [True, False]
    assert len(told) == 1, "beside the heartbeats there is the registration"
