"""Events of the cluster: which log lines are published, how they wait, and how they are shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from rtunnel import cli_events, events, logs
from rtunnel.cli import cli
from rtunnel.errors import RegistryUnavailable
from rtunnel.events import MAX_QUEUED, MAX_WRITTEN, PUBLISHED, Outbox, publish
from rtunnel.registry.memory import MemoryRegistry
from support.redis_server import RedisServer
from support.registries import Store

ROOT = Path(__file__).parents[2]
LINE = {"time": "2027-01-15T08:00:00.000Z", "level": "info", "event": "session_opened", "agent": "a1"}


def line(event: str = "session_opened", **fields: object) -> dict[str, Any]:
    return LINE | {"event": event} | fields


def test_every_published_name_is_logged_somewhere() -> None:
    """A renamed line must not vanish from the cluster's events."""
    source = "".join(
        path.read_text() for room in ("rtunnel", "broker", "agent", "socks", "authority")
        for path in (ROOT / room).rglob("*.py") if path.name != "events.py"
    )  # fmt: skip
    logged = set(re.findall(r'"([a-z]+_[a-z_]+)"', source))
    assert PUBLISHED - logged == {"events_dropped"}  # of events.py itself
    assert not any(name.startswith(("stream_", "request_")) for name in PUBLISHED)  # too many of them


# The outbox.


def test_events_are_whole_and_in_order() -> None:
    """With role, name and version; what JSON does not know is text."""
    outbox = Outbox("broker", "b1")
    outbox.add(line(path=Path("/x"), addresses={"10.1.0.7"}))
    outbox.add(line("session_ended"))
    first, second = (json.loads(data) for data in outbox.take())
    assert first == {
        "v": 1, **LINE, "path": "/x", "addresses": ["10.1.0.7"], "role": "broker", "name": "b1",
    }  # fmt: skip
    assert second["event"] == "session_ended"
    assert outbox.take() == []


def test_a_full_outbox_drops_the_oldest_and_counts_them() -> None:
    """Also when events come back that could not be written."""
    outbox = Outbox("broker", "b1")
    for number in range(MAX_QUEUED + 10):
        outbox.add(line(number=number))
    assert (len(outbox), outbox.dropped) == (MAX_QUEUED, 10)
    taken = outbox.take()
    assert len(taken) == MAX_WRITTEN and json.loads(taken[0])["number"] == 10
    outbox.add(line(number=-1))
    outbox.put_back(taken)
    assert (len(outbox), outbox.dropped) == (MAX_QUEUED, 11)
    assert json.loads(outbox.take()[-1])["number"] == 10 + MAX_WRITTEN


def test_a_long_event_keeps_its_head() -> None:
    """A peer's text can't fill the registry."""
    outbox = Outbox("broker", "b1")
    outbox.add(line(reason="x" * 10_000))
    (data,) = outbox.take()
    assert len(data) < events.MAX_EVENT and json.loads(data)["event"] == "session_opened"


class Away(MemoryRegistry):
    """A registry that can't be reached until it is."""

    away = True
    tries = 0

    def publish(self, events: Any) -> None:
        self.tries += 1
        if self.away:
            raise RegistryUnavailable("gone")
        super().publish(events)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.002)


