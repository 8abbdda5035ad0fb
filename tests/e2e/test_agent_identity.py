"""Who agents are: certificates on links, enrolment and renewal, revocation, admission, and what agents expose."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509

from rtunnel.clock import CHECK_CLOCK
from rtunnel.config import RegistryConfig
from rtunnel.errors import TrustError
from rtunnel.registry import connect
from rtunnel.relay.link import Handshake
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Relay
from rtunnel.roles import check
from rtunnel.trust import pki
from rtunnel.trust.identity import load_pair, load_private_key
from rtunnel.trust.keys import Token, load_token
from rtunnel.trust.tls import certificate_der, certificate_fingerprint, link_context
from rtunnel.wire import messages
from rtunnel.wire.control import BrokerState
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal
from rtunnel_agent.handshake import AgentSession, new_nonce
from rtunnel_agent.serve import status
from rtunnel_broker import trust
from rtunnel_broker.node import Node
from support.authority import address, authority, change, token
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.files import put
from support.logs import Events, named
from support.plumbing import free_port, free_ports, kept
from support.redis_server import RedisServer

IP = "127.1.0.1"
KEYS = {"pem": "certificate", "key": "key"}
#: A promise: what is revoked ends so soon.
REVOKED_WITHIN = 5.0


class Knock:
    """One try for a session by a peer that says what it likes; real code of an agent below."""

    def __init__(self, hello: Hello, context: Any, secret: bytes = b"") -> None:
        self.session = AgentSession(self, hello, secret, 5.0)  # type: ignore[arg-type]
        self.context = context
        self.relay = Relay(lambda event, fields: None, "knock")
        self.done = trio.Event()
        self.code: Refusal | None = None
        self.why = ""
        self.held: Any = None
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
                    self.relay.link(sock, self.session, Handshake(True, 5.0, self.context, "broker.rtunnel"), peer=""),
                )
            )
            with trio.fail_after(10):
                await self.done.wait()
        finally:
            await trio.to_thread.run_sync(self.relay.stop)
        return self

    def hold(self, link: Any) -> None:
        """The handshake is done, and not a word is said until `go_on`."""
        self.held = link

    def go_on(self) -> None:
        self.relay.call(lambda: AgentSession.link_up(self.session, self.held))

    def session_up(self, session: AgentSession) -> None:
        self._token.run_sync_soon(self.done.set)

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        self.code, self.why = code, str(lost)
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


def without_certificate(directory: Path, given: Token) -> dict[str, Any]:
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
        await cluster.until(lambda: len(named(events, "link_lost")) == 2)
        assert [line["reason"] for line in named(events, "link_lost")] == [
            f"handshake: certificate not accepted: certificate has expired ({CHECK_CLOCK})",
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
        assert "unknown ca" in named(events, "session_not_opened")[0]["reason"]


async def test_a_broker_learns_whose_certificate_it_has_rejected(tmp_path: Path, events: Events) -> None:
    """The agent complains without a certificate, and `unknown_target` repeats it, as a claim of nobody proved."""
    pki.init(tmp_path / "foreign")
    pki.issue_agent(tmp_path / "foreign", "a1", agent_id="a1", namespace="default", addresses=[IP])
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker()
        both = tmp_path / "both.pem"
        both.write_text((tmp_path / "foreign" / "ca.pem").read_text() + (cluster.secrets / "ca.pem").read_text())
        await cluster.start_agent(
            ca=str(both), certificate=str(tmp_path / "foreign" / "a1.pem"), key=str(tmp_path / "foreign" / "a1.key"),
            backoff_cap=0.05,
        )  # fmt: skip
        await cluster.until(lambda: bool(cluster.registry.history("default", IP).refusals))
        (claim,) = cluster.registry.history("default", IP).refusals
        assert (claim.agent_id, claim.cause, claim.proved) == ("a1", "bad_certificate", False)
        assert "the agent says that its certificate was rejected" in claim.text and "unknown ca" in claim.text
        await cluster.until(lambda: len(named(events, "link_lost")) > 5)
        assert len(named(events, "complaint_sent")) == 1
        assert not cluster.brokers["b1"].node.sessions


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


async def test_a_shared_token_displaces_no_certificate(tmp_path: Path) -> None:
    """Where a broker takes both the certified session stays, and the claim is refused; the reverse is a replacement."""
    async with running_cluster(tmp_path) as cluster:
        node = (await cluster.start_broker()).node
        known = load_token(cluster.secrets / "join.token")
        context = showing(cluster.secrets, "")
        assert (await Knock(hello(known.id), context, known.secret).at(node)).session.welcome is not None
        agent = (await cluster.start_agent(redundancy=1)).agent
        await cluster.until(lambda: agent.state == "ready")
        (session,) = node.sessions.values()
        told = await Knock(hello(known.id), context, known.secret).at(node)
        assert told.code is Refusal.ADDRESS_TAKEN
        assert "default/a1 has a session here by certificate" in told.why
        assert list(node.sessions.values()) == [session] and session.serves


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
        await cluster.until(lambda: len(named(events, "agent_enrolled")) == 2)
        assert [line["node"] for line in named(events, "agent_enrolled")] == ["b1", "b2"]
        assert first is not None and agent.identity is not None
        assert first.key.private_numbers() != agent.identity.key.private_numbers(), "a key served twice"
        assert load_pair(tmp_path / "identity" / "agent.pem", tmp_path / "identity" / "agent.key")[0] == (
            agent.identity.certificate
        )
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "identity").iterdir()}
        assert modes == dict.fromkeys(
            ("agent.key", "agent.pem", "host.secret", "lock", "token.id", "trust.list"), 0o600
        )
        assert (tmp_path / "identity").stat().st_mode & 0o777 == 0o700


async def test_without_the_authority_the_session_stays_until_the_end(tmp_path: Path, events: Events) -> None:
    """Renewals fail and say why; at the end of the certificate the session goes on, and a new one needs the token."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster:
        async with authority(cluster.secrets) as server:
            where = address(server)
            await cluster.start_broker("b1", authority=where)
            await cluster.start_gateway()
            many = token(cluster.secrets, networks=("127.1.0.0/24",), lifetime=4, uses=2)
            agent = (await cluster.start_agent(**without_certificate(tmp_path, many), redundancy=1)).agent
            await cluster.whole()
        target = Target(IP)
        with await cluster.socks(IP, target.port) as sock:
            await cluster.until(lambda: bool(named(events, "renewal_failed")))
            assert "authority_unavailable" in named(events, "renewal_failed")[0]["reason"]
            shown = status(agent)["identity"]
            assert isinstance(shown, dict) and "authority_unavailable" in shown["failure"]
            await cluster.until(lambda: bool(agent.credentials.missing))
            await cluster.until(lambda: bool(named(events, "certificate_expired")))
            assert named(events, "certificate_not_renewed")[0]["left"] in ("0 s", "1 s")
            assert "has expired" in agent.credentials.missing
            assert agent.state == "ready" and says(sock) == b"127.1.0.1:still there"
        (session,) = cluster.brokers["b1"].node.sessions.values()
        await cluster.brokers["b1"].in_relay(lambda: session.end("a test"))
        await cluster.until(lambda: agent.state == "down" and "has expired" in agent.reasons()[1])
        await cluster.until(lambda: bool(named(events, "complaint_sent")))
        async with authority(cluster.secrets, where):
            await cluster.until(lambda: agent.state == "ready")
        await cluster.until(lambda: len(named(events, "certificate_issued")) == 4)  # twice, each by authority and agent
        assert not agent.credentials.failure


