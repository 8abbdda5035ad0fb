"""Where tuples live: the `Registry` protocol, its implementations, and a gateway's route table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rtunnel.registry.base import (
    COUNTER_BITS,
    Beat,
    Change,
    CursorLost,
    Duplicate,
    DuplicateAgent,
    NodeRecord,
    PortLease,
    Registration,
    Registry,
    Snapshot,
    Tuple,
    incarnation_of,
)

if TYPE_CHECKING:
    from rtunnel.config import RegistryConfig

__all__ = [
    "COUNTER_BITS",
    "Beat",
    "Change",
    "CursorLost",
    "Duplicate",
    "DuplicateAgent",
    "NodeRecord",
    "PortLease",
    "Registration",
    "Registry",
    "Snapshot",
    "Tuple",
    "connect",
    "incarnation_of",
]


def connect(config: RegistryConfig) -> Registry:
    """The registry that `[registry]` names. Opens no connection yet; ValueError for what can't be right.

    Every call with `memory://` makes a registry of its own: what shall share one in a process shares the object.
    """
    if config.ttl <= 0 or config.quarantine < config.ttl:
        raise ValueError(f"[registry] quarantine ({config.quarantine:g} s) must be at least ttl ({config.ttl:g} s)")
    scheme, found, _ = config.url.partition("://")
    if found and scheme == "memory":
        from rtunnel.registry.memory import MemoryRegistry

        return MemoryRegistry(ttl=config.ttl, quarantine=config.quarantine)
    # Imported late: redis-py costs 0.1 s and 10 MB, and the embedded default needs none of it.
    from rtunnel.registry.redis import RedisRegistry

    return RedisRegistry(
        config.url,
        prefix=config.prefix,
        ttl=config.ttl,
        quarantine=config.quarantine,
        timeout=config.timeout,
    )
