"""The command: roles are found, run, stopped and end with the right code; the registry is shown."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from click.testing import CliRunner, Result

from rtunnel import __version__, cli, config, errors, roles
from rtunnel.console import plural
from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import (
    COUNTER_BITS,
    Departure,
    GatewayRecord,
    NodeFacts,
    NodeRecord,
    PortLease,
    RefusedAgent,
    Registration,
    Registry,
    Tuple,
)
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.roles import Role
from rtunnel.trust import pki
from rtunnel.trust.users import new_hash, put_user
from support.secrecy import heard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "pki"
    pki.init(directory)
    return directory


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("RTUNNEL_")]:
        monkeypatch.delenv(variable)


def rtunnel(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(cli.cli, arguments)


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_shows_commands_and_examples() -> None:
    """--help lists roles and tools, with examples."""
    result = rtunnel("--help")
    assert result.exit_code == 0
    for word in (
        "agent",
        "authority",
        "broker",
        "gateway",
        "standalone",
        "demo",
        "pki",
        "resolve",
        "status",
        "Examples:",
    ):
        assert word in result.output


def test_version() -> None:
    """--version says it; `python -m rtunnel` is the same command."""
    assert rtunnel("--version").output == f"rtunnel {__version__}\n"
    run = subprocess.run([sys.executable, "-m", "rtunnel", "-V"], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert (run.returncode, run.stdout) == (0, f"rtunnel {__version__}\n")


@pytest.mark.parametrize("section", ["broker", "agent", "gateway", "authority"])
def test_every_key_has_a_flag(section: str) -> None:
    """A role's --help has a flag for each key of its section."""
    output = rtunnel(section, "--help").output
    for path in config.KEYS:
        if path.startswith(section + "."):
            name = path.removeprefix(section + ".").replace(".", "-").replace("_", "-")
            assert f"--{name} " in output
    assert "--registry-url" in output and "--log-level" in output


def test_standalone_has_the_flags_of_both() -> None:
    """In standalone flags carry their section."""
    output = rtunnel("standalone", "--help").output
    assert "--broker-listen" in output and "--gateway-listen" in output


@pytest.mark.parametrize("arguments", [("nonsense",), ("broker", "--nonsense"), ("resolve",)])
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    """Unknown commands and flags, missing arguments: exit code 2."""
    assert rtunnel(*arguments).exit_code == 2


# --- configuration and pki --------------------------------------------------------------------------------------------


def test_config_check(tmp_path: Path, secrets: Path) -> None:
    """A good file is called good; a bad one is refused with everything that is wrong."""
    path = tmp_path / "rtunnel.toml"
    path.write_text('[broker]\nlistn = "x"\nport_range = "9-1"\n')
    result = rtunnel("config", "check", str(path))
    assert result.exit_code == 2
    assert "did you mean broker.listen?" in result.stderr and "write 1-9" in result.stderr
    path.write_text("[broker]\n")
    assert rtunnel("config", "check", str(path)).output == f"{path}: good\n"
    result = rtunnel("config", "check", str(path), "--role", "broker")
    assert result.exit_code == 2 and "broker.cluster_key: is not given" in result.stderr


def test_config_check_looks_into_keys_and_certificates(tmp_path: Path, secrets: Path) -> None:
    """With a role the content of its files is checked too; warnings do not fail it."""
    path = tmp_path / "rtunnel.toml"
    text = 'registry.url = "redis://h/0"\n[broker]\n' + "".join(
        f'{key} = "{secrets / name}"\n'
        for key, name in (
            ("cluster_key", "cluster.key"),
            ("join_token", "join.token"),
            ("certificate", "broker.pem"),
            ("key", "broker.key"),
        )
    )
    path.write_text(text)
    result = rtunnel("config", "check", str(path), "--role", "broker")
    assert (result.exit_code, result.stdout) == (0, f"{path}: good for broker\n")
    path.write_text(text.replace("broker.key", "ca.key").replace("join.token", "cluster.key"))
    result = rtunnel("config", "check", str(path), "--role", "broker")
    assert result.exit_code == 2
    assert "broker.join_token" in result.stderr and "it is a cluster key" in result.stderr
    assert "broker.certificate" in result.stderr and "is not the key of the certificate" in result.stderr


