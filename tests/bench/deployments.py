"""The systems: how each is configured and started. Everybody on 127.0.0.1, on ports that the kernel chose.

Peers are taken from the directories in RTUNNEL_BENCH_PEERS (separated by ":") and from PATH; one that is not there
is left out and named in the report. They run with their own defaults but for what stands here.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12

from bench import load
from bench.load import Address, Board, Way
from bench.procs import BenchError, Process, Processes, accepts, free_port, wait_for, with_children
from bench.revision import OURS, Code
from rtunnel.trust import pki
from support.plumbing import free_ports
from support.ports import lease
from support.redis_server import RedisServer

OPEN: Final = "open port"
SOCKS: Final = "SOCKS5"
LONG: Final = "open port, long way"
#: Round trip of the long way, in seconds.
LONG_WAY: Final = 0.05

_FORK: Final = get_context("fork")


@dataclass(frozen=True)
class System:
    """One row of the report."""

    name: str
    product: str
    mode: str
    path: str
    way: Way
    roots: tuple[int, ...]  # process ids of the deployment that this way leads through
    reference: str = ""  # the system that ratios are taken against: frp in the same mode and path

    @property
    def pids(self) -> list[int]:
        """Of all processes whose CPU time counts."""
        return with_children(self.roots)


@dataclass
class Site:
    """What deployments share: a directory, a target, secrets, a Redis; and the list of all that must end."""

    directory: Path
    processes: Processes
    board: Board = field(default_factory=Board)
    redis: RedisServer | None = None
    left_open: int = 0  # connections to the target that some tunnel has forgotten
    _helpers: list[ForkProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        pki.init(self.directory / "pki", names=["localhost"])
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.target: Address = listener.getsockname()
        self.target_pid = self._fork(load.run_target, listener, self.board)
        listener.close()

    def need_redis(self) -> RedisServer:
        """Started by the first who asks."""
        if self.redis is None:
            directory = self.directory / "redis"
            directory.mkdir()
            self.redis = RedisServer(directory).start()
        return self.redis

    def delay(self, onward: Address, seconds: float) -> int:
        """A port that leads to `onward` by a long way."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._fork(load.run_delay, listener, onward, seconds)
        port = int(listener.getsockname()[1])
        listener.close()
        return port

    def secret(self, name: str) -> str:
        """Path of a file of `rtunnel pki init`."""
        return str(self.directory / "pki" / name)

    def certify(self, agent: str, address: str) -> dict[str, object]:
        """What an agent's configuration says of its certificate, which is made when there is none."""
        made = self.directory / "pki"
        if not (made / f"{agent}.pem").exists():
            # Each deployment is a cluster of its own with the same target; they only share the CA.
            pki.issue_agent(made, agent, agent_id=agent, namespace="default", addresses=[address], take_over=True)
        return {"certificate": str(made / f"{agent}.pem"), "key": str(made / f"{agent}.key")}

    def write(self, name: str, text: str) -> str:
        """A configuration file; its path."""
        path = self.directory / name
        path.write_text(text)
        return str(path)

    def start(self, name: str, command: Sequence[str], port: int = 0, more: Mapping[str, str] | None = None) -> Process:
        """Start a process, and wait until it listens on `port` (if that is given).

        `more`: variables for its environment.
        """
        environ = {"RUST_LOG": "error", "http_proxy": "", "https_proxy": "", "all_proxy": ""}
        process = self.processes.start(name, command, {**environ, **(more or {})})
        if port:
            wait_for(lambda: _alive(process) and accepts(port), f"{name} to listen on {port}\n{process.tail()}")
        return process

    def _fork(self, work: Callable[..., object], *args: object) -> int:
        process = _FORK.Process(target=work, args=args, daemon=True)
        process.start()
        self._helpers.append(process)
        assert process.pid is not None
        return process.pid

    def check(self) -> None:
        """Raises BenchError when a part of the load generator has died."""
        for helper in self._helpers:
            if not helper.is_alive():
                raise BenchError("the load generator's target has died")

    def end(self) -> None:
        """End all of it."""
        self.processes.end()
        if self.redis is not None:
            self.redis.kill()
        for helper in self._helpers:
            helper.kill()
            helper.join()


