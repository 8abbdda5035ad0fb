"""Limits of sources and users: what they count, when they refuse, and that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtunnel.config import LimitsConfig
from rtunnel.net import source_of
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_socks import limits as module
from rtunnel_socks.limits import Limits


def passes(charge: Callable[[str, float], None], key: str, now: float) -> bool:
    """Whether the charge is taken."""
    try:
        charge(key, now)
    except Refused:
        return False
    return True


def test_a_bucket_refills() -> None:
    """Ten a second, twenty at once; then one each tenth of a second."""
    charge = Limits(LimitsConfig(source_rate=10)).charge_request
    assert [passes(charge, "10.0.0.1", 0.0) for _ in range(21)] == [True] * 20 + [False]
    with pytest.raises(Refused, match=r"source 10\.0\.0\.1 opens more than 10 connections per second") as caught:
        charge("10.0.0.1", 0.05)
    assert caught.value.code is Refusal.RATE_LIMITED
    charge("10.0.0.2", 0.05)
    charge("10.0.0.1", 0.11)
    assert not passes(charge, "10.0.0.1", 0.11)
    assert [passes(charge, "10.0.0.1", 100.0) for _ in range(21)] == [True] * 20 + [False]


@given(st.lists(st.floats(0, 5), max_size=60), st.floats(0.1, 20))
def test_a_rate_is_never_exceeded(times: list[float], rate: float) -> None:
    """In any stretch of time no more pass than the burst and what flowed in meanwhile."""
    limits = Limits(LimitsConfig(user_rate=rate))
    passed = [now for now in sorted(times) if passes(limits.charge_user, "alice", now)]
    burst = max(1.0, rate * module.BURST_SECONDS)
    for first, begin in enumerate(passed):
        for last, end in enumerate(passed[first:], first):
            assert last - first + 1 <= burst + (end - begin) * rate + 1e-6


def test_zero_is_no_limit_and_no_memory() -> None:
    """Nothing is refused, and nothing is kept of a source or user that holds nothing."""
    limits, permits = Limits(LimitsConfig(source_handshakes=0)), []
    for _ in range(1000):
        permits.append(limits.acquire_client("10.0.0.1", 0.0))
        limits.charge_request("10.0.0.1", 0.0)
        limits.charge_user("alice", 0.0)
        permits.append(limits.acquire_stream("10.0.0.1", "alice", 0.0))
    assert limits.known == 2
    for permit in permits:
        permit.release(0.0)
    assert limits.known == 0


def test_streams_are_counted_for_source_and_user() -> None:
    """A refusal by one takes nothing from the other."""
    limits = Limits(LimitsConfig(source_streams=2, user_streams=1))
    first = limits.acquire_stream("10.0.0.1", "alice", 0.0)
    with pytest.raises(Refused, match="user alice has 1 streams already") as caught:
        limits.acquire_stream("10.0.0.1", "alice", 0.0)
    assert caught.value.code is Refusal.TOO_MANY_STREAMS
    limits.acquire_stream("10.0.0.1", None, 0.0)
    with pytest.raises(Refused, match=r"source 10\.0\.0\.1 has 2 streams already"):
        limits.acquire_stream("10.0.0.1", "bob", 0.0)
    first.release(0.0)
    limits.acquire_stream("10.0.0.1", "alice", 0.0)


def test_clients_are_counted_and_come_back() -> None:
    """Those of one source, until they are streams or over."""
    limits = Limits(LimitsConfig(source_handshakes=2))
    first, _ = limits.acquire_client("10.0.0.1", 0.0), limits.acquire_client("10.0.0.1", 0.0)
    with pytest.raises(Refused) as caught:
        limits.acquire_client("10.0.0.1", 0.0)
    assert caught.value.code is Refusal.TOO_MANY_HANDSHAKES
    limits.acquire_client("10.0.0.2", 0.0)
    for _ in range(2):  # the second time it is given back already
        first.release(0.0)
    limits.acquire_client("10.0.0.1", 0.0)
    with pytest.raises(Refused):
        limits.acquire_client("10.0.0.1", 0.0)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sources that come once: those whose bucket is full again are forgotten, and the oldest of the others."""
    limits = Limits(LimitsConfig(source_rate=1))
    most = 0
    for n in range(20_000):
        limits.charge_request(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", n / 1000)  # 1000 a second
        most = max(most, limits.known)
    assert most < 5000
    monkeypatch.setattr(module, "MAX_IDLE", 1500)
    slow = Limits(LimitsConfig(source_rate=0.0001))
    permit = slow.acquire_client("192.0.2.1", 0.0)  # it holds something, so it stays
    for n in range(20_000):
        slow.charge_request(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", n / 1000)
        most = max(most, slow.known)
    assert most < 5000
    known = slow.known
    permit.release(20.0)
    assert slow.known == known - 1


def test_a_source_is_an_address_or_a_64() -> None:
    """Who has one address of a /64 has them all."""
    assert source_of("10.0.0.1") == "10.0.0.1"
    assert source_of("fd00:1:2:3:4:5:6:7") == source_of("fd00:1:2:3::9") == "fd00:1:2:3::/64"
    assert source_of("fd00:1:2:4::9") != source_of("fd00:1:2:3::9")
