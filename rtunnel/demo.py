"""The command `rtunnel demo`: a small cluster in one process, and requests through it.

It needs no root and no Redis: the hosts are loopback addresses (127.77.0.1, ...), the registry is
in memory, and TLS is on. The roles run the same code as in production, each with its own relay.
"""

from __future__ import annotations

import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import click
import trio
from rich.console import Console
from rich.table import Table

from rtunnel import logs
from rtunnel.bridge import Bridge
from rtunnel.config import Config, LogConfig, load
from rtunnel.errors import ListenError
from rtunnel.net import listening_socket
from rtunnel.registry import Registry
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import NO_OWNER
from rtunnel.relay.relay import Relay
from rtunnel.roles import find_role
from rtunnel.trust import pki
from rtunnel.wire.refusal import Refusal

HOSTS: Final = ("127.77.0.1", "127.77.0.2", "127.77.0.3")
NODES: Final = ("broker-1", "broker-2")
PATIENCE: Final = 20.0
#: RFC 1928 section 3.
SOCKS_PORT: Final = 1080


class DemoFailed(Exception):
    """A step of the demo failed; the text says which."""


# --- what surrounds the cluster: targets, a VIP, a client -----------------------------------------


def start_target(ip: str, port: int) -> ThreadingHTTPServer:
    """Start an HTTP service on one of the hosts, in a thread of its own."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"hello from {ip}\n".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((ip, port), Page)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Vip:
    """A layer-4 load balancer in front of the brokers, in round robin."""

    def __init__(self) -> None:
        self.relay = Relay(lambda event, fields: None, "vip")
        self.backends: list[tuple[str, int]] = []
        self._turn = 0

    async def start(self) -> int:
        """Listen on a free port, and return it."""
        sock = listening_socket("127.0.0.1", 0)
        port = int(sock.getsockname()[1])
        self.relay.start()
        await Bridge(self.relay).run(lambda: self.relay.listen(sock, self._accept))
        return port

    def _accept(self, sock: socket.socket, peer: str) -> None:
        client = self.relay.end(sock, peer)
        client.pause()
        self._turn += 1
        host, port = self.backends[self._turn % len(self.backends)]

        def connected(backend: SocketEnd | None, code: Refusal, why: str) -> None:
            if backend is None:
                client.abort()
            else:
                self.relay.join(client, backend, owner=NO_OWNER)

        self.relay.connect(host, port, 2.0, connected)


def fetch(proxy: tuple[str, int], ip: str, port: int, *, socks: bool) -> str:
    """Fetch http://ip:port/ through the gateway, over SOCKS5 (RFC 1928) or as a proxy request.

    Return the page. Raises DemoFailed. The client is written with plain sockets, without code of
    rtunnel.
    """
    with socket.create_connection(proxy, timeout=PATIENCE) as sock:
        path = "/"
        if socks:
            sock.sendall(b"\5\1\0")
            _expect(sock, b"\5\0")
            sock.sendall(b"\5\1\0\1" + socket.inet_aton(ip) + struct.pack(">H", port))
            reply = _read(sock, 10)
            if reply[1] != 0:
                raise DemoFailed(f"the gateway answered SOCKS code {reply[1]} for {ip}:{port}")
        else:
            path = f"http://{ip}:{port}/"
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {ip}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
        raise DemoFailed(f"{ip}:{port} answered {head.splitlines()[:1]}")
    return body.decode().strip()


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise DemoFailed("the gateway closed the connection")
        data += piece
    return data


def _expect(sock: socket.socket, wanted: bytes) -> None:
    got = _read(sock, len(wanted))
    if got != wanted:
        raise DemoFailed(f"the gateway answered {got!r}")


# --- the cluster ----------------------------------------------------------------------------------


@dataclass
class Running:
    """A running role: the value that `serve` gave to `started`, and the scope that ends it."""

    role: Any
    scope: trio.CancelScope
    stop: trio.Event


class Cluster:
    """The demo's cluster: brokers, a VIP, agents and a gateway, in one nursery."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.registry: Registry = MemoryRegistry(ttl=6.0, quarantine=10.0)
        self.vip = Vip()
        self.brokers: dict[str, Running] = {}
        self.agents: list[Running] = []
        self.gateway: Running
        self.proxy = ("127.0.0.1", 0)
        self.target_port = 0
        self._vip_port = 0
        self._nursery = nursery
        self._node_ports: dict[str, int] = {}

    async def start(self) -> None:
        """Start all parts, and wait until every agent has its two sessions."""
        pki.init(self.directory / "pki")
        target = start_target(HOSTS[0], 0)
        self.target_port = int(target.server_address[1])
        for ip in HOSTS[1:]:
            start_target(ip, self.target_port)
        for node in NODES:
            await self.start_broker(node)
        self._vip_port = await self.vip.start()
        self.gateway = await self._start_gateway()
        self.proxy = self.gateway.role.bound
        for number, ip in enumerate(HOSTS, 1):
            self.agents.append(await self._start_agent(f"host-{number}", ip, self.directory / "pki"))
        await self.until("every agent has two sessions", lambda: all(a.role.state == "ready" for a in self.agents))
        wanted = len(HOSTS) * len(NODES)
        await self.until("the gateway knows every tuple", lambda: self.gateway.role.table.counts().tuples == wanted)

    async def start_broker(self, node: str) -> None:
        """Start a broker, on the port that it had before if it was killed."""
        first = 20000 + 2000 * NODES.index(node)
        running = await self._serve(
            "broker",
            {
                "broker.listen": f"127.0.0.1:{self._node_ports.get(node, 0)}",
                "broker.advertise_ip": "127.0.0.1",
                "broker.node_id": node,
                "broker.host": node,
                "broker.port_range": f"{first}-{first + 1999}",
            },
        )
        self.brokers[node] = running
        self._node_ports[node] = running.role.bound[1]
        self.vip.backends = [("127.0.0.1", port) for port in self._node_ports.values()]

    async def impostor(self, ip: str) -> str:
        """Start an agent with a certificate of a foreign CA, and return what the brokers answer."""
        other = self.directory / "other"
        pki.init(other)
        with (other / "ca.pem").open("ab") as ours:  # trusts its own CA and the brokers
            ours.write((self.directory / "pki" / "ca.pem").read_bytes())
        running = await self._start_agent("host-1", ip, other)
        slots = running.role.slots
        await self.until("the impostor is refused", lambda: all(slot.told for slot in slots))
        running.stop.set()
        return str(slots[0].told)

    async def _start_agent(self, agent_id: str, ip: str, made: Path) -> Running:
        pki.issue_agent(made, agent_id, agent_id=agent_id, namespace="default", addresses=[ip], days=1)
        return await self._serve(
            "agent",
            {
                "agent.brokers": [f"127.0.0.1:{self._vip_port}"],
                "agent.agent_id": agent_id,
                "agent.addresses": [ip],
                "agent.exposes": [str(self.target_port)],
                "agent.ca": str(made / "ca.pem"),
                "agent.certificate": str(made / f"{agent_id}.pem"),
                "agent.key": str(made / f"{agent_id}.key"),
            },
        )

    def kill_broker(self, node: str) -> None:
        """End a broker as kill -9 would: its sockets are reset, its tuples stay in the registry."""
        running = self.brokers.pop(node)
        running.scope.cancel()
        running.role.relay.stop()

    async def until(self, what: str, condition: Callable[[], bool]) -> float:
        """Wait for a condition, and return the seconds that it took. Raises DemoFailed."""
        began = time.monotonic()
        with trio.move_on_after(PATIENCE):
            while not condition():
                await trio.sleep(0.01)
            return time.monotonic() - began
        raise DemoFailed(f"this did not happen within {PATIENCE:g} s: {what}")

    async def _serve(self, name: str, keys: dict[str, object]) -> Running:
        config = self._config(keys)
        role = find_role(name)
        stop = trio.Event()
        scope = trio.CancelScope()

        async def live(*, task_status: trio.TaskStatus[Any]) -> None:
            with scope:
                await role.serve(config, self.registry, stop=stop, task_status=task_status)

        return Running(await self._nursery.start(live), scope, stop)

    def _config(self, keys: dict[str, object]) -> Config:
        made = self.directory / "pki"
        common: dict[str, object] = {
            "registry.heartbeat": 2.0,
            "registry.ttl": 6.0,
            "registry.quarantine": 10.0,
            "broker.certificate": str(made / "broker.pem"),
            "broker.key": str(made / "broker.key"),
            "broker.cluster_key": str(made / "cluster.key"),
            "broker.ca": str(made / "ca.pem"),
            "broker.admin": "",
            "agent.admin": "",
            "gateway.key": str(made / "gateway.key"),
            "gateway.ca": str(made / "ca.pem"),
            "gateway.admin": "",
            "gateway.lame_duck": 0.0,
        }
        return load(None, {}, common | keys)

    async def _start_gateway(self) -> Running:
        """Start the gateway on port 1080, or on any free port if 1080 is in use."""
        try:
            return await self._serve("gateway", {"gateway.listen": f"127.0.0.1:{SOCKS_PORT}"})
        except* ListenError:
            pass
        return await self._serve("gateway", {"gateway.listen": "127.0.0.1:0"})

    def tuples(self, ip: str) -> dict[str, str]:
        """Return the tuples of this host in the registry, as node -> "PS IP:port"."""
        return {t.node: f"{t.ps_ip}:{t.ps_port}" for t in self.registry.lookup("default", ip)}