async def test_an_agent_without_token_and_certificate_does_not_start(tmp_path: Path) -> None:
    """It could never get one: the fix is named."""
    async with running_cluster(tmp_path, agent__join_token="") as cluster:
        keys: dict[str, Any] = {"certificate": "", "key": "", "identity": str(tmp_path / "identity")}
        with pytest.raises(
            TrustError, match=r"no certificate yet, and agent.join_token is not given.*pki token create"
        ):
            await cluster.start_agent(**keys)


async def test_one_agent_has_an_identity(tmp_path: Path) -> None:
    """A second process on the directory would overwrite its keys: it ends. A look at the configuration is no agent."""
    async with running_cluster(tmp_path) as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker(authority=address(server))
        many = token(cluster.secrets, networks=("127.1.0.0/24",), uses=2)
        keys = without_certificate(tmp_path, many) | {"redundancy": 1}
        first = await cluster.start_agent(**keys)
        await cluster.until(lambda: first.agent.state == "ready")
        mine = [path.read_bytes() for path in sorted((tmp_path / "identity").iterdir())]
        check(first.agent._whole, "agent")
        with pytest.raises(TrustError, match=r"/identity: another agent that runs.* directory of its own"):
            await cluster.start_agent("a2", "127.1.0.2", **keys)
        assert [path.read_bytes() for path in sorted((tmp_path / "identity").iterdir())] == mine
        first.kill()
        await first.ended.wait()
        again = await cluster.start_agent(**keys)
        await cluster.until(lambda: again.agent.state == "ready")


async def test_a_token_that_is_used_up_is_told(tmp_path: Path, events: Events) -> None:
    """Two agents with a token of one use: the second one says why it has no certificate, and no broker hears of it."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        once = token(cluster.secrets, networks=("127.1.0.0/24",))
        await cluster.start_agent(**without_certificate(tmp_path, once), redundancy=1)
        await cluster.whole()
        keys = without_certificate(tmp_path, once) | {"identity": str(tmp_path / "second")}
        second = (await cluster.start_agent("a2", "127.1.0.2", **keys, redundancy=1)).agent
        await cluster.until(lambda: "used up" in second.reasons()[0])
        assert "bad_token" in named(events, "enrolment_failed")[0]["reason"]
        assert list(cluster.brokers["b1"].node.sessions) == ["default/a1"]
        await cluster.until(lambda: bool(cluster.registry.agent_history("default", "a2").refusals))
        [noted] = cluster.registry.agent_history("default", "a2").refusals
        assert (noted.cause, noted.addresses, noted.proved) == ("bad_token", ("127.1.0.2",), False)
        assert "used up" in noted.text


async def test_an_address_of_an_agent_that_is_away_is_kept_for_it(tmp_path: Path, events: Events) -> None:
    """While a1 is down another agent comes with its token and address: it hears whose that is, and a1 comes back."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        shared = token(cluster.secrets, networks=("127.1.0.0/24",), uses=9)
        keys = without_certificate(tmp_path, shared) | {"redundancy": 1}
        first = await cluster.start_agent(**keys)
        await cluster.whole()
        await first.shut()
        cluster.agents.clear()
        second = (await cluster.start_agent("a2", IP, **keys | {"identity": str(tmp_path / "second")})).agent
        await cluster.until(lambda: "address_taken" in second.reasons()[0])
        assert f"{IP} is certified for agent/default/a1 until 20" in second.reasons()[0]
        assert "--take-over" in named(events, "enrol_refused")[-1]["reason"]
        cluster.agents.clear()
        await cluster.start_agent(**keys)
        await cluster.whole()
        assert list(cluster.brokers["b1"].node.sessions) == ["default/a1"]


