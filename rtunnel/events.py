"""Cluster events: log lines that say what happened to the cluster, for all to read in one place.

A process with a registry publishes the lines whose names are in PUBLISHED to a stream of the
registry. That stream keeps the newest EVENTS_LENGTH events, in their order. `rtunnel events` shows
it. A line is queued when it is logged, and one task writes the queue every second; while the
registry is away, the newest MAX_QUEUED wait and the others are dropped and counted. To publish
never blocks, and never fails a log line.

An event is a JSON object: `v` (the version of this schema), `time`, `level`, `event`, `role`,
`name` (of the node or the gateway), and the fields of the log line.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import trio

from rtunnel.api import BadRequest
from rtunnel.errors import RegistryUnavailable
from rtunnel.logs import get_logger, plain
from rtunnel.registry import Registry

VERSION: Final = 1
#: The names of log lines that are published: rare ones, none for each stream. Refused clients and
#: ended streams stay in the gateway's log.
PUBLISHED: Final = frozenset({
    "role_started", "stop_requested", "process_stopped", "drain_started", "lame_duck_started", "broker_stopped",
    "gateway_stopped", "worker_died", "worker_not_started", "node_superseded",
    "session_opened", "session_ended", "session_refused", "session_replaced", "session_revoked", "agent_doubted",
    "agent_duplicated", "agent_enrolled", "open_port_not_granted",
    "registry_unavailable", "registry_reached", "registry_followed", "heartbeats_lost", "heartbeats_returned",
    "tuples_restored", "events_dropped",
    "clock_difference_found", "proof_failed", "trust_list_taken", "trust_loaded", "trust_rejected",
    "trace_ended", "api_request_denied", "api_token_rejected", "accept_paused", "client_shut_out",
    "clients_held_back", "relay_crashed",
})  # fmt: skip
#: Events that wait for the registry; a storm of sessions makes some thousands at once.
MAX_QUEUED: Final = 4096
#: Events of one write: with 500 bytes each, 1 ms of Redis.
MAX_WRITTEN: Final = 256
#: Bytes of one event; the fields of a longer one are left out.
MAX_EVENT: Final = 4096
#: Seconds between two writes.
PAUSE: Final = 1.0

#: Events of one answer of the API.
MAX_PAGE: Final = 1000
#: The parameters of GET /v1/events.
QUERY: Final = {"after": "the cursor `next` of the answer before; default: the oldest", "most": "how many, up to 1000"}

_encode = msgspec.json.Encoder(enc_hook=str).encode


class Outbox:
    """The events of one process that are not written yet. Any thread may `add`."""

    def __init__(self, role: str, name: str) -> None:
        self.dropped = 0
        self._common = {"role": role, "name": name}
        self._queue: deque[bytes] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, line: Mapping[str, Any]) -> None:
        """Queue a log line; with MAX_QUEUED of them the oldest is dropped."""
        event = {"v": VERSION, **line, **self._common}
        data = _encode({key: plain(value) for key, value in event.items()})
        if len(data) > MAX_EVENT:
            data = _encode({key: event[key] for key in ("v", "time", "level", "event", "role", "name")})
        with self._lock:
            if len(self._queue) >= MAX_QUEUED:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(data)

    def take(self) -> list[bytes]:
        """Remove and return up to MAX_WRITTEN events, the oldest first."""
        with self._lock:
            return [self._queue.popleft() for _ in range(min(MAX_WRITTEN, len(self._queue)))]

    def put_back(self, events: Sequence[bytes]) -> None:
        """Put events back that could not be written, as far as there is room."""
        with self._lock:
            room = max(0, MAX_QUEUED - len(self._queue))
            self.dropped += max(0, len(events) - room)
            self._queue.extendleft(list(events)[::-1][:room])


async def publish(outbox: Outbox, registry: Registry, pause: float = PAUSE) -> None:
    """Write the events of `outbox` to the registry, until cancelled, and then what is left."""
    log = get_logger("events")
    told = 0
    try:
        while True:
            await trio.sleep(pause)
            while events := outbox.take():
                try:
                    await trio.to_thread.run_sync(registry.publish, events)
                except RegistryUnavailable:
                    outbox.put_back(events)
                    break
                except trio.Cancelled:  # before the call
                    outbox.put_back(events)
                    raise
                if outbox.dropped != told:
                    log.warning("events_dropped", count=outbox.dropped - told)
                    told = outbox.dropped
    finally:
        with trio.CancelScope(shield=True):
            try:
                if events := outbox.take():
                    await trio.to_thread.run_sync(registry.publish, events)
            except RegistryUnavailable:
                pass  # the process ends: its log has them


class Page(msgspec.Struct, frozen=True):
    """The answer of GET /v1/events: events, the oldest first, and the cursor of the next page."""

    events: list[msgspec.Raw]
    next: str


Ask = Callable[[Callable[[], tuple[str, list[bytes]]]], Awaitable[tuple[str, list[bytes]]]]


async def read(registry: Registry, query: Mapping[str, str], ask: Ask) -> Page:
    """Return a page of events for the parameters of QUERY; `ask` runs a call of the registry.

    Raises BadRequest, also when the registry does not answer.
    """
    after, most = query.get("after", "0-0"), number(query.get("most", "100"), MAX_PAGE)
    if not re.fullmatch(r"\d{1,15}-\d{1,9}", after):
        raise BadRequest(f"after is a cursor of this API, and not {after!r}")
    try:
        cursor, found = await ask(lambda: registry.events(after, most))
    except RegistryUnavailable as error:
        raise BadRequest(f"the registry does not answer: {error}") from None
    return Page([msgspec.Raw(event) for event in found if _is_event(event)], cursor)


def _is_event(data: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(data), dict)
    except msgspec.DecodeError:
        return False


def number(text: str, most: int) -> int:
    """Return the value of a parameter `most`, from 1 to `most`. Raises BadRequest."""
    if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= most:
        raise BadRequest(f"most is a number from 1 to {most}, and not {text!r}")
    return int(text)
