"""The control stream of a link as two pure machines: `BrokerControl` and `AgentControl`.

A session is Hello, [Challenge, Proof,] Welcome; then Update, Trust, Drain and Bye. A request for a
certificate is Enrol, Enrolled, on a link of its own. Refused may come in place of any answer. The
machines hold no socket, clock or random source: bytes go in by `receive` and come back as events,
and each action returns the bytes to send. The owner makes the decisions that need the world
outside (is the token known, is there a port) and answers an event by an action.

`BROKER` and `AGENT` are all transitions there are. docs/wire.md shows the same tables, and a test
compares them. A message that is not in the table is the peer's fault: `RemoteProtocolError`, with
the code to refuse it with. An action that is not in the table is our own fault: `LocalError`.

With the authority there is no such machine: a connection to it carries any number of Enrol and
Follow, each with one answer, in one state.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, Generic, Protocol, TypeVar, assert_never

import msgspec

from rtunnel.compat import override
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    Bye,
    Challenge,
    Decoder,
    Drain,
    Enrol,
    Enrolled,
    Hello,
    Message,
    MessageError,
    Proof,
    Refuse,
    Trust,
    Update,
    Welcome,
    encode,
)
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel.wire.states import Table
from rtunnel.wire.yamux import INITIAL_WINDOW

#: Bytes that a link may send before its Proof has come: the longest Hello, the Proof, and room for
#: the headers of frames and for pings. The link counts them (`Link.allowance`).
UNPROVEN_BYTES: Final = messages.MAX_HELLO + messages.MAX_UNAUTHENTICATED
#: Updates of one agent at once, and the seconds for each one more. An agent sends one when its
#: file, its addresses or its certificate change. Each is up to 64 KiB to parse, so 3 MB/s of them
#: are no configuration but a flood.
UPDATES_AT_ONCE: Final = 60
UPDATE_SECONDS: Final = 1.0

#: The messages that an agent sends, and those that a broker sends.
FromAgent = Hello | Enrol | Proof | Update | Bye
FromBroker = Challenge | Welcome | Enrolled | Trust | Drain | Bye | Refuse
FROM_AGENT: Final[tuple[type[FromAgent], ...]] = (Hello, Enrol, Proof, Update, Bye)
FROM_BROKER: Final[tuple[type[FromBroker], ...]] = (Challenge, Welcome, Enrolled, Trust, Drain, Bye, Refuse)


class RemoteProtocolError(Refused):
    """The peer broke the protocol, or failed to prove itself; `code` and `text` are the answer."""


class Action(StrEnum):
    """An action of the machine's owner; most send the message of that name."""

    HELLO = "hello"  # with the link's certificate as the proof
    HELLO_BY_TOKEN = "hello with a token"  # noqa: S105 - no password
    ENROL = "enrol"
    PROOF = "proof"
    UPDATE = "update"
    CHALLENGE = "challenge"
    ADMIT = "(the link's certificate is good)"  # sends nothing
    WELCOME = "welcome"
    ENROLLED = "enrolled"
    TRUST = "trust"
    DRAIN = "drain"
    REVOKE = "(the certificate is not good any more)"  # sends nothing
    REFUSE = "refused"
    BYE = "bye"


class _State(Enum):
    """A word for logs, and `meaning`: a sentence that says what holds in the state.

    No StrEnum: states of the two ends with the same word must not be equal.
    """

    __hash__ = object.__hash__  # that of Enum is a call of Python for each stream

    def __init__(self, word: str, meaning: str) -> None:
        self.word = word
        self.meaning = meaning

    def __str__(self) -> str:
        return self.word


