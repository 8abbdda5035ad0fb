"""Refusals of clients that a trace can't meet by itself."""

from __future__ import annotations

from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks.recent import MAX_REMEMBERED, MAX_TOLD, RECENT_SECONDS, Recent


def test_the_newest_refusals_of_one_client_are_told_with_their_ages() -> None:
    """Of this source and user only, and only those that depend on the client."""
    recent = Recent()
    recent.add("10.9.0.4", "alice", Refused(Refusal.BAD_CREDENTIALS, "no"), 100.0)
    recent.add("10.9.0.4", "alice", Refused(Refusal.RATE_LIMITED), 103.0)
    recent.add("10.9.0.4", "alice", Refused(Refusal.TARGET_REFUSED), 104.0)
    recent.add("10.9.0.4", "bob", Refused(Refusal.BAD_CREDENTIALS), 104.0)
    recent.add("10.9.0.5", "alice", Refused(Refusal.BAD_CREDENTIALS), 104.0)
    assert [(told.code, told.at) for told in recent.of("10.9.0.4", "alice", 105.0)] == [
        ("rate_limited", 2.0), ("bad_credentials", 5.0),
    ]  # fmt: skip
    assert [told.code for told in recent.of("10.9.0.4", "alice", 100.5 + RECENT_SECONDS)] == ["rate_limited"]


def test_what_is_remembered_and_told_is_bounded() -> None:
    recent = Recent()
    for number in range(MAX_REMEMBERED):
        recent.add("10.9.0.4", "alice", Refused(Refusal.BAD_CREDENTIALS), float(number) / 1000)
    assert len(recent.of("10.9.0.4", "alice", 1.0)) == MAX_TOLD
    for _ in range(MAX_REMEMBERED):
        recent.add("10.9.0.5", "", Refused(Refusal.BAD_CREDENTIALS), 1.0)
    assert not recent.of("10.9.0.4", "alice", 1.0)
