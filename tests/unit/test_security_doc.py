"""docs/security.md: every threat has a sentence, a defence, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(test_\w+)`", PAGE)
THREATS = PAGE.partition("## Threats and defences")[2].partition("## Out of scope")[0]
ROWS = re.findall(r"^\| ([A-Z]\d+) \| (.*) \| (.*) \|$", THREATS, re.MULTILINE)


def test_every_test_that_the_page_names_exists() -> None:
    """In the file that the page names."""
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path, _ in NAMED}
    assert len(NAMED) > 100
    assert len(re.findall(r"`tests/", PAGE)) == len(NAMED) + PAGE.count("`tests/unit/test_security_doc.py`")
    assert not [f"{path}::{name}" for path, name in NAMED if f"def {name}(" not in sources[path]]


def test_every_threat_is_a_sentence_with_a_defence() -> None:
    """Numbered within its section, from 1 on."""
    assert len(ROWS) > 40
    assert not [row for row in ROWS if not all(re.fullmatch(r"[A-Z`].*[.]", cell) for cell in row[1:])]
    for letter in {number[0] for number, *_ in ROWS}:
        numbers = [int(number[1:]) for number, *_ in ROWS if number[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1))


def test_every_defence_is_shown_by_a_test() -> None:
    """Below the tables each number is followed by at least one test."""
    shown = dict(re.findall(r"^- ([A-Z]\d+):\n((?:    - `tests/.*`\n)+)", THREATS, re.MULTILINE))
    assert list(shown) == [number for number, *_ in ROWS]
