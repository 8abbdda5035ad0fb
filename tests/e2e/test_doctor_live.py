"""`rtunnel doctor` beside real roles: a healthy machine has no FAIL, and faults of the way to the brokers have one."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rtunnel.cli import cli
from support.plumbing import free_port
from support.polling import until
from support.redis_server import RedisServer
from support.secrecy import Needles, Secrets, heard
from support.site import Process, Site, health, in_process, ready, site


def doctor(*arguments: str, code: int | None = 0, **variables: Any) -> dict[str, Any]:
    """The findings and facts of the command, run with these variables."""
    done = CliRunner().invoke(cli, ["doctor", "--json", *arguments], env=variables)
    heard(done.output)
    assert code is None or done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def of(found: dict[str, Any], level: str, check: str = "") -> list[str]:
    return [f["text"] for f in found["findings"] if f["level"] == level and check in ("", f["check"])]


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Site, dict[str, Process]]]:
    """Redis, two brokers, a gateway and an agent, all ready."""
    directory = tmp_path_factory.mktemp("site")
    server = RedisServer(tmp_path_factory.mktemp("redis"), tcp=True, password="d0ctor-pa55word").start()
    try:
        with site(directory, server.url) as here:
            token = directory / "api.token"
            token.write_text("an-api-token-0123456789abcdef\n")
            token.chmod(0o600)
            flags = ("--admin-token", str(token))
            brokers = [here.broker(f"b{number}", number, *flags) for number in (1, 2)]
            gateway = here.gateway()
            agent = here.agent("a1", "127.3.0.1", [broker.address("broker_started") for broker in brokers])
            for process in (*brokers, gateway, agent):
                until(lambda process=process: ready(process.admin()), what=process.name)  # type: ignore[misc]
            until(lambda: health(gateway.admin(), "/statusz")[1]["tuples"] == 2, what="the gateway to know all")
            yield here, here.processes
    finally:
        server.kill()


@pytest.mark.parametrize("role", ["broker", "gateway", "agent"])
def test_a_healthy_machine_has_no_fail(cluster: tuple[Site, dict[str, Process]], role: str) -> None:
    """Each check looks at the real thing, and the role still serves afterwards."""
    here, processes = cluster
    process = processes[{"broker": "b1", "gateway": "gateway", "agent": "a1"}[role]]
    variables: dict[str, Any] = {f"RTUNNEL_{role.upper()}_ADMIN": process.admin()}
    if role == "broker":
        variables["RTUNNEL_BROKER_ADMIN_TOKEN"] = str(here.directory / "api.token")
    found = doctor("--config", str(here.directory / f"{process.name}.toml"), **variables)
    assert not of(found, "FAIL")
    assert "is ready" in of(found, "OK", "role")[0]
    if role == "agent":
        assert len(of(found, "OK", "brokers")) == len(of(found, "OK", "path")) == 2
        assert "agent/default/a1, good for" in of(found, "OK", "certificates")[0]
    if role == "broker":
        assert of(found, "OK", "sessions") == ["1 of 1 have their tuples in the registry"]
    if role == "gateway":
        assert [text.partition(" ")[0] for text in of(found, "OK", "brokers")] in (["b1", "b2"], ["b2", "b1"])
        assert len(of(found, "OK", "path")) == 2
    if role != "agent":
        assert of(found, "OK", "clock") and "noeviction" in of(found, "OK", "registry")[0]
    assert "d0ctor-pa55word" not in json.dumps(found)
    assert ready(process.admin())
    assert not any(broker.lines("session_down") for broker in (processes["b1"], processes["b2"]))


def test_faults_on_the_way_to_the_brokers(cluster: tuple[Site, dict[str, Process]]) -> None:
    """Nobody there, a port of something else (the health port), another CA, and an address that is not here."""
    here, processes = cluster
    agent = here.directory / "a1.toml"
    brokers = f"127.0.0.1:{free_port()}"
    found = doctor("--config", str(agent), code=1, RTUNNEL_AGENT_BROKERS=brokers)
    assert "connection refused" in of(found, "FAIL", "brokers")[0]
    found = doctor("--config", str(agent), code=1, RTUNNEL_AGENT_BROKERS=processes["b1"].admin())
    assert "no rtunnel broker answers" in of(found, "FAIL", "brokers")[0]
    in_process("pki", "init", str(here.directory / "other"))
    found = doctor("--config", str(agent), code=1, RTUNNEL_AGENT_CA=str(here.directory / "other" / "ca.pem"))
    assert "the certificate is not accepted" in of(found, "FAIL", "brokers")[0]
    assert "not accepted by the CAs of agent.ca" in of(found, "FAIL", "certificates")[0]
    found = doctor("--config", str(agent), code=1, RTUNNEL_AGENT_ADDRESSES="192.0.2.77")
    assert of(found, "FAIL", "addresses") == ["192.0.2.77 is on no interface of this host"]


def test_the_command_prints_lines_and_exit_codes(
    cluster: tuple[Site, dict[str, Process]], make_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    """A line for each finding, the worst first; 2 without a role, or with a file that can't be used."""
    here, _ = cluster
    out = in_process("doctor", "--config", str(here.directory / "b1.toml"))
    assert "OK    registry      redis://127.0.0.1:" in out and out.splitlines()[-1].startswith("0 FAIL, ")
    (tmp_path / "dead.toml").write_text(f'[registry]\nurl = "redis://127.0.0.1:{free_port()}/0"\n[gateway]\n')
    out = in_process("doctor", "--role", "gateway", "--config", str(tmp_path / "dead.toml"), code=1)
    assert out.startswith("FAIL  config        gateway.key: is not given")
    assert "\nFAIL  registry      redis://127.0.0.1:" in out
    assert "no role is given" in in_process("doctor", code=2)
    (tmp_path / "bad.toml").write_text("[agent]\nbroker = 1\n")
    assert "is not a known key" in in_process("doctor", "--config", str(tmp_path / "bad.toml"), code=2)


