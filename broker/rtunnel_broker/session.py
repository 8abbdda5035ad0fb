"""A session on this node, from the link's first byte to its last. Everything here runs in the relay's thread.

    link up -> Hello [-> Challenge -> Proof] -> (control plane: ports, registry) -> Welcome -> ... -> link down
    link up -> Enrol -> (control plane: authority) -> Enrolled -> link down

Who the agent is, says the certificate of its link, or a join token that it proves. The step in the middle is the one
that needs the world outside: the control plane is asked and answers with `welcome`, `enrolled` or `refuse`.
"""

from __future__ import annotations

import hmac
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, assert_never

import msgspec

from rtunnel.config import canonical_ip, check_word, parse_exposes
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
from rtunnel.trust.identity import Identity, Revoked, TrustStore, is_session_proof
from rtunnel.trust.keys import AGENT_LABEL, BROKER_LABEL, token_mac
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    Bye,
    Challenge,
    Decoder,
    Enrol,
    Enrolled,
    Hello,
    MessageError,
    Proof,
    Publish,
    Refuse,
    Trust,
    Update,
    Welcome,
    encode,
)
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_broker.admit import EVERYTHING, Rule

#: What a link may send before its Proof has come: the longest Hello, the Proof, and room for frames' headers and pings.
UNPROVEN_BYTES: Final = messages.MAX_HELLO + messages.MAX_UNAUTHENTICATED
#: Updates of one agent at once, and the seconds for each one more. An agent sends one when its file, its addresses or
#: its certificate change. Each is up to 64 KiB to parse, so 3 MB/s of them are no configuration but a flood.
UPDATES_AT_ONCE: Final = 60
UPDATE_SECONDS: Final = 1.0


#: Streams of one agent may hold such a part of `broker.stream_memory`.
HELD_PART: Final = 4

#: What an agent sends.
FromAgent = Hello | Enrol | Proof | Update | Bye


class SessionKeeper(Protocol):
    """The node, as its sessions see it. Called in the relay's thread."""

    node: str
    host: str
    tokens: Mapping[str, bytes]
    handshake_timeout: float
    draining: bool

    @property
    def dial_tls(self) -> ssl.SSLContext | None:
        """What guarded ports show; None: they are plain."""

    @property
    def trust_store(self) -> TrustStore | None:
        """What certificates are judged by; None: none is taken."""

    def wants(self, session: Session) -> None:
        """A proven Hello: register it and answer `welcome` or `refuse`."""

    def enrols(self, session: Session, request: Enrol) -> None:
        """A request for a certificate: pass it on and answer `enrolled` or `refuse`."""

    def lost(self, session: Session, lost: Lost) -> None:
        """The link is gone."""

    def updated(self, session: Session) -> None:
        """The agent's exposed ports or addresses changed: refuse the session, or let the next heartbeat tell it."""

    def refused(self, code: Refusal) -> None:
        """Count it."""

    def log(self, event: str, **fields: object) -> None:
        """A log line."""

    debugging: bool  # `trace` writes lines

    def trace(self, event: str, **fields: object) -> None:
        """A log line of level debug: one for each stream."""

    def log_stranger(self, event: str, kind: str, **fields: object) -> None:
        """The same of a peer that has proved nothing: few lines for each event and kind, the others are counted."""


