"""/metrics of real roles, after real streams and refusals; and the page that lists them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from rtunnel.config import format_endpoint, load
from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import Change
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.roles import find_role
from rtunnel.trust import pki
from rtunnel.trust.certificates import DAY
from rtunnel.trust.keys import Token, new_token
from rtunnel_authority.server import Server
from support.authority import address, change, token
from support.cluster import Cluster, SocksRefused, Target, in_thread, running_cluster
from support.logs import Events
from support.metrics_page import TABLE
from support.plumbing import free_port, kept
from support.polling import until
from support.redis_server import RedisServer
from support.scrape import Scrape, scrape
from support.site import free_address, health, ready, site

IP = "127.1.0.1"
ADMIN: dict[str, Any] = {"admin": "127.0.0.1:0"}


class Looks:
    """Where the parts of a cluster can be asked, by the order of their starts."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._at: dict[str, str] = {}

    def here(self, name: str) -> None:
        """The part that was started last."""
        self._at[name] = [line["address"] for line in self._events if line["event"] == "admin_endpoint_opened"][-1]

    async def at(self, name: str) -> Scrape:
        return await in_thread(lambda: scrape(self._at[name]))

    async def until(self, name: str, true: Callable[[Scrape], bool]) -> Scrape:
        """The first answer of which this is true."""
        with trio.fail_after(15):
            while not true(answer := await self.at(name)):
                await trio.sleep(0.01)
        return answer


async def started(cluster: Cluster, events: Events, **gateway: object) -> Looks:
    """A broker, a gateway and an agent that can be asked."""
    looks = Looks(events)
    await cluster.start_broker("b1", **ADMIN)
    looks.here("broker")
    await cluster.start_gateway(**ADMIN, **gateway)
    looks.here("gateway")
    await cluster.start_agent("a1", IP, redundancy=1, **ADMIN)
    looks.here("agent")
    await cluster.whole()
    return looks


async def refused(cluster: Cluster, ip: str, port: int) -> None:
    with pytest.raises(SocksRefused):
        await cluster.socks(ip, port)


async def test_streams_and_their_ends_are_told_by_all_three(tmp_path: Path, events: Events) -> None:
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)
        target = Target(IP)
        sock = await cluster.socks(IP, target.port)
        for role in ("gateway", "broker", "agent"):
            now = await looks.until(role, lambda now: now.value("rtunnel_streams") == 1)
            assert now.value("rtunnel_streams_accepted_total") == 1
            assert now.value("rtunnel_stream_bytes_total", direction="up") == 0
        sock.sendall(b"12345\n")
        for role in ("gateway", "broker", "agent"):  # a stream of three days is seen before its end
            await looks.until(role, lambda now: now.value("rtunnel_stream_bytes_total", direction="up") == 6)
        sock.shutdown(socket.SHUT_WR)
        answer = await in_thread(lambda: b"".join(iter(lambda: sock.recv(4096), b"")))
        for role in ("gateway", "broker", "agent"):
            now = await looks.until(role, lambda now: now.value("rtunnel_streams") == 0)
            assert now.counted("rtunnel_stream_endings_total", "ending") == {"closed": 1}
            assert now.values("rtunnel_first_byte_seconds_count") == ([1] if role == "gateway" else [])
            assert now.value("rtunnel_stream_bytes_total", direction="up") == 6
            down = now.value("rtunnel_stream_bytes_total", direction="down")
            assert down > len(answer) if role == "broker" else down == len(answer), "with the Accepted in front"
            assert not now.counted("rtunnel_refusals_total", "code")
            assert now.value("rtunnel_streams_accepted_total", role=role) == 1


async def test_a_refusal_is_counted_by_who_made_it_and_who_told_it(tmp_path: Path, events: Events) -> None:
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)
        await refused(cluster, "127.1.0.9", 80)
        await refused(cluster, IP, free_port())
        await refused(cluster, IP, free_port())
        told = {"unknown_target": 1, "target_refused": 2}
        assert (await looks.at("gateway")).counted("rtunnel_refusals_total", "code") == told
        now = await looks.at("agent")
        assert now.counted("rtunnel_refusals_total", "code") == {"target_refused": 2}
        assert len(now.values("rtunnel_refusals_total")) == 1, "an agent has the words that it has met"
        now = await looks.at("broker")
        assert len(now.values("rtunnel_refusals_total")) > 30, "a broker has them all"
        assert now.value("rtunnel_streams_accepted_total") == 2, "the agent's no went through it as a stream"


