"""The trust list and the certificates of one broker node, which change while links stay.

In the relay's thread, except for files and the authority.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import trio
from structlog.typing import FilteringBoundLogger

from rtunnel.bridge import Bridge
from rtunnel.config import BrokerConfig
from rtunnel.errors import TrustError
from rtunnel.relay.relay import Relay
from rtunnel.trust.certificates import DAY, load_request, read_request
from rtunnel.trust.follower import TrustFollower
from rtunnel.trust.identity import TrustStore
from rtunnel.trust.tls import certificate_der, certificate_fingerprint, days_left, dial_server_context, server_context
from rtunnel.watch import Watched, watch
from rtunnel.wire.messages import Enrol
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_broker.notes import Notes
from rtunnel_broker.session import Session

_T = TypeVar("_T")

#: Requests for certificates that wait for the authority.
MAX_ENROLLING: Final = 64
#: Refused requests for certificates of one source: how many at once, and the seconds for each
#: further one. Each is a line in the authority's log.
REFUSED_AT_ONCE: Final = 20
REFUSED_SECONDS: Final = 0.5
#: Sources whose refused requests are remembered.
MAX_REFUSED: Final = 4096
#: Agents that are told of a new trust list at once, and the seconds until the next ones are.
TELLS_A_TURN: Final = 50
TELL_PAUSE: Final = 0.004
#: Seconds of one loop turn spent re-checking sessions after a trust change.
JUDGE_SECONDS: Final = 0.001


class TrustNode(Protocol):
    """The node, as its trust sees it."""

    node: str
    relay: Relay
    bridge: Bridge
    notes: Notes

    @property
    def sessions(self) -> dict[str, Session]:
        """The sessions in the registry, by owner."""


@dataclass(frozen=True)
class Shown:
    """TLS contexts of this broker, and the fingerprint of the certificate that they show."""

    context: ssl.SSLContext | None = None  # None: links are plain
    binding: bytes = b""
    dials: ssl.SSLContext | None = None  # of guarded ports; None: they are plain
    ends: float = 0.0  # of the certificate; 0: there is none
    clients: str = ""  # the CAs (PEM) from which links are asked for certificates


class BrokerTrust:
    """The CAs and revocations of one node, its own certificates, and the sessions that depend on
    them.
    """

    def __init__(self, node: TrustNode, broker: BrokerConfig, log: FilteringBoundLogger) -> None:
        """Load all files. Raises TrustError."""
        self._node = node
        self._config = broker
        self._log = log
        self._certified: set[Session] = set()  # sessions by certificate, from a good Hello on
        self._enrolling = 0
        self._refused: dict[str, float] = {}  # by source: when its refusals will be forgotten
        self.follower = self._make_follower() if broker.ca else None
        self._generation = self.trust_store.generation if self.trust_store is not None else 0
        self.presented = self._load()
        self._showing = trio.Lock()

    def _make_follower(self) -> TrustFollower:
        async def apply(call: Callable[[], object]) -> object:
            return await self._node.bridge.run(call)

        broker = self._config
        trust = Path(broker.trust) if broker.trust else None
        return TrustFollower(
            ca=Path(broker.ca), trust=trust, authority=broker.authority, log=self._log, apply=apply,
            changed=self.changed,
        )  # fmt: skip

    async def run(self) -> None:
        """Follow the authority and the files, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self.follower is not None:
                nursery.start_soon(self.follower.run)
            if "tls" in (self._config.security, self._config.dial_security):
                nursery.start_soon(self._watch_certificate)

    @property
    def trust_store(self) -> TrustStore | None:
        """The trust list that certificates are checked with; None: certificates are
        not accepted.
        """
        return self.follower.trust_store if self.follower is not None else None

    @property
    def dial_tls(self) -> ssl.SSLContext | None:
        """The TLS context of guarded ports; None: they are plain."""
        return self.presented.dials

    def is_revoked(self, key: str) -> bool:
        """Return whether the gateway's key of this id is revoked."""
        return self.trust_store is not None and f"gateway/{key}" in self.trust_store.revoked

    def _review(self) -> None:
        """End the pairs of gateways whose key is revoked."""
        self._node.relay.review()

    def add(self, session: Session) -> None:
        """Re-check this session, which is by certificate, at each trust change, until `discard`."""
        self._certified.add(session)

    def discard(self, session: Session) -> None:
        """Forget a session that has ended."""
        self._certified.discard(session)

    # Requests for certificates.

    def enrols(self, session: Session, request: Enrol) -> None:
        """Pass a request for a certificate on to the authority, or refuse it.

        In the relay's thread.
        """
        if self.follower is None or not self._config.authority:
            text = "this broker can't pass requests for certificates on (broker.authority)"
            session.refuse(Refusal.AUTHORITY_UNAVAILABLE, text)
        elif self._enrolling >= MAX_ENROLLING:
            session.refuse(Refusal.OVERLOADED, "too many requests for certificates are under way")
        elif self._refused_too_often(session.source):
            text = "requests for certificates from this address were refused too often: see the agents there"
            session.refuse(Refusal.RATE_LIMITED, text)
        else:
            self._enrolling += 1
            self._node.bridge.spawn(self._enrol, self.follower, session, request)

    def _refused_too_often(self, source: str) -> bool:
        waits = self._refused.get(source, 0.0) - self._node.relay.loop.now
        return bool(self._config.source_handshakes) and waits > REFUSED_SECONDS * (REFUSED_AT_ONCE - 1)

    def _count_refused(self, source: str) -> None:
        now = self._node.relay.loop.now
        if len(self._refused) >= MAX_REFUSED:
            self._refused = {other: until for other, until in self._refused.items() if until > now}
        if len(self._refused) < MAX_REFUSED or source in self._refused:
            self._refused[source] = max(now, self._refused.get(source, 0.0)) + REFUSED_SECONDS

    async def _enrol(self, follower: TrustFollower, session: Session, request: Enrol) -> None:
        """Ask the authority, and pass its answer on. The link's deadline goes on."""
        try:
            answer = await follower.enrol(request)
        except Refused as error:
            code, text = error.code, error.text
            self._note_refused(session, request, error)

            def refuse() -> None:
                if code is not Refusal.AUTHORITY_UNAVAILABLE:
                    self._count_refused(session.source)
                session.refuse(code, text)

            await self._node.bridge.run(lambda: self._enrolled(refuse))
        else:
            await self._node.bridge.run(lambda: self._enrolled(lambda: session.enrolled(answer)))

    def _note_refused(self, session: Session, request: Enrol, refused: Refused) -> None:
        """Note who was refused a certificate, as the request claims it."""
        try:
            who = read_request(load_request(request.request))
        except TrustError:
            return  # it names no agent
        self._node.notes.refused(
            refused.code, refused.text, namespace=who.namespace, agent_id=who.agent_id, addresses=who.addresses,
            peer=session.peer, proved=False,
        )  # fmt: skip

    def _enrolled(self, tell: Callable[[], None]) -> None:
        self._enrolling -= 1
        tell()

    # Changes.

    def changed(self) -> None:
        """Apply other CAs or revocations: re-check sessions and pairs, and tell agents.

        In the relay's thread.
        """
        trust_store = self.trust_store
        assert trust_store is not None
        self._judge(list(self._certified), trust_store)
        self._review()
        if trust_store.pem != self.presented.clients:
            self._node.bridge.spawn(self._show_other_cas)
        if trust_store.generation > self._generation:
            self._generation = trust_store.generation
            self._tell(list(self._node.sessions.values()), trust_store.signed)

    def _judge(self, sessions: list[Session], trust_store: TrustStore) -> None:
        """End the streams of all sessions that are no longer good first; then tell their agents,
        and end links.
        """
        void: list[tuple[Session, Refused]] = []

        def judge(session: Session) -> None:
            if fault := session.judge(trust_store):
                void.append((session, fault))

        def expel(entry: tuple[Session, Refused]) -> None:
            entry[0].expel(entry[1], trust_store.signed)

        self._in_slices(sessions, judge, lambda: self._in_slices(void, expel))

    def _in_slices(self, things: list[_T], call: Callable[[_T], None], then: Callable[[], None] | None = None) -> None:
        """Call for as many things as JUDGE_SECONDS allow, and for the others in later turns: there
        may be 50,000.
        """
        until = time.monotonic() + JUDGE_SECONDS
        try:
            while things and time.monotonic() < until:
                call(things.pop())
        finally:  # an exception of one call must not lose the others
            if things:
                self._node.relay.loop.soon(lambda: self._in_slices(things, call, then))
            elif then is not None:
                then()

    def _tell(self, sessions: list[Session], signed: bytes) -> None:
        for session in sessions[-TELLS_A_TURN:]:
            session.tell_trust(signed)
        del sessions[-TELLS_A_TURN:]
        if sessions:
            self._node.relay.loop.after(TELL_PAUSE, lambda: self._tell(sessions, signed))

    def _load(self) -> Shown:
        """Return what handshakes show, from the files. Raises TrustError."""
        broker = self._config
        clients = self.trust_store.pem if self.trust_store is not None else ""
        dials = dial_server_context(broker.certificate, broker.key) if broker.dial_security == "tls" else None
        if broker.security == "plain" and dials is None:
            return Shown(clients=clients)
        ends = time.time() + days_left(broker.certificate) * DAY
        if broker.security == "plain":
            return Shown(dials=dials, ends=ends, clients=clients)
        binding = certificate_fingerprint(certificate_der(broker.certificate))
        context = server_context(broker.certificate, broker.key, clients=clients)
        return Shown(context, binding, dials, ends, clients)

    async def _show(self) -> Shown:
        """Let the next links see the certificate in the files, and be asked for certificates of the
        CAs in force.

        Only one call at a time loads the files, so that the last one has the last change. Raises
        TrustError.
        """
        async with self._showing:
            shown = await trio.to_thread.run_sync(self._load)

            def put() -> None:
                self.presented = shown

            await self._node.bridge.run(put)
            return shown

    async def _show_other_cas(self) -> None:
        try:
            await self._show()
        except TrustError as error:
            # The files are watched: a good pair will come. Until then no agent of a removed CA
            # passes the Hello.
            self._log.error("certificate_rejected", node=self._node.node, reason=str(error))

    async def _put_certificate(self, _: Shown) -> dict[str, object]:
        shown = await self._show()
        return {"node": self._node.node, "fingerprint": shown.binding.hex()[:16]}

    async def _watch_certificate(self) -> None:
        paths = [Path(self._config.certificate), Path(self._config.key)]
        await watch([Watched("certificate", paths, self._load, self._put_certificate)], self._log)
