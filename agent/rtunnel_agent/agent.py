"""The agent keeps `redundancy` sessions on different nodes and hosts behind a VIP that gives it no choice of either.

Each slot dials; a broker on whose node, or host, the agent already sits refuses with `duplicate_node`, and the slot
redials at once from a new source port. Connections and TLS are made beside each other, so that a silent address keeps
nobody from another; one slot says its Hello at a time, so that what the Hello says about held nodes is true.
"""

from __future__ import annotations

import math
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

import rtunnel
from rtunnel.bridge import Bridge
from rtunnel.config import (
    AgentConfig,
    Config,
    ConfigError,
    changed,
    format_endpoint,
    host_name,
    parse_endpoint,
    parse_exposes,
    reread,
    split_exposes,
)
from rtunnel.errors import TrustError
from rtunnel.logs import get_logger
from rtunnel.relay.ends import EndHandler, SocketEnd
from rtunnel.relay.link import Link, LinkOwner
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.memory import START_WINDOW
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.trust.keys import Token, load_token
from rtunnel.watch import Watched, watch
from rtunnel.wire import messages
from rtunnel.wire.messages import Enrol, Enrolled, Hello, Publish, Refuse
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_agent.addresses import OwnAddresses
from rtunnel_agent.brokers import Brokers
from rtunnel_agent.handshake import AgentSession, Enrolment, new_nonce
from rtunnel_agent.host import host_id
from rtunnel_agent.identity import AgentIdentity, Credentials
from rtunnel_agent.proof import Prover
from rtunnel_agent.race import Asked, Outcome, Race, Watch
from rtunnel_agent.targets import Exposed, IncomingStream, Targets

#: A VIP picks the node, so finding another one takes some dials: each may lead to a node that is held
#: (`duplicate_node`) or to one that is dead and still behind the VIP (refused). So many follow each other closely; with
#: 3 nodes of which only one is of use, that is enough in 99.2 % of all cases.
QUICK_REDIALS: Final = 12
#: So long it insists on another *host*. Then there may be only one: so many more, as closely, to any other node.
ANY_HOST_REDIALS: Final = 6
QUICK_JITTER: Final = 0.05
#: Then the pauses double, up to this or `backoff_cap` (seconds, with jitter): what an agent that the VIP pins to one
#: node goes on with.
SLOW_REDIAL: Final = 10.0
#: With one session left, an agent leaves a draining node after so many seconds: when the search has shown that there is
#: no other node to be had, and when it could not show anything.
DRAIN_GRACE: Final = 2.0
LONG_DRAIN_GRACE: Final = 10.0
BACKOFF_FIRST: Final = 0.25
#: Without a certificate no slot dials; each looks so often whether there is one by now.
LOOK_SECONDS: Final = 1.0
#: So many seconds after a change of this host's addresses the agent tells its brokers again at each look: the host
#: that had a new address may give it back later.
ASK_AGAIN: Final = 60.0
#: Between two trust lists of one broker.
NEWS_PAUSE: Final = 1.0
#: A session that lasted so many seconds has proved the path: backoff starts anew. After a shorter one the
#: slot waits: a broker that ends each session at once, or a second host with this identity, is not dialled
#: without a pause (two such hosts replaced each other's session 14 times a second).
STABLE: Final = 60.0


@dataclass(eq=False)
class Slot:
    """One wanted session."""

    number: int
    session: AgentSession | None = None
    reason: str = "not dialled yet"  # why there is none; empty when there is
    told: str = ""  # the reason that the log has
    since: float = 0.0  # when the session came up, for people: seconds since 1970
    up_at: float = 0.0  # the same by the monotonic clock
    searches: int = 0  # dials that led to a node or host that is held, dead or draining, since the last session
    backoff: float = BACKOFF_FIRST


