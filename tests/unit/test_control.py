"""The control machines: scripts in every split, any message in any state, and the page's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from msgspec import structs

from rtunnel.trust.keys import LinkMacs
from rtunnel.wire import control, messages
from rtunnel.wire.control import (
    AGENT,
    BROKER,
    Action,
    AgentControl,
    AgentState,
    BrokerControl,
    BrokerState,
    Challenged,
    DrainStarted,
    EnrolRequested,
    Greeted,
    Left,
    Proved,
    RemoteProtocolError,
    TrustOffered,
    Updated,
    WasEnrolled,
    WasRefused,
    Welcomed,
)
from rtunnel.wire.messages import (
    MAX_HELLO,
    MAX_MESSAGE,
    MAX_UNAUTHENTICATED,
    Bye,
    Challenge,
    Dial,
    Dialling,
    Drain,
    Enrol,
    Enrolled,
    Follow,
    Hello,
    Message,
    Proof,
    Refuse,
    Trust,
    Update,
    Welcome,
    encode,
)
from rtunnel.wire.refusal import Refusal
from rtunnel.wire.states import LocalError, Table, word_of
from support import control_tables
from support.effort import times
from support.state_tables import shown

SECRET = b"s" * 32
MACS = LinkMacs(lambda: b"binding")
NONCE = bytes(range(16))
HELLO = Hello(
    version=1,
    agent_id="a1",
    instance=NONCE,
    namespace="default",
    addresses=["10.1.0.7"],
    nonce=NONCE,
    start_window=16384,
)
BY_TOKEN = structs.replace(HELLO, token_id="t1")
#: These two are refused by the broker of the scripts.
NO_TOKEN = structs.replace(HELLO, token_id="unknown")
NO_CERTIFICATE = structs.replace(HELLO, agent_id="unknown")
WELCOME = Welcome(node="b1", host="h1", epoch=7, ip="10.9.0.1", port=7001, heartbeat=5.0)
WELCOMED = structs.replace(WELCOME, start_window=16384)
UPDATE = Update(exposes=["22"])
ENROL = Enrol(version=1, request=b"csr", token_id="t1", mac=bytes(32))
ENROLLED = Enrolled(certificate=b"der", trust=b"list")


class Clock:
    """Seconds that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def broker() -> BrokerControl:
    return BrokerControl(MACS, lambda: NONCE, Clock())


def agent() -> AgentControl:
    return AgentControl(MACS)


# Scripts in every split.

Side = Literal["agent", "broker"]
Split = Literal["whole", "bytes", "coalesced"]
SPLITS: tuple[Split, ...] = ("whole", "bytes", "coalesced")


@dataclass
class ConnectionPair:
    """Both ends of a control stream. `heard`: each event or fault, with the state of its end."""

    split: Split
    says_why: bool = False  # the broker answers a fault
    broker: BrokerControl = field(default_factory=broker)
    agent: AgentControl = field(default_factory=agent)
    heard: list[tuple[Side, object, str]] = field(default_factory=list)

    def send(self, side: Side, *frames: bytes) -> None:
        """Carry what one end sends to the other end."""
        to: Side = "broker" if side == "agent" else "agent"
        for piece in self._pieces(frames):
            self._deliver(to, piece)

    def _pieces(self, frames: Iterable[bytes]) -> list[bytes]:
        whole = [frame for frame in frames if frame]
        if self.split == "coalesced":
            return [b"".join(whole)]
        return whole if self.split == "whole" else [bytes([byte]) for frame in whole for byte in frame]

    def _deliver(self, to: Side, piece: bytes) -> None:
        end = self.broker if to == "broker" else self.agent
        try:
            before = end.state
            while events := end.receive(piece):
                piece = b""
                for event in events:
                    self.heard.append((to, event, str(end.state if event is events[-1] else before)))
                    self._answer(event)
                before = end.state
        except RemoteProtocolError as error:
            fault = (to, (error.code, error.text), str(end.state))
            if fault not in self.heard:
                self.heard.append(fault)
            if to == "broker" and self.says_why:
                self.send("broker", self.broker.refuse(error.code, error.text))

    def _answer(self, event: object) -> None:
        """Do what every owner does at once."""
        match event:
            case Greeted(hello) if hello in (NO_TOKEN, NO_CERTIFICATE):
                self.send("broker", self.broker.refuse(Refusal.DRAINING, "it drains"))
            case Greeted(hello) if hello.token_id:
                self.send("broker", self.broker.challenge(SECRET))
            case Greeted():
                self.broker.admit()
            case Challenged():
                self.send("agent", self.agent.proof())


