"""One client of the gateway: SOCKS5 or HTTP on the same port, until it is joined. In the relay's thread."""

from __future__ import annotations

from typing import Protocol

from rtunnel.config import format_endpoint
from rtunnel.counts import StreamCounts
from rtunnel.registry import Tuple
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Account, Gate
from rtunnel.relay.relay import Relay
from rtunnel.trust.policy import Question
from rtunnel.trust.users import Hash
from rtunnel.wire import http, socks5
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.access import Access
from rtunnel_socks.dial import Paths, Reached, Target, TargetDial
from rtunnel_socks.limits import Limits


class ClientOwner(Protocol):
    """The gateway, as its clients see it."""

    relay: Relay
    paths: Paths
    access: Access
    limits: Limits
    namespace: str
    idle_timeout: float  # seconds
    handshake_timeout: float  # seconds
    max_head: int  # bytes of an HTTP request's head

    @property
    def counts(self) -> StreamCounts:
        """What is counted."""

    @property
    def ready(self) -> bool:
        """Whether a load balancer may send clients here."""

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
        "_claims",
        "_counted",
        "_dial",
        "_end",
        "_entry",
        "_gateway",
        "_http",
        "_is_name",
        "_judged",
        "_logging_in",
        "_reply_http",
        "_request",
        "_rule",
        "_socks",
        "_started",
        "_unproven",
        "over",
        "target",
        "user",
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
        self._claims = ""  # the known user that it says it is, until that is proved
        self._logging_in = False  # a SOCKS5 login waits for its answer
        self._entry: Hash | None = None  # of `user`, as it was checked
        self._is_name = False
        self._judged = -1  # the version of the rules that allowed it
        self._rule = ""  # that rule, or the one that did not
        self._unproven = ""  # why somebody who answered was not believed
        self._counted = False  # among the streams of its source and user
        self.target: Target | None = None
        self.user: str | None = None
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
                self._begin(data[0])
            if self._socks is not None:
                self._take_socks(self._socks, self._socks.receive(data))
            elif self._http is not None:
                self._take_http(self._http.receive(data))
        except Refused as refused:
            self._turn_away(refused)

    def finished(self) -> None:
        """See Talker."""
        self._turn_away(Refused(Refusal.BAD_REQUEST, "the client ended before its request was whole"), told=False)

    def lost(self, why: str) -> None:
        """See Talker: before the request was whole, or while it was being dialled."""
        if self._dial is not None:
            self._dial.cancel()
        self._log("client_lost", reason=why)
        self._leave()

    def _begin(self, first_byte: int) -> None:
        if socks5.sniff(first_byte) is socks5.Protocol.HTTP:
            self._http = http.HttpServer(max_head=self._gateway.max_head)
            self._reply_http = True
        else:
            access = self._gateway.access
            anonymous = access.anonymous(self.peer)
            self._socks = socks5.Socks5Server(no_auth=anonymous, user_password=access.users is not None)

    def _take_socks(self, server: socks5.Socks5Server, event: socks5.Authenticate | socks5.Connect | None) -> None:
        out = server.to_send()
        if out:
            self._end.say(out)
        if isinstance(event, socks5.Authenticate):
            self._logging_in = True
            self._end.pause()  # as in HTTP: what follows, a FIN too, waits for the answer
            self._admit()
            self._log_in(event.username, event.password)
        elif event is not None:
            self._end.pause()
            self._wants(event.host, event.port, event.is_name)
            if self.user is None:
                self._admit()
            self._go()

    def _take_http(self, event: http.Tunnel | http.Forward | http.Health | None) -> None:
        if event is None:
            return
        if isinstance(event, http.Health):  # of nobody, to nowhere: neither a login nor a limit nor a line
            self._end.say(http.response_health(self._gateway.ready, of_head=event.of_head))
            self._end.close()
            self._leave()
            return
        if isinstance(event, http.Forward):
            self._request = event
        self._end.pause()
        self._wants(event.host, event.port, event.is_name)
        self._admit()
        access = self._gateway.access
        if access.users is not None and event.authorization:
            credentials = http.basic_credentials(event.authorization)
            if credentials is None:
                raise Refused(Refusal.BAD_CREDENTIALS, "the Proxy-Authorization is not Basic with user and password")
            self._log_in(*credentials)
        elif access.anonymous(self.peer):
            self._go()
        else:
            raise Refused(Refusal.AUTHENTICATION_REQUIRED)

    def _wants(self, host: str, port: int, is_name: bool) -> None:
        self.target = Target(self._gateway.namespace, host, port)
        self._is_name = is_name

    # Whether it may.

    def _admit(self) -> None:
        """Before anything is done for it."""
        if refused := self._gateway.limits.asks(self.peer, self._gateway.relay.loop.now):
            raise refused

    def _log_in(self, name: str, password: str) -> None:
        if self._gateway.access.known(name):
            self._claims = name
        self._gateway.access.login(self, name, password)

    def logged_in(self, name: str, entry: Hash | Refused) -> None:
        """See Asker."""
        if self.over:
            return
        try:
            if isinstance(entry, Refused):
                raise entry
            self.user, self._entry, self._claims = name, entry, ""
            if self._socks is not None:
                self._logging_in = False
                event = self._socks.authenticated(True)
                self._take_socks(self._socks, event)
                if event is None:
                    self._end.talk(self, self._gateway.handshake_timeout)
            else:
                self._go()
        except Refused as refused:
            self._turn_away(refused)

    def judge(self) -> bool:
        """Whether it may reach its target by what is in force now."""
        assert self.target is not None
        access, target = self._gateway.access, self.target
        verdict = access.judge(Question(self.user, self.peer, target.namespace, target.ip, target.port), self._entry)
        self._judged = access.version
        self._rule = verdict.rule
        return verdict.allowed

    def _must_be_allowed(self) -> None:
        if self._judged != self._gateway.access.version and not self.judge():
            who = f"{self.user} from {self.peer}" if self.user else self.peer
            raise Refused(Refusal.NOT_AUTHORISED, f"the policy does not let {who} reach {self.target}")

    # The way to the target. It is never dialled from here: a gateway connects to (PS IP, PS port) of tuples only, so
    # that no target can be the gateway itself, a broker, or something beside them.

    def _go(self) -> None:
        assert self.target is not None
        gateway, now = self._gateway, self._gateway.relay.loop.now
        if self.user is not None and (refused := gateway.limits.logged_in(self.user, now)):
            raise refused
        if self._is_name:
            raise Refused(Refusal.NAME_NOT_SUPPORTED, f"{self.target.ip!r} is a name; dial the target's original IP")
        self._must_be_allowed()
        if refused := gateway.limits.open(self.peer, self.user, now):
            raise refused
        self._counted = True
        tuples = gateway.lookup(self, self.target)
        if tuples:
            self._start(tuples)

    def found(self, tuples: tuple[Tuple, ...]) -> None:
        """What the registry knows of a target that the route table does not have."""
        if self.over or self.target is None:
            return
        if tuples:
            self._start(tuples)
        else:
            self._turn_away(Refused(Refusal.UNKNOWN_TARGET, f"no agent answers for {self.target.ip}"))

    def failed(self, refused: Refused) -> None:
        """The registry could not be asked."""
        if not self.over:
            self._turn_away(refused)

    def _start(self, tuples: tuple[Tuple, ...]) -> None:
        assert self.target is not None
        self._dial = self._gateway.new_dial(self, self.target)
        self._dial.start(tuples)

    def dialled(self, reached: Reached | None, refused: Refused | None) -> None:
        """The dial's outcome."""
        if self._dial is not None:
            self._unproven = self._dial.unproven
        self._dial = None
        if reached is None:
            assert refused is not None
            self._turn_away(refused)
        elif self._end.closed:
            reached.end.abort()
            self._leave()
        else:
            self._join(reached)

    def _join(self, reached: Reached) -> None:
        try:
            self._must_be_allowed()  # the rules may have changed meanwhile
            up, gate = self._early()
        except Refused as refused:
            reached.end.abort()
            self._turn_away(refused)
            return
        if self._request is None:
            self._end.say(http.response_connected() if self._reply_http else socks5.reply_ok())
        self._gateway.paths.opened(reached.used)
        self._gateway.counts.began()
        self._leave(joined=True)
        setup = self._gateway.relay.loop.now - self._started
        self._gateway.relay.join(
            self._end,
            reached.end,
            up=up,
            down=reached.rest,
            idle=self._gateway.idle_timeout,
            gate=gate,
            on_end=Joined(self, reached, setup),
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

    # Ends: one line for each stream and each refusal says who, from where, to what, which way, and why it ended.

    def ended(self, account: Account, joined: Joined) -> None:
        """The pair is over."""
        gateway, used, identity = self._gateway, joined.used, joined.identity
        gateway.paths.closed(used)
        gateway.counts.ended(account)
        gateway.limits.close(self.peer, self.user, gateway.relay.loop.now)
        self._log(
            "stream_ended", reason=account.ending.value, bytes_up=account.up, bytes_down=account.down,
            seconds=round(account.seconds, 3), setup_ms=round(joined.setup * 1000, 2), attempts=joined.attempts,
            node=used.node, epoch=str(used.epoch), ps=format_endpoint(used.ps_ip, used.ps_port), agent=used.agent_id,
            proof="ok" if identity else "off", certificate=identity.subject if identity else "",
        )  # fmt: skip

    def _turn_away(self, refused: Refused, *, told: bool = True) -> None:
        reply = self._answer(refused) if told or self.target is not None else b""
        self._gateway.counts.refuse(refused.code)
        more = {"claims": self._claims} if self._claims else {}
        if self._unproven:
            more["proof"] = self._unproven
        self._log("refused", code=refused.code.value, reason=refused.text, **more)
        if reply:
            self._end.say(reply)
        self._end.close()
        self._leave()

    def _answer(self, refused: Refused) -> bytes:
        """No, in words that the client understands by now."""
        if isinstance(refused, socks5.Socks5Error | http.HttpError):
            return refused.reply
        if self._logging_in and self._socks is not None:
            self._socks.authenticated(False)  # RFC 1929 has one word for every no
            return self._socks.to_send()
        if self.target is None:
            return b""
        if self._reply_http:
            of_head = self._request is not None and self._request.method == b"HEAD"
            return http.response_refused(refused.code, refused.text, of_head=of_head)
        return socks5.reply_refused(refused.code)

    def _log(self, event: str, **fields: object) -> None:
        target = self.target
        self._gateway.log(
            event, client=self.peer, user=self.user or "", target=str(target) if target else "",
            namespace=self._gateway.namespace, via="http" if self._reply_http else "socks5", rule=self._rule, **fields,
        )  # fmt: skip

    def _leave(self, *, joined: bool = False) -> None:
        if not self.over:
            self.over = True
            if self._counted and not joined:
                self._gateway.limits.close(self.peer, self.user, self._gateway.relay.loop.now)
            self._gateway.client_over(self)


class Joined:
    """What the pair's end is told to; also the sign by which the gateway knows a client's pair."""

    __slots__ = ("attempts", "certificate", "client", "identity", "setup", "used")

    def __init__(self, client: Client, reached: Reached, setup: float) -> None:
        self.client = client
        self.used = reached.used
        self.attempts = reached.attempts
        self.identity = reached.identity  # whose proof it was
        self.certificate = reached.certificate  # of the broker
        self.setup = setup

    def __call__(self, account: Account) -> None:
        self.client.ended(account, self)
