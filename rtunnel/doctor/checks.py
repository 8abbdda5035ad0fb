"""The checks of one machine. Each is pure: it takes the facts, and yields findings, one at least
when it concerns the role.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from rtunnel.clock import utc
from rtunnel.config import parse_range, role_sections
from rtunnel.doctor.facts import NODE, Certificate, Endpoint, Machine, OwnRole, RedisFacts
from rtunnel.doctor.findings import Finding, fail, in_order, listed, ok, warn
from rtunnel.netlink import CONTAINERS, Interface
from rtunnel.netlink import holder as holder_of

#: Seconds by which a clock may be off without a warning, as in `rtunnel status`.
CLOCK_WARNS: Final = 2.0
#: The part of `broker.dial_window` by which a clock may be off before it is a fault: two machines
#: with half of it each, one ahead and one behind, refuse each other's Dials.
CLOCK_FAILS: Final = 0.5
#: Days before its end from which a certificate is warned of.
SOON_DAYS: Final = 14
#: Milliseconds of a PING of Redis. A set-up waits for no call, but a beat of 50,000 sessions makes
#: 100 calls, one after the other.
SLOW_MS: Final = 20.0
#: The part of `maxmemory`, of a range of ports, or of the descriptors from which a warning is due.
NEARLY: Final = 0.9
#: The size of a TCP header with timestamps and of an IPv4 header, which the MSS leaves out.
HEADERS: Final = 52
#: A full segment on a path without tunnels: 1500 less the headers of IPv4 and TCP.
USUAL_MSS: Final = 1400
#: Seconds after which an agent without its second session is no longer only starting.
SETTLED: Final = 60.0

Check = Callable[[Machine], Iterator[Finding]]


def judge(facts: Machine) -> list[Finding]:
    """Return the findings of all checks, the worst first."""
    return in_order(finding for check in CHECKS for finding in check(facts))


def configuration(facts: Machine) -> Iterator[Finding]:
    """Check the keys and files that the role needs to start."""
    name = "config"
    for problem in facts.problems:
        yield fail(name, f"{problem.key}: {problem.reason}" if problem.key else problem.reason, problem.fix or _SEE)
    # Certificates that end, and their fixes, are a check of their own.
    shown = [problem for problem in facts.warnings if "expire" not in problem.reason]
    for problem in shown:
        yield warn(name, f"{problem.key}: {problem.reason}", problem.fix or _SEE)
    if not facts.problems and not shown:
        yield ok(name, f"{facts.config.file or 'the configuration'} is good for {facts.role}")


_SEE: Final = "see docs/configuration.md"


# --- addresses and routes -------------------------------------------------------------------------


def is_shared(interface: Interface) -> bool:
    """Return whether an interface is a network inside this machine, which other machines have
    with the same addresses: of containers or virtual machines.
    """
    if interface.has_hardware:
        return False
    if interface.kind == "bridge":
        return True
    # eth0 of a container is a veth, too; that one is the container's way out.
    return interface.name.startswith(CONTAINERS) and interface.kind in ("veth", "", "vxlan")


def addresses(facts: Machine) -> Iterator[Finding]:
    """Check that an agent's addresses are this host's, and no other host's."""
    name = "addresses"
    if "agent" not in role_sections(facts.role):
        return
    if not facts.addresses:
        fix = "write the address at which clients know this host as agent.addresses"
        yield fail(name, "no address is configured, and this host has no default route", fix)
        return
    good = []
    for address in facts.addresses:
        holder = holder_of(facts.interfaces or (), address.ip)
        if not address.here or (facts.kernel.nonlocal_bind and facts.interfaces is not None and holder is None):
            fix = "add it to an interface, or write the host's own address as agent.addresses"
            yield fail(name, f"{address.ip} is on no interface of this host", fix)
        elif holder is not None and is_shared(holder):
            kind = f"{holder.name}{f' ({holder.kind})' if holder.kind not in ('', holder.name) else ''}"
            fix = "write the address at which clients know this host as agent.addresses"
            yield fail(name, f"{address.ip} is on {kind}, which many hosts have with the same address", fix)
        elif ipaddress.ip_address(address.ip).is_loopback:
            fix = "write the address at which clients know this host, unless all is on one machine"
            yield warn(name, f"{address.ip} is a loopback address, which every host has", fix)
        else:
            good.append(address.ip + (f" on {holder.name}" if holder is not None else ""))
    if facts.interfaces is None:
        yield warn(name, "the interfaces can't be read from the kernel", "run the doctor on the host itself")
    if good:
        yield ok(name, f"{listed(good)}")


