"""The registry in Redis. The schema is normative in docs/registry.md, the scripts that write it are in `lua`.

redis-py gives connections, pool, TLS and sentinel; commands are sent here, one exchange at a time, so that timeouts,
the one retry and the mapping of errors are in one place (`_exchange`).
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from rtunnel.config import canonical_ip
from rtunnel.errors import AddressTaken, RegistryUnavailable, Superseded
from rtunnel.logs import get_logger
from rtunnel.registry import lua
from rtunnel.registry.base import (
    COUNTER_BITS,
    Beat,
    Change,
    CursorLost,
    DuplicateAgent,
    NodeRecord,
    PortLease,
    Registration,
    Snapshot,
    Tuple,
    incarnation_of,
)

# The changes that a gateway may be behind before it has to take a snapshot: one node of 50,000 sessions that stops and
# comes back elsewhere. About 30 MB in Redis when full, with ordinary names.
FEED_LENGTH = 100_000
# And their bytes, for names of the longest kind make a change ten times as long.
FEED_BYTES = 32 * 1024 * 1024
BATCH = 500  # sessions in one call of the quiet beat: 3 to 5 ms of Redis, and 100 calls for 50,000 sessions
WRITE_BATCH = 250  # sessions in one call that writes them in full: 5 ms of Redis
PAGE = 250  # tuples in one page of a snapshot or purge: 2 to 4 ms of Redis
CHANGES_AT_ONCE = 1000
# Each session is written in full every so many beats (five minutes at 5 s): prunes dead neighbours, mends what an old
# dump brought back.
VERIFY_EVERY = 60
LAST_PORT = 30 * 86400.0  # how long an owner's port, and a node's incarnation, are remembered
# The server's clock is asked for again after so many seconds: until then two clocks drift apart by some milliseconds.
CLOCK_SECONDS = 10.0
# Sessions whose last write had no answer, to be seen to by the next beat. What is beyond that expires by itself.
MAX_UNSURE = 10_000
# Keys that were told to be of another type are not told again so soon (seconds), and so many are remembered.
TELL_AGAIN = 60.0
MAX_TOLD = 1000

_SENTINEL = "redis+sentinel"
_SCHEMES = ("redis", "rediss", "unix", _SENTINEL)
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+").fullmatch

_tuple = msgspec.json.Decoder(Tuple, strict=False)  # not strict: an epoch is a string in JSON, an int here
_record_of = msgspec.json.Decoder(NodeRecord, strict=False)
_encode = msgspec.json.Encoder().encode
#: What a reply that nobody of ours has written can raise.
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = get_logger("registry")


def _sensible(call: Callable[Concatenate[RedisRegistry, _P], _T]) -> Callable[Concatenate[RedisRegistry, _P], _T]:
    """Replies that make no sense are an outage, which every caller outlives: something else answers there."""

    @wraps(call)
    def checked(registry: RedisRegistry, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return call(registry, *args, **kwargs)
        except _NONSENSE as error:
            text = f"an answer makes no sense ({error}); see who else writes there, and docs/registry.md"
            raise RegistryUnavailable(f"registry {registry.url}: {text}") from error

    return checked


class _WrongType(RegistryUnavailable):
    """A key is of another type than docs/registry.md says."""


class _Late(Exception):
    """The server found a call that is older than its caller's patience; it did nothing."""


