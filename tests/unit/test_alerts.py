"""deploy/prometheus/rules.yaml: its names exist, and each alert fires when it should and not before."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from rtunnel.cli import cli
from support.metrics_page import TABLE
from support.promql import faults, series_in

ROOT = Path(__file__).parents[2]
RULES_FILE = ROOT / "deploy/prometheus/rules.yaml"
RULES: Final[list[dict[str, Any]]] = [
    rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]
]
PAGE = (ROOT / "docs/alerts.md").read_text()
RUNBOOK = "https://docs.example/rtunnel/alerts.html#"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (package prometheus)")
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])


@each_rule
def test_an_alert_names_only_series_that_exist(rule: dict[str, Any]) -> None:
    """Series, their labels, and the words in these; a role in a matcher has the series."""
    expr = rule["expr"]
    assert faults(expr) == []
    for name, words in re.findall(r'(rtunnel_\w+)\{[^}]*role=~?"([^"]*)"', expr):
        assert set(words.split("|")) <= {row[4] for row in TABLE if row[0] in series_in(name)}


@pytest.mark.parametrize(
    "expr",
    [
        "rtunnel_strems > 1",
        "up == 0",
        "rtunnel_setup_seconds > 1",
        "sum by (colour) (rtunnel_streams)",
        'rtunnel_streams{code="accepted"}',
        'rtunnel_refusals_total{code="unknown"}',
        'rtunnel_sessions{state="used"}',
    ],
)
def test_a_wrong_name_is_found(expr: str) -> None:
    """The check above can fail: for a series, a histogram without its suffix, a label and a word."""
    assert len(faults(expr)) == 1


@each_rule
def test_an_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, Any]) -> None:
    """Each has all texts, a severity, and a section of docs/alerts.md to which its link leads."""
    texts = rule["annotations"]
    assert texts.keys() == {"summary", "description", "run", "runbook_url"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"\d+[mh]", rule.get("for", "0m"))
    assert texts["runbook_url"] == RUNBOOK + rule["alert"].lower()
    assert f"### {rule['alert']}\n" in PAGE
    assert "{{ $labels." in texts["summary"], "a summary names the process"


def test_every_section_of_the_page_has_its_alert() -> None:
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == [rule["alert"] for rule in RULES]


@each_rule
def test_the_first_command_of_an_alert_can_find_something(rule: dict[str, Any]) -> None:
    """A command of rtunnel exists, and a log event that is looked for is logged."""
    run = rule["annotations"]["run"]
    if run.startswith("rtunnel "):
        assert CliRunner().invoke(cli, [*run.split()[1:], "--help"]).exit_code == 0
    sources = "".join(
        path.read_text() for folder in ("rtunnel", "socks", "broker") for path in (ROOT / folder).rglob("*.py")
    )
    for pattern in re.findall(r"grep (?:-E )?(\S+)", run):
        for event in re.findall(r"[a-z_]+", pattern):
            assert f'"{event}"' in sources, event


#: What each alert is for, as series that have been so for two hours: "a+bxn" is n steps of a minute.
FIRES: Final[dict[str, dict[str, str]]] = {
    "RegistryAway": {'rtunnel_registry_up{role="broker"}': "0x120"},
    "RegistrySlow": {
        'rtunnel_registry_call_seconds_bucket{role="broker", call="beat", result="ok", le="0.25"}': "0+8x120",
        'rtunnel_registry_call_seconds_bucket{role="broker", call="beat", result="ok", le="0.5"}': "0+10x120",
        'rtunnel_registry_call_seconds_bucket{role="broker", call="beat", result="ok", le="+Inf"}': "0+10x120",
    },
    "HeartbeatLate": {'rtunnel_beat_age_seconds{role="broker"}': "11x120"},
    "RouteTableOld": {'rtunnel_route_table_age_seconds{role="gateway"}': "31x120"},
    "TuplesDiffer": {
        'rtunnel_tuples{role="gateway"}': "97x120",
        'rtunnel_tuples_registered{role="broker", instance="b1"}': "50x120",
        'rtunnel_tuples_registered{role="broker", instance="b2"}': "50x120",
    },
    "AgentWithoutSession": {
        'rtunnel_sessions{role="agent", state="live"}': "0x120",
        'rtunnel_sessions{role="agent", state="draining"}': "0x120",
        'rtunnel_sessions_wanted{role="agent"}': "2x120",
    },
    "AgentDegraded": {
        'rtunnel_sessions{role="agent", state="live"}': "1x120",
        'rtunnel_sessions{role="agent", state="draining"}': "0x120",
        'rtunnel_sessions_wanted{role="agent"}': "2x120",
    },
    "AgentCloned": {'rtunnel_duplicate_agents{role="broker", claim="default/a1"}': "3x120"},
    "SessionsReplaced": {
        'rtunnel_session_endings_total{role="broker", cause="replaced"}': "0+2x120",
        'rtunnel_sessions{role="broker", state="live"}': "100x120",
        'rtunnel_sessions{role="broker", state="draining"}': "0x120",
    },
    "PathDegraded": {'rtunnel_session_round_trip_seconds{role="agent", node="b1"}': "0.01x90 0.2x30"},
    "PathDegraded, lost pings": {
        'rtunnel_pings_total{role="agent"}': "0+12x120",
        'rtunnel_pings_lost_total{role="agent"}': "0+1x120",
    },
    "PathsFail": {
        'rtunnel_refusals_total{role="gateway", code="agent_unavailable", worker="1"}': "0+10x120",
        'rtunnel_refusals_total{role="gateway", code="dial_timeout", worker="2"}': "0+10x120",
        'rtunnel_streams_accepted_total{role="gateway", worker="1"}': "0+100x120",
        'rtunnel_streams_accepted_total{role="gateway", worker="2"}': "0+100x120",
    },
    "UnknownTargets": {'rtunnel_refusals_total{role="gateway", code="unknown_target"}': "0+10x100 1000+100x20"},
    "UnknownTargets, after none": {'rtunnel_refusals_total{role="gateway", code="unknown_target"}': "0x100 0+30x20"},
    "SetupSlow": {
        'rtunnel_setup_seconds_bucket{role="gateway", code="accepted", le="1.0"}': "0+90x120",
        'rtunnel_setup_seconds_bucket{role="gateway", code="accepted", le="2.5"}': "0+100x120",
        'rtunnel_setup_seconds_bucket{role="gateway", code="accepted", le="+Inf"}': "0+100x120",
    },
    "ClientsTurnedAway": {'rtunnel_refusals_total{role="gateway", code="not_authorised"}': "0+100x120"},
    "ProofFailed": {'rtunnel_proof_failures_total{role="gateway", code="not_proven"}': "0x115 1x5"},
    "RulesRejected": {'rtunnel_files_rejected{role="gateway"}': "1x120"},
    "NotReady": {'rtunnel_ready{role="gateway"}': "0x120", 'rtunnel_draining{role="gateway"}': "0x120"},
    "ClockWrong": {'rtunnel_registry_clock_offset_seconds{role="broker"}': "-6x120"},
    "ClockWrong, by Dials": {'rtunnel_dials_expired_total{role="broker"}': "0+1x120"},
    "PortRangeNearlyUsed": {
        'rtunnel_ports{role="broker", range="guarded", state="free"}': "14x120",
        'rtunnel_ports{role="broker", range="guarded", state="used"}': "60x120",
        'rtunnel_ports{role="broker", range="guarded", state="resting"}': "26x120",
        'rtunnel_ports{role="broker", range="guarded", state="foreign"}': "0x120",
    },
    "DescriptorsNearlyUsed": {
        'rtunnel_descriptors{role="broker"}': "900x120",
        'rtunnel_descriptor_limit{role="broker"}': "1024x120",
    },
    "WorkersDie": {'rtunnel_worker_up{role="broker", worker="2"}': "0x120"},
    "CertificateEnds": {'rtunnel_certificate_seconds_left{role="agent"}': "14000-60x120"},
    "AuthorityAway": {'rtunnel_authority_up{role="gateway"}': "0x120"},
    "OldTrustList": {
        'rtunnel_trust_list_number{role="authority", instance="a"}': "9x120",
        'rtunnel_trust_list_number{role="broker", instance="b"}': "8x120",
        'rtunnel_trust_list_number{role="agent", instance="c"}': "7x120",
    },
}
#: What fires nothing. An agent's trust list may be older than the others', and targets that no
#: agent answers for may be asked for often, as long as that is nothing new.
QUIET: Final[dict[str, dict[str, str]]] = {
    "a healthy cluster": {
        'rtunnel_registry_up{role="broker"}': "1x120",
        'rtunnel_ready{role="gateway"}': "1x120",
        'rtunnel_draining{role="gateway"}': "0x120",
        'rtunnel_beat_age_seconds{role="broker"}': "3x120",
        'rtunnel_route_table_age_seconds{role="gateway"}': "1x120",
        'rtunnel_tuples{role="gateway"}': "200x120",
        'rtunnel_tuples_registered{role="broker", instance="b1"}': "100x120",
        'rtunnel_tuples_registered{role="broker", instance="b2"}': "100x120",
        'rtunnel_duplicate_agents{role="broker", claim=""}': "0x120",
        'rtunnel_registry_clock_offset_seconds{role="broker"}': "0.01x120",
        'rtunnel_dials_expired_total{role="broker"}': "3x120",
        'rtunnel_files_rejected{role="gateway"}': "0x120",
        'rtunnel_sessions{role="agent", state="live"}': "2x120",
        'rtunnel_sessions{role="agent", state="draining"}': "0x120",
        'rtunnel_sessions_wanted{role="agent"}': "2x120",
        'rtunnel_session_round_trip_seconds{role="agent", node="b1"}': "0.01x120",
        'rtunnel_pings_total{role="agent"}': "0+12x120",
        'rtunnel_pings_lost_total{role="agent"}': "0x120",
        'rtunnel_refusals_total{role="gateway", code="agent_unavailable"}': "0+1x120",
        'rtunnel_refusals_total{role="gateway", code="unknown_target"}': "0+1000x120",
        'rtunnel_refusals_total{role="gateway", code="not_authorised"}': "0+10x120",
        'rtunnel_streams_accepted_total{role="gateway"}': "0+100x120",
        'rtunnel_proof_failures_total{role="gateway", code="not_proven"}': "3x120",
        'rtunnel_certificate_seconds_left{role="agent"}': "40000-60x120",
        'rtunnel_certificate_seconds_left{role="broker"}': "2000000-60x120",
        'rtunnel_ca_seconds_left{role="authority"}': "200000000-60x120",
        'rtunnel_renewal_failed{role="agent"}': "0x120",
        'rtunnel_authority_up{role="gateway"}': "1x120",
        'rtunnel_store_up{role="authority"}': "1x120",
        'rtunnel_trust_list_number{role="authority"}': "9x120",
        'rtunnel_trust_list_number{role="broker"}': "9x120",
        'rtunnel_trust_list_number{role="agent"}': "7x120",
        'rtunnel_worker_up{role="broker", worker="2"}': "1x120",
        'rtunnel_worker_restarts_total{role="broker", worker="2"}': "1x120",
    },
    "just below each limit": {
        'rtunnel_beat_age_seconds{role="broker"}': "10x120",
        'rtunnel_route_table_age_seconds{role="gateway"}': "30x120",
        'rtunnel_tuples{role="gateway"}': "98x120",
        'rtunnel_tuples_registered{role="broker"}': "100x120",
        'rtunnel_registry_clock_offset_seconds{role="broker"}': "-5x120",
        'rtunnel_descriptors{role="broker"}': "819x120",
        'rtunnel_descriptor_limit{role="broker"}': "1024x120",
        'rtunnel_ports{role="broker", range="guarded", state="free"}': "15x120",
        'rtunnel_ports{role="broker", range="guarded", state="used"}': "85x120",
        'rtunnel_session_round_trip_seconds{role="agent", node="near"}': "0.001x90 0.04x30",
        'rtunnel_session_round_trip_seconds{role="agent", node="far"}': "0.06x120",
        'rtunnel_pings_total{role="agent"}': "0+100x120",
        'rtunnel_pings_lost_total{role="agent"}': "0+5x120",
        'rtunnel_refusals_total{role="gateway", code="unknown_target"}': "0x100 0+10x20",
        'rtunnel_refusals_total{role="gateway", code="not_authorised"}': "0+60x120",
        'rtunnel_session_endings_total{role="broker", cause="replaced"}': "0+1x120",
        'rtunnel_sessions{role="broker", state="live"}': "400x120",
        'rtunnel_setup_seconds_bucket{role="gateway", code="accepted", le="1.0"}': "0+96x120",
        'rtunnel_setup_seconds_bucket{role="gateway", code="accepted", le="+Inf"}': "0+100x120",
        'rtunnel_registry_call_seconds_bucket{role="broker", call="beat", result="ok", le="0.25"}': "0+96x120",
        'rtunnel_registry_call_seconds_bucket{role="broker", call="beat", result="ok", le="+Inf"}': "0+100x120",
        'rtunnel_registry_call_seconds_bucket{role="gateway", call="follow_once", result="ok", le="1.0"}': "0x120",
        'rtunnel_registry_call_seconds_bucket{role="gateway", call="follow_once", result="ok", le="+Inf"}': "0+60x120",
        'rtunnel_ready{role="gateway"}': "0x120",
        'rtunnel_draining{role="gateway"}': "1x120",
        'rtunnel_certificate_seconds_left{role="agent"}': "22000-60x120",
        'rtunnel_worker_restarts_total{role="broker", worker="2"}': "0x110 1 2x9",
    },
    "faults that end by themselves": {
        'rtunnel_registry_up{role="broker"}': "1x118 0 1x2",
        'rtunnel_sessions{role="agent", state="live"}': "2x118 1x2",
        'rtunnel_sessions{role="agent", state="draining"}': "0x120",
        'rtunnel_sessions_wanted{role="agent"}': "2x120",
        'rtunnel_beat_age_seconds{role="broker"}': "3x118 12 3x2",
        'rtunnel_ready{role="broker"}': "1x118 0x2",
        'rtunnel_authority_up{role="gateway"}': "1x115 0x5",
    },
}


def test_every_alert_has_a_case() -> None:
    assert list(dict.fromkeys(case.partition(",")[0] for case in FIRES)) == [rule["alert"] for rule in RULES]


@pytest.mark.parametrize("case", [*FIRES, *QUIET])
def test_the_cases_are_made_of_series_that_exist(case: str) -> None:
    assert not [fault for name in (FIRES | QUIET)[case] for fault in faults(name)]


@needs_promtool
@pytest.mark.parametrize("case", [*FIRES, *QUIET])
def test_prometheus_fires_the_alert_and_no_other(tmp_path: Path, case: str) -> None:
    """`promtool test rules`: after two hours one alert of this name, and in quiet cases none."""
    series, alert = (FIRES | QUIET)[case], case.partition(",")[0]
    firing = 'count by (alertname) (ALERTS{alertstate="firing"} == 1)'
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if case in FIRES else []
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": firing, "eval_time": "119m", "exp_samples": expected}],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES_FILE)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_has_nothing_to_say_of_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint-fatal", str(RULES_FILE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
