"""[[broker.admit]] at work: who may register here, and what. The first rule that fits counts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rtunnel.config import AdmitConfig, parse_exposes

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Rule:
    """What an agent may register. Empty `namespaces` or `networks` fit every agent; `open_ports` None is any."""

    number: int = 0
    namespaces: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    open_ports: tuple[tuple[int, int], ...] | None = None
    streams: int = 0  # at once; 0: no limit

    def fits(self, namespace: str, addresses: Iterable[str]) -> bool:
        """Whether it is for this agent: every address has to be in one of the networks."""
        if self.namespaces and namespace not in self.namespaces:
            return False
        return not self.networks or all(
            any(address in network for network in self.networks) for address in map(ipaddress.ip_address, addresses)
        )

    def allows(self, port: int) -> bool:
        """Whether the agent may have this open port."""
        return self.open_ports is None or any(first <= port <= last for first, last in self.open_ports)


#: Without rules everybody who proves himself is admitted.
EVERYTHING = Rule()


class Admission:
    """The rules."""

    def __init__(self, rules: Sequence[AdmitConfig]) -> None:
        self._rules = [
            Rule(
                number,
                frozenset(rule.namespaces),
                tuple(map(ipaddress.ip_network, rule.networks)),
                parse_exposes(rule.open_ports),
                rule.streams,
            )
            for number, rule in enumerate(rules, 1)
        ]

    def rule(self, namespace: str, addresses: Iterable[str]) -> Rule | None:
        """The rule for an agent; None: it may not register."""
        if not self._rules:
            return EVERYTHING
        return next((rule for rule in self._rules if rule.fits(namespace, addresses)), None)
