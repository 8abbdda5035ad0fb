"""Which brokers an agent finds, whatever stands between: resolvers that rotate, addresses that say nothing."""

from __future__ import annotations

import socket
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from support.cluster import running_cluster


async def test_a_resolver_that_rotates_hides_no_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One name, two brokers, another order at every lookup: the agent finds both."""
    real, turn = socket.getaddrinfo, count()

    def rotating(host: Any, port: Any, *args: Any, **keys: Any) -> Any:
        if host != "brokers.test":
            return real(host, port, *args, **keys)
        ips = ["127.0.0.1", "127.0.0.2"][:: 1 if next(turn) % 2 else -1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]

    monkeypatch.setattr(socket, "getaddrinfo", rotating)
    async with running_cluster(tmp_path) as cluster:
        port = (await cluster.start_broker("b1")).node.bound[1]
        await cluster.start_broker("b2", listen=f"127.0.0.2:{port}")
        await cluster.start_gateway()
        await cluster.start_agent("a1", brokers=[f"brokers.test:{port}"])
        await cluster.whole()
