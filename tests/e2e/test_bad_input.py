"""An attacker at every port of a real cluster, and peers that misbehave: nothing is lost, leaked or left listening.

Attackers are plain blocking sockets in threads, each from a loopback address of its own, by which the logs tell them apart.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from structlog.testing import capture_logs

from rtunnel import admin
from rtunnel.config import parse_endpoint
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.trust import pki
from rtunnel.trust.keys import DialSigner, load_cluster_key, load_token, new_token, token_mac
from rtunnel.trust.tls import certificate_der, certificate_fingerprint, server_context
from rtunnel.wire import messages, yamux
from rtunnel.wire.messages import (
    Challenge,
    Dial,
    DialAnswer,
    DialBody,
    Hello,
    MessageError,
    Proof,
    Refuse,
    Welcome,
    encode,
    encode_body,
)
from rtunnel_broker import node as node_module
from rtunnel_socks import gateway as gateway_module
from support.cluster import Cluster, Part, Target, in_thread, running_cluster
from support.plumbing import close_kept, kept, reset

PATIENCE = 10.0
#: Deadlines of the tests' roles: short, and long enough for a loaded machine.
DEADLINE = 0.6

Address = tuple[str, int]
Logs = list[Any]


@pytest.fixture(autouse=True)
def _no_socket_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gateway_module, "FOLLOW_WAIT", 0.05)  # the end of each test waits for it
    yield
    close_kept()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cluster's keys for the whole file."""
    made = tmp_path_factory.mktemp("cluster") / "pki"
    pki.init(made)
    return made


@pytest.fixture
def here(tmp_path: Path, secrets: Path) -> Path:
    """A directory for `running_cluster` with the keys in it."""
    (tmp_path / "pki").symlink_to(secrets)
    return tmp_path


# Attackers.

_sources = count(1)


def a_source() -> str:
    """A loopback address that no other attacker of this run has."""
    number = next(_sources)
    return f"127.66.{number >> 8}.{number & 255}"


@dataclass
class Attacker:
    """One connection from an address of its own; `answer` is all that it got until the other side closed."""

    address: Address
    source: str = field(default_factory=a_source)
    answer: bytes = b""
    ending: str = ""
    seconds: float = 0.0
    sock: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self.sock = kept(socket.socket())
        self.sock.settimeout(PATIENCE)
        self.sock.bind((self.source, 0))
        self._began = time.monotonic()
        try:
            self.sock.connect(self.address)
        except ConnectionResetError:  # accepted and shown out before we came to look
            self.ending = "reset"

    def say(self, data: bytes) -> None:
        """Send; whether the other side still listens is its affair."""
        try:
            self.sock.sendall(data)
        except OSError:
            pass

    def trickle(self, data: bytes, pause: float = 0.05) -> None:
        """One byte at a time, until the other side has enough."""
        quiet = threading.Event()
        for at in range(len(data)):
            quiet.wait(pause)
            try:
                self.sock.sendall(data[at : at + 1])
            except OSError:
                return

    def hear_out(self) -> None:
        """Read until the other side ends it."""
        try:
            while piece := self.sock.recv(1 << 16):
                self.answer += piece
            self.ending = self.ending or "FIN"
        except TimeoutError:
            self.ending = "never"
        except OSError:
            self.ending = "reset"
        self.seconds = time.monotonic() - self._began
        self.sock.close()

    def wrap(self, context: ssl.SSLContext) -> None:
        """TLS from here on."""
        self.sock = kept(context.wrap_socket(self.sock, server_hostname="broker.rtunnel"))


def trusting(secrets: Path, *alpn: str) -> ssl.SSLContext:
    """A client that believes in the cluster's CA."""
    context = ssl.create_default_context(cafile=secrets / "ca.pem")
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


Attack = Callable[[Attacker], None]


def says(data: bytes, *, fin: bool = False) -> Attack:
    """The bytes, then silence (or the end)."""

    def attack(attacker: Attacker) -> None:
        attacker.say(data)
        if fin:
            attacker.sock.shutdown(socket.SHUT_WR)

    return attack


def trickles(data: bytes) -> Attack:
    """The bytes, slowly."""
    return lambda attacker: attacker.trickle(data)


async def attack_all(address: Address, attacks: dict[str, Attack]) -> dict[str, Attacker]:
    """All of them at once; back when each was shown the door."""

    def run(attack: Attack) -> Attacker:
        attacker = Attacker(address)
        try:
            attack(attacker)
        except OSError as error:
            attacker.answer += str(error).encode()
        attacker.hear_out()
        return attacker

    done: dict[str, Attacker] = {}

    async def one(name: str, attack: Attack) -> None:
        done[name] = await in_thread(lambda: run(attack))

    async with trio.open_nursery() as nursery:
        for name, attack in attacks.items():
            nursery.start_soon(one, name, attack)
    return done


