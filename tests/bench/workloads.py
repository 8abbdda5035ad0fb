"""What is done through a system, and the figures that come of it.

A figure is the difference of two looks at boards and CPU clocks, taken while the load runs steadily; round trip times
are those of the round trips between the two looks.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final

from bench import load
from bench.deployments import LONG, Site, System
from bench.load import BYTES, ERRORS, OPEN, READY, STOP, UNITS, Board, Way
from bench.procs import BenchError, cpu_seconds, machine_busy_seconds, memory

_FORK: Final = get_context("fork")

Figures = dict[str, float]

#: metric -> (unit, what it is, whether more is better). The first metric of a workload leads its table.
METRICS: Final[dict[str, tuple[str, str, bool]]] = {
    "rate": ("Gbit/s", "throughput", True),
    "cpu_gb": ("s/GB", "CPU time of the tunnel per 10^9 bytes", False),
    "p50": ("µs", "median", False),
    "p99": ("µs", "99th percentile", False),
    "p999": ("µs", "99.9th percentile", False),
    "cpu_trip": ("µs", "CPU time of the tunnel per round trip", False),
    "conns": ("1/s", "connections: set-up, one byte there and back, close", True),
    "cpu_conn": ("µs", "CPU time of the tunnel per connection", False),
    "jain": ("", "Jain's index of 100 streams: 1 is perfectly fair", True),
    "beside": ("Gbit/s", "what the bulk stream moved meanwhile", True),
    "stalled": ("KiB", "PSS of the tunnel per stalled stream, over that of an idle one", False),
    "errors": ("", "connections that failed", False),
    "left": ("", "connections to the target that the tunnel kept open after their clients had gone", False),
    "load": ("cores", "CPU time of the load generator per second", False),
    "others": ("cores", "CPU time of everybody else on the machine per second", False),
}


@dataclass
class Worker:
    """A client process."""

    work: Callable[..., None]
    way: Way
    args: tuple[int, ...] = ()
    board: Board = field(default_factory=Board)

    def start(self) -> None:
        """Fork it, and wait until it works."""
        self._pipe, child = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(
            target=load.run_client, args=(self.work, self.way, self.board, child, self.args), daemon=True
        )
        self._process.start()
        child.close()
        deadline = time.monotonic() + load.PATIENCE
        while not self.board[READY]:
            if not self._process.is_alive() or time.monotonic() > deadline:
                self.kill()
                raise BenchError(f"{self.work.__name__}: the load did not start: {self._fault()}")
            time.sleep(0.002)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def stop(self) -> array[float]:
        """Let it end, and hear what it measured. Raises BenchError when it went wrong."""
        self.board.slots[STOP] = 1
        samples: array[float] = array("d")
        try:
            if not self._pipe.poll(load.PATIENCE + 2):
                raise BenchError(f"{self.work.__name__}: the load hangs")
            fault = self._pipe.recv_bytes().decode()
            samples.frombytes(self._pipe.recv_bytes())
        except EOFError:
            fault = "it died"
        finally:
            self.kill()
        if fault:
            raise BenchError(f"{self.work.__name__}: {fault}")
        return samples

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()

    def _fault(self) -> str:
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(0):
                return self._pipe.recv_bytes().decode()
        return "no reason given"


@dataclass
class Look:
    """One moment."""

    time: float
    tunnel: float
    load: float
    busy: float
    boards: list[list[int]]


@dataclass
class Measurement:
    """One workload through one system: workers, and two looks at them."""

    site: Site
    system: System
    seconds: float
    warm_up: float
    left: int = 0  # connections to the target that were still open 3 s after the load had ended

    @contextlib.contextmanager
    def running(self, *workers: Worker) -> Iterator[list[array[float]]]:
        """Start workers one after the other; at the end stop them in reverse, and wait until the target is idle.

        The list is filled with the samples of each, in the workers' order."""
        samples: list[array[float]] = []
        started: list[Worker] = []
        try:
            for worker in workers:
                started.append(worker)
                worker.start()
            yield samples
            for worker in reversed(workers):
                started.remove(worker)
                samples.insert(0, worker.stop())
        finally:
            for worker in started:
                worker.kill()
            self._settle()

    def _settle(self) -> None:
        """What is left in the tunnel's buffers must not count for the next system. Counts what it never lets go."""
        site = self.site
        deadline = time.monotonic() + 3.0
        while site.board[OPEN] > site.left_open and time.monotonic() < deadline:
            time.sleep(0.005)
        self.left = max(0, site.board[OPEN] - site.left_open)
        site.left_open = site.board[OPEN]

    def look(self, *workers: Worker) -> Look:
        """Now."""
        pids = self.system.pids
        boards = [list(board.slots) for board in (self.site.board, *(worker.board for worker in workers))]
        mine = [self.site.target_pid, *(worker.pid for worker in workers)]
        return Look(time.monotonic(), cpu_seconds(pids), cpu_seconds(mine), machine_busy_seconds(), boards)

    def two_looks(self, *workers: Worker, more: float = 0.0) -> tuple[Look, Look]:
        """After the warm-up (and `more` of it), and `seconds` later.

        The second look waits for two units or some bytes, and for a tick of the CPU clock: on a
        busy machine a short measurement would see neither.
        """
        time.sleep(self.warm_up + more)
        first = self.look(*workers)
        deadline = time.monotonic() + self.seconds + load.PATIENCE
        time.sleep(self.seconds)
        second = self.look(*workers)
        while not _shows(first, second) and time.monotonic() < deadline:
            time.sleep(0.005)
            second = self.look(*workers)
        return first, second

    def common(self, first: Look, second: Look) -> Figures:
        """What every workload tells: the generator's share, and everybody else's."""
        span = second.time - first.time
        ours = (second.tunnel - first.tunnel) + (second.load - first.load)
        return {
            "load": (second.load - first.load) / span,
            "others": max(0.0, (second.busy - first.busy - ours) / span),
            "left": float(self.left),
        }


