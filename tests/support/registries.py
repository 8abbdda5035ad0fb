"""Registries for the conformance suites: one store with several clients, and a broker node as the registry sees it."""

from __future__ import annotations

from typing import Any

import msgspec

from rtunnel.errors import AddressTaken
from rtunnel.registry import COUNTER_BITS, NodeRecord, PortLease, Registration, Registry, Tuple
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from support.redis_server import RedisServer


class Store:
    """Where registries keep things: opens clients of one store, and can lose everything in it."""

    def __init__(self, server: RedisServer | None) -> None:
        self.server = server
        self._opened: list[Registry] = []
        self._shared: dict[tuple[Any, ...], MemoryRegistry] = {}

    def open(self, ttl: float = 15.0, quarantine: float = 60.0, feed_length: int = 100_000) -> Registry:
        registry: Registry
        if self.server is None:
            key = (ttl, quarantine, feed_length)
            registry = self._shared.get(key) or MemoryRegistry(ttl, quarantine, feed_length=feed_length)
            self._shared[key] = registry
        else:
            registry = RedisRegistry(self.server.url, ttl=ttl, quarantine=quarantine, feed_length=feed_length)
            self._opened.append(registry)
        return registry

    def wipe(self) -> None:
        for memory in self._shared.values():
            memory.wipe()
        if self.server is not None:
            with self.server.client() as client:
                client.flushall()

    def close(self) -> None:
        for registry in self._opened:
            registry.close()


class Node:
    """A broker node as the registry sees it: makes epochs and sessions."""

    def __init__(self, registry: Registry, name: str = "broker-1", ip: str = "10.0.0.1") -> None:
        self.registry = registry
        record = NodeRecord(node=name, host="h", ip=ip, incarnation=0)
        incarnation = registry.start_node(record)
        self.record = msgspec.structs.replace(record, incarnation=incarnation)
        self._counter = 0

    @property
    def name(self) -> str:
        return self.record.node

    def epoch(self) -> int:
        self._counter += 1
        return self.record.incarnation << COUNTER_BITS | self._counter

    def session(
        self, agent_ip: str = "10.1.0.7", port: int = 20001, *, agent: str = "a", namespace: str = "default"
    ) -> Registration:
        epoch = self.epoch()
        entry = Tuple(namespace, agent_ip, 0, self.record.ip, port, self.name, epoch, agent)
        lease = PortLease(self.record.ip, port, f"{namespace}/{agent}", self.name, epoch)
        return Registration(epoch, (entry,), (lease,), exposes="22,9100")

    def start(self, *args: Any, **kwargs: Any) -> Registration:
        session = self.session(*args, **kwargs)
        assert self.registry.lease_port(session.leases[0])
        self.registry.register(session)
        return session

    def beat(self, *sessions: Registration) -> int:
        """How many tuples were put back; no session was lost."""
        beat = self.registry.beat(self.record, list(sessions))
        assert beat.lost == {}
        return beat.put_back

    def lost(self, *sessions: Registration) -> dict[int, AddressTaken]:
        """The sessions that a beat could not put back."""
        return self.registry.beat(self.record, list(sessions)).lost