# What must hold afterwards.


def holdings(cluster: Cluster) -> dict[str, int]:
    """Whatever could leak."""
    held = {"descriptors": len(os.listdir("/proc/self/fd"))}  # noqa: PTH208
    for name, part in cluster.brokers.items():
        node = part.node
        held |= {
            f"{name} pairs": len(node.relay.pairs),
            f"{name} links": len(node.relay.links),
            f"{name} listeners": len(node.relay.listeners),
            f"{name} handshakes": node.handshakes,
            f"{name} sessions": len(node.sessions),
            f"{name} waiting": node.counts.waiting,
            f"{name} streams": node.counts.streams,
        }
    for name, part in cluster.agents.items():
        held |= {
            f"{name} pairs": len(part.agent.relay.pairs),
            f"{name} links": len(part.agent.relay.links),
            f"{name} streams": part.agent.targets.counts.streams,
        }
    gateway = cluster.gateway
    held |= {
        "gateway pairs": len(gateway.relay.pairs),
        "gateway clients": gateway.counts.clients,
        "gateway streams": gateway.counts.streams,
    }
    return held


@asynccontextmanager
async def unharmed(cluster: Cluster, target: Target, *, slowest: float = 2.0) -> AsyncIterator[Logs]:
    """A good client is served the whole time, nothing crashes, and at the end is held what was held before and no more.

    Gives the log.
    """
    await cluster.ask(target.ip, target.port)
    await cluster.until(lambda: not holdings(cluster)["gateway streams"])
    await settled(cluster)
    before = holdings(cluster)
    served: list[float] = []
    over = trio.Event()

    async def good_client() -> None:
        while not over.is_set():
            began = trio.current_time()
            assert await cluster.ask(target.ip, target.port) == f"{target.ip}:hello".encode()
            served.append(trio.current_time() - began)
            with trio.move_on_after(0.02):
                await over.wait()

    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(good_client)
            try:
                yield logs
            finally:
                over.set()
    crashes = [entry for entry in logs if entry["event"] == "relay_crash"]
    assert not crashes, crashes
    assert served and max(served) < slowest, max(served)
    try:
        await cluster.until(lambda: all(now <= before[key] for key, now in holdings(cluster).items()), PATIENCE)
    except trio.TooSlowError:
        after = holdings(cluster)
        pytest.fail(f"leaked: { {key: (before[key], now) for key, now in after.items() if now > before[key]} }")


async def settled(cluster: Cluster) -> None:
    """Nothing of earlier requests is on its way any more."""
    last: list[dict[str, int]] = [{}]
    same = [0]

    def quiet() -> bool:
        now = holdings(cluster)
        same[0] = same[0] + 1 if now == last[0] else 0
        last[0] = now
        return same[0] >= 10

    await cluster.until(quiet)


def told(logs: Logs, attacker: Attacker) -> str:
    """What the log says of this attacker: the event and the reason of its last line."""
    lines = [e for e in logs if attacker.source in (e.get("peer"), e.get("client"))]
    return f"{lines[-1]['event']}: {lines[-1].get('code', '')}: {lines[-1].get('reason', '')}" if lines else ""


# Links by hand.


class Gone(Exception):
    """The other end closed the link, or reset it."""


class Stream(yamux.Stream):
    """Keeps what it gets."""

    def __init__(self, session: Wire) -> None:
        super().__init__(session)
        self.data = bytearray()
        self.was_reset = False

    def on_data(self, data: memoryview) -> None:
        self.data += data
        self.consumed(len(data))

    def on_reset(self) -> None:
        self.was_reset = True


class Wire(yamux.Session):
    """One end of a link over a blocking socket, without manners: `control` is its first stream."""

    def __init__(self, sock: socket.socket, *, client: bool) -> None:
        super().__init__(client=client)
        self.sock = sock
        self.incoming: list[Stream] = []
        self.control = Stream(self)
        if client:
            self.attach(self.control)

    def emit(self, frame: bytes) -> None:
        self.sock.sendall(frame)

    def accepts(self) -> yamux.Stream:
        stream = Stream(self) if self.incoming else self.control
        self.incoming.append(stream)
        return stream

    def pump(self, condition: Callable[[], bool]) -> None:
        """Take frames until the condition holds. Raises Gone."""
        while not condition():
            try:
                data = self.sock.recv(1 << 16)
            except OSError as error:
                raise Gone(str(error)) from None
            if not data:
                raise Gone("FIN")
            self.receive(memoryview(data))

    def write(self, data: bytes, stream: Stream | None = None) -> None:
        """Bytes on a stream."""
        self.sock.sendall((stream or self.control).frame(data))

    def hear(self, wanted: Any, stream: Stream | None = None) -> Any:
        """The next message on a stream. Raises Gone, MessageError."""
        return self.hear_frame(wanted, stream)[0]

    def hear_frame(self, wanted: Any, stream: Stream | None = None) -> tuple[Any, bytes]:
        """The same, with its bytes."""
        source = stream or self.control
        decoder = messages.Decoder(wanted, messages.MAX_MESSAGE)
        while True:
            size = len(source.data)
            decoder.feed(source.data)
            source.data.clear()
            found = decoder.next_frame()
            if found is not None:
                source.data += decoder.rest()
                return found
            self.pump(lambda: len(source.data) > size or source.fin_received or source.was_reset)
            if not source.data:
                raise Gone("reset" if source.was_reset else "end of stream")

    def close(self) -> None:
        self.sock.close()


