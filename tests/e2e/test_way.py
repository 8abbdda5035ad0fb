"""The way of one request, end to end: real roles, real sockets, real clients."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtunnel.wire.messages import MAX_UNAUTHENTICATED, encode
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.plumbing import dial, free_port, free_ports, free_range, kept, read_all, refusing_port, reset


async def test_a_target_answers_by_its_original_ip(tmp_path: Path) -> None:
    """Two agents, two brokers: each answers for its own IP, and only for it."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2, agents=2)
        targets = [Target("127.1.0.1"), Target("127.1.0.2")]
        for target in targets:
            answer = await cluster.ask(target.ip, target.port, b"who are you")
            assert answer == f"{target.ip}:who are you".encode()


@pytest.mark.parametrize("security", ["tls", "plain"])
async def test_half_close_and_bulk(tmp_path: Path, security: str) -> None:
    """The client sends 8 MiB, shuts its side, and gets the digest of all of it."""
    async with running_cluster(tmp_path, broker__security=security, agent__security=security) as cluster:
        await cluster.start()
        target = Target("127.1.0.1")
        data = os.urandom(8 << 20).replace(b"\n", b" ")

        def client() -> bytes:
            with cluster.socks_blocking(target.ip, target.port) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                return read_all(sock)

        answer = await in_thread(client)
        assert answer.decode().split()[-1] == hashlib.sha256(data).hexdigest()


async def test_ipv6_target(tmp_path: Path) -> None:
    """An IPv6 address is an original IP as well."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(agents=0)
        await cluster.start_agent("six", "::1")
        await cluster.whole()
        target = Target("::1")
        assert await cluster.ask("::1", target.port) == b"::1:hello"


def answers(host: str, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((host, port)) == 0


async def curl(cluster: Cluster, *arguments: str) -> str:
    host, port = cluster.gateway.bound
    command = ["curl", "-sS", "-m", "10", *(a.replace("@", f"{host}:{port}") for a in arguments)]
    done = await in_thread(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
async def test_curl_by_every_proxy_protocol(tmp_path: Path) -> None:
    """--socks5, --socks5-hostname, --proxy with CONNECT and with an absolute-form request."""
    (tmp_path / "page").write_text("a page\n")
    async with running_cluster(tmp_path) as cluster:
        await cluster.start()
        port = free_port()
        server = subprocess.Popen(
            [sys.executable, "-m", "http.server", str(port), "--bind", "127.1.0.1", "--directory", str(tmp_path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.1.0.1:{port}/page"
            await cluster.until(lambda: answers("127.1.0.1", port))
            assert await curl(cluster, "--socks5-hostname", "@", url) == "a page\n"
            assert await curl(cluster, "--socks5", "@", url) == "a page\n"
            assert await curl(cluster, "--proxy", "http://@", url) == "a page\n"
            assert await curl(cluster, "--proxy", "http://@", "--proxytunnel", url) == "a page\n"
            twice = await curl(cluster, "--proxy", "http://@", url, url)
            assert twice == "a page\na page\n"
        finally:
            server.kill()
            server.wait()


async def test_four_failures_have_four_answers(tmp_path: Path) -> None:
    """Unknown target, not exposed, refused, timed out: each its own SOCKS code and its own HTTP answer."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1, agents=0)
        refused = refusing_port("127.1.0.1")
        silent = socket.create_server(("127.1.0.1", 0), backlog=0)
        timed_out = silent.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.1.0.1", timed_out))
        await cluster.start_agent("a1", redundancy=1, exposes=[str(refused), str(timed_out)], target_timeout=0.3)
        await cluster.whole()
        expected = {
            ("127.9.9.9", 80): (0x04, 502, "destination_not_found"),
            ("127.1.0.1", 1): (0x02, 403, "destination_ip_prohibited"),
            ("127.1.0.1", refused): (0x05, 502, "connection_refused"),
            ("127.1.0.1", timed_out): (0x06, 504, "connection_timeout"),
        }
        for (ip, port), (socks, status, token) in expected.items():
            with pytest.raises(SocksRefused) as caught:
                await cluster.socks(ip, port)
            assert caught.value.code == socks, (ip, port)
            answer = await cluster.http(f"CONNECT {ip}:{port} HTTP/1.1\r\nHost: {ip}\r\n\r\n".encode())
            assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
            assert f"error={token}".encode() in answer
        for sock in (silent, *fillers):
            sock.close()


async def test_agents_sit_on_two_different_nodes(tmp_path: Path) -> None:
    """Round robin over three brokers: every agent is 2/2, on distinct nodes."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=3, agents=4)
        for part in cluster.agents.values():
            nodes = {slot.session.node for slot in part.agent.slots if slot.session is not None}
            assert len(nodes) == 2
            assert part.agent.redundancy == "2/2"


async def test_a_pinned_vip_degrades_and_says_why(tmp_path: Path) -> None:
    """Source pinning: 1/2, with the reason, and the one session serves."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2, agents=0)
        cluster.vip.pinned = cluster.vip.backends[0]
        part = await cluster.start_agent("a1", backoff_cap=0.1)
        await cluster.until(lambda: any("same node" in reason for reason in part.agent.reasons()))
        assert (part.agent.redundancy, part.agent.state) == ("1/2", "degraded")
        # It goes on looking, with pauses no longer than it may: without the cap these would take a minute.
        begun = max(slot.searches for slot in part.agent.slots)
        await cluster.until(lambda: max(slot.searches for slot in part.agent.slots) >= begun + 12)
        target = Target("127.1.0.1")
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


