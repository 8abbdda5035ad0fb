"""An attacker at the broker's link port: frames, TLS handshakes, Hellos, and a broker that is full."""

from __future__ import annotations

import os
import re
import socket
import ssl
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from rtunnel.wire import messages, yamux
from rtunnel.wire.messages import (
    Dial,
    Proof,
    Publish,
    Refuse,
    Welcome,
    encode,
)
from rtunnel_broker import registrar
from rtunnel_broker.log import STRANGERS_LINES
from support.attackers import (
    FAST,
    PATIENCE,
    Attack,
    Attacker,
    all_told,
    attack_all,
    noise,
    says,
    told,
    trickles,
    trusting,
    wrapped,
    wraps,
)
from support.cluster import Target, in_thread, running_cluster
from support.handmade import Gone, Refusal, Wire, enrol, frame_of, hello, join, session_of
from support.logs import named
from support.unharmed import unharmed


def yamux_says(data: bytes, **more: Any) -> bytes:
    """The first Data frame of stream 1."""
    return yamux.HEADER.pack(0, yamux.DATA, yamux.SYN, 1, len(data)) + data


def link_attacks(secrets: Path) -> dict[str, tuple[Attack, str, bytes]]:
    """What is sent on a link that is up, what the log must say of it, and the answer."""
    deep = b"\x82\xa1t\xa5hello\xa3foo" + b"\x91" * 4000
    good = encode(hello(secrets))
    request = messages.Enrol(version=1, request=bytes(3072), certificate=bytes(3072))
    header = yamux.HEADER.pack
    broken = header(0, yamux.GO_AWAY, 0, 0, yamux.GoAwayCode.PROTOCOL_ERROR)
    late = header(0, yamux.GO_AWAY, 0, 0, yamux.GoAwayCode.NORMAL)
    refused = b"protocol_error"
    return {
        "yamux of version 1": (says(header(1, 0, 1, 1, 0)), "bad_version", broken),
        "unknown frame type": (says(header(0, 9, 1, 1, 0)), "bad_type", broken),
        "unknown flags": (says(header(0, 0, 0x101, 1, 0)), "bad_flags", broken),
        "data for the session": (says(header(0, 0, 0, 0, 4) + b"abcd"), "stream_zero", broken),
        "a stream that never was": (says(header(0, 0, 0, 7, 4) + b"abcd"), "unknown_stream", broken),
        "a stream of ours": (says(header(0, 0, 1, 2, 0)), "wrong_parity", broken),
        "more than the window": (says(header(0, 0, 1, 1, 1 << 30) + bytes(1 << 16)), "window_exceeded", broken),
        "an oversized message": (says(yamux_says(frame_of(b"", 1 << 31))), "over the limit of 32768", refused),
        "an oversized request": (
            says(yamux_says(encode(request))),
            "enrol of 6216 bytes is over the limit of 4096",
            refused,
        ),
        "a flood behind a bad message": (
            says(yamux_says(frame_of(b"\xc0")) + header(0, 0, 0, 1, 200_000) + bytes(200_000)),
            "Expected `object`",
            refused,
        ),
        "an unknown message": (says(yamux_says(frame_of(b"\x81\xa1t\xa6launch"))), "Invalid value 'launch'", refused),
        "deep MessagePack": (says(yamux_says(frame_of(deep))), "recursion", refused),
        "MessagePack of a huge array": (
            says(yamux_says(frame_of(b"\x82\xa1t\xa5hello\xa9addresses\xdd\xff\xff\xff\xff"))),
            "length <= 64",
            refused,
        ),
        "no map": (says(yamux_says(frame_of(b"\xc0"))), "Expected `object`", refused),
        "an empty message": (says(yamux_says(frame_of(b""))), "truncated", refused),
        "a Proof before the Hello": (
            says(yamux_says(encode(Proof(mac=bytes(32))))),
            "proof came in the state new",
            refused,
        ),
        "two Hellos": (says(yamux_says(good + good)), "hello came in the state challenged", refused),
        "half a Hello, then silence": (says(yamux_says(good[:40])), "handshake deadline", late),
        "half a Hello, then the end": (says(yamux_says(good[:40]), fin=True), "closed by peer", b""),
        "a Hello, then silence": (says(yamux_says(good)), "handshake deadline", late),
        "a slow Hello": (trickles(yamux_says(good)), "handshake deadline", late),
        "silence": (says(b""), "handshake deadline", late),
        "half a header": (says(header(0, 0, 1, 1, 0)[:5]), "handshake deadline", late),
        "streams without end": (
            says(b"".join(header(0, 0, 1, n, 0) for n in range(1, 160001, 2))),
            "a second stream before",
            broken,
        ),
        "a second stream": (says(yamux_says(b"") + header(0, 0, 1, 3, 0)), "a second stream before", broken),
        # The answers to some thousand pings may fill the way back: then there is no room for a GoAway.
        "pings without end": (says(header(0, 2, 1, 0, 1) * 80000), "too many bytes before", b""),
    }


