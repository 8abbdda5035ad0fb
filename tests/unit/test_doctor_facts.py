"""How the doctor collects facts: connects to good and bad peers, the kernel's tables, a Redis, certificates."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rtunnel import netlink
from rtunnel.config import RegistryConfig, load
from rtunnel.doctor import checks, machine, probes, redis_facts
from rtunnel.doctor.facts import Endpoint
from rtunnel.doctor.probes import Plan, probe
from rtunnel.trust import pki, tls
from support.plumbing import free_port
from support.redis_server import RedisServer


@contextmanager
def serving(answer: bytes, receive_buffer: int = 0) -> Iterator[str]:
    """A peer that sends these bytes and then only keeps its connections; its address."""
    kept = []
    with socket.socket() as server:
        if receive_buffer:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    taken, _ = server.accept()
                except OSError:
                    return
                kept.append(taken)
                if answer:
                    taken.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for taken in kept:
                taken.close()


def only(found: list[Endpoint]) -> Endpoint:
    (endpoint,) = found
    return endpoint


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    pki.init(tmp_path / "pki")
    return tmp_path / "pki"


def test_the_kernel_tells_interfaces_and_routes() -> None:
    """By rtnetlink: the loopback interface is everywhere."""
    (lo,) = [interface for interface in netlink.interfaces() if interface.name == "lo"]
    assert "127.0.0.1/8" in lo.addresses and lo.kind == "" and lo.mtu >= 1500
    assert netlink.route_to("127.1.2.3") == ("lo", True)
    assert all(route.interface for route in netlink.routes())


def test_a_refused_connect_and_an_unknown_name_are_facts() -> None:
    """With the reason, and what was tried."""
    endpoint = only(probe(Plan("agent.brokers", f"127.0.0.1:{free_port()}", connects=6)))
    assert (endpoint.error, endpoint.connects, endpoint.connected) == ("connection refused", 1, 0)
    assert (endpoint.interface, endpoint.local) == ("lo", True)
    endpoint = only(probe(Plan("agent.brokers", "nowhere.invalid:7000")))
    assert "the name nowhere.invalid is not resolved" in endpoint.error and endpoint.ip == ""


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_a_peer_that_is_no_broker_is_a_fact(answer: bytes, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, and no TLS comes."""
    monkeypatch.setattr(probes, "PATIENCE", 0.5)
    context = tls.client_context(secrets / "ca.pem")
    with serving(answer) as address:
        endpoint = only(probe(Plan("agent.brokers", address, context, "broker.rtunnel", 6)))
    assert endpoint.connected == 1 and endpoint.not_tls and endpoint.tls_error and not endpoint.error


def test_unacknowledged_bytes_are_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer without room for them stands for a path that loses full segments."""
    monkeypatch.setattr(probes, "PATH_PATIENCE", 0.3)
    with serving(b"", receive_buffer=2048) as address:
        path = only(probe(Plan("agent.brokers", address, push=True))).path
    assert path is not None and not path.acknowledged
    with serving(b"") as address:
        path = only(probe(Plan("agent.brokers", address, push=True))).path
    assert path is not None and path.acknowledged and path.mss > 500 and path.pmtu > path.mss


def test_redis_tells_about_itself(make_redis: Callable[..., RedisServer]) -> None:
    """Latency, clock, policy, memory, role; then rights that are missing, a wrong password, and nobody there."""
    server = make_redis(tcp=True, password="r3dis-pa55word").start()
    config = RegistryConfig(url=server.url)
    facts = redis_facts.collect(config)
    assert not facts.error and facts.role == "master" and facts.policy == "noeviction" and facts.used > 0
    assert len(facts.latency_ms) == redis_facts.PINGS and abs(facts.offset) < 5
    assert server.password not in repr(facts)
    assert not [finding for finding in checks.redis(facts) if finding.level != "OK"]
    with server.client() as client:
        client.config_set("maxmemory", 500_000)
        client.config_set("maxmemory-policy", "allkeys-lru")
    texts = [finding.text for finding in checks.redis(redis_facts.collect(config)) if finding.level == "FAIL"]
    assert any("allkeys-lru" in text for text in texts) and any("maxmemory)" in text for text in texts)
    facts = redis_facts.collect(RegistryConfig(url=server.url.replace("r3dis", "wr0ng")))
    assert "password" in facts.error and "pa55word" not in facts.error
    server.kill()
    assert "check that the server runs" in redis_facts.collect(config).error


def test_certificates_are_read_with_their_issuer(secrets: Path, tmp_path: Path) -> None:
    """A certificate of another CA is told apart from a good one."""
    pki.issue_agent(secrets, "a1", agent_id="a1", namespace="default", addresses=["127.1.0.1"])
    pki.init(tmp_path / "other")
    keys = {
        "agent.agent_id": "a1",
        "agent.brokers": [f"127.0.0.1:{free_port()}"],
        "agent.addresses": ["127.1.0.1"],
        "agent.exposes": ["22"],
        "agent.certificate": str(secrets / "a1.pem"),
        "agent.key": str(secrets / "a1.key"),
        "agent.admin": "",
    }
    facts = machine.collect(load(None, {}, keys | {"agent.ca": str(secrets / "ca.pem")}), "agent")
    (certificate,) = facts.certificates
    assert certificate.subject == "agent/default/a1" and certificate.addresses == ("127.1.0.1",)
    assert certificate.issuer_error == "" and not facts.problems
    assert {finding.check for finding in checks.judge(facts) if finding.level == "FAIL"} == {"brokers"}
    facts = machine.collect(load(None, {}, keys | {"agent.ca": str(tmp_path / "other" / "ca.pem")}), "agent")
    assert "not from a CA in force" in facts.certificates[0].issuer_error


def test_roles_are_found_in_the_configuration() -> None:
    """Those with a key of their own."""
    assert machine.roles_of(load(None, {}, {})) == []
    assert machine.roles_of(load(None, {"RTUNNEL_AGENT_BROKERS": "vip:7000"}, {"broker.node_id": "b1"})) == [
        "broker",
        "agent",
    ]
