"""Checks several keys of the configuration's text together, without looking at the machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rtunnel.config.sections import MAX_WORKERS, AgentConfig, Config
from rtunnel.config.values import MAX_WORD, MAX_WORD_BYTES, Problem, parse_endpoint, parse_range, span, split_exposes
from rtunnel.wire.messages import MAX_HELLO, MAX_HOLDS, MAX_LOST, VERSION, Hello, Publish, encode

#: Keys with ranges of ports that a broker allocates; "" for no range.
BROKER_RANGES = ("broker.port_range", "broker.open_ports.range")


def contradictions(config: Config) -> Iterator[Problem]:
    """Yield a problem for each group of keys that contradict each other."""
    yield from _check_registry(config)
    for section in ("broker", "agent", "gateway", "authority"):
        yield from check_ports(config, (section,))
    yield from _check_open_ports(config)
    if config.gateway.no_auth and not config.gateway.users:
        fix = "give users, or leave no_auth out"
        yield config.problem("gateway.no_auth", "has no effect without users, because then no client logs in", fix)
    yield from _check_workers(config)
    yield from _check_identity(config)
    if config.agent.addresses:
        yield from check_publish(config, config.agent.addresses)
    yield from _check_hello(config)


def _check_registry(config: Config) -> Iterator[Problem]:
    registry = config.registry
    if registry.ttl < 2 * registry.heartbeat:
        reason = (
            f"{registry.ttl:g} s is less than 2 heartbeats of {registry.heartbeat:g} s: one late heartbeat loses tuples"
        )
        yield config.problem("registry.ttl", reason, f"use {2 * registry.heartbeat:g} or more", "registry.heartbeat")
    if registry.quarantine < registry.ttl:
        reason = f"{registry.quarantine:g} s is less than ttl, {registry.ttl:g} s: a tuple may outlive its port"
        yield config.problem("registry.quarantine", reason, f"use {registry.ttl:g} or more", "registry.ttl")


def _check_open_ports(config: Config) -> Iterator[Problem]:
    open_ports = config.broker.open_ports
    if open_ports.range and not open_ports.allow:
        fix = 'name the networks that may connect, like allow = ["10.0.0.0/8"]'
        yield config.problem("broker.open_ports.allow", "is not given, and open ports need it", fix)
    if open_ports.allow and not open_ports.range:
        fix = 'give a range of ports, like range = "30000-30999"'
        yield config.problem(
            "broker.open_ports.range", "is not given, and open ports need it", fix, "broker.open_ports.allow"
        )


def _check_identity(config: Config) -> Iterator[Problem]:
    """Check the keys about certificates, of brokers and gateways that verify them and of agents."""
    for section in ("broker", "gateway"):
        for key in (f"{section}.trust", f"{section}.authority"):
            if config.get(key) and not config.get(f"{section}.ca"):
                yield config.problem(
                    key, f"has no effect without {section}.ca", f"give the cluster's ca.pem file as {section}.ca"
                )
    agent = config.agent
    if bool(agent.certificate) != bool(agent.key):
        missing, given = ("key", "certificate") if agent.certificate else ("certificate", "key")
        fix = "give both keys, or neither"
        yield config.problem(f"agent.{missing}", f"is not given, and agent.{given} is", fix, f"agent.{given}")
    if agent.identity and agent.certificate:
        fix = "leave one of them out: with identity the agent gets and renews its certificate by itself"
        yield config.problem("agent.identity", "is given, and agent.certificate is given too", fix, "agent.certificate")


def _check_workers(config: Config) -> Iterator[Problem]:
    broker = config.broker
    if broker.workers == 1:
        return
    for key in BROKER_RANGES:
        low, high = parse_range(text) if (text := config.get(key)) else (1, MAX_WORKERS)
        if high - low + 1 < broker.workers:
            reason = f"{text} has {high - low + 1} ports, and each of {broker.workers} workers needs one of its own"
            yield config.problem(key, reason, "use a larger range, or fewer workers", "broker.workers")
    suffix = len(f".{broker.workers}")
    for unit, size, most in [
        ("characters", len(broker.node_id), MAX_WORD),
        ("bytes", len(broker.node_id.encode()), MAX_WORD_BYTES),
    ]:
        if size + suffix > most:
            reason = f"is {size} {unit} long, and each worker adds its number to it"
            yield config.problem("broker.node_id", reason, f"use at most {most - suffix} {unit}")
            return


def check_ports(config: Config, sections: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each two sockets or ranges of one process that overlap."""
    taken: list[tuple[str, str, int, int]] = []
    for key, host, low, high in _claims(config, sections):
        for other, other_host, other_low, other_high in taken:
            if low <= other_high and other_low <= high and _same_host(host, other_host):
                reason = f"{span(low, high)} overlaps {other} ({span(other_low, other_high)})"
                yield config.problem(key, reason, "give each of them its own ports", other)
        taken.append((key, host, low, high))