def _alive(process: Process) -> bool:
    process.check()
    return True


def find(name: str) -> str:
    """The path of a peer's binary; empty when there is none."""
    named = os.environ.get("RTUNNEL_BENCH_PEERS", "")
    return shutil.which(name, path=os.pathsep.join((named, os.environ.get("PATH", ""), "/usr/sbin"))) or ""


# --- no tunnel, and rtunnel ---------------------------------------------------------------------------------------


def none(site: Site) -> Iterator[System]:
    """The load generator's own ceiling."""
    yield System("none", "none", "-", OPEN, Way(site.target, site.target), ())


def none_long(site: Site) -> Iterator[System]:
    """The long way's own ceiling."""
    way = Way(("127.0.0.1", site.delay(site.target, LONG_WAY / 2)), site.target)
    yield System("none-long", "none", "-", LONG, way, ())


def rtunnel(site: Site, security: str, code: Code = OURS) -> Iterator[System]:
    """Broker, agent, gateways and a real Redis; the open port leads through the first two only.

    A gateway wants proofs, as it does by default; for TLS there is one more that does not: what a proof costs.
    """
    name = f"rtunnel-{security}{code.word}"
    broker, links = start_broker(site, name, security, code=code)
    agent, port = _start_agent(site, name, security, links, code)
    two = (broker.pid, agent.pid)
    way = Way(("127.0.0.1", port), site.target)
    yield System(code.named(f"rtunnel-{security}"), "rtunnel", security, OPEN, way, two, f"frp-{security}")
    for proof, suffix in (("required", ""), ("off", "-noproof")):
        if security == "tls" or not suffix:
            gateway, socks = _start_gateway(site, name, proof, code)
            way, three = Way(("127.0.0.1", socks), site.target, socks=True), (gateway.pid, *two)
            shown = code.named(f"rtunnel-{security}-socks{suffix}")
            yield System(shown, "rtunnel", security, SOCKS, way, three, f"frp-{security}-socks")


def _start_gateway(site: Site, name: str, proof: str, code: Code) -> tuple[Process, int]:
    """A gateway of this deployment; the process and its port."""
    socks = free_port()
    keys: dict[str, object] = {
        "listen": f"127.0.0.1:{socks}",
        "key": site.secret("gateway.key"),
        "lame_duck": 0,
        "ca": site.secret("ca.pem"),
        "proof": proof,
        "admin": "",
    }
    sections = {"registry": _registry(site, name), "gateway": keys}
    return start_role(site, f"{name}-gateway-{proof}", "gateway", sections, socks, code), socks


def rtunnel_long(site: Site, code: Code = OURS) -> Iterator[System]:
    """The same with a long way between agent and broker."""
    name = f"rtunnel-tls-long{code.word}"
    broker, links = start_broker(site, name, "tls", code=code)
    agent, port = _start_agent(site, name, "tls", site.delay(("127.0.0.1", links), LONG_WAY / 2), code)
    way = Way(("127.0.0.1", port), site.target)
    shown = code.named("rtunnel-tls-long")
    yield System(shown, "rtunnel", "tls", LONG, way, (broker.pid, agent.pid), "frp-tls-long")


def start_role(
    site: Site, name: str, role: str, keys: dict[str, dict[str, object]], port: int = 0, code: Code = OURS
) -> Process:
    """One rtunnel process."""
    path = site.write(f"{name}.toml", _toml({"log": {"format": "json"}, **code.fitting(keys)}))
    # Not `-m rtunnel`: an older revision has no rtunnel/__main__.py.
    command = [sys.executable, "-c", "from rtunnel.cli import main; main()", role, "--config", path]
    return site.start(name, command, port, code.environ)