class _Script:
    """A script and the name under which Redis remembers it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


_PUT, _REFRESH, _START, _STOP = map(_Script, (lua.PUT, lua.REFRESH, lua.START, lua.STOP))
_PURGE, _LEASE, _REMOVE = map(_Script, (lua.PURGE, lua.LEASE, lua.REMOVE))
_CURSOR, _NODES, _PAGE = map(_Script, (lua.CURSOR, lua.NODES, lua.PAGE))


class RedisRegistry:
    """See `Registry`. Opens connections as they are needed, one for each thread that is in a call.

    A call gives up when Redis has not answered one of its commands for `timeout` seconds. All processes of a deployment
    must use the same `prefix` and `ttl`. ValueError for a URL that can't be right.
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
        self.url, self._pool, self._sentinels = _pool(url, timeout)
        self.ttl = ttl
        self.quarantine = quarantine
        self._prefix = prefix
        self._timeout = timeout
        self._beats = 0
        self._closed = False
        lifetimes = (ttl, ttl + quarantine, quarantine, LAST_PORT)
        feed = (uuid.uuid4().hex, feed_length, feed_bytes)
        self._head = (prefix, *feed, *(max(1, round(t * 1000)) for t in lifetimes))
        self._monotonic = clock
        self._clock: tuple[float, float] | None = None  # ours, and the server's then or a little later
        self._unsure = _Unsure()
        self._told: dict[str, float] = {}  # keys of another type, until when they are not told again

    def ping(self) -> None:
        self._command("PING")

    def close(self) -> None:
        self._closed = True
        self._pool.disconnect()
        for sentinel in self._sentinels:
            sentinel.connection_pool.disconnect()

    # ------------------------------------------------------------------ nodes

    @_sensible
    def start_node(self, record: NodeRecord) -> int:
        node = _quote(record.node)
        incarnation = int(self._write(_START, node, _record(record, incarnation=False)))
        self._purge(record.node, incarnation << COUNTER_BITS)
        return incarnation

    @_sensible
    def stop_node(self, node: str, incarnation: int) -> None:
        if self._run(_STOP, _quote(node), incarnation):
            self._purge(node, (incarnation + 1) << COUNTER_BITS)

    @_sensible
    def nodes(self) -> list[NodeRecord]:
        return list(_rows(self._run(_NODES).splitlines(), _record_of.decode))

    def _purge(self, node: str, floor: int) -> None:
        first = 1
        while self._write(_PURGE, _quote(node), node, floor, PAGE, first) or first:
            first = 0

    # ------------------------------------------------------------------ ports

    def last_port(self, node: str, owner: str) -> int | None:
        key = f"{self._prefix}:last:{_last(node, owner)}"
        try:
            port = self._command("GET", key)
        except _WrongType:
            self._tell([key.encode()])
            return None  # it was a wish: any other port will do
        return int(port) if isinstance(port, bytes) and port.isdigit() else None

    @_sensible
    def lease_port(self, lease: PortLease) -> bool:
        node = (_quote(lease.node), lease.node, incarnation_of(lease.epoch))
        return bool(self._write(_LEASE, *node, *_lease_args(lease)))

    def release_port(self, lease: PortLease) -> None:
        self._remove(lease.node, (), (lease,))

    # ------------------------------------------------------------------ tuples

    @_sensible
    def register(self, registration: Registration) -> None:
        if node := _node(registration):
            try:
                _, taken = self._put("keep", node, incarnation_of(registration.epoch), [registration])
            except RegistryUnavailable:
                self._unsure.add(node, registration, over=False)  # it may be there
                raise
            for refused in taken.values():
                raise refused

    def unregister(self, registration: Registration) -> None:
        if node := _node(registration):
            try:
                self._remove(node, registration.tuples, registration.leases)
            except RegistryUnavailable:
                self._unsure.add(node, registration, over=True)
                raise

    @_sensible
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
        """Remove what earlier calls without an answer may have left, but for what is in these registrations."""
        doubts = self._unsure.of(node)
        if not doubts:
            return
        unsure = {doubt.epoch for doubt in doubts}
        there: set[object] = set()
        for registration in registrations:
            if registration.epoch in unsure:
                there.update(map(_place, registration.tuples))
                there.update(registration.leases)
        for batch in _batches((doubt.without(there) for doubt in doubts), WRITE_BATCH):
            tuples = tuple(entry for registration in batch for entry in registration.tuples)
            leases = tuple(lease for registration in batch for lease in registration.leases)
            self._remove(node, tuples, leases)
        self._unsure.settle(node, doubts, there)

    def _refresh(self, record: NodeRecord, batch: list[Registration]) -> set[int]:
        """The heartbeat of one batch: which of its registrations Redis does not (wholly) have."""
        tuples, of_tuple, leases, of_lease = [], [], [], []
        for n, registration in enumerate(batch):
            for entry in registration.tuples:
                tuples.append(f"{_target(entry)} {_field(entry)} {entry.epoch}\n")
                of_tuple.append(n)
            for lease, (_, revision) in _said(registration):
                leases.append(f"{_at(lease.ip, lease.port)} {lease.epoch} {revision}\n")
                of_lease.append(n)
        node = (_quote(record.node), record.incarnation, _record(record, incarnation=True))
        lost, unleased = self._write(_REFRESH, *node, "".join(tuples), "".join(leases))
        return {of_tuple[n] for n in lost} | {of_lease[n] for n in unleased}

    def _put(
        self, mode: Literal["keep", "back"], node: str, incarnation: int, batch: list[Registration]
    ) -> tuple[int, dict[int, AddressTaken]]:
        """How many tuples were written; the epochs of sessions that lack an address because another agent has it."""
        args: list[Any] = [mode, _quote(node), node, incarnation]
        leases = [said for registration in batch for said in _said(registration)]
        tuples = [entry for registration in batch for entry in registration.tuples]
        args.append(len(tuples))
        for entry in tuples:
            port = _at(entry.ps_ip, entry.ps_port)
            args += (_target(entry), _agent(entry), _field(entry), port, entry.epoch, _static(entry))
        args.append(len(leases))
        for lease, said in leases:
            args += (*_lease_args(lease), *said)
        written, *refused = self._write(_PUT, *args)
        taken = {}
        for number, *words in zip(refused[::4], refused[1::4], refused[2::4], refused[3::4], strict=True):
            ours = tuples[number]
            agent, other, host = (word.decode(errors="replace") for word in words)
            at = ours.namespace, ours.agent_ip, agent, other
            taken[ours.epoch] = DuplicateAgent(*at, host) if agent == ours.agent_id else AddressTaken(*at)
        return written, taken

    def _remove(self, node: str, tuples: tuple[Tuple, ...], leases: tuple[PortLease, ...]) -> None:
        args: list[Any] = [_quote(node), node, len(leases)]
        for lease in leases:
            args += (_at(lease.ip, lease.port), lease.owner, lease.epoch)
        args.append(len(tuples))
        for entry in tuples:
            args += (_target(entry), _field(entry), entry.epoch, _static(entry))
        self._run(_REMOVE, *args)

    # ------------------------------------------------------------------ readers

    @_sensible
    def lookup(self, namespace: str, ip: str) -> list[Tuple]:
        # No script: this is what docs/registry.md tells everybody else to do.
        clock, flat = self._exchange(
            ("TIME",), ("HGETALL", f"{self._prefix}:target:{_quote(namespace)}:{_quote_ip(ip)}")
        )
        # To the millisecond, as the scripts have it: what one reader calls dead the next must not call alive.
        now = float(_seconds(clock))
        fields = dict(zip(flat[::2], flat[1::2], strict=True))

        def read(field: bytes) -> Tuple:
            entry = _read_tuple(fields[field])
            return msgspec.structs.replace(entry, beat=float(fields.get(b"%s@%d" % (field, entry.epoch), 0)))

        found = _rows((field for field in fields if b"@" not in field), read)
        # One from the future is no sign of life: the clock stepped back.
        return [entry for entry in found if now - self.ttl < entry.beat <= now + self.ttl]

    @_sensible
    def with_exposes(self, tuples: Sequence[Tuple]) -> list[Tuple]:
        found: list[Tuple] = []
        for first in range(0, len(tuples), CHANGES_AT_ONCE):
            piece = tuples[first : first + CHANGES_AT_ONCE]
            ports = [f"{self._prefix}:port:{_at(entry.ps_ip, entry.ps_port)}" for entry in piece]
            replies = self._exchange(*(("HMGET", port, "epoch", "exposes") for port in ports))
            for entry, (epoch, exposes) in zip(piece, replies, strict=True):
                if exposes is not None and epoch == b"%d" % entry.epoch:
                    entry = msgspec.structs.replace(entry, exposes=exposes.decode(errors="replace"))
                found.append(entry)
        return found

    @_sensible
    def snapshot(self) -> Snapshot:
        feed, seq, now, nodes = self._run(_CURSOR)
        records = self.nodes()
        found: list[Tuple] = []
        for node in nodes:
            cursor = b"0"
            while True:
                cursor, page = self._run(_PAGE, node, cursor, PAGE)
                found += _page_of(page)
                if cursor == b"0":
                    break
        return Snapshot(cursor=f"{feed.decode()}/{int(seq)}", now=float(now), nodes=records, tuples=found)

    @_sensible
    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        feed, _, text = cursor.partition("/")
        position = int(text)
        found, latest = self._command("HMGET", f"{self._prefix}:feed", "id", "seq")
        # A failover to a replica that lags, or an older dump, keeps the id but goes back.
        if found != feed.encode() or int(latest) < position:
            raise CursorLost(f"{self.url} was wiped or restored since {cursor}")
        block: tuple[Any, ...] = ()
        if int(latest) == position:
            wait = max(0.001, min(wait, 1.0))
            block = ("BLOCK", round(wait * 1000))
        after = ("STREAMS", f"{self._prefix}:changes", f"{position}-0")
        [reply] = self._exchange(("XREAD", "COUNT", CHANGES_AT_ONCE, *block, *after), wait=wait if block else 0.0)
        entries = reply[0][1] if reply else []
        if (entries and _sequence(entries[0]) != position + 1) or not (entries or block):
            raise CursorLost(f"the feed of {self.url} was trimmed past {cursor}")
        return f"{feed}/{position + len(entries)}", list(_rows((entry[1] for entry in entries), _change))

    # ------------------------------------------------------------------ talking to Redis

    def _command(self, *command: Any) -> Any:
        return self._exchange(command)[0]

    def _write(self, script: _Script, *args: Any) -> Any:
        """Run a script that does nothing when it begins after this caller has given up.

        Commands wait in the buffers of a server that is frozen, also after their connection was closed. A START that
        then comes last would take the node_id from the process that is at work.
        """
        for _ in range(2):
            try:
                return self._run(script, *args, not_after=f"{self._server_time() + self._timeout + 0.1:.3f}")
            except _Late:
                self._clock = None  # it stepped forward, or there is another server by now
        text = f"its clock jumps, or calls take more than {self._timeout:g} s to reach it; see [registry] timeout"
        raise RegistryUnavailable(f"registry {self.url}: {text}")

    def _server_time(self) -> float:
        """Seconds by the server's clock: never behind it, ahead by no more than one exchange takes."""
        now = self._monotonic()
        clock = self._clock
        if clock is None or now - clock[0] > CLOCK_SECONDS:
            clock = self._clock = now, float(_seconds(self._command("TIME")))
        return clock[1] + self._monotonic() - clock[0]

    def _run(self, script: _Script, *args: Any, not_after: str = "") -> Any:
        args = (0, *self._head, not_after, *args)
        try:
            answer, faulty = self._command("EVALSHA", script.sha, *args)
        except errors.NoScriptError:  # a server that was restarted, or a failover
            answer, faulty = self._command("EVAL", script.source, *args)
        if faulty:
            self._tell(faulty)
        return answer

    def _tell(self, faulty: list[bytes]) -> None:
        """Log the keys that a script could not use, each from time to time."""
        now = self._monotonic()
        for key in (name.decode(errors="replace") for name in faulty):
            if self._told.get(key, 0.0) <= now:
                if len(self._told) >= MAX_TOLD:
                    self._told.clear()
                self._told[key] = now + TELL_AGAIN
                _log.warning("registry_key_ignored", registry=self.url, key=key, reason=_WRONG_KEY)

    def _exchange(self, *commands: tuple[Any, ...], wait: float = 0.0) -> list[Any]:
        """Send the commands in one go and return their replies; `wait` is what the last may take beyond the timeout.

        A connection that was fine when it was last used and breaks now (the server restarted) is tried again once, on a
        new one; every command here may run twice. A refused or slow connection is not: it would only double the wait.
        """
        if self._closed:
            raise RegistryUnavailable(f"registry {self.url}: it was closed")
        for attempt in (1, 2):
            try:
                connection: Any = self._pool.get_connection()
            except (errors.RedisError, OSError) as error:
                raise self._unavailable(error) from error
            try:
                return _converse(connection, commands, wait and wait + self._timeout)
            except errors.NoScriptError:
                raise
            except (errors.ConnectionError, OSError) as error:
                if attempt == 2 or isinstance(error, (errors.AuthenticationError, errors.BusyLoadingError)):
                    raise self._unavailable(error) from error
            except errors.ResponseError as error:
                raise self._refused(str(error)) or self._unavailable(error) from error
            except errors.RedisError as error:
                raise self._unavailable(error) from error
            finally:
                if self._closed:
                    connection.disconnect()
                self._pool.release(connection)
        raise AssertionError("unreachable")

    def _refused(self, text: str) -> Exception | None:
        """What a script of ours says with an error, if it is one of ours."""
        if "SUPERSEDED" in text:
            return Superseded(f"this node was started again elsewhere ({text})")
        if "LATE call" in text:
            return _Late(text)
        if "POISONED" in text:
            key = text.rpartition("POISONED ")[2]
            fix = f'see that no other process has this node_id, then delete the key (redis-cli DEL "{key}")'
            return RegistryUnavailable(f"registry {self.url}: the key {key} holds no incarnation (below 2^32); {fix}")
        if "WRONGTYPE" in text:
            return _WrongType(f"registry {self.url}: {_reason(errors.ResponseError(text), self._timeout)}")
        return None

    def _unavailable(self, exc: Exception) -> RegistryUnavailable:
        self._clock = None  # what answers next may be another server
        return RegistryUnavailable(f"registry {self.url}: {_reason(exc, self._timeout)}")


