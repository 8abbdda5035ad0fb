"""Parses values: ports, endpoints, addresses, networks, words.

A function raises ValueError if it can't.
"""

from __future__ import annotations

import ipaddress
import re
import reprlib
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Greatest number of characters of an id or a namespace.
MAX_WORD = 128
#: Greatest number of its bytes in UTF-8: a namespace and a node id stand in each Dial, whose body
#: has at most 1024 bytes.
MAX_WORD_BYTES = 256
#: Prefix of a port in `agent.exposes` whose service listens on loopback only.
LOOPBACK = "loopback:"

#: RFC 4291 section 2.5.5: IPv4 addresses inside IPv6.
_MAPPED = bytes(10) + b"\xff\xff"
_COMPATIBLE = bytes(12)

HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class BadValue(ValueError):
    """A value that cannot be used. The text is the reason; `fix` says what to write instead."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault or warning: the source of the value, the key, the reason, and what to do."""

    source: str
    key: str
    reason: str
    fix: str = ""

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.source, self.key) if part)
        return f"{where}: {self.reason}" + (f" ({self.fix})" if self.fix else "")


class ConfigError(Exception):
    """The configuration cannot be used.

    `problems` has all faults that were found; the text has one on each line.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return (host, port) of "host:port" or "[v6]:port". The address is canonical.

    Port 0 is allowed. Raises ValueError.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or "]" in port:
        raise BadValue(f"{text!r} is not host:port", "write it like 10.0.0.1:7000 or [fd00::1]:7000")
    number = parse_port(port, 0)
    if host.startswith("[") and host.endswith("]"):
        return canonical_ip(host[1:-1], 6), number
    if ":" in host:
        raise BadValue(f"{text!r} is ambiguous", f"write an IPv6 address in brackets: [{text}]:port")
    if looks_like_ip(host):
        return canonical_ip(host), number
    if not HOST_NAME.fullmatch(host):
        raise BadValue(f"{host!r} is neither an IP address nor a host name")
    return host.lower(), number


def format_endpoint(host: str, port: int) -> str:
    """Return "host:port" or "[v6]:port", the inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_range(text: str) -> tuple[int, int]:
    """Return (first, last) of "first-last", both inclusive, 1..65535. Raises ValueError."""
    first, dash, last = text.partition("-")
    if not dash:
        raise BadValue(f"{text!r} is not a range of ports", "write it like 20000-29999")
    low, high = parse_port(first.strip(), 1), parse_port(last.strip(), 1)
    if low > high:
        raise BadValue(f"{text!r} ends before it begins", f"write {high}-{low}")
    return low, high


def span(low: int, high: int) -> str:
    """Return "9100" or "8000-8100", the inverse of `parse_ports`."""
    return str(low) if low == high else f"{low}-{high}"


def slice_of(text: str, number: int, count: int) -> str:
    """Return part `number` (from 1) of `count` equal parts of a range.

    Together they are the range.
    """
    first, last = parse_range(text)
    size = last - first + 1
    return f"{first + size * (number - 1) // count}-{first + size * number // count - 1}"


def parse_exposes(items: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of "9100" and "8000-8100", sorted, with touching ones merged.

    Raises ValueError.
    """
    return _merged(map(parse_ports, items))


def split_exposes(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the entries of `agent.exposes` for the agent's addresses, and those for loopback."""
    loopback = [item.removeprefix(LOOPBACK) for item in items if item.startswith(LOOPBACK)]
    return [item for item in items if not item.startswith(LOOPBACK)], loopback


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def canonical_ip(text: str, version: int = 0) -> str:
    """Return the canonical text of an IP address: v6 compressed, v4-mapped v6 as v4, no scope.

    `version` 6: the text stood in brackets. Raises ValueError.
    """
    # The C library parses an address in 1 us. `ipaddress` takes 20 us, so that 64 addresses in the
    # Hello of an unknown peer would stall the thread.
    try:
        if ":" in text:
            return _spell_v6(socket.inet_pton(socket.AF_INET6, text))
        spelt = socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, text))
    except (OSError, ValueError):
        raise _no_address(text) from None
    if version == 6:
        raise BadValue(f"{text!r} in brackets is not an IPv6 address", "write an IPv4 address without brackets")
    return spelt


def _spell_v6(packed: bytes) -> str:
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    if packed.startswith(_COMPATIBLE) and packed[12:14] != b"\0\0":
        # RFC 5952 writes ::a01:7 here, the C library ::10.1.0.7.
        return f"::{int.from_bytes(packed[12:14], 'big'):x}:{int.from_bytes(packed[14:], 'big'):x}"
    return socket.inet_ntop(socket.AF_INET6, packed)


def _no_address(text: str) -> BadValue:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return BadValue(f"{text!r} is not an IP address")
    return BadValue(f"{text!r} has a scope, which no other host understands")


def check_word(text: str) -> str:
    """Return an id or namespace: 1 to 128 printable characters and at most 256 bytes, without space
    and '/'.

    Lease owners join the two with '/'. Raises ValueError.
    """
    if not 1 <= len(text) <= MAX_WORD:
        raise BadValue(f"{reprlib.repr(text)} is {len(text)} characters long", f"use 1 to {MAX_WORD}")
    if (size := len(text.encode(errors="replace"))) > MAX_WORD_BYTES:
        raise BadValue(f"{reprlib.repr(text)} is {size} bytes long in UTF-8", f"use at most {MAX_WORD_BYTES}")
    if not text.isprintable() or " " in text or "/" in text:
        raise BadValue(f"{text!r} has a space, a slash or a control character", "use letters, digits, '-', '_', '.'")
    return text


def check_network(text: str) -> str:
    """Return the canonical text of a network, or of one address as a network. Raises ValueError."""
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        pass
    try:
        wider = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise BadValue(f"{text!r} is not a network", "write it like 10.0.0.0/8") from None
    raise BadValue(f"{text!r} has bits set behind its mask", f"write {wider}")


def host_name() -> str:
    """Return the host's name, which is the default of several ids."""
    return socket.gethostname() or "localhost"


def default_address() -> str:
    """Return the source address of the default route, or "" without one. Sends no packet."""
    # Addresses for documentation. To connect a UDP socket only asks the kernel for the route.
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((probe, 9))
                address = str(sock.getsockname()[0])
        except OSError:
            continue
        if not ipaddress.ip_address(address).is_unspecified:
            return address
    return ""


def looks_like_ip(host: str) -> bool:
    """Return whether the last label has only digits, which no host name has (RFC 1123)."""
    return host.rstrip(".").rpartition(".")[2].isdigit()


def parse_port(text: str, least: int) -> int:
    """Return a port from `least` to 65535. Raises ValueError."""
    # isdecimal alone takes other scripts' digits, int() alone takes "+1" and "1_0".
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and least <= int(text) <= 65535):
        raise BadValue(f"{text!r} is not a port", f"use {least}..65535")
    return int(text)


def parse_ports(text: str) -> tuple[int, int]:
    """Return (first, last) of "9100" or "8000-8100". Raises ValueError."""
    text = text.strip()
    if "-" in text:
        return parse_range(text)
    port = parse_port(text, 1)
    return port, port