def hello(secrets: Path, **changes: Any) -> Hello:
    """A good Hello, but for the changes."""
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "agent_id": "raw",
        "instance": bytes(16),
        "namespace": "default",
        "addresses": ["127.1.7.7"],
        "nonce": os.urandom(16),
        "token_id": load_token(secrets / "join.token").id,
        "exposes": ["1-65535"],
    }
    return Hello(**fields | changes)


def link_to(address: Address, secrets: Path | None) -> Wire:
    """A link, with TLS when `secrets` is given."""
    attacker = Attacker(address)
    if secrets is not None:
        attacker.wrap(trusting(secrets, messages.ALPN))
    return Wire(attacker.sock, client=True)


def join(address: Address, secrets: Path, greeting: Hello, *, tls: bool = True, secret: bytes | None = None) -> Wire:
    """Up to the Proof."""
    wire = link_to(address, secrets if tls else None)
    frame = encode(greeting)
    wire.write(frame)
    challenge: Challenge = wire.hear(Challenge | Refuse)
    if isinstance(challenge, Refuse):
        raise Refusal(challenge)
    binding = b""
    if tls:
        assert isinstance(wire.sock, ssl.SSLSocket)
        certificate = wire.sock.getpeercert(binary_form=True)
        assert certificate
        binding = hashlib.sha256(certificate).digest()
    own = load_token(secrets / "join.token").secret if secret is None else secret
    if secret is None:
        assert challenge.mac == token_mac(own, b"rtunnel broker 1", frame, challenge.nonce, binding)
    wire.write(encode(Proof(mac=token_mac(own, b"rtunnel agent 1", frame, challenge.nonce, binding))))
    return wire


class Refusal(Exception):
    """The broker said no."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__(f"{refuse.code}: {refuse.text}")
        self.code = refuse.code


def enrol(address: Address, secrets: Path, *, tls: bool = True, **changes: Any) -> tuple[Wire, Welcome]:
    """A session of an agent made by hand."""
    wire = join(address, secrets, hello(secrets, **changes), tls=tls)
    answer = wire.hear(Welcome | Refuse)
    if isinstance(answer, Refuse):
        raise Refusal(answer)
    return wire, answer


# 1. The broker's link port.


def frame_of(body: bytes, length: int | None = None) -> bytes:
    """A message's frame, of any body."""
    return struct.pack(">I", len(body) if length is None else length) + body


def yamux_says(data: bytes, **more: Any) -> bytes:
    """The first Data frame of stream 1."""
    return yamux.HEADER.pack(0, yamux.DATA, yamux.SYN, 1, len(data)) + data


def link_attacks(secrets: Path) -> dict[str, tuple[Attack, str, bytes]]:
    """What is sent behind the TLS handshake (or at once, in plain mode), what the log must say of it, and the answer."""
    deep = b"\x82\xa1t\xa5hello\xa3foo" + b"\x91" * 4000
    good = encode(hello(secrets))
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
        "an oversized message": (says(yamux_says(frame_of(b"", 1 << 31))), "over the limit of 4096", refused),
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
        "a Proof before the Hello": (says(yamux_says(encode(Proof(mac=bytes(32))))), "Invalid value 'proof'", refused),
        "two Hellos": (says(yamux_says(good + good)), "Invalid value 'hello'", refused),
        "half a Hello, then silence": (says(yamux_says(good[:40])), "handshake deadline", late),
        "half a Hello, then the end": (says(yamux_says(good[:40]), fin=True), "closed by peer", b""),
        "a Hello, then silence": (says(yamux_says(good)), "handshake deadline", late),
        "a slow Hello": (trickles(yamux_says(good)), "handshake deadline", late),
        "silence": (says(b""), "handshake deadline", late),
        "half a header": (says(header(0, 0, 1, 1, 0)[:5]), "handshake deadline", late),
        "streams without end": (
            says(b"".join(header(0, 0, 1, n, 0) for n in range(1, 40001, 2))),
            "handshake deadline",
            late,
        ),
        "pings without end": (says(header(0, 2, 1, 0, 1) * 20000), "handshake deadline", late),
    }