def _converse(connection: Any, commands: tuple[tuple[Any, ...], ...], wait: float) -> list[Any]:
    """One exchange. A connection that is left in the middle of one is closed: its next reply would be another's."""
    replies: list[Any] = []
    failure: errors.ResponseError | None = None
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        if wait and not connection.can_read(wait):
            raise errors.TimeoutError("no reply to a blocking read")
        for _ in commands:
            try:
                replies.append(connection.read_response())
            except errors.ResponseError as error:
                failure = failure or error
    except BaseException:
        connection.disconnect()
        raise
    if failure is not None:
        if "READONLY" in str(failure):  # no longer the master: a new connection asks the sentinels again
            connection.disconnect()
            raise errors.ConnectionError(str(failure)) from failure
        raise failure
    return replies


#: What is wrong with a key that a script leaves alone, and what to do.
_WRONG_KEY = "it is of another type, or has nonsense in it: see who writes there (docs/registry.md), then delete it"
#: Errors of a server that answers reads and refuses writes, with what to do.
_REFUSED_WRITES = {
    "NOREPLICAS": "it takes no writes until enough replicas are connected: see min-replicas-to-write",
    "MISCONF": "it takes no writes because it can't save to disk: see its log, its disk and its save configuration",
    "WRONGTYPE": "a key " + _WRONG_KEY.removeprefix("it "),
}