async def test_an_agent_proves_itself_when_it_comes_with_another_token(tmp_path: Path, events: Events) -> None:
    """One more address needs another token: the agent shows by its certificate that the agent_id is its own."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        first = await cluster.start_agent(
            **without_certificate(tmp_path, token(cluster.secrets, networks=("127.1.0.0/24",))), redundancy=1
        )
        await cluster.whole()
        await first.shut()
        other = without_certificate(tmp_path, token(cluster.secrets, networks=("127.1.0.0/24",)))
        await cluster.start_agent("a1", IP, "127.1.0.9", **other, redundancy=1)
        await cluster.whole()
        assert [line["code"] for line in named(events, "enrol_refused")] == [Refusal.AGENT_ID_TAKEN]
        stranger = without_certificate(tmp_path, token(cluster.secrets, networks=("127.1.0.0/24",)))
        stranger |= {"identity": str(tmp_path / "thief"), "redundancy": 1}
        thief = await cluster.start_agent("a1", IP, **stranger)
        await cluster.until(lambda: "agent_id_taken" in thief.agent.reasons()[0])


async def test_a_source_that_is_refused_again_and_again_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    """So the authority hears of a used-up token twice; elsewhere, where all agents are one source, each time."""
    monkeypatch.setattr(trust, "REFUSED_AT_ONCE", 2)
    monkeypatch.setattr(trust, "REFUSED_SECONDS", 60.0)
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        used = token(cluster.secrets, networks=("127.1.0.0/24",), uses=1)
        change(cluster.secrets, lambda opened: opened.store.use_token(used.id))
        agent = (await cluster.start_agent(**without_certificate(tmp_path, used), redundancy=1)).agent
        await cluster.until(lambda: "rate_limited: requests for certificates" in agent.credentials.failure)
        assert len(named(events, "enrol_refused")) == 2
        await cluster.start_broker("b2", authority=address(server), source_handshakes=0)
        cluster.vip.pinned = cluster.brokers["b2"].node.bound
        await cluster.until(lambda: len(named(events, "enrol_refused")) > 4)


async def test_an_exchange_that_ended_between_its_files_is_finished(tmp_path: Path) -> None:
    """The certificate is there, its key still waits beside it: the next start puts them together, without a request."""
    async with running_cluster(tmp_path, broker__join_token="", agent__join_token="") as cluster:
        await cluster.start_broker()
        await cluster.start_gateway()
        old, new = cluster.certify("a1", IP), cluster.certify("a1", IP)
        home = tmp_path / "identity"
        home.mkdir()
        for name, source in {"agent.key": f"{old}.key", "agent.pem": f"{new}.pem", "next.key": f"{new}.key"}.items():
            (home / name).write_bytes((cluster.secrets / source).read_bytes())
        await cluster.start_agent(certificate="", key="", identity=str(home), redundancy=1)
        await cluster.whole()
        assert sorted(path.name for path in home.iterdir()) == ["agent.key", "agent.pem", "host.secret", "lock"]
        assert (home / "agent.key").read_bytes() == (cluster.secrets / f"{new}.key").read_bytes()


# --- revocation and rotation --------------------------------------------------------------------------------


def revoke(secrets: Path, subject: str) -> None:
    with pki.open_directory(secrets) as opened, opened.change():
        opened.revoke(subject)


@pytest.mark.usefixtures("own_pace")
async def test_a_revoked_agent_is_out_within_seconds_also_without_redis(
    tmp_path: Path, make_redis: Callable[..., RedisServer], events: Events
) -> None:
    """Its sessions end, and its streams with them; other agents' stay; it can't come back."""
    server = make_redis().start()
    registry = connect(RegistryConfig(url=server.url, ttl=3.0, quarantine=5.0, timeout=0.5))
    try:
        async with running_cluster(tmp_path, registry) as cluster, authority(cluster.secrets) as one:
            for node in ("b1", "b2"):
                await cluster.start_broker(node, authority=address(one), trust=str(tmp_path / f"{node}.list"))
            await cluster.start_gateway()
            for number in (1, 2):
                await cluster.start_agent(f"a{number}", f"127.1.0.{number}")
            await cluster.whole()
            target, other = Target(IP), Target("127.1.0.2")
            with await cluster.socks(IP, target.port) as theirs, await cluster.socks("127.1.0.2", other.port) as ours:
                assert says(theirs) and says(ours)
                server.kill()
                await in_thread(lambda: revoke(cluster.secrets, "agent/default/a1"))
                with trio.fail_after(REVOKED_WITHIN):
                    assert await in_thread(lambda: ended(theirs))
                    agent = cluster.agents["a1"].agent
                    await cluster.until(lambda: agent.state == "down")
                assert says(ours) == b"127.1.0.2:still there"
            await cluster.until(lambda: len(named(events, "session_revoked")) == 2)
            lines = named(events, "session_revoked")
            assert sorted(line["node"] for line in lines) == ["b1", "b2"]
            assert sum(line["streams"] for line in lines) == 1
            await cluster.until(lambda: any("revoked" in reason for reason in agent.reasons()))
            assert cluster.agents["a2"].agent.state == "ready"
            assert {line["code"] for line in named(events, "session_refused")} <= {"revoked", "duplicate_node"}
            nodes = [part.node for part in cluster.brokers.values()]
            await cluster.until(lambda: sorted(node.counts.endings.get("revoked", 0) for node in nodes) == [0, 1])
            # A broker that starts without the authority has what it knew.
            await cluster.until((tmp_path / "b1.list").exists)
            server.start()
            late = (await cluster.start_broker("late", trust=str(tmp_path / "b1.list"))).node
            name = cluster.certify("a2", "127.1.0.2")
            told = await Knock(hello(agent_id="a2", addresses=["127.1.0.2"]), showing(cluster.secrets, name)).at(late)
            assert told.session.welcome is not None
            assert late.trust.trust_store is not None and "agent/default/a1" in late.trust.trust_store.revoked
    finally:
        registry.close()


def ended(sock: socket.socket) -> bool:
    """Wait for the end of a stream on which nobody speaks."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