def routes(facts: Machine) -> Iterator[Finding]:
    """Check that no network of containers, and no second one, covers the addresses that count."""
    name = "routes"
    if facts.interfaces is None:
        return
    found = [*_hidden_endpoints(facts), *_hidden_networks(facts), *_overlaps(facts)]
    yield from found
    if not found:
        shared = [interface.name for interface in facts.interfaces if is_shared(interface)]
        beside = f", and none of {listed(shared)} covers a used address" if shared else ""
        yield ok(name, f"no two networks overlap{beside}")


def _hidden_endpoints(facts: Machine) -> Iterator[Finding]:
    shared = {interface.name for interface in facts.interfaces or () if is_shared(interface)}
    for endpoint in facts.endpoints:
        if endpoint.interface in shared and not endpoint.local:
            fix = f"give {endpoint.interface} another network (docker: default-address-pools, bip), or add a route"
            yield fail("routes", f"packets to {endpoint.at} ({endpoint.key}) leave through {endpoint.interface}", fix)
        elif endpoint.ip and not endpoint.interface:
            fix = "add a route to it, or a default route"
            yield fail("routes", f"no route leads to {endpoint.at} ({endpoint.key})", fix)
    if facts.role == "agent":
        for endpoint in facts.endpoints:
            if endpoint.ip in {address.ip for address in facts.addresses}:
                fix = "write the host's own address as agent.addresses, and the VIP's as agent.brokers"
                yield fail("routes", f"{endpoint.ip} is {endpoint.key} and also one of the agent's addresses", fix)


def _hidden_networks(facts: Machine) -> Iterator[Finding]:
    """Yield each network of containers that covers the network of one of the machine's own."""
    interfaces = facts.interfaces or ()
    shared = [interface for interface in interfaces if is_shared(interface)]
    used = [interface for interface in interfaces if not is_shared(interface) and interface.name != "lo"]
    for container in shared:
        for theirs in _networks(container):
            for interface in used:
                for ours in _networks(interface):
                    if theirs.version == ours.version and theirs.overlaps(ours):
                        fix = f"give {container.name} another network (docker: default-address-pools, bip)"
                        text = f"{container.name} has {theirs}, which hides hosts of {ours} ({interface.name})"
                        yield fail("routes", text, fix)
            for address in facts.addresses:
                own = ipaddress.ip_address(address.ip)
                holder = holder_of(facts.interfaces or (), address.ip)
                if own in theirs and holder not in shared and not any(own in n for i in used for n in _networks(i)):
                    text = f"{container.name} has {theirs}, which covers the agent's address {address.ip}"
                    yield fail("routes", text, f"give {container.name} another network")


def _overlaps(facts: Machine) -> Iterator[Finding]:
    """Yield each two interfaces of the machine's own whose networks overlap."""
    used = [i for i in facts.interfaces or () if not is_shared(i) and i.name != "lo"]
    for number, one in enumerate(used):
        for other in used[number + 1 :]:
            both = [
                (a, b) for a in _networks(one) for b in _networks(other) if a.version == b.version and a.overlaps(b)
            ]
            for mine, theirs in both:
                text = f"{mine} ({one.name}) and {theirs} ({other.name}) overlap: replies may leave by the other one"
                yield warn("routes", text, "give each interface a network of its own")


def _networks(interface: Interface) -> list[Any]:
    """Return the networks of an interface that hosts can be in; link-local ones are everywhere."""
    found = [ipaddress.ip_interface(address).network for address in interface.addresses]
    return [network for network in found if not network.is_link_local and network.num_addresses > 1]


