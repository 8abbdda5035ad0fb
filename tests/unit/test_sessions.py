"""Sessions of broker and agent without sockets: what they decide, say, and tell their owners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rtunnel.relay.ends import EndHandler
from rtunnel.relay.link import Link
from rtunnel.relay.lost import LINK_LOST, RESET, Lost, LostKind, closed
from rtunnel.relay.stream import StreamEnd
from rtunnel.trust.identity import TrustStore
from rtunnel.trust.keys import LinkMacs
from rtunnel.wire.control import UNPROVEN_BYTES, AgentState, BrokerState
from rtunnel.wire.messages import (
    Bye,
    Challenge,
    Drain,
    Enrol,
    Enrolled,
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
from rtunnel_agent.handshake import CHALLENGE_SECONDS, AgentSession, Enrolment
from rtunnel_broker.session import Session
from support.messages import decoder_of

SECRET = b"s" * 32
NONCE = bytes(range(16))
MACS = LinkMacs(lambda: b"")
ANY = Challenge | Welcome | Refuse | Trust | Drain | Bye | Enrolled | Hello | Proof | Update | Enrol
WELCOME = Welcome(node="b1", host="h1", epoch=7, ip="10.9.0.1", port=7001, heartbeat=5.0)
ENROL = Enrol(version=1, request=b"csr")


def hello(**changes: Any) -> Hello:
    """Return a good Hello by token t1, but for the changes."""
    fields: dict[str, Any] = {
        "version": 1, "agent_id": "a1", "instance": NONCE, "namespace": "default", "addresses": ["10.1.0.7"],
        "nonce": NONCE, "token_id": "t1", "start_window": 16384,
    }  # fmt: skip
    return Hello(**fields | changes)


class Timer:
    """A timer that the test fires."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call, self.cancelled = seconds, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop whose time and turns are the test's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.slow: list[Callable[[], None]] = []

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(seconds, call))
        return self.timers[-1]

    def enqueue_slow(self, call: Callable[[], None]) -> None:
        self.slow.append(call)

    def turn(self) -> None:
        due, self.slow = self.slow, []
        for call in due:
            call()

    def late(self) -> None:
        """Fire the last timer, which must not be cancelled."""
        assert not self.timers[-1].cancelled
        self.timers[-1].call()


class Wire:
    """A link and its control stream: what is written, and how it ends."""

    peer = "10.0.0.9"
    peer_certificate: bytes | None = None

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.loop = Loop()
        self.allowance: int | None = None
        self.start_window = 0
        self.streams: dict[int, object] = {}
        self.cut = 0
        self.over: Lost | None = None
        self.broken_off = ""
        self._said = decoder_of(ANY, 1 << 16)

    # As a link.

    def open(self, handler: EndHandler, first: bytes) -> Wire:
        self.write(first)
        return self

    def close(self, lost: Lost) -> None:
        if self.over is None:
            self.over = lost
            self.owner.link_down(self, lost)

    def break_off(self, fault: str) -> None:
        self.broken_off = fault

    # As a stream.

    def write(self, data: bytes) -> None:
        assert self.over is None, "said behind the end of the link"
        self._said.feed(data)

    def said(self) -> list[Message]:
        """Take what was said since the last call."""
        found = []
        while (message := self._said.next()) is not None:
            found.append(message)
        return found