async def test_events_wait_for_the_registry() -> None:
    """None is lost while there is room, and the last ones are written at the end."""
    registry, outbox = Away(), Outbox("broker", "b1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, outbox, registry, 0.01)
        outbox.add(line(number=1))
        await until(lambda: registry.tries > 3)
        registry.away = False
        await until(lambda: bool(registry.events("0-0", 10)[1]))
        outbox.add(line(number=2))
        nursery.cancel_scope.cancel()
    assert [json.loads(event)["number"] for event in registry.events("0-0", 10)[1]] == [1, 2]


async def test_a_cancellation_between_two_steps_loses_nothing() -> None:
    """Events that were taken from the queue, and not given to the registry yet."""
    registry, outbox = MemoryRegistry(), Outbox("broker", "b1")
    outbox.add(line(number=1))
    with trio.CancelScope() as scope:
        take = outbox.take

        def taken() -> list[bytes]:
            scope.cancel()  # the next checkpoint is that of the registry's call
            return take()

        outbox.take = taken  # type: ignore[method-assign]
        await publish(outbox, registry, 0.0)
    assert [json.loads(event)["number"] for event in registry.events("0-0", 10)[1]] == [1]


def test_a_line_that_is_tapped_is_written_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only lines with the names are given on; a fault of the taker is nobody's."""
    monkeypatch.setattr(logs, "_tap", None)
    monkeypatch.setattr(logs, "_tapped", frozenset())
    process: Any = logs.event_line(logs.render_json)
    taken: list[Any] = []
    logs.tap(frozenset({"session_opened"}), taken.append)
    for name in ("session_opened", "stream_ended"):
        assert json.loads(process(None, "info", {"event": name}))["event"] == name
    assert json.loads(process(None, "info", {"event": ["no name"]}))["event"] == ["no name"]
    assert [fields["event"] for fields in taken] == ["session_opened"]
    logs.tap(frozenset({"session_opened"}), lambda fields: 1 // 0)  # type: ignore[arg-type]
    assert json.loads(process(None, "info", {"event": "session_opened"}))["event"] == "session_opened"


def test_ecs_lines_have_the_names_of_the_schema() -> None:
    """No field is lost: a second source, and what the schema does not know, keep their own names."""
    fields = line(
        "stream_ended", client="10.9.0.4", peer="10.9.0.5", user="alice", target="10.1.0.7:22", code="accepted",
        bytes_up=3, bytes_down=4, seconds=0.25, reason="closed", node="b1", pid=7,
    )  # fmt: skip
    assert json.loads(logs.render_ecs(fields)) == {
        "ecs.version": "8.11.0", "service.name": "rtunnel", "@timestamp": LINE["time"], "log.level": "info",
        "event.action": "stream_ended", "rtunnel.agent": "a1", "source.ip": "10.9.0.4", "rtunnel.peer": "10.9.0.5",
        "user.name": "alice", "destination.address": "10.1.0.7:22", "event.code": "accepted", "source.bytes": 3,
        "destination.bytes": 4, "event.duration": 250_000_000, "event.reason": "closed", "rtunnel.node": "b1",
        "process.pid": 7,
    }  # fmt: skip
    assert b"\n" not in logs.render_ecs(line(reason="a\nb"))[:-1]


def test_the_page_lists_the_events_that_are_published() -> None:
    """Each name once."""
    page = (ROOT / "docs/events.md").read_text().split("## Names")[1]
    listed = re.findall(r"`([a-z]+_[a-z_]+)`", page)
    assert sorted(listed) == sorted(PUBLISHED)


# The registry's stream; Store: the registry in memory, and a real Redis.


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Any:
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None
    opened = Store(server)
    yield opened
    opened.close()


def test_events_are_read_page_by_page(store: Store) -> None:
    """From a cursor on, also from one in the past."""
    registry = store.open()
    assert registry.events("0-0", 10) == ("0-0", [])
    registry.publish([b"1", b"2", b"3"])
    cursor, page = registry.events("0-0", 2)
    assert page == [b"1", b"2"]
    cursor, page = registry.events(cursor, 2)
    assert page == [b"3"]
    assert registry.events(cursor, 2) == (cursor, [])
    registry.publish([b"4"])
    assert registry.events(cursor, 2)[1] == [b"4"]
    assert registry.events(cli_events.first_cursor("1h", registry.now()), 10)[1] == [b"1", b"2", b"3", b"4"]


# The command.


def test_the_command_shows_what_is_asked_for(redis_server: RedisServer) -> None:
    """By agent, node, target with and without port, code and event; foreign entries are passed over."""
    outbox = Outbox("broker", "b1")
    outbox.add(line(addresses=["10.1.0.7"]))
    outbox.add(line("session_ended", cause="silent", reason="no sign\nof life"))
    outbox.add(line("trace_ended", agent="", target="10.1.0.7:22", code="unknown_target"))
    store = Store(redis_server)
    store.open().publish([*outbox.take(), b"no json", b"[1]"])
    url = redis_server.url

    def shown(*options: str) -> list[str]:
        done = CliRunner().invoke(cli, ["events", "--registry-url", url, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output.splitlines()

    assert len(shown()) == 3
    (ended,) = shown("--event", "session_ended")
    assert ended.startswith("2027-01-15 08:00:00.000 info") and 'cause=silent reason="no sign\\nof life"' in ended
    assert len(shown("--agent", "a1")) == 2 and len(shown("--node", "b1")) == 3 and shown("--node", "b2") == []
    for target in ("10.1.0.7", "10.1.0.7:22"):
        assert len(shown("--target", target)) == 1
    assert shown("--target", "10.1.0.7:23") == []
    assert len(shown("--code", "silent")) == 1
    assert [json.loads(text)["event"] for text in shown("--json", "--code", "unknown_target")] == ["trace_ended"]
    assert len(shown("--since", "10m")) == 3
    done = CliRunner().invoke(cli, ["events", "--registry-url", url, "--since", "soon"])
    assert done.exit_code == 2 and "is not a duration" in done.output
    store.close()
