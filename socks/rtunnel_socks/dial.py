"""Reaching one target: its candidate tuples, one attempt after another or beside it, until one is Accepted.

In the relay's thread, once per client. An attempt that is silent for longer than its path's hedge delay (hedge.py) is
joined by the next candidate, within the budget; the first Accepted that is proved wins, the others are reset. An answer
about the target itself ends everything at once; a stale tuple is forgotten; when nothing works the client is told what
was tried.
"""

from __future__ import annotations

import errno
import random
import secrets
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from rtunnel.clock import ClockWatch
from rtunnel.registry import NodeRecord, Tuple
from rtunnel.registry.routes import RouteTable
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Attempt as Connecting
from rtunnel.relay.relay import Relay
from rtunnel.relay.tls import TlsEnd
from rtunnel.trust.certificates import BROKER_NAME
from rtunnel.trust.identity import Identity, TrustStore
from rtunnel.trust.keys import GatewayKey
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    DIAL_ANSWERS,
    Accepted,
    Decoder,
    Dial,
    DialAnswer,
    DialBody,
    Dialling,
    MessageError,
    Refuse,
    encode,
)
from rtunnel.wire.refusal import Next, Refusal, Refused
from rtunnel_socks.hedge import Hedging, Path
from rtunnel_socks.proof import Known, Proofs
from rtunnel_socks.resources import Sources

#: A node that did not answer goes behind the others for so long (seconds).
SUSPECT_SECONDS: Final = 10.0
#: More tuples than redundancy and a node or two in transition there can't be.
MAX_ATTEMPTS: Final = 6
#: What is no fault of the paths to an agent, so that a client is told this and not `agent_unavailable`.
_NOT_THE_PATHS: Final = frozenset({Refusal.TOO_MANY_STREAMS, Refusal.EXPIRED, Refusal.OVERLOADED})
#: A connect that fails so lacks something of this gateway: a source port, a descriptor, or (STALE_TARGET) a source
#: address that this host has lost. No node is suspect for it.
_FAILS_HERE: Final = (Refusal.OVERLOADED, Refusal.STALE_TARGET)
#: An agent says it once.
MAX_DIALLINGS: Final = 64


@dataclass(frozen=True, slots=True)
class Target:
    """What a client wants."""

    namespace: str
    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class Paths:
    """What this gateway has learnt of the ways to agents: which nodes are slow to answer, who carries how much."""

    def __init__(self) -> None:
        self._suspects: dict[str, float] = {}
        self._open: dict[tuple[str, int], int] = {}  # streams by session: two nodes may give out the same epoch

    def order(self, tuples: Sequence[Tuple], nodes: Mapping[str, NodeRecord], now: float) -> list[Tuple]:
        """Best first: live before draining before no heartbeat, then nodes that answer, then the fewest streams."""
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
        """It did not answer."""
        self._suspects[node] = now + SUSPECT_SECONDS

    def is_suspect(self, node: str, now: float) -> bool:
        """Whether it did not answer lately."""
        return self._suspects.get(node, 0.0) > now

    def answered(self, node: str) -> None:
        """It did."""
        self._suspects.pop(node, None)

    def opened(self, used: Tuple) -> None:
        """A stream more."""
        session = used.node, used.epoch
        self._open[session] = self._open.get(session, 0) + 1

    def closed(self, used: Tuple) -> None:
        """A stream less."""
        session = used.node, used.epoch
        left = self._open.get(session, 0) - 1
        if left > 0:
            self._open[session] = left
        else:
            self._open.pop(session, None)


class DialOwner(Protocol):
    """The gateway, as a dial sees it."""

    relay: Relay
    paths: Paths
    table: RouteTable
    key: GatewayKey
    trust_store: TrustStore | None  # whose certificates are good; None: none is looked at
    proofs: Proofs | None  # None: none are asked for
    dial_tls: ssl.SSLContext | None  # to guarded ports; None: plain
    name: str
    hedging: Hedging
    clock: ClockWatch
    sources: Sources | None  # None: the kernel chooses
    dial_timeout: float

    def forget(self, stale: Tuple) -> None:
        """The tuple is stale."""

    def log(self, event: str, **fields: object) -> None:
        """A log line."""

    def connect_failed_here(self, code: int) -> None:
        """A connect to a broker failed with this errno, for want of something of this gateway: count it."""

    def not_proven(self, code: Refusal, fields: dict[str, object]) -> None:
        """Somebody who is not the target's agent has answered: count it, and say it where it is read soon."""


@dataclass(slots=True)
class Reached:
    """An accepted dial: the socket to the broker, bytes that came behind Accepted, and the tuple that it used."""

    end: SocketEnd
    rest: bytes
    used: Tuple
    attempts: int
    identity: Identity | None  # who proved it; None when no proofs are asked for
    certificate: bytes | None  # the broker's; None without TLS


Done = Callable[[Reached | None, Refused | None], None]


