"""What a gateway can run out of by itself: descriptors, and source ports towards a broker.

Neither is the fault of a path. All of it belongs to the relay's thread.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Sequence
from typing import Final

from rtunnel.config import client_room
from rtunnel.relay.loop import Loop
from rtunnel.relay.relay import Listener

#: A held listener is looked at again after so many seconds: clients wait that much longer at most.
HOLD_SECONDS: Final = 0.1
#: That clients are held back is said once in so many seconds.
TELL_AGAIN: Final = 10.0

_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class Room:
    """Descriptors for clients. Without any, the next clients wait in the kernel's queue: to accept one that cannot be
    dialled for would only end it.
    """

    def __init__(self, loop: Loop, taken: Callable[[], int], warn: Callable[..., None]) -> None:
        """`taken`: how many clients and streams there are; `warn(event, **fields)` logs."""
        self._loop = loop
        self._taken = taken
        self._warn = warn
        self._told_at = -TELL_AGAIN
        self._held = False
        self.listener: Listener | None = None  # once it listens
        self.size = client_room(descriptor_limit())

    def check(self) -> None:
        """Another client was accepted."""
        if self._taken() >= self.size:
            self.hold()

    def hold(self) -> None:
        """Accept nobody for a moment, and then as soon as there is room."""
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
    """The addresses that connections to brokers come from, in turn: each has the kernel's range of ports of its own."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._of_v4 = [address for address in addresses if ":" not in address]
        self._of_v6 = [address for address in addresses if ":" in address]
        self._turn = 0

    def next(self, host: str) -> str:
        """The address to connect to `host` from; "" leaves it to the kernel."""
        addresses = self._of_v6 if ":" in host else self._of_v4
        if not addresses:
            return ""
        self._turn += 1
        return addresses[self._turn % len(addresses)]


def descriptor_limit() -> int:
    """How many descriptors this process may have now."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def shortage(code: int) -> str:
    """What a connect with this errno found missing: the metric's label."""
    return "descriptors" if code in _DESCRIPTORS else "source_ports"