async def test_times_and_attempts_of_requests(tmp_path: Path, events: Events) -> None:
    """One that is joined, one that the target refuses, one without a tuple: by code, and by node what was tried."""
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)
        now = await looks.at("gateway")
        assert now.value("rtunnel_setup_seconds_count", code="accepted") == 0, "the first one is a step from 0"
        await cluster.socks(IP, Target(IP).port)
        await refused(cluster, IP, free_port())
        await refused(cluster, "127.1.0.9", 80)
        now = await looks.at("gateway")
        told = {"accepted": 1, "target_refused": 1, "unknown_target": 1}
        assert now.counted("rtunnel_setup_seconds_count", "code") == told
        assert now.values("rtunnel_setup_seconds_bucket", code="accepted")[-1] == 1
        assert now.value("rtunnel_setup_seconds_sum", code="accepted") > 0
        assert now.counted("rtunnel_attempts_total", "code") == {"accepted": 1, "target_refused": 1}
        assert now.counted("rtunnel_attempts_total", "node") == {"b1": 1}
        assert now.value("rtunnel_registry_call_seconds_count", call="lookup", result="ok") == 1


async def test_a_nodes_own_figures(tmp_path: Path, events: Events) -> None:
    """Ports, descriptors, heartbeats and links; a restarted agent's session replaces the older one."""
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)

        def whole(now: Scrape) -> bool:  # the clock's offset and the first pong come after the first heartbeat
            known = now.values("rtunnel_registry_clock_offset_seconds") and now.values("rtunnel_beat_age_seconds")
            pongs = now.values("rtunnel_path_round_trip_seconds_count")
            return now.values("rtunnel_tuples_registered") == [1] and bool(known) and pongs > [0]

        now = await looks.until("broker", whole)
        assert now.value("rtunnel_ready") == 1
        assert now.value("rtunnel_beat_age_seconds") < 5
        assert now.value("rtunnel_ports", range="guarded", state="used") == 1
        assert now.value("rtunnel_ports", range="guarded", state="free") > 0
        assert 0 < now.value("rtunnel_descriptors") < now.value("rtunnel_descriptor_limit")
        assert abs(now.value("rtunnel_registry_clock_offset_seconds")) < 5
        assert now.value("rtunnel_pings_total") >= now.value("rtunnel_path_round_trip_seconds_count") >= 1
        assert now.value("rtunnel_pings_lost_total") == 0
        agent = await looks.until("agent", lambda now: bool(now.values("rtunnel_session_round_trip_seconds")))
        assert agent.value("rtunnel_session_round_trip_seconds", node="b1") < 5
        cluster.parts[-1].kill()
        now = await looks.until("broker", lambda now: bool(now.counted("rtunnel_session_endings_total", "cause")))
        assert now.counted("rtunnel_session_endings_total", "cause") in ({"closed": 1}, {"reset": 1})


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ({"limits__source_handshakes": 2}, "too_many_handshakes"),
        ({"limits__source_rate": 1.0}, "rate_limited"),
        ({"limits__source_streams": 2}, "too_many_streams"),
        ({"max_clients": 2}, "overloaded"),
    ],
)
async def test_limits_of_a_gateway(tmp_path: Path, events: Events, limit: dict[str, object], code: str) -> None:
    """Two fit in, the third is refused by the name of the limit."""
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events, **limit)
        target = Target(IP)
        for _ in range(2):
            if code == "too_many_handshakes":
                kept(await in_thread(lambda: socket.create_connection(cluster.gateway.bound)))
            else:
                await cluster.socks(IP, target.port)
        silent = 2 if code == "too_many_handshakes" else 0
        await looks.until("gateway", lambda now: now.value("rtunnel_clients_negotiating") == silent)
        with pytest.raises((SocksRefused, ConnectionError)):
            await cluster.socks(IP, target.port)
        now = await looks.until("gateway", lambda now: bool(now.counted("rtunnel_refusals_total", "code")))
        assert now.counted("rtunnel_refusals_total", "code") == {code: 1}


