"""Nobody but the target's own agent gets a client "connected": registries that lie, brokers that were broken into.

The tuple of the attacker comes first, always. What it leads to is either a real agent that is not the target's, or a
"broker" that has everything a broker has, the cluster key too, and says whatever the test makes it say.
"""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from rtunnel.registry import COUNTER_BITS, Registration, Tuple
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.trust import pki
from rtunnel.trust.certificates import new_key
from rtunnel.trust.files import PUBLIC, replace
from rtunnel.trust.identity import load_pair, load_private_key, load_trust_store, read_certificate
from rtunnel.trust.keys import GatewayKey, gateway_key, load_cluster_keys, load_gateway_key
from rtunnel.trust.pki import Directory, open_directory
from rtunnel.trust.proof import ACCEPTED, Exchange, sign
from rtunnel.trust.tls import certificate_der
from rtunnel.wire.messages import (
    Accepted,
    Dial,
    DialAnswer,
    DialBody,
    Dialling,
    Refuse,
    decode_body,
    encode,
    encode_body,
)
from rtunnel.wire.refusal import CONNECTION_REFUSED, Refused
from rtunnel_agent.enrolment import AgentIdentity
from rtunnel_agent.proof import Answer, Prover
from rtunnel_socks.proof import Proofs
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.logs import Events, named
from support.messages import decoder_of
from support.plumbing import free_port, kept, read_exactly
from support.polling import until

ASKED, OTHER = "127.1.0.1", "127.1.0.2"
PATIENCE = 15.0
DAY = 86400.0


# --- a broker that was broken into --------------------------------------------------------------------------


@dataclass
class Rogue:
    """Takes Dials like a guarded port and answers as it likes; then it plays the target."""

    secrets: Path
    say: Callable[[Rogue, Dial], bytes] = lambda rogue, dial: b""
    last: bytes = b"evil\n"
    dials: list[Dial] = field(default_factory=list)
    sock: socket.socket = field(default_factory=lambda: kept(socket.create_server(("127.0.0.1", 0))))

    def __post_init__(self) -> None:
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self.sock.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(kept(taken),), daemon=True).start()

    def _talk(self, taken: socket.socket) -> None:
        try:
            dial = one_message(taken, Dial)
            self.dials.append(dial)
            taken.sendall(self.say(self, dial) + self.last)
            while taken.recv(1 << 16):
                pass
        except OSError:
            pass

    def signs(self, body: bytes, key: GatewayKey) -> bytes:
        """A Dial as a broker can make it, in the name of any gateway."""
        (cluster,) = load_cluster_keys(self.secrets / "cluster.key")
        return encode(Dial(body=body, mac=gateway_key(cluster, key.id).sign(body), key=key.id))


def one_message(sock: socket.socket, expected: Any) -> Any:
    """The next message; OSError when the connection ends before."""
    decoder = decoder_of(expected)
    while (message := decoder.next()) is None:
        data = sock.recv(1)
        if not data:
            raise ConnectionResetError
        decoder.feed(data)
    return message


def answer_to(address: tuple[str, int], frame: bytes) -> Any:
    """What a guarded port answers to this Dial."""
    with socket.create_connection(address, timeout=PATIENCE) as sock:
        sock.sendall(frame)
        while isinstance(answer := one_message(sock, DialAnswer), Dialling):
            pass
        return answer


