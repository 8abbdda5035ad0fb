"""Brokers that an agent must not trust: wrong credentials, another version, Dials that are not for it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from rtunnel.trust import pki
from rtunnel.trust.keys import load_token, new_token, token_mac
from rtunnel.trust.tls import certificate_der, certificate_fingerprint
from rtunnel.wire.messages import (
    Challenge,
    Dial,
    DialBody,
    Hello,
    Proof,
    Refuse,
    Welcome,
    encode,
    encode_body,
)
from support.attackers import DEADLINE, FAST
from support.cluster import Cluster, Target, in_thread, running_cluster
from support.handmade import Rogue, Stream, Wire, frame_of, hello, link_to, signed
from support.logs import named
from support.plumbing import kept
from support.unharmed import unharmed

#: Keys of an agent that has no certificate, and proves its token.
BY_TOKEN: dict[str, Any] = {"certificate": "", "key": ""}


async def refused_agent(cluster: Cluster, wanted: str, **keys: Any) -> str:
    """Start an agent without a certificate that must not get a session; what it gives as its reason, which must have
    the wanted words.
    """
    part = await cluster.start_agent("odd", "127.1.0.9", redundancy=1, **BY_TOKEN | keys)
    reason = ""

    def told_so() -> bool:
        """A machine that is too slow for a deadline has another reason first."""
        nonlocal reason
        assert part.agent.state == "down"
        (reason,) = part.agent.reasons()
        return wanted in reason

    try:
        await cluster.until(told_so)
    except trio.TooSlowError:
        pytest.fail(f"{wanted!r} is not in {reason!r}")
    await part.shut()
    del cluster.agents["odd"]
    return reason


async def test_a_wrong_token_is_told_to_the_agent(here: Path, tmp_path: Path) -> None:
    """An unknown id is named by the broker; a wrong secret is found out by the agent, before it proves anything."""
    unknown, wrong = tmp_path / "unknown.token", tmp_path / "wrong.token"
    unknown.write_text(new_token("nobody").line() + "\n")
    wrong.write_text(new_token(load_token(here / "pki" / "join.token").id).line() + "\n")
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            await refused_agent(cluster, "bad_token: join token 'nobody' is not known to", join_token=str(unknown))
            await refused_agent(cluster, "the broker does not know our join token's secret", join_token=str(wrong))
        refusals = [entry["code"] for entry in logs if entry["event"] == "session_refused"]
        assert refusals and set(refusals) == {"bad_token"}


async def test_a_wrong_certificate_is_told_to_the_agent(here: Path, tmp_path: Path) -> None:
    """Another cluster's CA, another server name: the reason says which of the two."""
    pki.init(tmp_path / "other")
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            reason = await refused_agent(cluster, "certificate not accepted", ca=str(tmp_path / "other" / "ca.pem"))
            assert "agent.ca" in reason, reason
            reason = await refused_agent(cluster, "certificate not accepted", server_name="elsewhere.example")
            assert "elsewhere.example" in reason and "agent.server_name" in reason, reason
            await cluster.until(lambda: any("alert" in line["reason"] for line in named(logs, "link_lost")))


async def test_plain_and_tls_do_not_meet_and_say_so(here: Path) -> None:
    """Both ends name the key to look at, whichever of them is the plain one."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            reason = await refused_agent(cluster, "security", security="plain")
            assert "TLS" in reason, reason
            await cluster.until(
                lambda: any("not seem to speak TLS" in line["reason"] for line in named(logs, "link_lost"))
            )
    async with running_cluster(here, broker__security="plain", agent__security="plain", **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            reason = await refused_agent(cluster, "security", security="tls")
            assert "plain" in reason, reason
            await cluster.until(lambda: any("looks like TLS" in line["reason"] for line in named(logs, "link_lost")))


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
async def test_a_rogue_broker_gets_nothing(here: Path, secrets: Path, tls: bool) -> None:
    """A broker that does not know the token's secret, even with a good certificate, is left before the Proof."""
    heard: list[Any] = []

    def without_secret(wire: Wire) -> None:
        heard.append(wire.hear(Hello))
        wire.write(encode(Challenge(nonce=os.urandom(16), mac=os.urandom(32))))
        heard.append(wire.hear(Proof))

    def welcoming(wire: Wire) -> None:
        wire.hear(Hello)
        wire.write(encode(Welcome(node="r", host="r", epoch=1, ip="127.0.0.1", port=1, heartbeat=1.0)))

    def dialling(wire: Wire) -> None:
        wire.hear(Hello)
        stream = Stream(wire)
        wire.attach(stream)
        wire.write(signed(secrets, b""), stream)
        wire.pump(lambda: stream.was_reset)
        heard.append("reset")

    def oversized(wire: Wire) -> None:
        wire.hear(Hello)
        wire.write(b"\x7f" * 50)

    def ending(wire: Wire) -> None:
        wire.hear(Hello)
        wire.close()

    scripts: dict[str, tuple[Callable[[Wire], None], str]] = {
        "no secret": (without_secret, "the broker does not know our join token's secret"),
        "a Welcome at once": (welcoming, "protocol error: welcome came in the state greeted"),
        "a Dial at once": (dialling, "no Challenge within the handshake deadline"),
        "garbage": (lambda wire: wire.sock.sendall(b"\xff" * 100), "bad_version"),
        "an oversized message": (oversized, "over the limit of 4096"),
        "silence": (lambda wire: None, "no Challenge within the handshake deadline"),
        "the end": (ending, "closed by peer"),
    }
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        async with unharmed(cluster, target):
            for script, reason in scripts.values():
                rogue = Rogue(secrets, script, tls=tls)
                security = "tls" if tls else "plain"
                keys = {"brokers": [rogue.at], "security": security, "handshake_timeout": DEADLINE}
                await refused_agent(cluster, reason, **keys)
                rogue.sock.close()
    assert [type(h).__name__ for h in heard if not isinstance(h, Hello)] == ["str"] * heard.count("reset")


