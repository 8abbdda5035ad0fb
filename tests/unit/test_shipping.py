"""Examples for Prometheus, Alertmanager, Vector, Logstash and Elasticsearch agree with what rtunnel has.

None of these programs is here, but for `promtool` and `amtool` where they are installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from rtunnel import config, logs
from support.promql import SERIES

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
ELASTIC = ROOT / "deploy/elastic"
TEMPLATE: Final[dict[str, Any]] = json.loads((ELASTIC / "index-template.json").read_text())
ALERTMANAGER: Final[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alertmanager.yaml").read_text())
RULES: Final[list[dict[str, Any]]] = [
    rule for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]


# Prometheus and Alertmanager.


def test_prometheus_asks_the_ports_that_roles_have() -> None:
    """Each job's port is the one of its role's admin address; agents are asked through a gateway."""
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == [
        "rtunnel-brokers", "rtunnel-gateways", "rtunnel-authority", "rtunnel-agents",
    ]  # fmt: skip
    defaults = config.Config()
    for job in jobs:
        role = job["job_name"].removeprefix("rtunnel-").removesuffix("s")
        port = getattr(defaults, role).admin.rpartition(":")[2]
        assert all(target.endswith(f":{port}") for each in job["static_configs"] for target in each["targets"])
        assert ("proxy_url" in job) is (role == "agent")


def matchers(value: Any) -> Iterator[str]:
    """All matchers in Alertmanager's configuration."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.endswith("matchers"):
                yield from inner
            else:
                yield from matchers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from matchers(inner)


def test_alertmanager_matches_alerts_that_exist() -> None:
    """Names and severities are those of the rules, and both severities have a receiver."""
    known = {
        "alertname": {rule["alert"] for rule in RULES},
        "severity": {rule["labels"]["severity"] for rule in RULES},
    }
    assert known["severity"] == {"critical", "warning"}
    found = list(matchers(ALERTMANAGER))
    assert len(found) == 8
    for matcher in found:
        label, words = re.fullmatch(r'(\w+) =~? "([^"]+)"', matcher).groups()  # type: ignore[union-attr]
        assert set(words.split("|")) <= known[label], matcher


def test_alertmanager_sends_mail_and_messages() -> None:
    """Routes name receivers that exist; texts use annotations that every alert has; secrets are in files."""
    receivers = {each["name"]: each for each in ALERTMANAGER["receivers"]}
    routes = [ALERTMANAGER["route"], *ALERTMANAGER["route"]["routes"]]
    assert {route["receiver"] for route in routes} == receivers.keys() == {"mail", "message"}
    assert receivers["mail"]["email_configs"]
    assert receivers["message"]["slack_configs"] and receivers["message"]["webhook_configs"]
    text = (PROMETHEUS / "alertmanager.yaml").read_text()
    used = set(re.findall(r"\.Annotations\.(\w+)", text))
    assert used and all(used <= rule["annotations"].keys() for rule in RULES)
    assert not re.search(r"password:|api_url:", text)


def test_labels_in_texts_of_alerts_exist() -> None:
    """{{ $labels.X }} of an alert is a label of its series, or one that every series has."""
    for rule in RULES:
        series = [SERIES[name] for name in SERIES if re.search(rf"\b{name}\b|\b{name}_bucket\b", rule["expr"])]
        labels = {"instance", "role", "worker"}.union(*(each.labels for each in series))
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels, rule["alert"]


