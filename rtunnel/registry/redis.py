"""The registry in Redis.

docs/registry.md specifies the schema. The scripts that write it are in `lua`, the connections and
errors in `redis_client`, and the form of names and values in `redis_rows`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import msgspec

from rtunnel.errors import AddressTaken, RegistryUnavailable
from rtunnel.registry import lua
from rtunnel.registry.base import (
    COUNTER_BITS,
    EVENTS_LENGTH,
    SHOWN_SECONDS,
    Beat,
    Change,
    CursorLost,
    DuplicateAgent,
    GatewayRecord,
    NodeFacts,
    NodeRecord,
    PortLease,
    Registration,
    Snapshot,
    Tuple,
    incarnation_of,
)
from rtunnel.registry.history import Departure, History, RefusedAgent
from rtunnel.registry.redis_client import RedisClient, Script, WrongType, seconds_of
from rtunnel.registry.redis_rows import (
    NONSENSE,
    agent_key,
    agent_mark,
    field_name,
    last_port_name,
    lease_args,
    leases_with_exposes,
    node_of,
    note_args,
    note_keys,
    port_name,
    quoted,
    quoted_ip,
    read_change,
    read_departure,
    read_facts,
    read_gateway,
    read_page,
    read_record,
    read_refused,
    read_tuple,
    readable,
    sequence_of,
    stored_record,
    stored_report,
    stored_tuple,
    target_key,
    target_name,
)
from rtunnel.registry.redis_unanswered import Unanswered, place_of

# Changes that a gateway may be behind before it needs a snapshot: one node of 50,000 sessions
# stops, and its agents register elsewhere. A full feed takes about 30 MB in Redis, with names of
# usual length.
FEED_LENGTH = 100_000
# The bytes of these changes: the longest names make a change ten times as long.
FEED_BYTES = 32 * 1024 * 1024
# Sessions in one call of the quiet beat: 3 to 5 ms of Redis, 100 calls for 50,000 sessions.
BATCH = 500
WRITE_BATCH = 250  # sessions in one call that writes them in full: 5 ms of Redis
NOTE_KEYS = 250  # keys of notes in one call that writes them: 3 ms of Redis
PAGE = 250  # tuples in one page of a snapshot or purge: 2 to 4 ms of Redis
CHANGES_AT_ONCE = 1000  # changes in one reply, or tuples in one exchange of `with_exposes`
# Each session is written in full once in this many beats (five minutes at 5 s). It removes dead
# tuples of the same address, and repairs what a restored old dump brought back.
VERIFY_EVERY = 60
# Seconds for which an owner's port and a node's incarnation are remembered.
LAST_PORT = 30 * 86400.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reject_nonsense(
    call: Callable[Concatenate[RedisRegistry, _P], _T],
) -> Callable[Concatenate[RedisRegistry, _P], _T]:
    """Turn an error while reading a reply into RegistryUnavailable, which every caller survives.

    The reason is that another program writes to these keys, or another server answers.
    """

    @wraps(call)
    def checked(registry: RedisRegistry, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return call(registry, *args, **kwargs)
        except NONSENSE as error:
            text = f"an answer makes no sense ({error}): find the program that writes there (docs/registry.md)"
            raise RegistryUnavailable(f"registry {registry.url}: {text}") from error

    return checked


_PUT, _REFRESH, _START, _STOP = map(Script, (lua.PUT, lua.REFRESH, lua.START, lua.STOP))
_PURGE, _LEASE, _REMOVE = map(Script, (lua.PURGE, lua.LEASE, lua.REMOVE))
_CURSOR, _NODES, _PAGE = map(Script, (lua.CURSOR, lua.NODES, lua.PAGE))
_REPORT, _GATEWAY, _ROWS = map(Script, (lua.REPORT, lua.GATEWAY, lua.ROWS))


class RedisRegistry(RedisClient):
    """A `Registry` in Redis. Opens connections on demand, one for each thread that is in a call.

    A call gives up when Redis has not answered one of its commands for `timeout` seconds. All
    processes of a deployment must use the same `prefix` and `ttl`. Raises ValueError for a URL or
    prefix that cannot be right. `clock` returns monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "rtunnel",
        ttl: float = 15.0,
        quarantine: float = 60.0,
        timeout: float = 1.0,
        feed_length: int = FEED_LENGTH,
        feed_bytes: int = FEED_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not prefix or any(c.isspace() or not c.isprintable() for c in prefix):
            raise ValueError(f"[registry] prefix {prefix!r} must be one printable word")
        lifetimes = (ttl, ttl + quarantine, quarantine, LAST_PORT)
        feed = (uuid.uuid4().hex, feed_length, feed_bytes)
        super().__init__(url, timeout, (prefix, *feed, *(max(1, round(t * 1000)) for t in lifetimes)), clock)
        self.ttl = ttl
        self.quarantine = quarantine
        self._prefix = prefix
        self._beats = 0
        self._unanswered = Unanswered()

    # ------------------------------------------------------------------ nodes

    @_reject_nonsense
    def start_node(self, record: NodeRecord) -> int:
        node = quoted(record.node)
        incarnation = int(self._write(_START, node, stored_record(record, incarnation=False)))
        self._purge(record.node, incarnation << COUNTER_BITS)
        return incarnation

    @_reject_nonsense
    def stop_node(self, node: str, incarnation: int) -> None:
        if self._run(_STOP, quoted(node), incarnation):
            self._purge(node, (incarnation + 1) << COUNTER_BITS)

    @_reject_nonsense
    def nodes(self) -> list[NodeRecord]:
        return list(readable(self._run(_NODES).splitlines(), read_record))

    def _purge(self, node: str, floor: int) -> None:
        first = 1
        while self._write(_PURGE, quoted(node), node, floor, PAGE, first) or first:
            first = 0

    # ------------------------------------------------------------------ ports

    def last_port(self, node: str, owner: str) -> int | None:
        key = f"{self._prefix}:last:{last_port_name(node, owner)}"
        try:
            port = self._command("GET", key)
        except WrongType:
            self._log_faulty_keys([key.encode()])
            return None  # this port is only preferred: any other port will do
        return int(port) if isinstance(port, bytes) and port.isdigit() else None

    @_reject_nonsense
    def lease_port(self, lease: PortLease) -> bool:
        node = (quoted(lease.node), lease.node, incarnation_of(lease.epoch))
        return bool(self._write(_LEASE, *node, *lease_args(lease)))

    def release_port(self, lease: PortLease) -> None:
        self._remove(lease.node, (), (lease,))

    # ------------------------------------------------------------------ tuples

    @_reject_nonsense
    def register(self, registration: Registration) -> None:
        if node := node_of(registration):
            try:
                _, taken = self._put("keep", node, incarnation_of(registration.epoch), [registration])
            except RegistryUnavailable:
                self._unanswered.add(node, registration, over=False)  # it may have been written
                raise
            for refused in taken.values():
                raise refused

    def unregister(self, registration: Registration) -> None:
        if node := node_of(registration):
            try:
                self._remove(node, registration.tuples, registration.leases)
            except RegistryUnavailable:
                self._unanswered.add(node, registration, over=True)
                raise

    @_reject_nonsense
    def beat(self, record: NodeRecord, registrations: list[Registration]) -> Beat:
        self._beats += 1
        again: list[Registration] = []
        for batch in _batches(registrations, BATCH):
            missing = self._refresh(record, batch)
            turns = range(self._beats % VERIFY_EVERY, len(batch), VERIFY_EVERY)
            again += [batch[n] for n in sorted(missing.union(turns))]
        back = 0
        lost: dict[int, AddressTaken] = {}
        for batch in _batches(again, WRITE_BATCH):
            written, taken = self._put("back", record.node, record.incarnation, batch)
            back += written
            lost |= taken
        self._undo(record.node, registrations)
        return Beat(back, lost)

    def _undo(self, node: str, registrations: list[Registration]) -> None:
        """Remove what unanswered calls may have left, except what these registrations hold."""
        writes = self._unanswered.of(node)
        if not writes:
            return
        unsure = {write.epoch for write in writes}
        there: set[object] = set()
        for registration in registrations:
            if registration.epoch in unsure:
                there.update(map(place_of, registration.tuples))
                there.update(registration.leases)
        for batch in _batches((write.without(there) for write in writes), WRITE_BATCH):
            tuples = tuple(entry for registration in batch for entry in registration.tuples)
            leases = tuple(lease for registration in batch for lease in registration.leases)
            self._remove(node, tuples, leases)
        self._unanswered.settle(node, writes, there)

    def _refresh(self, record: NodeRecord, batch: list[Registration]) -> set[int]:
        """Refresh one batch. Return the indexes of registrations that are not complete in Redis."""
        tuples, of_tuple, leases, of_lease = [], [], [], []
        for n, registration in enumerate(batch):
            for entry in registration.tuples:
                tuples.append(f"{target_name(entry)} {field_name(entry)} {entry.epoch}\n")
                of_tuple.append(n)
            for lease, (_, revision) in leases_with_exposes(registration):
                leases.append(f"{port_name(lease.ip, lease.port)} {lease.epoch} {revision}\n")
                of_lease.append(n)
        node = (quoted(record.node), record.incarnation, stored_record(record, incarnation=True))
        lost, unleased = self._write(_REFRESH, *node, "".join(tuples), "".join(leases))
        return {of_tuple[n] for n in lost} | {of_lease[n] for n in unleased}

    def _put(
        self, mode: Literal["keep", "back"], node: str, incarnation: int, batch: list[Registration]
    ) -> tuple[int, dict[int, AddressTaken]]:
        """Write one batch.

        Return the number of tuples written, and by epoch the sessions refused.
        """
        args: list[Any] = [mode, quoted(node), node, incarnation]
        leases = [pair for registration in batch for pair in leases_with_exposes(registration)]
        tuples = [entry for registration in batch for entry in registration.tuples]
        args.append(len(tuples))
        for entry in tuples:
            port = port_name(entry.ps_ip, entry.ps_port)
            args += (target_name(entry), agent_mark(entry), field_name(entry), port, entry.epoch, stored_tuple(entry))
        args.append(len(leases))
        for lease, exposes in leases:
            args += (*lease_args(lease), *exposes)
        written, *refused = self._write(_PUT, *args)
        taken = {}
        for number, *words in zip(refused[::4], refused[1::4], refused[2::4], refused[3::4], strict=True):
            ours = tuples[number]
            agent, other, host = (word.decode(errors="replace") for word in words)
            at = ours.namespace, ours.agent_ip, agent, other
            taken[ours.epoch] = DuplicateAgent(*at, host) if agent == ours.agent_id else AddressTaken(*at)
        return written, taken

    def _remove(self, node: str, tuples: tuple[Tuple, ...], leases: tuple[PortLease, ...]) -> None:
        args: list[Any] = [quoted(node), node, len(leases)]
        for lease in leases:
            args += (port_name(lease.ip, lease.port), lease.owner, lease.epoch)
        args.append(len(tuples))
        for entry in tuples:
            args += (target_name(entry), field_name(entry), entry.epoch, stored_tuple(entry))
        self._run(_REMOVE, *args)

    # ------------------------------------------------------------------ reports

    def now(self) -> float:
        return float(seconds_of(self._command("TIME")))

    @_reject_nonsense
    def report(self, facts: NodeFacts, notes: Sequence[Departure | RefusedAgent]) -> float:
        row = stored_report(facts)
        now = 0.0
        for batch in _note_batches(notes):
            # The server's time before the call: a call that runs twice says the same.
            args = [part for note in batch for part in note_args(note, self._server_time())]
            now = float(self._write(_REPORT, quoted(facts.node), row, len(batch), *args))
        return now

    @_reject_nonsense
    def history(self, namespace: str, ip: str) -> History:
        gone, *refused = (target_key(kind, namespace, ip) for kind in ("gone", "refused-at", "claimed-at"))
        return self._history([gone], refused)

    @_reject_nonsense
    def agent_history(self, namespace: str, agent_id: str) -> History:
        return self._history([], [agent_key(kind, namespace, agent_id) for kind in ("refused", "claimed")])

    def _history(self, departures: list[str], refusals: list[str]) -> History:
        """Read the notes with these names of keys. A key of another type reads as missing."""
        names = [f"{self._prefix}:{name}" for name in (*departures, *refusals)]
        clock, rows = self._exchange(("TIME",), ("MGET", *names))
        gone, refused = rows[: len(departures)], rows[len(departures) :]
        return History(
            float(seconds_of(clock)),
            tuple(readable(filter(None, gone), read_departure)),
            tuple(readable(filter(None, refused), read_refused)),
        )

    @_reject_nonsense
    def node_facts(self) -> list[NodeFacts]:
        return list(readable(self._run(_ROWS, "nodes", "facts", SHOWN_SECONDS).splitlines(), read_facts))

    @_reject_nonsense
    def report_gateway(self, record: GatewayRecord) -> None:
        self._write(_GATEWAY, quoted(record.name), stored_report(record))

    @_reject_nonsense
    def gateways(self) -> list[GatewayRecord]:
        return list(readable(self._run(_ROWS, "gateways", "gateway", self.ttl).splitlines(), read_gateway))

    @_reject_nonsense
    def publish(self, events: Sequence[bytes]) -> None:
        key = f"{self._prefix}:events"
        add = ("XADD", key, "MAXLEN", "~", EVENTS_LENGTH, "*", "e")
        self._exchange(*((*add, event) for event in events))

    @_reject_nonsense
    def events(self, cursor: str, most: int) -> tuple[str, list[bytes]]:
        rows = self._command("XRANGE", f"{self._prefix}:events", f"({cursor}", "+", "COUNT", most)
        found = [(name.decode(), dict(zip(fields[::2], fields[1::2], strict=True)).get(b"e")) for name, fields in rows]
        return found[-1][0] if found else cursor, [event for _, event in found if event is not None]

    # ------------------------------------------------------------------ readers

    @_reject_nonsense
    def lookup(self, namespace: str, ip: str) -> list[Tuple]:
        # This reads without a script, as docs/registry.md tells other programs to do.
        clock, flat = self._exchange(
            ("TIME",), ("HGETALL", f"{self._prefix}:target:{quoted(namespace)}:{quoted_ip(ip)}")
        )
        # To the millisecond, as in the scripts: no reader may call a tuple alive that another calls
        # dead.
        now = float(seconds_of(clock))
        fields = dict(zip(flat[::2], flat[1::2], strict=True))

        def read(field: bytes) -> Tuple:
            entry = read_tuple(fields[field])
            return msgspec.structs.replace(entry, beat=float(fields.get(b"%s@%d" % (field, entry.epoch), 0)))

        found = readable((field for field in fields if b"@" not in field), read)
        # A heartbeat from the future is no sign of life: the clock has stepped back.
        return [entry for entry in found if now - self.ttl < entry.beat <= now + self.ttl]

    @_reject_nonsense
    def with_exposes(self, tuples: Sequence[Tuple]) -> list[Tuple]:
        found: list[Tuple] = []
        for first in range(0, len(tuples), CHANGES_AT_ONCE):
            piece = tuples[first : first + CHANGES_AT_ONCE]
            ports = [f"{self._prefix}:port:{port_name(entry.ps_ip, entry.ps_port)}" for entry in piece]
            replies = self._exchange(*(("HMGET", port, "epoch", "exposes") for port in ports))
            for entry, (epoch, exposes) in zip(piece, replies, strict=True):
                if exposes is not None and epoch == b"%d" % entry.epoch:
                    entry = msgspec.structs.replace(entry, exposes=exposes.decode(errors="replace"))
                found.append(entry)
        return found

    @_reject_nonsense
    def snapshot(self) -> Snapshot:
        feed, seq, now, nodes = self._run(_CURSOR)
        records = self.nodes()
        found: list[Tuple] = []
        for node in nodes:
            cursor = b"0"
            while True:
                cursor, page = self._run(_PAGE, node, cursor, PAGE)
                found += read_page(page)
                if cursor == b"0":
                    break
        return Snapshot(cursor=f"{feed.decode()}/{int(seq)}", now=float(now), nodes=records, tuples=found)

    @_reject_nonsense
    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        feed, _, text = cursor.partition("/")
        position = int(text)
        found, latest = self._command("HMGET", f"{self._prefix}:feed", "id", "seq")
        # After a failover to a replica that lags, or from an older dump, the id is the same but
        # `seq` is less.
        if found != feed.encode() or int(latest) < position:
            raise CursorLost(f"{self.url} was wiped or restored since {cursor}")
        block: tuple[Any, ...] = ()
        if int(latest) == position:
            wait = max(0.001, min(wait, 1.0))
            block = ("BLOCK", round(wait * 1000))
        after = ("STREAMS", f"{self._prefix}:changes", f"{position}-0")
        [reply] = self._exchange(("XREAD", "COUNT", CHANGES_AT_ONCE, *block, *after), wait=wait if block else 0.0)
        entries = reply[0][1] if reply else []
        if (entries and sequence_of(entries[0]) != position + 1) or not (entries or block):
            raise CursorLost(f"the feed of {self.url} was trimmed past {cursor}")
        return f"{feed}/{position + len(entries)}", list(readable((entry[1] for entry in entries), read_change))


def _batches(registrations: Iterable[Registration], most: int) -> Iterator[list[Registration]]:
    """Yield batches of about `most` tuples. Yields at least one, for the node's own heartbeat."""
    batch: list[Registration] = []
    size = 0
    for registration in registrations:
        if size >= most:
            yield batch
            batch, size = [], 0
        batch.append(registration)
        size += max(1, len(registration.tuples), len(registration.leases))
    yield batch


def _note_batches(notes: Sequence[Departure | RefusedAgent]) -> Iterator[list[Departure | RefusedAgent]]:
    """Yield batches of about NOTE_KEYS keys; at least one, for the node's facts."""
    batch: list[Departure | RefusedAgent] = []
    size = 0
    for note in notes:
        if size >= NOTE_KEYS:
            yield batch
            batch, size = [], 0
        batch.append(note)
        size += len(note_keys(note))
    yield batch
