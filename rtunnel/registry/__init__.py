"""Where tuples live: the `Registry` protocol, its implementations, and a gateway's route table."""

from rtunnel.registry.base import (
    Change,
    CursorLost,
    NodeRecord,
    PortLease,
    Registration,
    Registry,
    RegistryUnavailable,
    Snapshot,
    Superseded,
    Tuple,
)

__all__ = [
    "Change",
    "CursorLost",
    "NodeRecord",
    "PortLease",
    "Registration",
    "Registry",
    "RegistryUnavailable",
    "Snapshot",
    "Superseded",
    "Tuple",
]