def _reason(exc: Exception, timeout: float) -> str:
    """What went wrong, and what to do about it."""
    text = str(exc) or type(exc).__name__
    if isinstance(exc, errors.TimeoutError):
        return f"no answer within {timeout:g} s; see whether the server is overloaded or [registry] timeout too short"
    if isinstance(exc, errors.AuthenticationError):
        return f"{text}; give the right password in [registry] url, as redis://[user]:password@host:port"
    if isinstance(exc, errors.NoPermissionError):
        return f"{text}; the user's ACL must allow the commands and keys of docs/registry.md"
    if isinstance(exc, errors.OutOfMemoryError) or "OOM" in text:
        return f"{text}; raise the server's maxmemory"
    if isinstance(exc, errors.ReadOnlyError) or "READONLY" in text:
        return f"{text}; [registry] url must name the master, or the sentinels"
    for word, fix in _REFUSED_WRITES.items():
        if word in text:
            return f"{text}; {fix}"
    if isinstance(exc, errors.BusyLoadingError):
        return f"{text}; it answers once it has loaded its data"
    if isinstance(exc, (errors.ConnectionError, OSError)):
        return f"{text.rstrip('.')}; see whether the server runs and [registry] url is right"
    return f"{text}; the server refused a command (Redis 6.2 or later is needed)"


