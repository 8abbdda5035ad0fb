"""`PYTHONPATH=tests python -m bench`: see `make bench`."""

from __future__ import annotations

import fnmatch
import resource
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from bench import fleet, report
from bench.deployments import (
    DEPLOYMENTS,
    LONG_WAY,
    OPEN,
    QUICK,
    Deployment,
    Site,
    System,
    of_revision,
    start_all,
    version,
)
from bench.procs import BenchError, Processes, memory
from bench.report import Row, Run, median_row
from bench.revision import base_name, short_name, unpack
from bench.workloads import (
    METRICS,
    QUICK_WORKLOADS,
    WORKLOADS,
    Figures,
    Measurement,
    Workload,
    describe,
    fits,
    stalled_memory,
)

ROOT: Final = Path(__file__).resolve().parents[2]
#: 5,000 agents are two descriptors each in a broker.
DESCRIPTORS: Final = 65536
_Key = tuple[str, str, str]


@click.command()
@click.option("--quick", is_flag=True, help="A subset, in less than three minutes.")
@click.option("--only", default="", help="Systems and workloads by name or pattern: 'rtunnel-*,frp-tls,trip64'.")
@click.option("--rounds", type=int, help="Default: 5, quick 3; 0: only the fleet.")
@click.option("--seconds", type=float, help="Of one measurement. Default: 1.5, quick 0.6.")
@click.option("--fleet", "agents", type=int, help="Idle agents for the broker's memory. Default: 5000, quick 0.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build/bench.json", show_default=True)
@click.option("--render", type=click.Path(path_type=Path, exists=True), help="Only write docs/benchmarks.md from it.")
@click.option("--list", "listing", is_flag=True, help="Only name all systems and workloads.")
@click.option("--against", default="", metavar="REV", help="Beside rtunnel of another revision, in the same rounds.")
def main(
    quick: bool, only: str, rounds: int | None, seconds: float | None, agents: int | None, out: Path,
    render: Path | None, listing: bool, against: str,
) -> None:  # fmt: skip
    """rtunnel and its peers side by side. Peers: on PATH, or in the directories that RTUNNEL_BENCH_PEERS names."""
    if listing:
        click.echo("systems:   " + " ".join(name for d in DEPLOYMENTS for name in d.systems))
        click.echo("workloads: " + " ".join(workload.name for workload in WORKLOADS))
        return
    if render is not None:
        click.echo(report.write_page(Run.load(render), ROOT / "docs"))
        return
    try:
        against = against and short_name(against)
    except BenchError as error:
        raise click.UsageError(str(error)) from None
    systems, workloads = choose(only, quick=quick, against=against)
    rounds = (3 if quick else 5) if rounds is None else rounds
    seconds = seconds or (0.6 if quick else 1.5)
    if agents is None:
        agents = 0 if quick or only or against else 5000
    warm_up = 0.25 if quick else 0.4
    bench = Bench(systems if rounds else frozenset(), workloads, rounds, seconds, warm_up, against)
    run = bench.run(agents)
    run.save(out)
    plots = report.write_plots(run, out.parent / "plots")
    report.show(run, Console(width=None if bench.console.is_terminal else 200))
    click.echo(f"{out}, and {plots} plots beside it")


def choose(only: str, *, quick: bool, against: str = "") -> tuple[frozenset[str], list[Workload]]:
    """What to start, and what to do: each word is a pattern of systems or of workloads.

    `against` is the short name of a revision: then its systems run beside those of this one, and the peers
    only when they are named.
    """
    all_names = [name for deployment in DEPLOYMENTS for name in deployment.systems]
    names = list(QUICK) if quick else all_names
    if against:
        names = [name for name in names if name.startswith("rtunnel")]
    workloads = [workload for workload in WORKLOADS if not quick or workload.name in QUICK_WORKLOADS]
    wanted: set[str] = set()
    work: list[Workload] = []
    for word in only.replace(",", " ").split():
        systems = fnmatch.filter(all_names, word)
        loads = [workload for workload in WORKLOADS if fnmatch.fnmatch(workload.name, word)]
        if not systems and not loads:
            raise click.UsageError(f"{word!r} is neither a system nor a workload: see --list")
        wanted.update(systems)
        work += loads
    found = wanted or set(names)
    if against:
        found |= {f"{name}@{against}" for name in found if name.startswith("rtunnel")}
    return frozenset(found), work or workloads