def start_broker(site: Site, name: str, security: str, ports: int = 50, code: Code = OURS) -> tuple[Process, int]:
    """A broker with so many guarded ports, and the port for links."""
    links = free_port()
    # A whole fleet needs blocks of its own.
    first = (free_ports(ports + 50) if ports <= 100 else lease(ports + 50))[0]
    keys: dict[str, object] = {
        "node_id": name,
        "listen": f"127.0.0.1:{links}",
        "advertise_ip": "127.0.0.1",
        "port_range": f"{first}-{first + ports - 1}",
        "open_ports": {"range": f"{first + ports}-{first + ports + 49}", "allow": ["127.0.0.0/8"]},
        "security": security,
        "certificate": site.secret("broker.pem"),
        "key": site.secret("broker.key"),
        "cluster_key": site.secret("cluster.key"),
        "ca": site.secret("ca.pem") if security == "tls" else "",
        "join_token": site.secret("join.token"),
        "source_handshakes": 0,  # a whole fleet comes from one address
        "admin": "",
    }
    sections = {"registry": _registry(site, name), "broker": keys}
    return start_role(site, f"{name}-broker", "broker", sections, links, code), links


def _start_agent(site: Site, name: str, security: str, links: int, code: Code) -> tuple[Process, int]:
    """An agent with one open port; the process and that port."""
    host, port = site.target
    keys: dict[str, object] = {
        "brokers": [f"127.0.0.1:{links}"],
        "agent_id": name,
        "addresses": [host],
        "exposes": [str(port)],
        "redundancy": 1,
        "security": security,
        "ca": site.secret("ca.pem"),
        **site.certify(name, host),
        "join_token": site.secret("join.token"),
        "admin": "",
        "publish": [{"target": f"{host}:{port}"}],
    }
    process = start_role(site, f"{name}-agent", "agent", {"agent": keys}, code=code)
    wait_for(lambda: _alive(process) and bool(_open_port(process)), f"{name}'s open port\n{process.tail()}")
    return process, _open_port(process)


#: The event of a new session; 0.1 called it session_up, and `--against` measures older revisions.
_OPENED: Final = ("session_opened", "session_up")


def _open_port(agent: Process) -> int:
    for line in agent.log.read_text().splitlines():
        if line.startswith("{") and (event := json.loads(line)).get("event") in _OPENED:
            for granted in event["open_ports"]:
                return int(granted.partition("->")[0])
    return 0


def _registry(site: Site, prefix: str) -> dict[str, object]:
    return {"url": site.need_redis().url, "prefix": prefix}


def _toml(keys: dict[str, dict[str, object]]) -> str:
    # JSON's strings, numbers and lists are TOML's; tables stand inline.
    def value(item: object) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{key} = {value(inner)}" for key, inner in item.items()) + " }"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item)

    lines: list[str] = []
    for name, section in keys.items():
        lines += [f"[{name}]", *(f"{key} = {value(item)}" for key, item in section.items())]
    return "\n".join([*lines, ""])


# --- frp ----------------------------------------------------------------------------------------------------------


def frp(site: Site, mode: str) -> Iterator[System]:
    """frps and frpc: a tcp proxy, and the socks5 plugin."""
    name = f"frp-{mode}"
    server = free_port()
    frps = _start_frps(site, name, server, mux=mode != "nomux")
    port, socks = free_port(), free_port()
    frpc = _start_frpc(site, name, mode, server, port, socks)
    roots = (frps.pid, frpc.pid)
    way = Way(("127.0.0.1", port), site.target)
    yield System(name, "frp", _frp_mode(mode), OPEN, way, roots, _same_or_mux(mode, ""))
    way = Way(("127.0.0.1", socks), site.target, socks=True)
    yield System(f"{name}-socks", "frp", _frp_mode(mode), SOCKS, way, roots, _same_or_mux(mode, "-socks"))


