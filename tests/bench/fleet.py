"""Thousands of idle agents in one process, against one broker: memory, the connect storm, what heartbeats cost.

Each agent is the product's own link and session (TLS with a certificate of its own, yamux pings), without a process
around it; one that is refused or lost comes back as an agent does, with full jitter.
"""

from __future__ import annotations

import gc
import random
import ssl
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final, NoReturn

from bench.deployments import Site, start_broker
from bench.load import ERRORS, UNITS, Board, become_a_load_process
from bench.procs import BenchError, Memory, cpu_seconds, memory
from rtunnel.config import AgentConfig
from rtunnel.relay.ends import EndHandler, SocketEnd
from rtunnel.relay.link import Handshake
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.trust.certificates import DAY, key_pem, new_key, pem
from rtunnel.trust.pki import open_directory
from rtunnel.trust.tls import link_context
from rtunnel.wire import messages
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal
from rtunnel_agent.agent import BACKOFF_FIRST
from rtunnel_agent.handshake import AgentSession, new_nonce

_FORK: Final = get_context("fork")
_AGENT: Final = AgentConfig()
_NAMESPACE: Final = "fleet"
#: A storm that is not through by then has failed.
STORM_PATIENCE: Final = 300.0
#: The broker is looked at so long after the storm, and so long.
SETTLE: Final = 3.0


class Fleet:
    """`count` agents on one relay; UNITS tells how many are up, ERRORS how many attempts failed."""

    def __init__(self, pki: Path, port: int, count: int, board: Board) -> None:
        self._port = port
        self._slots = board.slots
        self._tls = _contexts(pki, count)
        self._relay = Relay(lambda event, fields: None, "fleet")
        self._sessions: dict[AgentSession, int] = {}
        self._backoff = [BACKOFF_FIRST] * count

    def start(self) -> None:
        """All at once."""
        self._relay.start()
        for number in range(len(self._backoff)):
            self._relay.call(lambda number=number: self._dial(number))  # type: ignore[misc]

    def _dial(self, number: int) -> None:
        hello = Hello(
            version=messages.VERSION,
            agent_id=f"fleet-{number}",
            instance=new_nonce(),
            namespace=_NAMESPACE,
            addresses=[_address(number)],
            nonce=new_nonce(),
            exposes=["9100"],
        )
        session = AgentSession(self, hello, b"", _AGENT.handshake_timeout)
        self._sessions[session] = number

        def connected(end: SocketEnd | None, code: Refusal, why: str) -> None:
            if end is None:
                self.session_down(session, code, Lost(LostKind.UNREACHED, why))
                return
            handshake = Handshake(True, _AGENT.handshake_timeout, self._tls[number], "broker.rtunnel")
            session.link = self._relay.link(end.sock, session, handshake, peer=end.peer, watched=True)

        self._relay.connect("127.0.0.1", self._port, _AGENT.connect_timeout, connected)

    def session_ready(self, session: AgentSession) -> None:
        """See SessionOwner: each has its Hello from the beginning."""

    def session_up(self, session: AgentSession) -> None:
        """See SessionOwner."""
        self._backoff[self._sessions[session]] = BACKOFF_FIRST
        self._slots[UNITS] += 1

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        """See SessionOwner."""
        number = self._sessions.pop(session, -1)
        if number < 0:
            return
        if session.welcome is not None:
            self._slots[UNITS] -= 1
        self._slots[ERRORS] += 1
        backoff = self._backoff[number]
        self._backoff[number] = min(_AGENT.backoff_cap, backoff * 2)
        self._relay.loop.after(random.uniform(0, backoff), lambda: self._dial(number))

    def session_draining(self, session: AgentSession, deadline: float) -> None:
        """See SessionOwner."""

    def session_trust(self, session: AgentSession, signed: bytes) -> None:
        """See SessionOwner."""

    def serve_stream(self, session: AgentSession, stream: StreamEnd) -> EndHandler:
        """See SessionOwner: nobody dials them."""
        raise AssertionError("a Dial for an idle agent")


def _address(number: int) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def _contexts(pki: Path, count: int) -> list[ssl.SSLContext]:
    """What each agent shows: a certificate of its own."""
    cas = (pki / "ca.pem").read_text()
    contexts = []
    with open_directory(pki) as authority, authority.change(), NamedTemporaryFile() as file:
        for number in range(count):
            key = new_key()
            certificate = authority.issue_agent(
                f"fleet-{number}", key.public_key(), namespace=_NAMESPACE, addresses=[_address(number)], seconds=DAY
            )
            Path(file.name).write_bytes(pem(certificate) + key_pem(key))
            contexts.append(link_context(cas, file.name, file.name))
    return contexts


def _run(pki: Path, port: int, count: int, board: Board, pipe: Connection) -> NoReturn:
    become_a_load_process()
    gc.disable()
    fleet = Fleet(pki, port, count, board)
    pipe.send(None)
    pipe.recv()
    fleet.start()
    while True:
        time.sleep(3600)


@dataclass
class Outcome:
    """What `count` agents did to a broker."""

    count: int
    up: int
    failures: int
    storm_seconds: float
    storm_cpu: float  # of the broker
    fleet_cpu: float  # of the fleet, during the storm
    idle_share: float  # of a core, by the broker
    before: Memory
    after: Memory
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, tuple[float, str]]:
        """metric -> (value, unit)."""
        return {
            "rss per agent": ((self.after.rss - self.before.rss) / self.count, "KiB"),
            "pss per agent": ((self.after.pss - self.before.pss) / self.count, "KiB"),
            "connect storm": (self.storm_seconds, "s"),
            "broker CPU of the storm": (self.storm_cpu, "s"),
            "fleet CPU of the storm": (self.fleet_cpu, "s"),
            "attempts that failed": (float(self.failures), ""),
            "agents not up": (float(self.count - self.up), ""),
            "idle heartbeats": (self.idle_share * 100, "% of a core"),
        }


def measure(site: Site, count: int, idle_seconds: float) -> Outcome:
    """Start a broker, let `count` agents storm it, and then look at it while nothing happens. Raises BenchError."""
    broker, port = start_broker(site, "fleet", "tls", ports=count + count // 10 + 10)
    time.sleep(1.0)
    before = memory([broker.pid])
    board = Board()
    pipe, child = _FORK.Pipe()
    process = _FORK.Process(target=_run, args=(site.directory / "pki", port, count, board, child), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        if not pipe.poll(STORM_PATIENCE):
            raise BenchError("the fleet has no certificates yet")
        pipe.recv()
        cpu, fleet_cpu, begin = cpu_seconds([broker.pid]), cpu_seconds([process.pid]), time.monotonic()
        pipe.send(None)
        while board[UNITS] < count and time.monotonic() - begin < STORM_PATIENCE:
            broker.check()
            time.sleep(0.02)
        storm, up = time.monotonic() - begin, board[UNITS]
        storm_cpu, fleet_cpu = cpu_seconds([broker.pid]) - cpu, cpu_seconds([process.pid]) - fleet_cpu
        failures = board[ERRORS]
        if not up:
            raise BenchError("no agent came up")
        time.sleep(SETTLE)
        cpu, begin = cpu_seconds([broker.pid]), time.monotonic()
        time.sleep(idle_seconds)
        idle = (cpu_seconds([broker.pid]) - cpu) / (time.monotonic() - begin)
        return Outcome(count, up, failures, storm, storm_cpu, fleet_cpu, idle, before, memory([broker.pid]))
    finally:
        process.kill()
        process.join()
        site.processes.end(broker)
