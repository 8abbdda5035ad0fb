"""Attackers: plain blocking sockets in threads, each from a loopback address of its own, which the logs tell apart."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import trio

from rtunnel.config import parse_endpoint
from support.cluster import Cluster, in_thread
from support.logs import Events
from support.plumbing import kept

PATIENCE = 10.0


#: Deadlines of the tests' roles: short, and long enough for a loaded machine.
DEADLINE = 1.5


def noise(size: int) -> bytes:
    """Random bytes, the same in every run: what they happen to begin with decides what is answered."""
    return random.Random(size).randbytes(size)


Address = tuple[str, int]


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


def told(logs: Events, attacker: Attacker) -> str:
    """What the log says of this attacker: the event and the reason of its last line."""
    lines = [e for e in logs if attacker.source in (e.get("peer"), e.get("client"))]
    return f"{lines[-1]['event']}: {lines[-1].get('code', '')}: {lines[-1].get('reason', '')}" if lines else ""


async def all_told(cluster: Cluster, logs: Events, done: Mapping[str, Attacker]) -> None:
    """Wait for the lines of all: a link's end is told when its last words are out, which is after the attacker's."""
    with suppress(trio.TooSlowError):
        await cluster.until(lambda: all(told(logs, attacker) for attacker in done.values()), 5.0)


def wrapped(attack: Attack, context: ssl.SSLContext) -> Attack:
    """The same inside TLS."""

    def inside(attacker: Attacker) -> None:
        attacker.wrap(context)
        attack(attacker)

    return inside


FAST: dict[str, Any] = {"broker__handshake_timeout": DEADLINE, "gateway__handshake_timeout": DEADLINE}


def wraps(context: ssl.SSLContext) -> Attack:
    """A TLS handshake, then silence."""
    return lambda attacker: attacker.wrap(context)


ANY_PORT = 9


def probe(address: Address, path: str = "/readyz") -> bytes:
    """What an admin port says."""
    attacker = Attacker(address)
    attacker.say(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    attacker.hear_out()
    return attacker.answer


def admin_ports(logs: Events) -> list[Address]:
    """Where they listen."""
    return [parse_endpoint(entry["address"]) for entry in logs if entry["event"] == "admin_endpoint_opened"]
