"""Says what a trace means: the cause of a failure, and what to do. Pure.

`diagnose` looks at the facts that the hops have told, from the client to the target, and names the
first one that explains the failure. When none does, it says what can be excluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from rtunnel.wire.refusal import Refusal
from rtunnel_socks.dial import ACCEPTED, NO_ANSWER, Phase, Tried

#: Seconds that a clock may differ before a trace mentions it: a third of a broker's window.
CLOCK_SECONDS: Final = 10.0
#: Seconds without a byte of the agent after which its link is taken for dead: it pings after 3.5 s.
SILENT_SECONDS: Final = 9.0
#: Seconds of a connect at the agent that is slow: the target is mostly on the agent's own host.
SLOW_SECONDS: Final = 1.0
#: Seconds since the route table was true to the registry that make it old.
OLD_TABLE: Final = 10.0


class Way(msgspec.Struct, frozen=True):
    """One tuple of the target, as the gateway's route table has it."""

    node: str
    ps: str
    agent: str
    epoch: str
    state: str  # of the node: "live", "draining" or "no heartbeat"
    heartbeat_age: float | None  # seconds since the node's heartbeat; None: it has none
    suspect: bool  # the node did not answer this gateway lately


class Report(msgspec.Struct):
    """The facts of one trace."""

    target: str
    namespace: str
    gateway: str
    software: str
    client: str  # user and source for which the gateway was asked
    time: float  # seconds since 1970 by the gateway's clock
    rule: str = ""
    allowed: bool = False
    registry: str = ""  # "ok", or the fault
    table_age: float | None = None  # seconds since the route table was true to the registry
    ways: list[Way] = []
    attempts: list[Tried] = []
    code: str = ""  # "connected", or the code that a client would get
    text: str = ""
    cause: str = ""
    do: str = ""


def diagnose(report: Report) -> tuple[str, str]:
    """Return the cause and what to do; ("", "") when every path works."""
    if report.code == ACCEPTED:
        return _of_paths(report)
    if not report.attempts:
        return _before_any_dial(report)
    codes = {attempt.code for attempt in report.attempts}
    if len(codes) == 1 or report.code in codes:
        attempt = next((a for a in report.attempts if a.code == report.code), report.attempts[0])
        return _of_attempt(attempt, report)
    causes = [_of_attempt(attempt, report) for attempt in report.attempts]
    return "; ".join(cause for cause, _ in causes), "; ".join(dict.fromkeys(fix for _, fix in causes))


def _before_any_dial(report: Report) -> tuple[str, str]:
    code, target = report.code, report.target
    if code == Refusal.NOT_AUTHORISED:
        rule = f"rule {report.rule} denies it" if report.rule else "no rule allows it"
        return f"the policy of {report.gateway}: {rule}", "`rtunnel policy test` says which rule is near; add one"
    if code == Refusal.UNKNOWN_TARGET:
        old = report.table_age is not None and report.table_age > OLD_TABLE
        more = f" (its table is {report.table_age:.0f} s old)" if old else ""
        return (
            f"no agent is registered for {target} in namespace {report.namespace}, as {report.gateway} sees it{more}: "
            f"{report.text}",
            "see whether the agent runs there, which addresses it has, and its log: `rtunnel status`",
        )
    if code == Refusal.REGISTRY_UNAVAILABLE:
        return f"{report.gateway} does not reach the registry: {report.text}", "see the registry, and gateway's log"
    return f"{report.gateway} refused it: {code}: {report.text}", _FIXES.get(code, "see docs/refusals")


def _of_paths(report: Report) -> tuple[str, str]:
    """Return what is wrong with one path, although the target is reached."""
    failed = [attempt for attempt in report.attempts if attempt.code != ACCEPTED]
    if failed:
        cause, fix = _of_attempt(failed[0], report)
        return f"the target is reached, but not by every path: {cause}", fix
    slow = [a for a in report.attempts if a.at_agent is not None and a.at_agent.connect > SLOW_SECONDS]
    if slow and slow[0].at_agent is not None:
        seconds = slow[0].at_agent.connect
        return f"the target is slow: it took {seconds:.1f} s to take the agent's connection", "see the target"
    if clock := _clock_fault(report.attempts, report):
        return f"the target is reached, but {clock}", "set that machine's clock (NTP)"
    if len(report.ways) < 2:
        return "the target is reached, by one path only", "`rtunnel status` says which sessions its agent has"
    return "", ""


