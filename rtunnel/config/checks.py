"""Checks of one key: each takes a value, and returns its canonical form or raises BadValue."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from rtunnel.config.values import (
    HOST_NAME,
    LOOPBACK,
    BadValue,
    canonical_ip,
    format_endpoint,
    looks_like_ip,
    parse_endpoint,
    parse_exposes,
    parse_ports,
    parse_range,
    span,
    split_exposes,
)

#: Items that fit into one Hello (rtunnel/wire/messages.py).
MAX_ADDRESSES = 64
MAX_EXPOSES = 256

Check = Callable[[Any], Any]


def optional(check: Check) -> Check:
    """Return a check that accepts an empty value, or what `check` accepts."""
    return lambda value: value if value == "" else check(value)


def one_of(*words: str) -> Check:
    """Return a check that accepts one of these words."""

    def check(value: str) -> str:
        if value not in words:
            near = difflib.get_close_matches(value, words, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"use {' or '.join(words)}"
            raise BadValue(f"{value!r} is not one of {', '.join(words)}", meant)
        return value

    return check


def between(low: float, high: float) -> Check:
    """Return a check that accepts a finite number within these bounds."""

    def check(value: float) -> float:
        # Both comparisons are false for a nan.
        if not low <= value <= high:
            raise BadValue(f"{value} is out of bounds", f"use {low:.12g}..{high:.12g}")
        return value

    return check


def each(check: Check, at_most: int) -> Callable[[list[Any]], list[Any]]:
    """Return a check that accepts a list of up to `at_most` values that `check` accepts."""

    def check_all(values: list[Any]) -> list[Any]:
        if len(values) > at_most:
            raise BadValue(f"has {len(values)} entries", f"use at most {at_most}")
        return [check(value) for value in values]

    return check_all


def check_listen(text: str) -> str:
    """Return an address and port to listen on, in canonical form."""
    host, port = parse_endpoint(text)
    if not (":" in host or looks_like_ip(host)):
        raise BadValue(
            f"{host!r} is a name, and a socket listens on an address", f"write 127.0.0.1:{port} or 0.0.0.0:{port}"
        )
    return format_endpoint(host, port)


def check_remote(text: str) -> str:
    """Return a host and port to dial, in canonical form."""
    host, port = parse_endpoint(text)
    if port == 0:
        raise BadValue("port 0 can't be dialled", "use 1..65535")
    return format_endpoint(host, port)


def check_address(text: str) -> str:
    """Return the address of one host, in canonical form."""
    canonical = canonical_ip(text)
    address = ipaddress.ip_address(canonical)
    if address.is_unspecified or address.is_multicast:
        raise BadValue(f"{text!r} is not the address of one host", "use a unicast address, like 10.1.0.7")
    return canonical


def check_addresses(values: list[str]) -> list[str]:
    """Return the addresses of one agent, sorted and each once, as a Hello names them."""
    return list(dict.fromkeys(each(check_address, MAX_ADDRESSES)(values)))


def check_port_range(text: str) -> str:
    """Return a range of ports, as first and last."""
    return "{}-{}".format(*parse_range(text))


def check_expose(text: str) -> str:
    """Return one port or a range of ports, in canonical form."""
    return span(*parse_ports(text))


def check_exposes(values: list[str]) -> list[str]:
    """Return all exposed ports of one agent.

    No port may be both at its addresses and on loopback.
    """
    entries = each(_expose_or_loopback, MAX_EXPOSES)(values)
    direct, loopback = map(parse_exposes, split_exposes(entries))
    for low, high in loopback:
        for other_low, other_high in direct:
            if low <= other_high and other_low <= high:
                port = max(low, other_low)
                fix = f"leave it out of {span(other_low, other_high)}, or of {LOOPBACK}{span(low, high)}"
                raise BadValue(f"{port} is exposed twice, at the agent's addresses and on loopback", fix)
    return entries


def _expose_or_loopback(text: str) -> str:
    text = text.strip()
    if text.startswith(LOOPBACK):
        return LOOPBACK + check_expose(text.removeprefix(LOOPBACK))
    return check_expose(text)


def check_registry_url(text: str) -> str:
    """Return the URL of the registry. It may hold a password, which no message repeats."""
    try:
        url = urlsplit(text)
        _ = url.port if url.scheme in ("redis", "rediss") else None
    except ValueError:  # whose text may quote the password
        raise BadValue("is not a URL", "write / ? # @ : in a password as %2F %3F %23 %40 %3A") from None
    one_of("memory", "redis", "rediss", "unix", "redis+sentinel")(url.scheme or "(no scheme)")
    if url.scheme in ("redis", "rediss") and not url.hostname:
        raise BadValue("names no host", f"write it like {url.scheme}://10.0.0.5:6379/0")
    if url.scheme == "unix" and not url.path.strip("/"):
        raise BadValue("names no socket", "write it like unix:///run/redis.sock")
    if url.scheme == "redis+sentinel" and not (url.netloc.rpartition("@")[2] and url.path.strip("/")):
        raise BadValue(
            "needs sentinels and a service", "write it like redis+sentinel://10.0.0.5:26379,10.0.0.6:26379/mymaster/0"
        )
    return text


def check_server_name(text: str) -> str:
    """Return a host name or IP address that a certificate can carry."""
    if looks_like_ip(text) or ":" in text:
        return canonical_ip(text)
    if not HOST_NAME.fullmatch(text):
        raise BadValue(f"{text!r} is neither a host name nor an IP address")
    return text
