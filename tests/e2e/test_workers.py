"""`--workers N` as an operator runs it: a supervisor and its workers are processes, and are killed as such."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from rtunnel import workers
from rtunnel.config import load, parse_endpoint, parse_range, slice_of
from rtunnel.trust import pki
from rtunnel.workers import Supervisor
from support.cluster import Target, in_thread, read_line, running_cluster
from support.plumbing import free_port, free_range, kept
from support.polling import until
from support.ports import as_text, guarded_ports
from support.redis_server import RedisServer
from support.site import DRAIN, Process, Site, fetch, health, ready, site

IP1, IP2 = "127.2.0.1", "127.2.0.2"
TWO = ("--workers", "2")

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


def pids(process: Process) -> dict[int, int]:
    """The latest process of each worker."""
    return {int(line["worker"]): int(line["pid"]) for line in process.lines("worker_started")}


def alive(pid: int) -> bool:
    """Whether this process runs; one that only nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def workers_site(directory: Path, registry_url: str) -> Iterator[Site]:
    """As `site`; at the end it waits for the workers too, which would write into the next test's registry."""
    with site(directory, registry_url) as here:
        try:
            yield here
        finally:
            here.stack.close()
            for process in here.processes.values():
                left = [line["pid"] for line in process.lines("worker_started")]
                until(lambda left=left: not any(map(alive, left)), what=f"the end of {process.name}'s workers")  # type: ignore[misc]


def whole(process: Process) -> str:
    """The admin address of a supervisor whose workers are ready."""
    process.wait_for("worker_started")
    until(lambda: ready(process.admin()), what=f"{process.name} to be ready")
    return process.admin()


def agent_of(here: Site, name: str, ip: str, *brokers: Process) -> tuple[Process, dict[str, Any]]:
    """An agent with all its sessions, and its status."""
    agent = here.agent(name, ip, [broker.address("broker_started") for broker in brokers])
    until(lambda: ready(agent.admin()), what=f"2/2 of {name}")
    return agent, health(agent.admin(), "/statusz")[1]


def test_workers_are_nodes_of_one_host_and_come_back(tmp_path: Path, redis_server: RedisServer) -> None:
    """Two nodes, an agent on both, which says so; kill -9 of one; SIGTERM ends all and leaves nothing."""
    with workers_site(tmp_path, redis_server.url) as here:
        broker = here.broker("b1", 1, *TWO)
        admin = whole(broker)
        agent, status = agent_of(here, "a1", IP1, broker)
        here.gateway()
        check_one_host(here, agent, status)
        check_health(broker, admin)
        before = {session["node"]: session["ps"] for session in status["sessions"]}

        # The agent sleeps meanwhile: its quick dials would be over just before there is a second node again.
        agent.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        os.kill(pids(broker)[1], signal.SIGKILL)
        until(lambda: len(broker.lines("broker_started")) == 3, what="the worker to be back")
        print(f"a worker is ready again {time.monotonic() - began:.2f} s after its death")
        agent.process.send_signal(signal.SIGCONT)
        until(lambda: len(agent.lines("session_ended")) == 1 and ready(agent.admin()), what="2/2 again")
        (death,) = broker.lines("worker_died")
        assert (death["worker"], death["status"]) == (1, "SIGKILL")
        sessions = health(agent.admin(), "/statusz")[1]["sessions"]
        assert {session["node"]: session["ps"] for session in sessions} == before, "the same ports again"
        assert len(agent.lines("on_one_host")) == 1, "told once"

        assert agent.end()[0] == 0
        left = list(pids(broker).values())
        code, seconds = broker.end()
        assert code == 0 and seconds < DRAIN / 2, broker.text
        assert not any(map(alive, left))
        assert (here.status()["nodes"], here.status()["agents"]) == ([], [])
        assert not re.search("Traceback|crash", broker.text)