def frp_long(site: Site) -> Iterator[System]:
    """The same with a long way between frpc and frps."""
    name = "frp-tls-long"
    server = free_port()
    frps = _start_frps(site, name, server, mux=True)
    port = free_port()
    frpc = _start_frpc(site, name, "tls", site.delay(("127.0.0.1", server), LONG_WAY / 2), port, 0)
    yield System(name, "frp", "tls", LONG, Way(("127.0.0.1", port), site.target), (frps.pid, frpc.pid), name)


def _start_frps(site: Site, name: str, port: int, *, mux: bool) -> Process:
    text = f"""
bindAddr = "127.0.0.1"
proxyBindAddr = "127.0.0.1"
bindPort = {port}
log.level = "error"
transport.tcpMux = {json.dumps(mux)}
"""
    return site.start(f"{name}-frps", [find("frps"), "-c", site.write(f"{name}-frps.toml", text)], port)


def _start_frpc(site: Site, name: str, mode: str, server: int, port: int, socks: int) -> Process:
    host, target = site.target
    text = f"""
serverAddr = "127.0.0.1"
serverPort = {server}
natHoleStunServer = "127.0.0.1:1"
log.level = "error"
transport.tcpMux = {json.dumps(mode != "nomux")}
transport.tls.enable = {json.dumps(mode == "tls")}

[[proxies]]
name = "open"
type = "tcp"
localIP = "{host}"
localPort = {target}
remotePort = {port}
"""
    if socks:
        text += f"""
[[proxies]]
name = "socks"
type = "tcp"
remotePort = {socks}
[proxies.plugin]
type = "socks5"
"""
    command = [find("frpc"), "-c", site.write(f"{name}-frpc.toml", text)]
    process = site.start(f"{name}-frpc", command, port)
    if socks:
        wait_for(lambda: accepts(socks), f"{name}'s socks5 plugin")
    return process


def _frp_mode(mode: str) -> str:
    return "plain, no mux" if mode == "nomux" else mode


def _same_or_mux(mode: str, path: str) -> str:
    return f"frp-{'plain' if mode == 'nomux' else mode}{path}"


# --- other peers --------------------------------------------------------------------------------------------------


def rathole(site: Site, mode: str) -> Iterator[System]:
    """rathole over noise, TLS or nothing."""
    name = f"rathole-{mode}"
    server, port = free_port(), free_port()
    server_side, client_side = _rathole_transport(site, mode)
    text = f"""
[server]
bind_addr = "127.0.0.1:{server}"
default_token = "bench"
{server_side}
[server.services.bench]
bind_addr = "127.0.0.1:{port}"
"""
    first = site.start(f"{name}-server", [find("rathole"), "--server", site.write(f"{name}-server.toml", text)], server)
    text = f"""
[client]
remote_addr = "localhost:{server}"
default_token = "bench"
{client_side}
[client.services.bench]
local_addr = "127.0.0.1:{site.target[1]}"
"""
    second = site.start(f"{name}-client", [find("rathole"), "--client", site.write(f"{name}-client.toml", text)])
    roots = (first.pid, second.pid)
    reference = "frp-plain" if mode == "plain" else "frp-tls"
    yield System(name, "rathole", mode, OPEN, Way(("127.0.0.1", port), site.target), roots, reference)


def _rathole_transport(site: Site, mode: str) -> tuple[str, str]:
    """The transport tables of server and client."""
    if mode == "plain":
        return "", ""
    if mode == "noise":
        made = subprocess.run([find("rathole"), "--genkey"], check=True, capture_output=True, text=True)
        _, private, _, _, public, *_ = made.stdout.split("\n")
        table = '[{0}.transport]\ntype = "noise"\n[{0}.transport.noise]\n{1} = "{2}"\n'
        return table.format("server", "local_private_key", private), table.format("client", "remote_public_key", public)
    certificate = x509.load_pem_x509_certificate(Path(site.secret("broker.pem")).read_bytes())
    key = load_pem_private_key(Path(site.secret("broker.key")).read_bytes(), None)
    bundle = site.directory / "rathole.pfx"
    bundle.write_bytes(
        pkcs12.serialize_key_and_certificates(b"bench", key, certificate, None, BestAvailableEncryption(b"bench"))  # type: ignore[arg-type]
    )
    table = '[{0}.transport]\ntype = "tls"\n[{0}.transport.tls]\n{1}\n'
    return (
        table.format("server", f'pkcs12 = "{bundle}"\npkcs12_password = "bench"'),
        table.format("client", f'trusted_root = "{site.secret("ca.pem")}"\nhostname = "localhost"'),
    )


