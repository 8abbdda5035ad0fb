"""One client of the gateway: SOCKS5 or HTTP on the same port, until it is joined. In the relay's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rtunnel.counts import StreamCounts
from rtunnel.registry import Tuple
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Account, Gate
from rtunnel.relay.relay import Relay
from rtunnel.wire import http, socks5
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.dial import Paths, Reached, Target, TargetDial


class ClientOwner(Protocol):
    """The gateway, as its clients see it."""

    relay: Relay
    paths: Paths
    namespace: str
    idle_timeout: float

    @property
    def counts(self) -> StreamCounts:
        """What is counted."""

    def new_dial(self, client: Client, target: Target) -> TargetDial:
        """A dial that reports to `client.dialled`."""

    def lookup(self, client: Client, target: Target) -> tuple[Tuple, ...]:
        """The tuples of the route table. Empty: `client.found` is called later, after a look into the registry."""

    def client_over(self, client: Client) -> None:
        """Negotiation is over: joined or closed."""

    def log(self, event: str, **fields: object) -> None:
        """A log line."""


class Client:
    """The talker of a client's socket."""

    __slots__ = (
        "_dial",
        "_end",
        "_gateway",
        "_http",
        "_reply_http",
        "_request",
        "_socks",
        "_started",
        "over",
        "target",
    )

    def __init__(self, gateway: ClientOwner, end: SocketEnd) -> None:
        self._gateway = gateway
        self._end = end
        self._started = gateway.relay.loop.now
        self._socks: socks5.Socks5Server | None = None
        self._http: http.HttpServer | None = None
        self._request: http.Forward | None = None
        self._reply_http = False
        self._dial: TargetDial | None = None
        self.target: Target | None = None
        self.over = False

    @property
    def peer(self) -> str:
        """The client's IP."""
        return self._end.peer

    # What the client says.

    def received(self, data: bytes) -> None:
        """See Talker."""
        try:
            if self._socks is None and self._http is None:
                if socks5.sniff(data[0]) is socks5.Protocol.HTTP:
                    self._http = http.HttpServer()
                    self._reply_http = True
                else:
                    self._socks = socks5.Socks5Server()
            if self._socks is not None:
                self._take_socks(self._socks, data)
            elif self._http is not None:
                self._take_http(self._http, data)
        except (socks5.Socks5Error, http.HttpError) as error:
            self._close(error, error.reply)
        except Refused as refused:
            self._close(refused, b"")

    def finished(self) -> None:
        """See Talker."""
        self._close(Refused(Refusal.BAD_REQUEST, "the client ended before its request was whole"), b"")

    def lost(self, why: str) -> None:
        """See Talker: before the request was whole, or while it was being dialled."""
        if self._dial is not None:
            self._dial.cancel()
        self._log("client_lost", reason=why)
        self._leave()

    def _take_socks(self, server: socks5.Socks5Server, data: bytes) -> None:
        event = server.receive(data)
        out = server.to_send()
        if out:
            self._end.say(out)
        if isinstance(event, socks5.Connect):
            self._go(event.host, event.port, event.is_name)

    def _take_http(self, server: http.HttpServer, data: bytes) -> None:
        event = server.receive(data)
        if event is None:
            return
        if isinstance(event, http.Forward):
            self._request = event
        self._go(event.host, event.port, event.is_name)

    # The way to the target.

    def _go(self, host: str, port: int, is_name: bool) -> None:
        self.target = Target(self._gateway.namespace, host, port)
        if is_name:
            raise Refused(Refusal.NAME_NOT_SUPPORTED, f"{host!r} is a name; dial the target's original IP")
        self._end.pause()
        tuples = self._gateway.lookup(self, self.target)
        if tuples:
            self._start(tuples)

    def found(self, tuples: tuple[Tuple, ...]) -> None:
        """What the registry knows of a target that the route table does not have."""
        if self.over or self.target is None:
            return
        if tuples:
            self._start(tuples)
        else:
            self._refuse(Refused(Refusal.UNKNOWN_TARGET, f"no agent answers for {self.target.ip}"))

    def failed(self, refused: Refused) -> None:
        """The registry could not be asked."""
        if not self.over:
            self._refuse(refused)

    def _start(self, tuples: tuple[Tuple, ...]) -> None:
        assert self.target is not None
        self._dial = self._gateway.new_dial(self, self.target)
        self._dial.start(tuples)

    def dialled(self, reached: Reached | None, refused: Refused | None) -> None:
        """The dial's outcome."""
        self._dial = None
        if reached is None:
            assert refused is not None
            self._refuse(refused)
        elif self._end.closed:
            reached.end.abort()
            self._leave()
        else:
            self._join(reached)

    def _join(self, reached: Reached) -> None:
        try:
            up, gate = self._early()
        except (socks5.Socks5Error, http.HttpError) as error:
            reached.end.abort()
            self._close(error, error.reply)
            return
        if self._request is None:
            self._end.say(http.response_connected() if self._reply_http else socks5.reply_ok())
        self._gateway.paths.opened(reached.used)
        self._gateway.counts.began()
        self._leave()
        setup = self._gateway.relay.loop.now - self._started
        self._gateway.relay.join(
            self._end,
            reached.end,
            up=up,
            down=reached.rest,
            idle=self._gateway.idle_timeout,
            gate=gate,
            on_end=_Ended(self, reached.used, reached.attempts, setup),
        )

    def _early(self) -> tuple[bytes, Gate | None]:
        """What the client sent already, and for a forwarded request its head in front and the gate of its body."""
        if self._socks is not None:
            return self._socks.rest(), None
        assert self._http is not None
        early = self._http.rest()
        request = self._request
        if request is None:
            return early, None
        return request.head + early[: request.body.feed(early)], request.body

    # Ends.

    def ended(self, account: Account, used: Tuple, attempts: int, setup: float) -> None:
        """The pair is over: one log line."""
        self._gateway.paths.closed(used)
        self._gateway.counts.ended(account)
        self._log(
            "stream_ended", reason=account.ending.value, up=account.up, down=account.down,
            seconds=round(account.seconds, 3), setup_ms=round(setup * 1000, 2), node=used.node, epoch=str(used.epoch),
            agent=used.agent_id, attempts=attempts,
        )  # fmt: skip

    def _refuse(self, refused: Refused) -> None:
        if self._reply_http:
            reply = http.response_refused(refused.code, refused.text)
        else:
            reply = socks5.reply_refused(refused.code)
        self._close(refused, reply)

    def _close(self, refused: Refused, reply: bytes) -> None:
        if not reply and self.target is not None:
            self._refuse(refused)
            return
        self._gateway.counts.refuse(refused.code)
        self._log("refused", code=refused.code.value, reason=refused.text)
        if reply:
            self._end.say(reply)
        self._end.close()
        self._leave()

    def _log(self, event: str, **fields: object) -> None:
        target = str(self.target) if self.target else ""
        self._gateway.log(
            event, client=self.peer, target=target, via="http" if self._reply_http else "socks5", **fields
        )

    def _leave(self) -> None:
        if not self.over:
            self.over = True
            self._gateway.client_over(self)


@dataclass(slots=True)
class _Ended:
    """What the pair's end is told with."""

    client: Client
    used: Tuple
    attempts: int
    setup: float

    def __call__(self, account: Account) -> None:
        self.client.ended(account, self.used, self.attempts, self.setup)