@dataclass
class Scene:
    """a1 answers for ASKED on b2, a2 for OTHER on b1; the attacker is b1."""

    cluster: Cluster
    secrets: Path
    target: Target
    other: Target
    events: Events

    @property
    def key(self) -> GatewayKey:
        return load_gateway_key(self.secrets / "gateway.key")

    def true(self, ip: str) -> Tuple:
        """The tuple of an agent's session."""
        wanted = {ASKED: "b2", OTHER: "b1"}[ip]
        (found,) = [t for t in self.cluster.registry.lookup("default", ip) if t.node == wanted]
        return msgspec.structs.replace(found, beat=0.0)

    async def lie(self, ps_port: int, **changes: object) -> Tuple:
        """A tuple for ASKED that leads to this port and is tried before all others."""
        node = next(n for n in self.cluster.registry.nodes() if n.node == "b1")
        epoch = node.incarnation << COUNTER_BITS | 0xFFFF
        lie = msgspec.structs.replace(self.true(ASKED), node="b1", ps_port=ps_port, epoch=epoch, **changes)
        self.cluster.registry.register(Registration(lie.epoch, (lie,), ()))
        gateway = self.cluster.gateway
        await self.cluster.until(lambda: lie.ps_port in [t.ps_port for t in gateway.table.lookup("default", ASKED)])
        gateway.paths.order = (  # type: ignore[method-assign]
            lambda tuples, nodes, now: sorted(tuples, key=lambda t: t.ps_port != ps_port)
        )
        return lie

    async def fails(self) -> str:
        """The attacker's tuple is the only one: the client is refused. The reason that the log has."""
        with pytest.raises(SocksRefused):
            await self.cluster.ask(ASKED, self.target.port)
        return self.reasons()[-1]

    def reasons(self) -> list[str]:
        """Of all proofs that failed."""
        return [f"{line['code']}: {line['reason']}" for line in self.events if line["event"] == "proof_failed"]


@asynccontextmanager
async def scene(directory: Path, events: Events, **keys: object) -> AsyncIterator[Scene]:
    """The cluster of `Scene`. Its tuples live for long, and an attacker may take his time: no hedge helps."""
    keys = {"gateway__hedge_delay": PATIENCE, **keys}
    async with running_cluster(directory, MemoryRegistry(ttl=60.0, quarantine=120.0), **keys) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_broker("b2")
        await cluster.start_gateway()
        target = Target(ASKED, free_port())
        for number, ip in ((1, ASKED), (2, OTHER)):
            cluster.vip.pinned = cluster.vip.backends[2 - number]
            await cluster.start_agent(f"a{number}", ip, redundancy=1)
            await cluster.until(lambda: all(part.agent.state == "ready" for part in cluster.agents.values()))
        await cluster.whole()
        yield Scene(cluster, cluster.secrets, target, Target(OTHER, target.port), events)


# --- what a broken broker can try ---------------------------------------------------------------------------

Attack = Callable[[Scene, Rogue, Dial], bytes]


def accepted(identity: AgentIdentity, dial: Dial) -> bytes:
    """As a real agent answers a Dial that names no pair."""
    return encode(proven(Accepted(), identity, dial))


def proven(answer: Answer, identity: AgentIdentity, dial: Dial) -> Answer:
    """Likewise."""
    return Prover(identity).prove(answer, decode_body(dial.body), dial.body)


def held(scene: Scene, name: str) -> AgentIdentity:
    """A certificate and key in files."""
    made = scene.secrets / name
    return AgentIdentity(*load_pair(f"{made}.pem", f"{made}.key"))


def issued(
    scene: Scene, *, agent_id: str = "a1", namespace: str = "default", address: str = ASKED, ago: float = 0.0
) -> AgentIdentity:
    """By the CA, for a day, so many seconds ago."""
    key = new_key()
    directory = Directory(scene.secrets, now=lambda: time.time() - ago)
    try:
        with directory.change():
            made = directory.issue_agent(
                agent_id, key.public_key(), namespace=namespace, addresses=[address], seconds=DAY, take_over=True
            )
    finally:
        directory.close()
    der = made.public_bytes(serialization.Encoding.DER)
    return AgentIdentity(der, key, read_certificate(der))


def rewritten(scene: Scene, rogue: Rogue, dial: Dial, to: str, **changes: Any) -> Accepted:
    """The answer of a real agent to a Dial that the broker has made out of the gateway's."""
    true = scene.true(to)
    asked = msgspec.structs.replace(decode_body(dial.body), node=true.node, epoch=true.epoch, **changes)
    answer = answer_to((true.ps_ip, true.ps_port), rogue.signs(encode_body(asked), scene.key))
    assert isinstance(answer, Accepted) and (answer.signature or answer.mac), answer
    return answer


