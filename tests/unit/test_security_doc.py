"""docs/security.md names the test that shows each defence: they must exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs/security.md").read_text())


def test_every_test_that_the_page_names_exists() -> None:
    sources = {path: (ROOT / path).read_text() for path, _ in NAMED}
    assert len(NAMED) > 40
    assert not [f"{path}::{name}" for path, name in NAMED if f"def {name}(" not in sources[path]]


def test_every_defence_is_shown_by_a_test() -> None:
    page = (ROOT / "docs/security.md").read_text()
    threats = page.partition("## Threats and defences")[2].partition("## Out of scope")[0]
    rows = [line for line in threats.splitlines() if line.startswith("|") and "shown by" not in line]
    assert not [row for row in rows if not row.startswith("| ---") and "`tests/" not in row]
