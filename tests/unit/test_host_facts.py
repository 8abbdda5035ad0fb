"""What an agent tells of its host: the interface of an address, and what a broker makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rtunnel.wire.messages import Hello
from rtunnel_agent import ways
from rtunnel_agent.ways import interface_of, interface_to
from rtunnel_broker.greeting import CLOCK_SECONDS, doubts

NOW = 1_800_000_000.0


def word(ip: str) -> str:
    """An IPv4 address as /proc/net/route has it."""
    return f"{int.from_bytes(bytes(int(part) for part in ip.split('.')), sys.byteorder):08X}"


def line(interface: str, network: str, mask: str, flags: int = 1, metric: int = 0) -> str:
    return f"{interface}\t{word(network)}\t00000000\t{flags:04X}\t0\t0\t{metric}\t{word(mask)}\t0\t0\t0\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tables of a host with a default route, docker0, two ways to one network, and a rejected one."""
    net = tmp_path / "proc/net"
    net.mkdir(parents=True)
    (net / "route").write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        + line("eth0", "0.0.0.0", "0.0.0.0", 3)
        + line("eth0", "10.1.0.0", "255.255.255.0")
        + line("docker0", "172.17.0.0", "255.255.0.0")
        + line("slow0", "10.2.0.0", "255.255.0.0", metric=100)
        + line("fast0", "10.2.0.0", "255.255.0.0", metric=10)
        + line("*", "10.3.0.0", "255.255.0.0", 0x201)
    )
    none = "0" * 32
    (net / "ipv6_route").write_text(
        f"{'fd0000000000000000000000000000'}00 40 {none} 00 {none} 00000100 00000001 00000000 00000001 eth1\n"
        f"{none} 00 {none} 00 {none} 00000400 00000001 00000000 00000003 eth0\n"
        f"{none} 00 {none} 00 {none} ffffffff 00000001 00000000 00200200 lo\n"
    )
    monkeypatch.setattr(ways, "host_has", lambda ip: ip == "10.1.0.7")
    return tmp_path


@pytest.mark.parametrize(
    ("ip", "interface", "own"),
    [
        ("10.1.0.7", "lo", "eth0"),
        ("10.1.0.8", "eth0", "eth0"),
        ("172.17.0.1", "docker0", "docker0"),
        ("10.2.0.1", "fast0", "fast0"),
        ("192.0.2.1", "eth0", ""),
        ("10.3.0.1", "eth0", ""),
        ("fd00::7", "eth1", "eth1"),
        ("2001:db8::1", "eth0", ""),
        ("127.0.0.1", "eth0", "lo"),
    ],
)
def test_an_address_has_the_interface_of_its_best_route(root: Path, ip: str, interface: str, own: str) -> None:
    """Longest prefix, then least metric; of a host's own address the default route says nothing."""
    assert interface_to(ip, root) == (interface, ip == "10.1.0.7")
    assert interface_of(ip, root) == own


def test_without_tables_no_interface_is_known(tmp_path: Path) -> None:
    """Nor where they are of another shape."""
    assert interface_of("192.0.2.1", tmp_path) == ""
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/route").write_text("Iface Destination\neth0 xyz 0 0 0 0 0 0\n")
    assert interface_of("192.0.2.1", tmp_path) == ""


def hello(**keys: object) -> Hello:
    known = {
        "version": 1, "agent_id": "a1", "instance": bytes(16), "namespace": "default", "addresses": ["10.1.0.7"],
        "nonce": bytes(16),
    }  # fmt: skip
    return Hello(**known | keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, []),
        ({"interfaces": ["eth0"], "time": int(NOW * 1000)}, []),
        ({"interfaces": ["docker0"]}, ["10.1.0.7 is on docker0"]),
        ({"interfaces": ["br-0123456789ab"]}, ["10.1.0.7 is on br-0123456789ab"]),
        ({"lost": ["10.1.0.8"]}, ["10.1.0.8 is not on the agent's host"]),
        ({"time": int((NOW - 60) * 1000)}, ["the agent's clock is 60 s behind"]),
        ({"time": int((NOW + 60) * 1000)}, ["the agent's clock is 60 s ahead of"]),
        ({"time": int((NOW - CLOCK_SECONDS + 1) * 1000)}, []),
        ({"interfaces": []}, []),
    ],
)
def test_odd_facts_are_told(facts: dict[str, object], words: list[str]) -> None:
    """One sentence for each; an agent that tells nothing is not doubted."""
    found = doubts(hello(**facts), NOW)
    assert len(found) == len(words)
    assert all(text.startswith(word) for text, word in zip(found, words, strict=True))
