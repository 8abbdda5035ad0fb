"""The four ends of Dials in their roles, without a socket: what each says and counts."""

from __future__ import annotations

import errno
import socket
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from rtunnel.clock import ClockWatch
from rtunnel.config import AgentConfig, GatewayConfig
from rtunnel.registry import Tuple
from rtunnel.relay.join import Ending
from rtunnel.relay.memory import START_WINDOW
from rtunnel.strangers import made_room
from rtunnel.trust.keys import DialKeys, gateway_key
from rtunnel.wire.dial import MAX_DIALLINGS, DialReceiver, DialRefused, DialSender
from rtunnel.wire.messages import Accepted, DialBody, Dialling, Refuse, encode
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_agent.targets import DIALLING_AFTER, Exposed, IncomingStream, Targets
from rtunnel_broker import ports
from rtunnel_broker.ports import DialChecker, GuardedPort, OpenPortServer, PortCounts
from rtunnel_socks.dial import Attempt, Target
from support.ends import DEADLINE, LINK_LOST, RESET, FakeEnd, FakeRelay

CLUSTER = b"c" * 32
KEY = gateway_key(CLUSTER, "g1")
EARLY, LATER = b"early", b"later"


def body(**changes: Any) -> DialBody:
    """What a good Dial asks for."""
    fields: dict[str, Any] = {
        "version": 1, "namespace": "default", "ip": "10.1.0.7", "port": 80, "node": "b1", "epoch": 7,
        "nonce": socket.inet_aton("10.0.0.1") * 4, "time": int(time.time() * 1000), "who": "alice",
    }  # fmt: skip
    return DialBody(**fields | changes)


def said(end: FakeEnd) -> Any:
    """Return the answer that an end was given."""
    sender: DialSender[None] = DialSender()
    sender.dial(body())
    return sender.receive(end.written)[-1]


class Session:
    """A live session, as ports and incoming streams see it."""

    def __init__(self) -> None:
        self.streams = 0
        self.owner = "default/a1"
        self.serves = True
        self.epoch = 7
        self.node = "b1"
        self.addresses = frozenset({"10.1.0.7"})
        self.full: Refused | None = None
        self.hello = SimpleNamespace(namespace="default", agent_id="a1")
        self.welcome = SimpleNamespace(epoch=7, node="b1")
        self.link: Any = SimpleNamespace(
            over=False, going_away=None, start_window=START_WINDOW, attach=lambda stream: None, open=self._open
        )
        self.opened: list[FakeEnd] = []
        self.logged: list[tuple[str, dict[str, Any]]] = []
        log = SimpleNamespace(
            debugging=True,
            info=self._log,
            trace=self._log,
            stranger=lambda event, _kind, **fields: self._log(event, **fields),
        )
        self.keeper = SimpleNamespace(trust=SimpleNamespace(dial_tls=None), log=log)

    def _log(self, event: str, **fields: Any) -> None:
        self.logged.append((event, fields))

    def _open(self, handler: Any, first: bytes, _deadline: float) -> FakeEnd:
        stream = FakeEnd(written=first)
        stream.set_handler(handler)
        self.opened.append(stream)
        return stream


