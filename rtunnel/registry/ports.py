"""Allocates the ports of one PS IP: not leased elsewhere, free on the host, not in quarantine.

A freed port stays in quarantine here and in the registry, because a tuple that names it may still
be on its way to a gateway. Only the last owner may get the port back earlier: an old tuple then
still leads to the right agent.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import msgspec

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry.base import PortLease, Registry


class Bound(Protocol):
    """The result of `try_bind`: a socket, or another object that holds the port."""

    def close(self) -> None:
        """Close the socket, so that the port is free on the host."""


T = TypeVar("T", bound=Bound)
TryBind = Callable[[int], T]

# Seconds in which a port of another program, or one that another node leases, is not tried again: a
# try costs a round trip.
AVOID = 30.0
_FOREIGN = (errno.EADDRINUSE, errno.EACCES)  # EACCES: the port is privileged


class PortsExhausted(Exception):
    """No port is free; the text names the range and says why its ports are not free."""


class PortTaken(Exception):
    """The port that was requested is not available; the text says why."""


class PortCounts(msgspec.Struct, frozen=True):
    """The number of ports of the range in each state."""

    free: int
    in_use: int
    quarantined: int  # including ports that another node or an earlier run holds in the registry
    foreign: int  # in use by other programs


class _Bag:
    """A set of ports with `add`, `remove` and `take` (one at random) in O(1)."""

    def __init__(self, ports: range) -> None:
        self._ports = list(ports)
        self._place = {port: n for n, port in enumerate(self._ports)}

    def __len__(self) -> int:
        return len(self._ports)

    def add(self, port: int) -> None:
        self._place[port] = len(self._ports)
        self._ports.append(port)

    def remove(self, port: int) -> bool:
        n = self._place.pop(port, None)
        if n is None:
            return False
        last = self._ports.pop()
        if last != port:
            self._ports[n] = last
            self._place[last] = n
        return True

    def take(self, rng: random.Random, allows: Callable[[int], bool] | None = None) -> int | None:
        """Remove and return a random port, or None.

        `allows` filters the ports and makes it O(n).
        """
        ports = self._ports if allows is None else list(filter(allows, self._ports))
        if not ports:
            return None
        port = ports[rng.randrange(len(ports))]
        self.remove(port)
        return port


class _Resting:
    """Ports that cannot be allocated until their time has passed.

    All ports rest for the same period, so that a queue keeps them in order.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        # And the owner that may have it back earlier.
        self._until: dict[int, tuple[float, str]] = {}
        self._queue: deque[tuple[float, int]] = deque()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, port: int, owner: str, now: float) -> None:
        until = now + self._period
        self._until[port] = (until, owner)
        self._queue.append((until, port))

    def owner(self, port: int) -> str | None:
        entry = self._until.get(port)
        return None if entry is None else entry[1]

    def owners(self) -> dict[int, str]:
        return {port: owner for port, (_, owner) in self._until.items()}

    def remove(self, port: int) -> None:
        self._until.pop(port, None)

    def expired(self, now: float) -> Iterator[tuple[int, str]]:
        """Remove and yield the ports whose time has passed, with their owners."""
        while self._queue and self._queue[0][0] <= now:
            until, port = self._queue.popleft()
            entry = self._until.get(port)
            if entry is not None and entry[0] == until:  # else the port was added again later
                del self._until[port]
                yield port, entry[1]


