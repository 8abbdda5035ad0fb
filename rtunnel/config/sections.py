"""The sections of the file: each key with its type, default, unit, meaning and check on one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated as A
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from rtunnel.config.checks import (
    Check,
    between,
    check_address,
    check_addresses,
    check_expose,
    check_exposes,
    check_listen,
    check_port_range,
    check_registry_url,
    check_remote,
    check_server_name,
    each,
    one_of,
    optional,
)
from rtunnel.config.values import (
    BadValue,
    Problem,
    check_network,
    check_word,
    format_endpoint,
    parse_endpoint,
    parse_port,
)

ENV_PREFIX = "RTUNNEL_"

#: What fits into one Hello (rtunnel/wire/messages.py).
MAX_PUBLISH = 64
MAX_ALLOW = 64
#: Rules of [[broker.admit]].
MAX_ADMIT = 1000
#: Processes on one port: more than that are several machines.
MAX_WORKERS = 64
#: Timers count milliseconds in 31 bits (24 days); nobody means more than this.
MAX_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key beside its type and default."""

    help: str
    check: Check | None = None
    unit: str = ""
    secret: bool = False  # a file that only its owner should read
    before: Check | None = None  # widens what is taken, ahead of the type check
    made: bool = False  # a file that the role writes: it need not be there


#: Units: paths, which stand beside the file that names them.
FILE = "file"
FOLDER = "folder"


def _seconds(text: str, low: float = 0.01, high: float = MAX_SECONDS) -> Key:
    return Key(text, between(low, high), "seconds")


def _count(text: str, high: int = 1_000_000) -> Key:
    return Key(text, between(1, high), "count")


def _at_most(text: str) -> Key:
    return Key(text, between(0, 1_000_000), "count")


def _rate(text: str) -> Key:
    return Key(text, between(0, 1_000_000), "per second")


def _choice(text: str, *words: str) -> Key:
    return Key(text, one_of(*words), "word")


def _id(text: str) -> Key:
    return Key(text, optional(check_word), "word")


def _file(text: str, *, secret: bool = False, made: bool = False) -> Key:
    return Key(text, None, FILE, secret, made=made)


def _endpoint(text: str) -> Key:
    return Key(text, check_listen, "host:port")


def _publish_one(entry: PublishConfig) -> PublishConfig:
    host, port = parse_endpoint(entry.target)
    if port == 0:
        raise BadValue(f"target {entry.target!r} has no port", "use 1..65535")
    target = format_endpoint(check_address(host), port)
    if not 0 <= entry.port <= 65535:
        raise BadValue(f"port {entry.port} of {target}", "use 1..65535, or 0 for a random one")
    return PublishConfig(target=target, port=entry.port, allow=each(check_network, MAX_ALLOW)(entry.allow))


def _publish_words(value: Any) -> Any:
    """Beside tables: "10.1.0.7:9100" and "10.1.0.7:9100@30001" (the broker's port), for flags and variables."""
    return [_publish_table(item) if isinstance(item, str) else item for item in value]


def _publish_table(text: str) -> dict[str, object]:
    target, at, port = text.partition("@")
    return {"target": target, "port": parse_port(port, 0) if at else 0}