# --- the output -----------------------------------------------------------------------------------


class Story:
    """Prints the steps of the demo as they happen."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    def chapter(self, title: str) -> None:
        """Print the heading of the next part."""
        self.console.print(f"\n[bold]{title}[/bold]  [dim]{time.monotonic() - self._began:.1f} s[/dim]")

    def who_sits_where(self, cluster: Cluster) -> None:
        """Print the hosts, and their tuples on each node."""
        table = Table("agent", "answers for", *NODES, "redundancy", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for running, ip in zip(cluster.agents, HOSTS, strict=True):
            tuples = cluster.tuples(ip)
            alive = [tuples.get(node, "-") if node in cluster.brokers else "[dim]dead[/dim]" for node in NODES]
            table.add_row(running.role.agent_id, f"{ip}:{cluster.target_port}", *alive, running.role.redundancy)
        self.console.print(table)

    async def fetch_all(self, cluster: Cluster) -> None:
        """Fetch from every host by its original IP, over both protocols, and print the answers."""
        table = Table(
            "asked for", "over", "answer", "took", "by way of", box=None, pad_edge=False, padding=(0, 3, 0, 0)
        )
        for ip in HOSTS:
            for socks in (True, False):
                used = _watch_streams(cluster)
                began = time.perf_counter()
                answer = await trio.to_thread.run_sync(
                    lambda ip=ip, socks=socks: fetch(cluster.proxy, ip, cluster.target_port, socks=socks)  # type: ignore[misc]
                )
                took = (time.perf_counter() - began) * 1000
                if answer != f"hello from {ip}":
                    raise DemoFailed(f"the request to {ip} got the wrong answer {answer!r}")
                over = "SOCKS5" if socks else "HTTP proxy"
                table.add_row(f"http://{ip}:{cluster.target_port}/", over, answer, f"{took:.1f} ms", used())
        self.console.print(table)


def _watch_streams(cluster: Cluster) -> Callable[[], str]:
    before = {node: running.role.counts.accepted for node, running in cluster.brokers.items()}

    def which() -> str:
        nodes = [n for n, running in cluster.brokers.items() if running.role.counts.accepted > before.get(n, 0)]
        return ", ".join(nodes)

    return which


async def tell(story: Story, stay: bool) -> None:
    """Run the demo, and print each step. Raises DemoFailed.

    `stay`: keep the cluster running at the end, until cancelled.
    """
    with _scratch() as directory:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(directory, nursery)
            story.chapter("Two brokers, a VIP in front of them, three agents, a gateway")
            await cluster.start()
            story.who_sits_where(cluster)
            story.console.print("gateway (SOCKS5 and HTTP proxy): {}:{}".format(*cluster.proxy))
            story.chapter("Fetch from every host by its original IP; its agent proves to the gateway who it is")
            await story.fetch_all(cluster)
            story.chapter(f"Another agent claims {HOSTS[0]}, with a certificate of its own CA")
            story.console.print(f"refused: {await cluster.impostor(HOSTS[0])}", soft_wrap=True)
            victim = NODES[0]
            story.chapter(f"{victim} is killed (kill -9): its tuples are still in the registry, its ports are closed")
            cluster.kill_broker(victim)
            await story.fetch_all(cluster)
            story.who_sits_where(cluster)
            story.chapter(f"{victim} starts again with a new incarnation; the agents find it behind the VIP")
            await cluster.start_broker(victim)
            took = await cluster.until(
                "every agent has two sessions again", lambda: all(a.role.state == "ready" for a in cluster.agents)
            )
            story.console.print(f"every agent is back on two nodes after {took:.1f} s")
            story.who_sits_where(cluster)
            await story.fetch_all(cluster)
            if stay:
                await _stay(story, cluster)
            nursery.cancel_scope.cancel()


async def _stay(story: Story, cluster: Cluster) -> None:
    host, port = cluster.proxy
    story.chapter("The cluster runs until Ctrl-C. Try:")
    for ip in HOSTS:
        story.console.print(f"  curl --socks5 {host}:{port} http://{ip}:{cluster.target_port}/", soft_wrap=True)
    story.console.print(f"  curl --proxy http://{host}:{port} http://{HOSTS[0]}:{cluster.target_port}/", soft_wrap=True)
    await trio.sleep_forever()


@contextmanager
def _scratch() -> Any:
    directory = Path(tempfile.mkdtemp(prefix="rtunnel-demo-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--stay", is_flag=True, help="Keep the cluster running at the end, and print curl commands to try.")
@click.option("--log", "level", default="", metavar="LEVEL", help="Show the log of the roles, from this level on.")
def _command(stay: bool, level: str) -> int:
    """Run a whole cluster on this machine, and show what it does.

    The demo starts two brokers, a VIP, three agents and a gateway. It fetches from each agent's
    host by its original IP, refuses an impostor, kills a broker, and fetches again. It needs
    neither root nor Redis. The exit code is 0 only if every step worked.
    """
    logs.setup(LogConfig(level=level or "critical", format="console"))
    story = Story(Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    status, last = 0, "\n[bold green]every step worked[/bold green]"
    try:
        trio.run(tell, story, stay)
    except* DemoFailed as error:
        status, last = 1, "".join(f"\n[bold red]failed:[/bold red] {fault}" for fault in error.exceptions)
    except* KeyboardInterrupt:
        last = "\nstopped"
    story.console.print(last)
    return status


def main(arguments: list[str]) -> int:
    """Run the command line, and return the exit status."""
    try:
        status = _command.main(arguments, prog_name="rtunnel demo", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return int(status or 0)
