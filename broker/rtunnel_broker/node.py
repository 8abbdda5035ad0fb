"""A broker node: links come in and become sessions; heartbeats, drain. The relay carries the bytes."""

from __future__ import annotations

import socket
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

import trio

import rtunnel
from rtunnel.bridge import Bridge
from rtunnel.clock import ClockWatch, registry_offset
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
from rtunnel.errors import RegistryUnavailable, Superseded
from rtunnel.logs import Throttle, debugging, get_logger
from rtunnel.net import bound_socket, listen, source_of
from rtunnel.registry import Duplicate, NodeRecord, Registration, Registry
from rtunnel.relay.link import Link
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Listener, Relay
from rtunnel.strangers import SILENT_GRACE, Loss, Strangers, made_room
from rtunnel.trust.follower import TrustFollower
from rtunnel.trust.identity import TrustStore
from rtunnel.trust.keys import DialKeys, load_cluster_keys, load_tokens
from rtunnel.wire.messages import Enrol
from rtunnel.wire.refusal import Refusal
from rtunnel_broker.admit import Admission
from rtunnel_broker.duplicates import MAX_RECORDED
from rtunnel_broker.ports import FIRST_BYTES, DialChecker, PortCounts
from rtunnel_broker.registrar import Registrar
from rtunnel_broker.session import Session
from rtunnel_broker.trust import BrokerTrust

#: With so many handshakes in line the next links wait in the kernel's queue: there they cost no memory yet.
MAX_IN_LINE: Final = 64
#: So often connections that have said nothing are looked for.
SWEEP_SECONDS: Final = 1.0
#: Lines in ten seconds about peers that have proved nothing, for each event and cause: enough to see what is wrong.
STRANGERS_LINES: Final = 32


#: The registry's clock is asked for this often, so that it is known when a gateway's clock differs.
MEASURE_SECONDS: Final = 60.0


