"""A session on this node, from the link's first byte to its last; all in the relay's thread.

    link up -> Hello [-> Challenge -> Proof] -> (control plane: ports, registry) -> Welcome -> link
    down link up -> Enrol -> (control plane: authority) -> Enrolled -> link down

`rtunnel.wire.control` holds the protocol: its states, their order and the limits. A Session owns
the link and the timers, decides who the agent is (with `greeting`) and whether it stays, and sends
what the machine returns. The step in the middle needs the world outside: the control plane is asked
and answers with `welcome`, `enrolled` or `refuse`.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Mapping
from typing import Final, Protocol, assert_never

import msgspec

from rtunnel.config import parse_exposes
from rtunnel.errors import TrustError
from rtunnel.registry import Registration
from rtunnel.relay.ends import EndHandler
from rtunnel.relay.join import Ending, Pair
from rtunnel.relay.link import Link
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Listener
from rtunnel.relay.stream import StreamEnd
from rtunnel.strangers import Place
from rtunnel.trust.identity import Identity, TrustStore, is_session_proof
from rtunnel.trust.keys import LinkMacs
from rtunnel.wire import messages
from rtunnel.wire.control import (
    BROKER_SERVES,
    UNPROVEN_BYTES,
    Action,
    BrokerControl,
    BrokerEvent,
    BrokerState,
    EnrolRequested,
    Greeted,
    Left,
    Proved,
    RemoteProtocolError,
    Updated,
)
from rtunnel.wire.messages import Enrol, Enrolled, Hello, Publish, Update, Welcome
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_broker.admit import EVERYTHING, Rule
from rtunnel_broker.greeting import addresses_fault, who_greets
from rtunnel_broker.log import NodeLog

#: Streams of one agent may hold one part in HELD_PART of `broker.stream_memory`.
HELD_PART: Final = 4


#: States in which the session has ports and tuples, or is about to.
REGISTERED: Final = BROKER_SERVES | {BrokerState.PROVEN}


class SessionTrust(Protocol):
    """The node's trust list and certificates, as its sessions see them. In the relay's thread."""

    @property
    def trust_store(self) -> TrustStore | None:
        """The trust list that certificates are checked with; None: certificates are
        not accepted.
        """

    @property
    def dial_tls(self) -> ssl.SSLContext | None:
        """The TLS context of guarded ports; None: they are plain."""

    def enrols(self, session: Session, request: Enrol) -> None:
        """Pass a request for a certificate on, and answer `enrolled` or `refuse`."""


class SessionKeeper(Protocol):
    """The node, as its sessions see it. Called in the relay's thread."""

    node: str
    host: str
    tokens: Mapping[str, bytes]
    handshake_timeout: float
    draining: bool
    log: NodeLog

    @property
    def trust(self) -> SessionTrust:
        """The node's trust list and certificates."""

    def wants(self, session: Session) -> None:
        """Register a session whose Hello is proven, and answer by `welcome` or `refuse`."""

    def lost(self, session: Session, lost: Lost) -> None:
        """Free what the session has: its link has ended."""

    def silent_sessions(self) -> tuple[int, int]:
        """Return how many sessions were looked at for a trace, and how many of them are silent."""

    def updated(self, session: Session) -> None:
        """Check a session whose exposed ports or addresses have changed.

        The next heartbeat tells the registry.
        """

    def refused(self, session: Session, code: Refusal, text: str) -> None:
        """Count a refused session, and note it."""


