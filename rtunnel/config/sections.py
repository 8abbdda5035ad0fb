"""The sections of the file.

Each key stands on a line with its type, default, unit, meaning, check.
"""

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

#: Items that fit into one Hello (rtunnel/wire/messages.py).
MAX_PUBLISH = 64
MAX_ALLOW = 64
#: Rules that [[broker.admit]] may have.
MAX_ADMIT = 1000
#: Processes on one port. A role that needs more needs several machines.
MAX_WORKERS = 64
#: Longest duration. Timers count milliseconds in 31 bits (24 days), and no setting needs more than
#: this.
MAX_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Key:
    """The properties of a key beside its type and default."""

    help: str
    check: Check | None = None
    unit: str = ""
    secret: bool = False  # a file that only its owner should be able to read
    before: Check | None = None  # converts other types of value before the type check
    made: bool = False  # a file that the role writes, and that need not exist


#: Units of keys whose values are paths, relative to the folder of the file that names them.
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
        raise BadValue(f"port {entry.port} of {target} is out of bounds", "use 1..65535, or 0 for a random one")
    return PublishConfig(target=target, port=entry.port, allow=each(check_network, MAX_ALLOW)(entry.allow))


def _publish_words(value: Any) -> Any:
    """Return tables for "10.1.0.7:9100" or "10.1.0.7:9100@30001", as flags and variables give them.

    The second port is the broker's.
    """
    return [_publish_table(item) if isinstance(item, str) else item for item in value]


def _publish_table(text: str) -> dict[str, object]:
    target, at, port = text.partition("@")
    return {"target": target, "port": parse_port(port, 0) if at else 0}


def _admit_one(rule: AdmitConfig) -> AdmitConfig:
    if not 0 <= rule.streams <= 1_000_000:
        raise BadValue(f"streams = {rule.streams} is out of bounds", "use 1..1000000, or 0 for no limit")
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
    """Return the entries with numbers as text: `exposes = [9100]` means `["9100"]`."""
    return [str(item) if type(item) is int else item for item in value]