def _of_attempt(attempt: Tried, report: Report) -> tuple[str, str]:
    where, code, hop = f"{attempt.node} ({attempt.ps})", attempt.code, attempt.at_agent
    if code in (NO_ANSWER, Refusal.DIAL_TIMEOUT):
        return _of_silence(attempt, report)
    if code == Refusal.BROKER_UNREACHABLE:
        if attempt.phase == Phase.CONNECTING:
            fix = "see whether the broker runs, and whether a firewall rejects the gateway there"
            return f"{where} rejects the TCP connection: {attempt.text}", fix
        return f"{where}: {attempt.text}", "compare gateway.dial_security and gateway.ca with the broker's"
    if code == Refusal.EXPIRED:
        clock = _clock_fault([attempt], report) or attempt.text
        return f"{where} takes the Dial for an old one: {clock}", "set that machine's clock (NTP)"
    if hop is not None and (cause := _at_agent(attempt)):
        return cause
    return f"{where}: {code}: {attempt.text}", _FIXES.get(code, "docs/refusals has a page for this code")


def _of_silence(attempt: Tried, report: Report) -> tuple[str, str]:
    where, hop = f"{attempt.node} ({attempt.ps})", attempt.broker
    way = next((way for way in report.ways if way.node == attempt.node), None)
    if attempt.phase == Phase.CONNECTING:
        if way is not None and way.heartbeat_age is None:
            return f"{where} takes no TCP connection, and has no heartbeat: the broker is down", "start the broker"
        fix = f"open {attempt.ps} for {report.gateway}: broker.ports, and broker.advertise_ip, must be reachable"
        return f"{where} drops the TCP connection, although its heartbeat is there: a firewall or a wrong PS IP", fix
    if attempt.phase == Phase.DIALLING:
        return (
            "the agent tries to connect the target, and the target does not answer: it hangs, or a firewall on the "
            "agent's host drops the packets",
            "see the target's service and the firewall there",
        )
    if hop is None:
        return f"{where} took the connection and says nothing: the broker hangs", "see that broker's log and CPU"
    if hop.silence > SILENT_SECONDS:
        return (
            f"the agent {hop.agent} is silent on its link to {hop.node} for {hop.silence:.0f} s: its host hangs, or "
            "the network to it drops packets",
            f"see the host {hop.peer}",
        )
    return (
        f"{hop.node} has passed the Dial on, and the agent {hop.agent} does not answer it, although its link lives: "
        "the agent hangs, or large packets are lost on the link (MTU)",
        f"see the agent on {hop.peer}; compare the MTU of the way with 1500",
    )


def _at_agent(attempt: Tried) -> tuple[str, str] | None:
    hop, code = attempt.at_agent, attempt.code
    assert hop is not None
    host, out = f"the agent {hop.agent}", f" through {hop.interface}" if hop.interface else ""
    if code == Refusal.TARGET_REFUSED:
        return f"nobody listens on the target's port: {host} was refused at {hop.way}{out}", "start the service there"
    if code == Refusal.TARGET_TIMEOUT:
        return f"the target drops packets: {host} got no answer from {hop.way}{out}", "see the firewall on that host"
    if code == Refusal.TARGET_UNREACHABLE:
        return f"{host} has no route to {hop.way}{out} ({hop.errno})", "see the routes of that host"
    if code == Refusal.NOT_EXPOSED:
        return f"{host} does not expose that port", "add it to agent.exposes there"
    if code == Refusal.STALE_TARGET:
        return f"{host} does not have the address: {attempt.text}", "see that host's addresses, and agent.addresses"
    return None


def _clock_fault(attempts: Sequence[Tried], report: Report) -> str:
    """Return which clock differs from the gateway's; "" when none does."""
    for attempt in attempts:
        hops = ((f"the broker {attempt.node}", attempt.broker), (f"the agent {attempt.agent}", attempt.at_agent))
        for what, hop in hops:
            if hop is not None and abs(off := hop.time / 1000 - report.time) > CLOCK_SECONDS:
                return f"the clock of {what} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this gateway's"
    return ""


_FIXES: Final[dict[str, str]] = {
    Refusal.AUTHENTICATION_REQUIRED: "log in: --as USER",
    Refusal.BAD_CREDENTIALS: "`rtunnel user list` has the users",
    Refusal.RATE_LIMITED: "see [gateway.limits]",
    Refusal.TOO_MANY_STREAMS: "see [gateway.limits], or broker.admit",
    Refusal.BAD_MAC: "the gateway's key is not of this cluster: `rtunnel pki issue gateway`",
    Refusal.NOT_PROVEN: "the agent behind this tuple is not the target's: see the log line proof_failed",
    Refusal.REVOKED: "`rtunnel pki list` says what is revoked",
    Refusal.OVERLOADED: "see the limits that the text names",
    Refusal.DRAINING: "the node stops: the agent goes to another one by itself",
    Refusal.LINK_LOST: "the agent's link has just ended: its log says why",
    Refusal.STALE_EPOCH: "the tuple was old and is forgotten: try again",
    Refusal.STALE_NODE: "the tuple was old and is forgotten: do two brokers share a PS IP and ports?",
    Refusal.STALE_TARGET: "the tuple was old and is forgotten: do two brokers share a PS IP and ports?",
}
