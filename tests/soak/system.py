"""The system under soak: broker, gateway, two agents and a fleet of idle ones, Redis; each a process of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NoReturn

from bench.deployments import Site, start_role
from bench.fleet import Fleet
from bench.load import UNITS, Board, Way, become_a_load_process, run_target
from bench.procs import Process, Processes
from soak.aborts import Ground, Slow
from soak.figures import Watched
from soak.load import run_exact_target
from soak.vip import Vip
from support.plumbing import free_ports
from support.polling import until

_FORK: Final = get_context("fork")
#: Its nonces are remembered for four of these at most: they must not pass for a leak.
DIAL_WINDOW: Final = 1.5
TARGET_TIMEOUT: Final = 3.0
REGISTRY: Final[dict[str, object]] = {"heartbeat": 1.0, "ttl": 3.0, "quarantine": 4.0, "timeout": 5.0}
FAR_IP: Final = "127.1.0.2"
PREFIX: Final = "soak"
#: Of the first agent.
OPEN_PORTS: Final = 4


@dataclass
class System:
    """`near` leads the first agent to the broker, `far` the second one and the fleet."""

    site: Site
    watched: dict[str, Watched]
    near: Vip
    far: Vip
    ground: Ground
    slow: Slow
    slow_ways: tuple[Way, Way]
    far_way: Way
    fleet: Board
    fleet_size: int
    restart_far: Callable[[], None]
    exact_ways: tuple[Way, Way, Way]  # to targets that compare content: SOCKS5, open port; far by SOCKS5
    exact_boards: tuple[Board, Board]  # of those targets

    def status(self, name: str) -> dict[str, Any]:
        """/statusz of one."""
        return self.watched[name].status()

    def whole(self) -> bool:
        """Every agent has its session with all its open ports, and nobody is too many."""
        if self.fleet[UNITS] != self.fleet_size or self.status("broker")["sessions"] != self.fleet_size + 2:
            return False
        return self.has_session("near", OPEN_PORTS) and self.has_session("far", 0)

    def has_session(self, name: str, open_ports: int) -> bool:
        """This agent has a session with so many open ports, on a link that is up."""
        sessions = self.status(name)["sessions"]
        return len(sessions) == 1 and len(sessions[0]["open_ports"]) == open_ports

    def keys(self) -> list[str]:
        """Of Redis, ports' numbers left out: they may change hands."""
        assert self.site.redis is not None
        with self.site.redis.client() as client:
            names = [str(key) for key in client.scan_iter(f"{PREFIX}:*")]
        return sorted(f"{PREFIX}:port" if name.startswith(f"{PREFIX}:port:") else name for name in names)

    def leases(self) -> dict[str, int]:
        """Ports in Redis by their state."""
        assert self.site.redis is not None
        found = {"leased": 0, "quarantined": 0}
        with self.site.redis.client() as client:
            for key in client.scan_iter(f"{PREFIX}:port:*"):
                if state := client.hget(key, "state"):
                    found[state] += 1
        return found

    @property
    def ports(self) -> int:
        """Ports that live sessions have: one each, and the first agent's open ones."""
        return self.fleet_size + 2 + OPEN_PORTS

    def look(self) -> None:
        """Keep the peaks."""
        for watched in self.watched.values():
            watched.look()

    def crashes(self) -> list[str]:
        """Lines of any log that tell of a fault of ours."""
        found = []
        for path in self.site.directory.glob("*.log"):
            with path.open(errors="replace") as log:
                found += [line for line in log if "relay_crashed" in line or "Traceback" in line or "dropped" in line]
        return found


def _fleet(pki: Path, port: int, count: int, board: Board) -> NoReturn:
    become_a_load_process()
    Fleet(pki, port, count, board).start()
    while True:
        signal.pause()


def _far_target(listener: socket.socket) -> NoReturn:
    run_target(listener, Board())


@contextlib.contextmanager
def running(directory: Path, fleet_size: int) -> Iterator[System]:
    """All of it, ready; at the end every process is ended by its id."""
    with contextlib.ExitStack() as stack:
        site = Site(directory, Processes(directory))
        stack.callback(site.end)

        def fork(work: Callable[..., object], *args: object) -> None:
            process = _FORK.Process(target=work, args=args, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)

        yield _build(site, stack, fork, fleet_size)


