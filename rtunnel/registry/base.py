"""The `Registry` protocol: the store of tuples, port leases and nodes.

There are two implementations (`memory`, `redis`) and one conformance suite for both.

Every method is synchronous, may block for up to the registry's timeout, and is safe to call from
several threads. The control plane calls the methods on worker threads; the relay never calls them.
When the registry cannot be reached, each method raises `RegistryUnavailable` within the timeout,
and has changed nothing that the next `beat` does not repair.

Times are seconds since 1970 by the clock of the *registry*, so that nodes need no common clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import msgspec

from rtunnel.errors import AddressTaken
from rtunnel.registry.history import Departure, History, RefusedAgent
from rtunnel.wire.messages import Id, Port, PortOrAny

# An epoch is (incarnation << 32 | counter). Its 64 bits do not fit a JSON or Lua number without
# rounding (docs/registry.md).
COUNTER_BITS = 32
# Seconds for which a node that has died is shown: as long as somebody may still look for its cause.
SHOWN_SECONDS = 3600


def incarnation_of(epoch: int) -> int:
    """Return the incarnation of the node that issued this epoch."""
    return epoch >> COUNTER_BITS


class DuplicateAgent(AddressTaken):
    """A live tuple of the same agent_id from another host has this address; the text names both."""

    def __init__(self, namespace: str, ip: str, agent_id: str, node: str, agent_host: str) -> None:
        super().__init__(namespace, ip, agent_id, node)
        self.holder = f"{agent_host or 'another host'}, on the node {node!r}"
        self.args = (f"{namespace}/{agent_id} has a session from {self.holder}",)


class Duplicate(msgspec.Struct, frozen=True, gc=False):
    """A second host that presented an agent_id and was refused, because the first host is alive."""

    namespace: str
    agent_id: str
    holder: str  # the host that keeps the agent_id: its name, the address of its link
    refused: str  # the host that was refused, in the same form
    tries: int = 1
    at: float = 0.0  # time of the last try, seconds since 1970 by the node's clock


# gc=False: these structs cannot form a cycle, and a garbage collection that walks a million of them
# would hold the GIL for hundreds of milliseconds.
class NodeRecord(msgspec.Struct, frozen=True, gc=False):
    """One broker node, as its heartbeat describes it."""

    node: str
    # Label of the machine; an agent's sessions go to different hosts where there are several.
    host: str
    ip: str  # the PS IP, on which its guarded and open ports are reached
    incarnation: int
    state: str = "live"  # or "draining"
    version: str = ""
    sessions: int = 0
    streams: int = 0
    started: float = 0.0
    beat: float = 0.0  # set by the registry
    duplicates: tuple[Duplicate, ...] = ()  # the latest ones


class NodeFacts(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A node's own figures, which it tells after each complete heartbeat, for `rtunnel status`.

    It is kept for SHOWN_SECONDS, also when the node has died. Gateways do not read it.
    """

    node: str
    host: str = ""
    ip: str = ""
    version: str = ""
    sessions: int = 0
    port_range: str = ""
    ports_free: int = 0
    ports_used: int = 0
    ports_resting: int = 0  # in quarantine
    open_range: str = ""  # of open ports; empty without any
    open_used: int = 0
    open_resting: int = 0
    descriptors: int = 0
    descriptor_limit: int = 0
    #: Seconds that the node's clock is ahead of the registry's; None when not measured yet.
    clock_offset: float | None = None
    beat_seconds: float = 0.0  # time that the heartbeat took
    notes_dropped: int = 0  # departures and refusals that could not be written, since the start
    reasons: tuple[str, ...] = ()  # why the node is not ready
    at: float = 0.0  # end of the last complete heartbeat, set by the registry


