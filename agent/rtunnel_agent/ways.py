"""Finds the interface of an address, by the kernel's tables in /proc, which takes a millisecond.

It is for Hellos and traces, and not for each stream.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rtunnel_agent.addresses import host_has

#: The interface of a packet to an address of the host itself.
LOOPBACK: Final = "lo"
#: Lines of a table that are read: a host with more (a router) gets no answer, and no delay.
MAX_LINES: Final = 4096
#: Flags of a route (linux/route.h): it is up; it rejects packets.
_UP: Final = 0x1
_REJECTS: Final = 0x200

#: Network, metric and interface.
_Route = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int, str]


def interface_to(ip: str, root: Path = Path("/")) -> tuple[str, bool]:
    """Return the interface of the route to an IP ("": none, or not known), and whether the IP
    is this host's own.

    `root` is where /proc is. The main tables count: rules that choose another table are not seen.
    """
    if host_has(ip):
        return LOOPBACK, True
    return _by_route(ip, root), False


def interface_of(ip: str, root: Path = Path("/")) -> str:
    """Return the interface whose network has this address of the host ("": not known).

    An address that is alone in its network (a /32 on lo) has none.
    """
    if ipaddress.ip_address(ip).is_loopback:
        return LOOPBACK
    found = _by_route(ip, root, default=False)
    return found[:15]


def _by_route(ip: str, root: Path, *, default: bool = True) -> str:
    """Return the interface of the best route to an IP; "" when there is none. `default`: whether
    the default route counts.
    """
    address = ipaddress.ip_address(ip)
    try:
        routes = _routes_6(root) if address.version == 6 else _routes_4(root)
        found = [route for route in routes if address in route[0] and (default or route[0].prefixlen)]
    except (OSError, ValueError):
        return ""
    best = max(found, key=lambda route: (route[0].prefixlen, -route[1]), default=None)
    return "" if best is None else best[2]


def _lines(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="ascii", errors="replace") as file:
        for _, line in zip(range(MAX_LINES), file, strict=False):
            yield line.split()


def _routes_4(root: Path) -> Iterator[_Route]:
    """Yield the routes of /proc/net/route, whose addresses are words in the host's byte order."""
    for words in _lines(root / "proc/net/route"):
        if words[0] == "Iface":
            continue
        interface, network, flags, metric, mask = words[0], words[1], int(words[3], 16), int(words[6]), words[7]
        if flags & _UP and not flags & _REJECTS:
            size = int(mask, 16).bit_count()
            yield ipaddress.IPv4Network((int(network, 16).to_bytes(4, sys.byteorder), size)), metric, interface


def _routes_6(root: Path) -> Iterator[_Route]:
    """Yield the routes of /proc/net/ipv6_route (addresses in network order)."""
    for words in _lines(root / "proc/net/ipv6_route"):
        network, size, metric, flags, interface = words[0], int(words[1], 16), int(words[5], 16), words[8], words[9]
        if int(flags, 16) & _UP and not int(flags, 16) & _REJECTS:
            yield ipaddress.IPv6Network((bytes.fromhex(network), size)), metric, interface


def own_address(sock: socket.socket) -> str:
    """Return the local address of a connected socket; empty when it is not connected any more."""
    try:
        return str(sock.getsockname()[0])
    except OSError:
        return ""
