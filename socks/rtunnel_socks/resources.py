"""The resources that a gateway can run out of: descriptors, and source ports towards a broker.

A lack of them is no fault of a path. In the relay's thread.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Sequence
from typing import Final

from rtunnel.config import client_room
from rtunnel.relay.loop import Loop
from rtunnel.relay.relay import Listener

#: Seconds between two looks whether a held listener may accept again.
HOLD_SECONDS: Final = 0.1
#: Seconds between two log lines that say that clients are held back.
TELL_AGAIN: Final = 10.0

_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class Room:
    """The descriptors for clients. Without a free one, new clients wait in the kernel's queue.

    To accept a client for which no broker can be dialled would only end it.
    """

    def __init__(self, loop: Loop, taken: Callable[[], int], warn: Callable[..., None]) -> None:
        """`taken()` returns the number of clients and streams; `warn(event, **fields)` logs."""
        self._loop = loop
        self._taken = taken
        self._warn = warn
        self._told_at = -TELL_AGAIN
        self._held = False
        self.listener: Listener | None = None  # once it listens
        self.size = client_room(descriptor_limit())

    def check(self) -> None:
        """Hold the listener if the client that was accepted now has taken the last place."""
        if self._taken() >= self.size:
            self.hold()

    def hold(self) -> None:
        """Accept no client for HOLD_SECONDS, and then not before there is room."""
        if self._held or self.listener is None:
            return
        self._held = True
        self.listener.hold()
        self._loop.after(HOLD_SECONDS, self._look)
        if self._loop.now >= self._told_at + TELL_AGAIN:
            self._told_at = self._loop.now
            self._warn(
                "clients_held_back", clients=self._taken(), room=self.size, descriptors=descriptor_limit(),
                hint="no descriptors are left for more clients: raise LimitNOFILE, or start more gateways",
            )  # fmt: skip

    def _look(self) -> None:
        if self._taken() >= self.size:
            self._loop.after(HOLD_SECONDS, self._look)
            return
        self._held = False
        if self.listener is not None:
            self.listener.release()


class Sources:
    """The source addresses of connections to brokers, used in turn: each has a range of ports of
    its own.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._of_v4 = [address for address in addresses if ":" not in address]
        self._of_v6 = [address for address in addresses if ":" in address]
        self._turn = 0

    def next(self, host: str) -> str:
        """Return the source address for a connect to `host`; "": the kernel chooses."""
        addresses = self._of_v6 if ":" in host else self._of_v4
        if not addresses:
            return ""
        self._turn += 1
        return addresses[self._turn % len(addresses)]


def descriptor_limit() -> int:
    """Return how many descriptors this process may have (RLIMIT_NOFILE)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def shortage(code: int) -> str:
    """Return the metric's label for the resource that a connect with this errno lacked."""
    return "descriptors" if code in _DESCRIPTORS else "source_ports"
