"""Both ends of a Dial without a socket: any split of bytes, any message in any state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtunnel.wire import dial as module
from rtunnel.wire.dial import (
    MAX_DIALLINGS,
    RECEIVER,
    SENDER,
    Action,
    DialAccepted,
    DialReceived,
    DialReceiver,
    DialRefused,
    DialSender,
    DialState,
    DialTable,
)
from rtunnel.wire.messages import (
    MAX_TEXT,
    MAX_UNAUTHENTICATED,
    Accepted,
    AgentHop,
    Bye,
    Dial,
    DialBody,
    Dialling,
    Hop,
    MessageError,
    Refuse,
    encode,
    encode_body,
    encode_hop,
)
from rtunnel.wire.refusal import Next, Refusal, Refused
from rtunnel.wire.states import LocalError, word_of
from support import dial_tables
from support.state_tables import shown

BODY = DialBody(
    version=1, namespace="default", ip="10.1.0.7", port=9100, node="b1", epoch=7, nonce=bytes(16), time=0, who="alice"
)
ASKS_PROOF = msgspec.structs.replace(BODY, exchange=bytes(32))
TRACED = msgspec.structs.replace(BODY, trace=True)
HOP = Hop("b1", 1000, agent="host-7", peer="10.9.0.4", rtt=0.25)
AGENT_HOP = AgentHop("host-7", 1001, way="10.1.0.7", local=True)
KEY = SimpleNamespace(id="g1", sign=lambda body: bytes(32))
DIAL = Dial(body=encode_body(BODY), mac=bytes(32), key="g1")
EARLY, LATER = b"GET / HTTP/1.1\r\n\r\n", b"220 ready\r\n"


class Prover:
    """Proves what it is asked to prove by a MAC of ones."""

    def __init__(self) -> None:
        self.proved: list[tuple[DialBody, bytes]] = []

    def prove(self, answer: Any, dial: DialBody, body: bytes) -> Any:
        """See rtunnel.wire.dial.Prover."""
        self.proved.append((dial, body))
        return msgspec.structs.replace(answer, mac=b"\1" * 32)


def believes(answer: Accepted | Refuse, body: bytes) -> str:
    """Verify what `Prover` has proved."""
    if answer.mac != b"\1" * 32:
        raise Refused(Refusal.NOT_PROVEN, "no MAC of ones")
    return "a1"


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """The bytes in pieces of this size; 0 is whole."""
    step = size or max(1, len(data))
    for at in range(0, len(data), step):
        yield data[at : at + step]


@dataclass
class ConnectionPair:
    """A sender and a receiver with a wire between them that delivers pieces of `size` bytes."""

    size: int
    sender: DialSender[str] = field(default_factory=DialSender)
    receiver: DialReceiver = field(default_factory=DialReceiver)

    def to_receiver(self, data: bytes) -> list[Any]:
        """Deliver to the receiver; return its events."""
        return [event for piece in pieces(data, self.size) for event in self.receiver.receive(piece)]

    def to_sender(self, data: bytes) -> list[Any]:
        """Deliver to the sender; return its events."""
        return [event for piece in pieces(data, self.size) for event in self.sender.receive(piece)]

    @property
    def states(self) -> tuple[str, str]:
        """Of the sender and of the receiver."""
        return self.sender.state, self.receiver.state


@pytest.fixture(params=[0, 1, 7], ids=["coalesced", "byte by byte", "in sevens"])
def size(request: pytest.FixtureRequest) -> int:
    """Bytes of a piece."""
    return int(request.param)


# Scripts.


def test_a_dial_is_accepted_and_raw_bytes_follow(size: int) -> None:
    """Bytes behind the Dial and behind Accepted are kept for the raw stream, in every split."""
    pair = ConnectionPair(size)
    assert pair.to_receiver(pair.sender.dial(BODY, KEY) + EARLY) == [DialReceived(DIAL, BODY)]
    assert pair.states == ("dialled", "dialled")
    assert pair.receiver.rest == EARLY
    assert pair.to_sender(pair.receiver.accept() + LATER) == [DialAccepted(None)]
    assert pair.states == ("accepted", "accepted")
    assert pair.sender.rest == LATER


def test_a_slow_target_is_announced(size: int) -> None:
    """Dialling, then the answer: also in one piece."""
    pair = ConnectionPair(size)
    pair.to_receiver(pair.sender.dial(BODY, KEY))
    said = pair.receiver.dialling()
    assert pair.receiver.state is DialState.DIALLING
    assert pair.to_sender(said + pair.receiver.accept() + LATER) == [Dialling(), DialAccepted(None)]
    assert (pair.sender.diallings, pair.sender.rest) == (1, LATER)


def test_a_refusal_has_code_and_text(size: int) -> None:
    """Bytes behind it are dropped, and so is what comes to the receiver after it."""
    pair = ConnectionPair(size)
    pair.to_receiver(pair.sender.dial(BODY))
    refused = pair.receiver.refuse(Refused(Refusal.TARGET_REFUSED, "connect: ECONNREFUSED"), time=5)
    assert pair.to_sender(refused + LATER) == [DialRefused(Refusal.TARGET_REFUSED, "connect: ECONNREFUSED", 0)]
    assert pair.to_receiver(EARLY) == []
    assert pair.states == ("refused", "refused")
    assert (pair.sender.rest, pair.receiver.rest) == (b"", b"")


def test_only_expired_tells_the_time() -> None:
    """The clock of the receiver, by which the sender finds how far its own is off."""
    pair = ConnectionPair(0)
    pair.to_receiver(pair.sender.dial(BODY))
    (event,) = pair.to_sender(pair.receiver.refuse(Refused(Refusal.EXPIRED), time=1_800_000_000_000))
    assert event == DialRefused(Refusal.EXPIRED, Refusal.EXPIRED.reply.text, 1_800_000_000_000)


def test_a_refusal_without_words_gets_those_of_its_code(size: int) -> None:
    """An unknown code is `internal`; a text that is too long for the field is cut."""
    pair = ConnectionPair(size)
    pair.to_receiver(pair.sender.dial(BODY))
    assert pair.to_sender(encode(Refuse("of_a_later_version"))) == [
        DialRefused(Refusal.INTERNAL, Refusal.INTERNAL.reply.text, 0)
    ]
    sender: DialSender[None] = DialSender()
    sender.dial(BODY)
    (event,) = sender.receive(pair.receiver.refuse(Refused(Refusal.OVERLOADED, "x" * 1000)))
    assert isinstance(event, DialRefused) and event.text == "x" * MAX_TEXT


def test_a_broker_forwards_the_dial_exactly_as_it_came(size: int) -> None:
    """The frame, even with a key that this version does not know, and what came behind it."""
    frame = msgspec.msgpack.encode({"later": 1, "t": "dial", "body": DIAL.body, "mac": DIAL.mac, "key": DIAL.key})
    said = len(frame).to_bytes(4, "big") + frame + EARLY
    pair = ConnectionPair(size)
    assert pair.to_receiver(said) == [DialReceived(DIAL, BODY)]
    assert pair.receiver.forward() == said
    assert pair.receiver.state is DialState.FORWARDED


def test_an_open_port_signs_nothing() -> None:
    """The Dial of a broker's own port has neither MAC nor key."""
    pair = ConnectionPair(0)
    (event,) = pair.to_receiver(pair.sender.dial(BODY))
    assert (event.dial.mac, event.dial.key) == (b"", "")