# ---------------------------------------------------------------------- names and values in Redis


@lru_cache(maxsize=4096)
def _quote(name: str) -> str:
    """A name as a part of a key: no ':', '/', '@', space or control character is left in it."""
    return name if _PLAIN(name) else quote(name, safe="")


def _quote_ip(ip: str) -> str:
    """An address as the last part of a key, so that ':' may stay."""
    return ip if _PLAIN(ip) else quote(ip, safe=":")


def _at(ip: str, port: int) -> str:
    return f"{_quote_ip(ip)}:{port}"


def _last(node: str, owner: str) -> str:
    return f"{_quote(node)}:{quote(owner, safe='/')}"


def _node(registration: Registration) -> str | None:
    """The node of its tuples and leases; None when it has none."""
    for entry in registration.tuples:
        return entry.node
    for lease in registration.leases:
        return lease.node
    return None


def _target(entry: Tuple) -> str:
    return f"{_quote(entry.namespace)}:{_quote_ip(entry.agent_ip)}"


def _field(entry: Tuple) -> str:
    return f"{_quote(entry.node)}/{entry.agent_port}"


def _lease_args(lease: PortLease) -> tuple[Any, ...]:
    return _at(lease.ip, lease.port), lease.owner, _last(lease.node, lease.owner), lease.epoch