@pytest.mark.parametrize("security", ["tls", "plain"])
async def test_the_link_port_withstands_every_frame(here: Path, secrets: Path, security: str) -> None:
    """Illegal frames, messages and silences: each link ends with its own reason in the log."""
    keys: dict[str, Any] = {"broker__security": security, "agent__security": security}
    async with running_cluster(here, **FAST, **keys) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        attacks = link_attacks(secrets)
        context = trusting(secrets, messages.ALPN)
        run = {name: wrapped(a, context) if security == "tls" else a for name, (a, _, _) in attacks.items()}
        async with unharmed(cluster, target) as logs:
            done = await attack_all(cluster.brokers["b1"].node.bound, run)
            await all_told(cluster, logs, done)
        wrong = {
            name: (told(logs, done[name]), done[name].answer, done[name].ending)
            for name, (_, reason, answer) in attacks.items()
            if reason not in told(logs, done[name]) or answer not in done[name].answer or done[name].ending == "never"
        }
        assert not wrong


def client_hello(secrets: Path) -> bytes:
    """The first flight of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting(secrets, messages.ALPN).wrap_bio(incoming, outgoing, server_hostname="broker.rtunnel")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def wraps_then_breaks_tls(context: ssl.SSLContext) -> Attack:
    """A whole TLS handshake, then bytes that are no TLS."""

    def attack(attacker: Attacker) -> None:
        attacker.wrap(context)
        with socket.socket(fileno=os.dup(attacker.sock.fileno())) as raw:
            raw.sendall(b"\x17\x03\x03\x40\x00" + noise(1 << 14))

    return attack


async def test_the_link_port_withstands_every_handshake(here: Path, secrets: Path) -> None:
    """Garbage, other protocols, old TLS and stalled handshakes end by the deadline at the latest, with a reason."""
    old = trusting(secrets, messages.ALPN)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    first = client_hello(secrets)
    attacks: dict[str, tuple[Attack, str]] = {
        "garbage": (says(noise(1 << 16)), "TLS"),
        "zeros": (says(bytes(1 << 16)), "TLS"),
        "an HTTP request": (says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "http request"),
        "an SSH banner": (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "TLS"),
        "a SOCKS greeting": (says(b"\5\1\0"), "deadline"),
        "TLS 1.2": (wraps(old), "unsupported protocol"),
        "a huge record": (says(b"\x16\x03\x01\xff\xff" + bytes(1 << 16)), "TLS"),
        "a broken ClientHello": (says(first[:60] + b"\xff" * (len(first) - 60)), "TLS"),
        "silence": (says(b""), "deadline"),
        "half a ClientHello": (says(first[: len(first) // 2]), "deadline"),
        "half a ClientHello and the end": (says(first[: len(first) // 2], fin=True), "during the TLS handshake"),
        "a slow ClientHello": (trickles(first), "deadline"),
        "a ClientHello and no Finished": (says(first), "deadline"),
        "a handshake and silence": (wraps(trusting(secrets, messages.ALPN)), "deadline"),
        "another ALPN": (wraps(trusting(secrets, "h2", "http/1.1")), "deadline"),
        "no ALPN": (wraps(trusting(secrets)), "deadline"),
        "a handshake and broken TLS": (wraps_then_breaks_tls(trusting(secrets, messages.ALPN)), "TLS"),
    }
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            done = await attack_all(cluster.brokers["b1"].node.bound, {name: a for name, (a, _) in attacks.items()})
            await all_told(cluster, logs, done)
        wrong = {
            name: (told(logs, done[name]), done[name].ending, done[name].seconds)
            for name, (_, reason) in attacks.items()
            if reason not in told(logs, done[name]) or done[name].ending == "never" or done[name].seconds > PATIENCE
        }
        assert not wrong


async def test_a_wrong_proof_is_refused(here: Path, secrets: Path) -> None:
    """Who knows a token's id and not its secret gets no session, and is told so."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node

        def impostor() -> Refuse:
            wire = join(node.bound, secrets, hello(secrets), secret=bytes(32))
            answer = wire.hear(Welcome | Refuse)
            with pytest.raises(Gone):
                wire.hear(Welcome)
            wire.close()
            assert isinstance(answer, Refuse)
            return answer

        async with unharmed(cluster, Target("127.1.0.1")):
            answer = await in_thread(impostor)
        assert answer.code == "bad_token" and "proof" in answer.text
        assert "default/raw" not in node.sessions


