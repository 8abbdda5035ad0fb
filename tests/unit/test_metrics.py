"""Series from statuses, and the page that lists them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from rtunnel import metrics
from rtunnel.histogram import Histogram
from support.metrics_page import TABLE
from support.scrape import parsed

BROKER = {"role": "broker", "version": "1", "state": "draining", "sessions": 7, "registry": "timed out"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def test_the_page_has_every_series() -> None:
    """What the code can give is on the page, in its order, and nothing else. Which role gives it: tests/e2e."""
    assert list(dict.fromkeys(row[0] for row in TABLE)) == [series.name for series in metrics.SERIES]


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
