"""The gateway as an HTTP proxy: probes of its port, requests in absolute form one after the other, and odd clients."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from support.cluster import Cluster, in_thread, running_cluster
from support.logs import Events, named
from support.plumbing import kept, read_all

PATIENCE = 10.0


def probe_blocking(cluster: Cluster, method: bytes = b"GET", source: str = "127.0.0.1") -> bytes:
    """What a load balancer gets from the proxy port."""
    sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE, source_address=(source, 0)))
    sock.sendall(method + b" /healthz HTTP/1.0\r\n\r\n")
    return read_all(sock)


async def probe(cluster: Cluster, method: bytes = b"GET", source: str = "127.0.0.1") -> bytes:
    """The same, from trio."""
    return await in_thread(lambda: probe_blocking(cluster, method, source))


# --- health ---------------------------------------------------------------------------------------------------


async def test_a_probe_of_the_proxy_port_hears_whether_it_is_ready(tmp_path: Path, events: Events) -> None:
    """200 and 503 as `/readyz`, for strangers without a login too; a probe is no client and no refusal."""
    (tmp_path / "users").touch(0o600)
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_gateway(users=str(tmp_path / "users"), limits__source_rate=1)
        gateway = cluster.gateway
        await cluster.until(lambda: gateway.ready)
        for _ in range(4):
            assert (await probe(cluster, source="127.66.0.1")).startswith(b"HTTP/1.1 200 ready\r\n")
        assert (await probe(cluster, b"HEAD")).endswith(b"\r\n\r\n")
        gateway.draining = True
        answer = await probe(cluster)
        assert answer.startswith(b"HTTP/1.1 503 not ready\r\n") and b"draining" not in answer
        assert gateway.counts.refused == {}
        await cluster.until(lambda: gateway.counts.clients == 0)
    assert not named(events, "refused")


@pytest.mark.parametrize("full", [{"max_clients": 3}, {"limits__source_handshakes": 3}])
async def test_a_full_gateway_answers_probes(tmp_path: Path, events: Events, full: dict[str, int]) -> None:
    """Who asks for health needs no place: a full gateway is not taken out of service."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_gateway(**full)
        gateway = cluster.gateway
        await cluster.until(lambda: gateway.ready)
        held = [kept(socket.create_connection(gateway.bound)) for _ in range(3)]
        for sock in held:
            sock.sendall(b"\5")
        await cluster.until(lambda: gateway.counts.clients == 3)
        for method in (b"GET", b"HEAD"):
            assert (await probe(cluster, method)).startswith(b"HTTP/1.1 200 ready\r\n")
        assert gateway.counts.refused == {}
        with trio.fail_after(PATIENCE):
            assert await in_thread(lambda: refused_blocking(cluster)) == b""
        assert sum(gateway.counts.refused.values()) == 1


def refused_blocking(cluster: Cluster) -> bytes:
    """What another client gets."""
    sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE))
    sock.sendall(b"GET /healthy HTTP/1.0\r\n\r\n")
    try:
        return read_all(sock)
    except ConnectionResetError:
        return b""