# Proofs and checks.


def test_a_dial_that_fails_its_check_is_never_decoded(size: int) -> None:
    """`verify` is asked before the body is looked at, and a refusal is all that is left to do."""

    def verify(dial: Dial) -> None:
        assert dial.body == b"no body at all"
        raise Refused(Refusal.BAD_MAC)

    pair = ConnectionPair(size, receiver=DialReceiver(verify))
    with pytest.raises(Refused) as caught:
        pair.to_receiver(encode(Dial(body=b"no body at all")) + EARLY)
    assert caught.value.code is Refusal.BAD_MAC
    assert (pair.receiver.state, pair.receiver.body, pair.receiver.rest) == ("broken", None, b"")
    with pytest.raises(LocalError, match="accept is not allowed in the state broken"):
        pair.receiver.accept()
    pair.sender.dial(BODY)
    assert pair.to_sender(pair.receiver.refuse(caught.value))[0].code is Refusal.BAD_MAC


def test_a_dial_of_another_version_is_refused_by_every_receiver(size: int) -> None:
    """The text names both versions."""
    pair = ConnectionPair(size)
    body = msgspec.structs.replace(BODY, version=2)
    with pytest.raises(Refused, match="of protocol version 2, this end speaks 1") as caught:
        pair.to_receiver(pair.sender.dial(body))
    assert caught.value.code is Refusal.VERSION
    assert pair.receiver.body == body