async def test_a_rotation_cuts_no_stream(tmp_path: Path, events: Events) -> None:
    """Old CA, both, switched, new CA alone: links and streams stay through it all, and new ones come up at the end."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        for node in ("b1", "b2"):
            await cluster.start_broker(node, authority=address(server))
        await cluster.start_gateway()
        many = token(cluster.secrets, networks=("127.1.0.0/24",), lifetime=18)
        agent = (await cluster.start_agent(**without_certificate(tmp_path, many))).agent
        await cluster.whole()
        nodes = [part.node for part in cluster.brokers.values()]
        target = Target(IP)
        old = cluster.certify("a9", "127.1.0.9")
        with await cluster.socks(IP, target.port) as stream:
            for step in ("start_rotation", "switch_rotation"):
                before = agent.credentials.generation
                await in_thread(partial(rotate, cluster.secrets, step))
                await cluster.until(partial(lambda than: agent.credentials.generation > than, before))
                assert says(stream) == b"127.1.0.1:still there"
            await in_thread(lambda: replace_broker_certificate(cluster.secrets))
            fingerprint = certificate_fingerprint(certificate_der(cluster.secrets / "broker.pem"))
            await cluster.until(lambda: all(node.trust.presented.binding == fingerprint for node in nodes))
            await cluster.until(lambda: from_new_ca(cluster.secrets, agent.identity), patience=30.0)
            before = agent.credentials.generation
            await in_thread(lambda: rotate(cluster.secrets, "finish_rotation", force=True))  # a9 has the old one
            await cluster.until(lambda: agent.credentials.generation > before)
            assert says(stream) == b"127.1.0.1:still there"
            in_force = (cluster.secrets / "ca.pem").read_text()
            await cluster.until(
                lambda: all(
                    node.trust.trust_store is not None and node.trust.trust_store.pem == in_force for node in nodes
                )
            )
            await other_sessions(cluster)
        assert not named(events, "session_revoked") and not named(events, "identity_rejected")
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"
        claim = hello(agent_id="a9", addresses=["127.1.0.9"])
        told = await Knock(claim, showing(cluster.secrets, old)).at(nodes[0])
        assert "unknown ca" in told.why


async def test_a_rotation_by_files_alone_cuts_no_stream(tmp_path: Path, events: Events) -> None:
    """No authority: CA files, certificates and keys are replaced by hand, under brokers and agents that run."""
    old, new = tmp_path / "pki", tmp_path / "new"
    pki.init(new)
    async with running_cluster(tmp_path, broker__join_token="") as cluster:
        first, second = (path.joinpath("ca.pem").read_text() for path in (old, new))
        pki.issue_agent(old, "mine", agent_id="a1", namespace="default", addresses=[IP])
        pki.issue_agent(new, "mine", agent_id="a1", namespace="default", addresses=[IP])
        keys: dict[str, Any] = {"certificate": str(old / "mine.pem"), "key": str(old / "mine.key")}
        await cluster.start_broker()
        await cluster.start_gateway()
        agent = (await cluster.start_agent(**keys, redundancy=1)).agent
        await cluster.whole()
        node, target = cluster.brokers["b1"].node, Target(IP)
        with await cluster.socks(IP, target.port) as stream:
            put(old / "ca.pem", first + second)
            await cluster.until(lambda: len(named(events, "ca_loaded")) == 3)  # broker, gateway and agent
            for name in ("broker", "mine"):
                for kind in ("pem", "key"):
                    put(old / f"{name}.{kind}", (new / f"{name}.{kind}").read_bytes())
            await cluster.until(lambda: len(named(events, "certificate_loaded")) == 2)
            put(old / "ca.pem", second)
            await cluster.until(lambda: len(named(events, "ca_loaded")) == 6)
            assert says(stream) == b"127.1.0.1:still there"
        await other_sessions(cluster)
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"
        (session,) = node.sessions.values()
        assert agent.identity is not None and session.link is not None
        assert session.link.peer_certificate == agent.identity.certificate == certificate_der(new / "mine.pem")


async def test_who_has_only_the_old_ca_is_out_when_it_leaves(tmp_path: Path, events: Events) -> None:
    """`rotate finish --force`: who did not renew loses session and streams, and is told why; others lose none."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        node = (await cluster.start_broker(authority=address(server))).node
        gateway = (await cluster.start_gateway(authority=address(server))).gateway
        late = (await cluster.start_agent("a2", "127.1.0.2", redundancy=1)).agent
        renews = (await cluster.start_agent(redundancy=1)).agent
        await cluster.whole()
        target, other = Target(IP), Target("127.1.0.2")
        with await cluster.socks(IP, target.port) as stays, await cluster.socks("127.1.0.2", other.port) as ends:
            assert says(stays) and says(ends)
            for step in ("start_rotation", "switch_rotation"):
                await in_thread(partial(rotate, cluster.secrets, step))
            # Who saw the file only before and after would take it for a replacement by hand.
            both = (node.trust.trust_store, gateway.trust.store)
            await cluster.until(
                lambda: all(trust_store.pem.count("BEGIN CERT") == 2 for trust_store in both if trust_store is not None)
            )
            await cluster.until(lambda: "a1" in [line.get("agent") for line in named(events, "ca_loaded")])
            name = cluster.certify("a1", IP)  # from the new CA
            for kind in ("pem", "key"):
                (cluster.secrets / f"{name}.{kind}").replace(Path(getattr(renews.config, KEYS[kind])))
            await cluster.until(lambda: from_new_ca(cluster.secrets, renews.identity))
            await in_thread(lambda: replace_broker_certificate(cluster.secrets))
            assert says(ends) == b"127.1.0.2:still there", "it ends when the CA leaves, and not before"
            await in_thread(lambda: rotate(cluster.secrets, "finish_rotation", force=True))
            with trio.fail_after(REVOKED_WITHIN):
                assert await in_thread(lambda: ended(ends))
                await cluster.until(lambda: late.state == "down")
            assert says(stays) == b"127.1.0.1:still there"
        (line,) = named(events, "session_revoked")
        assert (line["agent"], line["code"], line["streams"]) == ("a2", "bad_certificate", 1)
        assert "agent/default/a2 is not from a CA in force any more" in line["reason"]
        await cluster.until(lambda: "not from a CA in force" in late.reasons()[0])
        await cluster.until(lambda: list(node.sessions) == ["default/a1"])
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"


