"""Registers sessions: leases their ports and writes their tuples before Welcome, and gives them
back at the end.

In trio's thread.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio
from structlog.typing import FilteringBoundLogger

import rtunnel
from rtunnel.bridge import Bridge
from rtunnel.config import BrokerConfig, parse_endpoint, parse_range
from rtunnel.errors import AddressTaken, RegistryUnavailable
from rtunnel.net import listening_socket
from rtunnel.registry import COUNTER_BITS, DuplicateAgent, PortLease, Registration, Registry, Tuple
from rtunnel.registry.ports import PortAllocator, PortsExhausted, PortTaken
from rtunnel.registry.ports import PortCounts as RangeCounts
from rtunnel.relay.relay import Relay
from rtunnel.wire import messages
from rtunnel.wire.control import BrokerState
from rtunnel.wire.messages import OpenPort, Publish, Welcome
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_broker.duplicates import PROBE_SECONDS, Duplicates, is_restart, place, replaced_by
from rtunnel_broker.greeting import doubts
from rtunnel_broker.log import NodeLog
from rtunnel_broker.notes import Notes
from rtunnel_broker.ports import DialChecker, GuardedPort, Networks, OpenPortServer, PortCounts
from rtunnel_broker.session import REGISTERED, Session

if TYPE_CHECKING:
    from rtunnel_broker.presence import Presence


class RegistrarNode(Protocol):
    """The node, as its registrar sees it."""

    config: BrokerConfig
    node: str
    host: str
    ip: str
    presence: Presence
    counts: PortCounts
    relay: Relay
    bridge: Bridge
    notes: Notes
    log: NodeLog


@dataclass(frozen=True)
class Leased:
    """A port that a session holds: the lease, and the socket that listens on it."""

    lease: PortLease
    sock: socket.socket


@dataclass
class Ports:
    """The ports of a session while it registers: the guarded port, then the open ports."""

    leased: list[Leased] = field(default_factory=list)
    granted: list[tuple[Publish, int]] = field(default_factory=list)  # the open ports, as asked for
    notices: list[str] = field(default_factory=list)  # one for each open port that is not granted

    def close(self) -> None:
        """Close the sockets of the ports."""
        for port in self.leased:
            port.sock.close()


@dataclass
class Quota:
    """The open ports of one agent on a node, and the most that it may have.

    Ports in quarantine for the agent count too: otherwise it could use up all ports in turn.
    """

    most: int
    held: dict[int, str]  # its ports, and for what target each is

    def check(self, port: int, owner: str) -> None:
        """Raise Refused unless `owner` may have this port (0: any).

        It may have one again that it has or had.
        """
        back = self.held.get(port) == owner if port else owner in self.held.values()
        if len(self.held) >= self.most and not back:
            text = f"the agent has {len(self.held)} open ports here (broker.open_ports.per_agent)"
            raise Refused(Refusal.PORT_NOT_ALLOWED, text)


def open_owner(session: Session, publish: Publish) -> str:
    """Return the owner of an open port's lease: each target of an agent is an owner of its own."""
    return f"{session.owner}/{publish.ip}:{publish.target_port}"


