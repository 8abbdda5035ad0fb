"""The cause of a trace: a table of reports, each with the words that its cause must have; and what no cause may say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from rtunnel.wire.messages import AgentHop, Hop
from rtunnel.wire.refusal import Refusal
from rtunnel_socks.diagnosis import CLOCK_SECONDS, SLOW_SECONDS, Linked, Report, Way, diagnose
from rtunnel_socks.dial import ACCEPTED, NO_ANSWER, Phase, Tried
from rtunnel_socks.recent import RecentRefusal

NOW = 1_800_000_000.0
HOP = Hop("b1", int(NOW * 1000), "0.1.0", "a1", "10.1.0.7", 0.001, 1.0, 0, 0, 4, 0)
AT_AGENT = AgentHop("a1", int(NOW * 1000), "0.1.0", "10.1.0.7", "10.1.0.7", "lo", True, 0.001)


def way(node: str = "b1", **more: Any) -> Way:
    """One tuple of a live node."""
    return replace(Way(node, f"10.9.0.1{node[-1]}:20001", "a1", "1", "live", 0.5, False), **more)


def tried(node: str = "b1", code: str = ACCEPTED, phase: Phase = Phase.ANSWERED, **more: Any) -> Tried:
    """One attempt; without `more` all hops have reported."""
    found = Tried(
        node, f"10.9.0.1{node[-1]}:20001", "a1", "1", phase.value, code, 3.0, broker=replace(HOP, node=node),
        at_agent=AT_AGENT,
    )  # fmt: skip
    return replace(found, **more)


def report(code: str = ACCEPTED, *attempts: Tried, **more: Any) -> Report:
    """A report of a target with two paths."""
    made = Report(
        "10.1.0.7:9100", "default", "gw", "0.1.0", "10.9.0.4", NOW, "1", True, "ok", 0.5, 3, 8, code=code,
        ways=[way(), way("b2")], attempts=list(attempts) or [tried(), tried("b2")],
    )  # fmt: skip
    return replace(made, **more)


def silent(**more: Any) -> Tried:
    """A Dial that the broker has passed on, and that nobody answered."""
    hop = replace(HOP, **more)
    return tried(code=NO_ANSWER, phase=Phase.DIALLED, broker=hop, at_agent=None)


def unknown(**more: Any) -> Report:
    """A report of a target without a tuple."""
    return replace(report(Refusal.UNKNOWN_TARGET, text="no agent answers for 10.1.0.7"), ways=[], attempts=[], **more)


def at_agent(code: Refusal, **more: Any) -> Report:
    """A report of a target that both paths' agent could not connect."""
    hop = replace(AT_AGENT, **more)
    return report(code, *(tried(node, code.value, at_agent=hop) for node in ("b1", "b2")))


UNREACHED = tried(code=NO_ANSWER, phase=Phase.CONNECTING, broker=None, at_agent=None)
REJECTED = replace(UNREACHED, code=Refusal.BROKER_UNREACHABLE.value, text="ECONNREFUSED")
TIMEOUT = Refusal.DIAL_TIMEOUT
SLOW = replace(AT_AGENT, connect=2.0)
AHEAD = replace(HOP, time=int((NOW + 60) * 1000))

GIVEN_UP = replace(silent(silence=12.0, resending=3), code="link_lost")