UNIT = """
[Service]
ExecStart=/opt/rtunnel/bin/rtunnel gateway --config /etc/rtunnel/gateway.toml
DynamicUser=yes
LoadCredential=gateway.key:{secrets}/gateway.key
LoadCredential=ca.pem:{secrets}/ca.pem
Environment=RTUNNEL_GATEWAY_KEY=%d/gateway.key
Environment=RTUNNEL_GATEWAY_CA=%d/ca.pem
EnvironmentFile=-{folder}/registry.env
EnvironmentFile=-{folder}/nothing.env
"""


def test_config_check_sees_what_a_unit_will_run(secrets: Path, tmp_path: Path) -> None:
    """Keys come from the unit's credentials and variables; its user must be able to read all other files."""
    file, unit, users = (tmp_path / name for name in ("gateway.toml", "rtunnel-gateway.service", "users"))
    unit.write_text(UNIT.format(secrets=secrets, folder=tmp_path))
    (tmp_path / "registry.env").write_text('# where Redis is\nRTUNNEL_REGISTRY_URL="redis://h/0"\n')
    file.write_text("[gateway]\n")
    check = ("config", "check", str(file), "--role", "gateway")
    assert rtunnel(*check).exit_code == errors.EXIT_USAGE
    result = rtunnel(*check, "--unit", str(unit))
    assert (result.exit_code, result.stdout) == (0, f"{file}: good for gateway\n")
    file.write_text('[gateway]\nusers = "users"\n')
    put_user(users, "alice", new_hash("secret"))
    result = rtunnel(*check, "--unit", str(unit))
    assert result.exit_code == errors.EXIT_USAGE
    assert f"gateway.users: {users}: the unit's user cannot read it" in result.stderr
    assert f"LoadCredential=users:{users} and Environment=RTUNNEL_GATEWAY_USERS=%d/users" in result.stderr
    drop_in = tmp_path / "rtunnel-gateway.service.d" / "users.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(
        f"[Service]\nLoadCredential=users:{users}\nEnvironment=\n"
        "Environment=RTUNNEL_GATEWAY_USERS=%d/users RTUNNEL_GATEWAY_CA=%d/ca.pem\n"
    )
    result = rtunnel(*check, "--unit", str(unit))
    assert result.exit_code == errors.EXIT_USAGE and "gateway.key: is not given" in result.stderr  # it was taken back
    drop_in.write_text(drop_in.read_text().replace("Environment=\n", ""))
    assert rtunnel(*check, "--unit", str(unit)).exit_code == 0


def test_config_check_of_a_unit_needs_a_role(tmp_path: Path) -> None:
    """Without a role, or without the unit's file, it is wrong usage."""
    file = tmp_path / "gateway.toml"
    file.write_text("[gateway]\n")
    assert rtunnel("config", "check", str(file), "--unit", str(file)).exit_code == errors.EXIT_USAGE
    result = rtunnel("config", "check", str(file), "--role", "gateway", "--unit", str(tmp_path / "no.service"))
    assert result.exit_code == errors.EXIT_USAGE and "can't read the unit" in result.stderr


def test_config_check_reads_rules_and_users(secrets: Path, tmp_path: Path) -> None:
    """What is wrong in the gateway's other files is told before a start."""
    (tmp_path / "policy.toml").write_text("[[rule]]\naction = 'allow'\nto = ['10.0.0.1/8']\n")
    (tmp_path / "users").write_text("alice:hunter2\n")
    (tmp_path / "users").chmod(0o600)
    file = tmp_path / "rtunnel.toml"
    file.write_text(
        f'[gateway]\nkey = "{secrets}/gateway.key"\nca = "{secrets}/ca.pem"\npolicy = "policy.toml"\nusers = "users"\n'
        '[registry]\nurl = "redis://10.0.0.5/0"\n'
    )
    result = rtunnel("config", "check", str(file), "--role", "gateway")
    assert result.exit_code == errors.EXIT_USAGE
    assert "gateway.policy: " in result.output and "rule 1: to: '10.0.0.1/8' has bits set" in result.output
    assert "gateway.users: " in result.output and "users:1: alice: the hash is not" in result.output
    assert "hunter2" not in result.output