def _admit_one(rule: AdmitConfig) -> AdmitConfig:
    if not 0 <= rule.streams <= 1_000_000:
        raise BadValue(f"streams = {rule.streams}", "use 1..1000000, or 0 for no limit")
    return AdmitConfig(
        namespaces=each(check_word, MAX_ALLOW)(rule.namespaces),
        networks=each(check_network, MAX_ALLOW)(rule.networks),
        open_ports=each(check_expose, MAX_ALLOW)(rule.open_ports),
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


_ADMIN = Key('health over HTTP; "" for none', optional(check_listen), "host:port")
_SECURITY = _choice("of links: tls, or plain for no encryption at all", "tls", "plain")
_NAMESPACE = Key("tells apart VPCs that use the same addresses", check_word, "word")
_CLUSTER_KEY = _file("the key that gateways' keys are derived from, one for the cluster", secret=True)
_CA = _file("PEM: the cluster's CA; agents are known by it")
_AUTHORITY = Key("where agents' certificates and the newest trust list come from", optional(check_remote), "host:port")
_TRUST = _file("the newest trust list: kept here, and read when it changes; need not be there", made=True)
_DIAL_SECURITY = _choice("of Dials to guarded ports and what follows them: plain, or tls", "plain", "tls")
_PROOF = _choice("agents must prove that they have the target's address: required, or off", "required", "off")
_DRAIN = _seconds("at SIGTERM streams may finish for so long", low=0)
_HEDGE_DELAY = _seconds(
    "the next tuple is tried beside one that is silent for so long, while its usual time is not known", low=0
)
_SOURCE_ADDRESSES = Key(
    "of this machine, from which brokers are dialled in turn, for more source ports; default: the kernel's choice",
    check_addresses,
    "IPs",
)
_KEEP_ALIVE = "an HTTP client may wait so long with its next request in absolute form; 0: one request a connection"
_LAME_DUCK = _seconds("at SIGTERM /readyz is 503, and new clients are served for so long, before the drain", low=0)
_LEVEL = _choice("the least level that is written: debug, info, warning or error", "debug", "info", "warning", "error")
_FORMAT = _choice("json, console, or auto: console on a terminal", "auto", "json", "console")
_URL = Key("memory://, redis://, rediss://, unix://, redis+sentinel://host,host/service/db", check_registry_url, "URL")
_ADVERTISE = "the PS IP, where gateways reach this node's ports; default: the address of the default route"
_WORKERS = _count("processes on one port, each a node of its own with its part of the ranges", MAX_WORKERS)
_STREAM_MEMORY = Key("held for streams that stall; above it new ones are refused", between(16, 1 << 20), "MiB")
_GATEWAY_WORKERS = _count("processes on one port", MAX_WORKERS)
_OPEN_ALLOW = "networks that may connect; an agent's own list can only narrow it"
_NO_AUTH = "networks whose clients need not log in, though there is a file of users"
_BROKERS = "the VIP; of several addresses the least recently dialled comes next, names are resolved at every dial"
_ADDRESSES_HELP = "original IPs that it answers for; default: the address of the default route"
_EXPOSES = Key(
    'ports that clients may reach: "9100", "8000-8100", "loopback:9100"; none by default; read again from the file',
    check_exposes,
    "ports",
    before=_numbers_too,
)
_ADMIT = Key(
    "who may register what; without rules all that the agent proves",
    each(_admit_one, MAX_ADMIT),
    "tables",
    before=_tables_only,
)
_SOURCE_HANDSHAKES = "links of one source without Welcome; 0: no limit, for a VIP that hides the agents' addresses"
_PUBLISH = Key(
    "open ports to ask for: IP:PORT, or IP:PORT@BROKER_PORT",
    each(_publish_one, MAX_PUBLISH),
    "tables",
    before=_publish_words,
)


class Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A section of the file."""


class LogConfig(Section):
    """[log]"""

    level: A[str, _LEVEL] = "info"
    format: A[str, _FORMAT] = "auto"


class RegistryConfig(Section):
    """[registry]"""

    url: A[str, _URL] = "memory://"
    prefix: A[str, Key("of every key in Redis", check_word, "word")] = "rtunnel"
    heartbeat: A[float, _seconds("a node refreshes its tuples so often")] = 3.0
    ttl: A[float, _seconds("a tuple dies so long after its last heartbeat; at least 2 heartbeats")] = 8.0
    quarantine: A[float, _seconds("a freed port rests so long; at least ttl")] = 60.0
    timeout: A[float, _seconds("of one registry call", 0.05, 10)] = 1.0
    reconcile: A[float, _seconds("gateways compare everything so often")] = 60.0


class OpenPortsConfig(Section):
    """[broker.open_ports]: none unless both are given."""

    range: A[str, Key("for agents' publish requests, fixed or random", optional(check_port_range), "ports")] = ""
    allow: A[list[str], Key(_OPEN_ALLOW, each(check_network, MAX_ALLOW), "CIDRs")] = []
    per_agent: A[int, _count("of one agent on this node; those in quarantine after it count", 65535)] = 64
    #: Not a key: the part of `range` that this worker gives out at random (rtunnel/workers.py); "" for all of it.
    own: str = ""


class AdmitConfig(Section):
    """[[broker.admit]]: what some agents may register. Lists of whom it is for: empty is everybody."""

    namespaces: A[list[str], Key("the agent's", None, "words")] = []
    networks: A[list[str], Key("that every address of the agent must be in", None, "CIDRs")] = []
    open_ports: A[list[str], Key("that it may ask for (`agent.publish`); none by default", None, "ports")] = []
    streams: A[int, Key("of the agent at once, on each node; 0: no limit", None, "count")] = 0


class BrokerConfig(Section):
    """[broker]"""

    listen: A[str, _endpoint("where agents' links arrive")] = "0.0.0.0:7000"
    node_id: A[str, _id("of this node, one in the cluster; default: the host's name")] = ""
    host: A[str, _id("label of the machine; default: the host's name")] = ""
    advertise_ip: A[str, Key(_ADVERTISE, optional(check_address), "IP")] = ""
    port_range: A[str, Key("guarded ports, one for each session", check_port_range, "ports")] = "20000-29999"
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
    stream_memory: A[int, _STREAM_MEMORY] = 256
    drain: A[float, _DRAIN] = 30.0
    workers: A[int, _WORKERS] = 1
    admin: A[str, _ADMIN] = "127.0.0.1:7070"


class PublishConfig(Section):
    """[[agent.publish]]: ask for an open port."""

    target: A[str, Key("what the open port leads to; the address must be one of the agent's", None, "host:port")]
    port: A[int, Key("the broker's port; 0: a random one of its range", None, "port")] = 0
    allow: A[list[str], Key("networks that may connect; empty: whom the broker allows", None, "CIDRs")] = []


class AgentConfig(Section):
    """[agent]"""

    brokers: A[list[str], Key(_BROKERS, each(check_remote, 64), "host:port")] = []
    agent_id: A[str, _id("outlives restarts; default: the host's name")] = ""
    namespace: A[str, _NAMESPACE] = "default"
    addresses: A[list[str], Key(_ADDRESSES_HELP, check_addresses, "IPs")] = []
    address_check: A[float, _seconds("it looks so often whether this host still has its addresses")] = 5.0
    exposes: A[list[str], _EXPOSES] = []
    publish: A[list[PublishConfig], _PUBLISH] = []
    redundancy: A[int, _count("sessions, each on another node", 8)] = 2
    security: A[str, _SECURITY] = "tls"
    ca: A[str, _file("PEM: the CAs of the cluster")] = ""
    server_name: A[str, Key("that the broker's certificate must carry", check_server_name, "name")] = "broker.rtunnel"
    identity: A[str, Key("where the agent keeps the certificate that it enrols for, and its key", None, FOLDER)] = ""
    certificate: A[str, _file("PEM: a certificate that was made by hand, instead of `identity`")] = ""
    key: A[str, _file("PEM: its private key", secret=True)] = ""
    join_token: A[str, _file("the agent's token: to enrol for a certificate, or to join without one", secret=True)] = ""
    connect_timeout: A[float, _seconds("to a broker")] = 5.0
    handshake_timeout: A[float, _seconds("for a link until Welcome")] = 20.0
    target_timeout: A[float, _seconds("to a target")] = 10.0
    backoff_cap: A[float, _seconds("longest pause between two dials")] = 10.0
    stream_memory: A[int, _STREAM_MEMORY] = 128
    drain: A[float, _DRAIN] = 30.0
    admin: A[str, _ADMIN] = "127.0.0.1:7071"


class LimitsConfig(Section):
    """[gateway.limits]: what one source, and one user, may have."""

    source_handshakes: A[int, _at_most("connections of one source that are not streams yet; 0: no limit")] = 1024
    source_rate: A[float, _rate("new connections of one source; 0: no limit")] = 0.0
    source_streams: A[int, _at_most("streams of one source; 0: no limit")] = 0
    user_rate: A[float, _rate("new connections of one user; 0: no limit")] = 0.0
    user_streams: A[int, _at_most("streams of one user; 0: no limit")] = 0


class GatewayConfig(Section):
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
    no_auth: A[list[str], Key(_NO_AUTH, each(check_network, MAX_ALLOW), "CIDRs")] = []
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    handshake_timeout: A[float, _seconds("a client must have said what it wants by then")] = 10.0
    hedge_delay: A[float, _HEDGE_DELAY] = 0.25
    dial_timeout: A[float, _seconds("all tuples together")] = 15.0
    idle_timeout: A[float, _seconds("a silent stream is closed; 0: never", 0)] = 0.0
    max_clients: A[int, _count("connections at once")] = 20000
    keep_alive: A[float, _seconds(_KEEP_ALIVE, 0)] = 60.0
    stream_memory: A[int, _STREAM_MEMORY] = 256
    max_head: A[int, Key("of one HTTP head: request line and fields", between(4096, 1 << 20), "bytes")] = 65536
    source_addresses: A[list[str], _SOURCE_ADDRESSES] = []
    lame_duck: A[float, _LAME_DUCK] = 5.0
    drain: A[float, _DRAIN] = 30.0
    workers: A[int, _GATEWAY_WORKERS] = 1
    admin: A[str, _ADMIN] = "127.0.0.1:7072"


_RENEW = _choice(
    "certificates that are renewed: known, those of its store; all, after an older copy was put back", "known", "all"
)


class AuthorityConfig(Section):
    """[authority]"""

    directory: A[str, Key("of `rtunnel pki init`: the CA's key and authority.db", None, FOLDER)] = ""
    listen: A[str, _endpoint("where brokers and gateways ask")] = "0.0.0.0:7443"
    renew: A[str, _RENEW] = "known"
    admin: A[str, _ADMIN] = "127.0.0.1:7073"


class Config(Section):
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

    def get(self, key: str) -> Any:
        """The value of a key by its whole path."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def problem(self, key: str, reason: str, fix: str = "", *others: str) -> Problem:
        """A fault of a key, maybe between it and others: when it was not given itself, one of them was."""
        source = next((self.sources[name] for name in (key, *others) if name in self.sources), "default")
        return Problem(source, key, reason, fix)


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
        if get_origin(hint) is A:
            default = field.default_factory() if callable(field.default_factory) else field.default
            bare, key = get_args(hint)
            yield Leaf(name, bare, default, key)
        elif isinstance(hint, type) and issubclass(hint, Section):
            yield from _leaves(hint, name + ".")


#: Every key by its path.
KEYS: Mapping[str, Leaf] = MappingProxyType({leaf.path: leaf for leaf in _leaves(Config, "")})
SECTIONS = tuple(dict.fromkeys(path.partition(".")[0] for path in KEYS))