def _shows(first: Look, second: Look) -> bool:
    """Whether there is something to measure. The first unit may have ended before the first look's time."""
    counts = [after[UNITS] - before[UNITS] for before, after in zip(first.boards[1:], second.boards[1:], strict=True)]
    moved = any(after[BYTES] > before[BYTES] for before, after in zip(first.boards, second.boards, strict=True))
    return second.load > first.load and (moved or any(count >= 2 for count in counts))


# --- streams ------------------------------------------------------------------------------------------------------


def _stream(m: Measurement, work: Callable[..., None], *counters: tuple[int, int]) -> Figures:
    """One stream; `counters` are (board, slot), board 0 being the target's."""
    worker = Worker(work, m.system.way)
    with m.running(worker):
        # Over a long way windows need some round trips to grow.
        first, second = m.two_looks(worker, more=3.0 if m.system.path == LONG else 0.0)
    moved = sum(second.boards[board][slot] - first.boards[board][slot] for board, slot in counters)
    return _rates(first, second, moved) | m.common(first, second)


def _rates(first: Look, second: Look, moved: int) -> Figures:
    if not moved:
        raise BenchError("nothing was moved")
    return {
        "rate": moved * 8 / 1e9 / (second.time - first.time),
        "cpu_gb": (second.tunnel - first.tunnel) / (moved / 1e9),
    }


def up(m: Measurement) -> Figures:
    """One stream to the target."""
    return _stream(m, load.upload, (0, BYTES))


def down(m: Measurement) -> Figures:
    """One stream from the target."""
    return _stream(m, load.download, (1, BYTES))


def both(m: Measurement) -> Figures:
    """One connection, both ways at once; the sum."""
    return _stream(m, load.both_ways, (0, BYTES), (1, BYTES))


def parallel(m: Measurement) -> Figures:
    """100 streams from the target; Jain's index tells how fairly they share."""
    worker = Worker(load.parallel_downloads, m.system.way, (100,))
    with m.running(worker):
        first, second = m.two_looks(worker, more=0.6)  # until all buffers are full
    shares = [b - a for a, b in zip(first.boards[1][load.STREAMS :], second.boards[1][load.STREAMS :], strict=True)]
    return _rates(first, second, sum(shares)) | {"jain": jain(shares[:100])} | m.common(first, second)


def jain(shares: list[int]) -> float:
    """(sum x)^2 / (n * sum x^2)."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


# --- round trips --------------------------------------------------------------------------------------------------


def _trips(m: Measurement, size: int, *neighbours: Worker) -> tuple[Figures, Look, Look]:
    worker = Worker(load.round_trips, m.system.way, (size,))
    with m.running(*neighbours, worker) as samples:
        first, second = m.two_looks(*neighbours, worker)
    figures = percentiles(between(samples[-1], first.time, second.time))
    if not neighbours:
        trips = second.boards[-1][UNITS] - first.boards[-1][UNITS]
        figures["cpu_trip"] = (second.tunnel - first.tunnel) / trips * 1e6
    return figures | m.common(first, second), first, second


def trip64(m: Measurement) -> Figures:
    """64 bytes there and back."""
    return _trips(m, 64)[0]


def trip4k(m: Measurement) -> Figures:
    """4 KiB there and back."""
    return _trips(m, 4096)[0]


def trip_beside_down(m: Measurement) -> Figures:
    """64 bytes there and back, while a stream from the target runs beside it."""
    return _beside(m, load.download, 1)


def trip_beside_up(m: Measurement) -> Figures:
    """64 bytes there and back, while a stream to the target runs beside it."""
    return _beside(m, load.upload, 0)


def _beside(m: Measurement, work: Callable[..., None], board: int) -> Figures:
    figures, first, second = _trips(m, 64, Worker(work, m.system.way))
    moved = second.boards[board][BYTES] - first.boards[board][BYTES]
    return figures | {"beside": moved * 8 / 1e9 / (second.time - first.time)}


def trip_beside_stalled(m: Measurement) -> Figures:
    """64 bytes there and back, beside 50 streams whose clients have stopped reading."""
    stalled, worker = Worker(load.stalled_readers, m.system.way, (50,)), Worker(load.round_trips, m.system.way, (64,))
    with m.running(stalled, worker) as samples:
        first, second = m.two_looks(stalled, worker, more=0.5)  # until windows and socket buffers are full
    return percentiles(between(samples[-1], first.time, second.time)) | m.common(first, second)


def stalled_memory(m: Measurement) -> float:
    """KiB of PSS that the tunnel's processes have more for each of 50 stalled streams than for each of 50 idle ones."""
    held = []
    for work in (load.idle_streams, load.stalled_readers):
        with m.running(Worker(work, m.system.way, (50,))):
            time.sleep(1.0)
            held.append(memory(m.system.pids).pss / 50)
    idle, stalled = held
    return stalled - idle


