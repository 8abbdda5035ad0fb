"""From the rounds' figures to rows, a table, verdicts, `bench.json`, plots and `docs/benchmarks.md`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.plots import Bar, bars, number
from bench.workloads import METRICS, WORKLOADS, Workload


@dataclass(frozen=True)
class Row:
    """One figure: the median over the rounds, and all of them."""

    name: str  # of the system, like frp-tls-socks
    system: str
    mode: str
    path: str
    workload: str
    metric: str
    value: float
    unit: str
    rounds: tuple[float, ...]
    reference: str = ""

    @property
    def low(self) -> float:
        """The least round."""
        return min(self.rounds)

    @property
    def high(self) -> float:
        """The largest round."""
        return max(self.rounds)


@dataclass
class Run:
    """A whole run, as it stands in bench.json."""

    about: dict[str, Any]
    rows: list[Row]
    missing: list[str]

    def find(self, name: str, workload: str, metric: str) -> Row | None:
        """That figure."""
        for row in self.rows:
            if (row.name, row.workload, row.metric) == (name, workload, metric):
                return row
        return None

    def names(self, workload: str) -> list[str]:
        """The systems that have figures of this workload, in order."""
        return list(dict.fromkeys(row.name for row in self.rows if row.workload == workload))

    def ratio(self, row: Row | None, other: Row | None) -> float | None:
        """The first against the second; None when one is missing."""
        return row.value / other.value if row and other and other.value else None

    def save(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) | {"min": row.low, "max": row.high} for row in self.rows]
        path.write_text(json.dumps({"about": self.about, "missing": self.missing, "rows": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """From JSON."""
        data = json.loads(path.read_text())
        names = {field.name for field in fields(Row)}
        rows = [Row(**{k: v for k, v in row.items() if k in names}) for row in data["rows"]]
        rows = [replace(row, rounds=tuple(row.rounds)) for row in rows]
        return cls(data["about"], rows, data["missing"])


def median_row(row: dict[str, str], metric: str, unit: str, rounds: Sequence[float]) -> Row:
    """A row of several rounds."""
    return Row(**row, metric=metric, unit=unit, value=statistics.median(rounds), rounds=tuple(rounds))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model, memory = _field("/proc/cpuinfo", "model name"), _field("/proc/meminfo", "MemTotal").split()[0]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "rtunnel": git.stdout.strip() or "?",
    }


def _field(path: str, name: str) -> str:
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "0")


# --- the table ----------------------------------------------------------------------------------------------------


def titles(run: Run) -> Iterator[Workload]:
    """The workloads that were done."""
    done = {row.workload for row in run.rows}
    return (workload for workload in WORKLOADS if workload.name in done)


#: Metrics that no ratio is shown for.
_ALONE: Final = ("errors", "jain", "stalled", "p999", "left")


def cells(run: Run, workload: Workload) -> tuple[list[str], list[list[str]]]:
    """A workload's table: headings, and a line for each system."""
    headings = ["system"]
    for metric in workload.shown:
        headings += [f"{metric} {METRICS[metric][0]}".strip(), *(["/frp"] if metric not in _ALONE else [])]
    lines = []
    for name in run.names(workload.name):
        line = [name]
        for metric in workload.shown:
            row = run.find(name, workload.name, metric)
            line.append(cell(row))
            if metric not in _ALONE:
                line.append(against_frp(run, row))
        lines.append([*line, *_loads(run, name, workload.name)])
    return [*headings, "load", "others"], lines


def cell(row: Row | None) -> str:
    """The median, and the least and largest round; of failures the largest alone."""
    if row is None:
        return "-"
    if row.metric in ("errors", "left"):
        return number(row.high)
    return f"{number(row.value)} [{number(row.low)}..{number(row.high)}]"


def against_frp(run: Run, row: Row | None) -> str:
    """Like "1.53 x"; a dash where there is nothing to compare."""
    if row is None or not row.reference or row.name == row.reference:
        return "-"
    ratio = run.ratio(row, run.find(row.reference, row.workload, row.metric))
    return f"{ratio:.2f} x" if ratio is not None else "-"


