"""The data plane of a broker's ports: a guarded port talks only after a valid Dial, an open port relays at once.

Everything here runs in the relay's thread, once per connection.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from rtunnel.clock import ClockWatch
from rtunnel.config import format_endpoint
from rtunnel.counts import StreamCounts
from rtunnel.net import source_of
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Account
from rtunnel.relay.link import Link
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.tls import TlsEnd
from rtunnel.strangers import Loss, Strangers, made_room
from rtunnel.trust.keys import DialKeys, NonceWindow
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    DIAL_ANSWERS,
    Accepted,
    Decoder,
    Dial,
    DialAnswer,
    DialBody,
    Dialling,
    MessageError,
    Refuse,
    decode_body,
    encode,
    encode_body,
)
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

#: An agent answers for its target within `agent.target_timeout` (10 s); one that has not by now never will.
OPEN_DEADLINE: Final = 30.0
#: A gateway says its Dial at once: a guarded connection without a first byte ends after so many seconds. A lost segment
#: comes again after one second, and again after two.
FIRST_BYTES: Final = 3.0
#: An agent says Dialling once. One that says it without end would keep all others waiting.
MAX_DIALLINGS: Final = 64

Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


@lru_cache(maxsize=4096)
def _address_of(peer: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return a client's address, as IPv4 where it is that. Cached: parsing takes 5 us, and clients come again."""
    address = ipaddress.ip_address(peer)
    return getattr(address, "ipv4_mapped", None) or address


