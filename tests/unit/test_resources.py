"""What a gateway runs out of: room for clients, and the addresses that it connects from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtunnel_socks import resources
from rtunnel_socks.resources import TELL_AGAIN, Room, Sources


class Scene:
    """A listener with clients in its queue, and a loop whose timers the test runs."""

    def __init__(self, room: int) -> None:
        self.now = 0.0
        self.timers: list[Callable[[], None]] = []
        self.taken = 0
        self.queue = 0
        self.held = False
        self.lines: list[dict[str, Any]] = []
        self.room = Room(self, lambda: self.taken, lambda event, **fields: self.lines.append(fields))  # type: ignore[arg-type]
        self.room.size = room
        self.room.listener = self  # type: ignore[assignment]

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.timers.append(call)

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        self.accept()

    def accept(self) -> None:
        while self.queue and not self.held:
            self.queue -= 1
            self.taken += 1
            self.room.check()

    def tick(self) -> None:
        self.now += 0.1
        timers, self.timers = self.timers, []
        for call in timers:
            call()


@given(st.integers(1, 5), st.lists(st.sampled_from(["come", "go", "tick"]), max_size=200))
def test_nobody_is_accepted_without_room_and_nobody_waits_with_it(size: int, steps: list[str]) -> None:
    scene = Scene(size)
    for step in steps:
        if step == "come":
            scene.queue += 1
            scene.accept()
        elif step == "go" and scene.taken:
            scene.taken -= 1
        elif step == "tick":
            scene.tick()
        assert scene.taken <= size
        assert len(scene.timers) <= 1
    scene.tick()
    assert not scene.queue or scene.taken == size


def test_it_is_said_now_and_then() -> None:
    scene = Scene(1)
    scene.taken = 1
    for _ in range(100):
        scene.room.check()
        scene.taken = 0
        scene.tick()
        scene.taken = 1
    assert len(scene.lines) == round(100 * 0.1 / TELL_AGAIN)
    assert scene.lines[0]["room"] == 1 and scene.lines[0]["descriptors"] == resources.descriptor_limit()


def test_connections_come_from_each_address_in_turn() -> None:
    """Of the family of the broker; the kernel chooses where there is none."""
    sources = Sources(["10.0.0.1", "fd00::1", "10.0.0.2"])
    assert sorted(sources.next("10.9.0.1") for _ in range(6)) == ["10.0.0.1"] * 3 + ["10.0.0.2"] * 3
    assert {sources.next("fd00::9") for _ in range(3)} == {"fd00::1"}
    assert Sources(["10.0.0.1"]).next("fd00::9") == ""


@pytest.mark.parametrize(("limit", "room"), [(20_000, 9_872), (100, 1)])
def test_room_comes_from_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch, limit: int, room: int) -> None:
    monkeypatch.setattr(resources, "descriptor_limit", lambda: limit)
    assert Room(Scene(1), lambda: 0, lambda event, **_: None).size == room  # type: ignore[arg-type]
