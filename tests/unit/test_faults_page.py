"""docs/faults.md has every fault of `make night`, and answers that name it."""

from __future__ import annotations

from night import page
from night.faults import FAULTS
from night.system import Answer


def test_the_page_has_each_fault_with_its_command_and_cause() -> None:
    """The page is of a run with this list of faults: `make night PAGE=1` writes it."""
    rows = {row[0]: row for row in page.rows(page.PAGE.read_text(encoding="utf-8"))}
    assert sorted(rows) == sorted(fault.name for fault in FAULTS)
    for fault in FAULTS:
        _, command, cause, _ = rows[fault.name]
        assert command.startswith(f"`{fault.command}")
        assert all(word in cause for word in fault.cause), fault.name


def test_rows_of_a_page_are_read_as_they_were_written() -> None:
    """A fault that is not determined stands in a table of its own."""
    answer = Answer("", 1, "RESULT  x\nCAUSE   a | b\nDO      c\n")
    found = [page.Finding.of(fault, answer) for fault in FAULTS[:2]]
    text = page.text(found)
    assert [row[0] for row in page.rows(text)] == [fault.name for fault in FAULTS[:2]]
    assert page.rows(text)[0][2:] == ("a \\| b", "c")