@dataclass
class Node:
    """The broker's node, as its sessions see it."""

    node: str = "b1"
    host: str = "h1"
    tokens: Mapping[str, bytes] = field(default_factory=lambda: {"t1": SECRET})
    handshake_timeout: float = 10.0
    draining: bool = False
    trust_store: TrustStore | None = None
    dial_tls: None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    debugging: bool = False
    lines: list[dict[str, object]] = field(default_factory=list)
    refused_agents: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trust: Any = self
        self.log: Any = self

    def wants(self, session: Session) -> None:
        self.calls.append(("wants", session.owner))

    def enrols(self, session: Session, request: Enrol) -> None:
        self.calls.append(("enrols", request))

    def lost(self, session: Session, lost: Lost) -> None:
        self.calls.append(("lost", lost.kind, str(lost)))

    def silent_sessions(self) -> tuple[int, int]:
        return 0, 0

    def updated(self, session: Session) -> None:
        self.calls.append(("updated", session.exposes))

    def refused(self, session: Session, code: Refusal, text: str) -> None:
        self.calls.append(("refused", code))
        self.refused_agents.append((session.owner, text))

    # As its log.

    def info(self, event: str, **fields: object) -> None:
        if event in ("session_opened", "session_ended"):
            self.lines.append({"event": event, **fields})
        else:
            self.calls.append((event, fields.get("code", "")))

    def trace(self, event: str, **fields: object) -> None: ...

    def stranger(self, event: str, kind: str, **fields: object) -> None:
        self.calls.append((event, kind))


class AtBroker:
    """A session at its broker, and the peer's side of its control stream."""

    def __init__(self, **node: Any) -> None:
        self.node = Node(**node)
        self.session = Session(self.node)
        self.wire = Wire(self.session)
        self.session.link_up(cast(Link, self.wire))
        assert self.session.link_stream(cast(StreamEnd, self.wire)) is self.session

    def hear(self, *messages: Message) -> list[Message]:
        """Let the session hear these in one piece; return what it says."""
        self.session.received(b"".join(map(encode, messages)))
        return self.wire.said()

    def proven(self) -> AtBroker:
        greeting = hello()
        (challenge,) = self.hear(greeting)
        assert isinstance(challenge, Challenge)
        assert self.hear(Proof(MACS.agent(SECRET, encode(greeting), challenge.nonce))) == []
        return self

    def live(self) -> AtBroker:
        self.proven().session.welcome(WELCOME)
        (welcome,) = self.wire.said()
        assert isinstance(welcome, Welcome) and welcome.start_window == self.wire.start_window == 16384
        self.node.calls.clear()
        return self


def test_a_session_by_token() -> None:
    """Hello, Challenge, Proof, then the node is asked, and Welcome is what it answers."""
    at = AtBroker()
    assert at.wire.allowance == UNPROVEN_BYTES
    at.proven()
    assert at.session.state is BrokerState.PROVEN and not at.session.serves
    assert at.wire.allowance is None
    assert at.node.calls == [("wants", "default/a1")]
    at.session.welcome(WELCOME)
    assert at.session.state is BrokerState.LIVE and at.session.serves
    assert at.wire.loop.timers[-1].cancelled


@pytest.mark.parametrize(
    ("changes", "node", "code"),
    [
        ({"version": 2}, {}, Refusal.VERSION),
        ({"agent_id": "a 1"}, {}, Refusal.BAD_REQUEST),
        ({"addresses": ["010.1.0.7"]}, {}, Refusal.BAD_REQUEST),
        ({"token_id": "t2"}, {}, Refusal.BAD_TOKEN),
        ({"token_id": ""}, {}, Refusal.BAD_CERTIFICATE),
        ({}, {"draining": True}, Refusal.DRAINING),
        ({"holds": ["b1"]}, {}, Refusal.DUPLICATE_NODE),
        ({"holds_hosts": ["h1"]}, {}, Refusal.DUPLICATE_NODE),
        ({"agent_id": "a 1", "token_id": "t2", "holds": ["b1"]}, {"draining": True}, Refusal.BAD_REQUEST),
        ({"token_id": "t2", "holds": ["b1"]}, {"draining": True}, Refusal.BAD_TOKEN),
        ({"holds": ["b1"]}, {"draining": True}, Refusal.DRAINING),
    ],
)
def test_a_hello_is_refused_with_the_first_code_that_applies(
    changes: dict[str, Any], node: dict[str, Any], code: Refusal
) -> None:
    """In the order of docs/wire.md; the link ends behind the answer. The node learns which agent it was."""
    at = AtBroker(**node)
    (answer,) = at.hear(hello(**changes))
    assert isinstance(answer, Refuse) and answer.code == code
    assert at.node.refused_agents == [(f"default/{changes.get('agent_id', 'a1')}", answer.text)]
    assert at.session.state is BrokerState.CLOSED
    assert at.node.calls[0] == ("refused", code) and at.node.calls[-1][:2] == ("lost", LostKind.REFUSED)