@dataclass(eq=False)
class Session:
    """An agent's presence on this node; the link's owner and its control stream's talker."""

    keeper: SessionKeeper
    binding: bytes = b""  # SHA-256 of the certificate that this link's handshake showed; empty without TLS
    source: str = ""  # whose share of handshakes it takes,
    place: Place[Link] | None = None  # and its place among them
    identity: Identity | None = None  # who it is, by certificate; None: by token
    rule: Rule = EVERYTHING
    streams: int = 0
    link: Link | None = None
    hello: Hello | None = None
    epoch: int = 0
    registration: Registration | None = None
    granted: list[tuple[Publish, int]] = field(default_factory=list)  # open ports, with their numbers
    exposes: tuple[str, ...] = ()
    update_due: bool = False  # the registry is to be told of `exposes` and `addresses`
    addresses: frozenset[str] = frozenset()
    listeners: list[Listener] = field(default_factory=list)
    handshaking: bool = True  # until it is proven
    replaced: tuple[bytes, ...] = ()  # the instances of this agent_id that it, and sessions before it, replaced here
    answered: bool = False  # refused, or enrolled
    state: str = "new"  # new, hello, proven, live; enrolling; void; over
    lost_by: Lost | None = None  # why it ends, once that is known

    _control: StreamEnd | None = None
    _decoder: Decoder[FromAgent] = field(default_factory=lambda: Decoder(Hello, Enrol, limit=messages.MAX_HELLO))
    _hello_frame: bytes = b""
    _nonce: bytes = b""
    _deadline: Timer | None = None
    _renewed: Update | None = None  # with another certificate, which was not found good yet
    _update: Update | None = None  # the newest one, while it is in line
    _updates_until: float = 0.0  # when none of its Updates will be held against it any more

    @property
    def owner(self) -> str:
        """Whose ports these are: the same across restarts of the agent."""
        return f"{self.hello.namespace}/{self.hello.agent_id}" if self.hello else ""

    @property
    def peer(self) -> str:
        """The link's other end."""
        return self.link.peer if self.link else ""

    # The link's owner.

    def link_up(self, link: Link) -> None:
        """See LinkOwner."""
        self.link = link
        link.allowance = UNPROVEN_BYTES
        self._deadline = link.loop.after(
            self.keeper.handshake_timeout,
            lambda: self.end("no Welcome within the handshake deadline", LostKind.DEADLINE),
        )

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """See LinkOwner: the agent opens the control stream and no other."""
        if self._control is not None:
            if self.link is not None and self.link.allowance is not None:
                self.link.break_off("a second stream before the agent proved itself")
            return None
        self._control = stream
        return self

    def link_down(self, link: Link, lost: Lost) -> None:
        """See LinkOwner."""
        self.link = link
        self._stop_deadline()
        self.lost_by = self.lost_by or lost
        self.state = "over"
        self.keeper.lost(self, self.lost_by)

    # The control stream.

    def received(self, data: bytes) -> None:
        """See Talker."""
        try:
            self._decoder.feed(data)
            while self.state != "over" and (frame := self._decoder.next_frame()) is not None:
                self._take(*frame)
        except MessageError as error:
            code = Refusal.VERSION if error.other_version else Refusal.PROTOCOL_ERROR
            self.refuse(code, str(error))

    def finished(self) -> None:
        """See Talker: an agent that closes its control stream leaves."""
        self.end("the agent closed the control stream")

    def lost(self, lost: Lost) -> None:
        """See EndHandler. A lost link has a reason of its own, which comes by `link_down`."""
        if lost.kind is not LostKind.LINK_LOST:
            self.end(f"control stream {lost}", lost.kind)

    def _take(self, message: FromAgent, frame: bytes) -> None:
        match message:  # the decoder returns only what the session's state allows
            case Enrol():
                if len(frame) > 4 + messages.MAX_UNAUTHENTICATED:  # the authority would hang up on this broker
                    raise MessageError(
                        f"enrol of {len(frame) - 4} bytes is over the limit of {messages.MAX_UNAUTHENTICATED}"
                    )
                self._take_enrol(message)
            case Hello():
                self._take_hello(message, frame)
            case Proof():
                self._take_proof(message)
            case Update():
                self._take_update(message)
            case Bye(reason):
                self.end(f"agent said goodbye: {reason}" if reason else "agent said goodbye")
            case _:
                assert_never(message)

    def _take_hello(self, hello: Hello, frame: bytes) -> None:
        self.hello = hello
        if hello.version != messages.VERSION:
            text = f"the agent speaks protocol version {hello.version}, this broker {messages.VERSION}"
            self.refuse(Refusal.VERSION, text)
            return
        fault = hello_fault(hello)
        if fault:
            self.refuse(Refusal.BAD_REQUEST, fault)
            return
        try:
            self.identity = None if hello.token_id else self._certified(hello)
            secret = self._secret(hello) if hello.token_id else b""
        except Refused as error:
            self.refuse(error.code, error.text)
            return
        if self.keeper.draining:
            self.refuse(Refusal.DRAINING)
            return
        if self.keeper.node in hello.holds:
            self.refuse(Refusal.DUPLICATE_NODE, f"the agent already has a session on {self.keeper.node}")
            return
        if self.keeper.host in hello.holds_hosts:
            self.refuse(Refusal.DUPLICATE_NODE, f"the agent already has a session on the host {self.keeper.host}")
            return
        self.exposes = tuple(hello.exposes)
        self.addresses = frozenset(hello.addresses)
        if self.identity is not None:
            self._proven()
            return
        self.state = "hello"
        self._hello_frame = frame
        self.hello = msgspec.structs.replace(hello, publish=[])  # 4096 networks are 8 KiB in the frame and 260 here
        self._nonce = secrets.token_bytes(messages.NONCE_BYTES)
        self._decoder.expect(Proof)
        self._decoder.limit = messages.MAX_UNAUTHENTICATED
        mac = token_mac(secret, BROKER_LABEL, frame, self._nonce, self.binding)
        self._say(encode(Challenge(nonce=self._nonce, mac=mac)))

    def _secret(self, hello: Hello) -> bytes:
        """Of the join token that the Hello names. Raises Refused."""
        secret = self.keeper.tokens.get(hello.token_id)
        if secret is None:
            text = f"join token {hello.token_id!r} is not known to this broker"
            if not self.keeper.tokens:
                text = "this broker takes certificates only: give the agent an identity (agent.identity)"
            raise Refused(Refusal.BAD_TOKEN, text)
        return secret

    def _certified(self, hello: Hello) -> Identity:
        """Who shows the link's certificate: exactly who the Hello says. Raises Refused."""
        trust_store = self.keeper.trust_store
        der = self.link.peer_certificate if self.link is not None else None
        if trust_store is None or der is None:
            missing = (
                "this broker takes no certificates (it has no broker.ca)"
                if trust_store is None
                else "the link shows no certificate (agent.identity)"
            )
            raise Refused(Refusal.BAD_CERTIFICATE, f"{missing}, and the Hello names no join token")
        try:
            who = trust_store.verify(der, keep=False)
        except TrustError as error:
            code = Refusal.REVOKED if isinstance(error, Revoked) else Refusal.BAD_CERTIFICATE
            raise Refused(code, str(error)) from None
        claimed = f"agent/{hello.namespace}/{hello.agent_id}"
        if who.kind != "agent" or (who.namespace, who.name) != (hello.namespace, hello.agent_id):
            raise Refused(Refusal.BAD_CERTIFICATE, f"the certificate is of {who.subject}, and not of {claimed}")
        foreign = [address for address in hello.addresses if address not in who.addresses]
        if foreign:
            raise Refused(Refusal.BAD_CERTIFICATE, f"{foreign[0]} is not in the certificate of {claimed}")
        return who

    def _take_enrol(self, request: Enrol) -> None:
        if request.version != messages.VERSION:
            text = f"the agent speaks protocol version {request.version}, this broker {messages.VERSION}"
            self.refuse(Refusal.VERSION, text)
        elif self.keeper.draining:
            self.refuse(Refusal.DRAINING)
        else:
            self.state = "enrolling"
            self._decoder.expect(Bye)
            self.keeper.enrols(self, request)

    def _take_proof(self, proof: Proof) -> None:
        assert self.hello is not None
        secret = self.keeper.tokens.get(self.hello.token_id, b"")
        expected = token_mac(secret, AGENT_LABEL, self._hello_frame, self._nonce, self.binding)
        if not hmac.compare_digest(proof.mac, expected):
            self.refuse(Refusal.BAD_TOKEN, f"the proof for join token {self.hello.token_id!r} is wrong")
            return
        decoder = Decoder(Hello, limit=messages.MAX_HELLO)
        decoder.feed(self._hello_frame)
        self.hello = decoder.next()
        self._hello_frame = b""
        self._proven()

    def _proven(self) -> None:
        self.state = "proven"
        if self.link is not None:
            self.link.allowance = None
        self._decoder.expect(Update, Bye)
        self._decoder.limit = messages.MAX_MESSAGE
        self.keeper.wants(self)

    def _take_update(self, update: Update) -> None:
        """The newest counts, and is looked at in its turn: there may be many in one frame."""
        assert self.link is not None
        if self.answered:
            return  # refused; what was already under way does not count
        now = self.link.loop.now
        self._updates_until = max(now, self._updates_until) + UPDATE_SECONDS
        if self._updates_until > now + UPDATES_AT_ONCE * UPDATE_SECONDS:
            text = f"more than {UPDATES_AT_ONCE} updates at once, and then one in {UPDATE_SECONDS:g} s"
            self.refuse(Refusal.PROTOCOL_ERROR, text)
            return
        if update.certificate:
            self._renewed = update  # at once: the CA of the present one may leave meanwhile
        if self._update is None:
            self.link.loop.enqueue_slow(self._updated)
        self._update = update

    def _updated(self) -> None:
        update, self._update = self._update, None
        if update is None or self.answered or self.state == "over":
            return
        try:
            parse_exposes(update.exposes)
        except ValueError as error:
            self.refuse(Refusal.BAD_REQUEST, str(error))
            return
        self._go_over()
        addresses = frozenset(update.addresses) or self.addresses
        if addresses != self.addresses and (refused := self._addresses_fault(addresses)):
            self.refuse(refused.code, refused.text)
            return
        if update.exposes != list(self.exposes) or addresses != self.addresses:
            self.exposes, self.addresses = tuple(update.exposes), addresses
            self.update_due = True
            self.keeper.updated(self)

    def _addresses_fault(self, addresses: frozenset[str]) -> Refused | None:
        """Why the agent can't have these from now on; None when it can."""
        try:
            odd = [address for address in addresses if canonical_ip(address) != address]
        except ValueError as error:
            return Refused(Refusal.BAD_REQUEST, str(error))
        if odd:
            return Refused(Refusal.BAD_REQUEST, f"{odd[0]!r} is not the canonical form of an IP address")
        if self.identity is not None and (foreign := addresses - self.identity.addresses):
            text = f"{min(foreign)} is not in the certificate of {self.identity.subject}"
            return Refused(Refusal.BAD_CERTIFICATE, text)
        return None

    def _go_over(self) -> None:
        """To the certificate that the agent has by now. One that can't be judged yet (of a CA to come) may be later."""
        update, trust_store = self._renewed, self.keeper.trust_store
        if update is None or self.identity is None or trust_store is None or self.answered or self.state == "over":
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
        """Registered: the session is live."""
        if self.state != "proven":
            return
        self.state = "live"
        self._stop_deadline()
        if self.hello is not None and self.link is not None:
            self.link.start_window = self.hello.start_window
            welcome = msgspec.structs.replace(welcome, start_window=self.hello.start_window)
        self._say(encode(welcome))
        trust_store = self.keeper.trust_store
        if trust_store is not None and self.hello is not None and self.hello.trust < trust_store.generation:
            self.tell(Trust(signed=trust_store.signed))

    def enrolled(self, answer: Enrolled) -> None:
        """The authority's answer. The agent ends the link when it has it all: it may be 60 KB."""
        if self.state == "enrolling":
            self.answered = True
            self.keeper.log("agent_enrolled", peer=self.peer)
            self._say(encode(answer))

    def refuse(self, code: Refusal, text: str = "") -> None:
        """Not here: tell it, then end the link when the word is out."""
        if self.state == "over":
            return
        text = text or code.reply.text
        self.answered = True
        self.keeper.refused(code)
        fields = {
            "code": code.value, "reason": text, "peer": self.peer, "agent": self.hello.agent_id if self.hello else "",
        }  # fmt: skip
        if self.handshaking:
            self.keeper.log_stranger("session_refused", code.value, **fields)
        else:
            self.keeper.log("session_refused", **fields)
        self._say(encode(Refuse(code=code.value, text=text[:512])))
        self.end(f"refused: {code}", LostKind.REFUSED)

    def judge(self, trust_store: TrustStore) -> Refused | None:
        """Other CAs are in force, or somebody is revoked. Without a good certificate its streams end, and there are no
        others from now on; what is returned is for `expel`.
        """
        if self.identity is None or self.answered:
            return None
        if not trust_store.in_force(self.identity):
            self._go_over()
        if trust_store.is_revoked(self.identity):
            fault = Refused(Refusal.REVOKED, f"the certificate of {self.identity.subject} is revoked")
        elif trust_store.in_force(self.identity) or self.answered:
            return None
        else:
            text = f"the certificate of {self.identity.subject} is not from a CA in force any more"
            fault = Refused(Refusal.BAD_CERTIFICATE, text)
        self.state, self.answered = "void", True
        self.keeper.log(
            "session_revoked", code=fault.code.value, reason=fault.text, peer=self.peer, agent=self.identity.name,
            epoch=str(self.epoch), streams=self.streams,
        )  # fmt: skip
        for stream in list(self.link.streams.values()) if self.link is not None else ():
            if isinstance(stream, StreamEnd) and isinstance(stream.pair, Pair):
                stream.pair.abort(Ending.REVOKED)
        return fault

    def expel(self, fault: Refused, signed: bytes) -> None:
        """Tell it why, with the trust list by which it knows what to do, and end the link."""
        if self.state == "over":
            return
        if fault.code is Refusal.BAD_CERTIFICATE and signed:
            self.tell(Trust(signed=signed))
        self._say(encode(Refuse(code=fault.code.value, text=fault.text)))
        self.end(f"{fault.code}: {fault.text}", LostKind.REFUSED)

    # Streams.

    @property
    def full(self) -> Refused | None:
        """Why the agent can't have another stream here, if so."""
        if self.rule.streams and self.streams >= self.rule.streams:
            text = f"the agent has {self.streams} streams on {self.keeper.node}, its limit there"
            return Refused(Refusal.TOO_MANY_STREAMS, text)
        return self._too_much_held()

    def _too_much_held(self) -> Refused | None:
        """Streams whose readers stall fill this process: one agent's may have a part of the memory for all."""
        link = self.link
        if link is None or (not link.memory.full and link.held <= link.memory.budget // HELD_PART):
            return None
        whose = f"{self.keeper.node} holds {link.memory.held >> 20} MiB for streams that stall"
        if not link.memory.full:
            whose = f"streams of the agent that stall hold {link.held >> 20} MiB on {self.keeper.node}"
        return Refused(Refusal.OVERLOADED, f"{whose}, its limit (broker.stream_memory)")

    def tell(self, message: messages.Message) -> None:
        """Send a control message."""
        self._say(encode(message))

    def end(self, why: str, kind: LostKind = LostKind.CLOSED) -> None:
        """End the link in order; `why` is for the log."""
        self.lost_by = self.lost_by or Lost(kind, why)
        if self.link is not None:
            self.link.close(self.lost_by)

    def _say(self, data: bytes) -> None:
        if self._control is not None:
            self._control.write(data)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def hello_fault(hello: Hello) -> str:
    """What is wrong with the words of a Hello (they become keys in the registry and fields in logs), or ""."""
    try:
        check_word(hello.agent_id)
        check_word(hello.namespace)
        parse_exposes(hello.exposes)
        for address in [*hello.addresses, *(entry.ip for entry in hello.publish)]:
            if canonical_ip(address) != address:
                return f"{address!r} is not the canonical form of an IP address"
    except ValueError as error:
        return str(error)
    return ""
