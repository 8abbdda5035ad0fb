"""deploy/grafana: each dashboard is one that Grafana takes, and every query names series that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from rtunnel import metrics
from support.promql import COMMON, SERIES, faults, series_in

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy/grafana").glob("*.json"))
DASHBOARDS: Final[dict[str, dict[str, Any]]] = {path.stem: json.loads(path.read_text()) for path in FILES}
#: Units of Grafana that the panels use.
UNITS = {"short", "ops", "s", "Bps", "bytes", "percentunit"}
#: Columns of Grafana's grid.
COLUMNS = 24
#: Series without a panel, each with its reason: none.
NOT_SHOWN: Final[set[str]] = set()

each = pytest.mark.parametrize("name", DASHBOARDS)
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (package prometheus)")


def panels(name: str) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something."""
    return [panel for panel in DASHBOARDS[name]["panels"] if panel["type"] != "row"]


def queries(name: str) -> list[str]:
    """The PromQL of all panels."""
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


def test_there_are_the_five() -> None:
    assert list(DASHBOARDS) == ["agents", "gateways", "node", "overview", "refusals"]
    assert {board["uid"] for board in DASHBOARDS.values()} == {f"rtunnel-{name}" for name in DASHBOARDS}


@each
def test_a_dashboard_chooses_its_source_and_its_processes(name: str) -> None:
    """Nothing in it is of one Grafana: the data source, the job and the namespace are variables."""
    board = DASHBOARDS[name]
    assert board["schemaVersion"] >= 36 and board["title"] and board["description"]
    assert "id" not in board, "Grafana gives a number of its own"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "namespace", "instance"]
    for variable in list(variables.values())[1:]:
        assert faults(variable["definition"].partition(",")[0]) == []
        assert variable["allValue"] == ".*", "a target without this label is chosen too"
    for panel in panels(name):
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


@each
def test_a_panel_says_what_it_shows(name: str) -> None:
    """A title, a sentence, a unit; ids and letters once; no panel covers another."""
    all_panels = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in all_panels}) == len(all_panels)
    titles = Counter(panel["title"] for panel in panels(name))
    assert not [title for title, times in titles.items() if times > 1]
    for panel in panels(name):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
    boxes = [panel["gridPos"] for panel in all_panels]
    assert all(box["x"] + box["w"] <= COLUMNS for box in boxes)
    for one, two in combinations(boxes, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"], (one, two)


@each
def test_a_query_names_only_series_that_exist(name: str) -> None:
    """Series, labels and words; each selector takes the variables, and each legend's labels exist."""
    for panel in panels(name):
        for target in panel["targets"]:
            expr = target["expr"]
            assert faults(expr) == [], (panel["title"], expr)
            selectors = re.findall(r"rtunnel_\w+(\{[^}]*\})?", expr)
            assert all('job=~"$job", namespace=~"$namespace", instance=~"$instance"' in each for each in selectors)
            labels = COMMON.union({"le"}, *(SERIES[series].labels for series in series_in(expr)))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_every_series_has_a_panel() -> None:
    shown = {series for name in DASHBOARDS for expr in queries(name) for series in series_in(expr)}
    assert {series.name for series in metrics.SERIES} - shown == NOT_SHOWN


def test_counters_are_shown_as_rates() -> None:
    """A counter is never shown as it is."""
    for name in DASHBOARDS:
        for expr in queries(name):
            bare = re.sub(r"(rate|increase)\(rtunnel_\w+\{[^}]*\}\[[^\]]*\]\)", "", expr)
            assert not re.search(r"rtunnel_\w+_(total|bucket|count)\b", bare), expr


@needs_promtool
@each
def test_prometheus_reads_every_query(tmp_path: Path, name: str) -> None:
    rules = [
        {"record": f"query:{number}", "expr": re.sub(r"\[\$__\w+\]", "[5m]", expr)}
        for number, expr in enumerate(queries(name))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": name, "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