@pytest.mark.parametrize(
    ("body", "has_prover"),
    [(ASKS_PROOF, True), (ASKS_PROOF, False), (BODY, True)],
    ids=["proved", "an agent without a certificate", "the Dial asks for none"],
)
def test_an_accepted_that_is_not_proved_is_not_believed(size: int, body: DialBody, has_prover: bool) -> None:
    """There is no event, and the sender is broken."""
    pair, prover = ConnectionPair(size, DialSender(believes)), Prover() if has_prover else None
    pair.to_receiver(pair.sender.dial(body, KEY))
    answer = pair.receiver.accept(prover)
    if prover is not None and body.exchange:
        assert pair.to_sender(answer + LATER) == [DialAccepted("a1")]
        assert prover.proved == [(body, encode_body(body))]
    else:
        with pytest.raises(Refused, match="no MAC of ones"):
            pair.to_sender(answer)
        assert (pair.sender.state, pair.sender.receive(LATER), pair.sender.rest) == ("broken", [], b"")


@pytest.mark.parametrize("code", list(Refusal))
def test_a_refusal_is_proved_and_verified_if_no_other_path_is_tried(code: Refusal) -> None:
    """By both ends alike, for every code."""
    final = code.reply.next is Next.STOP
    pair, prover = ConnectionPair(0, DialSender(believes)), Prover()
    pair.to_receiver(pair.sender.dial(ASKS_PROOF, KEY))
    answer = pair.receiver.refuse(Refused(code), prover)
    assert pair.to_sender(answer) == [DialRefused(code, code.reply.text, 0, proven=final)]
    assert len(prover.proved) == final
    other: DialSender[str] = DialSender(believes)
    other.dial(ASKS_PROOF, KEY)
    if final:
        with pytest.raises(Refused, match="no MAC of ones"):
            other.receive(encode(Refuse(code.value)))
    else:
        assert other.receive(encode(Refuse(code.value))) == [DialRefused(code, code.reply.text, 0)]


# Traces.


@pytest.mark.parametrize("accepted", [True, False])
def test_each_hop_of_a_traced_dial_says_what_it_sees(size: int, accepted: bool) -> None:
    """The broker before the agent's answer, the agent in it."""
    broker = ConnectionPair(size)
    agent = ConnectionPair(size, broker.sender)
    broker.to_receiver(broker.sender.dial(TRACED, KEY))
    assert broker.to_sender(broker.receiver.hop(HOP)) == [HOP]
    agent.to_receiver(broker.receiver.forward())
    if accepted:
        said = agent.receiver.accept(hop=AGENT_HOP)
        assert agent.to_sender(said) == [DialAccepted(None, AGENT_HOP)]
    else:
        said = agent.receiver.refuse(Refused(Refusal.TARGET_REFUSED, "no"), hop=AGENT_HOP)
        assert agent.to_sender(said) == [DialRefused(Refusal.TARGET_REFUSED, "no", 0, AGENT_HOP)]
    assert broker.sender.hop == HOP


def test_a_report_is_taken_once_and_only_if_it_was_asked_for(size: int) -> None:
    """A broker that sends reports without end keeps no client waiting."""
    for body, wanted in ((BODY, 0), (TRACED, 1)):
        pair = ConnectionPair(size)
        pair.sender.dial(body)
        for _ in range(wanted):
            assert pair.to_sender(encode(HOP)) == [HOP]
        with pytest.raises(MessageError, match="a report came that was not asked for"):
            pair.to_sender(encode(HOP))
        assert pair.sender.state is DialState.BROKEN