@pytest.mark.parametrize("stolen", [True, False])
async def test_a_gateway_ends_what_a_stolen_ca_has_proved(tmp_path: Path, events: Events, stolen: bool) -> None:
    """Also where the broker has not heard of it. A CA that left without `--stolen` may have proved a stream rightly."""
    async with running_cluster(tmp_path) as cluster, authority(cluster.secrets) as server:
        before = str(shutil.copy(cluster.secrets / "ca.pem", tmp_path))
        await cluster.start_broker(ca=before)
        gateway = (await cluster.start_gateway(ca=before, authority=address(server))).gateway
        await cluster.start_agent(redundancy=1, ca=before)
        await cluster.whole()
        target = Target(IP)
        with await cluster.socks(IP, target.port) as stream:
            assert says(stream)
            for step in ("start_rotation", "switch_rotation"):
                await in_thread(partial(rotate, cluster.secrets, step))
            await in_thread(lambda: rotate(cluster.secrets, "finish_rotation", force=True))
            in_force = (cluster.secrets / "ca.pem").read_text()
            await cluster.until(lambda: gateway.trust.store is not None and gateway.trust.store.pem == in_force)
            assert says(stream) == b"127.1.0.1:still there"
            if stolen:  # somebody finds out later
                await in_thread(lambda: rotate(cluster.secrets, "finish_rotation", stolen=True))
                with trio.fail_after(REVOKED_WITHIN):
                    assert await in_thread(lambda: ended(stream))
                assert [line["reason"] for line in named(events, "stream_ended")] == ["revoked"]
        with pytest.raises(SocksRefused):
            await cluster.ask(IP, target.port)