def wrapped(attack: Attack, context: ssl.SSLContext) -> Attack:
    """The same inside TLS."""

    def inside(attacker: Attacker) -> None:
        attacker.wrap(context)
        attack(attacker)

    return inside


FAST = {"broker__handshake_timeout": DEADLINE, "gateway__handshake_timeout": DEADLINE}


@pytest.mark.parametrize("security", ["tls", "plain"])
async def test_the_link_port_withstands_every_frame(here: Path, secrets: Path, security: str) -> None:
    """Illegal frames, messages and silences: each link ends with its own reason in the log."""
    keys = {"broker__security": security, "agent__security": security}
    async with running_cluster(here, **FAST, **keys) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        attacks = link_attacks(secrets)
        context = trusting(secrets, messages.ALPN)
        run = {name: wrapped(a, context) if security == "tls" else a for name, (a, _, _) in attacks.items()}
        async with unharmed(cluster, target) as logs:
            done = await attack_all(cluster.brokers["b1"].node.bound, run)
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


def wraps(context: ssl.SSLContext) -> Attack:
    """A TLS handshake, then silence."""
    return lambda attacker: attacker.wrap(context)


def wraps_then_breaks_tls(context: ssl.SSLContext) -> Attack:
    """A whole TLS handshake, then bytes that are no TLS."""

    def attack(attacker: Attacker) -> None:
        attacker.wrap(context)
        with socket.socket(fileno=os.dup(attacker.sock.fileno())) as raw:
            raw.sendall(b"\x17\x03\x03\x40\x00" + os.urandom(1 << 14))

    return attack


async def test_the_link_port_withstands_every_handshake(here: Path, secrets: Path) -> None:
    """Garbage, other protocols, old TLS and stalled handshakes end by the deadline at the latest, with a reason."""
    old = trusting(secrets, messages.ALPN)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    first = client_hello(secrets)
    attacks: dict[str, tuple[Attack, str]] = {
        "garbage": (says(os.urandom(1 << 16)), "TLS"),
        "zeros": (says(bytes(1 << 16)), "TLS"),
        "an HTTP request": (says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "http request"),
        "an SSH banner": (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "TLS"),
        "a SOCKS greeting": (says(b"\5\1\0"), "deadline"),
        "TLS 1.2": (wraps(old), "unsupported protocol"),
        "a huge record": (says(b"\x16\x03\x01\xff\xff" + bytes(1 << 16)), "TLS"),
        "a broken ClientHello": (says(first[:60] + os.urandom(len(first) - 60)), "TLS"),
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
        wrong = {
            name: (told(logs, done[name]), done[name].ending, done[name].seconds)
            for name, (_, reason) in attacks.items()
            if reason not in told(logs, done[name]) or done[name].ending == "never" or done[name].seconds > 5 * DEADLINE
        }
        assert not wrong


# 2. The guarded port.


def dial_body(part: Part, welcome: Welcome, target: tuple[str, int], **changes: Any) -> DialBody:
    """A good Dial's body, but for the changes."""
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "namespace": "default",
        "ip": target[0],
        "port": target[1],
        "node": part.node.node,
        "epoch": welcome.epoch,
        "nonce": os.urandom(messages.NONCE_BYTES),
        "time": int(time.time() * 1000),
        "who": "attacker",
    }
    return DialBody(**fields | changes)


def signed(secrets: Path, body: bytes, *, key: bytes | None = None) -> bytes:
    """A Dial's frame."""
    signer = DialSigner(key or load_cluster_key(secrets / "cluster.key"))
    return encode(Dial(body=body, mac=signer.sign(body)))


def session_of(cluster: Cluster, agent: str = "a1", slot: int = 0) -> Welcome:
    """What an agent of the cluster was welcomed with."""
    session = cluster.agents[agent].agent.slots[slot].session
    assert session is not None and session.welcome is not None
    return session.welcome


def first_answer(data: bytes) -> tuple[str, str]:
    """The first message in what a guarded port said: (code, text) of a refusal, ("accepted", "")."""
    decoder = messages.Decoder(DialAnswer, messages.MAX_MESSAGE)
    decoder.feed(data)
    answer = decoder.next()
    if answer is None:
        return "nothing", ""
    return (answer.code, answer.text) if isinstance(answer, Refuse) else (type(answer).__name__.lower(), "")