async def test_who_does_not_prove_itself(tmp_path: Path, events: Events) -> None:
    """An agent with a join token only: the stream fails, and both the cause and the answer are counted."""
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)
        await cluster.start_agent("a2", "127.1.0.2", redundancy=1, certificate="", key="")
        await cluster.whole()
        target = Target("127.1.0.2")
        await refused(cluster, "127.1.0.2", target.port)
        now = await looks.at("gateway")
        assert now.counted("rtunnel_proof_failures_total", "code") == {"not_proven": 1}
        assert now.counted("rtunnel_refusals_total", "code")["agent_unavailable"] == 1


async def test_sessions_and_who_gets_none(tmp_path: Path, events: Events) -> None:
    """Another agent with the same address is refused, and the one that wants two sessions of one node has one."""
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)
        broker = await looks.at("broker")
        assert broker.counted("rtunnel_sessions", "state") == {"live": 1}
        assert broker.value("rtunnel_certificate_seconds_left") > DAY / 2
        await cluster.start_agent("a2", IP, redundancy=2, **ADMIN)
        looks.here("thief")
        now = await looks.until("broker", lambda now: bool(now.counted("rtunnel_session_refusals_total", "code")))
        assert set(now.counted("rtunnel_session_refusals_total", "code")) == {"address_taken"}
        now = await looks.at("thief")
        assert (now.value("rtunnel_sessions_wanted"), now.value("rtunnel_sessions", state="live")) == (2, 0)
        assert now.value("rtunnel_on_one_host") == 0
        await cluster.start_agent("a3", "127.1.0.3", redundancy=2, **ADMIN)
        looks.here("half")
        now = await looks.until("half", lambda now: now.value("rtunnel_sessions", state="live") == 1)
        assert now.value("rtunnel_certificate_seconds_left") > DAY / 2
        await looks.until(
            "broker", lambda now: "duplicate_node" in now.counted("rtunnel_session_refusals_total", "code")
        )


async def test_a_gateway_that_drains(tmp_path: Path, events: Events) -> None:
    async with running_cluster(tmp_path) as cluster:
        looks = await started(cluster, events)
        target = Target(IP)
        sock = await cluster.socks(IP, target.port)
        assert (await looks.at("gateway")).value("rtunnel_draining") == 0
        gateway = next(part for part in cluster.parts if part.role is cluster.gateway)
        gateway.stop.set()
        await looks.until("gateway", lambda now: now.value("rtunnel_draining") == 1)
        sock.close()
        await gateway.ended.wait()


async def test_too_many_links_of_one_source(tmp_path: Path, events: Events) -> None:
    async with running_cluster(tmp_path) as cluster:
        looks = Looks(events)
        broker = (await cluster.start_broker("b1", source_handshakes=2, **ADMIN)).node
        looks.here("broker")
        for _ in range(3):
            kept(await in_thread(lambda: socket.create_connection(broker.bound)))
        now = await looks.until("broker", lambda now: bool(now.counted("rtunnel_session_refusals_total", "code")))
        assert now.counted("rtunnel_session_refusals_total", "code") == {"too_many_handshakes": 1}
        assert now.value("rtunnel_handshakes") == 2


class Away(MemoryRegistry):
    """A registry that can be out of reach."""

    away = False

    def _here(self) -> None:
        if self.away:
            raise RegistryUnavailable("away")

    def beat(self, *arguments: Any) -> Any:
        self._here()
        return super().beat(*arguments)

    def changes(self, cursor: str, wait: float) -> tuple[str, list[Change]]:
        self._here()
        return super().changes(cursor, wait)


