"""What a process holds, seen from outside: descriptors, threads, memory, and what its /statusz tells."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.procs import memory
from rtunnel.bridge import REGISTRY_THREADS
from rtunnel.relay.socketpair import MAX_PIPES

#: Numbers of /statusz that must come back. A list counts by its length.
STATUS: Final[Mapping[str, tuple[str, ...]]] = {
    "broker": ("sessions", "links", "handshakes", "streams", "pairs"),
    "gateway": ("clients", "streams", "pairs", "tuples"),
    "agent": ("sessions", "draining", "streams"),
}
#: Pools that grow to a fixed size and stay there on purpose: what is allowed whatever the baseline was.
POOLS: Final[Mapping[str, int]] = {"pipes": 2 * MAX_PIPES, "registry": REGISTRY_THREADS + 1}
#: Threads of a pool end by themselves when they have had nothing to do for 10 s (trio's). A role looks at its files and
#: resolves names in them: when two of these meet there is one thread more for a while.
THREADS: Final = "threads"
MEETING_THREADS: Final = 2
RSS: Final = "rss KiB"
RSS_MARGIN: Final = 1.10

Figures = dict[str, int]


@dataclass
class Watched:
    """One process under watch. `pid` changes when it is started anew."""

    name: str
    role: str
    pid: int
    admin: int
    peak: Figures = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """Its /statusz."""
        return self._get("statusz")

    def ready(self) -> bool:
        """It answers, and says that it is ready."""
        try:
            return bool(self._get("readyz")["ready"])
        except OSError:
            return False

    def look(self) -> Figures:
        """Everything, now."""
        figures = descriptors(self.pid)
        figures[THREADS] = len(list(Path(f"/proc/{self.pid}/task").iterdir()))
        figures[RSS] = memory([self.pid]).rss
        status = self.status()
        for name in STATUS[self.role]:
            value = status[name]
            figures[name] = value if isinstance(value, int) else len(value)
        for name, number in figures.items():
            self.peak[name] = max(number, self.peak.get(name, 0))
        return figures

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/{path}", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def descriptors(pid: int) -> Figures:
    """By kind. `registry`: unix sockets, that is connections to Redis (and trio's own two)."""
    found = {"sockets": 0, "registry": 0, "pipes": 0, "others": 0}
    unix = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = str(entry.readlink())
        except OSError:
            continue  # closed since
        if name.startswith("socket:"):
            found["registry" if name[8:-1] in unix else "sockets"] += 1
        else:
            found["pipes" if name.startswith("pipe:") else "others"] += 1
    return found


def beyond(before: Figures, now: Figures) -> dict[str, tuple[int, int]]:
    """What is not back at the baseline: name -> (baseline, now). RSS is judged by itself.

    A pool may be larger than it was, up to its fixed size. Fewer is no leak: the baseline had something in passing.
    """
    wrong = {}
    for name, number in now.items():
        was = before[name]
        if name == RSS:
            continue
        allowed = max(was + (MEETING_THREADS if name == THREADS else 0), POOLS.get(name, 0))
        if number > allowed:
            wrong[name] = was, number
    return wrong


def table(names: Sequence[str], columns: Mapping[str, Callable[[str], Figures]]) -> str:
    """One row for each figure of each process."""
    lines = [f"{'':24}" + "".join(f"{head:>12}" for head in columns)]
    for name in names:
        looks = {head: get(name) for head, get in columns.items()}
        for figure in next(iter(looks.values())):
            cells = "".join(f"{look.get(figure, '-'):>12}" for look in looks.values())
            lines.append(f"{name:10}{figure:14}{cells}")
    return "\n".join(lines)
