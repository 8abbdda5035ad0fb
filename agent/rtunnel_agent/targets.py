"""Checks Dials of brokers, and connects streams to targets. In the relay's thread."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace
from structlog.typing import FilteringBoundLogger

from rtunnel import __version__
from rtunnel.config import AgentConfig, format_endpoint, host_name, parse_endpoint, parse_exposes, split_exposes
from rtunnel.counts import StreamCounts, StreamPermit
from rtunnel.logs import debugging
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Attempt, Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire.dial import DialReceiver
from rtunnel.wire.messages import AgentHop, DialBody, MessageError
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_agent.handshake import AgentSession
from rtunnel_agent.proof import Prover
from rtunnel_agent.ways import interface_to, own_address

#: Seconds of a connect after which the agent says Dialling, so that no gateway takes a slow target
#: for a failed path.
DIALLING_AFTER: Final = 0.1
#: Seconds for a stream's Dial. A broker sends it with the stream's first frame.
DIAL_DEADLINE: Final = 10.0
#: Characters in a trace of why the agent is not ready: an `Id` of the wire has as many.
MAX_DOUBT: Final = 128

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Exposed:
    """The addresses and ports to which streams may lead."""

    ports: list[str]  # as the Hello has them
    direct: Ranges = ()  # at the agent's addresses
    loopback: Ranges = ()  # on this host's loopback, for Dials to any of the agent's addresses
    published: frozenset[tuple[str, int]] = frozenset()

    def way(self, ip: str, port: int) -> str | None:
        """Return the address to connect to, or None when the target is not exposed."""
        if _within(port, self.loopback):
            return "::1" if ":" in ip else "127.0.0.1"
        return ip if _within(port, self.direct) or (ip, port) in self.published else None


def exposed(config: AgentConfig) -> Exposed:
    """Return what this configuration exposes and publishes."""
    direct, loopback = split_exposes(config.exposes)
    published = frozenset(parse_endpoint(entry.target) for entry in config.publish)
    return Exposed([*direct, *loopback], parse_exposes(direct), parse_exposes(loopback), published)


def _within(port: int, ranges: Ranges) -> bool:
    for first, last in ranges:  # noqa: SIM110 - any() over a generator takes twice as long
        if first <= port <= last:
            return True
    return False


class Targets:
    """The targets that this agent exposes, and the counts of its streams."""

    def __init__(
        self,
        relay: Relay,
        config: AgentConfig,
        addresses: frozenset[str],
        log: FilteringBoundLogger,
    ) -> None:
        """Answer for these addresses, and expose what the configuration says."""
        self.relay = relay
        self.log = log
        self.namespace = config.namespace
        self.agent_id = config.agent_id or host_name()  # for traces
        self.addresses = addresses
        self.exposed = exposed(config)
        self.timeout = config.target_timeout  # seconds for a connect to a target
        self._debugging = debugging()
        self.prover: Prover | None = None  # by the identity in force
        self.doubt: Callable[[], str] = str  # why the agent is not ready, for traces
        self.counts = StreamCounts()

    def log_end(self, served: Served, account: Account) -> None:
        """Log the end of a stream, at level debug."""
        if self._debugging:
            self.log.debug(
                "stream_served", reason=str(account.ending), who=served.who,
                target=format_endpoint(served.ip, served.port), node=served.session.node, bytes_up=account.up,
                bytes_down=account.down, seconds=round(account.seconds, 3),
            )  # fmt: skip

    def expose(self, exposed: Exposed) -> int:
        """Expose this from now on. Return how many streams, to other targets, were ended."""
        self.exposed = exposed
        return self._end_not_allowed()

    def answer_for(self, addresses: frozenset[str]) -> int:
        """Answer for these addresses from now on. Return how many streams, to others,
        were ended.
        """
        self.addresses = addresses
        return self._end_not_allowed()

    def _end_not_allowed(self) -> int:
        reviewed = [(pair, pair.owner.review()) for pair in self.relay.pairs]
        ends = [(pair, ending) for pair, ending in reviewed if ending is not None]
        for pair, ending in ends:
            pair.abort(ending)
        return len(ends)

    def check(self, body: DialBody, session: AgentSession) -> str:
        """Return the address to connect to for a Dial.

        Raises Refused unless it is for this agent, for this session, and for an exposed target.
        """
        if body.namespace != self.namespace or body.ip not in self.addresses:
            raise Refused(Refusal.STALE_TARGET, f"{body.namespace}/{body.ip} is not this agent's address")
        welcome = session.welcome
        if welcome is None or body.epoch != welcome.epoch or body.node != welcome.node:
            raise Refused(Refusal.STALE_EPOCH, "the Dial is for another session of this agent")
        memory = self.relay.memory
        if memory.full:
            text = f"the agent holds {memory.held >> 20} MiB for streams that stall, its limit (agent.stream_memory)"
            raise Refused(Refusal.OVERLOADED, text)
        way = self.exposed.way(body.ip, body.port)
        if way is None:
            raise Refused(Refusal.NOT_EXPOSED, f"the agent does not expose port {body.port}")
        return way


@dataclass(slots=True)
class Served:
    """The owner of a pair at the agent: where its stream leads, and for whom."""

    targets: Targets
    session: AgentSession
    ip: str
    port: int
    way: str
    who: str  # the client, in the words of the gateway or the open port
    began: float  # when the connect began, by the loop's clock
    permit: StreamPermit | None = None  # once the target is connected

    def review(self) -> Ending | None:
        """Check that the address is still this agent's, and the port exposed as before."""
        targets = self.targets
        allowed = self.ip in targets.addresses and targets.exposed.way(self.ip, self.port) == self.way
        return None if allowed else Ending.NOT_ALLOWED

    def ended(self, account: Account) -> None:
        if self.permit is not None:
            self.permit.release(account)
        self.targets.log_end(self, account)


