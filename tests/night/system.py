"""The system of the night: the lab's network and parts, with two gateways whose API answers, and short heartbeats."""

from __future__ import annotations

import http.client
import json
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lab.conftest import start_target, wait_listening
from lab.roles import ADMIN_PORT, REDIS_PORT, Lab
from lab.target import ECHO_PORT, HALF_CLOSE_PORT, HTTP_PORT, UNEXPOSED_PORT
from lab.topology import BROKERS, HOSTS, Balance, Host, Process, Topology, wait_for
from rtunnel.trust.users import new_hash, put_user

GATEWAYS = ("gateway", "gateway2")
TOKEN = "a-token-of-the-night-0123456789"
PASSWORD = "night"
#: Seconds of a gateway's dial, and of an agent's connect to a target: the lab's network has no delay.
DIAL_TIMEOUT, TARGET_TIMEOUT = 4.0, 2.0
#: The client that the policy keeps away from agent a2's host, and the user of `gateway.users`.
DENIED, USER = "10.3.0.66", "alice"
POLICY = f"""
[[rule]]
name = "no batch jobs on a2"
action = "deny"
from = ["{DENIED}"]
to = ["10.1.0.8"]

[[rule]]
action = "allow"
"""

#: Seconds without a byte, above those of a link that lives: an agent looks every 5 s, and pings after 3.5 s.
SILENT_SECONDS = 9.0
#: `rtunnel` by a clock that is as many seconds off as the next word says.
SHIFTED = (sys.executable, "-m", "night.shifted")

_RTUNNEL = str(Path(sys.executable).with_name("rtunnel"))


@dataclass(frozen=True)
class Answer:
    """One command and its output."""

    command: str
    status: int
    output: str

    def line(self, word: str) -> str:
        """Return the line that begins with this word, without the word; "" when there is none."""
        for line in self.output.splitlines():
            if line.startswith(f"{word} "):
                return line.removeprefix(word).strip()
        return ""