async def test_the_guarded_port_withstands_every_input(here: Path, secrets: Path) -> None:
    """Garbage, oversized, truncated and slow Dials: an answer where one is possible, the deadline else."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        part, welcome = cluster.brokers["b1"], session_of(cluster)
        good = signed(secrets, encode_body(dial_body(part, welcome, (target.ip, target.port))))
        attacks: dict[str, tuple[Attack, str, str]] = {
            "garbage": (says(b"\xff" + os.urandom(1 << 16)), "protocol_error", "over the limit of 4096"),
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
    """Whoever sends on after the refusal, as fast as the kernel takes it, costs a bounded share of the loop and time."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        ports = [("127.0.0.1", session_of(cluster).port), cluster.gateway.bound]

        def flood(address: Address) -> None:
            attacker = Attacker(address)
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                attacker.say(b"\xff" * (1 << 20))
            attacker.sock.close()

        async with unharmed(cluster, Target("127.1.0.1"), slowest=1.0), trio.open_nursery() as nursery:
            for address in ports * 2:
                nursery.start_soon(in_thread, lambda address=address: flood(address))  # type: ignore[misc]


# 3. Open ports.


async def test_an_open_port_withstands_a_flood_of_connects(here: Path) -> None:
    """Early data is no matter, nor who leaves at once: each byte arrives or its connection is reset, and none stays."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start_broker("b1", open_ports__range=free_ports(4), open_ports__allow=["127.0.0.0/8"])
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
            attacker.say(os.urandom(20_000))
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
        await cluster.start_broker("b1", open_ports__range=free_ports(4), open_ports__allow=["127.0.0.0/8"])
        await cluster.start_gateway()
        target = Target("127.1.0.1")
        with socket.create_server(("127.1.0.1", 0)) as nobody:
            refused = nobody.getsockname()[1]
        await cluster.start_agent("a1", redundancy=1, publish=[{"target": f"127.1.0.1:{refused}"}], exposes=["1-65535"])
        await cluster.whole()
        (granted,) = session_of(cluster).open_ports
        async with unharmed(cluster, target) as logs:
            done = await attack_all(("127.0.0.1", granted.port), {"one": says(b"early"), "two": says(b"", fin=True)})
        for attacker in done.values():
            assert attacker.ending == "reset"
            assert told(logs, attacker).startswith("open_port_refused: target_refused")


# 4. The gateway's port.


def free_ports(size: int) -> str:
    """A range of so many ports that nobody has just now, below those that the kernel gives out."""
    while True:
        first = random.randrange(10_000, 30_000)
        probes: list[socket.socket] = []
        try:
            for port in range(first, first + size):
                probes.append(socket.create_server(("127.0.0.1", port)))
            return f"{first}-{first + size - 1}"
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()


def socks_request(host: bytes, port: int, *, command: int = 1, kind: int | None = None) -> bytes:
    """A request; a name unless the host has the size of an address."""
    kind = kind if kind is not None else {4: 1, 16: 4}.get(len(host), 3)
    address = bytes((len(host),)) + host if kind == 3 else host
    return bytes((5, command, 0, kind)) + address + struct.pack(">H", port)


GREETING = b"\5\1\0"
ANY_PORT = 9


async def test_the_gateway_withstands_every_socks_client(here: Path) -> None:
    """Unknown methods, commands, address types, odd names, other protocols: each its own reply, or none and a reason."""
    ip = socket.inet_aton("127.1.0.1")

    def replied(code: int) -> bytes:
        return b"\5\0\5" + bytes((code,)) + b"\0\1" + bytes(6)

    attacks: dict[str, tuple[Attack, bytes, str]] = {
        "a garbage byte": (says(b"\xfe"), b"", "the first byte is 0xfe"),
        "SOCKS4": (says(b"\4\1\0\x50\x7f\1\0\1\0"), b"", "SOCKS4 is not supported"),
        "a TLS ClientHello": (says(b"\x16\3\1\2\0\1" + os.urandom(600)), b"", "TLS to the proxy"),
        "no method": (says(b"\5\0"), b"\5\xff", "offers no method"),
        "unknown methods": (says(b"\5\3\1\x80\xfe"), b"\5\xff", "does not offer no authentication"),
        "255 unknown methods": (says(b"\5\xff" + bytes(range(1, 256))), b"\5\xff", "does not offer"),
        "login only": (says(b"\5\1\2"), b"\5\xff", "does not offer"),
        "BIND": (says(GREETING + socks_request(ip, ANY_PORT, command=2)), replied(7), "BIND is not supported"),
        "UDP ASSOCIATE": (says(GREETING + socks_request(ip, ANY_PORT, command=3)), replied(7), "UDP ASSOCIATE"),
        "command 0": (says(GREETING + socks_request(ip, ANY_PORT, command=0)), replied(7), "unknown command"),
        "command 255": (says(GREETING + socks_request(ip, ANY_PORT, command=255)), replied(7), "unknown command"),
        "address type 0": (says(GREETING + socks_request(ip, 9, kind=0)), replied(8), "address type 0x00"),
        "address type 2": (says(GREETING + socks_request(ip, 9, kind=2)), replied(8), "address type 0x02"),
        "address type 255": (says(GREETING + socks_request(ip, 9, kind=255)), replied(8), "address type 0xff"),
        "an empty name": (says(GREETING + socks_request(b"", 9, kind=3)), replied(1), "the name is empty"),
        "a name of 255 bytes": (says(GREETING + socks_request(b"x" * 255, 9)), replied(4), "is a name"),
        "a name with control characters": (
            says(GREETING + socks_request(b"a\r\nb\x1bc", 9)),
            replied(1),
            "printable",
        ),
        "a name with bytes over 127": (says(GREETING + socks_request(b"\xff\xfe\xfd", 9)), replied(1), "printable"),
        "a broken IPv6 literal": (says(GREETING + socks_request(b"[::1", 9, kind=3)), replied(1), "neither a name"),
        "an address with a zone": (says(GREETING + socks_request(b"fe80::1%eth0", 9)), replied(1), "zone"),
        "port 0": (says(GREETING + socks_request(ip, 0)), replied(1), "port 0"),
        "an address of nobody": (says(GREETING + socks_request(b"\0\0\0\0", 9)), replied(4), "no agent answers"),
        "a request of version 4": (says(GREETING + b"\4\1\0\1" + ip + b"\0\x09"), replied(1), "request of version 4"),
        "half a greeting": (says(b"\5\2\0"), b"", "deadline"),
        "half a request": (says(GREETING + socks_request(ip, ANY_PORT)[:7]), b"\5\0", "deadline"),
        "half a request and the end": (says(GREETING + b"\5\1\0", fin=True), b"\5\0", "ended before"),
        "silence": (says(b""), b"", "deadline"),
        "nothing and the end": (says(b"", fin=True), b"", "ended before"),
        "a slow request": (trickles(GREETING + socks_request(b"x" * 200, 9)), b"\5\0", "deadline"),
    }
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            done = await attack_all(cluster.gateway.bound, {name: a for name, (a, _, _) in attacks.items()})
        wrong = {
            name: (told(logs, done[name]), done[name].answer, done[name].ending)
            for name, (_, answer, reason) in attacks.items()
            if reason not in told(logs, done[name]) or done[name].answer != answer or done[name].ending == "never"
        }
        assert not wrong


async def test_the_gateway_withstands_every_http_client(here: Path) -> None:
    """Oversized heads, origin form, smuggling and slowness: the status says what is wrong, and no target hears of it."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        url = f"http://127.1.0.1:{target.port}/".encode()
        attacks: dict[str, tuple[Attack, int, str]] = {
            "an oversized head": (says(b"GET " + url + b" HTTP/1.1\r\nX: " + b"x" * (1 << 16)), 431, "over 16384"),
            "an endless method": (says(b"G" * (1 << 16)), 431, "over 16384"),
            "origin form": (says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "not a web server"),
            "no URL at all": (says(b"GET x HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "absolute"),
            "https": (says(b"GET https://127.1.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "can't be forwarded"),
            "a user in the URL": (says(b"GET http://a@127.1.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "no proper host"),
            "CONNECT without port": (says(b"CONNECT 127.1.0.1 HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "needs a port"),
            "CONNECT to port 0": (says(b"CONNECT 127.1.0.1:0 HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "no port 0"),
            "CONNECT with a body": (
                says(b"CONNECT 127.1.0.1:9 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"), 400, "no body",
            ),
            "CONNECT to a name": (says(b"CONNECT x:9 HTTP/1.1\r\nHost: x\r\n\r\n"), 502, "is a name"),
            "HTTP/2": (says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505, "HTTP/2.0"),
            "LF alone": (says(b"GET " + url + b" HTTP/1.1\nHost: x\n\n"), 400, "LF alone"),
            "a folded line": (says(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n y\r\n\r\n"), 400, "folded"),
            "two framings": (
                says(
                    b"POST " + url + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                ), 400, "both Content-Length",
            ),
            "two lengths": (
                says(b"POST " + url + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n"),
                400, "malformed",
            ),
            "a NUL in a field": (says(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n"), 400, "malformed"),
            "half a head": (says(b"GET " + url + b" HTTP/1.1\r\n"), 0, "deadline"),
            "half a head and the end": (says(b"GET " + url + b" HTTP/1.1\r\n", fin=True), 0, "ended before"),
            "a slow head": (trickles(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n\r\n"), 0, "deadline"),
        }  # fmt: skip
        async with unharmed(cluster, target) as logs:
            done = await attack_all(cluster.gateway.bound, {name: a for name, (a, _, _) in attacks.items()})
        wrong = {
            name: (told(logs, done[name]), done[name].answer, done[name].ending)
            for name, (_, status, reason) in attacks.items()
            if reason not in told(logs, done[name])
            or not done[name].answer.startswith(b"HTTP/1.1 %d " % status if status else b"")
            or (not status and done[name].answer)
            or done[name].ending == "never"
        }
        assert not wrong


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_second_request_never_reaches_the_first_target(here: Path, pieces: int) -> None:
    """Pipelined behind a request in absolute form, at once or later: it could be meant for another host."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1, agents=2)
        heard = bytearray()
        server = kept(socket.create_server(("127.1.0.1", 0)))
        first = f"GET http://127.1.0.1:{server.getsockname()[1]}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        second = b"GET http://127.1.0.2:80/secret HTTP/1.1\r\nHost: y\r\n\r\n"

        def serve() -> None:
            served = kept(server.accept()[0])
            served.settimeout(PATIENCE)
            try:
                while piece := served.recv(4096):
                    heard.extend(piece)
                    served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            except OSError:
                pass
            served.close()

        def client() -> None:
            attacker = Attacker(cluster.gateway.bound)
            attacker.say(first + (second if pieces == 1 else b""))
            if pieces == 2:
                attacker.answer += attacker.sock.recv(4096)
                attacker.say(second)
            else:
                attacker.sock.shutdown(socket.SHUT_WR)
            attacker.hear_out()

        async with unharmed(cluster, Target("127.1.0.1")), trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, serve)
            await in_thread(client)
        assert b"GET / HTTP/1.1" in heard and b"secret" not in heard


# 5. The admin port.


async def test_the_admin_ports_withstand_everything(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad requests get their status, slow ones the deadline, and a probe is answered while attackers hold connections."""
    monkeypatch.setattr(admin, "DEADLINE", DEADLINE)
    monkeypatch.setattr(admin, "LINGER", 0.1)
    attacks: dict[str, tuple[Attack, bytes]] = {
        "garbage": (says(os.urandom(1 << 16)), b""),
        "a TLS ClientHello": (says(b"\x16\3\1\2\0\1" + bytes(600)), b"HTTP/1.1 400 "),
        "an oversized head": (says(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 15)), b"HTTP/1.1 431 "),
        "no such path": (says(b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"), b"HTTP/1.1 404 "),
        "another method": (says(b"POST /readyz HTTP/1.1\r\nHost: x\r\n\r\n"), b"HTTP/1.1 405 "),
        "half a request": (says(b"GET /readyz HT"), b""),
        "half a request and the end": (says(b"GET /readyz HT", fin=True), b""),
        "a slow request": (trickles(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"), b""),
        **{f"silence {n}": (says(b""), b"") for n in range(40)},
    }

    def probe(address: Address) -> bytes:
        attacker = Attacker(address)
        attacker.say(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        attacker.hear_out()
        return attacker.answer

    async with running_cluster(here, **FAST) as cluster:
        with capture_logs() as begun:
            await cluster.start_broker("b1", admin="127.0.0.1:0")
            await cluster.start_gateway(admin="127.0.0.1:0")
            await cluster.start_agent("a1", redundancy=1, admin="127.0.0.1:0")
            await cluster.whole()
        ports = [parse_endpoint(entry["address"]) for entry in begun if entry["event"] == "admin_listening"]
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


# 6. Who is who: tokens, certificates, versions.


async def refused_agent(cluster: Cluster, wanted: str, **keys: Any) -> str:
    """Start an agent that must not get a session; what it gives as its reason, which must have the wanted words."""
    part = await cluster.start_agent("odd", "127.1.0.9", redundancy=1, **keys)
    await cluster.until(lambda: "not dialled yet" not in part.agent.reasons()[0])
    (reason,) = part.agent.reasons()
    assert wanted in reason, reason
    assert part.agent.state == "down"
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
        assert any("alert" in entry.get("reason", "") for entry in logs if entry["event"] == "link_lost")


async def test_plain_and_tls_do_not_meet_and_say_so(here: Path) -> None:
    """Both ends name the key to look at, whichever of them is the plain one."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            reason = await refused_agent(cluster, "security", security="plain")
            assert "TLS" in reason, reason
        assert any(
            "not seem to speak TLS" in entry.get("reason", "") for entry in logs if entry["event"] == "link_lost"
        )
    async with running_cluster(here, broker__security="plain", agent__security="plain", **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            reason = await refused_agent(cluster, "security", security="tls")
            assert "plain" in reason, reason
        assert any("looks like TLS" in entry.get("reason", "") for entry in logs if entry["event"] == "link_lost")


class Rogue:
    """A broker of nobody's: accepts links, and does what `script` says with each."""

    def __init__(self, secrets: Path, script: Callable[[Wire], None], *, tls: bool = True) -> None:
        self.sock = kept(socket.create_server(("127.0.0.1", 0)))
        self.at = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self._context = server_context(secrets / "broker.pem", secrets / "broker.key") if tls else None
        self._script = script
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock = self.sock.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        with sock:
            try:
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_side=True)
                with sock:
                    wire = Wire(sock, client=False)
                    self._script(wire)
                    wire.pump(lambda: False)
            except (Gone, OSError, MessageError, yamux.YamuxError):
                pass


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

    scripts: dict[str, tuple[Callable[[Wire], None], str]] = {
        "no secret": (without_secret, "the broker does not know our join token's secret"),
        "a Welcome at once": (welcoming, "protocol error: bad message: Invalid value 'welcome'"),
        "a Dial at once": (dialling, "no Welcome within the handshake deadline"),
        "garbage": (lambda wire: wire.sock.sendall(b"\xff" * 100), "bad_version"),
        "an oversized message": (
            lambda wire: (wire.hear(Hello), wire.write(b"\x7f" * 50))[0],
            "over the limit of 4096",
        ),  # type: ignore[func-returns-value]
        "silence": (lambda wire: None, "no Welcome within the handshake deadline"),
        "the end": (lambda wire: (wire.hear(Hello), wire.close())[0], "closed by peer"),  # type: ignore[func-returns-value]
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
            for body in (
                {"t": "challenge", "version": 2, "nonce": bytes(16), "mac": bytes(32)},
                {"t": "challenge", "version": 2, "salt": b"x"},
                {"t": "greeting", "version": 2},
            ):
                rogue = Rogue(secrets, challenges(body))
                reason = await refused_agent(cluster, "version 2", brokers=[rogue.at])
                assert "1" in reason.partition("version 2")[2], reason
                rogue.sock.close()


# 7. Dials that are well formed and not good.


async def test_every_bad_dial_has_its_own_code(here: Path, secrets: Path) -> None:
    """Forged, old, of the future, replayed, stale in every field: the word on the wire is the word in log and counts."""
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
        signer = DialSigner(load_cluster_key(secrets / "cluster.key"))
        twice = dial()
        attacks: dict[str, tuple[bytes, str, str]] = {
            "another cluster's key": (signed(secrets, body(), key=bytes(32)), "bad_mac", "cluster key"),
            "no MAC": (encode(Dial(body=honest)), "bad_mac", "cluster key"),
            "half a MAC": (encode(Dial(body=honest, mac=signer.sign(honest)[:16])), "bad_mac", "cluster key"),
            "the MAC of another body": (encode(Dial(body=forged, mac=signer.sign(honest))), "bad_mac", "cluster key"),
            "old": (dial(time=now - 60_000), "expired", "s behind this"),
            "of the future": (dial(time=now + 60_000), "expired", "s ahead of this"),
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
            "another version": (dial(version=2), "version", "version 2, this broker 1"),
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
            keys = {"brokers": [rogue.at], "exposes": [str(port)]}
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


# 8. Ports.


async def test_a_port_range_that_is_used_up_is_told_and_recovers(here: Path) -> None:
    """Two ports, three agents: the third names the range, and gets in when another's port has rested."""
    ports = free_ports(2)
    quick = {"registry__ttl": 1.0, "registry__quarantine": 1.0}
    registry = MemoryRegistry(ttl=1.0, quarantine=1.0)
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
    ports, opened = free_ports(2), free_ports(2)
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
        assert [e["notice"] for e in logs if e["event"] == "broker_notice"] == [notice]
        assert len(part.node.relay.listeners) == 2
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        third = await cluster.start_agent("a3", "127.1.0.3", redundancy=1)
        await cluster.until(lambda: "1 taken by other programs" in third.agent.reasons()[0])


async def test_no_descriptor_left_refuses_agents_and_kills_nobody(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors when a session wants its port: the agent is refused, the broker lives, and later it gets in."""

    def full(host: str, port: int, **_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")):
            with monkeypatch.context() as patched:
                patched.setattr(node_module, "listening_socket", full)
                part = await cluster.start_agent("odd", "127.1.0.9", redundancy=1)
                await cluster.until(lambda: "overloaded" in part.agent.reasons()[0])
            await cluster.until(lambda: part.agent.state == "ready")
            await part.shut()
            del cluster.agents["odd"]