def _claims(config: Config, sections: Sequence[str]) -> Iterator[tuple[str, str, int, int]]:
    for section in sections:
        for name in ("listen", "admin"):
            endpoint = getattr(getattr(config, section), name, "")
            host, port = parse_endpoint(endpoint) if endpoint else ("", 0)
            if port:
                yield f"{section}.{name}", host, port, port
    if "broker" in sections:
        for key in BROKER_RANGES:
            if text := config.get(key):
                yield key, "", *parse_range(text)


def _same_host(one: str, other: str) -> bool:
    """Return whether sockets on both could collide: "" stands for every address."""
    return one == other or any(host in ("", "0.0.0.0", "::") for host in (one, other))  # noqa: S104 - compared, not bound


def check_publish(config: Config, addresses: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each published target that is not one of the agent's addresses."""
    for index, entry in enumerate(config.agent.publish):
        host, _ = parse_endpoint(entry.target)
        if host not in addresses:
            reason = f"{host} is not one of the agent's addresses ({', '.join(addresses)})"
            key = f"agent.publish[{index}].target"
            yield Problem(config.source("agent.publish"), key, reason, "add it to agent.addresses")


def longest_hello(agent: AgentConfig) -> Hello:
    """Return the longest Hello that this agent can send, whatever sessions it has."""
    direct, loopback = split_exposes(agent.exposes)
    longest = "\U00010000" * (MAX_WORD_BYTES // 4)
    return Hello(
        version=VERSION,
        agent_id=agent.agent_id or "x" * 64,  # a host's name is no longer
        instance=bytes(16),
        namespace=agent.namespace,
        addresses=agent.addresses or ["x" * 39],
        nonce=bytes(16),
        token_id="x" * 64,
        exposes=[*direct, *loopback],
        publish=[
            Publish(ip=ip, target_port=target_port, port=entry.port, allow=entry.allow)
            for entry in agent.publish
            for ip, target_port in [parse_endpoint(entry.target)]
        ],
        holds=[longest] * MAX_HOLDS,
        holds_hosts=[longest] * MAX_HOLDS,
        software="x" * 64,
        trust=2**63,
        host="x" * 64,
        time=2**63,
        interfaces=["x" * 15] * max(1, len(agent.addresses)),
        lost=["x" * 39] * min(MAX_LOST, len(agent.addresses)),
        certificate_end=2**63,
        complaint="x" * 256,
    )


def _check_hello(config: Config) -> Iterator[Problem]:
    """Check the length of the Hello. Without networks even the longest one fits."""
    if (size := len(encode(longest_hello(config.agent))) - 4) > MAX_HELLO:
        reason = f"makes the agent's Hello up to {size} bytes long, and brokers read at most {MAX_HELLO}"
        yield config.problem(
            "agent.publish", reason, "give fewer networks in allow, or none: then the broker's list decides"
        )