def test_certificates_that_end_soon_are_warned_of(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate with few days left is a warning, an expired one is called that."""
    values = {
        "agent.brokers": "vip:7000",
        "agent.exposes": "22",
        "agent.ca": str(secrets / "ca.pem"),
        "agent.join_token": str(secrets / "join.token"),
    }
    loaded = config.load(None, {}, values)
    assert roles.check(loaded, "agent") == []
    for days, words in ((10.0, "expires in 10 days"), (-3.0, "expired 3 days ago")):
        monkeypatch.setattr("rtunnel.trust.tls.days_left", lambda path, days=days: days)
        (note,) = roles.check(loaded, "agent")
        assert words in note.reason


def test_lists_of_the_authority_as_json(tmp_path: Path) -> None:
    """`pki list --json` and `pki token list --json` print every field but secrets, with times as numbers."""
    directory = str(tmp_path / "pki")
    rtunnel("pki", "init", directory)
    made = rtunnel("pki", "token", "create", "--dir", directory, "--id", "web", "--cidr", "10.1.0.0/24")
    assert made.exit_code == 0 and "lets 1 agent of default in 10.1.0.0/24 enrol until" in made.stderr
    rtunnel("pki", "issue", "agent", "--dir", directory, "host-7", "--address", "10.1.0.7", "--address", "fd00::7")
    issued = json.loads(rtunnel("pki", "list", "--dir", directory, "--json").stdout)
    (agent,) = [item for item in issued if item["subject"] == "agent/default/host-7"]
    assert agent["addresses"] == ["10.1.0.7", "fd00::7"] and agent["token"] == ""
    assert agent["ends"] - agent["issued"] >= 24 * 3600
    result = rtunnel("pki", "token", "list", "--dir", directory, "--json")
    (token,) = json.loads(result.stdout)
    assert (token["id"], token["state"], token["uses"], token["used"]) == ("web", "good", 1, 0)
    assert token["networks"] == ["10.1.0.0/24"]
    assert made.stdout.split(".")[-1].strip() not in result.stdout, "no secret"


def test_pki_commands(tmp_path: Path) -> None:
    """init lists what it made and until when, and refuses a second time; broker and token make more."""
    directory = str(tmp_path / "pki")
    result = rtunnel("pki", "init", directory, "--name", "vip.example", "--ip", "10.0.0.1")
    assert result.exit_code == 0
    assert "broker certificate; valid until 20" in result.output
    again = rtunnel("pki", "init", directory)
    assert again.exit_code == 2 and "exists, and is not overwritten" in again.stderr
    assert rtunnel("pki", "issue", "broker", "--dir", directory, "broker-2").exit_code == 0
    assert rtunnel("pki", "shared-token", "--id", "web").output.startswith("rtunnel-token-1.web.")
    assert rtunnel("pki", "shared-token", "--id", "a.b").exit_code == 2


# --- the registry's commands ------------------------------------------------------------------------------------------


#: The first epoch of each node's incarnation.
EPOCHS: dict[str, int] = {}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry with content, which the commands find behind redis://."""
    registry = MemoryRegistry(ttl=15, quarantine=60)
    for name in ("b1", "b2"):
        record = NodeRecord(node=name, host=f"host-{name}", ip="10.0.0.1", incarnation=0)
        EPOCHS[name] = registry.start_node(record) << COUNTER_BITS
    agents = (("h7", "10.1.0.7", ("b1", "b2")), ("h8\x1b[2J", "10.1.0.8", ("b1",)))
    for index, (agent, ip, nodes) in enumerate(agents):
        for node in nodes:
            epoch = EPOCHS[node] + index
            ps_ip, port = f"10.0.0.{node[1:]}", 20000 + index
            entry = Tuple("default", ip, 0, ps_ip, port, node, epoch, agent)
            lease = PortLease(ps_ip, port, f"default/{agent}", node, epoch)
            registry.register(Registration(epoch, (entry,), (lease,), exposes="22,8000-8100"))
    monkeypatch.setattr(cli, "connect", lambda _: registry)
    monkeypatch.setenv("RTUNNEL_REGISTRY_URL", "redis://10.0.0.5/0")
    monkeypatch.setattr(registry, "close", lambda: None)
    yield registry


def test_resolve_shows_the_tuples(registry: Registry) -> None:
    """An address shows one line for each tuple, with node and heartbeat."""
    result = rtunnel("resolve", "10.1.0.7")
    assert result.exit_code == 0
    head, *lines = result.output.splitlines()
    assert head.split()[:4] == ["PS", "AGENT", "PORT", "NODE"]
    assert len(lines) == 2
    assert lines[0].startswith("10.0.0.1:20000  any exposed  b1")
    assert "s ago" in lines[0]


def test_resolve_a_port(registry: Registry) -> None:
    """A port that is exposed is found, one that is not is refused with what is."""
    assert rtunnel("resolve", "10.1.0.7:8050").exit_code == 0
    result = rtunnel("resolve", "10.1.0.7:9100")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "agent h7 has 10.1.0.7, but does not expose 9100 (exposes: 22,8000-8100)" in result.stderr


class Terminal(io.StringIO):
    """A terminal, as far as stdout is asked."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str) -> str:
    """Run the command in this process on a terminal of this width, and return what it printed, without colours."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    cli.cli.main(arguments, standalone_mode=False)
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())


