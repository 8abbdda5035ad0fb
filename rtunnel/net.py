"""Listening sockets with the same options everywhere, the source of a peer's address, and what the
kernel knows of a connection.
"""

from __future__ import annotations

import ipaddress
import resource
import socket
import sys
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


def is_own(ip: str) -> bool:
    """Return whether this machine has an address, which is not a loopback one."""
    address = ipaddress.ip_address(ip)
    if address.is_loopback:
        return False
    try:
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind((ip, 0))
    except OSError:
        return False
    return True


#: Bytes of `struct tcp_info` (linux/tcp.h) until the end of `tcpi_backoff`, and of
#: `tcpi_rcv_ooopack`.
_TCP_BACKOFF: Final = 5
_TCP_UNORDERED: Final = 228


def resending(sock: socket.socket) -> int:
    """Return how often TCP has sent the oldest bytes again since the peer's last acknowledgement.

    0 when the peer acknowledges everything, and where the kernel does not tell.
    """
    info = _tcp_info(sock, _TCP_BACKOFF)
    return info[_TCP_BACKOFF - 1] if info else 0


def unordered(sock: socket.socket) -> int:
    """Return how many packets came before an earlier one, which was lost. 0 where the kernel does
    not tell.
    """
    info = _tcp_info(sock, _TCP_UNORDERED)
    return int.from_bytes(info[_TCP_UNORDERED - 4 :], sys.byteorder) if info else 0


def _tcp_info(sock: socket.socket, size: int) -> bytes:
    """Return the first bytes of TCP_INFO; empty where there are not so many."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except (OSError, AttributeError):
        return b""
    return info if len(info) == size else b""
