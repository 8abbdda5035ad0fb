"""Both ends of a Dial as sans-I/O machines (docs/wire.md, "States of a Dial").

A `DialSender` sends the Dial and reads the answer: a gateway towards a guarded port, and a broker's
open port towards the agent. A `DialReceiver` reads the Dial and answers it: the agent, and a
broker's guarded port, which forwards a good Dial to the agent and then only passes bytes on.

`receive` takes bytes in any split and returns events. An action returns the bytes to send. Each
machine has one table (`states`): (state, input) -> next state. An input is a message of the peer,
or an action of this end. A transition that the table does not have is an error: a `MessageError` if
the peer sent the message, a `LocalError` if this end took the action.

The machines have no socket, clock, random source or key. The caller puts time and nonce into the
body of the Dial, and passes what signs, verifies and proves as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from rtunnel.wire.messages import (
    MAX_TEXT,
    MAX_TRACED,
    MAX_UNAUTHENTICATED,
    VERSION,
    Accepted,
    AgentHop,
    Dial,
    DialAnswer,
    DialBody,
    Dialling,
    Hop,
    MessageError,
    Refuse,
    decode_body,
    decode_hop,
    encode,
    encode_body,
    encode_hop,
    split_frame,
)
from rtunnel.wire.refusal import Next, Refusal, Refused
from rtunnel.wire.states import Table

#: Dialling that one Dial may get. An agent sends it once; a peer that repeats it must not keep a
#: client waiting for ever.
MAX_DIALLINGS: Final = 64

_ACCEPTED: Final = Accepted()
_DIALLING: Final = encode(Dialling())
#: Every message of a Dial, in either direction: the tables decide which of them may come.
_DECODER: Final = msgspec.msgpack.Decoder(Dial | DialAnswer)

P = TypeVar("P")
Answer = TypeVar("Answer", Accepted, Refuse)


class DialState(StrEnum):
    """How far a Dial is, at one of its ends."""

    IDLE = "idle"  # there is no Dial yet
    DIALLED = "dialled"  # the Dial is sent, or received, and has no answer
    DIALLING = "dialling"  # the agent has said that it connects the target
    ACCEPTED = "accepted"  # the target is connected: raw bytes follow
    FORWARDED = "forwarded"  # the broker has passed the Dial on: raw bytes follow
    REFUSED = "refused"
    BROKEN = "broken"  # the peer broke the protocol, or its Dial or answer did not pass `verify`


class Action(StrEnum):
    """An action of one end, as its table names it."""

    DIAL = "dial"
    FORWARD = "forward"
    HOP = "hop"
    DIALLING = "dialling"
    ACCEPT = "accept"
    REFUSE = "refuse"


DialTable = Table[DialState, Action]

SENDER: Final[DialTable] = Table(
    {
        (DialState.IDLE, Action.DIAL): DialState.DIALLED,
        (DialState.DIALLED, Hop): DialState.DIALLED,  # once, if the Dial asks for a trace
        (DialState.DIALLED, Dialling): DialState.DIALLING,
        (DialState.DIALLED, Accepted): DialState.ACCEPTED,
        (DialState.DIALLED, Refuse): DialState.REFUSED,
        (DialState.DIALLING, Dialling): DialState.DIALLING,  # MAX_DIALLINGS in all
        (DialState.DIALLING, Accepted): DialState.ACCEPTED,
        (DialState.DIALLING, Refuse): DialState.REFUSED,
    }
)

RECEIVER: Final[DialTable] = Table(
    {
        (DialState.IDLE, Dial): DialState.DIALLED,
        (DialState.IDLE, Action.REFUSE): DialState.REFUSED,  # no whole Dial came
        (DialState.DIALLED, Action.HOP): DialState.DIALLED,
        (DialState.DIALLED, Action.FORWARD): DialState.FORWARDED,
        (DialState.DIALLED, Action.DIALLING): DialState.DIALLING,
        (DialState.DIALLED, Action.ACCEPT): DialState.ACCEPTED,
        (DialState.DIALLED, Action.REFUSE): DialState.REFUSED,
        (DialState.DIALLING, Action.ACCEPT): DialState.ACCEPTED,
        (DialState.DIALLING, Action.REFUSE): DialState.REFUSED,
        (DialState.BROKEN, Action.REFUSE): DialState.REFUSED,
    }
)

#: In these states the sender takes what comes for a message, if only for one that is an error.
_SENDER_READS: Final = frozenset({DialState.IDLE, DialState.DIALLED, DialState.DIALLING})
#: In these states nobody wants what still comes to the receiver.
_RECEIVER_DROPS: Final = frozenset({DialState.REFUSED, DialState.BROKEN})


class DialAccepted(msgspec.Struct, Generic[P], frozen=True):
    """The target is connected. `proof`: what `verify` returned; None if nothing was to verify.

    `hop`: the agent's report, covered by the proof; None if the Dial asks for no trace, or the
    agent is older.
    """

    proof: P | None
    hop: AgentHop | None = None


class DialRefused(msgspec.Struct, frozen=True):
    """The answer no.

    `time`: milliseconds since 1970 by the broker's clock, if the code is `expired`; else 0.
    """

    code: Refusal
    text: str  # for people; the code's own sentence if the peer gave none
    time: int
    hop: AgentHop | None = None  # as in DialAccepted
    proven: bool = False  # `verify` has passed: the agent says no, and no broker


class DialReceived(msgspec.Struct, frozen=True):
    """A whole Dial of this version, whose MAC is good if one was to be verified."""

    dial: Dial
    body: DialBody


class Signer(Protocol):
    """Signs Dials with a gateway's key."""

    @property
    def id(self) -> str:
        """The word by which brokers find the key."""

    def sign(self, body: bytes) -> bytes:
        """Return the MAC of a Dial's body."""


