"""Links that are dialled beside each other."""

from __future__ import annotations

import trio
import trio.testing

from rtunnel_agent.race import MAX_BESIDE, SILENCE, Entrant, Race


async def test_silence_is_time_for_another_one(autojump_clock: trio.testing.MockClock) -> None:
    """Nothing for SILENCE seconds is None; so it goes on until the race is full."""
    race = Race[Entrant]()
    for number in range(MAX_BESIDE):
        assert not race.full
        race.add(Entrant(), lambda: None)
        began = trio.current_time()
        assert await race.next() is None
        assert trio.current_time() - began == SILENCE
        assert len(race) == number + 1
    assert race.full


async def test_each_entrant_is_told_of_once_and_in_order() -> None:
    """One whose link is up and then ends is one piece of news; those that are not in the race are none."""
    race = Race[Entrant]()
    first, second = Entrant(), Entrant()
    race.add(first, lambda: None)
    race.add(second, lambda: None)
    second.tell()
    first.settle()
    second.settle()
    assert [await race.next(), await race.next()] == [second, first]
    second.tell()
    assert len(race) == 0 and not race.full


async def test_what_is_left_over_is_ended_once() -> None:
    """The winner is not; the others are, and have no news any more."""
    race = Race[Entrant]()
    ended: list[str] = []
    winner, loser = Entrant(), Entrant()
    race.add(winner, lambda: ended.append("winner"))
    race.add(loser, lambda: ended.append("loser"))
    winner.tell()
    assert await race.next() is winner
    race.end()
    race.end()
    loser.settle()
    assert ended == ["loser"]
