"""One link as the agent sees it, in the relay's thread.

A session: TLS, Hello, [Challenge, Proof,] Welcome; then Trust, Drain and Bye. A request for a certificate: TLS, Enrol,
Enrolled.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, assert_never

from rtunnel.relay.ends import EndHandler
from rtunnel.relay.link import Link
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Attempt
from rtunnel.relay.stream import StreamEnd
from rtunnel.trust.identity import PrivateKey, prove_session
from rtunnel.trust.keys import AGENT_LABEL, BROKER_LABEL, token_mac
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    Bye,
    Challenge,
    Decoder,
    Drain,
    Enrol,
    Enrolled,
    Hello,
    MessageError,
    Proof,
    Refuse,
    Trust,
    Update,
    Welcome,
    encode,
)
from rtunnel.wire.refusal import Refusal
from rtunnel.wire.yamux import INITIAL_WINDOW

#: A broker answers a Hello with a token by its Challenge at once: it asks nobody for that.
CHALLENGE_SECONDS: Final = 2.0

#: What a broker sends in a session.
FromBroker = Challenge | Welcome | Trust | Drain | Bye | Refuse


class SessionOwner(Protocol):
    """The agent, as a session sees it. Called in the relay's thread."""

    def session_ready(self, session: AgentSession) -> None:
        """The link is up, and the session has no Hello yet: `greet` it."""

    def session_up(self, session: AgentSession) -> None:
        """Welcome."""

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        """Refused (with a code) or lost. Once, also when it never came up."""

    def session_draining(self, session: AgentSession, deadline: float) -> None:
        """The node goes away within `deadline` seconds."""

    def session_trust(self, session: AgentSession, signed: bytes) -> None:
        """The broker has a newer trust list."""

    def serve_stream(self, session: AgentSession, stream: StreamEnd) -> EndHandler:
        """A Dial is about to come."""


