"""`make fuzz`: each target in a process of its own under atheris, for FUZZ_SECONDS or FUZZ_RUNS, whichever ends first.

The corpus grows in .fuzz/ from run to run. A finding is a file in tests/fuzz/cases/<target>/, where the fast suite
tries it from then on, and the exit code is 1. `PYTHONPATH=tests python -m fuzz TARGET ...` takes some targets only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fuzz.targets import MAX_INPUT, TARGETS

HERE = Path(__file__).parent
CORPUS = HERE.parent.parent / ".fuzz"
SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
RUNS = int(os.environ.get("FUZZ_RUNS", "10000000"))
#: One input may take so many seconds and MB; the parsers need microseconds.
PATIENCE, MEMORY = 10, 2048
_STATUS = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


@dataclass
class Outcome:
    """What one target's run came to."""

    executions: int
    edges: int
    features: int
    corpus: int
    seconds: float
    findings: list[Path]
    log: str


def fuzz(name: str) -> Outcome:
    """Look for something in one target."""
    corpus, cases = CORPUS / name, HERE / "cases" / name
    corpus.mkdir(parents=True, exist_ok=True)
    cases.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed[:MAX_INPUT])
    before = set(cases.iterdir())
    limits = [f"-max_total_time={SECONDS:.0f}", f"-runs={RUNS}", f"-timeout={PATIENCE}", f"-rss_limit_mb={MEMORY}"]
    command = [sys.executable, "-m", "fuzz.one", name, *limits, f"-max_len={MAX_INPUT}", f"-artifact_prefix={cases}/"]
    began = time.monotonic()
    done = subprocess.run([*command, str(corpus)], capture_output=True, text=True, errors="replace", check=False)
    status = _STATUS.findall(done.stderr) or [("0", "0", "0", "0")]
    executions, edges, features, size = map(int, status[-1])
    found = sorted(set(cases.iterdir()) - before)
    if done.returncode and not found:
        raise SystemExit(
            f"{name}: the fuzzer ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    if not any(cases.iterdir()):
        cases.rmdir()
    return Outcome(executions, edges, features, size, time.monotonic() - began, found, done.stdout + done.stderr)


def main() -> int:
    """The exit code: 1 when anything was found."""
    names = sys.argv[1:] or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        print(f"no such target: {', '.join(sorted(unknown))} (known: {', '.join(TARGETS)})")
        return 2
    print(f"{'target':16} {'executions':>12} {'a second':>9} {'edges':>6} {'features':>8} {'corpus':>6}  found")
    findings = 0
    for name in names:
        out = fuzz(name)
        rate = out.executions / max(out.seconds, 0.001)
        figures = f"{out.executions:12,} {rate:9,.0f} {out.edges:6} {out.features:8} {out.corpus:6}"
        print(f"{name:16} {figures}  {len(out.findings) or '-'}", flush=True)
        for case in out.findings:
            findings += 1
            print(f"  {case}\n{re.sub('^', '    ', out.log[-3000:], flags=re.MULTILINE)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
