"""A long life in minutes: after all that can happen to streams and links, every process holds what it held before.

RTUNNEL_SOAK_SHORT=1 does a twentieth of it in under a minute, for CI; RTUNNEL_SOAK_STREAMS sets the number of streams.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from bench import load
from bench.load import ERRORS, UNITS, Way
from bench.workloads import Worker
from rtunnel.relay.link import DEAD_AFTER
from soak.aborts import abort, begin_dial, ending
from soak.figures import RSS, RSS_MARGIN, Figures, beyond, table
from soak.load import STUCK, exchanges, talks
from soak.system import DIAL_WINDOW, OPEN_PORTS, System, running
from support.plumbing import reset
from support.polling import until

#: How long a process may take to let go of everything: a target's timeout, ttl and quarantine, idle threads (10 s).
SETTLE: Final = 25.0
LOOK_EVERY: Final = 0.2
#: glibc otherwise learns from a freed window of some MB to keep up to 64 MB: RSS would tell its habits, not our leaks.
MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
#: Warm-up ends when a round of it adds no more than this to anybody's RSS.
WARM: Final = 0.01
#: After 15 s of silence a link is dead. Pings go out every few seconds, and the last one may have been answered.
HALF_OPEN: Final = (DEAD_AFTER - 8.0, DEAD_AFTER + 4.0)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    streams: int
    exchanges: int  # whose content is compared
    aborts: int
    deaths: int
    kills: int  # of the deaths, by SIGKILL of an agent
    half_open: int
    warm_streams: int
    warm_rounds: int

    @classmethod
    def of_environment(cls) -> Size:
        """See the module."""
        short = bool(os.environ.get("RTUNNEL_SOAK_SHORT"))
        streams = int(os.environ.get("RTUNNEL_SOAK_STREAMS") or (5_000 if short else 100_000))
        if short:
            return cls(streams, 1_000, 88, 16, 1, 12, 1_500, 2)
        return cls(streams, 20_000, 1_000, 200, 10, 50, 5_000, 6)


def test_everything_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short streams, aborts, link deaths under load, half-open links: descriptors, threads, keys, memory as before."""
    size, told = Size.of_environment(), Told()
    for name, value in MALLOC.items():
        monkeypatch.setenv(name, value)
    with running(tmp_path, size.half_open - 1) as system:
        told("ready")
        _warm_up(system, size, told)
        _quiet(system)
        before = _back(system)
        keys = system.keys()
        told("baseline taken")
        columns: dict[str, dict[str, Figures]] = {"before": before}

        def phase(name: str, work: Callable[[System, Size], str]) -> None:
            outcome = work(system, size)
            columns[name] = _back(system, before)
            told(f"{name}: {outcome}")

        phase("streams", _short_streams)
        phase("content", _content)
        phase("aborts", _aborts)
        phase("deaths", _link_deaths)
        phase("half-open", _half_open_links)
        _quiet(system)
        after = columns["after"] = _back(system, before)
        until(lambda: system.keys() == keys, SETTLE, what="Redis to hold what it held")
        leases = system.leases()
        columns["peak"] = {name: watched.peak for name, watched in system.watched.items()}
        shown = {head: looks.__getitem__ for head, looks in columns.items()}
        print(f"\n{table(list(system.watched), shown)}\nRedis: {len(keys)} keys before and after, ports {leases}")
        assert leases == {"leased": system.ports, "quarantined": 0}
        assert not system.crashes()
        grown = {name: (before[name][RSS], after[name][RSS]) for name in before}
        assert not {name: pair for name, pair in grown.items() if pair[1] > pair[0] * RSS_MARGIN}, "RSS"