@dataclass(eq=False)
class AgentSession:
    """One session; the link's owner and its control stream's talker."""

    owner: SessionOwner
    hello: Hello | None  # None: the owner has it when the link is up
    secret: bytes  # of the join token; empty: the link's certificate says who we are
    timeout: float  # from the link's TLS handshake until Welcome
    attempt: Attempt | None = None  # while there is no link
    link: Link | None = None
    certificate: bytes | None = None  # the broker's
    welcome: Welcome | None = None
    draining: bool = False
    news: bytes = b""  # a trust list that waits
    news_pause: Timer | None = None  # the one before is young
    answered: bool = False  # the broker said something that could be understood
    streams: int = 0

    _control: StreamEnd | None = None
    _decoder: Decoder[FromBroker] = field(default_factory=lambda: Decoder(Challenge, Refuse))
    _code: Refusal | None = None
    _lost: Lost | None = None
    _deadline: Timer | None = None
    _frame: bytes = b""

    @property
    def node(self) -> str:
        """The broker node; empty before Welcome."""
        return self.welcome.node if self.welcome else ""

    @property
    def _binding(self) -> bytes:
        return hashlib.sha256(self.certificate).digest() if self.certificate else b""

    def link_up(self, link: Link) -> None:
        """See LinkOwner."""
        self.link = link
        self.certificate = link.peer_certificate
        if self.hello is None:
            self.owner.session_ready(self)
        else:
            self.greet(self.hello)

    def greet(self, hello: Hello) -> None:
        """Say the Hello. No effect when the link is gone."""
        link = self.link
        if link is None or link.over:
            return
        self.hello = hello
        self._frame = encode(hello)
        if self.secret:
            # Without TLS this is the first that a silent address is asked.
            self._wait_for("Challenge", min(self.timeout, CHALLENGE_SECONDS))
        else:
            self._decoder.expect(Welcome, Refuse)
            self._decoder.limit = messages.MAX_MESSAGE
            self._wait_for("Welcome", self.timeout)
        self._control = link.open(self, self._frame)

    def _wait_for(self, word: str, seconds: float) -> None:
        assert self.link is not None
        if self._deadline is not None:
            self._deadline.cancel()
        why = f"no {word} within the handshake deadline ({seconds:g} s)"
        self._deadline = self.link.loop.after(seconds, lambda: self.end(why, LostKind.DEADLINE))

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """See LinkOwner: the broker opens streams only on a live session."""
        if self.welcome is None:
            return None
        return self.owner.serve_stream(self, stream)

    def link_down(self, link: Link, lost: Lost) -> None:
        """See LinkOwner."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.owner.session_down(self, self._code, self._lost or lost)

    def received(self, data: bytes) -> None:
        """See Talker."""
        self._decoder.feed(data)
        try:
            while self.link is not None and not self.link.over and (message := self._decoder.next()) is not None:
                self._take(message)
        except MessageError as error:
            self._code = Refusal.PROTOCOL_ERROR
            self.end(f"protocol error: {error}", LostKind.PROTOCOL_ERROR)

    def finished(self) -> None:
        """See Talker."""
        self.end("the broker closed the control stream")

    def lost(self, lost: Lost) -> None:
        """See EndHandler. A lost link has a reason of its own, which comes by `link_down`."""
        if lost.kind is not LostKind.LINK_LOST:
            self.end(f"control stream {lost}", lost.kind)

    def _take(self, message: FromBroker) -> None:
        self.answered = True
        match message:
            case Challenge():
                self._prove(message)
            case Welcome():
                self._take_welcome(message)
            case Trust(signed):
                self.owner.session_trust(self, signed)
            case Refuse(code, text):
                self._code = Refusal.parse(code)
                self.end(f"{code}: {text}", LostKind.REFUSED)
            case Drain(deadline):
                self.draining = True
                self.owner.session_draining(self, deadline)
            case Bye(reason):
                self.end(f"the broker said goodbye: {reason}")
            case _:
                assert_never(message)

    def _take_welcome(self, welcome: Welcome) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        assert self.link is not None and self.hello is not None
        if welcome.start_window not in (INITIAL_WINDOW, self.hello.start_window):
            raise MessageError(f"the broker's start_window {welcome.start_window} is not the Hello's")
        self.link.start_window = welcome.start_window
        self.welcome = welcome
        self._decoder.expect(Trust, Drain, Bye, Refuse)
        self.owner.session_up(self)

    def _prove(self, challenge: Challenge) -> None:
        """The broker must know the token as well: TLS says who it is, this says that it is of our cluster."""
        if challenge.version != messages.VERSION:
            self._code = Refusal.VERSION
            text = f"the broker speaks protocol version {challenge.version}, this agent {messages.VERSION}"
            self.end(text, LostKind.REFUSED)
            return
        binding = self._binding
        expected = token_mac(self.secret, BROKER_LABEL, self._frame, challenge.nonce, binding)
        if not hmac.compare_digest(challenge.mac, expected):
            self._code = Refusal.BAD_TOKEN
            text = "the broker does not know our join token's secret: wrong token, or not our broker"
            self.end(text, LostKind.REFUSED)
            return
        mac = token_mac(self.secret, AGENT_LABEL, self._frame, challenge.nonce, binding)
        self._decoder.expect(Welcome, Refuse)
        self._decoder.limit = messages.MAX_MESSAGE
        self._wait_for("Welcome", self.timeout)
        self._control_say(encode(Proof(mac=mac)))

    def expose(self, exposes: list[str], addresses: list[str]) -> None:
        """Other ports are exposed, or the agent answers for other addresses, from now on."""
        if self.welcome is not None:
            self.tell(Update(exposes=exposes, addresses=addresses))

    def go_over(self, exposes: list[str], certificate: bytes, key: PrivateKey) -> None:
        """The agent has another certificate than the one that the link has shown."""
        if self.welcome is not None:
            signature = prove_session(key, self.welcome.node, self.welcome.epoch, self._binding)
            self.tell(Update(exposes=exposes, certificate=certificate, signature=signature))

    def tell(self, message: messages.Message) -> None:
        """Send a control message."""
        self._control_say(encode(message))

    def end(self, why: str, kind: LostKind = LostKind.CLOSED) -> None:
        """End the link in order, or the connect; `why` is for the log."""
        self._lost = self._lost or Lost(kind, why)
        if self.link is not None:
            self.link.close(self._lost)
        elif self.attempt is not None:
            attempt, self.attempt = self.attempt, None
            attempt.cancel()
            self.owner.session_down(self, None, self._lost)

    def _control_say(self, data: bytes) -> None:
        if self._control is not None:
            self._control.write(data)


@dataclass(eq=False)
class Enrolment:
    """A link of its own for one request; its owner, and its control stream's talker."""

    request: Enrol
    ready: Callable[[], None]  # called when the link is up: `ask` then
    done: Callable[[Enrolled | Refuse | Lost], None]  # called once, with the answer or with why there is none
    timeout: float
    attempt: Attempt | None = None  # while there is no link
    link: Link | None = None

    _decoder: Decoder[Enrolled | Refuse] = field(
        default_factory=lambda: Decoder(Enrolled, Refuse, limit=messages.MAX_MESSAGE)
    )
    _deadline: Timer | None = None
    _outcome: Enrolled | Refuse | Lost | None = None

    def link_up(self, link: Link) -> None:
        """See LinkOwner."""
        self.link = link
        self.ready()

    def ask(self) -> None:
        """Send the request. No effect when the link is gone."""
        link = self.link
        if link is not None and not link.over:
            self._deadline = link.loop.after(self.timeout, self._late)
            link.open(self, encode(self.request))

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """See LinkOwner."""
        return None

    def link_down(self, link: Link, lost: Lost) -> None:
        """See LinkOwner."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.done(self._outcome or lost)

    def received(self, data: bytes) -> None:
        """See Talker."""
        self._decoder.feed(data)
        try:
            answer = self._decoder.next()
        except MessageError as error:
            self.end(f"protocol error: {error}", LostKind.PROTOCOL_ERROR)
            return
        if answer is not None:
            self._outcome = answer
            self.end("enrolled")

    def finished(self) -> None:
        """See Talker."""
        self.end("the broker closed the control stream")

    def lost(self, lost: Lost) -> None:
        """See EndHandler. A lost link has a reason of its own, which comes by `link_down`."""
        if lost.kind is not LostKind.LINK_LOST:
            self.end(f"control stream {lost}", lost.kind)

    def _late(self) -> None:
        self.end("no answer within the handshake deadline", LostKind.DEADLINE)

    def end(self, why: str, kind: LostKind = LostKind.CLOSED) -> None:
        """End the link in order, or the connect; `why` is for the log."""
        lost = Lost(kind, why)
        self._outcome = self._outcome or lost
        if self.link is not None:
            self.link.close(lost)
        elif self.attempt is not None:
            attempt, self.attempt = self.attempt, None
            attempt.cancel()
            self.done(self._outcome)


def new_nonce() -> bytes:
    """Sixteen random bytes."""
    return secrets.token_bytes(messages.NONCE_BYTES)