@pytest.mark.parametrize("whose", ["another agent's", "a key that it is not for", "fewer addresses"])
async def test_a_session_goes_over_to_its_agents_certificate_only(tmp_path: Path, whose: str) -> None:
    """An Update with a certificate of somebody else, without its key, or for less than the session has."""
    async with running_cluster(tmp_path) as cluster:
        node = (await cluster.start_broker()).node
        part = await cluster.start_agent("a1", IP, "127.1.0.5", redundancy=1)
        agent = part.agent
        await cluster.until(lambda: agent.state == "ready")
        (before,) = node.sessions.values()
        session = agent.slots[0].session
        assert session is not None
        id_ = "a2" if whose == "another agent's" else "a1"
        both = () if whose == "fewer addresses" else ("127.1.0.5",)
        name, spare = cluster.certify(id_, IP, *both), cluster.certify(id_, IP, *both)
        der, key, _ = load_pair(cluster.secrets / f"{name}.pem", cluster.secrets / f"{name}.key")
        if whose == "a key that it is not for":
            key = load_private_key(cluster.secrets / f"{spare}.key")
        await part.in_relay(lambda: session.go_over(["1-65535"], der, key))
        await cluster.until(lambda: before.state is BrokerState.CLOSED)
        assert "bad_certificate" in str(before.lost_by)


async def other_sessions(cluster: Cluster) -> None:
    """Every link ends, and another one takes its place."""
    old = {slot.session for part in cluster.agents.values() for slot in part.agent.slots}
    for part in cluster.brokers.values():
        for session in list(part.node.sessions.values()):
            await part.in_relay(partial(session.end, "a test"))
    slots = [slot for part in cluster.agents.values() for slot in part.agent.slots]
    await cluster.until(lambda: all(slot.session is not None and slot.session not in old for slot in slots))
    await cluster.whole()


def rotate(secrets: Path, step: str, **options: Any) -> None:
    with pki.open_directory(secrets) as opened, opened.change():
        getattr(opened, step)(**options)


def replace_broker_certificate(secrets: Path) -> None:
    pki.issue_broker(secrets, "newer")
    for name in ("pem", "key"):
        (secrets / f"newer.{name}").replace(secrets / f"broker.{name}")


def from_new_ca(secrets: Path, identity: Any) -> bool:
    certificate = x509.load_der_x509_certificate(identity.certificate)
    with pki.open_directory(secrets) as opened:
        return certificate.issuer == opened.issuing.certificate.subject


async def test_a_token_is_proved_on_the_certificate_of_the_handshake(tmp_path: Path) -> None:
    """The broker's files change: the link that is up has the old certificate in its proof, later ones the new one."""
    async with running_cluster(tmp_path) as cluster:
        node = (await cluster.start_broker()).node
        known = load_token(cluster.secrets / "join.token")
        slow = Knock(hello(known.id), showing(cluster.secrets, ""), known.secret)
        held = node.trust.presented.binding
        slow.session.link_up = lambda link: slow.hold(link)  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.at, node)
            await cluster.until(lambda: slow.held is not None)
            await in_thread(lambda: replace_broker_certificate(cluster.secrets))
            await cluster.until(lambda: node.trust.presented.binding != held)
            slow.go_on()
        assert slow.session.welcome is not None, slow.why
        later = await Knock(hello(known.id, agent_id="a2"), showing(cluster.secrets, ""), known.secret).at(node)
        assert later.session.welcome is not None


async def test_a_trust_list_that_nobody_asked_for_harms_no_agent(tmp_path: Path, events: Events) -> None:
    """Noise from a broker, also to an agent that knows no CAs: the session goes on."""
    for security in ("tls", "plain"):
        keys: dict[str, Any] = {"broker__security": security, "agent__security": security}
        async with running_cluster(tmp_path, **keys) as cluster:
            await cluster.start(brokers=1)
            (session,) = cluster.brokers["b1"].node.sessions.values()
            await cluster.brokers["b1"].in_relay(partial(session.tell_trust, b"noise"))
            target = Target(IP)
            await cluster.until(lambda: bool(named(events, "trust_rejected")))
            assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"
            assert cluster.agents["a1"].agent.state == "ready"
    assert len(named(events, "trust_rejected")) == 1