class Session:
    """An agent's presence on this node; the link's owner and its control stream's handler.

    `binding`: SHA-256 of the broker's certificate in this link's handshake; empty without TLS.
    `source`: the source that the link's place counts for.
    """

    def __init__(self, keeper: SessionKeeper, *, binding: bytes = b"", source: str = "") -> None:
        self.keeper = keeper
        self.binding = binding
        self.source = source
        #: The link's place among those that have proved nothing; the node releases it.
        self.place: Place[Link] | None = None
        self.link: Link | None = None
        self.lost_by: Lost | None = None  # why it ends, once that is known
        self.way_out = ""  # the word of a `Departure`, if it is no `LostKind`
        # From the agent's messages.
        self.hello: Hello | None = None
        self.doubts: tuple[str, ...] = ()  # what is odd in the facts of its Hello
        self.identity: Identity | None = None  # the agent's, by certificate; None: by token
        self.exposes: tuple[str, ...] = ()
        self.addresses: frozenset[str] = frozenset()
        self.update_due = False  # the registry does not have `exposes` and `addresses` yet
        # Held for the agent on this node.
        self.rule: Rule = EVERYTHING
        self.streams = 0
        self.streams_cut = 0  # that the session's end has reset
        self.welcomed = False  # it was live: its end is worth a log line
        self.epoch = 0
        self.registration: Registration | None = None
        self.granted: list[tuple[Publish, int]] = []  # open ports, with their numbers
        self.listeners: list[Listener] = []
        # The instances of this agent_id that were replaced on this node, by this session or earlier
        # ones.
        self.replaced: tuple[bytes, ...] = ()

        self._control = BrokerControl(LinkMacs(lambda: binding), new_nonce, self._now)
        self._stream: StreamEnd | None = None
        self._deadline: Timer | None = None
        # the newest with another certificate that was not accepted yet
        self._renewed: Update | None = None
        self._update: Update | None = None  # the newest one, while it waits in the slow queue

    @property
    def state(self) -> BrokerState:
        """The protocol's state; `BrokerState` says what holds in each."""
        return self._control.state

    @property
    def serves(self) -> bool:
        """Whether streams may begin."""
        return self._control.state in BROKER_SERVES

    @property
    def owner(self) -> str:
        """The owner of the session's ports, "namespace/agent_id": the same across restarts of the
        agent.
        """
        return f"{self.hello.namespace}/{self.hello.agent_id}" if self.hello else ""

    @property
    def peer(self) -> str:
        """The IP of the link's other end; empty without a link."""
        return self.link.peer if self.link else ""

    # The link's owner.

    def link_up(self, link: Link) -> None:
        self.link = link
        link.allowance = UNPROVEN_BYTES
        self._deadline = link.loop.after(
            self.keeper.handshake_timeout,
            lambda: self.end("no Welcome within the handshake deadline", LostKind.DEADLINE),
        )

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """Take the control stream; an agent may open no other."""
        if self._stream is not None:
            if self.link is not None and self.link.allowance is not None:
                self.link.break_off("a second stream before the agent proved itself")
            return None
        self._stream = stream
        return self

    def link_down(self, link: Link, lost: Lost) -> None:
        self.link = link
        self._stop_deadline()
        self.lost_by = self.lost_by or lost
        self.streams_cut += link.cut
        self._control.close()
        if self.welcomed:
            assert self.hello is not None
            self.keeper.log.info(
                "session_ended", agent=self.hello.agent_id, namespace=self.hello.namespace, epoch=str(self.epoch),
                cause=self.lost_by.kind.value, reason=str(self.lost_by), streams_cut=self.streams_cut,
            )  # fmt: skip
        self.keeper.lost(self, self.lost_by)

    # The control stream.

    def received(self, data: bytes) -> None:
        try:
            while events := self._control.receive(data):
                data = b""
                for event in events:
                    self._hear(event)
        except RemoteProtocolError as error:
            self.hello = self.hello or self._control.refused_hello
            self.refuse(error.code, error.text)

    def finished(self) -> None:
        """End the session: the agent has closed its control stream."""
        self.end("the agent closed the control stream")

    def lost(self, lost: Lost) -> None:
        """End the session. A lost link has a reason of its own, which comes by `link_down`."""
        if lost.kind is not LostKind.LINK_LOST:
            self.end(f"control stream {lost}", lost.kind)

    def _hear(self, event: BrokerEvent) -> None:
        match event:
            case Greeted(hello):
                self._take_hello(hello)
            case Proved(hello):
                self.hello = hello
                self._proven()
            case EnrolRequested(request):
                self._take_enrol(request)
            case Updated(update):
                self._take_update(update)
            case Left(reason):
                self.way_out = "left"
                self.end(f"agent said goodbye: {reason}" if reason else "agent said goodbye")
            case _:
                assert_never(event)

    def _take_hello(self, hello: Hello) -> None:
        self.hello = hello
        try:
            certificate = self.link.peer_certificate if self.link is not None else None
            who = who_greets(self.keeper, self.keeper.trust.trust_store, hello, certificate)
        except Refused as error:
            self.refuse(error.code, error.text)
            return
        self.exposes = tuple(hello.exposes)
        self.addresses = frozenset(hello.addresses)
        if isinstance(who, Identity):
            self.identity = who
            self._control.admit()
            self._proven()
        else:
            # Until the Proof: 4096 networks are 8 KiB in the frame, which the machine keeps, and
            # 260 KiB here.
            self.hello = msgspec.structs.replace(hello, publish=[])
            self._say(self._control.challenge(who))

    def _take_enrol(self, request: Enrol) -> None:
        if self.keeper.draining:
            self.refuse(Refusal.DRAINING)
        else:
            self.keeper.trust.enrols(self, request)

    def _proven(self) -> None:
        if self.link is not None:
            self.link.allowance = None
        self.keeper.wants(self)

    def _take_update(self, update: Update) -> None:
        """Keep the newest Update, and look at it in its turn: there may be many in one frame."""
        assert self.link is not None
        if self.state not in REGISTERED:
            return  # revoked or ended: Updates that were on their way do not count
        if update.certificate:
            # at once: the CA of the present certificate may be removed before its turn
            self._renewed = update
        if self._update is None:
            self.link.loop.enqueue_slow(self._updated)
        self._update = update

    def _updated(self) -> None:
        update, self._update = self._update, None
        if update is None or self.state not in REGISTERED:
            return
        try:
            parse_exposes(update.exposes)
        except ValueError as error:
            self.refuse(Refusal.BAD_REQUEST, str(error))
            return
        self._go_over()
        if self.state not in REGISTERED:
            return
        addresses = frozenset(update.addresses) or self.addresses
        if addresses != self.addresses and (fault := addresses_fault(addresses, self.identity)):
            self.refuse(fault.code, fault.text)
            return
        if update.exposes != list(self.exposes) or addresses != self.addresses:
            self.exposes, self.addresses = tuple(update.exposes), addresses
            self.update_due = True
            self.keeper.updated(self)

    def _go_over(self) -> None:
        """Take the certificate that the agent has shown by an Update as the session's.

        One that is not good yet, such as one of a CA to come, is looked at again later.
        """
        update, trust_store = self._renewed, self.keeper.trust.trust_store
        if update is None or self.identity is None or trust_store is None or self.state not in REGISTERED:
            return
        try:
            who = trust_store.verify(update.certificate, keep=False)
        except TrustError:
            return
        self._renewed = None
        if (
            who.subject != self.identity.subject
            or not self.addresses <= who.addresses
            or not is_session_proof(who.public_key, self.keeper.node, self.epoch, self.binding, update.signature)
        ):
            text = f"the new certificate is not {self.identity.subject}'s, or does not prove this session"
            self.refuse(Refusal.BAD_CERTIFICATE, text)
        else:
            self.identity = who

    # The control plane's answers.

    def welcome(self, welcome: Welcome) -> None:
        """Make the registered session live. No effect when it has ended."""
        if not self._control.allows(Action.WELCOME):
            return
        # the drain has begun since the Hello, and did not know of this session
        if self.keeper.draining:
            self.refuse(Refusal.DRAINING)
            return
        hello = self.hello
        assert hello is not None
        self._stop_deadline()
        if self.link is not None:
            self.link.start_window = hello.start_window
        self.welcomed = True
        self.keeper.log.info(
            "session_opened", agent=hello.agent_id, namespace=hello.namespace, epoch=str(self.epoch), port=welcome.port,
            addresses=sorted(self.addresses), peer=self.peer, agent_software=hello.software,
            proved_by="certificate" if self.identity is not None else "join token",
        )  # fmt: skip
        self._say(self._control.welcome(welcome))
        trust_store = self.keeper.trust.trust_store
        if trust_store is not None and hello.trust < trust_store.generation:
            self.tell_trust(trust_store.signed)

    def enrolled(self, answer: Enrolled) -> None:
        """Pass on the authority's answer, up to 60 KB. The agent ends the link when it
        has it all.
        """
        if self._control.allows(Action.ENROLLED):
            self.keeper.log.info("agent_enrolled", peer=self.peer)
            self.lost_by = Lost(LostKind.ANSWERED, "the agent has its certificate")
            self._say(self._control.enrolled(answer))

    def tell_trust(self, signed: bytes) -> None:
        """Offer a trust list to a live session; others learn it after their Welcome."""
        if self.serves:
            self._say(self._control.trust(signed))

    def drain(self, deadline: float) -> None:
        """Tell a live session that the node goes away within `deadline` seconds."""
        if self._control.allows(Action.DRAIN):
            self._say(self._control.drain(deadline))

    def leave(self, why: str) -> None:
        """Send Bye with this reason, and end the link: the broker stops."""
        self.way_out = "drained"
        if self._control.allows(Action.BYE):
            self._say(self._control.bye(why))
        self.end(why)

    def refuse(self, code: Refusal, text: str = "") -> None:
        """Refuse what the agent wants, and end the link when that is sent.

        No effect when the session has ended.
        """
        if not self._control.allows(Action.REFUSE):
            return
        text = text or code.reply.text
        self.keeper.refused(self, code, text)
        fields = {
            "code": code.value, "reason": text, "peer": self.peer, "agent": self.hello.agent_id if self.hello else "",
        }  # fmt: skip
        if self.place is not None:
            self.keeper.log.stranger("session_refused", code.value, **fields)
        else:
            self.keeper.log.info("session_refused", **fields)
        self._say(self._control.refuse(code, text))
        self.end(f"refused: {code}", LostKind.REFUSED)

    def judge(self, trust_store: TrustStore) -> Refused | None:
        """Look at the session's certificate after a change of the trust list.

        Return None when it is good. Else reset the session's streams, let none begin from now on,
        and return the refusal for `expel`.
        """
        if self.identity is None or not self._control.allows(Action.REVOKE):
            return None
        if not trust_store.in_force(self.identity):
            self._go_over()
        if not self._control.allows(Action.REVOKE):
            return None  # refused: its new certificate is of another agent
        if trust_store.is_revoked(self.identity):
            fault = Refused(Refusal.REVOKED, f"the certificate of {self.identity.subject} is revoked")
        elif trust_store.in_force(self.identity):
            return None
        else:
            text = f"the certificate of {self.identity.subject} is not from a CA in force any more"
            fault = Refused(Refusal.BAD_CERTIFICATE, text)
        self._control.revoke()
        self.keeper.log.info(
            "session_revoked", code=fault.code.value, reason=fault.text, peer=self.peer, agent=self.identity.name,
            epoch=str(self.epoch), streams=self.streams,
        )  # fmt: skip
        self.cut(Ending.REVOKED)
        return fault

    def cut(self, ending: Ending) -> None:
        """Reset the session's streams, with this ending."""
        for stream in list(self.link.streams.values()) if self.link is not None else ():
            if isinstance(stream, StreamEnd) and isinstance(stream.pair, Pair):
                self.streams_cut += 1
                stream.pair.abort(ending)

    def expel(self, fault: Refused, signed: bytes) -> None:
        """Tell a revoked session why, with the trust list that lets the agent act, and end the
        link.
        """
        if self.state is not BrokerState.REVOKED:
            return
        if fault.code is Refusal.BAD_CERTIFICATE and signed:
            self._say(self._control.trust(signed))
        self._say(self._control.refuse(fault.code, fault.text))
        self.end(f"{fault.code}: {fault.text}", LostKind.REFUSED)

    # Streams.

    @property
    def full(self) -> Refused | None:
        """The refusal if the agent can't have another stream on this node, else None."""
        if self.rule.streams and self.streams >= self.rule.streams:
            text = f"the agent has {self.streams} streams on {self.keeper.node}, its limit there"
            return Refused(Refusal.TOO_MANY_STREAMS, text)
        return self._too_much_held()

    def _too_much_held(self) -> Refused | None:
        """Return the refusal if streams with slow readers hold too much memory, of this agent or in
        all; else None.
        """
        link = self.link
        if link is None or (not link.memory.full and link.held <= link.memory.budget // HELD_PART):
            return None
        whose = f"{self.keeper.node} holds {link.memory.held >> 20} MiB for streams that stall"
        if not link.memory.full:
            whose = f"streams of the agent that stall hold {link.held >> 20} MiB on {self.keeper.node}"
        return Refused(Refusal.OVERLOADED, f"{whose}, its limit (broker.stream_memory)")

    def end(self, why: str, kind: LostKind = LostKind.CLOSED) -> None:
        """End the link in order; `why` is for the log."""
        self.lost_by = self.lost_by or Lost(kind, why)
        if self.link is not None:
            self.link.close(self.lost_by)

    def _say(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)

    def _now(self) -> float:
        return self.link.loop.now if self.link is not None else 0.0

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def new_nonce() -> bytes:
    """Return sixteen random bytes."""
    return secrets.token_bytes(messages.NONCE_BYTES)