CAUSES: list[tuple[str, Report, list[str]]] = [
    ("refused", at_agent(Refusal.TARGET_REFUSED), ["nobody listens on the target's port", "a1"]),
    ("dropped", at_agent(Refusal.TARGET_TIMEOUT), ["the target drops packets"]),
    ("no route", at_agent(Refusal.TARGET_UNREACHABLE, errno="EHOSTUNREACH"), ["no route", "EHOSTUNREACH"]),
    ("not exposed", at_agent(Refusal.NOT_EXPOSED), ["a1 does not expose that port"]),
    ("slow", report(ACCEPTED, tried(at_agent=SLOW), tried("b2")), ["the target is slow", "2.0"]),
    ("denied", unknown(code=Refusal.NOT_AUTHORISED, rule="3 no"), ["rule 3 no denies it"]),
    ("no rule", unknown(code=Refusal.NOT_AUTHORISED, rule=""), ["no rule allows it"]),
    (
        "refused lately",
        report(recent=[RecentRefusal(8.0, "10.9.0.4", "alice", "bad_credentials", "the password is not right")]),
        ["was refused 8 s ago", "bad_credentials", "password"],
    ),
    ("unknown", unknown(), ["no agent is registered", "no agent answers for 10.1.0.7"]),
    ("unknown, old table", unknown(table_age=26.6), ["27 s old"]),
    ("docker0", unknown(linked=[Linked("default", "a1", "172.17.0.1", "b1")]), ["agent a1", "172.17.0.1", "docker0"]),
    ("NAT", unknown(linked=[Linked("default", "a1", "192.168.7.2", "b1")]), ["agent a1", "192.168.7.2", "NAT"]),
    ("loop", unknown(loop="the broker b1"), ["a loop", "10.1.0.7 is the broker b1"]),
    ("no agents", unknown(tuples=0), ["no broker has any agent", "VIP"]),
    ("registry", unknown(code=Refusal.REGISTRY_UNAVAILABLE, text="Redis"), ["does not reach the registry", "Redis"]),
    ("registry, reached", report(registry="Redis 10.9.0.20: no answer", table_age=12.0), ["12 s old", "10.9.0.20"]),
    ("one path", report(ACCEPTED, tried(), ways=[way()]), ["by one path only", "3 brokers", "VIP"]),
    (
        "agent says why",
        report(ACCEPTED, tried(at_agent=replace(AT_AGENT, doubt="the VIP leads to the same node")), ways=[way()]),
        ["by one path only", "the VIP leads to the same node"],
    ),
    ("second host", report(second_hosts=["host-b (10.2.0.8)"]), ["another host claims", "a1", "10.2.0.8"]),
    ("broker down", report(ACCEPTED, UNREACHED, tried("b2"), ways=[way(heartbeat_age=None)]), ["b1", "no heartbeat"]),
    ("broker late", report(ACCEPTED, UNREACHED, tried("b2"), ways=[way(heartbeat_age=7.0)]), ["no heartbeat for 7 s"]),
    ("firewall drops", report(TIMEOUT, UNREACHED), ["drops the TCP connection", "firewall"]),
    ("firewall rejects", report(Refusal.BROKER_UNREACHABLE, REJECTED), ["rejects the TCP connection"]),
    ("wrong PS IP", report(Refusal.BROKER_UNREACHABLE, replace(REJECTED, text="EHOSTUNREACH")), ["a wrong PS IP"]),
    (
        "stale table",
        report(Refusal.AGENT_UNAVAILABLE, tried(code="stale_epoch"), REJECTED, registry="no answer", table_age=4.3),
        ["the table of gw is 4 s old", "no answer"],
    ),
    ("one PS IP", report(Refusal.BROKER_UNREACHABLE, REJECTED, ways=[way(same_ip=["b2"])]), ["b2 has the same PS IP"]),
    ("clock", report(Refusal.EXPIRED, tried(code="expired", broker=AHEAD, at_agent=None)), ["broker b1 is 60 s ahead"]),
    ("clock, one path", report(ACCEPTED, tried(broker=AHEAD), tried("b2")), ["the clock of the broker b1"]),
    ("host silent", report(TIMEOUT, silent(silence=12.0, resending=3, silent=1)), ["a1 is silent", "its host hangs"]),
    ("link given up", report("link_lost", GIVEN_UP), ["a1 is silent"]),
    ("VIP down", report(TIMEOUT, silent(silence=12.0, resending=3, silent=4)), ["all 4 agents of b1", "VIP"]),
    ("agent hangs", report(TIMEOUT, silent(silence=12.0)), ["still acknowledges", "the agent hangs", "MTU"]),
    ("MTU, other path lives", report(ACCEPTED, silent(silence=12.0), tried("b2")), ["large packets on it", "MTU"]),
    ("MTU to the agent", report(TIMEOUT, silent(resending=3)), ["large packets from b1", "MTU"]),
    ("agent says nothing", report(TIMEOUT, silent()), ["does not answer it", "its link lives"]),
    (
        "MTU to the gateway",
        report(TIMEOUT, tried(code=NO_ANSWER, phase=Phase.DIALLED, broker=None, at_agent=None, unordered=1)),
        ["large packets from b1", "MTU black hole"],
    ),
    (
        "broker hangs",
        report(TIMEOUT, tried(code=NO_ANSWER, phase=Phase.DIALLED, broker=None, at_agent=None)),
        ["says nothing", "the broker hangs"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("told", "words"), [case[1:] for case in CAUSES], ids=[case[0] for case in CAUSES])
def test_the_cause_names_the_fault(told: Report, words: list[str]) -> None:
    cause, do = diagnose(told)
    assert do and all(word in cause for word in words), cause


#: Of a path that works: silence of its idle link, difference of the clocks, time of the connect.
GOOD_PATHS = st.tuples(
    st.floats(0, 9), st.floats(-CLOCK_SECONDS + 0.1, CLOCK_SECONDS - 0.1), st.floats(0, SLOW_SECONDS)
)


@given(st.floats(0, 3600), st.floats(0, 3600), st.lists(GOOD_PATHS, min_size=2, max_size=6))
def test_a_healthy_report_has_no_cause(age: float, rtt: float, paths: list[tuple[float, float, float]]) -> None:
    """Whatever the ages, the silence of idle links, small differences of clocks, and the number of paths."""
    attempts = []
    for number, (silence, off, connect) in enumerate(paths):
        at = int((NOW + off) * 1000)
        hop = replace(HOP, node=f"b{number}", silence=silence, time=at, rtt=rtt)
        attempts.append(tried(f"b{number}", broker=hop, at_agent=replace(AT_AGENT, time=at, connect=connect)))
    ways = [way(f"b{number}", heartbeat_age=age) for number in range(len(paths))]
    assert diagnose(report(ACCEPTED, *attempts, ways=ways, table_age=age)) == ("", "")


@pytest.mark.parametrize("code", list(Refusal))
def test_each_refusal_has_a_cause_and_a_next_step(code: Refusal) -> None:
    """Before any Dial, of a broker, and of an agent; the cause names the code, or says it in words."""
    before = report(code, ways=[], text="the text")
    by_broker = report(code, tried(code=code.value, at_agent=None, text="the text"))
    by_agent = report(code, tried(code=code.value, text="the text"))
    for told in (replace(before, attempts=[]), by_broker, by_agent):
        cause, do = diagnose(told)
        assert cause and do
