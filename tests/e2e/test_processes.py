"""The command line as an operator runs it: processes, TOML files, a real Redis, curl and PySocks, signals."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.cluster import Target
from support.plumbing import free_port, free_range, kept
from support.polling import until
from support.redis_server import RedisServer
from support.site import DRAIN, TTL, Process, Site, fetch, free_address, health, in_process, ready, rtunnel, run, site

ROOT = Path(__file__).parents[2]
IP1, IP2 = "127.2.0.1", "127.2.0.2"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


@contextmanager
def whole_site(directory: Path, registry_url: str, *spare: str) -> Iterator[Site]:
    """Two brokers, a gateway, two agents at IP1 and IP2, all ready."""
    with site(directory, registry_url) as here:
        here.spare += spare
        brokers = [here.broker(f"b{n}", n) for n in (1, 2)]
        here.gateway()  # beside them: each takes a moment to start
        for name, ip in (("a1", IP1), ("a2", IP2)):
            here.agent(name, ip, [broker.address("broker_started") for broker in brokers] + here.spare)
        for process in here.processes.values():
            until(lambda process=process: ready(process.admin()), what=process.name)  # type: ignore[misc]
        gateway = here.processes["gateway"].admin()
        until(lambda: health(gateway, "/statusz")[1]["tuples"] == 4, what="the gateway to know all")
        yield here


# --- the whole ----------------------------------------------------------------------------------------------


@needs_curl
def test_an_operators_day(tmp_path: Path, redis_server: RedisServer) -> None:
    """pki, files, five processes, curl and PySocks, status and resolve, probes, and an end in order."""
    began = time.monotonic()
    with whole_site(tmp_path, redis_server.url) as here:
        print(f"five processes ready after {time.monotonic() - began:.1f} s")
        port = here.web(IP1, free_port())
        here.web(IP2, port)
        proxy = here.processes["gateway"].address("gateway_started")
        for ip in (IP1, IP2):
            for socks in (True, False):
                assert fetch(proxy, f"http://{ip}:{port}/", socks=socks) == f"hello from {ip}\n"
        assert pysocks(proxy, IP1, port) == f"hello from {IP1}\n"
        for name in ("b1", "gateway", "a1"):
            role = {"b1": "broker", "gateway": "gateway", "a1": "agent"}[name]
            path = tmp_path / f"{name}.toml"
            # In front of it may stand that this machine has too few descriptors for the default counts.
            assert in_process("config", "check", str(path), "--role", role).endswith(f"{path}: good for {role}\n")
        table = rtunnel("status", "--config", str(tmp_path / "gateway.toml"))
        assert re.search(r"^b1 +b1 +127\.0\.0\.1 +live ", table, re.MULTILINE)
        assert "(4)" in fetch(proxy, f"http://127.2.9.9:{port}/", code=97)  # host unreachable
        check_resolve(here, port)
        check_status(here)
        check_health(here)
        check_ends(here)


def pysocks(proxy: str, ip: str, port: int) -> str:
    """The page by PySocks, in a process where `socks` is its module."""
    host, _, number = proxy.partition(":")
    script = f"""
import socks, sys
s = socks.socksocket()
s.set_proxy(socks.SOCKS5, "{host}", {number}, rdns=True)
s.settimeout(15)
s.connect(("{ip}", {port}))
s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
data = b""
while piece := s.recv(4096):
    data += piece
