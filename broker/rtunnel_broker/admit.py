"""The rules of `[[broker.admit]]`: which agents may register. The first that fits applies."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rtunnel.config import AdmitConfig, parse_exposes

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Empty `namespaces` or `networks` fit all agents; `open_ports` None: any port."""

    number: int = 0
    namespaces: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    open_ports: tuple[tuple[int, int], ...] | None = None
    streams: int = 0  # at once; 0: no limit

    def fits(self, namespace: str, addresses: Iterable[str]) -> bool:
        """Return whether the rule fits an agent: each address must be in one of the networks."""
        if self.namespaces and namespace not in self.namespaces:
            return False
        return not self.networks or all(
            any(address in network for network in self.networks) for address in map(ipaddress.ip_address, addresses)
        )

    def allows(self, port: int) -> bool:
        """Return whether the agent may have this open port."""
        return self.open_ports is None or any(first <= port <= last for first, last in self.open_ports)


#: Applies when no rules are configured: each agent that proves its identity may register.
EVERYTHING = Rule()


class Admission:
    """All rules of a node, in the order of the configuration."""

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
        """Return the rule for an agent, or None when it must not register."""
        if not self._rules:
            return EVERYTHING
        return next((rule for rule in self._rules if rule.fits(namespace, addresses)), None)