def _said(registration: Registration) -> Iterator[tuple[PortLease, tuple[str, int]]]:
    """The leases, each with the exposed ports and their revision that are stored with it."""
    said = registration.exposes, registration.revision
    for lease in registration.leases:
        yield lease, said
        said = "", 0


def _static(entry: Tuple) -> bytes:
    """A tuple as it is stored: its epoch first (scripts read it there) and as a string, without what others set."""
    fields = msgspec.structs.asdict(entry)
    del fields["beat"], fields["exposes"]
    if not entry.host_id:
        del fields["host_id"], fields["agent_host"]  # nobody compares them then
    return _encode({"epoch": str(fields.pop("epoch")), **fields})


def _agent(entry: Tuple) -> bytes:
    """What this agent's stored tuples contain, and no other's: a quote inside of a value has a backslash before it."""
    return b',"agent_id":%s,' % _encode(entry.agent_id)


def _record(record: NodeRecord, *, incarnation: bool) -> bytes:
    fields = msgspec.structs.asdict(record)
    del fields["beat"]
    if not incarnation:
        del fields["incarnation"]
    return _encode(fields)


def _seconds(clock: list[bytes]) -> str:
    """The reply to TIME in seconds, to the millisecond."""
    return f"{int(clock[0])}.{int(clock[1]) // 1000:03d}"


def _sequence(entry: list[Any]) -> int:
    return int(entry[0].partition(b"-")[0])