class Told:
    """Prints what is done, with the time."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {what}", flush=True)


# --- the state between the phases ---------------------------------------------------------------------------------


def _quiet(system: System) -> None:
    """One client works until the nonces of the load are forgotten: they are dropped as others come, and a garbage
    collector that nothing moves collects nothing. Before RSS is judged.
    """
    forgotten = time.monotonic() + 4 * DIAL_WINDOW
    with _loads(Worker(load.connections, system.ground.walls[0], (1,))):
        _watch(system, lambda: time.monotonic() > forgotten, 60)


def _back(system: System, before: dict[str, Figures] | None = None) -> dict[str, Figures]:
    """What all hold when nothing goes on any more; with a baseline: when they are back at it. RSS is not judged."""
    looks: dict[str, Figures] = {}
    wrong: dict[str, object] = {}

    def back() -> bool:
        wrong.clear()
        for name, watched in system.watched.items():
            looks[name] = watched.look()
            if before is None:
                at_rest = {n: looks[name].get(n, 0) for n in ("streams", "pairs", "clients", "handshakes", "draining")}
                wrong.update({f"{name} {n}": number for n, number in at_rest.items() if number})
            else:
                wrong.update({f"{name} {n}": pair for n, pair in beyond(before[name], looks[name]).items()})
        return not wrong and system.whole()

    deadline = time.monotonic() + SETTLE
    while not back():
        assert time.monotonic() < deadline, f"not back at the baseline (name: before, now): {wrong or 'sessions'}"
        time.sleep(LOOK_EVERY)
    return dict(looks)


def _watch(system: System, condition: Callable[[], bool], patience: float) -> None:
    """Until the condition holds, with a look at everybody now and then."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience:g} s"
        system.look()
        time.sleep(LOOK_EVERY)


@contextlib.contextmanager
def _loads(*workers: Worker) -> Iterator[None]:
    """These work during the block."""
    started: list[Worker] = []
    try:
        for worker in workers:
            worker.start()
            started.append(worker)
        yield
        while started:
            started.pop().stop()
    finally:
        for worker in started:
            worker.kill()


def _warm_up(system: System, size: Size, told: Told) -> None:
    """A little of everything, until allocators have what they need: another round changes nothing."""
    before: dict[str, int] = {}
    for number in range(1, size.warm_rounds + 1):
        _streams(system, size.warm_streams)
        abort(system.ground, 66)
        with _under_load(system):
            for _ in range(3):
                system.near.cut()
                until(lambda: system.has_session("near", OPEN_PORTS), 15, what="the agent's new session")
            system.far.cut()
            until(system.whole, 30, what="all sessions")
        rss = {name: watched.look()[RSS] for name, watched in system.watched.items()}
        told(f"warm-up {number}: RSS {rss}")
        if before and all(rss[name] <= before[name] * (1 + WARM) for name in rss):
            break
        before = rss
    for watched in system.watched.values():
        watched.peak.clear()


# --- the phases ---------------------------------------------------------------------------------------------------


def _short_streams(system: System, size: Size) -> str:
    began = time.monotonic()
    _streams(system, size.streams)
    seconds = time.monotonic() - began
    return f"{size.streams} short streams, {size.streams / seconds:.0f}/s"


def _streams(system: System, count: int) -> None:
    """SOCKS5 and open port side by side; none may fail."""
    workers = [Worker(load.connections, way, (16,)) for way in system.ground.walls]
    with _loads(*workers):
        _watch(system, lambda: sum(worker.board[UNITS] for worker in workers) >= count, 30 + count / 100)
    assert [worker.board[ERRORS] for worker in workers] == [0, 0], "streams failed"


def _content(system: System, size: Size) -> str:
    """Exchanges of all sizes on every way at once: each byte is compared, none may be refused or reset."""
    began = time.monotonic()
    workers = [Worker(exchanges, way, (8,)) for way in system.exact_ways]
    with _loads(*workers):
        patience = 60 + size.exchanges / 50
        _watch(system, lambda: sum(worker.board[UNITS] for worker in workers) >= size.exchanges, patience)
    assert [worker.board[ERRORS] for worker in workers] == [0, 0, 0], "exchanges were cut"
    _no_damage(system)
    return f"{size.exchanges} exchanges, {size.exchanges / (time.monotonic() - began):.0f}/s, every byte in its place"


