"""Finds which of the agent's configured addresses this host has at present."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Final

from rtunnel.config import ConfigError, Problem, default_address
from rtunnel.relay.relay import bind_address

#: Values of errno by which a bind says that the host does not have the address (or no IPv6 at all).
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def host_has(ip: str) -> bool:
    """Return whether this host has the address, by a bind(2) that sends nothing and takes no port.

    True when the host is out of descriptors and can't say, and always where
    net.ipv4.ip_nonlocal_bind is set.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return bind_address(sock, ip) not in _NOT_HERE
    except OSError as error:
        return error.errno not in _NOT_HERE


class OwnAddresses:
    """The addresses of one agent: the configured ones, or the one of the default route."""

    def __init__(
        self,
        configured: Sequence[str],
        *,
        has: Callable[[str], bool] | None = None,
        default: Callable[[], str] | None = None,
    ) -> None:
        """Look once. Raises ConfigError when no address is configured and no default route is
        there.
        """
        self._configured = bool(configured)
        self._has = has or host_has
        self._default = default or default_address
        self.wanted = tuple(configured) or (self._first_default(),)
        self.present: tuple[str, ...] = ()
        self.look()

    def _first_default(self) -> str:
        address = self._default()
        if not address:
            reason = "this host has no default route, so its address is not known"
            fix = "write the address at which clients know this host"
            raise ConfigError([Problem("", "agent.addresses", reason, fix)])
        return address

    def look(self) -> bool:
        """Look again; return whether `present` has changed.

        A default address stays while the host has it, also when the default route changes. When the
        host loses it, the new default address takes its place.
        """
        before = self.present
        self.present = tuple(address for address in self.wanted if self._has(address))
        if not self.present and not self._configured and (new := self._default()):
            self.wanted = self.present = (new,)
        return self.present != before

    @property
    def lost(self) -> tuple[str, ...]:
        """The wanted addresses that this host does not have."""
        return tuple(address for address in self.wanted if address not in self.present)

    @property
    def missing(self) -> str:
        """Why the agent has no address to answer for, as a sentence; empty when it has one."""
        if self.present:
            return ""
        fix = "add the address to an interface, or change agent.addresses"
        return f"this host has none of the agent's addresses ({', '.join(self.wanted)}): {fix}"
