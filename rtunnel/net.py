"""Listening sockets, made alike everywhere."""

from __future__ import annotations

import socket
from typing import Final

from rtunnel.config import format_endpoint
from rtunnel.roles import ListenError

#: Connections that the kernel holds until they are accepted; net.core.somaxconn may cap it.
BACKLOG: Final = 4096


def listening_socket(host: str, port: int, *, key: str = "") -> socket.socket:
    """A listening TCP socket; `::` also takes IPv4.

    Raises ListenError when `key`, the configuration's name for this address, is given, else OSError.
    """
    try:
        return _listen(host, port)
    except OSError as error:
        if not key:
            raise
        raise ListenError(key, format_endpoint(host, port), error) from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
