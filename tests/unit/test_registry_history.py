"""What both registries remember of agents that left or were refused, of nodes and of gateways."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rtunnel.clock import lasting
from rtunnel.registry import Departure, GatewayRecord, History, NodeFacts, RefusedAgent, Registry
from rtunnel.registry.base import SHOWN_SECONDS
from rtunnel.registry.history import CLAIM_SECONDS, KEPT_SECONDS, unknown_target
from rtunnel.registry.memory import MAX_NOTES, MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from rtunnel.registry.redis_rows import read_departure, read_refused
from support.polling import until
from support.redis_server import RedisServer
from support.registries import Node, Store

IP = "10.1.0.7"


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None
    opened = Store(server)
    yield opened
    opened.close()


def departure(**changes: Any) -> Departure:
    fields: dict[str, Any] = {
        "namespace": "default", "agent_id": "a", "addresses": (IP,), "node": "broker-1", "peer": "10.9.9.9",
        "cause": "closed", "text": "closed by peer", "epoch": 7,
    }  # fmt: skip
    return Departure(**fields | changes)


def refusal(**changes: Any) -> RefusedAgent:
    fields: dict[str, Any] = {
        "namespace": "default", "agent_id": "a", "addresses": (IP,), "node": "broker-1", "peer": "10.9.9.9",
        "cause": "address_taken", "text": "h9 has it", "proved": True,
    }  # fmt: skip
    return RefusedAgent(**fields | changes)


def tell(registry: Registry, *notes: Departure | RefusedAgent, node: str = "broker-1") -> float:
    return registry.report(NodeFacts(node=node), notes)


def bare(*notes: Departure | RefusedAgent) -> list[Departure | RefusedAgent]:
    return [msgspec.structs.replace(note, at=0.0, ago=0.0) for note in notes]


def test_departure_is_found_by_each_address_with_its_time(store: Store) -> None:
    registry = store.open()
    told = departure(addresses=(IP, "fd00::7"), ago=100.0, namespace="blue:x", agent_id='a "b"', epoch=(1 << 63) + 1)
    now = tell(registry, told)
    for ip in told.addresses:
        history = store.open().history("blue:x", ip)
        assert bare(*history.departures) == bare(told)
        assert abs(now - 100.0 - history.departures[0].at) < 2 and now <= history.now < now + 5
    assert registry.history("default", IP).departures == ()


def test_refusal_is_found_by_address_and_by_agent_id(store: Store) -> None:
    """A refusal of an unproved agent is kept beside that of a proved one, and replaces none."""
    registry = store.open()
    proved = refusal(addresses=(IP, "10.1.0.8"))
    claimed = refusal(cause="bad_token", text="not known", proved=False)
    tell(registry, proved)
    tell(registry, claimed)
    assert bare(*registry.history("default", IP).refusals) == [proved, claimed]
    assert bare(*registry.history("default", "10.1.0.8").refusals) == [proved]
    assert bare(*registry.agent_history("default", "a").refusals) == [proved, claimed]
    assert registry.agent_history("default", "b").refusals == registry.agent_history("x", "a").refusals == ()
    nameless = refusal(agent_id="none", addresses=())
    tell(registry, nameless)
    assert bare(*registry.agent_history("default", "none").refusals) == [nameless]


@pytest.mark.parametrize("newest_first", [True, False])
def test_newest_note_of_an_address_stays_in_any_order_of_writing(store: Store, newest_first: bool) -> None:
    registry = store.open()
    notes = [departure(node="broker-2", ago=5.0), departure(ago=50.0)]
    for note in notes if newest_first else notes[::-1]:
        tell(registry, note)
    [found] = registry.history("default", IP).departures
    assert found.node == "broker-2"


def test_departure_of_an_agent_with_another_session_says_where_it_is(store: Store) -> None:
    """Sessions of other agents, dead ones and the departed session itself do not count."""
    registry = store.open()
    one, two = Node(registry), Node(registry, "broker-2", "10.0.0.2")
    first = one.start()
    tell(registry, departure(epoch=first.epoch))
    assert registry.history("default", IP).departures[0].other_node == ""
    second = two.start()
    tell(registry, departure(epoch=first.epoch), departure(epoch=1, agent_id="b", addresses=("10.1.0.8", IP)))
    [found] = registry.history("default", IP).departures
    assert found.other_node == "" and found.agent_id == "b"
    tell(registry, departure(epoch=first.epoch))
    assert registry.history("default", IP).departures[0].other_node == "broker-2"
    registry.unregister(first)
    registry.unregister(second)
    tell(registry, departure(node="broker-2", epoch=second.epoch), node="broker-2")
    assert registry.history("default", IP).departures[0].other_node == ""


def test_wiped_registry_remembers_nothing(store: Store) -> None:
    registry = store.open()
    tell(registry, departure(), refusal())
    store.wipe()
    history = registry.history("default", IP)
    assert (history.departures, history.refusals, registry.node_facts()) == ((), (), [])


def test_facts_of_a_node_are_there_while_it_is_known_and_go_with_its_stop(store: Store) -> None:
    registry = store.open(ttl=0.5, quarantine=1.0)
    node, dead = Node(registry), Node(registry, "broker-2")
    facts = NodeFacts(
        node="broker-1", host="h", ip="10.0.0.1", version="0.1", port_range="20000-29999", ports_free=1, ports_used=2,
        ports_resting=3, open_range="1-2", open_used=4, open_resting=5, descriptors=6, descriptor_limit=7,
        clock_offset=-0.5, beat_seconds=0.25, notes_dropped=8, reasons=("draining",), sessions=9,
    )  # fmt: skip
    before = registry.now()
    assert before <= registry.report(facts, ()) <= before + 5
    registry.report(NodeFacts(node="broker-2"), ())
    found = {told.node: told for told in registry.node_facts()}
    assert msgspec.structs.replace(found["broker-1"], at=0.0) == facts and found["broker-1"].at >= before
    until(lambda: registry.nodes() == [], what="the nodes' heartbeats to grow old")
    assert len(registry.node_facts()) == 2
    Node(registry, "broker-3")  # whose start removes what nobody needs any more
    registry.stop_node(node.name, node.record.incarnation)
    assert [told.node for told in registry.node_facts()] == [dead.name]


def test_gateways_are_listed_while_they_report(store: Store) -> None:
    registry = store.open(ttl=0.5, quarantine=1.0)
    record = GatewayRecord(
        name="g 1", host="h", namespace="blue", version="0.1", state="draining", listen="127.0.0.1:1080", started=1.5,
        clients=1, streams=2, tuples=3, routes_age=0.5, fault="Redis is away", suspects=("b1", "b2"),
    )  # fmt: skip
    registry.report_gateway(record)
    registry.report_gateway(GatewayRecord(name="g2", host="h", namespace="default"))
    found = sorted(registry.gateways(), key=lambda known: known.name)
    assert [known.name for known in found] == ["g 1", "g2"] and abs(found[0].at - registry.now()) < 5
    assert msgspec.structs.replace(found[0], at=0.0) == record
    until(lambda: registry.gateways() == [], what="the gateways' records to expire")


# ---------------------------------------------------------------------- what one of them does


def test_entries_of_redis_expire(redis_server: RedisServer) -> None:
    """A proved refusal and a departure after 30 days, a claim after one; a node's facts after an hour."""
    registry = RedisRegistry(redis_server.url)
    tell(registry, departure(), refusal(), refusal(proved=False))
    registry.report_gateway(GatewayRecord(name="g1", host="h", namespace="default"))
    with redis_server.client() as client:
        left = {name.partition(":")[2]: client.ttl(name) for name in client.scan_iter("rtunnel:*")}
    registry.close()
    assert left.pop("gateways") == -1
    wanted = {
        f"gone:default:{IP}": KEPT_SECONDS, "refused:default:a": KEPT_SECONDS, f"refused-at:default:{IP}": KEPT_SECONDS,
        "claimed:default:a": CLAIM_SECONDS, f"claimed-at:default:{IP}": CLAIM_SECONDS,
        "facts:broker-1": SHOWN_SECONDS, "gateway:g1": 15,
    }  # fmt: skip
    assert left.keys() == wanted.keys()
    assert all(wanted[name] - 60 <= seconds <= wanted[name] for name, seconds in left.items())


