"""The facts about one machine and one role on it, which `checks` judges. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rtunnel.config import Config, Problem, format_endpoint, parse_endpoint
from rtunnel.netlink import Interface, Route


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """One address for which an agent answers."""

    ip: str
    here: bool  # the kernel lets a socket be bound to it


@dataclass(frozen=True, slots=True)
class Path:
    """The TCP_INFO of a connection on which some KiB were sent."""

    mss: int  # bytes of one segment, as the kernel sends it
    pmtu: int
    sent: int  # bytes
    acknowledged: bool  # all of them, or the peer has answered
    retransmits: int


#: The prefix of an endpoint's key that is a broker node's guarded port.
NODE: Final = "node "


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that the role dials, and what came of some connects to it."""

    key: str  # the key of the configuration that names it, or "node " and the node's id
    name: str  # host:port as it is configured
    ip: str = ""  # what the name was resolved to
    interface: str = ""  # through which packets to it leave
    local: bool = False  # it is an address of this machine
    source: str = ""  # the own address of the connection
    connects: int = 0  # that were tried
    connected: int = 0
    error: str = ""  # of the last failed connect or of the name
    connect_ms: float = 0.0
    secure: bool = False  # TLS was tried
    tls_error: str = ""
    not_tls: bool = False  # the answer was no TLS
    alpn: bool = True  # the answer was TLS for rtunnel
    certificates: tuple[str, ...] = ()  # different ones, by fingerprint
    path: Path | None = None

    @property
    def at(self) -> str:
        """The endpoint for display: its node, its name, and the IP where that is another text."""
        host, port = parse_endpoint(self.name)
        name = self.name if self.ip in ("", host) else f"{self.name} ({format_endpoint(self.ip, port)})"
        return f"{self.key.removeprefix(NODE)} at {name}" if self.key.startswith(NODE) else name


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate of the configuration."""

    key: str
    path: str
    error: str = ""
    subject: str = ""
    addresses: tuple[str, ...] = ()
    issued: float = 0.0  # seconds since 1970
    ends: float = 0.0
    issuer_error: str = ""  # why none of the cluster's CAs has signed it, or ""


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """The figures of a Redis server; `error`: why it can't be asked."""

    url: str  # without the password
    error: str = ""
    version: str = ""
    latency_ms: tuple[float, ...] = ()  # of some PINGs
    offset: float = 0.0  # seconds that this machine's clock is ahead
    role: str = ""  # "master" or "slave"
    replicas: int = 0
    policy: str = ""  # maxmemory-policy; empty: not allowed to know
    used: int = 0  # bytes
    most: int = 0  # maxmemory, bytes; 0: no limit
    denied: tuple[str, ...] = ()  # commands that the user's ACL denies


@dataclass(frozen=True, slots=True)
class OwnRole:
    """The answers of the role's admin address."""

    address: str
    error: str = ""  # why nobody answered
    ready: bool = False
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    status: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """One session of the running broker, as its API tells."""

    agent: str  # "namespace/agent_id"
    epoch: str
    doubts: tuple[str, ...] = ()  # sentences about what the agent's host has told


@dataclass(frozen=True, slots=True)
class Sessions:
    """The sessions of the running broker, and the epochs that the registry has of it.

    The sessions are those that were there before and after the registry was read.
    """

    lasting: tuple[Session, ...]
    registered: tuple[str, ...]
    error: str = ""  # why they can't be read


@dataclass(frozen=True, slots=True)
class Kernel:
    """Settings of the kernel and limits of this process."""

    ephemeral: tuple[int, int] = (0, 0)  # ip_local_port_range; (0, 0): not known
    reserved: str = ""  # ip_local_reserved_ports
    nonlocal_bind: bool = False
    #: Whether the kernel believes that its clock is synchronised; None: not known.
    clock_synchronised: bool | None = None
    soft_descriptors: int = 0
    hard_descriptors: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """All facts about one role on this machine."""

    role: str
    config: Config
    now: float  # seconds since 1970
    problems: tuple[Problem, ...] = ()  # with which the role does not start
    warnings: tuple[Problem, ...] = ()
    kernel: Kernel = Kernel()
    interfaces: tuple[Interface, ...] | None = None  # None: they can't be read
    routes: tuple[Route, ...] = ()
    addresses: tuple[OwnAddress, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    registry: RedisFacts | None = None
    own: OwnRole | None = None
    sessions: Sessions | None = None
