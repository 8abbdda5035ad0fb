"""One client of the gateway: SOCKS5 or HTTP on the same port, until it is joined. In the relay's
thread.

A client that sends requests in absolute form comes back after each answer, for the next request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from rtunnel.config import GatewayConfig
from rtunnel.registry import Tuple
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost
from rtunnel.trust.users import Hash
from rtunnel.wire import http, socks5
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.audit import Asked, Auditor, Joined, told
from rtunnel_socks.dial import Reached, Target, TargetDial, Tried
from rtunnel_socks.forward import Forwarding
from rtunnel_socks.limits import Permit
from rtunnel_socks.recent import Recent
from rtunnel_socks.resolver import Resolver


class ClientCounts(Protocol):
    """The counter of the clients that negotiate."""

    clients: int  # that negotiate


class ClientOwner(Auditor, Protocol):
    """The gateway, as its clients see it."""

    config: GatewayConfig
    resolver: Resolver
    recent: Recent
    waiting: set[Client]  # clients that may send another request, and have sent no byte of it

    @property
    def keep_alive(self) -> float:
        """Seconds for the first byte of a client's next request; 0: one request a connection."""

    @property
    def ready(self) -> bool:
        """Whether a load balancer may send clients here."""

    def new_dial(self, client: Client, target: Target) -> TargetDial:
        """Return a dial that calls `client.dialled`."""

    def acquire_client(self, peer: str) -> ClientPermit:
        """Return the permit of a client of this source that negotiates. Raises Refused."""


class ClientPermit:
    """One client that negotiates: among those of the gateway and of its source, until `release`."""

    __slots__ = ("_counts", "_permit")

    def __init__(self, counts: ClientCounts, permit: Permit) -> None:
        self._counts: ClientCounts | None = counts
        self._permit = permit
        counts.clients += 1

    def release(self, now: float) -> None:
        """Give the permit back; only the first call has an effect.

        `now`: seconds of the loop's clock.
        """
        counts, self._counts = self._counts, None
        if counts is not None:
            counts.clients -= 1
            self._permit.release(now)


