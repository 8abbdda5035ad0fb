"""Dials over TLS in a whole cluster, and configurations that do not fit together."""

from __future__ import annotations

import hashlib
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from rtunnel.trust import pki
from support.cluster import Cluster, SocksRefused, Target, in_thread, running_cluster
from support.logs import Events
from support.plumbing import read_all

IP = "127.1.0.1"
TLS: dict[str, object] = {"broker__dial_security": "tls", "gateway__dial_security": "tls"}


@pytest.mark.parametrize("security", ["tls", "plain"], ids=["links over TLS", "plain links"])
async def test_streams_over_tls(tmp_path: Path, security: str) -> None:
    """Megabytes and half-closes, proofs, a failover: all as without."""
    links: dict[str, object] = {"broker__security": security, "agent__security": security}
    async with running_cluster(tmp_path, None, **TLS, **links) as cluster:
        await cluster.start(brokers=2)
        target = Target(IP)
        data = random.Random(1).randbytes(3 << 20).replace(b"\n", b" ")
        for killed in ("b1", ""):
            assert await cluster.ask(IP, target.port) == f"{IP}:hello".encode()
            sock = await cluster.socks(IP, target.port)
            said = await in_thread(lambda s=sock: everything(s, data))  # type: ignore[misc]
            assert said == f"{IP} {hashlib.sha256(data).hexdigest()}\n".encode()
            if killed:
                cluster.brokers[killed].kill()


def everything(sock: socket.socket, data: bytes) -> bytes:
    """Send it and the end; what the target says of it."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return read_all(sock)


async def refused(cluster: Cluster, events: Events) -> str:
    """No stream comes to be; why, by the gateway's log."""
    target = Target(IP)
    with pytest.raises(SocksRefused):
        await cluster.ask(IP, target.port)
    return str(next(line["reason"] for line in events if line["event"] == "request_refused"))


async def the_line(cluster: Cluster, events: Events, event: str) -> Any:
    """The only one of this event. The other side may say it a moment later than the client hears of it."""
    await cluster.until(lambda: any(line["event"] == event for line in events))
    (line,) = [line for line in events if line["event"] == event]
    return line


async def test_a_plain_gateway_is_turned_away(tmp_path: Path, events: Events) -> None:
    """Both sides say what is wrong, and no byte of the Dial is looked at."""
    async with running_cluster(tmp_path, broker__dial_security="tls") as cluster:
        await cluster.start(brokers=1)
        why = await refused(cluster, events)
        assert "protocol_error: this broker takes Dials over TLS only: gateway.dial_security must be tls" in why
        line = await the_line(cluster, events, "dial_lost")
        assert line["reason"] == "the peer does not speak TLS"
        assert line["hint"] == "gateway.dial_security must be tls"
        await cluster.until(lambda: cluster.brokers["b1"].node.counts.waiting == 0)


async def test_a_plain_broker_is_not_believed(tmp_path: Path, events: Events) -> None:
    """Who wants TLS sends no Dial without it, whatever comes back."""
    async with running_cluster(tmp_path, gateway__dial_security="tls") as cluster:
        await cluster.start(brokers=1)
        why = await refused(cluster, events)
        assert "no TLS with the broker: TLS: wrong version number" in why and "broker.dial_security" in why
        line = await the_line(cluster, events, "dial_refused")
        assert line["reason"] == "a TLS handshake came, and broker.dial_security is plain"


async def test_a_broker_of_another_ca_is_not_believed(tmp_path: Path, events: Events) -> None:
    """The gateway names the fault and the key to look at."""
    pki.init(tmp_path / "other")
    keys: dict[str, object] = {"gateway__ca": str(tmp_path / "other" / "ca.pem"), "gateway__proof": "off"}
    async with running_cluster(tmp_path, None, **TLS, **keys) as cluster:
        await cluster.start(brokers=1)
        why = await refused(cluster, events)
        assert "certificate not accepted" in why and "gateway.ca" in why
