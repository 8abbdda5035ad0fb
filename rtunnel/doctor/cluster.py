"""The facts of the whole cluster, as the registry has them, and their checks, which are pure."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import msgspec

from rtunnel.clock import lasting
from rtunnel.config import (
    Config,
    canonical_ip,
    format_endpoint,
    is_memory,
    parse_endpoint,
    parse_exposes,
    parse_range,
)
from rtunnel.doctor import redis_facts
from rtunnel.doctor.checks import CLOCK_FAILS, CLOCK_WARNS, NEARLY, redis
from rtunnel.doctor.facts import RedisFacts
from rtunnel.doctor.findings import Finding, fail, in_order, listed, ok, warn
from rtunnel.registry import GatewayRecord, NodeFacts, NodeRecord, Registry, Tuple, connect
from rtunnel.registry.history import RefusedAgent
from rtunnel.wire.refusal import Refusal

#: Addresses whose history is read: 32 us of Redis and one round trip each. Addresses with the
#: fewest tuples come first.
MAX_HISTORIES: Final = 500
#: Seconds for which a refusal counts as a fault of now. A refused agent comes back every few
#: seconds, and its entry is written again each time.
RECENT: Final = 120.0
#: Events of one call, and calls: what a storm of refusals writes in two minutes.
EVENTS_AT_ONCE: Final = 1000
MAX_EVENT_PAGES: Final = 20
#: Refused agents whose history is read.
MAX_REFUSED: Final = 100
#: Namespaces in which a refused agent's history is looked for.
MAX_NAMESPACES: Final = 8
#: Port of Redis when its URL names none.
_REDIS_PORT: Final = 6379


@dataclass(frozen=True, slots=True)
class Cluster:
    """All facts about one cluster. Times are seconds since 1970 by the registry's clock."""

    config: Config
    now: float
    ttl: float
    nodes: tuple[NodeRecord, ...] = ()
    facts: tuple[NodeFacts, ...] = ()
    gateways: tuple[GatewayRecord, ...] = ()
    tuples: tuple[Tuple, ...] = ()
    #: The last ones of addresses that live agents have, and of agents that were refused lately.
    refusals: tuple[RefusedAgent, ...] = ()
    registry: RedisFacts | None = None
    #: The addresses of agent.brokers in this configuration, if it has any, as host and port.
    vips: tuple[tuple[str, int], ...] = ()


def collect(config: Config) -> Cluster:
    """Read all of the registry. Raises RegistryUnavailable, or ValueError for a memory registry."""
    if is_memory(config):
        raise ValueError("the memory registry is inside one process: give the cluster's [registry] url")
    registry = connect(config.registry)
    try:
        snapshot = registry.snapshot()
        facts = registry.node_facts()
        gateways = registry.gateways()
        tuples = registry.with_exposes(snapshot.tuples)
        refusals: list[RefusedAgent] = []
        for namespace, ip in _weakest(tuples)[:MAX_HISTORIES]:
            refusals += registry.history(namespace, ip).refusals
        spaces = sorted({entry.namespace for entry in tuples} | {known.namespace for known in gateways})
        for agent_id in refused_lately(registry, snapshot.now):
            for namespace in spaces[:MAX_NAMESPACES]:
                refusals += registry.agent_history(namespace, agent_id).refusals
        return Cluster(
            config,
            snapshot.now,
            registry.ttl,
            tuple(snapshot.nodes),
            tuple(facts),
            tuple(gateways),
            tuple(tuples),
            tuple(refusals),
            redis_facts.collect(config.registry),
            tuple(parse_endpoint(name) for name in config.agent.brokers),
        )
    finally:
        registry.close()