class Broker:
    """The ports of one session."""

    def __init__(self) -> None:
        self.relay = FakeRelay()
        self.session = Session()
        self.counts = PortCounts(8)
        self.revoked: set[str] = set()
        clock = ClockWatch("this broker", lambda event, fields: None, lambda: None)
        self.checker = DialChecker("b1", DialKeys([CLUSTER]), 30.0, self.revoked.__contains__, clock)
        relay, session = self.relay, self.session
        self.guarded = GuardedPort(relay, session, 30001, self.checker, self.counts, 10.0)  # type: ignore[arg-type]
        self.open = OpenPortServer(
            relay, session, 30002, "10.1.0.7", 80, (), "b1", self.counts,  # type: ignore[arg-type]
        )  # fmt: skip

    def gateway(self) -> FakeEnd:
        """A connection to the guarded port."""
        end = FakeEnd()
        self.guarded.accept(end, "10.9.9.9")  # type: ignore[arg-type]
        return end

    def client(self) -> tuple[FakeEnd, FakeEnd]:
        """A connection to the open port, and its stream."""
        end = FakeEnd()
        self.open.accept(end, "10.9.9.9")  # type: ignore[arg-type]
        return end, self.session.opened[-1]

    @property
    def held(self) -> tuple[int, int, int]:
        """Waiting connections, streams of the session, pairs."""
        return self.counts.waiting, self.session.streams, self.counts.streams


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Whose streams are fakes."""
    monkeypatch.setattr(ports, "StreamEnd", lambda link: FakeEnd())
    return Broker()


# A broker's guarded port.


@pytest.mark.parametrize("piece", [1, 11, 1 << 16])
def test_a_guarded_port_passes_a_good_dial_on(broker: Broker, piece: int) -> None:
    """Exactly as it came, with what came behind it; then the pair counts until it ends."""
    frame = DialSender[None]().dial(body(), KEY) + EARLY
    gateway = broker.gateway()
    assert broker.held == (1, 0, 0)
    for at in range(0, len(frame) - len(EARLY), piece):
        gateway.receive(frame[at : min(at + piece, len(frame) - len(EARLY))])
    (pair,) = broker.relay.pairs
    assert (pair.client, pair.target.written + EARLY) == (gateway, frame)
    assert broker.held == (0, 1, 1)
    assert pair.owner.review() is None
    broker.revoked.add("g1")
    assert pair.owner.review() is Ending.REVOKED
    pair.end()
    assert broker.held == (0, 0, 0)
    assert broker.session.logged[-1][0] == "stream_relayed"


def test_bytes_behind_a_dial_go_with_it(broker: Broker) -> None:
    """A gateway may send payload at once."""
    frame = DialSender[None]().dial(body(), KEY) + EARLY
    broker.gateway().receive(frame)
    assert broker.relay.pairs[0].target.written == frame


def test_more_behind_a_dial_than_the_stream_may_take_is_refused(broker: Broker) -> None:
    """Passed on, it would overrun the window, and the agent would end its link with everybody's streams."""
    gateway, frame = broker.gateway(), DialSender[None]().dial(body(), KEY)
    broker.session.link.start_window = START_WINDOW
    gateway.receive(frame + bytes(START_WINDOW + 1 - len(frame)))
    assert (said(gateway).code, broker.held) == (Refusal.PROTOCOL_ERROR, (0, 0, 0))
    assert "behind the Dial" in said(gateway).text and broker.session.opened == []
    gateway, frame = broker.gateway(), DialSender[None]().dial(body(nonce=bytes(16)), KEY)
    gateway.receive(frame + bytes(START_WINDOW - len(frame)))
    assert len(broker.relay.pairs[-1].target.written) == START_WINDOW


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": 2}, Refusal.VERSION),
        ({"time": 0}, Refusal.EXPIRED),
        ({"node": "b2"}, Refusal.STALE_NODE),
        ({"namespace": "blue"}, Refusal.STALE_TARGET),
        ({"ip": "10.1.0.8"}, Refusal.STALE_TARGET),
        ({"epoch": 8}, Refusal.STALE_EPOCH),
    ],
)
def test_a_guarded_port_refuses_what_is_not_for_its_session(
    broker: Broker, changes: dict[str, Any], code: Refusal
) -> None:
    """The answer, the count and the log line have the same code."""
    gateway = broker.gateway()
    gateway.receive(DialSender[None]().dial(body(**changes), KEY))
    assert (said(gateway).code, broker.counts.refused) == (code, {code.value: 1})
    event, fields = broker.session.logged[-1]
    assert (event, fields["code"], fields["who"]) == ("dial_refused", code.value, "alice")
    assert bool(said(gateway).time) == (code is Refusal.EXPIRED)
    assert gateway.closed and not gateway.reset and broker.held == (0, 0, 0)