async def test_a_registry_that_is_away(tmp_path: Path, events: Events) -> None:
    """Both that need it say so; what the gateway knows stays, and grows older."""
    registry = Away(ttl=30.0, quarantine=5.0)
    async with running_cluster(tmp_path, registry) as cluster:
        looks = await started(cluster, events)
        for role in ("broker", "gateway"):
            await looks.until(role, lambda now: now.value("rtunnel_registry_up") == 1)
        registry.away = True
        for role in ("broker", "gateway"):
            await looks.until(role, lambda now: now.value("rtunnel_registry_up") == 0)
        now = await looks.until("gateway", lambda now: now.value("rtunnel_route_table_age_seconds") > 1.5)
        assert (now.value("rtunnel_tuples"), now.value("rtunnel_nodes", state="live")) == (1, 1)
        registry.away = False
        await looks.until("gateway", lambda now: now.value("rtunnel_route_table_age_seconds") < 1.5)
        await looks.until("broker", lambda now: now.value("rtunnel_registry_up") == 1)


@asynccontextmanager
async def full_site(directory: Path, events: Events) -> AsyncIterator[tuple[Cluster, Looks, trio.Event]]:
    """All four roles; the event stops the authority, by which the others go."""
    store = directory / "pki"
    pki.init(store)
    looks, stop = Looks(events), trio.Event()
    async with trio.open_nursery() as nursery:

        async def authority(*, task_status: trio.TaskStatus[Server]) -> None:
            keys = {"directory": str(store), "listen": "127.0.0.1:0", **ADMIN}
            config = load(None, {}, {f"authority.{key}": value for key, value in keys.items()})
            await find_role("authority").serve(config, None, stop=stop, task_status=task_status)

        server: Server = await nursery.start(authority)
        looks.here("authority")
        async with running_cluster(directory) as cluster:
            at = {"authority": address(server), **ADMIN}
            await cluster.start_broker("b1", **at)
            looks.here("broker")
            await cluster.start_gateway(**at)
            looks.here("gateway")
            await enrolling(cluster, "a1", IP, token(store, networks=("127.1.0.0/16",)))
            looks.here("agent")
            await cluster.whole()
            yield cluster, looks, stop
        stop.set()


async def enrolling(cluster: Cluster, agent_id: str, ip: str, by: Token) -> None:
    """An agent that gets its certificate for this token."""
    directory = cluster.secrets.parent / agent_id
    path = directory.with_suffix(".token")
    path.write_text(by.line())
    await cluster.start_agent(
        agent_id, ip, redundancy=1, certificate="", key="", identity=str(directory), join_token=str(path), **ADMIN
    )


async def test_every_series_of_the_page_is_there_and_no_other(tmp_path: Path, events: Events) -> None:
    """docs/metrics.md against what broker, gateway, agent and authority answer: name, type, label, meaning, role."""
    async with full_site(tmp_path, events) as (cluster, looks, _stop):
        await cluster.socks(IP, Target(IP).port)
        await looks.until("broker", lambda now: bool(now.values("rtunnel_beat_age_seconds")))
        await looks.until("gateway", lambda now: bool(now.values("rtunnel_registry_clock_offset_seconds")))
        for role in ("broker", "gateway", "agent", "authority"):
            answer = await looks.at(role)
            # An agent has no line for what has not happened yet.
            quiet = {"rtunnel_stream_endings_total", "rtunnel_refusals_total"} if role == "agent" else set()
            assert {row for row in answer.series if row[0] not in quiet} == {
                row for row in TABLE if row[4] == role and row[0] not in quiet
            }


