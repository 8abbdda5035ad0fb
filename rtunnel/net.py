"""Listening sockets with the same options everywhere, and the source of a peer's address."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rtunnel.config import canonical_ip, format_endpoint
from rtunnel.errors import ListenError

#: Connections that the kernel holds until they are accepted; net.core.somaxconn may lower it.
BACKLOG: Final = 4096


def listening_socket(host: str, port: int, *, key: str = "", shared: bool = False) -> socket.socket:
    """Return a listening TCP socket; `::` also takes IPv4.

    `shared`: other workers' sockets may use the same port. Raises ListenError when `key`, the
    configuration's name for the address, is given, else OSError.
    """
    sock = bound_socket(host, port, key=key, shared=shared)
    with _name_errors(host, port, key, sock):
        sock.listen(BACKLOG)
    return sock


def bound_socket(host: str, port: int, *, key: str = "", shared: bool = False) -> socket.socket:
    """Return a bound TCP socket that does not listen yet, for `listen`.

    The address is known to be usable, and no client can connect yet.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _name_errors(host, port, key):
        sock = socket.socket(family, socket.SOCK_STREAM)
    with _name_errors(host, port, key, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Only when needed: a second process, started by mistake, would get a share of the clients.
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
    return sock


def listen(sock: socket.socket, *, key: str) -> None:
    """Let a `bound_socket` accept connections. Raises ListenError, and then has closed it."""
    host, port = sock.getsockname()[:2]
    with _name_errors(host, port, key, sock):
        sock.listen(BACKLOG)


@contextmanager
def _name_errors(host: str, port: int, key: str, *socks: socket.socket) -> Iterator[None]:
    """Close the socket on an error, and raise ListenError with the key's name."""
    try:
        yield
    except OSError as error:
        for sock in socks:
            sock.close()
        if not key:
            raise
        raise ListenError(key, format_endpoint(host, port), error) from error


def source_of(peer: str) -> str:
    """Return the source that an address counts for: itself, or the /64 of an IPv6 address.

    A holder of one IPv6 address usually has its whole /64.
    """
    if ":" in peer:
        peer = canonical_ip(peer.partition("%")[0])
    if ":" not in peer:
        return peer
    return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, peer)[:8] + bytes(8)) + "/64"


def descriptors() -> tuple[int, int]:
    """Return how many descriptors this process has open, and how many it may have."""
    own, limit = Path("/proc/self/fd"), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        # From Linux 6.2 on the size is the number of entries; before, it is 0.
        return own.stat().st_size or sum(1 for _ in own.iterdir()), limit
    except OSError:  # no /proc in this container
        return 0, limit