def test_a_bundle_has_no_secret(cluster: tuple[Site, dict[str, Process]], tmp_path: Path) -> None:
    """Of a broker that runs, with its log; the session's scanner reads it, too."""
    here, processes = cluster
    path, log = tmp_path / "b1.tar.gz", tmp_path / "b1.journal"
    log.write_text(processes["b1"].text + "redis://:d0ctor-pa55word@127.0.0.1/0\n")
    arguments = ("--config", str(here.directory / "b1.toml"), "--bundle", str(path), "--log", str(log))
    doctor(*arguments, RTUNNEL_BROKER_ADMIN=processes["b1"].admin())
    with tarfile.open(path) as archive:
        members = {entry.name: archive.extractfile(entry) for entry in archive.getmembers()}
        texts = {name: file.read().decode() for name, file in members.items() if file is not None}
    assert {name.rpartition("/")[2] for name in texts} == {
        "report.txt", "report.json", "config.json", "versions.json", "statusz-broker.json", "1-b1.journal",
    }  # fmt: skip
    secrets = Secrets()
    for file in (here.directory / "pki").iterdir():
        if file.is_file():
            secrets.add_content(file.read_bytes(), file.name)
    secrets.add_text("d0ctor-pa55word", "Redis")
    needles = Needles(secrets)
    assert not [found for text in texts.values() for line in text.splitlines() if (found := needles.find(line))]
    assert "broker_started" in texts["rtunnel-doctor/logs/1-b1.journal"]
    for text in texts.values():
        heard(text, "the bundle")
    out = in_process("doctor", "--config", str(here.directory / "b1.toml"), "--log", str(log), code=2)
    assert "--log is given, and has no effect without --bundle" in out


def test_a_healthy_cluster_has_no_fail(cluster: tuple[Site, dict[str, Process]]) -> None:
    """Nodes, gateways and tuples agree, as Redis has them."""
    here, _ = cluster
    path = str(here.directory / "gateway.toml")
    until(lambda: not of(doctor("--cluster", "--config", path, code=None), "WARN", "gateways"), what="the gateway")
    found = doctor("--cluster", "--config", path)
    assert not of(found, "FAIL")
    assert of(found, "OK", "agents") == ["1 of 1 agents have two sessions"]
    assert of(found, "OK", "nodes") == ["2 of 2 are live and ready"]
    assert "d0ctor-pa55word" not in json.dumps(found)
    out = in_process("doctor", "--cluster", "--role", "agent", "--config", path, code=2)
    assert "--cluster and --role are given" in out
    assert "the memory registry is inside one process" in in_process("doctor", "--cluster", code=2)


def test_a_dead_broker_and_a_claimed_address_are_fails(cluster: tuple[Site, dict[str, Process]]) -> None:
    """The last test of this file: it kills a broker."""
    here, processes = cluster
    path = str(here.directory / "gateway.toml")
    here.agent("a2", "127.3.0.1", [processes["b1"].address("broker_started")])

    def fails() -> str:
        return "\n".join(of(doctor("--cluster", "--config", path, code=None), "FAIL"))

    until(lambda: "a2 (127.3.0.1; link from" in fails(), what="the refusal of a2")
    assert "address_taken" in fails()
    processes["b2"].kill()
    until(lambda: "b2 (127.0.0.2) died: its last heartbeat was" in fails(), what="b2 to be dead")