class Prover(Protocol):
    """An agent's certificate and keys, by which it proves that an answer is its own."""

    def prove(self, answer: Answer, dial: DialBody, body: bytes) -> Answer:
        """Return the answer with its proof; `body` is that of the Dial, exactly as it came."""


class DialSender(Generic[P]):
    """The end that dials. `state` follows SENDER."""

    __slots__ = ("_body", "_buffer", "_limit", "_verify", "diallings", "hop", "rest", "state")

    def __init__(self, verify: Callable[[Accepted | Refuse, bytes], P] | None = None) -> None:
        """Believe the answers that pass `verify(answer, body of the Dial)`, which raises Refused.

        It is asked for Accepted, and for a Refused after which no other path is tried (Next.STOP).
        A Refused of another kind needs no proof: the next path is tried anyway. None: nothing is
        verified.
        """
        self._verify = verify
        self._body = b""
        self._buffer = b""
        self.state = DialState.IDLE
        self.diallings = 0  # how often the agent said that it connects the target
        self.hop: Hop | None = None  # the broker's report
        self._limit = MAX_UNAUTHENTICATED  # bytes of an answer
        self.rest = b""  # what came behind Accepted: it belongs to the raw stream

    def dial(self, body: DialBody, key: Signer | None = None) -> bytes:
        """Return the Dial, signed with `key`; an open port has none. Raises LocalError."""
        self.state = SENDER[self.state, Action.DIAL]
        if body.trace:
            self._limit = MAX_TRACED
        raw = self._body = encode_body(body)
        return encode(Dial(body=raw) if key is None else Dial(body=raw, mac=key.sign(raw), key=key.id))

    def receive(self, data: bytes) -> list[Hop | Dialling | DialAccepted[P] | DialRefused]:
        """Take bytes of the peer and return what they say.

        Raises MessageError if they break the protocol, and Refused if `verify` does. After that,
        and after a Refused of the peer, all bytes are dropped. After Accepted they are added to
        `rest`: stop reading then, because nothing bounds it here.
        """
        data = self._buffer + data
        events: list[Hop | Dialling | DialAccepted[P] | DialRefused] = []
        try:
            while self.state in _SENDER_READS:
                found = split_frame(data, _DECODER, self._limit)
                if found is None:
                    self._buffer = data
                    return events
                events.append(self._take(found[0]))
                data = data[found[1] :]
        except (MessageError, Refused):
            self.state = DialState.BROKEN
            self._buffer = b""
            raise
        self._buffer = b""
        if self.state is DialState.ACCEPTED:
            self.rest += data
        return events

    def _take(self, message: Dial | DialAnswer) -> Hop | Dialling | DialAccepted[P] | DialRefused:
        self.state = SENDER[self.state, type(message)]
        assert not isinstance(message, Dial)
        if isinstance(message, Accepted):
            proof = None if self._verify is None else self._verify(message, self._body)
            return DialAccepted(proof, decode_hop(message.hop) if message.hop else None)
        if isinstance(message, Refuse):
            return self._take_refusal(message)
        if isinstance(message, Hop):
            if self.hop is not None or self._limit != MAX_TRACED:
                raise MessageError("a report came that was not asked for")
            self.hop = message
            return message
        self.diallings += 1
        if self.diallings > MAX_DIALLINGS:
            raise MessageError(f"more than {MAX_DIALLINGS} times Dialling")
        return message

    def _take_refusal(self, message: Refuse) -> DialRefused:
        code = Refusal.parse(message.code)
        # Else a broken broker could keep clients from every agent that has a session there.
        verified = self._verify is not None and code.reply.next is Next.STOP
        if self._verify is not None and verified:
            self._verify(message, self._body)
        hop = decode_hop(message.hop) if message.hop else None
        return DialRefused(code, message.text or code.reply.text, message.time, hop, verified)


