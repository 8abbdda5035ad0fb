"""Series from statuses; the alerts of docs/metrics.md against the series that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from rtunnel import metrics
from rtunnel.cli import cli
from rtunnel.histogram import Histogram
from rtunnel.relay.join import Ending
from rtunnel.wire.refusal import Refusal
from support.metrics_page import RULES, RULES_FILE, TABLE
from support.scrape import parsed

WORDS = {
    "code": {code.value for code in Refusal},
    "ending": {ending.value for ending in Ending},
    "state": {"live", "draining"},
    "direction": {"up", "down"},
    "role": {"broker", "gateway", "agent", "authority"},
}

BROKER = {"role": "broker", "version": "1", "state": "draining", "sessions": 7, "registry": "timed out"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def names_in(expr: str) -> set[str]:
    return set(re.findall(r"rtunnel_\w+", expr))


def test_the_page_has_every_series() -> None:
    """What the code can give is on the page, in its order, and nothing else. Which role gives it: tests/e2e."""
    assert list(dict.fromkeys(row[0] for row in TABLE)) == [series.name for series in metrics.SERIES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_what_there_is(rule: dict[str, Any]) -> None:
    """Series, their labels, and the words in these; and it says what it means and what to do."""
    used = names_in(rule["expr"])
    assert used and used <= {series.name for series in metrics.SERIES}
    labels = {series.name: {*series.labels, "role", "worker"} for series in metrics.SERIES}
    for name, matchers in re.findall(r"(rtunnel_\w+)\{([^}]*)\}", rule["expr"]):
        for label, words in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            assert label in labels[name] and set(words.split("|")) <= WORDS[label], (name, label, words)
            if label == "role":
                assert set(words.split("|")) <= {row[4] for row in TABLE if row[0] == name}
    assert rule["annotations"].keys() == {"summary", "run"}
    assert re.fullmatch(r"\d+[mh]", rule.get("for", "0m"))


def test_an_alert_that_names_what_there_is_not_would_be_seen() -> None:
    """The test above could fail."""
    assert names_in('sum(rtunnel_strems{role="gateway"}) > 1') - {series.name for series in metrics.SERIES}


@pytest.mark.parametrize(
    "rule",
    [rule for rule in RULES if rule["annotations"]["run"].startswith("rtunnel ")],
    ids=lambda rule: rule["alert"],
)
def test_the_first_command_of_an_alert_exists(rule: dict[str, Any]) -> None:
    command = rule["annotations"]["run"].split()[1:]
    assert CliRunner().invoke(cli, [*command, "--help"]).exit_code == 0


def test_there_are_alerts() -> None:
    assert 8 <= len(RULES) <= 10


#: What each alert is for, as series that have been so for two hours: "a+bxn" is n steps of a minute.
FIRES = {
    "RegistryAway": {'rtunnel_registry_up{role="broker"}': "0x120"},
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
    "PathsFail": {
        'rtunnel_refusals_total{role="gateway", code="agent_unavailable", worker="1"}': "0+10x120",
        'rtunnel_refusals_total{role="gateway", code="dial_timeout", worker="2"}': "0+10x120",
        'rtunnel_streams_accepted_total{role="gateway", worker="1"}': "0+100x120",
        'rtunnel_streams_accepted_total{role="gateway", worker="2"}': "0+100x120",
    },
    "ClientsTurnedAway": {'rtunnel_refusals_total{role="gateway", code="not_authorised"}': "0+100x120"},
    "ProofFailed": {'rtunnel_proof_failures_total{role="gateway", code="not_proven"}': "0x115 1x5"},
    "CertificateEnds": {'rtunnel_certificate_seconds_left{role="agent"}': "14000-60x120"},
    "AuthorityAway": {'rtunnel_authority_up{role="gateway"}': "0x120"},
    "OldTrustList": {
        'rtunnel_trust_list_number{role="authority", instance="a"}': "9x120",
        'rtunnel_trust_list_number{role="broker", instance="b"}': "8x120",
        'rtunnel_trust_list_number{role="agent", instance="c"}': "7x120",
    },
    "WorkersDie": {'rtunnel_worker_up{role="broker", worker="2"}': "0x120"},
}
#: A cluster in order fires none. An agent's trust list may be older than the others'.
QUIET = {
    'rtunnel_registry_up{role="broker"}': "1x120",
    'rtunnel_sessions{role="agent", state="live"}': "2x120",
    'rtunnel_sessions{role="agent", state="draining"}': "0x120",
    'rtunnel_sessions_wanted{role="agent"}': "2x120",
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
}


def test_every_alert_has_a_case() -> None:
    assert list(FIRES) == [rule["alert"] for rule in RULES]


@needs_promtool
@pytest.mark.parametrize("case", [*FIRES, "none"])
def test_prometheus_fires_what_is_meant_and_nothing_else(tmp_path: Path, case: str) -> None:
    """The page's rules in `promtool test rules`: after two hours this one alert, and of a cluster in order none."""
    (tmp_path / "rules.yml").write_text(RULES_FILE)
    series = FIRES.get(case, QUIET)
    firing = 'count by (alertname) (ALERTS{alertstate="firing"} == 1)'
    expected = [{"labels": f'{{alertname="{case}"}}', "value": 1}] if case in FIRES else []
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": firing, "eval_time": "119m", "exp_samples": expected}],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_has_nothing_to_say_of_the_answer() -> None:
    answer = metrics.text({"role": "broker", "workers": [{"worker": 1, "restarts": 0, **BROKER, "refused": {}}]})
    done = subprocess.run(["promtool", "check", "metrics"], input=answer, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_node_that_drains() -> None:
    """Its sessions are draining ones, and a registry with a reason is away."""
    now = parsed(metrics.text(BROKER))
    assert now.counted("rtunnel_sessions", "state") == {"draining": 7}
    assert (now.value("rtunnel_draining"), now.value("rtunnel_registry_up")) == (1, 0)


def test_workers_are_told_apart() -> None:
    """One answers, one does not: of that there is what the supervisor knows itself."""
    answers = {"worker": 1, "pid": 4, "restarts": 0, **BROKER, "refused": {"bad_mac": 3}}
    silent = {"worker": 2, "pid": 5, "restarts": 4, "reason": "does not answer"}
    now = parsed(metrics.text({"role": "broker", "workers": [answers, silent]}))
    assert now.value("rtunnel_refusals_total", worker="1", code="bad_mac", role="broker") == 3
    assert now.values("rtunnel_worker_up") == [1, 0]
    assert now.values("rtunnel_worker_restarts_total") == [0, 4]
    assert not [row for row in now.families if row.name == "rtunnel_sessions" and len(row.samples) != 2]
    assert now.values("rtunnel_sessions", worker="2") == []


def test_an_agents_sessions_and_certificate() -> None:
    identity = {"ends": 1.0, "failure": "refused", "trust": {"number": 9, "generation": 2}}
    agent = {"role": "agent", "sessions": [{}, {}], "draining": ["b3"], "one_host": "h1", "identity": identity}
    now = parsed(metrics.text(agent))
    assert now.counted("rtunnel_sessions", "state") == {"live": 2, "draining": 1}
    assert (now.value("rtunnel_on_one_host"), now.value("rtunnel_renewal_failed")) == (1, 1)
    assert now.value("rtunnel_certificate_seconds_left") < 0, "it is over"
    assert (now.value("rtunnel_trust_list_number"), now.value("rtunnel_trust_list_generation")) == (9, 2)
    bare = parsed(metrics.text({**agent, "identity": None}))
    assert not bare.values("rtunnel_certificate_seconds_left") and not bare.values("rtunnel_renewal_failed")


def test_of_an_authority_that_is_not_configured_nothing_is_said() -> None:
    trust = {"number": 0, "generation": 0, "authority": "none"}
    assert not parsed(metrics.text({"role": "gateway", "trust": trust})).values("rtunnel_authority_up")
    trust["authority"] = "connection refused"
    assert parsed(metrics.text({"role": "gateway", "trust": trust})).value("rtunnel_authority_up") == 0


def test_buckets_are_cumulative() -> None:
    """As Prometheus wants them: each has all that is not longer, and the last one has all."""
    times = Histogram()
    for seconds in (0.0005, 0.0006, 0.3, 60.0):
        times.observe(seconds)
    now = parsed(metrics.text({"role": "gateway", "setup_times": [{"code": "accepted", **times.status()}]}))
    assert now.value("rtunnel_setup_seconds_bucket", code="accepted", le="0.0005") == 1, "a bound is in its bucket"
    assert now.value("rtunnel_setup_seconds_bucket", code="accepted", le="0.001") == 2
    assert now.value("rtunnel_setup_seconds_bucket", code="accepted", le="10.0") == 3
    assert now.value("rtunnel_setup_seconds_bucket", code="accepted", le="+Inf") == 4
    assert now.value("rtunnel_setup_seconds_count", code="accepted") == 4
    assert now.value("rtunnel_setup_seconds_sum", code="accepted") == pytest.approx(60.3011)


def test_a_process_with_a_reason_is_not_ready() -> None:
    assert parsed(metrics.text({"role": "broker", "reasons": ["draining"]})).value("rtunnel_ready") == 0
    agent = {"role": "agent", "reason": "", "sessions": [], "draining": []}
    assert parsed(metrics.text(agent)).value("rtunnel_ready") == 1


def test_rules_with_a_fault() -> None:
    status = {"role": "gateway", "access": {"rejected": {"policy": "line 3"}}}
    assert parsed(metrics.text(status)).value("rtunnel_files_rejected") == 1
