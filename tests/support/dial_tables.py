"""The states of a Dial in docs/wire.md, generated from the tables of `rtunnel.wire.dial`.

`PYTHONPATH=tests .venv/bin/python -m support.dial_tables` writes them into the page.
"""

from __future__ import annotations

from typing import Final

from rtunnel.wire.dial import RECEIVER, SENDER, Action, DialTable
from rtunnel.wire.messages import Accepted, Dial, Dialling, Hop, Refuse
from support.state_tables import put

NAME: Final = "states of a Dial"
_WORDS: Final = {
    Action.DIAL: "sends Dial", Action.FORWARD: "passes the Dial on, to the agent", Action.HOP: "sends Hop",
    Action.DIALLING: "sends Dialling", Action.ACCEPT: "sends Accepted", Action.REFUSE: "sends Refused",
    Dial: "gets Dial", Hop: "gets Hop", Dialling: "gets Dialling", Accepted: "gets Accepted", Refuse: "gets Refused",
}  # fmt: skip


def text_of(end: str, table: DialTable) -> str:
    """Return one table as Markdown: a row for each transition."""
    lines = [f"| {end}: state | what happens | next state |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {state} | {_WORDS[done]} | {after} |" for (state, done), after in table.items())])


def text() -> str:
    """Return both tables."""
    return f"{text_of('sender', SENDER)}\n\n{text_of('receiver', RECEIVER)}"


if __name__ == "__main__":
    put(NAME, text())