def says_so(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Just "accepted"."""
    return encode(Accepted())


def unsigned(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The right certificate, which is no secret, and no signature."""
    return encode(msgspec.structs.replace(signed(scene, rogue, dial), signature=b""))


def garbled(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The right certificate and noise for a signature."""
    return encode(msgspec.structs.replace(signed(scene, rogue, dial), signature=bytes(range(71))))


def replayed(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """What the right agent has answered to another Dial for the same target."""
    return encode(signed(scene, rogue, dial))


def own_exchange(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The right agent has signed this very Dial; the key of the pair is to be the broker's."""
    true = scene.true(ASKED)
    answer = honest(scene, dial)
    assert true.agent_id == "a1" and answer.signature
    return encode(msgspec.structs.replace(answer, exchange=Exchange().public))


def no_exchange(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Nor is there to be none."""
    return encode(msgspec.structs.replace(honest(scene, dial), exchange=b""))


def short_exchange(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """A part of an exchange that is no whole one."""
    genuine, exchange = issued(scene), Exchange().public
    signature = sign(genuine.key, ACCEPTED, exchange, dial.body)
    return encode(Accepted(certificate=genuine.certificate, exchange=exchange[:-1], signature=signature))


def garbled_mac(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Noise for a MAC."""
    return encode(Accepted(mac=bytes(range(32))))


def short_mac(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """A byte of one: guessed soon, if it were enough."""
    return encode(Accepted(mac=b"m"))


def replayed_mac(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """What the right agent has answered to another Dial of the same gateway, by MAC where they know each other."""
    return encode(rewritten(scene, rogue, dial, ASKED, nonce=bytes(16)))


def own_pair(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """A MAC by the key of a pair of the broker and the gateway, with the agent's certificate, which is no secret."""
    genuine = scene.cluster.agents["a1"].agent.identity
    assert genuine is not None
    pair = Exchange().with_gateway(decode_body(dial.body).exchange, genuine.certificate)
    return encode(Accepted(mac=pair.mac(ACCEPTED, dial.body), certificate=genuine.certificate))


def others_mac(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Another agent, which the gateway knows well, is made to answer for an address of its own."""
    proofs = scene.cluster.gateway.trust.proofs
    assert proofs is not None
    known = proofs.known("default", OTHER)
    return encode(rewritten(scene, rogue, dial, OTHER, ip=OTHER, pair=known.pair.id if known else b""))


def signed(scene: Scene, rogue: Rogue, dial: Dial) -> Accepted:
    """The right agent's answer to another Dial, by signature."""
    answer = rewritten(scene, rogue, dial, ASKED, nonce=secrets.token_bytes(16), pair=b"")
    assert answer.signature
    return answer


def honest(scene: Scene, dial: Dial) -> Accepted:
    """The right agent's signature over this very Dial."""
    return proven(Accepted(), issued(scene), dial)


NO = Refuse(code="target_refused", text="the target refused the connection")


def refuses(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Just no, in the target's name, to keep clients from an agent that has a session elsewhere."""
    return encode(NO)


def refuses_for_another(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """No, by an agent whose key was stolen."""
    return encode(proven(NO, issued(scene, agent_id="a2", address=OTHER), dial))


def yes_made_no(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The proof of a yes under a no."""
    yes = honest(scene, dial)
    return encode(msgspec.structs.replace(NO, **{part: getattr(yes, part) for part in PROOF}))


def no_made_yes(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The proof of a no under a yes."""
    no = proven(NO, issued(scene), dial)
    return encode(Accepted(**{part: getattr(no, part) for part in PROOF}))


def another_no(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The proof of one no under another."""
    return encode(msgspec.structs.replace(proven(NO, issued(scene), dial), code="not_exposed"))


PROOF = "mac", "certificate", "exchange", "signature"


def sent_on(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The Dial rewritten for another agent, and that one's honest answer."""
    return encode(rewritten(scene, rogue, dial, OTHER, ip=OTHER))


def others_answer(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Another agent, whose key was stolen, signs the very Dial."""
    return accepted(issued(scene, agent_id="a2", address=OTHER), dial)


def others_key(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The right certificate, and the signature of another agent."""
    thief = issued(scene, agent_id="a2", address=OTHER)
    answer = proven(Accepted(), thief, dial)
    return encode(msgspec.structs.replace(answer, certificate=signed(scene, rogue, dial).certificate))


def other_namespace(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The same address in another VPC."""
    return accepted(issued(scene, namespace="other"), dial)


def expired(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """A certificate of the right agent, two days old, good for one."""
    return accepted(issued(scene, ago=2 * DAY), dial)


def of_the_future(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """One that is not valid yet."""
    return accepted(issued(scene, ago=-2 * DAY), dial)


def brokers_own(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """The broker's own certificate and key."""
    return accepted(held(scene, "broker"), dial)


def another_ca(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """A certificate for everything, from a CA of its own."""
    elsewhere = scene.secrets.parent / "elsewhere"
    if not elsewhere.exists():
        pki.init(elsewhere)
        pki.issue_agent(elsewhere, "a1", agent_id="a1", namespace="default", addresses=[ASKED])
    return accepted(AgentIdentity(*load_pair(elsewhere / "a1.pem", elsewhere / "a1.key")), dial)


def no_certificate(scene: Scene, rogue: Rogue, dial: Dial) -> bytes:
    """Noise for a certificate."""
    return encode(Accepted(certificate=bytes(range(256)), signature=bytes(71)))


NOT_THE_PAIRS = "not_proven: the MAC is not by the key of a pair with this target's agent"

ATTACKS: dict[Attack, str] = {
    says_so: "not_proven: the agent showed no certificate",
    unsigned: "not_proven: the signature is not agent/default/a1's over this Dial",
    garbled: "not_proven: the signature is not agent/default/a1's over this Dial",
    replayed: "not_proven: the signature is not agent/default/a1's over this Dial",
    own_exchange: "not_proven: the signature is not agent/default/a1's over this Dial",
    no_exchange: "not_proven: the signature is not agent/default/a1's over this Dial",
    short_exchange: "not_proven: the signature is not agent/default/a1's over this Dial",
    garbled_mac: NOT_THE_PAIRS,
    short_mac: NOT_THE_PAIRS,
    replayed_mac: "not_proven: the ",  # by signature where the two have no pair yet
    own_pair: NOT_THE_PAIRS,
    others_mac: "not_proven: the ",  # likewise
    sent_on: "not_proven: the certificate of agent/default/a2 does not have the address 127.1.0.1",
    others_answer: "not_proven: the certificate of agent/default/a2 does not have the address 127.1.0.1",
    others_key: "not_proven: the signature is not agent/default/a1's over this Dial",
    other_namespace: "not_proven: agent/other/a1 is of another namespace than default",
    expired: "not_proven: the certificate of agent/default/a1 has expired",
    of_the_future: "not_proven: the certificate of agent/default/a1 is not valid yet",
    brokers_own: "not_proven: the certificate is broker/broker's, and no agent's",
    another_ca: "not_proven: the certificate is not from a CA in force",
    no_certificate: "not_proven: is not a certificate",
    refuses: "not_proven: the agent showed no certificate",
    refuses_for_another: "not_proven: the certificate of agent/default/a2 does not have the address 127.1.0.1",
    yes_made_no: "not_proven: the signature is not agent/default/a1's over this Dial",
    no_made_yes: "not_proven: the signature is not agent/default/a1's over this Dial",
    another_no: "not_proven: the signature is not agent/default/a1's over this Dial",
}


async def test_what_a_broken_broker_says_is_not_believed(tmp_path: Path, events: Events) -> None:
    """Every attack: with a good tuple beside it the client is served by that, and the log is loud."""
    async with scene(tmp_path, events) as here:
        rogue = Rogue(here.secrets)
        lie = await here.lie(rogue.port)
        for number, (attack, reason) in enumerate(ATTACKS.items(), 1):
            rogue.say = lambda rogue, dial, attack=attack: attack(here, rogue, dial)  # type: ignore[misc]
            assert await here.cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode(), attack.__name__
            assert here.reasons()[-1].startswith(reason), attack.__name__
            assert len(here.reasons()) == len(rogue.dials) == number
        loud = named(events, "proof_failed")
        assert all(line["log_level"] == "error" for line in loud)
        assert {(line["node"], line["ps"], line["target"]) for line in loud} == {
            ("b1", f"127.0.0.1:{lie.ps_port}", f"{ASKED}:{here.target.port}")
        }
        ended = named(events, "stream_ended")
        assert {(line["proof"], line["certificate"], line["node"]) for line in ended} <= {
            ("ok", "agent/default/a1", "b2")
        }


async def test_without_a_good_tuple_the_client_is_refused(tmp_path: Path, events: Events) -> None:
    """Every attack alone: no "connected" and no byte, over SOCKS5 and HTTP."""
    async with scene(tmp_path, events) as here:
        rogue = Rogue(here.secrets)
        await here.lie(rogue.port)
        gateway, true = here.cluster.gateway, here.true(ASKED)
        gateway.paths.order = (  # type: ignore[method-assign]
            lambda tuples, nodes, now: [t for t in tuples if t.ps_port != true.ps_port]
        )
        for attack, reason in ATTACKS.items():
            rogue.say = lambda rogue, dial, attack=attack: attack(here, rogue, dial)  # type: ignore[misc]
            assert (await here.fails()).startswith(reason), attack.__name__
        answer = await here.cluster.http(f"CONNECT {ASKED}:{here.target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 503 ") and b"evil" not in answer
        answer = await here.cluster.http(
            f"GET http://{ASKED}:{here.target.port}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.startswith(b"HTTP/1.1 503 ") and b"evil" not in answer
        refused = named(events, "request_refused")
        assert len(refused) == len(ATTACKS) + 2 and all(line["proof"] for line in refused)


async def test_a_broken_broker_that_talks_for_ever_is_cut_short(tmp_path: Path, events: Events) -> None:
    """An agent says Dialling once; megabytes of it are a fault, and the next path is tried."""
    async with scene(tmp_path, events) as here:
        rogue = Rogue(here.secrets, lambda rogue, dial: encode(Dialling()) * 100_000)
        await here.lie(rogue.port)
        assert await here.cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()
        (failed,) = named(events, "tuple_failed")
        assert failed["code"] == "protocol_error" and "Dialling" in failed["reason"]


async def test_a_broken_broker_can_hold_a_client_up_and_not_keep_it(tmp_path: Path, events: Events) -> None:
    """It says that the target is being connected, for ever: after half the time the other path is tried."""
    async with scene(tmp_path, events, gateway__hedge_delay=0.01, gateway__dial_timeout=3.0) as here:
        rogue = Rogue(here.secrets, lambda rogue, dial: encode(Dialling()), last=b"")
        await here.lie(rogue.port)
        assert await here.cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()
        (ended,) = await in_thread(lambda: await_lines(events, "stream_ended", 1))
        assert (ended["node"], ended["attempts"]) == ("b2", 2)


async def test_an_agents_own_no_is_the_last_word(tmp_path: Path, events: Events) -> None:
    """Proved, by signature and by MAC, it ends the dial: no other path is asked for the same."""
    async with scene(tmp_path, events) as here:
        rogue = Rogue(here.secrets)
        true = here.true(ASKED)
        gateway = here.cluster.gateway
        await here.lie(rogue.port)
        gateway.paths.order = (  # type: ignore[method-assign]
            lambda tuples, nodes, now: sorted(tuples, key=lambda t: t.ps_port != true.ps_port)
        )
        for _ in range(2):
            with pytest.raises(SocksRefused) as refused:
                await here.cluster.ask(ASKED, 9)
            assert refused.value.code == CONNECTION_REFUSED
        assert not rogue.dials and not here.reasons()
        assert gateway.trust.proofs is not None and gateway.trust.proofs.known("default", ASKED) is not None


async def test_an_honest_answer_passes_any_way(tmp_path: Path, events: Events) -> None:
    """The test above could fail: what has the right key and signs this very Dial is believed, whoever hands it on."""

    def says(rogue: Rogue, dial: Dial) -> bytes:
        return accepted(genuine, dial)

    async with scene(tmp_path, events) as here:
        genuine = issued(here)
        rogue = Rogue(here.secrets, says)
        await here.lie(rogue.port)
        assert await here.cluster.ask(ASKED, here.target.port) == b"evil"
        assert not here.reasons()


async def test_the_first_answer_is_signed_and_those_that_follow_have_a_mac(tmp_path: Path, events: Events) -> None:
    """One signature for a gateway and an agent's certificate; another one signs again, as one that forgot."""
    proved: list[str] = []

    def watched(prover: Prover) -> Prover:
        prove = prover.prove

        def watching(answer: Answer, dial: DialBody, body: bytes) -> Answer:
            made = prove(answer, dial, body)
            proved.append("mac" if made.mac and not (made.signature or made.certificate) else "signature")
            return made

        prover.prove = watching  # type: ignore[method-assign]
        return prover

    async with scene(tmp_path, events) as here:
        targets = here.cluster.agents["a1"].agent.targets
        assert targets.prover is not None
        genuine = targets.prover.identity
        for identity in (genuine, genuine, issued(here)):
            targets.prover = watched(Prover(identity))
            for _ in range(3):
                assert await here.cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()
        assert proved == ["signature", "mac", "mac"] * 3
        ended = await in_thread(lambda: await_lines(events, "stream_ended", 9))
        assert {(line["proof"], line["certificate"]) for line in ended} == {("ok", "agent/default/a1")}


def test_damaged_answers_are_refused(tmp_path: Path) -> None:
    """Each bit of certificate and signature turned over, each cut, and noise: a refusal, never a crash nor a yes."""
    pki.init(tmp_path / "pki")
    pki.issue_agent(tmp_path / "pki", "a1", agent_id="a1", namespace="default", addresses=[ASKED])
    trust_store = load_trust_store(tmp_path / "pki" / "ca.pem")
    certificate, key = certificate_der(tmp_path / "pki" / "a1.pem"), load_private_key(tmp_path / "pki" / "a1.key")
    body, exchange, proofs = bytes(137), Exchange(), Proofs(trust_store)
    signature = sign(key, ACCEPTED, exchange.public, body)
    good = Accepted(certificate=certificate, exchange=exchange.public, signature=signature)
    with pytest.raises(Refused):
        proofs.check(good, body, "default", OTHER, None)
    assert proofs.known("default", ASKED) is None
    assert proofs.check(good, body, "default", ASKED, None).name == "a1"
    noise = random.Random(1)
    bad = [{"signature": data} for data in (*damages(signature), *(noise.randbytes(size) for size in range(128)))]
    bad += [{"exchange": data} for data in damages(exchange.public)]
    inner = x509.load_der_x509_certificate(certificate).tbs_certificate_bytes
    bad += [{"certificate": data} for data in damages(certificate) if inner not in data]
    known = proofs.known("default", ASKED)
    assert known is not None
    mac = exchange.with_gateway(proofs.exchange, certificate).mac(ACCEPTED, body)
    assert proofs.check(Accepted(mac=mac), body, "default", ASKED, known).name == "a1"
    bad += [{"mac": data} for data in damages(mac) if data]
    for changes in bad:
        with pytest.raises(Refused), warnings.catch_warnings(action="ignore"):
            proofs.check(msgspec.structs.replace(good, **changes), body, "default", ASKED, known)
    with pytest.raises(Refused):
        proofs.check(Accepted(mac=mac), body, "default", OTHER, proofs.known("default", OTHER))
    assert proofs.known("default", ASKED) is known


def damages(data: bytes) -> Iterator[bytes]:
    for at in range(len(data)):
        yield data[:at]
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


# --- registries that lie, and agents that do ----------------------------------------------------------------


async def test_a_tuple_that_leads_to_another_agent(tmp_path: Path, events: Events) -> None:
    """The registry leads ASKED to a2, and a2 claims ASKED as well: it has the join token, and no certificate for it."""
    async with scene(tmp_path, events) as here:
        cluster = here.cluster
        cluster.vip.pinned = cluster.vip.backends[0]
        cluster.registry._taken = lambda entry, now: None  # type: ignore[attr-defined]  # it does not look
        thief = await cluster.start_agent("thief", ASKED, redundancy=1, certificate="", key="")
        await cluster.until(lambda: thief.agent.state == "ready")
        (claim,) = [t for t in cluster.registry.lookup("default", ASKED) if t.agent_id == "thief"]
        await cluster.until(lambda: len(cluster.gateway.table.lookup("default", ASKED)) == 2)
        cluster.gateway.paths.order = (  # type: ignore[method-assign]
            lambda tuples, nodes, now: sorted(tuples, key=lambda t: t.ps_port != claim.ps_port)
        )
        assert await cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()
        assert here.reasons() == [f"not_proven: {NO_CERTIFICATE}"]
        thief.agent.targets.prover = Prover(issued(here, agent_id="thief", address="127.1.0.9"))
        assert await cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()
        text = "not_proven: the certificate of agent/default/thief does not have the address 127.1.0.1"
        assert here.reasons()[1:] == [text]
        assert thief.agent.targets.counts.accepted == 2  # it did its best
        thief.agent.targets.prover = Prover(issued(here, agent_id="thief", address=ASKED))
        assert await cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()
        assert len(here.reasons()) == 2
        ended = await in_thread(lambda: await_lines(events, "stream_ended", 3))
        assert sorted(line["certificate"] for line in ended) == ["agent/default/a1"] * 2 + ["agent/default/thief"]


NO_CERTIFICATE = 'the agent showed no certificate: give it one, or write gateway.proof = "off"'


def await_lines(events: Events, event: str, count: int) -> list[Any]:
    """So many lines of this event: a pair may end a moment after its client has the answer."""

    def found() -> list[Any]:
        return [line for line in events if line["event"] == event]

    until(lambda: len(found()) >= count, what=event)
    return found()


async def test_proofs_can_be_off(tmp_path: Path, events: Events) -> None:
    """Then an agent without a certificate is good enough, no CA is needed, and the audit line says so."""
    async with running_cluster(tmp_path, gateway__proof="off", gateway__ca="") as cluster:
        await cluster.start(brokers=1, certificate="", key="")
        target = Target(ASKED)
        assert await cluster.ask(ASKED, target.port) == f"{ASKED}:hello".encode()
        (line,) = await in_thread(lambda: await_lines(events, "stream_ended", 1))
        assert (line["proof"], line["certificate"]) == ("off", "")


# --- revocation ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_pace")
async def test_a_revoked_agent_loses_its_streams_and_gets_no_others(tmp_path: Path, events: Events) -> None:
    """A new trust list, by file: within seconds the open stream is reset, and a new one is refused as revoked."""
    trust = tmp_path / "trust"
    async with scene(tmp_path, events, gateway__trust=str(trust)) as here:
        cluster = here.cluster
        asked, other = [await cluster.socks(ip, here.target.port) for ip in (ASKED, OTHER)]
        await in_thread(lambda: revoke(here.secrets, "agent/default/a1", trust))
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            await in_thread(lambda: asked.recv(1))
        assert time.monotonic() - began < 5
        assert (await here.fails()).startswith("revoked: the certificate of agent/default/a1 is revoked")
        ended = await in_thread(lambda: await_lines(events, "stream_ended", 1))
        (line,) = [line for line in ended if line["reason"] == "revoked"]
        assert line["certificate"] == "agent/default/a1"
        other.sendall(b"still here\n")
        assert await in_thread(lambda: read_line(other)) == f"{OTHER}:still here".encode()
        # A certificate that is issued later is good again.
        cluster.agents["a1"].agent.targets.prover = Prover(issued(here))
        assert await cluster.ask(ASKED, here.target.port) == f"{ASKED}:hello".encode()


def revoke(secrets: Path, subject: str, trust: Path) -> None:
    with open_directory(secrets) as opened:
        with opened.change():
            opened.revoke(subject, force=True)
        opened.refresh()
        replace(trust, PUBLIC, opened.signed)


# --- gateways' keys at the broker ---------------------------------------------------------------------------


def dial_of(here: Scene, by: GatewayKey, **changes: Any) -> tuple[tuple[str, int], bytes]:
    """A guarded port and a good Dial for it, but for the changes."""
    true = here.true(ASKED)
    fields: dict[str, Any] = {
        "version": 1, "namespace": "default", "ip": ASKED, "port": here.target.port, "node": true.node,
        "epoch": true.epoch, "nonce": time.monotonic_ns().to_bytes(16), "time": int(time.time() * 1000),
    }  # fmt: skip
    body = encode_body(DialBody(**fields))
    frame: dict[str, Any] = {"body": body, "mac": by.sign(body), "key": by.id}
    return (true.ps_ip, true.ps_port), encode(Dial(**frame | changes))


async def test_a_broker_knows_its_gateways(tmp_path: Path, events: Events) -> None:
    """Every gateway by its own key; replays, other ids, wrong MACs and keys that are no gateway's are refused."""
    async with scene(tmp_path, events) as here:
        mine = here.key
        pki.issue_gateway(here.secrets, "paris")
        paris = load_gateway_key(here.secrets / "paris.key")
        (cluster_key,) = load_cluster_keys(here.secrets / "cluster.key")
        for key in (mine, paris):
            address, good = dial_of(here, key)
            assert isinstance(await in_thread(partial(answer_to, address, good)), Accepted)
        wrong = {
            "replayed": good,
            "bad_mac": dial_of(here, mine, key=paris.id)[1],
        }
        for code, frame in wrong.items():
            assert (await in_thread(partial(answer_to, address, frame))).code == code
        for frame in (
            dial_of(here, mine, key="nobody-0000")[1],
            dial_of(here, mine, key="")[1],
            dial_of(here, GatewayKey(mine.id, cluster_key))[1],  # the cluster key itself signs nothing
            dial_of(here, GatewayKey(mine.id, bytes(32)))[1],
            dial_of(here, mine, mac=b"")[1],
        ):
            assert (await in_thread(partial(answer_to, address, frame))).code == "bad_mac"


async def test_a_revoked_gateway_loses_its_streams_and_gets_no_others(tmp_path: Path, events: Events) -> None:
    """The key on the list of the revoked: open streams of that gateway end, a new Dial is refused; others stay."""
    async with scene(tmp_path, events) as here:
        pki.issue_gateway(here.secrets, "paris")
        paris = load_gateway_key(here.secrets / "paris.key")
        address, frame = dial_of(here, paris)
        stolen = kept(socket.create_connection(address, timeout=PATIENCE))
        stolen.sendall(frame + b"hello\n")
        assert isinstance(await in_thread(lambda: one_message(stolen, DialAnswer)), Accepted)
        greeting = f"{ASKED}:hello\n".encode()
        assert await in_thread(lambda: read_exactly(stolen, len(greeting))) == greeting
        mine = await here.cluster.socks(ASKED, here.target.port)
        node = here.cluster.brokers["b2"].node

        with open_directory(here.secrets) as authority:
            with authority.change():
                authority.revoke(f"gateway/{paris.id}", force=True)
            signed = authority.signed

        def put() -> None:
            assert node.trust.trust_store is not None and node.trust.trust_store.take(signed)
            node.trust.changed()

        await node.bridge.run(put)
        with pytest.raises(ConnectionResetError):
            await in_thread(lambda: stolen.recv(1))
        answer = await in_thread(lambda: answer_to(*dial_of(here, paris)))
        assert (answer.code, answer.text) == ("revoked", f"the gateway's key {paris.id} is revoked")
        mine.sendall(b"still here\n")
        assert await in_thread(lambda: read_line(mine)) == f"{ASKED}:still here".encode()
