"""The bench measures what it says: its load through nothing at all, and its arithmetic. No figure is judged."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import load
from bench.__main__ import choose
from bench.deployments import Site, System, none, none_long
from bench.load import UNITS
from bench.procs import BenchError, Processes
from bench.report import Row, Run, changes, judge, median_row, write_page
from bench.revision import ROOT, short_name, unpack
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


def test_a_measurement_waits_for_something_to_measure(site: Site, bare: System) -> None:
    """On a busy machine no connection may be made in the time of a short one."""
    (conn1,) = (workload for workload in WORKLOADS if workload.name == "conn1")
    figures = conn1.measure(Measurement(site, bare, 0.0, 0.0))
    assert figures["conns"] > 0 and figures["load"] > 0


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


def rounds_of(name: str, metric: str, *rounds: float) -> Row:
    who = {"name": name, "system": "rtunnel", "mode": "tls", "path": "open port", "workload": "up"}
    return median_row(who, metric, "x", rounds)


@pytest.mark.parametrize(
    ("metric", "before", "after", "word"),
    [
        ("rate", (4, 5, 6), (3, 4, 5), "worse"),
        ("rate", (4, 5, 6), (5, 6, 7), "better"),
        ("cpu_gb", (1.0, 1.2, 1.4), (1.2, 1.4, 1.6), "worse"),
        ("cpu_gb", (1.0, 1.2, 1.4), (0.8, 1.0, 1.2), "better"),
        ("cpu_gb", (1.0, 1.2, 1.4), (1.2, 1.4, 1.3), "same"),
        ("cpu_gb", (1.0, 1.0, 1.0), (1.04, 1.04, 1.04), "same"),
    ],
)
def test_a_change_is_one_only_if_every_round_shows_it(
    metric: str, before: tuple[float, ...], after: tuple[float, ...], word: str
) -> None:
    """More is better of a rate, less of CPU time; 5 % is the least that counts."""
    rows = [rounds_of("rtunnel-tls", metric, *after), rounds_of("rtunnel-tls@1234567", metric, *before)]
    (change,) = changes(Run({"against": "1234567"}, rows, []))
    assert change.word == word
    assert not list(changes(Run({"against": ""}, rows, [])))


def test_systems_of_another_revision_are_chosen_beside_ours() -> None:
    names, _ = choose("", quick=True, against="1234567")
    assert {"rtunnel-tls", "rtunnel-tls@1234567"} <= names
    assert not [name for name in names if not name.startswith("rtunnel")]
    assert choose("rtunnel-tls,none", quick=False, against="1234567")[0] == {
        "rtunnel-tls",
        "rtunnel-tls@1234567",
        "none",
    }


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git repository")
def test_another_revision_is_unpacked_and_found_before_ours(tmp_path: Path) -> None:
    """Its files, not those of the installed rtunnel; an unknown one is a clear error."""
    code = unpack("HEAD", tmp_path / "other")
    assert code.named("rtunnel-tls") == f"rtunnel-tls@{code.revision}"
    assert (tmp_path / "other/rtunnel/cli.py").exists()
    fitting = code.fitting({"broker": {"listen": "127.0.0.1:0", "of_tomorrow": 1}})
    assert fitting == {"broker": {"listen": "127.0.0.1:0"}}
    with pytest.raises(BenchError, match="no-such-revision"):
        short_name("no-such-revision")


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