class Node:
    """One broker node. `run` is its life; `keeper` attributes are what sessions ask for."""

    def __init__(self, config: Config, registry: Registry) -> None:
        broker = config.broker
        self.config: BrokerConfig = broker
        self.heartbeat = config.registry.heartbeat
        self._registry_ttl = config.registry.ttl
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
        self.incarnation = 0
        self.started = time.time()
        self.counts = PortCounts(broker.max_handshakes)
        self._registry_fault: RegistryUnavailable | None = None  # of the last call; None: it was answered
        self.session_refusals: Counter[str] = Counter()  # by code word
        self._strangers: Strangers[Link] = Strangers(
            broker.max_handshakes, broker.source_handshakes, lambda link: not link.has_spoken
        )
        self._room_timer: Timer | None = None  # looks again for a link that can make room
        self.links_lost: Counter[str] = Counter()  # links that ended before they were proved or refused, by Loss
        self._throttle = Throttle()
        self.debugging = debugging()
        self._registry = registry
        self._beating = trio.Lock()
        self._log = get_logger("broker").bind()
        self._admission = Admission(broker.admit)
        self.relay = Relay(self.report, f"relay-{self.node}", memory=broker.stream_memory << 20)
        self.bridge = Bridge(self.relay)
        dial_keys = DialKeys(load_cluster_keys(broker.cluster_key))
        self._registry_offset: float | None = None  # this machine's clock minus the registry's
        self._measured_at = -MEASURE_SECONDS
        self.clock = ClockWatch("this broker", self.report, lambda: self._registry_offset)
        self._trust = BrokerTrust(self, broker, self._log)
        checker = DialChecker(self.node, dial_keys, broker.dial_window, self._trust.is_revoked, self.clock)
        self._registrar = Registrar(self, registry, config.registry.quarantine, checker, self._log)
        self._links: Listener | None = None

    # What sessions and the relay call, in the relay's thread.

    @property
    def trust_store(self) -> TrustStore | None:
        """See SessionKeeper."""
        return self._trust.trust_store

    @property
    def follower(self) -> TrustFollower | None:
        """What follows the authority; None: certificates are not taken."""
        return self._trust.follower

    @property
    def sessions(self) -> dict[str, Session]:
        """Those in the registry, by owner."""
        return self._registrar.sessions

    def wants(self, session: Session) -> None:
        """See SessionKeeper."""
        self._handshake_over(session)
        if session.identity is not None:
            self._trust.add(session)
        assert session.hello is not None
        rule = self._admission.rule(session.hello.namespace, session.addresses)
        if rule is None:
            text = f"no rule of broker.admit is for {session.owner} with its addresses"
            session.refuse(Refusal.NOT_AUTHORISED, text)
            return
        session.rule = rule
        if len(self.sessions) >= self.config.max_sessions and session.owner not in self.sessions:
            session.refuse(Refusal.OVERLOADED, f"this broker holds {len(self.sessions)} sessions, its limit")
        else:
            self.bridge.spawn(self._registrar.register, session)

    def enrols(self, session: Session, request: Enrol) -> None:
        """See SessionKeeper."""
        self._trust.enrols(session, request)

    def lost(self, session: Session, lost: Lost) -> None:
        """See SessionKeeper."""
        self._trust.discard(session)
        for listener in session.listeners:
            self.relay.unlisten(listener)
        session.listeners.clear()
        if session.place is not None:
            self._handshake_over(session)
            if lost.kind not in (LostKind.REFUSED, LostKind.ANSWERED):
                self._lost_stranger(session, lost)
        else:
            self.bridge.spawn(self._registrar.unregister, session, str(lost))

    def updated(self, session: Session) -> None:
        """See SessionKeeper."""
        assert session.hello is not None
        rule = self._admission.rule(session.hello.namespace, session.addresses)
        if rule is None:
            text = f"no rule of broker.admit is for {session.owner} with the addresses that it has now"
            session.refuse(Refusal.NOT_AUTHORISED, text)
            return
        session.rule = rule

    def refused(self, code: Refusal) -> None:
        """See SessionKeeper."""
        self.session_refusals[code.value] += 1

    def log(self, event: str, **fields: object) -> None:
        """See SessionKeeper."""
        self._log.info(event, node=self.node, **fields)

    def trace(self, event: str, **fields: object) -> None:
        """See SessionKeeper."""
        self._log.debug(event, node=self.node, **fields)

    def report(self, event: str, fields: dict[str, object]) -> None:
        """What the relay itself has to say: never good news."""
        self._log.error(event, node=self.node, **fields)

    @property
    def dial_tls(self) -> ssl.SSLContext | None:
        """See SessionKeeper."""
        return self._trust.presented.dials

    @property
    def handshakes(self) -> int:
        """Links that are not proven yet."""
        return len(self._strangers)

    def _handshake_over(self, session: Session) -> None:
        place, session.place = session.place, None
        if place is not None:
            place.release()
        if self._links is not None:
            self._links.release()

    def _listen(self, sock: socket.socket) -> None:
        self._links = self.relay.listen(sock, self._accept_link)
        self.relay.loop.after(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """End what was opened to a guarded port without a word."""
        loop = self.relay.loop
        for connection in self.counts.dials.silent(loop.now - FIRST_BYTES):
            connection.expel(Lost(LostKind.DEADLINE, f"deadline: nothing was said within {FIRST_BYTES:.0f} s"))
        loop.after(SWEEP_SECONDS, self._sweep)

    def _accept_link(self, sock: socket.socket, peer: str) -> None:
        source, now = source_of(peer), self.relay.loop.now
        strangers = self._strangers
        if not strangers.has_room(source):
            weakest = strangers.weakest(source, now)
            if weakest is None:
                sock.close()  # the listener can't wait for one source alone
                self.refused(Refusal.TOO_MANY_HANDSHAKES)
                self._warn("source_has_too_many_handshakes", limit=strangers.share, peer=peer)
                return
            weakest.abort(made_room("too many links prove nothing"))
        shown = self._trust.presented
        session = Session(self, binding=shown.binding, source=source)
        link = self.relay.link(
            sock, session, peer=peer, client=False, tls=shown.context, handshake_timeout=self.handshake_timeout
        )
        session.place = strangers.enter(source, link, now)
        self._hold_if_full(peer)

    def _hold_if_full(self, peer: str) -> None:
        """In a storm of agents the others wait in the kernel's queue. To turn them away costs nearly as much as to take
        them, and they come back: 5000 agents tried 16,000 times.
        """
        links, loop = self._links, self.relay.loop
        if links is None:
            return
        if self._strangers.full:
            self._warn("too_many_handshakes", limit=self.config.max_handshakes, peer=peer)
            self._hold_until_room()
        elif loop.line >= MAX_IN_LINE:
            links.hold()
            loop.enqueue_slow(links.release)

    def _hold_until_room(self) -> None:
        """Accept again when a place is free, or when somebody has been silent for long enough to make room."""
        links, loop = self._links, self.relay.loop
        if links is None or links.closed:
            return
        if not self._strangers.full or self._strangers.weakest("", loop.now) is not None:
            links.release()
            return
        links.hold()
        if self._room_timer is None:
            self._room_timer = loop.after(SILENT_GRACE, self._look_for_room)

    def _look_for_room(self) -> None:
        self._room_timer = None
        self._hold_until_room()

    def _lost_stranger(self, session: Session, lost: Lost) -> None:
        silent = session.link is not None and not session.link.has_spoken
        loss = Loss.of(lost.kind, silent=silent)
        self.links_lost[loss.value] += 1
        if loss is not Loss.PROBE:  # one each second of each VIP is told by the metric only
            self.log_stranger("link_lost", loss.value, peer=session.peer, reason=str(lost))

    def log_stranger(self, event: str, kind: str, **fields: object) -> None:
        """See SessionKeeper."""
        others = self._throttle.others(f"{event} {kind}", self.relay.loop.now, STRANGERS_LINES)
        if others is not None:
            self.log(event, **fields, **({"others_since": others} if others else {}))

    def _warn(self, event: str, **fields: object) -> None:
        """Log a warning that may be repeated without end: one line of it in ten seconds."""
        others = self._throttle.others(event, self.relay.loop.now)
        if others is not None:
            self._log.warning(event, node=self.node, **fields, others_since=others)

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
        """Started when links are accepted. Until `stop`; raises Superseded when another process takes the node_id."""
        async with self.bridge.running():
            # A node that can't serve yet must look so to the VIP: it listens only when it has its incarnation.
            shared = self.config.workers > 1
            sock = bound_socket(*parse_endpoint(self.config.listen), key="broker.listen", shared=shared)
            try:
                joined = await self._join_registry(stop)
            except BaseException:
                sock.close()
                raise
            if not joined:
                sock.close()
                return
            listen(sock, key="broker.listen")
            await self.bridge.run(lambda: self._listen(sock))
            async with self.bridge.open_nursery() as nursery:
                nursery.start_soon(self._heartbeats)
                nursery.start_soon(self._trust.run)
                self._log.info(
                    "broker_ready", node=self.node, listen=format_endpoint(*self.bound), ip=self.ip,
                    incarnation=self.incarnation, security=self.config.security,
                )  # fmt: skip
                task_status.started(self)
                await stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()

    @property
    def bound(self) -> tuple[str, int]:
        """Where links are accepted."""
        assert self._links is not None
        return self._links.bound

    def record(self) -> NodeRecord:
        """This node as the registry knows it."""
        return NodeRecord(
            node=self.node,
            host=self.host,
            ip=self.ip,
            incarnation=self.incarnation,
            state="draining" if self.draining else "live",
            version=rtunnel.__version__,
            sessions=len(self.sessions),
            streams=self.counts.streams,
            started=self.started,
            duplicates=self._registrar.duplicates.current()[:MAX_RECORDED],
        )

    @property
    def duplicates(self) -> tuple[Duplicate, ...]:
        """The second hosts that came with an agent_id lately, and were refused."""
        return self._registrar.duplicates.current()

    @property
    def certificate_ends(self) -> float:
        """Of the one that links and Dials are shown; seconds since 1970, 0 when it shows none."""
        return self._trust.presented.ends

    @property
    def registry_down(self) -> str:
        """Return why the registry does not serve this node; "" when it does."""
        if self._registry_fault is not None:
            return str(self._registry_fault)
        return "" if self.incarnation else "not contacted yet"

    def reasons(self) -> list[str]:
        """Why this node is not ready; empty when it is."""
        reasons = []
        if self.registry_down:
            reasons.append(f"registry: {self.registry_down}")
        if wrong := self.clock.reason(time.monotonic()):
            reasons.append(wrong)
        if self.draining:
            reasons.append("draining")
        return reasons

    async def answered(self) -> None:
        """See rtunnel.pulse.Part."""
        await self.bridge.answered()

    async def _join_registry(self, stop: trio.Event) -> bool:
        """The incarnation comes from the registry: without one this node can't fence, so it waits. False: stopped."""
        while not stop.is_set():
            try:
                self.incarnation = await self.bridge.registry(self._registry.start_node, self.record())
            except RegistryUnavailable as error:
                self._registry_is_down(error)
                with trio.move_on_after(min(1.0, self.heartbeat)):
                    await stop.wait()
            else:
                self._registry_fault = None
                return True
        return False

    async def _heartbeats(self) -> None:
        while True:
            await trio.sleep(self.heartbeat)
            await self.beat()

    async def beat(self) -> None:
        """Refresh everything in the registry; put back what is missing. Raises Superseded."""
        async with self._beating:
            await self._beat()

    async def _beat(self) -> None:
        registrations = self._registrar.registrations()
        left: list[Registration] = []
        self._registrar.left_during_beat = left
        try:
            beat = await self.bridge.registry(self._registry.beat, self.record(), registrations)
        except RegistryUnavailable as error:
            self._registry_is_down(error)
            self._registry_offset = None
            return
        except Superseded:
            self._log.error("node_superseded", node=self.node, reason="another broker started under this node_id")
            raise
        finally:
            self._registrar.left_during_beat = None
        if self._registry_fault is not None:
            self._log.info("registry_back", node=self.node, tuples_put_back=beat.put_back)
            self._registry_fault = None
        elif beat.put_back:
            self._log.warning("registry_had_lost_tuples", node=self.node, tuples_put_back=beat.put_back)
        if beat.lost:
            await self.bridge.run(lambda: self._registrar.end_lost(beat.lost))
        for registration in left:
            await self.bridge.registry_tries(self._registry.unregister, registration)
        for session in self._registrar.moved():
            self.bridge.spawn(self._registrar.republish, session)
        await self._measure_clock()

    async def _measure_clock(self) -> None:
        """Compare this clock with the registry's: seldom, and at each beat while Dials are refused as expired."""
        now = time.monotonic()
        if not self.clock.suspicious and now < self._measured_at + MEASURE_SECONDS:
            return
        self._measured_at = now
        nodes = await self.bridge.registry_tries(self._registry.nodes) or []
        self._registry_offset = registry_offset((node.beat for node in nodes), self._registry_ttl, time.time())

    def _registry_is_down(self, error: RegistryUnavailable) -> None:
        if self._registry_fault is None:
            self._log.error("registry_unavailable", node=self.node, reason=str(error))
        self._registry_fault = error

    async def _drain(self) -> None:
        """Tell everybody, give streams their time, then end every session in order."""
        self.draining = True
        deadline = self.config.drain
        self._log.info("draining", node=self.node, sessions=len(self.sessions), streams=self.counts.streams)
        await self.bridge.run(self._start_drain)
        with trio.move_on_after(self.heartbeat):
            await self.beat()
        with trio.move_on_after(deadline):
            while self.sessions or self.counts.streams:
                await trio.sleep(0.05)
        cut = self.counts.streams  # the links take them along
        await self.bridge.run(self._end_sessions)
        # One call for whatever is left: tuples out, ports into quarantine. Not beside a beat: that would bring it back.
        async with self._beating:
            await self.bridge.registry_tries(self._registry.stop_node, self.node, self.incarnation)
        self._log.info("broker_stopped", node=self.node, streams_cut=cut)

    def _start_drain(self) -> None:
        if self._links is not None:
            self.relay.unlisten(self._links)
        for session in self.sessions.values():
            session.drain(self.config.drain)

    def _end_sessions(self) -> None:
        for session in list(self.sessions.values()):
            session.leave("the broker stops")
