"""Everything in examples/ works as it stands: the controller runs, the other files are read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rtunnel import config
from support.cluster import Cluster, in_thread, running_cluster

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DROP_IN = EXAMPLES / "systemd" / "rtunnel-agent.service.d" / "10-site.conf"
UNIT = ROOT / "deploy" / "systemd" / "rtunnel-agent.service"


class Service(BaseHTTPRequestHandler):
    """Says in the status line on which address it was asked."""

    def do_GET(self) -> None:
        self.send_response(200, f"from {self.request.getsockname()[0]} {self.path}")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[int]:
    """A web service on all addresses of this machine; its port."""
    with ThreadingHTTPServer(("0.0.0.0", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


# --- the controller ---------------------------------------------------------------------------------------------------


async def control(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """Run controller.py against the cluster's gateway, without anything of this environment's packages."""
    host, port = cluster.gateway.bound
    command = [sys.executable, "-I", "-S", str(EXAMPLES / "controller.py"), "--proxy", f"{host}:{port}", *words]
    return await in_thread(lambda: subprocess.run(command, capture_output=True, text=True, timeout=30))


async def test_the_controller_asks_thirty_hosts(tmp_path: Path, service: int) -> None:
    """Thirty hosts behind five agents are asked at their own addresses, and each answer comes from the right one."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2, agents=0)
        hosts = [f"127.30.0.{number}" for number in range(1, 31)]
        for number in range(5):
            await cluster.start_agent(f"a{number}", *hosts[number * 6 : number * 6 + 6])
        await cluster.whole()
        done = await control(cluster, "--port", str(service), "--path", "/metrics", "127.30.0.0/27")
        assert (done.returncode, done.stderr) == (0, "30 of 30 hosts answered\n"), done.stdout
        assert sorted(done.stdout.splitlines()) == sorted(f"{ip} HTTP/1.0 200 from {ip} /metrics" for ip in hosts)


async def test_the_controller_says_why_a_host_is_missing(tmp_path: Path, service: int) -> None:
    """A host without an agent and a port that is not exposed are named with their reasons; the exit code is 1."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1, agents=1, exposes=[str(service)])
        done = await control(cluster, "--port", str(service), "127.1.0.1", "127.1.0.99")
        assert (done.returncode, done.stderr) == (1, "1 of 2 hosts answered\n")
        assert "127.1.0.1 HTTP/1.0 200 from 127.1.0.1 /\n" in done.stdout
        assert "127.1.0.99 failed: no agent answers for this address\n" in done.stdout
        done = await control(cluster, "--port", "9", "127.1.0.1")
        assert done.stdout == "127.1.0.1 failed: a rule does not allow it, or the agent does not expose the port\n"


# --- systemd, proxychains ---------------------------------------------------------------------------------------------


def assignments(text: str) -> list[tuple[str, str]]:
    """The lines KEY=VALUE of a unit."""
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "["))]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


def test_the_drop_in_sets_keys_that_exist() -> None:
    """Its variables are keys of the configuration with good values; the unit that it adds to exists."""
    variables = dict(value.split("=", 1) for key, value in assignments(DROP_IN.read_text()) if key == "Environment")
    loaded = config.load(None, variables, {})
    assert loaded.agent.exposes == ["22", "9100"] and loaded.log.level == "info"
    assert DROP_IN.parent.name == f"{UNIT.name}.d"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_drop_in(tmp_path: Path) -> None:
    """systemd-analyze finds no fault with the agent's unit and the drop-in together."""
    program = tmp_path / "rtunnel"
    program.touch(mode=0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/rtunnel/bin/rtunnel", str(program)))
    shutil.copytree(DROP_IN.parent, tmp_path / DROP_IN.parent.name)

    def complaints() -> list[str]:
        command = ["systemd-analyze", "verify", "--man=no", str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return [line for line in done.stderr.splitlines() if "rtunnel" in line]

    assert complaints() == []
    (tmp_path / DROP_IN.parent.name / DROP_IN.name).write_text("[Service]\nMemoryHihg=1\n")
    assert complaints(), "the drop-in was read"


def test_the_proxychains_file_leads_to_a_gateway() -> None:
    """One SOCKS5 proxy at the gateway's default port, no names, and more patience than the gateway has."""
    lines = [line for line in (EXAMPLES / "proxychains.conf").read_text().splitlines() if line and line[0] != "#"]
    assert lines[lines.index("[ProxyList]") + 1 :] == ["socks5 192.0.2.10 1080"]
    assert "proxy_dns" not in lines
    loaded = config.load(None, {}, {})
    (seconds,) = {int(line.split()[1]) / 1000 for line in lines if re.match(r"tcp_\w+_time_out ", line)}
    assert seconds > loaded.gateway.dial_timeout
    assert loaded.gateway.listen.endswith(":1080")


def test_the_page_lists_every_example() -> None:
    """examples/README.md has a row for each file."""
    listed = set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text()))
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file()}
    assert listed == files - {"README.md"}
