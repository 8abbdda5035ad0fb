"""Isolated VPCs in network namespaces, and the one way between them: an L4 VIP.

    VPC a       a1 a2                                  --+
    VPC b       b1 b2                                  --+-- router: VIP:7000 -> a broker (DNAT)
    VPC app     app                                    --+           VIP:1080 -> the gateway (DNAT)
    VPC centre  broker1-3 redis gateway controller     --+           everything else: dropped
                authority

Each VPC is a bridge in a namespace of its own; each host is a namespace with one `eth0`. Nothing is made in
the machine's own namespace but the names of these namespaces, which carry this process's pid. A janitor
process waits for the end of this one, however it comes, and then takes the names away; processes in the lab
die with their parent.
"""

from __future__ import annotations

import ctypes
import http.client
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar

VIP = "10.99.0.1"
LINK_PORT = 7000
PROXY_PORT = 1080

#: name -> the second byte of 10.N.0.0/24 and the second group of fd00:N::/64
VPCS = {"a": 1, "b": 2, "app": 3, "centre": 9}
#: name -> VPC, last byte of the address
PLACES = {
    "a1": ("a", 7),
    "a2": ("a", 8),
    "b1": ("b", 7),
    "b2": ("b", 8),
    "app": ("app", 5),
    "broker1": ("centre", 11),
    "broker2": ("centre", 12),
    "broker3": ("centre", 13),
    "redis": ("centre", 20),
    "gateway": ("centre", 30),
    "gateway2": ("centre", 31),  # only in `make night`
    "controller": ("centre", 40),
    "authority": ("centre", 50),
}
HOSTS = ("a1", "a2", "b1", "b2")
BROKERS = ("broker1", "broker2", "broker3")

Balance = Literal["random", "roundrobin", "pinned"]
_PICK: dict[Balance, str] = {
    "random": "numgen random mod {n}",
    "roundrobin": "numgen inc mod {n}",
    "pinned": "jhash ip saddr mod {n} seed 0x1",
}

#: `python -m lab.client` and the like, in a namespace
PYTHON_LAB = (sys.executable, "-m")
_TESTS = str(Path(__file__).resolve().parent.parent)

T = TypeVar("T")


def missing() -> str:
    """Why the lab can't run on this machine; empty when it can."""
    if sys.platform != "linux":
        return "the lab needs Linux"
    if os.geteuid() != 0:
        return "the lab needs root (network namespaces)"
    for tool, package in {
        "ip": "iproute2",
        "nft": "nftables",
        "curl": "curl",
        "setpriv": "util-linux",
    }.items():
        if shutil.which(tool) is None:
            return f"the lab needs `{tool}` (Debian: apt-get install {package})"
    probe = f"rtlab{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"the lab can't make network namespaces here: {made.stderr.strip()}"
    try:
        rules = "add table ip probe; add chain ip probe c { type nat hook prerouting priority dstnat; }"
        nat = subprocess.run(["ip", "netns", "exec", probe, "nft", rules], capture_output=True, text=True)
        return f"the lab can't use nftables NAT here: {nat.stderr.strip()}" if nat.returncode else ""
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)


def wait_for(what: str, probe: Callable[[], T], seconds: float, every: float = 0.05) -> tuple[T, float]:
    """Ask `probe` until it answers something true: that answer and the seconds it took, else AssertionError."""
    start = time.monotonic()
    last: object = None
    while True:
        try:
            last = answer = probe()
            if answer:
                return answer, time.monotonic() - start
        except (OSError, http.client.HTTPException, ValueError) as error:
            last = error
        if time.monotonic() - start > seconds:
            raise AssertionError(f"{what}: not within {seconds:g} s; last: {last!r}")
        time.sleep(every)