def refused_lately(registry: Registry, now: float) -> list[str]:
    """Return the agent_ids that brokers have refused within RECENT, by the cluster's events.

    `now`: the registry's time, in seconds since 1970. An event names no namespace.
    """
    found: dict[str, None] = {}
    cursor = f"{max(0, int((now - RECENT) * 1000))}-0"
    for _ in range(MAX_EVENT_PAGES):
        cursor, events = registry.events(cursor, EVENTS_AT_ONCE)
        for data in events:
            with suppress(msgspec.DecodeError, ValueError):
                event = msgspec.json.decode(data)
                if isinstance(event, dict) and event.get("event") == "session_refused" and event.get("agent"):
                    found[str(event["agent"])] = None
        if len(events) < EVENTS_AT_ONCE or len(found) >= MAX_REFUSED:
            break
    return list(found)[:MAX_REFUSED]


def _weakest(tuples: Iterable[Tuple]) -> list[tuple[str, str]]:
    """Return the targets, those with the fewest tuples first."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for entry in tuples:
        counts[entry.namespace, entry.agent_ip] += 1
    return sorted(counts, key=lambda target: (counts[target], target))


def judge(facts: Cluster) -> list[Finding]:
    """Return the findings of all checks, the worst first."""
    return in_order(finding for check in CHECKS for finding in check(facts))


Check = Callable[[Cluster], Iterator[Finding]]


# --- nodes ----------------------------------------------------------------------------------------


def nodes(facts: Cluster) -> Iterator[Finding]:
    """Check that every broker node lives and is ready."""
    name, told = "nodes", {entry.node: entry for entry in facts.facts}
    if not facts.nodes:
        fix = "start a broker with this registry; its log and /readyz say why it can't write"
        yield fail(name, "no broker has a heartbeat in this registry", fix)
    living = {record.node for record in facts.nodes}
    for entry in facts.facts:
        if entry.node not in living:
            gone = lasting(max(0.0, facts.now - entry.at))
            fix = f"start it, or see the host {entry.host} and its network; it is forgotten after an hour"
            yield fail(name, f"{entry.node} ({entry.ip}) died: its last heartbeat was {gone} ago", fix)
    good = 0
    for record in facts.nodes:
        found = list(_node_faults(record, told.get(record.node), facts))
        good += not found
        yield from found
    if good:
        yield ok(name, f"{good} of {len(facts.nodes)} are live and ready")


def _node_faults(record: NodeRecord, told: NodeFacts | None, facts: Cluster) -> Iterator[Finding]:
    name, node = "nodes", record.node
    if record.state != "live":
        yield warn(name, f"{node} is {record.state}", "start it again when its work is done")
    if told is None:
        yield warn(name, f"{node} (version {record.version}) tells no facts", "update it")
        return
    for reason in told.reasons:
        if reason != "draining":
            yield fail(name, f"{node} is not ready: {reason}", f"see its log on {record.host}")
    if facts.now - told.at > 2 * facts.ttl:
        late = lasting(facts.now - told.at)
        yield fail(name, f"{node} has completed no heartbeat for {late}, though it sends some", "see its log")
    rows = len({entry.epoch for entry in facts.tuples if entry.node == node})
    if record.state == "live" and abs(rows - told.sessions) > max(2, told.sessions // 10):
        text = f"{node} tells {told.sessions} sessions, and the registry has tuples of {rows}"
        yield warn(name, text, "ask again; if it stays so, see its log (registry_unavailable, tuples_restored)")
    if told.notes_dropped:
        yield warn(name, f"{node} could not write {told.notes_dropped} departures and refusals", "see its log")


def ports(facts: Cluster) -> Iterator[Finding]:
    """Check ports and descriptors of the nodes, and ranges that overlap on one PS IP."""
    name, found = "ports", []
    for told in facts.facts:
        if told.node in {record.node for record in facts.nodes}:
            found += list(_used_up(told))
    found += list(_shared_ranges(facts))
    yield from found
    if not found and facts.nodes:
        yield ok(name, "no range is nearly used up, and none overlaps another one")


def _used_up(told: NodeFacts) -> Iterator[Finding]:
    size, taken = told.ports_free + told.ports_used + told.ports_resting, told.ports_used + told.ports_resting
    text = f"{told.node} uses {told.ports_used} of {size} guarded ports ({told.port_range}), {told.ports_resting} rest"
    fix = "use a larger broker.port_range, or another node"
    if size and not told.ports_free:
        yield fail("ports", f"{text}: it can take no further agent", fix)
    elif size and taken >= NEARLY * size:
        yield warn("ports", text, fix)
    if told.descriptor_limit and told.descriptors >= NEARLY * told.descriptor_limit:
        full = told.descriptors >= told.descriptor_limit - 1
        text = f"{told.node} has {told.descriptors} of {told.descriptor_limit} descriptors open"
        yield (fail if full else warn)("ports", text, "raise LimitNOFILE (ulimit -Hn)")


def _shared_ranges(facts: Cluster) -> Iterator[Finding]:
    living = {record.node for record in facts.nodes}
    ranges = [
        (told.node, told.ip, key, *parse_range(text))
        for told in facts.facts
        if told.node in living
        for key, text in (("broker.port_range", told.port_range), ("broker.open_ports.range", told.open_range))
        if text
    ]
    for number, (one, ip, key, low, high) in enumerate(ranges):
        for other, other_ip, other_key, other_low, other_high in ranges[number + 1 :]:
            if one != other and ip == other_ip and low <= other_high and other_low <= high:
                text = f"{one} ({key} {low}-{high}) and {other} ({other_key} {other_low}-{other_high}) share {ip}"
                yield fail("ports", f"{text}, and their ranges overlap", "give each node of one PS IP its own range")


def clocks(facts: Cluster) -> Iterator[Finding]:
    """Check the nodes' clocks against the registry's, and so against each other's."""
    name, window = "clock", facts.config.broker.dial_window
    offsets = {told.node: told.clock_offset for told in facts.facts if told.clock_offset is not None}
    living = {record.node for record in facts.nodes}
    bad = False
    for node, offset in sorted(offsets.items()):
        if node not in living or abs(offset) <= CLOCK_WARNS:
            continue
        bad = True
        text = f"the clock of {node} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the registry's"
        if abs(offset) >= CLOCK_FAILS * window:
            yield fail(name, f"{text}, and Dials are refused from {window:g} s on", "set it (NTP)")
        else:
            yield warn(name, text, "set it (NTP)")
    if offsets and not bad:
        yield ok(name, f"{len(offsets)} nodes, at most {max(map(abs, offsets.values())):.1f} s off the registry's")