def _rows(rows: Iterable[Any], read: Callable[[Any], _T]) -> Iterator[_T]:
    """What the rows say. One that can't be read is left out, and told: one bad writer must not blind every reader."""
    ignored, why = 0, ""
    for row in rows:
        try:
            yield read(row)
        except _NONSENSE as error:
            ignored, why = ignored + 1, str(error)
    if ignored:
        _log.warning("registry_rows_ignored", rows=ignored, text=why)


def _page_of(page: bytes) -> list[Tuple]:
    try:
        return [_checked(entry) for entry in _tuple.decode_lines(page)]  # half the time of one by one
    except _NONSENSE:
        return list(_rows(page.splitlines(), _read_tuple))


def _read_tuple(json: bytes) -> Tuple:
    return _checked(_tuple.decode(json))


def _checked(entry: Tuple) -> Tuple:
    """What msgspec can't check: a relay would fail at it when it dials."""
    _check_ip(entry.ps_ip)
    if entry.epoch >> 64:
        raise ValueError(f"epoch {entry.epoch} has more than 64 bits")
    return entry


@lru_cache(maxsize=4096)
def _check_ip(text: str) -> None:
    canonical_ip(text)


def _change(entry: list[Any]) -> Change:
    kind, json = entry
    of = _read_tuple(json)
    return Change(of.namespace, of.agent_ip, of.agent_port, of.node, of.epoch, of if kind == b"put" else None)


_Place = tuple[str, str, int, int]


def _place(entry: Tuple) -> _Place:
    """Which of a node's tuples it is, whatever is said in it."""
    return entry.namespace, entry.agent_ip, entry.agent_port, entry.epoch


class _Doubt(msgspec.Struct, frozen=True):
    """Parts of a session whose last write had no answer: it may have been made or not.

    `over`: they were to be removed. A beat that was put together before may still name them.
    """

    epoch: int
    tuples: dict[_Place, Tuple]
    leases: frozenset[PortLease]
    over: bool

    def without(self, there: set[object]) -> Registration:
        """The parts that are not there."""
        tuples = tuple(entry for place, entry in self.tuples.items() if place not in there)
        return Registration(self.epoch, tuples, tuple(lease for lease in self.leases if lease not in there))


class _Unsure:
    """The doubts of a client, by node and epoch. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doubts: dict[tuple[str, int], _Doubt] = {}

    def add(self, node: str, registration: Registration, *, over: bool) -> None:
        """Beside what is unsure of the same session; the oldest session makes room."""
        epoch = registration.epoch
        with self._lock:
            known = self._doubts.pop((node, epoch), None) or _Doubt(epoch, {}, frozenset(), False)
            if len(self._doubts) >= MAX_UNSURE:
                del self._doubts[next(iter(self._doubts))]
            tuples = known.tuples | {_place(entry): entry for entry in registration.tuples}
            leases = known.leases | set(registration.leases)
            self._doubts[node, epoch] = _Doubt(epoch, tuples, leases, over or known.over)

    def of(self, node: str) -> list[_Doubt]:
        """All of a node."""
        with self._lock:
            return [doubt for (name, _), doubt in self._doubts.items() if name == node]

    def settle(self, node: str, doubts: Iterable[_Doubt], there: set[object]) -> None:
        """They were seen to, but what was added meanwhile, or is over and was still there."""
        with self._lock:
            for doubt in doubts:
                key = (node, doubt.epoch)
                stays = doubt.over and not there.isdisjoint([*doubt.tuples, *doubt.leases])
                if self._doubts.get(key) is doubt and not stays:
                    del self._doubts[key]


def _batches(registrations: Iterable[Registration], most: int) -> Iterator[list[Registration]]:
    """About `most` tuples each; at least one batch, for the node's own heartbeat travels with it."""
    batch: list[Registration] = []
    size = 0
    for registration in registrations:
        if size >= most:
            yield batch
            batch, size = [], 0
        batch.append(registration)
        size += max(1, len(registration.tuples), len(registration.leases))
    yield batch


