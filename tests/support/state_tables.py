"""Tables of state machines as docs/wire.md shows them."""

from __future__ import annotations

import re
from pathlib import Path

WIRE_PAGE = Path(__file__).parents[2] / "docs" / "wire.md"


def put(name: str, table: str) -> None:
    """Write a table between the markers of this name."""
    text = WIRE_PAGE.read_text(encoding="utf-8")
    WIRE_PAGE.write_text(text.replace(f"\n{shown(name)}\n", f"\n{table}\n"), encoding="utf-8")


def shown(name: str) -> str:
    """Return what stands on the page between the markers of this name."""
    text = WIRE_PAGE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(name)}: from the code -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found, f"docs/wire.md has no markers of {name!r}"
    return found[1].strip()