class BrokerState(_State):
    """A session's state at its broker."""

    NEW = "new", "The link is up; no whole message has come."
    GREETED = "greeted", "A Hello has come; the broker decides at once how the agent proves itself."
    CHALLENGED = "challenged", "Challenge is sent; the Proof is due."
    PROVEN = "proven", "The agent has proved who it is; its ports and tuples are being registered. It has no stream."
    LIVE = "live", "Welcome is sent: the tuples are in the registry, and streams may begin."
    DRAINING = "draining", "Drain is sent; everything else is as in `live`."
    REVOKED = "revoked", "The certificate is not good any more: all streams are reset, and none may begin."
    ENROLLING = "enrolling", "An Enrol has come; the authority is asked."
    ENROLLED = "enrolled", "Enrolled is sent; the agent ends the link."
    FAILED = "failed", "The agent broke the protocol."
    REFUSED = "refused", "Refused is sent; whatever still comes is ignored, and the broker ends the link."
    CLOSED = "closed", "One side has said Bye, or the link has ended."


class AgentState(_State):
    """A session's state at its agent."""

    NEW = "new", "Nothing is sent; the link may not be up yet."
    GREETED = "greeted", "A Hello that names a join token is sent; the Challenge is due."
    CHALLENGED = "challenged", "The broker has proved that it knows the token; the Proof follows at once."
    PROVEN = "proven", "The broker has every proof that it needs; Welcome is due."
    LIVE = "live", "Welcome has come: streams may begin."
    DRAINING = "draining", "Drain has come; everything else is as in `live`."
    ENROLLING = "enrolling", "Enrol is sent; its answer is due."
    ENROLLED = "enrolled", "Enrolled has come; the agent ends the link."
    FAILED = "failed", "The broker broke the protocol, or did not prove itself; the agent ends the link."
    REFUSED = "refused", "Refused has come; the agent ends the link."
    CLOSED = "closed", "One side has said Bye, or the link has ended."


_B, _A, _Do = BrokerState, AgentState, Action
BrokerTable = Table[BrokerState, Action]
AgentTable = Table[AgentState, Action]

#: All transitions at the broker but two: a fault of the agent leads to `failed` from every state,
#: and the end of the link leads to `closed`.
BROKER: Final[BrokerTable] = Table({
    (_B.NEW, Hello): _B.GREETED,
    (_B.NEW, Enrol): _B.ENROLLING,
    (_B.GREETED, _Do.CHALLENGE): _B.CHALLENGED,
    (_B.GREETED, _Do.ADMIT): _B.PROVEN,
    (_B.GREETED, _Do.REFUSE): _B.REFUSED,
    (_B.CHALLENGED, Proof): _B.PROVEN,
    (_B.PROVEN, Update): _B.PROVEN,
    (_B.PROVEN, Bye): _B.CLOSED,
    (_B.PROVEN, _Do.WELCOME): _B.LIVE,
    (_B.PROVEN, _Do.REVOKE): _B.REVOKED,
    (_B.PROVEN, _Do.REFUSE): _B.REFUSED,
    (_B.LIVE, Update): _B.LIVE,
    (_B.LIVE, Bye): _B.CLOSED,
    (_B.LIVE, _Do.TRUST): _B.LIVE,
    (_B.LIVE, _Do.DRAIN): _B.DRAINING,
    (_B.LIVE, _Do.REVOKE): _B.REVOKED,
    (_B.LIVE, _Do.REFUSE): _B.REFUSED,
    (_B.LIVE, _Do.BYE): _B.CLOSED,
    (_B.DRAINING, Update): _B.DRAINING,
    (_B.DRAINING, Bye): _B.CLOSED,
    (_B.DRAINING, _Do.TRUST): _B.DRAINING,
    (_B.DRAINING, _Do.REVOKE): _B.REVOKED,
    (_B.DRAINING, _Do.REFUSE): _B.REFUSED,
    (_B.DRAINING, _Do.BYE): _B.CLOSED,
    (_B.REVOKED, Update): _B.REVOKED,
    (_B.REVOKED, Bye): _B.CLOSED,
    (_B.REVOKED, _Do.TRUST): _B.REVOKED,
    (_B.REVOKED, _Do.REFUSE): _B.REFUSED,
    (_B.ENROLLING, Bye): _B.CLOSED,
    (_B.ENROLLING, _Do.ENROLLED): _B.ENROLLED,
    (_B.ENROLLING, _Do.REFUSE): _B.REFUSED,
    (_B.ENROLLED, Bye): _B.CLOSED,
    (_B.FAILED, _Do.REFUSE): _B.REFUSED,
})  # fmt: skip

