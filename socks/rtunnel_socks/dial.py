"""Dials one target for one client: tries its candidate tuples until one answers Accepted. In the
relay's thread.

When an attempt is silent for its path's hedge delay (`hedge`), the next candidate is tried beside
it, if the budget has a hedge left. The first proved Accepted wins, and the other attempts are
reset. A refusal about the target itself ends the dial; a stale tuple is forgotten; when no path
works, the refusal says what was tried.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

import msgspec

from rtunnel.clock import ClockWatch
from rtunnel.config import GatewayConfig, format_endpoint
from rtunnel.net import unordered
from rtunnel.registry import NodeRecord, Tuple
from rtunnel.registry.routes import RouteTable
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Attempt as Connecting
from rtunnel.relay.relay import Relay
from rtunnel.relay.tls import TlsEnd
from rtunnel.trust.certificates import BROKER_NAME
from rtunnel.trust.identity import Identity
from rtunnel.trust.keys import GatewayKey
from rtunnel.wire import messages
from rtunnel.wire.dial import DialAccepted, DialRefused, DialSender
from rtunnel.wire.messages import Accepted, AgentHop, DialBody, Hop, MessageError, Refuse
from rtunnel.wire.refusal import Next, Refusal, Refused
from rtunnel_socks.hedge import Hedging, Path
from rtunnel_socks.proof import Known
from rtunnel_socks.resources import Sources
from rtunnel_socks.trust import GatewayTrust

#: Seconds for which a node that did not answer is tried after the others.
SUSPECT_SECONDS: Final = 10.0
#: Attempts of one dial: an agent has no more tuples than its redundancy, and one or two of nodes
#: that it leaves.
MAX_ATTEMPTS: Final = 6
#: Refusals of a connect that lacks something of this gateway: a source port, a descriptor, or
#: (STALE_TARGET) a source address that this host has lost. They make no node suspect.
_FAILS_HERE: Final = (Refusal.OVERLOADED, Refusal.STALE_TARGET)


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a request: namespace, IP and port."""

    namespace: str
    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class Phase(StrEnum):
    """How far an attempt came."""

    CONNECTING = "connecting"  # the broker has not taken the connection
    DIALLED = "dialled"  # the Dial was sent, and nobody has answered it
    DIALLING = "dialling"  # the agent has said that it connects the target
    ANSWERED = "answered"


#: The word of an attempt that had no answer when another one won, or when its dial ended.
NO_ANSWER: Final = "no_answer"
ACCEPTED: Final = "accepted"

_SILENCE: Final = {
    Phase.CONNECTING: "does not take the TCP connection",
    Phase.DIALLED: "took the connection, and no answer to the Dial came",
    Phase.DIALLING: "the agent was still connecting the target",
    Phase.ANSWERED: "answered",
}