_ADMIN_TOKEN = _file("the token of the API at `admin`; without it the API is off", secret=True)
_ADMIN = Key('health over HTTP; "" for none', optional(check_listen), "host:port")
_SECURITY = _choice("of links: tls, or plain for no encryption at all", "tls", "plain")
_NAMESPACE = Key("distinguishes VPCs that use the same addresses", check_word, "word")
_CLUSTER_KEY = _file("the cluster's key, from which gateways' keys are derived", secret=True)
_CA = _file("PEM: the cluster's CA, which verifies agents")
_AUTHORITY = Key(
    "the authority, which issues agents' certificates and the trust list", optional(check_remote), "host:port"
)
_TRUST = _file("the newest trust list: written here, and read when the file changes; need not exist", made=True)
_DIAL_SECURITY = _choice("of connections to guarded ports: plain, or tls", "plain", "tls")
_PROOF = _choice("agents must prove that they have the target's address: required, or off", "required", "off")
_DRAIN = _seconds("time for streams to finish after SIGTERM", low=0)
_HEDGE_DELAY = _seconds(
    "time after which the next tuple is tried beside a silent one, until enough answer times are known", low=0
)
_SOURCE_ADDRESSES = Key(
    "addresses of this machine from which brokers are dialled in turn, for more source ports; "
    "default: the kernel's choice",
    check_addresses,
    "IPs",
)
_KEEP_ALIVE = "time until an HTTP client's next request in absolute form; 0: one request for each connection"
_LAME_DUCK = _seconds(
    "time after SIGTERM in which /readyz is 503 and new clients are still served, before the drain", low=0
)
_LEVEL = _choice("lowest level that is written: debug, info, warning or error", "debug", "info", "warning", "error")
_FORMAT = _choice(
    "json, ecs (JSON with the names of the Elastic Common Schema), console, or auto: console on a terminal",
    "auto", "json", "ecs", "console",
)  # fmt: skip
_URL = Key("memory://, redis://, rediss://, unix://, redis+sentinel://host,host/service/db", check_registry_url, "URL")
_ADVERTISE = "the PS IP, where gateways reach this node's ports; default: the address of the default route"
_WORKERS = _count("processes on one port, each a node of its own with its part of the ranges", MAX_WORKERS)
_STREAM_MEMORY = Key("memory for streams that stall; above it new streams are refused", between(16, 1 << 20), "MiB")
_GATEWAY_WORKERS = _count("processes on one port", MAX_WORKERS)
_OPEN_ALLOW = "networks that may connect; an agent's own list can only narrow it"
_NO_AUTH = "networks whose clients need not log in, also with a users file"
_BROKERS = "the VIP, or several addresses that are dialled in turn; names are resolved at every dial"
_ADDRESSES_HELP = "original IPs of this host that clients dial; default: the address of the default route"
_EXPOSES = Key(
    'ports that clients may reach: "9100", "8000-8100", "loopback:9100"; none by default; read again from the file',
    check_exposes,
    "ports",
    before=_numbers_too,
)
_ADMIT = Key(
    "rules for what agents may register; without rules an agent may register all that it proves",
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
    """One section of the file, with its keys as fields."""


class LogConfig(Section):
    """The keys of [log]: which lines are written, and how."""

    level: A[str, _LEVEL] = "info"
    format: A[str, _FORMAT] = "auto"


class RegistryConfig(Section):
    """The keys of [registry]: the server, lifetimes and deadlines."""

    url: A[str, _URL] = "memory://"
    prefix: A[str, Key("prefix of every key in Redis", check_word, "word")] = "rtunnel"
    heartbeat: A[float, _seconds("interval at which a node refreshes its tuples")] = 3.0
    ttl: A[float, _seconds("lifetime of a tuple after its last heartbeat; at least 2 heartbeats")] = 8.0
    quarantine: A[float, _seconds("time for which a freed port is given to its last owner only; at least ttl")] = 60.0
    timeout: A[float, _seconds("deadline of one registry call", 0.05, 10)] = 1.0
    reconcile: A[float, _seconds("interval at which a gateway compares its table with the whole registry")] = 60.0


class OpenPortsConfig(Section):
    """The keys of [broker.open_ports]. There are open ports only when range and allow are given."""

    range: A[str, Key("ports for agents' publish requests, fixed or random", optional(check_port_range), "ports")] = ""
    allow: A[list[str], Key(_OPEN_ALLOW, each(check_network, MAX_ALLOW), "CIDRs")] = []
    per_agent: A[int, _count("open ports of one agent on this node, including those in quarantine after it", 65535)] = (
        64
    )
    #: Not a key: the part of `range` from which this worker allocates random ports
    #: (rtunnel/workers.py); "" for all of it.
    own: str = ""


class AdmitConfig(Section):
    """The keys of [[broker.admit]]: what some agents may register.

    The agents are selected by `namespaces` and `networks`; an empty list selects every agent.
    """

    namespaces: A[list[str], Key("the agent's namespace is one of these", None, "words")] = []
    networks: A[list[str], Key("networks in which every address of the agent must be", None, "CIDRs")] = []
    open_ports: A[
        list[str], Key("open ports that the agent may request (`agent.publish`); none by default", None, "ports")
    ] = []
    streams: A[int, Key("streams of the agent at once, on each node; 0: no limit", None, "count")] = 0


class BrokerConfig(Section):
    """The keys of [broker]: links, ports, trust and limits of a node."""

    listen: A[str, _endpoint("where agents' links arrive")] = "0.0.0.0:7000"
    node_id: A[str, _id("id of this node, unique in the cluster; default: the host's name")] = ""
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
    join_token: A[str, _file("join tokens for agents without a certificate, one on each line", secret=True)] = ""
    admit: A[list[AdmitConfig], _ADMIT] = []
    handshake_timeout: A[float, _seconds("deadline for a link until Welcome, and for a Dial on a guarded port")] = 10.0
    dial_window: A[
        float, _seconds("greatest age of a Dial, and greatest lead of its clock; replays are refused for this time")
    ] = 30.0
    max_sessions: A[int, _count("agents on this node")] = 60000
    max_handshakes: A[int, _count("links without Welcome, and guarded connections without Dial, each")] = 1024
    source_handshakes: A[int, _at_most(_SOURCE_HANDSHAKES)] = 256
    stream_memory: A[int, _STREAM_MEMORY] = 256
    drain: A[float, _DRAIN] = 30.0
    workers: A[int, _WORKERS] = 1
    admin: A[str, _ADMIN] = "127.0.0.1:7070"
    admin_token: A[str, _ADMIN_TOKEN] = ""


class PublishConfig(Section):
    """The keys of [[agent.publish]]: an open port that the agent requests."""

    target: A[str, Key("target of the open port; its address must be one of the agent's", None, "host:port")]
    port: A[int, Key("the broker's port; 0: a random port of its range", None, "port")] = 0
    allow: A[list[str], Key("networks that may connect; empty: those that the broker allows", None, "CIDRs")] = []


class AgentConfig(Section):
    """The keys of [agent]: brokers, addresses, exposed ports and trust of a host."""

    brokers: A[list[str], Key(_BROKERS, each(check_remote, 64), "host:port")] = []
    agent_id: A[str, _id("id of this host, the same after a restart; default: the host's name")] = ""
    namespace: A[str, _NAMESPACE] = "default"
    addresses: A[list[str], Key(_ADDRESSES_HELP, check_addresses, "IPs")] = []
    address_check: A[float, _seconds("interval at which the agent checks that this host still has its addresses")] = 5.0
    exposes: A[list[str], _EXPOSES] = []
    publish: A[list[PublishConfig], _PUBLISH] = []
    redundancy: A[int, _count("sessions, each on another node", 8)] = 2
    security: A[str, _SECURITY] = "tls"
    ca: A[str, _file("PEM: the CAs of the cluster")] = ""
    server_name: A[str, Key("name that the broker's certificate must carry", check_server_name, "name")] = (
        "broker.rtunnel"
    )
    identity: A[str, Key("folder for the certificate that the agent enrols for, and its key", None, FOLDER)] = ""
    certificate: A[str, _file("PEM: a certificate that was issued by hand, instead of `identity`")] = ""
    key: A[str, _file("PEM: its private key", secret=True)] = ""
    join_token: A[
        str, _file("the agent's join token, to enrol for a certificate, or to join without one", secret=True)
    ] = ""
    connect_timeout: A[float, _seconds("deadline to connect to a broker")] = 5.0
    handshake_timeout: A[float, _seconds("deadline for a link until Welcome")] = 20.0
    target_timeout: A[float, _seconds("deadline to connect to a target")] = 10.0
    backoff_cap: A[float, _seconds("longest pause between two dials")] = 10.0
    stream_memory: A[int, _STREAM_MEMORY] = 128
    drain: A[float, _DRAIN] = 30.0
    admin: A[str, _ADMIN] = "127.0.0.1:7071"


class LimitsConfig(Section):
    """The keys of [gateway.limits]: the most that one source or one user may have."""

    source_handshakes: A[int, _at_most("connections of one source that are not streams yet; 0: no limit")] = 1024
    source_rate: A[float, _rate("new connections of one source; 0: no limit")] = 0.0
    source_streams: A[int, _at_most("streams of one source; 0: no limit")] = 0
    user_rate: A[float, _rate("new connections of one user; 0: no limit")] = 0.0
    user_streams: A[int, _at_most("streams of one user; 0: no limit")] = 0


class GatewayConfig(Section):
    """The keys of [gateway]: the proxy port, trust, rules and limits."""

    listen: A[str, _endpoint("SOCKS5 and HTTP proxy on one port")] = "127.0.0.1:1080"
    name: A[str, _id("name of this gateway in Dials; default: the host's name")] = ""
    namespace: A[str, _NAMESPACE] = "default"
    key: A[
        str, _file("the gateway's own key, which authenticates its Dials (`rtunnel pki issue gateway`)", secret=True)
    ] = ""
    ca: A[str, _CA] = ""
    trust: A[str, _TRUST] = ""
    authority: A[str, _AUTHORITY] = ""
    proof: A[str, _PROOF] = "required"
    dial_security: A[str, _DIAL_SECURITY] = "plain"
    policy: A[
        str, _file("rules for clients and targets (docs/policy.md); without it only clients on this machine are served")
    ] = ""
    users: A[str, _file("names and password hashes (`rtunnel user`); with it clients must log in", secret=True)] = ""
    no_auth: A[list[str], Key(_NO_AUTH, each(check_network, MAX_ALLOW), "CIDRs")] = []
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    handshake_timeout: A[float, _seconds("deadline for a client's SOCKS5 or HTTP request")] = 10.0
    hedge_delay: A[float, _HEDGE_DELAY] = 0.25
    dial_timeout: A[float, _seconds("deadline of a dial, all tuples together")] = 15.0
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
    admin_token: A[str, _ADMIN_TOKEN] = ""


_RENEW = _choice(
    "certificates that are renewed: known, those in its store; all, after the store was restored from an older copy",
    "known",
    "all",
)


class AuthorityConfig(Section):
    """The keys of [authority]: its directory and addresses."""

    directory: A[str, Key("of `rtunnel pki init`: the CA's key and authority.db", None, FOLDER)] = ""
    listen: A[str, _endpoint("address for brokers and gateways")] = "0.0.0.0:7443"
    renew: A[str, _RENEW] = "known"
    admin: A[str, _ADMIN] = "127.0.0.1:7073"


class Config(Section):
    """The whole configuration, one field for each section."""

    log: LogConfig = msgspec.field(default_factory=LogConfig)
    registry: RegistryConfig = msgspec.field(default_factory=RegistryConfig)
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    agent: AgentConfig = msgspec.field(default_factory=AgentConfig)
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
    authority: AuthorityConfig = msgspec.field(default_factory=AuthorityConfig)
    #: Not a key: the file, variable or flag that gave each key ("broker.listen").
    sources: dict[str, str] = {}
    #: Not a key: the file that was read, or "".
    file: str = ""

    def source(self, key: str) -> str:
        """Return the file, variable or flag that gave this key, or "default"."""
        return self.sources.get(key, "default")

    def get(self, key: str) -> Any:
        """Return the value of a key ("broker.open_ports.range")."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def problem(self, key: str, reason: str, fix: str = "", *others: str) -> Problem:
        """Return a problem of a key, or between it and `others`.

        Its source is that of the first of these keys that was given.
        """
        source = next((self.sources[name] for name in (key, *others) if name in self.sources), "default")
        return Problem(source, key, reason, fix)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One key of the file, with its whole path."""

    path: str  # "broker.open_ports.range"
    type: Any
    default: Any
    key: Key

    @property
    def env(self) -> str:
        """The environment variable that overrides the key."""
        return ENV_PREFIX + self.path.replace(".", "_").upper()

    @property
    def is_list(self) -> bool:
        """Whether the key takes several values."""
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


#: All keys by their paths.
KEYS: Mapping[str, Leaf] = MappingProxyType({leaf.path: leaf for leaf in _leaves(Config, "")})
SECTIONS = tuple(dict.fromkeys(path.partition(".")[0] for path in KEYS))