class Night(Lab):
    """The whole system, and the ways to break it."""

    def __init__(self, net: Topology, directory: Path) -> None:
        super().__init__(net, directory)
        self.registry = {"heartbeat": 1.0, "ttl": 3.0, "quarantine": 5.0}
        self._redis_url = f"redis://:{PASSWORD}@{net['redis'].ip}:{REDIS_PORT}/0"
        self.targets: dict[str, Process] = {}
        self._issued: list[str] = []

    # -- starting ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything; return when the system is whole."""
        for name in HOSTS:
            self.targets[name] = start_target(self.net[name])
        token = self.directory / "api.token"
        token.write_text(TOKEN + "\n")
        token.chmod(0o600)
        put_user(self.directory / "users", USER, new_hash("a-horse-of-the-tests"))
        super().start()
        self.net["authority"].check(_RTUNNEL, "pki", "issue", "gateway", "gateway2", "--dir", str(self.secrets))
        self.start_gateway("gateway2", key=str(self.secrets / "gateway2.key"))
        self.wait_ready("gateway2")
        for name in HOSTS:
            self.wait_target(name)

    def wait_target(self, name: str) -> None:
        """Wait until the services of a host listen."""
        wait_listening(self.net[name], HTTP_PORT, HALF_CLOSE_PORT, ECHO_PORT, UNEXPOSED_PORT)

    def start_redis(self, *options: str) -> None:
        super().start_redis("--requirepass", PASSWORD, *options)

    def _redis_answers(self) -> bool:
        with self.net["redis"].connect(self.net["redis"].ip, REDIS_PORT, 1) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(64).startswith(b"-NOAUTH")

    def start_gateway(self, place: str = "gateway", /, **keys: object) -> None:
        ours = {
            "name": place,
            "admin_token": str(self.directory / "api.token"),
            "dial_timeout": DIAL_TIMEOUT,
            "users": str(self.directory / "users"),
            "no_auth": ["0.0.0.0/0"],
        }
        super().start_gateway(place, **ours, **keys)
        (self.directory / "policy.toml").write_text(POLICY)

    def start_broker(self, name: str, **keys: object) -> None:
        super().start_broker(name, **{"admin_token": str(self.directory / "api.token"), **keys})

    def start_agent(self, name: str, **keys: object) -> None:
        super().start_agent(name, **{"target_timeout": TARGET_TIMEOUT, "backoff_cap": 1.0, "drain": 0, **keys})

    # -- asking ------------------------------------------------------------------------------------------------

    def ask(self, command: str, place: str = "gateway") -> Answer:
        """Run one command on a machine, with that machine's configuration."""
        words = shlex.split(command)
        assert words[0] == "rtunnel"
        done = self.net[place].run(_RTUNNEL, *words[1:], "--config", str(self.config(place)))
        return Answer(command, done.returncode, done.stdout + done.stderr)

    def traced(self, ip: str, port: int = HTTP_PORT, place: str = "gateway") -> dict[str, Any]:
        """Return a trace's report, without a process for the command."""
        connection = http.client.HTTPConnection("127.0.0.1", ADMIN_PORT)
        connection.sock = self.net[place].connect("127.0.0.1", ADMIN_PORT, 30.0)
        try:
            connection.request(
                "POST", "/v1/trace", json.dumps({"target": f"{ip}:{port}"}), {"Authorization": f"Bearer {TOKEN}"}
            )
            response = connection.getresponse()
            report: dict[str, Any] = json.loads(response.read())
            assert response.status == 200, report
            return report
        finally:
            connection.close()

    def suspected(self) -> str:
        """Return what the traces of all hosts by both gateways blame; empty when they blame nothing."""
        for gateway in GATEWAYS:
            for name in HOSTS:
                report = self.traced(self.net[name].ip, place=gateway)
                if report["code"] != "accepted" or report["cause"]:
                    return f"{gateway} to {name}: {report['code']}: {report['cause']}"
        return ""

    def wait_healthy(self, seconds: float = 40.0) -> None:
        """Wait until the system is whole, and no trace blames anything."""
        self.wait_whole(seconds)
        self.wait_until(self.suspected_none, seconds)

    def suspected_none(self) -> bool:
        """Return whether no trace blames anything; else raise ValueError, which says what."""
        if fault := self.suspected():
            raise ValueError(fault)
        return True

    def wait_until(self, probe: Callable[[], object], seconds: float = 25.0) -> None:
        """Wait for a state."""
        wait_for(getattr(probe, "__name__", "state"), probe, seconds)

    def wait_gone(self, name: str, seconds: float = 25.0) -> None:
        """Wait until no tuple of the host is left, and the registry tells how its agent left."""
        ip = self.net[name].ip
        self.wait_until(lambda: not any(entry["agent_ip"] == ip for entry in self.tuples()), seconds)
        self.wait_until(lambda: f" {name} was " in self.traced(ip)["text"], seconds)

    # -- breaking ----------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Kill a part."""
        self.parts[name].kill()

    @contextmanager
    def replaced_agent(self, name: str, **keys: object) -> Iterator[None]:
        """Run the host's agent with these keys changed; then as it was."""
        self.kill(name)
        self.start_agent(name, **keys)
        try:
            yield
        finally:
            self.kill(name)
            self.start_agent(name)

    @contextmanager
    def replaced_broker(self, name: str, **keys: object) -> Iterator[None]:
        """Run a broker with these keys changed; then as it was."""
        self.kill(name)
        self.start_broker(name, **keys)
        try:
            yield
        finally:
            self.kill(name)
            self.start_broker(name)
            self.wait_ready(name)

    def place(self, agent: str, *brokers: str) -> None:
        """Bring an agent's sessions to these two brokers."""
        self.kill(agent)
        with self.balanced("roundrobin", brokers):
            self.start_agent(agent)
            self.wait_until(lambda: self.reached(agent) and self.nodes_of(agent) == sorted(brokers))
        ip = self.net[agent].ip
        self.wait_until(lambda: {way["node"] for way in self.traced(ip)["ways"]} == set(brokers))

    @contextmanager
    def balanced(self, mode: Balance, among: Sequence[str] = BROKERS) -> Iterator[None]:
        """Let the VIP pick a broker in this way; then at random."""
        self.net.balance(mode, among)
        try:
            yield
        finally:
            self.net.balance("random")

    def reached_once(self, agent: str) -> bool:
        """Return whether an agent has exactly one session, by its own account."""
        return len(self.status(agent)["sessions"]) == 1

    def wait_silent(self, agent: str, seconds: float = 25.0, paths: int = 2) -> None:
        """Wait until so many brokers have heard nothing of an agent for longer than a link that lives is silent."""

        def silent() -> bool:
            return sum(self._silence(broker, agent) > SILENT_SECONDS for broker in BROKERS) >= paths

        self.wait_until(silent, seconds)

    def _silence(self, broker: str, agent: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", ADMIN_PORT)
        connection.sock = self.net[broker].connect("127.0.0.1", ADMIN_PORT, 5.0)
        try:
            connection.request("GET", f"/v1/sessions?agent={agent}", headers={"Authorization": f"Bearer {TOKEN}"})
            sessions = json.loads(connection.getresponse().read())["sessions"]
            return max((float(session["silence"]) for session in sessions), default=0.0)
        finally:
            connection.close()

    def wait_refused(self, name: str, why: str) -> None:
        """Wait until the registry tells that the host's agent was refused, with these words."""
        ip = self.net[name].ip
        self.wait_until(lambda: why in self.traced(ip)["text"].partition("was refused")[2])

    @contextmanager
    def interface(self, name: str, device: str, address: str) -> Iterator[None]:
        """Give a host one more interface with this address."""
        self.net[name].check("ip", "link", "add", device, "type", "bridge")
        try:
            self.net[name].check("ip", "addr", "add", address, "dev", device)
            self.net[name].check("ip", "link", "set", device, "up")
            yield
        finally:
            self.net[name].check("ip", "link", "del", device)

    @contextmanager
    def certified(
        self, name: str, namespace: str, *addresses: str, clock: int = 0, other_ca: bool = False
    ) -> Iterator[None]:
        """Run the host's agent with these addresses and a certificate for them, issued by a clock that is so many
        seconds off, or by another CA; then as it was."""
        place, directory = self.net["authority"], self.directory / f"issued-{len(self._issued)}"
        self._issued.append(name)
        pki = directory / "pki" if other_ca else self.secrets
        directory.mkdir()
        if other_ca:
            place.check(_RTUNNEL, "pki", "init", str(pki))
        words = [word for address in addresses for word in ("--address", address)]
        words += ["--namespace", namespace, "--dir", str(pki), "--into", str(directory), "--take-over"]
        if clock:
            words += ["--days", "0.01"]
        place.check(*SHIFTED, str(clock), "pki", "issue", "agent", name, *words)
        keys = {"certificate": str(directory / f"{name}.pem"), "key": str(directory / f"{name}.key")}
        with self.replaced_agent(
            name, addresses=list(addresses), namespace=namespace, identity="", join_token="", **keys
        ):
            yield

    def forget_identity(self, name: str) -> None:
        """Remove the certificate of a host's agent, and give it a new token."""
        shutil.rmtree(self.identity(name))
        (self.directory / f"{name}.token").unlink()

    @contextmanager
    def clone(self, agent: str, place: str) -> Iterator[None]:
        """Run a second agent with a copy of this one's certificate on another host."""
        directory = self.directory / f"clone-of-{agent}"
        shutil.copytree(self.identity(agent), directory)
        clone = self.spawn_impostor(
            place, agent_id=agent, addresses=[self.net[agent].ip], identity=str(directory), backoff_cap=1.0
        )
        try:
            yield
        finally:
            clone.kill()
            shutil.rmtree(directory)

    @contextmanager
    def misdirected(self, place: str) -> Iterator[None]:
        """Let the VIP lead new links to this address; then to the brokers."""
        self.net.router.check(
            "nft",
            "-f",
            "-",
            stdin=f"flush chain ip vip brokers\nadd rule ip vip brokers meta l4proto tcp dnat to {place}\n",
        )
        try:
            yield
        finally:
            self.net.balance("random")

    @contextmanager
    def shifted_broker(self, name: str, seconds: int) -> Iterator[None]:
        """Run a broker whose clock is so many seconds ahead; then as it was."""
        with self.replaced_broker(name):
            self.kill(name)
            words = (*SHIFTED, str(seconds), "broker", "--config", str(self.config(name)))
            self.parts[name] = self.net[name].spawn(*words, name=f"broker@{name}")
            yield

    @contextmanager
    def wrong_password(self, name: str) -> Iterator[None]:
        """Run a broker with a wrong password of Redis; then as it was."""
        right = self._redis_url
        self._redis_url = right.replace(f":{PASSWORD}@", ":wrong@")
        try:
            self.kill(name)
            self.start_broker(name)
            self._redis_url = right
            yield
        finally:
            self._redis_url = right
            self.kill(name)
            self.start_broker(name)
            self.wait_ready(name)

    @contextmanager
    def without_descriptors(self, name: str) -> Iterator[None]:
        """Let a part open no more descriptors than it has."""
        pid = self.parts[name].pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
        first_free = next(number for number in count() if number not in used)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (first_free, before[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    @contextmanager
    def download(self, ip: str) -> Iterator[None]:
        """Download from a host what does not fit into a packet, for as long as it is entered."""
        url = f"http://{ip}:{HTTP_PORT}/big?bytes={1 << 20}"
        curl = self.net["controller"].spawn(
            "curl", "--silent", "--noproxy", "", "--socks5", self.proxy("controller"), "--output", "/dev/null", url,
            name="download",
        )  # fmt: skip
        try:
            yield
        finally:
            curl.kill()

    @contextmanager
    def filtered(self, host: Host, hook: str, *rules: str) -> Iterator[None]:
        """Put rules before all others of a hook (input, output, forward) of a host or the router."""
        lines = "\n".join(rules)
        host.check(
            "nft", "-f", "-",
            stdin=f"table inet night {{\nchain night {{\ntype filter hook {hook} priority -200;\n{lines}\n}}\n}}\n",
        )  # fmt: skip
        try:
            yield
        finally:
            host.check("nft", "delete", "table", "inet", "night")