class IncomingStream:
    """The handler of one stream from a broker, until it is joined."""

    __slots__ = ("_attempt", "_dial", "_late", "_served", "_session", "_stream", "_targets")

    def __init__(self, targets: Targets, session: AgentSession, stream: StreamEnd) -> None:
        self._targets = targets
        self._session = session
        self._stream = stream
        self._dial = DialReceiver()
        self._served: Served | None = None
        self._attempt: Attempt | None = None
        self._late: Timer | None = None
        stream.set_handler(self, DIAL_DEADLINE)

    def received(self, data: bytes) -> None:
        try:
            for event in self._dial.receive(data):
                self._connect(event.body, self._targets.check(event.body, self._session))
        except MessageError as error:
            self._refuse(Refused(Refusal.PROTOCOL_ERROR, str(error)))
        except Refused as error:
            self._refuse(error)

    def _connect(self, body: DialBody, way: str) -> None:
        self._stream.pause()
        relay = self._targets.relay
        self._served = Served(self._targets, self._session, body.ip, body.port, way, body.who, relay.loop.now)
        # From the target's own address: a host that has lost it must not dial the one that has it
        # now.
        source = way if way == body.ip else ""
        self._attempt = relay.connect(way, body.port, self._targets.timeout, self._connected, source=source)
        if self._attempt.pending:
            self._late = relay.loop.after(DIALLING_AFTER, self._say_dialling)

    def _say_dialling(self) -> None:
        self._stream.write(self._dial.dialling())

    def _connected(self, target: SocketEnd | None, code: Refusal, why: str) -> None:
        failed = 0 if target is not None or self._attempt is None else self._attempt.errno
        self._stop()
        if target is None:
            self._refuse(Refused(code, why), failed)
            return
        served, targets = self._served, self._targets
        assert served is not None
        if served.review() is not None:
            target.abort()
            text = f"the agent does not expose {served.ip}, port {served.port} any more"
            self._refuse(Refused(Refusal.NOT_EXPOSED, text))
            return
        served.permit = StreamPermit(targets.counts, self._session)
        self._stream.write(self._dial.accept(targets.prover, self._hop(target)))
        targets.relay.join(self._stream, target, up=self._dial.rest, owner=served)

    def finished(self) -> None:
        """Refuse the stream: its FIN came before a whole Dial."""
        self._refuse(Refused(Refusal.PROTOCOL_ERROR, "the stream ended before a whole Dial"))

    def lost(self, lost: Lost) -> None:
        """Cancel the connect: the stream is lost."""
        self._stop()

    def _hop(self, target: SocketEnd | None = None, failed: int = 0) -> AgentHop | None:
        """Return what the agent sees of a Dial that asks for a trace, else None.

        `target`: the connected end; `failed`: the errno of the connect.
        """
        body, served, targets = self._dial.body, self._served, self._targets
        if body is None or not body.trace:
            return None
        doubt = targets.doubt()[:MAX_DOUBT]
        hop = AgentHop(targets.agent_id, int(time.time() * 1000), __version__, doubt=doubt)
        if served is None:
            return hop
        interface, local = interface_to(served.way)
        return replace(
            hop, way=served.way, interface=interface, local=local, connect=targets.relay.loop.now - served.began,
            source="" if target is None else own_address(target.sock), errno=errno.errorcode.get(failed, ""),
        )  # fmt: skip

    def _refuse(self, refused: Refused, failed: int = 0) -> None:
        self._stop()
        hop = self._hop(failed=failed)
        self._targets.counts.refuse(refused.code)
        body = self._dial.body
        self._targets.log.info(
            "dial_refused", code=refused.code.value, reason=refused.text, who=body.who if body else "",
            target=format_endpoint(body.ip, body.port) if body else "", node=self._session.node,
        )  # fmt: skip
        self._stream.write(self._dial.refuse(refused, self._targets.prover, hop=hop))
        self._stream.close()

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.cancel()