async def test_silent_links_make_room_for_an_agent(here: Path) -> None:
    """Silent links of many sources hold every place for a minute: sessions go on, and a new agent comes in at once."""
    async with running_cluster(here, broker__max_handshakes=6, broker__handshake_timeout=60.0) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            idle = [Attacker(node.bound) for _ in range(6)]
            await cluster.until(lambda: node.links.handshakes == 6)
            late = await cluster.start_agent("late", "127.1.0.8", redundancy=1)
            await cluster.until(lambda: late.agent.state == "ready")
            assert node.links.handshakes == 5
            for attacker in idle:
                attacker.sock.close()
            await late.shut()
            del cluster.agents["late"]
        assert sum(entry["event"] == "handshake_limit_reached" for entry in logs) == 1


async def test_an_agent_that_knows_no_small_windows_gets_large_ones(here: Path, secrets: Path) -> None:
    """A Hello without `start_window` is answered as ever."""
    async with running_cluster(here) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        wire, welcome = await in_thread(lambda: enrol(node.bound, secrets))
        assert welcome.start_window == yamux.INITIAL_WINDOW
        link = node.sessions["default/raw"].link
        assert link is not None and link.start_window == yamux.INITIAL_WINDOW
        wire.close()


async def test_strangers_write_few_lines(here: Path, secrets: Path) -> None:
    """Probes make no line; garbage, bad proofs and bad Dials make some, and metrics count all of them."""
    async with running_cluster(here) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        node, guarded = cluster.brokers["b1"].node, ("127.0.0.1", session_of(cluster).port)
        many = STRANGERS_LINES + 20
        bad = encode(Dial(body=b"?", mac=bytes(32), key="gateway-1"))

        def attack() -> None:
            for _ in range(many):
                for address, words in ((node.bound, b""), (node.bound, b"garbage!"), (guarded, bad)):
                    attacker = Attacker(address)
                    attacker.say(words)
                    if words:
                        attacker.hear_out()
                    attacker.sock.close()

        async with unharmed(cluster, target) as logs:
            await in_thread(attack)
            await cluster.until(lambda: node.links.lost == {"probe": many, "broken": many})
        assert node.counts.refused["bad_mac"] == many
        lines = {event: len(named(logs, event)) for event in ("link_lost", "dial_refused")}
        assert lines == dict.fromkeys(lines, STRANGERS_LINES)


async def test_a_broker_full_of_sessions_refuses_others_and_not_its_own(here: Path, secrets: Path) -> None:
    """At max_sessions a stranger is refused and told; an agent that comes back replaces its own session."""
    async with running_cluster(here, broker__max_sessions=2, **FAST) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        async with unharmed(cluster, Target("127.1.0.1")):
            wire, welcome = await in_thread(lambda: enrol(node.bound, secrets, host_id=b"one host"))
            late = await cluster.start_agent("late", "127.1.0.8", redundancy=1)
            await cluster.until(lambda: "overloaded" in late.agent.reasons()[0])
            assert "2 sessions, its limit" in late.agent.reasons()[0]
            again, newer = await in_thread(lambda: enrol(node.bound, secrets, host_id=b"one host"))
            assert newer.port == welcome.port and newer.epoch > welcome.epoch
            with pytest.raises(Gone):
                await in_thread(lambda: wire.pump(lambda: False))
            again.close()
            wire.close()
            await cluster.until(lambda: late.agent.state == "ready")
            await late.shut()
            del cluster.agents["late"]


BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "an id with a slash": {"agent_id": "a/b"},
    "an id with a newline": {"agent_id": "a\nb"},
    "an id with an escape": {"agent_id": "\x1b[31ma"},
    "an id that turns around": {"agent_id": "a\u202eb"},
    "an id with a space": {"agent_id": "a b"},
    "a namespace with a slash": {"namespace": "a/b"},
    "a namespace with a NUL": {"namespace": "a\0b"},
    "no address": {"addresses": ["nobody"]},
    "an address with a port": {"addresses": ["127.1.7.7:80"]},
    "an address out of range": {"addresses": ["127.1.7.777"]},
    "an address with zeros": {"addresses": ["127.001.7.7"]},
    "a short address": {"addresses": ["127.1"]},
    "a network": {"addresses": ["127.1.0.0/16"]},
    "an address with a zone": {"addresses": ["fe80::1%eth0"]},
    "a long IPv6 address": {"addresses": ["0:0:0:0:0:0:0:1"]},
    "an IPv6 address in capitals": {"addresses": ["FD00::A"]},
    "an address in brackets": {"addresses": ["[::1]"]},
    "a mapped address": {"addresses": ["::ffff:127.1.7.7"]},
    "a bad published address": {"publish": [Publish(ip="here", target_port=80)]},
    "a bad range of ports": {"exposes": ["80-"]},
    "a range backwards": {"exposes": ["90-80"]},
    "a port over 65535": {"exposes": ["65536"]},
    "words for ports": {"exposes": ["\x1b[2J"]},
}


async def test_a_bad_claim_in_the_hello_is_refused_by_name(here: Path, secrets: Path) -> None:
    """Ids, namespaces, addresses, ports: what would become a key, a field or a line is checked, and nothing is kept."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node

        def claim(changes: dict[str, Any]) -> str:
            try:
                wire, _ = enrol(node.bound, secrets, **changes)
            except Refusal as error:
                return error.code
            wire.close()
            return "welcome"

        async with unharmed(cluster, Target("127.1.0.1")):
            got = {name: await in_thread(partial(claim, changes)) for name, changes in BAD_CLAIMS.items()}
        assert got == dict.fromkeys(BAD_CLAIMS, "bad_request")
        assert len(cluster.registry.snapshot().tuples) == 1


async def test_processes_of_one_host_replace_each_other_at_once(
    here: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one has the agent_id, and the port; nobody waits for a ping to the older link, which answers none."""

    async def never(*_: object) -> bool:
        await trio.sleep_forever()
        return True

    monkeypatch.setattr(registrar.Registrar, "_lives", never)
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        async with unharmed(cluster, Target("127.1.0.1")):
            wires: list[tuple[Wire, Welcome]] = []

            async def one() -> None:
                wires.append(await in_thread(lambda: enrol(node.bound, secrets, host_id=b"one host")))

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(one)
            await cluster.until(lambda: len(node.relay.links) == 2)
            newest = max(welcome.epoch for _, welcome in wires)
            assert [t.epoch for t in cluster.registry.lookup("default", "127.1.7.7")] == [newest]
            assert len({welcome.port for _, welcome in wires}) == 1
            for wire, _ in wires:
                wire.close()
            await cluster.until(lambda: len(node.sessions) == 1)


async def test_a_dead_session_gives_way_and_a_living_one_stays(
    here: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that does not answer a ping is replaced by whoever comes; one that answers stays, and the log has both."""
    monkeypatch.setattr(registrar, "PROBE_SECONDS", 0.2)
    async with running_cluster(here) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            dead, _ = await in_thread(lambda: enrol(node.bound, secrets, host_id=b"one", host="host-7"))
            wire, _ = await in_thread(lambda: enrol(node.bound, secrets, host_id=b"two", host="host-8"))
            assert "its link was dead" in named(logs, "session_replaced")[-1]["reason"]

            def lives() -> None:
                """As long as the link is there, it answers pings."""
                with suppress(Gone):
                    wire.pump(lambda: False)

            monkeypatch.setattr(registrar, "PROBE_SECONDS", 3600.0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, lives)
                for claim in ({"host_id": b"one"}, {"host_id": b""}, {"host_id": b"two", "addresses": ["127.1.7.8"]}):
                    comes = partial(enrol, node.bound, secrets, host="host-9", **claim)
                    with pytest.raises(Refusal) as caught:
                        await in_thread(comes)
                    assert "duplicate_agent" in str(caught.value), caught.value
                    assert re.search(r"session from host-8 \(\S+\), and this link is from host-9", str(caught.value))
                wire.sock.shutdown(socket.SHUT_RDWR)
            told = [(line["holder"].split()[0], line["refused"].split()[0]) for line in named(logs, "agent_duplicated")]
            assert told == [("host-8", "host-9")] * 3
            assert [entry.refused.split()[0] for entry in node.duplicates.current()] == ["host-9"] * 3
            assert node.session_refusals["duplicate_agent"] == 3
            dead.close()
            wire.close()
            await cluster.until(lambda: len(node.sessions) == 1)