Step = Callable[[ConnectionPair], None]


def says(side: Side, *words: Callable[[Any], bytes] | bytes) -> Step:
    """One end sends these, as far as the split allows in one piece."""

    def step(pair: ConnectionPair) -> None:
        end = pair.broker if side == "broker" else pair.agent
        pair.send(side, *(word if isinstance(word, bytes) else word(end) for word in words))

    return step


def cert_hello(end: AgentControl) -> bytes:
    return end.hello(HELLO, b"")


def token_hello(end: AgentControl) -> bytes:
    return end.hello(BY_TOKEN, SECRET)


def welcome(end: BrokerControl) -> bytes:
    return end.welcome(WELCOME)


def update(end: AgentControl) -> bytes:
    return end.update(UPDATE)


REFUSED = Refuse(code="draining", text="it drains")
UP_BY_CERTIFICATE = [says("agent", cert_hello), says("broker", welcome)]
HEARD_UP = [("broker", Greeted(HELLO), "greeted"), ("agent", Welcomed(WELCOMED), "live")]

SCRIPTS: dict[str, tuple[list[Step], list[tuple[str, object, str]]]] = {
    "a session by certificate": (UP_BY_CERTIFICATE, HEARD_UP),
    "a session by token": (
        [says("agent", token_hello), says("broker", welcome)],
        [
            ("broker", Greeted(BY_TOKEN), "greeted"),
            ("agent", Challenged(), "challenged"),
            ("broker", Proved(BY_TOKEN), "proven"),
            ("agent", Welcomed(WELCOMED), "live"),
        ],
    ),
    "all that a broker says in a session": (
        [
            says("agent", cert_hello),
            says("broker", welcome, lambda b: b.trust(b"list"), lambda b: b.drain(3.0), lambda b: b.trust(b"more"),
                 lambda b: b.bye("it stops")),
        ],
        [
            *HEARD_UP,
            ("agent", TrustOffered(b"list"), "live"),
            ("agent", DrainStarted(3.0), "draining"),
            ("agent", TrustOffered(b"more"), "draining"),
            ("agent", Left("it stops"), "closed"),
        ],
    ),
    "all that an agent says in a session": (
        [*UP_BY_CERTIFICATE, says("agent", update, update, lambda a: a.bye("it leaves"))],
        [*HEARD_UP, ("broker", Updated(UPDATE), "live"), ("broker", Updated(UPDATE), "live"),
         ("broker", Left("it leaves"), "closed")],
    ),
    "an agent leaves before its Welcome": (
        [says("agent", cert_hello, encode(UPDATE), encode(Bye("it leaves")))],
        [HEARD_UP[0], ("broker", Updated(UPDATE), "proven"), ("broker", Left("it leaves"), "closed")],
    ),
    "a broker that stops without a drain": (
        [*UP_BY_CERTIFICATE, says("broker", lambda b: b.bye("it stops"))],
        [*HEARD_UP, ("agent", Left("it stops"), "closed")],
    ),
    "an agent leaves a node that drains": (
        [*UP_BY_CERTIFICATE, says("broker", lambda b: b.drain(3.0), encode(Drain(2.0))),
         says("agent", update, lambda a: a.bye("it leaves"))],
        [*HEARD_UP, ("agent", DrainStarted(3.0), "draining"), ("agent", DrainStarted(2.0), "draining"),
         ("broker", Updated(UPDATE), "draining"), ("broker", Left("it leaves"), "closed")],
    ),
    "an agent is refused while the node drains": (
        [*UP_BY_CERTIFICATE, says("broker", lambda b: b.drain(3.0), lambda b: b.refuse(Refusal.DRAINING, "it drains"))],
        [*HEARD_UP, ("agent", DrainStarted(3.0), "draining"), ("agent", WasRefused(REFUSED), "refused")],
    ),
    "an agent is revoked while the node drains": (
        [*UP_BY_CERTIFICATE, says("broker", lambda b: b.drain(3.0), lambda b: b.revoke() or b""),
         says("agent", update, lambda a: a.bye("it leaves"))],
        [*HEARD_UP, ("agent", DrainStarted(3.0), "draining"), ("broker", Updated(UPDATE), "revoked"),
         ("broker", Left("it leaves"), "closed")],
    ),
    "an agent is revoked before its Welcome": (
        [says("agent", cert_hello),
         says("broker", lambda b: b.revoke() or b"", lambda b: b.refuse(Refusal.DRAINING, "it drains"))],
        [HEARD_UP[0], ("agent", WasRefused(REFUSED), "refused")],
    ),
    "a registration is refused": (
        [says("agent", token_hello), says("broker", lambda b: b.refuse(Refusal.DRAINING, "it drains"))],
        [("broker", Greeted(BY_TOKEN), "greeted"), ("agent", Challenged(), "challenged"),
         ("broker", Proved(BY_TOKEN), "proven"), ("agent", WasRefused(REFUSED), "refused")],
    ),
    "a session is refused later": (
        [*UP_BY_CERTIFICATE, says("broker", lambda b: b.refuse(Refusal.DRAINING, "it drains"))],
        [*HEARD_UP, ("agent", WasRefused(REFUSED), "refused")],
    ),
    "a Hello that names a token is refused": (
        [says("agent", lambda a: a.hello(NO_TOKEN, SECRET))],
        [("broker", Greeted(NO_TOKEN), "greeted"), ("agent", WasRefused(REFUSED), "refused")],
    ),
    "a Bye behind the certificate": (
        [says("agent", lambda a: a.enrol(ENROL)), says("broker", lambda b: b.enrolled(ENROLLED)),
         says("agent", encode(Bye("thanks")))],
        [("broker", EnrolRequested(ENROL), "enrolling"), ("agent", WasEnrolled(ENROLLED), "enrolled"),
         ("broker", Left("thanks"), "closed")],
    ),
    "a Hello is refused": (
        [says("agent", lambda a: a.hello(NO_CERTIFICATE, b""))],
        [("broker", Greeted(NO_CERTIFICATE), "greeted"), ("agent", WasRefused(REFUSED), "refused")],
    ),
    "an agent is revoked": (
        [*UP_BY_CERTIFICATE,
         says("broker", lambda b: b.revoke() or b"", lambda b: b.trust(b"list"),
              lambda b: b.refuse(Refusal.DRAINING, "it drains"))],
        [*HEARD_UP, ("agent", TrustOffered(b"list"), "live"), ("agent", WasRefused(REFUSED), "refused")],
    ),
    "a certificate": (
        [says("agent", lambda a: a.enrol(ENROL)), says("broker", lambda b: b.enrolled(ENROLLED))],
        [("broker", EnrolRequested(ENROL), "enrolling"), ("agent", WasEnrolled(ENROLLED), "enrolled")],
    ),
    "a request for a certificate is refused": (
        [says("agent", lambda a: a.enrol(ENROL)), says("broker", lambda b: b.refuse(Refusal.DRAINING, "it drains"))],
        [("broker", EnrolRequested(ENROL), "enrolling"), ("agent", WasRefused(REFUSED), "refused")],
    ),
    "an agent that gives up its request": (
        [says("agent", lambda a: a.enrol(ENROL), encode(Bye("no time")))],
        [("broker", EnrolRequested(ENROL), "enrolling"), ("broker", Left("no time"), "closed")],
    ),
    "words behind a Bye": (
        [*UP_BY_CERTIFICATE, says("agent", encode(Bye()), encode(UPDATE), b"\xff\xff\xff\xff")],
        [*HEARD_UP, ("broker", Left(""), "closed")],
    ),
    "a second Hello": (
        [says("agent", cert_hello, encode(HELLO), encode(UPDATE))],
        [HEARD_UP[0], ("broker", (Refusal.PROTOCOL_ERROR,
                                  "hello came in the state proven, which takes update or bye"), "failed")],
    ),
    "a fault behind a good message": (
        [*UP_BY_CERTIFICATE, says("agent", encode(UPDATE), encode(Proof(bytes(32))))],
        [*HEARD_UP, ("broker", Updated(UPDATE), "live"),
         ("broker", (Refusal.PROTOCOL_ERROR, "proof came in the state live, which takes update or bye"), "failed")],
    ),
    "a Proof by another secret": (
        [says("agent", lambda a: encode(BY_TOKEN)), says("agent", encode(Proof(bytes(32))))],
        [("broker", Greeted(BY_TOKEN), "greeted"),
         ("agent", (Refusal.PROTOCOL_ERROR, "challenge came in the state new, which takes nothing"), "failed"),
         ("broker", (Refusal.BAD_TOKEN, "the proof for join token 't1' is wrong"), "failed")],
    ),
    "a Welcome before its time": (
        [says("agent", token_hello, b""), says("broker", encode(WELCOMED))],
        [
            ("broker", Greeted(BY_TOKEN), "greeted"),
            ("agent", Challenged(), "challenged"),
            ("broker", Proved(BY_TOKEN), "proven"),
            ("agent", Welcomed(WELCOMED), "live"),
        ],
    ),
    "a window that the Hello does not name": (
        [says("agent", cert_hello), says("broker", encode(structs.replace(WELCOME, start_window=8192)))],
        [HEARD_UP[0], ("agent", (Refusal.PROTOCOL_ERROR, "the broker's start_window 8192 is not the Hello's "
                                 "(in the state proven)"), "failed")],
    ),
    "another version": (
        [says("agent", encode(Enrol(version=2, request=b"csr")))],
        [("broker", (Refusal.VERSION, "the agent speaks protocol version 2, this broker 1"), "failed")],
    ),
    "another version that can't be decoded": (
        [says("agent", b"\0\0\0\x12\x82\xa1t\xa5hello\xa7version\x09")],
        [("broker", (Refusal.VERSION, "bad message: Object missing required field `agent_id` "
                     "(the peer speaks version 9, this end 1) (in the state new)"), "failed")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_heard_alike_in_every_split(name: str, split: Split) -> None:
    """Message by message, byte by byte, and all that one end says in one piece."""
    steps, heard = SCRIPTS[name]
    pair = ConnectionPair(split)
    for step in steps:
        step(pair)
    assert pair.heard == heard


class Used(Table[Any, Any]):
    """A table that remembers which of its transitions were used."""

    def __init__(self, table: Any) -> None:
        super().__init__(table)
        self.used: set[tuple[Any, Any]] = set()

    def __getitem__(self, key: tuple[Any, Any]) -> Any:
        self.used.add(key)
        return super().__getitem__(key)


def test_the_scripts_use_every_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transition that somebody needs can't leave the table, and one without use can't stay."""
    near, far = Used(BROKER), Used(AGENT)
    monkeypatch.setattr(BrokerControl, "_TABLE", near)
    monkeypatch.setattr(AgentControl, "_TABLE", far)
    for steps, _ in SCRIPTS.values():
        pair = ConnectionPair("whole", says_why=True)
        for step in steps:
            step(pair)
    assert set(BROKER) - near.used == set()
    assert set(AGENT) - far.used == set()


@settings(deadline=None, max_examples=times(40))
@given(st.sampled_from(list(SCRIPTS)), st.data())
def test_a_script_is_heard_alike_in_a_random_split(name: str, data: st.DataObject) -> None:
    """The same for splits that hypothesis likes."""
    steps, heard = SCRIPTS[name]
    pair = ConnectionPair("whole")

    def pieces(frames: Iterable[bytes]) -> list[bytes]:
        whole = b"".join(frames)
        cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=4))})
        return [whole[a:b] for a, b in pairwise(cuts)]

    pair._pieces = pieces  # type: ignore[method-assign]
    for step in steps:
        step(pair)
    assert pair.heard == heard


# Limits.


@pytest.mark.parametrize(
    ("state", "limit"),
    [
        (BrokerState.NEW, MAX_HELLO),
        (BrokerState.CHALLENGED, MAX_UNAUTHENTICATED),
        (BrokerState.PROVEN, MAX_MESSAGE),
        (BrokerState.LIVE, MAX_MESSAGE),
        (BrokerState.ENROLLING, MAX_UNAUTHENTICATED),
    ],
)
def test_a_broker_reads_little_before_the_agent_is_proved(state: BrokerState, limit: int) -> None:
    """A longer message is a fault by its length alone, before its body has come."""
    for size in (limit, limit + 1):
        end = in_state(state)
        try:
            assert end.receive(size.to_bytes(4, "big")) == []
            assert size == limit
        except RemoteProtocolError as error:
            assert size == limit + 1
            assert error.text == f"message of {size} bytes is over the limit of {limit} (in the state {state})"


def test_an_agent_reads_little_before_the_challenge() -> None:
    """The same at the agent, where the broker has to prove itself first."""
    end = agent()
    end.hello(BY_TOKEN, SECRET)
    with pytest.raises(RemoteProtocolError, match="over the limit of 4096"):
        end.receive((MAX_UNAUTHENTICATED + 1).to_bytes(4, "big"))


def test_an_enrol_may_be_no_longer_than_the_authority_reads() -> None:
    """Where a Hello may be longer: the authority would hang up on the broker."""
    from rtunnel.wire.messages import _LENGTH, _encoder

    body = _encoder.encode({"t": "enrol", "version": 1, "request": b"", "more": bytes(MAX_UNAUTHENTICATED)})
    with pytest.raises(RemoteProtocolError, match=r"enrol of 41\d\d bytes is over the limit of 4096"):
        broker().receive(_LENGTH.pack(len(body)) + body)


def test_updates_have_a_pace() -> None:
    """So many at once, then one in each second; the clock is an argument."""
    clock = Clock()
    end = BrokerControl(MACS, lambda: NONCE, clock)
    end.receive(encode(HELLO))
    end.admit()
    assert len(end.receive(encode(UPDATE) * control.UPDATES_AT_ONCE)) == control.UPDATES_AT_ONCE
    for _ in range(100):
        clock.now += control.UPDATE_SECONDS
        assert end.receive(encode(UPDATE)) == [Updated(UPDATE)]
    with pytest.raises(RemoteProtocolError, match="more than 60 updates at once, and then one in 1 s") as caught:
        end.receive(encode(UPDATE))
    assert caught.value.code is Refusal.PROTOCOL_ERROR


def test_a_long_text_is_cut() -> None:
    """A refusal and a goodbye fit into their messages, whatever the sentence is."""
    near, far = in_state(BrokerState.LIVE), agent()
    far.hello(HELLO, b"")
    far.receive(encode(WELCOMED))
    assert far.receive(near.refuse(Refusal.INTERNAL, "x" * 1000)) == [
        WasRefused(Refuse(code="internal", text="x" * messages.MAX_TEXT))
    ]


def test_a_secret_of_the_broker_only_is_found_out() -> None:
    """A broker that does not know the token is left before the agent proves anything."""
    near, far = broker(), agent()
    near.receive(far.hello(BY_TOKEN, SECRET))
    with pytest.raises(RemoteProtocolError, match="does not know our join token's secret") as caught:
        far.receive(near.challenge(b"another secret"))
    assert caught.value.code is Refusal.BAD_TOKEN
    assert not far.allows(Action.PROOF)


# Any message in any state.

MESSAGES: tuple[Message, ...] = (
    HELLO, BY_TOKEN, Proof(MACS.agent(SECRET, encode(BY_TOKEN), NONCE)), Proof(bytes(32)), UPDATE, Bye("x"), ENROL,
    Challenge(NONCE, MACS.broker(SECRET, encode(BY_TOKEN), NONCE)), Challenge(NONCE, bytes(32)),
    Challenge(NONCE, bytes(32), version=2), WELCOMED, WELCOME, ENROLLED, Trust(b"list"), Drain(1.0), REFUSED,
    Follow(1), Dial(b""), Dialling(),
)  # fmt: skip

BROKER_ACTIONS: dict[Action, Callable[[BrokerControl], bytes | None]] = {
    Action.CHALLENGE: lambda end: end.challenge(SECRET),
    Action.ADMIT: lambda end: end.admit(),
    Action.WELCOME: welcome,
    Action.ENROLLED: lambda end: end.enrolled(ENROLLED),
    Action.TRUST: lambda end: end.trust(b"list"),
    Action.DRAIN: lambda end: end.drain(1.0),
    Action.REVOKE: lambda end: end.revoke(),
    Action.REFUSE: lambda end: end.refuse(Refusal.INTERNAL, "x"),
    Action.BYE: lambda end: end.bye("x"),
}
AGENT_ACTIONS: dict[Action, Callable[[AgentControl], bytes | None]] = {
    Action.HELLO: cert_hello,
    Action.HELLO_BY_TOKEN: token_hello,
    Action.ENROL: lambda end: end.enrol(ENROL),
    Action.PROOF: lambda end: end.proof(),
    Action.UPDATE: update,
    Action.BYE: lambda end: end.bye("x"),
}


def in_state(state: BrokerState) -> BrokerControl:
    """Return a broker's end in this state, by the shortest way through the table."""
    ways: dict[BrokerState, list[object]] = {BrokerState.NEW: []}
    while state not in ways:
        for (before, key), after in BROKER.items():
            if before in ways and after not in ways:
                ways[after] = [*ways[before], key]
    end = broker()
    greeting = BY_TOKEN if any(key is Proof or key is Action.CHALLENGE for key in ways[state]) else HELLO
    good: dict[object, Message] = {Hello: greeting, Enrol: ENROL, Proof: MESSAGES[2], Update: UPDATE, Bye: Bye("x")}
    for step in ways[state]:
        if isinstance(step, Action):
            BROKER_ACTIONS[step](end)
        else:
            end.receive(encode(good[step]))
    assert end.state is state
    return end


class AnyOrder(RuleBasedStateMachine):
    """An owner and a peer that do anything at any time."""

    table: ClassVar[Any]
    actions: ClassVar[dict[Action, Callable[[Any], bytes | None]]]
    deaf: ClassVar[set[Any]] = {BrokerState.REFUSED, BrokerState.CLOSED}

    def __init__(self) -> None:
        super().__init__()
        self.end = self.make()
        self.fault: RemoteProtocolError | None = None
        self.steps: set[Any] = set()

    def make(self) -> Any:
        raise NotImplementedError

    @rule(message=st.sampled_from(MESSAGES), pieces=st.booleans())
    def receive(self, message: Message, pieces: bool) -> None:
        before = self.end.state
        frame = encode(message)
        try:
            events = [e for piece in ((frame[:5], frame[5:]) if pieces else (frame,)) for e in self.end.receive(piece)]
        except RemoteProtocolError as error:
            assert error.text and error.code in (Refusal.PROTOCOL_ERROR, Refusal.VERSION, Refusal.BAD_TOKEN)
            assert self.fault in (None, error)
            if self.fault is None:
                assert str(self.end.state) == "failed"
            self.fault = error
            return
        if before in self.deaf:
            assert events == [] and self.end.state is before
            return
        assert self.fault is None, "something was heard behind a fault"
        assert self.table[before, type(message)] is self.end.state
        assert len(events) == 1

    @rule(action=st.sampled_from(Action))
    def act(self, action: Action) -> None:
        if action not in self.actions:
            return
        before, allowed = self.end.state, self.end.allows(action)
        try:
            data = self.actions[action](self.end)
        except LocalError as error:
            assert not allowed and self.end.state is before and str(before) in str(error)
            return
        assert allowed and self.table[before, action] is self.end.state
        assert not data or data[:4] == (len(data) - 4).to_bytes(4, "big")

    @rule(noise=st.binary(max_size=6))
    def garble(self, noise: bytes) -> None:
        """Bytes that are no message: from then on nothing but the fault."""
        try:
            self.end.receive(b"\0\0\0\7\xc1" + noise.ljust(6, b"\0"))
        except RemoteProtocolError as error:
            self.fault = self.fault or error
            assert self.fault is error
        else:
            assert self.end.state in self.deaf

    @rule()
    def link_ends(self) -> None:
        self.end.close()
        assert str(self.end.state) == "closed"

    @invariant()
    def a_fault_stays(self) -> None:
        if self.fault is not None and self.end.state not in self.deaf:
            with pytest.raises(RemoteProtocolError) as caught:
                self.end.receive(b"")
            assert caught.value is self.fault


class AnyOrderAtTheBroker(AnyOrder):
    table = BROKER
    actions = BROKER_ACTIONS

    def make(self) -> BrokerControl:
        return broker()


class AnyOrderAtTheAgent(AnyOrder):
    table = AGENT
    actions = AGENT_ACTIONS
    deaf: ClassVar[set[Any]] = {AgentState.REFUSED, AgentState.CLOSED, AgentState.ENROLLED}

    def make(self) -> AgentControl:
        return agent()


@pytest.mark.parametrize("machine", [AnyOrderAtTheBroker, AnyOrderAtTheAgent])
def test_any_message_and_any_action_in_any_state(machine: type[AnyOrder]) -> None:
    """No other error than the declared ones, nothing outside the table, a fault stays the last word."""
    effort = settings(deadline=None, max_examples=times(100), stateful_step_count=12)
    run_state_machine_as_test(machine, settings=effort)


@pytest.mark.parametrize("state", BrokerState)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__.lower())
def test_each_message_in_each_state_of_the_broker(state: BrokerState, message: Message) -> None:
    """All of them, not only those that chance finds."""
    if state is BrokerState.FAILED:
        return  # no way of the table leads there
    end = in_state(state)
    allowed = (state, type(message)) in BROKER
    try:
        events = end.receive(encode(message))
    except RemoteProtocolError as error:
        assert end.state is BrokerState.FAILED
        assert not allowed or error.code is Refusal.BAD_TOKEN
        assert str(state) in error.text or error.code is Refusal.BAD_TOKEN
    else:
        assert bool(events) is allowed
        assert allowed or end.state in (BrokerState.REFUSED, BrokerState.CLOSED)


# The tables themselves.


def test_every_state_can_be_reached_and_left() -> None:
    """Only `failed` is entered by a fault alone; only the last states have no way on."""
    for table, states in ((BROKER, BrokerState), (AGENT, AgentState)):
        before, after = {state for state, _ in table}, set(table.values())
        assert set(states) - after == {states.NEW, states.FAILED}
        assert {str(state) for state in set(states) - before} <= {"refused", "closed", "enrolled", "failed"}


def test_what_one_end_sends_the_other_receives() -> None:
    """Every message that one table sends is received somewhere in the other table."""
    sent = {str(action).split()[0] for _, action in [*BROKER, *AGENT] if isinstance(action, Action)}
    words = {word_of(key) for _, key in [*BROKER, *AGENT] if not isinstance(key, Action)}
    assert {word for word in sent if not word.startswith("(")} == words


def test_every_action_has_a_method_that_the_random_owner_uses() -> None:
    """So that no action is left out of the tests above."""
    assert set(BROKER_ACTIONS) == {key for _, key in BROKER if isinstance(key, Action)}
    assert set(AGENT_ACTIONS) == {key for _, key in AGENT if isinstance(key, Action)}


@pytest.mark.parametrize("name", ["states of the broker", "states of the agent"])
def test_the_page_shows_the_table(name: str) -> None:
    """docs/wire.md has the machines' tables; `python -m support.control_tables` writes them."""
    assert shown(name) == control_tables.parts()[name]


def test_events_can_not_be_changed() -> None:
    """An event is what was heard."""
    with pytest.raises(AttributeError):
        Left("x").reason = "y"  # type: ignore[misc]


def test_the_version_of_a_hello_is_looked_at_first() -> None:
    """A Hello of another version may have another shape; this one can be decoded."""
    wrong = structs.replace(HELLO, version=2)
    with pytest.raises(RemoteProtocolError, match="the agent speaks protocol version 2, this broker 1") as caught:
        broker().receive(encode(wrong))
    assert caught.value.code is Refusal.VERSION
    assert messages.VERSION == 1
