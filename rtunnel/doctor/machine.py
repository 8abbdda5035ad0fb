"""Collects the facts about one role on this machine."""

from __future__ import annotations

import ctypes
import http.client
import resource
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from rtunnel import config as configuration
from rtunnel import netlink, roles
from rtunnel.api_client import ask
from rtunnel.config import (
    Config,
    ConfigError,
    Problem,
    default_address,
    format_endpoint,
    is_memory,
    parse_endpoint,
    role_sections,
)
from rtunnel.console import Failure
from rtunnel.doctor import redis_facts
from rtunnel.doctor.facts import (
    NODE,
    Certificate,
    Endpoint,
    Kernel,
    Machine,
    OwnAddress,
    OwnRole,
    Session,
    Sessions,
)
from rtunnel.doctor.probes import CONNECTS, PATIENCE, Plan, probe
from rtunnel.errors import RegistryUnavailable, TrustError
from rtunnel.netlink import Interface, Route
from rtunnel.registry import connect
from rtunnel.trust import tls
from rtunnel.trust.identity import TrustStore, load_trust_store, read_certificate
from rtunnel.trust.keys import load_api_token

#: Pages of 500 sessions that are read of a broker.
MAX_PAGES: Final = 200
#: Broker nodes whose guarded ports are probed.
MAX_NODES: Final = 16
#: Probes at once: a name that is not answered takes 5 s.
PROBES_AT_ONCE: Final = 8
#: Bytes of an answer of the role's admin address: /statusz has some KiB.
MAX_ANSWER: Final = 1 << 20
_IPV4: Final = Path("/proc/sys/net/ipv4")
#: The return value of adjtimex(2) for a clock that nothing synchronises.
_TIME_ERROR: Final = 5
#: Bytes of struct timex: 208 on 64-bit Linux.
_TIMEX_BYTES: Final = 256


def collect(config: Config, role: str) -> Machine:
    """Return the facts about this role on this machine. Blocks for some seconds.

    `config` may have faults with which the role does not start; they are facts too.
    """
    problems, warnings = _checked(config, role)
    interfaces, routes = _network()
    sections = role_sections(role)
    own = _own_role(config, role)
    return Machine(
        role=role,
        config=config,
        now=time.time(),
        problems=problems,
        warnings=warnings,
        kernel=_kernel(),
        interfaces=interfaces,
        routes=routes,
        addresses=_own_addresses(config) if "agent" in sections else (),
        endpoints=tuple(_endpoints(config, sections)),
        certificates=tuple(_certificates(config, sections)),
        registry=redis_facts.collect(config.registry) if _uses_redis(config, sections) else None,
        own=own,
        sessions=_sessions(config, own) if "broker" in sections else None,
    )


def roles_of(config: Config) -> list[str]:
    """Return the roles that have keys of their own in the configuration."""
    given = {key.partition(".")[0] for key in config.sources}
    return [role for role in configuration.ROLES if role in given]


def _checked(config: Config, role: str) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    try:
        return (), tuple(roles.check(config, role))
    except ConfigError as error:
        return error.problems, ()
    except TrustError as error:  # a certificate that can't be read for its end
        return (Problem(config.file or "configuration", "", str(error)),), ()


def _network() -> tuple[tuple[Interface, ...] | None, tuple[Route, ...]]:
    try:
        return netlink.interfaces(), netlink.routes()
    except OSError:
        return None, ()


def _own_addresses(config: Config) -> tuple[OwnAddress, ...]:
    wanted = config.agent.addresses or [address for address in [default_address()] if address]
    return tuple(OwnAddress(ip, _can_bind(ip)) for ip in wanted)