class Process:
    """A process of the lab, alone in its log file; killed by its pid at the end."""

    def __init__(self, name: str, argv: Sequence[str], log: Path, popen: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.argv = argv
        self.log = log
        self.started = time.monotonic()
        self._popen = popen

    @property
    def pid(self) -> int:
        """Its pid (in the machine's own pid namespace)."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    @property
    def stdin(self) -> IO[bytes]:
        """Its standard input, when it was spawned with `stdin=True`."""
        assert self._popen.stdin is not None, f"{self.name} was spawned without stdin"
        return self._popen.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """Its standard output, when it was spawned with `stdout=True`."""
        assert self._popen.stdout is not None, f"{self.name} was spawned without stdout"
        return self._popen.stdout

    def wait(self, seconds: float) -> int:
        """Its exit status; AssertionError with the end of its log when it does not end in time."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds:g} s:\n{self.tail()}") from None

    def terminate(self, seconds: float = 10.0) -> int:
        """SIGTERM, then its exit status."""
        self._popen.terminate()
        return self.wait(seconds)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def text(self) -> str:
        """All that it has said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def json_lines(self) -> list[dict[str, Any]]:
        """What it printed, one JSON object a line (a last line that is not finished is left out)."""
        whole = self.text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def tail(self, lines: int = 25) -> str:
        """The end of its log."""
        return "\n".join(self.text().splitlines()[-lines:])


@dataclass
class Host:
    """One network namespace with one address on `eth0`."""

    name: str
    vpc: str
    ip: str
    ip6: str
    ns: str
    logs: Path
    processes: list[Process] = field(default_factory=list)

    def spawn(
        self,
        *argv: str,
        name: str = "",
        env: Mapping[str, str] | None = None,
        log: str = "",
        stdin: bool = False,
        stdout: bool = False,
        fresh: bool = False,
    ) -> Process:
        """Start a process here. `stdin` and `stdout` ask for pipes; without them it has an empty input and all that
        it says is in its log, which goes on where an earlier one of that name stopped, unless `fresh`."""
        name = name or f"{Path(argv[0]).name}@{self.name}"
        path = self.logs / (log or f"{name}.log")
        command = ["ip", "netns", "exec", self.ns, "setpriv", "--pdeathsig", "KILL", *argv]
        with path.open("wb" if fresh else "ab") as out:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdout else out,
                stderr=out,
                env=_environment(env),
            )
        process = Process(name, argv, path, popen)
        self.processes.append(process)
        return process

    def run(self, *argv: str, seconds: float = 30.0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a short command here to its end."""
        command = ["ip", "netns", "exec", self.ns, "setpriv", "--pdeathsig", "KILL", *argv]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=seconds, env=_environment(None)
        )

    def check(self, *argv: str, seconds: float = 30.0, stdin: str = "") -> str:
        """Run a short command here that must succeed; what it printed."""
        done = self.run(*argv, seconds=seconds, stdin=stdin)
        if done.returncode:
            raise AssertionError(f"{self.name}: {' '.join(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def curl(self, *options: str, seconds: float = 15.0) -> subprocess.CompletedProcess[str]:
        """curl, quiet but telling its errors, without any proxy of the environment."""
        base = (
            "curl",
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--noproxy",
            "",
            "--max-time",
            str(seconds),
        )
        return self.run(*base, *options, seconds=seconds + 5)

    def new_socket(self, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        """A TCP socket that lives in this namespace, for use in the test's own process."""
        with self._entered():
            return socket.socket(family, socket.SOCK_STREAM)

    def new_packet_socket(self) -> socket.socket:
        """Hears every IPv4 packet that this namespace sends or gets from now on (Ethernet frames)."""
        with self._entered():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))  # ETH_P_ALL: outgoing too
        sock.setblocking(False)
        return sock

    def connect(self, ip: str, port: int, seconds: float = 5.0) -> socket.socket:
        """A TCP connection from here, for use in the test's own process."""
        version = ipaddress.ip_address(ip).version
        sock = self.new_socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        try:
            sock.settimeout(seconds)
            sock.connect((ip, port))
        except OSError:
            sock.close()
            raise
        return sock

    def get(self, ip: str, port: int, path: str, seconds: float = 5.0) -> tuple[int, bytes]:
        """One plain HTTP GET from here: status and body."""
        connection = http.client.HTTPConnection(ip, port)
        connection.sock = self.connect(ip, port, seconds)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def cut(self) -> None:
        """Silence: every packet in and out is dropped, with no RST and no ICMP. Loopback goes on."""
        self.check(
            "nft",
            "-f",
            "-",
            stdin="""
            table inet cut {
              chain entering { type filter hook input priority -300; policy drop; iif "lo" accept; }
              chain leaving { type filter hook output priority -300; policy drop; oif "lo" accept; }
            }""",
        )

    def mend(self) -> None:
        """The end of a `cut`; nothing where there was none."""
        self.run("nft", "delete", "table", "inet", "cut")

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """This thread stands in the namespace: a socket made meanwhile stays in it for good."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.ns}", os.O_RDONLY)
        try:
            _setns(there)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(there)
            os.close(home)


class Topology:
    """The whole network, as a context manager. `net["a1"]` is a host."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.prefix = f"rtlab{os.getpid()}"
        self.hosts = {name: self._host(name) for name in PLACES}
        self.router = Host("router", "", VIP, "", self._ns("router"), logs)
        self._switches = {vpc: self._ns(f"net-{vpc}") for vpc in VPCS}
        self._janitor: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Topology:
        names = [host.ns for host in self.hosts.values()] + [self.router.ns, *self._switches.values()]
        taken = {line.split()[0] for line in _output("ip", "netns", "list").splitlines() if line.strip()}
        if both := taken & set(names):
            raise RuntimeError(f"these network namespaces are there already and are not ours: {sorted(both)}")
        self._janitor = _start_janitor(names)
        try:
            self._build()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()

    @property
    def processes(self) -> list[Process]:
        """Every process ever spawned here."""
        return [process for host in self.hosts.values() for process in host.processes]

    def balance(self, mode: Balance, among: Sequence[str] = BROKERS) -> None:
        """How the VIP picks a broker from now on. Connections that are there stay (conntrack)."""
        pick = _PICK[mode].format(n=len(among))
        places = ", ".join(f"{i} : {self[name].ip}" for i, name in enumerate(among))
        self.router.check(
            "nft",
            "-f",
            "-",
            stdin=f"flush chain ip vip brokers\nadd rule ip vip brokers dnat to {pick} map {{ {places} }}\n",
        )

    def _ns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _host(self, name: str) -> Host:
        vpc, last = PLACES[name]
        number = VPCS[vpc]
        return Host(name, vpc, f"10.{number}.0.{last}", f"fd00:{number}::{last}", self._ns(name), self.logs)

    def _build(self) -> None:
        for ns in (self.router.ns, *self._switches.values(), *(host.ns for host in self.hosts.values())):
            _output("ip", "netns", "add", ns)
        for vpc, switch in self._switches.items():
            _ip(switch, "link set lo up", "link add sw type bridge", "link set sw up")
            _plug(switch, self.router.ns, "uplink", f"to-{vpc}")
            _ip(self.router.ns, f"addr add 10.{VPCS[vpc]}.0.1/24 dev to-{vpc}", f"link set to-{vpc} up")
        for host in self.hosts.values():
            _plug(self._switches[host.vpc], host.ns, host.name, "eth0")
            number = VPCS[host.vpc]
            _ip(
                host.ns,
                "link set lo up",
                f"addr add {host.ip}/24 dev eth0",
                f"addr add {host.ip6}/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add default via 10.{number}.0.1",
            )
        _ip(self.router.ns, "link set lo up", f"addr add {VIP}/32 dev lo")
        # The only rule that lets a packet cross is the last one: it belongs to a connection to the VIP. The
        # masquerade is for the VIP's clients inside the centre: answers would otherwise go past the router.
        self.router.check(
            "nft",
            "-f",
            "-",
            stdin=f"""
            table ip vip {{
              chain brokers {{ }}
              chain arriving {{
                type nat hook prerouting priority dstnat;
                ip daddr {VIP} tcp dport {LINK_PORT} jump brokers
                ip daddr {VIP} tcp dport {PROXY_PORT} dnat to {self["gateway"].ip}
              }}
              chain leaving {{
                type nat hook postrouting priority srcnat;
                ip saddr 10.9.0.0/24 ip daddr 10.9.0.0/24 ct status dnat masquerade
              }}
              chain local {{ type filter hook input priority filter; policy drop; iif "lo" accept; }}
              chain crossing {{
                type filter hook forward priority filter; policy drop;
                ct status dnat accept
              }}
            }}""",
        )
        self.balance("random")
        self.router.check("sysctl", "-qw", "net.ipv4.ip_forward=1")

    def _clean(self) -> None:
        for process in self.processes:
            process.kill()
        if self._janitor is not None:
            assert self._janitor.stdin is not None
            self._janitor.stdin.close()
            self._janitor.wait(30)
            self._janitor = None


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """This process's own, without what would change the parts under test."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RTUNNEL_") and not k.lower().endswith("_proxy")}
    path = os.pathsep.join(filter(None, (_TESTS, ours.get("PYTHONPATH"))))
    return {**ours, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **(more or {})}


def _start_janitor(names: Sequence[str]) -> subprocess.Popen[bytes]:
    """Takes the names away when its standard input ends: at `_clean`, or when this process dies."""
    script = 'cat >/dev/null; for ns in "$@"; do ip netns del "$ns"; done'
    return subprocess.Popen(
        ["sh", "-c", script, "janitor", *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )


def _plug(switch: str, ns: str, port: str, device: str) -> None:
    """A cable: `device` in `ns`, `port` on the switch."""
    _ip(
        switch,
        f"link add {port} type veth peer name {device} netns {ns}",
        f"link set {port} master sw",
        f"link set {port} up",
    )


def _ip(ns: str, *lines: str) -> None:
    _output("ip", "-n", ns, "-batch", "-", stdin="\n".join(lines) + "\n")


def _output(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.strip()}\n{stdin}")
    return done.stdout


_CLONE_NEWNET = 0x40000000


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")