def test_nothing_is_said_twice_when_two_refuse() -> None:
    """The registry's refusal comes when another one has ended the session."""
    at = AtBroker().proven()
    at.session.refuse(Refusal.OVERLOADED)
    at.session.refuse(Refusal.PORTS_EXHAUSTED)
    at.session.welcome(WELCOME)
    at.session.leave("the broker stops")
    at.session.drain(1.0)
    at.session.tell_trust(b"list")
    assert [answer.code for answer in at.wire.said()] == ["overloaded"]  # type: ignore[attr-defined]
    assert [call for call in at.node.calls if call[0] == "refused"] == [("refused", Refusal.OVERLOADED)]


def test_a_session_that_is_registered_while_the_node_begins_to_drain() -> None:
    """It was not told of the drain, so it gets no Welcome."""
    at = AtBroker().proven()
    at.node.draining = True
    at.session.drain(30.0)
    at.session.welcome(WELCOME)
    (answer,) = at.wire.said()
    assert isinstance(answer, Refuse) and answer.code == Refusal.DRAINING


def test_the_newest_update_counts() -> None:
    """Of many in one piece one is looked at, in its turn; an equal one tells nobody."""
    at = AtBroker().live()
    at.hear(*(Update(exposes=[str(port)]) for port in range(1, 21)))
    at.wire.loop.turn()
    at.hear(Update(exposes=["20"]))
    at.wire.loop.turn()
    assert at.node.calls == [("updated", ("20",))]


@pytest.mark.parametrize(
    ("update", "code"),
    [
        (Update(exposes=["none"]), Refusal.BAD_REQUEST),
        (Update(exposes=["22"], addresses=["010.1.0.7"]), Refusal.BAD_REQUEST),
    ],
)
def test_a_malformed_update_ends_the_session(update: Update, code: Refusal) -> None:
    """With the code of its fault; an Update that was under way does not count any more."""
    at = AtBroker().live()
    at.hear(update)
    at.wire.loop.turn()
    (answer,) = at.wire.said()
    assert isinstance(answer, Refuse) and answer.code == code
    assert at.hear(Update(exposes=["22"])) == []
    at.wire.loop.turn()
    assert not [call for call in at.node.calls if call[0] == "updated"]


@dataclass
class Judge:
    """A trust store that says what the test wants."""

    revoked: bool = False
    good: bool = True
    generation: int = 0

    def is_revoked(self, identity: object) -> bool:
        return self.revoked

    def in_force(self, identity: object) -> bool:
        return self.good


def certified(at: AtBroker) -> AtBroker:
    """Let a session be one by certificate."""
    identity = SimpleNamespace(subject="agent/default/a1", name="a1", addresses=frozenset({"10.1.0.7"}))
    at.session.identity = cast(Any, identity)
    return at