# --- agents ---------------------------------------------------------------------------------------


def agents(facts: Cluster) -> Iterator[Finding]:
    """Check that agents have sessions on two nodes and hosts, where there are two."""
    name = "agents"
    live = {record.node: record.host for record in facts.nodes if record.state == "live"}
    of_agent: dict[str, set[str]] = defaultdict(set)
    for entry in facts.tuples:
        of_agent[_agent(entry.namespace, entry.agent_id)].add(entry.node)
    dead = sorted(agent for agent, on in of_agent.items() if not on & set(live))
    single = sorted(agent for agent, on in of_agent.items() if len(on & set(live)) == 1)
    one_host = sorted(
        agent
        for agent, on in of_agent.items()
        if len(on & set(live)) > 1 and len({live[n] for n in on & set(live)}) == 1
    )
    if dead:
        text = f"{listed(dead)}: every session is on a node that is dead or draining"
        yield fail(name, text, "see the nodes, and the agents' logs")
    if single and len(live) > 1:
        pinned = {of_agent[agent] & set(live) and min(of_agent[agent] & set(live)) for agent in single}
        hint = f", all on {min(pinned)}" if len(pinned) == 1 and len(single) > 1 else ""
        text = f"below 2 of 2, on one node only{hint}: {listed(single)}"
        fix = "see whether the VIP pins by source (rtunnel doctor --role agent there), or redundancy is 1"
        yield warn(name, text, fix)
    if one_host and len(set(live.values())) > 1:
        yield warn(name, f"both sessions on one host: {listed(one_host)}", "see broker.host, and how the VIP spreads")
    if len(live) == 1 and of_agent:
        yield warn(name, f"there is one live node, {min(live)}: no agent has a second session", "start another broker")
    good = len(of_agent) - len(dead) - len(single)
    if of_agent:
        yield ok(name, f"{good} of {len(of_agent)} agents have two sessions")
    elif facts.nodes:
        yield warn(name, "no agent is registered", "see an agent's log, or rtunnel doctor --role agent there")


