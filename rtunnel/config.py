"""Configuration: one TOML file, a section per role; `RTUNNEL_SECTION_KEY` overrides it, flags override both.

The structs below are the source of everything said about a key: its type, default, unit, meaning and check
stand on its line; flags, error messages and the test of `docs/configuration.md` are made from them. Durations are
seconds.

`load` judges what can be judged from the text alone. `check_role` judges what one role needs on this machine,
before it starts. `warnings` says what is allowed and probably not meant. Faults are `ConfigError`, all of them at
once, each with where the value came from, its key, the reason, and the fix.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import socket
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints
from typing import Annotated as A
from urllib.parse import urlsplit

import msgspec

ROLES = ("broker", "agent", "gateway", "authority", "standalone")
ENV_PREFIX = "RTUNNEL_"

#: What fits into one Hello (rtunnel/wire/messages.py).
MAX_ADDRESSES = 64
MAX_EXPOSES = 256
MAX_PUBLISH = 64
MAX_ALLOW = 64
MAX_WORD = 128
#: Rules of [[broker.admit]].
MAX_ADMIT = 1000
#: Processes on one port: more than that are several machines.
MAX_WORKERS = 64
#: Timers count milliseconds in 31 bits (24 days); nobody means more than this.
MAX_SECONDS = 7 * 86400.0
#: A configuration is a page of text: a larger file is the wrong file.
MAX_FILE = 1 << 20


class BadValue(ValueError):
    """A value that can't be used; the text is the reason, `fix` says what to write instead."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault (or warning): where the value came from, which key, why, and what to do."""

    source: str
    key: str
    reason: str
    fix: str = ""

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.source, self.key) if part)
        return f"{where}: {self.reason}" + (f" ({self.fix})" if self.fix else "")


class ConfigError(Exception):
    """The configuration can't be used. `problems` has all faults that were found; the text has one a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


# --- values: parse or say why not -------------------------------------------------------------------------


def parse_endpoint(text: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port"; addresses come back canonical, port 0 is allowed.

    Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or "]" in port:
        raise BadValue(f"{text!r} is not host:port", "write it like 10.0.0.1:7000 or [fd00::1]:7000")
    number = _port(port, 0)
    if host.startswith("[") and host.endswith("]"):
        return _ip(host[1:-1], 6), number
    if ":" in host:
        raise BadValue(f"{text!r} is ambiguous", f"an IPv6 address stands in brackets: [{text}]:port")
    if _looks_like_ip(host):
        return _ip(host), number
    if not _NAME.fullmatch(host):
        raise BadValue(f"{host!r} is neither an IP address nor a host name")
    return host.lower(), number


def format_endpoint(host: str, port: int) -> str:
    """The inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_range(text: str) -> tuple[int, int]:
    """(first, last) of "first-last", both inclusive, 1..65535. Raises ValueError."""
    first, dash, last = text.partition("-")
    if not dash:
        raise BadValue(f"{text!r} is not a range of ports", "write it like 20000-29999")
    low, high = _port(first.strip(), 1), _port(last.strip(), 1)
    if low > high:
        raise BadValue(f"{text!r} ends before it begins", f"write {high}-{low}")
    return low, high


def slice_of(text: str, number: int, count: int) -> str:
    """Part `number` (from 1) of `count` of a range, as a range: disjoint, all of it, as equal as can be."""
    first, last = parse_range(text)
    size = last - first + 1
    return f"{first + size * (number - 1) // count}-{first + size * number // count - 1}"