class GatewayRecord(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One gateway process, as it tells of itself with each heartbeat."""

    name: str  # unique: a worker's has its number
    host: str
    namespace: str
    version: str = ""
    state: str = "live"  # or "draining"
    listen: str = ""
    started: float = 0.0
    clients: int = 0  # that negotiate
    streams: int = 0
    tuples: int = 0
    routes_age: float | None = None  # seconds since its route table was true; None: never yet
    fault: str = ""  # what keeps the route table from being true
    suspects: tuple[str, ...] = ()  # nodes that did not answer it lately
    at: float = 0.0  # set by the registry


class Tuple(msgspec.Struct, frozen=True, gc=False):
    """One tuple (PS IP, PS port, agent IP, agent port), with the fields that a dial checks."""

    namespace: Id
    agent_ip: str
    agent_port: PortOrAny  # 0 for a guarded port, which serves every exposed port of the agent
    ps_ip: str
    ps_port: Port
    node: Id
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    agent_id: Id
    state: str = "live"  # or "draining"
    exposes: str = ""  # for display: "22,9100,8000-8100"; only `Registry.with_exposes` sets it
    beat: float = 0.0  # heartbeat time, set by the registry
    host_id: str = ""  # id of the agent's host, hexadecimal; empty when the agent did not send one
    agent_host: str = ""  # the same host for display: its name, the address of its link


class PortLease(msgspec.Struct, frozen=True, gc=False):
    """A port of one PS IP, leased for one agent."""

    ip: str
    port: int
    owner: str  # "namespace/agent_id", which stays the same when the agent restarts
    node: str
    epoch: int


class Registration(msgspec.Struct, frozen=True):
    """All that the registry holds of one session: `register` writes it, `beat` keeps it alive.

    `exposes` is stored once, with the first lease (the lease of the guarded port). A caller that
    changes it also increments `revision`: a delayed call then never replaces a newer value.
    """

    epoch: int
    tuples: tuple[Tuple, ...]
    leases: tuple[PortLease, ...]
    exposes: str = ""
    revision: int = 0


class Beat(msgspec.Struct, frozen=True):
    """The result of one heartbeat."""

    put_back: int  # tuples that were missing and were written again; 0 in normal operation
    # The sessions that could not be written again, by epoch: another agent has an address.
    lost: dict[int, AddressTaken]


class Change(msgspec.Struct, frozen=True, gc=False):
    """One entry of the change feed. `tuple` is None when the tuple of that key was removed."""

    namespace: str
    agent_ip: str
    agent_port: int
    node: str
    epoch: int
    tuple: Tuple | None


class Snapshot(msgspec.Struct, frozen=True):
    """All nodes and tuples at one moment, with the cursor from which `changes` continues."""

    cursor: str
    now: float
    nodes: list[NodeRecord]
    tuples: list[Tuple]


class CursorLost(Exception):
    """The change feed was trimmed or wiped, and no longer holds this cursor: take a snapshot."""


#: Events that a registry keeps, some 50 MB at most; Redis may keep a few more.
EVENTS_LENGTH = 100_000


class Registry(Protocol):
    """A store of tuples, leases and nodes; the module says what holds for every method.

    `ttl` is the number of seconds that a tuple lives without a heartbeat. `quarantine` is the
    number of seconds in which a freed port is given to its last owner only.
    """

    url: str  # without the password
    ttl: float
    quarantine: float

    def ping(self) -> None:
        """Raise RegistryUnavailable when the registry does not answer."""

    def start_node(self, record: NodeRecord) -> int:
        """Take the node_id, store the record, and return the new incarnation.

        The incarnation is greater than any before, also after the registry was wiped. Removes every
        tuple that an earlier incarnation of this node left, and puts its port leases into
        quarantine, from which the same owner may take them back.
        """

    def stop_node(self, node: str, incarnation: int) -> None:
        """Remove the node's record, tuples and leases. A later incarnation's entries are kept."""

    def nodes(self) -> list[NodeRecord]:
        """Return the nodes with a live heartbeat."""

    def last_port(self, node: str, owner: str) -> int | None:
        """Return the port that this owner last had on this node, or None."""

    def lease_port(self, lease: PortLease) -> bool:
        """Lease this port for `ttl + quarantine` seconds from the last beat, and return True.

        Returns False when another owner leases the port, or it is in quarantine for another owner.
        The owner's own lease or quarantine is no obstacle. Raises Superseded when a later
        incarnation has the node_id.
        """

    def release_port(self, lease: PortLease) -> None:
        """Put the port into quarantine, reserved for its owner.

        Does nothing when another session has the port by now. A lease that the registry does not
        know (because it was wiped) goes into quarantine too.
        """

    def register(self, registration: Registration) -> None:
        """Write a session's tuples and leases. Replaces this node's older tuples for the same key.

        A tuple of a newer epoch for the same (target, node, agent_port) stays. Registering the same
        epoch again changes the tuples' state, and `exposes` when the revision is not older.

        Raises Superseded when a later incarnation has the node_id. Raises AddressTaken, and has
        then written nothing, when a (namespace, agent_ip) of the session has a live tuple of
        another agent_id on any node, this one included; of two concurrent calls one succeeds.
        Raises DuplicateAgent when the agent_id has a live tuple on another node with another
        `host_id`.
        """

    def unregister(self, registration: Registration) -> None:
        """Remove exactly these tuples (by epoch), and put the leases into quarantine."""

    def beat(self, record: NodeRecord, registrations: list[Registration]) -> Beat:
        """Refresh the node, its tuples and its leases, in batches, and return what was found.

        Writes again whatever is missing or has an older revision. Undoes what earlier failed calls
        of this object may have left: a registration that failed and is not among these, a removal
        that failed. After one successful beat the registry has exactly these sessions of the node.

        Does not write again a session that ended during the beat (its port is in quarantine), nor a
        missing tuple whose address has a live tuple of another agent. The other agent keeps the
        address, and the caller must end the sessions in `lost`. Raises Superseded when a later
        incarnation has the node_id.
        """

    def lookup(self, namespace: str, ip: str) -> list[Tuple]:
        """Return the live tuples for an agent's IP, with any agent_port. O(1)."""

    def with_exposes(self, tuples: Sequence[Tuple]) -> list[Tuple]:
        """Return the tuples with `exposes` filled in, for display. A dial does not need it."""

    def snapshot(self) -> Snapshot:
        """Return all nodes and tuples, with a cursor.

        A tuple that changes during the call may appear twice; the changes after the cursor settle
        it.
        """

    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        """Return the next cursor and the changes after `cursor`.

        Waits up to `wait` seconds (at most 1) for the first change. A call may return a part of the
        changes: continue with the returned cursor. Expiry is not a change. Raises CursorLost.
        """

    def now(self) -> float:
        """Return the registry's time, in seconds since 1970."""

    def report(self, facts: NodeFacts, notes: Sequence[Departure | RefusedAgent]) -> float:
        """Write a node's facts and what it tells of agents; return the registry's time.

        The newest note about each address, and each refused agent, is kept. A note of a departure
        gets `other_node` here. A note that is written twice changes nothing.
        """

    def history(self, namespace: str, ip: str) -> History:
        """Return what is remembered of an address: at most one departure, one refusal of a proved
        agent and one of an unproved agent.
        """

    def agent_history(self, namespace: str, agent_id: str) -> History:
        """Return what is remembered of an agent: its refusals, one proved and one unproved."""

    def node_facts(self) -> list[NodeFacts]:
        """Return the facts of all nodes that had a heartbeat within SHOWN_SECONDS.

        A node that was stopped in order has none.
        """

    def report_gateway(self, record: GatewayRecord) -> None:
        """Write a gateway's record, for `ttl` seconds."""

    def gateways(self) -> list[GatewayRecord]:
        """Return the gateways that have reported within `ttl` seconds."""

    def publish(self, events: Sequence[bytes]) -> None:
        """Append events (JSON objects) to the stream of events, which keeps the newest ones.

        A call that was repeated after a lost reply may append them twice.
        """

    def events(self, cursor: str, most: int) -> tuple[str, list[bytes]]:
        """Return the next cursor, and up to `most` events after `cursor`, the oldest first.

        A cursor is "milliseconds-number"; "0-0" is before the first event that is kept.
        """

    def close(self) -> None:
        """Release connections and threads."""