def _can_bind(ip: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((ip, 0))
    except OSError:
        return False
    return True


# --- the kernel -----------------------------------------------------------------------------------


def _kernel() -> Kernel:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = _setting("ip_local_port_range").split()
    low, high = (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)
    return Kernel(
        ephemeral=(low, high),
        reserved=_setting("ip_local_reserved_ports"),
        nonlocal_bind=_setting("ip_nonlocal_bind") == "1",
        clock_synchronised=_clock_synchronised(),
        soft_descriptors=soft,
        hard_descriptors=hard,
    )


def _setting(name: str) -> str:
    try:
        return (_IPV4 / name).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _clock_synchronised() -> bool | None:
    """Ask adjtimex(2), which needs no rights when it changes nothing."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(state != _TIME_ERROR)


# --- what the role dials --------------------------------------------------------------------------


def _endpoints(config: Config, sections: tuple[str, ...]) -> Iterator[Endpoint]:
    yield from _probe_all(_plans(config, sections))
    if "gateway" in sections and _uses_redis(config, sections):
        yield from _probe_guarded_ports(config)


def _plans(config: Config, sections: tuple[str, ...]) -> Iterator[Plan]:
    if "agent" in sections:
        yield from _broker_plans(config)
    for section in ("broker", "gateway"):
        if section in sections and (name := str(config.get(f"{section}.authority"))):
            yield Plan(f"{section}.authority", name)


def _broker_plans(config: Config) -> Iterator[Plan]:
    agent = config.agent
    context: ssl.SSLContext | None = None
    if agent.security == "tls":
        store = trust_store(config, "agent")
        if store is None:  # its fault is among the problems
            yield from (Plan("agent.brokers", name) for name in agent.brokers)
            return
        context = tls.client_context_of(store.pem)
    for name in agent.brokers:
        yield Plan("agent.brokers", name, context, agent.server_name, CONNECTS if context else 1, push=True)


def trust_store(config: Config, section: str) -> TrustStore | None:
    """Return the CAs in force by the section's files; None without a file that can be used."""
    path = str(config.get(f"{section}.ca"))
    if not path:
        return None
    try:
        store = load_trust_store(path)
    except TrustError:
        return None
    kept = Path(config.agent.identity, "trust.list") if section == "agent" else Path(config.get(f"{section}.trust"))
    if str(kept) not in ("", ".") and (section != "agent" or config.agent.identity):
        with suppress(OSError, TrustError):
            store.take(kept.read_bytes())
    return store


def _uses_redis(config: Config, sections: tuple[str, ...]) -> bool:
    return bool({"broker", "gateway"} & set(sections)) and not is_memory(config)


# --- certificates ---------------------------------------------------------------------------------


def _certificates(config: Config, sections: tuple[str, ...]) -> Iterator[Certificate]:
    if "broker" in sections and config.broker.certificate:
        yield _certificate("broker.certificate", config.broker.certificate, trust_store(config, "broker"))
    if "agent" in sections:
        store = trust_store(config, "agent")
        if config.agent.certificate:
            yield _certificate("agent.certificate", config.agent.certificate, store)
        enrolled = Path(config.agent.identity, "agent.pem")
        if config.agent.identity and enrolled.exists():
            yield _certificate("agent.identity", str(enrolled), store)


def _certificate(key: str, path: str, store: TrustStore | None) -> Certificate:
    try:
        der = tls.certificate_der(path)
        who = read_certificate(der)
    except (TrustError, ValueError) as error:
        return Certificate(key, path, error=str(error))
    issuer_error = ""
    if store is not None:
        try:
            # The term is a check of its own: here only the CA and the revocations count.
            store.verify(der, now=lambda: (who.issued + who.ends) / 2)
        except TrustError as error:
            issuer_error = str(error)
    addresses = tuple(sorted(who.addresses))
    return Certificate(key, path, "", who.subject, addresses, who.issued, who.ends, issuer_error)


# --- the role itself ------------------------------------------------------------------------------


def _own_role(config: Config, role: str) -> OwnRole | None:
    section = "broker" if role == "standalone" else role
    address = str(config.get(f"{section}.admin"))
    if not address or parse_endpoint(address)[1] == 0:
        return None
    try:
        _, ready = _get(address, "/readyz")
        _, status = _get(address, "/statusz")
    except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
        return OwnRole(address, error=str(error) or type(error).__name__)
    if not isinstance(ready, dict) or not isinstance(status, dict):
        return OwnRole(address, error="the answer is not one of rtunnel")
    reasons, warnings = ready.get("reasons", ()), ready.get("warnings", ())
    return OwnRole(address, "", bool(ready.get("ready")), tuple(map(str, reasons)), tuple(map(str, warnings)), status)


def _get(address: str, path: str) -> tuple[int, Any]:
    host, port = parse_endpoint(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - replaced, not bound
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, msgspec.json.decode(answer.read(MAX_ANSWER))
    finally:
        connection.close()


def _sessions(config: Config, own: OwnRole | None) -> Sessions | None:
    """Return the sessions of a running broker; None without an API or a registry to ask."""
    broker = config.broker
    node = str(own.status.get("node", "")) if own is not None and own.status is not None else ""
    if not node or not broker.admin_token or is_memory(config):
        return None
    try:
        token = load_api_token(broker.admin_token)
        before = {session.epoch for session in _ask_sessions(broker.admin, token)}
        registered = _registered(config, node)
        after = _ask_sessions(broker.admin, token)
    except (Failure, TrustError, RegistryUnavailable, ValueError) as error:
        return Sessions((), (), str(error))
    return Sessions(tuple(session for session in after if session.epoch in before), registered)


def _registered(config: Config, node: str) -> tuple[str, ...]:
    registry = connect(config.registry)
    try:
        return tuple({str(entry.epoch) for entry in registry.snapshot().tuples if entry.node == node})
    finally:
        registry.close()


def _ask_sessions(address: str, token: str) -> list[Session]:
    found: list[Session] = []
    after = ""
    for _ in range(MAX_PAGES):
        answer = ask(address, token, "GET", f"/v1/sessions?after={quote(after, safe='')}")
        for entry in answer["sessions"]:
            agent = f"{entry['namespace']}/{entry['agent']}"
            found.append(Session(agent, str(entry["epoch"]), tuple(map(str, entry["doubts"]))))
        if not (after := str(answer["next"])):
            break
    return found


# --- the guarded ports that a gateway dials -------------------------------------------------------


def _guarded_ports(config: Config) -> list[Plan]:
    """Return a plan for one guarded port of each node; none while the registry can't be read."""
    found: dict[str, str] = {}
    with suppress(RegistryUnavailable, ValueError):
        registry = connect(config.registry)
        try:
            for entry in registry.snapshot().tuples:
                if entry.agent_port == 0 and len(found) < MAX_NODES:
                    found[entry.node] = format_endpoint(entry.ps_ip, entry.ps_port)
        finally:
            registry.close()
    return [Plan(NODE + node, name, push=True) for node, name in found.items()]


def _probe_guarded_ports(config: Config) -> list[Endpoint]:
    """Return the facts about one guarded port of each node.

    A port whose session ends meanwhile is closed, and says nothing about the way to the node.
    """
    found = _probe_all(_guarded_ports(config))
    if any(endpoint.error for endpoint in found):
        there = {(plan.key, plan.name) for plan in _guarded_ports(config)}
        found = [endpoint for endpoint in found if not endpoint.error or (endpoint.key, endpoint.name) in there]
    return found


def _probe_all(plans: Iterable[Plan]) -> list[Endpoint]:
    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        return [endpoint for found in pool.map(probe, plans) for endpoint in found]
