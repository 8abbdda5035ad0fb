"""Which addresses the agent answers for at present."""

from __future__ import annotations

import errno
import socket

import pytest

from rtunnel.config import ConfigError
from rtunnel_agent.addresses import OwnAddresses, host_has


class Host:
    """The addresses of a host, and its default route."""

    def __init__(self, *addresses: str, default: str = "") -> None:
        self.addresses = set(addresses)
        self.default = default

    def own(self, *configured: str) -> OwnAddresses:
        return OwnAddresses(configured, has=lambda ip: ip in self.addresses, default=lambda: self.default)


def test_configured_addresses_come_and_go() -> None:
    """Only what the host has counts, in the order of the configuration; the rest is named."""
    host = Host("10.1.0.7")
    own = host.own("10.1.0.7", "10.1.0.100")
    assert (own.present, own.lost, own.missing) == (("10.1.0.7",), ("10.1.0.100",), "")
    assert not own.look()
    host.addresses = {"10.1.0.100", "10.1.0.7"}
    assert own.look() and own.present == ("10.1.0.7", "10.1.0.100") and not own.lost
    host.addresses, host.default = set(), "10.9.9.9"
    assert own.look() and not own.present
    assert own.missing.startswith("this host has none of the agent's addresses (10.1.0.7, 10.1.0.100): add")


def test_a_lost_default_address_gives_way_to_the_new_one() -> None:
    """One that the host still has stays, although the default route leaves from another."""
    host = Host("10.1.0.7", default="10.1.0.7")
    own = host.own()
    assert own.present == own.wanted == ("10.1.0.7",)
    host.addresses, host.default = {"10.1.0.7", "10.1.0.8"}, "10.1.0.8"
    assert not own.look()
    host.addresses = {"10.1.0.8"}
    assert own.look() and own.present == own.wanted == ("10.1.0.8",)
    host.addresses, host.default = set(), ""
    assert own.look() and not own.present and "10.1.0.8" in own.missing
    host.addresses, host.default = {"10.1.0.8"}, "10.1.0.8"
    assert own.look() and own.present == ("10.1.0.8",)


def test_without_a_default_route_the_error_names_the_key() -> None:
    """127.0.0.1 is never taken for the host's address."""
    with pytest.raises(ConfigError, match=r"agent\.addresses: this host has no default route.*write the address"):
        Host().own()


def test_the_kernel_says_which_addresses_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a bind. Out of descriptors is no answer: the address is not given back for that."""
    assert host_has("127.3.2.1") and host_has("::1")
    assert not host_has("192.0.2.7") and not host_has("2001:db8::7")

    def broken(number: int) -> object:
        def make(*_: object) -> object:
            raise OSError(number, "")

        return make

    monkeypatch.setattr(socket, "socket", broken(errno.EMFILE))
    assert host_has("192.0.2.7")
    monkeypatch.setattr(socket, "socket", broken(errno.EAFNOSUPPORT))
    assert not host_has("2001:db8::7")
