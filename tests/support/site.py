"""The command line as an operator uses it: a directory with keys and TOML files, and processes started from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from rtunnel.cli import cli
from rtunnel.trust import pki
from support.plumbing import free_port
from support.polling import until
from support.ports import as_text, guarded_ports
from support.secrecy import heard

DRAIN = 20.0
TTL = 3.0
WEB = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = ("hello from %s\\n" % self.server.server_address[0]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Page)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def environment() -> dict[str, str]:
    """Ours, without what would configure rtunnel or curl."""
    return {k: v for k, v in os.environ.items() if not (k.startswith("RTUNNEL_") or k.lower().endswith("_proxy"))}


def run(*command: str, code: int | None = 0) -> str:
    """A command to its end; its output. Its exit code is as expected (None: any)."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment())
    heard(done.stderr)
    assert code is None or done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def rtunnel(*arguments: str, code: int = 0) -> str:
    """The command `rtunnel` to its end; its output."""
    return run(sys.executable, "-m", "rtunnel", *arguments, code=code)


def in_process(*arguments: str, code: int = 0) -> str:
    """The same without a process of its own, which takes most of the time of a short command."""
    ours = dict.fromkeys(name for name in os.environ if name.startswith("RTUNNEL_"))
    done = CliRunner().invoke(cli, arguments, env=ours)
    heard(done.stderr)
    assert done.exit_code == code, f"{arguments}: {done.exit_code}\n{done.output}"
    return done.output


class Process:
    """A running `rtunnel ROLE`; its log lines are read from its stderr."""

    def __init__(self, directory: Path, name: str, *arguments: str) -> None:
        self.name = name
        self._log = directory / f"{name}.{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "rtunnel", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())

    @property
    def text(self) -> str:
        return self._log.read_text()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log lines of one event, so far."""
        whole = [json.loads(line) for line in self.text.splitlines(keepends=True) if line.endswith("}\n")]
        return [line for line in whole if line["event"] == event]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of this event."""

        def found() -> list[dict[str, Any]]:
            lines = self.lines(event)
            assert lines or self.process.poll() is None, f"{self.name} ended: {self.text}"
            return lines

        return until(found, what=f"{event} of {self.name}")[0]

    def address(self, event: str) -> str:
        """Where it listens: the kernel chose the port, and the log tells it."""
        return str(self.wait_for(event)["listen"])

    def admin(self, number: int = 0) -> str:
        """Its health address."""
        until(lambda: len(self.lines("admin_endpoint_opened")) > number, what="admin")
        return str(self.lines("admin_endpoint_opened")[number]["address"])

    def end(self, number: signal.Signals = signal.SIGTERM, patience: float = DRAIN) -> tuple[int, float]:
        """Signal it; its exit code, and the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(patience), time.monotonic() - began

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


def health(address: str, path: str) -> tuple[int, dict[str, Any]]:
    """A probe's look: the status, and the JSON of the answer."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=15) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def ready(address: str) -> bool:
    return health(address, "/readyz")[0] == 200


@dataclass
class Site:
    """A directory with keys and TOML files, and the processes that were started from it."""

    directory: Path
    stack: ExitStack
    registry_url: str
    processes: dict[str, Process] = field(default_factory=dict)
    spare: list[str] = field(default_factory=list)  # addresses of brokers to come

    def toml(self, name: str, text: str) -> Path:
        """A configuration file; paths in it are relative to it."""
        common = f"""
            [log]
            format = "json"
            [registry]
            url = "{self.registry_url}"
            heartbeat = 0.4
            ttl = {TTL}
            quarantine = {TTL}
            reconcile = 2.0
            """
        path = self.directory / f"{name}.toml"
        path.write_text(textwrap.dedent(common) + textwrap.dedent(text))
        return path

    def start(self, name: str, role: str, text: str, *flags: str) -> Process:
        """A role from a file of its own."""
        path = self.toml(name, text)
        process = Process(self.directory, name, role, "--config", str(path), *flags)
        self.stack.callback(process.kill)
        self.processes[name] = process
        return process

    def broker(self, node: str, number: int, *flags: str) -> Process:
        """Each node has an IP of its own, as on machines of their own, and is named like its host."""
        text = f"""
            [broker]
            listen = "127.0.0.{number}:0"
            advertise_ip = "127.0.0.{number}"
            node_id = "{node}"
            host = "{node}"
            port_range = "{as_text(guarded_ports(number))}"
            certificate = "pki/broker.pem"
            key = "pki/broker.key"
            cluster_key = "pki/cluster.key"
            ca = "pki/ca.pem"
            drain = {DRAIN}
            admin = "127.0.0.1:0"
            """
        return self.start(node, "broker", text, *flags)

    def gateway(self, *flags: str) -> Process:
        text = f"""
            [gateway]
            listen = "127.0.0.1:0"
            key = "pki/gateway.key"
            ca = "pki/ca.pem"
            hedge_delay = 5
            lame_duck = 0
            drain = {DRAIN}
            admin = "127.0.0.1:0"
            """
        return self.start("gateway", "gateway", text, *flags)

    def agent(self, name: str, ip: str, brokers: list[str], *flags: str) -> Process:
        made = f"agent-{len(self.processes)}"
        pki.issue_agent(
            self.directory / "pki", made, agent_id=name, namespace="default", addresses=[ip], take_over=True
        )
        text = f"""
            [agent]
            brokers = {json.dumps(brokers)}
            agent_id = "{name}"
            addresses = ["{ip}"]
            exposes = ["1024-65535"]
            ca = "pki/ca.pem"
            certificate = "pki/{made}.pem"
            key = "pki/{made}.key"
            backoff_cap = 0.5
            drain = {DRAIN}
            admin = "127.0.0.1:0"
            """
        return self.start(name, "agent", text, *flags)

    def web(self, ip: str, port: int = 0) -> int:
        """An HTTP server on this IP, a process of its own; its port."""
        command = [sys.executable, "-c", WEB, ip, str(port)]
        server = self.stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        self.stack.callback(server.kill)
        assert server.stdout is not None
        return int(server.stdout.readline())

    def ask_registry(self, *arguments: str, code: int = 0) -> str:
        """`rtunnel status` or `resolve`, with the gateway's file."""
        return in_process(*arguments, "--config", str(self.directory / "gateway.toml"), code=code)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask_registry("status", "--json"))
        return found


@contextmanager
def site(directory: Path, registry_url: str) -> Iterator[Site]:
    """Keys by `rtunnel pki init`; at the end every process is killed."""
    made = in_process("pki", "init", str(directory / "pki"))
    assert all(name in made for name in ("ca.pem", "broker.pem", "cluster.key", "gateway.key", "join.token"))
    with ExitStack() as stack:
        yield Site(directory, stack, registry_url)


def fetch(proxy: str, url: str, *, socks: bool = True, code: int | None = 0) -> str:
    """What curl prints."""
    way = ["--socks5-hostname", proxy] if socks else ["--proxy", f"http://{proxy}"]
    return run("curl", "-sS", "-m", "15", *way, url, code=code)


def free_address() -> str:
    """An address that nobody listens on."""
    return f"127.0.0.1:{free_port()}"