class Bench:
    """One run."""

    def __init__(
        self,
        wanted: frozenset[str],
        workloads: list[Workload],
        rounds: int,
        seconds: float,
        warm_up: float,
        against: str = "",
    ) -> None:
        self.against = against
        self.wanted = wanted
        self.workloads = workloads
        self.rounds = rounds
        self.seconds = seconds
        self.warm_up = warm_up
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.missing: list[str] = []
        self.figures: dict[_Key, list[float]] = defaultdict(list)

    def run(self, agents: int) -> Run:
        """All of it. Whatever happens, every process is gone afterwards."""
        signal.signal(signal.SIGTERM, _terminated)
        _raise_descriptors()
        began = time.monotonic()
        directory = Path(tempfile.mkdtemp(prefix="rtunnel-bench-"))
        site = Site(directory, Processes(directory))
        fleet_rows: list[Row] = []
        try:
            self._say("starting systems")
            systems = self._start(site)
            idle = [*self._idle_memory(systems), *self._stalled_memory(site, systems)]
            for number in range(self.rounds):
                self._round(site, systems, number)
            if agents:
                fleet_rows = self._fleet(site, agents)
        finally:
            site.end()
            shutil.rmtree(directory, ignore_errors=True)
        about = report.machine() | {
            "rounds": self.rounds,
            "seconds": self.seconds,
            "took_seconds": round(time.monotonic() - began),
            "long_way_ms": LONG_WAY * 1000,
            "fleet": agents,
            "against": self.against,
            "versions": _versions(systems),
        }
        return Run(about, [*self._rows(systems), *idle, *fleet_rows], self.missing)

    def _start(self, site: Site) -> list[System]:
        """All systems; one of another revision comes right after ours, so that both meet the same moment."""
        deployments: tuple[Deployment, ...] = DEPLOYMENTS
        if self.against:
            deployments += of_revision(unpack(self.against, site.directory / self.against))
        systems = start_all(site, self.wanted, self._left_out, deployments)
        order = {system.name: number for number, system in enumerate(systems)}
        return sorted(systems, key=lambda system: (order.get(base_name(system.name), 0), "@" in system.name))

    def _round(self, site: Site, systems: list[System], number: int) -> None:
        for workload in self.workloads:
            # Forth and back, so that nobody always comes after the same neighbour.
            for system in systems if number % 2 == 0 else reversed(systems):
                if fits(workload, system):
                    self._measure(site, workload, system, number)

    def _measure(self, site: Site, workload: Workload, system: System, number: int) -> None:
        site.check()
        began = time.monotonic()
        try:
            figures = workload.measure(Measurement(site, system, self.seconds, self.warm_up))
        except (BenchError, OSError) as error:
            self._left_out(f"{system.name}, {workload.name}, round {number + 1}: {error}")
            return
        self._keep(system, workload, figures)
        took = time.monotonic() - began
        where = f"round {number + 1}/{self.rounds}  {workload.name:13} {system.name:20}"
        self._say(f"{where} {describe(figures)}  ({took:.1f} s)")

    def _keep(self, system: System, workload: Workload, figures: Figures) -> None:
        for metric, value in figures.items():
            self.figures[system.name, workload.name, metric].append(value)

    def _rows(self, systems: list[System]) -> list[Row]:
        by_name = {system.name: system for system in systems}
        return [
            median_row(_who(by_name[name], workload), metric, METRICS[metric][0], rounds)
            for workload in (w.name for w in self.workloads)
            for name in by_name
            for metric in METRICS
            if (rounds := self.figures.get((name, workload, metric)))
        ]

    def _idle_memory(self, systems: Iterable[System]) -> list[Row]:
        """Of all processes of a system, before any load."""
        rows = []
        for system in systems:
            if system.roots:
                held = memory(system.pids)
                for metric, value in (("rss", held.rss), ("pss", held.pss)):
                    rows.append(median_row(_who(system, "idle"), metric, "KiB", [float(value)]))
        return rows

    def _stalled_memory(self, site: Site, systems: Iterable[System]) -> list[Row]:
        """Of a stalled stream; once, while the processes are fresh, because memory that was freed is not given back."""
        rows = []
        for system in systems:
            if system.roots and system.path == OPEN and any(w.name == "trip-stalled" for w in self.workloads):
                growth = stalled_memory(Measurement(site, system, self.seconds, self.warm_up))
                rows.append(median_row(_who(system, "trip-stalled"), "stalled", METRICS["stalled"][0], [growth]))
        return rows

    def _fleet(self, site: Site, agents: int) -> list[Row]:
        self._say(f"{agents} idle agents")
        try:
            outcome = fleet.measure(site, agents, 20.0)
        except (BenchError, OSError) as error:
            self._left_out(f"{agents} idle agents: {error}")
            return []
        who = {"name": "rtunnel-tls", "system": "rtunnel", "mode": "tls", "path": "open port", "workload": "fleet"}
        return [median_row(who, metric, unit, [value]) for metric, (value, unit) in outcome.figures().items()]

    def _left_out(self, note: str) -> None:
        self.missing.append(note)
        self.console.print(f"[yellow]left out:[/] {note}")

    def _say(self, text: str) -> None:
        self.console.print(text)


def _who(system: System, workload: str) -> dict[str, str]:
    return {
        "name": system.name, "system": system.product, "mode": system.mode, "path": system.path, "workload": workload,
        "reference": system.reference,
    }  # fmt: skip


def _versions(systems: Iterable[System]) -> dict[str, str]:
    names = {system.name for system in systems}
    found = [d for d in DEPLOYMENTS if d.preflight and not names.isdisjoint(d.systems)]
    return {d.preflight[0]: version(d.preflight[0]) for d in found}


def _raise_descriptors() -> None:
    """For us and all that we start; as far as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(DESCRIPTORS, hard), max(DESCRIPTORS, hard)))
    except ValueError:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _terminated(*_: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    main()