def _loads(run: Run, name: str, workload: str) -> list[str]:
    rows = [run.find(name, workload, metric) for metric in ("load", "others")]
    return [f"{row.value:.2f}" if row else "-" for row in rows]


def show(run: Run, console: Console) -> None:
    """Everything, on the terminal."""
    for workload in titles(run):
        headings, lines = cells(run, workload)
        table = Table(title=workload.title, title_justify="left", header_style="bold", pad_edge=False)
        for number_, heading in enumerate(headings):
            table.add_column(heading, justify="left" if number_ == 0 else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line, style="cyan" if line[0].startswith("rtunnel") else None)
        console.print(table)
    if fleet := fleet_lines(run):
        table = Table(title=fleet[0], title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for line in fleet[1]:
            table.add_row(*line)
        console.print(table)
    _show_changes(run, console)
    for note in run.missing:
        console.print(f"[yellow]left out:[/] {note}")
    _show_verdicts(run, console)


def fleet_lines(run: Run) -> tuple[str, list[list[str]]] | None:
    """Title and lines of the idle agents' table."""
    rows = [row for row in run.rows if row.workload == "fleet"]
    if not rows:
        return None
    title = f"{run.about.get('fleet', '?')} idle agents on one broker, TLS"
    return title, [[row.metric, f"{number(row.value)} {row.unit}".strip()] for row in rows]


def _show_verdicts(run: Run, console: Console) -> None:
    verdicts = list(judge(run))
    if not verdicts:
        return
    table = Table(title="What it must show", title_justify="left", pad_edge=False)
    for heading in ("what", "rtunnel", "against", "limit", "measured", ""):
        table.add_column(heading)
    for verdict in verdicts:
        colour = {"pass": "green", "fail": "red"}.get(verdict.word, "yellow")
        table.add_row(*_words(verdict)[:-1], f"[{colour}]{verdict.word}[/]")
    console.print(table)


# --- against another revision ------------------------------------------------------------------------------------


#: A change of less than this share is none.
NOTABLE: Final = 0.05


@dataclass(frozen=True)
class Change:
    """One figure of a system beside the same one of another revision. `ratios` are ours by theirs, round by round."""

    name: str
    workload: str
    metric: str
    before: Row
    after: Row
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)

    @property
    def word(self) -> str:
        """better, worse, or same: a notable change must show in every round."""
        more = self.metric in METRICS and METRICS[self.metric][2]
        gains = [ratio if more else 1 / ratio for ratio in self.ratios]
        if min(gains) > 1 and statistics.median(gains) >= 1 + NOTABLE:
            return "better"
        if max(gains) < 1 and statistics.median(gains) <= 1 / (1 + NOTABLE):
            return "worse"
        return "same"


def changes(run: Run) -> Iterator[Change]:
    """Every figure that both revisions have."""
    revision = run.about.get("against")
    for after in run.rows if revision else ():
        before = run.find(f"{after.name}@{revision}", after.workload, after.metric)
        if before is None or after.metric in (*_ALONE, "load", "others"):
            continue
        pairs = list(zip(after.rounds, before.rounds, strict=False))
        if len(after.rounds) == len(before.rounds) and all(new > 0 and old > 0 for new, old in pairs):
            ratios = tuple(new / old for new, old in pairs)
            yield Change(after.name, after.workload, after.metric, before, after, ratios)


def change_lines(run: Run) -> Iterator[list[str]]:
    """The table's lines: system, workload, metric, theirs, ours, ratio with its least and largest round, word."""
    for change in changes(run):
        low, high = min(change.ratios), max(change.ratios)
        yield [
            change.name,
            change.workload,
            f"{change.metric} {change.after.unit}".strip(),
            cell(change.before),
            cell(change.after),
            f"{change.ratio:.2f} [{low:.2f}..{high:.2f}] x",
            change.word,
        ]