def parse_exposes(items: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Port ranges of "9100" and "8000-8100", sorted, touching ones merged. Raises ValueError."""
    return _merged(map(_ports, items))


#: In front of a port of `agent.exposes`: the service listens on loopback only.
LOOPBACK = "loopback:"


def split_exposes(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """(ports at the agent's addresses, ports on its loopback) of `agent.exposes`, both without a prefix."""
    loopback = [item.removeprefix(LOOPBACK) for item in items if item.startswith(LOOPBACK)]
    return [item for item in items if not item.startswith(LOOPBACK)], loopback


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def canonical_ip(text: str) -> str:
    """The one spelling of an IP address: v6 compressed, v4-mapped v6 as v4, no scope. Raises ValueError."""
    return _ip(text)


def check_word(text: str) -> str:
    """An id or namespace: 1..128 printable characters, no space, no '/' (lease owners join the two with it).

    Raises ValueError."""
    if not 1 <= len(text) <= MAX_WORD:
        raise BadValue(f"{len(text)} characters long", f"use 1 to {MAX_WORD}")
    if not text.isprintable() or " " in text or "/" in text:
        raise BadValue(f"{text!r} has a space, a slash or a control character", "use letters, digits, '-', '_', '.'")
    return text


def host_name() -> str:
    """The host's name: what ids default to."""
    return socket.gethostname() or "localhost"


def default_address() -> str:
    """The address that the default route leaves from; 127.0.0.1 where there is none. Nothing is sent."""
    # Documentation addresses: connecting a UDP socket only asks the kernel for the route.
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((probe, 9))
                address = str(sock.getsockname()[0])
        except OSError:
            continue
        if not ipaddress.ip_address(address).is_unspecified:
            return address
    return "127.0.0.1"


_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def _looks_like_ip(host: str) -> bool:
    """Only digits in the last label: no host name is like that (RFC 1123), so it's an address, or wrong."""
    return host.rstrip(".").rpartition(".")[2].isdigit()


def _ip(text: str, version: int = 0) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise BadValue(f"{text!r} is not an IP address") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            raise BadValue(f"{text!r} has a scope, which means nothing on another host")
        return str(address.ipv4_mapped or address)
    if version == 6:
        raise BadValue(f"{text!r} in brackets is not an IPv6 address", "an IPv4 address stands without brackets")
    return str(address)


def _port(text: str, least: int) -> int:
    # isdecimal alone takes other scripts' digits, int() alone takes "+1" and "1_0".
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and least <= int(text) <= 65535):
        raise BadValue(f"{text!r} is not a port", f"use {least}..65535")
    return int(text)


def _ports(text: str) -> tuple[int, int]:
    text = text.strip()
    if "-" in text:
        return parse_range(text)
    port = _port(text, 1)
    return port, port


# --- checks of one key: value in, canonical value out -----------------------------------------------------

Check = Callable[[Any], Any]


def _optional(check: Check) -> Check:
    return lambda value: value if value == "" else check(value)


def _one_of(*words: str) -> Check:
    def check(value: str) -> str:
        if value not in words:
            near = difflib.get_close_matches(value, words, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"use {' or '.join(words)}"
            raise BadValue(f"{value!r} is none of {', '.join(words)}", meant)
        return value

    return check


def _between(low: float, high: float) -> Check:
    def check(value: float) -> float:
        # A nan fails both comparisons.
        if not low <= value <= high:
            raise BadValue(f"{value} is out of bounds", f"use {low:g}..{high:g}")
        return value

    return check


def _each(check: Check, at_most: int) -> Check:
    def check_all(values: list[Any]) -> list[Any]:
        if len(values) > at_most:
            raise BadValue(f"{len(values)} entries", f"at most {at_most}")
        return [check(value) for value in values]

    return check_all


def _listen(text: str) -> str:
    host, port = parse_endpoint(text)
    if not (":" in host or _looks_like_ip(host)):
        raise BadValue(
            f"{host!r} is a name; a socket listens on an address", f"write 127.0.0.1:{port} or 0.0.0.0:{port}"
        )
    return format_endpoint(host, port)


def _remote(text: str) -> str:
    host, port = parse_endpoint(text)
    if port == 0:
        raise BadValue("port 0 can't be dialled", "use 1..65535")
    return format_endpoint(host, port)


def _address(text: str) -> str:
    canonical = _ip(text)
    address = ipaddress.ip_address(canonical)
    if address.is_unspecified or address.is_multicast:
        raise BadValue(f"{text!r} is not the address of one host")
    return canonical


def _addresses(values: list[str]) -> list[str]:
    # One order, no doubles: a Hello names each address once.
    return list(dict.fromkeys(_each(_address, MAX_ADDRESSES)(values)))


def check_network(text: str) -> str:
    """A network, or one address as a network, in its one spelling. Raises ValueError."""
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        pass
    try:
        wider = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise BadValue(f"{text!r} is not a network", "write it like 10.0.0.0/8") from None
    raise BadValue(f"{text!r} has bits set behind its mask", f"write {wider}")


def _range(text: str) -> str:
    return "{}-{}".format(*parse_range(text))


def _expose(text: str) -> str:
    low, high = _ports(text)
    return str(low) if low == high else f"{low}-{high}"


def _exposes(values: list[str]) -> list[str]:
    entries = _each(_expose_or_loopback, MAX_EXPOSES)(values)
    direct, loopback = map(parse_exposes, split_exposes(entries))
    for low, high in loopback:
        for other_low, other_high in direct:
            if low <= other_high and other_low <= high:
                port = max(low, other_low)
                fix = f"leave it out of {_span(other_low, other_high)}, or of {LOOPBACK}{_span(low, high)}"
                raise BadValue(f"{port} is exposed twice, at the agent's addresses and on loopback", fix)
    return entries  # type: ignore[no-any-return]


def _expose_or_loopback(text: str) -> str:
    text = text.strip()
    if text.startswith(LOOPBACK):
        return LOOPBACK + _expose(text.removeprefix(LOOPBACK))
    return _expose(text)


def _registry_url(text: str) -> str:
    # The text may hold a password: no message repeats it.
    try:
        url = urlsplit(text)
        _ = url.port if url.scheme in ("redis", "rediss") else None
    except ValueError as fault:
        raise BadValue(f"is not a URL: {fault}") from None
    _one_of("memory", "redis", "rediss", "unix", "redis+sentinel")(url.scheme or "(no scheme)")
    if url.scheme in ("redis", "rediss") and not url.hostname:
        raise BadValue("names no host", f"write it like {url.scheme}://10.0.0.5:6379/0")
    if url.scheme == "unix" and not url.path.strip("/"):
        raise BadValue("names no socket", "write it like unix:///run/redis.sock")
    if url.scheme == "redis+sentinel" and not (url.netloc.rpartition("@")[2] and url.path.strip("/")):
        raise BadValue(
            "needs sentinels and a service", "write it like redis+sentinel://10.0.0.5:26379,10.0.0.6:26379/mymaster/0"
        )
    return text


def _server_name(text: str) -> str:
    if _looks_like_ip(text) or ":" in text:
        return _ip(text)
    if not _NAME.fullmatch(text):
        raise BadValue(f"{text!r} is neither a host name nor an IP address")
    return text


def _publish(values: list[PublishConfig]) -> list[PublishConfig]:
    return _each(_publish_one, MAX_PUBLISH)(values)  # type: ignore[no-any-return]


def _publish_one(entry: PublishConfig) -> PublishConfig:
    host, port = parse_endpoint(entry.target)
    if port == 0:
        raise BadValue(f"target {entry.target!r} has no port", "use 1..65535")
    target = format_endpoint(_address(host), port)
    if not 0 <= entry.port <= 65535:
        raise BadValue(f"port {entry.port} of {target}", "use 1..65535, or 0 for a random one")
    return PublishConfig(target=target, port=entry.port, allow=_each(check_network, MAX_ALLOW)(entry.allow))


def _publish_words(value: Any) -> Any:
    """Beside tables: "10.1.0.7:9100" and "10.1.0.7:9100@30001" (the broker's port), for flags and variables."""
    return [_publish_table(item) if isinstance(item, str) else item for item in value]


def _publish_table(text: str) -> dict[str, object]:
    target, at, port = text.partition("@")
    return {"target": target, "port": _port(port, 0) if at else 0}


def _admit(values: list[AdmitConfig]) -> list[AdmitConfig]:
    return _each(_admit_one, MAX_ADMIT)(values)  # type: ignore[no-any-return]


def _admit_one(rule: AdmitConfig) -> AdmitConfig:
    if not 0 <= rule.streams <= 1_000_000:
        raise BadValue(f"streams = {rule.streams}", "use 1..1000000, or 0 for no limit")
    return AdmitConfig(
        namespaces=_each(check_word, MAX_ALLOW)(rule.namespaces),
        networks=_each(check_network, MAX_ALLOW)(rule.networks),
        open_ports=_each(_expose, MAX_ALLOW)(rule.open_ports),
        streams=rule.streams,
    )


def _tables_only(value: Any) -> Any:
    if any(isinstance(item, str) for item in value):
        raise BadValue("is a list of tables, which only a file can give", "write [[broker.admit]] there")
    return [{**item, "open_ports": _numbers_too(item["open_ports"])} if _has_ports(item) else item for item in value]


def _has_ports(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("open_ports"), list)


def _numbers_too(value: Any) -> Any:
    """`exposes = [9100]` says the same as `["9100"]`."""
    return [str(item) if type(item) is int else item for item in value]


# --- the keys ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key beside its type and default."""

    help: str
    check: Check | None = None
    unit: str = ""
    secret: bool = False  # a file that only its owner should read
    before: Check | None = None  # widens what is taken, ahead of the type check
    made: bool = False  # a file that the role writes: it need not be there


_FILE = "file"
_FOLDER = "folder"


def _seconds(text: str, low: float = 0.01, high: float = MAX_SECONDS) -> Key:
    return Key(text, _between(low, high), "seconds")


def _count(text: str, high: int = 1_000_000) -> Key:
    return Key(text, _between(1, high), "count")


def _at_most(text: str) -> Key:
    return Key(text, _between(0, 1_000_000), "count")


def _rate(text: str) -> Key:
    return Key(text, _between(0, 1_000_000), "per second")


def _choice(text: str, *words: str) -> Key:
    return Key(text, _one_of(*words), "word")


def _id(text: str) -> Key:
    return Key(text, _optional(check_word), "word")


def _file(text: str, *, secret: bool = False, made: bool = False) -> Key:
    return Key(text, None, _FILE, secret, made=made)


def _endpoint(text: str) -> Key:
    return Key(text, _listen, "host:port")


_ADMIN = Key('health over HTTP; "" for none', _optional(_listen), "host:port")
_SECURITY = _choice("of links: tls, or plain for no encryption at all", "tls", "plain")
_NAMESPACE = Key("tells apart VPCs that use the same addresses", check_word, "word")
_CLUSTER_KEY = _file("the key that gateways' keys are derived from, one for the cluster", secret=True)
_CA = _file("PEM: the cluster's CA; agents are known by it")
_AUTHORITY = Key("where agents' certificates and the newest trust list come from", _optional(_remote), "host:port")
_TRUST = _file("the newest trust list: kept here, and read when it changes; need not be there", made=True)
_DIAL_SECURITY = _choice("of Dials to guarded ports and what follows them: plain, or tls", "plain", "tls")
_PROOF = _choice("agents must prove that they have the target's address: required, or off", "required", "off")
_DRAIN = _seconds("at SIGTERM streams may finish for so long", low=0)
_LEVEL = _choice("the least level that is written: debug, info, warning or error", "debug", "info", "warning", "error")
_FORMAT = _choice("json, console, or auto: console on a terminal", "auto", "json", "console")
_URL = Key("memory://, redis://, rediss://, unix://, redis+sentinel://host,host/service/db", _registry_url, "URL")
_ADVERTISE = "the PS IP, where gateways reach this node's ports; default: the address of the default route"
_WORKERS = _count("processes on one port, each a node of its own with its part of the ranges", MAX_WORKERS)
_GATEWAY_WORKERS = _count("processes on one port", MAX_WORKERS)
_OPEN_ALLOW = "networks that may connect; an agent's own list can only narrow it"
_NO_AUTH = "networks whose clients need not log in, though there is a file of users"
_BROKERS = "the VIP; several are used in turn, names are resolved at every dial"
_ADDRESSES_HELP = "original IPs that it answers for; default: the address of the default route"
_EXPOSES = Key(
    'ports that clients may reach: "9100", "8000-8100", "loopback:9100"; none by default; read again from the file',
    _exposes,
    "ports",
    before=_numbers_too,
)
_ADMIT = Key("who may register what; without rules all that the agent proves", _admit, "tables", before=_tables_only)
_AUTHORITY = Key("where agents' certificates and the newest trust list come from", _optional(_remote), "host:port")
_TRUST = _file("the newest trust list: kept here, and read when it changes; need not be there", made=True)
_SOURCE_HANDSHAKES = "links of one source without Welcome; 0: no limit, for a VIP that hides the agents' addresses"
_PUBLISH = Key("open ports to ask for: IP:PORT, or IP:PORT@BROKER_PORT", _publish, "tables", before=_publish_words)


class _Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A section of the file."""


class LogConfig(_Section):
    """[log]"""

    level: A[str, _LEVEL] = "info"
    format: A[str, _FORMAT] = "auto"


class RegistryConfig(_Section):
    """[registry]"""

    url: A[str, _URL] = "memory://"
    prefix: A[str, Key("of every key in Redis", check_word, "word")] = "rtunnel"
    heartbeat: A[float, _seconds("a node refreshes its tuples so often")] = 3.0
    ttl: A[float, _seconds("a tuple dies so long after its last heartbeat; at least 2 heartbeats")] = 8.0
    quarantine: A[float, _seconds("a freed port rests so long; at least ttl")] = 60.0
    timeout: A[float, _seconds("of one registry call", 0.05, 10)] = 1.0
    reconcile: A[float, _seconds("gateways compare everything so often")] = 60.0


class OpenPortsConfig(_Section):
    """[broker.open_ports]: none unless both are given."""

    range: A[str, Key("for agents' publish requests, fixed or random", _optional(_range), "ports")] = ""
    allow: A[list[str], Key(_OPEN_ALLOW, _each(check_network, MAX_ALLOW), "CIDRs")] = []
    #: Not a key: the part of `range` that this worker gives out at random (rtunnel/workers.py); "" for all of it.
    own: str = ""


class AdmitConfig(_Section):
    """[[broker.admit]]: what some agents may register. Lists of whom it is for: empty is everybody."""

    namespaces: A[list[str], Key("the agent's", None, "words")] = []
    networks: A[list[str], Key("that every address of the agent must be in", None, "CIDRs")] = []
    open_ports: A[list[str], Key("that it may ask for (`agent.publish`); none by default", None, "ports")] = []
    streams: A[int, Key("of the agent at once, on each node; 0: no limit", None, "count")] = 0


class BrokerConfig(_Section):
    """[broker]"""

    listen: A[str, _endpoint("where agents' links arrive")] = "0.0.0.0:7000"
    node_id: A[str, _id("of this node, one in the cluster; default: the host's name")] = ""
    host: A[str, _id("label of the machine; default: the host's name")] = ""
    advertise_ip: A[str, Key(_ADVERTISE, _optional(_address), "IP")] = ""
    port_range: A[str, Key("guarded ports, one for each session", _range, "ports")] = "20000-29999"
    open_ports: OpenPortsConfig = msgspec.field(default_factory=OpenPortsConfig)
    security: A[str, _SECURITY] = "tls"
    certificate: A[str, _file("PEM: the broker's certificate (chain)")] = ""
    key: A[str, _file("PEM: the certificate's private key", secret=True)] = ""
    ca: A[str, _file("PEM: the CAs that agents' certificates come from")] = ""
    trust: A[str, _TRUST] = ""
    authority: A[str, _AUTHORITY] = ""
    cluster_key: A[str, _CLUSTER_KEY] = ""
    dial_security: A[str, _DIAL_SECURITY] = "plain"
    join_token: A[str, _file("tokens that agents without a certificate may prove, one a line", secret=True)] = ""
    admit: A[list[AdmitConfig], _ADMIT] = []
    handshake_timeout: A[float, _seconds("for a link until Welcome, and for a Dial on a guarded port")] = 10.0
    dial_window: A[float, _seconds("a Dial may be so old, or so far ahead; no replay meanwhile")] = 30.0
    max_sessions: A[int, _count("agents on this node")] = 60000
    max_handshakes: A[int, _count("links without Welcome, and guarded connections without Dial, each")] = 1024
    source_handshakes: A[int, _at_most(_SOURCE_HANDSHAKES)] = 256
    drain: A[float, _DRAIN] = 30.0
    workers: A[int, _WORKERS] = 1
    admin: A[str, _ADMIN] = "127.0.0.1:7070"


class PublishConfig(_Section):
    """[[agent.publish]]: ask for an open port."""

    target: A[str, Key("what the open port leads to; the address must be one of the agent's", None, "host:port")]
    port: A[int, Key("the broker's port; 0: a random one of its range", None, "port")] = 0
    allow: A[list[str], Key("networks that may connect; empty: whom the broker allows", None, "CIDRs")] = []


class AgentConfig(_Section):
    """[agent]"""

    brokers: A[list[str], Key(_BROKERS, _each(_remote, 64), "host:port")] = []
    agent_id: A[str, _id("outlives restarts; default: the host's name")] = ""
    namespace: A[str, _NAMESPACE] = "default"
    addresses: A[list[str], Key(_ADDRESSES_HELP, _addresses, "IPs")] = []
    exposes: A[list[str], _EXPOSES] = []
    publish: A[list[PublishConfig], _PUBLISH] = []
    redundancy: A[int, _count("sessions, each on another node", 8)] = 2
    security: A[str, _SECURITY] = "tls"
    ca: A[str, _file("PEM: the CAs of the cluster")] = ""
    server_name: A[str, Key("that the broker's certificate must carry", _server_name, "name")] = "broker.rtunnel"
    identity: A[str, Key("where the agent keeps the certificate that it enrols for, and its key", None, _FOLDER)] = ""
    certificate: A[str, _file("PEM: a certificate that was made by hand, instead of `identity`")] = ""
    key: A[str, _file("PEM: its private key", secret=True)] = ""
    join_token: A[str, _file("the agent's token: to enrol for a certificate, or to join without one", secret=True)] = ""
    connect_timeout: A[float, _seconds("to a broker")] = 5.0
    handshake_timeout: A[float, _seconds("for a link until Welcome")] = 20.0
    target_timeout: A[float, _seconds("to a target")] = 10.0
    backoff_cap: A[float, _seconds("longest pause between two dials")] = 10.0
    drain: A[float, _DRAIN] = 30.0
    admin: A[str, _ADMIN] = "127.0.0.1:7071"


class LimitsConfig(_Section):
    """[gateway.limits]: what one source, and one user, may have."""

    source_handshakes: A[int, _at_most("connections of one source that are not streams yet; 0: no limit")] = 1024
    source_rate: A[float, _rate("new connections of one source; 0: no limit")] = 0.0
    source_streams: A[int, _at_most("streams of one source; 0: no limit")] = 0
    user_rate: A[float, _rate("new connections of one user; 0: no limit")] = 0.0
    user_streams: A[int, _at_most("streams of one user; 0: no limit")] = 0


class GatewayConfig(_Section):
    """[gateway]"""

    listen: A[str, _endpoint("SOCKS5 and HTTP proxy on one port")] = "127.0.0.1:1080"
    name: A[str, _id("told in Dials; default: the host's name")] = ""
    namespace: A[str, _NAMESPACE] = "default"
    key: A[str, _file("the gateway's own key, which signs its Dials (`rtunnel pki issue gateway`)", secret=True)] = ""
    ca: A[str, _CA] = ""
    trust: A[str, _TRUST] = ""
    authority: A[str, _AUTHORITY] = ""
    proof: A[str, _PROOF] = "required"
    dial_security: A[str, _DIAL_SECURITY] = "plain"
    policy: A[str, _file("who may reach what (docs/policy.md); without it only clients on this machine may")] = ""
    users: A[str, _file("names and password hashes (`rtunnel user`); with it clients must log in", secret=True)] = ""
    no_auth: A[list[str], Key(_NO_AUTH, _each(check_network, MAX_ALLOW), "CIDRs")] = []
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    handshake_timeout: A[float, _seconds("a client must have said what it wants by then")] = 10.0
    hedge_delay: A[float, _seconds("the next tuple is tried beside one that is silent for so long", 0)] = 0.25
    dial_timeout: A[float, _seconds("all tuples together")] = 15.0
    idle_timeout: A[float, _seconds("a silent stream is closed; 0: never", 0)] = 0.0
    max_clients: A[int, _count("connections at once")] = 20000
    drain: A[float, _DRAIN] = 30.0
    workers: A[int, _GATEWAY_WORKERS] = 1
    admin: A[str, _ADMIN] = "127.0.0.1:7072"


class AuthorityConfig(_Section):
    """[authority]"""

    directory: A[str, Key("of `rtunnel pki init`: the CA's key and authority.db", None, _FOLDER)] = ""
    listen: A[str, _endpoint("where brokers and gateways ask")] = "0.0.0.0:7443"
    admin: A[str, _ADMIN] = "127.0.0.1:7073"


class Config(_Section):
    """The whole file."""

    log: LogConfig = msgspec.field(default_factory=LogConfig)
    registry: RegistryConfig = msgspec.field(default_factory=RegistryConfig)
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    agent: AgentConfig = msgspec.field(default_factory=AgentConfig)
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
    authority: AuthorityConfig = msgspec.field(default_factory=AuthorityConfig)
    #: Not a key: which file, variable or flag gave each key that was given ("broker.listen").
    sources: dict[str, str] = {}
    #: Not a key: the file that was read; "" for none.
    file: str = ""

    def source(self, key: str) -> str:
        """Where this key's value came from."""
        return self.sources.get(key, "default")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One key of the file, by its whole path."""

    path: str  # "broker.open_ports.range"
    type: Any
    default: Any
    key: Key

    @property
    def env(self) -> str:
        """The variable that overrides it."""
        return ENV_PREFIX + self.path.replace(".", "_").upper()

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return get_origin(self.type) is list


def _leaves(struct: type[msgspec.Struct], path: str) -> Iterator[Leaf]:
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        hint, name = hints[field.name], path + field.name
        if get_origin(hint) is Annotated:
            default = field.default_factory() if callable(field.default_factory) else field.default
            bare, key = get_args(hint)
            yield Leaf(name, bare, default, key)
        elif isinstance(hint, type) and issubclass(hint, _Section):
            yield from _leaves(hint, name + ".")


#: Every key by its path.
KEYS: Mapping[str, Leaf] = MappingProxyType({leaf.path: leaf for leaf in _leaves(Config, "")})
SECTIONS = tuple(dict.fromkeys(path.partition(".")[0] for path in KEYS))


# --- loading ----------------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """An override that knows the name of its flag."""

    name: str
    value: object


class _Given(NamedTuple):
    value: Any
    source: str
    base: Path | None = None  # relative files of a configuration file stand beside it


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Config:
    """Defaults <- file <- environment <- overrides ("broker.listen" -> value or `Flag`; None is not given).

    Raises ConfigError with every fault that can be seen without looking at the machine.
    """
    problems: list[Problem] = []
    given = {**_from_file(path, problems), **_from_environ(environ, problems), **_from_overrides(overrides, problems)}
    values: dict[str, Any] = {}
    for key, entry in given.items():
        try:
            values[key] = _value(KEYS[key], entry)
        except BadValue as fault:
            problems.append(Problem(entry.source, key, str(fault), fault.fix))
        except (msgspec.ValidationError, OverflowError) as fault:
            problems.append(_type_problem(KEYS[key], entry, str(fault)))
    if problems:
        raise ConfigError(problems)
    config: Config = _build(Config, "", values)
    config.sources = {key: entry.source for key, entry in given.items()}
    config.file = str(path or "")
    if problems := list(_cross_check(config)):
        raise ConfigError(problems)
    return config


def reread(config: Config) -> Config:
    """The configuration with what its file says now; variables and flags stay as they were. Raises ConfigError."""
    kept = {key: Flag(source, _get(config, key)) for key, source in config.sources.items() if source != config.file}
    return load(Path(config.file), {}, kept)


def changed(old: Config, new: Config) -> list[str]:
    """The keys whose values differ."""
    return [path for path in KEYS if _get(old, path) != _get(new, path)]


def _from_file(path: Path | None, problems: list[Problem]) -> dict[str, _Given]:
    if path is None:
        return {}
    found: dict[str, _Given] = {}
    _flatten(_read_toml(path), "", path, found, problems)
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as fault:
        reason = fault.strerror or str(fault) if isinstance(fault, OSError) else str(fault)
        raise ConfigError([Problem(source, "", f"can't be read: {reason}")]) from None
    if len(data) > MAX_FILE:
        raise ConfigError([Problem(source, "", f"is larger than {MAX_FILE >> 20} MiB: the wrong file?")])
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        raise ConfigError([Problem(f"{source}:{line}", "", "is not UTF-8 text")]) from None
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError([_syntax_problem(source, data, str(fault))]) from None
    except (ValueError, RecursionError) as fault:  # a number of 5000 digits, a tower of brackets
        raise ConfigError([Problem(source, "", f"can't be parsed: {fault}")]) from None


def _syntax_problem(source: str, data: bytes, text: str) -> Problem:
    """tomllib says where at the end of its sentence: put that behind the file's name, as compilers do."""
    if match := re.search(r" \(at line (\d+), column (\d+)\)$", text):
        line, column = match.groups()
        return Problem(f"{source}:{line}:{column}", "", f"is not TOML: {text[: match.start()]}")
    line = str(data.count(b"\n") + 1)
    return Problem(f"{source}:{line}", "", f"is not TOML: {text.removesuffix(' (at end of document)')}, at the end")


def _flatten(
    table: Mapping[str, Any], prefix: str, path: Path, found: dict[str, _Given], problems: list[Problem]
) -> None:
    for name, value in table.items():
        key = prefix + name
        if key in KEYS:
            found[key] = _Given(value, str(path), path.parent)
        elif not any(known.startswith(key + ".") for known in KEYS):
            problems.append(Problem(str(path), _shown(key), "unknown key", _nearest(key)))
        elif isinstance(value, dict):
            _flatten(value, key + ".", path, found, problems)
        else:
            problems.append(Problem(str(path), key, "is a section, not a value", f"write [{key}]"))


def _shown(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _nearest(key: str) -> str:
    """A suggestion for an unknown key: first among its own section's names, then the same name elsewhere."""
    prefix, _, name = key.rpartition(".")
    depth = prefix.count(".") + 1 if prefix else 0
    siblings = {known.split(".")[depth] for known in KEYS if not prefix or known.startswith(prefix + ".")}
    if near := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    elsewhere = [known for known in KEYS if known.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    return "known here: " + ", ".join(sorted(siblings)) if siblings else ""


# Kubernetes puts these into every pod beside a Service of the name rtunnel-broker.
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")
_ENVS = {leaf.env: leaf.path for leaf in KEYS.values()}


def _from_environ(environ: Mapping[str, str], problems: list[Problem]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for variable, value in environ.items():
        if variable in _ENVS:
            found[_ENVS[variable]] = _Given(value, f"${variable}")
        elif _is_section_variable(variable) and not _is_service_link(variable, value):
            near = difflib.get_close_matches(variable, _ENVS, 1)
            problems.append(Problem(f"${variable}", "", "unknown key", f"did you mean ${near[0]}?" if near else ""))
    return found


def _is_section_variable(variable: str) -> bool:
    return variable.startswith(tuple(f"{ENV_PREFIX}{section.upper()}_" for section in SECTIONS))


def _is_service_link(variable: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(variable)) or (variable.endswith("_PORT") and bool(_SERVICE_URL.match(value)))


def _from_overrides(overrides: Mapping[str, object], problems: list[Problem]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for key, value in overrides.items():
        flag = value if isinstance(value, Flag) else Flag("override", value)
        if flag.value is None:
            continue
        if key in KEYS:
            found[key] = _Given(flag.value, flag.name)
        else:
            problems.append(Problem(flag.name, _shown(key), "unknown key", _nearest(key)))
    return found


def _value(leaf: Leaf, given: _Given) -> Any:
    value = given.value
    # Only a file has types: what comes as text from a variable or a flag is read as the key's type.
    from_text = given.base is None
    if leaf.is_list and from_text:
        value = _split(value)
    if leaf.key.before is not None and isinstance(value, list):
        value = leaf.key.before(value)
    value = msgspec.convert(value, leaf.type, strict=not from_text)
    if leaf.key.unit in (_FILE, _FOLDER) and value and given.base is not None:
        value = str(given.base / value)
    return value if leaf.key.check is None else leaf.key.check(value)


def _split(value: Any) -> Any:
    """Comma-separated text, or several such from a flag that was repeated."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    parts: list[Any] = []
    for item in items:
        parts += [word.strip() for word in item.split(",") if word.strip()] if isinstance(item, str) else [item]
    return parts


def _type_problem(leaf: Leaf, given: _Given, text: str) -> Problem:
    reason, _, where = text.partition(" - at `$")
    key = leaf.path + where.rstrip("`")
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        known = [field.name for field in msgspec.structs.fields(get_args(leaf.type)[0])]
        near = difflib.get_close_matches(match[1], known, 1)
        fix = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(known)
        return Problem(given.source, f"{key}.{_shown(match[1])}", "unknown key", fix)
    default = msgspec.json.encode(leaf.default).decode()
    if given.base is None and leaf.type in (int, float):
        reason = f"{given.value!r} is not a {'whole ' if leaf.type is int else ''}number"
    return Problem(given.source, key, reason[:1].lower() + reason[1:], f"the default is {default}")


def _build(struct: type[Any], path: str, values: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {}
    for name, hint in get_type_hints(struct).items():
        if isinstance(hint, type) and issubclass(hint, _Section):
            arguments[name] = _build(hint, f"{path}{name}.", values)
        elif path + name in values:
            arguments[name] = values[path + name]
    return struct(**arguments)


# --- checks over several keys -----------------------------------------------------------------------------


def _cross_check(config: Config) -> Iterator[Problem]:
    yield from _check_registry(config)
    yield from _check_ports(config, ("broker",))
    yield from _check_ports(config, ("agent",))
    yield from _check_ports(config, ("gateway",))
    yield from _check_ports(config, ("authority",))
    yield from _check_open_ports(config)
    if config.gateway.no_auth and not config.gateway.users:
        fix = "give users, or leave no_auth out: without users nobody can log in"
        yield _problem(config, "gateway.no_auth", "means nothing without users", fix)
    yield from _check_workers(config)
    yield from _check_identity(config)
    for key in ("gateway.trust", "gateway.authority"):
        if _get(config, key) and not config.gateway.ca:
            yield _problem(config, key, "means nothing without gateway.ca", "give the cluster's ca.pem file")
    if config.agent.addresses:
        yield from _check_publish(config, config.agent.addresses)


def _check_registry(config: Config) -> Iterator[Problem]:
    registry = config.registry
    if registry.ttl < 2 * registry.heartbeat:
        reason = f"{registry.ttl:g} s is less than 2 heartbeats of {registry.heartbeat:g} s: one late beat loses tuples"
        yield _problem(config, "registry.ttl", reason, f"use {2 * registry.heartbeat:g} or more", "registry.heartbeat")
    if registry.quarantine < registry.ttl:
        reason = f"{registry.quarantine:g} s is less than ttl, {registry.ttl:g} s: a tuple may outlive its port"
        yield _problem(config, "registry.quarantine", reason, f"use {registry.ttl:g} or more", "registry.ttl")


def _check_open_ports(config: Config) -> Iterator[Problem]:
    open_ports = config.broker.open_ports
    if open_ports.range and not open_ports.allow:
        fix = 'say who may connect, like allow = ["10.0.0.0/8"]'
        yield _problem(config, "broker.open_ports.allow", "open ports need a list of networks", fix)
    if open_ports.allow and not open_ports.range:
        fix = 'give the ports, like range = "30000-30999"'
        yield _problem(config, "broker.open_ports.range", "open ports need a range", fix, "broker.open_ports.allow")


def _check_identity(config: Config) -> Iterator[Problem]:
    """What certificates need of each other, for the side that judges them and the side that shows one."""
    for key in ("broker.trust", "broker.authority"):
        if _get(config, key) and not config.broker.ca:
            yield _problem(config, key, "means nothing without broker.ca", "give the cluster's ca.pem file")
    agent = config.agent
    if bool(agent.certificate) != bool(agent.key):
        missing, given = ("key", "certificate") if agent.certificate else ("certificate", "key")
        fix = "give both, or neither"
        yield _problem(config, f"agent.{missing}", f"is not given, and agent.{given} is", fix, f"agent.{given}")
    if agent.identity and agent.certificate:
        fix = "leave one out: identity is for certificates that the agent gets by itself"
        yield _problem(config, "agent.identity", "and agent.certificate are both given", fix, "agent.certificate")


def _check_workers(config: Config) -> Iterator[Problem]:
    broker = config.broker
    if broker.workers == 1:
        return
    for key in ("broker.port_range", "broker.open_ports.range"):
        low, high = parse_range(text) if (text := _get(config, key)) else (1, MAX_WORKERS)
        if high - low + 1 < broker.workers:
            reason = f"{text} has {high - low + 1} ports, and {broker.workers} workers need some each"
            yield _problem(config, key, reason, "widen it, or lower broker.workers", "broker.workers")
    suffix = len(f".{broker.workers}")
    if len(broker.node_id) + suffix > MAX_WORD:
        reason = f"is {len(broker.node_id)} characters long, and each worker's number comes behind it"
        yield _problem(config, "broker.node_id", reason, f"use at most {MAX_WORD - suffix}")


def _check_ports(config: Config, sections: Sequence[str]) -> Iterator[Problem]:
    """Nothing that one process binds may overlap."""
    taken: list[tuple[str, str, int, int]] = []
    for key, host, low, high in _claims(config, sections):
        for other, other_host, other_low, other_high in taken:
            if low <= other_high and other_low <= high and _same_host(host, other_host):
                reason = f"{_span(low, high)} overlaps {other} ({_span(other_low, other_high)})"
                yield _problem(config, key, reason, "give each its own ports", other)
        taken.append((key, host, low, high))


def _claims(config: Config, sections: Sequence[str]) -> Iterator[tuple[str, str, int, int]]:
    for section in sections:
        for name in ("listen", "admin"):
            endpoint = getattr(getattr(config, section), name, "")
            host, port = parse_endpoint(endpoint) if endpoint else ("", 0)
            if port:
                yield f"{section}.{name}", host, port, port
    if "broker" in sections:
        ranges = (
            ("broker.port_range", config.broker.port_range),
            ("broker.open_ports.range", config.broker.open_ports.range),
        )
        for key, text in ranges:
            if text:
                yield key, "", *parse_range(text)


def _same_host(one: str, other: str) -> bool:
    """Whether sockets on both could collide; "" and the unspecified addresses are every address."""
    return one == other or any(host in ("", "0.0.0.0", "::") for host in (one, other))  # noqa: S104 - compared, not bound


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _check_publish(config: Config, addresses: Sequence[str]) -> Iterator[Problem]:
    for index, entry in enumerate(config.agent.publish):
        host, _ = parse_endpoint(entry.target)
        if host not in addresses:
            reason = f"{host} is none of the agent's addresses ({', '.join(addresses)})"
            key = f"agent.publish[{index}].target"
            yield Problem(config.source("agent.publish"), key, reason, "add it to agent.addresses")


def _problem(config: Config, key: str, reason: str, fix: str, *others: str) -> Problem:
    """A fault between keys: when the first one was not given, one of the others was."""
    source = next((config.sources[name] for name in (key, *others) if name in config.sources), "default")
    return Problem(source, key, reason, fix)


# --- what a role needs ------------------------------------------------------------------------------------


def role_sections(role: str) -> tuple[str, ...]:
    """The sections that a role reads, beside [log] and [registry]."""
    if role not in ROLES:
        raise ValueError(f"no such role: {role!r} (known: {', '.join(ROLES)})")
    return ("broker", "gateway") if role == "standalone" else (role,)


def check_role(config: Config, role: str) -> None:
    """Whether this role could start here: what it needs is given, its files are readable. Raises ConfigError."""
    problems = [problem for section in role_sections(role) for problem in _NEEDS[section](config)]
    faults = ((key, _file_fault(_get(config, key))) for key in _role_files(config, role))
    problems += [Problem(config.source(key), key, reason) for key, reason in faults if reason]
    if role == "standalone":
        problems += _check_ports(config, role_sections(role))
        if config.broker.dial_security != config.gateway.dial_security:
            reason = f"is {config.gateway.dial_security}, and broker.dial_security is {config.broker.dial_security}"
            problems.append(_problem(config, "gateway.dial_security", reason, "set both", "broker.dial_security"))
        for key in ("broker.workers", "gateway.workers"):
            if _get(config, key) > 1:
                fix = "use 1, or run `rtunnel broker` and `rtunnel gateway`"
                problems.append(_problem(config, key, "`rtunnel standalone` is one process", fix))
    elif role == "gateway" and is_memory(config):
        reason = "the memory registry lives inside one process: a gateway of its own would never see a tuple"
        problems.append(_problem(config, "registry.url", reason, "use redis://..., or run `rtunnel standalone`"))
    elif role == "broker" and is_memory(config) and config.broker.workers > 1:
        reason = "the memory registry lives inside one process, and several workers need one together"
        problems.append(_problem(config, "registry.url", reason, "use redis://...", "broker.workers"))
    if problems:
        raise ConfigError(problems)


def is_memory(config: Config) -> bool:
    """Whether tuples live in this process only."""
    return urlsplit(config.registry.url).scheme == "memory"


def warnings(config: Config, role: str) -> list[Problem]:
    """What is allowed for this role and probably not meant."""
    found = [
        _problem(config, f"{section}.security", "links are not encrypted", "use tls")
        for section in role_sections(role)
        if getattr(getattr(config, section), "security", "") == "plain"
    ]
    for key in _role_files(config, role):
        if KEYS[key].key.secret and (mode := _open_to_others(_get(config, key))):
            reason = f"{_get(config, key)} has mode {mode:04o}: other users of this machine can use it"
            found.append(Problem(config.source(key), key, reason, "chmod 0600"))
    if role == "authority":
        found += _open_directory(config)
    if "broker" in role_sections(role):
        found += _ephemeral_overlaps(config)
    if "gateway" in role_sections(role):
        found += _open_doors(config)
        if config.gateway.proof == "off":
            reason = "agents need not prove that they have an address: registry and brokers are believed"
            found.append(_problem(config, "gateway.proof", reason, 'write proof = "required"'))
    if role == "broker" and is_memory(config):
        reason = "the memory registry lives inside one process: no gateway and no other broker will see this node"
        found.append(_problem(config, "registry.url", reason, "use redis://..., or run `rtunnel standalone`"))
    if role == "agent" and not (config.agent.exposes or config.agent.publish):
        found.append(_problem(config, "agent.exposes", "is empty: nothing can be reached through this agent", ""))
    return found


def _open_directory(config: Config) -> Iterator[Problem]:
    key = "authority.directory"
    folder = Path(config.authority.directory)
    for path in sorted([*folder.glob("*.key"), *folder.glob("authority.db*")]):
        if mode := _open_to_others(str(path)):
            reason = f"{path} has mode {mode:04o}: other users of this machine can use it"
            yield Problem(config.source(key), key, reason, "chmod 0600")


def _open_doors(config: Config) -> Iterator[Problem]:
    gateway = config.gateway
    host, _ = parse_endpoint(gateway.listen)
    if not gateway.policy and not ipaddress.ip_address(host).is_loopback:
        reason = f"is not given, and {gateway.listen} listens for others: only clients on this machine will be served"
        yield _problem(config, "gateway.policy", reason, "write rules (docs/policy.md)", "gateway.listen")


def _need(config: Config, key: str, why: str, fix: str) -> list[Problem]:
    return [] if _get(config, key) else [Problem(config.source(key), key, f"is not given: {why}", fix)]


_PKI = "`rtunnel pki init DIR` makes one"


def _broker_needs(config: Config) -> list[Problem]:
    problems = _need(config, "broker.cluster_key", "Dials are checked with it", _PKI)
    if config.broker.security == "plain":
        problems += _need(config, "broker.join_token", "a plain link carries no certificates", _PKI)
    elif not config.broker.ca:
        fix = "give ca for agents with certificates, or join_token for shared tokens; " + _PKI
        if not config.broker.join_token:
            problems += _need(config, "broker.ca", "and neither is broker.join_token: no agent could join", fix)
    for key, what in (("security", "links use"), ("dial_security", "guarded ports use")):
        if getattr(config.broker, key) == "tls":
            problems += _need(config, "broker.certificate", f"{what} TLS", _PKI)
            problems += _need(config, "broker.key", f"{what} TLS", _PKI)
            break
    return problems


def _agent_needs(config: Config) -> list[Problem]:
    problems = _need(config, "agent.brokers", "there is nothing to dial", 'write brokers = ["vip.example:7000"]')
    agent = config.agent
    if agent.security == "plain":
        fix = "the cluster's join.token file"
        problems += _need(config, "agent.join_token", "a plain link carries no certificates", fix)
    elif agent.identity and _file_fault(str(Path(agent.identity, "agent.pem"))):
        why = f"there is no certificate in {agent.identity}"
        problems += _need(config, "agent.join_token", why, "`rtunnel pki token create` makes one")
    elif not (agent.certificate or agent.identity):
        fix = "give identity and, as join_token, a token of `rtunnel pki token create`"
        problems += _need(config, "agent.join_token", "brokers ask for a certificate or a token", fix)
    if agent.security == "tls" or agent.identity:
        problems += _need(config, "agent.ca", "brokers and certificates are known by it", "the cluster's ca.pem file")
    if not config.agent.addresses:
        problems += _check_publish(config, [default_address()])
    return problems


def _gateway_needs(config: Config) -> list[Problem]:
    problems = _need(config, "gateway.key", "Dials are signed with it", "`rtunnel pki issue gateway` makes one")
    if config.gateway.proof == "required":
        fix = 'give the cluster\'s ca.pem, or write proof = "off" to believe registry and brokers'
        problems += _need(config, "gateway.ca", "agents' proofs are checked with it (gateway.proof = required)", fix)
    elif config.gateway.dial_security == "tls":
        problems += _need(config, "gateway.ca", "brokers are known by it", "the cluster's ca.pem file")
    return problems


def _authority_needs(config: Config) -> list[Problem]:
    return _need(config, "authority.directory", "certificates come from there", _PKI)


_NEEDS: dict[str, Callable[[Config], list[Problem]]] = {
    "broker": _broker_needs,
    "agent": _agent_needs,
    "gateway": _gateway_needs,
    "authority": _authority_needs,
}


def _role_files(config: Config, role: str) -> Iterator[str]:
    """The file keys that this role will open, and that must be there."""
    unused = {path for path, leaf in KEYS.items() if leaf.key.made}
    if config.broker.security == config.broker.dial_security == "plain":
        unused |= {"broker.certificate", "broker.key"}
    if config.agent.security == "plain" and not config.agent.identity:
        unused.add("agent.ca")
    for section in role_sections(role):
        for path, leaf in KEYS.items():
            if path.startswith(section + ".") and leaf.key.unit == _FILE and _get(config, path) and path not in unused:
                yield path


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _file_fault(name: str) -> str:
    try:
        # Looked at before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(Path(name).stat().st_mode):
            return f"{name} is not a file"
        with Path(name).open("rb"):
            return ""
    except (OSError, ValueError) as fault:
        return f"{name} can't be read: {getattr(fault, 'strerror', None) or fault}"


def _open_to_others(name: str) -> int:
    """The mode of a file that everyone may read or write, else 0."""
    try:
        mode = stat.S_IMODE(Path(name).stat().st_mode)
    except (OSError, ValueError):
        return 0
    return mode if mode & (stat.S_IROTH | stat.S_IWOTH) else 0


_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _ephemeral_overlaps(config: Config) -> Iterator[Problem]:
    """The kernel gives out ports of this range to outgoing connections, and may have given away ours."""
    try:
        kernel_low, kernel_high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        return
    for key in ("broker.port_range", "broker.open_ports.range"):
        text = _get(config, key)
        low, high = parse_range(text) if text else (0, 0)
        if text and low <= kernel_high and kernel_low <= high:
            reason = f"{text} overlaps net.ipv4.ip_local_port_range {kernel_low}-{kernel_high}: some will be in use"
            yield _problem(config, key, reason, "use ports outside of it, or net.ipv4.ip_local_reserved_ports")