@dataclass(eq=False, slots=True)
class TargetDial:
    """One dial. `done` is called once, unless `cancel` comes first."""

    owner: DialOwner
    target: Target
    who: str
    done: Done | None
    _left: list[Tuple] = field(default_factory=list)
    _tried: int = 0
    _alive: list[Attempt] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _codes: set[Refusal] = field(default_factory=set)
    unproven: str = ""  # why a proof was not good, when one was not
    _hedge: Timer | None = None
    _late: float = 0.0  # when half of the time is over: a hedge needs no budget then
    _held: bool = False  # the budget had no hedge left for it
    _deadline: Timer | None = None

    def start(self, tuples: Sequence[Tuple]) -> None:
        """Try these, in the order of `Paths`."""
        loop = self.owner.relay.loop
        self._left = self.owner.paths.order(tuples, self.owner.table.nodes, loop.now)[:MAX_ATTEMPTS]
        self._deadline = loop.after(self.owner.dial_timeout, self._too_late)
        self._late = loop.now + self.owner.dial_timeout / 2
        self.owner.hedging.dialled()
        self._next()

    def cancel(self) -> None:
        """The client is gone."""
        self.done = None
        self._clear()

    def _next(self) -> None:
        """The next candidate, beside those that are still alive."""
        self._stop_hedge()
        if self._left:
            attempt = Attempt(self, self._left.pop(0))
            self._tried += 1
            self._alive.append(attempt)
            if self._left:
                self._hedge_after(self.owner.hedging.delay(attempt.path))
            attempt.start()
        elif not self._alive:
            # Some causes are no fault of the paths: where all say the same, the client is told that.
            alike = self._codes & _NOT_THE_PATHS if len(self._codes) == 1 else ()
            code = next(iter(alike), Refusal.AGENT_UNAVAILABLE)
            silence = self.owner.table.silence()
            text = f"no path works: {'; '.join(self._failures)}"
            self._fail(Refused(code, f"{text}; {silence}" if silence else text))

    def _hedge_after(self, seconds: float) -> None:
        self._hedge = self.owner.relay.loop.after(seconds, self._silent)

    def _silent(self) -> None:
        """The newest attempt was silent for its path's hedge delay."""
        self._hedge = None
        if any(attempt.diallings for attempt in self._alive):
            # The path works and the target is slow: dialling it twice would not help, so that is tried late. A broken
            # broker could say so, too.
            self._hedge = self.owner.relay.loop.after(self.owner.dial_timeout / 2, self._next)
            return
        hedging = self.owner.hedging
        if self._may_hedge():
            hedging.sent += 1
            self._next()
        else:
            hedging.held += not self._held
            self._held = True
            # By then the budget has some again, or the node has become suspect.
            self._hedge_after(hedging.delay(self._alive[-1].path))

    def _may_hedge(self) -> bool:
        """Whether the next candidate may be tried beside the silent ones.

        When everything is slow, hedges make it slower: so few dials have one. A node that is known to be silent is
        another thing, and so is a dial that would run out of time.
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
        """The first word of an attempt. One that was begun before it and is still silent is on a node to be wary of."""
        loop = self.owner.relay.loop
        self.owner.hedging.answered(attempt.path, loop.now - attempt.began)
        for other in self._alive:
            if other is attempt:
                break
            if not other.heard and other.used.node != attempt.used.node:
                self.owner.paths.suspect(other.used.node, loop.now)

    def failed(self, attempt: Attempt, code: Refusal, text: str) -> None:
        """One attempt is over."""
        self._alive.remove(attempt)
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
        """Somebody answered who is not, or no longer, the target's agent: that is no accident of the network."""
        self.unproven = refused.text
        self.owner.not_proven(
            refused.code,
            {
                "reason": refused.text, "target": str(self.target),
                "namespace": self.target.namespace, "node": attempt.used.node, "agent": attempt.used.agent_id,
                "ps": f"{attempt.used.ps_ip}:{attempt.used.ps_port}", "epoch": str(attempt.used.epoch),
            },
        )  # fmt: skip

    def won(
        self, attempt: Attempt, end: SocketEnd, rest: bytes, identity: Identity | None, certificate: bytes | None
    ) -> None:
        """The first Accepted."""
        self._alive.remove(attempt)
        done, self.done = self.done, None
        self._clear()
        if done is None:
            end.abort()
        else:
            done(Reached(end, rest, attempt.used, self._tried, identity, certificate), None)

    def _too_late(self) -> None:
        self._deadline = None
        if any(attempt.diallings for attempt in self._alive):
            self._fail(Refused(Refusal.TARGET_TIMEOUT, "the agent was still connecting the target"))
            return
        tried = "; ".join([*self._failures, *(f"{a.used.node}: no answer" for a in self._alive)])
        self._fail(Refused(Refusal.DIAL_TIMEOUT, f"no answer within {self.owner.dial_timeout:g} s: {tried}"))

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
            if not attempt.heard:
                self.owner.hedging.given_up(attempt.path, self.owner.relay.loop.now - attempt.began)
            attempt.cancel()

    def _stop_hedge(self) -> None:
        if self._hedge is not None:
            self._hedge.cancel()
            self._hedge = None