_CHANGE_HEADINGS: Final = ("system", "workload", "metric", "before", "after", "after/before", "")


def _change_title(run: Run) -> str:
    return f"Against {run.about.get('against')}, round by round"


def _show_changes(run: Run, console: Console) -> None:
    lines = list(change_lines(run))
    if not lines:
        return
    table = Table(title=_change_title(run), title_justify="left", pad_edge=False)
    for heading in _CHANGE_HEADINGS:
        table.add_column(heading, no_wrap=True)
    for line in lines:
        colour = {"better": "green", "worse": "red"}.get(line[-1], "default")
        table.add_row(*line[:-1], f"[{colour}]{line[-1]}[/]")
    console.print(table)


# --- what it must show --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One cell of "What it must show"."""

    what: str
    system: str
    against: str
    limit: str
    measured: str
    word: str  # pass, fail, or "not measured"


def _words(verdict: Verdict) -> list[str]:
    return list(astuple(verdict))


#: what, workloads (the worst of them counts), metric, more is better, limits for open TLS, open plain, SOCKS5 TLS
_AGAINST_FRP: Final = (
    ("stream throughput", ("up", "down"), "rate", True, (1.5, 2.0, 1.2)),
    ("CPU s/GB", ("up", "down"), "cpu_gb", False, (0.6, 0.55, 0.8)),
    ("round trip p50", ("trip64",), "p50", False, (0.65, 0.65, 0.9)),
    ("CPU/round trip", ("trip64",), "cpu_trip", False, (0.5, 0.5, 0.75)),
    ("connections/s, 64 clients", ("conn64",), "conns", True, (1.6, 1.6, 1.2)),
    ("CPU/connection", ("conn64",), "cpu_conn", False, (0.5, 0.45, 0.8)),
)
_COLUMNS: Final = (("rtunnel-tls", "frp-tls"), ("rtunnel-plain", "frp-plain"), ("rtunnel-tls-socks", "frp-tls-socks"))
_HAPROXY: Final = (
    ("CPU s/GB", ("up", "down"), "cpu_gb"), ("CPU/round trip", ("trip64",), "cpu_trip"),
    ("CPU/connection", ("conn64",), "cpu_conn"),
)  # fmt: skip


def judge(run: Run) -> Iterator[Verdict]:
    """Every cell, measured or not; nothing when rtunnel or frp were not part of the run."""
    names = {row.name for row in run.rows}
    for column, (ours, theirs) in enumerate(_COLUMNS):
        if {ours, theirs} <= names:
            for what, workloads, metric, more, limits in _AGAINST_FRP:
                # A signature for each connection is something that frp does not have: it has a limit of its own.
                bare = f"{ours}-noproof"
                pair = (bare if "conn64" in workloads and bare in names else ours, theirs)
                yield _compare(run, what, workloads, metric, pair, limits[column], more=more)
    if {"rtunnel-tls-socks-noproof", "frp-tls-socks"} <= names:
        pair = ("rtunnel-tls-socks", "frp-tls-socks")
        yield _compare(run, "CPU/connection, proved", ("conn64",), "cpu_conn", pair, 0.95, more=False)
    if {"rtunnel-plain", "haproxy"} <= names:
        for what, workloads, metric in _HAPROXY:
            yield _compare(run, what, workloads, metric, ("rtunnel-plain", "haproxy"), 1.15, more=False)
    for mode in ("tls", "noise", "plain"):
        ours, theirs = f"rtunnel-{'plain' if mode == 'plain' else 'tls'}", f"rathole-{mode}"
        if {ours, theirs} <= names:
            yield _compare(run, "stream throughput", ("up", "down"), "rate", (ours, theirs), 1.0, more=True)
    yield from _neighbours(run)
    yield from _stalled(run)
    yield from _left(run)
    yield from _long_way(run)
    yield from _fleet(run)


