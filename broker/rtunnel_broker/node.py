"""One broker node: it listens, keeps sessions, and drains. trio's side; the relay carries the
bytes.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

import trio

import rtunnel
from rtunnel.bridge import Bridge
from rtunnel.clock import ClockWatch
from rtunnel.config import (
    BrokerConfig,
    Config,
    ConfigError,
    Problem,
    default_address,
    format_endpoint,
    host_name,
    parse_endpoint,
)
from rtunnel.logs import get_logger
from rtunnel.net import bound_socket, descriptors, listen
from rtunnel.registry import NodeFacts, NodeRecord, Registry
from rtunnel.registry.history import MAX_SENTENCE
from rtunnel.registry.ports import PortCounts as RangeCounts
from rtunnel.relay.join import Ending
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Relay
from rtunnel.trust.keys import DialKeys, load_cluster_keys, load_tokens
from rtunnel.wire.refusal import Refusal
from rtunnel_broker.admit import Admission
from rtunnel_broker.duplicates import MAX_RECORDED
from rtunnel_broker.linkport import LinkPort
from rtunnel_broker.log import NodeLog
from rtunnel_broker.notes import Notes
from rtunnel_broker.ports import FIRST_BYTES, DialChecker, PortCounts
from rtunnel_broker.presence import Presence
from rtunnel_broker.registrar import Registrar
from rtunnel_broker.session import Session
from rtunnel_broker.trust import BrokerTrust

#: Seconds between two looks for connections to guarded ports without a byte.
SWEEP_SECONDS: Final = 1.0
#: Sessions of which a trace tells how many are silent: enough to tell one host from all of them.
MAX_SEEN: Final = 1000
#: Seconds without a byte, above those of a link that lives: an agent looks every 5 s, and pings
#: after 3.5 s.
SILENT_SECONDS: Final = 9.0


class Node:
    """One broker node, and the keeper of its sessions (`SessionKeeper`)."""

    def __init__(self, config: Config, registry: Registry) -> None:
        broker = config.broker
        self.config: BrokerConfig = broker
        self.node = broker.node_id or host_name()
        self.host = broker.host or host_name()
        self.ip = broker.advertise_ip or default_address()
        if not self.ip:
            reason = "this host has no default route, so its address is not known"
            fix = "write the address at which gateways reach this node's ports"
            raise ConfigError([Problem("", "broker.advertise_ip", reason, fix)])
        self.handshake_timeout = broker.handshake_timeout
        self.tokens: Mapping[str, bytes] = load_tokens(broker.join_token) if broker.join_token else {}
        self.draining = False
        self.started = time.time()
        self.counts = PortCounts(broker.max_handshakes)
        self.session_refusals: Counter[str] = Counter()  # refused sessions, by code
        self.session_endings: Counter[str] = Counter()  # of welcomed sessions, by cause
        self._admission = Admission(broker.admit)
        self.relay = Relay(self._report, f"relay-{self.node}", memory=broker.stream_memory << 20)
        self.bridge = Bridge(self.relay)
        log = get_logger("broker").bind()
        self.log = NodeLog(log, self.node, self.relay.loop)
        self.notes = Notes(self.node)
        dial_keys = DialKeys(load_cluster_keys(broker.cluster_key))
        self.clock = ClockWatch("this broker", self._report, lambda: self.presence.clock_offset)
        self.trust = BrokerTrust(self, broker, log)
        checker = DialChecker(self.node, dial_keys, broker.dial_window, self.trust.is_revoked, self.clock)
        self._registrar = Registrar(self, registry, config.registry.quarantine, checker, log)
        self.presence: Presence = Presence(registry, config.registry, self.bridge, self._registrar, self.log, self)
        self.sessions = self._registrar.sessions  # those in the registry, by owner
        self.duplicates = self._registrar.duplicates  # refused second hosts of an agent_id
        self.links = LinkPort(self.relay, broker, self.trust, self.log, self.session_refusals)

    # Calls from sessions and the relay, in the relay's thread.

    def wants(self, session: Session) -> None:
        self.links.handshake_over(session)
        if session.identity is not None:
            self.trust.add(session)
        if not self._admits(session):
            return
        if len(self.sessions) >= self.config.max_sessions and session.owner not in self.sessions:
            session.refuse(Refusal.OVERLOADED, f"this broker holds {len(self.sessions)} sessions, its limit")
        else:
            self.bridge.spawn(self._registrar.register, session)

    def lost(self, session: Session, lost: Lost) -> None:
        self.trust.discard(session)
        if session.welcomed and session.hello is not None:
            cause = session.way_out or lost.kind.value
            self.session_endings[cause] += 1
            self.notes.departed(
                session.hello, session.addresses, peer=session.peer, epoch=session.epoch, cause=cause, text=lost.detail,
            )  # fmt: skip
        for listener in session.listeners:
            self.relay.unlisten(listener)
        session.listeners.clear()
        if session.place is not None:
            self.links.handshake_over(session)
            if lost.kind not in (LostKind.REFUSED, LostKind.ANSWERED):
                self.links.count_lost(session, lost)
        else:
            self.bridge.spawn(self._registrar.unregister, session)

    def silent_sessions(self) -> tuple[int, int]:
        seen = list(self.sessions.values())[:MAX_SEEN]
        return len(seen), sum(session.link is not None and session.link.silence > SILENT_SECONDS for session in seen)

    def updated(self, session: Session) -> None:
        self._admits(session)

    def _admits(self, session: Session) -> bool:
        """Give the session the rule of broker.admit for its present addresses, or refuse it."""
        assert session.hello is not None
        rule = self._admission.rule(session.hello.namespace, session.addresses)
        if rule is None:
            text = f"no rule of broker.admit is for {session.owner} with the addresses that it has now"
            session.refuse(Refusal.NOT_AUTHORISED, text)
            return False
        session.rule = rule
        return True

    def refused(self, session: Session, code: Refusal, text: str) -> None:
        self.session_refusals[code.value] += 1
        if session.hello is not None:
            self.notes.refused(
                code, text, namespace=session.hello.namespace, agent_id=session.hello.agent_id,
                addresses=session.addresses or session.hello.addresses, peer=session.peer, proved=session.place is None,
            )  # fmt: skip

    def _report(self, event: str, fields: dict[str, object]) -> None:
        self.log.report(event, fields)

    def _listen(self, sock: socket.socket) -> None:
        self.links.listen(sock, lambda binding, source: Session(self, binding=binding, source=source))
        self.relay.loop.after(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Reset connections to guarded ports that have sent no byte within FIRST_BYTES."""
        loop = self.relay.loop
        for connection in self.counts.dials.silent(loop.now - FIRST_BYTES):
            connection.expel(Lost(LostKind.DEADLINE, f"deadline: nothing was said within {FIRST_BYTES:.0f} s"))
        loop.after(SWEEP_SECONDS, self._sweep)

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then drain. Calls `started` when links are accepted.

        Raises Superseded when another process takes the node_id.
        """
        async with self.bridge.running():
            # The VIP must not lead agents to a node that can't serve: it listens only once it has
            # its incarnation.
            shared = self.config.workers > 1
            sock = bound_socket(*parse_endpoint(self.config.listen), key="broker.listen", shared=shared)
            try:
                joined = await self.presence.join(stop)
            except BaseException:
                sock.close()
                raise
            if not joined:
                sock.close()
                return
            listen(sock, key="broker.listen")
            await self.bridge.run(lambda: self._listen(sock))
            async with self.bridge.open_nursery() as nursery:
                nursery.start_soon(self.presence.run)
                nursery.start_soon(self.trust.run)
                self.log.info(
                    "broker_started", listen=format_endpoint(*self.bound), ip=self.ip,
                    incarnation=self.presence.incarnation, security=self.config.security,
                )  # fmt: skip
                task_status.started(self)
                await stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()

    @property
    def bound(self) -> tuple[str, int]:
        """The address and port on which links are accepted."""
        assert self.links.listener is not None
        return self.links.listener.bound

    def record(self) -> NodeRecord:
        """Return the node's record for the registry."""
        return NodeRecord(
            node=self.node,
            host=self.host,
            ip=self.ip,
            incarnation=self.presence.incarnation,
            state="draining" if self.draining else "live",
            version=rtunnel.__version__,
            sessions=len(self.sessions),
            streams=self.counts.streams,
            started=self.started,
            duplicates=self.duplicates.current()[:MAX_RECORDED],
        )

    def facts(self, beat_seconds: float) -> NodeFacts:
        """Return what the node tells of itself after a heartbeat, which took so long.

        Any thread may call it.
        """
        guarded, open_ports = self._registrar.port_counts()
        used, limit = descriptors()
        return NodeFacts(
            node=self.node,
            host=self.host,
            ip=self.ip,
            version=rtunnel.__version__,
            sessions=len(self.sessions),
            port_range=self.config.port_range,
            ports_free=guarded.free,
            ports_used=guarded.in_use,
            ports_resting=guarded.quarantined,
            open_range=self.config.open_ports.own or self.config.open_ports.range,
            open_used=open_ports.in_use if open_ports is not None else 0,
            open_resting=open_ports.quarantined if open_ports is not None else 0,
            descriptors=used,
            descriptor_limit=limit,
            clock_offset=self.presence.clock_offset,
            beat_seconds=round(beat_seconds, 3),
            notes_dropped=self.notes.dropped,
            reasons=tuple(reason[:MAX_SENTENCE] for reason in self.reasons()),
        )

    def port_counts(self) -> dict[str, RangeCounts]:
        """Return the counts of each port range: "guarded", and "open" where there is one."""
        guarded, open_ports = self._registrar.port_counts()
        return {"guarded": guarded} | ({} if open_ports is None else {"open": open_ports})

    def reasons(self) -> list[str]:
        """Return why this node is not ready; empty when it is."""
        reasons = []
        if down := self.presence.down:
            reasons.append(f"registry: {down}")
        if wrong := self.clock.reason(time.monotonic()):
            reasons.append(wrong)
        if self.draining:
            reasons.append("draining")
        return reasons

    async def answered(self) -> None:
        await self.bridge.answered()

    async def _drain(self) -> None:
        """Tell agents and registry, wait for streams up to `broker.drain`, then end each session in
        order.
        """
        self.draining = True
        deadline = self.config.drain
        self.log.info("drain_started", sessions=len(self.sessions), streams=self.counts.streams, seconds=deadline)
        await self.bridge.run(self._start_drain)
        with trio.move_on_after(self.presence.heartbeat):
            await self.presence.beat()
        with trio.move_on_after(deadline):
            while self.sessions or self.counts.streams:
                await trio.sleep(0.05)
        cut = self.counts.streams  # they end with their links
        await self.bridge.run(self._end_sessions)
        await self.presence.leave()
        if cut:
            hint = f"they were longer than broker.drain ({deadline:g} s)"
            self.log.warning("broker_stopped", streams_cut=cut, hint=hint)
        else:
            self.log.info("broker_stopped", streams_cut=0)

    def _start_drain(self) -> None:
        if self.links.listener is not None:
            self.relay.unlisten(self.links.listener)
        for session in self.sessions.values():
            session.drain(self.config.drain)

    def _end_sessions(self) -> None:
        sessions = list(self.sessions.values())
        for session in sessions:
            session.cut(Ending.DRAINED)
        for pair in list(self.relay.pairs):  # of sessions that are not in the registry any more
            pair.abort(Ending.DRAINED)
        for session in sessions:
            session.leave("the broker stops")