async def test_a_client_that_leaves_an_open_port_takes_its_dial_along(tmp_path: Path) -> None:
    """Reset while the agent still connects the target: the stream ends at once, on broker and agent."""
    async with running_cluster(tmp_path) as cluster:
        part = await cluster.start_broker("b1", open_ports__range=free_range(10), open_ports__allow=["127.0.0.0/8"])
        await cluster.start_gateway()
        silent = kept(socket.create_server(("127.1.0.1", 0), backlog=0))
        port = silent.getsockname()[1]
        for _ in range(3):
            filler = kept(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.1.0.1", port))
        agent = await cluster.start_agent("a1", redundancy=1, publish=[{"target": f"127.1.0.1:{port}"}])
        await cluster.whole()
        session = agent.agent.slots[0].session
        assert session is not None and session.welcome is not None and session.link is not None
        client = await in_thread(lambda: dial(("127.0.0.1", session.welcome.open_ports[0].port)))  # type: ignore[union-attr]
        link = session.link
        await cluster.until(lambda: part.node.counts.waiting == 1 and len(link.streams) == 2)
        reset(client)
        await cluster.until(lambda: part.node.counts.waiting == 0 and len(link.streams) == 1)


@pytest.mark.parametrize("by", ["certificate", "token"])
async def test_an_agent_may_have_as_much_as_the_configuration_takes(tmp_path: Path, by: str) -> None:
    """64 addresses, 256 exposed ports, 64 open ports with networks of their own: all of it is there."""
    addresses = [f"127.2.100.{number}" for number in range(101, 165)]
    network = "1111:2222:3333:4444:5555:6666:7777:8888/128"
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker(
            ("broker-" * 19)[:128], open_ports__range=free_range(100), open_ports__allow=["127.0.0.0/8", "::/0"]
        )
        await cluster.start_gateway(proof="required" if by == "certificate" else "off")
        target = Target(addresses[63])
        publish = [{"target": f"{address}:{target.port}", "allow": [network, "127.0.0.1/32"]} for address in addresses]
        keys: dict[str, Any] = {} if by == "certificate" else {"certificate": "", "key": ""}
        part = await cluster.start_agent(
            ("agent-" * 22)[:128],
            *addresses,
            redundancy=1,
            publish=publish,
            exposes=[*map(str, range(50001, 50511, 2)), "1-50000"],
            **keys,
        )
        await cluster.whole()
        session = part.agent.slots[0].session
        assert session is not None and session.welcome is not None and session.hello is not None
        assert len(encode(session.hello)) > 3 * MAX_UNAUTHENTICATED / 2
        assert {port.ip for port in session.welcome.open_ports} == set(addresses)
        last = next(port.port for port in session.welcome.open_ports if port.ip == target.ip)

        def ask() -> bytes:
            with dial(("127.0.0.1", last)) as sock:
                sock.sendall(b"direct\n")
                return read_line(sock)

        assert await in_thread(ask) == f"{target.ip}:direct".encode()
        assert await cluster.ask(target.ip, target.port) == f"{target.ip}:hello".encode()


async def test_an_open_port_relays_at_once_and_only_for_its_sources(tmp_path: Path) -> None:
    """(PS IP, PS port) reaches the target with raw bytes; a source outside the list gets a reset."""
    fixed = free_ports(2)[0]
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1", open_ports__range=f"{fixed}-{fixed + 1}", open_ports__allow=["127.0.0.0/29"])
        await cluster.start_gateway()
        target = Target("127.1.0.1")
        publish = [
            {"target": f"127.1.0.1:{target.port}"},  # a port by chance, and not the one of the next
            {"target": f"127.1.0.1:{target.port}", "port": fixed, "allow": ["127.0.0.3/32"]},
            {"target": f"127.1.0.1:{target.port}", "port": 4444},
        ]
        part = await cluster.start_agent("a1", redundancy=1, publish=publish, exposes=["1"])
        await cluster.whole()
        session = part.agent.slots[0].session
        assert session is not None and session.welcome is not None
        granted = {port.port for port in session.welcome.open_ports}
        assert fixed in granted and len(granted) == 2
        assert any("4444" in notice for notice in session.welcome.notices)
        anyone = next(port for port in granted if port != fixed)

        def ask(port: int, source: str) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0)) as sock:
                sock.sendall(b"direct\n")
                return read_line(sock)

        assert await in_thread(lambda: ask(anyone, "127.0.0.1")) == b"127.1.0.1:direct"
        assert await in_thread(lambda: ask(fixed, "127.0.0.3")) == b"127.1.0.1:direct"
        for port, source in ((fixed, "127.0.0.1"), (anyone, "127.0.0.9")):
            with pytest.raises(ConnectionError):
                await in_thread(lambda port=port, source=source: ask(port, source))  # type: ignore[misc]