class PortAllocator:
    """Allocates the ports `first` to `last` of `ip` for one broker node.

    Thread-safe; the registry and `try_bind` are called without holding the lock. `own` is the part
    of the range from which `allocate` chooses, when several nodes share one IP. `allocate_fixed`
    gives any port of the whole range. `quarantine` and `clock` are in seconds.
    """

    def __init__(
        self,
        registry: Registry,
        ip: str,
        first: int,
        last: int,
        quarantine: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        own: tuple[int, int] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 < first <= last < 65536:
            raise ValueError(f"port range {first}-{last} must lie within 1-65535, the smaller number first")
        self.ip = ip
        self.ports = range(first, last + 1)
        self.own = self.ports if own is None else range(own[0], own[1] + 1)
        self._registry = registry
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads ports, hides nothing
        self._lock = threading.Lock()
        # Each port of `own` is in exactly one of these; other ports only after they were requested.
        self._free = _Bag(self.own)
        self._used: dict[int, PortLease] = {}
        self._quarantined = _Resting(quarantine)
        self._elsewhere = _Resting(AVOID)
        self._foreign = _Resting(AVOID)
        self._owned: dict[str, int] = {}  # owner -> the port that rests here for it

    def counts(self) -> PortCounts:
        with self._lock:
            self._wake()
            resting = len(self._quarantined) + len(self._elsewhere)
            return PortCounts(len(self._free), len(self._used), resting, len(self._foreign))

    def held(self, prefix: str) -> dict[int, str]:
        """Return owners that begin with `prefix`, by port: in use or in quarantine here."""
        with self._lock:
            self._wake()
            used = {port: lease.owner for port, lease in self._used.items()}
            return {p: owner for p, owner in (used | self._quarantined.owners()).items() if owner.startswith(prefix)}

    def allocate(
        self, owner: str, epoch: int, node: str, try_bind: TryBind[T], allows: Callable[[int], bool] | None = None
    ) -> tuple[int, T, PortLease]:
        """Return a port for this owner, the result of `try_bind(port)`, and the lease.

        Prefers the port that the owner had last. `allows` filters the ports. Raises PortsExhausted,
        RegistryUnavailable, Superseded, and any OSError of `try_bind` other than "in use". While
        the registry is unreachable, an owner still gets back a port that rests *here* for it.
        """
        for port, resting in self._candidates(owner, node, allows):
            lease = PortLease(self.ip, port, owner, node, epoch)
            try:
                return port, self._secure(lease, try_bind, resting), lease
            except PortTaken:
                continue
        counts = self.counts()
        raise PortsExhausted(
            f"no port of {self.ip} in {self.own[0]}-{self.own[-1]} is free: {counts.in_use} in use, "
            f"{counts.quarantined} in quarantine, {counts.foreign} taken by other programs; "
            "widen the port range, or wait for the quarantine to end"
        )

    def allocate_fixed(
        self, port: int, owner: str, epoch: int, node: str, try_bind: TryBind[T]
    ) -> tuple[int, T, PortLease]:
        """Return the requested port as `allocate` does.

        Raises PortTaken when it is not available.
        """
        resting = self._claim(port, owner)
        lease = PortLease(self.ip, port, owner, node, epoch)
        return port, self._secure(lease, try_bind, resting), lease

    def release(self, lease: PortLease) -> None:
        """Put a port into quarantine, after its socket was closed.

        When the registry is unreachable, the port rests here, and there until its lease expires.
        """
        if self.rest(lease):
            try:
                self._registry.release_port(lease)
            except RegistryUnavailable:
                pass

    def rest(self, lease: PortLease) -> bool:
        """Put a port into quarantine here only: `unregister` tells the registry.

        False: not in use.
        """
        with self._lock:
            if self._used.get(lease.port) != lease:
                return False
            del self._used[lease.port]
            self._quarantined.add(lease.port, lease.owner, self._clock())
            self._owned[lease.owner] = lease.port
            return True

    # ------------------------------------------------------------------ inside

    def _candidates(self, owner: str, node: str, allows: Callable[[int], bool] | None) -> Iterator[tuple[int, bool]]:
        """Yield ports to try, marked as in use, each with whether it rested here for this owner."""
        port = self._preferred(owner, node)
        if port is not None and (allows is None or allows(port)):
            try:
                yield port, self._claim(port, owner)
            except PortTaken:
                pass
        while True:
            with self._lock:
                self._wake()
                port = self._free.take(self._rng, allows)
                if port is None:
                    return
                self._mark(port, owner)
            yield port, False

    def _preferred(self, owner: str, node: str) -> int | None:
        with self._lock:
            self._wake()
            port = self._owned.get(owner)
        if port is None:
            port = self._registry.last_port(node, owner)
        return port if port is not None and port in self.own else None

    def _claim(self, port: int, owner: str) -> bool:
        """Mark this port as in use for `owner`. Return whether it rested here for that owner."""
        with self._lock:
            self._wake()
            if port not in self.ports:
                raise PortTaken(f"port {port} is outside of {self.ports[0]}-{self.ports[-1]}")
            if port in self._used:
                raise PortTaken(f"port {port} of {self.ip} is in use for {self._used[port].owner or 'an agent'}")
            resting = self._quarantined.owner(port)
            if resting is not None and resting != owner:
                raise PortTaken(f"port {port} of {self.ip} is in quarantine after {resting}")
            self._free.remove(port)
            self._elsewhere.remove(port)
            self._foreign.remove(port)
            self._quarantined.remove(port)
            self._mark(port, owner)
            return resting is not None

    def _mark(self, port: int, owner: str) -> None:
        if self._owned.get(owner) == port:
            del self._owned[owner]
        self._used[port] = PortLease(self.ip, port, owner, "", 0)  # until `_secure` has the lease

    def _secure(self, lease: PortLease, try_bind: TryBind[T], resting: bool) -> T:
        """Bind a port that is marked as in use, then lease it. A failure restores the port's state.

        The bind comes first because another node of this IP may use the port for the same owner,
        and only the host knows it. The registry always lets an owner take its own lease, and would
        take it from that node.
        """
        port = lease.port
        try:
            bound = try_bind(port)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _FOREIGN:
                self._set_aside(port, self._foreign)
                reason = f"is taken by another program or node of this host ({error.strerror})"
                raise PortTaken(f"port {port} of {self.ip} {reason}") from error
            self._unmark(port, lease.owner if resting else None)
            raise
        try:
            leased = self._lease(lease, resting)
        except BaseException:
            bound.close()
            self._unmark(port, lease.owner if resting else None)
            raise
        if not leased:
            bound.close()
            self._set_aside(port, self._elsewhere)
            raise PortTaken(f"port {port} of {self.ip} is leased or in quarantine in the registry for another agent")
        with self._lock:
            self._used[port] = lease
        return bound

    def _lease(self, lease: PortLease, resting: bool) -> bool:
        try:
            return self._registry.lease_port(lease)
        except RegistryUnavailable:
            # No other owner can have leased it: it rested here for this one. The next beat writes
            # it.
            if resting:
                return True
            raise

    def _unmark(self, port: int, resting_for: str | None) -> None:
        with self._lock:
            del self._used[port]
            if resting_for is None:
                self._set_free(port)
            else:
                self._quarantined.add(port, resting_for, self._clock())
                self._owned[resting_for] = port

    def _set_aside(self, port: int, where: _Resting) -> None:
        with self._lock:
            del self._used[port]
            where.add(port, "", self._clock())

    def _set_free(self, port: int) -> None:
        if port in self.own:
            self._free.add(port)

    def _wake(self) -> None:
        """Mark the ports whose time has passed as free."""
        now = self._clock()
        for resting in (self._quarantined, self._elsewhere, self._foreign):
            for port, owner in resting.expired(now):
                self._set_free(port)
                if self._owned.get(owner) == port:
                    del self._owned[owner]
