"""The lab itself, before anything of rtunnel runs: nothing crosses but the VIP; the VIP does what it says."""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from lab.conftest import start_target, wait_listening
from lab.roles import Lab
from lab.target import HTTP_PORT
from lab.topology import BROKERS, HOSTS, LINK_PORT, PROXY_PORT, VIP, Host, Topology

pytestmark = pytest.mark.lab


@pytest.fixture
def stand_ins(net: Topology) -> Iterator[None]:
    """Something that listens where the brokers, the gateway, Redis and the controller will be."""
    ports = {**dict.fromkeys(BROKERS, LINK_PORT), "gateway": PROXY_PORT, "redis": 6379, "controller": 8080}
    running = [start_target(net[name], "--http", str(port)) for name, port in ports.items()]
    for name, port in ports.items():
        wait_listening(net[name], port)
    yield
    for process in running:
        process.kill()


def whoami(host: Host, ip: str, port: int) -> str:
    """Who answers a new connection from `host`."""
    return str(json.loads(host.get(ip, port, "/whoami")[1])["host"])


def crossings(net: Topology) -> list[tuple[Host, Host, int]]:
    """Every pair of places in different VPCs, with a port on which the second one listens."""
    ports = {
        **dict.fromkeys(HOSTS, HTTP_PORT),
        **dict.fromkeys(BROKERS, LINK_PORT),
        "gateway": PROXY_PORT,
        "redis": 6379,
        "controller": 8080,
    }
    return [
        (source, net[name], port)
        for source in net.hosts.values()
        for name, port in ports.items()
        if net[name].vpc != source.vpc
    ]


def attempt(source: Host, target: Host, port: int) -> socket.socket:
    """A connection attempt under way."""
    sock = source.new_socket()
    sock.setblocking(False)
    sock.connect_ex((target.ip, port))
    return sock


@pytest.mark.usefixtures("stand_ins")
def test_no_direct_dial_crosses_a_vpc(net: Topology, parts: Lab) -> None:
    """Every dial across VPCs stays unanswered, though the same ports answer their neighbours."""
    asked = {attempt(*crossing): crossing for crossing in crossings(net)}
    try:
        answered = select.poll()
        for sock in asked:
            answered.register(sock, select.POLLOUT | select.POLLIN)
        heard = {number for number, _ in answered.poll(1500)}
        crossed = [f"{s.name} -> {t.name}:{p}" for sock, (s, t, p) in asked.items() if sock.fileno() in heard]
    finally:
        for sock in asked:
            sock.close()
    assert not crossed
    neighbours = [("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1")]
    assert [whoami(net[s], net[t].ip, HTTP_PORT) for s, t in neighbours] == [t for _, t in neighbours]
    assert whoami(net["controller"], net["broker1"].ip, LINK_PORT) == "broker1"
    parts.note("isolation", f"{len(asked)} direct dials across VPCs, none answered")


def test_ipv6_does_not_cross_either(net: Topology) -> None:
    """The hosts' ULA addresses are reached from inside their VPC only."""
    assert whoami(net["a1"], net["a2"].ip6, HTTP_PORT) == "a2"
    with pytest.raises(OSError, match="unreachable"):
        net["controller"].connect(net["a1"].ip6, HTTP_PORT, 1)


@pytest.mark.usefixtures("stand_ins")
def test_vip_reaches_the_gateway_from_every_vpc(net: Topology) -> None:
    """The VIP answers everywhere, also for a client that sits beside the gateway."""
    for name in ("a1", "b2", "app", "controller"):
        assert whoami(net[name], VIP, PROXY_PORT) == "gateway"


@pytest.mark.usefixtures("stand_ins")
def test_vip_gives_nothing_but_its_two_ports(net: Topology) -> None:
    """A port of the VIP that is not a service's is silent."""
    with pytest.raises(TimeoutError):
        net["app"].connect(VIP, HTTP_PORT, 1)


@pytest.mark.usefixtures("stand_ins")
def test_random_vip_gives_every_broker(net: Topology) -> None:
    """60 connections meet all three."""
    net.balance("random")
    assert set(Counter(whoami(net["a1"], VIP, LINK_PORT) for _ in range(60))) == set(BROKERS)


@pytest.mark.usefixtures("stand_ins")
def test_roundrobin_vip_gives_brokers_in_turn(net: Topology) -> None:
    """30 connections, ten for each."""
    net.balance("roundrobin")
    try:
        met = Counter(whoami(net["a1"], VIP, LINK_PORT) for _ in range(30))
    finally:
        net.balance("random")
    assert met == dict.fromkeys(BROKERS, 10)


@pytest.mark.usefixtures("stand_ins")
def test_pinned_vip_gives_a_source_always_the_same_broker(net: Topology) -> None:
    """One source address, one broker."""
    net.balance("pinned")
    try:
        met = {name: {whoami(net[name], VIP, LINK_PORT) for _ in range(20)} for name in HOSTS}
    finally:
        net.balance("random")
    assert {len(brokers) for brokers in met.values()} == {1}


@pytest.mark.usefixtures("stand_ins")
def test_a_switched_vip_leaves_connections_where_they_are(net: Topology) -> None:
    """A connection stays with its broker when the VIP changes, new ones go where the VIP says now."""
    net.balance("random", among=["broker2"])
    connection = http.client.HTTPConnection(VIP, LINK_PORT)
    connection.sock = net["b1"].connect(VIP, LINK_PORT)
    try:
        for among in (["broker2"], ["broker3"]):
            net.balance("random", among=among)
            connection.request("GET", "/whoami")
            assert json.loads(connection.getresponse().read())["host"] == "broker2"
        assert whoami(net["b1"], VIP, LINK_PORT) == "broker3"
    finally:
        connection.close()
        net.balance("random")


@pytest.mark.usefixtures("stand_ins")
def test_a_cut_is_silent_and_ends(net: Topology) -> None:
    """A cut-off place neither answers nor refuses, keeps its loopback, and is back after `mend`."""
    broker = net["broker1"]
    broker.cut()
    try:
        with pytest.raises(TimeoutError):
            net["controller"].connect(broker.ip, LINK_PORT, 0.5)
        assert whoami(broker, "127.0.0.1", LINK_PORT) == "broker1"
    finally:
        broker.mend()
    assert whoami(net["controller"], broker.ip, LINK_PORT) == "broker1"
