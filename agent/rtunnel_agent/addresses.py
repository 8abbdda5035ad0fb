"""Which addresses the agent answers for at present: those of its configuration that this host has."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Final

from rtunnel.config import ConfigError, Problem, default_address
from rtunnel.relay.relay import bind_address

#: errno of a bind that says for certain that the host does not have the address (or no IPv6 at all).
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def host_has(ip: str) -> bool:
    """Whether this host has the address; asks the kernel by a bind, which sends nothing and takes no port.

    A host that is out of descriptors gives no answer: then the address is taken to be there still. Where
    net.ipv4.ip_nonlocal_bind is set, the kernel says yes to all.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return bind_address(sock, ip) not in _NOT_HERE
    except OSError as error:
        return error.errno not in _NOT_HERE


class OwnAddresses:
    """See the module. Without `configured` addresses it is the one of the default route, whichever that is."""

    def __init__(
        self,
        configured: Sequence[str],
        *,
        has: Callable[[str], bool] | None = None,
        default: Callable[[], str] | None = None,
    ) -> None:
        """Raises ConfigError when no address is configured and there is no default route."""
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
        """Look again; whether `present` is another one now.

        A default address that is lost gives way to the new default address. While the host has it, it stays, although
        the default route may leave from another one.
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
        """Why the agent can answer for nothing; empty when it can."""
        if self.present:
            return ""
        fix = "add the address to an interface, or change agent.addresses"
        return f"this host has none of the agent's addresses ({', '.join(self.wanted)}): {fix}"