def check_one_host(here: Site, agent: Process, status: dict[str, Any]) -> None:
    """Each session is on a port of its worker's part; that both are on one host is told."""
    assert {session["node"] for session in status["sessions"]} == {"b1.1", "b1.2"}
    for session in status["sessions"]:
        first, last = parse_range(slice_of(as_text(guarded_ports(1)), int(session["node"][-1]), 2))
        assert first <= int(session["ps"].rpartition(":")[2]) <= last
    assert (status["redundancy"], status["state"], status["one_host"]) == ("2/2", "ready", "b1")
    assert agent.wait_for("on_one_host")["host"] == "b1"
    registry = here.status()
    assert {(node["node"], node["host"], node["ip"]) for node in registry["nodes"]} == {
        ("b1.1", "b1", "127.0.0.1"),
        ("b1.2", "b1", "127.0.0.1"),
    }
    assert (registry["summary"]["agents_on_one_node"], registry["summary"]["agents_on_one_host"]) == (0, 1)
    assert re.search(r"^a1 .* 2 nodes on one host +b1\.1 b1\.2$", here.ask_registry("status"), re.MULTILINE)


def check_health(broker: Process, admin: str) -> None:
    """The supervisor speaks for all, and says where each can be asked."""
    assert health(admin, "/livez") == (200, {"live": True, "silent_workers": []})
    assert health(admin, "/readyz") == (200, {"ready": True, "reasons": []})
    status = health(admin, "/statusz")[1]
    shown = [(worker["worker"], worker["pid"], worker["node"], worker["sessions"]) for worker in status["workers"]]
    assert shown == [(number, pid, f"b1.{number}", 1) for number, pid in sorted(pids(broker).items())]
    own = health(status["workers"][1]["admin"], "/statusz")[1]
    assert (status["role"], own["node"]) == ("broker", "b1.2")
    assert {(line["worker"], line["node"]) for line in broker.lines("broker_started")} == {(1, "b1.1"), (2, "b1.2")}


def test_an_agent_is_on_two_hosts_where_there_are_two(tmp_path: Path, redis_server: RedisServer) -> None:
    with workers_site(tmp_path, redis_server.url) as here:
        brokers = [here.broker(f"b{number}", number, *TWO) for number in (1, 2)]
        for broker in brokers:
            whole(broker)
        here.gateway()
        for name, ip in (("a1", IP1), ("a2", IP2)):
            agent, status = agent_of(here, name, ip, *brokers)
            assert {session["host"] for session in status["sessions"]} == {"b1", "b2"}
            assert status["one_host"] == "" and not agent.lines("on_one_host")
        assert here.status()["summary"]["agents_on_one_host"] == 0


@needs_curl
def test_traffic_through_a_gateway_with_workers(tmp_path: Path, redis_server: RedisServer) -> None:
    """One port, and the kernel gives both workers their share."""
    with workers_site(tmp_path, redis_server.url) as here:
        broker = here.broker("b1", 1, *TWO)
        gateway = here.gateway(*TWO)
        admin = whole(gateway)
        whole(broker)
        agent_of(here, "a1", IP1, broker)
        port = here.web(IP1)
        proxy = gateway.address("gateway_started")

        def both() -> bool:
            assert fetch(proxy, f"http://{IP1}:{port}/") == f"hello from {IP1}\n"
            return all(worker["accepted"] for worker in health(admin, "/statusz")[1]["workers"])

        until(both, what="both workers to have had a client")
        assert gateway.end()[0] == 0


def test_no_worker_outlives_its_supervisor(tmp_path: Path, redis_server: RedisServer) -> None:
    """SIGKILL, which nobody can catch: the workers see it, and leave in order."""
    with workers_site(tmp_path, redis_server.url) as here:
        broker = here.broker("b1", 1, *TWO)
        here.gateway()
        whole(broker)
        assert {node["node"] for node in here.status()["nodes"]} == {"b1.1", "b1.2"}
        left = list(pids(broker).values())
        broker.kill()
        until(lambda: not any(map(alive, left)), what="the workers' end")
        assert here.status()["nodes"] == []
        assert [line["by"] for line in broker.lines("stop_requested")] == ["the supervisor's end"] * 2