@pytest.mark.parametrize("width", [20, 80, 300])
def test_a_narrow_terminal_hides_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    """Values for the next command are whole in one line on any terminal; the rest of the row is folded, not cut."""
    agent, node, port = "host-7.rack-12.example", "broker-7c9d8b6f5-x2x4z", "10.100.200.201:20007"
    epoch = registry.start_node(NodeRecord(node=node, host="h", ip="10.100.200.201", incarnation=0)) << COUNTER_BITS
    entry = Tuple("default", "10.1.0.9", 0, "10.100.200.201", 20007, node, epoch, agent)
    lease = PortLease("10.100.200.201", 20007, f"default/{agent}", node, epoch)
    registry.register(Registration(epoch, (entry,), (lease,), exposes="22,8000-8100"))
    screen = on_terminal(monkeypatch, width, "resolve", "10.1.0.9")
    (line,) = [line for line in screen.splitlines() if port in line]
    assert node in line and agent in line and "…" not in screen
    assert {"22,", "8000-8100"} <= set(screen.split())
    pki.init(tmp_path / "pki")
    pki.issue_agent(tmp_path / "pki", "a", agent_id=agent, namespace="default", addresses=("10.1.0.9",))
    screen = on_terminal(monkeypatch, width, "pki", "list", "--dir", str(tmp_path / "pki"))
    assert f"agent/default/{agent}" in screen and "…" not in screen


