"""Checks what one role needs on this machine, and warns of unlikely settings."""

from __future__ import annotations

import ipaddress
import resource
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from rtunnel.config.consistency import BROKER_RANGES, check_ports, check_publish
from rtunnel.config.sections import FILE, KEYS, Config
from rtunnel.config.values import ConfigError, Problem, default_address, parse_endpoint, parse_range

ROLES = ("broker", "agent", "gateway", "authority", "standalone")


def role_sections(role: str) -> tuple[str, ...]:
    """Return the sections that a role reads, beside [log] and [registry]."""
    if role not in ROLES:
        raise ValueError(f"{role!r} is not a role (known: {', '.join(ROLES)})")
    return ("broker", "gateway") if role == "standalone" else (role,)


def check_role(config: Config, role: str) -> None:
    """Raise ConfigError unless this role could start here.

    It needs certain keys, and files that can be read.
    """
    if problems := list(_missing(config, role)):
        raise ConfigError(problems)


def _missing(config: Config, role: str) -> Iterator[Problem]:
    for section in role_sections(role):
        yield from _NEEDS[section](config)
    for key in _role_files(config, role):
        if reason := _file_fault(config.get(key)):
            yield config.problem(key, reason)
    if role == "standalone":
        yield from _standalone_preflight(config)
    elif is_memory(config) and role == "gateway":
        reason = f"{_ONE_PROCESS}: a gateway in another process than the broker sees no tuple"
        yield config.problem("registry.url", reason, _SHARE)
    elif is_memory(config) and role == "broker" and config.broker.workers > 1:
        reason = f"{_ONE_PROCESS}, and workers are several processes that need one registry"
        yield config.problem("registry.url", reason, "use redis://..., or one worker", "broker.workers")


def is_memory(config: Config) -> bool:
    """Return whether tuples are kept in this process only."""
    return urlsplit(config.registry.url).scheme == "memory"


def warnings(config: Config, role: str) -> list[Problem]:
    """Return settings of this role that are allowed and probably not intended."""
    return list(_warnings(config, role))


def _warnings(config: Config, role: str) -> Iterator[Problem]:
    sections = role_sections(role)
    for section in sections:
        if getattr(getattr(config, section), "security", "") == "plain":
            yield config.problem(f"{section}.security", "is plain, so links are not encrypted", "use tls")
    for key in _role_files(config, role):
        if KEYS[key].key.secret:
            yield from _open_to_others(config, key, Path(config.get(key)))
    if role == "authority":
        folder = Path(config.authority.directory)
        for path in sorted([*folder.glob("*.key"), *folder.glob("authority.db*")]):
            yield from _open_to_others(config, "authority.directory", path)
    if "broker" in sections:
        yield from _ephemeral_overlaps(config)
    if "gateway" in sections:
        yield from _open_doors(config)
    yield from _descriptors(config, sections)
    if role == "broker" and is_memory(config):
        reason = f"{_ONE_PROCESS}: no gateway and no other broker sees this node"
        yield config.problem("registry.url", reason, _SHARE)
    if role == "agent" and not (config.agent.exposes or config.agent.publish):
        yield config.problem(
            "agent.exposes",
            "is empty: clients can reach nothing through this agent",
            'name ports, like exposes = ["22"]',
        )


#: A client holds its own socket and one to a broker. A session holds its link and the socket of its
#: port (docs/deploy.md).
_DESCRIPTORS_EACH: Final = 2
#: Other descriptors: pipes of bulk streams (96), connections to the registry and of the admin
#: endpoint, hedges.
OTHER_DESCRIPTORS: Final = 256


