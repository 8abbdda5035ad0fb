"""The main job, end to end: a controller reaches every host by its original IP, whatever breaks in between.

The scenarios run in the order of this file on one system (`lab`). `idle` is a connection that is opened before the
first of them and used again after the last; so no scenario restarts the agent, the gateway or the broker that carry it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from lab.roles import HEARTBEAT, OPEN_PORT_AGENT, OPEN_PORT_CLIENT, OPEN_PORT_FIXED, Lab, code_words
from lab.target import ECHO_PORT, HALF_CLOSE_PORT, HTTP_PORT, UNEXPOSED_PORT, pattern, pattern_sha256
from lab.topology import BROKERS, HOSTS, Balance, Process, wait_for
from rtunnel.registry import COUNTER_BITS

pytestmark = pytest.mark.lab

GIB = int(os.environ.get("RTUNNEL_LAB_BYTES", 1 << 30))
MIB = 1 << 20
ORIGINS = ("controller", "app")
#: longer than any dead-link timer of the design (5 s of silence, 15 s without an answer)
IDLE_AT_LEAST = 20.0
TRIES, RATE = 200, 20
#: an IP of VPC a that is nobody's
ORPHAN = "10.1.0.99"


@dataclass
class Idle:
    """A connection that says nothing, and the node that carries it."""

    client: Process
    node: str

    AGENT = "a1"


@pytest.fixture(scope="session")
def idle(lab: Lab) -> Iterator[Idle]:
    """Opened while nothing else goes on, so that the one node with a stream is its node."""
    client = lab.spawn_client("controller", "idle", lab.net[Idle.AGENT].ip, str(ECHO_PORT), name="idle")
    wait_for("the idle connection is open", client.json_lines, 10)
    assert client.json_lines()[0]["ok"], client.text()

    def carriers() -> list[str]:
        streams = {name: lab.status(name)["streams"] for name in BROKERS}
        return [name for name in BROKERS if streams[name]] if sum(streams.values()) == 1 else []

    (node,), _ = wait_for("one broker carries the idle connection", carriers, 10)
    yield Idle(client, node)
    client.kill()


@pytest.fixture(autouse=True)
def _whole(lab: Lab, idle: Idle) -> None:
    """Every scenario begins with everything in order."""
    lab.wait_whole()


def whoami(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Who answered a curl, and the address at which it was reached."""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    answer = json.loads(done.stdout)
    return answer["host"], answer["reached_at"]


# Scenario 1: every service answers by its original IP.


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("how", ["--socks5-hostname", "--socks5", "--proxy", "--proxytunnel"])
def test_1_curl_reaches_every_host_by_its_original_ip(lab: Lab, origin: str, how: str) -> None:
    """SOCKS5 and HTTP proxy (absolute form and CONNECT), from inside the centre and through the VIP."""
    proxy = lab.proxy(origin)
    options = ["--proxytunnel", "--proxy", proxy] if how == "--proxytunnel" else [how, proxy]
    for name in HOSTS:
        ip = lab.net[name].ip
        assert whoami(lab.net[origin].curl(*options, f"http://{ip}:{HTTP_PORT}/whoami")) == (name, ip)


@pytest.mark.parametrize("how", ["--socks5-hostname", "--proxy"])
def test_1_curl_reaches_an_ipv6_target(lab: Lab, how: str) -> None:
    """The same by the host's IPv6 address."""
    ip6 = lab.net["b1"].ip6
    done = lab.net["controller"].curl(how, lab.proxy("controller"), "--globoff", f"http://[{ip6}]:{HTTP_PORT}/whoami")
    assert whoami(done) == ("b1", ip6)


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("http_proxy", [False, True], ids=["socks5", "http"])
def test_1_pysocks_reaches_every_host(lab: Lab, origin: str, http_proxy: bool) -> None:
    """PySocks, both kinds of proxy."""
    for name in HOSTS:
        told = lab.client(origin, "get", lab.net[name].ip, str(HTTP_PORT), http_proxy=http_proxy)
        assert told["ok"], told
        assert json.loads(told["body"])["host"] == name


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("http_proxy", [False, True], ids=["socks5", "http"])
def test_1_half_close_is_preserved(lab: Lab, origin: str, http_proxy: bool) -> None:
    """The client shuts its side; the service answers only then, and the client gets all of it."""
    for name in HOSTS:
        for size in (0, 1, 3 * MIB):
            told = lab.client(
                origin, "half-close", lab.net[name].ip, str(HALF_CLOSE_PORT), str(size), http_proxy=http_proxy
            )
            assert told["ok"], (name, size, told)


