"""Child processes: started on loopback, measured, and ended by their ids, also when the bench itself dies."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_LIBC: Final = ctypes.CDLL(None)
_PR_SET_PDEATHSIG: Final = 1
#: How long a process may take to end after SIGTERM.
GRACE: Final = 3.0


class BenchError(Exception):
    """A system could not be started, or did not do what it was asked."""


def die_with_parent() -> None:
    """In a child, first thing: SIGKILL when the bench goes away, whatever the way it goes."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


# --- measuring ----------------------------------------------------------------------------------------------------


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes, ended threads included, from their CPU clocks (nanoseconds)."""
    total = 0
    for pid in pids:
        try:
            total += time.clock_gettime_ns((~pid << 3) | 2)  # the kernel's name for "CPU clock of process pid"
        except OSError:
            continue  # gone
    return total / 1e9


def machine_busy_seconds() -> float:
    """CPU time that the whole machine has spent on anything, in ticks of 10 ms."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return float(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Of one or more processes, in KiB."""

    rss: int
    pss: int


def memory(pids: Iterable[int]) -> Memory:
    """What these processes hold: RSS, and PSS (shared pages divided among those who share them)."""
    rss = pss = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        rss += sizes["Rss"]
        pss += sizes["Pss"]
    return Memory(rss, pss)


def with_children(pids: Iterable[int]) -> list[int]:
    """These processes and all that they started (sshd serves each client in a process of its own)."""
    found: list[int] = []
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


# --- starting and ending ------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port of 127.0.0.1 that the kernel chose. Systems take it before the load begins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, patience: float = 20.0) -> None:
    """Look every 10 ms. Raises BenchError."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {patience:g} s for {what}")
        time.sleep(0.01)


def accepts(port: int) -> bool:
    """Somebody listens on this port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


@dataclass
class Process:
    """One of ours."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of the process itself, not of what it started."""
        return self.popen.pid

    def check(self) -> None:
        """Raises BenchError when it has ended."""
        code = self.popen.poll()
        if code is not None:
            raise BenchError(f"{self.name} ended with {code}:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines that it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


@dataclass
class Processes:
    """Everything that the bench has started; `end` ends it."""

    directory: Path
    running: list[Process] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        """Start one, its output into a file of its name."""
        path = self.directory / f"{name}.log"
        with path.open("wb") as log:
            popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={**os.environ, **(env or {})},
                preexec_fn=die_with_parent,  # safe: this process has one thread
            )
        process = Process(name, popen, path)
        self.running.append(process)
        return process

    def end(self, *processes: Process) -> None:
        """SIGTERM, and SIGKILL for those that don't listen; all of them unless some are named."""
        ending = list(processes or self.running)
        pids = with_children(process.pid for process in ending)
        for process in ending:
            process.popen.terminate()
        deadline = time.monotonic() + GRACE
        for process in ending:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            self.running.remove(process)
        _kill_left_overs(pids, str(self.directory))


def _kill_left_overs(pids: Iterable[int], directory: str) -> None:
    """Children of children; the directory that they run in tells that the id is still theirs."""
    for pid in pids:
        try:
            if str(Path(f"/proc/{pid}/cwd").readlink()).startswith(directory):
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