def test_a_guarded_port_believes_no_dial_without_a_mac(broker: Broker) -> None:
    """Its words are not even logged."""
    for dial in (body(), body(version=2)):
        gateway = broker.gateway()
        gateway.receive(DialSender[None]().dial(dial))
        assert said(gateway).code is Refusal.BAD_MAC
        assert broker.session.logged[-1][1]["who"] == ""
    broker.revoked.add("g1")
    gateway = broker.gateway()
    gateway.receive(DialSender[None]().dial(body(), KEY))
    assert said(gateway).code is Refusal.REVOKED


def test_a_session_that_does_not_serve_takes_no_stream(broker: Broker) -> None:
    """At neither port: it is not live yet, or void, or its agent has said GoAway."""
    link = broker.session.link
    for broker.session.serves, broker.session.link in ((False, link), (True, None)):
        gateway, client = broker.gateway(), FakeEnd()
        gateway.receive(DialSender[None]().dial(body(), KEY))
        broker.open.accept(client, "10.9.9.9")  # type: ignore[arg-type]
        assert said(gateway).code is Refusal.LINK_LOST and client.reset
        assert broker.session.opened == [] and broker.held == (0, 0, 0)


def test_a_dial_is_good_once(broker: Broker) -> None:
    """The second one is refused as replayed."""
    frame = DialSender[None]().dial(body(), KEY)
    broker.gateway().receive(frame)
    again = broker.gateway()
    again.receive(frame)
    assert said(again).code is Refusal.REPLAYED


def test_a_full_session_takes_no_dial(broker: Broker) -> None:
    """The session says why."""
    broker.session.full = Refused(Refusal.TOO_MANY_STREAMS, "the agent has 5 streams on b1, its limit there")
    gateway = broker.gateway()
    gateway.receive(DialSender[None]().dial(body(), KEY))
    assert said(gateway) == DialRefused(Refusal.TOO_MANY_STREAMS, "the agent has 5 streams on b1, its limit there", 0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x16\x03\x01\x02\x00", "a TLS handshake came, and broker.dial_security is plain"),
        (encode(Accepted()), "accepted came in the state idle, which takes dial"),
        (b"\0\0\0\1\xc1", "bad message"),
    ],
    ids=["TLS", "an answer", "garbage"],
)
def test_what_is_no_dial_is_a_protocol_error(broker: Broker, data: bytes, text: str) -> None:
    """The text says what came."""
    gateway = broker.gateway()
    gateway.receive(data)
    assert said(gateway).code is Refusal.PROTOCOL_ERROR and text in said(gateway).text
    assert broker.held == (0, 0, 0)


def test_a_connection_that_ends_before_its_dial_is_counted(broker: Broker) -> None:
    """By kind: a probe, a broken one, one after its deadline, one that made room."""
    broker.gateway().lose()
    spoke = broker.gateway()
    spoke.receive(b"\0")
    spoke.lose()
    broker.gateway().lose(DEADLINE)
    expelled = broker.gateway()
    next(iter(broker.counts.dials)).entry.expel(made_room("too many say no Dial"))
    assert expelled.reset
    assert broker.counts.lost == {"probe": 1, "broken": 1, "deadline": 1, "made_room": 1}
    early = broker.gateway()
    early.finish()
    assert said(early).text == "the connection ended before a whole Dial"
    assert broker.held == (0, 0, 0)


# A broker's open port.


