"""Who agents are: certificates on links, enrolment and renewal, revocation, admission, and what agents expose."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from rtunnel.relay.relay import Relay
from rtunnel.trust import pki
from rtunnel.trust.identity import load_pair
from rtunnel.trust.keys import Token, load_token
from rtunnel.trust.tls import link_context
from rtunnel.wire import messages
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal
from rtunnel_agent.handshake import AgentSession, new_nonce
from rtunnel_broker.node import Node
from support.authority import address, authority, token
from support.cluster import Target, in_thread, read_line, running_cluster
from support.plumbing import close_kept

Events = list[Any]  # captured log lines
IP = "127.1.0.1"
#: A promise: what is revoked ends so soon.
REVOKED_WITHIN = 5.0


@pytest.fixture(autouse=True)
def _no_socket_left() -> Iterator[None]:
    yield
    close_kept()


@pytest.fixture
def events() -> Iterator[Events]:
    """What all parts of the test log."""
    structlog.reset_defaults()
    with capture_logs() as captured:
        yield captured


def named(events: Events, event: str) -> list[Any]:
    return [line for line in events if line["event"] == event]


class Knock:
    """One try for a session by a peer that says what it likes; real code of an agent below."""

    def __init__(self, hello: Hello, context: Any, secret: bytes = b"") -> None:
        self.session = AgentSession(self, hello, secret, 5.0)  # type: ignore[arg-type]
        self.context = context
        self.relay = Relay(lambda event, fields: None, "knock")
        self.done = trio.Event()
        self.code: Refusal | None = None
        self.why = ""
        self._token = trio.lowlevel.current_trio_token()

    async def at(self, node: Node) -> Knock:
        """Until Welcome, or the end."""
        sock = await in_thread(lambda: socket.create_connection(node.bound))
        sock.setblocking(False)
        self.relay.start()
        try:
            self.relay.call(
                lambda: setattr(
                    self.session,
                    "link",
                    self.relay.link(
                        sock, self.session, peer="", client=True, tls=self.context, server_name="broker.rtunnel",
                        handshake_timeout=5.0,
                    ),
                )
            )  # fmt: skip
            with trio.fail_after(10):
                await self.done.wait()
        finally:
            await trio.to_thread.run_sync(self.relay.stop)
        return self

    def session_up(self, session: AgentSession) -> None:
        self._token.run_sync_soon(self.done.set)

    def session_down(self, session: AgentSession, code: Refusal | None, why: str) -> None:
        self.code, self.why = code, why
        self._token.run_sync_soon(self.done.set)


def hello(token_id: str = "", **changes: Any) -> Hello:
    fields: dict[str, Any] = {"agent_id": "a1", "namespace": "default", "addresses": [IP]}
    return Hello(
        version=messages.VERSION, instance=new_nonce(), nonce=new_nonce(), token_id=token_id, **fields | changes
    )


def showing(secrets: Path, name: str, ca: Path | None = None) -> Any:
    """A client's context with this certificate; none for an empty name."""
    cas = ((ca or secrets) / "ca.pem").read_text()
    return link_context(cas, secrets / f"{name}.pem", secrets / f"{name}.key") if name else link_context(cas)


def without_certificate(directory: Path, given: Token) -> dict[str, object]:
    """Keys of an agent that enrols with this token."""
    path = directory / f"{given.id}.token"
    path.write_text(given.line())
    return {"certificate": "", "key": "", "identity": str(directory / "identity"), "join_token": str(path)}


def says(sock: socket.socket, line: bytes = b"still there") -> bytes:
    """A line on an open stream, and its answer; empty when the stream is gone."""
    try:
        sock.sendall(line + b"\n")
        return read_line(sock)
    except OSError:
        return b""


# --- certificates on links ----------------------------------------------------------------------------------


async def test_a_certificate_is_all_that_an_agent_needs(tmp_path: Path) -> None:
    """No token on either side: the link's certificate says who it is, and streams go through."""
    async with running_cluster(tmp_path, broker__join_token="", agent__join_token="") as cluster:
        await cluster.start(brokers=2)
        target = Target(IP)
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"
        (session,) = cluster.brokers["b1"].node.sessions.values()
        assert session.identity is not None and session.identity.subject == "agent/default/a1"
        assert cluster.agents["a1"].agent.identity is not None


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ({"agent_id": "a2"}, "of agent/default/a1, and not of agent/default/a2"),
        ({"namespace": "blue"}, "of agent/default/a1, and not of agent/blue/a1"),
        ({"addresses": [IP, "127.1.0.9"]}, "127.1.0.9 is not in the certificate"),
    ],
)
async def test_a_hello_that_claims_more_than_the_certificate(tmp_path: Path, claim: Any, text: str) -> None:
    """Another agent's id, another namespace, an address that is not in it: refused, and nothing is registered."""
    async with running_cluster(tmp_path) as cluster:
        node = (await cluster.start_broker()).node
        name = cluster.certify("a1", IP)
        told = await Knock(hello(**claim), showing(cluster.secrets, name)).at(node)
        assert told.code is Refusal.BAD_CERTIFICATE and text in told.why
        assert not node.sessions
        assert (await Knock(hello(), showing(cluster.secrets, name)).at(node)).session.welcome is not None