def test_a_pipe_is_no_terminal(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a pipe each row is one line of any length, though variables ask for a narrow terminal with colours."""
    for name, value in (("COLUMNS", "20"), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1")):
        monkeypatch.setenv(name, value)
    head, *rows = rtunnel("resolve", "10.1.0.7").stdout.splitlines()
    assert len(rows) == 2 and head.split()[-1] == "HEARTBEAT"
    assert all(row.split()[-1] == "ago" for row in rows)


def test_one_is_singular(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of one has its noun in the singular."""
    small = MemoryRegistry(ttl=15, quarantine=60)
    epoch = small.start_node(NodeRecord(node="b1", host="h", ip="10.0.0.1", incarnation=0)) << COUNTER_BITS
    entry = Tuple("default", "10.1.0.7", 0, "10.0.0.1", 20000, "b1", epoch, "h7")
    small.register(Registration(epoch, (entry,), ()))
    monkeypatch.setattr(cli, "connect", lambda _: small)
    summary = rtunnel("status").output.splitlines()[-1]
    counts = "1 node (0 draining), 1 agent (1 on one node only, 1 on one host only), 1 session, 1 tuple in"
    assert summary.startswith(counts)
    assert plural(0, "agent") == "0 agents"


def test_resolve_nothing(registry: Registry) -> None:
    """No tuples: exit code 1, and it says where it looked; JSON has no tuples, and the reason."""
    result = rtunnel("resolve", "10.9.9.9:1", "--namespace", "x")
    assert result.exit_code == 1
    assert "no agent answers for 10.9.9.9 in namespace x" in result.stderr
    result = rtunnel("resolve", "fd00::1", "--json")
    told = json.loads(result.stdout)
    assert (
        result.exit_code == 1 and told["tuples"] == told["departures"] == told["refusals"] == told["namespaces"] == []
    )
    assert told["reason"] == "no agent answers for fd00::1 in namespace default: `rtunnel status` shows the agents"
    assert rtunnel("resolve", "name:80").exit_code == 2


def test_resolve_as_json(registry: Registry) -> None:
    """--json prints whole tuples with the age of their heartbeat."""
    told = json.loads(rtunnel("resolve", "[::ffff:10.1.0.7]:22", "--json").stdout)
    assert (told["ip"], told["port"], told["namespace"], told["reason"]) == ("10.1.0.7", 22, "default", "")
    assert [item["node"] for item in told["tuples"]] == ["b1", "b2"]
    assert 0 <= told["tuples"][0]["age"] < 15
    told = json.loads(rtunnel("resolve", "10.1.0.7:23", "--json").stdout)
    assert told["tuples"] == [] and "does not expose 23" in told["reason"]


def test_resolve_says_what_is_known_of_an_address_without_a_tuple(registry: Registry) -> None:
    """Who left from where, who was refused, and which other namespace has it; the same in JSON."""
    left = Departure(
        namespace="blue", agent_id="h7", addresses=("10.1.0.7",), node="b2", peer="192.0.2.7", cause="closed",
        text="closed by peer", epoch=(1 << 63) + 1, ago=130.0,
    )  # fmt: skip
    refused = RefusedAgent(
        namespace="blue", agent_id="h7", addresses=("10.1.0.7",), node="b1", peer="192.0.2.7", cause="bad_token",
        text="not known\x1b[2J", proved=False,
    )  # fmt: skip
    registry.report(NodeFacts(node="b2"), [left, refused])
    text = rtunnel("resolve", "10.1.0.7", "--namespace", "blue").stderr
    assert "no agent answers for 10.1.0.7 in namespace blue: it exists in namespace default (--namespace); " in text
    assert "; an agent that calls itself h7 (link from 192.0.2.7) was refused at " in text and "\x1b" not in text
    assert "(2 min ago) on broker b2 (link from 192.0.2.7), left with: closed by peer" in text
    told = json.loads(rtunnel("resolve", "10.1.0.7", "--namespace", "blue", "--json").stdout)
    assert told["namespaces"] == ["default"] and told["refusals"][0]["cause"] == "bad_token"
    [gone] = told["departures"]
    assert (gone["epoch"], gone["text"], "ago" in gone) == (str((1 << 63) + 1), "closed by peer", False)
    assert 129 < told["now"] - gone["at"] < 140


def facts(node: str, **changes: Any) -> NodeFacts:
    fields: dict[str, Any] = {"port_range": "20000-20009", "ports_free": 7, "ports_used": 2, "ports_resting": 1}
    return NodeFacts(node=node, host=f"host-{node}", ip="10.0.0.1", **fields | changes)


def test_status_shows_facts_gateways_and_dead_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are by the registry's clock; a dead node is there for an hour."""
    now = [1_800_000_000.0]
    store = MemoryRegistry(ttl=15, quarantine=60, clock=lambda: now[0])
    for node in ("b1", "b2"):
        store.start_node(NodeRecord(node=node, host="h", ip="10.0.0.1", incarnation=0))
    store.report(facts("b1", version="1.2"), [])
    now[0] += 42.0
    store.start_node(NodeRecord(node="b2", host="h", ip="10.0.0.1", incarnation=0))
    store.report(facts("b2", descriptors=10, descriptor_limit=1024), [])
    store.report_gateway(GatewayRecord(name="g1", host="h", namespace="blue", listen="0.0.0.0:1080", routes_age=0.5))
    now[0] += 2.0
    monkeypatch.setattr(cli, "connect", lambda _: store)
    monkeypatch.setenv("RTUNNEL_REGISTRY_URL", "redis://10.0.0.5/0")
    lines = rtunnel("status").output.splitlines()
    assert re.match(r"b2 +h +10\.0\.0\.1 +live +0 +0 +2/10 \(\+1 resting\) +10/1024 +2\.0 s ago", lines[1])
    assert re.match(r"b1 +host-b1 +10\.0\.0\.1 +gone 44 s +2/10", lines[2])
    assert re.match(r"g1 +h +blue +live +0\.0\.0\.0:1080 +0 +0 +0 +2\.5 s +2\.0 s ago", lines[5])
    gone = "b1 has had no heartbeat for 44 s and was not stopped: see that host"
    assert [line for line in lines if "warning" in line] == [f"warning: {gone}"]
    told = json.loads(rtunnel("status", "--json").stdout)
    assert [(node["node"], node["age"], node["facts"]["ports_used"]) for node in told["nodes"]] == [("b2", 2.0, 2)]
    assert [(node["node"], node["age"]) for node in told["gone"]] == [("b1", 44.0)]
    assert [(known["name"], known["age"]) for known in told["gateways"]] == [("g1", 2.0)]
    assert told["warnings"] == [gone]
    now[0] += 3600.0
    assert json.loads(rtunnel("status", "--json").stdout)["gone"] == []


def test_status_warns_of_what_is_wrong_at_a_node_or_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_800_000_000.0]
    store = MemoryRegistry(ttl=15, quarantine=60, clock=lambda: now[0])
    wrong: dict[str, Any] = {
        "reasons": ("draining",), "clock_offset": -60.04, "ports_free": 0, "descriptors": 1000,
        "descriptor_limit": 1024, "notes_dropped": 3,
    }  # fmt: skip
    store.report(facts("b1", **wrong), [])
    now[0] += 20.0
    store.start_node(NodeRecord(node="b1", host="h", ip="10.0.0.1", incarnation=0))
    gateway = GatewayRecord(name="g1", host="h", namespace="blue", routes_age=6.6, fault="no answer", suspects=("b1",))
    store.report_gateway(gateway)
    monkeypatch.setattr(cli, "connect", lambda _: store)
    monkeypatch.setenv("RTUNNEL_REGISTRY_URL", "redis://10.0.0.5/0")
    assert json.loads(rtunnel("status", "--json").stdout)["warnings"] == [
        "b1 is not ready: draining",
        "b1 has completed no heartbeat for 20 s, though it sends some: see its log",
        "the clock of b1 is 60.0 s behind the registry's: set it (NTP)",
        "the ports of b1 (20000-20009) are nearly used up: 2/3 (+1 resting)",
        "the descriptors of b1 are nearly used up: 1000/1024 (LimitNOFILE)",
        "b1 could not write 3 departures and refusals: see docs/registry.md",
        "the table of gateway g1 is 6.6 s old: no answer",
        "gateway g1 had no answer lately from b1",
    ]
    assert "warning: gateway g1 had no answer lately from b1" in rtunnel("status").output


