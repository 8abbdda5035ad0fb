"""Notes of departures and refusals: what waits for the registry, how often an agent is written, and the bounds."""

from __future__ import annotations

from typing import Any

from rtunnel.registry import Departure, RefusedAgent
from rtunnel.registry.history import MAX_NOTED_ADDRESSES, MAX_SENTENCE
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal
from rtunnel_broker.notes import CLAIMS_PER_MINUTE, MAX_AT_ONCE, MAX_PENDING, WRITE_EVERY, Notes


class Book:
    """Notes on a clock of the test's own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.notes = Notes("b1", lambda: self.now)

    def gone(
        self, agent_id: str = "a1", text: str = "closed by peer", addresses: tuple[str, ...] = ("10.1.0.7",)
    ) -> None:
        hello = Hello(
            version=1, agent_id=agent_id, instance=bytes(16), namespace="default", addresses=[], nonce=bytes(16)
        )
        self.notes.departed(hello, addresses, peer="10.9.9.9", epoch=7, cause="closed", text=text)

    def refused(self, agent_id: str = "a1", code: Refusal = Refusal.ADDRESS_TAKEN, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "namespace": "default", "agent_id": agent_id, "addresses": ("10.1.0.7",), "peer": "10.9.9.9",
            "proved": True,
        }  # fmt: skip
        self.notes.refused(code, "text", **fields | changes)

    def texts(self) -> list[str]:
        return [note.text for note in self.notes.take()]


def test_note_is_taken_once_with_its_age() -> None:
    book = Book()
    book.gone()
    book.now += 3.0
    [note] = book.notes.take()
    assert isinstance(note, Departure)
    assert (note.agent_id, note.addresses, note.node, note.epoch, note.ago) == ("a1", ("10.1.0.7",), "b1", 7, 3.0)
    assert book.notes.take() == []


def test_agent_is_written_once_in_ten_seconds_with_the_newest_note() -> None:
    book = Book()
    book.gone(text="first")
    assert book.texts() == ["first"]
    for text in ("second", "third"):
        book.now += 1.0
        book.gone(text=text)
        book.gone("a2", text="other")
    assert book.texts() == ["other"]
    book.now = 100.0 + WRITE_EVERY
    assert book.texts() == ["third"]


def test_departure_and_refusal_of_one_agent_are_written_together() -> None:
    book = Book()
    book.gone()
    book.refused()
    book.refused(proved=False)
    assert [type(note) for note in book.notes.take()] == [Departure, RefusedAgent, RefusedAgent]


def test_refusals_that_pass_are_not_noted() -> None:
    """A VIP leads an agent to a node that it has already: this is nothing to remember for 30 days."""
    book = Book()
    for code in (Refusal.DUPLICATE_NODE, Refusal.DRAINING, Refusal.REGISTRY_UNAVAILABLE, Refusal.RATE_LIMITED):
        book.refused(code=code)
    book.refused("", code=Refusal.VERSION)
    assert len(book.notes) == book.notes.dropped == 0


def test_notes_that_could_not_be_written_come_again_unless_there_is_a_newer_one() -> None:
    book = Book()
    book.gone(text="old")
    book.gone("a2", text="kept")
    taken = book.notes.take()
    book.now += 2.0
    book.gone(text="new")
    book.notes.put_back(taken)
    assert [(note.text, note.ago) for note in book.notes.take()] == [("kept", 2.0), ("new", 0.0)]


def test_oldest_notes_are_dropped_and_counted() -> None:
    book = Book()
    for number in range(MAX_PENDING + 1):
        book.gone(f"a{number}")
    assert (len(book.notes), book.notes.dropped) == (MAX_PENDING, 1)
    taken = book.notes.take()
    assert len(taken) == MAX_AT_ONCE and taken[0].agent_id == "a1"
    for number in range(MAX_AT_ONCE):
        book.gone(f"b{number}")
    book.notes.put_back(taken)
    assert (len(book.notes), book.notes.dropped) == (MAX_PENDING, 1 + MAX_AT_ONCE)


def test_claims_of_strangers_are_few() -> None:
    """Anybody can send a Hello with any name; a name that waits already costs nothing more."""
    book = Book()
    for number in range(CLAIMS_PER_MINUTE + 5):
        book.refused(f"a{number}", Refusal.BAD_TOKEN, proved=False)
    book.refused("a0", Refusal.BAD_TOKEN, proved=False)
    assert (len(book.notes), book.notes.dropped) == (CLAIMS_PER_MINUTE, 5)
    book.now += 60 / CLAIMS_PER_MINUTE
    book.refused("late", Refusal.BAD_TOKEN, proved=False)
    book.refused("later", Refusal.BAD_TOKEN, proved=False)
    assert (len(book.notes), book.notes.dropped) == (CLAIMS_PER_MINUTE + 1, 6)


def test_one_note_is_bounded() -> None:
    book = Book()
    book.gone(text="x\udc80" * MAX_SENTENCE, addresses=tuple(f"10.1.0.{n}" for n in range(100)))
    [note] = book.notes.take()
    assert (len(note.text), len(note.addresses)) == (MAX_SENTENCE, MAX_NOTED_ADDRESSES)
    assert note.text.startswith("x?")