class Registrar:
    """The sessions of one node that are in the registry, and their ports."""

    def __init__(
        self,
        node: RegistrarNode,
        registry: Registry,
        quarantine: float,
        checker: DialChecker,
        log: FilteringBoundLogger,
    ) -> None:
        broker = node.config
        open_ports = broker.open_ports
        self.sessions: dict[str, Session] = {}  # by owner
        # During a heartbeat: registrations that it may write again although their sessions have
        # left.
        self.left_during_beat: list[Registration] | None = None
        self._node = node
        self._registry = registry
        self._quarantine = quarantine
        self._checker = checker
        self._log = log
        self._counter = count(1)
        self.duplicates = Duplicates(time.time)
        self._owner_locks: dict[str, tuple[trio.Lock, int]] = {}
        self._bind_host, _ = parse_endpoint(broker.listen)
        self._guarded = self._allocator(broker.port_range)
        self._open = self._allocator(open_ports.range, open_ports.own) if open_ports.range else None
        self._open_allow: Networks = tuple(ipaddress.ip_network(cidr) for cidr in open_ports.allow)

    def _allocator(self, ports: str, own: str = "") -> PortAllocator:
        first, last = parse_range(ports)
        part = parse_range(own) if own else None
        return PortAllocator(self._registry, self._node.ip, first, last, quarantine=self._quarantine, own=part)

    def port_counts(self) -> tuple[RangeCounts, RangeCounts | None]:
        """Return the counts of the guarded ports and of the open ones; for any thread."""
        return self._guarded.counts(), self._open.counts() if self._open is not None else None

    # Registering.

    async def register(self, session: Session) -> None:
        """Take ports, write tuples, and send Welcome; when one of these fails, refuse
        the session.
        """
        async with self._owner_lock(session.owner):
            try:
                await self._make_way(session)
                # it has ended, so it takes no ports
                if session.state is not BrokerState.PROVEN:
                    return
                ports = await self._take_ports(session)
            except Refused as error:
                code, text = error.code, error.text
                await self._node.bridge.run(lambda: session.refuse(code, text))
                return
            self.sessions[session.owner] = session
            if not await self._node.bridge.run(lambda: self._start_listeners(session, ports)):
                await self._leave(session)

    async def _make_way(self, session: Session) -> None:
        """End an older session of the same owner. Raises Refused if that one stays."""
        older = self.sessions.get(session.owner)
        if older is not None:
            await self._check_older(older, session)
            # A session that has ended meanwhile replaces no other one. Otherwise the agent says
            # that it has no session here: its old link is lost, and only this node does not know.
            if session.state is BrokerState.PROVEN:
                await self._replace(older, session)

    async def _take_ports(self, session: Session) -> Ports:
        """Lease a session's ports, and write its tuples. Keeps nothing when it raises Refused."""
        session.epoch = self._node.presence.incarnation << COUNTER_BITS | next(self._counter)
        ports = Ports()
        try:
            ports.leased.append(await self._take_port(session))
            await self._take_open_ports(session, ports)
            session.granted = ports.granted
            session.registration = self._registration(session, tuple(port.lease for port in ports.leased))
            await self._node.bridge.registry(self._registry.register, session.registration)
        except (Refused, RegistryUnavailable, AddressTaken, PortsExhausted, OSError) as error:
            await self._give_back(ports.leased)
            session.registration = None
            text = self._duplicated(session, error.holder) if isinstance(error, DuplicateAgent) else str(error)
            raise Refused(_refusal_of(error), text) from None
        except BaseException:  # cancelled, or superseded: the node ends
            ports.close()
            raise
        return ports

    def _start_listeners(self, session: Session, ports: Ports) -> bool:
        """Accept on the ports and send Welcome.

        Return False when the session has ended. In the relay's thread.
        """
        if session.state is not BrokerState.PROVEN:
            ports.close()
            return False
        first, *others = ports.leased
        guarded = GuardedPort(
            self._node.relay, session, first.lease.port, self._checker, self._node.counts,
            self._node.config.handshake_timeout,
        )  # fmt: skip
        session.listeners.append(self._node.relay.listen(first.sock, guarded.accept, client_speaks=True))
        for port, (publish, _) in zip(others, ports.granted, strict=True):
            own = tuple(ipaddress.ip_network(cidr, strict=False) for cidr in publish.allow)
            server = OpenPortServer(
                self._node.relay, session, port.lease.port, publish.ip, publish.target_port,
                (self._open_allow, own) if own else (self._open_allow,), self._node.node, self._node.counts,
            )  # fmt: skip
            session.listeners.append(self._node.relay.listen(port.sock, server.accept))
        session.welcome(
            Welcome(
                node=self._node.node,
                host=self._node.host,
                epoch=session.epoch,
                ip=self._node.ip,
                port=guarded.number,
                heartbeat=self._node.presence.heartbeat,
                open_ports=[OpenPort(port=n, ip=p.ip, target_port=p.target_port) for p, n in ports.granted],
                notices=[*ports.notices, *self._doubts(session)],
                software=f"rtunnel {rtunnel.__version__}",
            )
        )
        return True

    def _doubts(self, session: Session) -> tuple[str, ...]:
        """Log what is odd in the facts of a session's agent, and return it as notices."""
        hello = session.hello
        assert hello is not None
        found = doubts(hello, time.time())
        for reason in found:
            self._node.log.warning(
                "agent_doubted", agent=hello.agent_id, namespace=hello.namespace, peer=session.peer, host=hello.host,
                reason=reason,
            )  # fmt: skip
        session.doubts = tuple(reason[: messages.MAX_TEXT] for reason in found)
        return session.doubts

    async def _take_port(self, session: Session) -> Leased:
        def allocate() -> Leased:
            _, sock, lease = self._guarded.allocate(session.owner, session.epoch, self._node.node, self._bind)
            return Leased(lease, sock)

        return await self._node.bridge.registry(allocate)

    async def _take_open_ports(self, session: Session, ports: Ports) -> None:
        """Add the open ports that are granted, and a notice for each other one.

        A session without an open port is better than no session.
        """
        assert session.hello is not None
        quota = Quota(self._node.config.open_ports.per_agent, self._held_open(session))
        # Requests for a certain port come first: a random choice for another one could take it.
        for publish in sorted(session.hello.publish, key=lambda publish: not publish.port):
            wanted = f"open port {publish.port or '(any)'} for {publish.ip}:{publish.target_port}"
            try:
                quota.check(publish.port, open_owner(session, publish))
                taken = await self._node.bridge.registry(self._allocate_open, session, publish)
            except (Refused, PortsExhausted, PortTaken, ValueError) as error:
                ports.notices.append(f"{wanted} was not granted: {error}"[:512])
                self._node.log.info(
                    "open_port_not_granted", agent=session.hello.agent_id, port=publish.port, reason=str(error)
                )
            else:
                quota.held[taken.lease.port] = taken.lease.owner
                ports.leased.append(taken)
                ports.granted.append((publish, taken.lease.port))

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
        owner = open_owner(session, publish)
        if publish.port:
            _, sock, lease = self._open.allocate_fixed(publish.port, owner, session.epoch, self._node.node, self._bind)
        else:
            allows = rule.allows if rule.open_ports is not None else None
            _, sock, lease = self._open.allocate(owner, session.epoch, self._node.node, self._bind, allows)
        return Leased(lease, sock)

    def _held_open(self, session: Session) -> dict[int, str]:
        if self._open is None or session.hello is None or not session.hello.publish:
            return {}
        return self._open.held(f"{session.owner}/")

    def _bind(self, port: int) -> socket.socket:
        return listening_socket(self._bind_host, port)

    def _registration(self, session: Session, leases: tuple[PortLease, ...]) -> Registration:
        """Return the session's registration as it is now.

        The first lease is that of the guarded port.
        """
        hello = session.hello
        assert hello is not None

        def entry(ip: str, agent_port: int, ps_port: int) -> Tuple:
            return Tuple(
                namespace=hello.namespace,
                agent_ip=ip,
                agent_port=agent_port,
                ps_ip=self._node.ip,
                ps_port=ps_port,
                node=self._node.node,
                epoch=session.epoch,
                agent_id=hello.agent_id,
                host_id=hello.host_id.hex(),
                agent_host=place(hello, session.peer),
            )

        # Read once: the relay's thread may replace the set.
        addresses = session.addresses
        tuples = [entry(ip, 0, leases[0].port) for ip in sorted(addresses)]
        tuples += [entry(p.ip, p.target_port, port) for p, port in session.granted if p.ip in addresses]
        before = session.registration
        revision = before.revision + 1 if before is not None else 0
        return Registration(session.epoch, tuple(tuples), leases, ",".join(session.exposes), revision)

    def registrations(self) -> list[Registration]:
        """Return all registrations for a heartbeat, with the exposed ports of each agent's last
        Update.

        The registry thus gets one Update of an agent with each heartbeat, however many the agent
        sends.
        """
        found = []
        for session in self.sessions.values():
            registration = session.registration
            if registration is None:
                continue
            if session.update_due and session.addresses == _addresses(registration):
                session.update_due = False  # before `exposes` is read: a later Update sets it again
                registration = session.registration = self._registration(session, registration.leases)
            found.append(registration)
        return found

    def moved(self) -> list[Session]:
        """Return the sessions whose addresses the registry does not have yet; `republish` is for
        them.
        """
        return [session for session in self.sessions.values() if session.update_due]

    async def republish(self, session: Session) -> None:
        """Write the addresses of the agent's last Update to the registry.

        One call at a time, because two calls to the registry may overtake each other.
        """
        async with self._owner_lock(session.owner):
            session.update_due = False  # before the session is read: a later Update sets it again
            before = session.registration
            if before is None or self.sessions.get(session.owner) is not session:
                return
            now = session.registration = self._registration(session, before.leases)
            await self._give_addresses_back(session, before, now)
            try:
                await self._node.bridge.registry_tries(self._registry.register, now)
            except AddressTaken as error:
                if not await self._keep_addresses(session, before, now, error):
                    lost = {session.epoch: error}
                    await self._node.bridge.run(lambda: self.end_lost(lost))

    async def _give_addresses_back(self, session: Session, before: Registration, now: Registration) -> None:
        """Remove the tuples of addresses that the agent has lost; the ports stay the session's."""
        stay = {(entry.agent_ip, entry.agent_port) for entry in now.tuples}
        gone = tuple(entry for entry in before.tuples if (entry.agent_ip, entry.agent_port) not in stay)
        if not gone:
            return
        left = Registration(before.epoch, gone, ())
        if self.left_during_beat is not None:
            self.left_during_beat.append(left)
        await self._node.bridge.registry_tries(self._registry.unregister, left)
        if session.hello is not None:
            self._node.notes.departed(
                session.hello, {entry.agent_ip for entry in gone}, peer=session.peer, epoch=before.epoch,
                cause="given_back", text="the agent does not have this address any more",
            )  # fmt: skip
        self._log.info(
            "addresses_given_back", node=self._node.node, agent=gone[0].agent_id, namespace=gone[0].namespace,
            epoch=str(before.epoch), addresses=sorted({entry.agent_ip for entry in gone}),
        )  # fmt: skip

    async def _keep_addresses(
        self, session: Session, before: Registration, now: Registration, taken: AddressTaken
    ) -> bool:
        """Keep the session without a new address that another agent has; the agent asks again
        later.

        Return False when the address is not new.
        """
        had = {entry.agent_ip for entry in before.tuples}
        if taken.ip in had:
            return False
        kept = tuple(entry for entry in now.tuples if entry.agent_ip in had)
        session.registration = msgspec.structs.replace(now, tuples=kept)
        addresses = frozenset(entry.agent_ip for entry in kept)

        def keep() -> None:
            if not session.update_due:  # else a later Update counts
                session.addresses = addresses

        await self._node.bridge.run(keep)
        await self._node.bridge.registry_tries(self._registry.register, session.registration)
        if session.hello is not None:
            self._node.notes.refused(
                _refusal_of(taken), str(taken), namespace=taken.namespace, agent_id=session.hello.agent_id,
                addresses=(taken.ip,), peer=session.peer, proved=True,
            )  # fmt: skip
        self._log.warning(
            "address_not_taken_up", node=self._node.node, agent=session.hello.agent_id if session.hello else "",
            address=taken.ip, reason=str(taken), hint="the agent asks again for a while",
        )  # fmt: skip
        return True

    # Two sessions with one agent_id.

    async def _check_older(self, older: Session, newer: Session) -> None:
        """Raise Refused unless `newer` may replace the older session of its agent_id."""
        assert older.hello is not None
        if older.identity is not None and newer.identity is None:
            # If this is the same agent with a dead link, that link times out shortly.
            text = f"{newer.owner} has a session here by certificate, which no join token replaces"
            raise Refused(Refusal.ADDRESS_TAKEN, text)
        if not is_restart(older, newer) and await self._lives(older):
            raise Refused(Refusal.DUPLICATE_AGENT, self._duplicated(newer, place(older.hello, older.peer)))

    async def _lives(self, session: Session) -> bool:
        """Return whether the session's link answers a ping within PROBE_SECONDS."""
        answered = trio.Event()
        answers: list[bool] = []

        def done(lives: bool) -> None:
            answers.append(lives)
            self._node.bridge.post(answered.set)

        def probe() -> None:
            if session.link is None:
                done(False)
            else:
                # The newer session waits, and its own deadline goes on.
                session.link.probe(min(PROBE_SECONDS, self._node.config.handshake_timeout / 2), done)

        await self._node.bridge.run(probe)
        await answered.wait()
        return answers[0]

    def _duplicated(self, newer: Session, holder: str) -> str:
        """Remember a refused second host, log it if it is new, and return the text of
        its refusal.
        """
        entry, is_news = self.duplicates.add(newer, holder)
        if is_news:
            self._log.warning(
                "agent_duplicated", node=self._node.node, agent=entry.agent_id, namespace=entry.namespace,
                holder=entry.holder, refused=entry.refused,
                hint="two hosts have one identity: stop one of them, or give it an agent_id and an identity of its own",
            )  # fmt: skip
        return (
            f"{newer.owner} has a living session from {entry.holder}, and this link is from {entry.refused}: "
            "stop one of the two agents, or give it an agent_id and an identity of its own"
        )[:512]

    # Leaving.

    async def _replace(self, older: Session, newer: Session) -> None:
        assert older.hello is not None and newer.hello is not None
        newer.replaced = replaced_by(older)
        self._log.warning(
            "session_replaced", node=self._node.node, agent=newer.hello.agent_id, epoch=str(older.epoch),
            peer=newer.peer, older_peer=older.peer,
            reason="the agent was started again" if is_restart(older, newer) else "its link was dead",
        )  # fmt: skip

        def end() -> None:
            older.way_out = "replaced"
            older.end("replaced: the agent has a new session here")

        await self._node.bridge.run(end)
        await self._leave(older)

    async def unregister(self, session: Session) -> None:
        async with self._owner_lock(session.owner):
            await self._leave(session)

    async def _leave(self, session: Session) -> None:
        """Remove the session from the registry, and put its ports into quarantine.

        Later calls have no effect.
        """
        if self.sessions.get(session.owner) is session:
            del self.sessions[session.owner]
        registration, session.registration = session.registration, None
        if registration is None:
            return
        for lease in registration.leases:
            self._allocator_of(lease).rest(lease)
        if self.left_during_beat is not None:
            self.left_during_beat.append(registration)
        await self._node.bridge.registry_tries(self._registry.unregister, registration)

    async def _give_back(self, leased: list[Leased]) -> None:
        for port in leased:
            port.sock.close()
            await self._node.bridge.registry(self._allocator_of(port.lease).release, port.lease)

    def _allocator_of(self, lease: PortLease) -> PortAllocator:
        return self._guarded if self._open is None or lease.port in self._guarded.ports else self._open

    def _owner_lock(self, owner: str) -> _OwnerLock:
        return _OwnerLock(self._owner_locks, owner)

    # Tuples that the registry has lost.

    def end_lost(self, lost: dict[int, AddressTaken]) -> None:
        """Refuse the sessions, by epoch, whose address another agent took while the registry had
        lost their tuples.
        """
        for session in list(self.sessions.values()):
            if session.epoch in lost and session.state in REGISTERED:
                error = lost[session.epoch]
                session.refuse(_refusal_of(error), str(error))


def _addresses(registration: Registration) -> frozenset[str]:
    """Return the addresses that a registered session answers for."""
    return frozenset(entry.agent_ip for entry in registration.tuples if not entry.agent_port)


class _OwnerLock:
    """Allows one registration or removal of an owner at a time.

    A lock exists only while it is held or wanted.
    """

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
    if isinstance(error, DuplicateAgent):
        return Refusal.DUPLICATE_AGENT
    if isinstance(error, AddressTaken):
        return Refusal.ADDRESS_TAKEN
    return Refusal.REGISTRY_UNAVAILABLE if isinstance(error, RegistryUnavailable) else Refusal.PORTS_EXHAUSTED