async def test_bad_files_change_nothing(tmp_path: Path, events: Events) -> None:
    """A key that is not the certificate's, a CA file of noise: told, and links come up as before."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        node = cluster.brokers["b1"].node
        before = node.trust.presented
        put(cluster.secrets / "broker.key", (cluster.secrets / "ca.key").read_bytes())
        put(cluster.secrets / "ca.pem", "noise")
        await cluster.until(lambda: len(named(events, "ca_rejected")) == 3)  # broker, gateway and agent
        await cluster.until(lambda: bool(named(events, "certificate_rejected")))
        assert "is not the key of the certificate" in named(events, "certificate_rejected")[0]["reason"]
        assert node.trust.presented is before
        await other_sessions(cluster)


# --- what may register --------------------------------------------------------------------------------------


async def test_the_first_rule_that_fits_admits(tmp_path: Path) -> None:
    """By namespace and networks; an agent that no rule is for is refused, and told so."""
    rules = [
        {"networks": ["127.1.0.8/32"], "streams": 1},
        {"namespaces": ["blue"]},
        {"networks": ["127.1.0.0/29", "127.2.0.0/16"]},
    ]
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker(admit=rules)
        await cluster.start_gateway()
        await cluster.start_agent("a1", IP, "127.2.3.4", redundancy=1)
        await cluster.start_agent("a2", "127.9.0.1", redundancy=1, namespace="blue")
        await cluster.start_agent("a3", "127.1.0.8", redundancy=1)
        await cluster.whole()
        numbers = {s.hello.agent_id: s.rule.number for s in cluster.brokers["b1"].node.sessions.values() if s.hello}
        assert numbers == {"a1": 3, "a2": 2, "a3": 1}
        odd = (await cluster.start_agent("odd", "127.1.0.2", "127.3.0.1", redundancy=1)).agent
        await cluster.until(lambda: "no rule of broker.admit is for default/odd" in odd.reasons()[0])


async def test_a_rule_says_which_ports_may_be_published(tmp_path: Path, events: Events) -> None:
    """A fixed port outside of the rule is a notice, a random one comes from inside; without any, none is granted."""
    ports = free_ports(10)
    rules: list[dict[str, object]] = [
        {"networks": [f"{IP}/32"], "open_ports": [ports[1], f"{ports[3]}-{ports[4]}"]},
        {"networks": ["127.1.0.2/32"]},
    ]
    keys: dict[str, Any] = {
        "open_ports__range": f"{ports[0]}-{ports[-1]}",
        "open_ports__allow": ["127.0.0.0/8"],
    }
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker(admit=rules, **keys)
        await cluster.start_gateway()
        wanted = [f"{IP}:81@{ports[1]}", f"{IP}:82@{ports[2]}", f"{IP}:83", f"{IP}:84", f"{IP}:85"]
        first = (await cluster.start_agent(publish=",".join(wanted), redundancy=1)).agent
        second = (await cluster.start_agent("a2", "127.1.0.2", publish="127.1.0.2:81", redundancy=1)).agent
        await cluster.whole()
        granted = {p.target_port: p.port for p in welcome_of(first).open_ports}
        assert granted.pop(81) == ports[1]
        assert set(granted.values()) == {ports[3], ports[4]} and 82 not in granted
        notices = " ".join(welcome_of(first).notices)
        assert f"rule 1 of broker.admit does not allow port {ports[2]}" in notices and "is free: " in notices
        (notice,) = welcome_of(second).notices
        assert not welcome_of(second).open_ports and "rule 2 of broker.admit does not allow any open port" in notice


def welcome_of(agent: Any) -> Any:
    (slot,) = agent.slots
    assert slot.session is not None and slot.session.welcome is not None
    return slot.session.welcome


async def test_an_agent_has_so_many_streams_on_a_node(tmp_path: Path) -> None:
    """The limit holds for each node, is told truthfully, and there is room again when a stream ends."""
    async with running_cluster(tmp_path) as cluster:
        for node in ("b1", "b2"):
            await cluster.start_broker(node, admit=[{"streams": 2}])
        await cluster.start_gateway()
        await cluster.start_agent()
        await cluster.whole()
        target = Target(IP)
        open_ones = [await cluster.socks(IP, target.port) for _ in range(4)]
        with pytest.raises(SocksRefused):
            await cluster.socks(IP, target.port)
        refused = [part.node.counts.refused.get("too_many_streams", 0) for part in cluster.brokers.values()]
        assert refused == [1, 1]  # the second node was asked as well
        assert all(says(sock) == b"127.1.0.1:still there" for sock in open_ones)
        answer = await cluster.http(f"CONNECT {IP}:{target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 429") and b"limit" in answer, answer
        open_ones.pop().close()
        await cluster.until(lambda: sum(p.node.counts.streams for p in cluster.brokers.values()) == 3)
        assert await cluster.ask(IP, target.port) == b"127.1.0.1:hello"


async def test_one_source_does_not_take_all_handshakes(tmp_path: Path, events: Events) -> None:
    """Its share is full of silent links: more of its own are turned away, an agent from elsewhere gets in at once."""
    async with running_cluster(tmp_path, broker__handshake_timeout=60.0, broker__max_handshakes=8) as cluster:
        node = (await cluster.start_broker(source_handshakes=5)).node
        silent = [await in_thread(lambda: knock_from("127.66.0.9", node)) for _ in range(5)]
        await cluster.until(lambda: node.links.handshakes == 5)
        late = await in_thread(lambda: knock_from("127.66.0.9", node))
        assert await in_thread(lambda: ended(late))
        assert [line["limit"] for line in named(events, "source_handshake_limit_reached")] == [5]
        name = cluster.certify("a1", IP)
        assert (await Knock(hello(), showing(cluster.secrets, name)).at(node)).session.welcome is not None
        for sock in silent:
            sock.close()
        await cluster.until(lambda: node.links.handshakes == 0)


def knock_from(source: str, node: Node) -> socket.socket:
    return kept(socket.create_connection(node.bound, timeout=10.0, source_address=(source, 0)))


# --- what an agent exposes ----------------------------------------------------------------------------------


@pytest.fixture
def agent_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the agent's file, whole at once."""

    def write(exposes: list[str], more: str = "") -> Path:
        fresh, path = tmp_path / "agent.new", tmp_path / "agent.toml"
        fresh.write_text(f"[agent]\nexposes = {exposes}\n{more}\n")
        return fresh.replace(path)

    return write