def test_status(registry: Registry) -> None:
    """Nodes, agents with the fewest nodes first, a summary; names from peers can't drive the terminal."""
    result = rtunnel("status")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("NODE") and lines[1].startswith("b1")
    assert r"h8\u001b[2J" in lines[5] and "1 node " in lines[5]
    assert lines[6].startswith("h7") and "2 nodes" in lines[6]
    assert lines[-1].startswith(
        "2 nodes (0 draining), 2 agents (1 on one node only, 1 on one host only), 3 sessions, 3 tuples in memory"
    )
    assert "\x1b" not in result.output


def test_status_is_limited(registry: Registry) -> None:
    """More than 50 agents are counted, unless all are asked for."""
    for number in range(60):
        ip = f"10.2.0.{number}"
        entry = Tuple("default", ip, 0, "10.0.0.1", 21000 + number, "b1", EPOCHS["b1"] + 9, f"a{number:02}")
        registry.register(Registration(entry.epoch, (entry,), ()))
    assert "... and 12 more agents" in rtunnel("status").output
    assert "more agents" not in rtunnel("status", "--all").output
    assert len(json.loads(rtunnel("status", "--json").stdout)["agents"]) == 62


@pytest.mark.parametrize("arguments", [("resolve", "10.1.0.7"), ("status",)])
def test_a_memory_registry_cant_be_looked_into(arguments: tuple[str, ...]) -> None:
    """Without a shared registry the commands say why there is nothing to see."""
    result = rtunnel(*arguments)
    assert result.exit_code == 2
    assert "the memory registry lives inside one process" in result.stderr


def test_a_registry_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable registry is one line and exit code 1."""

    class Down(MemoryRegistry):
        def snapshot(self) -> Any:
            raise RegistryUnavailable("redis://10.0.0.5/0: refused")

    monkeypatch.setattr(cli, "connect", lambda _: Down(ttl=15, quarantine=60))
    result = rtunnel("status", "--registry-url", "redis://10.0.0.5/0")
    assert (result.exit_code, result.stderr) == (1, "rtunnel: registry: redis://10.0.0.5/0: refused\n")


# --- roles ------------------------------------------------------------------------------------------------------------


def test_roles_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role is what the entry point names; a missing, broken or wrong one is told."""
    points = {
        "good": EntryPoint("good", "unittest.mock:sentinel", roles.GROUP),
        "broken": EntryPoint("broken", "no_such_module:ROLE", roles.GROUP),
    }

    def entry_points(group: str, name: str) -> list[EntryPoint]:
        return [points[name]] if name in points else []

    monkeypatch.setattr(roles, "entry_points", entry_points)
    for name, reason in (("good", "is not a Role"), ("broken", "No module named"), ("none", "no role 'none'")):
        with pytest.raises(errors.RoleMissing, match=reason):
            roles.find_role(name)


