"""One link as the agent sees it, in the relay's thread: a session, or a request for a certificate.

`rtunnel.wire.control` holds the protocol. The classes here own the link and the timers, and send
what the machine returns.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Final, Protocol, assert_never

from rtunnel.compat import override
from rtunnel.relay.ends import EndHandler
from rtunnel.relay.link import Link
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Attempt
from rtunnel.relay.stream import StreamEnd
from rtunnel.trust.identity import PrivateKey, prove_session
from rtunnel.trust.keys import LinkMacs
from rtunnel.wire import messages
from rtunnel.wire.control import (
    AGENT_SERVES,
    Action,
    AgentControl,
    AgentEvent,
    AgentState,
    Challenged,
    DrainStarted,
    Left,
    RemoteProtocolError,
    TrustOffered,
    WasEnrolled,
    WasRefused,
    Welcomed,
)
from rtunnel.wire.messages import Enrol, Enrolled, Hello, Refuse, Update, Welcome
from rtunnel.wire.refusal import Refusal

#: Seconds for the Challenge to a Hello with a token. A broker needs no other process for it.
CHALLENGE_SECONDS: Final = 2.0


class SessionOwner(Protocol):
    """The agent, as its sessions see it. In the relay's thread."""

    def session_ready(self, session: AgentSession) -> None:
        """Give a session whose link is up its Hello, by `greet`."""

    def session_up(self, session: AgentSession) -> None:
        """Hear that the broker has sent Welcome."""

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        """Hear that the session was refused (with a code) or lost.

        Called once, also without a link.
        """

    def session_draining(self, session: AgentSession, deadline: float) -> None:
        """Hear that the node stops within `deadline` seconds."""

    def session_trust(self, session: AgentSession, signed: bytes) -> None:
        """Take a newer trust list of the broker."""

    def serve_stream(self, session: AgentSession, stream: StreamEnd) -> EndHandler:
        """Return the handler of a stream that the broker has opened: a Dial comes on it."""


class _ControlLink:
    """A link of the agent with its control stream: what a session and an enrolment share.

    A subclass has `_is_up`, `_hear` for each event, and `_is_down`, which is called once.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds from the link's TLS handshake until Welcome, or the answer to an
        Enrol.
        """
        self.timeout = timeout
        self.attempt: Attempt | None = None  # the connect, until there is a link
        self.link: Link | None = None
        self.certificate: bytes | None = None  # the broker's, DER; None without TLS
        self.code: Refusal | None = None  # with which the broker refused, or failed
        self._control = AgentControl(LinkMacs(lambda: self.binding))
        self._stream: StreamEnd | None = None
        self._deadline: Timer | None = None
        self._lost: Lost | None = None  # why it ends, once that is known

    @property
    def state(self) -> AgentState:
        """The protocol's state; `AgentState` says what holds in each."""
        return self._control.state

    @property
    def heard(self) -> bool:
        """Whether the broker has sent a valid message."""
        return self._control.heard

    @property
    def binding(self) -> bytes:
        """SHA-256 of the broker's certificate; empty without TLS."""
        return hashlib.sha256(self.certificate).digest() if self.certificate else b""

    def link_up(self, link: Link) -> None:
        self.link = link
        self.certificate = link.peer_certificate
        self._is_up()

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        return None

    def link_down(self, link: Link, lost: Lost) -> None:
        self._over(self._lost or lost)

    def received(self, data: bytes) -> None:
        try:
            while events := self._control.receive(data):
                data = b""
                for event in events:
                    self._hear(event)
        except RemoteProtocolError as error:
            self.code = error.code
            broken = error.code is Refusal.PROTOCOL_ERROR
            text = f"protocol error: {error}" if broken else str(error)
            self.end(text, LostKind.PROTOCOL_ERROR if broken else LostKind.REFUSED)

    def finished(self) -> None:
        self.end("the broker closed the control stream")

    def lost(self, lost: Lost) -> None:
        """End the session. A lost link has a reason of its own, which comes by `link_down`."""
        if lost.kind is not LostKind.LINK_LOST:
            self.end(f"control stream {lost}", lost.kind)

    def end(self, why: str, kind: LostKind = LostKind.CLOSED) -> None:
        """End the link in order, or the connect; `why` is for the log."""
        self._lost = self._lost or Lost(kind, why)
        if self.link is not None:
            self.link.close(self._lost)
        elif self.attempt is not None:
            attempt, self.attempt = self.attempt, None
            attempt.cancel()
            self._over(self._lost)

    def _open(self, link: Link, first: bytes, awaited: str, seconds: float) -> None:
        self._wait_for(awaited, seconds)
        self._stream = link.open(self, first)

    def _wait_for(self, awaited: str, seconds: float) -> None:
        assert self.link is not None
        self._stop_deadline()
        why = f"no {awaited} within the handshake deadline ({seconds:g} s)"
        self._deadline = self.link.loop.after(seconds, lambda: self.end(why, LostKind.DEADLINE))

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _over(self, lost: Lost) -> None:
        self._stop_deadline()
        self._control.close()
        self._is_down(lost)

    def _say(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)

    def _is_up(self) -> None:
        """Go on: the link is up."""
        raise NotImplementedError

    def _is_down(self, lost: Lost) -> None:
        """Tell the owner: the link has ended, or there was none."""
        raise NotImplementedError

    def _hear(self, event: AgentEvent) -> None:
        raise NotImplementedError


