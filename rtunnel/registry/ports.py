"""Giving out the ports of one PS IP: leased in the registry, free on the host, out of quarantine.

A freed port rests for the quarantine, here and in the registry, because a tuple that names it may still be on its way
to a gateway. Only its last owner may have it back earlier: what an old tuple promised is then still so.
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
    """What `try_bind` returns: a socket."""

    def close(self) -> None:
        """Let the port go."""


T = TypeVar("T", bound=Bound)
TryBind = Callable[[int], T]

# A port that another program has, or another node leases, is not tried again for so long: a try costs a round trip.
AVOID = 30.0
_FOREIGN = (errno.EADDRINUSE, errno.EACCES)  # EACCES: a privileged port


class PortsExhausted(Exception):
    """No port is free; the text has the range and where its ports are."""


class PortTaken(Exception):
    """The very port that was asked for can't be had; the text says why."""


class PortCounts(msgspec.Struct, frozen=True):
    """Where the ports of the range are."""

    free: int
    in_use: int
    quarantined: int  # including those that another node or an earlier run holds in the registry
    foreign: int  # taken by other programs


class _Bag:
    """Ports to choose from: add, remove and take-at-random in O(1)."""

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
        """With `allows`, which is for the few, in O(n)."""
        ports = self._ports if allows is None else list(filter(allows, self._ports))
        if not ports:
            return None
        port = ports[rng.randrange(len(ports))]
        self.remove(port)
        return port


class _Resting:
    """Ports that nobody may have until their time, each for all the same period: a queue is in order by itself."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._until: dict[int, tuple[float, str]] = {}  # with the owner that may have it back
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

    def over(self, now: float) -> Iterator[tuple[int, str]]:
        """Take out those whose time is over, with their owners."""
        while self._queue and self._queue[0][0] <= now:
            until, port = self._queue.popleft()
            entry = self._until.get(port)
            if entry is not None and entry[0] == until:  # else it was given back and rests anew
                del self._until[port]
                yield port, entry[1]


class PortAllocator:
    """The ports first..last of `ip`, for one broker node. Thread-safe; registry and `try_bind` are called unlocked.

    `own`: what `allocate` chooses from, where the nodes of one IP share the range; `allocate_fixed` gives any of it.
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
        # Each port of our own is in exactly one of these; of the others those that were asked for.
        self._free = _Bag(self.own)
        self._used: dict[int, PortLease] = {}
        self._quarantined = _Resting(quarantine)
        self._elsewhere = _Resting(AVOID)
        self._foreign = _Resting(AVOID)
        self._owned: dict[str, int] = {}  # owner -> its resting port here

    def counts(self) -> PortCounts:
        with self._lock:
            self._wake()
            resting = len(self._quarantined) + len(self._elsewhere)
            return PortCounts(len(self._free), len(self._used), resting, len(self._foreign))

    def held(self, prefix: str) -> dict[int, str]:
        """Return the ports in use or in quarantine here, and their owners, where the owner begins with `prefix`."""
        with self._lock:
            self._wake()
            used = {port: lease.owner for port, lease in self._used.items()}
            return {p: owner for p, owner in (used | self._quarantined.owners()).items() if owner.startswith(prefix)}

    def allocate(
        self, owner: str, epoch: int, node: str, try_bind: TryBind[T], allows: Callable[[int], bool] | None = None
    ) -> tuple[int, T, PortLease]:
        """A port for this owner, its last one if that is possible, with what `try_bind(port)` returned for it.

        `allows`: one of these. Raises PortsExhausted, RegistryUnavailable, Superseded, and any OSError of `try_bind`
        other than "in use". With the registry out of reach the owner still gets back a port that rests *here* for it.
        """
        for port, resting in self._candidates(owner, node, allows):
            lease = PortLease(self.ip, port, owner, node, epoch)
            try:
                return port, self._secure(lease, try_bind, resting), lease
            except PortTaken:
                continue
        counts = self.counts()
        raise PortsExhausted(
            f"no free port of {self.ip} in {self.own[0]}-{self.own[-1]}: {counts.in_use} in use, "
            f"{counts.quarantined} in quarantine, {counts.foreign} taken by other programs"
        )

    def allocate_fixed(
        self, port: int, owner: str, epoch: int, node: str, try_bind: TryBind[T]
    ) -> tuple[int, T, PortLease]:
        """This very port, or PortTaken. Other errors as `allocate`."""
        resting = self._claim(port, owner)
        lease = PortLease(self.ip, port, owner, node, epoch)
        return port, self._secure(lease, try_bind, resting), lease

    def release(self, lease: PortLease) -> None:
        """Give a port back, after its socket was closed. With the registry out of reach it rests here all the same,
        and there until the lease runs out."""
        if self.rest(lease):
            try:
                self._registry.release_port(lease)
            except RegistryUnavailable:
                pass

    def rest(self, lease: PortLease) -> bool:
        """As `release` without a word to the registry: `unregister` has told it, or will. False: it was not in use."""
        with self._lock:
            if self._used.get(lease.port) != lease:
                return False
            del self._used[lease.port]
            self._quarantined.add(lease.port, lease.owner, self._clock())
            self._owned[lease.owner] = lease.port
            return True

    # ------------------------------------------------------------------ inside

    def _candidates(self, owner: str, node: str, allows: Callable[[int], bool] | None) -> Iterator[tuple[int, bool]]:
        """Ports to try, each marked as in use before it is yielded, and whether it rested here for this owner."""
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
        """Mark this port as in use if this owner may have it; whether it rested here for the owner."""
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
        self._used[port] = PortLease(self.ip, port, owner, "", 0)  # until the real one is there

    def _secure(self, lease: PortLease, try_bind: TryBind[T], resting: bool) -> T:
        """Bind a port that is marked as in use, then lease it. On any failure it is in its proper place again.

        In this order: another node of this IP may have it for the same owner, and only the host knows which one is
        alive. The registry, which never stands in an owner's way, would take the lease from it.
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
            # Nobody else can have got it: it rested here for this owner. The next beat puts the lease there.
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
        """Ports whose time is over are free again."""
        now = self._clock()
        for resting in (self._quarantined, self._elsewhere, self._foreign):
            for port, owner in resting.over(now):
                self._set_free(port)
                if self._owned.get(owner) == port:
                    del self._owned[owner]
