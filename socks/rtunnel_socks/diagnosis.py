"""Says what a trace means: the cause of a failure, and what to do. Pure.

`diagnose` looks at the facts that the hops have told, from the client to the target, and names the
first one that explains the failure. When none does, it says what can be excluded.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

import msgspec

from rtunnel.wire.messages import Hop
from rtunnel.wire.refusal import Refusal
from rtunnel_socks.dial import ACCEPTED, NO_ANSWER, Phase, Tried
from rtunnel_socks.recent import RecentRefusal

#: Seconds that a clock may differ before a trace mentions it: a third of a broker's window.
CLOCK_SECONDS: Final = 10.0
#: Seconds without a byte of the agent after which its link is taken for dead: it pings after 3.5 s.
SILENT_SECONDS: Final = 9.0
#: Seconds of a connect at the agent that is slow: the target is mostly on the agent's own host.
SLOW_SECONDS: Final = 1.0
#: Seconds since the route table was true to the registry that make it old.
OLD_TABLE: Final = 10.0
#: Seconds since a node's heartbeat after which it is late: two of the default interval.
LATE_HEARTBEAT: Final = 6.0
#: Networks from which docker0 has its address by default.
DOCKER_NETWORKS: Final = (ipaddress.ip_network("172.17.0.0/16"),)


class Way(msgspec.Struct, frozen=True):
    """One tuple of the target, as the gateway's route table has it."""

    node: str
    ps: str
    agent: str
    epoch: str
    state: str  # of the node: "live", "draining" or "no heartbeat"
    heartbeat_age: float | None  # seconds since the node's heartbeat; None: it has none
    suspect: bool  # the node did not answer this gateway lately
    same_ip: list[str] = []  # nodes of other hosts with the same PS IP


class Linked(msgspec.Struct, frozen=True):
    """An agent whose link comes from the target's address, which it has not registered."""

    namespace: str
    agent: str
    address: str  # one of those that it has registered
    node: str


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
    nodes: int = 0  # with a heartbeat
    tuples: int = 0  # of all targets, in the route table
    loop: str = ""  # the part of rtunnel that has the target's address, as "the broker b1"
    linked: list[Linked] = []  # looked for when no agent answers for the target
    recent: list[RecentRefusal] = []  # of this client
    second_hosts: list[str] = []  # refused lately, because they claim the agent_id of a way
    ways: list[Way] = []
    attempts: list[Tried] = []
    code: str = ""  # ACCEPTED, or the code that a client would get
    text: str = ""
    cause: str = ""
    do: str = ""


def diagnose(report: Report) -> tuple[str, str]:
    """Return the cause and what to do; ("", "") when every path works."""
    if report.code == ACCEPTED:
        return _of_paths(report)
    if not report.attempts:
        return _before_any_dial(report)
    if report.registry not in ("", "ok") and any(attempt.code in _OLD_TUPLES for attempt in report.attempts):
        return (
            f"the table of {report.gateway} is {_age(report)} and names sessions that have ended, because it does not "
            f"follow the registry: {report.registry}",
            _REGISTRY_FIX,
        )
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
    if code == Refusal.UNKNOWN_TARGET and (cause := _misplaced(report)):
        return cause
    if code == Refusal.UNKNOWN_TARGET:
        old = report.table_age is not None and report.table_age > OLD_TABLE
        more = f" (its table is {report.table_age:.0f} s old)" if old else ""
        return (
            f"no agent is registered for {target} in namespace {report.namespace}, as {report.gateway} sees it{more}: "
            f"{report.text}",
            "see whether the agent runs on that host and reaches the VIP: its log and `rtunnel doctor` there say so",
        )
    if code == Refusal.REGISTRY_UNAVAILABLE:
        return (
            f"{report.gateway} does not reach the registry: {report.text}",
            "see the registry, and the log of the gateway",
        )
    return f"{report.gateway} refused it: {code}: {report.text}", _FIXES.get(code, _UNKNOWN_FIX)