def test_an_open_port_joins_its_client_when_the_agent_accepts(broker: Broker) -> None:
    """The stream counts at the session while it waits, and as a pair from then on."""
    client, stream = broker.client()
    (event,) = DialReceiver().receive(stream.written)
    assert (event.body.ip, event.body.port, event.body.who) == ("10.1.0.7", 80, "open:30002:10.9.9.9")
    assert (broker.held, client.reading) == ((1, 1, 0), False)
    stream.receive(encode(Dialling()))
    stream.receive(encode(Accepted()) + LATER)
    (pair,) = broker.relay.pairs
    assert (pair.client, pair.target, pair.down) == (client, stream, LATER)
    assert broker.held == (0, 1, 1) and pair.owner.review() is None
    pair.end()
    assert broker.held == (0, 0, 0)


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        (lambda stream: stream.receive(encode(Refuse("target_refused"))), Refusal.TARGET_REFUSED),
        (lambda stream: stream.receive(b"\0\0\0\1\xc1"), Refusal.PROTOCOL_ERROR),
        (lambda stream: stream.receive(encode(Dialling()) * (MAX_DIALLINGS + 1)), Refusal.PROTOCOL_ERROR),
        (lambda stream: stream.finish(), Refusal.PROTOCOL_ERROR),
        (lambda stream: stream.lose(LINK_LOST), Refusal.LINK_LOST),
        (lambda stream: stream.lose(DEADLINE), Refusal.DIAL_TIMEOUT),
    ],
    ids=["refused", "garbage", "Dialling without end", "FIN", "link lost", "deadline"],
)
def test_an_open_port_resets_its_client_when_there_is_no_answer(broker: Broker, happens: Any, code: Refusal) -> None:
    """There is no other way to tell it."""
    client, stream = broker.client()
    happens(stream)
    assert client.reset and stream.reset
    assert (broker.counts.refused, broker.held) == ({code.value: 1}, (0, 0, 0))


def test_a_client_that_leaves_an_open_port_takes_its_stream_along(broker: Broker) -> None:
    """Nothing is refused."""
    client, stream = broker.client()
    client.lose()
    assert stream.reset and not broker.counts.refused and broker.held == (0, 0, 0)


EVENTS = ["dial", "bad dial", "accepted", "refused", "garbage", "fin", "lost", "link lost", "client lost", "pair ends"]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(EVENTS)), max_size=30), st.integers(0, 255))
def test_whatever_happens_at_ports_all_is_given_back(events: list[tuple[int, str]], salt: int) -> None:
    """Four connections and any events: no count falls below zero, and all end at zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "StreamEnd", lambda link: FakeEnd())
        broker = Broker()
        ends: list[tuple[FakeEnd, FakeEnd]] = [(end, end) for end in (broker.gateway(), broker.gateway())]
        ends += [broker.client(), broker.client()]
        for number, (which, event) in enumerate(events):
            client, peer = ends[which]
            if event == "dial":
                peer.receive(DialSender[None]().dial(body(nonce=bytes([number, salt] * 8)), KEY))
            elif event == "bad dial":
                peer.receive(DialSender[None]().dial(body()))
            elif event in ("accepted", "refused"):
                peer.receive(encode(Accepted() if event == "accepted" else Refuse("internal")))
            elif event == "garbage":
                peer.receive(b"\0\0\0\1\xc1")
            elif event == "fin":
                peer.finish()
            elif event == "lost":
                peer.lose(RESET)
            elif event == "link lost":
                peer.lose(LINK_LOST)
            elif event == "client lost":
                client.lose()
            else:
                for pair in broker.relay.pairs:
                    if client in (pair.client, pair.target):
                        pair.end()
            assert min(broker.held) >= 0
            assert broker.counts.streams == len(broker.relay.pairs)
        for client, peer in ends:
            client.lose()
            peer.lose()
        for pair in broker.relay.pairs:
            pair.end()
        assert broker.held == (0, 0, 0)
        assert broker.counts.accepted == sum(broker.counts.endings.values())


# An agent's streams.


class Agent:
    """An agent that exposes port 80 of 10.1.0.7."""

    def __init__(self) -> None:
        self.relay, self.session = FakeRelay(), Session()
        log: Any = structlog.get_logger().bind()
        config = AgentConfig(exposes=["80"])
        self.targets = Targets(self.relay, config, frozenset({"10.1.0.7"}), log)  # type: ignore[arg-type]

    def stream(self, dial: DialBody | None = None, behind: bytes = b"") -> FakeEnd:
        """A stream with a Dial in front, if one is given."""
        stream = FakeEnd(self.relay.loop)
        IncomingStream(self.targets, self.session, stream)  # type: ignore[arg-type]
        if dial is not None:
            stream.receive(DialSender[None]().dial(dial) + behind)
        return stream

    @property
    def held(self) -> tuple[int, int, int]:
        """Streams of the session, pairs, timers."""
        return self.session.streams, self.targets.counts.streams, self.relay.loop.waiting


def test_an_agent_connects_and_accepts() -> None:
    """From the target's own address. When the port is withdrawn, the stream ends."""
    agent, target = Agent(), FakeEnd()
    stream = agent.stream(body(), EARLY)
    (connect,) = agent.relay.connects
    assert (connect.where, connect.source) == (("10.1.0.7", 80), "10.1.0.7")
    connect.succeed(target)
    (pair,) = agent.relay.pairs
    assert (pair.client, pair.target, pair.up) == (stream, target, EARLY)
    assert stream.written == encode(Accepted())
    assert agent.held == (1, 1, 0)
    assert agent.targets.expose(agent.targets.exposed) == 0 and not pair.done
    assert agent.targets.expose(Exposed([])) == 1
    assert agent.targets.counts.endings == {"not_allowed": 1} and agent.held == (0, 0, 0)


