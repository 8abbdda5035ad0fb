"""What an agent tells of its host: the interface of an address, and what a broker makes of it."""

from __future__ import annotations

import pytest

from rtunnel import netlink
from rtunnel.netlink import Interface
from rtunnel.wire.messages import Hello
from rtunnel_agent.ways import interface_to, interfaces_of
from rtunnel_broker.greeting import CLOCK_SECONDS, doubts

NOW = 1_800_000_000.0


ETH = Interface("eth0", addresses=("10.1.0.7/24", "fd00::7/64"))
DOCKER = Interface("docker0", "bridge", ("172.17.0.1/16",))
LO = Interface("lo", addresses=("127.0.0.1/8", "::1/128", "10.9.0.1/32"))


@pytest.mark.parametrize(
    ("ip", "name"),
    [
        ("10.1.0.7", "eth0"),
        ("fd00::7", "eth0"),
        ("172.17.0.1", "docker0"),
        ("10.9.0.1", "lo"),
        ("127.1.2.3", "lo"),
        ("10.1.0.8", ""),
        ("::2", ""),
    ],
)
def test_an_address_has_the_interface_that_holds_it(ip: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour in the same network is no address of the host; all of the loopback network is."""
    monkeypatch.setattr(netlink, "interfaces", lambda: (LO, ETH, DOCKER))
    assert interfaces_of([ip]) == [name]


def test_the_kernel_says_where_packets_go() -> None:
    """By rtnetlink; an address of the host goes through lo."""
    assert interface_to("127.1.2.3") == ("lo", True)
    assert interfaces_of(["127.0.0.1", "192.0.2.1"]) == ["lo", ""]


def test_without_rtnetlink_no_interface_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the host has the address is found out by a bind."""

    def none(*_: object) -> None:
        raise OSError(93, "Protocol not supported")

    monkeypatch.setattr(netlink, "_ask", none)
    assert interface_to("127.0.0.1") == ("", True)
    assert interface_to("192.0.2.1") == ("", False)
    assert interfaces_of(["127.0.0.1"]) == [""]


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
