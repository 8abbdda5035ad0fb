"""The budget of what is held for streams: what it gives out, and when freed memory goes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rtunnel.relay.memory import TRIM_BYTES, Memory, trim


@given(st.integers(0, 1 << 32), st.lists(st.integers(0, 1 << 20), max_size=200))
def test_new_windows_never_use_up_the_budget(budget: int, wishes: list[int]) -> None:
    """Each gets no more than it wants, and half of the budget stays for those that grow."""
    memory, given_out = Memory(budget), 0
    for most in wishes:
        more = memory.widen(most)
        assert 0 <= more <= most
        given_out += more
        assert memory.left == budget - given_out >= budget // 2


def test_a_large_fall_is_told_once() -> None:
    """A trim takes milliseconds: it comes after so much was freed, and again only after as much."""
    memory = Memory(1 << 30)
    memory.hold(3 * TRIM_BYTES)
    assert not memory.fell()
    memory.release(TRIM_BYTES - 1)
    assert not memory.fell()
    memory.release(1)
    assert memory.fell() and not memory.fell()
    memory.hold(TRIM_BYTES // 2)
    memory.release(TRIM_BYTES // 2)
    assert not memory.fell()
    memory.release(2 * TRIM_BYTES)
    assert memory.fell() and memory.held == 0
    trim()


def test_more_than_the_budget_is_full() -> None:
    """Until less is held again."""
    memory = Memory(1000)
    memory.hold(1000)
    assert not memory.full
    memory.hold(1)
    assert memory.full
    memory.release(1)
    assert not memory.full