def client_room(limit: int) -> int:
    """Return how many clients or sessions fit a process with this many descriptors."""
    return max(1, (limit - OTHER_DESCRIPTORS) // _DESCRIPTORS_EACH)


def descriptor_limit() -> int:
    """Return how many descriptors a role can have: it raises its soft limit to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _descriptors(config: Config, sections: tuple[str, ...]) -> Iterator[Problem]:
    limit = descriptor_limit()
    for section, key in (("broker", "broker.max_sessions"), ("gateway", "gateway.max_clients")):
        if section not in sections:
            continue
        count, room = config.get(key), client_room(limit)
        if count > room:
            need = count * _DESCRIPTORS_EACH + OTHER_DESCRIPTORS
            reason = f"{count} needs {need} descriptors, and this process may have {limit}, enough for {room}"
            yield config.problem(
                key, reason, f"set LimitNOFILE={need} (ulimit -Hn), or {key.partition('.')[2]} = {room}"
            )


def _open_doors(config: Config) -> Iterator[Problem]:
    gateway = config.gateway
    host, _ = parse_endpoint(gateway.listen)
    if not gateway.policy and not ipaddress.ip_address(host).is_loopback:
        reason = (
            f"is not given, so the gateway serves only clients on this machine, although it listens on {gateway.listen}"
        )
        yield config.problem("gateway.policy", reason, "write rules (docs/policy.md)", "gateway.listen")
    if gateway.proof == "off":
        reason = "is off: the gateway believes registry and brokers, and agents prove no address"
        yield config.problem("gateway.proof", reason, 'write proof = "required"')


def _need(config: Config, key: str, why: str, fix: str) -> Iterator[Problem]:
    if not config.get(key):
        yield config.problem(key, f"is not given: {why}", fix)


_PKI = "`rtunnel pki init DIR` makes it"
_ONE_PROCESS = "keeps tuples inside one process"
_SHARE = "use redis://..., or run `rtunnel standalone`"


def _standalone_preflight(config: Config) -> Iterator[Problem]:
    yield from check_ports(config, role_sections("standalone"))
    if config.broker.dial_security != config.gateway.dial_security:
        reason = f"is {config.gateway.dial_security}, and broker.dial_security is {config.broker.dial_security}"
        yield config.problem("gateway.dial_security", reason, "give both the same value", "broker.dial_security")
    for key in ("broker.workers", "gateway.workers"):
        if config.get(key) > 1:
            fix = "use 1, or run `rtunnel broker` and `rtunnel gateway`"
            yield config.problem(key, "is over 1, and `rtunnel standalone` is one process", fix)


def _broker_preflight(config: Config) -> Iterator[Problem]:
    broker = config.broker
    yield from _need(config, "broker.cluster_key", "the broker checks Dials with it", _PKI)
    if broker.security == "plain":
        yield from _need(config, "broker.join_token", "agents on plain links can prove nothing else", _PKI)
    elif not broker.join_token:
        fix = "give ca for agents with certificates, or join_token for shared tokens; `rtunnel pki init DIR` makes both"
        yield from _need(config, "broker.ca", "without it and without broker.join_token no agent can join", fix)
    if "tls" in (broker.security, broker.dial_security):
        why = f"{'links' if broker.security == 'tls' else 'guarded ports'} use TLS"
        yield from _need(config, "broker.certificate", why, _PKI)
        yield from _need(config, "broker.key", why, _PKI)


def _agent_preflight(config: Config) -> Iterator[Problem]:
    agent = config.agent
    yield from _need(config, "agent.brokers", "the agent has no broker to dial", 'write brokers = ["vip.example:7000"]')
    if agent.security == "plain":
        fix = "give the cluster's join.token file"
        yield from _need(config, "agent.join_token", "on a plain link the agent can prove nothing else", fix)
    elif agent.identity and _file_fault(str(Path(agent.identity, "agent.pem"))):
        why = f"there is no certificate in {agent.identity}, and the agent gets one for a token"
        yield from _need(config, "agent.join_token", why, "`rtunnel pki token create` makes a token")
    elif not (agent.certificate or agent.identity):
        fix = "give identity, and a token of `rtunnel pki token create` as join_token"
        yield from _need(
            config, "agent.join_token", "the agent has neither a certificate nor a token to show brokers", fix
        )
    if agent.security == "tls" or agent.identity:
        yield from _need(config, "agent.ca", "the agent checks certificates with it", "give the cluster's ca.pem file")
    if not agent.addresses and (address := default_address()):
        yield from check_publish(config, [address])


def _gateway_preflight(config: Config) -> Iterator[Problem]:
    for address in config.gateway.source_addresses:
        if not _is_own(address):
            yield config.problem(
                "gateway.source_addresses",
                f"{address} is not an address of this machine",
                "use addresses that `ip address` shows",
            )
    yield from _need(config, "gateway.key", "the gateway signs Dials with it", "`rtunnel pki issue gateway` makes it")
    if config.gateway.proof == "required":
        fix = 'give the cluster\'s ca.pem, or write proof = "off" to believe registry and brokers'
        yield from _need(
            config, "gateway.ca", "the gateway checks agents' proofs with it (gateway.proof = required)", fix
        )
    elif config.gateway.dial_security == "tls":
        yield from _need(
            config, "gateway.ca", "the gateway checks brokers' certificates with it", "give the cluster's ca.pem file"
        )


def _is_own(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def _authority_preflight(config: Config) -> Iterator[Problem]:
    yield from _need(config, "authority.directory", "the authority reads its CA and its store there", _PKI)


_NEEDS: dict[str, Callable[[Config], Iterator[Problem]]] = {
    "broker": _broker_preflight,
    "agent": _agent_preflight,
    "gateway": _gateway_preflight,
    "authority": _authority_preflight,
}


def _role_files(config: Config, role: str) -> Iterator[str]:
    """Yield the keys of files that this role opens, and that must exist."""
    unused = {path for path, leaf in KEYS.items() if leaf.key.made}
    if config.broker.security == config.broker.dial_security == "plain":
        unused |= {"broker.certificate", "broker.key"}
    if config.agent.security == "plain" and not config.agent.identity:
        unused.add("agent.ca")
    for section in role_sections(role):
        for path, leaf in KEYS.items():
            if path.startswith(section + ".") and leaf.key.unit == FILE and config.get(path) and path not in unused:
                yield path


def _file_fault(name: str) -> str:
    try:
        # The type is checked before the file is opened: opening a pipe would wait for a writer.
        if not stat.S_ISREG(Path(name).stat().st_mode):
            return f"{name} is not a file"
        with Path(name).open("rb"):
            return ""
    except (OSError, ValueError) as error:
        return f"{name} can't be read: {getattr(error, 'strerror', None) or error}"


def _open_to_others(config: Config, key: str, path: Path) -> Iterator[Problem]:
    """Warn of a secret that every user of this machine may read or write."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, ValueError):
        return
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        reason = f"{path} has mode {mode:04o}, so every user of this machine can use it"
        yield config.problem(key, reason, f"chmod 0600 {path}")


_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _ephemeral_overlaps(config: Config) -> Iterator[Problem]:
    """Warn of ranges that overlap the kernel's range for outgoing connections."""
    try:
        kernel_low, kernel_high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        return
    for key in BROKER_RANGES:
        text = config.get(key)
        low, high = parse_range(text) if text else (0, 0)
        if text and low <= kernel_high and kernel_low <= high:
            reason = (
                f"{text} overlaps the ports of outgoing connections, {kernel_low}-{kernel_high} (ip_local_port_range)"
            )
            yield config.problem(key, reason, "use other ports, or reserve these (net.ipv4.ip_local_reserved_ports)")