#: All transitions at the agent but two: a fault of the broker leads to `failed` from every state,
#: and the end of the link leads to `closed`.
AGENT: Final[AgentTable] = Table({
    (_A.NEW, _Do.HELLO): _A.PROVEN,
    (_A.NEW, _Do.HELLO_BY_TOKEN): _A.GREETED,
    (_A.NEW, _Do.ENROL): _A.ENROLLING,
    (_A.GREETED, Challenge): _A.CHALLENGED,
    (_A.GREETED, Refuse): _A.REFUSED,
    (_A.CHALLENGED, _Do.PROOF): _A.PROVEN,
    (_A.PROVEN, Welcome): _A.LIVE,
    (_A.PROVEN, Refuse): _A.REFUSED,
    (_A.LIVE, Trust): _A.LIVE,
    (_A.LIVE, Drain): _A.DRAINING,
    (_A.LIVE, Refuse): _A.REFUSED,
    (_A.LIVE, Bye): _A.CLOSED,
    (_A.LIVE, _Do.UPDATE): _A.LIVE,
    (_A.LIVE, _Do.BYE): _A.CLOSED,
    (_A.DRAINING, Trust): _A.DRAINING,
    (_A.DRAINING, Drain): _A.DRAINING,
    (_A.DRAINING, Refuse): _A.REFUSED,
    (_A.DRAINING, Bye): _A.CLOSED,
    (_A.DRAINING, _Do.UPDATE): _A.DRAINING,
    (_A.DRAINING, _Do.BYE): _A.CLOSED,
    (_A.ENROLLING, Enrolled): _A.ENROLLED,
    (_A.ENROLLING, Refuse): _A.REFUSED,
})  # fmt: skip

#: States in which streams may begin.
BROKER_SERVES: Final = frozenset({_B.LIVE, _B.DRAINING})
AGENT_SERVES: Final = frozenset({_A.LIVE, _A.DRAINING})
#: States in which the machine ignores what comes: the link is about to end.
_DEAF: Final[frozenset[_State]] = frozenset({_B.REFUSED, _B.CLOSED, _A.REFUSED, _A.CLOSED, _A.ENROLLED})

#: The most bytes of a message's body by state; in all other states MAX_MESSAGE. A peer that
#: has proved nothing fills no memory.
_BROKER_LIMITS: Final = {
    _B.NEW: messages.MAX_HELLO,
    _B.GREETED: messages.MAX_UNAUTHENTICATED,
    _B.CHALLENGED: messages.MAX_UNAUTHENTICATED,
    _B.ENROLLING: messages.MAX_UNAUTHENTICATED,
    _B.ENROLLED: messages.MAX_UNAUTHENTICATED,
}
_AGENT_LIMITS: Final = {_A.GREETED: messages.MAX_UNAUTHENTICATED}


class TokenMacs(Protocol):
    """The MACs by which the two ends prove a join token.

    They cover the Hello's frame, the broker's nonce, and the certificate that the broker has shown
    on the link, which the owner adds.
    """

    def broker(self, secret: bytes, hello: bytes, nonce: bytes) -> bytes:
        """Return the MAC of the Challenge."""

    def agent(self, secret: bytes, hello: bytes, nonce: bytes) -> bytes:
        """Return the MAC of the Proof."""


# Events at the broker.


@dataclass(frozen=True, slots=True)
class Greeted:
    """The agent said Hello.

    Answer by `challenge`, `admit` or `refuse` before `receive` is called again.
    """

    hello: Hello


@dataclass(frozen=True, slots=True)
class Proved:
    """The agent proved the join token that its Hello names; `hello` is that Hello, whole."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class EnrolRequested:
    """The agent asks for a certificate. Answer by `enrolled` or `refuse`."""

    request: Enrol


@dataclass(frozen=True, slots=True)
class Updated:
    """The agent exposes other ports, has other addresses, or another certificate."""

    update: Update


# Events at the agent.


@dataclass(frozen=True, slots=True)
class Challenged:
    """The broker proved that it knows the join token.

    Answer by `proof` before `receive` is called again.
    """


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The broker has welcomed the agent: the session exists."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class WasEnrolled:
    """The authority's answer, which the owner has to check."""

    answer: Enrolled


