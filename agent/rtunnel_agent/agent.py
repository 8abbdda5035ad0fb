"""The agent keeps `redundancy` sessions on different nodes and hosts, behind a VIP that chooses the
node.

Each slot dials. A broker on whose node, or host, the agent has a session already refuses with
`duplicate_node`, and the slot dials again at once, from a new source port. Slots connect and do TLS
at the same time, so that a silent address delays no other slot. Only one slot at a time says its
Hello, so that the held nodes in it are true.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from rtunnel.bridge import Bridge
from rtunnel.config import (
    AgentConfig,
    Config,
    ConfigError,
    changed,
    host_name,
    reread,
)
from rtunnel.errors import TrustError
from rtunnel.logs import get_logger
from rtunnel.relay.ends import EndHandler
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.watch import Watched, watch
from rtunnel.wire.messages import Enrol, Enrolled, Hello
from rtunnel.wire.refusal import Refusal
from rtunnel_agent.addresses import OwnAddresses
from rtunnel_agent.complaint import Complaints
from rtunnel_agent.dialler import Dialler
from rtunnel_agent.enrolment import AgentIdentity
from rtunnel_agent.handshake import AgentSession
from rtunnel_agent.hello import Hellos
from rtunnel_agent.identity import Credentials
from rtunnel_agent.proof import Prover
from rtunnel_agent.race import Outcome, Race, Watch
from rtunnel_agent.targets import IncomingStream, Targets, exposed

#: Dials that follow each other closely. The VIP chooses the node, so each may lead to a node that
#: is held already (`duplicate_node`) or to one that is down and still behind the VIP (refused).
#: With 3 nodes of which only one can be used, 12 dials find it in 99.2 % of all cases.
QUICK_REDIALS: Final = 12
#: Close dials after those, which take another node of the same host too: there may be only one
#: host.
ANY_HOST_REDIALS: Final = 6
QUICK_JITTER: Final = 0.05
#: Seconds to which the pauses double after that, with jitter, unless `backoff_cap` is less. An
#: agent that the VIP always leads to one node goes on at this pace.
SLOW_REDIAL: Final = 10.0
#: Seconds after which an agent with one session left leaves a draining node: when its dials have
#: found no other node, and when they could not finish.
DRAIN_GRACE: Final = 2.0
LONG_DRAIN_GRACE: Final = 10.0
#: Seconds of the first pause after a failure; it doubles up to `backoff_cap`.
BACKOFF_FIRST: Final = 0.25
#: Seconds between two looks of a slot that waits for a certificate.
LOOK_SECONDS: Final = 1.0
#: Seconds after a change of this host's addresses in which the agent repeats its Update at each
#: look: the host that had a new address before may give it back later.
ASK_AGAIN: Final = 60.0
#: Seconds between two trust lists of one broker.
NEWS_PAUSE: Final = 1.0
#: Seconds after which a session resets the slot's pauses. After a shorter one the slot waits,
#: because of brokers that end each session at once, and of two hosts with one identity, which
#: replaced each other's session 14 times a second.
STABLE: Final = 60.0


@dataclass(eq=False)
class Slot:
    """The place of one wanted session."""

    number: int
    session: AgentSession | None = None
    reason: str = "not dialled yet"  # why there is none; empty when there is
    told: str = ""  # the reason that was logged last
    since: float = 0.0  # when the session came up, in seconds since 1970
    up_at: float = 0.0  # the same by trio's clock
    # dials since the last session that led to a node or host that is held, down or draining
    searches: int = 0
    backoff: float = BACKOFF_FIRST


class Agent:
    """One agent process: its sessions, its targets and its identity."""

    def __init__(self, config: Config) -> None:
        agent = config.agent
        self._whole = config
        self.agent_id = agent.agent_id or host_name()
        self._own = OwnAddresses(agent.addresses)
        self.slots = [Slot(number) for number in range(agent.redundancy)]
        self.relay = Relay(self.report, f"relay-{self.agent_id}", memory=agent.stream_memory << 20)
        self._log = get_logger("agent").bind()
        self.targets = Targets(self.relay, agent, frozenset(self._own.present), self._log)
        self.targets.doubt = lambda: "; ".join(self.reasons())
        self._watches: dict[AgentSession, Watch] = {}
        self.credentials = Credentials(agent, self.agent_id, self._own, ask=self._ask, put=self._put_identity)
        self._hellos = Hellos(agent, self.agent_id, self.targets, self.credentials)
        self._greeting = trio.Lock()  # from a Hello until its answer
        self._stopping = False
        self._one_host = ""  # the host that was logged
        self.bridge = Bridge(self.relay)
        self._dialler = Dialler(agent, self.bridge, self._log)
        self._complaints = Complaints(self.bridge, self._dialler, agent.handshake_timeout)

    @property
    def config(self) -> AgentConfig:
        """The agent's section of the configuration."""
        return self._whole.agent

    @property
    def draining(self) -> dict[AgentSession, float]:
        """The sessions of draining nodes, with the time (monotonic) at which that was heard."""
        return {
            session: watch.draining_since
            for session, watch in self._watches.items()
            if watch.draining_since is not None
        }

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses that the agent answers for at present."""
        return self._own.present

    @property
    def lost_addresses(self) -> tuple[str, ...]:
        """The addresses that the agent should answer for, and that this host does not have."""
        return self._own.lost

    @property
    def identity(self) -> AgentIdentity | None:
        """The newest certificate and its key; None when the agent has none."""
        prover = self.targets.prover
        return None if prover is None else prover.identity

    def _put_identity(self, identity: AgentIdentity) -> None:
        self.targets.prover = Prover(identity)
        for session in list(self._watches):
            self._go_over(session, identity)

    def _go_over(self, session: AgentSession, identity: AgentIdentity) -> None:
        """Move a session to a new certificate, so that it stays when the CA of the old one is
        retired.
        """
        if self.credentials.by_certificate:
            self.relay.call(lambda: session.go_over(self.targets.exposed.ports, identity.certificate, identity.key))

    # Calls from sessions, in the relay's thread.

    def session_ready(self, session: AgentSession) -> None:
        self.bridge.post(self._ready, session)

    def session_up(self, session: AgentSession) -> None:
        self.bridge.post(self._settle, session, Outcome(session=session))

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        explained = Lost(lost.kind, self._explained(session, code, lost))
        self.bridge.post(self._gone, session, Outcome(code=code, lost=explained))

    def _explained(self, session: AgentSession, code: Refusal | None, lost: Lost) -> str:
        """Return the reason, with the keys to check for a fault that only a person can mend."""
        by_certificate = session.link is not None and not session.secret
        if by_certificate and lost.kind is LostKind.CERTIFICATE_REFUSED:
            return f"the broker does not accept this agent's certificate ({lost}): compare CAs and clocks"
        if by_certificate and code is Refusal.REVOKED:
            fix = "; it enrols anew when agent.join_token has another token" if self.config.identity else ""
            return f"{lost}{fix}"
        if lost.kind is LostKind.CERTIFICATE:
            return f"{lost}; see agent.ca ({self.config.ca}) and agent.server_name ({self.config.server_name})"
        in_handshake = session.link is not None and not session.link.up
        if in_handshake and lost.kind in (LostKind.TLS, LostKind.NOT_TLS):
            return f"{lost}; if the broker has security = plain, agent.security must say so"
        if self.config.security == "plain" and session.link is not None and not session.heard:
            return f"{lost}; if the broker speaks TLS, agent.security must be tls"
        return str(lost)

    def session_draining(self, session: AgentSession, deadline: float) -> None:
        self.bridge.post(self._retire, session)

    def session_trust(self, session: AgentSession, signed: bytes) -> None:
        """Take a broker's trust list; of several within NEWS_PAUSE only the last, to bound memory
        and log lines.
        """
        if session.news_pause is not None:
            session.news = signed
            return
        self.bridge.post(self.credentials.take, signed)
        session.news_pause = self.relay.loop.after(NEWS_PAUSE, lambda: self._next_news(session))

    def _next_news(self, session: AgentSession) -> None:
        session.news_pause = None
        signed, session.news = session.news, b""
        if signed:
            self.session_trust(session, signed)

    def serve_stream(self, session: AgentSession, stream: StreamEnd) -> EndHandler:
        return IncomingStream(self.targets, session, stream)

    def report(self, event: str, fields: dict[str, object]) -> None:
        """Log an event of the relay, which reports only faults."""
        self._log.error(event, agent=self.agent_id, **fields)

    # The same, in trio's thread.

    def _ready(self, session: AgentSession) -> None:
        if session in self._watches:
            self._watches[session].tell()

    def _settle(self, session: AgentSession, outcome: Outcome) -> None:
        if self._left_revoked_broker(session):
            return
        watch = self._watches[session]
        hello = session.hello
        assert hello is not None
        if hello.exposes != self.targets.exposed.ports or hello.addresses != list(self.addresses):
            self._tell_update([session])  # they have changed since the Hello
        if self.identity is not None and self.identity is not watch.presented:
            self._go_over(session, self.identity)
        watch.outcome = outcome
        watch.settle()

    def _left_revoked_broker(self, session: AgentSession) -> bool:
        fault = self.credentials.fault_of(session.certificate)
        if fault:
            self.bridge.relay.call(lambda: session.end(fault))
        return bool(fault)

    def _gone(self, session: AgentSession, outcome: Outcome) -> None:
        watch = self._watches.pop(session, None)
        if outcome.code is Refusal.REVOKED:
            self.credentials.revoked()
        if watch is not None:
            watch.outcome = outcome
            if watch.retired:
                self._log_down(session, outcome.lost)
            watch.retire.set()
            watch.down.set()
            watch.settle()

    def _retire(self, session: AgentSession) -> None:
        watch = self._watches.get(session)
        if watch is not None:
            watch.draining_since = trio.current_time()
            watch.retire.set()

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Agent] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop`, then drain. Calls `started` when the agent begins to dial."""
        async with self.bridge.running(), trio.open_nursery() as nursery:
            await nursery.start(self._dialler.brokers.run)
            for slot in self.slots:
                nursery.start_soon(self._keep, slot)
            nursery.start_soon(self._leave_draining_nodes)
            nursery.start_soon(self._leave_revoked_brokers)
            nursery.start_soon(self._follow_addresses)
            nursery.start_soon(self.credentials.run)
            if self._whole.file:
                nursery.start_soon(watch, [self._watched_file()], self._log)
            task_status.started(self)
            await stop.wait()
            await self._drain()
            nursery.cancel_scope.cancel()

    @property
    def redundancy(self) -> str:
        """How many of the wanted sessions are up, such as "1/2"."""
        return f"{self.up}/{len(self.slots)}"

    @property
    def up(self) -> int:
        """Return the number of wanted sessions that are up."""
        return sum(slot.session is not None for slot in self.slots)

    @property
    def state(self) -> str:
        """The word for `/statusz`: ready (all sessions are up), degraded (some) or down (none)."""
        return "ready" if self.up == len(self.slots) else "degraded" if self.up else "down"

    @property
    def one_host(self) -> str:
        """The host of all sessions, when there are several sessions and only one host;
        else empty.
        """
        welcomes = [slot.session.welcome for slot in self.slots if slot.session is not None]
        hosts = {welcome.host for welcome in welcomes if welcome is not None}
        return hosts.pop() if len(welcomes) > 1 and len(hosts) == 1 else ""

    def reasons(self) -> list[str]:
        """Return why the agent is not ready; empty when it is."""
        missing = self.credentials.missing
        identity = [f"identity: {missing}"] if missing else []
        lost = [f"address {address}: this host does not have it" for address in self._own.lost]
        empty = [f"session {slot.number + 1}: {slot.reason}" for slot in self.slots if slot.session is None]
        return identity + lost + empty

    async def answered(self) -> None:
        await self.bridge.answered()

    async def _drain(self) -> None:
        """Send Bye to the brokers when all streams have ended, or after `agent.drain` seconds."""
        self._stopping = True
        with trio.move_on_after(self.config.drain):
            while self.targets.counts.streams:
                await trio.sleep(0.05)
        sessions = list(self._watches)
        cut = self.targets.counts.streams  # they end with their links
        await self.bridge.run(lambda: _say_goodbye(sessions))
        self._log.info("agent_stopped", agent=self.agent_id, streams_cut=cut)

    # One slot.

    async def _keep(self, slot: Slot) -> None:
        while True:
            while missing := self._own.missing or self.credentials.missing:
                slot.reason = missing
                if not self._own.missing and self.identity is not None and self._complaints.take_turn():
                    await self._complain(missing)  # no broker hears of this certificate otherwise
                await self.credentials.changed(LOOK_SECONDS)
            watch = await self._dial(slot)
            if self._stopping:
                return
            if watch.outcome.session is None:
                await self._wait(slot, watch.outcome)
                continue
            self._fill(slot, watch.outcome.session)
            await watch.retire.wait()
            self._empty(slot, watch)
            if trio.current_time() - slot.up_at >= STABLE:
                slot.backoff = BACKOFF_FIRST
            else:
                await trio.sleep(self._next_backoff(slot))

    def _fill(self, slot: Slot, session: AgentSession) -> None:
        welcome = session.welcome
        assert welcome is not None
        self.credentials.accepted()
        slot.session = session
        slot.reason = slot.told = ""
        slot.since = time.time()
        slot.up_at = trio.current_time()
        slot.searches = 0
        self._log.info(
            "session_opened", agent=self.agent_id, broker=welcome.node, host=welcome.host, epoch=str(welcome.epoch),
            ps=f"{welcome.ip}:{welcome.port}", redundancy=self.redundancy,
            open_ports=[f"{p.port}->{p.ip}:{p.target_port}" for p in welcome.open_ports],
        )  # fmt: skip
        for notice in welcome.notices:
            self._log.warning("broker_notice_received", agent=self.agent_id, broker=welcome.node, notice=notice)
        if self.one_host != self._one_host:
            self._one_host = self.one_host
            if self._one_host:
                self._log.warning(
                    "on_one_host", agent=self.agent_id, host=self._one_host, redundancy=self.redundancy,
                    reason="the VIP led to no other host",
                )  # fmt: skip

    def _empty(self, slot: Slot, watch: Watch) -> None:
        session, slot.session = slot.session, None
        assert session is not None
        if watch.down.is_set():
            slot.reason = str(watch.outcome.lost)
            self._log_down(session, watch.outcome.lost)
        else:
            watch.retired = True
            slot.reason = f"{session.node} is draining"
            self._log.warning(
                "session_drain_started", agent=self.agent_id, broker=session.node, epoch=session.epoch,
                reason=slot.reason, redundancy=self.redundancy,
            )  # fmt: skip

    def _log_down(self, session: AgentSession, lost: Lost) -> None:
        """Log the end of a session that was up, once."""
        self._log.warning(
            "session_ended", agent=self.agent_id, broker=session.node, epoch=session.epoch, cause=lost.kind.value,
            reason=str(lost), streams_cut=session.link.cut if session.link is not None else 0,
            redundancy=self.redundancy,
        )  # fmt: skip

    async def _wait(self, slot: Slot, outcome: Outcome) -> None:
        """Wait before the next dial: a moment while the slot looks for another node, longer after a
        failure.
        """
        duplicate = outcome.code is Refusal.DUPLICATE_NODE
        reason = str(outcome.lost)
        # A session on another node proves that the VIP works. Then a refused connection is one node
        # behind it that is down, and a draining node may stay behind it for a moment.
        gone = outcome.lost.kind is LostKind.UNREACHED or outcome.code is Refusal.DRAINING
        if duplicate or (gone and self.up):
            slot.searches += 1
            late = slot.searches - QUICK_REDIALS - ANY_HOST_REDIALS
            if late <= 0:
                slot.reason = "looking for another node" if duplicate else reason
                await trio.sleep(random.uniform(0, QUICK_JITTER))  # noqa: S311
                return
            if duplicate:
                reason = f"the VIP leads to the same node each time ({reason})"
            cap = min(SLOW_REDIAL, self.config.backoff_cap)
            pause = min(cap, QUICK_JITTER * 2.0 ** min(late, 16)) * random.uniform(0.5, 1.0)  # noqa: S311
        else:
            pause = self._next_backoff(slot)
        if reason != slot.told:
            slot.told = reason
            self._log.warning(
                "session_not_opened",
                agent=self.agent_id,
                slot=slot.number + 1,
                reason=reason,
                redundancy=self.redundancy,
            )
        slot.reason = reason
        if outcome.lost.kind is LostKind.CERTIFICATE_REFUSED and self._complaints.take_turn():
            await self._complain(str(outcome.lost))
        await trio.sleep(pause)

    async def _complain(self, fault: str) -> None:
        """Tell a broker that this agent's certificate was rejected."""
        hello = self._hellos.complain(self.addresses, self.lost_addresses, fault)
        await self._complaints.send(hello, self.credentials.tls)
        self._log.info("complaint_sent", agent=self.agent_id, reason=fault)

    def _next_backoff(self, slot: Slot) -> float:
        """Return the seconds of this slot's next pause (full jitter), and double the
        one after it.
        """
        pause = random.uniform(0, slot.backoff)  # noqa: S311
        slot.backoff = min(self.config.backoff_cap, slot.backoff * 2)
        return pause

    # One dial.

    async def _dial(self, slot: Slot) -> Watch:
        """Dial until there is a session, or no link is left; return the last link.

        While an address is silent, the next one is dialled beside it.
        """
        race = Race[Watch]()
        try:
            watch = await self._begin(race)
            while race:
                news = await race.next()
                if news is None:
                    slot.reason = "the brokers that were dialled are silent"
                    if not race.full:
                        watch = await self._begin(race)
                    continue
                watch = news
                if not watch.settled.is_set():
                    await self._greet(slot, watch)
                if watch.outcome.session is not None:
                    break
            return watch
        finally:
            race.end()

    async def _begin(self, race: Race[Watch]) -> Watch:
        """Dial the next address for this race."""
        watch = Watch()
        if self._stopping:
            return watch
        try:
            address = await self._dialler.brokers.next()
        except OSError as error:
            watch.outcome = Outcome(lost=Lost(LostKind.NO_ADDRESS, str(error)))
            return watch
        secret = b"" if self._hellos.token is None else self._hellos.token.secret
        session = watch.session = AgentSession(self, None, secret, self.config.handshake_timeout)
        self._watches[session] = watch
        watch.presented = self.identity
        race.add(watch, lambda: self.bridge.relay.call(lambda: session.end("another broker was faster")))

        def failed(lost: Lost) -> None:
            self.bridge.post(self._gone, session, Outcome(lost=lost))

        self._dialler.dial(session, address, self.credentials.tls.sessions, failed)
        return watch

    async def _ask(self, request: Enrol) -> Enrolled:
        return await self._dialler.ask(request, self.credentials.tls.enrolments)

    async def _greet(self, slot: Slot, watch: Watch) -> None:
        """Send the Hello and wait for its answer; other slots wait with theirs."""
        session = watch.session
        assert session is not None
        try:
            async with self._greeting:
                if missing := "the agent stops" if self._stopping else self._own.missing:
                    self.bridge.relay.call(lambda: session.end(missing))
                else:
                    hello = self._hello(slot)
                    self.bridge.relay.call(lambda: session.greet(hello))
                await watch.settled.wait()
        except BaseException:
            self.bridge.relay.call(lambda: session.end("the agent stops"))
            raise

    def _hello(self, slot: Slot) -> Hello:
        nodes = {session.node for session in self._watches if session.welcome is not None}
        hosts: set[str] = set()
        if slot.searches < QUICK_REDIALS:
            # Only hosts of sessions that stay: a draining node's host may serve the next session.
            stays = [other.session.welcome for other in self.slots if other.session is not None]
            hosts = {welcome.host for welcome in stays if welcome is not None}
        return self._hellos.make(self.addresses, self.lost_addresses, nodes, hosts)

    # The configuration file: `agent.exposes` may change.

    def _watched_file(self) -> Watched:
        return Watched("config", [Path(self._whole.file)], self._reread, self._put_config)

    def _reread(self) -> Config:
        try:
            return reread(self._whole)
        except ConfigError as error:
            raise TrustError("; ".join(map(str, error.problems))) from None

    async def _put_config(self, config: Config) -> dict[str, object]:
        """Apply `agent.exposes` to new streams, open ones and brokers; other keys need
        a restart.
        """
        others = [key for key in changed(self._whole, config) if key != "agent.exposes"]
        self.config.exposes = config.agent.exposes
        now = exposed(self.config)
        sessions = list(self._watches)

        ended = await self.bridge.run(lambda: self.targets.expose(now))
        self._tell_update(sessions)
        said: dict[str, object] = {"exposes": self.config.exposes, "streams_ended": ended}
        return said | {"needs_restart": others} if others else said

    def _tell_update(self, sessions: list[AgentSession]) -> None:
        """Tell the brokers of these sessions what the agent exposes and answers for now."""
        ports, addresses = self.targets.exposed.ports, list(self.addresses)

        def tell() -> None:
            for session in sessions:
                session.expose(ports, addresses)

        self.bridge.relay.call(tell)

    # The host's addresses.

    async def _follow_addresses(self) -> None:
        """Check at intervals which of its addresses this host has, and apply changes."""
        # from the start; `address_lost` and `address_found` tell of changes
        for address in self._own.lost:
            self._log.warning(
                "address_not_found", agent=self.agent_id, address=address,
                reason="this host does not have it: add it to an interface, or change agent.addresses",
            )  # fmt: skip
        ask_until = 0.0
        while True:
            await trio.sleep(self.config.address_check)
            before = self.addresses
            if self._own.look():
                ask_until = trio.current_time() + ASK_AGAIN
                await self._put_addresses(before)
            elif trio.current_time() < ask_until and self.addresses:
                self._tell_update(list(self._watches))

    async def _put_addresses(self, before: tuple[str, ...]) -> None:
        """Apply a change of addresses to streams, brokers and the certificate."""
        now = self.addresses
        ended = await self.bridge.run(lambda: self.targets.answer_for(frozenset(now)))
        for address in before:
            if address not in now:
                self._log.warning(
                    "address_lost", agent=self.agent_id, address=address, streams_ended=ended,
                    reason="this host does not have it any more: it is given back",
                )  # fmt: skip
        for address in now:
            if address not in before:
                self._log.info("address_found", agent=self.agent_id, address=address)
        self.credentials.moved()
        sessions = list(self._watches)
        if set(before) & set(now):
            self._tell_update(sessions)
        else:  # no address of these sessions is left
            await self.bridge.run(lambda: _say_goodbye(sessions, "the agent's addresses have changed"))

    # Revoked brokers.

    async def _leave_revoked_brokers(self) -> None:
        while True:
            await self.credentials.changed(math.inf)
            for session in list(self._watches):
                self._left_revoked_broker(session)

    # Drain.

    def _covered(self, since: float) -> bool:
        """Return whether the agent may leave a node that drains since then: other sessions serve
        its targets.
        """
        waited = trio.current_time() - since
        searched = all(slot.searches >= QUICK_REDIALS + ANY_HOST_REDIALS for slot in self.slots if slot.session is None)
        enough = DRAIN_GRACE if searched else LONG_DRAIN_GRACE
        return self.up == len(self.slots) or (self.up > 0 and waited >= enough)

    async def _leave_draining_nodes(self) -> None:
        """End sessions of draining nodes that have no streams, when a replacement is up or none can
        be found.
        """
        while True:
            await trio.sleep(0.1)
            for session, since in list(self.draining.items()):
                if session.streams == 0 and self._covered(since):
                    await self.bridge.run(lambda s=session: _say_goodbye([s]))  # type: ignore[misc]


def _say_goodbye(sessions: list[AgentSession], why: str = "the agent leaves") -> None:
    for session in sessions:
        session.leave(why)
