"""Rows and warnings for `rtunnel status` and `rtunnel resolve`, from what the registry says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from rtunnel.clock import lasting
from rtunnel.logs import printable
from rtunnel.registry import Departure, GatewayRecord, History, NodeFacts, NodeRecord, RefusedAgent, Registry
from rtunnel.registry.history import unknown_target

#: Seconds by which a node's clock may differ from the registry's without a warning. Dials are
#: refused from `broker.dial_window` (30 s) on, and certificates look at the same clock.
CLOCK_TOLERANCE: Final = 2.0
#: The part of a port range or of the descriptors that may be in use without a warning.
NEARLY_USED: Final = 0.9

NODE_COLUMNS: Final = (
    "node", "host", "ps ip", "state", "sessions", "streams", "ports", "descriptors", "heartbeat", "version",
)  # fmt: skip
GATEWAY_COLUMNS: Final = (
    "gateway", "host", "namespace", "state", "listen", "clients", "streams", "tuples", "table age", "heartbeat",
    "version",
)  # fmt: skip


class Nodes:
    """The nodes of a registry: those with a heartbeat, and those that died within the last hour.

    `now` is the registry's time, in seconds since 1970.
    """

    def __init__(self, records: Iterable[NodeRecord], facts: Iterable[NodeFacts], now: float, ttl: float) -> None:
        self._records = sorted(records, key=lambda record: record.node)
        self._facts = {told.node: told for told in facts}
        self._now = now
        self._ttl = ttl
        living = {record.node for record in self._records}
        self._gone = [told for name, told in sorted(self._facts.items()) if name not in living]

    def as_json(self) -> list[dict[str, Any]]:
        """Return the nodes with a heartbeat, each with its facts."""
        return [
            {
                **msgspec.to_builtins(record),
                "age": age(self._now, record.beat),
                "facts": _facts_json(self._facts.get(record.node), self._now),
            }
            for record in self._records
        ]

    def gone_as_json(self) -> list[dict[str, Any]]:
        """Return the facts of the nodes that have died."""
        return [{**msgspec.to_builtins(told), "age": age(self._now, told.at)} for told in self._gone]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table of NODE_COLUMNS, the dead nodes last."""
        return [*map(self._row, self._records), *map(self._gone_row, self._gone)]

    def _row(self, node: NodeRecord) -> tuple[str, ...]:
        told = self._facts.get(node.node)
        return (
            node.node, node.host, node.ip, node.state, str(node.sessions), str(node.streams),
            _ports(told) if told else "", _descriptors(told) if told else "",
            ago(self._now, node.beat), node.version,
        )  # fmt: skip

    def _gone_row(self, told: NodeFacts) -> tuple[str, ...]:
        gone = f"gone {lasting(max(0.0, self._now - told.at))}"
        return told.node, told.host, told.ip, gone, "", "", _ports(told), "", ago(self._now, told.at), told.version

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that is not as it should be on a node."""
        found = [
            f"{told.node} has had no heartbeat for {lasting(self._now - told.at)} and was not stopped: see that host"
            for told in self._gone
        ]
        for record in self._records:
            told = self._facts.get(record.node)
            if told is not None:
                found += self._faults_of(told)
        return [printable(text) for text in found]

    def _faults_of(self, told: NodeFacts) -> Iterable[str]:
        yield from (f"{told.node} is not ready: {reason}" for reason in told.reasons)
        late = self._now - told.at
        if late > self._ttl:
            yield f"{told.node} has completed no heartbeat for {lasting(late)}, though it sends some: see its log"
        offset = told.clock_offset or 0.0
        if abs(offset) > CLOCK_TOLERANCE:
            way = "ahead of" if offset > 0 else "behind"
            yield f"the clock of {told.node} is {abs(offset):.1f} s {way} the registry's: set it (NTP)"
        size = told.ports_free + told.ports_used + told.ports_resting
        if size and told.ports_used + told.ports_resting > NEARLY_USED * size:
            yield f"the ports of {told.node} ({told.port_range}) are nearly used up: {_ports(told)}"
        if told.descriptor_limit and told.descriptors > NEARLY_USED * told.descriptor_limit:
            yield f"the descriptors of {told.node} are nearly used up: {_descriptors(told)} (LimitNOFILE)"
        if told.notes_dropped:
            yield f"{told.node} could not write {told.notes_dropped} departures and refusals: see docs/registry.md"


def _facts_json(told: NodeFacts | None, now: float) -> dict[str, Any] | None:
    if told is None:
        return None
    found = {**msgspec.to_builtins(told), "age": age(now, told.at)}
    for known in ("node", "host", "ip", "version", "sessions"):
        del found[known]  # the record has them
    return found


def _ports(told: NodeFacts) -> str:
    size = told.ports_free + told.ports_used + told.ports_resting
    resting = f" (+{told.ports_resting} resting)" if told.ports_resting else ""
    return f"{told.ports_used}/{size}{resting}"


def _descriptors(told: NodeFacts) -> str:
    return f"{told.descriptors}/{told.descriptor_limit}"


def gateways_as_json(gateways: Iterable[GatewayRecord], now: float) -> list[dict[str, Any]]:
    """Return the gateways, each with the age of its record."""
    return [
        {**msgspec.to_builtins(record), "age": age(now, record.at)}
        for record in sorted(gateways, key=lambda record: record.name)
    ]


def gateway_rows(gateways: Iterable[GatewayRecord], now: float) -> list[tuple[str, ...]]:
    """Return the rows of the table of GATEWAY_COLUMNS."""
    return [
        (
            known.name, known.host, known.namespace, known.state, known.listen, str(known.clients), str(known.streams),
            str(known.tuples), _table_age(known, now), ago(now, known.at), known.version,
        )
        for known in sorted(gateways, key=lambda record: record.name)
    ]  # fmt: skip


def gateway_warnings(gateways: Iterable[GatewayRecord], now: float) -> list[str]:
    """Return a sentence for each gateway whose table is not true, or that waits for a node."""
    found = []
    for known in sorted(gateways, key=lambda record: record.name):
        if known.fault:
            found.append(f"the table of gateway {known.name} is {_table_age(known, now)} old: {known.fault}")
        if known.suspects:
            found.append(f"gateway {known.name} had no answer lately from {', '.join(known.suspects)}")
    return [printable(text) for text in found]


def _table_age(known: GatewayRecord, now: float) -> str:
    if known.routes_age is None:
        return "never filled"
    return f"{known.routes_age + max(0.0, now - known.at):.1f} s"


class Missing(msgspec.Struct, frozen=True):
    """The facts about an address without a tuple."""

    namespace: str
    ip: str
    history: History
    elsewhere: list[str]  # other namespaces in which it has tuples
    living: frozenset[str]  # nodes with a heartbeat

    def text(self) -> str:
        """Return a sentence about it, with the facts that only operators are told."""
        known = self.history.sentences(self.living, for_operator=True)
        if self.elsewhere:
            known.insert(0, f"it exists in namespace {', '.join(self.elsewhere)} (--namespace)")
        known = known or ["`rtunnel status` shows the agents"]
        where = f"{self.ip} in namespace {self.namespace}"
        return printable(unknown_target(where, known))

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return {
            "namespaces": self.elsewhere,
            "departures": [_note_json(entry) for entry in self.history.departures],
            "refusals": [_note_json(entry) for entry in self.history.refusals],
        }


def _note_json(entry: Departure | RefusedAgent) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(entry)
    del fields["ago"]
    if isinstance(entry, Departure):
        fields["epoch"] = str(entry.epoch)  # it has 64 bits, which jq and JavaScript would round
    return fields


def missing(registry: Registry, namespace: str, ip: str) -> Missing:
    """Return what is known about an address that has no tuple.

    Reads all tuples, to find other namespaces that have it.
    """
    history = registry.history(namespace, ip)
    snapshot = registry.snapshot()
    elsewhere = {entry.namespace for entry in snapshot.tuples if entry.agent_ip == ip}
    living = frozenset(node.node for node in snapshot.nodes)
    return Missing(namespace, ip, history, sorted(elsewhere - {namespace}), living)


def age(now: float, then: float) -> float:
    """Return the seconds from `then` to `now`, for JSON; never less than 0."""
    return round(max(0.0, now - then), 3)


def ago(now: float, then: float) -> str:
    """Return the time since `then` for a table, such as "2.0 s ago"."""
    seconds = max(0.0, now - then)
    return f"{seconds:.1f} s ago" if seconds < 60 else f"{lasting(seconds)} ago"


def status_json(
    nodes: Nodes, gateways: Sequence[GatewayRecord], now: float, rest: Mapping[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """Return the JSON of `rtunnel status`; `rest` holds what the snapshot says."""
    return {
        "now": now,
        "nodes": nodes.as_json(),
        "gone": nodes.gone_as_json(),
        "gateways": gateways_as_json(gateways, now),
        **rest,
        "warnings": [*warnings, *nodes.warnings(), *gateway_warnings(gateways, now)],
    }