def test_entries_of_another_program_cost_only_themselves(redis_server: RedisServer) -> None:
    registry = RedisRegistry(redis_server.url)
    tell(registry, refusal())
    registry.report_gateway(GatewayRecord(name="g1", host="h", namespace="default"))
    with redis_server.client() as client:
        client.set(f"rtunnel:gone:default:{IP}", '{"at":')
        client.lpush("rtunnel:claimed-at:default:" + IP, "x")
        client.zadd("rtunnel:gateways", {"g2": time.time(), "g3": time.time()})
        client.set("rtunnel:gateway:g2", "[]")
        client.lpush("rtunnel:gateway:g3", "x")
        client.lpush("rtunnel:gone:default:10.1.0.8", "x")
    history = registry.history("default", IP)
    assert (history.departures, bare(*history.refusals)) == ((), [refusal()])
    assert [known.name for known in registry.gateways()] == ["g1"]
    tell(registry, departure(addresses=("10.1.0.8", IP)), refusal(proved=False))
    assert len(registry.history("default", IP).departures) == 1
    assert registry.history("default", "10.1.0.8").departures == ()
    registry.close()


def test_entries_look_as_documented(redis_server: RedisServer) -> None:
    """docs/registry.md shows what `redis-cli` prints: each entry is written in exactly that form."""
    page = (Path(__file__).parents[2] / "docs/registry.md").read_text()
    shown = re.search(r"redis-cli MGET rtunnel:gone.*?```", page, re.DOTALL)
    assert shown is not None
    text = re.sub(r"\n {5}", "", shown[0]).replace('\\"', '"')
    documented = re.findall(r'^\d\) "(.*)"$', text, re.MULTILINE)
    assert len(documented) == 2
    registry = RedisRegistry(redis_server.url)
    gone, refused = read_departure(documented[0].encode()), read_refused(documented[1].encode())
    tell(registry, msgspec.structs.replace(gone, at=0.0), msgspec.structs.replace(refused, at=0.0))
    with redis_server.client() as client:
        stored = client.mget(f"rtunnel:gone:default:{IP}", f"rtunnel:refused-at:default:{IP}")
    registry.close()
    assert [re.sub(r'"at":[\d.]+', "", row) for row in stored] == [
        re.sub(r'"at":[\d.]+', "", row) for row in documented
    ]