def test_a_role_that_cant_be_loaded_is_still_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One broken role does not break --help, and is exit code 2 when it is run."""

    def missing(name: str) -> Role:
        raise errors.RoleMissing(f"the role {name!r} can't be loaded: no such module")

    monkeypatch.setattr(roles, "find_role", missing)
    assert "broker" in rtunnel("--help").output
    result = rtunnel("broker")
    assert result.exit_code == 2 and "no such module" in result.stderr


def test_flags_reach_the_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags, repeated ones too, override the file for the role that is run."""
    path = tmp_path / "rtunnel.toml"
    path.write_text('[agent]\nagent_id = "file"\nnamespace = "file"\nexposes = ["1"]\n')
    seen: list[config.Config] = []

    def run(parts: list[Role], loaded: config.Config, **_: Any) -> int:
        seen.append(loaded)
        return 0

    monkeypatch.setattr(roles, "run", run)
    result = rtunnel(
        "agent",
        "--config",
        str(path),
        "--agent-id",
        "flag",
        "--exposes",
        "22",
        "--exposes",
        "80,90",
        "--log-level",
        "debug",
    )
    assert result.exit_code == 0, result.output
    (loaded,) = seen
    assert (loaded.agent.agent_id, loaded.agent.namespace, loaded.agent.exposes) == ("flag", "file", ["22", "80", "90"])
    assert (loaded.log.level, loaded.source("agent.agent_id")) == ("debug", "--agent-id")


def test_flags_are_named_in_refusals() -> None:
    """A bad flag is told by its name, in standalone with its section."""
    assert "--port-range: broker.port_range: '9-1' ends" in rtunnel("broker", "--port-range", "9-1").stderr
    assert "--broker-port-range: broker.port_range" in rtunnel("standalone", "--broker-port-range", "9-1").stderr
    assert "--registry-url: registry.url" in rtunnel("standalone", "--registry-url", "x://").stderr


# --- the runner, in processes of their own ----------------------------------------------------------------------------

#: A fake role, whose behaviour is the program's argument.
PROGRAM = """
import os, signal, socket, sys, warnings
import trio
from rtunnel import cli, config, errors, roles
from rtunnel.errors import RegistryUnavailable, TrustError

def say(word):
    print(word, flush=True)

async def serve(config, registry, *, stop, task_status):
    what = sys.argv[1]
    say("registry" if registry is not None else "no registry")
    if what == "crash":
        async with trio.open_nursery():
            raise RuntimeError("a bug")
    if what == "refuse":
        raise TrustError("x.key: is empty")
    if what == "unavailable":
        raise RegistryUnavailable("redis://x: refused")
    if what in ("taken", "taken-raw"):
        with socket.create_server(("127.0.0.1", 0)) as one:
            try:
                socket.create_server(one.getsockname())
            except OSError as fault:
                if what == "taken-raw":
                    raise
                async with trio.open_nursery():
                    raise errors.ListenError("broker.listen", "127.0.0.1:7000", fault)
    if what == "early":
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        return
    task_status.started(object())
    say("ready")
    if what == "return":
        return
    await stop.wait()
    say("draining")
    if what == "stubborn":
        try:
            await trio.sleep_forever()
        finally:
            say("cancelled")

def role(name, needs_registry=True):
    return roles.Role(name, "a fake", serve, needs_registry)

roles.check = lambda config, name: []
roles.find_role = role
sys.argv[2:] = sys.argv[2:] or ["broker"]
real = sys.argv
cli.cli.main = (lambda inner: lambda **more: inner(args=real[2:], **more))(cli.cli.main)
if real[1] == "no-registry":
    roles.find_role = lambda name: role(name, False)
cli.main()
"""