class Client:
    """The handler of a client's socket, until it is joined or closed."""

    __slots__ = (
        "_ahead",
        "_claims",
        "_dial",
        "_end",
        "_forwarding",
        "_gateway",
        "_http",
        "_joined",
        "_logging_in",
        "_permit",
        "_request",
        "_socks",
        "_unproven",
        "_wait",
        "_was_answered",
        "asked",
        "over",
    )

    def __init__(self, gateway: ClientOwner, end: SocketEnd, permit: ClientPermit) -> None:
        self._gateway = gateway
        self._end = end
        self._permit = permit
        self.asked = Asked(end.peer, gateway.relay.loop.now)
        self._socks: socks5.Socks5Server | None = None
        self._http: http.HttpServer | None = None
        self._request: http.Forward | None = None
        self._ahead = b""  # bytes behind that one's head that were read with the request before
        self._dial: TargetDial | None = None
        self._forwarding: Forwarding | None = None  # of the request before, parked
        self._joined: Joined | None = None  # the owner of that one
        self._wait: Timer | None = None  # for the first byte of another request
        self._was_answered = False  # a request before this one was
        self._claims = ""  # a known user's name that the client gave, until its password is checked
        self._logging_in = False  # a SOCKS5 login waits for its answer
        self._unproven = ""  # why the proof of an answer was not good
        self.over = False  # the client negotiates no more

    @property
    def peer(self) -> str:
        """The IP of the client."""
        return self._end.peer

    # Bytes of the client.

    def received(self, data: bytes) -> None:
        try:
            if self._socks is None and self._http is None:
                self._begin(data[0])
            if self._socks is not None:
                self._take_socks(self._socks, self._socks.receive(data))
            elif self._http is not None:
                self._take_http(self._http, self._http.receive(data))
        except Refused as error:
            self._turn_away(error)

    def finished(self) -> None:
        if self._wait is not None:
            self.close_waiting()
        else:
            text = "the client ended before its request was whole"
            self._turn_away(Refused(Refusal.BAD_REQUEST, text), answered=False)

    def lost(self, lost: Lost) -> None:
        """Cancel the dial, and log the loss: the client has gone before it was joined."""
        if self._dial is not None:
            self._dial.cancel()
        if self._wait is None:
            self.asked.log(self._gateway, "client_lost", reason=str(lost))
        self._leave()

    def _begin(self, first_byte: int) -> None:
        if socks5.sniff(first_byte) is socks5.Protocol.HTTP:
            self.asked.via = "http"
            self._http = self._new_http()
        else:
            access = self._gateway.access
            anonymous = access.anonymous(self.peer)
            self._socks = socks5.Socks5Server(no_auth=anonymous, user_password=access.users is not None)

    def _new_http(self) -> http.HttpServer:
        return http.HttpServer(keep=self._gateway.keep_alive > 0, max_head=self._gateway.config.max_head)

    def _take_socks(self, server: socks5.Socks5Server, event: socks5.Authenticate | socks5.Connect | None) -> None:
        out = server.to_send()
        if out:
            self._end.write(out)
        if isinstance(event, socks5.Authenticate):
            self._logging_in = True
            self._end.pause()  # as in HTTP: what follows, and a FIN, waits for the answer
            self._admit()
            self._log_in(event.username, event.password)
        elif event is not None:
            self._end.pause()
            self._wants(event.host, event.port, event.is_name)
            if self.asked.user is None:
                self._admit()
            self._go()

    def _take_http(self, server: http.HttpServer, event: http.Tunnel | http.Forward | http.Health | None) -> None:
        if self._wait is not None and server.begun:
            self._stop_waiting()
            self._end.set_handler(self, self._gateway.config.handshake_timeout)
        if event is None:
            return
        if isinstance(event, http.Health):  # a probe: no login, no limit, no log line
            self._end.write(http.response_health(self._gateway.ready, of_head=event.of_head))
            self._end.close()
            self._leave()
            return
        self._end.pause()
        self._request = event if isinstance(event, http.Forward) else None
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
        self.asked.target = Target(self._gateway.namespace, host, port)
        self.asked.is_name = is_name

    # Whether the client may do it.

    def _admit(self) -> None:
        """Charge the source for a request, before any work for it. Raises Refused."""
        self._gateway.limits.charge_request(self.peer, self._gateway.relay.loop.now)

    def _log_in(self, name: str, password: str) -> None:
        if self._gateway.access.known(name):
            self._claims = name
        self._gateway.access.login(self, name, password)

    def logged_in(self, name: str, entry: Hash | Refused) -> None:
        """Take the answer of a login: the user's hash, which fits, or the refusal."""
        if self.over:
            return
        try:
            if isinstance(entry, Refused):
                raise entry
            self.asked.user, self.asked.entry, self._claims = name, entry, ""
            if self._socks is not None:
                self._logging_in = False
                event = self._socks.authenticated(True)
                self._take_socks(self._socks, event)
                if event is None:
                    self._end.set_handler(self, self._gateway.config.handshake_timeout)
            else:
                self._go()
        except Refused as error:
            self._turn_away(error)

    def _must_be_allowed(self) -> None:
        access, asked = self._gateway.access, self.asked
        if asked.judged != access.version and not asked.judge(access):
            who = f"{asked.user} from {self.peer}" if asked.user else self.peer
            raise Refused(Refusal.NOT_AUTHORISED, f"the policy does not let {who} reach {asked.target}")

    # The way to the target. The gateway connects only to (PS IP, PS port) of tuples, never to the
    # target itself: so no target can be the gateway, a broker, or a service near them.

    def _go(self) -> None:
        asked, gateway = self.asked, self._gateway
        assert asked.target is not None
        if asked.user is not None:
            gateway.limits.charge_user(asked.user, gateway.relay.loop.now)
        if asked.is_name:
            raise Refused(Refusal.NAME_NOT_SUPPORTED, f"{asked.target.ip!r} is a name; dial the target's original IP")
        self._must_be_allowed()
        if self._forwarding is None or not self._reuse(self._forwarding):
            self._look_up(asked.target)

    def _look_up(self, target: Target) -> None:
        gateway, asked = self._gateway, self.asked
        asked.permit = gateway.limits.acquire_stream(self.peer, asked.user, gateway.relay.loop.now)
        tuples = gateway.resolver.lookup(self, target)
        if tuples:
            self._start(target, tuples)

    def found(self, tuples: tuple[Tuple, ...]) -> None:
        """Take the registry's tuples for a target that the route table does not have."""
        target = self.asked.target
        if not self.over and target is not None:
            self._start(target, tuples)

    def failed(self, refused: Refused) -> None:
        """Refuse the request: the target has no tuple, or the registry could not be asked."""
        if not self.over:
            self._turn_away(refused)

    def _start(self, target: Target, tuples: tuple[Tuple, ...]) -> None:
        self._dial = self._gateway.new_dial(self, target)
        self._dial.start(tuples)

    def dialled(self, reached: Reached | None, refused: Refused | None) -> None:
        """Take the outcome of the dial: what it reached, or the refusal."""
        dial, self._dial = self._dial, None
        if dial is not None:
            self._unproven = dial.unproven
        if reached is None:
            assert refused is not None
            self._turn_away(refused, tried=[] if dial is None else dial.tried())
        elif self._end.closed:
            reached.end.abort()
            self._leave()
        else:
            self._join(reached)

    def _join(self, reached: Reached) -> None:
        gateway = self._gateway
        try:
            self._must_be_allowed()  # the rules may have changed during the dial
            early = self._early()
        except Refused as error:
            reached.end.abort()
            self._turn_away(error)
            return
        joined = Joined(gateway, self.asked, reached)
        if self._request is not None:
            self._forward(self._request, reached, joined, early)
            return
        self._end.write(http.response_connected() if self._socks is None else socks5.reply_ok())
        self._leave(joined=True)
        gateway.relay.join(
            self._end, reached.end, up=early, down=reached.rest, idle=gateway.config.idle_timeout, owner=joined
        )

    def _early(self) -> bytes:
        """Return the bytes that the client has sent behind its request. Raises Refused."""
        server = self._socks or self._http
        assert server is not None
        early, self._ahead = self._ahead + server.rest(), b""
        return early

    # Requests in absolute form, one after the other.

    def _forward(self, request: http.Forward, reached: Reached, joined: Joined, early: bytes) -> None:
        gateway, target = self._gateway, reached.end
        self._leave(joined=True)
        if self._end.broken or target.closed or target.broken:
            self._end.abort()
            target.abort()
            now = gateway.relay.loop.now
            joined.ended(
                Account(now, ended=now, ending=Ending.CLIENT_RESET if self._end.broken else Ending.TARGET_RESET)
            )
            return
        self._forwarding = Forwarding(
            gateway.relay, self, target, reached.rest,
            idle=gateway.config.idle_timeout, max_head=gateway.config.max_head, owner=joined,
        )  # fmt: skip
        self._joined = joined
        joined.requests = 1
        self._forwarding.exchange(request, self._end, early, first=not self._was_answered)

    def _reuse(self, forwarding: Forwarding) -> bool:
        """Send the request over the connection of the one before.

        Return False, and close that connection, when the target or the user is another one.
        """
        before = self._joined
        assert before is not None
        request, asked = self._request, self.asked
        is_same = (before.asked.target, before.asked.user) == (asked.target, asked.user)
        if request is None or not forwarding.parked or not is_same:
            self._drop_forwarding()
            return False
        before.requests += 1
        before.asked.entry = asked.entry
        early = self._early()
        self._leave(joined=True)
        forwarding.exchange(request, self._end, early, first=False)
        return True

    def answered(self, rest: bytes) -> None:
        """Wait for the client's next request, or close it when there can be none."""
        gateway = self._gateway
        if not gateway.keep_alive or not self._comes_back():
            self._drop_forwarding()
            self._end.close()
            return
        self.over = False
        self._was_answered = True
        self.asked = Asked(self.peer, gateway.relay.loop.now, "http")
        self._unproven = ""
        self._request = None
        self._http = self._new_http()
        self._wait = gateway.relay.loop.after(gateway.keep_alive, self.close_waiting)
        gateway.waiting.add(self)
        self._end.set_handler(self)
        if rest:
            self.received(rest)

    def unanswered(self, rest: bytes) -> None:
        """Look the target up and dial it again, for the same request."""
        self._forwarding = None
        if not self._comes_back():
            self._end.close()
            return
        self.over = False
        self.asked = replace(self.asked, permit=None)  # the old stream has released it
        self._ahead = rest
        self._end.set_handler(self)
        self._end.pause()
        assert self.asked.target is not None
        try:
            self._look_up(self.asked.target)
        except Refused as error:
            self._turn_away(error)

    def _comes_back(self) -> bool:
        """Take a permit for a client that negotiates again; return whether there was one."""
        try:
            self._permit = self._gateway.acquire_client(self.peer)
        except Refused:
            return False
        return True

    def broken(self, refused: Refused) -> None:
        """Refuse the request, whose body is broken."""
        self._turn_away(refused)

    def close_waiting(self) -> None:
        """Close the client, which has not begun another request."""
        self._end.close()
        self._leave()

    def _stop_waiting(self) -> None:
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None
            self._gateway.waiting.discard(self)

    def _drop_forwarding(self) -> None:
        forwarding, self._forwarding = self._forwarding, None
        if forwarding is not None:
            forwarding.close()

    # Ends. Each stream (`Joined`) and each refusal is logged once: client, user, target, and why it
    # ended.

    def _turn_away(self, refused: Refused, *, answered: bool = True, tried: Sequence[Tried] = ()) -> None:
        reply = self._answer(refused) if answered or self.asked.target is not None else b""
        gateway = self._gateway
        gateway.counts.refuse(refused.code)
        gateway.setup_times.observe(refused.code.value, gateway.relay.loop.now - self.asked.started)
        more: dict[str, object] = {"claims": self._claims} if self._claims else {}
        if tried:
            more["tried"] = told(tried)
        if self._unproven:
            more["proof"] = self._unproven
        gateway.recent.add(self.peer, self.asked.user or self._claims, refused, gateway.relay.loop.now)
        self.asked.log(gateway, "request_refused", code=refused.code.value, reason=refused.text, **more)
        if reply:
            self._end.write(reply)
        self._end.close()
        self._leave()

    def _answer(self, refused: Refused) -> bytes:
        """Encode the refusal in the protocol that the client speaks (SOCKS5 or HTTP)."""
        if isinstance(refused, socks5.Socks5Error | http.HttpError):
            return refused.reply
        if self._logging_in and self._socks is not None:
            self._socks.authenticated(False)  # RFC 1929 has one status for each failure
            return self._socks.to_send()
        if self.asked.target is None:
            return b""
        if self._http is not None:
            of_head = self._request is not None and self._request.method == b"HEAD"
            return http.response_refused(refused.code, refused.text, of_head=of_head)
        return socks5.reply_refused(refused.code)

    def _leave(self, *, joined: bool = False) -> None:
        if self.over:
            return
        self.over = True
        if self._wait is not None:
            self._stop_waiting()
        now = self._gateway.relay.loop.now
        if not joined:
            self._drop_forwarding()
            if self.asked.permit is not None:
                self.asked.permit.release(now)
        self._permit.release(now)