class Tried(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt of a dial, for log lines and traces."""

    node: str
    ps: str
    agent: str
    epoch: str
    phase: str
    code: str  # ACCEPTED, NO_ANSWER or the code of its refusal
    ms: float  # from its begin to its end
    text: str = ""
    connect_ms: float | None = None  # until the broker had taken the connection
    answer_ms: float | None = None  # until the first answer, Dialling included
    broker: Hop | None = None  # in a trace: what the broker said
    at_agent: AgentHop | None = None  # in a trace: what the agent said
    proof: str = ""  # "ok": the agent has proved its answer
    unordered: int = 0  # in a trace: packets of the broker that came behind a lost one


def code_for_client(codes: Collection[Refusal]) -> Refusal:
    """Return the code of a dial whose paths have failed with these codes, and none is left."""
    alike = next(iter(codes)) if len(codes) == 1 else Refusal.AGENT_UNAVAILABLE
    return alike if alike.reply.passed_on else Refusal.AGENT_UNAVAILABLE


class Paths:
    """Nodes that did not answer this gateway lately, and its open streams by session."""

    def __init__(self) -> None:
        self._suspects: dict[str, float] = {}
        # streams by session: two nodes may give out the same epoch
        self._open: dict[tuple[str, int], int] = {}

    def order(self, tuples: Sequence[Tuple], nodes: Mapping[str, NodeRecord], now: float) -> list[Tuple]:
        """Return the tuples, the best first.

        Live nodes come before draining ones and these before nodes without a heartbeat; then nodes
        that are not suspect; then sessions with the fewest streams.
        """
        if len(tuples) < 2:
            return list(tuples)

        def rank(candidate: Tuple) -> tuple[int, bool, int, float]:
            node = nodes.get(candidate.node)
            return (
                2 if node is None else int(node.state != "live"),
                self._suspects.get(candidate.node, 0.0) > now,
                self._open.get((candidate.node, candidate.epoch), 0),
                random.random(),  # noqa: S311
            )

        return sorted(tuples, key=rank)

    def suspect(self, node: str, now: float) -> None:
        """Note that a node did not answer."""
        self._suspects[node] = now + SUSPECT_SECONDS

    def is_suspect(self, node: str, now: float) -> bool:
        """Return whether a node did not answer within the last SUSPECT_SECONDS."""
        return self._suspects.get(node, 0.0) > now

    def answered(self, node: str) -> None:
        """Note that a node has answered."""
        self._suspects.pop(node, None)

    def opened(self, used: Tuple) -> None:
        """Count a stream by this tuple."""
        session = used.node, used.epoch
        self._open[session] = self._open.get(session, 0) + 1

    def closed(self, used: Tuple) -> None:
        """Count the end of a stream by this tuple."""
        session = used.node, used.epoch
        left = self._open.get(session, 0) - 1
        if left > 0:
            self._open[session] = left
        else:
            self._open.pop(session, None)


def _ms(begin: float, end: float) -> float:
    return round((end - begin) * 1000, 2)


class DialOwner(Protocol):
    """The gateway, as a dial sees it."""

    relay: Relay
    paths: Paths
    table: RouteTable
    key: GatewayKey
    trust: GatewayTrust
    name: str
    hedging: Hedging
    clock: ClockWatch
    sources: Sources | None  # None: the kernel chooses
    config: GatewayConfig

    def forget(self, stale: Tuple) -> None:
        """Drop a stale tuple from the route table."""

    def log(self, event: str, **fields: object) -> None:
        """Write a log line."""

    def count_attempt(self, node: str, word: str) -> None:
        """Count an attempt by a node: ACCEPTED, NO_ANSWER or the code of its refusal."""

    def connect_failed_here(self, code: int) -> None:
        """Count a connect to a broker that failed with this errno because this gateway lacks
        something.
        """

    def not_proven(self, code: Refusal, fields: dict[str, object]) -> None:
        """Count and log an answer that is not proved to be of the target's agent."""


@dataclass(slots=True)
class Reached:
    """An accepted dial: the socket to the broker, bytes that came behind Accepted, and the tuple
    that it used.

    `connected`, `answered`: seconds from the begin of that attempt until the broker had taken the
    connection, and until the first answer. `tried`: all attempts, if there was more than one.
    """

    end: SocketEnd
    rest: bytes
    used: Tuple
    attempts: int
    identity: Identity | None  # of the agent that proved it; None without proofs
    certificate: bytes | None  # the broker's; None without TLS
    connected: float = 0.0
    answered: float = 0.0
    tried: Sequence[Tried] = ()


Done = Callable[[Reached | None, Refused | None], None]


@dataclass(eq=False, slots=True)
class TargetDial:
    """One dial. `done(reached, refused)` is called once, unless `cancel` comes first."""

    owner: DialOwner
    target: Target
    who: str
    done: Done | None
    trace: bool = False  # each hop shall say what it sees
    _tried: list[Attempt] = field(default_factory=list)
    _left: list[Tuple] = field(default_factory=list)
    _alive: list[Attempt] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _codes: set[Refusal] = field(default_factory=set)
    unproven: str = ""  # why the proof of an answer was not good
    _hedge: Timer | None = None
    _late: float = 0.0  # when half of the time is over: from then on a hedge needs no budget
    _held: bool = False  # a hedge had to wait for the budget
    _deadline: Timer | None = None

    def start(self, tuples: Sequence[Tuple]) -> None:
        """Try these tuples in the order of `Paths`."""
        loop = self.owner.relay.loop
        self._left = self.owner.paths.order(tuples, self.owner.table.nodes, loop.now)[:MAX_ATTEMPTS]
        self._deadline = loop.after(self.owner.config.dial_timeout, self._too_late)
        self._late = loop.now + self.owner.config.dial_timeout / 2
        self.owner.hedging.dialled()
        self._next()

    def cancel(self) -> None:
        """Reset all attempts; `done` is not called."""
        self.done = None
        self._clear()

    @property
    def attempts(self) -> int:
        """How many attempts have begun."""
        return len(self._tried)

    def tried(self) -> list[Tried]:
        """Return what was tried, in the order in which it began."""
        now = self.owner.relay.loop.now
        return [attempt.record(now) for attempt in self._tried]

    def _next(self) -> None:
        """Try the next candidate beside the running attempts; fail when there are neither."""
        self._stop_hedge()
        if self._left:
            attempt = Attempt(self, self._left.pop(0))
            self._tried.append(attempt)
            self._alive.append(attempt)
            if self._left:
                self._hedge_after(self.owner.hedging.delay(attempt.path))
            attempt.start()
        elif not self._alive:
            silence = self.owner.table.silence()
            text = f"no path works: {'; '.join(self._failures)}"
            self._fail(Refused(code_for_client(self._codes), f"{text}; {silence}" if silence else text))

    def _hedge_after(self, seconds: float) -> None:
        self._hedge = self.owner.relay.loop.after(seconds, self._silent)

    def _silent(self) -> None:
        """Hedge, if that is allowed: the newest attempt was silent for its path's hedge delay."""
        self._hedge = None
        if any(attempt.is_dialling for attempt in self._alive):
            # The path works and the target is slow: to dial it twice would not help. It is done
            # late all the same, because a faulty broker could say Dialling, too.
            self._hedge = self.owner.relay.loop.after(self.owner.config.dial_timeout / 2, self._next)
            return
        hedging = self.owner.hedging
        if self._may_hedge():
            hedging.sent += 1
            self._next()
        else:
            hedging.held += not self._held
            self._held = True
            # Ask again later: the budget grows, and the node may become suspect.
            self._hedge_after(hedging.delay(self._alive[-1].path))

    def _may_hedge(self) -> bool:
        """Return whether the next candidate may be tried beside the silent ones.

        Only few dials may, because hedges make an overload worse. A dial on a suspect node always
        may, and one with half of its time over.
        """
        now, paths = self.owner.relay.loop.now, self.owner.paths
        if any(paths.is_suspect(attempt.used.node, now) for attempt in self._alive):
            return True
        if now >= self._late:
            for attempt in self._alive:
                paths.suspect(attempt.used.node, now)
            return True
        return self.owner.hedging.spend()

    def heard(self, attempt: Attempt) -> None:
        """Take an attempt's first answer.

        Earlier attempts that are still silent make their nodes suspect.
        """
        loop = self.owner.relay.loop
        self.owner.hedging.answered(attempt.path, loop.now - attempt.began)
        for other in self._alive:
            if other is attempt:
                break
            if not other.heard and other.used.node != attempt.used.node:
                self.owner.paths.suspect(other.used.node, loop.now)

    def failed(self, attempt: Attempt, code: Refusal, text: str) -> None:
        """Take the failure of an attempt: end the dial, or try the next candidate."""
        self._alive.remove(attempt)
        attempt.close(code.value, text)
        told = code.reply.next
        if told is Next.STOP:
            self._fail(Refused(code, text))
            return
        self._failures.append(f"{attempt.used.node}: {code}: {text}")
        self._codes.add(code)
        self.owner.log(
            "tuple_failed", target=str(self.target), code=code.value, reason=text, node=attempt.used.node,
            ps=f"{attempt.used.ps_ip}:{attempt.used.ps_port}", epoch=str(attempt.used.epoch),
        )  # fmt: skip
        if told is Next.FORGET:
            self.owner.forget(attempt.used)
        elif code in (Refusal.BROKER_UNREACHABLE, Refusal.DIAL_TIMEOUT, Refusal.EXPIRED):
            self.owner.paths.suspect(attempt.used.node, self.owner.relay.loop.now)
        self._next()

    def not_proven(self, attempt: Attempt, refused: Refused) -> None:
        """Report an answer whose proof is not good: no fault of the network explains one."""
        self.unproven = refused.text
        self.owner.not_proven(
            refused.code,
            {
                "reason": refused.text, "target": str(self.target),
                "namespace": self.target.namespace, "node": attempt.used.node, "agent": attempt.used.agent_id,
                "ps": f"{attempt.used.ps_ip}:{attempt.used.ps_port}", "epoch": str(attempt.used.epoch),
            },
        )  # fmt: skip

    def won(self, attempt: Attempt, reached: Reached) -> None:
        """Take the first attempt that is accepted, and reset the others."""
        self._alive.remove(attempt)
        done, self.done = self.done, None
        self._clear()
        if done is None:
            reached.end.abort()
        else:
            done(reached, None)

    def _too_late(self) -> None:
        self._deadline = None
        if any(attempt.is_dialling for attempt in self._alive):
            self._fail(Refused(Refusal.TARGET_TIMEOUT, "the agent was still connecting the target"))
            return
        tried = "; ".join([*self._failures, *(attempt.silence() for attempt in self._alive)])
        self._fail(Refused(Refusal.DIAL_TIMEOUT, f"no answer within {self.owner.config.dial_timeout:g} s: {tried}"))

    def _fail(self, refused: Refused) -> None:
        done, self.done = self.done, None
        self._clear()
        if done is not None:
            done(None, refused)

    def _clear(self) -> None:
        self._stop_hedge()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        alive, self._alive = self._alive, []
        for attempt in alive:
            attempt.close(NO_ANSWER)
            if not attempt.heard:
                self.owner.hedging.given_up(attempt.path, self.owner.relay.loop.now - attempt.began)
            attempt.cancel()

    def _stop_hedge(self) -> None:
        if self._hedge is not None:
            self._hedge.cancel()
            self._hedge = None


class Attempt:
    """One candidate, from the connect to the answer: the handler of its socket."""

    __slots__ = (
        "_connecting", "_dial", "_end", "_known", "_unordered", "agent_hop", "answered", "began", "code", "connected",
        "dial", "ended", "heard", "proof", "text", "used",
    )  # fmt: skip

    def __init__(self, dial: TargetDial, used: Tuple) -> None:
        self.dial = dial
        self.used = used
        # Moments by the loop's clock; 0: not yet.
        self.began = self.connected = self.answered = self.ended = 0.0
        self.heard = False  # the node has answered something
        self.code = ""  # as of `Tried`; empty while it runs
        self.text = ""
        self.agent_hop: AgentHop | None = None
        self.proof = ""
        self._unordered = 0
        self._dial: DialSender[Identity] = DialSender(None if dial.owner.trust.proofs is None else self._verify)
        self._known: Known | None = None  # the agent that may prove its answer by MAC
        self._connecting: Connecting | None = None
        self._end: SocketEnd | None = None

    @property
    def path(self) -> Path:
        """The node and epoch by which `Hedging` knows the attempt's answer times."""
        return self.used.node, self.used.epoch

    @property
    def phase(self) -> Phase:
        """How far the attempt is, or came."""
        if not self.connected:
            return Phase.CONNECTING
        if self.answered and (not self.is_dialling or self.code not in ("", NO_ANSWER)):
            return Phase.ANSWERED
        return Phase.DIALLING if self.is_dialling else Phase.DIALLED

    def record(self, now: float) -> Tried:
        """Return what is known of the attempt at this moment of the loop's clock."""
        used, began = self.used, self.began
        return Tried(
            used.node, format_endpoint(used.ps_ip, used.ps_port), used.agent_id, str(used.epoch), self.phase.value,
            self.code or NO_ANSWER, _ms(began, self.ended or now), self.text,
            _ms(began, self.connected) if self.connected else None,
            _ms(began, self.answered) if self.answered else None,
            self._hop(), self.agent_hop, self.proof, self._unordered,
        )  # fmt: skip

    def _hop(self) -> Hop | None:
        hop = self._dial.hop
        return None if hop is None else msgspec.structs.replace(hop, padding=b"")

    def silence(self) -> str:
        """Return what the attempt still waits for, as a sentence."""
        used, waited = self.used, self.dial.owner.relay.loop.now - self.began
        where = format_endpoint(used.ps_ip, used.ps_port)
        return f"{used.node} ({where}): {_SILENCE[self.phase]} in {waited:.1f} s"

    def close(self, code: str, text: str = "") -> None:
        """Note how the attempt ended, and count it."""
        if self.dial.trace and self._end is not None:
            self._unordered = unordered(self._end.sock)
        self.code, self.text = code, text
        self.ended = self.dial.owner.relay.loop.now
        self.dial.owner.count_attempt(self.used.node, code)

    @property
    def is_dialling(self) -> bool:
        """Whether the node has said that the agent connects the target."""
        return self._dial.diallings > 0

    def start(self) -> None:
        """Connect to the guarded port."""
        # The connect has no timeout of its own, because the dial has one.
        self.began = self.dial.owner.relay.loop.now
        owner, ip = self.dial.owner, self.used.ps_ip
        source = "" if owner.sources is None else owner.sources.next(ip)
        self._connecting = owner.relay.connect(ip, self.used.ps_port, 0.0, self._connected, source=source)

    def cancel(self) -> None:
        """Reset the attempt, without a call of the dial."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._end is not None:
            self._end.abort()

    def _connected(self, end: SocketEnd | None, code: Refusal, why: str) -> None:
        connecting, self._connecting = self._connecting, None
        owner = self.dial.owner
        if end is None:
            if code in _FAILS_HERE:
                number = connecting.errno if connecting is not None else 0
                owner.connect_failed_here(number)
                begin = "this gateway has" if number == errno.EADDRNOTAVAIL else "this gateway can't connect:"
                self.dial.failed(self, Refusal.OVERLOADED, f"{begin} {why}")
            else:
                self.dial.failed(self, Refusal.BROKER_UNREACHABLE, why)
            return
        if owner.trust.dial_tls is not None:
            end = owner.relay.secure(end, owner.trust.dial_tls, alpn=messages.DIAL_ALPN, server_name=BROKER_NAME)
        self._end = end
        self.connected = owner.relay.loop.now
        end.set_handler(self)
        end.write(self._dial.dial(self._body(), owner.key))

    def _body(self) -> DialBody:
        target, used, proofs = self.dial.target, self.used, self.dial.owner.trust.proofs
        known = self._known = None if proofs is None else proofs.known(target.namespace, target.ip)
        return DialBody(
            version=messages.VERSION,
            namespace=target.namespace,
            ip=target.ip,
            port=target.port,
            node=used.node,
            epoch=used.epoch,
            nonce=os.urandom(messages.NONCE_BYTES),
            time=int(time.time() * 1000),
            who=self.dial.who,
            exchange=b"" if proofs is None else proofs.exchange,
            pair=b"" if known is None else known.pair.id,
            trace=self.dial.trace,
        )

    def _verify(self, answer: Accepted | Refuse, body: bytes) -> Identity:
        """Return the agent that gave this answer to the Dial with this body. Raises Refused."""
        proofs, target = self.dial.owner.trust.proofs, self.dial.target
        assert proofs is not None
        return proofs.check(answer, body, target.namespace, target.ip, self._known)

    def received(self, data: bytes) -> None:
        try:
            events = self._dial.receive(data)
        except MessageError as error:
            self._fail(Refusal.PROTOCOL_ERROR, str(error))
            return
        except Refused as error:
            self._unproven(error)
            return
        if events and not self.heard:
            self.heard = True
            self.dial.heard(self)
        for event in events:
            if not isinstance(event, Hop) and not self.answered:
                self.answered = self.dial.owner.relay.loop.now
            if isinstance(event, DialAccepted):
                self._accepted(event)
            elif isinstance(event, DialRefused):
                self._refused(event)

    def _unproven(self, refused: Refused) -> None:
        if not self.heard:
            self.heard = True
            self.dial.heard(self)
        self.dial.owner.paths.answered(self.used.node)
        self.dial.not_proven(self, refused)
        self._fail(refused.code, refused.text)

    def _refused(self, event: DialRefused) -> None:
        owner = self.dial.owner
        owner.paths.answered(self.used.node)
        self.agent_hop, self.proof = event.hop, "ok" if event.proven else ""
        if event.code is Refusal.EXPIRED:
            offset = time.time() - event.time / 1000 if event.time else None
            owner.clock.differs(f"broker {self.used.node}", offset, time.monotonic())
        self._fail(event.code, event.text)

    def _accepted(self, event: DialAccepted[Identity]) -> None:
        owner, end = self.dial.owner, self._end
        assert end is not None
        owner.paths.answered(self.used.node)
        certificate = end.tls.certificate if isinstance(end, TlsEnd) else None
        if fault := owner.trust.fault_of(certificate):
            self._fail(Refusal.REVOKED, fault)
            return
        if owner.clock.suspicious:
            owner.clock.agrees(f"broker {self.used.node}", time.monotonic())
        self._end = None
        end.pause()
        self.agent_hop, self.proof = event.hop, "ok" if event.proof else "off"
        self.close(ACCEPTED)
        dial, began = self.dial, self.began
        attempts = dial.attempts
        dial.won(
            self,
            Reached(
                end, self._dial.rest, self.used, attempts, event.proof, certificate, self.connected - began,
                self.answered - began, dial.tried() if attempts > 1 or dial.trace else (),
            ),
        )  # fmt: skip

    def finished(self) -> None:
        self._fail(Refusal.LINK_LOST, "the broker closed the connection without an answer")

    def lost(self, lost: Lost) -> None:
        end, self._end = self._end, None
        if isinstance(end, TlsEnd) and not end.up:
            text = f"no TLS with the broker: {lost}; see gateway.ca, and broker.dial_security, which must be tls"
            self.dial.failed(self, Refusal.BROKER_UNREACHABLE, text)
        else:
            self.dial.failed(self, Refusal.LINK_LOST, f"the connection to the broker ended without an answer: {lost}")

    def _fail(self, code: Refusal, text: str) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.abort()
        self.dial.failed(self, code, text)