s.close()
sys.stdout.write(data.partition(b"\\r\\n\\r\\n")[2].decode())
"""
    return run(sys.executable, "-c", script)


def check_resolve(here: Site, port: int) -> None:
    """The tuples are those that the agents were given, fresh, on both nodes."""
    told = {line["broker"]: line for line in here.processes["a1"].lines("session_opened")}
    tuples = json.loads(here.ask_registry("resolve", f"{IP1}:{port}", "--json"))["tuples"]
    assert {t["node"] for t in tuples} == {"b1", "b2"}
    for item in tuples:
        line = told[item["node"]]
        assert f"{item['ps_ip']}:{item['ps_port']}" == line["ps"]
        assert item["epoch"] == line["epoch"]
        assert (item["agent_id"], item["agent_ip"], item["state"]) == ("a1", IP1, "live")
        assert 0 <= item["age"] < TTL
    table = here.ask_registry("resolve", IP1)
    assert re.search(rf"{re.escape(told['b1']['ps'])} +any exposed +b1 .* live +a1 +1024-65535 +\d\.\d s ago", table)
    assert table.count("a1") == 2
    assert "does not expose 22" in here.ask_registry("resolve", f"{IP1}:22", code=1)
    assert "no agent answers for 127.2.9.9" in here.ask_registry("resolve", "127.2.9.9", code=1)


def check_status(here: Site) -> None:
    """Nodes, agents, redundancy: in JSON and for people."""
    until(lambda: all(n["facts"] and n["facts"]["clock_offset"] is not None for n in here.status()["nodes"]))
    status = here.status()
    assert {n["node"]: (n["state"], n["host"]) for n in status["nodes"]} == {"b1": ("live", "b1"), "b2": ("live", "b2")}
    assert all(0 <= n["age"] < TTL for n in status["nodes"])
    assert [(a["agent_id"], a["sessions"], a["nodes"]) for a in status["agents"]] == [
        ("a1", 2, ["b1", "b2"]),
        ("a2", 2, ["b1", "b2"]),
    ]
    assert status["summary"]["agents_on_one_node"] == 0 and status["summary"]["tuples"] == 4
    assert all(n["facts"]["ports_used"] == 2 and abs(n["facts"]["clock_offset"]) < 5 for n in status["nodes"])
    assert all(0 < n["facts"]["descriptors"] < n["facts"]["descriptor_limit"] for n in status["nodes"])
    [gateway] = status["gateways"]
    assert (gateway["namespace"], gateway["tuples"], gateway["fault"]) == ("default", 4, "")
    assert status["gone"] == status["warnings"] == []
    table = here.ask_registry("status")
    assert re.search(r"^b1 +b1 +127\.0\.0\.1 +live .* s ago", table, re.MULTILINE)
    assert re.search(rf"^a2 +default +{re.escape(IP2)} +2 ", table, re.MULTILINE)


def check_health(here: Site) -> None:
    """/livez, /readyz and /statusz of each role, and a SIGHUP."""
    for name, process in here.processes.items():
        address = process.admin()
        assert health(address, "/livez") == (200, {"live": True})
        assert health(address, "/readyz") == (200, {"ready": True, "reasons": []})
        code, status = health(address, "/statusz")
        assert code == 200 and status["role"] == {"a": "agent", "b": "broker", "g": "gateway"}[name[0]]
        process.process.send_signal(signal.SIGHUP)  # and it is there for everything below
        assert process.wait_for("file_check_requested")["signal"] == "SIGHUP"


def check_ends(here: Site) -> None:
    """SIGTERM ends each with 0, soon, and nothing is left in the registry."""
    took = {}
    for name in ("a1", "a2", "gateway", "b1", "b2"):
        process = here.processes[name]
        code, took[name] = process.end()
        assert code == 0, process.text
        assert process.lines("process_stopped")[0]["code"] == 0
        assert not re.search("Traceback|crash", process.text)
        if name == "a1":
            assert "no agent answers" in here.ask_registry("resolve", IP1, code=1)
    print("ended after", {name: round(seconds, 2) for name, seconds in took.items()})
    assert max(took.values()) < DRAIN / 2
    status = here.status()
    assert (status["nodes"], status["agents"]) == ([], [])


@needs_curl
def test_a_broker_is_killed_and_comes_back(tmp_path: Path, redis_server: RedisServer) -> None:
    """SIGKILL: no request fails, probes and status say what is missing; restarted, everything is as before."""
    with whole_site(tmp_path, redis_server.url) as here:
        port = here.web(IP1)
        proxy = here.processes["gateway"].address("gateway_started")
        agent = here.processes["a1"].admin()
        victim = here.processes["b1"]
        before = {line["broker"]: line for line in here.processes["a1"].lines("session_opened")}
        victim.kill()
        for _ in range(8):
            assert fetch(proxy, f"http://{IP1}:{port}/") == f"hello from {IP1}\n"
        until(lambda: not ready(agent), what="the agent to be degraded")
        assert health(agent, "/livez")[0] == 200
        code, answer = health(agent, "/readyz")
        assert code == 503 and answer["reasons"] and health(agent, "/statusz")[1]["redundancy"] == "1/2"
        again = here.broker("b1", 1, "--listen", victim.address("broker_started"))
        began = time.monotonic()
        until(lambda: ready(agent), what="2/2")
        print(f"2/2 again {time.monotonic() - began:.1f} s after the start of the process")
        assert again.wait_for("broker_started")["incarnation"] > victim.wait_for("broker_started")["incarnation"]
        ups = here.processes["a1"].lines
        new = until(lambda: [line for line in ups("session_opened") if line["broker"] == "b1"][1:], what="the log")[0]
        assert new["ps"] == before["b1"]["ps"] and int(new["epoch"]) > int(before["b1"]["epoch"])
        assert fetch(proxy, f"http://{IP1}:{port}/") == f"hello from {IP1}\n"
        again.kill()
        until(lambda: not named_in(here, "b1"), what="b1's heartbeat to run out")
        status = here.status()
        assert [(a["agent_id"], a["nodes"]) for a in status["agents"]] == [("a1", ["b2"]), ("a2", ["b2"])]
        assert status["summary"]["agents_on_one_node"] == 2
        assert "1 node (0 draining), 2 agents (2 on one node only, 2 on one host only)" in here.ask_registry("status")


def named_in(here: Site, node: str) -> bool:
    """Whether the registry has the node, or a tuple of it: each expires by itself."""
    status = here.status()
    return node in {n["node"] for n in status["nodes"]} | {n for agent in status["agents"] for n in agent["nodes"]}


def open_stream(proxy: str, target: Target) -> socket.socket:
    """A stream through the gateway to a Target, in use."""
    host, _, port = proxy.partition(":")
    sock = kept(socket.create_connection((host, int(port)), timeout=15))
    sock.sendall(f"CONNECT {target.ip}:{target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    reply = b""
    while not reply.endswith(b"\r\n\r\n"):
        reply += sock.recv(1)
    assert b" 200 " in reply, reply
    assert talk(sock) == f"{target.ip}:hello\n".encode()
    return sock


def talk(sock: socket.socket) -> bytes:
    sock.sendall(b"hello\n")
    return sock.recv(4096)


def test_status_shows_a_drain(tmp_path: Path, redis_server: RedisServer) -> None:
    """SIGTERM with a stream open: the broker is draining in status and probe, goes on serving, and ends with it."""
    third = free_address()
    with whole_site(tmp_path, redis_server.url, third) as here:
        proxy = here.processes["gateway"].address("gateway_started")
        target = Target(IP1)
        streams = [open_stream(proxy, target) for _ in range(2)]  # one on each node
        broker = here.processes["b1"]
        until(lambda: health(broker.admin(), "/statusz")[1]["streams"] == 1, what="a stream on each node")
        broker.process.send_signal(signal.SIGTERM)
        until(lambda: not ready(broker.admin()), what="b1 not to be ready")
        assert health(broker.admin(), "/readyz") == (503, {"ready": False, "reasons": ["draining"]})
        states = {"b1": "draining", "b2": "live"}
        until(lambda: {n["node"]: n["state"] for n in here.status()["nodes"]} == states, what="status")
        table = here.ask_registry("status")
        assert re.search(r"^b1 .* draining ", table, re.MULTILINE)
        assert re.search(r"^a1 .* 2 \(1 draining\) +1 node +b1 b2$", table, re.MULTILINE)
        # 3 when a2, which has no stream there, has left b1 by now.
        assert re.search(r"\(1 draining\), 2 agents \(2 on one node only, 2 on one host only\), [34] sessions", table)
        table = here.ask_registry("resolve", IP1)
        assert re.search(r" b1 .* draining ", table) and re.search(r" b2 .* live ", table)
        here.broker("b3", 3, "--listen", third)
        until(lambda: all(ready(here.processes[name].admin()) for name in ("a1", "a2")), what="2/2")
        assert broker.process.poll() is None
        assert [talk(sock) for sock in streams] == [f"{IP1}:hello\n".encode()] * 2
        for sock in streams:
            sock.close()
        began = time.monotonic()
        assert broker.process.wait(DRAIN) == 0
        print(f"ended {time.monotonic() - began:.2f} s after its last stream")
        assert time.monotonic() - began < DRAIN / 2
        assert {n["node"] for n in here.status()["nodes"]} == {"b2", "b3"}


def test_a_second_process_with_the_same_node_id_ends_the_first(tmp_path: Path, redis_server: RedisServer) -> None:
    """The older one ends with code 1 and says why."""
    with site(tmp_path, redis_server.url) as here:
        older = here.broker("b1", 1)
        older.wait_for("broker_started")
        newer = here.broker("b1", 2)
        newer.wait_for("broker_started")
        assert older.process.wait(DRAIN) == 1
        assert older.lines("node_superseded") and "Traceback" not in older.text
        assert newer.end()[0] == 0


def test_without_redis_roles_wait_and_can_be_stopped(tmp_path: Path) -> None:
    """Nobody answers at [registry] url: alive, not ready with the reason, status says it, SIGTERM is code 0."""
    with site(tmp_path, f"unix://{tmp_path}/nobody.sock") as here:
        for process in (here.broker("b1", 1), here.gateway()):
            process.wait_for("registry_unavailable")
            address = process.admin()
            assert health(address, "/livez")[0] == 200
            code, answer = health(address, "/readyz")
            assert code == 503 and "registry" in answer["reasons"][0]
        assert "registry: " in here.ask_registry("status", code=1)
        for process in here.processes.values():
            code, seconds = process.end()
            assert code == 0 and seconds < DRAIN / 2, process.text


# --- one process --------------------------------------------------------------------------------------------


@needs_curl
def test_standalone(tmp_path: Path) -> None:
    """Broker and gateway in one process on the memory registry, with an agent beside it: no Redis."""
    with site(tmp_path, "memory://") as here:
        text = f"""
            [broker]
            listen = "127.0.0.1:0"
            advertise_ip = "127.0.0.1"
            port_range = "{free_range(100)}"
            certificate = "pki/broker.pem"
            key = "pki/broker.key"
            cluster_key = "pki/cluster.key"
            ca = "pki/ca.pem"
            admin = "127.0.0.1:0"
            [gateway]
            listen = "127.0.0.1:0"
            key = "pki/gateway.key"
            ca = "pki/ca.pem"
            lame_duck = 0
            admin = "127.0.0.1:0"
            """
        process = here.start("gateway", "standalone", text)
        proxy = process.address("gateway_started")
        agent = here.agent("a1", IP1, [process.address("broker_started")], "--redundancy", "1")
        for address in (process.admin(0), process.admin(1), agent.admin()):
            until(lambda address=address: ready(address), what="ready")  # type: ignore[misc]
            assert health(address, "/livez")[0] == 200
        port = here.web(IP1)
        assert fetch(proxy, f"http://{IP1}:{port}/") == f"hello from {IP1}\n"
        assert "memory registry lives inside one process" in here.ask_registry("status", code=2)
        assert agent.end()[0] == 0
        code, seconds = process.end()
        assert code == 0 and seconds < DRAIN / 2


@needs_curl
def test_demo_tells_its_story(tmp_path: Path) -> None:
    """`rtunnel demo --stay`: all of it works, its curl lines do what they say, Ctrl-C ends it with 0."""
    began = time.monotonic()
    process = Process(tmp_path, "demo", "demo", "--stay")
    try:
        until(lambda: process.text.count("  curl ") >= 4 or process.process.poll() is not None, 30.0, what="the demo")
        told = process.text
        print(f"the demo took {time.monotonic() - began:.1f} s")
        for line in [line.strip() for line in told.splitlines() if line.startswith("  curl ")]:
            (ip,) = re.findall(r" http://(127\.77\.0\.\d):", line)
            assert run(*line.split(), "-sS", "-m", "15") == f"hello from {ip}\n"
        assert re.search(r"kill -9", told)
        code, seconds = process.end(signal.SIGINT)
        assert code == 0 and seconds < DRAIN / 2, process.text
        assert "Traceback" not in process.text
    finally:
        process.kill()


def test_demo_ends_with_0() -> None:
    """`rtunnel demo`: exit status 0, and says so; the brokers themselves refused the impostor."""
    story = rtunnel("demo")
    assert "every step worked" in story
    assert "refused: the broker does not accept this agent's certificate" in story
