"""The times of registry calls, by call and result."""

from __future__ import annotations

import pytest

from rtunnel.bridge import Bridge
from rtunnel.errors import RegistryUnavailable
from rtunnel.relay.relay import Relay


async def test_registry_calls_are_timed_by_call_and_result() -> None:
    """Also the ones that fail: without an answer, and with another error."""
    bridge = Bridge(Relay(lambda event, fields: None))

    def lookup(failure: Exception | None) -> str:
        if failure is not None:
            raise failure
        return "a tuple"

    assert await bridge.registry(lookup, None) == "a tuple"
    assert await bridge.registry_tries(lookup, RegistryUnavailable("away")) is None
    with pytest.raises(ValueError, match="taken"):
        await bridge.registry(lookup, ValueError("taken"))
    times = dict(bridge.registry_calls.items())
    assert set(times) == {("lookup", "ok"), ("lookup", "unavailable"), ("lookup", "refused")}
    assert all(sum(each.counts) == 1 and each.seconds > 0 for each in times.values())
