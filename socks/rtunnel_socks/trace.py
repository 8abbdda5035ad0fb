"""A trace: real Dials of one target, by every path at once, whose hops say what they see. In the
relay's thread.

It obeys the rules and limits of the named client, and is logged like that client's request. Each
path costs the target one connection, which is closed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import rtunnel
from rtunnel.config import format_endpoint
from rtunnel.registry import Tuple
from rtunnel.trust.policy import Question
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.audit import Asked, Auditor
from rtunnel_socks.diagnosis import Report, Way, diagnose
from rtunnel_socks.dial import ACCEPTED, DialOwner, Reached, Target, TargetDial, Tried, code_for_client
from rtunnel_socks.resolver import Resolver


class TraceOwner(Auditor, DialOwner, Protocol):
    """The gateway, as a trace sees it."""

    resolver: Resolver


class Trace:
    """One trace. `done(report)` is called once, at most `dial_timeout` after `start`."""

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
            table_age=gateway.resolver.age,
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
        for _ in ordered:
            self._running.append(TargetDial(gateway, self._target, who, None, trace=True))
        for dial, entry in zip(list(self._running), ordered, strict=True):
            dial.done = lambda reached, refused, dial=dial: self._ended(dial, reached, refused)
            dial.start([entry])

    def _way(self, entry: Tuple, now: float) -> Way:
        gateway = self._gateway
        node = gateway.table.nodes.get(entry.node)
        return Way(
            entry.node, format_endpoint(entry.ps_ip, entry.ps_port), entry.agent_id, str(entry.epoch),
            "no heartbeat" if node is None else node.state,
            None if node is None else round(max(0.0, self.report.time - node.beat), 1),
            gateway.paths.is_suspect(entry.node, now),
        )  # fmt: skip

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
        self._finish(refused.code.value, refused.text)

    def _finish(self, code: str, text: str) -> None:
        gateway, asked, report = self._gateway, self.asked, self.report
        if asked.permit is not None:
            asked.permit.release(gateway.relay.loop.now)
        report.code, report.text = code, text
        report.cause, report.do = diagnose(report)
        asked.log(gateway, "trace_ended", code=code, reason=text, cause=report.cause, attempts=len(report.attempts))
        self._done(report)
