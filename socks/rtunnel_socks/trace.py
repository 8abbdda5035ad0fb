"""A trace: real Dials of one target, by every path at once, whose hops say what they see. In the
relay's thread.

It obeys the rules and limits of the named client, and is logged like that client's request. Each
path costs the target one connection, which is closed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import msgspec

import rtunnel
from rtunnel.bridge import Bridge
from rtunnel.config import format_endpoint
from rtunnel.errors import RegistryUnavailable
from rtunnel.net import is_own
from rtunnel.registry import Registry, Tuple
from rtunnel.trust.policy import Question
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.audit import Asked, Auditor
from rtunnel_socks.diagnosis import Linked, Report, Way, diagnose
from rtunnel_socks.dial import ACCEPTED, DialOwner, Reached, Target, TargetDial, Tried, code_for_client
from rtunnel_socks.recent import Recent
from rtunnel_socks.resolver import Resolver

#: Agents with links from the target's address that a report names.
MAX_LINKED: Final = 8
#: Tuples of a registry in which such links are looked for: a snapshot of more takes seconds.
MAX_SEARCHED: Final = 100_000
#: Seconds after its last try in which a second host of one agent_id counts: more than an agent's
#: default pause (`backoff_cap`) and two heartbeats.
SECOND_HOST_SECONDS: Final = 16.0


class TraceOwner(Auditor, DialOwner, Protocol):
    """The gateway, as a trace sees it."""

    resolver: Resolver
    bridge: Bridge
    recent: Recent
    registry: Registry


class Trace:
    """One trace. `done(report)` is called once, at most `dial_timeout` after the tuples are known;
    without tuples, after the questions to the registry.
    """

    def __init__(
        self, gateway: TraceOwner, target: Target, source: str, user: str | None, done: Callable[[Report], None]
    ) -> None:
        """Trace `target` for `user` (None: nobody has logged in) at the IP `source`."""
        self._gateway = gateway
        self._target = target
        self._done = done
        self.peer = source
        self.asked = Asked(source, gateway.relay.loop.now, "trace", target, user)
        self._running: list[TargetDial] = []
        self._codes: list[Refusal] = []
        self._tried: list[Tried] = []
        self.report = Report(
            str(target), target.namespace, gateway.name, rtunnel.__version__,
            f"{user}@{source}" if user else source, time.time(), registry=gateway.resolver.state,
            table_age=gateway.resolver.age, recent=gateway.recent.of(source, user or "", gateway.relay.loop.now),
            nodes=len(gateway.table.nodes), tuples=gateway.table.counts().tuples,
            loop=self._loop(),
        )  # fmt: skip

    def start(self) -> None:
        """Look the target up and dial it by every tuple."""
        try:
            self._must_be_allowed()
            gateway, asked = self._gateway, self.asked
            now = gateway.relay.loop.now
            gateway.limits.charge_request(self.peer, now)
            if asked.user is not None:
                gateway.limits.charge_user(asked.user, now)
            asked.permit = gateway.limits.acquire_stream(self.peer, asked.user, now)
            if tuples := gateway.resolver.lookup(self, self._target):
                self.found(tuples)
        except Refused as error:
            self.failed(error)

    def _must_be_allowed(self) -> None:
        gateway, asked, target = self._gateway, self.asked, self._target
        access = gateway.access
        if asked.user is not None and not access.known(asked.user):
            raise Refused(Refusal.BAD_CREDENTIALS, f"{gateway.name} has no user {asked.user}")
        if asked.user is None and not access.anonymous(self.peer):
            raise Refused(Refusal.AUTHENTICATION_REQUIRED, f"{gateway.name} asks clients of {self.peer} to log in")
        verdict = access.policy.verdict(Question(asked.user, self.peer, target.namespace, target.ip, target.port))
        asked.rule = self.report.rule = verdict.rule
        self.report.allowed = verdict.allowed
        if not verdict.allowed:
            raise Refused(Refusal.NOT_AUTHORISED, f"the policy does not let {self.report.client} reach {target}")

    def found(self, tuples: tuple[Tuple, ...]) -> None:
        """Dial by these tuples."""
        gateway = self._gateway
        now = gateway.relay.loop.now
        ordered = gateway.paths.order(tuples, gateway.table.nodes, now)
        self.report.ways = [self._way(entry, now) for entry in ordered]
        who = f"{gateway.name}:{self.report.client}"
        for entry in ordered:  # no dial ends before a later step of the loop
            dial = TargetDial(gateway, self._target, who, None, trace=True)
            dial.done = partial(self._ended, dial)
            self._running.append(dial)
            dial.start([entry])

    def _way(self, entry: Tuple, now: float) -> Way:
        nodes = self._gateway.table.nodes
        node = nodes.get(entry.node)
        alike = [other for other in nodes.values() if other.ip == entry.ps_ip and other.node != entry.node]
        return Way(
            entry.node, format_endpoint(entry.ps_ip, entry.ps_port), entry.agent_id, str(entry.epoch),
            "no heartbeat" if node is None else node.state, self._heartbeat_age(entry.node),
            self._gateway.paths.is_suspect(entry.node, now),
            same_ip=sorted(other.node for other in alike if node is None or other.host != node.host),
        )  # fmt: skip

    def _heartbeat_age(self, name: str) -> float | None:
        node = self._gateway.table.nodes.get(name)
        return None if node is None else round(max(0.0, time.time() - node.beat), 1)

    def _loop(self) -> str:
        """Return which part of rtunnel the target's address belongs to; "" for no known one."""
        gateway, ip = self._gateway, self._target.ip
        for node in gateway.table.nodes.values():
            if node.ip == ip:
                return f"the broker {node.node}"
        return f"the gateway {gateway.name}" if is_own(ip) else ""

    def _second_hosts(self) -> list[str]:
        """Return the hosts that were refused because they claim the agent_id of a way."""
        agents = {way.agent for way in self.report.ways}
        return sorted({
            duplicate.refused
            for node in self._gateway.table.nodes.values()
            for duplicate in node.duplicates
            if duplicate.agent_id in agents
            and duplicate.namespace == self._target.namespace
            and self.report.time - duplicate.at < SECOND_HOST_SECONDS
        })  # fmt: skip

    def _ended(self, dial: TargetDial, reached: Reached | None, refused: Refused | None) -> None:
        self._running.remove(dial)
        if reached is not None:
            reached.end.close()
        elif refused is not None:
            self._codes.append(refused.code)
        self._tried += reached.tried if reached is not None else dial.tried()
        if self._running:
            return
        self.report.attempts = sorted(self._tried, key=lambda attempt: attempt.node)
        if any(attempt.code == ACCEPTED for attempt in self._tried):
            self._finish(ACCEPTED, "")
        else:
            code = code_for_client(set(self._codes))
            self._finish(code.value, code.reply.text)

    def failed(self, refused: Refused) -> None:
        """End the trace before any Dial."""
        if refused.code is Refusal.UNKNOWN_TARGET:
            self._gateway.bridge.spawn(self._look_for_links, refused)
        else:
            self._finish(refused.code.value, refused.text)

    async def _look_for_links(self, refused: Refused) -> None:
        """Find agents whose links come from the target's address, and end the trace. In trio's
        thread.
        """
        gateway = self._gateway
        if gateway.table.counts().tuples <= MAX_SEARCHED:
            try:
                self.report.linked = await gateway.bridge.registry(self._linked)
            except RegistryUnavailable:
                pass  # the resolver has just asked it: this fact is only missing
        gateway.relay.call(lambda: self._finish(refused.code.value, refused.text))

    def _linked(self) -> list[Linked]:
        """Return agents whose links come from the target's address. In a thread that may wait."""
        ip, found = self._target.ip, {}
        for entry in self._gateway.registry.snapshot().tuples:
            if entry.agent_host == ip or entry.agent_host.endswith(f"({ip})"):
                found[entry.namespace, entry.agent_id] = Linked(
                    entry.namespace, entry.agent_id, entry.agent_ip, entry.node
                )
        return [*found.values()][:MAX_LINKED]

    def _finish(self, code: str, text: str) -> None:
        gateway, asked, report = self._gateway, self.asked, self.report
        # The heartbeats as they are now: a broker that is down has had none since the trace began.
        report.ways = [
            msgspec.structs.replace(
                way, heartbeat_age=self._heartbeat_age(way.node),
                state=way.state if way.node in gateway.table.nodes else "no heartbeat",
            )
            for way in report.ways
        ]  # fmt: skip
        report.second_hosts = self._second_hosts()
        if asked.permit is not None:
            asked.permit.release(gateway.relay.loop.now)
        report.code, report.text = code, text
        report.cause, report.do = diagnose(report)
        asked.log(gateway, "trace_ended", code=code, reason=text, cause=report.cause, attempts=len(report.attempts))
        self._done(report)