def chisel(site: Site) -> Iterator[System]:
    """chisel: always SSH inside a WebSocket."""
    server, port, socks = free_port(), free_port(), free_port()
    command = [find("chisel"), "server", "--host", "127.0.0.1", "--port", str(server), "--reverse", "--socks5"]
    first = site.start("chisel-server", command, server)
    remotes = [f"R:127.0.0.1:{port}:127.0.0.1:{site.target[1]}", f"R:127.0.0.1:{socks}:socks"]
    second = site.start("chisel-client", [find("chisel"), "client", f"http://127.0.0.1:{server}", *remotes], port)
    wait_for(lambda: accepts(socks), "chisel's SOCKS")
    roots = (first.pid, second.pid)
    yield System("chisel", "chisel", "ssh", OPEN, Way(("127.0.0.1", port), site.target), roots, "frp-tls")
    way = Way(("127.0.0.1", socks), site.target, socks=True)
    yield System("chisel-socks", "chisel", "ssh", SOCKS, way, roots, "frp-tls-socks")


def ssh(site: Site) -> Iterator[System]:
    """`ssh -R` to an sshd of our own."""
    server, port = free_port(), free_port()
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(site.directory / f"ssh-{key}")]
        subprocess.run(command, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    text = f"""
ListenAddress 127.0.0.1:{server}
HostKey {site.directory}/ssh-host
AuthorizedKeysFile {site.directory}/ssh-user.pub
StrictModes no
PidFile none
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
LogLevel ERROR
"""
    first = site.start("sshd", [find("sshd"), "-D", "-e", "-f", site.write("sshd_config", text)], server)
    options = [f"-o{option}" for option in (
        "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ExitOnForwardFailure=yes", "BatchMode=yes",
        "LogLevel=ERROR",
    )]  # fmt: skip
    forward = f"127.0.0.1:{port}:127.0.0.1:{site.target[1]}"
    key = str(site.directory / "ssh-user")
    command = [find("ssh"), "-F", "/dev/null", *options, "-i", key, "-p", str(server), "-N", "-R", forward]
    second = site.start("ssh", [*command, f"{getpass.getuser()}@127.0.0.1"], port)
    roots = (first.pid, second.pid)
    yield System("ssh", "ssh -R", "ssh", OPEN, Way(("127.0.0.1", port), site.target), roots, "frp-tls")


def haproxy(site: Site) -> Iterator[System]:
    """Two HAProxies in a row, one thread each, splicing: the limit of a relay in C. No tunnel: both listen."""
    inner, outer = free_port(), free_port()
    processes = []
    for name, port, onward in (("inner", inner, site.target[1]), ("outer", outer, inner)):
        text = f"""
global
    nbthread 1
    maxconn 4000
defaults
    mode tcp
    option splice-auto
    timeout connect 5s
    timeout client 1m
    timeout server 1m
listen bench
    bind 127.0.0.1:{port} backlog 4096
    server next 127.0.0.1:{onward}
"""
        command = [find("haproxy"), "-db", "-f", site.write(f"haproxy-{name}.cfg", text)]
        processes.append(site.start(f"haproxy-{name}", command, port))
    roots = tuple(process.pid for process in processes)
    yield System("haproxy", "HAProxy x2", "plain", OPEN, Way(("127.0.0.1", outer), site.target), roots, "frp-plain")


# --- the list -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """The systems that one call starts, and the binaries that it needs; the first one tells its version."""

    systems: tuple[str, ...]
    start: Callable[..., Iterator[System]]
    preflight: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Binaries that are not here."""
        return [name for name in self.preflight if not find(name)]


DEPLOYMENTS: Final = (
    Deployment(("none",), none),
    Deployment(("rtunnel-tls", "rtunnel-tls-socks", "rtunnel-tls-socks-noproof"), partial(rtunnel, security="tls")),
    Deployment(("rtunnel-plain", "rtunnel-plain-socks"), partial(rtunnel, security="plain")),
    Deployment(("frp-tls", "frp-tls-socks"), partial(frp, mode="tls"), ("frps", "frpc")),
    Deployment(("frp-plain", "frp-plain-socks"), partial(frp, mode="plain"), ("frps", "frpc")),
    Deployment(("frp-nomux", "frp-nomux-socks"), partial(frp, mode="nomux"), ("frps", "frpc")),
    Deployment(("rathole-tls",), partial(rathole, mode="tls"), ("rathole",)),
    Deployment(("rathole-noise",), partial(rathole, mode="noise"), ("rathole",)),
    Deployment(("rathole-plain",), partial(rathole, mode="plain"), ("rathole",)),
    Deployment(("chisel", "chisel-socks"), chisel, ("chisel",)),
    Deployment(("ssh",), ssh, ("ssh", "sshd", "ssh-keygen")),
    Deployment(("haproxy",), haproxy, ("haproxy",)),
    Deployment(("none-long",), none_long),
    Deployment(("rtunnel-tls-long",), rtunnel_long),
    Deployment(("frp-tls-long",), frp_long, ("frps", "frpc")),
)
#: The rtunnel ones in there, which another revision's are measured beside.
RTUNNEL: Final = tuple(d for d in DEPLOYMENTS if d.systems[0].startswith("rtunnel"))
QUICK: Final = (
    "none", "rtunnel-tls", "rtunnel-plain", "rtunnel-tls-socks", "rtunnel-plain-socks",
    "frp-tls", "frp-plain", "frp-tls-socks", "frp-plain-socks",
)  # fmt: skip


#: How binaries are asked for their version.
_VERSION_FLAGS: Final = {"ssh": "-V", "haproxy": "-v"}


def version(name: str) -> str:
    """What a peer's binary says of itself."""
    flag = _VERSION_FLAGS.get(name, "--version")
    done = subprocess.run([find(name), flag], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    found = re.search(r"[Vv]ersion:?\s+(\d\S*)", said) or re.search(r"(\d+(?:\.\d+)+\w*)", said)
    return found[1] if found else "?"


def echo_works(way: Way) -> bool:
    """One byte goes there and comes back."""
    try:
        with way.connect(b"E") as sock:
            return sock.recv(1) == b"E"
    except OSError:
        return False


def of_revision(code: Code) -> tuple[Deployment, ...]:
    """The rtunnel deployments with the code of another revision."""
    return tuple(
        replace(d, systems=tuple(map(code.named, d.systems)), start=partial(d.start, code=code)) for d in RTUNNEL
    )


def start_all(
    site: Site,
    wanted: frozenset[str],
    say: Callable[[str], None],
    deployments: Sequence[Deployment] = DEPLOYMENTS,
) -> list[System]:
    """Start all that the wanted systems need; those that can't be started are named, and left out."""
    systems: list[System] = []
    for deployment in deployments:
        if wanted.isdisjoint(deployment.systems):
            continue
        if deployment.missing:
            say(f"{', '.join(deployment.systems)}: not here ({', '.join(deployment.missing)} not found)")
            continue
        try:
            made = list(deployment.start(site))
            for system in made:
                wait_for(lambda way=system.way: echo_works(way), f"an echo through {system.name}")  # type: ignore[misc]
        except (BenchError, subprocess.CalledProcessError, OSError) as error:
            say(f"{', '.join(deployment.systems)}: could not be started: {error}")
            continue
        systems += [system for system in made if system.name in wanted]
    return systems
