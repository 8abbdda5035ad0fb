"""When dials are hedged: the times of paths, the budget, and whole dials over brokers that answer when they like."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtunnel.config import GatewayConfig
from rtunnel.registry import Tuple
from rtunnel.wire.messages import Dialling, Refuse, encode
from rtunnel.wire.refusal import Refusal
from rtunnel_socks import hedge
from rtunnel_socks.dial import Paths, Target, TargetDial
from rtunnel_socks.hedge import BURST, LEAST_DELAY, MOST_DELAY, WINDOW, Hedging

PATH = ("b1", 1)
FIRST = 0.25
seconds = st.floats(0.0, 20.0)


@given(st.lists(seconds, max_size=5 * WINDOW))
def test_the_delay_is_twice_the_95th_percentile_of_the_last_answers(answers: list[float]) -> None:
    """Of the last whole window; bounded on both sides; an unmeasured path has the configured one at least."""
    hedging = Hedging(FIRST)
    for answer in answers:
        hedging.answered(PATH, answer)
    delay = hedging.delay(PATH)
    whole = len(answers) // WINDOW * WINDOW
    if not whole:
        assert max(FIRST, min(2 * max(answers, default=0.0), MOST_DELAY)) == delay
        return
    window = sorted(answers[whole - WINDOW : whole])
    p95 = window[math.ceil(0.95 * WINDOW) - 1]
    assert delay >= min(2 * p95, MOST_DELAY)
    assert LEAST_DELAY <= delay <= MOST_DELAY
    recent = sorted(answers[whole:], reverse=True)
    assert delay <= max(LEAST_DELAY, 2 * p95, 2 * recent[1] if len(recent) > 1 else 0.0), "one slow answer is nothing"


def test_silence_counts_as_an_answer_that_took_as_long() -> None:
    """Otherwise a path whose slow answers are overtaken by hedges would look fast."""
    hedging = Hedging(FIRST)
    for _ in range(WINDOW):
        hedging.answered(PATH, 0.2)
    for _ in range(WINDOW):
        hedging.given_up(PATH, hedging.delay(PATH))
        hedging.given_up(PATH, 0.01)  # a client that left at once says nothing of the path
    assert hedging.delay(PATH) == MOST_DELAY


@given(st.lists(st.booleans(), max_size=600))
def test_one_dial_in_ten_may_hedge(wishes: list[bool]) -> None:
    hedging = Hedging(FIRST)
    granted = 0
    for number, wish in enumerate(wishes, 1):
        hedging.dialled()
        granted += wish and hedging.spend()
        assert granted <= BURST + number / 10


def test_the_memory_of_paths_is_bounded_and_keeps_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge, "MAX_PATHS", 50)
    hedging = Hedging(FIRST)
    for epoch in range(1000):
        hedging.answered(("b2", epoch), 0.001)
        hedging.answered(PATH, 0.4)
        assert hedging.known <= 2 * 50
    assert hedging.delay(PATH) == 0.8
    assert hedging.delay(("b2", 0)) == FIRST


# --- whole dials, in a time of their own ------------------------------------------------------------------


@dataclass
class Timer:
    """A call at a time; `cancel` is idempotent."""

    call: Callable[[], None]
    live: bool = True

    def cancel(self) -> None:
        self.live = False


@dataclass
class Clock:
    """A loop that only has timers."""

    now: float = 0.0
    _timers: list[tuple[float, int, Timer]] = field(default_factory=list)
    _ids: Any = field(default_factory=count)

    def after(self, delay: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        heapq.heappush(self._timers, (self.now + delay, next(self._ids), timer))
        return timer

    def run(self, until: float) -> None:
        while self._timers and self._timers[0][0] <= until:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.live:
                timer.call()
        self.now = until


class End:
    """A connection to a broker, which answers by its clock."""

    def __init__(self) -> None:
        self.over = False

    def set_handler(self, handler: Any) -> None:
        self.handler = handler

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.over = True


class Connecting:
    def cancel(self) -> None:
        pass


@dataclass
class Scene:
    """A gateway as its dials see it, two brokers, and one agent with a session on each.

    `answers`: node -> seconds until each answer; None: never.
    """

    answers: Mapping[str, Callable[[], float | None]]
    word: bytes = encode(Refuse(code=Refusal.TARGET_REFUSED, text="no"))
    loop: Clock = field(default_factory=Clock)
    attempts: int = 0
    took: list[float] = field(default_factory=list)
    codes: list[Refusal] = field(default_factory=list)
    paths: Paths = field(default_factory=Paths)
    hedging: Hedging = field(default_factory=lambda: Hedging(FIRST))
    config: GatewayConfig = field(default_factory=GatewayConfig)
    name: str = "g"
    proofs: None = None
    sources: None = None
    dial_tls: None = None

    @property
    def trust(self) -> Any:
        return self

    def fault_of(self, certificate: bytes | None) -> str:
        return ""

    @property
    def relay(self) -> Any:
        return self

    @property
    def table(self) -> Any:
        return self

    @property
    def key(self) -> Any:
        return self

    @property
    def id(self) -> str:
        return "k"

    @property
    def nodes(self) -> dict[str, Any]:
        return {}

    def sign(self, body: bytes) -> bytes:
        return b""

    def log(self, *_: Any, **__: Any) -> None:
        pass

    def count_attempt(self, node: str, word: str) -> None:
        pass

    def connect(self, host: str, port: int, timeout: float, done: Callable[..., None], source: str) -> Connecting:
        self.attempts += 1
        node = host
        end = End()

        def answer() -> None:
            if not end.over:
                end.handler.received(self.word)

        def connected() -> None:
            done(end, Refusal.INTERNAL, "")
            delay = self.answers[node]()
            if delay is not None:
                self.loop.after(delay, answer)

        self.loop.after(0.0, connected)
        return Connecting()

    def dials(self, number: int, every: float) -> None:
        """So many, one after the other has begun; all are over at the end."""
        before = len(self.took)
        tuples = [
            Tuple(
                namespace="default", agent_ip="10.1.0.7", agent_port=0, ps_ip=node, ps_port=1, node=node, epoch=1,
                agent_id="a1", exposes="1-65535",
            )
            for node in self.answers
        ]  # fmt: skip
        for _ in range(number):
            began = self.loop.now

            def done(_: object, refused: Any, began: float = began) -> None:
                self.took.append(self.loop.now - began)
                self.codes.append(refused.code)

            TargetDial(self, Target("default", "10.1.0.7", 80), "", done).start(tuples)  # type: ignore[arg-type]
            self.loop.run(self.loop.now + every)
        self.loop.run(self.loop.now + self.config.dial_timeout + 1)
        assert len(self.took) == before + number


def always(delay: float | None) -> Callable[[], float | None]:
    return lambda: delay


def test_an_agent_far_away_is_dialled_once() -> None:
    """300 ms away, over both nodes, and the configured delay is 250 ms: no doubled connections."""
    scene = Scene({"b1": always(0.3), "b2": always(0.3)})
    scene.dials(1000, every=0.05)
    assert scene.attempts <= 1000 + BURST
    assert max(scene.took) < 0.31


@pytest.mark.parametrize("delay", [0.6, 3.0])
def test_an_overload_is_not_fed(delay: float) -> None:
    """Answers become slow everywhere at once: at most one dial in ten has a second attempt, and all end."""
    slow = [False]
    late = {node: lambda: delay if slow[0] else 0.002 for node in ("b1", "b2")}
    scene = Scene(late)
    scene.dials(200, every=0.01)
    before = scene.attempts
    slow[0] = True
    scene.dials(2000, every=0.002)
    assert scene.attempts - before <= 2000 * 1.1 + BURST
    assert set(scene.codes) == {Refusal.TARGET_REFUSED}


def test_a_frozen_node_costs_a_few_dials_one_delay() -> None:
    """It is suspect as soon as the other node has overtaken it: the rest is not late, nor short of budget."""
    frozen = [False]
    scene = Scene({"b1": lambda: None if frozen[0] else 0.002, "b2": always(0.002)})
    scene.dials(400, every=0.01)
    frozen[0] = True
    scene.took.clear()
    scene.dials(400, every=0.001)
    assert set(scene.codes) == {Refusal.TARGET_REFUSED}
    late = [seconds for seconds in scene.took if seconds > 0.01]
    assert max(late) < 3 * LEAST_DELAY
    assert len(late) <= 200, "those of the time before it was known"


def test_without_budget_a_dial_is_hedged_before_its_time_is_over() -> None:
    """The node falls silent when there is no hedge left: its clients are late, and get their answer."""
    scene = Scene({"b1": always(None), "b2": always(0.002)})
    while scene.hedging.spend():
        pass
    scene.dials(3, every=20.0)
    assert set(scene.codes) == {Refusal.TARGET_REFUSED}
    assert max(scene.took) <= scene.config.dial_timeout / 2 + MOST_DELAY


def test_dialling_is_a_sign_of_life() -> None:
    """A slow target behind a fast path: no second attempt before half of the time is over."""
    scene = Scene({"b1": always(0.1), "b2": always(0.1)}, word=encode(Dialling()))
    scene.dials(1, every=7.0)
    assert scene.attempts <= 2