# --- addresses that are dialled -------------------------------------------------------------------


def endpoints(facts: Machine) -> Iterator[Finding]:
    """Check that the addresses which the role dials answer, and that rtunnel answers there."""
    for endpoint in facts.endpoints:
        fault = _endpoint_fault(endpoint)
        if fault is not None:
            yield fault
            continue
        spread = _spread(endpoint, facts)
        yield spread if spread is not None else ok(_name(endpoint), _answers(endpoint))


def _name(endpoint: Endpoint) -> str:
    return "authority" if endpoint.key.endswith(".authority") else "brokers"


def _answers(endpoint: Endpoint) -> str:
    by = f" from {endpoint.source}" if endpoint.source else ""
    count = f", {endpoint.connected} connects" if endpoint.connected > 1 else ""
    seen = f", {len(endpoint.certificates)} broker certificates" if len(endpoint.certificates) > 1 else ""
    return f"{endpoint.at} answers{by} in {endpoint.connect_ms:.1f} ms{count}{seen}"


def _endpoint_fault(endpoint: Endpoint) -> Finding | None:
    name, at = _name(endpoint), endpoint.at
    behind = f" ({endpoint.connected} of {endpoint.connects} connects worked)" if endpoint.connected else ""
    if endpoint.error:
        fix = _CONNECT_FIX if endpoint.ip else "check the name, and the host's DNS"
        if endpoint.key.startswith(NODE):
            fix = "look for a firewall between this gateway and that node's ports, and at broker.advertise_ip"
        return fail(name, f"{at} can't be connected: {endpoint.error}{behind}", fix)
    if not endpoint.secure:
        return None
    if endpoint.not_tls:
        fix = "check the port in agent.brokers and behind the VIP; if it is right, large packets may be lost (MTU)"
        return fail(name, f"{at} takes connections, and no rtunnel broker answers: {endpoint.tls_error}", fix)
    if endpoint.tls_error:
        fix = "check agent.ca, agent.server_name, the broker's certificate, and this host's clock"
        return fail(name, f"{at} speaks TLS, but {endpoint.tls_error}", fix)
    if not endpoint.alpn:
        fix = "check the port in agent.brokers and behind the VIP"
        return fail(name, f"{at} speaks TLS, but not for links of rtunnel", fix)
    return None


_CONNECT_FIX: Final = "check that it runs, and the firewalls and routes between"


def _spread(endpoint: Endpoint, facts: Machine) -> Finding | None:
    """Return a finding when several connects lead to one broker only; None when they need not."""
    if len(endpoint.certificates) != 1 or endpoint.connected < 2 or len(facts.config.agent.brokers) > 1:
        return None
    name, count = _name(endpoint), endpoint.connected
    nodes, lonely = _sessions(facts)
    at = endpoint.at
    if len(nodes) > 1:
        return ok(name, f"{_answers(endpoint)}; the agent has sessions on {listed(nodes)}")
    if len(nodes) == 1 and facts.config.agent.redundancy > 1:
        text = f"{count} connects to {at} lead to one certificate, and the agent has a session on {nodes[0]} only"
        fix = "let the VIP spread connections of one source (no session affinity), or start a second broker"
        return fail(name, text, fix) if lonely else warn(name, text, fix)
    hint = "one broker, or several with one certificate; the agent's /statusz tells, when it runs here"
    return ok(name, f"{_answers(endpoint)}, one certificate ({hint})")


def _sessions(facts: Machine) -> tuple[list[str], bool]:
    """Return the nodes on which the running agent has sessions, and whether that has lasted."""
    status = (facts.own.status if facts.own is not None else None) or {}
    sessions = [session for session in status.get("sessions", ()) if isinstance(session, dict)]
    since = max((float(session.get("since", facts.now)) for session in sessions), default=facts.now)
    return sorted({str(session.get("node")) for session in sessions}), facts.now - since > SETTLED


