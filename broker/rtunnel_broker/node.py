"""A broker node: sessions come and go, their ports and tuples with them. trio's side; the relay does the rest."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, TypeVar

import trio

import rtunnel
from rtunnel.anchor import Anchor
from rtunnel.bridge import Bridge, running
from rtunnel.config import (
    BrokerConfig,
    Config,
    default_address,
    format_endpoint,
    host_name,
    parse_endpoint,
    parse_range,
)
from rtunnel.logs import get_logger
from rtunnel.net import bound_socket, listen, listening_socket, source_of
from rtunnel.registry import (
    COUNTER_BITS,
    AddressTaken,
    NodeRecord,
    PortLease,
    Registration,
    Registry,
    RegistryUnavailable,
    Superseded,
    Tuple,
)
from rtunnel.registry.ports import PortAllocator, PortsExhausted, PortTaken
from rtunnel.relay.relay import Listener, Relay
from rtunnel.trust.certificates import DAY
from rtunnel.trust.identity import Roots
from rtunnel.trust.keys import DialKeys, TrustError, load_cluster_keys, load_tokens
from rtunnel.trust.tls import certificate_der, certificate_fingerprint, days_left, dial_server_context, server_context
from rtunnel.watch import Watched, watch
from rtunnel.wire.messages import Bye, Drain, Enrol, OpenPort, Publish, Trust, Welcome
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_broker.admit import Admission
from rtunnel_broker.ports import DialChecker, Guarded, GuardedPort, Networks, OpenPortServer, PortCounts
from rtunnel_broker.session import Session

_T = TypeVar("_T")

#: With so many handshakes in line the next links wait in the kernel's queue: there they cost no memory yet.
MAX_IN_LINE: Final = 64
#: Requests for certificates under way to the authority.
MAX_ENROLLING: Final = 64
#: So many requests for certificates of one source may be refused close together, then one in so many seconds: each is a
#: line in the authority's log.
REFUSED_AT_ONCE: Final = 20
REFUSED_SECONDS: Final = 0.5
#: Sources for which that is remembered.
MAX_REFUSED: Final = 4096
#: What is turned away or left to wait is told in one line for so long.
TELL_AGAIN: Final = 10.0
#: Agents that are told of new CAs before others get their turn, and the seconds between two turns.
TELLS_A_TURN: Final = 100
TELL_PAUSE: Final = 0.02
#: Of a turn, for sessions that are judged anew.
JUDGE_SECONDS: Final = 0.001


@dataclass(frozen=True)
class Shown:
    """What handshakes show of this broker: TLS contexts, and the fingerprint of its certificate."""

    context: ssl.SSLContext | None = None  # None: links are plain
    binding: bytes = b""
    dials: ssl.SSLContext | None = None  # of guarded ports; None: they are plain
    ends: float = 0.0  # of the certificate; 0: there is none


@dataclass(frozen=True)
class Leased:
    """A port that a session holds: the lease, and the socket that listens on it."""

    lease: PortLease
    sock: socket.socket


class Node:
    """One broker node. `run` is its life; `keeper` attributes are what sessions ask for."""

    def __init__(self, config: Config, registry: Registry) -> None:
        broker = config.broker
        self.config: BrokerConfig = broker
        self.heartbeat = config.registry.heartbeat
        self.node = broker.node_id or host_name()
        self.host = broker.host or host_name()
        self.ip = broker.advertise_ip or default_address()
        self.handshake_timeout = broker.handshake_timeout
        self.tokens: Mapping[str, bytes] = load_tokens(broker.join_token) if broker.join_token else {}
        self._bind_host, self._bind_port = parse_endpoint(broker.listen)
        self.draining = False
        self.incarnation = 0
        self.started = time.time()
        self.sessions: dict[str, Session] = {}  # by owner
        self.counts = PortCounts()
        self.registry_down: str = "not contacted yet"
        self.session_refusals: Counter[str] = Counter()  # by code word
        self.handshakes = 0  # links that are not proven yet,
        self._sources: dict[str, int] = {}  # and of which source they are
        self._told_at: dict[str, float] = {}
        self._registry = registry
        self._quarantine = config.registry.quarantine
        self._counter = count(1)
        self._owner_locks: dict[str, tuple[trio.Lock, int]] = {}
        self._left_during_beat: list[Registration] | None = None
        self._beating = trio.Lock()
        dial_keys = DialKeys(load_cluster_keys(broker.cluster_key))
        self._checker = DialChecker(self.node, dial_keys, broker.dial_window, self._is_revoked)
        self._log = get_logger("broker").bind()
        self._admission = Admission(broker.admit)
        self._certified: set[Session] = set()  # by certificate, from a good Hello on; the relay's thread has it
        self._enrolling = 0
        self._refused: dict[str, float] = {}  # sources; when nothing will be held against them any more
        self.anchor = self._anchor() if broker.ca else None
        self._generation = self.roots.generation if self.roots is not None else 0
        self._shown = self._load_shown()
        self._showing = trio.Lock()
        open_ports = broker.open_ports
        self._guarded = self._allocator(broker.port_range)
        self._open = self._allocator(open_ports.range, open_ports.own) if open_ports.range else None
        self._open_allow: Networks = tuple(ipaddress.ip_network(cidr) for cidr in open_ports.allow)
        self.relay = Relay(self.report, f"relay-{self.node}")
        self.bridge: Bridge
        self._links: Listener | None = None

    def _anchor(self) -> Anchor:
        async def apply(call: Callable[[], object]) -> object:
            return await self.bridge.run(call)

        broker = self.config
        trust = Path(broker.trust) if broker.trust else None
        return Anchor(
            ca=Path(broker.ca), trust=trust, authority=broker.authority, log=self._log, apply=apply,
            changed=self._trust_changed,
        )  # fmt: skip

    def _allocator(self, ports: str, own: str = "") -> PortAllocator:
        first, last = parse_range(ports)
        part = parse_range(own) if own else None
        return PortAllocator(self._registry, self.ip, first, last, quarantine=self._quarantine, own=part)

    # What sessions and the relay call, in the relay's thread.

    @property
    def roots(self) -> Roots | None:
        """See SessionKeeper."""
        return self.anchor.roots if self.anchor is not None else None

    def wants(self, session: Session) -> None:
        """See SessionKeeper."""
        self._handshake_over(session)
        if session.identity is not None:
            self._certified.add(session)
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
            self.bridge.spawn(self._register, session)

    def enrols(self, session: Session, request: Enrol) -> None:
        """See SessionKeeper."""
        if self.anchor is None or not self.config.authority:
            text = "this broker can't pass requests for certificates on (broker.authority)"
            session.refuse(Refusal.AUTHORITY_UNAVAILABLE, text)
        elif self._enrolling >= MAX_ENROLLING:
            session.refuse(Refusal.OVERLOADED, "too many requests for certificates are under way")
        elif self._refused_too_often(session.source):
            text = "requests for certificates from this address were refused too often: see the agents there"
            session.refuse(Refusal.RATE_LIMITED, text)
        else:
            self._enrolling += 1
            self.bridge.spawn(self._enrol, self.anchor, session, request)

    def _refused_too_often(self, source: str) -> bool:
        waits = self._refused.get(source, 0.0) - self.relay.loop.now
        return bool(self.config.source_handshakes) and waits > REFUSED_SECONDS * (REFUSED_AT_ONCE - 1)

    def _count_refused(self, source: str) -> None:
        now = self.relay.loop.now
        if len(self._refused) >= MAX_REFUSED:
            self._refused = {other: until for other, until in self._refused.items() if until > now}
        if len(self._refused) < MAX_REFUSED or source in self._refused:
            self._refused[source] = max(now, self._refused.get(source, 0.0)) + REFUSED_SECONDS

    def lost(self, session: Session, why: str) -> None:
        """See SessionKeeper."""
        self._certified.discard(session)
        for listener in session.listeners:
            self.relay.unlisten(listener)
        session.listeners.clear()
        if session.handshaking:
            self._handshake_over(session)
            if not session.answered:
                self.log("link_lost", peer=session.peer, reason=why)
        else:
            self.bridge.spawn(self._unregister, session, why)

    def updated(self, session: Session) -> None:
        """See SessionKeeper."""
        self.bridge.spawn(self._republish, session)

    def refused(self, code: Refusal) -> None:
        """See SessionKeeper."""
        self.session_refusals[code.value] += 1

    def log(self, event: str, **fields: object) -> None:
        """See SessionKeeper."""
        self._log.info(event, node=self.node, **fields)

    def _is_revoked(self, key: str) -> bool:
        """Of a gateway's key."""
        return self.roots is not None and f"gateway/{key}" in self.roots.revoked

    def _review(self) -> None:
        """Pairs of gateways whose key is revoked end."""
        self.relay.review(lambda pair: not (isinstance(pair.on_end, Guarded) and self._is_revoked(pair.on_end.key)))

    def report(self, event: str, fields: dict[str, object]) -> None:
        """What the relay itself has to say: never good news."""
        self._log.error(event, node=self.node, **fields)

    @property
    def dial_tls(self) -> ssl.SSLContext | None:
        """See SessionKeeper."""
        return self._shown.dials

    def _handshake_over(self, session: Session) -> None:
        session.handshaking = False
        self.handshakes -= 1
        if self._sources[session.source] == 1:
            del self._sources[session.source]
        else:
            self._sources[session.source] -= 1
        if self._links is not None:
            self._links.release()

    def _listen(self, sock: socket.socket) -> None:
        self._links = self.relay.listen(sock, self._accept_link)

    def _accept_link(self, sock: socket.socket, peer: str) -> None:
        source, limit = source_of(peer), self.config.source_handshakes
        share = self._sources.get(source, 0)
        if limit and share >= limit:
            sock.close()  # the listener can't wait for one source alone
            self.refused(Refusal.TOO_MANY_HANDSHAKES)
            self._warn("source_has_too_many_handshakes", limit=limit, peer=peer)
            return
        self._sources[source] = share + 1
        self.handshakes += 1
        shown = self._shown
        session = Session(self, binding=shown.binding, source=source)
        self.relay.link(
            sock, session, peer=peer, client=False, tls=shown.context, handshake_timeout=self.handshake_timeout
        )
        # In a storm of agents the others wait in the kernel's queue. To turn them away costs nearly as much as to take
        # them, and they come back: 5000 agents tried 16,000 times.
        if self.handshakes >= self.config.max_handshakes and self._links is not None:
            self._links.hold()
            self._warn("too_many_handshakes", limit=self.config.max_handshakes, peer=peer)
        elif self.relay.loop.line >= MAX_IN_LINE and self._links is not None:
            self._links.hold()
            self.relay.loop.in_line(self._links.release)

    def _warn(self, event: str, **fields: object) -> None:
        """What comes in floods: one line of it in ten seconds."""
        now = self.relay.loop.now
        if now >= self._told_at.get(event, -TELL_AGAIN) + TELL_AGAIN:
            self._told_at[event] = now
            self._log.warning(event, node=self.node, **fields)

    # Who is believed, and what is shown to links: both change while links stay.

    def _trust_changed(self) -> None:
        """In the relay's thread: there are other CAs, or revocations."""
        roots = self.roots
        assert roots is not None
        self._judge(list(self._certified), roots)
        self._review()
        self.bridge.spawn(self._show_other_cas)
        if roots.generation > self._generation:
            self._generation = roots.generation
            self._tell(list(self.sessions.values()), Trust(signed=roots.signed))

    def _judge(self, sessions: list[Session], roots: Roots) -> None:
        """First all of them lose what they have no right to; then they are told, and their links end."""
        void: list[tuple[Session, Refused]] = []

        def judge(session: Session) -> None:
            if fault := session.judge(roots):
                void.append((session, fault))

        def expel(entry: tuple[Session, Refused]) -> None:
            entry[0].expel(entry[1], roots.signed)

        self._by_and_by(sessions, judge, lambda: self._by_and_by(void, expel))

    def _by_and_by(self, things: list[_T], call: Callable[[_T], None], then: Callable[[], None] | None = None) -> None:
        """A part of a turn for some of them, and the others in the next turns: there may be 50,000."""
        until = time.monotonic() + JUDGE_SECONDS
        while things:
            call(things.pop())
            if time.monotonic() >= until:
                self.relay.loop.soon(lambda: self._by_and_by(things, call, then))
                return
        if then is not None:
            then()

    def _tell(self, sessions: list[Session], trust: Trust) -> None:
        for session in sessions[-TELLS_A_TURN:]:
            if session.state == "live":  # others learn it after their Welcome
                session.tell(trust)
        del sessions[-TELLS_A_TURN:]
        if sessions:
            self.relay.loop.after(TELL_PAUSE, lambda: self._tell(sessions, trust))

    def _load_shown(self) -> Shown:
        """Raises TrustError."""
        broker = self.config
        dials = dial_server_context(broker.certificate, broker.key) if broker.dial_security == "tls" else None
        if broker.security == "plain" and dials is None:
            return Shown()
        ends = time.time() + days_left(broker.certificate) * DAY
        if broker.security == "plain":
            return Shown(dials=dials, ends=ends)
        binding = certificate_fingerprint(certificate_der(broker.certificate))
        clients = self.roots.pem if self.roots is not None else ""
        return Shown(server_context(broker.certificate, broker.key, clients=clients), binding, dials, ends)

    async def _show(self) -> Shown:
        """Show links what is in the files, and ask for certificates of the CAs in force, from the next one on.

        Raises TrustError. One at a time: the last one has seen the last change.
        """
        async with self._showing:
            shown = await trio.to_thread.run_sync(self._load_shown)

            def put() -> None:
                self._shown = shown

            await self.bridge.run(put)
            return shown

    async def _show_other_cas(self) -> None:
        try:
            await self._show()
        except TrustError as fault:
            # The files are looked at as well: a good pair will come. Of a CA that is gone nobody gets past the Hello.
            self._log.error("certificate_rejected", node=self.node, reason=str(fault))

    async def _put_certificate(self, _: Shown) -> dict[str, object]:
        shown = await self._show()
        return {"node": self.node, "fingerprint": shown.binding.hex()[:16]}

    async def _watch_certificate(self) -> None:
        paths = [Path(self.config.certificate), Path(self.config.key)]
        await watch([Watched("certificate", paths, self._load_shown, self._put_certificate)], self._log)

    async def _enrol(self, anchor: Anchor, session: Session, request: Enrol) -> None:
        """Ask the authority. The link's deadline goes on."""
        try:
            answer = await anchor.enrol(request)
        except Refused as refused:
            code, text = refused.code, refused.text

            def refuse() -> None:
                if code is not Refusal.AUTHORITY_UNAVAILABLE:
                    self._count_refused(session.source)
                session.refuse(code, text)

            await self.bridge.run(lambda: self._enrolled(refuse))
        else:
            await self.bridge.run(lambda: self._enrolled(lambda: session.enrolled(answer)))

    def _enrolled(self, tell: Callable[[], None]) -> None:
        self._enrolling -= 1
        tell()

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
        """Started when links are accepted. Until `stop`; raises Superseded when another process takes the node_id."""
        async with running(self.relay) as self.bridge:
            # A node that can't serve yet must look so to the VIP: it listens only when it has its incarnation.
            shared = self.config.workers > 1
            sock = bound_socket(self._bind_host, self._bind_port, key="broker.listen", shared=shared)
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
                if self.anchor is not None:
                    nursery.start_soon(self.anchor.run)
                if "tls" in (self.config.security, self.config.dial_security):
                    nursery.start_soon(self._watch_certificate)
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
        )

    @property
    def certificate_ends(self) -> float:
        """Of the one that links and Dials are shown; seconds since 1970, 0 when it shows none."""
        return self._shown.ends

    def reasons(self) -> list[str]:
        """Why this node is not ready; empty when it is."""
        reasons = []
        if self.registry_down:
            reasons.append(f"registry: {self.registry_down}")
        if self.draining:
            reasons.append("draining")
        return reasons

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
                self.registry_down = ""
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
        registrations = [s.registration for s in self.sessions.values() if s.registration is not None]
        left: list[Registration] = []
        self._left_during_beat = left
        try:
            beat = await self.bridge.registry(self._registry.beat, self.record(), registrations)
        except RegistryUnavailable as error:
            self._registry_is_down(error)
            return
        except Superseded:
            self._log.error("node_superseded", node=self.node, reason="another broker started under this node_id")
            raise
        finally:
            self._left_during_beat = None
        if self.registry_down:
            self._log.info("registry_back", node=self.node, tuples_put_back=beat.put_back)
            self.registry_down = ""
        elif beat.put_back:
            self._log.warning("registry_had_lost_tuples", node=self.node, tuples_put_back=beat.put_back)
        if beat.lost:
            await self.bridge.run(lambda: self._end_lost(beat.lost))
        for registration in left:
            await self.bridge.registry_tries(self._registry.unregister, registration)

    def _end_lost(self, lost: dict[int, AddressTaken]) -> None:
        """While the registry did not have them, another agent came with one of their addresses, and is there now."""
        for session in list(self.sessions.values()):
            if session.epoch in lost and not session.answered:
                session.refuse(Refusal.ADDRESS_TAKEN, str(lost[session.epoch]))

    def _registry_is_down(self, error: RegistryUnavailable) -> None:
        if not self.registry_down or self.registry_down == "not contacted yet":
            self._log.error("registry_unavailable", node=self.node, reason=str(error))
        self.registry_down = str(error)

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
            session.tell(Drain(deadline=self.config.drain))

    def _end_sessions(self) -> None:
        for session in list(self.sessions.values()):
            session.tell(Bye(reason="the broker stops"))
            session.end("the broker stops")

    # Registering, in trio's thread.

    async def _register(self, session: Session) -> None:
        """Ports, tuples, Welcome; all or nothing."""
        hello = session.hello
        assert hello is not None
        async with self._owner_lock(session.owner):
            older = self.sessions.get(session.owner)
            if older is not None and older.identity is not None and session.identity is None:
                # Were it the agent itself, and its older link dead, then that would be over soon.
                text = f"{session.owner} has a session here by certificate, which no join token replaces"
                await self.bridge.run(lambda: session.refuse(Refusal.ADDRESS_TAKEN, text))
                return
            if older is not None:
                # The agent says that it has no session here: its old link is one that only we believe in.
                await self._replace(older, session)
            if session.state != "proven":
                return
            session.epoch = self.incarnation << COUNTER_BITS | next(self._counter)
            leased: list[Leased] = []
            try:
                guarded = await self._take_port(session)
                leased.append(guarded)
                granted, notices = await self._take_open_ports(session, leased)
                session.registration = self._registration(session, guarded, leased, granted)
                await self.bridge.registry(self._registry.register, session.registration)
            except (Refused, RegistryUnavailable, AddressTaken, PortsExhausted, OSError) as error:
                await self._give_back(leased)
                session.registration = None
                code, text = _refusal_of(error), str(error)
                await self.bridge.run(lambda: session.refuse(code, text))
                return
            except BaseException:  # cancelled, or superseded: the node ends
                for port in leased:
                    port.sock.close()
                raise
            self.sessions[session.owner] = session
            live = await self.bridge.run(lambda: self._open_shop(session, leased, granted, notices))
            if not live:
                await self._leave(session)
                return
        self._log.info(
            "session_up", node=self.node, agent=hello.agent_id, namespace=hello.namespace, epoch=str(session.epoch),
            port=guarded.lease.port, addresses=list(hello.addresses), peer=session.peer, agent_software=hello.software,
            proved_by="certificate" if session.identity is not None else "join token",
        )  # fmt: skip

    def _open_shop(
        self, session: Session, leased: list[Leased], granted: list[tuple[Publish, int]], notices: list[str]
    ) -> bool:
        """In the relay's thread: accept on the ports and welcome the agent. False when it is gone already."""
        if session.state != "proven":
            for port in leased:
                port.sock.close()
            return False
        guarded = GuardedPort(
            self.relay, session, leased[0].lease.port, self._checker, self.counts,
            self.config.max_handshakes, self.handshake_timeout,
        )  # fmt: skip
        session.listeners.append(self.relay.listen(leased[0].sock, guarded.accept, client_speaks=True))
        for port, (publish, _) in zip(leased[1:], granted, strict=True):
            own = tuple(ipaddress.ip_network(cidr, strict=False) for cidr in publish.allow)
            server = OpenPortServer(
                self.relay, session, port.lease.port, publish.ip, publish.target_port,
                (self._open_allow, own) if own else (self._open_allow,), self.node, self.counts,
                self.config.max_handshakes,
            )  # fmt: skip
            session.listeners.append(self.relay.listen(port.sock, server.accept))
        session.welcome(
            Welcome(
                node=self.node,
                host=self.host,
                epoch=session.epoch,
                ip=self.ip,
                port=guarded.number,
                heartbeat=self.heartbeat,
                open_ports=[OpenPort(port=n, ip=p.ip, target_port=p.target_port) for p, n in granted],
                notices=notices,
                software=f"rtunnel {rtunnel.__version__}",
            )
        )
        return True

    async def _take_port(self, session: Session) -> Leased:
        def allocate() -> Leased:
            _, sock, lease = self._guarded.allocate(session.owner, session.epoch, self.node, self._bind)
            return Leased(lease, sock)

        return await self.bridge.registry(allocate)

    async def _take_open_ports(
        self, session: Session, leased: list[Leased]
    ) -> tuple[list[tuple[Publish, int]], list[str]]:
        """Each open port is granted or becomes a notice: an agent without it is worth more than none."""
        granted: list[tuple[Publish, int]] = []
        notices: list[str] = []
        assert session.hello is not None
        # Who wants a certain port comes first: another's by chance could be that one.
        for publish in sorted(session.hello.publish, key=lambda publish: not publish.port):
            wanted = f"open port {publish.port or '(any)'} for {publish.ip}:{publish.target_port}"
            try:
                taken = await self.bridge.registry(self._allocate_open, session, publish)
            except (Refused, PortsExhausted, PortTaken, ValueError) as error:
                notices.append(f"{wanted} was not granted: {error}"[:512])
                self.log("open_port_not_granted", agent=session.hello.agent_id, port=publish.port, reason=str(error))
            else:
                leased.append(taken)
                granted.append((publish, taken.lease.port))
        return granted, notices

    def _allocate_open(self, session: Session, publish: Publish) -> Leased:
        if self._open is None or not self._open_allow:
            raise Refused(Refusal.PORT_NOT_ALLOWED, "this broker allows no open ports (broker.open_ports)")
        if publish.ip not in session.addresses:
            raise Refused(Refusal.PORT_NOT_ALLOWED, f"{publish.ip} is not one of the agent's addresses")
        rule = session.rule
        if rule.open_ports == () or (publish.port and not rule.allows(publish.port)):
            port = f"port {publish.port}" if publish.port else "any open port"
            raise Refused(Refusal.PORT_NOT_ALLOWED, f"rule {rule.number} of broker.admit does not allow {port}")
        for cidr in publish.allow:
            ipaddress.ip_network(cidr, strict=False)
        # One owner may have several open ports: each target is an owner of its own.
        owner = f"{session.owner}/{publish.ip}:{publish.target_port}"
        if publish.port:
            _, sock, lease = self._open.allocate_fixed(publish.port, owner, session.epoch, self.node, self._bind)
        else:
            allows = rule.allows if rule.open_ports is not None else None
            _, sock, lease = self._open.allocate(owner, session.epoch, self.node, self._bind, allows)
        return Leased(lease, sock)

    def _bind(self, port: int) -> socket.socket:
        return listening_socket(self._bind_host, port)

    def _registration(
        self, session: Session, guarded: Leased, leased: list[Leased], granted: list[tuple[Publish, int]]
    ) -> Registration:
        hello = session.hello
        assert hello is not None

        def entry(ip: str, agent_port: int, ps_port: int) -> Tuple:
            return Tuple(
                namespace=hello.namespace,
                agent_ip=ip,
                agent_port=agent_port,
                ps_ip=self.ip,
                ps_port=ps_port,
                node=self.node,
                epoch=session.epoch,
                agent_id=hello.agent_id,
                exposes=",".join(session.exposes),
            )

        tuples = [entry(ip, 0, guarded.lease.port) for ip in hello.addresses]
        tuples += [entry(publish.ip, publish.target_port, port) for publish, port in granted]
        return Registration(session.epoch, tuple(tuples), tuple(port.lease for port in leased))

    async def _republish(self, session: Session) -> None:
        """One at a time, with the latest: two calls to the registry may overtake each other."""
        async with self._owner_lock(session.owner):
            session.update_due = False  # before `exposes` is read: what comes later is told later
            registration = session.registration
            if registration is None or self.sessions.get(session.owner) is not session:
                return
            exposes = ",".join(session.exposes)
            tuples = tuple(
                Tuple(**{**{f: getattr(t, f) for f in t.__struct_fields__}, "exposes": exposes})
                for t in registration.tuples
            )
            session.registration = Registration(registration.epoch, tuples, registration.leases)
            try:
                await self.bridge.registry_tries(self._registry.register, session.registration)
            except AddressTaken as error:
                lost = {session.epoch: error}
                await self.bridge.run(lambda: self._end_lost(lost))

    # Leaving.

    async def _replace(self, older: Session, newer: Session) -> None:
        assert older.hello is not None and newer.hello is not None
        same = older.hello.instance == newer.hello.instance
        self._log.warning(
            "session_replaced", node=self.node, agent=newer.hello.agent_id, epoch=str(older.epoch), peer=newer.peer,
            older_peer=older.peer, reason="its link was dead" if same else "another process with this agent_id came; "
            "if this repeats, two hosts have one agent_id",
        )  # fmt: skip
        await self.bridge.run(lambda: older.end("replaced: the agent has a new session here"))
        await self._leave(older)

    async def _unregister(self, session: Session, why: str) -> None:
        async with self._owner_lock(session.owner):
            await self._leave(session)
        if session.epoch and session.hello is not None:
            self._log.info(
                "session_down", node=self.node, agent=session.hello.agent_id, epoch=str(session.epoch), reason=why
            )

    async def _leave(self, session: Session) -> None:
        """Out of the registry, ports to quarantine. Idempotent."""
        if self.sessions.get(session.owner) is session:
            del self.sessions[session.owner]
        registration, session.registration = session.registration, None
        if registration is None:
            return
        for lease in registration.leases:
            self._allocator_of(lease).rest(lease)
        if self._left_during_beat is not None:
            self._left_during_beat.append(registration)
        await self.bridge.registry_tries(self._registry.unregister, registration)

    async def _give_back(self, leased: list[Leased]) -> None:
        for port in leased:
            port.sock.close()
            await self.bridge.registry(self._allocator_of(port.lease).release, port.lease)

    def _allocator_of(self, lease: PortLease) -> PortAllocator:
        return self._guarded if self._open is None or lease.port in self._guarded.ports else self._open

    def _owner_lock(self, owner: str) -> _OwnerLock:
        return _OwnerLock(self._owner_locks, owner)


class _OwnerLock:
    """One registration or removal of an owner at a time; locks exist only while somebody holds or wants them."""

    def __init__(self, locks: dict[str, tuple[trio.Lock, int]], owner: str) -> None:
        self._locks = locks
        self._owner = owner

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._owner, (trio.Lock(), 0))
        self._locks[self._owner] = lock, users + 1
        try:
            await lock.acquire()
        except BaseException:
            self._forget()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._locks[self._owner][0].release()
        self._forget()

    def _forget(self) -> None:
        lock, users = self._locks[self._owner]
        if users == 1:
            del self._locks[self._owner]
        else:
            self._locks[self._owner] = lock, users - 1


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, Refused):
        return error.code
    if isinstance(error, OSError):  # no descriptor, no memory for one more listener
        return Refusal.OVERLOADED
    if isinstance(error, AddressTaken):
        return Refusal.ADDRESS_TAKEN
    return Refusal.REGISTRY_UNAVAILABLE if isinstance(error, RegistryUnavailable) else Refusal.PORTS_EXHAUSTED
