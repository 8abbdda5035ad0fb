"""Finds the tuples of a target: in the route table, which follows the registry, or by a look into
the registry.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

import trio
from structlog.typing import FilteringBoundLogger

from rtunnel.bridge import Bridge
from rtunnel.clock import registry_offset
from rtunnel.config import RegistryConfig
from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import Registry, Tuple
from rtunnel.registry.history import unknown_target
from rtunnel.registry.routes import Mirror, RouteTable
from rtunnel.wire.messages import MAX_TEXT
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.dial import Target

#: Seconds for which a target that the registry does not know is not asked for again.
MISS_SECONDS: Final = 1.0
#: The most misses that are remembered, and the most questions that wait for the registry.
MAX_MISSES: Final = 4096
#: Seconds that one step of following waits for changes.
FOLLOW_WAIT: Final = 1.0
#: Seconds between two tries to follow a registry that can't be reached.
RETRY_SECONDS: Final = 0.5

_Key = tuple[str, str]  # namespace and IP


class Asker(Protocol):
    """A client that waits for a lookup. Its methods are called in the relay's thread."""

    def found(self, tuples: tuple[Tuple, ...]) -> None:
        """Take the tuples, at least one."""

    def failed(self, refused: Refused) -> None:
        """Hear that there is no tuple, or why there is no answer."""


