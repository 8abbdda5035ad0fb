"""The states of docs/wire.md, generated from the tables of `rtunnel.wire.control`.

`PYTHONPATH=tests .venv/bin/python -m support.control_tables` writes them into the page.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from rtunnel.wire.control import AGENT, BROKER, Action, AgentState, BrokerState
from rtunnel.wire.states import Table, word_of
from support.state_tables import put

_S = TypeVar("_S", BrokerState, AgentState)


def _cell(steps: list[tuple[str, Enum]], state: Enum) -> str:
    return "; ".join(word if after is state else f"{word} → `{after}`" for word, after in steps)


def text_of(table: Table[_S, Action], states: type[_S]) -> str:
    """Return the table as Markdown: for each state what it receives and does, and what is next."""
    rows = ["| state | what holds | receives | does |", "| --- | --- | --- | --- |"]
    for state in states:
        receives: list[tuple[str, Enum]] = []
        does: list[tuple[str, Enum]] = []
        for (before, key), after in table.items():
            if before is state and isinstance(key, Action):
                does.append((str(key), after))
            elif before is state and not isinstance(key, Action):
                receives.append((word_of(key), after))
        rows.append(f"| `{state}` | {state.meaning} | {_cell(receives, state)} | {_cell(does, state)} |")
    return "\n".join(rows)


def parts() -> dict[str, str]:
    """Return the generated parts of the page by name."""
    return {
        "states of the broker": text_of(BROKER, BrokerState),
        "states of the agent": text_of(AGENT, AgentState),
    }


def main() -> None:
    """Put the tables into the page."""
    for name, text in parts().items():
        put(name, text)


if __name__ == "__main__":
    main()
