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
