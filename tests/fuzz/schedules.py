"""Play seeded schedules on the hostile kernel: `python -m fuzz.schedules COUNT [FIRST]`, on every core.

A finding is printed with its seed and kept as a tape in tests/fuzz/cases/hostile_kernel/, where the fast suite plays
it from then on; the exit code is 1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

from support.hostile import play, tape_of

_CASES: Final = Path(__file__).parent / "cases" / "hostile_kernel"
_A_TASK: Final = 500
#: More findings than this are one fault.
_MOST_FINDINGS: Final = 10


def some(first: int) -> list[tuple[int, str]]:
    """The seeds of one task that failed, and how."""
    found = []
    for seed in range(first, first + _A_TASK):
        try:
            play(tape_of(seed))
        except Exception as error:
            found.append((seed, f"{type(error).__name__}: {error}"))
    return found


def findings(first: int, count: int) -> Iterator[tuple[int, str]]:
    """All of them, as they come."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(some, range(first, first + count, _A_TASK)):
            yield from found


def main() -> int:
    """The exit code: 1 when anything was found."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    began, failed = time.monotonic(), 0
    for seed, how in findings(first, count):
        failed += 1
        _CASES.mkdir(parents=True, exist_ok=True)
        (_CASES / f"seed-{seed}").write_bytes(tape_of(seed))
        print(f"seed {seed}: {how}", flush=True)
        if failed == _MOST_FINDINGS:
            break
    seconds = time.monotonic() - began
    print(f"{count:,} schedules in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
