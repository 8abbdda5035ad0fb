"""Keeps one node in the registry: its incarnation, its heartbeats, and tuples that were lost.

In trio's thread.
"""

from __future__ import annotations

import time
from typing import Protocol

import trio

from rtunnel.bridge import Bridge
from rtunnel.config import RegistryConfig
from rtunnel.errors import RegistryUnavailable, Superseded
from rtunnel.registry import NodeFacts, NodeRecord, Registration, Registry
from rtunnel_broker.log import NodeLog
from rtunnel_broker.notes import Notes
from rtunnel_broker.registrar import Registrar


class PresentNode(Protocol):
    """The node, as its presence sees it."""

    notes: Notes

    def record(self) -> NodeRecord:
        """Return the node as the registry is to know it now."""

    def facts(self, beat_seconds: float) -> NodeFacts:
        """Return what the node tells of itself after a heartbeat; for any thread."""


class Presence:
    """Keeps a node and its sessions in the registry."""

    def __init__(
        self,
        registry: Registry,
        config: RegistryConfig,
        bridge: Bridge,
        registrar: Registrar,
        log: NodeLog,
        node: PresentNode,
    ) -> None:
        self.heartbeat = config.heartbeat  # seconds
        self.incarnation = 0  # 0: the registry has not given one yet
        # seconds that this machine's clock is ahead of the registry's
        self.clock_offset: float | None = None
        self._registry = registry
        self._bridge = bridge
        self._registrar = registrar
        self._log = log
        self._node = node
        self._fault: RegistryUnavailable | None = None  # of the last call; None: it was answered
        self._beating = trio.Lock()
        self._complete_at: float | None = None  # end of the last complete beat (monotonic)
        self.tuples = 0  # that the last complete beat kept alive
        self.tuples_put_back = 0  # that beats found missing, since the start

    @property
    def down(self) -> str:
        """Why the registry does not serve this node; empty when it does."""
        if self._fault is not None:
            return str(self._fault)
        return "" if self.incarnation else "not contacted yet"

    @property
    def beat_age(self) -> float | None:
        """Seconds since the last complete heartbeat; None before the first one."""
        return None if self._complete_at is None else round(time.monotonic() - self._complete_at, 1)

    async def join(self, stop: trio.Event) -> bool:
        """Wait for an incarnation, without which this node can't fence. Return False when `stop`
        comes first.
        """
        while not stop.is_set():
            try:
                self.incarnation = await self._bridge.registry(self._registry.start_node, self._node.record())
            except RegistryUnavailable as error:
                self._is_down(error)
                with trio.move_on_after(min(1.0, self.heartbeat)):
                    await stop.wait()
            else:
                self._fault = None
                return True
        return False

    async def run(self) -> None:
        """Send heartbeats until cancelled. Raises Superseded when another process takes the
        node_id.
        """
        while True:
            await trio.sleep(self.heartbeat)
            await self.beat()

    async def beat(self) -> None:
        """Refresh everything in the registry, and put back what is missing. Raises Superseded."""
        async with self._beating:
            await self._beat()

    async def leave(self) -> None:
        """Take all tuples of this node out, and put its ports into quarantine.

        Never beside a heartbeat, which would bring them back.
        """
        async with self._beating:
            await self._bridge.registry_tries(self._report, 0.0)
            await self._bridge.registry_tries(self._registry.stop_node, self._node.record().node, self.incarnation)

    async def _beat(self) -> None:
        registrations = self._registrar.registrations()
        left: list[Registration] = []
        self._registrar.left_during_beat = left
        began = trio.current_time()
        try:
            beat = await self._bridge.registry(self._registry.beat, self._node.record(), registrations)
        except RegistryUnavailable as error:
            self._is_down(error)
            self.clock_offset = None
            return
        except Superseded:
            self._log.error("node_superseded", reason="another broker started under this node_id")
            raise
        finally:
            self._registrar.left_during_beat = None
        self._complete_at = time.monotonic()
        self.tuples = sum(len(registration.tuples) for registration in registrations)
        self.tuples_put_back += beat.put_back
        if self._fault is not None:
            self._log.info("registry_reached", tuples_put_back=beat.put_back)
            self._fault = None
        elif beat.put_back:
            self._log.warning("tuples_restored", tuples_put_back=beat.put_back)
        if beat.lost:
            await self._bridge.run(lambda: self._registrar.end_lost(beat.lost))
        for registration in left:
            await self._bridge.registry_tries(self._registry.unregister, registration)
        for session in self._registrar.moved():
            self._bridge.spawn(self._registrar.republish, session)
        await self._bridge.registry_tries(self._report, trio.current_time() - began)

    def _report(self, beat_seconds: float) -> None:
        """Write the node's facts and notes; on a worker thread. Raises RegistryUnavailable."""
        notes = self._node.notes.take()
        facts = self._node.facts(beat_seconds)
        before = time.time()
        try:
            now = self._registry.report(facts, notes)
        except BaseException:
            self._node.notes.put_back(notes)
            raise
        if not notes:  # then the report is one round trip
            self.clock_offset = round((before + time.time()) / 2 - now, 3)

    def _is_down(self, error: RegistryUnavailable) -> None:
        if self._fault is None:
            self._log.error("registry_unavailable", reason=str(error))
        self._fault = error