def _compare(
    run: Run, what: str, workloads: Iterable[str], metric: str, pair: tuple[str, str], limit: float, *, more: bool
) -> Verdict:
    ratios = {
        workload: run.ratio(run.find(pair[0], workload, metric), run.find(pair[1], workload, metric))
        for workload in workloads
    }
    found = [ratio for ratio in ratios.values() if ratio is not None]
    word = "not measured"
    if len(found) == len(ratios):
        word = "pass" if (min(found) >= limit if more else max(found) <= limit) else "fail"
    measured = ", ".join(f"{workload} {ratio:.3f} x" for workload, ratio in ratios.items() if ratio is not None)
    return Verdict(what, *pair, f"{'>=' if more else '<='} {limit:g} x", measured, word)


def _neighbours(run: Run) -> Iterator[Verdict]:
    """The 99th percentile beside others against the quiet one; and what the same costs without a tunnel."""
    for name in ("rtunnel-tls", "rtunnel-plain", "rtunnel-tls-socks"):
        for workload in ("trip-down", "trip-up", "trip-stalled"):
            more, bare = _added(run, name, workload), _added(run, "none", workload)
            if more is not None:
                beside = f" (none: {bare:+.2f} ms)" if bare is not None else ""
                title = next(w.title for w in WORKLOADS if w.name == workload).partition(" beside ")[2]
                word = "pass" if more <= 1 else "fail"
                yield Verdict(f"p99 beside {title}", name, "the quiet one", "+ 1 ms", f"{more:+.2f} ms{beside}", word)


def _added(run: Run, name: str, workload: str) -> float | None:
    """Milliseconds by which p99 is worse than the quiet one."""
    quiet, busy = run.find(name, "trip64", "p99"), run.find(name, workload, "p99")
    return (busy.value - quiet.value) / 1000 if quiet and busy else None


def _stalled(run: Run) -> Iterator[Verdict]:
    """A stalled stream may hold its window: nobody's has grown, because nobody ever read."""
    for name in ("rtunnel-tls", "rtunnel-plain"):
        row = run.find(name, "trip-stalled", "stalled")
        if row:
            word = "pass" if row.value <= 256 else "fail"
            yield Verdict("memory of a stalled stream", name, "", "<= 256 KiB", f"{number(row.value)} KiB", word)


def _left(run: Run) -> Iterator[Verdict]:
    """Connections that were forgotten, over the whole run."""
    for name in ("rtunnel-tls", "rtunnel-plain", "rtunnel-tls-socks", "rtunnel-plain-socks"):
        rows = [row for row in run.rows if row.name == name and row.metric == "left"]
        if rows:
            left = sum(sum(row.rounds) for row in rows)
            yield Verdict("connections left open", name, "", "0", number(left), "fail" if left else "pass")


def _long_way(run: Run) -> Iterator[Verdict]:
    for workload in ("up", "down"):
        row = run.find("rtunnel-tls-long", workload, "rate")
        if row:
            word = "pass" if row.value >= 1 else "fail"
            yield Verdict(f"one stream {workload}, 50 ms", row.name, "", ">= 1 Gbit/s", f"{row.value:.2f}", word)


def _fleet(run: Run) -> Iterator[Verdict]:
    limits: tuple[tuple[str, float], ...] = (
        ("pss per agent", 40), ("connect storm", 60), ("agents not up", 0), ("idle heartbeats", 10),
    )  # fmt: skip
    for metric, limit in limits:
        row = run.find("rtunnel-tls", "fleet", metric)
        if row:
            word = "pass" if row.value <= limit else "fail"
            count = run.about.get("fleet", "?")
            yield Verdict(
                f"{count} agents: {metric}", row.name, "", f"<= {limit:g} {row.unit}", number(row.value), word
            )


# --- plots and the page -------------------------------------------------------------------------------------------

#: Which figures get a picture: workload, metric.
_PLOTS: Final = (
    ("up", "rate"), ("up", "cpu_gb"), ("down", "rate"), ("down", "cpu_gb"), ("trip64", "p50"), ("trip64", "cpu_trip"),
    ("conn64", "conns"), ("conn64", "cpu_conn"), ("par100", "rate"), ("trip-down", "p99"), ("trip-stalled", "p99"),
)  # fmt: skip


