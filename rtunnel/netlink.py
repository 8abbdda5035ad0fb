"""Asks the kernel for interfaces, addresses and routes by rtnetlink (rtnetlink(7)).

/proc has no IPv4 addresses, /sys shows another namespace's interfaces in some containers, and
neither knows the rules that choose between routing tables.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

#: Seconds for one answer of the kernel, which takes microseconds.
_PATIENCE: Final = 2.0
#: Bytes that one read takes; the kernel sends up to 32 KiB at once.
_READ: Final = 65536
#: Messages of one answer that are read: a router with more routes gets a part of them.
MAX_MESSAGES: Final = 20_000

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg
_ADDRESS: Final = struct.Struct("=BBBBI")  # ifaddrmsg
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # rtmsg
_ATTRIBUTE: Final = struct.Struct("=HH")

_ERROR, _DONE = 2, 3
_NEW_LINK, _GET_LINK, _NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 16, 18, 20, 22, 24, 26
_REQUEST, _DUMP = 0x1, 0x300
_NAME, _MTU, _MASTER, _LINK_INFO, _KIND = 3, 4, 10, 18, 1
_OF_PEER, _LOCAL = 1, 2
_DESTINATION, _OUT = 1, 4
_MAIN_TABLE, _UNICAST, _LOCAL_TYPE = 254, 1, 2

_Message = tuple[int, bytes]

#: Interfaces of container engines and hypervisors, by prefix: every host has them with the same
#: addresses.
CONTAINERS: Final = ("docker", "br-", "podman", "cni", "virbr", "lxcbr", "lxdbr", "flannel", "cali", "veth")


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface of this machine."""

    name: str
    kind: str = ""  # as the kernel says: "bridge", "veth", "dummy"; empty for hardware
    addresses: tuple[str, ...] = ()  # with the size of the network: "10.1.0.7/24"
    mtu: int = 0
    #: Whether hardware is a port of this bridge, which then is the machine's own network.
    has_hardware: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One route of the main table."""

    network: str
    interface: str


def interfaces() -> tuple[Interface, ...]:
    """Return all interfaces with their addresses. Raises OSError."""
    links = {}
    for kind, body in _ask(_GET_LINK, b"\0" * 4, _DUMP):
        if kind == _NEW_LINK:
            (_, _, index, _, _), attributes = _LINK.unpack_from(body), _attributes(body[_LINK.size :])
            links[index] = attributes
    addresses: dict[int, list[str]] = {}
    for kind, body in _ask(_GET_ADDRESS, b"\0" * 4, _DUMP):
        if kind == _NEW_ADDRESS:
            (_, size, _, _, index), attributes = _ADDRESS.unpack_from(body), _attributes(body[_ADDRESS.size :])
            packed = attributes.get(_LOCAL) or attributes.get(_OF_PEER)
            if packed:
                addresses.setdefault(index, []).append(f"{ipaddress.ip_address(packed)}/{size}")
    kinds = {index: _kind_of(attributes) for index, attributes in links.items()}
    hardware = {_number(links[index].get(_MASTER)) for index, kind in kinds.items() if not kind}
    return tuple(
        Interface(
            _text(attributes.get(_NAME, b"")),
            kinds[index],
            tuple(addresses.get(index, ())),
            _number(attributes.get(_MTU)),
            index in hardware,
        )
        for index, attributes in links.items()
    )


def holder(interfaces: Sequence[Interface], ip: str) -> Interface | None:
    """Return the interface that has this address; that of the loopback network has all of it."""
    for interface in interfaces:
        for address in interface.addresses:
            own = ipaddress.ip_interface(address)
            if str(own.ip) == ip or (interface.name == "lo" and ipaddress.ip_address(ip) in own.network):
                return interface
    return None


def routes() -> tuple[Route, ...]:
    """Return the unicast routes of the main tables, IPv4 and IPv6. Raises OSError."""
    found = []
    for kind, body in _ask(_GET_ROUTE, b"\0" * _ROUTE.size, _DUMP):
        if kind != _NEW_ROUTE:
            continue
        family, size, _, _, table, _, _, type_, _ = _ROUTE.unpack_from(body)
        if table != _MAIN_TABLE or type_ != _UNICAST or family not in (socket.AF_INET, socket.AF_INET6):
            continue
        attributes = _attributes(body[_ROUTE.size :])
        packed = attributes.get(_DESTINATION, bytes(4 if family == socket.AF_INET else 16))
        network = ipaddress.ip_network((packed, size), strict=False)
        found.append(Route(str(network), _interface_name(_number(attributes.get(_OUT)))))
    return tuple(found)


def route_to(ip: str) -> tuple[str, bool]:
    """Return the interface that the kernel chooses for packets to an IP ("": no route), and whether
    the IP is this machine's own. All rules and tables count. Raises OSError.
    """
    packed = ipaddress.ip_address(ip).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    request = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
    request += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
    for kind, body in _ask(_GET_ROUTE, request, 0):
        if kind == _NEW_ROUTE:
            own = _ROUTE.unpack_from(body)[7] == _LOCAL_TYPE
            return _interface_name(_number(_attributes(body[_ROUTE.size :]).get(_OUT))), own
    return "", False


def _ask(kind: int, body: bytes, flags: int) -> Iterator[_Message]:
    """Send one request, and yield type and body of each message of the answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(_PATIENCE)
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)
        messages = 0
        while messages < MAX_MESSAGES:
            data = sock.recv(_READ)
            while len(data) >= _HEADER.size:
                length, type_, _, _, _ = _HEADER.unpack_from(data)
                if type_ in (_DONE, _ERROR):
                    return  # an error is "no route": the answer is empty
                yield type_, data[_HEADER.size : length]
                messages += 1
                data = data[_aligned(length) :]
            if not flags & _DUMP:
                return


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _kind_of(attributes: dict[int, bytes]) -> str:
    return _text(_attributes(attributes.get(_LINK_INFO, b"")).get(_KIND, b""))


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("ascii", "replace")


def _number(data: bytes | None) -> int:
    return int.from_bytes(data[:4], "little" if struct.pack("=H", 1) == b"\1\0" else "big") if data else 0


def _interface_name(index: int) -> str:
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return ""
