"""The page docs/faults.md: each fault of the night, the command that finds it, and the answer. `make night PAGE=1`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from night.faults import FAULTS, Fault
from night.system import Answer

PAGE: Final = Path(__file__).parents[2] / "docs" / "faults.md"
GENERATED: Final = "<!-- Made from a run by `make night PAGE=1`: edit tests/night/. -->"
HEAD: Final = "| fault | command | CAUSE | DO |\n| --- | --- | --- | --- |\n"
INTRODUCTION: Final = """\
`make night` injects these faults, one after the other, into a running system in network namespaces
(three brokers, two gateways, four agents behind a VIP, Redis, an authority). For each fault it runs
one command and checks that the answer names the fault; then it undoes the fault and checks that
every trace is good again. The answers below are those of a run."""
NOT_DETERMINED: Final = """\
No command in the centre determines these faults today: the answer says only what is known of the
last session. It excludes that an agent is registered for the address, also from another address
that it has registered, in another namespace, or after a refusal. `rtunnel doctor` on the agent's
host, or on the broker's machine, looks at the rest."""
LIMITS: Final = """\
- Only the gateway that refused a login tells of it, for 10 minutes, to a trace `--as` that user at
  that address.
- An MTU black hole is found where packets to the gateway or on an agent's link are lost. The other
  direction, from gateway to broker, is not tried: a Dial fits into one packet.
- A silent link can mean an agent that hangs or lost large packets, as long as the agent's other
  path is silent too: the answer names both."""


class Finding(msgspec.Struct, frozen=True):
    """One fault with its command, and the lines of the answer."""

    name: str
    determined: bool
    command: str
    cause: str
    do: str

    @classmethod
    def of(cls, fault: Fault, answer: Answer) -> Finding:
        """Return the finding of an answer: its lines CAUSE and DO, else the line that has the fault's words."""
        cause, do = answer.line("CAUSE"), answer.line("DO")
        if not cause:
            lines = [line.strip() for line in answer.output.splitlines()]
            cause = next((line for line in lines if all(word in line for word in fault.cause)), "")
        where = "" if fault.place == "gateway" else f" (on {fault.place})"
        return cls(fault.name, fault.determined, f"{fault.command}{where}", cause, do)


#: The findings of this run.
FOUND: list[Finding] = []


def text(findings: list[Finding]) -> str:
    """Return the page."""
    sure = [finding for finding in findings if finding.determined]
    rest = [finding for finding in findings if not finding.determined]
    parts = ["# Faults and their causes", GENERATED, INTRODUCTION, HEAD + _rows(sure)]
    if rest:
        parts += ["## Not determined", NOT_DETERMINED, HEAD + _rows(rest)]
    parts += ["## Limits", LIMITS]
    return "\n\n".join(parts) + "\n"


def _rows(findings: list[Finding]) -> str:
    return "\n".join(
        f"| {finding.name} | `{finding.command}` | {_cell(finding.cause)} | {_cell(finding.do)} |"
        for finding in findings
    )


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")


def rows(page: str) -> list[tuple[str, ...]]:
    """Return the rows of a page's tables: fault, command, CAUSE and DO."""
    found = [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in page.splitlines()]
    return [row for row in found if len(row) == 4 and row[0] not in ("fault", "---")]


def write() -> None:
    """Write the page from a run that had every fault."""
    if [finding.name for finding in FOUND] == [fault.name for fault in FAULTS]:
        PAGE.write_text(text(FOUND), encoding="utf-8")