def test_1_no_is_told_truthfully(lab: Lab) -> None:
    """An IP without an agent and a port that is not exposed get different answers, and nobody else's bytes."""
    controller, proxy = lab.net["controller"], lab.proxy("controller")
    answers = {}
    for ip, port in ((ORPHAN, HTTP_PORT), (lab.net["a2"].ip, UNEXPOSED_PORT)):
        done = controller.curl("--proxy", proxy, "--dump-header", "-", f"http://{ip}:{port}/whoami")
        assert done.returncode == 22, done
        answers[ip] = done.stdout
        assert not lab.client("controller", "get", ip, str(port))["ok"]
    assert "destination_not_found" in answers[ORPHAN]
    assert "destination_ip_prohibited" in answers[lab.net["a2"].ip]


@pytest.mark.parametrize("how", ["--socks5-hostname", "--proxy"])
def test_1_download_of_a_gib_is_whole(lab: Lab, how: str) -> None:
    """curl's bytes have the checksum that the target's bytes have."""
    url = f"http://{lab.net['a2'].ip}:{HTTP_PORT}/big?bytes={GIB}"
    start = time.monotonic()
    curl = lab.net["app"].spawn(
        *("curl", "--silent", "--show-error", "--fail", how, lab.proxy("app"), "--output", "-", url),
        name=f"curl-{how.lstrip('-')}",
        stdout=True,
    )
    digest, size = hashlib.sha256(), 0
    while piece := curl.stdout.read(MIB):
        digest.update(piece)
        size += len(piece)
    seconds = time.monotonic() - start
    assert curl.wait(10) == 0, curl.tail()
    curl.kill()
    assert (size, digest.hexdigest()) == (GIB, pattern_sha256(GIB))
    lab.note("download", f"{GIB / MIB:.0f} MiB, curl {how}, {seconds:.1f} s, {GIB * 8 / seconds / 1e9:.2f} Gbit/s")


def test_1_upload_of_a_gib_is_whole(lab: Lab) -> None:
    """Upload until our FIN; the service tells length and checksum of what came."""
    told = lab.client("controller", "half-close", lab.net["b1"].ip, str(HALF_CLOSE_PORT), str(GIB), seconds=200)
    assert told["ok"], told
    seconds = told["seconds"]
    lab.note("upload", f"{GIB / MIB:.0f} MiB, PySocks, {seconds:.1f} s, {GIB * 8 / seconds / 1e9:.2f} Gbit/s")


def test_1_curl_uploads_through_the_http_proxy(lab: Lab, tmp_path: Path) -> None:
    """A PUT with a body in absolute form (curl waits for the target's 100 Continue)."""
    size = 16 * MIB + 5
    body = tmp_path / "body"
    with body.open("wb") as file:
        file.writelines(pattern(size))
    url = f"http://{lab.net['b2'].ip}:{HTTP_PORT}/upload"
    done = lab.net["app"].curl("--proxy", lab.proxy("app"), "--upload-file", str(body), url, seconds=30)
    assert json.loads(done.stdout) == {"bytes": size, "sha256": pattern_sha256(size)}


# Scenario 2: two sessions on two different nodes.


@pytest.mark.parametrize("mode", ["random", "roundrobin"])
def test_2_two_sessions_on_two_nodes(lab: Lab, mode: Balance) -> None:
    """Within 5 s of an agent's start, whether the VIP picks brokers at random or in turn."""
    names = [name for name in HOSTS if name != Idle.AGENT]
    lab.net.balance(mode)
    try:
        lab.restart_agents(names)
        took: dict[str, float] = {}

        def all_ready() -> bool:
            for name in names:
                if name not in took and lab.reached(name):
                    took[name] = time.monotonic() - lab.parts[name].started
            return len(took) == len(names)

        wait_for("all agents are ready", all_ready, 15, every=0.02)
        for name in names:
            assert lab.status(name)["redundancy"] == "2/2"
            assert len(set(lab.nodes_of(name))) == 2
        slowest = max(took.values())
        lab.note("two nodes", f"{mode} VIP: {len(took)} agents on two nodes within {slowest:.2f} s of their start")
        assert slowest <= 5.0
    finally:
        lab.net.balance("random")


