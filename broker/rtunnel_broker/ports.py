"""The data plane of a broker's ports: guarded ports, which need a valid Dial, and open ports.

A connection to a guarded port sends a Dial, which is checked and passed on to the agent on a new
stream. A connection to an open port goes to the port's one target; the broker itself sends the Dial
for it. All of it runs in the relay's thread.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from rtunnel import __version__
from rtunnel.clock import ClockWatch
from rtunnel.config import format_endpoint
from rtunnel.counts import StreamCounts, StreamPermit
from rtunnel.net import resending, source_of
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.link import Link
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.tls import TlsEnd
from rtunnel.strangers import Loss, Strangers, made_room
from rtunnel.trust.keys import DialKeys, NonceWindow
from rtunnel.wire import messages
from rtunnel.wire.dial import DialAccepted, DialReceiver, DialRefused, DialSender
from rtunnel.wire.messages import Dial, DialBody, Hop, MessageError, Refuse, encode
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_broker.session import Session

_OVERLOADED: Final = encode(
    Refuse(code=Refusal.OVERLOADED.value, text="too many connections to this broker's ports wait for their Dial")
)

_TLS_ONLY: Final = encode(
    Refuse(
        code=Refusal.PROTOCOL_ERROR.value,
        text="this broker takes Dials over TLS only: gateway.dial_security must be tls",
    )
)
#: How a TLS handshake begins (RFC 8446 section 5.1).
_TLS: Final = b"\x16\x03"

#: Seconds for the agent's answer to a Dial of an open port. An agent answers within
#: `agent.target_timeout` (10 s).
OPEN_DEADLINE: Final = 30.0
#: Seconds after which a connection to a guarded port without a byte is reset. A gateway sends its
#: Dial at once; a lost segment is sent again after one second, and after two more.
FIRST_BYTES: Final = 3.0

#: In a report for a trace: more than one packet of 1500 bytes. A network that loses such packets
#: loses the report, and not the stream's first bytes.
_PADDING: Final = bytes(2048)

Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


@lru_cache(maxsize=4096)
def _address_of(peer: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return a client's address, IPv4-mapped ones as IPv4. Cached, because parsing takes 5 us."""
    address = ipaddress.ip_address(peer)
    return getattr(address, "ipv4_mapped", None) or address