def test_an_agent_says_dialling_once_when_the_target_is_slow() -> None:
    """Then the answer."""
    agent, target = Agent(), FakeEnd()
    stream = agent.stream(body())
    agent.relay.loop.run(DIALLING_AFTER)
    agent.relay.loop.run(DIALLING_AFTER)
    assert stream.written == encode(Dialling())
    agent.relay.connects[0].succeed(target)
    assert stream.written == encode(Dialling()) + encode(Accepted())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": 2}, Refusal.VERSION),
        ({"ip": "10.1.0.8"}, Refusal.STALE_TARGET),
        ({"namespace": "blue"}, Refusal.STALE_TARGET),
        ({"epoch": 8}, Refusal.STALE_EPOCH),
        ({"node": "b2"}, Refusal.STALE_EPOCH),
        ({"port": 81}, Refusal.NOT_EXPOSED),
    ],
)
def test_an_agent_connects_to_nothing_that_is_not_its_own(changes: dict[str, Any], code: Refusal) -> None:
    """It refuses before it connects."""
    agent = Agent()
    stream = agent.stream(body(**changes))
    assert (said(stream).code, agent.relay.connects) == (code, [])
    assert stream.closed and not stream.reset and agent.held == (0, 0, 0)


def test_an_agent_tells_why_its_target_can_not_be_reached() -> None:
    """The connect's own words."""
    agent = Agent()
    stream = agent.stream(body())
    agent.relay.connects[0].fail(Refusal.TARGET_REFUSED, "connect to 10.1.0.7:80: ECONNREFUSED")
    assert said(stream) == DialRefused(Refusal.TARGET_REFUSED, "connect to 10.1.0.7:80: ECONNREFUSED", 0)
    assert agent.held == (0, 0, 0)


def test_a_port_that_is_withdrawn_during_the_connect_is_refused() -> None:
    """The target is reset, and nobody gets a byte of it."""
    agent, target = Agent(), FakeEnd()
    stream = agent.stream(body())
    agent.targets.expose(Exposed([]))
    agent.relay.connects[0].succeed(target)
    assert target.reset and said(stream).code is Refusal.NOT_EXPOSED and agent.held == (0, 0, 0)


def test_an_agent_proves_a_final_refusal_and_no_other() -> None:
    """With the prover that is in force when it answers."""
    agent = Agent()
    agent.targets.prover = SimpleNamespace(  # type: ignore[assignment]
        prove=lambda answer, dial, raw: msgspec.structs.replace(answer, mac=b"\1" * 32)
    )
    dial = body(exchange=bytes(32), port=81)
    assert agent.stream(dial).written == encode(
        Refuse("not_exposed", "the agent does not expose port 81", mac=b"\1" * 32)
    )
    unproved = agent.stream(body(exchange=bytes(32), epoch=8)).written
    assert unproved == encode(Refuse("stale_epoch", "the Dial is for another session of this agent"))