@pytest.mark.parametrize(
    ("judge", "answers"),
    [
        (Judge(revoked=True), [Refuse("revoked", "the certificate of agent/default/a1 is revoked")]),
        (
            Judge(good=False),
            [
                Trust(b"list"),
                Refuse("bad_certificate", "the certificate of agent/default/a1 is not from a CA in force any more"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("before", ["proven", "live", "draining"])
def test_a_certificate_that_is_not_good_any_more(judge: Judge, answers: list[Message], before: str) -> None:
    """From the verdict on only its answer is said, behind the trust list where that helps."""
    at = certified(AtBroker().proven() if before == "proven" else AtBroker().live())
    if before == "draining":
        at.session.drain(1.0)
        at.wire.said()
    fault = at.session.judge(cast(TrustStore, judge))
    assert fault is not None
    assert at.session.state is BrokerState.REVOKED and not at.session.serves
    assert at.session.judge(cast(TrustStore, judge)) is None
    at.session.welcome(WELCOME)
    at.session.tell_trust(b"too late")
    assert at.hear(Update(exposes=["22"])) == []
    at.wire.loop.turn()
    at.session.expel(fault, b"list")
    at.session.expel(fault, b"list")
    assert at.wire.said() == answers
    assert not [call for call in at.node.calls if call[0] == "updated"]
    assert at.node.calls[-1][:2] == ("lost", LostKind.REFUSED)


def test_a_good_certificate_stays() -> None:
    """A session by token is not judged at all."""
    assert certified(AtBroker().live()).session.judge(cast(TrustStore, Judge())) is None
    at = AtBroker().live()
    assert at.session.judge(cast(TrustStore, Judge(revoked=True))) is None
    assert at.session.state is BrokerState.LIVE


def test_a_drain_and_a_goodbye() -> None:
    """Streams still begin while the node drains; Bye is the last word."""
    at = AtBroker().live()
    at.session.drain(30.0)
    assert at.session.state is BrokerState.DRAINING and at.session.serves
    at.session.tell_trust(b"list")
    at.session.leave("the broker stops")
    assert at.wire.said() == [Drain(30.0), Trust(b"list"), Bye("the broker stops")]
    assert at.node.calls == [("lost", LostKind.CLOSED, "the broker stops")]


def test_a_request_for_a_certificate_at_the_broker() -> None:
    """The node is asked; its answer is passed on, and whatever ends the link then is in order."""
    at = AtBroker()
    assert at.hear(ENROL) == []
    assert at.node.calls == [("enrols", ENROL)]
    at.session.enrolled(Enrolled(b"der"))
    assert at.wire.said() == [Enrolled(b"der")]
    at.wire.close(Lost(LostKind.RESET, "reset"))
    at.session.enrolled(Enrolled(b"der"))
    assert at.wire.said() == []
    assert at.node.calls[-1][:2] == ("lost", LostKind.ANSWERED)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda at: at.wire.loop.late(), LostKind.DEADLINE),
        (lambda at: at.session.finished(), LostKind.CLOSED),
        (lambda at: at.session.lost(RESET), LostKind.RESET),
        (lambda at: at.wire.close(closed("closed by peer")), LostKind.CLOSED),
        (lambda at: (at.session.lost(LINK_LOST), at.wire.close(Lost(LostKind.SILENT, "silent"))), LostKind.SILENT),
        (lambda at: at.session.received(b"\xff\xff\xff\xff"), LostKind.REFUSED),
    ],
)
def test_why_a_session_ended_is_a_kind(end: Callable[[AtBroker], object], kind: LostKind) -> None:
    """Its node hears it once."""
    at = AtBroker()
    end(at)
    assert at.session.state is BrokerState.CLOSED
    assert [call[1] for call in at.node.calls if call[0] == "lost"] == [kind]


def test_a_session_that_was_up_has_one_line_at_its_begin_and_one_at_its_end() -> None:
    """With the cause in one word, and the number of streams that were cut."""
    at = AtBroker().live()
    at.wire.cut = 3
    at.wire.close(Lost(LostKind.SILENT, "no sign of life for 15 s"))
    at.session.end("too late")
    up, down = at.node.lines
    opened = (up["event"], up["agent"], up["port"], up["proved_by"])
    assert opened == ("session_opened", "a1", WELCOME.port, "join token")
    assert (down["event"], down["agent"], down["epoch"]) == ("session_ended", "a1", up["epoch"])
    assert (down["cause"], down["reason"], down["streams_cut"]) == ("silent", "no sign of life for 15 s", 3)


def test_a_session_that_was_never_up_has_neither_line() -> None:
    """Its refusal has a line of its own."""
    for at in (AtBroker(), AtBroker().proven()):
        at.session.refuse(Refusal.OVERLOADED)
        at.wire.close(closed("closed by peer"))
        assert at.node.lines == []


def test_a_second_stream_before_the_proof_ends_the_link() -> None:
    """Behind it the agent has no business to open one, and it is only refused."""
    at = AtBroker()
    assert at.session.link_stream(cast(StreamEnd, at.wire)) is None
    assert at.wire.broken_off == "a second stream before the agent proved itself"
    at = AtBroker().proven()
    assert at.session.link_stream(cast(StreamEnd, at.wire)) is None
    assert not at.wire.broken_off


# The agent's.


@dataclass
class Agent:
    """The agent, as its sessions see it."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def session_ready(self, session: AgentSession) -> None:
        self.calls.append(("ready",))

    def session_up(self, session: AgentSession) -> None:
        self.calls.append(("up", session.node))

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        self.calls.append(("down", code, lost.kind))

    def session_draining(self, session: AgentSession, deadline: float) -> None:
        self.calls.append(("draining", deadline))

    def session_trust(self, session: AgentSession, signed: bytes) -> None:
        self.calls.append(("trust", signed))

    def serve_stream(self, session: AgentSession, stream: StreamEnd) -> EndHandler:
        self.calls.append(("stream",))
        return session


class AtAgent:
    """A session at its agent, and the broker's side of its control stream."""

    def __init__(self, secret: bytes = SECRET, *, greets: bool = True) -> None:
        self.agent = Agent()
        self.session = AgentSession(self.agent, None, secret, 20.0)
        self.wire = Wire(self.session)
        self.session.link_up(cast(Link, self.wire))
        if greets:
            self.session.greet(hello())
            assert self.wire.said() == [hello()]
            self.agent.calls.clear()

    def hear(self, *messages: Message) -> list[Message]:
        """Let the session hear these in one piece; return what it says."""
        self.session.received(b"".join(map(encode, messages)))
        return self.wire.said()

    def live(self) -> AtAgent:
        """By certificate: no Challenge."""
        self.hear(WELCOME)
        self.agent.calls.clear()
        return self


def test_an_agent_that_proves_its_token() -> None:
    """The Challenge is due soon, the Welcome within the handshake deadline."""
    at = AtAgent()
    assert at.wire.loop.timers[-1].seconds == CHALLENGE_SECONDS
    assert at.session.link_stream(cast(StreamEnd, at.wire)) is None
    (proof,) = at.hear(Challenge(NONCE, MACS.broker(SECRET, encode(hello()), NONCE)))
    assert proof == Proof(MACS.agent(SECRET, encode(hello()), NONCE))
    assert at.wire.loop.timers[-1].seconds == 20.0
    at.hear(WELCOME)
    assert at.session.state is AgentState.LIVE
    assert at.wire.start_window == WELCOME.start_window
    assert at.wire.loop.timers[-1].cancelled
    assert at.session.link_stream(cast(StreamEnd, at.wire)) is at.session
    assert at.agent.calls == [("up", "b1"), ("stream",)]


def test_an_agent_waits_with_its_hello() -> None:
    """Until its owner has one; after the end of the link none is sent."""
    at = AtAgent(greets=False)
    assert at.agent.calls == [("ready",)]
    at.wire.close(closed("closed by peer"))
    at.session.greet(hello())
    assert at.wire.said() == []


@pytest.mark.parametrize(
    ("messages", "code", "kind"),
    [
        ([Refuse(code="draining")], Refusal.DRAINING, LostKind.REFUSED),
        ([Refuse(code="of a later version")], Refusal.INTERNAL, LostKind.REFUSED),
        ([Challenge(NONCE, bytes(32))], Refusal.BAD_TOKEN, LostKind.REFUSED),
        ([Challenge(NONCE, bytes(32), version=2)], Refusal.VERSION, LostKind.REFUSED),
        ([WELCOME], Refusal.PROTOCOL_ERROR, LostKind.PROTOCOL_ERROR),
        ([Bye()], Refusal.PROTOCOL_ERROR, LostKind.PROTOCOL_ERROR),
    ],
)
def test_how_an_agent_that_proves_a_token_is_turned_away(
    messages: list[Message], code: Refusal, kind: LostKind
) -> None:
    """Its owner hears the code and the kind, once."""
    at = AtAgent()
    assert at.hear(*messages, *messages) == []
    assert at.agent.calls == [("down", code, kind)]
    assert at.session.state is AgentState.CLOSED
    assert at.session.heard


def test_all_that_a_broker_says_in_a_session() -> None:
    """In one piece, with the Bye that ends it."""
    at = AtAgent(b"").live()
    at.hear(Trust(b"list"), Drain(30.0), Trust(b"more"), Bye("it stops"), Trust(b"too late"))
    assert at.agent.calls == [
        ("trust", b"list"), ("draining", 30.0), ("trust", b"more"), ("down", None, LostKind.CLOSED),
    ]  # fmt: skip


def test_what_an_agent_says_in_a_session() -> None:
    """Nothing of it before Welcome, and nothing behind its Bye."""
    at = AtAgent(b"")
    at.session.expose(["22"], ["10.1.0.7"])
    assert at.wire.said() == []
    at.live()
    at.session.expose(["22"], ["10.1.0.7"])
    at.session.leave("it leaves")
    at.session.expose(["23"], ["10.1.0.7"])
    at.session.leave("again")
    assert at.wire.said() == [Update(exposes=["22"], addresses=["10.1.0.7"]), Bye("it leaves")]
    assert at.agent.calls == [("down", None, LostKind.CLOSED)]


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda at: at.wire.loop.late(), LostKind.DEADLINE),
        (lambda at: at.session.finished(), LostKind.CLOSED),
        (lambda at: at.session.lost(RESET), LostKind.RESET),
        (lambda at: at.wire.close(Lost(LostKind.CERTIFICATE_REFUSED, "alert")), LostKind.CERTIFICATE_REFUSED),
        (lambda at: (at.session.lost(LINK_LOST), at.wire.close(Lost(LostKind.SILENT, "silent"))), LostKind.SILENT),
        (lambda at: at.session.end("another broker was faster"), LostKind.CLOSED),
    ],
)
def test_why_an_agents_session_ended_is_a_kind(end: Callable[[AtAgent], object], kind: LostKind) -> None:
    """Its owner hears it once; nothing that could be understood was said."""
    at = AtAgent()
    end(at)
    assert at.agent.calls == [("down", None, kind)]
    assert not at.session.heard