def test_a_second_signal_ends_all_at_once(tmp_path: Path, redis_server: RedisServer) -> None:
    """The agent has nowhere to go, so that the drain would last."""
    with workers_site(tmp_path, redis_server.url) as here:
        broker = here.broker("b1", 1, *TWO)
        whole(broker)
        agent_of(here, "a1", IP1, broker)
        broker.process.send_signal(signal.SIGTERM)
        until(lambda: len(broker.lines("drain_started")) == 2, what="both to drain")
        for pid in pids(broker).values():
            os.kill(pid, signal.SIGTERM)  # as an init system that signals everybody: not a second one
        assert health(broker.admin(), "/readyz")[1]["reasons"] == ["worker 1: draining", "worker 2: draining"]
        left = list(pids(broker).values())
        code, seconds = broker.end(signal.SIGINT)
        assert code == 1 and seconds < DRAIN / 2, broker.text
        assert not any(map(alive, left))
        assert len(broker.lines("abort_requested")) == 3


def test_a_port_that_is_taken_is_refused_however_many_workers(tmp_path: Path, redis_server: RedisServer) -> None:
    """SO_REUSEPORT must not let a second start take half of the connections."""
    with workers_site(tmp_path, redis_server.url) as here:
        first = here.broker("b1", 1, *TWO)
        whole(first)
        address = first.address("broker_started")
        for node, flags in (("b2", TWO), ("b3", ())):
            other = here.broker(node, 2, *flags, "--listen", address)
            assert other.process.wait(DRAIN) == 3
            (told,) = other.lines("listen_failed")
            assert told["text"].startswith(f"broker.listen: can't listen on {address}: the address is in use")
            assert not other.lines("worker_started")


def test_one_worker_is_one_process(tmp_path: Path, redis_server: RedisServer) -> None:
    with site(tmp_path, redis_server.url) as here:
        broker = here.broker("b1", 1, "--workers", "1")
        assert broker.wait_for("broker_started")["node"] == "b1"
        assert not broker.lines("worker_started")
        assert broker.end()[0] == 0


async def test_a_fixed_open_port_is_had_on_whichever_node_of_the_host(tmp_path: Path) -> None:
    """Two nodes share IP and range; one session gets the port, the other is told; when its node dies it moves."""
    fixed = free_port()
    open_ports = {"open_ports__range": f"{fixed}-{fixed}", "open_ports__allow": ["127.0.0.0/8"]}
    async with running_cluster(tmp_path) as cluster:
        for node in ("b.1", "b.2"):
            await cluster.start_broker(node, host="b", **open_ports)
        target = Target(IP1)
        publish = [{"target": f"{IP1}:{target.port}", "port": fixed}]
        agent = (await cluster.start_agent("a1", IP1, publish=publish)).agent

        def has_it() -> list[str]:
            welcomes = [slot.session.welcome for slot in agent.slots if slot.session and slot.session.welcome]
            return [welcome.node for welcome in welcomes if [port.port for port in welcome.open_ports] == [fixed]]

        await cluster.until(lambda: agent.state == "ready")
        (first,) = has_it()
        assert agent.one_host == "b"
        cluster.brokers.pop(first).kill()
        await cluster.start_broker("b.3", host="b", port_range=free_range(100), **open_ports)
        await cluster.until(lambda: agent.state == "ready" and has_it() == ["b.3"])
        sock = await in_thread(lambda: kept(socket.create_connection(("127.0.0.1", fixed), timeout=15)))
        await in_thread(lambda: sock.sendall(b"hello\n"))
        assert await in_thread(lambda: read_line(sock)) == f"{IP1}:hello".encode()


def test_stopping_workers_serve_new_clients_while_the_vip_learns_it(tmp_path: Path, redis_server: RedisServer) -> None:
    """SIGTERM to the supervisor: not ready, and both listeners still answer; a second signal cuts it short."""
    with workers_site(tmp_path, redis_server.url) as here:
        gateway = here.gateway(*TWO, "--lame-duck", "600")
        admin = whole(gateway)
        host, _, port = gateway.address("gateway_started").partition(":")
        gateway.process.send_signal(signal.SIGTERM)
        until(lambda: len(gateway.lines("lame_duck_started")) == 2, what="both workers to be told")
        assert health(admin, "/readyz")[1]["reasons"] == ["worker 1: draining", "worker 2: draining"]
        for _ in range(50):
            with socket.create_connection((host, int(port)), timeout=15) as sock:
                sock.sendall(b"\5\1\0" + b"\5\1\0\1\x7f\2\t\t\0\x50")
                reply = b""
                while len(reply) < 12 and (piece := sock.recv(12)):
                    reply += piece
            assert reply[:4] == b"\5\0\5\4", "host unreachable: a worker looked it up"
        workers = health(admin, "/statusz")[1]["workers"]
        assert all(worker["refused"]["unknown_target"] for worker in workers)
        code, seconds = gateway.end(signal.SIGTERM)
        assert code == 1 and seconds < DRAIN / 2


