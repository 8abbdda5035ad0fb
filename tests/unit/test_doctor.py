"""The doctor's checks of one machine, by tables of facts: each fault has its finding, and good facts have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rtunnel.config import Config, Problem, load
from rtunnel.doctor import checks
from rtunnel.doctor.facts import (
    Certificate,
    Endpoint,
    Kernel,
    Machine,
    OwnAddress,
    OwnRole,
    Path,
    RedisFacts,
    Session,
    Sessions,
)
from rtunnel.doctor.findings import Finding, Level, fail, in_order, listed
from rtunnel.netlink import Interface, Route

NOW = 1_800_000_000.0
DAY = 86400.0


def config(role: str, **keys: object) -> Config:
    common = {"agent.agent_id": "host-7", "agent.brokers": ["vip.example:7000"], "agent.addresses": ["10.1.0.7"]}
    given = {f"{role}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return load(None, {}, (common if role == "agent" else {}) | given)


LO = Interface("lo", "", ("127.0.0.1/8", "::1/128"))
ETH = Interface("eth0", "", ("10.1.0.7/24", "fe80::1/64"), 1500)
DOCKER = Interface("docker0", "bridge", ("172.17.0.1/16",), 1500)
#: A host's own bridge, with hardware in it, as hypervisors have.
BRIDGE = Interface("br0", "bridge", ("10.1.0.7/24",), 1500, has_hardware=True)
VIP = Endpoint(
    "agent.brokers", "vip.example:7000", "10.9.0.1", "eth0", source="10.1.0.7", connects=6, connected=6,
    connect_ms=1.0, secure=True, certificates=("aa", "bb"), path=Path(1448, 1500, 16384, True, 0),
)  # fmt: skip
CERTIFICATE = Certificate(
    "agent.certificate", "host-7.pem", "", "agent/default/host-7", ("10.1.0.7",), NOW - DAY, NOW + 89 * DAY
)
KERNEL = Kernel((32768, 60999), "", False, True, 1024, 1_048_576)
READY = OwnRole(
    "127.0.0.1:7071", "", True, (), (), {"version": "1", "sessions_wanted": 2, "sessions": [
        {"node": "b1", "since": NOW - 600}, {"node": "b2", "since": NOW - 600},
    ]},
)  # fmt: skip
REDIS = RedisFacts(
    "redis://10.0.0.5:6379/0", "", "7.2.4", (0.2, 0.3, 9.0), 0.004, "master", 1, "noeviction", 1 << 20, 1 << 30
)
AGENT = Machine(
    "agent", config("agent"), NOW, (), (), KERNEL, (LO, ETH, DOCKER), (Route("0.0.0.0/0", "eth0"),),
    (OwnAddress("10.1.0.7", True),), (VIP,), (CERTIFICATE,), None, READY,
)  # fmt: skip
BROKER_CERTIFICATE = replace(CERTIFICATE, key="broker.certificate", path="broker.pem", subject="broker/b1")
BROKER = Machine(
    "broker", config("broker"), NOW, (), (), KERNEL, (LO, ETH), certificates=(BROKER_CERTIFICATE,), registry=REDIS,
    own=replace(READY, status={"sessions": 100}),
)  # fmt: skip
GATEWAY = Machine("gateway", config("gateway"), NOW, (), (), KERNEL, (LO, ETH), registry=REDIS)


def found(facts: Machine, level: Level = Level.FAIL) -> list[Finding]:
    return [finding for finding in checks.judge(facts) if finding.level is level]


def texts(findings: Sequence[Finding]) -> str:
    return "\n".join(finding.line for finding in findings)


@pytest.mark.parametrize("facts", [AGENT, BROKER, GATEWAY, replace(AGENT, interfaces=(LO, BRIDGE, DOCKER))])
def test_a_healthy_machine_has_no_finding_but_ok(facts: Machine) -> None:
    """Each check that concerns the role says so."""
    findings = checks.judge(facts)
    assert {finding.level for finding in findings} == {Level.OK}, texts(findings)
    names = {finding.check for finding in findings}
    assert {"config", "routes", "clock", "descriptors"} <= names
    if facts.role == "agent":
        assert {"addresses", "brokers", "path", "certificates", "role"} <= names
    else:
        assert {"ports", "registry"} <= names


def agent(**changes: Any) -> Machine:
    return replace(AGENT, **changes)


def vip(**changes: Any) -> Machine:
    return agent(endpoints=(replace(VIP, **changes),))


def address(ip: str, here: bool = True) -> tuple[OwnAddress, ...]:
    return (OwnAddress(ip, here),)


def redis(**changes: Any) -> Machine:
    return replace(BROKER, registry=replace(REDIS, **changes))


def certificate(**changes: Any) -> Machine:
    return agent(certificates=(replace(CERTIFICATE, **changes),))


LONELY = {"sessions_wanted": 2, "sessions": [{"node": "b1", "since": NOW - 600}]}

FAULTS: dict[str, tuple[Machine, str, str]] = {
    "address of docker0": (
        agent(addresses=address("172.17.0.1")),
        "addresses",
        "172.17.0.1 is on docker0 (bridge), which many hosts have with the same address",
    ),
    "address of a veth": (
        agent(addresses=address("10.5.0.1"), interfaces=(ETH, Interface("veth12ab", "veth", ("10.5.0.1/24",)))),
        "addresses",
        "10.5.0.1 is on veth12ab (veth)",
    ),
    "address of a bridge without hardware": (
        agent(addresses=address("10.5.0.1"), interfaces=(ETH, Interface("lab0", "bridge", ("10.5.0.1/24",)))),
        "addresses",
        "10.5.0.1 is on lab0 (bridge)",
    ),
    "address of nobody": (
        agent(addresses=address("10.1.0.9", False)),
        "addresses",
        "10.1.0.9 is on no interface of this host",
    ),
    "address of nobody, with ip_nonlocal_bind": (
        agent(addresses=address("10.1.0.9"), kernel=replace(KERNEL, nonlocal_bind=True)),
        "addresses",
        "10.1.0.9 is on no interface of this host",
    ),
    "no address at all": (agent(addresses=()), "addresses", "this host has no default route"),
    "docker0 hides the VIP": (
        vip(ip="172.17.3.4", interface="docker0"),
        "routes",
        "packets to vip.example:7000 (172.17.3.4:7000) (agent.brokers) leave through docker0",
    ),
    "docker0 hides the host's network": (
        agent(interfaces=(LO, replace(ETH, addresses=("172.17.9.7/24",)), DOCKER), addresses=address("172.17.9.7")),
        "routes",
        "docker0 has 172.17.0.0/16, which hides hosts of 172.17.9.0/24 (eth0)",
    ),
    "docker0 covers the agent's address": (
        agent(
            interfaces=(LO, replace(LO, name="dummy0", kind="dummy", addresses=("172.17.9.7/32",)), DOCKER),
            addresses=address("172.17.9.7"),
        ),
        "routes",
        "docker0 has 172.17.0.0/16, which covers the agent's address 172.17.9.7",
    ),
    "firewall between gateway and broker": (
        replace(GATEWAY, endpoints=(Endpoint("node b2", "10.0.0.2:20001", "10.0.0.2", "eth0", error="no answer"),)),
        "brokers",
        "b2 at 10.0.0.2:20001 can't be connected: no answer. Fix: look for a firewall between this gateway and that",
    ),
    "MTU black hole between gateway and broker": (
        replace(
            GATEWAY,
            endpoints=(replace(VIP, key="node b2", name="10.9.0.1:20001", path=Path(1448, 1500, 16384, False, 4)),),
        ),
        "path",
        "b2 at 10.9.0.1:20001 takes connections, but not 16384 bytes in full segments",
    ),
    "no route": (vip(interface=""), "routes", "no route leads to vip.example:7000"),
    "the agent has the VIP's address": (
        agent(addresses=(*AGENT.addresses, OwnAddress("10.9.0.1", True))),
        "routes",
        "10.9.0.1 is agent.brokers and also one of the agent's addresses",
    ),
    "VIP down": (vip(error="connection refused"), "brokers", "can't be connected: connection refused"),
    "one broker of several is down": (
        vip(error="no answer within 5 s", connected=3),
        "brokers",
        "no answer within 5 s (3 of 6 connects worked)",
    ),
    "name not known": (
        vip(ip="", connected=0, error="the name vip.example is not resolved: x"),
        "brokers",
        "is not resolved: x. Fix: check the name, and the host's DNS",
    ),
    "VIP leads to a wrong port": (
        vip(not_tls=True, tls_error="wrong version number"),
        "brokers",
        "takes connections, and no rtunnel broker answers: wrong version number. Fix: check the port in agent.brokers",
    ),
    "VIP leads to another TLS server": (vip(alpn=False), "brokers", "speaks TLS, but not for links of rtunnel"),
    "another CA": (
        vip(tls_error="the certificate is not accepted: unable to get local issuer certificate"),
        "brokers",
        "speaks TLS, but the certificate is not accepted",
    ),
    "VIP pins by source": (
        agent(endpoints=(replace(VIP, certificates=("aa",)),), own=replace(READY, status=LONELY)),
        "brokers",
        "6 connects to vip.example:7000 (10.9.0.1:7000) lead to one certificate, and the agent has a session on b1",
    ),
    "MTU black hole": (
        vip(path=Path(1448, 1500, 16384, False, 4)),
        "path",
        "takes connections, but not 16384 bytes in full segments (MTU 1500, segments of 1448 bytes)",
    ),
    "clock 60 s off": (redis(offset=-60.2), "clock", "this clock is 60.2 s behind the registry's, and Dials are"),
    "no descriptors": (
        replace(GATEWAY, own=replace(READY, status={"descriptors": 1023, "descriptor_limit": 1024})),
        "descriptors",
        "the running gateway has 1023 of 1024 descriptors open",
    ),
    "ports used up": (
        replace(BROKER, own=replace(READY, status={"sessions": 10000})),
        "ports",
        "10000 sessions use all 10000 ports of broker.port_range",
    ),
    "certificate expired": (certificate(ends=NOW - DAY), "certificates", "host-7.pem expired at 2027-01-14"),
    "certificate of another CA": (
        certificate(issuer_error="the certificate is not from a CA in force"),
        "certificates",
        "is not accepted by the CAs of agent.ca: the certificate is not from a CA in force",
    ),
    "certificate revoked": (
        certificate(issuer_error="the certificate of agent/default/host-7 is revoked"),
        "certificates",
        "is revoked",
    ),
    "certificate of a broker": (certificate(subject="broker/b1"), "certificates", "of broker/b1, not of a agent"),
    "certificate of another agent": (
        certificate(subject="agent/blue/host-7"),
        "certificates",
        "is of agent/blue/host-7, and this is agent/default/host-7",
    ),
    "certificate without the address": (
        certificate(addresses=("10.1.0.8",)),
        "certificates",
        "does not name 10.1.0.7, which agent.addresses has",
    ),
    "unreadable certificate": (certificate(error="x.pem: has no PEM certificate"), "certificates", "no PEM"),
    "Redis down": (redis(error="no answer within 1 s"), "registry", "no answer within 1 s"),
    "Redis evicts": (redis(policy="allkeys-lru"), "registry", "maxmemory-policy is allkeys-lru, so Redis may drop"),
    "Redis full": (redis(used=1 << 30), "registry", "uses 1024 of 1024 MiB (maxmemory)"),
    "replica": (redis(role="slave"), "registry", "is a replica, which takes no writes"),
    "ACL": (redis(denied=("EVALSHA", "XADD")), "registry", "the user's ACL denies EVALSHA, XADD"),
    "role not ready": (
        agent(own=replace(READY, ready=False, reasons=("0 of 2 sessions",))),
        "role",
        "the agent at 127.0.0.1:7071 is not ready: 0 of 2 sessions",
    ),
    "a key is missing": (
        agent(problems=(Problem("x.toml", "agent.ca", "is not given", "give it"),)),
        "config",
        "agent.ca: is not given. Fix: give it",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str) -> None:
    """By a FAIL of the right check, with its text and a fix."""
    facts, check, text = FAULTS[name]
    findings = [finding for finding in found(facts) if finding.check == check]
    assert text in texts(findings), texts(checks.judge(facts))
    assert all(finding.fix for finding in findings)


WARNINGS: dict[str, tuple[Machine, str, str]] = {
    "loopback": (
        agent(addresses=address("127.1.0.1"), certificates=()),
        "addresses",
        "127.1.0.1 is a loopback address",
    ),
    "no netlink": (agent(interfaces=None), "addresses", "the interfaces can't be read"),
    "two networks overlap": (
        agent(interfaces=(LO, ETH, Interface("eth1", "", ("10.1.0.9/16",)))),
        "routes",
        "10.1.0.0/24 (eth0) and 10.1.0.0/16 (eth1) overlap",
    ),
    "segments are sent again": (vip(path=Path(1448, 1500, 16384, True, 2)), "path", "2 segments to vip.example:7000"),
    "small segments": (vip(path=Path(500, 552, 16384, True, 0)), "path", "segments of 500 bytes, which is small"),
    "clock 3 s off": (redis(offset=3.0), "clock", "3.0 s ahead of the registry's"),
    "nothing sets the clock": (
        agent(kernel=replace(KERNEL, clock_synchronised=False)),
        "clock",
        "nothing synchronises this clock",
    ),
    "ports nearly used": (
        replace(BROKER, own=replace(READY, status={"sessions": 9001})),
        "ports",
        "9001 sessions use 10000 ports",
    ),
    "more sessions than ports": (
        replace(BROKER, config=config("broker", max_sessions=20000)),
        "ports",
        "broker.max_sessions is 20000, and broker.port_range has 10000 ports",
    ),
    "more clients than source ports": (
        replace(GATEWAY, config=config("gateway", max_clients=50000)),
        "ports",
        "gateway.max_clients is 50000, and 28232 source ports",
    ),
    "certificate ends": (
        certificate(issued=NOW - 87 * DAY, ends=NOW + 3 * DAY),
        "certificates",
        "host-7.pem ends at 2027-01-18",
    ),
    "certificate of tomorrow": (certificate(issued=NOW + DAY), "certificates", "which is later than now"),
    "Redis could evict": (redis(policy="allkeys-lru", most=0), "registry", "maxmemory-policy is allkeys-lru"),
    "Redis nearly full": (redis(used=1000 << 20), "registry", "uses 1000 of 1024 MiB"),
    "Redis slow": (redis(latency_ms=(25.0, 30.0, 40.0)), "registry", "answers a PING in 30.0 ms"),
    "role does not run": (
        agent(own=OwnRole("127.0.0.1:7071", "refused")),
        "role",
        "no agent answers at 127.0.0.1:7071: refused",
    ),
    "one session of two": (agent(own=replace(READY, status=LONELY)), "role", "the agent has 1 of 2 sessions"),
    "one session of two, since a moment ago": (
        agent(
            endpoints=(replace(VIP, certificates=("aa",)),),
            own=replace(READY, status=LONELY | {"sessions": [{"node": "b1", "since": NOW - 5}]}),
        ),
        "brokers",
        "lead to one certificate",
    ),
    "descriptors nearly used": (
        replace(GATEWAY, own=replace(READY, status={"descriptors": 1000, "descriptor_limit": 1024})),
        "descriptors",
        "the running gateway has 1000 of 1024 descriptors open",
    ),
    "session without tuple": (
        replace(BROKER, sessions=Sessions((Session("default/a1", "7"), Session("default/a2", "8")), ("7",))),
        "sessions",
        "1 of 2 sessions have no tuple in the registry: default/a2",
    ),
    "an agent that the broker doubts": (
        replace(BROKER, sessions=Sessions((Session("default/a1", "7", ("172.17.0.1 is on docker0",)),), ("7",))),
        "sessions",
        "default/a1: 172.17.0.1 is on docker0",
    ),
    "sessions that can't be read": (
        replace(BROKER, sessions=Sessions((), (), "no token")),
        "sessions",
        "the broker's sessions can't be read: no token",
    ),
    "warning of the role": (agent(own=replace(READY, warnings=("one host",))), "role", "one host"),
    "warning of the configuration": (
        replace(BROKER, warnings=(Problem("x", "broker.port_range", "30000-40000 overlaps the ports", "use others"),)),
        "config",
        "broker.port_range: 30000-40000 overlaps the ports. Fix: use others",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_each_doubt_is_named(name: str) -> None:
    """By a WARN with a fix; none of them is a FAIL."""
    facts, check, text = WARNINGS[name]
    findings = [finding for finding in found(facts, Level.WARN) if finding.check == check]
    assert text in texts(findings), texts(checks.judge(facts))
    assert all(finding.fix for finding in findings)
    assert not found(facts), texts(found(facts))


def test_a_vip_with_one_certificate_is_no_fault_by_itself() -> None:
    """Brokers may share a certificate: the agent's sessions say how many brokers there are."""
    facts = vip(certificates=("aa",))
    assert "the agent has sessions on b1, b2" in texts(found(facts, Level.OK))
    assert "one certificate (one broker, or several" in texts(found(replace(facts, own=None), Level.OK))


def test_plain_links_are_not_judged_by_tls() -> None:
    """A plain link has no TLS to look at."""
    facts = vip(secure=False, alpn=True, certificates=())
    assert not found(facts)


def test_a_container_may_live_on_a_veth() -> None:
    """Its eth0 is one end of a veth, and is the address that others see."""
    eth = replace(ETH, kind="veth")
    assert not found(agent(interfaces=(LO, eth)))


def test_findings_are_lines_the_worst_first() -> None:
    """Values from elsewhere are escaped, and lists are cut."""
    findings = in_order(
        [Finding(Level.OK, "a", "x"), Finding(Level.WARN, "b", "y", "z"), fail("c", "bad\n\x1b[1m", "f")]
    )
    assert [finding.level for finding in findings] == [Level.FAIL, Level.WARN, Level.OK]
    assert "\n" not in findings[0].line and "\x1b" not in findings[0].line
    assert findings[1].line == "WARN  b             y. Fix: z"
    assert listed([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