async def test_trust_and_certificates(tmp_path: Path, events: Events) -> None:
    """Agents enrol, or fail to; somebody is revoked; the authority goes away: each is seen where it matters."""
    async with full_site(tmp_path, events) as (cluster, looks, stop):
        now = await looks.at("authority")
        assert now.counted("rtunnel_certificates_issued_total", "way") == {"enrolled": 1}
        assert now.value("rtunnel_store_up") == 1 and now.value("rtunnel_ca_seconds_left") > 300 * DAY
        first = now.value("rtunnel_trust_list_number")
        agent = await looks.at("agent")
        assert 0 < agent.value("rtunnel_certificate_seconds_left") <= DAY
        assert agent.value("rtunnel_renewal_failed") == 0
        for role in ("broker", "gateway"):
            await looks.until(role, lambda now: now.value("rtunnel_authority_up") == 1)

        await enrolling(cluster, "a2", "127.1.0.2", new_token("unknown"))
        looks.here("stranger")
        now = await looks.until("stranger", lambda now: now.value("rtunnel_renewal_failed") == 1)
        assert not now.values("rtunnel_certificate_seconds_left"), "it has none"
        now = await looks.at("authority")
        assert set(now.counted("rtunnel_refusals_total", "code")) == {"bad_token"}
        now = await looks.at("broker")
        assert set(now.counted("rtunnel_session_refusals_total", "code")) == {"bad_token"}

        change(cluster.secrets, lambda opened: opened.revoke("agent/default/a1"))
        now = await looks.until("authority", lambda now: now.value("rtunnel_trust_list_number") > first)
        number = now.value("rtunnel_trust_list_number")
        for role in ("broker", "gateway"):
            await looks.until(role, lambda now: now.value("rtunnel_trust_list_number") == number)
        await looks.until("agent", lambda now: now.value("rtunnel_sessions", state="live") == 0)
        await looks.until("broker", lambda now: "revoked" in now.counted("rtunnel_session_refusals_total", "code"))

        stop.set()
        for role in ("broker", "gateway"):
            await looks.until(role, lambda now: now.value("rtunnel_authority_up") == 0)


async def test_an_agent_is_asked_through_the_gateway(tmp_path: Path, events: Events) -> None:
    """docs/metrics.md: no other way leads into its VPC. Its admin address is on its loopback, and exposed."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1")
        await cluster.start_gateway()
        admin = free_address()
        port = int(admin.rpartition(":")[2])
        await cluster.start_agent("a1", IP, redundancy=1, admin=admin, exposes=[f"loopback:{port}"])
        await cluster.whole()
        now = await in_thread(lambda: scrape(f"{IP}:{port}", format_endpoint(*cluster.gateway.bound)))
        assert now.value("rtunnel_sessions", role="agent", state="live") == 1
        assert now.value("rtunnel_streams") == 1, "the one that asks"


def test_a_supervisor_tells_of_its_workers(tmp_path: Path, redis_server: RedisServer) -> None:
    """Their own series, each with its number; one that is killed is seen to be away, and begins again at 0."""
    with site(tmp_path, redis_server.url) as here:
        broker = here.broker("b1", 1, "--workers", "2")
        broker.wait_for("worker_started")
        until(lambda: ready(broker.admin()), what="both workers")
        agent = here.agent("a1", IP, [broker.address("broker_started")])
        until(lambda: ready(agent.admin()), what="2/2")

        now = scrape(broker.admin())
        rows = {row for row in TABLE if row[4] == "broker" and row[0] != "rtunnel_authority_up"}  # it has none
        assert now.series == rows | {(*row[:4], "broker") for row in TABLE if row[4] == "supervisor"}
        for worker in ("1", "2"):
            assert now.value("rtunnel_sessions", worker=worker, state="live") == 1
            assert now.value("rtunnel_worker_up", worker=worker) == 1
            assert now.value("rtunnel_worker_restarts_total", worker=worker) == 0
        single = scrape(health(broker.admin(), "/statusz")[1]["workers"][1]["admin"])
        assert single.value("rtunnel_sessions", state="live") == 1
        assert not single.values("rtunnel_sessions", worker="2") and not single.values("rtunnel_worker_up")

        pids = {line["worker"]: line["pid"] for line in broker.lines("worker_started")}
        os.kill(pids[1], signal.SIGSTOP)  # alive, and silent
        until(lambda: scrape(broker.admin()).value("rtunnel_worker_up", worker="1") == 0, what="a silent worker")
        silent = scrape(broker.admin())
        assert not silent.values("rtunnel_sessions", worker="1"), "nothing is made up"
        assert silent.value("rtunnel_worker_up", worker="2") == 1
        os.kill(pids[1], signal.SIGKILL)
        until(lambda: scrape(broker.admin()).value("rtunnel_worker_restarts_total", worker="1") == 1, what="another")
        until(lambda: scrape(broker.admin()).values("rtunnel_sessions", worker="1", state="live") == [1], what="2/2")
        assert agent.end()[0] == 0 and broker.end()[0] == 0