@dataclass(eq=False, slots=True)
class Attempt:
    """One candidate: connect, Dial, answer. The talker of its socket."""

    dial: TargetDial
    used: Tuple
    began: float = 0.0  # by the loop's clock
    heard: bool = False  # somebody has answered something
    diallings: int = 0  # how often somebody said that the agent is connecting the target
    _connecting: Connecting | None = None
    _end: SocketEnd | None = None
    _body: bytes = b""  # of the Dial as it was sent: what the proof is over
    _known: Known | None = None  # who may prove it by MAC
    _decoder: Decoder[DialAnswer] = field(default_factory=lambda: Decoder(*DIAL_ANSWERS))

    @property
    def path(self) -> Path:
        """By which its answer's time is known."""
        return self.used.node, self.used.epoch

    def start(self) -> None:
        """Connect to the guarded port."""
        # No time limit of its own: the dial has one.
        self.began = self.dial.owner.relay.loop.now
        owner, ip = self.dial.owner, self.used.ps_ip
        source = "" if owner.sources is None else owner.sources.next(ip)
        self._connecting = owner.relay.connect(ip, self.used.ps_port, 0.0, self._connected, source=source)

    def cancel(self) -> None:
        """Reset it; nothing is told."""
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
        if owner.dial_tls is not None:
            end = owner.relay.secure(end, owner.dial_tls, alpn=messages.DIAL_ALPN, server_name=BROKER_NAME)
        self._end = end
        end.talk(self)
        end.write(self._frame())

    def _frame(self) -> bytes:
        target, key, proofs = self.dial.target, self.dial.owner.key, self.dial.owner.proofs
        known = self._known = None if proofs is None else proofs.known(target.namespace, target.ip)
        self._body = body = messages.encode_body(
            DialBody(
                version=messages.VERSION,
                namespace=target.namespace,
                ip=target.ip,
                port=target.port,
                node=self.used.node,
                epoch=self.used.epoch,
                nonce=secrets.token_bytes(messages.NONCE_BYTES),
                time=int(time.time() * 1000),
                who=self.dial.who,
                exchange=b"" if proofs is None else proofs.exchange,
                pair=b"" if known is None else known.pair.id,
            )
        )
        return encode(Dial(body=body, mac=key.sign(body), key=key.id))

    def received(self, data: bytes) -> None:
        """See Talker."""
        self._decoder.feed(data)
        try:
            answer = self._decoder.next()
            while isinstance(answer, Dialling):
                self.diallings += 1
                if self.diallings > MAX_DIALLINGS:
                    raise MessageError(f"more than {MAX_DIALLINGS} times Dialling")
                answer = self._decoder.next()
        except MessageError as error:
            self._fail(Refusal.PROTOCOL_ERROR, str(error))
            return
        if not self.heard and (answer is not None or self.diallings):
            self.heard = True
            self.dial.heard(self)
        if answer is None:
            return
        self.dial.owner.paths.answered(self.used.node)
        try:
            if isinstance(answer, Refuse):
                self._refused(answer)
            else:
                self._accepted(answer)
        except Refused as error:
            self.dial.not_proven(self, error)
            self._fail(error.code, error.text)

    def _refused(self, answer: Refuse) -> None:
        code = Refusal.parse(answer.code)
        if code is Refusal.EXPIRED:
            offset = time.time() - answer.time / 1000 if answer.time else None
            self.dial.owner.clock.differs(f"broker {self.used.node}", offset, time.monotonic())
        if code.reply.next is Next.STOP:
            self._proof(answer)  # or a broken broker could keep clients from all agents that have a session there
        self._fail(code, answer.text or code.reply.text)

    def _accepted(self, answer: Accepted) -> None:
        dial = self.dial
        trust_store, certificate = (
            dial.owner.trust_store,
            self._end.tls.certificate if isinstance(self._end, TlsEnd) else None,
        )
        if trust_store is not None and (fault := trust_store.fault_of(certificate)):
            self._fail(Refusal.REVOKED, fault)
            return
        identity = self._proof(answer)
        if dial.owner.clock.suspicious:
            dial.owner.clock.agrees(f"broker {self.used.node}", time.monotonic())
        end, self._end = self._end, None
        assert end is not None
        end.pause()
        dial.won(self, end, self._decoder.rest(), identity, certificate)

    def _proof(self, answer: Accepted | Refuse) -> Identity | None:
        """Whose answer it is; None when no proofs are asked for. Raises Refused."""
        proofs, target = self.dial.owner.proofs, self.dial.target
        return None if proofs is None else proofs.check(answer, self._body, target.namespace, target.ip, self._known)

    def finished(self) -> None:
        """See Talker."""
        self._fail(Refusal.LINK_LOST, "the broker closed the connection without an answer")

    def lost(self, lost: Lost) -> None:
        """See Talker."""
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