async def test_ports_are_exposed_and_hidden_while_the_agent_runs(
    tmp_path: Path, agent_file: Callable[..., Path], events: Events
) -> None:
    """The file changes: new ports are reached, streams to hidden ones end and others stay, brokers are told."""
    one, two = Target(IP), Target(IP)
    path = agent_file([str(one.port)])
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker()
        await cluster.start_gateway()
        agent = (await cluster.start_agent(file=path, redundancy=1)).agent
        await cluster.whole()
        with pytest.raises(SocksRefused):
            await cluster.socks(IP, two.port)
        with await cluster.socks(IP, one.port) as first:
            agent_file([str(one.port), str(two.port)], "target_timeout = 3")
            await cluster.until(lambda: agent.config.exposes == [str(one.port), str(two.port)])
            with await cluster.socks(IP, two.port) as second:
                agent_file([str(two.port)])
                assert await in_thread(lambda: ended(first))
                assert says(second) == b"127.1.0.1:still there"
        with pytest.raises(SocksRefused):
            await cluster.socks(IP, one.port)
        (session,) = cluster.brokers["b1"].node.sessions.values()
        await cluster.until(lambda: session.exposes == (str(two.port),))
        await cluster.until(
            lambda: (
                [t.exposes for t in cluster.registry.with_exposes(cluster.registry.lookup("default", IP))]
                == [str(two.port)]
            )
        )
        await cluster.until(lambda: agent.targets.counts.endings["not_allowed"] == 1)
        await cluster.until(lambda: len(named(events, "config_loaded")) == 2)
        loaded = named(events, "config_loaded")
        assert loaded[0]["needs_restart"] == ["agent.target_timeout"]
        assert loaded[1]["streams_ended"] == 1


async def test_a_bad_file_changes_nothing_and_says_so(
    tmp_path: Path, agent_file: Callable[..., Path], events: Events
) -> None:
    target = Target(IP)
    path = agent_file([str(target.port)])
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker()
        await cluster.start_gateway()
        agent = (await cluster.start_agent(file=path, redundancy=1)).agent
        await cluster.whole()
        with await cluster.socks(IP, target.port) as stream:
            agent_file(["70000"])
            await cluster.until(lambda: bool(named(events, "config_rejected")))
            assert "'70000' is not a port" in named(events, "config_rejected")[0]["reason"]
            assert says(stream) == b"127.1.0.1:still there"
        assert agent.config.exposes == [str(target.port)]


async def test_a_port_on_loopback_is_reached_there(tmp_path: Path) -> None:
    """`loopback:` leads to 127.0.0.1, where the service is; the same port at the agent's address is not tried."""
    inside = Target("127.0.0.1", free_port())
    outside = Target(IP, inside.port)
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker()
        await cluster.start_gateway()
        await cluster.start_agent(exposes=[f"loopback:{inside.port}"], redundancy=1)
        await cluster.whole()
        assert await cluster.ask(IP, outside.port) == b"127.0.0.1:hello"
        (session,) = cluster.brokers["b1"].node.sessions.values()
        assert session.exposes == (str(inside.port),)


async def test_a_revoked_agent_comes_back_with_another_token(tmp_path: Path, events: Events) -> None:
    """Not by itself; the new token is read from its file, and the certificate is for another key."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_gateway()
        networks = ("127.1.0.0/24",)
        keys = without_certificate(tmp_path, token(cluster.secrets, networks=networks, uses=9))
        agent = (await cluster.start_agent(**keys, redundancy=1)).agent
        await cluster.whole()
        first = agent.identity
        await in_thread(lambda: revoke(cluster.secrets, "agent/default/a1"))
        await cluster.until(lambda: any("another token" in reason for reason in agent.reasons()))
        assert agent.identity is first
        put(Path(keys["join_token"]), token(cluster.secrets, networks=networks).line())
        await cluster.until(lambda: agent.state == "ready")
        assert agent.identity is not first
        assert [line["id"] for line in named(events, "join_token_loaded")]


async def test_a_plain_link_can_enrol(tmp_path: Path) -> None:
    """The session is proved by a token that broker and authority know; the certificate is for proofs."""
    keys: dict[str, Any] = {"broker__security": "plain", "agent__security": "plain"}
    async with running_cluster(tmp_path, **keys) as cluster, authority(cluster.secrets) as server:
        given = token(cluster.secrets, networks=("127.1.0.0/24",))
        (tmp_path / "shared").write_text(given.line())
        await cluster.start_broker("b1", authority=address(server), join_token=str(tmp_path / "shared"))
        await cluster.start_gateway()
        agent = (await cluster.start_agent(**without_certificate(tmp_path, given), redundancy=1)).agent
        await cluster.whole()
        await cluster.until(lambda: agent.identity is not None)
        assert agent.identity is not None and agent.identity.who.subject == "agent/default/a1"
        (session,) = cluster.brokers["b1"].node.sessions.values()
        assert session.identity is None