def _agent(namespace: str, agent_id: str) -> str:
    return agent_id if namespace == "default" else f"{namespace}/{agent_id}"


def claims(facts: Cluster) -> Iterator[Finding]:
    """Check that no two hosts are one agent, and no two agents claim one address."""
    name, found = "claims", False
    for node in facts.nodes:
        for claim in node.duplicates:
            found = True
            text = f"two hosts are agent {_agent(claim.namespace, claim.agent_id)}: {claim.holder} has the sessions"
            fix = "stop one of them, or give it an agent_id of its own (a cloned machine?)"
            yield fail(name, f"{text}, {claim.refused} was refused by {node.node}", fix)
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in facts.tuples:
        owners[entry.namespace, entry.agent_ip].add(entry.agent_id)
    taken, there = Refusal.ADDRESS_TAKEN.value, {(entry.namespace, entry.agent_id) for entry in facts.tuples}
    for refusal in {(note.namespace, note.agent_id, note.cause): note for note in facts.refusals}.values():
        if facts.now - refusal.at > RECENT:
            continue
        found = True
        who = _agent(refusal.namespace, refusal.agent_id)
        where = f"{who} ({', '.join(refusal.addresses[:3])}; link from {refusal.peer or 'an unknown address'})"
        text = f"{where} is refused by {refusal.node}: {refusal.cause}: {refusal.text}"
        if refusal.cause == taken:
            yield fail(name, text, "one of the two agents has a wrong agent.addresses (docker0's address?)")
        elif refusal.proved and (refusal.namespace, refusal.agent_id) not in there:
            yield fail(name, f"{text}, and it has no session", "see docs/refusals, and the agent's log")
        else:  # anybody can send the name of an agent
            unproved = "" if refusal.proved else " (the name is only claimed)"
            yield warn(name, f"{text}{unproved}", "see docs/refusals, and the agent's log")
    for (namespace, ip), holders in sorted(owners.items()):
        if len(holders) > 1:
            found = True
            text = f"{ip} in namespace {namespace} has tuples of {listed(sorted(holders))}"
            yield fail(name, text, "stop one of them; the gateways dial either")
    if not found and owners:
        yield ok(name, f"{len(owners)} addresses, each of one agent")


# --- gateways, namespaces, loops ------------------------------------------------------------------


def gateways(facts: Cluster) -> Iterator[Finding]:
    """Check that the gateways' tables are fresh, and that the nodes answer them."""
    name, living = "gateways", {record.node for record in facts.nodes}
    if not facts.gateways:
        yield warn(name, "no gateway is registered", "start one, or update those of an older version")
        return
    good = 0
    for gateway in facts.gateways:
        found = list(_gateway_faults(gateway, living, facts))
        good += not found
        yield from found
    if good:
        yield ok(name, f"{good} of {len(facts.gateways)} have a fresh table, and every node answers them")


def _gateway_faults(gateway: GatewayRecord, living: set[str], facts: Cluster) -> Iterator[Finding]:
    name, who = "gateways", gateway.name
    age = None if gateway.routes_age is None else gateway.routes_age + max(0.0, facts.now - gateway.at)
    if gateway.fault or age is None or age > 2 * facts.ttl:
        how = "was never filled" if age is None else f"is {age:.1f} s old"
        reason = f": {gateway.fault}" if gateway.fault else ""
        yield fail(name, f"the table of {who} {how}{reason}", "see its way to Redis, and its log")
    for node in gateway.suspects:
        if node in living:
            text = f"{node} does not answer {who}, though its heartbeat is there"
            fix = f"look for a firewall between them, and at broker.advertise_ip and the MTU: doctor on {gateway.host}"
            yield fail(name, text, fix)
    if gateway.state != "live":
        yield warn(name, f"{who} is {gateway.state}", "start it again when its work is done")


