"""Writes and reads names, tuples and records in the form that they have in Redis.

docs/registry.md specifies the form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from rtunnel.config import canonical_ip
from rtunnel.logs import get_logger
from rtunnel.registry.base import Change, GatewayRecord, NodeFacts, NodeRecord, PortLease, Registration, Tuple
from rtunnel.registry.history import CLAIM_SECONDS, KEPT_SECONDS, Departure, RefusedAgent

_PLAIN = re.compile(r"[A-Za-z0-9._~-]+").fullmatch

_tuple = msgspec.json.Decoder(Tuple, strict=False)  # not strict: an epoch is a string in JSON
read_record = msgspec.json.Decoder(NodeRecord, strict=False).decode
read_facts = msgspec.json.Decoder(NodeFacts, strict=False).decode
read_gateway = msgspec.json.Decoder(GatewayRecord, strict=False).decode
read_departure = msgspec.json.Decoder(Departure, strict=False).decode
read_refused = msgspec.json.Decoder(RefusedAgent, strict=False).decode
_encode = msgspec.json.Encoder().encode
# Errors that reading a reply can raise when another program has written it.
NONSENSE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError)

_T = TypeVar("_T")
_log = get_logger("registry")


@lru_cache(maxsize=4096)
def quoted(name: str) -> str:
    """Return a name as a part of a key: without ':', '/', '@', space or control character."""
    return name if _PLAIN(name) else quote(name, safe="")


def quoted_ip(ip: str) -> str:
    """Return an address as the last part of a key, where ':' may stay."""
    return ip if _PLAIN(ip) else quote(ip, safe=":")


def port_name(ip: str, port: int) -> str:
    return f"{quoted_ip(ip)}:{port}"


def last_port_name(node: str, owner: str) -> str:
    return f"{quoted(node)}:{quote(owner, safe='/')}"


def node_of(registration: Registration) -> str | None:
    """Return the node of the registration's tuples and leases, or None when it has none."""
    for entry in registration.tuples:
        return entry.node
    for lease in registration.leases:
        return lease.node
    return None


def target_name(entry: Tuple) -> str:
    return f"{quoted(entry.namespace)}:{quoted_ip(entry.agent_ip)}"


def field_name(entry: Tuple) -> str:
    return f"{quoted(entry.node)}/{entry.agent_port}"


def lease_args(lease: PortLease) -> tuple[Any, ...]:
    return port_name(lease.ip, lease.port), lease.owner, last_port_name(lease.node, lease.owner), lease.epoch


def leases_with_exposes(registration: Registration) -> Iterator[tuple[PortLease, tuple[str, int]]]:
    """Yield each lease with the exposed ports and the revision to store in it (the first only)."""
    exposes = registration.exposes, registration.revision
    for lease in registration.leases:
        yield lease, exposes
        exposes = "", 0


def stored_tuple(entry: Tuple) -> bytes:
    """Return a tuple as stored JSON, without the fields that the registry sets.

    The epoch comes first, where scripts expect it, and is a string.
    """
    fields = msgspec.structs.asdict(entry)
    del fields["beat"], fields["exposes"]
    if not entry.host_id:
        del fields["host_id"], fields["agent_host"]  # hosts are compared only when both have an id
    return _encode({"epoch": str(fields.pop("epoch")), **fields})


def agent_mark(entry: Tuple | Departure) -> bytes:
    """Return a piece of JSON that is in every stored tuple of this agent, and of no other agent.

    No value can contain it: JSON puts a backslash before a quote inside a value.
    """
    return b',"agent_id":%s,' % _encode(entry.agent_id)


def stored_record(record: NodeRecord, *, incarnation: bool) -> bytes:
    fields = msgspec.structs.asdict(record)
    del fields["beat"]
    if not incarnation:
        del fields["incarnation"]
    return _encode(fields)


def stored_report(report: NodeFacts | GatewayRecord) -> bytes:
    """Return facts or a gateway's record as stored JSON, without the time, which a script adds."""
    fields = msgspec.structs.asdict(report)
    del fields["at"]
    return _encode(fields)


def target_key(kind: str, namespace: str, ip: str) -> str:
    """Return the key of what is known about an address, without the prefix."""
    return f"{kind}:{quoted(namespace)}:{quoted_ip(ip)}"


def agent_key(kind: str, namespace: str, agent_id: str) -> str:
    """Return the key of what is known about an agent, without the prefix."""
    return f"{kind}:{quoted(namespace)}:{quoted(agent_id)}"


def note_keys(note: Departure | RefusedAgent) -> list[str]:
    """Return the keys under which a note is stored, without the prefix."""
    if isinstance(note, Departure):
        return [target_key("gone", note.namespace, ip) for ip in note.addresses]
    kind = "refused" if note.proved else "claimed"
    keys = [target_key(f"{kind}-at", note.namespace, ip) for ip in note.addresses]
    return [agent_key(kind, note.namespace, note.agent_id), *keys]


def note_args(note: Departure | RefusedAgent, now: float) -> list[Any]:
    """Return the arguments of a script for one note; `now` is the registry's time."""
    fields = msgspec.structs.asdict(note)
    for set_by_registry in ("at", "ago", "other_node"):
        fields.pop(set_by_registry, None)
    target, mark, epoch, life = "", b"", "", KEPT_SECONDS
    if isinstance(note, Departure):
        epoch = fields["epoch"] = str(note.epoch)
        mark = agent_mark(note)
        target = f"{quoted(note.namespace)}:{quoted_ip(note.addresses[0])}" if note.addresses else ""
    elif not note.proved:
        life = CLAIM_SECONDS
    keys = note_keys(note)
    return [f"{now - note.ago:.3f}", life, target, mark, epoch, _encode(fields), len(keys), *keys]


def sequence_of(entry: list[Any]) -> int:
    return int(entry[0].partition(b"-")[0])


def readable(rows: Iterable[Any], read: Callable[[Any], _T]) -> Iterator[_T]:
    """Yield the rows that can be read. Leave out and log the others.

    One program that writes wrong rows must not take all other rows from every reader.
    """
    ignored, reason = 0, ""
    for row in rows:
        try:
            yield read(row)
        except NONSENSE as error:
            ignored, reason = ignored + 1, str(error)
    if ignored:
        _log.warning("registry_rows_ignored", rows=ignored, reason=reason)


def read_page(page: bytes) -> list[Tuple]:
    try:
        # Takes half the time of decoding the lines one by one.
        return [_checked(entry) for entry in _tuple.decode_lines(page)]
    except NONSENSE:
        return list(readable(page.splitlines(), read_tuple))


def read_tuple(json: bytes) -> Tuple:
    return _checked(_tuple.decode(json))


def _checked(entry: Tuple) -> Tuple:
    """Raise ValueError for values that msgspec does not check and a dial would fail on."""
    _check_ip(entry.ps_ip)
    if entry.epoch >> 64:
        raise ValueError(f"epoch {entry.epoch} has more than 64 bits")
    return entry


@lru_cache(maxsize=4096)
def _check_ip(text: str) -> None:
    canonical_ip(text)


def read_change(entry: list[Any]) -> Change:
    kind, json = entry
    of = read_tuple(json)
    return Change(of.namespace, of.agent_ip, of.agent_port, of.node, of.epoch, of if kind == b"put" else None)