def test_a_report_that_is_none_is_an_error(size: int) -> None:
    """In Accepted and in Refused."""
    for answer in (Accepted(hop=b"\xc1"), Refuse("target_refused", hop=b"\xc1")):
        pair = ConnectionPair(size)
        pair.sender.dial(TRACED)
        with pytest.raises(MessageError, match="bad report of an agent"):
            pair.to_sender(encode(answer))


def test_the_longest_answer_to_a_traced_dial_fits(size: int) -> None:
    """With a certificate, a signature, a text and a report of their greatest sizes."""
    pair = ConnectionPair(size)
    pair.sender.dial(TRACED)
    longest = Refuse(
        "target_refused", "\U0001f600" * MAX_TEXT, b"", b"c" * 3072, b"x" * 32, b"s" * 128,
        hop=encode_hop(AGENT_HOP),
    )  # fmt: skip
    assert [event.hop for event in pair.to_sender(encode(longest))] == [AGENT_HOP]


# Bounds.


def test_dialling_is_taken_so_often(size: int) -> None:
    """A peer that repeats it keeps no client waiting for ever."""
    pair = ConnectionPair(size)
    pair.sender.dial(BODY)
    assert len(pair.to_sender(encode(Dialling()) * MAX_DIALLINGS)) == MAX_DIALLINGS
    with pytest.raises(MessageError, match=f"more than {MAX_DIALLINGS} times Dialling"):
        pair.to_sender(encode(Dialling()))
    assert pair.sender.state is DialState.BROKEN


def test_a_message_over_the_limit_is_an_error_as_soon_as_its_length_is_there() -> None:
    """At both ends; the largest message that is allowed is waited for."""
    for machine in (DialSender[None](), DialReceiver()):
        assert machine.receive(MAX_UNAUTHENTICATED.to_bytes(4, "big")) == []
    for machine in (DialSender[None](), DialReceiver()):
        with pytest.raises(MessageError, match="over the limit"):
            machine.receive((MAX_UNAUTHENTICATED + 1).to_bytes(4, "big"))
        assert machine.state is DialState.BROKEN


# The tables.

MESSAGES = [DIAL, Dialling(), Accepted(), Refuse("internal")]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__struct_config__.tag)
def test_a_sender_takes_nothing_before_it_has_dialled(message: Any) -> None:
    """The error names state and message."""
    with pytest.raises(MessageError, match=f"{word_of(type(message))} came in the state idle, which takes nothing"):
        DialSender[None]().receive(encode(message))


@pytest.mark.parametrize("message", MESSAGES[1:], ids=lambda message: message.__struct_config__.tag)
def test_a_receiver_takes_a_dial_only(message: Any) -> None:
    """The error names state and message, and can be told to the peer."""
    receiver = DialReceiver()
    with pytest.raises(MessageError, match=f"{word_of(type(message))} came in the state idle, which takes dial"):
        receiver.receive(encode(message))
    assert receiver.refuse(Refused(Refusal.PROTOCOL_ERROR))


def test_raw_states_are_ends() -> None:
    """Nothing leads out of them: what comes then is not ours."""
    for table in (SENDER, RECEIVER):
        assert {state for state, _ in table} & {DialState.ACCEPTED, DialState.FORWARDED, DialState.REFUSED} == set()


def test_the_tables_of_the_page_are_those_of_the_machines() -> None:
    """docs/wire.md has exactly these tables; `python -m support.dial_tables` writes them."""
    assert shown(dial_tables.NAME) == dial_tables.text()


# Any message in any state.


