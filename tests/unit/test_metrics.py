"""Series from statuses; the alerts of docs/metrics.md against the series that there are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from click.testing import CliRunner

from rtunnel import metrics
from rtunnel.cli import cli
from rtunnel.relay.join import Ending
from rtunnel.wire.refusal import Refusal
from support.metrics_page import PAGE, RULES, TABLE
from support.scrape import parsed

WORDS = {
    "code": {code.value for code in Refusal},
    "ending": {ending.value for ending in Ending},
    "state": {"live", "draining"},
    "direction": {"up", "down"},
    "role": {"broker", "gateway", "agent", "authority"},
}


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
    labels = {series.name: {series.label, "role", "worker"} for series in metrics.SERIES}
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
    assert len(RULES) >= 8 and "for: " in PAGE


BROKER = {"role": "broker", "version": "1", "state": "draining", "sessions": 7, "registry": "timed out"}


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


def test_rules_with_a_fault() -> None:
    status = {"role": "gateway", "access": {"rejected": {"policy": "line 3"}}}
    assert parsed(metrics.text(status)).value("rtunnel_files_rejected") == 1
