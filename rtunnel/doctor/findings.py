"""A finding: the verdict of a check, its text, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rtunnel.logs import printable


class Level(StrEnum):
    """A verdict; the exit code is 1 when one is FAIL."""

    FAIL = "FAIL"
    WARN = "WARN"
    OK = "OK"


#: The order in which findings are printed.
_ORDER = {Level.FAIL: 0, Level.WARN: 1, Level.OK: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: a verdict, the check, what was found, and what to do."""

    level: Level
    check: str
    text: str
    fix: str = ""

    @property
    def line(self) -> str:
        """The finding as one line; values from peers are escaped."""
        return printable(f"{self.level:<4}  {self.check:<13} {self.text}" + (f". Fix: {self.fix}" if self.fix else ""))


def fail(check: str, text: str, fix: str) -> Finding:
    """Return a finding with which something does not work now."""
    return Finding(Level.FAIL, check, text, fix)


def warn(check: str, text: str, fix: str) -> Finding:
    """Return a finding that is allowed, and probably not intended or soon a fault."""
    return Finding(Level.WARN, check, text, fix)


def ok(check: str, text: str) -> Finding:
    """Return a finding without a fault."""
    return Finding(Level.OK, check, text)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings, the worst first; else in the order of the checks."""
    return sorted(findings, key=lambda finding: _ORDER[finding.level])


#: Names that one line lists; the rest is counted.
MAX_NAMES = 8


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
