"""The Registry: where tuples live. One protocol, two implementations (`memory`, `redis`), one conformance suite.

Every method is synchronous, may block up to the registry's timeout, and is safe to call from several threads: the
control plane calls them on worker threads, the relay never. When the registry can't be reached each of them raises
`RegistryUnavailable`, soon, and has then changed nothing that the next `beat` does not put right.

Times are seconds since 1970 by the *registry's* clock, so that the clocks of nodes never matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import msgspec

from rtunnel.errors import AddressTaken
from rtunnel.wire.messages import Id, Port, PortOrAny

# An epoch is (incarnation << 32 | counter): 64 bits, so a JSON or Lua number would round it (docs/registry.md).
COUNTER_BITS = 32


def incarnation_of(epoch: int) -> int:
    """The incarnation of the node that gave out this epoch."""
    return epoch >> COUNTER_BITS


class DuplicateAgent(AddressTaken):
    """A live tuple of the same agent_id, but from another host, has this address; the text says which and where."""

    def __init__(self, namespace: str, ip: str, agent_id: str, node: str, agent_host: str) -> None:
        super().__init__(namespace, ip, agent_id, node)
        self.holder = f"{agent_host or 'another host'}, on the node {node!r}"
        self.args = (f"{namespace}/{agent_id} has a session from {self.holder}",)


class Duplicate(msgspec.Struct, frozen=True, gc=False):
    """A second host that came with an agent_id, and was refused because the first one lives."""

    namespace: str
    agent_id: str
    holder: str  # the host that stays: its name, the address of its link
    refused: str  # the same of the other one
    tries: int = 1
    at: float = 0.0  # of the last try, seconds since 1970 by the node's clock


# gc=False: these hold nothing that could form a cycle, and a collection that walks a million of them holds the GIL
# for hundreds of milliseconds.
class NodeRecord(msgspec.Struct, frozen=True, gc=False):
    """One broker node."""

    node: str
    host: str  # label of the machine: two sessions of one agent go to different hosts where there are several
    ip: str  # the PS IP: where its guarded and open ports are reached
    incarnation: int
    state: str = "live"  # or "draining"
    version: str = ""
    sessions: int = 0
    streams: int = 0
    started: float = 0.0
    beat: float = 0.0  # set by the registry
    duplicates: tuple[Duplicate, ...] = ()  # the latest ones


class Tuple(msgspec.Struct, frozen=True, gc=False):
    """(PS IP, PS port, agent IP, agent port) with what makes it safe to use."""

    namespace: Id
    agent_ip: str
    agent_port: PortOrAny  # 0 for a guarded port: every exposed port of the agent
    ps_ip: str
    ps_port: Port
    node: Id
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    agent_id: Id
    state: str = "live"  # or "draining"
    exposes: str = ""  # for people: "22,9100,8000-8100"; only `Registry.with_exposes` sets it
    beat: float = 0.0  # heartbeat time, set by the registry
    host_id: str = ""  # of the agent's host, hexadecimal; empty: it has not said it
    agent_host: str = ""  # the same for people: its name, the address of its link


class PortLease(msgspec.Struct, frozen=True, gc=False):
    """A port of a PS IP, held for one agent."""

    ip: str
    port: int
    owner: str  # "namespace/agent_id", the same across restarts of the agent
    node: str
    epoch: int


class Registration(msgspec.Struct, frozen=True):
    """All that the registry holds of one session; what `register` and `beat` keep alive.

    `exposes` is stored once, with the first lease (that of the guarded port). Who changes it counts `revision` up: a
    call that comes late does not replace what is newer.
    """

    epoch: int
    tuples: tuple[Tuple, ...]
    leases: tuple[PortLease, ...]
    exposes: str = ""
    revision: int = 0


class Beat(msgspec.Struct, frozen=True):
    """What a heartbeat found."""

    put_back: int  # tuples that were missing; 0 in quiet times
    lost: dict[int, AddressTaken]  # by epoch: sessions that could not be put back, for another agent has an address


class Change(msgspec.Struct, frozen=True, gc=False):
    """One entry of the change feed. `tuple` is None when the tuple at (key, node, agent_port) is gone."""

    namespace: str
    agent_ip: str
    agent_port: int
    node: str
    epoch: int
    tuple: Tuple | None


class Snapshot(msgspec.Struct, frozen=True):
    """Everything at one moment, with the cursor from which `changes` goes on without a gap."""

    cursor: str
    now: float
    nodes: list[NodeRecord]
    tuples: list[Tuple]


class CursorLost(Exception):
    """The change feed no longer holds this cursor (trimmed, or the registry was wiped): take a snapshot."""


class Registry(Protocol):
    """See the module. `ttl` is how long a tuple lives without a heartbeat, `quarantine` how long a freed port rests."""

    url: str  # without its password
    ttl: float
    quarantine: float

    def ping(self) -> None:
        """Raise RegistryUnavailable when it does not answer."""

    def start_node(self, record: NodeRecord) -> int:
        """Take the node_id: a new incarnation, greater than any before (also after the registry was wiped).

        Removes every tuple that an earlier incarnation of this node left, and turns its port leases into quarantined
        ones that the same owner may take back. Returns the incarnation; stores the record with it.
        """

    def stop_node(self, node: str, incarnation: int) -> None:
        """Remove the node's record and whatever it still has. A later incarnation's things are left alone."""

    def nodes(self) -> list[NodeRecord]:
        """The nodes with a live heartbeat."""

    def last_port(self, node: str, owner: str) -> int | None:
        """The port that this owner last had on this node, if it is remembered."""

    def lease_port(self, lease: PortLease) -> bool:
        """Take this port. False when another owner holds it or its quarantine is not over.

        The owner's own lease or quarantine does not stand in its way. A lease lives `ttl + quarantine` from the last
        beat. Raises Superseded when a later incarnation has the node_id.
        """

    def release_port(self, lease: PortLease) -> None:
        """Put the port into quarantine (kept for its owner). No effect when it is another session's by now.

        A lease that the registry does not know (it was wiped) goes into quarantine too.
        """

    def register(self, registration: Registration) -> None:
        """Publish a session's tuples (and keep its leases). Replaces this node's older tuples for the same key.

        A tuple of a newer epoch for the same (target, node, agent_port) stays. Registering the same epoch again changes
        the tuples' state, and `exposes` if the revision is not older. Raises Superseded when a later incarnation has
        the node_id.

        One address, one agent: raises AddressTaken, and has then written nothing, when one of its (namespace, agent_ip)
        has a live tuple of another agent_id on any node, this one included. Of two that come at once one wins. So does
        one agent_id with two hosts: a live tuple on another node with another `host_id` raises DuplicateAgent.
        """

    def unregister(self, registration: Registration) -> None:
        """Remove exactly these tuples (by epoch) and quarantine the leases. A newer session's tuples stay."""

    def beat(self, record: NodeRecord, registrations: list[Registration]) -> Beat:
        """Refresh the node, its tuples and its leases in batches; put back whatever is missing or of an older revision.

        Undoes what earlier calls of this object may have left: a registration that failed and is not among these, a
        removal that failed. So after one beat that worked the registry has these sessions of the node and no others.

        A session that ended while the beat was on its way (its port is quarantined by now) is not put back. Nor is a
        missing tuple whose address has a live one of another agent by now: who is there stays, and the caller must end
        the sessions in `lost`. Raises Superseded when the node_id was taken by a later incarnation.
        """

    def lookup(self, namespace: str, ip: str) -> list[Tuple]:
        """The live tuples for an agent's IP, any agent_port. O(1)."""

    def with_exposes(self, tuples: Sequence[Tuple]) -> list[Tuple]:
        """The same tuples with `exposes` as their sessions say it; for people, dials need it not."""

    def snapshot(self) -> Snapshot:
        """Everything, with a cursor. A tuple that changes meanwhile may be seen twice; the changes after settle it."""

    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        """The next changes after `cursor`, waiting up to `wait` seconds (at most 1) for the first. Raises CursorLost.

        A call may return a part of them: go on with the cursor that it returned. Expiry is not a change.
        """

    def close(self) -> None:
        """Give back connections and threads."""
