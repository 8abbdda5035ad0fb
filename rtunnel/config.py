"""Configuration: one TOML file, a section per role; `RTUNNEL_SECTION_KEY` overrides it, flags override both.

The structs below are the documentation's source: every key, its default, its unit. Durations are seconds.
Unknown keys and bad values are refused with file, key and reason (`ConfigError`).
"""

from __future__ import annotations

import msgspec


class _Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A section of the file."""


class LogConfig(_Section):
    """[log]"""

    level: str = "info"  # debug | info | warning | error
    format: str = "auto"  # json | console | auto (console on a terminal)


class RegistryConfig(_Section):
    """[registry]"""

    url: str = "memory://"  # memory:// | redis:// | rediss:// | unix:// | redis+sentinel://host:port,host:port/service/db
    prefix: str = "rtunnel"  # of every key
    heartbeat: float = 5.0
    ttl: float = 15.0  # a tuple dies so long after its last heartbeat; at least 2 heartbeats
    quarantine: float = 60.0  # a freed port rests so long; at least ttl
    timeout: float = 1.0  # of one registry call
    reconcile: float = 60.0  # gateways compare everything this often


class OpenPortsConfig(_Section):
    """[broker.open_ports]: none unless both are given."""

    range: str = ""  # "30000-30999": ports for agents' publish requests, fixed or random
    allow: list[str] = []  # CIDRs that may connect; an agent's own list can only narrow it


class BrokerConfig(_Section):
    """[broker]"""

    listen: str = "0.0.0.0:7000"  # agents' links
    node_id: str = ""  # default: the host's name
    host: str = ""  # label of the machine; default: the host's name
    advertise_ip: str = ""  # the PS IP, where gateways reach this node's ports; default: the address of the default route
    port_range: str = "20000-29999"  # guarded ports
    open_ports: OpenPortsConfig = msgspec.field(default_factory=OpenPortsConfig)
    security: str = "tls"  # tls | plain
    certificate: str = ""  # PEM file (chain)
    key: str = ""  # PEM file
    cluster_key: str = ""  # file: the key under which Dials are MACed
    join_token: str = ""  # file: tokens that agents may prove, one a line
    handshake_timeout: float = 10.0  # for a link until Welcome, and for a Dial on a guarded port
    dial_window: float = 30.0  # a Dial may be so old or so far ahead; its nonce is remembered as long
    max_sessions: int = 60000
    max_handshakes: int = 1024  # links not yet welcomed, and guarded connections without their Dial, each
    drain: float = 30.0  # at SIGTERM streams may finish so long
    admin: str = "127.0.0.1:7070"  # health over HTTP; "" for none


class PublishConfig(_Section):
    """[[agent.publish]]: ask for an open port."""

    target: str  # "10.1.0.7:9100"; the address must be one of the agent's
    port: int = 0  # the broker's port; 0: a random one of its range
    allow: list[str] = []  # CIDRs that may connect; empty: whom the broker allows


class AgentConfig(_Section):
    """[agent]"""

    brokers: list[str] = []  # "host:port" of the VIP; several are used in turn, names are resolved at every dial
    agent_id: str = ""  # default: the host's name
    namespace: str = "default"
    addresses: list[str] = []  # original IPs that it answers for; default: the address of the default route
    exposes: list[str] = []  # "9100", "8000-8100"; nothing is exposed by default
    publish: list[PublishConfig] = []
    redundancy: int = 2  # sessions on so many different nodes
    security: str = "tls"  # tls | plain
    ca: str = ""  # PEM file: the cluster CA
    server_name: str = "broker.rtunnel"  # the name that the broker's certificate must carry
    join_token: str = ""  # file
    connect_timeout: float = 5.0  # to a broker
    handshake_timeout: float = 10.0
    target_timeout: float = 10.0  # to a target
    backoff_cap: float = 10.0
    drain: float = 30.0
    admin: str = "127.0.0.1:7071"


class GatewayConfig(_Section):
    """[gateway]"""

    listen: str = "127.0.0.1:1080"  # SOCKS5 and HTTP proxy on one port
    name: str = ""  # told in Dials; default: the host's name
    namespace: str = "default"
    cluster_key: str = ""  # file
    handshake_timeout: float = 10.0  # a client must have said what it wants by then
    hedge_delay: float = 0.25  # the next tuple is tried beside one that has not answered
    dial_timeout: float = 15.0  # all tuples together
    idle_timeout: float = 0.0  # 0: never
    max_clients: int = 20000
    drain: float = 30.0
    admin: str = "127.0.0.1:7072"


class Config(_Section):
    """The whole file."""

    log: LogConfig = msgspec.field(default_factory=LogConfig)
    registry: RegistryConfig = msgspec.field(default_factory=RegistryConfig)
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    agent: AgentConfig = msgspec.field(default_factory=AgentConfig)
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