def _build(site: Site, stack: contextlib.ExitStack, fork: Callable[..., None], fleet_size: int) -> System:
    redis: dict[str, object] = {"url": site.need_redis().url, "prefix": PREFIX, **REGISTRY}
    assert site.redis is not None
    admins = free_ports(6)[0]
    links = admins + 4
    first = free_ports(350)[0]
    broker = start_role(
        site,
        "broker",
        "broker",
        {
            "registry": redis,
            "broker": {
                "node_id": "soak",
                "listen": f"127.0.0.1:{links}",
                "advertise_ip": "127.0.0.1",
                "port_range": f"{first}-{first + 299}",
                "open_ports": {"range": f"{first + 300}-{first + 349}", "allow": ["127.0.0.0/8"]},
                "certificate": site.secret("broker.pem"),
                "key": site.secret("broker.key"),
                "cluster_key": site.secret("cluster.key"),
                "ca": site.secret("ca.pem"),
                "source_handshakes": 0,  # a whole fleet comes from one address
                "dial_window": DIAL_WINDOW,
                "admin": f"127.0.0.1:{admins}",
            },
        },
        links,
    )
    near, far = (Vip(("127.0.0.1", links)) for _ in range(2))
    stack.callback(near.end)
    stack.callback(far.end)
    fleet = Board()
    fork(_fleet, site.directory / "pki", far.address[1], fleet_size, fleet)
    with socket.create_server((FAR_IP, 0), backlog=4096) as listener:
        fork(_far_target, listener)
        far_target = listener.getsockname()
    exact_boards = (Board(), Board())
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4096) as near_exact,
        socket.create_server((FAR_IP, 0), backlog=4096) as far_exact,
    ):
        fork(run_exact_target, near_exact, exact_boards[0], False)
        fork(run_exact_target, far_exact, exact_boards[1], True)
        exact_target, far_exact_target = near_exact.getsockname(), far_exact.getsockname()
    socks = admins + 5
    gateway = start_role(
        site,
        "gateway",
        "gateway",
        {
            "registry": redis,
            "gateway": {
                "listen": f"127.0.0.1:{socks}",
                "key": site.secret("gateway.key"),
                "lame_duck": 0,
                "ca": site.secret("ca.pem"),
                "admin": f"127.0.0.1:{admins + 1}",
            },
        },
        socks,
    )
    yard = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
    slow = Slow()
    stack.callback(slow.close)
    targets = (site.target, yard.getsockname(), slow.address, exact_target)
    assert len(targets) == OPEN_PORTS
    opened = [("127.0.0.1", first + 300 + n) for n in range(len(targets))]

    def agent(name: str, address: str, vip: Vip, admin: int, publish: list[dict[str, object]]) -> Process:
        keys = {
            **site.certify(name, address),
            "brokers": [f"127.0.0.1:{vip.address[1]}"],
            "agent_id": name,
            "addresses": [address],
            "exposes": ["1-65535"],
            "publish": publish,
            "redundancy": 1,
            "ca": site.secret("ca.pem"),
            "backoff_cap": 0.5,
            "target_timeout": TARGET_TIMEOUT,
            "admin": f"127.0.0.1:{admin}",
        }
        return start_role(site, f"{name}-{time.monotonic_ns()}", "agent", {"agent": keys})

    publish: list[dict[str, object]] = [
        {"target": f"127.0.0.1:{target[1]}", "port": way[1]} for target, way in zip(targets, opened, strict=True)
    ]
    agents = {
        "near": agent("near", "127.0.0.1", near, admins + 2, publish),
        "far": agent("far", FAR_IP, far, admins + 3, []),
    }
    watched = {
        "broker": Watched("broker", "broker", broker.pid, admins),
        "gateway": Watched("gateway", "gateway", gateway.pid, admins + 1),
        "near": Watched("near", "agent", agents["near"].pid, admins + 2),
        "far": Watched("far", "agent", agents["far"].pid, admins + 3),
    }

    def restart_far() -> None:
        old = agents["far"]
        old.popen.kill()
        old.popen.wait()
        site.processes.running.remove(old)
        agents["far"] = agent("far", FAR_IP, far, admins + 3, [])
        watched["far"].pid = agents["far"].pid

    def way(target: tuple[str, int]) -> Way:
        return Way(("127.0.0.1", socks), target, socks=True)

    pairs = [(way(target), Way(address, target)) for target, address in zip(targets, opened, strict=True)]
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        refuses = nobody.getsockname()
    system = System(
        site, watched, near, far, Ground(yard, pairs[1], pairs[0], refuses), slow, pairs[2], way(far_target),
        fleet, fleet_size, restart_far, (*pairs[3], way(far_exact_target)), exact_boards,
    )  # fmt: skip
    until(lambda: all(w.ready() for w in watched.values()), 30, what="all to be ready")
    until(system.whole, 30, what="all sessions")
    until(lambda: system.status("gateway")["tuples"] == system.ports, 15, what="the gateway to know all")
    return system
