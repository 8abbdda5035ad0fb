"""Finds the interfaces of addresses, for Hellos and traces, and not for each stream."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from rtunnel import netlink
from rtunnel_agent.addresses import host_has


def interface_to(ip: str) -> tuple[str, bool]:
    """Return the interface that the kernel chooses for packets to an IP ("": none, or not known),
    and whether the IP is this host's own.
    """
    try:
        return netlink.route_to(ip)
    except OSError:  # some containers have no rtnetlink
        return "", host_has(ip)


def interfaces_of(ips: Iterable[str]) -> list[str]:
    """Return the interface that has each of these addresses ("": none, or not known)."""
    try:
        known = netlink.interfaces()
    except OSError:
        known = ()
    holders = [netlink.holder(known, ip) for ip in ips]
    return ["" if holder is None else holder.name for holder in holders]


def own_address(sock: socket.socket) -> str:
    """Return the local address of a connected socket; empty when it is not connected any more."""
    try:
        return str(sock.getsockname()[0])
    except OSError:
        return ""