#: A worker whose relay hangs with the first byte of any client.
HANGS = """
import time
from rtunnel_socks.client import Client
from rtunnel.workers import main
Client.received = lambda self, data: time.sleep(3600)
main()
"""


async def test_a_worker_that_hangs_is_killed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped as a whole, and with a relay thread that hangs; the other worker goes on."""
    monkeypatch.setattr(workers, "TICK", 0.25)
    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-c", HANGS])
    pki.init(tmp_path / "pki")
    keys: dict[str, object] = {
        "registry.url": f"unix://{tmp_path}/nobody.sock", "gateway.listen": "127.0.0.1:0", "gateway.workers": 2,
        "gateway.key": f"{tmp_path}/pki/gateway.key", "gateway.ca": f"{tmp_path}/pki/ca.pem", "gateway.lame_duck": 0,
        "gateway.admin": "",
    }  # fmt: skip
    supervisor = Supervisor("gateway", load(None, {}, keys), 2)
    processes: list[int] = []

    async def whole(restarts: int) -> None:
        """Both serve, and so many were started again; `processes` are theirs."""
        with trio.fail_after(30):
            while not (
                len(supervisor.workers) == 2
                and all(worker.serves for worker in supervisor.workers)
                and sum(worker.restarts for worker in supervisor.workers) == restarts
            ):
                await trio.sleep(0.01)
        processes[:] = [worker.process.pid for worker in supervisor.workers if worker.process]

    with structlog.testing.capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run)
            await whole(0)
            first = list(processes)
            os.kill(first[0], signal.SIGSTOP)
            await whole(1)
            assert processes[0] != first[0] and processes[1] == first[1]
            host, port = parse_endpoint(supervisor.workers[0].config.gateway.listen)
            with kept(socket.create_connection((host, port))) as sock:
                sock.sendall(b"x")
                await whole(2)
            supervisor.stop.set()
    assert supervisor.code == 0
    killed = [line for line in lines if line["event"] == "worker_killed"]
    assert [line["silence"] for line in killed] == [workers.SILENCE] * 2 and killed[0]["worker"] == 1


def test_systemd_hears_of_the_supervisor_alone(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready when all workers serve, signs of life, and that it stops; no worker speaks for it."""
    heard = kept(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    heard.bind(f"{tmp_path}/notify")
    heard.settimeout(20)
    heard.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    told: list[str] = []
    speakers: set[int] = set()

    def hear(wanted: str) -> None:
        while wanted not in told:
            data, (credentials, *_), *_ = heard.recvmsg(4096, 256)
            speakers.add(int.from_bytes(credentials[2][:4], sys.byteorder))
            told.extend(data.decode().split("\n"))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with workers_site(tmp_path, redis_server.url) as here:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            gateway = here.gateway(*TWO)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        hear("READY=1")
        limits = {
            resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in (gateway.process.pid, *pids(gateway).values())
        }
        assert limits == {(hard, hard)}, "each raises its own"
        until(lambda: len(gateway.lines("gateway_started")) == 2, what="the log")
        assert told[0] == "WATCHDOG=1" and any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in told)
        hear("STATUS=ready")
        told.clear()
        hear("WATCHDOG=1")
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda: len(gateway.lines("file_check_requested")) == 3, what="the supervisor and both workers to look")
        gateway.process.send_signal(signal.SIGTERM)
        hear("STOPPING=1")
        assert gateway.process.wait(DRAIN) == 0
        assert speakers == {gateway.process.pid}
