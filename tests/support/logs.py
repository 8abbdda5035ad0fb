"""What the parts of a test logged."""

from __future__ import annotations

from typing import Any

Events = list[Any]  # captured log lines


def named(events: Events, event: str) -> Events:
    """The lines of one event, so far."""
    return [line for line in events if line["event"] == event]