def path(facts: Machine) -> Iterator[Finding]:
    """Check that full segments reach the addresses that are dialled (path MTU)."""
    name = "path"
    for endpoint in facts.endpoints:
        told = endpoint.path
        if told is None:
            continue
        at, size = endpoint.at, f"MTU {told.pmtu}, segments of {told.mss} bytes"
        if not told.acknowledged:
            text = f"{at} takes connections, but not {told.sent} bytes in full segments ({size}): packets are lost"
            fix = "lower the MTU of the interface, clamp the MSS, or let ICMP 'fragmentation needed' through"
            yield fail(name, text, fix)
        elif told.retransmits:
            text = f"{told.retransmits} segments to {at} were sent again ({size})"
            yield warn(name, text, "look for packet loss, or for a path with a smaller MTU")
        elif told.mss + HEADERS < USUAL_MSS and not endpoint.local:
            yield warn(name, f"{at}: {size}, which is small", "see whether a tunnel on the way makes it small")
        else:
            yield ok(name, f"{at}: {size}, none sent again")


# --- clock, kernel --------------------------------------------------------------------------------


def clock(facts: Machine) -> Iterator[Finding]:
    """Check this machine's clock, against Redis where the role uses it."""
    name, window = "clock", facts.config.broker.dial_window
    server = facts.registry
    if server is not None and not server.error:
        offset = abs(server.offset)
        way = "ahead of" if server.offset > 0 else "behind"
        text = f"this clock is {offset:.1f} s {way} the registry's"
        fix = "set the clock of the machine that is wrong (NTP)"
        if offset >= CLOCK_FAILS * window:
            yield fail(name, f"{text}, and Dials are refused from {window:g} s on", fix)
        elif offset > CLOCK_WARNS:
            yield warn(name, text, fix)
        else:
            yield ok(name, f"{offset * 1000:.0f} ms {way} the registry's")
    elif facts.kernel.clock_synchronised is False:
        text = "the kernel says that nothing synchronises this clock"
        yield warn(name, text, "run an NTP client (chrony, systemd-timesyncd), also where the hypervisor sets it")
    else:
        yield ok(name, f"{utc(facts.now)}; compare it with a broker's")


def ports(facts: Machine) -> Iterator[Finding]:
    """Check the ranges of ports of a broker, and the kernel's range of a gateway."""
    name, sections = "ports", role_sections(facts.role)
    found = []
    if "broker" in sections:
        found += list(_broker_ports(facts))
    if "gateway" in sections:
        found += list(_gateway_ports(facts))
    yield from found
    if not found and {"broker", "gateway"} & set(sections):
        low, high = facts.kernel.ephemeral
        yield ok(name, f"ranges are apart and large enough; outgoing connections use {low}-{high}")


def _broker_ports(facts: Machine) -> Iterator[Finding]:
    broker = facts.config.broker
    low, high = parse_range(broker.port_range)
    size = high - low + 1
    # Ranges that overlap each other, or the kernel's range, are found with the configuration.
    status = (facts.own.status if facts.own is not None else None) or {}
    sessions = int(status.get("sessions", 0)) if isinstance(status.get("sessions"), int) else 0
    if sessions >= size:
        yield fail("ports", f"{sessions} sessions use all {size} ports of broker.port_range", "use a larger range")
    elif sessions >= NEARLY * size:
        yield warn("ports", f"{sessions} sessions use {size} ports of broker.port_range", "use a larger range")
    given = facts.config.source("broker.max_sessions") != "default"
    if given and broker.max_sessions > size:
        text = f"broker.max_sessions is {broker.max_sessions}, and broker.port_range has {size} ports"
        yield warn("ports", text, "use a larger range, or fewer sessions")


def _gateway_ports(facts: Machine) -> Iterator[Finding]:
    gateway, (low, high) = facts.config.gateway, facts.kernel.ephemeral
    if not high:
        return
    size = (high - low + 1) * max(1, len(gateway.source_addresses))
    if gateway.max_clients > size:
        text = f"gateway.max_clients is {gateway.max_clients}, and {size} source ports are there for one broker"
        fix = "widen net.ipv4.ip_local_port_range, or give gateway.source_addresses"
        yield warn("ports", text, fix)