class DialReceiver:
    """The end that is dialled. `state` follows RECEIVER."""

    __slots__ = ("_buffer", "_frame", "_verify", "body", "dial", "rest", "state")

    def __init__(self, verify: Callable[[Dial], None] | None = None) -> None:
        """Take Dials that pass `verify`, which raises Refused, before their body is looked at.

        None: every Dial is taken. An agent relies on the broker for the MAC.
        """
        self._verify = verify
        self._buffer = b""
        self._frame = b""  # the Dial, exactly as it came
        self.state = DialState.IDLE
        self.dial: Dial | None = None
        self.body: DialBody | None = None  # what it asks for, once its MAC is good
        self.rest = b""  # what came behind the Dial: it belongs to the raw stream

    def receive(self, data: bytes) -> list[DialReceived]:
        """Take bytes of the peer; return the Dial, once, when it is whole.

        Raises MessageError if they break the protocol, and Refused if `verify` does or the Dial is
        of another version: `refuse` tells the peer. Bytes behind a good Dial are added to `rest`:
        stop reading then, because nothing bounds it here. After an error or a refusal all bytes are
        dropped.
        """
        if self.state is not DialState.IDLE:
            if self.state not in _RECEIVER_DROPS:
                self.rest += data
            return []
        data = self._buffer + data
        try:
            found = split_frame(data, _DECODER, MAX_UNAUTHENTICATED)
            if found is None:
                self._buffer = data
                return []
            message, end = found
            self.state = RECEIVER[DialState.IDLE, type(message)]
            assert isinstance(message, Dial)
            self.dial, self._frame = message, data[:end]
            if self._verify is not None:
                self._verify(message)
            self.body = body = decode_body(message.body)
            if body.version != VERSION:
                text = f"the Dial is of protocol version {body.version}, this end speaks {VERSION}"
                raise Refused(Refusal.VERSION, text)
        except (MessageError, Refused):
            self.state = DialState.BROKEN
            self._buffer = b""
            raise
        self._buffer, self.rest = b"", data[end:]
        return [DialReceived(message, body)]

    @property
    def forward_size(self) -> int:
        """How many bytes `forward` returns."""
        return len(self._frame) + len(self.rest)

    def forward(self) -> bytes:
        """Return the Dial exactly as it came, and what came behind it. Raises LocalError."""
        self.state = RECEIVER[self.state, Action.FORWARD]
        return self._frame + self.rest

    def hop(self, hop: Hop) -> bytes:
        """Return the broker's report, for a Dial that asks for a trace. Raises LocalError."""
        self.state = RECEIVER[self.state, Action.HOP]
        return encode(hop)

    def dialling(self) -> bytes:
        """Return Dialling: the agent still connects the target. Raises LocalError."""
        self.state = RECEIVER[self.state, Action.DIALLING]
        return _DIALLING

    def accept(self, prover: Prover | None = None, hop: AgentHop | None = None) -> bytes:
        """Return Accepted, proved if the Dial asks for a proof and there is a `prover`.

        `hop`: the agent's report. Raises LocalError.
        """
        self.state = RECEIVER[self.state, Action.ACCEPT]
        answer = _ACCEPTED if hop is None else Accepted(hop=encode_hop(hop))
        return encode(answer if prover is None else self._proved(answer, prover))

    def refuse(
        self, refused: Refused, prover: Prover | None = None, time: int = 0, hop: AgentHop | None = None
    ) -> bytes:
        """Return Refused, proved if no other path is tried after it (Next.STOP).

        `time`: milliseconds since 1970 by this end's clock; it is sent with `expired` only. `hop`:
        the agent's report. Raises LocalError.
        """
        self.state = RECEIVER[self.state, Action.REFUSE]
        code = refused.code
        answer = Refuse(
            code.value,
            refused.text[:MAX_TEXT],
            time=time if code is Refusal.EXPIRED else 0,
            hop=b"" if hop is None else encode_hop(hop),
        )
        if prover is not None and code.reply.next is Next.STOP:
            answer = self._proved(answer, prover)
        return encode(answer)

    def _proved(self, answer: Answer, prover: Prover) -> Answer:
        dial, body = self.dial, self.body
        if dial is None or body is None or not body.exchange:
            return answer
        return prover.prove(answer, body, dial.body)
