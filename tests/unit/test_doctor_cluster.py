"""The doctor's checks of a cluster, by tables of facts: each fault has its finding, and good facts have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from rtunnel.config import load
from rtunnel.doctor import cluster
from rtunnel.doctor.cluster import Cluster
from rtunnel.doctor.facts import RedisFacts
from rtunnel.doctor.findings import Finding, Level
from rtunnel.registry import Duplicate, GatewayRecord, NodeFacts, NodeRecord, Tuple
from rtunnel.registry.history import RefusedAgent
from rtunnel.registry.memory import MemoryRegistry

NOW = 1_800_000_000.0


def node(number: int, **changes: Any) -> NodeRecord:
    name = f"b{number}"
    record = NodeRecord(name, f"host-{name}", f"10.0.0.{number}", 1, "live", "1.0", 2, beat=NOW - 1)
    return msgspec.structs.replace(record, **changes)


def told(number: int, **changes: Any) -> NodeFacts:
    facts = NodeFacts(
        node=f"b{number}", host=f"host-b{number}", ip=f"10.0.0.{number}", version="1.0", sessions=2,
        port_range="20000-29999", ports_free=9998, ports_used=2, descriptors=100, descriptor_limit=1000,
        clock_offset=0.01, at=NOW - 1,
    )  # fmt: skip
    return msgspec.structs.replace(facts, **changes)


def gateway(**changes: Any) -> GatewayRecord:
    record = GatewayRecord(
        name="g1", host="host-g1", namespace="default", version="1.0", listen="10.0.0.50:1080",
        routes_age=0.4, at=NOW - 1,
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


def entry(agent: int, on: int, **changes: Any) -> Tuple:
    made = Tuple(
        "default", f"10.1.0.{agent}", 0, f"10.0.0.{on}", 20000 + agent, f"b{on}", (1 << 32) + agent * 10 + on,
        f"a{agent}", "live", "22", NOW - 1,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def refused(cause: str, at: float = NOW - 5) -> RefusedAgent:
    return RefusedAgent(
        namespace="default", agent_id="a9", addresses=("10.1.0.1",), node="b2", peer="192.0.2.9", cause=cause,
        text="10.1.0.1 belongs to a1", proved=True, at=at,
    )  # fmt: skip


TUPLES = (entry(1, 1), entry(1, 2), entry(2, 1), entry(2, 2))
REDIS = RedisFacts("redis://10.0.0.5:6379/0", "", "7.2.4", (0.2,), 0.0, "master", 1, "noeviction", 1 << 20, 1 << 30)
CONFIG = load(None, {}, {"registry.url": "redis://10.0.0.5:6379/0"})
HEALTHY = Cluster(
    CONFIG, NOW, 8.0, (node(1), node(2)), (told(1), told(2)), (gateway(),), TUPLES, (), REDIS, (("10.9.0.1", 7000),)
)


def whole(**changes: Any) -> Cluster:
    return replace(HEALTHY, **changes)


def texts(findings: Sequence[Finding]) -> str:
    return "\n".join(finding.line for finding in findings)


def of(facts: Cluster, level: Level) -> list[Finding]:
    return [finding for finding in cluster.judge(facts) if finding.level is level]


def test_a_healthy_cluster_has_no_finding_but_ok() -> None:
    """Each check says so."""
    findings = cluster.judge(HEALTHY)
    assert {finding.level for finding in findings} == {Level.OK}, texts(findings)
    assert [finding.check for finding in findings] == [
        "nodes", "ports", "clock", "agents", "claims", "gateways", "namespaces", "loops", "versions", "registry",
    ]  # fmt: skip


FAULTS: dict[str, tuple[Cluster, str, str]] = {
    "no node": (whole(nodes=(), facts=(), tuples=()), "nodes", "no broker has a heartbeat in this registry"),
    "dead node": (
        whole(nodes=(node(1),), facts=(told(1), told(2, at=NOW - 42))),
        "nodes",
        "b2 (10.0.0.2) died: its last heartbeat was 42 s ago",
    ),
    "node not ready": (
        whole(facts=(told(1), told(2, reasons=("registry: wrong password",)))),
        "nodes",
        "b2 is not ready: registry: wrong password",
    ),
    "node without a complete heartbeat": (
        whole(facts=(told(1), told(2, at=NOW - 60))),
        "nodes",
        "b2 has completed no heartbeat for 60 s, though it sends some",
    ),
    "ports used up": (
        whole(facts=(told(1, ports_free=0, ports_used=9000, ports_resting=1000), told(2))),
        "ports",
        "b1 uses 9000 of 10000 guarded ports (20000-29999), 1000 rest: it can take no further agent",
    ),
    "no descriptors": (
        whole(facts=(told(1, descriptors=1000), told(2))),
        "ports",
        "b1 has 1000 of 1000 descriptors open",
    ),
    "ranges overlap on one PS IP": (
        whole(facts=(told(1), told(2, ip="10.0.0.1", port_range="25000-26000"))),
        "ports",
        "b1 (broker.port_range 20000-29999) and b2 (broker.port_range 25000-26000) share 10.0.0.1",
    ),
    "clock 60 s off": (
        whole(facts=(told(1), told(2, clock_offset=60.4))),
        "clock",
        "the clock of b2 is 60.4 s ahead of the registry's, and Dials are refused from 30 s on",
    ),
    "agent on a dead node only": (
        whole(tuples=(*TUPLES, entry(3, 3))),
        "agents",
        "a3: every session is on a node that is dead or draining",
    ),
    "cloned agent_id": (
        whole(nodes=(node(1), node(2, duplicates=(Duplicate("default", "a1", "h1 10.1.0.1", "h2 10.1.0.9"),)))),
        "claims",
        "two hosts are agent a1: h1 10.1.0.1 has the sessions, h2 10.1.0.9 was refused by b2",
    ),
    "two agents claim one IP": (
        whole(refusals=(refused("address_taken"),)),
        "claims",
        "a9 (10.1.0.1; link from 192.0.2.9) is refused by b2: address_taken: 10.1.0.1 belongs to a1",
    ),
    "an agent that is refused everywhere": (
        whole(refusals=(refused("ports_exhausted"),)),
        "claims",
        "is refused by b2: ports_exhausted: 10.1.0.1 belongs to a1, and it has no session",
    ),
    "two agents have one IP": (
        whole(tuples=(*TUPLES, entry(1, 2, agent_id="a7"))),
        "claims",
        "10.1.0.1 in namespace default has tuples of a1, a7",
    ),
    "stale table": (
        whole(gateways=(gateway(routes_age=26.0, fault="Redis 10.0.0.5 does not answer"),)),
        "gateways",
        "the table of g1 is 27.0 s old: Redis 10.0.0.5 does not answer",
    ),
    "stale table without a reason": (whole(gateways=(gateway(routes_age=60.0),)), "gateways", "of g1 is 61.0 s old"),
    "table never filled": (whole(gateways=(gateway(routes_age=None),)), "gateways", "the table of g1 was never filled"),
    "a node that does not answer a gateway": (
        whole(gateways=(gateway(suspects=("b2",)),)),
        "gateways",
        "b2 does not answer g1, though its heartbeat is there",
    ),
    "namespace mismatch": (
        whole(gateways=(gateway(namespace="blue"),)),
        "namespaces",
        "gateways serve blue, where no agent is, and no gateway serves default",
    ),
    "target is a broker": (
        whole(tuples=(*TUPLES, entry(3, 1, agent_ip="10.0.0.2", exposes="1-65535"), entry(3, 2, agent_ip="10.0.0.2"))),
        "loops",
        "10.0.0.2 is a target of a3, which exposes a port of the broker b2",
    ),
    "target is a gateway": (
        whole(tuples=(*TUPLES, entry(3, 1, agent_ip="10.0.0.50", exposes="22,1080"), entry(3, 2))),
        "loops",
        "10.0.0.50 is a target of a3, which exposes a port of the gateway g1",
    ),
    "target is Redis": (
        whole(tuples=(*TUPLES, entry(3, 1, agent_ip="10.0.0.5", exposes="6379"), entry(3, 2))),
        "loops",
        "10.0.0.5 is a target of a3, which exposes a port of Redis 10.0.0.5:6379",
    ),
    "target is the VIP": (
        whole(tuples=(*TUPLES, entry(3, 1, agent_ip="10.9.0.1", exposes="7000"), entry(3, 2))),
        "loops",
        "10.9.0.1 is a target of a3, which exposes a port of the VIP 10.9.0.1:7000",
    ),
    "Redis evicts": (whole(registry=replace(REDIS, policy="volatile-lru")), "registry", "volatile-lru"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str) -> None:
    """By a FAIL of the right check, with its text and a fix."""
    facts, check, text = FAULTS[name]
    findings = [finding for finding in of(facts, Level.FAIL) if finding.check == check]
    assert text in texts(findings), texts(cluster.judge(facts))
    assert all(finding.fix for finding in findings)


WARNINGS: dict[str, tuple[Cluster, str, str]] = {
    "draining node": (whole(nodes=(node(1), node(2, state="draining"), node(3))), "nodes", "b2 is draining"),
    "node without facts": (whole(facts=(told(1),)), "nodes", "b2 (version 1.0) tells no facts"),
    "other sessions than rows": (
        whole(facts=(told(1), told(2, sessions=40))),
        "nodes",
        "b2 tells 40 sessions, and the registry has tuples of 2",
    ),
    "dropped notes": (whole(facts=(told(1), told(2, notes_dropped=3))), "nodes", "b2 could not write 3 departures"),
    "ports nearly used": (
        whole(facts=(told(1, ports_free=500, ports_used=9500), told(2))),
        "ports",
        "b1 uses 9500 of 10000",
    ),
    "descriptors nearly used": (
        whole(facts=(told(1, descriptors=950), told(2))),
        "ports",
        "b1 has 950 of 1000 descriptors open",
    ),
    "clock 3 s off": (whole(facts=(told(1), told(2, clock_offset=-3.0))), "clock", "of b2 is 3.0 s behind"),
    "agent below 2/2": (whole(tuples=TUPLES[:3]), "agents", "below 2 of 2, on one node only: a2"),
    "agents pinned to one node": (
        whole(tuples=(entry(1, 1), entry(2, 1))),
        "agents",
        "below 2 of 2, on one node only, all on b1: a1, a2",
    ),
    "both on one host": (
        whole(nodes=(node(1), node(2, host="host-b1"), node(3)), facts=(told(1), told(2), told(3, sessions=0))),
        "agents",
        "both sessions on one host: a1, a2",
    ),
    "one node": (
        whole(nodes=(node(1),), facts=(told(1),), tuples=(entry(1, 1), entry(2, 1))),
        "agents",
        "there is one live node, b1",
    ),
    "no agent": (whole(tuples=(), facts=(told(1, sessions=0), told(2, sessions=0))), "agents", "no agent"),
    "refused, and elsewhere": (
        whole(refusals=(refused("revoked"),), tuples=(*TUPLES, entry(9, 1), entry(9, 2))),
        "claims",
        "a9 (10.1.0.1; link from 192.0.2.9) is refused by b2: revoked",
    ),
    "a claim": (
        whole(refusals=(msgspec.structs.replace(refused("bad_certificate"), proved=False),)),
        "claims",
        "bad_certificate: 10.1.0.1 belongs to a1 (the name is only claimed)",
    ),
    "no gateway": (whole(gateways=()), "gateways", "no gateway is registered"),
    "gateway drains": (whole(gateways=(gateway(state="draining"),)), "gateways", "g1 is draining"),
    "namespace without gateway": (
        whole(tuples=(*TUPLES, entry(3, 1, namespace="blue"), entry(3, 2, namespace="blue"))),
        "namespaces",
        "agents are in blue, which no gateway serves",
    ),
    "gateway without agents": (
        whole(gateways=(gateway(), gateway(name="g2", namespace="blue"))),
        "namespaces",
        "gateways serve blue, where no agent is",
    ),
    "a broker's machine is a target": (
        whole(tuples=(*TUPLES, entry(3, 1, agent_ip="10.0.0.2"), entry(3, 2, agent_ip="10.0.0.2"))),
        "loops",
        "10.0.0.2 is a target of a3, and also the address of the broker b2",
    ),
    "versions": (whole(gateways=(gateway(version="0.9"),)), "versions", "nodes and gateways are of 0.9, 1.0"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_each_doubt_is_named(name: str) -> None:
    """By a WARN with a fix; none of them is a FAIL."""
    facts, check, text = WARNINGS[name]
    findings = [finding for finding in of(facts, Level.WARN) if finding.check == check]
    assert text in texts(findings), texts(cluster.judge(facts))
    assert all(finding.fix for finding in findings)
    assert not of(facts, Level.FAIL), texts(of(facts, Level.FAIL))


def test_an_old_refusal_is_no_fault() -> None:
    """A refused agent tries again, so that its entry is new while the fault lasts."""
    assert not of(whole(refusals=(refused("address_taken", NOW - 600),)), Level.FAIL)


def test_agents_that_were_refused_lately_are_found_by_events() -> None:
    """Each once; other events, older ones and nonsense do not count."""
    registry = MemoryRegistry(ttl=3.0, quarantine=5.0)
    refusal = b'{"event":"session_refused","agent":"a9","code":"ports_exhausted"}'
    registry.publish([refusal, b'{"event":"session_opened","agent":"a1"}', b"nonsense", b"[]", refusal])
    now = registry.now()
    assert cluster.refused_lately(registry, now) == ["a9"]
    assert cluster.refused_lately(registry, now + 2 * cluster.RECENT) == []