def _misplaced(report: Report) -> tuple[str, str] | None:
    """Return why a target without a tuple is not what it seems to be, if that is known."""
    ip = report.target.rpartition(":")[0].strip("[]")
    if report.loop:
        return (
            f"a loop: {ip} is {report.loop}, and no agent's host",
            "dial the address of a host with an agent; a client reaches rtunnel's own machines without rtunnel",
        )
    for linked in report.linked:
        who = f"the agent {linked.agent} (broker {linked.node})"
        if linked.namespace != report.namespace:
            continue
        if any(ipaddress.ip_address(linked.address) in network for network in DOCKER_NETWORKS):
            return (
                f"{who} has its link from {ip}, but has registered {linked.address}, an address of docker0",
                f'write agent.addresses = ["{ip}"] on that host',
            )
        return (
            f"{who} has its link from {ip}, but has registered {linked.address}: its host is behind NAT, or "
            "agent.addresses is wrong",
            f"dial {linked.address}; or write {ip} into agent.addresses, if that host has it",
        )
    if report.nodes and not report.tuples:
        return (
            f"no broker has any agent: the VIP is down or leads elsewhere, or no agent runs; {report.text}",
            "see the VIP, and agents' logs: session_not_opened",
        )
    return None


def _of_paths(report: Report) -> tuple[str, str]:
    """Return what is wrong with one path, although the target is reached."""
    if report.recent:
        last = report.recent[0]
        return (
            f"the target is reached, but {report.client} was refused {last.at:.0f} s ago: {last.code}: {last.text}",
            _FIXES.get(last.code, _UNKNOWN_FIX),
        )
    if report.registry not in ("", "ok"):
        return (
            f"the target is reached, but the table of {report.gateway} is {_age(report)}, because it does not follow "
            f"the registry: {report.registry}",
            _REGISTRY_FIX,
        )
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
    if report.second_hosts:
        agents = ", ".join(sorted({way.agent for way in report.ways}))
        return (
            f"the target is reached, but another host claims the agent_id {agents} and is refused: "
            f"{', '.join(report.second_hosts)}",
            "remove the copy of the agent's identity there, and let that host enrol under its own agent_id",
        )
    doubt = next((a.at_agent.doubt for a in report.attempts if a.at_agent is not None and a.at_agent.doubt), "")
    if len(report.ways) < 2 and report.nodes > 1:
        return (
            f"the target is reached, by one path only, although {report.nodes} brokers have a heartbeat: "
            f"{doubt or 'the VIP pins by source, or the agent wants one session only'}",
            "let the VIP lead each new link to another broker; see agent.redundancy",
        )
    if doubt:
        return f"the target is reached, but its agent is not ready: {doubt}", "see the log of that agent"
    if len(report.ways) < 2:
        return "the target is reached, by one path only", "`rtunnel status` says which sessions its agent has"
    return "", ""


def _age(report: Report) -> str:
    return "not filled" if report.table_age is None else f"{report.table_age:.0f} s old"


def _of_attempt(attempt: Tried, report: Report) -> tuple[str, str]:
    where, code, hop = f"{attempt.node} ({attempt.ps})", attempt.code, attempt.at_agent
    if code in (NO_ANSWER, Refusal.DIAL_TIMEOUT):
        return _of_silence(attempt, report)
    if code == Refusal.LINK_LOST and attempt.broker is not None and attempt.broker.silence > SILENT_SECONDS:
        # The broker has given the link up since.
        return _of_silent_link(attempt, attempt.broker, report)
    if code == Refusal.BROKER_UNREACHABLE:
        way = next((way for way in report.ways if way.node == attempt.node), None)
        if way is not None and way.same_ip:
            return (
                f"{where} rejects the TCP connection, and {', '.join(way.same_ip)} has the same PS IP",
                "give each of these brokers a broker.advertise_ip of its own, or port ranges that do not overlap",
            )
        if attempt.phase == Phase.CONNECTING and any(word in attempt.text for word in _NO_ROUTE):
            return (
                f"no machine answers at the PS IP of {where}: a wrong PS IP, or its network is down ({attempt.text})",
                "see broker.advertise_ip there, and the routes of this gateway",
            )
        if attempt.phase == Phase.CONNECTING:
            fix = "see whether the broker runs, and whether a firewall rejects the gateway there"
            return f"{where} rejects the TCP connection: {attempt.text}", fix
        return f"{where}: {attempt.text}", "compare gateway.dial_security and gateway.ca with the broker's"
    if code == Refusal.EXPIRED:
        clock = _clock_fault([attempt], report) or attempt.text
        return f"{where} takes the Dial for an old one: {clock}", "set that machine's clock (NTP)"
    if hop is not None and (cause := _at_agent(attempt)):
        return cause
    return f"{where}: {code}: {attempt.text}", _FIXES.get(code, _UNKNOWN_FIX)