# ---------------------------------------------------------------------- URLs


def _pool(url: str, timeout: float) -> tuple[str, ConnectionPool, list[Any]]:
    """The URL without its password, a pool of connections for it, and the clients of the sentinels."""
    try:
        return _parse(url, timeout)
    except ValueError as error:
        # `from None`: the cause could quote the URL, and with it the password.
        raise ValueError(f"[registry] url: {error}; it looks like redis://:password@host:6379/0") from None


def _parse(url: str, timeout: float) -> tuple[str, ConnectionPool, list[Any]]:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"scheme {parts.scheme!r} is none of memory, {', '.join(_SCHEMES)}")
    options: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    common: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,  # the pool sees a closed connection by itself, a PING would double the wait
        "protocol": 2,
    }
    login, _, place = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    kwargs = common | {
        "username": unquote(user) or options.pop("username", None),
        "password": unquote(password) or options.pop("password", None),
    }
    shown = f"{parts.scheme}://{user + '@' if user else ''}{place}{parts.path}"
    if parts.scheme == "unix":
        return shown, _unix(parts.path, options, kwargs), []
    if parts.scheme == _SENTINEL:
        pool, sentinels = _sentinel(place, parts.path, options, common, kwargs)
        return shown, pool, sentinels
    kwargs["host"], kwargs["port"] = _host(place, 6379)
    kwargs["db"] = _db(parts.path.strip("/") or options.pop("db", ""))
    kind: type[Connection] = Connection
    if parts.scheme == "rediss":
        kind = SSLConnection
        kwargs |= {name: options.pop(name) for name in _TLS_OPTIONS if name in options}
        if "ssl_check_hostname" in kwargs:
            kwargs["ssl_check_hostname"] = kwargs["ssl_check_hostname"].lower() in ("1", "true", "yes")
    _no_more(options)
    return shown, ConnectionPool(connection_class=kind, **kwargs), []


def _unix(path: str, options: dict[str, Any], kwargs: dict[str, Any]) -> ConnectionPool:
    if not path.strip("/"):
        raise ValueError("unix:// needs the path of a socket, as unix:///run/redis.sock?db=0")
    kwargs |= {"path": unquote(path), "db": _db(options.pop("db", ""))}
    _no_more(options)
    return ConnectionPool(connection_class=UnixDomainSocketConnection, **kwargs)


def _sentinel(
    place: str, path: str, options: dict[str, Any], common: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[ConnectionPool, list[Any]]:
    service, _, db = path.strip("/").partition("/")
    if not service:
        raise ValueError(f"{_SENTINEL}:// needs the service, as {_SENTINEL}://host:26379,host:26379/mymaster/0")
    hosts = [_host(host, 26379) for host in place.split(",")]
    kwargs["db"] = _db(db)
    # They are asked one after the other: all of them together may take one timeout.
    patience = max(0.1, common["socket_timeout"] / len(hosts))
    asking = common | {"socket_timeout": patience, "socket_connect_timeout": patience}
    for name in ("username", "password"):
        if f"sentinel_{name}" in options:
            asking[name] = options.pop(f"sentinel_{name}")
    _no_more(options)
    untyped: Any = Sentinel
    manager = untyped(hosts, sentinel_kwargs=asking)
    untyped = SentinelConnectionPool
    return untyped(service, manager, **kwargs), list(manager.sentinels)


def _host(place: str, port: int) -> tuple[str, int]:
    found = urlsplit(f"//{place}")
    if not found.hostname:
        raise ValueError("a host is missing")
    return found.hostname, found.port or port


def _db(text: str) -> int:
    if text and not text.isdecimal():
        raise ValueError(f"database {text!r} is not a number")
    return int(text or 0)


def _no_more(options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"unknown option {', '.join(sorted(options))}")