# --- connections --------------------------------------------------------------------------------------------------


def _connections(m: Measurement, clients: int) -> Figures:
    worker = Worker(load.connections, m.system.way, (clients,))
    with m.running(worker) as samples:
        first, second = m.two_looks(worker)
    made = second.boards[1][UNITS] - first.boards[1][UNITS]
    if not made:
        raise BenchError("no connection was made")
    figures = percentiles(between(samples[0], first.time, second.time))
    figures |= {
        "conns": made / (second.time - first.time),
        "cpu_conn": (second.tunnel - first.tunnel) / made * 1e6,
        "errors": float(second.boards[1][ERRORS] - first.boards[1][ERRORS]),
    }
    return figures | m.common(first, second)


def conn1(m: Measurement) -> Figures:
    """New connections, one after the other."""
    return _connections(m, 1)


def conn64(m: Measurement) -> Figures:
    """New connections of 64 clients."""
    return _connections(m, 64)


# --- samples ------------------------------------------------------------------------------------------------------


def between(samples: array[float], begin: float, end: float) -> list[float]:
    """Durations of the samples that ended in this time, sorted."""
    pairs = zip(samples[::2], samples[1::2], strict=True)
    return sorted(duration for ended, duration in pairs if begin <= ended <= end)


def percentiles(durations: list[float]) -> Figures:
    """In microseconds. Raises BenchError when there are none."""
    if not durations:
        raise BenchError("no answer came")
    last = len(durations) - 1
    shares = (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))
    return {name: durations[round(last * share)] * 1e6 for name, share in shares}


# --- the list -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A name, a sentence, a measurement, and the metrics of its table."""

    name: str
    title: str
    measure: Callable[[Measurement], Figures]
    shown: tuple[str, ...]


_STREAM: Final = ("rate", "cpu_gb")
_TRIP: Final = ("p50", "p99", "p999")
_CONN: Final = ("conns", "cpu_conn", "p50", "p99", "errors", "left")

WORKLOADS: Final = (
    Workload("up", "One stream up", up, _STREAM),
    Workload("down", "One stream down", down, _STREAM),
    Workload("both", "One stream both ways", both, _STREAM),
    Workload("trip64", "Round trips of 64 bytes", trip64, (*_TRIP, "cpu_trip")),
    Workload("trip4k", "Round trips of 4 KiB", trip4k, (*_TRIP, "cpu_trip")),
    Workload("conn1", "New connections, one client", conn1, _CONN),
    Workload("conn64", "New connections, 64 clients", conn64, _CONN),
    Workload("par100", "100 streams down", parallel, (*_STREAM, "jain")),
    Workload("trip-down", "Round trips of 64 bytes beside a stream down", trip_beside_down, (*_TRIP, "beside")),
    Workload("trip-up", "Round trips of 64 bytes beside a stream up", trip_beside_up, (*_TRIP, "beside")),
    Workload(
        "trip-stalled", "Round trips of 64 bytes beside 50 stalled readers", trip_beside_stalled, (*_TRIP, "stalled")
    ),
)
QUICK_WORKLOADS: Final = ("up", "down", "trip64", "conn1", "conn64")
#: What is done over the long way.
LONG_WORKLOADS: Final = ("up", "down")


def fits(workload: Workload, system: System) -> bool:
    """Whether this is worth doing."""
    return system.path != LONG or workload.name in LONG_WORKLOADS


_QUIET: Final = ("load", "others", "left")


def describe(figures: dict[str, Any]) -> str:
    """One line for the terminal."""
    return "  ".join(
        f"{name} {value:.4g}" for name, value in figures.items() if name not in _QUIET or (name == "left" and value)
    )
