"""`rtunnel doctor` on the machines of the system: no FAIL while all is well, and one for each fault of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from night.system import Night

pytestmark = pytest.mark.lab

ROLES = {"broker1": "broker", "gateway": "gateway", "a1": "agent", "b1": "agent"}


@pytest.fixture
def whole(night: Night) -> Iterator[Night]:
    """The system, which is whole again after the test."""
    night.wait_healthy()
    yield night
    night.wait_healthy()


@contextmanager
def interface(night: Night, place: str, name: str, address: str) -> Iterator[None]:
    """A bridge without hardware, as a container engine makes it."""
    host = night.net[place]
    host.check("ip", "link", "add", "dev", name, "type", "bridge")
    try:
        host.check("ip", "address", "add", address, "dev", name)
        host.check("ip", "link", "set", name, "up")
        yield
    finally:
        host.check("ip", "link", "delete", name)


def fails(night: Night, place: str, *options: str) -> list[str]:
    """The lines of the doctor's FAILs on one machine."""
    words = options or ("--role", ROLES[place])
    output = night.ask(" ".join(("rtunnel doctor", *words)), place).output
    lines = output.splitlines()
    assert f"{sum(line.startswith('FAIL') for line in lines)} FAIL, " in lines[-1], output
    return [line for line in lines if line.startswith("FAIL")]


@pytest.mark.parametrize("place", ROLES)
def test_a_healthy_machine_has_no_fail(whole: Night, place: str) -> None:
    """A broker, a gateway, and agents in two VPCs behind a VIP."""
    assert fails(whole, place) == []


def test_a_healthy_cluster_has_no_fail(whole: Night) -> None:
    """By the registry, from the gateway's machine."""
    assert fails(whole, "gateway", "--cluster") == []


def test_docker0_hides_the_vip(whole: Night) -> None:
    """Its network covers the VIP's address."""
    with interface(whole, "b1", "docker0", "10.99.0.254/24"):
        assert "packets to 10.99.0.1:7000 (agent.brokers) leave through docker0" in "\n".join(fails(whole, "b1"))


def test_a_black_hole_between_agent_and_vip(whole: Night) -> None:
    """Large packets are lost, and no ICMP says so."""
    with whole.filtered(whole.net.router, "forward", f"ip saddr {whole.net['a1'].ip} meta length > 1300 drop"):
        (line,) = fails(whole, "a1")
    assert "path          10.99.0.1:7000 takes connections, but not 16384 bytes in full segments" in line


def test_a_black_hole_between_gateway_and_broker(whole: Night) -> None:
    """Towards one broker only."""
    with whole.filtered(whole.net["broker1"], "input", "tcp dport 20000-20999 meta length > 1300 drop"):
        (line,) = fails(whole, "gateway")
    assert "path          broker1 at 10.9.0.11:20" in line


def test_a_firewall_between_gateway_and_broker(whole: Night) -> None:
    """The connection is rejected at once."""
    with whole.filtered(whole.net["broker1"], "input", "tcp dport 20000-20999 reject with tcp reset"):
        (line,) = fails(whole, "gateway")
    assert "brokers       broker1 at 10.9.0.11:20" in line and "look for a firewall" in line


def test_the_vip_is_down(whole: Night) -> None:
    """No answer: the agent's machine says so."""
    with whole.filtered(whole.net.router, "forward", "tcp dport 7000 ct state new drop"):
        (line,) = fails(whole, "a1")
    assert "10.99.0.1:7000 can't be connected: no answer within 5 s" in line
