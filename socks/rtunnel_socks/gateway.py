"""One gateway process: accepts clients, follows the registry and the trust list, and drains. trio's
side.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Final

import trio

import rtunnel
from rtunnel.bridge import Bridge
from rtunnel.clock import ClockWatch
from rtunnel.config import Config, GatewayConfig, canonical_ip, format_endpoint, host_name, parse_endpoint
from rtunnel.counts import StreamCounts
from rtunnel.histogram import Histogram, Histograms
from rtunnel.logs import Throttle, get_logger
from rtunnel.net import listening_socket
from rtunnel.registry import GatewayRecord, Registry, Tuple
from rtunnel.registry.history import MAX_SENTENCE
from rtunnel.relay.relay import Listener, Relay
from rtunnel.trust.keys import load_gateway_key
from rtunnel.wire import http
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.access import Access
from rtunnel_socks.client import Client, ClientPermit
from rtunnel_socks.diagnosis import Report
from rtunnel_socks.dial import Paths, Target, TargetDial
from rtunnel_socks.hedge import Hedging
from rtunnel_socks.limits import Limits
from rtunnel_socks.recent import Recent
from rtunnel_socks.resolver import Resolver
from rtunnel_socks.resources import Room, Sources, shortage
from rtunnel_socks.trace import Trace
from rtunnel_socks.trust import GatewayTrust

#: Pairs of node and word whose attempts are counted: nodes come and go for years.
MAX_COUNTED: Final = 4096
#: Bytes of a load balancer's probe, head and all.
PROBE_BYTES: Final = 4096
#: Nodes that a gateway's record names as suspect: some are enough to see which network fails.
MAX_SUSPECTS: Final = 16


@dataclass
class GatewayCounts(StreamCounts):
    """The counts of a gateway since its start."""

    clients: int = 0  # that negotiate now
    # attempts of dials, by node and word (`dial.Tried.code`)
    attempts: dict[tuple[str, str], int] = field(default_factory=dict)
    unproven: dict[str, int] = field(default_factory=dict)  # answers without a good proof, by code
    # connects that failed by a lack, by resource
    shortages: dict[str, int] = field(default_factory=dict)


class Gateway:
    """One gateway process: it accepts clients, drains, and says whether it is ready."""

    def __init__(self, config: Config, registry: Registry) -> None:
        gateway = config.gateway
        self.config: GatewayConfig = gateway
        self.name = gateway.name or host_name()
        self.namespace = gateway.namespace
        self.started = time.time()
        self.registry = registry
        self._heartbeat = config.registry.heartbeat
        self.hedging = Hedging(gateway.hedge_delay)
        self.key = load_gateway_key(gateway.key)
        self.paths = Paths()
        self.sources = Sources(gateway.source_addresses) if gateway.source_addresses else None
        self.counts = GatewayCounts()
        self.setup_times: Histograms[str] = Histograms()
        self.first_byte_times = Histogram()
        self.draining = False
        self.recent = Recent()
        self.waiting: set[Client] = set()
        self.relay = Relay(self.report, "relay-gateway", memory=gateway.stream_memory << 20)
        self.bridge = Bridge(self.relay)
        self._listener: Listener | None = None
        self._log = get_logger("gateway").bind()
        self.resolver = Resolver(registry, config.registry, self.bridge, self._log)
        self.table = self.resolver.table
        self.clock = ClockWatch("this gateway", self.report, self.resolver.clock_offset)
        self._throttle = Throttle()
        self._room = Room(self.relay.loop, lambda: self.counts.clients + self.counts.streams, self._log.warning)
        self.limits = Limits(gateway.limits)
        self.access = Access(gateway, self.bridge, self._log, self._review)
        self.trust = GatewayTrust(gateway, self.bridge, self._log, self._review)

    # Calls from clients and dials, in the relay's thread.

    def new_dial(self, client: Client, target: Target) -> TargetDial:
        user = client.asked.user
        who = f"{user}@{client.peer}" if user else client.peer
        return TargetDial(self, target, f"{self.name}:{who}", client.dialled)

    def forget(self, stale: Tuple) -> None:
        self.table.forget(stale)

    def log(self, event: str, **fields: object) -> None:
        self._log.info(event, **fields)

    def acquire_client(self, peer: str) -> ClientPermit:
        return ClientPermit(self.counts, self.limits.acquire_client(peer, self.relay.loop.now))

    @property
    def keep_alive(self) -> float:
        return 0.0 if self.draining else self.config.keep_alive

    def _close_waiting(self) -> None:
        for client in list(self.waiting):
            client.close_waiting()

    def not_proven(self, code: Refusal, fields: dict[str, object]) -> None:
        self.counts.unproven[code.value] = self.counts.unproven.get(code.value, 0) + 1
        self.report("proof_failed", {"code": code.value, **fields})

    def report(self, event: str, fields: dict[str, object]) -> None:
        """Log an event of the relay, which reports only faults."""
        self._log.error(event, **fields)

    def _accept(self, sock: socket.socket, peer: str) -> None:
        if ":" in peer:  # IPv4 on a socket for both, or an address with its zone
            peer = canonical_ip(peer.partition("%")[0])
        counts = self.counts
        if counts.clients + counts.streams >= self.config.max_clients or self.relay.memory.full:
            self._shut(sock, peer, Refusal.OVERLOADED)
            return
        try:
            permit = self.acquire_client(peer)
        except Refused as error:
            self._shut(sock, peer, error.code)
            return
        end = self.relay.end(sock, peer, spoken=True)
        end.set_handler(Client(self, end, permit), self.config.handshake_timeout)
        self._room.check()

    def count_attempt(self, node: str, word: str) -> None:
        attempts, key = self.counts.attempts, (node, word)
        if key in attempts or len(attempts) < MAX_COUNTED:
            attempts[key] = attempts.get(key, 0) + 1

    def connect_failed_here(self, code: int) -> None:
        what = shortage(code)
        self.counts.shortages[what] = self.counts.shortages.get(what, 0) + 1
        if what == "descriptors":
            self._room.hold()

    def _shut(self, sock: socket.socket, peer: str, code: Refusal) -> None:
        """Close a connection without an answer, because its protocol is not known; answer a probe,
        though.
        """
        if self._answer_probe(sock):
            return
        self.counts.refuse(code)
        sock.close()
        others = self._throttle.others(code.value, self.relay.loop.now)
        if others is not None:
            self._log.warning(
                "client_shut_out", code=code.value, client=peer, reason=code.reply.text, others_since=others
            )

    def _answer_probe(self, sock: socket.socket) -> bool:
        """Answer and close a connection whose first bytes are a load balancer's probe.

        Return whether they are.
        """
        try:
            probe = http.health_probe(sock.recv(PROBE_BYTES, socket.MSG_PEEK))
            if probe is None:
                return False
            sock.recv(PROBE_BYTES)  # close(2) with unread bytes would send RST
            sock.send(http.response_health(self.ready, of_head=probe.of_head))
        except OSError:
            return False
        sock.close()
        return True

    def _review(self) -> None:
        """End open streams that are no longer allowed, after a change of rules, users or the trust
        list.
        """
        self.relay.review()

    # Life.

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Gateway] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then drain. Calls `started` when clients are accepted."""
        async with self.bridge.running():
            shared = self.config.workers > 1
            sock = listening_socket(*parse_endpoint(self.config.listen), key="gateway.listen", shared=shared)
            async with self.bridge.open_nursery() as nursery:
                nursery.start_soon(self.resolver.follow)
                nursery.start_soon(self.access.watch)
                if self.trust.follower is not None:
                    nursery.start_soon(self.trust.follower.run)
                self._listener = await self.bridge.run(
                    lambda: self.relay.listen(sock, self._accept, client_speaks=True)
                )
                self._room.listener = self._listener
                self._log.info(
                    "gateway_started",
                    listen=format_endpoint(*self.bound),
                    namespace=self.namespace,
                    policy=self.config.policy or "built in: this machine only",
                    rules=len(self.access.policy.rules),
                    users=self.config.users,
                    proof=self.config.proof,
                    key=self.key.id,
                )
                nursery.start_soon(self._report_often)
                task_status.started(self)
                await stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()

    async def _report_often(self) -> None:
        """Tell the registry of this gateway with each heartbeat, until cancelled."""
        while True:
            await self.bridge.registry_tries(self.registry.report_gateway, self.record())
            await trio.sleep(self._heartbeat)

    def record(self) -> GatewayRecord:
        """Return the gateway's record for the registry."""
        now = self.relay.loop.now
        suspects = [node for node in sorted(self.table.nodes) if self.paths.is_suspect(node, now)]
        return GatewayRecord(
            name=self.name,
            host=host_name(),
            namespace=self.namespace,
            version=rtunnel.__version__,
            state="draining" if self.draining else "live",
            listen=format_endpoint(*self.bound),
            started=self.started,
            clients=self.counts.clients,
            streams=self.counts.streams,
            tuples=self.table.counts().tuples,
            routes_age=self.resolver.age,
            fault=self.resolver.fault[:MAX_SENTENCE],
            suspects=tuple(suspects[:MAX_SUSPECTS]),
        )

    @property
    def bound(self) -> tuple[str, int]:
        """The address and port on which clients are accepted."""
        assert self._listener is not None
        return self._listener.bound

    def reasons(self) -> list[str]:
        """Return why the gateway is not ready; empty when it is.

        A later loss of the registry does not count.
        """
        reasons = []
        if why := self.resolver.not_ready:
            reasons.append(f"registry: {why}")
        if wrong := self.clock.reason(time.monotonic()):
            reasons.append(wrong)
        if self.draining:
            reasons.append("draining")
        return reasons

    def warnings(self) -> list[str]:
        """Return the faults with which the gateway still serves the tuples that it knows."""
        fault = self.resolver.fault
        return [f"registry: {fault}"] if fault else []

    async def trace(self, target: Target, source: str, user: str | None) -> Report:
        """Trace a target as for this client, and return what was found. In trio's thread."""
        done = trio.Event()
        reports: list[Report] = []

        def ended(report: Report) -> None:
            reports.append(report)
            self.bridge.post(done.set)

        await self.bridge.run(lambda: Trace(self, target, source, user, ended).start())
        await done.wait()
        return reports[0]

    async def answered(self) -> None:
        await self.bridge.answered()

    @property
    def ready(self) -> bool:
        return not self.reasons()

    async def _drain(self) -> None:
        """Accept clients until the VIP has noticed (`lame_duck`), then no more; wait for streams,
        up to `drain`.
        """
        self.draining = True
        listener = self._listener
        assert listener is not None
        if self.config.lame_duck:
            self._log.info("lame_duck_started", seconds=self.config.lame_duck, hint="/readyz is 503, the port accepts")
            await self.bridge.run(listener.accept_silent)
            await trio.sleep(self.config.lame_duck)
        await self.bridge.run(lambda: self.relay.unlisten(listener, serve_queue=True))
        await self.bridge.run(self._close_waiting)
        self._log.info("drain_started", streams=self.counts.streams)
        with trio.move_on_after(self.config.drain):
            while self.counts.streams or self.counts.clients:
                await trio.sleep(0.05)
        self._log.info("gateway_stopped", streams_cut=self.counts.streams)
