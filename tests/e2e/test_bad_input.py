"""An attacker at every port of a real cluster, and peers that misbehave: nothing is lost, leaked or left listening.

Attackers are plain blocking sockets in threads, each from a loopback address of its own: the logs tell them apart.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import resource
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from structlog.testing import capture_logs

from rtunnel import admin
from rtunnel.config import parse_endpoint, parse_exposes
from rtunnel.registry import Registration
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from rtunnel.relay.memory import START_WINDOW
from rtunnel.trust import pki
from rtunnel.trust.keys import gateway_key, load_gateway_key, load_token, new_token, token_mac
from rtunnel.trust.tls import certificate_der, certificate_fingerprint, server_context
from rtunnel.wire import messages, yamux
from rtunnel.wire.messages import (
    Accepted,
    Challenge,
    Dial,
    DialAnswer,
    DialBody,
    Dialling,
    Hello,
    MessageError,
    Proof,
    Publish,
    Refuse,
    Update,
    Welcome,
    encode,
    encode_body,
)
from rtunnel_broker import node as node_module
from rtunnel_broker import registrar, session
from rtunnel_broker.node import STRANGERS_LINES
from rtunnel_broker.session import HELD_PART
from support.cluster import Cluster, Part, SocksRefused, Target, in_thread, read_line, running_cluster
from support.logs import Events, named
from support.messages import decoder_of
from support.plumbing import free_range, kept, refusing_port, reset
from support.redis_server import RedisServer
from support.secrecy import is_secret

PATIENCE = 10.0
#: Deadlines of the tests' roles: short, and long enough for a loaded machine.
DEADLINE = 1.5
#: Keys of an agent that has no certificate, and proves its token.
BY_TOKEN: dict[str, Any] = {"certificate": "", "key": ""}


def noise(size: int) -> bytes:
    """Random bytes, the same in every run: what they happen to begin with decides what is answered."""
    return random.Random(size).randbytes(size)


Address = tuple[str, int]


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

    def trickle(self, data: bytes, pause: float = 0.1) -> None:
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
            socket.socket.shutdown(attacker.sock, socket.SHUT_WR)

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
async def unharmed(cluster: Cluster, target: Target, *, slowest: float = 10.0, spare: int = 0) -> AsyncIterator[Events]:
    """A good client is served the whole time, nothing crashes, and at the end is held what was held before and no more.

    Gives the log. `spare`: descriptors that a pool of connections to Redis may have come to.
    """
    await cluster.ask(target.ip, target.port)
    await settled(cluster)
    before = holdings(cluster)
    before["descriptors"] += spare
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


def told(logs: Events, attacker: Attacker) -> str:
    """What the log says of this attacker: the event and the reason of its last line."""
    lines = [e for e in logs if attacker.source in (e.get("peer"), e.get("client"))]
    return f"{lines[-1]['event']}: {lines[-1].get('code', '')}: {lines[-1].get('reason', '')}" if lines else ""


async def all_told(cluster: Cluster, logs: Events, done: Mapping[str, Attacker]) -> None:
    """Wait for the lines of all: a link's end is told when its last words are out, which is after the attacker's."""
    with suppress(trio.TooSlowError):
        await cluster.until(lambda: all(told(logs, attacker) for attacker in done.values()), 5.0)


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
        decoder = decoder_of(wanted, messages.MAX_MESSAGE)
        while True:
            decoder.feed(source.data)
            source.data.clear()
            found = decoder.next_frame()
            if found is not None:
                source.data += decoder.rest()
                return found
            self.pump(lambda: bool(source.data) or source.fin_received or source.was_reset)
            if not source.data:
                raise Gone("reset" if source.was_reset else "end of stream")

    def close(self) -> None:
        self.sock.close()


def hello(secrets: Path, **changes: Any) -> Hello:
    """A good Hello, but for the changes."""
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "agent_id": "raw",
        "instance": os.urandom(16),
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
        wire.close()
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
        wire.close()
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
        "a Proof before the Hello": (says(yamux_says(encode(Proof(mac=bytes(32))))), "Invalid value 'proof'", refused),
        "two Hellos": (says(yamux_says(good + good)), "Invalid value 'hello'", refused),
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


def wrapped(attack: Attack, context: ssl.SSLContext) -> Attack:
    """The same inside TLS."""

    def inside(attacker: Attacker) -> None:
        attacker.wrap(context)
        attack(attacker)

    return inside


FAST: dict[str, Any] = {"broker__handshake_timeout": DEADLINE, "gateway__handshake_timeout": DEADLINE}


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


def wraps(context: ssl.SSLContext) -> Attack:
    """A TLS handshake, then silence."""
    return lambda attacker: attacker.wrap(context)


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
    made = load_gateway_key(secrets / "gateway.key")
    signer = made if key is None else gateway_key(key, made.id)
    return encode(Dial(body=body, mac=signer.sign(body), key=signer.id))


def session_of(cluster: Cluster, agent: str = "a1", slot: int = 0) -> Welcome:
    """What an agent of the cluster was welcomed with."""
    session = cluster.agents[agent].agent.slots[slot].session
    assert session is not None and session.welcome is not None
    return session.welcome


def first_answer(data: bytes) -> tuple[str, str]:
    """The first message in what a guarded port said: (code, text) of a refusal, ("accepted", "")."""
    decoder = decoder_of(DialAnswer, messages.MAX_MESSAGE)
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


# 3. Open ports.


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


# 4. The gateway's port.


def socks_request(host: bytes, port: int, *, command: int = 1, kind: int | None = None) -> bytes:
    """A request; a name unless the host has the size of an address."""
    kind = kind if kind is not None else {4: 1, 16: 4}.get(len(host), 3)
    address = bytes((len(host),)) + host if kind == 3 else host
    return bytes((5, command, 0, kind)) + address + struct.pack(">H", port)


GREETING = b"\5\1\0"
ANY_PORT = 9


async def test_the_gateway_withstands_every_socks_client(here: Path) -> None:
    """Unknown methods, commands, address types, odd names, other protocols: to each its own reply."""
    ip = socket.inet_aton("127.1.0.1")

    def replied(code: int) -> bytes:
        return b"\5\0\5" + bytes((code,)) + b"\0\1" + bytes(6)

    attacks: dict[str, tuple[Attack, bytes, str]] = {
        "a garbage byte": (says(b"\xfe"), b"", "the first byte is 0xfe"),
        "SOCKS4": (says(b"\4\1\0\x50\x7f\1\0\1\0"), b"\0\x5b" + bytes(6), "SOCKS4 is not supported"),
        "a TLS ClientHello": (says(b"\x16\3\1\2\0\1" + noise(600)), b"", "TLS to the proxy"),
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
            await all_told(cluster, logs, done)
        wrong = {
            name: (told(logs, done[name]), done[name].answer, done[name].ending)
            for name, (_, answer, reason) in attacks.items()
            if reason not in told(logs, done[name]) or done[name].answer != answer or done[name].ending == "never"
        }
        assert not wrong


async def test_the_gateway_withstands_every_http_client(here: Path) -> None:
    """Oversized heads, origin form, smuggling: the status says what is wrong; slowness meets the deadline."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        url = f"http://127.1.0.1:{target.port}/".encode()
        attacks: dict[str, tuple[Attack, int, str]] = {
            "an oversized head": (says(b"GET " + url + b" HTTP/1.1\r\nX: " + b"x" * (1 << 16)), 431, "over 65536"),
            "an endless method": (says(b"G" * (1 << 16)), 431, "over 65536"),
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
            await all_told(cluster, logs, done)
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


# 6. Who is who: tokens, certificates, versions.


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

    def oversized(wire: Wire) -> None:
        wire.hear(Hello)
        wire.write(b"\x7f" * 50)

    def ending(wire: Wire) -> None:
        wire.hear(Hello)
        wire.close()

    scripts: dict[str, tuple[Callable[[Wire], None], str]] = {
        "no secret": (without_secret, "the broker does not know our join token's secret"),
        "a Welcome at once": (welcoming, "protocol error: bad message: Invalid value 'welcome'"),
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


# 7. Dials that are well formed and not good.


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


# 8. Ports.


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
        assert [e["notice"] for e in logs if e["event"] == "broker_notice"] == [notice]
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


# 9. Redis.

SHORT: dict[str, Any] = {"registry__heartbeat": 0.3, "registry__ttl": 3.0, "registry__quarantine": 3.0}


def redis_registry(url: str) -> RedisRegistry:
    """With the times of SHORT."""
    return RedisRegistry(url, ttl=3.0, quarantine=3.0, timeout=1.0)


def probe(address: Address, path: str = "/readyz") -> bytes:
    """What an admin port says."""
    attacker = Attacker(address)
    attacker.say(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    attacker.hear_out()
    return attacker.answer


def admin_ports(logs: Events) -> list[Address]:
    """Where they listen."""
    return [parse_endpoint(entry["address"]) for entry in logs if entry["event"] == "admin_listening"]


class Impostor:
    """Not Redis: answers everything with a page."""

    def __init__(self, port: int) -> None:
        self.sock = kept(socket.create_server(("127.0.0.1", port)))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                with self.sock.accept()[0] as served:
                    served.recv(1 << 16)
                    served.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n<html>")
            except OSError:
                return

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


@asynccontextmanager
async def closing(registry: RedisRegistry) -> AsyncIterator[RedisRegistry]:
    try:
        yield registry
    finally:
        registry.close()


RIGHT, WRONG = "right-pa55word", "wr0ng-password"


@pytest.mark.parametrize("obstacle", ["nothing there", "not Redis", "wrong password"])
async def test_without_redis_at_the_start_roles_wait_and_say_so(
    here: Path, make_redis: Callable[..., RedisServer], obstacle: str
) -> None:
    """Broker and gateway are alive, not ready, and name the registry; they come up by themselves when Redis does."""
    server = make_redis(tcp=True, password=RIGHT)
    url = f"redis://:{RIGHT}@127.0.0.1:{server.port}/0"
    impostor = Impostor(server.port) if obstacle == "not Redis" else None
    if obstacle == "wrong password":
        server.start()
        url = url.replace(RIGHT, is_secret(WRONG, "a Redis"))
    async with closing(redis_registry(url)) as registry, running_cluster(here, registry, **FAST, **SHORT) as cluster:
        with capture_logs() as logs:
            await cluster.start_gateway(admin="127.0.0.1:0")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(cluster.start_broker, "b1", admin="127.0.0.1:0"))
                await cluster.until(lambda: sum(e["event"] == "registry_unavailable" for e in logs) == 2)
                for at in admin_ports(logs):
                    assert b'{"live":true}' in await in_thread(lambda at=at: probe(at, "/livez"))  # type: ignore[misc]
                    answer = await in_thread(lambda at=at: probe(at))  # type: ignore[misc]
                    assert answer.startswith(b"HTTP/1.1 503 ") and b"registry: registry redis://" in answer, answer
                    assert WRONG.encode() not in answer
                with pytest.raises(SocksRefused) as refused:
                    await cluster.socks("127.1.0.1", ANY_PORT)
                assert refused.value.code == 1
                answer = await cluster.http(b"CONNECT 127.1.0.1:9 HTTP/1.1\r\nHost: x\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 503 ") and b"registry_unavailable" in answer, answer
                if impostor is not None:
                    impostor.close()
                if obstacle == "wrong password":
                    with server.client() as client:
                        client.config_set("requirepass", WRONG)
                else:
                    server.start()
        assert all(WRONG not in str(entry) for entry in logs)
        await cluster.start_agent("a1", redundancy=1)
        await cluster.whole()
        target = Target("127.1.0.1")
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        for at in admin_ports(logs):
            assert b'{"ready":true' in await in_thread(lambda at=at: probe(at))  # type: ignore[misc]


@pytest.mark.parametrize("failure", ["killed", "frozen"])
async def test_redis_lost_later_is_told_and_felt_by_nobody(
    here: Path, make_redis: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """Streams and new connections go on; who can't be known is told so at once, be they many; recovery is logged."""
    server = make_redis(tcp=True).start()
    url = server.url
    async with closing(redis_registry(url)) as registry, running_cluster(here, registry, **FAST, **SHORT) as cluster:
        await cluster.start(brokers=2)
        target = Target("127.1.0.1")
        parts = [part.node for part in cluster.brokers.values()]
        stream = await cluster.socks(target.ip, target.port)

        def unknown(number: int) -> int:
            try:
                cluster.socks_blocking(f"198.51.100.{number}", 80).close()
            except SocksRefused as error:
                return error.code
            return 0

        async with unharmed(cluster, target, spare=40) as logs:
            if failure == "killed":
                server.kill()
            else:
                server.freeze()
            await cluster.until(lambda: all(node.reasons() for node in parts) and bool(cluster.gateway.registry_down))
            assert all("registry: registry redis://" in node.reasons()[0] for node in parts)
            assert not cluster.gateway.reasons()  # it serves what it knew
            answers: list[int] = []

            async def ask(number: int) -> None:
                answers.append(await in_thread(lambda: unknown(number)))

            with monkeypatch.context() as patched:  # whoever asked would wait for the timeout
                patched.setattr(registry, "lookup", lambda *asked: pytest.fail(f"asked for {asked}"))
                async with trio.open_nursery() as nursery:
                    for number in range(1, 31):
                        nursery.start_soon(ask, number)
            assert answers == [1] * 30
            late = await cluster.start_agent("late", "127.1.0.8", redundancy=1)
            await cluster.until(lambda: "registry_unavailable" in late.agent.reasons()[0])
            if failure == "killed":
                server.start()
            else:
                server.thaw()
            await cluster.until(lambda: late.agent.state == "ready" and not any(node.reasons() for node in parts))
            await cluster.whole()
            await late.shut()
            del cluster.agents["late"]
            assert stream.fileno() >= 0
            stream.sendall(b"still here\n")
            assert await in_thread(lambda: read_line(stream)) == b"127.1.0.1:still here"
        events = [entry["event"] for entry in logs]
        assert events.count("registry_back") == 2 and events.count("registry_unavailable") == 3
        await cluster.until(lambda: len(registry.snapshot().tuples) == 2)


# 10. Limits.


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
        assert [entry["code"] for entry in logs if entry["event"] == "shut_out"] == ["overloaded"]
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
        assert not [entry for entry in logs if entry["event"] == "relay_crash"]
        await cluster.until(lambda: all(now <= before[key] for key, now in holdings(cluster).items()))
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


def paused(logs: Events) -> set[str]:
    """Which components stopped accepting for a while."""
    return {entry["component"] for entry in logs if entry["event"] == "accept_paused"}


async def test_silent_links_make_room_for_an_agent(here: Path) -> None:
    """Silent links of many sources hold every place for a minute: sessions go on, and a new agent comes in at once."""
    async with running_cluster(here, broker__max_handshakes=6, broker__handshake_timeout=60.0) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            idle = [Attacker(node.bound) for _ in range(6)]
            await cluster.until(lambda: node.handshakes == 6)
            late = await cluster.start_agent("late", "127.1.0.8", redundancy=1)
            await cluster.until(lambda: late.agent.state == "ready")
            assert node.handshakes == 5
            for attacker in idle:
                attacker.sock.close()
            await late.shut()
            del cluster.agents["late"]
        assert sum(entry["event"] == "too_many_handshakes" for entry in logs) == 1


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
            await cluster.until(lambda: node.links_lost == {"probe": many, "broken": many})
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


# 11. Agents that misbehave.


@asynccontextmanager
async def handmade(
    cluster: Cluster, secrets: Path, script: Callable[[Wire], None], **changes: Any
) -> AsyncIterator[Wire]:
    """A session of an agent made by hand, known to the gateway; `script` gets its link, in a thread."""
    node = cluster.brokers["b1"].node
    wire, welcome = await in_thread(lambda: enrol(node.bound, secrets, **changes))
    ip = hello(secrets, **changes).addresses[0]
    await cluster.until(lambda: any(t.epoch == welcome.epoch for t in cluster.gateway.table.lookup("default", ip)))
    failed: list[BaseException] = []

    def run() -> None:
        try:
            script(wire)
            wire.pump(lambda: False)
        except (Gone, OSError):
            pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield wire
    finally:
        shut(wire.sock)
        await in_thread(lambda: thread.join(PATIENCE))
        wire.close()
    assert not failed, failed
    await cluster.until(lambda: f"default/{changes.get('agent_id', 'raw')}" not in node.sessions)
    await cluster.until(lambda: not cluster.gateway.table.lookup("default", ip))


def shut(sock: socket.socket) -> None:
    """End it, whoever reads from it just now."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's own takes TLS off before the reader is done
    except OSError:
        pass


def next_dial(wire: Wire, number: int = 0) -> Stream:
    """The broker's next stream, its Dial taken."""
    wire.pump(lambda: len(wire.incoming) > number)
    stream = wire.incoming[number]
    wire.hear(Dial, stream)
    return stream


def answers(*data: bytes, fin: bool = False, rst: bool = False) -> Callable[[Wire], None]:
    """Answer each Dial with these bytes, in one frame each."""

    def script(wire: Wire) -> None:
        for number in count():
            stream = next_dial(wire, number)
            for piece in data:
                wire.write(piece, stream)
            if fin:
                stream.finish()
            if rst:
                stream.reset()

    return script


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
            await cluster.until(lambda: any(line.get("agent") == "raw" for line in named(logs, "session_down")))
        down = [line["reason"] for line in named(logs, "session_down") if line.get("agent") == "raw"]
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
            assert [entry.refused.split()[0] for entry in node.duplicates] == ["host-9"] * 3
            assert node.session_refusals["duplicate_agent"] == 3
            dead.close()
            wire.close()
            await cluster.until(lambda: len(node.sessions) == 1)