@dataclass
class Attempt:
    """A connect under way."""

    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


def test_a_connect_that_is_given_up() -> None:
    """There is no link yet: the connect is cancelled, and the owner hears of the end at once."""
    agent, attempt = Agent(), Attempt()
    session = AgentSession(agent, None, b"", 20.0)
    session.attempt = cast(Any, attempt)
    session.end("another broker was faster")
    session.end("again")
    assert attempt.cancelled and agent.calls == [("down", None, LostKind.CLOSED)]


@pytest.mark.parametrize(
    ("messages", "outcome"),
    [
        ([Enrolled(b"der")], Enrolled(b"der")),
        ([Enrolled(b"der"), Enrolled(b"other")], Enrolled(b"der")),
        ([Refuse("bad_token", "no")], Refuse("bad_token", "no")),
        ([Trust(b"x")], Lost(LostKind.PROTOCOL_ERROR,
                             "protocol error: trust came in the state enrolling, which takes enrolled or refused")),
    ],
)  # fmt: skip
def test_a_request_for_a_certificate_at_the_agent(messages: list[Message], outcome: object) -> None:
    """The first answer is the only one."""
    ready: list[bool] = []
    outcomes: list[object] = []
    enrolment = Enrolment(ENROL, lambda: ready.append(True), outcomes.append, 20.0)
    wire = Wire(enrolment)
    enrolment.link_up(cast(Link, wire))
    assert ready == [True] and wire.said() == []
    enrolment.ask()
    enrolment.ask()
    assert wire.said() == [ENROL]
    enrolment.received(b"".join(map(encode, messages)))
    assert outcomes == [outcome]