def descriptors(facts: Machine) -> Iterator[Finding]:
    """Check the descriptors of the running role; show this shell's limits when none runs.

    Warnings of the configuration say when the limit is too low for max_clients or max_sessions.
    """
    own = (facts.own.status if facts.own is not None else None) or {}
    used, limit = own.get("descriptors"), own.get("descriptor_limit")
    if isinstance(used, int) and isinstance(limit, int) and limit:
        text = f"the running {facts.role} has {used} of {limit} descriptors open"
        if used >= NEARLY * limit:
            yield (fail if used >= limit - 1 else warn)("descriptors", text, "raise LimitNOFILE (ulimit -Hn)")
        else:
            yield ok("descriptors", text)
        return
    hard, soft = facts.kernel.hard_descriptors, facts.kernel.soft_descriptors
    if any("descriptors" in problem.reason for problem in facts.warnings) or facts.role == "authority":
        return
    limit = "no limit" if hard < 0 else str(hard)
    yield ok("descriptors", f"up to {limit} (soft {soft}, which the role raises); of this shell, not of a unit")


# --- certificates ---------------------------------------------------------------------------------


def certificates(facts: Machine) -> Iterator[Finding]:
    """Check the term, the issuer and the names of the role's certificates."""
    for certificate in facts.certificates:
        found = list(_certificate_faults(certificate, facts))
        yield from found
        if not found:
            days = (certificate.ends - facts.now) / 86400
            yield ok("certificates", f"{certificate.path}: {certificate.subject}, good for {days:.1f} days")


def _certificate_faults(certificate: Certificate, facts: Machine) -> Iterator[Finding]:
    name, path, now = "certificates", certificate.path, facts.now
    kind = "broker" if certificate.key.startswith("broker.") else "agent"
    renew = "renew it: rtunnel pki issue broker" if kind == "broker" else "give the agent a new one: docs/identity.md"
    if certificate.error:
        yield fail(name, certificate.error, renew)
        return
    if now >= certificate.ends:
        yield fail(name, f"{path} expired at {utc(certificate.ends)}, by this clock", renew)
    elif now < certificate.issued:
        yield warn(name, f"{path} was issued at {utc(certificate.issued)}, which is later than now", "set this clock")
    elif certificate.ends - now < min(SOON_DAYS * 86400, (certificate.ends - certificate.issued) / 4):
        yield warn(name, f"{path} ends at {utc(certificate.ends)}", renew)
    if certificate.issuer_error:
        fix = "use a certificate and a ca.pem of one cluster"
        yield fail(name, f"{path} is not accepted by the CAs of {kind}.ca: {certificate.issuer_error}", fix)
    if not certificate.subject.startswith(f"{kind}/"):
        yield fail(name, f"{path} is a certificate of {certificate.subject}, not of a {kind}", renew)
    elif kind == "agent":
        agent = facts.config.agent
        if agent.agent_id and certificate.subject != f"agent/{agent.namespace}/{agent.agent_id}":
            text = f"{path} is of {certificate.subject}, and this is agent/{agent.namespace}/{agent.agent_id}"
            yield fail(name, text, "check agent.agent_id and agent.namespace, or give the agent a new certificate")
        missing = [address.ip for address in facts.addresses if address.ip not in certificate.addresses]
        if missing:
            yield fail(name, f"{path} does not name {listed(missing)}, which agent.addresses has", renew)


# --- Redis and the role ---------------------------------------------------------------------------


def registry(facts: Machine) -> Iterator[Finding]:
    """Check the registry's server: latency, memory policy, role and rights."""
    if facts.registry is not None:
        yield from redis(facts.registry)