async def test_a_certificate_of_no_use_ends_the_handshake_and_says_why(tmp_path: Path, events: Events) -> None:
    """Expired, of another CA, a broker's own: TLS or the broker says no, and both ends know the reason."""
    async with running_cluster(tmp_path) as cluster:
        node = (await cluster.start_broker()).node
        old = cluster.certify("a1", IP, days=-1 / 48)
        told = await Knock(hello(), showing(cluster.secrets, old)).at(node)
        assert "certificate expired" in told.why
        pki.init(tmp_path / "foreign")
        pki.issue_agent(tmp_path / "foreign", "a1", agent_id="a1", namespace="default", addresses=[IP])
        told = await Knock(hello(), showing(tmp_path / "foreign", "a1", cluster.secrets)).at(node)
        assert "unknown ca" in told.why
        told = await Knock(hello(), showing(cluster.secrets, "")).at(node)
        assert told.code is Refusal.BAD_CERTIFICATE and "shows no certificate" in told.why
        reasons = [line["reason"] for line in named(events, "link_lost")]
        assert reasons == [
            "handshake: certificate not accepted: certificate has expired",
            "handshake: certificate not accepted: unable to get local issuer certificate",
        ]


async def test_an_agent_tells_why_its_certificate_is_not_accepted(tmp_path: Path, events: Events) -> None:
    """With TLS 1.3 the client is up before the server says no: the agent's log has the reason all the same."""
    pki.init(tmp_path / "foreign")
    pki.issue_agent(tmp_path / "foreign", "a1", agent_id="a1", namespace="default", addresses=[IP])
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker()
        both = tmp_path / "both.pem"
        both.write_text((tmp_path / "foreign" / "ca.pem").read_text() + (cluster.secrets / "ca.pem").read_text())
        part = await cluster.start_agent(
            ca=str(both), certificate=str(tmp_path / "foreign" / "a1.pem"), key=str(tmp_path / "foreign" / "a1.key")
        )
        await cluster.until(lambda: "does not accept this agent's certificate" in part.agent.reasons()[0])
        assert "unknown ca" in named(events, "no_session")[0]["reason"]


async def test_neither_end_goes_down_to_less(tmp_path: Path) -> None:
    """A plain link to a broker with TLS, a token to a broker that takes certificates only, and the reverse."""
    async with running_cluster(tmp_path) as cluster:
        strict = (await cluster.start_broker("strict", join_token="")).node
        simple = (await cluster.start_broker("simple", ca="")).node
        known = load_token(cluster.secrets / "join.token")
        name = cluster.certify("a1", IP)
        plain = await Knock(hello(known.id), None, known.secret).at(strict)
        assert plain.session.welcome is None and plain.code is None  # no word of it was understood
        told = await Knock(hello(known.id), showing(cluster.secrets, ""), known.secret).at(strict)
        assert told.code is Refusal.BAD_TOKEN and "takes certificates only" in told.why
        told = await Knock(hello(known.id), showing(cluster.secrets, name), known.secret).at(strict)
        assert told.code is Refusal.BAD_TOKEN
        told = await Knock(hello(), showing(cluster.secrets, name)).at(simple)
        assert told.code is Refusal.BAD_CERTIFICATE and "takes no certificates" in told.why
        assert not strict.sessions and not simple.sessions


# --- enrolment ----------------------------------------------------------------------------------------------


async def test_an_agent_enrols_once_and_renews_through_any_node(tmp_path: Path, events: Events) -> None:
    """A token of one use gives a certificate; the next one comes by the first, through the other node; streams stay."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        for node in ("b1", "b2"):
            await cluster.start_broker(node, authority=address(server))
        await cluster.start_gateway()
        once = token(cluster.secrets, networks=("127.1.0.0/24",), lifetime=6)
        cluster.vip.pinned = cluster.brokers["b1"].node.bound
        keys = without_certificate(tmp_path, once)
        agent = (await cluster.start_agent(**keys, redundancy=1)).agent
        await cluster.whole()
        target = Target(IP)
        with await cluster.socks(IP, target.port) as sock:
            assert says(sock) == b"127.1.0.1:still there"
            first = agent.identity
            cluster.vip.pinned = cluster.brokers["b2"].node.bound
            await cluster.until(lambda: agent.identity is not first)
            assert says(sock) == b"127.1.0.1:still there"
        assert [line["node"] for line in named(events, "agent_enrolled")] == ["b1", "b2"]
        assert first is not None and agent.identity is not None
        assert first.key.private_numbers() != agent.identity.key.private_numbers(), "a key served twice"
        assert load_pair(tmp_path / "identity" / "agent.pem", tmp_path / "identity" / "agent.key")[0] == (
            agent.identity.certificate
        )
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "identity").iterdir()}
        assert modes == dict.fromkeys(("agent.key", "agent.pem", "trust.list"), 0o600)
        assert (tmp_path / "identity").stat().st_mode & 0o777 == 0o700
