"""The bench measures what it says: its load through nothing at all, and its arithmetic. No figure is judged."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import load
from bench.deployments import Site, System, none, none_long
from bench.load import UNITS
from bench.procs import Processes
from bench.report import Row, Run, judge, write_page
from bench.workloads import WORKLOADS, Measurement, Worker, Workload, between, jain, percentiles

# The load is forked, and other tests may have left threads behind: they hold nothing that the load uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A target, and nothing else."""
    made = Site(tmp_path, Processes(tmp_path))
    yield made
    made.end()


@pytest.fixture
def bare(site: Site) -> System:
    """No tunnel."""
    return next(none(site))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_workload_gives_figures_without_a_tunnel(site: Site, bare: System, workload: Workload) -> None:
    figures = workload.measure(Measurement(site, bare, 0.1, 0.02))
    assert figures[workload.shown[0]] > 0
    assert figures["left"] == 0
    assert 0 < figures["load"] < 3


def test_bytes_come_late_over_the_long_way(site: Site) -> None:
    """And the relay of the long way lets go of ended connections."""
    system = next(none_long(site))
    measurement = Measurement(site, system, 0.2, 0.0)
    worker = Worker(load.round_trips, system.way, (64,))
    with measurement.running(worker) as samples:
        first, second = measurement.two_looks(worker)
    assert min(between(samples[0], first.time, second.time)) >= 0.05
    assert worker.board[UNITS] > 0
    assert measurement.left == 0


def test_percentiles_and_fairness() -> None:
    samples = array("d", [1.0, 0.5, 2.0, 0.1, 3.0, 0.3, 9.0, 0.7])  # (end, duration)
    assert between(samples, 1.5, 3.5) == [0.1, 0.3]
    assert percentiles([0.1, 0.2, 0.3]) == {"p50": 2e5, "p99": 3e5, "p999": 3e5}
    assert jain([5, 5, 5]) == 1
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)


def test_a_run_survives_its_file_and_becomes_a_page(tmp_path: Path) -> None:
    """Ratios are taken against frp in the same mode, and the worse of two workloads decides."""
    rows = []
    for name, system, up, down in (("rtunnel-tls", "rtunnel", 6.0, 4.0), ("frp-tls", "frp", 3.0, 3.0)):
        for workload, value in (("up", up), ("down", down)):
            who = (name, system, "tls", "open port", workload, "rate")
            rows.append(Row(*who, value, "Gbit/s", (value - 1, value, value + 1), "frp-tls"))
    about = {
        "date": "d",
        "rtunnel": "r",
        "python": "p",
        "cores": 2,
        "cpu": "c",
        "kernel": "k",
        "rounds": 3,
        "seconds": 1,
    }
    Run(about, rows, ["chisel: not here"]).save(tmp_path / "bench.json")
    run = Run.load(tmp_path / "bench.json")
    assert run.rows == rows
    throughput = next(judge(run))
    assert (throughput.measured, throughput.word) == ("up 2.000 x, down 1.333 x", "fail")
    page = write_page(run, tmp_path).read_text()
    assert "| rtunnel-tls | 6.00 [5.00..7.00] | 2.00 x |" in page
    assert "chisel: not here" in page
    assert (tmp_path / "benchmarks/up-rate.svg").read_text().startswith("<svg")
