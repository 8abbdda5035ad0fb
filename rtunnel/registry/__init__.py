"""The registry of tuples: the `Registry` protocol, its implementations, and the route table.

- `base`: the protocol and its records.
- `history`: entries about agents that have left or were refused.
- `memory`: a registry inside one process.
- `redis`: a registry in Redis, by the scripts in `lua`; `redis_client` sends commands, `redis_rows`
  reads and writes rows, `redis_unanswered` records writes without an answer, `redis_url` parses
  URLs.
- `ports`: allocates a node's ports, and keeps freed ones in quarantine.
- `routes`: a gateway's route table, and the mirror that keeps it current.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rtunnel.registry.base import (
    COUNTER_BITS,
    Beat,
    Change,
    CursorLost,
    Duplicate,
    DuplicateAgent,
    GatewayRecord,
    NodeFacts,
    NodeRecord,
    PortLease,
    Registration,
    Registry,
    Snapshot,
    Tuple,
    incarnation_of,
)
from rtunnel.registry.history import Departure, History, RefusedAgent

if TYPE_CHECKING:
    from rtunnel.config import RegistryConfig

__all__ = [
    "COUNTER_BITS",
    "Beat",
    "Change",
    "CursorLost",
    "Departure",
    "Duplicate",
    "DuplicateAgent",
    "GatewayRecord",
    "History",
    "NodeFacts",
    "NodeRecord",
    "PortLease",
    "RefusedAgent",
    "Registration",
    "Registry",
    "Snapshot",
    "Tuple",
    "connect",
    "incarnation_of",
]


def connect(config: RegistryConfig) -> Registry:
    """Return the registry that `[registry]` names, without opening a connection yet.

    Each call with `memory://` makes a new, empty registry, so the roles of one process must share
    the object. Raises ValueError for an invalid URL or prefix, or a `quarantine` below `ttl`.
    """
    if config.ttl <= 0 or config.quarantine < config.ttl:
        raise ValueError(
            f"[registry] quarantine ({config.quarantine:g} s) must be at least ttl ({config.ttl:g} s): "
            "raise quarantine, or lower ttl"
        )
    scheme, found, _ = config.url.partition("://")
    if found and scheme == "memory":
        from rtunnel.registry.memory import MemoryRegistry

        return MemoryRegistry(ttl=config.ttl, quarantine=config.quarantine)
    # Imported here because redis-py costs 0.1 s and 10 MB, which a memory registry must not pay.
    from rtunnel.registry.redis import RedisRegistry

    return RedisRegistry(
        config.url,
        prefix=config.prefix,
        ttl=config.ttl,
        quarantine=config.quarantine,
        timeout=config.timeout,
    )