def test_note_from_the_future_keeps_no_newer_one_away(redis_server: RedisServer) -> None:
    """The clock of the registry has stepped back by a day."""
    registry = RedisRegistry(redis_server.url)
    now = [1_800_000_000.0]
    memory = MemoryRegistry(clock=lambda: now[0])
    for some in (registry, memory):
        tell(some, departure(node="broker-0", ago=-86400.0))
        tell(some, departure(node="broker-1"))
        assert some.history("default", IP).departures[0].node == "broker-1"
    registry.close()


def test_memory_registry_forgets_in_time_and_is_bounded() -> None:
    now = [1_800_000_000.0]
    registry = MemoryRegistry(clock=lambda: now[0])
    tell(registry, departure(), refusal(), refusal(proved=False))
    now[0] += CLAIM_SECONDS
    assert len(registry.history("default", IP).refusals) == 1 and registry.node_facts() == []
    now[0] += KEPT_SECONDS
    history = registry.history("default", IP)
    assert (history.departures, history.refusals) == ((), ())
    for number in range(MAX_NOTES):
        tell(registry, departure(addresses=(f"host-{number}",)))
    assert len(registry._notes) == MAX_NOTES


def test_mass_departure_is_written_in_short_calls(redis_server: RedisServer) -> None:
    """2,000 departures are some eight calls, not one that blocks Redis."""
    registry = RedisRegistry(redis_server.url)
    notes = [departure(agent_id=f"a{n}", addresses=(f"10.1.{n >> 8}.{n & 255}",)) for n in range(2000)]
    tell(registry)
    with redis_server.client() as client:
        before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        tell(registry, *notes)
        calls = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
        assert len(client.keys("rtunnel:gone:*")) == 2000
    registry.close()
    assert calls == 8


# ---------------------------------------------------------------------- sentences


NOON = 1_795_262_400.0  # 2026-11-21 12:00:00 UTC


def test_sentence_of_a_departure() -> None:
    gone = departure(agent_id="host-a1", node="b2", at=NOON - 130)
    sentence = "host-a1 was here until 11:57:50 UTC (2 min ago) on broker b2, left with: closed by peer"
    assert gone.sentence(NOON, ()) == sentence
    assert "on broker b2 (link from 10.9.9.9), left" in gone.sentence(NOON, (), for_operator=True)
    moved = msgspec.structs.replace(gone, cause="left", text="bye", other_node="b3", at=NOON - 3 * 86400)
    text = (
        "host-a1 was here until 2026-11-18 12:00:00 UTC (3 days ago) on broker b2, left by itself: bye; "
        "it had another session then, on b3"
    )
    assert moved.sentence(NOON, {"b3"}) == text
    assert moved.sentence(NOON, {"b2"}) == f"{text}, which has no heartbeat now"


def test_sentence_of_a_refusal() -> None:
    refused = refusal(node="b1", at=NOON - 5)
    assert refused.sentence(NOON, ()) == "agent a was refused at 11:59:55 UTC (5 s ago) by b1: address_taken: h9 has it"
    claimed = msgspec.structs.replace(refused, proved=False)
    assert claimed.sentence(NOON, ()).startswith("an agent that calls itself a was refused at")


def test_text_of_an_unknown_target_says_the_newest_first() -> None:
    history = History(NOON, (departure(at=NOON - 100),), (refusal(at=NOON - 10),))
    refused, gone = history.sentences(())
    assert refused.startswith("agent a was refused") and gone.startswith("a was here until")
    assert unknown_target(IP, []) == f"no agent answers for {IP}"
    assert unknown_target(IP, [refused, gone]) == f"no agent answers for {IP}: {refused}; {gone}"
    text = unknown_target(IP, [], namespace="default", elsewhere=list("wxyz"), asker="this gateway serves")
    assert text.endswith(f": {IP} exists in namespace w, x, y and 1 more (this gateway serves default)")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_time_spans_have_one_unit(seconds: float, text: str) -> None:
    assert lasting(seconds) == text