@dataclass(frozen=True, slots=True)
class TrustOffered:
    """The broker has a newer trust list."""

    signed: bytes


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The node goes away within `deadline` seconds."""

    deadline: float


@dataclass(frozen=True, slots=True)
class WasRefused:
    """The broker refused, and ends the link."""

    answer: Refuse


# At both.


@dataclass(frozen=True, slots=True)
class Left:
    """The peer said Bye: end the link."""

    reason: str


BrokerEvent = Greeted | Proved | EnrolRequested | Updated | Left
AgentEvent = Challenged | Welcomed | WasEnrolled | TrustOffered | DrainStarted | WasRefused | Left

_S = TypeVar("_S", BrokerState, AgentState)
_M = TypeVar("_M", bound=Message)
_E = TypeVar("_E")


class _Control(Generic[_S, _M, _E]):
    """The part that both machines share: the table, the limits, and the fault that stays."""

    _TABLE: Table[_S, Action]
    _LIMITS: Mapping[_S, int]
    _FAILED: _S
    _CLOSED: _S

    def __init__(self, state: _S, expected: tuple[type[_M], ...]) -> None:
        self.state: _S = state
        self.heard = False  # a whole message has come
        self._decoder: Decoder[_M] = Decoder(*expected)
        self._fault: RemoteProtocolError | None = None
        self._enter(state)

    def receive(self, data: bytes) -> list[_E]:
        """Take bytes in any split, and return the events that are complete.

        It stops behind an event that changes the state, so that the owner can act before the next
        message is read: call it again with b"" until it returns nothing. So of the events of one
        call only the last one can have changed the state.

        Raises RemoteProtocolError when the peer breaks the protocol, and the same error from then
        on. In the last states, in which the link is about to end, it drops the bytes.
        """
        if self.state in _DEAF:
            return []
        events: list[_E] = []
        if self._fault is None:
            self._decoder.feed(data)
            before = self.state
            while self.state is before and (event := self._next()) is not None:
                events.append(event)
        if self._fault is not None and not events:
            self._enter(self._FAILED)
            raise self._fault
        return events

    def allows(self, action: Action) -> bool:
        """Return whether this action is in the table for the present state."""
        return (self.state, action) in self._TABLE

    def close(self) -> None:
        """Note that the link has ended."""
        self._enter(self._CLOSED)

    def _next(self) -> _E | None:
        """Return the next event; None when there is none yet, or a fault, which goes
        into `_fault`.
        """
        try:
            return self._read()
        except MessageError as error:
            code = Refusal.VERSION if error.other_version else Refusal.PROTOCOL_ERROR
            self._fault = RemoteProtocolError(code, f"{error} (in the state {self.state})")
        except RemoteProtocolError as error:
            self._fault = error
        return None

    def _read(self) -> _E | None:
        found = self._decoder.next_frame()
        if found is None:
            return None
        self.heard = True
        message, frame = found
        try:
            after = self._TABLE[self.state, type(message)]
        except MessageError as error:
            raise RemoteProtocolError(Refusal.PROTOCOL_ERROR, str(error)) from None
        event = self._take(message, frame)
        self._enter(after)
        return event

    def _take(self, message: _M, frame: bytes) -> _E:
        """Check a message that the table allows and return its event.

        Raises RemoteProtocolError or MessageError.
        """
        raise NotImplementedError

    def _act(self, action: Action, message: Message | None = None) -> bytes:
        self._enter(self._TABLE[self.state, action])
        return b"" if message is None else encode(message)

    def _enter(self, state: _S) -> None:
        self.state = state
        self._decoder.limit = self._LIMITS.get(state, messages.MAX_MESSAGE)
        if state in _DEAF:
            self._decoder.rest()


class BrokerControl(_Control[BrokerState, FromAgent, BrokerEvent]):
    """The broker's end of one control stream.

    `macs`: see TokenMacs. `nonce` returns 16 random bytes. `clock` returns seconds that only grow.
    """

    _TABLE = BROKER
    _LIMITS = _BROKER_LIMITS
    _FAILED = BrokerState.FAILED
    _CLOSED = BrokerState.CLOSED

    def __init__(self, macs: TokenMacs, nonce: Callable[[], bytes], clock: Callable[[], float]) -> None:
        super().__init__(BrokerState.NEW, FROM_AGENT)
        self._macs = macs
        self._new_nonce = nonce
        self._clock = clock
        self._hello = b""  # the frame of the Hello, until it is proved
        self._expected = b""  # the Proof's MAC
        self._token_id = ""
        self._start_window = INITIAL_WINDOW
        #: A Hello of another version: it was refused, and names the agent.
        self.refused_hello: Hello | None = None
        self._updates_until = 0.0  # when none of the agent's Updates counts against it any more

    @override
    def _take(self, message: FromAgent, frame: bytes) -> BrokerEvent:
        match message:
            case Hello():
                return self._take_hello(message, frame)
            case Proof(mac):
                return self._take_proof(mac)
            case Enrol():
                return self._take_enrol(message, len(frame) - 4)
            case Update():
                self._charge_update()
                return Updated(message)
            case Bye(reason):
                return Left(reason)
            case _:
                assert_never(message)

    def _take_hello(self, hello: Hello, frame: bytes) -> Greeted:
        if hello.version != messages.VERSION:
            self.refused_hello = hello
        _check_version(hello.version, "the agent", "this broker")
        self._hello = frame
        self._token_id = hello.token_id
        self._start_window = hello.start_window
        return Greeted(hello)

    def _take_proof(self, mac: bytes) -> Proved:
        if not hmac.compare_digest(mac, self._expected):
            raise RemoteProtocolError(Refusal.BAD_TOKEN, f"the proof for join token {self._token_id!r} is wrong")
        decoder = Decoder(Hello, limit=messages.MAX_HELLO)
        decoder.feed(self._hello)
        self._hello = b""
        hello = decoder.next()
        assert hello is not None
        return Proved(hello)

    def _take_enrol(self, request: Enrol, size: int) -> EnrolRequested:
        _check_version(request.version, "the agent", "this broker")
        if size > messages.MAX_UNAUTHENTICATED:  # the authority would hang up on this broker
            raise MessageError(f"enrol of {size} bytes is over the limit of {messages.MAX_UNAUTHENTICATED}")
        return EnrolRequested(request)

    def _charge_update(self) -> None:
        now = self._clock()
        self._updates_until = max(now, self._updates_until) + UPDATE_SECONDS
        if self._updates_until > now + UPDATES_AT_ONCE * UPDATE_SECONDS:
            text = f"more than {UPDATES_AT_ONCE} updates at once, and then one in {UPDATE_SECONDS:g} s"
            raise RemoteProtocolError(Refusal.PROTOCOL_ERROR, text)

    def challenge(self, secret: bytes) -> bytes:
        """Ask for the proof of the join token with this secret, and prove that the
        broker knows it.
        """
        nonce = self._new_nonce()
        data = self._act(Action.CHALLENGE, Challenge(nonce=nonce, mac=self._macs.broker(secret, self._hello, nonce)))
        self._expected = self._macs.agent(secret, self._hello, nonce)
        return data

    def admit(self) -> None:
        """Accept the link's certificate as the proof of the Hello."""
        self._act(Action.ADMIT)
        self._hello = b""

    def welcome(self, welcome: Welcome) -> bytes:
        """Say that the session exists; its streams begin with the window that the Hello names."""
        return self._act(Action.WELCOME, msgspec.structs.replace(welcome, start_window=self._start_window))

    def enrolled(self, answer: Enrolled) -> bytes:
        """Pass on the authority's answer, up to 60 KB. The agent ends the link when it
        has it all.
        """
        return self._act(Action.ENROLLED, answer)

    def trust(self, signed: bytes) -> bytes:
        """Offer a trust list."""
        return self._act(Action.TRUST, Trust(signed=signed))

    def drain(self, deadline: float) -> bytes:
        """Say that the node goes away within `deadline` seconds."""
        return self._act(Action.DRAIN, Drain(deadline=deadline))

    def revoke(self) -> None:
        """Note that the agent's certificate is not good any more: `trust` and `refuse`
        may follow.
        """
        self._act(Action.REVOKE)

    def refuse(self, code: Refusal, text: str) -> bytes:
        """Refuse what the agent wants, or the session; then end the link."""
        return self._act(Action.REFUSE, Refuse(code=code.value, text=text[: messages.MAX_TEXT]))

    def bye(self, reason: str) -> bytes:
        """Say that the session ends on purpose; then end the link."""
        return self._act(Action.BYE, Bye(reason=reason[: messages.MAX_TEXT]))