@given(st.lists(st.sampled_from(["dial", "garbage", "fin", "lost", "connected", "refused", "time", "end"]), max_size=9))
def test_whatever_happens_at_an_agent_all_is_given_back(events: list[str]) -> None:
    """One stream and any events: no count is ever below zero, and all end at zero."""
    agent, target = Agent(), FakeEnd()
    stream = agent.stream()
    for event in events:
        if event == "dial":
            stream.receive(DialSender[None]().dial(body()))
        elif event == "garbage":
            stream.receive(b"\0\0\0\1\xc1")
        elif event == "fin":
            stream.finish()
        elif event == "lost":
            stream.lose()
        elif event == "time":
            agent.relay.loop.run(DIALLING_AFTER)
        elif event == "end":
            for pair in agent.relay.pairs:
                pair.end()
        for connect in agent.relay.connects:
            if event == "connected":
                connect.succeed(target)
            elif event == "refused":
                connect.fail(Refusal.TARGET_REFUSED, "no")
        assert min(agent.held) >= 0
    stream.lose()
    for pair in agent.relay.pairs:
        pair.end()
    assert agent.held == (0, 0, 0)


# A gateway's attempts.

USED = Tuple(
    namespace="default", agent_ip="10.1.0.7", agent_port=0, ps_ip="10.5.0.1", ps_port=30001, node="b1", epoch=7,
    agent_id="a1", exposes="1-65535",
)  # fmt: skip


class Dialled:
    """A dial with one attempt, and the gateway behind it."""

    def __init__(self, proofs: Any = None, fault: str = "") -> None:
        self.relay = FakeRelay()
        self.target, self.who, self.attempts, self.trace = Target("default", "10.1.0.7", 80), "g:alice", 1, False
        self.counted: list[tuple[str, str]] = []
        self.events: list[tuple[Any, ...]] = []
        say = self.events.append
        self.owner: Any = SimpleNamespace(
            relay=self.relay,
            sources=None,
            config=GatewayConfig(),
            key=KEY,
            trust=SimpleNamespace(dial_tls=None, fault_of=lambda certificate: fault, proofs=proofs),
            clock=SimpleNamespace(suspicious=False, differs=lambda *words: say(("clock", *words[:1]))),
            paths=SimpleNamespace(answered=lambda node: say(("answered", node))),
            connect_failed_here=lambda number: say(("here", number)),
            count_attempt=lambda node, word: self.counted.append((node, word)),
        )
        self.attempt = Attempt(self, USED)  # type: ignore[arg-type]
        self.attempt.start()
        self.broker = FakeEnd(self.relay.loop)

    # See TargetDial.

    def heard(self, attempt: Attempt) -> None:
        self.events.append(("heard",))

    def failed(self, attempt: Attempt, code: Refusal, text: str) -> None:
        self.events.append(("failed", code, text))

    def not_proven(self, attempt: Attempt, refused: Refused) -> None:
        self.events.append(("not proven", refused.text))

    def won(self, attempt: Attempt, reached: Any) -> None:
        self.events.append(("won", reached.rest, reached.identity))

    def connected(self) -> FakeEnd:
        """The broker has taken the connection."""
        self.relay.connects[0].succeed(self.broker)
        return self.broker


