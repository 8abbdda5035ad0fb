"""A whole cluster in one trio run: real roles, real sockets, kernel-chosen ports, a VIP that can be told what to do."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import trio

from rtunnel.bridge import Bridge
from rtunnel.config import load
from rtunnel.registry import Registry
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import NO_OWNER
from rtunnel.relay.relay import Relay
from rtunnel.roles import Role, find_role
from rtunnel.trust import pki
from rtunnel_agent.agent import Agent
from rtunnel_broker.node import Node
from rtunnel_socks.gateway import Gateway
from support.plumbing import kept
from support.ports import as_text, guarded_ports

_T = TypeVar("_T")
PATIENCE = 15.0
#: Not silent, only slow, is what a loaded machine makes of a broker: tests of the hedge say how soon it comes.
HEDGE_DELAY = 5.0


@cache
def _role(name: str) -> Role:
    """Find a role once for all clusters: each search reads the entry points of every installed package."""
    return find_role(name)


@dataclass
class Part:
    """A running role."""

    role: Any
    scope: trio.CancelScope
    stop: trio.Event
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def node(self) -> Node:
        assert isinstance(self.role, Node)
        return self.role

    @property
    def agent(self) -> Agent:
        assert isinstance(self.role, Agent)
        return self.role

    @property
    def gateway(self) -> Gateway:
        assert isinstance(self.role, Gateway)
        return self.role

    async def in_relay(self, call: Callable[[], _T]) -> _T:
        """Run `call` in the role's relay thread; return its result once it has run.

        `relay.call` by itself promises no order towards other threads: when a link becomes readable first, bytes that
        arrive after `relay.call` are read in the same turn, before the call runs.
        """
        return await Bridge(self.role.relay).run(call)

    async def shut(self) -> None:
        """SIGTERM, and wait for the end."""
        self.stop.set()
        await self.ended.wait()

    def kill(self) -> None:
        """As kill -9: sockets are reset, nothing is said, the registry keeps what it has."""
        self.scope.cancel()
        self.role.relay.stop()


class Vip:
    """Layer-4 load balancing in front of `backends`: round robin, or always the same when `pinned`."""

    def __init__(self) -> None:
        self.relay = Relay(lambda event, fields: None, "vip")
        self.backends: list[tuple[str, int]] = []
        self.pinned: tuple[str, int] | None = None
        self.turn = 0
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.sock.getsockname()

    async def start(self) -> None:
        self.relay.start()
        await Bridge(self.relay).run(lambda: self.relay.listen(self.sock, self._accept))

    def _accept(self, sock: socket.socket, peer: str) -> None:
        client = self.relay.end(sock, peer)
        client.pause()
        self.turn += 1
        host, port = self.pinned or self.backends[self.turn % len(self.backends)]

        def connected(backend: SocketEnd | None, *_: object) -> None:
            if backend is None:
                client.abort()
            else:
                self.relay.join(client, backend, owner=NO_OWNER)

        self.relay.connect(host, port, 2.0, connected)


class Target:
    """A service on one address: answers every connection with `answer(bytes until EOF or newline)`."""

    def __init__(self, ip: str, port: int = 0, *, backlog: int = 128) -> None:
        self.ip = ip
        self.sock = kept(socket.create_server((ip, port), family=family_of(ip), backlog=backlog))
        self.port: int = self.sock.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                served, _ = self.sock.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(served,), daemon=True).start()

    def _talk(self, served: socket.socket) -> None:
        """Lines are echoed with this target's name in front; at EOF the digest of everything follows."""
        digest = hashlib.sha256()
        rest = b""
        with served:
            try:
                while piece := served.recv(1 << 16):
                    digest.update(piece)
                    *lines, rest = (rest + piece).split(b"\n")
                    if lines:
                        served.sendall(b"".join(b"%s:%s\n" % (self.ip.encode(), line[:100]) for line in lines[:100]))
                served.sendall(f"{self.ip} {digest.hexdigest()}\n".encode())
            except OSError:
                pass


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