class AgentSession(_ControlLink):
    """One session. `hello` None: the owner has it when the link is up.

    `secret`: of the join token; empty: the link's certificate says who the agent is.
    """

    def __init__(self, owner: SessionOwner, hello: Hello | None, secret: bytes, timeout: float) -> None:
        super().__init__(timeout)
        self.owner = owner
        self.hello = hello
        self.secret = secret
        self.welcome: Welcome | None = None
        self.streams = 0
        self.news = b""  # a trust list that waits
        self.news_pause: Timer | None = None  # until the next trust list is taken

    @property
    def node(self) -> str:
        """The broker node; empty before Welcome."""
        return self.welcome.node if self.welcome else ""

    @property
    def epoch(self) -> str:
        """The session's epoch, as logs have it; empty before Welcome."""
        return str(self.welcome.epoch) if self.welcome else ""

    def greet(self, hello: Hello) -> None:
        """Send the Hello. No effect when the link has ended."""
        link = self.link
        if link is None or not self._control.allows(Action.HELLO):
            return
        self.hello = hello
        frame = self._control.hello(hello, self.secret)
        if self.secret:
            # Without TLS the Hello is the first message that a silent address must answer.
            self._open(link, frame, "Challenge", min(self.timeout, CHALLENGE_SECONDS))
        else:
            self._open(link, frame, "Welcome", self.timeout)

    @override
    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """Return the handler of a stream of the broker, which opens streams only on a
        live session.
        """
        return self.owner.serve_stream(self, stream) if self._control.state in AGENT_SERVES else None

    def expose(self, exposes: list[str], addresses: list[str]) -> None:
        """Send an Update: the ports that are exposed, and the addresses that are answered for, from
        now on.
        """
        self._update(Update(exposes=exposes, addresses=addresses))

    def go_over(self, exposes: list[str], certificate: bytes, key: PrivateKey) -> None:
        """Send an Update with a newer certificate than the one of the link's handshake."""
        if self.welcome is not None:
            signature = prove_session(key, self.welcome.node, self.welcome.epoch, self.binding)
            self._update(Update(exposes=exposes, certificate=certificate, signature=signature))

    def leave(self, why: str) -> None:
        """Send Bye and end the link, or the connect."""
        if self._control.allows(Action.BYE):
            self._say(self._control.bye(why))
        self.end(why)

    def _update(self, update: Update) -> None:
        if self._control.allows(Action.UPDATE):
            self._say(self._control.update(update))

    @override
    def _is_up(self) -> None:
        if self.hello is None:
            self.owner.session_ready(self)
        else:
            self.greet(self.hello)

    @override
    def _is_down(self, lost: Lost) -> None:
        self.owner.session_down(self, self.code, lost)

    @override
    def _hear(self, event: AgentEvent) -> None:
        match event:
            case Challenged():
                self._wait_for("Welcome", self.timeout)
                self._say(self._control.proof())
            case Welcomed(welcome):
                self._take_welcome(welcome)
            case TrustOffered(signed):
                self.owner.session_trust(self, signed)
            case DrainStarted(deadline):
                self.owner.session_draining(self, deadline)
            case WasRefused(answer):
                self.code = Refusal.parse(answer.code)
                self.end(f"{answer.code}: {answer.text}", LostKind.REFUSED)
            case Left(reason):
                self.end(f"the broker said goodbye: {reason}")
            case WasEnrolled():
                raise AssertionError("a session asks for no certificate")
            case _:
                assert_never(event)

    def _take_welcome(self, welcome: Welcome) -> None:
        assert self.link is not None
        self._stop_deadline()
        self.link.start_window = welcome.start_window
        self.welcome = welcome
        self.owner.session_up(self)


class Enrolment(_ControlLink):
    """A link of its own for one request for a certificate.

    `ready` is called when the link is up: `ask` then. `done` is called once, with the answer or
    with why there is none.
    """

    def __init__(
        self,
        request: Enrol,
        ready: Callable[[], None],
        done: Callable[[Enrolled | Refuse | Lost], None],
        timeout: float,
    ) -> None:
        super().__init__(timeout)
        self._request = request
        self._ready = ready
        self._done = done
        self._answer: Enrolled | Refuse | None = None

    def ask(self) -> None:
        """Send the request. No effect when the link has ended."""
        if self.link is not None and self._control.allows(Action.ENROL):
            self._open(self.link, self._control.enrol(self._request), "answer", self.timeout)

    @override
    def _is_up(self) -> None:
        self._ready()

    @override
    def _is_down(self, lost: Lost) -> None:
        self._done(self._answer or lost)

    @override
    def _hear(self, event: AgentEvent) -> None:
        match event:
            case WasEnrolled(answer):
                self._answer = answer
                self.end("enrolled", LostKind.ANSWERED)
            case WasRefused(refusal):
                self._answer = refusal
                self.end(f"{refusal.code}: {refusal.text}", LostKind.REFUSED)
            case Challenged() | Welcomed() | TrustOffered() | DrainStarted() | Left():
                raise AssertionError("the machine hears nothing else after an Enrol")
            case _:
                assert_never(event)


def new_nonce() -> bytes:
    """Return sixteen random bytes."""
    return secrets.token_bytes(messages.NONCE_BYTES)