class AnyOrder(RuleBasedStateMachine):
    """Whatever a peer says and a caller does: the table, or the error that is declared."""

    @initialize(proofs=st.booleans(), checks=st.booleans())
    def begin(self, proofs: bool, checks: bool) -> None:
        """A sender that asks for proofs or not, and a receiver that checks MACs or not."""
        self.checks = checks

        def verify(dial: Dial) -> None:
            if dial.key != "g1":
                raise Refused(Refusal.BAD_MAC)

        self.traced = False
        self.sender: DialSender[str] = DialSender(believes if proofs else None)
        self.receiver = DialReceiver(verify if checks else None)
        self.accepted = False

    def _feed(self, machine: DialSender[str] | DialReceiver, table: DialTable, message: Any, data: bytes) -> None:
        before = machine.state
        expected = table.get((before, type(message)))
        reads = before is DialState.IDLE or (machine is self.sender and before in module._SENDER_READS)
        try:
            events = machine.receive(data)
        except MessageError:
            assert reads and machine.state is DialState.BROKEN
            again = isinstance(message, Hop) and (self.sender.hop is not None or not self.traced)
            assert expected is None or (machine is self.sender and (self.sender.diallings > MAX_DIALLINGS or again))
        except Refused as error:
            assert reads and expected is not None and machine.state is DialState.BROKEN
            assert error.code in (Refusal.NOT_PROVEN, Refusal.BAD_MAC)
        else:
            if reads:
                assert machine.state is expected and len(events) == 1
            else:
                assert machine.state is before and events == []

    @rule(
        message=st.sampled_from([*MESSAGES, Dial(body=DIAL.body), Accepted(mac=b"\1" * 32), Refuse("target_refused")])
    )
    def sender_gets(self, message: Any) -> None:
        """Any message of a Dial, to the sender."""
        self._feed(self.sender, SENDER, message, encode(message))

    @rule(message=st.sampled_from([*MESSAGES, Dial(body=DIAL.body)]))
    def receiver_gets(self, message: Any) -> None:
        """Any message of a Dial, to the receiver."""
        self._feed(self.receiver, RECEIVER, message, encode(message))

    @rule(message=st.sampled_from([encode(Bye()), b"\0\0\0\1\xc1", b"\0\0\0\0"]))
    def garbage(self, message: bytes) -> None:
        """What is no message of a Dial."""
        for machine in (self.sender, self.receiver):
            self._feed(machine, DialTable(), None, message)

    @rule(action=st.sampled_from(sorted(Action)), traced=st.booleans())
    def act(self, action: Action, traced: bool) -> None:
        """Any action, of the end that has it."""
        receiver = self.receiver
        machine: Any = self.sender if action is Action.DIAL else receiver
        acts: dict[Action, Any] = {
            Action.DIAL: lambda: self.sender.dial(TRACED if traced else BODY, KEY),
            Action.FORWARD: receiver.forward,
            Action.HOP: lambda: receiver.hop(HOP),
            Action.DIALLING: receiver.dialling,
            Action.ACCEPT: receiver.accept,
            Action.REFUSE: lambda: receiver.refuse(Refused(Refusal.INTERNAL)),
        }
        before, table = machine.state, SENDER if action is Action.DIAL else RECEIVER
        expected = table.get((before, action))
        try:
            assert acts[action]()
        except LocalError as error:
            assert expected is None and machine.state is before
            assert str(error) == f"{action} is not allowed in the state {before}"
        else:
            assert machine.state is expected
            self.traced |= traced and action is Action.DIAL

    @precondition(lambda self: hasattr(self, "sender"))
    @invariant()
    def nothing_is_kept_in_vain(self) -> None:
        """Raw bytes belong to a stream that may come to be, or to nobody."""
        if self.sender.state is not DialState.ACCEPTED:
            assert self.sender.rest == b""
        if self.receiver.state in (DialState.IDLE, DialState.BROKEN):
            assert self.receiver.rest == b""
        if self.receiver.state in (DialState.ACCEPTED, DialState.FORWARDED):
            assert self.receiver.body is not None


TestAnyOrder = AnyOrder.TestCase


@given(st.binary(max_size=64), st.integers(1, 9))
def test_bytes_at_random_raise_the_declared_error_only(data: bytes, size: int) -> None:
    """At both ends, in any split."""
    sender: DialSender[None] = DialSender()
    sender.dial(BODY)
    for machine in (sender, DialReceiver()):
        try:
            for piece in pieces(data, size):
                machine.receive(piece)
        except MessageError:
            assert machine.state is DialState.BROKEN
