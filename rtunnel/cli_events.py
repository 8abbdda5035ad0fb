"""The command `rtunnel events`: reads the cluster's events from the registry."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
import msgspec

from rtunnel.console import Failure
from rtunnel.errors import EXIT_USAGE
from rtunnel.logs import render_console
from rtunnel.registry import Registry

#: Events of one read.
PAGE: Final = 500
#: Seconds between two reads with --follow.
FOLLOW_SECONDS: Final = 0.5
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
#: Fields in which an option looks for its value.
FIELDS: Final = {
    "agent": ("agent",),
    "node": ("node", "broker", "name"),
    "target": ("target",),
    "code": ("code", "cause"),
    "event": ("event",),
}


def show(registry: Registry, wanted: Mapping[str, str], since: str, *, follow: bool, as_json: bool) -> None:
    """Print the events that have all `wanted` values (by FIELDS), the oldest first."""
    cursor = first_cursor(since, registry.now() if since else 0.0)
    while True:
        after, events = registry.events(cursor, PAGE)
        for event in _readable(events):
            if matches(event, wanted):
                click.echo(msgspec.json.encode(event) if as_json else _line(event))
        if len(events) < PAGE:
            if not follow:
                return
            time.sleep(FOLLOW_SECONDS)
        cursor = after


def first_cursor(since: str, now: float) -> str:
    """Return the cursor for --since ("": all events): a duration such as 10m before `now`. Raises
    Failure.
    """
    if not since:
        return "0-0"
    found = re.fullmatch(r"(\d{1,6})([smhd])", since)
    if not found:
        raise Failure(f"--since: {since!r} is not a duration: write it like 30s, 10m, 24h or 7d", EXIT_USAGE)
    return f"{max(0, int((now - int(found[1]) * _UNITS[found[2]]) * 1000))}-0"


def matches(event: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Return whether an event has each wanted value; a target also without its port."""
    return all(
        any(_is(str(event.get(field, "")), value, option) for field in FIELDS[option])
        for option, value in wanted.items()
    )


def _is(found: str, value: str, option: str) -> bool:
    return found == value or (option == "target" and found.rpartition(":")[0].strip("[]") == value)


def _readable(events: list[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the events that are JSON objects; another program may have written others."""
    for data in events:
        try:
            event = msgspec.json.decode(data)
        except msgspec.DecodeError:
            continue
        if isinstance(event, dict):
            yield event


def _line(event: Mapping[str, Any]) -> str:
    head = {key: event.get(key, "") for key in ("time", "level", "event", "role", "name")}
    rest = {key: value for key, value in event.items() if key not in head and key not in ("v", "component")}
    day = str(head["time"])[:10]
    return f"{day} " + render_console({**head, **rest}).decode().rstrip("\n")
