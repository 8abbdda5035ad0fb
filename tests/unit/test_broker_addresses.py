"""Which broker address the agent dials next."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from rtunnel.logs import get_logger
from rtunnel_agent import brokers
from rtunnel_agent.brokers import MAX_ADDRESSES, Address, AddressQueue, Brokers
from support.effort import times
from support.logs import named

_ADDRESSES = st.lists(st.integers(1, 9).map(lambda n: (f"10.0.0.{n}", 7000)), min_size=1, max_size=6, unique=True)


@settings(max_examples=times(40))
@given(st.lists(_ADDRESSES, min_size=1, max_size=4), st.integers(), st.data())
def test_every_address_is_dialled_however_the_resolver_rotates(
    answers: list[list[Address]], seed: int, data: st.DataObject
) -> None:
    """Of N addresses each is among any N dials, whatever order each answer has, and whichever lookups fail."""
    queue = AddressQueue(random.Random(seed))
    names = [(f"vip{number}", 7000) for number in range(len(answers))]
    for name, answer in zip(names, answers, strict=True):
        queue.put(name, answer)
    known = {address for answer in answers for address in answer}
    dialled: list[Address] = []
    for _ in range(3 * len(known)):
        for name, answer in zip(names, answers, strict=True):
            if data.draw(st.booleans()):
                turn = data.draw(st.integers(0, len(answer) - 1))
                queue.put(name, answer[turn:] + answer[:turn])
        taken = queue.take()
        assert taken is not None
        dialled.append(taken)
        if len(dialled) >= len(known):
            assert set(dialled[-len(known) :]) == known


@settings(max_examples=times(40))
@given(st.lists(_ADDRESSES, min_size=1, max_size=40), st.integers())
def test_an_address_that_stays_is_dialled_although_others_come_and_go(answers: list[list[Address]], seed: int) -> None:
    """New addresses do not push in: what is known for as many dials as there are addresses is dialled."""
    queue = AddressQueue(random.Random(seed))
    stays = ("10.0.1.1", 7000)
    waited = 0
    for answer in answers:
        queue.put(("vip", 7000), [*answer, stays])
        waited = 0 if queue.take() == stays else waited + 1
        assert waited <= 9  # no more others exist


def test_an_address_that_is_gone_is_not_dialled() -> None:
    """The newest answer counts, unless it is empty; the queue is bounded."""
    queue = AddressQueue(random.Random(0))
    assert queue.take() is None
    queue.put(("vip", 7000), [("10.0.0.1", 7000)])
    queue.put(("vip", 7000), [("10.0.0.2", 7000)])
    queue.put(("vip", 7000), [])
    assert [queue.take(), queue.take()] == [("10.0.0.2", 7000)] * 2
    queue.put(("vip", 7000), [("10.0.0.1", port) for port in range(1, 1000)])
    assert len(queue) == MAX_ADDRESSES


class Resolver:
    """Answers as it is told: `answer` None is silence."""

    def __init__(self, *answer: Address) -> None:
        self.answer: list[Address] | OSError | None = list(answer)
        self.asked = 0
        self.end = threading.Event()

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked += 1
        if self.answer is None:
            self.end.wait()
            return []
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


@asynccontextmanager
async def running(resolver: Resolver, *entries: str) -> AsyncIterator[Brokers]:
    """Brokers with this resolver."""
    found = Brokers(entries, get_logger("agent").bind(), resolver)
    async with trio.open_nursery() as nursery:
        await nursery.start(found.run)
        try:
            yield found
        finally:
            nursery.cancel_scope.cancel()
            resolver.end.set()


async def test_a_resolver_that_falls_silent_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last answer counts, one lookup is under way at most, and later dials do not wait for it."""
    monkeypatch.setattr(brokers, "RESOLVER_PATIENCE", 0.05)
    resolver = Resolver(("10.0.0.1", 7000), ("10.0.0.2", 7000))
    async with running(resolver, "vip:7000") as found:
        first = await found.next()
        resolver.answer = None
        assert {first, await found.next()} == {("10.0.0.1", 7000), ("10.0.0.2", 7000)}
        monkeypatch.setattr(brokers, "RESOLVER_PATIENCE", 0.0)
        for _ in range(4):
            await found.next()
        assert resolver.asked == 2


async def test_a_resolver_that_fails_is_done_without() -> None:
    """The last answer counts; the log says once that it is an old one."""
    resolver = Resolver(("10.0.0.1", 7000))
    with capture_logs() as events:
        async with running(resolver, "vip:7000") as found:
            await found.next()
            resolver.answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            assert [await found.next(), await found.next()] == [("10.0.0.1", 7000)] * 2
    (told,) = named(events, "broker_lookup_failed")
    assert told["broker"] == "vip:7000" and told["reason"] == "Name or service not known"


async def test_a_name_that_was_never_resolved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address at all: the error says of which broker, and why. An address among the entries needs no resolver."""
    resolver = Resolver()
    resolver.answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    async with running(resolver, "vip:7000") as found:
        with pytest.raises(OSError, match="can't resolve broker vip: Name or service not known"):
            await found.next()
        monkeypatch.setattr(brokers, "RESOLVER_PATIENCE", 0.0)
        monkeypatch.setattr(brokers, "RESOLVER_DEADLINE", 0.02)
        resolver.answer = None
        with pytest.raises(OSError, match=r"can't resolve broker vip: the resolver has not answered for 0\.02 s"):
            await found.next()
    silent = Resolver()
    silent.answer = None
    async with running(silent, "vip:7000", "10.0.0.9:7000", "[fd00::9]:7000") as found:
        assert {await found.next(), await found.next()} == {("10.0.0.9", 7000), ("fd00::9", 7000)}