class Agent:
    """One agent process."""

    def __init__(self, config: Config) -> None:
        agent = config.agent
        self._whole = config
        self.config: AgentConfig = agent
        self.agent_id = agent.agent_id or host_name()
        self._own = OwnAddresses(agent.addresses)
        self.slots = [Slot(number) for number in range(agent.redundancy)]
        self.draining: dict[AgentSession, float] = {}  # since when (monotonic)
        self.relay = Relay(self.report, f"relay-{self.agent_id}", memory=agent.stream_memory << 20)
        self._log = get_logger("agent").bind()
        self.targets = Targets(
            self.relay, agent.namespace, frozenset(self._own.present), exposed(agent), agent.target_timeout, self._log
        )
        self._publish = [_publish(entry.target, entry.port, entry.allow) for entry in agent.publish]
        self._token: Token | None = load_token(Path(agent.join_token)) if agent.join_token else None
        self._watches: dict[AgentSession, Watch] = {}
        self.credentials = Credentials(
            agent, self.agent_id, self._own.wanted, ask=self._ask, put=self._put_identity, log=self._log
        )
        self._instance = new_nonce()
        self._host_id = host_id(agent.identity)
        self._greeting = trio.Lock()  # from a Hello until its answer
        self._brokers = Brokers(agent.brokers, self._log)
        self._stopping = False
        self._one_host = ""  # told in the log
        self.bridge = Bridge(self.relay)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those that the agent answers for at present."""
        return self._own.present

    @property
    def lost_addresses(self) -> tuple[str, ...]:
        """Those that it should answer for, and this host does not have."""
        return self._own.lost

    @property
    def identity(self) -> AgentIdentity | None:
        """The newest certificate and its key; None: the agent has none."""
        prover = self.targets.prover
        return None if prover is None else prover.identity

    def _put_identity(self, identity: AgentIdentity) -> None:
        self.targets.prover = Prover(identity)
        for session in list(self._watches):
            self._go_over(session, identity)

    def _go_over(self, session: AgentSession, identity: AgentIdentity) -> None:
        """The session is to last longer than the CA of the certificate that its link has shown."""
        if self.credentials.by_certificate:
            self.relay.call(lambda: session.go_over(self.targets.exposed.ports, identity.certificate, identity.key))

    # What sessions call, in the relay's thread.

    def session_ready(self, session: AgentSession) -> None:
        self.bridge.post(self._ready, session)

    def session_up(self, session: AgentSession) -> None:
        self.bridge.post(self._settle, session, Outcome(session=session))

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        explained = Lost(lost.kind, self._explained(session, code, lost))
        self.bridge.post(self._gone, session, Outcome(code=code, lost=explained))

    def _explained(self, session: AgentSession, code: Refusal | None, lost: Lost) -> str:
        """Return the reason with the keys to look at, where the two ends cannot tell each other."""
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
        """Of many in a short time the last one counts: a broker must not fill our memory and log."""
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
        """What the relay has to say: never good news."""
        self._log.error(event, agent=self.agent_id, **fields)

    # The same, arrived in trio's thread.

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
            self._tell_update([session])  # they changed meanwhile
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
        self.draining.pop(session, None)
        if outcome.code is Refusal.REVOKED:
            self.credentials.revoked()
        if watch is not None:
            watch.outcome = outcome
            watch.retire.set()
            watch.down.set()
            watch.settle()

    def _retire(self, session: AgentSession) -> None:
        watch = self._watches.get(session)
        if watch is not None:
            self.draining[session] = trio.current_time()
            watch.retire.set()

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Agent] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `stop`; started when it begins to dial."""
        async with self.bridge.running(), trio.open_nursery() as nursery:
            await nursery.start(self._brokers.run)
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
        """How many of the wanted sessions are up: "1/2"."""
        return f"{self.up}/{len(self.slots)}"

    @property
    def up(self) -> int:
        """Return the number of wanted sessions that are up."""
        return sum(slot.session is not None for slot in self.slots)

    @property
    def state(self) -> str:
        """ready (all sessions up), degraded (some) or down (none)."""
        return "ready" if self.up == len(self.slots) else "degraded" if self.up else "down"

    @property
    def one_host(self) -> str:
        """The host that all sessions are on, when there are several and should be several hosts; else empty."""
        welcomes = [slot.session.welcome for slot in self.slots if slot.session is not None]
        hosts = {welcome.host for welcome in welcomes if welcome is not None}
        return hosts.pop() if len(welcomes) > 1 and len(hosts) == 1 else ""

    def reasons(self) -> list[str]:
        """Why it is not ready; empty when it is."""
        missing = self.credentials.missing
        identity = [f"identity: {missing}"] if missing else []
        lost = [f"address {address}: this host does not have it" for address in self._own.lost]
        empty = [f"session {slot.number + 1}: {slot.reason}" for slot in self.slots if slot.session is None]
        return identity + lost + empty

    async def answered(self) -> None:
        await self.bridge.answered()

    async def _drain(self) -> None:
        """Say goodbye to the brokers when the streams are done, or the deadline has come."""
        self._stopping = True
        with trio.move_on_after(self.config.drain):
            while self.targets.counts.streams:
                await trio.sleep(0.05)
        sessions = list(self._watches)
        cut = self.targets.counts.streams  # the links take them along
        await self.bridge.run(lambda: _say_goodbye(sessions))
        self._log.info("agent_stopped", agent=self.agent_id, streams_cut=cut)

    # One slot.

    async def _keep(self, slot: Slot) -> None:
        while True:
            while missing := self._own.missing or self.credentials.missing:
                slot.reason = missing
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
            "session_up", agent=self.agent_id, broker=welcome.node, host=welcome.host, epoch=str(welcome.epoch),
            ps=f"{welcome.ip}:{welcome.port}", redundancy=self.redundancy,
            open_ports=[f"{p.port}->{p.ip}:{p.target_port}" for p in welcome.open_ports],
        )  # fmt: skip
        for notice in welcome.notices:
            self._log.warning("broker_notice", agent=self.agent_id, broker=welcome.node, notice=notice)
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
        slot.reason = f"{session.node} is draining" if not watch.down.is_set() else str(watch.outcome.lost)
        self._log.warning(
            "session_down" if watch.down.is_set() else "session_draining",
            agent=self.agent_id, broker=session.node, reason=slot.reason, redundancy=self.redundancy,
        )  # fmt: skip

    async def _wait(self, slot: Slot, outcome: Outcome) -> None:
        """Before the next dial: a moment while the search for another node is young, full jitter after a failure."""
        duplicate = outcome.code is Refusal.DUPLICATE_NODE
        reason = str(outcome.lost)
        # A session elsewhere proves that the VIP works: then a refused connection is just one dead node behind it, and
        # a draining one may still be there for a moment.
        gone = outcome.lost.kind is LostKind.UNREACHED or outcome.code is Refusal.DRAINING
        if duplicate or (gone and self.up):
            slot.searches += 1
            late = slot.searches - QUICK_REDIALS - ANY_HOST_REDIALS
            if late <= 0:
                slot.reason = "looking for another node" if duplicate else reason
                await trio.sleep(random.uniform(0, QUICK_JITTER))  # noqa: S311
                return
            if duplicate:
                reason = f"the VIP leads to the same node again and again ({reason})"
            cap = min(SLOW_REDIAL, self.config.backoff_cap)
            pause = min(cap, QUICK_JITTER * 2.0 ** min(late, 16)) * random.uniform(0.5, 1.0)  # noqa: S311
        else:
            pause = self._next_backoff(slot)
        if reason != slot.told:
            slot.told = reason
            self._log.warning(
                "no_session", agent=self.agent_id, slot=slot.number + 1, reason=reason, redundancy=self.redundancy
            )
        slot.reason = reason
        await trio.sleep(pause)

    def _next_backoff(self, slot: Slot) -> float:
        """Return the seconds of this slot's next pause (full jitter), and double the one after it."""
        pause = random.uniform(0, slot.backoff)  # noqa: S311
        slot.backoff = min(self.config.backoff_cap, slot.backoff * 2)
        return pause

    # One dial.

    async def _dial(self, slot: Slot) -> Watch:
        """Dial until there is a session, or no link is under way any more; return the last one that was over.

        Beside an address that is silent the next one is dialled.
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
            host, port = await self._brokers.next()
        except OSError as error:
            watch.outcome = Outcome(lost=Lost(LostKind.NO_ADDRESS, str(error)))
            return watch
        secret = b"" if self.credentials.by_certificate or self._token is None else self._token.secret
        session = watch.session = AgentSession(self, None, secret, self.config.handshake_timeout)
        self._watches[session] = watch
        watch.presented = self.identity
        race.add(watch, lambda: self.bridge.relay.call(lambda: session.end("another broker was faster")))
        tls = self.credentials.context

        def failed(lost: Lost) -> None:
            self.bridge.post(self._gone, session, Outcome(lost=lost))

        self.bridge.relay.call(lambda: self._connect(session, host, port, tls, failed))
        return watch

    async def _greet(self, slot: Slot, watch: Watch) -> None:
        """Say the Hello and wait for its answer. No other slot does so meanwhile."""
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

    def _connect(
        self,
        owner: AgentSession | Enrolment,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        failed: Callable[[Lost], None],
    ) -> None:
        """In the relay's thread: a link for this owner; `failed` gets why there is none."""

        def connected(end: SocketEnd | None, code: Refusal, why: str) -> None:
            owner.attempt = None
            if end is None:
                failed(Lost(LostKind.UNREACHED, f"broker: {why}"))
            else:
                owner.link = self._make_link(owner, end, tls)

        owner.attempt = self.relay.connect(host, port, self.config.connect_timeout, connected)

    def _make_link(self, owner: LinkOwner, end: SocketEnd, tls: ssl.SSLContext | None) -> Link:
        return self.relay.link(
            end.sock,
            owner,
            peer=end.peer,
            client=True,
            tls=tls,
            server_name=self.config.server_name,
            handshake_timeout=self.config.handshake_timeout,
            watched=True,
        )

    async def _ask(self, request: Enrol) -> Enrolled:
        """Ask the first broker that takes a link for a certificate. Raises Refused, or OSError with a text.

        Beside an address that is silent the next one is dialled.
        """
        race = Race[Asked]()
        try:
            asked = await self._begin_to_ask(race, request)
            while race and isinstance(asked.answer, Lost):
                if (news := await race.next()) is not None:
                    asked = await self._answered(news)
                elif not race.full:
                    asked = await self._begin_to_ask(race, request)
        finally:
            race.end()
        answer = asked.answer
        if isinstance(answer, Refuse):
            raise Refused(Refusal.parse(answer.code), answer.text)
        if isinstance(answer, Lost):
            raise OSError(f"broker {asked.broker}: {answer}")
        return answer

    async def _begin_to_ask(self, race: Race[Asked], request: Enrol) -> Asked:
        """Dial the next address for this request. Raises OSError when none is known."""
        host, port = await self._brokers.next()
        asked = Asked(broker=format_endpoint(host, port))

        def done(answer: Enrolled | Refuse | Lost) -> None:
            self.bridge.post(self._put_answer, asked, answer)

        enrolment = Enrolment(request, lambda: self.bridge.post(asked.tell), done, self.config.handshake_timeout)
        asked.enrolment = enrolment
        race.add(asked, lambda: self.bridge.relay.call(lambda: enrolment.end("another broker was faster")))
        tls = self.credentials.anonymous
        self.bridge.relay.call(lambda: self._connect(enrolment, host, port, tls, done))
        return asked

    def _put_answer(self, asked: Asked, answer: Enrolled | Refuse | Lost) -> None:
        asked.answer = answer
        asked.settle()

    async def _answered(self, asked: Asked) -> Asked:
        """Send the request on a link that is up, and wait for the answer."""
        enrolment = asked.enrolment
        assert enrolment is not None
        try:
            self.bridge.relay.call(enrolment.ask)
            await asked.settled.wait()
        except BaseException:
            self.bridge.relay.call(lambda: enrolment.end("the agent stops"))
            raise
        return asked

    def _hello(self, slot: Slot) -> Hello:
        nodes = {session.node for session in self._watches if session.welcome is not None}
        hosts: set[str] = set()
        if slot.searches < QUICK_REDIALS:
            # Of sessions that stay: the host of a node that drains may well be the one to go back to.
            stays = [other.session.welcome for other in self.slots if other.session is not None]
            hosts = {welcome.host for welcome in stays if welcome is not None}
        return Hello(
            version=messages.VERSION,
            agent_id=self.agent_id,
            instance=self._instance,
            namespace=self.config.namespace,
            addresses=list(self.addresses),
            nonce=new_nonce(),
            token_id="" if self.credentials.by_certificate or self._token is None else self._token.id,
            exposes=self.targets.exposed.ports,
            publish=self._publish,
            holds=sorted(nodes),
            holds_hosts=sorted(hosts),
            software=f"rtunnel {rtunnel.__version__}",
            trust=self.credentials.generation,
            start_window=START_WINDOW,
            host_id=self._host_id,
            host=host_name()[:128],
        )

    # The configuration file: what it exposes may change.

    def _watched_file(self) -> Watched:
        return Watched("config", [Path(self._whole.file)], self._reread, self._put_config)

    def _reread(self) -> Config:
        try:
            return reread(self._whole)
        except ConfigError as error:
            raise TrustError("; ".join(map(str, error.problems))) from None

    async def _put_config(self, config: Config) -> dict[str, object]:
        """`exposes` counts at once, for new streams, open ones, and brokers; for the rest there is a restart."""
        others = [key for key in changed(self._whole, config) if key != "agent.exposes"]
        self.config.exposes = config.agent.exposes
        now = exposed(self.config)
        sessions = list(self._watches)

        ended = await self.bridge.run(lambda: self.targets.expose(now))
        self._tell_update(sessions)
        said: dict[str, object] = {"exposes": self.config.exposes, "streams_ended": ended}
        return said | {"needs_restart": others} if others else said

    def _tell_update(self, sessions: list[AgentSession]) -> None:
        """Tell the brokers what the agent exposes and answers for now."""
        ports, addresses = self.targets.exposed.ports, list(self.addresses)

        def tell() -> None:
            for session in sessions:
                session.expose(ports, addresses)

        self.bridge.relay.call(tell)

    # The host's addresses.

    async def _follow_addresses(self) -> None:
        """Look whether this host still has its addresses, and whether lost ones are back."""
        for address in self._own.lost:  # from the start; `address_lost` and `address_found` tell of changes
            self._log.warning(
                "address_missing", agent=self.agent_id, address=address,
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
        """Give lost addresses back and take new ones up, with the brokers and in the certificate."""
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
        self.credentials.answer_for(self._own.wanted)
        sessions = list(self._watches)
        if set(before) & set(now):
            self._tell_update(sessions)
        else:  # nothing of what these sessions stand for is left
            await self.bridge.run(lambda: _say_goodbye(sessions, "the agent's addresses have changed"))

    # Revoked brokers.

    async def _leave_revoked_brokers(self) -> None:
        while True:
            await self.credentials.changed(math.inf)
            for session in list(self._watches):
                self._left_revoked_broker(session)

    # Drain.

    def _covered(self, since: float) -> bool:
        """Whether nothing is lost by leaving a node that drains since then."""
        waited = trio.current_time() - since
        searched = all(slot.searches >= QUICK_REDIALS + ANY_HOST_REDIALS for slot in self.slots if slot.session is None)
        enough = DRAIN_GRACE if searched else LONG_DRAIN_GRACE
        return self.up == len(self.slots) or (self.up > 0 and waited >= enough)

    async def _leave_draining_nodes(self) -> None:
        """A draining node's session ends when its streams are done and a replacement is up, or none was to be had."""
        while True:
            await trio.sleep(0.1)
            for session, since in list(self.draining.items()):
                if session.streams == 0 and self._covered(since):
                    await self.bridge.run(lambda s=session: _say_goodbye([s]))  # type: ignore[misc]


def _say_goodbye(sessions: list[AgentSession], why: str = "the agent leaves") -> None:
    for session in sessions:
        session.leave(why)


def _publish(target: str, port: int, allow: list[str]) -> Publish:
    ip, target_port = parse_endpoint(target)
    return Publish(ip=ip, target_port=target_port, port=port, allow=allow)


def exposed(config: AgentConfig) -> Exposed:
    """What the agent exposes and publishes."""
    direct, loopback = split_exposes(config.exposes)
    published = frozenset(parse_endpoint(entry.target) for entry in config.publish)
    return Exposed([*direct, *loopback], parse_exposes(direct), parse_exposes(loopback), published)
