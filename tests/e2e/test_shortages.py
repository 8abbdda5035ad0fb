"""A gateway that runs out of something of its own: source ports, descriptors."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from rtunnel.relay.relay import Attempt
from rtunnel.wire.refusal import Refusal
from rtunnel_socks import resources
from rtunnel_socks.serve import status
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.logs import Events, named
from support.plumbing import dial


async def answer_of(cluster: Cluster, target: Target) -> bytes:
    return await cluster.http(f"CONNECT {target.ip}:{target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


@pytest.mark.parametrize(("code", "what"), [(errno.EADDRNOTAVAIL, "source_ports"), (errno.EMFILE, "descriptors")])
async def test_what_the_gateway_lacks_is_no_fault_of_a_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events, code: int, what: str
) -> None:
    """No connect works: the client is told `overloaded` and why, it is counted, and no node is suspect."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        gateway, target = cluster.gateway, Target("127.1.0.1")

        def connect(host: str, port: int, timeout: float, done: Any, **_: Any) -> Attempt:
            attempt = Attempt(gateway.relay.loop, host, port, done, may_meet_itself=False)
            attempt._fail_soon(code)
            return attempt

        with monkeypatch.context() as patch:
            patch.setattr(gateway.relay, "connect", connect)
            with pytest.raises(SocksRefused) as caught:
                await cluster.socks(target.ip, target.port)
            assert caught.value.code == Refusal.OVERLOADED.reply.socks
            answer = await answer_of(cluster, target)
        assert answer.startswith(b"HTTP/1.1 503 overloaded")
        if what == "source_ports":
            assert b"this gateway has no free source port towards 127.0.0.1:" in answer
        assert status(gateway)["shortages"] == {what: 4}
        assert not any(gateway.paths.is_suspect(node, gateway.relay.loop.now) for node in cluster.brokers)
        assert {line["code"] for line in named(events, "tuple_failed")} == {"overloaded"}
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"


async def test_clients_wait_while_there_are_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    """A gateway with room for three: the fourth is served when one of them has left, and nobody is turned away."""
    monkeypatch.setattr(resources, "client_room", lambda limit: 3)
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        gateway, target = cluster.gateway, Target("127.1.0.1")
        streams = [await cluster.socks(target.ip, target.port) for _ in range(3)]
        waiting: list[socket.socket] = []
        for _ in range(2):
            sock = await in_thread(lambda: dial(gateway.bound))
            sock.sendall(f"CONNECT {target.ip}:{target.port} HTTP/1.1\r\nHost: x\r\n\r\nhello\n".encode())
            waiting.append(sock)
        await cluster.until(lambda: bool(named(events, "clients_held_back")))
        assert gateway.counts.clients + gateway.counts.streams == 3
        for stream, sock in zip(streams, waiting, strict=False):
            stream.close()
            head = await in_thread(lambda sock=sock: read_line(sock))  # type: ignore[misc]
            assert head.startswith(b"HTTP/1.1 200 ")
        assert not gateway.counts.refused
        for sock in (*streams, *waiting):
            sock.close()


async def test_brokers_are_dialled_from_each_source_address(tmp_path: Path) -> None:
    addresses = ["127.0.0.8", "127.0.0.9"]
    async with running_cluster(tmp_path, gateway__source_addresses=addresses) as cluster:
        await cluster.start(brokers=1)
        gateway, target = cluster.gateway, Target("127.1.0.1")
        streams = [await cluster.socks(target.ip, target.port) for _ in range(4)]

        def sources() -> list[str]:
            own = [sock.getsockname()[0] for pair in gateway.relay.pairs for sock in pair.sockets]
            return sorted(ip for ip in own if ip in addresses)

        assert await gateway.bridge.run(sources) == sorted(addresses * 2)
        for stream in streams:
            stream.close()
