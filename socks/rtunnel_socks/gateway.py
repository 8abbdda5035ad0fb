"""The gateway's control plane: the route table follows the registry, misses are looked up, drain. trio."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from rtunnel.bridge import Bridge
from rtunnel.clock import ClockWatch, registry_offset
from rtunnel.config import Config, GatewayConfig, canonical_ip, format_endpoint, host_name, parse_endpoint
from rtunnel.counts import StreamCounts
from rtunnel.errors import RegistryUnavailable
from rtunnel.logs import Throttle, get_logger
from rtunnel.net import listening_socket
from rtunnel.registry import Registry, Tuple
from rtunnel.registry.routes import Mirror, RouteTable
from rtunnel.relay.relay import Listener, Relay
from rtunnel.trust.follower import TrustFollower
from rtunnel.trust.identity import TrustStore
from rtunnel.trust.keys import load_gateway_key
from rtunnel.trust.tls import dial_client_context
from rtunnel.wire import http
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.access import Access
from rtunnel_socks.client import Client
from rtunnel_socks.dial import Paths, Target, TargetDial
from rtunnel_socks.hedge import Hedging
from rtunnel_socks.limits import Limits
from rtunnel_socks.proof import Proofs
from rtunnel_socks.resources import Room, Sources, shortage

#: A target that the registry does not know is not asked for again so soon.
MISS_SECONDS: Final = 1.0
#: Of remembered misses, and of questions to the registry that wait for an answer.
MAX_MISSES: Final = 4096
#: One step of following waits so long for changes.
FOLLOW_WAIT: Final = 1.0
#: Between two tries to follow a registry that can't be reached.
RETRY_SECONDS: Final = 0.5
#: Bytes of a load balancer's probe, head and all.
PROBE_BYTES: Final = 4096


@dataclass
class GatewayCounts(StreamCounts):
    """What this gateway did since its start."""

    clients: int = 0  # negotiating
    unproven: dict[str, int] = field(default_factory=dict)  # answers that were not believed, by code word
    shortages: dict[str, int] = field(default_factory=dict)  # connects that failed for want of something here


class Gateway:
    """One gateway process."""

    def __init__(self, config: Config, registry: Registry) -> None:
        gateway = config.gateway
        self.config: GatewayConfig = gateway
        self.name = gateway.name or host_name()
        self.namespace = gateway.namespace
        self._registry_ttl = config.registry.ttl
        self.clock = ClockWatch("this gateway", self.report, self._registry_offset)
        self.hedging = Hedging(gateway.hedge_delay)
        self.dial_timeout = gateway.dial_timeout
        self.idle_timeout = gateway.idle_timeout
        self.handshake_timeout = gateway.handshake_timeout
        self.max_head = gateway.max_head
        self.key = load_gateway_key(gateway.key)
        self.paths = Paths()
        self.sources = Sources(gateway.source_addresses) if gateway.source_addresses else None
        self.counts = GatewayCounts()
        self.draining = False
        self.waiting: set[Client] = set()
        self.registry_down = "not contacted yet"
        self._silent = False  # no broker has a heartbeat, and it was logged
        self._followed: float | None = None  # when the route table was true to the registry (monotonic)
        self.table = RouteTable(grace=config.registry.heartbeat + 1.0)  # a wiped registry is whole again by then
        self.relay = Relay(self.report, "relay-gateway", memory=gateway.stream_memory << 20)
        self.bridge = Bridge(self.relay)
        self._registry = registry
        self._mirror = Mirror(registry, self.table, reconcile=config.registry.reconcile)
        self._misses: dict[tuple[str, str], float] = {}
        self._asking: dict[tuple[str, str], list[Client]] = {}
        self._listener: Listener | None = None
        self._log = get_logger("gateway").bind()
        self._throttle = Throttle()
        self._room = Room(self.relay.loop, lambda: self.counts.clients + self.counts.streams, self._log.warning)
        self.limits = Limits(gateway.limits)
        self.access = Access(gateway, self.bridge, self._log, self._review)
        self.follower = self._make_follower() if gateway.ca else None
        self.trust_store: TrustStore | None = self.follower.trust_store if self.follower is not None else None
        self.proofs = Proofs(self.trust_store) if self.trust_store is not None and gateway.proof == "required" else None
        self._dial_cas = ""  # the CAs that `dial_tls` knows
        self.dial_tls = self._make_dial_tls()

    def _make_follower(self) -> TrustFollower:
        config = self.config
        trust = Path(config.trust) if config.trust else None
        return TrustFollower(
            ca=Path(config.ca), trust=trust, authority=config.authority, log=self._log,
            apply=lambda call: self.bridge.run(call), changed=self._trust_changed,
        )  # fmt: skip

    def _make_dial_tls(self) -> ssl.SSLContext | None:
        if self.config.dial_security == "plain" or self.trust_store is None:
            return None
        self._dial_cas = self.trust_store.pem
        return dial_client_context(self._dial_cas)

    def _trust_changed(self) -> None:
        """Other CAs are in force, or somebody is revoked. In the relay's thread."""
        if self.trust_store is not None and self.trust_store.pem != self._dial_cas:
            self.dial_tls = self._make_dial_tls()
        self._review()

    # What clients and dials call, in the relay's thread.

    def lookup(self, client: Client, target: Target) -> tuple[Tuple, ...]:
        """See ClientOwner."""
        key = target.namespace, target.ip
        tuples = self._guarded(self.table.lookup(*key))
        if tuples:
            return tuples
        now = self.relay.loop.now
        if self._misses.get(key, 0.0) > now:
            self.relay.loop.soon(lambda: client.found(()))
        elif refused := self._unaskable(key):
            self.relay.loop.soon(lambda: client.failed(refused))
        elif key in self._asking:
            self._asking[key].append(client)
        else:
            self._asking[key] = [client]
            self.bridge.spawn(self._look_up, key)
        return ()

    def _unaskable(self, key: tuple[str, str]) -> Refused | None:
        """Why the registry is not asked: it would time out, one question after the other, or has enough to answer."""
        if self.registry_down not in ("", "not contacted yet"):
            text = f"no tuple is known here for {key[1]}, and: {self.registry_down}"
            return Refused(Refusal.REGISTRY_UNAVAILABLE, text)
        if silence := self.table.silence():
            return Refused(Refusal.REGISTRY_UNAVAILABLE, f"no tuple is known here for {key[1]}, and {silence}")
        if len(self._asking) >= MAX_MISSES and key not in self._asking:
            return Refused(Refusal.OVERLOADED, "too many questions wait for the registry")
        return None

    def new_dial(self, client: Client, target: Target) -> TargetDial:
        """See ClientOwner."""
        user = client.asked.user
        who = f"{user}@{client.peer}" if user else client.peer
        return TargetDial(self, target, f"{self.name}:{who}", client.dialled)

    def forget(self, stale: Tuple) -> None:
        """See DialOwner."""
        self.table.forget(stale)

    def log(self, event: str, **fields: object) -> None:
        """See ClientOwner."""
        self._log.info(event, **fields)

    def client_over(self, client: Client) -> None:
        """See ClientOwner."""
        self.counts.clients -= 1
        self.limits.left(client.peer, self.relay.loop.now)

    def client_back(self, client: Client) -> bool:
        """See ClientOwner."""
        if not self.limits.arrived(client.peer, self.relay.loop.now):
            return False
        self.counts.clients += 1
        return True

    @property
    def keep_alive(self) -> float:
        """See ClientOwner."""
        return 0.0 if self.draining else self.config.keep_alive

    def _close_waiting(self) -> None:
        for client in list(self.waiting):
            client.close_waiting()

    def not_proven(self, code: Refusal, fields: dict[str, object]) -> None:
        """See DialOwner."""
        self.counts.unproven[code.value] = self.counts.unproven.get(code.value, 0) + 1
        self.report("proof_failed", {"code": code.value, **fields})

    def report(self, event: str, fields: dict[str, object]) -> None:
        """What the relay has to say: never good news."""
        self._log.error(event, **fields)

    def _accept(self, sock: socket.socket, peer: str) -> None:
        if ":" in peer:  # IPv4 on a socket for both, or an address with its zone
            peer = canonical_ip(peer.partition("%")[0])
        counts = self.counts
        if counts.clients + counts.streams >= self.config.max_clients or self.relay.memory.full:
            self._shut(sock, peer, Refusal.OVERLOADED)
        elif not self.limits.arrived(peer, self.relay.loop.now):
            self._shut(sock, peer, Refusal.TOO_MANY_HANDSHAKES)
        else:
            counts.clients += 1
            end = self.relay.end(sock, peer, spoken=True)
            end.talk(Client(self, end), self.handshake_timeout)
            self._room.check()

    def connect_failed_here(self, code: int) -> None:
        """See DialOwner."""
        what = shortage(code)
        self.counts.shortages[what] = self.counts.shortages.get(what, 0) + 1
        if what == "descriptors":
            self._room.hold()

    def _shut(self, sock: socket.socket, peer: str, code: Refusal) -> None:
        """Close it without an answer: nothing is known of what it speaks. A load balancer's probe is answered."""
        if self._answer_probe(sock):
            return
        self.counts.refuse(code)
        sock.close()
        others = self._throttle.others(code.value, self.relay.loop.now)
        if others is not None:
            self._log.warning("shut_out", code=code.value, client=peer, reason=code.reply.text, others_since=others)

    def _answer_probe(self, sock: socket.socket) -> bool:
        """Answer and close a connection that takes no place, if it is a probe and its request is there: most are."""
        try:
            probe = http.health_probe(sock.recv(PROBE_BYTES, socket.MSG_PEEK))
            if probe is None:
                return False
            sock.recv(PROBE_BYTES)  # unread bytes would turn the end into a reset
            sock.send(http.response_health(self.ready, of_head=probe.of_head))
        except OSError:
            return False
        sock.close()
        return True

    def _review(self) -> None:
        """Rules or users have changed, or an agent or broker is revoked: what is open and no longer allowed ends."""
        self.relay.review()

    @staticmethod
    def _guarded(tuples: tuple[Tuple, ...]) -> tuple[Tuple, ...]:
        """Open ports' tuples are for people who dial them; a gateway speaks Dial."""
        if any(entry.agent_port for entry in tuples):
            return tuple(entry for entry in tuples if not entry.agent_port)
        return tuples

    # A registry miss: the one question that a stream may wait for.

    async def _look_up(self, key: tuple[str, str]) -> None:
        tuples: tuple[Tuple, ...] = ()
        refused: Refused | None = None
        try:
            tuples = self._guarded(tuple(await self.bridge.registry(self._registry.lookup, *key)))
        except RegistryUnavailable as error:
            refused = Refused(Refusal.REGISTRY_UNAVAILABLE, f"no tuple is known here for {key[1]}, and: {error}")
        self.relay.call(lambda: self._answer(key, tuples, refused))

    def _answer(self, key: tuple[str, str], tuples: tuple[Tuple, ...], refused: Refused | None) -> None:
        waiting = self._asking.pop(key, [])
        if not tuples and refused is None:
            if len(self._misses) >= MAX_MISSES:
                self._misses.clear()
            self._misses[key] = self.relay.loop.now + MISS_SECONDS
        for client in waiting:
            if refused is not None:
                client.failed(refused)
            else:
                client.found(tuples)

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Gateway] = trio.TASK_STATUS_IGNORED) -> None:
        """Started when clients are accepted. Until `stop`."""
        async with self.bridge.running():
            shared = self.config.workers > 1
            sock = listening_socket(*parse_endpoint(self.config.listen), key="gateway.listen", shared=shared)
            async with self.bridge.open_nursery() as nursery:
                nursery.start_soon(self._follow)
                nursery.start_soon(self.access.watch)
                if self.follower is not None:
                    nursery.start_soon(self.follower.run)
                self._listener = await self.bridge.run(
                    lambda: self.relay.listen(sock, self._accept, client_speaks=True)
                )
                self._room.listener = self._listener
                self._log.info(
                    "gateway_ready",
                    listen=format_endpoint(*self.bound),
                    namespace=self.namespace,
                    policy=self.config.policy or "built in: this machine only",
                    rules=len(self.access.policy.rules),
                    users=self.config.users,
                    proof=self.config.proof,
                    key=self.key.id,
                )
                task_status.started(self)
                await stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()

    @property
    def bound(self) -> tuple[str, int]:
        """Where clients are accepted."""
        assert self._listener is not None
        return self._listener.bound

    def reasons(self) -> list[str]:
        """Why it is not ready; empty when it is. A registry lost later does not count: it serves what it knew."""
        reasons = []
        if self.registry_down == "not contacted yet" or (self.registry_down and not self._mirror.synced):
            reasons.append(f"registry: {self.registry_down}")
        if wrong := self.clock.reason(time.monotonic()):
            reasons.append(wrong)
        if self.draining:
            reasons.append("draining")
        return reasons

    def warnings(self) -> list[str]:
        """What is wrong while it serves what it knew."""
        state = self.registry_state
        return [] if state == "ok" else [f"registry: {state}"]

    @property
    def registry_state(self) -> str:
        """ "ok", or what keeps the route table from being true."""
        return self.registry_down or self.table.silence() or "ok"

    async def answered(self) -> None:
        """See rtunnel.pulse.Part."""
        await self.bridge.answered()

    def _registry_offset(self) -> float | None:
        """This machine's clock minus the registry's; None while the route table is not fresh."""
        followed = self._followed
        if followed is None or time.monotonic() - followed > self._registry_ttl:
            return None
        return registry_offset((n.beat for n in self.table.nodes.values()), self._registry_ttl, time.time())

    @property
    def ready(self) -> bool:
        """See ClientOwner."""
        return not self.reasons()

    @property
    def routes_age(self) -> float | None:
        """Seconds since the route table was true to the registry; None before the first time."""
        return None if self._followed is None else round(time.monotonic() - self._followed, 1)

    async def _follow(self) -> None:
        """Keep the route table up to date; outlive any outage of the registry."""
        while True:
            try:
                await self.bridge.registry(self._mirror.follow_once, FOLLOW_WAIT if self._mirror.synced else 0.0)
            except RegistryUnavailable as error:
                if not self.registry_down or self.registry_down == "not contacted yet":
                    self._log.error("registry_unavailable", reason=str(error), tuples_known=self.table.counts().tuples)
                self.registry_down = str(error)
                await trio.sleep(RETRY_SECONDS)
                continue
            self._followed = time.monotonic()
            self._tell_silence()
            if self.registry_down:
                self._log.info("registry_followed", tuples=self.table.counts().tuples)
                self.registry_down = ""

    def _tell_silence(self) -> None:
        """Log it once when the brokers' heartbeats are gone, and when they are back."""
        silence = self.table.silence()
        if bool(silence) != self._silent:
            self._silent = bool(silence)
            if silence:
                self._log.error("heartbeats_lost", reason=silence, tuples_known=self.table.counts().tuples)
            else:
                self._log.info("heartbeats_returned", nodes=sorted(self.table.nodes))

    async def _drain(self) -> None:
        """Serve new clients until the VIP knows, then take no more; streams may finish within the deadline."""
        self.draining = True
        listener = self._listener
        assert listener is not None
        if self.config.lame_duck:
            self._log.info("lame_duck_started", seconds=self.config.lame_duck, hint="/readyz is 503, the port accepts")
            await self.bridge.run(listener.accept_silent)
            await trio.sleep(self.config.lame_duck)
        await self.bridge.run(lambda: self.relay.unlisten(listener, serve_queue=True))
        await self.bridge.run(self._close_waiting)
        self._log.info("draining", streams=self.counts.streams)
        with trio.move_on_after(self.config.drain):
            while self.counts.streams or self.counts.clients:
                await trio.sleep(0.05)
        self._log.info("gateway_stopped", streams_cut=self.counts.streams)