@pytest.mark.parametrize("piece", [1, 5, 1 << 16])
def test_an_attempt_dials_and_wins(piece: int) -> None:
    """Heard once, won once, with the bytes behind Accepted; the end is paused for the join."""
    dialled = Dialled()
    broker = dialled.connected()
    (event,) = DialReceiver(lambda dial: None).receive(broker.written)
    asked = event.body
    assert (asked.ip, asked.port, asked.node, asked.epoch, asked.who) == ("10.1.0.7", 80, "b1", 7, "g:alice")
    assert KEY.sign(event.dial.body) == event.dial.mac
    data = encode(Dialling()) + encode(Accepted())
    for at in range(0, len(data), piece):
        chunk = data[at : at + piece]
        broker.receive(chunk + (LATER if at + piece >= len(data) else b""))
    assert dialled.events == [("heard",), ("answered", "b1"), ("won", LATER, None)]
    assert not broker.reading and not broker.closed


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        (lambda end: end.receive(encode(Refuse("stale_epoch"))), Refusal.STALE_EPOCH),
        (lambda end: end.receive(b"HTTP/1.1 200 OK\r\n"), Refusal.PROTOCOL_ERROR),
        (lambda end: end.finish(), Refusal.LINK_LOST),
        (lambda end: end.lose(RESET), Refusal.LINK_LOST),
    ],
    ids=["refused", "garbage", "FIN", "reset"],
)
def test_an_attempt_fails_once(happens: Any, code: Refusal) -> None:
    """With one code for each cause, and no end left open."""
    dialled = Dialled()
    broker = dialled.connected()
    happens(broker)
    assert [event[:2] for event in dialled.events if event[0] == "failed"] == [("failed", code)]
    assert broker.closed


def test_an_attempt_believes_no_answer_that_is_not_proved() -> None:
    """It reports the answer and fails. A refusal that another path may change needs no proof."""

    def check(*_: Any) -> None:
        raise Refused(Refusal.NOT_PROVEN, "no proof")

    proofs: Any = SimpleNamespace(check=check, known=lambda namespace, ip: None, exchange=bytes(32))
    for answer in (Accepted(), Refuse("not_exposed")):
        dialled = Dialled(proofs)
        dialled.connected().receive(encode(answer))
        assert dialled.events == [
            ("heard",), ("answered", "b1"), ("not proven", "no proof"), ("failed", Refusal.NOT_PROVEN, "no proof"),
        ]  # fmt: skip
    dialled = Dialled(proofs)
    dialled.connected().receive(encode(Refuse("overloaded")))
    assert dialled.events[-1][:2] == ("failed", Refusal.OVERLOADED)


def test_an_attempt_leaves_a_revoked_broker() -> None:
    """Also when it says Accepted."""
    dialled = Dialled(fault="the certificate of broker/b1 is revoked")
    dialled.connected().receive(encode(Accepted()))
    assert dialled.events[-1] == ("failed", Refusal.REVOKED, "the certificate of broker/b1 is revoked")
    assert dialled.broker.reset


def test_an_attempt_tells_the_clock_of_an_expired_dial() -> None:
    """The broker's time is in its answer."""
    dialled = Dialled()
    dialled.connected().receive(encode(Refuse("expired", time=1)))
    assert ("clock", "broker b1") in dialled.events


@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [
        (Refusal.TARGET_REFUSED, errno.ECONNREFUSED, Refusal.BROKER_UNREACHABLE),
        (Refusal.OVERLOADED, errno.EADDRNOTAVAIL, Refusal.OVERLOADED),
    ],
)
def test_a_connect_that_fails_is_the_brokers_fault_or_ours(code: Refusal, number: int, expected: Refusal) -> None:
    """A gateway without a source port suspects no broker."""
    dialled = Dialled()
    dialled.relay.connects[0].fail(code, "no free source port", number)
    assert dialled.events[-1][:2] == ("failed", expected)
    assert (("here", number) in dialled.events) == (expected is Refusal.OVERLOADED)


def test_a_cancelled_attempt_says_nothing_more() -> None:
    """Before and after the connect."""
    dialled = Dialled()
    dialled.attempt.cancel()
    dialled.connected()
    assert dialled.events == []
    dialled = Dialled()
    broker = dialled.connected()
    dialled.attempt.cancel()
    broker.receive(encode(Accepted()))
    assert dialled.events == [] and broker.reset
