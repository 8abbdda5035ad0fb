"""How soon an agent dials again after a session: pure time, no socket."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from rtunnel.config import load
from rtunnel.relay.lost import closed
from rtunnel.trust import pki
from rtunnel.wire.messages import Welcome
from rtunnel_agent import agent as module
from rtunnel_agent.agent import STABLE, Agent, Slot
from rtunnel_agent.handshake import AgentSession
from rtunnel_agent.race import Outcome, Watch

CAP = 30.0
#: Dials of a loop that never pauses: the test must end.
TOO_MANY = 2000


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent with one slot, whose pauses are as long as the jitter allows."""
    monkeypatch.setattr("rtunnel_agent.agent.random.uniform", lambda least, most: most)
    pki.init(tmp_path / "pki")
    keys = {
        "agent.brokers": ["127.0.0.1:7000"],
        "agent.agent_id": "a1",
        "agent.addresses": ["127.1.0.1"],
        "agent.exposes": ["9100"],
        "agent.security": "plain",
        "agent.join_token": str(tmp_path / "pki" / "join.token"),
        "agent.redundancy": 1,
        "agent.backoff_cap": CAP,
    }
    return Agent(load(None, {}, keys))


async def dials(agent: Agent, monkeypatch: pytest.MonkeyPatch, lasts: float, seconds: float) -> list[float]:
    """When the slot dials within `seconds`, each session being up for `lasts` seconds."""
    times: list[float] = []

    async def dial(slot: Slot) -> Watch:
        times.append(trio.current_time())
        if len(times) > TOO_MANY:
            raise AssertionError("the slot dials without a pause")
        welcome = Welcome(node="b1", host="h1", epoch=1, ip="127.0.0.1", port=20000, heartbeat=5.0)
        session = types.SimpleNamespace(node="b1", epoch="1", link=None, welcome=welcome)
        watch = Watch(outcome=Outcome(cast(AgentSession, session)))

        async def over() -> None:
            await trio.sleep(lasts)
            watch.outcome = Outcome(lost=closed("replaced"))
            watch.down.set()
            watch.retire.set()

        nursery.start_soon(over)
        return watch

    monkeypatch.setattr(agent, "_dial", dial)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(seconds):
            await agent._keep(agent.slots[0])
        nursery.cancel_scope.cancel()
    return times


async def test_short_sessions_are_followed_by_growing_pauses(
    autojump_clock: trio.testing.MockClock, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that ends at once doubles the pause up to backoff_cap: 10 minutes are no 1000 dials but some 25."""
    times = await dials(agent, monkeypatch, lasts=0.0, seconds=600.0)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[:8] == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 16, CAP], rel=1e-3)
    assert pauses[8:] == pytest.approx([CAP] * len(pauses[8:]), rel=1e-3)


async def test_a_long_session_is_followed_by_no_pause(
    autojump_clock: trio.testing.MockClock, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STABLE is measured by the monotonic clock: a wall clock that stands still changes nothing."""
    monkeypatch.setattr("rtunnel_agent.agent.time.time", lambda: 1000.0)
    agent.slots[0].backoff = CAP  # as after many failures
    times = await dials(agent, monkeypatch, lasts=STABLE + 1, seconds=600.0)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([STABLE + 1] * len(pauses), rel=1e-3)
    assert agent.slots[0].backoff == module.BACKOFF_FIRST