def namespaces(facts: Cluster) -> Iterator[Finding]:
    """Check that gateways and agents use the same namespaces."""
    name = "namespaces"
    served = {gateway.namespace for gateway in facts.gateways}
    used = {entry.namespace for entry in facts.tuples}
    if not served or not used:
        return
    empty, unserved = sorted(served - used), sorted(used - served)
    fix = "give agent.namespace and gateway.namespace the same word"
    if empty and unserved:
        text = f"gateways serve {listed(empty)}, where no agent is, and no gateway serves {listed(unserved)}"
        yield fail(name, text, fix)
    elif unserved:
        yield warn(name, f"agents are in {listed(unserved)}, which no gateway serves", fix)
    elif empty:
        yield warn(name, f"gateways serve {listed(empty)}, where no agent is", fix)
    else:
        yield ok(name, f"{listed(sorted(used))}: each has gateways and agents")


def loops(facts: Cluster) -> Iterator[Finding]:
    """Check that no target is a port of a broker, a gateway, Redis or the VIP.

    An agent on such a machine may have its address, as long as it does not expose the port.
    """
    name, own = "loops", list(_own_ports(facts))
    found: dict[tuple[str, str], Finding] = {}
    for entry in facts.tuples:
        exposed = parse_exposes([word for word in entry.exposes.split(",") if word])
        for what, ip, low, high in own:
            if ip != entry.agent_ip:
                continue
            agent, key = _agent(entry.namespace, entry.agent_id), (entry.agent_ip, what)
            if any(first <= high and low <= last for first, last in exposed):
                text = f"{ip} is a target of {agent}, which exposes a port of {what}: a client's dial can loop"
                fix = f"leave {low if low == high else f'{low}-{high}'} out of agent.exposes, or the address"
                found[key] = fail(name, text, fix)
            else:
                text = f"{ip} is a target of {agent}, and also the address of {what}"
                found.setdefault(key, warn(name, text, "see that this is intended"))
    yield from found.values()
    if facts.tuples and not found:
        yield ok(name, "no target is an address of a broker, a gateway, Redis or a known VIP")


def _own_ports(facts: Cluster) -> Iterator[tuple[str, str, int, int]]:
    """Yield (what, IP, first port, last port) of all that belongs to the cluster itself."""
    told = {entry.node: entry for entry in facts.facts}
    for record in facts.nodes:
        text = told[record.node].port_range if record.node in told else ""
        yield f"the broker {record.node}", record.ip, *(parse_range(text) if text else (0, 0))
    for gateway in facts.gateways:
        host, port = parse_endpoint(gateway.listen) if gateway.listen else ("", 0)
        if host and not ipaddress.ip_address(host).is_unspecified:
            yield f"the gateway {gateway.name}", host, port, port
    for host, port in (*facts.vips, *_redis_places(facts.config.registry.url)):
        try:
            ip = canonical_ip(host)
        except ValueError:
            continue  # a name: its addresses are the business of the machine that resolves it
        yield f"{'the VIP' if (host, port) in facts.vips else 'Redis'} {format_endpoint(ip, port)}", ip, port, port


def _redis_places(url: str) -> Iterator[tuple[str, int]]:
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss") and parts.hostname:
        yield parts.hostname, parts.port or _REDIS_PORT


def versions(facts: Cluster) -> Iterator[Finding]:
    """Show the versions of the nodes and gateways."""
    found = sorted({record.version for record in facts.nodes} | {gateway.version for gateway in facts.gateways})
    if len(found) > 1:
        yield warn("versions", f"nodes and gateways are of {listed(found)}", "finish the update")
    elif found:
        yield ok("versions", f"every node and gateway is of {found[0]}")


def registry(facts: Cluster) -> Iterator[Finding]:
    """Check the registry's server."""
    if facts.registry is not None:
        yield from redis(facts.registry)


CHECKS: Final[Sequence[Check]] = (
    nodes,
    ports,
    clocks,
    agents,
    claims,
    gateways,
    namespaces,
    loops,
    versions,
    registry,
)