class Program:
    """A process with the fake role."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environ,
        )

    def until(self, word: str) -> None:
        """Read stdout up to a line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise AssertionError(f"no {word!r}: {self.end()}")

    def end(self) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, log events, stdout's rest."""
        out, self.err = self.process.communicate(timeout=20)
        heard(self.err)
        events = [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]
        return self.process.returncode, events, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    """The first SIGTERM or SIGINT sets stop, the role returns, and the code is 0."""
    program = Program("serve")
    program.until("ready")
    program.process.send_signal(number)
    code, events, out = program.end()
    assert (code, out) == (0, "draining\n")
    assert [event["event"] for event in events] == [
        "process_started",
        "role_started",
        "stop_requested",
        "process_stopped",
    ]
    assert events[2]["signal"] == number.name


def test_a_second_signal_stops_at_once() -> None:
    """A role that does not finish draining is cancelled by the second signal; the code says that it was cut short."""
    program = Program("stubborn")
    program.until("ready")
    program.process.send_signal(signal.SIGTERM)
    program.until("draining")
    program.process.send_signal(signal.SIGTERM)
    code, events, out = program.end()
    assert (code, out) == (1, "cancelled\n")
    assert "abort_requested" in [event["event"] for event in events]


@pytest.mark.parametrize(
    ("what", "code", "event", "text"),
    [
        ("return", 0, "process_stopped", ""),
        ("early", 0, "process_stopped", ""),
        ("refuse", 2, "config_rejected", "x.key: is empty"),
        ("unavailable", 1, "registry_unavailable", "redis://x: refused"),
        ("taken", 3, "listen_failed", "broker.listen: can't listen on 127.0.0.1:7000: the address is in use"),
        ("taken-raw", 3, "listen_failed", "Address already in use"),
    ],
)
def test_exit_codes(what: str, code: int, event: str, text: str) -> None:
    """Each way to end has its code and one line, without a traceback."""
    program = Program(what)
    ended, events, _ = program.end()
    assert ended == code, program.err
    (line,) = [item for item in events if item["event"] == event]
    assert text in line.get("text", "")
    assert "Traceback" not in program.err


def test_a_bug_is_one_line_with_its_traceback() -> None:
    """An unexpected exception is logged in one line with the traceback, and is exit code 1."""
    program = Program("crash")
    code, events, _ = program.end()
    assert code == 1
    (line,) = [item for item in events if item["event"] == "process_crashed"]
    assert "RuntimeError: a bug" in line["exception"]
    assert all(item.startswith("{") for item in program.err.splitlines())


def test_a_bad_configuration_is_a_message() -> None:
    """A configuration that is refused ends with code 2 and plain words on stderr."""
    program = Program("serve", "broker", RTUNNEL_BROKER_LISTN="x")
    code, events, _ = program.end()
    assert (code, events) == (2, [])
    assert program.err == "rtunnel: $RTUNNEL_BROKER_LISTN: is not a known key (did you mean $RTUNNEL_BROKER_LISTEN?)\n"


def test_roles_get_a_registry_only_when_they_need_one() -> None:
    """needs_registry decides."""
    for what, word in (("serve", "registry"), ("no-registry", "no registry")):
        program = Program(what)
        program.until(word)
        program.until("ready")
        program.process.send_signal(signal.SIGTERM)
        assert program.end()[0] == 0


def test_standalone_runs_both_and_drains_both() -> None:
    """Two roles share one process and one signal."""
    program = Program("serve", "standalone")
    program.until("ready")
    program.until("ready")
    program.process.send_signal(signal.SIGTERM)
    code, events, out = program.end()
    assert (code, out) == (0, "draining\ndraining\n")
    assert [event["role"] for event in events if event["event"] == "role_started"] == ["broker", "gateway"]


def test_a_closed_pipe_is_silent() -> None:
    """`rtunnel --help | head -1` prints no traceback."""
    command = f"{sys.executable} -m rtunnel --help | head -c 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert result.stderr == ""


def test_interrupt_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C outside of a role says nothing, and ends as the shell expects."""

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "main", lambda *_, **__: interrupted())
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


async def test_one_role_that_ends_takes_the_others_along() -> None:
    """When one of two roles returns, the other is asked to stop."""
    stopped = []

    async def short(config: Any, registry: Any, *, stop: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started()

    async def long(config: Any, registry: Any, *, stop: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started()
        await stop.wait()
        stopped.append(True)

    parts = [Role("long", "", long, False), Role("short", "", short, False)]
    assert await roles._serve_all(parts, config.Config(), None, roles.watch_signals, None) == 0
    assert stopped == [True]