async def test_another_protocol_version_is_named_in_both_directions(here: Path, secrets: Path) -> None:
    """Whoever refuses names both versions, be the other's messages of the same shape or of another."""

    def newer(agent_hello: bytes) -> Refuse:
        wire = link_to(node.bound, secrets)
        wire.write(frame_of(agent_hello))
        answer = wire.hear(Refuse)
        wire.close()
        assert isinstance(answer, Refuse)
        return answer

    def challenges(body: dict[str, Any]) -> Callable[[Wire], None]:
        def script(wire: Wire) -> None:
            wire.hear(Hello)
            wire.write(frame_of(msgspec.msgpack.encode(body)))

        return script

    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        async with unharmed(cluster, Target("127.1.0.1")):
            same_shape = encode(hello(secrets, version=2))[4:]
            other_shape = msgspec.msgpack.encode({"t": "hello", "version": 2, "agent": {"id": "x"}})
            for body in (same_shape, other_shape):
                answer = await in_thread(lambda body=body: newer(body))  # type: ignore[misc]
                assert answer.code == "version", answer
                assert "version 2" in answer.text and "1" in answer.text.replace("version 2", ""), answer.text
            for challenge in (
                {"t": "challenge", "version": 2, "nonce": bytes(16), "mac": bytes(32)},
                {"t": "challenge", "version": 2, "salt": b"x"},
                {"t": "greeting", "version": 2},
            ):
                rogue = Rogue(secrets, challenges(challenge))
                reason = await refused_agent(cluster, "version 2", brokers=[rogue.at])
                assert "1" in reason.partition("version 2")[2], reason
                rogue.sock.close()


async def test_the_agent_checks_each_dial_itself(here: Path, secrets: Path) -> None:
    """A broker that passes on what it should not gets the agent's own refusals, and never a connection."""
    answers: dict[str, tuple[str, str]] = {}
    heard = kept(socket.create_server(("127.1.0.9", 0)))
    port = heard.getsockname()[1]
    done = threading.Event()

    def script(wire: Wire) -> None:
        greeting, frame = wire.hear_frame(Hello)
        token = load_token(secrets / "join.token")
        nonce = os.urandom(16)
        binding = certificate_fingerprint(certificate_der(secrets / "broker.pem"))
        wire.write(
            encode(Challenge(nonce=nonce, mac=token_mac(token.secret, b"rtunnel broker 1", frame, nonce, binding)))
        )
        wire.hear(Proof)
        epoch = 77
        wire.write(encode(Welcome(node="r", host="r", epoch=epoch, ip="127.0.0.1", port=1, heartbeat=1.0)))
        assert greeting.addresses == ["127.1.0.9"]
        fields: dict[str, Any] = {
            "version": 1, "namespace": "default", "ip": "127.1.0.9", "port": port, "node": "r", "epoch": epoch,
            "nonce": bytes(16), "time": 0,
        }  # fmt: skip

        def dial(**changes: Any) -> bytes:
            return encode(Dial(body=encode_body(DialBody(**fields | changes))))

        for name, data in {
            "version": dial(version=2),
            "namespace": dial(namespace="other"),
            "address": dial(ip="127.1.0.1"),
            "any address": dial(ip="0.0.0.0"),
            "epoch": dial(epoch=76),
            "node": dial(node="s"),
            "port": dial(port=22),
            "body": encode(Dial(body=b"\xc1")),
            "message": encode(Proof(mac=bytes(32))),
            "length": b"\xff\xff\xff\xff",
        }.items():
            stream = Stream(wire)
            wire.attach(stream)
            wire.write(data, stream)
            answer = wire.hear(Refuse, stream)
            answers[name] = (answer.code, answer.text)
        stream = Stream(wire)
        wire.attach(stream)
        wire.write(dial()[:20], stream)
        stream.finish()
        answers["truncated"] = (wire.hear(Refuse, stream).code, "")
        done.set()

    rogue = Rogue(secrets, script)
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")):
            keys = BY_TOKEN | {"brokers": [rogue.at], "exposes": [str(port)]}
            part = await cluster.start_agent("odd", "127.1.0.9", redundancy=1, **keys)
            await cluster.until(done.is_set)
            rogue.sock.close()
            await part.shut()
            del cluster.agents["odd"]
    assert {name: code for name, (code, _) in answers.items()} == {
        "version": "version",
        "namespace": "stale_target",
        "address": "stale_target",
        "any address": "stale_target",
        "epoch": "stale_epoch",
        "node": "stale_epoch",
        "port": "not_exposed",
        "body": "protocol_error",
        "message": "protocol_error",
        "length": "protocol_error",
        "truncated": "protocol_error",
    }
    assert "2" in answers["version"][1] and "1" in answers["version"][1]
    heard.setblocking(False)
    with pytest.raises(BlockingIOError):
        heard.accept()