def _of_silence(attempt: Tried, report: Report) -> tuple[str, str]:
    where, hop = f"{attempt.node} ({attempt.ps})", attempt.broker
    if attempt.phase == Phase.CONNECTING:
        return _of_no_connection(where, attempt, report)
    if attempt.phase == Phase.DIALLING:
        return (
            "the agent tries to connect the target, and the target does not answer: it hangs, or a firewall on the "
            "agent's host drops the packets",
            "see the target's service and the firewall there",
        )
    if hop is None:
        if attempt.unordered:
            return (
                f"large packets from {where} to {report.gateway} are lost, and small ones arrive: an MTU black hole",
                f"compare the MTU of the way between them; {_MTU_FIX}",
            )
        return (
            f"{where} took the connection and says nothing: the broker hangs or takes no more connections, or its "
            "large packets are lost (MTU)",
            f"`rtunnel status` says whether it has no descriptors left; see that broker's log and CPU; {_MTU_FIX}",
        )
    return _of_silent_link(attempt, hop, report)


def _of_no_connection(where: str, attempt: Tried, report: Report) -> tuple[str, str]:
    """Return the cause of a TCP connection to a broker that is neither taken nor rejected."""
    way = next((way for way in report.ways if way.node == attempt.node), None)
    if way is not None and (way.heartbeat_age is None or way.heartbeat_age > LATE_HEARTBEAT):
        late = "" if way.heartbeat_age is None else f" for {way.heartbeat_age:.0f} s"
        return (
            f"{where} takes no TCP connection, and has no heartbeat{late}: the broker is down, or its network is",
            "start the broker, or see its network",
        )
    fix = f"open {attempt.ps} for {report.gateway}: broker.port_range, at broker.advertise_ip, must be reachable"
    return f"{where} drops the TCP connection, although its heartbeat is there: a firewall or a wrong PS IP", fix


def _of_silent_link(attempt: Tried, hop: Hop, report: Report) -> tuple[str, str]:
    """Return the cause of a Dial that the broker passed on and the agent does not answer."""
    link = f"the link of the agent {hop.agent} to {hop.node}"
    others_live = any(other.at_agent is not None and other.at_agent.agent == hop.agent for other in report.attempts)
    if hop.silence <= SILENT_SECONDS and hop.resending:
        return (
            f"large packets from {hop.node} to the agent {hop.agent} are lost, and small ones arrive: an MTU black "
            "hole on its link",
            f"compare the MTU of the way to {hop.peer} with that of the broker; {_MTU_FIX}",
        )
    if hop.silence <= SILENT_SECONDS:
        return (
            f"{hop.node} has passed the Dial on, and the agent {hop.agent} does not answer it, although its link "
            "lives: the agent hangs, or large packets are lost on the link (MTU)",
            f"see the agent on {hop.peer}; {_MTU_FIX}",
        )
    if hop.sessions > 1 and hop.silent == hop.sessions:
        return (
            f"all {hop.sessions} agents of {hop.node} are silent: the VIP is down, or the network between it and the "
            "agents",
            "see the VIP",
        )
    if others_live or not hop.resending:
        why = "large packets on it are lost" if others_live else "the agent hangs, or its large packets are lost"
        return (
            f"{link} is silent for {hop.silence:.0f} s, and the host still acknowledges: {why} (MTU)",
            f"compare the MTU of the way to {hop.peer} with that of the broker; {_MTU_FIX}",
        )
    return (
        f"the agent {hop.agent} is silent on its link to {hop.node} for {hop.silence:.0f} s: its host hangs, or the "
        "network to it drops packets",
        f"see the host {hop.peer}",
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


#: Names of errno when no packet reaches a machine.
_NO_ROUTE: Final = ("EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN")
#: Codes of attempts by tuples of sessions that have ended.
_OLD_TUPLES: Final = frozenset({
    Refusal.STALE_EPOCH, Refusal.STALE_NODE, Refusal.STALE_TARGET, Refusal.BROKER_UNREACHABLE, Refusal.LINK_LOST,
})  # fmt: skip
_REGISTRY_FIX: Final = "see the registry, and the network between it and this gateway"
_MTU_FIX: Final = 'let ICMP "fragmentation needed" pass, or clamp the MSS'
_UNKNOWN_FIX: Final = "docs/refusals has a page for this code"
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