def _no_damage(system: System) -> None:
    """What the targets have found; the clients' own findings are errors of their workers."""
    assert [board[ERRORS] for board in system.exact_boards] == [0, 0], "damaged uploads: see standard error"


def _aborts(system: System, size: Size) -> str:
    """RST from either side at each stage."""
    dialling = size.aborts // 10
    done = 0
    while done < size.aborts - dialling:
        abort(system.ground, 44)
        done += 44
        system.look()
    _abort_dialling(system, dialling)
    return f"{done + dialling} aborted streams, {dialling} of them while the agent was dialling"


def _abort_dialling(system: System, count: int) -> None:
    """The agent waits for a target that does not answer; half of the clients go away, the others see it refuse."""
    quiet = system.watched["near"].look()["sockets"]
    clients = [begin_dial(system.slow_ways[number % 2]) for number in range(count)]
    # One connection fits into the slow target's queue, whatever one does.
    _watch(system, lambda: system.watched["near"].look()["sockets"] >= quiet + count - 2, 10)
    for client in clients[: count // 2]:
        reset(client)
    system.slow.close()
    for client in clients[count // 2 :]:
        ending(client)


@contextlib.contextmanager
def _under_load(system: System) -> Iterator[list[Worker]]:
    """Exchanges and talks through both agents: none may hang, and what came before a reset must be right."""
    ways: tuple[Way, ...] = (*system.ground.walls, system.far_way)
    workers = [Worker(exchanges, way, (3,)) for way in system.exact_ways]
    workers += [Worker(talks, way, (1,)) for way in ways]
    with _loads(*workers):
        yield workers
    assert not any(worker.board[STUCK] for worker in workers), "streams hung"
    _no_damage(system)


def _link_deaths(system: System, size: Size) -> str:
    """Links are reset, both sides at once, and now and then an agent is killed."""
    deaths = kills = 0
    with _under_load(system) as workers:
        while deaths < size.deaths:
            units = [worker.board[UNITS] for worker in workers]
            _watch(system, lambda units=units: _all_moved(workers, units), 20)  # type: ignore[misc]
            if kills < size.kills and deaths >= (kills + 1) * size.deaths // (size.kills + 1):
                system.restart_far()
                kills += 1
                deaths += 1
            else:
                deaths += system.near.cut()
            until(lambda: system.has_session("near", OPEN_PORTS), 15, what="the agent's new session")
            until(system.watched["far"].ready, 15, what="the other agent's session")
        cut = sum(worker.board[ERRORS] for worker in workers)
    return f"{deaths} link deaths, {kills} of them kill -9; {cut} streams cut or refused meanwhile, none hung"


def _all_moved(workers: list[Worker], units: list[int]) -> bool:
    return all(worker.board[UNITS] > done for worker, done in zip(workers, units, strict=True))


def _half_open_links(system: System, size: Size) -> str:
    """Nothing gets through any more and nobody is told: both ends give up, and so do the streams."""
    clients = [system.far_way.connect(b"D" if number % 2 else b"E") for number in range(20)]
    for client in clients:
        assert client.recv(1)
    began = time.monotonic()
    links = system.far.swallow()
    assert links == size.half_open
    # Nobody comes back yet: the broker must see by itself that they are gone.
    _watch(system, lambda: _only_near_is_left(system), HALF_OPEN[1])
    seconds = time.monotonic() - began
    assert seconds >= HALF_OPEN[0], f"given up after {seconds:.1f} s"
    for client in clients:
        ending(client)
    system.far.admit()
    until(system.whole, 30, what="all sessions")
    return f"{links} half-open links, given up by both ends within {seconds:.1f} s; {len(clients)} streams ended"


def _only_near_is_left(system: System) -> bool:
    broker, agent = system.status("broker"), system.status("far")
    return (broker["sessions"], broker["links"]) == (1, 1) and not agent["sessions"] and not system.fleet[UNITS]