class PortCounts(StreamCounts):
    """What a broker's ports did since its start, and who waits there."""

    def __init__(self, most: int) -> None:
        """At most `most` connections wait for their Dial, and as many for their agent's answer.

        One source may have half of the first places. One agent may have a quarter of the others: its targets may all be
        silent, and the other agents' open ports must go on.
        """
        super().__init__()
        self.lost: Counter[str] = Counter()  # connections to guarded ports that ended before their Dial, by Loss
        # The kernel gives a silent connection to us after a second only (TCP_DEFER_ACCEPT), and others are read in the
        # turn that accepts them.
        self.dials: Strangers[GuardedConnection] = Strangers(
            most, max(1, most // 2), lambda connection: connection.is_silent, silent_grace=0.0
        )
        self.answers: Strangers[OpenConnection] = Strangers(most, max(1, most // 4), lambda _: False)

    @property
    def waiting(self) -> int:
        """Connections whose Dial, or whose agent's answer, has not come yet."""
        return len(self.dials) + len(self.answers)


class DialChecker:
    """What a Dial must be before it may reach an agent (docs/wire.md, "Dial")."""

    def __init__(
        self, node: str, keys: DialKeys, window: float, is_revoked: Callable[[str], bool], clock: ClockWatch
    ) -> None:
        """`is_revoked` is asked with the id of a gateway's key; `clock` hears of Dials by another clock."""
        self._node = node
        self._keys = keys
        self._window = window
        self.is_revoked = is_revoked
        self._clock = clock
        self._nonces = NonceWindow(2 * window)

    def authentic(self, dial: Dial) -> DialBody:
        """Return what the Dial asks for. Raises Refused or MessageError unless a gateway's key in force made it."""
        if not self._keys.verify(dial.key, dial.body, dial.mac):
            text = f"the Dial's MAC is not by the gateway's key {dial.key!r}: is that from this cluster's key?"
            raise Refused(Refusal.BAD_MAC, text)
        if self.is_revoked(dial.key):
            raise Refused(Refusal.REVOKED, f"the gateway's key {dial.key} is revoked")
        return decode_body(dial.body)

    def check(self, body: DialBody, session: Session, key: str) -> None:
        """Raises Refused unless the Dial is fresh, and for exactly this session. `key`: the id of the gateway's key."""
        if body.version != messages.VERSION:
            text = f"the gateway speaks protocol version {body.version}, this broker {messages.VERSION}"
            raise Refused(Refusal.VERSION, text)
        age = time.time() - body.time / 1000
        if abs(age) > self._window:
            self._clock.differs(f"gateway {key}", age, time.monotonic())
            off = f"{age:.1f} s old" if age > 0 else f"{-age:.1f} s ahead"
            raise Refused(Refusal.EXPIRED, f"the Dial is {off} by this broker's clock: check both clocks")
        if self._clock.suspicious:
            self._clock.agrees(f"gateway {key}", time.monotonic())
        if body.node != self._node:
            raise Refused(Refusal.STALE_NODE, f"this is {self._node}, the Dial is for {body.node}")
        hello = session.hello
        if hello is None or session.state != "live" or not _takes_streams(session.link):
            raise Refused(Refusal.LINK_LOST)
        if body.namespace != hello.namespace or body.ip not in session.addresses:
            raise Refused(Refusal.STALE_TARGET, f"this port is not leased to {body.namespace}/{body.ip}")
        if body.epoch != session.epoch:
            raise Refused(Refusal.STALE_EPOCH, f"this port's session has epoch {session.epoch}, not {body.epoch}")
        if not self._nonces.fresh(body.nonce, time.monotonic()):
            raise Refused(Refusal.REPLAYED)


@dataclass(slots=True)
class Guarded:
    """What the end of a gateway's pair is told to; also the sign by which the node knows whose pair it is."""

    counts: StreamCounts
    session: Session
    key: str  # the id of the gateway's key
    body: DialBody

    def __call__(self, account: Account) -> None:
        self.session.streams -= 1
        self.counts.ended(account)
        body = self.body
        self.session.keeper.trace(
            "stream_relayed", reason=account.ending.value, who=body.who, target=format_endpoint(body.ip, body.port),
            bytes_up=account.up, bytes_down=account.down, seconds=round(account.seconds, 3),
        )  # fmt: skip


class GuardedConnection:
    """One connection to a guarded port: a Dial, then a stream on the session's link."""

    __slots__ = ("_body", "_decoder", "_end", "_heard", "_peer", "_place", "_port")

    def __init__(self, port: GuardedPort, end: SocketEnd, source: str) -> None:
        self._port = port
        self._end = end
        self._decoder = Decoder(Dial)
        self._heard = False
        self._place = port.counts.dials.enter(source, self, end.loop.now)
        self._peer = end.peer
        self._body: DialBody | None = None  # of the Dial, once its MAC is good

    @property
    def is_silent(self) -> bool:
        """The peer has sent nothing yet, neither of TLS nor of a Dial."""
        return not (self._heard or (isinstance(self._end, TlsEnd) and self._end.tls.shaken))

    def expel(self, lost: Lost) -> None:
        """End it for its silence."""
        self._end.abort()
        self.lost(lost)

    def received(self, data: bytes) -> None:
        """See Talker."""
        port = self._port
        self._heard = True
        self._decoder.feed(data)
        try:
            frame = self._decoder.next_frame()
            if frame is None:
                return
            self._body = body = port.checker.authentic(frame[0])
            port.checker.check(body, port.session, frame[0].key)
            if full := port.session.full:
                raise full
        except MessageError as error:
            text = "a TLS handshake came, and broker.dial_security is plain" if data.startswith(_TLS) else str(error)
            self._refuse(Refused(Refusal.PROTOCOL_ERROR, text))
        except Refused as error:
            self._refuse(error)
        else:
            port.counts.dials.leave(self._place)
            port.pass_on(self._end, frame[1] + self._decoder.rest(), frame[0].key, body)

    def finished(self) -> None:
        """See Talker."""
        self._refuse(Refused(Refusal.PROTOCOL_ERROR, "the connection ended before a whole Dial"))

    def lost(self, lost: Lost) -> None:
        """See Talker."""
        self._port.counts.dials.leave(self._place)
        loss = Loss.of(lost.kind, silent=self.is_silent)
        self._port.counts.lost[loss.value] += 1
        if loss is not Loss.PROBE:
            fix = {"hint": "gateway.dial_security must be tls"} if lost.kind is LostKind.NOT_TLS else {}
            self._port.session.keeper.log_stranger(
                "dial_lost", loss.value, reason=str(lost), peer=self._peer, port=self._port.number, **fix
            )

    def _refuse(self, refused: Refused) -> None:
        self._port.counts.dials.leave(self._place)
        self._port.refuse(self._end, refused, self._body)


@dataclass(eq=False)
class GuardedPort:
    """A session's guarded port."""

    relay: Relay
    session: Session
    number: int
    checker: DialChecker
    counts: PortCounts
    timeout: float

    def accept(self, sock: socket.socket, peer: str) -> None:
        """A connection: its Dial must come in time."""
        tls, dials = self.session.keeper.dial_tls, self.counts.dials
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
        end.talk(GuardedConnection(self, end, source), self.timeout)

    def _turn_away(self, sock: socket.socket, *, plain: bool) -> None:
        """No place is left: no lingering, there are too many already."""
        self.counts.refuse(Refusal.OVERLOADED)
        try:
            if plain:
                sock.send(_OVERLOADED)
        except OSError:
            pass
        sock.close()

    def pass_on(self, end: SocketEnd, first: bytes, key: str, body: DialBody) -> None:
        """A good Dial, by the gateway's key of this id: open the stream with the Dial in front, and join."""
        link = self.session.link
        assert link is not None
        end.pause()
        stream = StreamEnd(link)
        link.attach(stream)
        stream.write(first)
        self.counts.began()
        self.session.streams += 1
        self.relay.join(end, stream, on_end=Guarded(self.counts, self.session, key, body))

    def refuse(self, end: SocketEnd, refused: Refused, body: DialBody | None) -> None:
        """Tell the gateway why not; `body` is the Dial's, when its MAC was good."""
        self.counts.refuse(refused.code)
        fields = {
            "code": refused.code.value, "reason": refused.text, "peer": end.peer, "port": self.number,
            "agent": self.session.hello.agent_id if self.session.hello else "", "who": body.who if body else "",
            "target": format_endpoint(body.ip, body.port) if body else "",
        }  # fmt: skip
        if body is None:
            self.session.keeper.log_stranger("dial_refused", refused.code.value, **fields)
        else:
            self.session.keeper.log("dial_refused", **fields)
        clock = int(time.time() * 1000) if refused.code is Refusal.EXPIRED else 0
        end.write(encode(Refuse(code=refused.code.value, text=refused.text[:512], time=clock)))
        end.close()


class OpenConnection:
    """One connection to an open port, while the agent connects the target; the talker of its stream."""

    __slots__ = ("_client", "_decoder", "_diallings", "_place", "_port", "_stream")

    def __init__(self, port: OpenPortServer, client: SocketEnd) -> None:
        self._port = port
        self._client = client
        self._decoder = Decoder[DialAnswer](*DIAL_ANSWERS)
        self._diallings = 0
        self._place = port.counts.answers.enter(port.session.owner, self, client.loop.now)
        self._stream: StreamEnd | None = None

    def begin(self, stream: StreamEnd) -> None:
        """The stream is open."""
        self._stream = stream

    def received(self, data: bytes) -> None:
        """See Talker."""
        self._decoder.feed(data)
        try:
            answer = self._decoder.next()
            while isinstance(answer, Dialling):
                self._diallings += 1
                if self._diallings > MAX_DIALLINGS:
                    raise MessageError(f"more than {MAX_DIALLINGS} times Dialling")
                answer = self._decoder.next()
        except MessageError as error:
            self._fail(Refusal.PROTOCOL_ERROR, str(error))
            return
        if isinstance(answer, Accepted):
            self._join()
        elif isinstance(answer, Refuse):
            self._fail(Refusal.parse(answer.code), answer.text)

    def finished(self) -> None:
        """See Talker."""
        self._fail(Refusal.PROTOCOL_ERROR, "the agent ended the stream without an answer")

    def lost(self, lost: Lost) -> None:
        """See Talker."""
        ended = lost.kind is LostKind.LINK_LOST
        self._fail(Refusal.LINK_LOST if ended else Refusal.DIAL_TIMEOUT, str(lost))

    def client_lost(self) -> None:
        """Nobody waits for the target any more."""
        if self._stream is not None and not self._stream.closed:
            self._over()
            self._stream.abort()

    def _over(self) -> None:
        """There will be no pair."""
        self._port.counts.answers.leave(self._place)
        self._port.session.streams -= 1

    def _join(self) -> None:
        assert self._stream is not None
        self._stream.pause()
        counts = self._port.counts
        counts.answers.leave(self._place)
        counts.began()
        self._port.relay.join(self._client, self._stream, down=self._decoder.rest(), on_end=self._ended)

    def _ended(self, account: Account) -> None:
        self._port.session.streams -= 1
        self._port.counts.ended(account)

    def _fail(self, code: Refusal, text: str) -> None:
        self._over()
        self._port.refuse(self._client, code, text)
        if self._stream is not None:
            self._stream.abort()


class _ClientWatch:
    """The talker of an open port's client, which is not read before its target answers."""

    __slots__ = ("_connection",)

    def __init__(self, connection: OpenConnection) -> None:
        self._connection = connection

    def received(self, data: bytes) -> None:
        """See Talker: does not come to a paused end."""

    def finished(self) -> None:
        """See Talker: neither."""

    def lost(self, lost: Lost) -> None:
        """See Talker."""
        self._connection.client_lost()


@dataclass(eq=False)
class OpenPortServer:
    """An open port: raw bytes to one target, for sources on its list."""

    relay: Relay
    session: Session
    number: int
    ip: str
    target_port: int
    allow: tuple[Networks, ...]  # a source must be in each list
    node: str
    counts: PortCounts

    def accept(self, sock: socket.socket, peer: str) -> None:
        """A connection."""
        if not self.counts.answers.has_room(self.session.owner):
            self.counts.refuse(Refusal.OVERLOADED)
            sock.close()
            return
        end = self.relay.end(sock, peer)
        source, session = _address_of(peer), self.session
        if not all(any(source in network for network in networks) for networks in self.allow):
            self.refuse(end, Refusal.NOT_AUTHORISED, "the source is not on the allow-list")
        elif session.link is None or session.state != "live" or not _takes_streams(session.link):
            self.refuse(end, Refusal.LINK_LOST, "")
        elif full := session.full:
            self.refuse(end, full.code, full.text)
        else:
            session.streams += 1  # from here on: many may wait for their targets
            connection = OpenConnection(self, end)
            end.talk(_ClientWatch(connection))
            end.pause()
            connection.begin(session.link.open(connection, encode(self._dial(session, peer)), OPEN_DEADLINE))

    def _dial(self, session: Session, peer: str) -> Dial:
        assert session.hello is not None
        body = DialBody(
            version=messages.VERSION,
            namespace=session.hello.namespace,
            ip=self.ip,
            port=self.target_port,
            node=self.node,
            epoch=session.epoch,
            nonce=secrets.token_bytes(messages.NONCE_BYTES),
            time=int(time.time() * 1000),
            who=f"open:{self.number}:{peer}",
        )
        return Dial(body=encode_body(body))

    def refuse(self, end: SocketEnd, code: Refusal, text: str) -> None:
        """There is no way to tell the client more than a reset; the log says why."""
        self.counts.refuse(code)
        self.session.keeper.log_stranger(
            "open_port_refused", code.value, code=code.value, reason=text or code.reply.text, peer=end.peer,
            port=self.number, target=f"{self.ip}:{self.target_port}",
        )  # fmt: skip
        end.abort()


def _takes_streams(link: Link | None) -> bool:
    """The link is there, and the agent has not said GoAway."""
    return link is not None and not link.over and link.going_away is None