def redis(server: RedisFacts) -> Iterator[Finding]:
    """Check one Redis server."""
    name = "registry"
    if server.error:
        yield fail(name, f"{server.url}: {server.error}", "brokers and gateways need the registry")
        return
    found = list(_redis_faults(server))
    yield from found
    if not found:
        typical = _median(server.latency_ms)
        policy = f", {server.policy}" if server.policy else ", maxmemory-policy not known (ACL)"
        text = f"{server.url}: Redis {server.version or 'of an unknown version'}, {typical:.1f} ms"
        yield ok(name, f"{text}{policy}, replicas: {server.replicas}")


def _redis_faults(server: RedisFacts) -> Iterator[Finding]:
    name = "registry"
    if server.policy and server.policy != "noeviction":
        text = f"{server.url}: maxmemory-policy is {server.policy}, so Redis may drop tuples"
        yield (fail if server.most else warn)(name, text, "CONFIG SET maxmemory-policy noeviction")
    if server.most and server.used >= NEARLY * server.most:
        text = f"{server.url} uses {server.used >> 20} of {server.most >> 20} MiB (maxmemory)"
        yield (fail if server.used >= server.most else warn)(name, text, "raise maxmemory: docs/registry.md")
    if server.role not in ("", "master"):
        fix = "name the master, or the sentinels, in [registry] url"
        yield fail(name, f"{server.url} is a replica, which takes no writes", fix)
    if server.denied:
        fix = "allow the commands and keys of docs/registry.md (ACL SETUSER)"
        yield fail(name, f"{server.url}: the user's ACL denies {', '.join(server.denied)}", fix)
    if (typical := _median(server.latency_ms)) > SLOW_MS:
        text = f"{server.url} answers a PING in {typical:.1f} ms (at most {max(server.latency_ms):.1f} ms)"
        yield warn(name, text, "put it nearer to the brokers, or look for its load (SLOWLOG)")


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def role(facts: Machine) -> Iterator[Finding]:
    """Report what the running role says of itself."""
    if facts.own is not None:
        yield from _own_findings(facts.own, facts.role)


def _own_findings(own: OwnRole, which: str) -> Iterator[Finding]:
    name = "role"
    if own.error:
        fix = "start it, or check its admin address"
        yield warn(name, f"no {which} answers at {own.address}: {own.error}", fix)
        return
    status = own.status or {}
    for reason in own.reasons:
        yield fail(name, f"the {which} at {own.address} is not ready: {reason}", "see its log")
    for reason in own.warnings:
        yield warn(name, f"the {which} at {own.address}: {reason}", "see its log")
    sessions, wanted = status.get("sessions"), status.get("sessions_wanted")
    if isinstance(sessions, list) and isinstance(wanted, int) and len(sessions) < wanted:
        text = f"the agent has {len(sessions)} of {wanted} sessions"
        yield warn(name, text, "see the findings about brokers, and its log (session_down, refused)")
    if own.ready and not own.reasons:
        yield ok(name, f"the {which} at {own.address} is ready, version {status.get('version', '?')}")


def sessions(facts: Machine) -> Iterator[Finding]:
    """Compare a running broker's sessions with the registry, and report its doubts of agents."""
    name, known = "sessions", facts.sessions
    if known is None:
        return
    if known.error:
        yield warn(name, f"the broker's sessions can't be read: {known.error}", "check broker.admin_token")
        return
    registered = set(known.registered)
    missing = [session.agent for session in known.lasting if session.epoch not in registered]
    if missing:
        text = f"{len(missing)} of {len(known.lasting)} sessions have no tuple in the registry: {listed(missing)}"
        yield warn(name, text, "ask again after a heartbeat; if it stays so, see the broker's log (address_taken)")
    for session in known.lasting:
        for doubt in session.doubts:
            yield warn(name, f"{session.agent}: {doubt}", "run rtunnel doctor --role agent on its host")
    if not missing:
        yield ok(name, f"{len(known.lasting)} of {len(known.lasting)} have their tuples in the registry")


CHECKS: Final[tuple[Check, ...]] = (
    configuration,
    addresses,
    routes,
    endpoints,
    path,
    clock,
    ports,
    descriptors,
    certificates,
    registry,
    role,
    sessions,
)
