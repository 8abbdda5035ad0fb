"""A registry that is not there, is not Redis, or goes away: roles wait, say so, and serve what they knew."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from rtunnel.registry.redis import RedisRegistry
from support.attackers import ANY_PORT, FAST, admin_ports, probe
from support.cluster import SocksRefused, Target, in_thread, read_line, running_cluster
from support.plumbing import kept
from support.redis_server import RedisServer
from support.secrecy import is_secret
from support.unharmed import unharmed

SHORT: dict[str, Any] = {"registry__heartbeat": 0.3, "registry__ttl": 3.0, "registry__quarantine": 3.0}


def redis_registry(url: str) -> RedisRegistry:
    """With the times of SHORT."""
    return RedisRegistry(url, ttl=3.0, quarantine=3.0, timeout=1.0)


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
            await cluster.until(lambda: all(node.reasons() for node in parts) and bool(cluster.gateway.resolver.down))
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
        assert events.count("registry_reached") == 2 and events.count("registry_unavailable") == 3
        await cluster.until(lambda: len(registry.snapshot().tuples) == 2)