class SocksRefused(Exception):
    """The gateway's SOCKS reply was not 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"SOCKS reply {code}")
        self.code = code


class Cluster:
    """Start parts, find them, ask them. Used inside `running_cluster`."""

    def __init__(self, directory: Path, nursery: trio.Nursery, registry: Registry | None, **keys: object) -> None:
        self.secrets = directory / "pki"
        if not self.secrets.exists():
            pki.init(self.secrets)
        self.registry: Registry = registry or MemoryRegistry(ttl=3.0, quarantine=5.0)
        self.vip = Vip()
        self.brokers: dict[str, Part] = {}
        self.agents: dict[str, Part] = {}
        self.parts: list[Part] = []
        self._nursery = nursery
        self._keys = keys
        self._gateway: Part | None = None

    # Parts.

    async def start_broker(self, node: str = "b1", **keys: object) -> Part:
        """A broker, behind the VIP."""
        part = await self._start(
            "broker",
            {
                "broker.listen": "127.0.0.1:0",
                "broker.advertise_ip": "127.0.0.1",
                "broker.node_id": node,
                "broker.host": node,
                "broker.port_range": as_text(guarded_ports(len(self.brokers))),
                **dotted("broker", keys),
            },
        )
        self.brokers[node] = part
        self.vip.backends = [(p.node.bound[0], p.node.bound[1]) for p in self.brokers.values()]
        return part

    async def start_agent(self, agent_id: str = "a1", *addresses: str, file: Path | None = None, **keys: Any) -> Part:
        """An agent that dials the VIP; it answers for 127.1.0.1 unless told otherwise, and can prove it.

        `file`: with all that it exposes.
        """
        addresses = addresses or ("127.1.0.1",)
        namespace = str(keys.get("namespace", self._keys.get("agent.namespace", "default")))
        # One that enrols by a token gets no certificate by hand: its agent_id would be taken.
        own = keys.get("identity") or keys.get("certificate")
        name = "" if own else self.certify(agent_id, *addresses, namespace=namespace)
        part = await self._start(
            "agent",
            {
                "agent.brokers": [f"127.0.0.1:{self.vip.address[1]}"],
                "agent.agent_id": agent_id,
                "agent.addresses": list(addresses),
                **({} if file else {"agent.exposes": ["1-65535"]}),
                "agent.certificate": str(self.secrets / f"{name}.pem"),
                "agent.key": str(self.secrets / f"{name}.key"),
                **dotted("agent", keys),
            },
            file,
        )
        self.agents[agent_id] = part
        return part

    def certify(self, agent_id: str, *addresses: str, namespace: str = "default", days: float = 1) -> str:
        """A fresh certificate and key of an agent; the name of their files."""
        name = f"agent-{token_hex(6)}"  # the directory may be others', too
        # Two agents of one address are what some tests are about: the authority allows that only when told so.
        pki.issue_agent(
            self.secrets, name, agent_id=agent_id, namespace=namespace, addresses=addresses, days=days, take_over=True
        )
        return name

    async def start_gateway(self, **keys: object) -> Part:
        """The gateway that `socks` and `http` use."""
        self._gateway = await self._start("gateway", {"gateway.listen": "127.0.0.1:0", **dotted("gateway", keys)})
        return self._gateway

    async def start(self, brokers: int = 2, agents: int = 1, **keys: Any) -> None:
        """So many of each, agents at 127.1.0.1 and on, until all is known to all."""
        for number in range(1, brokers + 1):
            await self.start_broker(f"b{number}")
        await self.start_gateway()
        for number in range(1, agents + 1):
            await self.start_agent(f"a{number}", f"127.1.0.{number}", redundancy=min(2, brokers), **keys)
        await self.whole()

    async def whole(self) -> None:
        """Every agent has its sessions, and the gateway knows their tuples."""
        await self.until(lambda: all(part.agent.state == "ready" for part in self.agents.values()))
        wanted = {
            (slot.session.node, slot.session.welcome.epoch)
            for part in self.agents.values()
            for slot in part.agent.slots
            if slot.session is not None and slot.session.welcome is not None
        }

        def known() -> bool:
            addresses = [(p.agent.config.namespace, ip) for p in self.agents.values() for ip in p.agent.addresses]
            return wanted <= {(t.node, t.epoch) for at in addresses for t in self.gateway.table.lookup(*at)}

        await self.until(known)

    @property
    def gateway(self) -> Gateway:
        assert self._gateway is not None
        return self._gateway.gateway

    async def _start(self, name: str, keys: dict[str, object], file: Path | None = None) -> Part:
        made = self.secrets
        common: dict[str, object] = {
            "registry.heartbeat": 0.5,
            "registry.ttl": 3.0,
            "registry.quarantine": 5.0,
            "registry.reconcile": 2.0,
            "broker.certificate": str(made / "broker.pem"),
            "broker.key": str(made / "broker.key"),
            "broker.ca": str(made / "ca.pem"),
            "broker.cluster_key": str(made / "cluster.key"),
            "broker.join_token": str(made / "join.token"),
            "broker.drain": 5.0,
            "agent.ca": str(made / "ca.pem"),
            "agent.join_token": str(made / "join.token"),
            "agent.backoff_cap": 0.5,
            "agent.drain": 5.0,
            "gateway.key": str(made / "gateway.key"),
            "gateway.ca": str(made / "ca.pem"),
            "gateway.drain": 5.0,
            "gateway.lame_duck": 0.0,
            "gateway.hedge_delay": HEDGE_DELAY,
            "broker.admin": "",
            "agent.admin": "",
            "gateway.admin": "",
        }
        section = {key: value for key, value in self._keys.items() if str(key).startswith((name, "registry"))}
        config = load(file, {}, common | section | keys)
        role = _role(name)
        part = Part(None, trio.CancelScope(), trio.Event())

        async def live(*, task_status: trio.TaskStatus[Any]) -> None:
            try:
                with part.scope:
                    await role.serve(config, self.registry, stop=part.stop, task_status=task_status)
            finally:
                part.ended.set()

        part.role = await self._nursery.start(live)
        self.parts.append(part)
        return part

    # Asking.

    async def until(self, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait for it, looking every few milliseconds."""
        with trio.fail_after(patience):
            while not condition():
                await trio.sleep(0.005)

    def socks_blocking(self, ip: str, port: int) -> socket.socket:
        """A connection through the gateway; raises SocksRefused."""
        sock = kept(socket.create_connection(self.gateway.bound, timeout=PATIENCE))
        packed = socket.inet_pton(family_of(ip), ip)
        sock.sendall(b"\5\1\0" + b"\5\1\0" + (b"\4" if ":" in ip else b"\1") + packed + struct.pack(">H", port))
        reply = b""
        while len(reply) < 12:
            piece = sock.recv(12 - len(reply))
            if not piece:
                raise SocksRefused(reply[3] if len(reply) > 3 else -1)
            reply += piece
        if reply[3] != 0:
            sock.close()
            raise SocksRefused(reply[3])
        return sock

    async def socks(self, ip: str, port: int) -> socket.socket:
        """The same, from trio."""
        return await in_thread(lambda: self.socks_blocking(ip, port))

    async def ask(self, ip: str, port: int, line: bytes = b"hello") -> bytes:
        """One line to a Target through the gateway, and its answer."""

        def blocking() -> bytes:
            with self.socks_blocking(ip, port) as sock:
                sock.sendall(line + b"\n")
                return read_line(sock)

        return await in_thread(blocking)

    async def http(self, request: bytes) -> bytes:
        """Raw bytes to the gateway; everything that it answers."""

        def blocking() -> bytes:
            with socket.create_connection(self.gateway.bound, timeout=PATIENCE) as sock:
                sock.sendall(request)
                answer = b""
                while piece := sock.recv(1 << 16):
                    answer += piece
                return answer

        return await in_thread(blocking)