def test_2_pinned_vip_is_told_and_served(lab: Lab) -> None:
    """A VIP that pins by source gives one node: the agent says 1/2 and why, and serves."""
    names = [name for name in HOSTS if name != Idle.AGENT]
    lab.net.balance("pinned")
    try:
        lab.restart_agents(names)
        for name in names:

            def told(name: str = name) -> str:
                status = lab.status(name)
                return str(status["reason"]) if status["redundancy"] == "1/2" else ""

            reason, took = wait_for(f"{name} says 1/2 and why", told, 15)
            assert len(lab.nodes_of(name)) == 1
            lab.note("pinned VIP", f"{name}: 1/2 after {took:.2f} s: {reason}")
            assert not lab.ready(name), "degraded is not ready"
            url = f"http://{lab.net[name].ip}:{HTTP_PORT}/whoami"
            assert whoami(lab.net["controller"].curl("--socks5-hostname", lab.proxy("controller"), url))[0] == name
    finally:
        lab.net.balance("random")
        lab.restart_agents(names)


# Scenarios 3 and 4: a broker dies, a broker falls silent.


def victims(lab: Lab, idle: Idle) -> list[str]:
    """The brokers that don't carry the idle connection, the one with most sessions first. One that came back has
    none: agents stay where they are."""
    others = [name for name in BROKERS if name != idle.node]
    return sorted(others, key=lambda name: -int(lab.status(name)["sessions"]))


def failures(tries: list[dict[str, Any]], broke_at: float) -> list[dict[str, Any]]:
    """Tries that failed, but for those that were connected when the broker broke: they are not new connections."""
    return [t for t in tries if not t["ok"] and not 0 < t["connected"] < broke_at]


def tell(tries: list[dict[str, Any]]) -> str:
    """One line about them."""
    good = [t["seconds"] for t in tries if t["ok"]]
    return f"{len(good)}/{len(tries)} ok, slowest {max(good, default=0):.3f} s"


@pytest.mark.parametrize("round_", [1, 2])
def test_3_kill_9_of_a_broker(lab: Lab, idle: Idle, round_: int) -> None:
    """No new connection fails across the kill; redundancy and registry are back in order within 15 s."""
    victim = victims(lab, idle)[0]
    assert lab.status(victim)["sessions"], f"round {round_}: a kill of an idle broker shows nothing"
    client = lab.tries(f"tries-kill-{victim}", TRIES, RATE)
    wait_for("the tries are under way", lambda: len(client.json_lines()) >= 2 * RATE, 20)
    lab.parts[victim].kill()
    broke_at = time.monotonic()
    try:
        healed = lab.wait_whole(30, without=victim)
        assert client.wait(60) == 0
        tries = client.json_lines()
        assert len(tries) == TRIES
        assert not failures(tries, broke_at)
        lab.note("kill -9", f"{victim}: {tell(tries)}; in order again after {healed:.1f} s")
        assert healed <= 15.0
    finally:
        lab.start_broker(victim)
        lab.wait_ready(victim)


def test_4_a_broker_cut_off_silently(lab: Lab, idle: Idle) -> None:
    """No RST tells anybody: new connections succeed within 1.5 s each, its links are given up within 20 s."""
    victim = victims(lab, idle)[0]
    client = lab.tries(f"tries-cut-{victim}", 2 * TRIES, RATE)
    wait_for("the tries are under way", lambda: len(client.json_lines()) >= RATE, 20)
    concerned = [name for name in HOSTS if victim in lab.nodes_of(name)]
    lab.net[victim].cut()
    broke_at = time.monotonic()  # after it: the cut takes a while, and what came through until then breaks with it
    try:

        def given_up() -> bool:
            return not [name for name in concerned if victim in lab.nodes_of(name)]

        _, gave_up = wait_for(f"every link to {victim} is given up", given_up, 40)
        assert client.wait(60) == 0
        tries = client.json_lines()
        assert len(tries) == 2 * TRIES
        assert not failures(tries, broke_at)
        lab.note("silent cut", f"{victim}: {tell(tries)}; {len(concerned)} links given up after {gave_up:.1f} s")
        assert max(t["seconds"] for t in tries if t["ok"]) <= 1.5
        assert gave_up <= 20.0
    finally:
        lab.net[victim].mend()
    lab.wait_ready(victim, 30)


