"""Whose clock is wrong: by Dials that were refused, by the registry, and by those that went through."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtunnel.clock import EVIDENCE_SECONDS, TELL_AGAIN, ClockWatch, registry_offset
from rtunnel.errors import certificate_fault


class Scene:
    """One process; the registry's clock as it sees it, and what was logged."""

    def __init__(self, registry: float | None = None) -> None:
        self.registry = registry
        self.lines: list[dict[str, object]] = []
        self.clock = ClockWatch("this gateway", lambda event, fields: self.lines.append(fields), lambda: self.registry)


def test_the_registry_says_whose_clock_is_wrong() -> None:
    """Ours: not ready until it is right. The broker's: ready, and the log says whose."""
    scene = Scene(registry=-45.5)
    scene.clock.differs("broker b1", -45.04, 100.0)
    text = "clock: this gateway is 45.0 s behind broker b1, and Dials are refused as expired: set the clock (NTP)"
    assert scene.clock.reason(100.0) == text
    assert scene.clock.reason(100.0 + 10 * EVIDENCE_SECONDS) == text, "no Dial comes to one that is not ready"
    scene.registry = 0.2
    assert scene.clock.reason(101.0) == ""
    other = Scene(registry=0.0)
    other.clock.differs("broker b1", -45.0, 100.0)
    assert other.clock.reason(100.0) == ""
    assert [line["wrong"] for line in (*scene.lines, *other.lines)] == ["this gateway", "broker b1"]


def test_without_the_registry_a_peer_that_agrees_counts() -> None:
    scene = Scene()
    scene.clock.differs("broker b1", 31.0, 1000.0)
    assert "31.0 s ahead of broker b1" in scene.clock.reason(1000.0)
    scene.clock.agrees("broker b2", 1001.0)
    assert scene.clock.reason(1002.0) == "", "b1 is alone with its time"
    scene.clock.differs("broker b1", 31.0, 1001.0 + EVIDENCE_SECONDS)
    assert scene.clock.reason(1001.0 + EVIDENCE_SECONDS)
    assert scene.clock.reason(1001.0 + 2 * EVIDENCE_SECONDS) == "", "too long ago to say anything"
    scene.clock.agrees("broker b1", 2000.0)
    assert not scene.clock.suspicious
    assert scene.lines[0]["wrong"] == "unknown"


def test_a_broker_of_an_older_version_does_not_say_by_how_much() -> None:
    scene = Scene()
    scene.clock.differs("broker b1", None, 1000.0)
    assert "this gateway differs from broker b1" in scene.clock.reason(1000.0)


def test_differences_are_counted_and_told_now_and_then() -> None:
    scene = Scene()
    for number in range(100):
        scene.clock.differs("broker b1", 40.0, 1000.0 + number * TELL_AGAIN / 10)
    assert scene.clock.expired == 100
    assert [line["expired"] for line in scene.lines] == list(range(1, 100, 10))


@given(st.floats(-1000.0, 1000.0), st.lists(st.floats(0.0, 8.0), min_size=1), st.floats(1e9, 2e9))
def test_the_registrys_clock_is_read_from_heartbeats(offset: float, ages: list[float], registry: float) -> None:
    """Never more than the difference that there is, and at most one lifetime of a node less."""
    beats = [registry - age for age in ages]
    measured = registry_offset(beats, 8.0, registry + offset)
    assert measured is not None
    assert abs(measured) <= abs(offset) + 1e-3
    assert abs(measured - offset) <= 8.0 + 1e-3


def test_no_heartbeat_says_nothing() -> None:
    assert registry_offset([], 8.0, 1e9) is None
    assert registry_offset([0.0], 8.0, 1e9) is None


@pytest.mark.parametrize(("code", "mentions"), [(9, True), (10, True), (20, False)])
def test_a_certificate_that_is_not_valid_now_mentions_the_clock(code: int, mentions: bool) -> None:
    fault = ssl.SSLCertVerificationError()
    fault.verify_code, fault.verify_message = code, "certificate is somehow"
    assert certificate_fault(fault).startswith("certificate is somehow")
    assert ("clock" in certificate_fault(fault)) is mentions