class PortCounts(StreamCounts):
    """The counts of a broker's ports since its start, and the connections that wait there."""

    def __init__(self, most: int) -> None:
        """Let up to `most` connections wait for their Dial, and as many for their agent's answer.

        One source may have half of the first places. One agent may have a quarter of the others, so
        that the open ports of other agents work while all its targets are silent.
        """
        super().__init__()
        # connections to guarded ports that ended before their Dial, by Loss
        self.lost: Counter[str] = Counter()
        # A silent connection gets no grace period: it is accepted only after a second
        # (TCP_DEFER_ACCEPT), and others are read in the turn that accepts them.
        self.dials: Strangers[GuardedConnection] = Strangers(
            most, max(1, most // 2), lambda connection: connection.is_silent, silent_grace=0.0
        )
        self.answers: Strangers[OpenConnection] = Strangers(most, max(1, most // 4), lambda _: False)

    @property
    def waiting(self) -> int:
        """The number of connections whose Dial, or whose agent's answer, has not come yet."""
        return len(self.dials) + len(self.answers)


class DialChecker:
    """Checks Dials before they are passed on to an agent (docs/wire.md, "Dial")."""

    def __init__(
        self, node: str, keys: DialKeys, window: float, is_revoked: Callable[[str], bool], clock: ClockWatch
    ) -> None:
        """Check Dials for `node`. `window`: the seconds that a Dial may differ from this clock.

        `is_revoked` gets the id of a gateway's key; `clock` hears of gateways whose clock differs.
        """
        self.node = node
        self._keys = keys
        self._window = window
        self.is_revoked = is_revoked
        self._clock = clock
        self._nonces = NonceWindow(2 * window)

    def verify(self, dial: Dial) -> None:
        """Raise Refused unless the MAC is by a gateway's key that is in force."""
        if not self._keys.verify(dial.key, dial.body, dial.mac):
            text = f"the Dial's MAC is not by the gateway's key {dial.key!r}: is that from this cluster's key?"
            raise Refused(Refusal.BAD_MAC, text)
        if self.is_revoked(dial.key):
            raise Refused(Refusal.REVOKED, f"the gateway's key {dial.key} is revoked")

    def check(self, body: DialBody, session: Session, key: str) -> None:
        """Raise Refused unless the Dial, by the key of this id, is fresh and for this session."""
        age = time.time() - body.time / 1000
        if abs(age) > self._window:
            self._clock.differs(f"gateway {key}", age, time.monotonic())
            off = f"{age:.1f} s old" if age > 0 else f"{-age:.1f} s ahead"
            raise Refused(Refusal.EXPIRED, f"the Dial is {off} by this broker's clock: check both clocks")
        if self._clock.suspicious:
            self._clock.agrees(f"gateway {key}", time.monotonic())
        if body.node != self.node:
            raise Refused(Refusal.STALE_NODE, f"this is {self.node}, the Dial is for {body.node}")
        hello = session.hello
        if hello is None or not session.serves or not _takes_streams(session.link):
            raise Refused(Refusal.LINK_LOST)
        if body.namespace != hello.namespace or body.ip not in session.addresses:
            raise Refused(Refusal.STALE_TARGET, f"this port is not leased to {body.namespace}/{body.ip}")
        if body.epoch != session.epoch:
            raise Refused(Refusal.STALE_EPOCH, f"this port's session has epoch {session.epoch}, not {body.epoch}")
        if not self._nonces.fresh(body.nonce, time.monotonic()):
            raise Refused(Refusal.REPLAYED)


@dataclass(slots=True)
class Guarded:
    """The owner of a pair that a gateway's Dial has made."""

    port: GuardedPort
    permit: StreamPermit
    key: str  # the id of the gateway's key
    body: DialBody

    def review(self) -> Ending | None:
        """Check that the gateway's key is not revoked."""
        return Ending.REVOKED if self.port.checker.is_revoked(self.key) else None

    def ended(self, account: Account) -> None:
        self.permit.release(account)
        log, body = self.port.session.keeper.log, self.body
        if log.debugging:
            log.trace(
                "stream_relayed", reason=str(account.ending), who=body.who,
                target=format_endpoint(body.ip, body.port), bytes_up=account.up, bytes_down=account.down,
                seconds=round(account.seconds, 3),
            )  # fmt: skip


class GuardedConnection:
    """The handler of one connection to a guarded port, until its Dial is passed on."""

    __slots__ = ("_dial", "_end", "_heard", "_peer", "_place", "_port")

    def __init__(self, port: GuardedPort, end: SocketEnd, source: str) -> None:
        self._port = port
        self._end = end
        self._dial = DialReceiver(port.checker.verify)
        self._heard = False
        self._place = port.counts.dials.enter(source, self, end.loop.now)
        self._peer = end.peer

    @property
    def is_silent(self) -> bool:
        """Whether the peer has sent no byte yet, neither of TLS nor of a Dial."""
        return not (self._heard or (isinstance(self._end, TlsEnd) and self._end.tls.handshake_bytes))

    def expel(self, lost: Lost) -> None:
        """Reset the connection, to make room for another one."""
        self._end.abort()
        self.lost(lost)

    def received(self, data: bytes) -> None:
        port = self._port
        self._heard = True
        try:
            for event in self._dial.receive(data):
                key, body = event.dial.key, event.body
                if body.trace:
                    self._end.write(self._dial.hop(port.hop()))
                port.checker.check(body, port.session, key)
                if full := port.session.full:
                    raise full
                if port.session.link is not None and self._dial.forward_size > port.session.link.start_window:
                    # It would overrun the stream's window, and the agent would end its link with
                    # all streams for it.
                    raise Refused(Refusal.PROTOCOL_ERROR, "too many bytes behind the Dial, before its answer")
                self._place.release()
                port.pass_on(self._end, self._dial.forward(), key, body)
        except MessageError as error:
            text = "a TLS handshake came, and broker.dial_security is plain" if data.startswith(_TLS) else str(error)
            self._refuse(Refused(Refusal.PROTOCOL_ERROR, text))
        except Refused as error:
            self._refuse(error)

    def finished(self) -> None:
        self._refuse(Refused(Refusal.PROTOCOL_ERROR, "the connection ended before a whole Dial"))

    def lost(self, lost: Lost) -> None:
        self._place.release()
        loss = Loss.of(lost.kind, silent=self.is_silent)
        self._port.counts.lost[loss.value] += 1
        if loss is not Loss.PROBE:
            fix = {"hint": "gateway.dial_security must be tls"} if lost.kind is LostKind.NOT_TLS else {}
            self._port.session.keeper.log.stranger(
                "dial_lost", loss.value, reason=str(lost), peer=self._peer, port=self._port.number, **fix
            )

    def _refuse(self, refused: Refused) -> None:
        self._place.release()
        self._port.refused(self._end.peer, refused, self._dial.body)
        self._end.write(self._dial.refuse(refused, time=int(time.time() * 1000)))
        self._end.close()


@dataclass(eq=False)
class GuardedPort:
    """The guarded port of one session. `timeout`: seconds for a connection's Dial."""

    relay: Relay
    session: Session
    number: int
    checker: DialChecker
    counts: PortCounts
    timeout: float

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Take a connection from this IP. When all places are taken, the weakest one is reset."""
        tls, dials = self.session.keeper.trust.dial_tls, self.counts.dials
        source = source_of(peer)
        if not dials.has_room(source):
            weakest = dials.weakest(source, self.relay.loop.now)
            if weakest is None:
                self._turn_away(sock, plain=tls is None)
                return
            weakest.expel(made_room("too many say no Dial"))
        end = self.relay.end(sock, peer, spoken=True)
        if tls is not None:
            end = self.relay.secure(end, tls, alpn=messages.DIAL_ALPN, otherwise=_TLS_ONLY)
        end.set_handler(GuardedConnection(self, end, source), self.timeout)

    def _turn_away(self, sock: socket.socket, *, plain: bool) -> None:
        """Close a connection for which there is no place, without lingering: too many are open."""
        self.counts.refuse(Refusal.OVERLOADED)
        try:
            if plain:
                sock.send(_OVERLOADED)
        except OSError:
            pass
        sock.close()

    def pass_on(self, end: SocketEnd, first: bytes, key: str, body: DialBody) -> None:
        """Open a stream that begins with `first` (the Dial, and what came behind it), and join it
        with `end`.

        `key`: the id of the gateway's key; `body`: the Dial's.
        """
        link = self.session.link
        assert link is not None
        end.pause()
        stream = StreamEnd(link)
        link.attach(stream)
        stream.write(first)
        permit = StreamPermit(self.counts, self.session)
        self.relay.join(end, stream, owner=Guarded(self, permit, key, body))

    def hop(self) -> Hop:
        """Return what the broker sees of a Dial to this port, for a trace."""
        session = self.session
        link, hello = session.link, session.hello
        node, now = self.checker.node, int(time.time() * 1000)
        sessions, silent = session.keeper.silent_sessions()
        if link is None or link.over or hello is None:
            return Hop(node, now, __version__, sessions=sessions, silent=silent, padding=_PADDING)
        return Hop(
            node, now, __version__, agent=hello.agent_id, peer=link.peer, rtt=link.rtt, silence=link.silence,
            streams=session.streams, resending=resending(link.sock), sessions=sessions, silent=silent, padding=_PADDING,
        )  # fmt: skip

    def refused(self, peer: str, refused: Refused, body: DialBody | None) -> None:
        """Count and log a refusal; `body` is the Dial's, when its MAC was good."""
        self.counts.refuse(refused.code)
        fields = {
            "code": refused.code.value, "reason": refused.text, "peer": peer, "port": self.number,
            "agent": self.session.hello.agent_id if self.session.hello else "", "who": body.who if body else "",
            "target": format_endpoint(body.ip, body.port) if body else "",
        }  # fmt: skip
        if body is None:
            self.session.keeper.log.stranger("dial_refused", refused.code.value, **fields)
        else:
            self.session.keeper.log.info("dial_refused", **fields)


class OpenConnection:
    """One connection to an open port: first the handler of its stream, then the pair's owner."""

    __slots__ = ("_client", "_dial", "_permit", "_place", "_port", "_stream")

    def __init__(self, port: OpenPortServer, client: SocketEnd) -> None:
        self._port = port
        self._client = client
        self._dial: DialSender[None] = DialSender()
        self._place = port.counts.answers.enter(port.session.owner, self, client.loop.now)
        self._permit = StreamPermit(port.counts, port.session, joined=False)
        self._stream: StreamEnd | None = None

    def begin(self, link: Link, body: DialBody) -> None:
        """Open a stream on this link, and send the Dial."""
        self._stream = link.open(self, self._dial.dial(body), OPEN_DEADLINE)

    def received(self, data: bytes) -> None:
        try:
            events = self._dial.receive(data)
        except MessageError as error:
            self._fail(Refusal.PROTOCOL_ERROR, str(error))
            return
        for event in events:
            if isinstance(event, DialAccepted):
                self._join()
            elif isinstance(event, DialRefused):
                self._fail(event.code, event.text)

    def finished(self) -> None:
        self._fail(Refusal.PROTOCOL_ERROR, "the agent ended the stream without an answer")

    def lost(self, lost: Lost) -> None:
        ended = lost.kind is LostKind.LINK_LOST
        self._fail(Refusal.LINK_LOST if ended else Refusal.DIAL_TIMEOUT, str(lost))

    def client_lost(self) -> None:
        """Reset the stream, because the client has gone before the agent answered."""
        if self._stream is not None and not self._stream.closed:
            self._place.release()
            self._permit.release()
            self._stream.abort()

    def _join(self) -> None:
        assert self._stream is not None
        self._stream.pause()
        self._place.release()
        self._permit.join()
        self._port.relay.join(self._client, self._stream, down=self._dial.rest, owner=self)

    def review(self) -> Ending | None:
        """Return None: the allow-list is asked when a client connects, and does not change."""
        return None

    def ended(self, account: Account) -> None:
        self._permit.release(account)

    def _fail(self, code: Refusal, text: str) -> None:
        self._place.release()
        self._permit.release()
        self._port.refuse(self._client, code, text)
        if self._stream is not None:
            self._stream.abort()


class _ClientWatch:
    """The handler of an open port's client, which is paused: it hears only of its loss."""

    __slots__ = ("_connection",)

    def __init__(self, connection: OpenConnection) -> None:
        self._connection = connection

    def received(self, data: bytes) -> None:
        """Is not called for a paused end."""

    def finished(self) -> None:
        """Is not called for a paused end."""

    def lost(self, lost: Lost) -> None:
        self._connection.client_lost()


@dataclass(eq=False)
class OpenPortServer:
    """One open port of a session: relays raw bytes to one target, for sources on its allow-list."""

    relay: Relay
    session: Session
    number: int
    ip: str
    target_port: int
    allow: tuple[Networks, ...]  # a source must be in each list
    node: str
    counts: PortCounts

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Take a connection of the peer with this IP, and dial the target for it."""
        if not self.counts.answers.has_room(self.session.owner):
            self.counts.refuse(Refusal.OVERLOADED)
            sock.close()
            return
        end = self.relay.end(sock, peer)
        source, session = _address_of(peer), self.session
        if not all(any(source in network for network in networks) for networks in self.allow):
            self.refuse(end, Refusal.NOT_AUTHORISED, "the source is not on the allow-list")
        elif session.link is None or not session.serves or not _takes_streams(session.link):
            self.refuse(end, Refusal.LINK_LOST, "")
        elif full := session.full:
            self.refuse(end, full.code, full.text)
        else:
            # counted from here on: many may wait for their targets
            connection = OpenConnection(self, end)
            end.set_handler(_ClientWatch(connection))
            end.pause()
            connection.begin(session.link, self._body(session, peer))

    def _body(self, session: Session, peer: str) -> DialBody:
        assert session.hello is not None
        return DialBody(
            version=messages.VERSION,
            namespace=session.hello.namespace,
            ip=self.ip,
            port=self.target_port,
            node=self.node,
            epoch=session.epoch,
            nonce=os.urandom(messages.NONCE_BYTES),
            time=int(time.time() * 1000),
            who=f"open:{self.number}:{peer}",
        )

    def refuse(self, end: SocketEnd, code: Refusal, text: str) -> None:
        """Reset the client, because a raw connection can't say more; log and count the reason."""
        self.counts.refuse(code)
        self.session.keeper.log.stranger(
            "open_port_refused", code.value, code=code.value, reason=text or code.reply.text, peer=end.peer,
            port=self.number, target=f"{self.ip}:{self.target_port}",
        )  # fmt: skip
        end.abort()


def _takes_streams(link: Link | None) -> bool:
    """Return whether the link is up, and the agent has not sent GoAway."""
    return link is not None and not link.over and link.going_away is None