class Resolver:
    """The tuples that this gateway knows. `follow` runs in trio's thread, lookups in
    the relay's.
    """

    def __init__(self, registry: Registry, config: RegistryConfig, bridge: Bridge, log: FilteringBoundLogger) -> None:
        # by then brokers have filled a wiped registry again
        self.table = RouteTable(grace=config.heartbeat + 1.0)
        self.down: Refused | None = None  # why the registry can't be reached; None when it can
        self._registry = registry
        self._ttl = config.ttl
        self._mirror = Mirror(registry, self.table, reconcile=config.reconcile)
        self._bridge = bridge
        self._log = log
        # when the table had the registry's state last (monotonic)
        self._followed: float | None = None
        self._silent = False  # no broker has a heartbeat, and it was logged
        # Targets without a tuple: until when they are not asked for again, and what is known.
        self._misses: dict[_Key, tuple[float, str]] = {}
        self._asking: dict[_Key, list[Asker]] = {}

    # In the relay's thread.

    def lookup(self, asker: Asker, target: Target) -> tuple[Tuple, ...]:
        """Return the target's tuples.

        When there are none, the `asker` is called later, after a look into the registry.
        """
        key = target.namespace, target.ip
        tuples = _guarded(self.table.lookup(*key))
        if tuples:
            return tuples
        loop = self._bridge.relay.loop
        until, text = self._misses.get(key, (0.0, ""))
        if until > loop.now:
            loop.soon(lambda: asker.failed(Refused(Refusal.UNKNOWN_TARGET, text)))
        elif refused := self._unaskable(key):
            loop.soon(lambda: asker.failed(refused))
        elif key in self._asking:
            self._asking[key].append(asker)
        else:
            self._asking[key] = [asker]
            self._bridge.spawn(self._ask, key)
        return ()

    def _unaskable(self, key: _Key) -> Refused | None:
        """Return why the registry is not asked: each question would time out, or it has enough to
        answer.
        """
        if self.down is not None:
            text = f"no tuple is known here for {key[1]}, and {self._staleness(self.down.text)}"
            return Refused(Refusal.REGISTRY_UNAVAILABLE, text)
        if silence := self.table.silence():
            return Refused(Refusal.REGISTRY_UNAVAILABLE, f"no tuple is known here for {key[1]}, and {silence}")
        if len(self._asking) >= MAX_MISSES and key not in self._asking:
            return Refused(Refusal.OVERLOADED, "too many questions wait for the registry")
        return None

    def _answer(self, key: _Key, tuples: tuple[Tuple, ...], refused: Refused | None) -> None:
        askers = self._asking.pop(key, [])
        if refused is not None and refused.code is Refusal.UNKNOWN_TARGET:
            if len(self._misses) >= MAX_MISSES:
                self._misses.clear()
            self._misses[key] = self._bridge.relay.loop.now + MISS_SECONDS, refused.text
        for asker in askers:
            if refused is not None:
                asker.failed(refused)
            else:
                asker.found(tuples)

    # In trio's thread.

    async def _ask(self, key: _Key) -> None:
        tuples: tuple[Tuple, ...] = ()
        refused: Refused | None = None
        try:
            tuples = _guarded(tuple(await self._bridge.registry(self._registry.lookup, *key)))
            if not tuples:
                refused = await self._unknown(*key)
        except RegistryUnavailable as error:
            text = f"no tuple is known here for {key[1]}, and {self._staleness(str(error))}"
            refused = Refused(Refusal.REGISTRY_UNAVAILABLE, text)
        self._bridge.relay.call(lambda: self._answer(key, tuples, refused))

    async def _unknown(self, namespace: str, ip: str) -> Refused:
        """Return the refusal of a target without a tuple, with what the registry remembers of it.

        Raises RegistryUnavailable.
        """
        history = await self._bridge.registry(self._registry.history, namespace, ip)
        elsewhere = [name for name in self.table.namespaces_with(ip) if name != namespace]
        known = [self._staleness(self.fault)] if self.fault else []
        text = unknown_target(
            ip,
            [*known, *history.sentences(self.table.nodes)],
            namespace=namespace,
            elsewhere=elsewhere,
            asker="this gateway serves",
        )
        return Refused(Refusal.UNKNOWN_TARGET, text[:MAX_TEXT])

    def _staleness(self, fault: str) -> str:
        """Return a sentence about the age of the route table, and why it is not newer."""
        age = self.age
        return f"this gateway's table {'was never filled' if age is None else f'is {age:.1f} s old'}: {fault}"

    async def follow(self) -> None:
        """Keep the route table up to date until cancelled, through any outage of the registry."""
        while True:
            try:
                await self._bridge.registry(self._mirror.follow_once, FOLLOW_WAIT if self._mirror.synced else 0.0)
            except RegistryUnavailable as error:
                if self.down is None:
                    self._log.error("registry_unavailable", reason=str(error), tuples_known=self.table.counts().tuples)
                self.down = Refused(Refusal.REGISTRY_UNAVAILABLE, str(error))
                await trio.sleep(RETRY_SECONDS)
                continue
            first, self._followed = self._followed is None, time.monotonic()
            self._report_silence()
            if first or self.down is not None:
                self._log.info("registry_followed", tuples=self.table.counts().tuples)
                self.down = None

    def _report_silence(self) -> None:
        """Log once that the brokers' heartbeats are gone, and once that they are back."""
        silence = self.table.silence()
        if bool(silence) != self._silent:
            self._silent = bool(silence)
            if silence:
                self._log.error("heartbeats_lost", reason=silence, tuples_known=self.table.counts().tuples)
            else:
                self._log.info("heartbeats_returned", nodes=sorted(self.table.nodes))

    # Readiness and status, in trio's thread.

    @property
    def not_ready(self) -> str:
        """Why nothing can be resolved yet; empty when it can.

        Later outages do not count: the table stays.
        """
        if self._mirror.synced:
            return ""
        return self.down.text if self.down is not None else "not contacted yet"

    @property
    def fault(self) -> str:
        """Return what keeps the route table from being true; "" when nothing does."""
        if self.down is not None:
            return self.down.text
        if self._followed is None:
            return "not contacted yet"
        return self.table.silence()

    @property
    def state(self) -> str:
        """Return "ok" or the fault."""
        return self.fault or "ok"

    @property
    def age(self) -> float | None:
        """Seconds since the route table was true to the registry; None before the first time."""
        return None if self._followed is None else round(time.monotonic() - self._followed, 1)

    def clock_offset(self) -> float | None:
        """Return this machine's clock minus the registry's, in seconds; None while the route table
        is not fresh.
        """
        followed = self._followed
        if followed is None or time.monotonic() - followed > self._ttl:
            return None
        return registry_offset((node.beat for node in self.table.nodes.values()), self._ttl, time.time())


def _guarded(tuples: tuple[Tuple, ...]) -> tuple[Tuple, ...]:
    """Return the tuples of guarded ports: a gateway sends Dials, which open ports do not
    understand.
    """
    for entry in tuples:
        if entry.agent_port:
            return tuple(entry for entry in tuples if not entry.agent_port)
    return tuples