# Scenario 5: stale tuples, forced.


REFORGE = 10


def until_logged(
    lab: Lab, code: str, wanted: str, forged: dict[str, Any], instead_of: dict[str, Any] | None = None
) -> int:
    """Forge a tuple, then ask for its target until the gateway has logged the code. Every answer must come from
    `wanted`, or be a no when that is empty. How many requests it took."""
    since = lab.log_mark("gateway")
    url = f"http://{forged['agent_ip']}:{HTTP_PORT}/whoami"
    asked = 0

    def probe() -> bool:
        nonlocal asked
        if asked % REFORGE == 0:  # a heartbeat puts things right within 3 s, perhaps before the first question
            lab.forge(forged, instead_of)
        asked += 1
        done = lab.net["controller"].curl("--socks5-hostname", lab.proxy("controller"), url)
        if wanted:
            assert whoami(done)[0] == wanted
        else:
            assert (done.returncode, done.stdout) == (97, ""), done  # the proxy said no
        return code in code_words(since())

    wait_for(f"the gateway logs {code}", probe, 10)
    return asked


def on_a_foreign_node(lab: Lab) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """An agent, a tuple of its own, and a tuple of another agent on a node where the first one has no session."""
    for _ in range(10):
        owned = {name: lab.guarded(name) for name in HOSTS}
        for name, other in permutations(HOSTS, 2):
            nodes = {t["node"] for t in owned[name]}
            for foreign in owned[other]:
                if foreign["node"] not in nodes:
                    return name, owned[name][0], foreign
        lab.restart_agents([OPEN_PORT_AGENT])  # all four on the same two nodes: shuffle
        lab.wait_whole()
    raise AssertionError("four agents stay on the same two nodes")


def counter(entry: dict[str, Any]) -> int:
    """The part of an epoch that grows with every session of a node."""
    return int(entry["epoch"]) % (1 << COUNTER_BITS)


def test_5_a_port_of_another_agent_is_refused(lab: Lab) -> None:
    """stale_target: the tuple points to a port that is now another agent's; the next tuple serves."""
    name, own, foreign = on_a_foreign_node(lab)
    # From the same host, too: the registry keeps one agent_id to one host.
    same = {key: own[key] for key in ("agent_ip", "agent_id", "host_id", "agent_host")}
    asked = until_logged(lab, "stale_target", name, foreign | same)
    lab.note("stale tuple", f"stale_target: refused, {asked} of {asked} answers from {name}")


def test_5_another_node_is_refused(lab: Lab) -> None:
    """stale_node: the tuple names a node that is not the one at that address; the next tuple serves."""
    name, own, foreign = on_a_foreign_node(lab)
    asked = until_logged(lab, "stale_node", name, {**own, "node": foreign["node"], "epoch": foreign["epoch"]})
    lab.note("stale tuple", f"stale_node: refused, {asked} of {asked} answers from {name}")


def test_5_another_epoch_is_refused(lab: Lab) -> None:
    """stale_epoch: the tuple is of an earlier session of the same agent; the next tuple serves."""
    # One that is not the first session of its node's incarnation: the registry takes no tuple of an earlier one.
    own = max((t for t in lab.tuples() if t["agent_port"] == 0 and "." in t["agent_ip"]), key=counter)
    assert counter(own) > 0
    name = own["agent_id"]
    asked = until_logged(lab, "stale_epoch", name, {**own, "epoch": own["epoch"] - 1}, instead_of=own)
    lab.note("stale tuple", f"stale_epoch: refused, {asked} of {asked} answers from {name}")


def test_5_nothing_but_a_stale_tuple_is_a_truthful_failure(lab: Lab) -> None:
    """An IP whose only tuple points to another agent's port: a no, and never a byte of that agent."""
    _, _, foreign = on_a_foreign_node(lab)
    asked = until_logged(lab, "stale_target", "", {**foreign, "agent_ip": ORPHAN, "agent_id": "nobody"})
    lab.note("stale tuple", f"with no other tuple: {asked} requests, no byte from a wrong agent")


# Scenario 6: Redis dies and comes back empty.