class AgentControl(_Control[AgentState, FromBroker, AgentEvent]):
    """The agent's end of one control stream. `macs`: see TokenMacs."""

    _TABLE = AGENT
    _LIMITS = _AGENT_LIMITS
    _FAILED = AgentState.FAILED
    _CLOSED = AgentState.CLOSED

    def __init__(self, macs: TokenMacs) -> None:
        super().__init__(AgentState.NEW, FROM_BROKER)
        self._macs = macs
        self._secret = b""
        self._hello = b""  # the frame of the Hello, until it is proved
        self._proof = b""  # the Proof's MAC
        self._start_windows = {INITIAL_WINDOW}

    @override
    def _take(self, message: FromBroker, frame: bytes) -> AgentEvent:
        match message:
            case Challenge():
                return self._take_challenge(message)
            case Welcome():
                return self._take_welcome(message)
            case Enrolled():
                return WasEnrolled(message)
            case Trust(signed):
                return TrustOffered(signed)
            case Drain(deadline):
                return DrainStarted(deadline)
            case Refuse():
                return WasRefused(message)
            case Bye(reason):
                return Left(reason)
            case _:
                assert_never(message)

    def _take_challenge(self, challenge: Challenge) -> Challenged:
        """Check that the broker knows the token: TLS says who it is, this that it is of our
        cluster.
        """
        _check_version(challenge.version, "the broker", "this agent")
        if not hmac.compare_digest(challenge.mac, self._macs.broker(self._secret, self._hello, challenge.nonce)):
            text = "the broker does not know our join token's secret: wrong token, or not our broker"
            raise RemoteProtocolError(Refusal.BAD_TOKEN, text)
        self._proof = self._macs.agent(self._secret, self._hello, challenge.nonce)
        self._secret = self._hello = b""
        return Challenged()

    def _take_welcome(self, welcome: Welcome) -> Welcomed:
        if welcome.start_window not in self._start_windows:
            raise MessageError(f"the broker's start_window {welcome.start_window} is not the Hello's")
        return Welcomed(welcome)

    def hello(self, hello: Hello, secret: bytes) -> bytes:
        """Ask for a session.

        `secret`: of the join token that the Hello names; empty: the link's certificate is the
        proof.
        """
        data = self._act(Action.HELLO_BY_TOKEN if secret else Action.HELLO, hello)
        self._start_windows.add(hello.start_window)
        if secret:
            self._secret, self._hello = secret, data
        return data

    def proof(self) -> bytes:
        """Prove the join token to the broker that has asked for it."""
        return self._act(Action.PROOF, Proof(mac=self._proof))

    def enrol(self, request: Enrol) -> bytes:
        """Ask for a certificate."""
        return self._act(Action.ENROL, request)

    def update(self, update: Update) -> bytes:
        """Say what the agent exposes, answers for, or shows from now on."""
        return self._act(Action.UPDATE, update)

    def bye(self, reason: str) -> bytes:
        """Say that the session ends on purpose; then end the link."""
        return self._act(Action.BYE, Bye(reason=reason[: messages.MAX_TEXT]))


def _check_version(theirs: int, who: str, here: str) -> None:
    if theirs != messages.VERSION:
        text = f"{who} speaks protocol version {theirs}, {here} {messages.VERSION}"
        raise RemoteProtocolError(Refusal.VERSION, text)