def read_line(sock: socket.socket) -> bytes:
    """Up to a newline, without it."""
    data = b""
    while not data.endswith(b"\n"):
        piece = sock.recv(4096)
        if not piece:
            break
        data += piece
    return data.rstrip(b"\n")


def dotted(section: str, keys: dict[str, object]) -> dict[str, object]:
    """Keyword arguments as configuration keys: `open_ports__range` is "broker.open_ports.range"."""
    return {f"{section}.{key.replace('__', '.')}": value for key, value in keys.items()}


async def in_thread(call: Callable[[], _T]) -> _T:
    """Blocking clients run beside trio."""
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


@asynccontextmanager
async def running_cluster(directory: Path, registry: Registry | None = None, **keys: object) -> AsyncIterator[Cluster]:
    """A cluster for one test; at its end every part is ended at once and must leave its relay's thread."""
    async with trio.open_nursery() as nursery:
        cluster = Cluster(directory, nursery, registry, **{k.replace("__", "."): v for k, v in keys.items()})
        await cluster.vip.start()
        try:
            yield cluster
        finally:
            with trio.CancelScope(shield=True):
                for part in cluster.parts:
                    part.scope.cancel()
                for part in cluster.parts:
                    await part.ended.wait()
                await trio.to_thread.run_sync(cluster.vip.relay.stop)
            nursery.cancel_scope.cancel()
    assert not any(part.role.relay.running for part in cluster.parts)