def plot_name(workload: str, metric: str) -> str:
    """Of the file."""
    return f"{workload}-{metric.replace('_', '-')}.svg"


def write_plots(run: Run, directory: Path) -> int:
    """One SVG for each figure that has a picture; how many. Those of an earlier run go."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.svg"):
        old.unlink()
    drawn = 0
    for workload in titles(run):
        for metric in [metric for name, metric in _PLOTS if name == workload.name]:
            rows = [row for row in run.rows if (row.workload, row.metric) == (workload.name, metric)]
            unit, meaning, more = METRICS[metric]
            better = "more is better" if more else "less is better"
            # Without a tunnel there is nothing to compare: the ceiling stands in the table.
            shown = [Bar(row.name, row.system, row.value, row.low, row.high) for row in rows if row.system != "none"]
            chart = bars(f"{workload.title}: {meaning}", unit, better, shown)
            (directory / plot_name(workload.name, metric)).write_text(chart)
            drawn += 1
    return drawn


_PAGE: Final = """\
# Benchmarks

Every system ran on one machine, in one run, in interleaved rounds. `make bench` (`tests/bench`)
ran them and wrote this page. Each cell has the median, and in brackets the lowest and the highest
round.

- `/frp` is the ratio against frp in the same mode and path of this run.
- CPU times are user and system time of all threads of the tunnel's own processes. On a machine that
  others use as well they are the steady figures.
- `load` and `others` are the cores that the load generator and everything else on the machine used
  meanwhile.
- `none` is the load generator without a tunnel: its own ceiling.

{about}

| system | what it is |
| --- | --- |
| `rtunnel-*` | broker and agent on an open port (2 processes) |
| `rtunnel-*-socks` | the same with the gateway (3 processes), which looks targets up in a real Redis |
| `frp-tls` | frp with its defaults: yamux and TLS |
| `frp-plain` | frp with yamux and without TLS |
| `frp-nomux` | frp without yamux and without TLS |
| `frp-*-socks` | frp with the socks5 plugin of frpc, still 2 processes |
| `chisel`, `ssh` | always SSH; `ssh` is `ssh -R` |
| `haproxy` | two HAProxies in a row with one thread each, splicing: no tunnel, but the limit of a relay in C |
| `*-long` | the same system with {long:g} ms of round trip time between its two processes |
"""


def write_page(run: Run, docs: Path) -> Path:
    """`docs/benchmarks.md`, its plots beside it."""
    about = run.about
    versions = ", ".join(f"{name} {text}" for name, text in about.get("versions", {}).items())
    facts = (
        f"**{about['date']}**, rtunnel {about['rtunnel']}, Python {about['python']}; {about['cores']} cores of"
        f" {about['cpu']}, Linux {about['kernel']}; {about['rounds']} rounds of {about['seconds']:g} s."
        f" Peers: {versions or 'none'}."
    )
    parts = [_PAGE.format(about=textwrap.fill(facts, 100, break_on_hyphens=False), long=about.get("long_way_ms", 50))]
    parts += [f"Left out: {note}\n" for note in run.missing]
    if verdicts := list(judge(run)):
        head = ["what", "rtunnel", "against", "limit", "measured", "verdict"]
        parts += ["## What it must show\n", _markdown(head, map(_words, verdicts))]
    pictures = docs / "benchmarks"
    write_plots(run, pictures)
    for workload in titles(run):
        parts += [f"## {workload.title}\n", _markdown(*cells(run, workload))]
        for metric in workload.shown:
            name = plot_name(workload.name, metric)
            if (pictures / name).exists():
                parts.append(f"![{workload.title}: {METRICS[metric][1]}](benchmarks/{name})\n")
    if fleet := fleet_lines(run):
        parts += [f"## {fleet[0]}\n", _markdown(["metric", "value"], fleet[1])]
    path = docs / "benchmarks.md"
    path.write_text("\n".join(parts))
    return path


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows: list[Sequence[str]] = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
