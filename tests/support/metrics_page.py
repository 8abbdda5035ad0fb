"""docs/metrics.md, taken apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

PAGE: Final = (Path(__file__).parents[2] / "docs/metrics.md").read_text()


def _rows() -> list[tuple[str, str, str, str, str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `rt")]
    return [
        (name.strip("`"), kind, ", ".join(sorted(re.findall(r"\w+", label))), meaning, role)
        for name, kind, label, meaning, roles in rows
        for role in roles.split(", ")
    ]


#: (name, type, labels in alphabetical order, meaning, role), one for each role that gives it.
TABLE: Final = _rows()