def test_6_redis_killed_and_restarted_empty(lab: Lab) -> None:
    """Traffic goes on throughout; the registry is whole again within one heartbeat."""

    def counts() -> set[int]:
        return set(Counter((row["agent_ip"], row["agent_port"]) for row in lab.tuples()).values())

    # A broker that was cut off in the test before keeps a dead session for up to 15 s.
    wait_for("two tuples for each target", lambda: counts() == {2}, 30)
    before = len(lab.tuples())
    client = lab.tries("tries-redis", TRIES, RATE)
    wait_for("the tries are under way", lambda: len(client.json_lines()) >= RATE, 20)
    lab.parts["redis"].kill()
    count = len(client.json_lines())
    wait_for("tries without Redis", lambda: len(client.json_lines()) >= count + 3 * RATE, 20)
    lab.start_redis()
    healed = lab.wait_whole(30)
    assert client.wait(60) == 0
    tries = client.json_lines()
    assert len(tries) == TRIES
    assert [t for t in tries if not t["ok"]] == []
    assert len(lab.tuples()) == before
    lab.note("Redis lost", f"{tell(tries)}; {before} tuples back after {healed:.1f} s (heartbeat {HEARTBEAT:g} s)")
    assert healed <= HEARTBEAT + 1.0  # and what it takes to ask


# Scenario 7: open ports.


def test_7_open_ports_serve_whom_they_allow(lab: Lab) -> None:
    """(PS IP, PS port) gives raw bytes of the target at once, to an allowed source only."""
    host = lab.net[OPEN_PORT_AGENT]
    ours = [t for t in lab.tuples() if t["agent_ip"] == host.ip and t["agent_port"]]
    assert sorted({t["agent_port"] for t in ours}) == [HTTP_PORT, HALF_CLOSE_PORT]
    client, stranger = lab.net[OPEN_PORT_CLIENT], lab.net["gateway"]
    for entry in ours:
        place = (entry["ps_ip"], entry["ps_port"])
        assert 30000 <= entry["ps_port"] <= 30099
        if entry["agent_port"] == HTTP_PORT:
            assert json.loads(client.get(*place, "/whoami")[1])["host"] == OPEN_PORT_AGENT
            with pytest.raises(OSError):
                stranger.get(*place, "/whoami", seconds=3)
        else:
            assert entry["ps_port"] == OPEN_PORT_FIXED
    lab.note("open ports", ", ".join(f"{t['ps_ip']}:{t['ps_port']} -> {t['agent_ip']}:{t['agent_port']}" for t in ours))


def test_7_open_port_keeps_half_close(lab: Lab) -> None:
    """The fixed port: raw bytes until our FIN, then the whole answer."""
    entry = next(t for t in lab.tuples() if t["agent_port"] == HALF_CLOSE_PORT)
    with lab.net[OPEN_PORT_CLIENT].connect(entry["ps_ip"], entry["ps_port"]) as sock:
        sock.sendall(b"raw bytes")
        sock.shutdown(1)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert json.loads(answer) == {"bytes": 9, "sha256": hashlib.sha256(b"raw bytes").hexdigest()}


# What an operator asks, and what has lived through all of it.


def test_8_resolve_and_status_tell_it(lab: Lab) -> None:
    """`rtunnel resolve` names both nodes of a host; `rtunnel status` names every node and agent."""
    told = json.dumps(lab.rtunnel("resolve", lab.net["a1"].ip))
    assert all(node in told for node in lab.nodes_of("a1"))
    told = json.dumps(lab.rtunnel("status"))
    assert all(name in told for name in (*BROKERS, *HOSTS))


def test_9_the_idle_connection_lived_on(lab: Lab, idle: Idle) -> None:
    """It was silent for longer than the dead-link timers, and it still carries bytes."""
    began = idle.client.started
    wait_for("long enough", lambda: time.monotonic() - began > IDLE_AT_LEAST + 2, 60)
    idle.client.stdin.write(b"last words\n")
    idle.client.stdin.flush()
    (_, answer), _ = wait_for("an echo", lambda: idle.client.json_lines()[1:] and idle.client.json_lines(), 15)
    assert answer["ok"], answer
    assert answer["idle"] > IDLE_AT_LEAST
    idle.client.stdin.close()
    assert idle.client.wait(10) == 0
    lab.note("idle connection", f"silent for {answer['idle']:.0f} s through {idle.node}, then used")


def test_9_every_part_ends_cleanly(lab: Lab) -> None:
    """SIGTERM: each part ends with status 0."""
    for name in (*HOSTS, "gateway", *BROKERS, "authority"):
        assert lab.parts[name].terminate(40) == 0, lab.parts[name].tail()