@pytest.mark.parametrize(
    ("tool", "command", "name"),
    [
        ("amtool", ("check-config",), "alertmanager.yaml"),
        ("promtool", ("check", "config", "--syntax-only"), "prometheus.yaml"),
    ],
)
def test_their_own_tools_have_nothing_to_say(tool: str, command: tuple[str, ...], name: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}")
    done = subprocess.run([tool, *command, str(PROMETHEUS / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Logs to Elasticsearch.


def fields(properties: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The names and types of the template's fields."""
    for name, mapping in properties.items():
        if "properties" in mapping:
            yield from fields(mapping["properties"], f"{prefix}{name}.")
        else:
            yield prefix + name, mapping["type"]


MAPPED: Final = dict(fields(TEMPLATE["template"]["mappings"]["properties"]))
#: Values that JSON has for each type of Elasticsearch.
TYPES: Final[dict[str, tuple[type, ...]]] = {
    "date": (str,), "keyword": (str,), "text": (str,), "ip": (str,), "long": (int,), "double": (int, float),
    "flattened": (list, dict),
}  # fmt: skip
#: The gateway's line about a stream, which is the most frequent one.
STREAM_ENDED: Final[dict[str, Any]] = {
    "time": "2026-11-28T07:00:00.123Z", "level": "info", "event": "stream_ended", "component": "gateway",
    "client": "10.9.0.4", "user": "alice", "target": "10.1.0.7:22", "namespace": "default", "via": "socks5",
    "rule": "1", "reason": "closed", "bytes_up": 3, "bytes_down": 4, "seconds": 0.25, "setup_ms": 1.5, "attempts": 1,
    "connect_ms": 0.5, "answer_ms": 1, "node": "b1", "epoch": "4294967297", "ps": "10.0.0.11:20001", "agent": "a1",
    "proof": "ok", "certificate": "agent/default/a1", "tried": [{"node": "b1", "ms": 1.5}],
}  # fmt: skip


def test_the_template_has_the_names_of_the_schema() -> None:
    """All that a line can have of the Elastic Common Schema, and nothing else."""
    named = {*logs.ECS_NAMES.values(), "ecs.version", "service.name", "event.duration"}
    assert {name for name in MAPPED if not name.startswith("rtunnel.")} == named


def test_the_templates_own_fields_are_logged() -> None:
    """Every rtunnel.X of the template is a field of a log line in the sources."""
    sources = "".join(
        path.read_text() for folder in ("rtunnel", "socks", "broker", "agent") for path in (ROOT / folder).rglob("*.py")
    )
    own = {name.removeprefix("rtunnel.") for name in MAPPED if name.startswith("rtunnel.")}
    assert own and not [name for name in own if not re.search(rf'\b{name}=|"{name}"', sources)]


def test_a_line_fits_the_template() -> None:
    """Each value of a real line has a type that its mapping takes; other fields have a dynamic mapping."""
    for name, value in json.loads(logs.render_ecs(STREAM_ENDED)).items():
        if name in MAPPED:
            assert isinstance(value, TYPES[MAPPED[name]]), name
        else:
            assert name.startswith("rtunnel.") and isinstance(value, str), name


def test_a_field_that_is_another_type_elsewhere_loses_no_line() -> None:
    """`peer` may be a name, and source.ip an IP only; numbers may be whole in the first line and not in the next."""
    template = TEMPLATE["template"]
    assert template["settings"]["index.mapping.ignore_malformed"] is True
    assert template["mappings"]["date_detection"] is False
    dynamic = {next(iter(each)): next(iter(each.values())) for each in template["mappings"]["dynamic_templates"]}
    assert dynamic["numbers"] == {"match_mapping_type": "long", "mapping": {"type": "double"}}
    assert dynamic["objects"]["mapping"] == {"type": "flattened"}


def test_vector_and_logstash_fill_the_stream_of_the_template() -> None:
    """Both write the data stream whose name the template's pattern matches, from the units that there are."""
    vector = tomllib.loads((ELASTIC / "vector.toml").read_text())
    (sink,) = vector["sinks"].values()
    stream = sink["data_stream"]
    names = [f"{stream['type']}-{stream['dataset']}-{stream['namespace']}"]
    logstash = (ELASTIC / "logstash.conf").read_text()
    parts = dict(re.findall(r'data_stream_(\w+) => "(\w+)"', logstash))
    names.append(f"{parts['type']}-{parts['dataset']}-{parts['namespace']}")
    (pattern,) = TEMPLATE["index_patterns"]
    assert TEMPLATE["data_stream"] == {} and all(re.fullmatch(pattern.replace("*", ".*"), name) for name in names)
    units = {f"{unit}.service" for unit in vector["sources"]["journal"]["include_units"]}
    assert units == {path.name for path in (ROOT / "deploy/systemd").glob("*.service")}
    inputs = {name for each in (*vector["transforms"].values(), sink) for name in each["inputs"]}
    assert inputs <= {*vector["sources"], *vector["transforms"]}


def test_vectors_program_uses_the_fields_of_a_line() -> None:
    """The names that its program takes or sets are those of the template."""
    vector = tomllib.loads((ELASTIC / "vector.toml").read_text())
    program = vector["transforms"]["rtunnel"]["source"]
    assert {*re.findall(r'\."([\w.@]+)"', program), *re.findall(r'"([a-z]+\.[a-z]+)":', program)} <= MAPPED.keys()


def test_logstash_is_balanced() -> None:
    """Braces and brackets close, and strings end; it is no file that Python can read."""
    text = re.sub(r"#.*", "", (ELASTIC / "logstash.conf").read_text())
    bare = re.sub(r'"[^"]*"', "", text)
    assert '"' not in bare
    assert all(bare.count(one) == bare.count(other) for one, other in ("{}", "[]"))
    assert re.findall(r"(?m)^(\w+) \{", bare) == ["input", "filter", "output"]
